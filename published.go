// What the loop lets others know of it: its state, its metrics, and how it names members.

package main

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// nodeStatus is what others see of this node.
type nodeStatus struct {
	latest   atomic.Pointer[published] // any goroutine
	onChange func(*published)          // called by the loop whenever latest has changed
	count    kvpb.MetricsResponse      // its counters
}

// published is what other goroutines may know of the loop's state. It is never
// changed.
type published struct {
	glance
	leader   *kvpb.Node // nil: unknown
	members  map[uint64]*kvpb.Node
	removed  []uint64
	noLeader error // what to say if there is none
}

// glance is what shows whether anything of it is new.
type glance struct {
	clusterID, raftID, life uint64
	term, lead              uint64
	leading, caughtUp       bool
	leaderAt                string
	dispensable             bool   // this node may be restarted
	lost, connected         int    // members known to have lost their memory; peers
	leaderless              uint64 // seconds without a leader
	claim                   *claim // nil: it has not promised itself
	conf                    *raftpb.ConfState
}

// longLeaderless reports whether there has been no leader for so long that calls do not
// wait for one any more.
func (g *glance) longLeaderless() bool { return g.leaderless >= uint64(leaderWait/time.Second) }

// publish lets others see what they may, if it has changed.
func (n *node) publish() {
	if n.durable.disk == nil {
		n.durable.removed = n.store.removed
	}
	old, s := n.status.latest.Load(), n.store
	leader := n.nodeOf(n.raft.lead)
	now := glance{
		clusterID: s.clusterID, raftID: n.id.raftID, life: n.id.life, term: n.raft.term, lead: n.raft.lead,
		leading: n.leads(), caughtUp: n.caughtUp(), dispensable: n.rn != nil && n.isDispensable(),
		lost: len(n.peers.met), connected: len(n.peers.connected), leaderless: n.election.leaderless / n.ticksOf(time.Second),
		leaderAt: leader.GetAddress(), claim: n.currentClaim(), conf: s.conf,
	}
	if old.glance == now && slices.Equal(old.removed, n.durable.removed) {
		return
	}
	p := &published{glance: now, leader: leader, members: s.members, removed: n.durable.removed, noLeader: n.noLeader()}
	if p.lead != 0 && (old.lead != p.lead || old.term != p.term) {
		n.logger.Info("leader", "is", n.describe(p.lead), "term", p.term)
	}
	if err := n.quorumLost(); p.lead == 0 && err != nil && (old.lost != p.lost || old.lead != 0) {
		n.logger.Error("the cluster cannot go on", "err", err)
	}
	n.status.latest.Store(p)
	n.status.onChange(p)
}

// metrics is the node's own view; only the loop may call it.
func (n *node) metrics() *kvpb.MetricsResponse {
	s := n.store
	m := proto.CloneOf(&n.status.count)
	m.Node, m.RaftId, m.ClusterId, m.Role = n.self, n.id.raftID, s.clusterID, kvpb.Role_ROLE_UNINITIALIZED
	m.Leader = n.nodeOf(n.raft.lead)
	m.FirstIndex, m.LastIndex, m.AppliedIndex, m.LogBytes = n.log.prevIndex+1, n.log.last(), s.index, n.log.bytes
	m.Joint, m.Version, m.UnhealthyReason = isJoint(s.conf), s.version, n.whyUnhealthy()
	m.Healthy, m.Durable = m.UnhealthyReason == "", n.durable.disk != nil
	m.RestartReason = n.whyNotRestart()
	m.Keys, m.StoreBytes, m.Sessions = s.keys, s.bytes, uint64(len(s.sessions))
	if n.rn == nil {
		return m
	}
	m.Term, m.CommitIndex = n.raft.term, n.rn.BasicStatus().GetCommit()
	m.WriteLimit = n.rate(n.catchup.pace.limit, 1)
	switch {
	case n.raft.role == raft.StateLeader:
		m.Role = kvpb.Role_ROLE_LEADER
	case n.raft.role != raft.StateFollower:
		m.Role = kvpb.Role_ROLE_CANDIDATE
	case slices.Contains(s.conf.GetLearners(), n.id.raftID):
		m.Role = kvpb.Role_ROLE_LEARNER
	default:
		m.Role = kvpb.Role_ROLE_FOLLOWER
	}
	progress := n.progressOf()
	for _, member := range sortedMembers(s.members) {
		id := member.RaftId
		ms := &kvpb.MemberStatus{
			Node: member.Node, RaftId: id, Connected: n.peers.connected[id] || id == n.id.raftID,
			Voter: slices.Contains(s.conf.GetVoters(), id), VoterOutgoing: slices.Contains(s.conf.GetVotersOutgoing(), id),
			Learner: slices.Contains(s.conf.GetLearners(), id) || slices.Contains(s.conf.GetLearnersNext(), id),
		}
		if pr, ok := progress[id]; ok {
			ms.Progress = &kvpb.Progress{
				MatchIndex: pr.Match, NextIndex: pr.Next, State: pr.State.String(), RecentActive: pr.RecentActive, CaughtUp: n.isCaughtUp(pr),
			}
			ms.Lagging = n.lagging(id, pr)
		}
		m.Members = append(m.Members, ms)
	}
	return m
}

// describe names a raft ID in a log.
func (n *node) describe(raftID uint64) string {
	if m := n.store.members[raftID]; m != nil {
		return fmt.Sprintf("%d", m.Id)
	}
	return fmt.Sprintf("with raft ID %x", raftID)
}

// locate names a raft ID, and says where it is.
func (n *node) locate(raftID uint64) string {
	if at := n.nodeOf(raftID); at != nil {
		return fmt.Sprintf("node %d at %s", at.Id, at.Address)
	}
	return "a node " + n.describe(raftID)
}

// names lists members.
func (n *node) names(ids []uint64) string {
	var names []string
	for _, id := range ids {
		names = append(names, "node "+n.describe(id))
	}
	slices.Sort(names)
	return strings.Join(names, " and ")
}

// silent says which members do not answer.
func (n *node) silent(ids []uint64) string {
	return n.names(ids) + oneOf(len(ids) > 1, " do not answer", " does not answer")
}

// addresses lists where members are.
func (n *node) addresses(ids []uint64) string {
	var at []string
	for _, id := range ids {
		at = append(at, n.store.members[id].Address)
	}
	slices.Sort(at)
	return strings.Join(slices.Compact(at), " and ")
}

func (n *node) durationOf(ticks uint64) time.Duration {
	return (time.Duration(ticks) * n.tickDuration()).Round(100 * time.Millisecond)
}
