// ClusterService: what operators ask for, done here or by the leader.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
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

// onLeader has the leader do a request, which a method is called with: here by local, or
// where the leader is. A request is forwarded once: what arrives forwarded at a
// node that does not lead goes back. All these requests state what shall be, so
// one that was cut short by a change of leader is simply made again. If it cannot
// be, what it has begun may still be made.
func (s *server) onLeader(
	ctx context.Context, method string, req, resp proto.Message, local func(context.Context) error,
) error {
	ctx, cancel := inTime(ctx)
	defer cancel()
	isForwarded := wasForwarded(ctx)
	hasBegun := false
	leaderless := time.Duration(0)
	for {
		p := s.n.status.latest.Load()
		err := s.tryOnLeader(ctx, p, method, req, resp, local)
		if errors.Is(err, errNoLeader) {
			leaderless += s.n.opts.heartbeat
		}
		isUnknown := errors.Is(err, errChangeUnknown)
		hasBegun = hasBegun || isUnknown
		mayFindLeader := leaderless <= leaderWait && !p.longLeaderless()
		isTransient := errors.Is(err, errNotLeader) || mayFindLeader && errors.Is(err, errNoLeader)
		mayTryAgain := !isForwarded && ctx.Err() == nil
		if isTransient && mayTryAgain {
			sleep(ctx, s.n.opts.heartbeat)
			continue
		}
		isOpen := !isUnknown && leavesOpen(err)
		if hasBegun && isOpen {
			return fmt.Errorf("%w: %w", errChangeUnknown, err)
		}
		return err
	}
}

// leavesOpen reports whether, after an error, a change that an earlier try has begun may
// still be made. It may, if a node answers that it is in no cluster: for toStatus, that
// is one more way in which a node is unavailable.
func leavesOpen(err error) bool {
	switch status.Code(toStatus(err, true)) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Aborted:
		return true
	}
	return false
}

// tryOnLeader has the leader do a request, once, if p says who leads.
func (s *server) tryOnLeader(
	ctx context.Context, p *published, method string, req, resp proto.Message, local func(context.Context) error,
) error {
	if p.clusterID == 0 {
		return errNotInitialized
	}
	if p.leading {
		return local(ctx)
	}
	if wasForwarded(ctx) {
		return errNotLeader
	}
	isUnsettled := p.lead == p.raftID // this node is to lead, and has yet to apply an entry of its term
	if p.leader == nil || isUnsettled {
		return p.noLeader
	}
	return s.forward(ctx, p.leader, method, req, resp)
}

// forward has the leader do a request. An error that wraps errNotLeader means that
// whoever leads next is to be asked again.
func (s *server) forward(ctx context.Context, leader *kvpb.Node, method string, req, resp proto.Message) error {
	done, err := s.net.reserveCall(ctx)
	if err != nil {
		return err
	}
	defer done()
	conn := s.net.dial(leader)
	defer func() { _ = conn.Close() }()
	var by grpcpeer.Peer // set by gRPC if the request has got a connection to be sent off by
	err = conn.Invoke(forwarding(ctx), method, req, resp, grpc.Peer(&by))
	if err == nil {
		return nil
	}
	return forwardError(ctx, leader, err, by.Addr != nil)
}

// forwardError says what the error means that a request to the leader ended with.
func forwardError(ctx context.Context, leader *kvpb.Node, err error, isSentOff bool) error {
	message := status.Convert(err).Message()
	isUnavailable := status.Code(err) == codes.Unavailable
	isFromGRPC := errorReason(err) == "" // else the leader has said so
	if isFromGRPC && isOutOfTime(ctx) {
		return cmp.Or(ctx.Err(), context.DeadlineExceeded)
	}
	isLost := isFromGRPC && isUnavailable && isSentOff
	if isLost || hasReason(err, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN) {
		return fmt.Errorf("%w: %w: node %d, which led: %s", errChangeUnknown, errNotLeader, leader.Id, message)
	}
	// A node in no cluster is perhaps a later life of the leader. One that is unavailable
	// has stopped, or leads no more; unless it says that a member is unreachable.
	isGone := isUnavailable && !hasReason(err, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE)
	if isGone || hasReason(err, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED) {
		return fmt.Errorf("%w: node %d, which led: %s", errNotLeader, leader.Id, message)
	}
	return err
}

