// Tests of init.go: how a cluster is made, and that there are never two.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

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
	wait := &condition{ctx: c.ctx, done: make(chan error, 1), f: func() (bool, error) {
		if !cond(n) {
			return false, nil
		}
		close(held)
		<-goOn
		return true, nil
	}}
	n.in.event(func() { n.calls.conditions = append(n.calls.conditions, wait) })
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
		n.in.event(func() { n.err = errors.New("the test has ended it") }) // before what else waits
		release()
	}
}

// holdOnceClaimed keeps a node busy once it has answered a claim.
func (c *testCluster) holdOnceClaimed(id uint64) (release func()) {
	c.t.Helper()
	_, release = c.holdWhen(id, func(n *node) bool { return n.claims.current != nil })
	return release
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
			members, slow, node2 := c.proto(1, 2, 3), c.proto(3, 2), c.nodes[2].server.n
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
					_, errs[i] = c.nodes[list[0]].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(list...)})
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
			address := c.nodes[3].address
			held, fail := c.failWhen(3, func(n *node) bool { return n.claims.current != nil })
			ended := make(chan error, 1)
			go func() {
				_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: members})
				ended <- err
			}()
			<-held
			eventually(t, func() error {
				if c.clusterOf(2) == 0 {
					return fmt.Errorf("node 2 is in no cluster")
				}
				return nil
			})
			failed := c.nodes[3]
			fail()
			<-failed.ended
			_ = failed.conn.Close()
			delete(c.nodes, 3)
			err := <-ended
			wantError(t, err, codes.Unavailable, "UNREACHABLE")
			wantPart(t, err.Error(), fmt.Sprintf("cluster %s was made, but: node 3 at %s ", hex(c.clusterOf(1)), address))
			// The founder's next question to it may be the first to meet the failure.
			if s := err.Error(); !strings.Contains(s, "the test has ended it") && !strings.Contains(s, "does not answer") {
				t.Errorf("%q does not say what has become of node 3", s)
			}
			wantPart(t, err.Error(), "change-membership 1 2 3; or the same init")
			if resp, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: members[:2]}); reasonOf(err) != "ALREADY_INITIALIZED" {
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
				if n.claims.founding != nil {
					t.Error("the founder still carries on")
				}
				return nil
			})
		})
	}
}

