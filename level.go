// The level of a cluster: what its members may write to the log, to snapshots and to each
// other, so that programs of two versions can be members of one cluster.
//
// A program speaks all levels up to programLevel, and says so in its hellos. The cluster has a
// level, which is part of the replicated state and begins with firstLevel. Whoever writes
// anything that an older program does not know has to look at the cluster's level first: a new
// level comes with each such thing.
//
// The leader raises the level, by an entry of the log, to the highest that all members,
// learners too, have reported in their present lives. The level never falls. Until it rises,
// each program can be replaced by the older one; once it has, a program that does not speak it
// is refused, by name:
//
//   - by the streams of members, in both directions (verdictOn);
//   - as a new member, when it is asked who it is (learnerStep) and again when the change is
//     applied (checkConfChange), for the level may have risen in between;
//   - and it refuses a data directory, a backup or a snapshot of that level, and stops at an
//     entry of that level.
//
// An entry that raises the level names the members that it was made for. If another one has
// come before it is applied, it has no effect.

package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// firstLevel is the level that every program speaks.
const firstLevel = 1

// errLevel means that this program is older than what it reads.
var errLevel = errors.New("this program is too old")

// checkLevel refuses something of a level that a program does not speak.
func checkLevel(what string, level, speaks uint32) error {
	if level <= speaks {
		return nil
	}
	return fmt.Errorf("%w: %s is of level %d, and it speaks levels up to %d: start a newer one",
		errLevel, what, level, speaks)
}

// levelOf is a level as a message has it, which leaves out the first one.
func levelOf(field uint32) uint32 { return max(firstLevel, field) }

// levelField is a level as a message that is written often has it.
func levelField(level uint32) uint32 {
	if level == firstLevel {
		return 0
	}
	return level
}

// levelReports is what a leader goes by when it raises the level.
type levelReports struct {
	// risesTo is how far the present processes of other members let the level rise, by raft
	// ID: of those that this node has a stream to.
	risesTo    map[uint64]uint32
	proposedAt uint64 // tick of the last proposal to raise the level; 0: never
}

func newLevelReports() levelReports { return levelReports{risesTo: map[uint64]uint32{}} }

// risesTo is how far this node lets the level of its cluster rise.
func (o *options) risesTo() uint32 {
	if o.maxLevel == 0 {
		return o.level
	}
	return min(o.level, o.maxLevel)
}

// levelOfAll is the highest level that all members let the cluster rise to; 0: not all of
// them are connected.
func (n *node) levelOfAll() uint32 {
	level := n.opts.risesTo()
	for id := range n.store.members {
		if id != n.id.raftID {
			level = min(level, n.level.risesTo[id])
		}
	}
	return level
}

// raiseLevel, in a leader, proposes to raise the level of the cluster if all members let it.
// The loop calls it at each heartbeat in which the leader may begin a change of membership. It
// waits for an Init that is not done: its other members may speak less.
func (n *node) raiseLevel() {
	level := n.levelOfAll()
	if level <= n.store.level || n.claims.founding != nil {
		return
	}
	isProposed := n.level.proposedAt != 0 && n.clock.now-n.level.proposedAt <= n.electionTicks()
	if isProposed {
		return
	}
	if n.rn.Propose(appendRise(level, slices.Sorted(maps.Keys(n.store.members)))) == nil {
		n.level.proposedAt = n.clock.now
	}
}

// appendRise makes the data of an entry that raises the level: a Batch with a LevelRise alone.
func appendRise(level uint32, members []uint64) []byte {
	b, _ := proto.Marshal(&kvpb.Batch{Rise: &kvpb.LevelRise{Level: level, Members: members}}) // numbers only
	return b
}

// rise raises the level, unless there is a member that the entry does not name.
func (s *store) rise(r *kvpb.LevelRise) {
	for id := range s.members {
		if !slices.Contains(r.Members, id) {
			return
		}
	}
	s.level = max(s.level, r.Level)
}

// noteLevel logs that the level has risen.
func (n *node) noteLevel(before uint32) {
	if n.store.level == before {
		return
	}
	n.logger.Warn("the level of the cluster has risen: no program that does not speak it can be a member any more, "+
		"and there is no way back", "level", n.store.level, "before", before)
}

// levelVerdict refuses a hello if one of both nodes does not speak the level of the other
// one's cluster.
func levelVerdict(h *kvpb.Hello, clusterLevel, speaks uint32) kvpb.Verdict {
	switch {
	case levelOf(h.GetFrom().GetLevel()) < clusterLevel:
		return kvpb.Verdict_VERDICT_CALLER_TOO_OLD
	case speaks < h.ClusterLevel:
		return kvpb.Verdict_VERDICT_CALLED_TOO_OLD
	}
	return kvpb.Verdict_VERDICT_ACCEPTED
}

// levelTooLow is the error for a node that is to be added and does not speak the cluster's
// level.
func levelTooLow(p *kvpb.Peer, level uint32) error {
	return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_LEVEL_TOO_LOW,
		fmt.Sprintf("the program of node %d at %s speaks levels up to %d, and the cluster is of level %d: start a newer one there",
			p.Node.Id, shown(p.Node.Address), levelOf(p.Level), level))
}
