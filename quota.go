// The quota: how large the store may become, so that what clients store kills no member.
//
// Each member says how large it lets the store become, and whether its disk is about to be
// full. The least of all counts everywhere. A node decides before it proposes, by the
// store as it has applied it, and it has one proposal in flight: so the store exceeds the
// least limit by what other nodes have in flight at that moment, one entry each. (A leader
// that refused entries of others would have to tell them; and who lags has applied its own
// last entry before it proposes the next one, with all that was committed before that.)

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// keyBytes is what a key counts for besides its bytes and those of its value: it takes some
	// 20 bytes, or 80 if its value is over maxPacked, in pages that are not full.
	keyBytes = 64
	// A member says again that its disk is about to be full as often as diskLowAgain, and is
	// believed for as long as diskLowLasts: one that is down then does not stop the others.
	diskLowAgain = 5 * time.Second
	diskLowLasts = 30 * time.Second
	// refusalShown is how long status says that a Set was refused that others would not be,
	// which are smaller.
	refusalShown = 10 * time.Second
	// maxRooms bounds the members whose reports are kept: those of the configuration, and
	// some that it does not name yet.
	maxRooms = maxMembers + maxStrangers
)

// errQuota is what a Set ends with that was refused. It was not proposed.
var errQuota = errors.New("the Set was refused")

// quota is what members have said of their room, and this node's own. The loop alone uses it.
type quota struct {
	own   kvpb.RoomReport // of this node, in its life under own.raft_id
	space diskSpace
	rooms map[uint64]*memberRoom // by raft ID, of others
	news  []*kvpb.RoomReport     // that peers are yet to be told of
	// changed: what streams begin with is out of date.
	changed bool
	saidAt  uint64 // tick in which peers were last told that the own disk is low
	led     bool   // this node led when it last told peers
	// refusedAt is the tick in which a Set was last refused for its size; 0: none was.
	refusedAt uint64

	// What follows from it, for this moment.
	limit  uint64           // of the store's size
	of     uint64           // raft ID of whose that is
	lowest *kvpb.RoomReport // whose disk is about to be full; nil: nobody's

	plantedDeaf bool // a bug that the simulator plants: what others report does not count
}

// memberRoom is the last report of a member.
type memberRoom struct {
	*kvpb.RoomReport
	heardAt uint64 // tick
}

// asOf is what others are told of a report: that a disk is low not any longer than it counts.
func (r *memberRoom) asOf(now, lasts uint64) *kvpb.RoomReport {
	if now-r.heardAt <= lasts {
		return r.RoomReport
	}
	old := proto.CloneOf(r.RoomReport)
	old.DiskLow = false
	return old
}

func newQuota(limit uint64) quota {
	if limit == 0 {
		limit = math.MaxUint64
	}
	return quota{
		own:   kvpb.RoomReport{MaxStoreBytes: limit},
		rooms: map[uint64]*memberRoom{},
		limit: limit,
	}
}

// size is what keys and values count for.
func (s *store) size() uint64 { return s.tree.bytes + keyBytes*s.tree.keys }

// used is what counts against the quota: keys, values and sessions. But half of it is there for keys
// and values whatever sessions take: who deletes keys makes room, and nobody can delete sessions.
func (n *node) used() uint64 {
	return n.store.size() + min(n.store.sessions.bytes(), n.quota.limit/2)
}

// forget drops what others have said: this node has left their cluster.
func (q *quota) forget() {
	q.rooms = map[uint64]*memberRoom{}
	q.news = nil
	q.changed = true
}

// learn takes in a report; false: there is nothing new in it, or no place for it.
func (q *quota) learn(r *kvpb.RoomReport, isMember func(uint64) bool, now uint64) bool {
	known := q.rooms[r.RaftId]
	if known != nil && known.Sequence >= r.Sequence {
		return false
	}
	if known == nil && len(q.rooms) >= maxRooms && !q.makePlace(isMember) {
		return false
	}
	q.rooms[r.RaftId] = &memberRoom{RoomReport: r, heardAt: now}
	q.changed = true
	return true
}

// makePlace drops the report of somebody who is no member; false: there is none.
func (q *quota) makePlace(isMember func(uint64) bool) bool {
	for id := range q.rooms {
		if !isMember(id) {
			delete(q.rooms, id)
			return true
		}
	}
	return false
}

