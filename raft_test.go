// The loop without goroutines, clock and network. A lone node hears what a test makes up;
// the nodes of a bus hear what the test delivers by hand. With them, tests of raft.go,
// calls.go, election.go and raftlog.go.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"
	"weak"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// lone is a node without a network, fed by hand.
type lone struct {
	t      *testing.T
	n      *node
	hellos []*kvpb.Hello // of streams to it
	calls  []*call

	raftID, term, commit, applied uint64
	terms                         map[uint64]uint64 // of committed entries, by index
}

func (*lone) send(uint64, []*raftpb.Message) {}

func (l *lone) sendSnapshot(to, _ uint64, v *view) {
	l.n.snapshotSent(to, v, errors.New("nobody is there"))
}

func (*lone) setLevel(uint32) {}

func (*lone) setMembers(uint64, uint64, map[uint64]*kvpb.Node, []uint64) {}

func (*lone) tellRooms(_, _ []*kvpb.RoomReport) {}

// The states in which what is sent may find a node.
const (
	inNoCluster = iota
	following
	leading
	alone
	loneStates
)

// newLone is node 1 by raft ID 1, in cluster 7 with 2 and 3, unless it is alone
// or in none.
func newLone(t *testing.T, state int) *lone {
	o := defaultOptions()
	o.id, o.logBytes = 1, 1<<20
	l := &lone{t: t, n: newNode(o, plainNode(1), slog.New(slog.DiscardHandler)), terms: map[uint64]uint64{}}
	l.n.net, l.n.id.raftID, l.n.id.life = l, 1, 1
	l.n.publish()
	for id := uint64(2); id <= 3; id++ {
		h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(id), RaftId: id, Life: id}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}}
		l.hellos = append(l.hellos, h)
		l.n.peerUp(id, true, nil)
	}
	l.turn(0)
	switch state {
	case following, leading:
		l.n.inbox.event(func() {
			if err := l.n.stepSnapshot(l.hellos[0], 1, newTestStore()); err != nil {
				t.Fatal(err)
			}
		})
		l.turn(0)
	case alone:
		l.n.inbox.event(func() { _, _ = l.n.bootstrap(nil) })
		l.turn(0)
	}
	if state == leading {
		for l.n.raft.term < 2 {
			l.turn(1)
			l.hears(0, message(raftpb.MsgPreVoteResp, 2, l.n.raft.term+1))
		}
		l.hears(0, message(raftpb.MsgVoteResp, 2, 2))
		l.hears(0, message(raftpb.MsgAppResp, 2, 2, func(m *raftpb.Message) { *m.Index = 2 }))
		if !l.n.leads() {
			t.Fatal("it does not lead")
		}
	}
	return l
}

// hears takes messages of a stream in.
func (l *lone) hears(stream int, ms ...*raftpb.Message) {
	l.n.inbox.deliver(fromWire(toWire(ms), l.hellos[stream]))
	l.turn(0)
}

// turn runs the loop's body and checks what must always hold; false: the node
// has stopped, for a reason that it may have.
func (l *lone) turn(ticks int) bool {
	l.t.Helper()
	n := l.n
	asked := func() bool {
		n.inbox.mu.Lock()
		defer n.inbox.mu.Unlock()
		return len(n.inbox.next.events) > 0
	}
	for i := 0; i == 0 || asked(); i++ {
		in := n.inbox.take()
		in.ticks, ticks = ticks, 0
		n.turn(in)
	}
	if err := n.err; err != nil {
		// What a majority has in its log cannot be undone, only not understood.
		if text := err.Error(); !errors.Is(err, errContradiction) && !(strings.HasPrefix(text, "applying entry ") && strings.Contains(text, "decoding a batch")) {
			l.t.Fatal(err)
		}
		return false
	}
	if n.id.raftID != l.raftID {
		l.raftID, l.term, l.commit, l.applied, l.terms = n.id.raftID, 0, 0, 0, map[uint64]uint64{}
	}
	if n.rn == nil {
		return true
	}
	st := n.rn.BasicStatus()
	if term, commit, applied := st.GetTerm(), st.GetCommit(), n.store.index; term < l.term || commit < l.commit || applied < l.applied || applied > commit || n.log.prevIndex > applied || commit > n.log.last() {
		l.t.Fatalf("from term %d, commit %d, applied %d to %d, %d, %d; the log is (%d, %d]", l.term, l.commit, l.applied, term, commit, applied, n.log.prevIndex, n.log.last())
	}
	for i := max(l.applied, n.log.prevIndex) + 1; i <= n.store.index; i++ {
		l.terms[i], _ = n.log.Term(i)
	}
	for i, term := range l.terms {
		if now, err := n.log.Term(i); err == nil && now != term {
			l.t.Fatalf("entry %d was applied with term %d and has term %d now", i, term, now)
		}
	}
	l.term, l.commit, l.applied = st.GetTerm(), st.GetCommit(), n.store.index
	if c := n.store.conf; n.store.clusterID != 0 && checkConfState(c) != nil {
		l.t.Fatalf("the configuration is %v", c)
	}
	return true
}

