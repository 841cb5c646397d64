// The replicated state machine: keys in order, and the little that goes with them.

package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

const (
	// maxRemoved is how many removed raft IDs, and how many removed nodes, are remembered.
	maxRemoved = 1024
	// versionsPerSecond is by how much the version that a restored cluster begins with
	// grows with each second of the clock. It is more than a cluster can write in one.
	versionsPerSecond = 1 << 20
	// maxFirstVersion bounds the version that a restored cluster begins with: JSON
	// in JavaScript has no higher integers.
	maxFirstVersion = 1 << 53
	// maxLockedWrites and maxLockedBytes bound for how long the writes of an entry keep
	// readers waiting: after so many writes, or so many bytes of pages that they have copied,
	// readers have their turn.
	maxLockedWrites = 256
	maxLockedBytes  = 4 << 20
	// A DeleteRange is bounded when it is applied, so all nodes have to agree on these.
	maxRangeKeys  = 10_000  // store.rangeKeys
	maxRangeBytes = 1 << 20 // of keys
	// minViewBytes bounds the memory that the views of clients may keep, or a quarter of the
	// store's data if that is more; with little memory, the budget has less for them.
	minViewBytes = 64 << 20
	// defaultWatchBytes bounds the history that watches can go back to.
	defaultWatchBytes = 64 << 20
	// maxRoom bounds the memory, in writes, that is kept for the writes of the next entry.
	maxRoom = 16 << 10
)

// firstClock is before this program was written: a clock that shows an earlier time was
// never set.
var firstClock = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// store is the state machine. The log alone determines its state, and a snapshot holds all
// of it. Only the loop changes it; what other goroutines read, it changes under mu. Any goroutine
// may open a view, which needs mu for writing.
type store struct {
	// The state that the loop alone reads, and so without a lock.
	index   uint64 // of the last entry applied
	term    uint64 // of the last entry applied
	conf    *raftpb.ConfState
	members map[uint64]*kvpb.Node // by raft ID: all that conf names
	removed []uint64              // raft IDs, oldest first
	former  []uint64              // ids of nodes that were removed, each once, the last one last
	// founding are the members of the Init that has made this cluster, while it is not done;
	// nil: it is.
	founding []*kvpb.Node
	// joiners are the raft IDs of learners that the leader makes voters once they have caught
	// up, sorted. Never changed: a new slice takes its place.
	joiners   []uint64
	proposers map[uint64]uint64 // by raft ID: the sequence of the last batch applied
	level     uint32            // of the cluster
	sessions  *sessions

	// The state that all read: the loop writes it under mu.
	mu        sync.RWMutex
	clusterID uint64 // 0: in no cluster
	version   uint64 // of the last write applied: they are counted from 0, or from what beginVersions set
	tree      *tree

	// Not part of the state.
	speaks             uint32        // the highest level that this program speaks
	history            *eventHistory // of the last writes
	events             entryEvents   // of the entry that is being applied
	rangeKeys          int           // that a DeleteRange deletes at most: maxRangeKeys, but in tests
	viewBytes          uint64        // in place of minViewBytes, set before the node runs
	clientViews        []*view       // that are open, in the order in which they were opened: mu guards them
	released           uint64        // what views that are closed may have kept, in all: mu guards it
	file               string        // the snapshot in the data directory that it was read from, if it was
	room               []operation   // memory for the writes of an entry
	plantedSameVersion bool          // a bug that the simulator plants: all writes of an entry share a version
	plantedKeyVersions bool          // likewise: a DeleteRange counts a version for each key
	plantedLeftOut     bool          // likewise: of the keys that a DeleteRange has deleted, one is no event
}

func newStore() *store {
	return &store{
		conf:      raftpb.EnsureConfState(nil),
		members:   map[uint64]*kvpb.Node{},
		proposers: map[uint64]uint64{},
		sessions:  newSessions(),
		tree:      newTree(),
		level:     firstLevel,
		speaks:    programLevel,
		history:   newEventHistory(defaultWatchBytes),
		rangeKeys: maxRangeKeys,
		viewBytes: minViewBytes,
	}
}

// get returns the item of a key, as far as this node has applied. The value
// must not be changed. A node in no cluster knows nothing, not even an absence.
func (s *store) get(key []byte) (item, bool, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.clusterID == 0 {
		return item{}, false, errNotInitialized
	}
	it, found := s.tree.get(key)
	return it.kept(), found, nil
}

