// The replicated state machine: a sharded map and the little that goes with it.

package main

import (
	"bytes"
	"cmp"
	"container/list"
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
	// numShards bounds how long a view that is read keeps writes waiting: for
	// the copy of a shard. Snapshots are in the order of shards, so which one a key
	// is in can be chosen; shard.go bounds what of one is copied.
	numShards = 1 << 12
	// maxRemoved is how many removed raft IDs, and how many removed nodes, are remembered.
	maxRemoved = 1024
	// versionsPerSecond is by how much the version that a restored cluster begins
	// with grows in a second: no cluster writes so much.
	versionsPerSecond = 1 << 20
	// maxFirstVersion bounds the version that a restored cluster begins with: JSON
	// in JavaScript has no higher integers.
	maxFirstVersion = 1 << 53
	// maxRoom is for how many writes of an entry memory is kept.
	maxRoom = 16 << 10
)

// item is a value and the version of the write that set it.
type item struct {
	value   []byte
	version uint64
}

// keyItem is an item with its key.
type keyItem struct {
	key []byte
	item
}

// firstClock is before this program was written: a clock that shows an earlier time was
// never set.
var firstClock = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// store is the state that the log determines; a snapshot holds all of it.
//
// mu guards the fields below it: readers hold it shared, the loop alone writes.
// The fields above it are the loop's alone.
type store struct {
	index     uint64 // of the last entry applied
	term      uint64 // of the last entry applied
	version   uint64 // of the last write applied: a count of them, from beginVersions on
	conf      *raftpb.ConfState
	members   map[uint64]*kvpb.Node // by raft ID: all that conf names
	removed   []uint64              // raft IDs, oldest first
	former    []uint64              // ids of nodes that were removed, each once, the last one last
	proposers map[uint64]uint64     // by raft ID: the last batch applied
	file      string                // that it was read from, if that is in the data directory
	sessions  map[uint64]*list.Element
	unused    *list.List // of all *session without answers, the oldest first
	recent    *list.List // of all others, the one used the longest ago first
	// maxSessions and maxAnswers, but for the simulator, which may also have all
	// writes of an entry share a version.
	sessionLimit, answerLimit int
	sameVersion               bool
	room                      []operation // for the writes of an entry

	mu        sync.RWMutex
	clusterID uint64 // 0: in no cluster
	shards    []shard
	keys      uint64
	bytes     uint64  // of all keys and values
	views     []*view // of these shards
}

func newStore() *store {
	return &store{
		conf:      raftpb.EnsureConfState(nil),
		members:   map[uint64]*kvpb.Node{},
		proposers: map[uint64]uint64{},
		sessions:  map[uint64]*list.Element{}, unused: list.New(), recent: list.New(),
		sessionLimit: maxSessions, answerLimit: maxAnswers,
		shards: make([]shard, numShards),
	}
}

// shardOf is FNV-1a, folded: the same on every machine and in every run.
func shardOf[K string | []byte](key K) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(key) {
		h = (h ^ uint64(key[i])) * 1099511628211
	}
	return (h ^ h>>32) % numShards
}

// get returns the item of a key, as far as this node has applied. The value
// must not be changed. A node in no cluster knows nothing, not even an absence.
func (s *store) get(key []byte) (item, bool, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.clusterID == 0 {
		return item{}, false, errNotInitialized
	}
	it, _, found := s.shards[shardOf(key)].find(hashOf(key), key)
	return it.kept(), found, nil
}

// result is the answer to one write.
type result struct {
	version       uint64 // of the write itself; after a failed compare that of the key, 0: absent
	found         bool   // whether the key was there before
	compareFailed bool
}

