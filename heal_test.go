// Tests of heal.go: nodes that come back without their memory, and two lives of one node.

package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

func TestHealing(t *testing.T) {
	t.Parallel()
	three := []uint64{1, 2, 3}

	t.Run("each in turn", func(t *testing.T) {
		u := newUnderLoad(t, 3)
		leader := u.settled(three...)
		for i := range uint64(3) { // the leader first
			u.killed(1 + (leader-1+i)%3)
			u.healed(three)
		}
		u.restart(u.settled(three...)) // as SIGTERM does it
		u.check(three)
	})

	t.Run("again before it has healed", func(t *testing.T) {
		u := newUnderLoad(t, 3)
		leader := u.settled(three...)
		id := 1 + leader%3
		u.killed(id) // nobody has met it when it goes again
		added := u.when(livesOf(id, 2))
		u.killed(id)
		added(func() { u.kill(id) }) // as a learner
		promoted := u.when(func(n *node) bool { return isJoint(n.store.conf) })
		u.start(id, u.addressOf(leader, id))
		promoted(func() { u.kill(id) }) // while it becomes a voter
		u.start(id, u.addressOf(leader, id))
		u.check(three)
	})

	t.Run("the leader changes", func(t *testing.T) {
		u := newUnderLoad(t, 3)
		leader := u.settled(three...)
		id := 1 + leader%3
		added := u.when(livesOf(id, 2))
		u.killed(id)
		added(func() { u.cut(leader) }) // half way
		u.heal()
		u.check(three)
	})

	t.Run("a learner", func(t *testing.T) {
		u := newUnderLoad(t, 4)
		u.killed(4)
		u.healed(three, 4)
		u.restart(4)
		u.check(three, 4)
	})

	t.Run("during a change of membership", func(t *testing.T) {
		u := newUnderLoad(t, 4)
		// swap puts a learner in a voter's place and kills a node half way.
		swap := func(in, out uint64, victim func(leader uint64) uint64) {
			t.Helper()
			voters := []uint64{1, 2, in}
			leader := u.settled(1, 2, out)
			if leader == out {
				u.transfer(1, 1)
				leader = 1
			}
			id := victim(leader)
			joint := u.when(func(n *node) bool { return isJoint(n.store.conf) })
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			via := u.nodes[3-min(leader, 2)]
			go func() { // interrupted, or not
				defer close(ended)
				for again := true; again; { // on a busy machine the learner may be behind at first
					_, err := via.ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Members: voters})
					reason := reasonOf(err)
					again = reason == "NOT_CAUGHT_UP" || reason == "UNREACHABLE"
				}
			}()
			joint(func() { u.cut(id) })
			u.killed(id)
			u.heal()
			eventually(t, func() error { // who it is passed on to may just have died
				_, err := via.ChangeMembership(t.Context(), &kvpb.ChangeMembershipRequest{Members: voters})
				return err
			})
			cancel()
			<-ended
			u.healed(voters)
			u.uninitialized(out)
		}
		swap(4, 3, func(uint64) uint64 { return 4 })
		u.addLearner(1, 3)
		swap(3, 4, func(leader uint64) uint64 { return leader })
		u.check(three)
	})

	t.Run("after compaction", func(t *testing.T) {
		u := newUnderLoad(t, 3, func(o *options) { o.logBytes = 64 << 10 })
		value := strings.Repeat("x", 64<<10)
		for i := range 48 {
			u.done(func() error {
				_, err := u.nodes[1+uint64(i)%3].Set(u.ctx, &kvpb.SetRequest{Key: fmt.Sprint("large ", i), Value: []byte(value)})
				return err
			})
		}
		leader := u.settled(three...)
		eventually(t, func() error { // once no member needs it
			m, err := u.metrics(leader)
			if err != nil || m.FirstIndex < 10 || m.LogBytes > 1<<20 {
				return fmt.Errorf("the log is not compacted: %v, %v", m, err)
			}
			return nil
		})
		id := 1 + leader%3
		u.kill(id)
		sent := u.sentSnapshots()
		u.start(id, u.addressOf(leader, id))
		u.healed(three)
		if now := u.sentSnapshots(); now <= sent {
			t.Errorf("%d snapshots were sent, %d before", now, sent)
		}
		if m, err := u.metrics(id); err != nil || m.SnapshotsInstalled == 0 || m.Keys < 48 {
			t.Errorf("node %d: %v, %v", id, m, err)
		}
		u.check(three)
	})

	t.Run("at a new address", func(t *testing.T) {
		u := newUnderLoad(t, 4, steady)
		leader := u.settled(three...)
		other := 1 + leader%3
		u.kill(other)
		u.start(other, "127.0.0.1:0")
		eventually(t, func() error { // once the leader knows that the old one is gone
			_, err := u.nodes[leader].AddLearner(u.ctx, &kvpb.AddLearnerRequest{Node: u.proto(other)[0]})
			return err
		})
		u.healed(three, 4)
		// A learner: not while the old one is there.
		old := u.nodes[4]
		moved := u.start(4, "127.0.0.1:0")
		_, err := u.nodes[other].AddLearner(u.ctx, &kvpb.AddLearnerRequest{Node: u.proto(4)[0]})
		wantError(t, err, codes.AlreadyExists, "MEMBER_EXISTS")
		u.nodes[4] = old
		u.testCluster.stop(4)
		u.nodes[4] = moved
		eventually(t, func() error { // once it is known to be gone
			_, err := u.nodes[other].AddLearner(u.ctx, &kvpb.AddLearnerRequest{Node: u.proto(4)[0]})
			return err
		})
		u.healed(three, 4)
		u.check(three, 4)
	})
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

