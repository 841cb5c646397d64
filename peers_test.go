// Tests of who a peer is and where: nodes that were removed, that move, that are
// copied, and strangers who say that they are somebody.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
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
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// startDurable starts processes with directories and makes them a cluster.
func startDurable(t *testing.T, n int) (ps []*process) {
	t.Helper()
	for i := range n {
		dir := filepath.Join(t.TempDir(), "data")
		ps = append(ps, &process{id: uint64(i + 1), address: "127.0.0.1:0", args: []string{"--data-dir", dir}})
	}
	formCluster(t, ps)
	return ps
}

// says says hello to a process, and then sends messages.
func (p *process) says(ctx context.Context, h *kvpb.Hello, ms ...*kvpb.RaftMessage) error {
	conn := dial(p.address, nil)
	defer func() { _ = conn.Close() }()
	s, err := kvpb.NewRaftServiceClient(conn).Stream(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&kvpb.StreamRequest{Hello: h}); err != nil {
		return err
	}
	if _, err := s.Recv(); err != nil || len(ms) == 0 {
		return err
	}
	if err := s.Send(&kvpb.StreamRequest{Messages: ms}); err != nil {
		return err
	}
	_, _ = s.Recv() // until it hangs up
	return nil
}

// noAdviceToDelete looks for what would cost data if it was done.
func noAdviceToDelete(t *testing.T, p *process) {
	t.Helper()
	text, err := os.ReadFile(p.log)
	if err != nil || strings.Contains(strings.ToLower(string(text)), "delete") {
		t.Errorf("node %d advises to delete something: %s, %v", p.id, text, err)
	}
}

// TestHelloDropsNothing: whatever a stranger's hello says, a node keeps what it has,
// and goes on.
func TestHelloDropsNothing(t *testing.T) {
	for _, durable := range []bool{false, true} {
		t.Run(fmt.Sprintf("durable=%v", durable), func(t *testing.T) {
			var ps []*process
			if durable {
				ps = startDurable(t, 3)
			} else {
				ps = startProcesses(t, 3)
			}
			ctx, cancel := context.WithTimeout(t.Context(), rpcTimeout)
			defer cancel()
			if _, err := ps[0].kv.Set(ctx, &kvpb.SetRequest{Key: "k", Value: []byte("v")}); err != nil {
				t.Fatal(err)
			}
			var raftIDs []uint64
			for _, p := range ps {
				raftIDs = append(raftIDs, p.metricsInTime().RaftId)
			}
			for i, p := range ps {
				m := p.metricsInTime()
				peer := m.Members[(i+1)%3]
				from := &kvpb.Peer{Node: peer.Node, RaftId: peer.RaftId, Life: 4711}
				to := &kvpb.Peer{Node: m.Node, RaftId: m.RaftId}
				for _, h := range []*kvpb.Hello{
					{ClusterId: m.ClusterId, Removed: raftIDs},
					{ClusterId: m.ClusterId, Removed: raftIDs, From: from},
					{ClusterId: m.ClusterId, Removed: raftIDs, From: from, To: to},
					{ClusterId: m.ClusterId, Removed: raftIDs, To: to},
					{Removed: raftIDs},
				} {
					if err := p.says(ctx, h); err != nil {
						t.Fatalf("%v: %v", h, err)
					}
				}
			}
			for i, p := range ps {
				eventually(t, func() error { // the stranger's streams took the place of those that bring it
					resp, err := p.kv.Get(ctx, &kvpb.GetRequest{Key: "k", Local: true})
					if err != nil || string(resp.Value) != "v" {
						return fmt.Errorf("node %d has %v, %v", p.id, resp, err)
					}
					return nil
				})
				if m := p.metricsInTime(); m.RaftId != raftIDs[i] {
					t.Errorf("node %d: %v", p.id, m)
				}
				noAdviceToDelete(t, p)
			}
			awaitHealthy(t, ps, pollDeadline)
		})
	}
}

