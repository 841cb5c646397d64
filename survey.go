// The sub-commands that ask how nodes are: status and health.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"raft-key-value/kvpb"
)

// memberRow is what survey learned of one node, in the format of status.
type memberRow struct {
	NodeID    uint64 `json:"node_id,string"`
	Address   string `json:"address"`
	Reachable bool   `json:"reachable"`
	Error     string `json:"error"`
	// ClusterID is the cluster by which the row is judged: the node's own, or else
	// the one that lists it; 0: there is none.
	ClusterID uint64         `json:"cluster_id,string"`
	Metrics   json.Marshaler `json:"metrics"`
	metrics   *kvpb.MetricsResponse
}

// survey is what the endpoints, and all members that they name, say of
// themselves.
type survey struct {
	rows []*memberRow
	best map[uint64]*kvpb.MetricsResponse // by cluster: its newest leader's, or else those of some other node
}

// listedMember is a member of a cluster, as another member has it.
type listedMember struct{ cluster, id uint64 }

// survey asks the endpoints and then all others that they name.
func (c *client) survey(ctx context.Context) *survey {
	found := c.askAll(ctx)
	s := &survey{best: map[uint64]*kvpb.MetricsResponse{}}
	listings := map[string][]listedMember{} // by address
	for _, e := range found {
		cluster := e.metrics.GetClusterId()
		if cluster == 0 {
			continue
		}
		s.best[cluster] = better(s.best[cluster], e.metrics)
		for _, m := range e.metrics.Members {
			l, at := listedMember{cluster, m.Node.GetId()}, m.Node.GetAddress()
			if !slices.Contains(listings[at], l) {
				listings[at] = append(listings[at], l)
			}
		}
	}
	for _, e := range found {
		s.add(e, listings[e.address])
	}
	slices.SortFunc(s.rows, s.compare)
	return s
}

// askAll asks the endpoints, then the members that they name, and so on. A node
// that has two addresses is in the result once.
func (c *client) askAll(ctx context.Context) []*endpoint {
	var found []*endpoint
	asked, lives := map[string]bool{}, map[uint64]bool{}
	for next := c.endpoints; len(next) > 0; {
		answers := c.ask(ctx, next)
		closeAll(answers)
		for _, e := range answers {
			asked[e.address] = true
			if id := e.metrics.GetRaftId(); !lives[id] {
				found = append(found, e)
				lives[id] = id != 0
			}
		}
		others := map[string]bool{}
		for _, e := range found {
			for _, m := range e.metrics.GetMembers() {
				if at := m.Node.GetAddress(); !asked[at] && !lives[m.RaftId] {
					others[at] = true
				}
			}
		}
		next = slices.Sorted(maps.Keys(others))
	}
	return found
}

// add adds the rows for an address: of the node that answers there, and of members
// that should.
func (s *survey) add(e *endpoint, listed []listedMember) {
	if e.err != nil {
		if len(listed) == 0 {
			listed = []listedMember{{}} // nobody knows who should answer
		}
		for _, l := range listed {
			s.rows = append(s.rows, &memberRow{
				NodeID: l.id, Address: e.address, Error: readable(e.err).Error(), ClusterID: l.cluster,
			})
		}
		return
	}
	m := e.metrics
	row := &memberRow{
		NodeID: m.GetNode().GetId(), Address: e.address, Reachable: true, ClusterID: m.ClusterId,
		Metrics: protoJSON{m}, metrics: m,
	}
	says := fmt.Sprintf("node %d answers there", row.NodeID)
	if m.ClusterId != 0 {
		says = fmt.Sprintf("node %d of cluster %016x answers there", row.NodeID, m.ClusterId)
	}
	for _, l := range listed {
		if row.ClusterID == 0 && l.id == row.NodeID {
			row.ClusterID = l.cluster // it has come back, and is not taken back yet
		}
	}
	for _, l := range listed {
		if l != (listedMember{row.ClusterID, row.NodeID}) {
			s.rows = append(s.rows, &memberRow{NodeID: l.id, Address: e.address, Error: says, ClusterID: l.cluster})
		}
	}
	if row.ClusterID != 0 || len(listed) == 0 { // or else it is nobody's, in the place of a member
		s.rows = append(s.rows, row)
	}
}

// compare orders rows: by cluster if there are several, then by node.
func (s *survey) compare(a, b *memberRow) int {
	if order := cmp.Compare(a.ClusterID-1, b.ClusterID-1); len(s.best) > 1 && order != 0 { // 0 comes last
		return order
	}
	return cmp.Or(cmp.Compare(a.NodeID-1, b.NodeID-1), strings.Compare(a.Address, b.Address))
}

// better is which of two answers of one cluster knows more. The numbers of the
// roles end with the leader's.
func better(a, b *kvpb.MetricsResponse) *kvpb.MetricsResponse {
	newer := cmp.Or(cmp.Compare(a.GetRole(), b.GetRole()), cmp.Compare(a.GetTerm(), b.GetTerm()))
	return oneOf(newer < 0, b, a)
}

