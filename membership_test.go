// Tests of membership.go and admin.go: what operators ask for, also at bad moments:
// beside each other, of nodes that do not answer, and under a leader that is new.

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/cryptotest"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// newFacts is what node 1 knows when it has led nodes 2 and 3 for long: all answer, and
// have caught up. 4 is a learner like that.
func newFacts() *leaderState {
	const now = 10_000
	l := &leaderState{upToDate: 50, progress: map[uint64]tracker.Progress{}}
	l.clusterState = clusterState{
		now:           now,
		wall:          now + 1_000,
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
		return func(l *leaderState) nextStep { return l.learnerStep(&kvpb.Peer{RaftId: raftID, Node: m}) }
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
	longAgo := newFacts().wall - 61
	checkRules(t, []ruleTest{
		{"this one", to(1, 0), nil, "done"},
		{"a voter", to(2, 0), nil, "hand over to 2"},
		{"a learner", to(4, 0), nil, "NOT_CAUGHT_UP"},
		{"a stranger", to(8, 0), nil, "UNKNOWN_MEMBER"},
		{"during another change", to(2, 0), func(l *leaderState) { l.mayChange = false }, "wait"},
		{"a silent voter", to(2, 0), func(l *leaderState) { l.isSilent(2) }, "wait"},
		{"one that is not connected", to(2, 0), func(l *leaderState) { delete(l.connected, 2) }, "UNREACHABLE"},
		{"it was tried just now", to(2, newFacts().wall-60), nil, "hand over to 2"},
		{"it was tried long ago", (&leaderTransfer{to: 2, began: longAgo, asked: true}).step, nil, "UNREACHABLE"},
		{"it is heard of again", to(2, longAgo), nil, "hand over to 2"},
		{"it was silent for long", to(2, longAgo), func(l *leaderState) { l.isSilent(2) }, "UNREACHABLE"},
		{"it was tried long ago, and raft still tries", to(2, longAgo), func(l *leaderState) { l.mayChange = false }, "wait"},
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
	j.witness = 61
	want("2 does not know yet", "wait")
	l.progress[2] = tracker.Progress{Match: 61}
	want("2 knows", "leave")
	want("it is on its way", "wait")
	l.now += ticksPerHeartbeat
	want("it may be lost", "leave")

	*j = jointStay{conf: l.conf, term: l.raft.term, began: l.now, witness: 62}
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

// call makes a request in the background, by way of a node.
func (c *testCluster) call(f func() error) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	return ended
}

func TestRemoveAtOnce(t *testing.T) {
	t.Parallel() // it mostly waits
	c := newCluster(t, 5, patient)
	c.init(1, 2, 3, 4, 5)
	var wg sync.WaitGroup
	for id := uint64(4); id <= 5; id++ { // two operators
		wg.Go(func() { c.change(id-3, &kvpb.ChangeMembershipRequest{Remove: []uint64{id}}) })
	}
	wg.Wait()
	c.settled(1, 2, 3)
}

// TestMadeAlreadyIsNoError: a request that a leader has made, and had no time to
// answer, succeeds when the next one gets it, however much of it is left to do. What
// can never have been made fails as before.
func TestMadeAlreadyIsNoError(t *testing.T) {
	t.Parallel() // it mostly waits
	c := newCluster(t, 5, patient)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.addLearner(1, 5)
	both := &kvpb.ChangeMembershipRequest{Remove: []uint64{4, 5}}
	c.change(2, both)
	c.change(1, both)
	c.transfer(1, 3)
	c.change(2, both) // by a leader that learned of them in a snapshot or the log
	c.addLearner(2, 5)
	c.change(2, both) // one of them is left
	c.uninitialized(4, 5)
	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{5, 4}})
	c.change(1, &kvpb.ChangeMembershipRequest{Remove: []uint64{4}})
	for _, req := range []*kvpb.ChangeMembershipRequest{
		{Remove: []uint64{6}}, {Remove: []uint64{2, 6}}, {Remove: []uint64{4, 6}}, {Remove: []uint64{4}, Promote: []uint64{5}},
		{Demote: []uint64{4}}, {Members: []uint64{1, 2, 3, 4}},
	} {
		_, err := c.nodes[2].ChangeMembership(c.ctx, req)
		if st := status.Convert(err); st.Code() != codes.NotFound || reasonOf(err) != "UNKNOWN_MEMBER" {
			t.Errorf("%v: %v", req, err)
		}
	}
	c.settled(1, 2, 3)
}

// TestNewLeaderJudgesLater: a learner that has caught up is not refused because
// the leader is new and has not heard from it.
func TestNewLeaderJudgesLater(t *testing.T) {
	t.Parallel() // it mostly waits
	c := newCluster(t, 4, patient)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.cut(4)
	c.transfer(1, 2)
	ended := c.call(func() error {
		_, err := c.nodes[2].ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3, 4}})
		return err
	})
	c.inLoop(2, func(n *node) error { // until it waits
		if len(n.calls.requests) == 0 && len(ended) == 0 {
			return errors.New("node 2 has no request yet")
		}
		return nil
	})
	c.heal()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// TestWhoMayVote: a learner becomes a voter if it answers and has caught up, and a
