// The data directory: whose it is, the log, the snapshots; and the writer, which
// works beside the loop so that a disk that stalls stops neither ticks nor
// heartbeats.
//
// LOCK is locked by the process that uses the directory. identity says whose it
// is: it gets its name once the log has its first batch, so all that is found
// beside identity.tmp was never acknowledged. That is there before anything else
// is, so what is found without both has lost its identity. *.wal is the log (wal.go).
// *.snap are snapshots: the log names the one that counts. *.tmp was not finished.
//
// What it takes is bounded. A snapshot is begun once log-bytes are logged behind
// the last one; at twice that it is written without rests, and at 4 times that
// writing of the log waits until it is there. Besides: what was queued, which raft
// bounds to 64 MiB; a segment that is being written, one that is being filled, one
// that is partly needed, each a quarter of log-bytes at most; and the gaps at the
// ends of segments, at most as much again. Of snapshots
// there are two, one on its way out, and one for each that is being received.

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	identityFormat = 1
	// progressEvery is between two lines of log about how far a start is.
	progressEvery = time.Second
	// syncEvery is after how many bytes of a snapshot it is synced: what waits for
	// the log meanwhile waits for these, and who sends it for them at its end.
	syncEvery = 1 << 20
	// whatToDo is what an operator can do about a directory that is damaged.
	whatToDo = "Nothing was changed. If a file was moved or altered, put it back as it was. " +
		"Else move the data directory away, all of it, and keep it until the cluster is known to be healthy without it. " +
		"If the cluster works without this node, start the node with an empty directory: the cluster takes it back. " +
		"If it does not, restore a backup"
)

// ownName matches the names of what a node makes in its directory. Anything
// else in there is let alone.
var ownName = regexp.MustCompile(`^(identity(\.tmp)?|[0-9a-f]{16}(\.tmp|\.wal|\.wal\.tmp|-[0-9a-f]{16}\.snap))$`)

// disk is an open data directory.
type disk struct {
	fs           fileSystem
	dir          string
	logger       *slog.Logger
	segmentBytes int
	start        func(func()) // runs the writer, and beside it what takes long
	background   func(func()) // as in walOptions
	unlock       io.Closer
	running      sync.WaitGroup // what start runs
	closing      atomic.Bool    // it need not finish
	failed       atomic.Bool    // nothing more is to be written
	markBegun    func() error   // see writeBegun; any goroutine may call it

	wal *wal // the writer's; nil: the directory is empty

	mu        sync.Mutex
	queue     []diskJob
	suspended bool // nothing is to be written for now
	noPause   bool // the snapshot that is being saved is waited for, or will be soon
	wake      bell
}

// diskJob is something to be made durable. With an identity it is the first of
// a new directory, and with a view it begins with a snapshot of it.
type diskJob struct {
	identity *kvpb.Identity
	view     *view
	batch    *kvpb.LogBatch
	done     func(error) // called by the writer
}

// recovered is what a directory holds.
type recovered struct {
	identity *kvpb.Identity
	store    *store
	batch    *kvpb.LogBatch
}

// adviceOn is what is said behind an error of reading a file. An error of the system
// speaks for itself: it says nothing about the data.
func adviceOn(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) && errno != syscall.ENOENT {
		return "Nothing was changed"
	}
	return whatToDo
}

// openDisk locks a directory, and makes it if it is not there. It refuses one that
// is somebody else's.
func openDisk(fsys fileSystem, dir string, logBytes uint64, logger *slog.Logger) (_ *disk, err error) {
	size := int(min(max(logBytes/4, sectorBytes), segmentBytes)) / sectorBytes * sectorBytes
	d := &disk{fs: fsys, dir: dir, logger: logger, segmentBytes: size, wake: newBell()}
	d.start = d.running.Go
	d.markBegun = sync.OnceValue(d.writeBegun)
	names, _ := fsys.readDir(dir) // if it can be read: lock says why not
	for _, name := range names {
		if name != "LOCK" && name != "lost+found" && name[0] != '.' && !ownName.MatchString(name) && !slices.Contains(names, "identity") {
			return nil, d.refuse("it is not empty: there is %s. Nothing was changed", name)
		}
	}
	d.unlock, err = fsys.lock(dir)
	return d, err
}

// close ends all writing and unlocks the directory. Unless something has failed, the
// last batch of the log then says nothing, so that damage to those before it cannot
// be taken for what a loss of power leaves of the last one.
func (d *disk) close() {
	d.closing.Store(true)
	d.wake.ring()
	d.running.Wait()
	if d.wal != nil {
		if !d.failed.Load() {
			_ = d.wal.append(&kvpb.LogBatch{}) // without it the log is whole, too
		}
		d.wal.close()
	}
	_ = d.unlock.Close()
}

