// Pipeline: many operations on one stream, without a goroutine or a message for each.
// Writes go into the log as the bytes that came: messages for them would take a large
// part of what a stream reaches.

package main

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"

	"raft-key-value/kvpb"
)

const (
	// maxPipelineCalls and maxPipelineBytes bound what of a stream is not
	// answered: beyond either, no further request is read.
	maxPipelineCalls = 8 << 10
	maxPipelineBytes = 4 << 20
	// maxPipelinesBytes and maxConnPipelinesBytes bound that for all streams of the node, and
	// of a connection, which has latePipelinesBytes once half of the former is taken. A request
	// beyond waits until others are answered.
	maxPipelinesBytes     = 24 << 20
	maxConnPipelinesBytes = 8 << 20
	latePipelinesBytes    = 1 << 20
	// operationBytes and requestBytes are what an operation and a request take of memory
	// besides what was sent. So many operations as there is room for fit the inbox.
	operationBytes = 448
	requestBytes   = 512
	// mostOfPipeline is what one request takes at most.
	mostOfPipeline = requestBytes + maxRequestBytes + maxPipelineCalls*operationBytes
	// maxQueuedRequests bounds the requests of a stream that wait to be answered.
	maxQueuedRequests = 64
	// answerBytes is where answers are cut into messages: one more may follow.
	answerBytes = 256 << 10
	// resultBytes is what a result takes at most, but that of a Get, and errorBytes what an error
	// takes besides its message.
	resultBytes = 32
	errorBytes  = 64
	// inboxPause is between two tries to get into an inbox that is full.
	inboxPause = 10 * time.Millisecond
)

// pipelineRequest is the operations of one PipelineRequest, on their way.
type pipelineRequest struct {
	ops     []operation
	calls   []call        // one to each operation; outcome has the error of an invalid one
	bytes   int           // that it takes of memory
	refused int           // operations that the caller may not make
	pending int           // calls that have not ended: the loop's, once started
	done    chan struct{} // closed when none is pending
}

// countOperations counts the operations of a PipelineRequest. It returns an error if it is no
// list of operations, or too long a one.
func countOperations(m []byte) (int, error) {
	count := 0
	for f := (fields{rest: m, repeated: 1}); len(f.rest) > 0; count++ {
		isOperation := f.next() && f.num == 1 && f.b != nil
		if !isOperation || count == maxPipelineCalls {
			return 0, invalid("operations", "it is malformed, or there are more than %d", maxPipelineCalls)
		}
	}
	return count, nil
}

// parsePipelineRequest parses a PipelineRequest of so many operations, which stay parts of it.
// An operation that is invalid gets its own error, and so does a write if its caller may not
// write. Sessions that are opened get the owner.
func parsePipelineRequest(m []byte, count int, mayWrite bool, owner string) *pipelineRequest {
	r := &pipelineRequest{
		ops:   make([]operation, count),
		calls: make([]call, count),
		bytes: memoryOf(m, count),
		done:  make(chan struct{}),
	}
	f := fields{rest: m, repeated: 1}
	for i := range r.ops {
		f.next()
		r.calls[i].request = r
		c := &r.calls[i]
		c.write, c.outcome.err = r.ops[i].parseCall(f.b, owner)
		c.minVersion = r.ops[i].minVersion
		isWrite := c.write != nil
		if isWrite && !mayWrite {
			c.outcome.err = errReadOnly
			r.refused++
		}
	}
	return r
}

// memoryOf is what a request takes of memory.
func memoryOf(m []byte, operations int) int { return requestBytes + len(m) + operations*operationBytes }

