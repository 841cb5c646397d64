// Tests of the space on the disk.

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"raft-key-value/kvpb"
)

// newDiskOf is a cluster of one node with a disk of so many bytes.
func newDiskOf(t *testing.T, space uint64) *diskNode {
	t.Helper()
	fs := newSimFS()
	fs.space = space
	p, err := openDiskNode(fs, 1)
	if err != nil {
		t.Fatal(err)
	}
	p.n.inbox.event(func() { _, _ = p.n.bootstrap(nil) })
	if err := p.settle(); err != nil {
		t.Fatal(err)
	}
	return p
}

// look has the node look at the free space.
func (p *diskNode) look(t *testing.T) {
	t.Helper()
	free, _ := p.fs.free(simDir)
	p.n.inbox.event(func() { p.n.noteSpace(free) })
	if err := p.settle(); err != nil {
		t.Fatalf("%v: %d bytes are free, %d should be", err, free, p.n.quota.space.reserve)
	}
}

// write makes a call, and looks at the free space.
func (p *diskNode) write(t *testing.T, w *kvpb.Write) outcome {
	t.Helper()
	c := &call{write: mustMarshal(t, w), done: make(chan outcome, 1)}
	if err := p.n.inbox.call(c); err != nil {
		t.Fatal(err)
	}
	if err := p.settle(); err != nil {
		t.Fatal(err)
	}
	p.look(t)
	return <-c.done
}

