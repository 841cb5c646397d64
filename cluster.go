// Who is a member: what operators ask for, and nodes that come back without
// their memory.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// inTime bounds a request. Its wait ends before the caller's, so that the answer
// that says why still gets there.
func inTime(ctx context.Context) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		return context.WithDeadline(ctx, deadline.Add(-margin(time.Until(deadline))))
	}
	return context.WithTimeout(ctx, adminTimeout)
}

// unsettled are the codes with which the fate of what was begun is open.
var unsettled = []codes.Code{codes.Unavailable, codes.DeadlineExceeded, codes.Aborted}

// onLeader has the leader do the request that ctx came with: here by local, or
// where the leader is. A request is forwarded once: what arrives forwarded at a
// node that does not lead goes back. All these requests state what shall be, so
// one that was cut short by a change of leader is simply made again. If it cannot
// be, what it has begun may still be made.
func (s *server) onLeader(ctx context.Context, req, resp proto.Message, local func(context.Context) error) error {
	ctx, cancel := inTime(ctx)
	defer cancel()
	md, _ := metadata.FromIncomingContext(ctx)
	forwarded := len(md.Get(forwardMetadata)) > 0
	begun := false
	for leaderless := time.Duration(0); ; sleep(ctx, s.n.opts.heartbeat) {
		p := s.n.status.latest.Load()
		err := errNotLeader
		switch {
		case p.clusterID == 0:
			err = errNotInitialized
		case p.leading:
			err = local(ctx)
		case forwarded:
		case p.leader == nil || p.lead == p.raftID: // none, or this node has not settled
			err = p.noLeader
			leaderless += s.n.opts.heartbeat
		default:
			err = s.forward(ctx, p.leader, req, resp)
		}
		begun = begun || errors.Is(err, errChangeUnknown)
		waits := leaderless <= leaderWait && !p.longLeaderless()
		again := errors.Is(err, errNotLeader) || errors.Is(err, errNoLeader) && waits
		switch {
		case again && !forwarded && ctx.Err() == nil:
		case begun && !errors.Is(err, errChangeUnknown) && slices.Contains(unsettled, status.Code(toStatus(err, true))):
			return fmt.Errorf("%w: %w", errChangeUnknown, err)
		default:
			return err
		}
	}
}

// forward has the leader do a request. An error that wraps errNotLeader means that
// whoever leads next is to be asked again.
func (s *server) forward(ctx context.Context, leader *kvpb.Node, req, resp proto.Message) error {
	done, err := s.net.ask(ctx)
	if err != nil {
		return err
	}
	defer done()
	conn := s.net.dial(leader.Address)
	defer func() { _ = conn.Close() }()
	method, _ := grpc.Method(ctx)
	err = conn.Invoke(metadata.AppendToOutgoingContext(ctx, forwardMetadata, "1"), method, req, resp)
	st := status.Convert(err)
	switch reason := errorReason(err); {
	case err == nil:
		return nil
	case reason == "" && ctx.Err() != nil:
		return ctx.Err()
	case reason == "OUTCOME_UNKNOWN", reason == "" && st.Code() == codes.Unavailable && !strings.Contains(st.Message(), "while dialing"): // it was sent off
		return fmt.Errorf("%w: %w: node %d, which led: %s", errChangeUnknown, errNotLeader, leader.Id, st.Message())
	case reason == "NOT_INITIALIZED", st.Code() == codes.Unavailable && reason != "UNREACHABLE": // perhaps of another life by now
		return fmt.Errorf("%w: node %d, which led: %s", errNotLeader, leader.Id, st.Message())
	}
	return err
}

// probe asks a node for its raft ID in this life. It has to be the one that is
// meant, and in no other cluster than this node.
func (s *server) probe(ctx context.Context, m *kvpb.Node) (uint64, error) {
	p := s.n.status.latest.Load()
	ctx, cancel := context.WithTimeout(ctx, s.n.opts.probeTimeout())
	defer cancel()
	w, err := s.net.probe(ctx, m.Address)
	if err != nil {
		return 0, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
			fmt.Sprintf("node %d at %s does not answer: %s", m.Id, m.Address, status.Convert(err).Message()))
	}
	if there := w.Peer.Node; there.Id != m.Id || there.Address != m.Address {
		return 0, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_WRONG_NODE,
			fmt.Sprintf("%d=%s was asked for, but %d=%s answers", m.Id, m.Address, there.Id, there.Address))
	}
	if w.ClusterId != 0 && w.ClusterId != p.clusterID {
		return 0, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED,
			fmt.Sprintf("node %d at %s is in another cluster, %016x; to have it in this one, stop it, "+
				"move its data directory away if it has one, and start it again", m.Id, m.Address, w.ClusterId))
	}
	return w.Peer.RaftId, nil
}

