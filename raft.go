// The Ready loop: every duty that etcd's raft leaves to its caller, in this order.
//
//   - Start it from what is durable, under a raft ID that was never used by a node
//     that forgot: open, bootstrap, start.
//   - Let time pass: tick; and call an election when the leader is gone: election.go.
//   - Give it what peers send, but nothing that it would panic over: receive, check.go.
//   - Give it writes, again if they got lost, and ask it for reads: calls.go.
//   - Take each Ready, and follow term, leader and role: ready, syncSoftState.
//   - Send its messages: outbox.go; and say which did not get there: peers.go.
//   - Store entries and votes before anything that depends on them leaves: append,
//     respond, durable.go.
//   - Apply what is committed, in order and once; a change of membership is
//     raft's to know, too: apply.
//   - Keep the log short: compact; but not too short for who catches up: catchup.go.
//   - Send snapshots to whom it is too short for, say how that went, and install those
//     that come: snapshots.go.
//
// A turn of the loop takes what is in the inbox (calls.go), lets raft and the parts of
// the node work on it, and lets the effects out.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

const (
	// ticksPerHeartbeat makes a tick short enough that election timeouts differ.
	ticksPerHeartbeat = 5
	// maxEntryBytes bounds the writes that share an entry, but a single larger one.
	maxEntryBytes = 1 << 20
	// maxQueuedCalls and maxQueuedBytes bound the calls that have not ended, and their writes;
	// with little memory, the budget has less for them.
	maxQueuedCalls = 64 << 10
	maxQueuedBytes = 64 << 20
	// maxInboundBytes bounds what peers sent and the loop has not seen.
	maxInboundBytes = 16 << 20
	// leaderWait is how long there may be no leader before calls that need one end. A call
	// that comes later ends with the next tick.
	leaderWait = 2 * time.Second
	// maxVersionWait bounds the wait for a version that may never come, if it has no deadline.
	maxVersionWait = time.Minute
)

const (
	// never is a tick, and an index, that does not come.
	never = math.MaxUint64
	// firstTick is where a node's clock starts. A field that is 0 says "never": because
	// the clock starts so high, that was longer ago than anything waits.
	firstTick = 1 << 32
)

