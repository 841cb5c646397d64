// How a cluster is made: Init, and the claims that keep two of them apart.
//
// The called node is the founder. It asks all members whether they can take part
// (survey), claims each of them in ascending order of ids, itself at its place
// (claim), and makes a cluster of itself alone in the turn in which it sees that it
// may (found). Then it adds the others (complete). One that finds a member claimed
// withdraws its own claims, waits, and begins again: nobody holds a claim and waits
// for another one, so there is no deadlock, and of those who want the same members
// the first one to claim the lowest gets all.
//
// # What a claim is
//
// A promise of a node in no cluster, for one try of one founder: it is bound to the
// try's id, a random number that is used once, to the list of members, and to the
// lives of both ends. A node has promised itself to one try at most. While it has,
// no other try gets it, and no cluster but the founder's can add it. The promise is
// in the loop's memory: a node in no cluster has no durable state, and a process
// that restarts has made no promise, nor holds one.
//
// A claim ends when the founder withdraws it, or claims under another life (so the
// one before is dead), when the node becomes a member, or claimTime after it was
// made. Once the founder has its cluster, it calls each node that is to be added
// again and again until it is, and the claim lasts as long as that.
//
// # Why two Inits do not both make a cluster
//
// Say that F and G both found, that F is in G's list and G in F's, as always if the
// lists are equal. Then F has promised itself to G's try and to its own. The promise
// to G came first: F keeps the one to itself until it founds, and makes none from
// then on. G did not withdraw, so it had expired when F made its own: claimTime had
// passed on F's clock. But when F founds, its try is younger than half of that on
// the same clock (found looks). So F's try began after the promise to G, and thus
// after G's try. For the same reasons G's try began after F's: a contradiction. It
// compares no two clocks. Nor does a restart help: the promise is gone, but who has
// restarted begins its try after that.
//
// If F is not in G's list, they meet only in members that both name. Such a member
// promises itself to G at least claimTime after it did to F, on its own clock, and F
// founds within half of that, on F's: as long as no clock runs twice as fast as
// another, F's cluster exists by then. If the member is not in it yet, because F has
// died or lost the connection to it, or if the member restarts, then G may have it.
// There are two clusters then, as two different lists have asked for. No node is in
// both, and F's Init ends with an error that names the node.
//
// # A member that has lost its memory
//
// A member in memory that restarts is in no cluster until its leader takes it back.
// Init must not take it for a new node. So a fresh node makes no promise until its
// peers would have called it, if it had any (redialTime); and it makes none while it
// hears a cluster that names it by its id or address, or has heard one that recently.
// An operator who knows that cluster to be lost says so by force. Whoever reaches a
// node's port can name it in a hello, and so keep an Init from succeeding; no more.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

const (
	// claimTime is how long a claim lasts that nobody withdraws. A founder founds
	// within half of it, or tries again.
	claimTime = 20 * time.Second
	// withdrawTimeout bounds the wait for members to hear that a try has failed.
	withdrawTimeout = 500 * time.Millisecond
	// maxSurveying and maxWatching are how many of the maxAsking connections that serve
	// but one call a founder has at a time: to members that it asks or claims, and to
	// members that it adds. Besides, it has one to itself, or to another founder. The
	// others are not for Inits: a node that is added has to be asked who it is.
	maxSurveying, maxWatching = 4, 8
	// watchTime is how long a founder waits for one of more members than maxWatching
	// before it is the turn of another: all have theirs within half of claimTime.
	watchTime = time.Second
)

// initTry is one try of a founder to claim all members. A survey has one, too, for its
// founder field alone.
type initTry struct {
	id      uint64
	begun   uint64 // on the loop's clock
	founder *kvpb.Peer
}

