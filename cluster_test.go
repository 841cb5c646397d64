// Integration tests: nodes in one process, each started by run as main starts
// it, that talk over loopback.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// pollDeadline is generous: it says that something never happens.
	pollDeadline = 30 * time.Second
	// rpcTimeout bounds calls that a test gives no deadline.
	rpcTimeout = 20 * time.Second
)

// TestMain runs more tests at once than there are processors, unless told how
// many: clusters mostly wait.
func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		_ = flag.Set("test.parallel", fmt.Sprint(max(4, runtime.GOMAXPROCS(0))))
	}
	m.Run()
}

// eventually polls f until it returns nil. Nothing else sleeps.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	within(t, pollDeadline, f)
}

// within is eventually with another deadline.
func within(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still after %v: %v", limit, err)
		}
	}
}

// testCluster is a set of nodes that may form one cluster, or several.
type testCluster struct {
	t       *testing.T
	ctx     context.Context // ends with the test
	options func(*options)
	nodes   map[uint64]*testNode
	wires   wires
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

// start runs a node on an address.
func (c *testCluster) start(id uint64, address string) *testNode {
	c.t.Helper()
	var l net.Listener
	eventually(c.t, func() (err error) { l, err = net.Listen("tcp", address); return err })
	n := &testNode{id: id, address: l.Addr().String(), ended: make(chan error, 1)}
	o := defaultOptions()
	o.id = id
	c.options(&o)
	o.addr, o.listener, o.dialer = n.address, l, c.wires.dialer(n.address)
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
	n.conn = dialNode(c.t, n.address)
	n.KVServiceClient, n.ClusterServiceClient = kvpb.NewKVServiceClient(n.conn), kvpb.NewClusterServiceClient(n.conn)
	c.nodes[id] = n
	return n
}

// dialNode makes a connection as any client would; calls end in any case.
func dialNode(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}, MinConnectTimeout: time.Second}),
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
// late enough for an election or for a learner to be behind, and the request is
// made again; no other refusal is accepted.
func (c *testCluster) done(f func() error) {
	c.t.Helper()
	eventually(c.t, func() error {
		err := f()
		if r := reasonOf(err); err != nil && r != "NOT_CAUGHT_UP" && r != "UNREACHABLE" && r != "NO_LEADER" && r != "NOT_LEADER" {
			c.t.Fatal(err)
		}
		return err
	})
}

