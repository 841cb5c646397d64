// The gRPC services that clients and operators call.

package main

import (
	"cmp"
	"context"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// maxListItems and maxListBytes bound a page of List: what it takes of memory, and
	// of time in which it holds one of maxLists.
	maxListItems = 10_000
	maxListBytes = 1 << 20
	// maxBackups bounds the backups that a node sends at a time: each makes it
	// keep what is overwritten meanwhile.
	maxBackups = 4
	// maxLists bounds the Lists that run at a time: each passes over all keys, so
	// more would take more cores from the loop.
	maxLists = 4
	// maxMembers bounds a cluster, and with it what a request may name, and the
	// connections and files of peers: peerFiles for each.
	maxMembers = 64
	// maxAddressBytes bounds the address of a node.
	maxAddressBytes = 256
	// maxStreamsPerConnection bounds the calls that run on one connection: a fleet of
	// callers behind one connection, and 20 MiB of goroutines if nobody else is.
	maxStreamsPerConnection = 1024
	// streamWorkers keep their stacks from call to call, 8 MiB of them: a new
	// goroutine grows its own first. Calls beyond them get new ones.
	streamWorkers = 1024
	// maxHeaderBytes bounds the metadata of a call, which is for traces and tokens;
	// gRPC has it in memory before it looks at the call.
	maxHeaderBytes = 16 << 10
	// adminTimeout bounds requests of ClusterService that have no deadline: callers
	// who left it out wait no longer for a node that does not catch up.
	adminTimeout = time.Minute
	// maxMargin bounds how long before its caller's deadline a call ends.
	maxMargin = 100 * time.Millisecond

	leaderMetadata  = "x-raft-leader"
	forwardMetadata = "x-raft-forwarded"
	// restartHealth is the health name that says: this node may be restarted.
	restartHealth = "raftkv.v1.restart"
)

// server is what a node offers by gRPC.
type server struct {
	kvpb.UnimplementedKVServiceServer
	kvpb.UnimplementedClusterServiceServer
	n      *node
	net    *network
	grpc   *grpc.Server
	health *health.Server
	leader atomic.Pointer[metadata.MD] // x-raft-leader

	backups atomic.Int32  // that run
	lists   chan struct{} // full while maxLists run

	surveying chan struct{} // full while an Init asks members, or another founder
	adding    chan struct{} // full while an Init adds members

	draining bool          // the loop's: no more new calls are wanted
	stopping chan struct{} // closed by stop
	inFlight atomic.Int64  // unary calls
}

func newServer(n *node, nw *network) *server {
	s := &server{n: n, net: nw, health: health.NewServer(), stopping: make(chan struct{}), lists: make(chan struct{}, maxLists)}
	s.surveying, s.adding = make(chan struct{}, 1), make(chan struct{}, 1)
	s.grpc = grpc.NewServer(
		grpc.UnaryInterceptor(s.intercept),
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2("proto")}),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		grpc.InitialWindowSize(windowBytes),
		grpc.InitialConnWindowSize(windowBytes),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.ConnectionTimeout(helloTimeout),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.InTapHandle(inPlace),
	)
	s.grpc.RegisterService(kvService(), s)
	kvpb.RegisterClusterServiceServer(s.grpc, s)
	kvpb.RegisterRaftServiceServer(s.grpc, nw)
	grpc_health_v1.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.published(n.status.latest.Load())
	n.status.onChange = s.published
	return s
}

// published follows the loop: it is called there.
func (s *server) published(p *published) {
	md := metadata.MD{}
	if p.leader != nil {
		md.Set(leaderMetadata, p.leader.Address)
	}
	s.leader.Store(&md)
	set := func(name string, ok bool) {
		s.health.SetServingStatus(name, oneOf(ok, grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING))
	}
	healthy := s.n.whyUnhealthy() == "" && !s.draining
	set(kvpb.KVService_ServiceDesc.ServiceName, healthy)
	set(restartHealth, !s.draining && s.n.whyNotRestart() == "")
}

// intercept names the leader in every answer, and lets stop wait for calls.
func (s *server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	s.inFlight.Add(1) // before it looks whether the node is stopping: stop looks the other way round
	defer s.inFlight.Add(-1)
	select {
	case <-s.stopping:
		err = errStopping
	default:
		switch req.(type) {
		case *kvpb.ListRequest: // get sees to its own, none other is large
			resp, err = admitted(ctx, func() (any, error) { return handler(ctx, req) })
		default:
			resp, err = handler(ctx, req)
		}
	}
	if err != nil {
		_ = grpc.SetTrailer(ctx, *s.leader.Load())
		return nil, toStatus(err, strings.HasPrefix(info.FullMethod, "/"+kvpb.KVService_ServiceDesc.ServiceName))
	}
	_ = grpc.SetHeader(ctx, *s.leader.Load())
	return resp, nil
}

