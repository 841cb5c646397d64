// Tests of the quota: what is refused, by whose limit, and what is not.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// newFull is a cluster of one node, without goroutines, whose store may have so many bytes.
func newFull(t *testing.T, limit uint64) *lone {
	t.Helper()
	l := newLone(t, alone)
	l.n.quota = newQuota(limit)
	l.ticks(100)
	if !l.n.leads() {
		t.Fatal("it does not lead")
	}
	return l
}

// write makes calls in one turn, and returns what each has ended with.
func (l *lone) write(ws ...*kvpb.Write) []outcome {
	l.t.Helper()
	var calls []*call
	for _, w := range ws {
		c := &call{write: mustMarshal(l.t, w), done: make(chan outcome, 1)}
		if err := l.n.inbox.call(c); err != nil {
			l.t.Fatal(err)
		}
		calls = append(calls, c)
	}
	l.turn(0)
	l.turn(0)
	var ended []outcome
	for _, c := range calls {
		select {
		case o := <-c.done:
			ended = append(ended, o)
		default:
			l.t.Fatal("a call has not ended")
		}
	}
	return ended
}

// sized is a Set of a key of one byte that counts so many bytes.
func sized(key string, bytes int) *kvpb.Write {
	return setWrite(key, strings.Repeat("v", bytes-keyBytes-len(key)))
}

// TestQuota: what makes the store larger than the limit is refused, and only that.
func TestQuota(t *testing.T) {
	const keys = 1000
	const limit = keys + sessionBytes + rememberedBytes
	id := func(sequence uint64, w *kvpb.Write) *kvpb.Write { return withID(5, sequence, w) }
	full := []*kvpb.Write{openWrite(5), sized("a", 400), id(1, sized("b", 400)), sized("c", 200)}
	for _, tt := range []struct {
		name    string
		before  []*kvpb.Write // in an entry of their own, behind full
		writes  []*kvpb.Write // in one turn
		refused []int
	}{
		{"a new key", nil, []*kvpb.Write{setWrite("d", "")}, []int{0}},
		{"a larger value", nil, []*kvpb.Write{sized("a", 401)}, []int{0}},
		{"a larger value by a compare that fails now", nil, []*kvpb.Write{setIf("a", strings.Repeat("v", 900), 77)}, []int{0}},
		{"a value as large", nil, []*kvpb.Write{sized("a", 400)}, nil},
		{"a smaller value", nil, []*kvpb.Write{sized("a", 399)}, nil},
		{"a delete", nil, []*kvpb.Write{deleteWrite("a"), deleteWrite("nothing")}, nil},
		{"a range", nil, []*kvpb.Write{deleteRangeWrite("a", "", "")}, nil},
		{"a session", nil, []*kvpb.Write{openWrite(6)}, nil},
		{"a repeat", nil, []*kvpb.Write{id(1, sized("d", 400))}, nil},
		{"a repeat that is none", nil, []*kvpb.Write{id(2, sized("d", 400))}, []int{0}},
		{"as much as was deleted", []*kvpb.Write{deleteWrite("a")}, []*kvpb.Write{sized("d", 400)}, nil},
		{"more than was deleted", []*kvpb.Write{deleteWrite("a")}, []*kvpb.Write{sized("d", 401)}, []int{0}},
		{"behind a delete of the same turn", nil, []*kvpb.Write{deleteWrite("a"), sized("d", 400)}, nil},
		{"behind a range of the same turn", nil, []*kvpb.Write{deleteRangeWrite("a", "", ""), sized("d", 400)}, nil},
		{"two of which one fits", []*kvpb.Write{deleteWrite("a")}, []*kvpb.Write{sized("d", 300), sized("e", 300), sized("f", 100)}, []int{1}},
		{"two of one key", []*kvpb.Write{deleteWrite("a")}, []*kvpb.Write{sized("d", 300), sized("d", 400)}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newFull(t, limit)
			for _, o := range l.write(full...) {
				if o.err != nil {
					t.Fatal(o.err)
				}
			}
			if got := l.n.used(); got != limit {
				t.Fatalf("it has %d bytes", got)
			}
			l.write(tt.before...)
			last, version := l.n.log.last(), l.n.store.version
			var refused []int
			for i, o := range l.write(tt.writes...) {
				if o.err != nil {
					refused = append(refused, i)
				}
				if o.err != nil && !errors.Is(o.err, errQuota) {
					t.Error(o.err)
				}
			}
			if fmt.Sprint(refused) != fmt.Sprint(tt.refused) {
				t.Errorf("refused: %v, want %v", refused, tt.refused)
			}
			if len(refused) == len(tt.writes) && (l.n.log.last() != last || l.n.store.version != version) {
				t.Error("what was refused was proposed")
			}
			if got := l.n.store.size(); got > keys {
				t.Errorf("it has %d bytes", got)
			}
			if got := l.n.metrics().SetsRefused; got != uint64(len(refused)) {
				t.Errorf("%d are counted", got)
			}
		})
	}
}

