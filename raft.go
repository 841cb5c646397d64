// The Ready loop: every duty that etcd's raft leaves to its caller, in this order.
//
//   - Start it from what is durable, under an id that was never used by a node
//     that forgot: open, bootstrap, start.
//   - Let time pass: tick.
//   - Give it what peers send, but nothing that it would panic over: receive.
//   - Give it writes, again if they got lost, and ask it for reads: calls.go.
//   - Take each Ready, and follow term, leader and role: ready, syncSoftState.
//   - Send its messages, and say which did not get there: send, flush.
//   - Store entries and votes before anything that depends on them leaves:
//     append, persist, respond.
//   - Apply what is committed, in order and once; a change of membership is
//     raft's to know, too: apply.
//   - Keep the log short: compact; but not too short for who catches up:
//     catchup.go. Send snapshots to whom it is too short for, say how that went,
//     and install those that come: snapshots.go.
//
// What the network tells the loop, and what the loop tells all others, is in
// peers.go; what membership shall be, in cluster.go.

package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// ticksPerHeartbeat makes a tick short enough that election timeouts differ.
	ticksPerHeartbeat = 5
	// maxEntryBytes bounds the writes that share an entry, but a single larger one.
	maxEntryBytes = 1 << 20
	// maxQueuedCalls and maxQueuedBytes bound what waits to be proposed or read.
	maxQueuedCalls = 64 << 10
	maxQueuedBytes = 64 << 20
	// maxInboundBytes bounds what peers sent and the loop has not seen.
	maxInboundBytes = 16 << 20
	// leaderWait is how long there may be no leader before calls that need one end. A call
	// that comes later ends at once.
	leaderWait = 2 * time.Second
)

const (
	// never is a tick, and an index, that does not come.
	never = math.MaxUint64
	// firstTick is where a node's clock starts: so that tick 0, which is what a field
	// says of what has not happened, was longer ago than anything waits.
	firstTick = 1 << 32
)

// transport is what the loop needs of the network. Nothing in it blocks.
type transport interface {
	// send queues messages for a life of a peer and drops them if its stream is
	// down, full or to another life; life 0 is nobody.
	send(to, life uint64, ms []*raftpb.Message)
	// sendSnapshot sends a view in the background and reports by the receiver's
	// snapshotSent.
	sendSnapshot(to, life, term uint64, v *view)
	// setMembers says whom to keep a stream to, by raft ID, and whom never to
	// hear again.
	setMembers(clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64)
}

// raftLimits bound what raft does at a time. All but inflight are bytes of entries, of
// which one may always be larger.
type raftLimits struct {
	message       uint64 // an append
	ready         uint64 // what a Ready has to apply
	uncommitted   uint64 // what a leader has proposed, beyond which it takes no more
	inflight      int    // appends to a follower that it has not answered
	inflightBytes uint64
}

func defaultRaftLimits() raftLimits {
	return raftLimits{message: 1 << 20, ready: 4 << 20, uncommitted: 64 << 20, inflight: 256, inflightBytes: 16 << 20}
}

// peerMessages is what one turn sends to one life of a peer.
type peerMessages struct {
	to, life uint64
	ms       []*raftpb.Message
}

// inbound is a message from a peer, and the hello of the stream that it came by.
type inbound struct {
	m     *raftpb.Message
	hello *kvpb.Hello
}

