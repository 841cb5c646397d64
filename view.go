// Views: the store at one moment, whatever is written since.

package main

import (
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// maxRest is the longest that whoever writes a snapshot pauses at a time.
const maxRest = 8 * time.Millisecond

// errViewEnded ends a read that goes on for so long that what it keeps takes too much memory.
var errViewEnded = errors.New("so much was written since the call began that what it reads " +
	"takes too much memory, or the node has caught up by a snapshot: begin again, and read faster, " +
	"or while less is written, or in parts")

// view is the store at one moment. Any goroutine may read it. What was replaced since stays
// in memory until the view is closed, or has ended, and its last reader is done.
type view struct {
	clusterID uint64
	version   uint64
	keys      uint64

	root atomic.Pointer[page] // nil: the view was closed, or ended

	store    *store
	replaced uint64 // the tree's, when the view was opened

	// Of a client's view, which the store may end.
	epoch uint64 // it has pages of earlier ones only
	kept  uint64 // the tree's, when the view was opened

	// Of a view of the whole state, which a snapshot is written from.
	conf     *raftpb.ConfState // the store's then
	header   *kvpb.SnapshotHeader
	sessions []session   // as all returns them
	length   uint64      // about, of the snapshot
	readers  int         // snapshots that are being sent from it; the loop's
	givenUp  atomic.Bool // set by the loop: the log behind it is dropped, so it need not be sent
	// rest is called by writeTo now and then, with how long that has worked, to leave processor
	// and disk to others; nil: writeTo does not pause.
	rest func(worked time.Duration)
}

// keyRecordBytes is what a snapshot has of a key besides key and value, about.
const keyRecordBytes = 16

// snapshotLength is about the length of a snapshot. Only the loop may call it.
func (s *store) snapshotLength() uint64 {
	return s.tree.bytes + keyRecordBytes*s.tree.keys + s.sessions.recordBytes()
}

// openKeys opens a view of the keys for a client. Any goroutine may call it.
func (s *store) openKeys() (*view, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clusterID == 0 {
		return nil, errNotInitialized
	}
	v := s.takeView()
	s.addClientView(v)
	return v, nil
}

// openPage is openKeys for a List, which is done so soon that what it keeps need not count.
func (s *store) openPage() (*view, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clusterID == 0 {
		return nil, errNotInitialized
	}
	return s.takeView(), nil
}

// openView opens a view of the whole state, for a snapshot. Only the loop may call it. The
// store does not end it.
func (s *store) openView() *view {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.takeView()
	v.conf = s.conf
	v.header = s.header()
	v.sessions = s.sessions.all()
	v.length = s.snapshotLength()
	return v
}

// openBackup is openView for a client, whose view the store may end. Only the loop may call it.
func (s *store) openBackup() *view {
	v := s.openView()
	v.header.Origin = kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_CLUSTER
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addClientView(v)
	return v
}

// takeView takes a view. mu is held.
func (s *store) takeView() *view {
	t := s.tree.view()
	v := &view{
		clusterID: s.clusterID,
		version:   s.version,
		keys:      t.keys,
		store:     s,
		replaced:  s.tree.replaced(),
		epoch:     t.epoch,
	}
	v.root.Store(t.root)
	return v
}

func (s *store) addClientView(v *view) {
	v.kept = s.tree.kept
	s.clientViews = append(s.clientViews, v)
	s.countViews()
}

// countViews has the tree count what the views of clients keep. mu is held.
func (s *store) countViews() {
	s.tree.counted = 0
	for _, v := range s.clientViews {
		s.tree.counted = max(s.tree.counted, v.epoch)
	}
}

// viewLoad is what the views of clients keep.
type viewLoad struct {
	open        int
	kept, limit uint64 // bytes
}

// viewLoad returns it. Any goroutine may call it.
func (s *store) viewLoad() viewLoad {
	s.mu.RLock()
	defer s.mu.RUnlock()
	load := viewLoad{open: len(s.clientViews), limit: s.viewLimit()}
	if load.open > 0 {
		load.kept = s.tree.kept - s.clientViews[0].kept
	}
	return load
}

// viewLimit bounds what they keep. mu is held.
func (s *store) viewLimit() uint64 { return max(s.viewBytes, s.tree.bytes/4) }

// endCostlyViews ends the oldest views of clients, while they keep too much memory. mu is held.
func (s *store) endCostlyViews() {
	limit := s.viewLimit()
	for len(s.clientViews) > 0 && s.tree.kept-s.clientViews[0].kept > limit {
		s.endOldestView()
	}
}

// endOldestView ends the oldest view of a client. mu is held.
func (s *store) endOldestView() {
	s.letGo(s.clientViews[0])
	s.clientViews = slices.Delete(s.clientViews, 0, 1)
	s.countViews()
}

// close lets go of what was replaced since the view was opened.
func (v *view) close() {
	v.store.mu.Lock()
	defer v.store.mu.Unlock()
	v.store.letGo(v)
	v.store.clientViews = slices.DeleteFunc(v.store.clientViews, func(o *view) bool { return o == v })
	v.store.countViews()
}

// letGo has a view let go of the tree, and counts what it may have kept. mu is held.
func (s *store) letGo(v *view) {
	if v.root.Swap(nil) != nil {
		s.released += s.tree.replaced() - v.replaced
	}
}

// page returns the first items of a range, as many as limit and maxBytes of keys and values
// allow, but at least one, and whether there are more.
func (v *view) page(r keyRange, limit, maxBytes int) (items []keyItem, more bool, err error) {
	return v.pageBy(r, limit, maxBytes, func(it keyItem) int { return len(it.key) + len(it.value) })
}

// pageOfKeys is page for who wants keys only: values do not count.
func (v *view) pageOfKeys(r keyRange, limit, maxBytes int) (items []keyItem, more bool, err error) {
	return v.pageBy(r, limit, maxBytes, func(it keyItem) int { return len(it.key) })
}

// pageBy is a page of which each item takes as many of maxBytes as bytes says.
func (v *view) pageBy(
	r keyRange, limit, maxBytes int, bytes func(keyItem) int,
) (items []keyItem, more bool, err error) {
	root := v.root.Load()
	if root == nil {
		return nil, false, errViewEnded
	}
	size := 0
	for key, it := range (treeView{root: root}).from(r.start) {
		if !r.endsAfter(key) {
			return items, false, nil
		}
		next := keyItem{key, it}
		size += bytes(next)
		isFull := len(items) == limit || size > maxBytes
		if isFull && len(items) > 0 {
			return items, true, nil
		}
		items = append(items, next)
	}
	return items, false, nil
}

// rest waits for as long as writeTo has worked, but for no more than maxRest.
func rest(worked time.Duration) { time.Sleep(min(worked, maxRest)) }
