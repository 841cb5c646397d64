// Tests of the command line, against fake nodes and real ones: what is taken as
// arguments, what each command sends and prints, its exit status, which endpoint is
// called, and which failed calls go on to another one.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// fakeNode answers calls as a node might. Its interceptor counts calls but for
// those of OpenSession, Metrics and health, and lets the test fail them.
type fakeNode struct {
	kvpb.UnimplementedKVServiceServer
	kvpb.UnimplementedClusterServiceServer
	addr   string
	health *health.Server
	server *grpc.Server

	mu      sync.Mutex
	calls   int
	last    proto.Message
	fail    func(context.Context) error
	data    map[string][]byte
	metrics *kvpb.MetricsResponse
	asked   int   // for metrics, since setMetrics
	refuse  int   // so many calls of OpenSession
	barred  error // the answer to all others of them, if there is one
	opened  uint64
	ids     []*kvpb.RequestId // of all writes counted
	version uint64            // with which compares fail
	backup  []byte
	// scanned, if there is one, is called before each response of a Scan, with the number of
	// those before it. After io.EOF the Scan ends as if that were all.
	scanned func(ctx context.Context, responses int) error
	watched func(*kvpb.WatchRequest, kvpb.KVService_WatchServer) error // nil: it says nothing but the version
}

func newFakeNode(t *testing.T) *fakeNode {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeNode{addr: l.Addr().String(), health: health.NewServer(), data: map[string][]byte{}, metrics: &kvpb.MetricsResponse{ClusterId: 10}}
	pings := keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true} // as a node has it
	f.server = grpc.NewServer(grpc.UnaryInterceptor(f.intercept), grpc.KeepaliveEnforcementPolicy(pings))
	kvpb.RegisterKVServiceServer(f.server, f)
	kvpb.RegisterClusterServiceServer(f.server, f)
	healthpb.RegisterHealthServer(f.server, f.health)
	go f.server.Serve(l)
	t.Cleanup(f.server.Stop)
	return f
}

func (f *fakeNode) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	switch info.FullMethod {
	case healthpb.Health_Check_FullMethodName, kvpb.ClusterService_Metrics_FullMethodName, kvpb.KVService_OpenSession_FullMethodName:
		return handler(ctx, req)
	}
	if err := f.count(ctx, req); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// count counts a call, and fails it if the test wants that.
func (f *fakeNode) count(ctx context.Context, req any) error {
	f.mu.Lock()
	fail := f.fail
	f.calls++
	f.last = req.(proto.Message)
	if w, ok := req.(interface{ GetRequestId() *kvpb.RequestId }); ok {
		f.ids = append(f.ids, w.GetRequestId())
	}
	f.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(ctx)
}

// do runs change with the lock that the calls take: a client in another
// process does not order what the test does before what a call does.
func (f *fakeNode) do(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeNode) put(key, value string) {
	f.do(func() { f.data[key] = []byte(value) })
}

func (f *fakeNode) failWith(fail func(context.Context) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fail
}

func (f *fakeNode) setMetrics(m *kvpb.MetricsResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.metrics, f.asked = m, 0
}

// awaitAsked waits until the metrics were asked for twice, so that whoever asks
// in turns has dealt with the first answer.
func (f *fakeNode) awaitAsked(ctx context.Context) {
	for asked := 0; asked < 2 && ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
		f.mu.Lock()
		asked = f.asked
		f.mu.Unlock()
	}
}

// take returns the last request and how many there were since the last take.
func (f *fakeNode) take() (proto.Message, int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = 0
	return f.last, calls
}

func (f *fakeNode) value(key string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return string(f.data[key])
}

func (f *fakeNode) Get(_ context.Context, r *kvpb.GetRequest) (*kvpb.GetResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v, ok := f.data[r.Key]; ok {
		return &kvpb.GetResponse{Value: append([]byte{}, v...), Version: 7}, nil
	}
	return &kvpb.GetResponse{}, nil
}

// fakePage is the most items of a page, and of a response of a Scan, and how many keys a
// DeleteRange deletes at most.
const fakePage = 3

// List has one page only.
func (f *fakeNode) List(_ context.Context, r *kvpb.ListRequest) (*kvpb.ListResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &kvpb.ListResponse{Items: f.items(rangeOf(r.Prefix, r.Start, r.End), r.KeysOnly)}
	if len(resp.Items) > fakePage {
		resp.Items = resp.Items[:fakePage]
		resp.NextPageToken = resp.Items[fakePage-1].Key
	}
	return resp, nil
}

// items are the keys of a range. mu is held.
func (f *fakeNode) items(r keyRange, keysOnly bool) []*kvpb.KeyValue {
	var items []*kvpb.KeyValue
	for _, k := range slices.Sorted(maps.Keys(f.data)) {
		if !r.has([]byte(k)) {
			continue
		}
		item := &kvpb.KeyValue{Key: k, Version: 7}
		if !keysOnly {
			item.Value = f.data[k]
		}
		items = append(items, item)
	}
	return items
}

