// Tests of init.go: how a cluster is made, and that there are never two.

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// hex is how errors and the log write a cluster's id.
func hex(clusterID uint64) string { return fmt.Sprintf("%016x", clusterID) }

// clusterOf waits for a node's answer and returns its cluster.
func (c *testCluster) clusterOf(id uint64) (clusterID uint64) {
	c.t.Helper()
	eventually(c.t, func() error {
		m, err := c.metrics(id)
		clusterID = m.GetClusterId()
		return err
	})
	return clusterID
}

// holdWhen keeps a node's loop busy from the moment at which a condition holds there.
func (c *testCluster) holdWhen(id uint64, cond func(*node) bool) (held chan struct{}, release func()) {
	c.t.Helper()
	held = make(chan struct{})
	goOn := make(chan struct{})
	n := c.nodes[id].server.n
	wait := &pendingRequest{ctx: c.ctx, done: make(chan error, 1), poll: func() (bool, error) {
		if !cond(n) {
			return false, nil
		}
		close(held)
		<-goOn
		return true, nil
	}}
	n.inbox.event(func() { n.calls.requests = append(n.calls.requests, wait) })
	release = sync.OnceFunc(func() { close(goOn) })
	c.t.Cleanup(release) // before the nodes are stopped
	return held, release
}

// failWhen ends a node's process, with an error, once fail is called: it is kept
// busy from the moment at which a condition holds there.
func (c *testCluster) failWhen(id uint64, cond func(*node) bool) (held chan struct{}, fail func()) {
	n := c.nodes[id].server.n
	held, release := c.holdWhen(id, cond)
	return held, func() {
		n.inbox.event(func() { n.err = errors.New("the test has ended it") }) // before what else waits
		release()
	}
}

// holdOnceClaimed keeps a node busy once it has answered a claim.
func (c *testCluster) holdOnceClaimed(id uint64) (release func()) {
	c.t.Helper()
	_, release = c.holdWhen(id, hasClaim)
	return release
}

func hasClaim(n *node) bool { return n.claims.current != nil }

// beginInit calls the first member's Init, and again while a member has not answered in time and
// nothing was made. The channel gets what it returns.
func (c *testCluster) beginInit(members ...uint64) (ended chan error) {
	ended = make(chan error, 1)
	founder := c.nodes[members[0]]
	req := &kvpb.InitRequest{Members: c.proto(members...)}
	go func() {
		_, err := founder.Init(c.ctx, req)
		for reasonOf(err) == "UNREACHABLE" && founder.server.n.status.latest.Load().clusterID == 0 && c.ctx.Err() == nil {
			_, err = founder.Init(c.ctx, req)
		}
		ended <- err
	}()
	return ended
}

// initAgain calls a node's Init until no member is unreachable to it any more, as one may be for a
// moment on a busy machine: the same Init carries on.
func (n *testNode) initAgain(ctx context.Context, req *kvpb.InitRequest) error {
	_, err := n.Init(ctx, req)
	for reasonOf(err) == "UNREACHABLE" && ctx.Err() == nil {
		_, err = n.Init(ctx, req)
	}
	return err
}

// joins waits until a node is in a cluster.
func (c *testCluster) joins(id uint64) {
	c.t.Helper()
	eventually(c.t, func() error {
		if c.clusterOf(id) == 0 {
			return fmt.Errorf("node %d is in no cluster", id)
		}
		return nil
	})
}

// failHalfway has an Init of nodes 1, 2 and 3 fail when nodes 1 and 2 are in a cluster,
// since node 3 has ended. It returns node 3's address, and the error.
func (c *testCluster) failHalfway() (address string, failed error) {
	c.t.Helper()
	node3 := c.nodes[3]
	held, fail := c.failWhen(3, hasClaim)
	ended := c.beginInit(1, 2, 3)
	<-held
	c.joins(2)
	fail()
	<-node3.ended
	_ = node3.conn.Close()
	delete(c.nodes, 3)
	failed = <-ended
	wantError(c.t, failed, codes.Unavailable, "UNREACHABLE")
	return node3.address, failed
}

// TestInitAgain: an Init that is true already succeeds, wherever it is called; one of
// other members is refused, and names the cluster.
func TestInitAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.init(1, 2, 3)
	want := c.clusterOf(1)
	again := func(id uint64) {
		t.Helper()
		c.done(func() error {
			resp, err := c.nodes[id].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(3, 1, 2)})
			if err == nil && resp.ClusterId != want {
				t.Errorf("through node %d: cluster %x, want %x", id, resp.ClusterId, want)
			}
			return err
		})
	}
	for id := uint64(1); id <= 3; id++ {
		again(id)
	}
	refused := func(via uint64, members ...uint64) {
		t.Helper()
		_, err := c.nodes[via].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(members...)})
		wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
		wantPart(t, err.Error(), hex(want))
	}
	refused(1, 1)
	refused(1, 1, 2)
	refused(1, 1, 2, 3, 4)
	refused(4, 4, 1)
	refused(4, 1, 2, 3, 4)
	c.uninitialized(4)

	c.stop(3) // the others are enough to know
	members := append(c.proto(1, 2), &kvpb.Node{Id: 3, Address: deadAddress(t)})
	_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: members})
	wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
	c.works(1, 2)
}

