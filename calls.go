// Calls on their way through raft: writes share an entry, reads a ReadIndex. All goroutines
// leave them, and whatever else the loop is to do, in the inbox.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protowire"

	"raft-key-value/kvpb"
)

// What a call can end with besides an answer.
var (
	errNoLeader       = errors.New("there is no leader")
	errOutcomeUnknown = errors.New("the write was proposed, whether it was or will be applied is not known")
	errChangeUnknown  = errors.New("the change was begun, whether it was or will be made is not known")
	errUnknownInTime  = fmt.Errorf("the deadline is near, and %w", errOutcomeUnknown)
	errStopping       = errors.New("this node is stopping")
	errOverloaded     = errors.New("this node has too many calls waiting")
	errNotLeader      = errors.New("this node does not lead")
	errInCluster      = errors.New("this node is in a cluster already")
	errNotInitialized = errors.New("this node is in no cluster: " +
		"init makes one, or add-learner, at a member, adds it to one")
	errDiskMissing = errors.New("the members of its cluster know this node as one with a data directory, and it was " +
		"started without --data-dir: start it with the directory that it had. To have it in memory from now on, " +
		"remove it from the cluster first, and add it again")
	errRemoved = fmt.Errorf("%w: most of the other voters that it knows say that it is no member of its "+
		"cluster any more: it was removed, or has come back since without this data directory, in which "+
		"nothing was changed. An operator may start it once more by hand: if those voters were wrong, it goes "+
		"on. If it ends with this again, move the directory away, keep it until the cluster is known to be "+
		"healthy, and start the node with an empty one; add-learner adds it, if status does not list it then", errStopping)
)

const (
	// While unary calls come, Pipelines get maxSharedLoad bytes of a proposal, and
	// maxSharedWrites writes: the unary calls that come next wait until it is applied, and for
	// the turns of all loops that work on it. After a unary call it is so for sharedBytes of
	// Pipelines, and for sharedAgain times as many as there were since the call before, if those
	// are longestGap at most. So a call that comes once, as OpenSession does, slows no loader.
	maxSharedLoad   = 32 << 10
	maxSharedWrites = 256
	sharedBytes     = 4 * maxSharedLoad
	sharedAgain     = 4
	longestGap      = 16 << 20
)

// proposal is this node's own entry in flight. There is one at most: what is
// written meanwhile forms the next.
type proposal struct {
	sequence uint64
	data     []byte
	calls    []*call
	// proposeAt is the tick from which it is to be proposed, for the first time or again;
	// never: not before the leader changes.
	proposeAt uint64
}

// readRound is a ReadIndex in flight, or one that is confirmed, until this node has
// applied its index.
type readRound struct {
	ctx   []byte // of the ReadIndex; nil: there is no round
	tick  uint64 // of the question
	index uint64 // the answer
	calls []*call
}

// callsInFlight are the calls on their way through raft. The loop owns them; it hands
// in the time and what raft says.
type callsInFlight struct {
	writes    []*call // of unary calls, that wait to be proposed
	loads     []*call // writes of Pipelines, that wait to be proposed
	shared    int     // bytes of loads for which proposals leave room for unary calls
	gap       int     // bytes of loads since the last unary call
	loadFirst bool    // the last proposal had no room for the first of loads: the next one begins with it
	reads     []*call // that wait for a round
	waits     versionWaits
	own       *proposal   // this node's entry in flight; nil: none
	room      admission   // of the next proposal
	round     readRound   // in flight, if it has a context
	confirmed []readRound // whose index this node has yet to apply
	readWait  uint64      // ticks after which a round is asked for again
	sequence  uint64      // of the last proposal or round

	requests []*pendingRequest // what await waits for

	// The calls that have ended in this turn, and the bytes of their writes: the inbox has
	// room for as many again, once it is told (release).
	endedCalls int
	endedBytes int
}

