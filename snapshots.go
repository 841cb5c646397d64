// Snapshots sent to peers and received from them, as the loop sees them. The streams that
// carry them are in transfer.go; a snapshot that a node saves of its own state is in
// durable.go.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// snapshotsInFlight are the snapshots on their way to peers, or from one.
type snapshotsInFlight struct {
	views   []*view // that snapshots are being sent from
	pending *store  // a received snapshot's content between Step and Ready
}

// at returns the view of an index; nil: none is being sent.
func (s *snapshotsInFlight) at(index uint64) *view {
	for _, v := range s.views {
		if v.header.Index == index {
			return v
		}
	}
	return nil
}

// oldest returns the lowest index of the views that are not given up.
func (s *snapshotsInFlight) oldest() (index uint64, ok bool) {
	index = never
	for _, v := range s.views {
		if !v.givenUp.Load() {
			index = min(index, v.header.Index)
		}
	}
	return index, index != never
}

// giveUp gives up the transfers of an index; false: there are none. Whoever sends one stops
// (sendChunks), and then snapshotSent comes for each member.
func (s *snapshotsInFlight) giveUp(index uint64) bool {
	v := s.at(index)
	if v == nil || v.givenUp.Load() {
		return false
	}
	v.givenUp.Store(true)
	return true
}

// closeUnread closes the views that nobody sends from.
func (s *snapshotsInFlight) closeUnread() {
	s.views = slices.DeleteFunc(s.views, func(v *view) bool {
		if v.readers > 0 {
			return false
		}
		v.close()
		return true
	})
}

// snapshot is what raft is told when a follower needs one: the view that is being sent
// already, or a new one. The view must be of the present configuration, for the follower
// has to be in it (checkSnapshot), and the log must go on from there: so it is not one that
// was given up, for compactLog then drops the log after it.
func (n *node) snapshot() *raftpb.Snapshot {
	for _, v := range n.snapshots.views {
		if v.conf == n.store.conf && v.header.Index >= n.log.prevIndex {
			return raftSnapshot(v.header.Index, v.header.Term, v.conf)
		}
	}
	v := n.store.openView()
	v.rest = n.catchup.pause
	n.snapshots.views = append(n.snapshots.views, v)
	return raftSnapshot(v.header.Index, v.header.Term, v.conf)
}

// sendSnapshot starts a transfer. Every MsgSnap ends in one ReportSnapshot; for a
// member that was too slow, that comes once it may be tried again.
func (n *node) sendSnapshot(m *raftpb.Message) {
	to := m.GetTo()
	c := n.followerOf(to)
	if c.givenUp && !n.mayRetry(c) {
		c.waits = true
		return
	}
	v := n.snapshots.at(m.GetSnapshot().GetMetadata().GetIndex())
	if v == nil {
		n.rn.ReportSnapshot(to, raft.SnapshotFailure)
		return
	}
	v.readers++
	c.givenUp = false
	c.began = n.clock.now
	n.logger.Info("sending a snapshot", append(n.peerArgs(to), "index", v.header.Index, "keys", v.header.Keys)...)
	n.net.sendSnapshot(to, m.GetTerm(), v)
}

// snapshotSent ends a transfer. Any goroutine may call it.
func (n *node) snapshotSent(to uint64, v *view, err error) {
	n.inbox.event(func() { n.endTransfer(to, v, err) })
}

// endTransfer is snapshotSent in the loop.
func (n *node) endTransfer(to uint64, v *view, err error) {
	v.readers--
	isFollower := n.rn != nil && n.raft.role == raft.StateLeader && n.store.members[to] != nil
	if v.givenUp.Load() && isFollower {
		n.tooSlow(to, cmp.Or(err, errTooSlow).Error())
		n.followerOf(to).waits = true
		return
	}
	status := raft.SnapshotFinish
	if err != nil {
		status = raft.SnapshotFailure
		n.logger.Warn("sending a snapshot failed: it is tried again", append(n.peerArgs(to), "err", err)...)
	} else {
		n.status.count.SnapshotsSent++
		n.nowSent(to, v.header.Index)
		n.logger.Info("sent a snapshot", append(n.peerArgs(to), "index", v.header.Index)...)
	}
	if n.rn != nil {
		n.rn.ReportSnapshot(to, status)
	}
}

