// Tests of how the command line finds a node: which endpoints it passes over,
// what it says of them, and that no call goes on in another cluster.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"raft-key-value/kvpb"
)

// callingCommands are lines that call a node of a cluster. FILE stands for a new
// file.
var callingCommands = []string{
	"get k", "get k --local", "list", "list --local", "set k v", "delete k",
	"add-learner 3=h:3", "promote 3", "demote 2", "change-membership 1 2", "remove 2", "transfer-leader 2",
	"health", "status", "backup FILE",
}

// commandLine splits a line into words, with a new file in the place of FILE.
func commandLine(t *testing.T, line, endpoints string) []string {
	t.Helper()
	line = strings.ReplaceAll(line, "FILE", filepath.Join(t.TempDir(), "file"))
	return append(strings.Fields(line), "--endpoints", endpoints)
}

// together runs a test for each line, all at the same time: they wait more than they
// work. t.Parallel would run as many as there are cores.
func together(t *testing.T, lines []string, test func(*testing.T, string)) {
	t.Helper()
	var all sync.WaitGroup
	for _, line := range lines {
		all.Go(func() { t.Run(line, func(t *testing.T) { test(t, line) }) })
	}
	all.Wait()
}

// TestEndpointsThatAreNoHelp: endpoints that hang, that refuse, and that are in no
// cluster hold no command up. Those that hang take half of the timeout together:
// one after another they would take all of it.
func TestEndpointsThatAreNoHelp(t *testing.T) {
	t.Parallel()
	for name := range commands() {
		isOther := name == "init" || commands()[name].offline
		named := false
		for _, line := range callingCommands {
			named = named || strings.Fields(line)[0] == name
		}
		if named == isOther {
			t.Errorf("%s calls a node of a cluster %v, but it is tested %v", name, !isOther, named)
		}
	}
	together(t, callingCommands, func(t *testing.T, line string) {
		fresh, live := newFakeNode(t), newFakeNode(t)
		fresh.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 9, Address: fresh.addr}, Healthy: true})
		fresh.put("k", "wrong")
		live.put("k", "v")
		_, backup := backupOf(t, 1)
		live.do(func() { live.backup = backup })
		fresh.health.SetServingStatus(kvpb.KVService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_NOT_SERVING)
		live.health.SetServingStatus(kvpb.KVService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
		endpoints := []string{listenSilently(t), fresh.addr, listenSilently(t), closedAddress, listenSilently(t), live.addr}
		args := commandLine(t, line, strings.Join(endpoints, ","))
		out, _ := runCommand(t, exitYes, "", append(args, "--timeout", "4s")...)
		if strings.HasPrefix(line, "get") {
			wantText(t, line, out, "v")
		}
		if _, n := fresh.take(); n > 0 || fresh.opened > 0 {
			t.Errorf("the node in no cluster was called %d times, and opened %d sessions", n, fresh.opened)
		}
	})
}

// TestNoEndpointIsAHelp: the error says what each one said.
func TestNoEndpointIsAHelp(t *testing.T) {
	t.Parallel()
	lines := slices.DeleteFunc(slices.Clone(callingCommands), func(line string) bool {
		return line == "status" || line == "health" // they take the word of a node in no cluster
	})
	together(t, lines, func(t *testing.T, line string) {
		fresh, live := newFakeNode(t), newFakeNode(t)
		fresh.setMetrics(&kvpb.MetricsResponse{})
		live.failWith(func(context.Context) error {
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER, "none leads")
		})
		live.do(func() {
			live.barred = live.fail(t.Context())
			live.backup = []byte("no backup")
		})
		silent := listenSilently(t)
		args := commandLine(t, line, strings.Join([]string{silent, fresh.addr, live.addr}, ","))
		timeout := "10s"
		if strings.Contains(line, "k") || line == "list" { // What is read or written is tried until then.
			timeout = "1s"
		}
		saidByLive := "none leads (UNAVAILABLE NO_LEADER)"
		if strings.HasPrefix(line, "backup") {
			saidByLive = "snapshot"
		}
		_, errs := runCommand(t, exitNotDone, "", append(args, "--timeout", timeout, "-o", "json")...)
		var e commandError
		if err := json.Unmarshal([]byte(errs), &e); err != nil || len(e.Endpoints) != 3 {
			t.Fatal(err, errs)
		}
		for address, want := range map[string]string{
			silent:     "no answer in ",
			fresh.addr: errNotInitialized.Error() + " (FAILED_PRECONDITION NOT_INITIALIZED)",
			live.addr:  saidByLive,
		} {
			i := slices.IndexFunc(e.Endpoints, func(r reply) bool { return r.Endpoint == address })
			if i < 0 {
				t.Fatalf("%s is not named: %s", address, errs)
			}
			wantPart(t, e.Endpoints[i].Error, want)
			wantPart(t, e.Text, address+": "+want)
		}
	})
}