// metrics returns a node's metrics, or nil.
func (c *testCluster) metrics(id uint64) (*kvpb.MetricsResponse, error) {
	return c.nodes[id].Metrics(c.ctx, &kvpb.MetricsRequest{})
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

// set writes through a node and returns the version.
func (c *testCluster) set(via uint64, key, value string) uint64 {
	c.t.Helper()
	resp, err := c.nodes[via].Set(c.ctx, &kvpb.SetRequest{Key: key, Value: []byte(value)})
	if err != nil {
		c.t.Fatalf("Set(%q) through node %d: %v", key, via, err)
	}
	return resp.Version
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
func (c *testCluster) cut(id uint64) {
	w, address := &c.wires, c.nodes[id].address
	w.mu.Lock()
	defer w.mu.Unlock()
	w.isCut = map[string]bool{address: true}
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

// infoOf returns what the API says of an error; nil if it is another's: gRPC's.
func infoOf(err error) *errdetails.ErrorInfo {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "raftkv.v1" {
			return info
		}
	}
	return nil
}

func reasonOf(err error) string { return infoOf(err).GetReason() }

func wantError(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || reasonOf(err) != reason {
		t.Errorf("got %v (%s %q), want %s %q", err, status.Code(err), reasonOf(err), code, reason)
	} else if reason == "INVALID_FIELD" && infoOf(err).Metadata["field"] == "" {
		t.Errorf("%v names no field", err)
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
	listed := &kvpb.ListResponse{Items: []*kvpb.KeyValue{{Key: "empty", Version: version}}}
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

func getError(c *testCluster, via uint64, local bool) error {
	_, err := c.nodes[via].Get(c.ctx, &kvpb.GetRequest{Key: "k", Local: local})
	return err
}

func TestInitThree(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	resp, err := c.nodes[2].Init(t.Context(), &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
	if err != nil {
		t.Fatal(err)
	}
	c.settled(1, 2, 3)
	for id := range c.nodes {
		if m, err := c.metrics(id); err != nil || m.ClusterId != resp.ClusterId {
			t.Errorf("node %d: %v, %v; want cluster %x", id, m, err, resp.ClusterId)
		}
	}
	c.works(1, 2, 3)
	c.sameStates(1, 2, 3)
}

func TestInitRefusals(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.init(4)
	n := func(id uint64, address string) *kvpb.Node { return &kvpb.Node{Id: id, Address: address} }
	me, other := c.proto(1)[0], c.proto(2)[0]
	for _, tt := range []struct {
		name    string
		members []*kvpb.Node
		code    codes.Code
		reason  string
	}{
		{"nobody", nil, codes.InvalidArgument, "INVALID_FIELD"},
		{"id 0", []*kvpb.Node{me, n(0, other.Address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"no address", []*kvpb.Node{me, n(2, "")}, codes.InvalidArgument, "INVALID_FIELD"},
		{"without the called node", []*kvpb.Node{other}, codes.InvalidArgument, "INVALID_FIELD"},
		{"the called node by another id", []*kvpb.Node{n(5, me.Address), other}, codes.InvalidArgument, "INVALID_FIELD"},
		{"the called node at another address", []*kvpb.Node{n(1, other.Address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"an id twice", []*kvpb.Node{me, other, n(2, c.nodes[3].address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"an address twice", []*kvpb.Node{me, other, n(3, other.Address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"unreachable", []*kvpb.Node{me, other, n(3, deadAddress(t))}, codes.Unavailable, "UNREACHABLE"},
		{"another id there", []*kvpb.Node{me, other, n(5, c.nodes[3].address)}, codes.FailedPrecondition, "WRONG_NODE"},
		{"in a cluster already", []*kvpb.Node{me, other, c.proto(4)[0]}, codes.FailedPrecondition, "ALREADY_INITIALIZED"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: tt.members})
			wantError(t, err, tt.code, tt.reason)
			c.uninitialized(1, 2, 3)
		})
	}
	before := c.picture(4)
	_, err := c.nodes[4].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(4, 1)})
	wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
	if _, err := c.nodes[4].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(4)}); err != nil {
		t.Errorf("an Init that is true already: %v", err)
	}
	if c.picture(4) != before {
		t.Error("the second Init has changed something")
	}
	c.init(1, 2, 3) // nothing is left of the attempts
	c.works(1, 2, 3)
}

// deadAddress returns an address where nobody listens.
func deadAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func TestTwoInitsAtOnce(t *testing.T) {
	t.Parallel()
	// In each order the two meet at another point.
	for _, orders := range [][2][]uint64{{{1, 2, 3}, {2, 1, 3}}, {{1, 3, 2}, {2, 3, 1}}} {
		t.Run(fmt.Sprint(orders), func(t *testing.T) {
			c := newCluster(t, 3)
			ctx, cancel := context.WithCancel(c.ctx)
			defer cancel()
			ended := make(chan error, 2)
			for _, order := range orders {
				go func() {
					req := &kvpb.InitRequest{Members: c.proto(order...)}
					_, err := c.nodes[order[0]].Init(ctx, req)
					for reasonOf(err) == "UNREACHABLE" && ctx.Err() == nil { // on a busy machine; it carries on
						_, err = c.nodes[order[0]].Init(ctx, req)
					}
					if err != nil && reasonOf(err) != "ALREADY_INITIALIZED" && status.Code(err) != codes.Canceled {
						t.Errorf("Init through node %d: %v", order[0], err)
					}
					ended <- err
				}()
			}
			for range 2 {
				select {
				case <-ended:
				case <-time.After(pollDeadline): // for a node that is in the other's cluster
					t.Error("one of them waits")
					cancel()
				}
			}

			// Nobody whom a cluster names is on its way to it any more, or in another.
			clusters := map[uint64]uint64{}
			eventually(t, func() error {
				ms := map[uint64]*kvpb.MetricsResponse{}
				for id := range c.nodes {
					m, err := c.metrics(id)
					if err != nil {
						return err
					}
					ms[id], clusters[id] = m, m.ClusterId
				}
				for id, m := range ms {
					if m.ClusterId != 0 && !m.Healthy {
						return fmt.Errorf("node %d: %s", id, m.UnhealthyReason)
					}
					for _, member := range m.Members {
						if clusters[member.Node.Id] == 0 {
							return fmt.Errorf("node %d is to join node %d", member.Node.Id, id)
						}
						if in := clusters[member.Node.Id]; in != m.ClusterId {
							if member.GetProgress().GetCaughtUp() {
								t.Fatalf("node %d, of cluster %x, counts on node %d, of cluster %x", id, m.ClusterId, member.Node.Id, in)
							}
							return fmt.Errorf("node %d, of cluster %x, names node %d, of cluster %x", id, m.ClusterId, member.Node.Id, in)
						}
					}
				}
				if clusters[1] == 0 && clusters[2] == 0 {
					t.Fatal("nobody has made a cluster")
				}
				return nil
			})
			// What one writes, exactly the members of its cluster see.
			for writer, cluster := range clusters {
				if cluster == 0 {
					continue
				}
				key := fmt.Sprint("written through ", writer)
				version := c.set(writer, key, "v")
				for reader, other := range clusters {
					if other == cluster {
						c.wants(reader, false, key, "v", version)
					} else if other != 0 {
						c.wantsAbsent(reader, key)
					}
				}
			}
			for id, cluster := range clusters {
				if m, err := c.metrics(id); err != nil || m.ClusterId != cluster {
					t.Errorf("node %d was in cluster %x: %v, %v", id, cluster, m, err)
				}
			}
		})
	}
}

// TestAddAgainAtOnce: a node that has been removed and does not know it yet is
// added again, as somebody new.
func TestAddAgainAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	for id := uint64(1); id <= 3; id++ {
		via := 1 + id%3
		c.change(via, &kvpb.ChangeMembershipRequest{Members: slices.DeleteFunc([]uint64{1, 2, 3}, func(other uint64) bool { return other == id })})
		c.addLearner(via, id)
		c.change(via, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
		c.settled(1, 2, 3)
		c.works(1, 2, 3)
	}
	c.sameStates(1, 2, 3)
}

// TestAddAgainBeforeItJoined: a learner is removed before it has heard of the
// cluster at all, and then added again.
func TestAddAgainBeforeItJoined(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.init(1)
	c.fill(1, 24) // its snapshot takes a while
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := c.nodes[1].AddLearner(ctx, &kvpb.AddLearnerRequest{Node: c.proto(2)[0]})
		ended <- err
	}()
	eventually(t, func() error {
		m, err := c.metrics(1)
		if err == nil && len(m.Members) < 2 {
			err = errors.New("not added yet")
		}
		return err
	})
	cancel()
	<-ended
	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1}, Remove: []uint64{2}})
	c.addLearner(1, 2)
	c.works(1, 2)
	c.sameStates(1, 2)
}

// stranger is a hello that a node would accept, from nobody that it knows.
func stranger(n *testNode) (*kvpb.Hello, error) {
	w, err := greetNode(n, &kvpb.Hello{To: &kvpb.Peer{}}) // asks who is there
	if err != nil {
		return nil, err
	}
	from := &kvpb.Peer{Node: &kvpb.Node{Id: 77, Address: "127.0.0.1:1"}, RaftId: 77, Life: 77}
	return &kvpb.Hello{ClusterId: w.ClusterId, From: from, To: w.Peer}, nil
}

// callAsPeer makes a connection of its own, for one has only few hellos.
func callAsPeer(n *testNode) (_ kvpb.RaftServiceClient, hangUp func()) {
	conn := dial(n.address)
	return kvpb.NewRaftServiceClient(conn), func() { _ = conn.Close() }
}

// greetNode says hello. A node that refuses has to end the stream.
func greetNode(n *testNode, h *kvpb.Hello) (*kvpb.Welcome, error) {
	ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
	defer cancel()
	peer, hangUp := callAsPeer(n)
	defer hangUp()
	s, err := peer.Stream(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.Send(&kvpb.StreamRequest{Hello: h}); err != nil && err != io.EOF {
		return nil, err
	}
	resp, err := s.Recv()
	if err != nil {
		return nil, err
	}
	if _, err := s.Recv(); err != io.EOF {
		return nil, fmt.Errorf("the stream goes on: %v", err)
	}
	return resp.Welcome, nil
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (rawCodec) Unmarshal([]byte, any) error   { return nil }
func (rawCodec) Name() string                  { return "proto" }

// badCall is a call that a node has to refuse.
type badCall struct {
	name   string
	code   codes.Code
	reason string
	call   func(context.Context, *testNode) error
}

func badSet(name, key string, value []byte) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.Set(ctx, &kvpb.SetRequest{Key: key, Value: value})
		return err
	}}
}

func badGet(name, key string, local bool) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.Get(ctx, &kvpb.GetRequest{Key: key, Local: local})
		return err
	}}
}

