// Connections to nodes: the dialer looks a node's name up and tries all addresses that
// the name stands for.

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
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"raft-key-value/kvpb"
)

const (
	// dialStagger is the time between the begins of two tries of a dial, which go on side
	// by side (RFC 8305, section 5).
	dialStagger = 250 * time.Millisecond
	// maxDialAddresses bounds the addresses of a name that are tried. Each may take two
	// sockets at a time: its first try goes on beside a later one.
	maxDialAddresses = 8
	// lookupTimeout bounds a lookup. It is longer than a dial, for a lookup goes on for
	// the next dial: by default, resolvers wait 5 s for a server, and then ask the next.
	lookupTimeout = 15 * time.Second
	// minConnectTimeout leaves a busy machine its time. maxConnectTimeout bounds, with
	// a long --election-timeout, the wait for a peer that accepts a connection and then
	// dies.
	minConnectTimeout = 1500 * time.Millisecond
	maxConnectTimeout = 10 * time.Second
	// maxExtraTries bounds the tries that run beside another one of their dial. A dial's
	// only try needs no place: it counts as the connection that it is to become.
	maxExtraTries = 16
	// maxLookups bounds the lookups.
	maxLookups = 8
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

// connectTimeout bounds the time to connect to a peer: to look up its name, to connect
// by TCP, and to shake hands by HTTP/2. It is twice the election timeout, which has to
// have room for several round trips if elections are to succeed: a connection takes
// several, too, and the second half is for packets that are lost.
func (o *options) connectTimeout() time.Duration {
	return min(max(2*o.election, minConnectTimeout), maxConnectTimeout)
}

// probeTimeout bounds a probe: the time to connect to the node, and as long again for
// its answer.
func (o *options) probeTimeout() time.Duration { return 2 * o.connectTimeout() }

// dialer connects to nodes.
type dialer struct {
	ctx     context.Context // ends the lookups
	connect func(ctx context.Context, address string) (net.Conn, error)
	// lookup returns the IP addresses of a name, best first; nil: connect takes names.
	lookup       func(ctx context.Context, host string) ([]string, error)
	certificates *certificates // for TLS; nil: there is none
	extraTries   chan struct{} // has a place for each of maxExtraTries
	lookupPlaces chan struct{} // has a place for each of maxLookups
}

// newDialer makes a dialer; its lookups end with ctx.
func newDialer(ctx context.Context) *dialer {
	return &dialer{
		ctx:          ctx,
		connect:      connectTCP,
		lookup:       lookupHost,
		extraTries:   make(chan struct{}, maxExtraTries),
		lookupPlaces: make(chan struct{}, maxLookups),
	}
}

func connectTCP(ctx context.Context, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", address)
}

// lookupHost returns the addresses of a name. IPv4 and IPv6 alternate, beginning with
// the family of the resolver's first answer.
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

// alternate returns a[0], b[0], a[1], b[1] and so on, and then the rest of the longer one.
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
	dialer  *dialer
	address string

	mu    sync.Mutex
	dials int      // how many dials there were
	known []string // the last answer to a query: the name's IP addresses
	query *query   // the lookup that runs; nil: none
}

// query is a lookup of a name. done is closed once the other fields are set.
type query struct {
	done  chan struct{}
	hosts []string
	err   error
}

// dial connects to one of the target's addresses. gRPC calls it whenever it needs a
// connection.
func (t *target) dial(ctx context.Context, _ string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(t.address)
	if err != nil {
		return nil, err
	}
	isName := host != "" && !isIP(host)
	if t.dialer.lookup == nil || !isName {
		return t.dialer.dialAny(ctx, []string{t.address})
	}
	hosts, err := t.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	// Each dial begins with another address: one that accepts connections by TCP, and then
	// never shakes hands, would win every race.
	first := t.countDial() % len(hosts)
	var addresses []string
	for i := range hosts {
		host := hosts[(first+i)%len(hosts)]
		addresses = append(addresses, net.JoinHostPort(host, port))
	}
	return t.dialer.dialAny(ctx, addresses)
}

func isIP(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// countDial counts a dial and returns how many there were before it.
func (t *target) countDial() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dials++
	return t.dials - 1
}

// resolve returns the IP addresses of a name. If the resolver is slow or fails, it
// returns those of the last answer.
func (t *target) resolve(ctx context.Context, host string) ([]string, error) {
	q, known := t.currentQuery(host)
	var patience <-chan time.Time // nil, which never fires, while there was no answer yet
	if known != nil {
		timer := time.NewTimer(dialStagger)
		defer timer.Stop()
		patience = timer.C
	}
	select {
	case <-q.done:
	case <-patience:
		return known, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%s is being looked up: %w", host, ctx.Err())
	}
	if q.err == nil {
		return q.hosts, nil
	}
	if known == nil || isNotFound(q.err) {
		return nil, q.err
	}
	return known, nil
}

