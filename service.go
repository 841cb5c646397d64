// The gRPC services that clients and operators call.

package main

import (
	"cmp"
	"context"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the codec that ours is made of
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// maxListItems and maxListBytes bound a page of List: what it takes of memory, and
	// of time in which it holds one of maxLists. A request that has no limit gets
	// defaultListItems.
	maxListItems     = 10_000
	maxListBytes     = 1 << 20
	defaultListItems = 1000
	// maxBackups bounds the backups that a node sends at a time: each makes it
	// keep what is overwritten meanwhile.
	maxBackups = 4
	// maxLists bounds the Lists that run at a time: each passes over up to maxListItems
	// keys, so more would take more cores from the loop.
	maxLists = 2
	// maxMembers bounds a cluster, and with it what a request may name, and the
	// connections and files of peers: peerFiles for each.
	maxMembers = 64
	// maxAddressBytes bounds the address of a node.
	maxAddressBytes = 256
	// maxStreamsPerConnection bounds the calls that run on one connection: enough for a
	// proxy with many callers. A connection that has so many costs 20 MiB of goroutines.
	maxStreamsPerConnection = 1024
	// streamWorkers keep their stacks from call to call, 8 MiB of them: a new
	// goroutine grows its own first. Calls beyond them get new ones.
	streamWorkers = 1024
	// maxHeaderBytes bounds the metadata of a call, which is for traces and tokens;
	// gRPC has it in memory before it looks at the call.
	maxHeaderBytes = 8 << 10
	// minPingPause is the least time between two pings of a client. gRPC closes a connection
	// whose third ping in a row came sooner; what the node sends in between pardons them.
	// Clients may ping every 5 s: less than that by what the network delays one ping more
	// than the next.
	minPingPause = 3 * time.Second
	// adminTimeout bounds requests of ClusterService that have no deadline: callers
	// who left it out wait no longer for a node that does not catch up.
	adminTimeout = time.Minute
	// maxMargin bounds how long before its caller's deadline a call ends.
	maxMargin = 100 * time.Millisecond

	leaderMetadata = "x-raft-leader"
	// restartHealth is the health name that says: this node may be restarted.
	restartHealth = "raftkv.v1.restart"
)

// server is what a node offers by gRPC: KVService here and in pipeline.go,
// ClusterService, health and reflection.
type server struct {
	kvpb.UnimplementedKVServiceServer
	kvpb.UnimplementedClusterServiceServer
	n            *node
	net          *network
	certificates *certificates // for TLS; nil: there is none
	limiter      *limiter      // of the connections; set before there are any
	grpc         *grpc.Server
	health       *health.Server
	// leaderMD names the leader's address as x-raft-leader; it is empty while none is
	// known. The loop sets it, calls read it.
	leaderMD atomic.Pointer[metadata.MD]

	backups atomic.Int32 // that run
	scans   runningScans
	lists   chan struct{} // full while maxLists run

	watchers *watchers

	surveying chan struct{} // full while an Init asks members, or another founder
	adding    chan struct{} // full while an Init adds members

	draining bool          // the loop's: no more new calls are wanted
	stopping chan struct{} // closed by stop
	inFlight atomic.Int64  // unary calls of all services

	methods     map[string]*methodCounts // by "/", service, "/" and method; constant once the server is made
	operations  operationCounts          // of Pipelines
	queueIsFull atomic.Uint64            // calls that found the inbox full
	refused     atomic.Uint64            // calls whose callers may not make them
	refusalLog  rareLog
	slowCalls   slowLog
	joinLog     rareLog
}

func newServer(n *node, nw *network, c *certificates) *server {
	s := &server{
		n:            n,
		net:          nw,
		certificates: c,
		health:       health.NewServer(),
		stopping:     make(chan struct{}),
		lists:        make(chan struct{}, maxLists),
		methods:      map[string]*methodCounts{},
		watchers:     newWatchers(n.store.history),
		scans:        runningScans{limit: n.opts.part(maxScans, 2)},
		surveying:    make(chan struct{}, 1),
		adding:       make(chan struct{}, 1),
	}
	s.watchers.limit = n.opts.part(maxWatchers, 16)
	transport := insecure.NewCredentials()
	if c != nil {
		transport = serverCredentials{}
	}
	pings := keepalive.EnforcementPolicy{MinTime: minPingPause, PermitWithoutStream: true}
	s.grpc = grpc.NewServer(
		grpc.Creds(transport),
		grpc.UnaryInterceptor(s.intercept),
		grpc.StreamInterceptor(s.interceptStream),
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2("proto")}),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		grpc.InitialWindowSize(windowBytes),
		grpc.InitialConnWindowSize(connWindowBytes),
		grpc.KeepaliveEnforcementPolicy(pings),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.ConnectionTimeout(helloTimeout),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.InTapHandle(s.admitCall),
	)
	services := guarded{s.grpc, s}
	kvpb.RegisterKVServiceServer(services, s)
	kvpb.RegisterClusterServiceServer(services, s)
	grpc_health_v1.RegisterHealthServer(services, s.health)
	reflection.Register(services)
	kvpb.RegisterRaftServiceServer(services, raftService{nw, s})
	s.onPublish(n.status.latest.Load())
	n.status.onChange = s.onPublish
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.start(func() { s.watchers.run(nw.ctx.Done()) })
	return s
}

