// A peer: this node's stream to another node, which carries raft's messages.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// maxPeerBytes and maxPeerMessages bound what waits to be sent to a peer; raft's own
	// limits of what is in flight keep it below that. The bytes are mostly those of entries,
	// which the queue shares with the log: what messageBytes adds to them for so many
	// messages is 512 KiB.
	maxPeerBytes    = 32 << 20
	maxPeerMessages = 8192
	// maxStreamBytes is where a batch of messages is cut. The message that reaches it is
	// still sent: with one more entry of maxEntryBytes, or one larger write, the batch
	// has to fit maxMessageBytes.
	maxStreamBytes = 1 << 20
	// Between the end of a stream and the next attempt a peer's goroutine pauses, for a
	// random time from minRedialPause to maxRedialPause. So a peer that answers but
	// refuses is asked at most 10 times a second, which hellosPerSecond allows.
	minRedialPause = 100 * time.Millisecond
	maxRedialPause = 400 * time.Millisecond
)

// peer is this node's stream to another node. Its goroutine, run, dials the peer, says
// hello and sends what is queued; when the stream ends it begins again.
type peer struct {
	nw          *network
	receiver    receiver
	raftID      uint64
	hintTimeout time.Duration // until an attempt at a hint's address is given up
	ctx         context.Context
	cancel      context.CancelFunc
	wake        bell    // rung when something was queued
	log         peerLog // the goroutine's alone, but for its logger
	slowSends   slowLog

	// mu guards what follows. network.go says in which order locks are taken.
	mu        sync.Mutex
	addresses peerAddresses
	life      uint64     // of the process at the other end of the stream; 0: there is no stream
	level     uint32     // that this process speaks
	at        *kvpb.Node // where the stream goes
	queue     sendQueue
	rooms     []*kvpb.RoomReport // that wait to be sent, one of each member; while there is a stream
	yielding  *streamAttempt     // ends when a hint names another address; nil: there is none that does
	rivals    rivals
}

// newPeer makes a peer that is known at an address; run is to be started.
func newPeer(nw *network, raftID uint64, node *kvpb.Node) *peer {
	p := &peer{
		nw:          nw,
		receiver:    nw.receiver,
		raftID:      raftID,
		hintTimeout: 2 * nw.connectTimeout,
		wake:        newBell(),
		log:         peerLog{logger: nw.logger},
		addresses:   peerAddresses{known: node},
	}
	p.ctx, p.cancel = context.WithCancel(nw.ctx)
	return p
}

// enqueue queues messages for the peer; false: they were dropped.
func (p *peer) enqueue(ms []*raftpb.Message) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life == 0 {
		return false // raft has learned of it, or will, from peerDown
	}
	wasDropping := p.queue.dropping
	if !p.queue.add(ms) {
		if !wasDropping {
			p.receiver.peerDown(p.raftID, false)
		}
		return false
	}
	p.wake.ring()
	return true
}

// queued is what waits to be sent to the peer.
func (p *peer) queued() queueLoad {
	p.mu.Lock()
	defer p.mu.Unlock()
	return queueLoad{messages: uint64(len(p.queue.messages)), bytes: p.queue.bytes}
}

// tellRooms has the peer told who has how much room, if there is a stream to it.
func (p *peer) tellRooms(rooms []*kvpb.RoomReport) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life == 0 || len(rooms) == 0 {
		return
	}
	for _, r := range rooms {
		isOld := func(o *kvpb.RoomReport) bool { return o.RaftId == r.RaftId }
		p.rooms = append(slices.DeleteFunc(p.rooms, isOld), r)
	}
	p.wake.ring()
}

// takeBatch takes what is to be sent next; nil: there is nothing.
func (p *peer) takeBatch() *kvpb.StreamRequest {
	p.mu.Lock()
	defer p.mu.Unlock()
	ms := p.queue.takeBatch()
	if len(ms)+len(p.rooms) == 0 {
		return nil
	}
	batch := &kvpb.StreamRequest{Messages: toWire(ms), Rooms: p.rooms}
	p.rooms = nil
	return batch
}

