// History: the last writes that had an effect, in the order of their versions. Watches read
// it.

package main

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"sync"
)

const (
	// eventBytes and chunkBytes are what an event, and what the events of one entry, take of
	// memory besides what they share with the log.
	eventBytes = 20
	chunkBytes = 96
	// maxPassed bounds the events that one read passes over.
	maxPassed = 16 << 10
)

// errHistoryReplaced ends a watch whose node has another cluster's state by now, or none.
var errHistoryReplaced = errors.New("this node has left the cluster that the watch is of")

// compactedError says that the events from a version on are not all there any more.
type compactedError struct{ oldest uint64 }

func (e *compactedError) Error() string {
	return fmt.Sprintf("the oldest version that this node can tell of is %d: "+
		"read what is there now, for instance by Scan, and watch from the version after that", e.oldest)
}

// keyEvent is a key that was set or deleted. Its slices are never changed.
type keyEvent struct {
	key, value []byte
	version    uint64 // of the write; those of one DeleteRange share it
	deleted    bool
}

// eventRef is an event, as parts of the data of its chunk.
type eventRef struct {
	after         uint32 // by how much its version is above the chunk's first
	keyAt, keyLen uint32
	valueAt       uint32 // deletedAt: the key was deleted
	valueLen      uint32
}

const deletedAt = 1<<32 - 1

// eventChunk is events of one entry. Nobody changes it once it is in the history.
type eventChunk struct {
	first, last uint64 // versions
	data        []byte // the entry's, or of a DeleteRange the keys
	refs        []eventRef
	bytes       uint64 // of memory, once it is in the history
}

func (c *eventChunk) event(i int) keyEvent {
	r := &c.refs[i]
	e := keyEvent{version: c.first + uint64(r.after), key: c.data[r.keyAt:][:r.keyLen:r.keyLen]}
	if r.valueAt == deletedAt {
		e.deleted = true
		return e
	}
	e.value = c.data[r.valueAt:][:r.valueLen:r.valueLen]
	return e
}

// entryEvents are the events of one entry while it is applied.
type entryEvents struct {
	data      []byte // the entry's; what is added are parts of it
	uncounted uint64 // len(data), until the first chunk has counted it: one event keeps all of data
	chunks    []eventChunk
	isOpen    bool // the last chunk takes further events
}

func newEntryEvents(data []byte) entryEvents {
	return entryEvents{data: data, uncounted: uint64(len(data))}
}

// add adds an event whose key and value are parts of the entry's data.
func (e *entryEvents) add(key, value []byte, version uint64, deleted bool) {
	if !e.isOpen {
		e.chunks = append(e.chunks, eventChunk{first: version, data: e.data, bytes: e.uncounted})
		e.isOpen = true
		e.uncounted = 0
	}
	c := &e.chunks[len(e.chunks)-1]
	c.last = version
	r := eventRef{
		after:    uint32(version - c.first),
		keyAt:    offsetIn(e.data, key),
		keyLen:   uint32(len(key)),
		valueAt:  offsetIn(e.data, value),
		valueLen: uint32(len(value)),
	}
	if deleted {
		r.valueAt = deletedAt
	}
	c.refs = append(c.refs, r)
}

// offsetIn returns where in data a part of it begins; of an empty part, 0. The part must reach to
// data's capacity, as all parts do that operation.go cuts out of an entry (TestHistory).
func offsetIn(data, part []byte) uint32 {
	if len(part) == 0 {
		return 0
	}
	return uint32(cap(data) - cap(part))
}

// addDeleted adds the keys that one write has deleted. It copies them.
func (e *entryEvents) addDeleted(keys [][]byte, version uint64) {
	if len(keys) == 0 {
		return
	}
	c := eventChunk{
		first: version,
		last:  version,
		data:  slices.Concat(keys...),
		refs:  make([]eventRef, len(keys)),
	}
	c.bytes = uint64(len(c.data))
	at := uint32(0)
	for i, key := range keys {
		c.refs[i] = eventRef{keyAt: at, keyLen: uint32(len(key)), valueAt: deletedAt}
		at += uint32(len(key))
	}
	e.chunks = append(e.chunks, c)
	e.isOpen = false
}

