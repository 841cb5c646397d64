// Watchers: who is told of which keys. One goroutine, the teller, passes over the events, once
// for all watchers, and wakes those whom an event concerns: a write costs nothing that grows with
// their number.
//
//   - The teller gives each watcher whom an event concerns a mark, the event's version, unless
//     the watcher has a mark. Only when it has done so for all events up to a version, it says
//     that this version is seen.
//   - The watch's cursor loads the version that is seen, and after that takes the mark.
//   - If there is no mark, no event up to that version concerns the watch. The cursor goes on
//     behind the version, without a look at the events.
//   - If there is a mark, the cursor reads the history from there on to its end, in parts. A
//     pass is over events that are in the history, so the cursor finds all of that pass: a watcher
//     needs a mark for the first of them alone.
//   - Events may be missing: they were dropped before they were passed over, or the whole state
//     was replaced. Then all watchers get a mark, and what they read tells them.

package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

const (
	// maxWatchers bounds the watches of a node: each takes some 25 KiB, of goroutine and
	// stream. maxWatchedBytes bounds the keys, prefixes and bounds that they name. A principal may
	// have half of these and of what follows; without TLS there is one principal, which may have all.
	maxWatchers     = 10_000
	maxWatchedBytes = 8 << 20
	// maxWatchedRanges bounds the ranges that are watched, which are neither keys nor
	// prefixes, and maxPrefixLengths the lengths of prefixes: all of them are looked at for each
	// event.
	maxWatchedRanges = 256
	maxPrefixLengths = 64
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
		end := append([]byte(req.Key), 0) // the next key that there can be
		key := end[:len(req.Key)]
		if err := checkKey(key); err != nil {
			return watchFilter{}, err
		}
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

// bytes is what the filter takes of memory that grows with what its caller has sent.
func (f *watchFilter) bytes() int {
	if f.kind == watchKey {
		return len(f.text) + len(f.keys.end) // which start is a part of
	}
	return len(f.text) + len(f.keys.start) + len(f.keys.end)
}

// watcherSet is the watchers of one key or prefix.
type watcherSet struct {
	members map[*watcher]struct{}
	pass    uint64 // the last one that has marked them
}

// watchShare is what a principal has, or all principals together.
type watchShare struct {
	count, bytes int
	ranges       int
	prefixes     map[int]int // watches of prefixes, by the length of these
}

// seenVersion is a version up to which all events were passed over, of a history that was
// replaced so often.
type seenVersion struct{ resets, version uint64 }

// watchers are the watches of a node. Any goroutine may call its methods.
type watchers struct {
	history *eventHistory
	seen    atomic.Pointer[seenVersion] // marks are set first, then seen

	limit        int    // of watches: maxWatchers, or less with little memory
	passedAtOnce int    // maxPassedAtOnce, but in tests
	interleave   func() // nil; the simulator does here what other goroutines may do
	plantedAhead bool   // a bug that the simulator plants: seen runs ahead of the marks

	mu       sync.Mutex
	total    watchShare // its prefixes say which lengths are to be looked at
	of       map[principal]*watchShare
	keys     map[string]*watcherSet
	prefixes map[string]*watcherSet
	ranges   map[*watcher]*watcherSet // each alone
	passes   uint64                   // that were begun; the teller alone uses it

	// The loop does not wait for passes: whether the watches may go on has a lock of its own.
	endMu sync.Mutex
	may   context.Context // ends when the watches are to end
	end   context.CancelCauseFunc
}

func newWatchers(h *eventHistory) *watchers {
	ws := &watchers{
		history:  h,
		total:    watchShare{prefixes: map[int]int{}},
		of:       map[principal]*watchShare{},
		keys:     map[string]*watcherSet{},
		prefixes: map[string]*watcherSet{},
		ranges:   map[*watcher]*watcherSet{},

		limit:        maxWatchers,
		passedAtOnce: maxPassedAtOnce,
	}
	ws.seen.Store(&seenVersion{})
	ws.may, ws.end = context.WithCancelCause(context.Background())
	return ws
}

// add adds a watch that is told of all events from now on, and is to look at once for those
// before.
func (ws *watchers) add(f watchFilter, p principal) (*watcher, error) {
	w := &watcher{filter: f, principal: p, wake: newBell()}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if err := ws.hasPlace(w); err != nil {
		return nil, err
	}
	switch f.kind {
	case watchKey:
		addTo(ws.keys, f.text, w)
	case watchPrefix:
		addTo(ws.prefixes, f.text, w)
	case watchRange:
		ws.ranges[w] = &watcherSet{members: map[*watcher]struct{}{w: {}}}
	}
	share := ws.of[p]
	if share == nil {
		share = &watchShare{prefixes: map[int]int{}}
		ws.of[p] = share
	}
	share.change(&f, 1)
	ws.total.change(&f, 1)
	w.concern(lookAnyway)
	return w, nil
}

// lookAnyway is a mark that says nothing of events: look from where you are.
const lookAnyway = 1

// hasPlace returns an error if there are too many watches for another one. mu is held.
func (ws *watchers) hasPlace(w *watcher) error {
	if err := ws.total.hasPlace(&w.filter, ws.limit, 1); err != nil {
		return err
	}
	share := ws.of[w.principal]
	if share == nil || w.principal.role == roleAnyone {
		return nil
	}
	return share.hasPlace(&w.filter, ws.limit, 2)
}

// hasPlace returns an error if there are too many watches for another one, for whom a part of the
// limits is.
func (s *watchShare) hasPlace(f *watchFilter, limit, divisor int) error {
	isNewLength := f.kind == watchPrefix && s.prefixes[len(f.text)] == 0
	switch {
	case s.count >= limit/divisor:
		return tooManyWatches("watches")
	case s.bytes+f.bytes() > maxWatchedBytes/divisor:
		return tooManyWatches("bytes of watched keys")
	case f.kind == watchRange && s.ranges >= maxWatchedRanges/divisor:
		return tooManyWatches("watches of ranges")
	case isNewLength && len(s.prefixes) >= maxPrefixLengths/divisor:
		return tooManyWatches("watches of prefixes of different lengths")
	}
	return nil
}

func tooManyWatches(what string) error {
	return apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED,
		fmt.Sprintf("this node, or this caller, has too many %s", what))
}