// TestInitOfRestarted: a member in memory that has restarted founds no second
// cluster, whatever it is told before the leader has taken it back. An Init of the
// voters that there are succeeds.
func TestInitOfRestarted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, func(o *options) { o.redial = 0 }) // as it is
	c.init(1, 2, 3)
	want := c.clusterOf(1)
	for round := range 6 {
		id := 1 + uint64(round)%3
		c.restart(id)
		if round < 3 {
			_, err := c.nodes[id].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(id)})
			wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
			wantPart(t, err.Error(), hex(want))
		} else {
			c.done(func() error {
				resp, err := c.nodes[id].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
				if err == nil && resp.ClusterId != want {
					t.Errorf("node %d is in cluster %x, and was in %x", id, resp.ClusterId, want)
				}
				return err
			})
		}
		c.settled(1, 2, 3)
		if got := c.clusterOf(id); got != want {
			t.Fatalf("node %d is in cluster %x, and was in %x", id, got, want)
		}
	}
}

// TestInitEverywhere sends an Init of the same members to all of them at once: there
// is one cluster, and all answers have its id.
func TestInitEverywhere(t *testing.T) {
	t.Parallel()
	for round := range times(3) {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			c := newCluster(t, 3)
			members := c.proto(1, 2, 3)
			var mu sync.Mutex
			made := map[uint64]bool{}
			var calls sync.WaitGroup
			for id := range c.nodes {
				calls.Go(func() {
					c.done(func() error {
						resp, err := c.nodes[id].Init(c.ctx, &kvpb.InitRequest{Members: members})
						mu.Lock()
						defer mu.Unlock()
						if err == nil {
							made[resp.ClusterId] = true
						}
						return err
					})
				})
			}
			calls.Wait()
			for id := range c.nodes {
				made[c.clusterOf(id)] = true
			}
			if len(made) != 1 {
				t.Errorf("there are %d clusters", len(made))
			}
			c.settled(1, 2, 3)
		})
	}
}

// TestInitSurveyTakesTime: of the members that an Init asks, one answers before
// another Init has made the cluster and one after it has joined it. It is no refusal.
func TestInitSurveyTakesTime(t *testing.T) {
	t.Parallel()
	for round := range times(3) {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			c := newCluster(t, 3)
			members := c.proto(1, 2, 3)
			slow := c.proto(3, 2)
			node2 := c.nodes[2].server.n
			asked := make(chan struct{})
			ask := sync.OnceFunc(func() { close(asked) })
			c.wires.mu.Lock()
			c.wires.dials = func(ctx context.Context, from, to string) {
				if from != slow[0].Address || to != slow[1].Address {
					return
				}
				ask()
				for ctx.Err() == nil && node2.status.latest.Load().clusterID == 0 {
					sleep(ctx, time.Millisecond)
				}
			}
			c.wires.mu.Unlock()
			var calls sync.WaitGroup
			for _, id := range []uint64{3, 1} {
				calls.Go(func() {
					c.done(func() error {
						_, err := c.nodes[id].Init(c.ctx, &kvpb.InitRequest{Members: members})
						return err
					})
				})
				<-asked
			}
			calls.Wait()
			c.settled(1, 2, 3)
		})
	}
}

// TestInitsOfOtherMembers sends Inits of lists that overlap to their first members
// at once: no two lists that name each other's founder make a cluster, one does, and
// whoever is refused is told of that.
func TestInitsOfOtherMembers(t *testing.T) {
	t.Parallel()
	for round := range times(2) {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			c := newCluster(t, 4)
			lists := [][]uint64{{1, 2, 3}, {2, 1, 4}, {3, 2, 1, 4}, {4, 3, 2, 1}}
			errs := make([]error, len(lists))
			var calls sync.WaitGroup
			for i, list := range lists {
				calls.Go(func() {
					req := &kvpb.InitRequest{Members: c.proto(list...)}
					errs[i] = c.nodes[list[0]].initAgain(c.ctx, req)
				})
			}
			calls.Wait()
			clusters := map[uint64]bool{}
			for id := range c.nodes {
				if in := c.clusterOf(id); in != 0 {
					clusters[in] = true
				}
			}
			if len(clusters) != 1 {
				t.Errorf("there are %d clusters: %v", len(clusters), errs)
			}
			for i, err := range errs {
				if err != nil && reasonOf(err) != "ALREADY_INITIALIZED" {
					t.Errorf("Init of %v: %v", lists[i], err)
				}
			}
		})
	}
}

