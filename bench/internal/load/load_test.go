package load

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// TestMain makes the test the echo process, too.
func TestMain(m *testing.M) {
	if served, _ := ServeEcho(os.Args[1:]); !served {
		os.Exit(m.Run())
	}
}

// TestEcho starts the echo process, calls it, and ends it.
func TestEcho(t *testing.T) {
	e, err := StartEcho(10, Identity{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Stop()
	if d, err := e.PingPong(); err != nil || d <= 0 {
		t.Errorf("%v, %v", d, err)
	}
	k, err := DialKV([]string{e.RPC}, 1, Identity{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.OpenSessions(t.Context(), 2); err != nil {
		t.Error(err)
	}
	if err := k.Do(t.Context(), 1, Operation{Set: true, Key: "k", Value: Value(10)}); err != nil {
		t.Error(err)
	}
	if r, err := k.stubs[0].Get(t.Context(), &kvpb.GetRequest{Key: "k"}); err != nil || len(r.Value) != 10 {
		t.Errorf("%v, %v", r, err)
	}
	e.Stop()
	if e.cmd.ProcessState == nil || !e.cmd.ProcessState.Success() {
		t.Errorf("the process ended: %v", e.cmd.ProcessState)
	}
}

// targetFunc is a target that is a function.
type targetFunc func(client int, op Operation) error

func (f targetFunc) Do(_ context.Context, client int, op Operation) error { return f(client, op) }

// TestClosedLoop runs on a fake clock: each client's next operation follows
// its last.
func TestClosedLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inFlight, most atomic.Int64
		target := targetFunc(func(int, Operation) error {
			most.Store(max(most.Load(), inFlight.Add(1)))
			time.Sleep(10 * time.Millisecond)
			inFlight.Add(-1)
			return nil
		})
		r, err := Run(t.Context(), Options{Clients: 3, Depth: 2, Warmup: time.Second, Duration: 10 * time.Second, SetShare: 1, Keys: 1, KeySize: 7}, target)
		if err != nil || r.Throughput() != 600 || most.Load() != 6 || r.Latency.Count() != 6000 || r.Latency.Max() != 10*time.Millisecond || r.Failed() != 0 {
			t.Errorf("%v/s, %d in flight, %d latencies to %v, errors %v, %v", r.Throughput(), most.Load(), r.Latency.Count(), r.Latency.Max(), r.Errors, err)
		}
	})
}

// fakeTimer makes a pacer sleep on a fake clock: a real timer is none.
func fakeTimer(t *testing.T) {
	old := sleep
	sleep = func(_ *timer, d time.Duration) { time.Sleep(d) }
	t.Cleanup(func() { sleep = old })
}

// TestRate stalls a target for a second: what was due meanwhile waited, and
// its latency says so.
func TestRate(t *testing.T) {
	fakeTimer(t)
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		target := targetFunc(func(int, Operation) error {
			if at := time.Since(start); at >= 2*time.Second && at < 3*time.Second {
				time.Sleep(3*time.Second - at)
			}
			return nil
		})
		r, err := Run(t.Context(), Options{Clients: 4, Depth: 1, Rate: 1000, Warmup: time.Second, Duration: 4 * time.Second, Keys: 1, KeySize: 7}, target)
		if err != nil || r.Operations != 4000 || r.Latency.Count() != 4000 || r.Unsent != 0 {
			t.Fatalf("%d operations, %d latencies, %d unsent, %v", r.Operations, r.Latency.Count(), r.Unsent, err)
		}
		if r.Latency.Max() != time.Second {
			t.Errorf("the longest took %v", r.Latency.Max())
		}
		// A quarter of the operations waited, for half a second in the middle.
		if q := r.Latency.Quantile(.875); q < 490*time.Millisecond || q > 510*time.Millisecond || r.Latency.Quantile(.74) != 0 {
			t.Errorf("quantiles: %v, %v", r.Latency.Quantile(.74), q)
		}
	})
}

