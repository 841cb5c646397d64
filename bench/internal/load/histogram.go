package load

import (
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	// subBits makes 64 buckets of each power of two: a value is known to 1.6 %.
	subBits = 6
	// maxBits bounds what is told apart: 2^40 ns are 18 minutes.
	maxBits    = 40
	numBuckets = (maxBits - subBits + 1) << subBits
)

// Histogram counts durations in log-linear buckets. It has a fixed size, and
// any goroutine may record.
type Histogram struct {
	counts [numBuckets]atomic.Uint64
	count  atomic.Uint64
	max    atomic.Int64
}

// bucketOf is the value itself up to 2^(subBits+1), then its subBits+1 highest
// bits and how many follow them.
func bucketOf(v uint64) int {
	shift := max(0, bits.Len64(v)-subBits-1)
	return shift<<subBits + int(v>>shift)
}

// middleOf is the value in the middle of a bucket.
func middleOf(bucket int) uint64 {
	shift := max(0, bucket>>subBits-1)
	return uint64(bucket-shift<<subBits)<<shift + 1<<shift>>1
}

// Record counts a duration.
func (h *Histogram) Record(d time.Duration) {
	d = min(max(d, 0), 1<<maxBits-1)
	h.counts[bucketOf(uint64(d))].Add(1)
	h.count.Add(1)
	for old := h.max.Load(); int64(d) > old && !h.max.CompareAndSwap(old, int64(d)); old = h.max.Load() {
	}
}

// Count is how many durations were recorded.
func (h *Histogram) Count() uint64 { return h.count.Load() }

// Max is the longest, exactly.
func (h *Histogram) Max() time.Duration { return time.Duration(h.max.Load()) }

// Quantile is the duration that a share q of those recorded does not exceed; 0
// if there are none.
func (h *Histogram) Quantile(q float64) time.Duration {
	rank := max(1, uint64(q*float64(h.Count())+.5))
	for i, seen := 0, uint64(0); i < numBuckets; i++ {
		if seen += h.counts[i].Load(); seen >= rank {
			return min(time.Duration(middleOf(i)), h.Max())
		}
	}
	return h.Max()
}

// Add adds what another histogram counted.
func (h *Histogram) Add(o *Histogram) {
	for i := range h.counts {
		h.counts[i].Add(o.counts[i].Load())
	}
	h.count.Add(o.Count())
	h.max.Store(max(h.max.Load(), o.max.Load()))
}