// change is made if most of those who then vote answer; but a leader that is new
// waits until it has heard from them.
func TestWhoMayVote(t *testing.T) {
	l := newLoneWithLearner(t)
	n := l.n
	req := &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3, 4}}
	reason := func() string {
		return errorReason(n.perform(n.leaderState().membershipStep(req)).err)
	}
	l.n.peerUp(4, true, nil)
	l.turn(0)
	n.peers.heard[2], n.peers.heard[3], n.peers.heard[4] = n.clock.now, n.clock.now, n.clock.now
	if r := reason(); r != "" {
		t.Errorf("a new leader says %s", r)
	}
	n.clock.now += n.electionTicks() + 1
	for _, test := range []struct {
		heard []uint64
		want  string
	}{{nil, "UNREACHABLE"}, {[]uint64{2, 3}, "UNREACHABLE"}, {[]uint64{4}, "NOT_CAUGHT_UP"}, {[]uint64{2, 3, 4}, "NOT_CAUGHT_UP"}} {
		clear(n.peers.heard)
		for _, id := range test.heard {
			n.peers.heard[id] = n.clock.now
		}
		if r := reason(); r != test.want {
			t.Errorf("heard of %v, it says %q, want %q", test.heard, r, test.want)
		}
	}
	n.change.startedAt = n.clock.now // this one, perhaps
	if r := reason(); r != "" {
		t.Errorf("while a change is on its way, it says %q", r)
	}
	n.change.startedAt = 0
	req.Members = []uint64{1, 2}
	clear(n.peers.heard)
	if r := reason(); r != "UNREACHABLE" {
		t.Errorf("the other of two voters is silent, it says %q", r)
	}
	if n.peers.heard[2] = n.clock.now; reason() != "" {
		t.Errorf("it says %q", reason())
	}
}

// TestBegunIsUnknown: a change that was proposed, and whose leader then lost its
// leadership for good, is not said to be none.
func TestBegunIsUnknown(t *testing.T) {
	l := newLone(t, leading)
	s := &server{n: l.n}
	ended := make(chan error, 1)
	go func() {
		ended <- s.changeMembership(t.Context(), &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}})
	}()
	eventually(t, func() error {
		l.turn(0)
		l.n.peers.heard[2], l.n.peers.heard[3] = l.n.clock.now, l.n.clock.now
		if l.n.change.startedAt == 0 {
			l.turn(1)
			return errors.New("nothing is proposed")
		}
		return nil
	})
	l.hears(0, message(raftpb.MsgHeartbeat, 2, 9))
	if err := <-ended; !errors.Is(err, errChangeUnknown) || !errors.Is(err, errNotLeader) {
		t.Errorf("it ends with %v", err)
	}

	l = newLone(t, leading)
	s = &server{n: l.n}
	for _, then := range []error{
		errNotLeader, errNotInitialized, context.DeadlineExceeded,
		apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, "node 4 does not answer"),
		apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_CHANGE_IN_PROGRESS, "the change that was begun, perhaps"),
	} {
		tries := 0
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		err := s.onLeader(ctx, "", nil, nil, func(context.Context) error {
			if tries++; tries == 1 {
				return fmt.Errorf("%w: %w", errChangeUnknown, errNotLeader)
			}
			return then
		})
		wantError(t, toStatus(err, false), codes.DeadlineExceeded, "OUTCOME_UNKNOWN")
		if tries < 2 {
			t.Error("it is not made again")
		}
	}

	for _, code := range []codes.Code{codes.Unavailable, codes.FailedPrecondition, codes.DeadlineExceeded, codes.Aborted, codes.NotFound} {
		steps := 0
		go func() {
			ended <- s.awaitChange(t.Context(), func(*leaderState) nextStep {
				if steps++; steps == 1 {
					l.n.change.startedAt++
					return nextStep{kind: stepWait}
				}
				return failStep(apiError(code, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP, ""))
			})
		}()
		eventually(t, func() error {
			l.ack(2)
			if len(ended) == 0 {
				return errors.New("it waits")
			}
			return nil
		})
		if err := toStatus(<-ended, false); (errorReason(err) == "OUTCOME_UNKNOWN") != (code != codes.NotFound) {
			t.Errorf("%v, which ends one that was begun: %v", code, err)
		}
	}
}

