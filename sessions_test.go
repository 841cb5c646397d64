// Exactly-once and compare-and-set: the state machine, the service, and the whole
// cluster.

package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

func openWrite(session uint64) *kvpb.Write { return openWriteOf(session, "") }

func openWriteOf(session uint64, owner string) *kvpb.Write {
	open := &kvpb.NewSession{Session: session, Owner: owner}
	return &kvpb.Write{Operation: &kvpb.Write_NewSession{NewSession: open}}
}

// opened is what a write ends with that opens a session.
var opened outcome

// setIf is a Set of a key that has a version.
func setIf(key, value string, version uint64) *kvpb.Write {
	w := setWrite(key, value)
	w.GetSet().ExpectedVersion = &version
	return w
}

func deleteIf(key string, version uint64) *kvpb.Write {
	w := deleteWrite(key)
	w.GetDelete().ExpectedVersion = &version
	return w
}

// withID gives a write an id.
func withID(session, sequence uint64, w *kvpb.Write) *kvpb.Write {
	id := &kvpb.RequestId{Session: session, Sequence: sequence}
	switch op := w.Operation.(type) {
	case *kvpb.Write_Set:
		op.Set.RequestId = id
	case *kvpb.Write_Delete:
		op.Delete.RequestId = id
	case *kvpb.Write_DeleteRange:
		op.DeleteRange.RequestId = id
	}
	return w
}

// sessionStore is a test's store and the count of its batches.
type sessionStore struct {
	*store
	t       testing.TB
	batches uint64
}

// wants applies a write and compares what it ends with, and whether it had an
// effect on the version.
func (s *sessionStore) wants(w *kvpb.Write, counts uint64, want outcome) {
	s.t.Helper()
	before := s.version
	s.batches++
	if got := tryBatch(s.t, s.store, 1, s.batches, w); got[0] != want || s.version != before+counts {
		s.t.Errorf("%v: %+v, and the version went from %d to %d; want %+v", w, got[0], before, s.version, want)
	}
}

func done(version uint64, found bool) outcome {
	return outcome{result: result{version: version, found: found}}
}

func failed(version uint64) outcome {
	return outcome{result: result{version: version, compareFailed: true}}
}

func TestCompare(t *testing.T) {
	s := &sessionStore{newTestStore(), t, 0}
	s.wants(setIf("a", "x", 1), 0, failed(0))
	s.wants(setIf("a", "1", 0), 1, done(1, false))
	s.wants(setIf("a", "x", 0), 0, failed(1))
	s.wants(setIf("a", "x", 2), 0, failed(1))
	s.wants(setIf("a", "2", 1), 1, done(2, true))
	s.wants(deleteIf("a", 1), 0, failed(2))
	s.wants(deleteIf("b", 2), 0, failed(0))
	s.wants(deleteIf("a", 2), 1, done(3, true))
	s.wants(deleteIf("a", 2), 0, failed(0))
	s.wants(setIf("a", "", 0), 1, done(4, false)) // an empty value is one
	s.wants(setIf("a", "x", 0), 0, failed(4))
	if all := contents(t, s.store); len(all) != 1 || all["a"].version != 4 || len(all["a"].value) != 0 {
		t.Errorf("%v", all)
	}
}

