// Tests of catching up while clients write: by the loop alone, with ticks, and by
// clusters in one process.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"raft-key-value/kvpb"
)

// busyLeader is a leader, node 1, to which more is written in each tick. Node 2 has
// it all at once, node 3 as the test says.
type busyLeader struct {
	*snapBox
	n        *node
	offered  int    // bytes in a tick
	value    string // of each write
	keys     int    // that are written, one after the other
	writes   int    // that were begun
	sequence uint64 // of what node 2 proposes
	logged   uint64 // bytes that the log has ever taken
	last     uint64 // entry that logged counts
	most     uint64 // bytes that the log has had more than the leader may keep
}

const busyValue = 16 << 10

func newBusyLeader(t *testing.T, offered int) *busyLeader {
	l := newLone(t, leading)
	b := &busyLeader{snapBox: &snapBox{lone: l}, n: l.n, offered: offered, keys: 8, last: l.n.log.last()}
	b.value = strings.Repeat("x", busyValue)
	l.n.net = b.snapBox
	b.ack(2, l.n.log.last())
	b.ack(3, l.n.log.last())
	return b
}

// ack has a follower say that it has an entry, and all before it.
func (b *busyLeader) ack(from, index uint64) {
	b.hears(int(from-2), message(raftpb.MsgAppResp, from, b.n.raft.term, func(m *raftpb.Message) { *m.Index = index }))
	b.measure()
}

// measure looks at the log.
func (b *busyLeader) measure() {
	for _, e := range b.n.log.entries {
		if e.GetIndex() > b.last {
			b.last = e.GetIndex()
			b.logged += memoryBytes(e)
		}
	}
	if kept := b.n.log.bytesTo(b.n.store.index); kept > b.n.keptBytes() {
		b.most = max(b.most, kept-b.n.keptBytes())
	}
}

// record is the next write.
func (b *busyLeader) record() []byte {
	b.writes++
	record, err := encodeWrite(setWrite(fmt.Sprintf("key %06d", b.writes%b.keys), b.value))
	if err != nil {
		b.t.Fatal(err)
	}
	return record
}

// tick lets a tick pass in which as much is written as is offered, if the leader
// takes it: all others wait, as clients do.
func (b *busyLeader) tick() {
	clear(b.terms) // or looking at all of them takes long
	b.turn(1)
	for from := range 2 {
		if id := uint64(from + 2); b.n.peers.connected[id] {
			b.hears(from, message(raftpb.MsgHeartbeatResp, id, b.n.raft.term))
		}
	}
	for range b.offered / busyValue {
		if len(b.n.calls.writes) > 0 || b.n.calls.own != nil {
			break
		}
		b.call(b.record())
		b.turn(0)
		b.ack(2, b.n.log.last())
	}
	b.ack(2, b.n.log.last())
}

// follow is a tick in which node 3 takes so many bytes of the log, if there are.
func (b *busyLeader) follow(bytes int) {
	b.tick()
	b.store(bytes)
}

func (b *busyLeader) store(bytes int) {
	pr := b.n.progressOf()[3]
	has := pr.Match
	for ; bytes > 0 && has < b.n.store.index; has++ {
		if has >= b.n.log.prevIndex {
			bytes -= int(memoryBytes(b.n.log.entries[has-b.n.log.prevIndex]))
		}
	}
	if pr.State != tracker.StateSnapshot && has > b.n.log.prevIndex {
		b.ack(3, has)
	}
}

func (b *busyLeader) isSlow() bool { return b.n.catchup.pace.limit != 0 }

// lagging is what status says of node 3.
func (b *busyLeader) lagging() string {
	for _, m := range b.n.metrics().Members {
		if m.Node.Id == 3 {
			return m.Lagging
		}
	}
	return ""
}

// lagBehindBy has node 3 store all but so many bytes of the log.
func (b *busyLeader) lagBehindBy(bytes uint64) {
	index := b.n.store.index
	for _, e := range slices.Backward(b.n.log.entries) {
		if memoryBytes(e) > bytes {
			break
		}
		bytes -= memoryBytes(e)
		index = e.GetIndex() - 1
	}
	if index > max(b.n.progressOf()[3].Match, b.n.log.prevIndex) {
		b.ack(3, index)
	}
}