// guarded registers services that guard has taken in hand.
type guarded struct {
	*grpc.Server
	s *server
}

// RegisterService implements grpc.ServiceRegistrar.
func (g guarded) RegisterService(desc *grpc.ServiceDesc, impl any) {
	g.Server.RegisterService(g.s.guard(desc), impl)
}

// Get implements KVService.
func (s *server) Get(ctx context.Context, req *kvpb.GetRequest) (*kvpb.GetResponse, error) {
	key := []byte(req.Key)
	if err := checkKey(key); err != nil {
		return nil, err
	}
	if hasUnknownFields(req) {
		return nil, errUnknownField
	}
	if err := s.awaitRead(ctx, req.Local, req.MinVersion); err != nil {
		return nil, err
	}
	it, found, err := s.n.store.get(key)
	if err != nil {
		return nil, err
	}
	resp := &kvpb.GetResponse{Version: it.version}
	if found {
		resp.Value = present(it.value)
	}
	return resp, nil
}

// Set implements KVService.
func (s *server) Set(ctx context.Context, req *kvpb.SetRequest) (*kvpb.SetResponse, error) {
	r, err := s.write(ctx, opSet, req)
	if err != nil {
		return nil, err
	}
	return &kvpb.SetResponse{Version: r.version, CompareFailed: r.compareFailed}, nil
}

// Delete implements KVService.
func (s *server) Delete(ctx context.Context, req *kvpb.DeleteRequest) (*kvpb.DeleteResponse, error) {
	r, err := s.write(ctx, opDelete, req)
	if err != nil {
		return nil, err
	}
	return &kvpb.DeleteResponse{Deleted: r.found, Version: r.version, CompareFailed: r.compareFailed}, nil
}

// DeleteRange implements KVService.
func (s *server) DeleteRange(ctx context.Context, req *kvpb.DeleteRangeRequest) (*kvpb.DeleteRangeResponse, error) {
	r, err := s.write(ctx, opDeleteRange, req)
	if err != nil {
		return nil, err
	}
	return &kvpb.DeleteRangeResponse{Deleted: uint64(r.deleted), Version: r.version, TooMany: r.tooMany}, nil
}

// OpenSession implements KVService.
func (s *server) OpenSession(ctx context.Context, req *kvpb.OpenSessionRequest) (*kvpb.OpenSessionResponse, error) {
	if hasUnknownFields(req) {
		return nil, errUnknownField
	}
	open := &kvpb.NewSession{Session: randomID(), Owner: ownerOf(callerOf(ctx))}
	if _, err := s.write(ctx, opNewSession, open); err != nil {
		return nil, err
	}
	return &kvpb.OpenSessionResponse{Session: open.Session}, nil
}

