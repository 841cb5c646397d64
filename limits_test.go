// Tests of connections.go and answers.go. Clients that misbehave: what they cost a node in memory, and other
// clients in time.

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// rude is an HTTP/2 connection that does as it likes.
type rude struct {
	net.Conn
	next uint32
}

// Frames of HTTP/2 (RFC 9113, section 6), and their flags.
const (
	frameData, frameHeaders, frameReset, frameSettings, framePing, frameContinuation = 0, 1, 3, 4, 6, 9

	flagEnd, flagAck, flagEndHeaders = 1, 1, 4
)

func (r *rude) frame(kind, flags byte, stream uint32, data []byte) error {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(data))<<8|uint32(kind))
	b = binary.BigEndian.AppendUint32(append(b, flags), stream)
	_, err := r.Write(append(b, data...))
	return err
}

func (r *rude) data(stream uint32, end bool, data []byte) error {
	if end {
		return r.frame(frameData, flagEnd, stream, data)
	}
	return r.frame(frameData, 0, stream, data)
}

func dialRude(address string) (*rude, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	r := &rude{Conn: conn, next: 1}
	_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err == nil {
		err = r.frame(frameSettings, 0, 0, nil)
	}
	for header := make([]byte, 9); err == nil; {
		if _, err = io.ReadFull(conn, header); err == nil {
			_, err = io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(header)>>8))
		}
		if err == nil && header[3] == frameSettings {
			err = r.frame(frameSettings, flagAck, 0, nil)
			break
		}
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	go func() { // ends with the connection
		_, _ = io.Copy(io.Discard, conn)
	}()
	return r, nil
}

// call begins a call: its headers, and the length of its message.
func (r *rude) call(method string, length int, more ...string) (stream uint32, err error) {
	var block []byte // HPACK: literal fields that are not to be remembered (RFC 7541, section 6.2.2)
	text := func(s string) {
		if n := len(s); n < 127 {
			block = append(block, byte(n))
		} else {
			block = binary.AppendUvarint(append(block, 127), uint64(n-127))
		}
		block = append(block, s...)
	}
	fields := append([]string{":method", "POST", ":scheme", "http", ":path", method, ":authority", "x", "content-type", "application/grpc", "te", "trailers"}, more...)
	for i, f := range fields {
		if i%2 == 0 {
			block = append(block, 0)
		}
		text(f)
	}
	stream, r.next = r.next, r.next+2
	for kind := byte(frameHeaders); (kind == frameHeaders || len(block) > 0) && err == nil; kind = frameContinuation {
		part := block[:min(len(block), 16<<10)]
		block = block[len(part):]
		flags := byte(0)
		if len(block) == 0 {
			flags = flagEndHeaders
		}
		err = r.frame(kind, flags, stream, part)
	}
	if err == nil && length >= 0 {
		err = r.data(stream, false, binary.BigEndian.AppendUint32([]byte{0}, uint32(length)))
	}
	return stream, err
}

// abuse is something that many do at once until ctx ends. Each calls begun once
// it has done the worst of it.
type abuse struct {
	name string
	many int
	f    func(ctx context.Context, address string, begun func())
}

const setMethod, getMethod = "/raftkv.v1.KVService/Set", "/raftkv.v1.KVService/Get"

// neverEnding begins calls, each with some chunks of 16 KiB of its message.
func neverEnding(calls, length, chunks int) func(context.Context, string, func()) {
	return func(ctx context.Context, address string, begun func()) {
		r, err := dialRude(address)
		if err != nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = r.Close() })
		defer func() { stop(); _ = r.Close() }()
		chunk := make([]byte, 16<<10)
		for range calls {
			s, err := r.call(setMethod, length)
			for i := 0; i < chunks && err == nil; i++ {
				err = r.data(s, false, chunk)
			}
			if err != nil {
				break
			}
		}
		begun()
		<-ctx.Done()
	}
}

