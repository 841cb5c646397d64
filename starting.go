// How a node becomes a member by flags: the plan that it was started with, and the starter,
// which carries it out. Both may stay for ever: in a cluster, the plan means nothing.

package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

const (
	// planPause is how often the starter looks whether there is something to do.
	planPause = 500 * time.Millisecond
	// firstTryPause and longestTryPause are the longest first pause between two tries, and the
	// longest of all: they double. The nodes of a cluster are started one after the other, so
	// most tries are made too early.
	firstTryPause   = 250 * time.Millisecond
	longestTryPause = 4 * time.Second
	// longestRefusedPause is longestTryPause for what only an operator can change.
	longestRefusedPause = 30 * time.Second
	// tryTime bounds a try that waits for others.
	tryTime = claimTime
	// sayAgain is how often the log says the same of why a node is in no cluster.
	sayAgain = 30 * time.Second
)

// startPlan is which cluster a node was started to become a member of. The zero plan: it waits
// for init or add-learner.
type startPlan struct {
	members   []*kvpb.Node // by --initial-cluster: of the new cluster, by id
	join      []string     // by --join: addresses of members of the cluster
	asLearner bool         // by --join-as: it does not become a voter
	joinsAs   bool         // --join-as is given
}

// planFlags are the flags that make the plan.
func planFlags(fs *flag.FlagSet, p *startPlan) {
	setMembers := func(s string) (err error) {
		p.members, err = parseMembers(s)
		return err
	}
	fs.Func("initial-cluster", "`ID=HOST:PORT,...`, all voters of a new cluster, this node among them: "+
		"with the same list, they form it once all are up. A node that has a cluster ignores it", setMembers)
	setJoin := func(s string) (err error) {
		p.join, err = parseJoin(s)
		return err
	}
	fs.Func("join", "`HOST:PORT,...` of members of a cluster, which this node asks to add it, "+
		"and where members are that have moved. A node that was removed is not added", setJoin)
	setJoinAs := func(s string) error {
		if s != "voter" && s != "learner" {
			return errors.New("want voter or learner")
		}
		p.asLearner = s == "learner"
		p.joinsAs = true
		return nil
	}
	fs.Func("join-as", "`ROLE` that this node gets by --join: voter, once it has caught up, or learner (default voter)",
		setJoinAs)
}

// parseJoin parses addresses of members, with commas between them.
func parseJoin(text string) ([]string, error) {
	addresses := strings.Split(text, ",")
	if len(addresses) > maxMembers {
		return nil, fmt.Errorf("there are %d addresses, the limit is %d", len(addresses), maxMembers)
	}
	for i, address := range addresses {
		if strings.Contains(address, "=") {
			return nil, fmt.Errorf("%s: want HOST:PORT, without an id, which --initial-cluster has", quoteInput(address))
		}
		if err := checkMemberAddress(address); err != nil {
			return nil, err
		}
		if slices.Contains(addresses[:i], address) {
			return nil, fmt.Errorf("%s stands there twice", quoteInput(address))
		}
	}
	return addresses, nil
}

// parseMembers parses members of a cluster, each ID=HOST:PORT, with commas between them.
func parseMembers(text string) ([]*kvpb.Node, error) {
	var members []*kvpb.Node
	for part := range strings.SplitSeq(text, ",") {
		number, address, _ := strings.Cut(part, "=")
		id, err := strconv.ParseUint(number, 10, 64)
		if err != nil || id == 0 {
			return nil, fmt.Errorf("%s: want ID=HOST:PORT, an ID being a positive number", quoteInput(part))
		}
		if err := checkMemberAddress(address); err != nil {
			return nil, err
		}
		members = append(members, &kvpb.Node{Id: id, Address: address})
	}
	if err := checkMembers(members); err != nil {
		return nil, errors.New(status.Convert(err).Message())
	}
	return sortedNodes(members), nil
}