// TestBackupBeginsAnew: what an endpoint sent that broke off is not in the file.
func TestBackupBeginsAnew(t *testing.T) {
	t.Parallel()
	broken, live := newFakeNode(t), newFakeNode(t)
	_, whole := backupOf(t, 100)
	broken.do(func() { broken.backup = whole[:len(whole)/2] })
	live.do(func() { live.backup = whole })
	file := filepath.Join(t.TempDir(), "backup")
	runCommand(t, exitYes, "", "backup", file, "--endpoints", broken.addr+","+live.addr)
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, whole) {
		t.Errorf("%d bytes, %v, want the %d that were sent last", len(got), err, len(whole))
	}
}

// TestInitWantsNodesInNoCluster: the first endpoint that answers is called, and
// one that hangs is passed over.
func TestInitWantsNodesInNoCluster(t *testing.T) {
	t.Parallel()
	fresh, other := newFakeNode(t), newFakeNode(t)
	fresh.setMetrics(&kvpb.MetricsResponse{})
	endpoints := strings.Join([]string{listenSilently(t), fresh.addr, other.addr}, ",")
	runCommand(t, exitYes, "", "init", "1="+fresh.addr, "--endpoints", endpoints, "--timeout", "2s")
	if _, n := fresh.take(); n != 1 {
		t.Errorf("it was called %d times", n)
	}
}

// TestHealthOfNodesInNoCluster: they are NOT_SERVING, and alive.
func TestHealthOfNodesInNoCluster(t *testing.T) {
	t.Parallel()
	fresh, hangs := newFakeNode(t), listenSilently(t)
	fresh.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 9, Address: fresh.addr}, UnhealthyReason: "it is in none"})
	fresh.health.SetServingStatus(kvpb.KVService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_NOT_SERVING)
	fresh.health.SetServingStatus(livenessHealth, healthpb.HealthCheckResponse_SERVING)
	endpoints := hangs + "," + fresh.addr
	_, errs := runCommand(t, exitNo, "", "health", "--timeout", "2s", "--endpoints", endpoints)
	wantPart(t, errs, "NOT_SERVING: node 9 at "+fresh.addr+": it is in none")
	live := newFakeNode(t)
	live.health.SetServingStatus(livenessHealth, healthpb.HealthCheckResponse_NOT_SERVING)
	out, _ := runCommand(t, exitYes, "", "health", "--service", "", "--endpoints", fresh.addr+","+live.addr)
	wantText(t, "health", out, "SERVING, says "+fresh.addr+"\n")
	_, errs = runCommand(t, exitNo, "", "health", "--service", "", "--endpoints", live.addr)
	wantPart(t, errs, "NOT_SERVING: the node at "+live.addr+" answers, but its loop is stuck")
}

// TestWritesStayInOneCluster: a write that may have been applied in one cluster is
// not sent to another one, where nobody knows of its session.
func TestWritesStayInOneCluster(t *testing.T) {
	t.Parallel()
	together(t, []string{"set k v", "delete k", "get k"}, func(t *testing.T, line string) {
		one, other := newFakeNode(t), newFakeNode(t)
		one.setMetrics(&kvpb.MetricsResponse{ClusterId: 10})
		other.setMetrics(&kvpb.MetricsResponse{ClusterId: 11})
		one.failWith(func(context.Context) error {
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "unknown")
		})
		exit := exitUnknown
		if line == "get k" {
			exit = exitNotDone
		}
		args := commandLine(t, line, one.addr+","+other.addr)
		_, errs := runCommand(t, exit, "", append(args, "--timeout", "1s")...)
		wantPart(t, errs, other.addr+": it is in another cluster, 000000000000000b, not in 000000000000000a")
		if _, n := other.take(); n != 0 || other.opened != 0 {
			t.Errorf("the other cluster was called %d times, and opened %d sessions", n, other.opened)
		}
	})
}

