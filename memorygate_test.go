package main

import (
	"io"
	"math"
	"net"
	"runtime/debug"
	"sync"
	"testing"
)

// TestMemoryGate: whoever would read more waits for the collector when the heap is nearly at its
// limit, once for all that wait; and not for each 32 KiB if nothing can be freed.
func TestMemoryGate(t *testing.T) {
	const least = 800
	var inUse, garbage uint64
	collected := 0
	g := &memoryGate{least: least, inUse: func() uint64 { return inUse }}
	g.level.Store(least)
	g.collect = func() {
		collected++
		inUse -= garbage
		garbage = 0
	}
	for _, step := range []struct {
		what           string
		inUse, garbage uint64
		want           int
	}{
		{"there is room", least - 1, 300, 0},
		{"there is garbage", least, 300, 1},
		{"there is room again", least - 1, 0, 1},
		{"all is in use", least + 50, 0, 2},
		{"a little more is", least + 50 + least/gateShare - 1, 0, 2},
		{"much more is", least + 50 + least/gateShare, 0, 3},
		{"it was freed", least - 1, 0, 3},
		{"and comes back", least, 0, 4},
	} {
		inUse = step.inUse
		garbage = step.garbage
		g.pass()
		if collected != step.want {
			t.Errorf("%s: it has collected %d times, want %d", step.what, collected, step.want)
		}
	}
}

// TestMemoryGateCollectsOnce: of many that wait, one collects.
func TestMemoryGateCollectsOnce(t *testing.T) {
	g := &memoryGate{least: 800}
	g.level.Store(g.least)
	var mu sync.Mutex
	inUse := uint64(1000)
	g.inUse = func() uint64 {
		mu.Lock()
		defer mu.Unlock()
		return inUse
	}
	collected := 0
	waiting := make(chan bool, 8)
	goOn := make(chan bool)
	g.collect = func() {
		collected++
		waiting <- true
		<-goOn
		mu.Lock()
		defer mu.Unlock()
		inUse = 100
	}
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(g.pass)
	}
	<-waiting
	close(goOn)
	readers.Wait()
	if collected != 1 {
		t.Errorf("it has collected %d times", collected)
	}
}

// TestMemoryGateLimit: the gate goes by Go's limit, and is open without one.
func TestMemoryGateLimit(t *testing.T) {
	before := debug.SetMemoryLimit(math.MaxInt64)
	defer debug.SetMemoryLimit(before)
	if g := newMemoryGate(); g.least != math.MaxUint64 || !g.isOpen() {
		t.Errorf("without a limit it is %d", g.least)
	}
	debug.SetMemoryLimit(80 << 30)
	if g := newMemoryGate(); g.least != 70<<30 || !g.isOpen() {
		t.Errorf("of 80 GiB it is %d", g.least)
	}
}

// TestReadersPassTheMemoryGate: a connection is read on without the collector for as long as the
// heap has room, and not otherwise.
func TestReadersPassTheMemoryGate(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	go func() {
		_, _ = there.Write(make([]byte, 4*readAhead))
		_ = there.Close()
	}()
	l := newLimiter(&refusing{}, wide, nil, quiet())
	inUse := uint64(799)
	collected := 0
	l.memory = &memoryGate{least: 800, inUse: func() uint64 { return inUse }, collect: func() { collected++; inUse = 0 }}
	l.memory.level.Store(800)
	c := &limitedConn{Conn: here, l: l, open: newOpenCalls()}
	b := make([]byte, readAhead)
	for i, want := range []int{0, 0, 1, 1} {
		if i == 2 {
			inUse = 800
		}
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		if collected != want {
			t.Errorf("after %d KiB it has collected %d times, want %d", (i+1)*readAhead>>10, collected, want)
		}
	}
}
