// TLS handshakes of those who connect to a node: so many at a time that nobody who begins
// them by thousands keeps members out, or takes the node's files.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

const (
	// maxHandshakes bounds the unfinished handshakes. Each takes a file, some 30 KiB of
	// memory, or twice maxHandshakeBytes of whoever sends as much as they may, and about a
	// millisecond of a processor. It lasts helloTimeout at most.
	maxHandshakes = 256
	// maxHandshakeBytes bounds what is read of a connection until its handshake is done. A
	// chain of certificates has a few KiB; crypto/tls would keep 256 KiB of a stranger's.
	maxHandshakeBytes = 64 << 10
	// maxLoggedError bounds what the log says of a refused connection: the error may have
	// names of a stranger's certificate.
	maxLoggedError = 300
	// hangUpTimeout and hangUpBytes bound the wait for the other end of a connection that is
	// refused to close it.
	hangUpTimeout = time.Second
	hangUpBytes   = 64 << 10
	// maxNodeHosts bounds the hosts that are remembered as those of nodes: each member may
	// have moved once.
	maxNodeHosts = 2 * maxMembers
)

// handshakes are the connections of a limiter whose handshake is unfinished. Those from the
// hosts of nodes have half of the places: whoever floods the node from elsewhere does not
// take these. In each half, the oldest one yields to a new one when there is no place left.
// The limiter's mu guards it.
type handshakes struct {
	limit    int            // of both halves together
	fromHost []*limitedConn // of a node; in the order in which they came
	others   []*limitedConn
}

// add takes in a new connection. It returns the one that has to yield; nil: none.
func (h *handshakes) add(c *limitedConn, isNodeHost bool) (yields *limitedConn) {
	half := &h.others
	if isNodeHost {
		half = &h.fromHost
	}
	if len(*half) >= max(1, h.limit/2) {
		yields = (*half)[0]
		*half = slices.Delete(*half, 0, 1)
	}
	*half = append(*half, c)
	return yields
}

// all are the connections of both halves.
func (h *handshakes) all() []*limitedConn { return slices.Concat(h.fromHost, h.others) }

// remove takes a connection out, and reports whether it was there.
func (h *handshakes) remove(c *limitedConn) bool {
	before := len(h.fromHost) + len(h.others)
	isIt := func(other *limitedConn) bool { return other == c }
	h.fromHost = slices.DeleteFunc(h.fromHost, isIt)
	h.others = slices.DeleteFunc(h.others, isIt)
	return len(h.fromHost)+len(h.others) < before
}

// beginHandshake takes in a connection that was accepted. gRPC calls shakeHands next, in a
// goroutine of the connection's own.
func (l *limiter) beginHandshake(c *limitedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	yields := l.handshakes.add(c, l.certificates.nodeHosts.has(hostOf(c.Conn.RemoteAddr())))
	if yields != nil {
		yields.cut()
	}
}

var (
	errYielded    = errors.New("newer connections have taken its place")
	errNoPlace    = errors.New("clients have all connections that they may")
	errNodePlaces = errors.New("nodes have all connections that they may, and use them")
)

// shakeHands has a new connection show who is at its other end, and gives it a place. gRPC
// bounds the time, by ConnectionTimeout.
func (c *limitedConn) shakeHands() error {
	secure, err := c.l.certificates.accept(context.Background(), c.Conn)
	if err != nil {
		hangUp(c.Conn)
	}
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if !c.l.handshakes.remove(c) {
		err = errYielded
	}
	if err == nil {
		err = c.l.takeAs(c, secure.who)
	}
	if err != nil {
		if secure != nil {
			secure.forget()
		}
		c.l.noteFailure(c, err)
		return err
	}
	c.secure = secure
	c.Conn = secure
	c.who = secure.who
	return nil
}

// handshakeConn bounds what is read of a connection until its handshake is done.
type handshakeConn struct {
	net.Conn
	left   int  // how many bytes may be read
	isDone bool // the handshake is
}

var errLongHandshake = fmt.Errorf("its handshake has more than %d bytes", maxHandshakeBytes)

func (h *handshakeConn) Read(b []byte) (int, error) {
	if h.isDone {
		return h.Conn.Read(b)
	}
	if h.left == 0 {
		return 0, errLongHandshake
	}
	n, err := h.Conn.Read(b[:min(len(b), h.left)])
	h.left -= n
	return n, err
}

// hangUp lets the other end read why its handshake has failed. Closed at once, with bytes
// that were not read, a TCP connection is reset, and what was sent may get lost.
func hangUp(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	_ = tcp.SetReadDeadline(time.Now().Add(hangUpTimeout))
	if tcp.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, tcp, hangUpBytes)
	}
}

// takeAs gives a connection a place by who is at its other end. Nodes have places that are
// kept for them. l.mu is held.
func (l *limiter) takeAs(c *limitedConn, who principal) error {
	if who.role == roleNode {
		if !l.keep(c) {
			return errNodePlaces
		}
		l.conns[c] = true
		return nil
	}
	if l.isFull() {
		l.logFull()
		return errNoPlace
	}
	l.conns[c] = true
	return nil
}

// noteFailure counts a handshake that has failed, and logs it, if it does not fail with
// many others. l.mu is held.
func (l *limiter) noteFailure(c *limitedConn, err error) {
	l.failedHandshakes.Add(1)
	if err == errNoPlace || err == errNodePlaces {
		l.counts.noPlace.Add(1)
		l.counts.noPlaceAfter.Add(1)
	}
	leftOut, isDue := l.handshakeLog.due(time.Now())
	if isDue {
		l.log.Warn("a connection was refused", "from", c.Conn.RemoteAddr(),
			"err", beginning(err.Error(), maxLoggedError), "others", leftOut)
	}
}

// serverCredentials are the credentials of those who connect to a node, for gRPC.
type serverCredentials struct{}

// ServerHandshake implements credentials.TransportCredentials. raw is a connection that a
// limiter has accepted.
func (serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c := raw.(*limitedConn)
	if err := c.shakeHands(); err != nil {
		return nil, nil, err
	}
	info := credentials.TLSInfo{
		State:          c.secure.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}
	return c, info, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (serverCredentials) ClientHandshake(
	context.Context, string, net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for a server")
}

// Info implements credentials.TransportCredentials.
func (serverCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (s serverCredentials) Clone() credentials.TransportCredentials { return s }

// OverrideServerName implements credentials.TransportCredentials.
func (serverCredentials) OverrideServerName(string) error { return nil }

// nodeHosts are the IP addresses that nodes connect from, and that they were found at. Any
// goroutine may call its methods.
type nodeHosts struct {
	mu   sync.Mutex
	seen map[netip.Addr]time.Time // when that was last shown
}

// add notes the address of a node that has shown who it is. It forgets the one that was
// shown the longest ago, if there are too many.
func (h *nodeHosts) add(host netip.Addr) {
	if !host.IsValid() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seen == nil {
		h.seen = map[netip.Addr]time.Time{}
	}
	h.seen[host] = time.Now()
	if len(h.seen) <= maxNodeHosts {
		return
	}
	oldest := host
	for other, at := range h.seen {
		if at.Before(h.seen[oldest]) {
			oldest = other
		}
	}
	delete(h.seen, oldest)
}

func (h *nodeHosts) has(host netip.Addr) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.seen[host]
	return ok
}

// hostOf returns the IP address of the other end of a connection; the zero address, if it
// has none.
func hostOf(address net.Addr) netip.Addr {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	host, _ := netip.AddrFromSlice(tcp.IP)
	return host.Unmap()
}
