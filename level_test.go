// The level of a cluster: when it rises, what it refuses, and that nothing of it is written
// before.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// nextLevel is one level above the first: in these tests, a newer program speaks it.
const nextLevel = firstLevel + 1

// programs says which level the program of each node speaks; of one that is not in it, the
// first. The next start of a node goes by it.
type programs struct {
	mu    sync.Mutex
	speak map[uint64]uint32 // by node id
	held  map[uint64]uint32 // by node id: --max-level
}

func newPrograms() *programs {
	return &programs{speak: map[uint64]uint32{}, held: map[uint64]uint32{}}
}

func (p *programs) set(o *options) {
	p.mu.Lock()
	defer p.mu.Unlock()
	o.level = levelFromWire(p.speak[o.id])
	o.maxLevel = p.held[o.id]
}

// roll restarts nodes with a program of another level.
func (p *programs) roll(c *testCluster, level uint32, ids ...uint64) {
	for _, id := range ids {
		p.mu.Lock()
		p.speak[id] = level
		p.mu.Unlock()
		c.restart(id)
		eventually(c.t, func() error { return c.isBack(id) })
	}
}

// isBack says why a node that was restarted is not what it was.
func (c *testCluster) isBack(id uint64) error {
	m, err := c.metrics(id)
	if err != nil {
		return err
	}
	if !m.Healthy {
		return errors.New(m.UnhealthyReason)
	}
	return nil
}

// wantsLevel waits until nodes know the level of their cluster.
func (c *testCluster) wantsLevel(level uint32, ids ...uint64) {
	c.t.Helper()
	for _, id := range ids {
		eventually(c.t, func() error {
			m, err := c.metrics(id)
			if err == nil && m.Level != level {
				err = fmt.Errorf("node %d knows level %d, want %d", id, m.Level, level)
			}
			return err
		})
	}
}

// staysAt lets several times as much time pass as a rise takes, and checks that there was none.
func (c *testCluster) staysAt(level uint32, ids ...uint64) {
	c.t.Helper()
	leader := c.nodes[ids[0]].server.n
	heartbeats := leader.electionTicks() / ticksPerHeartbeat * 4
	var began uint64
	c.inLoop(ids[0], func(n *node) error { began = n.clock.now; return nil })
	c.inLoop(ids[0], func(n *node) error {
		if n.clock.now < began+heartbeats*ticksPerHeartbeat {
			return errors.New("too little time has passed")
		}
		return nil
	})
	c.wantsLevel(level, ids...)
}

// TestLevelRises: the level rises once all members, learners too, have been replaced by a
// program that speaks it, and not before; and until then each can be replaced by the older one.
func TestLevelRises(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T, uint64, ...func(*options)) *testCluster{
		"in memory": newCluster,
		"durable": func(t *testing.T, n uint64, set ...func(*options)) *testCluster {
			c, _ := newDurable(t, n, set...)
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPrograms()
			c := start(t, 4, p.set)
			c.init(1, 2, 3)
			c.addLearner(1, 4)
			h := newHistory()
			stop := c.load(h, rpcTimeout, true, 1, 2, 3)
			defer stop()
			h.floor(t, 20)
			p.roll(c, nextLevel, 1, 2, 3)
			h.floor(t, 20)
			c.staysAt(firstLevel, 1, 2, 3, 4) // the learner does not speak it
			p.roll(c, firstLevel, 2)          // there is a way back
			p.roll(c, nextLevel, 4)
			h.floor(t, 20)
			c.staysAt(firstLevel, 1, 2, 3, 4)
			p.roll(c, nextLevel, 2)
			c.wantsLevel(nextLevel, 1, 2, 3, 4)
			h.floor(t, 20)
			p.roll(c, nextLevel, 3, 4) // it is kept: in the log, or by the others
			c.wantsLevel(nextLevel, 1, 2, 3, 4)
			h.floor(t, 20)
			stop()
			c.readAll(h, 1)
			h.check(t)
			c.sameStates(1, 2, 3, 4)
		})
	}
}

