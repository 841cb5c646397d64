// Ring 2. The real stack, gRPC included, in a bubble of testing/synctest: its clock
// jumps as soon as every goroutine waits. So hours pass in a second, and these
// tests, unlike all others, may assert how long something takes.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"

	"raft-key-value/kvpb"
)

// bubble is a cluster in memory, and the network between its nodes.
type bubble struct {
	*testCluster
	latency time.Duration // of each write and each read of a connection
	think   time.Duration // mean, between two calls of a client
	epoch   int           // of the keys of load: a history starts with none

	mu        sync.Mutex
	listeners map[string]*bufconn.Listener
	wires     map[*wire]bool
	faults    map[string]fault // by address; clients are not affected
	sent      map[[2]string]int
}

// fault is what the network does to a node.
type fault int

const (
	whole fault = iota
	cut         // connections break, and there are no new ones
	black       // bytes are lost without a word
)

// inBubble calls f with nodes 1 to n that are a cluster: without TLS, and then over TLS.
func inBubble(t *testing.T, n uint64, f func(*testing.T, *bubble), set ...func(*options)) {
	t.Helper()
	t.Parallel()
	pki, _ := testPKI(t, n+4) // some tests boot more
	for name, pki := range map[string]string{"plain": "", "TLS": pki} {
		t.Run(name, func(t *testing.T) { inOneBubble(t, n, pki, f, set...) })
	}
}

func inOneBubble(t *testing.T, n uint64, pki string, f func(*testing.T, *bubble), set ...func(*options)) {
	withFakeClock(t, func(t *testing.T) {
		b := &bubble{
			testCluster: &testCluster{t: t, ctx: t.Context(), nodes: map[uint64]*testNode{}, pki: pki}, latency: time.Millisecond, think: 5 * time.Millisecond,
			listeners: map[string]*bufconn.Listener{}, wires: map[*wire]bool{}, faults: map[string]fault{}, sent: map[[2]string]int{},
		}
		b.options = func(o *options) {
			for _, f := range set {
				f(o)
			}
		}
		defer b.end()
		var ids []uint64
		for id := range n {
			b.boot(id + 1)
			ids = append(ids, id+1)
		}
		b.init(ids...)
		f(t, b)
	})
}

// end ends all nodes, and what the faults left open.
func (b *bubble) end() {
	for _, n := range b.nodes {
		n.cancel()
	}
	for _, id := range slices.Collect(maps.Keys(b.nodes)) {
		b.stop(id)
	}
	b.mu.Lock()
	for w := range b.wires {
		_ = w.Conn.Close()
	}
	b.mu.Unlock()
	time.Sleep(time.Second) // whoever does not end by then never does: the bubble says so
}

func addressIn(id uint64) string { return fmt.Sprintf("node%d:1", id) }

// boot starts a process: the node has no memory.
func (b *bubble) boot(id uint64) {
	n := &testNode{id: id, address: addressIn(id), ended: make(chan error, 1)}
	l := bufconn.Listen(64 << 10)
	b.mu.Lock()
	b.listeners[n.address] = l
	b.mu.Unlock()
	o := defaultOptions()
	b.options(&o)
	o.id, o.advertise, o.listener = id, n.address, l
	o.dialer = func(ctx context.Context, to string) (net.Conn, error) { return b.dial(ctx, n.address, to) }
	if b.pki != "" {
		o.tls = testFiles(b.pki, fmt.Sprintf("node%d", id))
	}
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	ready := make(chan *server, 1)
	log := slog.New(slog.NewTextHandler(b.t.Output(), nil)).With("node", id)
	go func() { n.ended <- run(ctx, o, log, func(s *server) { ready <- s }) }()
	select {
	case n.server = <-ready:
	case err := <-n.ended:
		b.t.Fatal(err)
	}
	n.conn = b.client(id)
	n.KVServiceClient, n.ClusterServiceClient = kvpb.NewKVServiceClient(n.conn), kvpb.NewClusterServiceClient(n.conn)
	b.nodes[id] = n
}

// client is a connection from outside.
func (b *bubble) client(id uint64) *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///"+addressIn(id),
		grpc.WithTransportCredentials(testCredentials(b.t, b.pki, "admin", addressIn(id))), grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}, MinConnectTimeout: time.Second}),
		grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return b.dial(ctx, "client", to) }))
	if err != nil {
		b.t.Fatal(err)
	}
	return conn
}

