// The simulator's clients, who call as gRPC's clients do, and its operators, who do what
// admin.go does for them.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// caller makes one call after another.
type caller struct {
	s        *sim
	id       int
	n        int
	op       *op // the one that runs
	session  uint64
	sequence uint64
	past     []*op     // some writes with ids, to be sent again
	watch    *simWatch // nil: it makes other calls
}

// owner is whose sessions the caller's are.
func (c *caller) owner() string { return []string{"client/b", "", "admin"}[c.id%3] }

// op is a call of a client: one write, however often it is sent.
type op struct {
	client    int
	kind      string // set, delete, delete range, open, get, list, scan, watch
	key       string
	value     string
	id        *kvpb.RequestId
	session   uint64 // that it opens
	expected  *uint64
	record    []byte
	sent      *attempt // the one that it waits for
	begun     int64
	ended     int64  // 0: it was given up, or its outcome is not known
	version   uint64 // of the write, or of what was read
	found     bool
	compare   bool   // it failed
	atLeast   uint64 // the newest version that was known when it began, or that is asked for
	committed uint64 // version of the write, as the oracle knows it
	unknown   bool   // the fate of an attempt is not
	failed    bool   // nothing was or will be applied

	// Of a range.
	bounds   bounds
	deletion *deletion // what became of a DeleteRange, as the oracle knows it
	deleted  uint32
	tooMany  bool

	// Of a read.
	local      bool
	minVersion uint64
	page       pageSize
	pace       float64 // mean, between two pages
	view       *view   // that is open
}

// isRead reports whether an op changes nothing.
func (o *op) isRead() bool {
	return slices.Contains([]string{"get", "list", "scan", "watch"}, o.kind)
}

// answer is what was acknowledged.
func (o *op) answer() result {
	return result{version: o.version, deleted: o.deleted, found: o.found, compareFailed: o.compare, tooMany: o.tooMany}
}

// attempt is an op on its way through a process.
type attempt struct {
	o *op
	c *call
	p *proc
}

func (o *op) String() string {
	return fmt.Sprintf("client %d: %s %s%v %.12s %v", o.client, o.kind, o.key, o.bounds, o.value, o.id)
}

// key2 is the id as the key of a map.
func (o *op) key2() [2]uint64 { return [2]uint64{o.id.GetSession(), o.id.GetSequence()} }

// act makes a client's next call: a new one, or a past write once more.
func (c *caller) act() {
	s := c.s
	if c.watch != nil {
		c.watch.act()
		return
	}
	if s.quiet {
		s.after(s.expo(s.cfg.think), nil, c.act)
		return
	}
	if len(c.past) > 0 && s.rng.IntN(8) == 0 {
		c.op = c.past[s.rng.IntN(len(c.past))]
		c.op.failed = false
		s.count["calls repeated"]++
	} else {
		c.op = c.newOp()
		s.history = append(s.history, c.op)
		s.count["calls"]++
	}
	c.send(c.op)
}

// newOp draws a call.
func (c *caller) newOp() *op {
	s := c.s
	c.n++
	o := &op{client: c.id, key: s.drawKey(), atLeast: s.newest, begun: s.tock()}
	w := &kvpb.Write{}
	switch k := s.rng.IntN(14); {
	case k < 7 && (c.session == 0 || s.rng.IntN(30) == 0):
		o.kind = "open"
		o.key = ""
		o.session = randomID()
		w = openWriteOf(o.session, c.owner())
	case k < 5:
		o.kind = "set"
		o.value = fmt.Sprintf("%d.%d.%s", c.id, c.n, strings.Repeat(".", s.rng.IntN(s.cfg.valueBytes+1)))
		s.values[o.value] = o
		c.identify(o)
		if s.rng.IntN(4) == 0 {
			o.expected = new(s.seen[o.key] * uint64(min(1, s.rng.IntN(4))))
		}
		set := &kvpb.SetRequest{Key: o.key, Value: []byte(o.value), RequestId: o.id, ExpectedVersion: o.expected}
		w.Operation = &kvpb.Write_Set{Set: set}
	case k < 6:
		o.kind = "delete"
		c.identify(o)
		if known := s.seen[o.key]; o.id != nil && known != 0 && s.rng.IntN(2) == 0 {
			o.expected = &known
		}
		del := &kvpb.DeleteRequest{Key: o.key, RequestId: o.id, ExpectedVersion: o.expected}
		w.Operation = &kvpb.Write_Delete{Delete: del}
	case k < 7:
		o.kind = "delete range"
		o.key = ""
		o.bounds = s.drawBounds()
		c.identify(o)
		b := o.bounds
		del := &kvpb.DeleteRangeRequest{Prefix: b.prefix, Start: b.start, End: b.end, RequestId: o.id}
		w.Operation = &kvpb.Write_DeleteRange{DeleteRange: del}
	case k < 11:
		o.kind = "get"
		return o
	case k < 12:
		o.kind = "get"
		s.readLocally(o, s.drawMinVersion())
		return o
	default:
		s.drawView(o)
		return o
	}
	var err error
	if o.record, err = encodeWrite(w); err != nil {
		s.failf("%v: %v", o, err)
	}
	return o
}

