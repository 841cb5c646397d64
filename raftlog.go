// The log that raft reads, its entries as kv.proto has them, and what raft logs.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// raftLog is raft's Storage. Only the loop uses it. Entries are never changed
// once they are in it, and slices of them that it gave away stay as they were.
type raftLog struct {
	hard      *raftpb.HardState
	conf      *raftpb.ConfState // raft asks for it only when it starts
	prevIndex uint64            // the entry before the first: compacted
	prevTerm  uint64
	entries   []*raftpb.Entry
	bytes     uint64 // that the entries take in memory
	dropped   int    // entries that still take memory, though they are compacted
	snapshot  func() *raftpb.Snapshot
	// stale: raft has taken in entries of a leader since its last Ready, and the log lacks
	// them; or one of this node's, if proposeEmpty says so. They may replace some that it
	// holds. (A snapshot is drained at once: stepSnapshot.)
	stale bool
}

// InitialState implements raft.Storage.
func (l *raftLog) InitialState() (*raftpb.HardState, *raftpb.ConfState, error) {
	return l.hard, raftpb.EnsureConfState(l.conf), nil
}

// Entries implements raft.Storage.
func (l *raftLog) Entries(lo, hi, maxSize uint64) ([]*raftpb.Entry, error) {
	if lo <= l.prevIndex {
		return nil, raft.ErrCompacted
	}
	if hi > l.last()+1 {
		return nil, raft.ErrUnavailable
	}
	from, to := lo-l.prevIndex-1, hi-l.prevIndex-1
	end := from
	for size := uint64(0); end < to; end++ {
		size += entryBytes(l.entries[end])
		if size > maxSize && end > from {
			break
		}
	}
	return l.entries[from:end:end], nil
}

// Term implements raft.Storage.
func (l *raftLog) Term(i uint64) (uint64, error) {
	switch {
	case i < l.prevIndex:
		return 0, raft.ErrCompacted
	case i == l.prevIndex:
		return l.prevTerm, nil
	case i > l.last():
		return 0, raft.ErrUnavailable
	}
	return l.entries[i-l.prevIndex-1].GetTerm(), nil
}

// FirstIndex implements raft.Storage.
func (l *raftLog) FirstIndex() (uint64, error) { return l.prevIndex + 1, nil }

// LastIndex implements raft.Storage.
func (l *raftLog) LastIndex() (uint64, error) { return l.last(), nil }

// Snapshot implements raft.Storage: the state as applied at this moment.
func (l *raftLog) Snapshot() (*raftpb.Snapshot, error) { return l.snapshot(), nil }

func (l *raftLog) last() uint64 { return l.prevIndex + uint64(len(l.entries)) }

// entryOverhead is what an entry takes in memory besides its data, about.
const entryOverhead = 144

// memoryBytes is what an entry takes in memory.
func memoryBytes(e *raftpb.Entry) uint64 { return uint64(len(e.GetData())) + entryOverhead }

// entryBytes is what an entry counts for against limits of messages.
func entryBytes(e *raftpb.Entry) uint64 { return uint64(len(e.GetData())) + 16 }

// bytesTo is bytes, of the entries up to an index.
func (l *raftLog) bytesTo(index uint64) uint64 {
	bytes := l.bytes
	for i := len(l.entries) - 1; i >= 0 && l.entries[i].GetIndex() > index; i-- {
		bytes -= memoryBytes(l.entries[i])
	}
	return bytes
}

// append adds entries, in place of those that have the same index or a later one.
func (l *raftLog) append(entries []*raftpb.Entry) error {
	if len(entries) == 0 {
		return nil
	}
	first := entries[0].GetIndex()
	if first <= l.prevIndex || first > l.last()+1 {
		return fmt.Errorf("appending entry %d to a log of %d to %d", first, l.prevIndex+1, l.last())
	}
	keep := first - l.prevIndex - 1
	for _, e := range l.entries[keep:] {
		l.bytes -= memoryBytes(e)
	}
	if keep < uint64(len(l.entries)) {
		l.entries = l.entries[:keep:keep] // what is replaced may be in use
	}
	for _, e := range entries {
		l.bytes += memoryBytes(e)
	}
	l.entries = append(l.entries, entries...)
	return nil
}

// reset drops all entries: the log starts after a snapshot.
func (l *raftLog) reset(snap *raftpb.Snapshot) {
	m := snap.GetMetadata()
	l.prevIndex = m.GetIndex()
	l.prevTerm = m.GetTerm()
	l.conf = m.GetConfState()
	l.entries = nil
	l.bytes = 0
	l.dropped = 0
}

