// The sub-command health.

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

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
		endpoints := c.calls.startAsking(ctx, c.endpoints)
		checks := c.checks(ctx, endpoints)
		if err := oneCluster(membersAmong(endpoints)); err != nil {
			closeAll(endpoints)
			return err // Waiting does not help.
		}
		serving, resp, err := c.judge(checks)
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

// healthCheck is what an endpoint said of its health.
type healthCheck struct {
	at   *endpoint
	resp *healthpb.HealthCheckResponse
	err  error // why there is no response
}

// healthOf asks an endpoint, which was asked for its metrics, for its health.
func (c *client) healthOf(ctx context.Context, e *endpoint) healthCheck {
	short, cancel := context.WithTimeout(ctx, c.calls.askTime())
	defer cancel()
	resp, err := healthpb.NewHealthClient(e.conn).Check(short, &healthpb.HealthCheckRequest{Service: c.service})
	return healthCheck{at: e, resp: resp, err: err}
}

// checks asks endpoints, which are being asked for their metrics, for their health, and waits for
// both. For liveness it asks all, and meanwhile: a node whose loop is stuck has no metrics, and yet
// an answer.
func (c *client) checks(ctx context.Context, endpoints []*endpoint) []healthCheck {
	if c.service == livenessHealth {
		checks := c.checkAll(ctx, endpoints)
		awaitAll(endpoints)
		return checks
	}
	awaitAll(endpoints)
	return c.checkFirst(ctx, membersFirst(endpoints))
}

// checkAll asks all endpoints for their health, at the same time: those that hang take the time
// of one.
func (c *client) checkAll(ctx context.Context, endpoints []*endpoint) []healthCheck {
	checks := make([]healthCheck, len(endpoints))
	var checking sync.WaitGroup
	for i, e := range endpoints {
		checking.Go(func() { checks[i] = c.healthOf(ctx, e) })
	}
	checking.Wait()
	return checks
}

// checkFirst asks for the health of the first endpoint that has metrics and responds.
func (c *client) checkFirst(ctx context.Context, endpoints []*endpoint) []healthCheck {
	var checks []healthCheck
	for _, e := range endpoints {
		if e.err != nil {
			checks = append(checks, healthCheck{at: e, err: e.err})
			continue
		}
		check := c.healthOf(ctx, e)
		checks = append(checks, check)
		if check.err == nil {
			break
		}
	}
	return checks
}

// judge returns the first response, and an error if that is not SERVING. The error has what the
// endpoints before it said.
func (c *client) judge(checks []healthCheck) (*endpoint, *healthpb.HealthCheckResponse, error) {
	var replies []reply
	for _, check := range checks {
		if check.err != nil {
			replies = append(replies, replyOf(check.at.address, check.err))
			continue
		}
		if check.resp.Status == healthpb.HealthCheckResponse_SERVING {
			return check.at, check.resp, nil
		}
		return check.at, check.resp, &commandError{
			Text:      fmt.Sprintf("%q is %v: %s", c.service, check.resp.Status, c.whyUnhealthy(check.at)),
			Status:    exitNo,
			Endpoints: replies,
		}
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
