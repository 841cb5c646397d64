// Claims: what a node in no cluster promises to those who want it as a member. The
// head of init.go says why that keeps two clusters apart.

package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// redialTime is the longest time that a running peer needs to reach a node that is
// back: the pause in peer.run, the longest back-off with its jitter, and one dial.
func (n *node) redialTime() time.Duration {
	if n.opts.redial != 0 {
		return n.opts.redial
	}
	return maxRedialPause + longestBackoff + n.opts.connectTimeout()
}

// claim is what a node in no cluster has promised. It is never changed.
type claim struct {
	id        uint64 // of the try
	founder   *kvpb.Peer
	members   []*kvpb.Node
	clusterID uint64 // that the founder has made; 0: none, as far as this node knows
}

// excludes reports whether a claim forbids its node to listen to the sender of a hello:
// one that is neither the founder nor a member of the cluster that the founder made. A
// nil claim forbids nothing.
func (c *claim) excludes(h *kvpb.Hello) bool {
	if c == nil || h.GetFrom().GetRaftId() == c.founder.RaftId {
		return false
	}
	return c.clusterID == 0 || h.ClusterId != c.clusterID
}

// isPastLife reports whether two lives are one node's. The one that is heard now is
// the later one: only one process has the address.
func isPastLife(before, now *kvpb.Peer) bool {
	return proto.Equal(before.Node, now.GetNode()) && before.Life != now.GetLife()
}

// claims is what a node in no cluster knows of those who want it as a member.
type claims struct {
	bornAt    uint64        // tick in which this life began
	current   *claim        // the last that was made; currentClaim says whether it holds
	currentAt uint64        // tick in which current was made, or was last wanted
	foreign   *foreignHello // the last hello of a cluster that meant this node; nil: none
	founding  []*kvpb.Node  // of the Init that this node has made its cluster for, while it is not done
}

func (c *claims) forget(now uint64) {
	c.bornAt = now
	c.current = nil
	c.founding = nil
}

// foreignHello is a hello of a cluster that took this node for its member.
type foreignHello struct {
	clusterID uint64
	by        *kvpb.Node
	tick      uint64 // of the hello, or of the last message behind it
}

// claimed returns the claim that holds, or nil.
func (n *node) currentClaim() *claim {
	if n.claims.current == nil || n.store.clusterID != 0 {
		return nil
	}
	if n.clock.now-n.claims.currentAt > n.ticksOf(claimTime) {
		return nil
	}
	return n.claims.current
}

// means reports whether a hello is a cluster's that means this node, in whatever
// life.
func (n *node) isForeignHello(h *kvpb.Hello) bool {
	to := h.GetTo().GetNode()
	return h.ClusterId != 0 && (to.GetId() == n.self.Id || to.GetAddress() == n.self.Address)
}

// called remembers a hello of a cluster that takes this node for its member.
func (n *node) noteForeign(h *kvpb.Hello) {
	if n.isForeignHello(h) {
		n.claims.foreign = &foreignHello{clusterID: h.ClusterId, by: h.GetFrom().GetNode(), tick: n.clock.now}
	}
}

// namedBy returns who named this node lately, or nil.
func (n *node) lastForeign() *foreignHello {
	if n.claims.foreign == nil || n.clock.now-n.claims.foreign.tick > n.ticksOf(n.redialTime()) {
		return nil
	}
	return n.claims.foreign
}

// isFresh reports whether a cluster might have this node as a member and have had no
// time to call it.
func (n *node) isFresh() bool { return n.clock.now-n.claims.bornAt <= n.ticksOf(n.redialTime()) }

// Claim implements RaftService.
func (nw *network) Claim(ctx context.Context, req *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error) {
	return nw.receiver.receiveClaim(ctx, req)
}

