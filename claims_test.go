// Tests of claims.go: what a node in no cluster promises, and a small simulator of claims
// alone.

package main

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

const (
	claimGranted = kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED
	claimRefused = kvpb.ClaimVerdict_CLAIM_VERDICT_CLAIMED
	claimFresh   = kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH
	claimNamed   = kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED
)

// claimedMembers are the members of the Inits that claim node 1.
func claimedMembers() []*kvpb.Node { return []*kvpb.Node{plainNode(1), plainNode(2)} }

// claimBy is a founder's request for node 1. The founder's raft ID is its life.
func claimBy(id, founder, life uint64) *kvpb.ClaimRequest {
	return &kvpb.ClaimRequest{
		To:      plainNode(1),
		Id:      id,
		Members: claimedMembers(),
		Founder: &kvpb.Peer{Node: plainNode(founder), RaftId: life, Life: life},
	}
}

// byForce makes a request one of an Init by force.
func byForce(req *kvpb.ClaimRequest) *kvpb.ClaimRequest {
	req.Force = true
	return req
}

// wantVerdict checks the answer to a request.
func wantVerdict(t *testing.T, req *kvpb.ClaimRequest, resp *kvpb.ClaimResponse, want kvpb.ClaimVerdict) {
	t.Helper()
	if resp.Verdict != want {
		t.Errorf("claim %d of node %d in life %d: %v, want %v", req.Id, req.Founder.Node.Id, req.Founder.Life, resp, want)
	}
}

// loneClaims are the claims of node 1, without the node.
type loneClaims struct {
	claims
	t   *testing.T
	now uint64
}

func newFreshClaims(t *testing.T) *loneClaims {
	const claimTicks, redialTicks = 200, 30
	l := &loneClaims{claims: newClaims(plainNode(1), startPlan{}, claimTicks, redialTicks), t: t, now: firstTick}
	l.forget(l.now)
	return l
}

// newLoneClaims are of a node that is not fresh any more.
func newLoneClaims(t *testing.T) *loneClaims {
	l := newFreshClaims(t)
	l.now += l.redialTicks + 1
	return l
}

// ask requests a claim, or asks for one.
func (l *loneClaims) ask(req *kvpb.ClaimRequest, want kvpb.ClaimVerdict) *kvpb.ClaimResponse {
	l.t.Helper()
	resp := l.answer(req, l.now)
	wantVerdict(l.t, req, resp, want)
	return resp
}

