// The data directory: whose it is, its snapshots, and the writer, which works beside
// the loop so that a disk that stalls stops neither ticks nor heartbeats.
//
//	LOCK          locked by the process that uses the directory
//	identity      says whose directory it is; once it is there, the directory counts
//	identity.tmp  the directory is being begun
//	*.wal         the log's segments, see wal.go
//	*.wal.tmp     the log's next segment
//	*.snap        snapshots; the log names the one that counts
//	*.tmp         snapshots that are not finished
//
// identity.tmp is made durable before any other file of a new directory is created.
// Snapshot and log follow. Once the log's first batch is durable, identity.tmp is
// renamed to identity, and only then is anything acknowledged. So in a directory with
// identity.tmp nothing counts: the next start removes all of it. A directory that has
// neither, but a log or a snapshot, has lost its identity: it is refused.
//
// Two files of the identity, and not the name of the log's first segment, decide that. The
// log drops its first segments, so each later one would have to repeat the identity; and a
// snapshot precedes the log that names it, so identity.tmp would be needed all the same.
// identity.tmp and identity together tell a directory that was never finished, which is
// emptied, from one that has lost its identity or its log, which is refused and left as it
// is.
//
// The space in use is bounded. A snapshot is begun once log-bytes are logged after the
// last one, or as much as that was long, if that is more. Once twice as much is logged, it
// is written without pauses; at four times, the writer of the log waits until the snapshot
// is there. To this come
//   - what was queued, which raft bounds to 64 MiB;
//   - three segments: the one that is appended to, the next one, which is filled with
//     zeros beforehand, and the oldest one, of which a part is still needed; each has
//     log-bytes / 4 at most;
//   - the gaps at the ends of segments, together no larger than all of these.
//
// There are at most two snapshots of the node's own, one that is being removed, and one
// for each that is being received.

package main

import (
	"context"
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
	"time"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	identityFormat = 1
	// progressEvery is the time between two messages about how far a start is.
	progressEvery = time.Second
	// syncEvery is how many bytes of a snapshot are written between two syncs. A sync
	// of the log may have to wait until as many bytes of the snapshot are on the disk.
	syncEvery = 1 << 20
	// whatToDo tells the operator what can be done about a directory that is damaged.
	whatToDo = "Nothing was changed. If a file was moved or altered, put it back as it was. " +
		"Else move the data directory away, all of it, and keep it until the cluster is known to be " +
		"healthy without it. " +
		"If the cluster works without this node, start the node with an empty directory: the cluster takes it back. " +
		"If it does not, restore a backup"
)

// ownName matches the names of the files that a node makes, but for LOCK. A node leaves
// all other files alone.
var ownName = regexp.MustCompile(`^(identity(\.tmp)?|[0-9a-f]{16}(\.tmp|\.wal|\.wal\.tmp|-[0-9a-f]{16}\.snap))$`)

// disk is an open data directory. The loop queues jobs, the writer does them.
type disk struct {
	fs           fileSystem
	dir          string
	logger       *slog.Logger
	segmentBytes int
	unlock       io.Closer
	speaks       uint32 // the highest level that this program speaks

	start      func(func()) // runs the writer, and beside it whatever takes long
	background func(func()) // see walOptions
	running    sync.WaitGroup

	saved  atomic.Int64 // bytes of the snapshot that is being saved
	counts diskCounts
	// say is told now and then how far reading has got: how many of all there are, and of what.
	say func(what, unit string, done, all uint64)

	slowWrites slowLog // the writer's

	closing atomic.Bool // a snapshot that is being written need not be finished
	failed  atomic.Bool // writing has failed: close appends no last batch

	// beginOnce makes identity.tmp, once, unless the directory has an identity. Any
	// goroutine may call it.
	beginOnce func() error

	wal  *wal // the writer's; nil: the directory is empty
	wake bell // rung when there may be work for the writer

	mu        sync.Mutex // guards the fields below
	queue     []diskJob
	suspended bool // the queue has to wait
	noPause   bool // the snapshot that is being saved is waited for, or soon will be
}

// diskJob is a batch to be made durable. The first job of a new directory has an
// identity. If it has a view, too, a snapshot of that is made first, and the batch
// will name the snapshot.
type diskJob struct {
	identity *kvpb.Identity
	view     *view
	batch    *kvpb.LogBatch
	done     func(error) // called by the writer
}

