// How a cluster is made: Init, and why two Inits do not both make one.
//
// The node that is called is the founder. An Init goes through these states:
//
//	       all can be claimed     has all claims
//	survey -----------------> claim ----------> found ---> add ---> done
//	|  |  ^                     |                 |         |
//	|  |  |             a claim is refused  the try is old  +--> failed halfway
//	|  |  |                     v                 |
//	|  |  +---- pause <----- withdraw <-----------+
//	|  |          ^
//	|  +----------+ a member is claimed, or fresh
//	|
//	+--> refused, or forwarded to a member of the cluster that the Init wants
//
//   - survey: the founder asks all members whether they can be claimed.
//   - claim: it claims one member after another, in ascending order of ids, itself at
//     its place.
//   - found: in one turn of its loop, it sees that all claims still hold, and makes a
//     cluster of itself alone.
//   - add: it makes the others learners and then voters, and waits until they are. An
//     Init that has failed in this state says so; the same one again carries on with it.
//
// A founder that is in a cluster already does not begin with a survey: it carries on with
// its Init, or compares the voters with the members that the Init names.
//
// A founder that finds a member claimed withdraws its own claims before it pauses. So
// nobody holds a claim and waits for another one, and there is no deadlock. Of the
// founders that want the same members, the first to claim the lowest id gets all.
//
// # Why two Inits do not both make a cluster
//
// The head of claims.go says what a claim is. This is what the argument needs of it: a
// node that has made a claim for one try makes none for the try of another node until the
// claim has ended. It ends if the founder withdraws it or has died, if the claimed node
// has begun a new life, or once it is claimTime old on the clock of the claimed node.
//
// Say that F and G have both made a cluster, and each of them is in the other's list, as
// it is if the lists are equal. Both have had all claims. So F has made two: one for G's
// try, and one for its own.
//
//  1. F made the claim for G first. It held its own until it made its cluster, so that it
//     made no other meanwhile; and a member of a cluster makes no claims.
//  2. When F made its own, the claim for G had ended. G did not withdraw it: G's try has
//     not failed. So it had become claimTime old on F's clock, or F had begun a new life.
//  3. Thus F's try began after F had made the claim for G. With a new life that is plain:
//     a try is of one life. Without, compare two ages on F's clock, in the moment in
//     which F claimed itself. The claim for G was at least claimTime old. F's try was at
//     most half as old: it was not older when F made its cluster (foundCluster looks).
//  4. So F's try began after G's, since G's had begun before F made a claim for it.
//
// For the same reasons G's try began after F's: a contradiction.
//
// The argument compares no two clocks. Where F's loop is too busy to make all of its
// ticks, both ages err on the safe side: the claim's counts the ticks that the loop has
// made (clock.now), and so the claim holds longer; the try's counts those that it has
// missed, too (clock.wall), and so the try fails sooner.
//
// Step 2 leaves out one way in which a claim ends: its founder dies, and claims again in
// its next life. Say that G has made its cluster before it died. If G is durable, it is
// still a member, and makes no claims. If G is in memory, the cluster is lost with it, or
// has other members: they call G, so that G makes no claim for F (see below).
//
// If one of them is not in the other's list, both Inits may succeed: two different lists
// ask for two clusters. No node is in both. Say that a member of both lists makes its claim
// for F first. It makes the one for G at least claimTime later, on its own clock, and F
// makes its cluster within half of that, on F's. As long as no clock runs twice as fast as
// another, F's cluster exists by then, and F keeps the claim until the member is added. G
// gets the member only if F has died or lost the connection to it, or if the member
// restarts. Then F's Init ends with an error that names the member.
//
// # A member that has lost its memory
//
// A member in memory that restarts is in no cluster until its leader takes it back. Init
// must not take it for a new node. So a node makes no claim while it is fresh, or while a
// cluster names it (claims.go says what that means), unless the Init is by force: an
// operator uses that who knows the cluster to be lost. Whoever reaches a node's port can
// name it in a hello, and so keep an Init from succeeding; no more.

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
	// maxSurveying and maxWatching are how many of the maxAsking connections that serve
	// but one call a founder has at a time: to members that it asks or claims, and to
	// members that it adds. Besides, it has one to itself, or to another founder. The
	// others are not for Inits: a node that is added has to be asked who it is.
	maxSurveying, maxWatching = 4, 8
	// watchTime is how long a founder waits for one of more members than maxWatching
	// before it is the turn of another: all have theirs within half of claimTime.
	watchTime = time.Second
)

