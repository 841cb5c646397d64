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
	// maxPeerBytes and maxPeerMessages bound what waits to be sent to a peer. If it
	// takes less than that, raft sends it less. Entries are shared with the log; the
	// rest of so many messages takes 512 KiB.
	maxPeerBytes    = 32 << 20
	maxPeerMessages = 8192
	// maxStreamBytes is where a batch of messages is cut: one more, of an entry of
	// maxEntryBytes or one larger write, may follow, and has to fit maxMessageBytes.
	maxStreamBytes = 1 << 20
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
	dialer  func(context.Context, string) (net.Conn, error) // nil: TCP
	names   *dialer
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

// peer is this node's stream to another. mu guards what is below it.
type peer struct {
	nw     *network
	raftID uint64
	ctx    context.Context
	cancel context.CancelFunc
	wake   bell
	said   string // the state that was logged last
	sought string // the claimed address at which, as was logged last, it was not found

	mu    sync.Mutex
	node  *kvpb.Node // as the configuration has it; if that does not name it, as its hello does
	life  uint64     // of the peer at the other end of the stream; 0: no stream
	at    *kvpb.Node // where the stream goes
	queue []*raftpb.Message
	bytes uint64
	full  bool // something was dropped since the queue was last empty

	claim    *moveClaim // that it has moved; nil: none
	claimDue bool       // it is the claim's turn to be dialed
	tried    *kvpb.Node // whom giveUp gives up
	giveUp   func()     // for another address: the wait for a connection, or what hangs on a claim; nil: there is none
	rivals   rivals
}

// moveClaim says that a peer is at another address than the one that is known. It is
// believed once a life of the peer answers there.
type moveClaim struct {
	clusterID uint64
	peer      *kvpb.Peer
}

// rivals is what is known of processes that go by the same raft ID.
type rivals struct {
	lives   [2]uint64 // the last two that said hello, the newest first
	returns int       // how often the newest one was the one before
	logged  uint64    // the life that the log has named
}

func newNetwork(r receiver, log *slog.Logger, dialer func(context.Context, string) (net.Conn, error)) *network {
	nw := &network{r: r, log: log, dialer: dialer, peers: map[uint64]*peer{}, inbound: map[inboundKey]*inboundStream{}}
	nw.ctx, nw.cancel = context.WithCancel(context.Background())
	nw.names = newDialer(nw.ctx)
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

// isAt takes over the address that a new configuration has, if the stream goes there
// already. It reports whether the peer can be kept: if not, it has to be replaced.
func (p *peer) isAt(m *kvpb.Node) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life != 0 && p.at.Address == m.Address {
		p.node, p.claim = m, nil
	}
	return p.node.Address == m.Address
}

// claimed takes a claim to be at some address in; the newest one counts.
func (p *peer) claimed(c *moveClaim) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.peer.Node.Id != p.node.Id {
		return
	}
	p.claim = c
	if c.peer.Node.Address == p.node.Address {
		p.claim = nil
	}
	if p.giveUp != nil && p.life != c.peer.Life && p.tried.Address != c.peer.Node.Address {
		p.giveUp()
	}
}

// rival reports whether a hello is of another process than the one that this node
// has a stream to, elsewhere. If the peer has moved, that stream is about to break.
// Who says hello from the known address is none: it is the other who only claims.
func (p *peer) rival(from *kvpb.Peer) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	address := from.Node.Address
	if p.life == 0 || p.life == from.Life || address == p.at.Address || address == p.node.Address {
		return false
	}
	p.logRival(from)
	return true
}

// logRival says once that two processes are one node. p.mu is held.
func (p *peer) logRival(from *kvpb.Peer) {
	if p.rivals.logged == from.Life {
		return
	}
	p.rivals.logged = from.Life
	p.nw.log.Warn("another process goes by a peer's raft ID: the peer has moved, and its old connection breaks soon, "+
		"or one of the two was started from a copy of the other's data directory and has to be stopped",
		"peer", p.node.Id, "address", p.at.GetAddress(), "other", from.Node.Address)
}