func (b *bubble) faultOf(from, to string) fault {
	b.mu.Lock()
	defer b.mu.Unlock()
	if from == "client" {
		return whole
	}
	return max(b.faults[from], b.faults[to])
}

func (b *bubble) dial(ctx context.Context, from, to string) (net.Conn, error) {
	switch b.faultOf(from, to) {
	case cut:
		return nil, errors.New("cut by the test")
	case black:
		<-ctx.Done()
		return nil, ctx.Err()
	}
	b.mu.Lock()
	l := b.listeners[to]
	b.mu.Unlock()
	conn, err := l.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	w := &wire{Conn: conn, b: b, from: from, to: to}
	b.mu.Lock()
	b.wires[w] = true
	b.mu.Unlock()
	return w, nil
}

// do does a fault to a node.
func (b *bubble) do(id uint64, f fault) {
	address := addressIn(id)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults[address] = f
	for w := range b.wires {
		if w.from != "client" && (w.from == address || w.to == address) {
			switch f {
			case cut:
				_ = w.Conn.Close()
			case black:
				w.lost = true // for ever: TCP does not go on behind a gap
			}
		}
	}
}

// wire is a connection, seen from where it was dialled.
type wire struct {
	net.Conn
	b        *bubble
	from, to string
	lost     bool // with b.mu
}

func (w *wire) isLost() bool {
	w.b.mu.Lock()
	defer w.b.mu.Unlock()
	return w.lost
}

func (w *wire) Write(p []byte) (int, error) {
	time.Sleep(w.b.latency)
	w.b.mu.Lock()
	w.b.sent[[2]string{w.from, w.to}]++
	lost := w.lost
	w.b.mu.Unlock()
	if lost {
		return len(p), nil
	}
	return w.Conn.Write(p)
}

func (w *wire) Read(p []byte) (int, error) {
	for {
		n, err := w.Conn.Read(p)
		if err != nil {
			return n, err
		}
		if !w.isLost() {
			time.Sleep(w.b.latency)
			return n, nil
		}
	}
}

// Close leaves the other end open if it cannot learn of the end.
func (w *wire) Close() error {
	if w.isLost() {
		return w.SetReadDeadline(time.Now())
	}
	w.b.mu.Lock()
	delete(w.b.wires, w)
	w.b.mu.Unlock()
	return w.Conn.Close()
}

// leaderAndRest returns the leader of the nodes, all settled, and the others.
func (b *bubble) leaderAndRest() (uint64, []uint64) {
	b.t.Helper()
	ids := slices.Sorted(maps.Keys(b.nodes))
	leader := b.settled(ids...)
	return leader, slices.DeleteFunc(ids, func(id uint64) bool { return id == leader })
}

// load has two clients call each of these nodes until stop is called: one
// reads, one writes. After an error they move on.
func (b *bubble) load(h *history, timeout time.Duration, ids ...uint64) (stop func()) {
	b.epoch++
	var conns []*grpc.ClientConn
	var nodes []kvpb.KVServiceClient
	for _, id := range ids {
		conn := b.client(id) // nodes may restart
		conns, nodes = append(conns, conn), append(nodes, kvpb.NewKVServiceClient(conn))
	}
	end := h.load(nodes, b.key, b.think, timeout, true)
	return sync.OnceFunc(func() {
		end()
		for _, conn := range conns {
			_ = conn.Close()
		}
	})
}

