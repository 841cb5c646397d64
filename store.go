// The replicated state machine: a sharded map and the little that goes with
// it, and its snapshots.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"container/list"
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
	// numShards bounds how long a view that is read keeps writes waiting: for
	// the copy of a shard.
	numShards = 1 << 12
	// maxRemoved is how many removed raft IDs are remembered.
	maxRemoved = 1024
	// maxSessions is how many sessions are kept, maxAnswers how many sequences
	// of each are told from new ones. All nodes of a cluster have to agree.
	maxSessions, maxAnswers = 10_000, 1024
	// snapshotFormat is the version of the snapshot's encoding.
	snapshotFormat = 1
	// maxRecordBytes is the largest record that a snapshot may hold: a key and
	// a value at their limits, or a header with maxRemoved removed members.
	maxRecordBytes = 4 << 20
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
	key string
	item
}

// What a write that carries a request_id can end with besides an answer.
var (
	errSessionUnknown = errors.New("the session was never opened, or has been dropped: the write was not applied now")
	errSequenceTooOld = errors.New("the sequence is too far below the highest of its session: the write was not applied now")
)

// session is what is known of a client's writes. Views share the answers: what
// stands in them is not changed while one is open.
type session struct {
	id      uint64
	answers []firstAnswer // by sequence, the last of them the highest
}

// firstAnswer is the one that repeats of a sequence get, too.
type firstAnswer struct {
	sequence uint64
	result
}

func (s *session) highest() uint64 {
	if len(s.answers) == 0 {
		return 0
	}
	return s.answers[len(s.answers)-1].sequence
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
	file      string                // that it was read from, if that is in the data directory
	sessions  map[uint64]*list.Element
	recent    *list.List // of all *session, the one used the longest ago first
	// maxSessions and maxAnswers, but for the simulator, which may also have all
	// writes of an entry share a version.
	sessionLimit, answerLimit int
	sameVersion               bool
	room                      []kvOp // for the writes of an entry

	mu        sync.RWMutex
	clusterID uint64 // 0: in no cluster
	shards    []map[string]*item
	keys      uint64
	bytes     uint64  // of all keys and values
	views     []*view // of these shards
}

