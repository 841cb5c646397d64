// Nodes in one process, each started by run as main starts it, that talk over
// loopback: the clusters that many tests use, the load on them, and the check that what
// clients saw is linearizable. And tests of a whole cluster.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// testCluster is a set of nodes that may form one cluster, or several.
type testCluster struct {
	t       *testing.T
	ctx     context.Context // ends with the test
	options func(*options)
	nodes   map[uint64]*testNode
	wires   wires
	pki     string    // the directory of certificates, for TLS; empty: there is none
	log     io.Writer // of nodes started from now on; nil: the test's
}

// testNode is a process, as it were, and stubs to it.
type testNode struct {
	kvpb.KVServiceClient
	kvpb.ClusterServiceClient
	id      uint64
	address string
	conn    *grpc.ClientConn
	server  *server
	cancel  context.CancelFunc
	ended   chan error
}

// goroutines returns what reports those that this test, and they, have started
// from here on. They have a label, which they inherit, for other tests run
// beside this one.
func goroutines(t *testing.T) (left func() error) {
	label := t.Name()
	pprof.SetGoroutineLabels(pprof.WithLabels(t.Context(), pprof.Labels("test", label)))
	count := func() (n int, stacks string) {
		var b strings.Builder
		_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
		for stack := range strings.SplitSeq(b.String(), "\n\n") {
			if strings.Contains(stack, fmt.Sprintf("%q:%q", "test", label)) && !strings.Contains(stack, ".goroutines.func1") { // which counts
				count := 0
				_, _ = fmt.Sscanf(stack, "%d @", &count)
				n, stacks = n+count, stacks+stack+"\n\n"
			}
		}
		return n, stacks
	}
	before, _ := count()
	return func() error {
		if now, stacks := count(); now > before {
			return fmt.Errorf("%d goroutines, %d before:\n%s", now, before, stacks)
		}
		return nil
	}
}

// newCluster starts nodes 1 to n, in no cluster yet.
func newCluster(t *testing.T, n uint64, set ...func(*options)) *testCluster {
	t.Helper()
	left := goroutines(t)
	c := &testCluster{t: t, ctx: t.Context(), nodes: map[uint64]*testNode{}}
	c.options = func(o *options) {
		o.heartbeat, o.election, o.redial = 20*time.Millisecond, 250*time.Millisecond, 20*time.Millisecond
		for _, f := range set {
			f(o)
		}
	}
	t.Cleanup(func() {
		for _, n := range c.nodes {
			n.cancel() // all at once: nobody is left to hand over to
		}
		for id := range c.nodes {
			c.stop(id)
		}
		eventually(t, func() error {
			return left()
		})
	})
	for id := range n {
		c.start(id+1, "127.0.0.1:0")
	}
	return c
}

// newDurable starts nodes 1 to n, each with a directory of its own below dir.
func newDurable(t *testing.T, n uint64, set ...func(*options)) (c *testCluster, dir func(uint64) string) {
	t.Helper()
	parent := t.TempDir()
	dir = func(id uint64) string { return filepath.Join(parent, fmt.Sprint(id)) }
	return newCluster(t, n, append(set, func(o *options) { o.durable, o.dataDir = true, dir(o.id) })...), dir
}

// inMemory undoes newDurable for a node.
func inMemory(o *options) { o.durable, o.dataDir = false, "" }

// also changes the options of nodes that are started from now on, and leaves all others as
// newCluster has them.
func (c *testCluster) also(set func(*options)) {
	before := c.options
	c.options = func(o *options) {
		before(o)
		set(o)
	}
}

// start runs a node on an address.
func (c *testCluster) start(id uint64, address string) *testNode {
	c.t.Helper()
	if address == "127.0.0.1:0" {
		address = deadAddress(c.t) // it stays this node's while that is down
	}
	var l net.Listener
	eventually(c.t, func() (err error) { l, err = net.Listen("tcp", address); return err })
	n := &testNode{id: id, address: l.Addr().String(), ended: make(chan error, 1)}
	o := defaultOptions()
	o.id = id
	c.options(&o)
	o.addr, o.listener, o.dialer = n.address, l, c.wires.dialer(n.address)
	if c.pki != "" {
		o.tls = testFiles(c.pki, fmt.Sprintf("node%d", id))
	}
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	ready := make(chan *server, 1)
	log := slog.New(slog.NewTextHandler(cmp.Or(c.log, c.t.Output()), nil)).With("node", id)
	go func() { n.ended <- run(ctx, o, log, func(s *server) { ready <- s }) }()
	select {
	case n.server = <-ready:
	case err := <-n.ended:
		c.t.Fatal(err)
	}
	n.conn = dialNode(c.t, n.address, testCredentials(c.t, c.pki, "admin", n.address))
	n.KVServiceClient, n.ClusterServiceClient = kvpb.NewKVServiceClient(n.conn), kvpb.NewClusterServiceClient(n.conn)
	c.nodes[id] = n
	return n
}

// dialNode makes a connection as any client would; calls end in any case.
func dialNode(t *testing.T, address string, by credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(by),
		grpc.WithNoProxy(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}, MinConnectTimeout: rpcTimeout}),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if _, ok := ctx.Deadline(); !ok {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, rpcTimeout)
				defer cancel()
			}
			return invoke(ctx, method, req, reply, cc, opts...)
		}))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// stop ends a node as SIGTERM does.
