// What operators ask for at bad moments: beside each other, of nodes that do
// not answer, and under a leader that is new.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// hold keeps a node's loop busy: its streams stay open, but it answers nothing.
func (c *testCluster) hold(id uint64) (release func()) {
	c.t.Helper()
	held, goOn := make(chan struct{}), make(chan struct{})
	c.nodes[id].server.n.inbox.event(func() { close(held); <-goOn })
	<-held
	release = sync.OnceFunc(func() { close(goOn) })
	c.t.Cleanup(release) // before the nodes are stopped
	return release
}

// inLoop polls a condition in a node's loop.
func (c *testCluster) inLoop(id uint64, f func(*node) error) {
	c.t.Helper()
	n := c.nodes[id].server.n
	eventually(c.t, func() error { return n.do(c.ctx, func() error { return f(n) }) })
}

// patient keeps the cluster from electing another leader by itself.
func patient(o *options) { o.election = o.heartbeat * 500 }

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

// call makes a request in the background, by way of a node.
func (c *testCluster) call(f func() error) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	return ended
}

func (c *testCluster) addMoved(id uint64, address string) error {
	_, err := c.nodes[id].AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: id, Address: address}})
	return err
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

// ack has followers, 2 or 3, acknowledge all that the node has in its log.
func (l *lone) ack(ids ...uint64) {
	l.turn(0)
	for _, id := range ids {
		l.hears(int(id-2), message(raftpb.MsgAppResp, id, l.n.raft.term, func(m *raftpb.Message) { *m.Index = l.n.log.last() }))
	}
}

