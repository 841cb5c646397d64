// Tests of snapshots on their way: sent, received, cut off, and what they cost. How they
// are written and read is tested in store_test.go, how they are saved in disk_test.go.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

func TestSnapshots(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4, func(o *options) { o.logBytes = 64 << 10 })
	c.init(1, 2, 3)
	c.fill(1, 24)

	// A node that was cut off for so long that the log does not reach back to
	// what it has.
	leader := c.settled(1, 2, 3)
	behind, other := 1+leader%3, 1+(leader+1)%3
	c.cut(behind)
	c.fill(leader, 24)
	last, err := c.metrics(behind)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		m, err := c.metrics(leader)
		if err == nil && m.FirstIndex <= last.LastIndex+1 {
			err = fmt.Errorf("the log starts at %d, node %d has entry %d", m.FirstIndex, behind, last.LastIndex)
		}
		return err
	})
	c.heal()
	c.settled(1, 2, 3)
	c.wants(behind, false, "large 23", strings.Repeat("x", 64<<10), 48)
	c.sameStates(1, 2, 3)
	if m, err := c.metrics(behind); err != nil || m.SnapshotsInstalled <= last.SnapshotsInstalled {
		t.Errorf("node %d has caught up without a snapshot: %v, %v", behind, m, err)
	}

	// A new node, while writes go on, which it gets from the log.
	h := newHistory()
	stop := c.load(h, rpcTimeout, false, 1, 2, 3)
	defer stop()
	c.addLearner(1, 4)
	h.floor(t, 20)
	stop()
	c.sameStates(1, 2, 3, 4)
	before, err := c.metrics(4)
	if err != nil || before.SnapshotsInstalled == 0 {
		t.Fatalf("node 4 has caught up without a snapshot: %v, %v", before, err)
	}
	for range 20 {
		c.set(1, "small", "v")
	}
	c.sameStates(1, 2, 3, 4)
	if m, err := c.metrics(4); err != nil || m.SnapshotsInstalled != before.SnapshotsInstalled || m.EntriesApplied <= before.EntriesApplied {
		t.Errorf("node 4 has not followed the log: %v, %v", m, err)
	}

	// One that comes back with nothing.
	c.restart(other)
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
	h.check(t)
	c.sameStates(1, 2, 3, 4)
	var sent uint64
	for id := range c.nodes {
		m, err := c.metrics(id)
		if err != nil {
			t.Fatal(err)
		}
		sent += m.SnapshotsSent
	}
	if sent < 2 {
		t.Errorf("the nodes count %d snapshots", sent)
	}
}

// impostor plays a leader that a node hears and whose cluster it is to join.
type impostor struct {
	n     *testNode
	hello *kvpb.Hello
}

func newImpostor(t *testing.T, n *testNode) *impostor {
	t.Helper()
	h, err := stranger(n)
	if err != nil {
		t.Fatal(err)
	}
	h.ClusterId = 4711
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	peer, hangUp := callAsPeer(n)
	t.Cleanup(hangUp)
	s, err := peer.Stream(ctx)
	if err == nil {
		err = s.Send(&kvpb.StreamRequest{Hello: h})
	}
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := s.Recv(); err != nil || resp.GetWelcome().GetVerdict() != kvpb.Verdict_VERDICT_ACCEPTED {
		t.Fatalf("%v, %v", resp, err)
	}
	return &impostor{n, h}
}

// snapshot makes one, and cuts it into the requests that carry it.
func (i *impostor) snapshot(t *testing.T, index uint64, chunk int) []*kvpb.InstallSnapshotRequest {
	t.Helper()
	s := newStore()
	s.clusterID, s.index, s.term, s.version = i.hello.ClusterId, index, 5, index
	s.configure(&raftpb.ConfState{Voters: []uint64{i.hello.From.RaftId}, Learners: []uint64{i.hello.To.RaftId}, AutoLeave: new(false)},
		[]*kvpb.Member{{RaftId: i.hello.From.RaftId, Node: i.hello.From.Node}, {RaftId: i.hello.To.RaftId, Node: i.hello.To.Node}})
	for k := range uint64(8) {
		value := fmt.Sprint(index)
		if k%4 == 0 {
			value = strings.Repeat("x", 1<<20)
		}
		s.tree.set([]byte(fmt.Sprint("key ", k)), item{[]byte(value), k + 1})
	}
	var reqs []*kvpb.InstallSnapshotRequest
	for data := range slices.Chunk(snapshotBytes(t, s), chunk) {
		reqs = append(reqs, &kvpb.InstallSnapshotRequest{Data: data})
	}
	reqs[0].Hello, reqs[0].Term = i.hello, 5
	return reqs
}