func (d *disk) path(name string) string { return filepath.Join(d.dir, name) }

// refuse says why a directory is not started from.
func (d *disk) refuse(format string, args ...any) error {
	return fmt.Errorf("the data directory %s: %w", d.dir, fmt.Errorf(format, args...))
}

// recover reads the directory; nil: it is empty. It removes what a start that
// was not finished has left, and files that do not count any more.
func (d *disk) recover(nodeID uint64) (*recovered, error) {
	names, err := d.fs.readDir(d.dir)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(name string) bool { return !ownName.MatchString(name) })
	if !slices.Contains(names, "identity") {
		lost := slices.DeleteFunc(slices.Clone(names), isUnfinishedSnapshot)
		if len(lost) > 0 && !slices.Contains(names, "identity.tmp") {
			found := strings.Join(lost, ", ")
			return nil, d.refuse("it has %s, but no file named identity that says whose. %s", found, whatToDo)
		}
		return nil, d.clean(names, "", "identity.tmp")
	}
	d.markBegun = func() error { return nil }
	id, err := d.readIdentity()
	switch {
	case err != nil:
		return nil, err
	case id.NodeId != nodeID:
		return nil, d.refuse("it is that of node %d, this is node %d", id.NodeId, nodeID)
	case !slices.ContainsFunc(names, func(name string) bool { return strings.HasSuffix(name, ".wal") }):
		return nil, d.refuse("its log, files named *.wal, is missing. %s", whatToDo)
	}
	r := &recovered{identity: id}
	o := d.walOptions(id)
	o.verify = func(b *kvpb.LogBatch) (err error) {
		if last, commit := b.Snapshot.GetIndex()+uint64(len(b.Entries)), b.HardState.GetCommit(); commit > last {
			return d.refuse("its log ends at entry %d, and says that entry %d is committed. %s", last, commit, whatToDo)
		}
		r.store, err = d.loadSnapshot(b.Snapshot, id)
		return err
	}
	if d.wal, r.batch, err = openWAL(d.fs, d.dir, o); err != nil {
		return nil, err
	}
	r.batch.Boots++
	mark := r.batch.Snapshot
	return r, ifNot(d.wal.append(&kvpb.LogBatch{Boots: r.batch.Boots}),
		func() error { return d.wal.truncateFront(mark.Index) },
		func() error { return d.clean(names, mark.File, "") })
}

func isUnfinishedSnapshot(name string) bool {
	return strings.HasSuffix(name, ".tmp") && !strings.HasSuffix(name, ".wal.tmp")
}

func (d *disk) walOptions(id *kvpb.Identity) walOptions {
	return walOptions{id: id.LogId, segmentBytes: d.segmentBytes, logger: d.logger, background: d.background}
}