// newLoneWithLearner is a node that leads, and has added 4.
func newLoneWithLearner(t *testing.T) *lone {
	t.Helper()
	l := newLone(t, leading)
	if err := l.n.proposeChange(plainMembers(4), confChange(raftpb.ConfChangeAddLearnerNode, 4)); err != nil {
		t.Fatal(err)
	}
	l.turn(0)
	l.hears(0, message(raftpb.MsgAppResp, 2, 2, func(m *raftpb.Message) { *m.Index = 3 }))
	if l.n.store.members[4] == nil {
		t.Fatal("no learner")
	}
	return l
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
	l.n.peerUp(4, true)
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
		err := s.onLeader(ctx, nil, nil, func(context.Context) error {
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
		return func(l *leaderState) nextStep { return l.learnerStep(raftID, m) }
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

// ask makes an operator's request.
func (l *lone) ask(next func(*leaderState) nextStep) <-chan error {
	r := &request{n: l.n, next: next}
	c := &pendingRequest{ctx: l.t.Context(), poll: r.poll, done: make(chan error, 1)}
	l.n.inbox.event(func() { l.n.calls.requests = append(l.n.calls.requests, c) })
	l.turn(0)
	return c.done
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

// TestPastLifeIsNeeded: a node that was removed, and does not know it yet, is not
// added again.
func TestPastLifeIsNeeded(t *testing.T) {
	l := newLoneWithLearner(t)
	n := l.n
	r := &request{n: n, next: func(l *leaderState) nextStep { return l.learnerStep(4, plainNode(4)) }}
	advance := func() error {
		ok, err := r.poll()
		l.turn(0)
		if ok {
			t.Fatal("it is a learner")
		}
		return err
	}
	if err := n.proposeChange(nil, confChange(raftpb.ConfChangeRemoveNode, 4)); err != nil {
		t.Fatal(err)
	}
	if l.ack(2); !slices.Contains(n.store.removed, 4) {
		t.Fatal("it is not removed")
	}
	for range 3 {
		if err := advance(); err != nil {
			t.Fatalf("nobody else knows, and it says %v", err)
		}
	}
	l.ack(2)
	for range 3 {
		if err := advance(); err != errPastLife {
			t.Fatalf("the others know, and it says %v", err)
		}
	}
}

// TestStrangersAreForgotten: of those who come and go nothing is kept.
func TestStrangersAreForgotten(t *testing.T) {
	n := newLone(t, following).n
	for id := uint64(1000); id < 2000; id++ {
		h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(9), RaftId: id, Life: id}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}}
		n.peerUp(id, false)
		n.inbox.deliver([]inbound{{message(raftpb.MsgPreVoteResp, id, 1), h}})
		n.turn(n.inbox.take())
	}
	if len(n.peers.heard) > maxMembers {
		t.Errorf("it has heard %d", len(n.peers.heard))
	}
}

// snapBox keeps the snapshots that a node sends.
type snapBox struct {
	*lone
	views []*view
}

func (b *snapBox) sendSnapshot(_, _ uint64, v *view) { b.views = append(b.views, v) }

// TestSnapshotOfChange: a follower whose log has to be sent anew makes raft ask for
// a snapshot while it takes a change of membership in. That has to be in it.
func TestSnapshotOfChange(t *testing.T) {
	l := newLoneWithLearner(t)
	n, box := l.n, &snapBox{lone: l}
	n.net = box
	n.opts.logBytes = 1 << 20
	l.hellos = append(l.hellos, &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(4), RaftId: 4, Life: 4}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}})
	n.peerUp(4, true)
	l.turn(0)
	ack := func(from, index uint64) {
		l.hears(int(from-2), message(raftpb.MsgAppResp, from, n.raft.term, func(m *raftpb.Message) { *m.Index = index }))
	}
	ack(4, n.log.last()) // the learner has what there is
	matched := n.log.last()
	delete(n.peers.connected, 3) // or the log would be kept for them
	delete(n.peers.connected, 4)
	for i := range 40 { // 4 MiB more, which 2 has at once and the learner not yet
		record, err := encodeWrite(setWrite(fmt.Sprint("key", i), strings.Repeat("x", 100<<10)))
		if err != nil {
			t.Fatal(err)
		}
		l.call(record)
		l.turn(0)
		ack(2, n.log.last())
	}
	if n.log.prevIndex <= matched || len(box.views) > 0 {
		t.Fatal("the log still has what the learner needs, or it has got a snapshot")
	}
	var jobs []diskJob
	n.durable.disk = &disk{start: func(func()) {}, wake: newBell()} // its jobs are done below
	if err := n.proposeChange(plainMembers(5), confChange(raftpb.ConfChangeAddLearnerNode, 5)); err != nil {
		t.Fatal(err)
	}
	l.turn(0)
	change := n.log.last()
	ack(2, change)
	ack(3, change)
	if n.rn.BasicStatus().GetCommit() != change || n.store.index == change {
		t.Fatal("it is not committed, or applied already")
	}
	n.peerDown(4, true)
	l.turn(0)
	n.durable.disk.mu.Lock()
	jobs, n.durable.disk.queue = n.durable.disk.queue, nil
	n.durable.disk.mu.Unlock()
	for _, j := range jobs {
		j.done(nil)
	}
	l.turn(0)
	if n.store.index != change || len(box.views) == 0 {
		t.Fatal("it is not applied, or no snapshot is sent")
	}
	for _, v := range box.views {
		if v.header.Index >= change && !slices.Contains(v.header.ConfState.Learners, 5) {
			t.Errorf("the snapshot of entry %d has not the configuration of entry %d", v.header.Index, change)
		}
	}
}

// TestNobodyIsReplacedWhoAnswers: a life takes the place of another at another
// address only if that one is silent, and not if the leader is new and may not have
// heard from it yet. Where another life was, none can be.
func TestNobodyIsReplacedWhoAnswers(t *testing.T) {
	for _, test := range []struct {
		name, address string
		change        func(n *node)
		reason        string
		begins        bool
	}{
		{"a new leader", "other:1", func(*node) {}, "", false},
		{"it was heard", "other:1", func(n *node) { n.peers.heard[3] = n.clock.now }, "MEMBER_EXISTS", false},
		{"it is silent", "other:1", func(n *node) { n.election.leadHeard = 0; n.clock.now += 2 * n.electionTicks() }, "", true},
		{"it is not connected", "other:1", func(n *node) { delete(n.peers.connected, 3) }, "", true},
		{"the same address", plainNode(3).Address, func(n *node) { n.peers.heard[3] = n.clock.now }, "", true},
		{"it answers where it has moved to", plainNode(3).Address, func(n *node) {
			n.peers.heard[3] = n.clock.now
			n.peers.moved[3] = &kvpb.Node{Id: 3, Address: "other:1"}
		}, "MEMBER_EXISTS", false},
		{"it was where another life answers", "other:1", func(n *node) {
			n.peers.heard[3] = n.clock.now
			n.peers.moved[3] = &kvpb.Node{Id: 3, Address: "other:1"}
		}, "", true},
	} {
		l := newLone(t, leading)
		clear(l.n.peers.heard)
		test.change(l.n)
		err := l.n.perform(l.n.leaderState().learnerStep(9, &kvpb.Node{Id: 3, Address: test.address})).err
		if errorReason(err) != test.reason || l.n.change.startedAt != 0 != test.begins {
			t.Errorf("%s: %v, begun %v", test.name, err, l.n.change.startedAt != 0)
		}
	}
	l := newLone(t, leading)
	err := l.n.perform(l.n.leaderState().learnerStep(9, &kvpb.Node{Id: 1, Address: "other:1"})).err
	wantError(t, err, codes.AlreadyExists, "MEMBER_EXISTS")
}