// hasReason reports whether a node gave this reason for an error.
func hasReason(err error, reason kvpb.ErrorReason) bool {
	return errorReason(err) == strings.TrimPrefix(reason.String(), "ERROR_REASON_")
}

// probe asks a node for its raft ID in this life. It has to be the one that is
// meant, and in no other cluster than this node.
func (s *server) probe(ctx context.Context, m *kvpb.Node) (*kvpb.Peer, error) {
	p := s.n.status.latest.Load()
	ctx, cancel := context.WithTimeout(ctx, s.n.opts.probeTimeout())
	defer cancel()
	w, err := s.net.probe(ctx, m)
	if err != nil {
		return nil, unreachable(fmt.Sprintf("node %d at %s does not answer: %s", m.Id, shown(m.Address), causeOf(err, m)))
	}
	if there := w.Peer.Node; there.Id != m.Id || there.Address != m.Address {
		return nil, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_WRONG_NODE,
			fmt.Sprintf("%s was asked for, but %s answers", formatNode(m), formatNode(there)))
	}
	if w.ClusterId != 0 && w.ClusterId != p.clusterID {
		return nil, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED,
			fmt.Sprintf("node %d at %s is in another cluster, %016x; to have it in this one, stop it, "+
				"move its data directory away if it has one, and start it again", m.Id, shown(m.Address), w.ClusterId))
	}
	return &kvpb.Peer{RaftId: w.Peer.RaftId, Node: m, Level: w.Peer.Level}, nil
}

// AddLearner implements ClusterService.
func (s *server) AddLearner(ctx context.Context, req *kvpb.AddLearnerRequest) (*kvpb.AddLearnerResponse, error) {
	if err := validateNode("node", req.Node); err != nil {
		return nil, err
	}
	resp := &kvpb.AddLearnerResponse{}
	err := s.onLeader(ctx, kvpb.ClusterService_AddLearner_FullMethodName, req, resp, func(ctx context.Context) error {
		return s.addLearner(ctx, req)
	})
	return resp, err
}

// addLearner adds a node on the leader and waits until it has caught up.
func (s *server) addLearner(ctx context.Context, req *kvpb.AddLearnerRequest) error {
	m := &kvpb.Node{Id: req.Node.Id, Address: req.Node.Address} // without unknown fields
	p, err := s.probe(ctx, m)
	if err != nil {
		return err
	}
	for {
		err := s.awaitChange(ctx, func(l *leaderState) nextStep {
			return l.whileFounding(req.WhileFounding, l.operatorsLearnerStep(p))
		})
		if err != errPastLife {
			return err
		}
		// Most of the voters that the node knows will tell it that it was removed. Then it
		// has another raft ID, or stops.
		sleep(ctx, s.n.opts.heartbeat)
		p, err = s.probe(ctx, m)
		if isOutOfTime(ctx) {
			return hasPast(m)
		}
		if err == nil {
			continue
		}
		if !hasReason(err, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE) {
			return err
		}
		return unreachable(status.Convert(err).Message() +
			": it was removed, and stops when it hears of that, if it has a data directory, as its log then says; " +
			"move that away, start it without, and add it again")
	}
}

// hasPast is the error for a node that nobody could tell of its removal.
func hasPast(m *kvpb.Node) error {
	return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_PAST_MEMBER,
		fmt.Sprintf("node %d at %s still has what it had before it was removed: too few of the voters that it knows "+
			"are left at their addresses to tell it. Stop it, move its data directory away if it has one, start it again, "+
			"and add it", m.Id, shown(m.Address)))
}

