// Tests of when the collector is run. TestMemoryComesBack is in quota_linux_test.go.

package main

import (
	"fmt"
	"strings"
	"testing"

	"raft-key-value/kvpb"
)

// TestGarbage: the collector is started once much was dropped and that has ended, and again while
// what is free is not given back, but not for ever.
func TestGarbage(t *testing.T) {
	const mib = 1 << 20
	type look struct {
		dropped, has, free uint64 // MiB
		want               bool
	}
	steadily := []look{}
	for i := range uint64(60) {
		steadily = append(steadily, look{2 * i, 0, 50 * (i % 2), false})
	}
	for name, looks := range map[string][]look{
		"nothing":           {{0, 0, 90, false}, {0, 0, 90, false}, {0, 0, 90, false}},
		"little":            {{0, 0, 0, false}, {15, 0, 0, false}, {15, 0, 0, false}, {15, 0, 0, false}, {15, 0, 0, false}},
		"once":              {{0, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, true}, {100, 0, 16, false}, {100, 0, 90, false}},
		"again":             {{0, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, true}, {120, 0, 0, false}, {120, 0, 0, false}, {120, 0, 0, true}},
		"more and more":     {{0, 0, 0, false}, {100, 0, 0, false}, {200, 0, 0, false}, {300, 0, 0, false}, {302, 0, 0, false}, {302, 0, 0, true}},
		"all the time":      steadily,
		"less than a share": {{0, 0, 0, false}, {100, 801, 0, false}, {100, 801, 0, false}, {100, 801, 0, false}, {100, 801, 0, false}},
		"a share":           {{0, 0, 0, false}, {100, 800, 0, false}, {100, 800, 0, false}, {100, 800, 0, true}},
		"it comes back":     {{0, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, true}, {100, 0, 90, true}, {100, 0, 50, false}, {100, 0, 17, false}, {100, 0, 16, false}, {100, 0, 90, false}},
		"it stands still":   {{0, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, true}, {100, 0, 90, true}, {100, 0, 66, false}, {100, 0, 66, true}, {100, 0, 5, false}, {100, 0, 66, false}},
		"it never does":     {{0, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, false}, {100, 0, 0, true}, {100, 0, 90, true}, {100, 0, 90, true}, {100, 0, 90, true}, {100, 0, 90, true}, {100, 0, 90, false}},
		"as much is used":   {{0, 0, 0, false}, {100, 90, 0, false}, {100, 90, 0, false}, {100, 90, 0, true}, {100, 90, 90, false}, {100, 90, 91, false}},
	} {
		var g garbage
		for i, l := range looks {
			if got := g.look(l.dropped*mib, l.has*mib, l.free*mib); got != l.want {
				t.Errorf("%s, look %d: %v", name, i, got)
			}
		}
	}
}

// TestDroppedBytes: what is replaced, deleted, or gone with all of a state counts as dropped.
func TestDroppedBytes(t *testing.T) {
	s := newTestStore()
	sequence := uint64(0)
	want := func(dropped, has uint64, ws ...*kvpb.Write) {
		t.Helper()
		for _, w := range ws {
			sequence++
			tryBatch(t, s, 1, sequence, w)
		}
		if d, h := s.droppedBytes(); d != dropped || h != has {
			t.Errorf("%d bytes are dropped, %d are there; want %d, %d", d, h, dropped, has)
		}
	}
	want(0, 5, setWrite("k", "1234"))
	want(4, 3, setWrite("k", "12"))
	want(6, 0, deleteWrite("k"))
	want(6, 11, setWrite("k", "1234567890"))
	s.install(newTestStore())
	want(17, 0)
}

// TestClosedViewsCount: what a view may have kept counts once it has let go, whoever had it, and however
// it has ended.
func TestClosedViewsCount(t *testing.T) {
	const bytes = 500_000
	openers := map[string]func(*store) *view{
		"a Scan":     func(s *store) *view { v, _ := s.openKeys(); return v },
		"a List":     func(s *store) *view { v, _ := s.openPage(); return v },
		"a backup":   (*store).openBackup,
		"a snapshot": (*store).openView,
	}
	ends := map[string]func(*store, *view){
		"closed":       func(_ *store, v *view) { v.close() },
		"closed twice": func(_ *store, v *view) { v.close(); v.close() },
		"ended": func(s *store, v *view) {
			for len(s.clientViews) > 0 {
				s.endOldestView()
			}
			v.close()
		},
		"after a snapshot came": func(s *store, v *view) {
			s.install(newTestStore())
			v.close()
		},
	}
	for by, open := range openers {
		for how, end := range ends {
			s := newTestStore()
			tryBatch(t, s, 1, 1, setWrite("large", strings.Repeat("v", bytes)))
			for i := range uint64(1000) {
				tryBatch(t, s, 1, 2+i, setWrite(fmt.Sprintf("small%d", i), "value"))
			}
			earlier := open(s)
			for i := range uint64(1000) {
				tryBatch(t, s, 1, 2000+i, setWrite(fmt.Sprintf("small%d", i), "value"))
			}
			earlier.close()
			v := open(s)
			tryBatch(t, s, 1, 3000, setWrite("large", "v"))
			for i := range uint64(1000) { // their pages are copied
				tryBatch(t, s, 1, 3001+i, setWrite(fmt.Sprintf("small%d", i), "other"))
			}
			open, _ := s.droppedBytes()
			end(s, v)
			ended, _ := s.droppedBytes()
			counted := ended - open
			most := uint64(bytes + 100_000)
			if how == "after a snapshot came" {
				most += 20_000 // what the store had counts as dropped
			}
			if counted < bytes+20_000 || counted > most {
				t.Errorf("%s that is %s: %d bytes are counted", by, how, counted)
			}
			v = openers[by](s)
			v.close()
			if again, _ := s.droppedBytes(); again != ended {
				t.Errorf("%s that has kept nothing: %d bytes are counted", by, again-ended)
			}
		}
	}
}