// add takes a call in. wall is the time from which its wait counts.
func (c *callsInFlight) add(call *call, wall uint64) {
	call.since = wall
	isUnary := call.request == nil
	if isUnary {
		c.expectUnary()
	}
	switch {
	case call.minVersion > 0:
		c.waits.add(call)
	case call.write == nil:
		c.reads = append(c.reads, call)
	case isUnary:
		c.writes = append(c.writes, call)
	default:
		c.loads = append(c.loads, call)
	}
}

// expectUnary has the next proposals leave room for unary calls, for one has come: until
// another may be expected.
func (c *callsInFlight) expectUnary() {
	next := sharedBytes
	if c.gap <= longestGap {
		next += sharedAgain * c.gap
	}
	c.shared = max(c.shared, next)
	c.gap = 0
}

// leaderAbsence is what calls need to know of the lack of a leader.
type leaderAbsence struct {
	why     error // nil: there is a leader
	tooLong bool  // calls do not wait for one any more
}

// expire ends calls whose deadline is near, and those that found no leader for too long.
// A write that was proposed may still be applied: it goes on until its deadline is near,
// or there has been no leader for too long. Then its outcome is unknown.
func (c *callsInFlight) expire(wall uint64, leaderless leaderAbsence) {
	why := leaderless.why
	if why == nil {
		why = context.DeadlineExceeded
	}
	isOver := func(call *call) bool { return leaderless.tooLong || call.isLate(wall) || call.isGivenUp() }
	endSome := func(calls []*call) []*call {
		return slices.DeleteFunc(calls, func(call *call) bool {
			if !isOver(call) {
				return false
			}
			c.finish(call, outcome{err: why})
			return true
		})
	}
	c.writes = endSome(c.writes)
	c.loads = endSome(c.loads)
	c.reads = endSome(c.reads)
	c.waits.calls = endSome(c.waits.calls)
	c.round.calls = endSome(c.round.calls)
	for i := range c.confirmed {
		c.confirmed[i].calls = endSome(c.confirmed[i].calls)
	}
	if c.own == nil {
		return
	}
	// The calls of the proposal end one by one when they are late. The proposal itself goes
	// on, unless there is no leader and nobody waits for it any more: with a leader it is
	// applied soon, without one nothing else would end it.
	someoneWaits := false
	for _, call := range c.own.calls {
		if call.isLate(wall) {
			c.finish(call, outcome{err: errUnknownInTime})
		}
		if !isOver(call) {
			someoneWaits = true
		}
	}
	if leaderless.why != nil && !someoneWaits {
		c.failOwn()
	}
}

// isGivenUp reports whether nobody waits for the call, which was not proposed.
func (c *call) isGivenUp() bool { return c.state.Load() == callGivenUp }

// isLate reports whether the call's deadline is near.
func (c *call) isLate(wall uint64) bool { return c.wait != 0 && wall-c.since >= c.wait }

// finish ends a call, if it has not ended.
func (c *callsInFlight) finish(call *call, o outcome) {
	if call.ended {
		return
	}
	call.ended = true
	c.endedCalls++
	c.endedBytes += len(call.write)
	if call.request == nil {
		call.done <- o
		return
	}
	call.outcome = o
	call.request.callEnded()
}

func (c *callsInFlight) fail(calls []*call, err error) {
	for _, call := range calls {
		c.finish(call, outcome{err: err})
	}
}

// failOwn gives up the proposal in flight.
func (c *callsInFlight) failOwn() {
	if c.own != nil {
		c.fail(c.own.calls, errOutcomeUnknown)
		c.own = nil
	}
}

// failAll ends all that waits; err is for what was not proposed.
func (c *callsInFlight) failAll(err error) {
	c.failOwn()
	c.retryReads()
	for _, r := range c.confirmed {
		c.fail(r.calls, err)
	}
	c.fail(c.reads, err)
	c.fail(c.waits.calls, err)
	c.fail(c.writes, err)
	c.fail(c.loads, err)
	c.reads = nil
	c.waits = versionWaits{}
	c.writes = nil
	c.loads = nil
	c.confirmed = nil
	for _, waiting := range c.requests {
		waiting.done <- err
	}
	c.requests = nil
}

