// The space on the disk: Sets are refused before it is used up, for a node whose disk is full
// ends. What is left then is for raft, for deletes, and for the snapshot that makes room.

package main

import (
	"context"
	"time"

	"raft-key-value/kvpb"
)

const (
	// spaceEvery is between two looks at how much space is free.
	spaceEvery = 500 * time.Millisecond
	// spaceLasts is how long a look counts that no other one has followed: later ones fail, or hang.
	// A disk that was low then may have room now, and one that had room may be full: so nothing
	// is refused for it. That does not depend on what ends a node, which is a write that fails.
	spaceLasts = 30 * time.Second
	// maxGap is the largest gap at the end of a segment: a batch did not fit there, as a rule of
	// one entry.
	maxGap = maxEntryBytes + maxWriteBytes
)

// diskSpace is what the loop knows of the space on its disk.
type diskSpace struct {
	known   bool   // there was a look, and it counts
	at      uint64 // tick of the last look
	failure error  // of a look after that; nil: none has failed
	free    uint64 // at the last look
	written uint64 // by the log until then
	saved   uint64 // of a snapshot on its way, until then
	reserve uint64 // that should be free
}

// reserve is how much has to be free until the next snapshot has taken the place of the last one: for
// the rest of the log that is written until then, with the gaps at the ends of its segments, for
// that snapshot, and for three segments of the log, as they are in use beside. A snapshot that
// is on its way has a part of it already, saved. Besides, once the last one and its log are gone,
// there has to be space for one more: so that what is deleted can always be followed by one.
func (d *durable) reserve(snapshot, logBytes, saved uint64) uint64 {
	segment := uint64(d.disk.segmentBytes)
	later := less(2*snapshot+3*segment, d.lastBytes+d.logged)
	if d.savingBytes != 0 { // it is of what was there when it was begun
		return max(3*segment+less(max(snapshot, d.savingBytes), saved), less(later, saved))
	}
	rest := less(d.logLimit(logBytes), d.logged)
	gaps := rest / segment * min(segment, maxGap)
	return max(3*segment+snapshot+rest+gaps, later)
}

// less is a - b, or 0 if that is less.
func less(a, b uint64) uint64 { return a - min(a, b) }

// watchSpace looks at the free space now and then, until ctx ends. A look may take long.
func (n *node) watchSpace(ctx context.Context) {
	tick := time.NewTicker(spaceEvery)
	defer tick.Stop()
	for {
		free, err := n.durable.disk.fs.free(n.durable.disk.dir)
		n.inbox.event(func() { n.noteLook(free, err) })
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// noteLook takes in what came of a look, in the loop.
func (n *node) noteLook(free uint64, err error) {
	if err != nil {
		n.quota.space.failure = err
		return
	}
	n.noteSpace(free)
}

// noteSpace takes in how much space is free, in the loop.
func (n *node) noteSpace(free uint64) {
	if !n.isRunning() {
		return
	}
	d := &n.durable
	n.quota.space = diskSpace{
		known:   true,
		at:      n.clock.now,
		free:    free,
		written: d.written,
		saved:   uint64(d.disk.saved.Load()),
	}
	n.weighSpace()
	if d.crowded && n.wantsSmallSnapshot() {
		n.save()
	}
}

// weighSpace follows whether the disk is low, by what was free at the last look, less what the log has
// taken since, and with what a new snapshot is about to free.
func (n *node) weighSpace() {
	s := &n.quota.space
	d := &n.durable
	if s.known && n.clock.now-s.at > n.ticksOf(spaceLasts) {
		n.forgetSpace()
	}
	if !s.known {
		return
	}
	free := less(s.free+d.removing, d.written-s.written)
	s.reserve = d.reserve(n.store.snapshotLength(), n.opts.logBytes, s.saved)
	wasLow := n.quota.own.DiskLow
	enough := s.reserve
	if wasLow {
		enough += s.reserve / 16 // or what is free just now would have it go to and fro
	}
	isLow := free < enough
	d.crowded = d.crowded || isLow
	n.quota.own.DiskFree = free
	n.quota.own.DiskReserve = s.reserve
	if isLow != wasLow {
		n.changeRoom(func(r *kvpb.RoomReport) { r.DiskLow = isLow })
	}
}

// forgetSpace has this node's disk be one of which nothing is known.
func (n *node) forgetSpace() {
	n.logger.Warn("how much of the disk is free is not known any more: no Set is refused for it, until it is",
		"err", n.quota.space.failure)
	n.quota.space = diskSpace{failure: n.quota.space.failure}
	own := &n.quota.own
	own.DiskFree = 0
	own.DiskReserve = 0
	if own.DiskLow {
		n.changeRoom(func(r *kvpb.RoomReport) { r.DiskLow = false })
	}
}

// wantsSmallSnapshot reports whether a snapshot would make room: it would take three quarters at most of
// what the last one and the log behind it take, and there is space for it. Without one, what
// was deleted stays on the disk until as much is logged.
func (n *node) wantsSmallSnapshot() bool {
	d := &n.durable
	if d.saving != 0 || d.snapshotIndex == 0 {
		return false
	}
	snapshot := n.store.snapshotLength()
	segment := uint64(d.disk.segmentBytes)
	hasSpace := snapshot+segment <= n.quota.space.free
	return hasSpace && snapshot+segment <= (d.lastBytes+d.logged)/4*3
}
