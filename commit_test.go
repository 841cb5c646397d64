package main

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// bus is some nodes in cluster 7, and what they have sent each other: a test
// delivers it by hand.
type bus struct {
	t     *testing.T
	nodes map[uint64]*node
	wire  map[busLink][]*raftpb.Message // in order
}

// busLink is what one node sends to another, by raft IDs.
type busLink struct{ from, to uint64 }

// busEnd is the bus as one node's transport.
type busEnd struct {
	b  *bus
	id uint64
}

func (e busEnd) send(to uint64, ms []*raftpb.Message) {
	link := busLink{e.id, to}
	e.b.wire[link] = append(e.b.wire[link], ms...)
}

func (e busEnd) sendSnapshot(to, _ uint64, v *view) {
	e.b.nodes[e.id].snapshotSent(to, v, fmt.Errorf("the bus carries no snapshots"))
}

func (busEnd) setMembers(uint64, uint64, map[uint64]*kvpb.Node, []uint64) {}

// newBus makes nodes that follow nobody yet, are connected, and have entry 1.
func newBus(t *testing.T, ids ...uint64) *bus {
	t.Helper()
	b := &bus{t: t, nodes: map[uint64]*node{}, wire: map[busLink][]*raftpb.Message{}}
	for _, id := range ids {
		o := defaultOptions()
		o.id = id
		n := newNode(o, plainNode(id), slog.New(slog.DiscardHandler))
		n.net, n.id.raftID, n.id.life = busEnd{b, id}, id, id
		n.publish()
		b.nodes[id] = n
		for _, other := range ids {
			if other != id {
				n.peerUp(other, true)
			}
		}
		b.turn(id, 0)
		b.join(id, ids)
	}
	b.loseAll()
	return b
}

// join gives a node the snapshot of entry 1, which has all nodes as voters.
func (b *bus) join(id uint64, ids []uint64) {
	s := newStore()
	s.clusterID, s.index, s.term = 7, 1, 1
	s.configure(&raftpb.ConfState{Voters: ids, AutoLeave: new(false)}, plainMembers(ids...))
	from := ids[0]
	if from == id {
		from = ids[1]
	}
	n := b.nodes[id]
	n.inbox.event(func() {
		if err := n.stepSnapshot(b.hello(from, id), 1, s); err != nil {
			b.t.Fatal(err)
		}
	})
	b.turn(id, 0)
	b.disconnect(id, from)
	b.connect(id, from)
}

func (b *bus) hello(from, to uint64) *kvpb.Hello {
	return &kvpb.Hello{
		ClusterId: 7,
		From:      &kvpb.Peer{Node: plainNode(from), RaftId: from, Life: from},
		To:        &kvpb.Peer{Node: plainNode(to), RaftId: to},
	}
}

func (b *bus) turn(id uint64, ticks int) {
	n := b.nodes[id]
	in := n.inbox.take()
	in.ticks = ticks
	n.turn(in)
}

// connect and disconnect tell a node that its stream to a peer is up, or down.
func (b *bus) connect(id, peer uint64) {
	b.nodes[id].peerUp(peer, true)
	b.turn(id, 0)
}

func (b *bus) disconnect(id, peer uint64) {
	b.nodes[id].peerDown(peer, true)
	b.turn(id, 0)
}

// pass delivers the first messages from one node to another in one turn; most < 0:
// all.
func (b *bus) pass(from, to uint64, most int) {
	if b.deliver(from, to, most) {
		b.turn(to, 0)
	}
}

// deliver leaves messages in a node's inbox; false: there are none.
func (b *bus) deliver(from, to uint64, most int) bool {
	link := busLink{from, to}
	ms := b.wire[link]
	if most >= 0 {
		ms = ms[:min(most, len(ms))]
	}
	b.wire[link] = b.wire[link][len(ms):]
	return len(ms) > 0 && b.nodes[to].inbox.deliver(fromWire(toWire(ms), b.hello(from, to)))
}

func (b *bus) lose(from, to uint64) { delete(b.wire, busLink{from, to}) }

func (b *bus) loseAll() { clear(b.wire) }

// flow delivers all among some nodes until nothing is left, or for long enough.
func (b *bus) flow(ids ...uint64) {
	for range 100 {
		for _, from := range ids {
			for _, to := range ids {
				if from != to {
					b.pass(from, to, -1)
				}
			}
		}
	}
}

func (b *bus) write(id uint64, key, value string) *call {
	b.t.Helper()
	record, err := encodeWrite(setWrite(key, value))
	if err != nil {
		b.t.Fatal(err)
	}
	c := &call{write: record, done: make(chan outcome, 1)}
	if err := b.nodes[id].inbox.call(c); err != nil {
		b.t.Fatal(err)
	}
	b.turn(id, 0)
	return c
}