func badList(name string, req *kvpb.ListRequest) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.List(ctx, req)
		return err
	}}
}

func badDelete(name, key string) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.Delete(ctx, &kvpb.DeleteRequest{Key: key})
		return err
	}}
}

func badWrite(name string, w *kvpb.Write) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) (err error) {
		if set := w.GetSet(); set != nil {
			_, err = n.Set(ctx, set)
		} else {
			_, err = n.Delete(ctx, w.GetDelete())
		}
		return err
	}}
}

func badLearner(name string, id uint64, address string, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		_, err := n.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: id, Address: address}})
		return err
	}}
}

func badChange(name string, req *kvpb.ChangeMembershipRequest, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		_, err := n.ChangeMembership(ctx, req)
		return err
	}}
}

func badTransfer(name string, to uint64, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		_, err := n.TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: to})
		return err
	}}
}

func badBytes(name, method, message string, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		return n.conn.Invoke(ctx, method, []byte(message), nil, grpc.ForceCodec(rawCodec{}))
	}}
}

// badStream is what is no gRPC at all: the node has to hang up.
func badStream(name, text string) badCall {
	return badCall{name, codes.OK, "", func(_ context.Context, n *testNode) error {
		conn, err := net.Dial("tcp", n.address)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, text) // it may hang up before the end
		_ = conn.SetReadDeadline(time.Now().Add(rpcTimeout))
		if _, err = io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.New("the connection stays open")
		}
		return nil
	}}
}

