// Who is a member: the changes of membership that operators ask for, as the loop makes them.

package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// errPastLife means that a node goes by a raft ID that was removed, and is yet to
// hear of it.
var errPastLife = errors.New("the node has yet to hear that it was removed")

// stepLearner takes the next step of making a life of a node a member, if one
// can be taken; true: it is one, and has caught up.
func (n *node) stepLearner(raftID uint64, m *kvpb.Node) (bool, error) {
	present := n.store.members[raftID]
	elsewhere := slices.DeleteFunc(n.store.raftIDsOf(m.Id), func(id uint64) bool { // where it was, another life may answer by now
		return id != n.id.raftID && (!n.peers.connected[id] || n.nodeOf(id).Address == m.Address)
	})
	for id, other := range n.store.members {
		if other.Id != m.Id && (id == raftID || other.Address == m.Address) {
			return false, apiError(codes.AlreadyExists, kvpb.ErrorReason_ERROR_REASON_MEMBER_EXISTS,
				fmt.Sprintf("node %d is at %s", other.Id, other.Address))
		}
	}
	switch {
	case slices.Contains(n.store.removed, raftID):
		return false, errPastLife
	case proto.Equal(present, m) && len(n.store.raftIDsOf(m.Id)) == 1:
		return raftID == n.id.raftID || n.isCaughtUp(n.progressOf()[raftID]), nil
	case !n.mayChange() || proto.Equal(present, m): // which heal makes the only one
		return false, nil
	case present != nil:
		return false, n.proposeChange([]*kvpb.Member{{RaftId: raftID, Node: m}}, confChange(raftpb.ConfChangeUpdateNode, raftID))
	case slices.ContainsFunc(elsewhere, n.alive):
		return false, apiError(codes.AlreadyExists, kvpb.ErrorReason_ERROR_REASON_MEMBER_EXISTS,
			fmt.Sprintf("there is a node %d, and it answers: stop it, or give this one another id", m.Id))
	case len(elsewhere) > 0 && n.isNewLeader():
		return false, nil
	case len(n.store.members) >= maxMembers:
		return false, invalid("node", "the cluster has %d members, which is the limit", maxMembers)
	}
	return false, n.addIncarnation(&kvpb.Peer{RaftId: raftID, Node: m})
}

func confChange(t raftpb.ConfChangeType, raftID uint64) *raftpb.ConfChangeSingle {
	return &raftpb.ConfChangeSingle{Type: t.Enum(), NodeId: new(raftID)}
}

// request is what an operator asks of the leader, on its way through the loop there.
type request struct {
	n *node
	// step takes the next step, if one can be taken; true: what was asked for is so.
	step    func() (bool, error)
	witness witness
	begun   atomic.Bool // it has proposed a change, or a transfer of leadership
	busy    atomic.Bool // it waits until somebody else's change is done
}

// witness is an empty entry that the leader proposes after a configuration has come
// into force.
type witness struct {
	conf        *raftpb.ConfState
	term, index uint64
}

// advance is called after each turn. An answer, also that something cannot be done,
// waits for the request's witness: a leader that has been deposed must not give one.
func (r *request) advance() (bool, error) {
	n := r.n
	if !n.leads() {
		return false, errNotLeader
	}
	was := n.change.at
	done, err := r.step()
	if n.change.at > was {
		r.begun.Store(true)
	}
	r.busy.Store(!r.begun.Load() && !n.mayChange())
	if !done && err == nil {
		return false, nil
	}
	if !r.witnessed() {
		return false, nil
	}
	return done, err
}

// witnessed reports whether an entry is applied that this leader has proposed since
// the request came, behind the present configuration. Then a majority still followed
// it, and that configuration was in force, after the request came. And most voters know
// that it is committed, also after a restart: they have stored an entry that came with
// word of it. Before, they might need the votes of those who were removed, if this
// leader is lost. Raft itself asks for no more than that a change is committed.
func (r *request) witnessed() bool {
	n := r.n
	w := witness{conf: n.store.conf, term: n.raft.term}
	if r.witness.conf != w.conf || r.witness.term != w.term {
		w.index = n.proposeEmpty()
		if w.index == 0 {
			return false
		}
		r.witness = w
	}
	w = r.witness
	return w.conf == n.store.conf && w.term == n.raft.term && w.index <= n.store.index
}