// do does what a byte says with data.
func (l *lone) do(what byte, data []byte) {
	stream := int(what>>4) % len(l.hellos)
	h := l.hellos[stream]
	switch what & 15 {
	case 0, 1:
		var req kvpb.StreamRequest
		if proto.Unmarshal(data, &req) == nil {
			l.n.inbox.deliver(fromWire(req.Messages, h))
		}
	case 2:
		var hello kvpb.Hello
		if proto.Unmarshal(data, &hello) == nil {
			// As network.Stream does.
			if w := l.n.accept(&hello); w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED && hello.GetTo().GetRaftId() != 0 && len(l.hellos) < 8 {
				l.n.peerUp(hello.From.RaftId, false, nil)
				l.hellos = append(l.hellos, &hello)
			}
		}
	case 3:
		var w kvpb.Welcome
		if proto.Unmarshal(data, &w) == nil && w.GetPeer().GetNode() != nil {
			l.n.refused(l.n.id.raftID, h.From.RaftId, &w)
		}
	case 4:
		var req kvpb.InstallSnapshotRequest
		if proto.Unmarshal(data, &req) == nil {
			if s, err := readSnapshot(bytes.NewReader(framed(req.Data))); err == nil {
				l.n.inbox.event(func() { _ = l.n.stepSnapshot(h, req.Term, s) })
			}
		}
	case 5:
		l.n.peerDown(h.From.RaftId, stream%2 == 0)
	case 6:
		l.n.peerUp(h.From.RaftId, true, nil)
	case 7:
		var w kvpb.SetRequest
		if proto.Unmarshal(data, &w) == nil && (&operation{kind: opGet, key: []byte(w.Key)}).check() == nil && (&operation{kind: opSet, key: []byte("k"), value: w.Value}).check() == nil && len(l.calls) < 64 {
			record, err := encodeWrite(setWrite(w.Key, string(w.Value)))
			if err != nil {
				l.t.Fatal(err)
			}
			l.call(record)
		}
	case 8:
		l.call(nil)
	case 9:
		var req kvpb.ChangeMembershipRequest
		if proto.Unmarshal(data, &req) == nil && validateChange(&req) == nil {
			l.admin(func(l *leaderState) nextStep { return l.membershipStep(&req) })
		}
	case 10:
		var m kvpb.Member
		if proto.Unmarshal(data, &m) == nil && validateNode("node", m.Node) == nil && m.RaftId != 0 && m.RaftId < maxRaftID {
			l.admin(func(l *leaderState) nextStep { return l.learnerStep(&kvpb.Peer{RaftId: m.RaftId, Node: m.Node}) })
		}
	case 11:
		l.admin((&leaderTransfer{to: uint64(len(data))}).step)
	default:
		l.turn(1 + len(data)%40)
	}
}

func (l *lone) call(record []byte) {
	c := &call{write: record, done: make(chan outcome, 1)}
	if l.n.inbox.call(c) == nil {
		l.calls = append(l.calls, c)
	}
}

// admin makes an operator's request, which may wait for ever.
func (l *lone) admin(next func(*leaderState) nextStep) {
	r := &request{n: l.n, next: next}
	l.n.inbox.event(func() {
		if len(l.n.calls.requests) < 8 {
			l.n.calls.requests = append(l.n.calls.requests, &pendingRequest{ctx: context.Background(), poll: r.poll, done: make(chan error, 1)})
		}
	})
}

// ended ends the node as run does: every call has to have an outcome.
func (l *lone) ended() {
	l.n.rn = nil
	in := l.n.inbox.take()
	l.n.turn(input{calls: in.calls, events: in.events})
	l.n.calls.failAll(errStopping)
	for _, c := range l.calls {
		if len(c.done) != 1 {
			l.t.Fatal("a call has no outcome")
		}
	}
}

// beats gives a follower a heartbeat of its leader, which has applied an entry.
func (l *lone) beats(applied uint64, spared bool) {
	l.hears(0, message(raftpb.MsgHeartbeat, 2, l.n.raft.term, func(m *raftpb.Message) {
		*m.Index = applied
		if spared {
			m.RejectHint = new(uint64(1))
		}
	}))
}

// ack has followers, 2 or 3, acknowledge all that the node has in its log.
func (l *lone) ack(ids ...uint64) {
	l.turn(0)
	for _, id := range ids {
		l.hears(int(id-2), message(raftpb.MsgAppResp, id, l.n.raft.term, func(m *raftpb.Message) { *m.Index = l.n.log.last() }))
	}
}

// ask makes an operator's request.
func (l *lone) ask(next func(*leaderState) nextStep) <-chan error {
	r := &request{n: l.n, next: next}
	c := &pendingRequest{ctx: l.t.Context(), poll: r.poll, done: make(chan error, 1)}
	l.n.inbox.event(func() { l.n.calls.requests = append(l.n.calls.requests, c) })
	l.turn(0)
	return c.done
}

// ticks lets time pass.
func (l *lone) ticks(n uint64) {
	for range n {
		l.turn(1)
	}
}

// newLoneWithLearner is a node that leads, and has added 4.
func newLoneWithLearner(t *testing.T) *lone {
	t.Helper()
	l := newLone(t, leading)
	if err := l.n.proposeChange(plainMembers(4), confChange(raftpb.ConfChangeAddLearnerNode, 4)); err != nil {
		t.Fatal(err)
	}
	l.turn(0)
	l.hears(0, message(raftpb.MsgAppResp, 2, 2, func(m *raftpb.Message) { *m.Index = 3 }))
	if l.n.store.members[4] == nil {
		t.Fatal("no learner")
	}
	return l
}

// postbox keeps what a lone node sends.
type postbox struct {
	*lone
	sent []*raftpb.Message
}

func (p *postbox) send(_ uint64, ms []*raftpb.Message) { p.sent = append(p.sent, ms...) }

// snapBox keeps the snapshots that a node sends.
type snapBox struct {
	*lone
	views []*view
}

func (b *snapBox) sendSnapshot(_, _ uint64, v *view) { b.views = append(b.views, v) }

// turnNode is a node without goroutines and network.
func turnNode() *node {
	n := newNode(defaultOptions(), &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, slog.New(slog.DiscardHandler))
	n.net = deafNetwork{}
	return n
}

// deafNetwork is a network without anybody in it.
type deafNetwork struct{}

func (deafNetwork) send(uint64, []*raftpb.Message) {}

func (deafNetwork) sendSnapshot(uint64, uint64, *view) {}

func (deafNetwork) setLevel(uint32) {}