func badHello(name string, want kvpb.Verdict, change func(*kvpb.Hello)) badCall {
	return badCall{name, codes.OK, "", func(_ context.Context, n *testNode) error {
		h, err := stranger(n)
		if err != nil {
			return err
		}
		change(h)
		if w, err := greetNode(n, h); err != nil || w.Verdict != want {
			return fmt.Errorf("%v, %v, want %v", w, err, want)
		}
		return nil
	}}
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

// badSnapshot would erase a node that took it.
func badSnapshot(name string, code codes.Code, change func(*kvpb.InstallSnapshotRequest, *kvpb.SnapshotHeader)) badCall {
	return badCall{name, code, "", func(ctx context.Context, n *testNode) error {
		hello, err := stranger(n)
		if err != nil {
			return err
		}
		first := &kvpb.InstallSnapshotRequest{Hello: hello, Term: 1 << 20}
		header := &kvpb.SnapshotHeader{
			Format: 1, ClusterId: hello.ClusterId, Index: 1 << 30, Term: 1 << 20,
			ConfState: &kvpb.ConfState{Voters: []uint64{77, hello.To.RaftId}},
			Members:   []*kvpb.Member{{RaftId: 77, Node: hello.From.Node}, {RaftId: hello.To.RaftId, Node: hello.To.Node}},
		}
		change(first, header)
		var b bytes.Buffer
		for _, r := range []*kvpb.SnapshotRecord{{Record: &kvpb.SnapshotRecord_Header{Header: header}}, {Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{}}}} {
			if _, err := protodelim.MarshalTo(&b, r); err != nil {
				return err
			}
		}
		damage := first.Data
		first.Data = framed(b.Bytes())
		copy(first.Data[8+4:], damage)
		peer, hangUp := callAsPeer(n)
		defer hangUp()
		s, err := peer.InstallSnapshot(ctx)
		if err != nil {
			return err
		}
		if err := s.Send(first); err != nil && err != io.EOF {
			return err
		}
		_, err = s.CloseAndRecv()
		return err
	}}
}

