// Raft's messages and entries as kv.proto has them, and back.

package main

import (
	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// toWire makes raft's messages those of kv.proto.
func toWire(ms []*raftpb.Message) []*kvpb.RaftMessage {
	out := make([]*kvpb.RaftMessage, len(ms))
	for i, m := range ms {
		out[i] = &kvpb.RaftMessage{
			Type: kvpb.RaftMessageType(m.GetType() + 1), Term: m.GetTerm(), LogTerm: m.GetLogTerm(), Index: m.GetIndex(),
			Commit: m.GetCommit(), Reject: m.GetReject(), RejectHint: m.GetRejectHint(), Context: m.GetContext(),
		}
		for _, e := range m.GetEntries() {
			out[i].Entries = append(out[i].Entries, wireEntry(e))
		}
	}
	return out
}

// fromWire makes messages of kv.proto raft's, between the two ends of the
// stream whatever they say themselves. They share their fields.
func fromWire(ms []*kvpb.RaftMessage, h *kvpb.Hello) []inbound {
	out := make([]inbound, len(ms))
	for i, w := range ms {
		m := &raftpb.Message{
			Type: raftpb.MessageType(w.Type - 1).Enum(), From: &h.From.RaftId, To: &h.To.RaftId, Term: &w.Term, LogTerm: &w.LogTerm,
			Index: &w.Index, Commit: &w.Commit, Reject: &w.Reject, RejectHint: &w.RejectHint, Context: w.Context,
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
