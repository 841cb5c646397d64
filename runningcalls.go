// How many calls may run at a time, and how many may be open: a call is open until its client
// has taken the answer.

package main

import (
	"slices"
	"sync"
)

const (
	// maxCalls bounds the calls that run on a node: each takes some 15 KiB of goroutines and
	// contexts, and a Pipeline not less. Once half of them run, a connection may have no more
	// than maxLateCalls, so that a few connections do not take all.
	maxCalls     = 4096
	maxLateCalls = 64
	// maxOpenCalls bounds the calls that are open on a node: those that run, and half as many
	// that do not, for their answers are not taken, or they have not begun. gRPC takes some 8 KiB
	// for one of these.
	maxOpenCalls = maxCalls + maxCalls/2
	// maxUnaryBytes and maxConnUnaryBytes bound the writes of unary calls, of the node and of
	// a connection, which has lateUnaryBytes once half of the former is taken; those up to
	// uncountedWrite count as calls only. Further ones wait.
	maxUnaryBytes     = 16 << 20
	maxConnUnaryBytes = 8 << 20
	lateUnaryBytes    = 2 << 20
	uncountedWrite    = 1 << 10
)

// runningCalls are the calls that run on all connections. Any goroutine may call its methods.
type runningCalls struct {
	limit, share, late, openLimit int

	mu            sync.Mutex
	running, open int
	refused       uint64 // calls, since the start
	watches       int    // that are open: watchers.go bounds them
}

// openCalls are the calls of a connection that are open, by their streams.
type openCalls struct {
	in, out http2Frames // its reader's and its writer's alone
	// The mu of runningCalls guards the rest.
	streams  []uint32 // ascending
	newest   uint32   // stream
	isClosed bool     // the connection is
}

func newOpenCalls() openCalls { return openCalls{in: http2Frames{skip: http2PrefaceBytes}} }

// begin counts a call of a connection, until end; false: it is one too many.
func (r *runningCalls) begin(c *limitedConn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	share := r.share
	if r.running >= r.limit/2 {
		share = r.late
	}
	if r.running >= r.limit || c.running >= share {
		r.refused++
		return false
	}
	r.running++
	c.running++
	return true
}

// beginWatch counts a call that runs as a watch until endWatch, and no more as a call that runs:
// watches stay open for long, and their own limits bound them.
func (r *runningCalls) beginWatch(c *limitedConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	c.running--
	r.watches++
	c.watches++
}

func (r *runningCalls) endWatch(c *limitedConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running++
	c.running++
	r.watches--
	c.watches--
}

func (r *runningCalls) end(c *limitedConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	c.running--
}

// read notes what a connection has read. It reports whether it has opened calls of which there
// are too many now.
func (r *runningCalls) read(c *limitedConn, b []byte) (tooMany bool) {
	f := &c.open.in
	for b = f.next(b); b != nil; b = f.next(b) {
		kind, _, stream := f.frame()
		switch kind {
		case headersFrame:
			tooMany = r.opened(&c.open, stream) || tooMany
		case resetFrame:
			r.closed(&c.open, stream)
		}
	}
	return tooMany
}

// wrote notes what a connection has written.
func (r *runningCalls) wrote(c *limitedConn, b []byte) {
	f := &c.open.out
	for b = f.next(b); b != nil; b = f.next(b) {
		kind, flags, stream := f.frame()
		isLast := kind == headersFrame && flags&endStreamFlag != 0
		if isLast || kind == resetFrame {
			r.closed(&c.open, stream)
		}
	}
}

// opened notes that a client has sent the headers of a stream, which begin a call if the stream is
// newer than all before. Else gRPC closes the connection.
func (r *runningCalls) opened(o *openCalls, stream uint32) (tooMany bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o.isClosed || stream <= o.newest {
		return false
	}
	o.newest = stream
	o.streams = append(o.streams, stream)
	r.open++
	return r.hasTooMany()
}

// hasTooMany reports whether too many calls are open, watches not counted. mu is held.
func (r *runningCalls) hasTooMany() bool { return r.open-r.watches > r.openLimit }

// closed notes that the last of a call was written, or that its client has cancelled it.
func (r *runningCalls) closed(o *openCalls, stream uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, isOpen := slices.BinarySearch(o.streams, stream)
	if isOpen {
		o.streams = slices.Delete(o.streams, i, i+1)
		r.open--
	}
}

// forget closes all calls of a connection, for it is closed.
func (r *runningCalls) forget(c *limitedConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open -= len(c.open.streams)
	c.open.streams = nil
	c.open.isClosed = true
}

// untaken is, if too many calls are open, how many of a connection are open and do not run; else 0.
func (r *runningCalls) untaken(c *limitedConn) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.hasTooMany() {
		return 0
	}
	return len(c.open.streams) - c.running - c.watches
}

// cutUntaken closes, while too many calls are open, the connection that has most of those that
// do not run: their answers are not taken, or they have not begun.
func (l *limiter) cutUntaken() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		var worst *limitedConn
		most := 0
		for c := range l.conns {
			if n := l.calls.untaken(c); n > most {
				worst = c
				most = n
			}
		}
		if worst == nil {
			return
		}
		l.drop(worst)
		l.counts.untaken.Add(1)
	}
}