// TestWritesAreHalvedOnce: a rate that was halved is not halved again, also if it was slow for
// longer than the meter looks back.
func TestWritesAreHalvedOnce(t *testing.T) {
	const offered = 8 * busyValue // a tick
	b := newBusyLeader(t, offered)
	for range 600 {
		b.follow(2 * offered)
	}
	full := b.n.catchup.written.fastest(b.n.heartbeatNumber()) / ticksPerHeartbeat
	for phase := range 3 {
		for i := 0; !b.isSlow(); i++ {
			if i > 5000 {
				t.Fatal("writes are not slowed")
			}
			b.lagBehindBy(3 << 20)
			b.tick()
		}
		if share := float64(b.n.catchup.pace.limit) / float64(full); share < .49 {
			t.Errorf("slowed the %d. time to %.2f of what was written at first", phase+1, share)
		}
		for range b.n.ticksOf((rateWindows + 2) * rateWindow) {
			if b.tick(); !b.isSlow() {
				break
			}
			b.lagBehindBy(5 << 19)
		}
		for i := 0; b.isSlow(); i++ {
			if i > 3000 {
				t.Fatal("writes stay slow")
			}
			b.follow(2 * offered)
		}
	}
}

// TestWritesAreHalved: writes are slowed while a member that is behind makes the log
// too long, to half of their rate and no less; those that other nodes propose take
// turns with the leader's own; and all is as before once it has caught up.
func TestWritesAreHalved(t *testing.T) {
	const offered = 4 * busyValue // a tick
	b := newBusyLeader(t, offered)
	for range 100 {
		b.follow(offered)
	}
	if b.isSlow() || b.n.log.bytes > b.n.opts.logBytes {
		t.Fatalf("nobody is behind, and writes are slowed to %d, or the log has %d bytes", b.n.catchup.pace.limit, b.n.log.bytes)
	}
	for i := 0; !b.isSlow(); i++ {
		if i > 1000 {
			t.Fatal("writes are not slowed")
		}
		b.follow(offered / 2)
	}
	if b.n.log.bytes > 2*b.n.opts.logBytes+2*offered || !strings.Contains(b.lagging(), "slowed to") {
		t.Errorf("they are, with %d bytes of log; %q", b.n.log.bytes, b.lagging())
	}
	before, entries := b.logged, map[uint64]int{}
	const ticks = 150
	for range ticks {
		b.tick()
		b.store(offered / 2)
	}
	share := float64(b.logged-before) / (ticks * offered)
	if share < .49 || share > .6 {
		t.Errorf("%.2f of what was written before is now", share)
	}
	// Node 2 wants as much as the leader.
	b.n.opts.onApply = func(e *raftpb.Entry) {
		if batch, err := parseBatch(e.GetData(), nil, programLevel); err == nil {
			entries[batch.proposer]++
		}
	}
	two := setWrite("two", b.value)
	for range ticks {
		for len(b.n.calls.writes) < 4 {
			b.call(b.record())
			b.turn(0)
		}
		if len(b.n.catchup.pace.held) == 0 {
			b.sequence++
			b.hears(0, proposal0(2, &kvpb.Batch{Proposer: 2, Sequence: b.sequence, Writes: []*kvpb.Write{two, two, two, two}}))
		}
		b.tick()
		b.store(offered / 2)
	}
	if own, other := entries[1], entries[2]; own+other < ticks/4 || own < other/2 || other < own/2 {
		t.Errorf("of the leader are %d, of another node %d", own, other)
	}
	for i := 0; b.isSlow(); i++ {
		if i > 1000 {
			t.Fatal("writes are slowed although all have caught up")
		}
		b.follow(2 * offered)
	}
	for range 50 { // what had been held is proposed meanwhile
		b.follow(2 * offered)
	}
	if b.lagging() != "" || b.n.log.bytes > b.n.opts.logBytes || len(b.n.catchup.pace.held) > 0 {
		t.Errorf("%q; %d bytes of log, %d proposals held", b.lagging(), b.n.log.bytes, len(b.n.catchup.pace.held))
	}
	before = b.logged
	for range 20 {
		b.follow(2 * offered)
	}
	if share := float64(b.logged-before) / (20 * offered); share < .9 {
		t.Errorf("%.2f of what was written before is now", share)
	}
	if len(b.views) > 0 || b.most > 0 {
		t.Errorf("%d snapshots were sent; the log was %d bytes too long", len(b.views), b.most)
	}
}

