// Operations of clients, without a message for each: their bytes become the log's.
// One to a call, or in a Pipeline many on a stream, without a goroutine for each.

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"raft-key-value/kvpb"
)

const (
	// maxPipelineCalls and maxPipelineBytes bound what of a stream is not
	// answered: beyond either, no further request is read.
	maxPipelineCalls = 8 << 10
	maxPipelineBytes = 8 << 20
	// answerBytes is where answers are cut into messages: one more may follow.
	answerBytes = 256 << 10
)

// group is the operations of one request. The loop counts left down.
type group struct {
	ops   []kvOp
	calls []call // out has the error of one that is not valid
	bytes int
	left  int
	done  chan struct{}
}

// newGroup parses a PipelineRequest. The operations are parts of it.
func newGroup(m []byte) (*group, error) {
	n := 0
	for f := (fields{rest: m, repeated: 1}); len(f.rest) > 0; n++ {
		if !f.next() || f.num != 1 || f.b == nil || n == maxPipelineCalls {
			return nil, invalid("operations", "it is malformed, or there are more than %d", maxPipelineCalls)
		}
	}
	g := &group{ops: make([]kvOp, n), calls: make([]call, n), bytes: len(m), done: make(chan struct{})}
	f := fields{rest: m, repeated: 1}
	for i := range g.ops {
		f.next()
		o, c := &g.ops[i], &g.calls[i]
		c.group = g
		c.out.err = o.parseOperation(f.b)
		switch {
		case o.kind == opGet:
		case o.kind == opOpenSession && c.out.err == nil:
			c.record = o.newSession()
		default:
			c.record = f.b
		}
	}
	return g, nil
}

// start leaves the group's calls in the inbox.
func (g *group) start(in *inbox) {
	calls := make([]*call, 0, len(g.calls))
	for i := range g.calls {
		if g.calls[i].out.err == nil && !g.ops[i].local {
			calls = append(calls, &g.calls[i])
		}
	}
	if g.left = len(calls); g.left == 0 {
		close(g.done)
	} else if err := in.call(calls...); err != nil {
		for _, c := range calls {
			c.out.err = err
		}
		close(g.done)
	}
}

// pipeline is one stream.
type pipeline struct {
	s            *server
	stream       grpc.ServerStream
	groups       chan *group // in the order in which they are to be answered
	calls, bytes atomic.Int64
	room         bell // something was answered
}

// Pipeline implements KVService.
func (s *server) Pipeline(stream kvpb.KVService_PipelineServer) error {
	p := &pipeline{s: s, stream: stream, groups: make(chan *group, 64), room: newBell()}
	_ = stream.SetHeader(*s.leaderMD.Load())
	ended := make(chan error, 1)
	go func() { // ends with the stream
		ended <- p.read(stream.Context())
		close(p.groups)
	}()
	for {
		select {
		case g, ok := <-p.groups:
			if !ok {
				return toStatus(<-ended, true)
			}
			if err := p.answer(g); err != nil {
				return err
			}
		case <-s.stopping:
			if len(p.groups) == 0 {
				return toStatus(errStopping, true)
			}
		}
	}
}

// read takes requests in, as long as there is room for what they ask.
func (p *pipeline) read(ctx context.Context) error {
	for {
		for p.calls.Load() >= maxPipelineCalls || p.bytes.Load() >= maxPipelineBytes {
			select {
			case <-p.room:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		var m encoded
		if err := p.stream.RecvMsg(&m); err != nil {
			if err == io.EOF { // the caller has said all
				return nil
			}
			return err
		}
		g, err := newGroup(m.b)
		if err != nil {
			return err
		}
		p.calls.Add(int64(len(g.calls)))
		p.bytes.Add(int64(g.bytes))
		g.start(&p.s.n.in)
		select {
		case p.groups <- g:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// answer waits for a group and sends its answers.
func (p *pipeline) answer(g *group) error {
	select {
	case <-g.done:
	case <-p.stream.Context().Done():
		return status.FromContextError(p.stream.Context().Err()).Err()
	}
	for i, next := 0, 0; i < len(g.ops); i = next {
		most := 64 * (len(g.ops) - i)
		if slices.ContainsFunc(g.ops[i:], func(o kvOp) bool { return o.kind == opGet }) {
			most = answerBytes + maxValueBytes
		}
		_, pool, err := admit(p.stream.Context(), func() (struct{}, int, error) { return struct{}{}, most, nil })
		if err != nil { // what it answers is done
			return toStatus(fmt.Errorf("%w: no room for the answers: %w", errOutcomeUnknown, err), true)
		}
		var b []byte
		b, next = p.s.appendResults(make([]byte, 0, 16*(len(g.ops)-i)), g, i)
		if pool, ok := pool.(*answerPool); ok {
			pool.fit(cap(b))
		}
		if err := p.stream.SendMsg(&encoded{b, pool}); err != nil {
			return err
		}
	}
	p.calls.Add(-int64(len(g.calls)))
	p.bytes.Add(-int64(g.bytes))
	p.room.ring()
	return nil
}

// appendResults appends a PipelineResponse with results from i on, up to the next
// message's.
func (s *server) appendResults(b []byte, g *group, i int) (_ []byte, next int) {
	for result := make([]byte, 0, 64); i < len(g.ops) && len(b) <= answerBytes; i++ {
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendBytes(b, s.appendResult(result, &g.ops[i], g.calls[i].out.err, g.calls[i].out.result))
	}
	return b, i
}
