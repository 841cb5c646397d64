// What comes in waits for Go's collector if that is behind.
//
// Go's memory limit makes the collector begin in time, but nobody waits for its end: while one
// of its threads is not run by the system, for others have the processors, the calls go on
// and allocate. A small node was killed by that, for a flood of requests gave it 40 MiB of
// garbage in one cycle. So connections read no further then until a cycle has ended. A node that
// has the memory that it needs does not come near.

package main

import (
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"sync/atomic"
)

// gateShare is which share of Go's limit has to be left, or connections wait; and so much
// more may be in use when they wait again, if the collector could not free what was.
const gateShare = 8

// memoryGate is what connections pass before they read more. Any goroutine may use it.
type memoryGate struct {
	least   uint64        // bytes of the heap below which nobody waits; math.MaxUint64: there is no limit
	inUse   func() uint64 // bytes of the heap, garbage included
	collect func()        // runs the collector, and returns when it is done

	level atomic.Uint64 // of inUse from which connections wait, at least least
	mu    sync.Mutex    // held by the one that collects
}

func newMemoryGate() *memoryGate {
	g := &memoryGate{least: math.MaxUint64, inUse: heapInUse, collect: runtime.GC}
	limit := debug.SetMemoryLimit(-1) // changes nothing
	if limit != math.MaxInt64 {
		g.least = uint64(limit - limit/gateShare)
	}
	g.level.Store(g.least)
	return g
}

// heapInUse takes half a microsecond.
func heapInUse() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// pass returns at once, or when the collector has run.
func (g *memoryGate) pass() {
	if g.isOpen() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.isOpen() {
		return // somebody else has waited
	}
	g.collect()
	g.level.Store(max(g.least, g.inUse()+g.least/gateShare))
}

// isOpen reports whether nobody has to wait. What could not be freed before may have been since.
func (g *memoryGate) isOpen() bool {
	inUse := g.inUse()
	if inUse < g.least {
		g.level.Store(g.least)
		return true
	}
	return inUse < g.level.Load()
}