// TestInitCarriesOn: an Init that failed half way says what it has done, and the same
// one carries on, called at the founder or at another member.
func TestInitCarriesOn(t *testing.T) {
	t.Parallel()
	for _, via := range []uint64{1, 2} {
		t.Run(fmt.Sprint(via), func(t *testing.T) {
			c := newCluster(t, 3)
			members := c.proto(1, 2, 3)
			address, err := c.failHalfway()
			wantPart(t, err.Error(), fmt.Sprintf("cluster %s was made, but: node 3 at %s ", hex(c.clusterOf(1)), address))
			// The founder's next question to it may be the first to meet the failure.
			saysCause := strings.Contains(err.Error(), "the test has ended it")
			saysSilent := strings.Contains(err.Error(), "does not answer")
			if !saysCause && !saysSilent {
				t.Errorf("%q does not say what has become of node 3", err)
			}
			wantPart(t, err.Error(), "change-membership 1 2 3; or the same init")
			resp, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: members[:2]})
			if reasonOf(err) != "ALREADY_INITIALIZED" {
				t.Errorf("an Init of other members at the founder: %v, %v", resp, err)
			}
			c.start(3, address)
			c.done(func() error {
				resp, err := c.nodes[via].Init(c.ctx, &kvpb.InitRequest{Members: members})
				if err == nil && resp.ClusterId != c.clusterOf(1) {
					t.Errorf("cluster %x", resp.ClusterId)
				}
				return err
			})
			c.settled(1, 2, 3)
			c.works(1, 2, 3)
			c.inLoop(1, func(n *node) error {
				if n.store.founding != nil {
					t.Error("the founder still carries on")
				}
				return nil
			})
		})
	}
}

// TestInitOutlivesItsFounder: an Init that failed half way is carried on with after the
// founder has started again, called at any member: they all know of it, from their disks.
func TestInitOutlivesItsFounder(t *testing.T) {
	t.Parallel()
	c, _ := newDurable(t, 3)
	members := c.proto(1, 2, 3)
	address, _ := c.failHalfway()
	for _, id := range []uint64{1, 2} {
		c.killed(id)
	}
	cluster := c.clusterOf(1)
	c.start(3, address)
	c.done(func() error {
		resp, err := c.nodes[2].Init(c.ctx, &kvpb.InitRequest{Members: members})
		if err == nil && resp.ClusterId != cluster {
			t.Errorf("cluster %x, want %x", resp.ClusterId, cluster)
		}
		return err
	})
	c.settled(1, 2, 3)
	for id := range c.nodes {
		c.inLoop(id, func(n *node) error {
			if n.store.founding != nil {
				t.Errorf("node %d takes the Init for unfinished", id)
			}
			return nil
		})
	}
}

// TestFoundingEnds: what ends an Init that is half way, and what does not.
func TestFoundingEnds(t *testing.T) {
	t.Parallel()
	members := []*kvpb.Node{plainNode(1), plainNode(2), plainNode(3)}
	node := func(id uint64) *kvpb.Member { return &kvpb.Member{RaftId: id, Node: plainNode(id)} }
	begin := func() *store {
		s := newStore()
		s.founding = members
		s.configure(&raftpb.ConfState{Voters: []uint64{1}}, []*kvpb.Member{node(1)})
		s.configure(&raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{2}}, []*kvpb.Member{node(2)})
		return s
	}
	if s := begin(); !s.carriesOn(members) || s.carriesOn(members[:2]) {
		t.Error("it has ended before all are added")
	}
	reborn := &kvpb.Member{RaftId: 12, Node: plainNode(2)}
	s := begin()
	s.configure(&raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{12}}, []*kvpb.Member{reborn})
	if !s.carriesOn(members) {
		t.Error("it has ended when a member came back without its memory")
	}
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 12, 3}, VotersOutgoing: []uint64{1}}, []*kvpb.Member{node(3)})
	if !s.carriesOn(members) {
		t.Error("it has ended when its own change was half way")
	}
	for name, conf := range map[string]*raftpb.ConfState{
		"all vote":                       {Voters: []uint64{1, 2, 3}},
		"an operator has made one voter": {Voters: []uint64{1, 2}},
		"an operator has removed one":    {Voters: []uint64{1}},
		"an operator has added another":  {Voters: []uint64{1}, Learners: []uint64{2, 4}},
	} {
		s := begin()
		s.configure(conf, []*kvpb.Member{node(3), node(4)})
		if s.carriesOn(members) {
			t.Errorf("%s, and it goes on", name)
		}
	}
	alone := newStore()
	alone.founding = members[:1]
	alone.configure(&raftpb.ConfState{Voters: []uint64{1}}, []*kvpb.Member{node(1)})
	if alone.founding != nil {
		t.Error("there is nobody to add, and it goes on")
	}
}

