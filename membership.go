// Who is a member: the changes of membership and leadership that operators ask for, as
// the loop makes them.
//
// The rules (functions of clusterState and leaderState) say what comes next, and
// node.perform does it: one step in each turn, until what was asked for is so.

package main

import (
	"context"
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

// nextStep is what comes next on the way to what an operator, or the leader itself, wants.
type nextStep struct {
	kind    stepKind
	err     error                      // of stepFailed
	changes []*raftpb.ConfChangeSingle // of stepPropose
	members []*kvpb.Member             // of stepPropose: those that are new, or have moved
	to      uint64                     // of stepHandOver: raft ID
}

// stepKind is the outcome of a rule.
type stepKind int

const (
	stepWait       stepKind = iota // there is nothing to do until the state is another
	stepDone                       // what was asked for is so
	stepFailed                     // it cannot be done
	stepPropose                    // propose a change of the configuration
	stepHandOver                   // have another voter lead
	stepAnnounce                   // append an entry from which followers learn what is committed
	stepLeaveJoint                 // propose to leave the joint configuration
)

func failStep(err error) nextStep { return nextStep{kind: stepFailed, err: err} }

func proposeStep(members []*kvpb.Member, changes ...*raftpb.ConfChangeSingle) nextStep {
	return nextStep{kind: stepPropose, members: members, changes: changes}
}

// transferStep is the step that makes the first of some successors lead; it waits if
// there is none.
func transferStep(successors []uint64) nextStep {
	if len(successors) == 0 {
		return nextStep{kind: stepWait}
	}
	return nextStep{kind: stepHandOver, to: successors[0]}
}

// answer returns a step as node.await wants it: done, or failed, or neither.
func (s nextStep) answer() (done bool, err error) { return s.kind == stepDone, s.err }

func confChange(t raftpb.ConfChangeType, raftID uint64) *raftpb.ConfChangeSingle {
	return &raftpb.ConfChangeSingle{Type: t.Enum(), NodeId: new(raftID)}
}

// learnerStep takes the next step of making a life of a node a member. It is done when its
// raft ID is the node's only one, and has caught up.
func (l *leaderState) learnerStep(p *kvpb.Peer) nextStep {
	raftID := p.RaftId
	m := p.Node
	if err := l.checkFree(raftID, m); err != nil {
		return failStep(err)
	}
	if levelFromWire(p.Level) < l.level {
		return failStep(levelTooLow(p, l.level))
	}
	if slices.Contains(l.removed, raftID) {
		return failStep(errPastLife)
	}
	present := l.members[raftID]
	isAsWanted := proto.Equal(present, m)
	if isAsWanted && len(l.raftIDsOf(m.Id)) == 1 {
		if raftID == l.raftID || l.isCaughtUp(raftID) {
			return nextStep{kind: stepDone}
		}
		return nextStep{kind: stepWait}
	}
	if isAsWanted {
		return nextStep{kind: stepWait} // the leader heals it: then it is the only one
	}
	if !l.mayChange {
		return nextStep{kind: stepWait}
	}
	if present != nil {
		moved := []*kvpb.Member{{RaftId: raftID, Node: m, Promote: slices.Contains(l.joiners, raftID)}}
		return proposeStep(moved, confChange(raftpb.ConfChangeUpdateNode, raftID))
	}
	others := l.mayBeOthers(m)
	if slices.ContainsFunc(others, l.isAlive) {
		return failStep(memberExists("there is a node %d, and it answers: stop it, or give this one another id", m.Id))
	}
	if len(others) > 0 && l.isNewLeader() {
		return nextStep{kind: stepWait} // it may hear from them yet
	}
	if len(l.members) >= maxMembers {
		return failStep(invalid("node", "the cluster has %d members, which is the limit", maxMembers))
	}
	return l.addMember(p)
}

// checkFree refuses a raft ID or an address that another node has.
func (c *clusterState) checkFree(raftID uint64, m *kvpb.Node) error {
	for id, other := range c.members {
		isTaken := id == raftID || other.Address == m.Address
		if other.Id != m.Id && isTaken {
			return memberExists("node %d is at %s", other.Id, shown(other.Address))
		}
	}
	return nil
}

// mayBeOthers are those raft IDs of m's node that may belong to another process than the one
// that is at m's address: the leader's own, and those to which the leader has a stream at
// another address. They forbid m only if they are alive.
func (c *clusterState) mayBeOthers(m *kvpb.Node) []uint64 {
	return slices.DeleteFunc(c.raftIDsOf(m.Id), func(id uint64) bool {
		isElsewhere := c.connected[id] && c.nodeOf(id).Address != m.Address
		return id != c.raftID && !isElsewhere
	})
}

func memberExists(format string, args ...any) error {
	return apiError(codes.AlreadyExists, kvpb.ErrorReason_ERROR_REASON_MEMBER_EXISTS, fmt.Sprintf(format, args...))
}

// errFounded ends what an Init wants of a cluster that is made, or that an operator has changed.
var errFounded = apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED,
	"the cluster is made, or its membership was changed since")

