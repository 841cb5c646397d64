// Answers that their clients have not taken: gRPC keeps them however large, and a client may
// open its window late, or never.

package main

import (
	"container/list"
	"context"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

const (
	// An answer over smallAnswer bytes takes one of largeAnswers places of the node, of which
	// a sharer has connLargeAnswers at most, and lateLargeAnswers once half of them are taken.
	// Smaller ones share smallAnswerBytes, of which a sharer has connSmallBytes, or
	// lateSmallBytes. Those up to uncountedAnswer are not counted here: gRPC takes more than
	// that for the call itself, which counts until it is closed (runningCalls). Nor could they
	// be: gRPC gives no buffer below leastCounted back.
	smallAnswer      = 64 << 10
	largeAnswers     = 16
	connLargeAnswers = 4
	lateLargeAnswers = 1
	smallAnswerBytes = 8 << 20
	connSmallBytes   = 1 << 20
	lateSmallBytes   = 2 * smallAnswer
	uncountedAnswer  = 1 << 10
	leastCounted     = uncountedAnswer + 1
	// stallTimeout is how long an answer may stay untaken while others wait for room. Then
	// its connection is closed: nothing else gives back what gRPC has of it.
	stallTimeout = 5 * time.Second
)

// gRPC's own pool has no size between 32 KiB and 1 MiB, and clears all of a
// buffer whenever it is used.
func init() {
	// It fails only over sizes that an int cannot have.
	pool, _ := mem.NewBinaryTieredBufferPool(8, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)
	experimental.SetDefaultBufferPool(pool)
}

// answers are the answers of all connections that are not taken yet. Any goroutine may call
// its methods.
type answers struct {
	large, small *room

	mu      sync.Mutex
	untaken list.List // of *answerPlace, in the order in which they were given
}

// newAnswers makes the answers of a limiter's connections.
func newAnswers(l *limiter) *answers {
	return &answers{
		large: newRoom(roomLimits{largeAnswers, connLargeAnswers, lateLargeAnswers}, l.cutStalled),
		small: newRoom(roomLimits{smallAnswerBytes, connSmallBytes, lateSmallBytes}, l.cutStalled),
	}
}

// answerPool is the pool of one answer's buffer. gRPC gives the buffer back when it is written,
// or its call was cancelled. It just drops the buffer when the connection ends, or if the call
// ended before gRPC queued it: then lost gives the place back.
type answerPool struct {
	mem.NopBufferPool // gRPC's own has buffers that are up to twice too large
	place             *answerPlace
	lost              runtime.Cleanup // runs when the collector finds that nobody has the pool
}

// answerPlace is what an answer has of a room.
type answerPlace struct {
	answers *answers
	of      sharer
	room    *room
	amount  int
	since   time.Time
	element *list.Element // of untaken; nil: the place was given back
}

// admit waits for room for an answer of so many bytes.
func (as *answers) admit(ctx context.Context, of sharer, bytes int) (*answerPool, error) {
	p := &answerPlace{answers: as, of: of, room: as.small, amount: bytes}
	if bytes > smallAnswer {
		p.room = as.large
		p.amount = 1
	}
	if !p.room.tryTake(of, p.amount) {
		soon, cancel := beforeDeadline(ctx)
		defer cancel()
		if err := p.room.take(soon, of, p.amount); err != nil {
			return nil, err
		}
	}
	if !as.add(p) {
		p.room.release(of, p.amount)
		return nil, errOverloaded
	}
	a := &answerPool{place: p}
	a.lost = runtime.AddCleanup(a, (*answerPlace).giveBack, p)
	return a, nil
}

// add takes a place in; false: its connection is closed.
func (as *answers) add(p *answerPlace) bool {
	as.mu.Lock()
	defer as.mu.Unlock()
	if p.of.conn.isClosed {
		return false
	}
	p.since = time.Now()
	p.element = as.untaken.PushBack(p)
	if p.of.conn.untaken == nil {
		p.of.conn.untaken = map[*answerPlace]bool{}
	}
	p.of.conn.untaken[p] = true
	return true
}

// giveBack gives a place back, once.
func (p *answerPlace) giveBack() {
	p.answers.mu.Lock()
	defer p.answers.mu.Unlock()
	p.answers.remove(p)
}

// remove gives a place back, if it has not been. mu is held.
func (as *answers) remove(p *answerPlace) {
	if p.element == nil {
		return
	}
	as.untaken.Remove(p.element)
	p.element = nil
	delete(p.of.conn.untaken, p)
	p.room.release(p.of, p.amount)
}

// closed gives the places of a connection back, for it is closed.
func (as *answers) closed(c *limitedConn) {
	as.mu.Lock()
	defer as.mu.Unlock()
	c.isClosed = true
	for p := range c.untaken {
		as.remove(p)
	}
}

// stalled returns the connection whose answer has been untaken for longest, if that is
// longer than stallTimeout; nil: there is none.
func (as *answers) stalled(now time.Time) *limitedConn {
	as.mu.Lock()
	defer as.mu.Unlock()
	oldest := as.untaken.Front()
	if oldest == nil {
		return nil
	}
	p := oldest.Value.(*answerPlace)
	if now.Sub(p.since) < stallTimeout {
		return nil
	}
	return p.of.conn
}

// cutStalled closes the connections that keep others waiting: those with an answer that they
// have not taken for stallTimeout.
func (l *limiter) cutStalled() {
	now := time.Now()
	for c := l.answers.stalled(now); c != nil; c = l.answers.stalled(now) {
		l.mu.Lock()
		l.drop(c)
		l.counts.stalled.Add(1)
		l.mu.Unlock()
	}
}

// fit has an answer count as what it has become, which is not more than it had room for. A large
// one that has become small leaves its place, if there is room for it among the small ones.
func (a *answerPool) fit(bytes int) {
	p := a.place
	isLarge := p.room == p.answers.large
	if !isLarge {
		p.shrink(bytes)
		return
	}
	small := p.answers.small
	if bytes > smallAnswer || !small.tryTake(p.of, bytes) {
		return
	}
	if !p.move(small, bytes) {
		small.release(p.of, bytes) // the connection is closed: nothing counts any more
	}
}

// shrink gives a part of a place back.
func (p *answerPlace) shrink(amount int) {
	p.answers.mu.Lock()
	defer p.answers.mu.Unlock()
	if p.element == nil || amount >= p.amount {
		return
	}
	p.room.release(p.of, p.amount-amount)
	p.amount = amount
}

// move makes a place one of another room, of which the caller has taken an amount for it; false:
// the place was given back before.
func (p *answerPlace) move(to *room, amount int) bool {
	p.answers.mu.Lock()
	defer p.answers.mu.Unlock()
	if p.element == nil {
		return false
	}
	p.room.release(p.of, p.amount)
	p.room = to
	p.amount = amount
	return true
}

// Put implements mem.BufferPool.
func (a *answerPool) Put(*[]byte) {
	a.lost.Stop()
	a.place.giveBack()
}

// encode encodes an answer that has its place.
func (a *answerPool) encode(m proto.Message) (*encoded, error) {
	b, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 0, max(proto.Size(m), leastCounted)), m)
	if err != nil {
		a.Put(nil)
		return nil, err
	}
	return &encoded{b, a}, nil
}