// forwarded makes a call look as if another node had passed it on.
func forwarded(b badCall) badCall {
	call := b.call
	b.name = "forwarded: " + b.name
	b.call = func(ctx context.Context, n *testNode) error {
		return call(metadata.AppendToOutgoingContext(ctx, "x-raft-forwarded", "1"), n)
	}
	return b
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(5, "127.0.0.1:0") // in no cluster
	c.start(6, "127.0.0.1:0") // in another cluster
	c.init(6)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	was4 := c.nodes[4].address
	c.stop(4)
	c.start(7, was4)
	c.works(1, 2, 3)
	leader := c.settled(1, 2, 3)
	follower := 1 + leader%3
	eventually(t, func() error { // 4 will never have what is written now
		m, err := c.metrics(leader)
		for _, ms := range m.GetMembers() {
			if ms.Node.Id == 4 && ms.GetProgress().GetCaughtUp() {
				err = errors.New("node 4 counts as caught up")
			}
		}
		return err
	})

	const invalid = codes.InvalidArgument
	voters := func(ids ...uint64) *kvpb.ChangeMembershipRequest {
		return &kvpb.ChangeMembershipRequest{Members: ids}
	}
	long := strings.Repeat("k", 64<<10+1)
	address2 := c.nodes[2].address
	bad := []badCall{
		badSet("set of an empty key", "", nil),
		badSet("set of a long key", long, nil),
		badSet("a long value", "k", make([]byte, 1<<20+1)),
		badGet("get of an empty key", "", false),
		badGet("local get of a long key", long, true),
		badDelete("delete of an empty key", ""),
		badWrite("set with session 0", withID(0, 1, setWrite("k", "v"))),
		badWrite("set with sequence 0", withID(1, 0, setWrite("k", "v"))),
		badWrite("delete with session 0", withID(0, 1, deleteWrite("k"))),
		badWrite("delete with sequence 0", withID(1, 0, deleteWrite("k"))),
		badWrite("delete of what must not exist", deleteIf("k", 0)),
		badDelete("delete of a long key", long),
		badList("list of a long prefix", &kvpb.ListRequest{Prefix: long}),
		badList("list from a long token", &kvpb.ListRequest{PageToken: long, Local: true}),
		badList("list of too much", &kvpb.ListRequest{Limit: 10_001}),
		badBytes("set of a key that is no UTF-8", kvpb.KVService_Set_FullMethodName, "\x0a\x01\xff", invalid, "INVALID_FIELD"),
		badBytes("delete of a key that is no UTF-8", kvpb.KVService_Delete_FullMethodName, "\x0a\x01\xff", invalid, "INVALID_FIELD"),
		badBytes("a message that is cut off", kvpb.KVService_Set_FullMethodName, "\x0a\x05k", invalid, "INVALID_FIELD"),
		badBytes("a get with an unknown field", kvpb.KVService_Get_FullMethodName, "\x0a\x01k\x48\x01", invalid, "INVALID_FIELD"),
		badBytes("a get with a key that is a number", kvpb.KVService_Get_FullMethodName, "\x08\x01", invalid, "INVALID_FIELD"),
		badBytes("a message that is far too long", kvpb.KVService_Set_FullMethodName, strings.Repeat("x", 9<<20), codes.ResourceExhausted, ""),
		badBytes("an unknown method", "/raftkv.v1.KVService/Steal", "", codes.Unimplemented, ""),

		badLearner("learner with id 0", 0, c.nodes[5].address, invalid, "INVALID_FIELD"),
		badLearner("learner without address", 5, "", invalid, "INVALID_FIELD"),
		badLearner("learner without port", 5, "127.0.0.1", invalid, "INVALID_FIELD"),
		badLearner("learner without host", 5, ":1", invalid, "INVALID_FIELD"),
		badLearner("learner with an endless address", 5, strings.Repeat("h", 300)+":1", invalid, "INVALID_FIELD"),
		badLearner("learner whose address has another node", 8, c.nodes[5].address, codes.FailedPrecondition, "WRONG_NODE"),
		badLearner("learner with a member's id and another's address", 2, c.nodes[5].address, codes.FailedPrecondition, "WRONG_NODE"),
		badLearner("learner at a member's address", 8, address2, codes.FailedPrecondition, "WRONG_NODE"),
		badLearner("learner at the address of a member that has gone", 7, was4, codes.AlreadyExists, "MEMBER_EXISTS"),
		badLearner("learner of another cluster", 6, c.nodes[6].address, codes.FailedPrecondition, "ALREADY_INITIALIZED"),
		badLearner("unreachable learner", 8, deadAddress(t), codes.Unavailable, "UNREACHABLE"),

		badChange("no voters", voters(), invalid, "INVALID_FIELD"),
		badChange("voter 0", voters(0, 1, 2), invalid, "INVALID_FIELD"),
		badChange("a voter twice", voters(1, 2, 2), invalid, "INVALID_FIELD"),
		badChange("a voter that is to leave", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}, Remove: []uint64{2}}, invalid, "INVALID_FIELD"),
		badChange("too many voters", voters(slices.Collect(func(yield func(uint64) bool) {
			for i := uint64(1); i < 100 && yield(i); i++ {
			}
		})...), invalid, "INVALID_FIELD"),
		badChange("an unknown voter", voters(1, 2, 3, 99), codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("a voter that is not there", voters(1, 2, 3, 4), codes.Unavailable, "UNREACHABLE"),
		badChange("no voter left", &kvpb.ChangeMembershipRequest{Remove: []uint64{1, 2, 3}}, invalid, "INVALID_FIELD"),
		badChange("an unknown member to be removed", &kvpb.ChangeMembershipRequest{Remove: []uint64{99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("a learner and an unknown one to be removed", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4, 99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("voters, and who is promoted", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Promote: []uint64{4}}, invalid, "INVALID_FIELD"),
		badChange("voters, and who is demoted", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}, Demote: []uint64{3}}, invalid, "INVALID_FIELD"),
		badChange("retained, and demoted", &kvpb.ChangeMembershipRequest{Demote: []uint64{3}, Retain: true}, invalid, "INVALID_FIELD"),
		badChange("promoted and demoted", &kvpb.ChangeMembershipRequest{Promote: []uint64{3}, Demote: []uint64{3}}, invalid, "INVALID_FIELD"),
		badChange("promoted and removed", &kvpb.ChangeMembershipRequest{Promote: []uint64{4}, Remove: []uint64{4}}, invalid, "INVALID_FIELD"),
		badChange("nobody promoted", &kvpb.ChangeMembershipRequest{Promote: []uint64{0}}, invalid, "INVALID_FIELD"),
		badChange("all demoted", &kvpb.ChangeMembershipRequest{Demote: []uint64{1, 2, 3}}, invalid, "INVALID_FIELD"),
		badChange("an unknown one to be promoted", &kvpb.ChangeMembershipRequest{Promote: []uint64{99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("an unknown one to be demoted", &kvpb.ChangeMembershipRequest{Demote: []uint64{99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("a learner promoted that is not there", &kvpb.ChangeMembershipRequest{Promote: []uint64{4}}, codes.Unavailable, "UNREACHABLE"),
		badChange("nobody expected", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: &kvpb.Membership{}}, invalid, "INVALID_FIELD"),
		badChange("a member expected without node", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: &kvpb.Membership{Members: []*kvpb.ExpectedMember{{}}}}, invalid, "INVALID_FIELD"),
		badChange("too many expected", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: &kvpb.Membership{Members: make([]*kvpb.ExpectedMember, 2*maxMembers+1)}}, invalid, "INVALID_FIELD"),
		badChange("another membership expected", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: expectedOf([]uint64{1, 2, 3}, []uint64{4})}, codes.Aborted, "MEMBERSHIP_CHANGED"),
		badTransfer("leader 0", 0, invalid, "INVALID_FIELD"),
		badTransfer("an unknown leader", 99, codes.NotFound, "UNKNOWN_MEMBER"),
		badTransfer("a learner as leader", 4, codes.FailedPrecondition, "NOT_CAUGHT_UP"),
		{"init again", codes.FailedPrecondition, "ALREADY_INITIALIZED", func(ctx context.Context, n *testNode) error {
			_, err := n.Init(ctx, &kvpb.InitRequest{Members: []*kvpb.Node{{Id: n.id, Address: n.address}}})
			return err
		}},

		badStream("nothing but noise", strings.Repeat("\x00\xff\x16noise\r\n", 1000)),
		badStream("HTTP/1", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		badStream("HTTP/2, then noise", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+strings.Repeat("\xff", 1000)),
		{"a stream without hello", invalid, "", func(_ context.Context, n *testNode) error {
			_, err := greetNode(n, nil)
			return err
		}},
		badHello("hello from another cluster", kvpb.Verdict_VERDICT_OTHER_CLUSTER, func(h *kvpb.Hello) { h.ClusterId++ }),
		badHello("hello from no cluster", kvpb.Verdict_VERDICT_OTHER_CLUSTER, func(h *kvpb.Hello) { h.ClusterId = 0 }),
		badHello("hello to another raft ID", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.RaftId++ }),
		badHello("hello to another life", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.Life++ }),
		badHello("hello to another id", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.Node.Id++ }),
		badHello("hello to another address", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.Node.Address = "127.0.0.1:1" }),
		badHello("hello from itself", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.From.RaftId = h.To.RaftId }),
		badHello("hello from nobody", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.From = nil }),
		badSnapshot("a snapshot from a stranger", codes.FailedPrecondition, func(*kvpb.InstallSnapshotRequest, *kvpb.SnapshotHeader) {}),
		badSnapshot("a snapshot of another cluster", codes.FailedPrecondition, func(_ *kvpb.InstallSnapshotRequest, h *kvpb.SnapshotHeader) { h.ClusterId++ }),
		badSnapshot("a snapshot from another cluster", codes.FailedPrecondition, func(r *kvpb.InstallSnapshotRequest, h *kvpb.SnapshotHeader) { h.ClusterId++; r.Hello.ClusterId++ }),
		badSnapshot("a snapshot for another life", codes.FailedPrecondition, func(r *kvpb.InstallSnapshotRequest, _ *kvpb.SnapshotHeader) { r.Hello.To.Life++ }),
		badSnapshot("a snapshot from nobody to nobody", codes.FailedPrecondition, func(r *kvpb.InstallSnapshotRequest, _ *kvpb.SnapshotHeader) {
			r.Hello.From, r.Hello.To.RaftId = nil, 0
		}),
		badSnapshotOfPeer("a damaged snapshot", codes.DataLoss, func(r *kvpb.InstallSnapshotRequest, _ *kvpb.SnapshotHeader) { r.Data = []byte("a checksum")[:4] }),
		badSnapshotOfPeer("a snapshot without index", codes.DataLoss, func(_ *kvpb.InstallSnapshotRequest, h *kvpb.SnapshotHeader) { h.Index = 0 }),
	}
	for i, b := range bad {
		t.Run(b.name, func(t *testing.T) {
			before := c.picture(1)
			for _, id := range []uint64{leader, follower} { // the leader then, at least
				wantError(t, b.call(c.ctx, c.nodes[id]), b.code, b.reason)
			}
			if after := c.picture(1); after != before {
				t.Errorf("the state was %q and is %q", before, after)
			}
			c.works(uint64(1+i%3), uint64(1+(i+1)%3))
		})
	}
	// What was forwarded goes back, instead of round in circles, even if it
	// could be done.
	for _, b := range []badCall{
		forwarded(badLearner("add-learner", 5, c.nodes[5].address, codes.Unavailable, "NOT_LEADER")),
		forwarded(badChange("change-membership", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4}}, codes.Unavailable, "NOT_LEADER")),
		forwarded(badTransfer("transfer-leader", 1, codes.Unavailable, "NOT_LEADER")),
	} {
		t.Run(b.name, func(t *testing.T) {
			leader := c.settled(1, 2, 3)
			before := c.picture(1)
			for id := uint64(1); id <= 3; id++ {
				if id != leader {
					wantError(t, b.call(c.ctx, c.nodes[id]), b.code, b.reason)
				}
			}
			if after := c.picture(1); after != before {
				t.Errorf("the state was %q and is %q", before, after)
			}
		})
	}
	c.uninitialized(5, 7)
	c.sameStates(1, 2, 3)
}

