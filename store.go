// The replicated state machine: a sharded map and the little that goes with
// it, and its snapshots.

package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// numShards bounds how much one write copies while a snapshot is open.
	numShards = 1 << 14
	// maxRemoved is how many removed raft IDs are remembered.
	maxRemoved = 1024
	// snapshotFormat is the version of the snapshot's encoding.
	snapshotFormat = 1
	// maxRecordBytes is the largest record that a snapshot may hold: a key and
	// a value at their limits, or a header with maxRemoved removed members.
	maxRecordBytes = 4 << 20
)

// item is a value and the version of the write that set it.
type item struct {
	value   []byte
	version uint64
}

// shard is a part of the map. Its items belong to the views that were opened
// at or after epoch, too, and are cloned before the first write after that.
type shard struct {
	items map[string]item
	epoch uint64
}

// store is the state that the log determines; a snapshot holds all of it.
//
// mu guards the fields below it: readers hold it shared, the loop alone writes.
// The fields above it are the loop's alone.
type store struct {
	index     uint64 // of the last entry applied
	term      uint64 // of the last entry applied
	version   uint64 // count of all writes applied
	conf      *raftpb.ConfState
	members   map[uint64]*kvpb.Node // by raft ID: all that conf names
	removed   []uint64              // raft IDs, oldest first
	proposers map[uint64]uint64     // by raft ID: the last batch applied

	mu        sync.RWMutex
	clusterID uint64 // 0: in no cluster
	shards    []shard
	keys      uint64
	bytes     uint64 // of all keys and values
	epoch     uint64 // of the newest view
	openViews int
}

func newStore() *store {
	return &store{
		conf:      raftpb.EnsureConfState(nil),
		members:   map[uint64]*kvpb.Node{},
		proposers: map[uint64]uint64{},
		shards:    make([]shard, numShards),
	}
}

// shardOf is FNV-1a, folded: the same on every machine and in every run.
func shardOf(key string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(key) {
		h = (h ^ uint64(key[i])) * 1099511628211
	}
	return (h ^ h>>32) % numShards
}

// get returns the item of a key, as far as this node has applied. The value
// must not be changed. A node in no cluster knows nothing, not even an absence.
func (s *store) get(key string) (item, bool, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.clusterID == 0 {
		return item{}, false, errNotInitialized
	}
	it, ok := s.shards[shardOf(key)].items[key]
	return it, ok, nil
}

// size returns the number of keys and the bytes of keys and values.
func (s *store) size() (keys, bytes uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.keys, s.bytes
}

// result is the outcome of one write.
type result struct {
	version uint64 // of the write itself
	found   bool   // whether the key was there before
}