// twoLives is a leader of the cluster of nodes 1 to 3 which has added 9, another life
// of a node, and has heard from all but 9 for long.
type twoLives struct {
	*lone
	node uint64
	logs bytes.Buffer
}

func newTwoLives(t *testing.T, node uint64) *twoLives {
	t.Helper()
	l := &twoLives{lone: newLone(t, leading), node: node}
	n := l.n
	n.logger = slog.New(slog.NewTextHandler(&l.logs, nil))
	l.live(2*n.electionTicks(), 2, 3)
	other := &kvpb.Peer{RaftId: 9, Node: &kvpb.Node{Id: node, Address: "other:1"}}
	if err := n.perform(n.clusterState().addMember(other)).err; err != nil {
		t.Fatal(err)
	}
	l.ack(2, 3)
	if len(n.store.raftIDsOf(node)) != 2 {
		t.Fatal("there is one life")
	}
	l.hellos = append(l.hellos, &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: n.store.members[9], RaftId: 9, Life: 9}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}})
	n.peerUp(9, true)
	return l
}

// live lets time pass, in which lives, 2, 3 and 9, have all that the leader has, and
// answer it.
func (l *twoLives) live(ticks uint64, ids ...uint64) {
	l.t.Helper()
	for range ticks {
		l.turn(1)
		for _, id := range ids {
			if l.n.store.members[id] != nil {
				l.hears(map[uint64]int{2: 0, 3: 1, 9: 2}[id], message(raftpb.MsgAppResp, id, l.n.raft.term, func(m *raftpb.Message) { *m.Index = l.n.log.last() }))
			}
		}
		if l.n.raft.role != raft.StateLeader {
			l.t.Fatal("it does not lead any more")
		}
	}
}

// wants checks which lives the node has.
func (l *twoLives) wants(when string, lives ...uint64) {
	l.t.Helper()
	if got := l.n.store.raftIDsOf(l.node); !slices.Equal(got, lives) {
		l.t.Errorf("node %d %s: it has the lives %v, want %v", l.node, when, got, lives)
	}
}