// takeEnded returns how many calls have ended since it was last called, and the bytes of
// their writes.
func (c *callsInFlight) takeEnded() (calls, bytes int) {
	calls, bytes = c.endedCalls, c.endedBytes
	c.endedCalls, c.endedBytes = 0, 0
	return calls, bytes
}

// canPropose reports whether writes wait and no proposal is in flight.
func (c *callsInFlight) canPropose() bool { return c.own == nil && len(c.writes)+len(c.loads) > 0 }

// nextProposal returns what is to be proposed now, in the name of a raft ID and at a level: the
// proposal in flight if it may have got lost, or a new one of the writes at the head of
// the queue, as many as fit into an entry. nil: nothing.
func (c *callsInFlight) nextProposal(raftID uint64, level uint32, now uint64) *proposal {
	if c.canPropose() {
		c.own = c.newProposal(raftID, level)
	}
	if c.own == nil || now < c.own.proposeAt {
		return nil
	}
	return c.own
}

// newProposal makes a proposal of writes that wait: those of unary calls first, for these are
// few, and then those of Pipelines, as many as leave the next unary call little to wait for. A
// write of a Pipeline that is too large to be with them takes turns with them.
func (c *callsInFlight) newProposal(raftID uint64, level uint32) *proposal {
	c.sequence++
	p := &proposal{sequence: c.sequence}
	waiting := len(c.loads)
	unaryBytes, loadBytes, most := maxEntryBytes, maxEntryBytes, waiting
	isShared := waiting > 0 && c.shared > 0
	if isShared {
		unaryBytes -= maxSharedLoad
		loadBytes = maxSharedLoad
		most = maxSharedWrites
	}
	size := 0
	if c.loadFirst {
		c.loads, size = c.propose(p, c.loads, size, loadBytes, 1)
	}
	first := size
	c.writes, size = c.propose(p, c.writes, size, unaryBytes, len(c.writes))
	beforeLoads := size
	c.loads, size = c.propose(p, c.loads, size, min(size+loadBytes, maxEntryBytes), most)
	c.loadFirst = waiting > 0 && len(c.loads) == waiting
	loaded := first + size - beforeLoads
	c.gap += loaded
	c.shared = max(0, c.shared-loaded)
	if len(p.calls) == 0 {
		return nil
	}
	// A kvpb.Batch: 1 is the proposer, 2 the sequence, 4 the level; 3 are the writes, each behind
	// a tag and a length, which are counted as 4 bytes.
	p.data = appendVarint(make([]byte, 0, size+24), 1, raftID)
	p.data = appendVarint(p.data, 2, p.sequence)
	p.data = appendVarint(p.data, 4, uint64(levelToWire(level)))
	for _, call := range p.calls {
		p.data = protowire.AppendTag(p.data, 3, protowire.BytesType)
		p.data = protowire.AppendBytes(p.data, call.write)
	}
	return p
}

// propose moves so many calls at most into a proposal of some size, up to a limit, and returns
// those that are left, and the proposal's size. An empty proposal takes one call whatever the
// limit.
func (c *callsInFlight) propose(p *proposal, calls []*call, size, limit, most int) (rest []*call, _ int) {
	before := len(p.calls)
	for i, call := range calls {
		bytes := proposedBytes(call.write)
		isFull := len(p.calls) > 0 && size+bytes > limit
		if isFull || len(p.calls)-before == most {
			return calls[i:], size
		}
		if call.isGivenUp() { // before it is judged: it is not refused, nor does it keep others waiting
			c.finish(call, outcome{})
			continue
		}
		effect, err := c.room.judge(call.write)
		if err == errNotYet {
			return calls[i:], size
		}
		if err != nil {
			c.finish(call, outcome{err: err})
			continue
		}
		if !call.state.CompareAndSwap(callQueued, callProposed) {
			c.finish(call, outcome{}) // given up just now: it takes no room
			continue
		}
		c.room.add(effect)
		p.calls = append(p.calls, call)
		size += bytes + 4
	}
	return nil, size
}