// AddLearner implements ClusterService.
func (s *server) AddLearner(ctx context.Context, req *kvpb.AddLearnerRequest) (*kvpb.AddLearnerResponse, error) {
	if err := validateNode("node", req.Node); err != nil {
		return nil, err
	}
	resp := &kvpb.AddLearnerResponse{}
	return resp, s.onLeader(ctx, req, resp, func(ctx context.Context) error { return s.addLearner(ctx, req.Node) })
}

// errPastLife means that a node goes by a raft ID that was removed, and is yet to
// hear of it.
var errPastLife = errors.New("the node has yet to hear that it was removed")

// addLearner adds a node on the leader and waits until it has caught up.
func (s *server) addLearner(ctx context.Context, m *kvpb.Node) error {
	m = &kvpb.Node{Id: m.Id, Address: m.Address} // without unknown fields
	for past := false; ; past = true {
		raftID, err := s.probe(ctx, m)
		if past && err != nil {
			sleep(ctx, s.n.opts.heartbeat) // or the deadline, which ends the probe, could be a moment ahead
		}
		switch {
		case err != nil && past && ctx.Err() != nil:
			return hasPast(m)
		case err != nil && past && errorReason(err) == "UNREACHABLE":
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, status.Convert(err).Message()+
				": it was removed, and stops when it hears of that, if it has a data directory, as its log then says; "+
				"move that away, start it without, and add it again")
		case err != nil:
			return err
		}
		err = s.awaitChange(ctx, func() (bool, error) { return s.n.stepLearner(raftID, m) })
		if err != errPastLife {
			return err
		}
		// Most of the voters that it knows will tell it; then it is somebody new, or stops.
		sleep(ctx, s.n.opts.heartbeat)
		if ctx.Err() != nil {
			return hasPast(m)
		}
	}
}

// hasPast is the error for a node that nobody could tell of its removal.
func hasPast(m *kvpb.Node) error {
	return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_PAST_MEMBER,
		fmt.Sprintf("node %d at %s still has what it had before it was removed: too few of the voters that it knows "+
			"are left at their addresses to tell it. Stop it, move its data directory away if it has one, start it again, "+
			"and add it", m.Id, m.Address))
}

// stepLearner takes the next step of making a life of a node a member, if one
// can be taken; true: it is one, and has caught up.
func (n *node) stepLearner(raftID uint64, m *kvpb.Node) (bool, error) {
	present := n.store.members[raftID]
	elsewhere := slices.DeleteFunc(n.store.raftIDsOf(m.Id), func(id uint64) bool { // where it was, another life may answer by now
		return id != n.id.raftID && (!n.peers.connected[id] || n.nodeOf(id).Address == m.Address)
	})
	for id, other := range n.store.members {
		if other.Id != m.Id && (id == raftID || other.Address == m.Address) {
			return false, apiError(codes.AlreadyExists, kvpb.ErrorReason_ERROR_REASON_MEMBER_EXISTS,
				fmt.Sprintf("node %d is at %s", other.Id, other.Address))
		}
	}
	switch {
	case slices.Contains(n.store.removed, raftID):
		return false, errPastLife
	case proto.Equal(present, m) && len(n.store.raftIDsOf(m.Id)) == 1:
		return raftID == n.id.raftID || n.isCaughtUp(n.progressOf()[raftID]), nil
	case !n.mayChange() || proto.Equal(present, m): // which heal makes the only one
		return false, nil
	case present != nil:
		return false, n.proposeChange([]*kvpb.Member{{RaftId: raftID, Node: m}}, confChange(raftpb.ConfChangeUpdateNode, raftID))
	case slices.ContainsFunc(elsewhere, n.alive):
		return false, apiError(codes.AlreadyExists, kvpb.ErrorReason_ERROR_REASON_MEMBER_EXISTS,
			fmt.Sprintf("there is a node %d, and it answers: stop it, or give this one another id", m.Id))
	case len(elsewhere) > 0 && n.isNewLeader():
		return false, nil
	case len(n.store.members) >= maxMembers:
		return false, invalid("node", "the cluster has %d members, which is the limit", maxMembers)
	}
	return false, n.addIncarnation(&kvpb.Peer{RaftId: raftID, Node: m})
}