// result is the answer to one write.
type result struct {
	version       uint64 // of the write itself; after a failed compare that of the key, 0: absent; 0 if tooMany
	deleted       uint32 // keys, of a DeleteRange
	found         bool   // whether the key was there before
	compareFailed bool
	tooMany       bool // a DeleteRange has deleted nothing: the range has too many keys
}

// apply applies the data of a normal entry and says which batch it was and how
// each of its writes went. A batch that was applied before, or whose proposer is no member
// any more, has no results: proposers repeat what seems lost, so a batch may come twice.
func (s *store) apply(data []byte) (proposer, sequence uint64, results []outcome, err error) {
	if len(data) == 0 {
		return 0, 0, nil, nil // the first entry of a term
	}
	b, err := parseBatch(data, s.room, s.speaks)
	if err != nil {
		return 0, 0, nil, fmt.Errorf("decoding a batch: %w", err)
	}
	if b.rise != nil {
		return 0, 0, nil, s.rise(b.rise)
	}
	isMember := s.members[b.proposer] != nil
	if !isMember || b.sequence <= s.proposers[b.proposer] {
		return b.proposer, b.sequence, nil, nil
	}
	s.proposers[b.proposer] = b.sequence

	results = make([]outcome, 0, len(b.writes))
	s.events = newEntryEvents(data)
	for len(results) < len(b.writes) {
		results = s.applySome(b.writes, results)
	}
	s.history.add(&s.events, s.version)
	s.events = entryEvents{}
	clear(b.writes) // lets go of data
	if cap(b.writes) <= maxRoom {
		s.room = b.writes
	}
	return b.proposer, b.sequence, results, nil
}

// applySome applies further writes of a batch, and returns the results with theirs. Before the
// last one it lets go of the lock now and then, so that readers see a part of the batch.
func (s *store) applySome(writes []operation, results []outcome) []outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	end := min(len(results)+maxLockedWrites, len(writes))
	copied := s.tree.copied
	for len(results) < end && s.tree.copied-copied < maxLockedBytes {
		if s.plantedSameVersion && len(results) > 0 {
			s.version--
		}
		w := &writes[len(results)]
		results = append(results, s.applyOnce(w))
		if w.kind == opDeleteRange { // which may be of many keys
			break
		}
	}
	s.endCostlyViews()
	return results
}

// applyOnce applies an operation of a batch. A write with an id is applied the first time,
// gets the same answer each time, and is refused if its session does not know it any more.
func (s *store) applyOnce(w *operation) outcome {
	if w.kind == opNewSession {
		return outcome{err: s.sessions.add(w.session, string(w.owner))}
	}
	if !w.hasID {
		return outcome{result: s.applyWrite(w)}
	}
	ses, err := s.sessions.use(w.session, w.sequence)
	if err != nil {
		return outcome{err: err}
	}
	if r, repeated := ses.answer(w.sequence); repeated {
		return outcome{result: r}
	}
	r := s.applyWrite(w)
	s.sessions.remember(ses, w.sequence, r)
	return outcome{result: r}
}

func (s *store) applyWrite(w *operation) result {
	if w.kind == opDeleteRange {
		return s.deleteRange(rangeOf(w.prefix, w.start, w.end))
	}
	if w.compares {
		it, _ := s.tree.get(w.key)
		if it.version != w.expected {
			return result{version: it.version, compareFailed: true}
		}
	}
	s.version++
	r := result{version: s.version}
	if w.kind == opSet {
		r.found = s.tree.set(w.key, item{w.value, s.version})
		s.events.add(w.key, w.value, s.version, false)
	} else {
		r.found = s.tree.delete(w.key)
		if r.found {
			s.events.add(w.key, nil, s.version, true)
		}
	}
	return r
}

// deleteRange deletes all keys of a range, or none if there are too many.
func (s *store) deleteRange(r keyRange) result {
	var keys [][]byte
	bytes := 0
	for key := range s.tree.from(r.start) {
		if !r.endsAfter(key) {
			break
		}
		bytes += len(key)
		if len(keys) == s.rangeKeys || bytes > maxRangeBytes {
			return result{tooMany: true}
		}
		keys = append(keys, slices.Clone(key)) // the deletion may move it
	}
	s.version++
	s.tree.deleteRange(r)
	if s.plantedKeyVersions {
		s.version += uint64(max(0, len(keys)-1))
	}
	deleted := uint32(len(keys))
	if s.plantedLeftOut && len(keys) > 1 {
		keys = keys[1:]
	}
	s.events.addDeleted(keys, s.version)
	return result{version: s.version, deleted: deleted}
}

