// What a node says of itself: whether it is healthy, whether it may be restarted, and
// why there is no leader.

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// lag is how far this node is behind its leader. A leader says with each heartbeat what
// it has applied: that is the mark, until this node has applied it, too. It keeps up if
// it applies each mark within an election timeout.
type lag struct {
	mark   uint64 // never: the leader has not said yet what it has applied
	since  uint64 // tick in which the mark was set
	inTime bool   // the mark before this one was applied in time
}

// follow takes in what the leader has applied. All but the indexes is in ticks.
func (l *lag) follow(leader, applied, now, limit uint64) {
	if l.mark != never && applied < l.mark {
		return
	}
	l.inTime = l.mark != never && now-l.since <= limit
	l.mark, l.since = leader, now
}

func (l *lag) caughtUp(applied, now, limit uint64) bool {
	if l.mark == never || now-l.since > limit {
		return false
	}
	return l.inTime || applied >= l.mark
}

// nodeHealth is what the loop's judgement of this node's health rests on.
type nodeHealth struct {
	lag         lag
	readyVoters []uint64 // that answered this leader at the last heartbeat, and had caught up
	// dispensableUntil is the tick up to which the cluster can do without this
	// node, says the leader.
	dispensableUntil uint64
}

// forgetLeader drops what the last leader said. now is the tick in which it stopped to
// be the leader.
func (h *nodeHealth) forgetLeader(now uint64) {
	h.lag = lag{mark: never, since: now}
	h.dispensableUntil = 0
}

// caughtUp reports whether this node's state is that of its leader, but for what was
// committed in the last election timeout.
func (n *node) caughtUp() bool {
	if n.raft.role == raft.StateLeader {
		return n.leads()
	}
	return n.health.lag.caughtUp(n.store.index, n.clock.now, n.electionTicks())
}

// whyUnhealthy says why this node should get no calls; empty: it should.
func (n *node) whyUnhealthy() string {
	switch {
	case n.rn == nil:
		return "in no cluster"
	case n.store.members[n.id.raftID] == nil:
		return "not a member, as far as it knows"
	case len(n.store.raftIDsOf(n.self.Id)) > 1:
		return n.whyTwoLives()
	case n.raft.lead == 0:
		return n.noLeader().Error()
	case !n.caughtUp():
		return "not yet caught up"
	}
	return ""
}

// whyTwoLives says of a node that is a member twice where its other lives are. It does
// not connect to them, so only the leader's log tells whether one of them answers.
func (n *node) whyTwoLives() string {
	var at []string
	for _, id := range n.store.raftIDsOf(n.self.Id) {
		if id != n.id.raftID {
			at = append(at, n.store.members[id].Address)
		}
	}
	return fmt.Sprintf("not yet back in its role: the members know node %d at %s, too; "+
		"if another process runs there, stop one of the two", n.self.Id, strings.Join(at, " and "))
}

// whyNotRestart says why this node should not be stopped for a restart; empty: the
// cluster can do without it for a while.
func (n *node) whyNotRestart() string {
	if why := n.whyUnhealthy(); why != "" {
		return why
	}
	switch {
	case isJoint(n.store.conf):
		return "a change of membership is half way"
	case !n.isVoter(n.id.raftID):
		return "" // a learner's vote is not missed
	case n.isDispensable():
		return ""
	case n.raft.role == raft.StateLeader && !n.mayChange():
		return "a change of membership, or of leadership, is running"
	case n.raft.role == raft.StateLeader:
		missing := slices.DeleteFunc(slices.Clone(n.store.conf.GetVoters()), func(id uint64) bool {
			return slices.Contains(n.health.readyVoters, id)
		})
		return "the cluster could not go on without it: " + n.silent(missing) + ", or is too far behind"
	}
	return fmt.Sprintf("its leader, %s, does not say that the cluster can do without it; "+
		"that node's own health tells why", n.locate(n.raft.lead))
}

// isSpared reports whether the leader says that the cluster can do without this voter.
// It said so at most an election timeout ago.
func (n *node) isDispensable() bool {
	if n.raft.role == raft.StateLeader {
		return n.canDoWithout(n.id.raftID)
	}
	return n.raft.lead != 0 && n.clock.now < n.health.dispensableUntil
}

// canSpare reports whether the cluster goes on without a voter, as long as no other
// voter fails: the other voters that answer and have caught up are a majority, and no
// change of membership runs. A cluster of one or two voters cannot go on without any:
// there, it reports whether all others are up, because a restart loses least then.
func (n *node) canDoWithout(id uint64) bool {
	voters := n.store.conf.GetVoters()
	others := 0
	for _, up := range n.health.readyVoters {
		if up != id && slices.Contains(voters, up) {
			others++
		}
	}
	if !n.mayChange() {
		return false
	}
	if len(voters) <= 2 {
		return others == len(voters)-1
	}
	return others >= len(voters)/2+1
}

