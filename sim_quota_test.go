// The simulator's quotas: sites have room for stores of different sizes, and clients store more.

package main

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// toldLimit is what a member has said of its room.
type toldLimit struct{ sequence, limit uint64 }

// hearLimits notes what a process is told.
func (p *proc) hearLimits(h *kvpb.Hello, rooms []*kvpb.RoomReport) {
	if !p.n.hears(h) {
		return
	}
	for _, r := range rooms {
		if r.Sequence > p.told[r.RaftId].sequence {
			p.told[r.RaftId] = toldLimit{r.Sequence, r.MaxStoreBytes}
		}
	}
}

// leastLimit is the least limit of the members, as far as the process was told.
func (p *proc) leastLimit() uint64 {
	least := p.site.limit
	for id := range p.n.store.members {
		t, isTold := p.told[id]
		if isTold && id != p.n.id.raftID {
			least = min(least, t.limit)
		}
	}
	return least
}

// checkRoom checks a proposal, when it is made.
func (p *proc) checkRoom(sequence uint64, data []byte) {
	s := p.s
	if s.cfg.quota == 0 || p.proposed[sequence] != 0 {
		return
	}
	least := p.leastLimit()
	p.proposed[sequence] = least
	var b kvpb.Batch
	if err := proto.Unmarshal(data, &b); err != nil {
		s.failf("a proposal of %v: %v", p, err)
	}
	sizes := map[string]int{}
	size := 0
	for key, it := range p.n.store.tree.from(nil) {
		sizes[string(key)] = len(key) + len(it.value) + 64
		size += len(key) + len(it.value) + 64
	}
	for _, w := range b.Writes {
		set := w.GetSet()
		isRepeat := set.GetRequestId() != nil && p.n.store.sessions.knows(set.RequestId.Session, set.RequestId.Sequence)
		if set == nil || isRepeat {
			continue
		}
		before := size
		has := len(set.Key) + len(set.Value) + 64
		size += max(0, has-sizes[set.Key])
		sizes[set.Key] = max(has, sizes[set.Key])
		if size > before && uint64(size) > least {
			s.failf("%v proposes a Set of %s that makes the store %d bytes large, and was told of a limit of %d",
				p, set.Key, size, least)
		}
	}
	s.count["proposals with a quota"]++
}

// checkRefusal checks what was refused, and why.
func (s *sim) checkRefusal(a *attempt, err error) {
	isForDisk := strings.Contains(err.Error(), "disk of node")
	if isForDisk {
		s.count["Sets refused for want of disk"]++
	} else {
		s.count["Sets refused for their size"]++
	}
	if isForDisk && !s.wasLow {
		s.failf("%v is refused for want of disk, and none was ever low: %v", a.o, err)
	}
	if a.o.kind != "set" {
		s.failf("%v is refused: %v", a.o, err)
	}
	if n := a.p.n; s.cfg.refusedToo && n.calls.own == nil {
		c := &call{write: a.o.record, done: make(chan outcome, 1)}
		n.calls.room = admission{}
		n.calls.writes = append(n.calls.writes, c)
		n.calls.own = n.calls.newProposal(n.id.raftID, n.store.level)
	}
}

// checkSize checks the size of the store after a batch that has made it larger.
func (s *sim) checkSize(b *kvpb.Batch) {
	o := &s.oracle
	if s.cfg.quota == 0 {
		return
	}
	before := o.size
	o.size = 0
	for key, changes := range o.keys {
		if last := changes[len(changes)-1]; last.present {
			o.size += uint64(len(key) + len(last.value) + 64)
		}
	}
	i := slices.IndexFunc(s.alive(), func(p *proc) bool { return p.n.id.raftID == b.Proposer })
	if i < 0 || o.size <= before {
		return
	}
	limit := s.alive()[i].proposed[b.Sequence]
	inFlight := uint64(s.cfg.nodes * s.cfg.clients * (s.cfg.valueBytes + 80))
	if limit != 0 && o.size > limit+inFlight {
		s.failf("the store has %d bytes, the limit was %d when it was proposed, and %d may be in flight", o.size, limit, inFlight)
	}
	if limit != 0 && o.size > limit {
		s.count["stores beyond the limit by what was in flight"]++
	}
}

// makeRoom deletes all, once all members know the least limit.
func (s *sim) makeRoom() {
	if s.cfg.quota == 0 {
		return
	}
	s.until(settleTicks, func() string {
		least := uint64(1 << 62)
		for _, p := range s.members() {
			least = min(least, p.site.limit)
		}
		for _, p := range s.members() {
			if p.n.quota.limit != least && !s.cfg.deaf {
				return fmt.Sprintf("%v goes by a limit of %d, the least is %d", p, p.n.quota.limit, least)
			}
		}
		return ""
	})
	p := s.members()[0]
	for i := range s.cfg.keys {
		o := &op{client: -1, kind: "delete", key: fmt.Sprintf("k%d", i), begun: s.tock()}
		w, err := encodeWrite(deleteWrite(o.key))
		if err != nil {
			s.failf("%v: %v", o, err)
		}
		s.finishWrite(o, s.ask(p, w))
		s.history = append(s.history, o)
	}
	s.until(settleTicks, func() string { // a node decides by what it has applied
		for _, q := range s.members() {
			if q.n.store.version < p.n.store.version {
				return fmt.Sprintf("%v has not applied the deletions", q)
			}
		}
		return ""
	})
}