// load has two clients call each node until stop is called, and record it: one
// reads, one writes, to five keys. Those that move go to another after an error.
func (h *history) load(nodes []kvpb.KVServiceClient, key func(int) string, think, timeout time.Duration, move bool) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for client := range 2 * len(nodes) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(2, uint64(client)))
			at := client
			for i := 0; ctx.Err() == nil; i++ {
				op := registerOp{name: "get", key: key(r.IntN(5))}
				if client >= len(nodes) {
					op.name, op.value = "set", fmt.Sprintf("%d of client %d", i, client)
				}
				call, cancel := context.WithTimeout(context.Background(), timeout)
				if err := h.do(call, nodes[at%len(nodes)], client, op); err != nil && move {
					at++
				}
				cancel()
				sleep(ctx, think/2+time.Duration(r.Int64N(int64(think))))
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// key names a key of load in this epoch.
func (b *bubble) key(i int) string { return fmt.Sprintf("key %d.%d", b.epoch, i) }

// readAll reads what load has left, through a node.
func (b *bubble) readAll(h *history, via uint64) {
	b.t.Helper()
	for i := range 5 {
		if err := h.do(b.ctx, b.nodes[via], -1, registerOp{name: "get", key: b.key(i)}); err != nil {
			b.t.Fatal(err)
		}
	}
}

// longestGap is the longest time without a write being acknowledged since then.
func (h *history) longestGap(since time.Time) (gap time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var acked []int64
	for _, op := range h.ops {
		if op.Input.(registerOp).name != "get" && !op.Output.(answer).unknown && op.Return >= int64(since.Sub(h.start)) {
			acked = append(acked, op.Return)
		}
	}
	slices.Sort(acked)
	last := int64(since.Sub(h.start))
	for _, at := range append(acked, int64(time.Since(h.start))) {
		gap = max(gap, time.Duration(at-last))
		last = at
	}
	return gap
}

func TestClockIdle(t *testing.T) {
	const hours = 1
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		leader, rest := b.leaderAndRest()
		before, err := b.metrics(leader)
		if err != nil {
			t.Fatal(err)
		}
		sent := func() map[[2]string]int {
			b.mu.Lock()
			defer b.mu.Unlock()
			return maps.Clone(b.sent)
		}
		first := sent()
		time.Sleep(hours * time.Hour)
		last := sent()
		for _, id := range rest {
			for _, pair := range [][2]string{{addressIn(leader), addressIn(id)}, {addressIn(id), addressIn(leader)}} {
				if n, want := last[pair]-first[pair], hours*int(time.Hour/(500*time.Millisecond)); n < want-want/100 || n > want+want/10 {
					t.Errorf("%v: %d messages in %d hours, want %d", pair, n, hours, want)
				}
			}
		}
		after, err := b.metrics(leader)
		if err != nil || after.Term != before.Term || after.Role != kvpb.Role_ROLE_LEADER || after.LastIndex != before.LastIndex || after.MessagesDropped != before.MessagesDropped {
			t.Errorf("something has happened: %v, %v, before: %v", after, err, before)
		}
		b.works(1, 2, 3)
	}, slowHeart)
}

// slowHeart makes hours pass faster.
func slowHeart(o *options) { o.heartbeat, o.election = 500*time.Millisecond, 3*time.Second }

// TestClockLeaderGone measures how long writers on the other nodes wait when
// the leader dies: at once if its connections break, an election timeout if it
// falls silent.
func TestClockLeaderGone(t *testing.T) {
	for _, tt := range []struct {
		name string
		gone func(b *bubble, leader uint64)
		low  time.Duration
		high time.Duration
	}{
		{"killed", func(b *bubble, leader uint64) { b.kill(leader) }, 0, 150 * time.Millisecond},
		{"cut off", func(b *bubble, leader uint64) { b.do(leader, cut) }, 0, 150 * time.Millisecond},
		{"silent", func(b *bubble, leader uint64) { b.do(leader, black) }, 500 * time.Millisecond, 5 * time.Second}, // with luckless elections
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, 3, func(t *testing.T, b *bubble) {
				for range times(6) {
					leader, rest := b.leaderAndRest()
					h := newHistory()
					stop := b.load(h, 5*time.Second, rest...)
					time.Sleep(100 * time.Millisecond)
					start := time.Now()
					tt.gone(b, leader)
					time.Sleep(time.Second)
					for h.longestGap(time.Now().Add(-100*time.Millisecond)) > 50*time.Millisecond {
						time.Sleep(100 * time.Millisecond)
					}
					between(t, "without a write", h.longestGap(start), tt.low, tt.high)
					stop()
					b.readAll(h, rest[0])
					h.check(t)
					if b.do(leader, whole); b.nodes[leader] == nil {
						b.boot(leader)
					}
					time.Sleep(15 * time.Second) // until keepalive has found the connections dead
				}
			})
		})
	}
}