// recovered is the content of a directory.
type recovered struct {
	identity *kvpb.Identity
	store    *store
	batch    *kvpb.LogBatch // all that the log says
}

// adviceOn returns what to tell the operator after an error of reading a file.
func adviceOn(err error) string {
	if isUnreadable(err) {
		return "Nothing was changed"
	}
	return whatToDo
}

// isUnreadable reports whether an error of reading a file is no sign of damage. Such are errors of
// the system, like EIO or EACCES, which say themselves what they are, what another version
// of the program has written, and that whoever reads was told to stop. But a file that is not
// there is damage.
func isUnreadable(err error) bool {
	hasStopped := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	if hasStopped {
		return true
	}
	isNewer := errors.Is(err, errUnknownFormat) || errors.Is(err, errLevel)
	if isNewer {
		return true
	}
	return isOfSystem(err)
}

// openDisk locks a directory, and makes it if it is not there. It refuses one that has no
// identity and files that no node makes: it is somebody else's.
func openDisk(fsys fileSystem, dir string, logBytes uint64, logger *slog.Logger) (*disk, error) {
	size := int(min(max(logBytes/4, sectorBytes), segmentBytes))
	d := &disk{
		fs:           fsys,
		dir:          dir,
		logger:       logger,
		segmentBytes: size / sectorBytes * sectorBytes,
		wake:         newBell(),
		speaks:       programLevel,
	}
	d.counts = newDiskCounts()
	d.start = d.running.Go
	d.say = func(what, unit string, done, all uint64) { logger.Info("reading the "+what, unit, done, "of", all) }
	d.beginOnce = sync.OnceValue(d.createTempIdentity)
	// Before lock puts a file into a directory that is somebody else's. An error is found
	// by lock, too, which names it better.
	names, _ := fsys.readDir(dir)
	stranger := slices.IndexFunc(names, isForeign)
	if stranger >= 0 && !slices.Contains(names, "identity") {
		return nil, unfit{d.refuse("it is not empty: there is %s. Nothing was changed", names[stranger])}
	}
	unlock, err := fsys.lock(dir)
	if err != nil {
		return nil, err
	}
	d.unlock = unlock
	return d, nil
}

// isForeign reports whether a file is neither a node's nor one that an empty directory
// may have.
func isForeign(name string) bool {
	mayBeThere := name == "LOCK" || name == "lost+found" || name[0] == '.'
	return !mayBeThere && !ownName.MatchString(name)
}

// close drops what is queued, waits for what is being written, and unlocks the directory.
// Unless writing has failed, it
// appends an empty batch to the log: a damaged last batch can pass for one that a loss
// of power has cut, and is cut away, so the last batch must not be one that matters.
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

func (d *disk) syncDir() error { return d.fs.syncDir(d.dir) }

// refuse makes the error that says why a directory is not started from.
func (d *disk) refuse(format string, args ...any) error {
	return fmt.Errorf("the data directory %s: %w", d.dir, fmt.Errorf(format, args...))
}

// ownFiles returns the names of the files that a node has made, sorted.
func (d *disk) ownFiles() ([]string, error) {
	names, err := d.fs.readDir(d.dir)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(name string) bool { return !ownName.MatchString(name) }), nil
}

func isSegment(name string) bool { return strings.HasSuffix(name, ".wal") }

func isSnapshot(name string) bool { return strings.HasSuffix(name, ".snap") }

// isUnfinished reports whether a file has not got its name yet, and is not the log's.
func isUnfinished(name string) bool {
	return strings.HasSuffix(name, ".tmp") && !strings.HasSuffix(name, ".wal.tmp")
}

// recover reads the directory; it returns nil if that is empty. Until all that counts
// was found intact, it changes nothing. Then it removes what a start that was not
// finished has left, and the files that do not count any more.
func (d *disk) recover(nodeID uint64) (*recovered, error) {
	names, err := d.ownFiles()
	if err != nil {
		return nil, err
	}
	if !slices.Contains(names, "identity") {
		return nil, d.recoverEmpty(names)
	}
	d.beginOnce = func() error { return nil }
	id, err := d.readIdentity()
	if err != nil {
		return nil, err
	}
	if id.NodeId != nodeID {
		return nil, d.refuse("it is that of node %d, this is node %d", id.NodeId, nodeID)
	}
	r := &recovered{identity: id}
	o, err := d.toRecover(r, names)
	if err != nil {
		return nil, err
	}
	d.wal, r.batch, err = openWAL(d.fs, d.dir, o)
	if err != nil {
		return nil, err
	}
	r.batch.Boots++
	if err := d.wal.append(&kvpb.LogBatch{Boots: r.batch.Boots}); err != nil {
		return nil, err
	}
	if err := d.wal.truncateFront(r.batch.Snapshot.Index); err != nil {
		return nil, err
	}
	if err := d.removeStale(names, r.batch.Snapshot.File); err != nil {
		return nil, err
	}
	return r, nil
}