// expectedOf is a membership of nodes that plainNode makes.
func expectedOf(voters, learners []uint64) *kvpb.Membership {
	m := &kvpb.Membership{}
	for _, id := range slices.Concat(voters, learners) {
		m.Members = append(m.Members, &kvpb.ExpectedMember{Node: plainNode(id), Voter: slices.Contains(voters, id)})
	}
	return m
}

// operatorsRequests are what operators may want of a node that leads, and has added
// the learner 4, that it can answer at once; and with what.
func operatorsRequests() map[string]struct {
	next   func(*leaderState) nextStep
	reason string
} {
	type request = struct {
		next   func(*leaderState) nextStep
		reason string
	}
	change := func(req *kvpb.ChangeMembershipRequest) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep { return l.membershipStep(req) }
	}
	lead := func(to uint64) func(*leaderState) nextStep {
		t := &leaderTransfer{to: to}
		return t.step
	}
	add := func(raftID uint64, m *kvpb.Node) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep { return l.learnerStep(&kvpb.Peer{RaftId: raftID, Node: m}) }
	}
	return map[string]request{
		"the present voters":        {change(&kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}}), ""},
		"what is promoted already":  {change(&kvpb.ChangeMembershipRequest{Promote: []uint64{2}}), ""},
		"what is demoted already":   {change(&kvpb.ChangeMembershipRequest{Demote: []uint64{4}}), ""},
		"what is removed already":   {change(&kvpb.ChangeMembershipRequest{Remove: []uint64{5}}), ""},
		"an unknown voter":          {change(&kvpb.ChangeMembershipRequest{Members: []uint64{1, 99}}), "UNKNOWN_MEMBER"},
		"an unknown one to go":      {change(&kvpb.ChangeMembershipRequest{Remove: []uint64{99}}), "UNKNOWN_MEMBER"},
		"no voter":                  {change(&kvpb.ChangeMembershipRequest{Remove: []uint64{1, 2, 3}}), "INVALID_FIELD"},
		"a voter that is behind":    {change(&kvpb.ChangeMembershipRequest{Promote: []uint64{4}}), "UNREACHABLE"},
		"another membership":        {change(&kvpb.ChangeMembershipRequest{Remove: []uint64{2}, Expected: expectedOf([]uint64{1, 2, 3}, nil)}), "MEMBERSHIP_CHANGED"},
		"the leader as the leader":  {lead(1), ""},
		"a learner as the leader":   {lead(4), "NOT_CAUGHT_UP"},
		"an unknown leader":         {lead(99), "UNKNOWN_MEMBER"},
		"the leader as a learner":   {add(1, plainNode(1)), ""},
		"who is in another's place": {add(9, &kvpb.Node{Id: 9, Address: plainNode(2).Address}), "MEMBER_EXISTS"},
	}
}

// TestNoAnswerWithoutMajority: a leader answers no operator, neither with a success nor
// with a refusal, before a majority has followed it since he asked: it may have been
// deposed, and membership is another. What another request was answered with tells nothing.
func TestNoAnswerWithoutMajority(t *testing.T) {
	newLeader := func() *lone {
		l := newLoneWithLearner(t)
		l.n.store.former = []uint64{5}
		l.n.election.leadHeard = 0
		for l.n.clock.now <= 2*l.n.electionTicks() { // it is no new leader, and has heard from 2 and 3, not 4
			l.turn(1)
			l.ack(2, 3)
		}
		return l
	}
	for what := range operatorsRequests() {
		l := newLeader()
		first, second := l.ask(operatorsRequests()[what].next), (<-chan error)(nil)
		l.turn(1)
		if l.ack(2); len(first) != 1 {
			t.Fatalf("%s: with a majority it is not answered", what)
		}
		second = l.ask(operatorsRequests()[what].next)
		for range l.n.electionTicks() / 2 { // and hears of nobody
			l.turn(1)
		}
		if len(second) > 0 {
			t.Errorf("%s: without a majority it is answered with %v", what, <-second)
			continue
		}
		l.ack(3)
		if len(second) != 1 {
			t.Errorf("%s: a majority is back, and it is not answered", what)
			continue
		}
		want := operatorsRequests()[what].reason
		for _, err := range []error{<-first, <-second} {
			if errorReason(err) != want || (err == nil) != (want == "") {
				t.Errorf("%s: it is answered with %v, want %q", what, err, want)
			}
		}
		third := l.ask(operatorsRequests()[what].next)
		l.hears(0, message(raftpb.MsgHeartbeat, 2, l.n.raft.term+1))
		if err := <-third; err != errNotLeader {
			t.Errorf("%s: a follower answers with %v", what, err)
		}
	}
}