// finishOwn ends the calls of the proposal in flight, if that is what was applied. The store
// skips a batch, and gives no results, if it has applied it before, or if its proposer is
// no member. The former cannot be: the first copy has ended the proposal, here or in
// failApplied. In the latter case nothing was applied, and the calls end with
// errOutcomeUnknown, which says less than is known.
func (c *callsInFlight) finishOwn(sequence uint64, results []outcome) {
	if c.own == nil || c.own.sequence != sequence {
		return
	}
	for i := range min(len(results), len(c.own.calls)) {
		c.finish(c.own.calls[i], results[i])
	}
	c.failOwn() // ends only the calls that got no result
}

// failApplied gives up the proposal in flight if a snapshot that was installed covers it: a
// snapshot does not have the results of writes. sequence is that of this node's last proposal in the snapshot.
func (c *callsInFlight) failApplied(sequence uint64) {
	if c.own != nil && sequence >= c.own.sequence {
		c.failOwn()
	}
}

// beginRound starts a ReadIndex for all reads that wait (Raft thesis, section 6.4), and
// returns its context; nil: none waits, or a round is in flight.
func (c *callsInFlight) beginRound(life, now uint64) []byte {
	if c.round.ctx != nil || len(c.reads) == 0 {
		return nil
	}
	c.sequence++ // a context is used once
	ctx := binary.BigEndian.AppendUint64(make([]byte, 0, readContextBytes), life)
	ctx = binary.BigEndian.AppendUint64(ctx, c.sequence)
	c.round = readRound{ctx: ctx, tick: now, calls: c.reads}
	c.reads = nil
	return ctx
}

// retryReads makes the reads of the round in flight wait for another.
func (c *callsInFlight) retryReads() {
	c.reads = append(c.round.calls, c.reads...)
	c.round = readRound{}
}

// retryLateReads has the reads wait for another round if the one in flight has taken too
// long: the question or its answer was lost, or is on its way still. Each time, the wait
// doubles, up to longest, in ticks; confirm sets it anew.
func (c *callsInFlight) retryLateReads(now, longest uint64) {
	if c.round.ctx == nil || now-c.round.tick <= c.readWait {
		return
	}
	c.readWait = min(2*c.readWait, longest)
	c.retryReads()
}

// confirm learns the index that this node must have applied before the reads of the round
// in flight may go.
// shortest is the least wait for the next round, in ticks.
func (c *callsInFlight) confirm(rs raft.ReadState, now, shortest uint64) {
	if !bytes.Equal(rs.RequestCtx, c.round.ctx) {
		return // of an earlier round
	}
	c.round.index = rs.Index
	c.readWait = max(shortest, 2*(now-c.round.tick))
	c.confirmed = append(c.confirmed, c.round)
	c.round = readRound{}
}

// releaseReads lets the reads go whose index is applied, and returns how many.
func (c *callsInFlight) releaseReads(applied uint64) uint64 {
	released := 0
	c.confirmed = slices.DeleteFunc(c.confirmed, func(r readRound) bool {
		if r.index > applied {
			return false
		}
		for _, call := range r.calls {
			c.finish(call, outcome{})
		}
		released += len(r.calls)
		return true
	})
	return uint64(released)
}

// versionWaits are local reads that wait until a version is applied.
type versionWaits struct {
	calls []*call
	least uint64 // no call waits for less
}

func (w *versionWaits) add(c *call) {
	if len(w.calls) == 0 || c.minVersion < w.least {
		w.least = c.minVersion
	}
	w.calls = append(w.calls, c)
}

// releaseVersion lets the local reads go that wait for no more than a version.
func (c *callsInFlight) releaseVersion(applied uint64) {
	w := &c.waits
	if len(w.calls) == 0 || applied < w.least {
		return
	}
	waiting := w.calls
	*w = versionWaits{}
	for _, call := range waiting {
		if call.minVersion <= applied {
			c.finish(call, outcome{})
			continue
		}
		w.add(call)
	}
}

// askAgain has the reads of the round in flight, and the proposal, put to the leader again.
// The sequence of a batch keeps it from being applied twice.
func (c *callsInFlight) askAgain(now uint64) {
	c.retryReads()
	if c.own != nil {
		c.own.proposeAt = now
	}
}