// TestBurstIsSlowed: a log that runs away in less time than tells who is behind
// slows writes, too.
func TestBurstIsSlowed(t *testing.T) {
	const offered = 32 * busyValue
	b := newBusyLeader(t, offered)
	for range 30 {
		b.follow(2 * offered)
	}
	for b.n.log.bytes < 3*b.n.opts.logBytes {
		if b.isSlow() || b.n.clock.now > firstTick+1000 {
			t.Fatal("it is too late for this test")
		}
		b.tick()
	}
	if b.tick(); !b.isSlow() || !b.n.isCaughtUp(b.n.progressOf()[3]) {
		t.Errorf("slowed: %v, with %d bytes of log", b.isSlow(), b.n.log.bytes)
	}
}

// TestTransferIsKept: the log behind a snapshot that is on its way is kept, however
// long that takes, and then what was logged meanwhile, until it is sent.
func TestTransferIsKept(t *testing.T) {
	const offered = busyValue
	b := newBusyLeader(t, offered)
	b.keys = 1000
	for range b.keys {
		b.follow(2 * offered)
	}
	b.n.peerDown(3, true) // it is away, and the log goes on
	for range 2000 {
		b.tick()
	}
	b.n.peerUp(3, true, nil)
	b.tick()
	for range 10 {
		b.tick()
	}
	if len(b.views) != 1 {
		t.Fatalf("%d snapshots are sent", len(b.views))
	}
	index := b.views[0].header.Index
	for range b.n.ticksOf(helloTimeout) * 3 / 2 {
		b.tick()
	}
	if !b.isSlow() || b.n.log.prevIndex > index {
		t.Fatalf("slowed: %v; the log begins behind %d, the snapshot is of %d", b.isSlow(), b.n.log.prevIndex, index)
	}
	b.n.snapshotSent(3, b.views[0], nil)
	b.turn(0)
	b.n.inbox.event(b.n.compact) // before the next heartbeat
	b.turn(0)
	b.ack(3, index)
	for i := 0; b.isSlow(); i++ {
		if i > 5000 {
			t.Fatal("it does not catch up")
		}
		b.follow(offered * 7 / 10)
	}
	if len(b.views) != 1 || b.most > 0 {
		t.Errorf("%d snapshots were sent; the log was %d bytes too long", len(b.views), b.most)
	}
}

// TestTooSlowIsNamed: a member that is slower than half of what is written is given
// up where the log is as long as it may be; status says so, and of what it is sent
// then there is not one after the other; it is tried again once less is written.
func TestTooSlowIsNamed(t *testing.T) {
	const offered = 4 * busyValue
	b := newBusyLeader(t, offered)
	for range 100 {
		b.follow(offered)
	}
	givenUp := func() bool { return b.n.catchup.followers[3] != nil && b.n.catchup.followers[3].givenUp }
	for i := 0; !givenUp(); i++ {
		if i > 2000 {
			t.Fatal("it is not given up")
		}
		b.follow(busyValue)
	}
	if !strings.Contains(b.lagging(), "too slow to catch up: it stored ") {
		t.Errorf("status says %q", b.lagging())
	}
	b.tick()
	if b.isSlow() || b.n.log.bytes > b.n.opts.logBytes {
		t.Errorf("writes are slowed: %v; the log has %d bytes", b.isSlow(), b.n.log.bytes)
	}
	// It asks for a snapshot now, and is never fast enough for one.
	b.n.peerDown(3, false)
	gaveUp, spent := b.n.clock.now, b.n.ticksOf(minSnapshotWait)
	for sent := range 3 {
		for len(b.views) == sent {
			b.tick()
			if b.lagging() == "" {
				t.Fatal("status does not name it")
			}
			if b.n.clock.now-gaveUp > 5000 {
				t.Fatal("it is not tried again")
			}
		}
		began := b.n.clock.now
		if waited := began - gaveUp; waited < spent {
			t.Errorf("another snapshot is sent after %d ticks, when the one before took %d", waited, spent)
		}
		for v := b.views[sent]; !v.givenUp.Load(); {
			b.tick()
			if b.n.clock.now-began > 5000 {
				t.Fatal("it is not given up")
			}
		}
		b.n.snapshotSent(3, b.views[sent], fmt.Errorf("%w: it took 5 bytes of it a second", errTooSlow))
		b.turn(0)
		gaveUp, spent = b.n.clock.now, b.n.clock.now-began
		if !strings.Contains(b.lagging(), "it took 5 bytes of it a second") {
			t.Errorf("status says %q", b.lagging())
		}
	}
	b.n.catchup.followers[3].wait = never // but for what is written
	b.offered = 0
	for len(b.views) < 4 {
		b.tick()
		if b.n.clock.now-gaveUp > 500 {
			t.Fatal("it is not tried again when nothing is written")
		}
	}
	if waited := b.n.clock.now - gaveUp; waited < b.n.ticksOf(minSnapshotWait) {
		t.Errorf("another snapshot is sent after %d ticks", waited)
	}
	b.n.snapshotSent(3, b.views[3], nil)
	b.turn(0)
	b.ack(3, b.views[3].header.Index)
	b.offered = offered
	for range 20 {
		b.follow(offered)
	}
	if b.lagging() != "" || b.most > 0 {
		t.Errorf("it has caught up, and status says %q; the log was %d bytes too long", b.lagging(), b.most)
	}
}

