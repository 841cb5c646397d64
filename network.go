// The network between nodes: a stream to each peer for raft's messages.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

const (
	// maxPeerBytes and maxPeerMessages bound what waits to be sent to a peer.
	maxPeerBytes    = 32 << 20
	maxPeerMessages = 8192
	// maxStreamBytes is where a batch of messages is cut: one more may follow.
	maxStreamBytes = 1 << 20
	// maxMessageBytes is the largest gRPC message that a node accepts.
	maxMessageBytes = 4 << 20
	// maxStrangers bounds the peers that no configuration names, yet.
	maxStrangers = 16
	// helloTimeout bounds how long a stream may stay silent at its start, and
	// a snapshot between two chunks.
	helloTimeout = 10 * time.Second
	// windowBytes is HTTP/2's window. A fixed one saves gRPC's probing for one.
	windowBytes = 4 << 20
)

// receiver is what the network hands things to. Nothing in it blocks but what
// takes a context.
type receiver interface {
	hello() *kvpb.Hello
	accept(*kvpb.Hello) *kvpb.Welcome
	refused(myRaftID, raftID uint64, w *kvpb.Welcome)
	peerUp(raftID, life uint64, outbound bool)
	peerDown(raftID uint64, lost bool)
	receiveMessages(context.Context, []inbound) error
	readSnapshot(io.Reader) (*store, error)
	receiveSnapshot(ctx context.Context, h *kvpb.Hello, term uint64, s *store) error
	snapshotSent(to uint64, v *view, err error)
	receiveClaim(context.Context, *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error)
}

// network keeps the streams. mu guards what is below it.
type network struct {
	kvpb.UnimplementedRaftServiceServer
	r       receiver
	log     *slog.Logger
	dialer  func(context.Context, string) (net.Conn, error) // nil: TCP
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	dropped atomic.Uint64 // messages that a queue did not take

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

// peer is this node's stream to another. mu guards what is below it.
type peer struct {
	nw     *network
	raftID uint64
	node   *kvpb.Node
	conn   *grpc.ClientConn
	ctx    context.Context
	cancel context.CancelFunc
	wake   bell
	said   string // the state that was logged last

	mu    sync.Mutex
	life  uint64 // of the peer at the other end of the stream; 0: no stream
	queue []*raftpb.Message
	bytes uint64
	full  bool // something was dropped since the queue was last empty
}

func newNetwork(r receiver, log *slog.Logger, dialer func(context.Context, string) (net.Conn, error)) *network {
	nw := &network{r: r, log: log, dialer: dialer, peers: map[uint64]*peer{}, inbound: map[inboundKey]*inboundStream{}}
	nw.ctx, nw.cancel = context.WithCancel(context.Background())
	return nw
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

// dial makes a connection to a node. An address can have what a URL must not:
// the zone in [fe80::1%eth0]:21001.
func dial(address string, opts ...grpc.DialOption) *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///"+url.PathEscape(address), append(opts,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())...)
	if err != nil {
		panic(err) // over a target that is no URL, or credentials: not for these
	}
	return conn
}

// dial makes a connection to a peer. It comes back at most a second after the
// peer does.
func (nw *network) dial(address string) *grpc.ClientConn {
	return dial(address,
		grpc.WithContextDialer(nw.dialer),
		grpc.WithIdleTimeout(0),
		grpc.WithInitialWindowSize(windowBytes),
		grpc.WithInitialConnWindowSize(windowBytes),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: .2, MaxDelay: 400 * time.Millisecond},
			MinConnectTimeout: 500 * time.Millisecond,
		}),
		// Finds a connection dead even while nothing is acknowledged: with it,
		// gRPC sets TCP_USER_TIMEOUT.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second, PermitWithoutStream: true}))
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
		if m := nw.members[id]; m != nil && m.Address != p.node.Address || m == nil && !isHeard || slices.Contains(nw.removed, id) {
			p.cancel()
			delete(nw.peers, id)
		}
	}
}

// addPeer starts a stream to a peer. nw.mu is held.
func (nw *network) addPeer(raftID uint64, node *kvpb.Node) {
	p := &peer{nw: nw, raftID: raftID, node: node, conn: nw.dial(node.Address), wake: newBell()}
	p.ctx, p.cancel = context.WithCancel(nw.ctx)
	nw.peers[raftID] = p
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

func (p *peer) enqueue(life uint64, ms []*raftpb.Message) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life != life || life == 0 {
		return false // raft learns of it from peerDown
	}
	if len(p.queue)+len(ms) > maxPeerMessages || p.bytes > maxPeerBytes {
		if !p.full {
			p.full = true
			p.nw.r.peerDown(p.raftID, false)
		}
		return false
	}
	for _, m := range ms {
		p.bytes += messageBytes(m)
	}
	p.queue = append(p.queue, ms...)
	p.wake.ring()
	return true
}

// messageBytes is what a message counts for in a queue.
func messageBytes(m *raftpb.Message) uint64 {
	n := uint64(64)
	for _, e := range m.GetEntries() {
		n += entryBytes(e)
	}
	return n
}

