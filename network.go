// The network between nodes: a stream to each peer for raft's messages, and those that
// come from peers. What one stream to a peer does is in peer.go.

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
	// maxMessageBytes is the largest gRPC message that a node accepts of another one, and that
	// commands accept of a node. It has room for the largest write, for a page of List, and
	// for a batch to a peer. requestLimit has what a node accepts of others.
	maxMessageBytes = 4 << 20
	// maxStrangers bounds the peers that no configuration names: nodes that are being
	// added, or came back without their memory. Each takes peerFiles.
	maxStrangers = 16
	// helloTimeout bounds the silence at the start of a stream, and between two chunks of
	// a snapshot: at most a round trip, but perhaps a disk that stalls, too. It is as long
	// as connecting may take: a peer that is slow to connect to is slow to answer.
	helloTimeout = maxConnectTimeout
	// windowBytes is HTTP/2's window: so much of a stream that is not read a node may have to
	// keep. While a message is read that is larger, gRPC opens the window for all of it: so
	// peers send messages of maxStreamBytes, of which 0.7 to 1 get through in a round trip.
	// gRPC has one window for all connections of a server, so nodes cannot have a larger one
	// than clients. Since the window is fixed, gRPC does not probe for a better one.
	windowBytes = 512 << 10
	// connWindowBytes is the window of a connection. It bounds no memory: gRPC opens it
	// again whether streams are read or not.
	connWindowBytes = 4 << 20
)

// receiver is what the network hands things to. Its methods may be called by any
// goroutine, and call nothing of the network. Only receiveRooms, receiveMessages, receiveClaim and
// the two that take in a snapshot may block.
type receiver interface {
	// hello introduces this node.
	hello() *kvpb.Hello
	// accept answers the hello of another node.
	accept(*kvpb.Hello) *kvpb.Welcome
	// refused learns that whoever is at a peer's known address does not talk to this
	// node, which had said hello as myRaftID.
	refused(myRaftID, raftID uint64, w *kvpb.Welcome)
	// peerUp learns, before any message of it, of a stream to a peer (outbound) or
	// from it, which is p.
	peerUp(raftID uint64, outbound bool, p *kvpb.Peer)
	// peerMoved learns that the stream to a peer, of which peerUp has just told, goes to
	// another address than the known one.
	peerMoved(raftID uint64, to *kvpb.Node)
	// peerStops learns that a peer has said that it was told to stop; peerDown follows.
	peerStops(raftID uint64)
	// peerDown learns that messages to a peer are lost: all of them, since there is no
	// stream to it (noStream), or some, since its queue is full.
	peerDown(raftID uint64, noStream bool)
	// receiveRooms takes what a peer says of who has how much room, before the messages that
	// came with it.
	receiveRooms(context.Context, *kvpb.Hello, []*kvpb.RoomReport) error
	// receiveMessages takes a peer's messages, and waits while there is no room.
	receiveMessages(context.Context, []inbound) error
	// readSnapshot reads the snapshot that a peer sends.
	readSnapshot(io.Reader) (*store, error)
	// receiveSnapshot takes that snapshot, and returns once raft has.
	receiveSnapshot(ctx context.Context, h *kvpb.Hello, term uint64, s *store) error
	// snapshotSent learns, once for each sendSnapshot, what came of it.
	snapshotSent(to uint64, v *view, err error)
	// receiveClaim answers a founder.
	receiveClaim(context.Context, *kvpb.ClaimRequest) (*kvpb.ClaimResponse, error)
}

// network keeps a stream to each peer, and knows those that peers have to this node.
//
// The receiver learns that a stream begins or ends while mu is held: so it learns these
// things in the order in which they happen, and nothing any more of a stream that was
// replaced by another.
//
// Locks are taken in this order: network.mu, peer.mu, and what the receiver locks.
type network struct {
	kvpb.UnimplementedRaftServiceServer
	receiver   receiver
	logger     *slog.Logger
	dialer     *dialer
	ctx        context.Context // ends all streams
	cancel     context.CancelFunc
	goroutines sync.WaitGroup
	dropped    atomic.Uint64 // messages that no queue took
	failed     atomic.Bool   // the node cannot go on: set before close
	callPlaces chan struct{} // has a place for each connection that serves but one call

	// What follows is set by setLimits before there are members.
	connectTimeout time.Duration // bounds the wait for a connection to a peer
	maxPeers       int
	snapshotPlaces chan struct{} // has a place for each snapshot that is received

	mu      sync.Mutex // guards what follows
	members map[uint64]*kvpb.Node
	removed []uint64         // their streams are refused, even before they may be told of the removal
	level   uint32           // that peers have to speak
	peers   map[uint64]*peer // by raft ID: the members, and strangers that have a stream to this node
	inbound map[inboundKey]*inboundStream
	rooms   []*kvpb.RoomReport // what each stream to a peer begins with
}