func (f *fakeNode) Scan(r *kvpb.ScanRequest, s kvpb.KVService_ScanServer) error {
	if err := f.count(s.Context(), r); err != nil {
		return err
	}
	f.mu.Lock()
	items := f.items(rangeOf(r.Prefix, r.Start, r.End), r.KeysOnly)
	scanned := f.scanned
	f.mu.Unlock()
	responses := []*kvpb.ScanResponse{{ClusterId: 10, Version: 7}}
	for part := range slices.Chunk(items, fakePage) {
		responses = append(responses, &kvpb.ScanResponse{Items: part})
	}
	for i, resp := range responses {
		if scanned != nil {
			err := scanned(s.Context(), i)
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
		if err := s.Send(resp); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeNode) DeleteRange(_ context.Context, r *kvpb.DeleteRangeRequest) (*kvpb.DeleteRangeResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	items := f.items(rangeOf(r.Prefix, r.Start, r.End), true)
	if len(items) > fakePage {
		return &kvpb.DeleteRangeResponse{TooMany: true}, nil
	}
	for _, item := range items {
		delete(f.data, item.Key)
	}
	f.version++
	return &kvpb.DeleteRangeResponse{Deleted: uint64(len(items)), Version: f.version}, nil
}

func (f *fakeNode) OpenSession(context.Context, *kvpb.OpenSessionRequest) (*kvpb.OpenSessionResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse--; f.refuse >= 0 {
		return nil, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER, "no leader")
	}
	if f.barred != nil {
		return nil, f.barred
	}
	f.opened++
	return &kvpb.OpenSessionResponse{Session: 40 + f.opened}, nil
}

func (f *fakeNode) Set(_ context.Context, r *kvpb.SetRequest) (*kvpb.SetResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.ExpectedVersion != nil && *r.ExpectedVersion != f.version {
		return &kvpb.SetResponse{Version: f.version, CompareFailed: true}, nil
	}
	f.data[r.Key] = r.Value
	return &kvpb.SetResponse{Version: 8}, nil
}

func (f *fakeNode) Delete(_ context.Context, r *kvpb.DeleteRequest) (*kvpb.DeleteResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.ExpectedVersion != nil && *r.ExpectedVersion != f.version {
		return &kvpb.DeleteResponse{Version: f.version, CompareFailed: true}, nil
	}
	_, ok := f.data[r.Key]
	delete(f.data, r.Key)
	return &kvpb.DeleteResponse{Deleted: ok, Version: 9}, nil
}

func (f *fakeNode) Init(context.Context, *kvpb.InitRequest) (*kvpb.InitResponse, error) {
	return &kvpb.InitResponse{ClusterId: 10}, nil
}

func (f *fakeNode) AddLearner(context.Context, *kvpb.AddLearnerRequest) (*kvpb.AddLearnerResponse, error) {
	return &kvpb.AddLearnerResponse{}, nil
}

func (f *fakeNode) ChangeMembership(context.Context, *kvpb.ChangeMembershipRequest) (*kvpb.ChangeMembershipResponse, error) {
	return &kvpb.ChangeMembershipResponse{}, nil
}

func (f *fakeNode) TransferLeader(context.Context, *kvpb.TransferLeaderRequest) (*kvpb.TransferLeaderResponse, error) {
	return &kvpb.TransferLeaderResponse{}, nil
}

func (f *fakeNode) Metrics(context.Context, *kvpb.MetricsRequest) (*kvpb.MetricsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return f.metrics, nil
}

// listenSilently takes connections and never says a word.
func listenSilently(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// closedAddress refuses connections: nobody listens on port 1.
const closedAddress = "127.0.0.1:1"

// runOperator runs a command that changes the membership until it is done. On a busy machine a
// member can seem silent, or be behind, and such a command is not repeated by itself.
func runOperator(t *testing.T, args ...string) {
	t.Helper()
	eventually(t, func() error {
		var errs bytes.Buffer
		exit := runClient(t.Context(), args, nil, io.Discard, &errs)
		switch exit {
		case exitYes:
			return nil
		case exitNotDone, exitUnknown:
			return errors.New(errs.String())
		}
		t.Fatalf("%q: exit status %d; stderr %q", args, exit, &errs)
		return nil
	})
}

// runCommand runs a sub-command and checks its exit status, and that an error
// is one line on stderr: JSON if that is wanted.
func runCommand(t *testing.T, want int, stdin string, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	if got := runClient(t.Context(), args, strings.NewReader(stdin), &out, &errs); got != want {
		t.Errorf("%q: exit status %d, want %d; stderr %q", args, got, want, errs.String())
	}
	lines := strings.Count(errs.String(), "\n")
	printed := strings.HasPrefix(errs.String(), "raft-key-value: "+args[0]+": ")
	var e commandError
	if json.Unmarshal(errs.Bytes(), &e) == nil {
		printed = e.Text != "" && e.Status == want && e.Endpoints != nil
	}
	if want != 0 && (lines != 1 || !printed) || want == 2 && out.Len() > 0 {
		t.Errorf("%q: stdout %q, stderr %q, want one line of stderr", args, out.String(), errs.String())
	}
	return out.String(), errs.String()
}

func TestClientUsageErrors(t *testing.T) {
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", closedAddress) // A call would be exit status 3.
	for _, line := range []string{
		"get", "get a b", "set a", "set a b c", "get a --nosuch", "get a -o yaml", "get a --timeout x", "set a b --local",
		"set a b --if-version", "set a b --if-version -1", "delete a --if-version x", "get a --if-version 1",
		"get a --endpoints x", "get a --endpoints ,", "get a --endpoints=", "get a --endpoints :1",
		"init", "init 1", "init x=a:1", "init 0=a:1", "init 1=a", "init 1=:1", "init 1=a:", "add-learner 1=a:1 2=b:1", "add-learner 1",
		"remove x", "remove 0", "remove -- -1", "remove 1=a:1", "transfer-leader", "transfer-leader x", "change-membership",
		"change-membership 1 x", "status x", "help nosuch", "help get set", "version x", "health x",
	} {
		_, errs := runCommand(t, 2, "", strings.Fields(line)...)
		wantPart(t, errs, "; see raft-key-value help "+strings.Fields(line)[0])
	}
	runCommand(t, 2, "", "get", "\xff")
	runCommand(t, 2, "", "set", "", "v")
	for _, addr := range []string{"0.0.0.0:1", "[::]:1", "127.0.0.1:0"} {
		_, errs := runCommand(t, 2, "", "restore", "x", "--data-dir", "d", "--id", "1", "--addr", addr)
		wantPart(t, errs, "want where the others find the node")
	}
	for line, hint := range map[string]string{
		"set k -5": "goes behind --", "get k --timeout 1": "number and its unit", "health --service nosuch": "restart", "list --limit -1": "want a whole number", "list --limit x": "want a whole number",
		"set k v --if-version x": "want a version", "delete k --if-version 99999999999999999999": "want a version", "get k --timeout x": "number and its unit",
		"get k --timeout 0": "--timeout 0s: want more than 0", "health --wait --timeout -5s": "--timeout -5s: want more than 0",
		"backup f --data-dir=": "it is empty; leave the flag out", "restore f --id 1": "--data-dir, --id and --addr are needed",
	} {
		_, errs := runCommand(t, 2, "", strings.Fields(line)...)
		wantPart(t, errs, hint)
		if strings.Contains(errs, "strconv.") || strings.Contains(errs, "time:") {
			t.Errorf("it shows what it is made of: %s", errs)
		}
	}
}

func TestClientHelp(t *testing.T) {
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", "bogus") // which nobody asks for
	runCommand(t, 0, "", "version")
	list, _ := runCommand(t, 0, "", "help")
	wantPart(t, list, "raft-key-value --id N --addr HOST:PORT")
	for name := range commands() {
		wantPart(t, list, "\n  "+name+" ")
		help, _ := runCommand(t, 0, "", "help", name)
		for _, args := range [][]string{{name, "--help"}, {name, "-h"}, {name, "x", "--help", "y"}} {
			got, _ := runCommand(t, 0, "", args...)
			wantText(t, strings.Join(args, " "), got, help)
		}
		wantPart(t, help, "Usage: raft-key-value "+name)
		if strings.Contains(help, " \n") {
			t.Errorf("a blank at the end of a line: %s", help)
		}
		if calls := !slices.Contains([]string{"certs", "completion", "help", "restore", "verify", "version"}, name); calls != strings.Contains(help, "\n  -endpoints ") {
			t.Errorf("it calls a node %v, but: %s", calls, help)
		}
	}
	if isCommand("nosuch") || isCommand("") {
		t.Error("an unknown command is known")
	}
	version, _ := runCommand(t, 0, "", "version")
	wantText(t, "version", version, "raft-key-value "+buildVersion()+"\n")
	version, _ = runCommand(t, 0, "", "version", "-o", "json")
	wantText(t, "version", version, fmt.Sprintf("{\"version\":%q}\n", buildVersion()))
}

// TestHelpFits: the help of a command has no more of what many commands have than fits it.
func TestHelpFits(t *testing.T) {
	t.Parallel()
	for name, cmd := range commands() {
		help := commandHelp(name)
		has := func(words string, want bool) {
			t.Helper()
			if strings.Contains(help, words) != want {
				t.Errorf("help %s: it has %q: %v; want %v\n%s", name, words, !want, want, help)
			}
		}
		isFlag := func(name string) bool {
			return strings.Contains(help, "\n  -"+name+" ") || strings.Contains(help, "\n  -"+name+"\n")
		}
		callsOne := cmd.asks == asksOne || cmd.asks == asksUntilTimeout || cmd.asks == asksFounder
		if cmd.offline != (cmd.asks == asksNobody) {
			t.Errorf("%s: it calls nobody, or asks nobody", name)
		}
		has("passed over", callsOne)
		has("in no cluster.\n", callsOne && name != "init")
		has("a local read", isFlag("local"))
		has("RAFT_KEY_VALUE_CERT_FILE", isFlag("cert-file"))
		has("--endpoints, --timeout and", isFlag("endpoints"))
		has("ErrorReason", isFlag("endpoints"))
		has("stderr has", isFlag("timeout"))
		has("1 for no", cmd.saysNo)
		has("and 4 if", cmd.mayBeUnknown)
		has("1m0s", false)
		has("0m0s", false)
		details := cmd.details + cmd.summary
		if strings.Contains(details, "exit status is 1") && !cmd.saysNo {
			t.Errorf("%s: an exit status of 1 is not listed", name)
		}
		if strings.Contains(details, "exit status is 4") && !cmd.mayBeUnknown {
			t.Errorf("%s: an exit status of 4 is not listed", name)
		}
	}
}

func TestClientTimeouts(t *testing.T) {
	for name, cmd := range commands() {
		want := 5 * time.Second
		switch name {
		case "init", "add-learner", "change-membership", "promote", "demote", "remove", "watch":
			want = time.Minute
		case "backup", "restore", "verify":
			want = time.Hour
		}
		if cmd.timeout != want {
			t.Errorf("%s: timeout %v, want %v", name, cmd.timeout, want)
		}
	}
}

func TestClientKeys(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", f.addr)
	out, errs := runCommand(t, 0, "", "set", "k", "v")
	wantText(t, "set", out+errs, "")
	out, _ = runCommand(t, 0, "", "get", "k")
	wantText(t, "get", out, "v")
	out, _ = runCommand(t, 0, "", "get", "-o", "json", "k")
	wantText(t, "get", out, `{"value":"dg==","version":"7"}`+"\n")
	out, _ = runCommand(t, 0, "", "set", "k", "-o", "json", "--", "-5")
	wantText(t, "set", out, `{"version":"8","compare_failed":false}`+"\n")
	wantText(t, "--", f.value("k"), "-5")
	runCommand(t, 0, "", "set", "--", "-k", "--help")
	wantText(t, "--", f.value("-k"), "--help")

	runCommand(t, 0, "from\x00stdin\n", "set", "k", "-")
	out, _ = runCommand(t, 0, "", "get", "k", "--local")
	wantText(t, "get", out, "from\x00stdin\n")
	if req, _ := f.take(); !req.(*kvpb.GetRequest).Local {
		t.Error("--local was not asked for")
	}
	runCommand(t, 0, "", "get", "k", "--local", "--min-version", "6")
	if req, _ := f.take(); req.(*kvpb.GetRequest).MinVersion != 6 {
		t.Errorf("sent %v", req)
	}
	runCommand(t, 2, strings.Repeat("x", 2<<20), "set", "k", "-")
	runCommand(t, 0, strings.Repeat("x", maxValueBytes), "set", "k", "-")
	if n := len(f.value("k")); n != maxValueBytes {
		t.Errorf("%d bytes of stdin were sent, want all", n)
	}
	runCommand(t, 0, "", "set", "k", "")
	out, _ = runCommand(t, 0, "", "get", "k", "-o=json")
	wantPart(t, out, `"value":""`)

	out, _ = runCommand(t, 1, "", "get", "nosuch", "-o=json")
	wantText(t, "get", out, `{"version":"0"}`+"\n")

	out, _ = runCommand(t, 0, "", "delete", "-o", "json", "k")
	wantText(t, "delete", out, `{"deleted":true,"version":"9","compare_failed":false}`+"\n")
	for _, name := range []string{"delete", "get"} {
		out, errs = runCommand(t, 1, "", name, "k")
		wantText(t, name, out+errs, "raft-key-value: "+name+": not found\n")
	}
}

func TestClientList(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", f.addr)
	var all string
	head := `{"cluster_id":"10","version":"7","items":[]}` + "\n"
	for _, k := range []string{"a1", "a2", "a3", "a4", "b"} {
		f.put(k, "v")
		all += fmt.Sprintf("%q\t7\t\"v\"\n", k)
	}
	for args, want := range map[string]string{
		"list":                                 all,
		"list a":                               strings.TrimSuffix(all, "\"b\"\t7\t\"v\"\n"),
		"list --keys-only":                     "\"a1\"\n\"a2\"\n\"a3\"\n\"a4\"\n\"b\"\n",
		"list --keys-only --limit 4":           "\"a1\"\n\"a2\"\n\"a3\"\n\"a4\"\n",
		"list --keys-only --limit 3":           "\"a1\"\n\"a2\"\n\"a3\"\n",
		"list b --keys-only --limit 9":         "\"b\"\n",
		"list c":                               "",
		"list --keys-only --start a3":          "\"a3\"\n\"a4\"\n\"b\"\n",
		"list --keys-only --start a3 --end a4": "\"a3\"\n",
		"list --keys-only --end a2":            "\"a1\"\n",
		"list c -o json":                       head,
		"list a -o json --keys-only --limit 4": head + jsonKeys("a1", "a2", "a3") + jsonKeys("a4"),
		"list a -o json --keys-only --limit 2": head + jsonKeys("a1", "a2"),
		"list b -o json":                       head + strings.ReplaceAll(jsonKeys("b"), `""`, `"dg=="`),
	} {
		out, _ := runCommand(t, 0, "", strings.Fields(args)...)
		wantText(t, args, out, want)
	}
	runCommand(t, 0, "", "list", "--local", "--min-version", "5", "--start", "a", "--end", "b", "--keys-only")
	want := &kvpb.ScanRequest{Start: "a", End: "b", KeysOnly: true, Local: true, MinVersion: 5}
	if req, _ := f.take(); !proto.Equal(req, want) {
		t.Errorf("sent %v, want %v", req, want)
	}
}

// jsonKeys is a response of a Scan that has these keys, as JSON.
func jsonKeys(keys ...string) string {
	var items []string
	for _, k := range keys {
		items = append(items, fmt.Sprintf(`{"key":%q,"value":"","version":"7"}`, k))
	}
	return fmt.Sprintf(`{"cluster_id":"0","version":"0","items":[%s]}`+"\n", strings.Join(items, ","))
}

// TestClientListGoesOn: to another endpoint before the first key, and to none after it.
func TestClientListGoesOn(t *testing.T) {
	t.Parallel()
	for breaksAt := range 4 {
		for _, output := range []string{"text", "json"} {
			first, second := newFakeNode(t), newFakeNode(t)
			for _, f := range []*fakeNode{first, second} {
				for _, k := range []string{"a1", "a2", "a3", "a4", "a5", "a6", "a7"} {
					f.put(k, "v")
				}
			}
			first.do(func() {
				first.scanned = func(_ context.Context, responses int) error {
					if responses == breaksAt {
						return status.Error(codes.Unavailable, "broken")
					}
					return nil
				}
			})
			exit := exitYes
			calls := 1
			want := ""
			if breaksAt > 1 {
				exit = exitNotDone
				calls = 0
				want = fmt.Sprintf("it broke off after %d keys, the last of which is \"a%d\": %s: broken", 3*(breaksAt-1), 3*(breaksAt-1), first.addr)
			}
			args := []string{"list", "-o", output, "--endpoints", first.addr + "," + second.addr}
			var out, errs bytes.Buffer
			if got := runClient(t.Context(), args, nil, &out, &errs); got != exit {
				t.Errorf("%d, %s: exit status %d, want %d: %s", breaksAt, output, got, exit, &errs)
			}
			wantPart(t, strings.ReplaceAll(errs.String(), `\"`, `"`), want)
			printed := strings.Count(out.String(), "a1")
			heads := strings.Count(out.String(), `"cluster_id":"10"`)
			if printed != 1 || (output == "json") != (heads == 1) {
				t.Errorf("%d: printed %s", breaksAt, &out)
			}
			if _, n := second.take(); n != calls {
				t.Errorf("%d: the second endpoint was called %d times, want %d", breaksAt, n, calls)
			}
		}
	}
}

// TestClientListWithoutAWord: an end before the first response is not an empty list.
func TestClientListWithoutAWord(t *testing.T) {
	f := newFakeNode(t)
	f.do(func() { f.scanned = func(context.Context, int) error { return io.EOF } })
	_, errs := runCommand(t, exitNotDone, "", "list", "--endpoints", f.addr)
	wantPart(t, errs, io.ErrUnexpectedEOF.Error())
}

// TestClientListTimeouts: a list may take longer than its timeout while it gets on, and while
// nobody takes what it prints. It ends if nothing comes for so long, before the first key and
// after it.
func TestClientListTimeouts(t *testing.T) {
	t.Parallel()
	wait := func(ctx context.Context, d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	taken := make(chan struct{})
	for name, test := range map[string]struct {
		timeout  time.Duration
		scanned  func(ctx context.Context, responses int) error
		printing time.Duration // the wait of whoever takes what is printed first
		want     string        // on stderr
	}{
		"slow": {fullTimeout, func(ctx context.Context, _ int) error { wait(ctx, 500*time.Millisecond); return nil }, 0, ""},
		"slowly taken": {fullTimeout, func(ctx context.Context, responses int) error {
			if responses > 1 {
				select {
				case <-ctx.Done():
				case <-taken:
				}
			}
			return ctx.Err()
		}, fullTimeout + time.Second, ""},
		"silent": {fullTimeout, func(ctx context.Context, _ int) error { <-ctx.Done(); return ctx.Err() }, 0,
			": no answer in " + fullTimeout.String() + " (DEADLINE_EXCEEDED)"},
		"silent after keys": {fullTimeout, func(ctx context.Context, responses int) error {
			if responses > 1 {
				<-ctx.Done()
			}
			return ctx.Err()
		}, 0, "no answer in " + fullTimeout.String() + " (DEADLINE_EXCEEDED)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFakeNode(t)
			var want strings.Builder
			for i := range 5 * fakePage {
				key := fmt.Sprintf("k%02d", i)
				f.put(key, "v")
				fmt.Fprintf(&want, "%q\n", key)
			}
			f.do(func() { f.scanned = test.scanned })
			out := &slowWriter{wait: func() {
				wait(t.Context(), test.printing)
				if test.printing > 0 {
					close(taken)
				}
			}}
			var errs bytes.Buffer
			exit := exitYes
			if test.want != "" {
				exit = exitNotDone
			}
			args := []string{"list", "--keys-only", "--endpoints", f.addr, "--timeout", test.timeout.String()}
			if got := runClient(t.Context(), args, nil, out, &errs); got != exit {
				t.Errorf("exit status %d: %s", got, &errs)
			}
			wantPart(t, errs.String(), test.want)
			if exit == exitYes {
				wantText(t, name, out.taken.String(), want.String())
			}
		})
	}
}

// slowWriter waits before it takes what is written first.
type slowWriter struct {
	taken bytes.Buffer
	wait  func()
	once  sync.Once
}

func (w *slowWriter) Write(b []byte) (int, error) {
	w.once.Do(w.wait)
	return w.taken.Write(b)
}

// TestClientDeletesRanges: at once, or page by page, under ids of one session.
func TestClientDeletesRanges(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv(endpointVariable, f.addr)
	fill := func() {
		for i := range 8 {
			f.put(fmt.Sprint("a", i), "v")
		}
		f.put("b", "v")
		f.do(func() {
			f.version = 10
			f.ids = nil
		})
	}
	for _, test := range []struct {
		args   string
		exit   int
		out    string
		writes int // the pages of three keys lose two each
		left   int
	}{
		{"--prefix a", exitYes, "deleted keys: 8\n", 5, 1},
		{"--prefix a -o json", exitYes, `{"deleted":"8","version":"14","too_many":false}` + "\n", 5, 1},
		{"--start a7", exitYes, "deleted keys: 2\n", 1, 7},
		{"--end a1", exitYes, "deleted keys: 1\n", 1, 8},
		{"--start a2 --end a5", exitYes, "deleted keys: 3\n", 1, 6},
		{"--prefix c", exitNo, "", 1, 9},
		{"--prefix c -o json", exitNo, `{"deleted":"0","version":"11","too_many":false}` + "\n", 1, 9},
	} {
		fill()
		out, _ := runCommand(t, test.exit, "", append([]string{"delete", "--yes"}, strings.Fields(test.args)...)...)
		wantText(t, test.args, out, test.out)
		if len(f.ids) != test.writes || len(f.data) != test.left {
			t.Errorf("%s: %d writes were sent, %d keys are left, want %d and %d", test.args, len(f.ids), len(f.data), test.writes, test.left)
		}
		for i, id := range f.ids {
			if id.GetSession() != 40+f.opened || id.GetSequence() != uint64(i)+1 {
				t.Errorf("%s: write %d has the id %v", test.args, i, id)
			}
		}
	}
}

// TestClientDeletesRangesOnce: what has no answer is sent again under its id. What fails half
// way is not taken for nothing.
func TestClientDeletesRangesOnce(t *testing.T) {
	t.Parallel()
	unknown := apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "unknown")
	gone := apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_SESSION_UNKNOWN, "gone")
	silence := errors.New("no answer at all")
	for _, test := range []struct {
		name   string
		errors map[int]error // by call
		exit   int
		want   string
		ids    []uint64
	}{
		{"repeated", map[int]error{3: unknown, 4: unknown, 7: unknown}, exitYes, "", []uint64{1, 2, 2, 2, 3, 3, 4, 5}},
		{"refused", map[int]error{1: gone}, exitNotDone, "delete: " + "ADDR: gone", []uint64{1}},
		{"too many, then refused", map[int]error{3: gone}, exitNotDone, "delete: " + "ADDR: gone", []uint64{1, 2}},
		{"half way", map[int]error{5: gone}, exitUnknown, "2 keys were deleted, others may be left: ADDR: gone", []uint64{1, 2, 3}},
		{"silent", map[int]error{1: silence}, exitUnknown, "the outcome is unknown, it may or may not have been applied: ADDR: ", []uint64{1}},
		{"half way, silent", map[int]error{4: silence}, exitUnknown, "2 keys were deleted, others may be left: ADDR: ", []uint64{1, 2}},
		{"half way, read", map[int]error{4: gone}, exitUnknown, "2 keys were deleted, others may be left: ADDR: gone", []uint64{1, 2}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := newFakeNode(t)
			for i := range 8 {
				f.put(fmt.Sprint("a", i), "v")
			}
			calls := 0
			f.failWith(func(ctx context.Context) error {
				calls++
				err := test.errors[calls]
				if err == silence {
					<-ctx.Done()
				}
				return err
			})
			timeout := "20s"
			if strings.HasSuffix(test.name, "silent") {
				timeout = fullTimeout.String()
			}
			_, errs := runCommand(t, test.exit, "", "delete", "--prefix", "a", "--yes", "--timeout", timeout, "--endpoints", f.addr)
			wantPart(t, errs, strings.ReplaceAll(test.want, "ADDR", f.addr))
			var ids []uint64
			var opened uint64
			f.do(func() {
				opened = f.opened
				for _, id := range f.ids {
					if id != nil {
						ids = append(ids, id.Sequence)
					}
				}
			})
			if !slices.Equal(ids, test.ids) || opened != 1 {
				t.Errorf("sent under the ids %v of %d sessions, want %v", ids, opened, test.ids)
			}
		})
	}
}

