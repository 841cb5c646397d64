package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/health/grpc_health_v1"

	"raft-key-value/kvpb"
)

// beats gives a follower a heartbeat of its leader, which has applied an entry.
func (l *lone) beats(applied uint64, spared bool) {
	l.hears(0, message(raftpb.MsgHeartbeat, 2, l.n.raft.term, func(m *raftpb.Message) {
		*m.Index = applied
		if spared {
			m.RejectHint = new(uint64(1))
		}
	}))
}

// TestLag: a follower keeps up while it applies what its leader has applied within an
// election timeout, here 30 ticks, and not because it once did.
func TestLag(t *testing.T) {
	const limit = 30
	l, now, applied := lag{goal: never}, uint64(1000), uint64(1)
	beatFor := func(ticks, leader uint64) {
		for range ticks {
			now++
			l.follow(leader, applied, now, limit)
		}
	}
	want := func(what string, caughtUp bool) {
		t.Helper()
		if l.isCaughtUp(applied, now, limit) != caughtUp {
			t.Errorf("%s: caught up %v", what, !caughtUp)
		}
	}
	want("the leader has not said anything", false)
	beatFor(1, 5000)
	want("thousands of entries behind a new leader", false)
	beatFor(limit/2, 5000)
	want("that for a moment", false)
	applied = 5000
	beatFor(1, 5000)
	want("all is applied", true)
	beatFor(limit/2, 9000)
	want("behind for a moment", true)
	beatFor(limit, 9000)
	want("behind for long", false)
	applied = 9000
	beatFor(1, 14000)
	want("what the leader had long ago is applied", false)
	applied = 14000
	beatFor(1, 14000)
	want("all is applied again", true)
	now += limit + 1
	want("the leader is silent", false)
}

// TestHealthFollowsLag: a follower's health is that of its lag behind this leader.
func TestHealthFollowsLag(t *testing.T) {
	l := newLone(t, following)
	n := l.n
	want := func(what string, healthy bool) {
		t.Helper()
		if (n.whyUnhealthy() == "") != healthy {
			t.Errorf("%s: %q", what, n.whyUnhealthy())
		}
	}
	l.beats(0, false)
	want("a leader that does not know what is committed", false)
	l.beats(1, false)
	want("a follower that has all", true)
	for range n.electionTicks() + 2 {
		l.turn(1)
		l.beats(9000, false)
	}
	want("one that is far behind", false)
	l.hears(1, message(raftpb.MsgHeartbeat, 3, n.raft.term+1, func(m *raftpb.Message) { *m.Index = 1 }))
	want("one that has all of a new leader's", true)
	l.hears(0, message(raftpb.MsgHeartbeat, 2, n.raft.term+1))
	want("one that does not know how far its leader is", false)
}

// TestRestartIsSpared: a voter may be restarted while its leader says, and has said in
// the last election timeout, that the cluster can do without it.
func TestRestartIsSpared(t *testing.T) {
	l := newLone(t, following)
	n := l.n
	l.beats(1, false)
	if why := n.whyNotRestart(); !strings.Contains(why, "node 2 at "+plainNode(2).Address+", does not say") {
		t.Errorf("the leader has not said so: %q", why)
	}
	l.beats(1, true)
	if why := n.whyNotRestart(); why != "" {
		t.Errorf("the leader has said so: %q", why)
	}
	l.beats(1, false)
	if n.whyNotRestart() == "" {
		t.Error("the leader has taken that back")
	}
	l.beats(1, true)
	for range n.electionTicks() - 1 {
		l.turn(1)
		l.n.election.leadHeard = l.n.clock.now
	}
	if !n.isDispensable() {
		t.Error("it does not last an election timeout")
	}
	if l.turn(1); n.isDispensable() {
		t.Error("it lasts for ever")
	}
	l.beats(1, true)
	l.hears(1, message(raftpb.MsgHeartbeat, 3, n.raft.term+1))
	if n.isDispensable() {
		t.Error("another leader has not said so")
	}
}

