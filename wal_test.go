// Tests of wal.go and frame.go, over a simulated file system, which disk_test.go and the
// simulator use, too.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// simFS is a file system in memory that knows what would survive a power loss:
// of a file, the sectors that were synced; of the directory, what syncDir made
// durable; of everything else, any part, but of each sector all or nothing. One
// goroutine at a time uses it.
type simFS struct {
	names   map[string]*simFile
	durable map[string]*simFile
	pending []map[string]*simFile // changes of names, each atomic, since syncDir; nil: removed

	space uint64 // bytes that files may have; 0: as many as they want

	calls   []string // all that were made
	failAt  int      // the call that fails, from 1 on; 0: none
	fault   simFault
	crashed bool // every call fails
}

// simFile is what a process sees of a file, what the disk has, and which
// sectors the next sync will write.
type simFile struct {
	cache, disk []byte
	dirty       map[int]bool
}

// simFault is how a call fails.
type simFault int

const (
	faultEIO    simFault = iota // does nothing; a sync forgets what it had to write
	faultENOSPC                 // writes half, in whole sectors
	faultLate                   // does all and says that it failed
	faultCrash                  // does all, and the process ends
	numFaults
)

var errCrashed = errors.New("the process has ended")

func newSimFS() *simFS {
	return &simFS{names: map[string]*simFile{}, durable: map[string]*simFile{}}
}

// call counts a call. Do says whether it has an effect.
func (s *simFS) call(name string) (do bool, err error) {
	if s.crashed {
		return false, errCrashed
	}
	s.calls = append(s.calls, name)
	if len(s.calls) != s.failAt {
		return true, nil
	}
	switch s.fault {
	case faultCrash:
		s.crashed = true
		return true, errCrashed
	case faultLate:
		return true, syscall.EIO
	case faultENOSPC:
		return false, syscall.ENOSPC
	}
	return false, syscall.EIO
}

// change changes names. Nil removes one.
func (s *simFS) change(names map[string]*simFile) {
	s.pending = append(s.pending, names)
	changeNames(s.names, names)
}

func changeNames(to, names map[string]*simFile) {
	for name, f := range names {
		if to[name] = f; f == nil {
			delete(to, name)
		}
	}
}

func (s *simFS) create(path string) (file, error) {
	do, err := s.call("create " + path)
	f := &simFile{dirty: map[int]bool{}} // another file: that truncating is durable only once synced is the harder case
	if do {
		s.change(map[string]*simFile{path: f})
	}
	return simHandle{s, f}, err
}

func (s *simFS) open(path string) (file, error) {
	_, err := s.call("open " + path)
	if s.names[path] == nil {
		err = cmp.Or(err, os.ErrNotExist)
	}
	return simHandle{s, s.names[path]}, err
}

func (s *simFS) readFile(path string) ([]byte, error) {
	_, err := s.call("read " + path)
	if s.names[path] == nil {
		return nil, cmp.Or(err, os.ErrNotExist)
	}
	return slices.Clone(s.names[path].cache), err
}

func (s *simFS) rename(from, to string) error {
	do, err := s.call("rename " + from)
	if s.names[from] == nil {
		return cmp.Or(err, os.ErrNotExist)
	}
	if do {
		s.change(map[string]*simFile{to: s.names[from], from: nil})
	}
	return err
}

func (s *simFS) remove(path string) error {
	do, err := s.call("remove " + path)
	if s.names[path] == nil {
		return cmp.Or(err, os.ErrNotExist)
	}
	if do {
		s.change(map[string]*simFile{path: nil})
	}
	return err
}

func (s *simFS) readDir(dir string) (names []string, err error) {
	_, err = s.call("readDir " + dir)
	for _, path := range slices.Sorted(maps.Keys(s.names)) {
		if filepath.Dir(path) == dir {
			names = append(names, filepath.Base(path))
		}
	}
	return names, err
}

func (s *simFS) syncDir(dir string) error {
	do, err := s.call("syncDir " + dir)
	if do {
		s.durable, s.pending = maps.Clone(s.names), nil
	}
	return err
}

// used is how many bytes all files have that have a name.
func (s *simFS) used() (used uint64) {
	for _, f := range s.names {
		used += uint64(len(f.cache))
	}
	return used
}

// free implements fileSystem. It is no call that fails.
func (s *simFS) free(string) (uint64, error) {
	if s.space == 0 {
		return math.MaxInt64, nil
	}
	return less(s.space, s.used()), nil
}

type simHandle struct {
	fs *simFS
	f  *simFile
}

func (h simHandle) Close() error { return nil }

func (h simHandle) ReadAt(b []byte, offset int64) (int, error) {
	if _, err := h.fs.call("read"); err != nil {
		return 0, err
	}
	return bytes.NewReader(h.f.cache).ReadAt(b, offset)
}

// lock implements fileSystem.
func (s *simFS) lock(string) (io.Closer, error) {
	_, err := s.call("open LOCK")
	return io.NopCloser(nil), err
}

func (h simHandle) WriteAt(b []byte, offset int64) (int, error) {
	do, err := h.fs.call(fmt.Sprintf("write %d+%d", offset, len(b)))
	if !do {
		if h.fs.fault != faultENOSPC || errors.Is(err, errCrashed) {
			return 0, err
		}
		half := int(offset) + len(b)/2
		b = b[:max(0, half/sectorBytes*sectorBytes-int(offset))] // a file system has space in blocks
	}
	end := int(offset) + len(b)
	if more := end - len(h.f.cache); h.fs.space != 0 && more > 0 && h.fs.used()+uint64(more) > h.fs.space {
		return 0, syscall.ENOSPC
	}
	if grow := end - len(h.f.cache); grow > 0 {
		h.f.cache = append(h.f.cache, make([]byte, grow)...)
	}
	copy(h.f.cache[offset:], b)
	for i := int(offset) / sectorBytes; i*sectorBytes < end; i++ {
		h.f.dirty[i] = true
	}
	return len(b), err
}

func (h simHandle) sync() error {
	do, err := h.fs.call("sync")
	switch {
	case do:
		h.f.keep(func(int) bool { return true })
	case !errors.Is(err, errCrashed):
		clear(h.f.dirty) // as Linux does
	}
	return err
}

// keep writes some of the dirty sectors to the disk.
func (f *simFile) keep(which func(sector int) bool) {
	for _, i := range slices.Sorted(maps.Keys(f.dirty)) {
		if !which(i) {
			continue
		}
		from, to := i*sectorBytes, min((i+1)*sectorBytes, len(f.cache))
		if to > len(f.disk) {
			f.disk = append(f.disk, make([]byte, to-len(f.disk))...)
		}
		copy(f.disk[from:to], f.cache[from:to])
	}
	clear(f.dirty)
}

