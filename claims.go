// Claims: what a node in no cluster promises to the founders that want it as a member.
//
// # What a claim is
//
// A claim is a node's promise to one founder: for as long as the claim holds, the node
// makes none to another founder, and joins no cluster but this founder's. Only a node in
// no cluster makes claims, one at a time. A claim is for one try of one Init (initTry): it
// has the try's id, a random number that is used once; the members that the Init names;
// and the founder, in the life in which it asked.
//
// A claim is in the memory of the claimed node's loop, and nowhere else: a node in no
// cluster has no durable state. So a process that starts again has promised nothing, and
// as a founder it holds no claims.
//
// A claim ends when
//   - the founder withdraws it;
//   - the founder claims the node in another life, so the process that had the claim is gone;
//   - the node becomes a member of a cluster;
//   - or the claim is claimTime old. A founder that has its cluster calls each node that it
//     adds, again and again, until the node is a member. Throughout such a call the claim
//     is as good as new (keep): its claimTime begins when the call ends.
//
// The head of init.go says why claims keep two founders from making a cluster each.
//
// # What keeps a node from making a claim
//
// Besides the claim of another founder, there are three things, which an Init by force
// ignores. Two are for a member in memory that has restarted: it is in no cluster until
// its leader takes it back, and no Init may take it for a new node.
//   - A node that has just started is fresh: it makes no claim until the other members
//     would have called it, if there were any (redialTime).
//   - A node is named while a cluster calls it as its member, by its id or address, and
//     for redialTime after that.
//
// The third: a node that was started to become a member of one cluster, by --initial-cluster
// or --join, makes no claim for an Init of another one.

package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// claimTime is how long a claim holds that its founder neither withdraws nor keeps. A
// founder makes its cluster within half of it, or tries again.
const claimTime = 20 * time.Second

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
	members   []*kvpb.Node // that the founder's Init names
	clusterID uint64       // that the founder has made; 0: none, as far as this node knows
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

// refuses reports whether a claim that holds keeps its node from granting a request: one
// that is of another try, and not of a later life of the same founder.
func (c *claim) refuses(req *kvpb.ClaimRequest) bool {
	return c.id != req.Id && !isPastLife(c.founder, req.Founder)
}

// isPastLife reports whether before and now are two lives of one node, which has one
// address. Then before has ended: only one process has the address, and now has just called from it.
func isPastLife(before, now *kvpb.Peer) bool {
	return proto.Equal(before.Node, now.GetNode()) && before.Life != now.GetLife()
}

// claims is the part of a node that knows who wants it as a member: the claim that it
// has made, and the clusters that call it. The loop owns it, and hands in the tick.
type claims struct {
	self        *kvpb.Node // constant
	plan        startPlan  // constant
	claimTicks  uint64     // claimTime; constant
	redialTicks uint64     // redialTime; constant

	bornAt    uint64        // tick in which this life of the node began
	current   *claim        // the last claim that was made; held says whether it still holds
	currentAt uint64        // tick in which current was made, or was last kept
	foreign   *foreignHello // the last hello of a cluster that meant this node; nil: none

	otherListSaid uint64 // tick in which the log last had a founder with another list; 0: never
}

// foreignHello is a hello of a cluster that took this node for its member.
type foreignHello struct {
	clusterID uint64
	by        *kvpb.Node
	tick      uint64 // of the hello, or of the last message on its stream
}

func newClaims(self *kvpb.Node, plan startPlan, claimTicks, redialTicks uint64) claims {
	return claims{self: self, plan: plan, claimTicks: claimTicks, redialTicks: redialTicks}
}

// forget begins a new life, which has promised nothing.
func (c *claims) forget(now uint64) {
	c.bornAt = now
	c.current = nil
}

// held returns the claim that holds, or nil, while the node is in no cluster.
func (c *claims) held(now uint64) *claim {
	if c.current == nil || now-c.currentAt > c.claimTicks {
		return nil
	}
	return c.current
}

// answer says whether the node, which is in no cluster, can be claimed, and makes the
// claim if the request has the id of a try.
func (c *claims) answer(req *kvpb.ClaimRequest, now uint64) *kvpb.ClaimResponse {
	if c.plan.excludes(req.Members) && !req.Force {
		return &kvpb.ClaimResponse{
			Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_OTHER_LIST,
			Members: c.plan.members,
		}
	}
	held := c.held(now)
	if held != nil && held.refuses(req) {
		return &kvpb.ClaimResponse{
			Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_CLAIMED,
			Members: held.members,
			By:      held.founder.Node,
		}
	}
	named := c.recentForeign(now)
	if named != nil && !req.Force {
		return &kvpb.ClaimResponse{
			Verdict:   kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED,
			ClusterId: named.clusterID,
			By:        named.by,
		}
	}
	if c.isFresh(now) && !req.Force {
		return &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH}
	}
	if req.Id != 0 {
		c.current = &claim{id: req.Id, founder: req.Founder, members: req.Members}
		c.currentAt = now
	}
	return &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED}
}

