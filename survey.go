// What nodes say of themselves and of each other, and the sub-command status, which
// prints it.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// survey is what the endpoints, and all members that they name, say of themselves.
type survey struct {
	rows []*memberRow
	// views has a view of each cluster, by its id: the metrics of its leader, of the
	// highest term if several lead, or else those of some other member.
	views map[uint64]*kvpb.MetricsResponse
}

// memberRow is what is known of one node, in the format of status.
type memberRow struct {
	NodeID    uint64 `json:"node_id,string"` // 0: not known
	Address   string `json:"address"`
	Reachable bool   `json:"reachable"`
	Error     string `json:"error"`
	// ClusterID is the cluster by which the row is judged: the node's own, or else
	// the one that lists the node; 0: there is none.
	ClusterID uint64 `json:"cluster_id,string"`
	// CertificateEndsSoon says that the node's certificate ends within certificateWarning, by
	// the clock here, or has ended.
	CertificateEndsSoon bool `json:"certificate_ends_soon"`
	// Role is leader, follower, learner, candidate, or uninitialized, as the node says itself; else
	// voter, learner or leaving, as it is listed; empty: it is not known.
	Role string `json:"role"`
	// Lag is how many entries of the leader's log the member has not stored; empty: it is not known.
	Lag     string         `json:"lag"`
	Metrics json.Marshaler `json:"metrics"` // of metrics; nil: the node is not reachable

	metrics *kvpb.MetricsResponse
	failure error // why the node is not reachable; Error is its text
}

// listedMember is a member of a cluster, as another member lists it.
type listedMember struct {
	cluster uint64
	id      uint64
}

// takeSurvey asks the endpoints and then all others that they name.
func takeSurvey(ctx context.Context, calls *apiCaller) *survey {
	return newSurvey(askEverybody(ctx, nil, calls.endpoints, func(addresses []string) []*endpoint {
		endpoints := calls.ask(ctx, addresses)
		closeAll(endpoints)
		return endpoints
	}))
}

// newSurvey puts together what nodes have answered.
func newSurvey(asked []*endpoint) *survey {
	s := &survey{views: map[uint64]*kvpb.MetricsResponse{}}
	listed := map[string][]listedMember{} // by address
	now := time.Now()
	for _, e := range asked {
		cluster := e.metrics.GetClusterId()
		if cluster == 0 {
			continue
		}
		s.views[cluster] = newerView(s.views[cluster], e.metrics)
		for _, m := range e.metrics.Members {
			address := m.Node.GetAddress()
			member := listedMember{cluster, m.Node.GetId()}
			if !slices.Contains(listed[address], member) {
				listed[address] = append(listed[address], member)
			}
		}
	}
	for _, e := range asked {
		if e.err != nil {
			s.addUnreachable(e, listed[e.address])
		} else {
			s.addReachable(e, listed[e.address], now)
		}
	}
	slices.SortFunc(s.rows, s.compare)
	for _, r := range s.rows {
		r.Role = s.roleOf(r)
		r.Lag = s.lagOf(r)
	}
	return s
}

// roleOf is what a node says of itself, or is listed as.
func (s *survey) roleOf(r *memberRow) string {
	if r.Reachable {
		return roleName(r.metrics.Role)
	}
	m := findMember(s.views[r.ClusterID], r.NodeID)
	switch {
	case m == nil:
		return ""
	case m.Voter:
		return "voter"
	case m.VoterOutgoing:
		return "leaving"
	}
	return "learner"
}

