// Nodes that come back without their memory: how a leader takes them back.
//
// Such a node has another raft ID: under the old one it could vote twice. A node that
// answers the leader's hello at the address of a member, under another raft ID and in no
// other cluster, is reborn. The leader adds the new raft ID as a learner, so the node has
// two for a while, and the configuration has two members for one node. Once one of them is
// known to be gone, the leader removes that one.

package main

import (
	"log/slog"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// rebirthFresh is how long an answer without memory counts, and how long at least a raft
// ID must be silent to be taken for gone.
const rebirthFresh = leaderWait

// rebirth is a raft ID without memory that answered in place of a member.
type rebirth struct {
	*kvpb.Peer
	seen uint64 // tick of its last answer
}

// noteRebirth remembers that a member has lost its memory and waits to be taken back.
func (n *node) noteRebirth(raftID uint64, p *kvpb.Peer) {
	old := n.peers.reborn[raftID]
	if old == nil || old.RaftId != p.RaftId {
		n.sayRebirth(raftID, p.Node)
	}
	n.peers.reborn[raftID] = &rebirth{Peer: p, seen: n.clock.now}
}

// sayRebirth logs that a member is back without its memory. It is a loss if the member has a data
// directory, if our stream to it broke without a goodbye, or if this node has led for a while and
// has no majority without it. Else it is no more than a planned restart of a node in memory, as far as this node
// knows: one that has just started itself need not have had a stream to it.
func (n *node) sayRebirth(raftID uint64, node *kvpb.Node) {
	c := n.clusterState()
	saidGoodbye, wasThere := n.peers.goodbyes[raftID]
	knowsOthers := c.raft.role == raft.StateLeader && !c.isNewLeader()
	const loss = "a node has lost its memory: "
	switch {
	case n.isDurable(raftID):
		n.logger.Warn(loss+"its data directory is empty", peerArgs(node)...)
	case wasThere && !saidGoodbye:
		n.logger.Warn(loss+"it was not told to stop", peerArgs(node)...)
	case knowsOthers && !c.hasMajorityWithout(raftID):
		n.logger.Warn(loss+"it was stopped while too few others answered", peerArgs(node)...)
	default:
		n.logger.Info("a node is back from a restart, without its memory: the cluster takes it back", peerArgs(node)...)
	}
}

// hasMajorityWithout reports whether this leader and the other voters that answer it are a majority.
func (c *clusterState) hasMajorityWithout(raftID uint64) bool {
	voters := c.conf.GetVoters()
	others := 0
	for _, id := range voters {
		if id != raftID && c.isAlive(id) {
			others++
		}
	}
	return others > len(voters)/2
}

// heal takes the next step of healing. The loop calls it at each heartbeat in which it
// may begin a change.
func (n *node) heal() { n.perform(n.change.healing.step(n.leaderState(), n.logger)) }

// healing is what a leader has seen of nodes that have two raft IDs.
type healing struct {
	duplicates map[uint64]*duplicate // by raft ID of the learner
}

// duplicate is a learner whose node is a member by an older raft ID, too.
type duplicate struct {
	term   uint64 // in which this leader has seen it
	since  uint64 // tick in which this leader first saw it
	warned bool   // the log says that both raft IDs answer
}

// isComingBack reports whether the node of a member has just answered without memory,
// and waits to be taken back.
func (c *clusterState) isComingBack(raftID uint64) bool {
	r := c.reborn[raftID]
	return r != nil && c.now-r.seen < c.ticksOf(rebirthFresh)
}

// mustTakeBack reports whether the node of a member waits to be taken back, and its new
// raft ID is not a member yet.
func (c *clusterState) mustTakeBack(raftID uint64) bool {
	if !c.isComingBack(raftID) {
		return false
	}
	newID := c.reborn[raftID].RaftId
	if levelFromWire(c.reborn[raftID].Level) < c.level {
		return false // the level has risen since it answered
	}
	return c.members[newID] == nil && !slices.Contains(c.removed, newID)
}

// step takes back nodes that came back without their memory, one step at a time: as a
// learner, under the new raft ID; then, once that has caught up, in the role that the
// node had, in place of its older raft IDs.
func (h *healing) step(l *leaderState, logger *slog.Logger) nextStep {
	for _, m := range sortedMembers(l.members) {
		if l.mustTakeBack(m.RaftId) {
			return l.addMember(l.reborn[m.RaftId].Peer)
		}
		if !l.isLearner(m.RaftId) {
			continue
		}
		ids := l.raftIDsOf(m.Node.Id)
		if len(ids) == 1 {
			continue
		}
		s := h.duplicateStep(l, m, ids, logger)
		if s.kind != stepWait {
			return s
		}
	}
	return nextStep{kind: stepWait}
}

// duplicateStep takes the next step towards a single raft ID of a node that has ids, of
// which m is a learner.
func (h *healing) duplicateStep(l *leaderState, m *kvpb.Member, ids []uint64, logger *slog.Logger) nextStep {
	d := h.duplicateOf(m.RaftId, l)
	older := slices.DeleteFunc(slices.Clone(ids), func(id uint64) bool { return id == m.RaftId })
	answers := l.isAlive(m.RaftId)
	olderAnswers := slices.ContainsFunc(older, l.isAlive)
	mayBeThere := func(id uint64) bool { return !l.isGone(id, m.RaftId, d.since) }
	olderIsGone := !l.isNewLeader() && !slices.ContainsFunc(older, mayBeThere)
	mayTakeOver := olderIsGone && l.isCaughtUp(m.RaftId)
	switch {
	case answers && olderAnswers:
		// There are two processes. Only an operator knows which of them shall stay.
		if !d.warned {
			d.warned = true
			logger.Warn("two processes go by the id of one node: stop one of them",
				"peer", m.Node.Id, "addresses", l.addresses(ids))
		}
	case answers && mayTakeOver:
		// The node is back: the learner gets the role of the older ones.
		return proposeStep(nil, l.replaceBy(m.RaftId, ids)...)
	case olderAnswers && l.isSilentSince(m.RaftId, d.since):
		// The learner's process has ended, and the node runs with its old memory.
		logger.Warn("a node that came back without memory has ended, and answers with its memory again: "+
			"it stays what it was", peerArgs(m.Node)...)
		return proposeStep(nil, confChange(raftpb.ConfChangeRemoveNode, m.RaftId))
	}
	// The learner has yet to catch up, or somebody was silent for too short a time to be
	// gone, or nobody answers at all: then either could come back.
	return nextStep{kind: stepWait}
}

// duplicateOf returns what this leader has seen of a learner. What it saw when it led in
// an earlier term is too old.
func (h *healing) duplicateOf(raftID uint64, l *leaderState) *duplicate {
	d := h.duplicates[raftID]
	if d == nil || d.term != l.raft.term {
		d = &duplicate{term: l.raft.term, since: l.now}
		h.duplicates[raftID] = d
	}
	return d
}

// isGone reports whether an older raft ID of a node is taken to be gone: it does not
// answer, and the learner is at its address, or it was silent for long.
func (l *leaderState) isGone(older, learner, since uint64) bool {
	if l.isAlive(older) {
		return false
	}
	isReplaced := l.nodeOf(older).Address == l.nodeOf(learner).Address
	return isReplaced || l.isSilentSince(older, since)
}

// isSilentSince reports whether a raft ID was not heard, from a tick on, for longer than
// rebirthFresh and two election timeouts: a running process has connected by then, unless
// its network is slow.
func (c *clusterState) isSilentSince(raftID, tick uint64) bool {
	silent := c.now - max(tick, c.heard[raftID])
	return silent > c.ticksOf(rebirthFresh)+2*c.electionTicks
}

// replaceBy returns what gives one raft ID of a node the role that its others have, and
// removes them.
func (c *clusterState) replaceBy(raftID uint64, ids []uint64) []*raftpb.ConfChangeSingle {
	var changes []*raftpb.ConfChangeSingle
	for _, id := range ids {
		if c.isVoter(id) {
			changes = append(changes, confChange(raftpb.ConfChangeAddNode, raftID))
		}
		if id != raftID {
			changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
		}
	}
	return changes
}

// addMember adds a raft ID of a node as a learner, in place of other learners of the node.
func (c *clusterState) addMember(p *kvpb.Peer) nextStep {
	changes := []*raftpb.ConfChangeSingle{confChange(raftpb.ConfChangeAddLearnerNode, p.RaftId)}
	m := &kvpb.Member{RaftId: p.RaftId, Node: p.Node, Level: levelToWire(levelFromWire(p.Level))}
	for _, id := range c.raftIDsOf(p.Node.Id) {
		if c.isLearner(id) {
			changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
			m.Promote = m.Promote || slices.Contains(c.joiners, id)
		}
	}
	return proposeStep([]*kvpb.Member{m}, changes...)
}
