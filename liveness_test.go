package main

import (
	"maps"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"
)

// TestHealthNames: a node has these three, and no other.
func TestHealthNames(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	resp, err := grpc_health_v1.NewHealthClient(c.nodes[1].conn).List(c.ctx, &grpc_health_v1.HealthListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	names := slices.Sorted(maps.Keys(resp.Statuses))
	if want := []string{"", "raftkv.v1.KVService", "raftkv.v1.restart"}; !slices.Equal(names, want) {
		t.Errorf("the health names are %q, want %q", names, want)
	}
}

// TestClockLiveness: the empty name follows the loop, and nothing else.
func TestClockLiveness(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		leader, rest := b.leaderAndRest()
		w := b.watch(leader, livenessHealth)
		defer w.stop()
		b.do(rest[0], black)
		b.do(rest[1], black)
		time.Sleep(time.Minute)
		w.wants(t, "without a majority", true, time.Now(), -2*time.Minute, -59*time.Second)

		release := make(chan struct{})
		start := time.Now()
		b.nodes[leader].server.n.inbox.event(func() { <-release })
		time.Sleep(time.Minute)
		w.wants(t, "stuck", false, start, livenessTimeout, livenessTimeout+livenessInterval)

		start = time.Now()
		close(release)
		time.Sleep(time.Minute)
		w.wants(t, "released", true, start, 0, livenessInterval)
	})
}