func confChange(t raftpb.ConfChangeType, raftID uint64) *raftpb.ConfChangeSingle {
	return &raftpb.ConfChangeSingle{Type: t.Enum(), NodeId: new(raftID)}
}

// request is what an operator asks of the leader, on its way through the loop there.
type request struct {
	n *node
	// step takes the next step, if one can be taken; true: what was asked for is so.
	step    func() (bool, error)
	witness witness
	begun   atomic.Bool // it has proposed a change, or a transfer of leadership
	busy    atomic.Bool // it waits until somebody else's change is done
}

// witness is an empty entry that the leader proposes after a configuration has come
// into force.
type witness struct {
	conf        *raftpb.ConfState
	term, index uint64
}

// advance is called after each turn. An answer, also that something cannot be done,
// waits for the request's witness: a leader that has been deposed must not give one.
func (r *request) advance() (bool, error) {
	n := r.n
	if !n.leads() {
		return false, errNotLeader
	}
	was := n.change.at
	done, err := r.step()
	if n.change.at > was {
		r.begun.Store(true)
	}
	r.busy.Store(!r.begun.Load() && !n.mayChange())
	if !done && err == nil {
		return false, nil
	}
	if !r.witnessed() {
		return false, nil
	}
	return done, err
}

// witnessed reports whether an entry is applied that this leader has proposed since
// the request came, behind the present configuration. Then a majority still followed
// it, and that configuration was in force, after the request came. And most voters know
// that it is committed, also after a restart: they have stored an entry that came with
// word of it. Before, they might need the votes of those who were removed, if this
// leader is lost. Raft itself asks for no more than that a change is committed.
func (r *request) witnessed() bool {
	n := r.n
	w := witness{conf: n.store.conf, term: n.raft.term}
	if r.witness.conf != w.conf || r.witness.term != w.term {
		if err := n.rn.Propose(nil); err != nil {
			return false // leadership is being transferred: once more, later
		}
		n.log.behind = true
		log := n.drainedLog()
		if log == nil {
			return false
		}
		w.index = log.last()
		r.witness = w
	}
	w = r.witness
	return w.conf == n.store.conf && w.term == n.raft.term && w.index <= n.store.index
}

// awaitChange waits on the leader until step, which changes the membership, is done.
func (s *server) awaitChange(ctx context.Context, step func() (bool, error)) error {
	r := &request{n: s.n, step: step}
	err := s.n.await(ctx, r.advance)
	open := false
	switch status.Code(toStatus(err, false)) {
	case codes.Unavailable, codes.FailedPrecondition, codes.DeadlineExceeded, codes.Aborted:
		open = err != errPastLife
	}
	if r.begun.Load() && open {
		return fmt.Errorf("%w: %w", errChangeUnknown, err) // it may be made yet
	}
	if r.busy.Load() && errors.Is(err, context.DeadlineExceeded) {
		return apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_CHANGE_IN_PROGRESS,
			"another change of membership was running until the deadline")
	}
	return err
}

// ChangeMembership implements ClusterService.
func (s *server) ChangeMembership(ctx context.Context, req *kvpb.ChangeMembershipRequest) (*kvpb.ChangeMembershipResponse, error) {
	if err := validateChange(req); err != nil {
		return nil, err
	}
	resp := &kvpb.ChangeMembershipResponse{}
	return resp, s.onLeader(ctx, req, resp, func(ctx context.Context) error { return s.changeMembership(ctx, req) })
}