func (d *disk) readIdentity() (*kvpb.Identity, error) {
	f, err := d.fs.open(d.path("identity"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var id kvpb.Identity
	r := newFrameReader(io.NewSectionReader(f, 0, math.MaxInt64))
	b, err := io.ReadAll(io.LimitReader(r, maxFrameBytes))
	if err == nil {
		err = proto.Unmarshal(b, &id)
	}
	switch {
	case err != nil:
		return nil, d.refuse("its file identity, offset %d: %w. %s", r.offset, err, adviceOn(err))
	case id.Format > identityFormat:
		return nil, d.refuse("its format is %d, this program knows %d: start the newer one that made it", id.Format, identityFormat)
	case id.Format != identityFormat || id.ClusterId == 0 || id.NodeId == 0 || id.RaftId == 0 || id.RaftId >= maxRaftID || id.LogId == 0:
		return nil, d.refuse("its file identity is invalid. %s", whatToDo)
	}
	return &id, nil
}

// loadSnapshot reads the snapshot that the log names.
func (d *disk) loadSnapshot(mark *kvpb.SnapshotMark, id *kvpb.Identity) (*store, error) {
	if mark == nil {
		return nil, d.refuse("its log names no snapshot. %s", whatToDo)
	}
	path := d.path(mark.File)
	f, err := d.fs.open(path)
	if err != nil {
		return nil, d.refuse("%s, the snapshot that its log names: %w. %s", path, err, adviceOn(err))
	}
	defer f.Close()
	s, err := scanSnapshot(io.NewSectionReader(f, 0, math.MaxInt64), true, func(keys, all uint64) {
		d.logger.Info("reading the snapshot", "keys", keys, "of", all)
	})
	switch {
	case err != nil:
		return nil, d.refuse("%s: %w. %s", path, err, adviceOn(err))
	case s.index != mark.Index || s.term != mark.Term || s.clusterID != id.ClusterId:
		return nil, d.refuse("%s: it is of entry %d of cluster %016x, and should be of entry %d of cluster %016x. %s", path, s.index, s.clusterID, mark.Index, id.ClusterId, whatToDo)
	}
	s.file = mark.File
	return s, nil
}

// clean removes unfinished files, and of the snapshots, and the log if there is
// none, all but one. The last to go is what says that they may.
func (d *disk) clean(names []string, keep, last string) error {
	var errs []error
	for _, name := range names {
		unfinished := strings.HasSuffix(name, ".tmp") && (keep == "" || !strings.HasSuffix(name, ".wal.tmp")) // else the log's
		old := strings.HasSuffix(name, ".snap") && name != keep || strings.HasSuffix(name, ".wal") && keep == ""
		if name != last && (unfinished || old) {
			errs = append(errs, d.remove(name))
		}
	}
	err := errors.Join(append(errs, d.fs.syncDir(d.dir))...)
	if last != "" && slices.Contains(names, last) {
		err = ifNot(err, func() error { return d.remove(last) }, d.syncDir)
	}
	return err
}

// snapshotWriter writes a snapshot's file.
type snapshotWriter struct {
	d    *disk
	name string // while it is not finished
	file file
	w    io.Writer
	err  error // the first one of the disk

	unsynced int // bytes
}

func (d *disk) newSnapshot() *snapshotWriter {
	w := &snapshotWriter{d: d, name: fmt.Sprintf("%016x.tmp", randomID())}
	if w.err = d.markBegun(); w.err != nil {
		return w
	}
	if w.file, w.err = d.fs.create(d.path(w.name)); w.err == nil {
		w.w = io.NewOffsetWriter(w.file, 0)
	}
	return w
}

func (w *snapshotWriter) Write(b []byte) (n int, err error) {
	if w.d.closing.Load() {
		return 0, errStopping
	}
	if w.err == nil {
		n, w.err = w.w.Write(b)
		w.unsynced += n
	}
	if w.err == nil && w.unsynced > syncEvery {
		w.unsynced, w.err = 0, w.file.sync()
	}
	return n, w.err
}

// finish makes what was written durable as the snapshot of an index, under a
// name that is used once. After an error, its own or the caller's, it removes
// the file.
func (w *snapshotWriter) finish(index uint64, err error) (name string, _ error) {
	name = fmt.Sprintf("%016x-%s.snap", index, strings.TrimSuffix(w.name, ".tmp"))
	if err == nil {
		w.err = ifNot(w.err, func() error { return w.file.sync() })
	}
	if w.w != nil {
		_ = w.file.Close() // synced, or to be removed
	}
	if err == nil {
		rename := func() error { return w.d.fs.rename(w.d.path(w.name), w.d.path(name)) }
		w.err = ifNot(w.err, rename, w.d.syncDir)
	}
	if err = cmp.Or(w.err, err); err != nil {
		_ = w.d.remove(w.name)
	}
	return name, err
}

// save writes a view as a snapshot.
func (d *disk) save(v *view) (*kvpb.SnapshotMark, error) {
	w := d.newSnapshot()
	name, err := w.finish(v.header.Index, v.writeTo(w))
	return &kvpb.SnapshotMark{Index: v.header.Index, Term: v.header.Term, File: name}, err
}

// enqueue leaves a job for the writer.
func (d *disk) enqueue(j diskJob) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queue = append(d.queue, j)
	d.wake.ring()
}

// pause lets the log have the disk for a while, in the midst of saving a snapshot. It
// returns at once after endPauses.
func (d *disk) pause(worked time.Duration) {
	d.mu.Lock()
	noPause := d.noPause
	d.mu.Unlock()
	if !noPause {
		rest(worked)
	}
}

// endPauses has the snapshot that is being saved take all that it can get of the disk,
// because the log waits for it, or soon will.
func (d *disk) endPauses() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.noPause = true
}

// suspend has the writer leave the queue as it is, until resume.
func (d *disk) suspend() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.suspended = true
}

// resume lets the writer go on. The next snapshot is saved with pauses again.
func (d *disk) resume() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.suspended = false
	d.noPause = false
	d.wake.ring()
}

// run is the writer's goroutine.
func (d *disk) run() {
	for range d.wake {
		if d.closing.Load() || d.write() != nil {
			return // the loop knows, and ends
		}
	}
}

// write makes all that is queued durable, by one sync, and then says so.
func (d *disk) write() error {
	d.mu.Lock()
	jobs := d.queue
	if d.suspended {
		jobs = nil
	} else {
		d.queue = nil
	}
	d.mu.Unlock()
	if len(jobs) == 0 {
		return nil
	}
	err := d.persist(jobs)
	for _, j := range jobs {
		j.done(err)
	}
	return err
}

