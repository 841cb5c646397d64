package load

import (
	"context"
	"sync"
	"time"
)

// overtime is how long after the end of a run what was due before is still sent.
const overtime = time.Second

// pacer says when operations are due. Whoever is free takes the next; one at a
// time sleeps until it is due. An operation is due at its time whether anybody
// is free or not: that is what its latency counts from.
type pacer struct {
	start, end time.Time
	interval   float64 // in nanoseconds

	mu    sync.Mutex
	taken uint64
	timer *timer
}

func newPacer(start, end time.Time, rate float64) (*pacer, error) {
	t, err := newTimer()
	return &pacer{start: start, end: end, interval: float64(time.Second) / rate, timer: t}, err
}

func (p *pacer) close() { p.timer.close() }

func (p *pacer) due(i uint64) time.Time {
	return p.start.Add(time.Duration(float64(i) * p.interval))
}

// take waits until an operation is due and returns when it was, and others
// that are due by now, n in all; none: the end has come.
func (p *pacer) take(ctx context.Context, n int, due []time.Time) []time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ctx.Err() == nil && len(due) < n {
		now, next := time.Now(), p.due(p.taken)
		switch {
		case !next.Before(p.end) || now.Sub(p.end) > overtime:
			return due
		case !next.After(now):
			due = append(due, next)
			p.taken++
		case len(due) > 0:
			return due
		default:
			p.timer.sleep(next.Sub(now))
		}
	}
	return due
}

// unsent counts what was due in the time measured and taken by nobody. It
// records how long each had waited at the end: its latency would have been
// more.
func (p *pacer) unsent(begin time.Time, h *Histogram) (n uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ; p.due(p.taken).Before(p.end); p.taken++ {
		if due := p.due(p.taken); !due.Before(begin) {
			h.Record(p.end.Add(overtime).Sub(due))
			n++
		}
	}
	return n
}
