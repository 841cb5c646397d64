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
	// A node says that its disk is low once lowLooks looks in a row have found less than the
	// reserve: for a moment after a snapshot was saved, the one before is still there.
	lowLooks = 2
	// maxGap is the largest gap at the end of a segment: a batch did not fit there, as a rule of
	// one entry.
	maxGap = maxEntryBytes + maxWriteBytes
)

// diskSpace is what the loop knows of the space on its disk.
type diskSpace struct {
	free    uint64 // at the last look
	reserve uint64 // that should be, then
	low     int    // looks in a row that have found less
}

// reserve is how much has to be free until the next snapshot has taken the place of the last one: for
// the rest of the log that is written until then, with the gaps at the ends of its segments, for
// that snapshot, and for three segments of
// the log, as they are in use beside. A snapshot that is on its way has a part of it already.
func (d *durable) reserve(snapshot, logBytes uint64) uint64 {
	segment := uint64(d.disk.segmentBytes)
	if d.saving != 0 {
		return 3*segment + less(snapshot, uint64(d.disk.saved.Load()))
	}
	rest := less(d.logLimit(logBytes), d.logged)
	gaps := rest / segment * min(segment, maxGap)
	return 3*segment + snapshot + rest + gaps
}

// less is a - b, or 0 if that is less.
func less(a, b uint64) uint64 { return a - min(a, b) }

// watchSpace looks at the free space now and then, until ctx ends. A look may take long.
func (n *node) watchSpace(ctx context.Context) {
	tick := time.NewTicker(spaceEvery)
	defer tick.Stop()
	for {
		free, err := n.durable.disk.fs.free(n.durable.disk.dir)
		if err == nil {
			n.inbox.event(func() { n.noteSpace(free) })
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// noteSpace follows how much space is free, in the loop.
func (n *node) noteSpace(free uint64) {
	if !n.isRunning() {
		return
	}
	s := &n.quota.space
	s.free = free
	s.reserve = n.durable.reserve(snapshotLength(n.store.tree.keys, n.store.tree.bytes), n.opts.logBytes)
	wasLow := n.quota.own.DiskLow
	enough := s.reserve
	if wasLow {
		enough += s.reserve / 16 // or what is free just now would have it go to and fro
	}
	if free >= enough {
		s.low = 0
	} else {
		s.low++
	}
	isLow := s.low >= lowLooks || wasLow && s.low > 0
	n.quota.own.DiskFree = s.free
	n.quota.own.DiskReserve = s.reserve
	if isLow != wasLow {
		n.changeRoom(func(r *kvpb.RoomReport) { r.DiskLow = isLow })
	}
	if isLow && n.wantsSmallSnapshot() {
		n.save()
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
	snapshot := snapshotLength(n.store.tree.keys, n.store.tree.bytes)
	segment := uint64(d.disk.segmentBytes)
	hasSpace := snapshot+segment <= n.quota.space.free
	return hasSpace && snapshot+segment <= (d.lastBytes+d.logged)/4*3
}
