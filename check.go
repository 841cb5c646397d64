// What peers send, checked before raft sees it: raft v3.7 answers some of it
// with a panic (each rule names the function that does).

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/raft/v3/confchange"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// maxCounter bounds terms and indexes, so that adding to one never overflows.
	maxCounter = 1 << 60
	// maxRaftID bounds raft IDs: raft keeps the highest for itself.
	maxRaftID = 1 << 63
	// readContextBytes is the length of the context of our ReadIndex requests.
	readContextBytes = 16
)

func validRaftID(id uint64) bool { return id != 0 && id < maxRaftID }

// errContradiction is what a peer's message is met with that cannot be true if
// this node's state is. One of the two has lost data, so the node stops.
var errContradiction = errors.New("it contradicts what this node knows to be committed, " +
	"so one of the two has lost what it promised")

// whichIsWrong is what an operator can do about a contradiction. It must be true
// for either of the two, and if the message was forged.
const whichIsWrong = "That does not say which of the two is wrong: " +
	"keep all data directories as they are until that is known. " +
	"Compare term, last and commit index of all nodes (status -o json; for one that has stopped, its log), " +
	"and find out whose directory was rolled back or copied: that one is, and has less than it had. " +
	"Then move that directory away, and start its node without: the cluster takes it back. " +
	"If none was, the message was not the peer's: start this node again"

// peerCheck is the state of this node against which messages are checked.
type peerCheck struct {
	term, commit uint64
	log          *raftLog
	leading      bool
	lead         uint64
	readContext  uint64 // highest read context sent with a heartbeat in this term
	level        uint32 // of the cluster
}

// check returns nil if raft may see the message, an error wrapping
// errContradiction if the node must stop, another error if the message has to
// be dropped.
func (c *peerCheck) check(m *raftpb.Message) error {
	if max(m.GetTerm(), m.GetIndex(), m.GetLogTerm(), m.GetCommit(), m.GetRejectHint()) >= maxCounter {
		return errors.New("a term or an index is out of range")
	}
	isForwarded := m.GetType() == raftpb.MsgProp || m.GetType() == raftpb.MsgReadIndex
	if isForwarded != (m.GetTerm() == 0) {
		return errors.New("its term is 0, or should be") // raft.Step takes term 0 for local
	}
	switch m.GetType() {
	case raftpb.MsgApp:
		return c.checkAppend(m)
	case raftpb.MsgAppResp:
		return c.checkAppendResponse(m)
	case raftpb.MsgHeartbeat, raftpb.MsgHeartbeatResp:
		return c.checkHeartbeat(m)
	case raftpb.MsgProp:
		return c.checkProposal(m)
	case raftpb.MsgReadIndex:
		return checkRead(m, c.leading) // raft would pass the question on
	case raftpb.MsgReadIndexResp:
		return checkRead(m, m.GetFrom() == c.lead)
	case raftpb.MsgVote, raftpb.MsgVoteResp, raftpb.MsgPreVote, raftpb.MsgPreVoteResp, raftpb.MsgTimeoutNow:
		return nil
	case raftpb.MsgSnap:
		if m.GetSnapshot() == nil { // else readSnapshot has checked it
			return errors.New("it has no snapshot")
		}
		return nil
	}
	return fmt.Errorf("messages of type %v do not cross the network", m.GetType())
}

// checkAppendResponse checks an acknowledgement: tracker.Progress.MaybeUpdate believes
// any index.
func (c *peerCheck) checkAppendResponse(m *raftpb.Message) error {
	acknowledges := !m.GetReject() && m.GetTerm() == c.term
	if acknowledges && m.GetIndex() > c.log.last() {
		return fmt.Errorf("it acknowledges entry %d of %d", m.GetIndex(), c.log.last())
	}
	return nil
}

// checkRead checks a question for a ReadIndex, or the answer.
func checkRead(m *raftpb.Message, byLeader bool) error {
	if !byLeader {
		return errors.New("only the leader answers reads")
	}
	if len(m.GetEntries()) != 1 || len(m.GetEntries()[0].GetData()) != readContextBytes {
		return errors.New("its context is invalid")
	}
	return nil
}