// readSnapshot reads a snapshot from a peer and, if this node has a disk, makes
// it durable there. Any goroutine may call it.
func (n *node) readSnapshot(r io.Reader) (*store, error) {
	if n.durable.disk == nil {
		return n.scanSnapshot(r)
	}
	w := n.durable.disk.newSnapshot()
	s, err := n.scanSnapshot(io.TeeReader(r, w))
	index := uint64(0)
	if err == nil {
		index = s.index
	}
	name, err := w.finish(index, err)
	if w.err != nil { // not the sender's fault
		n.inbox.event(func() { n.diskFailed(w.err) })
	}
	if err != nil {
		return nil, err
	}
	s.file = name
	return s, nil
}

// scanSnapshot reads a snapshot, and logs that this program is too old for it.
func (n *node) scanSnapshot(r io.Reader) (*store, error) {
	s, _, err := scanSnapshot(r, snapshotScan{speaks: n.opts.level})
	if errors.Is(err, errLevel) {
		n.logger.Error("a snapshot that was sent to this node is refused", "err", err)
	}
	return s, err
}

// receiveSnapshot hands a snapshot that came from a peer to raft and returns
// once raft has taken or ignored it. Any goroutine may call it.
func (n *node) receiveSnapshot(ctx context.Context, h *kvpb.Hello, term uint64, s *store) error {
	err := n.do(ctx, func() error { return n.stepSnapshot(h, term, s) })
	n.inbox.event(func() { n.discard(s) }) // if ctx ended first
	return err
}

func (n *node) stepSnapshot(h *kvpb.Hello, term uint64, s *store) error {
	defer n.discard(s)
	if err := n.checkSnapshot(h, s); err != nil {
		return err
	}
	fresh := n.rn == nil
	if fresh {
		if err := n.start(); err != nil {
			return err
		}
	}
	m := &raftpb.Message{
		Type:     raftpb.MsgSnap.Enum(),
		From:     new(h.From.RaftId),
		To:       new(n.id.raftID),
		Term:     new(term),
		Snapshot: raftSnapshot(s.index, s.term, s.conf),
	}
	err := errors.New("raft refused the snapshot")
	if n.admits(m) {
		n.snapshots.pending = s
		err = n.rn.Step(m)
		n.drain()
	}
	n.snapshots.pending = nil
	if fresh && n.store.clusterID == 0 { // raft has not taken it: the node is in no cluster still
		n.rn = nil
		n.log = &raftLog{snapshot: n.snapshot}
		n.raft = raftState{}
	}
	return err
}

// checkSnapshot refuses a snapshot that is not for this node as it is now.
func (n *node) checkSnapshot(h *kvpb.Hello, s *store) error {
	if !n.hears(h) || h.ClusterId != s.clusterID {
		return errors.New("the snapshot is to another raft ID, of another cluster, or of a node that was removed")
	}
	if s.members[n.id.raftID].GetId() != n.self.Id { // its address may be another since
		return errors.New("the snapshot does not name this node")
	}
	if n.rn == nil && n.currentClaim().excludes(h) {
		return errors.New("the node is claimed for another cluster")
	}
	return nil
}

// installPending makes the pending snapshot the state, and the log start
// after it.
func (n *node) installPending(snap *raftpb.Snapshot) {
	if n.snapshots.pending == nil || n.snapshots.pending.index != snap.GetMetadata().GetIndex() {
		n.err = errors.New("raft wants a snapshot that it was not given")
		return
	}
	n.store.install(n.snapshots.pending)
	n.snapshots.pending.file = "" // it is the store's
	n.snapshots.pending = nil
	n.log.reset(snap)
	if n.durable.snapshotIndex != 0 { // 0: there is no disk, or this is about to be the first job, with which persist sets it
		n.durable.snapshotIndex = n.store.index
	}
	n.durable.logged = 0
	n.durable.lastBytes = n.store.snapshotLength()
	n.status.count.SnapshotsInstalled++
	n.logger.Info("installed a snapshot", "cluster", fmt.Sprintf("%016x", n.store.clusterID), "index", n.store.index)
	n.calls.failApplied(n.store.proposers[n.id.raftID])
	n.configured()
	n.releaseReads()
}

// discard removes the file of a snapshot from a peer, unless it is installed.
func (n *node) discard(s *store) {
	if file := s.file; file != "" {
		s.file = ""
		n.durable.disk.start(func() { _ = n.durable.disk.remove(file) })
	}
}
