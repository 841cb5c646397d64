// The network between nodes: a stream to each peer for raft's messages.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

const (
	// maxMessageBytes is the largest gRPC message that a node accepts. It has room
	// for the largest write, for a page of List, and for a batch to a peer.
	maxMessageBytes = 4 << 20
	// maxStrangers bounds the peers that no configuration names, yet: nodes that are
	// being added, or came back without their memory. Each takes peerFiles.
	maxStrangers = 16
	// helloTimeout bounds how long a stream may stay silent at its start, and
	// a snapshot between two chunks: there is one round trip in it, or none, but a
	// disk that stalls may be, too. It is maxConnectTimeout, for whoever may be so
	// slow to be connected to may be so slow to answer.
	helloTimeout = maxConnectTimeout
	// windowBytes is HTTP/2's window: 4 MiB a round trip is 13 MiB a second over
	// 300 ms. A fixed one saves gRPC's probing for one.
	windowBytes = 4 << 20
)

// receiver is what the network hands things to. Nothing in it blocks but what
// takes a context.
type receiver interface {
	hello() *kvpb.Hello
	accept(*kvpb.Hello) *kvpb.Welcome
	refused(myRaftID, raftID uint64, w *kvpb.Welcome)
	peerUp(raftID, life uint64, outbound bool)
	peerMoved(raftID uint64, to *kvpb.Node)
	peerDown(raftID uint64, lost bool)
	receiveMessages(context.Context, []inbound) error
	readSnapshot(io.Reader) (*store, error)
	receiveSnapshot(ctx context.Context, h *kvpb.Hello, term uint64, s *store) error
	snapshotSent(to uint64, v *view, err error)
	receiveClaim(context.Context, *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error)
}

// network keeps the streams. mu guards what is below it. What it tells the
// receiver of a stream's begin and end it tells while it has mu, and of a stream
// that was replaced nothing any more: so it comes in the order in which it
// happened. mu may be held when a peer's is taken, not the other way round.
type network struct {
	kvpb.UnimplementedRaftServiceServer
	r       receiver
	log     *slog.Logger
	dialer  *dialer
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	dropped atomic.Uint64 // messages that a queue did not take
	// connectTimeout bounds the wait for a connection to a peer. It is set before
	// there are members, as are maxPeers, which bounds the peers, and receiving,
	// which has a place for each snapshot that is received.
	connectTimeout time.Duration
	maxPeers       int
	receiving      chan struct{}
	asking         chan struct{} // has a place for each connection that serves but one call

	mu      sync.Mutex
	members map[uint64]*kvpb.Node
	removed []uint64         // not to be heard, even before they may be told so
	peers   map[uint64]*peer // by raft ID: members, and those who have a stream to us
	inbound map[inboundKey]*inboundStream
}

// inboundKey is where a peer is heard: a stream, or a snapshot on its way from
// it. A newer one takes its place.
type inboundKey struct {
	raftID   uint64
	snapshot bool
}

type inboundStream struct {
	hello  *kvpb.Hello
	cancel context.CancelCauseFunc
}

// newNetwork makes a network without peers. It connects by connect; nil: by TCP.
func newNetwork(
	r receiver, log *slog.Logger, connect func(context.Context, string) (net.Conn, error),
) *network {
	nw := &network{r: r, log: log, peers: map[uint64]*peer{}, inbound: map[inboundKey]*inboundStream{}}
	nw.ctx, nw.cancel = context.WithCancel(context.Background())
	nw.dialer = newDialer(nw.ctx)
	if connect != nil {
		nw.dialer.connect = connect
		nw.dialer.lookup = nil
	}
	nw.asking = make(chan struct{}, maxAsking)
	o := defaultOptions()
	nw.bound(&o, maxPeers)
	return nw
}

// bound sets what follows from the flags and from how many files may be open.
func (nw *network) bound(o *options, peers int) {
	nw.connectTimeout = o.connectTimeout()
	nw.maxPeers = peers
	nw.receiving = make(chan struct{}, peers)
}

// close ends all streams and waits for their goroutines.
func (nw *network) close() {
	nw.mu.Lock()
	nw.cancel()
	nw.mu.Unlock()
	nw.wg.Wait()
}

// goroutine runs f, unless the network is closed. nw.mu is held.
func (nw *network) goroutine(f func()) {
	if nw.ctx.Err() == nil {
		nw.wg.Go(f)
	}
}

// setMembers implements transport.
func (nw *network) setMembers(clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64) {
	self := nw.r.hello().From.Node.Id
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.members, nw.removed = members, removed
	nw.endPeers()
	for _, s := range nw.inbound {
		if slices.Contains(removed, s.hello.From.RaftId) || s.hello.To.RaftId != raftID || !sameCluster(clusterID, members, s.hello) {
			s.cancel(errors.New("not a peer of this node any more"))
		}
	}
	for id, m := range members {
		if nw.peers[id] == nil && m.Id != self { // not even an earlier life of this node
			nw.addPeer(id, m)
		}
	}
}

