// The format of snapshots: views written, and stores read.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"
	"unicode/utf8"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// snapshotFormat is the version of the encoding. A new field needs a new level, not
	// another format: only what programs of all levels have to know is of another format.
	snapshotFormat = 3
	// snapshotPageItems and snapshotPageBytes are what is written between two looks at the
	// clock.
	snapshotPageItems = 4096
	snapshotPageBytes = 256 << 10
	// maxRecordBytes is the largest record that a snapshot may hold: a key and
	// a value at their limits, or a header with maxRemoved removed members.
	maxRecordBytes = 4 << 20
)

func (s *store) header() *kvpb.SnapshotHeader {
	h := &kvpb.SnapshotHeader{
		Format:    snapshotFormat,
		ClusterId: s.clusterID,
		Index:     s.index,
		Term:      s.term,
		Version:   s.version,
		Level:     s.level,
		ConfState: recode(s.conf, &kvpb.ConfState{}),
		Members:   s.describedMembers(),
		Removed:   slices.Clone(s.removed),
		Former:    slices.Clone(s.former),
		Founding:  s.founding,
		Keys:      s.tree.keys,
		Sessions:  uint64(s.sessions.count()),
	}
	for _, id := range slices.Sorted(maps.Keys(s.proposers)) {
		h.Proposers = append(h.Proposers, &kvpb.Proposer{RaftId: id, Sequence: s.proposers[id]})
	}
	return h
}

// describedMembers are the members with all that is replicated of them.
func (s *store) describedMembers() []*kvpb.Member {
	members := sortedMembers(s.members)
	for _, m := range members {
		m.Promote = slices.Contains(s.joiners, m.RaftId)
	}
	return members
}

// recode makes a message of raft's one of kv.proto that has the same fields, or
// the other way round.
func recode[M proto.Message](from proto.Message, to M) M {
	b, _ := proto.Marshal(from) // numbers only: neither fails
	_ = proto.Unmarshal(b, to)
	return to
}

// raftSnapshot returns what raft has to know of a snapshot.
func raftSnapshot(index, term uint64, conf *raftpb.ConfState) *raftpb.Snapshot {
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: &index, Term: &term, ConfState: conf}}
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
	for _, ses := range inOrder(v.sessions) {
		m := &kvpb.Session{Id: ses.id, Highest: ses.highest(), Owner: ses.owner.name}
		for _, a := range ses.answers {
			m.Answers = append(m.Answers, &kvpb.Answer{
				Sequence:      a.sequence,
				Version:       a.version,
				Found:         a.found,
				CompareFailed: a.compareFailed,
				Deleted:       uint64(a.deleted),
				TooMany:       a.tooMany,
			})
		}
		if err := record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Session{Session: m}}); err != nil {
			return err
		}
	}
	if err := v.writeKeys(w); err != nil {
		return err
	}
	if err := record(&kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{Keys: v.header.Keys}}}); err != nil {
		return err
	}
	return w.flush()
}

// writeKeys writes the records of all keys.
func (v *view) writeKeys(w *frameWriter) error {
	var record []byte
	since := time.Now()
	for r, more := (keyRange{}), true; more; {
		if worked := time.Since(since); v.rest != nil && worked > maxRest/4 {
			v.rest(worked)
			since = time.Now()
		}
		var items []keyItem
		var err error
		items, more, err = v.page(r, snapshotPageItems, snapshotPageBytes)
		if err != nil {
			return err
		}
		for _, it := range items {
			record = appendKeyValue(record[:0], it)
			if _, err := w.Write(record); err != nil {
				return err
			}
		}
		if more {
			r = r.after(items[len(items)-1].key)
		}
	}
	return nil
}

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

// snapshotScan is how a snapshot is read. Each field but speaks may be left out.
type snapshotScan struct {
	speaks     uint32                           // a higher level is refused
	countsOnly bool                             // the store does not keep the keys
	check      func(*kvpb.SnapshotHeader) error // may refuse it by its header
	say        func(keys, all uint64)           // is told now and then how many of all keys were read
}

