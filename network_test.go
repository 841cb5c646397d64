// Tests of network.go, peer.go and dial.go: streams and hellos, the parts of a peer, and
// how names and addresses are connected to, some of which are dead.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"raft-key-value/kvpb"
)

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
	conn := dial(n.address, nil)
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

// recorder is what a network needs of a node, and keeps what it is told.
type recorder struct {
	receiver
	nw   *network // whose mu is held while it tells of a stream
	mu   sync.Mutex
	told []string
}

func (r *recorder) tell(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = append(r.told, fmt.Sprintf(format, args...))
}

// all returns what it was told since it was last asked, but that a peer is down
// that was.
func (r *recorder) all() (told []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	told, r.told = slices.Compact(r.told), nil
	return told
}

func (r *recorder) hello() *kvpb.Hello {
	return &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(1), RaftId: 1, Life: 1}}
}

func (r *recorder) peerUp(id uint64, outbound bool, _ *kvpb.Peer) {
	_, life := r.nw.peers[id].location()
	if !outbound {
		life = r.nw.messagesFrom(id).hello.From.Life
	}
	r.tell("up %d %d %v", id, life, outbound)
}

func (r *recorder) peerMoved(id uint64, to *kvpb.Node) { r.tell("moved %d %s", id, to.Address) }

func (r *recorder) peerStops(id uint64)        { r.tell("stops %d", id) }
func (r *recorder) peerDown(id uint64, _ bool) { r.tell("down %d", id) }

func (r *recorder) refused(_, raftID uint64, w *kvpb.Welcome) {
	r.tell("refused %d %v", raftID, w.Verdict)
}

// sender is the other end: what its network needs of a node.
type sender struct {
	receiver // nothing else is asked for
	sent     chan error
}

func (s *sender) hello() *kvpb.Hello {
	return &kvpb.Hello{ClusterId: 1, From: &kvpb.Peer{Node: &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, RaftId: 1, Life: 1}}
}

func (s *sender) peerDown(uint64, bool) {}

func (s *sender) peerStops(uint64) {}

func (s *sender) snapshotSent(_ uint64, _ *view, err error) { s.sent <- err }

// answering is a process that answers each hello with a Welcome.
type answering struct {
	kvpb.UnimplementedRaftServiceServer
	welcome atomic.Pointer[kvpb.Welcome]
	asked   atomic.Int64
}

func (a *answering) Stream(s kvpb.RaftService_StreamServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	a.asked.Add(1)
	w := a.welcome.Load()
	if err := s.Send(&kvpb.StreamResponse{Welcome: w}); err != nil || w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
		return err
	}
	_, err := s.Recv()
	return err
}

// newAnswering serves, as node 2 by raft ID 2, with that life.
func newAnswering(t *testing.T, life uint64) (a *answering, node *kvpb.Node, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a, node = &answering{}, &kvpb.Node{Id: 2, Address: l.Addr().String()}
	a.welcome.Store(&kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_ACCEPTED, ClusterId: 7, Peer: &kvpb.Peer{Node: node, RaftId: 2, Life: life}})
	g := grpc.NewServer()
	kvpb.RegisterRaftServiceServer(g, a)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	stop = sync.OnceFunc(func() { g.Stop(); <-served })
	t.Cleanup(stop)
	return a, node, stop
}

// silentNode takes streams and says nothing.
type silentNode struct {
	kvpb.UnimplementedRaftServiceServer
}

func (silentNode) Stream(s kvpb.RaftService_StreamServer) error {
	<-s.Context().Done()
	return s.Context().Err()
}

// testNetwork is the network of node 1, which knows node 2 at an address.
func testNetwork(t *testing.T, log io.Writer, known *kvpb.Node) (*network, *recorder) {
	t.Helper()
	r := &recorder{}
	nw := newNetwork(r, slog.New(slog.NewTextHandler(log, nil)), nil)
	r.nw = nw
	t.Cleanup(nw.close)
	nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: known}, nil)
	return nw, r
}

// hearFrom hears a hello of node 2 from an address.
func hearFrom(nw *network, at *kvpb.Node, life uint64) (done func(), err error) {
	h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: at, RaftId: 2, Life: life}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}}
	return nw.addInbound(h, false, func(error) {})
}