// stepMembership takes the next step towards the voters that a request names,
// if one can be taken; true: it is there. Nothing can come between what it compares
// and the change that it proposes: raft takes no second change before the first is
// applied.
func (n *node) stepMembership(req *kvpb.ChangeMembershipRequest) (bool, error) {
	if isJoint(n.store.conf) {
		return false, nil
	}
	want, refusal := n.votersToBe(req)
	var changes []*raftpb.ConfChangeSingle
	var notReady error // which a new leader may say too early: it has yet to hear from the members
	if refusal == nil {
		changes, notReady = n.changesTo(want, req)
		if notReady == nil && len(changes) == 0 {
			return true, nil
		}
	}
	if !n.mayChange() {
		return false, nil // perhaps it is made just now
	}
	if req.Expected != nil && !maps.Equal(expectedRoles(req.Expected), n.store.roles()) {
		return false, apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_MEMBERSHIP_CHANGED,
			"the membership is another than the change was made for: "+describeMembers(n.store.conf, n.store.members))
	}
	if refusal != nil {
		return false, refusal
	}
	if notReady == nil {
		notReady = n.checkMajority(want)
	}
	if notReady != nil && n.isNewLeader() {
		return false, nil
	}
	if notReady != nil {
		return false, notReady
	}
	if slices.ContainsFunc(want, n.isComingBack) {
		return false, nil // a node that lost its memory is taken back first
	}
	if !slices.Contains(want, n.id.raftID) && n.handOver(want) {
		return false, nil // this node leaves: who stays, and votes already, makes the change
	}
	return false, n.proposeChange(nil, changes...)
}

// checkMajority refuses voters of which no majority answers.
func (n *node) checkMajority(voters []uint64) error {
	silent := slices.DeleteFunc(slices.Clone(voters), n.alive)
	if len(silent) <= (len(voters)-1)/2 {
		return nil
	}
	return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
		fmt.Sprintf("of these %d voters %s: they could not go on", len(voters), n.silent(silent)))
}

// role is what operators know of a member.
type role struct {
	address string
	voter   bool
}

// addRole adds a life of a node to roles by node id. While a node is taken back it
// has two: it keeps the role of the older one, and is at the address of the newer.
func addRole(roles map[uint64]role, m *kvpb.Node, voter bool) {
	other, twice := roles[m.Id]
	address := m.Address
	if twice && voter {
		address = other.address
	}
	roles[m.Id] = role{address, voter || other.voter}
}

// roles returns the roles of all members by node id.
func (s *store) roles() map[uint64]role {
	roles := map[uint64]role{}
	for id, m := range s.members {
		addRole(roles, m, slices.Contains(s.conf.GetVoters(), id))
	}
	return roles
}

func expectedRoles(expected *kvpb.Membership) map[uint64]role {
	roles := map[uint64]role{}
	for _, m := range expected.Members {
		addRole(roles, m.Node, m.Voter)
	}
	return roles
}

// votersToBe returns the raft IDs of the voters that a request wants. Who is to be
// removed need not be a member any more: the request may have been made already, by
// a leader that had no time to answer.
func (n *node) votersToBe(req *kvpb.ChangeMembershipRequest) ([]uint64, error) {
	present := slices.DeleteFunc(slices.Clone(req.Remove), func(id uint64) bool { return slices.Contains(n.store.former, id) })
	if _, err := n.resolve(present); err != nil {
		return nil, err
	}
	if len(req.Members) > 0 {
		return n.resolve(req.Members)
	}
	if _, err := n.resolve(req.Demote); err != nil {
		return nil, err
	}
	promoted, err := n.resolve(req.Promote)
	if err != nil {
		return nil, err
	}
	stops := slices.Concat(req.Demote, req.Remove)
	want := slices.DeleteFunc(slices.Clone(n.store.conf.GetVoters()), func(id uint64) bool {
		return slices.Contains(stops, n.store.members[id].Id)
	})
	for _, id := range promoted {
		if !slices.Contains(want, id) {
			want = append(want, id)
		}
	}
	if len(want) == 0 {
		return nil, invalid(oneOf(len(req.Remove) > 0, "remove", "demote"), "no voter would be left")
	}
	return want, nil
}

// resolve returns the raft IDs of nodes. Of a node that is just being taken
// back, it is the one that votes.
func (n *node) resolve(nodeIDs []uint64) ([]uint64, error) {
	var ids []uint64
	for _, nodeID := range nodeIDs {
		of := n.store.raftIDsOf(nodeID)
		if len(of) == 0 {
			return nil, apiError(codes.NotFound, kvpb.ErrorReason_ERROR_REASON_UNKNOWN_MEMBER, fmt.Sprintf("no member has the id %d", nodeID))
		}
		i := slices.IndexFunc(of, func(id uint64) bool { return n.isVoter(id) })
		ids = append(ids, of[max(i, 0)])
	}
	return ids, nil
}