// receiveClaim does what a founder asks. Any goroutine may call it.
func (n *node) receiveClaim(ctx context.Context, req *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error) {
	if req.Withdraw {
		n.in.event(func() { n.withdraw(req.Id) }) // also if the founder does not wait for the answer
		return &kvpb.ClaimResponse{}, nil
	}
	ctx, cancel := inTime(ctx)
	defer cancel()
	if err := n.checkClaim(req); err != nil {
		return nil, err
	}
	var resp *kvpb.ClaimResponse
	err := n.await(ctx, func() (bool, error) {
		if req.ClusterId != 0 {
			resp = n.awaitMember(req)
		} else {
			resp = n.answerClaim(req)
		}
		return resp != nil, nil
	})
	if err != nil {
		return nil, err // the loop may still call f
	}
	return resp, nil
}

func (n *node) checkClaim(req *kvpb.ClaimRequest) error {
	if err := validateNode("to", req.To); err != nil {
		return err
	}
	if err := n.checkMeant(req.To); err != nil || req.Id == 0 {
		return err
	}
	if err := validateNode("founder", req.Founder.GetNode()); err != nil {
		return err
	}
	if !validRaftID(req.Founder.RaftId) || req.Founder.Life == 0 {
		return invalid("founder", "it is no life of a node")
	}
	return checkMembers(req.Members)
}

// checkMeant refuses what is meant for another node.
func (n *node) checkMeant(to *kvpb.Node) error {
	if to.Id == n.self.Id && to.Address == n.self.Address {
		return nil
	}
	return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_WRONG_NODE,
		fmt.Sprintf("%s was asked for, but %s answers", formatNode(to), formatNode(n.self)))
}

// answerClaim says whether this node can be claimed, and makes the promise if it is
// asked for one.
func (n *node) answerClaim(req *kvpb.ClaimRequest) *kvpb.ClaimResponse {
	if n.store.clusterID != 0 {
		return &kvpb.ClaimResponse{
			Verdict:   kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER,
			ClusterId: n.store.clusterID,
			Voters:    n.voterNodes(),
			Members:   n.claims.founding,
		}
	}
	if c := n.currentClaim(); c != nil && c.id != req.Id && !isPastLife(c.founder, req.Founder) {
		return &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_CLAIMED, Members: c.members, By: c.founder.Node}
	}
	if named := n.lastForeign(); named != nil && !req.Force {
		return &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED, ClusterId: named.clusterID, By: named.by}
	}
	if n.isFresh() && !req.Force {
		return &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH}
	}
	if req.Id != 0 {
		n.claims.current = &claim{id: req.Id, founder: req.Founder, members: req.Members}
		n.claims.currentAt = n.clock.now
	}
	return &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED}
}

// voterNodes are the voters once no change of membership is running, by id.
func (n *node) voterNodes() []*kvpb.Node {
	var voters []*kvpb.Node
	for _, m := range sortedMembers(n.store.members) {
		if n.isVoter(m.RaftId) {
			voters = append(voters, m.Node)
		}
	}
	return voters
}

// withdraw ends a claim.
func (n *node) withdraw(id uint64) {
	if n.claims.current != nil && n.claims.current.id == id {
		n.claims.current = nil
	}
}

// awaitMember keeps a claim while its founder waits for this node to become a
// member. It answers once it is one, durably.
func (n *node) awaitMember(req *kvpb.ClaimRequest) *kvpb.ClaimResponse {
	if n.store.clusterID == 0 {
		if n.claims.current != nil && n.claims.current.id == req.Id {
			n.keepClaim(req.ClusterId)
		}
		return nil
	}
	if n.durable.queued > 0 {
		return nil
	}
	return n.answerClaim(req)
}

// keepClaim makes the claim last, now that its founder has a cluster.
func (n *node) keepClaim(clusterID uint64) {
	n.claims.currentAt = n.clock.now
	if n.claims.current.clusterID != clusterID {
		c := *n.claims.current
		c.clusterID = clusterID
		n.claims.current = &c
	}
}
