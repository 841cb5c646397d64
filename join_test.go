// Tests of join.go: nodes that join a cluster by --join.

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"raft-key-value/kvpb"
)

// joins has nodes start with --join of these ids.
func (p *planned) joinsBy(nodes []uint64, at ...uint64) {
	for _, id := range nodes {
		plan := startPlan{}
		for _, other := range at {
			plan.join = append(plan.join, p.addresses[other])
		}
		p.plans[id] = plan
	}
}

// roles waits until a node says that these are the voters and the learners, and is healthy.
func (p *planned) roles(via uint64, voters []uint64, learners ...uint64) {
	p.t.Helper()
	eventually(p.t, func() error {
		m, err := p.metrics(via)
		if err != nil {
			return err
		}
		v, l := membersOf(m)
		if !slices.Equal(v, voters) || !slices.Equal(l, learners) || !m.Healthy || m.Joint {
			return fmt.Errorf("node %d: voters %v, learners %v, %s", via, v, l, m.UnhealthyReason)
		}
		return nil
	})
}

// TestJoin: nodes that join at once become voters, or stay learners, as they were told, whether
// the cluster is there already or not, and are taken back in that role.
func TestJoin(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 5)
	p.joinsBy([]uint64{4}, 1, 2, 3, 4) // its own address does no harm
	p.joinsBy([]uint64{5}, 5, 3, 4)
	fifth := p.plans[5]
	fifth.asLearner = true
	p.plans[5] = fifth
	p.begin(4, 5)
	p.waits(4, "does not answer")
	p.begin(1, 2, 3)
	p.waits(4, "is in no cluster")
	p.init(1, 2, 3)
	voters := []uint64{1, 2, 3, 4}
	for id := range p.nodes {
		p.roles(id, voters, 5)
	}
	p.says("node=4 ", "this node joins a cluster")
	p.works(4, 5)
	for _, id := range []uint64{4, 5} {
		p.killed(id)
		p.roles(id, voters, 5)
	}
	p.roles(1, voters, 5)
}

// TestJoiningUndoesNothing: a demotion and a removal by an operator stay, however often the node
// starts again, until an operator says otherwise.
func TestJoiningUndoesNothing(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 4)
	p.joinsBy([]uint64{4}, 1, 2)
	p.begin(1, 2, 3)
	p.init(1, 2, 3)
	p.begin(4)
	p.roles(4, []uint64{1, 2, 3, 4})
	p.change(1, &kvpb.ChangeMembershipRequest{Demote: []uint64{4}})
	p.killed(4)
	p.roles(4, threeNodes, 4)
	p.roles(1, threeNodes, 4)
	p.inLoop(1, func(n *node) error {
		if len(n.store.joiners) > 0 {
			t.Error("it is to be promoted again")
		}
		return nil
	})
	p.change(1, &kvpb.ChangeMembershipRequest{Remove: []uint64{4}})
	refused := "node 4 was removed from the cluster: add-learner 4=" + p.addresses[4] + " adds it again"
	p.waits(4, refused)
	p.killed(4)
	p.waits(4, refused)
	p.says("level=WARN", "node=4 ", refused)
	p.roles(1, threeNodes)
	p.addLearner(1, 4)
	p.killed(4)
	p.roles(4, threeNodes, 4)
}

func hasNoJoiner(n *node) error {
	if len(n.store.joiners) > 0 {
		return fmt.Errorf("joiners %x", n.store.joiners)
	}
	return nil
}