// TestDeposedLeaderAnswersNoOperator: a leader that was deposed, and does not know
// yet, does not say that what was asked for is so. It is not so any more.
func TestDeposedLeaderAnswersNoOperator(t *testing.T) {
	t.Parallel() // it mostly waits
	c := newCluster(t, 4)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	old := c.settled(1, 2, 3)
	all := &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}}
	c.change(old, all) // he knows what is known of it, once
	c.cut(old)
	others := slices.DeleteFunc([]uint64{1, 2, 3}, func(id uint64) bool { return id == old })
	var leader uint64
	eventually(t, func() error {
		for _, id := range others {
			if m, err := c.metrics(id); err == nil && m.Role == kvpb.Role_ROLE_LEADER {
				leader = id
				return nil
			}
		}
		return errors.New("no new leader")
	})
	c.change(leader, &kvpb.ChangeMembershipRequest{Members: append([]uint64{4}, others...)})
	for what, f := range map[string]func(context.Context, *testNode) error{
		"the voters that were": func(ctx context.Context, n *testNode) error {
			_, err := n.ChangeMembership(ctx, all)
			return err
		},
		"the leader that was": func(ctx context.Context, n *testNode) error {
			_, err := n.TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: old})
			return err
		},
		"an unknown member": func(ctx context.Context, n *testNode) error {
			_, err := n.ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Remove: []uint64{99}})
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(c.ctx, 100*time.Millisecond)
		defer cancel()
		switch err := f(ctx, c.nodes[old]); reasonOf(err) {
		case "NO_LEADER", "NOT_LEADER", "DEADLINE", "OUTCOME_UNKNOWN":
		case "":
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%s: node %d, which was deposed, answers with %v", what, old, err)
			}
		default:
			t.Errorf("%s: node %d, which was deposed, answers with %v", what, old, err)
		}
	}
	c.heal()
}

// TestChangeIsForOneMembership: of two operators who change the same membership, one
// succeeds, and the other hears of the membership as it is then. What is so already is
// so, whatever he expected.
func TestChangeIsForOneMembership(t *testing.T) {
	t.Parallel() // it mostly waits
	c := newCluster(t, 5, patient)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.addLearner(1, 5)
	present := func() *kvpb.Membership {
		m, err := c.metrics(1) // the leader
		if err != nil {
			t.Fatal(err)
		}
		expected := &kvpb.Membership{}
		for _, ms := range m.Members {
			expected.Members = append(expected.Members, &kvpb.ExpectedMember{Node: ms.Node, Voter: ms.Voter})
		}
		return expected
	}
	for range 3 {
		before := present()
		slices.Reverse(before.Members) // in any order
		ended := map[uint64]<-chan error{}
		for id := uint64(4); id <= 5; id++ {
			ended[id] = c.call(func() error {
				_, err := c.nodes[id-2].ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3, id}, Retain: true, Expected: before})
				return err
			})
		}
		won := uint64(0)
		for id, ch := range ended {
			err := <-ch
			if err == nil && won == 0 {
				won = id
				continue
			}
			wantError(t, err, codes.Aborted, "MEMBERSHIP_CHANGED")
			wantPart(t, err.Error(), fmt.Sprintf("%d=%s voter", 9-id, c.nodes[9-id].address))
			wantPart(t, err.Error(), fmt.Sprintf("%d=%s learner", id, c.nodes[id].address))
		}
		if won == 0 {
			t.Fatal("none of them has succeeded")
		}
		c.settled(1, 2, 3, won)
		c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{won}, Expected: before})
		c.change(2, &kvpb.ChangeMembershipRequest{Demote: []uint64{9 - won}, Expected: before})
		c.change(3, &kvpb.ChangeMembershipRequest{Demote: []uint64{won}, Expected: present()})
		c.settled(1, 2, 3)
	}
	for what, change := range map[string]func(m *kvpb.ExpectedMember){
		"another address": func(m *kvpb.ExpectedMember) { m.Node.Address = "127.0.0.1:1" },
		"another id":      func(m *kvpb.ExpectedMember) { m.Node.Id = 9 },
		"another role":    func(m *kvpb.ExpectedMember) { m.Voter = !m.Voter },
	} {
		expected := present()
		change(expected.Members[2])
		_, err := c.nodes[2].ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: expected})
		if reasonOf(err) != "MEMBERSHIP_CHANGED" {
			t.Errorf("%s was expected: %v", what, err)
		}
	}
}