// TestOneLifeStays: of two lives of a node the one stays that answers: the older one
// if the newer is silent for long, the newer one if the older is silent. If both answer,
// or none, both stay. That goes for the leader itself, too, which answers.
func TestOneLifeStays(t *testing.T) {
	long := func(n *node) uint64 { return n.ticksOf(leaderWait) + 2*n.electionTicks() + 2*ticksPerHeartbeat }
	for _, node := range []uint64{1, 3} {
		l := newTwoLives(t, node)
		l.live(long(l.n)-4*ticksPerHeartbeat, 2, 3)
		l.wants("has just been added", node, 9)
		if l.live(4*ticksPerHeartbeat, 2, 3); l.n.err != nil {
			t.Fatal(l.n.err)
		}
		l.wants("does not answer where it has moved", node)
		if node == l.n.id.raftID {
			r := &request{n: l.n, next: func(l *leaderState) nextStep { return l.learnerStep(node, plainNode(node)) }}
			if done, err := r.poll(); err != nil || done {
				t.Errorf("added again, it is %v, %v", done, err)
			}
			l.ack(2)
			if done, err := r.poll(); err != nil || !done || strings.Contains(l.n.whyUnhealthy(), "role") {
				t.Errorf("added again, it is %v, %v; it is unhealthy: %q", done, err, l.n.whyUnhealthy())
			}
		}

		l = newTwoLives(t, node)
		for range 5 {
			l.live(long(l.n)/2, 2, 3)
			l.live(1, 2, 3, 9)
		}
		l.wants("answers now and then", node, 9)

		l = newTwoLives(t, node)
		l.live(3*long(l.n), 2, 3, 9)
		l.wants("answers twice", node, 9)
		if said := strings.Count(l.logs.String(), "two processes go by the id"); said != 1 || !strings.Contains(l.logs.String(), "n"+fmt.Sprint(node)+":1 and other:1") {
			t.Errorf("that node %d answers twice is said %d times:\n%s", node, said, l.logs.String())
		}
		if why := l.n.whyUnhealthy(); strings.Contains(why, "the members know node 1 at other:1, too") != (node == 1) {
			t.Errorf("node %d answers twice: the leader is unhealthy: %q", node, why)
		}
		l.n.peerDown(9, true)
		l.live(long(l.n), 2, 3)
		l.wants("answers once again", node)
	}

	l := newTwoLives(t, 3)
	l.live(3*long(l.n), 2)
	l.wants("does not answer at all", 3, 9)
	l.live(2*ticksPerHeartbeat, 2, 3)
	l.wants("is back", 3)

	l = newTwoLives(t, 3)
	l.n.peerDown(3, true)
	l.live(2*l.n.electionTicks(), 2, 9)
	l.wants("has been silent for a moment", 3, 9)
	l.live(long(l.n), 2, 9)
	l.wants("answers where it has moved", 9)
	if !l.n.isVoter(9) {
		t.Error("it has lost its vote")
	}

	l = newTwoLives(t, 3)
	l.live(long(l.n)-4*ticksPerHeartbeat, 2, 3)
	l.n.change.healing.duplicates[9].term-- // as if it had led before, too
	l.live(long(l.n)-4*ticksPerHeartbeat, 2, 3)
	l.wants("has a leader that is new", 3, 9)
}

// TestNewLeaderReplacesNoLivingVoter: a leader that is new hears of the learner first.
// That an older life answers, too, it may hear only later.
func TestNewLeaderReplacesNoLivingVoter(t *testing.T) {
	l := newTwoLives(t, 3)
	l.live(2*l.n.electionTicks(), 2, 3, 9)
	l.wants("answers twice", 3, 9)
	term := l.n.raft.term + 1
	for range 100 { // 2 leads, and followers don't hear each other
		l.turn(1)
		l.hears(0, message(raftpb.MsgHeartbeat, 2, term, func(m *raftpb.Message) { *m.Commit = l.n.store.index }))
	}
	l.hears(0, message(raftpb.MsgTimeoutNow, 2, term))
	l.hears(0, message(raftpb.MsgVoteResp, 2, l.n.raft.term))
	if l.n.raft.role != raft.StateLeader {
		t.Fatalf("it is %v", l.n.raft.role)
	}
	l.live(2*l.n.electionTicks(), 2, 9)
	l.wants("has yet to be heard", 3, 9)
	l.live(2*l.n.electionTicks(), 2, 3, 9)
	l.wants("is heard", 3, 9)
}

// TestNobodyWaitsForWhoIsGone: a change does not wait for a node that has come back
// without its memory once, and is gone again.
func TestNobodyWaitsForWhoIsGone(t *testing.T) {
	l := newLoneWithLearner(t)
	l.n.peerUp(4, true)
	l.turn(0)
	l.hellos = append(l.hellos, &kvpb.Hello{
		ClusterId: 7, From: &kvpb.Peer{Node: plainNode(4), RaftId: 4, Life: 4}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1},
	})
	l.n.peerDown(3, true)
	answer := func(stream int, from uint64) {
		l.hears(stream, message(raftpb.MsgAppResp, from, l.n.raft.term, func(m *raftpb.Message) { *m.Index = l.n.log.last() }))
	}
	live := func(ticks uint64) {
		for range ticks {
			l.turn(1)
			answer(0, 2)
			answer(2, 4)
		}
	}
	live(2 * l.n.electionTicks())
	req := &kvpb.ChangeMembershipRequest{Promote: []uint64{4}}
	l.n.peers.reborn[3] = &rebirth{Peer: &kvpb.Peer{Node: plainNode(3), RaftId: 33, Life: 33}, seen: l.n.clock.now}
	if done, err := l.n.perform(l.n.leaderState().membershipStep(req)).answer(); done || err != nil || l.n.change.startedAt != 0 {
		t.Errorf("3 is about to be taken back, and it is done %v, %v", done, err)
	}
	l.n.peers.reborn[3].seen -= l.n.ticksOf(leaderWait)
	if err := l.n.perform(l.n.leaderState().membershipStep(req)).err; err != nil || l.n.change.startedAt == 0 {
		t.Errorf("3 is gone, and the change is not begun: %v", err)
	}
}