// ticksUntil lets a node's time pass until something is so.
func (b *bus) ticksUntil(id uint64, what string, so func() bool) {
	b.t.Helper()
	for range 1000 {
		if so() {
			return
		}
		b.turn(id, 1)
	}
	b.t.Fatalf("node %d: not %s: %s", id, what, b.state(id))
}

// elect has a node campaign until it leads, with these others only.
func (b *bus) elect(id uint64, others ...uint64) {
	b.t.Helper()
	all := append([]uint64{id}, others...)
	b.ticksUntil(id, "the leader", func() bool {
		b.flow(all...)
		return b.nodes[id].leads()
	})
}

// beat lets a leader's heartbeats go round, so that all know what is committed.
func (b *bus) beat(leader uint64, others ...uint64) {
	all := append([]uint64{leader}, others...)
	for range 2 * ticksPerHeartbeat {
		b.turn(leader, 1)
		b.flow(all...)
	}
}

func (b *bus) commit(id uint64) uint64 { return b.nodes[id].rn.BasicStatus().GetCommit() }

func (b *bus) state(id uint64) string {
	n := b.nodes[id]
	st := n.rn.BasicStatus()
	var terms []string
	for i := n.log.prevIndex + 1; i <= n.log.last(); i++ {
		term, _ := n.log.Term(i)
		terms = append(terms, fmt.Sprintf("%d/%d", i, term))
	}
	return fmt.Sprintf("%v in term %d, follows %d, commit %d, applied %d, entries %s, err %v",
		st.RaftState, st.GetTerm(), st.Lead, st.GetCommit(), n.store.index, strings.Join(terms, " "), n.err)
}

// TestReplacedEntryIsNotCommitted: what a node takes from a vote as committed is
// compared with the log that raft has, not with the one that it had before an append
// of the same turn. Else a node would commit an entry that nobody else has.
func TestReplacedEntryIsNotCommitted(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	const N, A, B, C, D = 1, 2, 3, 4, 5
	b := newBus(t, N, A, B, C, D)
	b.elect(A, N, B, C, D)
	b.beat(A, N, B, C, D)
	b.loseAll()

	// A writes entries 3 and 4, which only N gets. Then A is cut off.
	b.write(A, "x", "X1")
	b.pass(A, N, -1)
	b.lose(A, C)
	b.write(C, "y", strings.Repeat("X2", 1<<19)) // 1 MiB: a message of its own
	b.pass(C, A, -1)
	b.pass(A, N, -1)
	b.turn(A, 1)
	b.pass(A, N, -1)
	b.loseAll()

	// B is elected by C and D. What it sends them then is lost; N hears a heartbeat.
	for _, id := range []uint64{B, C, D} {
		b.disconnect(id, A)
	}
	b.loseAll()
	b.ticksUntil(B, "the leader", func() bool {
		for _, id := range []uint64{C, D} {
			b.pass(B, id, -1)
			b.pass(id, B, -1)
		}
		b.lose(B, A)
		b.lose(B, N)
		return b.nodes[B].raft.role == raft.StateLeader
	})
	b.loseAll()
	b.disconnect(B, N)
	b.connect(B, N)
	b.ticksUntil(B, "heard", func() bool { return len(b.wire[busLink{B, N}]) > 0 })
	b.pass(B, N, -1)
	b.loseAll()
	if b.nodes[N].raft.lead != B {
		t.Fatalf("N does not follow B: %s", b.state(N))
	}

	// A client writes by way of N. B appends that; from now on all that B sends to N
	// stays in the stream, but for one heartbeat.
	w := b.write(N, "w", "W")
	b.pass(N, B, -1)
	b.ticksUntil(B, "heard", func() bool { return len(b.wire[busLink{B, N}]) > 0 })
	b.pass(B, N, -1)
	b.pass(N, B, -1)
	for _, id := range []uint64{A, C, D} {
		b.lose(B, id)
	}
	for range 150 {
		b.turn(N, 1) // it calls for votes
	}
	for _, id := range []uint64{A, C, D} {
		b.lose(N, id)
	}

	// A leads again, with C and D, and has committed entry 5. B gets 3 and 4.
	for range 200 {
		b.turn(A, 1)
	}
	for _, id := range []uint64{C, D} {
		b.disconnect(id, B)
		b.connect(id, A)
	}
	b.connect(B, A)
	for link := range b.wire {
		if link != (busLink{B, N}) && link != (busLink{N, B}) {
			delete(b.wire, link)
		}
	}
	b.elect(A, C, D)
	b.beat(A, C, D)
	b.lose(A, B)
	for tries := 0; b.commit(B) != 4; tries++ {
		if tries == 100 {
			t.Fatalf("B has not got entry 4 of A: %s", b.state(B))
		}
		b.turn(A, 1)
		b.pass(A, B, 1)
		b.pass(B, A, -1)
	}
	b.lose(A, N)

	// N's calls for votes get to B, and then, at once, all that B has sent to N: an
	// append that replaces 3 and 4, and a vote that says that A's 4 is committed.
	b.pass(N, B, -1)
	b.deliver(B, N, -1)
	for range 2 * b.nodes[N].electionTicks() {
		b.turn(N, 1)
	}
	for range 40 {
		b.turn(A, 1)
		b.flow(A, B, C, D, N)
	}
	for _, id := range []uint64{N, A, B, C, D} {
		if b.nodes[id].err != nil {
			t.Errorf("node %d has stopped: %v", id, b.nodes[id].err)
		}
	}
	select {
	case o := <-w.done:
		if _, found, _ := b.nodes[A].store.get([]byte("w")); o.err == nil && !found {
			t.Error("an acknowledged write is lost")
		}
	default:
	}
}