// unreadCalls begins calls and opens no window for their answers.
func unreadCalls(method string, m proto.Message) func(context.Context, string, func()) {
	return func(ctx context.Context, address string, begun func()) {
		r, err := dialRude(address)
		if err != nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = r.Close() })
		defer func() { stop(); _ = r.Close() }()
		req, _ := proto.Marshal(m)
		for range 125 {
			s, err := r.call(method, len(req))
			if err == nil {
				err = r.data(s, true, req)
			}
			if err != nil {
				break
			}
		}
		begun()
		<-ctx.Done()
	}
}

var abuses = []abuse{
	{"silent connections", 1500, func(ctx context.Context, address string, begun func()) {
		if conn, err := net.Dial("tcp", address); err == nil {
			begun()
			<-ctx.Done()
			_ = conn.Close()
		}
	}},
	{"connections without calls", 1500, func(ctx context.Context, address string, begun func()) {
		if r, err := dialRude(address); err == nil {
			begun()
			<-ctx.Done()
			_ = r.Close()
		}
	}},
	{"requests that never end", 4, neverEnding(500, 1<<20, 3)},                 // within a window of 64 KiB
	{"large requests that never end", 4, neverEnding(5, maxMessageBytes, 250)}, // nearly all of it
	{"answers that nobody reads", 16, unreadCalls(getMethod, &kvpb.GetRequest{Key: "large"})},
	{"pipelines that nobody reads", 8, unreadCalls(kvpb.KVService_Pipeline_FullMethodName, &kvpb.PipelineRequest{Operations: []*kvpb.Operation{getOp("large", true), getOp("large", true)}})},
	{"huge headers", 4, func(ctx context.Context, address string, begun func()) {
		huge := strings.Repeat("x", 1<<20)
		for ctx.Err() == nil {
			r, err := dialRude(address)
			if err != nil {
				sleep(ctx, 50*time.Millisecond)
				continue
			}
			stop := context.AfterFunc(ctx, func() { _ = r.Close() })
			_, _ = r.call(getMethod, -1, "x-huge", huge)
			stop()
			_ = r.Close()
			begun()
			sleep(ctx, 50*time.Millisecond)
		}
	}},
	{"pings and resets", 4, func(ctx context.Context, address string, begun func()) {
		for ctx.Err() == nil {
			r, err := dialRude(address)
			if err != nil {
				sleep(ctx, 50*time.Millisecond)
				continue
			}
			stop := context.AfterFunc(ctx, func() { _ = r.Close() })
			for range 100 {
				s, err := r.call(setMethod, 100)
				if err == nil {
					err = r.frame(frameReset, 0, s, []byte{0, 0, 0, 8}) // CANCEL
				}
				if err == nil {
					err = r.frame(framePing, 0, 0, make([]byte, 8))
				}
				if err != nil {
					break
				}
			}
			stop()
			_ = r.Close()
			begun()
			sleep(ctx, 50*time.Millisecond)
		}
	}},
	{"messages over the limit", 4, func(ctx context.Context, address string, begun func()) {
		r, err := dialRude(address)
		if err != nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = r.Close() })
		defer func() { stop(); _ = r.Close() }()
		chunk := make([]byte, 16<<10)
		for ctx.Err() == nil && err == nil {
			var s uint32
			if s, err = r.call(setMethod, 1<<30); err == nil {
				err = r.data(s, false, chunk)
			}
			begun()
			sleep(ctx, time.Millisecond)
		}
		<-ctx.Done()
	}},
	{"hellos", 4, func(ctx context.Context, address string, begun func()) {
		for ctx.Err() == nil {
			r, err := dialRude(address)
			if err != nil {
				sleep(ctx, 50*time.Millisecond)
				continue
			}
			stop := context.AfterFunc(ctx, func() { _ = r.Close() })
			for i := 0; i < 200 && err == nil; i++ {
				id := rand.Uint64()
				req, _ := proto.Marshal(&kvpb.StreamRequest{Hello: &kvpb.Hello{From: &kvpb.Peer{Node: &kvpb.Node{Id: id, Address: "127.0.0.1:1"}, RaftId: id, Life: id}, To: &kvpb.Peer{}}})
				var s uint32
				if s, err = r.call(kvpb.RaftService_Stream_FullMethodName, len(req)); err == nil {
					err = r.data(s, false, req) // and the stream stays open
				}
			}
			stop()
			_ = r.Close()
			begun()
			sleep(ctx, 50*time.Millisecond)
		}
	}},
	{"a byte a second", 200, func(ctx context.Context, address string, begun func()) {
		r, err := dialRude(address)
		if err != nil {
			return
		}
		s, err := r.call(setMethod, 100)
		for i := 0; i < 90 && ctx.Err() == nil && err == nil; i++ {
			err = r.data(s, false, []byte{0})
			begun()
			sleep(ctx, time.Second)
		}
		_ = r.Close()
	}},
}

