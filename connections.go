// The connections that others make: how many there may be, by the files that the
// process may have open.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"

	"raft-key-value/kvpb"
)

// What files a node may have open at a time, besides the connections that others
// make: so many are kept for it. A log that cannot open its next file ends the node.
const (
	// processFiles are standard input, output and error; what the runtime waits by,
	// and is woken by; the listener; a connection that is accepted to be closed; and
	// one to spare.
	processFiles = 8
	// diskFiles are LOCK; the segment of the log that is written, and the one that is
	// filled; a snapshot that is saved; and the directory, which writing the log,
	// saving a snapshot and removing an old one each open.
	diskFiles = 8
	// lookupFiles are of each lookup: a question for IPv4 and one for IPv6, and a
	// file of the system's.
	lookupFiles = 3
	nodeFiles   = processFiles + diskFiles + maxExtraTries + maxLookups*lookupFiles + maxAsking
	// peerFiles are of each peer: a stream to it and one from it, a snapshot to it
	// and one from it, and the file that the latter is written to.
	peerFiles = 5
	// peerConnections are those of them that a peer makes.
	peerConnections = 2
	// maxPeers are all that there may be.
	maxPeers = maxMembers + maxStrangers
	// leastFiles are for a node with a few peers and a few clients.
	leastFiles = 128
	// maxAsking bounds the connections that serve but one call: to forward it to the
	// leader, to ask a node who it is, or to make a cluster with it. Operators cause
	// them, by hand, and starters, a few at a time.
	maxAsking = 16
)

// places are how many connections others may make.
type places struct {
	files      uint64 // that the process may have open
	clients    int    // connections of anybody
	peers      int    // peers, which have peerConnections besides
	handshakes int    // connections whose TLS handshake is unfinished; 0: there is no TLS
}

// placesOf divides the files that a process may have open. Peers get at most half of
// what a node does not need itself: that is enough for all that there may be, or, of
// a low limit, for a cluster that is smaller. With TLS, handshakes get at most a quarter
// of the rest. The HTTP server, if there is one, has its files before that.
func placesOf(files uint64, secure, hasHTTP bool) (places, error) {
	own := uint64(0)
	if hasHTTP {
		own = httpFiles
	}
	if files < leastFiles+own {
		return places{}, fmt.Errorf("this process may have %d files open (RLIMIT_NOFILE, ulimit -n), a node needs %d",
			files, leastFiles+own)
	}
	rest := files - nodeFiles - own
	peers := min(maxPeers, rest/2/peerFiles)
	rest -= peers * peerFiles
	handshakes := uint64(0)
	if secure {
		handshakes = min(maxHandshakes, rest/4)
	}
	clients := min(maxConnections, rest-handshakes)
	return places{files: files, clients: int(clients), peers: int(peers), handshakes: int(handshakes)}, nil
}

// openFiles is how many files this process may have open. Go has raised the soft
// limit to the hard one.
func openFiles() uint64 {
	var limit syscall.Rlimit
	_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) // fails only over a bad address
	return uint64(limit.Cur)
}

const (
	// maxConnections bounds the connections of clients to a node, if it may have so many
	// files open. One that has made a call and is idle takes 65 KiB of resident memory with
	// TLS, and 33 KiB without (of 3,000): so many take 130 MiB, half of what all that clients
	// do may take.
	maxConnections = 2 << 10
	// readAhead is how much of a connection is read before all else that can run has run.
	readAhead = 32 << 10
	// maxHellos and hellosPerSecond bound the hellos on a connection, which is
	// closed at one more: each is work for the loop, and may be an answer to dial. A
	// peer that is refused makes 10 a second at most.
	maxHellos, hellosPerSecond = 4, 20
)

// limiter is a listener that keeps these limits. mu guards what is below it.
type limiter struct {
	net.Listener
	places           places
	certificates     *certificates // for TLS: a connection gets its place once its handshake is done; nil: there is none
	log              *slog.Logger
	failed           bool // the last Accept has; it alone uses this
	failedHandshakes atomic.Uint64
	handshakeLog     rareLog
	counts           connectionCounts

	mu         sync.Mutex
	handshakes handshakes
	conns      map[*limitedConn]bool // that have a place
	// kept are those of conns that are in the places which are kept for peers. When
	// the places for clients are taken, a new connection gets one of these, for a peer
	// is known only once it has said hello; if there is none left, the one yields that
	// no peer has used for longest.
	kept   map[*limitedConn]bool
	fullAt time.Time // when the log last said that clients have all places

	// What the connections share has its own locks, which are taken after mu.
	calls     *runningCalls
	arrivals  *arrivals
	answers   *answers
	writes    *room // bytes of the writes of unary calls
	pipelines *room // bytes of what Pipelines ask, and wait for
}

// connectionCounts are connections that this node has refused, or closed. Any goroutine may use
// it.
type connectionCounts struct {
	noPlace      atomic.Uint64 // refused, or closed when others came, for there were no places left
	noPlaceAfter atomic.Uint64 // those of them whose handshake was done, which count as failed handshakes, too
	stalled      atomic.Uint64 // closed, for their answers were not taken while others waited for room
	untaken      atomic.Uint64 // closed, for they had too many calls open
}