func (c *testCluster) stop(id uint64) {
	c.t.Helper()
	n := c.nodes[id]
	n.cancel()
	if err := <-n.ended; err != nil {
		c.t.Errorf("node %d ended with: %v", id, err)
	}
	_ = n.conn.Close()
	delete(c.nodes, id)
}

// restart stops a node and starts another process with its id and address.
func (c *testCluster) restart(id uint64) {
	c.t.Helper()
	address := c.nodes[id].address
	c.stop(id)
	c.start(id, address)
}

// kill ends a node without a word to anybody, as far as that can be had in one
// process: its connections close, and it does not hand over.
func (c *testCluster) kill(id uint64) {
	c.t.Helper()
	n := c.nodes[id]
	n.server.grpc.Stop()
	err := <-n.ended
	if errors.Is(err, grpc.ErrServerStopped) {
		err = nil // it had only begun
	}
	n.ended <- err // for stop
	c.stop(id)
}

// killed kills a node and starts another process with its id and address.
func (c *testCluster) killed(id uint64) {
	c.t.Helper()
	address := c.nodes[id].address
	c.kill(id)
	c.start(id, address)
}

// hold keeps a node's loop busy: its streams stay open, but it answers nothing.
func (c *testCluster) hold(id uint64) (release func()) {
	c.t.Helper()
	held, goOn := make(chan struct{}), make(chan struct{})
	c.nodes[id].server.n.inbox.event(func() { close(held); <-goOn })
	<-held
	release = sync.OnceFunc(func() { close(goOn) })
	c.t.Cleanup(release) // before the nodes are stopped
	return release
}

// inLoop polls a condition in a node's loop.
func (c *testCluster) inLoop(id uint64, f func(*node) error) {
	c.t.Helper()
	n := c.nodes[id].server.n
	eventually(c.t, func() error { return n.do(c.ctx, func() error { return f(n) }) })
}

// proto returns nodes as the API names them.
func (c *testCluster) proto(ids ...uint64) []*kvpb.Node {
	var nodes []*kvpb.Node
	for _, id := range ids {
		nodes = append(nodes, &kvpb.Node{Id: id, Address: c.nodes[id].address})
	}
	return nodes
}

// init makes a cluster by calling the first of its members.
func (c *testCluster) init(ids ...uint64) {
	c.t.Helper()
	c.done(func() error {
		_, err := c.nodes[ids[0]].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(ids...)})
		return err
	})
	c.settled(ids...)
}

// addLearner adds a running node by calling another.
func (c *testCluster) addLearner(via, id uint64) {
	c.t.Helper()
	c.done(func() error {
		_, err := c.nodes[via].AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: c.proto(id)[0]})
		return err
	})
}

// change changes the voters by calling a node.
func (c *testCluster) change(via uint64, req *kvpb.ChangeMembershipRequest) {
	c.t.Helper()
	c.done(func() error {
		_, err := c.nodes[via].ChangeMembership(c.ctx, req)
		return err
	})
}

// done makes a request of an operator. On a busy machine a heartbeat may be
// late enough for an election or for a learner to be behind, or for a member to seem
// silent while the change is on its way, or the connection to the node may take too long, and the
// request is made again; no other refusal is accepted.
func (c *testCluster) done(f func() error) {
	c.t.Helper()
	busy := []string{"NOT_CAUGHT_UP", "UNREACHABLE", "NO_LEADER", "NOT_LEADER", "OUTCOME_UNKNOWN"}
	eventually(c.t, func() error {
		err := f()
		reason := reasonOf(err)
		isNotConnected := reason == "" && status.Code(err) == codes.Unavailable
		if err != nil && !isNotConnected && !slices.Contains(busy, reason) {
			c.t.Fatal(err)
		}
		return err
	})
}

// transfer makes a voter the leader.
func (c *testCluster) transfer(via, to uint64) {
	c.t.Helper()
	c.done(func() error {
		_, err := c.nodes[via].TransferLeader(c.ctx, &kvpb.TransferLeaderRequest{NodeId: to})
		return err
	})
	eventually(c.t, func() error {
		if m, err := c.metrics(to); err != nil || m.Role != kvpb.Role_ROLE_LEADER {
			return fmt.Errorf("node %d does not lead: %v, %v", to, m, err)
		}
		return nil
	})
}

// startLogged begins a cluster with node 1, and returns the log of that node.
func startLogged(t *testing.T, set ...func(*options)) (*testCluster, *lockedBuffer) {
	t.Helper()
	c := newCluster(t, 0, set...)
	log := &lockedBuffer{}
	c.log = log
	c.start(1, "127.0.0.1:0")
	c.log = nil
	return c, log
}

// TestFreshNodeSaysWait: whoever starts a node again, which has lost all it had, is not told to
// make a second cluster.
func TestFreshNodeSaysWait(t *testing.T) {
	t.Parallel()
	_, log := startLogged(t)
	wantPart(t, log.String(), "if it was a member of one before, wait, and do not init")
}

// patient keeps the cluster from electing another leader by itself.
func patient(o *options) { o.election = o.heartbeat * 500 }

// steady keeps a leader, and members alive to it, while a busy machine halts a node for less than
// two seconds.
func steady(o *options) { o.election = 2 * time.Second }

// metrics returns a node's metrics, or nil.
func (c *testCluster) metrics(id uint64) (*kvpb.MetricsResponse, error) {
	return c.nodes[id].Metrics(c.ctx, &kvpb.MetricsRequest{})
}