// pollRequests has each request take a step. If raft panics in one, that one and the rest
// stay in requests, where failAll finds them.
func (c *callsInFlight) pollRequests() {
	waiting := c.requests
	c.requests = nil
	defer func() { c.requests = append(c.requests, waiting...) }()
	for ; len(waiting) > 0; waiting = waiting[1:] {
		w := waiting[0]
		if w.ctx.Err() != nil {
			continue
		}
		done, err := w.poll()
		if done || err != nil {
			w.done <- err
			continue
		}
		c.requests = append(c.requests, w)
	}
}

// expireCalls ends calls that have waited long enough.
func (n *node) expireCalls() {
	var leaderless leaderAbsence
	switch {
	case n.rn == nil:
		leaderless = leaderAbsence{why: errNotInitialized, tooLong: true}
	case n.raft.lead == 0:
		leaderless = leaderAbsence{why: n.noLeader(), tooLong: n.election.leaderlessTicks >= n.ticksOf(leaderWait)}
	}
	n.calls.expire(n.clock.wall, leaderless)
}

// propose hands this node's proposal to raft, if there is one and it may.
func (n *node) propose() {
	if n.raft.lead == 0 || !n.catchup.pace.mayPropose(n.clock.wall) {
		return
	}
	if n.calls.canPropose() {
		n.calls.room = n.admission(len(n.calls.writes) + len(n.calls.loads))
	}
	p := n.calls.nextProposal(n.id.raftID, n.store.level, n.clock.now)
	if p == nil {
		return
	}
	n.opts.onPropose(p.sequence, p.data)
	n.turns.proposalWrites.observe(uint64(len(p.calls)))
	if n.rn.Propose(p.data) != nil { // during a transfer, or if too much is uncommitted
		p.proposeAt = n.clock.now + 1
		return
	}
	n.catchup.pace.count(len(p.data) + entryOverhead)
	n.catchup.pace.ownNext = false
	if n.raft.lead == n.id.raftID {
		p.proposeAt = never // it is lost only if leadership is: then syncSoftState says so
	} else {
		// On its way to the leader it can be lost without a word: if it is not
		// applied for longer than an election takes, it is proposed again.
		p.proposeAt = n.clock.now + n.electionTicks() + 1
	}
}

// askRead asks raft for the index that this node must have applied before the reads that
// wait may go. A leader
// asks only once it has applied an entry of its term; raft itself is less careful with
// one voter.
func (n *node) askRead() {
	isLeaderWithoutEntry := n.raft.lead == n.id.raftID && !n.leads()
	if n.raft.lead == 0 || isLeaderWithoutEntry {
		return
	}
	ctx := n.calls.beginRound(n.id.life, n.clock.now)
	if ctx == nil {
		return
	}
	n.status.count.ReadRounds++
	n.turns.roundReads.observe(uint64(len(n.calls.round.calls)))
	n.rn.ReadIndex(ctx)
}

// releaseReads lets the reads go whose index, or version, this node has applied.
func (n *node) releaseReads() {
	n.status.count.ReadsReleased += n.calls.releaseReads(n.store.index)
	n.calls.releaseVersion(n.store.version)
}

// input is what one turn of the loop works on.
type input struct {
	ticks    int
	elapsed  uint64 // ticks that should have passed since the start, by the clock
	calls    []*call
	messages []inbound
	events   []func()
}

// inbound is a message from a peer, and the hello of the stream that it came by.
type inbound struct {
	m     *raftpb.Message
	hello *kvpb.Hello
}

// call is a write or a read on its way through the loop.
type call struct {
	write []byte // an encoded Write; nil: a read
	// minVersion is not 0: the read is local, and waits until this version is applied.
	minVersion uint64
	state      atomic.Int32     // callQueued, callProposed or callGivenUp
	since      uint64           // when the loop took it, by its clock
	wait       uint64           // ticks until its deadline is near; 0: it has none
	ended      bool             // the loop's
	done       chan outcome     // one slot: the loop never waits
	request    *pipelineRequest // in place of done: the request that the call is of
	outcome    outcome          // for the request, once that is done
}