func TestSession(t *testing.T) {
	s := &sessionStore{newTestStore(), t, 0}
	unknown, tooOld, tooFar := outcome{err: errSessionUnknown}, outcome{err: errSequenceTooOld}, outcome{err: errSequenceTooFar}
	s.wants(withID(71, 1, setWrite("a", "x")), 0, unknown)
	s.wants(openWrite(71), 0, opened)
	s.wants(openWrite(1<<64-1), 0, opened)
	s.wants(openWrite(71), 0, outcome{err: errSessionTaken})
	s.wants(withID(71, 1, setWrite("a", "1")), 1, done(1, false))
	s.wants(openWrite(71), 0, outcome{err: errSessionTaken})
	s.wants(setWrite("a", "2"), 1, done(2, true))
	s.wants(withID(71, 1, setWrite("a", "1")), 0, done(1, false))
	s.wants(withID(1<<64-1, 1, setWrite("a", "3")), 1, done(3, true)) // of another session
	s.wants(withID(71, 2, deleteWrite("a")), 1, done(4, true))
	s.wants(setWrite("a", "4"), 1, done(5, false))
	s.wants(withID(71, 2, deleteWrite("a")), 0, done(4, true))
	s.wants(withID(71, 3, setIf("a", "x", 4)), 0, failed(5))
	s.wants(deleteWrite("a"), 1, done(6, true))
	s.wants(withID(71, 3, setIf("a", "x", 0)), 0, failed(5)) // remembered
	s.wants(withID(6, 1, setWrite("a", "x")), 0, unknown)    // a version, but of no OpenSession
	if got := applyBatch(t, s.store, 2, 1, withID(71, 4, setWrite("a", "5")), withID(71, 4, setWrite("a", "5"))); got[0] != got[1] || s.version != 7 {
		t.Errorf("twice in one batch: %v", got)
	}

	// The window: what is out of order is taken, what is too old or too far is not.
	s.wants(withID(71, 1029, setWrite("b", "x")), 0, tooFar)
	s.wants(withID(71, 1<<64-1, setWrite("b", "x")), 0, tooFar)
	s.wants(withID(71, 1028, setWrite("b", "1")), 1, done(8, false))
	s.wants(withID(71, 2000, setWrite("b", "1")), 1, done(9, true))
	s.wants(withID(71, 977, setWrite("b", "2")), 1, done(10, true))
	s.wants(withID(71, 976, setWrite("b", "x")), 0, tooOld)
	s.wants(withID(71, 1, setWrite("a", "1")), 0, tooOld)
	s.wants(withID(71, 1500, setWrite("b", "3")), 1, done(11, true))
	s.wants(withID(71, 977, setWrite("b", "2")), 0, done(10, true))
	s.wants(withID(71, 2001, setWrite("b", "4")), 1, done(12, true))
	s.wants(withID(71, 977, setWrite("b", "2")), 0, tooOld)
	s.wants(withID(71, 978, setWrite("b", "5")), 1, done(13, true))
	s.wants(withID(71, 1500, setWrite("b", "3")), 0, done(11, true))
	s.wants(withID(71, 3026, setWrite("b", "x")), 0, tooFar)
	s.wants(withID(1<<64-1, 1026, setWrite("b", "x")), 0, tooFar)
	s.wants(withID(1<<64-1, 1025, setWrite("b", "6")), 1, done(14, true))

	// The end of all sequences, which nobody reaches.
	ses := s.sessions.byID[71].Value.(*session)
	ses.answers = []firstAnswer{{1<<64 - 1000, result{version: 1}}}
	s.wants(withID(71, 1<<64-1, setWrite("b", "7")), 1, done(15, true))
	s.wants(withID(71, 1<<64-1025, setWrite("b", "x")), 0, tooOld)
	s.wants(withID(71, 1<<64-1024, setWrite("b", "8")), 1, done(16, true))
	if it := contents(t, s.store); string(it["a"].value) != "5" || string(it["b"].value) != "8" {
		t.Errorf("%v", it)
	}
}

// opens opens sessions, the first of them with this number, as one batch.
func (s *sessionStore) opens(first, n uint64) {
	s.t.Helper()
	var open []*kvpb.Write
	for i := range n {
		open = append(open, openWrite(first+i))
	}
	s.batches++
	for i, o := range tryBatch(s.t, s.store, 1, s.batches, open...) {
		if o != opened {
			s.t.Fatalf("session %d: %v", first+uint64(i), o.err)
		}
	}
	if all := len(s.sessions.all()); s.sessions.count() != all || all > maxSessions {
		s.t.Fatalf("%d sessions, in lists %d", s.sessions.count(), all)
	}
}

// uses uses sessions, the first of them with this number, as one batch.
func (s *sessionStore) uses(first, n, sequence uint64) {
	s.t.Helper()
	var ws []*kvpb.Write
	for i := range n {
		ws = append(ws, withID(first+i, sequence, setWrite("k", "v")))
	}
	s.batches++
	for i, o := range tryBatch(s.t, s.store, 1, s.batches, ws...) {
		if o.err != nil {
			s.t.Fatalf("session %d: %v", first+uint64(i), o.err)
		}
	}
}