// TestInitRemovesNobody: an Init undoes nothing that an operator has done, neither if it
// is repeated after that, nor if it was running. It says that there are other voters.
func TestInitRemovesNobody(t *testing.T) {
	t.Parallel()
	refused := func(t *testing.T, c *testCluster, err error) {
		t.Helper()
		wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
		wantPart(t, fmt.Sprint(err), "4="+c.nodes[4].address)
		c.settled(1, 2, 3, 4)
		c.works(1, 2, 3, 4)
	}
	for name, promote := range map[string]bool{"who votes": true, "who is a learner": false} {
		t.Run("repeated after the others were added by hand, and one more "+name, func(t *testing.T) {
			c := newCluster(t, 4)
			address, _ := c.failHalfway()
			c.start(3, address)
			c.addLearner(1, 4)
			if !promote { // the list is not carried on with, either
				_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
				wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
			}
			c.addLearner(1, 3)
			c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
			c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{4}})
			_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
			refused(t, c, err)
		})
	}
	t.Run("repeated after a member was demoted", func(t *testing.T) {
		c := newCluster(t, 3)
		address, _ := c.failHalfway()
		c.start(3, address)
		c.addLearner(1, 3)
		c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{2, 3}})
		c.change(1, &kvpb.ChangeMembershipRequest{Demote: []uint64{3}})
		_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
		wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
	})
	t.Run("running", func(t *testing.T) {
		c := newCluster(t, 4)
		held, release := c.holdWhen(3, hasClaim)
		ended := c.beginInit(1, 2, 3)
		<-held
		c.joins(2)
		c.addLearner(1, 4)
		c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{4}})
		release()
		wantError(t, <-ended, codes.FailedPrecondition, "ALREADY_INITIALIZED")
		c.wantVoters([]uint64{1, 4}, 1, 4)
	})
	t.Run("running, when a member was removed", func(t *testing.T) {
		c := newCluster(t, 3)
		held, release := c.holdWhen(3, hasClaim)
		ended := c.beginInit(1, 2, 3)
		<-held
		c.inLoop(1, func(n *node) error {
			if len(n.store.raftIDsOf(3)) == 0 {
				return errors.New("it has not added node 3")
			}
			return nil
		})
		c.change(1, &kvpb.ChangeMembershipRequest{Remove: []uint64{3}})
		release()
		wantError(t, <-ended, codes.FailedPrecondition, "ALREADY_INITIALIZED")
		c.inLoop(1, func(n *node) error {
			if len(n.store.raftIDsOf(3)) > 0 {
				t.Error("it has added node 3 again")
			}
			return nil
		})
	})
	t.Run("running, when a member was demoted", func(t *testing.T) {
		c := newCluster(t, 3)
		held, release := c.holdWhen(3, hasClaim)
		ended := c.beginInit(1, 2, 3)
		<-held
		c.joins(2)
		c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{2}})
		c.change(1, &kvpb.ChangeMembershipRequest{Demote: []uint64{2}})
		release()
		wantError(t, <-ended, codes.FailedPrecondition, "ALREADY_INITIALIZED")
		c.wantVoters([]uint64{1}, 1, 2)
	})
}

// wantVoters waits until these nodes know these voters, and no change is half way.
func (c *testCluster) wantVoters(voters []uint64, ids ...uint64) {
	c.t.Helper()
	for _, id := range ids {
		eventually(c.t, func() error {
			m, err := c.metrics(id)
			if v, _ := membersOf(m); err == nil && (m.Joint || !slices.Equal(v, voters)) {
				err = fmt.Errorf("node %d: voters %v, joint %v", id, v, m.Joint)
			}
			return err
		})
	}
}

// TestInitsShareConnections: however many Inits run at a node, of however many members
// that do not answer, they leave connections to others. Who waits says for what.
func TestInitsShareConnections(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1)
	var silent []*kvpb.Node
	isSilent := map[string]bool{}
	for id := uint64(4); id <= maxMembers; id++ {
		m := &kvpb.Node{Id: id, Address: fmt.Sprintf("127.0.0.1:%d", id)}
		silent = append(silent, m)
		isSilent[m.Address] = true
	}
	var mu sync.Mutex
	called := map[string]map[string]int{} // tries to connect, by caller and member
	most := map[string]int{}              // members that a caller calls at a time
	c.wires.mu.Lock()
	c.wires.dials = func(ctx context.Context, from, to string) {
		if !isSilent[to] {
			return
		}
		mu.Lock()
		if called[from] == nil {
			called[from] = map[string]int{}
		}
		called[from][to]++
		most[from] = max(most[from], len(called[from]))
		mu.Unlock()
		<-ctx.Done()
		mu.Lock()
		defer mu.Unlock()
		called[from][to]--
		if called[from][to] == 0 {
			delete(called[from], to)
		}
	}
	c.wires.mu.Unlock()

	ctx, cancel := context.WithCancel(c.ctx)
	var inits sync.WaitGroup
	defer inits.Wait()
	defer cancel()
	for _, via := range []uint64{1, 3} {
		for range 2 * maxAsking {
			inits.Go(func() {
				_, _ = c.nodes[via].Init(ctx, &kvpb.InitRequest{Members: append(c.proto(via), silent...), Force: true})
			})
		}
	}
	eventually(t, func() error {
		mu.Lock()
		defer mu.Unlock()
		if most[c.nodes[1].address] == 0 || most[c.nodes[3].address] == 0 {
			return errors.New("no Init has called a member")
		}
		return nil
	})
	c.addLearner(1, 2)
	eventually(t, func() error {
		if len(c.nodes[3].server.net.callPlaces) == 0 {
			return errors.New("an Init calls a member without a place")
		}
		return nil
	})
	var err error
	eventually(t, func() error { // on a busy machine even the answer may be late
		short, stop := context.WithTimeout(c.ctx, time.Second)
		defer stop()
		_, err = c.nodes[3].Init(short, &kvpb.InitRequest{Members: c.proto(3), Force: true})
		if reasonOf(err) == "" {
			return fmt.Errorf("no node's answer, but %v", err)
		}
		return nil
	})
	wantError(t, err, codes.Aborted, "INIT_IN_PROGRESS")
	wantPart(t, fmt.Sprint(err), "other inits were running at node 3")
	mu.Lock()
	for from, n := range most {
		if n > 2*maxSurveying { // what is closed may end a little later
			t.Errorf("%s made %d connections at a time, the limit is %d", from, n, maxSurveying)
		}
	}
	mu.Unlock()
	cancel()
	inits.Wait()
	eventually(t, func() error {
		for id, n := range c.nodes {
			if places := len(n.server.net.callPlaces) + len(n.server.surveying); places > 0 {
				return fmt.Errorf("node %d: %d places are not given back", id, places)
			}
		}
		return nil
	})
}

