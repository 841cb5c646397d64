// Tests of check.go: raft panics over exactly what is refused, and nothing else.

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// rawPeer is raft over a raftLog, with as little around it as it needs.
type rawPeer struct {
	id       uint64
	rn       *raft.RawNode
	log      *raftLog
	conf     *raftpb.ConfState
	applied  uint64
	term     uint64
	readBeat uint64
	sent     []*raftpb.Message
	err      error
}

func newRawPeer(id uint64, cs *raftpb.ConfState, l *raftLog, applied uint64) *rawPeer {
	p := &rawPeer{id: id, log: l, conf: cs, applied: applied}
	l.conf = cs
	l.snapshot = func() *raftpb.Snapshot {
		term, _ := l.Term(p.applied)
		return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(p.applied), Term: new(term), ConfState: p.conf}}
	}
	rn, err := raft.NewRawNode(&raft.Config{
		ID: id, ElectionTick: 10, HeartbeatTick: 1, Storage: l, Applied: applied, AsyncStorageWrites: true,
		MaxSizePerMsg: 1 << 20, MaxInflightMsgs: 4, CheckQuorum: true, PreVote: true, StepDownOnRemoval: true,
		Logger: &raft.DefaultLogger{Logger: log.New(io.Discard, "", 0)},
	})
	if err != nil {
		panic(err)
	}
	p.rn = rn
	p.drain()
	return p
}

// testLog has entries 6 of term 2, 7 and 8 of term 3; committed up to 7.
func testLog() *raftLog {
	l := &raftLog{prevIndex: 5, prevTerm: 2}
	if err := l.append([]*raftpb.Entry{logEntry(6, 2, nil), logEntry(7, 3, nil), logEntry(8, 3, nil)}); err != nil {
		panic(err)
	}
	l.hard = &raftpb.HardState{Term: new(uint64(3)), Vote: new(uint64(0)), Commit: new(uint64(7))}
	return l
}

func voters(ids ...uint64) *raftpb.ConfState {
	return &raftpb.ConfState{Voters: ids, AutoLeave: new(false)}
}

// newFollower is node 1 of 1, 2, 3 in term 3, and hears of leader 2.
func newFollower() *rawPeer {
	p := newRawPeer(1, voters(1, 2, 3), testLog(), 7)
	p.step(message(raftpb.MsgHeartbeat, 2, 3))
	return p
}

// newEmpty is node 1 without a log, before it hears of anybody.
func newEmpty() *rawPeer { return newRawPeer(1, voters(1, 2, 3), &raftLog{}, 0) }

// newLeaderOf is node 1 as the leader of term 4: its log ends at 10, committed
// up to 9, and one read waits for heartbeats.
func newLeaderOf(cs *raftpb.ConfState) *rawPeer {
	p := newRawPeer(1, cs, testLog(), 7)
	if err := p.rn.Campaign(); err != nil {
		panic(err)
	}
	p.drain()
	for _, typ := range []raftpb.MessageType{raftpb.MsgPreVoteResp, raftpb.MsgVoteResp, raftpb.MsgAppResp} {
		for _, from := range []uint64{2, 3} {
			m := message(typ, from, 4)
			if typ == raftpb.MsgAppResp {
				m.Index = new(uint64(9))
			}
			p.step(m)
		}
	}
	_ = p.rn.Propose([]byte("x"))
	p.rn.ReadIndex(make([]byte, readContextBytes))
	p.drain()
	if st := p.rn.BasicStatus(); st.RaftState != raft.StateLeader || st.GetCommit() != 9 || p.log.last() != 10 || p.readBeat != 1 || p.applied != 9 {
		panic(fmt.Sprint("no such leader: ", st, p.log.last(), p.readBeat, p.applied))
	}
	return p
}

func newLeader() *rawPeer { return newLeaderOf(voters(1, 2, 3)) }

// newJointLeader leaves 1, 2, 3 for 1, 2, 4, and has learners.
func newJointLeader() *rawPeer {
	return newLeaderOf(&raftpb.ConfState{Voters: []uint64{1, 2, 4}, VotersOutgoing: []uint64{1, 2, 3}, Learners: []uint64{5}, LearnersNext: []uint64{3}, AutoLeave: new(false)})
}

// newCandidate asks for votes in term 4.
func newCandidate() *rawPeer {
	p := newRawPeer(1, voters(1, 2, 3), testLog(), 7)
	_ = p.rn.Campaign()
	p.drain()
	p.step(message(raftpb.MsgPreVoteResp, 2, 4))
	if st := p.rn.BasicStatus(); st.RaftState != raft.StateCandidate {
		panic(st.RaftState)
	}
	return p
}

// drain does what Readys ask for, as node.ready does.
func (p *rawPeer) drain() {
	for p.err == nil && p.rn.HasReady() {
		rd := p.rn.Ready()
		if term := p.rn.BasicStatus().GetTerm(); term != p.term {
			p.term, p.readBeat = term, 0
		}
		for _, m := range rd.Messages {
			switch m.GetTo() {
			case raft.LocalAppendThread:
				if snap := m.GetSnapshot(); !raft.IsEmptySnap(snap) {
					p.log.reset(snap)
					p.applied, p.conf = snap.GetMetadata().GetIndex(), snap.GetMetadata().GetConfState()
				}
				if p.err = p.log.append(m.GetEntries()); p.err != nil {
					return
				}
				if m.Term != nil {
					p.log.hard = &raftpb.HardState{Term: m.Term, Vote: m.Vote, Commit: m.Commit}
				}
				p.respond(m.GetResponses())
			case raft.LocalApplyThread:
				for _, e := range m.GetEntries() {
					p.apply(e)
				}
				p.respond(m.GetResponses())
			default:
				p.post(m)
			}
		}
	}
}