// found makes this node the first member of a cluster, if its try still has all
// claims; 0: it has not, and may try again.
func (n *node) found(t *initTry, members []*kvpb.Node) (clusterID uint64, err error) {
	own := n.currentClaim()
	if own == nil || own.id != t.id {
		return 0, nil
	}
	if n.clock.wall-t.begun > n.ticksOf(claimTime)/2 {
		return 0, nil
	}
	clusterID, err = n.bootstrap()
	if err != nil {
		return 0, err
	}
	n.claims.current, n.claims.founding = nil, members
	n.endFounding()
	n.logger.Info("makes a cluster", "cluster", fmt.Sprintf("%016x", clusterID), "members", formatNodes(members))
	return clusterID, nil
}

// Init implements ClusterService.
func (s *server) Init(ctx context.Context, req *kvpb.InitRequest) (*kvpb.InitResponse, error) {
	ctx, cancel := inTime(ctx)
	defer cancel()
	if err := s.checkInit(req.Members); err != nil {
		return nil, err
	}
	f := newFounder(s, req)
	clusterID, err := f.init(ctx)
	if err != nil {
		return nil, err
	}
	return &kvpb.InitResponse{ClusterId: clusterID}, nil
}

func (s *server) checkInit(members []*kvpb.Node) error {
	if err := checkMembers(members); err != nil {
		return err
	}
	named := false
	for _, m := range members {
		if (m.Id == s.n.self.Id) != (m.Address == s.n.self.Address) {
			return invalid("members", "%s: this node is %s", formatNode(m), formatNode(s.n.self))
		}
		named = named || m.Id == s.n.self.Id
	}
	if !named {
		return invalid("members", "the called node, %s, is not among them", formatNode(s.n.self))
	}
	return nil
}

// checkMembers checks the members that an Init names.
func checkMembers(members []*kvpb.Node) error {
	if len(members) == 0 || len(members) > maxMembers {
		return invalid("members", "there are %d, there have to be 1 to %d", len(members), maxMembers)
	}
	ids, addresses := map[uint64]bool{}, map[string]bool{}
	for _, m := range members {
		if err := validateNode("members", m); err != nil {
			return err
		}
		if ids[m.Id] || addresses[m.Address] {
			return invalid("members", "%s has the id or the address of another", formatNode(m))
		}
		ids[m.Id], addresses[m.Address] = true, true
	}
	return nil
}

// founder is one call of Init at the node that was called.
type founder struct {
	s       *server
	members []*kvpb.Node // by id
	force   bool

	waitsFor error // what to say if it waits in vain
	doubted  bool  // the survey before this one has found a cluster
}

func newFounder(s *server, req *kvpb.InitRequest) *founder {
	f := &founder{s: s, force: req.Force}
	for _, m := range req.Members {
		f.members = append(f.members, &kvpb.Node{Id: m.Id, Address: m.Address}) // without unknown fields
	}
	slices.SortFunc(f.members, func(a, b *kvpb.Node) int { return cmp.Compare(a.Id, b.Id) })
	return f
}

// connected calls another node on a connection that is closed again.
func (f *founder) connected(ctx context.Context, m *kvpb.Node, call func(*grpc.ClientConn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	done, err := f.s.net.reserveCall(ctx)
	if err != nil {
		return err
	}
	defer done()
	conn := f.s.net.dial(m.Address)
	defer func() { _ = conn.Close() }()
	return call(conn)
}

// waitForTurn takes the only place of a kind of work, until done. An Init that waits for
// its turn has none: what it waits for never waits for it.
func (f *founder) waitForTurn(ctx context.Context, place chan struct{}) (done func(), err error) {
	select {
	case place <- struct{}{}:
		return sync.OnceFunc(func() { <-place }), nil
	case <-ctx.Done():
		return nil, apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_INIT_IN_PROGRESS,
			fmt.Sprintf("other inits were running at node %d at %s until the deadline", f.s.n.self.Id, f.s.n.self.Address))
	}
}