func (deafNetwork) setMembers(uint64, uint64, map[uint64]*kvpb.Node, []uint64) {}

func (deafNetwork) tellRooms(_, _ []*kvpb.RoomReport) {}

func plainNode(id uint64) *kvpb.Node {
	return &kvpb.Node{Id: id, Address: fmt.Sprintf("n%d:1", id)}
}

func plainMembers(ids ...uint64) []*kvpb.Member {
	var ms []*kvpb.Member
	for _, id := range ids {
		ms = append(ms, &kvpb.Member{RaftId: id, Node: plainNode(id)})
	}
	return ms
}

// message has all fields set, as fromWire leaves them.
func message(typ raftpb.MessageType, from, term uint64, change ...func(m *raftpb.Message)) *raftpb.Message {
	m := &raftpb.Message{
		Type: new(typ), From: new(from), To: new(uint64(1)), Term: new(term), LogTerm: new(uint64(0)),
		Index: new(uint64(0)), Commit: new(uint64(0)), Reject: new(false), RejectHint: new(uint64(0)),
	}
	for _, f := range change {
		f(m)
	}
	return m
}

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

func (busEnd) setLevel(uint32) {}

func (busEnd) setMembers(uint64, uint64, map[uint64]*kvpb.Node, []uint64) {}

// tellRooms leaves what is new in the inboxes of all others, but nobody takes a turn for it.
func (e busEnd) tellRooms(_, news []*kvpb.RoomReport) {
	for id, n := range e.b.nodes {
		if id != e.id {
			n.inbox.event(func() { n.learnRooms(e.b.hello(e.id, id), news) })
		}
	}
}

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
				n.peerUp(other, true, nil)
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
	b.nodes[id].peerUp(peer, true, nil)
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