// TestForgedContradiction: a message that cannot be true stops a node. It names whom
// it is said to be of, and nothing that it advises costs data; started again, all is
// as it was.
func TestForgedContradiction(t *testing.T) {
	ps := startDurable(t, 3)
	ctx, cancel := context.WithTimeout(t.Context(), pollDeadline)
	defer cancel()
	if _, err := ps[0].kv.Set(ctx, &kvpb.SetRequest{Key: "k", Value: []byte("v")}); err != nil {
		t.Fatal(err)
	}
	leader := leaderOf(t, ps)
	lm := leader.metricsInTime()
	for _, p := range ps {
		if p == leader {
			continue
		}
		m := p.metricsInTime()
		h := &kvpb.Hello{
			ClusterId: m.ClusterId, From: &kvpb.Peer{Node: lm.Node, RaftId: lm.RaftId, Life: 4711}, To: &kvpb.Peer{Node: m.Node, RaftId: m.RaftId},
		}
		beat := &kvpb.RaftMessage{Type: kvpb.RaftMessageType_RAFT_MESSAGE_TYPE_HEARTBEAT, Commit: m.LastIndex + 1000}
		ended := make(chan error, 1)
		cmd := p.cmd
		go func() { ended <- cmd.Wait() }()
		within(t, pollDeadline, func() error { // the leader may say hello in between
			if m, err := p.metrics(); err == nil {
				beat.Term = m.Term
			}
			if err := p.says(ctx, h, beat); err != nil && len(ended) == 0 {
				return err
			}
			if len(ended) == 0 {
				return errors.New("it goes on")
			}
			return nil
		})
		if err := <-ended; err == nil {
			t.Error("it has ended as if nothing was wrong")
		}
		noAdviceToDelete(t, p)
		text, err := os.ReadFile(p.log)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range []string{
			fmt.Sprintf("stopped by a message of node %d at %s", leader.id, leader.address),
			"keep all data directories", "Compare term, last and commit index", "start this node again",
		} {
			wantPart(t, string(text), part)
		}
	}
	for _, p := range ps {
		if p != leader {
			p.start()
		}
	}
	awaitHealthy(t, ps, pollDeadline)
	for _, p := range ps {
		resp, err := p.kv.Get(ctx, &kvpb.GetRequest{Key: "k"})
		if err != nil || string(resp.Value) != "v" {
			t.Errorf("node %d has %v, %v", p.id, resp, err)
		}
	}
}

// TestInnocentIsNotBlamed: where two of three directories were rolled back, it is the
// third node that stops. Its message must not have the only whole copy destroyed.
func TestInnocentIsNotBlamed(t *testing.T) {
	t.Parallel()
	c, dir := newDurable(t, 3)
	c.init(1, 2, 3)
	addresses := map[uint64]string{}
	for id := uint64(1); id <= 3; id++ {
		addresses[id] = c.nodes[id].address
	}
	copied := func(id uint64) string { return dir(id) + ".copy" }
	for id := uint64(2); id <= 3; id++ {
		c.stop(id)
		if err := os.CopyFS(copied(id), os.DirFS(dir(id))); err != nil {
			t.Fatal(err)
		}
		c.start(id, addresses[id])
	}
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
	c.sameStates(1, 2, 3)
	for id := uint64(1); id <= 3; id++ {
		c.kill(id)
	}
	for id := uint64(2); id <= 3; id++ {
		if err := errors.Join(os.RemoveAll(dir(id)), os.Rename(copied(id), dir(id))); err != nil {
			t.Fatal(err)
		}
		c.start(id, addresses[id])
	}
	// Their terms get above those that node 1 knows: entries of one term and index would
	// not give it away.
	for _, to := range []uint64{2, 3, 2, 3, 2} {
		eventually(t, func() error {
			_, err := c.nodes[5-to].TransferLeader(c.ctx, &kvpb.TransferLeaderRequest{NodeId: to})
			return err
		})
	}
	eventually(t, func() error { // they go another way
		_, err := c.nodes[2].Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: []byte("other")})
		return err
	})
	c.start(1, addresses[1])
	n := c.nodes[1]
	delete(c.nodes, 1)
	defer func() { _ = n.conn.Close() }()
	select {
	case err := <-n.ended:
		if !errors.Is(err, errContradiction) || strings.Contains(strings.ToLower(err.Error()), "delete") {
			t.Errorf("it ended with %v", err)
		}
		wantPart(t, err.Error(), "keep all data directories")
		if text := err.Error(); !strings.Contains(text, "node 2 at "+addresses[2]) && !strings.Contains(text, "node 3 at "+addresses[3]) {
			t.Errorf("%v does not name the peer", err)
		}
	case <-time.After(pollDeadline):
		n.cancel()
		<-n.ended
		t.Error("it goes on")
	}
}

// voted makes node 1 by raft ID one of so many voters, or a learner.
func voted(t *testing.T, voters []uint64, learners ...uint64) *lone {
	l := newLone(t, following)
	l.n.store.configure(&raftpb.ConfState{Voters: voters, Learners: learners, AutoLeave: new(false)}, plainMembers(slices.Concat(voters, learners)...))
	l.n.publish()
	return l
}

// saysRemoved is the answer of a node that knows of the removal.
func saysRemoved(id uint64) *kvpb.Welcome {
	return &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_REMOVED, ClusterId: 7, Peer: &kvpb.Peer{Node: plainNode(id), RaftId: id, Life: id}}
}