// lose is a power loss. Of what was not synced nothing is left if r is nil,
// else any part. It ends the process and heals what failed.
func (s *simFS) lose(r *rand.Rand) *simFS {
	some := func(int) bool { return r != nil && r.IntN(2) == 0 }
	for _, names := range s.pending {
		if some(0) {
			changeNames(s.durable, names)
		}
	}
	n := newSimFS()
	n.space = s.space
	n.names, n.durable = s.durable, maps.Clone(s.durable)
	for _, path := range slices.Sorted(maps.Keys(n.names)) {
		f := n.names[path]
		f.keep(some)
		f.cache = slices.Clone(f.disk)
	}
	return n
}

// restart ends the process alone. With evict, the page cache forgets what it
// may: clean pages.
func (s *simFS) restart(evict bool) *simFS {
	n := newSimFS()
	n.space = s.space
	n.names, n.durable, n.pending = s.names, s.durable, s.pending
	for _, f := range n.names {
		for i := range len(f.disk) / sectorBytes {
			if evict && !f.dirty[i] {
				copy(f.cache[i*sectorBytes:(i+1)*sectorBytes], f.disk[i*sectorBytes:])
			}
		}
	}
	return n
}

// clone copies what the process sees, as if all of it were durable.
func (s *simFS) clone() *simFS {
	n := newSimFS()
	n.space = s.space
	for path, f := range s.names {
		n.names[path] = &simFile{slices.Clone(f.cache), slices.Clone(f.cache), map[int]bool{}}
	}
	n.durable = maps.Clone(n.names)
	return n
}

// mutates reports whether any call changed something.
func (s *simFS) mutates() bool {
	return slices.ContainsFunc(s.calls, func(c string) bool {
		return !strings.HasPrefix(c, "read") && !strings.HasPrefix(c, "open")
	})
}

const (
	simSegment = 4096
	simDir     = "d"
)

func simPath(segment int) string { return fmt.Sprintf("d/%016x.wal", segment) }

func openSim(fs *simFS) (*wal, *kvpb.LogBatch, error) {
	return openWAL(fs, simDir, walOptions{segmentBytes: simSegment, logger: quiet(), background: func(f func()) { f() }})
}

// walModel is what a log must hold after some batches.
type walModel struct {
	hard    *kvpb.HardState
	mark    *kvpb.SnapshotMark
	entries map[uint64]*kvpb.Entry
}

func (m *walModel) then(b *kvpb.LogBatch) *walModel {
	n := &walModel{cmp.Or(b.HardState, m.hard), cmp.Or(b.Snapshot, m.mark), maps.Clone(m.entries)}
	if b.Discards || n.entries == nil {
		n.entries = map[uint64]*kvpb.Entry{}
	}
	for _, e := range b.Entries {
		maps.DeleteFunc(n.entries, func(i uint64, _ *kvpb.Entry) bool { return i >= e.Index })
		n.entries[e.Index] = e
	}
	maps.DeleteFunc(n.entries, func(i uint64, _ *kvpb.Entry) bool { return i <= n.mark.GetIndex() })
	return n
}

func (m *walModel) last() uint64 {
	last := m.mark.GetIndex()
	for i := range m.entries {
		last = max(last, i)
	}
	return last
}

// differs says how a log differs from the model.
func (m *walModel) differs(s *kvpb.LogBatch) string {
	hard := m.hard
	if hard != nil && hard.Commit < m.mark.GetIndex() {
		hard = &kvpb.HardState{Term: hard.Term, Vote: hard.Vote, Commit: m.mark.Index}
	}
	if !proto.Equal(s.GetHardState(), hard) && (hard != nil || s.GetHardState() != nil) {
		return fmt.Sprintf("the hard state is %v, not %v", s.GetHardState(), hard)
	}
	if !proto.Equal(s.GetSnapshot(), m.mark) && (m.mark != nil || s.GetSnapshot() != nil) {
		return fmt.Sprintf("the mark is %v, not %v", s.GetSnapshot(), m.mark)
	}
	if len(s.GetEntries()) != len(m.entries) {
		return fmt.Sprintf("%d entries, not %d", len(s.GetEntries()), len(m.entries))
	}
	for i, e := range s.GetEntries() {
		if want := m.mark.GetIndex() + 1 + uint64(i); e.Index != want || !proto.Equal(e, m.entries[want]) {
			return fmt.Sprintf("entry %d (index %d) is not entry %d", i, e.Index, want)
		}
	}
	return ""
}

// walStep is a batch to append, or an index to release up to, or neither:
// close and open.
type walStep struct {
	batch   *kvpb.LogBatch
	release uint64
}

// walScript makes steps, and the models after each.
func walScript(r *rand.Rand, steps int) ([]walStep, []*walModel) {
	script, models, m := []walStep{}, []*walModel{{}}, &walModel{}
	term := uint64(1)
	data := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	for len(script) < steps {
		s, b := walStep{}, &kvpb.LogBatch{}
		from, last := m.mark.GetIndex()+1, m.last()
		add := func(first uint64, n, size int) {
			for i := range n {
				b.Entries = append(b.Entries, &kvpb.Entry{Index: first + uint64(i), Term: term, Data: data(r.IntN(size))})
			}
		}
		switch k := r.IntN(20); {
		case k < 8:
			add(last+1, 1+r.IntN(3), 700)
		case k < 10: // another leader's
			term++
			add(from+r.Uint64N(last+2-from), 1+r.IntN(3), 300)
		case k < 11: // larger than a segment
			add(last+1, 1, 6000)
		case k < 13:
			term++
			b.HardState = &kvpb.HardState{Term: term, Vote: r.Uint64N(5), Commit: last}
		case k < 15 && last >= from: // a snapshot of its own
			b.Snapshot = &kvpb.SnapshotMark{Index: from + r.Uint64N(last+1-from), Term: term, File: "own"}
		case k < 16: // a leader's; it may end before this log
			b.Snapshot = &kvpb.SnapshotMark{Index: from + r.Uint64N(8), Term: term, File: "received"}
			b.HardState = &kvpb.HardState{Term: term, Commit: b.Snapshot.Index}
			b.Discards = true
			add(b.Snapshot.Index+1, r.IntN(2), 50)
		case k < 19:
			s.release, b = max(1, from-1-min(from-1, r.Uint64N(3))), nil
		default:
			b = nil
		}
		if s.batch = b; b != nil {
			m = m.then(b)
		}
		script, models = append(script, s), append(models, m)
	}
	return script, models
}