func (p *rawPeer) respond(ms []*raftpb.Message) {
	for _, m := range ms {
		if m.GetTo() != p.id {
			p.post(m)
		} else if err := p.rn.Step(m); err != nil {
			p.err = err
		}
	}
}

func (p *rawPeer) post(m *raftpb.Message) {
	if m.GetType() == raftpb.MsgHeartbeat && len(m.GetContext()) == 8 {
		p.readBeat = max(p.readBeat, binary.LittleEndian.Uint64(m.GetContext()))
	}
	p.sent = append(p.sent, m)
}

func (p *rawPeer) apply(e *raftpb.Entry) {
	if e.GetIndex() != p.applied+1 {
		p.err = fmt.Errorf("entry %d is applied after %d", e.GetIndex(), p.applied)
		return
	}
	p.applied = e.GetIndex()
	if e.GetType() == raftpb.EntryNormal {
		return
	}
	cc, _, err := decodeConfChange(e)
	if err != nil {
		p.err = err
	} else if _, err := tryConfChange(p.conf, cc); err == nil {
		p.conf = p.rn.ApplyConfChange(cc)
		if !slices.Contains(confIDs(p.conf), p.id) {
			p.err = errNotInitialized // a node that was removed forgets raft
		}
	}
}

func (p *rawPeer) check(m *raftpb.Message) error {
	p.drain()
	st := p.rn.BasicStatus()
	c := &peerCheck{term: st.GetTerm(), commit: st.GetCommit(), log: p.log, leading: st.RaftState == raft.StateLeader, lead: st.Lead, readContext: p.readBeat}
	return c.check(m)
}

func (p *rawPeer) step(ms ...*raftpb.Message) {
	for _, m := range ms {
		_ = p.rn.Step(proto.Clone(m).(*raftpb.Message))
		p.drain()
	}
}

func appendMessage(term, logTerm, index, commit uint64, es ...*raftpb.Entry) *raftpb.Message {
	return message(raftpb.MsgApp, 2, term, func(m *raftpb.Message) {
		*m.LogTerm, *m.Index, *m.Commit, m.Entries = logTerm, index, commit, es
	})
}

func panics(f func()) (p any) {
	defer func() { p = recover() }()
	f()
	return nil
}

// checkRow is a rule of peerCheck: the message that just breaks it, and the
// nearest that does not.
type checkRow struct {
	name          string
	peer          func() *rawPeer
	bad, good     *raftpb.Message
	goodPeer      func() *rawPeer // nil: peer
	contradiction bool
	// What raft does with bad: a panic with this text, or harm. Neither: only
	// this program needs the rule.
	panic string
	harm  func(p *rawPeer) bool
	then  []*raftpb.Message // valid ones that it takes to see the harm
}

func sentSome(typ raftpb.MessageType, f func(m *raftpb.Message) bool) func(p *rawPeer) bool {
	return func(p *rawPeer) bool {
		return slices.ContainsFunc(p.sent, func(m *raftpb.Message) bool { return m.GetType() == typ && f(m) })
	}
}

func confEntry(cc *raftpb.ConfChangeV2) *raftpb.Entry {
	e := logEntry(9, 3, nil)
	e.Type = raftpb.EntryConfChangeV2.Enum()
	e.Data, _ = proto.Marshal(cc)
	return e
}

func confEntryV1(cc *raftpb.ConfChange) *raftpb.Entry {
	e := logEntry(9, 3, nil)
	e.Type = raftpb.EntryConfChange.Enum()
	e.Data, _ = proto.Marshal(cc)
	return e
}

func contextOf(ms ...*kvpb.Member) *raftpb.ConfChangeV2 {
	ctx, _ := proto.Marshal(&kvpb.ConfChangeContext{Members: ms})
	return &raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{addNode(4)}, Context: ctx}
}

func addNode(id uint64) *raftpb.ConfChangeSingle {
	return &raftpb.ConfChangeSingle{Type: raftpb.ConfChangeAddNode.Enum(), NodeId: new(id)}
}

func proposal0(from uint64, b *kvpb.Batch) *raftpb.Message {
	data, _ := proto.Marshal(b)
	return message(raftpb.MsgProp, from, 0, func(m *raftpb.Message) { m.Entries = []*raftpb.Entry{{Type: raftpb.EntryNormal.Enum(), Data: data}} })
}

// proposalOf is a proposal of node 2 with these writes.
func proposalOf(ws ...*kvpb.Write) *raftpb.Message {
	return proposal0(2, &kvpb.Batch{Proposer: 2, Sequence: 1, Writes: ws})
}

// proposalOfSize is one whose entry has n bytes.
func proposalOfSize(n int) *raftpb.Message {
	value := strings.Repeat("x", maxValueBytes)
	last := n - 2*maxValueBytes
	for {
		m := proposalOf(setWrite("k", value), setWrite("k", value[:maxValueBytes-1000]), setWrite("k", value[:last]))
		over := len(m.Entries[0].Data) - n
		if over == 0 {
			return m
		}
		last -= over
	}
}

