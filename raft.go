// The Ready loop: every duty that etcd's raft leaves to its caller.

package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/protobuf/encoding/protowire"
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
	// leaderWait is how long a call waits for a leader.
	leaderWait = 2 * time.Second
)

// What a call can end with besides an answer.
var (
	errNoLeader       = errors.New("there is no leader")
	errOutcomeUnknown = errors.New("the write was proposed, whether it was or will be applied is not known")
	errUnknownInTime  = fmt.Errorf("the deadline is near, and %w", errOutcomeUnknown)
	errNotInitialized = errors.New("this node is in no cluster")
	errStopping       = errors.New("this node is stopping")
	errOverloaded     = errors.New("this node has too many calls waiting")
	errNotLeader      = errors.New("this node does not lead")
	errInCluster      = errors.New("this node is in a cluster already")
	errRemoved        = fmt.Errorf("%w: it was removed from its cluster: delete its data directory, all of it, and have it added again", errStopping)
)

// transport is what the loop needs of the network. Nothing in it blocks.
type transport interface {
	// send queues messages for a life of a peer and drops them if its stream is
	// down, full or to another life.
	send(to, life uint64, ms []*raftpb.Message)
	// sendSnapshot sends a view in the background and reports by the receiver's
	// snapshotSent.
	sendSnapshot(to, life, term uint64, v *view)
	// setMembers says whom to keep a stream to, by raft ID, and whom never to
	// hear again.
	setMembers(clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64)
}

// proposal is this node's own entry in flight. There is one at most: what is
// written meanwhile forms the next.
type proposal struct {
	sequence   uint64
	data       []byte
	calls      []*call
	sent       bool   // raft took it
	lead, term uint64 // under whom it was sent
	tick       uint64 // when it was sent or refused
}

// readRound is a ReadIndex in flight, or confirmed and waiting to be applied.
type readRound struct {
	id    uint64
	index uint64
	calls []*call
	tick  uint64
}

// peerMessages is what one turn sends to one peer.
type peerMessages struct {
	to uint64
	ms []*raftpb.Message
}

// inbound is a message from a peer, and the hello of the stream that it came by.
type inbound struct {
	m     *raftpb.Message
	hello *kvpb.Hello
}

// node is one member. All fields below are the loop's, but for those that say
// otherwise; turn is the loop's body, and needs no goroutine, clock or socket.
type node struct {
	opts options      // constant
	self *kvpb.Node   // constant
	log  *slog.Logger // constant
	net  transport    // constant
	disk *disk        // constant; nil: in memory only
	in   inbox        // any goroutine
	pub  atomic.Pointer[published]
	// onPublish is called by the loop whenever pub has changed.
	onPublish func(*published)
	onApply   func(*raftpb.Entry) // called by the loop; nil: nobody asks

	raftID uint64 // new whenever the node has lost its memory
	life   uint64 // new whenever raftID is, and in every process
	rn     *raft.RawNode
	raft   *raftLog
	store  *store // the loop writes, others get
	err    error  // why the loop must end

	mark   uint64 // index of the last snapshot on disk
	queued int    // jobs that the disk has not done
	logged uint64 // bytes of the entries on disk that the last snapshot there does not cover
	// gone is whom this node tells that they were removed: it must know so after
	// a restart, too, or it might need the vote of one that has left for good.
	gone   []uint64
	toTell bool // gone has changed

	saving   *view  // a snapshot on its way to the disk
	savingAt uint64 // logged, when that was opened

	now        uint64 // ticks since the start
	clock      uint64 // the same, with those that a busy loop has missed: what callers wait by
	term, lead uint64
	role       raft.StateType
	leadHeard  uint64 // tick of the leader's last message
	campaignAt uint64 // tick in which to call an election, if there is no leader then; 0: none
	caughtUp   bool   // a read was released under this leader
	commitAt   [3]uint64

	lives     map[uint64]uint64   // by raft ID: the life that we talk to
	connected map[uint64]bool     // by raft ID: our stream to it is open
	met       map[uint64]*meeting // by raft ID: a life without memory that answered in place of this member
	// disownedBy are the members, by raft ID, that have applied this node's removal.
	disownedBy map[uint64]bool
	out        []peerMessages

	writes    []*call
	own       *proposal
	sequence  uint64
	reads     []*call
	round     *readRound
	confirmed []readRound
	heldReads []*raftpb.Message // of peers, until an entry of our term is applied
	readBeat  uint64            // highest read context sent with a heartbeat in this term
	conds     []*condition
	doneCalls int // ended in this turn, and their bytes
	doneBytes int
	changeAt  uint64 // tick of a change of membership or of leadership in flight; 0: none
	pending   *store // a snapshot's content between Step and Ready
	views     []*openView

	count kvpb.MetricsResponse // the counters in it
}

// openView is a view that snapshots are being sent from.
type openView struct {
	*view
	conf    *raftpb.ConfState
	readers int
}

// published is what other goroutines may know of the loop's state. It is never
// changed: next is closed when another takes its place.
type published struct {
	clusterID, raftID, life uint64
	term, lead              uint64
	leader                  *kvpb.Node // nil: unknown
	leading                 bool
	conf                    *raftpb.ConfState
	members                 map[uint64]*kvpb.Node
	removed                 []uint64
	caughtUp                bool
	lost                    int    // voters known to have lost their memory
	noLeader                error  // what to say if there is none
	unhealthy               string // why KVService is not SERVING; empty: it is
	next                    chan struct{}
}

