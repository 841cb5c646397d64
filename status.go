// The sub-commands that ask how nodes are: status and health.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"raft-key-value/kvpb"
)

// memberRow is what survey learned of one node, in the format of status.
type memberRow struct {
	NodeID    uint64         `json:"node_id,string"`
	Address   string         `json:"address"`
	Reachable bool           `json:"reachable"`
	Error     string         `json:"error"`
	Metrics   json.Marshaler `json:"metrics"`
	metrics   *kvpb.MetricsResponse
}

// survey asks the endpoints and then all other members that they name.
func (c *client) survey(ctx context.Context) []*memberRow {
	lives, ids, others := map[uint64]bool{}, map[string]uint64{}, map[string]bool{}
	rows := slices.DeleteFunc(c.ask(ctx, c.endpoints), func(r *memberRow) bool { // one node can have two addresses
		id := r.metrics.GetRaftId()
		again := lives[id]
		lives[id] = id != 0
		return again
	})
	for _, r := range rows {
		for _, m := range r.metrics.GetMembers() {
			ids[m.Node.GetAddress()] = m.Node.GetId()
			if !lives[m.RaftId] && !slices.Contains(c.endpoints, m.Node.GetAddress()) {
				others[m.Node.GetAddress()] = true
			}
		}
	}
	rows = append(rows, c.ask(ctx, slices.Collect(maps.Keys(others)))...)
	for _, r := range rows {
		if id := ids[r.Address]; id != 0 && r.NodeID != 0 && r.NodeID != id {
			*r = memberRow{Address: r.Address, Error: fmt.Sprintf("node %d answers there", r.NodeID)}
		}
		r.NodeID = cmp.Or(r.NodeID, ids[r.Address])
	}
	slices.SortFunc(rows, func(a, b *memberRow) int { return cmp.Compare(a.NodeID-1, b.NodeID-1) }) // 0 comes last
	return rows
}

// ask asks nodes for their metrics, all at the same time. It takes at most
// half of the timeout.
func (c *client) ask(ctx context.Context, addrs []string) []*memberRow {
	rows := make([]*memberRow, len(addrs))
	var answers sync.WaitGroup
	for i, addr := range addrs {
		answers.Go(func() {
			m := new(kvpb.MetricsResponse)
			_, err := send(ctx, addr, min(c.timeout/2, askTimeout), kvpb.ClusterService_Metrics_FullMethodName, &kvpb.MetricsRequest{}, m)
			rows[i] = &memberRow{m.GetNode().GetId(), addr, true, "", protoJSON{m}, m}
			if err != nil {
				rows[i] = &memberRow{Address: addr, Error: err.Error()}
			}
		})
	}
	answers.Wait()
	return rows
}

// bestMetrics is the newest leader's, or else that of some other node; nil if
// no node answered. The numbers of the roles end with the leader's.
func bestMetrics(rows []*memberRow) *kvpb.MetricsResponse {
	return slices.MaxFunc(rows, func(a, b *memberRow) int {
		return cmp.Or(cmp.Compare(a.metrics.GetRole(), b.metrics.GetRole()), cmp.Compare(a.metrics.GetTerm(), b.metrics.GetTerm()))
	}).metrics
}

func findMember(m *kvpb.MetricsResponse, id uint64) *kvpb.MemberStatus {
	if i := slices.IndexFunc(m.GetMembers(), func(s *kvpb.MemberStatus) bool { return s.Node.GetId() == id }); i >= 0 {
		return m.Members[i]
	}
	return nil
}

func (c *client) status(ctx context.Context) error {
	rows := c.survey(ctx)
	best := bestMetrics(rows)
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tADDRESS\tHEALTH\tVOTER\tROLE\tLEADER\tTERM\tAPPLIED\tVERSION\tKEYS\tDISK\tCLUSTER\tREASON")
	for _, r := range rows {
		m, voter := r.metrics, oneOf(findMember(best, r.NodeID).GetVoter(), "yes", "no")
		fmt.Fprintf(w, "%d\t%s\t", r.NodeID, r.Address)
		if !r.Reachable {
			fmt.Fprintf(w, "unreachable\t%s\t-\t-\t-\t-\t-\t-\t-\t-\t%s\n", voter, r.Error)
			continue
		}
		role := strings.ToLower(strings.TrimPrefix(m.Role.String(), "ROLE_"))
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%s\t%016x\t%s\n", oneOf(m.Healthy, "ok", "unhealthy"), voter, role, m.Leader.GetId(),
			m.Term, m.AppliedIndex, m.Version, m.Keys, oneOf(m.Durable, "yes", "no"), m.ClusterId, m.UnhealthyReason)
	}
	w.Flush() // A strings.Builder takes everything.
	err := c.print(map[string]any{"members": rows}, regexp.MustCompile(" +\n").ReplaceAllString(table.String(), "\n"))
	if best == nil {
		return cmp.Or(err, errors.New("no node answered"))
	} else if best.ClusterId == 0 {
		fmt.Fprintln(c.stderr, "no node that was asked is in a cluster; --endpoints asks others")
	}
	return err
}

// health polls if it waits: a stream would end with a node that restarts.
func (c *client) health(ctx context.Context) (err error) {
	c.local, c.timeout = true, min(c.timeout, askTimeout) // One node that hangs must not take up the wait.
	for {
		resp, now := healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{Service: c.service})
		if now == nil && resp.Status == healthpb.HealthCheckResponse_SERVING {
			return c.print(protoJSON{resp}, "SERVING, says "+c.endpoints[0]+"\n")
		} else if now == nil {
			now = fmt.Errorf("%q is %v: %s", c.service, resp.Status, c.whyUnhealthy(ctx))
		}
		if err == nil || ctx.Err() == nil {
			err = now // what failed before the time was up tells more
		}
		if !c.wait || ctx.Err() != nil {
			return err
		}
		sleep(ctx, pollInterval)
	}
}

// whyUnhealthy asks who answers first, as health did.
func (c *client) whyUnhealthy(ctx context.Context) string {
	m, err := c.cluster().Metrics(ctx, &kvpb.MetricsRequest{})
	if err != nil {
		return err.Error()
	}
	why := m.UnhealthyReason
	if c.service == restartHealth {
		why = m.RestartReason
	}
	why = cmp.Or(why, "it was, a moment ago")
	return fmt.Sprintf("node %d at %s: %s", m.Node.GetId(), m.Node.GetAddress(), why)
}
