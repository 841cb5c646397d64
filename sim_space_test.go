// The simulator's disks that are about to be full: what nodes are told of the free space, and what
// follows. What they draw is from a source of its own, so that other runs stay as they were.

package main

import (
	"errors"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// lookEvery is between two looks at the free space, in ticks.
	lookEvery = 5
	// lowSpace is free on a disk that is low.
	lowSpace = 1
	// enoughSpace is free on a disk that is not low.
	enoughSpace = 1 << 40
)

// siteSpace is what a site says of the free space on its disk.
type siteSpace struct {
	lowUntil int64 // until then it is low
	muteFrom int64 // from then on looks fail
}

// toldSpace is what a process was told of its disk by the last look that did not fail.
type toldSpace struct {
	isLow bool
	at    uint64 // tick of the node
	// onTheWay are looks that it has not been told of.
	onTheWay int
	// proposed is the sequence of the last proposal that was checked.
	proposed uint64
}

// errMute is what looks end with that fail.
var errMute = errors.New("the file system does not answer")

// fill has a disk, or all, be low for a while. Of one in eight, looks fail in the midst of that, until
// it is low the next time.
func (s *sim) fill() {
	if s.calm {
		return
	}
	s.after(20+150*s.fills.ExpFloat64(), nil, s.fill)
	isAll := s.fills.IntN(4) == 0
	one := s.fills.IntN(len(s.sites))
	length := int64((lookEvery + 40*s.fills.ExpFloat64()) * simTick)
	isMute := s.fills.IntN(8) == 0
	for i, st := range s.sites {
		isLow := isAll || i == one
		if st.fs == nil || !isLow {
			continue
		}
		s.count["disks about to be full"]++
		s.wasLow = true
		st.space = siteSpace{lowUntil: s.now + length, muteFrom: math.MaxInt64}
		if isMute {
			st.space.muteFrom = s.now + length/2
		}
		s.trace("FAULT: the disk of %v is low for %d ticks, mute: %v", st.node, length/simTick, isMute)
	}
}

// look tells a node how much of its disk is free, now and then.
func (p *proc) look() {
	s := p.s
	s.after(lookEvery, p, p.look)
	space := &p.site.space
	isLow := s.now < space.lowUntil
	free := uint64(enoughSpace)
	if isLow {
		free = lowSpace
	}
	var err error
	if s.now >= space.muteFrom {
		err = errMute
		s.count["looks at a disk that fail"]++
	}
	p.space.onTheWay++
	p.n.inbox.event(func() {
		p.space.onTheWay--
		p.n.noteLook(free, err)
		if err == nil && p.n.isRunning() {
			p.space.isLow = isLow
			p.space.at = p.n.clock.now
		}
	})
	p.wake()
}

// checkSpace checks that a proposal, when it is made, has no Set in it that is new, while the node's own disk
// is low, unless a snapshot was replaced since the look, whose space is free, or is about to be.
func (p *proc) checkSpace(sequence uint64, data []byte) {
	if sequence <= p.space.proposed {
		return
	}
	p.space.proposed = sequence
	counts := p.n.clock.now-p.space.at < p.n.ticksOf(spaceLasts)
	isFreed := p.n.durable.removing > 0 || p.n.quota.space.free > lowSpace
	if !p.space.isLow || !counts || isFreed {
		return
	}
	var b kvpb.Batch
	if err := proto.Unmarshal(data, &b); err != nil {
		p.s.failf("a proposal of %v: %v", p, err)
	}
	for _, w := range b.Writes {
		set := w.GetSet()
		isRepeat := set.GetRequestId() != nil &&
			p.n.store.sessions.knows(set.RequestId.Session, set.RequestId.Sequence)
		if set != nil && !isRepeat {
			p.s.failf("%v proposes a Set of %s, and its disk is low", p, set.Key)
		}
	}
	p.s.count["proposals while a disk is low"]++
}

// refusedForDisk says who refuses Sets for want of disk, or still may; empty: nobody does.
func (s *sim) refusedForDisk() string {
	for _, p := range s.alive() {
		if s.now < p.site.space.lowUntil {
			return fmt.Sprintf("the disk of %v is low, of which it may not know yet", p)
		}
		if p.space.onTheWay > 0 {
			return fmt.Sprintf("%v has yet to be told of a look at its disk", p)
		}
		if p.space.isLow && p.n.quota.space.known {
			return fmt.Sprintf("%v goes by a look at its disk when that was low", p)
		}
	}
	for _, p := range s.members() {
		if low := p.n.quota.lowest; low != nil {
			return fmt.Sprintf("%v refuses Sets for the disk of %x, which has room", p, low.RaftId)
		}
	}
	return ""
}