// eventHistory is the events of the last writes, as far back as its limit allows. The loop adds to
// it; any goroutine may read it.
type eventHistory struct {
	limit  uint64 // of bytes; set before the node runs
	passed int    // events that one read passes over: maxPassed, but in tests
	added  bell   // rings when something was added, or all was replaced

	mu        sync.RWMutex
	clusterID uint64 // whose history it is; 0: nobody's
	resets    uint64
	oldest    uint64       // all events of this version, and of later ones up to version, are here
	version   uint64       // of the last write that was applied
	chunks    []eventChunk // by version; views share it, so it is only appended to, or replaced
	dropped   int          // chunks that still take memory
	bytes     uint64

	plantedSkip bool // a bug that the simulator plants: a new state hides that events are missing
}

func newEventHistory(limit uint64) *eventHistory {
	return &eventHistory{limit: limit, passed: maxPassed, added: newBell(), oldest: 1}
}

// add adds the events of an entry, after which this is the version.
func (h *eventHistory) add(e *entryEvents, version uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if version == h.version {
		return
	}
	h.version = version
	for _, c := range e.chunks {
		c.bytes += chunkBytes + eventBytes*uint64(len(c.refs))
		h.chunks = append(h.chunks, c)
		h.bytes += c.bytes
	}
	h.drop()
	h.added.ring()
}

// drop drops the oldest events beyond the limit: all of one version, or none.
func (h *eventHistory) drop() {
	n := 0
	for n < len(h.chunks) && h.bytes > h.limit {
		h.bytes -= h.chunks[n].bytes
		h.oldest = h.chunks[n].last + 1
		n++
	}
	h.chunks = h.chunks[n:]
	h.dropped += n
	if h.dropped > len(h.chunks)/8 {
		h.chunks = slices.Clone(h.chunks) // lets go of what was dropped
		h.dropped = 0
	}
}

// reset makes it the history of a state that came as a whole: nothing is known of before.
func (h *eventHistory) reset(clusterID, version uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clusterID = clusterID
	h.version = version
	h.resets++
	if !h.plantedSkip {
		h.oldest = version + 1
		h.chunks = nil
		h.dropped = 0
		h.bytes = 0
	}
	h.added.ring()
}

// historyLoad is what a history has.
type historyLoad struct{ bytes, limit, oldest uint64 }

func (h *eventHistory) load() historyLoad {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return historyLoad{bytes: h.bytes, limit: h.limit, oldest: h.oldest}
}

// historyView is a history as it was at one moment.
type historyView struct {
	clusterID, resets, oldest, version uint64
	chunks                             []eventChunk
	passed                             int // after so many events a read stops
}

func (h *eventHistory) view() historyView {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return historyView{h.clusterID, h.resets, h.oldest, h.version, h.chunks, h.passed}
}

// read returns events of a range of keys from a version on, and the version to go on from: all
// events of the range before that are returned. It goes up to the end of the history, or stops
// before a version, once it has maxBytes of events, or has passed over so many of other keys that
// others should have their turn: then it may have returned none. What one write made is not divided.
func (v *historyView) read(from uint64, r keyRange, maxBytes int) (events []keyEvent, next uint64, err error) {
	if from < v.oldest {
		return nil, from, &compactedError{v.oldest}
	}
	if from > v.version {
		return nil, from, nil
	}
	passed, bytes := 0, 0
	first := sort.Search(len(v.chunks), func(i int) bool { return v.chunks[i].last >= from })
	last := from - 1 // the version of the last event that was passed
	for _, c := range v.chunks[first:] {
		for i := range c.refs {
			version := c.first + uint64(c.refs[i].after)
			if version < from {
				continue
			}
			isFull := passed >= v.passed || bytes >= maxBytes
			if isFull && passed > 0 && version > last {
				return events, version, nil
			}
			last = version
			passed++
			e := c.event(i)
			if !r.has(e.key) {
				continue
			}
			events = append(events, e)
			bytes += len(e.key) + len(e.value) + eventBytes
		}
	}
	return events, v.version + 1, nil
}
