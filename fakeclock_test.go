// Tests in a bubble of testing/synctest, where time passes when all wait.

package main

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// oneProc has everything run on one processor while a bubble is open and the race
// detector is on. The timers of a bubble share one context of the detector, which no lock
// guards (runtime.unlockAndRun, Go 1.26): the goroutine that lets time pass uses it, and
// so does one that polls the channel of a timer that has run out. On two processors at a
// time, the detector's stack of that context is torn, and the process crashes in
// StackDepot or with "unsafe.Slice: len out of range".
var oneProc struct {
	sync.Mutex
	bubbles int // that are open
	before  int // processors while none is
}

// withFakeClock runs f as synctest.Test does.
func withFakeClock(t *testing.T, f func(*testing.T)) {
	t.Helper()
	if hasRaceDetector() {
		enterOneProc()
		defer leaveOneProc()
	}
	synctest.Test(t, f)
}

func enterOneProc() {
	oneProc.Lock()
	defer oneProc.Unlock()
	if oneProc.bubbles == 0 {
		oneProc.before = runtime.GOMAXPROCS(1)
	}
	oneProc.bubbles++
}

func leaveOneProc() {
	oneProc.Lock()
	defer oneProc.Unlock()
	oneProc.bubbles--
	if oneProc.bubbles == 0 {
		runtime.GOMAXPROCS(oneProc.before)
	}
}

// TestFakeClockUnderRace crashes within a second under the race detector if more than one
// processor runs a bubble.
func TestFakeClockUnderRace(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		for range 100 {
			var polled sync.WaitGroup
			for range 100 {
				polled.Add(1)
				time.AfterFunc(time.Second, func() {
					defer polled.Done()
					pollTimers()
				})
			}
			polled.Wait()
		}
	})
}

// pollTimers polls the channels of timers that have run out.
func pollTimers() {
	for range 20 {
		timer := time.NewTimer(0)
		select {
		case <-timer.C:
		default:
		}
	}
}