// send sends requests. Without an answer it goes away once they are sent, and the node has begun
// to receive them: else it could begin later, and take that for a newer stream than the next one.
func (i *impostor) send(reqs []*kvpb.InstallSnapshotRequest, answer bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
	defer cancel()
	peer, hangUp := callAsPeer(i.n)
	defer hangUp()
	s, err := peer.InstallSnapshot(ctx)
	if err != nil {
		return err
	}
	for _, req := range reqs {
		if err := s.Send(req); err == io.EOF {
			break // the answer says why
		} else if err != nil {
			return err
		}
	}
	if !answer {
		nw := i.n.server.net
		for !nw.receivesSnapshot() && ctx.Err() == nil {
			sleep(ctx, time.Millisecond)
		}
		return errors.New("gone")
	}
	_, err = s.CloseAndRecv()
	return err
}

// state is all of a node's state, in bytes.
func (c *testCluster) state(id uint64) string {
	c.t.Helper()
	h, rest := c.dump(id)
	return h.String() + string(rest)
}

// receivesSnapshot reports whether a node receives a snapshot.
func (nw *network) receivesSnapshot() bool {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	for key := range nw.inbound {
		if key.snapshot {
			return true
		}
	}
	return false
}

// noTransfers waits until a node neither sends nor receives a snapshot.
func (c *testCluster) noTransfers(ids ...uint64) {
	c.t.Helper()
	for _, id := range ids {
		s := c.nodes[id].server
		eventually(c.t, func() error {
			return s.n.do(c.ctx, func() error {
				s.n.store.mu.RLock()
				defer s.n.store.mu.RUnlock()
				receives := s.net.receivesSnapshot()
				if receives || len(s.n.snapshots.views)+len(s.n.store.clientViews) > 0 {
					return fmt.Errorf("node %d sends from %d views, has %d open, receives: %v", id, len(s.n.snapshots.views), len(s.n.store.clientViews), receives)
				}
				return nil
			})
		})
	}
}

type requests = []*kvpb.InstallSnapshotRequest

// saboteur stands between a node and those it dials.
type saboteur struct {
	act  atomic.Pointer[func(c *sabotaged, b []byte) []byte] // in the middle of a snapshot
	hits atomic.Int64
}

// sabotaged is a connection. In the middle of a snapshot is where more than
// half a MiB has been sent.
type sabotaged struct {
	net.Conn
	s     *saboteur
	sent  int
	black bool // what is written goes nowhere
}

func (s *saboteur) join(n *testNode) {
	dial := n.server.net.dialer.connect
	n.server.net.dialer.connect = func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, address)
		if err != nil {
			return nil, err
		}
		return &sabotaged{Conn: conn, s: s}, nil
	}
}

// next says what shall happen to the next snapshot, once.
func (s *saboteur) next(act func(c *sabotaged, b []byte) []byte) {
	s.act.Store(&act)
}

func (c *sabotaged) Write(b []byte) (int, error) {
	n := len(b)
	c.sent += n
	if act := c.s.act.Load(); act != nil && c.sent > 512<<10 && bytes.Contains(b, xs) && c.s.act.CompareAndSwap(act, nil) {
		c.s.hits.Add(1)
		b = (*act)(c, b)
	}
	if c.black {
		return n, nil
	}
	if _, err := c.Conn.Write(b); err != nil {
		return 0, err
	}
	return n, nil
}

