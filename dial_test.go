// Connecting to what has several addresses, some of which are dead.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fakeHosts is a network in which some addresses answer late, and some never. In a
// bubble, its times are exact.
type fakeHosts struct {
	names    map[string][]string
	trips    map[string]time.Duration // until an address answers; missing: never
	refused  map[string]bool
	lookups  time.Duration // that a lookup takes
	mu       sync.Mutex
	dialled  []string
	open     int // connections that were not closed
	underWay int // tries
	most     int // of them at a time
}

type fakeConn struct {
	net.Conn // of the address below; nobody reads or writes it
	h        *fakeHosts
	address  string
	once     sync.Once
}

func (c *fakeConn) Close() error {
	c.once.Do(func() {
		c.h.mu.Lock()
		defer c.h.mu.Unlock()
		c.h.open--
	})
	return nil
}

func (h *fakeHosts) count(change int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.underWay += change
	h.most = max(h.most, h.underWay)
}

// tally returns how many connections are open, how many tries are under way, and how
// many were at most.
func (h *fakeHosts) tally() (open, underWay, most int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.open, h.underWay, h.most
}

func (h *fakeHosts) connect(ctx context.Context, address string) (net.Conn, error) {
	h.mu.Lock()
	h.dialled = append(h.dialled, address)
	trip, answers := h.trips[address]
	refused := h.refused[address]
	h.mu.Unlock()
	h.count(1)
	defer h.count(-1)
	if refused {
		return nil, syscall.ECONNREFUSED
	}
	if !answers {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	select {
	case <-time.After(trip):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open++
	return &fakeConn{h: h, address: address}, nil
}

func (h *fakeHosts) lookup(ctx context.Context, host string) ([]string, error) {
	h.mu.Lock()
	lookups := h.lookups
	h.mu.Unlock()
	select {
	case <-time.After(lookups):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	found := h.names[host]
	if found == nil {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return found, nil
}

// set changes the network.
func (h *fakeHosts) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// target is a node's address in this network.
func (h *fakeHosts) target(t *testing.T, address string) *target {
	d := newDialer(t.Context())
	d.connect, d.lookup = h.connect, h.lookup
	return &target{dialer: d, address: address}
}

// connects dials and checks which address was connected to, and when.
func connects(t *testing.T, to *target, want string, low, high time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	start := time.Now()
	conn, err := to.dial(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	if got := conn.(*fakeConn).address; got != want {
		t.Errorf("connected to %s, want %s", got, want)
	}
	between(t, "connecting", time.Since(start), low, high)
	_ = conn.Close()
}

const second = time.Second

// TestDial: of the addresses of a name, one that answers is found, however many
// others are dead, and nothing is left of the tries at those. The bubble sees to it
// that all goroutines end.
func TestDial(t *testing.T) {
	const far = 1300 * time.Millisecond
	one, two := "10.0.0.1:1", "10.0.0.2:1"
	for _, tt := range []struct {
		name    string
		address string
		hosts   *fakeHosts
		want    string
		after   time.Duration
	}{
		{"an address", one, &fakeHosts{trips: map[string]time.Duration{one: far}}, one, far},
		{"the first one answers", "both:1", &fakeHosts{
			trips: map[string]time.Duration{one: dialStagger / 2, two: 0},
		}, one, dialStagger / 2},
		{"the first one is silent", "both:1", &fakeHosts{trips: map[string]time.Duration{two: 0}}, two, dialStagger},
		{"the first one refuses", "both:1", &fakeHosts{
			trips:   map[string]time.Duration{two: 0},
			refused: map[string]bool{one: true},
		}, two, 0},
		{"the last one answers, from far away", "all:1", &fakeHosts{
			trips: map[string]time.Duration{two: far},
		}, two, 3*dialStagger + far},
		{"the lookup takes long", "both:1", &fakeHosts{
			lookups: second,
			trips:   map[string]time.Duration{one: far},
		}, one, second + far},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := tt.hosts
				h.names = map[string][]string{"both": {"10.0.0.1", "10.0.0.2"}, "all": {"fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2"}}
				connects(t, h.target(t, tt.address), tt.want, tt.after, tt.after)
				synctest.Wait()
				if open, underWay, _ := h.tally(); open != 0 || underWay != 0 {
					t.Errorf("%d connections are left open, %d tries under way", open, underWay)
				}
			})
		})
	}
}

// TestDialLosers: of two that connect at the same time, one is closed.
func TestDialLosers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &fakeHosts{
			names: map[string][]string{"both": {"10.0.0.1", "10.0.0.2"}},
			trips: map[string]time.Duration{"10.0.0.1:1": second, "10.0.0.2:1": second - dialStagger},
		}
		conn, err := h.target(t, "both:1").dial(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if open, _, _ := h.tally(); open != 1 {
			t.Errorf("%d connections are open", open)
		}
		_ = conn.Close()
	})
}