// hintOf is where node 2 is said to be.
func hintOf(nw *network) *moveHint {
	nw.mu.Lock()
	p := nw.peers[2]
	nw.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addresses.hint
}

// awaits waits until the last that the network told is this, and returns all of it.
func (r *recorder) awaits(t *testing.T, last string) (told []string) {
	t.Helper()
	eventually(t, func() error {
		if told = append(told, r.all()...); len(told) == 0 || told[len(told)-1] != last {
			return fmt.Errorf("not told of %q: %q", last, told)
		}
		return nil
	})
	return told
}

// TestMoveClaims: where an accepted hello came from, its sender is dialed, too. It is
// used once the right life of the right peer answers there, and only then.
func TestMoveClaims(t *testing.T) {
	t.Parallel()
	dead := &kvpb.Node{Id: 2, Address: deadAddress(t)}

	t.Run("it is there", func(t *testing.T) {
		var log sharedLog
		nw, r := testNetwork(t, &log, dead)
		nw.mu.Lock()
		p := nw.peers[2]
		nw.mu.Unlock()
		eventually(t, func() error { // until it waits for the known address
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.yielding == nil {
				return errors.New("it does not wait")
			}
			return nil
		})
		_, node, _ := newAnswering(t, 5)
		done, err := hearFrom(nw, node, 5)
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		told := r.awaits(t, "moved 2 "+node.Address)
		if i := slices.Index(told, "up 2 5 true"); i < 0 || i != len(told)-2 {
			t.Errorf("it is told %q", told)
		}
		eventually(t, func() error {
			if n := strings.Count(log.String(), peerMoved); n != 1 {
				return fmt.Errorf("it is said %d times", n)
			}
			return nil
		})
		wantPart(t, log.String(), errElsewhere.Error()) // it has not waited until the known address is given up
		// The configuration follows: the stream stays.
		nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: node}, nil)
		if told := r.all(); len(told) > 0 {
			t.Errorf("it is told %q", told)
		}
	})

	for name, change := range map[string]func(*kvpb.Welcome){
		"another life":    func(w *kvpb.Welcome) { w.Peer.Life++ },
		"another peer":    func(w *kvpb.Welcome) { w.Peer.RaftId++ },
		"another cluster": func(w *kvpb.Welcome) { w.ClusterId++ },
		"it refuses":      func(w *kvpb.Welcome) { w.Verdict = kvpb.Verdict_VERDICT_REMOVED },
	} {
		t.Run(name, func(t *testing.T) {
			var log sharedLog
			a, node, _ := newAnswering(t, 5)
			change(a.welcome.Load())
			nw, r := testNetwork(t, &log, dead)
			done, err := hearFrom(nw, node, 5)
			if err != nil {
				t.Fatal(err)
			}
			defer done()
			eventually(t, func() error {
				if a.asked.Load() < 3 {
					return errors.New("it was not asked")
				}
				return nil
			})
			for _, told := range r.all() {
				if told != "down 2" && told != "up 2 5 false" {
					t.Errorf("it is told %q", told)
				}
			}
			if n := strings.Count(log.String(), "not found where it says that it is"); n != 1 {
				t.Errorf("it is said %d times: %s", n, &log)
			}
		})
	}

	t.Run("it is where it was", func(t *testing.T) { // however often others say otherwise
		a, node, _ := newAnswering(t, 4)
		nw, r := testNetwork(t, io.Discard, node)
		liar, there, _ := newAnswering(t, 5)
		r.awaits(t, "up 2 4 true")
		if _, err := hearFrom(nw, there, 5); err != errRival {
			t.Errorf("who is elsewhere is heard: %v", err)
		}
		nw.learnAddresses(7, []*kvpb.Peer{{Node: there, RaftId: 2, Life: 5}, {RaftId: 2}, nil})
		if liar.asked.Load() > 0 || a.asked.Load() != 1 || len(r.all()) > 0 {
			t.Error("somebody else was asked")
		}
	})

	t.Run("another node", func(t *testing.T) {
		a, node, _ := newAnswering(t, 5)
		nw, r := testNetwork(t, io.Discard, dead)
		if _, err := hearFrom(nw, &kvpb.Node{Id: 3, Address: node.Address}, 5); err != nil {
			t.Fatal(err)
		}
		if hintOf(nw) != nil || a.asked.Load() > 0 {
			t.Errorf("it is asked; it is told %q", r.all())
		}
	})

	t.Run("just before it waits", func(t *testing.T) {
		hint := &moveHint{7, &kvpb.Peer{Node: dead, RaftId: 2, Life: 5}}
		p := &peer{addresses: peerAddresses{known: dead, hint: hint}}
		ctx, cancel := context.WithCancelCause(t.Context())
		a := &streamAttempt{peer: p, target: peerTarget{node: dead}, cancel: cancel}
		if a.yieldToHints(); context.Cause(ctx) != errElsewhere {
			t.Error("it waits")
		}
	})

	t.Run("it is heard elsewhere than others hear it", func(t *testing.T) {
		nw, _ := testNetwork(t, io.Discard, dead)
		if _, err := hearFrom(nw, &kvpb.Node{Id: 2, Address: "first:1"}, 5); err != nil {
			t.Fatal(err)
		}
		nw.learnAddresses(7, []*kvpb.Peer{{Node: &kvpb.Node{Id: 2, Address: "second:1"}, RaftId: 2, Life: 6}})
		if c := hintOf(nw); c.peer.Node.Address != "first:1" {
			t.Errorf("what others say counts more: %v", c.peer)
		}
	})

	t.Run("a configuration comes that is older than what others say", func(t *testing.T) {
		nw, _ := testNetwork(t, io.Discard, dead)
		there := &kvpb.Node{Id: 2, Address: deadAddress(t)}
		nw.learnAddresses(7, []*kvpb.Peer{{Node: there, RaftId: 2, Life: 5}})
		nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: {Id: 2, Address: deadAddress(t)}}, nil)
		if h := hintOf(nw); h == nil || h.peer.Node.Address != there.Address {
			t.Errorf("it has forgotten where node 2 is: %v", h)
		}
		nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: there}, nil)
		if hintOf(nw) != nil {
			t.Error("it looks for node 2 elsewhere than the configuration says, as if others did")
		}
	})

	t.Run("the configuration changes", func(t *testing.T) {
		nw, r := testNetwork(t, io.Discard, dead)
		_, node, _ := newAnswering(t, 5)
		h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: node, RaftId: 2, Life: 5}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}}
		nw.mu.Lock()
		nw.inbound[inboundKey{2, false}] = &inboundStream{h, func(error) {}}
		nw.mu.Unlock()
		nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: {Id: 2, Address: deadAddress(t)}}, nil)
		r.awaits(t, "moved 2 "+node.Address)
	})

	t.Run("others hear it", func(t *testing.T) {
		_, node, _ := newAnswering(t, 5)
		nw, r := testNetwork(t, io.Discard, dead)
		nw.learnAddresses(7, []*kvpb.Peer{{Node: node, RaftId: 2, Life: 5}})
		r.awaits(t, "moved 2 "+node.Address)
		nw.learnAddresses(7, []*kvpb.Peer{{Node: dead, RaftId: 2, Life: 6}})
		nw.learnAddresses(7, []*kvpb.Peer{{Node: &kvpb.Node{Id: 2, Address: "third:1"}, RaftId: 2, Life: 6}})
		if c := hintOf(nw); c == nil || c.peer.Node.Address != node.Address {
			t.Errorf("who is connected is sought elsewhere: %v", c)
		}
	})

	t.Run("it comes back", func(t *testing.T) { // the known address counts more than a claim
		_, node, _ := newAnswering(t, 4)
		_, there, _ := newAnswering(t, 5)
		nw, r := testNetwork(t, io.Discard, node)
		r.awaits(t, "up 2 4 true")
		nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: dead}, nil)
		done, err := hearFrom(nw, there, 5)
		if err != nil {
			t.Fatal(err)
		}
		r.awaits(t, "moved 2 "+there.Address)
		done()
		back, err := hearFrom(nw, dead, 6)
		if err != nil {
			t.Fatalf("it is not heard where it is known: %v", err)
		}
		defer back()
		r.awaits(t, "down 2")
		if hintOf(nw) != nil {
			t.Error("it is still sought elsewhere")
		}
	})
}

