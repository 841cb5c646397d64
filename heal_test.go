// Tests of nodes that come back without their memory, and of the snapshots
// that bring it back.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

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

// underLoad is a cluster of three voters, and learners, with clients on all
// nodes: those of the history, and one that writes each key once.
type underLoad struct {
	*testCluster
	h    *history
	stop func()

	mu   sync.Mutex
	kept map[string]uint64 // acknowledged: key to version
}

func newUnderLoad(t *testing.T, nodes uint64, set ...func(*options)) *underLoad {
	t.Helper()
	u := &underLoad{testCluster: newCluster(t, nodes, set...), h: newHistory(), kept: map[string]uint64{}}
	u.init(1, 2, 3)
	for id := uint64(4); id <= nodes; id++ {
		u.addLearner(1, id)
	}
	var conns []*grpc.ClientConn
	for _, n := range u.nodes {
		conns = append(conns, dialNode(t, n.address))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			key := fmt.Sprintf("kept %06d", i)
			call, cancel := context.WithTimeout(ctx, time.Second)
			resp, err := kvpb.NewKVServiceClient(conns[i%len(conns)]).Set(call, &kvpb.SetRequest{Key: key, Value: []byte(key)})
			cancel()
			if err == nil {
				u.mu.Lock()
				u.kept[key] = resp.Version
				u.mu.Unlock()
			}
		}
	})
	stop := u.load(u.h, time.Second, true, slices.Sorted(maps.Keys(u.nodes))...)
	u.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		stop()
		for _, conn := range conns {
			_ = conn.Close()
		}
	})
	t.Cleanup(u.stop)
	u.h.floor(t, 30)
	return u
}

// healed waits until the nodes are what they were: three voters, and learners,
// each of one life.
func (u *underLoad) healed(voters []uint64, learners ...uint64) {
	u.t.Helper()
	u.settled(voters...)
	all := slices.Concat(voters, learners)
	eventually(u.t, func() error {
		lives := map[uint64]uint64{}
		for _, id := range all {
			m, err := u.metrics(id)
			if err != nil {
				return err
			}
			lives[id] = m.RaftId
		}
		for _, id := range all {
			m, err := u.metrics(id)
			if err != nil {
				return err
			}
			if v, l := membersOf(m); !slices.Equal(v, slices.Sorted(slices.Values(voters))) || !slices.Equal(l, learners) || len(m.Members) != len(all) || !m.Healthy {
				return fmt.Errorf("node %d: %v", id, m)
			}
			for _, member := range m.Members {
				if node := member.Node; member.RaftId != lives[node.Id] || node.Address != u.nodes[node.Id].address {
					return fmt.Errorf("node %d knows another node %d: %v", id, node.Id, member)
				}
			}
		}
		return nil
	})
}