// whileFounding is a step towards what a request wants, unless the request is of an Init by which
// the cluster is not being made any more.
func (c *clusterState) whileFounding(isOfInit bool, s nextStep) nextStep {
	isOver := isOfInit && c.founding == nil
	if isOver && s.kind != stepDone {
		return failStep(errFounded)
	}
	return s
}

func unknownMember(nodeID uint64) error {
	return apiError(codes.NotFound, kvpb.ErrorReason_ERROR_REASON_UNKNOWN_MEMBER,
		fmt.Sprintf("no member has the id %d", nodeID))
}

func notCaughtUp(format string, args ...any) error {
	return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP, fmt.Sprintf(format, args...))
}

func unreachable(message string) error {
	return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, message)
}

// membershipStep takes the next step towards the voters that a request names. Nothing
// can come between what it compares and the change that it proposes: raft takes no second
// change before the first is applied.
func (l *leaderState) membershipStep(req *kvpb.ChangeMembershipRequest) nextStep {
	if isJoint(l.conf) {
		return nextStep{kind: stepWait}
	}
	// In this order: what is so already is done, whatever else is wrong; a change in
	// flight is waited for; a wrong expectation and a wrong request are refused; members
	// that are not ready are waited for by a new leader, and refused by any other; whoever
	// comes back is taken back first. Then the change is made.
	voters, refusal := l.votersToBe(req)
	var changes []*raftpb.ConfChangeSingle
	var notReady error // what a new leader may find only because it has yet to hear from the members
	if refusal == nil {
		changes, notReady = l.changesTo(voters, req)
	}
	isSo := refusal == nil && notReady == nil && len(changes) == 0
	if isSo {
		return nextStep{kind: stepDone}
	}
	if !l.mayChange {
		return nextStep{kind: stepWait} // perhaps the change in flight makes it so
	}
	if req.Expected != nil && !maps.Equal(expectedRoles(req.Expected), rolesOf(l.conf, l.members)) {
		return failStep(apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_MEMBERSHIP_CHANGED,
			"the membership is another than the change was made for: "+describeMembers(l.conf, l.members)))
	}
	if refusal != nil {
		return failStep(refusal)
	}
	if notReady == nil {
		notReady = l.checkMajority(voters)
	}
	if notReady != nil {
		if l.isNewLeader() {
			return nextStep{kind: stepWait}
		}
		return failStep(notReady)
	}
	if slices.ContainsFunc(voters, l.isComingBack) {
		return nextStep{kind: stepWait} // a node that lost its memory is taken back first
	}
	if !slices.Contains(voters, l.raftID) {
		// This node leaves: a present voter that stays and answers is to lead, and to make the
		// change. If there is none, this node makes it.
		successors := l.successors(voters)
		if len(successors) > 0 {
			return transferStep(successors)
		}
	}
	return proposeStep(l.updated(changes), changes...)
}