// walRun runs steps until one fails, and says how many did not. What a reopened
// log holds is checked.
func walRun(fs *simFS, script []walStep, models []*walModel) (done int, err error) {
	w, s, err := openSim(fs)
	if err != nil {
		return 0, err
	}
	if s != nil {
		return 0, errors.New("a new log holds something")
	}
	defer func() { w.close() }()
	for i, step := range script {
		switch {
		case step.batch != nil:
			err = w.append(step.batch)
		case step.release > 0:
			err = w.truncateFront(step.release)
		default:
			w.close()
			n, s, openErr := openSim(fs)
			if err = openErr; err != nil {
				return i, err
			}
			w = n
			if d := models[i].differs(s); d != "" {
				return i, fmt.Errorf("%w: step %d: %s", errModel, i, d)
			}
		}
		if err != nil {
			calls := len(fs.calls)
			if again := w.append(&kvpb.LogBatch{}); again != err || w.truncateFront(1<<60) != err || len(fs.calls) != calls {
				return i, fmt.Errorf("%w: after %v the log goes on with %v: %q", errModel, err, again, fs.calls[calls:])
			}
			return i, err
		}
	}
	return len(script), nil
}

var errModel = errors.New("not as the model says")

// walVerify opens what a crash has left, after done steps. The step after them
// counts whole or not at all. What the log then shows must not go any more.
func walVerify(fs *simFS, script []walStep, models []*walModel, done int) error {
	w, s, err := openSim(fs)
	if err != nil {
		return err
	}
	m := models[done]
	if d := m.differs(s); d != "" {
		if done == len(script) || script[done].batch == nil {
			return errors.New(d)
		}
		if m = models[done+1]; m.differs(s) != "" {
			return fmt.Errorf("neither the old nor the new state: %s; %s", d, m.differs(s))
		}
	}
	b := &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: m.last() + 1, Term: 99, Data: []byte("more")}}}
	w.close()
	fs = fs.lose(nil)
	if w, s, err = openSim(fs); err != nil {
		return fmt.Errorf("a second time: %w", err)
	}
	if d := m.differs(s); d != "" {
		return fmt.Errorf("shown and lost: %s", d)
	}
	if err := w.append(b); err != nil {
		return err
	}
	w.close()
	if w, s, err = openSim(fs.lose(nil)); err != nil {
		return fmt.Errorf("a third time: %w", err)
	}
	defer w.close()
	if d := m.then(b).differs(s); d != "" {
		return fmt.Errorf("acknowledged after the crash and lost: %s", d)
	}
	return nil
}

