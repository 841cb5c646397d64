// What the network tells the loop of peers.

package main

import (
	"cmp"
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
	lives     map[uint64]uint64   // the life that we talk to; replaced, never changed
	connected map[uint64]bool     // our stream to it is open
	heard     map[uint64]uint64   // tick of its last message
	met       map[uint64]*meeting // a life without memory that answered in place of this member
	// moved is where our stream to a member goes, if that is not where the
	// configuration had it.
	moved map[uint64]*kvpb.Node
	// disownedBy are the members that have applied this node's removal.
	disownedBy map[uint64]bool
	// refusals are why members do not talk to this node, until they do.
	refusals map[uint64]string
}

func newPeerStates() peerStates {
	return peerStates{
		lives:      map[uint64]uint64{},
		connected:  map[uint64]bool{},
		heard:      map[uint64]uint64{},
		met:        map[uint64]*meeting{},
		moved:      map[uint64]*kvpb.Node{},
		disownedBy: map[uint64]bool{},
		refusals:   map[uint64]string{},
	}
}

// forget drops what is known of members that were removed.
func (p *peerStates) forget(removed []uint64) {
	p.lives = maps.Clone(p.lives)
	for _, id := range removed {
		delete(p.lives, id) // never to be heard again
		delete(p.met, id)
		delete(p.heard, id)
		delete(p.moved, id)
		delete(p.refusals, id)
	}
}

// hello is how this life of the node introduces itself.
func (n *node) hello() *kvpb.Hello {
	p := n.status.latest.Load()
	return &kvpb.Hello{ClusterId: p.clusterID, From: &kvpb.Peer{Node: n.self, RaftId: p.raftID, Life: p.life}, Removed: p.removed}
}

// accept answers a Hello. Any goroutine may call it.
func (n *node) accept(h *kvpb.Hello) *kvpb.Welcome {
	p := n.status.latest.Load()
	w := &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_ACCEPTED, Peer: &kvpb.Peer{Node: n.self, RaftId: p.raftID, Life: p.life}, ClusterId: p.clusterID}
	to := h.GetTo()
	if p.clusterID == 0 && slices.Contains(h.Removed, p.raftID) {
		n.in.event(func() { n.takeNewID(p.raftID) })
	}
	if p.clusterID == 0 && n.isForeignHello(h) {
		n.in.event(func() { n.noteForeign(h) })
	}
	switch {
	case p.clusterID != 0 && slices.Contains(p.removed, h.GetFrom().GetRaftId()) && h.ClusterId == p.clusterID:
		w.Verdict = kvpb.Verdict_VERDICT_REMOVED
	case to.GetRaftId() == 0:
		// It only asks.
	case validateNode("from", h.GetFrom().GetNode()) != nil || !validRaftID(h.GetFrom().GetRaftId()) || h.GetFrom().GetLife() == 0 || h.GetFrom().GetRaftId() == p.raftID:
		w.Verdict = kvpb.Verdict_VERDICT_NOT_ME
	case !sameCluster(p.clusterID, p.members, h), p.clusterID == 0 && p.claim.excludes(h):
		w.Verdict = kvpb.Verdict_VERDICT_OTHER_CLUSTER
	case to.GetRaftId() != p.raftID, to.GetLife() != 0 && to.GetLife() != p.life, !proto.Equal(to.GetNode(), n.self):
		w.Verdict = kvpb.Verdict_VERDICT_NOT_ME
	}
	return w
}

// takeNewID gives a node in no cluster another raft ID, if its own was removed
// before it got any state: it could never be added. Whoever makes that up can
// delay the adding of the node, but costs it nothing.
func (n *node) takeNewID(removed uint64) {
	if n.store.clusterID == 0 && n.id.raftID == removed {
		n.newLife()
		n.net.setMembers(0, n.id.raftID, nil, nil)
	}
}

// sameCluster reports whether a node in a cluster, or in none yet, may talk to
// the sender of a hello. One that is being added is in no cluster yet.
func sameCluster(clusterID uint64, members map[uint64]*kvpb.Node, h *kvpb.Hello) bool {
	if h.ClusterId == 0 {
		return members[h.From.RaftId] != nil
	}
	return clusterID == 0 || clusterID == h.ClusterId
}

// hears reports whether what came by a stream may be listened to: not if it is
// of or to another life, of another cluster, or of somebody who has left.
func (n *node) hears(h *kvpb.Hello) bool {
	from := h.From.RaftId
	return n.peers.lives[from] == h.From.Life && h.To.RaftId == n.id.raftID && sameCluster(n.store.clusterID, n.store.members, h)
}

// receiveMessages queues a peer's messages; it waits while the queue is full.
// Any goroutine may call it.
func (n *node) receiveMessages(ctx context.Context, ms []inbound) error {
	for !n.in.deliver(ms) {
		if err := n.do(ctx, func() error { return nil }); err != nil { // the loop takes what is queued first
			return err
		}
	}
	return nil
}

// peerUp learns of a stream between this process and a life of a peer. Any
// goroutine may call it, before any message of that stream.
func (n *node) peerUp(raftID, life uint64, outbound bool) {
	n.in.event(func() {
		if slices.Contains(n.store.removed, raftID) {
			return
		}
		n.peers.lives = maps.Clone(n.peers.lives)
		if n.store.members[raftID] == nil && len(n.peers.lives) >= maxMembers+maxStrangers { // forget those that came and went
			maps.DeleteFunc(n.peers.lives, func(id, _ uint64) bool { return n.store.members[id] == nil })
		}
		n.peers.lives[raftID] = life
		delete(n.peers.met, raftID) // this life is there, whoever answered in its place before
		if raftID == n.election.deafTo {
			n.election.deafTo = 0 // it is alive, or again
		}
		if outbound {
			n.peers.connected[raftID] = true
			delete(n.peers.refusals, raftID)
			delete(n.peers.moved, raftID)
			if raftID == n.raft.lead {
				n.calls.askAgain(n.clock.now) // what was on its way may be lost
			}
		}
	})
}