// updated are the members that changes of kind UpdateNode are of, as they are.
func (c *clusterState) updated(changes []*raftpb.ConfChangeSingle) []*kvpb.Member {
	var members []*kvpb.Member
	for _, change := range changes {
		if change.GetType() == raftpb.ConfChangeUpdateNode {
			members = append(members, &kvpb.Member{RaftId: change.GetNodeId(), Node: c.members[change.GetNodeId()]})
		}
	}
	return members
}

// checkMajority refuses voters of which no majority answers.
func (c *clusterState) checkMajority(voters []uint64) error {
	silent := slices.DeleteFunc(slices.Clone(voters), c.isAlive)
	if len(silent) <= (len(voters)-1)/2 {
		return nil
	}
	return unreachable(fmt.Sprintf("of these %d voters %s: they could not go on", len(voters), c.doNotAnswer(silent)))
}

// memberRole is what operators know of a member.
type memberRole struct {
	address string
	voter   bool
}

// addRole adds a member to roles by node id. A node that is taken back has two members:
// it keeps the role of the older one, and is at the address of the newer one. Of the two the
// voter is the older one: no change leaves two learners of one node. So the address is that
// of the one that does not vote.
func addRole(roles map[uint64]memberRole, m *kvpb.Node, voter bool) {
	other, twice := roles[m.Id]
	address := m.Address
	if twice && voter {
		address = other.address
	}
	roles[m.Id] = memberRole{address: address, voter: voter || other.voter}
}

// rolesOf returns the roles of all members by node id.
func rolesOf(conf *raftpb.ConfState, members map[uint64]*kvpb.Node) map[uint64]memberRole {
	roles := map[uint64]memberRole{}
	for id, m := range members {
		addRole(roles, m, slices.Contains(conf.GetVoters(), id))
	}
	return roles
}

// expectedRoles returns the roles that a request expects, by node id.
func expectedRoles(expected *kvpb.Membership) map[uint64]memberRole {
	roles := map[uint64]memberRole{}
	for _, m := range expected.Members {
		addRole(roles, m.Node, m.Voter)
	}
	return roles
}

// votersToBe returns the raft IDs of the voters that a request wants. A node that is to
// be removed need not be a member any more: the request may have been made already, by a
// leader that had no time to answer.
func (c *clusterState) votersToBe(req *kvpb.ChangeMembershipRequest) ([]uint64, error) {
	present := slices.DeleteFunc(slices.Clone(req.Remove), func(nodeID uint64) bool {
		return slices.Contains(c.former, nodeID)
	})
	if _, err := c.resolve(present); err != nil {
		return nil, err
	}
	if len(req.Members) > 0 {
		return c.resolve(req.Members)
	}
	if _, err := c.resolve(req.Demote); err != nil {
		return nil, err
	}
	promoted, err := c.resolve(req.Promote)
	if err != nil {
		return nil, err
	}
	stops := slices.Concat(req.Demote, req.Remove)
	voters := slices.DeleteFunc(slices.Clone(c.conf.GetVoters()), func(id uint64) bool {
		return slices.Contains(stops, c.members[id].Id)
	})
	for _, id := range promoted {
		if !slices.Contains(voters, id) {
			voters = append(voters, id)
		}
	}
	if len(voters) > 0 {
		return voters, nil
	}
	field := "demote"
	if len(req.Remove) > 0 {
		field = "remove"
	}
	return nil, invalid(field, "no voter would be left")
}

