// The streams that snapshots are sent and received by.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// sendSnapshot implements transport.
func (nw *network) sendSnapshot(to, life, term uint64, v *view) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	p := nw.peers[to]
	if p == nil || nw.ctx.Err() != nil {
		nw.r.snapshotSent(to, v, errors.New("no stream to the peer"))
		return
	}
	nw.goroutine(func() { nw.r.snapshotSent(to, v, p.snapshot(life, term, v)) })
}

// snapshot sends a view over a connection of its own, so that it delays no
// heartbeat.
func (p *peer) snapshot(life, term uint64, v *view) error {
	p.mu.Lock()
	node := oneOf(p.life == life, p.at, p.node)
	p.mu.Unlock()
	conn := p.nw.dial(node.Address)
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancelCause(p.ctx)
	defer cancel(nil)
	s, err := kvpb.NewRaftServiceClient(conn).InstallSnapshot(ctx)
	if err != nil {
		return err
	}
	silent := alarm(cancel)
	defer silent.Stop()
	h := p.nw.r.hello()
	h.To = &kvpb.Peer{Node: node, RaftId: p.raftID, Life: life}
	began, sent := time.Now(), 0
	if err = s.Send(&kvpb.InstallSnapshotRequest{Hello: h, Term: term}); err == nil {
		err = v.writeTo(chunkWriter(func(b []byte) error {
			if v.givenUp.Load() {
				rate := float64(sent) / time.Since(began).Seconds()
				return fmt.Errorf("%w: it took %.0f bytes of it a second", errTooSlow, rate)
			}
			sent += len(b)
			err := s.Send(&kvpb.InstallSnapshotRequest{Data: b})
			silent.Reset(helloTimeout)
			return err
		}))
	}
	if err == nil || err == io.EOF { // the answer has the receiver's reason
		_, err = s.CloseAndRecv()
	}
	if err != nil && context.Cause(ctx) == errSilent {
		err = errSilent
	}
	return err
}

// errTooSlow ends a transfer that the log could not be kept for.
var errTooSlow = errors.New("the snapshot did not reach it in time")

// chunkWriter sends what is written to it.
type chunkWriter func([]byte) error

func (f chunkWriter) Write(b []byte) (int, error) { return len(b), f(b) }

// InstallSnapshot implements RaftService.
func (nw *network) InstallSnapshot(s kvpb.RaftService_InstallSnapshotServer) error {
	return nw.serveHello(s, func(ctx context.Context, cancel context.CancelCauseFunc, silent *time.Timer) error {
		first, err := s.Recv()
		if err != nil {
			return err
		}
		h := first.Hello
		if h == nil {
			return errNoHello
		}
		if w := nw.r.accept(h); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || h.GetTo().GetRaftId() == 0 || h.GetTo().GetLife() != w.Peer.Life {
			return status.Error(codes.FailedPrecondition, "refused: "+refusal(w).Error())
		}
		done, err := nw.hear(h, true, cancel)
		if err != nil {
			return err
		}
		defer done()
		defer connOf(s.Context()).heard()()
		select {
		case nw.receiving <- struct{}{}:
			defer func() { <-nw.receiving }()
		default:
			return status.Error(codes.ResourceExhausted, "too many snapshots are being received")
		}
		st, err := nw.r.readSnapshot(&chunkReader{first.Data, func() ([]byte, error) {
			req, err := s.Recv()
			silent.Reset(helloTimeout)
			return req.GetData(), err
		}})
		if err != nil {
			return status.Error(codes.DataLoss, err.Error())
		}
		silent.Stop()
		if err := nw.r.receiveSnapshot(ctx, h, first.Term, st); err != nil {
			return status.Error(codes.FailedPrecondition, err.Error())
		}
		return s.SendAndClose(&kvpb.InstallSnapshotResponse{})
	})
}

// chunkReader reads what a chunkWriter has sent.
type chunkReader struct {
	data []byte // received, not yet read
	recv func() ([]byte, error)
}

func (c *chunkReader) Read(b []byte) (n int, err error) {
	for len(c.data) == 0 && err == nil {
		c.data, err = c.recv() // io.EOF: all was sent
	}
	n = copy(b, c.data)
	c.data = c.data[n:]
	return n, err
}