// TestWALModel: without faults, a log holds what was appended.
func TestWALModel(t *testing.T) {
	rolled, released := 0, 0
	for seed := range uint64(10) {
		script, models := walScript(seededRand(seed), 80)
		fs := newSimFS()
		if done, err := walRun(fs, script, models); err != nil {
			t.Fatalf("seed %d, step %d: %v", seed, done, err)
		}
		for _, c := range fs.calls {
			if strings.HasPrefix(c, "rename") {
				rolled++
			}
			if strings.HasPrefix(c, "remove") {
				released++
			}
		}
		if err := walVerify(fs.lose(nil), script, models, len(script)); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	if rolled < 100 || released < 60 {
		t.Fatalf("%d segments were begun, %d removed: too few to mean much", rolled, released)
	}
}

// TestWALFaults: each call fails in each way, and the process, then the
// machine, come back in each way.
func TestWALFaults(t *testing.T) {
	const seed, steps = 4, 40
	script, models := walScript(seededRand(seed), steps)
	fs := newSimFS()
	if _, err := walRun(fs, script, models); err != nil {
		t.Fatal(err)
	}
	calls := fs.calls
	failed, survived := 0, 0
	for at := 1; at <= len(calls); at += raceStep(7) {
		for fault := range numFaults {
			if fault == faultENOSPC && !strings.HasPrefix(calls[at-1], "write") {
				continue
			}
			for _, back := range []string{[]string{"restart", "evict"}[(at+int(fault))%2], "lose", "some"} {
				fs := newSimFS()
				fs.failAt, fs.fault = at, fault
				done, err := walRun(fs, script, models)
				if errors.Is(err, errModel) {
					t.Fatal(err)
				}
				if len(fs.calls) < at {
					t.Fatalf("call %d was not made", at)
				}
				if failed++; err == nil {
					survived++ // the next segment was made in a second attempt
				}
				r := seededRand(uint64(at) + uint64(fault)<<32)
				switch back {
				case "restart", "evict":
					fs = fs.restart(back == "evict")
				case "lose":
					fs = fs.lose(nil)
				case "some":
					fs = fs.lose(r)
				}
				if err := walVerify(fs, script, models, done); err != nil {
					t.Fatalf("call %d of %d (%s), fault %d, %s, after %d steps (%v): %v", at, len(calls), calls[at-1], fault, back, done, script[done:min(done+1, steps)], err)
				}
			}
		}
	}
	kinds := map[string]int{}
	for _, c := range calls {
		kinds[strings.Fields(c)[0]]++
	}
	t.Logf("%d runs, %d went on; calls: %v", failed, survived, kinds)
	for _, kind := range []string{"create", "open", "read", "readDir", "write", "sync", "rename", "remove", "syncDir"} {
		if kinds[kind] < 2 {
			t.Fatalf("hardly a call of %s", kind)
		}
	}
}

// recordedLog is a log of several segments, the model after each batch, and
// where each batch is.
type recordedLog struct {
	fs      *simFS
	models  []*walModel // models[i]: after i batches
	places  []recordedBatch
	newest  int
	content []byte // of the newest segment
}

type recordedBatch struct{ segment, from, to int }

// recordLog appends entries of some 300 to 800 bytes until a segment's worth is
// in the last of the segments.
func recordLog(t testing.TB, segments int) *recordedLog {
	t.Helper()
	l := &recordedLog{fs: newSimFS()}
	w, _, err := openSim(l.fs)
	if err != nil {
		t.Fatal(err)
	}
	m := &walModel{}
	l.models, l.places = append(l.models, m), []recordedBatch{{1, 0, w.offset}}
	l.models = append(l.models, m)
	r := seededRand(8)
	for i := uint64(1); ; i++ {
		data := make([]byte, 300+r.IntN(500))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		b := &kvpb.LogBatch{HardState: &kvpb.HardState{Term: 1, Commit: i}, Entries: []*kvpb.Entry{{Index: i, Term: 1, Data: data}}}
		if l.newest == segments && w.offset+3*sectorBytes > simSegment { // it may not fit
			break
		}
		if err := w.append(b); err != nil {
			t.Fatal(err)
		}
		m = m.then(b)
		place := recordedBatch{int(w.at.segment), 0, w.offset}
		if last := l.places[len(l.places)-1]; last.segment == place.segment {
			place.from = last.to
		}
		l.models, l.places, l.newest = append(l.models, m), append(l.places, place), place.segment
	}
	w.close()
	l.content = l.fs.names[simPath(l.newest)].cache
	return l
}

// refuses checks that a log is refused, with a file and an offset and an advice,
// and that nothing was changed.
func refuses(t *testing.T, fs *simFS, file string, offset int, why string) {
	t.Helper()
	fs.calls = nil
	w, _, err := openSim(fs)
	if err == nil {
		w.close()
		t.Fatalf("opened, despite damage in %s at %d", file, offset)
	}
	for _, part := range []string{fmt.Sprintf("%s, offset %d: ", file, offset), why, "move the data directory away", "restore a backup"} {
		if !strings.Contains(err.Error(), part) {
			t.Fatalf("%v\ndoes not say %q", err, part)
		}
	}
	if fs.mutates() {
		t.Fatalf("something was changed: %q", fs.calls)
	}
}

// setFile makes b the content of a file, and durable.
func (s *simFS) setFile(path string, b []byte) {
	s.names[path].cache, s.names[path].disk = slices.Clone(b), slices.Clone(b)
}

// holds checks that a log opens and holds what the model says, and that behind it
// all is zero on the disk.
func (l *recordedLog) holds(t *testing.T, fs *simFS, batches int) {
	t.Helper()
	w, s, err := openSim(fs)
	if err != nil {
		t.Fatal(err)
	}
	w.close()
	if d := l.models[batches].differs(s); d != "" {
		t.Fatal(d)
	}
	if f := fs.names[simPath(l.newest)]; !allZero(f.disk[l.places[batches-1].to:]) {
		t.Fatal("the rest is not zeroed on the disk")
	}
}

// before returns how many batches lie before the newest segment.
func (l *recordedLog) before() (n int) {
	for l.places[n].segment < l.newest {
		n++
	}
	return n
}

// TestWALCut: a segment that is shorter than it was, or longer, is damaged. One that
// is zeros from any byte on holds the batches before, if that can be what a loss of
// power has left, else it is damaged; and so it is with anything but zeros.
func TestWALCut(t *testing.T) {
	l := recordLog(t, 2)
	r := seededRand(1)
	newest, first := simPath(l.newest), l.before()
	end := l.places[len(l.places)-1].to
	opened, refused := 0, 0
	for at := 0; at < simSegment; at += raceStep(8) { // which meets the sectors' edges
		fs := l.fs.clone()
		fs.setFile(newest, l.content[:at])
		if at < l.places[first].to {
			refuses(t, fs, newest, 0, "first batch")
		} else {
			refuses(t, fs, newest, at, "bytes long")
		}
		if at >= end {
			continue
		}

		zeroed := slices.Clone(l.content)
		clear(zeroed[at:])
		n := first // batches that are whole without what was zeroed
		for n < len(l.places) && bytes.Equal(zeroed[l.places[n].from:l.places[n].to], l.content[l.places[n].from:l.places[n].to]) {
			n++
		}
		fs.setFile(newest, zeroed)
		// What is cut in the middle of a sector is damaged, unless the bytes that were cut
		// were zeros: the id of the log is random, and so are the checksums.
		from := at / sectorBytes * sectorBytes
		sector := zeroed[from : from+sectorBytes]
		whole := allZero(sector) || bytes.Equal(sector, l.content[from:from+sectorBytes])
		switch {
		case n == first:
			refuses(t, fs, newest, 0, "first batch")
		case whole:
			l.holds(t, fs, n)
			opened++
		default:
			refuses(t, fs, newest, l.places[n].from, "damaged")
			refused++
		}

		rubbish := slices.Clone(l.content)
		n = first
		for l.places[n].to <= at {
			n++
		}
		clear(rubbish[l.places[n].to:])
		for i := at; i < l.places[n].to; i++ {
			rubbish[i] ^= byte(1 + r.IntN(255))
		}
		fs.setFile(newest, rubbish)
		refuses(t, fs, newest, l.places[n].from, "damaged")
	}
	if opened < 5 || refused < 100 {
		t.Errorf("zeroed: opened %d times, refused %d times", opened, refused)
	}
	for _, more := range []int{1, sectorBytes} {
		for _, segment := range []int{1, l.newest} {
			fs := l.fs.clone()
			fs.setFile(simPath(segment), append(fs.names[simPath(segment)].cache, make([]byte, more)...))
			refuses(t, fs, simPath(segment), simSegment, "bytes long")
		}
	}
}

// TestWALTorn: of the last batch, a loss of power can leave any sectors but all:
// what is left is cut away. If all are there and one is not as it was written, or if
// there is anything else, it is damage: of a batch of one sector always.
func TestWALTorn(t *testing.T) {
	for _, c := range []struct{ value, sectors int }{{1, 1}, {700, 2}, {1200, 3}, {1700, 4}} {
		l := &recordedLog{fs: newSimFS(), newest: 1}
		w, _, err := openSim(l.fs)
		if err != nil {
			t.Fatal(err)
		}
		first := &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 1, Term: 1}}}
		if err := w.append(first); err != nil {
			t.Fatal(err)
		}
		from := w.offset
		l.models = []*walModel{{}, {}, (&walModel{}).then(first)}
		l.places = []recordedBatch{{1, 0, sectorBytes}, {1, sectorBytes, from}}
		value := bytes.Repeat([]byte{7}, c.value)
		if c.sectors == 4 { // zeros that were written are not zeros that were there
			clear(value[1 : c.value-1])
		}
		if err := w.append(&kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 2, Term: 9, Data: value}}}); err != nil {
			t.Fatal(err)
		}
		w.close()
		written := l.fs.names[simPath(1)].cache
		sectors := (w.offset - from) / sectorBytes
		if sectors != c.sectors {
			t.Fatalf("%d bytes take %d sectors", c.value, sectors)
		}
		for left := range 1 << sectors {
			b := slices.Clone(written)
			for i := range sectors {
				if left>>i&1 == 0 {
					clear(b[from+i*sectorBytes:][:sectorBytes])
				}
			}
			fs := l.fs.clone()
			if left < 1<<sectors-1 {
				fs.setFile(simPath(1), b)
				l.holds(t, fs, 2)
			}
			step := raceStep(11) * []int{3, 11, 19, 41}[sectors-1] // prime to 8
			for bit := left % step; bit < 8*(simSegment-from); bit += step {
				b[from+bit/8] ^= 1 << (bit % 8)
				fs := l.fs.clone()
				fs.setFile(simPath(1), b)
				offset := from
				if left == 1<<sectors-1 && from+bit/8 >= w.offset { // behind what is intact
					offset = w.offset
				}
				refuses(t, fs, simPath(1), offset, "damaged")
				b[from+bit/8] ^= 1 << (bit % 8)
			}
		}
	}
}