// apply applies the data of a normal entry and says which batch it was and how
// each of its writes went. A batch that is not fresh has no results.
func (s *store) apply(data []byte) (proposer, sequence uint64, results []result, err error) {
	if len(data) == 0 {
		return 0, 0, nil, nil // the first entry of a term
	}
	var b kvpb.Batch
	if err := proto.Unmarshal(data, &b); err != nil {
		return 0, 0, nil, fmt.Errorf("decoding a batch: %w", err)
	}
	if !s.fresh(b.Proposer, b.Sequence) {
		return b.Proposer, b.Sequence, nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	results = make([]result, len(b.Writes))
	for i, w := range b.Writes {
		s.version++
		results[i].version = s.version
		switch op := w.Operation.(type) {
		case *kvpb.Write_Set:
			results[i].found = s.set(op.Set.Key, item{op.Set.Value, s.version})
		case *kvpb.Write_Delete:
			results[i].found = s.delete(op.Delete.Key)
		default:
			return 0, 0, nil, errors.New("a write of an unknown kind: this node is older than its cluster")
		}
	}
	return b.Proposer, b.Sequence, results, nil
}

// fresh reports whether a batch is to be applied, and remembers that it was.
// A proposal may come twice: its proposer repeats what seems lost.
func (s *store) fresh(proposer, sequence uint64) bool {
	if s.members[proposer] == nil || sequence <= s.proposers[proposer] {
		return false
	}
	s.proposers[proposer] = sequence
	return true
}

// writable returns the items of the key's shard, which no view shares.
func (s *store) writable(key string) map[string]item {
	sh := &s.shards[shardOf(key)]
	if sh.items == nil {
		sh.items = map[string]item{}
	} else if s.openViews > 0 && sh.epoch < s.epoch {
		sh.items = maps.Clone(sh.items)
	}
	sh.epoch = s.epoch
	return sh.items
}

func (s *store) set(key string, it item) (found bool) {
	items := s.writable(key)
	old, found := items[key]
	if found {
		s.bytes -= uint64(len(old.value))
	} else {
		s.keys++
		s.bytes += uint64(len(key))
	}
	s.bytes += uint64(len(it.value))
	items[key] = it
	return found
}

func (s *store) delete(key string) (found bool) {
	old, found := s.shards[shardOf(key)].items[key]
	if found {
		delete(s.writable(key), key)
		s.keys--
		s.bytes -= uint64(len(key) + len(old.value))
	}
	return found
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
	s.members = members // a new map: the old one may have been published
	s.removed = slices.Clone(s.removed[max(0, len(s.removed)-maxRemoved):])
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

// view is the store at one index, whatever is written since. It has to be closed.
type view struct {
	header *kvpb.SnapshotHeader
	shards []shard
	keys   uint64
	store  *store
}

// open opens a view. Only the loop may call it.
func (s *store) open() *view {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.openViews++
	s.epoch++
	return &view{header: s.header(), shards: slices.Clone(s.shards), keys: s.keys, store: s}
}

// close lets writes go on in place again. Any goroutine may call it, once.
func (v *view) close() {
	v.store.mu.Lock()
	defer v.store.mu.Unlock()
	v.store.openViews--
}

func (s *store) header() *kvpb.SnapshotHeader {
	h := &kvpb.SnapshotHeader{
		Format:    snapshotFormat,
		ClusterId: s.clusterID,
		Index:     s.index,
		Term:      s.term,
		Version:   s.version,
		ConfState: &kvpb.ConfState{
			Voters:         slices.Clone(s.conf.GetVoters()),
			Learners:       slices.Clone(s.conf.GetLearners()),
			VotersOutgoing: slices.Clone(s.conf.GetVotersOutgoing()),
			LearnersNext:   slices.Clone(s.conf.GetLearnersNext()),
			AutoLeave:      s.conf.GetAutoLeave(),
		},
		Removed: slices.Clone(s.removed),
	}
	for _, id := range slices.Sorted(maps.Keys(s.members)) {
		h.Members = append(h.Members, &kvpb.Member{RaftId: id, Node: s.members[id]})
	}
	for _, id := range slices.Sorted(maps.Keys(s.proposers)) {
		h.Proposers = append(h.Proposers, &kvpb.Proposer{RaftId: id, Sequence: s.proposers[id]})
	}
	return h
}

// raftSnapshot returns what raft has to know of a snapshot.
func raftSnapshot(h *kvpb.SnapshotHeader) *raftpb.Snapshot {
	cs := h.GetConfState()
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		Index: new(h.GetIndex()),
		Term:  new(h.GetTerm()),
		ConfState: &raftpb.ConfState{
			Voters:         slices.Clone(cs.GetVoters()),
			Learners:       slices.Clone(cs.GetLearners()),
			VotersOutgoing: slices.Clone(cs.GetVotersOutgoing()),
			LearnersNext:   slices.Clone(cs.GetLearnersNext()),
			AutoLeave:      new(cs.GetAutoLeave()),
		},
	}}
}

// writeTo writes the view as a snapshot. Two stores in the same state write
// the same bytes.
func (v *view) writeTo(w io.Writer) error {
	record := func(r *kvpb.SnapshotRecord) error {
		_, err := protodelim.MarshalOptions{MarshalOptions: proto.MarshalOptions{Deterministic: true}}.MarshalTo(w, r)
		return err
	}
	if err := record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Header{Header: v.header}}); err != nil {
		return err
	}
	var kv kvpb.KeyValue
	rec := &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_KeyValue{KeyValue: &kv}}
	for _, sh := range v.shards {
		for _, key := range slices.Sorted(maps.Keys(sh.items)) {
			it := sh.items[key]
			kv.Key, kv.Value, kv.Version = key, it.value, it.version
			if err := record(rec); err != nil {
				return err
			}
		}
	}
	return record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{Keys: v.keys}}})
}