// TestLostChangeIsForOneMembership: a change that seems to be lost, and comes when
// another for the same membership has been proposed, does not bring that one with it.
func TestLostChangeIsForOneMembership(t *testing.T) {
	l := newLone(t, leading)
	n := l.n
	expected := expectedOf([]uint64{1, 2, 3}, nil)
	beat := func() { // followed, but nothing is committed
		l.turn(1)
		l.hears(0, message(raftpb.MsgHeartbeatResp, 2, n.raft.term))
		l.hears(1, message(raftpb.MsgHeartbeatResp, 3, n.raft.term))
	}
	beat()
	first := l.ask(func(l *leaderState) nextStep {
		return l.membershipStep(&kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}, Expected: expected})
	})
	proposed := n.log.last()
	if n.change.startedAt == 0 {
		t.Fatal("nothing is proposed")
	}
	second := l.ask(func(l *leaderState) nextStep {
		return l.membershipStep(&kvpb.ChangeMembershipRequest{Members: []uint64{1, 3}, Expected: expected})
	})
	if n.log.last() != proposed {
		t.Error("another one is proposed at once")
	}
	for range 2 * n.electionTicks() {
		beat()
	}
	if n.log.last() == proposed {
		t.Fatal("it does not count as lost")
	}
	for range 10 {
		l.turn(1)
		l.ack(2, 3)
	}
	if len(first) != 1 || len(second) != 1 {
		t.Fatalf("not both are answered: %d, %d", len(first), len(second))
	}
	if err := <-first; err != nil {
		t.Errorf("the first ends with %v", err)
	}
	wantError(t, <-second, codes.Aborted, "MEMBERSHIP_CHANGED")
	if voters := n.store.conf.GetVoters(); !slices.Equal(voters, []uint64{1, 2}) || isJoint(n.store.conf) {
		t.Errorf("the configuration is %v", n.store.conf)
	}
}

// TestExpectedWhileHealing: a node that is being taken back is expected as before.
func TestExpectedWhileHealing(t *testing.T) {
	l := newLone(t, leading)
	s := l.n.store
	whole := rolesOf(s.conf, s.members)
	life := plainMembers(9)
	life[0].Node = plainNode(3)
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{9}}, life)
	if now := rolesOf(s.conf, s.members); !maps.Equal(now, whole) {
		t.Errorf("while node 3 is taken back, the roles are %v, before %v", now, whole)
	}
	life[0].Node = &kvpb.Node{Id: 3, Address: "moved:1"}
	s.configure(s.conf, life)
	moved := map[uint64]memberRole{1: whole[1], 2: whole[2], 3: {"moved:1", true}}
	if now := rolesOf(s.conf, s.members); !maps.Equal(now, moved) {
		t.Errorf("while node 3 moves, the roles are %v", now)
	}
	two := newTwoLives(t, 3).n
	if sent := expectedRoles(membershipOf(two.metrics())); !maps.Equal(sent, rolesOf(two.store.conf, two.store.members)) {
		t.Errorf("the command line says of a node with two lives %v", sent)
	}
	rows := []*kvpb.ExpectedMember{{Node: plainNode(3), Voter: true}, {Node: life[0].Node}, {Node: plainNode(1), Voter: true}, {Node: plainNode(2), Voter: true}}
	for range 2 {
		if got := expectedRoles(&kvpb.Membership{Members: rows}); !maps.Equal(got, moved) {
			t.Errorf("as Metrics lists it, it is %v", got)
		}
		slices.Reverse(rows)
	}
}