func (c *peerCheck) checkHeartbeat(m *raftpb.Message) error {
	ctx := m.GetContext()
	isOfLeader := m.GetType() == raftpb.MsgHeartbeat
	isPresent := m.GetTerm() >= c.term
	if isOfLeader && isPresent && m.GetCommit() > c.log.last() { // raftLog.commitTo
		return fmt.Errorf("%w: it commits entry %d, the log ends at %d", errContradiction, m.GetCommit(), c.log.last())
	}
	if len(ctx) == 0 {
		return nil
	}
	if len(ctx) != 8 { // readOnly.recvAck
		return fmt.Errorf("its context has %d bytes", len(ctx))
	}
	isAnswer := !isOfLeader && m.GetTerm() == c.term
	if isAnswer && binary.LittleEndian.Uint64(ctx) > c.readContext { // readOnly.maybeAdvance
		return errors.New("it acknowledges a read that was not sent")
	}
	return nil
}

// checkAppend checks that entries follow each other (raftLog.maybeAppend), that
// they can be applied (raft.applyConfChange), and that they do not contradict
// what is committed: raft would ignore that.
func (c *peerCheck) checkAppend(m *raftpb.Message) error {
	index := m.GetIndex()
	term := m.GetLogTerm()
	if term > m.GetTerm() {
		return errors.New("its entries are of a later term than itself")
	}
	isPresent := m.GetTerm() >= c.term
	if isPresent && c.contradicts(index, term) {
		return c.contradiction(index, term)
	}
	for _, e := range m.GetEntries() {
		isNext := e.GetIndex() == index+1 && e.GetTerm() >= term
		isPossible := e.GetTerm() != 0 && e.GetTerm() <= m.GetTerm()
		if !isNext || !isPossible {
			return fmt.Errorf("entry %d of term %d does not follow entry %d of term %d",
				e.GetIndex(), e.GetTerm(), index, term)
		}
		index = e.GetIndex()
		term = e.GetTerm()
		if isPresent && c.contradicts(index, term) {
			return c.contradiction(index, term)
		}
		if err := checkEntry(e); err != nil {
			return fmt.Errorf("entry %d: %w", index, err)
		}
	}
	return nil
}

// contradicts reports whether this node knows another entry to be committed.
func (c *peerCheck) contradicts(index, term uint64) bool {
	here, err := c.log.Term(index)
	return err == nil && here != term && index <= c.commit
}

func (c *peerCheck) contradiction(index, term uint64) error {
	here, _ := c.log.Term(index)
	return fmt.Errorf("%w: entry %d is of term %d there and of term %d here", errContradiction, index, term, here)
}

// checkEntry checks what can be checked of an entry without the state.
func checkEntry(e *raftpb.Entry) error {
	switch e.GetType() {
	case raftpb.EntryNormal:
		return nil // a batch is decoded when it is applied
	case raftpb.EntryConfChangeV2:
		_, _, err := decodeConfChange(e)
		return err
	}
	return fmt.Errorf("its type is %v", e.GetType())
}

// checkProposal checks what another node wants this one to append.
func (c *peerCheck) checkProposal(m *raftpb.Message) error {
	if !c.leading {
		return errors.New("this node does not lead") // else raft would pass it on, in a circle perhaps
	}
	if len(m.GetEntries()) != 1 {
		return errors.New("it is not one entry") // stepLeader
	}
	e := m.GetEntries()[0]
	if e.GetType() != raftpb.EntryNormal {
		return errors.New("only the leader itself proposes changes of membership")
	}
	size := len(e.GetData())
	if size == 0 || size > maxEntryBytes+maxWriteBytes {
		return fmt.Errorf("its entry has %d bytes", size)
	}
	b, err := parseBatch(e.GetData(), nil, c.level) // or every node would stop when it applies it
	if err != nil {
		return err
	}
	if b.rise != nil {
		return errors.New("only the leader itself raises the level")
	}
	isSenders := b.proposer == m.GetFrom() && b.sequence != 0
	if !isSenders || len(b.writes) == 0 {
		return errors.New("its batch is not its sender's, or empty")
	}
	return nil
}