// inboundKey names a stream from a peer: the one for messages, or a snapshot's. There is
// one of each at most: a newer one takes its place.
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
	r receiver, logger *slog.Logger, connect func(context.Context, string) (net.Conn, error),
) *network {
	nw := &network{
		receiver:   r,
		logger:     logger,
		callPlaces: make(chan struct{}, maxAsking),
		peers:      map[uint64]*peer{},
		inbound:    map[inboundKey]*inboundStream{},
	}
	nw.ctx, nw.cancel = context.WithCancel(context.Background())
	nw.dialer = newDialer(nw.ctx)
	if connect != nil {
		nw.dialer.connect = connect
		nw.dialer.lookup = nil
	}
	o := defaultOptions()
	nw.setLimits(&o, maxPeers)
	return nw
}

// setLimits sets what follows from the flags and from how many files may be open.
func (nw *network) setLimits(o *options, peers int) {
	nw.connectTimeout = o.connectTimeout()
	nw.maxPeers = peers
	nw.snapshotPlaces = make(chan struct{}, peers)
}

// close ends all streams and waits for their goroutines.
func (nw *network) close() {
	nw.mu.Lock()
	nw.cancel()
	nw.mu.Unlock()
	nw.goroutines.Wait()
}

// start runs f in a goroutine, unless the network is closed. nw.mu is held.
func (nw *network) start(f func()) {
	if nw.ctx.Err() == nil {
		nw.goroutines.Go(f)
	}
}

// setMembers implements transport.
func (nw *network) setMembers(
	clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64,
) {
	self := nw.receiver.hello().From.Node.Id
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.members = members
	nw.removed = removed
	hints := nw.endPeers()
	for _, s := range nw.inbound {
		isRemoved := slices.Contains(removed, s.hello.From.RaftId)
		isForMe := s.hello.To.RaftId == raftID
		stays := !isRemoved && isForMe && sameCluster(clusterID, members, s.hello)
		if !stays {
			s.cancel(errors.New("not a peer of this node any more"))
		}
	}
	for id, m := range members {
		if nw.peers[id] == nil && m.Id != self { // not even an earlier life of this node
			nw.addPeer(id, m, hints[id])
		}
	}
}

// setLevel implements transport.
func (nw *network) setLevel(level uint32) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.level = level
	for _, s := range nw.inbound {
		if levelFromWire(s.hello.From.Level) < level {
			s.cancel(errors.New("its program does not speak the level of the cluster"))
		}
	}
	for id, p := range nw.peers {
		if m := nw.members[id]; m != nil && !p.speaks(level) {
			nw.endPeer(id, p)
			nw.addPeer(id, m, p.hint()) // it is refused in words
		}
	}
}

// endPeer ends a peer. nw.mu is held.
func (nw *network) endPeer(id uint64, p *peer) {
	p.cancel()
	delete(nw.peers, id)
	nw.receiver.peerDown(id, true)
}

// endPeers ends the peers that are not wanted any more, and those whose stream goes
// elsewhere than the configuration says. It returns the hints of these: a configuration may
// be older than what a hint says, and nobody may give the hint again. nw.mu is held.
func (nw *network) endPeers() (hints map[uint64]*moveHint) {
	hints = map[uint64]*moveHint{}
	for id, p := range nw.peers {
		m := nw.members[id]
		stays := nw.wantsPeer(id)
		if stays && m != nil {
			stays = p.adoptAddress(m)
		}
		if !stays {
			hints[id] = p.hint()
			nw.endPeer(id, p)
		}
	}
	return hints
}

// wantsPeer reports whether this node needs a stream to a peer: to a member, and to a
// stranger for as long as it has one to this node. nw.mu is held.
func (nw *network) wantsPeer(id uint64) bool {
	if slices.Contains(nw.removed, id) {
		return false
	}
	if nw.members[id] != nil {
		return true
	}
	return nw.inbound[inboundKey{id, false}] != nil || nw.inbound[inboundKey{id, true}] != nil
}

// addPeer starts a stream to a peer, which may be where a hint says; nil: there is none.
// What the peer's own hello says goes before that. nw.mu is held.
func (nw *network) addPeer(raftID uint64, node *kvpb.Node, hint *moveHint) {
	p := newPeer(nw, raftID, node)
	nw.peers[raftID] = p
	if s := nw.messagesFrom(raftID); s != nil {
		hint = &moveHint{s.hello.ClusterId, s.hello.From}
	}
	if hint != nil {
		p.takeHint(hint)
	}
	nw.start(p.run)
}

