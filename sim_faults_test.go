// The simulator's faults: what goes wrong, and what may not, for then the cluster would be
// lost by right.

package main

import (
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// simFaults are the kinds of faults, those twice that are to come more often.
var simFaults = []string{
	"kill", "kill", "stop", "pause", "isolate", "split", "one-way", "drop", "loss", "slow", "rate", "power", "power",
	"all", "disk", "stall", "wipe", "freeze", "freeze", "forget", "unplug", "move", "move",
}

// fault makes something go wrong, some time after the last fault.
func (s *sim) fault() {
	if s.calm {
		return
	}
	s.after(s.expo(s.cfg.faultEvery), nil, s.fault)
	kind := s.cfg.faults[s.rng.IntN(len(s.cfg.faults))]
	p := s.anyProc()
	if p == nil {
		return
	}
	if s.cause(kind, p, s.expo(s.cfg.outage)) {
		s.count["fault: "+kind]++
	} else {
		s.count["fault not allowed: "+kind]++
	}
}

// cause makes something go wrong with a process, or with the whole network. A fault that
// would lose the cluster by right, or that finds nothing to break, is not allowed.
func (s *sim) cause(kind string, p *proc, length float64) (allowed bool) {
	switch kind {
	case "kill", "stop", "pause", "rate":
		return s.disturb(kind, p, length)
	case "power", "all", "disk", "stall", "wipe", "forget":
		return s.breakMemory(kind, p, length)
	case "move":
		return p.move(length)
	default:
		return s.breakNetwork(kind, p, length)
	}
}

// disturb ends a process, or has it run badly.
func (s *sim) disturb(kind string, p *proc, length float64) (allowed bool) {
	switch kind {
	case "kill":
		if p.site.keeps() == 0 && !s.mayLose(p) {
			return false
		}
		p.die(length)
	case "stop":
		if p.site.keeps() == 0 && !s.mayLose(p) || p.paused {
			return false
		}
		p.stop(length)
	case "pause":
		if p.paused {
			return false
		}
		s.trace("FAULT: %v is stopped for %.0f ticks", p, length)
		p.paused = true
		s.after(length, nil, p.goOn)
	case "rate":
		p.rate = .3 + 2*s.rng.Float64()
		s.trace("FAULT: a tick of %v takes %.2f", p, p.rate)
	}
	return true
}

// breakMemory has something happen to disks, or to all that was not on them.
func (s *sim) breakMemory(kind string, p *proc, length float64) (allowed bool) {
	durable := p.site.keeps() != 0
	switch kind {
	case "power":
		if !durable {
			return false
		}
		if s.rng.IntN(2) == 0 {
			p.losePower(length)
		} else {
			p.doomed = length
		}
	case "all":
		found := false
		for _, p := range s.alive() {
			if p.site.keeps() != 0 {
				found = true
				p.losePower(length)
			}
		}
		return found
	case "disk":
		if p.disk == nil {
			return false
		}
		p.breakDisk(s.rng.IntN(40), simFault(s.rng.IntN(int(faultCrash))))
	case "stall":
		if p.disk == nil {
			return false
		}
		s.trace("FAULT: the disk of %v stalls for %.0f ticks", p, length)
		p.site.slow = s.now + int64(length*simTick)
	case "wipe":
		if !durable || !s.mayForget(p) {
			return false
		}
		s.trace("FAULT: %v loses its disk", p)
		p.site.fs = newSimFS()
		p.die(length)
	case "forget":
		if !durable || !s.mayForget(p) {
			return false
		}
		s.trace("FAULT: %v is started without its disk", p)
		p.site.forgets = true
		p.die(length)
		s.after(length+s.expo(s.cfg.outage), nil, func() { s.remember(p.site) })
	}
	return true
}

// mayForget reports whether a process with a disk may be started without what is on
// it. Where members move it may not, for one that has moved would not be found.
func (s *sim) mayForget(p *proc) bool { return !s.cfg.anchored() && s.mayLose(p) }

// move has a node be started at another address.
func (p *proc) move(length float64) (allowed bool) {
	st := p.site
	if st.i == 0 || st.keeps() == 0 {
		return false
	}
	p.die(length)
	if st.keeps() != 0 {
		st.moves++
		st.node = &kvpb.Node{Id: st.node.Id, Address: fmt.Sprintf("node%d:%d", st.node.Id, st.moves+1)}
		p.s.trace("node %d moves to %s", st.node.Id, st.node.Address)
	}
	return true
}

// breakNetwork has messages be lost or late, or streams break.
func (s *sim) breakNetwork(kind string, p *proc, length float64) (allowed bool) {
	switch kind {
	case "freeze":
		found := false
		for _, id := range slices.Sorted(maps.Keys(p.peers)) {
			st := p.peers[id].stream
			if st != nil && !st.frozen && s.rng.IntN(2) == 0 {
				found = true
				st.freeze(length)
			}
		}
		return found
	case "drop":
		ids := slices.Sorted(maps.Keys(p.peers))
		if len(ids) == 0 {
			break
		}
		if st := p.peers[ids[s.rng.IntN(len(ids))]].stream; st != nil {
			s.trace("FAULT: the stream from %v to %v breaks", st.from, st.to)
			st.breakBoth()
		}
	case "loss":
		s.trace("FAULT: messages are lost for %.0f ticks", length)
		s.lossNow = .1 + .6*s.rng.Float64()
		s.after(length, nil, func() { s.lossNow = 0 })
	case "slow":
		s.trace("FAULT: the network is slow for %.0f ticks", length)
		s.slowNow = .3
		s.after(length, nil, func() { s.slowNow = 0 })
	case "unplug":
		for _, q := range s.alive() {
			if q.n.raft.role == raft.StateLeader {
				p = q
			}
		}
		s.partition(kind, p.site, length)
	default:
		s.partition(kind, p.site, length)
	}
	return true
}

// remain reports whether a majority of voters still has its memory once a
// process, if any, has lost it.
func (s *sim) remain(voters []uint64, without *proc) bool {
	n := 0
	for _, st := range s.sites {
		raftID := st.keeps()
		if p := st.cur; p != nil {
			raftID = p.n.id.raftID
			if p == without || p.n.rn == nil {
				continue
			}
		}
		if slices.Contains(voters, raftID) {
			n++
		}
	}
	return len(voters) == 0 || n > len(voters)/2
}

// mayLose reports whether a process may lose its memory: a majority remains in
// both halves of every configuration that a member has applied, or will if the
// changes in its log are committed; but for those before the one that operators
// were told of last. Nodes that have not healed count as lost.
func (s *sim) mayLose(p *proc) bool {
	for _, st := range s.sites {
		if st.cur == nil && st.keeps() != 0 {
			return false // nobody knows what it has applied
		}
	}
	newest := &store{}
	for _, q := range s.alive() {
		if q.n.rn == nil {
			continue
		}
		if q.site.keeps() != 0 && q.confAt > max(s.told.index, q.written.HardState.GetCommit()) {
			return false // started again, it may count on who votes no more
		}
		if q.n.store.index > newest.index {
			newest = q.n.store
		}
	}
	for _, q := range s.alive() {
		if q.n.rn == nil || newest.members[q.n.id.raftID] == nil {
			continue
		}
		for _, cs := range s.configurations(q) {
			voters := cs.GetVoters()
			// A leader may have a learner vote before it notices that the learner is gone. One
			// that forms a cluster has all of them vote at once.
			if newest.founding == nil && slices.Contains(cs.GetLearners(), p.n.id.raftID) {
				voters = append(slices.Clone(voters), p.n.id.raftID)
			}
			if !s.remain(voters, p) || !s.remain(cs.GetVotersOutgoing(), p) {
				return false
			}
		}
	}
	return true
}

// configurations are the one that a member has applied, or that operators were told of
// since, and those that follow if all of its log is committed.
func (s *sim) configurations(p *proc) []*raftpb.ConfState {
	from, cs := p.n.store.index, p.n.store.conf
	if s.told.index > from {
		from, cs = s.told.index, s.told.conf
	}
	all := []*raftpb.ConfState{cs}
	for i := from + 1; i <= p.n.log.last(); i++ {
		e := p.entry(i)
		if e.GetType() == raftpb.EntryNormal {
			continue
		}
		cc, _, err := decodeConfChange(e)
		if err != nil {
			continue
		}
		next, err := tryConfChange(cs, cc)
		if err != nil {
			continue
		}
		cs = next
		all = append(all, cs)
	}
	return all
}

// remember has a site be started with its disk again, once its process may go.
func (s *sim) remember(st *site) {
	if s.calm {
		return
	}
	switch p := st.cur; {
	case p == nil:
		st.forgets = false
	case s.mayLose(p):
		s.trace("%v is to be started with the disk again", p)
		p.die(s.expo(10))
		st.forgets = false
	default:
		s.after(20, nil, func() { s.remember(st) })
	}
}

// partition cuts pairs of sites for a while.
func (s *sim) partition(kind string, one *site, length float64) {
	var pairs [][2]int
	side := make([]bool, len(s.sites))
	for i := range side {
		if kind == "split" {
			side[i] = s.rng.IntN(2) == 0
		} else {
			side[i] = i == one.i
		}
	}
	oneWay := kind == "one-way"
	out, in := true, true
	if oneWay {
		out = s.rng.IntN(2) == 0
		in = !out
	}
	for i := range side {
		for j := range side {
			leaves, enters := side[i] && !side[j], side[j] && !side[i]
			if (!leaves || !out) && (!enters || !in) {
				continue
			}
			if oneWay && s.rng.IntN(3) == 0 { // some still get through
				continue
			}
			pairs = append(pairs, [2]int{i, j})
			s.cut[i][j]++
		}
	}
	s.trace("FAULT: nothing gets from → to: %v for %.0f ticks", pairs, length)
	for _, p := range s.alive() {
		for _, id := range slices.Sorted(maps.Keys(p.peers)) {
			st := p.peers[id].stream
			if st == nil || !s.isCut(p.site, st.to.site) {
				continue
			}
			if kind == "unplug" {
				s.after(0, nil, st.breakBoth) // who leads there learns last that he does not
			} else if s.rng.IntN(2) == 0 {
				s.after(s.expo(20), nil, st.breakBoth) // TCP may notice
			}
		}
	}
	s.after(length, nil, func() {
		s.trace("what was cut is whole: %v", pairs)
		for _, c := range pairs {
			s.cut[c[0]][c[1]]--
		}
	})
}

// cutOff separates a site from all others, or ends that.
func (s *sim) cutOff(st *site, by int) {
	for _, o := range s.sites {
		if o != st {
			s.cut[st.i][o.i] += by
			s.cut[o.i][st.i] += by
		}
	}
}

// breakDisk makes a call to the file system fail, after some others.
func (p *proc) breakDisk(calls int, fault simFault) {
	fs := p.site.fs
	p.s.trace("FAULT: the disk of %v fails in %d calls: %d", p, calls, fault)
	fs.failAt, fs.fault = len(fs.calls)+1+calls, fault
}

// losePower ends a process in the middle of what its disk does, and what was
// not synced is gone, or torn.
func (p *proc) losePower(length float64) {
	s, st := p.s, p.site
	if len(p.disk.queue) > 0 {
		calls := 0 // it is written, and not synced
		if s.rng.IntN(2) == 0 {
			calls = s.rng.IntN(12)
		}
		p.breakDisk(calls, faultCrash)
		_ = p.disk.write()
	}
	p.die(length)
	s.count["power lost"]++
	r := s.rng
	if s.rng.IntN(3) == 0 {
		r = nil
	}
	st.fs = st.fs.lose(r)
}

// die ends a process at once; another starts after some ticks.
func (p *proc) die(length float64) {
	s, st := p.s, p.site
	s.trace("FAULT: %v dies for %.0f ticks", p, length)
	p.dead, st.cur = true, nil
	if st.fs != nil {
		st.fs = st.fs.restart(s.rng.IntN(2) == 0)
	}
	for _, a := range p.calls {
		if a.o.sent == a {
			s.clients[a.o.client].again(a, false)
		}
	}
	p.calls = nil
	for _, id := range slices.Sorted(maps.Keys(p.peers)) {
		if stream := p.peers[id].stream; stream != nil {
			s.after(s.latency(), nil, stream.close)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.inbound)) {
		s.after(s.latency(), nil, p.inbound[id].broken)
	}
	for _, stream := range p.hellos {
		s.after(s.latency(), nil, stream.broken)
	}
	for _, id := range slices.Sorted(maps.Keys(p.receiving)) {
		p.receiving[id].lose("with its receiver")
	}
	s.after(length, nil, func() {
		if st.cur == nil {
			s.start(st)
		}
	})
}

// stop ends a process as SIGTERM does: it hands leadership over first, if it
// can, and answers all calls.
func (p *proc) stop(length float64) {
	s, n := p.s, p.n
	if n.leads() && n.mayChange() {
		n.inbox.event(func() { n.handOver(n.store.conf.GetVoters()) })
		p.wake()
	}
	s.after(5, p, func() {
		if s.calm || p.site.keeps() == 0 && !s.mayLose(p) {
			return
		}
		n.err = errStopping
		n.inbox.close(errStopping)
		p.turn(0)
		n.calls.failAll(errStopping)
		p.poll()
		if p.disk != nil {
			p.disk.close()
		}
		p.die(length)
	})
}

// goOn continues a stopped process.
func (p *proc) goOn() {
	if p.dead || !p.paused {
		return
	}
	p.paused = false
	p.s.trace("%v goes on", p)
	for i, e := range p.held {
		p.s.schedule(p.s.now+int64(i), nil, func() { p.s.at(p, e.f) })
	}
	p.held = nil
}

// astray reports whether a process cannot know that it was removed: too few of the
// voters that it knows are where it knows them, and could say so. An operator sees
// in status that the others do not list it.
func (p *proc) astray() bool {
	n := p.n
	others, told := 0, 0
	for _, id := range n.store.conf.GetVoters() {
		if id == p.raftID {
			continue
		}
		others++
		node := n.store.members[id]
		st := p.s.siteOf(node)
		if st == nil || st.cur == nil || st.node.Id != node.Id {
			continue
		}
		if slices.Contains(st.cur.n.store.removed, p.raftID) {
			told++
		}
	}
	return n.raft.lead == 0 && told <= others/2
}

// restartStray is what an operator does with a node that cannot know that its life was
// removed, while another life of it is a member still: he starts it without what it has.
func (s *sim) restartStray(p, leader *proc) {
	members := leader.n.store
	isFound := slices.ContainsFunc(members.raftIDsOf(p.site.node.Id), func(id uint64) bool {
		return proto.Equal(members.members[id], p.site.node) // one that has moved is not, without what it has
	})
	if !isFound || p.n.rn == nil || p.n.election.leaderlessTicks < 4*p.n.electionTicks() {
		return
	}
	s.count["strays restarted"]++
	if p.site.fs != nil {
		p.site.fs = newSimFS()
	}
	p.die(5)
}