// check ends the load and checks all that clients saw.
func (u *underLoad) check(voters []uint64, learners ...uint64) {
	u.t.Helper()
	u.healed(voters, learners...)
	u.h.floor(u.t, 30)
	u.stop()
	all := slices.Concat(voters, learners)
	for _, id := range all {
		u.readAll(u.h, id)
	}
	u.h.check(u.t)
	u.sameStates(all...)
	if len(u.kept) == 0 {
		u.t.Fatal("nothing was acknowledged")
	}
	for _, id := range all {
		items, _, err := u.listAll(id, &kvpb.ListRequest{Prefix: "kept ", Limit: 10_000, Local: true})
		if err != nil {
			u.t.Fatal(err)
		}
		there := map[string]uint64{}
		for _, it := range items {
			if it.Key == string(it.Value) {
				there[it.Key] = it.Version
			}
		}
		for key, version := range u.kept {
			if there[key] != version {
				u.t.Fatalf("node %d has version %d of %q, %d was acknowledged", id, there[key], key, version)
			}
		}
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

func TestHealing(t *testing.T) {
	t.Parallel()
	three := []uint64{1, 2, 3}

	t.Run("each in turn", func(t *testing.T) {
		u := newUnderLoad(t, 3)
		leader := u.settled(three...)
		for i := range uint64(3) { // the leader first
			u.killed(1 + (leader-1+i)%3)
			u.healed(three)
		}
		u.restart(u.settled(three...)) // as SIGTERM does it
		u.check(three)
	})

	t.Run("again before it has healed", func(t *testing.T) {
		u := newUnderLoad(t, 3)
		leader := u.settled(three...)
		id := 1 + leader%3
		u.killed(id) // nobody has met it when it goes again
		added := u.when(livesOf(id, 2))
		u.killed(id)
		added(func() { u.kill(id) }) // as a learner
		promoted := u.when(func(n *node) bool { return isJoint(n.store.conf) })
		u.start(id, u.addressOf(leader, id))
		promoted(func() { u.kill(id) }) // while it becomes a voter
		u.start(id, u.addressOf(leader, id))
		u.check(three)
	})

	t.Run("the leader changes", func(t *testing.T) {
		u := newUnderLoad(t, 3)
		leader := u.settled(three...)
		id := 1 + leader%3
		added := u.when(livesOf(id, 2))
		u.killed(id)
		added(func() { u.cut(leader) }) // half way
		u.heal()
		u.check(three)
	})

	t.Run("a learner", func(t *testing.T) {
		u := newUnderLoad(t, 4)
		u.killed(4)
		u.healed(three, 4)
		u.restart(4)
		u.check(three, 4)
	})

	t.Run("during a change of membership", func(t *testing.T) {
		u := newUnderLoad(t, 4)
		// swap puts a learner in a voter's place and kills a node half way.
		swap := func(in, out uint64, victim func(leader uint64) uint64) {
			t.Helper()
			voters := []uint64{1, 2, in}
			leader := u.settled(1, 2, out)
			if leader == out {
				u.transfer(1, 1)
				leader = 1
			}
			id := victim(leader)
			joint := u.when(func(n *node) bool { return isJoint(n.store.conf) })
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			via := u.nodes[3-min(leader, 2)]
			go func() { // interrupted, or not
				defer close(ended)
				for again := true; again; { // on a busy machine the learner may be behind at first
					_, err := via.ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Members: voters})
					reason := reasonOf(err)
					again = reason == "NOT_CAUGHT_UP" || reason == "UNREACHABLE"
				}
			}()
			joint(func() { u.cut(id) })
			u.killed(id)
			u.heal()
			eventually(t, func() error { // who it is passed on to may just have died
				_, err := via.ChangeMembership(t.Context(), &kvpb.ChangeMembershipRequest{Members: voters})
				return err
			})
			cancel()
			<-ended
			u.healed(voters)
			u.uninitialized(out)
		}
		swap(4, 3, func(uint64) uint64 { return 4 })
		u.addLearner(1, 3)
		swap(3, 4, func(leader uint64) uint64 { return leader })
		u.check(three)
	})

	t.Run("after compaction", func(t *testing.T) {
		u := newUnderLoad(t, 3, func(o *options) { o.logBytes = 64 << 10 })
		value := strings.Repeat("x", 64<<10)
		for i := range 48 {
			u.done(func() error {
				_, err := u.nodes[1+uint64(i)%3].Set(u.ctx, &kvpb.SetRequest{Key: fmt.Sprint("large ", i), Value: []byte(value)})
				return err
			})
		}
		leader := u.settled(three...)
		m, err := u.metrics(leader)
		if err != nil || m.FirstIndex < 10 || m.LogBytes > 1<<20 {
			t.Fatalf("the log was not compacted: %v, %v", m, err)
		}
		id := 1 + leader%3
		u.kill(id)
		sent := u.sentSnapshots()
		u.start(id, u.addressOf(leader, id))
		u.healed(three)
		if now := u.sentSnapshots(); now <= sent {
			t.Errorf("%d snapshots were sent, %d before", now, sent)
		}
		if m, err := u.metrics(id); err != nil || m.SnapshotsInstalled == 0 || m.Keys < 48 {
			t.Errorf("node %d: %v, %v", id, m, err)
		}
		u.check(three)
	})

	t.Run("at a new address", func(t *testing.T) {
		u := newUnderLoad(t, 4)
		leader := u.settled(three...)
		other := 1 + leader%3
		u.kill(other)
		u.start(other, "127.0.0.1:0")
		eventually(t, func() error { // once the leader knows that the old one is gone
			_, err := u.nodes[leader].AddLearner(u.ctx, &kvpb.AddLearnerRequest{Node: u.proto(other)[0]})
			return err
		})
		u.healed(three, 4)
		// A learner: not while the old one is there.
		old := u.nodes[4]
		moved := u.start(4, "127.0.0.1:0")
		_, err := u.nodes[other].AddLearner(u.ctx, &kvpb.AddLearnerRequest{Node: u.proto(4)[0]})
		wantError(t, err, codes.AlreadyExists, "MEMBER_EXISTS")
		u.nodes[4] = old
		u.testCluster.stop(4)
		u.nodes[4] = moved
		eventually(t, func() error { // once it is known to be gone
			_, err := u.nodes[other].AddLearner(u.ctx, &kvpb.AddLearnerRequest{Node: u.proto(4)[0]})
			return err
		})
		u.healed(three, 4)
		u.check(three, 4)
	})
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

func TestRemovedWhileAway(t *testing.T) {
	t.Parallel()
	// Nobody else may cause an election.
	c := newCluster(t, 2, func(o *options) { o.election = 10 * time.Second })
	patient := c.options
	c.options = func(o *options) { patient(o); o.election = 250 * time.Millisecond }
	c.start(3, "127.0.0.1:0")
	c.init(1, 2, 3)
	for _, voter := range []bool{true, false} {
		version := c.set(3, "k", "v")
		c.wants(3, true, "k", "v", version)
		before, err := c.metrics(1)
		if err != nil || before.Leader == nil {
			t.Fatal(before, err)
		}
		c.cut(3)
		eventually(t, func() error { // until it would like to lead itself, or has no leader
			m, err := c.metrics(3)
			if err == nil && m.Leader != nil {
				err = fmt.Errorf("it still follows: %v", m)
			}
			return err
		})
		c.wants(3, true, "k", "v", version) // it does not know better yet
		req := &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}}
		if !voter {
			req.Remove = []uint64{3}
		}
		c.change(1, req)
		c.set(2, "k", "later")
		c.heal()
		eventually(t, func() error {
			resp, err := c.nodes[3].Get(c.ctx, &kvpb.GetRequest{Key: "k", Local: true})
			if err == nil && string(resp.Value) == "v" {
				return errors.New("it has not dropped its state")
			}
			if err == nil {
				t.Fatalf("it makes up %v", resp)
			}
			return nil
		})
		c.uninitialized(3)
		var wg sync.WaitGroup
		for _, local := range []bool{true, !voter} { // what is not local waits for a leader
			wg.Go(func() { wantError(t, getError(c, 3, local), codes.Unavailable, "NOT_INITIALIZED") })
			wg.Go(func() {
				_, err := c.nodes[3].List(c.ctx, &kvpb.ListRequest{Local: local})
				wantError(t, err, codes.Unavailable, "NOT_INITIALIZED")
			})
		}
		wg.Wait()
		c.health(3, "raftkv.v1.KVService", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
		c.works(1, 2)
		for id := uint64(1); id <= 2; id++ {
			if after, err := c.metrics(id); err != nil || after.Term != before.Term || !proto.Equal(after.Leader, before.Leader) {
				t.Errorf("node 3 disturbed node %d: before %v, after %v, %v", id, before, after, err)
			}
		}
		c.addLearner(2, 3)
		if !voter {
			c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
			c.settled(1, 2, 3)
		}
		c.works(1, 2, 3)
		c.sameStates(1, 2, 3)
	}
}