// node is one member. All fields below are the loop's, but for those that say
// otherwise; turn is the loop's body, and needs no goroutine, clock or socket.
type node struct {
	opts   options      // constant
	limits raftLimits   // constant, once raft has started
	self   *kvpb.Node   // constant
	log    *slog.Logger // constant
	net    transport    // constant
	disk   *disk        // constant; nil: in memory only
	in     inbox        // any goroutine
	pub    atomic.Pointer[published]
	// onPublish is called by the loop whenever pub has changed.
	onPublish func(*published)
	onApply   func(*raftpb.Entry) // called by the loop

	raftID uint64 // new whenever the node has lost its memory
	life   uint64 // new whenever raftID is, and in every process
	rn     *raft.RawNode
	raft   *raftLog // by drainedLog, between two Readys
	store  *store   // the loop writes, others get
	err    error    // why the loop must end

	mark   uint64 // index of the last snapshot on disk
	queued int    // jobs that the disk has not done
	logged uint64 // bytes of the entries on disk that the last snapshot there does not cover
	// gone is whom this node tells that they were removed: it must know so after
	// a restart, too, or it might need the vote of one that has left for good.
	gone []uint64

	saving uint64 // logged, when a snapshot on its way to the disk was begun; 0: there is none

	// logBehind: raft has taken in entries, or a snapshot, since its last Ready, which
	// the log lacks. They may have replaced what it holds.
	logBehind bool
	// learned is what a peer knows to be committed, if this node does not know it yet.
	learned learnedCommit

	written  meter               // of the log's entries
	pace     pace                // of writes, while this node leads
	catching map[uint64]*catchUp // by raft ID, while this node leads
	hurry    atomic.Bool         // set by the loop: the log runs away, so nobody is to rest

	now        uint64 // ticks since the start, and firstTick
	clock      uint64 // the same, with those that a busy loop has missed: what callers wait by
	term, lead uint64
	role       raft.StateType
	leadHeard  uint64    // tick of the leader's last message
	leaderless uint64    // ticks without a leader
	campaignAt uint64    // tick in which to call an election, if there is no leader then; 0: none
	deafTo     uint64    // a leader whose stream broke, by raft ID, not heard until deafUntil; 0: none
	deafUntil  uint64    // tick
	lag        lag       // behind the leader
	commitAt   [3]uint64 // what was committed at the last heartbeats, the newest first
	upVoters   []uint64  // as this leader counted them at the last heartbeat
	// sparedUntil is up to which tick the cluster can do without this node, says the leader.
	sparedUntil uint64

	lives     map[uint64]uint64   // by raft ID: the life that we talk to; replaced, never changed
	connected map[uint64]bool     // by raft ID: our stream to it is open
	heard     map[uint64]uint64   // by raft ID: tick of its last message
	met       map[uint64]*meeting // by raft ID: a life without memory that answered in place of this member
	// moved is where our stream to a member goes, by raft ID, if that is not where
	// the configuration had it.
	moved map[uint64]*kvpb.Node
	// disownedBy are the members, by raft ID, that have applied this node's removal.
	disownedBy map[uint64]bool
	// refusals are why members, by raft ID, do not talk to this node, until they do.
	refusals map[uint64]string
	sights   map[uint64]*sight // by raft ID: learners whose node has an older life, too
	out      []peerMessages
	askedAt  uint64 // tick in which a peer last asked this leader for something

	writes, reads        []*call // that wait
	own                  *proposal
	round                readRound // in flight, if it has a context
	confirmed            []readRound
	readWait             uint64 // ticks after which a round is asked for again
	sequence             uint64 // of the last proposal or round
	readBeat             uint64 // highest read context sent with a heartbeat in this term
	conds                []*condition
	doneCalls, doneBytes int     // of the calls that ended in this turn
	changeAt             uint64  // tick of a change of membership or of leadership in flight; 0: none
	pending              *store  // a snapshot's content between Step and Ready
	views                []*view // that snapshots are being sent from

	bornAt    uint64       // tick in which this life began
	claim     *claim       // the last that was made; claimed says whether it holds
	claimedAt uint64       // tick in which it was made, or was last wanted
	named     *naming      // the last hello of a cluster that meant this node; nil: none
	founding  []*kvpb.Node // of the Init that this node has made its cluster for, while it is not done

	count kvpb.MetricsResponse // the counters in it
}

func newNode(o options, self *kvpb.Node, log *slog.Logger) *node {
	n := &node{opts: o, limits: defaultRaftLimits(), self: self, log: log, store: newStore(), onPublish: func(*published) {}, onApply: func(*raftpb.Entry) {}}
	n.in.wake = newBell()
	n.now, n.clock = firstTick, firstTick
	n.written = newMeter(o.heartbeat)
	n.newLife()
	n.pub.Store(&published{})
	n.publish()
	return n
}

// newLife forgets everything. The raft ID was never used before: under its old
// one, a node without memory could vote twice.
func (n *node) newLife() {
	n.raftID, n.life = randomID(), randomID()
	n.rn, n.raft = nil, &raftLog{snapshot: n.snapshot}
	n.store.install(newStore())
	n.term, n.lead, n.role, n.campaignAt, n.deafTo, n.leaderless = 0, 0, raft.StateFollower, 0, 0, 0
	n.lag, n.sparedUntil = lag{mark: never}, 0
	n.lives, n.connected, n.heard = map[uint64]uint64{}, map[uint64]bool{}, map[uint64]uint64{}
	n.met, n.disownedBy, n.moved = map[uint64]*meeting{}, map[uint64]bool{}, map[uint64]*kvpb.Node{}
	n.refusals = map[uint64]string{}
	n.logBehind, n.learned = false, learnedCommit{}
	n.sights = map[uint64]*sight{}
	n.out, n.gone = nil, nil
	n.bornAt, n.claim, n.founding = n.now, nil, nil
	n.pace, n.catching = pace{}, map[uint64]*catchUp{}
}

// randomID returns a number that nobody has drawn before. Not 0, and below
// what raft keeps for itself.
func randomID() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return 1 + binary.BigEndian.Uint64(b[:])%(maxRaftID-1)
}

