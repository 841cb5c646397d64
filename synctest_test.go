// The real stack, gRPC included, in a bubble of testing/synctest: its clock
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
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"raft-key-value/kvpb"
)

// bubble is a cluster in memory, and the network between its nodes.
type bubble struct {
	*testCluster
	latency time.Duration // of each write and each read of a connection

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

// inBubble calls f with nodes 1 to n that are a cluster.
func inBubble(t *testing.T, n uint64, f func(*bubble), set ...func(*options)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bubble{
			testCluster: &testCluster{t: t, ctx: t.Context(), nodes: map[uint64]*testNode{}}, latency: time.Millisecond,
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
		f(b)
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
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	ready := make(chan *server, 1)
	log := slog.New(slog.NewTextHandler(b.t.Output(), nil)).With("node", id)
	go func() { n.ended <- run(ctx, o, log, func(s *server) { ready <- s }) }()
	n.server = <-ready
	n.conn = b.client(id)
	n.KVServiceClient, n.ClusterServiceClient = kvpb.NewKVServiceClient(n.conn), kvpb.NewClusterServiceClient(n.conn)
	b.nodes[id] = n
}

// client is a connection from outside.
func (b *bubble) client(id uint64) *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///"+addressIn(id),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithIdleTimeout(0),
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
// reads, one writes, every 5 ms or so. After an error they move on.
func (b *bubble) load(h *history, timeout time.Duration, ids ...uint64) (stop func()) {
	conns := make([]*grpc.ClientConn, len(ids))
	for i, id := range ids {
		conns[i] = b.client(id) // nodes may restart
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for client := range 2 * len(ids) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(2, uint64(client)))
			at := client
			for i := 0; ctx.Err() == nil; i++ {
				op := operation{name: "get", key: fmt.Sprint("key ", r.IntN(5))}
				if client >= len(ids) {
					op.name, op.value = "set", fmt.Sprintf("%d of client %d", i, client)
				}
				call, cancel := context.WithTimeout(context.Background(), timeout)
				if err := h.do(call, kvpb.NewKVServiceClient(conns[at%len(ids)]), client, op); err != nil {
					at++
				}
				cancel()
				sleep(ctx, 4*time.Millisecond+time.Duration(r.IntN(2000))*time.Microsecond)
			}
		})
	}
	return sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		for _, conn := range conns {
			_ = conn.Close()
		}
	})
}

// longestGap is the longest time without a write being acknowledged since then.
func (h *history) longestGap(since time.Time) (gap time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var acked []int64
	for _, op := range h.ops {
		if op.Input.(operation).name != "get" && !op.Output.(answer).unknown && op.Return >= int64(since.Sub(h.start)) {
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

// between fails the test unless d is.
func between(t *testing.T, what string, d, low, high time.Duration) {
	t.Helper()
	if d < low || d > high {
		t.Errorf("%s: %v, not between %v and %v", what, d, low, high)
	}
}

func TestClockIdle(t *testing.T) {
	const hours = 2
	inBubble(t, 3, func(b *bubble) {
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
	}, func(o *options) { o.heartbeat, o.election = 500*time.Millisecond, 3*time.Second })
}
