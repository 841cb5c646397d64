// Tests of claims.go: to whom a node in no cluster promises itself, and that claims keep
// two founders apart.

package main

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// TestClaim: whom a node in no cluster promises itself to, for how long, and what it
// hears meanwhile.
func TestClaim(t *testing.T) {
	const granted, claimed = kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED, kvpb.ClaimVerdict_CLAIM_VERDICT_CLAIMED
	const fresh, named = kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH, kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED
	members := []*kvpb.Node{plainNode(1), plainNode(2)}
	by := func(id, founder, life uint64) *kvpb.ClaimRequest {
		return &kvpb.ClaimRequest{To: plainNode(1), Id: id, Members: members, Founder: &kvpb.Peer{Node: plainNode(founder), RaftId: life, Life: life}}
	}
	newcomer := func(t *testing.T) (*lone, func(*kvpb.ClaimRequest, kvpb.ClaimVerdict) *kvpb.ClaimResponse) {
		l := newLone(t, inNoCluster)
		return l, func(req *kvpb.ClaimRequest, want kvpb.ClaimVerdict) *kvpb.ClaimResponse {
			t.Helper()
			resp := l.n.answerClaim(req)
			if resp.Verdict != want {
				t.Errorf("claim %d of node %d in life %d: %v, want %v", req.Id, req.Founder.Node.Id, req.Founder.Life, resp, want)
			}
			l.n.publish()
			return resp
		}
	}
	ready := func(t *testing.T) (*lone, func(*kvpb.ClaimRequest, kvpb.ClaimVerdict) *kvpb.ClaimResponse) {
		l, ask := newcomer(t)
		l.ticks(l.n.ticksOf(l.n.redialTime()) + 1)
		return l, ask
	}
	call := &kvpb.Hello{ClusterId: 9, From: &kvpb.Peer{Node: plainNode(5), RaftId: 5, Life: 5}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 6}}

	t.Run("a fresh node", func(t *testing.T) {
		l, ask := newcomer(t)
		ask(by(7, 2, 2), fresh)
		l.ticks(l.n.ticksOf(l.n.redialTime()))
		ask(by(7, 2, 2), fresh)
		l.ticks(1)
		ask(by(7, 2, 2), granted)
	})
	t.Run("by force", func(t *testing.T) {
		_, ask := newcomer(t)
		req := by(7, 2, 2)
		req.Force = true
		ask(req, granted)
	})
	t.Run("a node that has become fresh again", func(t *testing.T) {
		l, ask := ready(t)
		ask(by(7, 2, 2), granted)
		l.n.newLife()
		if l.n.currentClaim() != nil {
			t.Error("the claim has outlived its life")
		}
		ask(by(8, 2, 2), fresh)
	})
	t.Run("one at a time", func(t *testing.T) {
		l, ask := ready(t)
		ask(by(0, 2, 2), granted)
		if l.n.currentClaim() != nil {
			t.Error("who only asks has got a claim")
		}
		ask(by(7, 2, 2), granted)
		ask(by(7, 2, 2), granted)
		if resp := ask(by(8, 3, 3), claimed); resp.By.Id != 2 || !sameNodes(resp.Members, members) {
			t.Errorf("it does not say by whom it is claimed: %v", resp)
		}
		ask(by(8, 2, 2), claimed) // another call at the same founder
		l.n.claims.withdraw(8)
		ask(by(8, 3, 3), claimed)
		l.n.claims.withdraw(7)
		ask(by(8, 3, 3), granted)
	})
	t.Run("until it expires", func(t *testing.T) {
		l, ask := ready(t)
		ask(by(7, 2, 2), granted)
		l.ticks(l.n.ticksOf(claimTime))
		ask(by(8, 3, 3), claimed)
		if l.n.currentClaim() == nil {
			t.Error("the claim does not hold")
		}
		l.ticks(1)
		if l.n.currentClaim() != nil {
			t.Error("the claim has not expired")
		}
		ask(by(8, 3, 3), granted)
	})
	t.Run("while its founder waits", func(t *testing.T) {
		l, ask := ready(t)
		ask(by(7, 2, 2), granted)
		l.ticks(l.n.ticksOf(claimTime) / 2)
		waits := by(7, 2, 2)
		waits.ClusterId = 9
		if l.n.awaitMember(waits) != nil {
			t.Error("it is no member")
		}
		l.ticks(l.n.ticksOf(claimTime))
		ask(by(8, 3, 3), claimed)
	})
	t.Run("until its founder has another life", func(t *testing.T) {
		_, ask := ready(t)
		ask(by(7, 2, 2), granted)
		ask(by(8, 2, 3), granted)
		ask(by(9, 3, 4), claimed)
	})
	t.Run("named by a cluster", func(t *testing.T) {
		for name, to := range map[string]*kvpb.Node{"id": {Id: 1, Address: "elsewhere:1"}, "address": {Id: 8, Address: plainNode(1).Address}} {
			l, ask := ready(t)
			h := &kvpb.Hello{ClusterId: 9, From: call.From, To: &kvpb.Peer{Node: to, RaftId: 6}}
			l.n.accept(h)
			l.turn(0)
			if resp := ask(by(7, 2, 2), named); resp.ClusterId != 9 || resp.By.Id != 5 {
				t.Errorf("by its %s: %v", name, resp)
			}
			force := by(7, 2, 2)
			force.Force = true
			ask(force, granted)
			l.n.claims.withdraw(7)
			l.ticks(l.n.ticksOf(l.n.redialTime()))
			ask(by(7, 2, 2), named)
			l.ticks(1)
			ask(by(7, 2, 2), granted)
		}
		l, ask := ready(t)
		l.n.accept(&kvpb.Hello{ClusterId: 9, From: call.From, To: &kvpb.Peer{Node: plainNode(2), RaftId: 6}}) // means another
		l.n.accept(&kvpb.Hello{ClusterId: 9, From: call.From})                                                // only asks
		l.n.accept(&kvpb.Hello{From: call.From, To: call.To})                                                 // is in no cluster
		l.turn(0)
		ask(by(7, 2, 2), granted)
	})
	t.Run("spoken to by a cluster", func(t *testing.T) {
		l, ask := ready(t)
		l.hears(0, message(raftpb.MsgHeartbeat, 2, 1)) // on a stream that is open since long ago
		ask(by(7, 2, 2), named)
	})
	t.Run("no other cluster adds it", func(t *testing.T) {
		l, ask := ready(t)
		mine := &kvpb.Hello{ClusterId: 9, From: call.From, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}}
		if w := l.n.accept(mine); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
			t.Errorf("before the claim: %v", w)
		}
		l.ticks(l.n.ticksOf(l.n.redialTime()) + 1)
		ask(by(7, 2, 2), granted)
		if w := l.n.accept(mine); w.Verdict != kvpb.Verdict_VERDICT_OTHER_CLUSTER {
			t.Errorf("it is claimed: %v", w)
		}
		others := l.hellos[1] // of node 3
		if err := l.n.stepSnapshot(others, 1, newTestStore()); err == nil || l.n.rn != nil {
			t.Errorf("a snapshot of another cluster: %v", err)
		}
		founders := l.hellos[0]
		if w := l.n.accept(founders); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
			t.Errorf("the founder itself: %v", w)
		}
		waits := by(7, 2, 2)
		waits.ClusterId = 9
		if l.n.awaitMember(waits) != nil {
			t.Error("it is no member")
		}
		l.n.publish()
		if w := l.n.accept(mine); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
			t.Errorf("another member of the cluster that the founder has made: %v", w)
		}
		if err := l.n.stepSnapshot(others, 1, newTestStore()); err == nil {
			t.Error("a snapshot of another cluster than the founder's")
		}
		if err := l.n.stepSnapshot(founders, 1, newTestStore()); err != nil || l.n.currentClaim() != nil {
			t.Errorf("the founder's snapshot: %v", err)
		}
		if resp := ask(by(8, 3, 3), kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER); resp.ClusterId != 7 || len(resp.Voters) != 3 {
			t.Errorf("it is a member: %v", resp)
		}
	})
}