// xs is in the middle of a value of fill.
var xs = bytes.Repeat([]byte("x"), 64)

func TestSnapshotTransfer(t *testing.T) {
	t.Parallel()
	t.Run("flaws", func(t *testing.T) {
		c := newCluster(t, 1)
		i := newImpostor(t, c.nodes[1])
		for _, step := range []struct {
			index uint64
			role  kvpb.Role
		}{{100, kvpb.Role_ROLE_UNINITIALIZED}, {200, kvpb.Role_ROLE_LEARNER}} {
			if m, err := c.metrics(1); err != nil || m.Role != step.role {
				t.Fatal(m, err)
			}
			before := c.state(1)
			good := func() requests { return i.snapshot(t, step.index, 300_000) }
			for _, tt := range []struct {
				name   string
				answer bool
				flaw   func(requests) requests
			}{
				{"a bad checksum", true, func(r requests) requests { r[0].Data[8+4]++; return r }},
				{"damage at its end", true, func(r requests) requests { d := r[len(r)-1].Data; d[len(d)-1] ^= 1 << 7; return r }},
				{"a damaged value", true, func(r requests) requests {
					at := bytes.Index(r[3].Data, xs)
					r[3].Data = slices.Clone(r[3].Data)
					r[3].Data[at] = 'y'
					return r
				}},
				{"it ends half way", true, func(r requests) requests { return r[:len(r)/2] }},
				{"it ends behind a frame", true, func(r requests) requests { r[0].Data = r[0].Data[:8+maxFrameBytes]; return r[:1] }},
				{"the last one is missing", true, func(r requests) requests { return r[:len(r)-1] }},
				{"one is missing", true, func(r requests) requests { return slices.Delete(r, 4, 5) }},
				{"one comes twice", true, func(r requests) requests { return slices.Insert(r, 4, r[4]) }},
				{"something follows", true, func(r requests) requests { return append(r, r[len(r)-1]) }},
				{"no hello", true, func(r requests) requests { r[0].Hello = nil; return r }},
				{"nothing", true, func(requests) requests { return nil }},
				{"the sender goes away", false, func(r requests) requests { return r[:len(r)/2] }},
			} {
				if err := i.send(tt.flaw(good()), tt.answer); err == nil {
					t.Fatalf("%s: it was taken", tt.name)
				}
				c.noTransfers(1)
				if c.state(1) != before {
					t.Fatalf("%s: the state has changed", tt.name)
				}
				if m, err := c.metrics(1); err != nil || m.Role != step.role {
					t.Fatalf("%s: %v, %v", tt.name, m, err)
				}
				if step.role == kvpb.Role_ROLE_UNINITIALIZED {
					wantError(t, getError(c, 1, true), codes.Unavailable, "NOT_INITIALIZED")
				}
			}
			if err := i.send(good(), true); err != nil {
				t.Fatalf("without a flaw: %v", err)
			}
			c.wants(1, true, "key 1", fmt.Sprint(step.index), 2)
			c.noTransfers(1)
		}
	})

	t.Run("recovery", func(t *testing.T) {
		three := []uint64{1, 2, 3}
		c := newCluster(t, 3)
		var s saboteur
		for _, n := range c.nodes {
			s.join(n)
		}
		c.init(three...)
		big := strings.Repeat("x", 1<<20)
		for k := range 3 {
			c.set(1, fmt.Sprint("large ", k), big)
			c.set(2, fmt.Sprint("small ", k), "v")
		}
		hit, goOn := make(chan struct{}), make(chan struct{})
		hold := func(_ *sabotaged, b []byte) []byte { hit <- struct{}{}; <-goOn; return b }
		lose := func(conn *sabotaged, b []byte) []byte { conn.black = true; hit <- struct{}{}; return b }
		for _, tt := range []struct {
			name string
			act  func(*sabotaged, []byte) []byte
			then func(leader uint64)
		}{
			{"nothing", func(_ *sabotaged, b []byte) []byte { return b }, nil},
			{"a bit flips", func(_ *sabotaged, b []byte) []byte {
				b = slices.Clone(b)
				b[bytes.Index(b, xs)] ^= 1
				return b
			}, nil},
			{"the connection breaks", func(conn *sabotaged, b []byte) []byte { _ = conn.Close(); return b }, nil},
			{"the receiver dies", lose, func(uint64) { c.killed(4) }},
			{"the sender loses leadership", hold, func(leader uint64) {
				c.transfer(leader, 1+leader%3)
				goOn <- struct{}{}
			}},
			{"the sender dies", lose, func(leader uint64) { c.killed(leader) }}, // the last: nobody stands between it and others then
		} {
			t.Logf("— %s", tt.name)
			leader := c.settled(three...)
			via := 1 + leader%3
			c.start(4, "127.0.0.1:0")
			s.hits.Store(0)
			s.next(tt.act)
			ended := make(chan error, 1)
			ctx, node, stub := c.ctx, c.proto(4)[0], c.nodes[via]
			go func() {
				_, err := stub.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: node})
				ended <- err
			}()
			if tt.then != nil {
				<-hit
				tt.then(leader)
			}
			if err := <-ended; err != nil {
				t.Logf("AddLearner: %v", err)
				eventually(t, func() error { // who it is passed on to may just have died
					_, err := stub.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: node})
					return err
				})
			}
			c.settled(three...)
			if s.hits.Load() != 1 {
				t.Fatalf("%s: it happened %d times", tt.name, s.hits.Load())
			}
			eventually(t, func() error { // the follower counts as one again
				m, err := c.metrics(c.settled(three...))
				for _, member := range m.GetMembers() {
					if member.Node.Id == 4 && member.Learner && member.GetProgress().GetCaughtUp() && member.GetProgress().GetState() == kvpb.ProgressState_PROGRESS_STATE_REPLICATE {
						return nil
					}
				}
				return fmt.Errorf("%s: %v, %v", tt.name, m, err)
			})
			c.noTransfers(1, 2, 3, 4)
			c.works(1, 2, 3, 4)
			c.sameStates(1, 2, 3, 4)
			c.change(via, &kvpb.ChangeMembershipRequest{Members: three, Remove: []uint64{4}})
			c.uninitialized(4)
			c.stop(4)
		}
	})

	// Learners whose configuration is the same when they need it.
	t.Run("one view for two", func(t *testing.T) {
		c := newCluster(t, 3, func(o *options) { o.logBytes = 64 << 10 })
		var s saboteur
		s.join(c.nodes[1])
		c.init(1)
		c.addLearner(1, 2)
		c.addLearner(1, 3)
		c.cut(1)
		c.fill(1, 24)
		before := c.sentSnapshots()
		hits, goOn := make(chan struct{}, 2), make(chan struct{})
		var hold func(*sabotaged, []byte) []byte
		hold = func(_ *sabotaged, b []byte) []byte {
			if s.hits.Load() == 1 {
				s.next(hold)
			}
			hits <- struct{}{}
			<-goOn
			return b
		}
		s.next(hold)
		c.cut(3) // and nobody else
		<-hits
		c.set(1, "between", "v") // is not in the view
		c.heal()
		<-hits
		n := c.nodes[1].server.n
		if err := n.do(c.ctx, func() error {
			if len(n.snapshots.views) != 1 || n.snapshots.views[0].readers != 2 {
				return fmt.Errorf("%d views", len(n.snapshots.views))
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		close(goOn)
		c.noTransfers(1, 2, 3)
		c.sameStates(1, 2, 3)
		if sent := c.sentSnapshots() - before; sent != 2 {
			t.Errorf("%d snapshots were sent", sent)
		}
	})

	t.Run("chunks", func(t *testing.T) {
		s := newTestStore()
		s.clusterID = 1
		var ws []*kvpb.Write
		for k := range 6 {
			ws = append(ws, setWrite(fmt.Sprint("large ", k), strings.Repeat("x", 1<<20)), setWrite(fmt.Sprint("small ", k), "v"),
				setWrite(fmt.Sprint(k, strings.Repeat("k", maxKeyBytes-1)), strings.Repeat("x", 1<<20)))
		}
		applyBatch(t, s, 1, 1, ws...)
		v := s.openView()
		defer v.close()
		var got bytes.Buffer
		chunks := 0
		wasLast := false
		err := transferTo(t, v, func(req *kvpb.InstallSnapshotRequest) error {
			chunks++
			isFirst := chunks == 1
			if (req.Hello != nil) != isFirst || len(req.Data) > snapshotChunkBytes || wasLast {
				return fmt.Errorf("chunk %d: %d bytes, hello %v", chunks, len(req.Data), req.Hello)
			}
			wasLast = !isFirst && len(req.Data) < snapshotChunkBytes
			got.Write(req.Data)
			return nil
		})
		if err != nil || chunks < 10 || !bytes.Equal(got.Bytes(), viewBytes(t, v)) {
			t.Fatalf("%v; %d chunks", err, chunks)
		}
	})
}

// sink is a node as far as a snapshot's sender can tell.
type sink struct {
	kvpb.UnimplementedRaftServiceServer
	take func(*kvpb.InstallSnapshotRequest) error
}

func (s *sink) InstallSnapshot(stream kvpb.RaftService_InstallSnapshotServer) error {
	for {
		req, err := stream.Recv()
		if err == io.EOF {
			return stream.SendAndClose(&kvpb.InstallSnapshotResponse{})
		}
		if err == nil {
			err = s.take(req)
		}
		if err != nil {
			return err
		}
	}
}

// transferTo sends a view by the network to whatever takes the requests.
func transferTo(t *testing.T, v *view, take func(*kvpb.InstallSnapshotRequest) error) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessageBytes), grpc.InitialWindowSize(windowBytes), grpc.InitialConnWindowSize(connWindowBytes))
	kvpb.RegisterRaftServiceServer(server, &sink{take: take})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	r := &sender{sent: make(chan error, 1)}
	nw := newNetwork(r, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	defer func() {
		nw.close()
		server.Stop()
		<-served
	}()
	nw.setMembers(1, 1, map[uint64]*kvpb.Node{2: {Id: 2, Address: l.Addr().String()}}, nil)
	nw.sendSnapshot(2, 1, v)
	return <-r.sent
}