// limitedConn is a connection and its own remote address: by that, calls find it.
type limitedConn struct {
	net.Conn             // what Read and Write use: with TLS, from the end of the handshake on, secure
	secure   *secureConn // nil: there is no TLS, or its handshake is unfinished
	who      principal   // at the other end
	l        *limiter
	ahead    int // bytes that were read since it let others run; its reader alone uses it
	// running, watches and open are its calls; guarded by l.calls. untaken are its answers; guarded
	// by l.answers, as is isClosed.
	running  int
	watches  int
	open     openCalls
	untaken  map[*answerPlace]bool
	isClosed bool
	// hellos, a bucket that fills with time, was counted at greetedAt; guarded by l.mu.
	greetedAt time.Time
	hellos    float64
	// streams are those of a peer that is heard, unheardAt is since when there is
	// none; guarded by l.mu.
	streams   int
	unheardAt time.Time
}

// newLimiter makes the limiter of a listener. Without certificates, there is no TLS.
func newLimiter(l net.Listener, p places, c *certificates, log *slog.Logger) *limiter {
	made := &limiter{
		Listener:     l,
		places:       p,
		certificates: c,
		log:          log,
		handshakes:   handshakes{limit: p.handshakes},
		conns:        map[*limitedConn]bool{},
		kept:         map[*limitedConn]bool{},
		calls:        &runningCalls{limit: maxCalls, share: maxStreamsPerConnection, late: maxLateCalls, openLimit: maxOpenCalls},
		arrivals:     newArrivals(maxArrivingBytes),
	}
	made.answers = newAnswers(made)
	made.writes = newRoom(roomLimits{maxUnaryBytes, maxConnUnaryBytes, lateUnaryBytes}, made.cutStalled)
	made.pipelines = newRoom(roomLimits{maxPipelinesBytes, maxConnPipelinesBytes, latePipelinesBytes}, made.cutStalled)
	return made
}

// shrink makes the limits those of a node that has less memory for clients: each is a part of
// what it was, but has room for the largest request, or answer.
func (l *limiter) shrink(o *options) {
	l.places.clients = min(l.places.clients, o.part(maxConnections, 16))
	l.calls.limit = o.part(maxCalls, 128)
	l.calls.openLimit = l.calls.limit + l.calls.limit/2
	l.arrivals.limit = o.part(maxArrivingBytes, 2*maxMessageBytes)
	l.writes.limits.all = o.part(maxUnaryBytes, 2*maxRequestBytes)
	l.writes.limits.share = o.part(maxConnUnaryBytes, maxRequestBytes)
	l.writes.limits.late = o.part(lateUnaryBytes, uncountedWrite)
	l.pipelines.limits.all = o.part(maxPipelinesBytes, mostOfPipeline)
	l.pipelines.limits.share = o.part(maxConnPipelinesBytes, mostOfPipeline/2)
	l.pipelines.limits.late = o.part(latePipelinesBytes, requestBytes)
	l.answers.large.limits.all = o.part(largeAnswers, 2)
	l.answers.large.limits.share = o.part(connLargeAnswers, 1)
	l.answers.small.limits.all = o.part(smallAnswerBytes, 8*smallAnswer)
	l.answers.small.limits.share = o.part(connSmallBytes, 2*smallAnswer)
	l.answers.small.limits.late = o.part(lateSmallBytes, smallAnswer)
}

// Accept returns an error that gRPC waits and tries again after, unless l is closed.
func (l *limiter) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil, err
		}
		if err != nil {
			if !l.failed {
				l.log.Error("connections cannot be accepted", "err", err)
			}
			l.failed = true
			return nil, temporary{err}
		}
		l.failed = false
		now := time.Now()
		c := &limitedConn{
			Conn: conn, l: l, open: newOpenCalls(),
			greetedAt: now, hellos: maxHellos, unheardAt: now,
		}
		if l.certificates != nil {
			l.beginHandshake(c)
			return c, nil
		}
		if l.take(c) {
			return c, nil
		}
		_ = conn.Close()
	}
}

// Close ends the listener, and the connections whose handshake is unfinished: gRPC waits for
// these when it stops.
func (l *limiter) Close() error {
	err := l.Listener.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.handshakes.all() {
		c.cut()
	}
	return err
}

// temporary is an error of Accept that may pass.
type temporary struct{ error }

func (temporary) Temporary() bool { return true }
func (temporary) Timeout() bool   { return false }
func (t temporary) Unwrap() error { return t.error }

// fullEvery is between two lines of log that say that clients find no place.
const fullEvery = time.Minute

// take gives a new connection a place, if there is one.
func (l *limiter) take(c *limitedConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.isFull() {
		l.conns[c] = true
		return true
	}
	l.logFull()
	if !l.keep(c) {
		l.counts.noPlace.Add(1)
		return false
	}
	l.conns[c] = true
	return true
}