// drawKey draws one of the clients' keys.
func (s *sim) drawKey() string { return fmt.Sprintf("k%d", s.rng.IntN(s.cfg.keys)) }

// farAway is a sequence that no client gets to.
const farAway = 1 << 40

// identify gives most writes an id.
func (c *caller) identify(o *op) {
	s := c.s
	if s.rng.IntN(4) == 0 {
		return
	}
	if s.rng.IntN(50) == 0 { // a stranger's guess
		o.id = &kvpb.RequestId{Session: c.session, Sequence: farAway + s.rng.Uint64N(farAway)}
		s.ids[o.key2()] = o
		return
	}
	c.sequence += uint64(min(1+s.rng.IntN(2)*s.rng.IntN(3), s.cfg.answers))
	o.id = &kvpb.RequestId{Session: c.session, Sequence: c.sequence}
	s.ids[[2]uint64{c.session, c.sequence}] = o
	c.past = append(c.past, o)
	if len(c.past) > 6 {
		c.past = c.past[1:]
	}
}

// send sends an op through some node.
func (c *caller) send(o *op) {
	s, p := c.s, c.s.anyProc()
	if p == nil {
		s.after(s.expo(s.cfg.think), nil, func() { c.send(o) })
		return
	}
	a := &attempt{o: o, p: p, c: &call{write: o.record, minVersion: o.minVersion, done: make(chan outcome, 1)}}
	o.sent = a
	timeout := s.expo(s.cfg.timeout) + 1
	if s.rng.IntN(2) == 0 {
		a.c.wait = uint64(timeout)
	}
	s.after(timeout, nil, func() { c.timeout(a) })
	if o.kind == "get" {
		s.readLocal(p, o.key)
	}
	if o.asksNobody() || o.isRead() && s.cfg.readNow {
		s.finishRead(a)
		return
	}
	if err := p.n.inbox.call(a.c); err != nil {
		c.finish(a, outcome{err: err})
		return
	}
	p.calls = append(p.calls, a)
	p.wake()
}

// tock orders the begins and ends of calls.
func (s *sim) tock() int64 {
	s.clock++
	return s.clock
}

// poll looks which calls have ended at a process.
func (p *proc) poll() {
	if len(p.calls) == 0 {
		return
	}
	calls := p.calls
	p.calls = nil
	for _, a := range calls {
		select {
		case out := <-a.c.done:
			p.s.clients[a.o.client].finish(a, out)
		default:
			if p.s.cfg.ackEarly && a.isProposedSet() {
				a.o.ended = p.s.tock()
				a.o.version = 0
				a.o.sent = nil
				p.s.clients[a.o.client].rest()
				continue
			}
			p.calls = append(p.calls, a)
		}
	}
}

// timeout gives a call up, as server.call does.
func (c *caller) timeout(a *attempt) {
	if a.o.sent != a {
		return
	}
	c.s.count["calls given up"]++
	if a.o.view != nil {
		a.o.view.close()
		a.o.view = nil
	}
	c.again(a, a.o.isRead() || a.c.state.CompareAndSwap(callQueued, callGivenUp))
}

// rest has the client make its next call some time.
func (c *caller) rest() {
	c.op = nil
	c.s.after(c.s.expo(c.s.cfg.think), nil, c.act)
}

// again sends a write with an id another time, for a while; of the last attempt
// it is known, or not, that it will not be applied.
func (c *caller) again(a *attempt, refused bool) {
	s, o := c.s, a.o
	o.sent = nil
	o.unknown = o.unknown || !refused
	if o.id != nil && s.rng.IntN(10) > 0 {
		s.after(s.expo(s.cfg.think), nil, func() { c.send(o) })
		return
	}
	c.giveUp(o)
}

// giveUp has the client go on without an answer. If all attempts were refused, nothing
// was or will be applied.
func (c *caller) giveUp(o *op) {
	o.failed = !o.unknown && o.ended == 0
	c.rest()
}

