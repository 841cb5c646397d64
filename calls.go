// Calls on their way through raft: writes share an entry, reads a ReadIndex. All goroutines
// leave them, and whatever else the loop is to do, in the inbox.

package main

import (
	"bytes"
	"cmp"
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
	errNotInitialized = errors.New("this node is in no cluster: init makes one, or add-learner, at a member, adds it to one")
	errStopping       = errors.New("this node is stopping")
	errOverloaded     = errors.New("this node has too many calls waiting")
	errNotLeader      = errors.New("this node does not lead")
	errInCluster      = errors.New("this node is in a cluster already")
	errRemoved        = fmt.Errorf("%w: most of the other voters that it knows say that it is no member of its cluster "+
		"any more: it was removed, or has come back since without this data directory, in which nothing was changed. "+
		"Start it again once: if those voters were wrong, it goes on. If it stops with this again, move the directory "+
		"away, keep it until the cluster is known to be healthy, and start the node with an empty one; "+
		"add-learner adds it, if status does not list it then", errStopping)
)

// proposal is this node's own entry in flight. There is one at most: what is
// written meanwhile forms the next.
type proposal struct {
	sequence uint64
	data     []byte
	calls    []*call
	again    uint64 // tick from which it is to be proposed, again perhaps
}

// readRound is a ReadIndex in flight, or confirmed and waiting to be applied.
type readRound struct {
	ctx   []byte
	tick  uint64 // of the question
	index uint64 // the answer
	calls []*call
}

// callsInFlight are the calls on their way through raft.
type callsInFlight struct {
	writes    []*call     // that wait to be proposed
	reads     []*call     // that wait for a round
	own       *proposal   // this node's entry in flight; nil: none
	round     readRound   // in flight, if it has a context
	confirmed []readRound // that wait to be applied
	readWait  uint64      // ticks after which a round is asked for again
	sequence  uint64      // of the last proposal or round

	conditions []*condition // steps of operators' requests

	// What has ended in this turn, and the inbox is owed.
	endedCalls int
	endedBytes int
}

// enqueue takes a call in.
func (n *node) enqueue(c *call) {
	c.since = n.clock.wall
	if c.record == nil {
		n.calls.reads = append(n.calls.reads, c)
	} else {
		n.calls.writes = append(n.calls.writes, c)
	}
}

// expire ends calls that found no leader for too long, or whose deadline is near.
func (n *node) expire() {
	var noLeader error
	if n.rn == nil {
		noLeader = errNotInitialized
	} else if n.raft.lead == 0 {
		noLeader = n.noLeader()
	}
	late := func(c *call) bool { return c.wait != 0 && n.clock.wall-c.since >= c.wait }
	gone := noLeader != nil && (n.rn == nil || n.election.leaderless >= n.ticksOf(leaderWait))
	overdue := func(c *call) bool { return gone || late(c) }
	end := func(calls []*call) []*call {
		return slices.DeleteFunc(calls, func(c *call) bool {
			ends := overdue(c)
			if ends {
				n.finish(c, outcome{err: cmp.Or(noLeader, context.DeadlineExceeded)}) // tells more than that the time is up
			}
			return ends
		})
	}
	n.calls.writes, n.calls.reads, n.calls.round.calls = end(n.calls.writes), end(n.calls.reads), end(n.calls.round.calls)
	for i := range n.calls.confirmed {
		n.calls.confirmed[i].calls = end(n.calls.confirmed[i].calls)
	}
	if n.calls.own == nil {
		return
	}
	wanted := false
	for _, c := range n.calls.own.calls {
		if late(c) {
			n.finish(c, outcome{err: errUnknownInTime})
		}
		wanted = wanted || !overdue(c)
	}
	if noLeader != nil && !wanted {
		n.failOwn()
	}
}

// finish ends a call, if it has not ended.
func (n *node) finish(c *call, o outcome) {
	if c.ended {
		return
	}
	c.ended = true
	n.calls.endedCalls++
	n.calls.endedBytes += len(c.record)
	if g := c.group; g == nil {
		c.done <- o
	} else if c.out, g.left = o, g.left-1; g.left == 0 {
		close(g.done)
	}
}

func (n *node) fail(calls []*call, err error) {
	for _, c := range calls {
		n.finish(c, outcome{err: err})
	}
}

// failOwn gives up the proposal in flight.
func (n *node) failOwn() {
	if n.calls.own != nil {
		n.fail(n.calls.own.calls, errOutcomeUnknown)
		n.calls.own = nil
	}
}

// failAll ends all that waits; err is for what was not proposed.
func (n *node) failAll(err error) {
	n.failOwn()
	n.retryReads()
	for _, r := range n.calls.confirmed {
		n.fail(r.calls, err)
	}
	n.fail(n.calls.reads, err)
	n.fail(n.calls.writes, err)
	n.calls.reads, n.calls.writes, n.calls.confirmed = nil, nil, nil
	for _, c := range n.calls.conditions {
		c.done <- err
	}
	n.calls.conditions = nil
}

// propose hands the writes that wait, or as many as fit into an entry, to raft.
func (n *node) propose() {
	if n.calls.own == nil && n.raft.lead != 0 && len(n.calls.writes) > 0 && n.mayPropose() {
		n.calls.own = n.nextProposal()
	}
	p := n.calls.own
	if p == nil || n.raft.lead == 0 || n.clock.now < p.again || !n.mayPropose() {
		return
	}
	if n.rn.Propose(p.data) != nil { // during a transfer, or if too much is uncommitted
		p.again = n.clock.now + 1
		return
	}
	n.proposed(len(p.data) + entryOverhead)
	n.catchup.pace.ownNext = false
	if n.raft.lead == n.id.raftID {
		p.again = never // it is lost only if leadership is: then syncSoftState says so
	} else {
		p.again = n.clock.now + n.electionTicks() + 1 // on its way to the leader, it can be lost without a word
	}
}