// TestClockStop: a node that stops hands over, and nobody notices.
func TestClockStop(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		for range times(3) {
			leader, rest := b.leaderAndRest()
			h := newHistory()
			stop := b.load(h, 5*time.Second, rest...)
			time.Sleep(100 * time.Millisecond)
			start := time.Now()
			b.stop(leader)
			between(t, "the stop", time.Since(start), 0, 2*time.Second)
			if m, err := b.metrics(rest[0]); err != nil || m.Leader == nil || m.Leader.Id == leader {
				t.Errorf("it has not handed over: %v, %v", m.GetLeader(), err)
			}
			time.Sleep(300 * time.Millisecond)
			between(t, "without a write", h.longestGap(start), 0, 30*time.Millisecond)
			stop()
			if len(h.errors) > 0 {
				t.Errorf("calls failed: %v", h.errors)
			}
			h.check(t)
			b.boot(leader)
		}
	})
}

// TestClockAway: whoever was away for an hour is back a second after its return.
func TestClockAway(t *testing.T) {
	for _, f := range []fault{cut, black} {
		t.Run(fmt.Sprint(f), func(t *testing.T) {
			inBubble(t, 3, func(t *testing.T, b *bubble) {
				for i := range times(1) {
					leader, rest := b.leaderAndRest()
					b.do(rest[0], f)
					time.Sleep(time.Hour)
					version := b.set(leader, "k", fmt.Sprint(i))
					term := b.term(leader)
					b.do(rest[0], whole)
					start := time.Now()
					eventually(t, func() error {
						for _, id := range []uint64{leader, rest[0], rest[1]} {
							m, err := b.metrics(id)
							if err != nil {
								return err
							}
							for _, member := range m.Members {
								if !member.Connected {
									return fmt.Errorf("node %d is not connected to node %d", id, member.Node.Id)
								}
							}
						}
						return nil
					})
					between(t, "until it was connected", time.Since(start), 0, time.Second)
					b.health(rest[0], "raftkv.v1.KVService", grpc_health_v1.HealthCheckResponse_SERVING)
					// A heartbeat, and a read that is asked for again if its first try
					// came before the stream to the leader.
					between(t, "until it served", time.Since(start), 0, 3500*time.Millisecond)
					b.wants(rest[0], true, "k", fmt.Sprint(i), version)
					if now := b.term(leader); now != term {
						t.Errorf("its return has moved the term from %d to %d", term, now)
					}
				}
			}, slowHeart)
		})
	}
}

func (b *bubble) term(id uint64) uint64 {
	b.t.Helper()
	m, err := b.metrics(id)
	if err != nil {
		b.t.Fatal(err)
	}
	return m.Term
}

// watch notes when a node's health changes.
func (b *bubble) watch(id uint64, name string) *healthWatch {
	w := &healthWatch{changed: time.Now()}
	conn := b.client(id)
	ctx, cancel := context.WithCancel(context.Background())
	s, err := grpc_health_v1.NewHealthClient(conn).Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: name}, grpc.WaitForReady(true))
	if err != nil {
		b.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			resp, err := s.Recv()
			if err != nil {
				return
			}
			w.mu.Lock()
			w.serving, w.changed, w.changes = resp.Status == grpc_health_v1.HealthCheckResponse_SERVING, time.Now(), w.changes+1
			w.mu.Unlock()
		}
	}()
	w.stop = func() { cancel(); <-ended; _ = conn.Close() }
	return w
}

type healthWatch struct {
	stop    func()
	mu      sync.Mutex
	serving bool
	changed time.Time
	changes int
}

// told is how often the watcher was told.
func (w *healthWatch) told() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changes
}

// wants fails the test unless the watcher was told so, so long after start.
func (w *healthWatch) wants(t *testing.T, what string, serving bool, start time.Time, low, high time.Duration) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.serving != serving {
		t.Errorf("%s: serving is %v since %v", what, w.serving, w.changed.Sub(start))
	} else {
		between(t, what, w.changed.Sub(start), low, high)
	}
}