// TestLevelIsHeld: --max-level of one node holds the level of its cluster, until the node
// starts without it.
func TestLevelIsHeld(t *testing.T) {
	t.Parallel()
	p := newPrograms()
	for id := uint64(1); id <= 3; id++ {
		p.speak[id] = nextLevel
	}
	p.held[3] = firstLevel
	c := newCluster(t, 3, p.set)
	c.init(1, 2, 3)
	c.staysAt(firstLevel, 1, 2, 3)
	c.works(1, 2, 3)
	delete(p.held, 3)
	c.restart(3)
	c.wantsLevel(nextLevel, 1, 2, 3)
	p.held[2] = firstLevel // that comes too late
	c.restart(2)
	c.settled(1, 2, 3)
	c.wantsLevel(nextLevel, 1, 2, 3)
	c.works(1, 2, 3)
}

// TestLevelWaitsForInit: a founder that speaks more than the other members of its Init does
// not raise the level before they are added.
func TestLevelWaitsForInit(t *testing.T) {
	t.Parallel()
	l := newLone(t, alone)
	l.n.opts.level = nextLevel
	l.n.store.speaks = nextLevel
	l.n.store.founding = []*kvpb.Node{plainNode(1), plainNode(2)}
	if l.risesLevel() {
		t.Error("it goes up while an Init is not done")
	}
	l.n.store.founding = nil
	if !l.risesLevel() {
		t.Error("it does not go up")
	}

	p := newPrograms()
	p.speak[1] = nextLevel
	c := newCluster(t, 3, p.set)
	c.init(1, 2, 3)
	c.staysAt(firstLevel, 1, 2, 3)
	c.works(1, 2, 3)
}