// TestRemovedByMost: a node drops its state once most of the other voters that it
// knows say that it was removed, and for nothing less.
func TestRemovedByMost(t *testing.T) {
	for _, test := range []struct {
		name     string
		voters   []uint64
		learners []uint64
		by       []uint64 // who says so; the last one makes it
	}{
		{"one of two", []uint64{1, 2}, nil, []uint64{2}},
		{"one of three", []uint64{1, 2, 3}, nil, []uint64{2, 2, 3}},
		{"one of four", []uint64{1, 2, 3, 4}, nil, []uint64{4, 2}},
		{"one of five", []uint64{1, 2, 3, 4, 5}, nil, []uint64{4, 2, 2, 5}},
		{"a learner", []uint64{2, 3}, []uint64{1, 4}, []uint64{4, 2, 4, 3}},
		{"it has applied it", []uint64{2, 3, 4}, nil, []uint64{2, 3}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := voted(t, test.voters, test.learners...)
			for i, id := range test.by {
				for _, change := range []func(w *kvpb.Welcome) (from uint64){
					func(w *kvpb.Welcome) uint64 { w.Verdict = kvpb.Verdict_VERDICT_NOT_ME; return 1 },
					func(w *kvpb.Welcome) uint64 { w.ClusterId++; return 1 },
					func(w *kvpb.Welcome) uint64 { w.Peer.Node.Id++; return 1 },
					func(*kvpb.Welcome) uint64 { return 2 }, // an answer to an earlier life
				} {
					w := saysRemoved(id)
					l.n.refused(change(w), id, w)
				}
				l.turn(0)
				if l.n.id.raftID != 1 {
					t.Fatalf("before %d says so, it has dropped its state", id)
				}
				l.n.refused(1, id, saysRemoved(id))
				l.turn(0)
				if dropped := l.n.id.raftID != 1; dropped != (i == len(test.by)-1) {
					t.Fatalf("once %v say so, it has dropped its state: %v", test.by[:i+1], dropped)
				}
			}
			if l.n.rn != nil || l.n.store.clusterID != 0 {
				t.Error("it still has some")
			}
		})
	}

	t.Run("a blank node says nothing", func(t *testing.T) {
		l := voted(t, []uint64{1, 2, 3})
		l.n.refused(1, 2, saysRemoved(2))
		l.n.refused(1, 3, &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_NOT_ME, Peer: &kvpb.Peer{Node: plainNode(3), RaftId: 33, Life: 33}})
		if l.turn(0); l.n.id.raftID != 1 || l.n.peers.reborn[3] == nil {
			t.Error("it has dropped its state, or has not met the blank one")
		}
	})

	t.Run("with a directory", func(t *testing.T) {
		l := voted(t, []uint64{1, 2, 3})
		l.n.durable.snapshotIndex = 1
		l.n.refused(1, 2, saysRemoved(2))
		if l.turn(0); l.n.err != nil {
			t.Fatal(l.n.err)
		}
		l.n.refused(1, 3, saysRemoved(3))
		l.n.turn(l.n.inbox.take())
		if l.n.err != errRemoved || l.n.store.clusterID != 7 {
			t.Errorf("it has ended with %v, or dropped its state", l.n.err)
		}
		if strings.Contains(strings.ToLower(errRemoved.Error()), "delete") {
			t.Error(errRemoved)
		}
	})
}

// TestHelloToBlank: a node in no cluster whose raft ID was removed takes another; one
// that is in a cluster keeps what it has, whoever says hello.
func TestHelloToBlank(t *testing.T) {
	for state, cluster := range map[int]uint64{inNoCluster: 0, following: 7, leading: 7} {
		for _, to := range []*kvpb.Peer{nil, {}, {Node: plainNode(1), RaftId: 1}} {
			for _, removed := range [][]uint64{nil, {3}, {3, 1}} {
				l := newLone(t, state)
				l.n.accept(&kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(2), RaftId: 2, Life: 2}, To: to, Removed: removed})
				l.turn(0)
				renamed := l.n.id.raftID != 1
				if want := cluster == 0 && slices.Contains(removed, 1); renamed != want || l.n.store.clusterID != cluster {
					t.Errorf("in cluster %d, told that %v are removed: it has another raft ID: %v", cluster, removed, renamed)
				}
			}
		}
	}
	// It has joined between hello and event.
	l := newLone(t, inNoCluster)
	l.n.inbox.event(func() {
		if err := l.n.stepSnapshot(l.hellos[0], 1, newTestStore()); err != nil {
			t.Error(err)
		}
	})
	l.n.accept(&kvpb.Hello{Removed: []uint64{1}})
	if l.turn(0); l.n.id.raftID != 1 || l.n.store.clusterID != 7 {
		t.Error("it has dropped what it had just got")
	}
	l.n.accept(&kvpb.Hello{Removed: []uint64{1}})
	l.n.rn = nil // as run does with a node that ends
	if l.turn(0); l.n.id.raftID != 1 || l.n.store.clusterID != 7 {
		t.Error("it has dropped its state at its end")
	}
}