// TestClientDoesNotDeleteUnasked: without a terminal, --yes is needed.
func TestClientDoesNotDeleteUnasked(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv(endpointVariable, f.addr)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	for name, stdin := range map[string]io.Reader{"no file": strings.NewReader("yes\n"), "no terminal": null} {
		var out, errs bytes.Buffer
		if got := runClient(t.Context(), []string{"delete", "--prefix", "a"}, stdin, &out, &errs); got != exitUsage {
			t.Errorf("%s: exit status %d", name, got)
		}
		wantText(t, name, out.String()+errs.String(),
			"raft-key-value: delete: there is nobody to ask: --yes removes the keys without that; see raft-key-value help delete\n")
	}
	if _, n := f.take(); n != 0 || f.asked != 0 || f.opened != 0 {
		t.Errorf("a node was called %d times, asked %d times, and opened %d sessions", n, f.asked, f.opened)
	}
}

// TestClientRanges lists and deletes more keys than one request takes, of a real node; and
// keys that are as long as they may be.
func TestClientRanges(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	const many = 2*maxRangeKeys + 7
	const longKeys = 40
	s, err := c.nodes[2].Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	var last uint64 // version
	set := func(keys []string) {
		t.Helper()
		for part := range slices.Chunk(keys, 1000) {
			var ops []*kvpb.Operation
			for _, k := range part {
				ops = append(ops, &kvpb.Operation{Operation: &kvpb.Operation_Set{Set: &kvpb.SetRequest{Key: k, Value: []byte("v")}}})
				fmt.Fprintf(&want, "%q\n", k)
			}
			rs, err := exchange(s, ops...)
			if err != nil {
				t.Fatal(err)
			}
			last = rs[len(rs)-1].GetSet().GetVersion()
		}
	}
	var keys []string
	for i := range many {
		keys = append(keys, fmt.Sprintf("k%06d", i))
	}
	set(keys)
	long := strings.Repeat("l", maxKeyBytes-2)
	for i := range longKeys {
		set([]string{fmt.Sprintf("%s%02d", long, i)})
	}
	set([]string{"m"})
	_ = s.CloseSend()

	run := func(exit int, args ...string) string {
		t.Helper()
		out, _ := runCommand(t, exit, "", append(args, "--timeout", "30s", "--endpoints", c.nodes[3].address)...)
		return out
	}
	if got := run(exitYes, "list", "--keys-only"); got != want.String() {
		t.Errorf("list printed %d bytes, want %d", len(got), want.Len())
	}
	wantText(t, "list", run(exitYes, "list", "m", "--local", "--min-version", fmt.Sprint(last)), fmt.Sprintf("\"m\"\t%d\t\"v\"\n", last))
	wantText(t, "get", run(exitYes, "get", "m", "--local", "--min-version", fmt.Sprint(last)), "v")
	wantText(t, "delete", run(exitYes, "delete", "--prefix", "k", "--yes"), fmt.Sprintf("deleted keys: %d\n", many))
	wantText(t, "delete", run(exitYes, "delete", "--start", "l", "--end", "m", "--yes"), fmt.Sprintf("deleted keys: %d\n", longKeys))
	run(exitNo, "delete", "--end", "m", "--yes")
	wantText(t, "list", run(exitYes, "list", "--keys-only"), "\"m\"\n")
}

func TestClientCompare(t *testing.T) {
	f := newFakeNode(t)
	f.do(func() { f.version = 7 })
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", f.addr)
	runCommand(t, 0, "", "set", "k", "v", "--if-version", "7")
	if req, _ := f.take(); req.(*kvpb.SetRequest).GetExpectedVersion() != 7 {
		t.Errorf("sent %v", req)
	}
	out, errs := runCommand(t, 1, "", "set", "k", "v", "--if-version", "0")
	wantText(t, "set", out+errs, "raft-key-value: set: compare failed: the key has version 7\n")
	out, errs = runCommand(t, 1, "", "delete", "k", "--if-version", "6", "-o", "json")
	wantText(t, "delete", out+errs, `{"deleted":false,"version":"7","compare_failed":true}`+"\n"+
		`{"error":"compare failed: the key has version 7","status":1,"reason":"","endpoints":[]}`+"\n")
	f.do(func() { f.version = 0 })
	out, errs = runCommand(t, 1, "", "set", "k", "v", "--if-version", "6", "-o", "json")
	wantText(t, "set", out+errs, `{"version":"0","compare_failed":true}`+"\n"+
		`{"error":"compare failed: the key is not there","status":1,"reason":"","endpoints":[]}`+"\n")
	runCommand(t, 0, "", "set", "k", "v", "--if-version", "0")
	if req, _ := f.take(); req.(*kvpb.SetRequest).ExpectedVersion == nil {
		t.Errorf("sent %v", req)
	}
	runCommand(t, 0, "", "set", "k", "v")
	if req, _ := f.take(); req.(*kvpb.SetRequest).ExpectedVersion != nil {
		t.Errorf("sent %v", req)
	}
}

// A write is sent until it is answered, and always under the same id.
func TestClientExactlyOnce(t *testing.T) {
	for _, command := range []string{"set k v", "delete k"} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			first, second := newFakeNode(t), newFakeNode(t)
			// The session comes from the first in the second round.
			first.do(func() { first.refuse = 1 })
			second.do(func() { second.refuse = 1 })
			second.put("k", "")
			tries := 0
			first.failWith(func(context.Context) error { return status.Error(codes.Unavailable, "broken") })
			second.failWith(func(context.Context) error {
				if tries++; tries < 3 {
					return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "unknown")
				}
				return nil
			})
			runCommand(t, 0, "", append(strings.Fields(command), "--timeout", "20s", "--endpoints", first.addr+","+second.addr)...)
			if len(first.ids) != 3 || len(second.ids) != 3 || first.opened != 1 || second.opened != 0 {
				t.Errorf("%d and %d writes were sent, %d and %d sessions opened", len(first.ids), len(second.ids), first.opened, second.opened)
			}
			for _, id := range append(first.ids, second.ids...) {
				if id.GetSession() != 41 || id.GetSequence() != 1 {
					t.Errorf("sent under the id %v", id)
				}
			}
		})
	}
}

// TestClientNoSession: a write is not sent without a session, so that nothing is
// written, whatever became of the session.
func TestClientNoSession(t *testing.T) {
	reason := func(code codes.Code, r kvpb.ErrorReason, err error) error { return apiError(code, r, err.Error()) }
	for _, test := range []struct {
		name   string
		barred error
		want   string
	}{
		{"refused", reason(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED, errNotInitialized), "NOT_INITIALIZED"},
		{"unknown", reason(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, errOutcomeUnknown), "OUTCOME_UNKNOWN"},
		{"unknown in time", reason(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, errUnknownInTime), "OUTCOME_UNKNOWN"},
		{"broken", status.Error(codes.Unavailable, "broken"), "broken"},
	} {
		for _, command := range []string{"set k v", "delete k"} {
			t.Run(test.name+" "+command, func(t *testing.T) {
				t.Parallel()
				f := newFakeNode(t)
				f.do(func() { f.barred = test.barred })
				_, errs := runCommand(t, exitNotDone, "", append(strings.Fields(command), "--timeout", fullTimeout.String(), "--endpoints", f.addr)...)
				wantPart(t, errs, ": nothing was written: no session could be opened: "+f.addr+": ")
				wantPart(t, errs, test.want)
				for _, part := range []string{"the outcome is unknown", "may or may not", errOutcomeUnknown.Error()} {
					if strings.Contains(errs, part) {
						t.Errorf("nothing was sent, but: %s", errs)
					}
				}
				if _, n := f.take(); n != 0 {
					t.Errorf("%d writes were sent", n)
				}
			})
		}
	}
}

// overdueContext is a context whose deadline is over, once isOver is set, and that has not ended
// yet: its timer is late.
type overdueContext struct {
	context.Context
	isOver atomic.Bool
}

func (c *overdueContext) Deadline() (time.Time, bool) {
	if c.isOver.Load() {
		return time.Now().Add(-time.Microsecond), true
	}
	return c.Context.Deadline()
}

// TestDeadlineByTheClock: what failed before the time was up says more than that it is, also if
// gRPC sees that before the context ends.
func TestDeadlineByTheClock(t *testing.T) {
	t.Parallel()
	newContext := func(t *testing.T) *overdueContext {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		t.Cleanup(cancel)
		return &overdueContext{Context: ctx}
	}
	t.Run("call", func(t *testing.T) {
		ctx, f := newContext(t), newFakeNode(t)
		c := &apiCaller{endpoints: []string{f.addr}, connections: newConnectionPool(), timeout: 2 * time.Second}
		defer c.connections.close()
		calls := 0
		err := c.callAny(ctx, kvpb.KVService_OpenSession_FullMethodName, func(*endpoint) (metadata.MD, error) {
			if calls++; calls == 1 {
				return nil, status.Error(codes.Unavailable, "broken")
			}
			ctx.isOver.Store(true)
			return nil, status.Error(codes.DeadlineExceeded, "context deadline exceeded")
		})
		wantText(t, "error", err.Error(), f.addr+": broken (UNAVAILABLE)")
		if calls != 2 || ctx.Err() != nil {
			t.Errorf("%d calls, and the context: %v", calls, ctx.Err())
		}
	})
	t.Run("forwarded request", func(t *testing.T) {
		ctx := newContext(t)
		ctx.isOver.Store(true)
		err := forwardError(ctx, plainNode(1), status.Error(codes.Unavailable, "broken"), true)
		if err != context.DeadlineExceeded {
			t.Errorf("%v", err)
		}
	})
}

