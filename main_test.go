// What all tests use: polling, comparing, measuring memory and goroutines. And tests of
// main.go and options.go: settings, and a process's start and stop.

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

var soak = flag.Duration("soak", 3*time.Second, "how long TestSoak kills nodes")

const (
	// pollDeadline is generous: it says that something never happens.
	pollDeadline = 30 * time.Second
	// rpcTimeout bounds calls that a test gives no deadline.
	rpcTimeout = 20 * time.Second
	// fullTimeout is for commands that wait until the end of it. Half of it is for the first
	// node's metrics: with less, a busy machine takes longer, and that is what they say.
	fullTimeout = 2 * askTimeout
)

// TestMain runs more tests at once than there are processors, unless told how
// many: clusters mostly wait.
func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		_ = flag.Set("test.parallel", fmt.Sprint(max(4, runtime.GOMAXPROCS(0))))
	}
	m.Run()
}

// eventually polls f until it returns nil. Nothing else sleeps.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	within(t, pollDeadline*time.Duration(raceStep(4)), f)
}

// within is eventually with another deadline.
func within(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still after %v: %v", limit, err)
		}
	}
}

// infoOf returns what the API says of an error; nil if it is another's: gRPC's.
func infoOf(err error) *errdetails.ErrorInfo {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "raftkv.v1" {
			return info
		}
	}
	return nil
}

func reasonOf(err error) string { return infoOf(err).GetReason() }

func wantError(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || reasonOf(err) != reason {
		t.Errorf("got %v (%s %q), want %s %q", err, status.Code(err), reasonOf(err), code, reason)
	} else if reason == "INVALID_FIELD" && infoOf(err).Metadata["field"] == "" {
		t.Errorf("%v names no field", err)
	}
}