func TestQuorumLost(t *testing.T) {
	t.Parallel()
	const notServing = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	for _, leads := range []bool{false, true} {
		t.Run(fmt.Sprintf("the survivor led: %v", leads), func(t *testing.T) {
			c := newCluster(t, 3)
			c.init(1, 2, 3)
			left := c.settled(1, 2, 3)
			if !leads {
				left = 1 + left%3
			}
			a, b := 1+left%3, 1+(left+1)%3
			version := c.set(left, "k", "v")
			var addresses []string
			for _, id := range []uint64{a, b} {
				addresses = append(addresses, c.nodes[id].address)
				c.kill(id)
			}
			c.start(a, addresses[0])
			c.start(b, addresses[1])
			names := []string{fmt.Sprint("node ", a), fmt.Sprint("node ", b)}
			naming := func(text string) bool { return strings.Contains(text, names[0]) && strings.Contains(text, names[1]) }
			eventually(t, func() error {
				m, err := c.metrics(left)
				if err == nil && (m.Healthy || !naming(m.UnhealthyReason)) {
					err = fmt.Errorf("it is healthy (%v), or not because %q", m.Healthy, m.UnhealthyReason)
				}
				return err
			})
			c.health(left, "raftkv.v1.KVService", notServing)
			c.health(left, restartHealth, notServing)
			c.wants(left, true, "k", "v", version)

			var wg sync.WaitGroup
			for _, id := range []uint64{a, b} {
				wantError(t, getError(c, id, true), codes.Unavailable, "NOT_INITIALIZED")
			}
			if leads {
				return // what follows takes a while
			}
			n := c.nodes[left]
			for name, f := range map[string]func() error{
				"Set":    func() error { _, err := n.Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: []byte("w")}); return err },
				"Delete": func() error { _, err := n.Delete(c.ctx, &kvpb.DeleteRequest{Key: "k"}); return err },
				"Get":    func() error { return getError(c, left, false) },
				"List":   func() error { _, err := n.List(c.ctx, &kvpb.ListRequest{}); return err },
			} {
				wg.Go(func() {
					err := f()
					wantError(t, err, codes.Unavailable, "NO_LEADER")
					if !naming(status.Convert(err).Message()) {
						t.Errorf("%s does not say who is missing: %v", name, err)
					}
				})
			}
			for _, id := range []uint64{a, b} {
				for _, local := range []bool{true, false} {
					wg.Go(func() { wantError(t, getError(c, id, local), codes.Unavailable, "NOT_INITIALIZED") })
					wg.Go(func() {
						_, err := c.nodes[id].List(c.ctx, &kvpb.ListRequest{Local: local})
						wantError(t, err, codes.Unavailable, "NOT_INITIALIZED")
					})
				}
			}
			wg.Wait()
			c.uninitialized(a, b) // nothing was made up
			c.health(a, "raftkv.v1.KVService", notServing)
			c.wants(left, true, "k", "v", version)
		})
	}
}

// impostor plays a leader that a node hears and whose cluster it is to join.
type impostor struct {
	n     *testNode
	hello *kvpb.Hello
}