// count is how many watches there are.
func (ws *watchers) count() int {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	return ws.total.count
}

// change counts a watch, or with -1 counts it no more.
func (s *watchShare) change(f *watchFilter, by int) {
	s.count += by
	s.bytes += by * f.bytes()
	switch f.kind {
	case watchPrefix:
		length := len(f.text)
		s.prefixes[length] += by
		if s.prefixes[length] == 0 {
			delete(s.prefixes, length)
		}
	case watchRange:
		s.ranges += by
	}
}

func addTo(sets map[string]*watcherSet, text string, w *watcher) {
	if sets[text] == nil {
		sets[text] = &watcherSet{members: map[*watcher]struct{}{}}
	}
	sets[text].members[w] = struct{}{}
}

func (ws *watchers) remove(w *watcher) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.total.change(&w.filter, -1)
	share := ws.of[w.principal]
	share.change(&w.filter, -1)
	if share.count == 0 {
		delete(ws.of, w.principal)
	}
	switch f := w.filter; f.kind {
	case watchKey:
		removeFrom(ws.keys, f.text, w)
	case watchPrefix:
		removeFrom(ws.prefixes, f.text, w)
	case watchRange:
		delete(ws.ranges, w)
	}
}

func removeFrom(sets map[string]*watcherSet, text string, w *watcher) {
	delete(sets[text].members, w)
	if len(sets[text].members) == 0 {
		delete(sets, text)
	}
}

