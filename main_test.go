// Settings, signals, and the bounds of the inbox.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

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
		{args: "--addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_ID=x", want: `invalid value "x" of RAFT_KEY_VALUE_ID: want a whole number`},
		{args: "--id 1 --addr 127.0.0.1:1 --data-dir=", want: "--data-dir is empty"},
		{args: "--id 1 --addr 127.0.0.1:1", env: "RAFT_KEY_VALUE_DATA_DIR=", want: "RAFT_KEY_VALUE_DATA_DIR is empty"},
		{args: "--id 1 --addr 127.0.0.1:1 --data-dir d", env: "RAFT_KEY_VALUE_DATA_DIR="},
		{args: "--id 1 --addr 127.0.0.1:1 --insecure=maybe", want: "-insecure: want true or false"},
		{args: "--id 1 --addr 127.0.0.1:1 --log-bytes 64MiB", want: "flag -log-bytes: want a whole number"},
		{args: "--id 1 --addr 127.0.0.1:1 nosuch", want: "unknown sub-command \"nosuch\""},
		{args: "--id 1 --addr 127.0.0.1:65535"},
		{args: "--id 1 --addr 127.0.0.1:65536", want: "--addr: address \"127.0.0.1:65536\": want a port from 0 to 65535"},
		{args: "--id 1 --addr localhost:http", want: "want a port from 0 to 65535"},
		{args: "--id 1 --addr localhost:-1", want: "want a port from 0 to 65535"},
		{args: "--id 1 --addr localhost:", want: "host:port"},
		{args: "--id 1 --addr 127.0.0.1:1 --advertise localhost:x", want: "--advertise: address \"localhost:x\": want a port"},
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

// TestErrorsNameWhatSetTheValue: the environment variable, or the flag in its place.
func TestErrorsNameWhatSetTheValue(t *testing.T) {
	for flag, wrong := range map[string]string{
		"id": "0", "addr": "nonsense", "advertise": "127.0.0.1:0", "heartbeat": "1ms", "election-timeout": "1ms",
		"data-dir": "", "log-bytes": "5",
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
	err = run(context.Background(), o, slog.New(slog.DiscardHandler), func(*server) { t.Error("ready") })
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

// TestNoLeaderIsLogged: once each time that there is none for long.
func TestNoLeaderIsLogged(t *testing.T) {
	var log bytes.Buffer
	n := newNode(defaultOptions(), &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, slog.New(slog.NewTextHandler(&log, nil)))
	n.net = deafNetwork{}
	long := 5 * int(n.electionTicks())
	n.turn(input{ticks: long}) // in no cluster, there is nothing to be missed
	if _, err := n.bootstrap(); err != nil {
		t.Fatal(err)
	}
	logged := func(want int) {
		t.Helper()
		for range long {
			n.tick() // without what makes it the leader
		}
		if got := strings.Count(log.String(), `msg="no leader"`); got != want {
			t.Fatalf("%d times, want %d: %s", got, want, &log)
		}
	}
	logged(1)
	n.turn(input{})
	if n.raft.lead == 0 {
		t.Fatal("it does not lead")
	}
	logged(1)
	n.raft.lead = 0
	logged(2)
}

// TestAcceptNeedsToKnowWhoItIs: a hello that does not say who calls is refused.
func TestAcceptNeedsToKnowWhoItIs(t *testing.T) {
	n := turnNode()
	p := n.status.latest.Load()
	h := &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{RaftId: 5, Life: 5, Node: &kvpb.Node{Id: 2, Address: "127.0.0.1:2"}}, To: &kvpb.Peer{Node: n.self, RaftId: p.raftID}}
	if w := n.accept(h); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
		t.Fatal(w)
	}
	for _, from := range []*kvpb.Peer{nil, {}, {RaftId: 5, Life: 5}, {RaftId: 5, Life: 5, Node: &kvpb.Node{Id: 2}}, {RaftId: 5, Life: 5, Node: &kvpb.Node{Address: "127.0.0.1:2"}}} {
		h.From = from
		if w := n.accept(h); w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED {
			t.Errorf("%v is accepted", from)
		}
	}
}

// turnNode is a node without goroutines and network.
func turnNode() *node {
	return newNode(defaultOptions(), &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, slog.New(slog.DiscardHandler))
}

// TestFullQueue: calls that find no room are refused, and there is room again
// once the others have ended.
func TestFullQueue(t *testing.T) {
	n := turnNode()
	calls := make([]*call, maxQueuedCalls)
	for i := range calls {
		calls[i] = &call{done: make(chan outcome, 1)}
		if err := n.inbox.call(calls[i]); err != nil {
			t.Fatal(i, err)
		}
	}
	err := n.inbox.call(&call{done: make(chan outcome, 1)})
	if !errors.Is(err, errOverloaded) {
		t.Fatal(err)
	}
	st := toStatus(err, true)
	wantError(t, st, codes.ResourceExhausted, "OVERLOADED")
	if !slices.ContainsFunc(status.Convert(st).Details(), func(d any) bool {
		retry, ok := d.(*errdetails.RetryInfo)
		return ok && retry.RetryDelay.AsDuration() > 0
	}) {
		t.Error("it does not say when to try again")
	}
	n.turn(n.inbox.take())
	if err := n.inbox.call(&call{done: make(chan outcome, 1)}); !errors.Is(err, errOverloaded) {
		t.Fatal("they still wait in the loop: ", err)
	}
	n.turn(input{ticks: int(n.ticksOf(leaderWait)) + 1})
	for i, c := range calls {
		if o := <-c.done; !errors.Is(o.err, errNotInitialized) {
			t.Fatal(i, o.err)
		}
	}
	big := &call{write: make([]byte, maxQueuedBytes/2+1), done: make(chan outcome, 1)}
	if err := n.inbox.call(big); err != nil {
		t.Fatal(err)
	}
	if err := n.inbox.call(big); !errors.Is(err, errOverloaded) {
		t.Fatal("bytes are not bounded: ", err)
	}
}