// TestClientNoSessionAsJSON: neither the error nor what an endpoint said says of a
// write that was never sent that its outcome is not known.
func TestClientNoSessionAsJSON(t *testing.T) {
	t.Parallel()
	f, other := newFakeNode(t), newFakeNode(t)
	f.do(func() {
		f.barred = apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, errOutcomeUnknown.Error())
	})
	other.do(func() { other.barred = apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER, "none") })
	for _, command := range []string{"set k v", "delete k"} {
		args := append(strings.Fields(command), "-o", "json", "--timeout", fullTimeout.String(), "--endpoints", f.addr+","+other.addr)
		_, errs := runCommand(t, exitNotDone, "", args...)
		var e commandError
		if err := json.Unmarshal([]byte(errs), &e); err != nil || len(e.Endpoints) != 2 {
			t.Fatal(err, errs)
		}
		unsure := "whether a session was opened is not known (UNAVAILABLE OUTCOME_UNKNOWN)"
		want := []reply{
			{f.addr, unsure, "UNAVAILABLE", ""},
			{other.addr, "none (UNAVAILABLE NO_LEADER)", "UNAVAILABLE", "NO_LEADER"},
		}
		if !slices.Equal(e.Endpoints, want) || e.Reason != "NO_LEADER" {
			t.Errorf("%+v, want the endpoints %+v", e, want)
		}
		wantText(t, "error", e.Text, "nothing was written: no session could be opened: "+textOf(want))
	}
}

// TestHelpSaysWhichEndpointsAreTheDefault: init calls the first member, all others
// node 1 of README, and the environment goes before both.
func TestHelpSaysWhichEndpointsAreTheDefault(t *testing.T) {
	t.Setenv(endpointVariable, "set:1")
	for name, cmd := range commands() {
		want := "(default: environment RAFT_KEY_VALUE_ENDPOINTS, or else 127.0.0.1:21001)"
		switch {
		case cmd.offline:
			continue
		case name == "init":
			want = "(default: environment RAFT_KEY_VALUE_ENDPOINTS, or else the address of the first member)"
		}
		help, _ := runCommand(t, exitYes, "", "help", name)
		wantPart(t, help, want)
		if strings.Contains(help, "set:1") {
			t.Errorf("it shows the environment as the default: %s", help)
		}
	}
}

// What is known of a write that got no answer.
func TestClientGivesUp(t *testing.T) {
	const mayBe = "may or may not have been applied"
	broken, noLeader := status.Error(codes.Unavailable, "broken"), apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER, "none")
	unknown := apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "unknown")
	gone := apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_SESSION_UNKNOWN, "gone")
	for _, test := range []struct {
		name   string
		errors []error // in turn
		mayBe  bool
	}{
		{"no session", []error{gone}, false},
		{"no leader, then no session", []error{noLeader, noLeader, gone}, false},
		{"broken, then no session", []error{broken, noLeader, gone}, true},
		{"unknown, then no session", []error{unknown, gone}, true},
		{"no answer until the timeout", nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := newFakeNode(t)
			tries := 0
			timeout, want := "20s", "SESSION_UNKNOWN"
			if test.errors == nil {
				timeout, want = fullTimeout.String(), "DEADLINE_EXCEEDED"
			}
			f.failWith(func(ctx context.Context) error {
				if test.errors == nil {
					<-ctx.Done()
					return ctx.Err()
				}
				tries++
				return test.errors[tries-1]
			})
			exit := exitNotDone
			if test.mayBe {
				exit = exitUnknown
			}
			_, errs := runCommand(t, exit, "", "set", "k", "v", "--timeout", timeout, "--endpoints", f.addr)
			wantPart(t, errs, want)
			if strings.Contains(errs, mayBe) != test.mayBe || tries != len(test.errors) {
				t.Errorf("sent %d times: %s", tries, errs)
			}
		})
	}
}

// TestClientSilentStdin: waiting for a value is not bounded by the timeout, which begins once the
// value is there; an interrupt ends it.
func TestClientSilentStdin(t *testing.T) {
	t.Parallel()
	f := newFakeNode(t)
	stdin, w := io.Pipe()
	const timeout = fullTimeout
	var errs bytes.Buffer
	command := inBackground(func() error {
		args := []string{"set", "k", "-", "--timeout", timeout.String(), "--endpoints", f.addr}
		if exit := runClient(t.Context(), args, stdin, io.Discard, &errs); exit != exitYes {
			return fmt.Errorf("exit status %d, %s", exit, &errs)
		}
		return nil
	})
	if _, err := io.WriteString(w, "slow "); err != nil { // the command has begun
		t.Fatal(err)
	}
	if happens(t.Context(), command.ended, timeout*5/4) {
		t.Fatalf("it has ended before stdin: %v", command.err)
	}
	_, _ = io.WriteString(w, "value")
	_ = w.Close()
	<-command.ended
	if command.err != nil {
		t.Error(command.err)
	}
	wantText(t, "value", string(f.data["k"]), "slow value")

	silent, w := io.Pipe()
	defer w.Close()
	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	if exit := runClient(ctx, []string{"set", "k", "-", "--endpoints", closedAddress}, silent, io.Discard, &errs); exit != exitNotDone {
		t.Errorf("interrupted: exit status %d", exit)
	}
	wantPart(t, errs.String(), "reading stdin")
	// Nobody answers: then the timeout ends it, also if the value came from stdin.
	runCommand(t, exitNotDone, "value", "set", "k", "-", "--timeout", "50ms", "--endpoints", closedAddress)
}

// countingListener counts the connections on which something was said: a dial of more than
// dialStagger begins another try, and leaves the slower one of the two.
type countingListener struct {
	net.Listener
	used *atomic.Int64
}

func (l countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &countedConn{Conn: conn, used: l.used}, nil
}

type countedConn struct {
	net.Conn
	used *atomic.Int64
	once sync.Once
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.once.Do(func() { c.used.Add(1) })
	}
	return n, err
}

// TestOneConnectionAndSession: a run of a command connects to an endpoint once, whatever it asks
// of it, and opens one session.
func TestOneConnectionAndSession(t *testing.T) {
	t.Parallel()
	for _, line := range []string{
		"set k v", "get k", "delete k", "list", "delete --prefix k --yes", "health", "status", "remove 2",
		"promote 2", "change-membership 1", "add-learner 3=h:1", "transfer-leader 1",
	} {
		f := newFakeNode(t)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var used atomic.Int64
		go func() { _ = f.server.Serve(countingListener{l, &used}) }() // ends with the server
		f.addr = l.Addr().String()
		f.put("k", "v")
		f.inCluster(0xa, 1, kvpb.Role_ROLE_LEADER, memberAt(0xa, 1, f.addr, true))
		f.health.SetServingStatus(kvpb.KVService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
		var errs bytes.Buffer
		args := commandLine(t, line, f.addr)
		if exit := runClient(t.Context(), args, nil, io.Discard, &errs); exit != exitYes {
			t.Errorf("%s: exit status %d, %s", line, exit, &errs)
		}
		most := int64(1)
		if line == "add-learner 3=h:1" { // which looks at it meanwhile
			most = 2
		}
		if n := used.Load(); n > most {
			t.Errorf("%s: %d connections", line, n)
		}
		f.mu.Lock()
		if f.opened > 1 {
			t.Errorf("%s: %d sessions", line, f.opened)
		}
		f.mu.Unlock()
	}
}

// pipeOf is a backup of so many keys, and a pipe in the place of its file: the
// test says how much of it a restore gets.
func pipeOf(t *testing.T, keys int) (backup []byte, path string, pipe *os.File) {
	t.Helper()
	_, backup = backupOf(t, keys)
	path = filepath.Join(t.TempDir(), "backup")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Skip(err)
	}
	pipe, err := os.OpenFile(path, os.O_RDWR, 0) // not to wait for the other end
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pipe.Close() })
	return backup, path, pipe
}