// compact drops the oldest entries, none after index, until the log has at
// most limit bytes.
func (l *raftLog) compact(limit, index uint64) {
	n := 0
	for n < len(l.entries) && l.bytes > limit && l.prevIndex < index {
		l.bytes -= memoryBytes(l.entries[n])
		l.prevIndex = l.entries[n].GetIndex()
		l.prevTerm = l.entries[n].GetTerm()
		n++
	}
	l.entries = l.entries[n:]
	l.dropped += n
	if l.dropped > len(l.entries)/8 { // not each time: the log may be long
		l.entries = slices.Clone(l.entries) // frees the dropped ones
		l.dropped = 0
	}
}

// toWire makes raft's messages those of kv.proto.
func toWire(ms []*raftpb.Message) []*kvpb.RaftMessage {
	out := make([]*kvpb.RaftMessage, len(ms))
	for i, m := range ms {
		w := &kvpb.RaftMessage{
			Type:       kvpb.RaftMessageType(m.GetType() + 1),
			Term:       m.GetTerm(),
			LogTerm:    m.GetLogTerm(),
			Index:      m.GetIndex(),
			Commit:     m.GetCommit(),
			Reject:     m.GetReject(),
			RejectHint: m.GetRejectHint(),
			Context:    m.GetContext(),
		}
		for _, e := range m.GetEntries() {
			w.Entries = append(w.Entries, wireEntry(e))
		}
		out[i] = w
	}
	return out
}

// fromWire makes messages of kv.proto raft's, between the two ends of the
// stream whatever they say themselves. They share their fields.
func fromWire(ms []*kvpb.RaftMessage, h *kvpb.Hello) []inbound {
	out := make([]inbound, len(ms))
	for i, w := range ms {
		m := &raftpb.Message{
			Type:       raftpb.MessageType(w.Type - 1).Enum(),
			From:       &h.From.RaftId,
			To:         &h.To.RaftId,
			Term:       &w.Term,
			LogTerm:    &w.LogTerm,
			Index:      &w.Index,
			Commit:     &w.Commit,
			Reject:     &w.Reject,
			RejectHint: &w.RejectHint,
			Context:    w.Context,
		}
		for _, e := range w.Entries {
			m.Entries = append(m.Entries, raftEntry(e))
		}
		out[i] = inbound{m: m, hello: h}
	}
	return out
}

// wireEntry and raftEntry turn raft's entries into kv.proto's and back.
func wireEntry(e *raftpb.Entry) *kvpb.Entry {
	return &kvpb.Entry{Term: e.GetTerm(), Index: e.GetIndex(), Type: kvpb.EntryType(e.GetType()), Data: e.GetData()}
}

func raftEntry(e *kvpb.Entry) *raftpb.Entry {
	return &raftpb.Entry{Term: &e.Term, Index: &e.Index, Type: raftpb.EntryType(e.Type).Enum(), Data: e.Data}
}

func wireHardState(h *raftpb.HardState) *kvpb.HardState {
	return &kvpb.HardState{Term: h.GetTerm(), Vote: h.GetVote(), Commit: h.GetCommit()}
}

// raftPanic is what raft panics with when its state contradicts itself.
type raftPanic string

// raftLogger writes raft's log to ours. What raft says of each election and message is for
// debugging, its warnings, too: they name nodes by raft IDs, and what an operator has to know of
// them, this program says itself.
type raftLogger struct{ log *slog.Logger }

func (l *raftLogger) printf(level slog.Level, format string, v []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "raft: "+fmt.Sprintf(format, v...))
	}
}

func (l *raftLogger) Debug(v ...any) { l.Debugf("%s", fmt.Sprint(v...)) }

func (l *raftLogger) Debugf(f string, v ...any) { l.printf(slog.LevelDebug, f, v) }

func (l *raftLogger) Info(v ...any) { l.Infof("%s", fmt.Sprint(v...)) }

func (l *raftLogger) Infof(f string, v ...any) { l.printf(slog.LevelDebug, f, v) }

func (l *raftLogger) Warning(v ...any) { l.Warningf("%s", fmt.Sprint(v...)) }

func (l *raftLogger) Warningf(f string, v ...any) { l.printf(slog.LevelDebug, f, v) }

func (l *raftLogger) Error(v ...any) { l.Errorf("%s", fmt.Sprint(v...)) }

func (l *raftLogger) Errorf(f string, v ...any) { l.printf(slog.LevelError, f, v) }

func (l *raftLogger) Fatal(v ...any) { l.Panic(v...) }

func (l *raftLogger) Fatalf(f string, v ...any) { l.Panicf(f, v...) }

func (l *raftLogger) Panic(v ...any) { panic(raftPanic(fmt.Sprint(v...))) }

func (l *raftLogger) Panicf(f string, v ...any) { panic(raftPanic(fmt.Sprintf(f, v...))) }