// endPeers ends the streams to those who have left, or moved, or were no members
// and are not heard any more. nw.mu is held.
func (nw *network) endPeers() {
	for id, p := range nw.peers {
		isHeard := nw.inbound[inboundKey{id, false}] != nil || nw.inbound[inboundKey{id, true}] != nil
		if m := nw.members[id]; m != nil && !p.isAt(m) || m == nil && !isHeard || slices.Contains(nw.removed, id) {
			p.cancel()
			delete(nw.peers, id)
			nw.r.peerDown(id, true)
		}
	}
}

// addPeer starts a stream to a peer. nw.mu is held.
func (nw *network) addPeer(raftID uint64, node *kvpb.Node) {
	p := &peer{nw: nw, raftID: raftID, node: node, wake: newBell()}
	p.ctx, p.cancel = context.WithCancel(nw.ctx)
	nw.peers[raftID] = p
	if s := nw.inbound[inboundKey{raftID, false}]; s != nil {
		p.claimed(&moveClaim{s.hello.ClusterId, s.hello.From})
	}
	nw.goroutine(p.run)
}

// send implements transport.
func (nw *network) send(to, life uint64, ms []*raftpb.Message) {
	nw.mu.Lock()
	p := nw.peers[to]
	nw.mu.Unlock()
	if p == nil || !p.enqueue(life, ms) {
		nw.dropped.Add(uint64(len(ms)))
	}
}

// up begins to send to a life of a peer, unless the peer was replaced.
func (nw *network) up(p *peer, life uint64, to peerTarget) bool {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if nw.peers[p.raftID] != p {
		return false
	}
	p.open(life, to.node)
	nw.r.peerUp(p.raftID, life, true)
	if to.claim != nil {
		nw.r.peerMoved(p.raftID, to.node)
	}
	s := nw.inbound[inboundKey{p.raftID, false}]
	if s != nil && p.rival(s.hello.From) {
		s.cancel(errRival) // or it would wait for answers that go to the other
	}
	return true
}

// down says that nothing gets to a peer, unless another has taken its place.
func (nw *network) down(p *peer) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if nw.peers[p.raftID] == p {
		nw.r.peerDown(p.raftID, true)
	}
}

// sleep waits, or less if ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// refusal is why a peer would not talk.
func refusal(w *kvpb.Welcome) error {
	n := w.Peer.Node
	switch w.Verdict {
	case kvpb.Verdict_VERDICT_OTHER_CLUSTER:
		if w.ClusterId == 0 {
			return fmt.Errorf("node %d at %s is in no cluster", n.Id, n.Address)
		}
		return fmt.Errorf("node %d at %s is in another cluster, %016x", n.Id, n.Address, w.ClusterId)
	case kvpb.Verdict_VERDICT_REMOVED:
		return fmt.Errorf("node %d at %s says that this node was removed", n.Id, n.Address)
	case kvpb.Verdict_VERDICT_RIVAL:
		return fmt.Errorf("node %d at %s is connected to another process that goes by this node's raft ID: "+
			"if this node has not just moved, one of the two was started from a copy of the other's data directory "+
			"and has to be stopped", n.Id, n.Address)
	}
	return fmt.Errorf("it is node %d at %s, raft ID %x", n.Id, n.Address, w.Peer.RaftId)
}

var errSilent = errors.New("the other node is silent")

// alarm ends a stream, unless it is reset or stopped within helloTimeout.
func alarm(cancel context.CancelCauseFunc) *time.Timer {
	return time.AfterFunc(helloTimeout, func() { cancel(errSilent) })
}

// greet says hello and waits for the answer, which names a peer.
func greet(s kvpb.RaftService_StreamClient, h *kvpb.Hello, cancel context.CancelCauseFunc) (*kvpb.Welcome, error) {
	defer alarm(cancel).Stop()
	if err := s.Send(&kvpb.StreamRequest{Hello: h}); err != nil && err != io.EOF {
		return nil, err
	}
	resp, err := s.Recv()
	if err != nil {
		return nil, err
	}
	if p := resp.GetWelcome().GetPeer(); p.GetNode() == nil || !validRaftID(p.GetRaftId()) || p.GetLife() == 0 {
		return nil, errors.New("its answer to hello is no welcome")
	}
	return resp.Welcome, nil
}

// ask waits for a place for a connection that serves but one call, until done.
func (nw *network) ask(ctx context.Context) (done func(), err error) {
	select {
	case nw.asking <- struct{}{}:
		return func() { <-nw.asking }, nil
	case <-ctx.Done():
		return nil, apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED,
			fmt.Sprintf("this node makes %d calls to other nodes, which is its limit", maxAsking))
	}
}