func checkRows() []checkRow {
	readFrom := func(from uint64, typ raftpb.MessageType, term uint64, contexts ...int) *raftpb.Message {
		return message(typ, from, term, func(m *raftpb.Message) {
			for _, n := range contexts {
				m.Entries = append(m.Entries, &raftpb.Entry{Data: make([]byte, n)})
			}
		})
	}
	read := func(typ raftpb.MessageType, term uint64, contexts ...int) *raftpb.Message {
		return readFrom(2, typ, term, contexts...)
	}
	beat := func(typ raftpb.MessageType, from, term, commit uint64, context ...byte) *raftpb.Message {
		return message(typ, from, term, func(m *raftpb.Message) { *m.Commit, m.Context = commit, context })
	}
	acked := func(from, term, index uint64, reject bool) *raftpb.Message {
		return message(raftpb.MsgAppResp, from, term, func(m *raftpb.Message) { *m.Index, *m.Reject = index, reject })
	}
	field := func(typ raftpb.MessageType, term uint64, set func(m *raftpb.Message, v uint64), v uint64) *raftpb.Message {
		return message(typ, 2, term, func(m *raftpb.Message) { set(m, v) })
	}
	entryTerm := func(index, term uint64) func(p *rawPeer) bool {
		return func(p *rawPeer) bool { got, err := p.log.Term(index); return err == nil && got == term }
	}
	write := setWrite("k", "v")
	withType := func(m *raftpb.Message, typ raftpb.EntryType, data []byte) *raftpb.Message {
		m = proto.Clone(m).(*raftpb.Message)
		m.Entries[0].Type, m.Entries[0].Data = new(typ), data
		return m
	}
	propose := proposalOf(write)
	setTerm := func(m *raftpb.Message, v uint64) { *m.Term = v }
	conf := func(name string, bad, good *raftpb.Entry) checkRow {
		return checkRow{name: "change: " + name, peer: newFollower, bad: appendMessage(3, 3, 8, 7, bad), good: appendMessage(3, 3, 8, 9, good)}
	}
	changes := func(cs ...*raftpb.ConfChangeSingle) *raftpb.ConfChangeV2 { return &raftpb.ConfChangeV2{Changes: cs} }
	v1 := func(id uint64) *raftpb.ConfChange {
		return &raftpb.ConfChange{Type: raftpb.ConfChangeAddNode.Enum(), NodeId: new(id)}
	}
	garbage := func(e *raftpb.Entry) *raftpb.Entry { e.Data = []byte{0xff}; return e }
	rows := []checkRow{
		{name: "term in range", peer: newFollower, bad: field(raftpb.MsgHeartbeat, 0, setTerm, maxCounter), good: field(raftpb.MsgHeartbeat, 0, setTerm, maxCounter-1),
			harm: func(p *rawPeer) bool { return p.rn.BasicStatus().GetTerm() == maxCounter }},
		{name: "term overflows", peer: newFollower, bad: field(raftpb.MsgVote, 0, setTerm, math.MaxUint64), good: field(raftpb.MsgVote, 0, setTerm, 4),
			then: []*raftpb.Message{message(raftpb.MsgTimeoutNow, 2, math.MaxUint64)}, panic: "term should be set"},
		{name: "index in range", peer: newFollower, bad: field(raftpb.MsgVote, 4, func(m *raftpb.Message, v uint64) { *m.Index = v }, maxCounter), good: field(raftpb.MsgVote, 4, func(m *raftpb.Message, v uint64) { *m.Index = v }, maxCounter-1)},
		{name: "log term in range", peer: newFollower, bad: field(raftpb.MsgVote, 4, func(m *raftpb.Message, v uint64) { *m.LogTerm = v }, maxCounter), good: field(raftpb.MsgVote, 4, func(m *raftpb.Message, v uint64) { *m.LogTerm = v }, maxCounter-1)},
		{name: "commit in range", peer: newFollower, bad: appendMessage(3, 3, 8, maxCounter), good: appendMessage(3, 3, 8, maxCounter-1)},
		{name: "hint in range", peer: newLeader, bad: field(raftpb.MsgAppResp, 4, func(m *raftpb.Message, v uint64) { *m.Reject, *m.RejectHint = true, v }, maxCounter), good: field(raftpb.MsgAppResp, 4, func(m *raftpb.Message, v uint64) { *m.Reject, *m.RejectHint = true, v }, maxCounter-1)},

		{name: "a term of 0 is local", peer: newFollower, bad: beat(raftpb.MsgHeartbeat, 3, 0, 0), good: beat(raftpb.MsgHeartbeat, 2, 3, 0),
			harm: func(p *rawPeer) bool { return p.rn.BasicStatus().Lead == 3 }},
		{name: "a proposal has no term", peer: newLeader, bad: field(raftpb.MsgProp, 0, func(m *raftpb.Message, v uint64) { *m.Term, m.Entries = v, propose.Entries }, 5), good: propose,
			harm: func(p *rawPeer) bool { return p.rn.BasicStatus().RaftState == raft.StateFollower }},
		{name: "a question has no term", peer: newLeader, bad: read(raftpb.MsgReadIndex, 4, 16), good: read(raftpb.MsgReadIndex, 0, 16)},
		{name: "a follower is not asked", peer: newFollower, bad: read(raftpb.MsgReadIndex, 0, 16), goodPeer: newLeader, good: read(raftpb.MsgReadIndex, 0, 16)},
		{name: "only the leader answers", peer: newFollower, bad: readFrom(3, raftpb.MsgReadIndexResp, 3, 16), good: read(raftpb.MsgReadIndexResp, 3, 16)},
		{name: "a snapshot comes with its message", peer: newFollower, bad: message(raftpb.MsgSnap, 2, 3), good: message(raftpb.MsgTimeoutNow, 2, 3)},
		{name: "an answer has a term", peer: newFollower, bad: read(raftpb.MsgReadIndexResp, 0, 16), good: read(raftpb.MsgReadIndexResp, 3, 16)},

		{name: "append: log term of the future", peer: newFollower, bad: appendMessage(3, 4, 8, 7), good: appendMessage(4, 4, 8, 7)},
		{name: "append: committed entry behind", peer: newFollower, contradiction: true, bad: appendMessage(3, 1, 6, 7), good: appendMessage(3, 2, 6, 7),
			harm: sentSome(raftpb.MsgAppResp, func(m *raftpb.Message) bool { return !m.GetReject() && m.GetIndex() == 7 })},
		{name: "append: last committed entry", peer: newFollower, contradiction: true, bad: appendMessage(3, 2, 7, 7), good: appendMessage(3, 2, 8, 7),
			harm: sentSome(raftpb.MsgAppResp, func(m *raftpb.Message) bool { return m.GetReject() && m.GetIndex() == 7 })},
		{name: "append: committed entry in a new term", peer: newFollower, contradiction: true, bad: appendMessage(4, 2, 7, 7), good: appendMessage(2, 2, 7, 7)},
		{name: "append: compacted entry", peer: newFollower, contradiction: true, bad: appendMessage(3, 1, 5, 7), good: appendMessage(3, 1, 4, 7)},
		{name: "append: gap", peer: newFollower, bad: appendMessage(3, 3, 8, 9, logEntry(10, 3, nil)), good: appendMessage(3, 3, 8, 9, logEntry(9, 3, nil)), panic: "out of range"},
		{name: "append: gap inside", peer: newFollower, bad: appendMessage(3, 3, 8, 7, logEntry(9, 3, nil), logEntry(11, 3, nil)), good: appendMessage(3, 3, 8, 7, logEntry(9, 3, nil), logEntry(10, 3, nil)), panic: "slice bounds out of range"},
		{name: "append: step back", peer: newFollower, bad: appendMessage(4, 3, 8, 7, logEntry(7, 4, nil)), good: appendMessage(4, 3, 8, 7, logEntry(9, 4, nil)), panic: "conflict with committed entry"},
		{name: "append: terms go down", peer: newFollower, bad: appendMessage(3, 3, 8, 7, logEntry(9, 2, nil)), good: appendMessage(3, 3, 8, 7, logEntry(9, 3, nil)), harm: entryTerm(9, 2)},
		{name: "append: terms go down inside", peer: newFollower, bad: appendMessage(4, 3, 8, 7, logEntry(9, 4, nil), logEntry(10, 3, nil)), good: appendMessage(4, 3, 8, 7, logEntry(9, 4, nil), logEntry(10, 4, nil)), harm: entryTerm(10, 3)},
		{name: "append: entry of the future", peer: newFollower, bad: appendMessage(3, 3, 8, 7, logEntry(9, 4, nil)), good: appendMessage(4, 3, 8, 7, logEntry(9, 4, nil)), harm: entryTerm(9, 4)},
		{name: "append: entry of term 0", peer: newEmpty, bad: appendMessage(1, 0, 0, 0, logEntry(1, 0, nil)), good: appendMessage(1, 0, 0, 0, logEntry(1, 1, nil)), harm: entryTerm(1, 0)},
		{name: "append: other committed entry", peer: newFollower, contradiction: true, bad: appendMessage(3, 2, 6, 7, logEntry(7, 2, nil)), good: appendMessage(3, 2, 6, 7, logEntry(7, 3, nil)),
			harm: sentSome(raftpb.MsgAppResp, func(m *raftpb.Message) bool { return !m.GetReject() && m.GetIndex() == 7 })},
		{name: "append: other committed entry in a new term", peer: newFollower, contradiction: true, bad: appendMessage(4, 2, 6, 7, logEntry(7, 4, nil)), good: appendMessage(4, 3, 7, 7, logEntry(8, 4, nil))},
		{name: "append: other committed entry, outdated", peer: newFollower, contradiction: true, bad: appendMessage(3, 2, 6, 7, logEntry(7, 2, nil)), good: appendMessage(2, 2, 6, 7, logEntry(7, 2, nil))},
		{name: "append: type of entry", peer: newFollower, bad: withType(appendMessage(3, 3, 8, 7, logEntry(9, 3, nil)), 3, nil), good: withType(appendMessage(3, 3, 8, 7, logEntry(9, 3, nil)), 0, []byte{0xff})},

		conf("garbage", garbage(confEntry(changes())), confEntry(changes())),
		conf("old form", confEntryV1(v1(4)), confEntry(changes(addNode(4)))),
		conf("raft ID 0", confEntry(changes(addNode(0))), confEntry(changes(addNode(4)))),
		conf("raft ID 0 among others", confEntry(changes(addNode(4), addNode(0))), confEntry(changes(addNode(4), addNode(5)))),
		conf("raft ID of raft", confEntry(changes(addNode(maxRaftID))), confEntry(changes(addNode(maxRaftID-1)))),
		{name: "change: unknown transition", peer: newFollower, bad: appendMessage(3, 3, 8, 9, confEntry(&raftpb.ConfChangeV2{Transition: raftpb.ConfChangeTransition(3).Enum()})), good: appendMessage(3, 3, 8, 9, confEntry(&raftpb.ConfChangeV2{Transition: raftpb.ConfChangeTransition(2).Enum()})),
			harm: func(p *rawPeer) bool {
				return panics(func() { p.rn.ApplyConfChange(&raftpb.ConfChangeV2{Transition: raftpb.ConfChangeTransition(3).Enum()}) }) != nil
			}},
		{name: "change: transition below all", peer: newFollower, bad: appendMessage(3, 3, 8, 9, confEntry(&raftpb.ConfChangeV2{Transition: raftpb.ConfChangeTransition(-1).Enum()})), good: appendMessage(3, 3, 8, 9, confEntry(&raftpb.ConfChangeV2{}))},
		conf("garbage for a context", confEntry(&raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{addNode(4)}, Context: []byte{0xff}}), confEntry(contextOf())),
		conf("member 0", confEntry(contextOf(&kvpb.Member{Node: plainNode(4)})), confEntry(contextOf(plainMembers(4)...))),
		conf("member without a node", confEntry(contextOf(&kvpb.Member{RaftId: 4})), confEntry(contextOf(plainMembers(4)...))),
		conf("member with node 0", confEntry(contextOf(&kvpb.Member{RaftId: 4, Node: &kvpb.Node{Address: "a:1"}})), confEntry(contextOf(&kvpb.Member{RaftId: 4, Node: &kvpb.Node{Id: 1}}))),

		{name: "append response: behind the log", peer: newLeader, bad: acked(2, 4, 11, false), good: acked(2, 4, 10, false),
			harm: func(p *rawPeer) bool {
				harm := false
				p.rn.WithProgress(func(_ uint64, _ raft.ProgressType, pr tracker.Progress) { harm = harm || pr.Match > p.log.last() })
				return harm
			}},
		{name: "append response: rejected", peer: newLeader, bad: acked(2, 4, 11, false), good: acked(2, 4, 11, true)},
		{name: "append response: of a term past", peer: newLeader, bad: acked(2, 4, 11, false), good: acked(2, 3, 11, false)},

		{name: "heartbeat: commits behind the log", peer: newFollower, contradiction: true, bad: beat(raftpb.MsgHeartbeat, 2, 3, 9), good: beat(raftpb.MsgHeartbeat, 2, 3, 8), panic: "out of range"},
		{name: "heartbeat: the same in a new term", peer: newFollower, contradiction: true, bad: beat(raftpb.MsgHeartbeat, 3, 4, 9), good: beat(raftpb.MsgHeartbeat, 3, 4, 8), panic: "out of range"},
		{name: "heartbeat: of a term past", peer: newFollower, contradiction: true, bad: beat(raftpb.MsgHeartbeat, 2, 3, 9), good: beat(raftpb.MsgHeartbeat, 2, 2, 9), panic: "out of range"},
		{name: "heartbeat: short context", peer: newFollower, bad: beat(raftpb.MsgHeartbeat, 2, 3, 7, make([]byte, 7)...), good: beat(raftpb.MsgHeartbeat, 2, 3, 7, make([]byte, 8)...),
			harm: sentSome(raftpb.MsgHeartbeatResp, func(m *raftpb.Message) bool { return len(m.GetContext()) == 7 })},
		{name: "heartbeat: long context", peer: newFollower, bad: beat(raftpb.MsgHeartbeat, 2, 3, 7, make([]byte, 9)...), good: beat(raftpb.MsgHeartbeat, 2, 3, 7)},
		{name: "heartbeat response: short context", peer: newLeader, bad: beat(raftpb.MsgHeartbeatResp, 2, 4, 0, 1), good: beat(raftpb.MsgHeartbeatResp, 2, 4, 0), panic: "index out of range"},
		{name: "heartbeat response: long context", peer: newLeader, bad: beat(raftpb.MsgHeartbeatResp, 2, 4, 0, make([]byte, 9)...), good: beat(raftpb.MsgHeartbeatResp, 2, 4, 0, make([]byte, 8)...)},
		{name: "heartbeat response: read that was not sent", peer: newLeader, bad: beat(raftpb.MsgHeartbeatResp, 2, 4, 0, 2, 0, 0, 0, 0, 0, 0, 0), good: beat(raftpb.MsgHeartbeatResp, 2, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0),
			then: []*raftpb.Message{beat(raftpb.MsgHeartbeatResp, 3, 4, 0, 2, 0, 0, 0, 0, 0, 0, 0)}, panic: "slice bounds out of range"},
		{name: "heartbeat response: read of a term past", peer: newLeader, bad: beat(raftpb.MsgHeartbeatResp, 2, 4, 0, 0, 1, 0, 0, 0, 0, 0, 0), good: beat(raftpb.MsgHeartbeatResp, 2, 3, 0, 0, 1, 0, 0, 0, 0, 0, 0)},

		{name: "proposal: not to the leader", peer: newFollower, bad: propose, good: propose, goodPeer: newLeader, harm: sentSome(raftpb.MsgProp, func(m *raftpb.Message) bool { return true })},
		{name: "proposal: to a candidate", peer: newCandidate, bad: propose, good: propose, goodPeer: newJointLeader},
		{name: "proposal: empty", peer: newLeader, bad: message(raftpb.MsgProp, 2, 0), good: propose, panic: "stepped empty MsgProp"},
		{name: "proposal: two entries", peer: newLeader, bad: message(raftpb.MsgProp, 2, 0, func(m *raftpb.Message) { m.Entries = append(propose.Entries, propose.Entries...) }), good: propose,
			harm: func(p *rawPeer) bool { return p.log.last() == 12 }},
		{name: "proposal: change", peer: newLeader, bad: withType(propose, raftpb.EntryConfChangeV2, confEntry(changes(addNode(4))).Data), good: propose,
			harm: func(p *rawPeer) bool {
				return p.log.entries[len(p.log.entries)-1].GetType() == raftpb.EntryConfChangeV2
			}},
		{name: "proposal: malformed change", peer: newLeader, bad: withType(propose, raftpb.EntryConfChange, []byte{0xff}), good: propose, panic: "cannot parse"},
		{name: "proposal: unknown type", peer: newLeader, bad: withType(propose, 3, propose.Entries[0].Data), good: propose},
		{name: "proposal: no data", peer: newLeader, bad: withType(propose, 0, nil), good: propose},
		{name: "proposal: too large", peer: newLeader, bad: proposalOfSize(maxEntryBytes + maxWriteBytes + 1), good: proposalOfSize(maxEntryBytes + maxWriteBytes)},
		{name: "proposal: no batch", peer: newLeader, bad: withType(propose, 0, []byte{0xff}), good: propose},
		{name: "proposal: of another", peer: newLeader, bad: proposal0(2, &kvpb.Batch{Proposer: 3, Sequence: 1, Writes: []*kvpb.Write{write}}), good: proposal0(3, &kvpb.Batch{Proposer: 3, Sequence: 1, Writes: []*kvpb.Write{write}})},
		{name: "proposal: no sequence", peer: newLeader, bad: proposal0(2, &kvpb.Batch{Proposer: 2, Writes: []*kvpb.Write{write}}), good: proposalOf(write)},
		{name: "proposal: no writes", peer: newLeader, bad: proposalOf(), good: proposalOf(write)},
		{name: "proposal: empty key", peer: newLeader, bad: proposalOf(setWrite("", "v")), good: proposalOf(setWrite("k", ""))},
		{name: "proposal: second key", peer: newLeader, bad: proposalOf(write, deleteWrite("")), good: proposalOf(write, deleteWrite("k"))},
		{name: "proposal: long key", peer: newLeader, bad: proposalOf(setWrite(strings.Repeat("k", maxKeyBytes+1), "")), good: proposalOf(setWrite(strings.Repeat("k", maxKeyBytes), ""))},
		{name: "proposal: long key to delete", peer: newLeader, bad: proposalOf(deleteWrite(strings.Repeat("k", maxKeyBytes+1))), good: proposalOf(deleteWrite(strings.Repeat("k", maxKeyBytes)))},
		{name: "proposal: long value", peer: newLeader, bad: proposalOf(setWrite("k", strings.Repeat("v", maxValueBytes+1))), good: proposalOf(setWrite("k", strings.Repeat("v", maxValueBytes)))},
		{name: "proposal: session 0", peer: newLeader, bad: proposalOf(withID(0, 1, setWrite("k", ""))), good: proposalOf(withID(1, 1, setWrite("k", "")))},
		{name: "proposal: sequence 0", peer: newLeader, bad: proposalOf(withID(1, 0, deleteWrite("k"))), good: proposalOf(withID(1, 1, deleteWrite("k")), openWrite(1))},
		{name: "proposal: session without a number", peer: newLeader, bad: proposalOf(openWrite(0)), good: proposalOf(openWrite(1<<64 - 1))},
		{name: "proposal: session of no principal", peer: newLeader, bad: proposalOf(openWriteOf(1, "client/")), good: proposalOf(openWriteOf(1, "client/shop"))},
		{name: "proposal: delete of nothing", peer: newLeader, bad: proposalOf(deleteIf("k", 0)), good: proposalOf(deleteIf("k", 1), setIf("k", "v", 0))},
		{name: "proposal: unknown write", peer: newLeader, bad: proposalOf(write, &kvpb.Write{}), good: proposalOf(write, write)},

		// Of a peer, raft would send these contexts back; its own it looks into.
		{name: "read: no context", peer: newLeader, bad: read(raftpb.MsgReadIndex, 0), good: read(raftpb.MsgReadIndex, 0, 16)},
		{name: "read: two contexts", peer: newLeader, bad: read(raftpb.MsgReadIndex, 0, 16, 16), good: read(raftpb.MsgReadIndex, 0, 16)},
		{name: "read: short context", peer: newLeader, bad: read(raftpb.MsgReadIndex, 0, 15), good: read(raftpb.MsgReadIndex, 0, 16)},
		{name: "read: long context", peer: newLeader, bad: read(raftpb.MsgReadIndex, 0, 17), good: read(raftpb.MsgReadIndex, 0, 16)},
		{name: "read response: no context", peer: newFollower, bad: read(raftpb.MsgReadIndexResp, 3), good: read(raftpb.MsgReadIndexResp, 3, 16)},
		{name: "read response: short context", peer: newFollower, bad: read(raftpb.MsgReadIndexResp, 3, 15), good: read(raftpb.MsgReadIndexResp, 3, 16)},
	}
	for _, typ := range []raftpb.MessageType{
		raftpb.MsgHup, raftpb.MsgBeat, raftpb.MsgUnreachable, raftpb.MsgSnapStatus, raftpb.MsgCheckQuorum, raftpb.MsgTransferLeader, raftpb.MsgStorageAppend,
		raftpb.MsgStorageAppendResp, raftpb.MsgStorageApply, raftpb.MsgStorageApplyResp, raftpb.MsgForgetLeader, -1, raftpb.MsgForgetLeader + 1,
	} {
		for _, peer := range []func() *rawPeer{newLeader, newFollower} {
			rows = append(rows, checkRow{name: fmt.Sprint("type ", typ), peer: peer, bad: message(typ, 2, 4), good: message(raftpb.MsgTimeoutNow, 2, 4)})
		}
	}
	rows = append(rows, checkRow{name: "orders of an operator", peer: newLeader, bad: message(raftpb.MsgTransferLeader, 2, 4), good: message(raftpb.MsgTimeoutNow, 2, 4),
		harm: func(p *rawPeer) bool { return p.rn.BasicStatus().LeadTransferee == 2 }})
	// And those without a rule.
	for _, typ := range []raftpb.MessageType{raftpb.MsgVote, raftpb.MsgVoteResp, raftpb.MsgPreVote, raftpb.MsgPreVoteResp, raftpb.MsgTimeoutNow} {
		for _, peer := range []func() *rawPeer{newLeader, newFollower, newCandidate, newEmpty} {
			rows = append(rows, checkRow{name: fmt.Sprint("no rule for ", typ), peer: peer, bad: message(typ, 2, maxCounter), good: message(typ, 2, 4)})
		}
	}
	return rows
}