// TestRestartCounts: which voters a leader can spare.
func TestRestartCounts(t *testing.T) {
	l := newLone(t, leading)
	n := l.n
	for _, test := range []struct {
		what           string
		voters, up     []uint64
		spared, needed []uint64
	}{
		{"all of three are up", []uint64{1, 2, 3}, []uint64{1, 2, 3}, []uint64{1, 2, 3}, nil},
		{"one of three is down", []uint64{1, 2, 3}, []uint64{1, 2}, nil, []uint64{1, 2}},
		{"one of five is down", []uint64{1, 2, 3, 4, 5}, []uint64{1, 2, 3, 4}, []uint64{1, 2, 3, 4}, nil},
		{"two of five are down", []uint64{1, 2, 3, 4, 5}, []uint64{1, 2, 3}, nil, []uint64{1, 2, 3}},
		{"both of two are up", []uint64{1, 2}, []uint64{1, 2}, []uint64{1, 2}, nil},
		{"one of two is down", []uint64{1, 2}, []uint64{1}, nil, []uint64{1}},
		{"there is one", []uint64{1}, []uint64{1}, []uint64{1}, nil},
	} {
		n.store.conf = &raftpb.ConfState{Voters: test.voters}
		n.health.readyVoters = test.up
		for _, id := range test.spared {
			if !n.health.canDoWithout(n.clusterState(), id) {
				t.Errorf("%s: %d is needed", test.what, id)
			}
		}
		for _, id := range test.needed {
			if n.health.canDoWithout(n.clusterState(), id) {
				t.Errorf("%s: %d is spared", test.what, id)
			}
		}
		n.change.startedAt = n.clock.now
		for _, id := range test.spared {
			if n.health.canDoWithout(n.clusterState(), id) {
				t.Errorf("%s, and a change runs: %d is spared", test.what, id)
			}
		}
		n.change.startedAt = 0
	}
}

// TestHealthRule: what a node says of itself goes by facts alone.
func TestHealthRule(t *testing.T) {
	follows := func(c *clusterState) {
		c.raft = raftState{term: 2, lead: 2, role: raft.StateFollower}
		c.leads = false
		c.mayChange = false
	}
	for _, test := range []struct {
		what               string
		but                func(*clusterState)
		unhealthy, restart string // parts of why; empty: it is healthy, it may be restarted
	}{
		{"a leader", func(*clusterState) {}, "", ""},
		{"a leader, during a change", func(c *clusterState) { c.mayChange = false }, "", "is running"},
		{"half way", func(c *clusterState) { c.conf.VotersOutgoing = []uint64{1} }, "", "half way"},
		{"a leader that has yet to apply its entry", func(c *clusterState) { c.leads = false }, "not yet caught up", "not yet"},
		{"two are silent", func(c *clusterState) { c.conf.Voters = []uint64{1, 2, 3, 5, 6} }, "",
			"node with raft ID 5 and node with raft ID 6 do not answer"},
		{"a follower", follows, "", ""},
		{"a follower that is behind", func(c *clusterState) {
			follows(c)
			c.applied = 10
		}, "not yet caught up", "not yet"},
		{"a voter that is not spared", func(c *clusterState) {
			follows(c)
			c.now += 10
		}, "", "does not say"},
		{"a learner that is not spared", func(c *clusterState) {
			follows(c)
			c.now += 10
			c.raftID = 4
			c.self = plainNode(4)
		}, "", ""},
		{"in no cluster", func(c *clusterState) { c.inCluster = false }, "in no cluster", "in no cluster"},
		{"no member", func(c *clusterState) { c.raftID = 8 }, "not a member", "not a member"},
		{"taken back", func(c *clusterState) { c.members[9] = &kvpb.Node{Id: 1, Address: "other:1"} }, "other:1, too", "too"},
		{"no leader", func(c *clusterState) {
			follows(c)
			c.raft.lead = 0
		}, errNoLeader.Error(), errNoLeader.Error()},
	} {
		c := &newFacts().clusterState
		h := &nodeHealth{
			lag:              lag{goal: c.applied, since: c.now},
			readyVoters:      []uint64{1, 2, 3},
			dispensableUntil: c.now + 5,
		}
		test.but(c)
		says := func(what, why, want string) {
			if (why == "") != (want == "") || !strings.Contains(why, want) {
				t.Errorf("%s: it is not %s because %q, want %q", test.what, what, why, want)
			}
		}
		says("healthy", h.whyUnhealthy(c), test.unhealthy)
		says("to be restarted", h.whyNotRestart(c), test.restart)
	}
}