// TestCommitsWait has a leader say what is committed with the next append or
// tick, but at once if a peer waits for it.
func TestCommitsWait(t *testing.T) {
	l := newLone(t, leading)
	p := &postbox{lone: l}
	l.n.net = p
	acked := l.n.log.last()
	write := func() {
		if err := l.n.inbox.call(&call{write: mustMarshal(t, setWrite("k", "v")), done: make(chan outcome, 1)}); err != nil {
			t.Fatal(err)
		}
		l.turn(0)
	}
	commit := func() { // by node 2
		acked++
		l.hears(0, message(raftpb.MsgAppResp, 2, l.n.raft.term, func(m *raftpb.Message) { *m.Index = acked }))
		if l.n.store.index != acked {
			t.Fatalf("applied %d, not %d", l.n.store.index, acked)
		}
	}
	// told returns the appends since it was last called: entries, and the commit.
	told := func() (s string) {
		for _, m := range p.sent {
			if m.GetType() == raftpb.MsgApp && m.GetTo() == 2 {
				s += fmt.Sprintf("%d@%d ", len(m.GetEntries()), acked-m.GetCommit())
			}
		}
		p.sent = nil
		return s
	}
	expect := func(what, want string) {
		t.Helper()
		if got := told(); got != want {
			t.Errorf("%s: appends of %q, not %q", what, got, want)
		}
	}
	for range 2 * l.n.electionTicks() { // nobody has asked for long
		l.turn(1)
		l.hears(0, message(raftpb.MsgHeartbeatResp, 2, l.n.raft.term))
	}
	told()
	write()
	expect("a write", "1@0 ")
	commit()
	expect("a commit", "")
	write()
	expect("the next write", "1@0 ")
	commit()
	l.turn(1)
	expect("a tick", "0@0 ")
	l.hears(1, message(raftpb.MsgReadIndex, 3, 0, func(m *raftpb.Message) { m.Entries = []*raftpb.Entry{{Data: make([]byte, readContextBytes)}} }))
	write()
	told()
	commit()
	expect("a commit after a peer has asked", "0@0 ")
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

// TestTimeoutNowBehindChange: who is to lead takes over although a change of
// membership has come right before. Raft itself would ignore it, and the old
// leader refuse writes for an election timeout.
func TestTimeoutNowBehindChange(t *testing.T) {
	l := newLone(t, following)
	change := confEntry(contextOf(plainMembers(4)...))
	change.Index, change.Term = new(uint64(2)), new(uint64(1))
	l.hears(0, appendMessage(1, 1, 1, 2, change), message(raftpb.MsgTimeoutNow, 2, 1))
	if l.n.raft.role != raft.StateCandidate || l.n.store.index != 2 || l.n.raft.term != 2 {
		t.Errorf("it is %v in term %d, and has applied %d", l.n.raft.role, l.n.raft.term, l.n.store.index)
	}
}

// TestLeaderLost: once the stream to the leader is down, what it sent last does
// not make it the leader again, so that the first election succeeds.
func TestLeaderLost(t *testing.T) {
	l := newLone(t, following)
	heartbeat := message(raftpb.MsgHeartbeat, 2, 1)
	if l.hears(0, heartbeat); l.n.raft.lead != 2 {
		t.Fatalf("it follows %d", l.n.raft.lead)
	}
	l.n.peerDown(2, true)
	l.hears(0, heartbeat)
	if l.turn(1); l.n.raft.lead != 0 || l.n.rn.BasicStatus().RaftState != raft.StatePreCandidate {
		t.Errorf("it follows %d, and is %v", l.n.raft.lead, l.n.rn.BasicStatus().RaftState)
	}
	if l.hears(0, heartbeat); l.n.raft.lead != 0 {
		t.Error("it follows the dead leader again")
	}
	l.n.peerUp(2, false, nil)
	if l.hears(0, heartbeat); l.n.raft.lead != 2 {
		t.Error("it does not follow a leader that is back")
	}
	if err := l.n.inbox.call(&call{done: make(chan outcome, 1)}); err != nil {
		t.Fatal(err)
	}
	l.turn(0)
	asked := l.n.calls.round.ctx
	if asked == nil {
		t.Fatal("it does not ask the leader")
	}
	l.n.peerUp(2, true, nil)
	if l.turn(0); bytes.Equal(l.n.calls.round.ctx, asked) {
		t.Error("it does not ask again what it could not send")
	}
}

// TestVoterBehindALeaderAnswers: a node that hears a leader lets whoever calls for votes
// know that it is there.
func TestVoterBehindALeaderAnswers(t *testing.T) {
	b := newBus(t, 1, 2, 3)
	b.elect(1, 2, 3)
	b.beat(1, 2, 3)
	b.loseAll()
	// 2 is cut off from 1 alone.
	b.disconnect(2, 1)
	for range 10 * b.nodes[2].electionTicks() {
		for _, id := range []uint64{1, 2, 3} {
			b.turn(id, 1)
		}
		b.lose(1, 2)
		b.lose(2, 1)
		b.flow(1, 3)
		b.flow(2, 3)
	}
	if !b.nodes[1].leads() || b.nodes[1].raft.term != 2 {
		t.Fatalf("1 was disturbed: %s", b.state(1))
	}
	text := b.nodes[2].noLeader().Error()
	if !strings.Contains(text, "node 1 at") || strings.Contains(text, "node 3") {
		t.Errorf("node 2, which is cut off from node 1 alone, says %q", text)
	}
}

// TestNoLeaderIsLogged: once each time that there is none for long.
func TestNoLeaderIsLogged(t *testing.T) {
	var log bytes.Buffer
	n := newNode(defaultOptions(), &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, slog.New(slog.NewTextHandler(&log, nil)))
	n.net = deafNetwork{}
	long := 5 * int(n.electionTicks())
	n.turn(input{ticks: long}) // in no cluster, there is nothing to be missed
	if _, err := n.bootstrap(nil); err != nil {
		t.Fatal(err)
	}
	logged := func(want int) {
		t.Helper()
		for range long {
			n.tick() // without what makes it the leader
		}
		if got := strings.Count(log.String(), `msg="no leader"`); got != want {
			t.Fatalf("%d times, want %d: %s", got, want, &log)
		}
	}
	logged(1)
	n.turn(input{})
	if n.raft.lead == 0 {
		t.Fatal("it does not lead")
	}
	logged(1)
	n.raft.lead = 0
	logged(2)
}

// TestSlowReads: a read ends however far away the leader is, if it is one.
func TestSlowReads(t *testing.T) {
	for _, delay := range []int{1, 14, 16, 40, 200} { // ticks; an election timeout is 30
		l := newLone(t, following)
		p := &postbox{lone: l}
		l.n.net = p
		l.n.peerUp(2, true, nil)
		c := &call{done: make(chan outcome, 1)}
		if err := l.n.inbox.call(c); err != nil {
			t.Fatal(err)
		}
		due := map[int][]*raftpb.Message{}
		for i := 0; len(c.done) == 0; i++ {
			if i > 2000 {
				t.Fatalf("with an answer after %d ticks none counts", delay)
			}
			for _, m := range p.sent {
				if m.GetType() == raftpb.MsgReadIndex {
					due[i+delay] = append(due[i+delay], message(raftpb.MsgReadIndexResp, 2, 1, func(r *raftpb.Message) { r.Index, r.Entries = new(uint64(1)), m.Entries }))
				}
			}
			p.sent = nil
			l.hears(0, append(due[i], message(raftpb.MsgHeartbeat, 2, 1))...)
			l.turn(1)
		}
		if o := <-c.done; o.err != nil {
			t.Errorf("after %d ticks: %v", delay, o.err)
		}
	}
}

// TestLeaderGoneAfterAWait: a call that has waited for something else than a leader
// waits for one as long as any other.
func TestLeaderGoneAfterAWait(t *testing.T) {
	l := newLone(t, following)
	wait := int(l.n.ticksOf(leaderWait))
	c := &call{done: make(chan outcome, 1)}
	if err := l.n.inbox.call(c); err != nil {
		t.Fatal(err)
	}
	for range wait + 10 {
		l.hears(0, message(raftpb.MsgHeartbeat, 2, 1))
		l.turn(1)
	}
	l.n.peerDown(2, true)
	ticks := 0
	for ; len(c.done) == 0 && ticks < 2*wait; ticks++ {
		l.turn(1)
	}
	if ticks < wait || ticks == 2*wait {
		t.Fatalf("it ends after %d ticks, not %d", ticks, wait)
	}
	if o := <-c.done; !errors.Is(o.err, errNoLeader) {
		t.Error(o.err)
	}
}

// TestHopelessCallsEndAtOnce: a call does not wait for a leader on a node that is in no
// cluster, or has been without one for long.
func TestHopelessCallsEndAtOnce(t *testing.T) {
	for _, test := range []struct {
		what  string
		state int
		want  error
	}{{"in no cluster", inNoCluster, errNotInitialized}, {"no leader", following, errNoLeader}} {
		l := newLone(t, test.state)
		for range 2 * l.n.ticksOf(leaderWait) {
			l.turn(1)
		}
		for _, record := range [][]byte{nil, []byte("a write")} {
			c := &call{write: record, done: make(chan outcome, 1)}
			if err := l.n.inbox.call(c); err != nil {
				t.Fatal(err)
			}
			l.turn(0)
			l.turn(1)
			select {
			case o := <-c.done:
				if !errors.Is(o.err, test.want) {
					t.Errorf("%s: %v", test.what, o.err)
				}
			default:
				t.Errorf("%s: it waits", test.what)
			}
		}
	}
}

// TestHopelessRequestsEndAtOnce: so do operators' requests.
func TestHopelessRequestsEndAtOnce(t *testing.T) {
	l := newLone(t, following)
	for range 2 * l.n.ticksOf(leaderWait) {
		l.turn(1)
	}
	s := &server{n: l.n}
	began := time.Now()
	_, err := s.TransferLeader(t.Context(), &kvpb.TransferLeaderRequest{NodeId: 2})
	if errorReason(toStatus(err, false)) != "NO_LEADER" || time.Since(began) > leaderWait {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
}

// TestFullQueue: calls that find no room are refused, and there is room again
// once the others have ended.
func TestFullQueue(t *testing.T) {
	n := turnNode()
	calls := make([]*call, maxQueuedCalls)
	for i := range calls {
		calls[i] = &call{done: make(chan outcome, 1)}
		if err := n.inbox.call(calls[i]); err != nil {
			t.Fatal(i, err)
		}
	}
	err := n.inbox.call(&call{done: make(chan outcome, 1)})
	if !errors.Is(err, errOverloaded) {
		t.Fatal(err)
	}
	st := toStatus(err, true)
	wantError(t, st, codes.ResourceExhausted, "OVERLOADED")
	if !slices.ContainsFunc(status.Convert(st).Details(), func(d any) bool {
		retry, ok := d.(*errdetails.RetryInfo)
		return ok && retry.RetryDelay.AsDuration() > 0
	}) {
		t.Error("it does not say when to try again")
	}
	n.turn(n.inbox.take())
	if err := n.inbox.call(&call{done: make(chan outcome, 1)}); !errors.Is(err, errOverloaded) {
		t.Fatal("they still wait in the loop: ", err)
	}
	n.turn(input{ticks: int(n.ticksOf(leaderWait)) + 1})
	for i, c := range calls {
		if o := <-c.done; !errors.Is(o.err, errNotInitialized) {
			t.Fatal(i, o.err)
		}
	}
	big := &call{write: make([]byte, maxQueuedBytes/2+1), done: make(chan outcome, 1)}
	if err := n.inbox.call(big); err != nil {
		t.Fatal(err)
	}
	if err := n.inbox.call(big); !errors.Is(err, errOverloaded) {
		t.Fatal("bytes are not bounded: ", err)
	}
}

// TestInboundWaits: messages of peers wait for room, and no longer than their
// stream or the loop.
func TestInboundWaits(t *testing.T) {
	n := turnNode()
	big := []inbound{{&raftpb.Message{Entries: []*raftpb.Entry{{Data: make([]byte, maxInboundBytes)}}}, &kvpb.Hello{From: &kvpb.Peer{}, To: &kvpb.Peer{}}}}
	if err := n.receiveMessages(context.Background(), big); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	delivered := make(chan error)
	go func() { delivered <- n.receiveMessages(ctx, big) }()
	cancel()
	if err := <-delivered; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	go func() { delivered <- n.receiveMessages(context.Background(), big) }()
	for done := false; !done; {
		n.turn(n.inbox.take())
		select {
		case err := <-delivered:
			if err != nil {
				t.Fatal(err)
			}
			done = true
		case <-time.After(time.Millisecond):
		}
	}
	n.inbox.deliver(big) // if there is room
	go func() { delivered <- n.receiveMessages(context.Background(), big) }()
	n.err = errStopping
	if err := n.run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-delivered; !errors.Is(err, errStopping) {
		t.Fatal(err)
	}
}

// TestAGivenUpCallIsNotProposed: a caller that gave a queued write up was told
// that it is not applied.
func TestAGivenUpCallIsNotProposed(t *testing.T) {
	n := turnNode()
	n.net = deafNetwork{}
	if _, err := n.bootstrap(nil); err != nil {
		t.Fatal(err)
	}
	n.turn(input{})
	record, err := encodeWrite(&kvpb.Write{Operation: &kvpb.Write_Set{Set: &kvpb.SetRequest{Key: "k", Value: []byte("v")}}})
	if err != nil {
		t.Fatal(err)
	}
	given, kept := &call{write: record, done: make(chan outcome, 1)}, &call{write: record, done: make(chan outcome, 1)}
	given.state.Store(callGivenUp)
	n.turn(input{calls: []*call{given, kept}})
	if o := <-kept.done; o.err != nil || o.version != 1 || n.store.version != 1 {
		t.Fatal(o, n.store.version)
	}
}

// TestWhatWasProposedIsUnknown: a node that stops, or drops its state, says of
// what is only queued that it was not applied, and of the rest that it is not
// known.
func TestWhatWasProposedIsUnknown(t *testing.T) {
	n := turnNode()
	proposed, queued := &call{write: []byte{1}, done: make(chan outcome, 1)}, &call{write: []byte{1}, done: make(chan outcome, 1)}
	n.calls.own, n.calls.writes = &proposal{calls: []*call{proposed}}, []*call{queued}
	n.calls.failAll(errStopping)
	if o := <-proposed.done; o.err != errOutcomeUnknown {
		t.Error(o.err)
	}
	if o := <-queued.done; o.err != errStopping {
		t.Error(o.err)
	}
}

// TestExpireNeedsNoLeader: a call waits for a leader until there has been none for
// leaderWait, whenever it came.
func TestExpireNeedsNoLeader(t *testing.T) {
	l := newLone(t, following)
	for l.n.election.leaderlessTicks == 0 {
		l.turn(1)
	}
	wait := l.n.ticksOf(leaderWait)
	var calls []*call
	for l.n.election.leaderlessTicks < wait {
		if l.n.election.leaderlessTicks == 1 || l.n.election.leaderlessTicks == wait/2 {
			c := &call{done: make(chan outcome, 1)}
			calls = append(calls, c)
			if err := l.n.inbox.call(c); err != nil {
				t.Fatal(err)
			}
		}
		l.turn(1)
		for i, c := range calls {
			if len(c.done) != 0 {
				t.Fatalf("call %d ends after %d ticks: %v", i, l.n.election.leaderlessTicks, (<-c.done).err)
			}
		}
	}
	l.turn(1)
	for i, c := range calls {
		if len(c.done) != 1 {
			t.Fatalf("call %d does not end", i)
		}
	}
	if len(calls) != 2 {
		t.Fatalf("%d calls", len(calls))
	}
}

// TestNodeFails: a call that a node can never answer, because it has failed, is
// told so, and why.
func TestNodeFails(t *testing.T) {
	s := newIdleServer(t)
	n := s.n
	ended := make(chan error, 1)
	go func() {
		_, err := s.intercept(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: kvpb.KVService_Set_FullMethodName},
			func(ctx context.Context, _ any) (any, error) { return writeAs(ctx, s, setWrite("k", "v")) })
		ended <- err
	}()
	eventually(t, func() error {
		if n.inbox.mu.Lock(); n.inbox.callCount == 0 {
			defer n.inbox.mu.Unlock()
			return errors.New("no call yet")
		}
		n.inbox.mu.Unlock()
		return nil
	})
	n.inbox.event(func() { n.err = errors.New("the disk is gone") })
	if err := n.run(t.Context()); err == nil || err.Error() != "the disk is gone" {
		t.Error(err)
	}
	err := <-ended
	wantError(t, err, codes.Unavailable, "NODE_FAILED")
	wantPart(t, err.Error(), "the disk is gone")

	// So are those who come when it has ended.
	if err := n.inbox.call(&call{}); err != n.err {
		t.Errorf("a call: %v", err)
	}
	if err := n.do(t.Context(), func() error { return nil }); err != n.err {
		t.Errorf("a request: %v", err)
	}
}

// Indexes and terms start where an entry's encoding is its data and 16 bytes,
// as entryBytes has it: the model's limits of size are the same then.
const (
	modelIndex = 1 << 22
	modelTerm  = 1 << 36
)

func logEntry(index, term uint64, data []byte) *raftpb.Entry {
	return &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Index: new(index), Term: new(term), Data: data}
}