// Init implements ClusterService.
func (s *server) Init(ctx context.Context, req *kvpb.InitRequest) (*kvpb.InitResponse, error) {
	ctx, cancel := inTime(ctx)
	defer cancel()
	if err := s.checkInit(req.Members); err != nil {
		return nil, err
	}
	f := newFounder(s, req)
	clusterID, err := f.run(ctx)
	if err != nil {
		return nil, err
	}
	return &kvpb.InitResponse{ClusterId: clusterID}, nil
}

func (s *server) checkInit(members []*kvpb.Node) error {
	if err := checkMembers(members); err != nil {
		return err
	}
	self := s.n.self
	named := false
	for _, m := range members {
		sameID := m.Id == self.Id
		sameAddress := m.Address == self.Address
		if sameID != sameAddress {
			return invalid("members", "%s: this node is %s", formatNode(m), formatNode(self))
		}
		if sameID {
			named = true
		}
	}
	if !named {
		return invalid("members", "the called node, %s, is not among them", formatNode(self))
	}
	return nil
}

// checkMembers checks the members that an Init names.
func checkMembers(members []*kvpb.Node) error {
	if len(members) == 0 || len(members) > maxMembers {
		return invalid("members", "there are %d, there have to be 1 to %d", len(members), maxMembers)
	}
	ids := map[uint64]bool{}
	addresses := map[string]bool{}
	for _, m := range members {
		if err := validateNode("members", m); err != nil {
			return err
		}
		if ids[m.Id] || addresses[m.Address] {
			return invalid("members", "%s has the id or the address of another", formatNode(m))
		}
		ids[m.Id] = true
		addresses[m.Address] = true
	}
	return nil
}

// founder is one call of Init, at the node that was called.
type founder struct {
	s       *server
	members []*kvpb.Node // by id
	force   bool

	planned bool // the Init is that of --initial-cluster

	waitsFor error // what the Init is waiting for, as it says if it has waited in vain
	doubted  bool  // the survey before this one has found a cluster that refuses
}

func newFounder(s *server, req *kvpb.InitRequest) *founder {
	f := &founder{s: s, force: req.Force, planned: req.Planned}
	for _, m := range req.Members {
		f.members = append(f.members, &kvpb.Node{Id: m.Id, Address: m.Address}) // without unknown fields
	}
	slices.SortFunc(f.members, func(a, b *kvpb.Node) int { return cmp.Compare(a.Id, b.Id) })
	return f
}

// initOutcome is how a step of an Init ended.
type initOutcome int

const (
	initWaiting initOutcome = iota // not yet: the step is to be made again after a pause
	initDone
	initFailed // and the Init with it
)

// initResult is what a step of an Init came to.
type initResult struct {
	outcome   initOutcome
	clusterID uint64 // initDone: the cluster
	err       error  // initFailed: why; initWaiting: what the Init waits for, or nil
}

// run goes through the states of the Init, and returns the cluster that has its members.
func (f *founder) run(ctx context.Context) (clusterID uint64, err error) {
	forwarded := wasForwarded(ctx)
	heartbeat := f.s.n.opts.heartbeat
	for ctx.Err() == nil {
		result := f.attempt(ctx, forwarded)
		switch result.outcome {
		case initDone:
			return result.clusterID, nil
		case initFailed:
			return 0, result.err
		}
		f.waitsFor = result.err
		sleep(ctx, heartbeat/2+rand.N(heartbeat))
	}
	return 0, f.inVain(ctx.Err())
}

// inVain is the error of an Init that ends because of err: it says what the Init was
// waiting for, if it was.
func (f *founder) inVain(err error) error {
	if f.waitsFor != nil {
		return f.waitsFor
	}
	return err
}

// attempt goes through the states once: a member of a cluster carries on or compares, any
// other node begins with a survey.
func (f *founder) attempt(ctx context.Context, forwarded bool) initResult {
	isMember := f.s.n.status.latest.Load().clusterID != 0
	if !forwarded && !isMember {
		return f.makeCluster(ctx, nil)
	}
	clusterID, err := f.carryOnOrCompare(ctx)
	if err == nil {
		return initResult{outcome: initDone, clusterID: clusterID}
	}
	hasOtherVoters := errors.Is(err, errInCluster)
	if forwarded || !hasOtherVoters {
		return initResult{outcome: initFailed, err: err}
	}
	// Another member may be the founder, and about to change the voters: a survey sees that.
	return f.makeCluster(ctx, err)
}