// TestStrayLearner: a learner that has joined another cluster is removed, and
// nobody else.
func TestStrayLearner(t *testing.T) {
	for cluster, stray := range map[uint64]bool{0: false, 7: false, 8: true} {
		for raftID, learner := range map[uint64]bool{3: false, 4: true} {
			l := newLoneWithLearner(t)
			l.n.refused(1, raftID, &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_OTHER_CLUSTER, ClusterId: cluster, Peer: &kvpb.Peer{RaftId: raftID, Life: 4, Node: plainNode(raftID)}})
			l.turn(0)
			if begun := l.n.change.startedAt != 0; begun != (stray && learner) {
				t.Errorf("raft ID %d says that it is in cluster %d: a change is begun %v", raftID, cluster, begun)
			}
		}
	}
}

// methodOf is a call of a method, as far as forward looks at it.
type methodOf string

func (m methodOf) Method() string             { return string(m) }
func (methodOf) SetHeader(metadata.MD) error  { return nil }
func (methodOf) SendHeader(metadata.MD) error { return nil }
func (methodOf) SetTrailer(metadata.MD) error { return nil }

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
		ctx = grpc.NewContextWithServerTransportStream(ctx, methodOf(kvpb.ClusterService_TransferLeader_FullMethodName))
		return s.forward(ctx, &kvpb.Node{Id: 2, Address: address}, &kvpb.TransferLeaderRequest{NodeId: 1}, &kvpb.TransferLeaderResponse{})
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
	t.Parallel()
	c := newCluster(t, 3, func(o *options) { o.election = o.heartbeat * 12 })
	c.init(1, 2, 3)
	refused := func(leader, to uint64) {
		t.Helper()
		_, err := c.nodes[leader].TransferLeader(c.ctx, &kvpb.TransferLeaderRequest{NodeId: to})
		wantError(t, err, codes.Unavailable, "UNREACHABLE")
		c.inLoop(leader, func(n *node) error {
			if n.change.startedAt != 0 || n.raft.role != raft.StateLeader {
				t.Errorf("raft was asked to make node %d the leader", to)
			}
			return nil
		})
	}
	leader := c.settled(1, 2, 3)
	to := 1 + leader%3
	release := c.hold(to)
	c.inLoop(leader, func(n *node) error {
		if n.alive(n.store.raftIDsOf(to)[0]) || n.raft.role != raft.StateLeader {
			return errors.New("it was heard of")
		}
		return nil
	})
	refused(leader, to)
	release()
	c.transfer(leader, to)
	leader, to = to, leader
	c.stop(to)
	c.inLoop(leader, func(n *node) error {
		if n.peers.connected[n.store.raftIDsOf(to)[0]] {
			return errors.New("it is connected")
		}
		return nil
	})
	refused(leader, to)
}

// TestLeaderMovesAlone: nobody can take a node's place while it leads, if nobody
// else could lead.
func TestLeaderMovesAlone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, patient)
	c.init(1)
	first := c.nodes[1]
	moved := c.start(1, "127.0.0.1:0")
	c.nodes[1] = first
	t.Cleanup(func() { c.nodes[3] = moved }) // to be stopped, too
	wantError(t, c.addMoved(1, moved.address), codes.AlreadyExists, "MEMBER_EXISTS")
	c.addLearner(1, 2) // others are not kept waiting
	wantError(t, c.addMoved(1, moved.address), codes.AlreadyExists, "MEMBER_EXISTS")
	c.works(1, 2)
}