func logEntries(r *rand.Rand, first, term uint64, n int) []*raftpb.Entry {
	var es []*raftpb.Entry
	for i := range n {
		if r.IntN(4) == 0 {
			term++
		}
		es = append(es, logEntry(first+uint64(i), term, make([]byte, r.IntN(60))))
	}
	return es
}

func logSnapshot(index, term uint64) *raftpb.Snapshot {
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(index), Term: new(term), ConfState: &raftpb.ConfState{Voters: []uint64{index}}}}
}

// given is a slice that the log gave away, and what was in it.
type given struct{ got, want []*raftpb.Entry }

func TestLogModel(t *testing.T) {
	if e := logEntry(modelIndex, modelTerm, make([]byte, 5)); entryBytes(e) != uint64(proto.Size(e)) {
		t.Fatalf("the model's limits of size are not the log's: %d, %d", entryBytes(e), proto.Size(e))
	}
	for seed := range uint64(10) {
		r := seededRand(seed)
		l, model := &raftLog{}, raft.NewMemoryStorage()
		reset := func(index, term uint64) {
			snap := logSnapshot(index, term)
			l.reset(snap)
			model = raft.NewMemoryStorage()
			if err := model.ApplySnapshot(snap); err != nil {
				t.Fatal(err)
			}
			if _, cs, err := l.InitialState(); err != nil || !slices.Equal(cs.Voters, []uint64{index}) {
				t.Fatalf("InitialState: %v, %v", cs, err)
			}
		}
		reset(modelIndex, modelTerm)
		var gifts []given
		term := uint64(modelTerm)
		for range 300 {
			first, last := l.prevIndex+1, l.last()
			switch r.IntN(12) {
			default: // at the end
				es := logEntries(r, last+1, term, r.IntN(5))
				appendBoth(t, l, model, es)
				if len(es) > 0 && len(l.entries) > 0 && &es[0] == &l.entries[0] {
					t.Fatal("the log keeps the caller's slice")
				}
			case 0, 1, 2: // over the end
				term++
				appendBoth(t, l, model, logEntries(r, first+r.Uint64N(last+2-first), term, 1+r.IntN(6)))
			case 3, 4:
				limit, index := r.Uint64N(l.bytes+20), l.prevIndex+r.Uint64N(last+2-l.prevIndex)
				to := compactModel(l, limit, index)
				l.compact(limit, index)
				if to > first-1 {
					if err := model.Compact(to); err != nil {
						t.Fatal(err)
					}
				}
				if l.bytes > limit && l.prevIndex < min(index, last) || l.prevIndex > max(index, first-1) {
					t.Fatalf("seed %d: compact(%d, %d) left %d bytes from %d", seed, limit, index, l.bytes, l.prevIndex+1)
				}
			case 5:
				if r.IntN(4) == 0 {
					term++
					reset(last+r.Uint64N(5), term)
				}
			case 6: // a gap, or what is compacted: nothing changes
				before := *l
				for _, i := range []uint64{l.prevIndex, l.prevIndex - 1, last + 2, last + 100} {
					if l.append([]*raftpb.Entry{logEntry(i, term, nil)}) == nil {
						t.Fatalf("seed %d: entry %d was appended to %d to %d", seed, i, first, last)
					}
				}
				if l.bytes != before.bytes || l.prevIndex != before.prevIndex || !slices.Equal(l.entries, before.entries) {
					t.Fatal("a refused append changed the log")
				}
			}
			if g := compareLog(t, r, l, model); len(g.got) > 0 {
				gifts = append(gifts, g)
			}
			for _, g := range gifts {
				if !slices.Equal(g.got, g.want) {
					t.Fatalf("seed %d: a slice that was given away has changed", seed)
				}
			}
		}
	}
}