// TestClientRestoreUndone: a restore that fails half way takes away what it has
// made, and the directory if that was not there.
func TestClientRestoreUndone(t *testing.T) {
	for _, made := range []bool{true, false} {
		t.Run(fmt.Sprint("made=", made), func(t *testing.T) {
			t.Parallel()
			backup, path, pipe := pipeOf(t, 2000)
			dir := filepath.Join(t.TempDir(), "data")
			if !made {
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			go func() {
				pipe.Write(backup[:len(backup)-1])                              // more than a pipe holds: by then the directory was found empty
				os.Mkdir(filepath.Join(dir, "0000000000000001.wal.tmp"), 0o700) // in the place of the log
				pipe.Write(backup[len(backup)-1:])
				pipe.Close()
			}()
			_, errs := runCommand(t, exitNotDone, "", "restore", path, "--data-dir", dir, "--id", "5", "--addr", "127.0.0.1:5")
			wantPart(t, errs, "0000000000000001.wal.tmp: is a directory")
			names, err := os.ReadDir(dir)
			if made && !errors.Is(err, os.ErrNotExist) || !made && len(names) > 0 {
				t.Error(names, err)
			}
		})
	}
}

// TestClientRestoreEnds: a restore that still reads ends when its time is up.
func TestClientRestoreEnds(t *testing.T) {
	_, path, _ := pipeOf(t, 1)
	dir := filepath.Join(t.TempDir(), "data")
	ended := make(chan string, 1)
	go func() {
		_, errs := runCommand(t, exitNotDone, "", "restore", path, "--data-dir", dir, "--id", "5", "--addr", "127.0.0.1:5", "--timeout", "50ms")
		ended <- errs
	}()
	select {
	case errs := <-ended:
		wantText(t, "stderr", errs, "raft-key-value: restore: "+path+": context deadline exceeded\n")
	case <-time.After(pollDeadline):
		t.Fatal("it reads beyond its timeout")
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestClientMembership(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", "")
	out, _ := runCommand(t, 0, "", "init", "1="+f.addr, "2=h:1") // The first is called.
	wantText(t, "init", out, "a cluster is initialised, voters: [1 2]\n")
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", f.addr)
	out, _ = runCommand(t, 0, "", "init", "1="+closedAddress, "-o", "json")
	wantText(t, "init", out, `{"cluster_id":"10"}`+"\n")
	runCommand(t, 0, "", "transfer-leader", "2")
	if req, _ := f.take(); req.(*kvpb.TransferLeaderRequest).NodeId != 2 {
		t.Errorf("transfer-leader sent %v", req)
	}
	changed := func(want *kvpb.ChangeMembershipRequest) {
		t.Helper()
		if req, _ := f.take(); !proto.Equal(req, want) {
			t.Errorf("sent %v, want %v", req, want)
		}
	}
	out, _ = runCommand(t, 0, "", "remove", "2")
	wantText(t, "remove", out, "node 2 is removed\n")
	changed(&kvpb.ChangeMembershipRequest{Remove: []uint64{2}})

	f.setMetrics(&kvpb.MetricsResponse{ClusterId: 10, Members: []*kvpb.MemberStatus{{Node: &kvpb.Node{Id: 2, Address: "h:1"}, Voter: true}}})
	out, _ = runCommand(t, 0, "", "add-learner", "2=h:2")
	wantText(t, "add-learner", out, "node 2 is a voter and has caught up, at h:2 in place of h:1\n")
	out, _ = runCommand(t, 0, "", "add-learner", "2=h:1")
	wantText(t, "add-learner", out, "node 2 is a voter and has caught up\n")
}

// The leader is another node than the one that is called, and knows more.
func TestClientAddLearnerShowsProgress(t *testing.T) {
	t.Parallel()
	f, leader := newFakeNode(t), newFakeNode(t)
	other := &kvpb.MemberStatus{Node: &kvpb.Node{Id: 2, Address: leader.addr}, Voter: true}
	f.setMetrics(&kvpb.MetricsResponse{ClusterId: 10, Role: kvpb.Role_ROLE_FOLLOWER, Members: []*kvpb.MemberStatus{other}})
	progress := func(match uint64) {
		learner := &kvpb.MemberStatus{Node: &kvpb.Node{Id: 3, Address: closedAddress}, Learner: true, Progress: &kvpb.Progress{MatchIndex: match}}
		leader.setMetrics(&kvpb.MetricsResponse{ClusterId: 10, Role: kvpb.Role_ROLE_LEADER, LastIndex: 5000, Members: []*kvpb.MemberStatus{other, learner}})
	}
	f.failWith(func(ctx context.Context) error {
		progress(1200)
		leader.awaitAsked(ctx)
		progress(3400)
		leader.awaitAsked(ctx)
		return nil
	})
	out, errs := runCommand(t, 0, "", "add-learner", "3=h:1", "--endpoints", f.addr)
	wantText(t, "stdout", out, "node 3 is a learner and has caught up\n")
	wantText(t, "stderr", errs, "node 3: 1200 of 5000 entries\nnode 3: 3400 of 5000 entries\n")
}

// TestClientStatusOfLevels: status says who runs which program, and who keeps the level from
// rising.
func TestClientStatusOfLevels(t *testing.T) {
	t.Parallel()
	nodes := []*fakeNode{newFakeNode(t), newFakeNode(t), newFakeNode(t)}
	var members []*kvpb.MemberStatus
	for i, address := range []string{nodes[0].addr, nodes[1].addr, nodes[2].addr, closedAddress} {
		member := &kvpb.MemberStatus{Node: &kvpb.Node{Id: uint64(i + 1), Address: address}, Voter: true, RisesTo: 1}
		members = append(members, member)
	}
	status := func(last []*kvpb.MemberStatus, speaks, risesTo []uint32) string {
		for i, f := range nodes {
			role := kvpb.Role_ROLE_FOLLOWER
			if i == 0 {
				role = kvpb.Role_ROLE_LEADER
			}
			f.setMetrics(&kvpb.MetricsResponse{
				Node: members[i].Node, RaftId: uint64(i + 1), ClusterId: 0xabc, Role: role, Term: 3,
				Members: append(slices.Clone(members[:3]), last...), BuildVersion: fmt.Sprint("v", speaks[i]),
				Level: 1, ProgramLevel: speaks[i], RisesTo: risesTo[i],
			})
		}
		out, _ := runCommand(t, 0, "", "status", "--timeout", fullTimeout.String(), "--endpoints", nodes[0].addr)
		_, lines, _ := strings.Cut(out, "the cluster is")
		return lines
	}
	wantText(t, "all alike", status(nil, []uint32{1, 1, 1}, []uint32{1, 1, 1}), " of level 1\nnodes 1, 2 and 3: v1, which speaks level 1\n")
	wantText(t, "mixed", status(members[3:], []uint32{2, 1, 2}, []uint32{2, 1, 1}), " of level 1\n"+
		"node 2: v1, which speaks level 1\nnodes 1 and 3: v2, which speaks level 2\n"+
		"the level rises once node 2 runs a newer program, and node 3 is started without --max-level, and node 4 answers\n")
	wantText(t, "too old", status(nil, []uint32{1, 0, 1}, []uint32{1, 0, 1}), " of level 1\n"+
		"node 2: v0, which speaks level 0\nnodes 1 and 3: v1, which speaks level 1\n"+
		"node 2 is refused, for its program is too old: start a newer one there\n")
	members[1].RisesTo = 0
	wantText(t, "not connected", status(nil, []uint32{2, 2, 2}, []uint32{2, 2, 2}), " of level 1\n"+
		"nodes 1, 2 and 3: v2, which speaks level 2\nthe level rises once the leader is connected to node 2\n")
	members[1].RisesTo = 2
	wantText(t, "about to rise", status(nil, []uint32{2, 2, 2}, []uint32{2, 2, 2}), " of level 1\nnodes 1, 2 and 3: v2, which speaks level 2\n")
}

func TestClientStatus(t *testing.T) {
	t.Parallel()
	a, b, c := newFakeNode(t), newFakeNode(t), newFakeNode(t)
	silent := listenSilently(t)
	member := func(id uint64, addr string, voter bool) *kvpb.MemberStatus {
		return &kvpb.MemberStatus{Node: &kvpb.Node{Id: id, Address: addr}, RaftId: id, Voter: voter, Learner: !voter}
	}
	members := []*kvpb.MemberStatus{member(1, a.addr, true), member(2, b.addr, false), member(4, closedAddress, true), member(5, silent, true)}
	members[1].Lagging = "too slow"
	members[0].Progress = &kvpb.Progress{MatchIndex: 99}
	members[1].Progress = &kvpb.Progress{MatchIndex: 59}
	members[2].Progress = &kvpb.Progress{}
	a.setMetrics(&kvpb.MetricsResponse{Node: members[0].Node, RaftId: 1, ClusterId: 0xabc, Role: kvpb.Role_ROLE_LEADER, Leader: members[0].Node, Term: 3,
		AppliedIndex: 99, LastIndex: 99, Keys: 5, Version: 7, Healthy: true, Members: members, Durable: true, DiskFree: 4<<30 - 1, QuotaUsed: 4<<20 - 1, Quota: 20 << 20, WritesRefused: "it is full"})
	b.setMetrics(&kvpb.MetricsResponse{Node: members[1].Node, RaftId: 2, ClusterId: 0xabc, Role: kvpb.Role_ROLE_LEARNER, UnhealthyReason: "no leader", Members: members})
	c.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 3, Address: c.addr}, Role: kvpb.Role_ROLE_UNINITIALIZED, UnhealthyReason: "new"})

	endpoints := "--endpoints=" + strings.Join([]string{closedAddress, c.addr, a.addr}, ",")
	out, _ := runCommand(t, 0, "", "status", "--timeout", fullTimeout.String(), endpoints)
	rows := strings.Split(strings.TrimSpace(out), "\n")
	want := []string{
		"leader 1, but only 1 of 3 voters and 0 of 1 learners are up, and that is too few to go on ",
		"NODE ADDRESS HEALTH VOTER ROLE LEADER TERM APPLIED LAG VERSION KEYS STORE DISK CLUSTER REASON ",
		"1 " + a.addr + " ok yes leader 1 3 99 0 7 5 3M/20M 3G free 0000000000000abc ",
		"2 " + b.addr + " unhealthy no learner - - 0 40 0 0 0M/0M no 0000000000000abc no leader ",
		"3 " + c.addr + " unhealthy no uninitialized - - - - - - - no - new ",
		"4 " + closedAddress + " unreachable yes - - - - 99 - - - - 0000000000000abc \"dial tcp ",
		"5 " + silent + " unreachable yes - - - - - - - - - 0000000000000abc no answer in 2s (DEADLINE_EXCEEDED) ",
		"node 2 is too slow",
		"node 1 refuses Sets: it is full",
	}
	if len(rows) != len(want) {
		t.Fatalf("%d rows, want %d:\n%s", len(rows), len(want), out)
	}
	for i, row := range rows {
		if got := strings.Join(strings.Fields(row), " "); !strings.HasPrefix(got+" ", want[i]) {
			t.Errorf("row %q, want %q", got, want[i])
		}
	}

	out, _ = runCommand(t, 0, "", "status", "-o", "json", "--timeout", fullTimeout.String(), endpoints)
	var answer struct {
		Members []struct {
			ID        string `json:"node_id"`
			Address   string
			Reachable bool
			Error     string
			Metrics   map[string]any
		}
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || len(answer.Members) != 5 {
		t.Fatalf("%v: %s", err, out)
	}
	if m := answer.Members[0]; m.ID != "1" || m.Address != a.addr || !m.Reachable || m.Error != "" || m.Metrics["applied_index"] != "99" {
		t.Errorf("%+v", m)
	}
	if m := answer.Members[3]; m.ID != "4" || m.Reachable || m.Error == "" || m.Metrics != nil {
		t.Errorf("%+v", m)
	}
	// Somebody else is at a member's address; a node has two, of which one is known.
	d, e := newFakeNode(t), newFakeNode(t)
	members = []*kvpb.MemberStatus{member(1, "127.0.0.1:9", true), member(2, d.addr, true)}
	members[0].RaftId = 77
	e.setMetrics(&kvpb.MetricsResponse{Node: members[0].Node, RaftId: 77, ClusterId: 0xabc, Role: kvpb.Role_ROLE_LEADER, Members: members, Healthy: true})
	d.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 9, Address: d.addr}, RaftId: 88})
	out, _ = runCommand(t, 0, "", "status", "--endpoints", e.addr+","+strings.Replace(e.addr, "127.0.0.1", "localhost", 1))
	rows = strings.Split(strings.TrimSpace(out), "\n")
	if len(rows) != 4 || !strings.HasPrefix(rows[2], "1 ") || !strings.HasPrefix(rows[3], "2 ") || !strings.HasSuffix(rows[3], "node 9 answers there") {
		t.Errorf("rows %q", rows)
	}
	if strings.Contains(out, " \n") {
		t.Errorf("a blank at the end of a line: %q", out)
	}

	_, errs := runCommand(t, 0, "", "status", "--endpoints", c.addr)
	wantText(t, "stderr", errs, "raft-key-value: warning: no node that was asked is in a cluster; --endpoints asks others\n")
	out, errs = runCommand(t, exitNotDone, "", "status", "--endpoints", closedAddress)
	wantPart(t, out, "-     "+closedAddress+"  unreachable  -      -     -       -     -        -    -        -     -      -     -        \"dial tcp")
	wantPart(t, out, "no node answers\nNODE ")
	wantPart(t, errs, "no node answered: "+closedAddress+": ")
}

func TestClientHealth(t *testing.T) {
	t.Parallel()
	f := newFakeNode(t)
	set := func(name string, s healthpb.HealthCheckResponse_ServingStatus) { f.health.SetServingStatus(name, s) }
	set("raftkv.v1.KVService", healthpb.HealthCheckResponse_NOT_SERVING)
	set(restartHealth, healthpb.HealthCheckResponse_SERVING)
	f.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 2, Address: "h:2"}, UnhealthyReason: "it is new"})
	_, errs := runCommand(t, 1, "", "health", "--endpoints", closedAddress+","+f.addr)
	wantPart(t, errs, "NOT_SERVING: node 2 at h:2: it is new")
	out, _ := runCommand(t, 0, "", "health", "--endpoints", closedAddress+","+f.addr, "--service", restartHealth)
	wantText(t, "health", out, "SERVING, says "+f.addr+"\n")
	out, _ = runCommand(t, 0, "", "health", "--endpoints", f.addr, "--service", restartHealth, "-o", "json")
	wantText(t, "health", out, `{"status":"SERVING"}`+"\n")
	runCommand(t, exitNotDone, "", "health", "--endpoints", closedAddress, "--wait", "--timeout", "500ms")
	// A command that is interrupted says what it heard before.
	waiting, interrupt := context.WithCancel(t.Context())
	f.setMetrics(&kvpb.MetricsResponse{Node: &kvpb.Node{Id: 2, Address: "h:2"}, UnhealthyReason: "it is new"})
	go func() { // ends with the command, or the test
		f.awaitAsked(waiting)
		interrupt()
	}()
	var waited bytes.Buffer
	if got := runClient(waiting, []string{"health", "--endpoints", f.addr, "--wait"}, nil, io.Discard, &waited); got != 1 {
		t.Errorf("health --wait: exit status %d, want 1; stderr %q", got, &waited)
	}
	wantPart(t, waited.String(), "NOT_SERVING: node 2 at h:2: it is new")
	f.setMetrics(&kvpb.MetricsResponse{Joint: true, NoRestartReason: "a change of membership is half way"})
	set(restartHealth, healthpb.HealthCheckResponse_NOT_SERVING)
	_, errs = runCommand(t, 1, "", "health", "--endpoints", f.addr, "--service", restartHealth)
	wantPart(t, errs, "a change of membership is half way")
	time.AfterFunc(500*time.Millisecond, func() { set("raftkv.v1.KVService", healthpb.HealthCheckResponse_SERVING) })
	out, _ = runCommand(t, 0, "", "health", "--endpoints", f.addr, "--wait")
	wantText(t, "health", out, "SERVING, says "+f.addr+"\n")
}

