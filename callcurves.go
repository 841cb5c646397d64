// Curves of the calls that this node has answered in the last minutes, for the page.

package main

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

const (
	curveInterval = 5 * time.Second // between two points
	curvePoints   = 120             // ten minutes
)

// callCurves are what /status tells of calls: lists with a value for each interval, oldest
// first, of the same length. They are never changed.
type callCurves struct {
	Seconds float64 `json:"seconds"` // of an interval
	Points  int     `json:"points"`  // that a list has at most

	// Unary calls of KVService a second: reads and writes that were done, and all that failed for
	// another reason than their caller's.
	Reads  []float64 `json:"reads"`
	Writes []float64 `json:"writes"`
	Failed []float64 `json:"failed"`
	// Pipelined are the operations of Pipelines a second that were done.
	Pipelined []float64 `json:"pipelined"`
	// In seconds, a bound that 99 of 100 unary calls that were done have kept; 0: there were none.
	ReadP99  []float64 `json:"read_p99"`
	WriteP99 []float64 `json:"write_p99"`
}

// callRecorder makes a point of the curves in each interval.
type callRecorder struct {
	reads      []*methodCounts
	writes     []*methodCounts
	operations *operationCounts
	before     callTotals

	mu     sync.Mutex
	curves callCurves
}

// callTotals are counts since the start.
type callTotals struct {
	reads, writes []uint64 // calls by bucket of their histograms
	failed        uint64
	pipelined     uint64
}

func newCallRecorder(methods map[string]*methodCounts, operations *operationCounts) *callRecorder {
	r := &callRecorder{
		operations: operations,
		curves:     callCurves{Seconds: curveInterval.Seconds(), Points: curvePoints},
	}
	for _, name := range []string{kvpb.KVService_Get_FullMethodName, kvpb.KVService_List_FullMethodName} {
		r.reads = append(r.reads, methods[name])
	}
	for _, name := range []string{kvpb.KVService_Set_FullMethodName, kvpb.KVService_Delete_FullMethodName,
		kvpb.KVService_DeleteRange_FullMethodName, kvpb.KVService_OpenSession_FullMethodName} {
		r.writes = append(r.writes, methods[name])
	}
	r.before = r.totals()
	return r
}

// run makes a point in each interval until ctx ends.
func (r *callRecorder) run(ctx context.Context) {
	tick := time.NewTicker(curveInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			r.record()
		case <-ctx.Done():
			return
		}
	}
}

// serverFailures are the codes of calls that failed for no fault of their caller.
var serverFailures = []codes.Code{
	codes.Unknown, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Internal, codes.Unavailable, codes.DataLoss,
}

func (r *callRecorder) totals() callTotals {
	var t callTotals
	t.reads = bucketsOf(r.reads)
	t.writes = bucketsOf(r.writes)
	t.pipelined = r.operations.ok.Load()
	for _, m := range slices.Concat(r.reads, r.writes) {
		for _, code := range serverFailures {
			t.failed += m.count(code)
		}
	}
	return t
}

// bucketsOf adds the buckets of methods, whose bounds are the same.
func bucketsOf(methods []*methodCounts) []uint64 {
	buckets := make([]uint64, len(methods[0].seconds.counts))
	for _, m := range methods {
		for i := range buckets {
			buckets[i] += m.seconds.counts[i].Load()
		}
	}
	return buckets
}

// record makes a point of what was counted since the last one.
func (r *callRecorder) record() {
	now := r.totals()
	before := r.before
	r.before = now
	h := r.reads[0].seconds
	reads := difference(now.reads, before.reads)
	writes := difference(now.writes, before.writes)

	r.mu.Lock()
	defer r.mu.Unlock()
	c := &r.curves
	c.Reads = withPoint(c.Reads, perSecond(sum(reads)))
	c.Writes = withPoint(c.Writes, perSecond(sum(writes)))
	c.Failed = withPoint(c.Failed, perSecond(now.failed-before.failed))
	c.Pipelined = withPoint(c.Pipelined, perSecond(now.pipelined-before.pipelined))
	c.ReadP99 = withPoint(c.ReadP99, h.quantile(reads, .99))
	c.WriteP99 = withPoint(c.WriteP99, h.quantile(writes, .99))
}

// latest are the curves as they are now.
func (r *callRecorder) latest() *callCurves {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.curves
	return &c
}

// withPoint is a new list with a point more, and without the oldest one if there are too many.
func withPoint(points []float64, value float64) []float64 {
	oldest := max(0, len(points)+1-curvePoints)
	return append(slices.Clone(points[oldest:]), value)
}

func perSecond(count uint64) float64 { return float64(count) / curveInterval.Seconds() }

func sum(counts []uint64) uint64 {
	all := uint64(0)
	for _, n := range counts {
		all += n
	}
	return all
}

func difference(now, before []uint64) []uint64 {
	d := make([]uint64, len(now))
	for i := range now {
		d[i] = now[i] - before[i]
	}
	return d
}

// quantile is a bound, in the unit of the histogram, which so large a part of the values in
// these buckets have kept; 0: there are no values. Of the last bucket, it is twice its lower end.
func (h *histogram) quantile(buckets []uint64, part float64) float64 {
	left := uint64(math.Ceil(part * float64(sum(buckets))))
	if left == 0 {
		return 0
	}
	for i, n := range buckets[:len(h.bounds)] {
		if n >= left {
			return float64(h.bounds[i]) / h.unit
		}
		left -= n
	}
	return 2 * float64(h.bounds[len(h.bounds)-1]) / h.unit
}
