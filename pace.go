// The pace of writes: how a leader measures how fast its log grows, and slows it.

package main

import (
	"math"
	"slices"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

const (
	// rateWindow is what a rate of writes is an average over, and rateWindows
	// how many of them are looked back on for the highest one.
	rateWindow  = time.Second
	rateWindows = 10
)

// meter measures how fast the log grows: in bytes, by heartbeat. Heartbeats are numbered
// by the clock.
type meter struct {
	bytes  []uint64 // of each of the last heartbeats, by its number modulo the length
	last   uint64   // the heartbeat that is being counted
	window int      // heartbeats in a rateWindow
}

func newMeter(heartbeat time.Duration) meter {
	window := max(1, int(rateWindow/heartbeat))
	return meter{bytes: make([]uint64, rateWindows*window+1), window: window}
}

// add counts bytes for a heartbeat.
func (m *meter) add(heartbeat, bytes uint64) {
	m.advance(heartbeat)
	m.bytes[m.last%uint64(len(m.bytes))] += bytes
}

func (m *meter) advance(heartbeat uint64) {
	all := uint64(len(m.bytes))
	if heartbeat > m.last+all {
		m.last = heartbeat - all
	}
	for m.last < heartbeat {
		m.last++
		m.bytes[m.last%all] = 0
	}
}

// sum is the bytes of so many heartbeats, of which the last was some heartbeats ago.
func (m *meter) sum(ago, heartbeats int) uint64 {
	bytes := uint64(0)
	for i := ago; i < ago+heartbeats && uint64(i) <= m.last; i++ {
		bytes += m.bytes[(m.last-uint64(i))%uint64(len(m.bytes))]
	}
	return bytes
}

// recent is how many bytes a heartbeat has brought of late.
func (m *meter) recent(heartbeat uint64) uint64 {
	m.advance(heartbeat)
	return m.sum(1, m.window) / uint64(m.window)
}

// fastest is how many bytes a heartbeat brought in the fastest of the last
// windows. If writing has begun more shortly ago than a window is long, it is the
// average since then.
func (m *meter) fastest(heartbeat uint64) uint64 {
	m.advance(heartbeat)
	oldest := len(m.bytes) - 1
	for oldest > 0 && m.sum(oldest, 1) == 0 {
		oldest--
	}
	if oldest == 0 {
		return m.sum(0, 1)
	}
	window := min(oldest, m.window)
	best := uint64(0)
	for ago := 1; ago+window <= oldest+1; ago++ {
		best = max(best, m.sum(ago, window)/uint64(window))
	}
	return best
}

// pace is how a leader slows writes. While they are ahead of the pace, the leader proposes
// none of its own, and holds those that other nodes propose. Each node has one proposal
// in flight at most, so whoever waits for one waits for the pace.
type pace struct {
	limit   uint64            // bytes in a tick; 0: writes are not slowed
	from    uint64            // bytes in a heartbeat: the rate before writes were slowed; 0: they never were
	ended   uint64            // when writes were last slowed no more, by the clock
	second  uint64            // ticks in a second, or 1 if a tick is longer
	room    int64             // bytes that may be proposed now, if it is more than 0
	at      uint64            // when room was last added to, by the clock
	held    []*raftpb.Message // one of each node, in the order in which they came
	ownNext bool              // the last one proposed was another node's
	taken   map[uint64]uint64 // by raft ID: the sequence of the last one of those that were held
}

// slow begins to slow writes, which had a rate before.
func (p *pace) slow(from, limit, ticksPerSecond, wall uint64) {
	p.from = from
	p.limit = limit
	p.second = max(1, ticksPerSecond)
	p.room = 0
	p.at = wall
	p.taken = map[uint64]uint64{}
}

// end ends slowing writes.
func (p *pace) end(wall uint64) {
	p.limit = 0
	p.ended = wall
}

// unslowed is the rate that writes had before they were slowed the last time, if that ended at
// most so many ticks ago; 0: it did not. What was written in these ticks is no more than a
// slowed rate, which must not be halved again.
func (p *pace) unslowed(wall, ticks uint64) uint64 {
	if wall-p.ended > ticks {
		return 0
	}
	return p.from
}

// most is what may be proposed in a second. room stays between -most and most: no more than
// a second's worth is saved up, and however large a write was, the next may go about a
// second later.
func (p *pace) most() int64 { return int64(p.limit * p.second) }

// isSlow reports whether writes are slowed.
func (p *pace) isSlow() bool { return p.limit != 0 }

// mayPropose reports whether the pace lets a write be proposed.
func (p *pace) mayPropose(wall uint64) bool {
	if !p.isSlow() {
		return true
	}
	p.room = min(p.room+int64(p.limit*(wall-p.at)), p.most())
	p.at = wall
	return p.room > 0
}

// count counts a write that was proposed.
func (p *pace) count(bytes int) {
	if p.isSlow() {
		p.room = max(p.room-int64(bytes), -p.most())
	}
}

// hold keeps another node's proposal for later, in place of an older one of that node's.
// One that raft has taken from held already is dropped: its node has sent it again, not
// knowing that.
func (p *pace) hold(m *raftpb.Message) {
	if p.taken[m.GetFrom()] == sequenceOf(m) {
		return
	}
	i := slices.IndexFunc(p.held, func(o *raftpb.Message) bool { return o.GetFrom() == m.GetFrom() })
	if i >= 0 {
		p.held[i] = m
	} else {
		p.held = append(p.held, m)
	}
}

// takeNext takes the proposal of another node whose turn it is, and counts it; nil: none
// may be proposed now. Other nodes take turns with this one, if ownWaits.
func (p *pace) takeNext(wall uint64, ownWaits bool) *raftpb.Message {
	isOwnTurn := p.ownNext && ownWaits
	if len(p.held) == 0 || isOwnTurn || !p.mayPropose(wall) {
		return nil
	}
	m := p.held[0]
	p.held = p.held[1:]
	p.ownNext = true
	p.count(len(m.GetEntries()[0].GetData()) + entryOverhead)
	return m
}

// noteTaken notes that raft has taken a proposal that was held.
func (p *pace) noteTaken(m *raftpb.Message) { p.taken[m.GetFrom()] = sequenceOf(m) }

// sequenceOf is the sequence of a proposal that has been checked.
func sequenceOf(m *raftpb.Message) uint64 {
	b, _ := parseBatch(m.GetEntries()[0].GetData(), nil, math.MaxUint32)
	return b.sequence
}