// TestClaim: to whom claims promise their node, and for how long.
func TestClaim(t *testing.T) {
	t.Run("a fresh node", func(t *testing.T) {
		l := newFreshClaims(t)
		l.ask(claimBy(7, 2, 2), claimFresh)
		l.now += l.redialTicks
		l.ask(claimBy(7, 2, 2), claimFresh)
		l.now++
		l.ask(claimBy(7, 2, 2), claimGranted)
	})
	t.Run("by force", func(t *testing.T) {
		newFreshClaims(t).ask(byForce(claimBy(7, 2, 2)), claimGranted)
	})
	t.Run("one at a time", func(t *testing.T) {
		l := newLoneClaims(t)
		l.ask(claimBy(0, 2, 2), claimGranted)
		if l.held(l.now) != nil {
			t.Error("who only asks has got a claim")
		}
		l.ask(claimBy(7, 2, 2), claimGranted)
		l.ask(claimBy(7, 2, 2), claimGranted)
		if resp := l.ask(claimBy(8, 3, 3), claimRefused); resp.By.Id != 2 || !sameNodes(resp.Members, claimedMembers()) {
			t.Errorf("it does not say by whom it is claimed: %v", resp)
		}
		l.ask(byForce(claimBy(8, 3, 3)), claimRefused)
		l.ask(claimBy(8, 2, 2), claimRefused) // another call at the same founder
		l.withdraw(8)
		l.ask(claimBy(8, 3, 3), claimRefused)
		l.withdraw(7)
		l.ask(claimBy(8, 3, 3), claimGranted)
	})
	t.Run("until it expires", func(t *testing.T) {
		l := newLoneClaims(t)
		l.ask(claimBy(7, 2, 2), claimGranted)
		l.now += l.claimTicks
		l.ask(claimBy(8, 3, 3), claimRefused)
		if l.held(l.now) == nil {
			t.Error("the claim does not hold")
		}
		l.now++
		if l.held(l.now) != nil {
			t.Error("the claim has not expired")
		}
		l.ask(claimBy(8, 3, 3), claimGranted)
	})
	t.Run("while its founder waits", func(t *testing.T) {
		l := newLoneClaims(t)
		l.ask(claimBy(7, 2, 2), claimGranted)
		l.now += l.claimTicks / 2
		l.keep(7, 9, l.now)
		l.now += l.claimTicks
		l.ask(claimBy(8, 3, 3), claimRefused)
		l.keep(8, 9, l.now) // which it does not hold
		l.now++
		l.ask(claimBy(8, 3, 3), claimGranted)
	})
	t.Run("until its founder has another life", func(t *testing.T) {
		l := newLoneClaims(t)
		l.ask(claimBy(7, 2, 2), claimGranted)
		l.ask(claimBy(8, 2, 3), claimGranted)
		l.ask(claimBy(9, 3, 4), claimRefused)
	})
	t.Run("until the node has another life", func(t *testing.T) {
		l := newLoneClaims(t)
		l.ask(claimBy(7, 2, 2), claimGranted)
		l.forget(l.now)
		if l.held(l.now) != nil {
			t.Error("the claim has outlived its life")
		}
		l.ask(claimBy(8, 2, 2), claimFresh)
	})
	t.Run("named by a cluster", func(t *testing.T) {
		for name, to := range map[string]*kvpb.Node{
			"id":      {Id: 1, Address: "elsewhere:1"},
			"address": {Id: 8, Address: plainNode(1).Address},
		} {
			l := newLoneClaims(t)
			l.noteForeign(foreignCall(9, &kvpb.Peer{Node: to, RaftId: 6}), l.now)
			if resp := l.ask(claimBy(7, 2, 2), claimNamed); resp.ClusterId != 9 || resp.By.Id != 5 {
				t.Errorf("by its %s: %v", name, resp)
			}
			l.ask(byForce(claimBy(7, 2, 2)), claimGranted)
			l.withdraw(7)
			l.now += l.redialTicks
			l.ask(claimBy(7, 2, 2), claimNamed)
			l.now++
			l.ask(claimBy(7, 2, 2), claimGranted)
		}
	})
	t.Run("not named", func(t *testing.T) {
		for name, h := range map[string]*kvpb.Hello{
			"it means another":     foreignCall(9, &kvpb.Peer{Node: plainNode(2), RaftId: 6}),
			"it only asks":         foreignCall(9, nil),
			"it is in no cluster":  foreignCall(0, &kvpb.Peer{Node: plainNode(1), RaftId: 6}),
			"it says nothing more": {ClusterId: 9, To: &kvpb.Peer{}},
		} {
			l := newLoneClaims(t)
			l.noteForeign(h, l.now)
			if l.recentForeign(l.now) != nil {
				t.Error(name)
			}
			l.ask(claimBy(7, 2, 2), claimGranted)
		}
	})
}

// foreignCall is a hello of node 5.
func foreignCall(clusterID uint64, to *kvpb.Peer) *kvpb.Hello {
	return &kvpb.Hello{ClusterId: clusterID, From: &kvpb.Peer{Node: plainNode(5), RaftId: 5, Life: 5}, To: to}
}

// askNode requests a claim of a node.
func askNode(l *lone, req *kvpb.ClaimRequest, want kvpb.ClaimVerdict) *kvpb.ClaimResponse {
	l.t.Helper()
	resp := l.n.answerClaim(req)
	wantVerdict(l.t, req, resp, want)
	l.n.publish()
	return resp
}

