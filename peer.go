// A peer: this node's stream to another node.

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"

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
	// Between the end of a stream and the next attempt a peer's goroutine pauses, for a
	// random time from minRedialPause to maxRedialPause. So a peer that answers but
	// refuses is asked at most 10 times a second, which hellosPerSecond allows.
	minRedialPause = 100 * time.Millisecond
	maxRedialPause = 400 * time.Millisecond
)

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
		sleep(p.ctx, minRedialPause+rand.N(maxRedialPause-minRedialPause))
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