// TestMoveClaimsAreTriedBriefly: whoever says hello from an address where nobody answers
// does not keep a node from dialing the known one.
func TestMoveClaimsAreTriedBriefly(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		l := bufconn.Listen(64 << 10)
		g := grpc.NewServer()
		kvpb.RegisterRaftServiceServer(g, silentNode{})
		served := make(chan error, 1)
		go func() { served <- g.Serve(l) }()
		var known, claimed atomic.Int64
		r := &recorder{}
		nw := newNetwork(r, quiet(), func(ctx context.Context, address string) (net.Conn, error) {
			if address == "known:1" {
				known.Add(1)
				return nil, errors.New("no route")
			}
			claimed.Add(1)
			return l.DialContext(ctx)
		})
		r.nw = nw
		nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: {Id: 2, Address: "known:1"}}, nil)
		if _, err := hearFrom(nw, &kvpb.Node{Id: 2, Address: "claimed:1"}, 5); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * helloTimeout) // by the fake clock
		nw.close()
		g.Stop()
		<-served
		if known.Load() < 6 || claimed.Load() < 6 {
			t.Errorf("the known address was dialed %d times, the other %d times", known.Load(), claimed.Load())
		}
	})
}

// TestEventsOfReplacedStreams: of a stream that was replaced the loop is told nothing
// any more, and of its end at once.
func TestEventsOfReplacedStreams(t *testing.T) {
	_, here, _ := newAnswering(t, 4)
	_, there, _ := newAnswering(t, 5)
	nw, r := testNetwork(t, io.Discard, here)
	r.awaits(t, "up 2 4 true")
	nw.mu.Lock()
	old := nw.peers[2]
	nw.mu.Unlock()
	nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: there}, nil)
	if told := r.awaits(t, "up 2 5 true"); told[0] != "down 2" {
		t.Errorf("it is told %q", told)
	}
	if nw.streamBegan(old, &kvpb.Peer{Life: 4}, peerTarget{node: here}) {
		t.Error("the old stream is used")
	}
	nw.streamEnded(old, false)
	// Two hellos: the later one counts, also if it is answered first.
	first, err := hearFrom(nw, there, 6)
	if err != nil {
		t.Fatal(err)
	}
	second, err := hearFrom(nw, there, 7)
	if err != nil {
		t.Fatal(err)
	}
	second()
	first()
	if told := r.all(); !slices.Equal(told, []string{"up 2 6 false", "up 2 7 false"}) {
		t.Errorf("it is told %q", told)
	}
}