func TestPeerCheck(t *testing.T) {
	for _, row := range checkRows() {
		t.Run(row.name, func(t *testing.T) {
			if err := row.peer().check(row.bad); err == nil {
				t.Error("accepted")
			} else if errors.Is(err, errContradiction) != row.contradiction {
				t.Errorf("contradiction is not %v: %v", row.contradiction, err)
			}
			p := row.peer()
			if row.goodPeer != nil {
				p = row.goodPeer()
			}
			if err := p.check(row.good); err != nil {
				t.Errorf("the nearest valid message is refused: %v", err)
			}
			if x := panics(func() { p.step(row.good) }); x != nil || p.err != nil {
				t.Errorf("the nearest valid message is too much for raft: %v, %v", x, p.err)
			}
			if row.panic == "" && row.harm == nil {
				return
			}
			// Without the rule.
			p = row.peer()
			p.sent = nil
			switch x := panics(func() { p.step(append([]*raftpb.Message{row.bad}, row.then...)...) }); {
			case !strings.Contains(fmt.Sprint(x), row.panic) || (x != nil) != (row.panic != ""):
				t.Errorf("raft panics with %v, not with %q", x, row.panic)
			case row.harm != nil && !row.harm(p):
				t.Error("raft is not harmed: the rule is not needed")
			}
		})
	}
}