func newNode(o options, self *kvpb.Node, log *slog.Logger) *node {
	n := &node{opts: o, self: self, log: log, store: newStore(), onPublish: func(*published) {}}
	n.in.init()
	n.newLife()
	n.pub.Store(&published{next: make(chan struct{})})
	n.publish()
	return n
}

// newLife forgets everything. The raft ID was never used before: under its old
// one, a node without memory could vote twice.
func (n *node) newLife() {
	n.raftID, n.life = randomID(), randomID()
	n.rn, n.pending = nil, nil
	n.raft = &raftLog{snapshot: n.snapshot}
	n.store.install(newStore())
	n.term, n.lead, n.role, n.caughtUp, n.campaignAt = 0, 0, raft.StateFollower, false, 0
	n.lives, n.connected, n.met, n.disownedBy = map[uint64]uint64{}, map[uint64]bool{}, map[uint64]*meeting{}, map[uint64]bool{}
	n.out, n.gone = nil, nil
}

// open makes the node the member that its data directory holds, if that holds
// one. What it knows to be committed is applied when it returns.
func (n *node) open(d *disk) error {
	n.disk = d
	r, err := d.recover(n.self.Id)
	if r == nil || err != nil {
		return err
	}
	n.raftID = r.identity.RaftId
	n.sequence = r.batch.Boots << 40 // above all of earlier processes
	n.store.install(r.store)
	n.raft.reset(raftSnapshot(r.store.header()))
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
	n.publish() // who it is, before it says hello
	n.configured()
	n.turn(input{})
	return n.err
}

// randomID returns a number that nobody has drawn before. Not 0, and below
// what raft keeps for itself.
func randomID() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return 1 + binary.BigEndian.Uint64(b[:])%(maxRaftID-1)
}

// start makes the RawNode over what the log and the store hold.
func (n *node) start() error {
	rn, err := raft.NewRawNode(&raft.Config{
		ID:                        n.raftID,
		ElectionTick:              n.electionTicks(),
		HeartbeatTick:             ticksPerHeartbeat,
		Storage:                   n.raft,
		Applied:                   n.store.index,
		AsyncStorageWrites:        true,
		MaxSizePerMsg:             1 << 20,
		MaxCommittedSizePerReady:  4 << 20,
		MaxUncommittedEntriesSize: 64 << 20,
		MaxInflightMsgs:           256,
		MaxInflightBytes:          16 << 20,
		CheckQuorum:               true, // a leader that is cut off steps down
		PreVote:                   true, // a node that was cut off does not disturb
		StepDownOnRemoval:         true,
		ReadOnlyOption:            raft.ReadOnlySafe, // no promise hangs on a clock
		Logger:                    &raftLogger{n.log},
	})
	n.rn = rn
	return err
}

func (n *node) tickDuration() time.Duration { return n.opts.heartbeat / ticksPerHeartbeat }

func (n *node) electionTicks() int { return int(n.opts.election / n.tickDuration()) }

func (n *node) ticksOf(d time.Duration) uint64 { return uint64(d / n.tickDuration()) }

// bootstrap makes this node a cluster of itself alone. Index 1, so that
// whoever joins gets a snapshot, and with it the cluster's id.
func (n *node) bootstrap() (clusterID uint64, err error) {
	if n.rn != nil {
		return 0, errInCluster
	}
	s := n.store
	s.mu.Lock()
	s.clusterID, s.index, s.term = randomID(), 1, 1
	s.mu.Unlock()
	s.configure(&raftpb.ConfState{Voters: []uint64{n.raftID}, AutoLeave: new(false)}, []*kvpb.Member{{RaftId: n.raftID, Node: n.self}})
	n.raft.reset(raftSnapshot(s.header()))
	n.raft.hard = &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(0)), Commit: new(uint64(1))}
	v := s.open()
	n.persist(diskJob{view: v, batch: &kvpb.LogBatch{HardState: wireHardState(n.raft.hard)}}, v.close)
	if err := n.start(); err != nil {
		return 0, err
	}
	n.configured()
	return s.clusterID, n.rn.Campaign()
}

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
	n.clock = max(n.clock, in.clock)
	for range in.ticks {
		n.tick()
	}
	for _, c := range in.calls {
		n.enqueue(c)
	}
	n.drain()
	n.checkConditions()
	n.drain()
	n.flush()
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
	// A learner never campaigns, so raft lets it keep a dead leader for ever.
	if n.lead != 0 && n.lead != n.raftID && n.now-n.leadHeard > 2*uint64(n.electionTicks()) {
		_ = n.rn.ForgetLeader()
	}
	if n.campaignAt != 0 && n.now >= n.campaignAt {
		n.campaignAt = 0
		// What the dead leader sent last may have made it the leader again.
		if (n.lead == 0 || !n.connected[n.lead]) && n.role == raft.StateFollower && n.isVoter(n.raftID) {
			_ = n.rn.Campaign()
		}
	}
	if n.round != nil && n.now-n.round.tick > uint64(n.electionTicks())/2 {
		n.retryReads() // the request or its answer was lost
	}
	// What was handed to another leader can be lost without a word. A leader's
	// own cannot.
	if p := n.own; p != nil && (!p.sent || n.lead != n.raftID) && n.now-p.tick > uint64(n.electionTicks()) {
		p.sent = false
	}
	if n.now%ticksPerHeartbeat == 0 {
		n.commitAt[2], n.commitAt[1], n.commitAt[0] = n.commitAt[1], n.commitAt[0], n.rn.BasicStatus().GetCommit()
	}
	if n.leads() && n.now%ticksPerHeartbeat == 0 {
		if isJoint(n.store.conf) {
			n.leaveJoint()
		} else if n.mayChange() {
			n.heal()
		}
	}
}