// start leaves in the inbox what has to go through the loop: all but what is invalid,
// and local reads that wait for no version. It waits while the inbox is full, until ctx ends.
func (r *pipelineRequest) start(ctx context.Context, in *inbox) {
	calls := make([]*call, 0, len(r.calls))
	for i := range r.calls {
		isReady := r.ops[i].local && r.ops[i].minVersion == 0
		if r.calls[i].outcome.err == nil && !isReady {
			calls = append(calls, &r.calls[i])
		}
	}
	r.pending = len(calls)
	if len(calls) == 0 {
		close(r.done)
		return
	}
	err := in.call(calls...)
	for err == errOverloaded && ctx.Err() == nil {
		sleep(ctx, inboxPause)
		err = in.call(calls...)
	}
	if err != nil {
		for _, c := range calls {
			c.outcome.err = err
		}
		close(r.done)
	}
}

// giveUp has the loop end the calls soon that were not proposed: nobody waits for them.
func (r *pipelineRequest) giveUp() {
	for i := range r.calls {
		r.calls[i].state.CompareAndSwap(callQueued, callGivenUp)
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
	conn         *limitedConn
	reader       *requestReader
	ctx          context.Context       // the stream's, but ends a little before its deadline
	requests     chan *pipelineRequest // in the order in which they are to be answered
	calls, bytes atomic.Int64          // of requests that are not answered
	answered     bell                  // rings when some were answered
}

// Pipeline implements KVService.
func (s *server) Pipeline(stream kvpb.KVService_PipelineServer) error {
	ctx, cancel := beforeDeadline(stream.Context())
	defer cancel()
	conn := connOf(stream.Context())
	p := &pipeline{
		s:        s,
		stream:   stream,
		ctx:      ctx,
		conn:     conn,
		reader:   newRequestReader(stream.Context(), conn.l.arrivals),
		requests: make(chan *pipelineRequest, maxQueuedRequests),
		answered: newBell(),
	}
	defer p.leave()
	_ = stream.SetHeader(*s.leaderMD.Load()) // fails only if the call has ended
	ended := make(chan error, 1)
	go func() { // ends with the stream
		ended <- p.read(ctx)
		close(p.requests)
	}()
	for {
		select {
		case r, ok := <-p.requests:
			if !ok {
				return p.endedBy(<-ended)
			}
			if err := p.answer(r); err != nil {
				return err
			}
		case <-ctx.Done():
			return p.endedBy(ctx.Err())
		case <-s.stopping:
			if len(p.requests) == 0 {
				return toStatus(errStopping, true)
			}
		}
	}
}

// sharer is whose share of rooms the stream uses: that of all streams of its connection.
func (p *pipeline) sharer() sharer { return sharer{p.conn, true} }

// leave lets go of the requests that are not answered: each gives its room back when the loop
// has done with it.
func (p *pipeline) leave() {
	go func() { // ends soon after the stream, for then read ends, and all calls
		var left []*pipelineRequest
		for r := range p.requests {
			r.giveUp()
			left = append(left, r)
		}
		for _, r := range left {
			<-r.done
			p.release(r)
		}
	}()
}

// abandon gives the room of one request back when the loop has done with it.
func (p *pipeline) abandon(r *pipelineRequest) {
	r.giveUp()
	go func() { // ends with the request's calls
		<-r.done
		p.release(r)
	}()
}

// release gives the room of a request back.
func (p *pipeline) release(r *pipelineRequest) {
	p.calls.Add(-int64(len(r.calls)))
	p.bytes.Add(-int64(r.bytes))
	p.conn.l.pipelines.release(p.sharer(), r.bytes)
}

// endedBy is the error of a stream that err ends. At its deadline some operations may not
// be answered.
func (p *pipeline) endedBy(err error) error {
	if err == nil {
		return nil
	}
	if p.ctx.Err() != nil {
		err = fmt.Errorf("%w, of what is not answered: %w", errOutcomeUnknown, err)
	}
	return toStatus(err, true)
}

// read takes requests in, while there is room for what they ask, until the caller has
// said all.
func (p *pipeline) read(ctx context.Context) error {
	for {
		if err := p.waitForAnswers(ctx); err != nil {
			return err
		}
		m, arriving, err := p.reader.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		err = p.begin(ctx, m)
		p.reader.arrivals.end(arriving)
		if err != nil {
			return err
		}
	}
}

// begin takes in a request that was received, once there is room for it.
func (p *pipeline) begin(ctx context.Context, m []byte) error {
	count, err := countOperations(m)
	if err != nil {
		return err
	}
	if err := p.take(ctx, memoryOf(m, count)); err != nil {
		return err
	}
	r := parsePipelineRequest(m, count, p.s.mayWrite(ctx), ownerOf(callerOf(ctx)))
	if r.refused > 0 {
		p.s.logRefusals(ctx, kvpb.KVService_Pipeline_FullMethodName, errReadOnly, r.refused)
	}
	p.calls.Add(int64(len(r.calls)))
	p.bytes.Add(int64(r.bytes))
	r.start(ctx, &p.s.n.inbox)
	p.requests <- r // waitForAnswers has left a place
	return nil
}

// take takes room for a request, and waits until there is some.
func (p *pipeline) take(ctx context.Context, bytes int) error {
	room := p.conn.l.pipelines
	if room.tryTake(p.sharer(), bytes) {
		return nil
	}
	defer p.reader.arrivals.end(p.reader.stall())
	return room.take(ctx, p.sharer(), bytes)
}

// waitForAnswers waits until so much is answered that another request may be read.
func (p *pipeline) waitForAnswers(ctx context.Context) error {
	if p.mayRead() {
		return nil
	}
	defer p.reader.arrivals.end(p.reader.stall())
	for !p.mayRead() {
		select {
		case <-p.answered:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (p *pipeline) mayRead() bool {
	isFull := p.calls.Load() >= maxPipelineCalls || p.bytes.Load() >= maxPipelineBytes
	return !isFull && len(p.requests) < maxQueuedRequests
}

// answer waits for a request's calls and sends the results, in one message or more.
func (p *pipeline) answer(r *pipelineRequest) error {
	ctx := p.ctx
	select {
	case <-r.done:
	case <-ctx.Done():
		p.abandon(r)
		return p.endedBy(ctx.Err())
	}
	for from := 0; from < len(r.ops); {
		room, err := p.conn.l.answers.admit(ctx, p.sharer(), r.mostOf(from))
		if err != nil { // the calls have been made
			p.release(r)
			return toStatus(fmt.Errorf("%w: no room for the answers: %w", errOutcomeUnknown, err), true)
		}
		b, next := p.s.appendResults(make([]byte, 0, max(leastCounted, 16*(len(r.ops)-from))), r, from)
		room.fit(cap(b))
		if err := p.stream.SendMsg(&encoded{b, room}); err != nil {
			p.release(r)
			return err
		}
		from = next
	}
	p.release(r)
	p.answered.ring()
	return nil
}

// mostOf is the most that a message with results from an operation on can have. The calls
// have ended.
func (r *pipelineRequest) mostOf(from int) int {
	bytes := 0
	for i := from; i < len(r.ops); i++ {
		err := r.calls[i].outcome.err
		switch {
		case err != nil:
			bytes += errorBytes + min(len(err.Error()), maxErrorBytes)
		case r.ops[i].kind == opGet:
			return answerBytes + maxValueBytes
		default:
			bytes += resultBytes
		}
	}
	return max(leastCounted, min(bytes, answerBytes+errorBytes+maxErrorBytes))
}

// appendResults appends a PipelineResponse with results from an operation on, up to the
// one that the next message begins with.
func (s *server) appendResults(b []byte, r *pipelineRequest, from int) (_ []byte, next int) {
	result := make([]byte, 0, 64)
	failed := 0
	for next = from; next < len(r.ops) && len(b) <= answerBytes; next++ {
		o := r.calls[next].outcome
		if o.err != nil {
			failed++
		}
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendBytes(b, s.appendResult(result, &r.ops[next], o.err, o.result))
	}
	s.operations.ok.Add(uint64(next - from - failed))
	s.operations.failed.Add(uint64(failed))
	return b, next
}
