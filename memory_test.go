// What clients that misbehave cost a node in memory, and others in time.

package main

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// maxAbuse is what any abuse may cost a node in memory, also where other processes keep the
// collector from a processor. As many watches as a node has are no
// abuse: each takes some 25 KiB, 8 of them for a goroutine's stack, and what the garbage
// collector has not collected yet.
const (
	maxAbuse    = 320 << 20
	watchMemory = 32 << 10
)

const watchesOfAllKeys = "Watches of all keys"

// raw sends the data of a stream in frames of so many bytes at most.
func (r *rude) raw(stream uint32, end bool, data []byte, frame int) error {
	for part := range slices.Chunk(data, frame) {
		data = data[len(part):]
		if err := r.data(stream, end && len(data) == 0, part); err != nil {
			return err
		}
	}
	return nil
}

// message sends a message of a stream.
func (r *rude) message(stream uint32, end bool, m []byte) error {
	b := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m)))
	return r.raw(stream, end, append(b, m...), 16<<10)
}

// window opens the window of a stream, or with 0 of the connection.
func (r *rude) window(stream uint32, more uint32) error {
	return r.frame(frameWindow, 0, stream, binary.BigEndian.AppendUint32(nil, more))
}

// calls makes a connection, begins so many calls on it, sends what each says, and holds all of
// it until ctx ends.
func calls(many int, method string, say func(r *rude, stream uint32) error, headers ...string) func(context.Context, string, func()) {
	return callsOver(dialRude, many, method, say, headers...)
}

// callsOver is calls over a connection of another kind.
func callsOver(dial func(address string) (*rude, error), many int, method string, say func(r *rude, stream uint32) error, headers ...string) func(context.Context, string, func()) {
	return func(ctx context.Context, address string, begun func()) {
		r, err := dial(address)
		if err != nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = r.Close() })
		defer func() { stop(); _ = r.Close() }()
		for range many {
			s, err := r.call(method, -1, headers...)
			if err == nil {
				err = say(r, s)
			}
			if err != nil {
				break // the node has closed the connection, or reads no further
			}
		}
		begun()
		<-ctx.Done()
	}
}

// dialShut makes a connection that takes errors, and no answer.
func dialShut(address string) (*rude, error) {
	r, err := dialRude(address)
	if err != nil {
		return nil, err
	}
	return r, r.frame(frameSettings, 0, 0, []byte{0, 4, 0, 0, 0, 0}) // the window of a stream
}

// dialDeaf makes a connection of which nothing is read.
func dialDeaf(address string) (*rude, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
	r := &rude{Conn: conn, next: 1}
	if _, err = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err == nil {
		err = r.frame(frameSettings, 0, 0, nil)
	}
	return r, err
}

// messages has each call send these.
func messages(end bool, ms ...proto.Message) func(*rude, uint32) error {
	var encoded [][]byte
	for _, m := range ms {
		b, _ := proto.Marshal(m)
		encoded = append(encoded, b)
	}
	return func(r *rude, stream uint32) error {
		for i, b := range encoded {
			if err := r.message(stream, end && i == len(encoded)-1, b); err != nil {
				return err
			}
		}
		return nil
	}
}

// lacksByte has each call send a message but for its last byte, in frames of so many bytes.
func lacksByte(length, frame int) func(*rude, uint32) error {
	return func(r *rude, stream uint32) error {
		b := binary.BigEndian.AppendUint32([]byte{0}, uint32(length))
		return r.raw(stream, false, append(b, make([]byte, length-1)...), frame)
	}
}

// unreadPipelines begins so many Pipelines on a connection, and sends on each a first request and
// then some more, for as long as the node takes them. It reads no answer.
func unreadPipelines(many int, first, next *kvpb.PipelineRequest) func(context.Context, string, func()) {
	return func(ctx context.Context, address string, begun func()) {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		var sent atomic.Int64
		var sending sync.WaitGroup
		for range many {
			s, err := kvpb.NewKVServiceClient(conn).Pipeline(ctx)
			if err != nil {
				break
			}
			sending.Go(func() {
				err := s.Send(first)
				for i := 0; i < 20 && err == nil; i++ {
					sent.Add(1)
					err = s.Send(next)
				}
			})
		}
		for before := int64(-1); before < sent.Load() && ctx.Err() == nil; {
			before = sent.Load()
			sleep(ctx, 200*time.Millisecond)
		}
		begun()
		<-ctx.Done()
		sending.Wait()
	}
}

func pipelineOf(n int, o *kvpb.Operation) *kvpb.PipelineRequest {
	return &kvpb.PipelineRequest{Operations: slices.Repeat([]*kvpb.Operation{o}, n)}
}

const (
	addLearnerMethod = kvpb.ClusterService_AddLearner_FullMethodName
	pipelineMethod   = kvpb.KVService_Pipeline_FullMethodName
	reflectionMethod = reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName
	healthMethod     = grpc_health_v1.Health_Watch_FullMethodName
	scanMethod       = kvpb.KVService_Scan_FullMethodName
	watchMethod      = kvpb.KVService_Watch_FullMethodName
)