// connected begins to queue messages for the peer: a process, found, has answered at where.
func (p *peer) connected(found *kvpb.Peer, where *kvpb.Node) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.life = found.Life
	p.level = levelFromWire(found.Level)
	p.at = where
	p.queue = sendQueue{}
	p.rooms = nil
	if where.Address == p.addresses.known.Address {
		p.addresses.hint = nil // the peer is where it was
	}
}

// disconnected drops what is queued, and all messages until the peer is connected.
func (p *peer) disconnected() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.life = 0
	p.at = nil
	p.queue = sendQueue{}
	p.rooms = nil
}

// speaks reports whether the process at the other end of the stream, if there is one, speaks
// a level.
func (p *peer) speaks(level uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.life == 0 || p.level >= level
}

// isConnected reports whether there is a stream to the peer.
func (p *peer) isConnected() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.life != 0
}

// location returns where the peer is, as far as this node knows, and the life of its
// process; 0: there is no stream to it.
func (p *peer) location() (at *kvpb.Node, life uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life == 0 {
		return p.addresses.known, 0
	}
	return p.at, p.life
}

// sendQueue is what waits to be sent to a peer. Its zero value is empty.
type sendQueue struct {
	messages []*raftpb.Message
	bytes    uint64 // of the messages, as messageBytes counts them
	dropping bool   // messages were dropped since the queue was last empty
}

// add appends messages; false: the queue is full, and they were dropped.
func (q *sendQueue) add(ms []*raftpb.Message) bool {
	if len(q.messages)+len(ms) > maxPeerMessages || q.bytes > maxPeerBytes {
		q.dropping = true
		return false
	}
	for _, m := range ms {
		q.bytes += messageBytes(m)
	}
	q.messages = append(q.messages, ms...)
	return true
}

// takeBatch removes the first messages, up to the one that reaches maxStreamBytes, and
// returns them.
func (q *sendQueue) takeBatch() []*raftpb.Message {
	n := 0
	size := uint64(0)
	for n < len(q.messages) && size < maxStreamBytes {
		size += messageBytes(q.messages[n])
		n++
	}
	batch := q.messages[:n:n]
	q.messages = q.messages[n:]
	q.bytes -= size
	if len(q.messages) == 0 {
		q.messages = nil // frees the array
		q.dropping = false
	}
	return batch
}

// messageBytes is what a message counts for in a queue.
func messageBytes(m *raftpb.Message) uint64 {
	n := uint64(64)
	for _, e := range m.GetEntries() {
		n += entryBytes(e)
	}
	return n
}

// moveHint says that a peer is at another address than the known one: its own hello
// came from there, or another member says so. Anybody could; it is believed once the
// life of the peer that it names answers there.
type moveHint struct {
	clusterID uint64
	peer      *kvpb.Peer
}

// peerAddresses is where a peer may be.
type peerAddresses struct {
	known    *kvpb.Node // as the configuration has it; of a peer that it does not name, as its hello does
	hint     *moveHint  // the newest that names another address; nil: there is none
	hintNext bool       // the next attempt is made at the hint's address
}

// take lets a hint take the place of an older one.
func (a *peerAddresses) take(h *moveHint) {
	a.hint = h
	if h.peer.Node.Address == a.known.Address {
		a.hint = nil
	}
}

// next returns where the next attempt is made: at the known address and at the hint's
// in turn.
func (a *peerAddresses) next() peerTarget {
	target := peerTarget{node: a.known, isOnly: a.hint == nil}
	if a.hintNext && a.hint != nil {
		target.node = a.hint.peer.Node
		target.hint = a.hint
	}
	a.hintNext = target.hint == nil
	return target
}

// peerTarget is whom an attempt is made to reach.
type peerTarget struct {
	node   *kvpb.Node
	hint   *moveHint // that names this address; nil: it is the known one
	isOnly bool      // no other address waits for its turn
}