// TestInitOfMany: a founder that has more members to add than it may have connections
// keeps to that, and adds them.
func TestInitOfMany(t *testing.T) {
	t.Parallel()
	const size = maxWatching + 3
	c := newCluster(t, size)
	ids := make([]uint64, size)
	for i := range ids {
		ids[i] = uint64(i) + 1
	}
	held, release := c.holdWhen(2, hasClaim) // the first to be added
	ended := c.beginInit(ids...)
	<-held
	asking := c.nodes[1].server.net.callPlaces
	most := 0
	for _, id := range ids[2:] {
		n := c.nodes[id].server.n
		eventually(t, func() error {
			most = max(most, len(asking))
			return n.do(c.ctx, func() error {
				if !hasClaim(n) || n.claims.current.clusterID == 0 {
					return fmt.Errorf("the claim of node %d is not kept", id)
				}
				return nil
			})
		})
	}
	release()
	eventually(t, func() error {
		most = max(most, len(asking))
		select {
		case err := <-ended:
			if err != nil && reasonOf(err) != "UNREACHABLE" { // on a busy machine
				t.Error(err)
			}
			return nil
		default:
			return errors.New("Init has not ended")
		}
	})
	if limit := maxWatching + 2; most > limit { // one is to itself, and one asks who is to be added
		t.Errorf("it had %d connections at a time, the limit is %d", most, limit)
	}
	c.init(ids...) // carries on, if it has not done all
	if len(asking)+len(c.nodes[1].server.adding) > 0 {
		t.Error("places are not given back")
	}
}

// TestWithdrawalsReachFarMembers: a connection that takes several round trips of 300 ms is given
// the time.
func TestWithdrawalsReachFarMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.wires.mu.Lock()
	c.wires.dials = func(ctx context.Context, _, _ string) { sleep(ctx, 600*time.Millisecond) }
	c.wires.mu.Unlock()
	others := &kvpb.ClaimRequest{Id: 7, Founder: &kvpb.Peer{Node: plainNode(9), RaftId: 9, Life: 9}, Force: true}
	c.inLoop(3, func(n *node) error { n.answerClaim(others); return nil })
	f := newFounder(c.nodes[1].server, &kvpb.InitRequest{Members: c.proto(1, 2, 3), Force: true})
	try, err := f.newTry(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if result := f.claimAndFound(c.ctx, try); result.outcome == initDone {
		t.Fatal("a member is claimed by another, and there is a cluster")
	}
	c.inLoop(2, func(n *node) error {
		if n.currentClaim() != nil {
			t.Error("it is still claimed")
		}
		return nil
	})
}

// TestInitForceIsExplained: help says all that --force leaves out.
func TestInitForceIsExplained(t *testing.T) {
	help, _ := runCommand(t, 0, "", "help", "init")
	wantPart(t, help, "a cluster has just called a member")
	wantPart(t, help, "do not wait for members that have just started")
}