// finish takes the answer to a call.
func (c *caller) finish(a *attempt, out outcome) {
	s, o := c.s, a.o
	if o.sent != a {
		return // given up
	}
	switch {
	case errors.Is(out.err, errOutcomeUnknown):
		s.count["outcomes unknown"]++
		c.again(a, false)
	case out.err == errSessionUnknown, out.err == errSequenceTooOld, out.err == errSequenceTooFar:
		s.count["writes refused by session"]++
		if a.p.n.rn != nil && !s.mayRefuse(o, out.err) {
			s.failf("I8: %v is refused: %v", o, out.err)
		}
		if out.err != errSequenceTooOld && o.id.Session == c.session && o.id.Sequence < farAway {
			c.session, c.sequence = 0, 0
		}
		o.sent = nil
		c.giveUp(o)
	case out.err != nil:
		s.count["calls refused"]++
		if errors.Is(out.err, errQuota) {
			s.checkRefusal(a, out.err)
		}
		c.again(a, true)
	case o.isRead():
		if s.rng.IntN(4) > 0 {
			s.finishRead(a)
		} else { // whoever waited wakes late
			s.after(s.expo(1), nil, func() {
				if o.sent == a && !a.p.dead {
					s.finishRead(a)
				}
			})
		}
	default:
		s.finishWrite(o, out.result)
		if o.kind == "open" {
			if a.p.n.rn != nil && !s.oracle.opened[o.session] {
				s.failf("I8: %v was acknowledged, and session %d was never opened", o, o.session)
			}
			c.session, c.sequence = o.session, 0
		}
		o.sent = nil
		c.rest()
	}
}

// ask makes a call that must succeed.
func (s *sim) ask(p *proc, record []byte) (r result) {
	c := &call{write: record, done: make(chan outcome, 1)}
	if err := p.n.inbox.call(c); err != nil {
		s.failf("I9: %v", err)
	}
	p.wake()
	s.until(settleTicks, func() string {
		select {
		case o := <-c.done:
			if errors.Is(o.err, errNoLeader) { // it was stopped until now: not applied, so once more
				c = &call{write: record, done: make(chan outcome, 1)}
				_ = p.n.inbox.call(c)
				return "nobody leads"
			}
			if o.err != nil {
				s.failf("I9: a fresh call of %v: %v", p, o.err)
			}
			r = o.result
			return ""
		default:
			return fmt.Sprintf("a fresh call of %v does not end", p)
		}
	})
	return r
}

// admin is an operator's request. Its steps are taken in the loop of whoever leads
// until it is answered, as server.onLeader has it.
type admin struct {
	what     string
	steps    func(n *node) func(*leaderState) nextStep
	done     func(p *proc)        // called in the loop that answers
	again    func(err error) bool // whether it is asked again; nil: it is not
	isTrue   func(err error) bool // whether an answer is; nil: any is
	then     func(error)
	begun    int64 // as calls are ordered
	deadline int64
	p        *proc
	term     uint64 // of whoever answered
	c        *pendingRequest
	cancel   func()
}

// errNotNow is of requests that an operator would not make now.
var errNotNow = errors.New("not now")

// request starts an operator's request.
func (s *sim) request(a *admin, ticks float64) {
	s.trace("an operator wants to %s", a.what)
	s.count["requests"]++
	a.begun, a.deadline = s.tock(), s.now+int64(ticks*simTick)
	s.admins = append(s.admins, a)
}

// operate follows the operators' requests.
func (s *sim) operate() {
	s.after(1, nil, s.operate)
	for _, a := range slices.Clone(s.admins) {
		done, err := s.pursue(a)
		if !done && s.now > a.deadline {
			done, err = true, context.DeadlineExceeded
		}
		if !done {
			continue
		}
		if a.cancel != nil {
			a.cancel()
		}
		s.admins = slices.DeleteFunc(s.admins, func(o *admin) bool { return o == a })
		if err == nil {
			s.count["requests done"]++
		}
		s.trace("the request to %s ends: %v", a.what, err)
		a.then(err)
	}
}