// health waits until a node's health service says so of a name.
func (c *testCluster) health(id uint64, name string, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
	c.t.Helper()
	eventually(c.t, func() error {
		resp, err := grpc_health_v1.NewHealthClient(c.nodes[id].conn).Check(c.ctx, &grpc_health_v1.HealthCheckRequest{Service: name})
		if err == nil && resp.Status != want {
			err = fmt.Errorf("node %d says %v of %q", id, resp.Status, name)
		}
		return err
	})
}

// settled waits until the nodes are the voters of one cluster, agree on the
// leader, and are healthy. It returns the leader.
func (c *testCluster) settled(ids ...uint64) (leader uint64) {
	c.t.Helper()
	eventually(c.t, func() error {
		leader = 0
		for _, id := range ids {
			m, err := c.metrics(id)
			if err != nil {
				return err
			}
			if leader == 0 {
				leader = m.GetLeader().GetId()
			}
			if voters, _ := membersOf(m); !slices.Equal(voters, slices.Sorted(slices.Values(ids))) || m.Joint || leader == 0 || m.GetLeader().GetId() != leader || !m.Healthy {
				return fmt.Errorf("node %d: %v", id, m)
			}
		}
		if m, err := c.metrics(leader); err != nil || m.Role != kvpb.Role_ROLE_LEADER {
			return fmt.Errorf("node %d does not lead: %v %v", leader, m, err)
		}
		return nil
	})
	return leader
}

// acknowledges waits until the leader knows that a member has all of its log.
func (c *testCluster) acknowledges(leader, id uint64) {
	c.t.Helper()
	eventually(c.t, func() error {
		m, err := c.metrics(leader)
		if err != nil {
			return err
		}
		for _, s := range m.Members {
			if s.Node.Id == id && s.Progress.GetMatchIndex() == m.LastIndex {
				return nil
			}
		}
		return fmt.Errorf("node %d: %v", leader, m)
	})
}

// uninitialized waits until nodes are in no cluster.
func (c *testCluster) uninitialized(ids ...uint64) {
	c.t.Helper()
	for _, id := range ids {
		eventually(c.t, func() error {
			m, err := c.metrics(id)
			if err == nil && (m.Role != kvpb.Role_ROLE_UNINITIALIZED || m.ClusterId != 0 || len(m.Members) > 0) {
				err = fmt.Errorf("node %d: %v", id, m)
			}
			return err
		})
	}
}

// when waits for a leader for which cond holds. What the function that it
// returns is given happens before that leader does anything else.
func (c *testCluster) when(cond func(*node) bool) func(then func()) {
	ctx, cancel := context.WithTimeout(c.ctx, pollDeadline)
	var once sync.Once
	reached, goOn := make(chan struct{}), make(chan struct{})
	for _, tn := range c.nodes {
		n := tn.server.n
		wait := &pendingRequest{ctx: ctx, done: make(chan error, 1), poll: func() (bool, error) {
			if !n.leads() || !cond(n) {
				return false, nil
			}
			once.Do(func() { close(reached); <-goOn })
			return true, nil
		}}
		n.inbox.event(func() { n.calls.requests = append(n.calls.requests, wait) })
	}
	return func(then func()) {
		c.t.Helper()
		defer cancel()
		defer close(goOn)
		select {
		case <-reached:
			then()
		case <-ctx.Done():
			c.t.Fatal("it never came to that")
		}
	}
}

// livesOf is a condition for when: so many raft IDs are a node's.
func livesOf(id uint64, want int) func(*node) bool {
	return func(n *node) bool { return len(n.store.raftIDsOf(id)) == want }
}

// membersOf returns the ids of voters and learners, sorted.
func membersOf(m *kvpb.MetricsResponse) (voters, learners []uint64) {
	for _, ms := range m.Members {
		if ms.Voter {
			voters = append(voters, ms.Node.Id)
		}
		if ms.Learner {
			learners = append(learners, ms.Node.Id)
		}
	}
	return voters, learners
}

// raftIDs returns the raft IDs that nodes go by.
func (c *testCluster) raftIDs(ids ...uint64) (raftIDs []uint64) {
	c.t.Helper()
	for _, id := range ids {
		m, err := c.metrics(id)
		if err != nil || !m.Durable {
			c.t.Fatal(m, err)
		}
		raftIDs = append(raftIDs, m.RaftId)
	}
	return raftIDs
}

// addressOf returns the address at which the others know a node.
func (c *testCluster) addressOf(via, id uint64) (address string) {
	c.t.Helper()
	m, err := c.metrics(via)
	for _, member := range m.GetMembers() {
		if member.Node.Id == id {
			address = member.Node.Address
		}
	}
	if address == "" {
		c.t.Fatalf("node %d does not know node %d: %v, %v", via, id, m, err)
	}
	return address
}

// ends waits until a node has stopped by itself, and checks that it says so.
func (c *testCluster) ends(id uint64, cause error, words ...string) {
	c.t.Helper()
	n := c.nodes[id]
	defer n.conn.Close()
	delete(c.nodes, id)
	select {
	case err := <-n.ended:
		if !errors.Is(err, cause) {
			c.t.Fatalf("it ended with %v", err)
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				c.t.Errorf("%v\ndoes not say %q", err, w)
			}
		}
	case <-time.After(pollDeadline):
		n.cancel()
		c.t.Fatal("it goes on")
	}
}