// TestRateTooHigh asks for more than the target can do: what could not be sent
// counts as late.
func TestRateTooHigh(t *testing.T) {
	fakeTimer(t)
	synctest.Test(t, func(t *testing.T) {
		target := targetFunc(func(int, Operation) error { time.Sleep(100 * time.Millisecond); return nil })
		r, err := Run(t.Context(), Options{Clients: 10, Depth: 1, Rate: 1000, Duration: 10 * time.Second, Keys: 1, KeySize: 7}, target)
		if err != nil || r.Throughput() < 99 || r.Throughput() > 100 {
			t.Errorf("%v/s, %v", r.Throughput(), err)
		}
		if sent := 10_000 - r.Unsent; sent < 1100 || sent > 1120 || r.Latency.Count() != 10_000 {
			t.Errorf("%d sent, %d unsent, %d latencies", sent, r.Unsent, r.Latency.Count())
		}
		if q := r.Latency.Quantile(.5); q < 5*time.Second || q > 7*time.Second {
			t.Errorf("the median is %v", q)
		}
	})
}

// TestTimer sleeps for real, not less than it should.
func TestTimer(t *testing.T) {
	timer, err := newTimer()
	if err != nil {
		t.Fatal(err)
	}
	defer timer.close()
	for range 3 {
		start := time.Now()
		timer.sleep(200 * time.Microsecond)
		if d := time.Since(start); d < 200*time.Microsecond {
			t.Errorf("slept %v", d)
		}
	}
}

// TestErrors counts errors by code and reason, and no throughput.
func TestErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		unavailable := resultError(&kvpb.OperationResult{Result: &kvpb.OperationResult_Error{Error: &kvpb.OperationError{Code: int32(codes.Unavailable), Reason: kvpb.ErrorReason_ERROR_REASON_NO_LEADER}}})
		errs := []error{unavailable, status.Error(codes.DeadlineExceeded, ""), ErrAbsent, errors.New("?")}
		var n atomic.Int64
		target := targetFunc(func(client int, _ Operation) error { n.Add(1); time.Sleep(time.Millisecond); return errs[client] })
		r, err := Run(t.Context(), Options{Clients: 4, Depth: 1, Duration: time.Second, Keys: 1, KeySize: 7}, target)
		if err != nil || r.Operations != 0 || r.Failed() != 4*91 || n.Load() != 4*91 || r.Latency.Count() != 0 {
			t.Errorf("%d operations, %d calls, errors %v, %v", r.Operations, n.Load(), r.Errors, err)
		}
		if s := Errors(r.Errors); s != "ABSENT: 91, DEADLINE_EXCEEDED: 91, UNAVAILABLE NO_LEADER: 91, UNKNOWN: 91" {
			t.Error(s)
		}
	})
}

// TestCancel ends a run.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		time.AfterFunc(time.Second, cancel)
		target := targetFunc(func(int, Operation) error { time.Sleep(time.Millisecond); return nil })
		start := time.Now()
		if _, err := Run(ctx, Options{Clients: 2, Depth: 1, Duration: time.Minute, Keys: 1, KeySize: 7}, target); err != context.Canceled || time.Since(start) > 2*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// TestOperations checks what is chosen: keys from all the space, and the share
// of sets.
func TestOperations(t *testing.T) {
	for share, wantSets := range map[float64]int{0: 0, .25: 250, 1: 1000} {
		r := &run{Options: Options{SetShare: share, Keys: 20, KeySize: 9, Value: []byte("x")}}
		keys, sets := map[string]bool{}, 0
		rng := testRand()
		for range 1000 {
			op, _ := r.operation(rng)
			keys[op.Key] = true
			if op.Set {
				sets++
			}
			if op.Set != (op.Value != nil) {
				t.Fatalf("%+v", op)
			}
		}
		if len(keys) != 20 || !keys["bench-000"] || !keys["bench-013"] || sets < wantSets-50 || sets > wantSets+50 {
			t.Errorf("share %v: %d keys, %d sets", share, len(keys), sets)
		}
	}
	var next atomic.Uint64
	next.Store(20)
	r := &run{Options: Options{SetShare: 1, Keys: 20, KeySize: 8, Next: &next}}
	for i := range uint64(100) {
		if op, ok := r.operation(testRand()); !ok || !op.Set || op.Key != Key(20+i, 8) {
			t.Fatalf("new key %d: %+v, %v", i, op, ok)
		}
	}
	if k := Key(0xabc, 16); k != "bench-0000000abc" {
		t.Error(k)
	}
}

