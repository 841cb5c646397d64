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

// healthNames are the names that a node's health has. The first one is the default.
var healthNames = []string{kvpb.KVService_ServiceDesc.ServiceName, restartHealth, livenessHealth}

// healthUsage explains healthNames, the last of which is empty.
var healthUsage = healthNames[0] + " (ready for calls), " + healthNames[1] +
	" (may be restarted), or the empty name, \"\" (alive)"

// health polls if it waits: a stream of Watch would end with a node that restarts.
func (c *client) health(ctx context.Context) error {
	var last error
	var pause pauses
	for {
		endpoints := c.calls.ask(ctx, c.endpoints)
		if err := oneCluster(membersAmong(endpoints)); err != nil {
			closeAll(endpoints)
			return err // Waiting does not help.
		}
		serving, resp, err := c.checkHealth(ctx, endpoints)
		closeAll(endpoints)
		if err == nil {
			return c.print(protoJSON{resp}, "SERVING, says "+serving.address+"\n")
		}
		timeIsUp := isOutOfTime(ctx)
		if last == nil || !timeIsUp { // What failed before the time was up says more.
			last = err
		}
		if timeIsUp || !c.wait {
			return last
		}
		pause.wait(ctx)
	}
}

// membersAmong are those endpoints that are in a cluster.
func membersAmong(endpoints []*endpoint) []clusterMember {
	var members []clusterMember
	for _, e := range endpoints {
		m := e.metrics
		if m.GetClusterId() != 0 {
			members = append(members, clusterMember{m.ClusterId, m.GetNode().GetId(), e.address})
		}
	}
	return members
}

// checkHealth asks for the health of the first endpoint that responds, and of a
// member if one responds. All were asked for their metrics before. It returns an
// error if the health is not SERVING.
func (c *client) checkHealth(
	ctx context.Context, endpoints []*endpoint,
) (*endpoint, *healthpb.HealthCheckResponse, error) {
	asksLiveness := c.service == livenessHealth
	if !asksLiveness {
		endpoints = membersFirst(endpoints)
	}
	var replies []reply
	for _, e := range endpoints {
		if e.err != nil && !asksLiveness {
			replies = append(replies, replyOf(e.address, e.err))
			continue
		}
		short, cancel := context.WithTimeout(ctx, c.calls.askTime())
		resp, err := healthpb.NewHealthClient(e.conn).Check(short, &healthpb.HealthCheckRequest{Service: c.service})
		cancel()
		if err != nil {
			replies = append(replies, replyOf(e.address, err))
			continue
		}
		if resp.Status != healthpb.HealthCheckResponse_SERVING {
			return e, resp, noError("%q is %v: %s", c.service, resp.Status, c.whyUnhealthy(e))
		}
		return e, resp, nil
	}
	return nil, nil, callError(replies)
}

// membersFirst puts the endpoints that are in a cluster before all others.
func membersFirst(endpoints []*endpoint) []*endpoint {
	var members, others []*endpoint
	for _, e := range endpoints {
		if e.metrics.GetClusterId() != 0 {
			members = append(members, e)
		} else {
			others = append(others, e)
		}
	}
	return slices.Concat(members, others)
}

// whyUnhealthy is what a node's metrics say of its health. A node whose loop is stuck
// has not answered with any.
func (c *client) whyUnhealthy(e *endpoint) string {
	if c.service == livenessHealth {
		return fmt.Sprintf("the node at %s answers, but its loop is stuck", e.address)
	}
	m := e.metrics
	why := m.GetUnhealthyReason()
	if c.service == restartHealth {
		why = m.GetNoRestartReason()
	}
	why = cmp.Or(why, "it was healthy when it was asked, a moment ago")
	return fmt.Sprintf("node %d at %s: %s", m.GetNode().GetId(), m.GetNode().GetAddress(), why)
}
