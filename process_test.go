// Ring 3. Real processes: kill -9 under load, the soak, and what the loss of a leader
// costs.

package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// mainVariable makes the test binary run main instead of the tests.
const mainVariable = "TEST_MAIN_OF_RAFT_KEY_VALUE"

func init() {
	if os.Getenv(mainVariable) != "" {
		main()
	}
}

// process is a node in a process of its own, restarted at the same address.
type process struct {
	tb      testing.TB
	id      uint64
	address string
	args    []string // besides --id and --addr
	within  []string // the command that runs it; empty: none
	program string   // its file; empty: the test's own
	log     string
	cmd     *exec.Cmd
	conn    *grpc.ClientConn
	kv      kvpb.KVServiceClient
	cluster kvpb.ClusterServiceClient
}

// startProcesses starts nodes and makes them a cluster of voters.
func startProcesses(tb testing.TB, n int) []*process {
	tb.Helper()
	var ps []*process
	for i := range n {
		ps = append(ps, &process{id: uint64(i + 1), address: "127.0.0.1:0"})
	}
	formCluster(tb, ps)
	return ps
}

// formCluster starts processes and makes them a cluster of voters.
func formCluster(tb testing.TB, ps []*process) {
	tb.Helper()
	dir := tb.TempDir()
	req := &kvpb.InitRequest{Force: true} // without the wait of fresh nodes: no cluster names these
	for _, p := range ps {
		if p.address == "127.0.0.1:0" {
			p.address = deadAddress(tb) // it stays this node's while that is down
		}
		p.tb, p.log = tb, filepath.Join(dir, fmt.Sprintf("%d.log", p.id))
		p.start()
		tb.Cleanup(func() { p.signal(syscall.SIGKILL); _ = p.conn.Close() })
		req.Members = append(req.Members, &kvpb.Node{Id: p.id, Address: p.address})
	}
	within(tb, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
		defer cancel()
		_, err := ps[0].cluster.Init(ctx, req)
		isBusy := reasonOf(err) == "UNREACHABLE" // a member has not answered in time
		if err != nil && !isBusy {
			tb.Fatal(err)
		}
		return err
	})
	awaitHealthy(tb, ps, 30*time.Second)
}

// commandOf is our program with these arguments.
func commandOf(log *os.File, args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), mainVariable+"=1")
	cmd.Stderr = log
	return cmd
}

var readyLine = regexp.MustCompile(`msg=ready .*advertise=(\S+)`)

// start starts the process and waits until it listens.
func (p *process) start() {
	p.tb.Helper()
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.tb.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	before, _ := os.ReadFile(p.log)
	p.cmd = commandOf(log, append([]string{"--id", strconv.FormatUint(p.id, 10), "--addr", p.address}, p.args...)...)
	if p.program != "" {
		p.cmd.Path = p.program
	}
	if len(p.within) > 0 {
		p.cmd.Args = append(slices.Clone(p.within), p.cmd.Args...)
		p.cmd.Path, p.cmd.Err = exec.LookPath(p.within[0])
	}
	if err := p.cmd.Start(); err != nil {
		p.tb.Fatal(err)
	}
	eventually(p.tb, func() error {
		text, _ := os.ReadFile(p.log)
		m := readyLine.FindSubmatch(text[len(before):])
		if m == nil {
			return fmt.Errorf("node %d is not ready: %s", p.id, text[len(before):])
		}
		p.address = string(m[1])
		return nil
	})
	if p.conn == nil {
		// Comes back sooner than gRPC's default of a second, and waits for a node on a busy machine.
		p.conn, err = grpc.NewClient("passthrough:///"+p.address, grpc.WithNoProxy(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: rpcTimeout}))
		if err != nil {
			p.tb.Fatal(err)
		}
		p.kv, p.cluster = kvpb.NewKVServiceClient(p.conn), kvpb.NewClusterServiceClient(p.conn)
	}
}

// signal sends a signal to the process and waits for its end.
func (p *process) signal(s syscall.Signal) {
	_ = p.cmd.Process.Signal(s)
	_ = p.cmd.Wait()
}

func (p *process) metrics() (*kvpb.MetricsResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return p.cluster.Metrics(ctx, &kvpb.MetricsRequest{})
}

// metricsInTime are the metrics of a process that runs. On a busy machine it may answer late.
func (p *process) metricsInTime() (m *kvpb.MetricsResponse) {
	p.tb.Helper()
	eventually(p.tb, func() (err error) {
		m, err = p.metrics()
		return err
	})
	return m
}