// checkPlan checks the flags that make the plan, and that the plan is for this node. With a data
// directory, that waits until it is known what is there: a node that is in a cluster ignores the
// plan, and may have moved since (heedPlan).
func (o *options) checkPlan() error {
	if o.plan.members != nil && o.plan.join != nil {
		return fmt.Errorf("%s forms a cluster and %s joins one that there is: want one of them",
			o.nameOf("initial-cluster"), o.nameOf("join"))
	}
	if o.plan.joinsAs && o.plan.join == nil {
		return fmt.Errorf("%s goes with --join", o.nameOf("join-as"))
	}
	if o.durable {
		return nil
	}
	return o.checkPlanIsOwn()
}

// heedPlan checks that the plan is for this node, once its data directory is open.
func (n *node) heedPlan() error {
	err := n.opts.checkPlanIsOwn()
	if err == nil {
		return nil
	}
	if n.store.clusterID == 0 {
		return misuse{err}
	}
	n.logger.Warn("this node is in a cluster already, and ignores a flag that would be refused if it were new", "flag", err)
	return nil
}

// checkPlanIsOwn checks that the plan is for this node.
func (o *options) checkPlanIsOwn() error {
	isOwn := func(address string) bool { return address == o.addr || address == o.advertise }
	if o.plan.join != nil && !slices.ContainsFunc(o.plan.join, func(a string) bool { return !isOwn(a) }) {
		return fmt.Errorf("%s names only this node: want members of the cluster that it is to join", o.nameOf("join"))
	}
	if o.plan.members == nil {
		return nil
	}
	name := o.nameOf("initial-cluster")
	address := o.addr
	if o.advertise != "" {
		address = o.advertise
	}
	_, port, err := splitListenAddress(address)
	if err != nil {
		return err
	}
	if port == 0 {
		return fmt.Errorf("%s needs the port of this node: %s picks one", name, address)
	}
	self := &kvpb.Node{Id: o.id, Address: address}
	for _, m := range o.plan.members {
		sameID := m.Id == self.Id
		sameAddress := m.Address == self.Address
		if sameID && sameAddress {
			return nil
		}
		if sameID || sameAddress {
			return fmt.Errorf("%s has %s, and this node is %s, by %s and %s: make them agree, letter by letter",
				name, formatNode(m), formatNode(self), o.nameOf("id"), o.advertisedBy())
		}
	}
	return fmt.Errorf("%s does not name this node, %s", name, formatNode(self))
}

// advertisedBy is the flag, or the variable, that says at which address others reach this node.
func (o *options) advertisedBy() string {
	if o.advertise != "" {
		return o.nameOf("advertise")
	}
	return o.nameOf("addr")
}

// excludes reports whether the node was started for another cluster than one that an Init of
// these members makes.
func (p *startPlan) excludes(members []*kvpb.Node) bool {
	isForInit := p.members != nil && sameNodes(p.members, members)
	return !isForInit && !p.isNone()
}

// isNone reports whether there is no plan.
func (p *startPlan) isNone() bool { return p.members == nil && p.join == nil }

// String says what the node does while it is in no cluster; empty: it waits.
func (p *startPlan) String() string {
	if p.members != nil {
		return "this node is in no cluster: it forms one of " + formatNodes(p.members) +
			" once all of them are up, unless one of them is in a cluster"
	}
	if p.join != nil {
		return "this node is in no cluster: it asks " + strings.Join(p.join, ", ") + " to add it, as --join says"
	}
	return ""
}

// starter carries out a node's plan, in one goroutine.
type starter struct {
	s       *server
	plan    *startPlan
	pause   tryPauses
	said    sayings // what keeps the node from a cluster
	joining sayings // which cluster has taken it in
}

func newStarter(s *server) *starter {
	return &starter{s: s, plan: &s.n.opts.plan}
}

// run carries out the plan whenever the node is in no cluster, until ctx ends: a node in memory
// may be removed from one, or drop one that never goes on, also one that has no plan.
func (b *starter) run(ctx context.Context) {
	if b.plan.isNone() && b.s.n.durable.disk != nil {
		return
	}
	for ctx.Err() == nil {
		act := b.next()
		if act == nil {
			b.settle()
			sleep(ctx, planPause)
			continue
		}
		err := act(ctx)
		if err != nil && ctx.Err() == nil {
			b.say(err)
		}
		sleep(ctx, b.pause.next(longestPauseAfter(err))) // also without an error: it takes time to become a member
	}
}

