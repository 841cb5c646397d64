// What of the node is durable: the loop's side of the data directory.

package main

import (
	"fmt"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// durable is how much of the loop's state the data directory has. The loop alone
// uses it, but for disk: that is set before the node serves anybody and never changes, and
// whoever receives a snapshot reads it, too (readSnapshot).
type durable struct {
	disk          *disk                      // nil: in memory only
	snapshotIndex uint64                     // index of the last snapshot on disk; 0: there is no disk, or its directory is nobody's yet
	queued        int                        // jobs that the disk has not done
	logged        uint64                     // bytes of the entries on disk that the last snapshot there does not cover
	saving        uint64                     // logged, when a snapshot on its way to the disk was begun; 0: there is none
	lastBytes     uint64                     // about the length of the last snapshot on disk
	counts        atomic.Pointer[diskCounts] // of the disk; nil: there is none yet. Any goroutine may read it
	missed        bool                       // the log has said that the directory should be there, or not be empty
	savingBytes   uint64                     // about the length of the snapshot on its way; 0: there is none
	written       uint64                     // bytes of the log, by this process
	crowded       bool                       // the disk was low since the last snapshot
	removing      uint64                     // about the bytes of the snapshot, and of the log, that a new snapshot has replaced, until they are gone
	// removed are the raft IDs whom this node tells that they were removed: it must know
	// so after a restart, too, or it might need the vote of one that has left for good.
	removed []uint64
}

// logLimit is how long the entries on disk may become before a snapshot takes their place:
// log-bytes, or as long as the last snapshot. Else a large store would be written again and
// again for little that is new.
func (d *durable) logLimit(logBytes uint64) uint64 { return max(logBytes, d.lastBytes) }

// wantsSnapshot reports whether the entries on disk are so long that a snapshot should
// take their place.
func (d *durable) wantsSnapshot(logBytes uint64) bool {
	return d.disk != nil && d.saving == 0 && d.logged > d.logLimit(logBytes)
}

// noteLogged counts a batch that is about to be written. While a snapshot is saved that
// takes its time, the snapshot gets more of the disk, and in the end all of it.
func (d *durable) noteLogged(batch *kvpb.LogBatch, logBytes uint64) {
	bytes := uint64(sectors(headerBytes + proto.Size(batch)))
	d.logged += bytes
	d.written += bytes
	if d.saving == 0 {
		return
	}
	limit := d.logLimit(logBytes)
	if d.logged > 2*limit {
		d.disk.endPauses()
	}
	if d.logged > 4*limit {
		d.disk.suspend() // the log's writer waits until the snapshot is there
	}
}

// persist has the disk do a job and then calls done, in the loop. The first job makes the
// directory this node's. Once done is called, all removals that were applied when persist
// was called are durable: applyConfChange and a snapshot's append each queue a job that
// makes them so. A snapshot that the job's batch names takes the place of those before it.
func (n *node) persist(j diskJob, done func()) {
	if n.durable.disk == nil {
		done()
		return
	}
	if n.durable.snapshotIndex == 0 {
		n.durable.snapshotIndex = n.store.index
		j.identity = &kvpb.Identity{
			Format:    identityFormat,
			ClusterId: n.store.clusterID,
			NodeId:    n.self.Id,
			RaftId:    n.id.raftID,
			LogId:     randomID(),
		}
	}
	j.batch.Level = levelToWire(n.store.level)
	removed := n.store.removed
	mark := j.batch.Snapshot
	written := func(err error) {
		n.durable.queued--
		if err != nil {
			n.diskFailed(err)
			return
		}
		n.durable.removed = removed
		done()
		if mark != nil {
			n.removeBefore(mark)
		}
	}
	j.done = func(err error) { n.inbox.event(func() { written(err) }) }
	n.durable.queued++
	n.durable.disk.enqueue(j)
}

// diskFailed ends the node: what is on the disk nobody knows.
func (n *node) diskFailed(err error) {
	n.durable.disk.failed.Store(true)
	n.err = fmt.Errorf("%w: writing to the data directory: %w", errStopping, err)
}

// save writes a snapshot of the state to the disk, beside the loop.
func (n *node) save() {
	v := n.store.openView()
	v.rest = n.durable.disk.pause
	n.durable.saving = n.durable.logged
	n.durable.savingBytes = v.length
	n.durable.disk.saved.Store(0) // or what was saved of the last one would count
	n.quota.space.saved = 0
	n.durable.disk.start(func() {
		mark, err := n.durable.disk.save(v)
		n.inbox.event(func() { n.saved(v, mark, err) })
	})
}

// saved makes a snapshot that has been written the one that counts.
func (n *node) saved(v *view, mark *kvpb.SnapshotMark, err error) {
	v.close()
	n.durable.disk.resume()
	switch {
	case err != nil:
		n.diskFailed(err)
	case mark.Index <= n.durable.snapshotIndex: // a leader's has overtaken it
		n.durable.disk.start(func() { _ = n.durable.disk.remove(mark.File) })
	default:
		n.logger.Info("saved a snapshot", "index", mark.Index)
		n.durable.snapshotIndex = mark.Index
		n.durable.logged -= n.durable.saving
		n.durable.crowded = false
		n.durable.removing = n.durable.lastBytes + n.durable.saving
		n.durable.lastBytes = v.length
		n.persist(diskJob{batch: &kvpb.LogBatch{Snapshot: mark}}, func() {})
	}
	n.durable.saving = 0
	n.durable.savingBytes = 0
	space := &n.quota.space
	space.free = less(space.free, less(uint64(n.durable.disk.saved.Load()), space.saved)) // since the last look
}

// removeBefore removes the snapshots before the one that counts, beside the loop.
func (n *node) removeBefore(mark *kvpb.SnapshotMark) {
	n.durable.disk.start(func() {
		err := n.durable.disk.removeBefore(mark)
		n.inbox.event(func() { n.removedBefore(err) })
	})
}

// removedBefore learns that the snapshots before the one that counts are gone.
func (n *node) removedBefore(err error) {
	if err != nil {
		n.diskFailed(err)
		return
	}
	n.quota.space.free += n.durable.removing // until the next look
	n.durable.removing = 0
}