// clientLoad is what the clients of a node occupy, and what was refused them.
type clientLoad struct {
	clients, handshakes, running, open, arriving          uint64
	callsRefused, requestsYielded, badHandshakes, noPlace uint64
}

func (l *limiter) load() clientLoad {
	c := clientLoad{}
	l.mu.Lock()
	c.clients = uint64(len(l.conns) - len(l.kept))
	c.handshakes = uint64(len(l.handshakes.all()))
	c.noPlace = l.counts.noPlace.Load()
	c.badHandshakes = l.failedHandshakes.Load() - l.counts.noPlaceAfter.Load()
	l.mu.Unlock()
	l.calls.mu.Lock()
	c.running = uint64(l.calls.running)
	c.open = uint64(max(0, l.calls.open-l.calls.watches))
	c.callsRefused = l.calls.refused
	l.calls.mu.Unlock()
	l.arrivals.mu.Lock()
	defer l.arrivals.mu.Unlock()
	c.arriving = uint64(l.arrivals.bytes)
	c.requestsYielded = l.arrivals.yielded
	return c
}

// logFull logs once in a while that clients find no place. l.mu is held.
func (l *limiter) logFull() {
	now := time.Now()
	if now.Sub(l.fullAt) > fullEvery {
		l.fullAt = now
		l.log.Warn("clients have all connections that they may", "connections", l.places.clients)
	}
}

// isFull reports whether clients have all their places. l.mu is held.
func (l *limiter) isFull() bool { return len(l.conns)-len(l.kept) >= l.places.clients }

// keep gives a connection one of the places that are kept for peers. l.mu is held.
func (l *limiter) keep(c *limitedConn) bool {
	if len(l.kept) >= l.places.peers*peerConnections {
		var oldest *limitedConn
		for k := range l.kept {
			if k.streams == 0 && (oldest == nil || k.unheardAt.Before(oldest.unheardAt)) {
				oldest = k
			}
		}
		if oldest == nil {
			return false
		}
		l.drop(oldest)
		l.counts.noPlace.Add(1)
	}
	l.kept[c] = true
	return true
}

// drop closes a connection. l.mu is held.
func (l *limiter) drop(c *limitedConn) {
	delete(l.conns, c)
	delete(l.kept, c)
	l.answers.closed(c)
	l.calls.forget(c)
	c.cut()
}

// cut ends a connection without waiting for the other end: to close a TLS connection, one
// takes leave of it. l.mu is held.
func (c *limitedConn) cut() {
	if c.secure != nil {
		c.secure.cut()
		return
	}
	_ = c.Conn.Close()
}

// usePeerPlace makes a connection a peer's, which is heard on it until done is called.
func (c *limitedConn) usePeerPlace() (done func()) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.streams++
	if c.l.conns[c] && !c.l.kept[c] {
		c.l.keep(c) // or it stays where it is
	}
	return func() {
		c.l.mu.Lock()
		defer c.l.mu.Unlock()
		c.streams--
		c.unheardAt = time.Now()
	}
}

// forClients reports whether a connection is in a place for clients, or can be now.
func (c *limitedConn) forClients() bool {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.l.kept[c] && !c.l.isFull() {
		delete(c.l.kept, c)
	}
	return !c.l.kept[c]
}

// inPlace refuses calls of a client on a connection in a place that is kept for peers.
func inPlace(ctx context.Context, method string) error {
	isPeers := strings.HasPrefix(method, "/"+kvpb.RaftService_ServiceDesc.ServiceName+"/")
	c := connOf(ctx)
	if c.who.role == roleNode {
		return nil
	}
	if !isPeers && !c.forClients() {
		return apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED,
			fmt.Sprintf("clients have all %d connections that they may have to this node", c.l.places.clients))
	}
	return nil
}

// connOf is the connection of a call.
func connOf(ctx context.Context) *limitedConn {
	p, _ := grpcpeer.FromContext(ctx)
	return p.Addr.(*limitedConn)
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

// Read implements net.Conn. gRPC gives what it reads to the calls, and keeps up to a window of
// each that has not taken it. So the calls run before more is read: else a connection's reader
// keeps its processor while bytes come, and thousands of calls wait with a full window each.
func (c *limitedConn) Read(b []byte) (int, error) {
	if c.ahead >= readAhead {
		c.ahead = 0
		runtime.Gosched()
	}
	n, err := c.Conn.Read(b)
	c.ahead += n
	if c.l.calls.read(c, b[:n]) {
		c.l.cutUntaken()
	}
	return n, err
}

// Write implements net.Conn.
func (c *limitedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.l.calls.wrote(c, b[:n])
	return n, err
}

func (c *limitedConn) Close() error {
	c.l.mu.Lock()
	c.l.handshakes.remove(c)
	delete(c.l.conns, c)
	delete(c.l.kept, c)
	c.l.answers.closed(c)
	c.l.calls.forget(c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

func (c *limitedConn) RemoteAddr() net.Addr { return c }
func (c *limitedConn) Network() string      { return c.Conn.RemoteAddr().Network() }
func (c *limitedConn) String() string       { return c.Conn.RemoteAddr().String() }