// init returns the cluster that has the members, if there is one in the end.
func (f *founder) init(ctx context.Context) (clusterID uint64, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	forwarded := len(md.Get(forwardMetadata)) > 0
	for ctx.Err() == nil {
		var otherVoters error
		if forwarded || f.s.n.status.latest.Load().clusterID != 0 {
			clusterID, err = f.atMember(ctx)
			if forwarded || !errors.Is(err, errInCluster) {
				return clusterID, err
			}
			otherVoters = err // unless another member is about to change them
		}
		clusterID, ended, err := f.round(ctx, otherVoters)
		if ended || err != nil {
			return clusterID, err
		}
		sleep(ctx, f.s.n.opts.heartbeat/2+rand.N(f.s.n.opts.heartbeat))
	}
	return 0, cmp.Or(f.waitsFor, ctx.Err())
}

// round asks the members, when it is the turn of this Init, and goes on as they answer:
// to the end; or not yet, if it has to wait.
func (f *founder) round(ctx context.Context, otherVoters error) (clusterID uint64, ended bool, err error) {
	done, err := f.waitForTurn(ctx, f.s.surveying)
	if err != nil {
		return 0, true, cmp.Or(f.waitsFor, otherVoters, err)
	}
	defer done()
	answers, err := f.survey(ctx)
	if err != nil {
		return 0, true, cmp.Or(f.waitsFor, err)
	}
	found := outcomeOf(f.members, answers)
	if ctx.Err() != nil {
		return 0, true, cmp.Or(f.waitsFor, found.refusal, ctx.Err())
	}
	if found.byCluster && !f.doubted {
		// The answers are not of one moment: another Init may have made the
		// cluster between two of them. A second survey sees that.
		f.doubted = true
		return 0, false, nil
	}
	f.doubted = false
	if found.refusal != nil {
		return 0, true, cmp.Or(otherVoters, found.refusal)
	}
	f.waitsFor = found.waitsFor
	if found.made != nil && found.made.Id != f.s.n.self.Id {
		clusterID, err = f.forward(ctx, found.made)
		if errorReason(err) == "NOT_INITIALIZED" {
			return 0, false, nil
		}
		return clusterID, true, err
	}
	if f.waitsFor != nil || found.made != nil {
		return 0, false, nil
	}
	var t *initTry
	t, clusterID, f.waitsFor, err = f.claim(ctx)
	if clusterID == 0 || err != nil {
		return 0, err != nil, err
	}
	done() // whoever has other members need not wait to hear that
	clusterID, err = f.complete(ctx, t, clusterID)
	return clusterID, true, err
}

// each calls f for all members, some of them at a time.
func each(members []*kvpb.Node, f func(i int, m *kvpb.Node)) {
	room := make(chan struct{}, maxSurveying)
	var asking sync.WaitGroup
	for i, m := range members {
		room <- struct{}{}
		asking.Go(func() {
			defer func() { <-room }()
			f(i, m)
		})
	}
	asking.Wait()
}

// surveyAnswer is what a member said to a survey.
type surveyAnswer struct {
	resp *kvpb.ClaimResponse
	err  error
}

// survey asks all members whether they can be claimed.
func (f *founder) survey(ctx context.Context) ([]surveyAnswer, error) {
	t, err := f.begin(ctx)
	if err != nil {
		return nil, err
	}
	answers := make([]surveyAnswer, len(f.members))
	each(f.members, func(i int, m *kvpb.Node) {
		resp, err := f.ask(ctx, m, &kvpb.ClaimRequest{Founder: t.founder, Force: f.force})
		answers[i] = surveyAnswer{resp, err}
	})
	return answers, nil
}

// begin draws a try's id, and notes the time and this node's life.
func (f *founder) begin(ctx context.Context) (*initTry, error) {
	n, t := f.s.n, &initTry{id: randomID()}
	err := n.do(ctx, func() error {
		t.begun = n.clock.wall
		t.founder = &kvpb.Peer{Node: n.self, RaftId: n.id.raftID, Life: n.id.life}
		return nil
	})
	return t, err
}