// leads reports whether this node leads and has applied an entry of its term,
// so that its state is no older than any that was acknowledged.
func (n *node) leads() bool {
	return n.rn != nil && n.role == raft.StateLeader && n.store.term == n.term
}

// expire ends calls that found no leader for too long, or whose deadline is near.
func (n *node) expire() {
	var noLeader error
	if n.rn == nil {
		noLeader = errNotInitialized
	} else if n.lead == 0 {
		noLeader = n.noLeader()
	}
	wait := n.ticksOf(leaderWait)
	overdue := func(c *call) error {
		if c.wait != 0 && n.clock-c.since >= c.wait {
			return context.DeadlineExceeded
		} else if n.clock-c.since >= wait {
			return noLeader
		}
		return nil
	}
	end := func(calls []*call) []*call {
		return slices.DeleteFunc(calls, func(c *call) bool {
			err := overdue(c)
			if err != nil {
				n.finish(c, outcome{err: err})
			}
			return err != nil
		})
	}
	n.writes, n.reads = end(n.writes), end(n.reads)
	if n.round != nil {
		n.round.calls = end(n.round.calls)
	}
	for i := range n.confirmed {
		n.confirmed[i].calls = end(n.confirmed[i].calls)
	}
	if n.own == nil {
		return
	}
	late := 0
	for _, c := range n.own.calls {
		err := overdue(c)
		if err == context.DeadlineExceeded {
			n.finish(c, outcome{err: errUnknownInTime})
		}
		if err != nil {
			late++
		}
	}
	if noLeader != nil && late == len(n.own.calls) {
		n.failOwn()
	}
}

// finish ends a call, if it has not ended.
func (n *node) finish(c *call, o outcome) {
	switch {
	case c.fn != nil && o.err == nil:
		c.fn()
	case c.fn == nil && !c.ended:
		c.ended = true
		n.doneCalls++
		n.doneBytes += len(c.record)
		if g := c.group; g == nil {
			c.done <- o
		} else if c.out, g.left = o, g.left-1; g.left == 0 {
			close(g.done)
		}
	}
}

func (n *node) fail(calls []*call, err error) {
	for _, c := range calls {
		n.finish(c, outcome{err: err})
	}
}

// failOwn gives up the proposal in flight.
func (n *node) failOwn() {
	if n.own != nil {
		n.fail(n.own.calls, errOutcomeUnknown)
		n.own = nil
	}
}

// failAll ends all that waits; err is for what was not proposed.
func (n *node) failAll(err error) {
	n.failOwn()
	n.retryReads()
	for _, r := range n.confirmed {
		n.fail(r.calls, err)
	}
	n.fail(n.reads, err)
	n.fail(n.writes, err)
	n.reads, n.writes, n.confirmed, n.heldReads = nil, nil, nil, nil
	for _, c := range n.conds {
		c.done <- err
	}
	n.conds = nil
}

// enqueue takes a call in.
func (n *node) enqueue(c *call) {
	c.since = n.clock
	if c.record == nil {
		n.reads = append(n.reads, c)
	} else {
		n.writes = append(n.writes, c)
	}
}

// receive hands a peer's message to raft.
func (n *node) receive(in inbound) {
	m := in.m
	from := m.GetFrom()
	if !n.hears(in.hello) {
		n.count.MessagesDropped++
		return
	}
	if n.rn == nil {
		n.receiveUninitialized(m)
		return
	}
	if !n.check(m) {
		return
	}
	if from == n.lead {
		n.leadHeard = n.now
	}
	if m.GetType() == raftpb.MsgReadIndex && n.role == raft.StateLeader && !n.leads() {
		// With one voter, raft would answer before it knows what is committed.
		if len(n.heldReads) < 64 {
			n.heldReads = append(n.heldReads, m)
		}
		return
	}
	n.learnCommit(m)
	if err := n.rn.Step(m); err != nil && !errors.Is(err, raft.ErrProposalDropped) {
		n.log.Debug("raft refused a message", "type", m.GetType(), "from", from, "err", err)
	}
	n.syncSoftState()
}

// learnCommit takes from the answer to a call for votes what is committed. A
// node without a leader can need that: if it has forgotten, or never heard, that
// a change of membership is committed, it asks for votes by the old
// configuration, perhaps of nodes that have left for good, or of learners whose
// log is longer. Raft takes commits from a leader only; so here is one, for no
// longer than the call.
func (n *node) learnCommit(m *raftpb.Message) {
	if t := m.GetType(); t != raftpb.MsgVoteResp && t != raftpb.MsgPreVoteResp || n.lead != 0 {
		return
	}
	st := n.rn.BasicStatus()
	if term, err := n.raft.Term(m.GetCommit()); err != nil || term != m.GetLogTerm() || m.GetCommit() <= st.GetCommit() {
		return // equal entries have equal ones before them (Raft paper, section 5.3)
	}
	_ = n.rn.Step(&raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: m.From, To: m.To, Term: new(st.GetTerm()), Commit: m.Commit})
	_ = n.rn.ForgetLeader()
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

// hears reports whether what came by a stream may be listened to: not if it is
// of or to another life, of another cluster, or of somebody who has left.
func (n *node) hears(h *kvpb.Hello) bool {
	from := h.From.RaftId
	return n.lives[from] == h.From.Life && h.To.RaftId == n.raftID && sameCluster(n.store.clusterID, n.store.members, h)
}

// sameCluster reports whether a node in a cluster, or in none yet, may talk to
// the sender of a hello. One that is being added is in no cluster yet.
func sameCluster(clusterID uint64, members map[uint64]*kvpb.Node, h *kvpb.Hello) bool {
	if h.ClusterId == 0 {
		return members[h.From.RaftId] != nil
	}
	return clusterID == 0 || clusterID == h.ClusterId
}