// changesTo returns what changes the configuration to one with these voters; nothing, if
// that is so already. A member that is to vote has to answer, and to have caught up.
func (l *leaderState) changesTo(
	voters []uint64, req *kvpb.ChangeMembershipRequest,
) ([]*raftpb.ConfChangeSingle, error) {
	var changes []*raftpb.ConfChangeSingle
	stopsVoting := func(id uint64) bool { return l.isVoter(id) && !slices.Contains(voters, id) }
	for _, m := range sortedMembers(l.members) {
		id := m.RaftId
		nodeID := m.Node.Id
		if slices.Contains(voters, id) {
			if l.isVoter(id) {
				continue
			}
			if err := l.checkMayVote(m); err != nil {
				return nil, err
			}
			changes = append(changes, confChange(raftpb.ConfChangeAddNode, id))
			continue
		}
		isRemoved := slices.Contains(req.Remove, nodeID)
		staysLearner := len(req.Members) > 0 || slices.Contains(req.Demote, nodeID)
		if slices.Contains(l.joiners, id) && staysLearner && !isRemoved {
			// It has asked to become a voter, and the operator says who votes.
			changes = append(changes, confChange(raftpb.ConfChangeUpdateNode, id))
			continue
		}
		isKept := req.Retain || slices.Contains(req.Demote, nodeID)
		becomesLearner := isKept && !isRemoved
		if stopsVoting(id) && becomesLearner {
			changes = append(changes, confChange(raftpb.ConfChangeAddLearnerNode, id))
			continue
		}
		// With a voter that stops voting, removed or demoted, goes the learner that was to
		// take its place.
		if isRemoved || slices.ContainsFunc(l.raftIDsOf(nodeID), stopsVoting) {
			changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
		}
	}
	return changes, nil
}

// checkMayVote refuses a learner that does not answer, or is behind.
func (l *leaderState) checkMayVote(m *kvpb.Member) error {
	if !l.isAlive(m.RaftId) {
		return unreachable(l.doNotAnswer([]uint64{m.RaftId}))
	}
	if !l.isCaughtUp(m.RaftId) {
		return notCaughtUp("node %d is too far behind to vote: it has entry %d of %d",
			m.Node.Id, l.progress[m.RaftId].Match, l.applied)
	}
	return nil
}

// leaderTransfer is an operator's wish that a node lead.
type leaderTransfer struct {
	to    uint64 // node id
	began uint64 // on the leader's clock.wall, the first try; 0: there was none
	asked bool   // raft was asked to make it lead
}

// step makes the node the leader. Only the new leader knows for sure that it leads: the
// request is repeated there, and is done there.
func (t *leaderTransfer) step(l *leaderState) nextStep {
	if t.to == l.self.Id {
		return nextStep{kind: stepDone}
	}
	ids, err := l.resolve([]uint64{t.to})
	if err != nil {
		return failStep(err)
	}
	if !l.isVoter(ids[0]) {
		return failStep(notCaughtUp("node %d is no voter", t.to)) // the reason stands for both
	}
	if !l.connected[ids[0]] {
		return t.giveUp()
	}
	// Nobody is given up while raft may still make it the leader.
	if !l.mayChange {
		return nextStep{kind: stepWait}
	}
	if t.began == 0 {
		t.began = l.wall
	}
	// A silent node is no successor: raft takes no writes during a transfer, and this
	// one would fail.
	successors := l.successors(ids)
	isFirstChance := len(successors) > 0 && !t.asked
	isLate := l.wall-t.began > 2*l.electionTicks
	if isLate && !isFirstChance {
		return t.giveUp()
	}
	t.asked = t.asked || isFirstChance
	return transferStep(successors)
}

func (t *leaderTransfer) giveUp() nextStep {
	return failStep(unreachable(fmt.Sprintf("node %d does not answer, or did not take over", t.to)))
}

// jointStay is a leader's stay in a joint configuration.
type jointStay struct {
	conf  *raftpb.ConfState // nil: there was none; each configuration is a new pointer
	term  uint64            // in which this node leads
	began uint64            // tick
	tried uint64            // tick in which the leader last tried to hand over, or to leave; 0: not yet
	// witness is the index of a witness of conf: whoever has stored it knows that conf is
	// committed. 0: it is not proposed yet.
	witness uint64
}