// What raft itself sends is never refused, whatever of it is lost, repeated or
// late. The rules of commit and contradiction in particular must not stop nodes.
func TestPeerCheckHonest(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1) // raft draws its timeouts from crypto/rand
	seen := map[raftpb.MessageType]int{}
	for seed := range uint64(12) {
		r := seededRand(seed)
		ids := []uint64{1, 2, 3}
		peers := map[uint64]*rawPeer{}
		for _, id := range ids {
			l := &raftLog{hard: &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(0)), Commit: new(uint64(1))}}
			l.reset(logSnapshot(1, 1))
			peers[id] = newRawPeer(id, voters(ids...), l, 1)
		}
		var wire []*raftpb.Message
		var cut uint64
		for i := range 1200 {
			p := peers[ids[r.IntN(3)]]
			switch r.IntN(30) {
			case 0:
				if r.IntN(3) == 0 {
					_ = p.rn.Campaign()
				}
			case 1, 2:
				_ = p.rn.Propose([]byte{byte(i)})
			case 3:
				p.rn.ReadIndex(make([]byte, readContextBytes))
			case 4:
				if p.rn.BasicStatus().RaftState == raft.StateLeader { // others would pass it on
					p.rn.TransferLeader(ids[r.IntN(3)])
				}
			case 5:
				_ = p.rn.ProposeConfChange(&raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{
					{Type: raftpb.ConfChangeType(2 * r.IntN(2)).Enum(), NodeId: new(uint64(9))}, {Type: raftpb.ConfChangeAddLearnerNode.Enum(), NodeId: new(uint64(8))},
				}})
			case 6:
				p.rn.Tick()
			case 7:
				p.log.compact(16*r.Uint64N(2), p.applied)
			case 8:
				for _, id := range ids {
					p.rn.ReportSnapshot(id, raft.SnapshotFinish)
				}
			case 9:
				if r.IntN(3) == 0 {
					cut = r.Uint64N(6) // nobody, as often as not
				}
			default:
				if len(wire) == 0 {
					continue
				}
				k := r.IntN(min(len(wire), 1+r.IntN(40)))
				m := wire[k]
				if r.IntN(10) > 0 { // else it comes again
					wire = slices.Delete(wire, k, k+1)
				}
				if p = peers[m.GetTo()]; p == nil || cut == m.GetTo() || r.IntN(20) == 0 {
					continue
				}
				if typ := m.GetType(); typ == raftpb.MsgProp {
					continue // of ours, only batches are
				} else if seen[typ]++; typ != raftpb.MsgSnap {
					m = fromWire(toWire([]*raftpb.Message{m}), &kvpb.Hello{From: &kvpb.Peer{RaftId: m.GetFrom()}, To: &kvpb.Peer{RaftId: m.GetTo()}})[0].m
				}
				if typ := m.GetType(); typ == raftpb.MsgReadIndex && p.rn.BasicStatus().RaftState != raft.StateLeader || typ == raftpb.MsgReadIndexResp && p.rn.BasicStatus().Lead != m.GetFrom() {
					continue // late: the read is asked for again
				}
				if err := p.check(m); err != nil {
					t.Fatalf("seed %d, step %d: %v is refused: %v", seed, i, m, err)
				}
				_ = p.rn.Step(m)
			}
			for _, id := range ids {
				p := peers[id]
				if p.drain(); p.err != nil {
					t.Fatalf("seed %d, step %d: %v", seed, i, p.err)
				}
				wire = append(wire, p.sent...)
				p.sent = nil
			}
		}
	}
	for _, typ := range []raftpb.MessageType{
		raftpb.MsgApp, raftpb.MsgAppResp, raftpb.MsgHeartbeat, raftpb.MsgHeartbeatResp, raftpb.MsgVote, raftpb.MsgVoteResp, raftpb.MsgPreVote,
		raftpb.MsgPreVoteResp, raftpb.MsgTimeoutNow, raftpb.MsgReadIndex, raftpb.MsgReadIndexResp, raftpb.MsgSnap,
	} {
		if seen[typ] < 5 {
			t.Errorf("%d of %v were seen: too few to say anything", seen[typ], typ)
		}
	}
}