// open makes the node the member that its data directory holds, if that holds
// one. What it knows to be committed is applied when it returns.
func (n *node) open(d *disk) error {
	n.disk = d
	r, err := d.recover(n.self.Id)
	if err != nil {
		return err
	}
	if r == nil {
		n.log.Info("the data directory has nothing of a node in it: this node is new", "dir", d.dir)
		return nil
	}
	n.raftID = r.identity.RaftId
	n.sequence = r.batch.Boots << 40 // above all of earlier processes
	n.store.install(r.store)
	n.raft.reset(raftSnapshot(n.store.index, n.store.term, n.store.conf))
	var entries []*raftpb.Entry
	for _, e := range r.batch.Entries {
		entries = append(entries, raftEntry(e))
	}
	if err := n.raft.append(entries); err != nil {
		return err
	}
	n.mark, n.gone = r.store.index, r.store.removed
	n.logged = n.raft.bytes + sectorBytes*uint64(len(entries))
	h := r.batch.GetHardState()
	n.raft.hard = &raftpb.HardState{Term: new(h.GetTerm()), Vote: new(h.GetVote()), Commit: new(h.GetCommit())}
	if err := n.start(); err != nil {
		return err
	}
	if slices.Equal(confIDs(n.store.conf), []uint64{n.raftID}) {
		n.campaignAt = n.now + 1 // there is nobody to wait for
	}
	n.publish() // who it is, before it says hello
	n.configured()
	n.turn(input{})
	if m := n.store.members[n.raftID]; m != nil && m.Address != n.self.Address {
		n.log.Info("the members know this node by another address: it says hello to them from this one",
			"known", m.Address, "advertise", n.self.Address)
	}
	return n.err
}

// bootstrap makes this node a cluster of itself alone. Index 1, so that
// whoever joins gets a snapshot, and with it the cluster's id.
func (n *node) bootstrap() (clusterID uint64, err error) {
	if n.rn != nil {
		return 0, errInCluster
	}
	s := newStore()
	s.clusterID, s.index, s.term = randomID(), 1, 1
	s.configure(&raftpb.ConfState{Voters: []uint64{n.raftID}, AutoLeave: new(false)}, []*kvpb.Member{{RaftId: n.raftID, Node: n.self}})
	n.store.install(s)
	n.raft.reset(raftSnapshot(n.store.index, n.store.term, n.store.conf))
	n.raft.hard = &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(0)), Commit: new(uint64(1))}
	v := n.store.open()
	n.persist(diskJob{view: v, batch: &kvpb.LogBatch{HardState: wireHardState(n.raft.hard)}}, v.close)
	if err := n.start(); err != nil {
		return 0, err
	}
	n.configured()
	return n.store.clusterID, n.rn.Campaign()
}

// start makes the RawNode over what the log and the store hold.
func (n *node) start() (err error) {
	n.rn, err = raft.NewRawNode(&raft.Config{
		ID:                        n.raftID,
		ElectionTick:              int(n.electionTicks()),
		HeartbeatTick:             ticksPerHeartbeat,
		Storage:                   n.raft,
		Applied:                   n.store.index,
		AsyncStorageWrites:        true,
		MaxSizePerMsg:             n.limits.message,
		MaxCommittedSizePerReady:  n.limits.ready,
		MaxUncommittedEntriesSize: n.limits.uncommitted,
		MaxInflightMsgs:           n.limits.inflight,
		MaxInflightBytes:          n.limits.inflightBytes,
		CheckQuorum:               true, // a leader that is cut off steps down
		PreVote:                   true, // a node that was cut off does not disturb
		StepDownOnRemoval:         true,
		ReadOnlyOption:            raft.ReadOnlySafe, // no promise hangs on a clock
		Logger:                    &raftLogger{n.log},
	})
	return err
}

func (n *node) tickDuration() time.Duration { return n.opts.heartbeat / ticksPerHeartbeat }

func (n *node) ticksOf(d time.Duration) uint64 { return uint64(d / n.tickDuration()) }

func (n *node) electionTicks() uint64 { return n.ticksOf(n.opts.election) }

// run is the loop. It returns when ctx ends or the node cannot go on.
func (n *node) run(ctx context.Context) error {
	ticker := time.NewTicker(n.tickDuration())
	defer ticker.Stop()
	start, ticks := time.Now(), 0
	for n.err == nil {
		select {
		case <-ctx.Done():
			n.err = errStopping
			continue
		case <-ticker.C:
			ticks = 1
		case <-n.in.wake:
			runtime.Gosched() // let those who are about to queue something do so
		}
		in := n.in.take()
		in.clock, in.ticks, ticks = uint64(time.Since(start)/n.tickDuration()), ticks, 0
		n.turn(in)
	}
	n.in.close()
	n.rn = nil // raft may be broken: only what waits is left to be ended
	in := n.in.take()
	n.turn(input{calls: in.calls, events: in.events})
	n.failAll(n.err)
	if n.err == errStopping {
		return nil
	}
	return n.err
}

