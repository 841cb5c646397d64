// The sub-command health.

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"raft-key-value/kvpb"
)

var healthNames = []string{
	kvpb.KVService_ServiceDesc.ServiceName, restartHealth, kvpb.ClusterService_ServiceDesc.ServiceName,
}

// health polls if it waits: a stream would end with a node that restarts.
func (c *client) health(ctx context.Context) error {
	var said error
	for {
		endpoints := c.ask(ctx, c.endpoints)
		if err := oneCluster(membersAmong(endpoints)); err != nil {
			closeAll(endpoints)
			return err // which does not pass
		}
		address, resp, err := c.checkHealth(ctx, endpoints)
		closeAll(endpoints)
		if err == nil {
			return c.print(protoJSON{resp}, "SERVING, says "+address+"\n")
		}
		if said == nil || ctx.Err() == nil {
			said = err // what failed before the time was up tells more
		}
		if !c.wait || ctx.Err() != nil {
			return said
		}
		sleep(ctx, pollInterval)
	}
}

// membersAmong are those endpoints that are in a cluster.
func membersAmong(endpoints []*endpoint) []clusterMember {
	var members []clusterMember
	for _, e := range endpoints {
		if m := e.metrics; m.GetClusterId() != 0 {
			members = append(members, clusterMember{m.ClusterId, m.GetNode().GetId(), e.address})
		}
	}
	return members
}

// checkHealth asks the first endpoint that answers, and is in a cluster if one is,
// for its health. All have been asked how they are.
func (c *client) checkHealth(
	ctx context.Context, endpoints []*endpoint,
) (address string, resp *healthpb.HealthCheckResponse, err error) {
	liveness := c.service == kvpb.ClusterService_ServiceDesc.ServiceName
	slices.SortStableFunc(endpoints, func(a, b *endpoint) int {
		outside := func(e *endpoint) int { return oneOf(e.metrics.GetClusterId() == 0 && !liveness, 1, 0) }
		return outside(a) - outside(b)
	})
	r := &round{c: c} // for what they say
	for _, e := range endpoints {
		if e.err != nil && !liveness {
			r.say(e, e.err)
			continue
		}
		short, cancel := context.WithTimeout(ctx, c.askTime())
		resp, err = healthpb.NewHealthClient(e.conn).Check(short, &healthpb.HealthCheckRequest{Service: c.service})
		cancel()
		if err != nil {
			r.say(e, err)
			continue
		}
		if resp.Status != healthpb.HealthCheckResponse_SERVING {
			err = noError("%q is %v: %s", c.service, resp.Status, c.whyUnhealthy(e.metrics))
		}
		return e.address, resp, err
	}
	return "", nil, callError(r.answers, false, false)
}

// whyUnhealthy is what a node's metrics say of its health.
func (c *client) whyUnhealthy(m *kvpb.MetricsResponse) string {
	why := m.GetUnhealthyReason()
	if c.service == restartHealth {
		why = m.GetRestartReason()
	}
	why = cmp.Or(why, "it was healthy when it was asked, a moment ago")
	return fmt.Sprintf("node %d at %s: %s", m.GetNode().GetId(), m.GetNode().GetAddress(), why)
}