// takesTurns looks for two processes at one address that replace each other: a
// life that has ended does not come back.
func (p *peer) takesTurns(from *kvpb.Peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &p.rivals
	switch from.Life {
	case r.lives[0]:
		return
	case r.lives[1]:
		r.returns++
	default:
		r.returns = 0
	}
	r.lives = [2]uint64{from.Life, r.lives[0]}
	if r.returns == 2 { // once may be a hello that came late
		p.logRival(from)
	}
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

// open lets messages to a life of the peer in, which is somewhere; 0: none.
func (p *peer) open(life uint64, at *kvpb.Node) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.life, p.at, p.queue, p.bytes, p.full = life, at, nil, 0, false
	if at == p.node {
		p.claim = nil // it is where it was
	}
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

// run is the peer's goroutine: it keeps a stream open and sends. The connection
// is kept while the address is the same.
func (p *peer) run() {
	var conn *grpc.ClientConn
	var address string
	for p.ctx.Err() == nil {
		to := p.next()
		if conn != nil && to.node.Address != address {
			_ = conn.Close()
			conn = nil
		}
		if conn == nil {
			conn, address = p.nw.dial(to.node.Address), to.node.Address
		}
		_ = p.stream(conn, to) // it has said why it ended
		p.open(0, nil)
		p.nw.down(p)
		// A peer that answers but refuses is asked again at most 10 times a second,
		// which hellosPerSecond allows; one that is back is back within a second.
		sleep(p.ctx, 100*time.Millisecond+rand.N(300*time.Millisecond))
	}
	if conn != nil {
		_ = conn.Close()
	}
}

// peerTarget is whom to dial next.
type peerTarget struct {
	node  *kvpb.Node
	claim *moveClaim // that it is there; nil: that is known
	turns bool       // there is another address to be tried
}

// next takes the address that is known and the one that is claimed in turn.
func (p *peer) next() peerTarget {
	p.mu.Lock()
	defer p.mu.Unlock()
	to := peerTarget{node: p.node, turns: p.claim != nil}
	if p.claimDue && p.claim != nil {
		to.node, to.claim = p.claim.peer.Node, p.claim
	}
	p.claimDue = to.claim == nil
	return to
}

// answers reports whether who answered is the one that was meant.
func (to peerTarget) answers(raftID uint64, w *kvpb.Welcome) bool {
	if w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || w.Peer.RaftId != raftID {
		return false
	}
	return to.claim == nil || w.ClusterId == to.claim.clusterID && w.Peer.Life == to.claim.peer.Life
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

// States of a peer, as they are logged.
const (
	peerConnected    = "peer connected"
	peerMoved        = "peer connected at another address than the known one"
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
	p.mu.Lock()
	node := p.node
	p.mu.Unlock()
	p.nw.log.Info(state, append([]any{"peer", node.Id, "address", node.Address}, cause...)...)
}

// notFound says once that the peer was not found where it says that it is.
func (p *peer) notFound(at *kvpb.Node, err error) {
	if p.sought == at.Address || p.ctx.Err() != nil {
		return
	}
	p.sought = at.Address
	p.nw.log.Info("peer not found where it says that it is", "peer", at.Id, "address", at.Address, "cause", err)
}

// errElsewhere ends the wait for a connection, to try another address.
var errElsewhere = errors.New("it says that it is elsewhere")

// connected waits for a connection to the peer.
func (p *peer) connected(
	ctx context.Context, cancel context.CancelCauseFunc, conn *grpc.ClientConn, to peerTarget,
) (kvpb.RaftService_StreamClient, error) {
	defer alarm(cancel).Stop()
	if to.claim == nil && !to.turns {
		p.mayGiveUp(to, cancel)
		defer p.mayGiveUp(to, nil)
	}
	s, err := kvpb.NewRaftServiceClient(conn).Stream(ctx, grpc.WaitForReady(!to.turns))
	if err != nil && context.Cause(ctx) == errElsewhere {
		err = errElsewhere
	}
	return s, err
}

// mayGiveUp lets news of another address end what is tried; nil: not any more.
func (p *peer) mayGiveUp(to peerTarget, cancel context.CancelCauseFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tried, p.giveUp = to.node, nil
	if cancel == nil {
		return
	}
	p.giveUp = func() { cancel(errElsewhere) }
	if to.claim == nil && p.claim != nil { // it came just before
		p.giveUp()
	}
}

// stream opens a stream to the peer and sends until it breaks.
func (p *peer) stream(conn *grpc.ClientConn, to peerTarget) (err error) {
	ctx, cancel := context.WithCancelCause(p.ctx)
	defer cancel(nil)
	state := peerUnreachable
	defer func() {
		if to.claim == nil || state == peerDisconnected {
			p.follow(state, "cause", err)
		} else {
			p.notFound(to.node, err)
		}
	}()
	if to.claim != nil { // whoever makes one up shall not keep this node from the known address
		defer time.AfterFunc(2*p.nw.connectTimeout, func() { p.giveUpClaim(cancel) }).Stop()
		p.mayGiveUp(to, cancel)
		defer p.mayGiveUp(to, nil)
	}
	s, err := p.connected(ctx, cancel, conn, to)
	if err != nil {
		return err
	}
	h := p.nw.r.hello()
	h.To = &kvpb.Peer{Node: to.node, RaftId: p.raftID}
	w, err := greet(s, h, cancel)
	if err != nil {
		return err
	}
	if !to.answers(p.raftID, w) {
		state = peerRefuses
		if to.claim == nil { // else it may be anybody
			p.nw.r.refused(h.From.RaftId, p.raftID, w)
		}
		return refusal(w)
	}
	if !p.nw.up(p, w.Peer.Life, to) {
		return context.Canceled
	}
	p.nw.told(h.ClusterId, w.Peers)
	if to.claim == nil {
		p.follow(peerConnected)
	} else {
		p.sought = ""
		p.follow(peerMoved, "found", to.node.Address)
	}
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

// isOpen reports whether there is a stream to the peer.
func (p *peer) isOpen() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.life != 0
}

// giveUpClaim ends the attempt to reach a peer where it is said to be, if that has
// come to nothing.
func (p *peer) giveUpClaim(cancel context.CancelCauseFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life == 0 {
		cancel(errSilent)
	}
}