// begin has many do it. ready is closed when all have begun.
func (a abuse) begin(address string) (ready <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var begun, ended sync.WaitGroup
	for range a.many {
		begun.Add(1)
		ended.Go(func() {
			once := sync.OnceFunc(begun.Done)
			defer once()
			a.f(ctx, address, once)
		})
	}
	all := make(chan struct{})
	go func() { begun.Wait(); close(all) }()
	return all, func() { cancel(); ended.Wait() }
}

// maxAbuse is what any of them may cost a node in memory.
const maxAbuse = 256 << 20

func TestAbuse(t *testing.T) {
	t.Parallel()
	for _, a := range abuses {
		t.Run(a.name, func(t *testing.T) {
			p := startProcesses(t, 1)[0]
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute+*soak)
			defer cancel()
			if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "large", Value: make([]byte, maxValueBytes)}); err != nil {
				t.Fatal(err)
			}
			idle, most, calls := p.rss(), 0, 0
			ready, stop := a.begin(p.address)
			for start, done := time.Now(), false; !done || time.Since(start) < *soak/15; calls++ {
				if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "k"}); err != nil {
					t.Errorf("a call of another fails: %v", err)
					break
				}
				most = max(most, p.rss()-idle)
				select {
				case <-ready:
					done = true
				default:
				}
			}
			stop()
			limit := maxAbuse * raceStep(8) // the race detector has memory of its own
			if most > limit {
				t.Errorf("%d MiB, the limit is %d", most>>20, limit>>20)
			}
			t.Logf("%d MiB, %d calls of another meanwhile", most>>20, calls)
		})
	}
}

// wide are as many places as a node can have.
var wide = places{clients: maxConnections, peers: maxPeers}

