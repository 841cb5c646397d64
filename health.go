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
// it has applied: that is the goal, until this node has applied it, too. It keeps up if
// it reaches each goal within an election timeout.
type lag struct {
	goal   uint64 // index; never: the leader has not said yet what it has applied
	since  uint64 // tick in which the goal was set
	inTime bool   // the goal before this one was reached in time
}

// follow takes in what the leader, and this node, have applied. All but these indexes is
// in ticks.
func (l *lag) follow(leader, applied, now, limit uint64) {
	if l.goal != never && applied < l.goal {
		return
	}
	l.inTime = l.goal != never && now-l.since <= limit
	l.goal = leader
	l.since = now
}

func (l *lag) isCaughtUp(applied, now, limit uint64) bool {
	if l.goal == never || now-l.since > limit {
		return false
	}
	return l.inTime || applied >= l.goal
}

// nodeHealth is what a node remembers in order to judge its health.
type nodeHealth struct {
	lag lag
	// readyVoters are the voters that answered this leader at the last heartbeat, and had
	// caught up. Empty, if this node does not lead.
	readyVoters []uint64
	// dispensableUntil is the tick up to which the cluster can do without this node, says
	// the leader.
	dispensableUntil uint64
}

// forgetLeader drops what the last leader said. now is the tick in which it stopped to
// be the leader.
func (h *nodeHealth) forgetLeader(now uint64) {
	h.lag = lag{goal: never, since: now}
	h.dispensableUntil = 0
}

// isCaughtUp reports whether this node's state is that of its leader, but for what was
// committed in the last election timeout.
func (h *nodeHealth) isCaughtUp(c *clusterState) bool {
	if c.raft.role == raft.StateLeader {
		return c.leads
	}
	return h.lag.isCaughtUp(c.applied, c.now, c.electionTicks)
}

// whyUnhealthy says why this node should get no calls; empty: it should.
func (h *nodeHealth) whyUnhealthy(c *clusterState) string {
	switch {
	case !c.inCluster:
		return "in no cluster"
	case c.members[c.raftID] == nil:
		return "not a member, as far as it knows"
	case len(c.raftIDsOf(c.self.Id)) > 1:
		return c.whyNotBack()
	case c.raft.lead == 0:
		return c.noLeader().Error()
	case !h.isCaughtUp(c):
		return "not yet caught up"
	}
	return ""
}

// whyNotBack says of a node that is being taken back where its other members are. This
// node does not connect to them, so only the leader's log tells whether one answers.
func (c *clusterState) whyNotBack() string {
	var at []string
	for _, id := range c.raftIDsOf(c.self.Id) {
		if id != c.raftID {
			at = append(at, c.members[id].Address)
		}
	}
	return fmt.Sprintf("not yet back in its role: the members know node %d at %s, too; "+
		"if another process runs there, stop one of the two", c.self.Id, strings.Join(at, " and "))
}

// whyNotRestart says why this node should not be stopped for a restart; empty: the
// cluster can do without it for a while.
func (h *nodeHealth) whyNotRestart(c *clusterState) string {
	if why := h.whyUnhealthy(c); why != "" {
		return why
	}
	if isJoint(c.conf) {
		return "a change of membership is half way"
	}
	isMissed := c.isVoter(c.raftID) && !h.isDispensable(c)
	if !isMissed {
		return ""
	}
	if c.raft.role != raft.StateLeader {
		return fmt.Sprintf("its leader, %s, does not say that the cluster can do without it; "+
			"that node's own health tells why", c.locate(c.raft.lead))
	}
	if !c.mayChange {
		return "a change of membership, or of leadership, is running"
	}
	missing := slices.DeleteFunc(slices.Clone(c.conf.GetVoters()), func(id uint64) bool {
		return slices.Contains(h.readyVoters, id)
	})
	behind := ", or is too far behind"
	if len(missing) > 1 {
		behind = ", or are too far behind"
	}
	return "the cluster could not go on without it: " + c.doNotAnswer(missing) + behind
}

// isDispensable reports whether the leader says that the cluster can do without this
// voter. It said so at most an election timeout ago.
func (h *nodeHealth) isDispensable(c *clusterState) bool {
	if c.raft.role == raft.StateLeader {
		return h.canDoWithout(c, c.raftID)
	}
	return c.raft.lead != 0 && c.now < h.dispensableUntil
}

// canDoWithout reports whether the cluster goes on without a voter, as long as no other
// voter fails: the other voters that answer and have caught up are a majority, and no
// change of membership runs. A cluster of one or two voters cannot go on without any:
// there, it reports whether all others are up, because a restart loses least then.
func (h *nodeHealth) canDoWithout(c *clusterState, raftID uint64) bool {
	voters := c.conf.GetVoters()
	others := 0
	for _, up := range h.readyVoters {
		if up != raftID && slices.Contains(voters, up) {
			others++
		}
	}
	if !c.mayChange {
		return false
	}
	if len(voters) <= 2 {
		return others == len(voters)-1
	}
	return others >= len(voters)/2+1
}

// countReady notes the voters that answer this leader and have caught up.
func (h *nodeHealth) countReady(l *leaderState) {
	h.readyVoters = nil
	if !l.leads {
		return
	}
	for _, id := range l.conf.GetVoters() {
		isReady := id == l.raftID || l.isCaughtUp(id)
		if isReady && l.isAlive(id) {
			h.readyVoters = append(h.readyVoters, id)
		}
	}
}