// turn takes input in and lets its effects out. Panics of raft become n.err.
func (n *node) turn(in input) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case raftPanic:
			n.err = fmt.Errorf("raft: %s", string(p))
		default:
			panic(p)
		}
	}()
	for _, f := range in.events {
		f()
	}
	for _, msg := range in.messages {
		n.receive(msg)
	}
	n.clock = max(n.clock, firstTick+in.clock)
	for range in.ticks {
		n.tick()
	}
	for _, c := range in.calls {
		n.enqueue(c)
	}
	n.drain()
	n.checkConditions()
	n.drain()
	n.flush(in.ticks > 0)
	n.publish()
}

// tick lets time pass, for raft and for whatever waits.
func (n *node) tick() {
	n.now++
	n.clock++
	n.expire()
	if n.rn == nil {
		return
	}
	n.rn.Tick()
	n.missLeader()
	n.commitLearned()
	if n.rn == nil || n.err != nil {
		return
	}
	// A learner never campaigns, so raft lets it keep a dead leader for ever.
	if n.lead != 0 && n.lead != n.raftID && n.now-n.leadHeard > 2*n.electionTicks() {
		_ = n.rn.ForgetLeader()
	}
	if n.now == n.campaignAt && n.lead == 0 && n.role == raft.StateFollower && n.isVoter(n.raftID) {
		_ = n.rn.Campaign()
	}
	if n.round.ctx != nil && n.now-n.round.tick > n.readWait {
		n.readWait = min(2*n.readWait, 8*n.electionTicks()) // or it is on its way still
		n.retryReads()                                      // the request or its answer was lost
	}
	if n.now%ticksPerHeartbeat != 0 {
		return
	}
	n.commitAt = [...]uint64{n.rn.BasicStatus().GetCommit(), n.commitAt[0], n.commitAt[1]}
	n.countUp()
	if n.role == raft.StateLeader {
		n.followMembers()
	}
	n.compactLog()
	if n.leads() && isJoint(n.store.conf) {
		n.leaveJoint()
	} else if n.mayChange() && !n.commitMove() {
		n.heal()
	}
}

// leads reports whether this node leads and has applied an entry of its term,
// so that its state is no older than any that was acknowledged.
func (n *node) leads() bool {
	return n.rn != nil && n.role == raft.StateLeader && n.store.term == n.term
}

// receive hands a peer's message to raft.
func (n *node) receive(in inbound) {
	m := in.m
	from := m.GetFrom()
	if !n.hears(in.hello) || from == n.deafTo && n.now < n.deafUntil {
		n.count.MessagesDropped++
		return
	}
	if n.rn == nil {
		n.called(in.hello)
		n.receiveUninitialized(m)
		return
	}
	if !n.check(m) {
		return
	}
	if n.store.members[from] != nil {
		n.heard[from] = n.now
	}
	if from == n.lead {
		n.leadHeard = n.now
	}
	if t := m.GetType(); t == raftpb.MsgProp || t == raftpb.MsgReadIndex {
		n.askedAt = n.now
	}
	if m.GetType() == raftpb.MsgReadIndex && !n.leads() && len(n.store.conf.GetVoters()) == 1 {
		return // raft would answer before it knows what is committed; who asked will ask again
	}
	if m.GetType() == raftpb.MsgProp && n.pace.limit != 0 {
		n.hold(m)
		return
	}
	n.learnCommit(m)
	n.step(m)
	switch m.GetType() {
	case raftpb.MsgHeartbeat:
		n.followHeartbeat(m)
	case raftpb.MsgPreVote:
		n.answerAlive(m)
	}
}

// followHeartbeat takes from a heartbeat of the leader what the leader adds to it.
func (n *node) followHeartbeat(m *raftpb.Message) {
	if m.GetFrom() != n.lead || m.GetTerm() != n.term {
		return
	}
	if m.GetIndex() != 0 {
		n.lag.follow(m.GetIndex(), n.store.index, n.now, n.electionTicks())
	}
	n.sparedUntil = 0
	if m.GetRejectHint() != 0 {
		n.sparedUntil = n.now + n.electionTicks()
	}
}

// addToHeartbeat adds to a leader's heartbeat what the follower wants to know besides:
// what is applied, if that is no less than was ever acknowledged, and whether the
// cluster can do without the follower. Raft does not look at these fields of a heartbeat.
func (n *node) addToHeartbeat(m *raftpb.Message) {
	if !n.leads() {
		return
	}
	m.Index = new(n.store.index)
	if n.canSpare(m.GetTo()) {
		m.RejectHint = new(uint64(1))
	}
}

// answerAlive tells a node that calls for votes that this one is there. Raft says
// nothing to such a call while it hears a leader; the caller, which may be cut off from
// that one alone, would take this node for dead. To raft the answer means nothing: the
// caller does not lead in its present term.
func (n *node) answerAlive(m *raftpb.Message) {
	if n.lead == 0 || m.GetTerm() <= 1 {
		return
	}
	n.send(&raftpb.Message{Type: raftpb.MsgHeartbeatResp.Enum(), From: &n.raftID, To: m.From, Term: new(m.GetTerm() - 1)})
}

