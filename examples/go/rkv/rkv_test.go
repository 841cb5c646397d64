package rkv

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"raft-key-value/kvpb"
)

// testLimit is generous: it says that something never happens.
const testLimit = 30 * time.Second

// fakeNode answers as a test says, and notes what it was asked.
type fakeNode struct {
	kvpb.UnimplementedKVServiceServer
	address string

	mu       sync.Mutex
	sets     []*kvpb.SetRequest
	sessions uint64
	gets     int
	scans    int
	watches  []*kvpb.WatchRequest

	set   func(n int, req *kvpb.SetRequest) (*kvpb.SetResponse, error) // of the nth Set, from 1 on
	get   func(n int) *kvpb.GetResponse
	watch func(n int, stream grpc.ServerStreamingServer[kvpb.WatchResponse]) error
}

func (f *fakeNode) OpenSession(context.Context, *kvpb.OpenSessionRequest) (*kvpb.OpenSessionResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions++
	return &kvpb.OpenSessionResponse{Session: 1000 + f.sessions}, nil
}

func (f *fakeNode) Set(_ context.Context, req *kvpb.SetRequest) (*kvpb.SetResponse, error) {
	f.mu.Lock()
	f.sets = append(f.sets, req)
	n := len(f.sets)
	f.mu.Unlock()
	return f.set(n, req)
}

func (f *fakeNode) Get(context.Context, *kvpb.GetRequest) (*kvpb.GetResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gets++
	return f.get(f.gets), nil
}

func (f *fakeNode) Scan(_ *kvpb.ScanRequest, stream grpc.ServerStreamingServer[kvpb.ScanResponse]) error {
	f.mu.Lock()
	f.scans++
	f.mu.Unlock()
	return stream.Send(&kvpb.ScanResponse{ClusterId: 7, Version: 10})
}

func (f *fakeNode) Watch(req *kvpb.WatchRequest, stream grpc.ServerStreamingServer[kvpb.WatchResponse]) error {
	f.mu.Lock()
	f.watches = append(f.watches, req)
	n := len(f.watches)
	f.mu.Unlock()
	return f.watch(n, stream)
}

func (f *fakeNode) start(t *testing.T) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.address = listener.Addr().String()
	server := grpc.NewServer()
	kvpb.RegisterKVServiceServer(server, f)
	serving := health.NewServer()
	serving.SetServingStatus("raftkv.v1.KVService", healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, serving)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-ended
	})
}

func (f *fakeNode) client(t *testing.T) *Client {
	t.Helper()
	f.start(t)
	c, err := Dial(Config{Nodes: []string{f.address}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// failure is an error as a node gives it.
func failure(code codes.Code, reason string) error {
	s, err := status.New(code, reason).WithDetails(
		&errdetails.ErrorInfo{Domain: "raftkv.v1", Reason: reason},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Millisecond)})
	if err != nil {
		return err
	}
	return s.Err()
}

// TestSet looks which errors of a Set are tried again, under the same request ID, and of which
// the caller is told that the outcome is unknown.
func TestSet(t *testing.T) {
	t.Parallel()
	broken := status.Error(codes.Unavailable, "the connection broke")
	quota := failure(codes.ResourceExhausted, "QUOTA")
	for name, test := range map[string]struct {
		errors      []error // of the first tries
		wantTries   int
		wantErr     bool
		wantUnknown bool
	}{
		"none":                 {nil, 1, false, false},
		"connection":           {[]error{broken}, 2, false, false},
		"no leader":            {[]error{failure(codes.Unavailable, "NO_LEADER")}, 2, false, false},
		"unknown":              {[]error{failure(codes.DeadlineExceeded, "OUTCOME_UNKNOWN")}, 2, false, false},
		"deadline":             {[]error{status.Error(codes.DeadlineExceeded, "")}, 2, false, false},
		"overloaded":           {[]error{failure(codes.ResourceExhausted, "OVERLOADED")}, 2, false, false},
		"quota":                {[]error{quota}, 1, true, false},
		"unknown and quota":    {[]error{failure(codes.Unavailable, "OUTCOME_UNKNOWN"), quota}, 2, true, true},
		"connection and quota": {[]error{broken, quota}, 2, true, true},
		"no leader and quota":  {[]error{failure(codes.Unavailable, "NO_LEADER"), quota}, 2, true, false},
		"too large":            {[]error{status.Error(codes.ResourceExhausted, "")}, 1, true, false},
		"invalid":              {[]error{failure(codes.InvalidArgument, "INVALID_FIELD")}, 1, true, false},
		"session":              {[]error{failure(codes.FailedPrecondition, "SESSION_UNKNOWN")}, 1, true, true},
		"too old":              {[]error{failure(codes.FailedPrecondition, "SEQUENCE_TOO_OLD")}, 1, true, true},
		"too far":              {[]error{failure(codes.FailedPrecondition, "SEQUENCE_TOO_FAR")}, 1, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &fakeNode{set: func(n int, _ *kvpb.SetRequest) (*kvpb.SetResponse, error) {
				if n <= len(test.errors) {
					return nil, test.errors[n-1]
				}
				return &kvpb.SetResponse{Version: 5}, nil
			}}
			ctx, cancel := context.WithTimeout(t.Context(), testLimit)
			defer cancel()
			session := f.client(t).NewSession()
			version, done, err := session.Set(ctx, "key", []byte("value"), Always())
			if (err != nil) != test.wantErr || errors.Is(err, ErrOutcomeUnknown) != test.wantUnknown {
				t.Errorf("the error is %v", err)
			}
			if err == nil && (version != 5 || !done) {
				t.Errorf("version %d, done %v", version, done)
			}
			if len(f.sets) != test.wantTries {
				t.Errorf("%d tries, want %d", len(f.sets), test.wantTries)
			}
			for _, req := range f.sets {
				if req.RequestId.GetSession() != 1001 || req.RequestId.GetSequence() != 1 {
					t.Errorf("a try has the request ID %v", req.RequestId)
				}
			}
		})
	}
}

