// Connections to nodes: how all the addresses are tried that a name stands for, and
// how long that may take.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

const (
	// dialStagger is how long a try to connect is alone before the next one begins
	// beside it (RFC 8305, section 5).
	dialStagger = 250 * time.Millisecond
	// maxDialAddresses bounds the addresses of a name that are tried: each may take
	// two sockets at a time.
	maxDialAddresses = 8
	// lookupTimeout bounds a lookup, which may outlast the dial that began it: by
	// default, resolvers wait 5 s for a server, and then ask the next one.
	lookupTimeout = 15 * time.Second
	// The least connectTimeout is for machines that are busy. The greatest is for
	// flags that would have a peer that took a connection, and then died, be waited
	// for longer than it takes an operator to wonder.
	minConnectTimeout, maxConnectTimeout = 1500 * time.Millisecond, 10 * time.Second
	// Between two tries to connect to a peer gRPC waits a back-off: minBackoff after the
	// first one, growing to maxBackoff, each more or less by backoffJitterPercent. So it
	// is longestBackoff at most, and a peer that is back is back within a second. It can
	// be so short since a peer that restarts refuses connections: a try costs it next to
	// nothing.
	minBackoff           = 50 * time.Millisecond
	maxBackoff           = 400 * time.Millisecond
	backoffJitterPercent = 20
	longestBackoff       = maxBackoff + maxBackoff*backoffJitterPercent/100
	// leastKeepaliveTimeout is for networks that lose a packet twice: TCP repeats it
	// after 0.2 s, 0.4 s and so on.
	leastKeepaliveTimeout = 3 * time.Second
)

// connectTimeout is how long it may take to connect to a peer: to look up its name,
// to connect by TCP, and to shake hands by HTTP/2. Within an election timeout a
// message gets to a peer and its answer back, and that several times if elections
// are to succeed. So twice that time gives any peer that can be a member the
// several round trips of a connection, and some for packets that are lost.
func (o *options) connectTimeout() time.Duration {
	return min(max(2*o.election, minConnectTimeout), maxConnectTimeout)
}

// probeTimeout is how long a node that is asked who it is may take: to be connected
// to, and as long again to answer.
func (o *options) probeTimeout() time.Duration { return 2 * o.connectTimeout() }

// dialer connects to nodes.
type dialer struct {
	ctx     context.Context // of the lookups
	connect func(ctx context.Context, address string) (net.Conn, error)
	// lookup returns the IP addresses of a name, best first; nil: connect sees to it.
	lookup func(ctx context.Context, host string) ([]string, error)
	// extra has a place for each try that begins beside another one of its dial,
	// lookups one for each lookup.
	extra, lookups chan struct{}
}

// A dial has one try at least, whatever the others do: it takes its connection's
// place. maxExtraTries bounds all further ones, maxLookups the lookups.
const maxExtraTries, maxLookups = 16, 8

// newDialer makes a dialer; its lookups end with ctx.
func newDialer(ctx context.Context) *dialer {
	return &dialer{
		ctx: ctx, connect: connectTCP, lookup: lookupHost,
		extra: make(chan struct{}, maxExtraTries), lookups: make(chan struct{}, maxLookups),
	}
}

func connectTCP(ctx context.Context, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", address)
}

// lookupHost returns the addresses of a name, those of the first one's family and
// those of the other by turns.
func lookupHost(ctx context.Context, host string) ([]string, error) {
	found, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if err != nil {
		return nil, err
	}
	var same, other []string
	for _, a := range found {
		if isIPv4(a) == isIPv4(found[0]) {
			same = append(same, a.String())
		} else {
			other = append(other, a.String())
		}
	}
	return alternate(same, other), nil
}

func isIPv4(a net.IPAddr) bool { return a.IP.To4() != nil }

// alternate returns what is in a and b, by turns.
func alternate(a, b []string) (all []string) {
	for i := range max(len(a), len(b)) {
		if i < len(a) {
			all = append(all, a[i])
		}
		if i < len(b) {
			all = append(all, b[i])
		}
	}
	return all
}

// target is what one grpc.ClientConn connects to. mu guards what is below it.
type target struct {
	d       *dialer
	address string

	mu      sync.Mutex
	dials   int      // how many there were
	known   []string // what the name stood for when it was last looked up
	running *lookup  // nil: none
}