// countUp notes the voters that answer this leader and have caught up.
func (n *node) countUp() {
	n.health.readyVoters = n.health.readyVoters[:0]
	if !n.leads() {
		return
	}
	progress := n.progressOf()
	for _, id := range n.store.conf.GetVoters() {
		if id == n.id.raftID || n.alive(id) && n.isCaughtUp(progress[id]) {
			n.health.readyVoters = append(n.health.readyVoters, id)
		}
	}
}

// noLeader is what to say to a call that finds no leader: who is needed and does not
// answer, and for how long. For the first two election timeouts without a leader only
// broken streams tell.
func (n *node) noLeader() error {
	if err := n.quorumLost(); err != nil {
		return err
	}
	voters := n.store.conf.GetVoters()
	var silent []string
	for _, id := range voters {
		if id != n.id.raftID && !n.answers(id) {
			silent = append(silent, cmp.Or(n.peers.refusals[id], n.silence(id)))
		}
	}
	if len(silent) == 0 {
		return errNoLeader
	}
	slices.Sort(silent)
	needed := len(voters)/2 + 1
	if len(voters)-len(silent) >= needed {
		return fmt.Errorf("%w that this node hears: %s", errNoLeader, strings.Join(silent, ", "))
	}
	return fmt.Errorf("%w: %d of %d voters are needed, but %s", errNoLeader, needed, len(voters), strings.Join(silent, ", "))
}

// answers reports whether a voter is connected and, as far as this node can know yet,
// answers. While there is no leader a voter calls for votes once in two election
// timeouts, and hears from whoever is there.
func (n *node) answers(id uint64) bool {
	if !n.peers.connected[id] {
		return false
	}
	asks := n.isVoter(n.id.raftID) && n.election.leaderless > 2*n.electionTicks()
	return !asks || n.clock.now-n.peers.heard[id] <= 2*n.electionTicks()
}

// silence says that a member does not answer, since when and where.
func (n *node) silence(id uint64) string {
	ticks := n.election.leaderless // followers need not hear each other while there is a leader
	if heard, ok := n.peers.heard[id]; ok {
		ticks = min(ticks, n.clock.now-heard)
	}
	text := fmt.Sprintf("%s has not answered for %v", n.locate(id), n.durationOf(ticks))
	if !n.peers.connected[id] {
		text += " and is not connected"
	}
	return text
}

// quorumLost says so if too many voters have lost their memory for the cluster
// ever to go on: what they knew cannot be made up. Only a newer configuration
// than this node has applied could make it untrue.
func (n *node) quorumLost() error {
	for _, voters := range [][]uint64{n.store.conf.GetVoters(), n.store.conf.GetVotersOutgoing()} {
		lost := slices.DeleteFunc(slices.Clone(voters), func(id uint64) bool { return !n.hasLostMemory(id) })
		need := len(voters)/2 + 1
		if len(voters) > 0 && len(voters)-len(lost) < need {
			return fmt.Errorf("%w: %d of %d voters are needed, but %s restarted without memory, or with an empty data directory "+
				"(the old directory, put back, brings such a node back)", errNoLeader, need, len(voters), n.names(lost))
		}
	}
	return nil
}

// hasLostMemory reports whether another life answers in place of a member: one that
// this node has met, or this node itself, at the address of an older life of its own.
func (n *node) hasLostMemory(id uint64) bool {
	if n.peers.met[id] != nil {
		return true
	}
	return id != n.id.raftID && proto.Equal(n.store.members[id], n.self)
}

// followHeartbeat takes from a heartbeat of the leader what the leader adds to it.
func (n *node) followHeartbeat(m *raftpb.Message) {
	if m.GetFrom() != n.raft.lead || m.GetTerm() != n.raft.term {
		return
	}
	if m.GetIndex() != 0 {
		n.health.lag.follow(m.GetIndex(), n.store.index, n.clock.now, n.electionTicks())
	}
	n.health.dispensableUntil = 0
	if m.GetRejectHint() != 0 {
		n.health.dispensableUntil = n.clock.now + n.electionTicks()
	}
}

// addToHeartbeat adds to a leader's heartbeat what the follower wants to know besides:
// what is applied, if that is no less than was ever acknowledged, and whether the
// cluster can do without the follower. Raft does not look at these fields of a heartbeat.
func (n *node) addToHeartbeat(m *raftpb.Message) {
	if !n.leads() {
		return
	}
	m.Index = new(n.store.index)
	if n.canDoWithout(m.GetTo()) {
		m.RejectHint = new(uint64(1))
	}
}
