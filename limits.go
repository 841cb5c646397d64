// What connections may cost: their number, and the answers that nobody reads.

package main

import (
	"context"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
	grpcpeer "google.golang.org/grpc/peer"
)

const (
	// maxConnections bounds the connections to a node; one more is closed.
	maxConnections = 16 << 10
	// maxUnreadBytes and maxConnectionUnread bound, but for one answer more, the
	// answers that wait to be written, of all connections and of one. gRPC keeps
	// them however large, and a client may open its window late, or never.
	maxUnreadBytes      = 24 << 20
	maxConnectionUnread = 4 << 20
	// maxWaiting bounds the answers that wait for room; one more is refused.
	maxWaiting = 1000
	// minTaken is what a connection has to take of its answers in stallTimeout to
	// stay open while there is no room for those of others.
	minTaken     = 64 << 10
	stallTimeout = time.Second
	// maxHellos and hellosPerSecond bound the hellos on a connection, which is
	// closed at one more. A peer that is refused makes 10 a second at most.
	maxHellos, hellosPerSecond = 4, 20
)

// gRPC's own pool has no size between 32 KiB and 1 MiB, and clears all of a
// buffer whenever it is used.
func init() {
	pool, _ := mem.NewBinaryTieredBufferPool(8, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21) // fails over sizes that an int cannot have
	experimental.SetDefaultBufferPool(pool)
}

// limiter is a listener that keeps these limits. mu guards what is below it.
type limiter struct {
	net.Listener
	mu      sync.Mutex
	conns   map[*limitedConn]bool
	unread  int           // of all conns
	less    chan struct{} // closed when some was written; nil: nobody waits
	swept   time.Time
	waiting atomic.Int32
}

// limitedConn is a connection and its own remote address: by that, calls find it.
type limitedConn struct {
	net.Conn
	l       *limiter
	turn    chan struct{} // full while an answer waits for room, and others for their turn
	written atomic.Int64
	seen    int64 // what was written when l was swept; guarded by l.mu, as is unread
	unread  int
	// unreadAt is when unread was last 0 and hellos, a bucket that fills with time,
	// was counted at greetedAt; guarded by l.mu.
	unreadAt, greetedAt time.Time
	hellos              float64
}

func newLimiter(l net.Listener) *limiter {
	return &limiter{Listener: l, conns: map[*limitedConn]bool{}}
}

func (l *limiter) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &limitedConn{Conn: conn, l: l, greetedAt: time.Now(), hellos: maxHellos, turn: make(chan struct{}, 1), seen: -minTaken}
		l.mu.Lock()
		full := len(l.conns) >= maxConnections
		if !full {
			l.conns[c] = true
		}
		l.mu.Unlock()
		if !full {
			return c, nil
		}
		_ = conn.Close()
	}
}

// connOf is the connection of a call.
func connOf(ctx context.Context) *limitedConn {
	p, _ := grpcpeer.FromContext(ctx)
	return p.Addr.(*limitedConn)
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
			delete(l.conns, c)
			c.add(-c.unread)
			_ = c.Conn.Close()
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

// greeted counts a hello; false: it is one too many.
func (c *limitedConn) greeted() bool {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	now := time.Now()
	c.hellos = min(maxHellos, c.hellos+hellosPerSecond*now.Sub(c.greetedAt).Seconds()) - 1
	c.greetedAt = now
	return c.hellos >= 0
}

func (c *limitedConn) Close() error {
	c.l.mu.Lock()
	delete(c.l.conns, c)
	c.add(-c.unread)
	c.l.mu.Unlock()
	c.l.wake()
	return c.Conn.Close()
}

func (c *limitedConn) RemoteAddr() net.Addr { return c }
func (c *limitedConn) Network() string      { return c.Conn.RemoteAddr().Network() }
func (c *limitedConn) String() string       { return c.Conn.RemoteAddr().String() }