// TestQuotaOfSessions: sessions, and what they were answered, count against the quota, but half of it
// is left to keys: so room can always be made.
func TestQuotaOfSessions(t *testing.T) {
	const half = 8 * sessionBytes
	l := newFull(t, 2*half)
	l.write(openWrite(5), openWrite(6))
	want := func(used uint64, when string) {
		t.Helper()
		if got := l.n.metrics().QuotaUsed; got != used {
			t.Errorf("%s: %d bytes are used, want %d", when, got, used)
		}
	}
	fits := func(w *kvpb.Write, want bool, when string) {
		t.Helper()
		o := l.write(w)[0]
		isRefused := errors.Is(o.err, errQuota)
		if o.err != nil && !isRefused || isRefused == want {
			t.Errorf("%s: %v", when, o.err)
		}
		if isRefused && !strings.Contains(o.err.Error(), fmt.Sprint(half, " for sessions")) {
			t.Errorf("%v does not say what sessions take", o.err)
		}
	}
	want(2*sessionBytes, "two sessions")
	l.write(withID(5, 1, deleteWrite("a")), withID(6, 1, sized("a", 100)))
	want(2*sessionBytes+2*rememberedBytes+100, "two answers")
	for i := range uint64(1000) {
		l.write(withID(5, 2+i, deleteWrite("a")))
	}
	want(half, "a thousand answers")
	fits(sized("a", half+1), false, "more than keys may have")
	fits(sized("a", half), true, "as much as keys may have")
	want(2*half, "all is used")
	fits(sized("b", 100), false, "all is used")
	fits(withID(5, 1003, deleteWrite("a")), true, "a deletion")
	fits(sized("b", half), true, "after the deletion")
}

// TestQuotaOfGivenUp: a Set that nobody waits for is not refused, takes no room from those behind it, and
// keeps none of them waiting.
func TestQuotaOfGivenUp(t *testing.T) {
	l := newFull(t, 1000)
	l.write(sized("a", 400))
	turn := func(givenUp bool, ws ...*kvpb.Write) (last outcome) {
		t.Helper()
		var calls []*call
		for _, w := range ws {
			calls = append(calls, &call{write: mustMarshal(t, w), done: make(chan outcome, 1)})
		}
		if givenUp {
			calls[len(calls)-2].state.Store(callGivenUp)
		}
		if err := l.n.inbox.call(calls...); err != nil {
			t.Fatal(err)
		}
		l.turn(0)
		select {
		case o := <-calls[len(calls)-1].done:
			return o
		default:
			t.Fatal("the last one waits for another proposal")
		}
		return outcome{}
	}
	if o := turn(true, sized("b", 600), sized("c", 600)); o.err != nil {
		t.Errorf("behind one that would have taken the room: %v", o.err)
	}
	if o := turn(true, sized("d", 100), deleteWrite("x")); o.err != nil || l.n.metrics().SetsRefused != 0 {
		t.Errorf("%d are counted as refused, %v", l.n.metrics().SetsRefused, o.err)
	}
	if o := turn(true, deleteWrite("x"), sized("d", 100), deleteWrite("y")); o.err != nil {
		t.Error(o.err)
	}
	if o := turn(false, sized("d", 100)); !errors.Is(o.err, errQuota) || l.n.metrics().SetsRefused != 1 {
		t.Errorf("one that is waited for: %v", o.err)
	}
}