// memory is a KVService that keeps what it is told.
type memory struct {
	echo
	mu       sync.Mutex
	values   map[string][]byte
	ids      map[string]int // request ids: how often each was seen
	sessions uint64
	refuse   bool // every third operation in a pipeline
}

func (m *memory) Set(_ context.Context, r *kvpb.SetRequest) (*kvpb.SetResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.values[r.Key] = r.Value
	if r.RequestId != nil {
		m.ids[fmt.Sprintf("%d/%d", r.RequestId.Session, r.RequestId.Sequence)]++
	}
	return &kvpb.SetResponse{}, nil
}

func (m *memory) Get(_ context.Context, r *kvpb.GetRequest) (*kvpb.GetResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &kvpb.GetResponse{Value: m.values[r.Key]}, nil
}

func (m *memory) OpenSession(context.Context, *kvpb.OpenSessionRequest) (*kvpb.OpenSessionResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sessions++
	return &kvpb.OpenSessionResponse{Session: m.sessions}, nil
}

func (m *memory) Pipeline(s kvpb.KVService_PipelineServer) error {
	for n := 0; ; {
		req, err := s.Recv()
		if err != nil {
			return nil
		}
		resp := &kvpb.PipelineResponse{}
		for _, op := range req.Operations {
			n++
			switch op := op.Operation.(type) {
			case *kvpb.Operation_Set:
				r, _ := m.Set(s.Context(), op.Set)
				resp.Results = append(resp.Results, &kvpb.OperationResult{Result: &kvpb.OperationResult_Set{Set: r}})
			case *kvpb.Operation_Get:
				r, _ := m.Get(s.Context(), op.Get)
				resp.Results = append(resp.Results, &kvpb.OperationResult{Result: &kvpb.OperationResult_Get{Get: r}})
			}
			if m.refuse && n%3 == 0 {
				resp.Results[len(resp.Results)-1] = &kvpb.OperationResult{Result: &kvpb.OperationResult_Error{Error: &kvpb.OperationError{Code: int32(codes.ResourceExhausted), Reason: kvpb.ErrorReason_ERROR_REASON_OVERLOADED}}}
			}
		}
		if err := s.Send(resp); err != nil {
			return err
		}
	}
}