// beginVersions sets the version of a restored store to one above all that its cluster has
// ever given out: before the backup, after it, or after another restore of the same
// backup. Nobody knows the highest of these, so the time of the restore stands for it
// (versionAt). The keys keep their versions, for whoever knows the version of a key knows
// its value.
func (s *store) beginVersions(now time.Time) error {
	first := versionAt(now)
	if now.Before(firstClock) {
		return fmt.Errorf("this machine's clock says %s, so it was never set: "+
			"versions begin with the time of a restore; set the clock", clockText(now))
	}
	if first >= maxFirstVersion {
		return fmt.Errorf("this machine's clock says %s: versions begin with the time of a restore, "+
			"and would exceed 2^53; set the clock", clockText(now))
	}
	if s.version >= first {
		return fmt.Errorf("this machine's clock says %s, and the backup is of version %d, which is reached by %s: "+
			"versions begin with the time of a restore, and would be given out again; set the clock. "+
			"If it is right, the one that the cluster was restored by was ahead: "+
			"set this one beyond that time for as long as it takes",
			clockText(now), s.version, clockText(timeOf(s.version)))
	}
	s.version = first
	return nil
}

// beginCluster makes the restored state that of a new cluster, of one voter.
func (s *store) beginCluster(id *kvpb.Identity, self *kvpb.Node, now time.Time) error {
	if err := s.beginVersions(now); err != nil {
		return err
	}
	s.clusterID = id.ClusterId
	s.members = map[uint64]*kvpb.Node{}
	s.removed = nil
	s.former = nil
	s.founding = nil
	s.proposers = map[uint64]uint64{}
	conf := &raftpb.ConfState{Voters: []uint64{id.RaftId}}
	s.configure(conf, []*kvpb.Member{{RaftId: id.RaftId, Node: self}})
	return nil
}

// versionAt returns the version with which a cluster begins that is restored at a time, which
// is not before 1970.
func versionAt(t time.Time) uint64 {
	return uint64(t.Unix())*versionsPerSecond + uint64(t.Nanosecond())*versionsPerSecond/uint64(time.Second)
}

// timeOf returns the time, in whole seconds, from which on versionAt is above a version.
func timeOf(version uint64) time.Time { return time.Unix(int64(version/versionsPerSecond+1), 0) }