// TestQuotaOfGivenUpJustNow: a Set that is given up while it is judged takes no room.
func TestQuotaOfGivenUpJustNow(t *testing.T) {
	l := newFull(t, 1000)
	l.write(sized("a", 400))
	l.n.calls.room = l.n.admission(2)
	late := &call{write: mustMarshal(t, sized("b", 600)), done: make(chan outcome, 1)}
	effect, err := l.n.calls.room.judge(late.write)
	if err != nil || effect.grows != 600 {
		t.Fatalf("%+v, %v", effect, err)
	}
	if _, err := l.n.calls.room.judge(mustMarshal(t, sized("c", 600))); err != nil {
		t.Errorf("it was judged only, and has taken the room: %v", err)
	}
	l.n.calls.room.add(effect)
	if _, err := l.n.calls.room.judge(mustMarshal(t, setWrite("c", ""))); err != errNotYet {
		t.Errorf("it is in the proposal, and has taken no room: %v", err)
	}
}

// TestGivenUpOrProposed: a Set is either given up by its caller or proposed, at whatever moment the caller
// tries to.
func TestGivenUpOrProposed(t *testing.T) {
	l := newFull(t, 1<<20)
	var given, applied int
	for round := 0; given == 0 || applied == 0 || round < 100; round++ {
		var calls []*call
		for i := range 200 {
			w := mustMarshal(t, setWrite(fmt.Sprint(i), fmt.Sprint(round)))
			calls = append(calls, &call{write: w, done: make(chan outcome, 1)})
		}
		if err := l.n.inbox.call(calls...); err != nil {
			t.Fatal(err)
		}
		isGiven := make([]bool, len(calls))
		var caller sync.WaitGroup
		caller.Go(func() {
			for i := range calls { // the other way round: so they meet
				at := len(calls) - 1 - i
				isGiven[at] = calls[at].state.CompareAndSwap(callQueued, callGivenUp)
			}
		})
		l.turn(0)
		caller.Wait()
		l.turn(0)
		for i := range calls {
			it, _, err := l.n.store.get(fmt.Append(nil, i))
			if err != nil {
				t.Fatal(err)
			}
			isApplied := string(it.value) == fmt.Sprint(round)
			if isApplied == isGiven[i] {
				t.Fatalf("round %d, call %d: given up: %v, applied: %v", round, i, isGiven[i], isApplied)
			}
			if isApplied {
				applied++
			} else {
				given++
			}
		}
	}
}

// TestQuotaFarOff: a proposal that is far from the limit is not looked at, and does not exceed
// it: whatever the sizes of values, and however many there are.
func TestQuotaFarOff(t *testing.T) {
	for _, bytes := range []int{keyBytes + 4, 500, 2000, maxValueBytes} {
		limit := uint64(3 << 20)
		if bytes < 100 {
			limit = 8 << 20 // so that what keys count besides is more than an entry has
		}
		l := newFull(t, limit)
		for i := 0; i < 100_000 && l.n.quota.refusedAt == 0; i++ {
			w := []*kvpb.Write{sized(fmt.Sprintf("%04d", i), bytes)}
			if bytes < 1000 { // as many as an entry takes
				w = nil
				for j := range 60_000 {
					w = append(w, sized(fmt.Sprintf("%02d%05d", i, j), bytes+3))
				}
			}
			l.write(w...)
		}
		size := l.n.store.size()
		if size > limit || size < limit-uint64(bytes)-keyBytes {
			t.Errorf("of values of %d bytes, the store has %d", bytes, size)
		}
	}
}