// TestTooOldIsRefused: once the level has risen, no older program becomes a member, whichever
// way it tries, and says why.
func TestTooOldIsRefused(t *testing.T) {
	t.Parallel()
	newer := func() *programs {
		p := newPrograms()
		for id := uint64(1); id <= 3; id++ {
			p.speak[id] = nextLevel
		}
		return p
	}

	t.Run("a new node", func(t *testing.T) {
		t.Parallel()
		c := newCluster(t, 4, newer().set)
		c.init(1, 2, 3)
		c.wantsLevel(nextLevel, 1, 2, 3)
		_, err := c.nodes[2].AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: c.proto(4)[0]})
		if status.Code(err) != codes.FailedPrecondition || reasonOf(err) != "LEVEL_TOO_LOW" {
			t.Errorf("an old program is added: %v", err)
		}
		c.uninitialized(4)
	})

	t.Run("a node without its memory", func(t *testing.T) {
		t.Parallel()
		p := newer()
		c := newCluster(t, 3, p.set)
		c.init(1, 2, 3)
		c.settled(1, 2, 3)
		c.wantsLevel(nextLevel, 1, 2, 3)
		before := c.memberIDs(1)
		p.mu.Lock()
		p.speak[3] = firstLevel
		p.mu.Unlock()
		c.restart(3)
		leader := c.ledBy(1, 2)
		c.refuses(leader, 3)
		c.staysAt(nextLevel, leader)
		if after := c.memberIDs(leader); !slices.Equal(before, after) {
			t.Errorf("the members are %x, and were %x", after, before)
		}
		c.uninitialized(3)
		p.roll(c, nextLevel, 3)
		c.settled(1, 2, 3)
		c.works(1, 2, 3)
	})

	t.Run("a node with its directory", func(t *testing.T) {
		t.Parallel()
		for name, change := range map[string]func(*testCluster){
			"by the log":      func(*testCluster) {},
			"by the snapshot": func(c *testCluster) { c.fill(1, 48) },
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				p := newer()
				c, _ := newDurable(t, 3, p.set, func(o *options) { o.logBytes = 64 << 10 })
				c.init(1, 2, 3)
				c.wantsLevel(nextLevel, 1, 2, 3)
				c.set(1, "k", "v")
				change(c)
				c.sameStates(1, 2, 3) // node 3 has "k" on its disk, and with it that the rise is committed
				address := c.nodes[3].address
				c.stop(3)
				err := c.refusesToStart(3, address, firstLevel)
				if !errors.Is(err, errLevel) {
					t.Errorf("an old program starts from it: %v", err)
				}
				if strings.Contains(err.Error(), "move the data directory away") {
					t.Errorf("it takes it for damaged: %v", err)
				}
				c.start(3, address)
				c.settled(1, 2, 3)
				c.works(1, 2, 3)
			})
		}
	})

	// Its directory does not know of the rise: the members do.
	t.Run("a node that was away", func(t *testing.T) {
		t.Parallel()
		p := newer()
		delete(p.speak, 2)
		c, _ := newDurable(t, 3, p.set)
		c.init(1, 2, 3)
		c.transfer(1, 1)
		address := c.nodes[3].address
		end := c.endsAfter(3)
		p.roll(c, nextLevel, 2)
		c.wantsLevel(nextLevel, 1, 2)
		end()
		c.stop(3)
		p.mu.Lock()
		p.speak[3] = firstLevel
		p.mu.Unlock()
		c.start(3, address)
		leader := c.ledBy(1, 2)
		c.refuses(leader, 3)
		c.inLoop(3, func(n *node) error {
			for _, text := range n.peers.refusals {
				if strings.Contains(text, "start a newer one here") {
					return nil
				}
			}
			return fmt.Errorf("it does not know why: %v", n.peers.refusals)
		})
		p.roll(c, nextLevel, 3)
		c.settled(1, 2, 3)
		c.wantsLevel(nextLevel, 3)
	})

	t.Run("a backup", func(t *testing.T) {
		s := newTestStore()
		s.level = nextLevel
		b := snapshotBytes(t, s)
		_, _, err := scanSnapshot(bytes.NewReader(b), snapshotScan{speaks: firstLevel})
		if !errors.Is(err, errLevel) {
			t.Errorf("an old program reads it: %v", err)
		}
		again, _, err := scanSnapshot(bytes.NewReader(b), snapshotScan{speaks: nextLevel})
		if err != nil || again.level != nextLevel {
			t.Errorf("a newer one does not: %v", err)
		}
	})

	t.Run("an entry", func(t *testing.T) {
		for name, data := range map[string][]byte{
			"of a newer level":      mustMarshal(t, &kvpb.Batch{Proposer: 1, Sequence: 1, Level: nextLevel}),
			"that raises the level": appendRise(nextLevel, []uint64{1, 2, 3}),
		} {
			s := newTestStore()
			s.speaks = firstLevel
			if _, _, _, err := s.apply(data); !errors.Is(err, errLevel) {
				t.Errorf("an old program applies one %s: %v", name, err)
			}
			s.speaks = nextLevel
			if _, _, _, err := s.apply(data); err != nil {
				t.Errorf("a newer one does not apply one %s: %v", name, err)
			}
		}
	})
}

// ledBy waits until two of three nodes have a leader, and returns it.
func (c *testCluster) ledBy(ids ...uint64) (leader uint64) {
	c.t.Helper()
	eventually(c.t, func() error {
		m, err := c.metrics(ids[0])
		leader = m.GetLeader().GetId()
		if err == nil && !slices.Contains(ids, leader) {
			err = fmt.Errorf("the leader is %d", leader)
		}
		return err
	})
	return leader
}

// memberIDs returns the raft IDs of the members that a node knows.
func (c *testCluster) memberIDs(via uint64) (raftIDs []uint64) {
	c.t.Helper()
	c.inLoop(via, func(n *node) error {
		raftIDs = slices.Sorted(maps.Keys(n.store.members))
		return nil
	})
	return raftIDs
}

// refuses waits until a node refuses another one, whose program is too old.
func (c *testCluster) refuses(id, other uint64) {
	c.t.Helper()
	c.inLoop(id, func(n *node) error {
		if len(n.peers.reborn) > 0 {
			c.t.Errorf("node %d is to be taken back", other)
		}
		for _, text := range n.peers.refusals {
			names := strings.Contains(text, fmt.Sprintf("node %d at", other))
			if names && strings.Contains(text, "speaks levels up to 1") {
				return nil
			}
		}
		return fmt.Errorf("node %d does not refuse node %d: %v", id, other, n.peers.refusals)
	})
}