// step gives a peer's message to raft.
func (n *node) step(m *raftpb.Message) {
	n.logBehind = n.logBehind || m.GetType() == raftpb.MsgApp
	if err := n.rn.Step(m); err != nil && !errors.Is(err, raft.ErrProposalDropped) {
		n.log.Debug("raft refused a message", "type", m.GetType(), "from", m.GetFrom(), "err", err)
	}
	n.syncSoftState()
}

// drainedLog returns the log as raft itself has it, or nil if the node has broken.
// Whoever looks at the log between two Readys has to look here: n.raft can still
// hold entries that raft has replaced.
func (n *node) drainedLog() *raftLog {
	if n.logBehind {
		n.drain()
	}
	if n.rn == nil || n.err != nil {
		return nil
	}
	return n.raft
}

// receiveUninitialized answers a leader as raft with an empty log would: it
// matches nothing. The leader then sends a snapshot.
func (n *node) receiveUninitialized(m *raftpb.Message) {
	resp := &raftpb.Message{To: m.From, From: new(n.raftID), Term: m.Term}
	switch m.GetType() {
	case raftpb.MsgApp:
		resp.Type, resp.Index, resp.Reject = raftpb.MsgAppResp.Enum(), m.Index, new(true)
	case raftpb.MsgHeartbeat:
		resp.Type = raftpb.MsgHeartbeatResp.Enum()
	default:
		return
	}
	n.send(resp)
}

// learnedCommit is an entry that a peer knows to be committed.
type learnedCommit struct {
	index, term uint64
	from        uint64 // raft ID of the peer; 0: nothing was learned
	tick        uint64 // in which it was learned
}

// learnCommit remembers what the sender of an answer to a call for votes knows to
// be committed. A node without a leader can need that: if it has forgotten, or never
// heard, that a change of membership is committed, it asks for votes by the old
// configuration, perhaps of nodes that have left for good, or of learners whose log
// is longer.
func (n *node) learnCommit(m *raftpb.Message) {
	if t := m.GetType(); t != raftpb.MsgVoteResp && t != raftpb.MsgPreVoteResp {
		return
	}
	if m.GetCommit() > max(n.learned.index, n.rn.BasicStatus().GetCommit()) {
		n.learned = learnedCommit{index: m.GetCommit(), term: m.GetLogTerm(), from: m.GetFrom(), tick: n.now}
	}
}

// commitLearned has raft commit what was learned, once that cannot cost this node an
// election that it would win: it has lost its campaign, or has waited for half an
// election timeout. Then it calls for votes again, by the configuration that it
// knows now. Raft takes commits from a leader only; so here is one, for no longer
// than the call.
func (n *node) commitLearned() {
	l := n.learned
	if l.from == 0 {
		return
	}
	if n.lead != 0 || n.role == raft.StateLeader {
		n.learned = learnedCommit{} // a leader commits it
		return
	}
	campaigns := n.role != raft.StateFollower
	if campaigns && n.now-l.tick < n.electionTicks()/2 {
		return
	}
	n.learned = learnedCommit{}
	log := n.drainedLog()
	if log == nil || n.lead != 0 {
		return
	}
	st := n.rn.BasicStatus()
	term, err := log.Term(l.index)
	if err != nil || term != l.term || l.index <= st.GetCommit() {
		return // equal entries have equal ones before them (Raft paper, section 5.3)
	}
	_ = n.rn.Step(&raftpb.Message{
		Type: raftpb.MsgHeartbeat.Enum(), From: &l.from, To: &n.raftID,
		Term: new(st.GetTerm()), Commit: &l.index,
	})
	_ = n.rn.ForgetLeader()
	n.drain() // the configuration may be another one now
	if campaigns && n.rn != nil && n.err == nil && n.isVoter(n.raftID) {
		_ = n.rn.Campaign()
	}
}

// check guards raft against a peer's message.
func (n *node) check(m *raftpb.Message) bool {
	if n.mustDrainFor(m) {
		n.drain()
	}
	if n.rn == nil || n.err != nil {
		return false
	}
	err := n.checkDrained(m)
	if err != nil && n.rn.HasReady() { // n.role and the end of the log are not raft's own then
		n.drain()
		if n.rn == nil || n.err != nil {
			return false
		}
		err = n.checkDrained(m)
	}
	if errors.Is(err, errContradiction) {
		n.err = fmt.Errorf("stopped by a message of %s: %w. "+
			"Here the term is %d, the log ends at entry %d, and what is committed at %d. %s",
			n.locate(m.GetFrom()), err, n.term, n.raft.last(), n.rn.BasicStatus().GetCommit(), whichIsWrong)
	} else if err != nil {
		n.count.MessagesDropped++
		n.log.Debug("dropped a message", "type", m.GetType(), "from", n.describe(m.GetFrom()), "err", err)
	}
	return err == nil
}