// TestLearnedCommitCostsNoElection: a vote that tells of a commit that the candidate
// has not heard of is a vote like any other.
func TestLearnedCommitCostsNoElection(t *testing.T) {
	for _, voters := range [][]uint64{{1, 2, 3}, {1, 2, 3, 4, 5}} {
		for seed := range uint64(20) {
			cryptotest.SetGlobalRandom(t, seed)
			b := newBus(t, voters...)
			b.elect(2, append([]uint64{1}, voters[2:]...)...)
			b.beat(2, append([]uint64{1}, voters[2:]...)...)
			b.loseAll()
			b.write(2, "x", "1")
			for _, id := range voters {
				b.pass(2, id, -1)
			}
			for _, id := range voters[2:] {
				b.pass(id, 2, -1)
			}
			b.ticksUntil(2, "known to 3", func() bool { // that it is committed
				b.pass(2, 3, -1)
				return b.commit(3) == b.commit(2)
			})
			b.loseAll()
			// Now 2 is silent, and only 1 calls for votes. All others answer.
			if b.commit(1) >= b.commit(3) {
				t.Fatal("1 has heard of it, too")
			}
			others := voters[2:]
			for _, id := range others {
				for range 2 * b.nodes[id].electionTicks() {
					b.turn(id, 1)
				}
			}
			b.loseAll()
			b.ticksUntil(1, "a candidate", func() bool { return len(b.wire[busLink{1, 3}]) > 0 })
			for range 2 { // calls: PreVote, and Vote
				for _, id := range others {
					b.pass(1, id, -1)
				}
				for _, id := range others { // 3 is the first to answer
					b.pass(id, 1, -1)
					b.turn(1, 1)
				}
			}
			if b.nodes[1].raft.role != raft.StateLeader {
				t.Errorf("%d voters, seed %d: all have voted, and 1 is %s", len(voters), seed, b.state(1))
			}
		}
	}
}

// TestLearnedCommitIsUsed: a candidate that cannot win, for it does not know the
// configuration that is committed, learns of that by the answers to its calls.
func TestLearnedCommitIsUsed(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	b := newBus(t, 1, 2, 3, 4)
	b.elect(2, 1, 3, 4)
	b.beat(2, 1, 3, 4)
	if err := b.nodes[2].proposeChange(nil, confChange(raftpb.ConfChangeRemoveNode, 4)); err != nil {
		t.Fatal(err)
	}
	b.turn(2, 0)
	for _, id := range []uint64{1, 3, 4} {
		b.pass(2, id, -1)
	}
	for _, id := range []uint64{1, 3, 4} {
		b.pass(id, 2, -1)
	}
	if !isJoint(b.nodes[2].store.conf) {
		t.Fatalf("the change is not applied: %s", b.state(2))
	}
	// Node 4 stores the entry that tells it of the change, so the leader ends the change.
	b.pass(2, 4, -1)
	b.pass(4, 2, -1)
	// The entry that ends the change gets to all, the one behind it to 1 alone. Only 3
	// hears that the first is committed.
	b.write(2, "x", "1")
	last := b.nodes[2].log.last()
	b.ticksUntil(2, "replicated", func() bool {
		b.pass(2, 1, -1)
		for _, id := range []uint64{3, 4} {
			for b.nodes[id].log.last() < last-1 && len(b.wire[busLink{2, id}]) > 0 {
				b.pass(2, id, 1)
			}
			b.lose(2, id)
		}
		return b.nodes[1].log.last() == last
	})
	for _, id := range []uint64{3, 4} {
		b.pass(id, 2, -1)
	}
	b.ticksUntil(2, "heard by 3", func() bool {
		for len(b.wire[busLink{2, 3}]) > 0 && isJoint(b.nodes[3].store.conf) {
			b.pass(2, 3, 1)
		}
		return !isJoint(b.nodes[3].store.conf)
	})
	b.loseAll()
	if !isJoint(b.nodes[1].store.conf) || b.nodes[3].log.last() >= last {
		t.Fatalf("1: %s, 3: %s", b.state(1), b.state(3))
	}
	// 2 and 4 are gone for good. 1 and 3 are two of the three voters that there are;
	// 3 cannot lead, for its log is shorter.
	b.disconnect(1, 2)
	b.disconnect(3, 2)
	for range 20 * b.nodes[1].electionTicks() {
		for _, id := range []uint64{1, 3} {
			b.turn(id, 1)
		}
		b.flow(1, 3)
		if b.nodes[1].leads() {
			return
		}
	}
	t.Errorf("there is no leader. 1: %s, 3: %s", b.state(1), b.state(3))
}

