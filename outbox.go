// What a turn sends to peers.

package main

import (
	"encoding/binary"

	"go.etcd.io/raft/v3/raftpb"
)

// outbox is what a turn sends to peers at its end.
type outbox struct {
	messages    []peerMessages
	readContext uint64 // highest read context sent with a heartbeat in this term
	askedAt     uint64 // tick in which a peer last asked this leader for something
}

// peerMessages is what one turn sends to one life of a peer.
type peerMessages struct {
	to, life uint64
	ms       []*raftpb.Message
}

// send queues a message of raft for the end of the turn.
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
	to, life := m.GetTo(), n.peers.lives[m.GetTo()]
	for i := range n.outbox.messages {
		if o := &n.outbox.messages[i]; o.to == to && o.life == life {
			if last := len(o.ms) - 1; covers(m, o.ms[last]) {
				o.ms = o.ms[:last]
			}
			o.ms = append(o.ms, m)
			return
		}
	}
	n.outbox.messages = append(n.outbox.messages, peerMessages{to, life, []*raftpb.Message{m}})
}

// covers reports whether a message says all that the one before it says: a
// later answer to an append, or an append from the same place in the log.
func covers(m, before *raftpb.Message) bool {
	if m.GetType() != before.GetType() || m.GetTerm() != before.GetTerm() || m.GetReject() || before.GetReject() {
		return false
	}
	switch m.GetType() {
	case raftpb.MsgAppResp:
		return m.GetIndex() >= before.GetIndex()
	case raftpb.MsgApp:
		return len(before.GetEntries()) == 0 && m.GetIndex() == before.GetIndex() && m.GetCommit() >= before.GetCommit()
	}
	return false
}

// mayWait reports whether messages say only what is committed: the next append
// says so, too, or else they go with the next tick. That halves the messages of
// a single client. But a peer that has asked for something waits for them.
func (n *node) mayWait(ms []*raftpb.Message) bool {
	return len(ms) == 1 && ms[0].GetType() == raftpb.MsgApp && len(ms[0].GetEntries()) == 0 && n.clock.now-n.outbox.askedAt > n.electionTicks()
}

// flush gives each peer its messages, all of them or all that cannot wait.
func (n *node) flush(all bool) {
	out := n.outbox.messages
	n.outbox.messages = nil
	for _, o := range out {
		if !all && n.mayWait(o.ms) {
			n.outbox.messages = append(n.outbox.messages, o)
		} else {
			n.net.send(o.to, o.life, o.ms)
		}
	}
	n.closeViews()
	n.in.release(n.calls.takeEnded())
}