// ask has a member do something with a claim.
func (f *founder) ask(ctx context.Context, m *kvpb.Node, req *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error) {
	req.To = m
	var resp *kvpb.ClaimResponse
	err := f.connected(ctx, m, func(conn *grpc.ClientConn) (err error) {
		short, cancel := context.WithTimeout(ctx, f.s.n.opts.probeTimeout())
		defer cancel()
		resp, err = kvpb.NewRaftServiceClient(conn).Claim(short, req)
		end, _ := ctx.Deadline()
		if shortEnd, _ := short.Deadline(); status.Code(err) == codes.DeadlineExceeded && end.Equal(shortEnd) {
			<-ctx.Done() // the member may see the end of the whole Init a little earlier
		}
		return err
	})
	if err == nil || errorReason(err) == "WRONG_NODE" || errorReason(err) == "OVERLOADED" {
		return resp, err
	}
	return nil, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
		fmt.Sprintf("node %d at %s does not answer: %s", m.Id, m.Address, status.Convert(err).Message()))
}

// finding is what a survey comes to. If nothing is set, the members can be claimed.
type finding struct {
	made      *kvpb.Node // a member of a cluster that is made, or being made, of these members
	refusal   error
	byCluster bool  // there is a cluster that refuses
	waitsFor  error // what to say if it waits in vain
}

// outcomeOf says what the members' answers mean for an Init.
func outcomeOf(members []*kvpb.Node, answers []surveyAnswer) finding {
	var found finding
	var silent, claimed, named, fresh error
	var clusters []string
	ids := map[uint64]bool{}
	for i, a := range answers {
		m := members[i]
		if a.err != nil {
			silent = cmp.Or(silent, a.err)
			continue
		}
		switch a.resp.Verdict {
		case kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER:
			ids[a.resp.ClusterId] = true
			clusters = append(clusters, fmt.Sprintf("node %d at %s is in another cluster, %016x, of the voters %s",
				m.Id, m.Address, a.resp.ClusterId, formatNodes(a.resp.Voters)))
			if sameNodes(a.resp.Members, members) {
				found.made = m // it carries on with what is left
			} else if found.made == nil && sameNodes(a.resp.Voters, members) {
				found.made = m
			}
		case kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED:
		case kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED:
			named = apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED,
				fmt.Sprintf("cluster %016x calls node %d at %s, through its member %d at %s: wait until it has taken the node in; "+
					"if that cluster is known to be lost, init --force makes another",
					a.resp.ClusterId, m.Id, m.Address, a.resp.By.GetId(), a.resp.By.GetAddress()))
		case kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH:
			fresh = waitsForMember(m, a.resp)
		default:
			claimed = waitsForMember(m, a.resp)
		}
	}
	switch {
	case len(ids) > 1, len(ids) == 1 && found.made == nil:
		found.made, found.byCluster = nil, true
		found.refusal = apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED,
			strings.Join(clusters, ", and "))
	case found.made != nil:
	case silent != nil:
		found.refusal = silent
	case claimed != nil: // and a cluster that names one may be the founder's
		found.waitsFor = claimed
	case named != nil:
		found.refusal, found.byCluster = named, true
	default:
		found.waitsFor = fresh
	}
	return found
}

// waitsForMember is what to say if a member cannot be claimed until the deadline.
func waitsForMember(m *kvpb.Node, resp *kvpb.ClaimResponse) error {
	switch resp.Verdict {
	case kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH:
		return apiError(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE,
			fmt.Sprintf("node %d at %s has just started, and waits to hear whether it is a member of a cluster",
				m.Id, m.Address))
	case kvpb.ClaimVerdict_CLAIM_VERDICT_CLAIMED:
		return apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_INIT_IN_PROGRESS,
			fmt.Sprintf("node %d at %s is claimed by another init, at node %d at %s, of %s",
				m.Id, m.Address, resp.By.GetId(), resp.By.GetAddress(), formatNodes(resp.Members)))
	}
	return apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_INIT_IN_PROGRESS,
		fmt.Sprintf("node %d at %s could be claimed, and then no more", m.Id, m.Address))
}