// messagesFrom returns the stream for messages from a peer; nil: there is none. nw.mu is
// held.
func (nw *network) messagesFrom(raftID uint64) *inboundStream {
	return nw.inbound[inboundKey{raftID, false}]
}

// send implements transport.
func (nw *network) send(to uint64, ms []*raftpb.Message) {
	nw.mu.Lock()
	p := nw.peers[to]
	nw.mu.Unlock()
	if p == nil || !p.enqueue(ms) {
		nw.dropped.Add(uint64(len(ms)))
	}
}

// queueLoad is what waits to be sent to a peer.
type queueLoad struct{ messages, bytes uint64 }

// queueLoads are those of peers, by raft ID.
type queueLoads map[uint64]queueLoad

// of is what waits to be sent to some peers together.
func (q queueLoads) of(raftIDs []uint64) (all queueLoad) {
	for _, id := range raftIDs {
		all.messages += q[id].messages
		all.bytes += q[id].bytes
	}
	return all
}

func (nw *network) queues() queueLoads {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	loads := queueLoads{}
	for id, p := range nw.peers {
		loads[id] = p.queued()
	}
	return loads
}

// tellRooms implements transport.
func (nw *network) tellRooms(all, news []*kvpb.RoomReport) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.rooms = all
	for _, p := range nw.peers {
		p.tellRooms(news)
	}
}

// streamBegan lets messages to a peer, which was found, in and tells the receiver;
// false: another peer has taken this one's place.
func (nw *network) streamBegan(p *peer, found *kvpb.Peer, target peerTarget) bool {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if nw.peers[p.raftID] != p {
		return false
	}
	if levelFromWire(found.Level) < nw.level {
		return false // the level has risen since it was called: at the next try, it is refused
	}
	p.connected(found, target.node)
	p.tellRooms(nw.rooms)
	nw.receiver.peerUp(p.raftID, true, found)
	if target.hint != nil {
		nw.receiver.peerMoved(p.raftID, target.node)
	}
	s := nw.messagesFrom(p.raftID)
	if s == nil {
		return true
	}
	if err := p.refuseRival(s.hello.From); err != nil {
		s.cancel(err) // or its node would wait for answers that go to the other process
	}
	return true
}

// streamEnded drops the messages to a peer and tells the receiver, unless another peer
// has taken this one's place. There may have been no stream: the attempt has failed. hasStopped:
// the peer has said that it was told to stop.
func (nw *network) streamEnded(p *peer, hasStopped bool) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	p.disconnected()
	if nw.peers[p.raftID] == p {
		if hasStopped {
			nw.receiver.peerStops(p.raftID)
		}
		nw.receiver.peerDown(p.raftID, true)
	}
}

// isOutOfTime reports whether ctx has ended, or its deadline is over. gRPC goes by the clock: it
// may end a call by ctx's deadline a moment before ctx ends.
func isOutOfTime(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	isOver := ok && !time.Now().Before(deadline)
	return isOver || ctx.Err() != nil
}

// sleep waits, or less if ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// refusal says why a peer would not talk to this node.
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
	case kvpb.Verdict_VERDICT_CALLER_TOO_OLD:
		return fmt.Errorf("node %d at %s is in a cluster of level %d, which the program of this node does not speak: "+
			"start a newer one here", n.Id, n.Address, w.ClusterLevel)
	case kvpb.Verdict_VERDICT_CALLED_TOO_OLD:
		return fmt.Errorf("the program of node %d at %s speaks levels up to %d, and the cluster of this node is of a higher level: "+
			"start a newer one there", n.Id, n.Address, levelFromWire(w.Peer.Level))
	}
	return fmt.Errorf("node %d at %s is another node than the member that was called, or has lost its memory", n.Id, n.Address)
}

var errSilent = errors.New("the other node is silent")

// silenceTimer ends a stream, unless it is reset or stopped within helloTimeout.
func silenceTimer(cancel context.CancelCauseFunc) *time.Timer {
	return time.AfterFunc(helloTimeout, func() { cancel(errSilent) })
}

// greet says hello and waits for the answer. The Welcome that it returns names a peer.
func greet(
	s kvpb.RaftService_StreamClient, h *kvpb.Hello, cancel context.CancelCauseFunc,
) (*kvpb.Welcome, error) {
	defer silenceTimer(cancel).Stop()
	err := s.Send(&kvpb.StreamRequest{Hello: h})
	if err != nil && err != io.EOF { // after io.EOF, Recv has the reason
		return nil, err
	}
	resp, err := s.Recv()
	if err != nil {
		return nil, err
	}
	p := resp.GetWelcome().GetPeer()
	namesPeer := p.GetNode() != nil && validRaftID(p.GetRaftId()) && p.GetLife() != 0
	if !namesPeer {
		return nil, errors.New("its answer to hello is no welcome")
	}
	return resp.Welcome, nil
}

