// The pauses of what a sub-command tries again and again.

package main

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	// firstPause is the longest that the first pause may be, and longestPause the longest of
	// all: so much later than possible is noticed that a try succeeds.
	firstPause   = 200 * time.Millisecond
	longestPause = time.Second
)

// pauses are the pauses between the tries of one sub-command. Each is random, up to a limit
// that doubles with every try: commands that a node has failed at the same moment do not all
// come back at the same moment, and many that wait cost a node little. The zero value is
// that before the first pause.
type pauses struct {
	limit time.Duration // of the last pause
}

// next draws a pause.
func (p *pauses) next() time.Duration {
	p.limit = min(max(2*p.limit, firstPause), longestPause)
	return rand.N(p.limit)
}

// wait makes a pause, which ends early if ctx does.
func (p *pauses) wait(ctx context.Context) { sleep(ctx, p.next()) }