// TestDiskSpace: whatever the size of the disk and of values, it is never used up: Sets are
// refused before. Deletes are not, however many, and once they have made room, Sets are
// taken again.
func TestDiskSpace(t *testing.T) {
	for _, space := range []uint64{64 << 10, 200 << 10, 1 << 20} {
		for _, size := range []int{100, 1000, 5000} {
			t.Run(fmt.Sprint(space, size), func(t *testing.T) {
				p := newDiskOf(t, space)
				value := strings.Repeat("v", size)
				fill := func() (keys int) {
					for {
						o := p.write(t, setWrite(fmt.Sprintf("k%d", keys), value))
						if o.err == nil {
							keys++
							continue
						}
						if !errors.Is(o.err, errQuota) || !strings.Contains(o.err.Error(), "disk of node 1") {
							t.Fatalf("after %d keys: %v", keys, o.err)
						}
						return keys
					}
				}
				first := fill()
				if uint64(first*size) < space/8 {
					t.Errorf("%d keys of %d bytes fill %d", first, size, space)
				}
				if m := p.n.metrics(); m.WritesRefused == "" || m.DiskFree == 0 || m.DiskReserve <= m.DiskFree {
					t.Errorf("refused: %q; %d are free, %d should be", m.WritesRefused, m.DiskFree, m.DiskReserve)
				}
				if o := p.write(t, setWrite("k0", "smaller")); !errors.Is(o.err, errQuota) {
					t.Errorf("a smaller value is written: %v", o.err)
				}
				for i := range first {
					if o := p.write(t, deleteWrite(fmt.Sprintf("k%d", i))); o.err != nil {
						t.Fatal(o.err)
					}
				}
				for range 3 {
					p.look(t)
				}
				if m := p.n.metrics(); m.WritesRefused != "" {
					t.Fatalf("all is deleted, and %q", m.WritesRefused)
				}
				if again := fill(); again < first/2 {
					t.Errorf("the second time, %d keys fill it, the first time %d", again, first)
				}
				if _, err := openDiskNode(p.fs.restart(false), 1); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestSnapshotLength: of keys or of what sessions were answered, a snapshot is about as long as the
// reserve counts on, and not longer.
func TestSnapshotLength(t *testing.T) {
	keys := filledStore(3000)
	sessions := newTestStore()
	sessions.version = 1 << 50 // as after a restore
	for id := range uint64(20) {
		tryBatch(t, sessions, 1, 1+id, openWriteOf(1+id, "client/"+strings.Repeat("o", 60)))
		for i := range uint64(maxAnswers) {
			tryBatch(t, sessions, 2, id*maxAnswers+i+1, withID(1+id, 1+i, setWrite("k", "v")))
		}
	}
	for name, s := range map[string]*store{"keys": keys, "sessions": sessions} {
		got := uint64(len(snapshotBytes(t, s)))
		if most := s.snapshotLength(); got > most+1<<10 || got < most/2 {
			t.Errorf("%s: it has %d bytes, and %d are counted on", name, got, most)
		}
	}
}

// TestDiskOfOther: a member's disk that is low counts until it says otherwise, and no longer than
// diskLowLasts, unless it says so again; its limit counts on.
func TestDiskOfOther(t *testing.T) {
	l := newLone(t, leading)
	l.n.quota = newQuota(1 << 20)
	sequence := uint64(0)
	hears := func(isLow bool) {
		sequence++
		r := report(3, sequence, 1<<20)
		r.DiskLow = isLow
		r.DiskFree = 77
		r.DiskReserve = 1234
		l.n.inbox.event(func() { l.n.learnRooms(l.hellos[0], []*kvpb.RoomReport{r}) })
		l.turn(0)
	}
	want := func(refused bool, when string) {
		t.Helper()
		c := &call{write: mustMarshal(t, setWrite("k", "v")), done: make(chan outcome, 1)}
		if err := l.n.inbox.call(c); err != nil {
			t.Fatal(err)
		}
		l.turn(0)
		l.ack(2)
		o := <-c.done
		if errors.Is(o.err, errQuota) != refused {
			t.Errorf("%s: %v", when, o.err)
		}
		for _, part := range []string{"disk of node 3", "77", "1234"} {
			if refused && !strings.Contains(o.err.Error(), part) {
				t.Errorf("%v says nothing of %s", o.err, part)
			}
		}
		if got := l.n.metrics().WritesRefused != ""; got != refused {
			t.Errorf("%s: status says that Sets are refused: %v", when, got)
		}
	}
	passes := func(ticks uint64) {
		for range ticks {
			l.turn(1)
			l.ack(2, 3) // or it would lead no more
		}
	}
	most := l.n.ticksOf(diskLowLasts)
	want(false, "at first")
	hears(true)
	want(true, "it is low")
	passes(most - 10)
	want(true, "just before its end")
	hears(true)
	passes(most - 10)
	want(true, "said again")
	hears(false)
	want(false, "not low any more")
	hears(true)
	passes(most + 10)
	want(false, "not said again")
	hears(true)
	l.n.forgetRooms([]uint64{3})
	want(false, "removed")
}

// TestSmallSnapshot: one that would make room is wanted if there is space for it, none is on its way, and
// the directory is a node's.
func TestSmallSnapshot(t *testing.T) {
	p := newDiskOf(t, 0)
	d := &p.n.durable
	d.lastBytes = 1 << 20
	least := p.n.store.snapshotLength() + uint64(d.disk.segmentBytes)
	index := d.snapshotIndex
	for name, test := range map[string]struct {
		free, saving, index uint64
		want                bool
	}{
		"space for it":        {least, 0, index, true},
		"a byte too few":      {least - 1, 0, index, false},
		"one is on its way":   {least, 1, index, false},
		"a directory of none": {least, 0, 0, false},
	} {
		p.n.quota.space.free = test.free
		d.saving = test.saving
		d.snapshotIndex = test.index
		if got := p.n.wantsSmallSnapshot(); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestSpaceThatIsNotKnown: if looks fail for good, the last one counts for spaceLasts. Then no Set is
// refused, whatever it has said, until there is another one.
func TestSpaceThatIsNotKnown(t *testing.T) {
	for _, free := range []uint64{1, 1 << 40} {
		p := newDiskOf(t, 0)
		turn := func(ticks uint64) {
			for range ticks {
				in := p.n.inbox.take()
				in.ticks = 1
				p.n.turn(in)
			}
		}
		reports := func(free uint64, err error) {
			p.n.inbox.event(func() { p.n.noteLook(free, err) })
			turn(1)
		}
		wantLow := func(want bool, when string) {
			t.Helper()
			m := p.n.metrics()
			if got := m.WritesRefused != ""; got != want || p.n.quota.own.DiskLow != want {
				t.Errorf("of %d free bytes, %s: %q", free, when, m.WritesRefused)
			}
		}
		isLow := free == 1
		reports(free, nil)
		wantLow(isLow, "at first")
		lasts := p.n.ticksOf(spaceLasts)
		reports(7, errors.New("nobody answers"))
		turn(lasts - 5)
		wantLow(isLow, "just before it counts no more")
		reports(free, nil)
		turn(lasts - 5)
		wantLow(isLow, "looked at again")
		for range lasts {
			reports(7, errors.New("nobody answers"))
		}
		wantLow(false, "after failures")
		if m := p.n.metrics(); m.DiskFree != 0 || m.DiskReserve != 0 {
			t.Errorf("%d are free, %d should be, and nothing is known", m.DiskFree, m.DiskReserve)
		}
		c := &call{write: mustMarshal(t, setWrite("k", "v")), done: make(chan outcome, 1)}
		if err := p.n.inbox.call(c); err != nil {
			t.Fatal(err)
		}
		if err := p.settle(); err != nil {
			t.Fatal(err)
		}
		if o := <-c.done; o.err != nil {
			t.Error(o.err)
		}
		reports(free, nil)
		wantLow(isLow, "looked at once more")
	}
}

// TestSpaceIsWatched: what a look says reaches the loop, and that it has failed.
func TestSpaceIsWatched(t *testing.T) {
	for _, want := range []error{nil, errors.New("nobody answers")} {
		p := newDiskOf(t, 0)
		p.n.durable.disk.fs = spaceFS{p.n.durable.disk.fs, want}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			p.n.watchSpace(ctx)
		}()
		eventually(t, func() error {
			p.n.turn(p.n.inbox.take())
			s := p.n.quota.space
			if s.failure == want && s.known == (want == nil) && (want != nil || s.free == 77) {
				return nil
			}
			return fmt.Errorf("%+v", s)
		})
		cancel()
		<-ended
	}
}

// spaceFS is a file system that says how much is free, or fails to.
type spaceFS struct {
	fileSystem
	err error
}

func (s spaceFS) free(string) (uint64, error) { return 77, s.err }

// TestLowDiskIsTold: a node whose disk is low says so at once, and again while it is; and when it
// is not any more.
func TestLowDiskIsTold(t *testing.T) {
	p := newDiskOf(t, 0)
	l := &toldRooms{lone: &lone{t: t, n: p.n}}
	p.n.net = l
	turn := func() {
		in := p.n.inbox.take()
		in.ticks = 1
		p.n.turn(in)
	}
	turn()
	said := func(free uint64) (low []bool) {
		l.news = nil
		p.n.inbox.event(func() { p.n.noteSpace(free) })
		turn()
		for _, news := range l.news {
			for _, r := range news {
				low = append(low, r.DiskLow)
			}
		}
		return low
	}
	reserve := p.n.durable.reserve(0, p.n.opts.logBytes, 0)
	for i, step := range []struct {
		free uint64
		want string
	}{{reserve, "[]"}, {reserve - 1, "[true]"}, {1, "[]"}, {reserve, "[]"}, {2 * reserve, "[false]"}, {1, "[true]"}} {
		if got := fmt.Sprint(said(step.free)); got != step.want {
			t.Errorf("step %d: it says %s, want %s", i, got, step.want)
		}
	}
	last := uint64(0)
	for range 3 {
		l.news = nil
		for range p.n.ticksOf(diskLowAgain) {
			turn()
		}
		if len(l.news) != 1 || !l.news[0][0].DiskLow || l.news[0][0].Sequence <= last {
			t.Fatalf("in 5 s it says %v", l.news)
		}
		last = l.news[0][0].Sequence
	}
}
