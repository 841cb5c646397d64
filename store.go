// The replicated state machine: a sharded map and the little that goes with
// it, and its snapshots.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"container/list"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// numShards bounds how long a view that is read keeps writes waiting: for
	// the copy of a shard. Snapshots are in the order of shards, so which one a key
	// is in can be chosen; shard.go bounds what of one is copied.
	numShards = 1 << 12
	// maxRemoved is how many removed raft IDs are remembered.
	maxRemoved = 1024
	// maxSessions is how many sessions are kept, maxAnswers how many sequences
	// of each are told from new ones. All nodes of a cluster have to agree.
	maxSessions, maxAnswers = 10_000, 1024
	// snapshotFormat is the version of the snapshot's encoding. Any new field needs
	// another one: a node that does not know it would lose it.
	snapshotFormat = 1
	// maxRecordBytes is the largest record that a snapshot may hold: a key and
	// a value at their limits, or a header with maxRemoved removed members.
	maxRecordBytes = 4 << 20
	// maxRest is the longest that whoever writes a snapshot stands aside at a time.
	maxRest = 8 * time.Millisecond
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
		sessions:  map[uint64]*list.Element{}, recent: list.New(),
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
		if it, _, _ := s.shards[shardOf(w.key)].find(hashOf(w.key), w.key); it.version != w.expected {
			return result{version: it.version, compareFailed: true}
		}
	}
	s.version++
	r := result{version: s.version}
	switch w.kind {
	case opSet:
		r.found = s.set(w.key, item{w.value, s.version})
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
	shards   []shard
	replaced map[uint64][]keyItem // by shard
	// rest, if writeTo is not to take all that it can get of processor and disk,
	// is called now and then, with how long it has worked.
	rest func(worked time.Duration)
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

// shard returns the items of a shard whose keys are wanted, in no order. It copies
// what later writes change: into room, as long as there is some. Any goroutine may
// call it.
func (v *view) shard(i uint64, room []byte, wanted func(key []byte) bool) []keyItem {
	v.store.mu.RLock()
	defer v.store.mu.RUnlock()
	sh := &v.shards[i]
	var items []keyItem
	for _, it := range v.replaced[i] {
		if wanted(it.key) {
			items = append(items, it)
		}
	}
	kept := func(b []byte) []byte {
		if len(b) > cap(room)-len(room) {
			return bytes.Clone(b)
		}
		room = append(room, b...)
		return room[len(room)-len(b) : len(room) : len(room)]
	}
	for key, it := range sh.packed {
		if it.version <= v.header.Version && wanted(key) {
			items = append(items, keyItem{kept(key), item{kept(it.value), it.version}})
		}
	}
	for key, it := range sh.others {
		if it.version <= v.header.Version && wanted(key) {
			items = append(items, keyItem{key, it})
		}
	}
	return items
}

func compareKeys(a, b keyItem) int { return bytes.Compare(a.key, b.key) }

// page returns the first keys after a key that have a prefix, in order, as
// many as limit and maxBytes allow but at least one, and whether there are
// more. It passes over all keys of the view.
func (v *view) page(prefix, after string, limit, maxBytes int) (page []keyItem, more bool) {
	size := 0
	var end []byte // if there are more, the first key that cannot be on the page
	cut := func() {
		slices.SortFunc(page, compareKeys)
		n := 0
		for size = 0; n < min(limit, len(page)) && (n == 0 || size+len(page[n].key)+len(page[n].value) <= maxBytes); n++ {
			size += len(page[n].key) + len(page[n].value)
		}
		if n < len(page) {
			end = page[n].key
			page, more = slices.Delete(page, n, len(page)), true
		}
	}
	wanted := func(key []byte) bool {
		return string(key) > after && bytes.HasPrefix(key, []byte(prefix)) && (!more || bytes.Compare(key, end) < 0)
	}
	for i := range uint64(numShards) {
		for _, it := range v.shard(i, nil, wanted) {
			page = append(page, it)
			size += len(it.key) + len(it.value)
		}
		if len(page) > 2*limit+numShards || size > 2*maxBytes {
			cut()
		}
	}
	cut()
	return page, more
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
	room, b := make([]byte, 0, maxShardData), []byte(nil)
	since := time.Now()
	for i := range uint64(numShards) {
		if worked := time.Since(since); v.rest != nil && worked > maxRest/4 {
			v.rest(worked)
			since = time.Now()
		}
		items := v.shard(i, room, func([]byte) bool { return true })
		slices.SortFunc(items, compareKeys)
		for _, it := range items {
			b = appendKeyValue(b[:0], it)
			if _, err := w.Write(b); err != nil {
				return err
			}
		}
	}
	if err := record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{Keys: v.keys}}}); err != nil {
		return err
	}
	return w.flush()
}

// rest waits for as long as writeTo has worked, but for no more than maxRest.
func rest(worked time.Duration) { time.Sleep(min(worked, maxRest)) }

