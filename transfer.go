// The streams that snapshots are sent and received by.

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// snapshotChunkBytes is how much of a snapshot is one message: as much as a batch of raft's
// messages, for over a long way that decides how fast it is (windowBytes). More would take
// longer than helloTimeout on a slow line.
const snapshotChunkBytes = maxStreamBytes

// sendSnapshot implements transport.
func (nw *network) sendSnapshot(to, term uint64, v *view) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	p := nw.peers[to]
	if p == nil || nw.ctx.Err() != nil {
		nw.receiver.snapshotSent(to, v, errors.New("no stream to the peer"))
		return
	}
	nw.start(func() { nw.receiver.snapshotSent(to, v, p.sendSnapshot(term, v)) })
}

// sendSnapshot sends a view to the peer, to the process that the stream for messages
// goes to if there is one, and waits until raft has taken it there. It has a connection
// of its own, so as to delay no heartbeat.
func (p *peer) sendSnapshot(term uint64, v *view) error {
	node, life := p.location()
	conn := p.nw.dial(node)
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancelCause(p.ctx)
	defer cancel(nil)
	s, err := kvpb.NewRaftServiceClient(conn).InstallSnapshot(ctx)
	if err != nil {
		return err
	}
	silence := silenceTimer(cancel)
	defer silence.Stop()
	h := p.receiver.hello()
	h.To = &kvpb.Peer{Node: node, RaftId: p.raftID, Life: life}
	err = s.Send(&kvpb.InstallSnapshotRequest{Hello: h, Term: term})
	if err == nil {
		err = sendChunks(s, v, silence)
	}
	if err == nil || err == io.EOF { // after io.EOF, the answer has the receiver's reason
		_, err = s.CloseAndRecv()
	}
	if err != nil && context.Cause(ctx) == errSilent {
		err = errSilent
	}
	return err
}

// errTooSlow ends a transfer for which the log would have grown too long.
var errTooSlow = errors.New("the snapshot did not reach it in time")

// sendChunks sends a view until the loop gives it up. It resets silence at each chunk.
func sendChunks(
	s kvpb.RaftService_InstallSnapshotClient, v *view, silence *time.Timer,
) error {
	start := time.Now()
	sent := 0
	w := bufio.NewWriterSize(chunkWriter(func(b []byte) error {
		if v.givenUp.Load() {
			rate := float64(sent) / time.Since(start).Seconds()
			return fmt.Errorf("%w: it took %.0f bytes of it a second", errTooSlow, rate)
		}
		sent += len(b)
		err := s.Send(&kvpb.InstallSnapshotRequest{Data: b})
		silence.Reset(helloTimeout)
		return err
	}), snapshotChunkBytes)
	if err := v.writeTo(w); err != nil {
		return err
	}
	return w.Flush()
}

// chunkWriter is an io.Writer that sends what is written to it as one chunk.
type chunkWriter func([]byte) error

func (send chunkWriter) Write(b []byte) (int, error) { return len(b), send(b) }

// InstallSnapshot implements RaftService: it receives a snapshot from a peer.
func (nw *network) InstallSnapshot(s kvpb.RaftService_InstallSnapshotServer) error {
	return nw.serveHello(s, func(
		ctx context.Context, cancel context.CancelCauseFunc, silence *time.Timer,
	) error {
		first, err := s.Recv()
		if err != nil {
			return err
		}
		h := first.Hello
		if h == nil {
			return errNoHello
		}
		if err := isFrom(ctx, h.GetFrom().GetNode()); err != nil {
			return err
		}
		w := nw.receiver.accept(h)
		isProbe := h.GetTo().GetRaftId() == 0
		if isProbe || w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED {
			return status.Error(codes.FailedPrecondition, "refused: "+refusal(w).Error())
		}
		remove, err := nw.addInbound(h, true, cancel)
		if err != nil {
			return err
		}
		defer remove()
		return nw.receiveChunks(ctx, s, first, silence)
	})
}

// receiveChunks reads a snapshot whose first request was accepted and hands it to the
// receiver. It resets silence at each chunk.
func (nw *network) receiveChunks(
	ctx context.Context, s kvpb.RaftService_InstallSnapshotServer,
	first *kvpb.InstallSnapshotRequest, silence *time.Timer,
) error {
	releasePlace := connOf(s.Context()).usePeerPlace()
	defer releasePlace()
	select {
	case nw.snapshotPlaces <- struct{}{}:
		defer func() { <-nw.snapshotPlaces }()
	default:
		return status.Error(codes.ResourceExhausted, "too many snapshots are being received")
	}
	snapshot, err := nw.receiver.readSnapshot(&chunkReader{first.Data, func() ([]byte, error) {
		req, err := s.Recv()
		silence.Reset(helloTimeout)
		return req.GetData(), err
	}})
	if err != nil {
		return status.Error(codes.DataLoss, err.Error())
	}
	silence.Stop() // raft may take its time
	err = nw.receiver.receiveSnapshot(ctx, first.Hello, first.Term, snapshot)
	if err != nil {
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	return s.SendAndClose(&kvpb.InstallSnapshotResponse{})
}

// chunkReader is an io.Reader of the chunks that a chunkWriter has sent.
type chunkReader struct {
	data []byte                 // received, not yet read
	recv func() ([]byte, error) // returns the next chunk; io.EOF: all was received
}

func (r *chunkReader) Read(b []byte) (int, error) {
	var err error
	for len(r.data) == 0 && err == nil {
		r.data, err = r.recv()
	}
	n := copy(b, r.data)
	r.data = r.data[n:]
	return n, err
}