// TestWALMixed: sectors that are intact each, and of two batches, are no batch and not
// torn: of two with one place, or with another place.
func TestWALMixed(t *testing.T) {
	p := walPlace{1, 2, 3, 4, simSegment}
	for name, change := range map[string]func(*walPlace){
		"same place": func(*walPlace) {},
		"log":        func(p *walPlace) { p.id++ },
		"segment":    func(p *walPlace) { p.segment++ },
		"batch":      func(p *walPlace) { p.batch++ },
		"before":     func(p *walPlace) { p.before++ },
	} {
		other := p
		change(&other)
		entry := func(b byte) *kvpb.LogBatch {
			return &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 1, Data: bytes.Repeat([]byte{b}, 1200)}}}
		}
		ours, theirs := encodeAt(t, p, entry(1)), encodeAt(t, other, entry(2))
		if len(ours) != 3*sectorBytes || len(theirs) != len(ours) {
			t.Fatal(len(ours), len(theirs))
		}
		mixed := slices.Clone(ours)
		copy(mixed[sectorBytes:], theirs[sectorBytes:][:sectorBytes])
		if _, _, err := decodeBatch(mixed); err != errNoBatch {
			t.Errorf("%s: it passes for a batch: %v", name, err)
		}
		if p.torn(mixed) || p.torn(append(mixed, make([]byte, sectorBytes)...)) {
			t.Errorf("%s: it passes for a torn batch", name)
		}
		if clear(mixed[2*sectorBytes:]); p.torn(mixed) != (name == "same place") { // which then cannot be told
			t.Errorf("%s: with a sector missing, torn is %v", name, p.torn(mixed))
		}
	}
	moved := encodeAt(t, p, &kvpb.LogBatch{Entries: []*kvpb.Entry{{Data: make([]byte, 1200)}}})
	copy(moved[sectorBytes:], moved[2*sectorBytes:])
	if clear(moved[2*sectorBytes:]); p.torn(moved) {
		t.Error("a sector passes in the place of another")
	}
	long := encodeAt(t, p, &kvpb.LogBatch{Entries: []*kvpb.Entry{{Data: make([]byte, 1200)}}})
	short := encodeAt(t, p, &kvpb.LogBatch{Entries: []*kvpb.Entry{{Data: make([]byte, 700)}}})
	behind := append(slices.Clone(short), long[len(short):]...)
	clear(behind[sectorBytes:len(short)])
	if p.torn(behind) {
		t.Error("what is behind the batch passes for a part of it")
	}
	if clear(behind[len(short):]); !p.torn(behind) {
		t.Error("without that it is torn")
	}
	if clear(long[sectorBytes:]); !p.torn(long) || p.torn(long[:2*sectorBytes]) {
		t.Error("a batch is torn that its segment has no room for, or else is not")
	}
}

// TestWALZerosAreDurable: what was torn is zeros on the disk before anything is
// written there, also if a start failed to make it so and the page cache does not
// know. Or the next loss of power would leave a mixture of two batches.
func TestWALZerosAreDurable(t *testing.T) {
	batch := func(b byte) *kvpb.LogBatch {
		return &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 1, Term: 1, Data: bytes.Repeat([]byte{b}, 1200)}}}
	}
	torn := 0
	for seed := range uint64(100) {
		r := seededRand(seed)
		fs := newSimFS()
		w, _, err := openSim(fs)
		if err != nil {
			t.Fatal(err)
		}
		fs.failAt, fs.fault = len(fs.calls)+1, faultCrash // the write, before its sync
		_ = w.append(batch(1))
		fs = fs.lose(r)
		fs.failAt = 5 // readDir, read, open, write, sync
		if _, _, err = openSim(fs); err == nil || fs.calls[4] != "sync" {
			t.Fatalf("%v, %q", err, fs.calls)
		}
		fs = fs.restart(false)
		if w, _, err = openSim(fs); err != nil {
			t.Fatal(err)
		}
		fs.failAt, fs.fault = len(fs.calls)+1, faultCrash
		_ = w.append(batch(2))
		fs = fs.lose(r)
		if n := w.at; n.torn(fs.names[simPath(1)].disk[w.offset:]) {
			torn++
		}
		if w, _, err = openSim(fs); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		w.close()
	}
	if torn < 50 {
		t.Errorf("only %d were torn", torn)
	}
}

// TestWALBitFlip: any bit of any segment, of the last batch and of zeros included.
func TestWALBitFlip(t *testing.T) {
	l := recordLog(t, 2)
	flips := 0
	for segment, step := range map[int]int{1: raceStep(11), 2: raceStep(11)} { // prime to 8
		b := l.fs.names[simPath(segment)].cache
		starts := []int{0} // of batches, and of what is behind the last one
		for {
			at := starts[len(starts)-1]
			raw, _, err := decodeBatch(b[at:])
			if err != nil {
				break
			}
			starts = append(starts, at+len(raw))
		}
		for bit := segment % step; bit < 8*simSegment; bit += step {
			i, found := slices.BinarySearch(starts, bit/8)
			if !found {
				i--
			}
			b[bit/8] ^= 1 << (bit % 8)
			refuses(t, l.fs, simPath(segment), starts[i], "damaged")
			b[bit/8] ^= 1 << (bit % 8)
			flips++
		}
	}
	if w, _, err := openSim(l.fs); err != nil {
		t.Fatal(err)
	} else {
		w.close()
	}
	t.Logf("%d flips", flips)
}

// editBatch changes the data of a batch and makes all of its checksums right.
func editBatch(b []byte, change func(data []byte)) {
	_, data := intactBatch(b)
	change(data)
	copy(b, data)
	layOut(b)
}