// followHeartbeat takes from a heartbeat of the leader what the leader adds to it.
func (h *nodeHealth) followHeartbeat(c *clusterState, m *raftpb.Message) {
	if m.GetFrom() != c.raft.lead || m.GetTerm() != c.raft.term {
		return
	}
	if m.GetIndex() != 0 {
		h.lag.follow(m.GetIndex(), c.applied, c.now, c.electionTicks)
	}
	h.dispensableUntil = 0
	if m.GetRejectHint() != 0 {
		h.dispensableUntil = c.now + c.electionTicks
	}
}

// addToHeartbeat adds to a leader's heartbeat what the follower wants to know besides:
// what is applied, if that is no less than was ever acknowledged, and whether the
// cluster can do without the follower. Raft does not look at these fields of a heartbeat.
func (h *nodeHealth) addToHeartbeat(c *clusterState, m *raftpb.Message) {
	if !c.leads {
		return
	}
	m.Index = new(c.applied)
	if h.canDoWithout(c, m.GetTo()) {
		m.RejectHint = new(uint64(1))
	}
}

// noLeader is what to say to a call that finds no leader: who is needed and does not
// answer, and for how long. For the first two election timeouts without a leader only
// broken streams tell.
func (c *clusterState) noLeader() error {
	if err := c.quorumLost(); err != nil {
		return err
	}
	var silent []string
	for _, voters := range [][]uint64{c.conf.GetVoters(), c.conf.GetVotersOutgoing()} {
		missing := c.silentAmong(voters)
		needed := len(voters)/2 + 1
		if len(voters) > 0 && len(voters)-len(missing) < needed {
			return fmt.Errorf("%w: %d of %d voters are needed, but %s",
				errNoLeader, needed, len(voters), strings.Join(missing, ", "))
		}
		silent = append(silent, missing...)
	}
	if len(silent) > 0 {
		slices.Sort(silent)
		return fmt.Errorf("%w that this node hears: %s", errNoLeader, strings.Join(slices.Compact(silent), ", "))
	}
	hearsLeadersOnly := !c.isVoter(c.raftID) && c.leaderlessTicks > 2*c.electionTicks
	if hearsLeadersOnly {
		return fmt.Errorf("%w: this node is a learner, and has heard of none for %v. The voters know why: %s",
			errNoLeader, c.durationOf(c.leaderlessTicks), c.names(c.conf.GetVoters()))
	}
	return errNoLeader
}

// silentAmong says of those voters that do not answer since when and where, in order.
func (c *clusterState) silentAmong(voters []uint64) []string {
	var silent []string
	for _, id := range voters {
		if id != c.raftID && !c.mayAnswer(id) {
			silent = append(silent, cmp.Or(c.refusals[id], c.describeSilence(id)))
		}
	}
	slices.Sort(silent)
	return silent
}

// mayAnswer reports whether a voter is connected and, as far as this node can know yet
// without a leader, answers. Followers need not hear each other while there is a leader.
// Without one, a voter calls for votes once in two election timeouts, and hears from
// whoever is there.
func (c *clusterState) mayAnswer(raftID uint64) bool {
	if !c.connected[raftID] {
		return false
	}
	hasAsked := c.isVoter(c.raftID) && c.leaderlessTicks > 2*c.electionTicks
	return !hasAsked || c.now-c.heard[raftID] <= 2*c.electionTicks
}

// describeSilence says that a member does not answer, since when and where.
func (c *clusterState) describeSilence(raftID uint64) string {
	ticks := c.leaderlessTicks // before, it need not have said anything to this node
	if heard, ok := c.heard[raftID]; ok {
		ticks = min(ticks, c.now-heard)
	}
	text := fmt.Sprintf("%s has not answered for %v", c.locate(raftID), c.durationOf(ticks))
	if !c.connected[raftID] {
		text += " and is not connected"
	}
	return text
}

// quorumLost says so if too many voters have lost their memory for the cluster
// ever to go on: what they knew cannot be made up. Only a newer configuration
// than this node has applied could make it untrue.
func (c *clusterState) quorumLost() error {
	for _, voters := range [][]uint64{c.conf.GetVoters(), c.conf.GetVotersOutgoing()} {
		lost := slices.DeleteFunc(slices.Clone(voters), func(id uint64) bool { return !c.hasLostMemory(id) })
		needed := len(voters)/2 + 1
		if len(voters) == 0 || len(voters)-len(lost) >= needed {
			continue
		}
		return fmt.Errorf("%w: %d of %d voters are needed, but %s restarted without memory, or with an empty data "+
			"directory (the old directory, put back, brings such a node back)",
			errNoLeader, needed, len(voters), c.names(lost))
	}
	return nil
}

// hasLostMemory reports whether the node of a member runs under another raft ID: because
// that one has answered, or because that node is this one.
func (c *clusterState) hasLostMemory(raftID uint64) bool {
	if c.reborn[raftID] != nil {
		return true
	}
	return raftID != c.raftID && proto.Equal(c.members[raftID], c.self)
}

// What the rest of the loop asks of its health, or tells it.

func (n *node) addToHeartbeat(m *raftpb.Message) {
	var c clusterState // for each heartbeat: not on the heap
	n.gather(&c)
	n.health.addToHeartbeat(&c, m)
}

func (n *node) followHeartbeat(m *raftpb.Message) {
	var c clusterState
	n.gather(&c)
	n.health.followHeartbeat(&c, m)
}

func (n *node) whyUnhealthy() string { return n.health.whyUnhealthy(n.clusterState()) }

func (n *node) whyNotRestart() string { return n.health.whyNotRestart(n.clusterState()) }

func (n *node) noLeader() error { return n.clusterState().noLeader() }

func (n *node) quorumLost() error { return n.clusterState().quorumLost() }