// TestLogIsNotKept: for a member that is away, that says nothing or that does not
// get on nobody keeps the log, nor slows writes for long.
func TestLogIsNotKept(t *testing.T) {
	const offered = 4 * busyValue
	for what, lame := range map[string]struct {
		how   func(b *busyLeader)
		after time.Duration
	}{
		"away":   {func(b *busyLeader) { b.n.peerDown(3, true) }, 0},
		"silent": {func(b *busyLeader) { b.hellos[1].To.RaftId++ }, silentTooLong},
		"stuck":  {func(*busyLeader) {}, helloTimeout},
	} {
		t.Run(what, func(t *testing.T) {
			b := newBusyLeader(t, offered)
			b.n.net = b.lone // to which no snapshot gets
			b.keys = 4000    // so that the bound is not reached
			for range 4100 * busyValue / offered {
				b.follow(offered)
			}
			lame.how(b)
			matched := b.n.progressOf()[3].Match
			for range 40 {
				b.tick()
			}
			b.offered = 0 // nothing is applied any more
			for range b.n.ticksOf(lame.after) {
				b.tick()
			}
			if log := b.n.log; b.isSlow() || log.bytes > b.n.opts.logBytes || log.prevIndex <= matched {
				t.Errorf("slowed: %v; the log has %d bytes behind %d, it has %d", b.isSlow(), log.bytes, log.prevIndex, matched)
			}
			if lag := b.lagging(); lag != "" {
				t.Errorf("status says %q", lag)
			}
		})
	}
}

// TestNobodyRests: who writes a snapshot, for a member or to the disk, stands aside
// no more once the log runs away.
func TestNobodyRests(t *testing.T) {
	b := newBusyLeader(t, 4*busyValue)
	for range 100 {
		b.follow(b.offered)
	}
	rests := func() bool { return !b.n.catchup.noPause.Load() }
	if !rests() {
		t.Error("nobody rests")
	}
	for i := 0; !b.isSlow(); i++ {
		if i > 1000 {
			t.Fatal("the log does not run away")
		}
		b.tick()
	}
	if rests() {
		t.Error("who sends a snapshot rests while the log runs away")
	}
	p, err := openDiskNode(newSimFS(), 1)
	if err != nil {
		t.Fatal(err)
	}
	p.n.inbox.event(func() { _, _ = p.n.bootstrap(nil) })
	if err := p.lead(); err != nil {
		t.Fatal(err)
	}
	p.slowDown()
	for i := 0; p.n.durable.logged <= 2*diskLogBytes; i++ {
		if p.d.noPause {
			t.Fatalf("who saves a snapshot does not rest with %d bytes logged", p.n.durable.logged)
		}
		if _, err := p.call(diskOp{fmt.Sprint("key", i), make([]byte, 1000)}); err != nil {
			t.Fatal(err)
		}
		if err := p.settle(); err != nil {
			t.Fatal(err)
		}
	}
	if !p.d.noPause || len(p.slow) != 1 {
		t.Error("who saves a snapshot rests while the log runs away")
	}
	p.slow[0]()
	if err := p.settle(); err != nil || p.d.noPause {
		t.Errorf("who saves the next snapshot does not rest; %v", err)
	}
}