// serve serves a KVService until the test ends, and connects to it.
func serve(t *testing.T, m *memory) *KV {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m.values, m.ids = map[string][]byte{}, map[string]int{}
	s := grpc.NewServer()
	kvpb.RegisterKVServiceServer(s, m)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	k, err := DialKV([]string{l.Addr().String()}, 4, Identity{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

// TestKV fills, writes and reads, by calls and by streams; every write has an
// id of its own.
func TestKV(t *testing.T) {
	for _, pipeline := range []bool{false, true} {
		m := &memory{}
		k := serve(t, m)
		o := Options{Clients: 3, Depth: 2, Pipeline: pipeline, Duration: 50 * time.Millisecond, SetShare: .5, Keys: 100, KeySize: 16, Value: Value(10)}
		if r, err := Run(t.Context(), Options{Clients: 1, Depth: 1, Pipeline: pipeline, Duration: 200 * time.Millisecond, Keys: 100, KeySize: 16}, k); err != nil || r.Errors["ABSENT"] == 0 || r.Failed() != r.Errors["ABSENT"] {
			t.Errorf("pipeline %v: reads of nothing: %v, %v", pipeline, r.Errors, err)
		}
		if err := k.CheckPipeline(t.Context()); err != nil {
			t.Error(err)
		}
		fill := o
		if err := Fill(t.Context(), k, fill); err != nil || len(m.values) != 100 || len(m.values[Key(99, 16)]) != 10 {
			t.Errorf("pipeline %v: %d keys, %v", pipeline, len(m.values), err)
		}
		if err := k.OpenSessions(t.Context(), 3); err != nil || m.sessions != 3 {
			t.Errorf("%d sessions, %v", m.sessions, err)
		}
		r, err := Run(t.Context(), o, k)
		if err != nil || r.Operations == 0 || r.Failed() != 0 || r.Latency.Count() != r.Operations {
			t.Errorf("pipeline %v: %+v, %v", pipeline, r, err)
		}
		sessions := map[string]bool{}
		for id, n := range m.ids {
			if n != 1 {
				t.Fatalf("id %s came %d times", id, n)
			}
			session, _, _ := strings.Cut(id, "/")
			sessions[session] = true
		}
		if len(sessions) != 3 {
			t.Errorf("pipeline %v: writes of %d sessions", pipeline, len(sessions))
		}
	}
}

// TestPipelineErrors counts operations that fail alone, and ends with the
// server.
func TestPipelineErrors(t *testing.T) {
	m := &memory{refuse: true}
	k := serve(t, m)
	r, err := Run(t.Context(), Options{Clients: 1, Depth: 30, Pipeline: true, Duration: 100 * time.Millisecond, SetShare: 1, Keys: 1, KeySize: 7}, k)
	failed := r.Errors["RESOURCE_EXHAUSTED OVERLOADED"]
	if err != nil || failed == 0 || r.Failed() != failed || r.Operations != 2*failed {
		t.Errorf("%d operations, errors %v, %v", r.Operations, r.Errors, err)
	}
}

// TestWindow pops operations in the order in which they were pushed, around the
// end of the ring, and no more than there are.
func TestWindow(t *testing.T) {
	w := newWindow(3)
	at := func(seconds ...int64) (times []time.Time) {
		for _, s := range seconds {
			times = append(times, time.Unix(s, 0))
		}
		return times
	}
	w.push(at(1, 2))
	if n := w.room(); n != 1 {
		t.Errorf("room for %d", n)
	}
	one, _ := w.pop(1, nil)
	w.push(at(3, 4))
	rest, err := w.pop(3, nil)
	if err != nil || !slices.Equal(one, at(1)) || !slices.Equal(rest, at(2, 3, 4)) {
		t.Errorf("%v, %v, %v", one, rest, err)
	}
	if _, err := w.pop(1, nil); err == nil {
		t.Error("popped what was not pushed")
	}
	if w.push(at(5)); w.fail(errors.New("ended")) != 1 || w.room() != 0 {
		t.Error("room in a stream that has ended")
	}
}

// TestOldNodes says what they lack.
func TestOldNodes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	kvpb.RegisterKVServiceServer(s, kvpb.UnimplementedKVServiceServer{})
	go func() { _ = s.Serve(l) }()
	defer s.Stop()
	k, err := DialKV([]string{l.Addr().String()}, 1, Identity{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.OpenSessions(t.Context(), 2); err != ErrNoSessions {
		t.Error(err)
	}
	if err := k.CheckPipeline(t.Context()); err != ErrNoPipeline {
		t.Error(err)
	}
}

// TestFillFrom sets keys from another than the first on.
func TestFillFrom(t *testing.T) {
	var mu sync.Mutex
	var set []string
	target := targetFunc(func(_ int, op Operation) error {
		mu.Lock()
		defer mu.Unlock()
		set = append(set, op.Key)
		return nil
	})
	if err := Fill(t.Context(), target, Options{First: 30, Keys: 3, KeySize: 16}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(set)
	if !slices.Equal(set, []string{Key(30, 16), Key(31, 16), Key(32, 16)}) {
		t.Errorf("set: %v", set)
	}
}

func TestNumber(t *testing.T) {
	for _, want := range []uint64{0, 9, 1 << 30} {
		if got, err := Number(Key(want, 40)); got != want || err != nil {
			t.Errorf("%d, %v, want %d", got, err, want)
		}
	}
	if _, err := Number("other"); err == nil {
		t.Error("a key of another kind has a number")
	}
}

// TestWatchesEnd: a watch that ends by itself is an error, and one that is ended is none.
func TestWatchesEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	w := &Watches{}
	slow := status.Error(codes.OutOfRange, "it reads too slowly")
	ended := make(chan struct{})
	w.Go(ctx, func() error { defer close(ended); return slow })
	w.Go(ctx, func() error { <-ctx.Done(); return ctx.Err() })
	<-ended
	eventually := time.NewTicker(time.Millisecond)
	defer eventually.Stop()
	for range eventually.C {
		w.mu.Lock()
		n := len(w.errors)
		w.mu.Unlock()
		if n > 0 {
			break
		}
	}
	cancel()
	if got := Errors(w.Wait()); got != "OUT_OF_RANGE: 1" {
		t.Error(got)
	}
}