// underLoad is a cluster of three voters, and learners, with clients on all
// nodes: those of the history, and one that writes each key once.
type underLoad struct {
	*testCluster
	h    *history
	stop func()

	mu   sync.Mutex
	kept map[string]uint64 // acknowledged: key to version
}

func newUnderLoad(t *testing.T, nodes uint64, set ...func(*options)) *underLoad {
	t.Helper()
	u := &underLoad{testCluster: newCluster(t, nodes, set...), h: newHistory(), kept: map[string]uint64{}}
	u.init(1, 2, 3)
	for id := uint64(4); id <= nodes; id++ {
		u.addLearner(1, id)
	}
	var conns []*grpc.ClientConn
	for _, n := range u.nodes {
		conns = append(conns, dialNode(t, n.address, insecure.NewCredentials()))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			key := fmt.Sprintf("kept %06d", i)
			call, cancel := context.WithTimeout(ctx, time.Second)
			resp, err := kvpb.NewKVServiceClient(conns[i%len(conns)]).Set(call, &kvpb.SetRequest{Key: key, Value: []byte(key)})
			cancel()
			if err == nil {
				u.mu.Lock()
				u.kept[key] = resp.Version
				u.mu.Unlock()
			}
		}
	})
	stop := u.load(u.h, time.Second, true, slices.Sorted(maps.Keys(u.nodes))...)
	u.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		stop()
		for _, conn := range conns {
			_ = conn.Close()
		}
	})
	t.Cleanup(u.stop)
	u.h.floor(t, 30)
	return u
}

// healed waits until the nodes are what they were: three voters, and learners,
// each of one life.
func (u *underLoad) healed(voters []uint64, learners ...uint64) {
	u.t.Helper()
	u.settled(voters...)
	all := slices.Concat(voters, learners)
	eventually(u.t, func() error {
		lives := map[uint64]uint64{}
		for _, id := range all {
			m, err := u.metrics(id)
			if err != nil {
				return err
			}
			lives[id] = m.RaftId
		}
		for _, id := range all {
			m, err := u.metrics(id)
			if err != nil {
				return err
			}
			if v, l := membersOf(m); !slices.Equal(v, slices.Sorted(slices.Values(voters))) || !slices.Equal(l, learners) || len(m.Members) != len(all) || !m.Healthy {
				return fmt.Errorf("node %d: %v", id, m)
			}
			for _, member := range m.Members {
				if node := member.Node; member.RaftId != lives[node.Id] || node.Address != u.nodes[node.Id].address {
					return fmt.Errorf("node %d knows another node %d: %v", id, node.Id, member)
				}
			}
		}
		return nil
	})
}

// check ends the load and checks all that clients saw.
func (u *underLoad) check(voters []uint64, learners ...uint64) {
	u.t.Helper()
	u.healed(voters, learners...)
	u.h.floor(u.t, 30)
	u.stop()
	all := slices.Concat(voters, learners)
	for _, id := range all {
		u.readAll(u.h, id)
	}
	u.h.check(u.t)
	u.sameStates(all...)
	if len(u.kept) == 0 {
		u.t.Fatal("nothing was acknowledged")
	}
	for _, id := range all {
		items, _, err := u.listAll(id, &kvpb.ListRequest{Prefix: "kept ", Limit: 10_000, Local: true})
		if err != nil {
			u.t.Fatal(err)
		}
		there := map[string]uint64{}
		for _, it := range items {
			if it.Key == string(it.Value) {
				there[it.Key] = it.Version
			}
		}
		for key, version := range u.kept {
			if there[key] != version {
				u.t.Fatalf("node %d has version %d of %q, %d was acknowledged", id, there[key], key, version)
			}
		}
	}
}