// TestJoinerIsPromotedByWhoeverLeads: a node that was added and has not caught up is promoted
// once it has, by the leader of then, though it restarts meanwhile. If an operator says that
// it shall be a learner, or who all voters are, it is not.
func TestJoinerIsPromotedByWhoeverLeads(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		then     func(p *planned)
		voters   []uint64
		learners []uint64
	}{
		"the leader changes": {func(p *planned) { p.transfer(1, 1+p.settled(1, 2, 3)%3) }, []uint64{1, 2, 3, 4}, nil},
		"it restarts":        {func(p *planned) {}, []uint64{1, 2, 3, 4}, nil},
		"it is demoted": {func(p *planned) {
			p.change(1, &kvpb.ChangeMembershipRequest{Demote: []uint64{4}, Promote: []uint64{1}})
		}, threeNodes, []uint64{4}},
		"it is added as a learner": {func(p *planned) {
			ctx, cancel := context.WithCancel(p.ctx)
			added := inBackground(func() error { // it would wait until the node has caught up
				_, err := p.nodes[1].AddLearner(ctx, &kvpb.AddLearnerRequest{Node: p.list(4)[0]})
				return err
			})
			p.inLoop(1, hasNoJoiner)
			cancel()
			<-added.ended
		}, threeNodes, []uint64{4}},
		"the voters are stated": {func(p *planned) { p.change(1, &kvpb.ChangeMembershipRequest{Members: threeNodes}) }, threeNodes, []uint64{4}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlanned(t, 4)
			p.joinsBy([]uint64{4}, 1, 2, 3)
			p.begin(1, 2, 3)
			p.init(1, 2, 3)
			p.cutOff(p.addresses[4]) // it does nothing before failWhen
			p.begin(4)
			_, fail := p.failWhen(4, func(n *node) bool { return len(n.peers.connected) > 0 }) // before it has caught up
			p.heal()
			isJoiner := func(n *node) error {
				if len(n.store.joiners) != 1 {
					return fmt.Errorf("joiners %x", n.store.joiners)
				}
				return nil
			}
			p.inLoop(1, isJoiner)
			c.then(p)
			node4 := p.nodes[4]
			fail()
			<-node4.ended
			_ = node4.conn.Close()
			delete(p.nodes, 4)
			p.begin(4)
			p.roles(4, c.voters, c.learners...)
			p.inLoop(1, hasNoJoiner)
			p.roles(1, c.voters, c.learners...)
		})
	}
}

// TestJoinRefused: an id that a node has which answers elsewhere, and a cluster without a leader.
func TestJoinRefused(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 6, steady)
	p.joinsBy([]uint64{3}, 1, 2)
	p.begin(1, 2)
	p.init(1, 2)
	p.begin(3)
	p.roles(3, threeNodes)
	third := p.nodes[3]
	delete(p.nodes, 3)
	other := p.start(3, p.addresses[4])
	p.waits(3, "node 3")
	p.says("level=WARN", "it answers: stop it, or give this one another id")
	p.nodes[6] = third // to be stopped
	p.roles(1, threeNodes)
	p.nodes[3] = other
	p.stop(3)
	delete(p.nodes, 6)
	p.nodes[3] = third

	goOn := []func(){p.hold(2), p.hold(3)}
	p.joinsBy([]uint64{4}, 1)
	p.addresses[4] = p.addresses[6]
	p.begin(4)
	p.waits(4, "there is no leader")
	for _, release := range goOn {
		release()
	}
	p.roles(4, []uint64{1, 2, 3, 4})
}

// TestJoinFindsWhoHasMoved: a node that starts elsewhere without its memory is taken back there in
// its role, and members with data directories, who have all moved, find each other.
func TestJoinFindsWhoHasMoved(t *testing.T) {
	t.Parallel()
	t.Run("in memory", func(t *testing.T) {
		p := newPlanned(t, 5)
		p.joinsBy([]uint64{4}, 1, 2, 3)
		p.begin(1, 2, 3)
		p.init(1, 2, 3)
		p.begin(4)
		p.roles(4, []uint64{1, 2, 3, 4})
		p.kill(4)
		p.addresses[4] = p.addresses[5]
		p.begin(4)
		p.roles(4, []uint64{1, 2, 3, 4})
		if at := p.addressOf(1, 4); at != p.addresses[4] {
			t.Errorf("the members know node 4 at %s, and it is at %s", at, p.addresses[4])
		}
	})
	t.Run("on disk", func(t *testing.T) {
		parent := t.TempDir()
		p := newPlanned(t, 6, func(o *options) { o.durable, o.dataDir = true, fmt.Sprintf("%s/%d", parent, o.id) })
		p.begin(1, 2, 3)
		p.init(1, 2, 3)
		version := p.set(1, "k", "v")
		for _, id := range threeNodes {
			p.kill(id)
		}
		for _, id := range threeNodes {
			p.addresses[id] = p.addresses[id+3]
		}
		p.joinsBy(threeNodes, 1, 2)
		p.begin(1, 2, 3)
		p.settled(threeNodes...)
		p.wants(3, false, "k", "v", version)
	})
}

