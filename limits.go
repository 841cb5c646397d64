// What connections may cost: their number, and the answers that nobody reads.

package main

import (
	"net"
	"sync"
)

const (
	// maxConnections bounds the connections to a node; one more is closed.
	maxConnections = 16 << 10
	// maxUnreadBytes bounds the answers that wait to be written. gRPC keeps those
	// of unary calls however large, and a client may open its window late, or
	// never. Beyond it, the connection that has most of them is closed.
	maxUnreadBytes = 24 << 20
)

// limiter is a listener that keeps both limits. mu guards what is below it.
type limiter struct {
	net.Listener
	mu     sync.Mutex
	conns  map[*limitedConn]bool
	unread int // of all conns
}

// limitedConn is a connection and its own remote address: by that, calls find it.
type limitedConn struct {
	net.Conn
	l      *limiter
	unread int // guarded by l.mu
}

func (l *limiter) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &limitedConn{Conn: conn, l: l}
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

// answered counts an answer that is about to be written; false: the connection
// is closed.
func (c *limitedConn) answered(bytes int) bool {
	l := c.l
	l.mu.Lock()
	if l.conns[c] {
		c.unread += bytes
		l.unread += bytes
	}
	worst := c
	if l.unread > maxUnreadBytes {
		for o := range l.conns {
			if o.unread > worst.unread {
				worst = o
			}
		}
		defer func() { _ = worst.Close() }()
	}
	open := l.conns[c]
	l.mu.Unlock()
	return open
}

func (c *limitedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.wrote(n)
	return n, err
}

// wrote takes what was written from what is not. Frames' headers count as
// answers: that errs on the side of the client, but what gRPC drops because a
// call was cancelled is never written, and counts until the connection ends.
func (c *limitedConn) wrote(n int) {
	n = min(n, c.unread)
	c.unread -= n
	c.l.unread -= n
}

func (c *limitedConn) Close() error {
	c.l.mu.Lock()
	c.wrote(c.unread)
	delete(c.l.conns, c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

func (c *limitedConn) RemoteAddr() net.Addr { return c }
func (c *limitedConn) Network() string      { return c.Conn.RemoteAddr().Network() }
func (c *limitedConn) String() string       { return c.Conn.RemoteAddr().String() }
