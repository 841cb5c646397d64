package main

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// loader is a client that sends Sets by a Pipeline as fast as it can, and reads the answers.
func loader(value int, done *atomic.Int64) func(ctx context.Context, address string, begun func()) {
	return func(ctx context.Context, address string, begun func()) {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		s, err := kvpb.NewKVServiceClient(conn).Pipeline(ctx)
		if err != nil {
			return
		}
		m := pipelineOf(min(500, (1<<20)/value), setOp("loaded", strings.Repeat("x", value)))
		go func() { // ends with the stream
			for s.Send(m) == nil {
			}
		}()
		for {
			resp, err := s.Recv()
			if err != nil {
				return
			}
			begun()
			for _, r := range resp.Results {
				if r.GetError() == nil {
					done.Add(1)
				} else {
					done.Add(-1e6) // it shows
				}
			}
		}
	}
}

// slowReader asks for large answers all the time, and takes 128 KiB a second.
func slowReader(done *atomic.Int64) func(ctx context.Context, address string, begun func()) {
	return func(ctx context.Context, address string, begun func()) {
		for ctx.Err() == nil {
			r, err := dialRude(address)
			if err != nil {
				sleep(ctx, 50*time.Millisecond)
				continue
			}
			stop := context.AfterFunc(ctx, func() { _ = r.Close() })
			req := marshalled(&kvpb.GetRequest{Key: "large", Local: true})
			for range 100 {
				s, err := r.call(getMethod, -1)
				if err == nil {
					err = r.message(s, true, req)
				}
				if err == nil {
					err = r.window(s, 2<<20)
				}
				if err != nil {
					break
				}
			}
			begun()
			for r.window(0, 32<<10) == nil && ctx.Err() == nil {
				done.Add(32 << 10)
				sleep(ctx, 250*time.Millisecond)
			}
			stop()
			_ = r.Close()
		}
	}
}

// listedKeys are how many keys there are beside Lists.
const listedKeys = 1_000_000

// lister has so many Lists in flight, each of a page of 1,000 keys from anywhere on.
func lister(inFlight int, done *atomic.Int64) func(ctx context.Context, address string, begun func()) {
	return func(ctx context.Context, address string, begun func()) {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		kv := kvpb.NewKVServiceClient(conn)
		var callers sync.WaitGroup
		for range inFlight {
			callers.Go(func() {
				for ctx.Err() == nil {
					resp, err := kv.List(ctx, &kvpb.ListRequest{Start: benchKey(rand.Uint64N(listedKeys))})
					if err != nil && ctx.Err() == nil {
						done.Add(-1e6) // it shows
					}
					if err == nil {
						begun()
						done.Add(int64(len(resp.Items)))
					}
				}
			})
		}
		callers.Wait()
	}
}

// fillKeys sets so many keys, by a Pipeline.
func fillKeys(b *testing.B, ctx context.Context, kv kvpb.KVServiceClient, keys uint64) {
	b.Helper()
	s, err := kv.Pipeline(ctx)
	if err != nil {
		b.Fatal(err)
	}
	value := strings.Repeat("v", 128)
	const at = 1000
	go func() { // ends with the stream
		for i := uint64(0); i < keys; i += at {
			m := &kvpb.PipelineRequest{}
			for j := range uint64(at) {
				m.Operations = append(m.Operations, setOp(benchKey(i+j), value))
			}
			if s.Send(m) != nil {
				return
			}
		}
		_ = s.CloseSend()
	}()
	for done := 0; done < int(keys); {
		resp, err := s.Recv()
		if err != nil {
			b.Fatal(err)
		}
		done += len(resp.Results)
	}
}

// floods are what the benchmark runs beside a client. done counts what they were given.
func floodsCounting(done *atomic.Int64) []abuse {
	return []abuse{
		{"nothing", 0, nil},
		{"10 loaders of 100 bytes", 10, loader(100, done)},
		{"10 loaders of 64 KiB", 10, loader(64<<10, done)},
		{"6 slow readers", 6, slowReader(done)},
		{besideLists, 20, lister(10, done)},
	}
}

// besideLists is the flood that needs listedKeys.
const besideLists = "200 Lists in flight"

// These variables make the test binary a flood of some name, or a bare gRPC server, instead of
// the tests: in processes of their own, as clients are.
const (
	floodVariable = "TEST_FLOOD_OF_RAFT_KEY_VALUE"
	echoVariable  = "TEST_ECHO_OF_RAFT_KEY_VALUE"
	// targetVariable is whom the flood floods, and whom the server asks before it answers.
	targetVariable = "TEST_TARGET_OF_RAFT_KEY_VALUE"
)

func init() {
	switch {
	case os.Getenv(floodVariable) != "":
		runFlood(os.Getenv(floodVariable), os.Getenv(targetVariable))
	case os.Getenv(echoVariable) != "":
		runEcho(os.Getenv(targetVariable))
	}
}

// runFlood floods an address until the process is killed, and prints every 10 ms how much it
// was given, once all have begun.
func runFlood(name, address string) {
	var done atomic.Int64
	for _, a := range floodsCounting(&done) {
		if a.name == name {
			ready, _ := a.begin(address)
			<-ready
		}
	}
	for range time.Tick(10 * time.Millisecond) {
		fmt.Println(done.Load())
	}
}