// liveHeap is what is in use, without what the collector has yet to free.
func liveHeap() uint64 {
	runtime.GC()
	runtime.GC() // what pools hold lives for one more
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestSnapshotHeap(t *testing.T) {
	const limit = 8 << 20 // of a node
	c := newCluster(t, 1)
	c.init(1)
	srv := c.nodes[1].server
	n := srv.n
	if err := n.do(c.ctx, func() error { // as if it had been written
		n.store.mu.Lock()
		defer n.store.mu.Unlock()
		for i := range 32 << 10 {
			n.store.version++
			n.store.tree.set([]byte(fmt.Sprintf("key %06d", i)), item{bytes.Repeat([]byte("x"), 1024), n.store.version})
		}
		for i := range 32 {
			n.store.version++
			n.store.tree.set([]byte(fmt.Sprintf("large %06d", i)), item{bytes.Repeat([]byte("x"), 1<<20), n.store.version})
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var v *view
	if err := n.do(c.ctx, func() error { v = n.store.openView(); return nil }); err != nil {
		t.Fatal(err)
	}
	defer v.close()
	base := liveHeap()

	// sample collects what is live every few chunks, while whoever sends waits.
	var peak, chunks, size uint64
	sample := func(req *kvpb.InstallSnapshotRequest) error {
		size += uint64(len(req.Data))
		if chunks++; chunks%20 == 0 {
			peak = max(peak, liveHeap())
		}
		return nil
	}
	check := func(what string, limit int64) {
		t.Helper()
		over := int64(peak) - int64(base)
		if size < 64<<20 || chunks < 64 || peak == 0 {
			t.Errorf("%s: %d bytes in %d chunks", what, size, chunks)
		}
		if over > limit {
			t.Errorf("%s takes %d bytes of heap over the map", what, over)
		}
		t.Logf("%s: %d KiB over the map, %d chunks", what, over>>10, chunks)
		peak, chunks, size = 0, 0, 0
	}
	if err := v.writeTo(chunkWriter(func(b []byte) error { return sample(&kvpb.InstallSnapshotRequest{Data: b}) })); err != nil {
		t.Fatal(err)
	}
	check("writing a view", limit)
	if err := transferTo(t, v, sample); err != nil {
		t.Fatal(err)
	}
	check("sending a view, and receiving it", 2*limit)

	// All that a page allocates is more than it ever has at once.
	for _, req := range []*kvpb.ListRequest{{Local: true}, {Limit: 10_000}, {Prefix: "large ", Limit: 10_000}} {
		pages, items := 0, 0
		for more := true; more && pages < 5; pages++ {
			var resp *kvpb.ListResponse
			var err error
			got := allocated(func() { resp, err = srv.List(t.Context(), req) })
			if err != nil {
				t.Fatal(err)
			}
			if got > limit {
				t.Errorf("page %d of %v allocates %d bytes", pages, req, got)
			}
			items += len(resp.Items)
			req.PageToken, more = resp.NextPageToken, resp.NextPageToken != ""
		}
		if pages < 5 {
			t.Errorf("%v has %d items in %d pages", req, items, pages)
		}
	}
}

// TestSnapshotOfChange: a follower whose log has to be sent anew makes raft ask for
// a snapshot while it takes a change of membership in. That has to be in it.
func TestSnapshotOfChange(t *testing.T) {
	l := newLoneWithLearner(t)
	n, box := l.n, &snapBox{lone: l}
	n.net = box
	n.opts.logBytes = 1 << 20
	l.hellos = append(l.hellos, &kvpb.Hello{ClusterId: 7, From: &kvpb.Peer{Node: plainNode(4), RaftId: 4, Life: 4}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 1}})
	n.peerUp(4, true, nil)
	l.turn(0)
	ack := func(from, index uint64) {
		l.hears(int(from-2), message(raftpb.MsgAppResp, from, n.raft.term, func(m *raftpb.Message) { *m.Index = index }))
	}
	ack(4, n.log.last()) // the learner has what there is
	matched := n.log.last()
	delete(n.peers.connected, 3) // or the log would be kept for them
	delete(n.peers.connected, 4)
	for i := range 40 { // 4 MiB more, which 2 has at once and the learner not yet
		record, err := encodeWrite(setWrite(fmt.Sprint("key", i), strings.Repeat("x", 100<<10)))
		if err != nil {
			t.Fatal(err)
		}
		l.call(record)
		l.turn(0)
		ack(2, n.log.last())
	}
	if n.log.prevIndex <= matched || len(box.views) > 0 {
		t.Fatal("the log still has what the learner needs, or it has got a snapshot")
	}
	var jobs []diskJob
	n.durable.disk = &disk{start: func(func()) {}, wake: newBell()} // its jobs are done below
	if err := n.proposeChange(plainMembers(5), confChange(raftpb.ConfChangeAddLearnerNode, 5)); err != nil {
		t.Fatal(err)
	}
	l.turn(0)
	change := n.log.last()
	ack(2, change)
	ack(3, change)
	if n.rn.BasicStatus().GetCommit() != change || n.store.index == change {
		t.Fatal("it is not committed, or applied already")
	}
	n.peerDown(4, true)
	l.turn(0)
	n.durable.disk.mu.Lock()
	jobs, n.durable.disk.queue = n.durable.disk.queue, nil
	n.durable.disk.mu.Unlock()
	for _, j := range jobs {
		j.done(nil)
	}
	l.turn(0)
	if n.store.index != change || len(box.views) == 0 {
		t.Fatal("it is not applied, or no snapshot is sent")
	}
	for _, v := range box.views {
		if v.header.Index >= change && !slices.Contains(v.header.ConfState.Learners, 5) {
			t.Errorf("the snapshot of entry %d has not the configuration of entry %d", v.header.Index, change)
		}
	}
}