// claim claims the members one after another and makes a cluster of this node
// alone. If it cannot have them all it has none in the end, and says what it would
// have to wait for.
func (f *founder) claim(ctx context.Context) (t *initTry, clusterID uint64, waitsFor, err error) {
	t, err = f.begin(ctx)
	if err != nil {
		return nil, 0, nil, err
	}
	claimed := 0
	for ; claimed < len(f.members) && waitsFor == nil; claimed++ {
		m := f.members[claimed]
		req := &kvpb.ClaimRequest{Id: t.id, Founder: t.founder, Members: f.members, Force: f.force}
		resp, err := f.ask(ctx, m, req)
		if err != nil {
			waitsFor = err // the next survey says more
		} else if resp.Verdict != kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED {
			waitsFor = waitsForMember(m, resp)
		}
	}
	if waitsFor == nil {
		waitsFor = apiError(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE,
			fmt.Sprintf("the members took more than %v to answer", claimTime/2))
		// In any case: whether it has founded has to be known.
		err = f.s.n.do(context.WithoutCancel(ctx), func() (err error) {
			clusterID, err = f.s.n.found(t, f.members)
			return err
		})
	}
	if clusterID == 0 {
		f.withdraw(ctx, t, f.members[:claimed])
	}
	return t, clusterID, waitsFor, err
}

// withdraw gives claims back, as far as members hear of it: else they expire.
func (f *founder) withdraw(ctx context.Context, t *initTry, members []*kvpb.Node) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), withdrawTimeout)
	defer cancel()
	each(members, func(_ int, m *kvpb.Node) {
		_, _ = f.ask(ctx, m, &kvpb.ClaimRequest{Id: t.id, Withdraw: true})
	})
}

// forward has a member of the cluster say whether it has these voters, or make it so.
func (f *founder) forward(ctx context.Context, m *kvpb.Node) (clusterID uint64, err error) {
	ctx = metadata.AppendToOutgoingContext(ctx, forwardMetadata, "1")
	req := &kvpb.InitRequest{Members: f.members, Force: f.force}
	var resp *kvpb.InitResponse
	err = f.connected(ctx, m, func(conn *grpc.ClientConn) (err error) {
		resp, err = kvpb.NewClusterServiceClient(conn).Init(ctx, req)
		return err
	})
	if err == nil {
		return resp.ClusterId, nil
	}
	if errorReason(err) != "" {
		return 0, err
	}
	return 0, fmt.Errorf("%w: node %d at %s, which carries on with this init: %s",
		errChangeUnknown, m.Id, m.Address, status.Convert(err).Message())
}

// atMember is Init at a member of a cluster: it is done, or is carried on, or has
// other members than the cluster.
func (f *founder) atMember(ctx context.Context) (uint64, error) {
	n := f.s.n
	var clusterID uint64
	founding := false
	err := n.do(ctx, func() error {
		clusterID = n.store.clusterID
		founding = n.claims.founding != nil && sameNodes(n.claims.founding, f.members)
		return nil
	})
	if err != nil {
		return 0, err
	}
	if founding {
		return f.complete(ctx, nil, clusterID)
	}
	return f.compare(ctx)
}

// compare returns this node's cluster if its voters are the members of this Init.
func (f *founder) compare(ctx context.Context) (uint64, error) {
	n := f.s.n
	var clusterID uint64
	if _, err := f.s.call(ctx, nil); err != nil { // what it knows of the voters may be old
		return 0, err
	}
	err := n.do(ctx, func() error {
		clusterID = n.store.clusterID
		if clusterID == 0 {
			return errNotInitialized
		}
		if sameNodes(n.voterNodes(), f.members) {
			return nil
		}
		return fmt.Errorf("%w, %016x, of the voters %s; to have those that were named: %s",
			errInCluster, clusterID, formatNodes(n.voterNodes()), n.toDo(f.members))
	})
	if err != nil {
		return 0, err // the loop may still call f
	}
	return clusterID, nil
}