// TestZone: addresses may have a zone, as link-local ones of IPv6 must.
func TestZone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	plain := c.options
	for id := uint64(1); id <= 2; id++ {
		l, err := net.Listen("tcp", "[::1%lo]:0")
		if err != nil {
			t.Skip(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		_ = l.Close()
		c.options = func(o *options) { plain(o); o.advertise = "[::1%lo]:" + port }
		c.start(id, "[::1%lo]:"+port)
		c.nodes[id].address = "[::1%lo]:" + port
	}
	c.init(1, 2)
	c.works(1, 2)
	endpoints := "--endpoints=" + c.nodes[2].address
	runCommand(t, 0, "", "set", "k", "v", endpoints)
	out, _ := runCommand(t, 0, "", "get", "k", endpoints)
	wantText(t, "get", out, "v")
	_, err := c.nodes[2].AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 3, Address: "[::1%lo]:1"}})
	wantError(t, err, codes.Unavailable, "UNREACHABLE") // forwarded
}

// TestAnswersInTime: a request that its deadline cuts short is answered before
// that, so that the caller learns why.
func TestAnswersInTime(t *testing.T) {
	t.Parallel()
	caller, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	earlier, cancel := inTime(caller)
	defer cancel()
	theirs, _ := caller.Deadline()
	if ours, ok := earlier.Deadline(); !ok || theirs.Sub(ours) != 100*time.Millisecond {
		t.Errorf("it waits until %v, its caller until %v", ours, theirs)
	}
	c := newCluster(t, 3, patient)
	// soon makes a call that cannot be done. On a busy machine even that answer
	// may be late, and the call is made again.
	soon := func(f func(context.Context) error) (err error) {
		t.Helper()
		eventually(t, func() error {
			ctx, cancel := context.WithTimeout(c.ctx, 500*time.Millisecond)
			defer cancel()
			if err = f(ctx); reasonOf(err) == "" {
				return fmt.Errorf("no node's answer, but %v", err)
			}
			return nil
		})
		return err
	}
	release := c.holdOnceClaimed(2)
	half, cancel := context.WithTimeout(c.ctx, 2*time.Second)
	defer cancel()
	// Not by way of gRPC: on a busy machine, its answer might be late.
	_, err := c.nodes[1].server.Init(half, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
	wantError(t, toStatus(err, false), codes.DeadlineExceeded, "OUTCOME_UNKNOWN")
	wantPart(t, err.Error(), fmt.Sprintf("was made, but: the change was begun, whether it was or will be made is not known: context deadline exceeded; what is left, with --endpoints %s: "+
		"add-learner 2=%s, then add-learner 3=%s, then change-membership 1 2 3", c.nodes[1].address, c.nodes[2].address, c.nodes[3].address))
	release()
	c.addLearner(1, 2)

	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}})
	c.settled(1, 2)

	release = c.hold(2) // nothing is committed any more
	ctx, cancel := context.WithTimeout(c.ctx, 200*time.Millisecond)
	defer cancel()
	_, err = c.nodes[1].server.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: c.proto(3)[0]})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("whoever began a change got: %v", err)
	}
	wantError(t, soon(func(ctx context.Context) error {
		_, err := c.nodes[1].ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Members: []uint64{1}})
		return err
	}), codes.Aborted, "CHANGE_IN_PROGRESS")
	release()
	c.stop(1) // hands over, right behind a change
}

// TestNodeFails: a call that a node can never answer, because it has failed, is
// told so, and why.
func TestNodeFails(t *testing.T) {
	n := turnNode()
	n.net = deafNetwork{}
	s := newServer(n, newNetwork(n, n.logger, nil))
	ended := make(chan error, 1)
	go func() {
		_, err := s.intercept(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: kvpb.KVService_Set_FullMethodName},
			func(ctx context.Context, _ any) (any, error) { return writeAs(ctx, s, setWrite("k", "v")) })
		ended <- err
	}()
	eventually(t, func() error {
		if n.inbox.mu.Lock(); n.inbox.callCount == 0 {
			defer n.inbox.mu.Unlock()
			return errors.New("no call yet")
		}
		n.inbox.mu.Unlock()
		return nil
	})
	n.inbox.event(func() { n.err = errors.New("the disk is gone") })
	if err := n.run(t.Context()); err == nil || err.Error() != "the disk is gone" {
		t.Error(err)
	}
	err := <-ended
	wantError(t, err, codes.Unavailable, "NODE_FAILED")
	wantPart(t, err.Error(), "the disk is gone")
}