// reserveCall waits for a place for a connection that serves but one call. The caller
// gives it back by release.
func (nw *network) reserveCall(ctx context.Context) (release func(), err error) {
	select {
	case nw.callPlaces <- struct{}{}:
		return func() { <-nw.callPlaces }, nil
	case <-ctx.Done():
		return nil, apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED,
			fmt.Sprintf("this node makes %d calls to other nodes, which is its limit", maxAsking))
	}
}

// probe asks who is at the address of a node. With TLS, only that node can answer.
func (nw *network) probe(ctx context.Context, node *kvpb.Node) (*kvpb.Welcome, error) {
	release, err := nw.reserveCall(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	conn := nw.dial(node)
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := kvpb.NewRaftServiceClient(conn).Stream(ctx)
	if err != nil {
		return nil, err
	}
	return greet(s, nw.receiver.hello(), cancel)
}

// Stream implements RaftService: it receives the messages of a peer.
func (nw *network) Stream(s kvpb.RaftService_StreamServer) error {
	return nw.serveHello(s, func(
		ctx context.Context, cancel context.CancelCauseFunc, silence *time.Timer,
	) error {
		first, err := s.Recv()
		if err != nil {
			return err
		}
		silence.Stop()
		if first.Hello == nil {
			return errNoHello
		}
		if err := isFrom(ctx, first.Hello.GetFrom().GetNode()); err != nil {
			return err
		}
		return nw.receiveStream(ctx, cancel, s, first.Hello)
	})
}

// receiveStream answers a hello and, if its sender is a peer, receives its messages.
func (nw *network) receiveStream(
	ctx context.Context, cancel context.CancelCauseFunc, s kvpb.RaftService_StreamServer, h *kvpb.Hello,
) error {
	w := nw.receiver.accept(h)
	isProbe := h.GetTo().GetRaftId() == 0
	if isProbe || w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
		return s.Send(&kvpb.StreamResponse{Welcome: w})
	}
	remove, err := nw.addInbound(h, false, cancel)
	if err == errRival {
		w.Verdict = kvpb.Verdict_VERDICT_RIVAL
		return s.Send(&kvpb.StreamResponse{Welcome: w})
	}
	if err != nil {
		return err
	}
	defer remove()
	releasePlace := connOf(s.Context()).usePeerPlace()
	defer releasePlace()
	w.Peers = nw.heardPeers(h.From.RaftId)
	if err := s.Send(&kvpb.StreamResponse{Welcome: w}); err != nil {
		return err
	}
	for {
		req, err := s.Recv()
		if err != nil {
			return err
		}
		if len(req.Rooms) > 0 {
			if err := nw.receiver.receiveRooms(ctx, h, req.Rooms); err != nil {
				return err
			}
		}
		if err := nw.receiver.receiveMessages(ctx, fromWire(req.Messages, h)); err != nil {
			return err
		}
	}
}

var (
	errNoHello = status.Error(codes.InvalidArgument, "the first request has no hello")
	errRival   = status.Error(codes.FailedPrecondition,
		"another process with this raft ID is connected, elsewhere")
)

// streamHandler does the work of a stream. It may end the stream by cancel. The stream
// ends, too, if silence is neither reset nor stopped within helloTimeout.
type streamHandler func(
	ctx context.Context, cancel context.CancelCauseFunc, silence *time.Timer,
) error

// serveHello is serve for a stream that begins with a hello. It closes a connection
// that has too many of these.
func (nw *network) serveHello(s grpc.ServerStream, handle streamHandler) error {
	c := connOf(s.Context())
	if !c.greeted() {
		_ = c.Close()
		return status.Error(codes.ResourceExhausted, "too many hellos on this connection")
	}
	err := nw.serve(s, handle)
	if err != nil && nw.failed.Load() {
		return &streamEnd{errNodeFailed}
	}
	return err
}

// errNodeFailed ends the streams of peers to a node that cannot go on: it was not told to stop.
var errNodeFailed = errors.New("this node has failed")

// streamEnd says why a stream was ended from outside: ABORTED, unless the API has a code
// for the cause.
type streamEnd struct{ cause error }

func (e *streamEnd) Error() string { return e.cause.Error() }
func (e *streamEnd) Unwrap() error { return e.cause }