func appendBoth(t *testing.T, l *raftLog, model *raft.MemoryStorage, es []*raftpb.Entry) {
	t.Helper()
	if err := l.append(es); err != nil {
		t.Fatal(err)
	}
	if err := model.Append(es); err != nil {
		t.Fatal(err)
	}
}

// compactModel returns the last index that is to be dropped: the fewest entries
// are.
func compactModel(l *raftLog, limit, index uint64) uint64 {
	to, bytes := l.prevIndex, uint64(0)
	for _, e := range l.entries {
		bytes += memoryBytes(e)
	}
	for _, e := range l.entries {
		if bytes <= limit || e.GetIndex() > index {
			break
		}
		bytes -= memoryBytes(e)
		to = e.GetIndex()
	}
	return to
}

func compareLog(t *testing.T, r *rand.Rand, l *raftLog, model *raft.MemoryStorage) given {
	t.Helper()
	first, _ := l.FirstIndex()
	last, _ := l.LastIndex()
	wantFirst, _ := model.FirstIndex()
	wantLast, _ := model.LastIndex()
	if first != wantFirst || last != wantLast {
		t.Fatalf("the log is from %d to %d, the model from %d to %d", first, last, wantFirst, wantLast)
	}
	for i := first - 3; i <= last+2; i++ {
		term, err := l.Term(i)
		want, wantErr := model.Term(i)
		if term != want || err != wantErr {
			t.Fatalf("Term(%d) = %d, %v, want %d, %v", i, term, err, want, wantErr)
		}
	}
	bytes := uint64(0)
	for _, e := range l.entries {
		bytes += memoryBytes(e)
	}
	if l.bytes != bytes {
		t.Fatalf("it counts %d bytes of %d", l.bytes, bytes)
	}
	if _, err := l.Entries(first-1, last+1, 100); err != raft.ErrCompacted {
		t.Fatalf("Entries from a compacted one: %v", err)
	}
	if _, err := l.Entries(first, last+2, 100); err != raft.ErrUnavailable { // the model panics
		t.Fatalf("Entries behind the last: %v", err)
	}
	if first > last {
		return given{}
	}
	lo := first + r.Uint64N(last+1-first)
	hi := lo + r.Uint64N(last+2-lo)
	limit := []uint64{0, 1, 16, r.Uint64N(500), ^uint64(0)}[r.IntN(5)]
	got, err := l.Entries(lo, hi, limit)
	want, wantErr := model.Entries(lo, hi, limit)
	if err != wantErr || !slices.Equal(got, want) {
		t.Fatalf("Entries(%d, %d, %d): %d, %v, want %d, %v", lo, hi, limit, len(got), err, len(want), wantErr)
	}
	if cap(got) != len(got) {
		t.Fatal("an append to a slice that was given away would change the log")
	}
	return given{got, slices.Clone(want)}
}