func newStore() *store {
	return &store{
		conf:      raftpb.EnsureConfState(nil),
		members:   map[uint64]*kvpb.Node{},
		proposers: map[uint64]uint64{},
		sessions:  map[uint64]*list.Element{}, recent: list.New(),
		sessionLimit: maxSessions, answerLimit: maxAnswers,
		shards: make([]map[string]*item, numShards),
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
	if it := s.shards[shardOf(key)][string(key)]; it != nil {
		return *it, true, nil
	}
	return item{}, false, nil
}

// size returns the number of keys and the bytes of keys and values.
func (s *store) size() (keys, bytes uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.keys, s.bytes
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
		return 0, 0, nil, fmt.Errorf("%w: if this node is older than its cluster, start a newer one", err)
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
// that nobody can know.
func (s *store) applyOnce(w *kvOp) outcome {
	if !w.hasID {
		return outcome{result: s.applyWrite(w)}
	}
	e := s.sessions[w.session]
	if e == nil {
		return outcome{err: errSessionUnknown}
	}
	s.recent.MoveToBack(e)
	ses, limit := e.Value.(*session), uint64(s.answerLimit)
	highest := ses.highest()
	if highest > limit && w.sequence <= highest-limit {
		return outcome{err: errSequenceTooOld}
	}
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

func (s *store) applyWrite(w *kvOp) result {
	if w.compares {
		version := uint64(0)
		if it := s.shards[shardOf(w.key)][string(w.key)]; it != nil {
			version = it.version
		}
		if version != w.expected {
			return result{version: version, compareFailed: true}
		}
	}
	s.version++
	r := result{version: s.version}
	switch w.kind {
	case opSet:
		r.found = s.set(w.key, item{bytes.Clone(w.value), s.version})
	case opDelete:
		r.found = s.delete(w.key)
	default:
		s.openSession(s.version)
	}
	return r
}

// openSession adds a session, in place of the one used the longest ago if
// there are too many.
func (s *store) openSession(id uint64) {
	if len(s.sessions) >= s.sessionLimit {
		delete(s.sessions, s.recent.Remove(s.recent.Front()).(*session).id)
	}
	s.sessions[id] = s.recent.PushBack(&session{id: id})
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

// set looks a key up once, and allocates nothing for one that is there.
func (s *store) set(key []byte, it item) (found bool) {
	i := shardOf(key)
	s.bytes += uint64(len(it.value))
	if old := s.shards[i][string(key)]; old != nil {
		s.preserve(i, key, old)
		s.bytes -= uint64(len(old.value))
		*old = it
		return true
	}
	s.keys++
	s.bytes += uint64(len(key))
	if s.shards[i] == nil {
		s.shards[i] = map[string]*item{}
	}
	s.shards[i][string(key)] = new(it)
	return false
}

func (s *store) delete(key []byte) (found bool) {
	i := shardOf(key)
	old := s.shards[i][string(key)]
	if old != nil {
		s.preserve(i, key, old)
		delete(s.shards[i], string(key))
		s.keys--
		s.bytes -= uint64(len(key) + len(old.value))
	}
	return old != nil
}

// preserve keeps what is about to be replaced for the views that show it.
func (s *store) preserve(shard uint64, key []byte, old *item) {
	for _, v := range s.views {
		if old.version <= v.header.Version {
			v.replaced[shard] = append(v.replaced[shard], keyItem{string(key), *old})
		}
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

// view is the store at one index, whatever is written since: the items no
// newer than that, and those that have been replaced. It has to be closed. The
// store's mu guards shards and replaced.
type view struct {
	store    *store
	header   *kvpb.SnapshotHeader
	keys     uint64
	sessions []session // as in recent
	shards   []map[string]*item
	replaced map[uint64][]keyItem // by shard
}

// open opens a view. Only the loop may call it.
func (s *store) open() *view {
	v := s.openKeys()
	v.sessions = make([]session, 0, len(s.sessions))
	for e := s.recent.Front(); e != nil; e = e.Next() {
		v.sessions = append(v.sessions, *e.Value.(*session))
	}
	return v
}

// openKeys opens a view without sessions, in no more time than that of one
// write. Only the loop may call it.
func (s *store) openKeys() *view {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := &view{store: s, header: s.header(), keys: s.keys, shards: s.shards, replaced: map[uint64][]keyItem{}}
	s.views = append(s.views, v)
	return v
}

// close lets go of what was preserved. Any goroutine may call it.
func (v *view) close() {
	v.store.mu.Lock()
	defer v.store.mu.Unlock()
	v.store.views = slices.DeleteFunc(v.store.views, func(o *view) bool { return o == v })
}

// shard returns the items of a shard, in no order. Any goroutine may call it.
func (v *view) shard(i uint64) []keyItem {
	v.store.mu.RLock()
	defer v.store.mu.RUnlock()
	items := append(make([]keyItem, 0, len(v.replaced[i])+len(v.shards[i])), v.replaced[i]...)
	for key, it := range v.shards[i] {
		if it.version <= v.header.Version {
			items = append(items, keyItem{key, *it})
		}
	}
	return items
}

func compareKeys(a, b keyItem) int { return strings.Compare(a.key, b.key) }

// page returns the first keys after a key that have a prefix, in order, as
// many as limit and maxBytes allow but at least one, and whether there are
// more. It passes over all keys of the view.
func (v *view) page(prefix, after string, limit, maxBytes int) (page []keyItem, more bool) {
	for i := range uint64(numShards) {
		for _, it := range v.shard(i) {
			if it.key > after && strings.HasPrefix(it.key, prefix) {
				page = append(page, it)
			}
		}
		if len(page) > 2*limit+numShards {
			slices.SortFunc(page, compareKeys)
			page, more = slices.Delete(page, limit, len(page)), true
		}
	}
	slices.SortFunc(page, compareKeys)
	n, size := 0, 0
	for ; n < min(limit, len(page)) && (n == 0 || size+len(page[n].key)+len(page[n].value) <= maxBytes); n++ {
		size += len(page[n].key) + len(page[n].value)
	}
	return page[:n], more || n < len(page)
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
		Removed:  slices.Clone(s.removed),
		Keys:     s.keys,
		Sessions: uint64(len(s.sessions)),
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
func (v *view) writeTo(to io.Writer) error {
	w := newFrameWriter(to)
	record := func(r *kvpb.SnapshotRecord) error {
		_, err := protodelim.MarshalOptions{MarshalOptions: proto.MarshalOptions{Deterministic: true}}.MarshalTo(w, r)
		return err
	}
	if err := record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Header{Header: v.header}}); err != nil {
		return err
	}
	for _, ses := range v.sessions {
		m := &kvpb.Session{Id: ses.id, Highest: ses.highest()}
		for _, a := range ses.answers {
			m.Answers = append(m.Answers, &kvpb.Answer{Sequence: a.sequence, Version: a.version, Found: a.found, CompareFailed: a.compareFailed})
		}
		if err := record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Session{Session: m}}); err != nil {
			return err
		}
	}
	var kv kvpb.KeyValue
	rec := &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_KeyValue{KeyValue: &kv}}
	for i := range uint64(numShards) {
		items := v.shard(i)
		slices.SortFunc(items, compareKeys)
		for _, it := range items {
			kv.Key, kv.Value, kv.Version = it.key, it.value, it.version
			if err := record(rec); err != nil {
				return err
			}
		}
	}
	if err := record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{Keys: v.keys}}}); err != nil {
		return err
	}
	return w.flush()
}