// TestDeafForAMoment: whatever a voter's turn to call an election is, it hears a
// leader whose stream broke again as soon as what that had sent before is through.
func TestDeafForAMoment(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	voters := []uint64{1, 2, 3, 4, 5, 6, 7, 8, 9}
	b := newBus(t, voters...)
	b.elect(1, voters[1:]...)
	b.beat(1, voters[1:]...)
	last := b.nodes[9]
	b.disconnect(9, 1)
	for range last.electionTicks() / 5 {
		b.turn(9, 1)
	}
	b.loseAll()
	b.ticksUntil(1, "heard", func() bool { return len(b.wire[busLink{1, 9}]) > 0 })
	b.pass(1, 9, -1)
	if last.raft.lead != 1 {
		t.Errorf("node 9 does not hear the leader: %s", b.state(9))
	}
}

// TestLeaversKnow: two voters leave at once. The leader does not cut one of them off that
// has yet to hear of it: the other one forgets all it knew, so that there would be no
// majority to tell the first that it was removed.
func TestLeaversKnow(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	begin := func(t *testing.T) *bus {
		b := newBus(t, 1, 2, 3)
		b.elect(3, 1, 2)
		b.beat(3, 1, 2)
		leader := b.nodes[3]
		leader.inbox.event(func() {
			err := leader.proposeChange(nil,
				confChange(raftpb.ConfChangeRemoveNode, 1), confChange(raftpb.ConfChangeRemoveNode, 2))
			if err != nil {
				t.Error(err)
			}
		})
		b.turn(3, 0)
		return b
	}
	isHalfWay := func(b *bus, id uint64) bool { return isJoint(b.nodes[id].store.conf) }

	b := begin(t)
	b.flow(1, 3)
	if !isHalfWay(b, 1) || !isHalfWay(b, 3) || isHalfWay(b, 2) {
		t.Fatalf("want a change that only node 2 has not heard of: %s, %s, %s", b.state(1), b.state(2), b.state(3))
	}
	b.flow(2, 3)
	if isHalfWay(b, 3) || len(b.nodes[3].store.members) != 1 {
		t.Fatalf("both know of the change, and it has not ended: %s", b.state(3))
	}
	b.nodes[2].refused(2, 3, &kvpb.Welcome{
		Verdict:   kvpb.Verdict_VERDICT_REMOVED,
		Peer:      &kvpb.Peer{Node: plainNode(3), RaftId: 3, Life: 3},
		ClusterId: 7,
	})
	b.turn(2, 0)
	if b.nodes[2].rn != nil {
		t.Errorf("the voter that stays says that node 2 was removed, and node 2 does not believe it: %s", b.state(2))
	}

	b = begin(t)
	for ticks := uint64(0); isHalfWay(b, 3) || len(b.nodes[3].store.members) != 1; ticks++ {
		if ticks > 3*b.nodes[3].electionTicks() {
			t.Fatalf("the leader waits for ever for a voter that leaves and gets nothing: %s", b.state(3))
		}
		b.turn(3, 1)
		b.flow(1, 3)
		to2 := busLink{3, 2}
		b.wire[to2] = slices.DeleteFunc(b.wire[to2], func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgApp })
		b.pass(3, 2, -1)
		b.pass(2, 3, -1)
	}
}