// TestConnectionLimits: clients get their places; what is beyond them gets those
// kept for peers, and yields to whoever comes later, unless a peer is heard there.
func TestConnectionLimits(t *testing.T) {
	p := places{clients: 3, peers: 2}
	kept := p.peers * peerConnections
	l := newLimiter(&refusing{left: 1 << 10}, p, nil, quiet())
	accept := func() *limitedConn {
		t.Helper()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return conn.(*limitedConn)
	}
	isOpen := func(c *limitedConn) bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.conns[c]
	}
	call := func(c *limitedConn, method string) error {
		ctx := grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: c.RemoteAddr()})
		return inPlace(ctx, method)
	}
	var clients, more []*limitedConn
	for range p.clients {
		clients = append(clients, accept())
	}
	for range kept {
		more = append(more, accept())
	}
	if err := call(clients[0], getMethod); err != nil {
		t.Errorf("a client that has a place: %v", err)
	}
	wantError(t, call(more[0], getMethod), codes.ResourceExhausted, "OVERLOADED")
	if err := call(more[0], kvpb.RaftService_Stream_FullMethodName); err != nil {
		t.Errorf("a peer in a place for peers: %v", err)
	}

	done := more[0].usePeerPlace()
	last := accept()
	if !isOpen(more[0]) || isOpen(more[1]) || !isOpen(more[2]) || !isOpen(last) {
		t.Error("it is not the oldest one without a peer that has yielded")
	}
	for range 2 * kept {
		accept()
	}
	if !isOpen(more[0]) || !isOpen(clients[0]) {
		t.Error("a connection that a peer is heard on, or a client's, has yielded")
	}
	done()
	for range kept {
		last = accept()
	}
	if isOpen(more[0]) {
		t.Error("a connection on which no peer is heard any more has not yielded")
	}

	peer := clients[1]
	peer.usePeerPlace()
	if err := call(last, getMethod); err != nil || len(l.kept) != kept-1 {
		t.Errorf("a peer has a place of its own now, and its former one is not a client's: %v, %d are kept", err, len(l.kept))
	}
	_ = clients[0].Close()
	if c := accept(); call(c, getMethod) != nil {
		t.Error("there is room for one")
	}
	for heard := 0; ; heard++ {
		conn, err := l.Accept()
		if err != nil { // all that the listener had left were closed
			break
		}
		if heard > p.clients+kept {
			t.Fatal("a connection on which a peer is heard yields")
		}
		conn.(*limitedConn).usePeerPlace()
	}
	if len(l.conns) != p.clients+kept {
		t.Errorf("%d connections are open", len(l.conns))
	}
	for c := range l.conns {
		_ = c.Close()
	}
	if len(l.conns)+len(l.kept) > 0 {
		t.Errorf("%d connections are open, %d in places for peers", len(l.conns), len(l.kept))
	}

	c := &limitedConn{l: l, hellos: maxHellos, greetedAt: time.Now()}
	for range maxHellos {
		if !c.greeted() {
			t.Error("a hello within the limit is refused")
		}
	}
	c.greetedAt = time.Now().Add(time.Hour) // however slow this test is
	if c.greeted() {
		t.Error("a hello beyond the limit is taken")
	}
}

// TestPlaces: what a process may have open is enough for all that it may open.
func TestPlaces(t *testing.T) {
	if _, err := placesOf(leastFiles-1, false); err == nil {
		t.Error("a node starts with too few files")
	}
	for _, files := range []uint64{leastFiles, 256, 1024, 4096, 20_000, 1 << 20, math.MaxUint64} {
		p, err := placesOf(files, false)
		if err != nil {
			t.Fatal(err)
		}
		if uint64(nodeFiles+p.clients+p.peers*peerFiles) > files || p.clients < 16 || p.peers < 4 {
			t.Errorf("with %d files: %+v", files, p)
		}
		if files >= 1024 && p.peers != maxPeers || files >= 1<<20 && p.clients != maxConnections {
			t.Errorf("with %d files, not for all: %+v", files, p)
		}
	}
}

// TestAcceptFails: a node outlives errors of accept, such as too many open files, and
// says so once.
func TestAcceptFails(t *testing.T) {
	var log strings.Builder
	failing := &refusing{left: -1, fail: 3}
	l := newLimiter(failing, wide, nil, slog.New(slog.NewTextHandler(&log, nil)))
	server := grpc.NewServer()
	if err := server.Serve(l); !errors.Is(err, net.ErrClosed) || failing.fail != 0 {
		t.Errorf("%v, %d errors are left", err, failing.fail)
	}
	server.Stop()
	if strings.Count(log.String(), "\n") != 1 {
		t.Errorf("%s", &log)
	}
	wantPart(t, log.String(), syscall.ENOBUFS.Error())
}

// limited is how a process is started that may have so many files open.
func limited(files int) []string {
	return []string{"sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, files)}
}

// idleConnections holds open as many connections as it can of n, until stop. One that
// the node closes is made anew, as clients do.
func idleConnections(t *testing.T, address string, n int) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var tried, ended sync.WaitGroup
	for range n {
		tried.Add(1)
		ended.Go(func() {
			once := sync.OnceFunc(tried.Done)
			for ctx.Err() == nil {
				r, err := dialRude(address)
				once()
				if err == nil {
					end := context.AfterFunc(ctx, func() { _ = r.Close() })
					_, _ = io.Copy(io.Discard, r)
					end()
					_ = r.Close()
				}
				sleep(ctx, time.Second)
			}
		})
	}
	tried.Wait()
	return func() { cancel(); ended.Wait() }
}

