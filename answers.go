// What answers may cost that nobody reads.

package main

import (
	"context"
	"runtime"
	"time"

	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
)

const (
	// maxUnreadBytes and maxConnectionUnread bound, but for one answer more, the
	// answers that wait to be written, of all connections and of one. gRPC keeps
	// them however large, and a client may open its window late, or never.
	// All of them fit into what abuse may cost; one connection's, so that it takes
	// four pages of a List at a time, are a sixth of that.
	maxUnreadBytes      = 24 << 20
	maxConnectionUnread = 4 << 20
	// maxWaiting bounds the answers that wait for room; one more is refused. Each has
	// a call's goroutine and request, some 20 KiB but for a large one.
	maxWaiting = 1000
	// minTaken is what a connection has to take of its answers in stallTimeout to
	// stay open while there is no room for those of others: half a megabit a second.
	minTaken     = 64 << 10
	stallTimeout = time.Second
)

// gRPC's own pool has no size between 32 KiB and 1 MiB, and clears all of a
// buffer whenever it is used.
func init() {
	pool, _ := mem.NewBinaryTieredBufferPool(8, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21) // fails over sizes that an int cannot have
	experimental.SetDefaultBufferPool(pool)
}

// admit has f make an answer of so many bytes when there is room for it. One that
// has to wait is made again: meanwhile it would keep values that others overwrite.
// What f makes is there before there is room: it had better copy nothing large.
// The answer counts until gRPC gives its buffer, of the pool, back.
func admit[T any](ctx context.Context, f func() (answer T, bytes int, err error)) (answer T, pool mem.BufferPool, err error) {
	c := connOf(ctx)
	if len(c.turn) == 0 {
		if answer, pool, err = try(c, f); pool != nil || err != nil {
			return answer, pool, err
		}
	}
	defer c.l.waiting.Add(-1)
	if c.l.waiting.Add(1) > maxWaiting {
		return answer, nil, errOverloaded
	}
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return answer, nil, ctx.Err()
	}
	for {
		if err = c.wait(ctx); err != nil {
			return answer, nil, err
		}
		if answer, pool, err = try(c, f); pool != nil || err != nil {
			return answer, pool, err
		}
	}
}

// try makes an answer and counts it; without a pool, there is no room.
func try[T any](c *limitedConn, f func() (T, int, error)) (answer T, _ mem.BufferPool, _ error) {
	m, bytes, err := f()
	if err != nil {
		return answer, nil, err
	}
	if mem.IsBelowBufferPoolingThreshold(bytes) { // gRPC itself has more of the call
		return m, mem.NopBufferPool{}, nil
	}
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if !c.l.conns[c] {
		return answer, nil, errOverloaded
	}
	if c.full() {
		return answer, nil, nil
	}
	c.add(bytes)
	pool := &answerPool{c: c, bytes: bytes}
	pool.lost = runtime.AddCleanup(pool, c.wrote, bytes)
	return m, pool, nil
}

// wait waits for room.
func (c *limitedConn) wait(ctx context.Context) error {
	tick := time.NewTicker(stallTimeout)
	defer tick.Stop()
	for {
		c.l.mu.Lock()
		c.l.sweep()
		full := c.full()
		if c.l.less == nil {
			c.l.less = make(chan struct{})
		}
		less := c.l.less
		c.l.mu.Unlock()
		if !full {
			return nil
		}
		select {
		case <-less:
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sweep closes the connections that stall, if there is no room, or none to wait.
// l.mu is held.
func (l *limiter) sweep() {
	age := time.Since(l.swept)
	if l.unread < maxUnreadBytes && l.waiting.Load() < maxWaiting || age < stallTimeout {
		return
	}
	l.swept = time.Now()
	for c := range l.conns {
		written := c.written.Load()
		stalls := c.unread > 0 && time.Since(c.unreadAt) >= stallTimeout && written-c.seen < minTaken
		if stalls && age < 2*stallTimeout { // else, see what it takes until the next
			l.drop(c)
		}
		c.seen = written
	}
}

// full reports whether there is no room. l.mu is held.
func (c *limitedConn) full() bool {
	return c.unread >= maxConnectionUnread || c.l.unread >= maxUnreadBytes
}

// add counts bytes that are unread, or are so no more. l.mu is held.
func (c *limitedConn) add(bytes int) {
	if c.unread == 0 {
		c.unreadAt = time.Now()
	}
	c.unread += bytes
	c.l.unread += bytes
}

// wrote counts an answer no more.
func (c *limitedConn) wrote(bytes int) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.add(-min(bytes, c.unread)) // nothing of one that is closed
}

// wake has whoever waits for room look again before its tick.
func (l *limiter) wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.less != nil {
		close(l.less)
		l.less = nil
	}
}

// answerPool is the pool of one buffer. gRPC gives that back when it is written or
// its call was cancelled; it loses it when the connection ends, or the call does
// just before.
type answerPool struct {
	mem.NopBufferPool // gRPC's own has buffers that are up to twice too large
	c                 *limitedConn
	bytes             int
	lost              runtime.Cleanup
}

// fit counts an answer as what it has become.
func (p *answerPool) fit(bytes int) {
	if mem.IsBelowBufferPoolingThreshold(bytes) {
		bytes = 0 // such a buffer gRPC does not give back
	}
	p.lost.Stop()
	p.c.wrote(p.bytes - bytes)
	p.c.l.wake()
	p.bytes = bytes
	p.lost = runtime.AddCleanup(p, p.c.wrote, bytes)
}

func (p *answerPool) Put(*[]byte) {
	p.lost.Stop()
	p.c.wrote(p.bytes)
	p.c.l.wake()
}

func (c *limitedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written.Add(int64(n))
	return n, err
}