// scanSnapshot reads a snapshot into a new store. It returns the header, too, which has what is
// no part of the state.
func scanSnapshot(r io.Reader, o snapshotScan) (*store, *kvpb.SnapshotHeader, error) {
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
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("snapshot, before offset %d: %w", frames.offset, fmt.Errorf(format, args...))
	}
	_, rec, err := next()
	if err != nil {
		return nil, nil, err
	}
	s, header := newStore(), rec.GetHeader()
	s.speaks = o.speaks
	if err := s.restoreHeader(header); err != nil {
		return nil, nil, invalid("%w", err)
	}
	if o.check != nil {
		if err := o.check(header); err != nil {
			return nil, nil, err
		}
	}
	keys, last, said := uint64(0), []byte(nil), time.Now()
	for {
		it, rec, err := next()
		if err != nil {
			return nil, nil, err
		}
		if rec == nil {
			if !it.isValid(s.version) || bytes.Compare(it.key, last) <= 0 {
				return nil, nil, invalid("key %d is invalid, or out of place: they are sorted, and none is there twice", keys+1)
			}
			keys, last = keys+1, append(last[:0], it.key...)
			if !o.countsOnly {
				s.tree.set(it.key, it.item)
			}
			if o.say != nil && keys%16 == 0 && time.Since(said) > progressEvery {
				said = time.Now()
				o.say(keys, header.Keys)
			}
			continue
		}
		switch rec := rec.Record.(type) {
		case *kvpb.SnapshotRecord_Session:
			if err := s.sessions.restore(rec.Session, s.version); err != nil || keys > 0 {
				return nil, nil, invalid("session %d: %w", s.sessions.count()+1, cmp.Or(err, errors.New("it follows a key")))
			}
		case *kvpb.SnapshotRecord_Footer:
			if n := uint64(s.sessions.count()); rec.Footer.Keys != keys || header.Keys != keys || header.Sessions != n {
				return nil, nil, invalid("it has %d sessions and %d keys, its header says %d and %d, its footer %d keys", n, keys, header.Sessions, header.Keys, rec.Footer.Keys)
			}
			if _, err := br.ReadByte(); err != io.EOF {
				more := errors.New("something follows its footer")
				return nil, nil, fmt.Errorf("snapshot, offset %d: %w", frames.offset, cmp.Or(noEOF(err), more))
			}
			s.tree.keys = keys // also of those that were not kept
			return s, header, nil
		default:
			return nil, nil, invalid("a record of an unknown kind, or a key with a field that this node does not know")
		}
	}
}

// isValid reports whether a store of a version can have the item.
func (it keyItem) isValid(version uint64) bool {
	isKey := len(it.key) > 0 && len(it.key) <= maxKeyBytes
	isVersion := it.version > 0 && it.version <= version
	return isKey && isVersion && len(it.value) <= maxValueBytes
}

// restoreHeader takes over all state but the keys. The configuration has been
// checked when it returns nil.
func (s *store) restoreHeader(h *kvpb.SnapshotHeader) error {
	switch {
	case h == nil:
		return errors.New("it does not start with a header")
	case h.Format > snapshotFormat:
		return fmt.Errorf("%w: it knows format %d, and this is of format %d: start a newer one",
			errLevel, snapshotFormat, h.Format)
	case h.Format != snapshotFormat:
		return fmt.Errorf("its format is %d, this program knows %d: %w", h.Format, snapshotFormat, errUnknownFormat)
	case h.Level > s.speaks:
		return checkLevel("the snapshot", h.Level, s.speaks)
	case len(h.ProtoReflect().GetUnknown()) > 0:
		return fmt.Errorf("%w: the header has a field that it does not know: start a newer one", errLevel)
	case h.ClusterId == 0 || h.Level == 0 || h.Index == 0 || h.Index >= maxCounter || h.Term == 0 || h.Term >= maxCounter || h.Version >= maxCounter || len(h.Removed) > maxRemoved:
		return errors.New("its header is invalid")
	}
	s.clusterID, s.index, s.term, s.version = h.ClusterId, h.Index, h.Term, h.Version
	s.level = h.Level
	s.conf = raftpb.EnsureConfState(recode(h.ConfState, &raftpb.ConfState{}))
	if len(h.Former) > maxRemoved || slices.Contains(h.Former, 0) {
		return errors.New("its header has invalid former members")
	}
	if len(h.Founding) > maxMembers {
		return errors.New("its header has too many members of an Init")
	}
	for _, m := range h.Founding {
		if m.GetId() == 0 {
			return errors.New("its header has an invalid member of an Init")
		}
	}
	s.removed, s.former, s.founding = h.Removed, h.Former, h.Founding
	for _, m := range h.Members {
		if m.GetRaftId() == 0 || m.GetRaftId() >= maxRaftID || m.GetNode().GetId() == 0 || s.members[m.RaftId] != nil {
			return errors.New("its header has an invalid member")
		}
		s.members[m.RaftId] = m.Node
		if m.Promote {
			s.joiners = append(s.joiners, m.RaftId)
		}
	}
	slices.Sort(s.joiners)
	learners := slices.Concat(s.conf.GetLearners(), s.conf.GetLearnersNext())
	isNone := func(id uint64) bool { return !slices.Contains(learners, id) }
	if slices.ContainsFunc(s.joiners, isNone) {
		return errors.New("its header has a member to be promoted that is no learner")
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
