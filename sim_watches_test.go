// What the simulator's clients watch: a watch opens at a node, reads what it is told there in
// pieces of any size, and goes on at another node, from what it was told. What it is told from
// one version to another is what the log has made of its keys, each write once, in order.

package main

import (
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// simWatch is a watch of a client. Its caller makes its calls, and no others.
type simWatch struct {
	s      *sim
	c      *caller
	req    *kvpb.WatchRequest // nil: it has yet to be drawn
	bounds bounds             // what req is of
	begun  bool               // it was told that it is open, here or elsewhere
	pace   float64            // mean, between two reads

	// What the client knows.
	clusterID uint64
	version   uint64 // all up to it was told
	before    uint64 // likewise, but for the last response

	// Where it is open.
	p      *proc
	cursor *cursor         // nil: it is not
	ended  <-chan struct{} // closed when all watches end there
	busy   bool            // the cursor is read
}

func (w *simWatch) String() string {
	at := "nowhere"
	if w.cursor != nil {
		at = w.p.String()
	}
	return fmt.Sprintf("watch %d of %v, told up to %d, open at %s", w.c.id, w.bounds, w.version, at)
}

// addWatches adds the clients that watch.
func (s *sim) addWatches() {
	for range s.cfg.watches {
		c := &caller{s: s, id: len(s.clients)}
		c.watch = &simWatch{s: s, c: c}
		s.clients = append(s.clients, c)
		s.watches = append(s.watches, c.watch)
		s.after(s.expo(10), nil, c.act)
	}
}

// prepareWatchers has a process follow what its node publishes, as the server does, and plants
// the bugs that are in the watchers.
func (p *proc) prepareWatchers() {
	s := p.s
	p.watchers = newWatchers(p.n.store.history)
	p.watchers.plantedAhead = s.cfg.ahead
	p.n.store.history.plantedSkip = s.cfg.skip
	if s.cfg.watches == 0 {
		return
	}
	p.watchers.interleave = p.interleave
	if s.rng.IntN(2) == 0 {
		p.watchers.passedAtOnce = 1 + s.rng.IntN(3)
		p.n.store.history.passed = 1 + s.rng.IntN(3)
	}
	p.watchers.follow(p.n.status.latest.Load(), false)
	p.n.status.onChange = func(now *published) { p.watchers.follow(now, false) }
}

// passSoon has the watchers pass over what is new some time: it stands for their goroutine.
func (p *proc) passSoon() {
	isNeeded := p.s.cfg.watches > 0 && len(p.watchers.history.added) > 0
	if !isNeeded || p.willPass {
		return
	}
	p.willPass = true
	p.s.after(p.s.expo(p.s.cfg.passing), p, func() {
		p.willPass = false
		p.pass()
	})
}

func (p *proc) pass() {
	select {
	case <-p.watchers.history.added:
	default:
	}
	p.passing = true
	p.watchers.passNew()
	p.passing = false
	p.s.count["passes of watchers"]++
}

// interleave does between two steps of a pass, or of a read, what other goroutines may: in a
// pass it reads a watch, and else it passes.
func (p *proc) interleave() {
	s := p.s
	isDeep := p.interleaved || s.rng.IntN(3) > 0
	if isDeep {
		return
	}
	p.interleaved = true
	defer func() { p.interleaved = false }()
	s.count["watchers interleaved"]++
	if !p.passing {
		p.pass()
		return
	}
	for _, w := range s.watches {
		isHere := w.p == p && w.cursor != nil && !w.busy
		if isHere && s.rng.IntN(2) == 0 {
			w.read()
		}
	}
}

// act is what the client of a watch does next.
func (w *simWatch) act() {
	s := w.s
	if w.cursor == nil {
		w.open()
		return
	}
	pace := w.pace
	if s.calm { // it is to come to the end
		pace = min(pace, 2)
	}
	s.after(s.expo(pace), nil, w.c.act)
	isEnded := false
	select {
	case <-w.ended:
		isEnded = s.rng.IntN(2) == 0 // or else that is noticed later
	default:
	}
	switch {
	case w.p.dead:
		s.count["watches whose node has ended"]++
		w.leave()
	case w.p.paused:
		if s.rng.IntN(10) == 0 {
			w.leave()
		}
	case isEnded:
		s.count["watches ended by their node"]++
		w.leave()
	case !s.calm && s.rng.IntN(40) == 0:
		s.count["watches that move"]++
		w.leave()
	case !s.calm && s.rng.IntN(200) == 0:
		s.count["watches dropped"]++
		w.leave()
		w.req = nil
	default:
		w.read()
	}
}

// leave has the client let go of the stream. The last response may not have come.
func (w *simWatch) leave() {
	w.cursor.ws.remove(w.cursor.w)
	w.cursor = nil
	if w.s.rng.IntN(2) == 0 {
		w.version = w.before
	}
}

// open has the client open a stream at some node.
func (w *simWatch) open() {
	s := w.s
	mayWaitForEver := !w.begun && s.rng.IntN(4) == 0 // for a version that nobody writes
	if w.req == nil || mayWaitForEver {
		w.draw()
	}
	if w.begun {
		w.req.FromVersion = w.version + 1
		w.req.ClusterId = w.clusterID
	}
	o := &op{client: w.c.id, kind: "watch", bounds: w.bounds, atLeast: s.newest, begun: s.tock()}
	if w.req.FromVersion > 0 {
		s.readLocally(o, w.req.FromVersion-1)
	}
	w.c.op = o
	w.c.send(o)
}

// draw draws what is watched, and from when on.
func (w *simWatch) draw() {
	s := w.s
	w.begun = false
	w.req = &kvpb.WatchRequest{}
	w.bounds = bounds{}
	w.pace = []float64{.3, 3, 30, 150}[s.rng.IntN(4)]
	switch s.rng.IntN(4) {
	case 0:
		w.req.Key = s.drawKey()
		w.bounds = bounds{start: w.req.Key, end: w.req.Key + "\x00"}
	case 1, 2:
		w.bounds = s.drawBounds()
		w.req.Prefix, w.req.Start, w.req.End = w.bounds.prefix, w.bounds.start, w.bounds.end
	}
	switch {
	case s.rng.IntN(2) == 0: // from now on
	case s.calm:
		w.req.FromVersion = 1 + s.newest
	default:
		w.req.FromVersion = s.drawMinVersion()
	}
}

// opened takes in that the node has applied what is before the watch.
func (w *simWatch) opened(a *attempt) {
	s := w.s
	h := a.p.n.store.history.view()
	from, err := watchFrom(&h, w.req)
	if old, ok := errors.AsType[*compactedError](err); ok {
		w.compacted(a.p, w.req.FromVersion, old)
		w.rest(a)
		return
	}
	if err == errNotInitialized {
		w.rest(a)
		return
	}
	if err != nil {
		s.failf("%v through %v: %v", w, a.p, err)
	}
	isFromNow := w.req.FromVersion == 0
	if isFromNow && from-1 < a.o.atLeast {
		s.failf("I1: %v through %v is from version %d; version %d was known when it began",
			w, a.p, from, a.o.atLeast)
	}
	add := func() { w.add(a, &h, from) }
	if s.rng.IntN(3) > 0 {
		add()
		return
	}
	s.after(s.expo(3), nil, func() { // the call's goroutine rests between two steps
		isThere := a.o.sent == a && !a.p.dead && !a.p.paused
		if isThere {
			add()
		}
	})
}

// rest has the client go on.
func (w *simWatch) rest(a *attempt) {
	a.o.sent = nil
	w.c.rest()
}

// add adds the watch to those of the node, and takes the first response.
func (w *simWatch) add(a *attempt, h *historyView, from uint64) {
	clusterID := h.clusterID
	s, p := w.s, a.p
	defer w.rest(a)
	f, err := filterOf(w.req)
	if err != nil {
		s.failf("%v: %v", w, err)
	}
	added, err := p.watchers.add(f, principal{})
	if err != nil {
		s.count["watches refused"]++
		return
	}
	c := p.watchers.cursor(added, h, from)
	isResumed := w.begun
	first := c.told()
	if !w.begun {
		w.begun = true
		w.clusterID = clusterID
		w.version = first
	}
	if first != w.version || clusterID != w.clusterID {
		s.failf("%v goes on through %v at version %d of cluster %x", w, p, first, clusterID)
	}
	w.before = w.version
	w.p = p
	w.cursor = c
	w.ended = p.watchers.allowed().Done()
	isFromNow := w.req.FromVersion == 0
	if s.cfg.lateStart && isFromNow {
		c.w.mark.Store(0)
	}
	if s.cfg.toldAgain && isResumed {
		c.next--
	}
	s.count["watches opened"]++
	s.trace("%s", w.String()) // now: it changes
}

// compacted checks that a node cannot tell of what it says that it cannot, and has the client
// begin anew.
func (w *simWatch) compacted(p *proc, from uint64, old *compactedError) {
	s := w.s
	version := p.n.store.version
	dropped := old.oldest - 1
	mayBe := from < old.oldest && old.oldest <= version+1
	if !mayBe || !p.mayHaveDropped(dropped) {
		s.failf("%v from version %d through %v of version %d: %v; it began at version %d, "+
			"and has %d bytes from what it dropped on, of %d", w, from, p, version, old,
			s.oracle.versionAt(p.replacedAt), s.oracle.historyBytes(dropped, version), s.cfg.historyBytes)
	}
	s.count["watches too late"]++
	w.begun = false
	w.req.FromVersion = 0
	w.req.ClusterId = 0
	if s.rng.IntN(2) == 0 { // what was there before is read in another way
		w.begun = true
		w.clusterID = p.n.store.clusterID
		w.version = dropped
		w.before = dropped
	}
}

// mayHaveDropped reports whether a node's history may lack a version: it came with a snapshot,
// or what was written since takes more than the limit.
func (p *proc) mayHaveDropped(version uint64) bool {
	o := &p.s.oracle
	isBefore := version <= o.versionAt(p.replacedAt)
	return isBefore || o.historyBytes(version, p.n.store.version) > p.s.cfg.historyBytes
}

// read reads the next response at the node.
func (w *simWatch) read() {
	s, c := w.s, w.cursor
	isWoken := c.isBehind
	select {
	case <-c.w.wake:
		isWoken = true
	default:
	}
	if !isWoken && s.rng.IntN(4) > 0 {
		return // or else it is time for a response
	}
	size := []int{0, s.rng.IntN(200), s.rng.IntN(4000), watchBytes}[s.rng.IntN(4)]
	w.busy = true
	events, err := c.read(size)
	w.busy = false
	if old, ok := errors.AsType[*compactedError](err); ok {
		w.compacted(w.p, c.next, old)
		c.ws.remove(c.w)
		w.cursor = nil
		return
	}
	hasLeft := w.p.n.store.clusterID != w.clusterID
	if hasLeft && err == errHistoryReplaced {
		s.count["watches of a cluster that their node has left"]++
		w.leave()
		return
	}
	if err != nil {
		s.failf("%v: %v", w, err)
	}
	isLost := len(events) > 0 && !isWoken && len(c.w.wake) == 0
	if isLost {
		s.failf("%v was not woken for %v", w, eventMessages(events))
	}
	w.tell(eventMessages(events), c.told())
}

// tell checks a response.
func (w *simWatch) tell(events []*kvpb.Event, version uint64) {
	s := w.s
	if version < w.version || version > s.oracle.version {
		s.failf("I6: %v is told up to %d; committed is %d", w, version, s.oracle.version)
	}
	want := s.oracle.events(w.bounds, w.version+1, version)
	isSame := func(a, b *kvpb.Event) bool { return proto.Equal(a, b) }
	if !slices.EqualFunc(events, want, isSame) {
		s.failf("I2: %v is told up to %d, of %s; it has to be told of %s",
			w, version, eventText(events), eventText(want))
	}
	w.before = w.version
	w.version = version
	s.count["events told"] += len(events)
	s.count["responses to watches"]++
}

// eventText is not protobuf's text, which is unstable on purpose.
func eventText(events []*kvpb.Event) string {
	text := "["
	for _, e := range events {
		text += fmt.Sprintf(" %s=%.12q (%v) of version %d", e.Key, e.Value, e.Value != nil, e.Version)
	}
	return text + " ]"
}

// events are what writes have done to a range, from one version to another.
func (o *oracle) events(b bounds, from, to uint64) (events []*kvpb.Event) {
	for version := from; version <= to; version++ {
		c := o.versions[version]
		keys := []string{c.key}
		if c.deletion != nil {
			keys = c.deletion.keys
		}
		hasEffect := c.present || c.found || c.deletion != nil
		for _, key := range keys {
			if !hasEffect || !b.has(key) {
				continue
			}
			e := &kvpb.Event{Key: key, Version: version}
			if c.present {
				e.Value = []byte(c.value)
			}
			events = append(events, e)
		}
	}
	return events
}

// appliedEntry is what an entry did to a history of events.
type appliedEntry struct {
	version uint64 // thereafter
	bytes   uint64 // that it takes of memory at most
}

// versionAt is the version after an entry.
func (o *oracle) versionAt(index uint64) uint64 { return o.applied[index].version }

// noteEvents notes what the last entry did to a history of events.
func (o *oracle) noteEvents() {
	data := o.entries[len(o.entries)-1].GetData()
	before := o.applied[len(o.applied)-1].version
	bytes := uint64(len(data) + chunkBytes)
	for version := before + 1; version <= o.version; version++ {
		bytes += eventBytes
		d := o.versions[version].deletion
		if d == nil {
			continue
		}
		bytes += 2 * chunkBytes
		for _, key := range d.keys {
			bytes += uint64(len(key) + eventBytes)
		}
	}
	if o.version == before {
		bytes = 0
	}
	o.applied = append(o.applied, appliedEntry{o.version, bytes})
}

// historyBytes is what the events from one version to another take of memory at most, with all
// others of their entries.
func (o *oracle) historyBytes(from, to uint64) (bytes uint64) {
	for i, e := range o.applied[1:] {
		isOfThem := e.version >= from && o.applied[i].version < to
		if isOfThem {
			bytes += e.bytes
		}
	}
	return bytes
}

// untold says which watch has not been told all; empty: none.
func (s *sim) untold() string {
	for _, w := range s.watches {
		isTold := w.cursor != nil && w.version >= s.oracle.version
		if !isTold {
			return fmt.Sprintf("%v; committed is version %d: %s", w, s.oracle.version, s.overview())
		}
	}
	return ""
}