// named checks that an answer names the leader: in the header of a success, in
// the trailer of an error.
func (c *testCluster) named(id uint64, name string, f func(...grpc.CallOption) error) {
	c.t.Helper()
	eventually(c.t, func() error {
		before, err := c.metrics(id)
		if err != nil || before.Leader == nil {
			return fmt.Errorf("node %d knows no leader: %v, %v", id, before, err)
		}
		var header, trailer metadata.MD
		err = f(grpc.Header(&header), grpc.Trailer(&trailer))
		md := header
		if err != nil {
			md = trailer
		}
		if after, err := c.metrics(id); err != nil || after.Term != before.Term {
			return fmt.Errorf("the leader changes all the time: %v, %v", after, err)
		}
		if got, want := md.Get("x-raft-leader"), []string{before.Leader.Address}; !slices.Equal(got, want) {
			c.t.Fatalf("%s: x-raft-leader is %q, want %q; %v", name, got, want, err)
		}
		return nil
	})
}

func TestForwarding(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.init(1, 2, 3)
	learner := c.proto(4)[0]
	for id := uint64(1); id <= 3; id++ {
		n := c.nodes[id]
		for name, f := range map[string]func(...grpc.CallOption) error{
			"Set": func(o ...grpc.CallOption) error { _, err := n.Set(c.ctx, &kvpb.SetRequest{Key: "k"}, o...); return err },
			"Get": func(o ...grpc.CallOption) error { _, err := n.Get(c.ctx, &kvpb.GetRequest{Key: "k"}, o...); return err },
			"Delete": func(o ...grpc.CallOption) error {
				_, err := n.Delete(c.ctx, &kvpb.DeleteRequest{Key: "k"}, o...)
				return err
			},
			"List":    func(o ...grpc.CallOption) error { _, err := n.List(c.ctx, &kvpb.ListRequest{}, o...); return err },
			"Metrics": func(o ...grpc.CallOption) error { _, err := n.Metrics(c.ctx, &kvpb.MetricsRequest{}, o...); return err },
			"AddLearner": func(o ...grpc.CallOption) error {
				_, err := n.AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: learner}, o...)
				return err
			},
		} {
			c.named(id, name, func(o ...grpc.CallOption) error {
				err := f(o...)
				if err != nil {
					t.Errorf("%s on node %d: %v", name, id, err)
				}
				return err
			})
		}
		eventually(t, func() error {
			m, err := c.metrics(4)
			if err == nil && m.Role != kvpb.Role_ROLE_LEARNER {
				err = fmt.Errorf("node 4 is no learner: %v", m)
			}
			return err
		})
		c.named(id, "ChangeMembership", func(o ...grpc.CallOption) error {
			_, err := n.ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4}}, o...)
			if err != nil {
				t.Errorf("ChangeMembership on node %d: %v", id, err)
			}
			return err
		})
		c.uninitialized(4)
		c.transfer(id, 1+id%3)
		c.settled(1, 2, 3)

		for name, f := range map[string]func(...grpc.CallOption) error{
			"Set":    func(o ...grpc.CallOption) error { _, err := n.Set(c.ctx, nil, o...); return err },
			"Get":    func(o ...grpc.CallOption) error { _, err := n.Get(c.ctx, nil, o...); return err },
			"Delete": func(o ...grpc.CallOption) error { _, err := n.Delete(c.ctx, nil, o...); return err },
			"List": func(o ...grpc.CallOption) error {
				_, err := n.List(c.ctx, &kvpb.ListRequest{Limit: 1 << 20}, o...)
				return err
			},
			"Init":             func(o ...grpc.CallOption) error { _, err := n.Init(c.ctx, nil, o...); return err },
			"AddLearner":       func(o ...grpc.CallOption) error { _, err := n.AddLearner(c.ctx, nil, o...); return err },
			"ChangeMembership": func(o ...grpc.CallOption) error { _, err := n.ChangeMembership(c.ctx, nil, o...); return err },
			"TransferLeader":   func(o ...grpc.CallOption) error { _, err := n.TransferLeader(c.ctx, nil, o...); return err },
		} {
			c.named(id, name, func(o ...grpc.CallOption) error {
				err := f(o...)
				if err == nil {
					t.Errorf("%s of nothing on node %d succeeds", name, id)
				}
				return err
			})
		}
	}
	var trailer metadata.MD
	_, err := c.nodes[4].Get(c.ctx, &kvpb.GetRequest{Key: "k", Local: true}, grpc.Trailer(&trailer))
	if wantError(t, err, codes.Unavailable, "NOT_INITIALIZED"); len(trailer.Get("x-raft-leader")) > 0 {
		t.Errorf("a node in no cluster names a leader: %v", trailer)
	}
}