// tryConfChange must say exactly what raft will do: it panics, or agrees.
func TestTryConfChange(t *testing.T) {
	for _, leading := range []bool{false, true} {
		var applied, refused, joint int
		for seed := range uint64(9) {
			r := seededRand(seed)
			p := newRawPeer(1, voters(1, 2, 3), testLog(), 7)
			if leading {
				p = newLeader()
			}
			cs := p.conf
			for range 150 {
				cc := &raftpb.ConfChangeV2{}
				switch r.IntN(4) {
				case 0: // leaves a joint configuration
				case 1:
					cc.Transition = raftpb.ConfChangeTransition(r.IntN(3)).Enum()
					fallthrough
				default:
					for range r.IntN(5) {
						cc.Changes = append(cc.Changes, &raftpb.ConfChangeSingle{Type: raftpb.ConfChangeType(r.IntN(5)).Enum(), NodeId: new(1 + r.Uint64N(6))})
					}
				}
				before := proto.Clone(cs).(*raftpb.ConfState)
				want, err := tryConfChange(cs, cc)
				if !proto.Equal(cs, before) {
					t.Fatal("tryConfChange changed what it was given")
				}
				var got *raftpb.ConfState
				x := panics(func() { got = p.rn.ApplyConfChange(proto.Clone(cc).(*raftpb.ConfChangeV2)) })
				switch {
				case (err != nil) != (x != nil):
					t.Fatalf("seed %d: %v to %v: %v, raft: %v", seed, cc, cs, err, x)
				case err != nil:
					refused++
				default:
					if err := want.Equivalent(got); err != nil {
						t.Fatalf("seed %d: %v to %v: %v", seed, cc, cs, err)
					}
					if err := checkConfState(got); err != nil {
						t.Fatalf("seed %d: checkConfState refuses raft's own: %v", seed, err)
					}
					cs, p.conf = got, got
					applied++
				}
				if isJoint(cs) {
					joint++
				}
			}
		}
		if applied < 300 || refused < 300 || joint < 300 {
			t.Errorf("leading %v: %d applied, %d refused, %d in a joint one: too few to say anything", leading, applied, refused, joint)
		}
	}
}