// withdraw ends the claim of a try, if the node has made it.
func (c *claims) withdraw(id uint64) {
	if c.current != nil && c.current.id == id {
		c.current = nil
	}
}

// keep has the claim of a try begin a new claimTime, now that its founder has made a
// cluster. It does nothing if that claim was withdrawn, or another one made since.
func (c *claims) keep(id, clusterID, now uint64) {
	if c.current == nil || c.current.id != id {
		return
	}
	c.currentAt = now
	if c.current.clusterID != clusterID {
		kept := *c.current // others may be reading the claim
		kept.clusterID = clusterID
		c.current = &kept
	}
}

// noteForeign remembers a hello if its sender is in a cluster that takes this node for
// its member.
func (c *claims) noteForeign(h *kvpb.Hello, now uint64) {
	if isForeignHello(h, c.self) {
		c.foreign = &foreignHello{clusterID: h.ClusterId, by: h.GetFrom().GetNode(), tick: now}
	}
}

// isForeignHello reports whether a hello is of a member of a cluster, and meant for
// self, in whatever life.
func isForeignHello(h *kvpb.Hello, self *kvpb.Node) bool {
	to := h.GetTo().GetNode()
	meansSelf := to.GetId() == self.Id || to.GetAddress() == self.Address
	return h.ClusterId != 0 && meansSelf
}

// recentForeign returns the last hello of a cluster that takes this node for its member,
// or nil if that was longer ago than redialTime.
func (c *claims) recentForeign(now uint64) *foreignHello {
	if c.foreign == nil || now-c.foreign.tick > c.redialTicks {
		return nil
	}
	return c.foreign
}

// isFresh reports whether a cluster might have this node as a member and have had no
// time to call it.
func (c *claims) isFresh(now uint64) bool {
	return now-c.bornAt <= c.redialTicks
}

// currentClaim returns the claim of this node that holds, or nil.
func (n *node) currentClaim() *claim {
	if n.store.clusterID != 0 {
		return nil
	}
	return n.claims.held(n.clock.now)
}

// Claim implements RaftService.
func (nw *network) Claim(ctx context.Context, req *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error) {
	if req.Founder != nil {
		if err := isFrom(ctx, req.Founder.Node); err != nil {
			return nil, err
		}
	}
	return nw.receiver.receiveClaim(ctx, req)
}

// receiveClaim does what a founder asks by RaftService.Claim: it says whether this node
// can be claimed, claims it, waits until it is a member, or withdraws a claim. Any
// goroutine may call it.
func (n *node) receiveClaim(ctx context.Context, req *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error) {
	if req.Withdraw {
		// Not by do: the claim ends also if the founder does not wait for the answer.
		n.inbox.event(func() { n.claims.withdraw(req.Id) })
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
		return nil, err // without resp: the loop may still write to it
	}
	return resp, nil
}

func (n *node) checkClaim(req *kvpb.ClaimRequest) error {
	if err := validateNode("to", req.To); err != nil {
		return err
	}
	if err := n.checkMeant(req.To); err != nil {
		return err
	}
	if req.Id == 0 {
		return nil // nothing is promised to the founder
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

// answerClaim says whether this node can be claimed, and makes the claim if it is asked
// for one.
func (n *node) answerClaim(req *kvpb.ClaimRequest) *kvpb.ClaimResponse {
	if n.store.clusterID != 0 {
		return &kvpb.ClaimResponse{
			Verdict:   kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER,
			ClusterId: n.store.clusterID,
			Voters:    n.voterNodes(),
			Members:   n.store.founding,
		}
	}
	resp := n.claims.answer(req, n.clock.now)
	if resp.Verdict == kvpb.ClaimVerdict_CLAIM_VERDICT_OTHER_LIST {
		n.noteOtherList(req)
	}
	return resp
}

// awaitMember answers a founder that waits for this node to become a member, of its
// cluster or any other: nil, not yet, and the claim is kept. The loop calls it after
// every turn while the founder waits.
func (n *node) awaitMember(req *kvpb.ClaimRequest) *kvpb.ClaimResponse {
	if n.store.clusterID == 0 {
		n.claims.keep(req.Id, req.ClusterId, n.clock.now)
		return nil
	}
	isDurable := n.durable.queued == 0
	if !isDurable {
		return nil
	}
	return n.answerClaim(req)
}
