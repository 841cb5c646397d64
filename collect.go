// Memory that the store has dropped goes back to the system soon.
//
// Go's collector runs when as much was allocated as was in use, or after two minutes. When keys are
// deleted, or large values replaced by small ones, or a view is closed that has kept such, and
// little is written then, that is long: so the collector is started once, when that has ended.
// What it frees, Go's scavenger gives back, but most of it only after one more cycle: it spares the
// parts of the heap that were full in the cycle before. So the collector is started twice, also
// if it has freed all of it by itself, but once.

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
)

// garbage is what the store has dropped, and when the collector ran. One goroutine uses it.
type garbage struct {
	dropped [3]uint64 // by the store, at the last looks, the newest first
	cycles  uint64    // of the collector, at the last look
	base    uint64    // of dropped, all before which is freed
	freed   uint64    // bytes that the last cycle has freed, and that are not given back before the next
}

// droppedBytes returns how many bytes the store has dropped since the start, and how many of keys and
// values it has. What was dropped while a view was open counts again once that is closed, for
// the collector has freed none of it if the view had it. Any goroutine may call it.
func (s *store) droppedBytes() (dropped, has uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.tree.dropped + s.released, s.tree.bytes
}

// look takes in what was dropped, and how often the collector has run. It reports whether it should
// be run: much waits to be freed or given back, and little was dropped just now, so that this is the
// end of it.
func (g *garbage) look(dropped, has, cycles uint64) bool {
	before := g.dropped[0]
	g.dropped = [3]uint64{dropped, before, g.dropped[1]}
	if cycles != g.cycles { // it has run, but perhaps before all was dropped that has been since the last look
		g.cycles = cycles
		g.freed = before - g.base
		g.base = before
		return false
	}
	waiting := max(dropped-g.base, g.freed)
	justNow := dropped - g.dropped[2]
	isWorth := waiting >= max(leastGarbage, has/leastShare)
	if !isWorth || justNow > waiting/8 {
		return false
	}
	g.base = dropped
	g.freed = 0
	return true
}

// collect runs the collector when that is due, until ctx ends.
func (n *node) collect(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	var g garbage
	cycles := []metrics.Sample{{Name: "/gc/cycles/total:gc-cycles"}}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(cycles)
		dropped, has := n.store.droppedBytes()
		if g.look(dropped, has, cycles[0].Value.Uint64()) {
			runtime.GC()
			runtime.GC() // so that the scavenger gives back what the first has freed
		}
	}
}