// makeCluster surveys the members when it is the turn of this Init, and goes on as their
// answers demand. A founder that is in a cluster of other voters says so by otherVoters,
// which is then what a refusal says.
func (f *founder) makeCluster(ctx context.Context, otherVoters error) initResult {
	endTurn, err := f.waitForTurn(ctx, f.s.surveying)
	if err != nil {
		return initResult{outcome: initFailed, err: f.inVain(cmp.Or(otherVoters, err))}
	}
	defer endTurn()
	answers, err := f.survey(ctx)
	if err != nil {
		return initResult{outcome: initFailed, err: f.inVain(err)}
	}
	found := judgeSurvey(f.members, answers)
	if err := ctx.Err(); err != nil {
		return initResult{outcome: initFailed, err: f.inVain(cmp.Or(found.refusal, err))}
	}
	if found.refusedByCluster && !f.doubted {
		// The answers are not of one moment: another Init may have made the
		// cluster between two of them. A second survey sees that.
		f.doubted = true
		return initResult{outcome: initWaiting, err: f.waitsFor}
	}
	f.doubted = false
	if found.refusal != nil {
		return initResult{outcome: initFailed, err: cmp.Or(otherVoters, found.refusal)}
	}
	if found.waitsFor != nil {
		return initResult{outcome: initWaiting, err: found.waitsFor}
	}
	if found.member != nil && found.member.Id == f.s.n.self.Id {
		return initResult{outcome: initWaiting} // this node has become a member meanwhile
	}
	if found.member != nil {
		return f.forward(ctx, found.member)
	}

	try, err := f.newTry(ctx)
	if err != nil {
		return initResult{outcome: initFailed, err: err}
	}
	founded := f.claimAndFound(ctx, try)
	if founded.outcome != initDone {
		return founded
	}
	if f.planned {
		f.warnOfBeginning(founded.clusterID)
	}
	endTurn() // an Init of other members need not wait until these are added
	if err := f.addOthers(ctx, try, founded.clusterID); err != nil {
		return initResult{outcome: initFailed, err: err}
	}
	return founded
}

// waitForTurn waits until this Init has the only place of a kind of work, and keeps it
// until endTurn. An Init that waits for its turn has no other place: those that it waits
// for never wait for it.
func (f *founder) waitForTurn(ctx context.Context, place chan struct{}) (endTurn func(), err error) {
	select {
	case place <- struct{}{}:
		return sync.OnceFunc(func() { <-place }), nil
	case <-ctx.Done():
		self := f.s.n.self
		return nil, apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_INIT_IN_PROGRESS,
			fmt.Sprintf("other inits were running at node %d at %s until the deadline", self.Id, self.Address))
	}
}

// withConnection has call use a connection to a member of its own, which is closed after
// that.
func (f *founder) withConnection(ctx context.Context, m *kvpb.Node, call func(*grpc.ClientConn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	done, err := f.s.net.reserveCall(ctx)
	if err != nil {
		return err
	}
	defer done()
	conn := f.s.net.dial(m)
	defer func() { _ = conn.Close() }()
	return call(conn)
}

// forEachMember calls f for each member, for maxSurveying of them at a time, and returns
// when all calls have.
func forEachMember(members []*kvpb.Node, f func(i int, m *kvpb.Node)) {
	places := make(chan struct{}, maxSurveying)
	var calls sync.WaitGroup
	for i, m := range members {
		places <- struct{}{}
		calls.Go(func() {
			defer func() { <-places }()
			f(i, m)
		})
	}
	calls.Wait()
}

// sendClaim calls a member's RaftService.Claim: to ask whether it can be claimed, to claim
// it, or to withdraw a claim. An error says that the member does not answer, that another
// node answers in its place, or that this node makes too many calls.
func (f *founder) sendClaim(ctx context.Context, m *kvpb.Node, req *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error) {
	req.To = m
	var resp *kvpb.ClaimResponse
	err := f.withConnection(ctx, m, func(conn *grpc.ClientConn) (err error) {
		short, cancel := context.WithTimeout(ctx, f.s.n.opts.probeTimeout())
		defer cancel()
		resp, err = kvpb.NewRaftServiceClient(conn).Claim(short, req)
		timedOut := status.Code(err) == codes.DeadlineExceeded
		if timedOut && sameDeadline(short, ctx) {
			<-ctx.Done() // the member may see the end of the whole Init a little earlier
		}
		return err
	})
	if err == nil {
		return resp, nil
	}
	switch errorReason(err) {
	case "WRONG_NODE", "OVERLOADED":
		return nil, err
	}
	return nil, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
		fmt.Sprintf("node %d at %s does not answer: %s", m.Id, shown(m.Address), causeOf(err, m)))
}

