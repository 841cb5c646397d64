// Benchmarks of the store that need a thread's own time, which Linux tells.

package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// threadTime is how long the calling goroutine, locked to its thread, has had a
// processor: what else runs on the machine does not count.
func threadTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(1, &u) // RUSAGE_THREAD
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// longest is the longest time that something took, by the clock and of its
// thread's processor.
type longest struct{ wall, thread time.Duration }

func (l *longest) time(f func()) {
	wall, thread := time.Now(), threadTime()
	f()
	l.wall, l.thread = max(l.wall, time.Since(wall)), max(l.thread, threadTime()-thread)
}

func (l *longest) report(b *testing.B, what string) {
	b.ReportMetric(float64(l.thread.Microseconds())/1000, what+"-cpu-ms")
	b.ReportMetric(float64(l.wall.Microseconds())/1000, what+"-wall-ms")
}

// BenchmarkSnapshotStall applies entries of 1,000 writes, in turn without a
// view and while a snapshot is being written from one, and reports the longest that an entry
// took in each case, that it held the lock, and that opening the view took.
func BenchmarkSnapshotStall(b *testing.B) {
	for _, keys := range []int{1e6, 1e7} {
		b.Run(fmt.Sprintf("keys=%.0e", float64(keys)), func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			s := filledStore(keys)
			rng := rand.New(rand.NewPCG(1, 2))
			batches := make([][]byte, 16)
			for i := range batches {
				batches[i] = benchBatch(rng, 1, keys, 1000)
			}
			apply := func(i int) {
				s.proposers[1] = 0
				if _, _, _, err := s.apply(batches[i%len(batches)]); err != nil {
					b.Fatal(err)
				}
			}
			var without, with, open longest
			for b.Loop() {
				var v *view
				open.time(func() { v = s.openView() })
				written := make(chan error, 1)
				go func() { written <- v.writeTo(io.Discard) }()
				n := 0
				for done := false; !done; n++ {
					select {
					case err := <-written:
						if done = true; err != nil {
							b.Fatal(err)
						}
					default:
						with.time(func() { apply(n) })
					}
				}
				v.close()
				for i := range n {
					without.time(func() { apply(i) })
				}
			}
			without.report(b, "without")
			with.report(b, "with")
			open.report(b, "open")
		})
	}
}

// BenchmarkFill sets a million new keys and reports the longest that one took,
// for maps grow, and what memory a key takes beside its 16 bytes and the 128 of
// its value.
func BenchmarkFill(b *testing.B) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const keys = 1e6
	heap := func() float64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	var set longest
	var perKey float64
	for b.Loop() {
		before := heap()
		s := newStore()
		for i := range uint64(keys) {
			key, value := benchKey(i), make([]byte, 128)
			set.time(func() { s.tree.set([]byte(key), item{value, i + 1}) })
		}
		perKey = (heap() - before) / keys
		runtime.KeepAlive(s)
	}
	set.report(b, "longest")
	b.ReportMetric(perKey, "B/key")
}