// step takes the next step to end a change of membership that is half way. What can get
// lost is tried again after a heartbeat.
//
// Voters that are to leave, and answer now, have to know so first. A node ends once most of
// the other voters, by the configuration that it knows, have told it that it was removed
// (disowned). A voter that leaves, and does not know of the change, waits for most of the old
// voters. If several leave at once, others of them may have forgotten all that they knew,
// and can never tell it. Nobody is
// waited for longer than two election timeouts.
func (j *jointStay) step(l *leaderState) nextStep {
	if j.conf != l.conf || j.term != l.raft.term {
		*j = jointStay{conf: l.conf, term: l.raft.term, began: l.now}
	}
	if j.tried != 0 && l.now-j.tried < ticksPerHeartbeat {
		return nextStep{kind: stepWait}
	}
	if !l.isVoter(l.raftID) {
		// A leader that is to leave hands over first: it would step down before
		// the others know that they may do without it.
		j.tried = l.now
		return transferStep(l.successors(l.conf.GetVoters()))
	}
	leavers := l.leavers()
	if len(leavers) > 0 && l.now-j.began <= 2*l.electionTicks {
		if j.witness == 0 {
			return nextStep{kind: stepAnnounce}
		}
		isUntold := func(id uint64) bool { return l.progress[id].Match < j.witness }
		if slices.ContainsFunc(leavers, isUntold) {
			return nextStep{kind: stepWait}
		}
	}
	j.tried = l.now
	return nextStep{kind: stepLeaveJoint}
}

// leavers are the other voters that the change in flight removes, and that answer.
func (c *clusterState) leavers() []uint64 {
	stayers := slices.Concat(c.conf.GetVoters(), c.conf.GetLearners(), c.conf.GetLearnersNext())
	return slices.DeleteFunc(slices.Clone(c.conf.GetVotersOutgoing()), func(id uint64) bool {
		stays := id == c.raftID || slices.Contains(stayers, id)
		return stays || !c.isAlive(id)
	})
}

// membershipChange is the change of membership, or of leadership, in flight, and what a
// leader has seen of nodes that have two raft IDs.
type membershipChange struct {
	startedAt uint64 // tick of the change in flight; 0: none
	healing   healing
	joint     jointStay // this leader's last stay in a joint configuration
}

// start notes that a change was proposed.
func (c *membershipChange) start(now uint64) { c.startedAt = now }

// end notes that the change in flight is made, or may be lost with its leader.
func (c *membershipChange) end() { c.startedAt = 0 }

// mayStart reports whether no change is in flight. One that was lost without a word
// blocks others for an election timeout only.
func (c *membershipChange) mayStart(now, electionTicks uint64) bool {
	return c.startedAt == 0 || now-c.startedAt > electionTicks
}

// forget drops all that a node without memory does not know.
func (c *membershipChange) forget() {
	*c = membershipChange{healing: healing{duplicates: map[uint64]*duplicate{}}}
}

// forgetMembers drops what was seen of members that were removed.
func (c *membershipChange) forgetMembers(removed []uint64) {
	for _, id := range removed {
		delete(c.healing.duplicates, id)
	}
}

// request is what an operator asks of the leader, on its way through the loop there.
type request struct {
	n       *node
	next    func(*leaderState) nextStep // the rule
	witness witness
	begun   atomic.Bool // it has proposed a change, or a transfer of leadership
	busy    atomic.Bool // it waits until another change is done
}

// witness is an empty entry that the leader proposes after a configuration has come
// into force.
type witness struct {
	conf  *raftpb.ConfState
	term  uint64
	index uint64
}

// advance takes the next step, once in each turn; it answers that the request waits, is done,
// or has failed. An answer, also that something cannot be done, waits for the request's
// witness: a leader that has been deposed must not give one.
func (r *request) advance() nextStep {
	n := r.n
	if !n.leads() {
		return failStep(errNotLeader)
	}
	before := n.change.startedAt
	s := n.perform(r.next(n.leaderState()))
	if n.change.startedAt > before {
		r.begun.Store(true)
	}
	r.busy.Store(!r.begun.Load() && !n.mayChange())
	if s.kind != stepWait && !r.seekWitness() {
		return nextStep{kind: stepWait}
	}
	return s
}