// mustDrainFor reports whether a message can be checked only against a log and a
// role that are raft's own.
func (n *node) mustDrainFor(m *raftpb.Message) bool {
	switch m.GetType() {
	case raftpb.MsgProp:
		return true
	case raftpb.MsgTimeoutNow:
		return true // raft ignores it while it has a change of membership to apply
	case raftpb.MsgApp:
		// Entries after the last committed one cannot contradict it.
		return n.logBehind && m.GetIndex() <= n.rn.BasicStatus().GetCommit()
	case raftpb.MsgHeartbeat:
		return n.logBehind || m.GetCommit() > n.store.index
	case raftpb.MsgAppResp:
		return n.logBehind
	}
	return false
}

func (n *node) checkDrained(m *raftpb.Message) error {
	st := n.rn.BasicStatus()
	c := &peerCheck{
		term: st.GetTerm(), commit: st.GetCommit(), log: n.raft,
		leading: n.role == raft.StateLeader, lead: n.lead, readBeat: n.readBeat,
	}
	return c.check(m)
}

// drain proposes, asks, and handles Readys until there is nothing left to do.
func (n *node) drain() {
	for n.rn != nil && n.err == nil {
		n.proposeHeld()
		n.propose()
		n.askRead()
		if !n.rn.HasReady() {
			n.logBehind = false
			return
		}
		rd := n.rn.Ready()
		n.logBehind = false // ready appends before it asks the log for anything
		n.ready(rd)
	}
}

// ready handles a Ready. With AsyncStorageWrites, all of it is messages: to
// peers, to be sent at once; to the log, whose answers wait until it has
// written; and to the state machine.
//
// Raft lets a call for votes go at once, too, and its candidate can win by the
// votes of others before its own is durable. Without power then, it would lead
// the same term again, with other entries. So the call waits for the log (Raft
// thesis, section 3.8).
func (n *node) ready(rd raft.Ready) {
	n.syncSoftState()
	for _, rs := range rd.ReadStates {
		n.readConfirmed(rs)
	}
	var votes []*raftpb.Message // called for; the term and this node's own vote are in the append that follows
	for _, m := range rd.Messages {
		switch to := m.GetTo(); {
		case m.GetType() == raftpb.MsgVote:
			votes = append(votes, m)
		case to == raft.LocalAppendThread:
			m.Responses = append(votes, m.GetResponses()...)
			n.append(m)
		case to == raft.LocalApplyThread:
			n.flush(false) // somebody waits for the answer to an append
			n.apply(m)
		default:
			n.send(m)
		}
		if n.rn == nil || n.err != nil {
			return // removed, or broken
		}
	}
}

// syncSoftState follows raft's term, role and leader. What hung on the old
// ones is asked for again.
func (n *node) syncSoftState() {
	st := n.rn.BasicStatus()
	if st.GetTerm() != n.term || st.Lead != n.lead {
		n.changeAt, n.readBeat = 0, 0
		n.lag, n.sparedUntil = lag{mark: never, since: n.now}, 0
		n.leadHeard, n.readWait = n.now, n.electionTicks()/2
		n.askedAt = n.now                                  // peers may wait for what they asked of the leader before
		n.pace, n.catching = pace{}, map[uint64]*catchUp{} // what is held will be proposed again
		n.askAgain()
		if st.Lead != 0 {
			n.count.LeaderChanges++
		}
	}
	n.term, n.lead, n.role = st.GetTerm(), st.Lead, st.RaftState
}

// send queues a message of raft for the end of the turn.
func (n *node) send(m *raftpb.Message) {
	switch m.GetType() {
	case raftpb.MsgSnap:
		n.sendSnapshot(m)
		return
	case raftpb.MsgHeartbeat:
		if len(m.GetContext()) == 8 {
			n.readBeat = max(n.readBeat, binary.LittleEndian.Uint64(m.GetContext()))
		}
		n.addToHeartbeat(m)
	case raftpb.MsgVoteResp, raftpb.MsgPreVoteResp: // with what learnCommit wants
		n.tellCommit(m)
	}
	to, life := m.GetTo(), n.lives[m.GetTo()]
	for i := range n.out {
		if o := &n.out[i]; o.to == to && o.life == life {
			if last := len(o.ms) - 1; covers(m, o.ms[last]) {
				o.ms = o.ms[:last]
			}
			o.ms = append(o.ms, m)
			return
		}
	}
	n.out = append(n.out, peerMessages{to, life, []*raftpb.Message{m}})
}

// tellCommit adds to a message the last entry that this node knows to be committed.
func (n *node) tellCommit(m *raftpb.Message) {
	log := n.drainedLog()
	if log == nil {
		return
	}
	commit := n.rn.BasicStatus().GetCommit()
	if term, err := log.Term(commit); err == nil {
		m.Commit, m.LogTerm = &commit, &term
	}
}