// TestWALMisplaced: what is missing or in the wrong place.
func TestWALMisplaced(t *testing.T) {
	l, other := recordLog(t, 4), recordLog(t, 4)
	move := func(fs *simFS, from, to int) { fs.names[simPath(to)] = fs.names[simPath(from)] }
	var inTwo []recordedBatch
	for _, p := range l.places {
		if p.segment == 2 {
			inTwo = append(inTwo, p)
		}
	}
	last := l.places[len(l.places)-1]
	size := func(p recordedBatch) int { return p.to - p.from }
	for name, c := range map[string]struct {
		damage  func(fs *simFS)
		segment int
		offset  int
		why     string
	}{
		"first missing":  {func(fs *simFS) { delete(fs.names, simPath(1)) }, 1, 0, "missing"},
		"second missing": {func(fs *simFS) { delete(fs.names, simPath(2)) }, 2, 0, "missing"},
		"newest missing": {func(fs *simFS) { delete(fs.names, simPath(4)) }, 4, 0, "missing"},
		"newest two missing": {func(fs *simFS) {
			delete(fs.names, simPath(4))
			delete(fs.names, simPath(5)+".tmp")
		}, 4, 0, "the one before says that its file is there"},
		"newest three missing": {func(fs *simFS) {
			delete(fs.names, simPath(3))
			delete(fs.names, simPath(4))
			delete(fs.names, simPath(5)+".tmp")
		}, 3, 0, "the one before says that its file is there"},
		"all missing": {func(fs *simFS) {
			for i := range 4 {
				delete(fs.names, simPath(i+1))
			}
		}, 4, 0, "missing"},
		"another log's":       {func(fs *simFS) { fs.names[simPath(2)] = other.fs.clone().names[simPath(2)] }, 2, 0, "of log"},
		"another log's first": {func(fs *simFS) { fs.names[simPath(1)] = other.fs.clone().names[simPath(1)] }, 2, 0, "of log"},
		"another log's last":  {func(fs *simFS) { fs.names[simPath(4)] = other.fs.clone().names[simPath(4)] }, 4, 0, "of log"},
		"another segment":     {func(fs *simFS) { move(fs, 1, 2) }, 2, 0, "in the place of"},
		"another first":       {func(fs *simFS) { move(fs, 2, 1) }, 1, 0, "in the place of"},
		"another newest":      {func(fs *simFS) { move(fs, 1, 4) }, 4, 0, "in the place of"},
		"one too many":        {func(fs *simFS) { move(fs, 4, 5) }, 5, 0, "in the place of"},
		"empty":               {func(fs *simFS) { fs.names[simPath(3)].cache = nil }, 3, 0, "first batch"},
		"another batch": {func(fs *simFS) {
			b := fs.names[simPath(2)].cache
			copy(b[inTwo[2].from:], b[inTwo[1].from:inTwo[1].to])
		}, 2, inTwo[2].from, "in the place of"},
		"not a LogBatch": {func(fs *simFS) {
			editBatch(fs.names[simPath(4)].cache[last.from:last.to], func(data []byte) { data[headerBytes] = 0xff })
		}, 4, last.from, "cannot parse"},
		"another last batch": {func(fs *simFS) {
			b := fs.names[simPath(4)].cache
			clear(b[last.from:])
			copy(b[last.from:last.to], b[:min(size(last), l.places[len(l.places)-2].to)])
			copy(b[last.from:], fs.names[simPath(1)].cache[:512])
		}, 4, last.from, "in the place of"},
		"the last sealed batch gone": {func(fs *simFS) { clear(fs.names[simPath(2)].cache[inTwo[len(inTwo)-1].from:]) }, 3, 0, "batches before it are missing"},
		"a segment cut":              {func(fs *simFS) { f := fs.names[simPath(2)]; f.cache = f.cache[:inTwo[1].to] }, 2, inTwo[1].to, "bytes long"},
	} {
		t.Run(name, func(t *testing.T) {
			fs := l.fs.clone()
			c.damage(fs)
			refuses(t, fs, simPath(c.segment), c.offset, c.why)
		})
	}
}

// TestWALChain: a batch that was not written after the one before it does not
// pass, although its numbers are right.
func TestWALChain(t *testing.T) {
	l := recordLog(t, 2)
	p := l.places[1]
	editBatch(l.fs.names[simPath(1)].cache[p.from:p.to], func(data []byte) { data[headerBytes+20] ^= 1 })
	refuses(t, l.fs, simPath(1), p.to, "in the place of")
}

// TestWALNewerFormat: a log of a newer program is told from a damaged one.
func TestWALNewerFormat(t *testing.T) {
	l := recordLog(t, 2)
	for _, p := range []recordedBatch{l.places[0], l.places[len(l.places)-1]} {
		fs := l.fs.clone()
		editBatch(fs.names[simPath(p.segment)].cache[p.from:p.to], func(data []byte) { data[7]++ })
		fs.calls = nil
		if _, _, err := openSim(fs); !errors.Is(err, errWALFormat) || !strings.Contains(err.Error(), simPath(p.segment)) || fs.mutates() {
			t.Fatalf("%v, %q", err, fs.calls)
		}
	}
}

func encodeAt(t testing.TB, p walPlace, b *kvpb.LogBatch) []byte {
	t.Helper()
	raw, err := p.encode(b, false)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestWALCalls: an append is one write and one sync; a roll announces the next
// segment first, and syncs the directory once more; an error is for good.
func TestWALCalls(t *testing.T) {
	fs := newSimFS()
	w, _, err := openSim(fs)
	if err != nil {
		t.Fatal(err)
	}
	fs.calls = nil
	b := &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 1, Term: 1, Data: make([]byte, 600)}}}
	if err := w.append(b); err != nil || !slices.Equal(fs.calls, []string{"write 512+1024", "sync"}) {
		t.Fatalf("%v, %q", err, fs.calls)
	}
	fs.calls = nil
	b.Entries[0].Index, b.Entries[0].Data = 2, make([]byte, 5000)
	if err := w.append(b); err != nil {
		t.Fatal(err)
	}
	second := simPath(2)
	want := []string{"write 1536+512", "sync", "open " + second + ".tmp", "write 5120+512", "write 0+5120", "sync", "rename " + second + ".tmp", "syncDir d",
		"create " + simPath(3) + ".tmp", "write 0+4096", "sync", "syncDir d"}
	if !slices.Equal(fs.calls, want) {
		t.Fatalf("%q\nnot\n%q", fs.calls, want)
	}
	w.close()
	if err := w.append(b); err != errWALClosed {
		t.Fatal(err)
	}
}

// TestWALSecondAttempt: a segment that could not be filled is made anew once it
// is needed. That failing too ends the log.
func TestWALSecondAttempt(t *testing.T) {
	large := &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 1, Term: 1, Data: make([]byte, 5000)}}}
	for call := range 4 { // create, write, sync, syncDir; the roll itself makes eight calls before
		for _, twice := range []bool{false, true} {
			fs := newSimFS()
			w, _, err := openSim(fs)
			if err != nil {
				t.Fatal(err)
			}
			fs.calls, fs.failAt, fs.fault = nil, 9+call, faultENOSPC
			if err := w.append(large); err != nil || len(fs.calls) != fs.failAt {
				t.Fatalf("%v, %q", err, fs.calls)
			}
			fs.calls, fs.failAt = nil, 0
			if twice {
				fs.failAt = 1
			}
			large.Entries[0].Index++
			if err := w.append(large); twice != errors.Is(err, syscall.ENOSPC) || !strings.HasPrefix(fs.calls[0], "create") {
				t.Fatalf("%v, %q", err, fs.calls)
			}
			w.close()
		}
	}
}

