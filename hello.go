// Hellos: how a node introduces itself to others, and whom it listens to.

package main

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// hello is how this life of the node introduces itself. Any goroutine may call it.
func (n *node) hello() *kvpb.Hello {
	p := n.status.latest.Load()
	return &kvpb.Hello{
		ClusterId:    p.clusterID,
		From:         n.peer(p),
		Removed:      p.removed,
		ClusterLevel: p.level,
		Durable:      n.durable.disk != nil,
		DurableNodes: p.durableNodes,
		Leading:      p.leading,
	}
}

// peer is this life of the node.
func (n *node) peer(p *published) *kvpb.Peer {
	return &kvpb.Peer{
		Node:    n.self,
		RaftId:  p.raftID,
		Life:    p.life,
		Level:   n.opts.level,
		RisesTo: n.opts.risesTo(),
	}
}

// accept answers a hello. Any goroutine may call it.
func (n *node) accept(h *kvpb.Hello) *kvpb.Welcome {
	p := n.status.latest.Load()
	inNoCluster := p.clusterID == 0
	if inNoCluster && slices.Contains(h.Removed, p.raftID) {
		n.inbox.event(func() { n.takeNewID(p.raftID) })
	}
	if inNoCluster && isForeignHello(h, n.self) {
		n.inbox.event(func() {
			n.claims.noteForeign(h, n.clock.now)
			n.missDisk(h)
		})
	}
	verdict := n.verdictOn(h, p)
	if verdict == kvpb.Verdict_VERDICT_CALLED_TOO_OLD {
		n.inbox.event(func() { n.noteTooOld(h) })
	}
	isPeers := verdict == kvpb.Verdict_VERDICT_ACCEPTED && h.GetTo().GetRaftId() != 0
	if isPeers && h.Durable {
		n.inbox.event(func() { n.noteDurable(h.From.RaftId, h.From.Node.Id) })
	}
	return &kvpb.Welcome{
		Verdict:      verdict,
		Peer:         n.peer(p),
		ClusterId:    p.clusterID,
		ClusterLevel: p.level,
		InMemory:     n.durable.disk == nil,
	}
}

// verdictOn judges a hello by what this node has published.
func (n *node) verdictOn(h *kvpb.Hello, p *published) kvpb.Verdict {
	isRemoved := h.ClusterId == p.clusterID && slices.Contains(p.removed, h.GetFrom().GetRaftId())
	if p.clusterID != 0 && isRemoved {
		return kvpb.Verdict_VERDICT_REMOVED
	}
	onlyAsks := h.GetTo().GetRaftId() == 0
	if onlyAsks {
		return kvpb.Verdict_VERDICT_ACCEPTED
	}
	if !isPeer(h.GetFrom()) || h.From.RaftId == p.raftID {
		return kvpb.Verdict_VERDICT_NOT_ME
	}
	isExcluded := p.clusterID == 0 && p.claim.excludes(h)
	if isExcluded || !sameCluster(p.clusterID, p.members, h) {
		return kvpb.Verdict_VERDICT_OTHER_CLUSTER
	}
	if !proto.Equal(h.To.Node, n.self) {
		return kvpb.Verdict_VERDICT_NOT_ME
	}
	if v := levelVerdict(h, p.level, n.opts.level); v != kvpb.Verdict_VERDICT_ACCEPTED {
		return v
	}
	if !isThisLife(h.To, p) {
		return kvpb.Verdict_VERDICT_NOT_ME
	}
	return kvpb.Verdict_VERDICT_ACCEPTED
}

// isPeer reports whether a peer has all that a life of a node has.
func isPeer(p *kvpb.Peer) bool {
	return validateNode("from", p.GetNode()) == nil && validRaftID(p.GetRaftId()) && p.GetLife() != 0
}

// isThisLife reports whether a hello to this node is to this life of it. A hello that names no
// life is to any.
func isThisLife(to *kvpb.Peer, p *published) bool {
	isLife := to.Life == 0 || to.Life == p.life
	return to.RaftId == p.raftID && isLife
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

// hears reports whether what came by a stream may be listened to: not if it is to
// another raft ID than this node's, of another cluster, or of somebody who has left.
//
// It may come late, from a process of the peer that has ended. The process that now has
// this raft ID has lost nothing; so to raft, such a message is merely late, and raft takes
// messages late, twice or never. What it promises was durable before it left: a vote, an
// answer to an append, and the term of whoever calls for votes or leads (ready, append).
// A batch of writes takes effect once: a later process numbers its own from above
// (restore). An answer to a read names the life that has asked (askRead).
func (n *node) hears(h *kvpb.Hello) bool {
	hasLeft := slices.Contains(n.store.removed, h.From.RaftId)
	if hasLeft || h.To.RaftId != n.id.raftID {
		return false
	}
	return sameCluster(n.store.clusterID, n.store.members, h)
}
