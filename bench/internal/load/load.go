// Package load puts a system under load and measures it. It serves both the
// load program and the comparison, so that all systems are measured alike.
package load

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// grace bounds the wait for what is in flight at the end of a run.
	grace = 10 * time.Second
	// pause is what a client in a closed loop does after an error: otherwise it
	// would ask a node that is down without end.
	pause = 10 * time.Millisecond
)

// Target is a system under load.
type Target interface {
	// Do does one operation for a client, and waits for its answer.
	Do(ctx context.Context, client int, op Operation) error
}

// Operation is a write, or a read of a key.
type Operation struct {
	Set   bool
	Key   string
	Value []byte
}

// Options say what to do to a target.
type Options struct {
	Clients  int
	Depth    int     // operations in flight of each client
	Pipeline bool    // on a stream of each client; the target has to be a *KV
	Rate     float64 // operations a second of all clients; 0: each client's next follows its last
	Warmup   time.Duration
	Duration time.Duration
	SetShare float64 // of all operations
	Keys     uint64
	KeySize  int
	Value    []byte
	Next     *atomic.Uint64 // where sets take the number of a new key, each another; nil: any of Keys
	Fill     bool           // set every key once, in place of all that is said above of time and choice
	First    uint64         // with Fill: the number of the first of Keys
	Progress func(Result)   // called every second
}

// Result is what a run measured.
type Result struct {
	Operations uint64 // that succeeded in Elapsed
	Elapsed    time.Duration
	Latency    *Histogram        // of those that succeeded, and at least so long of Unsent
	Errors     map[string]uint64 // by code and reason
	Unsent     uint64            // that were due at the rate, but no client was free
}

// Throughput is in operations a second.
func (r Result) Throughput() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(r.Operations) / r.Elapsed.Seconds()
}

// Failed is how many operations ended in an error.
func (r Result) Failed() (n uint64) {
	for _, c := range r.Errors {
		n += c
	}
	return n
}

// Add adds another run to the same target.
func (r *Result) Add(o Result) {
	if r.Latency == nil {
		r.Latency, r.Errors = &Histogram{}, map[string]uint64{}
	}
	r.Operations += o.Operations
	r.Elapsed += o.Elapsed
	r.Unsent += o.Unsent
	r.Latency.Add(o.Latency)
	for k, n := range o.Errors {
		r.Errors[k] += n
	}
}

// run is a run that goes on.
type run struct {
	Options
	target     Target
	begin, end time.Time // what is measured lies between them
	pace       *pacer    // nil: closed loop
	filled     atomic.Uint64
	done       atomic.Uint64
	latency    *Histogram

	mu     sync.Mutex
	errors map[string]uint64
}

// Run puts a target under load. It starts a goroutine for each operation that
// may be in flight, or two for each stream, and waits for all of them.
func Run(ctx context.Context, o Options, t Target) (Result, error) {
	r := &run{Options: o, target: t, latency: &Histogram{}, errors: map[string]uint64{}}
	start := time.Now()
	r.begin = start.Add(o.Warmup)
	r.end = r.begin.Add(o.Duration)
	if o.Fill {
		r.begin, r.end = start, start.Add(24*time.Hour)
	} else if o.Rate > 0 {
		var err error
		if r.pace, err = newPacer(start, r.end, o.Rate); err != nil {
			return Result{}, err
		}
		defer r.pace.close()
	}
	ctx, cancel := context.WithDeadline(ctx, r.end.Add(grace))
	defer cancel()
	var wg sync.WaitGroup
	for client := range o.Clients {
		if o.Pipeline {
			wg.Go(func() { r.streams(ctx, client) })
			continue
		}
		for slot := range o.Depth {
			wg.Go(func() { r.unary(ctx, client, slot) })
		}
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	r.watch(ended)
	if ctx.Err() == context.Canceled {
		return Result{}, ctx.Err()
	}
	if r.pace != nil {
		return r.result(r.end, r.pace.unsent(r.begin, r.latency)), nil
	}
	if o.Fill {
		r.end = time.Now()
	}
	return r.result(r.end, 0), nil
}

// watch reports once a second until the run has ended.
func (r *run) watch(ended chan struct{}) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ended:
			return
		case now := <-t.C:
			if r.Progress != nil && now.After(r.begin) && r.end.Sub(now) > time.Second/2 {
				r.Progress(r.result(now, 0))
			}
		}
	}
}