// endsAfter keeps a node's loop busy, while its streams stay open, until end is called. Then
// the node ends, and has seen nothing of what came meanwhile.
func (c *testCluster) endsAfter(id uint64) (end func()) {
	c.t.Helper()
	held := make(chan struct{})
	goOn := make(chan struct{})
	n := c.nodes[id].server.n
	n.inbox.event(func() {
		close(held)
		<-goOn
		n.err = errStopping
	})
	<-held
	end = sync.OnceFunc(func() { close(goOn) })
	c.t.Cleanup(end)
	return end
}

// refusesToStart runs a node with a program of a level, and returns the error that it ends
// with. A node that starts nevertheless fails the test.
func (c *testCluster) refusesToStart(id uint64, address string, level uint32) error {
	c.t.Helper()
	var l net.Listener
	eventually(c.t, func() (err error) { l, err = net.Listen("tcp", address); return err })
	defer func() { _ = l.Close() }()
	o := defaultOptions()
	o.id = id
	c.options(&o)
	o.addr, o.listener, o.dialer = address, l, c.wires.dialer(address)
	o.level = level
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	err := run(ctx, o, quiet(), func(*server) { cancel() })
	if err == nil {
		c.t.Fatalf("node %d starts with a program of level %d", id, level)
	}
	return err
}