func sameDeadline(a, b context.Context) bool {
	endOfA, _ := a.Deadline()
	endOfB, _ := b.Deadline()
	return endOfA.Equal(endOfB)
}

// surveyAnswer is what a member said to a survey.
type surveyAnswer struct {
	resp *kvpb.ClaimResponse
	err  error
}

// survey asks all members whether they can be claimed.
func (f *founder) survey(ctx context.Context) ([]surveyAnswer, error) {
	asks, err := f.newTry(ctx) // for its founder: a survey claims nothing
	if err != nil {
		return nil, err
	}
	answers := make([]surveyAnswer, len(f.members))
	forEachMember(f.members, func(i int, m *kvpb.Node) {
		req := &kvpb.ClaimRequest{Founder: asks.founder, Members: f.members, Force: f.force}
		resp, err := f.sendClaim(ctx, m, req)
		answers[i] = surveyAnswer{resp, err}
	})
	return answers, nil
}

// surveyOutcome is what a survey comes to. If nothing is set, all members can be claimed.
type surveyOutcome struct {
	member           *kvpb.Node // of the cluster that the Init wants, made or being made
	refusal          error      // why the Init fails
	refusedByCluster bool       // the refusal is that a cluster has a member, or names it
	waitsFor         error      // what the Init has to wait for
}

// judgeSurvey says what the members' answers mean for an Init.
func judgeSurvey(members []*kvpb.Node, answers []surveyAnswer) surveyOutcome {
	tally := surveyTally{clusterIDs: map[uint64]bool{}}
	for i, a := range answers {
		tally.add(members, members[i], a)
	}
	return tally.outcome()
}

// surveyTally has the members' answers by their kind.
type surveyTally struct {
	clusterIDs map[uint64]bool // that members are in
	memberOf   []string        // says who is in which cluster
	member     *kvpb.Node      // of a cluster that the Init wants; nil: none

	silent  error // the first member that does not answer
	planned error // a member that was started for another cluster, and why that is a refusal
	claimed error // what to wait for, of members claimed
	fresh   error // what to wait for, of members that have just started
	named   error // a member that a cluster calls, and why that is a refusal
}

// add takes in the answer of m, one of the members.
func (t *surveyTally) add(members []*kvpb.Node, m *kvpb.Node, a surveyAnswer) {
	if a.err != nil {
		t.silent = cmp.Or(t.silent, a.err)
		return
	}
	switch a.resp.Verdict {
	case kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER:
		t.addMember(members, m, a.resp)
	case kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED:
		// It can be claimed.
	case kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED:
		t.named = apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED,
			fmt.Sprintf("cluster %016x calls node %d at %s, through its member %d at %s: "+
				"wait until it has taken the node in; "+
				"if that cluster is known to be lost, init --force makes another",
				a.resp.ClusterId, m.Id, shown(m.Address), a.resp.By.GetId(), shown(a.resp.By.GetAddress())))
	case kvpb.ClaimVerdict_CLAIM_VERDICT_OTHER_LIST:
		t.planned = cmp.Or(t.planned, otherList(members, m, a.resp.Members))
	case kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH:
		t.fresh = waitsForMember(m, a.resp)
	default:
		t.claimed = waitsForMember(m, a.resp)
	}
}

// addMember takes in the answer of a member of a cluster. One that has begun the same Init
// is best: it carries on with what is left.
func (t *surveyTally) addMember(members []*kvpb.Node, m *kvpb.Node, resp *kvpb.ClaimResponse) {
	t.clusterIDs[resp.ClusterId] = true
	t.memberOf = append(t.memberOf, fmt.Sprintf("node %d at %s is in another cluster, %016x, of the voters %s",
		m.Id, shown(m.Address), resp.ClusterId, formatNodes(resp.Voters)))
	if sameNodes(resp.Members, members) {
		t.member = m
	} else if t.member == nil && sameNodes(resp.Voters, members) {
		t.member = m
	}
}