// What the model cannot say: the edges of compact.
func TestLogCompact(t *testing.T) {
	fill := func() *raftLog {
		l := &raftLog{prevIndex: 10, prevTerm: 1}
		for i := range uint64(4) {
			if err := l.append([]*raftpb.Entry{logEntry(11+i, 1+i, make([]byte, 300-entryOverhead))}); err != nil {
				t.Fatal(err)
			}
		}
		return l
	}
	for _, c := range []struct{ limit, index, prev, term, bytes uint64 }{
		{1200, 14, 10, 1, 1200}, // it fits
		{1199, 14, 11, 1, 900},
		{900, 14, 11, 1, 900},
		{0, 14, 14, 4, 0},
		{0, 99, 14, 4, 0},
		{0, 13, 13, 3, 300}, // never past index
		{0, 10, 10, 1, 1200},
		{0, 3, 10, 1, 1200},
	} {
		l := fill()
		l.compact(c.limit, c.index)
		if l.prevIndex != c.prev || l.prevTerm != c.term || l.bytes != c.bytes || l.last() != 14 {
			t.Errorf("compact(%d, %d): from %d of term %d, %d bytes, last %d", c.limit, c.index, l.prevIndex, l.prevTerm, l.bytes, l.last())
		}
		if len(l.entries) > 0 && l.prevIndex > 10 && cap(l.entries) > len(l.entries)+2 {
			t.Errorf("compact(%d, %d) keeps room for %d entries", c.limit, c.index, cap(l.entries))
		}
	}
	l := fill()
	kept := l.entries
	l.compact(600, 14)
	if &l.entries[0] == &kept[2] {
		t.Error("compact keeps the old array, and with it what was dropped")
	}
	if err := l.append(nil); err != nil {
		t.Error(err)
	}
	snap := logSnapshot(20, 5)
	l.snapshot = func() *raftpb.Snapshot { return snap }
	l.hard = &raftpb.HardState{Term: new(uint64(6))}
	if got, err := l.Snapshot(); got != snap || err != nil {
		t.Errorf("Snapshot: %v, %v", got, err)
	}
	if hs, _, err := l.InitialState(); hs != l.hard || err != nil {
		t.Errorf("InitialState: %v, %v", hs, err)
	}
	if _, cs, _ := (&raftLog{}).InitialState(); cs == nil {
		t.Error("raft reads a nil ConfState")
	}
}