// await waits until the request is done or has failed. Any goroutine may call it.
func (r *request) await(ctx context.Context) error {
	err := r.n.await(ctx, r.poll)
	if r.busy.Load() && errors.Is(err, context.DeadlineExceeded) {
		return apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_CHANGE_IN_PROGRESS,
			"another change of membership, or a transfer of leadership, was running until the deadline")
	}
	return err
}

// poll is advance as a condition for node.await.
func (r *request) poll() (done bool, err error) { return r.advance().answer() }

// seekWitness reports whether an entry is applied that this leader has proposed since the
// request came, after the present configuration. If there is none, it proposes one. Once it
// is applied,
//   - a majority has followed this leader since the request came;
//   - the configuration was in force after that;
//   - most voters know, and still know after a restart, that the configuration is committed:
//     they store the commit index with the entry (append). Without that, they might need the
//     votes of those who were removed, if this leader is lost. Raft itself asks for no more
//     than that a change is committed.
func (r *request) seekWitness() bool {
	n := r.n
	want := witness{conf: n.store.conf, term: n.raft.term}
	if r.witness.conf != want.conf || r.witness.term != want.term {
		want.index = n.proposeEmpty()
		if want.index == 0 {
			return false
		}
		r.witness = want
	}
	// proposeEmpty drains, which may have brought another term, or another configuration.
	isOfNow := r.witness.conf == n.store.conf && r.witness.term == n.raft.term
	return isOfNow && r.witness.index <= n.store.index
}

// clusterState returns the facts that rules go by.
func (n *node) clusterState() *clusterState {
	c := &clusterState{}
	n.gather(c)
	return c
}

// gather puts the facts that rules go by into c, which need not be on the heap.
func (n *node) gather(c *clusterState) {
	*c = clusterState{
		now:             n.clock.now,
		wall:            n.clock.wall,
		tick:            n.tickDuration(),
		electionTicks:   n.electionTicks(),
		self:            n.self,
		raftID:          n.id.raftID,
		inCluster:       n.rn != nil,
		raft:            n.raft,
		leads:           n.leads(),
		mayChange:       n.mayChange(),
		leadHeard:       n.election.leadHeard,
		leaderlessTicks: n.election.leaderlessTicks,
		conf:            n.store.conf,
		members:         n.store.members,
		removed:         n.store.removed,
		former:          n.store.former,
		founding:        n.store.founding,
		joiners:         n.store.joiners,
		applied:         n.store.index,
		level:           n.store.level,
		connected:       n.peers.connected,
		heard:           n.peers.heard,
		moved:           n.peers.moved,
		reborn:          n.peers.reborn,
		refusals:        n.peers.refusals,
	}
}

// leaderState gathers what a leader knows besides.
func (n *node) leaderState() *leaderState {
	return &leaderState{clusterState: *n.clusterState(), progress: n.progressOf(), upToDate: n.upToDate()}
}

// upToDate is the index that a member that has caught up has.
func (n *node) upToDate() uint64 { return n.catchup.commitAt[len(n.catchup.commitAt)-1] }

// progressOf returns the leader's knowledge of all members, by raft ID.
func (n *node) progressOf() map[uint64]tracker.Progress {
	m := map[uint64]tracker.Progress{}
	if n.rn != nil && n.raft.role == raft.StateLeader {
		n.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) { m[id] = pr })
	}
	return m
}

// isCaughtUp reports whether a member has what was committed two heartbeats ago.
func (n *node) isCaughtUp(pr tracker.Progress) bool { return isCaughtUp(pr, n.upToDate()) }

// alive reports whether a member answers: see isAlive.
func (n *node) alive(raftID uint64) bool { return n.clusterState().isAlive(raftID) }

// isVoter reports whether a raft ID votes; in a joint configuration, whether it will once
// that is left.
func (n *node) isVoter(raftID uint64) bool { return slices.Contains(n.store.conf.GetVoters(), raftID) }