// TestPromoteAndDemote: who is not named stays as it is; the leader may be demoted,
// and all of it is one change.
func TestPromoteAndDemote(t *testing.T) {
	t.Parallel() // it mostly waits
	c := newCluster(t, 5)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.addLearner(1, 5)
	roles := func(voters, learners []uint64) {
		t.Helper()
		c.settled(voters...)
		m, err := c.metrics(voters[0])
		if _, got := membersOf(m); err != nil || !slices.Equal(got, learners) {
			t.Errorf("learners are %v, want %v, %v", got, learners, err)
		}
	}
	c.change(2, &kvpb.ChangeMembershipRequest{Promote: []uint64{4}})
	roles([]uint64{1, 2, 3, 4}, []uint64{5})
	leader := c.settled(1, 2, 3, 4)
	rest := slices.DeleteFunc([]uint64{1, 2, 3, 4}, func(id uint64) bool { return id == leader })
	c.change(leader, &kvpb.ChangeMembershipRequest{Promote: []uint64{5}, Demote: []uint64{leader}})
	roles(append(rest, 5), []uint64{leader})
	c.change(leader, &kvpb.ChangeMembershipRequest{Promote: []uint64{leader}, Remove: []uint64{5}})
	roles([]uint64{1, 2, 3, 4}, nil)
	c.uninitialized(5)
	c.change(leader, &kvpb.ChangeMembershipRequest{Demote: rest}) // all but the leader
	roles([]uint64{leader}, rest)
	c.change(rest[0], &kvpb.ChangeMembershipRequest{Promote: rest[:1], Demote: []uint64{leader}}) // whom nobody can follow yet
	roles(rest[:1], slices.Sorted(slices.Values(append([]uint64{leader}, rest[1:]...))))
	c.works(1, 2, 3, 4)
}

// listenAndClose takes connections, and closes them before a request can be sent off.
func listenAndClose(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-ended
	})
	return l.Addr().String()
}

// TestForwardFails: what a leader that fails has done with a request is unknown,
// unless it never got it; each error has a reason.
func TestForwardFails(t *testing.T) {
	l := newLone(t, following)
	nw := newNetwork(l.n, quiet(), nil)
	defer nw.close()
	s := &server{n: l.n, net: nw}
	forward := func(timeout time.Duration, address string) error {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		return s.forward(ctx, &kvpb.Node{Id: 2, Address: address}, kvpb.ClusterService_TransferLeader_FullMethodName, &kvpb.TransferLeaderRequest{NodeId: 1}, &kvpb.TransferLeaderResponse{})
	}
	if err := forward(pollDeadline, deadAddress(t)); errors.Is(err, errChangeUnknown) || !errors.Is(err, errNotLeader) {
		t.Errorf("nobody is there: %v", err)
	}
	if err := forward(pollDeadline, listenAndClose(t)); errors.Is(err, errChangeUnknown) || !errors.Is(err, errNotLeader) {
		t.Errorf("it takes connections, and closes them at once: %v", err)
	}
	if err := forward(100*time.Millisecond, listenSilently(t)); err != context.DeadlineExceeded {
		t.Errorf("nobody answers: %v", err)
	}
	f := newFakeNode(t)
	fails := func(code codes.Code, reason kvpb.ErrorReason) error {
		f.failWith(func(context.Context) error { return apiError(code, reason, "") })
		return forward(pollDeadline, f.addr)
	}
	if err := fails(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN); !errors.Is(err, errChangeUnknown) || !errors.Is(err, errNotLeader) {
		t.Errorf("it does not know: %v", err)
	}
	for reason, again := range map[kvpb.ErrorReason]bool{
		kvpb.ErrorReason_ERROR_REASON_STOPPING: true, kvpb.ErrorReason_ERROR_REASON_NO_LEADER: true, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE: false,
	} {
		if err := fails(codes.Unavailable, reason); errors.Is(err, errNotLeader) != again || errors.Is(err, errChangeUnknown) {
			t.Errorf("%v: %v", reason, err)
		}
	}
	f.failWith(func(ctx context.Context) error { go f.server.Stop(); <-ctx.Done(); return ctx.Err() })
	if err := forward(pollDeadline, f.addr); !errors.Is(err, errChangeUnknown) || !errors.Is(err, errNotLeader) {
		t.Errorf("it ends meanwhile: %v", err)
	}
}