// TestCompactedEntriesAreFreed: entries that are dropped one at a time, as those
// that a member gets on by, take hardly any memory longer.
func TestCompactedEntriesAreFreed(t *testing.T) {
	const all, kept = 3000, 1000
	l := &raftLog{}
	l.reset(logSnapshot(0, 1))
	var entries []weak.Pointer[raftpb.Entry]
	for i := range uint64(all) {
		e := logEntry(i+1, 1, make([]byte, 100))
		entries = append(entries, weak.Make(e))
		if err := l.append([]*raftpb.Entry{e}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(all - kept) {
		l.compact(0, i+1)
	}
	runtime.GC()
	alive := 0
	for _, e := range entries {
		if e.Value() != nil {
			alive++
		}
	}
	if alive < kept || alive > kept+kept/8+1 || len(l.entries) != kept || l.bytes != kept*(100+entryOverhead) {
		t.Errorf("%d of %d entries take memory; it has %d, of %d bytes", alive, kept, len(l.entries), l.bytes)
	}
	runtime.KeepAlive(l)
}

// step is a step of a script: what, and with which data.
func step(what byte, data []byte) []byte {
	return append(binary.AppendUvarint([]byte{what}, uint64(len(data))), data...)
}

// steps are those of a script, whatever bytes it is made of.
func steps(script []byte, do func(what byte, data []byte) bool) {
	for range 100 {
		if len(script) == 0 {
			return
		}
		what := script[0]
		size, n := binary.Uvarint(script[1:])
		if n <= 0 {
			return
		}
		script = script[1+n:]
		data := script[:min(size, uint64(len(script)))]
		if script = script[len(data):]; !do(what, data) {
			return
		}
	}
}

// FuzzNode has a node hear anything: messages, hellos, refusals, snapshots, in
// any order and among calls of clients and operators.
func FuzzNode(f *testing.F) {
	var everything []byte
	says := func(stream byte, ms ...*raftpb.Message) []byte {
		return step(stream<<4, mustMarshal(f, &kvpb.StreamRequest{Messages: toWire(ms)}))
	}
	for i, row := range checkRows() {
		for _, m := range []*raftpb.Message{row.bad, row.good} {
			if proto.Size(m) < 4<<10 {
				everything = append(everything, says(byte(i%2), m)...)
			}
		}
	}
	hello := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(4), RaftId: 4, Life: 4}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}, Removed: []uint64{1}}
	unframedSnapshot := unframed(f, snapshotBytes(f, newTestStore()))
	other := bytes.Join([][]byte{
		step(2, mustMarshal(f, hello)), step(8, nil), step(7, mustMarshal(f, &kvpb.SetRequest{Key: "k", Value: []byte("v")})), step(12, make([]byte, 39)),
		step(3, mustMarshal(f, &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_REMOVED, ClusterId: 7, Peer: &kvpb.Peer{Node: plainNode(2), RaftId: 2, Life: 2}})),
		step(3, mustMarshal(f, &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_NOT_ME, Peer: &kvpb.Peer{Node: plainNode(2), RaftId: 22, Life: 2}})),
		step(4, mustMarshal(f, &kvpb.InstallSnapshotRequest{Term: 3, Data: unframedSnapshot})),
		step(9, mustMarshal(f, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}})),
		step(9, mustMarshal(f, &kvpb.ChangeMembershipRequest{Promote: []uint64{5}, Demote: []uint64{2}, Expected: &kvpb.Membership{Members: []*kvpb.ExpectedMember{{Node: plainNode(1), Voter: true}}}})),
		step(10, mustMarshal(f, plainMembers(5)[0])), step(11, []byte("xx")),
		step(5, nil), step(6, nil), step(5+16, nil),
	}, nil)
	batch := mustMarshal(f, &kvpb.Batch{Proposer: 2, Sequence: 1, Writes: []*kvpb.Write{setWrite("a", "b"), deleteWrite("c")}})
	follow := slices.Concat(says(0, appendMessage(1, 1, 1, 2, logEntry(2, 1, batch), confEntry(contextOf()))), says(1, message(raftpb.MsgVote, 3, 5)), says(0, message(raftpb.MsgHeartbeat, 2, 6)))
	for state := range byte(loneStates) {
		f.Add(state, everything)
		f.Add(state, other)
		f.Add(state, follow)
	}
	f.Fuzz(func(t *testing.T, state byte, script []byte) {
		cryptotest.SetGlobalRandom(t, 1) // what fails has to fail again
		l := newLone(t, int(state)%loneStates)
		steps(script, func(what byte, data []byte) bool {
			l.do(what, data)
			return l.turn(0)
		})
		if l.n.err == nil {
			l.turn(60)
		}
		l.ended()
	})
}

// TestPanicEndsWhatWaits: raft panics in the middle of a turn. What came in with it, and
// was not worked on yet, ends as all else does.
func TestPanicEndsWhatWaits(t *testing.T) {
	n := newLone(t, following).n
	queued := &call{done: make(chan outcome, 1)}
	if err := n.inbox.call(queued); err != nil {
		t.Fatal(err)
	}
	waiting := &pendingRequest{
		ctx:  context.Background(),
		poll: func() (bool, error) { return false, nil },
		done: make(chan error, 1),
	}
	n.inbox.event(func() { panic(raftPanic("it contradicts itself")) })
	n.inbox.event(func() { n.calls.requests = append(n.calls.requests, waiting) })
	if err := n.run(t.Context()); err == nil || !strings.Contains(err.Error(), "it contradicts itself") {
		t.Fatalf("the loop ended with %v", err)
	}
	for what, err := range map[string]error{"the call": endOf(queued.done).err, "the request": endOf(waiting.done)} {
		if err == nil || !strings.Contains(err.Error(), "it contradicts itself") {
			t.Errorf("%s ended with %v", what, err)
		}
	}
}

// TestPanicInARequest: raft panics in the step of a request. That one ends, too, and so do
// those after it.
func TestPanicInARequest(t *testing.T) {
	n := newLone(t, following).n
	var ends []chan error
	for range 2 {
		end := make(chan error, 1)
		ends = append(ends, end)
		n.calls.requests = append(n.calls.requests, &pendingRequest{
			ctx:  context.Background(),
			poll: func() (bool, error) { panic(raftPanic("it contradicts itself")) },
			done: end,
		})
	}
	if err := n.run(t.Context()); err == nil {
		t.Fatal("the loop has not ended with an error")
	}
	for i, end := range ends {
		if err := endOf(end); err == nil {
			t.Errorf("request %d waits still", i)
		}
	}
}

// endOf is what stands in a channel, or nothing.
func endOf[T any](c chan T) (end T) {
	select {
	case end = <-c:
	default:
	}
	return end
}
