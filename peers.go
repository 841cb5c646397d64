// What the network tells the loop of peers.

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// peerStates is what the network told the loop of peers. All maps go by raft ID.
type peerStates struct {
	connected map[uint64]bool     // our stream to it is open
	heard     map[uint64]uint64   // tick of its last message
	reborn    map[uint64]*rebirth // a life without memory that answered in place of this member
	// moved is where our stream to a member goes, if that is not where the
	// configuration had it.
	moved map[uint64]*kvpb.Node
	// disownedBy are the members that have applied this node's removal.
	disownedBy map[uint64]bool
	// refusals are why members do not talk to this node, until they do.
	refusals map[uint64]string
	// durable are the peers that have said that they have a data directory, perhaps before they
	// were members, with the node that each of them was then; durableNodes are the ids of those that
	// are members; a new slice whenever it changes, for it is published.
	durable      map[uint64]uint64
	durableNodes []uint64
	// goodbyes are of members to which our stream has ended, until they are back: whether they
	// have said that they were told to stop.
	goodbyes map[uint64]bool
	// fullAt is the tick in which the log has last said of a peer that its queue was full.
	fullAt map[uint64]uint64
}

func newPeerStates() peerStates {
	return peerStates{
		connected:  map[uint64]bool{},
		heard:      map[uint64]uint64{},
		reborn:     map[uint64]*rebirth{},
		moved:      map[uint64]*kvpb.Node{},
		disownedBy: map[uint64]bool{},
		refusals:   map[uint64]string{},
		durable:    map[uint64]uint64{},
		goodbyes:   map[uint64]bool{},
		fullAt:     map[uint64]uint64{},
	}
}

// forget drops what is known of members that were removed. connected ends with the
// stream, and disownedBy is asked for voters only.
func (p *peerStates) forget(removed []uint64) {
	for _, id := range removed {
		delete(p.reborn, id)
		delete(p.heard, id)
		delete(p.moved, id)
		delete(p.refusals, id)
		delete(p.goodbyes, id)
		delete(p.fullAt, id)
	}
}

// noteDurable learns that a node has a data directory, which goes by a raft ID. A node's
// certificate does not name its raft ID: it may not speak for a member that is another node.
func (n *node) noteDurable(raftID, nodeID uint64) {
	m := n.store.members[raftID]
	isAnothers := m != nil && m.Id != nodeID
	if isAnothers || n.peers.durable[raftID] == nodeID {
		return
	}
	boundStrangers(n.peers.durable, n.store.members)
	n.peers.durable[raftID] = nodeID
	n.listDurable()
}

// isDurable reports whether a member has said that it has a data directory.
func (n *node) isDurable(raftID uint64) bool {
	m := n.store.members[raftID]
	return m != nil && n.peers.durable[raftID] == m.Id
}

// boundStrangers bounds what is known of peers, by raft ID: once there is too much, it drops what
// is of strangers that came and went. What is of members that were removed goes with that.
func boundStrangers[V any](known map[uint64]V, members map[uint64]*kvpb.Node) {
	if len(known) >= 2*maxMembers {
		maps.DeleteFunc(known, func(id uint64, _ V) bool { return members[id] == nil })
	}
}

// listDurable lists the nodes of the members that are known to have data directories.
func (n *node) listDurable() {
	var ids []uint64
	for raftID := range n.peers.durable {
		if n.isDurable(raftID) {
			ids = append(ids, n.store.members[raftID].Id)
		}
	}
	slices.Sort(ids)
	n.peers.durableNodes = slices.Compact(ids)
}