// mayChange reports whether a change of membership or leadership may start.
func (n *node) mayChange() bool {
	isSettled := n.leads() && !isJoint(n.store.conf)
	return isSettled && n.change.mayStart(n.clock.now, n.electionTicks())
}

// perform does what a step says. It answers that the step is done or has failed, or that
// what comes of it has to be waited for.
func (n *node) perform(s nextStep) nextStep {
	switch s.kind {
	case stepPropose:
		if err := n.proposeChange(s.members, s.changes...); err != nil {
			return failStep(err)
		}
	case stepHandOver:
		n.change.start(n.clock.now)
		n.rn.TransferLeader(s.to)
	case stepAnnounce:
		n.change.joint.witness = n.proposeEmpty()
	case stepLeaveJoint:
		_ = n.rn.ProposeConfChange(&raftpb.ConfChangeV2{}) // if refused, it is tried again
	default:
		return s
	}
	return nextStep{kind: stepWait}
}

// handOver asks raft to make one of these voters the leader, if one can lead.
func (n *node) handOver(voters []uint64) {
	n.perform(transferStep(n.leaderState().successors(voters)))
}

// proposeChange proposes a change of the configuration. Whether it was applied
// shows in the configuration.
func (n *node) proposeChange(members []*kvpb.Member, changes ...*raftpb.ConfChangeSingle) error {
	return n.proposeChangeOf(&kvpb.ConfChangeContext{Members: members}, changes...)
}

// proposeLoss proposes to remove a learner whose process is in another cluster.
func (n *node) proposeLoss(raftID uint64) error {
	return n.proposeChangeOf(&kvpb.ConfChangeContext{Lost: []uint64{raftID}},
		confChange(raftpb.ConfChangeRemoveNode, raftID))
}

// proposeChangeOf is proposeChange with all that the change says of members.
func (n *node) proposeChangeOf(who *kvpb.ConfChangeContext, changes ...*raftpb.ConfChangeSingle) error {
	ctx, err := proto.Marshal(who)
	if err != nil {
		return err
	}
	// Explicit: else raft would leave the joint configuration without looking who leads. A
	// single change that takes no vote away needs no joint configuration: with Auto, raft
	// makes it without one.
	transition := raftpb.ConfChangeTransitionJointExplicit
	if len(changes) == 1 && n.keepsVoters(changes[0]) {
		transition = raftpb.ConfChangeTransitionAuto
	}
	cc := &raftpb.ConfChangeV2{Changes: changes, Context: ctx, Transition: transition.Enum()}
	if _, err := n.store.checkConfChange(cc, who); err != nil {
		return err
	}
	if n.rn.ProposeConfChange(cc) == nil { // else leadership is being transferred
		n.change.start(n.clock.now)
	}
	return nil
}

// keepsVoters reports whether a single change neither removes nor demotes a voter.
func (n *node) keepsVoters(c *raftpb.ConfChangeSingle) bool {
	return c.GetType() == raftpb.ConfChangeUpdateNode || !n.isVoter(c.GetNodeId())
}

// proposeEmpty has this leader append an empty entry, and returns the index of the last
// entry of the log then. That is the empty one, or a later one of this turn, which whoever
// has it has only with the empty one. 0: it could not, because leadership is being
// transferred, or the node has broken.
func (n *node) proposeEmpty() uint64 {
	if err := n.rn.Propose(nil); err != nil {
		return 0
	}
	n.log.stale = true // so that drainedLog drains: the entry is not in n.log yet
	log := n.drainedLog()
	if log == nil {
		return 0
	}
	return log.last()
}

// leaveJoint takes the next step to end a change of membership that is half way. It is
// called in every turn.
func (n *node) leaveJoint() {
	isHalfWay := n.leads() && isJoint(n.store.conf)
	if n.err != nil || !isHalfWay {
		return
	}
	n.perform(n.change.joint.step(n.leaderState()))
}
