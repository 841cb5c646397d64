// The inbox: where all goroutines leave work for the loop.

package main

import (
	"context"
	"sync"
	"sync/atomic"
)

// input is what one turn of the loop works on.
type input struct {
	ticks    int
	clock    uint64 // how many ticks the time since the start is long
	calls    []*call
	messages []inbound
	events   []func()
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