// apply applies the data of a normal entry and says which batch it was and how
// each of its writes went. A batch that is not fresh has no results.
func (s *store) apply(data []byte) (proposer, sequence uint64, results []outcome, err error) {
	if len(data) == 0 {
		return 0, 0, nil, nil // the first entry of a term
	}
	b, err := parseBatch(data, s.room)
	if err != nil {
		return 0, 0, nil, fmt.Errorf("decoding a batch: %w: if this node is older than its cluster, start a newer one", err)
	}
	if !s.fresh(b.proposer, b.sequence) {
		return b.proposer, b.sequence, nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	results = make([]outcome, len(b.writes))
	for i := range b.writes {
		if s.sameVersion && i > 0 {
			s.version--
		}
		results[i] = s.applyOnce(&b.writes[i])
	}
	if clear(b.writes); cap(b.writes) <= maxRoom {
		s.room = b.writes
	}
	return b.proposer, b.sequence, results, nil
}

// applyOnce applies a write, unless its id says that it was applied before, or
// that nobody can know, or is none that the session's client would use next.
func (s *store) applyOnce(w *operation) outcome {
	if w.kind == opNewSession {
		return outcome{err: s.openSession(w.session)}
	}
	if !w.hasID {
		return outcome{result: s.applyWrite(w)}
	}
	e := s.sessions[w.session]
	if e == nil {
		return outcome{err: errSessionUnknown}
	}
	ses, limit := e.Value.(*session), uint64(s.answerLimit)
	highest := ses.highest()
	if highest > limit && w.sequence <= highest-limit {
		return outcome{err: errSequenceTooOld}
	}
	if w.sequence > highest && w.sequence-highest > limit {
		return outcome{err: errSequenceTooFar}
	}
	s.useSession(e)
	i, found := len(ses.answers), false
	if w.sequence <= highest { // most are above
		i, found = slices.BinarySearchFunc(ses.answers, w.sequence, func(a firstAnswer, sequence uint64) int { return cmp.Compare(a.sequence, sequence) })
	}
	if found {
		return outcome{result: ses.answers[i].result}
	}
	r := s.applyWrite(w)
	if i < len(ses.answers) && len(s.views) > 0 {
		ses.answers = slices.Clip(ses.answers) // has Insert make a copy
	}
	ses.answers = slices.Insert(ses.answers, i, firstAnswer{w.sequence, r})
	for highest = ses.highest(); highest > limit && ses.answers[0].sequence <= highest-limit; {
		ses.answers = ses.answers[1:]
	}
	return outcome{result: r}
}

func (s *store) applyWrite(w *operation) result {
	if w.compares {
		if it, _, _ := s.shards[shardOf(w.key)].find(hashOf(w.key), w.key); it.version != w.expected {
			return result{version: it.version, compareFailed: true}
		}
	}
	s.version++
	r := result{version: s.version}
	if w.kind == opSet {
		r.found = s.set(w.key, item{w.value, s.version})
	} else {
		r.found = s.delete(w.key)
	}
	return r
}

// beginVersions makes the next version of a store that is restored one that the
// cluster has never given out: not before the backup, not after it, nor in
// another life that began with the same backup. So it goes by time. The keys keep
// their versions: whoever knows one knows the value that it is of.
func (s *store) beginVersions(now time.Time) error {
	first := versionAt(now)
	if now.Before(firstClock) {
		return fmt.Errorf("this machine's clock says %s, so it was never set: versions begin with the time of a restore; set the clock", clockText(now))
	}
	if first >= maxFirstVersion {
		return fmt.Errorf("this machine's clock says %s: versions begin with the time of a restore, and would exceed 2^53; set the clock", clockText(now))
	}
	if s.version >= first {
		return fmt.Errorf("this machine's clock says %s, and the backup is of version %d, which is reached by %s: "+
			"versions begin with the time of a restore, and would be given out again; set the clock. "+
			"If it is right, the one that the cluster was restored by was ahead: set this one beyond that time for as long as it takes",
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
	s.proposers = map[uint64]uint64{}
	conf := &raftpb.ConfState{Voters: []uint64{id.RaftId}}
	s.configure(conf, []*kvpb.Member{{RaftId: id.RaftId, Node: self}})
	return nil
}

// versionAt is the version with which a cluster begins that is restored at a time
// since 1970.
func versionAt(t time.Time) uint64 {
	return uint64(t.Unix())*versionsPerSecond + uint64(t.Nanosecond())*versionsPerSecond/uint64(time.Second)
}

// timeOf is when a cluster begins with a version, rounded up to a second.
func timeOf(version uint64) time.Time { return time.Unix(int64(version/versionsPerSecond+1), 0) }

func clockText(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// fresh reports whether a batch is to be applied, and remembers that it was.
// A proposal may come twice: its proposer repeats what seems lost.
func (s *store) fresh(proposer, sequence uint64) bool {
	if s.members[proposer] == nil || sequence <= s.proposers[proposer] {
		return false
	}
	s.proposers[proposer] = sequence
	return true
}

// set makes it the item of a key, and keeps neither.
func (s *store) set(key []byte, it item) (found bool) {
	i, hash := shardOf(key), hashOf(key)
	sh := &s.shards[i]
	old, at, found := sh.find(hash, key)
	s.bytes += uint64(len(it.value)) - uint64(len(old.value))
	if found {
		s.preserve(i, key, old)
		sh.replace(hash, key, at, old, it)
	} else {
		s.keys++
		s.bytes += uint64(len(key))
		sh.add(hash, key, it)
	}
	return found
}

func (s *store) delete(key []byte) (found bool) {
	i, hash := shardOf(key), hashOf(key)
	old, at, found := s.shards[i].find(hash, key)
	if found {
		s.preserve(i, key, old)
		s.keys--
		s.bytes -= uint64(len(key) + len(old.value))
		s.shards[i].remove(hash, key, at)
	}
	return found
}

// preserve keeps what is about to be replaced for the views that show it.
func (s *store) preserve(shard uint64, key []byte, old item) {
	var kept keyItem
	for _, v := range s.views {
		if old.version > v.header.Version {
			continue
		}
		if kept.key == nil { // one copy for all
			kept = keyItem{bytes.Clone(key), old.kept()}
		}
		v.replaced[shard] = append(v.replaced[shard], kept)
	}
}

// configure makes cs the configuration. Members are those that it names: the
// present ones and the given ones; whoever it leaves out has been removed.
func (s *store) configure(cs *raftpb.ConfState, changed []*kvpb.Member) {
	s.conf = cs
	members := maps.Clone(s.members)
	for _, m := range changed {
		members[m.RaftId] = m.Node
	}
	for _, id := range slices.Sorted(maps.Keys(members)) {
		if !slices.Contains(confIDs(cs), id) {
			delete(members, id)
			delete(s.proposers, id)
			s.removed = append(s.removed, id)
		}
	}
	before := s.members
	s.members = members // a new map: the old one may have been published
	s.removed = slices.Clone(s.removed[max(0, len(s.removed)-maxRemoved):])
	for _, m := range sortedMembers(before) {
		if len(s.raftIDsOf(m.Node.Id)) == 0 {
			s.remember(m.Node.Id)
		}
	}
}

// remember notes that a node is no member any more.
func (s *store) remember(nodeID uint64) {
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

// raftIDsOf returns the raft IDs of a node: one, but while a node is replaced.
func (s *store) raftIDsOf(nodeID uint64) []uint64 {
	var ids []uint64
	for id, n := range s.members {
		if n.Id == nodeID {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// install replaces the state by that of another store, which must not be used
// any more. Open views keep what they have.
func (s *store) install(t *store) {
	s.index, s.term, s.version = t.index, t.term, t.version
	s.conf, s.members, s.removed, s.proposers, s.file = t.conf, t.members, t.removed, t.proposers, t.file
	s.former = t.former
	s.sessions, s.unused, s.recent = t.sessions, t.unused, t.recent
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clusterID, s.shards, s.keys, s.bytes, s.views = t.clusterID, t.shards, t.keys, t.bytes, nil
}

// members sorted by node id, then raft ID: the order in which people see them.
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

// describeMembers is the membership in one line of a log.
func describeMembers(cs *raftpb.ConfState, members map[uint64]*kvpb.Node) string {
	var parts []string
	for _, m := range sortedMembers(members) {
		role := "learner"
		switch in, out := slices.Contains(cs.GetVoters(), m.RaftId), slices.Contains(cs.GetVotersOutgoing(), m.RaftId); {
		case in:
			role = "voter"
		case out:
			role = "leaving"
		}
		parts = append(parts, fmt.Sprintf("%d=%s %s", m.Node.Id, m.Node.Address, role))
	}
	return strings.Join(parts, ", ")
}