// check guards raft against a peer's message.
func (n *node) check(m *raftpb.Message) bool {
	try := func() error {
		st := n.rn.BasicStatus()
		c := peerCheck{term: st.GetTerm(), commit: st.GetCommit(), log: n.raft, leading: n.role == raft.StateLeader, lead: n.lead, readBeat: n.readBeat}
		return c.check(m)
	}
	err := try()
	if err != nil || m.GetType() == raftpb.MsgProp || m.GetType() == raftpb.MsgHeartbeat && m.GetCommit() > n.store.index {
		n.drain() // n.raft and n.role are not raft's own while there is a Ready
		if n.rn == nil || n.err != nil {
			return false
		}
		err = try()
	}
	if errors.Is(err, errContradiction) {
		n.err = fmt.Errorf("stopped by a message of node %s: %w", n.describe(m.GetFrom()), err)
	} else if err != nil {
		n.count.MessagesDropped++
		n.log.Debug("dropped a message", "type", m.GetType(), "from", n.describe(m.GetFrom()), "err", err)
	}
	return err == nil
}

// describe names a raft ID in a log.
func (n *node) describe(raftID uint64) string {
	if m := n.store.members[raftID]; m != nil {
		return fmt.Sprintf("%d", m.Id)
	}
	return fmt.Sprintf("with raft ID %x", raftID)
}

// drain proposes, asks, and handles Readys until there is nothing left to do.
func (n *node) drain() {
	for n.rn != nil && n.err == nil {
		n.propose()
		n.askRead()
		if !n.rn.HasReady() {
			return
		}
		n.ready(n.rn.Ready())
	}
}

// ready handles a Ready. With AsyncStorageWrites, all of it is messages: to
// peers, to be sent at once; to the log, whose answers wait until it has
// written; and to the state machine.
func (n *node) ready(rd raft.Ready) {
	n.syncSoftState()
	for _, rs := range rd.ReadStates {
		n.readConfirmed(rs)
	}
	for _, m := range rd.Messages {
		switch m.GetTo() {
		case raft.LocalAppendThread:
			n.append(m)
		case raft.LocalApplyThread:
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
	if st.GetTerm() == n.term && st.Lead == n.lead && st.RaftState == n.role {
		return
	}
	if st.GetTerm() != n.term || st.Lead != n.lead {
		n.caughtUp, n.heldReads, n.changeAt = false, nil, 0
		n.leadHeard = n.now
		n.retryReads()
		if st.Lead != 0 {
			n.count.LeaderChanges++
			n.reads = append(n.reads, &call{since: n.clock, fn: func() { n.caughtUp = true }})
		}
	}
	if st.GetTerm() != n.term {
		n.readBeat = 0
	}
	n.term, n.lead, n.role = st.GetTerm(), st.Lead, st.RaftState
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
	old := n.raft.hard
	if m.Term != nil {
		n.raft.hard = &raftpb.HardState{Term: m.Term, Vote: m.Vote, Commit: m.Commit}
	}
	responses, told := m.GetResponses(), func() {}
	if !raft.IsEmptySnap(snap) {
		told = n.toldLater()
	}
	voted := old.GetTerm() != n.raft.hard.GetTerm() || old.GetVote() != n.raft.hard.GetVote()
	promises := voted || batch.Discards || len(m.GetEntries()) > 0
	if n.disk == nil || !promises && n.queued == 0 {
		told()
		n.respond(responses, nil) // what is committed, others know too
		return
	}
	if promises {
		batch.HardState = wireHardState(n.raft.hard)
	}
	for _, e := range m.GetEntries() {
		batch.Entries = append(batch.Entries, wireEntry(e))
	}
	n.logged += uint64(sectors(headerBytes + proto.Size(batch)))
	if n.saving != nil && n.logged > 4*uint64(n.opts.logBytes) {
		n.disk.hold(true) // until the snapshot is there
	}
	lives := make([]uint64, len(responses))
	for i, r := range responses {
		lives[i] = n.lives[r.GetTo()]
	}
	n.persist(diskJob{batch: batch}, func() {
		told()
		n.respond(responses, lives)
	})
}

// toldLater returns what lets the removed ones know, once that is durable.
func (n *node) toldLater() func() {
	removed := n.store.removed
	return func() { n.gone, n.toTell = removed, true }
}

// persist has the disk do a job and then calls done, in the loop. The first one
// makes the directory this node's.
func (n *node) persist(j diskJob, done func()) {
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
			} else {
				done()
			}
		})
	}
	n.queued++
	n.disk.enqueue(j)
}

// diskFailed ends the node: what is on the disk nobody knows.
func (n *node) diskFailed(err error) {
	n.err = fmt.Errorf("%w: writing to the data directory: %w", errStopping, err)
}

// save writes a snapshot of the state to the disk, beside the loop.
func (n *node) save() {
	v := n.store.open()
	n.saving, n.savingAt = v, n.logged
	n.disk.start(func() {
		mark, err := n.disk.save(v)
		n.in.event(func() { n.saved(v, mark, err) })
	})
}

// saved makes a snapshot that has been written the one that counts.
func (n *node) saved(v *view, mark *kvpb.SnapshotMark, err error) {
	v.close()
	n.saving = nil
	n.disk.hold(false)
	switch {
	case err != nil:
		n.diskFailed(err)
	case mark.Index <= n.mark: // a leader's has overtaken it
		n.disk.start(func() { _ = n.disk.remove(mark.File) })
	default:
		n.log.Info("saved a snapshot", "index", mark.Index)
		n.mark, n.logged = mark.Index, n.logged-n.savingAt
		n.persist(diskJob{batch: &kvpb.LogBatch{Snapshot: mark}}, func() {})
	}
}