func newImpostor(t *testing.T, n *testNode) *impostor {
	t.Helper()
	h, err := stranger(n)
	if err != nil {
		t.Fatal(err)
	}
	h.ClusterId = 4711
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	peer, hangUp := callAsPeer(n)
	t.Cleanup(hangUp)
	s, err := peer.Stream(ctx)
	if err == nil {
		err = s.Send(&kvpb.StreamRequest{Hello: h})
	}
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := s.Recv(); err != nil || resp.GetWelcome().GetVerdict() != kvpb.Verdict_VERDICT_ACCEPTED {
		t.Fatalf("%v, %v", resp, err)
	}
	return &impostor{n, h}
}

// snapshot makes one, and cuts it into the requests that carry it.
func (i *impostor) snapshot(t *testing.T, index uint64, chunk int) []*kvpb.InstallSnapshotRequest {
	t.Helper()
	s := newStore()
	s.clusterID, s.index, s.term, s.version = i.hello.ClusterId, index, 5, index
	s.configure(&raftpb.ConfState{Voters: []uint64{i.hello.From.RaftId}, Learners: []uint64{i.hello.To.RaftId}, AutoLeave: new(false)},
		[]*kvpb.Member{{RaftId: i.hello.From.RaftId, Node: i.hello.From.Node}, {RaftId: i.hello.To.RaftId, Node: i.hello.To.Node}})
	for k := range uint64(8) {
		value := fmt.Sprint(index)
		if k%4 == 0 {
			value = strings.Repeat("x", 1<<20)
		}
		s.set([]byte(fmt.Sprint("key ", k)), item{[]byte(value), k + 1})
	}
	var reqs []*kvpb.InstallSnapshotRequest
	for data := range slices.Chunk(snapshotBytes(t, s), chunk) {
		reqs = append(reqs, &kvpb.InstallSnapshotRequest{Data: data})
	}
	reqs[0].Hello, reqs[0].Term = i.hello, 5
	return reqs
}

// send sends requests. Without an answer it goes away once they are sent.
func (i *impostor) send(reqs []*kvpb.InstallSnapshotRequest, answer bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
	defer cancel()
	peer, hangUp := callAsPeer(i.n)
	defer hangUp()
	s, err := peer.InstallSnapshot(ctx)
	if err != nil {
		return err
	}
	for _, req := range reqs {
		if err := s.Send(req); err == io.EOF {
			break // the answer says why
		} else if err != nil {
			return err
		}
	}
	if !answer {
		return errors.New("gone")
	}
	_, err = s.CloseAndRecv()
	return err
}

// state is all of a node's state, in bytes.
func (c *testCluster) state(id uint64) string {
	c.t.Helper()
	h, rest := c.dump(id)
	return h.String() + string(rest)
}

// noTransfers waits until a node neither sends nor receives a snapshot.
func (c *testCluster) noTransfers(ids ...uint64) {
	c.t.Helper()
	for _, id := range ids {
		s := c.nodes[id].server
		eventually(c.t, func() error {
			return s.n.do(c.ctx, func() error {
				s.n.store.mu.RLock()
				defer s.n.store.mu.RUnlock()
				s.net.mu.Lock()
				defer s.net.mu.Unlock()
				receives := 0
				for key := range s.net.inbound {
					if key.snapshot {
						receives++
					}
				}
				if len(s.n.snapshots.views)+len(s.n.store.views)+receives > 0 {
					return fmt.Errorf("node %d sends from %d views, has %d open, receives %d", id, len(s.n.snapshots.views), len(s.n.store.views), receives)
				}
				return nil
			})
		})
	}
}

type requests = []*kvpb.InstallSnapshotRequest

// saboteur stands between a node and those it dials.
type saboteur struct {
	act  atomic.Pointer[func(c *sabotaged, b []byte) []byte] // in the middle of a snapshot
	hits atomic.Int64
}

// sabotaged is a connection. In the middle of a snapshot is where more than
// half a MiB has been sent.
type sabotaged struct {
	net.Conn
	s     *saboteur
	sent  int
	black bool // what is written goes nowhere
}

func (s *saboteur) join(n *testNode) {
	dial := n.server.net.dialer.connect
	n.server.net.dialer.connect = func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, address)
		if err != nil {
			return nil, err
		}
		return &sabotaged{Conn: conn, s: s}, nil
	}
}

// next says what shall happen to the next snapshot, once.
func (s *saboteur) next(act func(c *sabotaged, b []byte) []byte) {
	s.act.Store(&act)
}

func (c *sabotaged) Write(b []byte) (int, error) {
	n := len(b)
	c.sent += n
	if act := c.s.act.Load(); act != nil && c.sent > 512<<10 && bytes.Contains(b, xs) && c.s.act.CompareAndSwap(act, nil) {
		c.s.hits.Add(1)
		b = (*act)(c, b)
	}
	if c.black {
		return n, nil
	}
	if _, err := c.Conn.Write(b); err != nil {
		return 0, err
	}
	return n, nil
}

// xs is in the middle of a value of fill.
var xs = bytes.Repeat([]byte("x"), 64)