// TestRemovedBeforeItHadState: a learner that was removed before it got a snapshot is
// added as somebody new.
func TestRemovedBeforeItHadState(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.init(1)
	m, err := c.metrics(2)
	if err != nil {
		t.Fatal(err)
	}
	c.cut(2)
	c.inLoop(1, func(n *node) error {
		if n.store.members[m.RaftId] != nil {
			return nil
		}
		if n.mayChange() {
			n.perform(n.clusterState().addMember(&kvpb.Peer{RaftId: m.RaftId, Node: m.Node}))
		}
		return errors.New("it is not added")
	})
	c.change(1, &kvpb.ChangeMembershipRequest{Remove: []uint64{2}})
	c.heal()
	c.addLearner(1, 2)
	if now, err := c.metrics(2); err != nil || now.RaftId == m.RaftId || now.Role != kvpb.Role_ROLE_LEARNER {
		t.Errorf("it is %v, %v", now, err)
	}
}

// muzzle makes a node that is in no cluster yet one that can be kept from dialing.
func muzzle(n *testNode) (shut *atomic.Bool) {
	shut = &atomic.Bool{}
	dial := n.server.net.dialer.connect
	n.server.net.dialer.connect = func(ctx context.Context, address string) (net.Conn, error) {
		if shut.Load() {
			return nil, errors.New("the test lets it dial nobody")
		}
		return dial(ctx, address)
	}
	return shut
}

// TestAddAgain: a node that was removed is added again once it has heard of that,
// from most of those that it knows; until then, and if it has stopped, the answer
// says what to do.
func TestAddAgain(t *testing.T) {
	t.Parallel()
	for _, durable := range []bool{false, true} {
		t.Run(fmt.Sprintf("durable=%v", durable), func(t *testing.T) {
			t.Parallel()
			c, dir := newDurable(t, 0)
			if !durable {
				c.also(inMemory)
			}
			for id := range uint64(3) {
				c.start(id+1, "127.0.0.1:0")
			}
			shut := muzzle(c.nodes[3])
			c.init(1, 2, 3)
			version := c.set(3, "k", "v")
			shut.Store(true)
			c.cut(3)
			c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}})
			c.heal()
			node, via := c.proto(3)[0], c.nodes[1]
			add := func(timeout time.Duration) error {
				ctx, cancel := context.WithTimeout(c.ctx, timeout)
				defer cancel()
				_, err := via.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: node})
				return err
			}
			var err error
			eventually(t, func() error { // on a busy machine, this answer can miss its deadline, or node 3's can
				err = add(time.Second)
				isLate := status.Code(err) == codes.DeadlineExceeded || reasonOf(err) == "UNREACHABLE"
				if isLate {
					return err
				}
				return nil
			})
			wantError(t, err, codes.FailedPrecondition, "PAST_MEMBER")
			wantPart(t, status.Convert(err).Message(), "move its data directory away")
			c.wants(3, true, "k", "v", version)
			ended := make(chan error, 1)
			if durable {
				go func() { ended <- add(rpcTimeout) }()
			}
			shut.Store(false)
			if !durable {
				c.addLearner(2, 3)
				c.works(1, 2, 3)
				return
			}
			c.ends(3, errRemoved, "move the directory away")
			err = <-ended
			wantError(t, err, codes.Unavailable, "UNREACHABLE")
			if err := os.Rename(dir(3), dir(3)+".away"); err != nil {
				t.Fatal(err)
			}
			c.start(3, node.Address)
			c.addLearner(2, 3)
			c.works(1, 2, 3)
		})
	}
}

// follows waits until the nodes agree on where all of them are.
func (c *testCluster) follows(ids ...uint64) {
	c.t.Helper()
	eventually(c.t, func() error {
		for _, via := range ids {
			m, err := c.metrics(via)
			if err != nil {
				return err
			}
			for _, member := range m.Members {
				if n := c.nodes[member.Node.Id]; n != nil && n.address != member.Node.Address {
					return fmt.Errorf("node %d has node %d at %s", via, n.id, member.Node.Address)
				}
			}
		}
		return nil
	})
}

