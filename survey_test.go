// Tests of status and health where nodes are in several clusters.

package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"raft-key-value/kvpb"
)

// inCluster has a fake node say that it is in a cluster with these members.
func (f *fakeNode) inCluster(cluster, id uint64, role kvpb.Role, members ...*kvpb.MemberStatus) {
	f.setMetrics(&kvpb.MetricsResponse{
		Node: &kvpb.Node{Id: id, Address: f.addr}, ClusterId: cluster, RaftId: cluster<<8 | id, Role: role, Term: 1,
		Members: members, Healthy: true,
	})
}

func memberAt(cluster, id uint64, address string, voter bool) *kvpb.MemberStatus {
	return &kvpb.MemberStatus{
		Node: &kvpb.Node{Id: id, Address: address}, RaftId: cluster<<8 | id, Voter: voter, Learner: !voter,
	}
}

// rowsOf are the first words of the rows of status: up to the role, and the
// cluster.
func rowsOf(t *testing.T, table string) []string {
	t.Helper()
	var rows []string
	for _, line := range strings.Split(strings.TrimSpace(table), "\n")[1:] {
		words := strings.Fields(line)
		rows = append(rows, strings.Join(append(words[:5], words[11]), " "))
	}
	return rows
}

// TestStatusOfTwoClusters: each row is judged by its own cluster, and the error says
// who is in which.
func TestStatusOfTwoClusters(t *testing.T) {
	t.Parallel()
	a, b, c, d := newFakeNode(t), newFakeNode(t), newFakeNode(t), newFakeNode(t)
	// Node 1 was a voter of 0xa, was restarted, and has founded 0xb. To 0xa it is node
	// 1 still, at the same address. Both have a node 3 that does not answer; to 0xb it
	// is a learner. Node 4 is in no cluster yet, but 0xb has it as a voter.
	of := func(cluster uint64, voter3 bool) []*kvpb.MemberStatus {
		return []*kvpb.MemberStatus{memberAt(cluster, 1, b.addr, true), memberAt(cluster, 3, closedAddress, voter3)}
	}
	a.inCluster(0xa, 2, kvpb.Role_ROLE_FOLLOWER, append(of(0xa, true), memberAt(0xa, 2, a.addr, false))...)
	b.inCluster(0xb, 1, kvpb.Role_ROLE_LEADER, append(of(0xb, false), memberAt(0xb, 4, c.addr, true))...)
	c.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 4, Address: c.addr}, Role: kvpb.Role_ROLE_UNINITIALIZED, RaftId: 4})
	d.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 5, Address: d.addr}, Role: kvpb.Role_ROLE_UNINITIALIZED, RaftId: 5})
	endpoints := strings.Join([]string{a.addr, d.addr}, ",") // b is a member of 0xa, c of 0xb
	out, errs := runCommand(t, exitNotDone, "", "status", "--endpoints", endpoints)
	want := []string{
		"1 " + b.addr + " unreachable yes - 000000000000000a", // by 0xa
		"2 " + a.addr + " ok no follower 000000000000000a",
		"3 " + closedAddress + " unreachable yes - 000000000000000a",
		"1 " + b.addr + " ok yes leader 000000000000000b",
		"3 " + closedAddress + " unreachable no - 000000000000000b",
		"4 " + c.addr + " unhealthy yes uninitialized 000000000000000b",
		"5 " + d.addr + " unhealthy no uninitialized -",
	}
	if got := rowsOf(t, out); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s\nwant:\n%s\nout:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"), out)
	}
	wantPart(t, out, "node 1 of cluster 000000000000000b answers there")
	wantPart(t, errs, fmt.Sprintf("these nodes are in 2 clusters, not in one: in cluster 000000000000000a: 2=%s; in cluster 000000000000000b: 1=%s",
		a.addr, b.addr))

	out, _ = runCommand(t, exitNotDone, "", "status", "--endpoints", endpoints, "-o", "json")
	var answer struct {
		Members []struct {
			Cluster string `json:"cluster_id"`
		}
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || len(answer.Members) != len(want) {
		t.Fatal(err, out)
	}
	for i, cluster := range []string{"10", "10", "10", "11", "11", "11", "0"} {
		wantText(t, "cluster_id", answer.Members[i].Cluster, cluster)
	}
}

// TestHealthOfTwoClusters: it is said at once, whoever is SERVING. A node in no
// cluster is not in another one.
func TestHealthOfTwoClusters(t *testing.T) {
	t.Parallel()
	a, b, fresh := newFakeNode(t), newFakeNode(t), newFakeNode(t)
	a.inCluster(0xa, 1, kvpb.Role_ROLE_LEADER)
	b.inCluster(0xb, 1, kvpb.Role_ROLE_LEADER)
	fresh.setMetrics(&kvpb.MetricsResponse{})
	for _, f := range []*fakeNode{a, b} {
		f.health.SetServingStatus(kvpb.KVService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	}
	_, errs := runCommand(t, exitNotDone, "", "health", "--wait", "--timeout", "10m", "--endpoints", a.addr+","+b.addr)
	wantPart(t, errs, fmt.Sprintf("in 2 clusters, not in one: in cluster 000000000000000a: 1=%s; in cluster 000000000000000b: 1=%s", a.addr, b.addr))
	runCommand(t, exitYes, "", "health", "--endpoints", fresh.addr+","+a.addr)
}

// TestClusterSplitIsSeen: two real nodes, each a cluster of its own.
func TestClusterSplitIsSeen(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.init(1)
	c.init(2)
	endpoints := c.nodes[1].address + "," + c.nodes[2].address
	for _, command := range []string{"status", "health"} {
		_, errs := runCommand(t, exitNotDone, "", command, "--endpoints", endpoints)
		for id := uint64(1); id <= 2; id++ {
			m, err := c.metrics(id)
			if err != nil {
				t.Fatal(err)
			}
			wantPart(t, errs, fmt.Sprintf("in cluster %016x: %d=%s", m.ClusterId, id, c.nodes[id].address))
		}
	}
	_, errs := runCommand(t, exitYes, "", "status", "--endpoints", c.nodes[1].address)
	wantText(t, "stderr", errs, "")
}