// toRecover returns the options by which the log of an identity is read. They have the snapshot
// read, too, for only the log names it.
func (d *disk) toRecover(r *recovered, names []string) (walOptions, error) {
	o := d.walOptions(r.identity)
	if !slices.ContainsFunc(names, isSegment) {
		return o, d.refuse("its log, files named *.wal, is missing. %s", whatToDo)
	}
	o.verify = func(b *kvpb.LogBatch) error {
		last := b.Snapshot.GetIndex() + uint64(len(b.Entries))
		if commit := b.HardState.GetCommit(); commit > last {
			return d.refuse("its log ends at entry %d, and says that entry %d is committed. %s",
				last, commit, whatToDo)
		}
		var err error
		r.store, err = d.loadSnapshot(b.Snapshot, r.identity)
		return err
	}
	return o, nil
}

// checkNotLost refuses a directory that has lost its identity. Begun: what is there was never
// finished.
func (d *disk) checkNotLost(names []string) (begun bool, err error) {
	begun = slices.Contains(names, "identity.tmp")
	counting := slices.DeleteFunc(slices.Clone(names), isUnfinished)
	if !begun && len(counting) > 0 {
		found := strings.Join(counting, ", ")
		return false, d.refuse("it has %s, but no file named identity that says whose. %s", found, whatToDo)
	}
	return begun, nil
}

// recoverEmpty empties a directory that has no identity. It refuses one that has lost
// its identity.
func (d *disk) recoverEmpty(names []string) error {
	begun, err := d.checkNotLost(names)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == "identity.tmp" {
			continue // it goes last: without it, the others would seem to count
		}
		if err := d.remove(name); err != nil {
			return err
		}
	}
	if err := d.syncDir(); err != nil {
		return err
	}
	if !begun {
		return nil
	}
	if err := d.remove("identity.tmp"); err != nil {
		return err
	}
	return d.syncDir()
}

// removeStale removes files that were not finished, and all snapshots but the one that
// counts.
func (d *disk) removeStale(names []string, snapshot string) error {
	for _, name := range names {
		superseded := isSnapshot(name) && name != snapshot
		if !superseded && !isUnfinished(name) {
			continue
		}
		if err := d.remove(name); err != nil {
			return err
		}
	}
	return d.syncDir()
}

func (d *disk) walOptions(id *kvpb.Identity) walOptions {
	return walOptions{
		id:           id.LogId,
		segmentBytes: d.segmentBytes,
		logger:       d.logger,
		background:   d.background,
		counts:       &d.counts,
		speaks:       d.speaks,
		say:          func(segments, all uint64) { d.say("log", "segments", segments, all) },
	}
}