// validateChange checks what can be checked of a request without the membership.
func validateChange(req *kvpb.ChangeMembershipRequest) error {
	deltas := len(req.Promote) + len(req.Demote)
	if deltas > 0 && len(req.Members) > 0 {
		return invalid("members", "they are all voters to be: there is nobody to promote or demote besides")
	}
	if deltas > 0 && req.Retain {
		return invalid("retain", "it goes with members: who is not promoted or demoted stays as it is")
	}
	ids := slices.Concat(req.Members, req.Promote, req.Demote, req.Remove)
	if len(ids) == 0 || len(ids) > maxMembers {
		return invalid("members", "the request names %d, there have to be 1 to %d", len(ids), maxMembers)
	}
	named := len(ids)
	slices.Sort(ids)
	if ids[0] == 0 || len(slices.Compact(ids)) < named {
		return invalid("members", "an id is 0 or stands there twice")
	}
	if req.Expected == nil {
		return nil
	}
	if n := len(req.Expected.Members); n == 0 || n > 2*maxMembers {
		return invalid("expected.members", "there are %d, there have to be 1 to %d", n, 2*maxMembers)
	}
	for _, m := range req.Expected.Members {
		if err := validateNode("expected.members.node", m.GetNode()); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) changeMembership(ctx context.Context, req *kvpb.ChangeMembershipRequest) error {
	return s.awaitChange(ctx, func() (bool, error) { return s.n.stepMembership(req) })
}

// stepMembership takes the next step towards the voters that a request names,
// if one can be taken; true: it is there. Nothing can come between what it compares
// and the change that it proposes: raft takes no second change before the first is
// applied.
func (n *node) stepMembership(req *kvpb.ChangeMembershipRequest) (bool, error) {
	if isJoint(n.store.conf) {
		return false, nil
	}
	var changes []*raftpb.ConfChangeSingle
	want, err := n.votersToBe(req)
	if err == nil {
		changes, err = n.changesTo(want, req)
	}
	if err == nil && len(changes) == 0 {
		return true, nil
	}
	if !n.mayChange() {
		return false, nil // perhaps it is made just now
	}
	if req.Expected != nil && !maps.Equal(expectedRoles(req.Expected), n.store.roles()) {
		return false, apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_MEMBERSHIP_CHANGED,
			"the membership is another than the change was made for: "+describeMembers(n.store.conf, n.store.members))
	}
	if dead := slices.DeleteFunc(slices.Clone(want), n.alive); err == nil && len(dead) > (len(want)-1)/2 {
		err = apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
			fmt.Sprintf("of these %d voters %s: they could not go on", len(want), n.silent(dead)))
	}
	if err != nil {
		return false, oneOf(n.isNewLeader(), nil, err) // perhaps it has yet to hear from them
	}
	if slices.ContainsFunc(want, n.isComingBack) {
		return false, nil // a node that lost its memory is taken back first
	}
	if !slices.Contains(want, n.id.raftID) && n.handOver(want) {
		return false, nil // this node leaves: who stays, and votes already, makes the change
	}
	return false, n.proposeChange(nil, changes...)
}

// role is what operators know of a member.
type role struct {
	address string
	voter   bool
}

// addRole adds a life of a node to roles by node id. While a node is taken back it
// has two: it keeps the role of the older one, and is at the address of the newer.
func addRole(roles map[uint64]role, m *kvpb.Node, voter bool) {
	other, twice := roles[m.Id]
	address := m.Address
	if twice && voter {
		address = other.address
	}
	roles[m.Id] = role{address, voter || other.voter}
}

// roles returns the roles of all members by node id.
func (s *store) roles() map[uint64]role {
	roles := map[uint64]role{}
	for id, m := range s.members {
		addRole(roles, m, slices.Contains(s.conf.GetVoters(), id))
	}
	return roles
}

func expectedRoles(expected *kvpb.Membership) map[uint64]role {
	roles := map[uint64]role{}
	for _, m := range expected.Members {
		addRole(roles, m.Node, m.Voter)
	}
	return roles
}

// votersToBe returns the raft IDs of the voters that a request wants. Who is to be
// removed need not be a member any more: the request may have been made already, by
// a leader that had no time to answer.
func (n *node) votersToBe(req *kvpb.ChangeMembershipRequest) ([]uint64, error) {
	present := slices.DeleteFunc(slices.Clone(req.Remove), func(id uint64) bool { return slices.Contains(n.store.former, id) })
	if _, err := n.resolve(present); err != nil {
		return nil, err
	}
	if len(req.Members) > 0 {
		return n.resolve(req.Members)
	}
	if _, err := n.resolve(req.Demote); err != nil {
		return nil, err
	}
	promoted, err := n.resolve(req.Promote)
	if err != nil {
		return nil, err
	}
	stops := slices.Concat(req.Demote, req.Remove)
	want := slices.DeleteFunc(slices.Clone(n.store.conf.GetVoters()), func(id uint64) bool {
		return slices.Contains(stops, n.store.members[id].Id)
	})
	for _, id := range promoted {
		if !slices.Contains(want, id) {
			want = append(want, id)
		}
	}
	if len(want) == 0 {
		return nil, invalid(oneOf(len(req.Remove) > 0, "remove", "demote"), "no voter would be left")
	}
	return want, nil
}

