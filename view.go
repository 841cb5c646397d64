// Views: the store at one index, whatever is written since.

package main

import (
	"bytes"
	"slices"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// maxRest is the longest that whoever writes a snapshot stands aside at a time.
const maxRest = 8 * time.Millisecond

// view is the store at one index, whatever is written since: the items no
// newer than that, and those that have been replaced. It has to be closed. The
// store's mu guards shards and replaced.
type view struct {
	store    *store
	conf     *raftpb.ConfState // the store's then
	readers  int               // snapshots that are being sent from it; the loop's
	givenUp  atomic.Bool       // set by the loop: the log behind it is dropped, so it need not be sent
	header   *kvpb.SnapshotHeader
	sessions []session // as all returns them
	shards   []shard
	replaced map[uint64][]keyItem // by shard
	// rest, if writeTo is not to take all that it can get of processor and disk,
	// is called now and then, with how long it has worked.
	rest func(worked time.Duration)
}

// openView opens a view. Only the loop may call it.
func (s *store) openView() *view {
	v := s.openKeys()
	v.sessions = s.sessions.all()
	return v
}

// openKeys opens a view without sessions, in no more time than that of one
// write. Only the loop may call it.
func (s *store) openKeys() *view {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := &view{store: s, conf: s.conf, header: s.header(), shards: s.shards, replaced: map[uint64][]keyItem{}}
	s.views = append(s.views, v)
	return v
}

// close lets go of what was preserved. Any goroutine may call it.
func (v *view) close() {
	v.store.mu.Lock()
	defer v.store.mu.Unlock()
	v.store.views = slices.DeleteFunc(v.store.views, func(o *view) bool { return o == v })
}

// shard returns the items of a shard whose keys are wanted, in no order. It copies
// what later writes change: into room, as long as there is some. Any goroutine may
// call it.
func (v *view) shard(i uint64, room []byte, wanted func(key []byte) bool) []keyItem {
	v.store.mu.RLock()
	defer v.store.mu.RUnlock()
	sh := &v.shards[i]
	var items []keyItem
	for _, it := range v.replaced[i] {
		if wanted(it.key) {
			items = append(items, it)
		}
	}
	kept := func(b []byte) []byte {
		if len(b) > cap(room)-len(room) {
			return bytes.Clone(b)
		}
		room = append(room, b...)
		return room[len(room)-len(b) : len(room) : len(room)]
	}
	for key, it := range sh.packed {
		if it.version <= v.header.Version && wanted(key) {
			items = append(items, keyItem{kept(key), item{kept(it.value), it.version}})
		}
	}
	for key, it := range sh.others {
		if it.version <= v.header.Version && wanted(key) {
			items = append(items, keyItem{key, it})
		}
	}
	return items
}

func compareKeys(a, b keyItem) int { return bytes.Compare(a.key, b.key) }

// page returns the first keys after a key that have a prefix, in order, as
// many as limit and maxBytes allow but at least one, and whether there are
// more. It passes over all keys of the view.
func (v *view) page(prefix, after string, limit, maxBytes int) (page []keyItem, more bool) {
	size := 0
	var end []byte // if there are more, the first key that cannot be on the page
	cut := func() {
		slices.SortFunc(page, compareKeys)
		n := 0
		for size = 0; n < min(limit, len(page)) && (n == 0 || size+len(page[n].key)+len(page[n].value) <= maxBytes); n++ {
			size += len(page[n].key) + len(page[n].value)
		}
		if n < len(page) {
			end = page[n].key
			page, more = slices.Delete(page, n, len(page)), true
		}
	}
	wanted := func(key []byte) bool {
		return string(key) > after && bytes.HasPrefix(key, []byte(prefix)) && (!more || bytes.Compare(key, end) < 0)
	}
	for i := range uint64(numShards) {
		for _, it := range v.shard(i, nil, wanted) {
			page = append(page, it)
			size += len(it.key) + len(it.value)
		}
		if len(page) > 2*limit+numShards || size > 2*maxBytes {
			cut()
		}
	}
	cut()
	return page, more
}

// rest waits for as long as writeTo has worked, but for no more than maxRest.
func rest(worked time.Duration) { time.Sleep(min(worked, maxRest)) }