// newUnclaimed is a node in no cluster that is not fresh any more.
func newUnclaimed(t *testing.T) *lone {
	l := newLone(t, inNoCluster)
	l.ticks(l.n.ticksOf(l.n.redialTime()) + 1)
	return l
}

// TestClaimedNode: a node hands its claims the time, its life and what clusters say to it;
// and it hears only those that its claim allows.
func TestClaimedNode(t *testing.T) {
	t.Run("fresh", func(t *testing.T) {
		l := newLone(t, inNoCluster)
		askNode(l, claimBy(7, 2, 2), claimFresh)
		l.ticks(l.n.ticksOf(l.n.redialTime()))
		askNode(l, claimBy(7, 2, 2), claimFresh)
		l.ticks(1)
		askNode(l, claimBy(7, 2, 2), claimGranted)
	})
	t.Run("fresh again", func(t *testing.T) {
		l := newUnclaimed(t)
		askNode(l, claimBy(7, 2, 2), claimGranted)
		l.n.newLife()
		if l.n.currentClaim() != nil {
			t.Error("the claim has outlived its life")
		}
		askNode(l, claimBy(8, 2, 2), claimFresh)
	})
	t.Run("until the claim expires", func(t *testing.T) {
		l := newUnclaimed(t)
		askNode(l, claimBy(7, 2, 2), claimGranted)
		l.ticks(l.n.ticksOf(claimTime))
		askNode(l, claimBy(8, 3, 3), claimRefused)
		l.ticks(1)
		if l.n.currentClaim() != nil {
			t.Error("the claim has not expired")
		}
		askNode(l, claimBy(8, 3, 3), claimGranted)
	})
	t.Run("while the founder waits", func(t *testing.T) {
		l := newUnclaimed(t)
		askNode(l, claimBy(7, 2, 2), claimGranted)
		l.ticks(l.n.ticksOf(claimTime) / 2)
		waits := claimBy(7, 2, 2)
		waits.ClusterId = 9
		if l.n.awaitMember(waits) != nil {
			t.Error("it is no member")
		}
		l.ticks(l.n.ticksOf(claimTime))
		askNode(l, claimBy(8, 3, 3), claimRefused)
	})
	t.Run("called by a cluster", func(t *testing.T) {
		l := newUnclaimed(t)
		l.n.accept(foreignCall(9, &kvpb.Peer{Node: plainNode(1), RaftId: 6}))
		l.turn(0)
		askNode(l, claimBy(7, 2, 2), claimNamed)
		l.ticks(l.n.ticksOf(l.n.redialTime()))
		askNode(l, claimBy(7, 2, 2), claimNamed)
		l.ticks(1)
		askNode(l, claimBy(7, 2, 2), claimGranted)
	})
	t.Run("not called", func(t *testing.T) {
		l := newUnclaimed(t)
		l.n.accept(foreignCall(9, &kvpb.Peer{Node: plainNode(2), RaftId: 6})) // means another
		l.n.accept(foreignCall(9, nil))                                       // only asks
		l.n.accept(foreignCall(0, &kvpb.Peer{Node: plainNode(1), RaftId: 6})) // is in no cluster
		l.turn(0)
		askNode(l, claimBy(7, 2, 2), claimGranted)
	})
	t.Run("spoken to by a cluster", func(t *testing.T) {
		l := newUnclaimed(t)
		l.hears(0, message(raftpb.MsgHeartbeat, 2, 1)) // on a stream that is open since long ago
		askNode(l, claimBy(7, 2, 2), claimNamed)
	})
	t.Run("no other cluster adds it", func(t *testing.T) {
		const (
			accepted     = kvpb.Verdict_VERDICT_ACCEPTED
			otherCluster = kvpb.Verdict_VERDICT_OTHER_CLUSTER
		)
		l := newUnclaimed(t)
		mine := foreignCall(9, &kvpb.Peer{Node: plainNode(1), RaftId: 1})
		if w := l.n.accept(mine); w.Verdict != accepted {
			t.Errorf("before the claim: %v", w)
		}
		l.ticks(l.n.ticksOf(l.n.redialTime()) + 1)
		askNode(l, claimBy(7, 2, 2), claimGranted)
		if w := l.n.accept(mine); w.Verdict != otherCluster {
			t.Errorf("it is claimed: %v", w)
		}
		others := l.hellos[1] // of node 3
		if err := l.n.stepSnapshot(others, 1, newTestStore()); err == nil || l.n.rn != nil {
			t.Errorf("a snapshot of another cluster: %v", err)
		}
		founders := l.hellos[0]
		if w := l.n.accept(founders); w.Verdict != accepted {
			t.Errorf("the founder itself: %v", w)
		}
		waits := claimBy(7, 2, 2)
		waits.ClusterId = 9
		if l.n.awaitMember(waits) != nil {
			t.Error("it is no member")
		}
		l.n.publish()
		if w := l.n.accept(mine); w.Verdict != accepted {
			t.Errorf("another member of the cluster that the founder has made: %v", w)
		}
		if err := l.n.stepSnapshot(others, 1, newTestStore()); err == nil {
			t.Error("a snapshot of another cluster than the founder's")
		}
		if err := l.n.stepSnapshot(founders, 1, newTestStore()); err != nil || l.n.currentClaim() != nil {
			t.Errorf("the founder's snapshot: %v", err)
		}
		resp := askNode(l, claimBy(8, 3, 3), kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER)
		if resp.ClusterId != 7 || len(resp.Voters) != 3 {
			t.Errorf("it is a member: %v", resp)
		}
	})
}