// appendKeyValue appends what writeTo's record makes of a key, without the
// messages: there are many.
func appendKeyValue(b []byte, it keyItem) []byte {
	size := protowire.SizeTag(1) + protowire.SizeBytes(len(it.key)) + protowire.SizeTag(3) + protowire.SizeVarint(it.version)
	if len(it.value) > 0 {
		size += protowire.SizeTag(2) + protowire.SizeBytes(len(it.value))
	}
	b = protowire.AppendVarint(b, uint64(protowire.SizeTag(2)+protowire.SizeBytes(size)))
	b = protowire.AppendVarint(protowire.AppendTag(b, 2, protowire.BytesType), uint64(size))
	b = protowire.AppendBytes(protowire.AppendTag(b, 1, protowire.BytesType), it.key)
	if len(it.value) > 0 {
		b = protowire.AppendBytes(protowire.AppendTag(b, 2, protowire.BytesType), it.value)
	}
	return appendVarint(b, 3, it.version)
}

// parseKeyValue parses what appendKeyValue has appended, behind its length.
func parseKeyValue(b []byte) (it keyItem, ok bool) {
	f := fields{rest: b}
	if !f.next() || f.num != 2 || f.b == nil || len(f.rest) > 0 {
		return it, false
	}
	for f = (fields{rest: f.b}); len(f.rest) > 0; {
		switch ok := f.next(); {
		case ok && f.num == 1 && f.b != nil:
			it.key = f.b
		case ok && f.num == 2 && f.b != nil:
			it.value = f.b
		case ok && f.num == 3 && f.b == nil:
			it.version = f.v
		default:
			return it, false
		}
	}
	return it, utf8.Valid(it.key)
}

// readSnapshot reads a snapshot into a new store, or says why it is none.
func readSnapshot(r io.Reader) (*store, error) {
	return scanSnapshot(r, func(s *store, it keyItem, _ uint64) { s.set(it.key, it.item) })
}

// scanSnapshot gives the keys of a snapshot, and how many there shall be, to
// take, which keeps none of it, and all else to a new store.
func scanSnapshot(r io.Reader, take func(*store, keyItem, uint64)) (*store, error) {
	frames := newFrameReader(r)
	br := bufio.NewReaderSize(frames, 64<<10)
	var b []byte // holds what next has read
	next := func() (it keyItem, rec *kvpb.SnapshotRecord, err error) {
		size, err := binary.ReadUvarint(br)
		if err == nil && size > maxRecordBytes {
			err = errors.New("a record is too long")
		}
		if err == nil {
			if size > uint64(cap(b)) {
				b = make([]byte, size)
			}
			b = b[:size]
			_, err = io.ReadFull(br, b)
		}
		if err != nil {
			return it, nil, fmt.Errorf("snapshot, offset %d: %w", frames.offset, noEOF(err))
		}
		if it, ok := parseKeyValue(b); ok {
			return it, nil, nil
		}
		rec = &kvpb.SnapshotRecord{}
		if err := proto.Unmarshal(b, rec); err != nil {
			return it, nil, fmt.Errorf("snapshot, before offset %d: %w", frames.offset, err)
		}
		return it, rec, nil
	}
	_, rec, err := next()
	if err != nil {
		return nil, err
	}
	s, header := newStore(), rec.GetHeader()
	if err := s.restoreHeader(header); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	keys, shard, last := uint64(0), uint64(0), []byte(nil)
	for {
		it, rec, err := next()
		if err != nil {
			return nil, err
		}
		if rec == nil {
			before := shard
			shard = shardOf(it.key)
			if len(it.key) == 0 || len(it.key) > maxKeyBytes || len(it.value) > maxValueBytes || it.version == 0 || it.version > s.version || shard < before || shard == before && bytes.Compare(it.key, last) <= 0 {
				return nil, fmt.Errorf("snapshot: key %d is invalid, or out of place: they are sorted, and none is there twice", keys+1)
			}
			keys, last = keys+1, append(last[:0], it.key...)
			take(s, it, header.Keys)
			continue
		}
		switch rec := rec.Record.(type) {
		case *kvpb.SnapshotRecord_Session:
			if err := s.restoreSession(rec.Session); err != nil || keys > 0 {
				return nil, fmt.Errorf("snapshot: session %d: %w", len(s.sessions)+1, cmp.Or(err, errors.New("it follows a key")))
			}
		case *kvpb.SnapshotRecord_Footer:
			if n := uint64(len(s.sessions)); rec.Footer.Keys != keys || header.Keys != keys || header.Sessions != n {
				return nil, fmt.Errorf("snapshot: it has %d sessions and %d keys, its header says %d and %d, its footer %d keys", n, keys, header.Sessions, header.Keys, rec.Footer.Keys)
			}
			if _, err := br.ReadByte(); err != io.EOF {
				return nil, fmt.Errorf("snapshot: something follows its footer: %v", err)
			}
			return s, nil
		default:
			return nil, errors.New("snapshot: a record of an unknown kind, or a key with a field that this node does not know")
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