// moves stops nodes and starts them elsewhere.
func (c *testCluster) moves(ids ...uint64) {
	c.t.Helper()
	for _, id := range ids {
		c.kill(id)
	}
	for _, id := range ids {
		c.start(id, "127.0.0.1:0")
	}
}

// TestMoved: members that come back elsewhere are found as long as each reaches one
// that has not moved, and the configuration follows, without an operator.
func TestMoved(t *testing.T) {
	t.Parallel()

	t.Run("two of three are left", func(t *testing.T) {
		t.Parallel()
		c, _ := newDurable(t, 3)
		c.init(1, 2, 3)
		before := c.raftIDs(1)
		c.set(1, "k", "v")
		c.kill(3)
		var log sharedLog
		c.log = &log
		c.moves(2) // its log is the new one's
		c.log = nil
		c.follows(1, 2)
		c.moves(1)
		c.follows(1, 2)
		eventually(t, func() error {
			_, err := c.nodes[1].Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: []byte("w")})
			return err
		})
		if after := c.raftIDs(1); !slices.Equal(before, after) {
			t.Error("it is somebody else")
		}
		var header metadata.MD
		_, err := c.nodes[2].Get(c.ctx, &kvpb.GetRequest{Key: "k"}, grpc.Header(&header))
		m, merr := c.metrics(2)
		if err != nil || merr != nil || !slices.Equal(header.Get(leaderMetadata), []string{c.nodes[m.GetLeader().GetId()].address}) {
			t.Errorf("the leader is said to be at %v: %v, %v", header.Get(leaderMetadata), err, merr)
		}
		lines := 0
		for line := range strings.SplitSeq(log.String(), "\n") {
			if strings.Contains(line, peerMoved) && strings.Contains(line, "found="+c.nodes[1].address) {
				lines++
			}
		}
		if lines != 1 {
			t.Errorf("that node 1 was found is said %d times:\n%s", lines, &log)
		}
	})

	t.Run("one after another", func(t *testing.T) {
		t.Parallel()
		c, _ := newDurable(t, 4)
		c.init(1, 2, 3)
		c.addLearner(1, 4)
		for id := uint64(1); id <= 4; id++ {
			c.moves(id)
			c.follows(1, 2, 3, 4)
			c.settled(1, 2, 3)
		}
		c.works(1, 2, 3, 4)
		c.addLearner(1, 4) // as it is already
		c.sameStates(1, 2, 3, 4)
	})

	t.Run("two at once", func(t *testing.T) { // each reaches the third, which tells it of the other
		t.Parallel()
		c, _ := newDurable(t, 3)
		c.init(1, 2, 3)
		for range 3 {
			c.moves(1, 2)
			c.settled(1, 2, 3)
			c.follows(1, 2, 3)
		}
		c.works(1, 2, 3)
	})

	t.Run("two at once, one of which the third does not know of", func(t *testing.T) {
		t.Parallel()
		c, _ := newDurable(t, 3)
		c.init(1)
		c.addLearner(1, 3)
		address := c.nodes[3].address
		c.kill(3)
		c.addLearner(1, 2)
		c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}, Retain: true})
		c.moves(1, 2)
		c.start(3, address)
		c.settled(1, 2)
		c.follows(1, 2, 3)
		c.works(1, 2, 3)
	})

	t.Run("a learner that knows only those who do not lead", func(t *testing.T) {
		t.Parallel()
		c, _ := newDurable(t, 4)
		c.init(1, 2)
		c.addLearner(1, 4)
		c.kill(4)
		c.addLearner(1, 3)
		c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Retain: true})
		c.transfer(1, 3)
		c.start(4, "127.0.0.1:0")
		c.follows(1, 2, 3, 4)
		c.works(1, 2, 3, 4)
	})

	t.Run("each reaches another one", func(t *testing.T) { // the leader is known to neither by itself
		t.Parallel()
		c, _ := newDurable(t, 3)
		c.init(1, 2, 3)
		c.kill(2)
		c.moves(1)
		c.follows(1, 3)
		c.transfer(3, 1)
		c.start(2, "127.0.0.1:0")
		c.settled(1, 2, 3)
		c.follows(1, 2, 3)
	})

	t.Run("behind the log", func(t *testing.T) { // the snapshot has its old address
		t.Parallel()
		c, _ := newDurable(t, 3, func(o *options) { o.logBytes = 64 << 10 })
		c.init(1, 2, 3)
		c.kill(1)
		c.fill(2, 24)
		c.kill(3)
		c.start(1, "127.0.0.1:0")
		c.follows(1, 2)
		if m, err := c.metrics(1); err != nil || m.SnapshotsInstalled == 0 {
			t.Fatal(m, err)
		}
		c.works(1, 2)
	})
}