// probe asks who is at an address.
func (nw *network) probe(ctx context.Context, address string) (*kvpb.Welcome, error) {
	done, err := nw.ask(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	conn := nw.dial(address)
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := kvpb.NewRaftServiceClient(conn).Stream(ctx)
	if err != nil {
		return nil, err
	}
	return greet(s, nw.r.hello(), cancel)
}

// Stream implements RaftService: it hears a peer.
func (nw *network) Stream(s kvpb.RaftService_StreamServer) error {
	return nw.serveHello(s, func(ctx context.Context, cancel context.CancelCauseFunc, silent *time.Timer) error {
		first, err := s.Recv()
		if err != nil {
			return err
		}
		silent.Stop()
		h := first.Hello
		if h == nil {
			return errNoHello
		}
		w := nw.r.accept(h)
		if w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || h.GetTo().GetRaftId() == 0 {
			return s.Send(&kvpb.StreamResponse{Welcome: w})
		}
		done, err := nw.hear(h, false, cancel)
		if err == errRival {
			w.Verdict = kvpb.Verdict_VERDICT_RIVAL
			return s.Send(&kvpb.StreamResponse{Welcome: w})
		}
		if err != nil {
			return err
		}
		defer done()
		w.Peers = nw.heard(h.From.RaftId)
		defer connOf(s.Context()).heard()()
		if err := s.Send(&kvpb.StreamResponse{Welcome: w}); err != nil {
			return err
		}
		for {
			req, err := s.Recv()
			if err != nil {
				return err
			}
			if err := nw.r.receiveMessages(ctx, fromWire(req.Messages, h)); err != nil {
				return err
			}
		}
	})
}

var (
	errNoHello = status.Error(codes.InvalidArgument, "the first request has no hello")
	errRival   = status.Error(codes.FailedPrecondition, "another process with this raft ID is connected, elsewhere")
)

// serveHello is serve for a stream that begins with a hello. It closes a connection
// that says too many.
func (nw *network) serveHello(s grpc.ServerStream, f func(context.Context, context.CancelCauseFunc, *time.Timer) error) error {
	if c := connOf(s.Context()); !c.greeted() {
		_ = c.Close()
		return status.Error(codes.ResourceExhausted, "too many hellos on this connection")
	}
	return nw.serve(s, f)
}

// serve calls f, but returns as soon as the stream is cancelled: that tears it
// down, and f, which may be waiting in it, returns too.
func (nw *network) serve(s grpc.ServerStream, f func(context.Context, context.CancelCauseFunc, *time.Timer) error) error {
	ctx, cancel := context.WithCancelCause(s.Context())
	defer cancel(nil)
	silent := alarm(cancel)
	defer silent.Stop()
	ended := make(chan error, 1)
	nw.mu.Lock()
	nw.goroutine(func() { ended <- f(ctx, cancel, silent) })
	nw.mu.Unlock()
	select {
	case err := <-ended:
		if err == io.EOF {
			return nil
		}
		return err
	case <-ctx.Done():
		return status.Error(codes.Aborted, context.Cause(ctx).Error())
	case <-nw.ctx.Done():
		return toStatus(errStopping, false)
	}
}

// hear lets a peer's stream or snapshot take the place of an earlier one. It
// makes sure that there is a stream to answer on, even to a peer that the
// configuration does not name yet.
func (nw *network) hear(h *kvpb.Hello, snapshot bool, cancel context.CancelCauseFunc) (done func(), err error) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	id := h.From.RaftId
	if slices.Contains(nw.removed, id) {
		return nil, status.Error(codes.Unavailable, "its removal is about to be known")
	}
	if nw.peers[id] == nil {
		if len(nw.peers) >= nw.maxPeers {
			return nil, status.Error(codes.ResourceExhausted, "too many peers that no configuration names")
		}
		nw.addPeer(id, h.From.GetNode())
	}
	p := nw.peers[id]
	if p.rival(h.From) {
		return nil, errRival
	}
	key, s := inboundKey{id, snapshot}, &inboundStream{h, cancel}
	if old := nw.inbound[key]; old != nil {
		old.cancel(errors.New("replaced by a newer stream"))
	}
	nw.inbound[key] = s
	if !snapshot {
		p.takesTurns(h.From)
		p.claimed(&moveClaim{h.ClusterId, h.From})
		nw.r.peerUp(id, h.From.Life, false)
	}
	return func() {
		nw.mu.Lock()
		defer nw.mu.Unlock()
		if nw.inbound[key] == s {
			delete(nw.inbound, key)
		}
		nw.endPeers()
	}, nil
}

// heard lists the members that this node hears and where. A caller that has moved with
// others may find them by that.
func (nw *network) heard(by uint64) (peers []*kvpb.Peer) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	for key, s := range nw.inbound {
		if id := key.raftID; !key.snapshot && id != by && nw.members[id] != nil {
			peers = append(peers, s.hello.From)
		}
	}
	return peers
}

// told takes in where a peer hears others. What they say themselves counts more.
func (nw *network) told(clusterID uint64, peers []*kvpb.Peer) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	for _, at := range peers {
		p := nw.peers[at.GetRaftId()]
		isHeard := nw.inbound[inboundKey{at.GetRaftId(), false}] != nil
		if p != nil && !isHeard && !p.isOpen() && validateNode("peers", at.GetNode()) == nil {
			p.claimed(&moveClaim{clusterID, at})
		}
	}
}