// TestJoinMissesADisk: a member that comes back elsewhere without its data directory is refused
// there, as at its old address. With an empty directory it is taken back, and its log says so.
func TestJoinMissesADisk(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	dirs := map[uint64]string{}
	for id := range uint64(4) {
		dirs[id+1] = fmt.Sprintf("%s/%d", parent, id+1)
	}
	p := newPlanned(t, 5, func(o *options) {
		o.dataDir = dirs[o.id]
		o.durable = o.dataDir != ""
	})
	p.joinsBy([]uint64{4}, 1, 2, 3)
	p.begin(1, 2, 3)
	p.init(1, 2, 3)
	p.begin(4)
	p.roles(4, []uint64{1, 2, 3, 4})
	knows := func(n *node) error {
		if !slices.Contains(n.peers.durableNodes, 4) {
			return errors.New("it does not know node 4 as durable")
		}
		return nil
	}
	for _, id := range threeNodes {
		p.inLoop(id, knows)
	}
	p.kill(4)
	p.addresses[4] = p.addresses[5]
	dirs[4] = ""
	p.begin(4)
	p.waits(4, "node 4 is a member with a data directory, and was started without --data-dir")
	p.kill(4)
	dirs[4] = parent + "/empty"
	p.begin(4)
	p.roles(4, []uint64{1, 2, 3, 4})
	p.says("node=4 ", "the data directory is empty, and its members know this node")
}

// TestJoinFindsSomebodyNew: a node that looks for its members, and finds one that was added since,
// says so.
func TestJoinFindsSomebodyNew(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 4, steady)
	p.begin(1, 2, 3, 4)
	p.init(1, 2, 3)
	p.settled(threeNodes...)
	p.transfer(1, 1)
	release := p.hold(3)
	p.addLearner(1, 4)
	p.joins(4)
	b := newStarter(p.nodes[3].server)
	if err := b.askWhere(p.ctx, p.addresses[2]); err != nil {
		t.Errorf("it finds a member: %v", err)
	}
	err := b.askWhere(p.ctx, p.addresses[4])
	release()
	wantError(t, err, codes.FailedPrecondition, "WRONG_NODE")
	wantPart(t, fmt.Sprint(err), "node 4 at "+p.addresses[4]+" is in this node's cluster, but none of the members")
}

// TestJoinIsForOneself: over TLS, a node joins by its own certificate, and may not have another
// one added, unless it is a member that forwards the other one's request.
func TestJoinIsForOneself(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 4)
	p.pki, _ = testPKI(t, 4)
	p.joinsBy([]uint64{2}, 1)
	p.begin(1)
	p.init(1)
	p.begin(2)
	p.roles(2, []uint64{1, 2})
	leader := p.settled(1, 2)
	p.begin(3)
	as := func(name string) kvpb.RaftServiceClient {
		conn := dialNode(t, p.addresses[leader], testCredentials(t, p.pki, name, p.addresses[leader]))
		t.Cleanup(func() { _ = conn.Close() })
		return kvpb.NewRaftServiceClient(conn)
	}
	node3 := p.nodes[3].server.n
	req := &kvpb.JoinRequest{From: node3.peer(node3.status.latest.Load())}
	_, err := as("node2").Join(p.ctx, req)
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED")
	forwarded := metadata.AppendToOutgoingContext(p.ctx, forwardMetadata, "1")
	_, err = as("node4").Join(forwarded, req)
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED")
	elsewhere := &kvpb.Peer{Node: &kvpb.Node{Id: 2, Address: p.addresses[3]}, RaftId: 5, Life: 5}
	_, err = as("node2").Join(p.ctx, &kvpb.JoinRequest{From: elsewhere})
	if reasonOf(err) != "UNREACHABLE" {
		t.Errorf("node 2 joins at node 3's address: %v", err)
	}
	p.roles(1, []uint64{1, 2})
	if _, err := as("node2").Join(forwarded, req); err != nil {
		t.Errorf("a member does not forward: %v", err)
	}
	p.roles(1, threeNodes)
}

