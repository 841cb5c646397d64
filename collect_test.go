// Tests of when the collector is run. TestMemoryComesBack is in quota_linux_test.go.

package main

import (
	"testing"

	"raft-key-value/kvpb"
)

// TestGarbage: the collector is run once when much was dropped, and not while more is, nor if
// it has run by itself since.
func TestGarbage(t *testing.T) {
	const mib = 1 << 20
	type look struct {
		dropped, has, cycles uint64
		want                 bool
	}
	for name, looks := range map[string][]look{
		"nothing":           {{0, 0, 1, false}, {0, 0, 1, false}, {0, 0, 1, false}},
		"little":            {{0, 0, 1, false}, {15 * mib, 0, 1, false}, {15 * mib, 0, 1, false}, {15 * mib, 0, 1, false}, {15 * mib, 0, 1, false}},
		"once":              {{0, 0, 1, false}, {100 * mib, 0, 1, false}, {100 * mib, 0, 1, false}, {100 * mib, 0, 1, true}, {100 * mib, 0, 2, false}, {100 * mib, 0, 2, false}},
		"more and more":     {{0, 0, 1, false}, {100 * mib, 0, 1, false}, {200 * mib, 0, 1, false}, {300 * mib, 0, 1, false}, {310 * mib, 0, 1, false}, {310 * mib, 0, 1, true}},
		"less than a share": {{0, 0, 1, false}, {100 * mib, 801 * mib, 1, false}, {100 * mib, 801 * mib, 1, false}, {100 * mib, 801 * mib, 1, false}, {100 * mib, 801 * mib, 1, false}},
		"a share":           {{0, 0, 1, false}, {100 * mib, 800 * mib, 1, false}, {100 * mib, 800 * mib, 1, false}, {100 * mib, 800 * mib, 1, true}},
		"it has run":        {{0, 0, 1, false}, {100 * mib, 0, 1, false}, {100 * mib, 0, 2, false}, {100 * mib, 0, 2, false}, {100 * mib, 0, 2, false}},
		"it has run before": {{0, 0, 1, false}, {100 * mib, 0, 2, false}, {100 * mib, 0, 2, false}, {100 * mib, 0, 2, true}},
	} {
		var g garbage
		for i, l := range looks {
			if got := g.look(l.dropped, l.has, l.cycles); got != l.want {
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