// TestSessionIsReplaced looks that a session that the cluster does not know, or will not have go
// on, is replaced for the next write, and no other one is.
func TestSessionIsReplaced(t *testing.T) {
	t.Parallel()
	for reason, want := range map[string][2]uint64{ // session and sequence of the second write
		"SESSION_UNKNOWN":  {1002, 1},
		"SEQUENCE_TOO_OLD": {1002, 1},
		"SEQUENCE_TOO_FAR": {1002, 1},
		"INVALID_FIELD":    {1001, 2},
	} {
		f := &fakeNode{set: func(n int, _ *kvpb.SetRequest) (*kvpb.SetResponse, error) {
			if n == 1 {
				return nil, failure(codes.FailedPrecondition, reason)
			}
			return &kvpb.SetResponse{Version: 5}, nil
		}}
		session := f.client(t).NewSession()
		ctx, cancel := context.WithTimeout(t.Context(), testLimit)
		defer cancel()
		_, _, first := session.Set(ctx, "key", nil, Always())
		_, _, second := session.Set(ctx, "key", nil, Always())
		if first == nil || second != nil {
			t.Errorf("%s: %v, %v", reason, first, second)
		}
		id := f.sets[1].RequestId
		if id.Session != want[0] || id.Sequence != want[1] {
			t.Errorf("%s: the next write has the request ID %v", reason, id)
		}
	}
}

// TestUpdate looks that an update whose compare failed reads the key again.
func TestUpdate(t *testing.T) {
	t.Parallel()
	f := &fakeNode{
		get: func(n int) *kvpb.GetResponse {
			if n == 1 {
				return &kvpb.GetResponse{}
			}
			return &kvpb.GetResponse{Value: []byte("a"), Version: 3}
		},
		set: func(n int, _ *kvpb.SetRequest) (*kvpb.SetResponse, error) {
			if n == 1 {
				return &kvpb.SetResponse{CompareFailed: true, Version: 3}, nil
			}
			return &kvpb.SetResponse{Version: 4}, nil
		},
	}
	ctx, cancel := context.WithTimeout(t.Context(), testLimit)
	defer cancel()
	value, err := f.client(t).NewSession().Update(ctx, "key", func(old []byte) ([]byte, error) {
		return append(slices.Clone(old), 'b'), nil
	})
	if err != nil || string(value.Data) != "ab" || value.Version != 4 {
		t.Errorf("%q of version %d, %v", value.Data, value.Version, err)
	}
	for i, want := range []uint64{0, 3} {
		req := f.sets[i]
		if req.ExpectedVersion == nil || *req.ExpectedVersion != want || req.RequestId.Sequence != uint64(i+1) {
			t.Errorf("Set %d is %v", i+1, req)
		}
	}
}