// TestWALGap: intact batches that leave entries out are refused.
func TestWALGap(t *testing.T) {
	entry := func(i uint64) []*kvpb.Entry { return []*kvpb.Entry{{Index: i, Term: 1}} }
	for _, c := range []struct {
		batch  *kvpb.LogBatch
		offset int
		why    string
	}{
		{&kvpb.LogBatch{Entries: entry(7)}, 2 * sectorBytes, "entry 7 follows entry 5"},
		{&kvpb.LogBatch{Snapshot: &kvpb.SnapshotMark{Index: 3}, Entries: entry(4), Discards: true}, -1, ""},
		{&kvpb.LogBatch{Snapshot: &kvpb.SnapshotMark{Index: 6}, Entries: entry(8), Discards: true}, 0, "between the snapshot of entry 6 and entry 8"},
	} {
		fs := newSimFS()
		w, _, err := openSim(fs)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range []*kvpb.LogBatch{{Entries: entry(5), Snapshot: &kvpb.SnapshotMark{Index: 4}}, c.batch} {
			if err := w.append(b); err != nil {
				t.Fatal(err)
			}
		}
		w.close()
		if c.offset >= 0 {
			refuses(t, fs, simPath(1), c.offset, c.why)
		} else if _, _, err := openSim(fs); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWALSizes: a segment may have the size of another time, or of a large batch.
func TestWALSizes(t *testing.T) {
	fs, index, sizes := newSimFS(), uint64(0), map[int]bool{}
	for _, segmentBytes := range []int{simSegment, 2 * simSegment, sectorBytes, simSegment} {
		w, s, err := openWAL(fs, simDir, walOptions{segmentBytes: segmentBytes, logger: quiet(), background: func(f func()) { f() }})
		if err != nil || len(s.GetEntries()) != int(index) {
			t.Fatalf("%d entries of %d: %v", len(s.GetEntries()), index, err)
		}
		for _, size := range []int{100, 3000, 20000, 100, 3000, 100} {
			index++
			if err := w.append(&kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: index, Term: 1, Data: make([]byte, size)}}}); err != nil {
				t.Fatal(err)
			}
		}
		w.close()
		fs = fs.lose(nil)
	}
	for path, f := range fs.names {
		if strings.HasSuffix(path, ".wal") {
			sizes[len(f.cache)] = true
		}
	}
	if len(sizes) < 4 {
		t.Errorf("segments of few sizes: %v", sizes)
	}
}

// TestWALRelease: segments go once a snapshot covers them, and disk in use is
// bounded by what is not covered, and four segments.
func TestWALRelease(t *testing.T) {
	fs := newSimFS()
	w, _, err := openSim(fs)
	if err != nil {
		t.Fatal(err)
	}
	hard := &kvpb.HardState{Term: 7, Vote: 3}
	if err := w.append(&kvpb.LogBatch{HardState: hard}); err != nil {
		t.Fatal(err)
	}
	most := 0
	for i := uint64(1); i <= 1000; i++ {
		if err := w.append(&kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: i, Term: 1, Data: make([]byte, 300)}}}); err != nil {
			t.Fatal(err)
		}
		most = max(most, len(fs.names))
		if i%24 != 0 {
			continue
		}
		if g := w.segments[0]; w.truncateFront(g.last-1) != nil || w.segments[0] != g {
			t.Fatalf("entry %d: the segment of an entry that is needed is gone", i)
		}
		if err := w.truncateFront(i); err != nil { // the last snapshot bounds it
			t.Fatal(err)
		}
		again, s, err := openSim(fs.clone())
		if err != nil || len(s.Entries) != 24 {
			t.Fatalf("entry %d: %v", i, err)
		}
		again.close()
		if i > 24 && w.segments[0].last <= i-24 {
			t.Fatalf("entry %d: the oldest segment ends at entry %d", i, w.segments[0].last)
		}
		if err := w.append(&kvpb.LogBatch{Snapshot: &kvpb.SnapshotMark{Index: i, Term: 1}}); err != nil {
			t.Fatal(err)
		}
	}
	if most > 2*24/7+4 { // 7 entries a segment
		t.Fatalf("%d files", most)
	}
	w.close()
	w, s, err := openSim(fs)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	hard.Commit = 984
	if !proto.Equal(s.HardState, hard) || s.Snapshot.Index != 984 || len(s.Entries) != 16 {
		t.Fatalf("%v, %v, %d entries", s.HardState, s.Snapshot, len(s.Entries))
	}
}

// TestMergeBatch: batches that queued behind the disk say together what they
// say one by one.
func TestMergeBatch(t *testing.T) {
	for seed := range uint64(50) {
		r := seededRand(seed)
		script, models := walScript(r, 30)
		script = slices.DeleteFunc(script, func(s walStep) bool { return s.batch == nil })
		state, queued := &walModel{}, &kvpb.LogBatch{}
		covered := uint64(0) // the last entry that is durable, so can be in a snapshot
		for _, s := range script {
			if m := s.batch.Snapshot; r.IntN(3) == 0 || m != nil && !s.batch.Discards && m.Index > covered {
				state, queued = state.then(queued), &kvpb.LogBatch{}
				covered = state.last()
			}
			if err := mergeBatch(queued, proto.Clone(s.batch).(*kvpb.LogBatch)); err != nil {
				t.Fatal(err)
			}
			if len(queued.Entries) > 0 {
				covered = min(covered, queued.Entries[0].Index-1)
			}
		}
		got, want := state.then(queued), models[len(models)-1]
		s := &kvpb.LogBatch{HardState: got.hard, Snapshot: got.mark}
		for _, i := range slices.Sorted(maps.Keys(got.entries)) {
			s.Entries = append(s.Entries, got.entries[i])
		}
		want = &walModel{want.hard, want.mark, want.entries}
		if want.hard != nil {
			want.hard = &kvpb.HardState{Term: want.hard.Term, Vote: want.hard.Vote, Commit: max(want.hard.Commit, want.mark.GetIndex())}
			s.HardState = want.hard
		}
		if d := want.differs(s); d != "" {
			t.Fatalf("seed %d: %s", seed, d)
		}
	}
	b := &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 1}}}
	if err := mergeBatch(b, &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 3}}}); err == nil {
		t.Fatal("a gap")
	}
}