func TestSnapshotTransfer(t *testing.T) {
	t.Parallel()
	t.Run("flaws", func(t *testing.T) {
		c := newCluster(t, 1)
		i := newImpostor(t, c.nodes[1])
		for _, step := range []struct {
			index uint64
			role  kvpb.Role
		}{{100, kvpb.Role_ROLE_UNINITIALIZED}, {200, kvpb.Role_ROLE_LEARNER}} {
			if m, err := c.metrics(1); err != nil || m.Role != step.role {
				t.Fatal(m, err)
			}
			before := c.state(1)
			good := func() requests { return i.snapshot(t, step.index, 300_000) }
			for _, tt := range []struct {
				name   string
				answer bool
				flaw   func(requests) requests
			}{
				{"a bad checksum", true, func(r requests) requests { r[0].Data[8+4]++; return r }},
				{"damage at its end", true, func(r requests) requests { d := r[len(r)-1].Data; d[len(d)-1] ^= 1 << 7; return r }},
				{"a damaged value", true, func(r requests) requests {
					at := bytes.Index(r[3].Data, xs)
					r[3].Data = slices.Clone(r[3].Data)
					r[3].Data[at] = 'y'
					return r
				}},
				{"it ends half way", true, func(r requests) requests { return r[:len(r)/2] }},
				{"it ends behind a frame", true, func(r requests) requests { r[0].Data = r[0].Data[:8+maxFrameBytes]; return r[:1] }},
				{"the last one is missing", true, func(r requests) requests { return r[:len(r)-1] }},
				{"one is missing", true, func(r requests) requests { return slices.Delete(r, 4, 5) }},
				{"one comes twice", true, func(r requests) requests { return slices.Insert(r, 4, r[4]) }},
				{"something follows", true, func(r requests) requests { return append(r, r[len(r)-1]) }},
				{"no hello", true, func(r requests) requests { r[0].Hello = nil; return r }},
				{"nothing", true, func(requests) requests { return nil }},
				{"the sender goes away", false, func(r requests) requests { return r[:len(r)/2] }},
			} {
				if err := i.send(tt.flaw(good()), tt.answer); err == nil {
					t.Fatalf("%s: it was taken", tt.name)
				}
				c.noTransfers(1)
				if c.state(1) != before {
					t.Fatalf("%s: the state has changed", tt.name)
				}
				if m, err := c.metrics(1); err != nil || m.Role != step.role {
					t.Fatalf("%s: %v, %v", tt.name, m, err)
				}
				if step.role == kvpb.Role_ROLE_UNINITIALIZED {
					wantError(t, getError(c, 1, true), codes.Unavailable, "NOT_INITIALIZED")
				}
			}
			if err := i.send(good(), true); err != nil {
				t.Fatalf("without a flaw: %v", err)
			}
			c.wants(1, true, "key 1", fmt.Sprint(step.index), 2)
			c.noTransfers(1)
		}
	})

	t.Run("recovery", func(t *testing.T) {
		three := []uint64{1, 2, 3}
		c := newCluster(t, 3)
		var s saboteur
		for _, n := range c.nodes {
			s.join(n)
		}
		c.init(three...)
		big := strings.Repeat("x", 1<<20)
		for k := range 3 {
			c.set(1, fmt.Sprint("large ", k), big)
			c.set(2, fmt.Sprint("small ", k), "v")
		}
		hit, goOn := make(chan struct{}), make(chan struct{})
		hold := func(_ *sabotaged, b []byte) []byte { hit <- struct{}{}; <-goOn; return b }
		lose := func(conn *sabotaged, b []byte) []byte { conn.black = true; hit <- struct{}{}; return b }
		for _, tt := range []struct {
			name string
			act  func(*sabotaged, []byte) []byte
			then func(leader uint64)
		}{
			{"nothing", func(_ *sabotaged, b []byte) []byte { return b }, nil},
			{"a bit flips", func(_ *sabotaged, b []byte) []byte {
				b = slices.Clone(b)
				b[bytes.Index(b, xs)] ^= 1
				return b
			}, nil},
			{"the connection breaks", func(conn *sabotaged, b []byte) []byte { _ = conn.Close(); return b }, nil},
			{"the receiver dies", lose, func(uint64) { c.killed(4) }},
			{"the sender loses leadership", hold, func(leader uint64) {
				c.transfer(leader, 1+leader%3)
				goOn <- struct{}{}
			}},
			{"the sender dies", lose, func(leader uint64) { c.killed(leader) }}, // the last: nobody stands between it and others then
		} {
			t.Logf("— %s", tt.name)
			leader := c.settled(three...)
			via := 1 + leader%3
			c.start(4, "127.0.0.1:0")
			s.hits.Store(0)
			s.next(tt.act)
			ended := make(chan error, 1)
			ctx, node, stub := c.ctx, c.proto(4)[0], c.nodes[via]
			go func() {
				_, err := stub.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: node})
				ended <- err
			}()
			if tt.then != nil {
				<-hit
				tt.then(leader)
			}
			if err := <-ended; err != nil {
				t.Logf("AddLearner: %v", err)
				eventually(t, func() error { // who it is passed on to may just have died
					_, err := stub.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: node})
					return err
				})
			}
			c.settled(three...)
			if s.hits.Load() != 1 {
				t.Fatalf("%s: it happened %d times", tt.name, s.hits.Load())
			}
			eventually(t, func() error { // the follower counts as one again
				m, err := c.metrics(c.settled(three...))
				for _, member := range m.GetMembers() {
					if member.Node.Id == 4 && member.Learner && member.GetProgress().GetCaughtUp() && member.GetProgress().GetState() == kvpb.ProgressState_PROGRESS_STATE_REPLICATE {
						return nil
					}
				}
				return fmt.Errorf("%s: %v, %v", tt.name, m, err)
			})
			c.noTransfers(1, 2, 3, 4)
			c.works(1, 2, 3, 4)
			c.sameStates(1, 2, 3, 4)
			c.change(via, &kvpb.ChangeMembershipRequest{Members: three, Remove: []uint64{4}})
			c.uninitialized(4)
			c.stop(4)
		}
	})

	// Learners whose configuration is the same when they need it.
	t.Run("one view for two", func(t *testing.T) {
		c := newCluster(t, 3, func(o *options) { o.logBytes = 64 << 10 })
		var s saboteur
		s.join(c.nodes[1])
		c.init(1)
		c.addLearner(1, 2)
		c.addLearner(1, 3)
		c.cut(1)
		c.fill(1, 24)
		before := c.sentSnapshots()
		hits, goOn := make(chan struct{}, 2), make(chan struct{})
		var hold func(*sabotaged, []byte) []byte
		hold = func(_ *sabotaged, b []byte) []byte {
			if s.hits.Load() == 1 {
				s.next(hold)
			}
			hits <- struct{}{}
			<-goOn
			return b
		}
		s.next(hold)
		c.cut(3) // and nobody else
		<-hits
		c.set(1, "between", "v") // is not in the view
		c.heal()
		<-hits
		n := c.nodes[1].server.n
		if err := n.do(c.ctx, func() error {
			if len(n.snapshots.views) != 1 || n.snapshots.views[0].readers != 2 || len(n.store.views) != 1 {
				return fmt.Errorf("%d views, %d of the store", len(n.snapshots.views), len(n.store.views))
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		close(goOn)
		c.noTransfers(1, 2, 3)
		c.sameStates(1, 2, 3)
		if sent := c.sentSnapshots() - before; sent != 2 {
			t.Errorf("%d snapshots were sent", sent)
		}
	})

	t.Run("chunks", func(t *testing.T) {
		s := newTestStore()
		s.clusterID = 1
		var ws []*kvpb.Write
		for k := range 6 {
			ws = append(ws, setWrite(fmt.Sprint("large ", k), strings.Repeat("x", 1<<20)), setWrite(fmt.Sprint("small ", k), "v"),
				setWrite(fmt.Sprint(k, strings.Repeat("k", maxKeyBytes-1)), strings.Repeat("x", 1<<20)))
		}
		applyBatch(t, s, 1, 1, ws...)
		v := s.openView()
		defer v.close()
		var got bytes.Buffer
		chunks := 0
		err := transferTo(t, v, func(req *kvpb.InstallSnapshotRequest) error {
			chunks++
			if (req.Hello != nil) != (chunks == 1) || len(req.Data) > 1<<20 {
				return fmt.Errorf("chunk %d: %d bytes, hello %v", chunks, len(req.Data), req.Hello)
			}
			got.Write(req.Data)
			return nil
		})
		if err != nil || chunks < 10 || !bytes.Equal(got.Bytes(), viewBytes(t, v)) {
			t.Fatalf("%v; %d chunks", err, chunks)
		}
	})
}

// sink is a node as far as a snapshot's sender can tell.
type sink struct {
	kvpb.UnimplementedRaftServiceServer
	take func(*kvpb.InstallSnapshotRequest) error
}

func (s *sink) InstallSnapshot(stream kvpb.RaftService_InstallSnapshotServer) error {
	for {
		req, err := stream.Recv()
		if err == io.EOF {
			return stream.SendAndClose(&kvpb.InstallSnapshotResponse{})
		}
		if err == nil {
			err = s.take(req)
		}
		if err != nil {
			return err
		}
	}
}

// sender is the other end: what its network needs of a node.
type sender struct {
	receiver // nothing else is asked for
	sent     chan error
}

func (s *sender) hello() *kvpb.Hello {
	return &kvpb.Hello{ClusterId: 1, From: &kvpb.Peer{Node: &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, RaftId: 1, Life: 1}}
}
func (s *sender) peerDown(uint64, bool)                     {}
func (s *sender) snapshotSent(_ uint64, _ *view, err error) { s.sent <- err }

// transferTo sends a view by the network to whatever takes the requests.
func transferTo(t *testing.T, v *view, take func(*kvpb.InstallSnapshotRequest) error) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessageBytes), grpc.InitialWindowSize(windowBytes), grpc.InitialConnWindowSize(windowBytes))
	kvpb.RegisterRaftServiceServer(server, &sink{take: take})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	r := &sender{sent: make(chan error, 1)}
	nw := newNetwork(r, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	defer func() {
		nw.close()
		server.Stop()
		<-served
	}()
	nw.setMembers(1, 1, map[uint64]*kvpb.Node{2: {Id: 2, Address: l.Addr().String()}}, nil)
	nw.sendSnapshot(2, 1, v)
	return <-r.sent
}

