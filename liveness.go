// Whether the loop turns: what a liveness probe asks.

package main

import (
	"context"
	"errors"
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

// errLoopHangs ends the watches of a node whose loop does not turn: it would tell of nothing,
// and say every second that it has told all.
var errLoopHangs = errors.New("this node's loop does not turn")

// watchLoop keeps the state of livenessHealth, and ends the watches while the loop hangs. It
// returns when ctx or the loop ends.
func (s *server) watchLoop(ctx context.Context) {
	for ctx.Err() == nil {
		turned := make(chan struct{})
		if !s.n.inbox.event(func() { close(turned) }) {
			s.watchers.stop(s.n.inbox.whyClosed())
			return
		}
		if !happens(ctx, turned, leaderWait) {
			s.watchers.stop(errLoopHangs)
			s.awaitTurn(ctx, turned)
			// The loop allows the watches again, if there is nothing else against them.
			s.n.inbox.event(func() { s.onPublish(s.n.status.latest.Load()) })
		}
		sleep(ctx, livenessInterval)
	}
}

// awaitTurn waits until a loop that hangs turns, or ctx ends.
func (s *server) awaitTurn(ctx context.Context, turned <-chan struct{}) {
	if happens(ctx, turned, livenessTimeout-leaderWait) {
		return
	}
	s.health.SetServingStatus(livenessHealth, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	select {
	case <-turned:
		s.health.SetServingStatus(livenessHealth, grpc_health_v1.HealthCheckResponse_SERVING)
	case <-ctx.Done():
	}
}

// happens waits until c is closed or ctx ends; false: neither was so in time.
func happens(ctx context.Context, c <-chan struct{}, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-c:
		return true
	case <-ctx.Done():
		return true
	case <-timer.C:
		return false
	}
}