// TestStrangersSessions: whoever opens many sessions costs others of the same owner the
// tenth that were used the longest ago, and leaves who has just opened one time to use it,
// however many there are.
func TestStrangersSessions(t *testing.T) {
	s := &sessionStore{newTestStore(), t, 0}
	unknown := outcome{err: errSessionUnknown}
	s.opens(1, maxSessions)
	s.uses(1, maxSessions-1, 1)
	s.opens(20_000, 1000) // session 10,000 and the 999 that were used first go
	s.wants(withID(maxSessions, 1, setWrite("a", "x")), 0, unknown)
	s.wants(withID(999, 2, setWrite("a", "x")), 0, unknown)
	s.uses(1000, 1, 2)
	s.opens(30_000, 2*maxSessions) // in place of each other
	s.uses(1000, maxSessions-1000, 3)
	s.wants(withID(30_000+2*maxSessions-1001, 1, setWrite("a", "x")), 0, unknown)
	s.uses(30_000+2*maxSessions-1000, 1000, 1) // the newest have waited for their first use

	// All are used, as if each write had a session of its own: many may be open at
	// the same time.
	for first := uint64(100_000); first < 103_000; first += 300 {
		s.opens(first, 300)
		s.uses(first, 300, 1)
	}
}

// TestRefusedWritesUseNothing: a write that is refused keeps no session from being
// dropped, whoever sends it.
func TestRefusedWritesUseNothing(t *testing.T) {
	s := &sessionStore{newTestStore(), t, 0}
	s.sessions.limit, s.sessions.answerLimit = 3, 2
	for id := uint64(1); id <= 3; id++ {
		s.wants(openWrite(id), 0, opened)
	}
	s.uses(2, 2, 1)
	s.uses(2, 2, 3)
	s.wants(withID(1, 3, setWrite("a", "x")), 0, outcome{err: errSequenceTooFar})
	s.wants(withID(2, 6, setWrite("a", "x")), 0, outcome{err: errSequenceTooFar})
	s.wants(withID(2, 1, setWrite("a", "x")), 0, outcome{err: errSequenceTooOld})
	s.wants(openWrite(4), 0, opened)
	s.wants(withID(1, 1, setWrite("a", "x")), 0, outcome{err: errSessionUnknown})
	s.uses(4, 1, 1)
	s.wants(openWrite(5), 0, opened)
	s.wants(withID(2, 4, setWrite("a", "x")), 0, outcome{err: errSessionUnknown})
	s.uses(3, 1, 3) // a repeat, and so the latest
	s.uses(5, 1, 1)
	s.wants(openWrite(6), 0, opened)
	s.wants(withID(4, 2, setWrite("a", "x")), 0, outcome{err: errSessionUnknown})
	s.uses(3, 1, 4)
}