// ticks lets time pass.
func (l *lone) ticks(n uint64) {
	for range n {
		l.turn(1)
	}
}

// claimSim is nodes whose founders claim each other while messages take as long as
// they like, clocks run at any pace and stand still, and processes restart.
type claimSim struct {
	t       *testing.T
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

func (s *claimSim) after(f func()) {
	delay := s.delay * s.r.ExpFloat64()
	if s.r.IntN(8) == 0 {
		delay *= 10 // more than a claim lasts
	}
	s.pending = append(s.pending, &claimEvent{s.now + delay, f})
}

// start starts a process, which has no memory.
func (s *claimSim) start(id uint64, list []*kvpb.Node) {
	o := defaultOptions()
	o.redial = time.Millisecond
	n := newNode(o, plainNode(id), quiet())
	n.net = deafNetwork{}
	p := &claimNode{node: n, born: s.now, rate: .1 + 4*s.r.Float64(), list: list}
	s.nodes[id] = p
	s.after(func() { s.try(p) })
}

// look lets time pass at a node until now; false: it has restarted since.
func (s *claimSim) look(p *claimNode) bool {
	clock := firstTick + uint64((s.now-p.born)*p.rate/p.tickDuration().Seconds())
	if missed := clock - p.clock.wall; missed > 0 && s.r.IntN(5) == 0 {
		p.lost += s.r.Uint64N(missed)
	}
	p.clock.wall, p.clock.now = clock, max(p.clock.now, clock-p.lost)
	return s.nodes[p.self.Id] == p
}

// try is founder.claimAndFound.
func (s *claimSim) try(p *claimNode) {
	if !s.look(p) || p.store.clusterID != 0 {
		return
	}
	t := &initTry{id: randomID(), begun: p.clock.wall, founder: &kvpb.Peer{Node: p.self, RaftId: p.id.raftID, Life: p.id.life}}
	var step func(i int)
	fail := func(claimed int) {
		for _, m := range p.list[:claimed] {
			s.after(func() {
				if q := s.nodes[m.Id]; s.look(q) {
					q.claims.withdraw(t.id)
				}
			})
		}
		s.after(func() { s.try(p) })
	}
	step = func(i int) {
		if i == len(p.list) {
			if !s.look(p) {
				return
			}
			id, err := p.foundCluster(t, p.list)
			if err != nil {
				s.t.Fatal(err)
			}
			if id == 0 {
				fail(i)
				return
			}
			s.check(p)
			return
		}
		s.after(func() {
			q := s.nodes[p.list[i].Id]
			s.look(q)
			resp := q.answerClaim(&kvpb.ClaimRequest{To: q.self, Id: t.id, Founder: t.founder, Members: p.list})
			s.after(func() {
				if resp.Verdict == kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED {
					step(i + 1)
				} else {
					fail(i + 1)
				}
			})
		})
	}
	step(0)
}

// check is called when a cluster was made.
func (s *claimSim) check(p *claimNode) {
	s.founded++
	for id, q := range s.nodes {
		if q != p && q.claims.founding != nil && containsNode(p.claims.founding, q.self) && containsNode(q.claims.founding, p.self) {
			s.t.Fatalf("nodes %d and %d have both made a cluster, of %s and of %s",
				p.self.Id, id, formatNodes(p.claims.founding), formatNodes(q.claims.founding))
		}
	}
}

// TestClaimsExclude: of founders that name each other, one makes a cluster at most.
func TestClaimsExclude(t *testing.T) {
	t.Parallel()
	founded := 0
	for seed := range uint64(times(300)) {
		s := &claimSim{t: t, r: rand.New(rand.NewPCG(seed, 14)), nodes: map[uint64]*claimNode{}}
		s.delay = .1 + 3*s.r.Float64()
		const size = 4
		for id := uint64(1); id <= size; id++ {
			var list []*kvpb.Node
			for other := uint64(1); other <= size; other++ {
				if other == id || s.r.IntN(4) > 0 {
					list = append(list, plainNode(other))
				}
			}
			s.start(id, list)
		}
		for steps := 0; len(s.pending) > 0 && steps < 400; steps++ {
			next := slices.MinFunc(s.pending, func(a, b *claimEvent) int { return int(max(-1, min(1, (a.at-b.at)*1e12))) })
			s.pending = slices.DeleteFunc(s.pending, func(e *claimEvent) bool { return e == next })
			s.now = next.at
			next.f()
			if id := 1 + s.r.Uint64N(size); s.r.IntN(40) == 0 && s.nodes[id].claims.founding == nil {
				s.start(id, s.nodes[id].list)
			}
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		}
		founded += s.founded
	}
	t.Log("clusters made:", founded)
	if founded < 200 {
		t.Errorf("only %d clusters were made", founded)
	}
}