// askEverybody asks the nodes at some addresses for their metrics, then the members that they
// name, and so on, besides those that have been asked. A node that has two addresses is in the
// result once.
func askEverybody(ctx context.Context, asked []*endpoint, next []string, ask func([]string) []*endpoint) []*endpoint {
	var found []*endpoint
	addresses := map[string]bool{} // that were asked
	raftIDs := map[uint64]bool{}   // of the nodes that answered
	take := func(endpoints []*endpoint) {
		for _, e := range endpoints {
			addresses[e.address] = true
			id := e.metrics.GetRaftId()
			if raftIDs[id] {
				continue
			}
			found = append(found, e)
			if id != 0 {
				raftIDs[id] = true
			}
		}
	}
	take(asked)
	for len(next) > 0 && ctx.Err() == nil {
		take(ask(next))
		others := map[string]bool{}
		for _, e := range found {
			for _, m := range e.metrics.GetMembers() {
				address := m.Node.GetAddress()
				if !addresses[address] && !raftIDs[m.RaftId] {
					others[address] = true
				}
			}
		}
		next = slices.Sorted(maps.Keys(others))
	}
	return found
}

// addUnreachable adds the rows for an address at which nobody answers: one for each
// member that is listed there.
func (s *survey) addUnreachable(e *endpoint, listed []listedMember) {
	if len(listed) == 0 {
		listed = []listedMember{{}} // Nobody knows which node should be there.
	}
	for _, l := range listed {
		s.addMissing(l, e.address, e.err)
	}
}

// addMissing adds the row of a member that does not answer at its address.
func (s *survey) addMissing(l listedMember, address string, failure error) {
	s.rows = append(s.rows, &memberRow{
		NodeID:    l.id,
		Address:   address,
		Error:     readable(failure).Error(),
		ClusterID: l.cluster,
		failure:   failure,
	})
}

// addReachable adds the rows for an address at which a node answers: of that node,
// and of other members that are listed there.
func (s *survey) addReachable(e *endpoint, listed []listedMember, now time.Time) {
	m := e.metrics
	row := &memberRow{
		NodeID:    m.GetNode().GetId(),
		Address:   e.address,
		Reachable: true,
		ClusterID: m.ClusterId,
		Metrics:   protoJSON{m},
		metrics:   m,
	}
	end, isSecure := row.certificateEnd()
	row.CertificateEndsSoon = isSecure && end.Sub(now) < certificateWarning
	for _, l := range listed {
		if row.ClusterID == 0 && l.id == row.NodeID {
			row.ClusterID = l.cluster // The node has restarted, and its cluster has not taken it back yet.
		}
	}
	anotherNode := fmt.Errorf("node %d answers there", row.NodeID)
	if m.ClusterId != 0 {
		anotherNode = fmt.Errorf("node %d of cluster %016x answers there", row.NodeID, m.ClusterId)
	}
	for _, l := range listed {
		if l != (listedMember{row.ClusterID, row.NodeID}) {
			s.addMissing(l, e.address, anotherNode)
		}
	}
	standsForOthers := row.ClusterID == 0 && len(listed) > 0 // Their rows name the node.
	if !standsForOthers {
		s.rows = append(s.rows, row)
	}
}

// compare orders rows: by cluster if there are several, then by node.
func (s *survey) compare(a, b *memberRow) int {
	byCluster := compareKnown(a.ClusterID, b.ClusterID)
	if len(s.views) > 1 && byCluster != 0 {
		return byCluster
	}
	return cmp.Or(compareKnown(a.NodeID, b.NodeID), strings.Compare(a.Address, b.Address))
}

// compareKnown orders ids; 0, which is not known, comes last.
func compareKnown(a, b uint64) int { return cmp.Compare(a-1, b-1) }

// newerView is that of two members of a cluster which knows more of it. The numbers
// of the roles end with the leader's.
func newerView(a, b *kvpb.MetricsResponse) *kvpb.MetricsResponse {
	order := cmp.Or(cmp.Compare(a.GetRole(), b.GetRole()), cmp.Compare(a.GetTerm(), b.GetTerm()))
	if order < 0 {
		return b
	}
	return a
}

// findMember is the member of this id, as a node lists it; nil: the node lists none.
func findMember(m *kvpb.MetricsResponse, id uint64) *kvpb.MemberStatus {
	for _, member := range m.GetMembers() {
		if member.Node.GetId() == id {
			return member
		}
	}
	return nil
}