// TestRivals: of two processes that are one node, at two addresses, the one that is
// connected stays, and the other is told; at one address, it is said that they
// replace each other.
func TestRivals(t *testing.T) {
	var log sharedLog
	_, here, stop := newAnswering(t, 4)
	nw, r := testNetwork(t, &log, here)
	r.awaits(t, "up 2 4 true")
	elsewhere := &kvpb.Node{Id: 2, Address: deadAddress(t)}
	lines := func() int { return strings.Count(log.String(), "another process goes by a peer's raft ID") }
	for range 5 {
		if _, err := hearFrom(nw, elsewhere, 5); err != errRival {
			t.Errorf("it is heard: %v", err)
		}
	}
	if lines() != 1 {
		t.Errorf("it is said %d times: %s", lines(), &log)
	}
	for i, life := range []uint64{8, 9, 8, 8, 9, 8, 9} {
		if _, err := hearFrom(nw, here, life); err != nil {
			t.Error(err)
		}
		if want := 1 + min(1, i/4); lines() != want {
			t.Errorf("after %d hellos in turn it is said %d times", i+1, lines())
		}
	}
	stop()
	r.awaits(t, "down 2")
	if _, err := hearFrom(nw, elsewhere, 5); err != nil {
		t.Errorf("it is not heard once the other is gone: %v", err)
	}

	// The other one answers again, at the known address: who is elsewhere would wait
	// for answers that it does not get.
	nw, r = testNetwork(t, &log, &kvpb.Node{Id: 2, Address: deadAddress(t)})
	h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: elsewhere, RaftId: 2, Life: 5}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}}
	ended := make(chan error, 1)
	if _, err := nw.addInbound(h, false, func(err error) { ended <- err }); err != nil {
		t.Fatal(err)
	}
	_, here, _ = newAnswering(t, 4)
	nw.setMembers(7, 1, map[uint64]*kvpb.Node{2: here}, nil)
	r.awaits(t, "up 2 4 true")
	eventually(t, func() error {
		if len(ended) == 0 {
			return errors.New("its stream goes on")
		}
		return nil
	})
	if err := <-ended; err != errRival || hintOf(nw) != nil {
		t.Errorf("its stream ends with %v", err)
	}
}

