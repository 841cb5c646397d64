// Memory that the store has dropped goes back to the system soon.
//
// Go's collector runs when as much was allocated as was in use, or after two minutes. When keys are
// deleted, or large values replaced by small ones, or a view is closed that has kept such, and
// little is written then, that is long: so the collector is started once, when that has ended, and
// what is free is given back at once. Go's scavenger, which does so in the background, is not waited for:
// it spares the parts of the heap that were full in the cycle before, until there is another cycle, and
// may miss that one, too, if it is at work just then.

package main

import (
	"context"
	"runtime/debug"
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

// garbage is what the store has dropped. One goroutine uses it.
type garbage struct {
	dropped [3]uint64 // by the store, at the last looks, the newest first
	base    uint64    // of dropped, all before which was given back
}

// droppedBytes returns how many bytes the store has dropped since the start, and how many of keys and
// values it has. What was dropped while a view was open counts again once that is closed, for
// the collector has freed none of it if the view had it. Any goroutine may call it.
func (s *store) droppedBytes() (dropped, has uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.tree.dropped + s.released, s.tree.bytes
}

// look takes in what was dropped. It reports whether that should be given back: it is much, and little
// was dropped just now, so that this is the end of it.
func (g *garbage) look(dropped, has uint64) bool {
	g.dropped = [3]uint64{dropped, g.dropped[0], g.dropped[1]}
	waiting := dropped - g.base
	justNow := dropped - g.dropped[2]
	isWorth := waiting >= max(leastGarbage, has/leastShare)
	if !isWorth || justNow > waiting/8 {
		return false
	}
	g.base = dropped
	return true
}

// collect gives memory back when that is due, until ctx ends.
func (n *node) collect(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	var g garbage
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if g.look(n.store.droppedBytes()) {
			debug.FreeOSMemory() // runs the collector first
		}
	}
}
