// What many calls share: memory for answers, for writes, for what Pipelines ask.

package main

import (
	"context"
	"sync"
	"time"
)

// room is so many bytes, or places, that connections share. Whoever finds it full waits for
// its turn: it is the turn of the connection that has the least of it. Any goroutine may
// call its methods.
type room struct {
	limit, share int    // of all connections together, and of each
	stalled      func() // called each roomTick while somebody waits

	mu      sync.Mutex
	used    int
	waiters int                          // of all holders: mostly there is none, and nobody to look for
	holders map[*limitedConn]*roomHolder // that have some of it, or wait for it
}

// roomHolder is what one connection has of a room. The room's mu guards it.
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

func newRoom(limit, share int, stalled func()) *room {
	return &room{limit: limit, share: share, stalled: stalled, holders: map[*limitedConn]*roomHolder{}}
}

// take takes an amount for a connection, at most its share, and waits until it is there.
func (r *room) take(ctx context.Context, c *limitedConn, amount int) error {
	w := &roomWaiter{amount: amount, ready: make(chan struct{})}
	r.mu.Lock()
	h := r.holders[c]
	if h == nil {
		h = &roomHolder{}
		r.holders[c] = h
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
	tick := time.NewTicker(roomTick)
	defer tick.Stop()
	for {
		select {
		case <-w.ready:
			return nil
		case <-tick.C:
			r.stalled()
		case <-ctx.Done():
			r.leave(c, w)
			return ctx.Err()
		}
	}
}

// tryTake takes an amount if it is there and nobody waits for it.
func (r *room) tryTake(c *limitedConn, amount int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.holders[c]
	if h == nil {
		h = &roomHolder{}
	}
	if len(h.waiting) > 0 || h.used+amount > r.share || r.used+amount > r.limit {
		return false
	}
	h.used += amount
	r.used += amount
	r.holders[c] = h
	return true
}

// release gives back an amount that was taken.
func (r *room) release(c *limitedConn, amount int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.holders[c]
	h.used -= amount
	r.used -= amount
	r.forget(c, h)
	r.serve()
}

// leave ends the wait of somebody who waits no longer, or gives back what was taken just now.
func (r *room) leave(c *limitedConn, w *roomWaiter) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.holders[c]
	for i, other := range h.waiting {
		if other == w {
			h.waiting = append(h.waiting[:i:i], h.waiting[i+1:]...)
			r.waiters--
			r.forget(c, h)
			r.serve()
			return
		}
	}
	h.used -= w.amount
	r.used -= w.amount
	r.forget(c, h)
	r.serve()
}

// serve lets those take what they wait for whose turn it is. mu is held.
func (r *room) serve() {
	for r.waiters > 0 {
		h := r.next()
		if h == nil || r.used+h.waiting[0].amount > r.limit {
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

// next returns the connection whose turn it is: of those that wait and have not all of their
// share, the one that has least; nil: there is none. mu is held.
func (r *room) next() *roomHolder {
	var next *roomHolder
	for _, h := range r.holders {
		if len(h.waiting) == 0 || h.used+h.waiting[0].amount > r.share {
			continue
		}
		if next == nil || h.used < next.used {
			next = h
		}
	}
	return next
}

// forget drops a connection that has nothing and waits for nothing. mu is held.
func (r *room) forget(c *limitedConn, h *roomHolder) {
	if h.used == 0 && len(h.waiting) == 0 {
		delete(r.holders, c)
	}
}