// TestConnectionsLeaveFiles: however many connections clients open, a durable node
// can open the next file of its log.
func TestConnectionsLeaveFiles(t *testing.T) {
	t.Parallel()
	p := &process{
		id: 1, address: "127.0.0.1:0", within: limited(256),
		args: []string{"--data-dir", filepath.Join(t.TempDir(), "d"), "--log-bytes", "1048576"},
	}
	formCluster(t, []*process{p})
	defer idleConnections(t, p.address, 400)()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for i := range 100 {
		if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: fmt.Sprint(i), Value: make([]byte, 100<<10)}); err != nil {
			text, _ := os.ReadFile(p.log)
			t.Fatalf("write %d: %v\n%s", i, err, text)
		}
	}
	text, _ := os.ReadFile(p.log)
	room, _ := placesOf(256, false)
	wantPart(t, string(text), fmt.Sprintf("connections=%d peers=%d files=256", room.clients, room.peers))
	wantPart(t, string(text), "clients have all connections")
}

// TestConnectionsLeavePeers: however many connections clients open to a node, its
// peers get theirs, and clients beyond the limit are told.
func TestConnectionsLeavePeers(t *testing.T) {
	t.Parallel()
	var ps []*process
	for i := range 3 {
		ps = append(ps, &process{id: uint64(i + 1), address: "127.0.0.1:0", within: limited(256)})
	}
	formCluster(t, ps)
	leader := leaderOf(t, ps)
	rest := slices.DeleteFunc(slices.Clone(ps), func(p *process) bool { return p == leader })
	victim, back := rest[0], rest[1]
	defer idleConnections(t, victim.address, 400)()
	conn := dial(victim.address, nil)
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	eventually(t, func() error {
		_, err := kvpb.NewKVServiceClient(conn).Get(ctx, &kvpb.GetRequest{Key: "k"}, grpc.WaitForReady(true))
		if reasonOf(err) != "OVERLOADED" {
			return fmt.Errorf("a client beyond the limit: %v", err)
		}
		return nil
	})
	back.signal(syscall.SIGKILL)
	back.start()
	awaitHealthy(t, ps, 20*time.Second)
	leader.signal(syscall.SIGKILL)
	if _, err := back.kv.Set(ctx, &kvpb.SetRequest{Key: "k"}); err != nil { // these two are a majority
		t.Error(err)
	}
}

// TestTooFewFiles: a node that may have too few files open does not start, and says
// how many it needs.
func TestTooFewFiles(t *testing.T) {
	o := defaultOptions()
	o.id, o.addr, o.files = 1, "127.0.0.1:0", 64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := run(ctx, o, quiet(), func(*server) {
		t.Error("it is ready")
		cancel()
	})
	for _, part := range []string{"64 files", "ulimit -n", fmt.Sprint(leastFiles)} {
		wantPart(t, fmt.Sprint(err), part)
	}
}