// missDisk ends a node in no cluster that was started without the data directory that its
// members know it to have: taken back in memory, it would keep less than its operator asked
// for, and nobody would know. Only the leader is believed: another member may have yet to hear
// that the node was removed and may be in memory. One with an empty directory goes on, and says
// so, whoever says it: that is how a directory is replaced that was lost.
func (n *node) missDisk(h *kvpb.Hello) {
	isForThis := h.GetTo().GetNode().GetId() == n.self.Id
	isOfBefore := h.GetTo().GetRaftId() != n.id.raftID // else it is being added
	isKnown := isForThis && isOfBefore && slices.Contains(h.DurableNodes, n.self.Id)
	if !isKnown || n.store.clusterID != 0 {
		return
	}
	if n.durable.disk == nil && !h.Leading {
		n.warnOfMissingDirectory(h)
		return
	}
	if n.durable.disk == nil {
		n.fail(fmt.Errorf("%w, says node %d at %s", errDiskMissing, h.From.GetNode().GetId(), shown(h.From.GetNode().GetAddress())))
		return
	}
	n.warnOfEmptyDirectory(fmt.Sprintf("node %d", h.From.GetNode().GetId()))
}

// warnOfMissingDirectory says, once, that this node had a directory, as a member says that does not
// lead.
func (n *node) warnOfMissingDirectory(h *kvpb.Hello) {
	if n.durable.missed {
		return
	}
	n.durable.missed = true
	n.logger.Warn("a member knows this node as one with a data directory, and it was started without --data-dir: "+
		"if the leader says so, too, this node ends", "say", fmt.Sprintf("node %d", h.From.GetNode().GetId()))
}

// warnOfEmptyDirectory says, once, that this node's directory should not have been empty.
func (n *node) warnOfEmptyDirectory(says string) {
	if n.durable.disk == nil || n.durable.missed {
		return
	}
	n.durable.missed = true
	n.logger.Warn("the data directory is empty, and its members know this node as one that had data in it: "+
		"the cluster takes it back as a new one. If its disk is not mounted, stop this node now and mount it",
		"dir", n.durable.disk.dir, "say", says)
}

// receiveMessages queues a peer's messages; it waits while the queue is full.
// Any goroutine may call it.
func (n *node) receiveMessages(ctx context.Context, ms []inbound) error {
	for !n.inbox.deliver(ms) {
		if err := n.do(ctx, func() error { return nil }); err != nil { // the loop takes what is queued first
			return err
		}
	}
	return nil
}

// peerUp learns of a stream between this process and one of a peer, p. Any goroutine
// may call it, before any message of that stream.
func (n *node) peerUp(raftID uint64, outbound bool, p *kvpb.Peer) {
	n.inbox.event(func() { n.followUp(raftID, outbound, p) })
}

// followUp is peerUp in the loop. outbound: the stream is this node's to the peer.
func (n *node) followUp(raftID uint64, outbound bool, p *kvpb.Peer) {
	if slices.Contains(n.store.removed, raftID) {
		return
	}
	delete(n.peers.reborn, raftID) // the member is there, whoever answered in its place before
	if outbound {
		delete(n.peers.goodbyes, raftID)
	}
	if raftID == n.election.deafTo {
		n.election.deafTo = 0 // it is alive still, or alive again
	}
	boundStrangers(n.level.callers, n.store.members)
	n.level.note(raftID, outbound, p)
	if !outbound {
		return
	}
	n.peers.connect(raftID)
	if raftID == n.raft.lead {
		n.calls.askAgain(n.clock.now) // what was on its way may be lost
	}
}

// connect notes that this node's stream to a peer is open, at the known address.
func (p *peerStates) connect(raftID uint64) {
	p.connected[raftID] = true
	delete(p.refusals, raftID)
	delete(p.moved, raftID)
}

// disconnect notes that this node's stream to a peer has broken; false: there was none.
func (p *peerStates) disconnect(raftID uint64) bool {
	if !p.connected[raftID] {
		return false
	}
	delete(p.connected, raftID)
	delete(p.moved, raftID)
	return true
}

// peerMoved learns that the stream of which peerUp has just told goes to another
// address than the one that is known. Any goroutine may call it.
func (n *node) peerMoved(raftID uint64, to *kvpb.Node) {
	n.inbox.event(func() {
		if n.peers.connected[raftID] {
			n.peers.moved[raftID] = to
		}
	})
}

// peerDown learns that messages to a peer were lost: all, for there is no stream to it
// (noStream), or some, for its queue is full. Any goroutine may call it.
func (n *node) peerDown(raftID uint64, noStream bool) {
	n.inbox.event(func() { n.followDown(raftID, noStream) })
}