// TestTransferToSilent: raft takes no writes while it waits for a node that is
// to lead, so it is not even asked if that node does not answer.
func TestTransferToSilent(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		refused := func(leader, to uint64) {
			t.Helper()
			_, err := b.nodes[leader].TransferLeader(b.ctx, &kvpb.TransferLeaderRequest{NodeId: to})
			wantError(t, err, codes.Unavailable, "UNREACHABLE")
			b.inLoop(leader, func(n *node) error {
				if n.change.startedAt != 0 || n.raft.role != raft.StateLeader {
					t.Errorf("raft was asked to make node %d the leader", to)
				}
				return nil
			})
		}
		leader, rest := b.leaderAndRest()
		to := rest[0]
		release := b.hold(to)
		b.inLoop(leader, func(n *node) error {
			if n.alive(n.store.raftIDsOf(to)[0]) || n.raft.role != raft.StateLeader {
				return errors.New("it was heard of")
			}
			return nil
		})
		refused(leader, to)
		release()
		b.transfer(leader, to)
		leader, to = to, leader
		b.stop(to)
		b.inLoop(leader, func(n *node) error {
			if n.peers.connected[n.store.raftIDsOf(to)[0]] {
				return errors.New("it is connected")
			}
			return nil
		})
		refused(leader, to)
	})
}

// TestTransferOfBusyLeader: how long a node is waited for that is to lead is told by the time, not
// by the ticks that a busy loop makes: its operator's time passes, too.
func TestTransferOfBusyLeader(t *testing.T) {
	l := newLone(t, leading)
	for l.n.alive(2) {
		l.turn(1)
		l.ack(3)
	}
	answer := l.ask((&leaderTransfer{to: 2}).step)
	l.turn(1)
	l.ack(3)
	if len(answer) > 0 {
		t.Fatalf("it is answered at once: %v", <-answer)
	}
	l.n.clock.wall += 2 * l.n.electionTicks() // which the loop has missed
	l.turn(1)
	l.ack(3)
	select {
	case err := <-answer:
		if errorReason(err) != "UNREACHABLE" {
			t.Errorf("it is answered with %v", err)
		}
	default:
		t.Error("it is not answered")
	}
}

// TestLeaversKnow: two voters leave at once. The leader does not cut one of them off that
// has yet to hear of it: the other one forgets all it knew, so that there would be no
// majority to tell the first that it was removed.
func TestLeaversKnow(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	begin := func(t *testing.T) *bus {
		b := newBus(t, 1, 2, 3)
		b.elect(3, 1, 2)
		b.beat(3, 1, 2)
		leader := b.nodes[3]
		leader.inbox.event(func() {
			err := leader.proposeChange(nil,
				confChange(raftpb.ConfChangeRemoveNode, 1), confChange(raftpb.ConfChangeRemoveNode, 2))
			if err != nil {
				t.Error(err)
			}
		})
		b.turn(3, 0)
		return b
	}
	isHalfWay := func(b *bus, id uint64) bool { return isJoint(b.nodes[id].store.conf) }

	b := begin(t)
	b.flow(1, 3)
	if !isHalfWay(b, 1) || !isHalfWay(b, 3) || isHalfWay(b, 2) {
		t.Fatalf("want a change that only node 2 has not heard of: %s, %s, %s", b.state(1), b.state(2), b.state(3))
	}
	b.flow(2, 3)
	if isHalfWay(b, 3) || len(b.nodes[3].store.members) != 1 {
		t.Fatalf("both know of the change, and it has not ended: %s", b.state(3))
	}
	b.nodes[2].refused(2, 3, &kvpb.Welcome{
		Verdict:   kvpb.Verdict_VERDICT_REMOVED,
		Peer:      &kvpb.Peer{Node: plainNode(3), RaftId: 3, Life: 3},
		ClusterId: 7,
	})
	b.turn(2, 0)
	if b.nodes[2].rn != nil {
		t.Errorf("the voter that stays says that node 2 was removed, and node 2 does not believe it: %s", b.state(2))
	}

	b = begin(t)
	for ticks := uint64(0); isHalfWay(b, 3) || len(b.nodes[3].store.members) != 1; ticks++ {
		if ticks > 3*b.nodes[3].electionTicks() {
			t.Fatalf("the leader waits for ever for a voter that leaves and gets nothing: %s", b.state(3))
		}
		b.turn(3, 1)
		b.flow(1, 3)
		to2 := busLink{3, 2}
		b.wire[to2] = slices.DeleteFunc(b.wire[to2], func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgApp })
		b.pass(3, 2, -1)
		b.pass(2, 3, -1)
	}
}