// resolve returns the raft IDs of nodes. Of a node that is just being taken
// back, it is the one that votes.
func (n *node) resolve(nodeIDs []uint64) ([]uint64, error) {
	var ids []uint64
	for _, nodeID := range nodeIDs {
		of := n.store.raftIDsOf(nodeID)
		if len(of) == 0 {
			return nil, apiError(codes.NotFound, kvpb.ErrorReason_ERROR_REASON_UNKNOWN_MEMBER, fmt.Sprintf("no member has the id %d", nodeID))
		}
		i := slices.IndexFunc(of, func(id uint64) bool { return n.isVoter(id) })
		ids = append(ids, of[max(i, 0)])
	}
	return ids, nil
}

// changesTo returns what changes the configuration to one with the wanted
// voters; nothing, if that is so already.
func (n *node) changesTo(want []uint64, req *kvpb.ChangeMembershipRequest) (changes []*raftpb.ConfChangeSingle, err error) {
	leaves := func(id uint64) bool { return n.isVoter(id) && !slices.Contains(want, id) }
	progress := n.progressOf()
	for _, m := range sortedMembers(n.store.members) {
		id, removed := m.RaftId, slices.Contains(req.Remove, m.Node.Id)
		switch wanted := slices.Contains(want, id); {
		case wanted && n.isVoter(id):
		case wanted && !n.alive(id):
			return nil, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, n.silent([]uint64{id}))
		case wanted && !n.isCaughtUp(progress[id]):
			return nil, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP,
				fmt.Sprintf("node %d is too far behind to vote: it has entry %d of %d", m.Node.Id, progress[id].Match, n.store.index))
		case wanted:
			changes = append(changes, confChange(raftpb.ConfChangeAddNode, id))
		case leaves(id) && !removed && (req.Retain || slices.Contains(req.Demote, m.Node.Id)):
			changes = append(changes, confChange(raftpb.ConfChangeAddLearnerNode, id))
		case removed || slices.ContainsFunc(n.store.raftIDsOf(m.Node.Id), leaves): // a life that was to take the place of one that leaves
			changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
		}
	}
	return changes, nil
}

// TransferLeader implements ClusterService.
func (s *server) TransferLeader(ctx context.Context, req *kvpb.TransferLeaderRequest) (*kvpb.TransferLeaderResponse, error) {
	if req.NodeId == 0 {
		return nil, invalid("node_id", "it is 0")
	}
	resp := &kvpb.TransferLeaderResponse{}
	return resp, s.onLeader(ctx, req, resp, func(ctx context.Context) error {
		var start uint64
		r := &request{n: s.n, step: func() (bool, error) { return s.n.stepTransfer(req.NodeId, &start) }}
		return s.n.await(ctx, r.advance)
	})
}

// stepTransfer has raft make a node the leader; true: it is this one. A leader that
// has handed over does not know for sure who leads now: that one is asked next. start is
// the tick of the first try.
func (n *node) stepTransfer(nodeID uint64, start *uint64) (bool, error) {
	if nodeID == n.self.Id {
		return true, nil
	}
	ids, err := n.resolve([]uint64{nodeID})
	if err != nil {
		return false, err
	}
	if !n.isVoter(ids[0]) {
		return false, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP, fmt.Sprintf("node %d is no voter", nodeID))
	}
	if !n.peers.connected[ids[0]] || *start != 0 && n.clock.now-*start > 2*n.electionTicks() {
		return false, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
			fmt.Sprintf("node %d does not answer, or did not take over", nodeID))
	}
	if n.mayChange() {
		*start = cmp.Or(*start, n.clock.now)
		if n.alive(ids[0]) { // else raft would take no writes for nothing
			n.handOver(ids)
		}
	}
	return false, nil
}

