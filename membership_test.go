// The rules of membership and healing, on facts that are made up.

package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"raft-key-value/kvpb"
)

// newFacts is what node 1 knows when it has led nodes 2 and 3 for long: all answer, and
// have caught up. 4 is a learner like that.
func newFacts() *leaderState {
	const now = 10_000
	l := &leaderState{upToDate: 50, progress: map[uint64]tracker.Progress{}}
	l.clusterState = clusterState{
		now:           now,
		tick:          10 * time.Millisecond,
		electionTicks: 30,
		self:          plainNode(1),
		raftID:        1,
		inCluster:     true,
		raft:          raftState{term: 2, lead: 1, role: raft.StateLeader},
		leads:         true,
		mayChange:     true,
		leadHeard:     1,
		conf:          &raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{4}},
		members:       map[uint64]*kvpb.Node{},
		removed:       []uint64{7},
		former:        []uint64{7},
		applied:       60,
		connected:     map[uint64]bool{},
		heard:         map[uint64]uint64{},
		moved:         map[uint64]*kvpb.Node{},
		reborn:        map[uint64]*rebirth{},
		refusals:      map[uint64]string{},
	}
	for id := uint64(1); id <= 4; id++ {
		l.has(id, plainNode(id))
		l.answers(id)
	}
	return l
}

// has makes a raft ID that of a node that has caught up.
func (l *leaderState) has(raftID uint64, m *kvpb.Node) {
	l.members[raftID] = m
	l.progress[raftID] = tracker.Progress{State: tracker.StateReplicate, Match: 60, IsLearner: l.isLearner(raftID)}
}

// answers has a member be connected, and just heard.
func (l *leaderState) answers(raftID uint64) {
	l.connected[raftID] = true
	l.heard[raftID] = l.now
}

// isSilent has a member be connected, but not be heard for long.
func (l *leaderState) isSilent(raftID uint64) { l.heard[raftID] = 1 }

// isBehind has a member miss much of the log.
func (l *leaderState) isBehind(raftID uint64) {
	l.progress[raftID] = tracker.Progress{State: tracker.StateReplicate, Match: 10}
}

// hasTwo makes 9 a learner of node 3, which is a voter by the raft ID 3. It answers.
func (l *leaderState) hasTwo() {
	l.conf = &raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{9}}
	delete(l.members, 4)
	l.has(9, &kvpb.Node{Id: 3, Address: "other:1"})
	l.answers(9)
}

// describeStep is a step in short.
func describeStep(s nextStep) string {
	switch s.kind {
	case stepWait:
		return "wait"
	case stepDone:
		return "done"
	case stepFailed:
		if s.err == errPastLife {
			return "past life"
		}
		return errorReason(s.err)
	case stepHandOver:
		return fmt.Sprint("hand over to ", s.to)
	case stepAnnounce:
		return "announce"
	case stepLeaveJoint:
		return "leave"
	}
	names := map[raftpb.ConfChangeType]string{
		raftpb.ConfChangeAddNode:        "voter",
		raftpb.ConfChangeAddLearnerNode: "learner",
		raftpb.ConfChangeRemoveNode:     "without",
		raftpb.ConfChangeUpdateNode:     "moved",
	}
	var changes []string
	for _, c := range s.changes {
		changes = append(changes, fmt.Sprint(names[c.GetType()], " ", c.GetNodeId()))
	}
	return strings.Join(changes, ", ")
}

// ruleTest is a rule, facts that differ from newFacts', and the step that has to follow.
type ruleTest struct {
	what string
	next func(*leaderState) nextStep
	but  func(*leaderState)
	want string
}

func checkRules(t *testing.T, tests []ruleTest) {
	t.Helper()
	for _, test := range tests {
		l := newFacts()
		if test.but != nil {
			test.but(l)
		}
		if got := describeStep(test.next(l)); got != test.want {
			t.Errorf("%s: %q, want %q", test.what, got, test.want)
		}
	}
}