// transport is what the loop needs of the network. Nothing in it blocks.
type transport interface {
	// send queues messages for a peer and drops them if its stream is down or full.
	send(to uint64, ms []*raftpb.Message)
	// sendSnapshot sends a view in the background, and calls this node's
	// snapshotSent when that has ended.
	sendSnapshot(to, term uint64, v *view)
	// setMembers says whom to keep a stream to, by raft ID, and whom never to
	// hear again.
	setMembers(clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64)
	// setLevel says which level peers have to speak from now on.
	setLevel(level uint32)
	// tellRooms tells all peers what is new of who has how much room, and each whose
	// stream begins later all of it.
	tellRooms(all, news []*kvpb.RoomReport)
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

// node is one member: the RawNode, the order of a turn, and the parts that a turn asks.
// All of it is the loop's, but for what says otherwise: turn, the loop's body, needs no
// goroutine, clock or socket.
type node struct {
	opts   options      // constant, once raft has started
	self   *kvpb.Node   // constant
	logger *slog.Logger // constant
	net    transport    // constant
	inbox  inbox        // any goroutine

	id    identity
	rn    *raft.RawNode // nil: in no cluster
	raft  raftState
	log   *raftLog // raft's Storage; it may lag raft between two Readys: see stale, drainedLog
	store *store   // the loop writes, others get
	clock clock
	err   error // why the loop must end

	calls     callsInFlight
	peers     peerStates
	election  election
	change    membershipChange
	claims    claims
	durable   durable
	snapshots snapshotsInFlight
	level     levelReports
	catchup   catchup
	health    nodeHealth
	quota     quota
	outbox    outbox
	status    nodeStatus
	slowTurns slowLog // those of run
	turns     turnCounts
}

// identity is what tells one memory of a node from another.
type identity struct {
	raftID uint64 // new whenever the node has lost its memory
	life   uint64 // new whenever raftID is, and in every process
}

// raftState is what raft said last of its term, its leader and its role.
type raftState struct {
	term uint64
	lead uint64 // raft ID; 0: unknown
	role raft.StateType
}

// clock counts ticks since the start, and firstTick.
type clock struct {
	now  uint64 // the ticks that the loop has made
	wall uint64 // now, and the ticks that a busy loop has missed: what callers wait by
}

func newNode(o options, self *kvpb.Node, logger *slog.Logger) *node {
	n := &node{opts: o, self: self, logger: logger, store: newStore()}
	n.opts.limits = defaultRaftLimits()
	n.store.history.limit = o.watchBytes
	n.store.speaks = o.level
	n.store.viewBytes = cmp.Or(o.viewBytes, minViewBytes)
	n.opts.limits.uncommitted = cmp.Or(o.queuedBytes, n.opts.limits.uncommitted)
	n.inbox.queuedBytes = int(cmp.Or(o.queuedBytes, maxQueuedBytes))
	n.inbox.queuedCalls = o.part(maxQueuedCalls, 2*maxPipelineCalls)
	if n.opts.onApply == nil {
		n.opts.onApply = func(*raftpb.Entry) {}
	}
	if n.opts.onPropose == nil {
		n.opts.onPropose = func(uint64, []byte) {}
	}
	n.status.onChange = func(*published) {}
	n.quota = newQuota(o.maxStoreBytes)
	n.inbox.wake = newBell()
	n.clock = clock{now: firstTick, wall: firstTick}
	n.catchup.written = newMeter(o.heartbeat)
	n.turns = newTurnCounts()
	n.claims = newClaims(self, o.plan, n.ticksOf(claimTime), n.ticksOf(n.redialTime()))
	n.newLife()
	n.status.latest.Store(&published{glance: glance{level: firstLevel}})
	n.publish()
	return n
}

// newLife forgets all that the node knew as a member, and gives it a new raft ID. Calls
// that wait are the caller's to end (endRemoved). The raft ID was never used before: under its old
// one, a node without memory could vote twice.
func (n *node) newLife() {
	n.id = identity{raftID: randomID(), life: randomID()}
	n.rn = nil
	n.raft = raftState{}
	n.log = &raftLog{snapshot: n.snapshot}
	n.store.install(newStore())
	n.peers = newPeerStates()
	n.level = newLevelReports()
	n.election = election{}
	n.change.forget()
	n.claims.forget(n.clock.now)
	n.durable.removed = nil
	n.catchup.forget()
	n.health.forgetLeader(0)
	n.quota.forget()
	n.outbox.messages = nil
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
	n.durable.disk = d
	n.durable.counts.Store(&d.counts)
	d.speaks = n.opts.level
	r, err := d.recover(n.self.Id)
	if err != nil {
		return unlessOfSystem(err)
	}
	if r == nil {
		n.logger.Info("the data directory has nothing of a node in it: this node is new", "dir", d.dir)
		return nil
	}
	if err := n.restore(r); err != nil {
		return unlessOfSystem(err)
	}
	if err := n.start(); err != nil {
		return unlessOfSystem(err)
	}
	if slices.Equal(confIDs(n.store.conf), []uint64{n.id.raftID}) {
		n.election.campaignAt = n.clock.now + 1 // there is nobody to wait for
	}
	n.publish() // who it is, before it says hello
	n.configured()
	n.turn(input{})
	m := n.store.members[n.id.raftID]
	if m != nil && m.Address != n.self.Address {
		n.logger.Info("the members know this node by another address: it says hello to them from this one",
			"known", m.Address, "advertise", n.self.Address)
	}
	if n.err != nil {
		return unlessOfSystem(n.err) // nothing has come in yet but what the directory holds
	}
	return nil
}

// restore takes in what a data directory holds.
func (n *node) restore(r *recovered) error {
	n.id.raftID = r.identity.RaftId
	n.calls.sequence = r.batch.Boots << 40 // above all of earlier processes
	n.store.install(r.store)
	n.log.reset(raftSnapshot(n.store.index, n.store.term, n.store.conf))
	var entries []*raftpb.Entry
	for _, e := range r.batch.Entries {
		entries = append(entries, raftEntry(e))
	}
	if err := n.log.append(entries); err != nil {
		return err
	}
	h := r.batch.GetHardState()
	n.log.hard = &raftpb.HardState{Term: new(h.GetTerm()), Vote: new(h.GetVote()), Commit: new(h.GetCommit())}
	n.durable.snapshotIndex = r.store.index
	n.durable.lastBytes = n.store.snapshotLength()
	n.durable.removed = r.store.removed
	n.durable.logged = n.log.bytes + sectorBytes*uint64(len(entries))
	return nil
}

// bootstrap makes this node a cluster of itself alone, for an Init of these members. Index 1,
// so that whoever joins gets a snapshot, and with it the cluster's id.
func (n *node) bootstrap(members []*kvpb.Node) (clusterID uint64, err error) {
	if n.rn != nil {
		return 0, errInCluster
	}
	s := newStore()
	s.clusterID = randomID()
	s.founding = members
	s.index = 1
	s.term = 1
	conf := &raftpb.ConfState{Voters: []uint64{n.id.raftID}, AutoLeave: new(false)}
	s.configure(conf, []*kvpb.Member{{RaftId: n.id.raftID, Node: n.self}})
	n.store.install(s)
	n.log.reset(raftSnapshot(n.store.index, n.store.term, n.store.conf))
	n.log.hard = &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(0)), Commit: new(uint64(1))}
	v := n.store.openView()
	n.persist(diskJob{view: v, batch: &kvpb.LogBatch{HardState: wireHardState(n.log.hard)}}, v.close)
	if err := n.start(); err != nil {
		return 0, err
	}
	n.configured()
	return n.store.clusterID, n.rn.Campaign()
}