// receiveRooms takes in what a peer says of who has how much room, and waits until the loop
// has. Any goroutine may call it.
func (n *node) receiveRooms(ctx context.Context, h *kvpb.Hello, rooms []*kvpb.RoomReport) error {
	return n.do(ctx, func() error {
		n.learnRooms(h, rooms)
		return nil
	})
}

// learnRooms is receiveRooms in the loop.
func (n *node) learnRooms(h *kvpb.Hello, rooms []*kvpb.RoomReport) {
	if !n.hears(h) {
		return
	}
	q := &n.quota
	isMember := func(id uint64) bool { return n.store.members[id] != nil }
	for _, r := range rooms {
		isOther := validRaftID(r.RaftId) && r.RaftId != n.id.raftID
		if !isOther || r.MaxStoreBytes == 0 || slices.Contains(n.store.removed, r.RaftId) {
			continue
		}
		if q.learn(r, isMember, n.clock.now) && n.raft.role == raft.StateLeader {
			q.news = append(q.news, r) // to those who do not hear this member
		}
	}
	n.weighRooms()
}

// forgetRooms drops what was said by members that were removed.
func (n *node) forgetRooms(removed []uint64) {
	for _, id := range removed {
		delete(n.quota.rooms, id)
	}
	n.quota.changed = true
	n.weighRooms()
}

// weighRooms finds out whose limit is the least, and whose disk is low.
func (n *node) weighRooms() {
	q := &n.quota
	before := q.lowest
	q.limit = q.own.MaxStoreBytes
	q.of = n.id.raftID
	q.lowest = nil
	if q.own.DiskLow {
		q.lowest = &q.own
	}
	for _, m := range sortedMembers(n.store.members) {
		r := q.rooms[m.RaftId]
		if r == nil || q.plantedDeaf {
			continue
		}
		if r.MaxStoreBytes < q.limit {
			q.limit = r.MaxStoreBytes
			q.of = m.RaftId
		}
		isFresh := n.clock.now-r.heardAt <= n.ticksOf(diskLowLasts)
		if r.DiskLow && isFresh && q.lowest == nil {
			q.lowest = r.RoomReport
		}
	}
	if before == nil && q.lowest != nil {
		n.logger.Warn("Sets are refused", "why", n.whyDiskLow(q.lowest))
	}
	if before != nil && q.lowest == nil {
		n.logger.Info("Sets are not refused for want of disk any more")
	}
}

// tellRooms has peers told what is new of this node's room, and a leader has them told of all
// others'.
func (n *node) tellRooms() {
	q := &n.quota
	isRenewed := q.own.DiskLow && n.clock.now-q.saidAt >= n.ticksOf(diskLowAgain)
	if q.own.RaftId != n.id.raftID || isRenewed {
		n.changeRoom(func(*kvpb.RoomReport) {})
	}
	leads := n.raft.role == raft.StateLeader
	begins := leads && !q.led
	q.led = leads
	if !q.changed && !begins {
		return
	}
	all := []*kvpb.RoomReport{proto.CloneOf(&q.own)}
	for _, m := range sortedMembers(n.store.members) {
		if r := q.rooms[m.RaftId]; r != nil {
			all = append(all, r.asOf(n.clock.now, n.ticksOf(diskLowLasts)))
		}
	}
	news := q.news
	if begins {
		news = all
	}
	q.news = nil
	q.changed = false
	n.net.tellRooms(all, news)
}

// changeRoom changes what this node says of itself.
func (n *node) changeRoom(change func(*kvpb.RoomReport)) {
	q := &n.quota
	change(&q.own)
	n.calls.sequence++ // never used before under this raft ID, in no process
	q.own.RaftId = n.id.raftID
	q.own.Sequence = n.calls.sequence
	q.saidAt = n.clock.now
	q.changed = true
	q.news = append(q.news, proto.CloneOf(&q.own))
	n.weighRooms()
}

// whyRefused says why Sets are refused here, those that make the store larger or all; empty:
// none is.
func (n *node) whyRefused() string {
	if n.quota.lowest != nil {
		return n.whyDiskLow(n.quota.lowest)
	}
	hasJustRefused := n.quota.refusedAt != 0 && n.clock.now-n.quota.refusedAt <= n.ticksOf(refusalShown)
	if n.used() >= n.quota.limit || hasJustRefused {
		return n.whyFull()
	}
	return ""
}