// A call goes on to the second endpoint only if the first cannot have applied
// it, or if it takes effect once; else the outcome is told as it is known.
func TestClientResend(t *testing.T) {
	answer := func(err error) func(context.Context) error { return func(context.Context) error { return err } }
	unavailable := answer(apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER, "no leader"))
	bare := answer(status.Error(codes.Unavailable, "bare"))
	late := answer(apiError(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE, "late"))
	unknown := answer(apiError(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "lost"))
	refused := answer(apiError(codes.InvalidArgument, kvpb.ErrorReason_ERROR_REASON_INVALID_FIELD, "key:\ntoo long"))
	unsure := answer(apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "begun"))
	full := answer(apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED, "full"))
	outside := answer(apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED, "removed just now"))
	changed := answer(apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_MEMBERSHIP_CHANGED, "it is 1=a:1, voter, now"))
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	const mayBe = "may or may not have been applied"
	for _, test := range []struct {
		name, command string
		fail          func(context.Context) error
		want          string // on stderr; empty: the second endpoint answers
	}{
		{"not applied", "set k v", unavailable, ""},
		{"not applied", "delete k", unavailable, ""},
		{"not applied", "transfer-leader 1", unavailable, ""},
		{"not applied", "init 1=h:1", unavailable, "no leader (UNAVAILABLE NO_LEADER)"},
		{"bare", "set k v", bare, ""},
		{"bare", "init 1=h:1", bare, mayBe},
		{"bare", "get k", bare, ""},
		{"late", "set k v", late, ""},
		{"late", "change-membership 1", late, mayBe},
		{"unknown", "set k v", unknown, ""},
		{"unknown", "delete k", unknown, ""},
		{"unknown", "delete --prefix k --yes", unknown, ""},
		{"bare", "delete --prefix k --yes", bare, ""},
		{"bare", "list", bare, ""},
		{"overloaded", "list", full, ""},
		{"refused", "list", refused, "key: too long (INVALID_ARGUMENT INVALID_FIELD)"},
		{"hang", "delete --prefix k --yes", hang, mayBe},
		{"hang", "list", hang, "DEADLINE_EXCEEDED"},
		{"unknown", "change-membership 1", unknown, mayBe},
		{"unknown, unavailable", "change-membership 1", unsure, mayBe},
		{"refused", "set k v", refused, "key: too long (INVALID_ARGUMENT INVALID_FIELD)"},
		{"unreachable", "transfer-leader 1", func(context.Context) error {
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, "node 1 does not answer")
		}, "(UNAVAILABLE UNREACHABLE)\n"},
		{"refused", "get k", refused, "key: too long (INVALID_ARGUMENT INVALID_FIELD)"},
		{"overloaded", "set k v", full, ""},
		{"overloaded", "transfer-leader 1", full, ""},
		{"in no cluster", "transfer-leader 1", outside, ""},
		{"changed", "change-membership 1", changed, "(ABORTED MEMBERSHIP_CHANGED)"},
		{"hang", "set k v", hang, mayBe},
		{"hang", "transfer-leader 1", hang, mayBe},
		{"hang", "get k", hang, "DEADLINE_EXCEEDED"},
	} {
		t.Run(test.name+" "+test.command, func(t *testing.T) {
			t.Parallel()
			first, second := newFakeNode(t), newFakeNode(t)
			second.put("k", "v")
			first.failWith(test.fail)
			exit, calls := exitNotDone, 0
			switch {
			case test.want == "":
				exit, calls = 0, 1
			case test.name == "refused":
				exit = exitUsage
			case test.want == mayBe:
				exit = exitUnknown
			}
			args := append(strings.Fields(test.command), "--timeout", fullTimeout.String(), "--endpoints", first.addr+","+second.addr)
			_, errs := runCommand(t, exit, "", args...)
			wantPart(t, errs, test.want)
			if strings.Contains(errs, mayBe) != (test.want == mayBe) {
				t.Errorf("stderr %q", errs)
			}
			if _, n := first.take(); n != 1 {
				t.Errorf("the first node was called %d times", n)
			}
			if _, n := second.take(); n != calls {
				t.Errorf("the second node was called %d times, want %d", n, calls)
			}
		})
	}
}

func TestClientConnections(t *testing.T) {
	t.Parallel()
	live, broken := newFakeNode(t), newFakeNode(t)
	for _, dead := range []string{closedAddress, listenSilently(t)} {
		runCommand(t, 0, "", "set", "k", "v", "--timeout", "5s", "--endpoints", dead+","+live.addr)
		runCommand(t, 0, "", "get", "k", "--timeout", "5s", "--endpoints", dead+","+live.addr)
		_, errs := runCommand(t, exitNotDone, "", "set", "k", "v", "--timeout", "500ms", "--endpoints", dead)
		if strings.Contains(errs, "may") {
			t.Errorf("%s: nothing was sent, but: %s", dead, errs)
		}
	}
	live.take()
	// The connection breaks while the call runs.
	broken.failWith(func(ctx context.Context) error { go broken.server.Stop(); <-ctx.Done(); return ctx.Err() })
	runCommand(t, 0, "", "set", "k", "v", "--endpoints", broken.addr+","+live.addr)
	if _, n := live.take(); n != 1 {
		t.Errorf("a write whose fate is unknown was sent again %d times", n)
	}
}

func TestClientFollowsLeader(t *testing.T) {
	follower, leader := newFakeNode(t), newFakeNode(t)
	names := func(addr string) func(context.Context) error {
		return func(ctx context.Context) error {
			grpc.SetTrailer(ctx, metadata.Pairs(leaderMetadata, addr))
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NOT_LEADER, "not the leader")
		}
	}
	follower.failWith(names(leader.addr))
	t.Setenv("RAFT_KEY_VALUE_ENDPOINTS", follower.addr)
	runCommand(t, 0, "", "set", "k", "v")
	runCommand(t, 0, "", "get", "k")
	runCommand(t, exitNotDone, "", "get", "k", "--local")
	if _, n := leader.take(); n != 2 {
		t.Errorf("the leader was called %d times, want 2", n)
	}
	leader.failWith(names(follower.addr)) // Nodes that name each other are asked once each.
	runCommand(t, exitNotDone, "", "transfer-leader", "2")
	if _, n := leader.take(); n != 1 {
		t.Errorf("the leader was called %d times, want 1", n)
	}
}

// TestClientTriesUntilTheTimeout: a read finds the leader that is elected meanwhile;
// a local one does not wait for another answer of the same node.
func TestClientTriesUntilTheTimeout(t *testing.T) {
	t.Parallel()
	f := newFakeNode(t)
	f.put("k", "v")
	var calls atomic.Int32
	f.failWith(func(context.Context) error {
		if calls.Add(1) > 2 {
			return nil
		}
		return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER, "there is no leader")
	})
	_, errs := runCommand(t, exitNotDone, "", "get", "k", "--local", "--endpoints", f.addr)
	wantPart(t, errs, "there is no leader")
	if n := calls.Swap(0); n != 1 {
		t.Errorf("it was asked %d times", n)
	}
	runCommand(t, 0, "", "get", "k", "--timeout", "1m", "--endpoints", f.addr)
	calls.Store(0)
	runCommand(t, 0, "", "list", "--timeout", "1m", "--endpoints", f.addr)
}

func TestClientOutputFails(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	var errs bytes.Buffer
	if exit := runClient(t.Context(), []string{"version"}, nil, full, &errs); exit != exitNotDone {
		t.Errorf("exit status %d, want %d", exit, exitNotDone)
	}
	wantPart(t, errs.String(), "no space left")
}

func (f *fakeNode) Backup(_ *kvpb.BackupRequest, s kvpb.ClusterService_BackupServer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return s.Send(&kvpb.BackupResponse{Data: f.backup})
}

// wrongArguments are some that are not what they should be, by what that is.
var wrongArguments = map[argument][]string{
	keyArgument:       {"", "\xff", "a\xc3", strings.Repeat("k", maxKeyBytes+1)},
	valueArgument:     {strings.Repeat("v", maxValueBytes+1)},
	prefixArgument:    {"\xff", "a\xc3", strings.Repeat("k", maxKeyBytes+1)},
	fileArgument:      {""},
	savedArgument:     {""},
	directoryArgument: {""},
	idArgument:        {"", "0", "x", "1=a:1", "1.5", "18446744073709551616", " 1"},
	memberArgument: {
		"", "1", "0=a:1", "x=a:1", "1=", "1=a", "1=a:", "1=:1", "1=a:0", "1=a:x", "1=a:http", "1=a:65536", "1=a:-1",
		"1=a b:1", "1=a\xff:1", "1=0.0.0.0:1", "1=[::]:1", "1=" + strings.Repeat("a", maxAddressBytes) + ":1",
	},
	commandArgument: {"", "nosuch"},
	shellArgument:   {"", "fish"},
	wordArgument:    nil, // whatever is typed
}

var rightArguments = map[argument]string{
	keyArgument: "k", valueArgument: "v", prefixArgument: "p", fileArgument: "f", savedArgument: "s", directoryArgument: "d", idArgument: "7",
	memberArgument: "7=a:1", commandArgument: "get", shellArgument: "bash",
}

// takesMembers reports whether a command takes several ids.
func takesMembers(cmd *command) bool { return cmd.repeated && cmd.args[0] != shellArgument }

// TestArgumentsAreCheckedByWhatTheyAre: in each place of each sub-command, and
// before a node is called or a file made.
func TestArgumentsAreCheckedByWhatTheyAre(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv(endpointVariable, f.addr)
	t.Chdir(t.TempDir())
	for name, cmd := range commands() {
		for i, kind := range cmd.args {
			if _, isListed := wrongArguments[kind]; !isListed {
				t.Errorf("%s: no %v is wrong", name, kind)
			}
			for _, wrong := range wrongArguments[kind] {
				line := []string{name}
				if name == "restore" {
					line = append(line, "--data-dir", "d", "--id", "1", "--addr", "a:1")
				}
				line = append(line, "--")
				for _, before := range cmd.args[:i] {
					line = append(line, rightArguments[before])
				}
				line = append(line, wrong)
				for _, after := range cmd.args[i+1:] {
					line = append(line, rightArguments[after])
				}
				runCommand(t, exitUsage, "", line...)
				if takesMembers(cmd) {
					runCommand(t, exitUsage, "", name, rightArguments[kind], wrong)
				}
			}
		}
		if takesMembers(cmd) {
			arg := rightArguments[cmd.args[0]]
			_, errs := runCommand(t, exitUsage, "", name, arg, arg)
			wantPart(t, errs, "the id 7 stands there twice")
		}
	}
	if _, n := f.take(); n != 0 || f.asked != 0 || f.opened != 0 {
		t.Errorf("a node was called %d times, asked %d times, and opened %d sessions", n, f.asked, f.opened)
	}
	if names, err := os.ReadDir("."); err != nil || len(names) > 0 {
		t.Error(names, err)
	}
}

// TestEndpointsAreChecked: of the flag and of the environment; blanks at commas
// do not matter.
func TestEndpointsAreChecked(t *testing.T) {
	f := newFakeNode(t)
	for _, list := range []string{
		"a", "a:", ":1", "a:x", "a:http", "a:65536", "a:0", "a b:1", ",", "a:1,", "a:1,,b:1", "a:1;b:1", "a:1 b:1", " ",
	} {
		_, errs := runCommand(t, exitUsage, "", "get", "k", "--endpoints", list)
		wantPart(t, errs, "get: --endpoints: address ")
		t.Setenv(endpointVariable, list)
		_, errs = runCommand(t, exitUsage, "", "get", "k")
		wantPart(t, errs, "get: "+endpointVariable+": address ")
	}
	for _, list := range []string{f.addr + ", " + closedAddress, "  " + f.addr + " ,\t" + f.addr + "\n"} {
		t.Setenv(endpointVariable, list)
		runCommand(t, exitYes, "", "set", "k", "v")
	}
}

func TestFlagsAreChecked(t *testing.T) {
	t.Setenv(endpointVariable, closedAddress)
	for line, hint := range map[string]string{
		"delete k --if-version 0":                                     "no key has it",
		"delete":                                                      "want either a KEY, or --prefix, --start or --end",
		"delete k --prefix k":                                         "want either a KEY, or --prefix, --start or --end",
		"delete --prefix= --yes":                                      "it is empty; leave the flag out",
		"delete --start= --end b --yes":                               "it is empty; leave the flag out",
		"delete --prefix a --if-version 1 --yes":                      "--if-version: it is for a KEY",
		"delete --prefix a --end b --yes":                             "prefix: it is not for a request that has start or end",
		"delete --start b --end a --yes":                              "end: it is not after start",
		"delete --start a --end \xff --yes":                           "end: it is not UTF-8",
		"list a --start b":                                            "prefix: it is not for a request that has start or end",
		"list --start b --end b":                                      "end: it is not after start",
		"list --min-version 1":                                        "--min-version: it is for --local",
		"get k --min-version 1":                                       "--min-version: it is for --local",
		"change-membership 1 --retain --remove-others":                "want one of them",
		"restore f --id 1 --data-dir d --addr a:0":                    "--addr address \"a:0\": want where",
		"restore f --id 1 --data-dir d --addr a:x":                    "want a port from 0 to 65535, not \"x\"",
		"restore f --id 1 --data-dir d":                               "are needed",
		"get k ---":                                                   "bad flag syntax",
		"init 1=a:1 --force=x":                                        "invalid boolean value",
		"get --endpoints a:1 --endpoints a:99999 k":                   "want a port",
		"change-membership " + strings.Repeat("1 ", maxMembers) + "1": "wrong number of arguments: 65",
		"change-membership --remove-others=maybe 1":                   "invalid boolean value",
		"change-membership --retain=maybe 1":                          "-retain: want true or false",
		"set k --if-version --nosuch v":                               "want a version",
		"get --nosuch k":                                              "not defined: -nosuch",
		"get k --timeout":                                             "needs an argument",
		"get k --nosuch=1":                                            "goes behind --",
		"health --service ":                                           "needs an argument",
		"status --endpoints a:1 x":                                    "want: none",
		"list a b":                                                    "want: [PREFIX]",
		"delete a b":                                                  "want: [KEY]",
		"set k":                                                       "want: KEY VALUE",
		"init":                                                        "want: ID=ADDR [ID=ADDR ...]",
		"help --endpoints a:1":                                        "flag provided but not defined: -endpoints",
		"restore --endpoints a:1 f --id 1 --data-dir d --addr 0.0.0.0:1": "flag provided but not defined: -endpoints",
	} {
		_, errs := runCommand(t, exitUsage, "", strings.Fields(line)...)
		wantPart(t, errs, hint)
	}
}