func TestSessionsAreBounded(t *testing.T) {
	s := &sessionStore{newTestStore(), t, 0}
	s.opens(1, maxSessions)
	// A session with all answers at their longest fits into a record.
	last := uint64(1<<64 - 1024)
	s.uses(1, 1, 1)
	s.sessions.byID[1].Value.(*session).answers[0].sequence = last - 1
	for i := range uint64(1024) {
		applyBatch(t, s.store, 3, i+1, withID(1, last+i, setWrite("a", fmt.Sprint(i))))
	}
	ses := s.sessions.byID[1].Value.(*session)
	for i := range ses.answers {
		ses.answers[i].result = result{maxCounter - 1, maxRangeKeys, true, true, true}
	}
	s.version = maxCounter - 1
	b := snapshotBytes(t, s.store)
	restored, err := readSnapshot(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(snapshotBytes(t, restored), b) {
		t.Error("the restored store is another")
	}
}

// answersOf is how many answers sessions remember.
func answersOf(all []session) (answers uint64) {
	for _, ses := range all {
		answers += uint64(len(ses.answers))
	}
	return answers
}

// sessionModel is what sessions mean, in the plainest words.
type sessionModel struct {
	version  uint64
	keys     map[string]uint64
	order    []uint64 // all that were never used, and then all others
	owner    map[uint64]string
	highest  map[uint64]uint64
	answered map[[2]uint64]outcome
}

func (m *sessionModel) apply(w *kvpb.Write, sessions int, answers uint64) (o outcome) {
	var key string
	var id *kvpb.RequestId
	var expected *uint64
	switch set, del := w.GetSet(), w.GetDelete(); {
	case set != nil:
		key, id, expected = set.Key, set.RequestId, set.ExpectedVersion
	case del != nil:
		key, id, expected = del.Key, del.RequestId, del.ExpectedVersion
	default:
		return outcome{err: m.open(w.GetNewSession(), sessions)}
	}
	if id != nil {
		i := slices.Index(m.order, id.Session)
		if i < 0 {
			return outcome{err: errSessionUnknown}
		}
		h := m.highest[id.Session]
		if h >= answers && id.Sequence <= h-answers {
			return outcome{err: errSequenceTooOld}
		}
		if id.Sequence > h+answers {
			return outcome{err: errSequenceTooFar}
		}
		m.order = append(slices.Delete(m.order, i, i+1), id.Session)
		at := [2]uint64{id.Session, id.Sequence}
		if first, ok := m.answered[at]; ok {
			return first
		}
		m.highest[id.Session] = max(m.highest[id.Session], id.Sequence)
		defer func() { m.answered[at] = o }()
	}
	was := m.keys[key]
	if expected != nil && *expected != was {
		return failed(was)
	}
	m.version++
	if m.keys[key] = m.version; w.GetSet() == nil {
		delete(m.keys, key)
	}
	return done(m.version, was != 0)
}

func (m *sessionModel) open(w *kvpb.NewSession, sessions int) error {
	if slices.Contains(m.order, w.Session) {
		return errSessionTaken
	}
	if len(m.order) == sessions {
		drop := toDrop(m.all(), w.Owner)
		m.order = slices.Delete(m.order, drop, drop+1)
	}
	unused := 0
	for unused < len(m.order) && m.highest[m.order[unused]] == 0 {
		unused++
	}
	m.order = slices.Insert(m.order, unused, w.Session)
	m.owner[w.Session] = w.Owner
	return nil
}

// all are the sessions in order.
func (m *sessionModel) all() (all []*modelSession) {
	for _, id := range m.order {
		all = append(all, &modelSession{id: id, owner: m.owner[id], highest: m.highest[id]})
	}
	return all
}

// toDrop says which of the sessions has to go for another one of an owner, in the plainest
// words. They are in order: those never used, the oldest first, and then the others, the
// one used the longest ago first.
func toDrop(all []*modelSession, owner string) int {
	counts := map[string]int{}
	for _, ses := range all {
		counts[ses.owner]++
	}
	from := owner
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		if counts[name] > counts[from] {
			from = name
		}
	}
	var unused, used []int
	for i, ses := range all {
		switch {
		case ses.owner != from:
		case ses.highest == 0:
			unused = append(unused, i)
		default:
			used = append(used, i)
		}
	}
	if len(unused) >= max(1, counts[from]/10) {
		return unused[0]
	}
	return used[0]
}

// byOwner sorts sessions as a snapshot has them.
func byOwner(all []*modelSession) []*modelSession {
	return slices.SortedStableFunc(slices.Values(all), func(a, b *modelSession) int {
		return cmp.Compare(a.owner, b.owner)
	})
}

// is reports whether a store's session is this one.
func (m *modelSession) is(ses session) bool {
	return ses.id == m.id && ses.owner.name == m.owner && ses.highest() == m.highest
}