// TestMoveIsCommitted: a leader puts into the configuration where a member was found
// that it hears, and where it is itself; but two members are never at one address.
func TestMoveIsCommitted(t *testing.T) {
	other := &kvpb.Node{Id: 3, Address: "other:1"}
	for _, test := range []struct {
		name   string
		change func(n *node)
		want   *kvpb.Node
	}{
		{"nobody has moved", func(*node) {}, nil},
		{"it was found", func(n *node) { n.peerMoved(3, other) }, other},
		{"it is not heard", func(n *node) { n.peerMoved(3, other); delete(n.peers.heard, 3) }, nil},
		{"it is not connected any more", func(n *node) { n.peerMoved(3, other); n.peerDown(3, true) }, nil},
		{"it is where it was", func(n *node) { n.peerMoved(3, other); n.peerUp(3, true, nil) }, nil},
		{"another member is there", func(n *node) { n.peerMoved(3, &kvpb.Node{Id: 3, Address: plainNode(2).Address}) }, nil},
		{"another member was there", func(n *node) {
			n.peerMoved(2, &kvpb.Node{Id: 2, Address: "elsewhere:1"})
			n.peerMoved(3, &kvpb.Node{Id: 3, Address: plainNode(2).Address})
			delete(n.peers.heard, 2)
		}, &kvpb.Node{Id: 3, Address: plainNode(2).Address}},
		{"the leader itself", func(n *node) { n.self = &kvpb.Node{Id: 1, Address: "self:1"} }, &kvpb.Node{Id: 1, Address: "self:1"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLone(t, leading)
			n := l.n
			n.clock.now = 10 * n.electionTicks()
			n.peers.heard[2], n.peers.heard[3] = n.clock.now, n.clock.now
			test.change(n)
			l.turn(0)
			last := n.log.last()
			begun := n.proposeMove()
			l.turn(0)
			if begun != (test.want != nil) || (n.log.last() > last) != begun {
				t.Fatalf("a change is begun: %v", begun)
			}
			if !begun {
				return
			}
			l.hears(0, message(raftpb.MsgAppResp, 2, n.raft.term, func(m *raftpb.Message) { *m.Index = n.log.last() }))
			if got := n.store.members[test.want.Id]; got.GetAddress() != test.want.Address {
				t.Errorf("it is at %v", got)
			}
		})
	}
}

// TestLeaderIsNamedWhereItIs: not where the configuration has it.
func TestLeaderIsNamedWhereItIs(t *testing.T) {
	l := newLone(t, leading)
	l.n.self = &kvpb.Node{Id: 1, Address: "self:1"}
	l.n.peerUp(2, true, nil) // so that something is new
	l.n.peers.connected = map[uint64]bool{}
	if l.turn(0); l.n.status.latest.Load().leader.GetAddress() != "self:1" || l.n.metrics().Leader.GetAddress() != "self:1" {
		t.Errorf("a leader names itself as %v", l.n.status.latest.Load().leader)
	}
	l = newLone(t, following)
	l.hears(0, message(raftpb.MsgHeartbeat, 2, 1))
	if at := l.n.status.latest.Load().leader.GetAddress(); at != plainNode(2).Address {
		t.Fatalf("the leader is at %q", at)
	}
	l.n.peerMoved(2, &kvpb.Node{Id: 2, Address: "other:1"})
	l.n.peerMoved(9, &kvpb.Node{Id: 9, Address: "nobody:1"})
	if l.turn(0); l.n.status.latest.Load().leader.GetAddress() != "other:1" || len(l.n.peers.moved) != 1 {
		t.Errorf("a follower names it as %v", l.n.status.latest.Load().leader)
	}
	l.n.peerDown(2, true)
	if l.turn(0); l.n.nodeOf(2).Address != plainNode(2).Address {
		t.Errorf("it is not connected any more, and at %v", l.n.nodeOf(2))
	}
}