func TestForwarding(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4, steady)
	c.init(1, 2, 3)
	learner := c.proto(4)[0]
	for id := uint64(1); id <= 3; id++ {
		n := c.nodes[id]
		for name, f := range map[string]func(...grpc.CallOption) error{
			"Set": func(o ...grpc.CallOption) error { _, err := n.Set(c.ctx, &kvpb.SetRequest{Key: "k"}, o...); return err },
			"Get": func(o ...grpc.CallOption) error { _, err := n.Get(c.ctx, &kvpb.GetRequest{Key: "k"}, o...); return err },
			"Delete": func(o ...grpc.CallOption) error {
				_, err := n.Delete(c.ctx, &kvpb.DeleteRequest{Key: "k"}, o...)
				return err
			},
			"List":    func(o ...grpc.CallOption) error { _, err := n.List(c.ctx, &kvpb.ListRequest{}, o...); return err },
			"Metrics": func(o ...grpc.CallOption) error { _, err := n.Metrics(c.ctx, &kvpb.MetricsRequest{}, o...); return err },
			"AddLearner": func(o ...grpc.CallOption) error {
				_, err := n.AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: learner}, o...)
				return err
			},
		} {
			c.named(id, name, func(o ...grpc.CallOption) error {
				err := f(o...)
				if err != nil {
					t.Errorf("%s on node %d: %v", name, id, err)
				}
				return err
			})
		}
		eventually(t, func() error {
			m, err := c.metrics(4)
			if err == nil && m.Role != kvpb.Role_ROLE_LEARNER {
				err = fmt.Errorf("node 4 is no learner: %v", m)
			}
			return err
		})
		c.named(id, "ChangeMembership", func(o ...grpc.CallOption) error {
			_, err := n.ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4}}, o...)
			if err != nil {
				t.Errorf("ChangeMembership on node %d: %v", id, err)
			}
			return err
		})
		c.uninitialized(4)
		c.transfer(id, 1+id%3)
		c.settled(1, 2, 3)

		for name, f := range map[string]func(...grpc.CallOption) error{
			"Set":    func(o ...grpc.CallOption) error { _, err := n.Set(c.ctx, nil, o...); return err },
			"Get":    func(o ...grpc.CallOption) error { _, err := n.Get(c.ctx, nil, o...); return err },
			"Delete": func(o ...grpc.CallOption) error { _, err := n.Delete(c.ctx, nil, o...); return err },
			"List": func(o ...grpc.CallOption) error {
				_, err := n.List(c.ctx, &kvpb.ListRequest{Limit: 1 << 20}, o...)
				return err
			},
			"Init":             func(o ...grpc.CallOption) error { _, err := n.Init(c.ctx, nil, o...); return err },
			"AddLearner":       func(o ...grpc.CallOption) error { _, err := n.AddLearner(c.ctx, nil, o...); return err },
			"ChangeMembership": func(o ...grpc.CallOption) error { _, err := n.ChangeMembership(c.ctx, nil, o...); return err },
			"TransferLeader":   func(o ...grpc.CallOption) error { _, err := n.TransferLeader(c.ctx, nil, o...); return err },
		} {
			c.named(id, name, func(o ...grpc.CallOption) error {
				err := f(o...)
				if err == nil {
					t.Errorf("%s of nothing on node %d succeeds", name, id)
				}
				return err
			})
		}
	}
	var trailer metadata.MD
	_, err := c.nodes[4].Get(c.ctx, &kvpb.GetRequest{Key: "k", Local: true}, grpc.Trailer(&trailer))
	if wantError(t, err, codes.Unavailable, "NOT_INITIALIZED"); len(trailer.Get("x-raft-leader")) > 0 {
		t.Errorf("a node in no cluster names a leader: %v", trailer)
	}
}

// named checks that an answer names the leader: in the header of a success, in
// the trailer of an error.
func (c *testCluster) named(id uint64, name string, f func(...grpc.CallOption) error) {
	c.t.Helper()
	eventually(c.t, func() error {
		before, err := c.metrics(id)
		if err != nil || before.Leader == nil {
			return fmt.Errorf("node %d knows no leader: %v, %v", id, before, err)
		}
		var header, trailer metadata.MD
		err = f(grpc.Header(&header), grpc.Trailer(&trailer))
		md := header
		if err != nil {
			md = trailer
		}
		if after, err := c.metrics(id); err != nil || after.Term != before.Term {
			return fmt.Errorf("the leader changes all the time: %v, %v", after, err)
		}
		if got, want := md.Get("x-raft-leader"), []string{before.Leader.Address}; !slices.Equal(got, want) {
			c.t.Fatalf("%s: x-raft-leader is %q, want %q; %v", name, got, want, err)
		}
		return nil
	})
}
