// Tests of health.go and of what a node says of itself.

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

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
	if !n.health.isDispensable(n.clusterState()) {
		t.Error("it does not last an election timeout")
	}
	if l.turn(1); n.health.isDispensable(n.clusterState()) {
		t.Error("it lasts for ever")
	}
	l.beats(1, true)
	l.hears(1, message(raftpb.MsgHeartbeat, 3, n.raft.term+1))
	if n.health.isDispensable(n.clusterState()) {
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

// TestSilenceIsNamedToAll: also if it is the outgoing voters of a change that are silent, and by a
// learner, whom only a leader talks to.
func TestSilenceIsNamedToAll(t *testing.T) {
	members := map[uint64]*kvpb.Node{}
	for id := range uint64(5) {
		members[id+1] = plainNode(id + 1)
	}
	c := &clusterState{
		now: 1000, tick: 100 * time.Millisecond, electionTicks: 6, leaderlessTicks: 50,
		self: plainNode(1), raftID: 1, inCluster: true, members: members,
		conf:      &raftpb.ConfState{Voters: []uint64{1, 2, 3}, VotersOutgoing: []uint64{1, 4, 5}},
		connected: map[uint64]bool{2: true, 3: true, 4: true, 5: true},
		heard:     map[uint64]uint64{2: 999, 3: 999, 4: 999, 5: 900},
	}
	silent := func(id uint64) string { return c.locate(id) + " has not answered for 5s" }
	wantText(t, "one outgoing voter", c.noLeader().Error(), "there is no leader that this node hears: "+silent(5))
	c.connected[4] = false
	c.heard[4] = 900
	wantText(t, "two outgoing voters", c.noLeader().Error(), "there is no leader: 2 of 3 voters are needed, but "+
		silent(4)+" and is not connected, "+silent(5))

	c.self, c.raftID = plainNode(5), 5
	c.conf = &raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{5}}
	c.connected[1] = true
	wantText(t, "a learner", c.noLeader().Error(), "there is no leader: this node is a learner, and has heard of none for 5s. "+
		"The voters know why: "+c.names([]uint64{1, 2, 3}))
	c.leaderlessTicks = 2 * c.electionTicks
	if err := c.noLeader(); err != errNoLeader {
		t.Errorf("after a moment, a learner says: %v", err)
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
	n.peerUp(3, true, nil)
	l.turn(0)
	if strings.Contains(n.noLeader().Error(), "another process") {
		t.Errorf("3 talks to it again, and it says %q", n.noLeader())
	}
}

// TestHealthNames: a node has these three, and no other.
func TestHealthNames(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	resp, err := grpc_health_v1.NewHealthClient(c.nodes[1].conn).List(c.ctx, &grpc_health_v1.HealthListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	names := slices.Sorted(maps.Keys(resp.Statuses))
	if want := []string{"", "raftkv.v1.KVService", "raftkv.v1.restart"}; !slices.Equal(names, want) {
		t.Errorf("the health names are %q, want %q", names, want)
	}
}

// TestClockLiveness: the empty name follows the loop, and nothing else.
func TestClockLiveness(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		leader, rest := b.leaderAndRest()
		w := b.watch(leader, livenessHealth)
		defer w.stop()
		b.do(rest[0], black)
		b.do(rest[1], black)
		time.Sleep(time.Minute)
		w.wants(t, "without a majority", true, time.Now(), -2*time.Minute, -59*time.Second)

		release := make(chan struct{})
		start := time.Now()
		b.nodes[leader].server.n.inbox.event(func() { <-release })
		time.Sleep(time.Minute)
		w.wants(t, "stuck", false, start, livenessTimeout, livenessTimeout+livenessInterval)

		start = time.Now()
		close(release)
		time.Sleep(time.Minute)
		w.wants(t, "released", true, start, 0, livenessInterval)
	})
}

func TestHealth(t *testing.T) {
	t.Parallel()
	const serving, notServing = grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING
	c := newCluster(t, 4)
	// all checks that operators reach a node, whatever state it is in.
	all := func(id uint64, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		c.health(id, "raftkv.v1.KVService", want)
		c.health(id, restartHealth, want)
		resp, err := grpc_health_v1.NewHealthClient(c.nodes[id].conn).Check(c.ctx, &grpc_health_v1.HealthCheckRequest{})
		if err != nil || resp.Status != serving {
			t.Errorf("node %d says %v of the empty name: %v", id, resp, err)
		}
	}
	all(1, notServing)
	c.init(1, 2, 3)
	for id := uint64(1); id <= 3; id++ {
		all(id, serving)
	}
	all(4, notServing)
	c.addLearner(1, 4)
	all(4, serving)

	// Back in service means back up to date.
	for i := range 2 {
		leader := c.settled(1, 2, 3)
		away := 1 + leader%3
		c.cut(away)
		all(away, notServing)
		version := c.set(leader, "k", fmt.Sprint(i))
		c.heal()
		c.health(away, "raftkv.v1.KVService", serving)
		c.wants(away, true, "k", fmt.Sprint(i), version)

		version = c.set(leader, "k", fmt.Sprint("again ", i))
		c.restart(4)
		c.health(4, "raftkv.v1.KVService", serving)
		c.wants(4, true, "k", fmt.Sprint("again ", i), version)
	}
	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4}})
	all(4, notServing)

	for _, name := range []string{"nobody", "restart", "raftkv.v1.ClusterService"} {
		resp, err := grpc_health_v1.NewHealthClient(c.nodes[1].conn).Check(c.ctx, &grpc_health_v1.HealthCheckRequest{Service: name})
		if status.Code(err) != codes.NotFound {
			t.Errorf("health of an unknown service, %q: %v, %v", name, resp, err)
		}
	}
}

// TestCaughtUp: a node is healthy only once it has applied what its leader had
// applied when that first said so.
func TestCaughtUp(t *testing.T) {
	l := newLone(t, following)
	expect := func(when, why string) {
		t.Helper()
		if got := l.n.whyUnhealthy(); got != why {
			t.Errorf("%s it is unhealthy because %q, not %q", when, got, why)
		}
	}
	const behind = "not yet caught up"
	l.hears(0, message(raftpb.MsgHeartbeat, 2, 1))
	expect("before the leader says how far it is", behind)
	last := l.n.log.last()
	l.beats(last+1, false)
	expect("with an entry to apply", behind)
	term, _ := l.n.log.Term(last)
	l.hears(0, message(raftpb.MsgApp, 2, 1, func(m *raftpb.Message) {
		m.Index, m.LogTerm, m.Commit = &last, &term, new(last+1)
		m.Entries = []*raftpb.Entry{{Term: new(uint64(1)), Index: new(last + 1)}}
	}))
	expect("with all applied", "")
}

// TestProgressStates checks that metrics name a state of raft's tracker as raft does.
func TestProgressStates(t *testing.T) {
	t.Parallel()
	for _, state := range []tracker.StateType{tracker.StateProbe, tracker.StateReplicate, tracker.StateSnapshot} {
		want := "PROGRESS_STATE_" + strings.ToUpper(strings.TrimPrefix(state.String(), "State"))
		wantText(t, state.String(), kvpb.ProgressState(state+1).String(), want)
	}
}