// TestAcceptNeedsToKnowWhoItIs: a hello that does not say who calls is refused.
func TestAcceptNeedsToKnowWhoItIs(t *testing.T) {
	n := turnNode()
	p := n.status.latest.Load()
	h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{RaftId: 5, Life: 5, Node: &kvpb.Node{Id: 2, Address: "127.0.0.1:2"}}, To: &kvpb.Peer{Node: n.self, RaftId: p.raftID}}
	if w := n.accept(h); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
		t.Fatal(w)
	}
	for _, from := range []*kvpb.Peer{nil, {}, {RaftId: 5, Life: 5}, {RaftId: 5, Life: 5, Node: &kvpb.Node{Id: 2}}, {RaftId: 5, Life: 5, Node: &kvpb.Node{Address: "127.0.0.1:2"}}} {
		h.From = from
		if w := n.accept(h); w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED {
			t.Errorf("%v is accepted", from)
		}
	}
}

// liar answers every hello with a raft ID that raft keeps for itself.
type liar struct {
	kvpb.UnimplementedRaftServiceServer
	node   *kvpb.Node
	raftID uint64
}

func (l *liar) Stream(s kvpb.RaftService_StreamServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	return s.Send(&kvpb.StreamResponse{Welcome: &kvpb.Welcome{
		Verdict: kvpb.Verdict_VERDICT_ACCEPTED, Peer: &kvpb.Peer{Node: l.node, RaftId: l.raftID, Life: 5}}})
}

func newLiar(t *testing.T, id, raftID uint64) *kvpb.Node {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &kvpb.Node{Id: id, Address: lis.Addr().String()}
	g := grpc.NewServer()
	kvpb.RegisterRaftServiceServer(g, &liar{node: n, raftID: raftID})
	go func() { _ = g.Serve(lis) }()
	t.Cleanup(g.Stop)
	return n
}

// A learner whose welcome has a raft ID out of range stops nobody.
func TestWelcomeOutOfRange(t *testing.T) {
	t.Parallel()
	for nodes, raftIDs := range map[uint64][]uint64{1: {0, math.MaxUint64}, 3: {maxRaftID}} {
		for _, raftID := range raftIDs {
			t.Run(fmt.Sprintf("%d nodes, raft ID %x", nodes, raftID), func(t *testing.T) {
				c := newCluster(t, nodes, steady)
				ids := []uint64{1, 2, 3}[:nodes]
				c.init(ids...)
				ctx, cancel := context.WithTimeout(c.ctx, 2*time.Second)
				defer cancel()
				_, err := c.nodes[1].AddLearner(ctx, &kvpb.AddLearnerRequest{Node: newLiar(t, 9, raftID)})
				t.Log("AddLearner:", err)
				if err == nil {
					t.Error("it was added")
				}
				for _, id := range ids {
					_, err := c.nodes[id].Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: []byte("v")})
					if err != nil {
						t.Errorf("a Set on node %d: %v", id, err)
					}
				}
			})
		}
	}
}

// A hello from a raft ID that raft keeps for itself is refused.
func TestHelloOutOfRange(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	h, err := stranger(c.nodes[1])
	if err != nil {
		t.Fatal(err)
	}
	h.From.RaftId = math.MaxUint64
	if w := c.nodes[1].server.n.accept(h); w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED {
		t.Error("accepted")
	}
}

// TestHellosAreBounded: a connection that says hello without end is closed.
func TestHellosAreBounded(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1).nodes[1]
	conn := dial(n.address, nil)
	defer func() { _ = conn.Close() }()
	var err error
	for hellos := 0; err == nil; hellos++ {
		if hellos > 1000 {
			t.Fatal("there is no limit")
		}
		var s kvpb.RaftService_StreamClient
		if s, err = kvpb.NewRaftServiceClient(conn).Stream(t.Context()); err == nil {
			_ = s.Send(&kvpb.StreamRequest{Hello: &kvpb.Hello{}})
			_, err = s.Recv()
		}
	}
	if c := status.Code(err); c != codes.Unavailable && c != codes.ResourceExhausted {
		t.Error(err)
	}
}

