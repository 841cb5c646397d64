// Joining: how a node with --join asks a cluster to add it, and what the leader makes of that.
//
// The node asks members for as long as it is in no cluster. Each of them has the leader do it
// (joinStep): the node becomes a learner that has asked to vote. That is a part of the
// replicated state (store.joiners), so whoever leads makes it a voter once it has caught up
// (promotionStep), however often either side crashes, and once only: when it is a voter, the
// wish is forgotten. So an operator's demotion stays. An operator who says that the node shall
// be a learner, by add-learner or demote, or who all the voters shall be, ends the wish, too.
//
// A node whose id was a member's, and is no more, was removed by an operator: it is refused
// until an operator adds it again. A node that is a member, and has lost its memory, is taken
// back as heal.go says: joining does not interfere.

package main

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

// joinTime bounds a call of Join at one member, which waits for a change of membership.
const joinTime = 10 * time.Second

// raftService is RaftService: the network's, and Join, which the leader has to do.
type raftService struct {
	*network
	s *server
}

// Join implements RaftService.
func (r raftService) Join(ctx context.Context, req *kvpb.JoinRequest) (*kvpb.JoinResponse, error) {
	if !isPeer(req.From) {
		return nil, invalid("from", "it is no life of a node")
	}
	if err := checkMemberAddress(req.From.Node.Address); err != nil {
		return nil, invalid("from.node.address", "%v", err)
	}
	if err := r.s.mayJoin(ctx, req.From.Node); err != nil {
		return nil, err
	}
	resp := &kvpb.JoinResponse{}
	err := r.s.onLeader(ctx, kvpb.RaftService_Join_FullMethodName, req, resp, func(ctx context.Context) error {
		resp.ClusterId = r.s.n.status.latest.Load().clusterID
		return r.s.addJoiner(ctx, req, resp)
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// mayJoin returns an error if a request to add a node comes neither from that node, by its
// certificate, nor from a member that forwards it, and has looked who asks.
func (s *server) mayJoin(ctx context.Context, node *kvpb.Node) error {
	if wasForwarded(ctx) && s.isMember(callerOf(ctx).node) {
		return nil
	}
	return isFrom(ctx, node)
}

// isMember reports whether a node is a member of this node's cluster, as far as this node knows.
func (s *server) isMember(nodeID uint64) bool {
	return len(raftIDsOf(s.n.status.latest.Load().members, nodeID)) > 0
}

// addJoiner has the leader add a node that asks for it, once that answers at its address. A member
// with a data directory that has come back elsewhere without it is refused, as missDisk refuses it
// at its old address.
func (s *server) addJoiner(ctx context.Context, req *kvpb.JoinRequest, resp *kvpb.JoinResponse) error {
	node := &kvpb.Node{Id: req.From.Node.Id, Address: req.From.Node.Address} // without unknown fields
	var known nextStep                                                       // the loop writes it, and wasDurable, perhaps after do has failed
	wasDurable := false
	err := s.n.do(ctx, func() error {
		known = s.n.clusterState().knownStep(node)
		wasDurable = slices.Contains(s.n.peers.durableNodes, node.Id)
		return nil
	})
	if err != nil {
		return err
	}
	if known.kind != stepWait {
		return known.err
	}
	if wasDurable && req.InMemory {
		return memberExists("node %d is a member with a data directory, and was started without --data-dir: start it with "+
			"the directory that it had. To have it in memory from now on, remove it first, and add it again", node.Id)
	}
	resp.WasDurable = wasDurable
	p, err := s.probe(ctx, node)
	if err != nil {
		return err
	}
	if p.RaftId != req.From.RaftId {
		return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_WRONG_NODE,
			fmt.Sprintf("another process than the one that asks answers at %s", shown(node.Address)))
	}
	s.logJoiner(node, req.AsLearner)
	err = s.awaitChange(ctx, func(l *leaderState) nextStep { return l.joinStep(p, req.AsLearner) })
	if err == errPastLife { // the probe has told it: it takes another raft ID, and asks again
		return hasPast(node)
	}
	return err
}

// logJoiner says that a node asks to join, which it does until it is a member.
func (s *server) logJoiner(node *kvpb.Node, asLearner bool) {
	leftOut, isDue := s.joinLog.due(time.Now())
	if isDue {
		s.n.logger.Info("a node asks to join", append(peerArgs(node), "as_learner", asLearner, "others", leftOut)...)
	}
}

// errFounding has a node that asks to join while an Init is half way ask again: a call that waited
// would keep its places among those of a node that has members to add.
var errFounding = apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_CHANGE_IN_PROGRESS,
	"the cluster is being made: its first members are added before others. If one of them never comes, "+
		"a change of the membership by an operator ends that")

// knownStep is what a node that asks to join gets without a change: done, if a member has its id
// and address; a refusal, if it was removed, or an Init is half way; and else, to wait.
func (c *clusterState) knownStep(m *kvpb.Node) nextStep {
	ids := c.raftIDsOf(m.Id)
	isThere := func(id uint64) bool { return c.members[id].Address == m.Address }
	if slices.ContainsFunc(ids, isThere) {
		return nextStep{kind: stepDone}
	}
	if len(ids) == 0 && slices.Contains(c.former, m.Id) {
		return failStep(apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_REMOVED_MEMBER,
			fmt.Sprintf("node %d was removed from the cluster: add-learner %s adds it again", m.Id, formatNode(m))))
	}
	if c.founding != nil {
		return failStep(errFounding)
	}
	return nextStep{kind: stepWait}
}