// TestRestartNeedsTheOthers: with one of three dead, nobody may be restarted.
func TestRestartNeedsTheOthers(t *testing.T) {
	t.Parallel()
	const serving, notServing = grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING
	c := newCluster(t, 4)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	for id := uint64(1); id <= 4; id++ {
		c.health(id, restartHealth, serving)
	}
	down := 1 + c.settled(1, 2, 3)%3
	address := c.nodes[down].address
	c.kill(down)
	for id := uint64(1); id <= 4; id++ {
		if id == down {
			continue
		}
		want := notServing
		if id == 4 {
			want = serving // a learner
		}
		c.health(id, restartHealth, want)
		c.health(id, "raftkv.v1.KVService", serving)
	}
	c.start(down, address)
	for id := uint64(1); id <= 4; id++ {
		c.health(id, restartHealth, serving)
	}
}

// TestSilentVotersAreNamed: who finds no leader is told whom this node needs and does
// not hear, where and for how long, also if the streams to them are open.
func TestSilentVotersAreNamed(t *testing.T) {
	l := newLone(t, following)
	n := l.n
	for n.election.leaderlessTicks < n.ticksOf(leaderWait) {
		l.turn(1)
	}
	says := func(parts ...string) {
		t.Helper()
		text := n.noLeader().Error()
		for _, part := range parts {
			if !strings.Contains(text, part) {
				t.Errorf("%q lacks %q", text, part)
			}
		}
	}
	silent := func(id uint64) string { return "at " + plainNode(id).Address + " has not answered for 2s" }
	says("2 of 3 voters are needed, but node 2 "+silent(2), "node 3 "+silent(3))

	// 3 answers, and so would be enough: it may hear a leader that this node does not.
	l.hears(1, message(raftpb.MsgHeartbeatResp, 3, n.raft.term))
	says("there is no leader that this node hears: node 2 " + silent(2))
	if strings.Contains(n.noLeader().Error(), "node 3") {
		t.Errorf("3 answers, and it says %q", n.noLeader())
	}
	n.peerDown(3, true)
	l.turn(0)
	says("2 of 3 voters are needed", "node 3 at "+plainNode(3).Address, "is not connected")
}

// TestVoterBehindALeaderAnswers: a node that hears a leader lets whoever calls for votes
// know that it is there.
func TestVoterBehindALeaderAnswers(t *testing.T) {
	b := newBus(t, 1, 2, 3)
	b.elect(1, 2, 3)
	b.beat(1, 2, 3)
	b.loseAll()
	// 2 is cut off from 1 alone.
	b.disconnect(2, 1)
	for range 10 * b.nodes[2].electionTicks() {
		for _, id := range []uint64{1, 2, 3} {
			b.turn(id, 1)
		}
		b.lose(1, 2)
		b.lose(2, 1)
		b.flow(1, 3)
		b.flow(2, 3)
	}
	if !b.nodes[1].leads() || b.nodes[1].raft.term != 2 {
		t.Fatalf("1 was disturbed: %s", b.state(1))
	}
	text := b.nodes[2].noLeader().Error()
	if !strings.Contains(text, "node 1 at") || strings.Contains(text, "node 3") {
		t.Errorf("node 2, which is cut off from node 1 alone, says %q", text)
	}
}

