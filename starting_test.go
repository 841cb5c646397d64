// Tests of starting.go: clusters that form by --initial-cluster.

package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

// planned is a cluster whose nodes start with a plan.
type planned struct {
	*testCluster
	plans     map[uint64]startPlan // by node; each start takes the present one
	addresses map[uint64]string
	said      *sharedLog
}

// newPlanned has addresses for nodes 1 to n, which are not started yet.
func newPlanned(t *testing.T, n uint64, set ...func(*options)) *planned {
	t.Helper()
	p := &planned{plans: map[uint64]startPlan{}, addresses: map[uint64]string{}, said: &sharedLog{}}
	p.testCluster = newCluster(t, 0, append(set, func(o *options) { o.plan = p.plans[o.id] })...)
	p.log = p.said
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(p.said)
		}
	})
	for id := range n {
		p.addresses[id+1] = deadAddress(t)
	}
	return p
}

// list has nodes as --initial-cluster names them.
func (p *planned) list(ids ...uint64) (members []*kvpb.Node) {
	for _, id := range ids {
		members = append(members, &kvpb.Node{Id: id, Address: p.addresses[id]})
	}
	return members
}

// forms has nodes start with --initial-cluster of these ids.
func (p *planned) forms(nodes []uint64, list ...uint64) {
	for _, id := range nodes {
		p.plans[id] = startPlan{members: p.list(list...)}
	}
}

// begin starts nodes.
func (p *planned) begin(ids ...uint64) {
	p.t.Helper()
	for _, id := range ids {
		p.start(id, p.addresses[id])
	}
}

// says waits until the log has all of these words in one line.
func (p *planned) says(words ...string) {
	p.t.Helper()
	eventually(p.t, func() error {
		for line := range strings.Lines(p.said.String()) {
			hasAll := true
			for _, w := range words {
				hasAll = hasAll && strings.Contains(line, w)
			}
			if hasAll {
				return nil
			}
		}
		return fmt.Errorf("no line of the log has %q", words)
	})
}

// waits waits until a node says by its metrics what keeps it from a cluster.
func (p *planned) waits(id uint64, words string) {
	p.t.Helper()
	eventually(p.t, func() error {
		m, err := p.metrics(id)
		if err == nil && (m.ClusterId != 0 || !strings.Contains(m.UnhealthyReason, words)) {
			err = fmt.Errorf("node %d is in cluster %x: %q lacks %q", id, m.ClusterId, m.UnhealthyReason, words)
		}
		return err
	})
}

var threeNodes = []uint64{1, 2, 3}

// TestFormsByItself: nodes with the same list form one cluster once all are up. One that
// restarts without its memory is taken back; once all have, they form another one.
func TestFormsByItself(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 3)
	p.forms(threeNodes, 1, 2, 3)
	p.begin(1, 2)
	p.waits(1, "node 3 at "+p.addresses[3]+" does not answer")
	p.waits(2, "node 3 at "+p.addresses[3]+" does not answer")
	p.says(notYet, "node 3 at "+p.addresses[3]+" does not answer")
	p.begin(3)
	p.settled(threeNodes...)
	cluster := p.clusterOf(1)
	p.says("the cluster begins anew", "what it had in memory is lost", hex(cluster))
	for _, id := range threeNodes {
		p.killed(id)
		p.settled(threeNodes...)
		if got := p.clusterOf(id); got != cluster {
			t.Fatalf("node %d is in cluster %x, and was in %x", id, got, cluster)
		}
	}
	p.works(threeNodes...)
	for _, id := range threeNodes {
		p.kill(id)
	}
	p.begin(3, 1, 2)
	p.settled(threeNodes...)
	if again := p.clusterOf(2); again == cluster {
		t.Errorf("it is cluster %x again", again)
	} else {
		p.says("the cluster begins anew", hex(again))
	}
	for line := range strings.Lines(p.said.String()) {
		if strings.Contains(line, "level=WARN") && strings.Contains(line, "tries again") {
			t.Errorf("nothing was wrong, and the log warns: %s", line)
		}
	}
	if text := p.said.String(); strings.Count(text, "the cluster begins anew") != 2 {
		t.Errorf("clusters were begun %d times", strings.Count(text, "the cluster begins anew"))
	}
}