func (c *client) status(ctx context.Context) error {
	s := takeSurvey(ctx, c.calls)
	sum := summarize(s.facts())
	answer := map[string]any{"summary": sum, "members": s.rows, "notes": s.notes()}
	if err := c.print(answer, sum.Text+"\n"+s.table()); err != nil {
		return err
	}
	if !slices.ContainsFunc(s.rows, func(r *memberRow) bool { return r.Reachable }) {
		return s.noAnswer()
	}
	if len(s.views) == 0 {
		c.warn("no node that was asked is in a cluster; --endpoints asks others")
	}
	if err := oneCluster(s.members()); err != nil {
		return err
	}
	if sum.State == stateSplit {
		return &commandError{Text: sum.Text, Status: exitNotDone}
	}
	return nil
}

// facts are what a summary goes by.
func (s *survey) facts() *surveyFacts {
	f := &surveyFacts{}
	for _, r := range s.rows {
		if r.Reachable {
			f.answers++
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.views)) {
		f.clusters = append(f.clusters, s.factsOf(id))
	}
	return f
}

// factsOf are those of one cluster.
func (s *survey) factsOf(cluster uint64) clusterFacts {
	f := clusterFacts{id: cluster}
	term := uint64(0) // of the leader that is known
	for _, r := range s.rows {
		m := r.metrics
		if m.GetClusterId() != cluster {
			continue
		}
		if m.Leader != nil && m.Term >= term {
			f.leader = m.Leader.Id
			term = m.Term
		}
		if m.Role == kvpb.Role_ROLE_LEADER {
			f.leading = append(f.leading, leaderFacts{r.NodeID, m.Term})
		}
	}
	for _, m := range s.views[cluster].GetMembers() {
		f.members = append(f.members, s.factsOfMember(cluster, m, f.leader))
	}
	return f
}

// factsOfMember are what the member itself says, or else what others say of it.
func (s *survey) factsOfMember(cluster uint64, m *kvpb.MemberStatus, leader uint64) memberFacts {
	f := memberFacts{id: m.Node.GetId(), voter: m.Voter, outgoing: m.VoterOutgoing, learner: m.Learner}
	isFollowed := false // somebody is up who says that it leads
	for _, r := range s.rows {
		other := r.metrics
		isElsewhere := other.GetClusterId() != 0 && other.GetClusterId() != cluster
		if other == nil || isElsewhere {
			continue
		}
		isFollowed = isFollowed || other.Healthy && other.Leader.GetId() == f.id
		switch {
		case other.RaftId == m.RaftId && other.ClusterId == cluster:
			f.answers = true
			f.up = other.Healthy
		case other.RaftId != m.RaftId && proto.Equal(other.Node, m.Node):
			f.lostMemory = true
		}
	}
	if f.answers {
		return f
	}
	isLeader := f.id == leader
	f.up = isLeader && isFollowed || !isLeader && m.Connected && m.GetProgress().GetCaughtUp()
	return f
}

// blanksAtEnd are those of a line, which tabwriter leaves there.
var blanksAtEnd = regexp.MustCompile(" +\n")

// table is the survey as people read it.
func (s *survey) table() string {
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tADDRESS\tHEALTH\tVOTER\tROLE\tLEADER\tTERM\tAPPLIED\tLAG\tVERSION\tKEYS\tSTORE\tDISK\tCLUSTER\tREASON")
	for _, r := range s.rows {
		fmt.Fprintln(w, strings.Join(s.cells(r), "\t"))
	}
	_ = w.Flush() // A strings.Builder takes everything.
	for _, n := range s.notes() {
		fmt.Fprintln(&table, n.Text)
	}
	return blanksAtEnd.ReplaceAllString(table.String(), "\n")
}

// unknownCell stands in the table for what is not known.
const unknownCell = "-"

