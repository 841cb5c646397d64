// The level of a cluster: what its members may write to the log, to snapshots and to each
// other, so that programs of two versions can be members of one cluster.
//
// A program speaks all levels up to programLevel, and says so in its hellos. The cluster has a
// level, which is part of the replicated state and begins with firstLevel. Whoever writes
// anything that an older program does not know has to look at the cluster's level first: each
// such thing gets a new level.
//
// The leader raises the level, by an entry of the log, to the highest that all members,
// learners too, have reported in their present lives. The level never falls. Until it rises,
// each program can be replaced by the older one. Once it has, members refuse a program that does
// not speak it, by name:
//
//   - the streams of members do, in both directions (verdictOn), also those that were open
//     before (setLevel);
//   - a leader does not add it, when it has asked who it is (learnerStep), nor when the change
//     is applied (checkConfChange), for the level may have risen in between.
//
// And such a program refuses what is of that level, by name: a data directory, a backup, a
// snapshot, and an entry, at which it stops.
//
// An entry that raises the level names the members that it was made for. If another one has
// come before it is applied, it has no effect, and stops nobody.

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
	return fmt.Errorf("%w: it speaks levels up to %d, and %s is of level %d: start a newer one",
		errLevel, speaks, what, level)
}

// levelFromWire is the level that a field of a message stands for: 0 for the first one.
func levelFromWire(field uint32) uint32 { return max(firstLevel, field) }

// levelToWire is what stands for a level in a field of the log: nothing for the first one, so
// that entries of that level are, byte by byte, as a program without levels wrote them.
func levelToWire(level uint32) uint32 {
	if level == firstLevel {
		return 0
	}
	return level
}

// levelReports is what a leader goes by when it raises the level.
type levelReports struct {
	// called and callers are the lives that have said last who they are, by raft ID: called, in
	// answer to this node's stream, while that is open; callers, on their own stream. A process
	// that follows another one may call before the stream to the earlier one breaks.
	called, callers map[uint64]*kvpb.Peer
	proposedAt      uint64 // tick of the last proposal to raise the level; 0: never
	tooOldFor       uint32 // the level of a cluster that has called this older program; 0: none has
}

func newLevelReports() levelReports {
	return levelReports{called: map[uint64]*kvpb.Peer{}, callers: map[uint64]*kvpb.Peer{}}
}

// note takes in who a peer says that it is.
func (r *levelReports) note(raftID uint64, outbound bool, p *kvpb.Peer) {
	if outbound {
		r.called[raftID] = p
	} else {
		r.callers[raftID] = p
	}
}

// risesTo is how far the present life of a member lets the level rise; 0: that is not known,
// unless there are streams in both directions, to one life.
func (r *levelReports) risesTo(raftID uint64) uint32 {
	called := r.called[raftID]
	caller := r.callers[raftID]
	isConnected := called != nil && caller != nil
	if !isConnected || called.Life != caller.Life {
		return 0
	}
	return levelFromWire(called.RisesTo)
}

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
			level = min(level, n.level.risesTo(id))
		}
	}
	return level
}

// raiseLevel, in a leader, proposes to raise the level of the cluster if all members let it.
// The loop calls it at each heartbeat in which the leader may begin a change of membership. It
// waits for an Init that is not done: its other members may speak less.
func (n *node) raiseLevel() {
	level := n.levelOfAll()
	if level <= n.store.level || n.store.founding != nil {
		return
	}
	isOnItsWay := n.level.proposedAt != 0 && n.clock.now-n.level.proposedAt <= n.electionTicks()
	if isOnItsWay {
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

// rise raises the level, unless there is a member that the entry does not name. That is found
// out first: such an entry stops no program that does not speak the level.
func (s *store) rise(r *kvpb.LevelRise) error {
	for id := range s.members {
		if !slices.Contains(r.Members, id) {
			return nil
		}
	}
	if err := checkLevel("the cluster", r.Level, s.speaks); err != nil {
		return err
	}
	s.level = max(s.level, r.Level)
	return nil
}

// followLevel says that the level has risen, and has the network refuse who does not speak it.
// A node that starts finds the rise in its log again, before it knows a leader: it has said so
// before.
func (n *node) followLevel(old, now *published) {
	if now.level == old.level {
		return
	}
	n.net.setLevel(now.level)
	isNews := old.clusterID == now.clusterID && now.lead != 0
	if isNews {
		n.logger.Info("the level of the cluster has risen: no program that does not speak it can be a member any more, "+
			"and there is no way back", "level", now.level, "before", old.level)
	}
}

// noteTooOld logs, once for each level, that a cluster calls this node and is of a level that
// its program does not speak.
func (n *node) noteTooOld(h *kvpb.Hello) {
	if h.ClusterLevel == n.level.tooOldFor {
		return
	}
	n.level.tooOldFor = h.ClusterLevel
	from := h.From.GetNode()
	n.logger.Error("this program is too old for the cluster that calls this node: start a newer one",
		append(peerArgs(from), "level", h.ClusterLevel, "speaks", n.opts.level)...)
}

// levelVerdict refuses a hello if one of both nodes does not speak the level of the other
// one's cluster.
func levelVerdict(h *kvpb.Hello, clusterLevel, speaks uint32) kvpb.Verdict {
	switch {
	case levelFromWire(h.GetFrom().GetLevel()) < clusterLevel:
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
			p.Node.Id, shown(p.Node.Address), levelFromWire(p.Level), level))
}