// GRPCStatus is what gRPC takes the error for.
func (e *streamEnd) GRPCStatus() *status.Status { return status.New(codes.Aborted, e.Error()) }

// serve has a goroutine of its own handle a stream, and returns as soon as the stream is
// cancelled or the network closed. That tears the stream down, so the goroutine, which
// may be waiting in it, returns, too.
func (nw *network) serve(s grpc.ServerStream, handle streamHandler) error {
	ctx, cancel := context.WithCancelCause(s.Context())
	defer cancel(nil)
	silence := silenceTimer(cancel)
	defer silence.Stop()
	ended := make(chan error, 1)
	nw.mu.Lock()
	nw.start(func() { ended <- handle(ctx, cancel, silence) })
	nw.mu.Unlock()
	select {
	case err := <-ended:
		if err == io.EOF {
			return nil
		}
		return err
	case <-ctx.Done():
		return &streamEnd{context.Cause(ctx)}
	case <-nw.ctx.Done():
		return toStatus(errStopping, false)
	}
}

// addInbound lets a stream from a peer, for messages or a snapshot, take the place of an
// earlier one, until remove is called. If there is no stream to the peer, as to one that
// the configuration does not name yet, it starts one: answers go there. A snapshot is
// taken only from a peer that has a stream for messages.
func (nw *network) addInbound(
	h *kvpb.Hello, snapshot bool, cancel context.CancelCauseFunc,
) (remove func(), err error) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	id := h.From.RaftId
	if slices.Contains(nw.removed, id) {
		return nil, status.Error(codes.Unavailable, "its removal is about to be known")
	}
	if levelFromWire(h.From.Level) < nw.level {
		return nil, status.Error(codes.Unavailable, "the level of the cluster has just risen above its program's")
	}
	if snapshot && nw.messagesFrom(id) == nil {
		return nil, status.Error(codes.FailedPrecondition, "there is no stream for messages from its sender")
	}
	if nw.peers[id] == nil {
		if len(nw.peers) >= nw.maxPeers {
			return nil, status.Error(codes.ResourceExhausted, "too many peers that no configuration names")
		}
		nw.addPeer(id, h.From.GetNode(), nil)
	}
	p := nw.peers[id]
	if err := p.refuseRival(h.From); err != nil {
		return nil, err
	}
	key := inboundKey{id, snapshot}
	if old := nw.inbound[key]; old != nil {
		old.cancel(errors.New("replaced by a newer stream"))
	}
	s := &inboundStream{h, cancel}
	nw.inbound[key] = s
	if !snapshot {
		p.watchTurns(h.From)
		p.takeHint(&moveHint{h.ClusterId, h.From})
		nw.receiver.peerUp(id, false, h.From)
	}
	return func() { nw.removeInbound(key, s) }, nil
}

// removeInbound forgets a stream from a peer, unless another has taken its place.
func (nw *network) removeInbound(key inboundKey, s *inboundStream) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if nw.inbound[key] == s {
		delete(nw.inbound, key)
	}
	nw.endPeers()
}

// heardPeers returns the other peers that have a stream to this node, and from where: the
// peer by, which gets the list, may have moved at the same time as they. The list has those,
// too, that this node does not know as members: its configuration may be older than by's.
func (nw *network) heardPeers(by uint64) []*kvpb.Peer {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	var peers []*kvpb.Peer
	for key, s := range nw.inbound {
		isOther := key.raftID != by
		if isOther && !key.snapshot {
			peers = append(peers, s.hello.From)
		}
	}
	return peers
}

// callStranger says hello to somebody whom another peer hears and this node does not know: its
// configuration may be older than that of others, who look for it at an earlier address.
// They find it by that hello. nw.mu is held.
func (nw *network) callStranger(other *kvpb.Peer) {
	isSelf := other.Node.Id == nw.receiver.hello().From.Node.Id
	isRemoved := slices.Contains(nw.removed, other.RaftId)
	if isSelf || isRemoved || len(nw.peers) >= nw.maxPeers {
		return
	}
	nw.addPeer(other.RaftId, other.Node, nil)
}

// learnAddresses takes in where a peer hears other peers. Those with a stream to this
// node have said themselves where they are.
func (nw *network) learnAddresses(clusterID uint64, peers []*kvpb.Peer) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	for _, other := range peers {
		if !isPeer(other) {
			continue
		}
		p := nw.peers[other.RaftId]
		if p == nil {
			nw.callStranger(other)
			continue
		}
		if !p.isConnected() && nw.messagesFrom(other.RaftId) == nil {
			p.takeHint(&moveHint{clusterID, other})
		}
	}
}