// TestDialFails: an error names each address and what came of it.
func TestDialFails(t *testing.T) {
	dial := func(t *testing.T, to *target) string {
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
		defer cancel()
		conn, err := to.dial(ctx, "")
		if err == nil {
			t.Fatalf("connected: %v", conn)
		}
		return err.Error()
	}
	synctest.Test(t, func(t *testing.T) {
		h := &fakeHosts{
			names:   map[string][]string{"both": {"10.0.0.1", "10.0.0.2"}},
			refused: map[string]bool{"10.0.0.1:1": true, "10.0.0.2:1": true},
		}
		start := time.Now()
		const refused = "10.0.0.1:1: connection refused; 10.0.0.2:1: connection refused"
		if got := dial(t, h.target(t, "both:1")); got != refused || time.Since(start) != 0 {
			t.Errorf("both refuse: %s, after %v", got, time.Since(start))
		}
		delete(h.refused, "10.0.0.1:1")
		const silent = "10.0.0.1:1: no answer in 6s; 10.0.0.2:1: connection refused"
		if got := dial(t, h.target(t, "both:1")); got != silent {
			t.Errorf("one refuses, one is silent: %s", got)
		}
		wantPart(t, dial(t, h.target(t, "neither:1")), "no such host")
		h.lookups = time.Minute
		wantPart(t, dial(t, h.target(t, "both:1")), "both is being looked up")
		wantPart(t, dial(t, h.target(t, "nonsense")), "missing port")
	})
}

// TestDialCancelled: a dial that nobody wants any more ends at once, and all tries.
func TestDialCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &fakeHosts{names: map[string][]string{"both": {"10.0.0.1", "10.0.0.2"}}}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(second, cancel)
		start := time.Now()
		if _, err := h.target(t, "both:1").dial(ctx, ""); !errors.Is(err, context.Canceled) || time.Since(start) != second {
			t.Errorf("%v, after %v", err, time.Since(start))
		}
		synctest.Wait()
		if _, underWay, _ := h.tally(); underWay != 0 {
			t.Errorf("%d tries are under way", underWay)
		}
	})
}

// TestDialReturns: a host that comes back is found soon, also while a try at it is
// under way that began when it was away; and tries are bounded meanwhile.
func TestDialReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &fakeHosts{names: map[string][]string{"both": {"10.0.0.1", "10.0.0.2"}}, trips: map[string]time.Duration{}}
		back := 5*second + dialStagger/2
		time.AfterFunc(back, func() { h.set(func() { h.trips["10.0.0.2:1"] = 0 }) })
		connects(t, h.target(t, "both:1"), "10.0.0.2:1", back, back+2*dialStagger)
		if _, _, most := h.tally(); most > 2*2+1 { // one more is just being given up
			t.Errorf("%d tries at a time at two addresses", most)
		}
	})
}

// TestDialBounded: many dials of many addresses share places for their tries. Each
// has one try at least, and each address its turn.
func TestDialBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const dials = 30
		h := &fakeHosts{names: map[string][]string{"many": nil}, trips: map[string]time.Duration{"10.0.0.5:1": 0}}
		for i := range 3 * maxDialAddresses {
			h.names["many"] = append(h.names["many"], fmt.Sprintf("10.0.0.%d", i))
		}
		d := h.target(t, "").dialer
		var all sync.WaitGroup
		for range dials {
			all.Go(func() {
				to := &target{dialer: d, address: "many:1"}
				err := errors.New("not dialled")
				for try := 0; err != nil; try++ {
					if try > maxDialAddresses {
						t.Error("not all addresses had their turn")
						return
					}
					ctx, cancel := context.WithTimeout(t.Context(), dialStagger/2) // too short for a second try
					var conn net.Conn
					if conn, err = to.dial(ctx, ""); err == nil {
						_ = conn.Close()
					}
					cancel()
				}
			})
		}
		all.Wait()
		h.set(func() { clear(h.trips) })
		for range dials {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
				defer cancel()
				_, _ = (&target{dialer: d, address: "many:1"}).dial(ctx, "")
			})
		}
		all.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second) // alone, for as many tries as there are addresses
		defer cancel()
		_, _ = (&target{dialer: d, address: "many:1"}).dial(ctx, "")
		synctest.Wait()
		_, _, most := h.tally()
		if most > dials+maxExtraTries || most <= dials || len(d.extraTries)+len(d.lookupPlaces) > 0 {
			t.Errorf("%d tries at a time in %d dials; %d places are not given back", most, dials, len(d.extraTries)+len(d.lookupPlaces))
		}
		if slices.Contains(h.dialled, fmt.Sprintf("10.0.0.%d:1", maxDialAddresses)) {
			t.Error("a name has more addresses than are tried")
		}
	})
}