// TestQuotaStatus: metrics say what holds, whose it is, and whether and why Sets are refused.
func TestQuotaStatus(t *testing.T) {
	l := newFull(t, 1000)
	l.write(sized("a", 600))
	m := l.n.metrics()
	if m.QuotaUsed != 600 || m.Quota != 1000 || m.QuotaOf.GetId() != 1 || m.MaxStoreBytes != 1000 || m.WritesRefused != "" {
		t.Errorf("%d of %d of %v, own %d: %q", m.QuotaUsed, m.Quota, m.QuotaOf, m.MaxStoreBytes, m.WritesRefused)
	}
	l.write(sized("b", 401))
	if m := l.n.metrics(); !strings.Contains(m.WritesRefused, "node 1") || !strings.Contains(m.WritesRefused, "--max-store-bytes") {
		t.Errorf("after a refusal: %q", m.WritesRefused)
	}
	l.ticks(l.n.ticksOf(refusalShown) + 1)
	if m := l.n.metrics(); m.WritesRefused != "" {
		t.Errorf("a while after it: %q", m.WritesRefused)
	}
	l.write(sized("b", 400))
	if m := l.n.metrics(); m.WritesRefused == "" {
		t.Error("it is full, and does not say so")
	}
	l.write(deleteWrite("b"))
	if m := l.n.metrics(); m.WritesRefused != "" || !m.Healthy {
		t.Errorf("there is room: %q; healthy: %v", m.WritesRefused, m.Healthy)
	}
}

// report is what a member says of its room.
func report(raftID, sequence, limit uint64) *kvpb.RoomReport {
	return &kvpb.RoomReport{RaftId: raftID, Sequence: sequence, MaxStoreBytes: limit}
}

// TestQuotaOfTheLeast: the least limit of the members counts, by their last reports.
func TestQuotaOfTheLeast(t *testing.T) {
	l := newLone(t, leading)
	l.n.quota = newQuota(1000)
	hears := func(from int, rooms ...*kvpb.RoomReport) {
		h := l.hellos[from]
		l.n.inbox.event(func() { l.n.learnRooms(h, rooms) })
		l.turn(0)
	}
	want := func(limit, of uint64) {
		t.Helper()
		if q := &l.n.quota; q.limit != limit || q.of != of {
			t.Errorf("%d of %x counts, want %d of %x", q.limit, q.of, limit, of)
		}
	}
	l.turn(1)
	want(1000, 1)
	hears(0, report(2, 1, 900))
	want(900, 2)
	hears(0, report(2, 3, 800), report(3, 7, 700))
	want(700, 3)
	hears(0, report(2, 2, 600), report(3, 6, 600)) // they are older
	want(700, 3)
	hears(1, report(3, 8, 2000))
	want(800, 2)
	l.ticks(l.n.ticksOf(2 * diskLowLasts)) // however long it has been down
	want(800, 2)
	hears(0, report(1, math.MaxUint64, 1), report(9, 1, 1), report(3, 9, 0)) // it knows better; no member; none
	want(800, 2)
	h := proto.CloneOf(l.hellos[1])
	h.ClusterId = 8
	l.n.inbox.event(func() { l.n.learnRooms(h, []*kvpb.RoomReport{report(3, 10, 10)}) })
	l.turn(0)
	want(800, 2)
	for id := uint64(100); id < 100+2*maxRooms; id++ { // strangers do not push out members
		hears(0, report(id, 1, 1))
	}
	want(800, 2)
	if len(l.n.quota.rooms) > maxRooms {
		t.Errorf("%d reports are kept", len(l.n.quota.rooms))
	}
	l.n.forgetRooms([]uint64{2})
	want(1000, 1)
	hears(0, report(99, 1, 1))
	hears(0, report(2, 1, 900)) // a member finds a place
	want(900, 2)
}

// TestQuotaOfNewMember: what a node says before it is a member counts once it is.
func TestQuotaOfNewMember(t *testing.T) {
	l := newLone(t, leading)
	l.n.quota = newQuota(1000)
	l.n.inbox.event(func() { l.n.learnRooms(l.hellos[0], []*kvpb.RoomReport{report(4, 1, 500)}) })
	l.turn(0)
	if l.n.quota.limit != 1000 {
		t.Error("the limit of a stranger counts")
	}
	_ = l.n.proposeChange(plainMembers(4), confChange(raftpb.ConfChangeAddLearnerNode, 4))
	l.turn(0)
	l.ack(2)
	if l.n.store.members[4] == nil || l.n.quota.limit != 500 {
		t.Errorf("its limit is %d", l.n.quota.limit)
	}
}

// toldRooms is what a node tells its peers.
type toldRooms struct {
	*lone
	all, news [][]*kvpb.RoomReport
}

func (o *toldRooms) tellRooms(all, news []*kvpb.RoomReport) {
	o.all = append(o.all, all)
	o.news = append(o.news, news)
}