// Backup implements ClusterService. It gives up a caller who does not read.
func (s *server) Backup(_ *kvpb.BackupRequest, stream kvpb.ClusterService_BackupServer) error {
	defer s.backups.Add(-1)
	if s.backups.Add(1) > maxBackups {
		return toStatus(errOverloaded, false)
	}
	err := s.net.serve(stream, func(ctx context.Context, _ context.CancelCauseFunc, silent *time.Timer) error {
		v, err := s.openView(ctx, false, (*store).open)
		if err != nil {
			return toStatus(err, false)
		}
		v.rest = rest
		return v.writeTo(chunkWriter(func(b []byte) error {
			silent.Reset(helloTimeout)
			return stream.Send(&kvpb.BackupResponse{Data: b})
		}))
	})
	if err != nil && errorReason(err) == "" {
		err = fmt.Errorf("the caller does not read: %w", context.DeadlineExceeded)
	}
	return toStatus(err, false)
}

// Metrics implements ClusterService.
func (s *server) Metrics(ctx context.Context, _ *kvpb.MetricsRequest) (*kvpb.MetricsResponse, error) {
	var m *kvpb.MetricsResponse
	err := s.n.do(ctx, func() error { m = s.n.metrics(); return nil })
	if err != nil {
		return nil, err
	}
	m.MessagesDropped += s.net.dropped.Load()
	m.BuildVersion = buildVersion()
	return m, nil
}

// metrics is the node's own view; only the loop may call it.
func (n *node) metrics() *kvpb.MetricsResponse {
	s := n.store
	m := proto.CloneOf(&n.status.count)
	m.Node, m.RaftId, m.ClusterId, m.Role = n.self, n.id.raftID, s.clusterID, kvpb.Role_ROLE_UNINITIALIZED
	m.Leader = n.nodeOf(n.raft.lead)
	m.FirstIndex, m.LastIndex, m.AppliedIndex, m.LogBytes = n.log.prevIndex+1, n.log.last(), s.index, n.log.bytes
	m.Joint, m.Version, m.UnhealthyReason = isJoint(s.conf), s.version, n.whyUnhealthy()
	m.Healthy, m.Durable = m.UnhealthyReason == "", n.durable.disk != nil
	m.RestartReason = n.whyNotRestart()
	m.Keys, m.StoreBytes, m.Sessions = s.keys, s.bytes, uint64(len(s.sessions))
	if n.rn == nil {
		return m
	}
	m.Term, m.CommitIndex = n.raft.term, n.rn.BasicStatus().GetCommit()
	m.WriteLimit = n.rate(n.catchup.pace.limit, 1)
	switch {
	case n.raft.role == raft.StateLeader:
		m.Role = kvpb.Role_ROLE_LEADER
	case n.raft.role != raft.StateFollower:
		m.Role = kvpb.Role_ROLE_CANDIDATE
	case slices.Contains(s.conf.GetLearners(), n.id.raftID):
		m.Role = kvpb.Role_ROLE_LEARNER
	default:
		m.Role = kvpb.Role_ROLE_FOLLOWER
	}
	progress := n.progressOf()
	for _, member := range sortedMembers(s.members) {
		id := member.RaftId
		ms := &kvpb.MemberStatus{
			Node: member.Node, RaftId: id, Connected: n.peers.connected[id] || id == n.id.raftID,
			Voter: slices.Contains(s.conf.GetVoters(), id), VoterOutgoing: slices.Contains(s.conf.GetVotersOutgoing(), id),
			Learner: slices.Contains(s.conf.GetLearners(), id) || slices.Contains(s.conf.GetLearnersNext(), id),
		}
		if pr, ok := progress[id]; ok {
			ms.Progress = &kvpb.Progress{
				MatchIndex: pr.Match, NextIndex: pr.Next, State: pr.State.String(), RecentActive: pr.RecentActive, CaughtUp: n.isCaughtUp(pr),
			}
			ms.Lagging = n.lagging(id, pr)
		}
		m.Members = append(m.Members, ms)
	}
	return m
}

// mayChange reports whether a change of membership or leadership may start.
// One that was lost without a word blocks others for an election timeout only.
func (n *node) mayChange() bool {
	return n.leads() && !isJoint(n.store.conf) && (n.change.at == 0 || n.clock.now-n.change.at > n.electionTicks())
}