// TestInitGivesClaimsBack: a founder that cannot have all claims has none in the end.
func TestInitGivesClaimsBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	others := &kvpb.ClaimRequest{Id: 7, Founder: &kvpb.Peer{Node: plainNode(9), RaftId: 9, Life: 9}, Force: true}
	c.inLoop(3, func(n *node) error {
		n.answerClaim(others)
		return nil
	})
	f := newFounder(c.nodes[1].server, &kvpb.InitRequest{Members: c.proto(1, 2, 3), Force: true})
	try, err := f.newTry(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	founded := f.claimAndFound(c.ctx, try)
	if founded.outcome != initWaiting || founded.clusterID != 0 {
		t.Errorf("%+v", founded)
	}
	wantError(t, founded.err, codes.Aborted, "INIT_IN_PROGRESS")
	for id := uint64(1); id <= 3; id++ {
		n := c.nodes[id].server.n
		want := uint64(0)
		if id == 3 {
			want = 9
		}
		got := uint64(0)
		err := n.do(c.ctx, func() error { // withdraw has been answered
			if c := n.currentClaim(); c != nil {
				got = c.founder.RaftId
			}
			return nil
		})
		if err != nil || got != want {
			t.Errorf("node %d is claimed by %x, want %x: %v", id, got, want, err)
		}
	}
	eventually(t, func() error { // on a busy machine even the answer may be late
		ctx, cancel := context.WithTimeout(c.ctx, time.Second)
		defer cancel()
		_, err = c.nodes[1].Init(ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
		if reasonOf(err) == "" {
			return fmt.Errorf("no node's answer, but %v", err)
		}
		return nil
	})
	wantError(t, err, codes.Aborted, "INIT_IN_PROGRESS")
	wantPart(t, err.Error(), "node 3 at "+c.nodes[3].address+" is claimed by another init, at node 9")
}

// judged is a surveyOutcome, with reasons in place of errors.
type judged struct {
	member    uint64
	refusal   string
	byCluster bool
	waitsFor  string
	claimAll  bool
}

// TestInitJudges: what the answers of the members to a survey come to.
func TestInitJudges(t *testing.T) {
	const (
		exists = "ALREADY_INITIALIZED"
		wait   = "INIT_IN_PROGRESS"
		late   = "DEADLINE"
	)
	members := []*kvpb.Node{plainNode(1), plainNode(2), plainNode(3)}
	answer := func(resp *kvpb.ClaimResponse) surveyAnswer { return surveyAnswer{resp: resp} }
	in := func(clusterID uint64, voters, founding []*kvpb.Node) surveyAnswer {
		return answer(&kvpb.ClaimResponse{
			Verdict:   kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER,
			ClusterId: clusterID,
			Voters:    voters,
			Members:   founding,
		})
	}
	free := answer(&kvpb.ClaimResponse{Verdict: claimGranted})
	fresh := answer(&kvpb.ClaimResponse{Verdict: claimFresh})
	claimed := answer(&kvpb.ClaimResponse{Verdict: claimRefused, By: plainNode(3)})
	named := answer(&kvpb.ClaimResponse{Verdict: claimNamed, By: plainNode(9), ClusterId: 9})
	silent := surveyAnswer{err: apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, "nobody")}
	refused := func(reason string) judged { return judged{refusal: reason, byCluster: reason == exists} }

	for name, tt := range map[string]struct {
		answers []surveyAnswer
		want    judged
	}{
		"all can be claimed": {[]surveyAnswer{free, free, free}, judged{claimAll: true}},
		"one is fresh":       {[]surveyAnswer{free, fresh, free}, judged{waitsFor: late}},
		"one is claimed":     {[]surveyAnswer{fresh, claimed, free}, judged{waitsFor: wait}},
		"one is named":       {[]surveyAnswer{fresh, named, free}, refused(exists)},
		"one is named, perhaps by the founder": {
			[]surveyAnswer{claimed, named, free}, judged{waitsFor: wait},
		},
		"one does not answer": {[]surveyAnswer{claimed, free, silent}, refused("UNREACHABLE")},
		"one is in a cluster": {[]surveyAnswer{free, in(9, members[1:], nil), silent}, refused(exists)},
		"the cluster is made": {[]surveyAnswer{named, in(9, members, nil), silent}, judged{member: 2}},
		"the cluster is being made": {
			[]surveyAnswer{in(9, members[1:2], nil), in(9, members[1:2], members), free}, judged{member: 2},
		},
		"a founder is better than another member": {
			[]surveyAnswer{in(9, members, nil), in(9, members, members), in(9, members, nil)}, judged{member: 2},
		},
		"another list is being made": {
			[]surveyAnswer{free, in(9, members[1:2], members[:2]), free}, refused(exists),
		},
		"there are two": {
			[]surveyAnswer{in(9, members, nil), in(8, members[1:2], nil), free}, refused(exists),
		},
	} {
		found := judgeSurvey(members, tt.answers)
		got := judged{
			member:    found.member.GetId(),
			refusal:   errorReason(found.refusal),
			byCluster: found.refusedByCluster,
			waitsFor:  errorReason(found.waitsFor),
		}
		got.claimAll = got == (judged{})
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
}

// TestInitDiskFails: if the disk of the founder fails, Init says so, names it, and
// says that no cluster was made; if that of another member fails, it names that one.
func TestInitDiskFails(t *testing.T) {
	t.Parallel()
	for _, broken := range []uint64{1, 2} {
		t.Run(fmt.Sprint(broken), func(t *testing.T) {
			c, dir := newDurable(t, 0, func(o *options) { o.logBytes = 1 << 20 })
			for id := uint64(1); id <= 3; id++ {
				c.start(id, "127.0.0.1:0")
			}
			if err := os.RemoveAll(dir(broken)); err != nil {
				t.Fatal(err)
			}
			n := c.nodes[broken]
			_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
			wantPart(t, err.Error(), fmt.Sprintf("node %d at %s", broken, n.address))
			wantPart(t, err.Error(), "no such file or directory")
			if broken == 1 {
				wantError(t, err, codes.Unavailable, "NODE_FAILED")
				wantPart(t, err.Error(), "could not make the cluster")
			} else {
				wantError(t, err, codes.Unavailable, "UNREACHABLE")
				wantPart(t, err.Error(), "was made, but")
			}
			if err := <-n.ended; err == nil {
				t.Error("the node has not failed")
			}
			_ = n.conn.Close()
			delete(c.nodes, broken)
			if broken == 1 {
				c.uninitialized(2, 3)
			}
		})
	}
}

// TestFound: a founder founds with its own claim, and while all claims are young.
func TestFound(t *testing.T) {
	me := &kvpb.Peer{Node: plainNode(1), RaftId: 1, Life: 1}
	members := []*kvpb.Node{plainNode(1), plainNode(2)}
	for name, tt := range map[string]struct {
		between func(*lone)
		founds  bool
	}{
		"at once":               {func(*lone) {}, true},
		"just in time":          {func(l *lone) { l.ticks(l.n.ticksOf(claimTime) / 2) }, true},
		"too late":              {func(l *lone) { l.ticks(l.n.ticksOf(claimTime)/2 + 1) }, false},
		"after a pause":         {func(l *lone) { l.n.clock.wall += l.n.ticksOf(claimTime) }, false},
		"its own claim is lost": {func(l *lone) { l.n.claims.withdraw(7) }, false},
		"in another life": {func(l *lone) {
			l.n.newLife()
			l.n.answerClaim(&kvpb.ClaimRequest{Id: 7, Founder: me, Members: members, Force: true})
		}, false},
		"it is another's": {func(l *lone) {
			l.n.claims.withdraw(7)
			l.n.answerClaim(&kvpb.ClaimRequest{Id: 8, Founder: &kvpb.Peer{Node: plainNode(2), RaftId: 2, Life: 2}})
		}, false},
	} {
		l := newLone(t, inNoCluster)
		l.ticks(l.n.ticksOf(l.n.redialTime()) + 1)
		try := &initTry{id: 7, begun: l.n.clock.wall, founder: me}
		l.n.answerClaim(&kvpb.ClaimRequest{Id: 7, Founder: me, Members: members})
		tt.between(l)
		id, err := l.n.foundCluster(try, members)
		if err != nil || (id != 0) != tt.founds || (l.n.store.clusterID != 0) != tt.founds {
			t.Errorf("%s: cluster %x, %v", name, id, err)
		}
	}
}

// TestClockInit: an Init of fresh nodes waits as long as a cluster might need to call
// them, unless it is forced; and such a call refuses it.
func TestClockInit(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		want := b.clusterOf(1)
		b.boot(4)
		b.boot(5)
		redial := b.nodes[4].server.n.redialTime()
		initAlone := func(id uint64, force bool) (time.Duration, error) {
			start := time.Now()
			members := []*kvpb.Node{{Id: id, Address: addressIn(id)}}
			_, err := b.nodes[id].Init(b.ctx, &kvpb.InitRequest{Members: members, Force: force})
			return time.Since(start), err
		}
		took, err := initAlone(4, true)
		if err != nil {
			t.Error(err)
		}
		between(t, "an Init by force", took, 0, redial/2)
		took, err = initAlone(5, false)
		if err != nil {
			t.Error(err)
		}
		between(t, "an Init", took, redial/2, redial+time.Second)
		for range times(5) {
			b.do(2, cut)
			b.stop(2)
			time.Sleep(time.Duration(rand.IntN(20_000)) * time.Millisecond)
			b.boot(2)
			b.do(2, whole)
			_, err := initAlone(2, false)
			wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
			wantPart(t, err.Error(), hex(want))
			b.settled(1, 2, 3)
		}
	})
}

