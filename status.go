// What the loop lets others know of it: its state, its metrics, and how it names members.

package main

import (
	"slices"
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
	started  atomic.Bool               // the loop has begun to turn
	waitsFor atomic.Pointer[string]    // of a node in no cluster: what keeps it from one; nil: nothing is known
}

// published is what other goroutines may know of the loop's state. It is never
// changed.
type published struct {
	glance
	leader   *kvpb.Node // nil: unknown
	members  map[uint64]*kvpb.Node
	founding []*kvpb.Node // the members of an Init that is half way; nil: there is none
	removed  []uint64
	// durableNodes are the ids of members that have said that they have a data directory.
	durableNodes []uint64
	noLeader     error // what to say if there is none
}

// glance is the part of published that shows by comparison whether anything is new.
type glance struct {
	clusterID   uint64 // 0: in no cluster
	level       uint32 // of the cluster
	raftID      uint64
	life        uint64
	term        uint64
	lead        uint64 // raft ID; 0: unknown
	leaderAt    string // the leader's address
	leading     bool   // this node leads, and has applied an entry of its term
	caughtUp    bool
	dispensable bool              // this node may be restarted
	lost        int               // members known to have lost their memory
	connected   int               // peers
	leaderless  uint64            // seconds without a leader
	claim       *claim            // nil: it has not promised itself
	conf        *raftpb.ConfState // never changed: a new configuration is a new pointer
}

// longLeaderless reports whether there has been no leader for so long that calls do not
// wait for one any more.
func (g *glance) longLeaderless() bool { return g.leaderless >= uint64(leaderWait/time.Second) }

// publish lets others see what they may, if it has changed.
func (n *node) publish() {
	if n.durable.disk == nil {
		n.durable.removed = n.store.removed
	}
	old := n.status.latest.Load()
	now := n.glance()
	isSame := old.glance == now && slices.Equal(old.removed, n.durable.removed)
	if isSame && slices.Equal(old.durableNodes, n.peers.durableNodes) {
		return
	}
	p := &published{
		glance:   now,
		leader:   n.nodeOf(n.raft.lead),
		members:  n.store.members,
		founding: n.store.founding,
		removed:  n.durable.removed,

		durableNodes: n.peers.durableNodes,
		noLeader:     n.noLeader(),
	}
	isNewLeader := old.lead != p.lead || old.term != p.term
	if p.lead != 0 && isNewLeader {
		n.logger.Info("leader", append(n.peerArgs(p.lead), "term", p.term)...)
	}
	isNews := old.lost != p.lost || old.lead != 0
	if err := n.quorumLost(); err != nil && p.lead == 0 && isNews {
		n.logger.Error("the cluster cannot go on", "err", err)
	}
	n.status.latest.Store(p)
	n.followLevel(old, p)
	n.status.onChange(p)
}

func (n *node) glance() glance {
	var c clusterState // in each turn: not on the heap
	n.gather(&c)
	return glance{
		clusterID:   n.store.clusterID,
		level:       n.store.level,
		raftID:      n.id.raftID,
		life:        n.id.life,
		term:        n.raft.term,
		lead:        n.raft.lead,
		leaderAt:    c.nodeOf(n.raft.lead).GetAddress(),
		leading:     c.leads,
		caughtUp:    n.health.isCaughtUp(&c),
		dispensable: n.rn != nil && n.health.isDispensable(&c),
		lost:        len(n.peers.reborn),
		connected:   len(n.peers.connected),
		leaderless:  n.election.leaderlessTicks / n.ticksOf(time.Second),
		claim:       n.currentClaim(),
		conf:        n.store.conf,
	}
}