// outcome judges what was taken in. The order of its conditions is that in which what
// they find matters.
func (t *surveyTally) outcome() surveyOutcome {
	isInOthers := len(t.clusterIDs) > 0 && t.member == nil
	if isInOthers || len(t.clusterIDs) > 1 {
		refusal := apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED,
			strings.Join(t.memberOf, ", and "))
		return surveyOutcome{refusal: refusal, refusedByCluster: true}
	}
	if t.member != nil {
		return surveyOutcome{member: t.member}
	}
	if t.planned != nil {
		return surveyOutcome{refusal: t.planned}
	}
	if t.silent != nil {
		return surveyOutcome{refusal: t.silent}
	}
	if t.claimed != nil {
		return surveyOutcome{waitsFor: t.claimed} // a cluster that names a member may be that founder's
	}
	if t.named != nil {
		return surveyOutcome{refusal: t.named, refusedByCluster: true}
	}
	return surveyOutcome{waitsFor: t.fresh}
}

// otherList is the error of an Init of members of whom m was started to become one of another
// cluster, of planned; none: to join one.
func otherList(members []*kvpb.Node, m *kvpb.Node, planned []*kvpb.Node) error {
	how := "with --join, to join a cluster that there is"
	if len(planned) > 0 {
		how = fmt.Sprintf("with --initial-cluster %s", formatNodes(planned))
	}
	return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_OTHER_LIST,
		fmt.Sprintf("node %d at %s was started %s, and not for a cluster of %s",
			m.Id, shown(m.Address), how, formatNodes(members)))
}

// waitsForMember is what an Init says if it cannot claim a member until the deadline.
func waitsForMember(m *kvpb.Node, resp *kvpb.ClaimResponse) error {
	switch resp.Verdict {
	case kvpb.ClaimVerdict_CLAIM_VERDICT_FRESH:
		return apiError(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE,
			fmt.Sprintf("node %d at %s has just started, and waits to hear whether it is a member of a cluster",
				m.Id, shown(m.Address)))
	case kvpb.ClaimVerdict_CLAIM_VERDICT_CLAIMED:
		return apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_INIT_IN_PROGRESS,
			fmt.Sprintf("node %d at %s is claimed by another init, at node %d at %s, of %s",
				m.Id, shown(m.Address), resp.By.GetId(), shown(resp.By.GetAddress()), formatNodes(resp.Members)))
	}
	return apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_INIT_IN_PROGRESS,
		fmt.Sprintf("node %d at %s could be claimed, and then no more", m.Id, shown(m.Address)))
}

// forward sends this Init to a member of the cluster that it wants.
func (f *founder) forward(ctx context.Context, m *kvpb.Node) initResult {
	ctx = forwarding(ctx)
	req := &kvpb.InitRequest{Members: f.members, Force: f.force, Planned: f.planned}
	var resp *kvpb.InitResponse
	err := f.withConnection(ctx, m, func(conn *grpc.ClientConn) (err error) {
		resp, err = kvpb.NewClusterServiceClient(conn).Init(ctx, req)
		return err
	})
	if err == nil {
		return initResult{outcome: initDone, clusterID: resp.ClusterId}
	}
	switch errorReason(err) {
	case "NOT_INITIALIZED":
		return initResult{outcome: initWaiting} // the member has restarted since the survey
	case "":
		err = fmt.Errorf("%w: node %d at %s, which carries on with this init: %s",
			errChangeUnknown, m.Id, shown(m.Address), causeOf(err, m))
	}
	return initResult{outcome: initFailed, err: err}
}

// initTry is one try of a founder to claim all members.
type initTry struct {
	id      uint64
	begun   uint64 // on the founder's clock.wall
	founder *kvpb.Peer
}

// newTry draws a try's id, and notes the time and this node's life.
func (f *founder) newTry(ctx context.Context) (*initTry, error) {
	n := f.s.n
	try := &initTry{id: randomID()}
	err := n.do(ctx, func() error {
		try.begun = n.clock.wall
		try.founder = &kvpb.Peer{Node: n.self, RaftId: n.id.raftID, Life: n.id.life}
		return nil
	})
	return try, err
}

// claimAndFound claims all members and makes a cluster of this node alone. If it cannot,
// it withdraws the claims, and its result says what the Init has to wait for.
func (f *founder) claimAndFound(ctx context.Context, try *initTry) initResult {
	claimed, waitsFor := f.claimMembers(ctx, try)
	if waitsFor != nil {
		f.withdraw(ctx, try, claimed)
		return initResult{outcome: initWaiting, err: waitsFor}
	}
	var clusterID uint64
	// Also if ctx has ended: the founder has to know whether it has made a cluster.
	err := f.s.n.do(context.WithoutCancel(ctx), func() (err error) {
		clusterID, err = f.s.n.foundCluster(try, f.members)
		return err
	})
	if clusterID != 0 {
		return initResult{outcome: initDone, clusterID: clusterID}
	}
	f.withdraw(ctx, try, claimed)
	if err != nil {
		return initResult{outcome: initFailed, err: err}
	}
	waitsFor = apiError(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE,
		fmt.Sprintf("the members took more than %v to answer", claimTime/2))
	return initResult{outcome: initWaiting, err: waitsFor}
}