// respond lets answers go, but not to another life of whom they are for: it
// may count on what this node promised to the one before (with
// AsyncStorageWrites raft asks for votes before its log is durable).
func (n *node) respond(responses []*raftpb.Message, lives []uint64) {
	for i, r := range responses {
		if n.rn == nil {
			return
		}
		if r.GetTo() != n.raftID {
			if lives == nil || lives[i] == n.lives[r.GetTo()] {
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
	if n.leads() && len(n.heldReads) > 0 {
		held := n.heldReads
		n.heldReads = nil
		for _, r := range held {
			_ = n.rn.Step(r)
		}
	}
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
	if n.onApply != nil {
		n.onApply(e)
	}
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
		n.own = nil
		if len(results) != len(p.calls) {
			n.fail(p.calls, errOutcomeUnknown) // applied before, its results are gone
			return nil
		}
		for i, c := range p.calls {
			n.finish(c, results[i])
		}
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
	if err := n.store.checkConfChange(cc, ctx); err != nil {
		n.log.Info("skipped a change of membership", "index", e.GetIndex(), "err", err)
	} else {
		n.store.configure(n.rn.ApplyConfChange(cc), ctx.Members)
		n.configured()
		n.persist(diskJob{batch: &kvpb.LogBatch{HardState: wireHardState(n.raft.hard)}}, n.toldLater())
	}
	n.changeAt = 0
	return nil
}

// configured tells the network and the log of a new configuration.
func (n *node) configured() {
	for _, id := range n.store.removed {
		delete(n.lives, id) // never to be heard again
		delete(n.met, id)
	}
	n.net.setMembers(n.store.clusterID, n.raftID, n.store.members, n.store.removed)
	n.log.Info("membership", "index", n.store.index, "joint", isJoint(n.store.conf), "members", describeMembers(n.store.conf, n.store.members))
}

// disowned learns from a member that it has applied this node's removal. The
// node keeps its state, and thus its vote, until most voters have: those who
// have not still need it to elect a leader.
func (n *node) disowned(by uint64) {
	n.disownedBy[by] = true
	others, told := 0, 0
	for _, id := range n.store.conf.GetVoters() {
		if id != n.raftID {
			others++
			if n.disownedBy[id] || n.met[id] != nil { // or cannot elect anybody any more
				told++
			}
		}
	}
	if told >= min(others, len(n.store.conf.GetVoters())/2+1) {
		n.removed()
	}
}

// removed drops the state of a node that is no member any more. It may be
// added again, as somebody new.
func (n *node) removed() {
	if n.mark != 0 {
		n.err = errRemoved
		return
	}
	n.log.Warn("this node was removed from its cluster: it drops its state and waits to be added again", "cluster", fmt.Sprintf("%016x", n.store.clusterID))
	n.flush()
	n.failAll(errNotInitialized)
	n.newLife()
	n.net.setMembers(0, n.raftID, nil, nil)
}

// compact keeps the log's size in bounds, on disk too. What a snapshot on its
// way needs to be followed by the log is kept for a while.
func (n *node) compact() {
	limit := uint64(n.opts.logBytes)
	if n.disk != nil && n.saving == nil && n.logged > limit {
		n.save()
	}
	if n.raft.bytes <= limit {
		return
	}
	index := n.store.index
	if n.raft.bytes <= 4*limit {
		for _, v := range n.views {
			index = min(index, v.header.Index)
		}
	}
	n.raft.compact(limit/2, index)
}

// propose hands the writes that wait, or as many as fit into an entry, to raft.
func (n *node) propose() {
	if n.own == nil && n.lead != 0 && len(n.writes) > 0 {
		n.own = n.nextProposal()
	}
	p := n.own
	if p == nil || n.lead == 0 || p.sent && p.lead == n.lead && p.term == n.term {
		return
	}
	if !p.sent && p.tick == n.now && p.lead == n.lead {
		return // refused in this tick already
	}
	p.lead, p.term, p.tick = n.lead, n.term, n.now
	p.sent = n.rn.Propose(p.data) == nil // refused during a transfer, or if too much is uncommitted
}

// nextProposal forms an entry of the writes at the head of the queue.
func (n *node) nextProposal() *proposal {
	n.sequence++
	p := &proposal{sequence: n.sequence, lead: ^uint64(0)}
	size, i := 0, 0
	for ; i < len(n.writes); i++ {
		c := n.writes[i]
		if len(p.calls) > 0 && size+len(c.record) > maxEntryBytes {
			break
		}
		if c.state.CompareAndSwap(callQueued, callProposed) {
			p.calls = append(p.calls, c)
			size += len(c.record) + 4
		} else {
			n.finish(c, outcome{}) // given up: nobody waits
		}
	}
	n.writes = n.writes[i:]
	if len(p.calls) == 0 {
		return nil
	}
	p.data = make([]byte, 0, size+24)
	p.data = protowire.AppendTag(p.data, 1, protowire.VarintType)
	p.data = protowire.AppendVarint(p.data, n.raftID)
	p.data = protowire.AppendTag(p.data, 2, protowire.VarintType)
	p.data = protowire.AppendVarint(p.data, p.sequence)
	for _, c := range p.calls {
		p.data = protowire.AppendTag(p.data, 3, protowire.BytesType)
		p.data = protowire.AppendBytes(p.data, c.record)
	}
	return p
}

// askRead starts a ReadIndex for all reads that wait (Raft thesis, section
// 6.4), if none is in flight. A leader asks only once it has applied an entry
// of its term; raft itself is less careful with one voter.
func (n *node) askRead() {
	if n.round != nil || len(n.reads) == 0 || n.lead == 0 || n.lead == n.raftID && !n.leads() {
		return
	}
	n.sequence++ // a context is used once
	n.round = &readRound{id: n.sequence, calls: n.reads, tick: n.now}
	n.reads = nil
	n.count.ReadRounds++
	ctx := make([]byte, readContextBytes)
	binary.BigEndian.PutUint64(ctx, n.life)
	binary.BigEndian.PutUint64(ctx[8:], n.round.id)
	n.rn.ReadIndex(ctx)
}

// retryReads makes the reads of the round in flight wait for another.
func (n *node) retryReads() {
	if n.round != nil {
		n.reads = append(n.round.calls, n.reads...)
		n.round = nil
	}
}

// readConfirmed learns the index that the reads of a round must have applied.
func (n *node) readConfirmed(rs raft.ReadState) {
	r := n.round
	if r == nil || len(rs.RequestCtx) != readContextBytes || binary.BigEndian.Uint64(rs.RequestCtx) != n.life || binary.BigEndian.Uint64(rs.RequestCtx[8:]) != r.id {
		return // of an earlier round
	}
	n.round, r.index = nil, rs.Index
	n.confirmed = append(n.confirmed, *r)
	n.releaseReads()
}

// releaseReads lets the reads go whose index is applied.
func (n *node) releaseReads() {
	n.confirmed = slices.DeleteFunc(n.confirmed, func(r readRound) bool {
		if r.index > n.store.index {
			return false
		}
		for _, c := range r.calls {
			n.finish(c, outcome{})
		}
		n.count.ReadsReleased += uint64(len(r.calls))
		return true
	})
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
	case raftpb.MsgVoteResp, raftpb.MsgPreVoteResp: // with what learnCommit wants
		commit := n.rn.BasicStatus().GetCommit()
		if term, err := n.raft.Term(commit); err == nil {
			m.Commit, m.LogTerm = &commit, &term
		}
	}
	for i := range n.out {
		if n.out[i].to == m.GetTo() {
			n.out[i].ms = append(n.out[i].ms, m)
			return
		}
	}
	n.out = append(n.out, peerMessages{m.GetTo(), []*raftpb.Message{m}})
}

// flush gives each peer its messages of this turn.
func (n *node) flush() {
	for _, o := range n.out {
		if life := n.lives[o.to]; life != 0 {
			n.net.send(o.to, life, o.ms)
		} else {
			n.count.MessagesDropped += uint64(len(o.ms))
		}
	}
	n.out = nil
	n.closeViews()
	n.in.release(n.doneCalls, n.doneBytes)
	n.doneCalls, n.doneBytes = 0, 0
}

// snapshot is what raft is told when a follower needs one: the view that is
// being sent already, if the log goes on from there, or a new one.
func (n *node) snapshot() *raftpb.Snapshot {
	for _, v := range n.views {
		if v.conf == n.store.conf && v.header.Index >= n.raft.prevIndex {
			return raftSnapshot(v.header)
		}
	}
	n.views = append(n.views, &openView{view: n.store.open(), conf: n.store.conf})
	return raftSnapshot(n.views[len(n.views)-1].header)
}

// sendSnapshot starts a transfer. Every MsgSnap ends in one ReportSnapshot.
func (n *node) sendSnapshot(m *raftpb.Message) {
	to, index := m.GetTo(), m.GetSnapshot().GetMetadata().GetIndex()
	for _, v := range n.views {
		if v.header.Index == index && n.lives[to] != 0 {
			v.readers++
			n.log.Info("sending a snapshot", "to", n.describe(to), "index", index, "keys", v.keys)
			n.net.sendSnapshot(to, n.lives[to], m.GetTerm(), v.view)
			return
		}
	}
	n.rn.ReportSnapshot(to, raft.SnapshotFailure)
}

// snapshotSent ends a transfer.
func (n *node) snapshotSent(to uint64, v *view, err error) {
	n.in.event(func() {
		for _, o := range n.views {
			if o.view == v {
				o.readers--
			}
		}
		status := raft.SnapshotFinish
		if err != nil {
			status = raft.SnapshotFailure
			n.log.Warn("sending a snapshot failed", "to", n.describe(to), "err", err)
		} else {
			n.count.SnapshotsSent++
			n.log.Info("sent a snapshot", "to", n.describe(to), "index", v.header.Index)
		}
		if n.rn != nil {
			n.rn.ReportSnapshot(to, status)
		}
	})
}

// closeViews closes the views that nobody sends from.
func (n *node) closeViews() {
	n.views = slices.DeleteFunc(n.views, func(v *openView) bool {
		if v.readers <= 0 {
			v.close()
		}
		return v.readers <= 0
	})
}

// readSnapshot reads a snapshot from a peer and, if this node has a disk, makes
// it durable there. Any goroutine may call it.
func (n *node) readSnapshot(r io.Reader) (*store, error) {
	if n.disk == nil {
		return readSnapshot(r)
	}
	w := n.disk.newSnapshot()
	s, err := readSnapshot(io.TeeReader(r, w))
	index := uint64(0)
	if err == nil {
		index = s.index
	}
	name, err := w.finish(index, err)
	if w.err != nil { // not the sender's fault
		n.in.event(func() { n.diskFailed(w.err) })
	}
	if err != nil {
		return nil, err
	}
	s.file = name
	return s, nil
}

// receiveSnapshot hands a snapshot that came from a peer to raft and returns
// once raft has taken or ignored it. Any goroutine may call it.
func (n *node) receiveSnapshot(ctx context.Context, h *kvpb.Hello, term uint64, s *store) error {
	err := n.do(ctx, func() error { return n.stepSnapshot(h, term, s) })
	n.in.event(func() { n.discard(s) }) // if ctx ended first
	return err
}

// discard removes the file of a snapshot from a peer, unless it is installed.
func (n *node) discard(s *store) {
	if file := s.file; file != "" {
		s.file = ""
		n.disk.start(func() { _ = n.disk.remove(file) })
	}
}

func (n *node) stepSnapshot(h *kvpb.Hello, term uint64, s *store) error {
	defer n.discard(s)
	if !n.hears(h) || h.ClusterId != s.clusterID {
		return errors.New("the snapshot is of or to another life, or another cluster")
	}
	if !proto.Equal(s.members[n.raftID], n.self) {
		return errors.New("the snapshot does not name this node")
	}
	fresh := n.rn == nil
	if fresh {
		if err := n.start(); err != nil {
			return err
		}
	}
	m := &raftpb.Message{Type: raftpb.MsgSnap.Enum(), From: new(h.From.RaftId), To: new(n.raftID), Term: new(term), Snapshot: raftSnapshot(s.header())}
	err := errors.New("raft refused the snapshot")
	if n.check(m) {
		n.pending = s
		err = n.rn.Step(m)
		n.drain()
	}
	n.pending = nil
	if fresh && n.store.clusterID == 0 {
		n.rn, n.raft, n.term, n.lead, n.role = nil, &raftLog{snapshot: n.snapshot}, 0, 0, raft.StateFollower
	}
	return err
}

// installPending makes the pending snapshot the state, and the log start
// behind it.
func (n *node) installPending(snap *raftpb.Snapshot) {
	if n.pending == nil || n.pending.index != snap.GetMetadata().GetIndex() {
		n.err = errors.New("raft wants a snapshot that it was not given")
		return
	}
	n.store.install(n.pending)
	n.pending.file = "" // it is the store's
	n.pending = nil
	n.raft.reset(snap)
	if n.disk != nil && n.mark != 0 { // else persist makes the directory, and the mark
		n.mark = n.store.index
	}
	n.logged = 0
	n.count.SnapshotsInstalled++
	n.log.Info("installed a snapshot", "cluster", fmt.Sprintf("%016x", n.store.clusterID), "index", n.store.index)
	if p := n.own; p != nil && n.store.proposers[n.raftID] >= p.sequence {
		n.failOwn() // it is in the snapshot, its results are not
	}
	n.configured()
	n.releaseReads()
}

func (n *node) checkConditions() {
	if n.err != nil {
		return // nobody asks a broken node for anything: run ends them
	}
	conds := n.conds
	n.conds = nil
	for _, c := range conds {
		if c.ctx.Err() != nil {
			continue
		}
		if ok, err := c.f(); ok || err != nil {
			c.done <- err
		} else {
			n.conds = append(n.conds, c)
		}
	}
}

// publish lets others see what they may, if it has changed.
func (n *node) publish() {
	old := n.pub.Load()
	if old.conf == n.store.conf && old.raftID == n.raftID && old.term == n.term && old.lead == n.lead &&
		old.leading == n.leads() && old.caughtUp == n.caughtUp && old.lost == len(n.met) && !n.toTell {
		return
	}
	n.toTell = false
	p := &published{
		clusterID: n.store.clusterID, raftID: n.raftID, life: n.life, term: n.term, lead: n.lead, leading: n.leads(), leader: n.store.members[n.lead],
		conf: n.store.conf, members: n.store.members, removed: n.gone, caughtUp: n.caughtUp, lost: len(n.met),
		noLeader: n.noLeader(), unhealthy: n.whyUnhealthy(), next: make(chan struct{}),
	}
	if p.lead != 0 && (old.lead != p.lead || old.term != p.term) {
		n.log.Info("leader", "is", n.describe(p.lead), "term", p.term)
	}
	if err := n.quorumLost(); p.lead == 0 && err != nil && (old.lost != p.lost || old.lead != 0) {
		n.log.Error("the cluster cannot go on", "err", err)
	}
	n.pub.Store(p)
	close(old.next)
	n.onPublish(p)
}

// whyUnhealthy says why this node should get no calls; empty: it should.
func (n *node) whyUnhealthy() string {
	switch {
	case n.rn == nil:
		return "in no cluster"
	case n.store.members[n.raftID] == nil:
		return "not a member of the configuration that it has applied"
	case len(n.store.raftIDsOf(n.self.Id)) > 1:
		return "not yet back in its role"
	case n.lead == 0:
		return n.noLeader().Error()
	case !n.caughtUp:
		return "not yet caught up with the leader"
	}
	return ""
}

// peerUp learns of a stream between this process and a life of a peer. Any
// goroutine may call it, before any message of that stream.
func (n *node) peerUp(raftID, life uint64, outbound bool) {
	n.in.event(func() {
		if slices.Contains(n.store.removed, raftID) {
			return
		}
		n.lives[raftID] = life
		if outbound {
			n.connected[raftID] = true
			delete(n.met, raftID)
			n.log.Info("peer connected", "peer", n.describe(raftID))
		}
	})
}

// peerDown learns that messages to a peer were lost. Any goroutine may call it.
func (n *node) peerDown(raftID uint64, lost bool, cause error) {
	n.in.event(func() {
		if !lost {
			n.log.Debug("peer's queue is full", "peer", n.describe(raftID))
		} else if n.connected[raftID] {
			n.log.Info("peer disconnected", "peer", n.describe(raftID), "cause", cause)
			delete(n.connected, raftID)
			if n.rn != nil && raftID == n.lead {
				n.leaderLost()
			}
		}
		if n.rn != nil && n.store.members[raftID] != nil {
			n.rn.ReportUnreachable(raftID)
		}
	})
}

// leaderLost brings an election forward: the stream to the leader broke, which
// it does at once if the process has died. If the leader lives, PreVote and the
// others, who hear of it, keep an election from succeeding. Voters take turns,
// so as not to split the vote.
func (n *node) leaderLost() {
	rank := 0
	for _, id := range n.store.conf.GetVoters() {
		if id < n.raftID && id != n.lead {
			rank++
		}
	}
	n.campaignAt = n.now + 1 + uint64(rank*n.electionTicks()/10)
	_ = n.rn.ForgetLeader()
}

// refused learns that whoever answered in place of a member would not talk to
// this node. Any goroutine may call it.
func (n *node) refused(myRaftID, raftID uint64, w *kvpb.Welcome) {
	n.in.event(func() {
		switch {
		case n.rn == nil || myRaftID != n.raftID:
		case w.Verdict == kvpb.Verdict_VERDICT_REMOVED && w.ClusterId == n.store.clusterID:
			n.disowned(raftID)
		case w.ClusterId == 0 && w.Peer.RaftId != raftID && proto.Equal(w.Peer.Node, n.store.members[raftID]):
			n.meet(raftID, w.Peer)
		}
	})
}

// accept answers a Hello. Any goroutine may call it.
func (n *node) accept(h *kvpb.Hello) *kvpb.Welcome {
	p := n.pub.Load()
	me := &kvpb.Peer{Node: n.self, RaftId: p.raftID, Life: p.life}
	w := &kvpb.Welcome{Verdict: kvpb.Verdict_VERDICT_ACCEPTED, Peer: me, ClusterId: p.clusterID}
	to := h.GetTo()
	if slices.Contains(h.Removed, p.raftID) && (p.clusterID == 0 || p.clusterID == h.ClusterId && to.GetRaftId() == 0) {
		n.in.event(func() { // a leader is about to add this node again
			if n.raftID == p.raftID {
				n.removed()
			}
		})
	}
	switch {
	case p.clusterID != 0 && slices.Contains(p.removed, h.GetFrom().GetRaftId()) && h.ClusterId == p.clusterID:
		w.Verdict = kvpb.Verdict_VERDICT_REMOVED
	case to.GetRaftId() == 0:
		// It only asks.
	case validateNode("from", h.GetFrom().GetNode()) != nil || h.GetFrom().GetRaftId() == 0 || h.GetFrom().GetLife() == 0 || h.GetFrom().GetRaftId() == p.raftID:
		w.Verdict = kvpb.Verdict_VERDICT_NOT_ME
	case !sameCluster(p.clusterID, p.members, h):
		w.Verdict = kvpb.Verdict_VERDICT_OTHER_CLUSTER
	case to.GetRaftId() != p.raftID, to.GetLife() != 0 && to.GetLife() != p.life, !proto.Equal(to.GetNode(), n.self):
		w.Verdict = kvpb.Verdict_VERDICT_NOT_ME
	}
	return w
}

// hello is how this life of the node introduces itself.
func (n *node) hello() *kvpb.Hello {
	p := n.pub.Load()
	return &kvpb.Hello{ClusterId: p.clusterID, From: &kvpb.Peer{Node: n.self, RaftId: p.raftID, Life: p.life}, Removed: p.removed}
}

// receiveMessages queues a peer's messages; it waits while the queue is full.
// Any goroutine may call it.
func (n *node) receiveMessages(ctx context.Context, ms []inbound) error { return n.in.deliver(ctx, ms) }

// progress is raft's knowledge of a follower.
type progress = tracker.Progress

// raftPanic is what raft panics with when its state contradicts itself.
type raftPanic string

// raftLogger writes raft's log to ours. What raft says of each election and
// message is for debugging.
type raftLogger struct{ log *slog.Logger }

func (l *raftLogger) print(level slog.Level, v []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "raft: "+fmt.Sprint(v...))
	}
}

