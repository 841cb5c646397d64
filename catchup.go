// Catching up: what of the log the leader keeps for members that are behind, and
// how it slows writes so that they come back.
//
// A member that is behind needs the log after the snapshot that is on its way to
// it, and then the log from what it has stored on. The leader keeps that as long as
// the member gets on. Once the log is twice log-bytes long, writes are slowed to half
// of the rate that they had, until everybody has caught up. Once it is as long as
// keptBytes says, whoever it is kept for is too slow: the leader gives it up for a
// while, drops the log, and says so in status.

package main

import (
	"fmt"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/tracker"
)

const (
	// silentTooLong is how long a member may say nothing, and the log is still
	// kept for it.
	silentTooLong = 2 * time.Second
	// A member that was too slow gets another snapshot after minSnapshotWait at the
	// earliest: as soon as half as much is written as when it was given up (mayRetry), and
	// at the latest after follower.wait. That is the longest of minSnapshotWait, the time for
	// which it had tried, and twice its last wait, but at most maxDoubledWait (tooSlow).
	minSnapshotWait = time.Second
	maxDoubledWait  = time.Minute
)

// catchup is what a leader keeps for members that are behind, and how it slows writes.
type catchup struct {
	followers map[uint64]*follower // by raft ID, while this node leads
	silences  map[uint64]*silence  // by raft ID, of members that are connected, while this node leads
	commitAt  [3]uint64            // what was committed at the last heartbeats, the newest first
	written   meter                // of the log's entries
	pace      pace                 // of writes, while this node leads
	noPause   atomic.Bool          // set by the loop: the log runs away, so no sender of a snapshot pauses
}

// forget drops what holds for one term of a leader.
func (c *catchup) forget() {
	c.pace = pace{}
	c.followers = map[uint64]*follower{}
	c.silences = map[uint64]*silence{}
}

// noteCommit notes, at a heartbeat, what is committed.
func (c *catchup) noteCommit(commit uint64) {
	c.commitAt = [...]uint64{commit, c.commitAt[0], c.commitAt[1]}
}

// follower is what the leader knows of a member beyond raft's own progress.
type follower struct {
	since   uint64 // tick in which this leader came to know it: its silence counts from then; 0: it has caught up once
	stored  uint64 // the highest that stored said, or the index of the snapshot that it got
	movedAt uint64 // tick in which it last got on, or had all there was
	began   uint64 // tick since which it lags, or is sent a snapshot
	from    uint64 // the entry after which it began to be sent the log
	fromAt  uint64 // tick in which it began to be
	givenUp bool   // the log is not kept for it until it has caught up, or is sent a snapshot
	gaveUp  uint64 // tick of that
	wait    uint64 // ticks from gaveUp until it may get another snapshot
	waits   bool   // raft is yet to be told that its last snapshot failed: once it may get another (followMembers)
	written uint64 // bytes by which the log grew between two heartbeats when it was given up
	lagging string // why it lags, until it has caught up, even while it is tried again; for status
}

// rate is the average of bytes in so many ticks, in bytes a second.
func (n *node) rate(bytes, ticks uint64) uint64 {
	return uint64(float64(bytes) / (float64(max(ticks, 1)) * n.tickDuration().Seconds()))
}

// stored is the entry after which a member needs the log: the last one that the leader
// knows it to have or, while raft probes it, the one that raft asks it for. (A new leader
// knows of none, and would keep all of the log for everybody.)
func stored(pr tracker.Progress) uint64 {
	if pr.State == tracker.StateProbe {
		return pr.Next - 1
	}
	return pr.Match
}

// followerOf returns what is known of a member.
func (n *node) followerOf(id uint64) *follower {
	c := n.catchup.followers[id]
	if c == nil {
		c = &follower{since: n.clock.now, movedAt: n.clock.now, began: n.clock.now, fromAt: n.clock.now}
		n.catchup.followers[id] = c
	}
	return c
}

// nowSent notes that a member has got a snapshot: from here on it is sent the log.
func (n *node) nowSent(id, index uint64) {
	c := n.followerOf(id)
	c.stored = max(c.stored, index)
	c.movedAt = n.clock.now
	c.from = index
	c.fromAt = n.clock.now
}

