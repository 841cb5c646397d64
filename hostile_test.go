// Hostile input, decoder by decoder: fuzz targets for what peers and clients
// may send. FuzzPeerMessage, FuzzReadSnapshot and those of the log on disk are
// beside what they test.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

func FuzzFrameReader(f *testing.F) {
	f.Add([]byte(nil), 0, byte(0))
	f.Add([]byte("some data"), 3, byte(0))
	f.Add(bytes.Repeat([]byte("x"), maxFrameBytes), maxFrameBytes, byte(1))
	f.Add(make([]byte, 2*(maxFrameBytes-frameHeaderBytes)), 1, byte(1)) // the last frame is full
	f.Fuzz(func(t *testing.T, b []byte, at int, flip byte) {
		// As it stands: whatever it is, reading it ends, and costs no more than a frame.
		if n := allocated(func() { _, _ = io.Copy(io.Discard, newFrameReader(bytes.NewReader(b))) }); n > 2*maxFrameBytes {
			t.Errorf("%d bytes made it allocate %d", len(b), n)
		}
		// Framed, it comes out as it went in; damaged, what comes out is a part
		// of it. The length is not under the checksum, but what it delimits is.
		whole := framed(b)
		if got, err := io.ReadAll(newFrameReader(bytes.NewReader(whole))); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("%d bytes came out as %d: %v", len(b), len(got), err)
		}
		if at = max(at, 0) % len(whole); flip == 0 {
			whole = whole[:at]
		} else {
			whole[at] ^= flip
		}
		got, err := io.ReadAll(newFrameReader(bytes.NewReader(whole)))
		if !bytes.HasPrefix(b, got) || flip != 0 && err == nil {
			t.Errorf("byte %d was changed by %d: %d of %d bytes, %v", at, flip, len(got), len(b), err)
		}
	})
}

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
func (*lone) setMembers(uint64, uint64, map[uint64]*kvpb.Node, []uint64) {}

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
		l.n.peerUp(id, true)
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
		l.n.inbox.event(func() { _, _ = l.n.bootstrap() })
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
	l.n.peerUp(2, false)
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
	l.n.peerUp(2, true)
	if l.turn(0); bytes.Equal(l.n.calls.round.ctx, asked) {
		t.Error("it does not ask again what it could not send")
	}
}

// postbox keeps what a lone node sends.
type postbox struct {
	*lone
	sent []*raftpb.Message
}

func (p *postbox) send(_ uint64, ms []*raftpb.Message) { p.sent = append(p.sent, ms...) }