// lookup is one of a name. done is closed when the other fields are set.
type lookup struct {
	done  chan struct{}
	hosts []string
	err   error
}

// dial connects to one of the target's addresses. gRPC calls it.
func (t *target) dial(ctx context.Context, _ string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(t.address)
	if err != nil {
		return nil, err
	}
	if t.d.lookup == nil || host == "" || isIP(host) {
		return t.d.race(ctx, []string{t.address})
	}
	hosts, err := t.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	first := t.turn() % len(hosts)
	var addresses []string
	for i := range hosts {
		addresses = append(addresses, net.JoinHostPort(hosts[(first+i)%len(hosts)], port))
	}
	return t.d.race(ctx, addresses)
}

func isIP(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// turn counts the dials. Each begins with another address: one that connects by
// TCP, and then shakes no hands, would win every race.
func (t *target) turn() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dials++
	return t.dials - 1
}

// resolve returns what a name stands for, or stood for last, if nobody says for now
// what it does.
func (t *target) resolve(ctx context.Context, host string) ([]string, error) {
	l, known := t.look(host)
	var patience <-chan time.Time
	if known != nil {
		timer := time.NewTimer(dialStagger)
		defer timer.Stop()
		patience = timer.C
	}
	select {
	case <-l.done:
	case <-patience:
		return known, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%s is being looked up: %w", host, ctx.Err())
	}
	if l.err == nil {
		return l.hosts, nil
	}
	if known == nil || isNotFound(l.err) {
		return nil, l.err
	}
	return known, nil
}

// look returns a lookup that runs.
func (t *target) look(host string) (l *lookup, known []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running == nil {
		t.running = &lookup{done: make(chan struct{})}
		go t.lookUp(host, t.running)
	}
	return t.running, t.known
}