// TestFormsAlone: a list of one is a cluster of one.
func TestFormsAlone(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 1)
	p.forms([]uint64{1}, 1)
	p.begin(1)
	p.settled(1)
	p.works(1)
}

// TestOtherListsFormNothing: nodes whose lists differ form no cluster, and the log of each says
// which lists differ, and at whom. An init says so, too, unless it is by force.
func TestOtherListsFormNothing(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 4)
	p.forms([]uint64{1, 2}, 1, 2, 3)
	p.forms([]uint64{3}, 1, 2, 3, 4)
	p.forms([]uint64{4}, 3, 4)
	p.begin(1, 2, 3, 4)
	lists := map[uint64]string{
		1: formatNodes(p.list(1, 2, 3)),
		3: formatNodes(p.list(1, 2, 3, 4)),
		4: formatNodes(p.list(3, 4)),
	}
	at := func(id uint64) string {
		return fmt.Sprintf("node %d at %s was started with --initial-cluster %s", id, p.addresses[id], lists[id])
	}
	p.waits(1, at(3))
	p.waits(2, at(3))
	p.waits(3, at(1))
	p.waits(4, at(3))
	for _, id := range []uint64{1, 2, 3, 4} {
		p.says("level=WARN", notYet, fmt.Sprintf("node=%d ", id), "was started with --initial-cluster")
	}
	p.says("level=WARN", "node=1 ", "a node forms a cluster of others", `founder="3=`, lists[1], lists[3])
	p.says("level=WARN", "node=3 ", "a node forms a cluster of others", lists[3])
	_, err := p.nodes[1].Init(p.ctx, &kvpb.InitRequest{Members: p.list(1, 2)})
	wantError(t, err, codes.FailedPrecondition, "OTHER_LIST")
	p.uninitialized(1, 2, 3, 4)
	p.done(func() error {
		_, err := p.nodes[1].Init(p.ctx, &kvpb.InitRequest{Members: p.list(1, 2), Force: true})
		return err
	})
	p.settled(1, 2)
	p.says("node=3 ", notYet, "is in another cluster")
}

// TestFounderAsksAgain: a founder whose connection to a member breaks asks that for the list that
// it has claimed it for: the member warns of no other one.
func TestFounderAsksAgain(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 3)
	p.forms([]uint64{1, 2}, 1, 2, 3) // node 3 is never up
	p.begin(1, 2)
	f := newFounder(p.nodes[1].server, &kvpb.InitRequest{Members: p.list(1, 2, 3)})
	node2 := p.list(2)[0]
	waiting := inBackground(func() error {
		joined := f.awaitJoin(p.ctx, node2, &kvpb.ClaimRequest{To: node2, ClusterId: 5})
		if joined.outcome != initWaiting {
			return fmt.Errorf("outcome %v, %w", joined.outcome, joined.err)
		}
		return nil
	})
	isWaited := func(n *node) error {
		if len(n.calls.requests) == 0 {
			return errors.New("nobody waits")
		}
		return nil
	}
	p.inLoop(2, isWaited)
	p.wires.mu.Lock()
	p.wires.breakAll(node2.Address)
	p.wires.mu.Unlock()
	<-waiting.ended
	if waiting.err != nil {
		t.Error(waiting.err)
	}
	if strings.Contains(p.said.String(), "a node forms a cluster of others") {
		t.Error("the member has heard of another list")
	}
}

