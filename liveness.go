// Whether the loop turns: what a liveness probe asks.

package main

import (
	"context"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"
)

const (
	// livenessHealth is the health name of the process and its loop. A probe that
	// names no service asks for it. Its state says nothing of the cluster: a node
	// without a leader is alive, and a restart would not help it.
	livenessHealth = ""
	// livenessInterval is how long the server waits between two requests to the loop.
	livenessInterval = time.Second
	// livenessTimeout is how long the loop may leave such a request unanswered before
	// it counts as stuck. It is much longer than a turn ever takes: a node without a
	// data directory that is restarted loses all that it has.
	livenessTimeout = 10 * time.Second
)

// watchLoop keeps the state of livenessHealth. It returns when ctx or the loop ends.
func (s *server) watchLoop(ctx context.Context) {
	set := func(state grpc_health_v1.HealthCheckResponse_ServingStatus) {
		s.health.SetServingStatus(livenessHealth, state)
	}
	for ctx.Err() == nil {
		turned := make(chan struct{})
		if !s.n.inbox.event(func() { close(turned) }) {
			return
		}
		select {
		case <-turned:
		case <-ctx.Done():
		case <-time.After(livenessTimeout):
			set(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
			select {
			case <-turned:
				set(grpc_health_v1.HealthCheckResponse_SERVING)
			case <-ctx.Done():
			}
		}
		sleep(ctx, livenessInterval)
	}
}