// peerMoved learns that the stream of which peerUp has just told goes to another
// address than the one that is known. Any goroutine may call it.
func (n *node) peerMoved(raftID uint64, to *kvpb.Node) {
	n.in.event(func() {
		if n.peers.connected[raftID] {
			n.peers.moved[raftID] = to
		}
	})
}

// nodeOf is where a member is, as far as this node knows: itself where it says, and
// one that has moved where it was found. nil: it is no member.
func (n *node) nodeOf(raftID uint64) *kvpb.Node {
	m := n.store.members[raftID]
	switch {
	case m == nil:
		return nil
	case raftID == n.id.raftID:
		return n.self
	}
	return cmp.Or(n.peers.moved[raftID], m)
}

// commitMove has the leader put into the configuration where one of its members,
// or itself, is now; false: there is nothing to do.
func (n *node) commitMove() bool {
	for _, m := range sortedMembers(n.store.members) {
		at := n.nodeOf(m.RaftId)
		if at.Address == m.Node.Address || !n.alive(m.RaftId) || n.isTaken(at.Address, m.Node.Id) {
			continue
		}
		moved := []*kvpb.Member{{RaftId: m.RaftId, Node: at}}
		return n.proposeChange(moved, confChange(raftpb.ConfChangeUpdateNode, m.RaftId)) == nil
	}
	return false
}

// isTaken reports whether another node than this one is known to be at an address.
func (n *node) isTaken(address string, nodeID uint64) bool {
	for id, m := range n.store.members {
		if m.Id != nodeID && n.nodeOf(id).Address == address {
			return true
		}
	}
	return false
}

// peerDown learns that messages to a peer were lost. Any goroutine may call it.
func (n *node) peerDown(raftID uint64, lost bool) {
	n.in.event(func() {
		if !lost {
			n.logger.Debug("peer's queue is full", "peer", n.describe(raftID))
		} else if n.peers.connected[raftID] {
			delete(n.peers.connected, raftID)
			delete(n.peers.moved, raftID)
			if n.rn != nil && raftID == n.raft.lead {
				n.leaderLost()
			}
		}
		if n.rn != nil && n.store.members[raftID] != nil {
			n.rn.ReportUnreachable(raftID)
		}
	})
}

// refused learns that whoever answered at the known address of a member would not
// talk to this node. Any goroutine may call it.
func (n *node) refused(myRaftID, raftID uint64, w *kvpb.Welcome) {
	n.in.event(func() {
		if n.rn != nil && myRaftID == n.id.raftID && w.ClusterId != 0 && n.store.members[raftID] != nil {
			n.peers.refusals[raftID] = refusal(w).Error()
		}
		switch {
		case n.rn == nil || myRaftID != n.id.raftID:
		case n.saysRemoved(raftID, w):
			n.disowned(raftID)
		case w.Verdict == kvpb.Verdict_VERDICT_OTHER_CLUSTER && w.ClusterId != 0 && w.ClusterId != n.store.clusterID && w.Peer.RaftId == raftID && slices.Contains(n.store.conf.GetLearners(), raftID) && n.mayChange():
			// Another cluster was faster to add it. That life will never be this one's.
			_ = n.proposeChange(nil, confChange(raftpb.ConfChangeRemoveNode, raftID))
		case (w.ClusterId == 0 || w.ClusterId == n.store.clusterID) && w.Peer.RaftId != raftID && proto.Equal(w.Peer.Node, n.store.members[raftID]):
			n.meet(raftID, w.Peer)
		}
	})
}

// saysRemoved reports whether a member, whatever its raft ID is by now, says that
// this node was removed from its cluster.
func (n *node) saysRemoved(raftID uint64, w *kvpb.Welcome) bool {
	return w.Verdict == kvpb.Verdict_VERDICT_REMOVED &&
		w.ClusterId == n.store.clusterID &&
		w.Peer.Node.Id == n.store.members[raftID].GetId()
}

// disowned learns from a member that it has applied this node's removal, durably if it
// has a disk. A node drops its state only by this rule: a majority of the other voters
// have said so, in answer to hellos sent to the addresses that this node knows. Fewer
// are not enough, and neither is having applied the removal itself: voters that do not
// know of it may still need this node's vote. Once a majority of the others knows, the
// rest and this node together are no majority, so nobody needs that vote.
func (n *node) disowned(by uint64) {
	n.peers.disownedBy[by] = true
	others, told := 0, []uint64{}
	for _, id := range n.store.conf.GetVoters() {
		if id == n.id.raftID {
			continue
		}
		others++
		if n.peers.disownedBy[id] {
			told = append(told, id)
		}
	}
	if len(told) > others/2 {
		n.removed(told)
	}
}

// removed ends a node that is no member any more, as most of the others say. One
// without a data directory drops its state and may be added again, as somebody new.
func (n *node) removed(by []uint64) {
	if n.durable.mark != 0 {
		n.logger.Error("this node was removed from its cluster", "say", n.names(by))
		n.err = errRemoved
		return
	}
	n.logger.Warn("this node was removed from its cluster: it drops its state and waits to be added again",
		"cluster", fmt.Sprintf("%016x", n.store.clusterID), "say", n.names(by))
	n.flush(true)
	n.calls.failAll(errNotInitialized)
	n.newLife()
	n.net.setMembers(0, n.id.raftID, nil, nil)
}