// answers reports whether a Welcome is from the peer that was meant.
func (t peerTarget) answers(raftID uint64, w *kvpb.Welcome) bool {
	if w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || w.Peer.RaftId != raftID {
		return false
	}
	if t.hint == nil {
		return true
	}
	return w.ClusterId == t.hint.clusterID && w.Peer.Life == t.hint.peer.Life
}

func (p *peer) nextTarget() peerTarget {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addresses.next()
}

// adoptAddress takes over the address that a new configuration has, if the stream goes
// there already. It reports whether the peer can stay: if not, a new one has to take its
// place.
func (p *peer) adoptAddress(node *kvpb.Node) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life != 0 && p.at.Address == node.Address {
		p.addresses.known = node
		p.addresses.hint = nil
	}
	return p.addresses.known.Address == node.Address
}

// hint returns the hint that waits for its turn; nil: there is none.
func (p *peer) hint() *moveHint {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addresses.hint
}

// takeHint keeps a hint for the next attempts. If one is under way that yields, and the
// hint names another address than it is made at, that attempt ends, unless its stream has
// reached the process that the hint is of.
func (p *peer) takeHint(h *moveHint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h.peer.Node.Id != p.addresses.known.Id {
		return
	}
	p.addresses.take(h)
	if p.yielding == nil || p.life == h.peer.Life {
		return
	}
	if p.yielding.target.node.Address != h.peer.Node.Address {
		p.yielding.cancel(errElsewhere)
	}
}

// run is the peer's goroutine. It keeps the connection while the address stays the same.
func (p *peer) run() {
	var conn *grpc.ClientConn
	var address string
	for p.ctx.Err() == nil {
		target := p.nextTarget()
		if conn != nil && target.node.Address != address {
			_ = conn.Close()
			conn = nil
		}
		if conn == nil {
			address = target.node.Address
			conn = p.nw.dial(target.node)
		}
		state := p.attempt(conn, target)
		p.nw.streamEnded(p, state == peerStops)
		sleep(p.ctx, minRedialPause+rand.N(maxRedialPause-minRedialPause))
	}
	if conn != nil {
		_ = conn.Close()
	}
}

// attempt opens a stream, sends on it until it ends, and logs and returns what came of it.
func (p *peer) attempt(conn *grpc.ClientConn, target peerTarget) (state string) {
	a := &streamAttempt{peer: p, conn: conn, target: target}
	a.ctx, a.cancel = context.WithCancelCause(p.ctx)
	defer a.cancel(nil)
	state, err := a.run()
	hadStream := state == peerDisconnected
	if hadStream && errorReason(err) == reasonStopping {
		state = peerStops
	}
	switch {
	case target.hint != nil && !hadStream:
		p.logNotFound(target.node, err)
	case state == peerStops:
		p.logState(state)
	default:
		p.logState(state, "err", err)
	}
	return state
}

// streamAttempt is one try to open a stream to a peer and, once it has succeeded, that stream.
type streamAttempt struct {
	peer   *peer
	conn   *grpc.ClientConn
	target peerTarget
	ctx    context.Context
	cancel context.CancelCauseFunc
}

// errElsewhere ends an attempt for the sake of another address.
var errElsewhere = errors.New("it says that it is elsewhere")

// run returns when the attempt has failed or its stream has ended: the peer's state then,
// and why.
func (a *streamAttempt) run() (state string, cause error) {
	p := a.peer
	if a.target.hint != nil {
		// Anybody can make up a hint, which must not keep this node from the known address.
		timer := time.AfterFunc(p.hintTimeout, a.giveUpHint)
		defer timer.Stop()
		a.yieldToHints()
		defer a.stopYielding()
	}
	s, err := a.open()
	if err != nil {
		return peerUnreachable, err
	}
	h := p.receiver.hello()
	h.To = &kvpb.Peer{Node: a.target.node, RaftId: p.raftID}
	w, err := greet(s, h, a.cancel)
	if err != nil {
		return peerUnreachable, err
	}
	if !a.target.answers(p.raftID, w) {
		if a.target.hint == nil { // at a hint's address it may be anybody
			p.receiver.refused(h.From.RaftId, p.raftID, w)
		}
		if isOnItsWay(h, w) {
			return peerNotThere, refusal(w)
		}
		return peerRefuses, refusal(w)
	}
	if !p.nw.streamBegan(p, w.Peer, a.target) {
		return peerUnreachable, context.Canceled // p was given up: nothing is logged
	}
	p.nw.learnAddresses(h.ClusterId, w.Peers)
	if a.target.hint == nil {
		p.logState(peerConnected)
	} else {
		p.log.notFoundAt = ""
		p.logState(peerMoved, "found", a.target.node.Address)
	}
	return peerDisconnected, a.send(s)
}