// next is what is to be done now; nil: nothing.
func (b *starter) next() func(context.Context) error {
	p := b.s.n.status.latest.Load()
	isMember := p.clusterID != 0
	switch {
	case b.s.n.founderMayBeLost(p):
		return b.giveUp
	case b.plan.members != nil && b.mustForm(p):
		return b.form
	case b.plan.join != nil && !isMember:
		return b.join
	case b.plan.join != nil && p.longLeaderless():
		return b.find
	}
	return nil
}

// longestPauseAfter is the longest pause after a try that ended with an error. What only an
// operator can change is tried seldom.
func longestPauseAfter(err error) time.Duration {
	switch errorReason(err) {
	case "REMOVED_MEMBER", "MEMBER_EXISTS":
		return longestRefusedPause
	}
	return longestTryPause
}

// settle forgets what kept the node from a cluster, now that it is in one.
func (b *starter) settle() {
	b.pause = tryPauses{}
	b.said = sayings{}
	b.joining = sayings{}
	b.s.n.status.waitsFor.Store(nil)
}

// say tells the log, and whoever asks for the node's metrics, what keeps it from a cluster.
func (b *starter) say(err error) {
	text := status.Convert(err).Message()
	b.s.n.status.waitsFor.Store(&text)
	if !b.said.isDue(text, time.Now()) {
		return
	}
	said := b.state(b.s.n.status.latest.Load())
	level := slog.LevelWarn
	if mayPass(err) || said == staysSo {
		level = slog.LevelInfo
	}
	b.s.n.logger.Log(context.Background(), level, said, "err", text)
}

// What the log says of a node whose try has failed.
const (
	notYet   = "this node is not a member yet, and tries again"
	halfWay  = "not all members are in the cluster yet: this node tries again"
	staysSo  = "an operator has changed the membership while the cluster was formed: this node leaves it as it is"
	searches = "this node has no leader, and asks where the members are now"
	orphaned = "the cluster was being formed and has no leader: this node drops it once all its members say that " +
		"it never goes on, or when this node is restarted"
)

// state is what the log says of this node once a try has failed.
func (b *starter) state(p *published) string {
	switch {
	case p.clusterID == 0:
		return notYet
	case b.s.n.founderMayBeLost(p):
		return orphaned
	case b.plan.join != nil:
		return searches
	case b.mustForm(p):
		return halfWay
	}
	return staysSo
}

// mayPass reports whether an error is one that the start of a cluster has in any case: others
// are not up yet, or are at it, too.
func mayPass(err error) bool {
	switch errorReason(err) {
	case "UNREACHABLE", "DEADLINE", "INIT_IN_PROGRESS", "NO_LEADER", "NOT_INITIALIZED", "CHANGE_IN_PROGRESS":
		return true
	}
	return false
}

// tryPauses are the pauses between tries. Each is random, so that nodes that were started
// together do not try together. The zero value is that before the first.
type tryPauses struct {
	limit time.Duration // of the last pause
}

func (p *tryPauses) next(longest time.Duration) time.Duration {
	p.limit = min(max(2*p.limit, firstTryPause), longest)
	return p.limit/2 + rand.N(p.limit/2)
}

// sayings say whether something is to be said: if it is new, but not more often than once in
// rareLogInterval, or was last said long ago.
type sayings struct {
	last string
	at   time.Time
}

func (s *sayings) isDue(text string, now time.Time) bool {
	age := now.Sub(s.at)
	isNew := text != s.last && age > rareLogInterval
	if !isNew && age < sayAgain {
		return false
	}
	s.last = text
	s.at = now
	return true
}

// mustForm reports whether there is a cluster to be formed: the node is in none, or the one that
// it is in was made by an Init of these members, which is half way.
func (b *starter) mustForm(p *published) bool {
	isHalfWay := p.founding != nil && sameNodes(p.founding, b.plan.members)
	return p.clusterID == 0 || isHalfWay
}

// form makes the Init of the plan's members, as an operator might. The head of init.go says why
// there is never a second cluster, though all members do it.
func (b *starter) form(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	f := newFounder(b.s, &kvpb.InitRequest{Members: b.plan.members, Planned: true})
	_, err := f.run(ctx)
	return err
}

