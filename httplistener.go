// The connections of the HTTP server: few, and so that nobody who opens many of them keeps
// others out.

package main

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
)

const (
	// maxHTTPConnections bounds them. Each ends with its request, which seldom takes longer
	// than some milliseconds.
	maxHTTPConnections = 16
	// httpFiles are those connections, the listener, and one that is accepted to be closed.
	httpFiles = maxHTTPConnections + 2
	// maxHTTPBytes bounds what is read of a connection: a handshake, and one request.
	maxHTTPBytes = maxHandshakeBytes + 2*maxHTTPHeader
)

// httpListener bounds the connections. When there are too many, one yields: the oldest one of
// the host that has most of them. Else whoever opens connections and says nothing would keep out
// a probe, upon which a node is restarted.
type httpListener struct {
	net.Listener

	mu    sync.Mutex
	conns []*httpConn // in the order in which they came
}

// httpConn is a connection of which little is read.
type httpConn struct {
	net.Conn
	l    *httpListener
	host netip.Addr // at the other end
	left int        // how many bytes may be read; its reader alone uses it
}

func newHTTPListener(l net.Listener) *httpListener { return &httpListener{Listener: l} }

// Accept returns an error that net/http waits and tries again after, unless l is closed.
func (l *httpListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if errors.Is(err, net.ErrClosed) {
		return nil, err
	}
	if err != nil {
		return nil, temporary{err}
	}
	c := &httpConn{Conn: conn, l: l, host: hostOf(conn.RemoteAddr()), left: maxHTTPBytes}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, c)
	if len(l.conns) > maxHTTPConnections {
		yields := l.nextToYield()
		l.remove(yields)
		_ = yields.Conn.Close()
	}
	return c, nil
}

// nextToYield returns the oldest connection of the host that has most. mu is held.
func (l *httpListener) nextToYield() *httpConn {
	of := map[netip.Addr]int{}
	most := 0
	for _, c := range l.conns {
		of[c.host]++
		most = max(most, of[c.host])
	}
	i := slices.IndexFunc(l.conns, func(c *httpConn) bool { return of[c.host] == most })
	return l.conns[i]
}

// remove takes a connection out, if it is there. mu is held.
func (l *httpListener) remove(c *httpConn) {
	l.conns = slices.DeleteFunc(l.conns, func(other *httpConn) bool { return other == c })
}

var errLongHTTPRequest = errors.New("more is sent than a request has")

func (c *httpConn) Read(b []byte) (int, error) {
	if c.left == 0 {
		return 0, errLongHTTPRequest
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

func (c *httpConn) Close() error {
	c.l.mu.Lock()
	c.l.remove(c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}