// TestHeldProposals: another node's proposal that waits for the pace is proposed once,
// also if it is sent again, as one that was lost would be; one that has taken its
// place is proposed alone; and none is kept for the next term.
func TestHeldProposals(t *testing.T) {
	b := newBusyLeader(t, 4*busyValue)
	for i := 0; !b.isSlow(); i++ {
		if i > 1000 {
			t.Fatal("writes are not slowed")
		}
		b.tick()
	}
	two := []*kvpb.Write{setWrite("two", b.value)}
	propose := func(sequence uint64) {
		b.hears(0, proposal0(2, &kvpb.Batch{Proposer: 2, Sequence: sequence, Writes: two}))
	}
	b.n.catchup.pace.room = -b.n.catchup.pace.most()
	propose(1)
	propose(2)
	propose(2)
	if len(b.n.catchup.pace.held) != 1 {
		t.Errorf("%d proposals of one node are held", len(b.n.catchup.pace.held))
	}
	began := b.n.log.last()
	for i := 0; len(b.n.catchup.pace.held) > 0; i++ {
		if i > 200 {
			t.Fatal("it is not proposed")
		}
		b.turn(1)
		b.ack(2, b.n.log.last())
	}
	b.n.catchup.pace.room = b.n.catchup.pace.most()
	propose(2)
	b.ack(2, b.n.log.last())
	var sequences []uint64
	for _, e := range b.n.log.entries {
		if batch, err := parseBatch(e.GetData(), nil, programLevel); err == nil && e.GetIndex() > began && batch.proposer == 2 {
			sequences = append(sequences, batch.sequence)
		}
	}
	if !slices.Equal(sequences, []uint64{2}) {
		t.Errorf("the proposals %d were proposed", sequences)
	}
	// Large ones wait for a second at most, each.
	b.n.catchup.pace.limit, b.n.catchup.pace.room = 1, 1
	b.offered = busyValue
	from := b.n.clock.now
	for writes := b.writes; b.writes < writes+3; {
		b.tick()
	}
	if waited := b.n.clock.now - from; waited > 3*b.n.ticksOf(time.Second) {
		t.Errorf("3 writes are proposed in %d ticks", waited)
	}
	b.n.catchup.pace.room = -b.n.catchup.pace.most()
	propose(3)
	b.hears(0, message(raftpb.MsgHeartbeat, 2, b.n.raft.term+1))
	if b.isSlow() || len(b.n.catchup.pace.held) > 0 {
		t.Error("it leads no more, and slows writes")
	}
}