// covers reports whether a message says all that the one before it says: a
// later answer to an append, or an append from the same place in the log.
func covers(m, before *raftpb.Message) bool {
	if m.GetType() != before.GetType() || m.GetTerm() != before.GetTerm() || m.GetReject() || before.GetReject() {
		return false
	}
	switch m.GetType() {
	case raftpb.MsgAppResp:
		return m.GetIndex() >= before.GetIndex()
	case raftpb.MsgApp:
		return len(before.GetEntries()) == 0 && m.GetIndex() == before.GetIndex() && m.GetCommit() >= before.GetCommit()
	}
	return false
}

// mayWait reports whether messages say only what is committed: the next append
// says so, too, or else they go with the next tick. That halves the messages of
// a single client. But a peer that has asked for something waits for them.
func (n *node) mayWait(ms []*raftpb.Message) bool {
	return len(ms) == 1 && ms[0].GetType() == raftpb.MsgApp && len(ms[0].GetEntries()) == 0 && n.now-n.askedAt > n.electionTicks()
}

// flush gives each peer its messages, all of them or all that cannot wait.
func (n *node) flush(all bool) {
	out := n.out
	n.out = nil
	for _, o := range out {
		if !all && n.mayWait(o.ms) {
			n.out = append(n.out, o)
		} else {
			n.net.send(o.to, o.life, o.ms)
		}
	}
	n.closeViews()
	n.in.release(n.doneCalls, n.doneBytes)
	n.doneCalls, n.doneBytes = 0, 0
}

// append stores entries, a snapshot and the hard state, and releases the
// answers that depend on them only once all of that is durable.
func (n *node) append(m *raftpb.Message) {
	batch := &kvpb.LogBatch{}
	snap := m.GetSnapshot()
	if !raft.IsEmptySnap(snap) {
		if n.installPending(snap); n.err != nil {
			return
		}
		batch.Snapshot = &kvpb.SnapshotMark{Index: n.store.index, Term: n.store.term, File: n.store.file}
		batch.Discards = true
	}
	if err := n.raft.append(m.GetEntries()); err != nil {
		n.err = err
		return
	}
	for _, e := range m.GetEntries() {
		n.written.add(n.beat(), memoryBytes(e))
	}
	old := n.raft.hard
	if m.Term != nil {
		n.raft.hard = &raftpb.HardState{Term: m.Term, Vote: m.Vote, Commit: m.Commit}
	}
	promises := batch.Discards || raft.MustSync(n.raft.hard, old, len(m.GetEntries()))
	if n.disk == nil || !promises && n.queued == 0 {
		n.respond(m.GetResponses(), nil) // what is committed, others know too
		return
	}
	if promises {
		batch.HardState = wireHardState(n.raft.hard)
	}
	for _, e := range m.GetEntries() {
		batch.Entries = append(batch.Entries, wireEntry(e))
	}
	n.logged += uint64(sectors(headerBytes + proto.Size(batch)))
	if n.saving != 0 && n.logged > 2*n.opts.logBytes {
		n.disk.hurry() // it rests no more
	}
	if n.saving != 0 && n.logged > 4*n.opts.logBytes {
		n.disk.hold(true) // until the snapshot is there
	}
	responses, lives := m.GetResponses(), n.lives
	n.persist(diskJob{batch: batch}, func() { n.respond(responses, lives) })
}

// persist has the disk do a job and then calls done, in the loop. The first one
// makes the directory this node's. Who has been removed by now is durable by
// then, for each removal is followed by a job that makes it so. A snapshot that is
// named takes the place of those before it.
func (n *node) persist(j diskJob, done func()) {
	removed, mark := n.store.removed, j.batch.Snapshot
	if n.disk == nil {
		done()
		return
	}
	if n.mark == 0 {
		n.mark = n.store.index
		j.identity = &kvpb.Identity{Format: identityFormat, ClusterId: n.store.clusterID, NodeId: n.self.Id, RaftId: n.raftID, LogId: randomID()}
	}
	j.done = func(err error) {
		n.in.event(func() {
			n.queued--
			if err != nil {
				n.diskFailed(err)
				return
			}
			n.gone = removed
			done()
			if mark != nil {
				n.removeBefore(mark)
			}
		})
	}
	n.queued++
	n.disk.enqueue(j)
}

// diskFailed ends the node: what is on the disk nobody knows.
func (n *node) diskFailed(err error) {
	n.disk.failed.Store(true)
	n.err = fmt.Errorf("%w: writing to the data directory: %w", errStopping, err)
}

// respond lets answers go, but not to another life than they are for, which lives
// tells if they had to wait: it may count on what this node promised to the one
// before.
func (n *node) respond(responses []*raftpb.Message, lives map[uint64]uint64) {
	for _, r := range responses {
		if n.rn == nil {
			return
		}
		if r.GetTo() != n.raftID {
			if lives == nil || lives[r.GetTo()] == n.lives[r.GetTo()] {
				n.send(r)
			}
		} else if err := n.rn.Step(r); err != nil && !errors.Is(err, raft.ErrStepPeerNotFound) { // removed meanwhile
			n.err = fmt.Errorf("raft: %w", err)
		}
	}
}