// TestRemovedIsNotHeard: what a member had sent before it was removed, and what a node
// gets for another raft ID or from another cluster, is dropped.
func TestRemovedIsNotHeard(t *testing.T) {
	l := newLoneWithLearner(t)
	of := func(from, to, clusterID uint64) *kvpb.Hello {
		return &kvpb.Hello{
			ClusterId: clusterID,
			From:      &kvpb.Peer{Node: plainNode(from), RaftId: from, Life: from},
			To:        &kvpb.Peer{Node: plainNode(1), RaftId: to},
		}
	}
	isHeard := func(h *kvpb.Hello) bool {
		before := l.n.status.count.MessagesDropped
		answer := message(raftpb.MsgHeartbeatResp, h.From.RaftId, l.n.raft.term)
		l.n.inbox.deliver(fromWire(toWire([]*raftpb.Message{answer}), h))
		l.turn(0)
		return l.n.status.count.MessagesDropped == before
	}
	if !isHeard(of(4, 1, 7)) {
		t.Error("a member is not heard")
	}
	if isHeard(of(4, 9, 7)) {
		t.Error("what is for another raft ID is heard")
	}
	if isHeard(of(4, 1, 8)) {
		t.Error("somebody of another cluster is heard")
	}
	if err := l.n.proposeChange(nil, confChange(raftpb.ConfChangeRemoveNode, 4)); err != nil {
		t.Fatal(err)
	}
	l.ack(2)
	if !slices.Contains(l.n.store.removed, 4) {
		t.Fatal("it is not removed")
	}
	if isHeard(of(4, 1, 7)) {
		t.Error("who was removed is heard")
	}
}

// TestCopiedDirectory: a node started from a copy of another's directory, elsewhere,
// takes nobody's place while the other runs, and is told what it is.
func TestCopiedDirectory(t *testing.T) {
	t.Parallel()
	c, dir := newDurable(t, 3)
	var log sharedLog
	c.init(1, 2, 3)
	c.transfer(1, 1)
	c.stop(3)
	c.also(func(o *options) {
		if o.id == 33 {
			o.id, o.dataDir = 3, dir(3)+".copy"
		}
	})
	if err := os.CopyFS(dir(3)+".copy", os.DirFS(dir(3))); err != nil {
		t.Fatal(err)
	}
	c.start(3, c.addressOf(1, 3))
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
	c.log = &log
	copied := c.start(33, "127.0.0.1:0")
	c.log = nil
	for id := uint64(1); id <= 2; id++ {
		eventually(t, func() error {
			if part := fmt.Sprintf("node %d at %s is connected to another process", id, c.nodes[id].address); !strings.Contains(log.String(), part) {
				return fmt.Errorf("the log does not say %q", part)
			}
			return nil
		})
	}
	c.works(1, 2, 3)
	c.settled(1, 2, 3)
	if m, err := c.metrics(1); err != nil || c.addressOf(1, 3) == copied.address {
		t.Errorf("it has taken its place: %v, %v", m, err)
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

func TestRemovedWhileAway(t *testing.T) {
	t.Parallel()
	// Nobody else may cause an election.
	c := newCluster(t, 2, func(o *options) { o.election = 10 * time.Second })
	c.also(func(o *options) { o.election = 250 * time.Millisecond })
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

// TestPastLifeIsNeeded: a node that was removed, and does not know it yet, is not
// added again.
func TestPastLifeIsNeeded(t *testing.T) {
	l := newLoneWithLearner(t)
	n := l.n
	r := &request{n: n, next: func(l *leaderState) nextStep { return l.learnerStep(&kvpb.Peer{RaftId: 4, Node: plainNode(4)}) }}
	advance := func() error {
		ok, err := r.poll()
		l.turn(0)
		if ok {
			t.Fatal("it is a learner")
		}
		return err
	}
	if err := n.proposeChange(nil, confChange(raftpb.ConfChangeRemoveNode, 4)); err != nil {
		t.Fatal(err)
	}
	if l.ack(2); !slices.Contains(n.store.removed, 4) {
		t.Fatal("it is not removed")
	}
	for range 3 {
		if err := advance(); err != nil {
			t.Fatalf("nobody else knows, and it says %v", err)
		}
	}
	l.ack(2)
	for range 3 {
		if err := advance(); err != errPastLife {
			t.Fatalf("the others know, and it says %v", err)
		}
	}
}

// TestStrangersAreForgotten: of those who come and go nothing is kept.
func TestStrangersAreForgotten(t *testing.T) {
	n := newLone(t, following).n
	n.peerUp(2, false, &kvpb.Peer{Life: 2}) // a member
	for id := uint64(1000); id < 2000; id++ {
		h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(9), RaftId: id, Life: id}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}}
		n.peerUp(id, false, nil)
		n.inbox.deliver([]inbound{{message(raftpb.MsgPreVoteResp, id, 1), h}})
		n.turn(n.inbox.take())
	}
	if len(n.peers.heard) > maxMembers {
		t.Errorf("it has heard %d", len(n.peers.heard))
	}
	if len(n.level.callers) > 2*maxMembers || n.level.callers[2] == nil {
		t.Errorf("it knows %d callers, and of node 2 %v", len(n.level.callers), n.level.callers[2])
	}
}