func wantText(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func wantPart(t *testing.T, got, part string) {
	t.Helper()
	if !strings.Contains(got, part) {
		t.Errorf("%q lacks %q", got, part)
	}
}

func seededRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

func mustMarshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// times is how often a test does something: more often with a longer -soak.
func times(n int) int { return int(int64(n) * int64(max(*soak, 3*time.Second)) / int64(3*time.Second)) }

// between fails the test unless d is.
func between(t *testing.T, what string, d, low, high time.Duration) {
	t.Helper()
	if d < low || d > high {
		t.Errorf("%s: %v, not between %v and %v", what, d, low, high)
	}
}

// raceStep is every how manieth case is tried: the race detector makes the
// tests slow, and has nothing to find in those that run in one goroutine.
func raceStep(step int) int {
	if hasRaceDetector() {
		return step
	}
	return 1
}

func hasRaceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// needsOwnMemory skips a test that measures, or bounds, what the program takes of memory:
// the race detector takes several times as much.
func needsOwnMemory(t *testing.T) {
	t.Helper()
	if hasRaceDetector() {
		t.Skip("the race detector has memory of its own")
	}
}

// sharedLog is a log that a test reads while nodes write it.
type sharedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *sharedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *sharedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// heapEver is the heap ever allocated, but for what small objects are still to
// fill.
func heapEver() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// allocates reports whether f allocates no more than that.
func allocates(most int, f func()) (n uint64, ok bool) {
	before := heapEver()
	f()
	if n = heapEver() - before; n > uint64(most) { // or others' allocations were added up only now: exactly, but slowly
		var from, to runtime.MemStats
		runtime.ReadMemStats(&from)
		f()
		runtime.ReadMemStats(&to)
		n = to.TotalAlloc - from.TotalAlloc
	}
	return n, n <= uint64(most)
}

func TestOptions(t *testing.T) {
	for _, c := range []struct {
		args, env string
		want      string // in the error; empty: accepted
	}{
		{args: "--id 1 --addr 127.0.0.1:21001"},
		{args: "--id 1 --addr [::1]:21001"},
		{args: "--id 1 --addr localhost:0"},
		{args: "--id 1 --addr [::1%lo]:0"},
		{args: "--id 1 --addr [::ffff:127.0.0.1]:0"},
		{args: "--id 1 --addr [fe80::1%eth0]:1", want: "--insecure"},
		{args: "--id 1 --addr [fe80::1%eth0]:1 --insecure"},
		{args: "--id 1 --addr [::ffff:0.0.0.0]:1 --insecure", want: "--advertise"},
		{args: "--id 1 --addr [::%lo]:1 --insecure", want: "--advertise"},
		{args: "--id=1 --addr 0.0.0.0:21001 --advertise 10.0.0.1:21001 --insecure"},
		{args: "--id 1 --addr :21001 --advertise 127.0.0.1:21001 --insecure"},
		{args: "--addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_ID=7"},
		{args: "--id 1", env: "RAFT_KEY_VALUE_ADDR=127.0.0.1:1 RAFT_KEY_VALUE_ELECTION_TIMEOUT=1s RAFT_KEY_VALUE_INSECURE=true"},
		{args: "--addr 127.0.0.1:1", want: "--id"},
		{args: "--id 0 --addr 127.0.0.1:1", want: "--id"},
		{args: "--id -1 --addr 127.0.0.1:1", want: "flag -id: want a whole number"},
		{args: "--id 1", want: "--addr is needed"},
		{args: "--id 1 --addr 127.0.0.1:1 --heartbeat 1", want: "number and its unit"},
		{args: "--id 1 --addr 127.0.0.1:1 init 1=127.0.0.1:1", want: "before all flags"},
		{args: "--id 1 --addr 127.0.0.1", want: "host:port"},
		{args: "--id 1 --addr 0.0.0.0:1 --insecure", want: "--advertise"},
		{args: "--id 1 --addr :1 --insecure", want: "--advertise"},
		{args: "--id 1 --addr [::]:1 --insecure", want: "--advertise"},
		{args: "--id 1 --addr 10.0.0.1:1", want: "--insecure"},
		{args: "--id 1 --addr 127.0.0.1:1 --advertise example.com:1", want: "--insecure"},
		{args: "--id 1 --addr 127.0.0.1:1 --advertise nonsense", want: "host:port"},
		{args: "--id 1 --addr 127.0.0.1:1 --insecure --advertise 0.0.0.0:1", want: "find"},
		{args: "--id 1 --addr 127.0.0.1:1 --insecure --advertise 127.0.0.1:0", want: "find"},
		{args: "--id 1 --addr 127.0.0.1:1 --heartbeat 1ms", want: "--heartbeat"},
		{args: "--id 1 --addr 127.0.0.1:1 --heartbeat 11s --election-timeout 1m", want: "--heartbeat"},
		{args: "--id 1 --addr 127.0.0.1:1 --election-timeout 200ms", want: "--election-timeout"},
		{args: "--id 1 --addr 127.0.0.1:1 --log-bytes 5", want: "--log-bytes"},
		{args: "--id 1 --addr 127.0.0.1:1 --log-level loud", want: "flag -log-level: want debug, info, warn or error"},
		{args: "--id 1 --addr 127.0.0.1:1 --log-level warn"},
		{args: "--id 1 --addr 127.0.0.1:1 --log-format json"},
		{args: "--id 1 --addr 127.0.0.1:1 --log-format xml", want: "flag -log-format: want text or json"},
		{args: "--id 1 --addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_LOG_FORMAT=", want: "RAFT_KEY_VALUE_LOG_FORMAT: want text or json"},
		{args: "--addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_ID=x", want: `invalid value "x" of RAFT_KEY_VALUE_ID: want a whole number`},
		{args: "--id 1 --addr 127.0.0.1:1 --data-dir=", want: "--data-dir is empty"},
		{args: "--id 1 --addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_DATA_DIR=", want: "RAFT_KEY_VALUE_DATA_DIR is empty"},
		{args: "--id 1 --addr 127.0.0.1:1 --data-dir d", env: "RAFT_KEY_VALUE_DATA_DIR="},
		{args: "--id 1 --addr 127.0.0.1:1 --cert-file c --key-file k", want: "give all three, or none"},
		{args: "--id 1 --addr 127.0.0.1:1 --peer-ca-file p", want: "give all three, or none"},
		{args: "--id 1 --addr 127.0.0.1:1 --cert-file=", want: "flag -cert-file: name a file, or leave it out"},
		{args: "--id 1 --addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_PEER_CA_FILE=", want: "RAFT_KEY_VALUE_PEER_CA_FILE: name a file"},
		{args: "--id 1 --addr 10.0.0.1:1 --cert-file c --key-file k --trusted-ca-file t"},
		{args: "--id 1 --addr 10.0.0.1:1 --cert-file c --key-file k --trusted-ca-file t --insecure", want: "leave one of them out"},
		{args: "--id 1 --addr 127.0.0.1:1 --insecure=maybe", want: "-insecure: want true or false"},
		{args: "--id 1 --addr 127.0.0.1:1 --log-bytes 64MiB", want: "flag -log-bytes: want a whole number"},
		{args: "--id 1 --addr 127.0.0.1:1 nosuch", want: "unknown sub-command \"nosuch\""},
		{args: "--id 1 --addr 127.0.0.1:65535"},
		{args: "--id 1 --addr 127.0.0.1:65536", want: "--addr: address \"127.0.0.1:65536\": want a port from 0 to 65535"},
		{args: "--id 1 --addr localhost:http", want: "want a port from 0 to 65535"},
		{args: "--id 1 --addr localhost:-1", want: "want a port from 0 to 65535"},
		{args: "--id 1 --addr localhost:", want: "host:port"},
		{args: "--id 1 --addr 127.0.0.1:1 --advertise localhost:x", want: "--advertise: address \"localhost:x\": want a port"},
		{args: "--id 1 --addr 127.0.0.1:1 --initial-cluster 1=127.0.0.1:1,2=127.0.0.1:2"},
		{args: "--id 1 --addr 127.0.0.1:9 --advertise localhost:1 --initial-cluster 1=localhost:1"},
		{args: "--id 1 --addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_INITIAL_CLUSTER=1=127.0.0.1:1"},
		{args: "--id 1 --addr 127.0.0.1:1 --initial-cluster 1=localhost:1", want: "has 1=localhost:1, and this node is 1=127.0.0.1:1, by --id and --addr"},
		{args: "--id 1 --addr 127.0.0.1:2 --advertise 127.0.0.1:1 --initial-cluster 1=127.0.0.1:2", want: "by --id and --advertise"},
		{args: "--id 2 --addr 127.0.0.1:1 --initial-cluster 1=127.0.0.1:1,2=127.0.0.1:2", want: "has 1=127.0.0.1:1, and this node is 2=127.0.0.1:1"},
		{args: "--id 3 --addr 127.0.0.1:3 --initial-cluster 1=127.0.0.1:1,2=127.0.0.1:2", want: "--initial-cluster does not name this node, 3=127.0.0.1:3"},
		{args: "--id 3 --addr 127.0.0.1:3 --data-dir d --initial-cluster 1=127.0.0.1:1"}, // it may have state
		{args: "--id 1 --addr 127.0.0.1:0 --initial-cluster 1=127.0.0.1:1", want: "--initial-cluster needs the port of this node"},
		{args: "--id 1 --addr 127.0.0.1:1 --initial-cluster 1=127.0.0.1:1,2=127.0.0.1:1", want: "has the id or the address of another"},
		{args: "--id 1 --addr 127.0.0.1:1 --initial-cluster=", want: "flag -initial-cluster: \"\": want ID=HOST:PORT"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 127.0.0.1:2,127.0.0.1:1"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 127.0.0.1:2 --join-as learner"},
		{args: "--id 1 --addr 127.0.0.1:1 --join-as voter", env: "RAFT_KEY_VALUE_JOIN=127.0.0.1:2"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 127.0.0.1:1", want: "--join names only this node"},
		{args: "--id 1 --addr 127.0.0.1:2 --advertise localhost:1 --join localhost:1,127.0.0.1:2", want: "--join names only this node"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 127.0.0.1:2,127.0.0.1:2", want: "stands there twice"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 2=127.0.0.1:2", want: "--initial-cluster"},
		{args: "--id 1 --addr 127.0.0.1:1 --join=", want: "flag -join: address"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 0.0.0.0:2", want: "want where the others find the node"},
		{args: "--id 1 --addr 127.0.0.1:1 --join-as voter", want: "--join-as goes with --join"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 127.0.0.1:2 --join-as leader", want: "flag -join-as: want voter or learner"},
		{args: "--id 1 --addr 127.0.0.1:1 --join 127.0.0.1:2 --initial-cluster 1=127.0.0.1:1", want: "want one of them"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr 127.0.0.1:0"},
		{args: "--id 1 --addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_HTTP_ADDR=localhost:8080"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr :8080", want: ":8080 is beyond loopback, and there is no TLS"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr 10.0.0.1:8080", want: "beyond loopback"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr :8080 --insecure"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr :8080 --cert-file c --key-file k --trusted-ca-file t"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr 8080", want: "--http-addr: address \"8080\": want host:port"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr=", want: "--http-addr is empty"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr 127.0.0.1:0 --pprof"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr :0 --pprof --cert-file c --key-file k --trusted-ca-file t"},
		{args: "--id 1 --addr 127.0.0.1:1 --http-addr :0 --pprof --insecure", want: "--pprof needs TLS, or loopback"},
		{args: "--id 1 --addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_PPROF=true", want: "RAFT_KEY_VALUE_PPROF goes with --http-addr"},
		{args: "--version"},
		{args: "--version nosuch", want: "unknown sub-command"},
	} {
		env := map[string]string{}
		for _, kv := range strings.Fields(c.env) {
			k, v, _ := strings.Cut(kv, "=")
			env[k] = v
		}
		var out strings.Builder
		_, err := parseOptions(strings.Fields(c.args), &out, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
		wantText(t, c.args, out.String(), "")
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q, %q: %v, want %q", c.args, c.env, err, c.want)
		}
	}
}

// TestExposed: the log warns if others reach the node, by any of its addresses, and nobody is asked who they are.
func TestExposed(t *testing.T) {
	for args, want := range map[string]bool{
		"--addr 127.0.0.1:1 --http-addr 127.0.0.1:2":                                      false,
		"--addr 127.0.0.1:1 --http-addr :2 --insecure":                                    true,
		"--addr 10.0.0.1:1 --insecure":                                                    true,
		"--addr 127.0.0.1:1 --advertise 10.0.0.1:1 --insecure":                            true,
		"--addr 10.0.0.1:1 --http-addr :2 --cert-file c --key-file k --trusted-ca-file t": false,
	} {
		noEnvironment := func(string) (string, bool) { return "", false }
		o, err := parseOptions(append([]string{"--id", "1"}, strings.Fields(args)...), io.Discard, noEnvironment)
		if err != nil || o.isExposed() != want {
			t.Errorf("%s: %v, %v", args, o.isExposed(), err)
		}
	}
}

// TestErrorsNameWhatSetTheValue: the environment variable, or the flag in its place.
func TestErrorsNameWhatSetTheValue(t *testing.T) {
	for flag, wrong := range map[string]string{
		"id": "0", "addr": "nonsense", "advertise": "127.0.0.1:0", "heartbeat": "1ms", "election-timeout": "1ms",
		"data-dir": "", "log-bytes": "5", "http-addr": "nonsense",
	} {
		right := map[string]string{"id": "1", "addr": "127.0.0.1:1"}
		right[flag] = wrong
		env := func(name string) (string, bool) {
			for f, value := range right {
				if variableOf(f) == name {
					return value, true
				}
			}
			return "", false
		}
		_, err := parseOptions(nil, io.Discard, env)
		wantPart(t, fmt.Sprint(err), variableOf(flag))
		if strings.Contains(fmt.Sprint(err), "--"+flag) {
			t.Errorf("it was no flag: %v", err)
		}
		_, err = parseOptions([]string{"--" + flag + "=" + wrong}, io.Discard, env)
		wantPart(t, fmt.Sprint(err), "--"+flag)
		if strings.Contains(fmt.Sprint(err), variableOf(flag)) {
			t.Errorf("it was no variable: %v", err)
		}
	}
}

// TestAddressesOfTheAPI: what no other node can dial is refused.
func TestAddressesOfTheAPI(t *testing.T) {
	for _, address := range []string{
		"", "a", "a:", ":1", "a:0", "a:x", "a:http", "a:65536", "a:-1", "a b:1", "a\n:1", strings.Repeat("a", 256) + ":1",
	} {
		wantError(t, validateNode("node", &kvpb.Node{Id: 1, Address: address}), codes.InvalidArgument, "INVALID_FIELD")
	}
	for _, address := range []string{"a:1", "[::1%lo]:65535", "127.0.0.1:21001"} {
		if err := validateNode("node", &kvpb.Node{Id: 1, Address: address}); err != nil {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestFlagsGoBeforeTheEnvironment(t *testing.T) {
	env := func(k string) (string, bool) { return "9", k == "RAFT_KEY_VALUE_ID" }
	o, err := parseOptions([]string{"--id", "1", "--addr", "127.0.0.1:1"}, io.Discard, env)
	if err != nil || o.id != 1 {
		t.Fatal(o.id, err)
	}
}

// TestAdvertised: a node is known by the name that it was given, not by what that
// means here; if it picks a port, by that.
func TestAdvertised(t *testing.T) {
	for _, test := range []struct{ addr, advertise, want string }{
		{"localhost:0", "", "localhost:*"}, {"127.0.0.1:0", "", "127.0.0.1:*"}, {"127.0.0.1:0", "localhost:9", "localhost:9"},
	} {
		o := defaultOptions()
		o.id, o.addr, o.advertise = 1, test.addr, test.advertise
		ctx, cancel := context.WithCancel(t.Context())
		err := run(ctx, o, quiet(), func(s *server) {
			_, port, _ := net.SplitHostPort(s.n.self.Address)
			if want := strings.ReplaceAll(test.want, "*", port); s.n.self.Address != want || port == "0" {
				t.Errorf("%+v: it is at %s", test, s.n.self.Address)
			}
			cancel()
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	o := defaultOptions()
	o.id, o.addr = 1, l.Addr().String()
	err = run(context.Background(), o, quiet(), func(*server) { t.Error("ready") })
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatal(err)
	}
}

// TestSignals: one SIGTERM is a stop with status 0; a port in use and a usage
// error have the statuses of the conventions.
func TestSignals(t *testing.T) {
	p := startProcesses(t, 1)[0]
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	for _, c := range []struct {
		args   []string
		status int
	}{{[]string{"--id", "2", "--addr", p.address}, 1}, {[]string{"--id", "2"}, 2}, {[]string{"nosuch"}, 2}, {nil, 2}} {
		cmd := commandOf(log, c.args...)
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != c.status {
			t.Errorf("%q: %v, want status %d", c.args, err, c.status)
		}
	}
	p.signal(syscall.SIGTERM)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("SIGTERM: status %d", code)
	}
	if text, err := os.ReadFile(p.log); err != nil || bytes.Count(text, []byte("msg=stopped")) != 1 {
		t.Errorf("%s, %v", text, err)
	}
}