// Writes of all kinds, with small limits, views open, and going through a
// snapshot now and then.
func TestSessionModel(t *testing.T) {
	counts := map[string]int{}
	for seed := range uint64(8) {
		r := seededRand(seed)
		s := newTestStore()
		s.sessions.limit, s.sessions.answerLimit = 1+r.IntN(5)*r.IntN(7), 1+r.Uint64N(8)
		m := &sessionModel{
			keys:     map[string]uint64{},
			owner:    map[uint64]string{},
			highest:  map[uint64]uint64{},
			answered: map[[2]uint64]outcome{},
		}
		ids := []uint64{77}
		type open struct {
			v    *view
			want []byte
		}
		var views []open
		closeOne := func() {
			if len(views) == 0 {
				return
			}
			if !bytes.Equal(viewBytes(t, views[0].v), views[0].want) {
				t.Fatalf("seed %d: a view has changed", seed)
			}
			views[0].v.close()
			views = views[1:]
		}
		for batch := range uint64(600) {
			switch r.IntN(25) {
			case 0:
				v := s.openView()
				views = append(views, open{v, viewBytes(t, v)})
			case 1:
				closeOne()
			case 2:
				restored, err := readSnapshot(bytes.NewReader(snapshotBytes(t, s)))
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				other := newTestStore() // what it has had does not help
				other.sessions.limit, other.sessions.answerLimit = s.sessions.limit, s.sessions.answerLimit
				other.install(restored)
				s = other
			}
			var ws []*kvpb.Write
			var want []outcome
			for range 1 + r.IntN(3) {
				w := setWrite(fmt.Sprint("k", r.IntN(3)), "v")
				version := r.Uint64N(m.version + 2)
				if k := m.keys[w.GetSet().Key]; r.IntN(2) == 0 {
					version = k
				}
				switch k := r.IntN(50); {
				case k < 3:
					w = openWriteOf(1+r.Uint64N(2*uint64(len(ids))+2), testOwners[r.IntN(len(testOwners))])
				case k < 10:
					w = deleteWrite(w.GetSet().Key)
				case k < 20:
					w = deleteIf(w.GetSet().Key, cmp.Or(version, 1))
				case k < 30:
					w = setIf(w.GetSet().Key, "v", version)
				}
				if id := ids[max(0, len(ids)-1-r.IntN(7))]; w.GetNewSession() == nil && r.IntN(3) > 0 {
					withID(id, max(1, m.highest[id]+uint64(r.IntN(4))-min(m.highest[id], uint64(r.IntN(9)))), w)
				}
				o := m.apply(w, s.sessions.limit, s.sessions.answerLimit)
				if w.GetNewSession() != nil && o.err == nil {
					id := w.GetNewSession().Session
					ids, m.highest[id] = append(ids, id), 0
					maps.DeleteFunc(m.answered, func(at [2]uint64, _ outcome) bool { return at[0] == id })
				}
				counts[fmt.Sprint(o.err, o.compareFailed)]++
				ws, want = append(ws, w), append(want, o)
			}
			if got := tryBatch(t, s, 1, batch+1, ws...); !slices.Equal(got, want) || s.version != m.version {
				t.Fatalf("seed %d: %v: %v, want %v", seed, ws, got, want)
			}
			all := inOrder(s.sessions.all())
			if !slices.EqualFunc(byOwner(m.all()), all, (*modelSession).is) || s.sessions.count() != len(all) {
				t.Fatalf("seed %d: sessions %v, want %v", seed, all, m.order)
			}
			if want := answersOf(all); s.sessions.answered != want {
				t.Fatalf("seed %d: %d answers are counted, there are %d", seed, s.sessions.answered, want)
			}
		}
		for len(views) > 0 {
			closeOne()
		}
		for key, it := range contents(t, s) {
			if m.keys[key] != it.version {
				t.Errorf("seed %d: %s has version %d, want %d", seed, key, it.version, m.keys[key])
			}
		}
	}
	if len(counts) != 6 || slices.Min(slices.Collect(maps.Values(counts))) < 50 {
		t.Errorf("outcomes %v", counts)
	}
}

// send makes a write of a store a call of the API.
func (c *testCluster) send(ctx context.Context, via uint64, w *kvpb.Write) (proto.Message, error) {
	if set := w.GetSet(); set != nil {
		return c.nodes[via].Set(ctx, set)
	}
	return c.nodes[via].Delete(ctx, w.GetDelete())
}

// answers sends a write that has to be answered so, through some nodes.
func (c *testCluster) answers(want proto.Message, w *kvpb.Write, via ...uint64) {
	c.t.Helper()
	for _, id := range via {
		if got, err := c.send(c.ctx, id, w); err != nil || !proto.Equal(got, want) {
			c.t.Fatalf("%v through node %d: %v, %v; want %v", w, id, got, err, want)
		}
	}
}

func (c *testCluster) openSession(via uint64) uint64 {
	c.t.Helper()
	resp, err := c.nodes[via].OpenSession(c.ctx, &kvpb.OpenSessionRequest{})
	if err != nil || resp.Session == 0 {
		c.t.Fatalf("OpenSession through node %d: %v, %v", via, resp, err)
	}
	return resp.Session
}

func TestExactlyOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	id := c.openSession(1)
	set, del, cas := withID(id, 1, setWrite("k", "first")), withID(id, 2, deleteWrite("k")), withID(id, 3, setIf("k", "third", 0))
	c.answers(&kvpb.SetResponse{Version: 1}, set, 2)
	c.answers(&kvpb.SetResponse{Version: c.set(3, "k", "second"), CompareFailed: true}, cas, 1, 2)
	c.answers(&kvpb.DeleteResponse{Version: 3, Deleted: true}, del, 3, 1)
	repeats := func(via ...uint64) {
		t.Helper()
		c.answers(&kvpb.SetResponse{Version: 1}, set, via...)
		c.answers(&kvpb.DeleteResponse{Version: 3, Deleted: true}, del, via...)
		c.answers(&kvpb.SetResponse{Version: 2, CompareFailed: true}, cas, via...)
		c.wantsAbsent(via[0], "k")
	}
	repeats(1, 2, 3)
	c.transfer(1, 1+c.settled(1, 2, 3)%3)
	repeats(1, 2, 3)
	c.restart(2) // comes back by a snapshot
	c.settled(1, 2, 3)
	repeats(2, 1, 3)
	if m, err := c.metrics(2); err != nil || m.Sessions != 1 || m.Version != 3 {
		t.Errorf("%v, %v", m, err)
	}

	refused := func(w *kvpb.Write, reason string) {
		t.Helper()
		for via := range c.nodes {
			_, err := c.send(c.ctx, via, w)
			wantError(t, err, codes.FailedPrecondition, reason)
		}
	}
	refused(withID(id+1, 1, setWrite("k", "x")), "SESSION_UNKNOWN")
	refused(withID(id, 1028, setWrite("k", "x")), "SEQUENCE_TOO_FAR")
	refused(withID(id, 1<<64-1, setWrite("k", "x")), "SEQUENCE_TOO_FAR") // a stranger's guess
	c.answers(&kvpb.SetResponse{Version: 4}, withID(id, 1026, setWrite("k", "v")), 3)
	refused(del, "SEQUENCE_TOO_OLD")
	c.answers(&kvpb.SetResponse{Version: 2, CompareFailed: true}, cas, 1)
	for _, n := range c.nodes {
		if err := n.server.n.do(c.ctx, func() error { n.server.n.store.sessions.limit = 3; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	for range 4 { // in place of each other
		c.openSession(3)
	}
	c.answers(&kvpb.SetResponse{Version: 2, CompareFailed: true}, cas, 1)
	for range 3 {
		set := withID(c.openSession(3), 1, setWrite("k", "v"))
		if _, err := c.send(c.ctx, 1, set); err != nil {
			t.Fatal(err)
		}
	}
	refused(cas, "SESSION_UNKNOWN")
	c.sameStates(1, 2, 3)
}

// TestRestoreGivesNothingOutAgain: what a cluster told its clients and then lost,
// the one that is restored gives to nobody else: no session, and no version. That
// holds for each life that begins with one backup, and for a backup of such a one.
func TestRestoreGivesNothingOutAgain(t *testing.T) {
	t.Parallel()
	const id = 1
	file := filepath.Join(t.TempDir(), "backup")
	sessions, versions := map[uint64]bool{}, map[uint64]bool{}
	take := func(what string, taken map[uint64]bool, n uint64) {
		t.Helper()
		if taken[n] {
			t.Errorf("%s %d is given out again", what, n)
		}
		taken[n] = true
	}
	c, _ := newDurable(t, id)
	c.init(id)
	kept := withID(c.openSession(id), 1, setWrite("kept", "v"))
	c.answers(&kvpb.SetResponse{Version: 1}, kept, id)
	lives := []string{"the first", "restored", "restored again", "restored from that"}
	for i, life := range lives {
		if i > 0 {
			dir := filepath.Join(t.TempDir(), life)
			runCommand(t, 0, "", "restore", file, "--data-dir", dir, "--id", fmt.Sprint(id), "--addr", "127.0.0.1:1")
			c = newCluster(t, id, func(o *options) { o.durable, o.dataDir = true, dir })
			c.settled(id)
		}
		if i == 0 || i == len(lives)-2 { // later than this, what it tells is lost
			path := c.nodes[id].address
			_ = os.Remove(file)
			runCommand(t, 0, "", "backup", "--endpoints", path, file)
		}
		c.answers(&kvpb.SetResponse{Version: 1}, kept, id)
		c.wants(id, false, "kept", "v", 1)

		for session := range sessions { // whoever has it from another life
			_, err := c.send(c.ctx, id, withID(session, 1, setWrite("of another", "x")))
			wantError(t, err, codes.FailedPrecondition, "SESSION_UNKNOWN")
		}
		lost := maps.Clone(versions)
		for range 5 {
			session := c.openSession(id)
			take("session", sessions, session)
			value := fmt.Sprint(life, session)
			resp, err := c.send(c.ctx, id, withID(session, 1, setWrite("mine", value)))
			if err != nil {
				t.Fatal(err)
			}
			version := resp.(*kvpb.SetResponse).Version
			take("version", versions, version)
			c.wants(id, false, "mine", value, version)
			for old := range lost {
				c.answers(&kvpb.SetResponse{Version: version, CompareFailed: true}, setIf("mine", "of another", old), id)
			}
		}
		c.stop(id)
	}
}

// TestSessionsAreNotGuessed: who knows many sessions is not near any other, of this
// cluster or another one. (By chance it is in one of ten million runs.)
func TestSessionsAreNotGuessed(t *testing.T) {
	t.Parallel()
	const near = 1 << 24
	all := []uint64{0}
	for range 2 {
		c := newCluster(t, 1)
		c.init(1)
		stream, err := c.nodes[1].Pipeline(c.ctx)
		if err != nil {
			t.Fatal(err)
		}
		open := &kvpb.Operation{Operation: &kvpb.Operation_OpenSession{OpenSession: &kvpb.OpenSessionRequest{}}}
		results, err := exchange(stream, slices.Repeat([]*kvpb.Operation{open}, 50)...)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			all = append(all, r.GetOpenSession().GetSession(), c.openSession(1))
		}
	}
	slices.Sort(all)
	for i, id := range all[1:] {
		if id-all[i] < near {
			t.Errorf("session %d is near %d", id, all[i])
		}
	}
	if len(all) != 201 || all[200] >= 1<<63 {
		t.Errorf("%d sessions, up to %d", len(all), all[len(all)-1])
	}
}

// TestRestoreByTheClock: a restored cluster's versions begin with the time, even if
// it was restored just before; a clock that would give out some again is refused,
// in words that say why and what to do, and nothing is made.
func TestRestoreByTheClock(t *testing.T) {
	now := time.Date(2026, 11, 28, 20, 0, 0, 0, time.UTC)
	const first = 1_795_896_000 << 20
	for _, tt := range []struct {
		name    string
		version uint64
		now     time.Time
		want    uint64
		said    []string
	}{
		{"an empty backup", 0, now, first, nil},
		{"one that was never restored", 1 << 50, now, first, nil},
		{"a microsecond later", first, now.Add(time.Microsecond), first + 1, nil},
		{"half a second later", first + 1<<19 - 1, now.Add(time.Second / 2), first + 1<<19, nil},
		{"just before another second", first, now.Add(time.Second - 1), first + 1<<20 - 1, nil},
		{"in 200 years", first, now.AddDate(200, 0, 0), 0, nil},

		{"a clock that stands", first, now, 0, []string{"says 2026-11-28 20:00:00 UTC", "reached by 2026-11-28 20:00:01 UTC", "set the clock", "beyond that time"}},
		{"a clock that was set back", first, now.AddDate(0, -1, 0), 0, []string{"says 2026-10-28 20:00:00 UTC", "reached by 2026-11-28 20:00:01 UTC"}},
		{"the highest version", maxCounter - 1, now, 0, []string{"is of version 1152921504606846975", "set the clock"}},
		{"a clock that was never set", 0, time.Unix(100, 0), 0, []string{"says 1970-01-01 00:01:40 UTC", "never set", "set the clock"}},
		{"a clock before all time", 0, time.Unix(-100, 0), 0, []string{"says 1969-12-31 23:58:20 UTC", "never set"}},
		{"a clock of another age", 0, now.AddDate(216, 2, 0), 0, []string{"says 2243-01-28", "set the clock"}},
	} {
		s := newStore()
		s.version = tt.version
		err := s.beginVersions(tt.now)
		if err == nil && tt.want == 0 {
			tt.want = versionAt(tt.now)
		}
		if (err != nil) != (tt.said != nil) || err == nil && (s.version != tt.want || s.version <= tt.version || s.version >= maxFirstVersion) {
			t.Errorf("%s: version %d, %v; want %d", tt.name, s.version, err, tt.want)
		}
		for _, part := range tt.said {
			if err != nil {
				wantPart(t, err.Error(), part)
			}
		}
	}

	// The command: it makes nothing.
	s, _ := backupOf(t, 3)
	s.version = versionAt(time.Now().Add(time.Hour))
	dir := t.TempDir()
	file, data := filepath.Join(dir, "backup"), filepath.Join(dir, "data")
	if err := os.WriteFile(file, backupBytes(t, s), 0o600); err != nil {
		t.Fatal(err)
	}
	_, errs := runCommand(t, exitNotDone, "", "restore", file, "--data-dir", data, "--id", "1", "--addr", "127.0.0.1:1")
	wantPart(t, errs, "raft-key-value: restore: this machine's clock says ")
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Error(names, err)
	}
}

