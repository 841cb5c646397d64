// The simulator's nodes that form a cluster by a list of all sites, as by --initial-cluster, and
// join one, as by --join. The cluster that boot has made lives throughout the run, with a
// majority of its voters; and all of them are in the list. So no other may ever be formed (I11).

package main

import (
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// formSoon has a node with a list try to form a cluster, again and again, as starter.run does.
func (p *proc) formSoon() {
	s := p.s
	if s.cfg.formEvery == 0 {
		return
	}
	p.n.claims.plan.members = s.list
	s.after(s.expo(s.cfg.formEvery), p, func() {
		p.form()
		p.formSoon()
	})
}

// form is founder.claimAndFound. It makes no survey, which spares the others such claims.
func (p *proc) form() {
	s, n := p.s, p.n
	if n.store.clusterID != 0 || n.err != nil {
		return
	}
	try := &initTry{id: randomID(), begun: n.clock.wall, founder: n.peer(n.status.latest.Load())}
	s.count["tries to form a cluster"]++
	p.claimFrom(try, 0, 0)
}

// claimFrom is founder.claimMembers, from the member at i on, and foundCluster.
func (p *proc) claimFrom(try *initTry, i, granted int) {
	s := p.s
	if i == len(s.list) {
		clusterID, err := p.n.foundCluster(try, s.list)
		if err != nil {
			s.failf("%v cannot form a cluster: %v", p, err)
		}
		if clusterID != 0 {
			s.failf("I11: %v has formed a cluster beside one that lives", p)
		}
		p.withdraw(try, i)
		return
	}
	st := s.siteOf(s.list[i])
	lost := func() { s.after(s.expo(50), p, func() { p.withdraw(try, i+1) }) }
	if st == nil || s.isCut(p.site, st) {
		lost()
		return
	}
	req := &kvpb.ClaimRequest{To: s.list[i], Id: try.id, Founder: try.founder, Members: s.list}
	s.after(s.latency(), nil, func() {
		arrived := s.at(st.cur, func() { st.cur.answerClaim(req, p, func(v kvpb.ClaimVerdict) { p.follow(try, i, granted, v) }) })
		if !arrived {
			lost()
		}
	})
}

// follow takes in the answer to a claim of the member at i.
func (p *proc) follow(try *initTry, i, granted int, v kvpb.ClaimVerdict) {
	s := p.s
	s.count["claims: "+v.String()]++
	isGranted := v == kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED
	if isGranted {
		granted++
	}
	mayPassOver := s.cfg.halfOfAll && granted+len(s.list)-1-i > len(s.list)/2
	if isGranted || mayPassOver {
		p.claimFrom(try, i+1, granted)
		return
	}
	p.withdraw(try, i+1)
}

// giveUpSoon has a node in memory drop a cluster that never goes on, as starter.giveUp does, again
// and again.
func (p *proc) giveUpSoon() {
	n := p.n
	if p.site.fs != nil {
		return
	}
	p.s.after(float64(2*n.electionTicks()), p, func() {
		if latest := n.status.latest.Load(); n.founderMayBeLost(latest) {
			p.dropIfLost(latest)
		}
		p.giveUpSoon()
	})
}

func (p *proc) dropIfLost(latest *published) {
	s := p.s
	s.count["surveys of a cluster half way"]++
	ask := func(then func()) {
		p.survey(latest.founding, func(answers []surveyAnswer) {
			if mayGoOn(latest.clusterID, latest.founding, answers) == nil {
				then()
			}
		})
	}
	ask(func() {
		ask(func() {
			wasIn := p.n.store.clusterID != 0
			_ = p.n.dropFounding(latest.clusterID)
			if wasIn && p.n.store.clusterID == 0 {
				s.failf("I9: %v drops the cluster, which lives", p)
			}
			p.wake()
		})
	})
}

// survey is founder.survey. If an answer is lost, there is none at all.
func (p *proc) survey(members []*kvpb.Node, then func([]surveyAnswer)) {
	s := p.s
	answers := make([]surveyAnswer, len(members))
	left := len(members)
	for i, m := range members {
		st := s.siteOf(m)
		if st == nil || s.isCut(p.site, st) {
			return
		}
		req := &kvpb.ClaimRequest{To: m, Founder: p.n.peer(p.n.status.latest.Load()), Members: members}
		s.after(s.latency(), nil, func() {
			s.at(st.cur, func() {
				if st.cur.n.err != nil {
					return
				}
				resp := st.cur.n.answerClaim(req)
				s.after(s.latency(), p, func() {
					answers[i] = surveyAnswer{resp: resp}
					left--
					if left == 0 && !s.isCut(st, p.site) {
						then(answers)
					}
				})
			})
		})
	}
}

// answerClaim answers a founder, whom the answer reaches, or not.
func (p *proc) answerClaim(req *kvpb.ClaimRequest, founder *proc, then func(kvpb.ClaimVerdict)) {
	s := p.s
	if p.n.err != nil {
		return
	}
	verdict := kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED
	if !s.cfg.promised || p.n.store.clusterID == 0 {
		verdict = p.n.answerClaim(req).Verdict
	}
	p.n.publish()
	s.after(s.latency(), founder, func() {
		if !s.isCut(p.site, founder.site) {
			then(verdict)
		}
	})
}

// withdraw is founder.withdraw.
func (p *proc) withdraw(try *initTry, claimed int) {
	s := p.s
	for _, m := range s.list[:claimed] {
		st := s.siteOf(m)
		if st == nil || s.isCut(p.site, st) {
			continue
		}
		s.after(s.latency(), nil, func() {
			s.at(st.cur, func() {
				st.cur.n.claims.withdraw(try.id)
				st.cur.n.publish()
			})
		})
	}
}

// join is raftService.Join, called by the node of a site.
func (s *sim) join(st *site) {
	var from *kvpb.Peer
	asLearner := s.rng.IntN(3) == 0
	a := &admin{what: fmt.Sprintf("have node %d join, as a learner %v", st.node.Id, asLearner)}
	a.then = func(err error) {
		if hasReason(err, kvpb.ErrorReason_ERROR_REASON_LEVEL_TOO_LOW) {
			s.replaceRefused(st)
		}
	}
	a.steps = func(n *node) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep {
			if from == nil {
				at := s.sites[n.self.Id-1]
				if st.cur == nil || st.cur.paused || s.isCut(at, st) || s.isCut(st, at) {
					return failStep(errNotNow)
				}
				from = st.cur.n.accept(n.hello()).Peer
				st.cur.wake()
			}
			step := l.joinStep(from, asLearner)
			if step.kind == stepPropose {
				s.count["nodes that join"]++
			}
			return step
		}
	}
	a.again = func(err error) bool { return false }
	a.isTrue = func(err error) bool {
		return err != nil || s.oracle.held(a.begun, func(e era) bool {
			members := slices.Collect(maps.Values(e.members))
			return slices.ContainsFunc(members, func(m *kvpb.Node) bool { return proto.Equal(m, from.Node) })
		})
	}
	s.request(a, 150)
}