// checkConfState must refuse exactly what raft panics over in a snapshot.
func TestCheckConfState(t *testing.T) {
	if checkConfState(&raftpb.ConfState{}) == nil {
		t.Error("a configuration of nobody is accepted") // raft ignores it
	}
	r := seededRand(1)
	var accepted, refused int
	ids := func(most int) (ids []uint64) {
		for range r.IntN(most + 1) {
			ids = append(ids, r.Uint64N(6))
		}
		return ids
	}
	for accepted+refused < 400 {
		cs := &raftpb.ConfState{Voters: ids(3), Learners: ids(1), AutoLeave: new(r.IntN(4) == 0)}
		if r.IntN(2) == 0 {
			cs.VotersOutgoing, cs.LearnersNext = ids(3), ids(1)
		}
		if !slices.Contains(slices.Concat(cs.Voters, cs.Learners, cs.VotersOutgoing), 1) {
			continue // raft ignores it
		}
		snap := logSnapshot(20, 3)
		snap.Metadata.ConfState = cs
		m := message(raftpb.MsgSnap, 2, 3, func(m *raftpb.Message) { m.Snapshot = snap })
		p := newEmpty()
		if err := p.check(m); err != nil {
			t.Fatal(err)
		}
		err := checkConfState(cs)
		x := panics(func() { p.step(m) })
		if (err != nil) != (x != nil) {
			t.Fatalf("%v: %v, raft: %v", cs, err, x)
		}
		if err != nil {
			refused++
		} else if accepted++; p.applied != 20 || p.log.last() != 20 {
			t.Fatalf("%v: the snapshot was not installed", cs)
		}
	}
	if accepted < 50 || refused < 50 {
		t.Errorf("%d accepted, %d refused: too few to say anything", accepted, refused)
	}
}