// decodeConfChange decodes the data of an entry that changes the configuration.
func decodeConfChange(e *raftpb.Entry) (*raftpb.ConfChangeV2, *kvpb.ConfChangeContext, error) {
	var cc raftpb.ConfChangeV2
	if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
		return nil, nil, err
	}
	transition := cc.GetTransition()
	if transition < raftpb.ConfChangeTransitionAuto || transition > raftpb.ConfChangeTransitionJointExplicit {
		return nil, nil, fmt.Errorf("unknown transition %d", transition) // ConfChangeV2.EnterJoint
	}
	for _, ch := range cc.GetChanges() {
		if !validRaftID(ch.GetNodeId()) {
			return nil, nil, fmt.Errorf("invalid raft ID %d", ch.GetNodeId())
		}
	}
	var ctx kvpb.ConfChangeContext
	if err := proto.Unmarshal(cc.GetContext(), &ctx); err != nil {
		return nil, nil, err
	}
	for _, m := range ctx.Members {
		if m.GetRaftId() == 0 || m.GetNode().GetId() == 0 {
			return nil, nil, errors.New("invalid member")
		}
	}
	return &cc, &ctx, nil
}

// tryConfChange returns the configuration that a change leads to, or why raft
// would panic over it (raft.applyConfChange).
func tryConfChange(cs *raftpb.ConfState, cc *raftpb.ConfChangeV2) (*raftpb.ConfState, error) {
	t, err := trackerOf(cs)
	if err != nil {
		return nil, err
	}
	changer := confchange.Changer{Tracker: t, LastIndex: 1}
	autoLeave, isJoint := cc.EnterJoint()
	switch {
	case cc.LeaveJoint():
		t.Config, t.Progress, err = changer.LeaveJoint()
	case isJoint:
		t.Config, t.Progress, err = changer.EnterJoint(autoLeave, cc.GetChanges()...)
	default:
		t.Config, t.Progress, err = changer.Simple(cc.GetChanges()...)
	}
	if err != nil {
		return nil, err
	}
	return t.ConfState(), nil
}

// checkConfChange returns the configuration that a change leads to, or why it does
// not fit the present one, or does not say who it is that it adds.
func (s *store) checkConfChange(cc *raftpb.ConfChangeV2, ctx *kvpb.ConfChangeContext) (*raftpb.ConfState, error) {
	cs, err := tryConfChange(s.conf, cc)
	if err != nil {
		return nil, err
	}
	named := slices.Collect(maps.Keys(s.members))
	for _, m := range ctx.Members {
		if !slices.Contains(confIDs(cs), m.RaftId) {
			return nil, fmt.Errorf("%x is named, but no member", m.RaftId)
		}
		isNew := s.members[m.RaftId] == nil
		if isNew && levelFromWire(m.Level) < s.level {
			return nil, fmt.Errorf("%x speaks levels up to %d, and the cluster is of level %d", m.RaftId, levelFromWire(m.Level), s.level)
		}
		named = append(named, m.RaftId)
	}
	for _, id := range confIDs(cs) {
		if !slices.Contains(named, id) {
			return nil, fmt.Errorf("%x is a member, but not named", id)
		}
	}
	return cs, nil
}

// checkConfState finds what raft would panic over when it restores a snapshot
// (raft.restore).
func checkConfState(cs *raftpb.ConfState) error {
	t, err := trackerOf(cs)
	if err != nil {
		return err
	}
	if len(cs.GetVoters()) == 0 {
		return errors.New("a configuration without voters")
	}
	return cs.Equivalent(t.ConfState())
}

// trackerOf is what raft makes of a configuration.
func trackerOf(cs *raftpb.ConfState) (t tracker.ProgressTracker, err error) {
	t = tracker.MakeProgressTracker(1, 0)
	t.Config, t.Progress, err = confchange.Restore(confchange.Changer{Tracker: t, LastIndex: 1}, cs)
	return t, err
}