func (d *disk) readIdentity() (*kvpb.Identity, error) {
	f, err := d.fs.open(d.path("identity"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := newFrameReader(io.NewSectionReader(f, 0, math.MaxInt64))
	b, err := io.ReadAll(io.LimitReader(r, maxFrameBytes))
	id := &kvpb.Identity{}
	if err == nil {
		err = proto.Unmarshal(b, id)
	}
	if err != nil {
		return nil, d.refuse("its file identity, offset %d: %w. %s", r.offset, err, adviceOn(err))
	}
	if id.Format > identityFormat {
		return nil, d.refuse("%w: the directory is of format %d, and it knows %d: start the newer one that made it",
			errLevel, id.Format, identityFormat)
	}
	missing := slices.Contains([]uint64{id.ClusterId, id.NodeId, id.RaftId, id.LogId}, 0)
	known := id.Format == identityFormat && id.RaftId < maxRaftID
	if missing || !known {
		return nil, d.refuse("its file identity is invalid. %s", whatToDo)
	}
	return id, nil
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
	say := func(keys, all uint64) { d.say("snapshot", "keys", keys, all) }
	s, _, err := scanSnapshot(io.NewSectionReader(f, 0, math.MaxInt64), snapshotScan{speaks: d.speaks, say: say})
	if err != nil {
		return nil, d.refuse("%s: %w. %s", path, err, adviceOn(err))
	}
	isNamed := s.index == mark.Index && s.term == mark.Term
	if !isNamed || s.clusterID != id.ClusterId {
		return nil, d.refuse("%s: it is of entry %d of cluster %016x, and should be of entry %d of cluster %016x. %s",
			path, s.index, s.clusterID, mark.Index, id.ClusterId, whatToDo)
	}
	s.file = mark.File
	return s, nil
}

// snapshotWriter writes a snapshot's file. One goroutine at a time uses it.
type snapshotWriter struct {
	d    *disk
	name string    // until the file is finished
	file file      // nil: it could not be created
	w    io.Writer // appends to file
	err  error     // the first one of the disk: nothing is written after it

	unsynced int  // bytes
	isOwn    bool // it is of this node's state
}

// newSnapshot creates a snapshot's file. An error shows in the writer's first Write or in
// finish.
func (d *disk) newSnapshot() *snapshotWriter {
	w := &snapshotWriter{d: d, name: fmt.Sprintf("%016x.tmp", randomID())}
	w.err = d.beginOnce()
	if w.err != nil {
		return w
	}
	f, err := d.fs.create(d.path(w.name))
	if err != nil {
		w.err = err
		return w
	}
	w.file = f
	w.w = io.NewOffsetWriter(f, 0)
	return w
}

func (w *snapshotWriter) Write(b []byte) (int, error) {
	if w.d.closing.Load() {
		return 0, errStopping
	}
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.w.Write(b)
	w.unsynced += n
	if w.isOwn {
		w.d.saved.Add(int64(n))
	}
	if err == nil && w.unsynced > syncEvery {
		err = w.file.sync()
		w.unsynced = 0
	}
	w.err = err
	return n, err
}

// finish makes the file durable as the snapshot of an index, under a name that is used
// only once, and returns that name. If the disk has failed, or the caller passes the
// error that ended its writing, finish removes the file and returns the error. Only a file
// that has its last name already stays, for the next start to remove.
func (w *snapshotWriter) finish(index uint64, writing error) (name string, err error) {
	name = fmt.Sprintf("%016x-%s.snap", index, strings.TrimSuffix(w.name, ".tmp"))
	if w.err == nil && writing == nil {
		w.err = w.publish(name)
	}
	if w.file != nil {
		_ = w.file.Close() // it is synced, or will be removed
	}
	err = writing
	if w.err != nil {
		err = w.err
	}
	if err != nil {
		_ = w.d.remove(w.name)
		return "", err
	}
	return name, nil
}

// publish makes content and name of the file durable.
func (w *snapshotWriter) publish(name string) error {
	if err := w.file.sync(); err != nil {
		return err
	}
	if err := w.d.fs.rename(w.d.path(w.name), w.d.path(name)); err != nil {
		return err
	}
	return w.d.syncDir()
}

// save writes a view as a snapshot.
func (d *disk) save(v *view) (*kvpb.SnapshotMark, error) {
	w := d.newSnapshot()
	w.isOwn = true
	d.saved.Store(0)
	begun := time.Now()
	name, err := w.finish(v.header.Index, v.writeTo(w))
	if err != nil {
		return nil, err
	}
	d.counts.snapshotSeconds.observeTime(time.Since(begun))
	return &kvpb.SnapshotMark{Index: v.header.Index, Term: v.header.Term, File: name}, nil
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
		if d.closing.Load() {
			return
		}
		jobs := d.takeQueue()
		begun := time.Now()
		if d.do(jobs) != nil {
			return // the loop was told, and ends
		}
		d.noteSlowWrite(jobs, time.Since(begun))
	}
}

// write does all jobs that are queued.
func (d *disk) write() error { return d.do(d.takeQueue()) }

// do makes jobs durable, and then says so to those who wait for it.
func (d *disk) do(jobs []diskJob) error {
	if len(jobs) == 0 {
		return nil
	}
	err := d.persist(jobs)
	for _, j := range jobs {
		j.done(err)
	}
	return err
}

func (d *disk) takeQueue() []diskJob {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.suspended {
		return nil
	}
	jobs := d.queue
	d.queue = nil
	return jobs
}

// persist makes jobs durable as one batch of the log, so that one sync does for all.
func (d *disk) persist(jobs []diskJob) error {
	begins := jobs[0].identity != nil
	if begins {
		if err := d.begin(jobs[0]); err != nil {
			return err
		}
	}
	batch := &kvpb.LogBatch{}
	for _, j := range jobs {
		if err := mergeBatch(batch, j.batch); err != nil {
			return err
		}
	}
	level := batch.Level
	batch.Level = 0
	if proto.Size(batch) == 0 {
		return nil // the jobs only had to wait for those before them; the first one never is empty
	}
	batch.Level = level
	if err := d.wal.append(batch); err != nil {
		return err
	}
	if begins {
		if err := d.finishBegin(); err != nil {
			return err
		}
	}
	if batch.Snapshot == nil {
		return nil
	}
	return d.wal.truncateFront(batch.Snapshot.Index)
}

// createTempIdentity marks an empty directory as one that is being begun. Whatever is put there
// afterwards does not count until finishBegin. Once identity.tmp is there, only begin may
// write to it.
func (d *disk) createTempIdentity() error {
	f, err := d.fs.create(d.path("identity.tmp"))
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return d.syncDir()
}

// begin puts identity, snapshot and an empty log into an empty directory.
func (d *disk) begin(j diskJob) error {
	if err := d.beginOnce(); err != nil {
		return err
	}
	if err := d.writeIdentity(j.identity); err != nil {
		return err
	}
	if j.view != nil {
		mark, err := d.save(j.view)
		if err != nil {
			return err
		}
		j.batch.Snapshot = mark
	}
	w, _, err := openWAL(d.fs, d.dir, d.walOptions(j.identity))
	d.wal = w
	return err
}

// writeIdentity writes an identity into identity.tmp, which finishBegin will rename.
func (d *disk) writeIdentity(id *kvpb.Identity) error {
	f, err := d.fs.open(d.path("identity.tmp"))
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := proto.Marshal(id)
	if err != nil {
		return err
	}
	w := newFrameWriter(io.NewOffsetWriter(f, 0))
	if _, err := w.Write(b); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	return f.sync()
}

// finishBegin makes a directory that was begun the node's: from now on it counts.
func (d *disk) finishBegin() error {
	if err := d.fs.rename(d.path("identity.tmp"), d.path("identity")); err != nil {
		return err
	}
	return d.syncDir()
}

// restore makes an empty directory that of a new cluster of one voter, with the content
// of a snapshot, which read reads. A directory that an earlier restore has begun and not
// finished counts as empty.
func (d *disk) restore(self *kvpb.Node, now time.Time, read func() (*store, error)) (*store, error) {
	names, err := d.ownFiles()
	if err != nil {
		return nil, err
	}
	isLeftover := slices.Contains(names, "identity.tmp") && !slices.Contains(names, "identity")
	if len(names) > 0 && !isLeftover {
		last := names[len(names)-1] // identity, if it is there
		return nil, d.refuse("it is not empty: there is %s. Nothing was changed", last)
	}
	if err := d.recoverEmpty(names); err != nil {
		return nil, err
	}
	s, err := read()
	if err != nil {
		return nil, err
	}
	id := &kvpb.Identity{
		Format:    identityFormat,
		ClusterId: randomID(),
		NodeId:    self.Id,
		RaftId:    randomID(),
		LogId:     randomID(),
	}
	if err := s.beginCluster(id, self, now); err != nil {
		return nil, err
	}
	hard := &kvpb.HardState{Term: s.term, Commit: s.index}
	first := diskJob{identity: id, view: s.openView(), batch: &kvpb.LogBatch{HardState: hard}}
	if err := d.persist([]diskJob{first}); err != nil {
		return nil, err
	}
	return s, nil
}

// removeBefore removes the snapshots that are older than the one that counts. Removing a
// large file takes a while, so the writer does not do it.
func (d *disk) removeBefore(mark *kvpb.SnapshotMark) error {
	names, err := d.ownFiles()
	if err != nil {
		return err
	}
	for _, name := range names {
		hex, _, _ := strings.Cut(name, "-")
		index, _ := strconv.ParseUint(hex, 16, 64)
		older := index <= mark.Index && name != mark.File
		if isSnapshot(name) && older {
			err = errors.Join(err, d.remove(name))
		}
	}
	return err
}

// remove removes a file, which may be gone already.
func (d *disk) remove(name string) error {
	err := d.fs.remove(d.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