// ChangeMembership implements ClusterService.
func (s *server) ChangeMembership(
	ctx context.Context, req *kvpb.ChangeMembershipRequest,
) (*kvpb.ChangeMembershipResponse, error) {
	if err := validateChange(req); err != nil {
		return nil, err
	}
	resp := &kvpb.ChangeMembershipResponse{}
	method := kvpb.ClusterService_ChangeMembership_FullMethodName
	err := s.onLeader(ctx, method, req, resp, func(ctx context.Context) error {
		return s.changeMembership(ctx, req)
	})
	return resp, err
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
	expected := len(req.Expected.Members)
	if expected == 0 || expected > 2*maxMembers {
		return invalid("expected.members", "there are %d, there have to be 1 to %d", expected, 2*maxMembers)
	}
	for _, m := range req.Expected.Members {
		if err := validateNode("expected.members.node", m.GetNode()); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) changeMembership(ctx context.Context, req *kvpb.ChangeMembershipRequest) error {
	return s.awaitChange(ctx, func(l *leaderState) nextStep {
		return l.whileFounding(req.WhileFounding, l.membershipStep(req))
	})
}

// awaitChange waits on the leader until a rule that changes the membership is done.
func (s *server) awaitChange(ctx context.Context, next func(*leaderState) nextStep) error {
	r := &request{n: s.n, next: next}
	err := r.await(ctx)
	if r.begun.Load() && mayBeMade(err) {
		return fmt.Errorf("%w: %w", errChangeUnknown, err)
	}
	return err
}

// mayBeMade reports whether a change that was begun, and ended with an error, may still
// be made.
func mayBeMade(err error) bool {
	if err == errPastLife {
		return false // the request is made again, with the node's next raft ID
	}
	if err == errFounded {
		return false // there is one change at a time, and a later one has been made since
	}
	switch status.Code(toStatus(err, false)) {
	case codes.Unavailable, codes.FailedPrecondition, codes.DeadlineExceeded, codes.Aborted:
		return true
	}
	return false
}

// TransferLeader implements ClusterService.
func (s *server) TransferLeader(
	ctx context.Context, req *kvpb.TransferLeaderRequest,
) (*kvpb.TransferLeaderResponse, error) {
	if req.NodeId == 0 {
		return nil, invalid("node_id", "it is 0")
	}
	resp := &kvpb.TransferLeaderResponse{}
	err := s.onLeader(ctx, kvpb.ClusterService_TransferLeader_FullMethodName, req, resp, func(ctx context.Context) error {
		t := &leaderTransfer{to: req.NodeId}
		r := &request{n: s.n, next: t.step}
		return r.await(ctx)
	})
	return resp, err
}

// Backup implements ClusterService. It gives up a caller who does not read.
func (s *server) Backup(_ *kvpb.BackupRequest, stream kvpb.ClusterService_BackupServer) error {
	running := s.backups.Add(1)
	defer s.backups.Add(-1)
	if running > maxBackups {
		return toStatus(errOverloaded, false)
	}
	err := s.serveReader(stream, func(ctx context.Context, sends func()) error {
		v, err := s.openBackup(ctx)
		if err != nil {
			return toStatus(err, false)
		}
		v.rest = rest
		return v.writeTo(chunkWriter(func(b []byte) error {
			sends()
			return stream.Send(&kvpb.BackupResponse{Data: b})
		}))
	})
	if err == nil {
		return nil
	}
	return toStatus(err, false)
}

// serveReader has handle send a stream that takes long, until a little before the caller's
// deadline. handle calls sends at each message: a caller who takes none for helloTimeout is
// given up.
func (s *server) serveReader(stream grpc.ServerStream, handle func(ctx context.Context, sends func()) error) error {
	err := s.net.serve(stream, func(ctx context.Context, cancel context.CancelCauseFunc, silent *time.Timer) error {
		soon, stop := beforeDeadline(ctx)
		defer stop()
		// It is taken back before stop ends soon: a stream that has ended well was not cancelled.
		takeBack := context.AfterFunc(soon, func() { cancel(soon.Err()) })
		defer takeBack()
		return handle(ctx, func() { silent.Reset(helloTimeout) })
	})
	if errors.Is(err, errSilent) {
		return fmt.Errorf("the caller does not read: %w", context.DeadlineExceeded)
	}
	return err
}

// Metrics implements ClusterService.
func (s *server) Metrics(ctx context.Context, _ *kvpb.MetricsRequest) (*kvpb.MetricsResponse, error) {
	ctx, cancel := inTime(ctx)
	defer cancel()
	var m *kvpb.MetricsResponse
	err := s.n.do(ctx, func() error {
		m = s.n.metrics()
		m.Slow = s.n.slowTexts(time.Now())
		return nil
	})
	if err != nil {
		return nil, err
	}
	m.Slow = append(m.Slow, s.net.slowPeers(time.Now())...)
	m.Slow = withoutEmpty(append(m.Slow, s.slowCalls.text(time.Now(), "a call")))
	m.MessagesDropped += s.net.dropped.Load()
	m.RequestsRefused = s.refused.Load()
	if s.limiter != nil {
		m.HandshakesFailed = s.limiter.failedHandshakes.Load()
	}
	if s.certificates != nil {
		m.CertificateNotAfter = s.certificates.latest().until.Unix()
	}
	m.BuildVersion = buildVersion()
	return m, nil
}
