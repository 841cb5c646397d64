// Watchers: who is told of which keys. One goroutine passes over the events, once for all of
// them, and wakes those whom an event concerns: a write costs nothing that grows with their
// number.
//
// It gives each watcher whom an event concerns a mark, the event's version, unless it has one,
// and only then says that all up to there is seen. A cursor loads what is seen, and then takes
// the mark. If there is none, nothing up to what was seen concerns it: it goes on behind that,
// without a look at the events. If there is one, it reads the history, from the mark on, to the
// history's end. What is added behind that gets a mark again. When events may be missing, for
// they were dropped before they were passed over or the whole state was replaced, all watchers
// get a mark, and what they read tells them.

package main

import (
	"bytes"
	"fmt"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

const (
	// maxWatchers bounds the watches of a node: each takes some 20 KiB, of goroutine and
	// stream. A principal may have half of them; without TLS there is one principal, which may
	// have all.
	maxWatchers          = 10_000
	maxPrincipalWatchers = maxWatchers / 2
	// maxWatchedRanges bounds the ranges that are watched, which are neither keys nor
	// prefixes: each is looked at for each event.
	maxWatchedRanges = 256
	// After maxPassedAtOnce events without key and value, about, the watchers are let go. The
	// events of one write are not divided.
	maxPassedAtOnce = 1024
)

// watchFilter is the keys that a watch is of.
type watchFilter struct {
	kind watchKind
	text string // the key, or the prefix; of a range, nothing
	keys keyRange
}

type watchKind int

const (
	watchKey watchKind = iota
	watchPrefix
	watchRange
)

// filterOf is the filter that a request names, or says what is wrong with it.
func filterOf(req *kvpb.WatchRequest) (watchFilter, error) {
	hasRange := req.Prefix != "" || req.Start != "" || req.End != ""
	if req.Key != "" && hasRange {
		return watchFilter{}, invalid("key", "it is not for a request that has prefix, start or end")
	}
	if req.Key != "" {
		key := []byte(req.Key)
		if err := checkKey(key); err != nil {
			return watchFilter{}, err
		}
		end := append(bytes.Clone(key), 0)
		return watchFilter{watchKey, req.Key, keyRange{start: key, end: end}}, nil
	}
	if err := checkRange(req.Prefix, req.Start, req.End); err != nil {
		return watchFilter{}, err
	}
	r := rangeOf(req.Prefix, req.Start, req.End)
	if req.Start == "" && req.End == "" {
		return watchFilter{watchPrefix, req.Prefix, r}, nil
	}
	return watchFilter{kind: watchRange, keys: r}, nil
}

// watcher is one watch.
type watcher struct {
	filter    watchFilter
	principal principal
	wake      bell
	// mark is the version of the first event that concerns the watch of those that were
	// passed over since the watch took the mark last; 0: there is none.
	mark atomic.Uint64
}

func (w *watcher) concern(version uint64) {
	if w.mark.CompareAndSwap(0, version) {
		w.wake.ring()
	}
}

type watcherSet map[*watcher]struct{}

// watchers are the watches of a node. Any goroutine may call its methods.
type watchers struct {
	history *eventHistory
	// seen is a version up to which all events were passed over: marks are set first, then seen.
	seen   atomic.Uint64
	resets uint64 // of the history, when it was passed over last: passNew alone uses it

	passedAtOnce int    // maxPassedAtOnce, but in tests
	interleave   func() // nil; the simulator does here what other goroutines may do
	plantedAhead bool   // a bug that the simulator plants: seen runs ahead of the marks

	mu       sync.Mutex
	count    int
	of       map[principal]int // how many watches each principal has
	keys     map[string]watcherSet
	prefixes map[string]watcherSet
	lengths  map[int]int // how many different prefixes there are, by their length
	ranges   watcherSet
	ended    chan struct{} // closed when the watches are to end
	why      error         // why they are to end; nil: they may go on
}

func newWatchers(h *eventHistory) *watchers {
	return &watchers{
		history:  h,
		of:       map[principal]int{},
		keys:     map[string]watcherSet{},
		prefixes: map[string]watcherSet{},
		lengths:  map[int]int{},
		ranges:   watcherSet{},
		ended:    make(chan struct{}),

		passedAtOnce: maxPassedAtOnce,
	}
}

// add adds a watch that is told of all events from now on, and is to look at once for those
// before.
func (ws *watchers) add(f watchFilter, p principal) (*watcher, error) {
	w := &watcher{filter: f, principal: p, wake: newBell()}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.why != nil {
		return nil, ws.why
	}
	share := maxPrincipalWatchers
	if p.role == roleAnyone {
		share = maxWatchers
	}
	if ws.count >= maxWatchers || ws.of[p] >= share {
		return nil, tooManyWatches("watches")
	}
	switch f.kind {
	case watchKey:
		addTo(ws.keys, f.text, w)
	case watchPrefix:
		if ws.prefixes[f.text] == nil {
			ws.lengths[len(f.text)]++
		}
		addTo(ws.prefixes, f.text, w)
	case watchRange:
		if len(ws.ranges) >= maxWatchedRanges {
			return nil, tooManyWatches("watches of ranges")
		}
		ws.ranges[w] = struct{}{}
	}
	ws.count++
	ws.of[p]++
	w.concern(1)
	return w, nil
}

func tooManyWatches(what string) error {
	return apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED,
		fmt.Sprintf("this node, or this caller, has too many %s", what))
}

func addTo(sets map[string]watcherSet, text string, w *watcher) {
	if sets[text] == nil {
		sets[text] = watcherSet{}
	}
	sets[text][w] = struct{}{}
}