// TestDialNames: a lookup outlasts a dial that has no time to wait for it, and what a
// name stood for last is used while nobody says what it stands for now.
func TestDialNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &fakeHosts{
			lookups: 5 * second,
			names:   map[string][]string{"node": {"10.0.0.1"}},
			trips:   map[string]time.Duration{"10.0.0.1:1": 0},
		}
		to := h.target(t, "node:1")
		start := time.Now()
		err := errors.New("not dialled")
		for err != nil && time.Since(start) < time.Minute {
			ctx, cancel := context.WithTimeout(t.Context(), second)
			_, err = to.dial(ctx, "")
			cancel()
		}
		between(t, "until the name was known", time.Since(start), 5*second, 6*second)

		connects(t, to, "10.0.0.1:1", dialStagger, dialStagger) // while it is looked up again
		h.set(func() { h.lookups = 2 * lookupTimeout })
		time.Sleep(time.Minute)
		connects(t, to, "10.0.0.1:1", dialStagger, dialStagger)

		h.set(func() { h.lookups, h.names["node"], h.trips["10.0.0.2:1"] = 0, []string{"10.0.0.2"}, 0 })
		time.Sleep(time.Minute)
		connects(t, to, "10.0.0.2:1", 0, 0)
		h.set(func() { delete(h.names, "node") })
		if _, err := to.dial(t.Context(), ""); err == nil {
			t.Error("connected to what a name does not stand for any more")
		}
		h.set(func() { h.lookups = time.Minute })
		ctx, cancel := context.WithTimeout(t.Context(), second)
		defer cancel()
		if _, err := to.dial(ctx, ""); err == nil {
			t.Error("likewise, while it is looked up")
		}
		time.Sleep(lookupTimeout)
	})
}

// TestConnectTimeout: what follows from the flags gives a peer that can be a member the
// round trips of a connection, and does not grow without end.
func TestConnectTimeout(t *testing.T) {
	for election, want := range map[time.Duration]time.Duration{
		30 * time.Millisecond: minConnectTimeout, 600 * time.Millisecond: minConnectTimeout,
		time.Second: 2 * time.Second, 3 * time.Second: 6 * time.Second, time.Hour: maxConnectTimeout,
	} {
		o := options{election: election}
		if got := o.connectTimeout(); got != want {
			t.Errorf("--election-timeout %v: %v, want %v", election, got, want)
		}
		if o.probeTimeout() < 2*o.connectTimeout() {
			t.Errorf("--election-timeout %v: who is connected to at last has no time to answer", election)
		}
	}
}

// TestDialLoopback: with real sockets, it is the same.
func TestDialLoopback(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	d := newDialer(t.Context())
	d.lookup = func(context.Context, string) ([]string, error) {
		return []string{"127.0.0.2", "127.0.0.1"}, nil // nobody listens at the first one
	}
	conn, err := (&target{dialer: d, address: "node:" + port}).dial(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if isTCP := fmt.Sprintf("%T", conn) == "*net.TCPConn"; !isTCP {
		t.Errorf("gRPC cannot set TCP_USER_TIMEOUT on a %T", conn)
	}
	for _, host := range []string{"127.0.0.1", "localhost"} {
		hosts, err := lookupHost(t.Context(), host)
		if err != nil || !slices.Contains(hosts, "127.0.0.1") {
			t.Errorf("%s: %v, %v", host, hosts, err)
		}
	}
	if got := strings.Join(alternate([]string{"a", "b", "c"}, []string{"x"}), ""); got != "axbc" {
		t.Errorf("two families by turns: %s", got)
	}
}
