// The sub-commands on the members of a cluster, from init to transfer-leader.

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"raft-key-value/kvpb"
)

func (c *client) init(ctx context.Context) error {
	resp, err := c.cluster().Init(ctx, &kvpb.InitRequest{Members: c.nodes, Force: c.force})
	return c.printResponse(resp, err, fmt.Sprintf("a cluster is initialised, voters: %v\n", c.ids))
}

// addLearner prints meanwhile how far the learner has caught up.
func (c *client) addLearner(ctx context.Context) error {
	before, err := c.leadersView(ctx)
	if err != nil {
		return err
	}
	node := c.nodes[0]
	watch, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	watcher := *c.calls // c.calls changes the order of its endpoints at the same time.
	var watching sync.WaitGroup
	watching.Go(func() { c.watchLearner(watch, &watcher, node.Id) })
	resp, err := c.cluster().AddLearner(ctx, &kvpb.AddLearnerRequest{Node: node})
	stopWatching()
	watching.Wait()
	return c.printResponse(resp, err, learnerText(findMember(before, node.Id), node))
}

// learnerText says what add-learner has done to a node; before is the member that the
// node was before, or nil.
func learnerText(before *kvpb.MemberStatus, node *kvpb.Node) string {
	role := "learner"
	if before.GetVoter() {
		role = "voter"
	}
	text := fmt.Sprintf("node %d is a %s and has caught up", node.Id, role)
	oldAddress := before.GetNode().GetAddress()
	if before != nil && oldAddress != node.Address {
		text += fmt.Sprintf(", at %s in place of %s", node.Address, oldAddress)
	}
	return text + "\n"
}

// watchLearner prints how far a learner has caught up, until ctx ends.
func (c *client) watchLearner(ctx context.Context, calls *apiCaller, id uint64) {
	printed := ""
	var pause pauses
	for ctx.Err() == nil {
		view := takeSurvey(ctx, calls).views[calls.clusterID]
		progress := findMember(view, id).GetProgress()
		line := fmt.Sprintf("node %d: %d of %d entries", id, progress.GetMatchIndex(), view.GetLastIndex())
		if progress != nil && line != printed {
			c.progress("%s", line)
			printed = line
		}
		pause.wait(ctx)
	}
}

// leadersView is the metrics of the cluster's leader, or those of the first endpoint
// that is fit if the leader does not respond.
func (c *client) leadersView(ctx context.Context) (*kvpb.MetricsResponse, error) {
	r := c.calls.newRound(ctx)
	defer r.end()
	e := r.next()
	if e == nil {
		return nil, callError(r.replies)
	}
	c.calls.prefer(e.address)
	leads := e.metrics.Role == kvpb.Role_ROLE_LEADER
	if leads || e.metrics.Leader == nil {
		return e.metrics, nil
	}
	asked := c.calls.ask(ctx, []string{e.metrics.Leader.Address})
	defer closeAll(asked)
	leader := asked[0].metrics
	if leader.GetRole() == kvpb.Role_ROLE_LEADER && leader.GetClusterId() == e.metrics.ClusterId {
		return leader, nil
	}
	return e.metrics, nil
}

// changeMembership makes c's ids the voters, in place of those that the leader has
// now. If the membership is another one by then, a node refuses.
func (c *client) changeMembership(ctx context.Context) error {
	view, err := c.leadersView(ctx)
	if err != nil {
		return err
	}
	expected := membershipOf(view)
	others := c.otherVoters(expected)
	isDecided := c.retain || c.removeOthers
	if len(others) > 0 && !isDecided {
		retained := "them as learners"
		if len(others) == 1 {
			retained = "it as a learner"
		}
		return usageError("it would remove %s from the cluster: --remove-others does that, --retain keeps %s; "+
			"promote makes learners voters and leaves all others as they are", nodeList(others), retained)
	}
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{
		Members:  c.ids,
		Retain:   c.retain,
		Expected: expected,
	})
	return c.printResponse(resp, err, fmt.Sprintf("voters: %v\n", c.ids))
}

// otherVoters are the ids of the voters that are not among c's ids.
func (c *client) otherVoters(present *kvpb.Membership) []uint64 {
	var others []uint64
	for _, m := range present.Members {
		if m.Voter && !slices.Contains(c.ids, m.Node.Id) {
			others = append(others, m.Node.Id)
		}
	}
	return others
}

// membershipOf is who a cluster's members are once no change is running. A node
// that comes back is listed twice for a moment, with two raft IDs: the leader
// compares memberships as if it were listed once.
func membershipOf(m *kvpb.MetricsResponse) *kvpb.Membership {
	membership := &kvpb.Membership{}
	for _, s := range m.Members {
		if s.Voter || s.Learner { // A member that is neither is on its way out.
			membership.Members = append(membership.Members, &kvpb.ExpectedMember{Node: s.Node, Voter: s.Voter})
		}
	}
	slices.SortStableFunc(membership.Members, func(a, b *kvpb.ExpectedMember) int {
		return cmp.Compare(a.Node.GetId(), b.Node.GetId())
	})
	return membership
}

func (c *client) promote(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Promote: c.ids})
	return c.printResponse(resp, err, roleText(c.ids, "voter"))
}

func (c *client) demote(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Demote: c.ids})
	return c.printResponse(resp, err, roleText(c.ids, "learner"))
}

// roleText says which role nodes have, as in "nodes 1 and 2 are voters".
func roleText(ids []uint64, role string) string {
	if len(ids) == 1 {
		return fmt.Sprintf("%s is a %s\n", nodeList(ids), role)
	}
	return fmt.Sprintf("%s are %ss\n", nodeList(ids), role)
}

// nodeList names nodes, at least one, as in "nodes 1, 2 and 3".
func nodeList(ids []uint64) string {
	var words []string
	for _, id := range ids {
		words = append(words, formatID(id))
	}
	if len(words) == 1 {
		return "node " + words[0]
	}
	return "nodes " + listInWords(words)
}

func (c *client) remove(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Remove: c.ids})
	return c.printResponse(resp, err, fmt.Sprintf("node %d is removed\n", c.ids[0]))
}

func (c *client) transferLeader(ctx context.Context) error {
	resp, err := c.cluster().TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: c.ids[0]})
	return c.printResponse(resp, err, fmt.Sprintf("node %d leads\n", c.ids[0]))
}