// nextProposal forms an entry of the writes at the head of the queue.
func (n *node) nextProposal() *proposal {
	n.calls.sequence++
	p := &proposal{sequence: n.calls.sequence}
	size, i := 0, 0
	for ; i < len(n.calls.writes) && (len(p.calls) == 0 || size+len(n.calls.writes[i].record) <= maxEntryBytes); i++ {
		c := n.calls.writes[i]
		if c.state.CompareAndSwap(callQueued, callProposed) {
			p.calls = append(p.calls, c)
			size += len(c.record) + 4
		} else {
			n.finish(c, outcome{}) // given up: nobody waits
		}
	}
	n.calls.writes = n.calls.writes[i:]
	if len(p.calls) == 0 {
		return nil
	}
	p.data = appendVarint(appendVarint(make([]byte, 0, size+24), 1, n.id.raftID), 2, p.sequence)
	for _, c := range p.calls {
		p.data = protowire.AppendTag(p.data, 3, protowire.BytesType)
		p.data = protowire.AppendBytes(p.data, c.record)
	}
	return p
}

// askRead starts a ReadIndex for all reads that wait (Raft thesis, section
// 6.4), if none is in flight. A leader asks only once it has applied an entry of its
// term; raft itself is less careful with one voter.
func (n *node) askRead() {
	if n.calls.round.ctx != nil || len(n.calls.reads) == 0 || n.raft.lead == 0 || n.raft.lead == n.id.raftID && !n.leads() {
		return
	}
	n.calls.sequence++ // a context is used once
	ctx := binary.BigEndian.AppendUint64(make([]byte, 0, readContextBytes), n.id.life)
	ctx = binary.BigEndian.AppendUint64(ctx, n.calls.sequence)
	n.calls.round, n.calls.reads = readRound{ctx: ctx, tick: n.clock.now, calls: n.calls.reads}, nil
	n.status.count.ReadRounds++
	n.rn.ReadIndex(ctx)
}

// retryReads makes the reads of the round in flight wait for another.
func (n *node) retryReads() {
	n.calls.reads, n.calls.round = append(n.calls.round.calls, n.calls.reads...), readRound{}
}

// readConfirmed learns the index that the reads of a round must have applied.
func (n *node) readConfirmed(rs raft.ReadState) {
	if !bytes.Equal(rs.RequestCtx, n.calls.round.ctx) {
		return // of an earlier round
	}
	n.calls.round.index = rs.Index
	n.calls.readWait = max(n.electionTicks()/2, 2*(n.clock.now-n.calls.round.tick))
	n.calls.confirmed, n.calls.round = append(n.calls.confirmed, n.calls.round), readRound{}
	n.releaseReads()
}

// releaseReads lets the reads go whose index is applied.
func (n *node) releaseReads() {
	n.calls.confirmed = slices.DeleteFunc(n.calls.confirmed, func(r readRound) bool {
		if r.index > n.store.index {
			return false
		}
		for _, c := range r.calls {
			n.finish(c, outcome{})
		}
		n.status.count.ReadsReleased += uint64(len(r.calls))
		return true
	})
}

func (n *node) checkConditions() {
	if n.err != nil {
		return // nobody asks a broken node for anything: run ends them
	}
	conds := n.calls.conditions
	n.calls.conditions = nil
	for _, c := range conds {
		if c.ctx.Err() != nil {
			continue
		}
		if ok, err := c.f(); ok || err != nil {
			c.done <- err
		} else {
			n.calls.conditions = append(n.calls.conditions, c)
		}
	}
}

// input is what one turn of the loop works on.
type input struct {
	ticks    int
	clock    uint64 // how many ticks the time since the start is long
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
	record []byte // the write as a field of a Batch; nil: a read
	state  atomic.Int32
	since  uint64       // when the loop took it, by its clock
	wait   uint64       // ticks until its deadline is near; 0: it has none
	ended  bool         // the loop's
	done   chan outcome // one slot: the loop never waits
	group  *group       // in place of done: what it is part of
	out    outcome      // for the group, once that is done
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

// condition is a step of an operator's request that waits for the state to be so.
type condition struct {
	ctx  context.Context
	f    func() (bool, error)
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
	closed       bool
	callBytes    int // of calls that have not ended, here or in the loop
	callCount    int
	messageBytes int
	wake         bell
}

// call queues calls, all or none.
func (b *inbox) call(calls ...*call) error {
	bytes := 0
	for _, c := range calls {
		bytes += len(c.record)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return errStopping
	case b.callCount+len(calls) > maxQueuedCalls || b.callBytes+bytes > maxQueuedBytes:
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
	if !b.closed {
		b.next.events = append(b.next.events, f)
		b.wake.ring()
	}
	return !b.closed
}

// deliver queues messages of a peer; false: there is no room, or the loop has ended.
func (b *inbox) deliver(ms []inbound) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.messageBytes >= maxInboundBytes {
		return false
	}
	for _, m := range ms {
		b.messageBytes += int(messageBytes(m.m))
	}
	b.next.messages = append(b.next.messages, ms...)
	b.wake.ring()
	return true
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

// close makes the inbox refuse everything from now on.
func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
}

// await waits until f, called in the loop after every turn, returns true or an
// error. Any goroutine may call it.
func (n *node) await(ctx context.Context, f func() (bool, error)) error {
	c := &condition{ctx: ctx, f: f, done: make(chan error, 1)}
	if !n.in.event(func() { n.calls.conditions = append(n.calls.conditions, c) }) {
		return errStopping
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