func (ws *watchers) remove(w *watcher) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.count--
	ws.of[w.principal]--
	if ws.of[w.principal] == 0 {
		delete(ws.of, w.principal)
	}
	switch f := w.filter; f.kind {
	case watchKey:
		removeFrom(ws.keys, f.text, w)
	case watchPrefix:
		removeFrom(ws.prefixes, f.text, w)
		if ws.prefixes[f.text] != nil {
			return
		}
		ws.lengths[len(f.text)]--
		if ws.lengths[len(f.text)] == 0 {
			delete(ws.lengths, len(f.text))
		}
	case watchRange:
		delete(ws.ranges, w)
	}
}

func removeFrom(sets map[string]watcherSet, text string, w *watcher) {
	delete(sets[text], w)
	if len(sets[text]) == 0 {
		delete(sets, text)
	}
}

// follow ends the watches, or allows them, by what the loop has published. The loop calls it.
func (ws *watchers) follow(p *published, draining bool) {
	switch {
	case draining:
		ws.end(errStopping)
	case p.clusterID == 0:
		ws.end(errNotInitialized)
	case p.longLeaderless():
		ws.end(p.noLeader)
	default:
		ws.allow()
	}
}

// end ends all watches, and refuses new ones, for as long as why holds.
func (ws *watchers) end(why error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.why == nil {
		close(ws.ended)
	}
	ws.why = why
}

// allow allows watches again.
func (ws *watchers) allow() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.why == nil {
		return
	}
	ws.why = nil
	ws.ended = make(chan struct{})
}

// whenEnded is closed when the watches are to end.
func (ws *watchers) whenEnded() <-chan struct{} {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	return ws.ended
}

func (ws *watchers) whyEnded() error {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	return ws.why
}

// run passes over the events as they come, until done.
func (ws *watchers) run(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-ws.history.added:
		}
		ws.passNew()
	}
}

// passNew passes over what the history has got since it was called last. One goroutine calls it.
func (ws *watchers) passNew() {
	v := ws.history.view()
	if v.resets != ws.resets {
		ws.resets = v.resets
		ws.wakeAll()
		ws.seen.Store(v.version)
		return
	}
	ws.pass(&v)
}

// pass passes over the events that were not seen, and marks the watchers whom they concern.
func (ws *watchers) pass(v *historyView) {
	from := ws.seen.Load() + 1
	for from <= v.version {
		events, next, err := v.read(from, keyRange{}, ws.passedAtOnce*eventBytes)
		if err != nil { // what was dropped may concern anybody
			ws.wakeAll()
			ws.seen.Store(v.version)
			return
		}
		if ws.plantedAhead {
			ws.seen.Store(next - 1)
			ws.others()
		}
		ws.markAll(events)
		ws.others()
		from = next
		ws.seen.Store(next - 1)
	}
}

// others is where other goroutines may run.
func (ws *watchers) others() {
	if ws.interleave != nil {
		ws.interleave()
	}
}

// wakeAll has all watchers look for themselves.
func (ws *watchers) wakeAll() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	sets := []watcherSet{ws.ranges}
	for _, set := range ws.keys {
		sets = append(sets, set)
	}
	for _, set := range ws.prefixes {
		sets = append(sets, set)
	}
	for _, set := range sets {
		set.concern(1)
	}
}

func (ws *watchers) markAll(events []keyEvent) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.count == 0 {
		return
	}
	for _, e := range events {
		ws.keys[string(e.key)].concern(e.version)
		for length := range ws.lengths {
			if length <= len(e.key) {
				ws.prefixes[string(e.key[:length])].concern(e.version)
			}
		}
		for w := range ws.ranges {
			if w.filter.keys.has(e.key) {
				w.concern(e.version)
			}
		}
	}
}

func (s watcherSet) concern(version uint64) {
	for w := range s {
		w.concern(version)
	}
}

// cursor is how far a watch has been told.
type cursor struct {
	ws        *watchers
	w         *watcher
	clusterID uint64
	next      uint64 // all before this version was told
	isBehind  bool   // there may be events that were not told, whatever is marked
}

// cursor is how far a watch has been told that is from a version on.
func (ws *watchers) cursor(w *watcher, clusterID, from uint64) *cursor {
	return &cursor{ws: ws, w: w, clusterID: clusterID, next: from}
}

// wake is what rings when there is something to read.
func (c *cursor) wake() <-chan struct{} {
	if c.isBehind {
		return atOnce
	}
	return c.w.wake
}

// atOnce is closed.
var atOnce = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// read returns the next events. If it returns none, and isBehind, it is to be called again at
// once; else wake rings when there may be others.
func (c *cursor) read(maxBytes int) ([]keyEvent, error) {
	seen := c.ws.seen.Load() // before the mark is taken: all up to seen is marked
	c.ws.others()
	mark := c.w.mark.Swap(0)
	c.ws.others()
	if mark == 0 && !c.isBehind {
		c.next = max(c.next, seen+1)
		return nil, nil
	}
	v := c.ws.history.view()
	if v.clusterID != c.clusterID {
		return nil, errHistoryReplaced
	}
	from := c.next
	if !c.isBehind {
		from = max(from, mark)
	}
	events, next, err := v.read(from, c.w.filter.keys, maxBytes)
	if err != nil {
		return nil, err
	}
	c.next = next
	c.isBehind = next <= v.version
	return events, nil
}

// told is the version up to which all was told. It never overtakes what read has returned.
func (c *cursor) told() uint64 { return c.next - 1 }