func TestClockHealth(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		leader, rest := b.leaderAndRest()
		for _, name := range []string{"raftkv.v1.KVService", "raftkv.v1.restart"} {
			follower, other, lead := b.watch(rest[0], name), b.watch(rest[1], name), b.watch(leader, name)
			all := []*healthWatch{follower, other, lead}
			const tick = 20 * time.Millisecond
			time.Sleep(time.Minute)
			for _, w := range all {
				w.wants(t, "at rest", true, time.Now(), -time.Hour, -59*time.Second)
			}
			undisturbed := other.told()

			start := time.Now()
			b.do(rest[0], cut)
			time.Sleep(time.Minute)
			follower.wants(t, "cut off", false, start, 0, 2*tick)
			b.do(rest[0], whole)
			start = time.Now()
			time.Sleep(time.Minute)
			follower.wants(t, "back", true, start, 0, 1500*time.Millisecond)

			start = time.Now()
			b.do(rest[0], black)
			time.Sleep(time.Minute)
			follower.wants(t, "silence", false, start, 500*time.Millisecond, 1300*time.Millisecond)
			b.do(rest[0], whole)
			start = time.Now()
			time.Sleep(time.Minute)
			follower.wants(t, "back from silence", true, start, 0, 1500*time.Millisecond)

			if restart := name == restartHealth; restart {
				// With one of three away, the cluster can do without neither of the others.
				lead.wants(t, "the leader meanwhile", true, start, 0, 1500*time.Millisecond)
				if other.told() != undisturbed+4 {
					t.Errorf("the other follower's health has changed %d times", other.told()-undisturbed)
				}
			} else {
				lead.wants(t, "the leader meanwhile", true, time.Now(), -time.Hour, -4*time.Minute)
				if other.told() != undisturbed {
					t.Errorf("the other follower's health has changed %d times", other.told()-undisturbed)
				}
			}

			// A leader that nobody hears steps down.
			start = time.Now()
			b.do(leader, black)
			time.Sleep(time.Minute)
			lead.wants(t, "the leader in silence", false, start, 500*time.Millisecond, 1300*time.Millisecond)
			serves := name != restartHealth // the old leader is missed
			follower.wants(t, "under a new leader", serves, start, 0, 5*time.Second)
			b.do(leader, whole)
			start = time.Now()
			time.Sleep(time.Minute)
			lead.wants(t, "the old leader", true, start, 0, 1500*time.Millisecond)

			// One that stops says so before it is gone.
			for _, w := range all {
				w.stop()
			}
			last, _ := b.leaderAndRest()
			w := b.watch(last, name)
			time.Sleep(time.Minute)
			start = time.Now()
			b.stop(last)
			w.wants(t, "stopped", false, start, 0, 10*time.Millisecond)
			w.stop()
			b.boot(last)
			leader, rest = b.leaderAndRest()
		}
	})
}

func TestClockNoLeader(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		leader, rest := b.leaderAndRest()
		for _, id := range rest {
			b.do(id, black)
		}
		// It steps down within two election timeouts. Calls wait for 2 s from then on.
		start := time.Now()
		_, err := b.nodes[leader].Get(b.ctx, &kvpb.GetRequest{Key: "k"})
		wantError(t, err, codes.Unavailable, "NO_LEADER")
		between(t, "the wait for a leader", time.Since(start), 2500*time.Millisecond, 3500*time.Millisecond)
		time.Sleep(time.Minute)
		for _, f := range []func() error{
			func() error { _, err := b.nodes[leader].Set(b.ctx, &kvpb.SetRequest{Key: "k"}); return err },
			func() error { _, err := b.nodes[leader].Delete(b.ctx, &kvpb.DeleteRequest{Key: "k"}); return err },
			func() error { _, err := b.nodes[leader].Get(b.ctx, &kvpb.GetRequest{Key: "k"}); return err },
			func() error { _, err := b.nodes[leader].List(b.ctx, &kvpb.ListRequest{}); return err },
			func() error {
				_, err := b.nodes[leader].TransferLeader(b.ctx, &kvpb.TransferLeaderRequest{NodeId: leader})
				return err
			},
		} {
			start := time.Now()
			wantError(t, f(), codes.Unavailable, "NO_LEADER")
			between(t, "the answer that there has been none for long", time.Since(start), 0, 150*time.Millisecond) // operators look every 100
		}
		// A leader that comes in time is waited for.
		for _, id := range rest {
			b.do(id, whole)
		}
		time.Sleep(time.Minute)
		leader, rest = b.leaderAndRest()
		for _, id := range rest {
			b.do(id, cut)
		}
		eventually(t, func() error {
			if b.nodes[leader].server.n.status.latest.Load().lead != 0 {
				return errors.New("it leads")
			}
			return nil
		})
		answered := make(chan error)
		go func() {
			_, err := b.nodes[leader].Set(b.ctx, &kvpb.SetRequest{Key: "k"})
			answered <- err
		}()
		b.do(rest[0], whole)
		b.do(rest[1], whole)
		start = time.Now()
		if err := <-answered; err != nil {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
	})
}