// followMembers notes which members get on, and has those that were too slow tried
// again. The leader calls it at each heartbeat.
func (n *node) followMembers() {
	for id := range n.catchup.followers {
		if n.store.members[id] == nil {
			delete(n.catchup.followers, id)
		}
	}
	n.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
		if id == n.id.raftID {
			return
		}
		c := n.followerOf(id)
		last := stored(pr)
		if n.isCaughtUp(pr) {
			*c = follower{stored: last, movedAt: n.clock.now, began: n.clock.now, from: last, fromAt: n.clock.now}
			return
		}
		if last > c.stored || last >= n.store.index {
			c.movedAt = n.clock.now
		}
		c.stored = last
	})
	for _, m := range sortedMembers(n.store.members) {
		if c := n.catchup.followers[m.RaftId]; c != nil && c.waits && n.mayRetry(c) {
			c.waits = false
			n.rn.ReportSnapshot(m.RaftId, raft.SnapshotFailure)
		}
	}
	n.followSilences()
}

// mayRetry reports whether a member that was too slow may get another snapshot:
// after a while, or when so little is written that it may be fast enough.
func (n *node) mayRetry(c *follower) bool {
	waited := n.clock.now - c.gaveUp
	if waited < n.ticksOf(minSnapshotWait) {
		return false
	}
	return waited >= c.wait || n.catchup.written.recent(n.heartbeatNumber()) <= c.written/2
}

// keepsFor reports whether the log is kept for a member. For a member that
// is being sent a snapshot, that snapshot's index keeps the log (needed).
func (n *node) keepsFor(id uint64, pr tracker.Progress) bool {
	if id == n.id.raftID || pr.State == tracker.StateSnapshot || !n.peers.connected[id] {
		return false
	}
	c := n.followerOf(id)
	isSilent := n.clock.now-max(n.peers.heard[id], c.since) > n.ticksOf(silentTooLong)
	isStuck := n.clock.now-c.movedAt > n.ticksOf(helloTimeout) // as long as a stream may stall
	return !c.givenUp && !isSilent && !isStuck
}

// needed returns the index after which the log is kept, and whether it is for
// somebody who has yet to catch up.
func (n *node) needed() (index uint64, behind bool) {
	index = n.store.index
	if n.raft.role != raft.StateLeader {
		return index, false
	}
	if oldest, ok := n.snapshots.oldest(); ok {
		index = min(index, oldest)
		behind = true
	}
	n.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
		if n.keepsFor(id, pr) {
			index = min(index, stored(pr))
			behind = behind || !n.isCaughtUp(pr)
		}
	})
	return index, behind
}

// keptBytes bounds the entries that are kept for members that are behind. If a member takes
// a snapshot at half of the rate that writes had, and writes are slowed to that half, too,
// as many bytes are written meanwhile as the snapshot has: the store's. The four times
// log-bytes are for what was written before writes were slowed, and while the snapshot
// is installed.
func (n *node) keptBytes() uint64 { return 4*n.opts.logBytes + n.store.tree.bytes }

// compactLog drops what nobody needs of a log that is longer than log-bytes, and
// slows writes while too much is needed.
func (n *node) compactLog() {
	limit := n.opts.logBytes
	pace := &n.catchup.pace
	if n.log.bytes <= limit && !pace.isSlow() {
		n.catchup.noPause.Store(false)
		return
	}
	index, behind := n.needed()
	n.log.compact(limit/2, index)
	for n.log.bytesTo(n.store.index) > n.keptBytes() && n.giveUp(index) {
		index, behind = n.needed()
		n.log.compact(limit/2, index)
	}
	// Followers that are two heartbeats behind count as caught up. If the log has become so
	// long since then, writes are slowed as if somebody was behind.
	isBurst := index < n.store.index && n.log.bytes > 3*limit
	behind = behind || isBurst
	n.catchup.noPause.Store(behind && n.log.bytes > limit)
	if pace.isSlow() && !behind {
		pace.end(n.clock.wall)
		n.logger.Info("all have caught up: writes are not slowed any more")
	}
	isTooLong := behind && n.log.bytes > 2*limit
	if isTooLong && !pace.isSlow() {
		n.slowWrites()
	}
}