// TestStrayLearner: a learner that has joined another cluster is removed, and
// nobody else.
func TestStrayLearner(t *testing.T) {
	for cluster, stray := range map[uint64]bool{0: false, 7: false, 8: true} {
		for raftID, learner := range map[uint64]bool{3: false, 4: true} {
			l := newLoneWithLearner(t)
			l.n.refused(1, raftID, &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_OTHER_CLUSTER, ClusterId: cluster, Peer: &kvpb.Peer{RaftId: raftID, Life: 4, Node: plainNode(raftID)}})
			l.turn(0)
			if begun := l.n.change.startedAt != 0; begun != (stray && learner) {
				t.Errorf("raft ID %d says that it is in cluster %d: a change is begun %v", raftID, cluster, begun)
			}
			l.hears(0, message(raftpb.MsgAppResp, 2, 2, func(m *raftpb.Message) { *m.Index = 4 }))
			isMember := l.n.store.members[raftID] != nil
			if isMember == (stray && learner) || len(l.n.store.former) > 0 {
				t.Errorf("raft ID %d, in cluster %d: it is a member %v, operators have removed %v", raftID, cluster, isMember, l.n.store.former)
			}
		}
	}
}

// TestDurableStrangers: what strangers say of their disks takes no memory for ever, and makes
// nobody forget that of members.
func TestDurableStrangers(t *testing.T) {
	l := newLone(t, following)
	l.n.noteDurable(2, 2)
	for i := range uint64(20 * maxMembers) {
		l.n.noteDurable(1000+i, 1000+i)
		if known := len(l.n.peers.durable); known > 2*maxMembers {
			t.Fatalf("after %d strangers it knows of %d", i, known)
		}
	}
	if !slices.Equal(l.n.peers.durableNodes, []uint64{2}) {
		t.Errorf("durable members: %v", l.n.peers.durableNodes)
	}
}

// TestDurableIsOfANode: what a node says of a raft ID does not count for another node.
func TestDurableIsOfANode(t *testing.T) {
	l := newLone(t, leading)
	l.n.noteDurable(2, 9)
	l.n.noteDurable(4, 9) // a stranger so far
	l.n.noteDurable(3, 3)
	l.n.noteDurable(3, 9)
	l.n.store.configure(&raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{4}}, plainMembers(4))
	l.n.listDurable()
	if !slices.Equal(l.n.peers.durableNodes, []uint64{3}) {
		t.Errorf("durable members: %v, want 3", l.n.peers.durableNodes)
	}
	l.n.noteDurable(4, 4)
	if !slices.Equal(l.n.peers.durableNodes, []uint64{3, 4}) {
		t.Errorf("durable members: %v, want 3 and 4", l.n.peers.durableNodes)
	}
}

// TestDurableIsNotTakenBackInMemory: who answers without memory in place of a member with a data
// directory is taken back with a directory only.
func TestDurableIsNotTakenBackInMemory(t *testing.T) {
	for _, isDurable := range []bool{false, true} {
		l := newLone(t, leading)
		l.n.noteDurable(2, 2)
		l.n.refused(1, 2, &kvpb.Welcome{
			Verdict: kvpb.Verdict_VERDICT_NOT_ME,
			Peer:    &kvpb.Peer{RaftId: 12, Life: 4, Node: plainNode(2)},

			InMemory: !isDurable,
		})
		l.turn(0)
		if isReborn := l.n.peers.reborn[2] != nil; isReborn != isDurable {
			t.Errorf("durable %v: it is to be taken back %v", isDurable, isReborn)
		}
		if isSaid := strings.Contains(l.n.peers.refusals[2], "without the data directory"); isSaid == isDurable {
			t.Errorf("durable %v: %q", isDurable, l.n.peers.refusals[2])
		}
	}
}

// TestOnlyTheLeaderMissesADisk: a member that does not lead may have yet to hear that the node was
// removed, and may be in memory now.
func TestOnlyTheLeaderMissesADisk(t *testing.T) {
	for _, isLeading := range []bool{false, true} {
		n := turnNode()
		n.missDisk(&kvpb.Hello{
			ClusterId:    7,
			From:         &kvpb.Peer{Node: plainNode(2), RaftId: 2, Life: 2},
			To:           &kvpb.Peer{Node: n.self, RaftId: n.id.raftID + 1},
			DurableNodes: []uint64{n.self.Id},
			Leading:      isLeading,
		})
		if isEnded := errors.Is(n.err, errDiskMissing); isEnded != isLeading {
			t.Errorf("leading %v: %v", isLeading, n.err)
		}
	}
}
