// A histogram: how many values there were in each of a few buckets.

package main

import (
	"sync/atomic"
	"time"
)

// histogram counts values, which are whole numbers, such as nanoseconds. Any goroutine may call
// its methods. A value costs two atomic additions. With both looks at the clock, that is 110 ns for a
// call, on one processor or on two at once (BenchmarkCounted), of the 15 µs that it takes of them at
// least. So it is not divided among processors.
type histogram struct {
	unit   float64  // how many of the values make one of the unit that is told, as 1e9 for seconds
	bounds []uint64 // the highest value of each bucket but the last, which has none; ascending
	counts []atomic.Uint64
	sum    atomic.Uint64
}

func newHistogram(unit float64, bounds ...uint64) *histogram {
	return &histogram{unit: unit, bounds: bounds, counts: make([]atomic.Uint64, len(bounds)+1)}
}

// newTimes makes a histogram of nanoseconds, which is told in seconds.
func newTimes(bounds ...time.Duration) *histogram {
	var nanoseconds []uint64
	for _, b := range bounds {
		nanoseconds = append(nanoseconds, uint64(b))
	}
	return newHistogram(float64(time.Second), nanoseconds...)
}

// newSizes makes a histogram of numbers: 1, and each power of a factor up to some largest one.
func newSizes(factor, largest uint64) *histogram {
	var bounds []uint64
	for b := uint64(1); b <= largest; b *= factor {
		bounds = append(bounds, b)
	}
	return newHistogram(1, bounds...)
}

func (h *histogram) observe(value uint64) {
	i := 0
	for i < len(h.bounds) && value > h.bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(value)
}

func (h *histogram) observeTime(d time.Duration) { h.observe(uint64(max(0, d))) }

// count is how many values there were.
func (h *histogram) count() uint64 {
	all := uint64(0)
	for i := range h.counts {
		all += h.counts[i].Load()
	}
	return all
}