// follow ends the watches, or allows them, by what the loop has published. The loop calls it.
func (ws *watchers) follow(p *published, draining bool) {
	switch {
	case draining:
		ws.stop(errStopping)
	case p.clusterID == 0:
		ws.stop(errNotInitialized)
	case p.longLeaderless():
		ws.stop(p.noLeader)
	default:
		ws.allow()
	}
}

// stop ends all watches, and refuses new ones, until allow.
func (ws *watchers) stop(why error) {
	ws.endMu.Lock()
	defer ws.endMu.Unlock()
	ws.end(why)
}

// allow allows watches again.
func (ws *watchers) allow() {
	ws.endMu.Lock()
	defer ws.endMu.Unlock()
	if ws.may.Err() != nil {
		ws.may, ws.end = context.WithCancelCause(context.Background())
	}
}

// allowed is a context that ends when the watches are to end; its cause is why.
func (ws *watchers) allowed() context.Context {
	ws.endMu.Lock()
	defer ws.endMu.Unlock()
	return ws.may
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
	if v.resets != ws.seen.Load().resets {
		ws.wakeAll()
		ws.seen.Store(&seenVersion{v.resets, v.version})
		return
	}
	ws.pass(&v)
}

// pass passes over the events that were not seen, and marks the watchers whom they concern.
func (ws *watchers) pass(v *historyView) {
	ws.passes++
	from := ws.seen.Load().version + 1
	for from <= v.version {
		events, next, err := v.read(from, keyRange{}, ws.passedAtOnce*eventBytes)
		if err != nil { // what was dropped may concern anybody
			ws.wakeAll()
			ws.seen.Store(&seenVersion{v.resets, v.version})
			return
		}
		if ws.plantedAhead {
			ws.seen.Store(&seenVersion{v.resets, next - 1})
			ws.others()
		}
		ws.markAll(events)
		ws.others()
		from = next
		ws.seen.Store(&seenVersion{v.resets, next - 1})
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
	for _, set := range ws.keys {
		set.concern(lookAnyway)
	}
	for _, set := range ws.prefixes {
		set.concern(lookAnyway)
	}
	for w := range ws.ranges {
		w.concern(lookAnyway)
	}
}

// markAll marks the watchers whom events concern, each set once a pass.
func (ws *watchers) markAll(events []keyEvent) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.total.count == 0 {
		return
	}
	for _, e := range events {
		ws.markOnce(ws.keys[string(e.key)], e.version)
		for length := range ws.total.prefixes {
			if length <= len(e.key) {
				ws.markOnce(ws.prefixes[string(e.key[:length])], e.version)
			}
		}
		for w, set := range ws.ranges {
			if set.pass != ws.passes && w.filter.keys.has(e.key) {
				ws.markOnce(set, e.version)
			}
		}
	}
}

// markOnce marks the watchers of a set, unless the pass has done so. A set may be nil. mu is
// held.
func (ws *watchers) markOnce(s *watcherSet, version uint64) {
	if s == nil || s.pass == ws.passes {
		return
	}
	s.pass = ws.passes
	s.concern(version)
}

func (s *watcherSet) concern(version uint64) {
	for w := range s.members {
		w.concern(version)
	}
}

// cursor is how far a watch has been told.
type cursor struct {
	ws        *watchers
	w         *watcher
	clusterID uint64
	resets    uint64 // of the history that it has read
	next      uint64 // all before this version was told
	isBehind  bool   // there may be events that were not told, whatever is marked
}

// cursor is how far a watch has been told that is from a version on.
func (ws *watchers) cursor(w *watcher, v *historyView, from uint64) *cursor {
	return &cursor{ws: ws, w: w, clusterID: v.clusterID, resets: v.resets, next: from}
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
		if seen.resets == c.resets { // else it is a version of another history
			c.next = max(c.next, seen.version+1)
		}
		return nil, nil
	}
	v := c.ws.history.view()
	c.resets = v.resets
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
