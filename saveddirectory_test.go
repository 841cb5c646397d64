// Data directories that no node uses. That they are read as nodes read them, and left as they are,
// TestDiskFaults, TestDiskFollowerFaults and wantRefusal check, too.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// readSaved reads a directory in a simulated file system.
func readSaved(fs *simFS) (*savedDirectory, error) {
	return readDirectory(context.Background(), fs, simDir, func(string, string, uint64, uint64) {})
}

// holdsNothing checks that a directory that a node calls empty is said to hold nothing.
func holdsNothing(readErr error) error {
	if errors.Is(readErr, errNothingSaved) || errors.Is(readErr, errNeverFinished) {
		return nil
	}
	return fmt.Errorf("a node finds nothing there, and who only reads it: %v", readErr)
}

// differsFromSaved compares the state of a node, which has started from a directory and has applied
// all of its log, with what was read there. If the node leads, it has applied an entry more: that of its term, which is empty.
func differsFromSaved(n *node, saved *savedDirectory, readErr error) error {
	if readErr != nil {
		return fmt.Errorf("a node starts from it, and it cannot be read: %w", readErr)
	}
	s := saved.store
	if n.store.index != s.index && n.store.index != s.index+1 {
		return fmt.Errorf("the node has applied entry %d, and %d was read", n.store.index, s.index)
	}
	if saved.committed > s.index || saved.snapshot > saved.committed {
		return fmt.Errorf("snapshot of %d, committed %d, last entry %d", saved.snapshot, saved.committed, s.index)
	}
	s.index = n.store.index
	s.term = n.store.term
	write := func(s *store) []byte {
		v := s.openView()
		defer v.close()
		var b bytes.Buffer
		_ = v.writeTo(&b) // to memory
		return b.Bytes()
	}
	if !bytes.Equal(write(s), write(n.store)) {
		return fmt.Errorf("the node has %v\nand what was read is %v", n.store.header(), s.header())
	}
	return nil
}

// anyWrite is a write of any kind, also one that was sent before.
func anyWrite(r *rand.Rand, sessions *[]uint64) *kvpb.Write {
	key := fmt.Sprint("k", r.IntN(30))
	value := bytes.Repeat([]byte{byte(r.IntN(256))}, r.IntN(1500))
	var id *kvpb.RequestId
	if len(*sessions) > 0 && r.IntN(2) == 0 {
		id = &kvpb.RequestId{Session: (*sessions)[r.IntN(len(*sessions))], Sequence: 1 + r.Uint64N(6)}
	}
	switch r.IntN(8) {
	case 0:
		return &kvpb.Write{Operation: &kvpb.Write_Delete{Delete: &kvpb.DeleteRequest{Key: key, RequestId: id}}}
	case 1:
		ranged := &kvpb.DeleteRangeRequest{Start: key, End: key + "~", RequestId: id}
		return &kvpb.Write{Operation: &kvpb.Write_DeleteRange{DeleteRange: ranged}}
	case 2:
		*sessions = append(*sessions, 1+r.Uint64N(1<<40))
		opened := &kvpb.NewSession{Session: (*sessions)[len(*sessions)-1], Owner: "client/shop"}
		return &kvpb.Write{Operation: &kvpb.Write_NewSession{NewSession: opened}}
	}
	set := &kvpb.SetRequest{Key: key, Value: value, RequestId: id}
	if r.IntN(4) == 0 {
		set.ExpectedVersion = new(r.Uint64N(9))
	}
	return &kvpb.Write{Operation: &kvpb.Write_Set{Set: set}}
}

