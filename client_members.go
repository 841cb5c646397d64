// The sub-commands on the members of a cluster, from init to transfer-leader.

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"raft-key-value/kvpb"
)

func (c *client) init(ctx context.Context) error {
	resp, err := c.cluster().Init(ctx, &kvpb.InitRequest{Members: c.nodes, Force: c.force})
	return c.show(resp, err, fmt.Sprintf("a cluster is initialised, voters: %v\n", c.ids))
}

// addLearner says meanwhile how far the learner has got.
func (c *client) addLearner(ctx context.Context) error {
	present, err := c.present(ctx)
	if err != nil {
		return err
	}
	id := c.ids[0]
	was := findMember(present, id)
	text := fmt.Sprintf("node %d is a %s and has caught up", id, oneOf(was.GetVoter(), "voter", "learner"))
	if old, now := was.GetNode().GetAddress(), c.nodes[0].Address; was != nil && old != now {
		text += fmt.Sprintf(", at %s in place of %s", now, old)
	}
	watch, done := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watcher := *c // Invoke sorts c's endpoints
	watching.Go(func() { watcher.watchLearner(watch, id) })
	defer watching.Wait()
	defer done()
	resp, err := c.cluster().AddLearner(ctx, &kvpb.AddLearnerRequest{Node: c.nodes[0]})
	return c.show(resp, err, text+"\n")
}

// watchLearner says how far a learner has got, until ctx ends.
func (c *client) watchLearner(ctx context.Context, id uint64) {
	for last := ""; ctx.Err() == nil; sleep(ctx, pollInterval) {
		best := c.survey(ctx).best[c.clusterID]
		progress := findMember(best, id).GetProgress()
		line := fmt.Sprintf("node %d: %d of %d entries", id, progress.GetMatchIndex(), best.GetLastIndex())
		if progress != nil && line != last {
			c.progress("%s", line)
			last = line
		}
	}
}

// present is the leader's view of the cluster, or else that of the first endpoint
// that can answer.
func (c *client) present(ctx context.Context) (*kvpb.MetricsResponse, error) {
	r := c.newRound(ctx, false)
	defer r.end()
	e := r.next()
	if e == nil {
		return nil, callError(r.answers, false, false)
	}
	c.prefer(e.address)
	if e.metrics.Role == kvpb.Role_ROLE_LEADER || e.metrics.Leader == nil {
		return e.metrics, nil
	}
	answers := c.ask(ctx, []string{e.metrics.Leader.Address})
	defer closeAll(answers)
	led := answers[0].metrics
	if led.GetRole() == kvpb.Role_ROLE_LEADER && led.GetClusterId() == c.clusterID {
		return led, nil
	}
	return e.metrics, nil
}

// changeMembership makes c's ids the voters of the membership that it sees: a node
// refuses if another one is there by then.
func (c *client) changeMembership(ctx context.Context) error {
	present, err := c.present(ctx)
	if err != nil {
		return err
	}
	expected := membershipOf(present)
	var others []uint64
	for _, m := range expected.Members {
		if m.Voter && !slices.Contains(c.ids, m.Node.Id) {
			others = append(others, m.Node.Id)
		}
	}
	if len(others) > 0 && !c.retain && !c.removeOthers {
		return usageError("it would remove %s from the cluster: --remove-others does that, --retain keeps %s; "+
			"promote makes learners voters and leaves all others as they are",
			nodeList(others), oneOf(len(others) == 1, "it as a learner", "them as learners"))
	}
	resp, err := c.cluster().ChangeMembership(ctx,
		&kvpb.ChangeMembershipRequest{Members: c.ids, Retain: c.retain, Expected: expected})
	return c.show(resp, err, fmt.Sprintf("voters: %v\n", c.ids))
}

// membershipOf is who a cluster's members are once no change is running. A node
// that comes back has two lives there for a moment: the leader counts them as one.
func membershipOf(m *kvpb.MetricsResponse) *kvpb.Membership {
	membership := &kvpb.Membership{}
	for _, s := range m.Members {
		if s.Voter || s.Learner { // else it is on its way out
			membership.Members = append(membership.Members, &kvpb.ExpectedMember{Node: s.Node, Voter: s.Voter})
		}
	}
	slices.SortStableFunc(membership.Members, func(a, b *kvpb.ExpectedMember) int {
		return cmp.Compare(a.Node.GetId(), b.Node.GetId())
	})
	return membership
}

// nodeList names nodes, as in "nodes 1, 2 and 3".
func nodeList(ids []uint64) string {
	var words []string
	for _, id := range ids {
		words = append(words, strconv.FormatUint(id, 10))
	}
	last := len(words) - 1
	if last == 0 {
		return "node " + words[0]
	}
	return "nodes " + strings.Join(words[:last], ", ") + " and " + words[last]
}

func (c *client) promote(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Promote: c.ids})
	return c.show(resp, err, nodeList(c.ids)+oneOf(len(c.ids) == 1, " is a voter\n", " are voters\n"))
}

func (c *client) demote(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Demote: c.ids})
	return c.show(resp, err, nodeList(c.ids)+oneOf(len(c.ids) == 1, " is a learner\n", " are learners\n"))
}

func (c *client) remove(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Remove: c.ids})
	return c.show(resp, err, fmt.Sprintf("node %d is removed\n", c.ids[0]))
}

func (c *client) transferLeader(ctx context.Context) error {
	resp, err := c.cluster().TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: c.ids[0]})
	return c.show(resp, err, fmt.Sprintf("node %d leads\n", c.ids[0]))
}