// floods are abuses that were seen to take gigabytes.
var floods = []abuse{
	{"AddLearners with a long address", 1, calls(64, addLearnerMethod, messages(true,
		&kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 9, Address: strings.Repeat("x", 4<<20-64)}}))},
	{"Sets that lack a byte", 1, calls(800, setMethod, lacksByte(windowBytes-100, 16<<10))},
	{"Sets that lack a byte, on 25 connections", 25, calls(32, setMethod, lacksByte(windowBytes-100, 16<<10))},
	{"Sets that lack a byte, on 100 connections", 100, calls(32, setMethod, lacksByte(windowBytes-100, 16<<10))},
	{"Sets in frames of a byte that lack one", 1, calls(40, setMethod, lacksByte(32<<10, 1))},
	{"Pipelines of empty operations that nobody reads", 1, calls(300, pipelineMethod, messages(false,
		pipelineOf(3, getOp("large", true)), pipelineOf(8187, &kvpb.Operation{}), pipelineOf(8187, &kvpb.Operation{})))},
	{"Pipelines of Sets that nobody reads", 1, unreadPipelines(150,
		pipelineOf(3, getOp("large", true)), pipelineOf(8, setOp("k", strings.Repeat("v", 120<<10))))},
	{"Pipelines of Gets that nobody reads", 1, calls(100, pipelineMethod, messages(false, slices.Concat(
		[]proto.Message{pipelineOf(3, getOp("large", true))},
		slices.Repeat([]proto.Message{pipelineOf(15, getOp(strings.Repeat("k", maxKeyBytes), true))}, 4))...))},
	{"large reflection requests", 1, calls(100, reflectionMethod, messages(false, reflectionOf(4<<20-64)))},
	{"reflection that nobody reads", 4, calls(500, reflectionMethod, messages(false, slices.Repeat(
		[]proto.Message{reflectionOf(maxOtherBytes - 64)}, 20)...))},
	{"idle Pipelines", 20, calls(1000, pipelineMethod, messages(false))},
	{"small answers that nobody reads", 60, callsOver(dialDeaf, 1000, getMethod, messages(true,
		&kvpb.GetRequest{Key: "small", Local: true}))},
	{"small answers without a window", 60, callsOver(dialShut, 1000, getMethod, messages(true,
		&kvpb.GetRequest{Key: "small", Local: true}))},
	{"errors that nobody reads", 60, callsOver(dialDeaf, 1000, getMethod, messages(true, &kvpb.GetRequest{Local: true}))},
	{"idle Pipelines with large headers", 20, calls(1000, pipelineMethod, messages(false), "x-large", strings.Repeat("x", maxHeaderBytes-1<<10))},
	{"idle Watches of health", 20, calls(1000, healthMethod, messages(true, &grpc_health_v1.HealthCheckRequest{}))},
	{"Scans that nobody reads", 4, callsOver(dialShut, 100, scanMethod, messages(true, &kvpb.ScanRequest{}))},
	{"Watches that nobody reads", 20, callsOver(dialShut, 600, watchMethod, messages(true, &kvpb.WatchRequest{}))},
	{watchesOfAllKeys, 20, calls(600, watchMethod, messages(true, &kvpb.WatchRequest{}))},
}

func reflectionOf(bytes int) proto.Message {
	return &reflectionpb.ServerReflectionRequest{
		Host:           strings.Repeat("x", bytes),
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "raftkv.v1.KVService"},
	}
}

// sampleMemory returns a function that says how much more memory a process has had since, at
// most, than when this was called.
func sampleMemory(p *process) (most func() int) {
	idle := p.rss()
	stop := make(chan struct{})
	sampled := make(chan int)
	go func() { // ends when most is called
		most := 0
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			most = max(most, p.rss()-idle)
			select {
			case <-tick.C:
			case <-stop:
				sampled <- most
				return
			}
		}
	}()
	return func() int {
		close(stop)
		return <-sampled
	}
}

// TestMemory: whatever clients do, a node takes no more than maxAbuse over what it takes
// idle, and serves another client meanwhile.
func TestMemory(t *testing.T) {
	t.Parallel()
	for _, a := range slices.Concat(abuses, floods) {
		t.Run(a.name, func(t *testing.T) {
			p := &process{id: 1, address: "127.0.0.1:0", args: []string{"--log-bytes", "1048576", "--watch-bytes", "4194304"}} // neither log nor history is abuse
			formCluster(t, []*process{p})
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute+*soak)
			defer cancel()
			for key, bytes := range map[string]int{"large": maxValueBytes, "small": uncountedAnswer - 64} {
				if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: key, Value: make([]byte, bytes)}); err != nil {
					t.Fatal(err)
				}
			}
			most := sampleMemory(p)
			ready, stop := a.begin(p.address)
			calls := 0
			isReady := false
			for start := time.Now(); !isReady || calls < 10 || time.Since(start) < *soak/15; {
				select {
				case <-ready:
					isReady = true
				default:
				}
				_, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "k"})
				if reasonOf(err) == "OVERLOADED" { // for a moment, all calls run that may: the next one may find a place
					continue
				}
				if err != nil {
					t.Errorf("a call of another fails: %v", err)
					break
				}
				calls++
			}
			more := most()
			stop()
			limit := maxAbuse
			if a.name == watchesOfAllKeys {
				limit = maxWatchers * watchMemory
			}
			limit *= raceStep(16) // the race detector has memory of its own
			if more > limit {
				t.Errorf("%d MiB, the limit is %d", more>>20, limit>>20)
			}
			t.Logf("%d MiB, %d calls of another meanwhile", more>>20, calls)
		})
	}
}