// open lets messages to a life of the peer in; 0: none.
func (p *peer) open(life uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.life, p.queue, p.bytes, p.full = life, nil, 0, false
}

// take returns messages of about maxStreamBytes.
func (p *peer) take() []*raftpb.Message {
	p.mu.Lock()
	defer p.mu.Unlock()
	i, size := 0, uint64(0)
	for ; i < len(p.queue) && size < maxStreamBytes; i++ {
		size += messageBytes(p.queue[i])
	}
	ms := p.queue[:i:i]
	p.queue = p.queue[i:]
	p.bytes -= size
	if len(p.queue) == 0 {
		p.queue, p.full = nil, false
	}
	return ms
}

// run is the peer's goroutine: it keeps a stream open and sends.
func (p *peer) run() {
	defer func() { _ = p.conn.Close() }()
	for p.ctx.Err() == nil {
		_ = p.stream() // it has said why it ended
		p.open(0)
		p.nw.r.peerDown(p.raftID, true)
		sleep(p.ctx, 100*time.Millisecond+rand.N(300*time.Millisecond))
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
		return fmt.Errorf("node %d at %s is in another cluster, %016x", n.Id, n.Address, w.ClusterId)
	case kvpb.Verdict_VERDICT_REMOVED:
		return fmt.Errorf("node %d at %s says that this node was removed", n.Id, n.Address)
	}
	return fmt.Errorf("it is node %d at %s, raft ID %x", n.Id, n.Address, w.Peer.RaftId)
}

// States of a peer, as they are logged.
const (
	peerConnected    = "peer connected"
	peerDisconnected = "peer disconnected"
	peerUnreachable  = "peer cannot be reached"
	peerRefuses      = "peer refuses this node"
)

// follow logs a state that is new. One that is unreachable since it was
// disconnected is no news.
func (p *peer) follow(state string, cause ...any) {
	said := state
	if state == peerRefuses {
		said = fmt.Sprint(state, cause)
	}
	if said == p.said || state == peerUnreachable && p.said == peerDisconnected || p.ctx.Err() != nil {
		return
	}
	p.said = said
	p.nw.log.Info(state, append([]any{"peer", p.node.Id, "address", p.node.Address}, cause...)...)
}

// stream opens a stream to the peer and sends until it breaks.
func (p *peer) stream() (err error) {
	ctx, cancel := context.WithCancelCause(p.ctx)
	defer cancel(nil)
	state := peerUnreachable
	defer func() { p.follow(state, "cause", err) }()
	waiting := alarm(cancel)
	s, err := kvpb.NewRaftServiceClient(p.conn).Stream(ctx, grpc.WaitForReady(true))
	waiting.Stop()
	if err != nil {
		return err
	}
	h := p.nw.r.hello()
	h.To = &kvpb.Peer{Node: p.node, RaftId: p.raftID}
	w, err := greet(s, h, cancel)
	if err != nil {
		return err
	}
	if w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || w.Peer.RaftId != p.raftID {
		state = peerRefuses
		p.nw.r.refused(h.From.RaftId, p.raftID, w)
		return refusal(w)
	}
	p.open(w.Peer.Life)
	p.nw.r.peerUp(p.raftID, w.Peer.Life, true)
	p.follow(peerConnected)
	state = peerDisconnected
	go func() { // ends with the stream
		_, err := s.Recv()
		cancel(fmt.Errorf("the stream ended: %w", err))
	}()
	for {
		select {
		case <-p.wake:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		for ms := p.take(); len(ms) > 0; ms = p.take() {
			if err := s.Send(&kvpb.StreamRequest{Messages: toWire(ms)}); err != nil {
				return fmt.Errorf("sending: %w", err)
			}
		}
	}
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

// probe asks who is at an address, and tells it whose state is to be dropped.
func (nw *network) probe(ctx context.Context, address string, past []uint64) (*kvpb.Welcome, error) {
	conn := nw.dial(address)
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := kvpb.NewRaftServiceClient(conn).Stream(ctx)
	if err != nil {
		return nil, err
	}
	h := nw.r.hello()
	h.Removed = past
	return greet(s, h, cancel)
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
		if err != nil {
			return err
		}
		defer done()
		nw.r.peerUp(h.From.RaftId, h.From.Life, false)
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

var errNoHello = status.Error(codes.InvalidArgument, "the first request has no hello")

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
		if len(nw.peers) >= maxMembers+maxStrangers {
			return nil, status.Error(codes.ResourceExhausted, "too many peers that no configuration names")
		}
		nw.addPeer(id, h.From.GetNode())
	}
	key, s := inboundKey{id, snapshot}, &inboundStream{h, cancel}
	if old := nw.inbound[key]; old != nil {
		old.cancel(errors.New("replaced by a newer stream"))
	}
	nw.inbound[key] = s
	return func() {
		nw.mu.Lock()
		defer nw.mu.Unlock()
		if nw.inbound[key] == s {
			delete(nw.inbound, key)
		}
		nw.endPeers()
	}, nil
}
