// Memory that the store has dropped goes back to the system soon.
//
// Go's collector runs when as much was allocated as was in use, or after two minutes. When keys are
// deleted, or large values replaced by small ones, or a view is closed that has kept such, and
// little is written then, that is long: so the collector is started when that has ended. What it
// frees, Go's scavenger gives back in the background, but most of it only after one more cycle: it
// spares the parts of the heap that were full in the cycle before. It may miss that cycle's call,
// too, if it is at work just then. So another cycle is started while it stands still.
//
// debug.FreeOSMemory would do it all in one call, but stops the node: nobody can halt the processor
// that it works on, so the next cycle, which halts all of them for a moment, waits for its end with
// all of them halted. That took 0.3 to 0.7 s with 4 to 8 GiB, more than an election timeout.

package main

import (
	"context"
	"runtime"
	"runtime/metrics"
	"time"
)

const (
	// collectEvery is between two looks at what was dropped.
	collectEvery = time.Second
	// leastGarbage is worth a collection, if it is also a leastShare of the store: a
	// collection looks at all pages.
	leastGarbage = 16 << 20
	leastShare   = 8
	// mostJustNow is the most that two looks may see dropped if that is to have ended. Where more
	// is dropped all the time, the collector soon runs by itself.
	mostJustNow = leastGarbage / 8
	// maxCycles are started for what was dropped until then.
	maxCycles = 5
)

// garbage is what the store has dropped, and how far that was given back. One goroutine uses it.
type garbage struct {
	dropped [3]uint64 // by the store, at the last looks, the newest first
	base    uint64    // of dropped, all for which cycles were started
	free    uint64    // of the heap, at the last look
	cycles  int       // that may still be started for base
}

// droppedBytes returns how many bytes the store has dropped since the start, and how many of keys and
// values it has. What was dropped while a view was open counts again once that is closed, for
// the collector has freed none of it if the view had it. Any goroutine may call it.
func (s *store) droppedBytes() (dropped, has uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.tree.dropped + s.released, s.tree.bytes
}

// look takes in what was dropped, what the store has, and how much of the heap is free and not
// given back. It reports whether a cycle of the collector should be started.
func (g *garbage) look(dropped, has, free uint64) bool {
	before := g.free
	g.free = free
	g.dropped = [3]uint64{dropped, g.dropped[0], g.dropped[1]}
	if g.hasJustEnded(has) {
		g.base = dropped
		g.cycles = maxCycles - 1
		return true
	}
	// Go itself keeps as much free as is in use.
	isBack := free <= max(leastGarbage, has)
	if isBack {
		g.cycles = 0
	}
	comesBack := free < before
	if g.cycles == 0 || comesBack {
		return false
	}
	g.cycles--
	return true
}

// hasJustEnded reports whether much was dropped since the last such end, and little just now.
func (g *garbage) hasJustEnded(has uint64) bool {
	waiting := g.dropped[0] - g.base
	justNow := g.dropped[0] - g.dropped[2]
	return waiting >= max(leastGarbage, has/leastShare) && justNow <= mostJustNow
}

// collect starts the collector when that is due, until ctx ends.
func (n *node) collect(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	var g garbage
	free := []metrics.Sample{{Name: "/memory/classes/heap/free:bytes"}}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(free)
		dropped, has := n.store.droppedBytes()
		if g.look(dropped, has, free[0].Value.Uint64()) {
			runtime.GC()
		}
	}
}
