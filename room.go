// What many calls share: memory for answers, for writes, for what Pipelines ask.

package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// room is an amount of bytes, or of places, that sharers have in common. Whoever finds it full
// waits. When there is room again, it is the turn of the sharer that has least: until what that one
// waits for is there, nobody else takes anything. Any goroutine may call its methods.
type room struct {
	limits  roomLimits
	stalled func()        // called each roomTick while somebody waits
	waited  atomic.Uint64 // takes that had to wait, since the start

	mu      sync.Mutex
	used    int
	waiters int                    // of all holders: mostly there is none, and nobody to look for
	holders map[sharer]*roomHolder // that have some of it, or wait for it
}

// roomLimits are how much there is of a room, and how much of it each sharer may have: share, and
// late once half of the room is taken. So a few sharers that give nothing back have half of it, and
// leave the other half to many. A sharer that has nothing may have one amount, however large.
type roomLimits struct {
	all, share, late int
}

// sharer is who has a part of a room: the unary calls of a connection, or its streams. A
// connection whose streams are not read can still make calls.
type sharer struct {
	conn    *limitedConn
	streams bool
}

// roomHolder is what one sharer has of a room. The room's mu guards it.
type roomHolder struct {
	used    int
	waiting []*roomWaiter // in the order in which they came
}

type roomWaiter struct {
	amount int
	ready  chan struct{} // closed when the amount was taken
}

// roomTick is between two looks for connections that stall, while somebody waits.
const roomTick = time.Second

func newRoom(limits roomLimits, stalled func()) *room {
	return &room{limits: limits, stalled: stalled, holders: map[sharer]*roomHolder{}}
}

// take takes an amount for a sharer, at most all of the room, and waits until it is there.
func (r *room) take(ctx context.Context, s sharer, amount int) error {
	w := &roomWaiter{amount: amount, ready: make(chan struct{})}
	r.mu.Lock()
	h := r.holders[s]
	if h == nil {
		h = &roomHolder{}
		r.holders[s] = h
	}
	h.waiting = append(h.waiting, w)
	r.waiters++
	r.serve()
	r.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	default:
	}
	r.waited.Add(1)
	tick := time.NewTicker(roomTick)
	defer tick.Stop()
	for {
		select {
		case <-w.ready:
			return nil
		case <-tick.C:
			r.stalled()
		case <-ctx.Done():
			r.leave(s, w)
			return ctx.Err()
		}
	}
}

// tryTake takes an amount if it is there and it is nobody else's turn, and does not wait.
func (r *room) tryTake(s sharer, amount int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.holders[s]
	if h == nil {
		h = &roomHolder{}
	}
	// Who came earlier goes first: else there might never be room for a large amount.
	othersFirst := len(h.waiting) > 0 || r.next() != nil
	if othersFirst || !r.mayHave(h, amount) || r.used+amount > r.limits.all {
		return false
	}
	h.used += amount
	r.used += amount
	r.holders[s] = h
	return true
}

// release gives back an amount that was taken.
func (r *room) release(s sharer, amount int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.holders[s]
	h.used -= amount
	r.used -= amount
	r.forget(s, h)
	r.serve()
}

// taken is how much of the room is taken.
func (r *room) taken() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return uint64(r.used)
}

// leave ends a wait. If the amount was taken just before, it gives that back.
func (r *room) leave(s sharer, w *roomWaiter) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.holders[s]
	for i, other := range h.waiting {
		if other == w {
			h.waiting = append(h.waiting[:i:i], h.waiting[i+1:]...)
			r.waiters--
			r.forget(s, h)
			r.serve()
			return
		}
	}
	h.used -= w.amount
	r.used -= w.amount
	r.forget(s, h)
	r.serve()
}

// serve lets those take what they wait for whose turn it is. mu is held.
func (r *room) serve() {
	for h := r.next(); h != nil; h = r.next() {
		if r.used+h.waiting[0].amount > r.limits.all {
			return
		}
		w := h.waiting[0]
		h.waiting = h.waiting[1:]
		r.waiters--
		h.used += w.amount
		r.used += w.amount
		close(w.ready)
	}
}

// mayHave reports whether a sharer's limit allows it an amount more. mu is held.
func (r *room) mayHave(h *roomHolder, amount int) bool {
	if h.used == 0 {
		return true
	}
	share := r.limits.share
	if r.used >= r.limits.all/2 {
		share = r.limits.late
	}
	return h.used+amount <= share
}

// next returns the sharer whose turn it is: of those that wait, and whose limit allows what they
// wait for, the one that has least; nil: there is none. mu is held.
func (r *room) next() *roomHolder {
	if r.waiters == 0 {
		return nil
	}
	var next *roomHolder
	for _, h := range r.holders {
		if len(h.waiting) == 0 || !r.mayHave(h, h.waiting[0].amount) {
			continue
		}
		if next == nil || h.used < next.used {
			next = h
		}
	}
	return next
}

// forget drops a sharer that has nothing and waits for nothing. mu is held.
func (r *room) forget(s sharer, h *roomHolder) {
	if h.used == 0 && len(h.waiting) == 0 {
		delete(r.holders, s)
	}
}