// TestLevelVerdict: of two nodes, each has to speak the level of the other one's cluster.
func TestLevelVerdict(t *testing.T) {
	for name, test := range map[string]struct {
		caller, callers uint32 // what the caller speaks, and the level of its cluster
		called, calleds uint32
		want            kvpb.Verdict
	}{
		"all of the first":            {0, 1, 1, 1, kvpb.Verdict_VERDICT_ACCEPTED},
		"both newer":                  {2, 1, 2, 2, kvpb.Verdict_VERDICT_ACCEPTED},
		"old caller":                  {1, 1, 2, 2, kvpb.Verdict_VERDICT_CALLER_TOO_OLD},
		"caller that says nothing":    {0, 0, 2, 2, kvpb.Verdict_VERDICT_CALLER_TOO_OLD},
		"old called":                  {2, 2, 1, 1, kvpb.Verdict_VERDICT_CALLED_TOO_OLD},
		"newer caller, older cluster": {2, 1, 1, 1, kvpb.Verdict_VERDICT_ACCEPTED},
		"newer called, older cluster": {1, 1, 2, 1, kvpb.Verdict_VERDICT_ACCEPTED},
	} {
		h := &kvpb.Hello{From: &kvpb.Peer{Level: test.caller}, ClusterLevel: test.callers}
		if got := levelVerdict(h, test.calleds, test.called); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestRiseNamesAllMembers: a rise has no effect if a member came after it was proposed, and a
// member that comes after it has to speak the level.
func TestRiseNamesAllMembers(t *testing.T) {
	s := newTestStore()
	s.speaks = nextLevel
	members := slices.Sorted(maps.Keys(s.members))
	rise := func(level uint32, members ...uint64) {
		t.Helper()
		if _, _, _, err := s.apply(appendRise(level, members)); err != nil {
			t.Error(err)
		}
	}
	rise(nextLevel, members[1:]...)
	rise(nextLevel+1, members[1:]...) // which nobody here speaks, but it has no effect
	if s.level != firstLevel {
		t.Error("it rises without a member")
	}
	rise(nextLevel, append(members, 99)...) // who has left meanwhile
	if s.level != nextLevel {
		t.Error("it does not rise")
	}
	rise(firstLevel, members...)
	if s.level != nextLevel {
		t.Error("it falls")
	}
	for level, isTaken := range map[uint32]bool{0: false, firstLevel: false, nextLevel: true, nextLevel + 1: true} {
		cc := &raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{confChange(raftpb.ConfChangeAddLearnerNode, 9)}}
		who := &kvpb.ConfChangeContext{Members: []*kvpb.Member{{RaftId: 9, Node: plainNode(9), Level: level}}}
		if _, err := s.checkConfChange(cc, who); (err == nil) != isTaken {
			t.Errorf("a member that speaks level %d: %v", level, err)
		}
	}
}

// risesLevel reports whether a leader proposes to raise the level within two heartbeats.
func (l *lone) risesLevel() bool {
	l.t.Helper()
	for range 2 * ticksPerHeartbeat {
		l.turn(1)
		l.hears(0, message(raftpb.MsgHeartbeatResp, 2, l.n.raft.term))
	}
	isProposed := l.n.level.proposedAt != 0
	l.n.level.proposedAt = 0
	return isProposed
}

// TestLevelOfPresentLife: a leader does not go by what an earlier process of a member has
// said.
func TestLevelOfPresentLife(t *testing.T) {
	l := newLone(t, leading)
	n := l.n
	n.opts.level = nextLevel
	n.store.speaks = nextLevel
	old := func(life uint64) *kvpb.Peer { return &kvpb.Peer{Life: life, RisesTo: firstLevel} }
	newer := func(life uint64) *kvpb.Peer { return &kvpb.Peer{Life: life, RisesTo: nextLevel} }
	connect := func(raftID uint64, p *kvpb.Peer) {
		n.peerUp(raftID, true, p)
		n.peerUp(raftID, false, p)
	}
	mayNot := func(why string) {
		t.Helper()
		if l.risesLevel() {
			t.Error("it goes up " + why)
		}
	}
	connect(2, newer(20))
	mayNot("without node 3")
	n.peerUp(3, false, newer(30))
	mayNot("by a stream from node 3 alone")
	n.peerUp(3, true, newer(30))
	n.peerDown(2, true)
	mayNot("without node 2")
	connect(2, old(21))
	mayNot("with an older program at node 2")
	connect(2, newer(22))
	n.peerUp(2, false, old(23)) // before the stream to its earlier process breaks
	mayNot("by what an earlier process of node 2 has said")
	connect(2, newer(24))
	n.opts.maxLevel = firstLevel
	mayNot("though it is held")
	n.opts.maxLevel = 0
	if !l.risesLevel() {
		t.Error("it does not go up")
	}
}

// TestLogOfNewerLevel: a log says by which level it was written, and a program that does not
// speak that, or does not know a field, refuses it for what it is: it is not damaged.
func TestLogOfNewerLevel(t *testing.T) {
	strange := &kvpb.LogBatch{HardState: &kvpb.HardState{Term: 1}}
	strange.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1})
	for name, test := range map[string]struct {
		batch *kvpb.LogBatch
		want  error
	}{
		"level":         {&kvpb.LogBatch{Level: nextLevel}, errLevel},
		"unknown field": {strange, errLevel},
	} {
		fs := newSimFS()
		w, _, err := openSim(fs)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.append(test.batch); err != nil {
			t.Fatal(err)
		}
		for range 3 * simSegment / sectorBytes { // more than a segment of batches that do not say it
			if err := w.append(&kvpb.LogBatch{Boots: 1}); err != nil {
				t.Fatal(err)
			}
		}
		w.close()
		fs.calls = nil
		if _, _, err := openSim(fs); !errors.Is(err, test.want) {
			t.Errorf("%s: it opens: %v", name, err)
		}
		if fs.mutates() {
			t.Errorf("%s: something is changed", name)
		}
	}
}

// TestNothingNewBeforeRise: at the first level, what is written is what the first program
// wrote.
func TestNothingNewBeforeRise(t *testing.T) {
	for level, want := range map[uint32]bool{firstLevel: false, nextLevel: true} {
		c := &callsInFlight{}
		c.add(&call{write: mustMarshal(t, setWrite("k", "v")), done: make(chan outcome, 1)}, 0)
		var b kvpb.Batch
		if err := proto.Unmarshal(c.newProposal(1, level).data, &b); err != nil {
			t.Fatal(err)
		}
		if (b.Level != 0) != want {
			t.Errorf("at level %d, a batch says level %d", level, b.Level)
		}
		l := newLone(t, following)
		l.n.store.level = level
		l.n.durable.disk = &disk{wake: newBell()}
		l.n.persist(diskJob{batch: &kvpb.LogBatch{}}, func() {})
		logged := l.n.durable.disk.queue[0].batch
		if (logged.Level != 0) != want {
			t.Errorf("at level %d, a batch of the log on disk says level %d", level, logged.Level)
		}
	}
}