// TestInitNamed: a hello of a cluster that names a node keeps an Init from it, and
// force does not.
func TestInitNamed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, func(o *options) { o.redial = time.Minute })
	h, err := stranger(c.nodes[2])
	if err != nil {
		t.Fatal(err)
	}
	h.ClusterId = 77
	h.To.RaftId++ // of a life before
	if _, err := greetNode(c.nodes[2], h); err != nil {
		t.Fatal(err)
	}
	_, err = c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2)})
	wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
	wantPart(t, err.Error(), "cluster "+hex(77)+" calls node 2")
	c.done(func() error {
		_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2), Force: true})
		return err
	})
	c.settled(1, 2)
}

func TestInitThree(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	var resp *kvpb.InitResponse
	c.done(func() (err error) {
		resp, err = c.nodes[2].Init(t.Context(), &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
		return err
	})
	c.settled(1, 2, 3)
	for id := range c.nodes {
		if m, err := c.metrics(id); err != nil || m.ClusterId != resp.ClusterId {
			t.Errorf("node %d: %v, %v; want cluster %x", id, m, err, resp.ClusterId)
		}
	}
	c.works(1, 2, 3)
	c.sameStates(1, 2, 3)
}

func TestInitRefusals(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.init(4)
	n := func(id uint64, address string) *kvpb.Node { return &kvpb.Node{Id: id, Address: address} }
	me, other := c.proto(1)[0], c.proto(2)[0]
	for _, tt := range []struct {
		name    string
		members []*kvpb.Node
		code    codes.Code
		reason  string
	}{
		{"nobody", nil, codes.InvalidArgument, "INVALID_FIELD"},
		{"id 0", []*kvpb.Node{me, n(0, other.Address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"no address", []*kvpb.Node{me, n(2, "")}, codes.InvalidArgument, "INVALID_FIELD"},
		{"without the called node", []*kvpb.Node{other}, codes.InvalidArgument, "INVALID_FIELD"},
		{"the called node by another id", []*kvpb.Node{n(5, me.Address), other}, codes.InvalidArgument, "INVALID_FIELD"},
		{"the called node at another address", []*kvpb.Node{n(1, other.Address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"an id twice", []*kvpb.Node{me, other, n(2, c.nodes[3].address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"an address twice", []*kvpb.Node{me, other, n(3, other.Address)}, codes.InvalidArgument, "INVALID_FIELD"},
		{"unreachable", []*kvpb.Node{me, other, n(3, deadAddress(t))}, codes.Unavailable, "UNREACHABLE"},
		{"another id there", []*kvpb.Node{me, other, n(5, c.nodes[3].address)}, codes.FailedPrecondition, "WRONG_NODE"},
		{"in a cluster already", []*kvpb.Node{me, other, c.proto(4)[0]}, codes.FailedPrecondition, "ALREADY_INITIALIZED"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: tt.members})
			wantError(t, err, tt.code, tt.reason)
			c.uninitialized(1, 2, 3)
		})
	}
	before := c.picture(4)
	_, err := c.nodes[4].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(4, 1)})
	wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
	if _, err := c.nodes[4].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(4)}); err != nil {
		t.Errorf("an Init that is true already: %v", err)
	}
	if c.picture(4) != before {
		t.Error("the second Init has changed something")
	}
	c.init(1, 2, 3) // nothing is left of the attempts
	c.works(1, 2, 3)
}