// cells are a row of the table.
func (s *survey) cells(r *memberRow) []string {
	voter := yesOrNo(findMember(s.views[r.ClusterID], r.NodeID).GetVoter())
	if !r.Reachable && r.NodeID == 0 {
		voter = unknownCell
	}
	cluster := unknownCell
	if r.ClusterID != 0 {
		cluster = fmt.Sprintf("%016x", r.ClusterID)
	}
	lag := cmp.Or(r.Lag, unknownCell)
	cells := []string{numberCell(r.NodeID), r.Address}
	if !r.Reachable {
		cells = append(cells, "unreachable", voter)
		cells = append(cells, slices.Repeat([]string{unknownCell}, 4)...) // from ROLE to APPLIED
		cells = append(cells, lag)
		cells = append(cells, slices.Repeat([]string{unknownCell}, 4)...) // from VERSION to DISK
		return append(cells, cluster, r.Error)
	}
	m := r.metrics
	health := "unhealthy"
	if m.Healthy {
		health = "ok"
	}
	cells = append(cells, health, voter, r.Role, numberCell(m.Leader.GetId()), numberCell(m.Term))
	applied, version, keys := formatID(m.AppliedIndex), formatID(m.Version), formatID(m.Keys)
	if m.ClusterId == 0 {
		applied, version, keys = unknownCell, unknownCell, unknownCell
	}
	return append(cells, applied, lag, version, keys, storeCell(m), diskCell(m), cluster, m.UnhealthyReason)
}

// lagOf is how many entries of the leader's log a member has not stored, as the leader knows.
func (s *survey) lagOf(r *memberRow) string {
	view := s.views[r.ClusterID]
	for _, m := range view.GetMembers() {
		isThis := m.Node.GetId() == r.NodeID
		if r.metrics.GetClusterId() != 0 { // It may be listed twice.
			isThis = isThis && m.RaftId == r.metrics.RaftId
		}
		if isThis && m.Progress != nil {
			return formatID(view.LastIndex - min(view.LastIndex, m.Progress.MatchIndex))
		}
	}
	return ""
}

// diskCell is what is free on the disk of a node's data directory, in GiB, rounded down.
func diskCell(m *kvpb.MetricsResponse) string {
	switch {
	case !m.Durable:
		return "no"
	case m.DiskFree == 0: // its file system does not say, or the node is too old to
		return "yes"
	}
	return fmt.Sprintf("%dG free", m.DiskFree>>30)
}

// storeCell is what of its quota a node's store takes, in MiB, both rounded down.
func storeCell(m *kvpb.MetricsResponse) string {
	switch {
	case m.ClusterId == 0:
		return unknownCell
	case m.Quota > maxStoreBytes: // there is none, or the node is too old to say so
		return fmt.Sprintf("%dM", m.QuotaUsed>>20)
	}
	return fmt.Sprintf("%dM/%dM", m.QuotaUsed>>20, m.Quota>>20)
}

// numberCell is a number in the table; 0 is not known.
func numberCell(n uint64) string {
	if n == 0 {
		return unknownCell
	}
	return formatID(n)
}

func yesOrNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// noAnswer is the error if no node has answered.
func (s *survey) noAnswer() error {
	var replies []reply
	for _, r := range s.rows {
		replies = append(replies, replyOf(r.Address, r.failure))
	}
	e := callError(replies)
	return e.withText("no node answered: " + e.Text)
}

// members are the nodes that say that they are in a cluster.
func (s *survey) members() []clusterMember {
	var members []clusterMember
	for _, r := range s.rows {
		cluster := r.metrics.GetClusterId()
		if cluster != 0 {
			members = append(members, clusterMember{cluster, r.NodeID, r.Address})
		}
	}
	return members
}

// clusterMember is a node that has said that it is in a cluster.
type clusterMember struct {
	cluster uint64
	id      uint64
	address string
}

// oneCluster returns an error if nodes are in several clusters.
func oneCluster(members []clusterMember) error {
	nodes := map[uint64][]string{} // by cluster
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