// proposeChange proposes a change of the configuration. Whether it was applied
// shows in the configuration.
func (n *node) proposeChange(members []*kvpb.Member, changes ...*raftpb.ConfChangeSingle) error {
	who := &kvpb.ConfChangeContext{Members: members}
	ctx, err := proto.Marshal(who)
	if err != nil {
		return err
	}
	// Explicit: raft would leave the joint configuration without looking who leads.
	cc := &raftpb.ConfChangeV2{Changes: changes, Context: ctx, Transition: raftpb.ConfChangeTransitionJointExplicit.Enum()}
	if c := changes[0]; len(changes) == 1 && (c.GetType() == raftpb.ConfChangeUpdateNode || !n.isVoter(c.GetNodeId())) {
		cc.Transition = raftpb.ConfChangeTransitionAuto.Enum() // no voter leaves
	}
	if _, err := n.store.checkConfChange(cc, who); err != nil {
		return err
	}
	if n.rn.ProposeConfChange(cc) == nil { // else leadership is being transferred
		n.change.at = n.clock.now
	}
	return nil
}

// leaveJoint ends a change of membership. A leader that is to leave hands over
// first: it would step down before the others know that they may do without it.
func (n *node) leaveJoint() {
	if n.isVoter(n.id.raftID) {
		_ = n.rn.ProposeConfChange(&raftpb.ConfChangeV2{})
	} else {
		n.handOver(n.store.conf.GetVoters())
	}
}

// membershipChange is the change of membership, or of leadership, in flight, and what a
// leader has seen of members that have two lives.
type membershipChange struct {
	at     uint64            // tick of the change in flight; 0: none
	sights map[uint64]*sight // by raft ID: learners whose node has an older life, too
}

func (c *membershipChange) forget() {
	c.sights = map[uint64]*sight{}
}

// forgetMembers drops what was seen of members that were removed.
func (c *membershipChange) forgetMembers(removed []uint64) {
	for _, id := range removed {
		delete(c.sights, id)
	}
}

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

// addresses lists where members are.
func (n *node) addresses(ids []uint64) string {
	var at []string
	for _, id := range ids {
		at = append(at, n.store.members[id].Address)
	}
	slices.Sort(at)
	return strings.Join(slices.Compact(at), " and ")
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

// alive reports whether a member is connected, and was heard within an election
// timeout: a stream can outlive whoever is at its other end for a while.
func (n *node) alive(id uint64) bool {
	return id == n.id.raftID || n.peers.connected[id] && n.clock.now-n.peers.heard[id] <= n.electionTicks()
}

// names lists members.
func (n *node) names(ids []uint64) string {
	var names []string
	for _, id := range ids {
		names = append(names, "node "+n.describe(id))
	}
	slices.Sort(names)
	return strings.Join(names, " and ")
}

// isNewLeader reports whether a leader has perhaps not heard from everybody yet.
func (n *node) isNewLeader() bool { return n.clock.now-n.election.leadHeard <= n.electionTicks() }

// silent says which members do not answer.
func (n *node) silent(ids []uint64) string {
	return n.names(ids) + oneOf(len(ids) > 1, " do not answer", " does not answer")
}

// isVoter reports whether a raft ID votes once no change is running.
func (n *node) isVoter(id uint64) bool { return slices.Contains(n.store.conf.GetVoters(), id) }

// isCaughtUp reports whether a member has what was committed two heartbeats ago.
func (n *node) isCaughtUp(pr tracker.Progress) bool {
	return pr.State == tracker.StateReplicate && pr.Match >= n.catchup.commitAt[len(n.catchup.commitAt)-1] && pr.Match > 0
}

// progressOf returns the leader's knowledge of all members, by raft ID.
func (n *node) progressOf() map[uint64]tracker.Progress {
	m := map[uint64]tracker.Progress{}
	if n.rn != nil && n.raft.role == raft.StateLeader {
		n.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) { m[id] = pr })
	}
	return m
}

// heirs are the voters among ids that could lead in place of this node, the one
// that has most of the log first.
func (n *node) heirs(ids []uint64) []uint64 {
	progress := n.progressOf()
	ids = slices.DeleteFunc(slices.Clone(ids), func(id uint64) bool {
		pr, ok := progress[id]
		return !ok || id == n.id.raftID || pr.IsLearner || !n.alive(id)
	})
	slices.SortStableFunc(ids, func(a, b uint64) int { return cmp.Compare(progress[b].Match, progress[a].Match) })
	return ids
}

// handOver asks raft to make the first heir among ids the leader; false: there is
// none.
func (n *node) handOver(ids []uint64) bool {
	if ids = n.heirs(ids); len(ids) == 0 {
		return false
	}
	n.change.at = n.clock.now
	n.rn.TransferLeader(ids[0])
	return true
}