func findMember(m *kvpb.MetricsResponse, id uint64) *kvpb.MemberStatus {
	if i := slices.IndexFunc(m.GetMembers(), func(s *kvpb.MemberStatus) bool { return s.Node.GetId() == id }); i >= 0 {
		return m.Members[i]
	}
	return nil
}

func (c *client) status(ctx context.Context) error {
	s := c.survey(ctx)
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tADDRESS\tHEALTH\tVOTER\tROLE\tLEADER\tTERM\tAPPLIED\tVERSION\tKEYS\tDISK\tCLUSTER\tREASON")
	for _, r := range s.rows {
		fmt.Fprintln(w, strings.Join(s.cells(r), "\t"))
	}
	_ = w.Flush() // A strings.Builder takes everything.
	for _, m := range s.laggards() {
		fmt.Fprintf(&table, "node %d is %s\n", m.Node.GetId(), m.Lagging)
	}
	err := c.print(map[string]any{"members": s.rows}, regexp.MustCompile(" +\n").ReplaceAllString(table.String(), "\n"))
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(s.rows, func(r *memberRow) bool { return r.Reachable }) {
		return s.noAnswer()
	}
	if len(s.best) == 0 {
		c.warn("no node that was asked is in a cluster; --endpoints asks others")
	}
	var members []clusterMember
	for _, r := range s.rows {
		if cluster := r.metrics.GetClusterId(); cluster != 0 {
			members = append(members, clusterMember{cluster, r.NodeID, r.Address})
		}
	}
	return oneCluster(members)
}

// laggards are the members that their cluster's leader says are too slow to catch up.
func (s *survey) laggards() []*kvpb.MemberStatus {
	var slow []*kvpb.MemberStatus
	for _, id := range slices.Sorted(maps.Keys(s.best)) {
		for _, m := range s.best[id].GetMembers() {
			if m.Lagging != "" {
				slow = append(slow, m)
			}
		}
	}
	return slow
}

// cells are a row of the table.
func (s *survey) cells(r *memberRow) []string {
	const unknown = "-"
	known := func(n uint64) string { return oneOf(n == 0, unknown, strconv.FormatUint(n, 10)) }
	voter := oneOf(findMember(s.best[r.ClusterID], r.NodeID).GetVoter(), "yes", "no")
	if !r.Reachable && r.NodeID == 0 {
		voter = unknown
	}
	cluster := oneOf(r.ClusterID == 0, unknown, fmt.Sprintf("%016x", r.ClusterID))
	start := []string{known(r.NodeID), r.Address}
	if !r.Reachable {
		return slices.Concat(start, []string{"unreachable", voter},
			slices.Repeat([]string{unknown}, 7), []string{cluster, r.Error})
	}
	m := r.metrics
	store := slices.Repeat([]string{unknown}, 3)
	if m.ClusterId != 0 {
		store = nil
		for _, n := range []uint64{m.AppliedIndex, m.Version, m.Keys} {
			store = append(store, strconv.FormatUint(n, 10))
		}
	}
	role := strings.ToLower(strings.TrimPrefix(m.Role.String(), "ROLE_"))
	return slices.Concat(start,
		[]string{oneOf(m.Healthy, "ok", "unhealthy"), voter, role, known(m.Leader.GetId()), known(m.Term)},
		store, []string{oneOf(m.Durable, "yes", "no"), cluster, m.UnhealthyReason})
}

// noAnswer is the error if no node has answered.
func (s *survey) noAnswer() error {
	var answers []reply
	for _, r := range s.rows {
		answers = append(answers, reply{Endpoint: r.Address, Error: r.Error})
	}
	e := callError(answers, false, false)
	return e.say("no node answered: " + e.Text)
}

// clusterMember is a node that has said that it is in a cluster.
type clusterMember struct {
	cluster, id uint64
	address     string
}

// oneCluster returns an error if nodes are in several clusters.
func oneCluster(members []clusterMember) error {
	nodes := map[uint64][]string{}
	for _, m := range members {
		nodes[m.cluster] = append(nodes[m.cluster], fmt.Sprintf("%d=%s", m.id, m.address))
	}
	if len(nodes) < 2 {
		return nil
	}
	var clusters []string
	for _, id := range slices.Sorted(maps.Keys(nodes)) {
		clusters = append(clusters, fmt.Sprintf("in cluster %016x: %s", id, strings.Join(nodes[id], ", ")))
	}
	return &commandError{
		Text:   fmt.Sprintf("these nodes are in %d clusters, not in one: %s", len(nodes), strings.Join(clusters, "; ")),
		Status: exitNotDone,
	}
}

func oneOf[T any](b bool, yes, no T) T {
	if b {
		return yes
	}
	return no
}