// peerVariants are the states in which a message may find a node.
var peerVariants = []func() *rawPeer{newFollower, newLeader, newCandidate, newJointLeader, newEmpty}

func FuzzPeerMessage(f *testing.F) {
	rows := checkRows()
	for i, row := range rows {
		for _, m := range []*raftpb.Message{row.bad, row.good} {
			if proto.Size(m) > 64<<10 {
				continue
			}
			for v := range peerVariants {
				if v == i%len(peerVariants) {
					f.Add(byte(v), mustMarshal(f, &kvpb.StreamRequest{Messages: toWire([]*raftpb.Message{m})}))
				}
			}
		}
	}
	// A life in one request: appends, a commit, a change of membership, a vote.
	changed := confEntry(contextOf(plainMembers(4)...))
	f.Add(byte(0), mustMarshal(f, &kvpb.StreamRequest{Messages: toWire([]*raftpb.Message{
		appendMessage(3, 3, 8, 9, changed, logEntry(10, 3, nil)), message(raftpb.MsgHeartbeat, 2, 3, func(m *raftpb.Message) { *m.Commit = 10 }),
		appendMessage(4, 3, 10, 10), message(raftpb.MsgTimeoutNow, 2, 4), message(raftpb.MsgVoteResp, 2, 5), message(raftpb.MsgAppResp, 2, 5, func(m *raftpb.Message) { *m.Index = 11 }),
	})}))
	hellos := []*kvpb.Hello{
		{From: &kvpb.Peer{RaftId: 2}, To: &kvpb.Peer{RaftId: 1}},
		{From: &kvpb.Peer{RaftId: 3}, To: &kvpb.Peer{RaftId: 1}},
		{From: &kvpb.Peer{RaftId: 9}, To: &kvpb.Peer{RaftId: 1}}, // of no configuration
	}
	f.Fuzz(func(t *testing.T, variant byte, data []byte) {
		var req kvpb.StreamRequest
		if proto.Unmarshal(data, &req) != nil {
			return
		}
		cryptotest.SetGlobalRandom(t, 1) // what fails has to fail again
		p := peerVariants[int(variant)%len(peerVariants)]()
		// Two peers may say the same: a quorum of liars.
		for _, h := range hellos {
			for _, in := range fromWire(req.Messages, h) {
				if p.err != nil || p.check(in.m) != nil {
					continue
				}
				_ = p.rn.Step(in.m) // that it refuses some is well
				p.drain()
			}
		}
		for range 25 { // time for what is in the log to be sent, and elections
			if p.err == nil {
				p.rn.Tick()
				p.drain()
			}
		}
		if p.err != nil && p.err != errNotInitialized {
			t.Fatal(p.err)
		}
	})
}