// TestFewFiles: with a low limit of files, fewer strangers are answered, and each thing
// that takes a file or a connection has its bound.
func TestFewFiles(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, func(o *options) { o.files = leastFiles })
	n := c.nodes[1]
	nw := n.server.net
	first := newImpostor(t, n)
	h := proto.CloneOf(first.hello)
	for range nw.maxPeers {
		h.From.RaftId++
		peer, hangUp := callAsPeer(n)
		defer hangUp()
		s, err := peer.Stream(t.Context())
		if err == nil {
			err = s.Send(&kvpb.StreamRequest{Hello: h})
		}
		if err == nil {
			_, err = s.Recv()
		}
		isLast := h.From.RaftId == first.hello.From.RaftId+uint64(nw.maxPeers)
		if isLast != (status.Code(err) == codes.ResourceExhausted) {
			t.Errorf("peer %d, with files for %d: %v", h.From.RaftId, nw.maxPeers, err)
		}
	}

	for range cap(nw.snapshotPlaces) {
		nw.snapshotPlaces <- struct{}{}
	}
	if err := first.send(first.snapshot(t, 10, 1<<20), true); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("more snapshots than there are files for: %v", err)
	}
	<-nw.snapshotPlaces
	if err := first.send(first.snapshot(t, 10, 1<<20), true); err != nil {
		t.Errorf("there is room for one: %v", err)
	}
	if len(nw.snapshotPlaces) != cap(nw.snapshotPlaces)-1 {
		t.Error("a snapshot that was received keeps its place")
	}

	for range maxAsking {
		nw.callPlaces <- struct{}{}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := nw.probe(ctx, &kvpb.Node{Id: n.id, Address: n.address})
	wantError(t, err, codes.ResourceExhausted, "OVERLOADED")
	err = n.server.forward(ctx, n.server.n.self, kvpb.ClusterService_TransferLeader_FullMethodName, &kvpb.TransferLeaderRequest{}, &kvpb.TransferLeaderResponse{})
	wantError(t, err, codes.ResourceExhausted, "OVERLOADED")
	<-nw.callPlaces
	if _, err := nw.probe(t.Context(), &kvpb.Node{Id: n.id, Address: n.address}); err != nil || len(nw.callPlaces) != maxAsking-1 {
		t.Errorf("there is room for one: %v, %d are taken", err, len(nw.callPlaces))
	}
}

// TestPeersAreKept: a connection on which a peer is heard, or a snapshot received, does
// not yield to others.
func TestPeersAreKept(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, func(o *options) { o.files = leastFiles })
	n := c.nodes[1]
	room, err := placesOf(leastFiles, false)
	if err != nil {
		t.Fatal(err)
	}
	crowd := func(connections int) {
		for range connections {
			r, err := dialRude(n.address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = r.Close() })
		}
	}
	crowd(room.clients)
	i := newImpostor(t, n) // its snapshot is one of a peer that is heard
	ctx, cancel := context.WithTimeout(t.Context(), rpcTimeout)
	defer cancel()
	peer, hangUp := callAsPeer(n)
	defer hangUp()
	s, err := peer.Stream(ctx)
	h := proto.CloneOf(i.hello)
	h.From.RaftId++
	if err == nil {
		err = s.Send(&kvpb.StreamRequest{Hello: h})
	}
	if err == nil {
		_, err = s.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	another, hangUp := callAsPeer(n)
	defer hangUp()
	snapshot, err := another.InstallSnapshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	reqs := i.snapshot(t, 10, 1<<20)
	if err := snapshot.Send(reqs[0]); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if len(n.server.net.snapshotPlaces) == 0 {
			return errors.New("the snapshot has not begun")
		}
		return nil
	})
	crowd(3 * room.peers * peerConnections)
	if err = s.CloseSend(); err == nil {
		_, err = s.Recv()
	}
	if err != io.EOF {
		t.Errorf("the stream: %v", err)
	}
	for _, req := range reqs[1:] {
		_ = snapshot.Send(req) // the answer says why
	}
	if _, err := snapshot.CloseAndRecv(); err != nil {
		t.Errorf("the snapshot: %v", err)
	}
}

