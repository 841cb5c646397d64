// Pipeline: many operations on one stream, without a goroutine or a message for each.
// Writes go into the log as the bytes that came: messages for them would take a large
// part of what a stream reaches.

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"raft-key-value/kvpb"
)

const (
	// maxPipelineCalls and maxPipelineBytes bound what of a stream is not
	// answered: beyond either, no further request is read.
	maxPipelineCalls = 8 << 10
	maxPipelineBytes = 8 << 20
	// maxQueuedRequests bounds the requests of a stream that wait to be answered: they
	// may be empty, and so not be bounded by what they ask.
	maxQueuedRequests = 64
	// answerBytes is where answers are cut into messages: one more may follow.
	answerBytes = 256 << 10
)

// pipelineRequest is the operations of one PipelineRequest, on their way.
type pipelineRequest struct {
	ops     []operation
	calls   []call // one to each operation; outcome has the error of an invalid one
	bytes   int
	refused int           // operations that the caller may not make
	pending int           // calls that have not ended: the loop's, once started
	done    chan struct{} // closed when none is pending
}

// parsePipelineRequest parses a PipelineRequest, of which the operations stay parts. An
// operation that is invalid gets its own error, and so does a write if its caller may not
// write; what is no list of operations, or too long a one, is an error of all. Sessions
// that are opened get the owner.
func parsePipelineRequest(m []byte, mayWrite bool, owner string) (*pipelineRequest, error) {
	count := 0
	for f := (fields{rest: m, repeated: 1}); len(f.rest) > 0; count++ {
		isOperation := f.next() && f.num == 1 && f.b != nil
		if !isOperation || count == maxPipelineCalls {
			return nil, invalid("operations", "it is malformed, or there are more than %d", maxPipelineCalls)
		}
	}
	r := &pipelineRequest{
		ops:   make([]operation, count),
		calls: make([]call, count),
		bytes: len(m),
		done:  make(chan struct{}),
	}
	f := fields{rest: m, repeated: 1}
	for i := range r.ops {
		f.next()
		r.calls[i].request = r
		c := &r.calls[i]
		c.write, c.outcome.err = r.ops[i].parseCall(f.b, owner)
		isWrite := c.write != nil
		if isWrite && !mayWrite {
			c.outcome.err = errReadOnly
			r.refused++
		}
	}
	return r, nil
}

// start leaves in the inbox what has to go through the loop: all but what is invalid,
// and local reads.
func (r *pipelineRequest) start(in *inbox) {
	calls := make([]*call, 0, len(r.calls))
	for i := range r.calls {
		if r.calls[i].outcome.err == nil && !r.ops[i].local {
			calls = append(calls, &r.calls[i])
		}
	}
	r.pending = len(calls)
	if len(calls) == 0 {
		close(r.done)
		return
	}
	if err := in.call(calls...); err != nil {
		for _, c := range calls {
			c.outcome.err = err
		}
		close(r.done)
	}
}

// callEnded notes that one of the calls has its outcome. The loop calls it.
func (r *pipelineRequest) callEnded() {
	r.pending--
	if r.pending == 0 {
		close(r.done)
	}
}

// pipeline is one stream.
type pipeline struct {
	s            *server
	stream       grpc.ServerStream
	requests     chan *pipelineRequest // in the order in which they are to be answered
	calls, bytes atomic.Int64          // of requests that are not answered
	room         bell                  // rings when some were answered
}

// Pipeline implements KVService.
func (s *server) Pipeline(stream kvpb.KVService_PipelineServer) error {
	p := &pipeline{
		s:        s,
		stream:   stream,
		requests: make(chan *pipelineRequest, maxQueuedRequests),
		room:     newBell(),
	}
	_ = stream.SetHeader(*s.leaderMD.Load()) // fails only if the call has ended
	ended := make(chan error, 1)
	go func() { // ends with the stream
		ended <- p.read(stream.Context())
		close(p.requests)
	}()
	for {
		select {
		case r, ok := <-p.requests:
			if !ok {
				return toStatus(<-ended, true)
			}
			if err := p.answer(r); err != nil {
				return err
			}
		case <-s.stopping:
			if len(p.requests) == 0 {
				return toStatus(errStopping, true)
			}
		}
	}
}

// read takes requests in, while there is room for what they ask, until the caller has
// said all.
func (p *pipeline) read(ctx context.Context) error {
	mayWrite := p.s.mayWrite(ctx)
	owner := ownerOf(callerOf(ctx))
	for {
		if err := p.waitForRoom(ctx); err != nil {
			return err
		}
		var m encoded
		err := p.stream.RecvMsg(&m)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		r, err := parsePipelineRequest(m.b, mayWrite, owner)
		if err != nil {
			return err
		}
		if r.refused > 0 {
			p.s.logRefusals(ctx, kvpb.KVService_Pipeline_FullMethodName, errReadOnly, r.refused)
		}
		p.calls.Add(int64(len(r.calls)))
		p.bytes.Add(int64(r.bytes))
		r.start(&p.s.n.inbox)
		select {
		case p.requests <- r:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// waitForRoom waits until so much is answered that another request may be read.
func (p *pipeline) waitForRoom(ctx context.Context) error {
	for p.calls.Load() >= maxPipelineCalls || p.bytes.Load() >= maxPipelineBytes {
		select {
		case <-p.room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// answer waits for a request's calls and sends the results, in one message or more.
func (p *pipeline) answer(r *pipelineRequest) error {
	ctx := p.stream.Context()
	select {
	case <-r.done:
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	for from := 0; from < len(r.ops); {
		pool, err := admitResults(ctx, r.ops[from:])
		if err != nil { // the calls have been made
			return toStatus(fmt.Errorf("%w: no room for the answers: %w", errOutcomeUnknown, err), true)
		}
		b, next := p.s.appendResults(make([]byte, 0, 16*(len(r.ops)-from)), r, from)
		if counted, ok := pool.(*answerPool); ok {
			counted.fit(cap(b))
		}
		if err := p.stream.SendMsg(&encoded{b, pool}); err != nil {
			return err
		}
		from = next
	}
	p.calls.Add(-int64(len(r.calls)))
	p.bytes.Add(-int64(r.bytes))
	p.room.ring()
	return nil
}

// admitResults waits for room for the most that a message with results of these
// operations can have.
func admitResults(ctx context.Context, ops []operation) (mem.BufferPool, error) {
	most := 64 * len(ops)
	if slices.ContainsFunc(ops, func(o operation) bool { return o.kind == opGet }) {
		most = answerBytes + maxValueBytes
	}
	_, pool, err := admit(ctx, func() (struct{}, int, error) { return struct{}{}, most, nil })
	return pool, err
}

// appendResults appends a PipelineResponse with results from an operation on, up to the
// one that the next message begins with.
func (s *server) appendResults(b []byte, r *pipelineRequest, from int) (_ []byte, next int) {
	result := make([]byte, 0, 64)
	for next = from; next < len(r.ops) && len(b) <= answerBytes; next++ {
		o := r.calls[next].outcome
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendBytes(b, s.appendResult(result, &r.ops[next], o.err, o.result))
	}
	return b, next
}
