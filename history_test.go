package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"raft-key-value/kvpb"
)

// toldEvent is an event as a test compares it.
type toldEvent struct {
	key, value string
	version    uint64
	deleted    bool
}

func toldOf(events []keyEvent) (told []toldEvent) {
	for _, e := range events {
		told = append(told, toldEvent{string(e.key), string(e.value), e.version, e.deleted})
	}
	return told
}

// eventModel applies writes as a store does, and remembers all events.
type eventModel struct {
	keys    map[string]bool
	version uint64
	events  []toldEvent
}

func (m *eventModel) apply(w *kvpb.Write) {
	switch op := w.Operation.(type) {
	case *kvpb.Write_Set:
		if op.Set.ExpectedVersion != nil {
			return // it fails: see randomWrite
		}
		m.version++
		m.keys[op.Set.Key] = true
		m.events = append(m.events, toldEvent{op.Set.Key, string(op.Set.Value), m.version, false})
	case *kvpb.Write_Delete:
		m.version++
		if m.keys[op.Delete.Key] {
			m.events = append(m.events, toldEvent{op.Delete.Key, "", m.version, true})
		}
		delete(m.keys, op.Delete.Key)
	case *kvpb.Write_DeleteRange:
		m.version++
		var gone []string
		for k := range m.keys {
			if strings.HasPrefix(k, op.DeleteRange.Prefix) {
				gone = append(gone, k)
			}
		}
		slices.Sort(gone)
		for _, k := range gone {
			m.events = append(m.events, toldEvent{k, "", m.version, true})
			delete(m.keys, k)
		}
	}
}

// told returns the events of a range, between two versions.
func (m *eventModel) told(r keyRange, from, to uint64) (told []toldEvent) {
	for _, e := range m.events {
		if e.version >= from && e.version <= to && r.has([]byte(e.key)) {
			told = append(told, e)
		}
	}
	return told
}

func randomWrite(r *rand.Rand) *kvpb.Write {
	key := fmt.Sprintf("%c%d", "abc"[r.IntN(3)], r.IntN(20))
	switch r.IntN(12) {
	case 0:
		return setIf(key, "never", 1<<50)
	case 1, 2, 3:
		return deleteWrite(key)
	case 4:
		return deleteRangeWrite(key[:1+r.IntN(2)], "", "")
	case 5:
		return setWrite(key, "")
	}
	return setWrite(key, strings.Repeat(key, r.IntN(40)))
}

// TestHistory compares what a history tells with all events that there were, for ranges, from
// any version on, in pieces of any size.
func TestHistory(t *testing.T) {
	compactions := 0
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 3))
		s := newTestStore()
		s.history.limit = []uint64{1 << 10, 8 << 10, 1 << 20}[seed%3]
		s.history.reset(s.clusterID, 0)
		m := &eventModel{keys: map[string]bool{}}
		ranges := []keyRange{{}, prefixRange([]byte("a")), {[]byte("a5"), []byte("b7")}, {[]byte("b1"), []byte("b1\x00")}}
		begun := uint64(1) // the first version that the history can have
		for batch := range uint64(60) {
			var ws []*kvpb.Write
			for range 1 + r.IntN(6) {
				ws = append(ws, randomWrite(r))
				m.apply(ws[len(ws)-1])
			}
			applyBatch(t, s, 1, batch+1, ws...)
			if r.IntN(30) == 0 {
				s.install(restored(t, s))
				begun = m.version + 1
			}
			v := s.history.view()
			if v.version != m.version || v.clusterID != s.clusterID {
				t.Fatalf("seed %d: it is of version %d, want %d", seed, v.version, m.version)
			}
			keys := ranges[r.IntN(len(ranges))]
			start := 1 + r.Uint64N(m.version+2)
			from := start
			var told []toldEvent
			for {
				events, next, err := v.read(from, keys, r.IntN(200))
				if old, ok := errors.AsType[*compactedError](err); ok {
					isLate := from != start || from >= old.oldest || old.oldest > m.version+1 || old.oldest < begun
					if isLate {
						t.Fatalf("seed %d: from %d: %v, at %d", seed, from, err, m.version)
					}
					if begun == 1 && s.history.bytes < s.history.limit/4 {
						t.Fatalf("seed %d: %v, with %d bytes", seed, err, s.history.bytes)
					}
					compactions++
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				told = append(told, toldOf(events)...)
				if want := m.told(keys, start, next-1); !slices.Equal(told, want) {
					t.Fatalf("seed %d: from %d to %d: %v, want %v", seed, start, next, told, want)
				}
				if next == from {
					break
				}
				from = next
			}
			if start >= v.oldest && from != max(start, m.version+1) {
				t.Fatalf("seed %d: it ends at %d, want %d", seed, from, m.version+1)
			}
			if s.history.bytes > s.history.limit {
				t.Fatalf("seed %d: it has %d bytes", seed, s.history.bytes)
			}
		}
	}
	if compactions < 100 {
		t.Errorf("%d reads were too old", compactions)
	}
}

