package main

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"weak"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

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