func (r *run) result(now time.Time, unsent uint64) Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Result{Operations: r.done.Load(), Elapsed: now.Sub(r.begin), Latency: r.latency, Errors: maps.Clone(r.errors), Unsent: unsent}
}

// unary is a client's goroutine, or one of them: it does one operation after
// the other.
func (r *run) unary(ctx context.Context, client, slot int) {
	rng := rand.New(rand.NewPCG(uint64(client), uint64(slot)))
	for due := []time.Time(nil); ; {
		if due = r.next(ctx, 1, due[:0]); len(due) == 0 {
			return
		}
		op, ok := r.operation(rng)
		if !ok {
			return
		}
		err := r.target.Do(ctx, client, op)
		r.record(due[0], time.Now(), err)
		if err != nil && r.pace == nil {
			time.Sleep(pause)
		}
	}
}

// next returns when the next operations are or were due, at least one and at
// most n; none: the run has ended.
func (r *run) next(ctx context.Context, n int, due []time.Time) []time.Time {
	if r.pace != nil {
		return r.pace.take(ctx, n, due)
	}
	now := time.Now()
	for ; n > 0 && ctx.Err() == nil && now.Before(r.end); n-- {
		due = append(due, now)
	}
	return due
}

// operation chooses an operation; false: all keys have been set.
func (r *run) operation(rng *rand.Rand) (Operation, bool) {
	if r.Fill {
		i := r.filled.Add(1) - 1
		return Operation{Set: true, Key: Key(r.First+i, r.KeySize), Value: r.Value}, i < r.Keys
	}
	if r.Next != nil {
		return Operation{Set: true, Key: Key(r.Next.Add(1)-1, r.KeySize), Value: r.Value}, true
	}
	key := Key(rng.Uint64N(r.Keys), r.KeySize)
	if r.SetShare < 1 && (r.SetShare <= 0 || rng.Float64() >= r.SetShare) {
		return Operation{Key: key}, true
	}
	return Operation{Set: true, Key: key, Value: r.Value}, true
}

// record counts an operation that has ended. In a closed loop it counts if it
// ended in the time measured; at a rate its latency counts if it was due then.
func (r *run) record(due, now time.Time, err error) {
	within := !now.Before(r.begin) && now.Before(r.end)
	if err != nil {
		if within {
			r.mu.Lock()
			r.errors[ErrorName(err)]++
			r.mu.Unlock()
		}
		return
	}
	if within {
		r.done.Add(1)
	}
	if r.pace == nil && within || r.pace != nil && !due.Before(r.begin) {
		r.latency.Record(now.Sub(due))
	}
}

// keyPrefix tells the keys of a measurement from all others.
const keyPrefix = "bench-"

// Key is key i in size bytes.
func Key(i uint64, size int) string {
	const digits = "0123456789abcdef"
	b := make([]byte, size)
	from := copy(b, keyPrefix)
	for j := size - 1; j >= from; j-- {
		b[j] = digits[i%16]
		i /= 16
	}
	return string(b)
}

// Number is the number of a key that Key made.
func Number(key string) (uint64, error) {
	return strconv.ParseUint(strings.TrimPrefix(key, keyPrefix), 16, 64)
}

// AllKeys is the prefix that all keys have.
const AllKeys = keyPrefix

// ErrAbsent is the error of a read or a delete that did not find all that is there.
var ErrAbsent = fmt.Errorf("ABSENT")

// ErrorName is the code of an error, and the reason if the node gave one.
func ErrorName(err error) string {
	if err == ErrAbsent {
		return err.Error()
	}
	name := codeName(status.Code(err))
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return name + " " + info.Reason
		}
	}
	return name
}

// codeName is the code as the documents of gRPC and ours write it.
func codeName(c codes.Code) string {
	var b strings.Builder
	for i, r := range c.String() {
		if i > 0 && r >= 'A' && r <= 'Z' && c != codes.OK {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToUpper(b.String())
}