// operation and answer are what a history consists of.
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
		conns = append(conns, dialNode(c.t, c.nodes[id].address))
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

// fill writes n values of 64 KiB.
func (c *testCluster) fill(via uint64, n int) {
	c.t.Helper()
	value := strings.Repeat("x", 64<<10)
	for i := range n {
		c.set(via, fmt.Sprint("large ", i), value)
	}
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4, func(o *options) { o.logBytes = 64 << 10 })
	c.init(1, 2, 3)
	c.fill(1, 24)

	// A node that was cut off for so long that the log does not reach back to
	// what it has.
	leader := c.settled(1, 2, 3)
	behind, other := 1+leader%3, 1+(leader+1)%3
	c.cut(behind)
	c.fill(leader, 24)
	last, err := c.metrics(behind)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		m, err := c.metrics(leader)
		if err == nil && m.FirstIndex <= last.LastIndex+1 {
			err = fmt.Errorf("the log starts at %d, node %d has entry %d", m.FirstIndex, behind, last.LastIndex)
		}
		return err
	})
	c.heal()
	c.settled(1, 2, 3)
	c.wants(behind, false, "large 23", strings.Repeat("x", 64<<10), 48)
	c.sameStates(1, 2, 3)
	if m, err := c.metrics(behind); err != nil || m.SnapshotsInstalled <= last.SnapshotsInstalled {
		t.Errorf("node %d has caught up without a snapshot: %v, %v", behind, m, err)
	}

	// A new node, while writes go on, which it gets from the log.
	h := newHistory()
	stop := c.load(h, rpcTimeout, false, 1, 2, 3)
	defer stop()
	c.addLearner(1, 4)
	h.floor(t, 20)
	stop()
	c.sameStates(1, 2, 3, 4)
	before, err := c.metrics(4)
	if err != nil || before.SnapshotsInstalled == 0 {
		t.Fatalf("node 4 has caught up without a snapshot: %v, %v", before, err)
	}
	for range 20 {
		c.set(1, "small", "v")
	}
	c.sameStates(1, 2, 3, 4)
	if m, err := c.metrics(4); err != nil || m.SnapshotsInstalled != before.SnapshotsInstalled || m.EntriesApplied <= before.EntriesApplied {
		t.Errorf("node 4 has not followed the log: %v, %v", m, err)
	}

	// One that comes back with nothing.
	c.restart(other)
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
	h.check(t)
	c.sameStates(1, 2, 3, 4)
	var sent uint64
	for id := range c.nodes {
		m, err := c.metrics(id)
		if err != nil {
			t.Fatal(err)
		}
		sent += m.SnapshotsSent
	}
	if sent < 2 {
		t.Errorf("the nodes count %d snapshots", sent)
	}
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