// ids are whose reports there are.
func ids(rooms []*kvpb.RoomReport) (ids []uint64) {
	for _, r := range rooms {
		ids = append(ids, r.RaftId)
	}
	return ids
}

// TestRoomsAreTold: a node tells of itself in each life, a follower of others only those whose
// stream begins, a leader all that is new, and of all when it begins to lead.
func TestRoomsAreTold(t *testing.T) {
	for state, want := range map[int]string{following: "[1] []", leading: "[1 2 3] [3]"} {
		l := newLone(t, following)
		told := &toldRooms{lone: l}
		l.n.net = told
		l.n.quota = newQuota(1000)
		l.n.inbox.event(func() { l.n.learnRooms(l.hellos[0], []*kvpb.RoomReport{report(2, 1, 900), report(3, 1, 900)}) })
		l.turn(0)
		first := fmt.Sprint(ids(told.news[0]))
		if state == leading {
			l.n.raft.role = raft.StateLeader
			l.turn(0)
			first = fmt.Sprint(ids(told.news[len(told.news)-1]))
		}
		before := len(told.news)
		l.n.learnRooms(l.hellos[0], []*kvpb.RoomReport{report(3, 2, 900)})
		l.n.tellRooms()
		if len(told.news) != before+1 {
			t.Fatal("it is told nothing, or twice")
		}
		if got := fmt.Sprint(first, " ", ids(told.news[before])); got != want {
			t.Errorf("state %d: %s, want %s", state, got, want)
		}
		if got := fmt.Sprint(ids(told.all[before])); got != "[1 2 3]" {
			t.Errorf("state %d: a stream begins with %s", state, got)
		}
		own := told.all[before][0].Sequence
		l.n.newLife()
		l.n.tellRooms()
		if last := told.all[len(told.all)-1]; len(last) != 1 || last[0].RaftId != l.n.id.raftID || last[0].Sequence <= own {
			t.Errorf("in its new life it tells %v", last)
		}
	}
}

// TestRoomsAreForgotten: of a member that is removed, streams begin without what it has said, and nothing
// that arrives later is taken; of a cluster that a node has left, it keeps nothing.
func TestRoomsAreForgotten(t *testing.T) {
	l := newLone(t, leading)
	told := &toldRooms{lone: l}
	l.n.net = told
	l.n.quota = newQuota(1000)
	l.n.learnRooms(l.hellos[0], []*kvpb.RoomReport{report(2, 1, 900), report(3, 1, 800)})
	l.turn(0)
	before := len(told.all)
	delete(l.n.store.members, 3)
	l.n.store.removed = append(l.n.store.removed, 3)
	l.n.forgetRooms(l.n.store.removed)
	if l.n.quota.rooms[3] != nil || l.n.quota.limit != 900 {
		t.Errorf("%v is kept, the limit is %d", l.n.quota.rooms[3], l.n.quota.limit)
	}
	l.n.tellRooms()
	if len(told.all) == before || fmt.Sprint(ids(told.all[len(told.all)-1])) != "[1 2]" {
		t.Errorf("a stream begins with %v", told.all[before:])
	}
	l.n.learnRooms(l.hellos[0], []*kvpb.RoomReport{report(3, 2, 700)})
	if l.n.quota.rooms[3] != nil {
		t.Error("what the removed has said arrives late, and is taken")
	}
	before = len(told.all)
	l.n.learnRooms(l.hellos[0], []*kvpb.RoomReport{report(2, 1, 900)})
	l.n.tellRooms()
	if len(told.all) != before {
		t.Error("what is known already is told again")
	}
	l.n.newLife()
	if kept := len(l.n.quota.rooms) + len(l.n.quota.news); kept != 0 {
		t.Errorf("it has left, and keeps %d reports", kept)
	}
}

// TestOldLowDiskIsNotTold: streams begin without a member's low disk once that counts no more.
func TestOldLowDiskIsNotTold(t *testing.T) {
	low := report(3, 1, 800)
	low.DiskLow = true
	r := &memberRoom{RoomReport: low, heardAt: 10}
	if !r.asOf(15, 5).DiskLow || r.asOf(16, 5).DiskLow || !low.DiskLow {
		t.Error("it is told for too long, or not for as long as it counts, or is changed")
	}
	if got := r.asOf(16, 5); got.MaxStoreBytes != 800 || got.Sequence != 1 {
		t.Errorf("of its limit, %v is told", got)
	}
}