// States of a call: the caller may give up a call that is queued, and then
// knows that it was not proposed.
const (
	callQueued = iota
	callProposed
	callGivenUp
)

type outcome struct {
	result
	err error
}

// pendingRequest is what a goroutine waits for in await: an operator's request, or
// anything else that has to be done in the loop. poll is called in every turn, until
// it answers that the request is done, or returns an error.
type pendingRequest struct {
	ctx  context.Context
	poll func() (bool, error)
	done chan error
}

// bell wakes whoever waits for it. It has one slot: it is full while there is
// something to do.
type bell chan struct{}

func newBell() bell { return make(bell, 1) }

func (b bell) ring() {
	select {
	case b <- struct{}{}:
	default:
	}
}

// inbox is where everybody leaves work for the loop.
type inbox struct {
	mu           sync.Mutex
	next         input
	closed       error // why nothing is taken any more; nil: it is
	callBytes    int   // of calls that have not ended, here or in the loop
	callCount    int
	messageBytes int
	wake         bell
	// queuedCalls and queuedBytes bound callCount and callBytes; constant.
	queuedCalls, queuedBytes int
}

// call queues calls, all or none.
func (b *inbox) call(calls ...*call) error {
	bytes := 0
	for _, c := range calls {
		bytes += len(c.write)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed != nil:
		return b.closed
	case b.callCount+len(calls) > b.queuedCalls || b.callBytes+bytes > b.queuedBytes:
		return errOverloaded
	}
	b.callCount += len(calls)
	b.callBytes += bytes
	b.next.calls = append(b.next.calls, calls...)
	b.wake.ring()
	return nil
}

// release makes room for calls that have ended.
func (b *inbox) release(calls, bytes int) {
	if calls > 0 {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.callCount -= calls
		b.callBytes -= bytes
	}
}

// event queues a function for the loop; false: the loop has ended.
func (b *inbox) event(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed == nil {
		b.next.events = append(b.next.events, f)
		b.wake.ring()
	}
	return b.closed == nil
}

// deliver queues messages of a peer; false: there is no room, or the loop has ended.
func (b *inbox) deliver(ms []inbound) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed != nil || b.messageBytes >= maxInboundBytes {
		return false
	}
	for _, m := range ms {
		b.messageBytes += int(messageBytes(m.m))
	}
	b.next.messages = append(b.next.messages, ms...)
	b.wake.ring()
	return true
}

// giveBack returns calls and events that were taken and not worked on. Messages are
// dropped: nobody waits for them, and raft repeats them.
func (b *inbox) giveBack(in input) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.next.calls = slices.Concat(in.calls, b.next.calls)
	b.next.events = slices.Concat(in.events, b.next.events)
}

// take returns what was queued since it was last called.
func (b *inbox) take() input {
	b.mu.Lock()
	defer b.mu.Unlock()
	in := b.next
	b.next = input{}
	b.messageBytes = 0
	return in
}

// inboxLoad is what an inbox has, and what was taken of it and has not ended.
type inboxLoad struct{ calls, callBytes, messageBytes int }

func (b *inbox) load() inboxLoad {
	b.mu.Lock()
	defer b.mu.Unlock()
	return inboxLoad{calls: b.callCount, callBytes: b.callBytes, messageBytes: b.messageBytes}
}

// close makes the inbox refuse everything from now on. Whoever calls then is told why, as
// those are who wait already.
func (b *inbox) close(why error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = why
}

func (b *inbox) whyClosed() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.closed
}

// await waits until f, called in the loop in every turn, returns true or an
// error. Any goroutine may call it.
func (n *node) await(ctx context.Context, f func() (bool, error)) error {
	c := &pendingRequest{ctx: ctx, poll: f, done: make(chan error, 1)}
	if !n.inbox.event(func() { n.calls.requests = append(n.calls.requests, c) }) {
		return n.inbox.whyClosed()
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// do calls f in the loop. Any goroutine may call it.
func (n *node) do(ctx context.Context, f func() error) error {
	return n.await(ctx, func() (bool, error) { return true, f() })
}