// liveHeap is what is in use, without what the collector has yet to free.
func liveHeap() uint64 {
	runtime.GC()
	runtime.GC() // what pools hold lives for one more
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestSnapshotHeap(t *testing.T) {
	const limit = 8 << 20 // of a node
	c := newCluster(t, 1)
	c.init(1)
	srv := c.nodes[1].server
	n := srv.n
	if err := n.do(c.ctx, func() error { // as if it had been written
		n.store.mu.Lock()
		defer n.store.mu.Unlock()
		for i := range 32 << 10 {
			n.store.version++
			n.store.set([]byte(fmt.Sprintf("key %06d", i)), item{bytes.Repeat([]byte("x"), 1024), n.store.version})
		}
		for i := range 32 {
			n.store.version++
			n.store.set([]byte(fmt.Sprintf("large %06d", i)), item{bytes.Repeat([]byte("x"), 1<<20), n.store.version})
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var v *view
	if err := n.do(c.ctx, func() error { v = n.store.openView(); return nil }); err != nil {
		t.Fatal(err)
	}
	defer v.close()
	base := liveHeap()

	// sample collects what is live every few chunks, while whoever sends waits.
	var peak, chunks, size uint64
	sample := func(req *kvpb.InstallSnapshotRequest) error {
		size += uint64(len(req.Data))
		if chunks++; chunks%20 == 0 {
			peak = max(peak, liveHeap())
		}
		return nil
	}
	check := func(what string, limit int64) {
		t.Helper()
		over := int64(peak) - int64(base)
		if size < 64<<20 || chunks < 64 || peak == 0 {
			t.Errorf("%s: %d bytes in %d chunks", what, size, chunks)
		}
		if over > limit {
			t.Errorf("%s takes %d bytes of heap over the map", what, over)
		}
		t.Logf("%s: %d KiB over the map, %d chunks", what, over>>10, chunks)
		peak, chunks, size = 0, 0, 0
	}
	if err := v.writeTo(chunkWriter(func(b []byte) error { return sample(&kvpb.InstallSnapshotRequest{Data: b}) })); err != nil {
		t.Fatal(err)
	}
	check("writing a view", limit)
	if err := transferTo(t, v, sample); err != nil {
		t.Fatal(err)
	}
	check("sending a view, and receiving it", 2*limit)

	// All that a page allocates is more than it ever has at once.
	for _, req := range []*kvpb.ListRequest{{Local: true}, {Limit: 10_000}, {Prefix: "large ", Limit: 10_000}} {
		pages, items := 0, 0
		for more := true; more && pages < 5; pages++ {
			var resp *kvpb.ListResponse
			var err error
			got := allocated(func() { resp, err = srv.List(t.Context(), req) })
			if err != nil {
				t.Fatal(err)
			}
			if got > limit {
				t.Errorf("page %d of %v allocates %d bytes", pages, req, got)
			}
			items += len(resp.Items)
			req.PageToken, more = resp.NextPageToken, resp.NextPageToken != ""
		}
		if pages < 5 {
			t.Errorf("%v has %d items in %d pages", req, items, pages)
		}
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.init(1, 2, 3)
	want := map[string]bool{}
	for i := range 60 {
		key := fmt.Sprintf("%c/%02d", "ab"[i%2], i)
		want[key] = true
		c.set(1+uint64(i)%3, key, fmt.Sprint("value ", i))
	}
	keysOf := func(items []*kvpb.KeyValue) (keys []string) {
		for _, it := range items {
			keys = append(keys, it.Key)
		}
		return keys
	}
	all := slices.Sorted(maps.Keys(want))
	c.sameStates(1, 2, 3)
	for id := uint64(1); id <= 3; id++ {
		for _, tt := range []struct {
			req   *kvpb.ListRequest
			keys  []string
			pages int
		}{
			{&kvpb.ListRequest{}, all, 1},
			{&kvpb.ListRequest{Local: true}, all, 1},
			{&kvpb.ListRequest{Limit: 10_000}, all, 1},
			{&kvpb.ListRequest{Limit: 60}, all, 1},
			{&kvpb.ListRequest{Limit: 59}, all, 2},
			{&kvpb.ListRequest{Limit: 1, Local: true}, all, 60},
			{&kvpb.ListRequest{Limit: 7, Prefix: "b/", Local: true}, all[30:], 5},
			{&kvpb.ListRequest{Prefix: "a/0"}, all[:5], 1},
			{&kvpb.ListRequest{Prefix: "a/00"}, all[:1], 1},
			{&kvpb.ListRequest{Prefix: "a/000"}, nil, 1},
			{&kvpb.ListRequest{Prefix: "c"}, nil, 1},
			{&kvpb.ListRequest{PageToken: all[9]}, all[10:], 1},
			{&kvpb.ListRequest{PageToken: all[9] + "\x00", Limit: 25}, all[10:], 2},
			{&kvpb.ListRequest{PageToken: "zzz"}, nil, 1},
			{&kvpb.ListRequest{PageToken: strings.Repeat("a", maxKeyBytes), Prefix: "b", Limit: 30}, all[30:], 1},
		} {
			items, pages, err := c.listAll(id, tt.req)
			if err != nil || pages != tt.pages || !slices.Equal(keysOf(items), tt.keys) {
				t.Errorf("List %v through node %d: %q in %d pages, %v; want %q in %d", tt.req, id, keysOf(items), pages, err, tt.keys, tt.pages)
			}
			for _, it := range items[:min(3, len(items))] {
				c.wants(id, true, it.Key, string(it.Value), it.Version)
			}
		}
		for _, b := range []badCall{
			badList("a long prefix", &kvpb.ListRequest{Prefix: strings.Repeat("p", maxKeyBytes+1)}),
			badList("a long token", &kvpb.ListRequest{PageToken: strings.Repeat("p", maxKeyBytes+1)}),
			badList("too many", &kvpb.ListRequest{Limit: 10_001}),
		} {
			wantError(t, b.call(c.ctx, c.nodes[id]), b.code, b.reason)
		}
	}
	for _, local := range []bool{true, false} {
		_, err := c.nodes[4].List(c.ctx, &kvpb.ListRequest{Local: local})
		wantError(t, err, codes.Unavailable, "NOT_INITIALIZED")
	}
	// A write is seen at once, wherever it was made.
	for i := range 20 {
		c.set(1+uint64(i)%3, fmt.Sprintf("z/%02d", i), "v")
		if items, _, err := c.listAll(1+uint64(i+1)%3, &kvpb.ListRequest{Prefix: "z/"}); err != nil || len(items) != i+1 {
			t.Fatalf("after %d writes: %d items, %v", i+1, len(items), err)
		}
	}

	// Pages while others write: what was there throughout is in them.
	ctx, cancel := context.WithCancel(c.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var writes atomic.Int64
	for id := uint64(1); id <= 3; id++ {
		n := c.nodes[id]
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprintf("%c/%02d passing %d", "ab"[i%2], i%60, id)
				if _, err := n.Set(ctx, &kvpb.SetRequest{Key: key, Value: []byte("v")}); err != nil {
					return
				}
				// Present all the time, but not always the same.
				if _, err := n.Set(ctx, &kvpb.SetRequest{Key: all[i%len(all)], Value: []byte(fmt.Sprint(i, " by ", id))}); err != nil {
					return
				}
				if _, err := n.Delete(ctx, &kvpb.DeleteRequest{Key: key}); err != nil {
					return
				}
				writes.Add(3)
			}
		})
	}
	passing := false
	eventually(t, func() error {
		for id := uint64(1); id <= 3; id++ {
			for _, limit := range []uint32{3, 10, 10_000} {
				items, _, err := c.listAll(id, &kvpb.ListRequest{Limit: limit, Prefix: "a/", Local: limit == 10})
				if err != nil {
					return err
				}
				keys := keysOf(items)
				if !slices.IsSorted(keys) || len(slices.Compact(slices.Clone(keys))) != len(keys) {
					t.Fatalf("out of order, or twice: %q", keys)
				}
				passing = passing || len(keys) > 30
				if got := slices.DeleteFunc(keys, func(k string) bool { return !want[k] }); !slices.Equal(got, all[:30]) {
					t.Fatalf("not all that was there: %q", got)
				}
			}
		}
		if !passing || writes.Load() < 300 {
			return errors.New("nobody wrote meanwhile")
		}
		return nil
	})
	cancel()
	wg.Wait()

	// Large values: a page ends before it has more than 1 MiB, but never empty.
	large := strings.Repeat("x", 1<<20)
	for i := range 3 {
		c.set(1, fmt.Sprint("large ", i, " whole"), large)
		c.set(2, fmt.Sprint("large ", i, " half"), large[:1<<19])
		c.set(3, fmt.Sprint("large ", i, " small"), "v")
	}
	for id := uint64(1); id <= 3; id++ {
		items, pages, err := c.listAll(id, &kvpb.ListRequest{Prefix: "large "})
		if err != nil || len(items) != 9 || pages != 6 {
			t.Errorf("%d items of 9 in %d pages of 6: %v", len(items), pages, err)
		}
		resp, err := c.nodes[id].List(c.ctx, &kvpb.ListRequest{Prefix: "large 0 w"})
		if err != nil || len(resp.Items) != 1 || len(resp.Items[0].Value) != 1<<20 || resp.NextPageToken != "" {
			t.Errorf("a value of 1 MiB is no page: %d items, %v", len(resp.GetItems()), err)
		}
	}
}