// claimSim is nodes whose founders claim each other while messages take as long as
// they like, clocks run at any pace and stand still, and processes restart.
type claimSim struct {
	t       *testing.T
	seed    uint64
	r       *rand.Rand
	now     float64 // seconds
	delay   float64 // mean, of a message
	nodes   map[uint64]*claimNode
	pending []*claimEvent
	founded int
}

type claimNode struct {
	*node
	born float64
	rate float64 // of its clock
	lost uint64  // ticks that its loop has missed
	list []*kvpb.Node
}

type claimEvent struct {
	at float64
	f  func()
}

func newClaimSim(t *testing.T, seed uint64) *claimSim {
	s := &claimSim{t: t, seed: seed, r: rand.New(rand.NewPCG(seed, 14)), nodes: map[uint64]*claimNode{}}
	s.delay = .1 + 3*s.r.Float64()
	for id := uint64(1); id <= claimSimSize; id++ {
		var list []*kvpb.Node
		for other := uint64(1); other <= claimSimSize; other++ {
			if other == id || s.r.IntN(4) > 0 {
				list = append(list, plainNode(other))
			}
		}
		s.start(id, list)
	}
	return s
}

const claimSimSize = 4

// after has a message arrive.
func (s *claimSim) after(f func()) {
	delay := s.delay * s.r.ExpFloat64()
	if s.r.IntN(8) == 0 {
		delay *= 10 // more than a claim lasts
	}
	s.pending = append(s.pending, &claimEvent{s.now + delay, f})
}

// step has the next message arrive, and at times a process restart that has made no
// cluster.
func (s *claimSim) step() {
	next := slices.MinFunc(s.pending, func(a, b *claimEvent) int { return cmp.Compare(a.at, b.at) })
	s.pending = slices.DeleteFunc(s.pending, func(e *claimEvent) bool { return e == next })
	s.now = next.at
	next.f()
	id := 1 + s.r.Uint64N(claimSimSize)
	if s.r.IntN(40) == 0 && s.nodes[id].store.founding == nil {
		s.start(id, s.nodes[id].list)
	}
}