// set writes through a node and returns the version.
func (c *testCluster) set(via uint64, key, value string) uint64 {
	c.t.Helper()
	resp, err := c.nodes[via].Set(c.ctx, &kvpb.SetRequest{Key: key, Value: []byte(value)})
	if err != nil {
		c.t.Fatalf("Set(%q) through node %d: %v", key, via, err)
	}
	return resp.Version
}

// fill writes n values of 64 KiB.
func (c *testCluster) fill(via uint64, n int) {
	c.t.Helper()
	value := strings.Repeat("x", 64<<10)
	for i := range n {
		c.set(via, fmt.Sprint("large ", i), value)
	}
}

func getError(c *testCluster, via uint64, local bool) error {
	_, err := c.nodes[via].Get(c.ctx, &kvpb.GetRequest{Key: "k", Local: local})
	return err
}

// wants reads through a node, at once and once only.
func (c *testCluster) wants(via uint64, local bool, key, value string, version uint64) {
	c.t.Helper()
	resp, err := c.nodes[via].Get(c.ctx, &kvpb.GetRequest{Key: key, Local: local})
	if err != nil || resp.Value == nil || string(resp.Value) != value || resp.Version != version {
		c.t.Fatalf("Get(%q, local %v) through node %d = %v, %v; want %q of version %d", key, local, via, resp, err, value, version)
	}
}

// wantsAbsent is wants for a key that is not there.
func (c *testCluster) wantsAbsent(via uint64, key string) {
	c.t.Helper()
	resp, err := c.nodes[via].Get(c.ctx, &kvpb.GetRequest{Key: key})
	if err != nil || resp.Value != nil || resp.Version != 0 {
		c.t.Fatalf("Get(%q) through node %d = %v, %v; want that it is absent", key, via, resp, err)
	}
}

// works writes and reads through nodes.
func (c *testCluster) works(ids ...uint64) {
	c.t.Helper()
	for i, id := range ids {
		value := fmt.Sprint(rand.Uint64())
		version := c.set(id, "works", value)
		c.wants(id, true, "works", value, version)
		c.wants(ids[(i+1)%len(ids)], false, "works", value, version)
	}
}

// listAll lists page by page.
func (c *testCluster) listAll(via uint64, req *kvpb.ListRequest) (items []*kvpb.KeyValue, pages int, err error) {
	req = proto.CloneOf(req)
	for {
		resp, err := c.nodes[via].List(c.ctx, req)
		if err != nil {
			return nil, 0, err
		}
		items, pages = append(items, resp.Items...), pages+1
		if resp.NextPageToken == "" {
			return items, pages, nil
		}
		if len(resp.Items) == 0 || resp.NextPageToken < req.PageToken {
			return nil, 0, fmt.Errorf("page %d goes back to %q: %v", pages, resp.NextPageToken, resp)
		}
		req.PageToken = resp.NextPageToken
	}
}

// sentSnapshots is what all nodes that live count together.
func (c *testCluster) sentSnapshots() (sent uint64) {
	c.t.Helper()
	for id := range c.nodes {
		m, err := c.metrics(id)
		if err != nil {
			c.t.Fatal(err)
		}
		sent += m.SnapshotsSent
	}
	return sent
}

// dump returns a node's state: what the snapshot of it would say. This is the
// only helper that reaches into a node.
func (c *testCluster) dump(id uint64) (*kvpb.SnapshotHeader, []byte) {
	c.t.Helper()
	n := c.nodes[id].server.n
	var v *view
	if err := n.do(c.ctx, func() error { v = n.store.openView(); return nil }); err != nil {
		c.t.Fatal(err)
	}
	defer v.close()
	var b bytes.Buffer
	if err := v.writeTo(&b); err != nil {
		c.t.Fatal(err)
	}
	var rec kvpb.SnapshotRecord
	records := bufio.NewReader(newFrameReader(&b))
	if err := protodelim.UnmarshalFrom(records, &rec); err != nil {
		c.t.Fatal(err)
	}
	rest, err := io.ReadAll(records)
	if err != nil {
		c.t.Fatal(err)
	}
	return rec.GetHeader(), rest
}

// sameStates waits until nodes have applied the same index, and then compares
// all of their states.
func (c *testCluster) sameStates(ids ...uint64) {
	c.t.Helper()
	eventually(c.t, func() error {
		h0, rest0 := c.dump(ids[0])
		for _, id := range ids[1:] {
			h, rest := c.dump(id)
			if h.Index != h0.Index {
				return fmt.Errorf("node %d has applied %d, node %d %d", ids[0], h0.Index, id, h.Index)
			}
			if !proto.Equal(h, h0) || !bytes.Equal(rest, rest0) {
				c.t.Fatalf("nodes %d and %d differ at index %d: %v, %v", ids[0], id, h.Index, h0, h)
			}
		}
		return nil
	})
}

// wires are the connections between nodes, which tests can cut.
type wires struct {
	mu    sync.Mutex
	isCut map[string]bool
	conns map[net.Conn][2]string
	dials func(ctx context.Context, from, to string) // called before each dial; nil: nothing is
}