// peerStops learns that a peer was told to stop: it has said so when our stream to it ended. Any
// goroutine may call it, before peerDown.
func (n *node) peerStops(raftID uint64) {
	n.inbox.event(func() {
		if n.store.members[raftID] != nil {
			n.peers.goodbyes[raftID] = true
		}
	})
}

// sayQueueFull logs, once in a while, that messages to a peer are dropped.
func (n *node) sayQueueFull(raftID uint64) {
	said, ok := n.peers.fullAt[raftID]
	isSoon := ok && n.clock.now-said < n.ticksOf(slowLogInterval)
	if isSoon || n.store.members[raftID] == nil {
		return
	}
	n.peers.fullAt[raftID] = n.clock.now
	n.logger.Warn("messages to a peer are dropped, for it takes none: it, or the network, is slow", n.peerArgs(raftID)...)
}

// followDown is peerDown in the loop.
func (n *node) followDown(raftID uint64, noStream bool) {
	if !noStream {
		n.sayQueueFull(raftID)
	}
	wasConnected := noStream && n.peers.disconnect(raftID)
	if noStream {
		delete(n.level.called, raftID) // the next process may be of another program
	}
	if n.rn == nil {
		return
	}
	if wasConnected && raftID == n.raft.lead {
		n.leaderLost()
	}
	_, hasEntry := n.peers.goodbyes[raftID] // perhaps that it has said goodbye
	if wasConnected && n.store.members[raftID] != nil && !hasEntry {
		n.peers.goodbyes[raftID] = false
	}
	if n.store.members[raftID] != nil {
		n.rn.ReportUnreachable(raftID)
	}
}

// nodeOf is where a member is, as far as this node knows: itself where it says, and
// one that has moved where it was found. nil: it is no member.
func (n *node) nodeOf(raftID uint64) *kvpb.Node { return n.clusterState().nodeOf(raftID) }

// proposeMove, in a leader, proposes to put into the configuration where one of its
// members, or the leader itself, is now; false: nothing was proposed.
func (n *node) proposeMove() bool {
	for _, m := range sortedMembers(n.store.members) {
		at := n.nodeOf(m.RaftId)
		hasMoved := at.Address != m.Node.Address && n.alive(m.RaftId)
		if !hasMoved || n.isTaken(at.Address, m.Node.Id) {
			continue
		}
		moved := []*kvpb.Member{{RaftId: m.RaftId, Node: at, Promote: slices.Contains(n.store.joiners, m.RaftId)}}
		return n.proposeChange(moved, confChange(raftpb.ConfChangeUpdateNode, m.RaftId)) == nil
	}
	return false
}

// isTaken reports whether another node than nodeID is known to be at an address.
func (n *node) isTaken(address string, nodeID uint64) bool {
	for id, m := range n.store.members {
		if m.Id != nodeID && n.nodeOf(id).Address == address {
			return true
		}
	}
	return false
}

// refused learns that whoever answered at the known address of a member would not
// talk to this node, which was myRaftID then. Any goroutine may call it.
func (n *node) refused(myRaftID, raftID uint64, w *kvpb.Welcome) {
	n.inbox.event(func() {
		if n.rn != nil && myRaftID == n.id.raftID {
			n.followRefusal(raftID, w)
		}
	})
}

// followRefusal is refused in the loop.
func (n *node) followRefusal(raftID uint64, w *kvpb.Welcome) {
	isTooOld := w.Verdict == kvpb.Verdict_VERDICT_CALLED_TOO_OLD
	saysWhy := w.ClusterId != 0 || isTooOld
	if saysWhy && n.store.members[raftID] != nil {
		n.peers.refusals[raftID] = refusal(w).Error()
	} else {
		delete(n.peers.refusals, raftID)
	}
	switch {
	case n.saysRemoved(raftID, w):
		n.disowned(raftID)
	case n.isLost(raftID, w):
		if n.mayChange() {
			_ = n.proposeLoss(raftID)
		}
	case isTooOld: // if it has lost its memory, it is not taken back
	case n.isWithoutMemory(raftID, w) && n.lacksDisk(raftID, w):
		n.noteMissingDisk(raftID, w.Peer.Node)
	case n.isWithoutMemory(raftID, w):
		n.noteRebirth(raftID, w.Peer)
	}
}