// TestJoiningIsLoggedRarely: neither side logs each try of a node that asks again and again.
func TestJoiningIsLoggedRarely(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 4)
	p.begin(1, 2)
	p.init(1)
	tries := func(b *starter, words string) {
		t.Helper()
		made := 0
		eventually(t, func() error {
			made++
			err := b.askToJoin(p.ctx, p.addresses[1])
			if said := strings.Count(p.said.String(), words); made < 2 || said == made {
				return fmt.Errorf("%d tries, %d lines, the last one: %v", made, said, err)
			}
			return nil
		})
	}
	tries(newStarter(p.nodes[2].server), "this node joins a cluster")
	p.begin(3)
	p.addLearner(1, 3)
	p.nodes[4] = p.nodes[3] // to be stopped
	delete(p.nodes, 3)
	other := p.start(3, p.addresses[4]) // refused again and again
	tries(newStarter(other.server), `msg="a node asks to join" node=1 peer=3`)
}

// TestJoinIsChecked: what is no node is refused, and so is a process that does not answer at the
// address that it names.
func TestJoinIsChecked(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.init(1)
	raft := kvpb.NewRaftServiceClient(c.nodes[1].conn)
	for name, from := range map[string]*kvpb.Peer{
		"nobody":                       nil,
		"no raft ID":                   {Node: c.proto(2)[0], Life: 1},
		"no life":                      {Node: c.proto(2)[0], RaftId: 1},
		"no id":                        {Node: &kvpb.Node{Address: "a:1"}, RaftId: 1, Life: 1},
		"no address":                   {Node: &kvpb.Node{Id: 2}, RaftId: 1, Life: 1},
		"an address that nobody finds": {Node: &kvpb.Node{Id: 2, Address: "0.0.0.0:1"}, RaftId: 1, Life: 1},
	} {
		_, err := raft.Join(c.ctx, &kvpb.JoinRequest{From: from})
		if err == nil {
			t.Errorf("%s joins", name)
			continue
		}
		wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
	_, err := raft.Join(c.ctx, &kvpb.JoinRequest{From: &kvpb.Peer{Node: c.proto(2)[0], RaftId: 5, Life: 5}})
	wantError(t, err, codes.FailedPrecondition, "WRONG_NODE")
	if _, learners := membersOf(c.metricsOf(1)); len(learners) > 0 {
		t.Errorf("learners %v", learners)
	}
}

// TestJoinRules: the rules, with facts that are made up.
func TestJoinRules(t *testing.T) {
	state := func() *leaderState {
		return &leaderState{
			clusterState: clusterState{
				now: firstTick + 1000, electionTicks: 10, self: plainNode(1), raftID: 1, leads: true, mayChange: true,
				raft:      raftState{term: 2, lead: 1, role: raft.StateLeader},
				conf:      &raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{4}},
				members:   map[uint64]*kvpb.Node{1: plainNode(1), 4: plainNode(4)},
				former:    []uint64{7},
				joiners:   []uint64{4},
				connected: map[uint64]bool{4: true},
				heard:     map[uint64]uint64{4: firstTick + 1000},
			},
			progress: map[uint64]tracker.Progress{4: {Match: 9, State: tracker.StateReplicate}},
			upToDate: 9,
		}
	}
	peer := func(id uint64) *kvpb.Peer { return &kvpb.Peer{Node: plainNode(id), RaftId: 100 + id, Life: 1} }
	if s := state().joinStep(peer(5), false); s.kind != stepPropose || !s.members[0].Promote {
		t.Errorf("a new node: %+v", s)
	}
	if s := state().joinStep(peer(5), true); s.kind != stepPropose || s.members[0].Promote {
		t.Errorf("a new node that stays a learner: %+v", s)
	}
	if s := state().joinStep(peer(4), false); s.kind != stepDone {
		t.Errorf("a member that has lost its memory: %+v", s)
	}
	if s := state().joinStep(peer(7), false); reasonOf(s.err) != "REMOVED_MEMBER" {
		t.Errorf("one that was removed: %+v", s)
	}
	moved := state() // a learner that has not asked to vote, or was demoted
	moved.joiners = nil
	delete(moved.connected, 4)
	elsewhere := &kvpb.Peer{Node: &kvpb.Node{Id: 4, Address: "elsewhere:1"}, RaftId: 104, Life: 1}
	if s := moved.joinStep(elsewhere, false); s.kind != stepPropose || s.members[0].Promote {
		t.Errorf("a member that has moved without its memory: %+v", s)
	}
	if s := moved.operatorsLearnerStep(elsewhere); s.kind != stepPropose || s.members[0].Promote {
		t.Errorf("the same, for an operator: %+v", s)
	}
	lost := state() // a joiner
	delete(lost.connected, 4)
	if s := lost.operatorsLearnerStep(elsewhere); s.kind != stepPropose || s.members[0].Promote {
		t.Errorf("a joiner that has moved without its memory, and an operator wants as a learner: %+v", s)
	}
	present := &kvpb.Peer{Node: plainNode(4), RaftId: 4, Life: 1}
	if s := state().operatorsLearnerStep(present); s.kind != stepPropose || s.members[0].Promote {
		t.Errorf("a joiner that an operator wants as a learner: %+v", s)
	}
	busy := state()
	busy.mayChange = false
	if s := busy.operatorsLearnerStep(present); s.kind != stepWait {
		t.Errorf("the same, while another change is made: %+v", s)
	}
	settled := state()
	settled.joiners = nil
	if s := settled.operatorsLearnerStep(present); s.kind != stepDone {
		t.Errorf("a learner that has not asked to vote: %+v", s)
	}
	l := state()
	l.founding = []*kvpb.Node{plainNode(1), plainNode(2)}
	if s := l.joinStep(peer(5), false); reasonOf(s.err) != "CHANGE_IN_PROGRESS" || !mayPass(s.err) {
		t.Errorf("while an Init is half way: %+v", s)
	}
	if s := state().promotionStep(); s.kind != stepPropose || s.changes[0].GetNodeId() != 4 {
		t.Errorf("one that has caught up: %+v", s)
	}
	for name, change := range map[string]func(*leaderState){
		"has not asked":   func(l *leaderState) { l.joiners = nil },
		"does not answer": func(l *leaderState) { delete(l.connected, 4) },
		"is behind":       func(l *leaderState) { l.upToDate = 10 },
		"is taken back":   func(l *leaderState) { l.members[14] = plainNode(4) },
		"would have no majority": func(l *leaderState) {
			l.conf = &raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{4}}
			l.members[2], l.members[3] = plainNode(2), plainNode(3)
		},
	} {
		l := state()
		change(l)
		if s := l.promotionStep(); s.kind != stepWait {
			t.Errorf("it %s: %+v", name, s)
		}
	}
	reborn := state().addMember(peer(4))
	if !reborn.members[0].Promote {
		t.Error("a joiner that has lost its memory is to stay a learner")
	}
}

// TestJoinersAreReplicated: a snapshot has who has asked to join.
func TestJoinersAreReplicated(t *testing.T) {
	s := newStore()
	s.clusterID, s.index, s.term = 7, 3, 1
	member := func(id uint64, promote bool) *kvpb.Member {
		return &kvpb.Member{RaftId: id, Node: plainNode(id), Promote: promote}
	}
	s.configure(&raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{2, 3}},
		[]*kvpb.Member{member(1, true), member(2, true), member(3, false)})
	again := newStore()
	if err := again.restoreHeader(s.header()); err != nil || !slices.Equal(again.joiners, []uint64{2}) {
		t.Errorf("%v: joiners %v", err, again.joiners)
	}
	again.configure(&raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{2, 3}}, []*kvpb.Member{member(2, false)})
	if len(again.joiners) > 0 {
		t.Errorf("an operator has decided, and the joiners are %v", again.joiners)
	}
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{3}}, nil)
	if len(s.joiners) > 0 {
		t.Errorf("it votes, and the joiners are %v", s.joiners)
	}
}