// TestRemovedFormsNothing: a node that was removed, and comes back fresh with its list, forms no
// other cluster and is not taken in by that which has removed it.
func TestRemovedFormsNothing(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 3)
	p.forms(threeNodes, 1, 2, 3)
	p.begin(1, 2, 3)
	p.settled(threeNodes...)
	cluster := p.clusterOf(1)
	p.change(1, &kvpb.ChangeMembershipRequest{Remove: []uint64{3}})
	wanted := "is in another cluster, " + hex(cluster)
	p.waits(3, wanted) // it has dropped what it had
	p.killed(3)
	p.waits(3, wanted)
	p.restart(3) // and once more
	p.waits(3, wanted)
	p.settled(1, 2)
	p.addLearner(1, 3)
	p.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{3}})
	p.settled(1, 2, 3)
}

// TestStateGoesBeforeTheList: a node with a data directory is who it was, whatever its list is.
func TestStateGoesBeforeTheList(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	p := newPlanned(t, 4, func(o *options) { o.durable, o.dataDir = true, fmt.Sprintf("%s/%d", parent, o.id) })
	p.forms(threeNodes, 1, 2, 3)
	p.begin(1, 2, 3)
	p.settled(threeNodes...)
	p.says("the cluster begins anew", "all data directories were empty")
	if strings.Contains(p.said.String(), "the data directory is empty, and its members know") {
		t.Error("a new node is warned of its empty directory")
	}
	cluster := p.clusterOf(1)
	version := p.set(1, "k", "v")
	p.forms([]uint64{1}, 1)
	p.forms([]uint64{2}, 2, 4)
	for _, id := range threeNodes {
		p.kill(id)
	}
	p.begin(1, 2, 3)
	p.settled(threeNodes...)
	if got := p.clusterOf(1); got != cluster {
		t.Errorf("it is cluster %x, and was %x", got, cluster)
	}
	p.wants(2, false, "k", "v", version)
}

// formHalfway has nodes 1 and 2 in a cluster that one of them forms, and node 3 dead. It returns
// that cluster.
func (p *planned) formHalfway() (cluster uint64) {
	p.t.Helper()
	p.forms([]uint64{1, 2}, 1, 2, 3)
	p.begin(3) // without a list: it forms nothing
	node3 := p.nodes[3]
	held, fail := p.failWhen(3, hasClaim)
	p.begin(1, 2)
	<-held
	p.joins(1)
	p.joins(2)
	fail()
	p.forms([]uint64{3}, 1, 2, 3)
	<-node3.ended
	_ = node3.conn.Close()
	delete(p.nodes, 3)
	return p.clusterOf(2)
}

// founder is who has formed the cluster that formHalfway has left.
func (p *planned) founder() (id uint64) {
	p.t.Helper()
	p.inLoop(2, func(n *node) error {
		id = n.voterNodes()[0].Id
		return nil
	})
	return id
}

// TestFormsOnAfterCrash: nodes that have died while their cluster was being formed go on with it
// when they start again: it is the same one. What they ask of the leader they ask for themselves.
func TestFormsOnAfterCrash(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	p := newPlanned(t, 3, func(o *options) { o.durable, o.dataDir = true, fmt.Sprintf("%s/%d", parent, o.id) })
	cluster := p.formHalfway()
	p.says("request of an operator", "method=AddLearner", "for=itself") // the learner's, which forms it, too
	if strings.Contains(p.said.String(), "for=anyone") {
		t.Error("a node has asked in the name of anyone")
	}
	p.kill(1)
	p.kill(2)
	p.begin(1, 2, 3)
	p.settled(threeNodes...)
	if got := p.clusterOf(3); got != cluster {
		t.Errorf("it is cluster %x, and was %x", got, cluster)
	}
}

