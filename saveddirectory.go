// A data directory that no node uses: all that it has is read and checked, and nothing of it is
// changed. Backups of one directory are made so, and directories verified.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

var (
	errNothingSaved  = errors.New("it has nothing of a node in it")
	errNeverFinished = errors.New("it was begun and never finished: nothing in it was ever acknowledged")
	errUsedMeanwhile = errors.New("a process has begun to use it meanwhile")
)

// savedDirectory is what a data directory holds.
type savedDirectory struct {
	identity *kvpb.Identity
	// store is the state after all entries of the log, also those after committed: a node's log
	// has entries that are committed, and were acknowledged, before it has heard so.
	store     *store
	snapshot  uint64   // the entry that the snapshot is of
	committed uint64   // the last entry that is known there to be committed
	torn      string   // where a torn batch of the log was left out; empty: there is none
	leftOver  []string // names of files that do not count: the next start removes them
}

// readDirectory reads a directory, or says what keeps a node from starting with it. Its log may take
// as much memory as the store: both are there at a time.
func readDirectory(
	ctx context.Context, fsys fileSystem, dir string, say func(what, unit string, done, all uint64),
) (s *savedDirectory, err error) {
	d := &disk{fs: fsys, dir: dir, logger: slog.New(slog.DiscardHandler), speaks: programLevel, say: say}
	unlock, err := fsys.lock(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if used := unlock.Close(); used != nil && err == nil {
			err = d.refuse("%w", used)
		}
	}()
	return d.inspect(ctx)
}

// inspect reads and checks all that counts in a directory.
func (d *disk) inspect(ctx context.Context) (*savedDirectory, error) {
	names, err := d.ownFiles()
	if err != nil {
		return nil, err
	}
	if !slices.Contains(names, "identity") {
		return nil, d.whyNothing(names)
	}
	id, err := d.readIdentity()
	if err != nil {
		return nil, err
	}
	r := &recovered{identity: id}
	o, err := d.toRecover(r, names)
	if err != nil {
		return nil, err
	}
	s := &savedDirectory{identity: id}
	r.batch, s.torn, err = readWAL(d.fs, d.dir, o)
	if err != nil {
		return nil, err
	}
	s.store = r.store
	s.snapshot = r.store.index
	s.committed = max(r.batch.HardState.GetCommit(), s.snapshot)
	s.leftOver = leftOver(names, r.batch)
	s.store.history.limit = 0 // nobody watches
	for i, e := range r.batch.Entries {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err := s.store.replay(raftEntry(e)); err != nil {
			return nil, d.refuse("entry %d of its log: %w (%w). Nothing was changed", e.Index, err, errUnknownFormat)
		}
		r.batch.Entries[i] = nil // lets go of it
	}
	return s, nil
}

// whyNothing says what a directory without an identity is.
func (d *disk) whyNothing(names []string) error {
	begun, err := d.checkNotLost(names)
	if err != nil {
		return err
	}
	if begun {
		return d.refuse("%w", errNeverFinished)
	}
	return d.refuse("%w", errNothingSaved)
}

// leftOver returns which of a node's files do not count.
func leftOver(names []string, b *kvpb.LogBatch) []string {
	oldest := fmt.Sprintf("%016x.wal", b.FirstSegment)
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		isOldSegment := isSegment(name) && name < oldest
		isOldSnapshot := isSnapshot(name) && name != b.Snapshot.File
		return !isOldSegment && !isOldSnapshot && !isUnfinished(name)
	})
}

// replay applies an entry of a saved log, as node.applyEntry does while raft runs.
func (s *store) replay(e *raftpb.Entry) error {
	if e.GetIndex() != s.index+1 {
		return fmt.Errorf("the last one applied was %d", s.index)
	}
	s.index = e.GetIndex()
	s.term = e.GetTerm()
	if e.GetType() == raftpb.EntryNormal {
		_, _, _, err := s.apply(e.GetData())
		return err
	}
	cc, ctx, err := decodeConfChange(e)
	if err != nil {
		return err
	}
	conf, err := s.checkConfChange(cc, ctx)
	if err != nil {
		return nil // it is skipped, on every node alike
	}
	s.configure(conf, ctx.Members)
	return nil
}

// readOnlyFS is the file system for a directory that is not to be changed: it opens files for
// reading, and refuses all that would change one. It reads until ctx ends.
type readOnlyFS struct {
	osFS
	ctx context.Context
}

var errNotToChange = &fs.PathError{Op: "change", Path: "the data directory", Err: syscall.EROFS}

func (readOnlyFS) create(string) (file, error) { return nil, errNotToChange }
func (readOnlyFS) rename(string, string) error { return errNotToChange }
func (readOnlyFS) remove(string) error         { return errNotToChange }
func (readOnlyFS) syncDir(string) error        { return errNotToChange }

func (r readOnlyFS) open(path string) (file, error) {
	f, err := os.Open(path)
	return readOnlyFile{osFile{f}, r.ctx}, err
}

func (r readOnlyFS) readFile(path string) ([]byte, error) {
	if err := r.ctx.Err(); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

type readOnlyFile struct {
	osFile
	ctx context.Context
}

func (f readOnlyFile) ReadAt(b []byte, offset int64) (int, error) {
	if err := f.ctx.Err(); err != nil {
		return 0, err
	}
	return f.osFile.ReadAt(b, offset)
}

// lock keeps nodes from using the directory, but nobody from reading it. Without the file LOCK no
// node uses it. That is not made, so a node may start meanwhile: then Close returns an error.
func (readOnlyFS) lock(dir string) (io.Closer, error) {
	path := filepath.Join(dir, "LOCK")
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return absentLock(path), nil
	}
	if err != nil {
		return nil, err
	}
	if err := lockFile(f, syscall.LOCK_SH); err != nil {
		f.Close()
		return nil, fmt.Errorf("the data directory %s: %w", dir, lockError(path, err))
	}
	return heldLock{f}, nil
}

// absentLock is the path of a LOCK that was not there.
type absentLock string

func (path absentLock) Close() error {
	_, err := os.Lstat(string(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errUsedMeanwhile
}