// readSnapshot reads a snapshot into a new store. It fails on anything that
// writeTo would not have written.
func readSnapshot(r io.Reader) (*store, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	next := func() (*kvpb.SnapshotRecord, error) {
		var rec kvpb.SnapshotRecord
		if err := (protodelim.UnmarshalOptions{MaxSize: maxRecordBytes}).UnmarshalFrom(br, &rec); err != nil {
			return nil, fmt.Errorf("snapshot: %w", noEOF(err))
		}
		return &rec, nil
	}
	rec, err := next()
	if err != nil {
		return nil, err
	}
	s := newStore()
	if err := s.restoreHeader(rec.GetHeader()); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	for last := uint64(0); ; {
		rec, err := next()
		if err != nil {
			return nil, err
		}
		switch rec := rec.Record.(type) {
		case *kvpb.SnapshotRecord_KeyValue:
			kv := rec.KeyValue
			if kv.Key == "" || kv.Version == 0 || kv.Version > s.version || shardOf(kv.Key) < last {
				return nil, fmt.Errorf("snapshot: key %d is invalid or out of place", s.keys+1)
			}
			last = shardOf(kv.Key)
			if s.set(kv.Key, item{kv.Value, kv.Version}) {
				return nil, fmt.Errorf("snapshot: key %d stands there twice", s.keys)
			}
		case *kvpb.SnapshotRecord_Footer:
			if rec.Footer.Keys != s.keys {
				return nil, fmt.Errorf("snapshot: it has %d keys, its footer says %d", s.keys, rec.Footer.Keys)
			}
			if _, err := br.ReadByte(); err != io.EOF {
				return nil, fmt.Errorf("snapshot: something follows its footer: %v", err)
			}
			return s, nil
		default:
			return nil, errors.New("snapshot: a record of an unknown kind")
		}
	}
}

// noEOF makes an end in the middle recognisable as one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// restoreHeader takes over all state but the keys. The configuration has been
// checked when it returns nil.
func (s *store) restoreHeader(h *kvpb.SnapshotHeader) error {
	switch {
	case h == nil:
		return errors.New("it does not start with a header")
	case h.Format != snapshotFormat:
		return fmt.Errorf("its format is %d, this program knows %d", h.Format, snapshotFormat)
	case h.ClusterId == 0 || h.Index == 0 || h.Term == 0 || len(h.Removed) > maxRemoved:
		return errors.New("its header is invalid")
	}
	s.clusterID, s.index, s.term, s.version = h.ClusterId, h.Index, h.Term, h.Version
	s.conf = raftSnapshot(h).GetMetadata().GetConfState()
	s.removed = h.Removed
	for _, m := range h.Members {
		if m.GetRaftId() == 0 || m.GetNode().GetId() == 0 || s.members[m.RaftId] != nil {
			return errors.New("its header has an invalid member")
		}
		s.members[m.RaftId] = m.Node
	}
	for _, p := range h.Proposers {
		if s.members[p.GetRaftId()] == nil {
			return errors.New("its header has an invalid proposer")
		}
		s.proposers[p.RaftId] = p.Sequence
	}
	if ids := confIDs(s.conf); !slices.Equal(ids, slices.Sorted(maps.Keys(s.members))) {
		return errors.New("its members are not those of its configuration")
	}
	return checkConfState(s.conf)
}

// install replaces the state by that of another store, which must not be used
// any more. Open views keep what they have.
func (s *store) install(t *store) {
	s.index, s.term, s.version = t.index, t.term, t.version
	s.conf, s.members, s.removed, s.proposers = t.conf, t.members, t.removed, t.proposers
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range t.shards {
		t.shards[i].epoch = s.epoch // no view shares them
	}
	s.clusterID, s.shards, s.keys, s.bytes = t.clusterID, t.shards, t.keys, t.bytes
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
