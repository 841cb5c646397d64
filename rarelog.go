// Lines of the log that strangers cause: not more than one a second of a kind.

package main

import (
	"sync"
	"time"
)

// rareLogInterval is the least time between two lines of a kind.
const rareLogInterval = time.Second

// rareLog says when a line of its kind may be logged. Any goroutine may call its methods.
type rareLog struct {
	mu      sync.Mutex
	last    time.Time // when a line was logged
	leftOut int       // how many were not logged since
}

// due reports whether a line may be logged now, and how many before it were left out.
func (r *rareLog) due(now time.Time) (leftOut int, isDue bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.last.IsZero() && now.Sub(r.last) < rareLogInterval {
		r.leftOut++
		return 0, false
	}
	leftOut = r.leftOut
	r.last = now
	r.leftOut = 0
	return leftOut, true
}