// List implements KVService.
func (s *server) List(ctx context.Context, req *kvpb.ListRequest) (*kvpb.ListResponse, error) {
	if err := s.awaitList(ctx, req); err != nil {
		return nil, err
	}
	ctx, cancel := beforeDeadline(ctx)
	defer cancel()
	select {
	case s.lists <- struct{}{}:
		defer func() { <-s.lists }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	v, err := s.n.store.openPage()
	if err != nil {
		return nil, err
	}
	defer v.close()
	r := rangeOf(req.Prefix, req.Start, req.End).after([]byte(req.PageToken))
	page := v.page
	if req.KeysOnly {
		page = v.pageOfKeys
	}
	items, more, err := page(r, cmp.Or(int(req.Limit), defaultListItems), maxListBytes)
	if err != nil {
		return nil, err
	}
	resp := &kvpb.ListResponse{Items: keyValues(items, req.KeysOnly), Version: v.version}
	if more {
		resp.NextPageToken = string(items[len(items)-1].key)
	}
	return resp, nil
}

// awaitList waits until a List may begin.
func (s *server) awaitList(ctx context.Context, req *kvpb.ListRequest) error {
	if err := checkList(req); err != nil {
		return err
	}
	soon, cancel := beforeDeadline(ctx)
	defer cancel()
	return s.awaitRead(soon, req.Local, req.MinVersion)
}

func checkList(req *kvpb.ListRequest) error {
	if hasUnknownFields(req) {
		return errUnknownField
	}
	if req.Limit > maxListItems {
		return invalid("limit", "it is %d, the limit is %d", req.Limit, maxListItems)
	}
	if len(req.PageToken) > maxKeyBytes {
		return invalid("page_token", "it has %d bytes, the limit is %d", len(req.PageToken), maxKeyBytes)
	}
	return checkRange(req.Prefix, req.Start, req.End)
}

// keyValues makes items those of an answer.
func keyValues(items []keyItem, keysOnly bool) []*kvpb.KeyValue {
	answer := make([]*kvpb.KeyValue, len(items))
	for i, it := range items {
		answer[i] = &kvpb.KeyValue{Key: string(it.key), Version: it.version}
		if !keysOnly {
			answer[i].Value = it.value
		}
	}
	return answer
}

// write takes a request through the log, as the field of kvpb.Write whose number is kind.
// The parser of the log checks it, and so refuses fields which this node does not know,
// too.
func (s *server) write(ctx context.Context, kind protowire.Number, req proto.Message) (result, error) {
	encoded, err := encodeAsWrite(kind, req)
	if err != nil {
		return result{}, err
	}
	var o operation
	if err := o.parseWrite(encoded); err != nil {
		return result{}, err
	}
	r, err := s.call(ctx, &call{write: encoded})
	if err != nil {
		return result{}, o.sayIfRepeatable(err)
	}
	return r, nil
}

// confirmRead waits until this node has applied every write that was acknowledged
// before the call: a read of its store is linearizable then (Raft thesis, section 6.4).
func (s *server) confirmRead(ctx context.Context) error {
	_, err := s.call(ctx, &call{})
	return err
}

// awaitRead waits until a read may begin: a linearizable one, or a local one that waits for
// a version.
func (s *server) awaitRead(ctx context.Context, local bool, minVersion uint64) error {
	if err := checkMinVersion(local, minVersion); err != nil {
		return err
	}
	if !local {
		return s.confirmRead(ctx)
	}
	if minVersion == 0 {
		return nil
	}
	_, err := s.call(ctx, &call{minVersion: minVersion})
	return err
}

// call takes a call through the loop, and waits until it has ended, or ctx has, or is about
// to: the loop may be waiting for the disk.
func (s *server) call(ctx context.Context, c *call) (result, error) {
	c.wait = s.ticksLeft(ctx)
	c.done = make(chan outcome, 1)
	if err := s.n.inbox.call(c); err != nil {
		if err == errOverloaded {
			s.queueIsFull.Add(1)
		}
		return result{}, err
	}
	var late <-chan time.Time // nil, which never fires, without a deadline
	if deadline, ok := ctx.Deadline(); ok {
		timer := time.NewTimer(time.Until(earlier(deadline))) // costs less than a context
		defer timer.Stop()
		late = timer.C
	}
	select {
	case o := <-c.done:
		return o.result, o.err
	case <-late:
	case <-ctx.Done():
	}
	notProposed := c.state.CompareAndSwap(callQueued, callGivenUp) // a read never is
	if notProposed {
		return result{}, cmp.Or(ctx.Err(), context.DeadlineExceeded)
	}
	if ctx.Err() == context.Canceled {
		unknown := kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN
		return result{}, apiError(codes.Canceled, unknown, errOutcomeUnknown.Error())
	}
	return result{}, errUnknownInTime
}

// openBackup opens a view of the whole state for as long as ctx.
func (s *server) openBackup(ctx context.Context) (*view, error) {
	if err := s.confirmRead(ctx); err != nil {
		return nil, err
	}
	var v *view
	err := s.n.do(ctx, func() error {
		if s.n.rn == nil {
			return errNotInitialized
		}
		v = s.n.store.openBackup()
		context.AfterFunc(ctx, v.close) // even if nobody waits for the view any more
		return nil
	})
	if err != nil {
		return nil, err // the loop may still set v
	}
	return v, nil
}

// margin is how long before its caller's deadline a call ends, if so much time is
// left: so that its status and its reason get there.
func margin(left time.Duration) time.Duration { return min(left/10, maxMargin) }

// earlier is when what waits outside of the loop ends, for a caller's deadline: half a
// margin before it. The loop ends its calls before that, and knows more about why.
func earlier(deadline time.Time) time.Time {
	return deadline.Add(-margin(time.Until(deadline)) / 2)
}

// beforeDeadline is ctx, but ends a little before its deadline, if it has one.
func beforeDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		return context.WithDeadline(ctx, earlier(deadline))
	}
	return context.WithCancel(ctx)
}