// TestExactlyOnceUnderLoad sends each write several times, at once and through
// several nodes, while leaders change: the count of writes tells whether one
// took effect twice.
func TestExactlyOnceUnderLoad(t *testing.T) {
	t.Parallel()
	const clients, writes = 6, 60
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	var wg sync.WaitGroup
	var kvs []kvpb.KVServiceClient
	for id := range uint64(3) {
		kvs = append(kvs, c.nodes[id+1])
	}
	again := func(i int, f func(context.Context, kvpb.KVServiceClient) error) {
		for ; ; i++ {
			ctx, cancel := context.WithTimeout(c.ctx, time.Second)
			err := f(ctx, kvs[i%3])
			cancel()
			if code := status.Code(err); err == nil || t.Failed() {
				return
			} else if code != codes.Unavailable && code != codes.DeadlineExceeded {
				t.Errorf("%v", err)
			}
		}
	}
	opened := c.openSession(1)
	for i := range clients {
		wg.Go(func() {
			for q := range uint64(writes) {
				var twice sync.WaitGroup
				versions := make([]uint64, 2)
				for j := range versions {
					w := withID(opened, 1+q*clients+uint64(i), setWrite(fmt.Sprint("k", i), fmt.Sprint(q)))
					twice.Go(func() {
						again(i+j, func(ctx context.Context, kv kvpb.KVServiceClient) error {
							resp, err := kv.Set(ctx, w.GetSet())
							versions[j] = resp.GetVersion()
							return err
						})
					})
				}
				if twice.Wait(); versions[0] != versions[1] {
					t.Errorf("one write has versions %v", versions)
				}
			}
		})
	}
	for range 3 {
		c.transfer(1, 1+c.settled(1, 2, 3)%3)
	}
	wg.Wait()
	for id := range uint64(3) {
		if value, _ := c.read(id+1, "k0"); value != fmt.Sprint(writes-1) {
			t.Errorf("k0 at node %d is %q", id+1, value)
		}
	}
	if h, _ := c.dump(1); h.Version != clients*writes {
		t.Errorf("%d writes count as %d", clients*writes, h.Version)
	}
	c.sameStates(1, 2, 3)

	// Of many who create a key, one wins, and the others are told of it.
	var mu sync.Mutex
	won, told := map[uint64]int{}, map[uint64]int{}
	for i := range 30 {
		wg.Go(func() {
			resp, err := kvs[i%3].Set(c.ctx, setIf("new", fmt.Sprint(i), 0).GetSet())
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			} else if resp.CompareFailed {
				told[resp.Version]++
			} else {
				won[resp.Version]++
			}
		})
	}
	wg.Wait()
	_, version := c.read(1, "new")
	if won[version] != 1 || told[version] != 29 || len(won) != 1 || len(told) != 1 {
		t.Errorf("version %d: won %v, told %v", version, won, told)
	}
}

// read reads through a node.
func (c *testCluster) read(via uint64, key string) (value string, version uint64) {
	c.t.Helper()
	resp, err := c.nodes[via].Get(c.ctx, &kvpb.GetRequest{Key: key})
	if err != nil {
		c.t.Fatal(err)
	}
	return string(resp.Value), resp.Version
}