// admitted makes an answer when there is room for it, and encodes it.
func admitted(ctx context.Context, f func() (any, error)) (any, error) {
	m, pool, err := admit(ctx, func() (proto.Message, int, error) {
		resp, err := f()
		if err != nil {
			return nil, 0, err
		}
		m := resp.(proto.Message)
		return m, proto.Size(m), nil
	})
	if err != nil {
		return nil, err
	}
	o := proto.MarshalOptions{UseCachedSize: true}
	b, err := o.MarshalAppend(make([]byte, 0, o.Size(m)), m)
	return &wireBytes{b, pool}, err
}

// margin is how long before its caller's deadline a call ends, so that the
// status and its reason get there: it is left so much time.
func margin(left time.Duration) time.Duration { return min(left/10, maxMargin) }

// waitOf is how long a call may take, in ticks of the loop, the one that has begun included;
// 0: there is no deadline, or it is too near to be told in ticks.
func (s *server) waitOf(ctx context.Context) uint64 {
	deadline, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	left := time.Until(deadline)
	if left -= margin(left); left < 2*s.n.tickDuration() {
		return 0
	}
	return s.n.ticksOf(left)
}

// stop hands leadership over, refuses new calls, and waits for those that run
// until ctx ends.
func (s *server) stop(ctx context.Context) {
	_ = s.n.do(ctx, func() error { s.draining = true; s.published(s.n.status.latest.Load()); return nil })
	s.handOver(ctx)
	close(s.stopping)
	for s.inFlight.Load() > 0 && ctx.Err() == nil {
		sleep(ctx, 5*time.Millisecond)
	}
}

// handOver makes another voter the leader, if this node leads and one can.
func (s *server) handOver(ctx context.Context) {
	n := s.n
	ctx, cancel := context.WithTimeout(ctx, 2*n.opts.election)
	defer cancel()
	_ = n.await(ctx, func() (bool, error) {
		voters := n.store.conf.GetVoters()
		if n.mayChange() {
			n.handOver(voters)
		}
		return n.raft.role != raft.StateLeader || len(n.heirs(voters)) == 0, nil
	})
}

// openView opens a view for as long as ctx: a linearizable one, unless local.
func (s *server) openView(ctx context.Context, local bool, open func(*store) *view) (*view, error) {
	if !local {
		if _, err := s.call(ctx, nil); err != nil {
			return nil, err
		}
	}
	var v *view
	err := s.n.do(ctx, func() error {
		if s.n.rn == nil {
			return errNotInitialized
		}
		v = open(s.n.store)
		context.AfterFunc(ctx, v.close) // even if nobody waits for it any more
		return nil
	})
	if err != nil {
		return nil, err // the loop may still call f
	}
	return v, nil
}

// List implements KVService.
func (s *server) List(ctx context.Context, req *kvpb.ListRequest) (*kvpb.ListResponse, error) {
	if req.Limit > maxListItems {
		return nil, invalid("limit", "it is %d, the limit is %d", req.Limit, maxListItems)
	}
	for field, v := range map[string]string{"prefix": req.Prefix, "page_token": req.PageToken} {
		if len(v) > maxKeyBytes {
			return nil, invalid(field, "it has %d bytes, the limit is %d", len(v), maxKeyBytes)
		}
	}
	select {
	case s.lists <- struct{}{}:
		defer func() { <-s.lists }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the view ends before the answer waits for room
	v, err := s.openView(ctx, req.Local, (*store).openKeys)
	if err != nil {
		return nil, err
	}
	items, more := v.page(req.Prefix, req.PageToken, int(cmp.Or(req.Limit, 1000)), maxListBytes)
	resp := &kvpb.ListResponse{}
	for _, it := range items {
		resp.Items = append(resp.Items, &kvpb.KeyValue{Key: string(it.key), Value: it.value, Version: it.version})
	}
	if more {
		resp.NextPageToken = string(items[len(items)-1].key)
	}
	return resp, nil
}

// unknown makes an unknown outcome one after which the write may be sent again,
// if it may. Its caller has time left.
func (o *kvOp) unknown(err error) error {
	if err == errOutcomeUnknown && (o.hasID || o.kind == opOpenSession) { // a second session does no harm
		return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, err.Error()+"; it may be sent again")
	}
	return err
}

// call takes a write, or with no record a read, through the loop.
func (s *server) call(ctx context.Context, record []byte) (result, error) {
	c := &call{record: record, wait: s.waitOf(ctx), done: make(chan outcome, 1)}
	if err := s.n.in.call(c); err != nil {
		return result{}, err
	}
	select {
	case o := <-c.done:
		return o.result, o.err
	case <-ctx.Done():
		if record == nil || c.state.CompareAndSwap(callQueued, callGivenUp) {
			return result{}, ctx.Err()
		}
		if ctx.Err() == context.Canceled {
			return result{}, apiError(codes.Canceled, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, errOutcomeUnknown.Error())
		}
		return result{}, errUnknownInTime
	}
}
