package load

import (
	"context"
	"time"
)

// overtime is how long after the end of a run what was due before is still sent.
const overtime = time.Second

// sleep is another in tests with a fake clock.
var sleep = (*timer).sleep

// pacer says when operations are due. Whoever is free takes the next; one at a
// time sleeps until it is due. An operation is due at its time whether anybody
// is free or not: that is what its latency counts from.
type pacer struct {
	start, end time.Time
	interval   float64 // in nanoseconds

	turn  chan struct{} // one slot: full while somebody has what is below
	taken uint64
	timer *timer
}

func newPacer(start, end time.Time, rate float64) (*pacer, error) {
	t, err := newTimer()
	return &pacer{start: start, end: end, interval: float64(time.Second) / rate, turn: make(chan struct{}, 1), timer: t}, err
}

func (p *pacer) close() { p.timer.close() }

func (p *pacer) due(i uint64) time.Time {
	return p.start.Add(time.Duration(float64(i) * p.interval))
}

// take waits until an operation is due and returns when it was, and others
// that are due by now, n in all; none: the end has come.
func (p *pacer) take(ctx context.Context, n int, due []time.Time) []time.Time {
	p.turn <- struct{}{}
	defer func() { <-p.turn }()
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
			sleep(p.timer, next.Sub(now))
		}
	}
	return due
}

// unsent counts what was due in the time measured and taken by nobody. It
// records how long each had waited at the end: its latency would have been
// more. It is called when nobody takes any more.
func (p *pacer) unsent(begin time.Time, h *Histogram) (n uint64) {
	for ; p.due(p.taken).Before(p.end); p.taken++ {
		if due := p.due(p.taken); !due.Before(begin) {
			h.Record(p.end.Add(overtime).Sub(due))
			n++
		}
	}
	return n
}