// TestSlowReads: a read ends however far away the leader is, if it is one.
func TestSlowReads(t *testing.T) {
	for _, delay := range []int{1, 14, 16, 40, 200} { // ticks; an election timeout is 30
		l := newLone(t, following)
		p := &postbox{lone: l}
		l.n.net = p
		l.n.peerUp(2, true)
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

// TestCaughtUp: a node is healthy only once it has applied what its leader had
// applied when that first said so.
func TestCaughtUp(t *testing.T) {
	l := newLone(t, following)
	expect := func(when, why string) {
		t.Helper()
		if got := l.n.whyUnhealthy(); got != why {
			t.Errorf("%s it is unhealthy because %q, not %q", when, got, why)
		}
	}
	const behind = "not yet caught up"
	l.hears(0, message(raftpb.MsgHeartbeat, 2, 1))
	expect("before the leader says how far it is", behind)
	last := l.n.log.last()
	l.beats(last+1, false)
	expect("with an entry to apply", behind)
	term, _ := l.n.log.Term(last)
	l.hears(0, message(raftpb.MsgApp, 2, 1, func(m *raftpb.Message) {
		m.Index, m.LogTerm, m.Commit = &last, &term, new(last+1)
		m.Entries = []*raftpb.Entry{{Term: new(uint64(1)), Index: new(last + 1)}}
	}))
	expect("with all applied", "")
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
				l.n.peerUp(hello.From.RaftId, false)
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
		l.n.peerUp(h.From.RaftId, true)
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
			l.admin(func(l *leaderState) nextStep { return l.learnerStep(m.RaftId, m.Node) })
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

// unaryMethods are those that clients and operators may call, in a fixed order.
func unaryMethods() (names []string) {
	for _, d := range []grpc.ServiceDesc{kvpb.KVService_ServiceDesc, kvpb.ClusterService_ServiceDesc} {
		for _, m := range d.Methods {
			names = append(names, "/"+d.ServiceName+"/"+m.MethodName)
		}
	}
	return names
}

// model is what a node with one client has to answer.
type model struct {
	items   map[string]item
	version uint64
}

// expect says what a call has to answer, and does to the model what it does;
// nil: an error. ok is false if the model does not know.
func (m *model) expect(method string, req []byte) (want proto.Message, ok bool) {
	unusual := false // has a field twice perhaps: known to protobuf, refused by a node
	valid := func(r proto.Message, err func() error) bool {
		ok := proto.Unmarshal(req, r) == nil && err() == nil && len(r.ProtoReflect().GetUnknown()) == 0
		unusual = proto.Size(r) != len(req)
		return ok
	}
	switch method[strings.LastIndex(method, "/")+1:] {
	case "Get":
		var r kvpb.GetRequest
		if !valid(&r, func() error { return (&operation{kind: opGet, key: []byte(r.Key)}).check() }) {
			return nil, true
		}
		if unusual {
			return nil, false
		}
		it, found := m.items[r.Key]
		resp := &kvpb.GetResponse{Version: it.version}
		if found {
			resp.Value = append([]byte{}, it.value...)
		}
		return resp, true
	case "Set":
		var r kvpb.SetRequest
		if !valid(&r, func() error {
			return cmp.Or((&operation{kind: opGet, key: []byte(r.Key)}).check(), (&operation{kind: opSet, key: []byte("k"), value: r.Value}).check())
		}) {
			return nil, true
		}
		if unusual || r.ExpectedVersion != nil || r.RequestId != nil {
			return nil, false
		}
		m.version++
		m.items[r.Key] = item{r.Value, m.version}
		return &kvpb.SetResponse{Version: m.version}, true
	case "Delete":
		var r kvpb.DeleteRequest
		if !valid(&r, func() error { return (&operation{kind: opGet, key: []byte(r.Key)}).check() }) {
			return nil, true
		}
		if unusual || r.ExpectedVersion != nil || r.RequestId != nil {
			return nil, false
		}
		_, found := m.items[r.Key]
		m.version++
		delete(m.items, r.Key)
		return &kvpb.DeleteResponse{Deleted: found, Version: m.version}, true
	case "OpenSession":
		return nil, len(req) > 0 // else it answers a number that nobody knows
	}
	return nil, false
}

// listing is all that a node has, page by page.
func listing(ctx context.Context, kv kvpb.KVServiceClient, limit uint32) (map[string]item, error) {
	items := map[string]item{}
	for token := ""; ; {
		resp, err := kv.List(ctx, &kvpb.ListRequest{Limit: limit, PageToken: token})
		if err != nil {
			return nil, err
		}
		for _, kv := range resp.Items {
			if kv.Key <= token && token != "" {
				return nil, fmt.Errorf("key %q comes behind %q", kv.Key, token)
			}
			items[kv.Key] = item{kv.Value, kv.Version}
		}
		if token = resp.NextPageToken; token == "" {
			return items, nil
		}
	}
}

// FuzzServices calls a cluster of one with anything, through gRPC: what is
// valid is done, what is not is refused with a reason and changes nothing.
func FuzzServices(f *testing.F) {
	methods := unaryMethods()
	index := func(name string) byte {
		return byte(slices.IndexFunc(methods, func(m string) bool { return strings.HasSuffix(m, "/"+name) }))
	}
	call := func(name string, r proto.Message) []byte { return step(index(name), mustMarshal(f, r)) }
	stream := func(which byte, r proto.Message) []byte { return step(254+which, mustMarshal(f, r)) }
	hello := &kvpb.Hello{From: &kvpb.Peer{Node: plainNode(2), RaftId: 2, Life: 2}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 3}}
	f.Add(slices.Concat(
		call("Set", &kvpb.SetRequest{Key: "a", Value: []byte("1")}), call("Set", &kvpb.SetRequest{Key: "b"}), call("Get", &kvpb.GetRequest{Key: "a"}),
		call("Get", &kvpb.GetRequest{Key: "b", Local: true}), call("Delete", &kvpb.DeleteRequest{Key: "a"}), call("Delete", &kvpb.DeleteRequest{Key: "a"}),
		call("List", &kvpb.ListRequest{Prefix: "b", Limit: 1}), call("List", &kvpb.ListRequest{Limit: maxListItems + 1}), call("Metrics", &kvpb.MetricsRequest{}),
	))
	f.Add(slices.Concat(
		call("Set", &kvpb.SetRequest{}), call("Get", &kvpb.GetRequest{}), call("Delete", &kvpb.DeleteRequest{}), call("Set", &kvpb.SetRequest{Key: strings.Repeat("k", maxKeyBytes+1)}),
		step(index("Set"), []byte("\x0a\x02\xff\xfe")), step(index("Set"), []byte("\x0a\x01k\x30\x01")), step(index("Get"), []byte{0x80}), call("List", &kvpb.ListRequest{PageToken: "zzz"}),
	))
	f.Add(slices.Concat(
		call("OpenSession", &kvpb.OpenSessionRequest{}), step(index("OpenSession"), mustMarshal(f, &kvpb.NewSession{Session: 7})), call("Set", &kvpb.SetRequest{Key: "a"}),
	))
	f.Add(slices.Concat(
		call("Init", &kvpb.InitRequest{Members: []*kvpb.Node{plainNode(1)}}), call("Init", &kvpb.InitRequest{}), call("AddLearner", &kvpb.AddLearnerRequest{Node: plainNode(2)}),
		call("AddLearner", &kvpb.AddLearnerRequest{Node: plainNode(1)}), call("AddLearner", &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 5, Address: "n1:1"}}),
		call("ChangeMembership", &kvpb.ChangeMembershipRequest{Members: []uint64{1}}), call("ChangeMembership", &kvpb.ChangeMembershipRequest{Members: []uint64{2}}),
		call("TransferLeader", &kvpb.TransferLeaderRequest{NodeId: 1}), call("TransferLeader", &kvpb.TransferLeaderRequest{NodeId: 2}),
	))
	f.Add(slices.Concat(
		stream(0, &kvpb.StreamRequest{Hello: hello}), stream(0, &kvpb.StreamRequest{}), stream(0, &kvpb.StreamRequest{Hello: &kvpb.Hello{To: &kvpb.Peer{}}}),
		stream(1, &kvpb.InstallSnapshotRequest{Hello: hello, Term: 5, Data: snapshotBytes(f, newTestStore())}), step(254, []byte("nonsense")),
	))
	f.Fuzz(func(t *testing.T, script []byte) {
		synctest.Test(t, func(t *testing.T) {
			l := bufconn.Listen(64 << 10)
			o := defaultOptions()
			o.id, o.advertise, o.listener, o.logLevel = 1, plainNode(1).Address, l, slog.LevelError
			o.dialer = func(ctx context.Context, to string) (net.Conn, error) {
				if to != o.advertise {
					return nil, errors.New("nobody is there")
				}
				return l.DialContext(ctx)
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended, ready := make(chan error, 1), make(chan *server, 1)
			go func() { ended <- run(ctx, o, slog.New(slog.DiscardHandler), func(s *server) { ready <- s }) }()
			<-ready
			dial := func() *grpc.ClientConn {
				conn, err := grpc.NewClient("passthrough:///"+o.advertise, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(o.dialer))
				if err != nil {
					t.Fatal(err)
				}
				return conn
			}
			conn := dial()
			defer func() {
				cancel()
				_ = conn.Close()
				if err := <-ended; err != nil {
					t.Error(err)
				}
				time.Sleep(time.Second)
			}()
			exercise(t, ctx, conn, dial, methods, script)
		})
	})
}

// exercise makes the calls of a script and checks their answers.
func exercise(t *testing.T, ctx context.Context, conn *grpc.ClientConn, dial func() *grpc.ClientConn, methods []string, script []byte) {
	kv, cluster := kvpb.NewKVServiceClient(conn), kvpb.NewClusterServiceClient(conn)
	if _, err := cluster.Init(ctx, &kvpb.InitRequest{Members: []*kvpb.Node{plainNode(1)}}); err != nil {
		t.Fatal(err)
	}
	m := &model{items: map[string]item{}}
	steps(script, func(what byte, data []byte) bool {
		if what >= 254 {
			stranger := dial() // one connection has only few hellos
			hostileStream(t, ctx, stranger, what == 255, data)
			_ = stranger.Close()
			return true
		}
		method := methods[int(what)%len(methods)]
		var out []byte
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := conn.Invoke(call, method, data, &out, grpc.ForceCodec(bytesCodec{}))
		cancel()
		if code := status.Code(err); err != nil && code != codes.Internal && reasonOf(err) == "" && code != codes.Unimplemented {
			t.Fatalf("%s: %v, without a reason", method, err)
		}
		want, known := m.expect(method, data)
		switch {
		case known && (err == nil) != (want != nil):
			t.Fatalf("%s(%q): %v, want %v", method, data, err, want)
		case known && want != nil:
			got := want.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(out, got); err != nil || !proto.Equal(got, want) {
				t.Fatalf("%s(%q) = %v, %v, want %v", method, data, got, err, want)
			}
		case !known: // what it did, nobody can say: start from what there is
			metrics, err := cluster.Metrics(ctx, &kvpb.MetricsRequest{})
			if err != nil || metrics.Version < m.version {
				t.Fatalf("after %s: %v, %v", method, metrics, err)
			}
			items, err := listing(ctx, kv, 0)
			if err != nil || metrics.Version == m.version && !sameItems(items, m.items) {
				t.Fatalf("after %s: %v", method, err)
			}
			m.version, m.items = metrics.Version, items
		}
		return true
	})
	items, err := listing(ctx, kv, 2)
	if err != nil || !sameItems(items, m.items) {
		t.Fatalf("%v, want %v: %v", slices.Sorted(maps.Keys(items)), slices.Sorted(maps.Keys(m.items)), err)
	}
	metrics, err := cluster.Metrics(ctx, &kvpb.MetricsRequest{})
	if err != nil || !metrics.Healthy || metrics.Version != m.version || metrics.Keys != uint64(len(m.items)) || len(metrics.Members) != 1 || metrics.Role != kvpb.Role_ROLE_LEADER {
		t.Fatalf("%v, %v; want version %d, %d keys", metrics, err, m.version, len(m.items))
	}
}

// hostileStream sends a peer's first request. Nobody is a peer of this node.
func hostileStream(t *testing.T, ctx context.Context, conn *grpc.ClientConn, snapshot bool, data []byte) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	desc, method := &kvpb.RaftService_ServiceDesc.Streams[0], kvpb.RaftService_Stream_FullMethodName
	if snapshot {
		desc, method = &kvpb.RaftService_ServiceDesc.Streams[1], kvpb.RaftService_InstallSnapshot_FullMethodName
	}
	s, err := conn.NewStream(ctx, desc, method, grpc.ForceCodec(bytesCodec{}))
	if err != nil {
		t.Fatal(err)
	}
	_ = s.SendMsg(data)
	_ = s.CloseSend()
	for {
		var out []byte
		if err = s.RecvMsg(&out); err != nil {
			break
		}
	}
	if status.Code(err) == codes.DeadlineExceeded {
		t.Fatal("the stream does not end")
	}
}

// bytesCodec sends and receives bytes as they are.
type bytesCodec struct{ rawCodec }

func (bytesCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = slices.Clone(b)
	return nil
}