// complete adds the other members to the cluster that this node has made, as far as
// they are not in it, and makes them voters. With a try, their claims last meanwhile.
func (f *founder) complete(ctx context.Context, t *initTry, clusterID uint64) (uint64, error) {
	n := f.s.n
	if err := n.await(ctx, func() (bool, error) { return n.store.index > 1, nil }); err != nil {
		return 0, f.notMade(ctx, clusterID, err)
	}
	done, err := f.waitForTurn(ctx, f.s.adding)
	if err != nil {
		return 0, f.halfWay(err, clusterID)
	}
	defer done()
	err = f.addOthers(ctx, t, clusterID)
	for errorReason(err) == "NOT_CAUGHT_UP" && ctx.Err() == nil { // any more
		sleep(ctx, n.opts.heartbeat)
		err = f.addOthers(ctx, t, clusterID)
	}
	if err != nil {
		return 0, f.halfWay(err, clusterID)
	}
	_, err = f.compare(ctx)
	if errors.Is(err, errInCluster) {
		return 0, err // an operator has made others voters meanwhile
	}
	if err != nil {
		return 0, f.halfWay(err, clusterID)
	}
	return clusterID, nil
}

// endFounding forgets which members Init was told, once they all vote, or once an
// operator has added another. From then on, the same Init compares: it changes nothing.
func (n *node) endFounding() {
	if n.claims.founding == nil || isJoint(n.store.conf) {
		return
	}
	for _, m := range n.store.members {
		if !containsNode(n.claims.founding, m) {
			n.claims.founding = nil
			return
		}
	}
	if sameNodes(n.voterNodes(), n.claims.founding) {
		n.claims.founding = nil
	}
}

// notMade says that this node has not become a cluster: its first entry was not
// committed.
func (f *founder) notMade(ctx context.Context, clusterID uint64, err error) error {
	self := f.s.n.self
	if ctx.Err() != nil {
		return fmt.Errorf("%w: node %d at %s is still writing the first entry of cluster %016x",
			errChangeUnknown, self.Id, self.Address, clusterID)
	}
	return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NODE_FAILED,
		fmt.Sprintf("node %d at %s could not make the cluster: %s. Once the cause is gone, start it and init again",
			self.Id, self.Address, err))
}

// addOthers makes the other members learners and then voters, by requests as an
// operator would make them: this node need not lead any more.
func (f *founder) addOthers(ctx context.Context, t *initTry, clusterID uint64) error {
	var watching sync.WaitGroup
	defer watching.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	room := make(chan struct{}, maxWatching)
	for _, m := range f.members {
		if m.Id == f.s.n.self.Id {
			continue
		}
		watching.Go(func() {
			if err := f.watch(ctx, t, clusterID, m, room); err != nil {
				cancel(err)
			}
		})
	}
	err := f.connected(ctx, f.s.n.self, func(conn *grpc.ClientConn) error {
		return f.addAll(ctx, kvpb.NewClusterServiceClient(conn))
	})
	if cause := context.Cause(ctx); err != nil && cause != ctx.Err() {
		return cause // of a member that has failed
	}
	return err
}

// addAll makes the members learners one after another, and then voters. It removes
// nobody: meanwhile, an operator may have made others voters.
func (f *founder) addAll(ctx context.Context, self kvpb.ClusterServiceClient) error {
	var ids []uint64
	for _, m := range f.members {
		ids = append(ids, m.Id)
		if m.Id == f.s.n.self.Id {
			continue
		}
		if _, err := self.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: m}); err != nil {
			return err
		}
	}
	_, err := self.ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Promote: ids})
	return err
}