// claimMembers claims one member after another, until one is refused. It returns those
// that may be claimed now, and what to wait for; nil: it has all claims.
func (f *founder) claimMembers(ctx context.Context, try *initTry) (claimed []*kvpb.Node, waitsFor error) {
	for i, m := range f.members {
		claimed = f.members[:i+1] // the last one, too: its answer may be lost
		req := &kvpb.ClaimRequest{Id: try.id, Founder: try.founder, Members: f.members, Force: f.force}
		resp, err := f.sendClaim(ctx, m, req)
		if err != nil {
			return claimed, err // the next survey says more
		}
		if resp.Verdict != kvpb.ClaimVerdict_CLAIM_VERDICT_GRANTED {
			return claimed, waitsForMember(m, resp)
		}
	}
	return claimed, nil
}

// withdraw gives the claims of a try back, as far as the members hear of it; the others
// expire.
func (f *founder) withdraw(ctx context.Context, try *initTry, members []*kvpb.Node) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.s.n.opts.probeTimeout())
	defer cancel()
	forEachMember(members, func(_ int, m *kvpb.Node) {
		_, _ = f.sendClaim(ctx, m, &kvpb.ClaimRequest{Id: try.id, Withdraw: true})
	})
}

// foundCluster makes this node a cluster of itself alone, for an Init of these members, if
// the try is of this life, its claim of this node holds, and it is young enough that all
// other claims hold, too. The head of this file says what hangs on these three. 0: the try
// has failed, and nothing has changed.
func (n *node) foundCluster(try *initTry, members []*kvpb.Node) (clusterID uint64, err error) {
	if try.founder.Life != n.id.life {
		return 0, nil // what this node promised in the life of the try is forgotten
	}
	own := n.currentClaim()
	if own == nil || own.id != try.id {
		return 0, nil
	}
	age := n.clock.wall - try.begun
	if age > n.ticksOf(claimTime)/2 {
		return 0, nil
	}
	clusterID, err = n.bootstrap(members)
	if err != nil {
		return 0, err
	}
	n.claims.withdraw(try.id) // a member makes no claims
	n.logger.Info("this node has made a cluster", "cluster", fmt.Sprintf("%016x", clusterID), "members", formatNodes(members))
	return clusterID, nil
}

// carryOnOrCompare is the Init of a node that is a member of a cluster. If an Init of the
// same members has made the cluster and is not done, it adds those that are missing: any
// member knows that, also after a restart. If not, it compares the voters with the members,
// and changes nothing.
func (f *founder) carryOnOrCompare(ctx context.Context) (uint64, error) {
	n := f.s.n
	var clusterID uint64 // the loop writes it, perhaps after do has failed: so it is no named result
	carriesOn := false
	err := n.do(ctx, func() error {
		clusterID = n.store.clusterID
		carriesOn = n.store.carriesOn(f.members)
		return nil
	})
	if err != nil {
		return 0, err
	}
	if !carriesOn {
		return f.compareVoters(ctx)
	}
	if err := f.addOthers(ctx, nil, clusterID); err != nil {
		return 0, err
	}
	return clusterID, nil
}

// compareVoters returns this node's cluster if its voters are the members of this Init,
// and else an error: errInCluster, with what to do to have those members.
func (f *founder) compareVoters(ctx context.Context) (uint64, error) {
	// A linearizable read: what this node knows of the voters may be old.
	if _, err := f.s.call(ctx, &call{}); err != nil {
		return 0, err
	}
	n := f.s.n
	var clusterID uint64 // the loop writes it, perhaps after do has failed: so it is no named result
	err := n.do(ctx, func() error {
		clusterID = n.store.clusterID
		if clusterID == 0 {
			return errNotInitialized
		}
		voters := n.voterNodes()
		if sameNodes(voters, f.members) {
			return nil
		}
		return fmt.Errorf("%w, %016x, of the voters %s; to have those that were named: %s",
			errInCluster, clusterID, formatNodes(voters), n.commandsFor(f.members))
	})
	if err != nil {
		return 0, err // without clusterID: the loop may still write to it
	}
	return clusterID, nil
}