// TestWALFiles: on files, with the goroutine.
func TestWALFiles(t *testing.T) {
	dir := t.TempDir()
	script, models := walScript(seededRand(5), 60)
	var w *wal
	for i, step := range slices.Concat(script, []walStep{{}}) {
		if step.batch == nil && step.release == 0 || w == nil {
			if w != nil {
				w.close()
			}
			var s *kvpb.LogBatch
			var err error
			w, s, err = openWAL(osFS{}, dir, walOptions{segmentBytes: simSegment, logger: quiet()})
			if err != nil {
				t.Fatal(err)
			}
			if d := models[i].differs(s); d != "" {
				t.Fatal(d)
			}
		}
		if step.batch != nil {
			if err := w.append(step.batch); err != nil {
				t.Fatal(err)
			}
		} else if err := w.truncateFront(step.release); err != nil {
			t.Fatal(err)
		}
	}
	w.close()
	if _, _, err := openWAL(osFS{}, filepath.Join(dir, "none"), walOptions{logger: quiet()}); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	w, _, err := openWAL(osFS{}, t.TempDir(), walOptions{segmentBytes: 3 * zeroBytes / 2, logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	w.close()
	for _, path := range []string{w.path(1), w.path(2) + ".tmp"} {
		if info, err := os.Stat(path); err != nil || info.Size() != 3*zeroBytes/2 {
			t.Fatalf("%s: %v, %v", path, info.Size(), err)
		}
	}
}

// frame makes a payload a batch.
func frame(payload []byte) []byte {
	b := append(make([]byte, headerBytes), payload...)
	b = append(b, make([]byte, sectors(len(b))-len(b))...)
	walPlace{1, 2, 3, 4, 5}.putHeader(b)
	binary.LittleEndian.PutUint32(b[40:], uint32(len(payload)))
	layOut(b)
	return b
}

// FuzzDecodeBatch: no input panics or allocates more than 100 times its size;
// what is decoded can be encoded.
func FuzzDecodeBatch(f *testing.F) {
	l := recordLog(f, 1)
	for _, p := range l.places {
		f.Add(l.content[p.from:p.to])
		f.Add(l.content[p.from+headerBytes : p.to])
	}
	script, _ := walScript(seededRand(1), 40)
	for _, s := range script {
		if s.batch != nil {
			b, _ := walPlace{}.encode(s.batch, false)
			f.Add(b)
			_, data := intactBatch(b)
			f.Add(data[headerBytes:][:binary.LittleEndian.Uint32(data[40:])])
		}
	}
	f.Add(bytes.Repeat([]byte{0x22, 0}, 3000)) // entries without anything
	f.Add([]byte{})
	huge := make([]byte, sectorBytes)
	binary.LittleEndian.PutUint32(huge[40:], 1<<32-1)
	f.Add(huge)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, b := range [][]byte{data, frame(data)} {
			var raw []byte
			var batch *kvpb.LogBatch
			var err error
			if n, ok := allocates(100*len(b)+1<<16, func() { raw, batch, err = decodeBatch(b) }); !ok {
				t.Fatalf("%d bytes allocated for %d", n, len(b))
			}
			if err != nil {
				continue
			}
			again, err := placeOf(raw).encode(batch, announces(raw))
			if err != nil {
				t.Fatal(err)
			}
			if _, second, err := decodeBatch(again); err != nil || !proto.Equal(batch, second) {
				t.Fatalf("%v: %v is not %v", err, second, batch)
			}
		}
	})
}

// BenchmarkWALAppend: batches of 4 KiB, in turn with the same written and synced
// bare. "of-raw" is the share of the raw rate that is left.
func BenchmarkWALAppend(b *testing.B) {
	dir := b.TempDir()
	w, _, err := openWAL(osFS{}, dir, walOptions{logger: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	defer w.close()
	path := filepath.Join(dir, "raw")
	if err := w.fill(path); err != nil {
		b.Fatal(err)
	}
	raw, err := osFS{}.open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer raw.Close()
	batch := &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 1, Term: 1, Data: make([]byte, 4096-headerBytes-16)}}}
	block := bytes.Repeat([]byte{1}, 4096)
	var ours, bare []time.Duration
	for b.Loop() {
		start := time.Now()
		if err := w.append(batch); err != nil {
			b.Fatal(err)
		}
		middle := time.Now()
		if err := writeSync(raw, block, len(bare)*4096%segmentBytes); err != nil {
			b.Fatal(err)
		}
		ours, bare = append(ours, middle.Sub(start)), append(bare, time.Since(middle))
		batch.Entries[0].Index++
	}
	sum := func(d []time.Duration) (s time.Duration) {
		for _, d := range d {
			s += d
		}
		return s
	}
	slices.Sort(ours)
	slices.Sort(bare)
	b.ReportMetric(float64(len(ours))/sum(ours).Seconds(), "appends/s")
	b.ReportMetric(float64(len(bare))/sum(bare).Seconds(), "raw/s")
	b.ReportMetric(float64(sum(bare))/float64(sum(ours)), "of-raw")
	b.ReportMetric(float64(ours[len(ours)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(bare[len(bare)*99/100].Microseconds()), "raw-p99-µs")
	b.ReportMetric(float64(ours[len(ours)-1].Microseconds()), "max-µs")
}

// noSync makes a log fast to build.
type noSync struct{ osFS }

type noSyncFile struct{ file }

func (f noSyncFile) sync() error { return nil }

func (n noSync) open(path string) (file, error) {
	f, err := n.osFS.open(path)
	return noSyncFile{f}, err
}

func (n noSync) create(path string) (file, error) {
	f, err := n.osFS.create(path)
	return noSyncFile{f}, err
}

// BenchmarkWALReplay: 10⁶ keys of 16 + 128 bytes, 100 in a batch.
func BenchmarkWALReplay(b *testing.B) {
	const keys, perBatch = 1_000_000, 100
	dir := b.TempDir()
	w, _, err := openWAL(noSync{}, dir, walOptions{logger: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	for i := uint64(1); i <= keys/perBatch; i++ {
		writes := &kvpb.Batch{Proposer: 1, Sequence: i}
		for k := range perBatch {
			set := &kvpb.SetRequest{Key: fmt.Sprintf("%016d", int(i)*perBatch+k), Value: make([]byte, 128)}
			writes.Writes = append(writes.Writes, &kvpb.Write{Operation: &kvpb.Write_Set{Set: set}})
		}
		data, err := proto.Marshal(writes)
		if err != nil {
			b.Fatal(err)
		}
		if err := w.append(&kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: i, Term: 1, Data: data}}}); err != nil {
			b.Fatal(err)
		}
	}
	w.close()
	for b.Loop() {
		w, s, err := openWAL(osFS{}, dir, walOptions{logger: quiet(), background: func(f func()) { f() }})
		if err != nil || len(s.Entries) != keys/perBatch {
			b.Fatal(err)
		}
		b.StopTimer()
		w.close()
		b.StartTimer()
	}
	b.ReportMetric(keys*float64(b.N)/b.Elapsed().Seconds(), "keys/s")
}

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

// TestWALStartIsCut: a process fails at any call, the next one crashes at any call of its
// start, and then the power is lost: nothing that was acknowledged is missing, and the log is
// not refused.
func TestWALStartIsCut(t *testing.T) {
	t.Parallel() // it has one processor work while others wait
	runs := 0
	for _, seed := range []uint64{4, 7} {
		script, models := walScript(seededRand(seed), 40)
		whole := newSimFS()
		if _, err := walRun(whole, script, models); err != nil {
			t.Fatal(err)
		}
		for at := 1; at <= len(whole.calls); at++ {
			for _, fault := range []simFault{faultEIO, faultLate, faultCrash} {
				for try := range 13 * 3 {
					second := 1 + try/3
					fs := newSimFS()
					fs.failAt, fs.fault = at, fault
					done, err := walRun(fs, script, models)
					if errors.Is(err, errModel) || err == nil {
						continue
					}
					call := fs.calls[at-1]
					fs = fs.restart(false)
					fs.failAt, fs.fault = second, faultCrash
					_, _, _ = openSim(fs)
					fs = fs.lose(seededRand(uint64(at*1000 + second*10 + try%3)))
					runs++
					if err := walVerify(fs, script, models, done); err != nil {
						t.Fatalf("seed %d: it fails at call %d, %s, and the next start at call %d: %v", seed, at, call, second, err)
					}
				}
			}
		}
	}
	t.Logf("%d runs", runs)
}