// giveUp gives up those whom the log after an index is kept for; false: nobody.
func (n *node) giveUp(index uint64) bool {
	some := n.snapshots.giveUp(index)
	var slow []uint64
	n.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
		isLast := stored(pr) == index && index < n.store.index
		if isLast && n.keepsFor(id, pr) {
			slow = append(slow, id)
		}
	})
	for _, id := range slow {
		c := n.followerOf(id)
		bytesPerEntry := n.log.bytes / max(1, uint64(len(n.log.entries)))
		took := (index - min(index, c.from)) * bytesPerEntry
		n.tooSlow(id, fmt.Sprintf("it stored %d bytes of the log a second", n.rate(took, n.clock.now-c.fromAt)))
	}
	return some || len(slow) > 0
}

// tooSlow notes that a member was given up.
func (n *node) tooSlow(id uint64, how string) {
	c := n.followerOf(id)
	c.wait = max(n.clock.now-c.began, n.ticksOf(minSnapshotWait), min(2*c.wait, n.ticksOf(maxDoubledWait)))
	c.givenUp = true
	c.gaveUp = n.clock.now
	c.written = n.catchup.written.recent(n.heartbeatNumber())
	c.lagging = fmt.Sprintf("too slow to catch up: %s, while %d were written, "+
		"and %d bytes of the log were kept for it; it gets another snapshot after %v, or once half as much is written",
		how, n.rate(c.written, ticksPerHeartbeat), n.keptBytes(), n.durationOf(c.wait))
	n.logger.Warn("a peer is too slow to catch up", append(n.peerArgs(id), "why", c.lagging)...)
}

// lagging says why a member is behind, if that costs something; empty: it does not.
func (n *node) lagging(id uint64, pr tracker.Progress) string {
	c := n.catchup.followers[id]
	if c == nil || id == n.id.raftID {
		return ""
	}
	if c.lagging != "" {
		return c.lagging
	}
	isServed := pr.State == tracker.StateSnapshot || n.keepsFor(id, pr)
	if isServed && n.catchup.pace.isSlow() && !n.isCaughtUp(pr) {
		return fmt.Sprintf("catching up: writes are slowed to %d bytes a second", n.rate(n.catchup.pace.limit, 1))
	}
	return ""
}

// pause lets others use processor and disk while a snapshot is written for a member. It
// does not wait while the log is longer than log-bytes for members that are behind. Any
// goroutine may call it.
func (c *catchup) pause(worked time.Duration) {
	if !c.noPause.Load() {
		rest(worked)
	}
}

// slowWrites halves the rate of writes: the rate that they had when nothing slowed them.
func (n *node) slowWrites() {
	fastest := n.catchup.written.fastest(n.heartbeatNumber())
	lookedBack := n.ticksOf(rateWindows * rateWindow)
	fastest = max(fastest, n.catchup.pace.unslowed(n.clock.wall, lookedBack))
	limit := max(1, fastest/ticksPerHeartbeat/2)
	n.catchup.pace.slow(fastest, limit, n.ticksOf(time.Second), n.clock.wall)
	n.logger.Warn("writes are slowed until all have caught up: status names who has not", "log_bytes", n.log.bytes,
		"bytes_per_second", n.rate(fastest, ticksPerHeartbeat), "slowed_to", n.rate(limit, 1))
}

// heartbeatNumber is the heartbeat that the clock is in.
func (n *node) heartbeatNumber() uint64 { return n.clock.wall / ticksPerHeartbeat }

// proposeHeld proposes what other nodes want written, in turn with this node's own.
func (n *node) proposeHeld() {
	p := &n.catchup.pace
	for {
		m := p.takeNext(n.clock.wall, n.calls.canPropose())
		if m == nil {
			return
		}
		if n.rn.Step(m) == nil { // else who has proposed it will do so again
			p.noteTaken(m)
		}
	}
}