// TestErrorsAsJSON: wherever -o json stands, an error is one object, with the
// exit status, and what each endpoint said.
func TestErrorsAsJSON(t *testing.T) {
	f, fresh := newFakeNode(t), newFakeNode(t)
	fresh.setMetrics(&kvpb.MetricsResponse{})
	parse := func(errs string) (e commandError) {
		t.Helper()
		if err := json.Unmarshal([]byte(errs), &e); err != nil {
			t.Fatalf("%v: %s", err, errs)
		}
		return e
	}
	for _, line := range []string{"get --nosuch -o json k", "-o=json", "--timeout x -o json k", "-o json --timeout 0s k", "--- k -o json"} {
		_, errs := runCommand(t, exitUsage, "", append([]string{"get"}, strings.Fields(line)...)...)
		if e := parse(errs); e.Status != exitUsage || !strings.Contains(e.Text, "; see raft-key-value help get") {
			t.Errorf("%q: %+v", line, e)
		}
	}
	_, errs := runCommand(t, exitUsage, "", "get", "-o", "yaml", "k")
	wantPart(t, errs, "raft-key-value: get: -o \"yaml\"")

	endpoints := strings.Join([]string{closedAddress, fresh.addr}, ",")
	_, errs = runCommand(t, exitNotDone, "", "transfer-leader", "2", "-o", "json", "--endpoints", endpoints)
	e := parse(errs)
	want := []reply{{closedAddress, "", "UNAVAILABLE", ""}, {fresh.addr, "", "FAILED_PRECONDITION", "NOT_INITIALIZED"}}
	for i := range e.Endpoints {
		wantPart(t, e.Text, e.Endpoints[i].Endpoint+": "+e.Endpoints[i].Error)
		e.Endpoints[i].Error = ""
	}
	if !slices.Equal(e.Endpoints, want) || e.Reason != "NOT_INITIALIZED" {
		t.Errorf("%+v", e)
	}
	t.Setenv(variablePrefix+"ENDPONTS", "x")
	_, errs = runCommand(t, exitYes, "", "set", "k", "v", "-o", "json", "--endpoints", f.addr)
	wantText(t, "stderr", errs, `{"warning":"no flag has the environment variable RAFT_KEY_VALUE_ENDPONTS"}`+"\n")
	_, errs = runCommand(t, exitYes, "", "set", "k", "v", "--endpoints", f.addr)
	wantText(t, "stderr", errs, "raft-key-value: warning: no flag has the environment variable RAFT_KEY_VALUE_ENDPONTS\n")
}

func TestUnknownVariables(t *testing.T) {
	environ := []string{
		"RAFT_KEY_VALUE_IDD=1", "RAFT_KEY_VALUE_ID=1", "RAFT_KEY_VALUE_ELECTION_TIMEOUT=1s", "RAFT_KEY_VALUE_ENDPOINTS=a:1",
		"RAFT_KEY_VALUE_TIMEOUT=1s", "RAFT_KEY_VALUE_VERSION=", "OTHER=1", "RAFT_KEY_VALUE_",
	}
	want := []string{"RAFT_KEY_VALUE_", "RAFT_KEY_VALUE_IDD", "RAFT_KEY_VALUE_TIMEOUT", "RAFT_KEY_VALUE_VERSION"}
	if got := unknownVariables(environ); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestFlagsBeforeTheCommand(t *testing.T) {
	for line, want := range map[string]string{
		"get k":                 "get k",
		"--endpoints a:1 get k": "get -endpoints=a:1 k",
		"-o json --timeout=1s get k --endpoints b": "get -o=json -timeout=1s k --endpoints b",
		"--endpoints a:1 -o json version":          "version -o=json",
		"--endpoints a:1 restore f":                "restore f",
		"-o get get k":                             "get -o=get k",
		"--id 1 get k":                             "",
		"-- get k":                                 "",
		"--endpoints a:1":                          "",
		"":                                         "",
	} {
		found, err := findCommand(strings.Fields(line))
		if got := strings.Join(found, " "); got != want || err != nil {
			t.Errorf("%q: %q, %v, want %q", line, got, err, want)
		}
	}
}

// TestFlagsBeforeTheCommandAreBlamed: the one that may not stand there, not one that
// may.
func TestFlagsBeforeTheCommandAreBlamed(t *testing.T) {
	for line, blamed := range map[string]string{
		"--endpoints a:1 --local get a":    "-local stands before the sub-command",
		"-o json --if-version=1 set k v":   "-if-version stands before the sub-command",
		"--timeout 1s --nosuch --id 1 get": "-nosuch stands before the sub-command",
		"--endpoints a:1 nosuch":           `unknown sub-command "nosuch"`,
		"-o json statsu":                   `unknown sub-command "statsu"`,
	} {
		found, err := findCommand(strings.Fields(line))
		if found != nil || err == nil {
			t.Errorf("%q: %q, %v", line, found, err)
		}
		wantPart(t, fmt.Sprint(err), blamed)
	}
	for _, line := range []string{"--local get a", "--timeout 1s --id 1", "--endpoints", "-o ---"} {
		found, err := findCommand(strings.Fields(line)) // A node's line says what is wrong with it.
		if found != nil || err != nil {
			t.Errorf("%q: %q, %v", line, found, err)
		}
	}
	found, err := findCommand([]string{"--endpoints", "a:1", "--help"})
	if err != nil || !slices.Equal(found, []string{"help"}) {
		t.Errorf("help: %q, %v", found, err)
	}
}

// TestExitStatuses of the process: what stands before a sub-command, --version,
// and variables that nothing reads.
func TestExitStatuses(t *testing.T) {
	f := newFakeNode(t)
	f.put("k", "v")
	for _, test := range []struct {
		line, env      string
		status         int
		stdout, stderr string // parts
	}{
		{"--version", "", exitYes, "raft-key-value ", ""},
		{"-version", "", exitYes, "raft-key-value ", ""},
		{"--version x", "", exitUsage, "", "unknown sub-command"},
		{"--endpoints " + f.addr + " -o json get k", "", exitYes, `{"value":"dg==","version":"7"}`, ""},
		{"--endpoints " + f.addr + " get nosuch", "", exitNo, "", "not found"},
		{"--endpoints " + closedAddress + " transfer-leader 1", "", exitNotDone, "", "UNAVAILABLE"},
		{"--endpoints " + f.addr + " nosuch", "", exitUsage, "", "unknown sub-command \"nosuch\""},
		{"--endpoints " + f.addr + " --local get k", "", exitUsage, "", "-local stands before"},
		{"get k", endpointVariable + "=" + f.addr, exitYes, "v", ""},
		{"get k --endpoints " + f.addr, "RAFT_KEY_VALUE_ENDPOINT=x", exitYes, "v", "the environment variable RAFT_KEY_VALUE_ENDPOINT\n"},
		{"get k --timeout x", "RAFT_KEY_VALUE_CERTFILE=x", exitUsage, "", "the environment variable RAFT_KEY_VALUE_CERTFILE\n"},
		{"--id 1", "RAFT_KEY_VALUE_ADRESS=x", exitUsage, "", "the environment variable RAFT_KEY_VALUE_ADRESS\n"},
		{"--id 1 --addr " + f.addr, "RAFT_KEY_VALUE_ADRESS=x", 1, "", "name=RAFT_KEY_VALUE_ADRESS"},
	} {
		log, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = log.Close() }()
		cmd := commandOf(log, strings.Fields(test.line)...)
		if test.env != "" {
			cmd.Env = append(cmd.Env, test.env)
		}
		var stdout bytes.Buffer
		cmd.Stdout = &stdout
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != test.status {
			t.Errorf("%q: %v, want status %d", test.line, err, test.status)
		}
		stderr, err := os.ReadFile(log.Name())
		if err != nil {
			t.Fatal(err)
		}
		wantPart(t, stdout.String(), test.stdout)
		wantPart(t, string(stderr), test.stderr)
		if test.stderr == "" && len(stderr) > 0 {
			t.Errorf("%q: stderr %q", test.line, stderr)
		}
	}
}

// TestChangesWhoseAnswerIsNotPrinted: the status must not say that nothing was
// done.
func TestChangesWhoseAnswerIsNotPrinted(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer func() { _ = full.Close() }()
	f := newFakeNode(t)
	f.put("k", "v")
	for line, want := range map[string]int{
		"remove 2": exitUnknown, "set k v -o json": exitUnknown, "get k": exitNotDone, "status": exitNotDone, "list": exitNotDone,
		"delete --prefix k --yes": exitUnknown,
	} {
		f.put("k", "v")
		var errs bytes.Buffer
		args := append(strings.Fields(line), "--endpoints", f.addr)
		if got := runClient(t.Context(), args, nil, full, &errs); got != want {
			t.Errorf("%q: exit status %d, want %d: %s", line, got, want, &errs)
		}
		wantPart(t, errs.String(), "no space left")
		if strings.Contains(errs.String(), "it is done") != (want == exitUnknown) {
			t.Errorf("%q: %s", line, &errs)
		}
	}
}

func memberStatus(id uint64, role string) *kvpb.MemberStatus {
	return &kvpb.MemberStatus{
		Node:  &kvpb.Node{Id: id, Address: fmt.Sprintf("h:%d", id)},
		Voter: role == "voter", Learner: role == "learner", VoterOutgoing: role == "leaving",
	}
}

// TestChangesOfMembership: what is sent; voters are dropped only by who says so.
func TestChangesOfMembership(t *testing.T) {
	follower, leader := newFakeNode(t), newFakeNode(t)
	t.Setenv(endpointVariable, follower.addr)
	expected := func(members ...*kvpb.MemberStatus) *kvpb.Membership {
		m := &kvpb.Membership{}
		for _, s := range members {
			m.Members = append(m.Members, &kvpb.ExpectedMember{Node: s.Node, Voter: s.Voter})
		}
		return m
	}
	one, two, three, four := memberStatus(1, "voter"), memberStatus(2, "voter"), memberStatus(3, "voter"), memberStatus(4, "learner")
	// The follower lags behind: it knows neither node 3 nor 4.
	follower.setMetrics(&kvpb.MetricsResponse{
		ClusterId: 10, Role: kvpb.Role_ROLE_FOLLOWER, Leader: &kvpb.Node{Id: 2, Address: leader.addr},
		Members: []*kvpb.MemberStatus{one, two},
	})
	leaderHas := func(members ...*kvpb.MemberStatus) {
		leader.setMetrics(&kvpb.MetricsResponse{ClusterId: 10, Role: kvpb.Role_ROLE_LEADER, Members: members})
	}
	leaderHas(four, three, two, one)
	all := expected(one, two, three, four)
	for _, test := range []struct {
		line string
		sent *kvpb.ChangeMembershipRequest // nil: none
		out  string
	}{
		{"change-membership 4", nil, "it would remove nodes 1, 2 and 3 from the cluster: --remove-others does that, --retain keeps them as learners"},
		{"change-membership 1 2 4", nil, "it would remove node 3 from the cluster: --remove-others does that, --retain keeps it as a learner"},
		{"change-membership 1 2 3 4", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3, 4}, Expected: all}, "voters: [1 2 3 4]\n"},
		{"change-membership 2 1 --remove-others", &kvpb.ChangeMembershipRequest{Members: []uint64{2, 1}, Expected: all}, "voters: [2 1]\n"},
		{"change-membership 4 --retain", &kvpb.ChangeMembershipRequest{Members: []uint64{4}, Retain: true, Expected: all}, "voters: [4]\n"},
		{"promote 4", &kvpb.ChangeMembershipRequest{Promote: []uint64{4}}, "node 4 is a voter\n"},
		{"promote 4 5", &kvpb.ChangeMembershipRequest{Promote: []uint64{4, 5}}, "nodes 4 and 5 are voters\n"},
		{"demote 3", &kvpb.ChangeMembershipRequest{Demote: []uint64{3}}, "node 3 is a learner\n"},
		{"demote 3 2 1", &kvpb.ChangeMembershipRequest{Demote: []uint64{3, 2, 1}}, "nodes 3, 2 and 1 are learners\n"},
		{"remove 2", &kvpb.ChangeMembershipRequest{Remove: []uint64{2}}, "node 2 is removed\n"},
	} {
		exit := exitYes
		calls := 1
		if test.sent == nil {
			exit = exitUsage
			calls = 0
		}
		out, errs := runCommand(t, exit, "", strings.Fields(test.line)...)
		wantPart(t, out+errs, test.out)
		sent, n := follower.take()
		if n != calls || test.sent != nil && !proto.Equal(sent, test.sent) {
			t.Errorf("%s: sent %d times, %v, want %v", test.line, n, sent, test.sent)
		}
	}
	// Who is on its way out is no voter to be kept; a node of two lives is sent as it is.
	old := memberStatus(2, "learner")
	for _, lives := range [][]*kvpb.MemberStatus{{old, two}, {two, old}} {
		leaderHas(append(lives, memberStatus(1, "leaving"), three)...)
		runCommand(t, exitYes, "", "change-membership", "2", "3")
		want := &kvpb.ChangeMembershipRequest{Members: []uint64{2, 3}, Expected: expected(append(lives, three)...)}
		if sent, _ := follower.take(); !proto.Equal(sent, want) {
			t.Errorf("sent %v, want %v", sent, want)
		}
	}
	runCommand(t, exitYes, "", "init", "1=h:1", "--force")
	if sent, _ := follower.take(); !sent.(*kvpb.InitRequest).Force {
		t.Errorf("sent %v", sent)
	}
}