func (w *wires) dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, to string) (net.Conn, error) {
		w.mu.Lock()
		dials := w.dials
		w.mu.Unlock()
		if dials != nil {
			dials(ctx, from, to)
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", to)
		if err != nil {
			return nil, err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.isCut[from] || w.isCut[to] {
			_ = conn.Close()
			return nil, errors.New("cut by the test")
		}
		if w.conns == nil {
			w.conns = map[net.Conn][2]string{}
		}
		w.conns[conn] = [2]string{from, to}
		return conn, nil
	}
}

// cut separates a node from all others, but not from clients.
func (c *testCluster) cut(id uint64) { c.cutOff(c.nodes[id].address) }

// cutOff cuts the node at an address off, also one that has yet to start there.
func (c *testCluster) cutOff(address string) {
	w := &c.wires
	w.mu.Lock()
	defer w.mu.Unlock()
	w.isCut = map[string]bool{address: true}
	w.breakAll(address)
}

// breakAll breaks all connections of a node; w.mu is held.
func (w *wires) breakAll(address string) {
	maps.DeleteFunc(w.conns, func(conn net.Conn, ends [2]string) bool {
		if ends[0] == address || ends[1] == address {
			_ = conn.Close()
			return true
		}
		return false
	})
}

func (c *testCluster) heal() {
	c.wires.mu.Lock()
	defer c.wires.mu.Unlock()
	c.wires.isCut = nil
}

// deadAddress returns an address where nobody listens until the test does: a socket that is bound
// to it keeps the system from choosing its port for another test.
func deadAddress(t testing.TB) string {
	t.Helper()
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(socket) })
	syscall.CloseOnExec(socket)
	if err := syscall.SetsockoptInt(socket, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(socket, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	address, err := syscall.Getsockname(socket)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", address.(*syscall.SockaddrInet4).Port)
}

// TestDeadAddressIsKept: the system gives its port to nobody, and a node can still listen there.
func TestDeadAddressIsKept(t *testing.T) {
	t.Parallel()
	address := deadAddress(t)
	if conn, err := net.Dial("tcp", address); err == nil {
		_ = conn.Close()
		t.Error("somebody listens there")
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
}

// registerOp and answer are what a history consists of.
type registerOp struct{ name, key, value string }

type answer struct {
	unknown bool // whether it was, or ever will be, done
	present bool // before a delete, or when it was read
	value   string
	version uint64
}

// register is the state of one key; version 0: not known.
type register struct {
	present bool
	value   string
	version uint64
}

// registers is what clients may see: each key is a register, whose writes have
// growing versions.
var registers = porcupine.Model{
	Partition: func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
		byKey := map[string][]porcupine.Operation{}
		for _, op := range history {
			key := op.Input.(registerOp).key
			byKey[key] = append(byKey[key], op)
		}
		for _, key := range slices.Sorted(maps.Keys(byKey)) {
			parts = append(parts, byKey[key])
		}
		return parts
	},
	Init: func() any { return register{} },
	Step: func(state, input, output any) (bool, any) {
		s, in, out := state.(register), input.(registerOp), output.(answer)
		switch in.name {
		case "get":
			if out.present != s.present || s.present && (out.value != s.value || s.version != 0 && out.version != s.version) {
				return false, s
			}
			if s.present {
				s.version = out.version
			}
			return true, s
		case "set":
			return out.unknown || out.version > s.version, register{true, in.value, out.version}
		default:
			return out.unknown || out.present == s.present && out.version > s.version, register{version: out.version}
		}
	},
}

// history records what clients did and saw.
type history struct {
	start  time.Time
	mu     sync.Mutex
	ops    []porcupine.Operation
	acked  int
	errors map[string]int
}

func newHistory() *history { return &history{start: time.Now(), errors: map[string]int{}} }

// do makes a call and records it. A write that failed may take effect at any
// time, unless the answer says that it will not.
func (h *history) do(ctx context.Context, kv kvpb.KVServiceClient, client int, in registerOp) error {
	var out answer
	var err error
	called := time.Since(h.start)
	switch in.name {
	case "get":
		var resp *kvpb.GetResponse
		resp, err = kv.Get(ctx, &kvpb.GetRequest{Key: in.key})
		out = answer{present: resp.GetValue() != nil, value: string(resp.GetValue()), version: resp.GetVersion()}
	case "set":
		var resp *kvpb.SetResponse
		resp, err = kv.Set(ctx, &kvpb.SetRequest{Key: in.key, Value: []byte(in.value)})
		out.version = resp.GetVersion()
	case "delete":
		var resp *kvpb.DeleteResponse
		resp, err = kv.Delete(ctx, &kvpb.DeleteRequest{Key: in.key})
		out = answer{present: resp.GetDeleted(), version: resp.GetVersion()}
	}
	returned := int64(time.Since(h.start))
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		h.acked++
	} else {
		reason := reasonOf(err)
		h.errors[strings.TrimSpace(status.Code(err).String()+" "+reason)]++
		if in.name == "get" || reason != "" && reason != "OUTCOME_UNKNOWN" {
			return err
		}
		out, returned = answer{unknown: true}, math.MaxInt64
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Call: int64(called), Output: out, Return: returned})
	return err
}

// floor waits until so many more calls have succeeded.
func (h *history) floor(t *testing.T, more int) {
	t.Helper()
	count := func() int {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.acked
	}
	enough := count() + more
	eventually(t, func() error {
		if n := count(); n < enough {
			return fmt.Errorf("only %d of %d calls succeeded", n, enough)
		}
		return nil
	})
}

