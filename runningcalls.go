// How many calls may run at a time.

package main

import "sync"

const (
	// maxCalls bounds the calls that run on a node: each takes some 15 KiB of goroutines and
	// contexts, and a Pipeline not less. Once half of them run, a connection may have no more
	// than maxLateCalls, so that a few connections do not take all.
	maxCalls     = 4096
	maxLateCalls = 64
	// maxUnaryBytes and maxConnUnaryBytes bound the writes of unary calls, of the node and of
	// a connection; those up to uncountedWrite count as calls only. Further ones wait.
	maxUnaryBytes     = 16 << 20
	maxConnUnaryBytes = 8 << 20
	uncountedWrite    = 1 << 10
)

// runningCalls are the calls that run on all connections. Any goroutine may call its methods.
type runningCalls struct {
	limit, share, late int

	mu      sync.Mutex
	running int
}

// begin counts a call of a connection, until end; false: it is one too many.
func (r *runningCalls) begin(c *limitedConn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	share := r.share
	if r.running >= r.limit/2 {
		share = r.late
	}
	if r.running >= r.limit || c.running >= share {
		return false
	}
	r.running++
	c.running++
	return true
}

func (r *runningCalls) end(c *limitedConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	c.running--
}