// relay is a bare gRPC server: what a call costs without anything that this program does. With
// next, it asks another one first, as a leader asks a follower.
type relay struct {
	*health.Server
	next grpc_health_v1.HealthClient // nil: it answers at once
}

func (r relay) Check(ctx context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if r.next != nil {
		return r.next.Check(ctx, req)
	}
	return r.Server.Check(ctx, req)
}

// runEcho serves until the process is killed, and prints its address.
func runEcho(next string) {
	r := relay{Server: health.NewServer()}
	if next != "" {
		conn, err := grpc.NewClient("passthrough:///"+next, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			panic(err)
		}
		r.next = grpc_health_v1.NewHealthClient(conn)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr())
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, r)
	panic(s.Serve(listener))
}

// startHelper starts the test binary as what a variable makes of it, and returns the lines that
// it prints. It is killed at the end.
func startHelper(b *testing.B, variable, value, target string) (lines *bufio.Scanner, kill func()) {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), variable+"="+value, targetVariable+"="+target)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	b.Cleanup(kill)
	return bufio.NewScanner(out), kill
}

// startEcho starts a bare gRPC server, and returns its address.
func startEcho(b *testing.B, next string) string {
	b.Helper()
	lines, _ := startHelper(b, echoVariable, "1", next)
	if !lines.Scan() {
		b.Fatal("no bare server")
	}
	return lines.Text()
}

// startFlood starts a flood, and returns what counts what it was given, once all have begun.
func startFlood(b *testing.B, name, address string) (done *atomic.Int64, stop func()) {
	b.Helper()
	lines, kill := startHelper(b, floodVariable, name, address)
	if !lines.Scan() {
		b.Fatal("no flood")
	}
	done = &atomic.Int64{}
	go func() { // ends with the process
		for lines.Scan() {
			n, _ := strconv.ParseInt(lines.Text(), 10, 64)
			done.Store(n)
		}
	}()
	return done, kill
}

// timed is a call whose times are measured.
type timed struct {
	name string
	f    func() error
	took []time.Duration
}

// measure makes calls in turn, each so many times, and pauses between them: they are those of a
// client that does little.
func measure(b *testing.B, rounds int, calls []*timed) {
	b.Helper()
	for _, c := range calls {
		c.took = nil
	}
	for range rounds {
		for _, c := range calls {
			start := time.Now()
			if err := c.f(); err != nil {
				b.Error(err)
			}
			c.took = append(c.took, time.Since(start))
			time.Sleep(time.Millisecond)
		}
	}
}

func (t *timed) p99() time.Duration {
	slices.Sort(t.took)
	return t.took[len(t.took)*99/100]
}

// BenchmarkBeside reports the 99th percentile of another client's Gets and Sets, with and
// without each flood beside it, and the flood's rate: operations, bytes of slow readers, or keys listed. Two
// more calls say what of that is the machine's: a bare gRPC server that asks another one, as a
// leader asks a follower, and a call of the node's that does not pass the loop.
func BenchmarkBeside(b *testing.B) {
	for _, a := range floodsCounting(nil) {
		b.Run(a.name, func(b *testing.B) {
			ps := startProcesses(b, 3)
			p := leaderOf(b, ps)
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "large", Value: make([]byte, maxValueBytes)}); err != nil {
				b.Fatal(err)
			}
			if a.name == besideLists {
				fillKeys(b, ctx, p.kv, listedKeys)
			}
			bare, err := grpc.NewClient("passthrough:///"+startEcho(b, startEcho(b, "")),
				grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = bare.Close() }()
			check := func(conn *grpc.ClientConn) func() error {
				return func() error {
					_, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
					return err
				}
			}
			set := &timed{name: "set", f: func() error {
				_, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "k", Value: make([]byte, 2000)})
				return err
			}}
			get := &timed{name: "get", f: func() error {
				_, err := p.kv.Get(ctx, &kvpb.GetRequest{Key: "k"})
				return err
			}}
			large := &timed{name: "large-get", f: func() error {
				_, err := p.kv.Get(ctx, &kvpb.GetRequest{Key: "large"})
				return err
			}}
			relayed := &timed{name: "bare", f: check(bare)}
			loopless := &timed{name: "check", f: check(p.conn)}
			few := []*timed{large}
			many := []*timed{set, get, relayed, loopless}
			measure(b, 300, many) // warms up
			for b.Loop() {
				measure(b, 100, few)
				measure(b, 1000, many)
				alone := map[*timed]time.Duration{}
				for _, c := range slices.Concat(many, few) {
					alone[c] = c.p99()
				}
				stop := func() {}
				done := &atomic.Int64{}
				if a.f != nil {
					done, stop = startFlood(b, a.name, p.address)
				}
				start := time.Now()
				before := done.Load()
				measure(b, 100, few)
				measure(b, 1000, many)
				rate := float64(done.Load()-before) / time.Since(start).Seconds()
				stop()
				b.ReportMetric(rate, "flood/s")
				for _, c := range slices.Concat(many, few) {
					b.ReportMetric(float64(alone[c].Microseconds()), c.name+"-us")
					b.ReportMetric(float64(c.p99())/float64(alone[c]), c.name+"-times")
				}
				b.ReportMetric(float64(set.p99())/float64(relayed.p99()), "set/bare")
				b.ReportMetric(float64(get.p99())/float64(relayed.p99()), "get/bare")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
}

// marshalled encodes a message that can be.
func marshalled(m proto.Message) []byte {
	b, _ := proto.Marshal(m)
	return b
}