// metrics is the node's own view; only the loop may call it.
func (n *node) metrics() *kvpb.MetricsResponse {
	s := n.store
	m := proto.CloneOf(&n.status.count)
	m.Node = n.self
	m.RaftId = n.id.raftID
	m.ClusterId = s.clusterID
	m.Role = n.publicRole()
	m.Durable = n.durable.disk != nil
	m.UnhealthyReason = n.whyUnhealthyNow()
	m.Healthy = m.UnhealthyReason == ""
	m.NoRestartReason = n.whyNotRestart()

	m.Leader = n.nodeOf(n.raft.lead)
	m.FirstIndex = n.log.prevIndex + 1
	m.LastIndex = n.log.last()
	m.LogBytes = n.log.bytes
	m.AppliedIndex = s.index
	m.Joint = isJoint(s.conf)

	m.Version = s.version
	m.Keys = s.tree.keys
	m.StoreBytes = s.tree.bytes
	m.QuotaUsed = n.used()
	m.Quota = n.quota.limit
	m.QuotaOf = n.nodeOf(n.quota.of)
	m.MaxStoreBytes = n.quota.own.MaxStoreBytes
	m.DiskFree = n.quota.own.DiskFree
	m.DiskReserve = n.quota.space.reserve
	m.WritesRefused = n.whyRefused()
	m.Sessions = uint64(s.sessions.count())
	m.ProgramLevel = n.opts.level
	m.RisesTo = n.opts.risesTo()
	if n.rn == nil {
		return m
	}
	m.Level = s.level
	m.Term = n.raft.term
	m.CommitIndex = n.rn.BasicStatus().GetCommit()
	m.WriteLimit = n.rate(n.catchup.pace.limit, 1)
	progress := n.progressOf()
	for _, member := range sortedMembers(s.members) {
		ms := n.memberStatus(member)
		if pr, ok := progress[member.RaftId]; ok {
			ms.Progress = &kvpb.Progress{
				MatchIndex:   pr.Match,
				NextIndex:    pr.Next,
				State:        kvpb.ProgressState(pr.State + 1),
				RecentActive: pr.RecentActive,
				CaughtUp:     n.isCaughtUp(pr),
			}
			ms.Lagging = n.lagging(member.RaftId, pr)
			ms.RisesTo = n.level.risesTo(member.RaftId)
			if member.RaftId == n.id.raftID {
				ms.RisesTo = m.RisesTo
			}
		}
		m.Members = append(m.Members, ms)
	}
	return m
}

// whyUnhealthyNow is whyUnhealthy, and says what keeps a node in no cluster from one.
func (n *node) whyUnhealthyNow() string {
	why := n.whyUnhealthy()
	if waitsFor := n.status.waitsFor.Load(); n.rn == nil && waitsFor != nil {
		why += ": " + *waitsFor
	}
	return why
}

// publicRole is the node's role as the API has it.
func (n *node) publicRole() kvpb.Role {
	switch {
	case n.rn == nil:
		return kvpb.Role_ROLE_UNINITIALIZED
	case n.raft.role == raft.StateLeader:
		return kvpb.Role_ROLE_LEADER
	case n.raft.role != raft.StateFollower:
		return kvpb.Role_ROLE_CANDIDATE
	case slices.Contains(n.store.conf.GetLearners(), n.id.raftID):
		return kvpb.Role_ROLE_LEARNER
	}
	return kvpb.Role_ROLE_FOLLOWER
}

// memberStatus is what this node knows of a member, but for a leader's progress.
func (n *node) memberStatus(m *kvpb.Member) *kvpb.MemberStatus {
	conf := n.store.conf
	learners := slices.Concat(conf.GetLearners(), conf.GetLearnersNext())
	return &kvpb.MemberStatus{
		Node:          m.Node,
		RaftId:        m.RaftId,
		Connected:     n.peers.connected[m.RaftId] || m.RaftId == n.id.raftID,
		Voter:         slices.Contains(conf.GetVoters(), m.RaftId),
		VoterOutgoing: slices.Contains(conf.GetVotersOutgoing(), m.RaftId),
		Learner:       slices.Contains(learners, m.RaftId),
	}
}

// peerArgs name a member in the log.
func (n *node) peerArgs(raftID uint64) []any { return n.clusterState().peerArgs(raftID) }

// describe names a raft ID in a sentence.
func (n *node) describe(raftID uint64) string { return n.clusterState().describe(raftID) }

// locate names a raft ID, and says where it is.
func (n *node) locate(raftID uint64) string { return n.clusterState().locate(raftID) }

// names lists members.
func (n *node) names(ids []uint64) string { return n.clusterState().names(ids) }

func (n *node) durationOf(ticks uint64) time.Duration { return n.clusterState().durationOf(ticks) }
