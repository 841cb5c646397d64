// Tests of pauses.go.

package main

import (
	"testing"
	"time"
)

// TestPauses: a pause may be anything from nothing to its limit, and the limit doubles until
// it is longestPause.
func TestPauses(t *testing.T) {
	t.Parallel()
	limits := []time.Duration{200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond, time.Second, time.Second}
	var short, long [5]int // so many are in the first, and in the last quarter of what they may be
	for range 1000 {
		var p pauses
		for i, limit := range limits {
			pause := p.next()
			if pause < 0 || pause >= limit {
				t.Fatalf("pause %d is %v, the limit is %v", i+1, pause, limit)
			}
			if pause < limit/4 {
				short[i]++
			}
			if pause > limit-limit/4 {
				long[i]++
			}
		}
	}
	for i := range limits {
		if short[i] == 0 || long[i] == 0 {
			t.Errorf("of 1,000 pauses %d, %d are short and %d are long: they are not spread", i+1, short[i], long[i])
		}
	}
}