func (n *node) whyDiskLow(r *kvpb.RoomReport) string {
	return fmt.Sprintf("the disk of node %s is about to be full: it has %d bytes free, and should have %d; "+
		"no Set is taken until it has: make room there, or delete keys", n.describe(r.RaftId), r.DiskFree, r.DiskReserve)
}

func (n *node) whyFull() string {
	return fmt.Sprintf("the store has %d bytes, with %d for each key and %d for sessions, and node %s allows %d "+
		"(--max-store-bytes): no Set is taken that makes it larger than that: delete keys, or give that node more",
		n.used(), keyBytes, n.used()-n.store.size(), n.describe(n.quota.of), n.quota.limit)
}

// admission decides for one proposal which Sets there is room for. Its zero value takes all.
type admission struct {
	node   *node
	refuse bool   // all Sets are, for want of disk
	isNear bool   // to the limit: each Set has to be looked at
	why    error  // what the first Set that was refused has ended with; nil: none was
	room   uint64 // by which the store may grow
	grows  uint64 // by what the proposal has in it already
	opens  bool   // what the proposal has may make room
}

// errNotYet keeps a Set for the next proposal: what is in this one decides about it.
var errNotYet = errors.New("it may not fit once this proposal is applied")

// admission begins an admission, for a proposal of so many writes at most.
func (n *node) admission(writes int) admission {
	n.weighSpace()
	a := admission{node: n, refuse: n.quota.lowest != nil}
	a.room = less(n.quota.limit, n.used())
	most := uint64(maxEntryBytes + maxWriteBytes + keyBytes*writes)
	a.isNear = a.refuse || a.room < most
	return a
}

// effect is what a write in a proposal means for those behind it.
type effect struct {
	grows uint64 // by so much the store becomes larger
	opens bool   // it may make room
}

// add counts a write that gets into the proposal.
func (a *admission) add(e effect) {
	a.grows += e.grows
	a.opens = a.opens || e.opens
}

// judge returns the effect of a write, or why it does not get into the proposal. A Set without
// a compare, or whose compare would succeed, makes the store larger by what its key and value take more than
// what this node has there. A compare that would fail here now may succeed later: it counts
// as one that succeeds. A Set that repeats one which was applied gets the same answer again.
func (a *admission) judge(write []byte) (effect, error) {
	if !a.isNear {
		return effect{}, nil
	}
	var o operation
	if o.parseWrite(write) != nil {
		return effect{}, nil // the log refuses it, as any that cannot be
	}
	if o.kind != opSet {
		return effect{opens: o.kind != opNewSession}, nil
	}
	s := a.node.store
	if o.hasID && s.sessions.knows(o.session, o.sequence) {
		return effect{}, nil
	}
	if a.refuse {
		return effect{}, a.refused()
	}
	growth := s.growth(o.key, o.value)
	if growth == 0 {
		return effect{opens: true}, nil // a shorter value makes room
	}
	if a.grows+growth <= a.room {
		return effect{grows: growth}, nil
	}
	if a.grows > 0 || a.opens {
		return effect{}, errNotYet
	}
	return effect{}, a.refused()
}

// refused notes that a Set is refused, and returns what it ends with.
func (a *admission) refused() error {
	n := a.node
	q := &n.quota
	n.status.count.SetsRefused++
	if a.why != nil {
		return a.why
	}
	if a.refuse { // weighRooms has logged it
		a.why = fmt.Errorf("%w: %s", errQuota, n.whyDiskLow(q.lowest))
		return a.why
	}
	a.why = fmt.Errorf("%w: %s", errQuota, n.whyFull())
	isNews := q.refusedAt == 0 || n.clock.now-q.refusedAt > n.ticksOf(time.Minute)
	if isNews {
		n.logger.Warn("Sets are refused", "why", n.whyFull())
	}
	q.refusedAt = n.clock.now
	return a.why
}

// growth is by how much a Set makes the store larger; 0: not at all.
func (s *store) growth(key, value []byte) uint64 {
	it, found := s.tree.get(key)
	if !found {
		return uint64(len(key) + len(value) + keyBytes)
	}
	return uint64(max(0, len(value)-len(it.value)))
}