// TestInboundWaits: messages of peers wait for room, and no longer than their
// stream or the loop.
func TestInboundWaits(t *testing.T) {
	n := turnNode()
	big := []inbound{{&raftpb.Message{Entries: []*raftpb.Entry{{Data: make([]byte, maxInboundBytes)}}}, &kvpb.Hello{From: &kvpb.Peer{}, To: &kvpb.Peer{}}}}
	if err := n.receiveMessages(context.Background(), big); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	delivered := make(chan error)
	go func() { delivered <- n.receiveMessages(ctx, big) }()
	cancel()
	if err := <-delivered; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	go func() { delivered <- n.receiveMessages(context.Background(), big) }()
	for done := false; !done; {
		n.turn(n.inbox.take())
		select {
		case err := <-delivered:
			if err != nil {
				t.Fatal(err)
			}
			done = true
		case <-time.After(time.Millisecond):
		}
	}
	n.inbox.deliver(big) // if there is room
	go func() { delivered <- n.receiveMessages(context.Background(), big) }()
	n.err = errStopping
	if err := n.run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-delivered; !errors.Is(err, errStopping) {
		t.Fatal(err)
	}
}

// TestAGivenUpCallIsNotProposed: a caller that gave a queued write up was told
// that it is not applied.
func TestAGivenUpCallIsNotProposed(t *testing.T) {
	n := turnNode()
	n.net = deafNetwork{}
	if _, err := n.bootstrap(); err != nil {
		t.Fatal(err)
	}
	n.turn(input{})
	record, err := encodeWrite(&kvpb.Write{Operation: &kvpb.Write_Set{Set: &kvpb.SetRequest{Key: "k", Value: []byte("v")}}})
	if err != nil {
		t.Fatal(err)
	}
	given, kept := &call{write: record, done: make(chan outcome, 1)}, &call{write: record, done: make(chan outcome, 1)}
	given.state.Store(callGivenUp)
	n.turn(input{calls: []*call{given, kept}})
	if o := <-kept.done; o.err != nil || o.version != 1 || n.store.version != 1 {
		t.Fatal(o, n.store.version)
	}
}

// TestWhatWasProposedIsUnknown: a node that stops, or drops its state, says of
// what is only queued that it was not applied, and of the rest that it is not
// known.
func TestWhatWasProposedIsUnknown(t *testing.T) {
	n := turnNode()
	proposed, queued := &call{write: []byte{1}, done: make(chan outcome, 1)}, &call{write: []byte{1}, done: make(chan outcome, 1)}
	n.calls.own, n.calls.writes = &proposal{calls: []*call{proposed}}, []*call{queued}
	n.calls.failAll(errStopping)
	if o := <-proposed.done; o.err != errOutcomeUnknown {
		t.Error(o.err)
	}
	if o := <-queued.done; o.err != errStopping {
		t.Error(o.err)
	}
}

// TestExpireNeedsNoLeader: a call waits for a leader until there has been none for
// leaderWait, whenever it came.
func TestExpireNeedsNoLeader(t *testing.T) {
	l := newLone(t, following)
	for l.n.election.leaderlessTicks == 0 {
		l.turn(1)
	}
	wait := l.n.ticksOf(leaderWait)
	var calls []*call
	for l.n.election.leaderlessTicks < wait {
		if l.n.election.leaderlessTicks == 1 || l.n.election.leaderlessTicks == wait/2 {
			c := &call{done: make(chan outcome, 1)}
			calls = append(calls, c)
			if err := l.n.inbox.call(c); err != nil {
				t.Fatal(err)
			}
		}
		l.turn(1)
		for i, c := range calls {
			if len(c.done) != 0 {
				t.Fatalf("call %d ends after %d ticks: %v", i, l.n.election.leaderlessTicks, (<-c.done).err)
			}
		}
	}
	l.turn(1)
	for i, c := range calls {
		if len(c.done) != 1 {
			t.Fatalf("call %d does not end", i)
		}
	}
	if len(calls) != 2 {
		t.Fatalf("%d calls", len(calls))
	}
}

// deafNetwork is a network without anybody in it.
type deafNetwork struct{}

func (deafNetwork) send(uint64, []*raftpb.Message)                             {}
func (deafNetwork) sendSnapshot(uint64, uint64, *view)                         {}
func (deafNetwork) setMembers(uint64, uint64, map[uint64]*kvpb.Node, []uint64) {}