// TestQuotaOfCluster: by the API, the least limit counts at all nodes, for as long as its node is
// a member. What is refused is not applied, and all else goes on.
func TestQuotaOfCluster(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(o *options) {
		o.maxStoreBytes = 4 << 20
		if o.id == 3 {
			o.maxStoreBytes = 2 << 20
		}
	})
	c.init(1, 2, 3)
	for id := range c.nodes {
		eventually(t, func() error {
			m, err := c.nodes[id].Metrics(c.ctx, &kvpb.MetricsRequest{})
			if err == nil && m.QuotaOf.GetId() != 3 {
				err = fmt.Errorf("node %d: the quota is %d, of %v", id, m.Quota, m.QuotaOf)
			}
			return err
		})
	}
	large := bytes.Repeat([]byte("v"), 900<<10)
	for i, id := range []uint64{1, 2} {
		if _, err := c.nodes[id].Set(c.ctx, &kvpb.SetRequest{Key: fmt.Sprint(i), Value: large}); err != nil {
			t.Fatal(err)
		}
	}
	wantRefused := func(id uint64) {
		t.Helper()
		before, err := c.nodes[id].Get(c.ctx, &kvpb.GetRequest{Key: "x"})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.nodes[id].Set(c.ctx, &kvpb.SetRequest{Key: "x", Value: large})
		if status.Code(err) != codes.ResourceExhausted || errorReason(err) != "QUOTA" || !strings.Contains(err.Error(), "node 3") {
			t.Errorf("through node %d: %v", id, err)
		}
		for _, d := range status.Convert(err).Details() {
			if _, isRetry := d.(*errdetails.RetryInfo); isRetry {
				t.Error("it says when to try again")
			}
		}
		after, err := c.nodes[id].Get(c.ctx, &kvpb.GetRequest{Key: "x"})
		if err != nil || !proto.Equal(before, after) {
			t.Errorf("it was refused, and is there: %v", err)
		}
	}
	for _, id := range []uint64{1, 2, 3} {
		wantRefused(id)
	}
	// In a Pipeline, it is the error of that operation only.
	s, err := c.nodes[1].Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	ops := []*kvpb.Operation{setOp("x", string(large)), setOp("small", "v"), getOp("small", false)}
	if err := s.Send(&kvpb.PipelineRequest{Operations: ops}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	r := resp.Results
	if r[0].GetError().GetReason() != kvpb.ErrorReason_ERROR_REASON_QUOTA || r[1].GetSet() == nil || string(r[2].GetGet().GetValue()) != "v" {
		t.Errorf("a Pipeline: %v", r)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	m, err := c.nodes[2].Metrics(c.ctx, &kvpb.MetricsRequest{})
	if err != nil || !m.Healthy || m.WritesRefused == "" {
		t.Errorf("healthy: %v, refused: %q, %v", m.GetHealthy(), m.GetWritesRefused(), err)
	}
	// Its limit counts while it is down, also under another leader; once it is removed, no more.
	c.stop(3)
	wantRefused(1)
	wantRefused(2)
	eventually(t, func() error {
		_, err := c.nodes[1].ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Remove: []uint64{3}})
		return err
	})
	for _, id := range []uint64{1, 2} {
		eventually(t, func() error {
			_, err := c.nodes[id].Set(c.ctx, &kvpb.SetRequest{Key: "x", Value: large})
			return err
		})
	}
	// Room is made by a delete.
	if _, err := c.nodes[1].Set(c.ctx, &kvpb.SetRequest{Key: "y", Value: make([]byte, 1<<20)}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.nodes[1].Set(c.ctx, &kvpb.SetRequest{Key: "z", Value: large}); errorReason(err) != "QUOTA" {
		t.Fatal(err)
	}
	if _, err := c.nodes[2].Delete(c.ctx, &kvpb.DeleteRequest{Key: "y"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.nodes[2].Set(c.ctx, &kvpb.SetRequest{Key: "z", Value: large}); err != nil {
		t.Error(err)
	}
}