func (l *raftLogger) printf(level slog.Level, format string, v []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "raft: "+fmt.Sprintf(format, v...))
	}
}

func (l *raftLogger) Debug(v ...any)              { l.print(slog.LevelDebug, v) }
func (l *raftLogger) Debugf(f string, v ...any)   { l.printf(slog.LevelDebug, f, v) }
func (l *raftLogger) Info(v ...any)               { l.print(slog.LevelDebug, v) }
func (l *raftLogger) Infof(f string, v ...any)    { l.printf(slog.LevelDebug, f, v) }
func (l *raftLogger) Warning(v ...any)            { l.print(slog.LevelWarn, v) }
func (l *raftLogger) Warningf(f string, v ...any) { l.printf(slog.LevelWarn, f, v) }
func (l *raftLogger) Error(v ...any)              { l.print(slog.LevelError, v) }
func (l *raftLogger) Errorf(f string, v ...any)   { l.printf(slog.LevelError, f, v) }
func (l *raftLogger) Fatal(v ...any)              { l.Panic(v...) }
func (l *raftLogger) Fatalf(f string, v ...any)   { l.Panicf(f, v...) }
func (l *raftLogger) Panic(v ...any)              { panic(raftPanic(fmt.Sprint(v...))) }
func (l *raftLogger) Panicf(f string, v ...any)   { panic(raftPanic(fmt.Sprintf(f, v...))) }