// TestFounderIsLost: in memory, a founder that dies before there is a second voter takes its
// cluster with it. The others drop that, and form another one with it.
func TestFounderIsLost(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 3)
	cluster := p.formHalfway()
	learner := 3 - p.founder()
	p.killed(p.founder())
	p.says(orphaned, "node 3 at "+p.addresses[3]+" does not answer") // it may know of another voter
	if got := p.clusterOf(learner); got != cluster {
		t.Errorf("node %d has dropped cluster %x before node 3 was asked", learner, cluster)
	}
	p.begin(3)
	p.settled(threeNodes...)
	if got := p.clusterOf(3); got == cluster {
		t.Errorf("it is cluster %x still", got)
	}
	p.says("the node that was forming this cluster has lost it")
}

// TestLivingClusterIsKept: a node drops a cluster that is half way only if the voters have lost it,
// and all others, who were asked, know of no other voter.
func TestLivingClusterIsKept(t *testing.T) {
	t.Parallel()
	members := []*kvpb.Node{plainNode(1), plainNode(2), plainNode(3)}
	fresh := surveyAnswer{resp: &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH}}
	silent := surveyAnswer{err: errors.New("node 3 does not answer")}
	named := func(by uint64) surveyAnswer {
		return surveyAnswer{resp: &kvpb.ClaimResponse{
			Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED, ClusterId: 7, By: plainNode(by),
		}}
	}
	in := func(cluster uint64, voters ...*kvpb.Node) surveyAnswer {
		return surveyAnswer{resp: &kvpb.ClaimResponse{
			Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER, ClusterId: cluster, Voters: voters, Members: members,
		}}
	}
	founder := members[0]
	moved := &kvpb.Node{Id: 1, Address: "elsewhere:1"}
	done := in(7, founder)
	done.resp.Members = nil
	for _, tt := range []struct {
		what    string
		answers []surveyAnswer
		want    string // empty: it never goes on
	}{
		{"all others know the founder alone", []surveyAnswer{fresh, in(7, founder), in(7, founder)}, ""},
		{"one was not in it yet", []surveyAnswer{fresh, in(7, founder), fresh}, ""},
		{"one of it calls the founder", []surveyAnswer{named(2), in(7, founder), in(7, founder)}, ""},
		{"one is in another cluster", []surveyAnswer{fresh, in(7, founder), in(8, plainNode(9))}, ""},
		{"one does not answer", []surveyAnswer{fresh, in(7, founder), silent}, "node 3 does not answer"},
		{"the founder has it", []surveyAnswer{in(7, founder), in(7, founder), fresh}, "node 1 at n1:1, a voter, is still in the cluster"},
		{"one knows of more voters", []surveyAnswer{fresh, in(7, founder), in(7, members...)}, "another member 1=n1:1"},
		{"all know of more voters", []surveyAnswer{fresh, in(7, members...), in(7, members...)}, "node 2 at n2:1, a voter, is still in the cluster"},
		{"the founder is elsewhere", []surveyAnswer{fresh, in(7, moved), in(7, moved)}, "node 1 at elsewhere:1, a voter, was not asked"},
		{"an operator was there", []surveyAnswer{fresh, in(7, founder), done}, "an operator has changed the membership, as node 3 knows"},
		{"another one calls the founder", []surveyAnswer{named(4), in(7, founder), in(7, founder)}, "is called by node 4 at n4:1"},
	} {
		got := ""
		if err := mayGoOn(7, members, tt.answers); err != nil {
			got = err.Error()
		}
		if got != tt.want && (tt.want == "" || !strings.Contains(got, tt.want)) {
			t.Errorf("%s: %q, want %q", tt.what, got, tt.want)
		}
	}

	lost := []surveyAnswer{fresh, in(7, founder), in(7, founder)}
	goesOn := []surveyAnswer{fresh, in(7, founder), in(7, members...)}
	for _, tt := range []struct {
		what     string
		surveys  [][]surveyAnswer
		isGoneOn bool
	}{
		{"twice it is lost", [][]surveyAnswer{lost, lost}, false},
		{"only the first survey says so", [][]surveyAnswer{lost, goesOn}, true},
		{"only the second one would", [][]surveyAnswer{goesOn, lost}, true},
		{"there is no second one", [][]surveyAnswer{lost}, true},
	} {
		next := 0
		err := whyGoesOn(7, members, func() ([]surveyAnswer, error) {
			if next++; next > len(tt.surveys) {
				return nil, errors.New("there is no time for it")
			}
			return tt.surveys[next-1], nil
		})
		if (err != nil) != tt.isGoneOn {
			t.Errorf("%s: %v", tt.what, err)
		}
	}
}