// warnOfBeginning says that a cluster begins with nothing. If one of the same nodes was there
// before, none of them remembers it.
func (f *founder) warnOfBeginning(clusterID uint64) {
	n := f.s.n
	text := "the cluster begins anew, with no keys: if these nodes were in one before, what it had in memory is lost"
	if n.durable.disk != nil {
		text = "the cluster begins anew, with no keys: all data directories were empty. " +
			"If they should not have been, stop all nodes and see whether their disks are mounted"
	}
	n.logger.Warn(text, "cluster", fmt.Sprintf("%016x", clusterID), "members", formatNodes(f.members))
}

// noteOtherList logs now and then that a founder has another list than this node.
func (n *node) noteOtherList(req *kvpb.ClaimRequest) {
	if n.clock.now-n.claims.otherListSaid < n.ticksOf(sayAgain) {
		return
	}
	n.claims.otherListSaid = n.clock.now
	n.logger.Warn("a node forms a cluster of others than this node was started for: start them with the same",
		"founder", formatNode(req.GetFounder().GetNode()), "there", beginning(formatNodes(req.Members), maxErrorBytes),
		"here", formatNodes(n.claims.plan.members))
}

// founderMayBeLost reports whether the founder of this node's cluster may have lost that half way:
// this node, in memory and as far as it knows no voter, has had no leader for long.
func (n *node) founderMayBeLost(p *published) bool {
	isHalfWay := len(p.founding) > 0 && n.durable.disk == nil
	isLeaderless := p.lead == 0 && p.longLeaderless()
	isVoter := slices.Contains(p.conf.GetVoters(), p.raftID)
	isJoint := len(p.conf.GetVotersOutgoing()) > 0
	return isHalfWay && isLeaderless && !isVoter && !isJoint
}

// giveUp has the node drop its cluster if the founder, in memory, has lost that before there was
// another voter. Such a cluster never goes on, and this node keeps the members from forming
// another one. But this node's configuration may be old: another member may be a voter, and need
// this node's vote. So all members of the Init are asked.
func (b *starter) giveUp(ctx context.Context) error {
	if b.plan.join != nil {
		_ = b.find(ctx) // perhaps there is a leader where they are
	}
	p := b.s.n.status.latest.Load()
	f := newFounder(b.s, &kvpb.InitRequest{Members: p.founding})
	survey := func() ([]surveyAnswer, error) {
		ctx, cancel := context.WithTimeout(ctx, tryTime)
		defer cancel()
		endTurn, err := f.waitForTurn(ctx, b.s.surveying)
		if err != nil {
			return nil, err
		}
		defer endTurn()
		return f.survey(ctx)
	}
	return b.conclude(ctx, p.clusterID, whyGoesOn(p.clusterID, f.members, survey))
}

// conclude ends giveUp, which has asked why the cluster may go on; nil: it never does. Whatever the
// answers were, there is nothing to say if this node has a leader by now, or is in no cluster.
func (b *starter) conclude(ctx context.Context, clusterID uint64, goesOn error) error {
	if goesOn == nil {
		return b.s.n.do(ctx, func() error { return b.s.n.dropFounding(clusterID) })
	}
	if !b.s.n.founderMayBeLost(b.s.n.status.latest.Load()) {
		return nil
	}
	return goesOn
}

// whyGoesOn says why a cluster may go on, of which an Init has made a part; nil: it never does.
//
// The answers to one survey are not of one moment: a member may have given its own, become a voter,
// and seen the founder die before that one's next life was asked. Once that has answered, whoever
// can go on without the founder knows it: a member that acknowledged the entry that ends a joint
// configuration has applied the one that began it. So a second survey sees it.
func whyGoesOn(clusterID uint64, members []*kvpb.Node, survey func() ([]surveyAnswer, error)) error {
	for range 2 {
		answers, err := survey()
		if err != nil {
			return err
		}
		if err := mayGoOn(clusterID, members, answers); err != nil {
			return err
		}
	}
	return nil
}