// TestClockUnknown: a write that was sent off and never answered ends, with the
// truth about it: nobody knows.
func TestClockUnknown(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		for _, patience := range []time.Duration{300 * time.Millisecond, time.Minute} {
			leader, rest := b.leaderAndRest()
			for _, id := range rest {
				b.do(id, black)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			start := time.Now()
			_, err := b.nodes[leader].Set(ctx, &kvpb.SetRequest{Key: "k"})
			cancel()
			if patience == time.Minute {
				wantError(t, err, codes.DeadlineExceeded, "OUTCOME_UNKNOWN")
				between(t, "the wait for an outcome", time.Since(start), 1980*time.Millisecond, 4*time.Second)
			} else {
				wantError(t, err, codes.DeadlineExceeded, "OUTCOME_UNKNOWN")
				between(t, "the wait", time.Since(start), patience*3/4, patience)
			}
			for _, id := range rest {
				b.do(id, whole)
			}
			time.Sleep(time.Minute) // until keepalive has found the connections dead
		}
		b.leaderAndRest()
		b.sameStates(1, 2, 3)
	})
}

// TestClockKeepalive: a connection that went dead without a word is found.
func TestClockKeepalive(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		leader, rest := b.leaderAndRest()
		time.Sleep(time.Minute)
		start := time.Now()
		b.do(rest[0], black)
		eventually(t, func() error {
			m, err := b.metrics(leader)
			for _, member := range m.GetMembers() {
				if member.Node.Id == rest[0] && member.Connected {
					return errors.New("still connected")
				}
			}
			return err
		})
		between(t, "until the leader knew", time.Since(start), 3*time.Second, 14*time.Second)
		time.Sleep(time.Minute)
		// Half-open connections do not stay at the other end, either.
		eventually(t, func() error {
			n := b.nodes[rest[0]].server.net
			n.mu.Lock()
			defer n.mu.Unlock()
			if len(n.inbound) > 0 {
				return fmt.Errorf("%d streams are still heard", len(n.inbound))
			}
			return nil
		})
		b.do(rest[0], whole)
		b.leaderAndRest()
	})
}

// TestClockRolling restarts nodes without a disk, one after the other, each
// when the health name raftkv.v1.restart says so on all.
func TestClockRolling(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		h := newHistory()
		b.think = 50 * time.Millisecond
		stop := b.load(h, 5*time.Second, 1, 2, 3)
		for i := range uint64(times(9)) {
			id := 1 + i%3
			for other := range b.nodes {
				b.health(other, restartHealth, grpc_health_v1.HealthCheckResponse_SERVING)
			}
			start := time.Now()
			if b.stop(id); i%2 == 0 {
				time.Sleep(time.Duration(rand.IntN(2000)) * time.Millisecond)
			}
			b.boot(id)
			b.leaderAndRest()
			between(t, "a restart", time.Since(start), 0, 8*time.Second)
			h.floor(t, 30)
		}
		stop()
		b.readAll(h, 1)
		h.check(t)
		b.sameStates(1, 2, 3)
	})
}

// TestClockFaults breaks something every now and then.
func TestClockFaults(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		r := rand.New(rand.NewPCG(3, 3))
		b.think = 50 * time.Millisecond
		for range times(1) {
			h := newHistory()
			stop := b.load(h, time.Second, 1, 2, 3)
			start := time.Now()
			for time.Since(start) < time.Minute {
				id := 1 + r.Uint64N(3)
				switch r.IntN(3) {
				case 0:
					b.do(id, cut)
				case 1:
					b.do(id, black)
				case 2:
					b.kill(id)
				}
				time.Sleep(time.Duration(r.IntN(4000)) * time.Millisecond)
				if b.do(id, whole); b.nodes[id] == nil {
					b.boot(id)
				}
				b.leaderAndRest()
				h.floor(t, 20)
			}
			stop()
			b.readAll(h, 1)
			h.check(t)
			b.sameStates(1, 2, 3)
		}
	})
}