// callingCommands are lines that call a node of a cluster. FILE stands for a new
// file.
var callingCommands = []string{
	"get k", "get k --local", "list", "list --local", "list --start k", "set k v", "delete k", "delete --prefix k --yes",
	"watch k --until-version 7", "add-learner 3=h:3", "promote 3", "demote 2", "change-membership 1 2", "remove 2", "transfer-leader 2",
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

// TestLivenessBesideHungNodes: nodes that hang take the time of one from health, for the empty
// service, too, which is asked of nodes without metrics.
func TestLivenessBesideHungNodes(t *testing.T) {
	t.Parallel()
	live := newFakeNode(t)
	endpoints := strings.Join([]string{listenSilently(t), listenSilently(t), live.addr}, ",")
	out, _ := runCommand(t, exitYes, "", "health", "--service", "", "--timeout", fullTimeout.String(), "--endpoints", endpoints)
	wantText(t, "health", out, "SERVING, says "+live.addr+"\n")
}

// TestEndpointsThatAreNoHelp: endpoints that hang, that refuse, and that are in no
// cluster hold no command up. Those that hang take 2 s together: one after another they
// would take all of the timeout.
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
		out, _ := runCommand(t, exitYes, "", append(args, "--timeout", "6s")...)
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
			timeout = fullTimeout.String()
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
	runCommand(t, exitYes, "", "init", "1="+fresh.addr, "--endpoints", endpoints)
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
	_, errs := runCommand(t, exitNo, "", "health", "--endpoints", endpoints)
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
	together(t, []string{"set k v", "delete k", "delete --prefix k --yes", "get k", "list k", "watch k"}, func(t *testing.T, line string) {
		one, other := newFakeNode(t), newFakeNode(t)
		one.setMetrics(&kvpb.MetricsResponse{ClusterId: 10})
		other.setMetrics(&kvpb.MetricsResponse{ClusterId: 11})
		one.failWith(func(context.Context) error {
			return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "unknown")
		})
		exit := exitUnknown
		if slices.Contains([]string{"get k", "list k", "watch k"}, line) {
			exit = exitNotDone
		}
		args := commandLine(t, line, one.addr+","+other.addr)
		_, errs := runCommand(t, exit, "", append(args, "--timeout", fullTimeout.String())...)
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
	operate := func(args ...string) {
		t.Helper()
		runOperator(t, append(args, "--timeout=30s", "--endpoints", strings.Join(endpoints, ","))...)
	}
	operate("transfer-leader", fmt.Sprint(to.id))
	operate("remove", fmt.Sprint(stopped.id))
	operate("add-learner", fmt.Sprintf("9=%s", fresh.address))
	eventually(t, func() error { // a learner learns that it has caught up with its leader's next heartbeat
		row := fmt.Sprintf("\n9     %s  ok           no     learner", fresh.address)
		if out := run("status"); !strings.Contains(out, row) {
			return fmt.Errorf("%q lacks %q", out, row)
		}
		return nil
	})
}

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
	for _, line := range strings.Split(strings.TrimSpace(table), "\n")[2:] {
		words := strings.Fields(line)
		rows = append(rows, strings.Join(append(words[:5], words[13]), " "))
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

// TestStatusSummary: the summary goes by what each node says of itself, and of one that does not
// answer here, by what others say.
func TestStatusSummary(t *testing.T) {
	t.Parallel()
	a, b, c := newFakeNode(t), newFakeNode(t), newFakeNode(t)
	say := func(f *fakeNode, id, raftID, leader, term uint64, members ...*kvpb.MemberStatus) {
		m := &kvpb.MetricsResponse{Node: &kvpb.Node{Id: id, Address: f.addr}, RaftId: raftID, Term: term, Role: kvpb.Role_ROLE_FOLLOWER}
		if len(members) > 0 {
			m.ClusterId = 0xa
			m.Members = members
			m.Healthy = leader != 0
		}
		if leader != 0 {
			m.Leader = &kvpb.Node{Id: leader}
		}
		if leader == id {
			m.Role = kvpb.Role_ROLE_LEADER
		}
		f.setMetrics(m)
	}
	members := func(third string) []*kvpb.MemberStatus {
		return []*kvpb.MemberStatus{memberAt(0xa, 1, a.addr, true), memberAt(0xa, 2, b.addr, true), memberAt(0xa, 3, third, true)}
	}
	first := func(want int) string {
		out, _ := runCommand(t, want, "", "status", "--timeout", fullTimeout.String(), "--endpoints", a.addr+","+b.addr)
		line, _, _ := strings.Cut(out, "\n")
		return line
	}

	all := members(c.addr)
	say(a, 1, 0xa<<8|1, 1, 5, all...)
	say(b, 2, 0xa<<8|2, 1, 5, all...)
	say(c, 3, 0xa<<8|3, 1, 5, all...)
	wantText(t, "all up", first(exitYes), "3 of 3 voters are up, leader 1, one more may fail")
	say(c, 3, 0x77, 0, 5)
	wantText(t, "one is back without memory", first(exitYes), "2 of 3 voters are up, leader 1, no more may fail")
	say(a, 1, 0xa<<8|1, 0, 5, all...)
	say(b, 2, 0x78, 0, 5)
	wantText(t, "two are", first(exitYes), "the cluster cannot go on: 2 of 3 voters have lost all that they knew, and 2 are needed with it")
	say(a, 1, 0xa<<8|1, 1, 6, all...)
	say(b, 2, 0xa<<8|2, 2, 6, all...)
	const twoLead = "ATTENTION: nodes 1 and 2 lead term 6 at once, which must never be: end all clients, and keep all directories"
	wantText(t, "two leaders", first(exitNotDone), twoLead)
	_, errs := runCommand(t, exitNotDone, "", "status", "--endpoints", a.addr)
	wantText(t, "stderr", errs, "raft-key-value: status: "+twoLead+"\n")
	say(b, 2, 0xa<<8|2, 2, 7, all...)
	wantPart(t, first(exitYes), ", leader 2, ")

	away := members(closedAddress)
	say(a, 1, 0xa<<8|1, 1, 8, away...)
	say(b, 2, 0xa<<8|2, 1, 8, away...)
	wantText(t, "one is away", first(exitYes), "2 of 3 voters are up, leader 1, no more may fail")
	away[2].Connected = true
	away[2].Progress = &kvpb.Progress{CaughtUp: true}
	say(a, 1, 0xa<<8|1, 1, 8, away...)
	wantText(t, "the leader reaches it", first(exitYes), "3 of 3 voters are up, leader 1, one more may fail")
	away[2].Connected = false
	say(a, 1, 0xa<<8|1, 3, 9, away...)
	say(b, 2, 0xa<<8|2, 3, 9, away...)
	wantText(t, "the leader does not answer here", first(exitYes), "3 of 3 voters are up, leader 3, one more may fail")
	say(a, 1, 0xa<<8|1, 0, 9, away...)
	say(b, 2, 0xa<<8|2, 0, 9, away...)
	wantText(t, "no leader", first(exitYes), "no leader: 2 of 3 voters answer, which is enough: they elect one, or do not reach each other")

	out, _ := runCommand(t, exitYes, "", "status", "-o", "json", "--endpoints", a.addr)
	var answer struct {
		Summary struct {
			State    string
			Clusters []struct {
				Voters struct{ All, Answer int }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || len(answer.Summary.Clusters) != 1 {
		t.Fatal(err, out)
	}
	wantText(t, "state", answer.Summary.State, stateNoLeader)
	if v := answer.Summary.Clusters[0].Voters; v.All != 3 || v.Answer != 2 {
		t.Errorf("voters: %+v", v)
	}
}

// TestStatusNamesCertificatesThatEnd: the table and the JSON name each node whose certificate
// ends within 30 days, or has ended; if there is none, the table says which one ends first.
func TestStatusNamesCertificatesThatEnd(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	var nodes []*fakeNode
	var addresses []string
	for range 4 {
		f := newFakeNode(t)
		nodes = append(nodes, f)
		addresses = append(addresses, f.addr)
	}
	endpoints := "--endpoints=" + strings.Join(addresses, ",")
	now := time.Now()
	setEnds := func(left ...time.Duration) (lines []string) {
		for i, f := range nodes {
			id := uint64(i + 1)
			m := &kvpb.MetricsResponse{Node: &kvpb.Node{Id: id, Address: f.addr}, ClusterId: 0xa, RaftId: id}
			text := ""
			if i < len(left) {
				end := now.Add(left[i])
				m.CertificateNotAfter = end.Unix()
				text = clockText(end)
			}
			f.setMetrics(m)
			lines = append(lines, text)
		}
		return lines
	}
	wantLines := func(want ...string) {
		t.Helper()
		out, _ := runCommand(t, exitYes, "", "status", endpoints)
		rows := strings.Split(strings.TrimSpace(out), "\n")
		got := rows[2+len(nodes):]
		if !slices.Equal(got, want) {
			t.Errorf("below the table is %q, want %q", got, want)
		}
	}

	setEnds()
	wantLines()
	ends := setEnds(100*day, 31*day, 200*day)
	wantLines("the first certificate to end is that of node 2, at " + ends[1])
	ends = setEnds(29*day, 31*day, -day) // the fourth node shows none
	wantLines(
		"replace the certificate of node 3: it ends at "+ends[2],
		"replace the certificate of node 1: it ends at "+ends[0],
	)
	out, _ := runCommand(t, exitYes, "", "status", "-o", "json", endpoints)
	var answer struct {
		Members []struct {
			EndsSoon *bool `json:"certificate_ends_soon"`
		}
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || len(answer.Members) != len(nodes) {
		t.Fatal(err, out)
	}
	for i, want := range []bool{true, false, true, false} {
		if got := answer.Members[i].EndsSoon; got == nil || *got != want {
			t.Errorf("node %d: certificate_ends_soon is not %v: %s", i+1, want, out)
		}
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

// votersOf are the ids of a cluster's voters, and of its learners, as a node has
// them.
func votersOf(t *testing.T, c *testCluster, id uint64) (voters, learners []uint64) {
	t.Helper()
	m, err := c.metrics(id)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range membershipOf(m).Members {
		if s.Voter {
			voters = append(voters, s.Node.Id)
		} else {
			learners = append(learners, s.Node.Id)
		}
	}
	return voters, learners
}

// TestOperatorsPromoteAndDemote: all others stay as they are.
func TestOperatorsPromoteAndDemote(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5, steady)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.addLearner(1, 5)
	for _, test := range []struct {
		line             string
		voters, learners []uint64
	}{
		{"promote 4", []uint64{1, 2, 3, 4}, []uint64{5}},
		{"promote 4", []uint64{1, 2, 3, 4}, []uint64{5}},
		{"demote 2", []uint64{1, 3, 4}, []uint64{2, 5}},
		{"promote 2 5", []uint64{1, 2, 3, 4, 5}, nil},
		{"demote 4 5", []uint64{1, 2, 3}, []uint64{4, 5}},
	} {
		runOperator(t, append(strings.Fields(test.line), "--endpoints", c.nodes[2].address)...)
		leader := c.settled(test.voters...)
		voters, learners := votersOf(t, c, leader)
		if fmt.Sprint(voters) != fmt.Sprint(test.voters) || fmt.Sprint(learners) != fmt.Sprint(test.learners) {
			t.Errorf("%s: voters %v, learners %v, want %v and %v", test.line, voters, learners, test.voters, test.learners)
		}
	}
	_, errs := runCommand(t, exitNotDone, "", "promote", "9", "--endpoints", c.nodes[1].address)
	wantPart(t, errs, "UNKNOWN_MEMBER")
}

// TestTwoOperators: each adds a voter at the same time; who is told that it is done
// is told the truth, and the other one why not.
func TestTwoOperators(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5, steady)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.addLearner(1, 5)
	for range 5 {
		runOperator(t, "change-membership", "1", "2", "3", "--retain", "--endpoints", c.nodes[1].address)
		var both sync.WaitGroup
		exits, errs := make([]int, 2), make([]bytes.Buffer, 2)
		for i, id := range []uint64{4, 5} {
			args := []string{"change-membership", "1", "2", "3", fmt.Sprint(id), "--endpoints", c.nodes[uint64(i)+2].address}
			both.Go(func() { exits[i] = runClient(t.Context(), args, nil, &bytes.Buffer{}, &errs[i]) })
		}
		both.Wait()
		for i := range exits {
			// Who read the membership after the other's change would drop that one's voter.
			told := exits[i] == exitNotDone && strings.Contains(errs[i].String(), "MEMBERSHIP_CHANGED") ||
				exits[i] == exitUsage && strings.Contains(errs[i].String(), "it would remove node")
			isBusy := exits[i] == exitUnknown || strings.Contains(errs[i].String(), "UNREACHABLE") ||
				strings.Contains(errs[i].String(), "NOT_CAUGHT_UP")
			if exits[i] != exitYes && !told && !isBusy {
				t.Errorf("exit status %d: %s", exits[i], &errs[i])
			}
		}
		if exits[0] == exitYes && exits[1] == exitYes {
			t.Fatal("both are told that it is done")
		}
	}
}