// rss is the process's resident memory in bytes.
func (p *process) rss() int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	if f := strings.Fields(string(text)); len(f) > 1 {
		n, _ := strconv.Atoi(f[1])
		return n * os.Getpagesize()
	}
	return 0
}

// awaitHealthy waits until all processes are healthy voters of one cluster.
func awaitHealthy(tb testing.TB, ps []*process, limit time.Duration) {
	tb.Helper()
	defer func() {
		for _, p := range ps {
			if tb.Failed() {
				text, _ := os.ReadFile(p.log)
				tb.Logf("node %d:\n%s", p.id, text[max(0, len(text)-4000):])
			}
		}
	}()
	within(tb, limit, func() error { return healthyVoters(ps) })
}

func healthyVoters(ps []*process) error {
	for _, p := range ps {
		m, err := p.metrics()
		if err != nil {
			return err
		}
		voters := 0
		for _, member := range m.Members {
			if member.Voter {
				voters++
			}
		}
		if !m.Healthy || m.Joint || voters != len(ps) || len(m.Members) != len(ps) {
			return fmt.Errorf("node %d: healthy=%v (%s) joint=%v, %d voters of %d members", p.id, m.Healthy, m.UnhealthyReason, m.Joint, voters, len(m.Members))
		}
	}
	return nil
}

// leaderOf returns the process that leads.
func leaderOf(tb testing.TB, ps []*process) (leader *process) {
	eventually(tb, func() error {
		for _, p := range ps {
			if m, err := p.metrics(); err == nil && m.Role == kvpb.Role_ROLE_LEADER {
				leader = p
				return nil
			}
		}
		return fmt.Errorf("nobody leads")
	})
	return leader
}

// counter is a key whose only writer writes 1, 2, 3… and reads it again at
// random nodes: a read between the last acknowledged value and the last one
// that was sent is right. So is an earlier one whose fate was not known, if its
// version says that it was applied later. Any other is wrong.
type counter struct {
	key          string
	acked, sent  uint64
	version      uint64          // of the last one that was acknowledged
	fates        map[uint64]bool // values whose fate is not known
	late         int             // reads of such
	writes       atomic.Uint64
	longest      time.Duration // between two acknowledged writes
	lastAcked    time.Time
	unknown, bad map[string]int
}

// run writes and reads until ctx ends. via returns the node to call next.
func (c *counter) run(ctx context.Context, via func() *process) error {
	c.lastAcked = time.Now()
	for ctx.Err() == nil {
		c.sent++
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		resp, err := via().kv.Set(call, &kvpb.SetRequest{Key: c.key, Value: []byte(strconv.FormatUint(c.sent, 10))})
		cancel()
		if err == nil {
			c.acked, c.version = c.sent, resp.Version
			c.writes.Add(1)
			c.longest = max(c.longest, time.Since(c.lastAcked))
			c.lastAcked = time.Now()
		} else {
			if reason := errorReason(err); reason == "" || reason == "OUTCOME_UNKNOWN" {
				c.fates[c.sent] = true
			}
			c.note(ctx, err)
		}
		if c.sent%4 == 0 || c.fates[c.sent-1] {
			if err := c.check(ctx, via()); err != nil {
				return err
			}
		}
	}
	return nil
}

// note counts an error: as one that the API promises, or as bad.
func (c *counter) note(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	code, reason := status.Code(err), errorReason(err)
	switch {
	case reason == "QUOTA": // a disk is full
		c.unknown["QUOTA"]++
	case code == codes.Unavailable, code == codes.DeadlineExceeded:
		c.unknown[code.String()+" "+reason]++
	default:
		c.bad[err.Error()]++
	}
}

func (c *counter) check(ctx context.Context, p *process) error {
	call, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := p.kv.Get(call, &kvpb.GetRequest{Key: c.key})
	if err != nil {
		c.note(ctx, err)
		return nil
	}
	got, _ := strconv.ParseUint(string(resp.Value), 10, 64)
	switch {
	case got >= c.acked && got <= c.sent:
		return nil
	case got < c.acked && c.fates[got] && resp.Version > c.version:
		c.late++
		return nil
	}
	return fmt.Errorf("key %s is %d of version %d at node %d; %d of version %d was acknowledged, %d sent last; the fate of %d was unknown: %v",
		c.key, got, resp.Version, p.id, c.acked, c.version, c.sent, got, c.fates[got])
}