func clockText(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// configure makes cs the configuration. It takes the nodes that cs names from the present
// members and from changed; members that cs does not name have been removed, by an operator
// unless their raft IDs are among lost.
func (s *store) configure(cs *raftpb.ConfState, changed []*kvpb.Member, lost ...uint64) {
	s.conf = cs
	members := maps.Clone(s.members)
	for _, m := range changed {
		members[m.RaftId] = m.Node
	}
	named := confIDs(cs)
	for _, id := range slices.Sorted(maps.Keys(members)) {
		if !slices.Contains(named, id) {
			delete(members, id)
			delete(s.proposers, id)
			s.removed = append(s.removed, id)
		}
	}
	s.removed = slices.Clone(s.removed[max(0, len(s.removed)-maxRemoved):])
	before := s.members
	s.members = members // a new map: the old one may have been published
	for _, m := range sortedMembers(before) {
		isLeft := len(s.raftIDsOf(m.Node.Id)) == 0
		if isLeft && !slices.Contains(lost, m.RaftId) {
			s.addFormer(m.Node.Id)
		}
	}
	s.followJoiners(changed)
	s.endFounding()
}

// followJoiners notes who has asked to join, and forgets who is no learner any more, or of whom
// a change says that it shall stay one.
func (s *store) followJoiners(changed []*kvpb.Member) {
	joiners := slices.Clone(s.joiners)
	for _, m := range changed {
		joiners = slices.DeleteFunc(joiners, func(id uint64) bool { return id == m.RaftId })
		if m.Promote {
			joiners = append(joiners, m.RaftId)
		}
	}
	learners := slices.Concat(s.conf.GetLearners(), s.conf.GetLearnersNext())
	joiners = slices.DeleteFunc(joiners, func(id uint64) bool { return !slices.Contains(learners, id) })
	slices.Sort(joiners)
	s.joiners = slices.Compact(joiners)
}

// endFounding forgets the members of the Init once it is done, or once an operator has changed
// the membership meanwhile: has added a node that the Init does not name, removed one that it
// names, or made some of them voters. The Init itself makes all of them voters in one change.
// From then on the same Init changes nothing: it compares.
func (s *store) endFounding() {
	if isJoint(s.conf) {
		return
	}
	hasOtherVoters := len(s.conf.GetVoters()) > 1
	isAlone := len(s.founding) == 1
	if hasOtherVoters || isAlone || s.wasChangedByOperator() {
		s.founding = nil
	}
}

// wasChangedByOperator reports whether a node is a member that the Init does not name, or one
// that it names has been removed.
func (s *store) wasChangedByOperator() bool {
	for _, m := range s.members {
		if !containsNode(s.founding, m) {
			return true
		}
	}
	wasRemoved := func(m *kvpb.Node) bool { return slices.Contains(s.former, m.Id) }
	return slices.ContainsFunc(s.founding, wasRemoved)
}

// carriesOn reports whether an Init of these members has made the cluster and is not done: the
// same Init carries on with it.
func (s *store) carriesOn(members []*kvpb.Node) bool {
	return s.founding != nil && sameNodes(s.founding, members)
}

// addFormer notes that a node is no member any more.
func (s *store) addFormer(nodeID uint64) {
	others := slices.DeleteFunc(slices.Clone(s.former), func(id uint64) bool { return id == nodeID })
	s.former = append(others[max(0, len(others)+1-maxRemoved):], nodeID)
}

// confIDs returns all raft IDs that a configuration names.
func confIDs(cs *raftpb.ConfState) []uint64 {
	ids := slices.Concat(cs.GetVoters(), cs.GetLearners(), cs.GetVotersOutgoing(), cs.GetLearnersNext())
	slices.Sort(ids)
	return slices.Compact(ids)
}

// isJoint reports whether a change of membership is half way.
func isJoint(cs *raftpb.ConfState) bool { return len(cs.GetVotersOutgoing()) > 0 }

// raftIDsOf returns the raft IDs of a node.
func (s *store) raftIDsOf(nodeID uint64) []uint64 { return raftIDsOf(s.members, nodeID) }

// raftIDsOf returns the raft IDs that a node has among members: one, or two while the node
// is taken back.
func raftIDsOf(members map[uint64]*kvpb.Node, nodeID uint64) []uint64 {
	var ids []uint64
	for id, n := range members {
		if n.Id == nodeID {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// install replaces the state by that of another store, which must not be used
// any more. The views of clients end; those of snapshots keep what they have.
func (s *store) install(t *store) {
	s.index = t.index
	s.term = t.term
	s.conf = t.conf
	s.members = t.members
	s.removed = t.removed
	s.former = t.former
	s.founding = t.founding
	s.joiners = t.joiners
	s.proposers = t.proposers
	s.level = t.level
	s.sessions.replace(t.sessions)
	s.file = t.file

	s.mu.Lock()
	defer s.mu.Unlock()
	s.clusterID = t.clusterID
	s.version = t.version
	t.tree.dropped = s.tree.dropped + s.tree.bytes
	t.tree.copied = s.tree.copied
	s.tree = t.tree
	for len(s.clientViews) > 0 { // they would keep all that was here before
		s.endOldestView()
	}
	s.history.reset(s.clusterID, s.version)
}

// sortedMembers returns members by node id, then raft ID: the order in which people see them.
func sortedMembers(members map[uint64]*kvpb.Node) []*kvpb.Member {
	var ms []*kvpb.Member
	for id, n := range members {
		ms = append(ms, &kvpb.Member{RaftId: id, Node: n})
	}
	slices.SortFunc(ms, func(a, b *kvpb.Member) int {
		return cmp.Or(cmp.Compare(a.Node.Id, b.Node.Id), cmp.Compare(a.RaftId, b.RaftId))
	})
	return ms
}

// describeMembers returns the membership as one line for a message.
func describeMembers(cs *raftpb.ConfState, members map[uint64]*kvpb.Node) string {
	var parts []string
	for _, m := range sortedMembers(members) {
		role := "learner"
		switch {
		case slices.Contains(cs.GetVoters(), m.RaftId):
			role = "voter"
		case slices.Contains(cs.GetVotersOutgoing(), m.RaftId):
			role = "leaving" // or becoming a learner
		}
		parts = append(parts, fmt.Sprintf("%d=%s %s", m.Node.Id, m.Node.Address, role))
	}
	return strings.Join(parts, ", ")
}