// check fails the test unless the history is linearizable.
func (h *history) check(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	t.Logf("%d operations, errors: %v", len(h.ops), h.errors)
	for _, part := range registers.Partition(h.ops) {
		if result := porcupine.CheckOperationsTimeout(registers, part, pollDeadline); result != porcupine.Ok {
			slices.SortFunc(part, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
			for _, op := range part {
				t.Logf("client %d %+v: [%v, %v] %+v", op.ClientId, op.Input, time.Duration(op.Call), time.Duration(op.Return), op.Output)
			}
			t.Fatalf("linearizable: %v", result)
		}
	}
	if !t.Failed() {
		versions := map[uint64]bool{}
		for _, op := range h.ops {
			if v := op.Output.(answer).version; op.Input.(registerOp).name != "get" && v != 0 {
				if versions[v] {
					t.Errorf("two writes have version %d", v)
				}
				versions[v] = true
			}
		}
	}
}

// load has clients call nodes until stop is called, two on each. One of them
// only reads, so that somebody does while the other waits for a write. Clients
// that move try another node after an error.
func (c *testCluster) load(h *history, timeout time.Duration, move bool, ids ...uint64) (stop func()) {
	c.t.Helper()
	var stubs []kvpb.KVServiceClient
	var conns []*grpc.ClientConn
	for _, id := range ids { // of its own: nodes may restart
		conns = append(conns, dialNode(c.t, c.nodes[id].address, testCredentials(c.t, c.pki, "client", c.nodes[id].address)))
		stubs = append(stubs, kvpb.NewKVServiceClient(conns[len(conns)-1]))
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	for client := range 2 * len(ids) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(client)))
			at := client
			names := []string{"get", "set", "set", "delete"}[:1+3*(client/len(ids))]
			for i := 0; ; i++ {
				select {
				case <-end:
					return
				default:
				}
				op := registerOp{name: names[r.IntN(len(names))], key: fmt.Sprint("key ", r.IntN(5))}
				if op.name == "set" {
					op.value = fmt.Sprintf("%d of client %d", i, client)
				}
				ctx, cancel := context.WithTimeout(context.Background(), timeout)
				if err := h.do(ctx, stubs[at%len(stubs)], client, op); err != nil && move {
					at++
				}
				cancel()
			}
		})
	}
	return sync.OnceFunc(func() {
		close(end)
		wg.Wait()
		for _, conn := range conns {
			_ = conn.Close()
		}
	})
}

// readAll reads what is left in the end, through a node.
func (c *testCluster) readAll(h *history, via uint64) {
	c.t.Helper()
	for key := range 5 {
		if err := h.do(c.ctx, c.nodes[via], -1, registerOp{name: "get", key: fmt.Sprint("key ", key)}); err != nil {
			c.t.Fatal(err)
		}
	}
}

func TestCluster(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1)
	alone := c.set(1, "alone", "1")
	for id := uint64(2); id <= 3; id++ {
		c.addLearner(id-1, id)
		if m, err := c.metrics(id); err != nil || m.Role != kvpb.Role_ROLE_LEARNER || m.Version < alone {
			t.Fatalf("AddLearner %d has not waited for it: %v, %v", id, m, err)
		}
		m, err := c.metrics(1)
		if err != nil {
			t.Fatal(err)
		}
		if voters, learners := membersOf(m); !slices.Equal(voters, []uint64{1}) || !slices.Contains(learners, id) {
			t.Fatalf("after AddLearner %d: %v", id, m)
		}
	}
	c.wants(3, false, "alone", "1", alone)
	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
	c.settled(1, 2, 3)

	// A write through any node is seen at once: there locally, elsewhere by a
	// linearizable read. Often enough for a node that has not applied it yet.
	version := alone
	for i := range 30 {
		via := uint64(1 + i%3)
		value := fmt.Sprint(i)
		if got := c.set(via, "k", value); got != version+1 {
			t.Fatalf("write %d has version %d, the one before %d", i, got, version)
		}
		version++
		c.wants(via, true, "k", value, version)
		for reader := uint64(1); reader <= 3; reader++ {
			c.wants(reader, false, "k", value, version)
		}
	}
	version = c.set(2, "empty", "")
	for id := uint64(1); id <= 3; id++ {
		c.wants(id, false, "empty", "", version)
		c.wantsAbsent(id, "absent")
	}
	listed := &kvpb.ListResponse{Items: []*kvpb.KeyValue{{Key: "empty", Version: version}}, Version: version}
	for id := uint64(1); id <= 3; id++ {
		if got, err := c.nodes[id].List(c.ctx, &kvpb.ListRequest{Prefix: "e"}); err != nil || !proto.Equal(got, listed) {
			t.Fatalf("List through node %d = %v, %v, want %v", id, got, err, listed)
		}
	}
	for i, want := range []*kvpb.DeleteResponse{{Deleted: true, Version: version + 1}, {Version: version + 2}} {
		if got, err := c.nodes[uint64(1+i)].Delete(c.ctx, &kvpb.DeleteRequest{Key: "empty"}); err != nil || !proto.Equal(got, want) {
			t.Fatalf("Delete = %v, %v, want %v", got, err, want)
		}
	}
	c.wantsAbsent(3, "empty")
	// The limits themselves are within them.
	big := strings.Repeat("x", 1<<20)
	c.wants(1, false, big[:64<<10], big, c.set(3, big[:64<<10], big))

	for _, to := range []uint64{2, 1} {
		c.transfer(1+to%3, to)
		c.works(1, 2, 3)
	}

	// Remove, add again. Whom its cluster has removed knows nothing any more.
	c.change(2, &kvpb.ChangeMembershipRequest{Remove: []uint64{2}})
	c.uninitialized(2)
	wantError(t, getError(c, 2, true), codes.Unavailable, "NOT_INITIALIZED")
	c.works(1, 3)
	c.addLearner(3, 2)
	c.change(3, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
	c.works(1, 2, 3)
	// A voter becomes a learner, a learner leaves.
	c.settled(1, 2, 3)
	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 3}, Retain: true})
	if m, err := c.metrics(c.settled(1, 3)); err != nil {
		t.Fatal(err)
	} else if _, learners := membersOf(m); !slices.Equal(learners, []uint64{2}) {
		t.Fatalf("a retained voter is no learner: %v", m)
	}
	c.works(1, 2, 3)
	c.change(2, &kvpb.ChangeMembershipRequest{Remove: []uint64{2}})
	c.uninitialized(2)
	c.addLearner(1, 2)
	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})

	// A leader that removes itself hands over: had it not, it could not answer.
	leader := c.settled(1, 2, 3)
	c.sameStates(1, 2, 3)
	rest := slices.DeleteFunc([]uint64{1, 2, 3}, func(id uint64) bool { return id == leader })
	c.change(leader, &kvpb.ChangeMembershipRequest{Remove: []uint64{leader}})
	c.uninitialized(leader)
	c.settled(rest...)
	c.works(rest...)
	c.addLearner(rest[0], leader)
	c.change(rest[1], &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
	c.settled(1, 2, 3)

	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{3}})
	c.uninitialized(1, 2)
	c.settled(3)
	c.works(3)
	c.addLearner(3, 1)
	c.addLearner(3, 2)
	c.works(1, 2, 3)
	c.wants(2, false, "k", "29", alone+30)
	c.sameStates(1, 2, 3)
}