// startCounters runs counters until stop, which checks what they found.
func startCounters(tb testing.TB, n int, via func() *process) (cs []*counter, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i := range n {
		c := &counter{key: fmt.Sprintf("counter-%d", i), unknown: map[string]int{}, bad: map[string]int{}, fates: map[uint64]bool{}}
		cs = append(cs, c)
		wg.Go(func() {
			if err := c.run(ctx, via); err != nil {
				tb.Error(err)
			}
		})
	}
	stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		for _, c := range cs {
			if len(c.bad) > 0 {
				tb.Errorf("errors that the API does not promise: %v", c.bad)
			}
		}
	})
	tb.Cleanup(stop)
	return cs, stop
}

// TestSoak kills a random node whenever all are healthy, under load on all of
// them. No acknowledged write may be lost, no error be other than promised,
// each heal be done in 10 s, memory stay level. -soak=10m is the long form.
func TestSoak(t *testing.T) {
	ps := startProcesses(t, 3)
	cs, stop := startCounters(t, 6, func() *process { return ps[rand.IntN(len(ps))] })
	kills, longest := 0, time.Duration(0)
	var early, late int // resident memory of the largest process in the first and the last third
	for start := time.Now(); time.Since(start) < *soak || kills < 3; kills++ {
		p := ps[rand.IntN(len(ps))]
		p.signal(syscall.SIGKILL)
		p.start()
		healing := time.Now()
		awaitHealthy(t, ps, 10*time.Second)
		longest = max(longest, time.Since(healing))
		for _, p := range ps {
			if done := time.Since(start); done < *soak/3 {
				early = max(early, p.rss())
			} else if done > *soak*2/3 {
				late = max(late, p.rss())
			}
		}
	}
	stop()
	var writes uint64
	unknown := map[string]int{}
	for _, c := range cs {
		for _, p := range ps {
			if err := c.check(context.Background(), p); err != nil {
				t.Error(err)
			}
		}
		if c.acked == 0 {
			t.Errorf("%s: nothing was ever acknowledged", c.key)
		}
		writes += c.writes.Load()
		for k, n := range c.unknown {
			unknown[k] += n
		}
		unknown["applied late"] += c.late
	}
	sameListings(t, ps)
	if early > 0 && late > 2*early+64<<20 {
		t.Errorf("memory grew from %d to %d MiB", early>>20, late>>20)
	}
	t.Logf("%d kills, longest heal %v, %d writes acknowledged, errors %v, memory %d → %d MiB", kills, longest, writes, unknown, early>>20, late>>20)
}

// sameListings compares what the nodes have applied once all have applied the same.
func sameListings(tb testing.TB, ps []*process) {
	tb.Helper()
	eventually(tb, func() error {
		var first []byte
		for i, p := range ps {
			resp, err := p.kv.List(context.Background(), &kvpb.ListRequest{Local: true})
			if err != nil {
				return err
			}
			var text bytes.Buffer
			for _, kv := range resp.Items {
				fmt.Fprintf(&text, "%q %q %d\n", kv.Key, kv.Value, kv.Version)
			}
			if i == 0 {
				first = text.Bytes()
			} else if !bytes.Equal(first, text.Bytes()) {
				return fmt.Errorf("nodes 1 and %d differ:\n%s\n%s", p.id, first, text.Bytes())
			}
		}
		return nil
	})
}

// BenchmarkLeaderKill kills the leader with -9 under load on the others, and
// reports the longest time that a writer there waited. Use -benchtime 20x.
func BenchmarkLeaderKill(b *testing.B) { benchmarkLeaderLoss(b, syscall.SIGKILL) }

// BenchmarkLeaderStop does the same with SIGTERM.
func BenchmarkLeaderStop(b *testing.B) { benchmarkLeaderLoss(b, syscall.SIGTERM) }

func benchmarkLeaderLoss(b *testing.B, s syscall.Signal) {
	ps := startProcesses(b, 3)
	var longest time.Duration
	for range b.N {
		leader := leaderOf(b, ps)
		others := make([]*process, 0, 2)
		for _, p := range ps {
			if p != leader {
				others = append(others, p)
			}
		}
		cs, stop := startCounters(b, 4, func() *process { return others[rand.IntN(len(others))] })
		progress := func() {
			start := cs[0].writes.Load()
			eventually(b, func() error {
				if cs[0].writes.Load() < start+20 {
					return fmt.Errorf("too few writes")
				}
				return nil
			})
		}
		progress()
		leader.signal(s)
		progress()
		stop()
		for _, c := range cs {
			longest = max(longest, c.longest)
		}
		leader.start()
		awaitHealthy(b, ps, 30*time.Second)
	}
	b.ReportMetric(float64(longest.Milliseconds()), "worst-ms")
	b.ReportMetric(0, "ns/op")
}