// TestLearnerRule: what comes next when a node is to be a learner.
func TestLearnerRule(t *testing.T) {
	add := func(raftID uint64, m *kvpb.Node) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep { return l.learnerStep(raftID, m) }
	}
	moved := &kvpb.Node{Id: 4, Address: "other:1"}
	checkRules(t, []ruleTest{
		{"a new node", add(5, plainNode(5)), nil, "learner 5"},
		{"during another change", add(5, plainNode(5)), func(l *leaderState) { l.mayChange = false }, "wait"},
		{"it is one", add(4, plainNode(4)), nil, "done"},
		{"it is one, and behind", add(4, plainNode(4)), func(l *leaderState) { l.isBehind(4) }, "wait"},
		{"the leader itself", add(1, plainNode(1)), func(l *leaderState) { l.isBehind(1) }, "done"},
		{"it has moved", add(4, moved), nil, "moved 4"},
		{"it was removed", add(7, plainNode(7)), nil, "past life"},
		{"another's address", add(5, &kvpb.Node{Id: 5, Address: plainNode(2).Address}), nil, "MEMBER_EXISTS"},
		{"another's raft ID", add(2, plainNode(5)), nil, "MEMBER_EXISTS"},
		{"its other member answers", add(9, moved), nil, "MEMBER_EXISTS"},
		{"its other member is silent", add(9, moved), func(l *leaderState) { l.isSilent(4) }, "learner 9, without 4"},
		{"a new leader has yet to hear of its other member", add(9, moved), func(l *leaderState) {
			l.isSilent(4)
			l.leadHeard = l.now
		}, "wait"},
		{"its other member was at this address", add(9, plainNode(4)), nil, "learner 9, without 4"},
		{"it has yet to take the place of its older member", add(9, &kvpb.Node{Id: 3, Address: "other:1"}),
			(*leaderState).hasTwo, "wait"},
		{"the cluster is full", add(100, plainNode(100)), func(l *leaderState) {
			for id := uint64(5); len(l.members) < maxMembers; id++ {
				l.members[id] = plainNode(id)
			}
		}, "INVALID_FIELD"},
	})
}

// TestMembershipRule: what comes next when the voters are to be others.
func TestMembershipRule(t *testing.T) {
	change := func(req *kvpb.ChangeMembershipRequest) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep { return l.membershipStep(req) }
	}
	all := change(&kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3, 4}})
	without1 := change(&kvpb.ChangeMembershipRequest{Members: []uint64{2, 3}})
	replace := change(&kvpb.ChangeMembershipRequest{Promote: []uint64{4}, Demote: []uint64{2}, Remove: []uint64{3}})
	expected := &kvpb.Membership{Members: []*kvpb.ExpectedMember{{Node: plainNode(1), Voter: true}}}
	silent := func(ids ...uint64) func(*leaderState) {
		return func(l *leaderState) {
			for _, id := range ids {
				l.isSilent(id)
			}
		}
	}
	newLeader := func(l *leaderState) {
		l.isSilent(4)
		l.leadHeard = l.now
	}
	checkRules(t, []ruleTest{
		{"so it is", change(&kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}}), nil, "done"},
		{"who is promoted votes already", change(&kvpb.ChangeMembershipRequest{Promote: []uint64{2}}), nil, "done"},
		{"that, during another change", change(&kvpb.ChangeMembershipRequest{Promote: []uint64{2}}),
			func(l *leaderState) { l.mayChange = false }, "done"},
		{"a change is half way", change(&kvpb.ChangeMembershipRequest{Promote: []uint64{2}}),
			func(l *leaderState) { l.conf.VotersOutgoing = []uint64{1, 2} }, "wait"},
		{"one is promoted", all, nil, "voter 4"},
		{"during another change", all, func(l *leaderState) { l.mayChange = false }, "wait"},
		{"who is promoted is silent", all, silent(4), "UNREACHABLE"},
		{"a new leader has yet to hear from it", all, newLeader, "wait"},
		{"who is promoted is behind", all, func(l *leaderState) { l.isBehind(4) }, "NOT_CAUGHT_UP"},
		{"most would be silent", change(&kvpb.ChangeMembershipRequest{Remove: []uint64{2}}), silent(3), "UNREACHABLE"},
		{"all at once", replace, nil, "learner 2, without 3, voter 4"},
		{"a former node is to go", change(&kvpb.ChangeMembershipRequest{Remove: []uint64{7}}), nil, "done"},
		{"an unknown node is to go", change(&kvpb.ChangeMembershipRequest{Remove: []uint64{8}}), nil, "UNKNOWN_MEMBER"},
		{"nobody would be left", change(&kvpb.ChangeMembershipRequest{Demote: []uint64{1, 2, 3}}), nil, "INVALID_FIELD"},
		{"it is made for another membership", change(&kvpb.ChangeMembershipRequest{Remove: []uint64{2}, Expected: expected}),
			nil, "MEMBERSHIP_CHANGED"},
		{"the leader leaves", without1, func(l *leaderState) {
			l.progress[3] = tracker.Progress{Match: 61}
		}, "hand over to 3"},
		{"a voter comes back without memory", without1, func(l *leaderState) {
			l.reborn[3] = &rebirth{Peer: &kvpb.Peer{RaftId: 33, Node: plainNode(3)}, seen: l.now}
		}, "wait"},
		{"with a voter goes its new learner", change(&kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}}),
			(*leaderState).hasTwo, "without 3, without 9"},
	})
}