func (d *disk) persist(jobs []diskJob) (err error) {
	batch := &kvpb.LogBatch{}
	for _, j := range jobs {
		if j.identity != nil {
			err = d.begin(j)
		}
		if err = cmp.Or(err, mergeBatch(batch, j.batch)); err != nil {
			return err
		}
	}
	if proto.Size(batch) == 0 {
		return nil // its answers only had to wait for others
	}
	if err := d.wal.append(batch); err != nil {
		return err
	}
	if id := jobs[0].identity; id != nil {
		err = d.fs.rename(d.path("identity.tmp"), d.path("identity"))
		if err = ifNot(err, d.syncDir); err != nil {
			return err
		}
	}
	if mark := batch.Snapshot; mark != nil {
		return d.wal.truncateFront(mark.Index)
	}
	return nil
}

// ifNot takes the steps that follow if nothing has failed.
func ifNot(err error, steps ...func() error) error {
	for _, step := range steps {
		if err == nil {
			err = step()
		}
	}
	return err
}

func (d *disk) syncDir() error { return d.fs.syncDir(d.dir) }

// writeBegun has an empty directory say that what is put there is not finished. Once
// identity.tmp is there, only begin may write it.
func (d *disk) writeBegun() error {
	f, err := d.fs.create(d.path("identity.tmp"))
	return ifNot(err, func() error { return f.Close() }, d.syncDir)
}

// begin makes an empty directory that of a node, but for the last step.
func (d *disk) begin(j diskJob) error {
	if err := d.markBegun(); err != nil {
		return err
	}
	f, err := d.fs.create(d.path("identity.tmp"))
	if err != nil {
		return err
	}
	defer f.Close()
	w := newFrameWriter(io.NewOffsetWriter(f, 0))
	b, _ := proto.Marshal(j.identity) // it has numbers only
	_, err = w.Write(b)
	if err = ifNot(err, w.flush, f.sync, d.syncDir); err != nil {
		return err
	}
	if j.view != nil {
		if j.batch.Snapshot, err = d.save(j.view); err != nil {
			return err
		}
	}
	d.wal, _, err = openWAL(d.fs, d.dir, d.walOptions(j.identity))
	return err
}

// restore makes an empty directory that of a new cluster of one voter. It has
// the keys, their versions and the sessions of the snapshot that read reads; new
// versions begin with the present time. What a restore that was cut short has left
// counts as empty.
func (d *disk) restore(self *kvpb.Node, now time.Time, read func() (*store, error)) (*store, error) {
	names, err := d.fs.readDir(d.dir)
	unfinished := slices.Contains(names, "identity.tmp") && !slices.Contains(names, "identity") // it comes first, and goes last
	for _, name := range slices.Backward(names) {
		if !unfinished && ownName.MatchString(name) {
			return nil, d.refuse("it is not empty: there is %s. Nothing was changed", name)
		}
	}
	if err != nil {
		return nil, err
	}
	if _, err := d.recover(self.Id); err != nil {
		return nil, err
	}
	s, err := read()
	if err != nil {
		return nil, err
	}
	if err := s.beginVersions(now); err != nil {
		return nil, err
	}
	id := &kvpb.Identity{Format: identityFormat, ClusterId: randomID(), NodeId: self.Id, RaftId: randomID(), LogId: randomID()}
	s.clusterID, s.members, s.removed, s.proposers = id.ClusterId, map[uint64]*kvpb.Node{}, nil, nil
	s.former = nil
	s.configure(&raftpb.ConfState{Voters: []uint64{id.RaftId}}, []*kvpb.Member{{RaftId: id.RaftId, Node: self}})
	hard := &kvpb.HardState{Term: s.term, Commit: s.index}
	return s, d.persist([]diskJob{{identity: id, view: s.open(), batch: &kvpb.LogBatch{HardState: hard}}})
}

// removeBefore removes the snapshots that are older than the one that counts. For
// a large file that takes a while, so it is not the writer's.
func (d *disk) removeBefore(mark *kvpb.SnapshotMark) error {
	names, err := d.fs.readDir(d.dir)
	for _, name := range names {
		hex, _, _ := strings.Cut(name, "-")
		index, _ := strconv.ParseUint(hex, 16, 64)
		if ownName.MatchString(name) && strings.HasSuffix(name, ".snap") && index <= mark.Index && name != mark.File {
			err = errors.Join(err, d.remove(name))
		}
	}
	return err
}

// remove removes a file that may be gone already.
func (d *disk) remove(name string) error {
	if err := d.fs.remove(d.path(name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