// TestLostMemoryIsSaid: a cluster whose majority has restarted without memory says so,
// also if one of them is a learner already: nobody says that they do not answer.
func TestLostMemoryIsSaid(t *testing.T) {
	const want = "node 2 and node 3 restarted without memory"
	newLife := func(id, raftID, clusterID uint64) *kvpb.Welcome {
		return &kvpb.Welcome{
			Verdict:   kvpb.Verdict_VERDICT_NOT_ME,
			ClusterId: clusterID,
			Peer:      &kvpb.Peer{RaftId: raftID, Life: raftID, Node: plainNode(id)},
		}
	}
	l := newLone(t, following)
	l.n.refused(1, 2, newLife(2, 9, 7)) // a learner
	l.n.refused(1, 3, newLife(3, 8, 0))
	for l.n.election.leaderlessTicks < l.n.ticksOf(leaderWait) {
		l.turn(1)
	}
	if err := l.n.noLeader(); !strings.Contains(err.Error(), want) {
		t.Errorf("the voter that is left says %q", err)
	}
	// The learner knows of itself.
	n := l.n
	n.store.members[9] = n.store.members[2]
	n.self, n.id.raftID = plainNode(2), 9
	delete(n.peers.reborn, 2)
	if err := n.noLeader(); !strings.Contains(err.Error(), want) {
		t.Errorf("the learner says %q", err)
	}
}

// TestWhoSaysHelloIsNotLost: a life that says hello has not lost its memory, although
// another one has answered in its place before.
func TestWhoSaysHelloIsNotLost(t *testing.T) {
	n := newLone(t, following).n
	for _, outbound := range []bool{false, true} {
		n.noteRebirth(2, &kvpb.Peer{Node: plainNode(2), RaftId: 9, Life: 9})
		n.peerUp(2, outbound)
		n.turn(n.inbox.take())
		if n.clusterState().hasLostMemory(2) {
			t.Errorf("node 2 has said hello, and counts as lost (outbound %v)", outbound)
		}
	}
}

// TestHopelessCallsEndAtOnce: a call does not wait for a leader on a node that is in no
// cluster, or has been without one for long.
func TestHopelessCallsEndAtOnce(t *testing.T) {
	for _, test := range []struct {
		what  string
		state int
		want  error
	}{{"in no cluster", inNoCluster, errNotInitialized}, {"no leader", following, errNoLeader}} {
		l := newLone(t, test.state)
		for range 2 * l.n.ticksOf(leaderWait) {
			l.turn(1)
		}
		for _, record := range [][]byte{nil, []byte("a write")} {
			c := &call{write: record, done: make(chan outcome, 1)}
			if err := l.n.inbox.call(c); err != nil {
				t.Fatal(err)
			}
			l.turn(0)
			l.turn(1)
			select {
			case o := <-c.done:
				if !errors.Is(o.err, test.want) {
					t.Errorf("%s: %v", test.what, o.err)
				}
			default:
				t.Errorf("%s: it waits", test.what)
			}
		}
	}
}

// TestHopelessRequestsEndAtOnce: so do operators' requests.
func TestHopelessRequestsEndAtOnce(t *testing.T) {
	l := newLone(t, following)
	for range 2 * l.n.ticksOf(leaderWait) {
		l.turn(1)
	}
	s := &server{n: l.n}
	began := time.Now()
	_, err := s.TransferLeader(t.Context(), &kvpb.TransferLeaderRequest{NodeId: 2})
	if errorReason(toStatus(err, false)) != "NO_LEADER" || time.Since(began) > leaderWait {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
}

// TestRefusalsAreNamed: a node that no voter talks to says what they say, not that they
// do not answer.
func TestRefusalsAreNamed(t *testing.T) {
	l := newLone(t, following)
	n := l.n
	n.peerDown(2, true)
	n.peerDown(3, true)
	n.refused(1, 3, &kvpb.Welcome{
		Verdict:   kvpb.Verdict_VERDICT_RIVAL,
		ClusterId: 7,
		Peer:      &kvpb.Peer{RaftId: 3, Life: 3, Node: plainNode(3)},
	})
	for n.election.leaderlessTicks < n.ticksOf(leaderWait) {
		l.turn(1)
	}
	text := n.noLeader().Error()
	rival := "node 3 at " + plainNode(3).Address + " is connected to another process"
	if !strings.Contains(text, rival) || !strings.Contains(text, "node 2 at "+plainNode(2).Address+" has not answered") {
		t.Errorf("it says %q", text)
	}
	n.peerUp(3, true)
	l.turn(0)
	if strings.Contains(n.noLeader().Error(), "another process") {
		t.Errorf("3 talks to it again, and it says %q", n.noLeader())
	}
}