// addOthers adds the other members to the cluster that this node has made, as far as they
// are not in it, and makes them voters. It returns nil once all members of the Init, and
// no others, vote; an error says what is left to do. With a try, it keeps the try's claims
// meanwhile.
func (f *founder) addOthers(ctx context.Context, try *initTry, clusterID uint64) error {
	n := f.s.n
	firstIsCommitted := func() (bool, error) { return n.store.index > 1, nil }
	if err := n.await(ctx, firstIsCommitted); err != nil {
		return f.notFounded(ctx, clusterID, err)
	}
	endTurn, err := f.waitForTurn(ctx, f.s.adding)
	if err != nil {
		return f.failedHalfway(err, clusterID)
	}
	defer endTurn()
	err = f.addAndWatch(ctx, try, clusterID)
	for errorReason(err) == "NOT_CAUGHT_UP" && ctx.Err() == nil {
		// A learner had caught up, and fell behind before it became a voter.
		sleep(ctx, n.opts.heartbeat)
		err = f.addAndWatch(ctx, try, clusterID)
	}
	// So the cluster says once the Init is done, or an operator has changed the membership;
	// and so does a member that is in another cluster.
	mayBeEnded := errorReason(err) == "ALREADY_INITIALIZED"
	if err != nil && !mayBeEnded {
		return f.failedHalfway(err, clusterID)
	}
	_, other := f.compareVoters(ctx) // a linearizable read: this node has applied what has ended the Init
	if mayBeEnded && f.carriesOn(ctx) {
		return f.failedHalfway(err, clusterID)
	}
	if errors.Is(other, errInCluster) {
		return other // an operator has made others voters meanwhile
	}
	if other != nil {
		return f.failedHalfway(other, clusterID)
	}
	return nil
}

// carriesOn reports whether this node knows of an Init of these members that is half way.
func (f *founder) carriesOn(ctx context.Context) bool {
	n := f.s.n
	isHalfWay := false // the loop writes it, perhaps after do has failed
	err := n.do(ctx, func() error {
		isHalfWay = n.store.carriesOn(f.members)
		return nil
	})
	return err == nil && isHalfWay
}

// addAndWatch adds the members (addMembers), and watches each of them meanwhile: if one
// fails, the adding ends with that error.
func (f *founder) addAndWatch(ctx context.Context, try *initTry, clusterID uint64) error {
	var watching sync.WaitGroup
	defer watching.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	places := make(chan struct{}, maxWatching)
	for _, m := range f.members {
		if m.Id == f.s.n.self.Id {
			continue
		}
		watching.Go(func() {
			if err := f.watchMember(ctx, try, clusterID, m, places); err != nil {
				cancel(err)
			}
		})
	}
	err := f.addMembers(ctx)
	cause := context.Cause(ctx)
	aMemberFailed := cause != ctx.Err()
	if err != nil && aMemberFailed {
		return cause
	}
	return err
}

// addMembers makes the other members learners one after another, and then all of them
// voters. Once the Init is done, or an operator has changed anything, nothing more is done
// (whileFounding): whoever was removed or demoted meanwhile stays so. It makes the requests
// that an operator would make of this node, which need not lead any more: they may be
// forwarded, even if the Init was.
func (f *founder) addMembers(ctx context.Context) error {
	ctx = metadata.NewIncomingContext(ctx, nil)
	var ids []uint64
	for _, m := range f.members {
		ids = append(ids, m.Id)
		if m.Id == f.s.n.self.Id {
			continue
		}
		if _, err := f.s.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: m, WhileFounding: true}); err != nil {
			return toStatus(err, false)
		}
	}
	_, err := f.s.ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Promote: ids, WhileFounding: true})
	if err != nil {
		return toStatus(err, false)
	}
	return nil
}

// watchMember waits until a member is in a cluster, durably, and keeps the member's claim
// meanwhile. It returns nil then, or when ctx has ended, and an error if the member has
// failed. Those that wait share the places.
func (f *founder) watchMember(
	ctx context.Context, try *initTry, clusterID uint64, m *kvpb.Node, places chan struct{},
) error {
	req := &kvpb.ClaimRequest{To: m, ClusterId: clusterID}
	if try != nil {
		req.Id = try.id
		req.Founder = try.founder
		req.Members = f.members
	}
	for ctx.Err() == nil {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		joined := f.awaitJoin(ctx, m, req)
		<-places
		if joined.outcome == initDone || ctx.Err() != nil {
			return nil
		}
		if joined.outcome == initFailed {
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE,
				fmt.Sprintf("node %d at %s has failed while it was added: %s",
					m.Id, shown(m.Address), causeOf(joined.err, m)))
		}
		sleep(ctx, f.s.n.opts.heartbeat)
	}
	return nil
}