func TestTwoInitsAtOnce(t *testing.T) {
	t.Parallel()
	// In each order the two meet at another point.
	for _, orders := range [][2][]uint64{{{1, 2, 3}, {2, 1, 3}}, {{1, 3, 2}, {2, 3, 1}}} {
		t.Run(fmt.Sprint(orders), func(t *testing.T) {
			c := newCluster(t, 3)
			ctx, cancel := context.WithCancel(c.ctx)
			defer cancel()
			ended := make(chan error, 2)
			for _, order := range orders {
				go func() {
					req := &kvpb.InitRequest{Members: c.proto(order...)}
					err := c.nodes[order[0]].initAgain(ctx, req)
					if err != nil && reasonOf(err) != "ALREADY_INITIALIZED" && status.Code(err) != codes.Canceled {
						t.Errorf("Init through node %d: %v", order[0], err)
					}
					ended <- err
				}()
			}
			for range 2 {
				select {
				case <-ended:
				case <-time.After(pollDeadline): // for a node that is in the other's cluster
					t.Error("one of them waits")
					cancel()
				}
			}

			// Nobody whom a cluster names is on its way to it any more, or in another.
			clusters := map[uint64]uint64{}
			eventually(t, func() error {
				ms := map[uint64]*kvpb.MetricsResponse{}
				for id := range c.nodes {
					m, err := c.metrics(id)
					if err != nil {
						return err
					}
					ms[id], clusters[id] = m, m.ClusterId
				}
				for id, m := range ms {
					if m.ClusterId != 0 && !m.Healthy {
						return fmt.Errorf("node %d: %s", id, m.UnhealthyReason)
					}
					for _, member := range m.Members {
						if clusters[member.Node.Id] == 0 {
							return fmt.Errorf("node %d is to join node %d", member.Node.Id, id)
						}
						if in := clusters[member.Node.Id]; in != m.ClusterId {
							if member.GetProgress().GetCaughtUp() {
								t.Fatalf("node %d, of cluster %x, counts on node %d, of cluster %x", id, m.ClusterId, member.Node.Id, in)
							}
							return fmt.Errorf("node %d, of cluster %x, names node %d, of cluster %x", id, m.ClusterId, member.Node.Id, in)
						}
					}
				}
				if clusters[1] == 0 && clusters[2] == 0 {
					t.Fatal("nobody has made a cluster")
				}
				return nil
			})
			// What one writes, exactly the members of its cluster see.
			for writer, cluster := range clusters {
				if cluster == 0 {
					continue
				}
				key := fmt.Sprint("written through ", writer)
				version := c.set(writer, key, "v")
				for reader, other := range clusters {
					if other == cluster {
						c.wants(reader, false, key, "v", version)
					} else if other != 0 {
						c.wantsAbsent(reader, key)
					}
				}
			}
			for id, cluster := range clusters {
				if m, err := c.metrics(id); err != nil || m.ClusterId != cluster {
					t.Errorf("node %d was in cluster %x: %v, %v", id, cluster, m, err)
				}
			}
		})
	}
}