// TestUnread has a connection and others, none of which is read, ask for answers.
func TestUnread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(&refusing{left: 100}, wide, nil, quiet())
		made := map[*limitedConn]*atomic.Int32{}
		accept := func() (*limitedConn, context.Context) {
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			made[c.(*limitedConn)] = new(atomic.Int32)
			return c.(*limitedConn), grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: c.RemoteAddr()})
		}
		ask := func(c *limitedConn, ctx context.Context) mem.BufferPool {
			_, pool, err := admit(ctx, func() (any, int, error) { made[c].Add(1); return nil, 1 << 20, nil })
			if err != nil {
				t.Error(err)
			}
			return pool
		}
		waits := func(ctx context.Context) bool {
			ctx, cancel := context.WithTimeout(ctx, 3*stallTimeout)
			defer cancel()
			_, _, err := admit(ctx, func() (any, int, error) { return nil, 1 << 20, nil })
			return err == context.DeadlineExceeded
		}
		c, ctx := accept()
		var pools []mem.BufferPool
		for range maxConnectionUnread >> 20 {
			pools = append(pools, ask(c, ctx))
		}
		if !waits(ctx) {
			t.Fatal("there is no limit to what a connection leaves unread")
		}
		var mu sync.Mutex
		count := func() int {
			mu.Lock()
			defer mu.Unlock()
			return len(pools)
		}
		for range 2 {
			go func() {
				pool := ask(c, ctx)
				mu.Lock()
				defer mu.Unlock()
				pools = append(pools, pool)
			}()
		}
		synctest.Wait()
		made[c].Store(0)
		pools[0].Put(new([]byte)) // written, or its call was cancelled
		synctest.Wait()
		if made[c].Load() != 1 || count() != maxConnectionUnread>>20+1 {
			t.Errorf("an answer was written: %d were made instead", made[c].Load())
		}
		pools[1] = nil // lost
		for count() < maxConnectionUnread>>20+2 {
			runtime.GC()
			time.Sleep(stallTimeout)
		}
		if l.unread != maxConnectionUnread || made[c].Load() != 2 {
			t.Errorf("%d bytes are unread, and %d answers were made instead of two", l.unread, made[c].Load())
		}
		for len(l.conns)*maxConnectionUnread < maxUnreadBytes {
			o, ctx := accept()
			for range maxConnectionUnread >> 20 {
				ask(o, ctx)
			}
		}
		last, ctx := accept()
		start := time.Now()
		busy := make(chan struct{})
		go func() { // c is slow, but reads
			defer close(busy)
			for time.Since(start) < 3*stallTimeout {
				c.written.Add(minTaken)
				time.Sleep(stallTimeout / 2)
			}
		}()
		ask(last, ctx)
		if len(l.conns) != 2 || !l.conns[c] || time.Since(start) > 3*stallTimeout {
			t.Errorf("of those that take no answer, or do, %d are open", len(l.conns))
		}
		<-busy
		_, _ = c.Close(), last.Close()
		if l.unread != 0 {
			t.Errorf("%d bytes of nobody are unread", l.unread)
		}
		if _, _, err := admit(ctx, func() (any, int, error) { return nil, 1 << 20, nil }); err != errOverloaded {
			t.Errorf("an answer on a connection that is closed: %v", err)
		}
	})
}

// TestUnreadIsGivenBack: neither small answers, which gRPC does not give back,
// nor those that were taken at once count, and a buffer is as large as its answer.
func TestUnreadIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(&refusing{left: 1000}, wide, nil, quiet())
		conns, ctxs := make([]*limitedConn, 500), make([]context.Context, 500)
		for i := range conns {
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			conns[i], ctxs[i] = c.(*limitedConn), grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: c.RemoteAddr()})
		}
		resp, err := encodeAdmitted(ctxs[0], func() (any, error) { return &kvpb.GetResponse{Value: make([]byte, 33<<10)}, nil })
		if err != nil {
			t.Fatal(err)
		}
		w := resp.(*encoded)
		if cap(w.b) > 40<<10 {
			t.Errorf("an answer of 33 KiB has a buffer of %d", cap(w.b))
		}
		w.pool.Put(&w.b)
		take := func(bytes int) func() (any, int, error) {
			return func() (any, int, error) { return nil, bytes, nil }
		}
		_, pool, err := admit(ctxs[0], take(1<<20))
		if err != nil {
			t.Fatal(err)
		}
		if pool.(*answerPool).fit(1000); l.unread != 0 {
			t.Errorf("an answer of 1,000 bytes counts as %d", l.unread)
		}
		for range 3 { // bursts, all taken after 10 ms
			var pools []mem.BufferPool
			for _, ctx := range ctxs {
				ctx, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
				if _, pool, err := admit(ctx, take(50<<10)); err == nil {
					pools = append(pools, pool)
				}
				cancel()
			}
			for _, p := range pools {
				p.Put(new([]byte))
			}
			time.Sleep(stallTimeout * 3 / 2)
		}
		if len(l.conns) != len(conns) {
			t.Errorf("%d connections of %d that took all were closed", len(conns)-len(l.conns), len(conns))
		}
		for _, c := range conns {
			_ = c.Close()
		}
	})
}