// TestFoundingIsDropped: a node drops a cluster that its founder has lost, unless it has a leader
// again, or is in another cluster by now, or may have what the founder has acknowledged.
func TestFoundingIsDropped(t *testing.T) {
	t.Parallel()
	changes := func(of *kvpb.Node, kind raftpb.ConfChangeType, raftID uint64) func(*lone) {
		ctx := &kvpb.ConfChangeContext{}
		if of != nil {
			ctx.Members = []*kvpb.Member{{RaftId: raftID, Node: of}}
		}
		data := mustMarshal(t, &raftpb.ConfChangeV2{
			Changes: []*raftpb.ConfChangeSingle{confChange(kind, raftID)},
			Context: mustMarshal(t, ctx),
		})
		return func(l *lone) {
			l.hears(0, message(raftpb.MsgApp, 2, 1, func(m *raftpb.Message) {
				m.Index, m.LogTerm = new(uint64(1)), new(uint64(1))
				m.Entries = []*raftpb.Entry{{
					Type: raftpb.EntryConfChangeV2.Enum(), Index: new(uint64(2)), Term: new(uint64(1)), Data: data,
				}}
			}))
		}
	}
	const learner, voter = raftpb.ConfChangeAddLearnerNode, raftpb.ConfChangeAddNode
	nothing := func(*lone) {}
	hearsLeader := func(l *lone) {
		l.hears(0, message(raftpb.MsgHeartbeat, 2, 1, func(m *raftpb.Message) { m.Commit = new(uint64(1)) }))
	}
	hadLeader := func(l *lone) {
		hearsLeader(l)
		l.ticks(1)
		_ = l.n.rn.ForgetLeader()
		l.turn(0)
	}
	hasDisk := func(l *lone) { l.n.durable.disk = &disk{} }
	half := &raftpb.ConfState{Voters: []uint64{2}, Learners: []uint64{1, 3}}
	for _, tt := range []struct {
		what          string
		conf          *raftpb.ConfState
		before, after func(*lone) // the time without a leader
		cluster       uint64
		isDropped     bool
		want          string // in the error; empty: there is none
	}{
		{"nothing else", half, nothing, nothing, 7, true, ""},
		{"another learner is in the log", half, changes(plainNode(3), learner, 9), nothing, 7, true, ""},
		{"a stranger is in the log", half, changes(plainNode(4), learner, 9), nothing, 7, false, "was being changed"},
		{"another voter is in the log", half, changes(nil, voter, 3), nothing, 7, false, "was being changed"},
		{"this node is a voter in the log", half, changes(nil, voter, 1), nothing, 7, false, "was being changed"},
		{"there is a leader again", half, nothing, hearsLeader, 7, false, ""},
		{"there was a leader again", half, nothing, hadLeader, 7, false, ""},
		{"it is in another cluster", half, nothing, nothing, 8, false, ""},
		{"it has a disk", half, nothing, hasDisk, 7, false, ""},
		{"it is a voter", &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{3}}, nothing, nothing, 7, false, ""},
		{"it is joint", &raftpb.ConfState{Voters: []uint64{3}, VotersOutgoing: []uint64{2}, Learners: []uint64{1}}, nothing, nothing, 7, false, ""},
	} {
		l := newLone(t, inNoCluster)
		s := newTestStore()
		tt.conf.AutoLeave = new(false)
		s.configure(tt.conf, plainMembers(1, 2, 3))
		s.founding = []*kvpb.Node{plainNode(1), plainNode(2), plainNode(3)}
		l.n.inbox.event(func() {
			if err := l.n.stepSnapshot(l.hellos[0], 1, s); err != nil {
				t.Fatal(err)
			}
		})
		l.turn(0)
		tt.before(l)
		for l.n.election.leaderlessTicks < l.n.ticksOf(leaderWait) {
			l.turn(1)
		}
		tt.after(l)
		err := l.n.dropFounding(tt.cluster)
		if isDropped := l.n.store.clusterID == 0; isDropped != tt.isDropped {
			t.Errorf("%s: it is dropped: %v", tt.what, isDropped)
		}
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: the error is %v, want %q", tt.what, err, tt.want)
		}
	}
}

