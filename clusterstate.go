// The facts that the rules of membership, healing and health go by.

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"raft-key-value/kvpb"
)

// clusterState is what the loop knows of the cluster at one moment. The rules are
// functions of these facts: they never see the node, so a test can make up the facts
// alone. The maps and slices are the loop's: the rules only read them, and nobody keeps a
// clusterState beyond the step that it was made for.
type clusterState struct {
	now           uint64        // tick
	wall          uint64        // tick, with those that a busy loop has missed
	tick          time.Duration // how long a tick is
	electionTicks uint64

	self            *kvpb.Node // this node
	raftID          uint64     // its own
	inCluster       bool
	raft            raftState
	leads           bool   // it is the leader, and has applied an entry of its term
	mayChange       bool   // it may begin a change of membership or leadership
	leadHeard       uint64 // tick of the leader's last message; in the leader, of its election
	leaderlessTicks uint64 // ticks without a leader

	conf    *raftpb.ConfState
	members map[uint64]*kvpb.Node // by raft ID
	removed []uint64              // raft IDs
	former  []uint64              // ids of nodes that were members
	// founding are the members of the Init that has made the cluster; nil: it is done.
	founding []*kvpb.Node
	joiners  []uint64 // raft IDs of learners that become voters once they have caught up
	applied  uint64   // index of the last entry applied
	level    uint32   // of the cluster

	// What is known of members, by raft ID.
	connected map[uint64]bool
	heard     map[uint64]uint64     // tick of the last message
	moved     map[uint64]*kvpb.Node // where it is now, if the configuration does not say so
	reborn    map[uint64]*rebirth   // its node has come back without memory
	refusals  map[uint64]string     // why it does not talk to this node
}

// leaderState is what a leader knows besides.
type leaderState struct {
	clusterState
	progress map[uint64]tracker.Progress // by raft ID
	// upToDate is the index that a member that has caught up has: what was committed two
	// heartbeats ago.
	upToDate uint64
}

// ticksOf returns how many ticks a duration is long.
func (c *clusterState) ticksOf(d time.Duration) uint64 { return uint64(d / c.tick) }

// durationOf returns how long so many ticks are, as people want to read it.
func (c *clusterState) durationOf(ticks uint64) time.Duration {
	return (time.Duration(ticks) * c.tick).Round(100 * time.Millisecond)
}

// isVoter reports whether a raft ID votes; in a joint configuration, whether it will once
// that is left.
func (c *clusterState) isVoter(raftID uint64) bool {
	return slices.Contains(c.conf.GetVoters(), raftID)
}

func (c *clusterState) isLearner(raftID uint64) bool {
	return slices.Contains(c.conf.GetLearners(), raftID)
}

// isAlive reports whether a member is connected, and was heard within an election
// timeout: a stream can outlive whoever is at its other end for a while.
func (c *clusterState) isAlive(raftID uint64) bool {
	if raftID == c.raftID {
		return true
	}
	return c.connected[raftID] && c.now-c.heard[raftID] <= c.electionTicks
}

// isNewLeader reports whether this leader has perhaps not heard from everybody yet.
func (c *clusterState) isNewLeader() bool { return c.now-c.leadHeard <= c.electionTicks }

// isCaughtUp reports whether a member has what was committed two heartbeats ago.
func (l *leaderState) isCaughtUp(raftID uint64) bool {
	return isCaughtUp(l.progress[raftID], l.upToDate)
}

func isCaughtUp(pr tracker.Progress, upToDate uint64) bool {
	hasAll := pr.Match > 0 && pr.Match >= upToDate
	return pr.State == tracker.StateReplicate && hasAll
}

// successors are the voters among raftIDs that could lead in place of this node, the one
// that has most of the log first.
func (l *leaderState) successors(raftIDs []uint64) []uint64 {
	able := slices.DeleteFunc(slices.Clone(raftIDs), func(id uint64) bool {
		pr, ok := l.progress[id]
		isVoter := ok && !pr.IsLearner
		return id == l.raftID || !isVoter || !l.isAlive(id)
	})
	slices.SortStableFunc(able, func(a, b uint64) int {
		return cmp.Compare(l.progress[b].Match, l.progress[a].Match)
	})
	return able
}

// raftIDsOf returns the raft IDs of a node.
func (c *clusterState) raftIDsOf(nodeID uint64) []uint64 { return raftIDsOf(c.members, nodeID) }

// resolve returns the raft IDs of nodes. Of a node that is just being taken back, it is
// the one that votes.
func (c *clusterState) resolve(nodeIDs []uint64) ([]uint64, error) {
	var ids []uint64
	for _, nodeID := range nodeIDs {
		of := c.raftIDsOf(nodeID)
		if len(of) == 0 {
			return nil, unknownMember(nodeID)
		}
		i := slices.IndexFunc(of, c.isVoter)
		ids = append(ids, of[max(i, 0)])
	}
	return ids, nil
}

// nodeOf is where a member is, as far as this node knows: itself where it says, and one
// that has moved where it was found. nil: it is no member.
func (c *clusterState) nodeOf(raftID uint64) *kvpb.Node {
	m := c.members[raftID]
	if m == nil {
		return nil
	}
	if raftID == c.raftID {
		return c.self
	}
	return cmp.Or(c.moved[raftID], m)
}

// peerArgs name the node that a line of the log is about: always as peer, the id of the node, and
// address. In lists, nodes are ID=ADDRESS (formatNode); in sentences, as locate has it. Raft IDs
// are for debugging: a node has another one whenever it has lost its memory.
func peerArgs(node *kvpb.Node) []any {
	return []any{"peer", node.GetId(), "address", shown(node.GetAddress())}
}

// peerArgs name a member. One that is none any more has the id 0.
func (c *clusterState) peerArgs(raftID uint64) []any { return peerArgs(c.nodeOf(raftID)) }

// describe names a raft ID in a sentence.
func (c *clusterState) describe(raftID uint64) string {
	if m := c.members[raftID]; m != nil {
		return fmt.Sprint(m.Id)
	}
	return fmt.Sprintf("with raft ID %x", raftID)
}

// locate names a raft ID, and says where it is.
func (c *clusterState) locate(raftID uint64) string {
	if at := c.nodeOf(raftID); at != nil {
		return fmt.Sprintf("node %d at %s", at.Id, at.Address)
	}
	return "a node " + c.describe(raftID)
}

// names lists members.
func (c *clusterState) names(raftIDs []uint64) string {
	var names []string
	for _, id := range raftIDs {
		names = append(names, "node "+c.describe(id))
	}
	slices.Sort(names)
	return strings.Join(names, " and ")
}

// doNotAnswer says of members that they do not answer.
func (c *clusterState) doNotAnswer(raftIDs []uint64) string {
	if len(raftIDs) > 1 {
		return c.names(raftIDs) + " do not answer"
	}
	return c.names(raftIDs) + " does not answer"
}

// addresses lists where the configuration has members.
func (c *clusterState) addresses(raftIDs []uint64) string {
	var at []string
	for _, id := range raftIDs {
		at = append(at, c.members[id].Address)
	}
	slices.Sort(at)
	return strings.Join(slices.Compact(at), " and ")
}