// TestHistoryCounts: an entry counts in full, however little of it has an effect.
func TestHistoryCounts(t *testing.T) {
	s := newTestStore()
	ws := []*kvpb.Write{setWrite("k", "v")}
	for range 100 {
		ws = append(ws, setIf("k", strings.Repeat("x", 1000), 1<<50))
	}
	applyBatch(t, s, 1, 1, ws...)
	if n := s.history.bytes; n < 100*1000 || n > 120*1000 {
		t.Errorf("it counts %d bytes", n)
	}
	before := s.history.bytes
	applyBatch(t, s, 1, 2, deleteWrite("none"), setIf("k", strings.Repeat("x", 1000), 1<<50))
	if s.history.bytes != before || s.history.version != 2 {
		t.Errorf("what has no effect counts %d bytes", s.history.bytes-before)
	}
	// What is dropped is let go of, soon.
	s.history.limit = 4 << 10
	for i := range uint64(200) {
		applyBatch(t, s, 1, 3+i, setWrite("k", "v"))
	}
	if n := len(s.history.chunks); s.history.dropped > n/8 || n > 40 {
		t.Errorf("%d chunks, %d dropped ones", n, s.history.dropped)
	}
}

// openCursor adds a watch from a version on.
func openCursor(t *testing.T, ws *watchers, f watchFilter, from uint64) *cursor {
	t.Helper()
	w, err := ws.add(f, principal{})
	if err != nil {
		t.Fatal(err)
	}
	v := ws.history.view()
	return ws.cursor(w, &v, from)
}

// TestCursor has watches of all kinds told of random writes, at any moment between passes.
func TestCursor(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 4))
		s := newTestStore()
		s.history.reset(s.clusterID, 0)
		ws := newWatchers(s.history)
		m := &eventModel{keys: map[string]bool{}}
		type watch struct {
			c     *cursor
			from  uint64
			told  []toldEvent
			keys  keyRange
			reads int
		}
		var all []*watch
		requests := []*kvpb.WatchRequest{{Key: "a1"}, {Prefix: "b"}, {Prefix: "c1"}, {}, {Start: "a5", End: "b3"}, {Start: "c"}}
		read := func(w *watch) {
			t.Helper()
			events, err := w.c.read(r.IntN(100))
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			w.reads++
			w.told = append(w.told, toldOf(events)...)
			if want := m.told(w.keys, w.from, w.c.told()); !slices.Equal(w.told, want) {
				t.Fatalf("seed %d: from %d to %d: %v, want %v", seed, w.from, w.c.told(), w.told, want)
			}
		}
		for batch := range uint64(80) {
			if r.IntN(4) == 0 {
				f, err := filterOf(requests[r.IntN(len(requests))])
				if err != nil {
					t.Fatal(err)
				}
				from := 1 + r.Uint64N(m.version+2)
				c := openCursor(t, ws, f, from)
				all = append(all, &watch{c: c, from: from, keys: f.keys})
			}
			var writes []*kvpb.Write
			for range r.IntN(4) {
				writes = append(writes, randomWrite(r))
				m.apply(writes[len(writes)-1])
			}
			applyBatch(t, s, 1, batch+1, writes...)
			if r.IntN(3) == 0 {
				v := s.history.view()
				ws.pass(&v)
			}
			for _, w := range all {
				if r.IntN(3) == 0 {
					read(w)
				}
			}
		}
		v := s.history.view()
		ws.pass(&v)
		for _, w := range all {
			rung := true
			for rung || w.c.isBehind {
				select {
				case <-w.c.w.wake:
				default:
					rung = false
				}
				read(w)
			}
			if want := max(w.from-1, m.version); w.c.told() != want {
				t.Fatalf("seed %d: told up to %d, want %d", seed, w.c.told(), want)
			}
			ws.remove(w.c.w)
		}
		counted := ws.total.count + ws.total.bytes + ws.total.ranges + len(ws.total.prefixes)
		if counted+len(ws.keys)+len(ws.prefixes)+len(ws.ranges)+len(ws.of) != 0 {
			t.Fatalf("seed %d: %+v is left, %v", seed, ws.total, ws.of)
		}
	}
}