// start makes the RawNode over what the log and the store hold.
func (n *node) start() (err error) {
	n.rn, err = raft.NewRawNode(&raft.Config{
		ID:                        n.id.raftID,
		ElectionTick:              int(n.electionTicks()),
		HeartbeatTick:             ticksPerHeartbeat,
		Storage:                   n.log,
		Applied:                   n.store.index,
		AsyncStorageWrites:        true,
		MaxSizePerMsg:             n.opts.limits.message,
		MaxCommittedSizePerReady:  n.opts.limits.ready,
		MaxUncommittedEntriesSize: n.opts.limits.uncommitted,
		MaxInflightMsgs:           n.opts.limits.inflight,
		MaxInflightBytes:          n.opts.limits.inflightBytes,
		CheckQuorum:               true, // a leader that is cut off steps down
		PreVote:                   true, // a node that was cut off does not disturb
		StepDownOnRemoval:         true,
		ReadOnlyOption:            raft.ReadOnlySafe, // no promise hangs on a clock
		Logger:                    &raftLogger{n.logger},
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
	start := time.Now()
	n.status.started.Store(true)
	for n.err == nil {
		ticks := 0
		select {
		case <-ctx.Done():
			n.err = errStopping
			continue
		case <-ticker.C:
			ticks = 1
		case <-n.inbox.wake:
			runtime.Gosched() // let those who are about to queue something do so
		}
		in := n.inbox.take()
		in.ticks = ticks
		begun := time.Now()
		in.elapsed = uint64(begun.Sub(start) / n.tickDuration())
		n.turn(in)
		took := time.Since(begun)
		n.turns.seconds.observeTime(took)
		n.noteSlowTurn(&in, took)
	}
	n.end()
	if n.err == errStopping {
		return nil
	}
	return n.err
}

// end ends all that waits. Raft may be broken: nothing more is asked of it.
func (n *node) end() {
	n.inbox.close(n.err)
	n.rn = nil
	in := n.inbox.take()
	n.turn(input{calls: in.calls, events: in.events})
	n.calls.failAll(n.err)
}

// turn takes input in and lets its effects out.
func (n *node) turn(in input) {
	defer func() {
		n.endOnPanic(recover(), in)
	}()

	// What came in, in this order: a stream's begin is an event, and comes before the
	// stream's messages.
	for len(in.events) > 0 {
		f := in.events[0]
		in.events = in.events[1:]
		f()
	}
	for _, msg := range in.messages {
		n.receive(msg)
	}
	// elapsed has this turn's tick in it: so wall is up to a tick ahead of the time, and never more.
	n.clock.wall = max(n.clock.wall, firstTick+in.elapsed)
	for range in.ticks {
		n.tick()
	}
	for _, c := range in.calls {
		if c.minVersion > 0 && c.wait == 0 {
			c.wait = n.ticksOf(maxVersionWait)
		}
		n.calls.add(c, n.clock.wall)
	}
	in.calls = nil
	n.calls.releaseVersion(n.store.version) // some may wait for what is applied

	// What follows from it.
	n.drain()
	if n.err == nil { // a broken node has nothing to say: end ends what waits
		n.calls.pollRequests()
		n.leaveJoint()
	}
	n.drain() // what the requests and leaveJoint have proposed

	// What goes out; with a tick, what can wait for one, too.
	if n.err == nil {
		n.tellRooms()
	}
	n.flush(in.ticks > 0)
	n.publish()
}

// endOnPanic makes a panic of raft the node's error; any other goes on. What waits in the
// rest of the turn's input goes back to the inbox, where end finds it.
func (n *node) endOnPanic(p any, rest input) {
	if p == nil {
		return
	}
	cause, ok := p.(raftPanic)
	if !ok {
		panic(p)
	}
	n.err = fmt.Errorf("raft: %s", string(cause))
	n.inbox.giveBack(rest)
}

// fail ends the node, if it does not end anyway. Who was told to stop does not end with what it
// hears in its last turn.
func (n *node) fail(err error) {
	if n.err == nil {
		n.err = err
	}
}

// isRunning reports whether there is a RawNode, which has not broken.
func (n *node) isRunning() bool { return n.rn != nil && n.err == nil }

// tick lets time pass, for raft and for whatever waits.
func (n *node) tick() {
	n.clock.now++
	n.clock.wall++
	n.expireCalls()
	if n.rn == nil {
		return
	}
	n.rn.Tick()
	n.countLeaderless()
	n.commitLearned()
	if !n.isRunning() {
		return
	}
	n.forgetSilentLeader()
	n.campaignInTurn()
	n.calls.retryLateReads(n.clock.now, 8*n.electionTicks())
	if n.clock.now%ticksPerHeartbeat == 0 {
		n.heartbeat()
	}
}

// heartbeat is what a node does as often as a leader sends heartbeats.
func (n *node) heartbeat() {
	n.catchup.noteCommit(n.rn.BasicStatus().GetCommit())
	n.health.countReady(n.leaderState())
	n.weighSpace()
	n.weighRooms()
	if n.raft.role == raft.StateLeader {
		n.followMembers()
	}
	n.compactLog()
	if n.mayChange() && !n.proposeMove() {
		n.raiseLevel()
		n.heal()
	}
	if n.mayChange() {
		n.promoteJoiner()
	}
}

// leads reports whether this node leads and has applied an entry of its term,
// so that its state is no older than any that was acknowledged.
func (n *node) leads() bool {
	return n.rn != nil && n.raft.role == raft.StateLeader && n.store.term == n.raft.term
}

// receive hands a peer's message to raft, if raft may see it.
func (n *node) receive(in inbound) {
	m := in.m
	if !n.hears(in.hello) || n.isDeafTo(m.GetFrom()) {
		n.status.count.MessagesDropped++
		return
	}
	if n.rn == nil {
		n.claims.noteForeign(in.hello, n.clock.now)
		n.receiveUninitialized(m)
		return
	}
	if !n.admits(m) {
		return
	}
	n.noteHeard(m)
	if n.holdBack(m) {
		return
	}
	n.learnCommit(m)
	n.stepRaft(m)
	switch m.GetType() {
	case raftpb.MsgHeartbeat:
		n.followHeartbeat(m)
	case raftpb.MsgPreVote:
		n.answerAlive(m)
	}
}

// noteHeard notes who has sent a message, and when.
func (n *node) noteHeard(m *raftpb.Message) {
	from := m.GetFrom()
	if n.store.members[from] != nil {
		n.peers.heard[from] = n.clock.now
	}
	if from == n.raft.lead {
		n.election.leadHeard = n.clock.now
	}
	asks := m.GetType() == raftpb.MsgProp || m.GetType() == raftpb.MsgReadIndex
	if asks {
		n.outbox.askedAt = n.clock.now
	}
}

// holdBack keeps a message from raft that raft may not see now; false: it may. A
// proposal is held, and a question for a read is dropped: who asked will ask again.
func (n *node) holdBack(m *raftpb.Message) bool {
	switch m.GetType() {
	case raftpb.MsgReadIndex:
		// The only voter would answer before it knows what is committed.
		return !n.leads() && len(n.store.conf.GetVoters()) == 1
	case raftpb.MsgProp:
		if n.catchup.pace.isSlow() {
			n.catchup.pace.hold(m)
			return true
		}
	}
	return false
}

// stepRaft gives a peer's message to raft.
func (n *node) stepRaft(m *raftpb.Message) {
	n.log.stale = n.log.stale || m.GetType() == raftpb.MsgApp
	if err := n.rn.Step(m); err != nil && !errors.Is(err, raft.ErrProposalDropped) {
		n.logger.Debug("raft refused a message", "type", m.GetType(), "from", n.describe(m.GetFrom()), "err", err)
	}
	n.syncSoftState()
}

// drainedLog returns the log with all that raft has taken from a leader's appends, or nil
// if the node has broken. It can lack what this node has just proposed.
// Whoever looks at the log between two Readys has to look here: n.log can still
// hold entries that raft has replaced.
func (n *node) drainedLog() *raftLog {
	if n.log.stale {
		n.drain()
	}
	if !n.isRunning() {
		return nil
	}
	return n.log
}

// receiveUninitialized answers a leader as raft with an empty log would: it
// matches nothing. The leader then sends a snapshot.
func (n *node) receiveUninitialized(m *raftpb.Message) {
	resp := &raftpb.Message{To: m.From, From: new(n.id.raftID), Term: m.Term}
	switch m.GetType() {
	case raftpb.MsgApp:
		resp.Type = raftpb.MsgAppResp.Enum()
		resp.Index = m.Index
		resp.Reject = new(true)
	case raftpb.MsgHeartbeat:
		resp.Type = raftpb.MsgHeartbeatResp.Enum()
	default:
		return
	}
	n.send(resp)
}

// admits guards raft against a peer's message; false: raft must not see it.
func (n *node) admits(m *raftpb.Message) bool {
	if n.mustDrainFor(m) {
		n.drain()
	}
	if !n.isRunning() {
		return false
	}
	err := n.checkAgainstRaft(m)
	if err != nil && n.rn.HasReady() {
		// The role and the log that it was checked against are perhaps not raft's
		// own: once more.
		n.drain()
		if !n.isRunning() {
			return false
		}
		err = n.checkAgainstRaft(m)
	}
	if err == nil {
		return true
	}
	if errors.Is(err, errContradiction) {
		n.err = fmt.Errorf("stopped by a message of %s: %w. "+
			"Here the term is %d, the log ends at entry %d, and entry %d is committed. %s",
			n.locate(m.GetFrom()), err, n.raft.term, n.log.last(), n.rn.BasicStatus().GetCommit(), whichIsWrong)
		return false
	}
	n.status.count.MessagesDropped++
	n.logger.Debug("dropped a message", "type", m.GetType(), "from", n.describe(m.GetFrom()), "err", err)
	return false
}

// mustDrainFor reports whether a message can be checked only against a log and a
// role that are raft's own.
func (n *node) mustDrainFor(m *raftpb.Message) bool {
	switch m.GetType() {
	case raftpb.MsgProp:
		return true // a Ready may change who leads, and whether it takes proposals
	case raftpb.MsgTimeoutNow:
		return true // raft ignores it while it has a change of membership to apply
	case raftpb.MsgApp:
		// Entries after the last committed one cannot contradict it.
		return n.log.stale && m.GetIndex() <= n.rn.BasicStatus().GetCommit()
	case raftpb.MsgHeartbeat:
		// A commit index that is not applied yet is compared with the end of the log.
		return n.log.stale || m.GetCommit() > n.store.index
	case raftpb.MsgAppResp:
		return n.log.stale // what it acknowledges is compared with the end of the log
	}
	return false
}

// checkAgainstRaft checks a message against the present log and role.
func (n *node) checkAgainstRaft(m *raftpb.Message) error {
	st := n.rn.BasicStatus()
	c := &peerCheck{
		term:        st.GetTerm(),
		commit:      st.GetCommit(),
		log:         n.log,
		leading:     n.raft.role == raft.StateLeader,
		lead:        n.raft.lead,
		readContext: n.outbox.readContext,
		level:       n.store.level,
	}
	return c.check(m)
}

// drain proposes, asks, and handles Readys until there is nothing left to do.
func (n *node) drain() {
	for n.isRunning() {
		n.proposeHeld()
		n.propose()
		n.askRead()
		if !n.rn.HasReady() {
			n.log.stale = false
			return
		}
		rd := n.rn.Ready()
		n.log.stale = false // ready appends before it asks the log for anything
		n.ready(rd)
	}
}

// ready handles a Ready. With AsyncStorageWrites, all of it is messages: to
// peers, to be sent at once; to the log, whose answers wait until it has
// written; and to the state machine.
//
// Raft lets a call for votes go at once, too, and its candidate can win by the
// votes of others before its own is durable. After a loss of power it would have
// forgotten its vote, and could lead the same term a second time, with other entries.
// So the call waits for the log (Raft
// thesis, section 3.8).
func (n *node) ready(rd raft.Ready) {
	n.syncSoftState()
	for _, rs := range rd.ReadStates {
		n.calls.confirm(rs, n.clock.now, n.electionTicks()/2)
		n.releaseReads()
	}
	// The term and this node's own vote are in the append that follows these.
	var callsForVotes []*raftpb.Message
	for _, m := range rd.Messages {
		to := m.GetTo()
		switch {
		case m.GetType() == raftpb.MsgVote:
			callsForVotes = append(callsForVotes, m)
		case to == raft.LocalAppendThread:
			m.Responses = append(callsForVotes, m.GetResponses()...)
			n.append(m)
		case to == raft.LocalApplyThread:
			n.flush(false) // apply may take its time, and a leader wait for an answer to an append
			n.apply(m)
		default:
			n.send(m)
		}
		if !n.isRunning() {
			return // removed, or broken
		}
	}
}

// syncSoftState follows raft's term, role and leader. What hung on the old
// ones is asked for again.
func (n *node) syncSoftState() {
	st := n.rn.BasicStatus()
	if st.GetTerm() != n.raft.term || st.Lead != n.raft.lead {
		n.change.end()
		n.outbox.readContext = 0
		n.outbox.askedAt = n.clock.now // peers may wait for what they asked of the leader before
		n.health.forgetLeader(n.clock.now)
		n.election.leadHeard = n.clock.now
		n.catchup.forget() // what is held will be proposed again
		n.calls.readWait = n.electionTicks() / 2
		n.calls.askAgain(n.clock.now)
		if st.Lead != 0 {
			n.status.count.LeaderChanges++
		}
	}
	n.raft = raftState{term: st.GetTerm(), lead: st.Lead, role: st.RaftState}
}

// append stores entries, a snapshot and the hard state, and releases the
// answers that depend on them only once all of that is durable.
func (n *node) append(m *raftpb.Message) {
	batch := &kvpb.LogBatch{}
	snap := m.GetSnapshot()
	if !raft.IsEmptySnap(snap) {
		n.installPending(snap)
		if n.err != nil {
			return
		}
		batch.Snapshot = &kvpb.SnapshotMark{Index: n.store.index, Term: n.store.term, File: n.store.file}
		batch.Discards = true // all entries that are on disk: the snapshot is a leader's
	}
	if err := n.log.append(m.GetEntries()); err != nil {
		n.err = err
		return
	}
	for _, e := range m.GetEntries() {
		n.catchup.written.add(n.heartbeatNumber(), memoryBytes(e))
	}
	old := n.log.hard
	if m.Term != nil {
		n.log.hard = &raftpb.HardState{Term: m.Term, Vote: m.Vote, Commit: m.Commit}
	}
	mustSync := batch.Discards || raft.MustSync(n.log.hard, old, len(m.GetEntries()))
	// A commit index alone need not be durable, for a majority has the entries. Nothing is
	// written then: an empty job has the answers wait for the jobs before it, if there are any.
	mayAnswerNow := !mustSync && n.durable.queued == 0
	if n.durable.disk == nil || mayAnswerNow {
		n.respond(m.GetResponses())
		return
	}
	if mustSync {
		batch.HardState = wireHardState(n.log.hard)
	}
	for _, e := range m.GetEntries() {
		batch.Entries = append(batch.Entries, wireEntry(e))
	}
	n.durable.noteLogged(batch, n.opts.logBytes)
	responses := m.GetResponses()
	n.persist(diskJob{batch: batch}, func() { n.respond(responses) })
}

// respond lets answers go that had to wait until what they depend on was done.
func (n *node) respond(responses []*raftpb.Message) {
	for _, r := range responses {
		if n.rn == nil {
			return
		}
		if r.GetTo() == n.id.raftID {
			n.respondToRaft(r)
		} else {
			n.send(r)
		}
	}
}

// respondToRaft gives raft its own answer, to what it has asked of the log or the state
// machine.
func (n *node) respondToRaft(r *raftpb.Message) {
	err := n.rn.Step(r)
	if err != nil && !errors.Is(err, raft.ErrStepPeerNotFound) { // removed meanwhile
		n.err = fmt.Errorf("raft: %w", err)
	}
}

// apply applies committed entries and completes what waited for them.
func (n *node) apply(m *raftpb.Message) {
	for _, e := range m.GetEntries() {
		if err := n.applyEntry(e); err != nil {
			n.err = fmt.Errorf("applying entry %d: %w", e.GetIndex(), err)
			return
		}
	}
	n.status.count.EntriesApplied += uint64(len(m.GetEntries()))
	n.respond(m.GetResponses())
	n.releaseReads()
	n.compact()
}

func (n *node) applyEntry(e *raftpb.Entry) error {
	s := n.store
	if e.GetIndex() != s.index+1 {
		return fmt.Errorf("the last one applied was %d", s.index)
	}
	s.index = e.GetIndex()
	s.term = e.GetTerm()
	n.opts.onApply(e)
	if e.GetType() != raftpb.EntryNormal {
		return n.applyConfChange(e)
	}
	before := s.version
	proposer, sequence, results, err := s.apply(e.GetData())
	if err != nil {
		return err
	}
	n.status.count.WritesApplied += s.version - before
	if proposer == n.id.raftID {
		n.calls.finishOwn(sequence, results)
	}
	return nil
}

// applyConfChange makes a committed change of membership the configuration. A
// change that does not fit the configuration is skipped, on every node alike.
func (n *node) applyConfChange(e *raftpb.Entry) error {
	n.change.end()
	cc, ctx, err := decodeConfChange(e)
	if err != nil {
		return err
	}
	conf, err := n.store.checkConfChange(cc, ctx)
	if err != nil {
		n.logger.Info("skipped a change of membership", "index", e.GetIndex(), "err", err)
		return nil
	}
	n.store.configure(conf, ctx.Members, ctx.Lost...) // first: raft may want a snapshot at once
	n.rn.ApplyConfChange(cc)
	n.configured()
	// The removed may be told once it is durable that this change is committed: when the
	// job is done, persist sets durable.removed.
	n.persist(diskJob{batch: &kvpb.LogBatch{HardState: wireHardState(n.log.hard)}}, func() {})
	return nil
}

// configured has the parts of the node follow a new configuration: it forgets who was
// removed, tells the network, and says so by the logger.
func (n *node) configured() {
	n.peers.forget(n.store.removed)
	n.listDurable()
	n.forgetRooms(n.store.removed)
	n.change.forgetMembers(n.store.removed)
	n.net.setMembers(n.store.clusterID, n.id.raftID, n.store.members, n.store.removed)
	n.logger.Info("membership", "index", n.store.index, "joint", isJoint(n.store.conf),
		"members", describeMembers(n.store.conf, n.store.members))
}

// compact keeps the log's size in bounds, on disk too.
func (n *node) compact() {
	if n.durable.wantsSnapshot(n.opts.logBytes) {
		n.save()
	}
	n.compactLog()
}