// freezer passes bytes on to an address until it freezes. It keeps its connections
// open, as the kernel of a node that hangs does.
type freezer struct {
	address string
	frozen  chan struct{}
	once    sync.Once
}

func newFreezer(t *testing.T, to string) *freezer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &freezer{address: l.Addr().String(), frozen: make(chan struct{})}
	var all sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	pass := func(from, to net.Conn) {
		buffer := make([]byte, 4096)
		for {
			n, err := from.Read(buffer)
			select {
			case <-f.frozen:
				return
			default:
			}
			if err != nil {
				_ = to.Close()
				return
			}
			_, _ = to.Write(buffer[:n])
		}
	}
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			node, err := net.Dial("tcp", to)
			if err != nil {
				_ = conn.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, conn, node)
			mu.Unlock()
			all.Go(func() { pass(conn, node) })
			all.Go(func() { pass(node, conn) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, conn := range conns {
			_ = conn.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return f
}

func (f *freezer) freeze() { f.once.Do(func() { close(f.frozen) }) }

// TestCallsAreLeftWhenTheConnectionBreaks: that of a node that hangs while the call
// runs is found to be broken, long before the timeout. What takes effect once goes
// on; what does not is not sent again.
func TestCallsAreLeftWhenTheConnectionBreaks(t *testing.T) {
	t.Parallel()
	together(t, []string{"set k v", "get k", "transfer-leader 2"}, func(t *testing.T, line string) {
		exit := exitYes
		calls := 1
		if line == "transfer-leader 2" {
			exit = exitUnknown
			calls = 0
		}
		hangs, live := newFakeNode(t), newFakeNode(t)
		live.put("k", "v")
		freezer := newFreezer(t, hangs.addr)
		hangs.failWith(func(ctx context.Context) error {
			freezer.freeze()
			<-ctx.Done()
			return ctx.Err()
		})
		args := append(commandLine(t, line, freezer.address+","+live.addr), "--timeout", "10m")
		ctx, cancel := context.WithTimeout(t.Context(), 2*pollDeadline)
		defer cancel()
		var errs bytes.Buffer
		if got := runClient(ctx, args, nil, io.Discard, &errs); got != exit || ctx.Err() != nil {
			t.Errorf("exit status %d, want %d, in time %v: %s", got, exit, ctx.Err() == nil, &errs)
		}
		if _, n := live.take(); n != calls {
			t.Errorf("the second endpoint was called %d times", n)
		}
		hangs.server.Stop()
	})
}

// TestNodeThatIsStopped: a process that hangs, the leader at first, and one in no
// cluster, both named before all others, hold no command up.
func TestNodeThatIsStopped(t *testing.T) {
	t.Parallel()
	ps := startProcesses(t, 3)
	fresh := &process{tb: t, id: 9, address: "127.0.0.1:0", log: filepath.Join(t.TempDir(), "log")}
	fresh.start()
	t.Cleanup(func() { fresh.signal(syscall.SIGKILL) })
	stopped := leaderOf(t, ps)
	endpoints := []string{stopped.address, fresh.address}
	var others []*process
	for _, p := range ps {
		if p != stopped {
			others = append(others, p)
			endpoints = append(endpoints, p.address)
		}
	}
	if err := stopped.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stopped.cmd.Process.Signal(syscall.SIGCONT) }()
	run := func(args ...string) string {
		t.Helper()
		args = append(args, "--timeout=30s", "--endpoints", strings.Join(endpoints, ","))
		out, _ := runCommand(t, exitYes, "", args...)
		return out
	}
	run("set", "k", "v")
	wantText(t, "get", run("get", "k"), "v")
	run("health", "--wait")
	run("backup", filepath.Join(t.TempDir(), "backup"))
	leader := leaderOf(t, others)
	to := others[0]
	if leader == to {
		to = others[1]
	}
	run("transfer-leader", fmt.Sprint(to.id))
	run("remove", fmt.Sprint(stopped.id))
	run("add-learner", fmt.Sprintf("9=%s", fresh.address))
	eventually(t, func() error { // a learner learns that it has caught up with its leader's next heartbeat
		row := fmt.Sprintf("\n9     %s  ok           no     learner", fresh.address)
		if out := run("status"); !strings.Contains(out, row) {
			return fmt.Errorf("%q lacks %q", out, row)
		}
		return nil
	})
}