// TestUnreachable: that a peer cannot be reached is said once, with the reason.
func TestUnreachable(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		var log strings.Builder
		dials := 0
		nw := newNetwork(&sender{}, slog.New(slog.NewTextHandler(&log, nil)), func(context.Context, string) (net.Conn, error) {
			dials++
			return nil, errors.New("no route")
		})
		nw.setMembers(1, 1, map[uint64]*kvpb.Node{2: {Id: 2, Address: "node2:1"}}, nil)
		time.Sleep(5 * helloTimeout)
		nw.close()
		if strings.Count(log.String(), "\n") != 1 || dials < 50 {
			t.Errorf("%d dials\n%s", dials, &log)
		}
		for _, part := range []string{peerUnreachable, "peer=2", "no route"} {
			wantPart(t, log.String(), part)
		}
	})
}

// TestPeerStates: a state of a peer is logged when it is new.
func TestPeerStates(t *testing.T) {
	var log strings.Builder
	p := &peer{log: peerLog{logger: slog.New(slog.NewTextHandler(&log, nil))}, addresses: peerAddresses{known: &kvpb.Node{Id: 2}}}
	var cancel context.CancelFunc
	p.ctx, cancel = context.WithCancel(t.Context())
	for _, s := range []struct {
		state, cause string
		lines        int
	}{
		{peerUnreachable, "a", 1},
		{peerUnreachable, "b", 0},
		{peerRefuses, "a", 1},
		{peerRefuses, "a", 0},
		{peerRefuses, "b", 1},
		{peerUnreachable, "a", 1},
		{peerConnected, "", 1},
		{peerDisconnected, "a", 1},
		{peerUnreachable, "a", 0},
		{peerConnected, "", 1},
		{peerDisconnected, "a", 1},
		{peerRefuses, "b", 1},
		{peerNotThere, "a", 1},
		{peerNotThere, "a", 0},
		{peerConnected, "", 1},
		{peerStops, "", 1},
		{peerUnreachable, "a", 0},
	} {
		log.Reset()
		p.logState(s.state, "err", s.cause)
		if lines := strings.Count(log.String(), s.state); lines != s.lines || lines > 0 && !strings.Contains(log.String(), "err="+s.cause) {
			t.Errorf("%+v: %q", s, &log)
		}
	}
	log.Reset()
	cancel()
	if p.logState(peerDisconnected); log.Len() > 0 {
		t.Errorf("of a peer that is none any more: %q", &log)
	}
}

// appendOf is a message with an entry of so many bytes.
func appendOf(bytes int) *raftpb.Message {
	return &raftpb.Message{Entries: []*raftpb.Entry{{Data: make([]byte, bytes)}}}
}

// TestSendQueueIsBounded: a queue takes no more than maxPeerMessages, nor anything once it
// has more than maxPeerBytes; what does not fit is dropped as a whole.
func TestSendQueueIsBounded(t *testing.T) {
	var q sendQueue
	if !q.add(make([]*raftpb.Message, maxPeerMessages-1)) || q.dropping {
		t.Error("there is no room for almost all")
	}
	if q.add(make([]*raftpb.Message, 2)) || !q.dropping || len(q.messages) != maxPeerMessages-1 {
		t.Errorf("more messages than it may have: %d", len(q.messages))
	}
	if !q.add(make([]*raftpb.Message, 1)) {
		t.Error("one more would fit")
	}

	q = sendQueue{}
	large := appendOf(maxPeerBytes / 4)
	for q.add([]*raftpb.Message{large}) {
		if len(q.messages) > 4 {
			t.Fatalf("%d bytes are queued", q.bytes)
		}
	}
	if len(q.messages) != 4 || !q.dropping {
		t.Errorf("%d bytes are queued", q.bytes)
	}
	for range 4 {
		if len(q.takeBatch()) != 1 {
			t.Error("a batch goes on behind a message that fills it")
		}
	}
	if q.bytes != 0 || q.dropping || len(q.takeBatch()) != 0 {
		t.Errorf("it is empty, and has %d bytes; it is dropping: %v", q.bytes, q.dropping)
	}
}