// mayGoOn says why a cluster may go on, by the answers of all members of its Init. Nil: none of its
// voters is in it any more, and all who are agree who these are. That a stranger calls a member is
// seen only if nobody else has called it since, and if nothing else refuses the survey there.
func mayGoOn(clusterID uint64, members []*kvpb.Node, answers []surveyAnswer) error {
	var voters []*kvpb.Node
	var isIn []*kvpb.Node
	for i, a := range answers {
		m := members[i]
		if a.err != nil {
			return a.err
		}
		isNamed := a.resp.Verdict == kvpb.ClaimVerdict_CLAIM_VERDICT_NAMED
		if isNamed && !containsNode(members, a.resp.By) {
			return fmt.Errorf("node %d is called by node %d at %s, which was not to be a member",
				m.Id, a.resp.By.GetId(), shown(a.resp.By.GetAddress()))
		}
		isMember := a.resp.Verdict == kvpb.ClaimVerdict_CLAIM_VERDICT_MEMBER
		if !isMember || a.resp.ClusterId != clusterID {
			continue
		}
		isIn = append(isIn, m)
		if !sameNodes(a.resp.Members, members) {
			return fmt.Errorf("an operator has changed the membership, as node %d knows", m.Id)
		}
		if voters != nil && !sameNodes(voters, a.resp.Voters) {
			return fmt.Errorf("node %d knows the voters %s, and another member %s",
				m.Id, formatNodes(a.resp.Voters), formatNodes(voters))
		}
		voters = a.resp.Voters
	}
	for _, v := range voters {
		if !containsNode(members, v) {
			return fmt.Errorf("node %d at %s, a voter, was not asked", v.Id, shown(v.Address))
		}
		if containsNode(isIn, v) {
			return fmt.Errorf("node %d at %s, a voter, is still in the cluster", v.Id, shown(v.Address))
		}
	}
	return nil
}

// dropFounding drops a cluster that never goes on, as giveUp knows, unless this node has heard of
// a leader meanwhile. It returns an error if this node may have the only copy that is left of a write
// that the founder and it have acknowledged, both as voters.
func (n *node) dropFounding(clusterID uint64) error {
	hasOther := n.hasOtherChange() // it may take entries in, so it comes first
	now := &published{glance: n.glance(), founding: n.store.founding}
	if now.clusterID != clusterID || !n.founderMayBeLost(now) {
		return nil
	}
	if hasOther {
		return fmt.Errorf("the membership was being changed when the founder, %s, lost the cluster, and it has perhaps "+
			"acknowledged writes since: this node keeps what it has of them until it is restarted", formatNodes(n.voterNodes()))
	}
	n.logger.Warn("the node that was forming this cluster has lost it: this node drops it, too, "+
		"and waits to be in another",
		"cluster", fmt.Sprintf("%016x", clusterID), "founder", formatNodes(n.voterNodes()))
	n.leaveCluster()
	return nil
}

// hasOtherChange reports whether the log has a change of the membership, not applied, that does more
// than add members of the Init as learners. It may be committed, though this node has not heard so.
func (n *node) hasOtherChange() bool {
	log := n.drainedLog()
	if log == nil {
		return true
	}
	return slices.ContainsFunc(log.entries, func(e *raftpb.Entry) bool {
		isChange := e.GetType() == raftpb.EntryConfChangeV2
		return isChange && e.GetIndex() > n.store.index && !addsLearners(e, n.store.founding)
	})
}

// addsLearners reports whether a change of the membership adds learners, of these nodes alone.
func addsLearners(e *raftpb.Entry, of []*kvpb.Node) bool {
	change, ctx, err := decodeConfChange(e)
	if err != nil || len(change.GetChanges()) == 0 {
		return false
	}
	isOther := func(c *raftpb.ConfChangeSingle) bool { return c.GetType() != raftpb.ConfChangeAddLearnerNode }
	isStranger := func(m *kvpb.Member) bool { return !containsNode(of, m.Node) }
	return !slices.ContainsFunc(change.GetChanges(), isOther) && !slices.ContainsFunc(ctx.Members, isStranger)
}

// sortedNodes returns nodes in ascending order of their ids.
func sortedNodes(nodes []*kvpb.Node) []*kvpb.Node {
	return slices.SortedFunc(slices.Values(nodes), func(a, b *kvpb.Node) int { return cmp.Compare(a.Id, b.Id) })
}