// joinStep takes the next step of adding a node that asks for it. It is done when the node is a
// member: that it has caught up is for promotionStep.
func (l *leaderState) joinStep(p *kvpb.Peer, asLearner bool) nextStep {
	known := l.knownStep(p.Node)
	if known.kind != stepWait {
		return known
	}
	isNew := len(l.raftIDsOf(p.Node.Id)) == 0
	s := l.learnerStep(p)
	if s.kind == stepPropose && isNew {
		s.members[0].Promote = !asLearner
	}
	return s
}

// operatorsLearnerStep takes the next step of adding a learner that an operator names: it is to be
// one, whatever it has asked for before.
func (l *leaderState) operatorsLearnerStep(p *kvpb.Peer) nextStep {
	s := l.learnerStep(p)
	for _, m := range s.members {
		m.Promote = false
	}
	isOver := s.kind == stepFailed || s.kind == stepPropose
	if isOver || !slices.Contains(l.joiners, p.RaftId) {
		return s
	}
	if !l.mayChange {
		return nextStep{kind: stepWait}
	}
	withoutWish := confChange(raftpb.ConfChangeUpdateNode, p.RaftId)
	return proposeStep(l.updated([]*raftpb.ConfChangeSingle{withoutWish}), withoutWish)
}

// promotionStep makes a learner a voter that has asked to join as one, and has caught up. With
// it, a majority of the voters has to answer.
func (l *leaderState) promotionStep() nextStep {
	for _, m := range sortedMembers(l.members) {
		isJoiner := slices.Contains(l.joiners, m.RaftId)
		isComingBack := len(l.raftIDsOf(m.Node.Id)) > 1
		if !isJoiner || isComingBack {
			continue
		}
		voters := append(slices.Clone(l.conf.GetVoters()), m.RaftId)
		notReady := cmp.Or(l.checkMayVote(m), l.checkMajority(voters))
		if notReady == nil {
			return proposeStep(nil, confChange(raftpb.ConfChangeAddNode, m.RaftId))
		}
	}
	return nextStep{kind: stepWait}
}

// promoteJoiner takes promotionStep. The loop calls it at each heartbeat in which it may begin a
// change.
func (n *node) promoteJoiner() {
	if len(n.store.joiners) > 0 {
		n.perform(n.leaderState().promotionStep())
	}
}

// join asks one member after another, in a random order, to add this node, until one has, or
// refuses for a reason that the others have, too.
func (b *starter) join(ctx context.Context) error {
	var first error
	for _, address := range b.others() {
		err := b.askToJoin(ctx, address)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		switch errorReason(err) {
		case "REMOVED_MEMBER", "MEMBER_EXISTS", "WRONG_NODE", "PERMISSION_DENIED":
			return err
		}
		first = tellsMore(first, err)
	}
	return first
}