func TestQuorumLost(t *testing.T) {
	t.Parallel()
	const notServing = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	for _, leads := range []bool{false, true} {
		t.Run(fmt.Sprintf("the survivor led: %v", leads), func(t *testing.T) {
			c := newCluster(t, 3)
			c.init(1, 2, 3)
			left := c.settled(1, 2, 3)
			if !leads {
				left = 1 + left%3
			}
			a, b := 1+left%3, 1+(left+1)%3
			version := c.set(left, "k", "v")
			var addresses []string
			for _, id := range []uint64{a, b} {
				addresses = append(addresses, c.nodes[id].address)
				c.kill(id)
			}
			c.start(a, addresses[0])
			c.start(b, addresses[1])
			names := []string{fmt.Sprint("node ", a), fmt.Sprint("node ", b)}
			naming := func(text string) bool { return strings.Contains(text, names[0]) && strings.Contains(text, names[1]) }
			eventually(t, func() error {
				m, err := c.metrics(left)
				if err == nil && (m.Healthy || !naming(m.UnhealthyReason)) {
					err = fmt.Errorf("it is healthy (%v), or not because %q", m.Healthy, m.UnhealthyReason)
				}
				return err
			})
			c.health(left, "raftkv.v1.KVService", notServing)
			c.health(left, restartHealth, notServing)
			c.wants(left, true, "k", "v", version)

			var wg sync.WaitGroup
			for _, id := range []uint64{a, b} {
				wantError(t, getError(c, id, true), codes.Unavailable, "NOT_INITIALIZED")
			}
			if leads {
				return // what follows takes a while
			}
			n := c.nodes[left]
			for name, f := range map[string]func() error{
				"Set":    func() error { _, err := n.Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: []byte("w")}); return err },
				"Delete": func() error { _, err := n.Delete(c.ctx, &kvpb.DeleteRequest{Key: "k"}); return err },
				"Get":    func() error { return getError(c, left, false) },
				"List":   func() error { _, err := n.List(c.ctx, &kvpb.ListRequest{}); return err },
			} {
				wg.Go(func() {
					err := f()
					wantError(t, err, codes.Unavailable, "NO_LEADER")
					if !naming(status.Convert(err).Message()) {
						t.Errorf("%s does not say who is missing: %v", name, err)
					}
				})
			}
			for _, id := range []uint64{a, b} {
				for _, local := range []bool{true, false} {
					wg.Go(func() { wantError(t, getError(c, id, local), codes.Unavailable, "NOT_INITIALIZED") })
					wg.Go(func() {
						_, err := c.nodes[id].List(c.ctx, &kvpb.ListRequest{Local: local})
						wantError(t, err, codes.Unavailable, "NOT_INITIALIZED")
					})
				}
			}
			wg.Wait()
			c.uninitialized(a, b) // nothing was made up
			c.health(a, "raftkv.v1.KVService", notServing)
			c.wants(left, true, "k", "v", version)
		})
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
		err := l.n.perform(l.n.leaderState().learnerStep(&kvpb.Peer{RaftId: 9, Node: &kvpb.Node{Id: 3, Address: test.address}})).err
		if errorReason(err) != test.reason || l.n.change.startedAt != 0 != test.begins {
			t.Errorf("%s: %v, begun %v", test.name, err, l.n.change.startedAt != 0)
		}
	}
	l := newLone(t, leading)
	err := l.n.perform(l.n.leaderState().learnerStep(&kvpb.Peer{RaftId: 9, Node: &kvpb.Node{Id: 1, Address: "other:1"}})).err
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
	n.peerUp(9, true, nil)
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
			r := &request{n: l.n, next: func(l *leaderState) nextStep { return l.learnerStep(&kvpb.Peer{RaftId: node, Node: plainNode(node)}) }}
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
	l.n.peerUp(4, true, nil)
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
		n.peerUp(2, outbound, nil)
		n.turn(n.inbox.take())
		if n.clusterState().hasLostMemory(2) {
			t.Errorf("node 2 has said hello, and counts as lost (outbound %v)", outbound)
		}
	}
}

func (c *testCluster) addMoved(id uint64, address string) error {
	_, err := c.nodes[id].AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: id, Address: address}})
	return err
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