// open waits for a connection and opens the stream. If another address waits for its
// turn, it does not wait for a peer that cannot be connected to at once.
func (a *streamAttempt) open() (kvpb.RaftService_StreamClient, error) {
	defer silenceTimer(a.cancel).Stop()
	if a.target.isOnly {
		a.yieldToHints()
		defer a.stopYielding()
	}
	s, err := kvpb.NewRaftServiceClient(a.conn).Stream(a.ctx, grpc.WaitForReady(a.target.isOnly))
	if err != nil && context.Cause(a.ctx) == errElsewhere {
		err = errElsewhere
	}
	return s, err
}

// send sends what is queued until the stream ends.
func (a *streamAttempt) send(s kvpb.RaftService_StreamClient) error {
	go func() {
		_, err := s.Recv() // the peer sends nothing: this returns when the stream ends
		a.cancel(fmt.Errorf("the stream ended: %w", err))
	}()
	for {
		select {
		case <-a.peer.wake:
		case <-a.ctx.Done():
			return context.Cause(a.ctx)
		}
		for batch := a.peer.takeBatch(); batch != nil; batch = a.peer.takeBatch() {
			begun := time.Now()
			err := s.Send(batch)
			if err == io.EOF { // the stream has ended, and Recv says why
				<-a.ctx.Done()
				return context.Cause(a.ctx)
			}
			if err != nil {
				return fmt.Errorf("sending: %w", err)
			}
			a.peer.noteSlowSend(time.Since(begun))
		}
	}
}

// yieldToHints lets a hint of another address end the attempt from now on. One at the
// known address ends at once if a hint came just before. One at a hint's address need not:
// hintTimeout ends it.
func (a *streamAttempt) yieldToHints() {
	p := a.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	p.yielding = a
	if a.target.hint == nil && p.addresses.hint != nil {
		a.cancel(errElsewhere)
	}
}

func (a *streamAttempt) stopYielding() {
	a.peer.mu.Lock()
	defer a.peer.mu.Unlock()
	a.peer.yielding = nil
}

// giveUpHint ends an attempt at a hint's address, unless the peer was found there.
func (a *streamAttempt) giveUpHint() {
	a.peer.mu.Lock()
	defer a.peer.mu.Unlock()
	if a.peer.life == 0 {
		a.cancel(errSilent)
	}
}

// rivals is what is known of processes that go by a peer's raft ID.
type rivals struct {
	lives   [2]uint64 // the last two that said hello, the newest first
	returns int       // how many hellos in a row were of the life before the newest
	logged  uint64    // the life that the log has named
}

// note takes in the life of a hello. It reports, once, that two lives take turns: a life
// that has ended does not come back. A single return may be a hello that came late.
func (r *rivals) note(life uint64) (takeTurns bool) {
	switch life {
	case r.lives[0]:
		return false
	case r.lives[1]:
		r.returns++
	default:
		r.returns = 0
	}
	r.lives = [2]uint64{life, r.lives[0]}
	return r.returns == 2
}

// watchTurns logs two processes that take turns, and that refuseRival lets pass: at one
// address, or while there is no stream to either.
func (p *peer) watchTurns(from *kvpb.Peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rivals.note(from.Life) {
		p.logRival(from)
	}
}