// TestFormingUndoesNothing: who has been demoted or removed by an operator while a cluster was
// being formed, or since, stays so.
func TestFormingUndoesNothing(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 3)
	cluster := p.formHalfway()
	learner := 3 - p.founder()
	p.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{learner}})
	p.change(1, &kvpb.ChangeMembershipRequest{Demote: []uint64{learner}})
	p.begin(3)
	eventually(t, func() error { // it had been added, or had not: then nobody adds it now
		m := p.metricsOf(3)
		isRefused := strings.Contains(m.UnhealthyReason, "is in another cluster, "+hex(cluster))
		if !m.Healthy && !isRefused {
			return fmt.Errorf("node 3 is in cluster %x, %s", m.ClusterId, m.UnhealthyReason)
		}
		return nil
	})
	for _, id := range []uint64{1, 2} {
		if voters, _ := membersOf(p.metricsOf(id)); len(voters) != 1 || p.nodes[id].server.n.status.latest.Load().founding != nil {
			t.Errorf("node %d has the voters %v", id, voters)
		}
	}
}

// metricsOf waits for a node's metrics.
func (c *testCluster) metricsOf(id uint64) (m *kvpb.MetricsResponse) {
	c.t.Helper()
	eventually(c.t, func() (err error) { m, err = c.metrics(id); return err })
	return m
}

// TestFormsByCertificates: over TLS, nodes form a cluster with no certificates but their own.
func TestFormsByCertificates(t *testing.T) {
	t.Parallel()
	p := newPlanned(t, 3)
	p.pki, _ = testPKI(t, 3)
	p.forms(threeNodes, 1, 2, 3)
	p.begin(1, 2, 3)
	p.settled(threeNodes...)
	p.works(threeNodes...)
}

// TestStarterSaysWhatIs: a node says that it tries again only if it does.
func TestStarterSaysWhatIs(t *testing.T) {
	list := []*kvpb.Node{plainNode(1), plainNode(2)}
	isIn := glance{clusterID: 7, lead: 2}
	isOrphaned := glance{clusterID: 7, leaderless: uint64(leaderWait / time.Second)}
	s := &server{n: turnNode()}
	forms := &starter{s: s, plan: &startPlan{members: list}}
	joins := &starter{s: s, plan: &startPlan{join: []string{"a:1"}}}
	for _, c := range []struct {
		b    *starter
		p    published
		want string
	}{
		{forms, published{}, notYet},
		{forms, published{glance: isIn, founding: list}, halfWay},
		{forms, published{glance: isIn, founding: list[:1]}, staysSo},
		{forms, published{glance: isOrphaned, founding: list}, orphaned},
		{forms, published{glance: isOrphaned}, staysSo},
		{forms, published{glance: isIn}, staysSo},
		{joins, published{}, notYet},
		{joins, published{glance: isIn}, searches},
	} {
		if got := c.b.state(&c.p); got != c.want {
			t.Errorf("cluster %d, founding %v: %q, want %q", c.p.clusterID, c.p.founding, got, c.want)
		}
	}
}

