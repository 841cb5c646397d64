// What a turn sends to peers.

package main

import (
	"encoding/binary"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
)

// outbox is what waits to be sent to peers: until the next flush, at the latest at the end
// of the turn. What only says what is committed may wait for the next tick.
type outbox struct {
	messages    []peerMessages
	readContext uint64 // highest read context sent with a heartbeat in this term
	askedAt     uint64 // tick in which a peer last asked this leader for something
}

// peerMessages is what waits for one peer.
type peerMessages struct {
	to uint64 // raft ID
	ms []*raftpb.Message
}

// add queues a message to a peer. A message that covers the one before it takes its
// place.
func (o *outbox) add(m *raftpb.Message) {
	to := m.GetTo()
	i := slices.IndexFunc(o.messages, func(p peerMessages) bool { return p.to == to })
	if i < 0 {
		o.messages = append(o.messages, peerMessages{to: to, ms: []*raftpb.Message{m}})
		return
	}
	p := &o.messages[i]
	last := len(p.ms) - 1
	if covers(m, p.ms[last]) {
		p.ms = p.ms[:last]
	}
	p.ms = append(p.ms, m)
}

// take returns what is to be sent now: all of it, if all or eager; or else all that does
// not only say what is committed. eager: a peer has asked for something within the last
// election timeout, and may wait to hear that it is committed.
func (o *outbox) take(all, eager bool) []peerMessages {
	if all || eager {
		out := o.messages
		o.messages = nil
		return out
	}
	var out, waiting []peerMessages
	for _, p := range o.messages {
		if onlyCommits(p.ms) {
			waiting = append(waiting, p)
		} else {
			out = append(out, p)
		}
	}
	o.messages = waiting
	return out
}

// covers reports whether a message says all that the one before it says: both are appends
// from the same place in the log, and that one, which waited for this one or is of the
// same turn, has no entries. So it is with four of ten messages of a leader under load:
// to send them, too, would cost a call of a single client a tenth more CPU.
func covers(m, before *raftpb.Message) bool {
	areAppends := m.GetType() == raftpb.MsgApp && before.GetType() == raftpb.MsgApp
	if !areAppends || len(before.GetEntries()) > 0 {
		return false
	}
	isSamePlace := m.GetTerm() == before.GetTerm() && m.GetIndex() == before.GetIndex()
	return isSamePlace && m.GetCommit() >= before.GetCommit()
}

// onlyCommits reports whether messages say only what is committed: the next append
// says so, too, or else they go with the next tick. That halves the messages of a
// single client, and brings the CPU that its calls cost all nodes to ×.70.
func onlyCommits(ms []*raftpb.Message) bool {
	if len(ms) > 1 {
		return false
	}
	return ms[0].GetType() == raftpb.MsgApp && len(ms[0].GetEntries()) == 0
}

// send queues a message of raft for the next flush, with what this node adds to it. For a
// MsgSnap it starts a transfer.
func (n *node) send(m *raftpb.Message) {
	switch m.GetType() {
	case raftpb.MsgSnap:
		n.sendSnapshot(m)
		return
	case raftpb.MsgHeartbeat:
		if len(m.GetContext()) == 8 {
			n.outbox.readContext = max(n.outbox.readContext, binary.LittleEndian.Uint64(m.GetContext()))
		}
		n.addToHeartbeat(m)
	case raftpb.MsgVoteResp, raftpb.MsgPreVoteResp: // with what learnCommit wants
		n.tellCommit(m)
	}
	n.outbox.add(m)
}

// flush gives each peer its messages, all of them or all that cannot wait, closes the
// views that nobody sends from, and frees the room of calls that have ended.
func (n *node) flush(all bool) {
	eager := n.clock.now-n.outbox.askedAt <= n.electionTicks()
	for _, p := range n.outbox.take(all, eager) {
		n.net.send(p.to, p.ms)
	}
	n.snapshots.closeUnread()
	n.inbox.release(n.calls.takeEnded())
}