func TestHealth(t *testing.T) {
	t.Parallel()
	const serving, notServing = grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING
	c := newCluster(t, 4)
	// all checks that operators reach a node, whatever state it is in.
	all := func(id uint64, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		c.health(id, "raftkv.v1.KVService", want)
		c.health(id, restartHealth, want)
		resp, err := grpc_health_v1.NewHealthClient(c.nodes[id].conn).Check(c.ctx, &grpc_health_v1.HealthCheckRequest{})
		if err != nil || resp.Status != serving {
			t.Errorf("node %d says %v of the empty name: %v", id, resp, err)
		}
	}
	all(1, notServing)
	c.init(1, 2, 3)
	for id := uint64(1); id <= 3; id++ {
		all(id, serving)
	}
	all(4, notServing)
	c.addLearner(1, 4)
	all(4, serving)

	// Back in service means back up to date.
	for i := range 2 {
		leader := c.settled(1, 2, 3)
		away := 1 + leader%3
		c.cut(away)
		all(away, notServing)
		version := c.set(leader, "k", fmt.Sprint(i))
		c.heal()
		c.health(away, "raftkv.v1.KVService", serving)
		c.wants(away, true, "k", fmt.Sprint(i), version)

		version = c.set(leader, "k", fmt.Sprint("again ", i))
		c.restart(4)
		c.health(4, "raftkv.v1.KVService", serving)
		c.wants(4, true, "k", fmt.Sprint("again ", i), version)
	}
	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4}})
	all(4, notServing)

	for _, name := range []string{"nobody", "restart", "raftkv.v1.ClusterService"} {
		resp, err := grpc_health_v1.NewHealthClient(c.nodes[1].conn).Check(c.ctx, &grpc_health_v1.HealthCheckRequest{Service: name})
		if status.Code(err) != codes.NotFound {
			t.Errorf("health of an unknown service, %q: %v, %v", name, resp, err)
		}
	}
}

func TestReflection(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	ctx, cancel := context.WithTimeout(c.ctx, rpcTimeout)
	defer cancel()
	s, err := grpc_reflection_v1.NewServerReflectionClient(c.nodes[1].conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, service := range resp.GetListServicesResponse().GetService() {
		names = append(names, service.Name)
	}
	for _, want := range []string{"raftkv.v1.KVService", "raftkv.v1.ClusterService", "raftkv.v1.RaftService", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("reflection lists %q, not %s", names, want)
		}
	}
}