// TestCursorOfReplacedHistory: a watch ends when events may be missing, or the cluster is
// another one.
func TestCursorOfReplacedHistory(t *testing.T) {
	s := newTestStore()
	ws := newWatchers(s.history)
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() { ws.run(stop); close(ended) }()
	defer func() { close(stop); <-ended }()
	s.history.reset(s.clusterID, 0)
	applyBatch(t, s, 1, 1, setWrite("k", "v"))
	open := func(from uint64) *cursor {
		t.Helper()
		f, _ := filterOf(&kvpb.WatchRequest{Key: "k"})
		return openCursor(t, ws, f, from)
	}
	ends := func(c *cursor, want error) {
		t.Helper()
		eventually(t, func() error {
			_, err := c.read(1)
			if old, ok := errors.AsType[*compactedError](err); ok {
				err = *new(error)
				if want == nil && old.oldest == s.version+1 {
					return nil
				}
			}
			if err == nil || err != want {
				return fmt.Errorf("it reads on: %v", err)
			}
			return nil
		})
		ws.remove(c.w)
	}
	idle := open(2)
	behind := open(1)
	for idle.told() != 1 {
		if _, err := idle.read(1); err != nil {
			t.Fatal(err)
		}
	}
	later := restored(t, s)
	later.version = 10
	s.install(later)
	ends(idle, nil)
	ends(behind, nil)
	c := open(11)
	if _, err := c.read(1); err != nil { // it is idle: what comes has to wake it
		t.Fatal(err)
	}
	s.install(newStore())
	ends(c, errHistoryReplaced)
}

// TestCursorOfAnotherHistory: what was seen of a history that was longer is nothing of this one.
func TestCursorOfAnotherHistory(t *testing.T) {
	s := newTestStore()
	s.history.reset(s.clusterID, 1000)
	ws := newWatchers(s.history)
	ws.passNew()
	other := newTestStore()
	other.clusterID = s.clusterID + 1
	other.version = 5
	s.install(other) // and no pass has gone over that yet
	f, _ := filterOf(&kvpb.WatchRequest{Key: "k"})
	c := openCursor(t, ws, f, 6)
	for range 3 {
		if _, err := c.read(1 << 10); err != nil || c.told() != 5 {
			t.Fatalf("told up to %d, %v; the version is 5", c.told(), err)
		}
	}
	applyBatch(t, s, 1, 1, setWrite("k", "v"))
	ws.passNew()
	ws.passNew()
	events, err := c.read(1 << 10)
	if err != nil || len(events) != 1 || c.told() != 6 {
		t.Errorf("%d events, told up to %d, %v", len(events), c.told(), err)
	}
}

