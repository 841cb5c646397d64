// Tests of connections.go, and clients that misbehave.

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
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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
	frameData, frameHeaders, frameReset, frameSettings, framePing, frameGoAway, frameWindow, frameContinuation = 0, 1, 3, 4, 6, 7, 8, 9

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
	if noPlace := l.load().noPlace; noPlace != 1 {
		t.Errorf("%d connections had no place", noPlace)
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
	if _, err := placesOf(leastFiles-1, false, false); err == nil {
		t.Error("a node starts with too few files")
	}
	for _, files := range []uint64{leastFiles, 256, 1024, 4096, 20_000, 1 << 20, math.MaxUint64} {
		p, err := placesOf(files, false, false)
		if err != nil {
			t.Fatal(err)
		}
		web, err := placesOf(files, false, true)
		isEnough := files >= leastFiles+httpFiles
		if isEnough != (err == nil) || uint64(nodeFiles+httpFiles+web.clients+web.peers*peerFiles) > files {
			t.Errorf("with %d files and HTTP: %+v, %v", files, web, err)
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
	room, _ := placesOf(256, false, false)
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
	awaitHealthy(t, ps, 2*pollDeadline)
	leader.signal(syscall.SIGKILL)
	eventually(t, func() error { // these two are a majority
		_, err := back.kv.Set(ctx, &kvpb.SetRequest{Key: "k"})
		return err
	})
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
	room, err := placesOf(leastFiles, false, false)
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
