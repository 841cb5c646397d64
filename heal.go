// Nodes that come back without their memory: how a leader takes them back.

package main

import (
	"slices"

	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"raft-key-value/kvpb"
)

// meeting is a life of a node that is not the one its members know.
type meeting struct {
	*kvpb.Peer
	tick uint64
}

// meet remembers that a member has lost its memory and waits to be taken back.
func (n *node) meet(raftID uint64, p *kvpb.Peer) {
	if old := n.peers.met[raftID]; old == nil || old.RaftId != p.RaftId {
		n.logger.Warn("a node has lost its memory", "peer", p.Node.Id, "address", p.Node.Address)
	}
	n.peers.met[raftID] = &meeting{p, n.clock.now}
}

// isComingBack reports whether a life without memory has just answered in place of a
// member, and waits to be taken back.
func (n *node) isComingBack(raftID uint64) bool {
	met := n.peers.met[raftID]
	return met != nil && n.clock.now-met.tick < n.ticksOf(leaderWait)
}

// heal takes back nodes that came back without their memory, one step at a
// time: as a learner, under the raft ID of its new life; then, once that has
// caught up, in the role that the node had, in place of its earlier lives.
func (n *node) heal() {
	progress := n.progressOf()
	for _, m := range sortedMembers(n.store.members) {
		ids, met := n.store.raftIDsOf(m.Node.Id), n.peers.met[m.RaftId]
		switch {
		case n.isComingBack(m.RaftId) &&
			n.store.members[met.RaftId] == nil && !slices.Contains(n.store.removed, met.RaftId):
			_ = n.addIncarnation(met.Peer)
			return
		case len(ids) > 1 && slices.Contains(n.store.conf.GetLearners(), m.RaftId):
			if n.oneLife(m, ids, progress[m.RaftId]) {
				return
			}
		}
	}
}

// sight is when a leader first saw that a node has a learner beside an older life.
type sight struct {
	term, tick uint64
	said       bool // that both of them answer
}

// oneLife takes the next step towards a single life of a node that has a learner beside
// an older life; true: it has taken one. If the learner answers alone and has caught
// up, it replaces the older lives. If an older life answers, and nobody has heard the
// learner for as long as a new process needs to connect, the learner's process has
// ended, and the learner is removed. If both answer, an operator has to stop one.
func (n *node) oneLife(m *kvpb.Member, ids []uint64, pr tracker.Progress) bool {
	seen := n.change.sights[m.RaftId]
	if seen == nil || seen.term != n.raft.term {
		seen = &sight{term: n.raft.term, tick: n.clock.now}
		n.change.sights[m.RaftId] = seen
	}
	older := slices.DeleteFunc(slices.Clone(ids), func(id uint64) bool { return id == m.RaftId })
	answers := n.alive(m.RaftId)
	olderAnswers := slices.ContainsFunc(older, n.alive)
	isGone := func(id uint64) bool { // no process can be there any more
		there := n.nodeOf(id).Address == n.nodeOf(m.RaftId).Address // where the learner answers
		return !n.alive(id) && (there || n.hasGoneSilent(id, seen))
	}
	olderIsGone := !n.isNewLeader() && !slices.ContainsFunc(older, func(id uint64) bool { return !isGone(id) })
	switch {
	case answers && olderAnswers:
		if !seen.said {
			n.logger.Warn("two processes go by the id of one node: stop one of them", "peer", m.Node.Id, "at", n.addresses(ids))
		}
		seen.said = true
	case answers && olderIsGone && n.isCaughtUp(pr):
		_ = n.proposeChange(nil, n.replaceBy(m.RaftId, ids)...)
		return true
	case olderAnswers && n.hasGoneSilent(m.RaftId, seen):
		n.logger.Warn("a life of a node that answers in an older one is given up", "peer", m.Node.Id, "address", m.Node.Address)
		_ = n.proposeChange(nil, confChange(raftpb.ConfChangeRemoveNode, m.RaftId))
		return true
	}
	return false
}

// hasGoneSilent reports whether a life of a node was not heard for as long as a process
// needs to connect, since this leader has seen that the node has two.
func (n *node) hasGoneSilent(id uint64, seen *sight) bool {
	return n.clock.now-max(seen.tick, n.peers.heard[id]) > n.ticksOf(leaderWait)+2*n.electionTicks()
}

// replaceBy returns what gives a life of a node the role that its others have, and
// removes them.
func (n *node) replaceBy(life uint64, ids []uint64) (changes []*raftpb.ConfChangeSingle) {
	for _, id := range ids {
		if n.isVoter(id) {
			changes = append(changes, confChange(raftpb.ConfChangeAddNode, life))
		}
		if id != life {
			changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
		}
	}
	return changes
}

// addIncarnation adds a life of a node as a learner, in place of its learners.
func (n *node) addIncarnation(p *kvpb.Peer) error {
	changes := []*raftpb.ConfChangeSingle{confChange(raftpb.ConfChangeAddLearnerNode, p.RaftId)}
	for _, id := range n.store.raftIDsOf(p.Node.Id) {
		if slices.Contains(n.store.conf.GetLearners(), id) {
			changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
		}
	}
	return n.proposeChange([]*kvpb.Member{{RaftId: p.RaftId, Node: p.Node}}, changes...)
}