// readSnapshot reads a snapshot into a new store, or says why it is none.
func readSnapshot(r io.Reader) (*store, error) {
	return scanSnapshot(r, func(s *store, it keyItem, _ uint64) { s.set([]byte(it.key), it.item) })
}

// scanSnapshot gives the keys of a snapshot, and how many there shall be, to
// take, and all else to a new store.
func scanSnapshot(r io.Reader, take func(*store, keyItem, uint64)) (*store, error) {
	frames := newFrameReader(r)
	br := bufio.NewReaderSize(frames, 64<<10)
	next := func() (*kvpb.SnapshotRecord, error) {
		var rec kvpb.SnapshotRecord
		if err := (protodelim.UnmarshalOptions{MaxSize: maxRecordBytes}).UnmarshalFrom(br, &rec); err != nil {
			return nil, fmt.Errorf("snapshot, offset %d: %w", frames.offset, noEOF(err))
		}
		return &rec, nil
	}
	rec, err := next()
	if err != nil {
		return nil, err
	}
	s, header := newStore(), rec.GetHeader()
	if err := s.restoreHeader(header); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	keys, shard, last := uint64(0), uint64(0), ""
	for {
		rec, err := next()
		if err != nil {
			return nil, err
		}
		switch rec := rec.Record.(type) {
		case *kvpb.SnapshotRecord_Session:
			if err := s.restoreSession(rec.Session); err != nil || keys > 0 {
				return nil, fmt.Errorf("snapshot: session %d: %w", len(s.sessions)+1, cmp.Or(err, errors.New("it follows a key")))
			}
		case *kvpb.SnapshotRecord_KeyValue:
			kv, before := rec.KeyValue, shard
			shard = shardOf(kv.Key)
			if kv.Key == "" || kv.Version == 0 || kv.Version > s.version || shard < before || shard == before && kv.Key <= last {
				return nil, fmt.Errorf("snapshot: key %d is invalid, or out of place: they are sorted, and none is there twice", keys+1)
			}
			keys, last = keys+1, kv.Key
			take(s, keyItem{kv.Key, item{kv.Value, kv.Version}}, header.Keys)
		case *kvpb.SnapshotRecord_Footer:
			if n := uint64(len(s.sessions)); rec.Footer.Keys != keys || header.Keys != keys || header.Sessions != n {
				return nil, fmt.Errorf("snapshot: it has %d sessions and %d keys, its header says %d and %d, its footer %d keys", n, keys, header.Sessions, header.Keys, rec.Footer.Keys)
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

// restoreHeader takes over all state but the keys. The configuration has been
// checked when it returns nil.
func (s *store) restoreHeader(h *kvpb.SnapshotHeader) error {
	switch {
	case h == nil:
		return errors.New("it does not start with a header")
	case h.Format != snapshotFormat:
		return fmt.Errorf("its format is %d, this program knows %d", h.Format, snapshotFormat)
	case h.ClusterId == 0 || h.Index == 0 || h.Index >= maxCounter || h.Term == 0 || h.Term >= maxCounter || h.Version >= maxCounter || len(h.Removed) > maxRemoved:
		return errors.New("its header is invalid")
	}
	s.clusterID, s.index, s.term, s.version = h.ClusterId, h.Index, h.Term, h.Version
	s.conf = raftSnapshot(h).GetMetadata().GetConfState()
	s.removed = h.Removed
	for _, m := range h.Members {
		if m.GetRaftId() == 0 || m.GetRaftId() >= maxRaftID || m.GetNode().GetId() == 0 || s.members[m.RaftId] != nil {
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

func (s *store) restoreSession(m *kvpb.Session) error {
	if m.Id == 0 || m.Id > s.version || s.sessions[m.Id] != nil || len(s.sessions) >= maxSessions {
		return errors.New("its id is invalid, or it is out of place")
	}
	ses := &session{id: m.Id, answers: make([]firstAnswer, len(m.Answers))}
	for i, a := range m.Answers {
		ses.answers[i] = firstAnswer{a.Sequence, result{a.Version, a.Found, a.CompareFailed}}
		if a.Sequence == 0 || i > 0 && a.Sequence <= m.Answers[i-1].Sequence || a.Version > s.version || a.Version == 0 && !a.CompareFailed {
			return errors.New("an answer is invalid or out of place")
		}
	}
	if ses.highest() != m.Highest || m.Highest > maxAnswers && ses.answers[0].sequence <= m.Highest-maxAnswers {
		return errors.New("its answers are not the last ones")
	}
	s.sessions[m.Id] = s.recent.PushBack(ses)
	return nil
}

// install replaces the state by that of another store, which must not be used
// any more. Open views keep what they have.
func (s *store) install(t *store) {
	s.index, s.term, s.version = t.index, t.term, t.version
	s.conf, s.members, s.removed, s.proposers, s.file = t.conf, t.members, t.removed, t.proposers, t.file
	s.sessions, s.recent = t.sessions, t.recent
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