// TestNothingToGiveUp: a node that has its leader back says nothing of a cluster that may be lost.
func TestNothingToGiveUp(t *testing.T) {
	list := []*kvpb.Node{plainNode(1), plainNode(2)}
	b := newStarter(&server{n: turnNode()})
	goesOn := errors.New("a voter is still in the cluster")
	for _, c := range []struct {
		p    glance
		want error
	}{
		{glance{clusterID: 7, leaderless: uint64(leaderWait / time.Second)}, goesOn},
		{glance{clusterID: 7, lead: 2}, nil},
		{glance{}, nil},
	} {
		b.s.n.status.latest.Store(&published{glance: c.p, founding: list})
		if err := b.conclude(t.Context(), 7, goesOn); err != c.want {
			t.Errorf("leader %d: %v, want %v", c.p.lead, err, c.want)
		}
	}
}

// TestSayings: the same is said again only once in a while, something new soon.
func TestSayings(t *testing.T) {
	var s sayings
	now := time.Now()
	for _, c := range []struct {
		text  string
		after time.Duration
		isDue bool
	}{
		{"a", 0, true}, {"a", 2 * rareLogInterval, false}, {"b", 0, true}, {"c", rareLogInterval, false},
		{"c", time.Millisecond, true}, {"c", sayAgain - time.Millisecond, false}, {"c", time.Millisecond, true},
	} {
		now = now.Add(c.after)
		if s.isDue(c.text, now) != c.isDue {
			t.Errorf("%q after %v: due %v", c.text, c.after, !c.isDue)
		}
	}
}

// TestTryPauses: they grow up to a limit, and are random.
func TestTryPauses(t *testing.T) {
	var p tryPauses
	seen := map[time.Duration]bool{}
	for range 1000 {
		d := p.next(longestTryPause)
		between(t, "a pause", d, firstTryPause/2, longestTryPause)
		between(t, "a pause", d, p.limit/2, p.limit)
		seen[d] = true
	}
	if len(seen) < 500 || p.limit != longestTryPause {
		t.Errorf("%d pauses, the longest %v", len(seen), p.limit)
	}
}

// TestLists: what --initial-cluster takes.
func TestLists(t *testing.T) {
	for text, want := range map[string]string{
		"1=a:1":                  "1=a:1",
		"2=b:1,1=a:1":            "1=a:1 2=b:1",
		"1=[::1]:1,2=a:1":        "1=[::1]:1 2=a:1",
		"":                       "want ID=HOST:PORT",
		"a:1":                    "want ID=HOST:PORT",
		"0=a:1":                  "want ID=HOST:PORT",
		"-1=a:1":                 "want ID=HOST:PORT",
		"1=a:1,":                 "want ID=HOST:PORT",
		"1=a":                    "want host:port",
		"1=:1":                   "want host:port, and a host",
		"1=0.0.0.0:1":            "want where the others find the node",
		"1=a:0":                  "want where the others find the node",
		"1=a:1,1=b:1":            "has the id or the address of another",
		"1=a:1,2=a:1":            "has the id or the address of another",
		"1=a:1, 2=b:1":           "want ID=HOST:PORT",
		longList(maxMembers):     formatNodes(mustParse(t, longList(maxMembers))),
		longList(maxMembers + 1): "there have to be 1 to 64",
	} {
		members, err := parseMembers(text)
		got := formatNodes(members)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) {
			t.Errorf("%.40q: %s, want %s", text, got, want)
		}
	}
}

func longList(n int) string {
	var parts []string
	for i := range n {
		parts = append(parts, fmt.Sprintf("%d=a:%d", i+1, i+1))
	}
	return strings.Join(parts, ",")
}

func mustParse(t *testing.T, text string) []*kvpb.Node {
	t.Helper()
	members, err := parseMembers(text)
	if err != nil || len(members) == 0 {
		t.Fatal(errors.Join(err, errors.New("no members")))
	}
	return members
}