// currentQuery returns the query that runs, which it starts if there is none, and the
// last answer.
func (t *target) currentQuery(host string) (q *query, known []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.query == nil {
		t.query = &query{done: make(chan struct{})}
		go t.runQuery(host, t.query)
	}
	return t.query, t.known
}

// runQuery looks a name up and sets the query's answer.
func (t *target) runQuery(host string, q *query) {
	ctx, cancel := context.WithTimeout(t.dialer.ctx, lookupTimeout)
	defer cancel()
	select {
	case t.dialer.lookupPlaces <- struct{}{}:
		q.hosts, q.err = t.dialer.lookup(ctx, host)
		<-t.dialer.lookupPlaces
	case <-ctx.Done():
		q.err = fmt.Errorf("too many names are being looked up: %w", ctx.Err())
	}
	if q.err == nil && len(q.hosts) == 0 {
		q.err = fmt.Errorf("%s has no address", host)
	}
	if len(q.hosts) > maxDialAddresses {
		q.hosts = q.hosts[:maxDialAddresses]
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.query = nil
	if q.err == nil || isNotFound(q.err) {
		t.known = q.hosts
	}
	close(q.done)
}

// isNotFound reports whether an error says that a name does not exist.
func isNotFound(err error) bool {
	var e *net.DNSError
	return errors.As(err, &e) && e.IsNotFound
}

// dialTry is a try to connect to an address. Its goroutine sets conn and err, sends the
// try to result and touches it no more.
type dialTry struct {
	address int // index in the race's addresses
	cancel  context.CancelFunc
	result  chan<- *dialTry
	conn    net.Conn
	err     error
}

// race is a dial that tries several addresses side by side. The goroutine of dialAny
// alone touches it.
type race struct {
	dialer    *dialer
	ctx       context.Context // ends all tries
	addresses []string
	begun     int // how many tries have begun
	result    chan *dialTry
	running   map[*dialTry]bool
	retries   map[int]*dialTry // by address: its last try, unless that is its first
	failed    map[int]error    // by address: what came of its last try
}

// dialAny connects to one of the addresses. It begins a try at each of them in order,
// dialStagger apart, or at once when one fails; the first connection wins. Then it goes
// round again, for a host that was away at first may be back. A retry takes the place
// of the address's last one, but not of its first try, whose host may be far away: that
// goes on until the dial ends. The dial fails when ctx ends or no try is left running.
func (d *dialer) dialAny(ctx context.Context, addresses []string) (net.Conn, error) {
	start := time.Now()
	within, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &race{
		dialer:    d,
		ctx:       within,
		addresses: addresses,
		result:    make(chan *dialTry),
		running:   map[*dialTry]bool{},
		retries:   map[int]*dialTry{},
		failed:    map[int]error{},
	}
	tick := time.NewTicker(dialStagger)
	defer tick.Stop()
	r.beginTry()
	for {
		select {
		case t := <-r.result:
			if t.err == nil {
				return t.conn, nil
			}
			if !r.running[t] {
				continue // a retry has taken its place
			}
			delete(r.running, t)
			r.failed[t.address] = t.err
			if r.begun < len(addresses) {
				tick.Reset(dialStagger)
				r.beginTry()
			}
			if len(r.running) == 0 {
				return nil, r.failure(ctx, start)
			}
		case <-tick.C:
			r.beginTry()
		case <-ctx.Done():
			return nil, r.failure(ctx, start)
		}
	}
}

// beginTry begins a try at the next address, if there is a place for it.
func (r *race) beginTry() {
	release, ok := r.reserveTry()
	if !ok {
		return
	}
	address := r.begun % len(r.addresses)
	isRetry := r.begun >= len(r.addresses)
	r.begun++
	if last := r.retries[address]; last != nil {
		last.cancel()
		delete(r.running, last)
	}
	ctx, cancel := context.WithCancel(r.ctx)
	t := &dialTry{address: address, cancel: cancel, result: r.result}
	if isRetry {
		r.retries[address] = t
	}
	r.running[t] = true
	go func() {
		defer release()
		defer cancel()
		t.run(ctx, r.dialer.connect, r.addresses[address])
	}()
}

// reserveTry takes a place for a try, until release is called. The only try of a dial
// always has one, however many others there are.
func (r *race) reserveTry() (release func(), ok bool) {
	if len(r.running) == 0 {
		return func() {}, true
	}
	select {
	case r.dialer.extraTries <- struct{}{}:
		return func() { <-r.dialer.extraTries }, true
	default:
		return nil, false
	}
}

// run connects and hands the try over to the race, unless ctx has ended.
func (t *dialTry) run(
	ctx context.Context, connect func(context.Context, string) (net.Conn, error), address string,
) {
	t.conn, t.err = connect(ctx, address)
	select {
	case t.result <- t:
	case <-ctx.Done():
		if t.err == nil {
			_ = t.conn.Close()
		}
	}
}

// failure says of each address what came of it. ctx is that of the dial's caller, which
// ends a moment before the race's own: if the caller has given up, there is nothing
// to say.
func (r *race) failure(ctx context.Context, start time.Time) error {
	if ctx.Err() == context.Canceled {
		return context.Canceled
	}
	silent := fmt.Errorf("no answer in %v", time.Since(start).Round(time.Millisecond))
	for t := range r.running {
		r.failed[t.address] = silent
	}
	var causes []error
	var texts []string
	for i, address := range r.addresses {
		cause := r.failed[i]
		if cause == nil {
			cause = errNotTried
		}
		text := cause.Error()
		if !strings.Contains(text, address) { // the errors of package net name it
			text = address + ": " + text
		}
		causes = append(causes, cause)
		texts = append(texts, text)
	}
	return &dialError{strings.Join(texts, "; "), causes}
}

var errNotTried = errors.New("there was no time to try it")

// dialError says why none of a node's addresses could be connected to.
type dialError struct {
	text   string
	causes []error
}

func (e *dialError) Error() string   { return e.text }
func (e *dialError) Unwrap() []error { return e.causes }

// dial makes a connection to a node for a command, which shows certificates; nil: without
// TLS. Its calls say how long they wait.
func dial(address string, certificates *certificates, opts ...grpc.DialOption) *grpc.ClientConn {
	d := newDialer(context.Background())
	d.certificates = certificates
	return d.newConn(&kvpb.Node{Address: address}, opts...)
}

// newConn makes a connection to a node, which gRPC opens when a call needs it. A node of
// id 0 is whichever is at the address.
func (d *dialer) newConn(node *kvpb.Node, opts ...grpc.DialOption) *grpc.ClientConn {
	address := node.Address
	t := &target{dialer: d, address: address}
	opts = append(opts,
		grpc.WithContextDialer(t.dial),
		grpc.WithTransportCredentials(d.credentials(node)),
		grpc.WithNoProxy())
	// An address may have what must be escaped in a URL: the zone in [fe80::1%eth0]:21001.
	conn, err := grpc.NewClient("passthrough:///"+url.PathEscape(address), opts...)
	if err != nil {
		panic(err) // gRPC refuses only a target that is no URL, or contradicting credentials
	}
	return conn
}

// credentials are what a connection to a node begins with.
func (d *dialer) credentials(node *kvpb.Node) credentials.TransportCredentials {
	if d.certificates == nil {
		return insecure.NewCredentials()
	}
	host, _, _ := net.SplitHostPort(node.Address) // an address that is none fails when it is dialled
	host, _, _ = strings.Cut(host, "%")           // a certificate has no zones
	return &dialCredentials{certificates: d.certificates, node: node.Id, host: host}
}

// dial makes a connection to a peer. It is open again at most a second after the peer
// is back.
func (nw *network) dial(node *kvpb.Node) *grpc.ClientConn {
	return nw.dialer.newConn(node,
		grpc.WithIdleTimeout(0),
		grpc.WithInitialWindowSize(windowBytes),
		grpc.WithInitialConnWindowSize(connWindowBytes),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  minBackoff,
				Multiplier: 1.6,
				Jitter:     backoffJitterPercent / 100.0,
				MaxDelay:   maxBackoff,
			},
			MinConnectTimeout: nw.connectTimeout,
		}),
		// With keepalive, gRPC sets TCP_USER_TIMEOUT to Timeout: a connection on which
		// nothing is acknowledged for so long is dead. That is room for as many round
		// trips as connecting has. Time, after which an idle connection is probed, is the
		// least that gRPC allows; where heartbeats flow, nothing has to wait for it.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time:                10 * time.Second,
			Timeout:             max(leastKeepaliveTimeout, nw.connectTimeout),
			PermitWithoutStream: true,
		}))
}