// ticksLeft is how long a call may take, in ticks of the loop, the one that has begun
// included; 0: there is no deadline, or it is too near to be told in ticks.
func (s *server) ticksLeft(ctx context.Context) uint64 {
	deadline, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	left := time.Until(deadline)
	left -= margin(left)
	if left < 2*s.n.tickDuration() {
		return 0
	}
	return s.n.ticksOf(left)
}

// nameLeader names the leader in the header of a success, or in the trailer of an error.
func (s *server) nameLeader(ctx context.Context, success bool) {
	leader := *s.leaderMD.Load()
	if success {
		_ = grpc.SetHeader(ctx, leader) // fails only if the call has ended
		return
	}
	_ = grpc.SetTrailer(ctx, leader)
}

// answer has a call's method answer it. What may be large has to wait for room, for it stays
// in memory for as long as its caller does not read it.
func (s *server) answer(ctx context.Context, req any, handler grpc.UnaryHandler) (any, error) {
	select {
	case <-s.stopping:
		return nil, errStopping
	default:
	}
	if list, ok := req.(*kvpb.ListRequest); ok {
		if err := s.awaitList(ctx, list); err != nil { // not in the place of an answer
			return nil, err
		}
		confirmed := proto.CloneOf(list)
		confirmed.Local = true
		confirmed.MinVersion = 0
		return answerWhole(ctx, smallAnswer+1, func() (any, error) { return handler(ctx, confirmed) })
	}
	resp, err := handler(ctx, req)
	if err != nil {
		return nil, err
	}
	bytes := proto.Size(resp.(proto.Message))
	if bytes <= uncountedAnswer {
		return resp, nil
	}
	get, ok := req.(*kvpb.GetRequest)
	if !ok {
		return answerWhole(ctx, bytes, func() (any, error) { return resp, nil })
	}
	// This answer is dropped: while it waited, it would keep a value that others
	// overwrite. The read is confirmed: what this node has by then is new enough.
	confirmed := &kvpb.GetRequest{Key: get.Key, Local: true}
	return answerWhole(ctx, bytes, func() (any, error) { return handler(ctx, confirmed) })
}

// answerWhole has f make an answer once there is room for so many bytes, and encodes it. If it
// has become larger meanwhile, it is made again once there is room for that: else those that wait
// while their key grows would take more than there is.
func answerWhole(ctx context.Context, bytes int, f func() (any, error)) (any, error) {
	c := connOf(ctx)
	for {
		a, err := c.l.answers.admit(ctx, sharer{conn: c}, bytes)
		if err != nil {
			return nil, whyNoRoom(ctx, err)
		}
		resp, err := f()
		if err != nil {
			a.Put(nil)
			return nil, err
		}
		m := resp.(proto.Message)
		has := bytes
		bytes = proto.Size(m)
		hasGrown := bytes > has && has <= smallAnswer // a large one has room for any
		if hasGrown {
			a.Put(nil)
			continue
		}
		a.fit(max(bytes, leastCounted))
		return a.encode(m)
	}
}

// onPublish follows what the loop publishes. The loop calls it.
func (s *server) onPublish(p *published) {
	md := metadata.MD{}
	if p.leader != nil {
		md.Set(leaderMetadata, p.leader.Address)
	}
	s.leaderMD.Store(&md)
	s.watchers.follow(p, s.draining)
	s.setServing(kvpb.KVService_ServiceDesc.ServiceName, s.n.whyUnhealthy() == "" && !s.draining)
	s.setServing(restartHealth, s.n.whyNotRestart() == "" && !s.draining)
}

// setServing sets the status of a name of the health service.
func (s *server) setServing(name string, serving bool) {
	is := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if serving {
		is = grpc_health_v1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus(name, is)
}

// stop hands leadership over, refuses new calls, and waits for those that run
// until ctx ends.
func (s *server) stop(ctx context.Context) {
	_ = s.n.do(ctx, func() error { // fails only if the loop has ended, or ctx
		s.draining = true
		s.onPublish(s.n.status.latest.Load())
		return nil
	})
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
		return n.raft.role != raft.StateLeader || len(n.leaderState().successors(voters)) == 0, nil
	})
}