// refuseRival returns errRival, and logs it, if a hello is of another process than the
// one that this node has a stream to. If the peer has moved, the stream is about to
// break, and the next hello is accepted. A hello from the stream's own address is of no
// rival: there, one process has followed the other. Nor is one from the known address:
// that counts more than the hint which the stream was opened by.
func (p *peer) refuseRival(from *kvpb.Peer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life == 0 || p.life == from.Life {
		return nil
	}
	address := from.Node.Address
	if address == p.at.Address || address == p.addresses.known.Address {
		return nil
	}
	p.logRival(from)
	return errRival
}

// logRival logs once that two processes are one node. p.mu is held.
func (p *peer) logRival(from *kvpb.Peer) {
	if p.rivals.logged == from.Life {
		return
	}
	p.rivals.logged = from.Life
	p.log.logger.Warn("another process goes by a peer's raft ID: "+
		"the peer has moved, and its old connection breaks soon, "+
		"or one of the two was started from a copy of the other's data directory and has to be stopped",
		"peer", p.addresses.known.Id, "address", p.at.GetAddress(), "other_address", shown(from.Node.Address))
}

// States of a peer, as they are logged.
const (
	peerConnected    = "peer connected"
	peerMoved        = "peer connected at another address than the known one"
	peerStops        = "peer stops"
	peerDisconnected = "peer lost: the connection to it has broken"
	peerUnreachable  = "peer cannot be reached"
	peerRefuses      = "peer refuses this node"
	peerNotThere     = "peer and this node are not members of one cluster yet"
)

// levelOf is the level at which a state of a peer is logged.
func levelOf(state string) slog.Level {
	switch state {
	case peerDisconnected, peerUnreachable, peerRefuses:
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// isOnItsWay reports whether who refuses a hello does so for a while only: one of both nodes is in
// no cluster yet, or it is the node that was called, which has lost its memory: it is being taken
// back, or was already.
func isOnItsWay(h *kvpb.Hello, w *kvpb.Welcome) bool {
	switch w.Verdict {
	case kvpb.Verdict_VERDICT_OTHER_CLUSTER:
		return h.ClusterId == 0 || w.ClusterId == 0
	case kvpb.Verdict_VERDICT_NOT_ME:
		return proto.Equal(h.To.GetNode(), w.Peer.GetNode())
	}
	return false
}

// peerLog logs what becomes of a peer, but not the same state again at each attempt.
type peerLog struct {
	logger     *slog.Logger
	last       string // the state that was logged last; of a refusal, with its cause
	notFoundAt string // the hint's address at which the peer was not found, as logged last
}

// state logs a state that is new. That a peer cannot be reached is not new if it was lost, or has
// stopped.
func (l *peerLog) state(node *kvpb.Node, state string, cause []any) {
	text := state
	if state == peerRefuses || state == peerNotThere {
		text = fmt.Sprint(state, cause)
	}
	if text == l.last {
		return
	}
	wasThere := l.last == peerDisconnected || l.last == peerStops
	if state == peerUnreachable && wasThere {
		return
	}
	l.last = text
	args := append(peerArgs(node), cause...)
	l.logger.Log(context.Background(), levelOf(state), state, args...)
}

// notFound logs once that a peer was not found at a hint's address.
func (l *peerLog) notFound(at *kvpb.Node, err error) {
	if l.notFoundAt == at.Address {
		return
	}
	l.notFoundAt = at.Address
	l.logger.Info("peer not found where it says that it is",
		append(peerArgs(at), "err", err)...)
}

// logState logs a state of the peer, unless the peer was given up.
func (p *peer) logState(state string, cause ...any) {
	if p.ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	node := p.addresses.known
	p.mu.Unlock()
	p.log.state(node, state, cause)
}

// logNotFound logs that the peer was not found at a hint's address, unless the peer was
// given up.
func (p *peer) logNotFound(at *kvpb.Node, err error) {
	if p.ctx.Err() == nil {
		p.log.notFound(at, err)
	}
}