// failedHalfWay has an Init of nodes 1, 2 and 3 fail when nodes 1 and 2 are in a cluster,
// and starts node 3 again.
func (c *testCluster) failedHalfWay() {
	c.t.Helper()
	address := c.nodes[3].address
	held, fail := c.failWhen(3, func(n *node) bool { return n.claims.current != nil })
	ended := make(chan error, 1)
	go func() {
		_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
		ended <- err
	}()
	<-held
	eventually(c.t, func() error {
		if c.clusterOf(2) == 0 {
			return fmt.Errorf("node 2 is in no cluster")
		}
		return nil
	})
	failed := c.nodes[3]
	fail()
	<-failed.ended
	_ = failed.conn.Close()
	delete(c.nodes, 3)
	wantError(c.t, <-ended, codes.Unavailable, "UNREACHABLE")
	c.start(3, address)
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
			c.failedHalfWay()
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
		c.failedHalfWay()
		c.addLearner(1, 3)
		c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{2, 3}})
		c.change(1, &kvpb.ChangeMembershipRequest{Demote: []uint64{3}})
		_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
		wantError(t, err, codes.FailedPrecondition, "ALREADY_INITIALIZED")
	})
	t.Run("running", func(t *testing.T) {
		c := newCluster(t, 4)
		held, release := c.holdWhen(3, func(n *node) bool { return n.claims.current != nil })
		ended := make(chan error, 1)
		go func() {
			_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
			ended <- err
		}()
		<-held
		eventually(t, func() error {
			if c.clusterOf(2) == 0 {
				return fmt.Errorf("node 2 is in no cluster")
			}
			return nil
		})
		c.addLearner(1, 4)
		c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{4}})
		release()
		refused(t, c, <-ended)
	})
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
		if called[from][to]--; called[from][to] == 0 {
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
	members := c.proto(ids...)
	held, release := c.holdWhen(2, func(n *node) bool { return n.claims.current != nil }) // the first to be added
	ended := make(chan error, 1)
	go func() {
		_, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: members})
		ended <- err
	}()
	<-held
	asking := c.nodes[1].server.net.callPlaces
	most := 0
	for _, id := range ids[2:] {
		n := c.nodes[id].server.n
		eventually(t, func() error {
			most = max(most, len(asking))
			kept := false
			err := n.do(c.ctx, func() error { kept = n.claims.current != nil && n.claims.current.clusterID != 0; return nil })
			if !kept {
				return cmp.Or(err, fmt.Errorf("the claim of node %d is not kept", id))
			}
			return nil
		})
	}
	release()
	eventually(t, func() error {
		most = max(most, len(asking))
		select {
		case err := <-ended:
			if err != nil {
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
	c.settled(ids...)
	if len(asking)+len(c.nodes[1].server.adding) > 0 {
		t.Error("places are not given back")
	}
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
	c.inLoop(3, func(n *node) error { n.answerClaim(others); return nil })
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
		if err := n.do(c.ctx, func() error { // withdraw has been answered
			got := uint64(0)
			if c := n.currentClaim(); c != nil {
				got = c.founder.RaftId
			}
			if got != want {
				t.Errorf("node %d is claimed by %x, want %x", id, got, want)
			}
			return nil
		}); err != nil {
			t.Error(err)
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

// TestInitJudges: what the answers of the members to a survey come to.
func TestInitJudges(t *testing.T) {
	members := []*kvpb.Node{plainNode(1), plainNode(2), plainNode(3)}
	free := surveyAnswer{resp: &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED}}
	fresh := surveyAnswer{resp: &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH}}
	claimed := surveyAnswer{resp: &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_CLAIMED, By: plainNode(3)}}
	named := surveyAnswer{resp: &kvpb.ClaimResponse{Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED, By: plainNode(9), ClusterId: 9}}
	in := func(clusterID uint64, voters, founding []*kvpb.Node) surveyAnswer {
		return surveyAnswer{resp: &kvpb.ClaimResponse{
			Verdict: kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER, ClusterId: clusterID, Voters: voters, Members: founding,
		}}
	}
	silent := surveyAnswer{err: apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, "nobody")}
	const exists, wait, late = "ALREADY_INITIALIZED", "INIT_IN_PROGRESS", "DEADLINE"
	for name, tt := range map[string]struct {
		answers             []surveyAnswer
		made                uint64
		refusal, waitsFor   string
		byCluster, claimAll bool
	}{
		"all can be claimed":                   {answers: []surveyAnswer{free, free, free}, claimAll: true},
		"one is fresh":                         {answers: []surveyAnswer{free, fresh, free}, waitsFor: late},
		"one is claimed":                       {answers: []surveyAnswer{fresh, claimed, free}, waitsFor: wait},
		"one is named":                         {answers: []surveyAnswer{fresh, named, free}, refusal: exists, byCluster: true},
		"one is named, perhaps by the founder": {answers: []surveyAnswer{claimed, named, free}, waitsFor: wait},
		"one does not answer":                  {answers: []surveyAnswer{claimed, free, silent}, refusal: "UNREACHABLE"},
		"one is in a cluster":                  {answers: []surveyAnswer{free, in(9, members[1:], nil), silent}, refusal: exists, byCluster: true},
		"the cluster is made":                  {answers: []surveyAnswer{named, in(9, members, nil), silent}, made: 2},
		"the cluster is being made":            {answers: []surveyAnswer{in(9, members[1:2], nil), in(9, members[1:2], members), free}, made: 2},
		"another list is being made":           {answers: []surveyAnswer{free, in(9, members[1:2], members[:2]), free}, refusal: exists, byCluster: true},
		"there are two":                        {answers: []surveyAnswer{in(9, members, nil), in(8, members[1:2], nil), free}, refusal: exists, byCluster: true},
	} {
		found := judgeSurvey(members, tt.answers)
		if found.member.GetId() != tt.made || errorReason(found.refusal) != tt.refusal || errorReason(found.waitsFor) != tt.waitsFor ||
			found.refusedByCluster != tt.byCluster {
			t.Errorf("%s: %+v", name, found)
		}
		if claimAll := found.member == nil && found.refusal == nil && found.waitsFor == nil; claimAll != tt.claimAll {
			t.Errorf("%s: they are claimed: %v", name, claimAll)
		}
	}
}

// TestInitDiskFails: if the disk of the founder fails, Init says so, names it, and
// says that no cluster was made; if that of another member fails, it names that one.
func TestInitDiskFails(t *testing.T) {
	t.Parallel()
	for _, broken := range []uint64{1, 2} {
		t.Run(fmt.Sprint(broken), func(t *testing.T) {
			dir := t.TempDir()
			c := newCluster(t, 0)
			c.options = func(o *options) {
				o.heartbeat, o.election, o.redial = 20*time.Millisecond, 250*time.Millisecond, 20*time.Millisecond
				o.durable, o.dataDir, o.logBytes = true, filepath.Join(dir, fmt.Sprint(o.id)), 1<<20
			}
			for id := uint64(1); id <= 3; id++ {
				c.start(id, "127.0.0.1:0")
			}
			if err := os.RemoveAll(filepath.Join(dir, fmt.Sprint(broken))); err != nil {
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
	if _, err := c.nodes[1].Init(c.ctx, &kvpb.InitRequest{Members: c.proto(1, 2), Force: true}); err != nil {
		t.Error(err)
	}
	c.settled(1, 2)
}