// tellsMore is that of two errors which says more: a node's own, and not that it is in no
// cluster either.
func tellsMore(a, b error) error {
	if a == nil || weightOf(b) > weightOf(a) {
		return b
	}
	return a
}

func weightOf(err error) int {
	switch errorReason(err) {
	case "UNREACHABLE":
		return 0
	case "NOT_INITIALIZED":
		return 1
	}
	return 2
}

// others are the addresses of --join but the own one, in a random order.
func (b *starter) others() []string {
	addresses := slices.DeleteFunc(slices.Clone(b.plan.join), func(address string) bool {
		return address == b.s.n.self.Address
	})
	rand.Shuffle(len(addresses), func(i, k int) { addresses[i], addresses[k] = addresses[k], addresses[i] })
	return addresses
}

// askToJoin asks the node at an address to have this one added.
func (b *starter) askToJoin(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	release, err := b.s.net.reserveCall(ctx)
	if err != nil {
		return err
	}
	defer release()
	n := b.s.n
	member := &kvpb.Node{Address: address} // whoever that is: with TLS, a node at a host of its certificate
	conn := b.s.net.dial(member)
	defer func() { _ = conn.Close() }()
	req := &kvpb.JoinRequest{From: n.peer(n.status.latest.Load()), AsLearner: b.plan.asLearner, InMemory: n.durable.disk == nil}
	resp, err := kvpb.NewRaftServiceClient(conn).Join(ctx, req)
	if resp.GetWasDurable() {
		n.inbox.event(func() { n.warnOfEmptyDirectory("the leader") })
	}
	switch {
	case err == nil:
		cluster := fmt.Sprintf("%016x", resp.ClusterId)
		if b.joining.isDue(cluster, time.Now()) { // it asks until it is a member
			n.logger.Info("this node joins a cluster", "cluster", cluster, "address", address)
		}
		return nil
	case errorReason(err) == "NOT_INITIALIZED":
		return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED,
			fmt.Sprintf("the node at %s is in no cluster", shown(address)))
	case errorReason(err) == "":
		return unreachable(fmt.Sprintf("the node at %s does not answer: %s", shown(address), causeOf(err, member)))
	}
	return err
}

// find asks the addresses of --join where the members of this node's cluster are now: all that
// it knows may have moved. What they say is a hint, as any other (moveHint).
func (b *starter) find(ctx context.Context) error {
	var first error
	for _, address := range b.others() {
		err := b.askWhere(ctx, address)
		if ctx.Err() != nil {
			return nil
		}
		first = tellsMore(first, err)
	}
	return first
}

// askWhere asks who is at an address. A member that is found there tells this node of others,
// once it has a stream to it; also one that was added since this node last heard of its cluster.
func (b *starter) askWhere(ctx context.Context, address string) error {
	n := b.s.n
	ctx, cancel := context.WithTimeout(ctx, n.opts.probeTimeout())
	defer cancel()
	member := &kvpb.Node{Address: address}
	w, err := b.s.net.probe(ctx, member)
	if err != nil {
		return unreachable(fmt.Sprintf("the node at %s does not answer: %s", shown(address), causeOf(err, member)))
	}
	clusterID := n.status.latest.Load().clusterID
	if w.ClusterId != clusterID {
		return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_WRONG_NODE,
			fmt.Sprintf("node %d at %s is not in this node's cluster, %016x", w.Peer.Node.Id, shown(address), clusterID))
	}
	b.s.net.learnAddresses(clusterID, []*kvpb.Peer{w.Peer})
	if n.status.latest.Load().members[w.Peer.RaftId] == nil {
		return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_WRONG_NODE,
			fmt.Sprintf("node %d at %s is in this node's cluster, but none of the members that this node knows: "+
				"this node says hello to it, and asks it for them", w.Peer.Node.Id, shown(address)))
	}
	return nil
}