// watch returns once a member is in a cluster, durably, or ctx has ended; or, with an
// error, once it has failed.
func (f *founder) watch(ctx context.Context, t *initTry, clusterID uint64, m *kvpb.Node, room chan struct{}) error {
	req := &kvpb.ClaimRequest{To: m, ClusterId: clusterID}
	if t != nil {
		req.Id, req.Founder, req.Members = t.id, t.founder, f.members
	}
	for ctx.Err() == nil {
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		isMember, err := f.watchOnce(ctx, m, req)
		<-room
		if isMember || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
				fmt.Sprintf("node %d at %s has failed while it was added: %s", m.Id, m.Address, status.Convert(err).Message()))
		}
		sleep(ctx, f.s.n.opts.heartbeat)
	}
	return nil
}

// watchOnce waits for a member to be in a cluster, until it is the turn of another one.
func (f *founder) watchOnce(ctx context.Context, m *kvpb.Node, req *kvpb.ClaimRequest) (isMember bool, err error) {
	err = f.connected(ctx, m, func(conn *grpc.ClientConn) error {
		short := ctx
		if len(f.members)-1 > maxWatching {
			var cancel context.CancelFunc
			short, cancel = context.WithTimeout(ctx, watchTime)
			defer cancel()
		}
		_, err := kvpb.NewRaftServiceClient(conn).Claim(short, req)
		return err
	})
	switch errorReason(err) {
	case "DEADLINE":
		return false, nil
	case "": // a connection that broke need not be more than that
		if err != nil {
			_, err = f.ask(ctx, m, &kvpb.ClaimRequest{})
			return false, err
		}
	}
	return err == nil, err
}

// halfWay says how far Init got, and what is left to type.
func (f *founder) halfWay(err error, clusterID uint64) error {
	n := f.s.n
	todo := ""
	_ = n.do(context.Background(), func() error { // unless the node has ended
		todo = fmt.Sprintf("; what is left, with --endpoints %s: %s", n.self.Address, n.toDo(f.members))
		if n.claims.founding != nil {
			todo += "; or the same init, which carries on"
		}
		return nil
	})
	st := status.Convert(toStatus(err, false)).Proto()
	st.Message = fmt.Sprintf("cluster %016x was made, but: %s%s", clusterID, st.Message, todo)
	return status.FromProto(st).Err()
}

// toDo is what to type to have these members as the voters.
func (n *node) toDo(members []*kvpb.Node) string {
	var todo, ids []string
	var ready []*kvpb.Node
	progress := n.progressOf()
	for raftID, m := range n.store.members {
		if n.isVoter(raftID) || n.isCaughtUp(progress[raftID]) {
			ready = append(ready, m)
		}
	}
	for _, m := range members {
		ids = append(ids, fmt.Sprint(m.Id))
		if !containsNode(ready, m) {
			todo = append(todo, "add-learner "+formatNode(m))
		}
	}
	return strings.Join(append(todo, "change-membership "+strings.Join(ids, " ")), ", then ")
}

func containsNode(nodes []*kvpb.Node, m *kvpb.Node) bool {
	return slices.ContainsFunc(nodes, func(o *kvpb.Node) bool { return o.Id == m.Id && o.Address == m.Address })
}

// sameNodes reports whether two lists, none of which has a node twice, have the same
// nodes.
func sameNodes(a, b []*kvpb.Node) bool {
	if len(a) != len(b) {
		return false
	}
	for _, m := range a {
		if !containsNode(b, m) {
			return false
		}
	}
	return true
}

// formatNode writes a node as the command line has it.
func formatNode(m *kvpb.Node) string { return fmt.Sprintf("%d=%s", m.GetId(), m.GetAddress()) }

func formatNodes(nodes []*kvpb.Node) string {
	var names []string
	for _, m := range nodes {
		names = append(names, formatNode(m))
	}
	return strings.Join(names, " ")
}