// refusing is a listener that has so many connections left, and one to refuse. First
// it fails so many times.
type refusing struct {
	net.Listener
	left, fail int
}

func (r *refusing) Addr() net.Addr { return &net.TCPAddr{} }

func (r *refusing) Close() error { return nil }

func (r *refusing) Accept() (net.Conn, error) {
	if r.fail > 0 {
		r.fail--
		return nil, os.NewSyscallError("accept", syscall.ENOBUFS) // gRPC does not know it as temporary
	}
	if r.left--; r.left < -1 {
		return nil, net.ErrClosed
	}
	conn, _ := net.Pipe()
	return conn, nil
}

// BenchmarkAbuse reports the 99th percentile of a well-behaved client's Sets
// with and without each abuse beside it.
func BenchmarkAbuse(b *testing.B) {
	for _, a := range append([]abuse{{name: "none"}}, abuses...) {
		b.Run(a.name, func(b *testing.B) {
			p := startProcesses(b, 1)[0]
			ctx := context.Background()
			if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "large", Value: make([]byte, maxValueBytes)}); err != nil {
				b.Fatal(err)
			}
			p99 := func() time.Duration {
				took := make([]time.Duration, 2000)
				for i := range took {
					start := time.Now()
					if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "k"}); err != nil {
						b.Fatal(err)
					}
					took[i] = time.Since(start)
				}
				slices.Sort(took)
				return took[len(took)*99/100]
			}
			p99() // warms up
			for b.Loop() {
				before := p99()
				var during time.Duration
				if a.f != nil {
					ready, stop := a.begin(p.address)
					<-ready
					during = p99()
					stop()
				} else {
					during = p99()
				}
				b.ReportMetric(float64(before.Microseconds()), "alone-p99-us")
				b.ReportMetric(float64(during.Microseconds()), "abused-p99-us")
				b.ReportMetric(float64(during)/float64(before), "times")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
}

// TestWaitingGetCopiesNothing: a Get that waits for room has no copy of the value,
// or a thousand of them would have a thousand.
func TestWaitingGetCopiesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(&refusing{left: 1}, wide, nil, quiet())
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		ctx := grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: c.RemoteAddr()})
		s := &server{n: turnNode()}
		s.n.store.clusterID = 1
		s.n.store.set([]byte("k"), item{make([]byte, maxValueBytes), 1})
		get := func() error {
			ctx, cancel := context.WithTimeout(ctx, stallTimeout/2)
			defer cancel()
			_, err := s.answer(ctx, &kvpb.GetRequest{Key: "k", Local: true}, func(ctx context.Context, req any) (any, error) {
				return s.Get(ctx, req.(*kvpb.GetRequest))
			})
			return err
		}
		for range maxConnectionUnread / maxValueBytes {
			if err := get(); err != nil {
				t.Fatal(err)
			}
		}
		if n := allocated(func() { err = get() }); err != context.DeadlineExceeded || n > maxValueBytes/2 {
			t.Errorf("it allocates %d bytes and ends with: %v", n, err)
		}
		_ = c.Close()
	})
}

// No more than maxLists Lists run at a time: each keeps what is overwritten.
func TestListsAreBounded(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	s := c.nodes[1].server
	for range maxLists {
		s.lists <- struct{}{}
	}
	ctx, cancel := context.WithTimeout(c.ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := c.nodes[1].List(ctx, &kvpb.ListRequest{}); err == nil {
		t.Error("one more runs")
	}
	<-s.lists
	if _, err := c.nodes[1].List(c.ctx, &kvpb.ListRequest{}); err != nil {
		t.Error(err)
	}
}