// TestChecker shows that the checker finds what it is there to find.
func TestChecker(t *testing.T) {
	op := func(call, ret int64, name, value string, out answer) porcupine.Operation {
		return porcupine.Operation{Input: registerOp{name, "k", value}, Call: call, Output: out, Return: ret}
	}
	v := func(value string, version uint64) answer {
		return answer{present: true, value: value, version: version}
	}
	a := op(0, 1, "set", "a", answer{version: 1})
	b := op(2, 3, "set", "b", answer{version: 2})
	maybeB := op(2, math.MaxInt64, "set", "b", answer{unknown: true})
	for _, tt := range []struct {
		name string
		want porcupine.CheckResult
		ops  []porcupine.Operation
	}{
		{"in order", porcupine.Ok, []porcupine.Operation{a, b, op(4, 5, "get", "", v("b", 2))}},
		{"stale read", porcupine.Illegal, []porcupine.Operation{a, b, op(4, 5, "get", "", v("a", 1))}},
		{"read while it is written", porcupine.Ok, []porcupine.Operation{a, b, op(2, 3, "get", "", v("a", 1))}},
		{"lost write", porcupine.Illegal, []porcupine.Operation{a, op(2, 3, "get", "", answer{})}},
		{"value from nowhere", porcupine.Illegal, []porcupine.Operation{a, op(2, 3, "get", "", v("c", 3))}},
		{"value with another's version", porcupine.Illegal, []porcupine.Operation{a, b, op(4, 5, "get", "", v("b", 3))}},
		{"unknown, done later", porcupine.Ok, []porcupine.Operation{a, maybeB, op(4, 5, "get", "", v("a", 1)), op(6, 7, "get", "", v("b", 2))}},
		{"unknown, never done", porcupine.Ok, []porcupine.Operation{a, maybeB, op(6, 7, "get", "", v("a", 1))}},
		{"unknown, done and undone", porcupine.Illegal, []porcupine.Operation{a, maybeB, op(4, 5, "get", "", v("b", 2)), op(6, 7, "get", "", v("a", 1))}},
		{"seen before it was asked for", porcupine.Illegal, []porcupine.Operation{op(0, 1, "get", "", v("b", 2)), b}},
		{"deleted", porcupine.Ok, []porcupine.Operation{a, op(2, 3, "delete", "", answer{present: true, version: 2}), op(4, 5, "get", "", answer{})}},
		{"delete of nothing", porcupine.Illegal, []porcupine.Operation{op(0, 1, "delete", "", answer{present: true, version: 1})}},
		{"delete without effect", porcupine.Illegal, []porcupine.Operation{a, op(2, 3, "delete", "", answer{present: true, version: 2}), op(4, 5, "get", "", v("a", 1))}},
		{"versions out of order", porcupine.Illegal, []porcupine.Operation{b, op(4, 5, "set", "c", answer{version: 1})}},
	} {
		if got := porcupine.CheckOperationsTimeout(registers, tt.ops, pollDeadline); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestLeaderStops(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	leader := c.settled(1, 2, 3)
	rest := slices.DeleteFunc([]uint64{1, 2, 3}, func(id uint64) bool { return id == leader })
	h := newHistory()
	stop := c.load(h, rpcTimeout, false, rest...)
	defer stop()
	h.floor(t, 100)
	c.stop(leader)
	h.floor(t, 100)
	stop()
	eventually(t, func() error {
		for _, id := range rest {
			if m, err := c.metrics(id); err != nil || m.Leader == nil || m.Leader.Id == leader {
				return fmt.Errorf("no new leader: %v, %v", m, err)
			}
		}
		return nil
	})
	for e := range h.errors {
		switch e {
		case "Unavailable NO_LEADER", "Unavailable NOT_LEADER", "DeadlineExceeded OUTCOME_UNKNOWN", "ResourceExhausted OVERLOADED":
		default:
			t.Errorf("a call to a node that stays ended with %s", e)
		}
	}
	c.readAll(h, rest[0])
	c.readAll(h, rest[1])
	h.check(t)
	c.sameStates(rest...)
}

// TestLeaderCutOff: a leader that nobody hears answers no read with what was
// true before the others went on without it.
func TestLeaderCutOff(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	h := newHistory()
	stop := c.load(h, 500*time.Millisecond, false, 1, 2, 3)
	defer stop()
	for range 3 {
		leader := c.settled(1, 2, 3)
		h.floor(t, 50)
		c.cut(leader)
		eventually(t, func() error {
			for id := range c.nodes {
				if m, err := c.metrics(id); err != nil || id != leader && (m.Leader == nil || m.Leader.Id == leader) {
					return fmt.Errorf("no new leader: %v, %v", m, err)
				}
			}
			return nil
		})
		h.floor(t, 50)
		c.heal()
	}
	c.settled(1, 2, 3)
	h.floor(t, 50)
	stop()
	for id := range c.nodes {
		c.readAll(h, id)
	}
	h.check(t)
	c.sameStates(1, 2, 3)
}

// TestRollingRestart: nodes without a disk survive a restart of each, if each
// waits for the health name raftkv.v1.restart on all.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	h := newHistory()
	stop := c.load(h, 5*time.Second, true, 1, 2, 3)
	defer stop()
	for id := uint64(1); id <= 3; id++ {
		h.floor(t, 30)
		for other := range c.nodes {
			c.health(other, restartHealth, grpc_health_v1.HealthCheckResponse_SERVING)
		}
		c.restart(id)
	}
	c.settled(1, 2, 3)
	h.floor(t, 30)
	stop()
	c.readAll(h, 1)
	h.check(t)
	c.sameStates(1, 2, 3)
}

func TestNoLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.init(1, 2, 3)
	version := c.set(1, "k", "v")
	c.stop(2)
	c.stop(3)
	eventually(t, func() error {
		m, err := c.metrics(1)
		if err == nil && (m.Leader != nil || m.Role == kvpb.Role_ROLE_LEADER || m.Healthy) {
			err = fmt.Errorf("there is a leader: %v", m)
		}
		return err
	})
	c.wants(1, true, "k", "v", version)

	// Each waits for a leader, so all at once. Node 4 is in no cluster.
	kv := []func(*testNode) error{
		func(n *testNode) error { _, err := n.Get(c.ctx, &kvpb.GetRequest{Key: "k"}); return err },
		func(n *testNode) error { _, err := n.List(c.ctx, &kvpb.ListRequest{}); return err },
		func(n *testNode) error { _, err := n.Set(c.ctx, &kvpb.SetRequest{Key: "k"}); return err },
		func(n *testNode) error { _, err := n.Delete(c.ctx, &kvpb.DeleteRequest{Key: "k"}); return err },
	}
	local := []func(*testNode) error{
		func(n *testNode) error { _, err := n.Get(c.ctx, &kvpb.GetRequest{Key: "k", Local: true}); return err },
		func(n *testNode) error { _, err := n.List(c.ctx, &kvpb.ListRequest{Local: true}); return err },
	}
	admin := []func(*testNode) error{
		func(n *testNode) error {
			_, err := n.AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: c.proto(4)[0]})
			return err
		},
		func(n *testNode) error {
			_, err := n.ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Members: []uint64{1}})
			return err
		},
		func(n *testNode) error {
			_, err := n.TransferLeader(c.ctx, &kvpb.TransferLeaderRequest{NodeId: 1})
			return err
		},
	}
	var wg sync.WaitGroup
	all := func(id uint64, code codes.Code, reason string, fs ...func(*testNode) error) {
		for _, f := range fs {
			wg.Go(func() { wantError(t, f(c.nodes[id]), code, reason) })
		}
	}
	all(1, codes.Unavailable, "NO_LEADER", append(kv, admin...)...)
	all(4, codes.Unavailable, "NOT_INITIALIZED", append(kv, local...)...)
	all(4, codes.FailedPrecondition, "NOT_INITIALIZED", admin...)
	wg.Wait()
	c.wants(1, true, "k", "v", version) // nothing was done
	c.uninitialized(4)
}