func (t *target) lookUp(host string, l *lookup) {
	ctx, cancel := context.WithTimeout(t.d.ctx, lookupTimeout)
	defer cancel()
	select {
	case t.d.lookups <- struct{}{}:
		l.hosts, l.err = t.d.lookup(ctx, host)
		<-t.d.lookups
	case <-ctx.Done():
		l.err = fmt.Errorf("too many names are being looked up: %w", ctx.Err())
	}
	if l.err == nil && len(l.hosts) == 0 {
		l.err = fmt.Errorf("%s has no address", host)
	}
	if len(l.hosts) > maxDialAddresses {
		l.hosts = l.hosts[:maxDialAddresses]
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running = nil
	if l.err == nil || isNotFound(l.err) {
		t.known = l.hosts
	}
	close(l.done)
}

// isNotFound reports whether a name is known to stand for nothing.
func isNotFound(err error) bool {
	var e *net.DNSError
	return errors.As(err, &e) && e.IsNotFound
}

// dialTry is one at an address. What is below result is the goroutine's until it has
// sent it there.
type dialTry struct {
	address int
	cancel  context.CancelFunc
	result  chan<- *dialTry
	conn    net.Conn
	err     error
}

// race is a dial that tries addresses beside each other; one goroutine's.
type race struct {
	d         *dialer
	ctx       context.Context
	addresses []string
	result    chan *dialTry
	running   map[*dialTry]bool
	retries   map[int]*dialTry // by address: those that are not its first try
	next      int              // how many tries have begun
	failed    map[int]error
}

// race connects to one of the addresses. They are tried in turn, each a stagger
// after the one before, or once that has failed; the first connection wins. A first
// try goes on until the end: its host may be far away. All have further tries, round
// by round, each in place of the last: a host that was away when the first try began
// is back for these.
func (d *dialer) race(ctx context.Context, addresses []string) (net.Conn, error) {
	start := time.Now()
	within, cancel := context.WithCancel(ctx)
	defer cancel() // ends all tries
	r := &race{
		d: d, ctx: within, addresses: addresses, result: make(chan *dialTry),
		running: map[*dialTry]bool{}, retries: map[int]*dialTry{}, failed: map[int]error{},
	}
	tick := time.NewTicker(dialStagger)
	defer tick.Stop()
	r.begin()
	for {
		select {
		case t := <-r.result:
			if t.err == nil {
				return t.conn, nil
			}
			if !r.running[t] {
				continue // another has taken its place
			}
			delete(r.running, t)
			r.failed[t.address] = t.err
			if r.next < len(addresses) {
				tick.Reset(dialStagger)
				r.begin()
			}
			if len(r.running) == 0 {
				return nil, r.error(ctx, start)
			}
		case <-tick.C:
			r.begin()
		case <-ctx.Done():
			return nil, r.error(ctx, start)
		}
	}
}

// begin begins the next try, if there is a place for it.
func (r *race) begin() {
	release := func() {}
	if len(r.running) > 0 {
		select {
		case r.d.extra <- struct{}{}:
			release = func() { <-r.d.extra }
		default:
			return
		}
	}
	address := r.next % len(r.addresses)
	isFirst := r.next < len(r.addresses)
	r.next++
	if last := r.retries[address]; last != nil {
		last.cancel()
		delete(r.running, last)
	}
	ctx, cancel := context.WithCancel(r.ctx)
	t := &dialTry{address: address, cancel: cancel, result: r.result}
	if !isFirst {
		r.retries[address] = t
	}
	r.running[t] = true
	go func() {
		defer release()
		defer cancel()
		t.run(ctx, r.d.connect, r.addresses[address])
	}()
}

// run connects and hands the result over, unless ctx has ended.
func (t *dialTry) run(ctx context.Context, connect func(context.Context, string) (net.Conn, error), address string) {
	t.conn, t.err = connect(ctx, address)
	select {
	case t.result <- t:
	case <-ctx.Done():
		if t.err == nil {
			_ = t.conn.Close()
		}
	}
}

// error says of each address what came of it, unless the caller of the dial, whose
// context it gets, gave up: r's own ends a moment later.
func (r *race) error(ctx context.Context, start time.Time) error {
	if ctx.Err() == context.Canceled {
		return context.Canceled
	}
	silent := fmt.Errorf("no answer in %v", time.Since(start).Round(time.Millisecond))
	for t := range r.running {
		r.failed[t.address] = silent
	}
	var causes []error
	var said []string
	for i, address := range r.addresses {
		cause := r.failed[i]
		if cause == nil {
			cause = errNotTried
		}
		text := cause.Error()
		if !strings.Contains(text, address) { // those of package net name it
			text = address + ": " + text
		}
		causes = append(causes, cause)
		said = append(said, text)
	}
	return &dialError{strings.Join(said, "; "), causes}
}

var errNotTried = errors.New("there was no time to try it")

// dialError is why none of some addresses could be connected to.
type dialError struct {
	text   string
	causes []error
}

func (e *dialError) Error() string   { return e.text }
func (e *dialError) Unwrap() []error { return e.causes }

// dial makes a connection to a node for a command. Its calls say how long they wait.
func dial(address string, opts ...grpc.DialOption) *grpc.ClientConn {
	return newDialer(context.Background()).dial(address, opts...)
}

// dial makes a connection to a node. An address can have what a URL must not: the
// zone in [fe80::1%eth0]:21001.
func (d *dialer) dial(address string, opts ...grpc.DialOption) *grpc.ClientConn {
	t := &target{d: d, address: address}
	conn, err := grpc.NewClient("passthrough:///"+url.PathEscape(address), append(opts,
		grpc.WithContextDialer(t.dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())...)
	if err != nil {
		panic(err) // over a target that is no URL, or credentials: not for these
	}
	return conn
}

// dial makes a connection to a peer. It comes back at most a second after the
// peer does.
func (nw *network) dial(address string) *grpc.ClientConn {
	d := *nw.names
	if nw.dialer != nil {
		d.connect, d.lookup = nw.dialer, nil
	}
	return d.dial(address,
		grpc.WithIdleTimeout(0),
		grpc.WithInitialWindowSize(windowBytes),
		grpc.WithInitialConnWindowSize(windowBytes),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  minBackoff,
				Multiplier: 1.6,
				Jitter:     backoffJitterPercent / 100.0,
				MaxDelay:   maxBackoff,
			},
			MinConnectTimeout: nw.connectTimeout,
		}),
		// Finds a connection dead even while nothing is acknowledged: with it,
		// gRPC sets TCP_USER_TIMEOUT. It gives as many round trips as connecting
		// does. 10 s are the least that gRPC allows, and a heartbeat that gets no
		// answer does not wait for it.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time:                10 * time.Second,
			Timeout:             max(leastKeepaliveTimeout, nw.connectTimeout),
			PermitWithoutStream: true,
		}))
}