// TestSavedDirectoryOfAnyHistory: what is read from a directory, after any history and any end of
// its process, is what the node says that starts from it.
func TestSavedDirectoryOfAnyHistory(t *testing.T) {
	const learner = 77
	logged, joined, torn := 0, 0, 0
	for seed := range uint64(times(150)) {
		r := seededRand(seed)
		fs := newSimFS()
		p, err := openDiskNode(fs, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.n.bootstrap(nil); err != nil {
			t.Fatal(err)
		}
		if err := p.settle(); err != nil {
			t.Fatal(err)
		}
		if r.IntN(3) > 0 {
			fs.failAt = len(fs.calls) + 1 + r.IntN(150)
			fs.fault = simFault(r.IntN(int(numFaults)))
		}
		var sessions []uint64
		for range r.IntN(60) {
			record, err := encodeWrite(anyWrite(r, &sessions))
			if err != nil {
				t.Fatal(err)
			}
			_ = p.n.inbox.call(&call{write: record, done: make(chan outcome, 1)})
			if r.IntN(9) == 0 {
				kind := raftpb.ConfChangeAddLearnerNode
				members := []*kvpb.Member{{RaftId: learner, Node: plainNode(7)}}
				if p.n.store.members[learner] != nil {
					kind = raftpb.ConfChangeRemoveNode
					members = nil
				}
				p.n.inbox.event(func() { _ = p.n.proposeChange(members, confChange(kind, learner)) })
			}
			if r.IntN(3) > 0 && p.settle() != nil {
				break
			}
		}
		how := []string{"restart", "lose", "some", "evict"}[r.IntN(4)]
		fs = fs.comeBack(how, r)
		saved, readErr := readSaved(fs)
		if fs.mutates() {
			t.Fatalf("seed %d: something was changed: %q", seed, fs.calls)
		}
		again, err := openDiskNode(fs, 1)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if again.n.rn == nil {
			t.Fatalf("seed %d: nothing is left", seed)
		}
		if err := again.lead(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := differsFromSaved(again.n, saved, readErr); err != nil {
			t.Fatalf("seed %d, %s: %v", seed, how, err)
		}
		logged += int(saved.store.index - saved.committed)
		if saved.store.members[learner] != nil {
			joined++
		}
		if saved.torn != "" {
			torn++
		}
	}
	t.Logf("%d entries beyond the commit, %d with a learner, %d torn", logged, joined, torn)
	if logged == 0 || joined == 0 {
		t.Error("some things never happen")
	}
}

// TestSavedDirectoryHasItsWholeLog: also entries that are not known to be committed, and changes of
// membership that fit nothing are skipped.
func TestSavedDirectoryHasItsWholeLog(t *testing.T) {
	fs := newSimFS()
	f, err := openFollower(fs)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.snapshot(); err != nil {
		t.Fatal(err)
	}
	committed := f.last
	m := f.entries(diskOp{"a", []byte("1")}, diskOp{"b", []byte("2")})
	strange := confEntry(&raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{addNode(4)}}) // whom nobody names
	f.last++
	strange.Index, strange.Term = new(f.last), new(f.term)
	m.Entries = append(m.Entries, strange)
	if err := f.hears(m); err != nil {
		t.Fatal(err)
	}
	members := len(f.n.store.members)
	saved, err := readSaved(fs)
	if err != nil {
		t.Fatal(err)
	}
	if saved.committed != committed || saved.store.index != committed+3 || saved.store.version != 2 {
		t.Errorf("committed %d, read up to %d, version %d", saved.committed, saved.store.index, saved.store.version)
	}
	if len(saved.store.members) != members || f.n.store.version != 0 {
		t.Errorf("members %v; the node has version %d", saved.store.members, f.n.store.version)
	}
}

// TestSavedDirectoryOfNewerProgram: an entry that cannot be understood is intact, and its log no
// damaged one.
func TestSavedDirectoryOfNewerProgram(t *testing.T) {
	for name, kind := range map[string]raftpb.EntryType{"a write": raftpb.EntryNormal, "a change": raftpb.EntryConfChangeV2} {
		fs := newSimFS()
		f, err := openFollower(fs)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.snapshot(); err != nil {
			t.Fatal(err)
		}
		b := &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: f.last + 1, Term: f.term, Type: kvpb.EntryType(kind), Data: []byte{0xff}}}}
		if err := f.d.wal.append(b); err != nil {
			t.Fatal(err)
		}
		_, err = readSaved(fs)
		if err == nil || isDamage(err) || !strings.Contains(err.Error(), fmt.Sprintf("entry %d of its log", f.last+1)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSavedDirectoryThatIsEmpty: nothing was lost there, and nothing is.
func TestSavedDirectoryThatIsEmpty(t *testing.T) {
	empty, begun, lost := newSimFS(), newSimFS(), newSimFS()
	begun.names[simDir+"/identity.tmp"] = &simFile{}
	begun.names[simPath(1)] = &simFile{cache: []byte("any")}
	lost.names[simPath(1)] = &simFile{cache: []byte("any")}
	for _, test := range []struct {
		fs     *simFS
		want   error
		damage bool
	}{{empty, errNothingSaved, false}, {begun, errNeverFinished, false}, {lost, nil, true}} {
		_, err := readSaved(test.fs)
		if err == nil || test.want != nil && !errors.Is(err, test.want) || isDamage(err) != test.damage {
			t.Errorf("%v; want %v", err, test.want)
		}
	}
}

// TestSavedDirectoryEnds: reading ends with its caller.
func TestSavedDirectoryEnds(t *testing.T) {
	fs, _ := usedDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := readDirectory(ctx, fs, simDir, func(string, string, uint64, uint64) {})
	if !errors.Is(err, context.Canceled) || isDamage(err) {
		t.Error(err)
	}
	r := readOnlyFS{ctx: ctx}
	dir := realDirectory(t)
	_, err = readDirectory(ctx, r, dir, func(string, string, uint64, uint64) {})
	isTold := err != nil && strings.Contains(err.Error(), "move the data directory away")
	if !errors.Is(err, context.Canceled) || isDamage(err) || isTold {
		t.Errorf("in the midst of its identity: %v", err)
	}
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.readFile(path); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	f, err := r.open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// realDirectory is a directory on a real disk, of a node that has ended without a word: its log
// has entries behind its snapshot, and the last one need not be known to be committed.
func realDirectory(t testing.TB) string {
	t.Helper()
	used, _ := usedDir(t)
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, f := range used.names {
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), f.cache, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// lookOf is all that can be seen of a directory, but when it was read.
func lookOf(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		content := []byte(nil)
		if !e.IsDir() {
			content, err = os.ReadFile(path)
		}
		fmt.Fprintf(&b, "%s %v %d %v %x\n", path, info.Mode(), info.Size(), info.ModTime(), content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestSavedDirectoryIsLeftAsItIs: not a byte of it is changed, nor a time, and no file is made.
func TestSavedDirectoryIsLeftAsItIs(t *testing.T) {
	for _, hasLock := range []bool{true, false} {
		dir := realDirectory(t)
		if hasLock {
			if err := os.WriteFile(filepath.Join(dir, "LOCK"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := lookOf(t, dir)
		file := filepath.Join(t.TempDir(), "backup")
		runCommand(t, exitYes, "", "verify", dir)
		runCommand(t, exitYes, "", "backup", "--data-dir", dir, file)
		runCommand(t, exitYes, "", "backup", "--data-dir", dir, "-")
		if after := lookOf(t, dir); after != before {
			t.Errorf("LOCK %v: it was\n%.300s\nand is\n%.300s", hasLock, before, after)
		}
	}
	r := readOnlyFS{ctx: t.Context()}
	path := filepath.Join(realDirectory(t), "identity")
	f, err := r.open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, writeErr := f.WriteAt([]byte("x"), 0)
	_, createErr := r.create(path + "2")
	for what, err := range map[string]error{
		"write": writeErr, "create": createErr, "rename": r.rename(path, path+"2"), "remove": r.remove(path), "sync": r.syncDir(filepath.Dir(path)),
	} {
		if err == nil {
			t.Errorf("%s: it may", what)
		}
	}
}

// TestSavedDirectoryIsLocked: nobody reads it beside a node, and no node starts beside who reads it.
func TestSavedDirectoryIsLocked(t *testing.T) {
	dir := realDirectory(t)
	d, err := openDisk(osFS{}, dir, 1<<20, quiet())
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"verify", dir}, {"backup", "--data-dir", dir, "-"}, {"backup", "--data-dir", dir, filepath.Join(t.TempDir(), "b")}} {
		_, errs := runCommand(t, exitNotDone, "", args...)
		wantPart(t, errs, "another process uses it")
		wantPart(t, errs, "stop it, or ask it for a backup while it runs")
	}
	d.close()
	r := readOnlyFS{ctx: t.Context()}
	var readers []io.Closer
	for range 2 {
		unlock, err := r.lock(dir)
		if err != nil {
			t.Fatal(err)
		}
		readers = append(readers, unlock)
	}
	for _, reader := range readers {
		_, err = openDisk(osFS{}, dir, 1<<20, quiet())
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			t.Errorf("a node starts beside who reads its directory: %v", err)
		}
		if err := reader.Close(); err != nil {
			t.Fatal(err)
		}
	}

	// Without its LOCK.
	if err := os.Remove(filepath.Join(dir, "LOCK")); err != nil {
		t.Fatal(err)
	}
	unlock, err := r.lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	d, err = openDisk(osFS{}, dir, 1<<20, quiet())
	if err != nil {
		t.Fatal(err)
	}
	d.close()
	if err := unlock.Close(); !errors.Is(err, errUsedMeanwhile) {
		t.Errorf("a node has used it meanwhile: %v", err)
	}
	_, err = readDirectory(t.Context(), startingFS{r}, dir, func(string, string, uint64, uint64) {})
	if !errors.Is(err, errUsedMeanwhile) || isDamage(err) {
		t.Errorf("a node has used it while it was read: %v", err)
	}
}

// startingFS is a file system in which a node starts as soon as its directory is read.
type startingFS struct{ readOnlyFS }

func (s startingFS) lock(dir string) (io.Closer, error) {
	_ = os.Remove(filepath.Join(dir, "LOCK"))
	unlock, err := s.readOnlyFS.lock(dir)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "LOCK"), nil, 0o600)
	}
	return unlock, err
}

// FuzzSavedDirectory: whatever is in a directory, it is whole or refused. It is never called whole
// with a bit that is flipped where something counts.
func FuzzSavedDirectory(f *testing.F) {
	used, snap := usedDir(f)
	var paths []string // of all that count
	for path := range used.names {
		if isSegment(path) || path == snap || path == simDir+"/identity" {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	newest, _, _ := newestSegment(used)
	f.Add(uint8(0), uint32(0), uint8(0), []byte(nil), uint32(0))
	f.Add(uint8(1), uint32(5), uint8(1), []byte("x"), uint32(512))
	f.Add(uint8(2), uint32(4095), uint8(7), make([]byte, 512), uint32(0))
	f.Add(uint8(3), uint32(70), uint8(3), []byte(nil), uint32(1))
	f.Fuzz(func(t *testing.T, which uint8, at uint32, bit uint8, over []byte, cut uint32) {
		path := paths[int(which)%len(paths)]
		fs := used.clone()
		b := fs.names[path].cache
		flipped := slices.Clone(b)
		flipped[int(at)%len(b)] ^= 1 << (bit % 8)
		fs.setFile(path, flipped)
		if saved, err := readSaved(fs); err == nil {
			t.Fatalf("bit %d of byte %d of %s: whole, with entry %d", bit%8, int(at)%len(b), path, saved.store.index)
		}
		mutated := slices.Clone(b)
		copy(mutated[int(at)%len(b):], over)
		mutated = mutated[:len(mutated)-int(cut)%len(mutated)]
		fs.setFile(path, mutated)
		saved, err := readSaved(fs)
		if fs.mutates() {
			t.Fatal("it was changed")
		}
		whole, wholeErr := readSaved(used.clone())
		if wholeErr != nil {
			t.Fatal(wholeErr)
		}
		isNewest := path == newest // whose end may pass for what a loss of power has left
		if err == nil && !isNewest && keysOf(saved.store) != keysOf(whole.store) {
			t.Fatalf("%s: whole, and not what it was", path)
		}
	})
}
