// ClusterService: what operators ask for, done here or by the leader.

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

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
	done, err := s.net.reserveCall(ctx)
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
		err = s.awaitChange(ctx, func(l *leaderState) nextStep { return l.learnerStep(raftID, m) })
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
	return s.awaitChange(ctx, func(l *leaderState) nextStep { return l.membershipStep(req) })
}

// awaitChange waits on the leader until a rule that changes the membership is done.
func (s *server) awaitChange(ctx context.Context, next func(*leaderState) nextStep) error {
	r := &request{n: s.n, next: next}
	err := s.n.await(ctx, r.poll)
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

// TransferLeader implements ClusterService.
func (s *server) TransferLeader(ctx context.Context, req *kvpb.TransferLeaderRequest) (*kvpb.TransferLeaderResponse, error) {
	if req.NodeId == 0 {
		return nil, invalid("node_id", "it is 0")
	}
	resp := &kvpb.TransferLeaderResponse{}
	return resp, s.onLeader(ctx, req, resp, func(ctx context.Context) error {
		t := &leaderTransfer{to: req.NodeId}
		r := &request{n: s.n, next: t.step}
		return s.n.await(ctx, r.poll)
	})
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