// start starts a process, which has no memory.
func (s *claimSim) start(id uint64, list []*kvpb.Node) {
	o := defaultOptions()
	o.redial = time.Millisecond
	n := newNode(o, plainNode(id), quiet())
	n.net = deafNetwork{}
	p := &claimNode{node: n, born: s.now, rate: .1 + 4*s.r.Float64(), list: list}
	s.nodes[id] = p
	s.after(func() { s.beginTry(p) })
}

// passTime lets time pass at a process until now; false: another has taken its place.
func (s *claimSim) passTime(p *claimNode) bool {
	wall := firstTick + uint64((s.now-p.born)*p.rate/p.tickDuration().Seconds())
	missed := wall - p.clock.wall
	if missed > 0 && s.r.IntN(5) == 0 {
		p.lost += s.r.Uint64N(missed)
	}
	p.clock.wall = wall
	p.clock.now = max(p.clock.now, wall-p.lost)
	return s.nodes[p.self.Id] == p
}

// beginTry is founder.newTry, and what follows it.
func (s *claimSim) beginTry(p *claimNode) {
	if !s.passTime(p) || p.store.clusterID != 0 {
		return
	}
	self := &kvpb.Peer{Node: p.self, RaftId: p.id.raftID, Life: p.id.life}
	s.claimFrom(p, &initTry{id: randomID(), begun: p.clock.wall, founder: self}, 0)
}

// claimFrom is founder.claimMembers, from the member at i on, and foundCluster.
func (s *claimSim) claimFrom(p *claimNode, try *initTry, i int) {
	if i == len(p.list) {
		s.foundCluster(p, try)
		return
	}
	s.after(func() {
		q := s.nodes[p.list[i].Id]
		s.passTime(q)
		resp := q.answerClaim(&kvpb.ClaimRequest{To: q.self, Id: try.id, Founder: try.founder, Members: p.list})
		s.after(func() {
			if resp.Verdict == claimGranted {
				s.claimFrom(p, try, i+1)
			} else {
				s.withdraw(p, try, i+1)
			}
		})
	})
}

func (s *claimSim) foundCluster(p *claimNode, try *initTry) {
	if !s.passTime(p) {
		return
	}
	clusterID, err := p.foundCluster(try, p.list)
	if err != nil {
		s.t.Fatal(err)
	}
	if clusterID == 0 {
		s.withdraw(p, try, len(p.list))
		return
	}
	s.founded++
	s.check(p)
}

// withdraw is founder.withdraw, and then the next try.
func (s *claimSim) withdraw(p *claimNode, try *initTry, claimed int) {
	for _, m := range p.list[:claimed] {
		s.after(func() {
			q := s.nodes[m.Id]
			if s.passTime(q) {
				q.claims.withdraw(try.id)
			}
		})
	}
	s.after(func() { s.beginTry(p) })
}

// check is called when p has made a cluster: no other founder that names p, and that p
// names, has made one.
func (s *claimSim) check(p *claimNode) {
	for id, q := range s.nodes {
		if q == p || q.store.founding == nil {
			continue
		}
		if containsNode(p.store.founding, q.self) && containsNode(q.store.founding, p.self) {
			s.t.Fatalf("seed %d: nodes %d and %d have both made a cluster, of %s and of %s",
				s.seed, p.self.Id, id, formatNodes(p.store.founding), formatNodes(q.store.founding))
		}
	}
}

// TestClaimsExclude: of founders that name each other, one makes a cluster at most.
func TestClaimsExclude(t *testing.T) {
	t.Parallel()
	seeds := uint64(times(300))
	founded := 0
	for seed := range seeds {
		s := newClaimSim(t, seed)
		for steps := 0; len(s.pending) > 0 && steps < 400; steps++ {
			s.step()
		}
		founded += s.founded
	}
	t.Log("clusters made:", founded)
	if founded < 200 {
		t.Errorf("only %d clusters were made", founded)
	}
}