// awaitJoin calls a member, which answers once it is in a cluster. It waits no longer than
// watchTime if there are more members than may be watched at a time.
func (f *founder) awaitJoin(ctx context.Context, m *kvpb.Node, req *kvpb.ClaimRequest) initResult {
	err := f.withConnection(ctx, m, func(conn *grpc.ClientConn) error {
		short := ctx
		if len(f.members)-1 > maxWatching {
			var cancel context.CancelFunc
			short, cancel = context.WithTimeout(ctx, watchTime)
			defer cancel()
		}
		_, err := kvpb.NewRaftServiceClient(conn).Claim(short, req)
		return err
	})
	if err == nil {
		return initResult{outcome: initDone}
	}
	switch errorReason(err) {
	case "DEADLINE":
		return initResult{outcome: initWaiting}
	case "":
		// The connection has broken. The member has failed only if it does not answer on
		// another one.
		asks := &kvpb.ClaimRequest{Members: f.members, Force: f.force}
		if _, err := f.sendClaim(ctx, m, asks); err != nil {
			return initResult{outcome: initFailed, err: err}
		}
		return initResult{outcome: initWaiting}
	}
	return initResult{outcome: initFailed, err: err}
}

// notFounded is the error of an Init whose cluster has not committed its first entry: the
// node has failed, or has had no time to write it.
func (f *founder) notFounded(ctx context.Context, clusterID uint64, err error) error {
	self := f.s.n.self
	if ctx.Err() != nil {
		return fmt.Errorf("%w: node %d at %s is still writing the first entry of cluster %016x",
			errChangeUnknown, self.Id, self.Address, clusterID)
	}
	return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NODE_FAILED,
		fmt.Sprintf("node %d at %s could not make the cluster: %s. Once the cause is gone, start it and init again",
			self.Id, self.Address, err))
}

// failedHalfway is the error of an Init that has made the cluster and could not add all
// members: err, and the commands that do what is left.
func (f *founder) failedHalfway(err error, clusterID uint64) error {
	n := f.s.n
	left := ""
	_ = n.do(context.Background(), func() error { // unless the node has ended
		left = fmt.Sprintf("; what is left, with --endpoints %s: %s", n.self.Address, n.commandsFor(f.members))
		if n.store.carriesOn(f.members) {
			left += "; or the same init, which carries on"
		}
		return nil
	})
	st := status.Convert(toStatus(err, false)).Proto()
	st.Message = beginning(fmt.Sprintf("cluster %016x was made, but: %s%s", clusterID, st.Message, left), maxErrorBytes)
	return status.FromProto(st).Err()
}

// commandsFor returns the commands that an operator types to have these members as the
// voters.
func (n *node) commandsFor(members []*kvpb.Node) string {
	var ready []*kvpb.Node // who can vote at once
	progress := n.progressOf()
	for raftID, m := range n.store.members {
		if n.isVoter(raftID) || n.isCaughtUp(progress[raftID]) {
			ready = append(ready, m)
		}
	}
	var commands []string
	var ids []string
	for _, m := range members {
		ids = append(ids, fmt.Sprint(m.Id))
		if !containsNode(ready, m) {
			commands = append(commands, "add-learner "+fmt.Sprintf("%d=%s", m.Id, m.Address))
		}
	}
	commands = append(commands, "change-membership "+strings.Join(ids, " "))
	return strings.Join(commands, ", then ")
}

// voterNodes are the voters once no change of membership is running, by id.
func (n *node) voterNodes() []*kvpb.Node {
	var voters []*kvpb.Node
	for _, m := range sortedMembers(n.store.members) {
		if n.isVoter(m.RaftId) {
			voters = append(voters, m.Node)
		}
	}
	return voters
}

// containsNode reports whether a list has a node, by its id and address.
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
func formatNode(m *kvpb.Node) string { return fmt.Sprintf("%d=%s", m.GetId(), shown(m.GetAddress())) }

func formatNodes(nodes []*kvpb.Node) string {
	var names []string
	for _, m := range nodes {
		names = append(names, formatNode(m))
	}
	return strings.Join(names, " ")
}