// TestTransferRule: a node is made the leader, if it is a voter and answers, and is given
// up after two election timeouts.
func TestTransferRule(t *testing.T) {
	to := func(id, began uint64) func(*leaderState) nextStep {
		return (&leaderTransfer{to: id, began: began}).step
	}
	checkRules(t, []ruleTest{
		{"this one", to(1, 0), nil, "done"},
		{"a voter", to(2, 0), nil, "hand over to 2"},
		{"a learner", to(4, 0), nil, "NOT_CAUGHT_UP"},
		{"a stranger", to(8, 0), nil, "UNKNOWN_MEMBER"},
		{"during another change", to(2, 0), func(l *leaderState) { l.mayChange = false }, "wait"},
		{"a silent voter", to(2, 0), func(l *leaderState) { l.isSilent(2) }, "wait"},
		{"one that is not connected", to(2, 0), func(l *leaderState) { delete(l.connected, 2) }, "UNREACHABLE"},
		{"it was tried just now", to(2, newFacts().now-60), nil, "hand over to 2"},
		{"it was tried long ago", to(2, newFacts().now-61), nil, "UNREACHABLE"},
	})
}

// TestLeaveJointRule: the leader ends a change once the voters that leave know of it, and
// hands over first if it leaves itself.
func TestLeaveJointRule(t *testing.T) {
	l := newFacts()
	l.conf = &raftpb.ConfState{Voters: []uint64{1, 3}, VotersOutgoing: []uint64{1, 2, 3}}
	j := &jointStay{}
	want := func(what, want string) {
		t.Helper()
		if got := describeStep(j.step(l)); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	want("2 has to know", "announce")
	j.notice = 61
	want("2 does not know yet", "wait")
	l.progress[2] = tracker.Progress{Match: 61}
	want("2 knows", "leave")
	want("it is on its way", "wait")
	l.now += ticksPerHeartbeat
	want("it may be lost", "leave")

	*j = jointStay{conf: l.conf, term: l.raft.term, began: l.now, notice: 62}
	want("2 does not know", "wait")
	l.now += 2*l.electionTicks + 1
	l.answers(2)
	want("2 is not waited for any longer", "leave")

	*j = jointStay{}
	l.isSilent(2)
	want("2 does not answer", "leave")

	*j = jointStay{}
	l.answers(3)
	l.conf.Voters = []uint64{3}
	want("the leader leaves", "hand over to 3")
	*j = jointStay{}
	l.isSilent(3)
	want("the leader leaves, and nobody answers", "wait")
}

// TestHealingRule: a node that comes back without memory is taken back as a learner; of
// its two members the one goes whose process has ended.
func TestHealingRule(t *testing.T) {
	long := newFacts().ticksOf(leaderWait) + 2*newFacts().electionTicks + 1
	isReborn := func(l *leaderState) {
		l.reborn[3] = &rebirth{Peer: &kvpb.Peer{RaftId: 33, Node: plainNode(3)}, seen: l.now}
	}
	two := func(but func(*leaderState)) func(*leaderState) {
		return func(l *leaderState) {
			l.hasTwo()
			but(l)
		}
	}
	// since is how long the leader has seen that the node has two.
	heal := func(since uint64) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep {
			h := &healing{duplicates: map[uint64]*duplicate{}}
			h.duplicates[9] = &duplicate{term: l.raft.term, since: l.now - since}
			return h.step(l, quiet())
		}
	}
	checkRules(t, []ruleTest{
		{"all is well", heal(long), nil, "wait"},
		{"a voter is reborn", heal(long), isReborn, "learner 33"},
		{"it was, long ago", heal(long), func(l *leaderState) {
			isReborn(l)
			l.reborn[3].seen = 1
		}, "wait"},
		{"and was removed since", heal(long), func(l *leaderState) {
			isReborn(l)
			l.removed = []uint64{33}
		}, "wait"},
		{"both answer", heal(long), (*leaderState).hasTwo, "wait"},
		{"the learner alone answers", heal(long), two(func(l *leaderState) { l.isSilent(3) }), "voter 9, without 3"},
		{"for a short time", heal(long - 1), two(func(l *leaderState) { l.isSilent(3) }), "wait"},
		{"where the older one was", heal(0), two(func(l *leaderState) {
			l.isSilent(3)
			l.members[9] = plainNode(3)
		}), "voter 9, without 3"},
		{"it has yet to catch up", heal(long), two(func(l *leaderState) {
			l.isSilent(3)
			l.isBehind(9)
		}), "wait"},
		{"the leader is new", heal(long), two(func(l *leaderState) {
			l.isSilent(3)
			l.leadHeard = l.now
		}), "wait"},
		{"the older one alone answers", heal(long), two(func(l *leaderState) { l.isSilent(9) }), "without 9"},
		{"the older one, for a short time", heal(long - 1), two(func(l *leaderState) { l.isSilent(9) }), "wait"},
		{"none answers", heal(long), two(func(l *leaderState) {
			l.isSilent(3)
			l.isSilent(9)
		}), "wait"},
	})

	// What was seen in an earlier term does not count.
	l := newFacts()
	l.hasTwo()
	l.isSilent(9)
	h := &healing{duplicates: map[uint64]*duplicate{9: {term: l.raft.term - 1, since: l.now - long}}}
	if s := h.step(l, quiet()); s.kind != stepWait {
		t.Errorf("seen in an earlier term: %q", describeStep(s))
	}
}

// TestSuccessors: who could lead instead, the one with most of the log first.
func TestSuccessors(t *testing.T) {
	l := newFacts()
	l.progress[3] = tracker.Progress{Match: 61}
	if got := l.successors([]uint64{1, 2, 3, 4, 8}); !slices.Equal(got, []uint64{3, 2}) {
		t.Errorf("of all: %v", got)
	}
	l.isSilent(3)
	if got := l.successors([]uint64{1, 2, 3}); !slices.Equal(got, []uint64{2}) {
		t.Errorf("3 is silent: %v", got)
	}
}

// TestLostChangeBlocksForAWhile: a change that was lost lets others start after an
// election timeout, one that has ended at once.
func TestLostChangeBlocksForAWhile(t *testing.T) {
	var c membershipChange
	if !c.mayStart(1000, 30) {
		t.Error("there is none, and it blocks")
	}
	c.start(1000)
	if c.mayStart(1030, 30) {
		t.Error("another one may start beside it")
	}
	if !c.mayStart(1031, 30) {
		t.Error("it blocks for ever")
	}
	c.end()
	if !c.mayStart(1000, 30) {
		t.Error("it has ended, and blocks")
	}
}