// pursue looks after a request.
func (s *sim) pursue(a *admin) (done bool, err error) {
	if a.c != nil {
		select {
		case err := <-a.c.done:
			asksAnother := errors.Is(err, errNotLeader) || errors.Is(err, errStopping) || errors.Is(err, errNotInitialized)
			if asksAnother {
				break
			}
			s.judge(a, err)
			if a.again == nil || !a.again(err) {
				return true, err
			}
		default:
			if !a.p.dead {
				return false, nil
			}
		}
		a.cancel()
		a.c = nil
	}
	var leaders []*proc
	for _, p := range s.alive() {
		if p.n.status.latest.Load().leading && !p.paused {
			leaders = append(leaders, p)
		}
	}
	if len(leaders) == 0 {
		return false, nil
	}
	a.p = leaders[s.rng.IntN(len(leaders))]
	n := a.p.n
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	r := &request{n: n, next: a.steps(n)}
	a.c = &pendingRequest{ctx: ctx, done: make(chan error, 1), poll: func() (bool, error) { return a.advance(r) }}
	n.inbox.event(func() { n.calls.requests = append(n.calls.requests, a.c) })
	a.p.wake()
	return false, nil
}

// advance is request.poll, with the bugs of answering too early.
func (a *admin) advance(r *request) (done bool, err error) {
	p := a.p
	if p.s.cfg.cached {
		r.witness = p.witness
	}
	if p.s.cfg.unsettled && r.n.leads() {
		done, err = r.n.perform(r.next(r.n.leaderState())).answer()
	} else {
		done, err = r.poll()
	}
	p.witness = r.witness
	a.term = r.n.raft.term
	if done && err == nil && a.done != nil {
		a.done(p)
	}
	return done, err
}

// addLearner is server.addLearner.
func (s *sim) addLearner(st *site, then func(error)) {
	var life *kvpb.Peer
	raftID := uint64(0)
	at := st.node
	a := &admin{what: fmt.Sprintf("add learner %d", st.node.Id)}
	a.then = func(err error) {
		if hasReason(err, kvpb.ErrorReason_ERROR_REASON_LEVEL_TOO_LOW) {
			s.replaceRefused(st)
		}
		then(err)
	}
	a.steps = func(n *node) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep {
			if raftID == 0 || n.store.members[raftID] == nil && s.rng.IntN(50) == 0 { // he asks once, or again
				if from := s.sites[n.self.Id-1]; st.cur == nil || st.cur.paused || s.isCut(from, st) || s.isCut(st, from) {
					return failStep(errNotNow)
				}
				at = st.node
				life = &kvpb.Peer{Node: at, Level: st.cur.n.opts.level}
				raftID = st.cur.n.accept(n.hello()).Peer.RaftId
				st.cur.wake()
			}
			life.RaftId = raftID
			return l.learnerStep(life)
		}
	}
	a.again = func(err error) bool {
		if err != errPastLife {
			return false
		}
		raftID = 0
		return true
	}
	a.isTrue = func(err error) bool {
		return err != nil || s.oracle.held(a.begun, func(e era) bool {
			lives, _ := e.livesOf(st.node.Id)
			return lives == 1 && proto.Equal(e.members[raftID], at)
		})
	}
	s.request(a, 150)
}

// changeMembership is server.changeMembership.
func (s *sim) changeMembership(req *kvpb.ChangeMembershipRequest, then func(error)) {
	if err := validateChange(req); err != nil {
		s.failf("the operator wants what cannot be: %v", err)
	}
	a := &admin{what: fmt.Sprintf("have voters %v, retain %v, without %v, promote %v, demote %v, expecting %v",
		req.Members, req.Retain, req.Remove, req.Promote, req.Demote, describeExpected(req.Expected))}
	a.steps = func(n *node) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep {
			if want, err := l.votersToBe(req); err == nil && !s.cfg.reckless && !isJoint(n.store.conf) && !s.remain(want, nil) {
				return failStep(errNotNow) // an operator would not
			}
			return l.membershipStep(req)
		}
	}
	a.done = func(p *proc) {
		if p.confAt > s.told.index {
			s.told = established{p.confAt, p.n.store.conf, p.n.store.removed}
		}
	}
	a.isTrue = func(err error) bool {
		answer := cmp.Or(errorReason(err), "other")
		if err == nil {
			answer = "done"
		}
		s.count["changes answered: "+answer]++
		switch {
		case err == nil:
			return s.oracle.held(a.begun, func(e era) bool { return e.fulfils(req) })
		case errorReason(err) == "UNKNOWN_MEMBER":
			return s.oracle.held(a.begun, func(e era) bool { return e.lacks(req) })
		case errorReason(err) == "MEMBERSHIP_CHANGED":
			return s.oracle.held(a.begun, func(e era) bool {
				another := !isJoint(e.conf) && !proto.Equal(e.membership(), req.Expected)
				// To remove who never was there is no success, nor is it if somebody has asked to join,
				// whose wish the change would end.
				return another && (!e.fulfils(req) || e.lacks(req) || s.cfg.joins)
			})
		}
		return true
	}
	a.then = func(err error) {
		if err == nil {
			s.after(s.expo(2), nil, s.dismiss)
		}
		then(err)
	}
	s.request(a, 150)
}

