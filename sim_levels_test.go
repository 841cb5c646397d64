// The simulator's programs: sites are started with programs of two levels, up and down, and
// the level of the cluster rises.

package main

import (
	"errors"
	"fmt"
	"slices"

	"raft-key-value/kvpb"
)

// installProgram draws which program a site's next process is of. Operators go up and back
// until the level has risen; and then some start the older program by mistake, and replace it
// a while later.
func (s *sim) installProgram(st *site) {
	if !s.cfg.levels {
		return
	}
	mustBeNew := st.mustUpgrade || s.calm && s.level == nextLevel
	switch {
	case mustBeNew:
		st.speaks = nextLevel
	case s.calm: // it stays
	case levelFromWire(st.speaks) < nextLevel:
		if s.rng.IntN(2) == 0 {
			st.speaks = nextLevel
		}
	case s.rng.IntN(6) == 0:
		st.speaks = firstLevel
	}
	st.mustUpgrade = false
	if levelFromWire(st.speaks) < s.level {
		s.count["older programs started after the rise"]++
		s.after(s.expo(s.cfg.outage), nil, func() { s.replaceOld(st) })
	}
}

// replaceOld has an operator replace a program that its cluster refuses.
func (s *sim) replaceOld(st *site) {
	isOld := levelFromWire(st.speaks) < s.level
	if s.calm || !isOld || st.cur == nil {
		return
	}
	st.mustUpgrade = true
	st.cur.die(s.expo(2))
}

// replaceRefused has an operator replace a program that could not be added.
func (s *sim) replaceRefused(st *site) {
	if st.cur != nil {
		st.mustUpgrade = true
		st.cur.die(1)
	}
}

// replaceAllOld ends the processes whose program the cluster refuses, once there are no more
// faults; and sometimes those of other older programs, if they keep their memory.
func (s *sim) replaceAllOld() {
	if !s.cfg.levels {
		return
	}
	goesUp := s.rng.IntN(2) == 0
	for _, st := range s.sites {
		if levelFromWire(st.speaks) == nextLevel {
			continue
		}
		isRefused := s.level == nextLevel
		st.mustUpgrade = isRefused || goesUp && st.keeps() != 0
		if st.mustUpgrade && st.cur != nil {
			st.cur.goOn()
			st.cur.die(1)
		}
	}
}

// speak sets what the node's program speaks.
func (p *proc) speak() {
	p.n.opts.level = levelFromWire(p.site.speaks)
	p.n.store.speaks = p.n.opts.level
	if p.s.cfg.overstated {
		p.n.opts.level = nextLevel
	}
}

// noteProgram notes, for a raft ID, that a process of the newer program goes by it.
func (p *proc) noteProgram() {
	if levelFromWire(p.site.speaks) == nextLevel {
		p.s.spoke[p.raftID] = true
	}
}

// checkLevel checks that no node is in a cluster of a level that its program does not speak,
// and that the level does not fall (I11).
func (p *proc) checkLevel() {
	s, level := p.s, p.n.store.level
	if level > levelFromWire(p.site.speaks) {
		s.failf("I11: %v is in a cluster of level %d, and its program speaks %d", p, level, levelFromWire(p.site.speaks))
	}
	if level < p.level {
		s.failf("I11: %v goes back from level %d to %d", p, p.level, level)
	}
	p.level = level
	if level > s.level {
		s.level = level
		s.count["levels risen"]++
	}
}

// stopsTooOld reports whether a node stops, for it has met something of a level that its program does not
// speak. That may happen only to an older program that was started in place of a newer one.
func (p *proc) stopsTooOld(err error) bool {
	if !errors.Is(err, errLevel) {
		return false
	}
	if !p.s.spoke[p.raftID] && !p.s.spoke[p.site.onDisk] {
		p.s.failf("I11: %v stops, and no process of it ever spoke that level: %v", p, err)
	}
	p.s.count["stops of older programs"]++
	p.site.mustUpgrade = true
	return true
}

// rise applies a rise of the level to the oracle.
func (o *oracle) rise(r *kvpb.LevelRise) {
	for _, id := range confIDs(o.conf) {
		if !slices.Contains(r.Members, id) {
			return
		}
	}
	o.level = max(o.level, r.Level)
}

// speak reports whether the members that a change adds speak the level.
func (o *oracle) speak(members []*kvpb.Member) bool {
	for _, m := range members {
		isNew := !slices.Contains(confIDs(o.conf), m.RaftId)
		if isNew && levelFromWire(m.Level) < max(o.level, firstLevel) {
			return false
		}
	}
	return true
}

// unrisen says why the level has not risen, though all members speak a higher one.
func (s *sim) unrisen() string {
	members := s.members()
	for _, p := range members {
		if p.n.opts.risesTo() < nextLevel {
			return ""
		}
	}
	for _, p := range members {
		if p.n.store.level < nextLevel {
			return fmt.Sprintf("%v knows level %d: %s", p, p.n.store.level, s.overview())
		}
	}
	return ""
}

// raiseBadly plants a leader that asks nobody before it raises the level.
func (p *proc) raiseBadly() {
	if !p.s.cfg.riseAlone {
		return
	}
	for id := range p.n.store.members {
		said := &kvpb.Peer{RisesTo: nextLevel}
		p.n.level.called[id] = said
		p.n.level.callers[id] = said
	}
}
