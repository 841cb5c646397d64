package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// maxRequestBytes bounds a message to Pipeline.
const maxRequestBytes = 1 << 20

// window is a stream's operations in flight, in their order.
type window struct {
	mu    sync.Mutex
	freed sync.Cond
	due   []time.Time // a ring
	first int
	count int
	err   error // why no answer will come any more
}

func newWindow(depth int) *window {
	w := &window{due: make([]time.Time, depth)}
	w.freed.L = &w.mu
	return w
}

// room waits until there is room and returns how much; 0: the stream has ended.
func (w *window) room() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && w.count == len(w.due) {
		w.freed.Wait()
	}
	if w.err != nil {
		return 0
	}
	return len(w.due) - w.count
}

// push puts operations into flight.
func (w *window) push(due []time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range due {
		w.due[(w.first+w.count)%len(w.due)] = d
		w.count++
	}
}

// pop takes the oldest n out of flight and appends when they were due.
func (w *window) pop(n int, due []time.Time) ([]time.Time, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n > w.count {
		return due, fmt.Errorf("%d answers to %d operations", n, w.count)
	}
	for ; n > 0; n-- {
		due = append(due, w.due[w.first])
		w.first = (w.first + 1) % len(w.due)
		w.count--
	}
	w.freed.Signal()
	return due, nil
}

// fail ends the wait for room, and says how many operations are in flight.
func (w *window) fail(err error) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
	w.freed.Signal()
	return w.count
}

// ErrNoPipeline says that the nodes are too old for it.
var ErrNoPipeline = errors.New("the nodes do not implement Pipeline")

// CheckPipeline opens a stream and ends it.
func (k *KV) CheckPipeline(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	s, err := k.stubs[0].Pipeline(ctx)
	if err == nil {
		_ = s.CloseSend()
		_, err = s.Recv()
	}
	if status.Code(err) == codes.Unimplemented {
		return ErrNoPipeline
	}
	if err != io.EOF {
		return fmt.Errorf("opening a stream: %w", err)
	}
	return nil
}

// streams is a client's goroutine in a pipeline: it opens a stream, and another
// if that breaks.
func (r *run) streams(ctx context.Context, client int) {
	for !r.stream(ctx, client) && ctx.Err() == nil && time.Now().Before(r.end) {
		time.Sleep(pause)
	}
}

// stream sends on a stream until the run has ended; false: the stream has.
// Beside it a goroutine receives.
func (r *run) stream(ctx context.Context, client int) bool {
	k := r.target.(*KV)
	s, err := k.stub(client).Pipeline(ctx, onWire)
	if err != nil {
		r.record(time.Now(), time.Now(), err)
		return false
	}
	w := newWindow(r.Depth)
	var wg sync.WaitGroup
	wg.Go(func() { r.receive(s, w) })
	defer wg.Wait()
	defer func() { _ = s.CloseSend() }()
	rng := rand.New(rand.NewPCG(uint64(client), 0))
	atOnce := max(1, maxRequestBytes/(r.KeySize+len(r.Value)+64))
	for due := []time.Time(nil); ; {
		n := min(w.room(), atOnce)
		if n == 0 {
			return false
		}
		if due = r.next(ctx, n, due[:0]); len(due) == 0 {
			return true
		}
		req := &wire{make([]byte, 0, len(due)*(r.KeySize+len(r.Value)+64))} // gRPC's, once it is sent
		n = 0
		for range due {
			if op, ok := r.operation(rng); ok {
				req.b = k.appendOperation(req.b, client, op)
				n++
			}
		}
		if n == 0 {
			return true
		}
		w.push(due[:n])
		if s.SendMsg(req) != nil {
			return false // the receiver has the reason
		}
	}
}

// receive counts the answers of a stream until it ends.
func (r *run) receive(s kvpb.KVService_PipelineClient, w *window) {
	var due []time.Time
	for {
		var m wire
		err := s.RecvMsg(&m)
		n := 0
		if err == nil {
			n, err = eachResult(m.b, func([]byte) {})
		}
		if err == nil {
			due, err = w.pop(n, due[:0])
		}
		if err != nil {
			for range w.fail(err) {
				r.record(time.Now(), time.Now(), err)
			}
			return
		}
		now, i, failed := time.Now(), 0, false
		_, _ = eachResult(m.b, func(result []byte) {
			err := wireError(result)
			r.record(due[i], now, err)
			i, failed = i+1, failed || err != nil
		})
		if failed && r.pace == nil {
			time.Sleep(pause)
		}
	}
}

// resultError is the error that a unary call would have ended with.
func resultError(r *kvpb.OperationResult) error {
	switch r := r.Result.(type) {
	case *kvpb.OperationResult_Set:
		return nil
	case *kvpb.OperationResult_Get:
		if r.Get.GetValue() == nil {
			return ErrAbsent
		}
		return nil
	case *kvpb.OperationResult_Error:
		st := status.New(codes.Code(r.Error.GetCode()), r.Error.GetMessage())
		if with, err := st.WithDetails(&errdetails.ErrorInfo{Reason: strings.TrimPrefix(r.Error.GetReason().String(), "ERROR_REASON_")}); err == nil {
			st = with
		}
		return st.Err()
	}
	return status.Error(codes.Internal, "an answer of another kind than its operation")
}