// describeExpected is not protobuf's text, which is unstable on purpose.
func describeExpected(m *kvpb.Membership) (text string) {
	for _, e := range m.GetMembers() {
		text += fmt.Sprintf("%d %v ", e.Node.Id, e.Voter)
	}
	return text
}

// dismiss has an operator end the processes of nodes that are no members any more,
// as far as he was told, and delete what they have kept.
func (s *sim) dismiss() {
	if s.calm {
		return
	}
	for _, st := range s.sites {
		was := st.keeps()
		if st.cur != nil {
			was = st.cur.n.id.raftID
		}
		if !slices.Contains(s.told.removed, was) {
			continue
		}
		s.trace("an operator ends node %d for good", st.node.Id)
		s.count["dismissed"]++
		if st.fs != nil {
			st.fs = newSimFS()
		}
		if st.cur != nil {
			st.cur.die(s.expo(s.cfg.outage))
		}
	}
}

// transferLeader is server.TransferLeader.
func (s *sim) transferLeader(nodeID uint64) {
	a := &admin{what: fmt.Sprintf("have %d lead", nodeID), then: func(error) {}}
	a.steps = func(*node) func(*leaderState) nextStep { return (&leaderTransfer{to: nodeID}).step }
	a.isTrue = func(err error) bool { return err != nil || a.p.n.self.Id == nodeID }
	s.request(a, 100)
}

// wish has an operator ask for something.
func (s *sim) wish() {
	if s.calm {
		return
	}
	s.after(s.expo(s.cfg.adminEvery), nil, s.wish)
	if len(s.admins) >= s.cfg.operators {
		return
	}
	st := s.sites[s.rng.IntN(len(s.sites))]
	switch s.rng.IntN(5) {
	case 0:
		s.transferLeader(st.node.Id)
	case 1, 2:
		if s.cfg.joins && s.rng.IntN(2) == 0 {
			s.join(st)
		} else {
			s.addLearner(st, func(error) {})
		}
	default:
		req := s.drawChange(st)
		isNothing := len(req.Members)+len(req.Promote)+len(req.Demote)+len(req.Remove) == 0
		expectsNobody := req.Expected != nil && len(req.Expected.Members) == 0
		if !isNothing && !expectsNobody {
			s.changeMembership(req, func(error) {})
		}
	}
}

// drawChange draws a change of membership, some of which are about one site.
func (s *sim) drawChange(one *site) *kvpb.ChangeMembershipRequest {
	req := &kvpb.ChangeMembershipRequest{Retain: s.rng.IntN(2) == 0}
	some := s.anyProc()
	for _, st := range s.sites {
		if some == nil {
			continue
		}
		isMember := len(some.n.store.raftIDsOf(st.node.Id)) > 0
		if !isMember && s.rng.IntN(10) > 0 {
			continue
		}
		if s.rng.IntN(3) > 0 {
			req.Members = append(req.Members, st.node.Id)
		} else if s.rng.IntN(4) == 0 {
			req.Remove = append(req.Remove, st.node.Id)
		}
	}
	if s.rng.IntN(4) == 0 { // all but some
		req.Members = nil
		req.Remove = append(req.Remove, one.node.Id)
		slices.Sort(req.Remove)
		req.Remove = slices.Compact(req.Remove)
	}
	if s.cfg.anchored() {
		anchor := s.sites[0].node.Id
		req.Remove = slices.DeleteFunc(req.Remove, func(id uint64) bool { return id == anchor })
		if len(req.Members) > 0 && req.Members[0] != anchor {
			req.Members = slices.Insert(req.Members, 0, anchor)
		}
	}
	if s.rng.IntN(3) == 0 { // in terms of what changes
		req.Promote = req.Members
		req.Members = nil
		req.Retain = false
		if len(req.Promote) > 1 && s.rng.IntN(2) == 0 {
			req.Demote, req.Promote = req.Promote[:1], req.Promote[1:]
		}
	}
	if some != nil && s.rng.IntN(2) == 0 {
		req.Expected = era{conf: some.n.store.conf, members: some.n.store.members}.membership()
	}
	return req
}