// saysRemoved reports whether a member, whatever its raft ID is by now, says that
// this node was removed from its cluster.
func (n *node) saysRemoved(raftID uint64, w *kvpb.Welcome) bool {
	isMember := w.ClusterId == n.store.clusterID && w.Peer.Node.Id == n.store.members[raftID].GetId()
	return isMember && w.Verdict == kvpb.Verdict_VERDICT_REMOVED
}

// isLost reports whether a learner is in another cluster, which was faster to add it:
// that life will never be this cluster's.
func (n *node) isLost(raftID uint64, w *kvpb.Welcome) bool {
	isElsewhere := w.ClusterId != 0 && w.ClusterId != n.store.clusterID
	if !isElsewhere || w.Verdict != kvpb.Verdict_VERDICT_OTHER_CLUSTER {
		return false
	}
	return w.Peer.RaftId == raftID && slices.Contains(n.store.conf.GetLearners(), raftID)
}

// isWithoutMemory reports whether another life answers in place of a member, in no other
// cluster.
func (n *node) isWithoutMemory(raftID uint64, w *kvpb.Welcome) bool {
	if w.ClusterId != 0 && w.ClusterId != n.store.clusterID {
		return false
	}
	return w.Peer.RaftId != raftID && proto.Equal(w.Peer.Node, n.store.members[raftID])
}

// lacksDisk reports whether a member that had a data directory has come back without one. It is not
// taken back: it ends as soon as the leader calls it (missDisk).
func (n *node) lacksDisk(raftID uint64, w *kvpb.Welcome) bool {
	return n.isDurable(raftID) && w.InMemory
}

// noteMissingDisk says, once, why a member is not taken back.
func (n *node) noteMissingDisk(raftID uint64, node *kvpb.Node) {
	why := fmt.Sprintf("node %d at %s was started without the data directory that it had", node.Id, node.Address)
	if n.peers.refusals[raftID] == why {
		return
	}
	n.peers.refusals[raftID] = why
	n.logger.Warn("a node is not taken back: it was started without the data directory that it had. Start it with that, "+
		"or remove it and add it again", peerArgs(node)...)
}

// disowned learns from a member that it has applied this node's removal, durably if it
// has a disk. A node drops its state only by this rule: a majority of the other voters
// have said so, in answer to hellos sent to the addresses that this node knows. Fewer
// are not enough, and neither is having applied the removal itself: voters that do not
// know of it may still need this node's vote. Once a majority of the others knows, the
// rest and this node together are no majority, so nobody needs that vote.
func (n *node) disowned(by uint64) {
	n.peers.disownedBy[by] = true
	others := 0
	var know []uint64
	for _, id := range n.store.conf.GetVoters() {
		if id == n.id.raftID {
			continue
		}
		others++
		if n.peers.disownedBy[id] {
			know = append(know, id)
		}
	}
	if len(know) > others/2 {
		n.endRemoved(know)
	}
}

// endRemoved ends a node that is no member any more, as most of the others say. One
// without a data directory drops its state and may be added again, as somebody new.
func (n *node) endRemoved(by []uint64) {
	if n.durable.snapshotIndex != 0 {
		n.logger.Error("this node was removed from its cluster", "say", n.names(by))
		n.fail(errRemoved)
		return
	}
	n.logger.Warn("this node was removed from its cluster: it drops its state and waits to be added again",
		"cluster", fmt.Sprintf("%016x", n.store.clusterID), "say", n.names(by))
	n.leaveCluster()
}

// leaveCluster drops all that a node in memory has as a member.
func (n *node) leaveCluster() {
	n.flush(true)
	n.calls.failAll(errNotInitialized)
	n.newLife()
	n.net.setMembers(0, n.id.raftID, nil, nil)
}