// apply applies committed entries and completes what waited for them.
func (n *node) apply(m *raftpb.Message) {
	conf := n.store.conf
	for _, e := range m.GetEntries() {
		if err := n.applyEntry(e); err != nil {
			n.err = fmt.Errorf("applying entry %d: %w", e.GetIndex(), err)
			return
		}
	}
	n.count.EntriesApplied += uint64(len(m.GetEntries()))
	n.respond(m.GetResponses(), nil)
	n.releaseReads()
	n.compact()
	if conf != n.store.conf && n.leads() && isJoint(n.store.conf) {
		n.leaveJoint()
	}
}

func (n *node) applyEntry(e *raftpb.Entry) error {
	s := n.store
	if e.GetIndex() != s.index+1 {
		return fmt.Errorf("the last one applied was %d", s.index)
	}
	s.index, s.term = e.GetIndex(), e.GetTerm()
	n.onApply(e)
	if e.GetType() != raftpb.EntryNormal {
		return n.applyConfChange(e)
	}
	before := s.version
	proposer, sequence, results, err := s.apply(e.GetData())
	if err != nil {
		return err
	}
	n.count.WritesApplied += s.version - before
	if p := n.own; p != nil && proposer == n.raftID && sequence == p.sequence {
		for i := range min(len(results), len(p.calls)) {
			n.finish(p.calls[i], results[i])
		}
		n.failOwn() // whatever has no result: it was applied before, and its results are gone
	}
	return nil
}

// applyConfChange makes a committed change of membership the configuration. A
// change that does not fit the configuration is skipped, on every node alike.
func (n *node) applyConfChange(e *raftpb.Entry) error {
	cc, ctx, err := decodeConfChange(e)
	if err != nil {
		return err
	}
	if conf, err := n.store.checkConfChange(cc, ctx); err != nil {
		n.log.Info("skipped a change of membership", "index", e.GetIndex(), "err", err)
	} else {
		n.store.configure(conf, ctx.Members) // first: raft may want a snapshot at once
		n.rn.ApplyConfChange(cc)
		n.configured()
		n.persist(diskJob{batch: &kvpb.LogBatch{HardState: wireHardState(n.raft.hard)}}, func() {}) // it is committed: now the removed may be told
	}
	n.changeAt = 0
	return nil
}

// configured tells the network and the log of a new configuration.
func (n *node) configured() {
	n.lives = maps.Clone(n.lives)
	for _, id := range n.store.removed {
		delete(n.lives, id) // never to be heard again
		delete(n.met, id)
		delete(n.heard, id)
		delete(n.sights, id)
		delete(n.moved, id)
		delete(n.refusals, id)
	}
	n.endFounding()
	n.net.setMembers(n.store.clusterID, n.raftID, n.store.members, n.store.removed)
	n.log.Info("membership", "index", n.store.index, "joint", isJoint(n.store.conf), "members", describeMembers(n.store.conf, n.store.members))
}

// compact keeps the log's size in bounds, on disk too.
func (n *node) compact() {
	if n.disk != nil && n.saving == 0 && n.logged > n.opts.logBytes {
		n.save()
	}
	n.compactLog()
}

// raftPanic is what raft panics with when its state contradicts itself.
type raftPanic string

// raftLogger writes raft's log to ours. What raft says of each election and
// message is for debugging.
type raftLogger struct{ log *slog.Logger }

func (l *raftLogger) printf(level slog.Level, format string, v []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "raft: "+fmt.Sprintf(format, v...))
	}
}

func (l *raftLogger) Debug(v ...any)              { l.Debugf("%s", fmt.Sprint(v...)) }
func (l *raftLogger) Debugf(f string, v ...any)   { l.printf(slog.LevelDebug, f, v) }
func (l *raftLogger) Info(v ...any)               { l.Infof("%s", fmt.Sprint(v...)) }
func (l *raftLogger) Infof(f string, v ...any)    { l.printf(slog.LevelDebug, f, v) }
func (l *raftLogger) Warning(v ...any)            { l.Warningf("%s", fmt.Sprint(v...)) }
func (l *raftLogger) Warningf(f string, v ...any) { l.printf(slog.LevelWarn, f, v) }
func (l *raftLogger) Error(v ...any)              { l.Errorf("%s", fmt.Sprint(v...)) }
func (l *raftLogger) Errorf(f string, v ...any)   { l.printf(slog.LevelError, f, v) }
func (l *raftLogger) Fatal(v ...any)              { l.Panic(v...) }
func (l *raftLogger) Fatalf(f string, v ...any)   { l.Panicf(f, v...) }
func (l *raftLogger) Panic(v ...any)              { panic(raftPanic(fmt.Sprint(v...))) }
func (l *raftLogger) Panicf(f string, v ...any)   { panic(raftPanic(fmt.Sprintf(f, v...))) }