// follow follows nodes until a version has been told. It returns the versions of all events, 0 for
// each beginning.
func follow(t *testing.T, until uint64, nodes ...*fakeNode) (told []uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testLimit)
	defer cancel()
	var c Config
	for _, n := range nodes {
		c.Nodes = append(c.Nodes, n.address)
	}
	err := Follow(ctx, c, Follower{
		Begin: func([]*kvpb.KeyValue, uint64) { told = append(told, 0) },
		Change: func(events []*kvpb.Event) {
			for _, e := range events {
				told = append(told, e.Version)
				if e.Version == until {
					cancel()
				}
			}
		},
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("it was told of %v: %v", told, err)
	}
	return told
}

// tell sends the first response to a Watch, and some versions.
func tell(stream grpc.ServerStreamingServer[kvpb.WatchResponse], versions ...uint64) {
	_ = stream.Send(&kvpb.WatchResponse{ClusterId: 7, Version: 10})
	for _, v := range versions {
		_ = stream.Send(&kvpb.WatchResponse{Version: v, Events: []*kvpb.Event{{Key: "key", Version: v}}})
	}
}

// TestFollow looks where a follower goes on, or begins anew, after each end of a Watch.
func TestFollow(t *testing.T) {
	t.Parallel()
	broken := status.Error(codes.Unavailable, "the connection broke")
	compacted := failure(codes.OutOfRange, "COMPACTED")
	for name, test := range map[string]struct {
		ends []error // of the first watches, each of which tells of a version before
		want []uint64
	}{
		"broken":       {[]error{broken, broken}, []uint64{0, 11, 12, 13}},
		"overloaded":   {[]error{failure(codes.ResourceExhausted, "OVERLOADED")}, []uint64{0, 11, 12}},
		"restored":     {[]error{failure(codes.FailedPrecondition, "OTHER_CLUSTER")}, []uint64{0, 11, 0, 12}},
		"ended":        {[]error{nil}, []uint64{0, 11, 12}},
		"too slow":     {[]error{compacted}, []uint64{0, 11, 0, 12}},
		"silent":       {[]error{context.Canceled}, []uint64{0, 11, 12}},
		"went on once": {[]error{broken, compacted}, []uint64{0, 11, 12, 0, 13}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &fakeNode{watch: func(n int, stream grpc.ServerStreamingServer[kvpb.WatchResponse]) error {
				tell(stream, uint64(10+n))
				isSilent := n > len(test.ends) || errors.Is(test.ends[n-1], context.Canceled)
				if isSilent {
					<-stream.Context().Done()
					return nil
				}
				return test.ends[n-1]
			}}
			f.start(t)
			told := follow(t, uint64(11+len(test.ends)), f)
			if !slices.Equal(told, test.want) {
				t.Errorf("it was told of %v, want %v", told, test.want)
			}
			from := uint64(11)
			for i, req := range f.watches {
				if req.FromVersion != from || req.ClusterId != 7 {
					t.Errorf("watch %d is %v, want it from %d", i+1, req, from)
				}
				from++
				begins := i < len(test.ends) && slices.Contains([]string{"COMPACTED", "OTHER_CLUSTER"}, reason(test.ends[i]))
				if begins {
					from = 11
				}
			}
		})
	}
}

// TestFollowAsksAll looks that a follower begins anew only if no node knows what comes next.
func TestFollowAsksAll(t *testing.T) {
	t.Parallel()
	forgetful := func(_ int, stream grpc.ServerStreamingServer[kvpb.WatchResponse]) error {
		return failure(codes.OutOfRange, "COMPACTED")
	}
	a, b := &fakeNode{watch: forgetful}, &fakeNode{watch: forgetful}
	c := &fakeNode{watch: func(n int, stream grpc.ServerStreamingServer[kvpb.WatchResponse]) error {
		tell(stream, uint64(10+n))
		if n == 2 {
			<-stream.Context().Done()
		}
		return status.Error(codes.Unavailable, "the connection broke")
	}}
	for _, f := range []*fakeNode{a, b, c} {
		f.start(t)
	}
	if told := follow(t, 12, a, b, c); !slices.Equal(told, []uint64{0, 11, 12}) {
		t.Errorf("it was told of %v", told)
	}
}

// TestFollowRefused looks that a follower ends if it may not follow.
func TestFollowRefused(t *testing.T) {
	t.Parallel()
	f := &fakeNode{watch: func(int, grpc.ServerStreamingServer[kvpb.WatchResponse]) error {
		return failure(codes.PermissionDenied, "PERMISSION_DENIED")
	}}
	f.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), testLimit)
	defer cancel()
	err := Follow(ctx, Config{Nodes: []string{f.address}}, Follower{Begin: func([]*kvpb.KeyValue, uint64) {}})
	if reason(err) != "PERMISSION_DENIED" {
		t.Error(err)
	}
}