// TestSendQueueKeepsOrder: batches have all messages in order, and the room of those that
// were taken is free again.
func TestSendQueueKeepsOrder(t *testing.T) {
	var q sendQueue
	var added, taken []*raftpb.Message
	for range 10 {
		ms := []*raftpb.Message{appendOf(maxStreamBytes / 3), appendOf(10)}
		if !q.add(ms) {
			t.Fatal("there is no room")
		}
		added = append(added, ms...)
	}
	batches := 0
	for ms := q.takeBatch(); len(ms) > 0; ms = q.takeBatch() {
		taken = append(taken, ms...)
		batches++
	}
	if !slices.Equal(added, taken) || batches != 4 {
		t.Errorf("%d of %d messages in %d batches", len(taken), len(added), batches)
	}
	if q.bytes != 0 {
		t.Errorf("%d bytes are counted that are not there", q.bytes)
	}
}

// TestPeerAddressesInTurn: the known address and the newest hint's are tried in turn; a hint
// at the known address is none.
func TestPeerAddressesInTurn(t *testing.T) {
	at := func(address string) *moveHint {
		return &moveHint{7, &kvpb.Peer{Node: &kvpb.Node{Id: 2, Address: address}, RaftId: 2, Life: 5}}
	}
	a := peerAddresses{known: &kvpb.Node{Id: 2, Address: "known:1"}}
	next := func(want string, isHint, isOnly bool) {
		t.Helper()
		target := a.next()
		if target.node.Address != want || (target.hint != nil) != isHint || target.isOnly != isOnly {
			t.Errorf("%+v is next, want %s", target, want)
		}
	}
	next("known:1", false, true)
	next("known:1", false, true)
	a.take(at("old:1"))
	a.take(at("new:1"))
	next("new:1", true, false)
	next("known:1", false, false)
	next("new:1", true, false)
	a.take(at("known:1"))
	next("known:1", false, true)
}

// TestRivalsTakeTurns: two lives that come back in turn are told once; one that says hello
// again, or was late once, is none of them.
func TestRivalsTakeTurns(t *testing.T) {
	for name, test := range map[string]struct {
		lives []uint64
		at    int // the hello that tells; 0: none does
	}{
		"one life":           {[]uint64{1, 1, 1, 1}, 0},
		"one after another":  {[]uint64{1, 2, 3, 4, 5}, 0},
		"one hello was late": {[]uint64{1, 2, 1, 3, 4}, 0},
		"two were late once": {[]uint64{1, 2, 1, 3, 4, 3, 5}, 0},
		"two in turn":        {[]uint64{1, 2, 1, 2, 1, 2}, 4},
		"two, saying more":   {[]uint64{1, 1, 2, 2, 1, 1, 2, 1}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			var r rivals
			for i, life := range test.lives {
				if takeTurns := r.note(life); takeTurns != (i+1 == test.at) {
					t.Errorf("hello %d, of life %d: %v", i+1, life, takeTurns)
				}
			}
		})
	}
}

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
			withFakeClock(t, func(t *testing.T) {
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
	withFakeClock(t, func(t *testing.T) {
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
	withFakeClock(t, func(t *testing.T) {
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
	withFakeClock(t, func(t *testing.T) {
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
	withFakeClock(t, func(t *testing.T) {
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
	withFakeClock(t, func(t *testing.T) {
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
	withFakeClock(t, func(t *testing.T) {
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

// TestZone: addresses may have a zone, as link-local ones of IPv6 must.
func TestZone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	for id := uint64(1); id <= 2; id++ {
		l, err := net.Listen("tcp", "[::1%lo]:0")
		if err != nil {
			t.Skip(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		_ = l.Close()
		c.also(func(o *options) { o.advertise = "[::1%lo]:" + port })
		c.start(id, "[::1%lo]:"+port)
		c.nodes[id].address = "[::1%lo]:" + port
	}
	c.init(1, 2)
	c.works(1, 2)
	endpoints := "--endpoints=" + c.nodes[2].address
	runCommand(t, 0, "", "set", "k", "v", endpoints)
	out, _ := runCommand(t, 0, "", "get", "k", endpoints)
	wantText(t, "get", out, "v")
	_, err := c.nodes[2].AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 3, Address: "[::1%lo]:1"}})
	wantError(t, err, codes.Unavailable, "UNREACHABLE") // forwarded
}