// picture is all of the cluster's state but the position in the log, which
// elections move, too.
func (c *testCluster) picture(via uint64) string {
	c.t.Helper()
	if _, err := c.nodes[via].Get(c.ctx, &kvpb.GetRequest{Key: "k"}); err != nil { // be up to date
		c.t.Fatal(err)
	}
	h, rest := c.dump(via)
	h.Index, h.Term = 0, 0
	return h.String() + string(rest)
}

// badSnapshotOfPeer is a badSnapshot of somebody who has a stream to the node, too: of
// all others none is read.
func badSnapshotOfPeer(name string, code codes.Code, change func(*kvpb.InstallSnapshotRequest, *kvpb.SnapshotHeader)) badCall {
	bad := badSnapshot(name, code, change)
	sends := bad.call
	bad.call = func(ctx context.Context, n *testNode) error {
		h, err := stranger(n)
		if err != nil {
			return err
		}
		peer, hangUp := callAsPeer(n)
		defer hangUp()
		s, err := peer.Stream(ctx)
		if err != nil {
			return err
		}
		if err := s.Send(&kvpb.StreamRequest{Hello: h}); err != nil {
			return err
		}
		if _, err := s.Recv(); err != nil {
			return err
		}
		return sends(ctx, n)
	}
	return bad
}