// changesTo returns what changes the configuration to one with the wanted
// voters; nothing, if that is so already.
func (n *node) changesTo(want []uint64, req *kvpb.ChangeMembershipRequest) (changes []*raftpb.ConfChangeSingle, err error) {
	leaves := func(id uint64) bool { return n.isVoter(id) && !slices.Contains(want, id) }
	progress := n.progressOf()
	for _, m := range sortedMembers(n.store.members) {
		id, removed := m.RaftId, slices.Contains(req.Remove, m.Node.Id)
		switch wanted := slices.Contains(want, id); {
		case wanted && n.isVoter(id):
		case wanted && !n.alive(id):
			return nil, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, n.silent([]uint64{id}))
		case wanted && !n.isCaughtUp(progress[id]):
			return nil, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP,
				fmt.Sprintf("node %d is too far behind to vote: it has entry %d of %d", m.Node.Id, progress[id].Match, n.store.index))
		case wanted:
			changes = append(changes, confChange(raftpb.ConfChangeAddNode, id))
		case leaves(id) && !removed && (req.Retain || slices.Contains(req.Demote, m.Node.Id)):
			changes = append(changes, confChange(raftpb.ConfChangeAddLearnerNode, id))
		case removed || slices.ContainsFunc(n.store.raftIDsOf(m.Node.Id), leaves): // a life that was to take the place of one that leaves
			changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
		}
	}
	return changes, nil
}

// stepTransfer has raft make a node the leader; true: it is this one. A leader that
// has handed over does not know for sure who leads now: that one is asked next. start is
// the tick of the first try.
func (n *node) stepTransfer(nodeID uint64, start *uint64) (bool, error) {
	if nodeID == n.self.Id {
		return true, nil
	}
	ids, err := n.resolve([]uint64{nodeID})
	if err != nil {
		return false, err
	}
	if !n.isVoter(ids[0]) {
		return false, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP, fmt.Sprintf("node %d is no voter", nodeID))
	}
	if !n.peers.connected[ids[0]] || *start != 0 && n.clock.now-*start > 2*n.electionTicks() {
		return false, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
			fmt.Sprintf("node %d does not answer, or did not take over", nodeID))
	}
	if n.mayChange() {
		*start = cmp.Or(*start, n.clock.now)
		if n.alive(ids[0]) { // else raft would take no writes for nothing
			n.handOver(ids)
		}
	}
	return false, nil
}

// mayChange reports whether a change of membership or leadership may start.
// One that was lost without a word blocks others for an election timeout only.
func (n *node) mayChange() bool {
	return n.leads() && !isJoint(n.store.conf) && (n.change.at == 0 || n.clock.now-n.change.at > n.electionTicks())
}

// proposeChange proposes a change of the configuration. Whether it was applied
// shows in the configuration.
func (n *node) proposeChange(members []*kvpb.Member, changes ...*raftpb.ConfChangeSingle) error {
	who := &kvpb.ConfChangeContext{Members: members}
	ctx, err := proto.Marshal(who)
	if err != nil {
		return err
	}
	// Explicit: raft would leave the joint configuration without looking who leads.
	cc := &raftpb.ConfChangeV2{Changes: changes, Context: ctx, Transition: raftpb.ConfChangeTransitionJointExplicit.Enum()}
	if c := changes[0]; len(changes) == 1 && (c.GetType() == raftpb.ConfChangeUpdateNode || !n.isVoter(c.GetNodeId())) {
		cc.Transition = raftpb.ConfChangeTransitionAuto.Enum() // no voter leaves
	}
	if _, err := n.store.checkConfChange(cc, who); err != nil {
		return err
	}
	if n.rn.ProposeConfChange(cc) == nil { // else leadership is being transferred
		n.change.at = n.clock.now
	}
	return nil
}

// jointStay is a leader's stay in a joint configuration.
type jointStay struct {
	conf  *raftpb.ConfState // nil: there was none
	term  uint64            // in which this node leads
	began uint64            // tick
	tried uint64            // tick in which the leader last tried to leave; 0: not yet
	// notice is an entry behind conf: whoever has stored it knows that conf is committed.
	// 0: it is not proposed yet.
	notice uint64
}

// leaveJoint takes the next step to end a change of membership that is half way. It is
// called in every turn. What can get lost is tried again after a heartbeat.
func (n *node) leaveJoint() {
	if n.err != nil || !n.leads() || !isJoint(n.store.conf) {
		return
	}
	stay := &n.change.stay
	if stay.conf != n.store.conf || stay.term != n.raft.term {
		*stay = jointStay{conf: n.store.conf, term: n.raft.term, began: n.clock.now}
	}
	if stay.tried != 0 && n.clock.now-stay.tried < ticksPerHeartbeat {
		return
	}
	if !n.isVoter(n.id.raftID) {
		// A leader that is to leave hands over first: it would step down before
		// the others know that they may do without it.
		stay.tried = n.clock.now
		n.handOver(n.store.conf.GetVoters())
		return
	}
	if !n.leaversKnow(stay) {
		return
	}
	stay.tried = n.clock.now
	_ = n.rn.ProposeConfChange(&raftpb.ConfChangeV2{})
}