// TestWatchersAreMarkedOnce: a pass looks at the watchers of a key or a prefix once, whatever
// number of events concern them.
func TestWatchersAreMarkedOnce(t *testing.T) {
	s := newTestStore()
	s.history.reset(s.clusterID, 0)
	ws := newWatchers(s.history)
	ws.passNew()
	var all []*watcher
	for _, req := range []*kvpb.WatchRequest{{Key: "k1"}, {Prefix: "k"}, {Start: "a", End: "z"}} {
		f, _ := filterOf(req)
		w, err := ws.add(f, principal{})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, w)
		w.mark.Store(0)
	}
	applyBatch(t, s, 1, 1, setWrite("k1", "v"), setWrite("k1", "w"), setWrite("k2", "v"))
	v := s.history.view()
	ws.passes++
	events, _, err := v.read(1, keyRange{}, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	ws.markAll(events[:1])
	for _, w := range all {
		if w.mark.Swap(0) != 1 {
			t.Errorf("%+v is not marked", w.filter)
		}
	}
	ws.markAll(events[1:])
	for _, w := range all {
		if w.mark.Load() != 0 {
			t.Errorf("%+v is marked a second time", w.filter)
		}
	}
}

// TestWatchersAreBounded: of a node, of a principal, and of ranges.
func TestWatchersAreBounded(t *testing.T) {
	ws := newWatchers(newEventHistory(1 << 20))
	key, _ := filterOf(&kvpb.WatchRequest{Key: "k"})
	ranged, _ := filterOf(&kvpb.WatchRequest{Start: "a", End: "b"})
	fill := func(f watchFilter, p principal, want int) (added []*watcher) {
		t.Helper()
		for {
			w, err := ws.add(f, p)
			if err != nil {
				if len(added) != want || reasonOf(err) != "OVERLOADED" {
					t.Errorf("%v has %d watches, want %d: %v", p, len(added), want, err)
				}
				return added
			}
			added = append(added, w)
		}
	}
	a := principal{role: roleClient, name: "a"}
	b := principal{role: roleReader, name: "b"}
	some := fill(ranged, a, maxWatchedRanges/2)
	fill(ranged, principal{}, maxWatchedRanges/2)
	fill(key, a, maxWatchers/2-maxWatchedRanges/2)
	fill(key, b, maxWatchers/2-maxWatchedRanges/2)
	fill(key, principal{}, 0)
	for _, w := range some {
		ws.remove(w)
	}
	fill(ranged, a, maxWatchedRanges/2)
	fill(key, principal{}, 0)

	// Without TLS all are of one.
	ws = newWatchers(newEventHistory(1 << 20))
	fill(ranged, principal{}, maxWatchedRanges)
	fill(key, principal{}, maxWatchers-maxWatchedRanges)

	// What they name, and the lengths of prefixes.
	ws = newWatchers(newEventHistory(1 << 20))
	long, _ := filterOf(&kvpb.WatchRequest{Key: strings.Repeat("k", maxKeyBytes)})
	fill(long, a, maxWatchedBytes/2/long.bytes())
	fill(long, b, maxWatchedBytes/2/long.bytes())
	ws = newWatchers(newEventHistory(1 << 20))
	addLengths := func(from, many int, p principal) (added []*watcher) {
		t.Helper()
		for n := range many {
			f, _ := filterOf(&kvpb.WatchRequest{Prefix: strings.Repeat("p", from+n)})
			w, err := ws.add(f, p)
			if err != nil {
				t.Fatal(err)
			}
			added = append(added, w)
		}
		return added
	}
	const half = maxPrefixLengths / 2
	ofLength := func(n int) watchFilter {
		f, _ := filterOf(&kvpb.WatchRequest{Prefix: strings.Repeat("q", n)})
		return f
	}
	of := addLengths(0, half, a)
	fill(ofLength(half), a, 0)
	if _, err := ws.add(ofLength(1), a); err != nil {
		t.Error(err) // of a length that it has
	}
	addLengths(half, half, b)
	fill(ofLength(2*half), principal{}, 0)
	if _, err := ws.add(ofLength(half), principal{}); err != nil {
		t.Error(err) // of a length that another has
	}
	ws.remove(of[half-1])
	addLengths(2*half, 1, principal{})
	fill(ofLength(2*half+1), principal{}, 0)
}