// TestGivenUpTransferEnds: a snapshot that the log is not kept for any more is sent no
// further.
func TestGivenUpTransferEnds(t *testing.T) {
	c := newCluster(t, 2)
	c.init(1, 2)
	leader := c.settled(1, 2)
	s := c.nodes[leader].server
	var v *view
	var id uint64
	err := s.n.do(c.ctx, func() error {
		v = s.n.store.openView()
		for raftID := range s.n.peers.connected {
			id = raftID
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer v.close()
	s.net.mu.Lock()
	p := s.net.peers[id]
	s.net.mu.Unlock()
	v.givenUp.Store(true)
	if err := p.sendSnapshot(1, v); !errors.Is(err, errTooSlow) {
		t.Errorf("it ends with %v", err)
	}
}

// TestMeter: the rate is that of the fastest window, or since writing began.
func TestMeter(t *testing.T) {
	for _, tt := range []struct {
		name    string
		bytes   []uint64 // by heartbeat
		fastest uint64
	}{
		{"nothing", nil, 0},
		{"just begun", []uint64{0, 0, 7}, 7},
		{"begun a little ago", []uint64{0, 5, 5, 5, 0}, 5},
		{"in bursts", []uint64{10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10}, 1},
		{"faster before", append(append(repeat(3, 30), repeat(9, 10)...), repeat(3, 30)...), 9},
		{"faster long ago", append(repeat(9, 10), repeat(3, 110)...), 3},
	} {
		m := newMeter(100 * time.Millisecond)
		for beat, bytes := range tt.bytes {
			m.add(uint64(beat), bytes)
		}
		if got := m.fastest(uint64(max(0, len(tt.bytes)-1))); got != tt.fastest {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.fastest)
		}
	}
}

func repeat(v uint64, times int) (vs []uint64) {
	for range times {
		vs = append(vs, v)
	}
	return vs
}

// TestComesBackUnderLoad: a node that is behind the log comes back while clients
// write as fast as they can, through the leader and others. The leader's log stays
// within its bound, few snapshots are sent, and writes go on.
func TestComesBackUnderLoad(t *testing.T) {
	set := func(o *options) {
		o.logBytes = 1 << 20
		o.heartbeat, o.election = 100*time.Millisecond, 600*time.Millisecond
	}
	t.Run("in memory", func(t *testing.T) { comesBack(t, newCluster(t, 3, set), 60, func(uint64) {}) })
	t.Run("durable", func(t *testing.T) {
		c, dir := newDurable(t, 3, set)
		comesBack(t, c, 40, func(id uint64) {
			if err := os.RemoveAll(dir(id)); err != nil {
				t.Fatal(err)
			}
		})
	})
}

// comesBack kills a follower, has it lose what it has, and starts it again; there
// are so many MiB of data.
func comesBack(t *testing.T, c *testCluster, data int, lose func(id uint64)) {
	c.init(1, 2, 3)
	leader := c.settled(1, 2, 3)
	big := strings.Repeat("x", maxValueBytes)
	for i := range data {
		key := fmt.Sprint("big", i)
		eventually(t, func() error {
			_, err := c.nodes[leader].Set(c.ctx, &kvpb.SetRequest{Key: key, Value: []byte(big)})
			return err
		})
	}
	id, other := 1+leader%3, 1+(leader+1)%3
	var written atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait() }()
	value := []byte(strings.Repeat("y", 16<<10))
	for w := range 4 {
		via := c.nodes[leader]
		if w == 0 {
			via = c.nodes[other]
		}
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if _, err := via.Set(ctx, &kvpb.SetRequest{Key: fmt.Sprint("w", w, i%100), Value: value}); err == nil {
					written.Add(1)
				}
			}
		})
	}
	before, err := c.metrics(leader)
	if err != nil {
		t.Fatal(err)
	}
	address := c.nodes[id].address
	c.kill(id)
	lose(id)
	c.start(id, address)
	began := time.Now()
	count := written.Load()
	var most uint64
	sample := func() error {
		m, err := c.metrics(leader)
		if err != nil {
			return err
		}
		most = max(most, m.LogBytes)
		// What is not committed yet comes on top: an entry of each node.
		if bound := 4<<20 + m.StoreBytes + 3*(maxEntryBytes+maxWriteBytes); m.LogBytes > bound {
			t.Fatalf("the leader's log has %d bytes, more than %d", m.LogBytes, bound)
		}
		if m.SnapshotsSent-before.SnapshotsSent > 3 && m.Term == before.Term {
			t.Fatalf("%d snapshots were sent", m.SnapshotsSent-before.SnapshotsSent)
		}
		return nil
	}
	within(t, 2*pollDeadline, func() error {
		if err := sample(); err != nil {
			return err
		}
		m, err := c.metrics(id)
		switch voters, _ := membersOf(m); {
		case err != nil:
			return err
		case !m.Healthy || len(voters) != 3 || m.Role != kvpb.Role_ROLE_FOLLOWER:
			return errors.New(m.UnhealthyReason)
		}
		return nil
	})
	took := time.Since(began)
	if per := float64(written.Load()-count) / took.Seconds(); per < 3 {
		t.Errorf("%.1f writes a second", per)
	}
	t.Logf("back after %v; log up to %d bytes; %d writes", took, most, written.Load()-count)
	c.settled(1, 2, 3)
	cancel()
	wg.Wait()
	c.works(1, 2, 3)
}