// leaversKnow reports whether the voters that are to leave, and answer, know that they
// are. If several leave at once, one that does not know would wait for ever for a
// majority of its old voters to tell it: the others that leave forget all they knew.
// Nobody is waited for longer than two election timeouts.
func (n *node) leaversKnow(stay *jointStay) bool {
	leavers := n.leavers()
	if len(leavers) == 0 || n.clock.now-stay.began > 2*n.electionTicks() {
		return true
	}
	if stay.notice == 0 {
		stay.notice = n.proposeEmpty()
		return false
	}
	progress := n.progressOf()
	return !slices.ContainsFunc(leavers, func(id uint64) bool { return progress[id].Match < stay.notice })
}

// leavers are the other voters that the change in flight removes, and that answer.
func (n *node) leavers() []uint64 {
	conf := n.store.conf
	stayers := slices.Concat(conf.GetVoters(), conf.GetLearners(), conf.GetLearnersNext())
	return slices.DeleteFunc(slices.Clone(conf.GetVotersOutgoing()), func(id uint64) bool {
		return id == n.id.raftID || slices.Contains(stayers, id) || !n.alive(id)
	})
}

// proposeEmpty has this leader append an empty entry, and returns its index; 0: it
// could not, because leadership is being transferred, or the node has broken.
func (n *node) proposeEmpty() uint64 {
	if err := n.rn.Propose(nil); err != nil {
		return 0
	}
	n.log.behind = true
	log := n.drainedLog()
	if log == nil {
		return 0
	}
	return log.last()
}

// membershipChange is the change of membership, or of leadership, in flight, and what a
// leader has seen of members that have two lives.
type membershipChange struct {
	at     uint64            // tick of the change in flight; 0: none
	sights map[uint64]*sight // by raft ID: learners whose node has an older life, too
	stay   jointStay         // in a joint configuration, the last one
}

func (c *membershipChange) forget() {
	c.sights = map[uint64]*sight{}
}

// forgetMembers drops what was seen of members that were removed.
func (c *membershipChange) forgetMembers(removed []uint64) {
	for _, id := range removed {
		delete(c.sights, id)
	}
}

// alive reports whether a member is connected, and was heard within an election
// timeout: a stream can outlive whoever is at its other end for a while.
func (n *node) alive(id uint64) bool {
	return id == n.id.raftID || n.peers.connected[id] && n.clock.now-n.peers.heard[id] <= n.electionTicks()
}

// isNewLeader reports whether a leader has perhaps not heard from everybody yet.
func (n *node) isNewLeader() bool { return n.clock.now-n.election.leadHeard <= n.electionTicks() }

// isVoter reports whether a raft ID votes once no change is running.
func (n *node) isVoter(id uint64) bool { return slices.Contains(n.store.conf.GetVoters(), id) }

// isCaughtUp reports whether a member has what was committed two heartbeats ago.
func (n *node) isCaughtUp(pr tracker.Progress) bool {
	return pr.State == tracker.StateReplicate && pr.Match >= n.catchup.commitAt[len(n.catchup.commitAt)-1] && pr.Match > 0
}

// progressOf returns the leader's knowledge of all members, by raft ID.
func (n *node) progressOf() map[uint64]tracker.Progress {
	m := map[uint64]tracker.Progress{}
	if n.rn != nil && n.raft.role == raft.StateLeader {
		n.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) { m[id] = pr })
	}
	return m
}

// heirs are the voters among ids that could lead in place of this node, the one
// that has most of the log first.
func (n *node) heirs(ids []uint64) []uint64 {
	progress := n.progressOf()
	ids = slices.DeleteFunc(slices.Clone(ids), func(id uint64) bool {
		pr, ok := progress[id]
		return !ok || id == n.id.raftID || pr.IsLearner || !n.alive(id)
	})
	slices.SortStableFunc(ids, func(a, b uint64) int { return cmp.Compare(progress[b].Match, progress[a].Match) })
	return ids
}

// handOver asks raft to make the first heir among ids the leader; false: there is
// none.
func (n *node) handOver(ids []uint64) bool {
	if ids = n.heirs(ids); len(ids) == 0 {
		return false
	}
	n.change.at = n.clock.now
	n.rn.TransferLeader(ids[0])
	return true
}
