// Pipeline: many operations on one stream, without a message or a goroutine for
// each.

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

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

// wireBytes is a message as it is on the wire, and where its buffer goes then.
type wireBytes struct {
	b    []byte
	pool mem.BufferPool
}

// codec is gRPC's, but for wireBytes.
type codec struct{ encoding.CodecV2 }

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*wireBytes); ok {
		m.b = data.Materialize()
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*wireBytes); ok {
		return mem.BufferSlice{mem.NewBuffer(&m.b, m.pool)}, nil
	}
	return c.CodecV2.Marshal(v)
}

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
	for rest := m; len(rest) > 0; n++ {
		num, typ, size := protowire.ConsumeField(rest)
		if size < 0 || num != 1 || typ != protowire.BytesType || n == maxPipelineCalls {
			return nil, invalid("operations", "it is malformed, or there are more than %d", maxPipelineCalls)
		}
		rest = rest[size:]
	}
	g := &group{ops: make([]kvOp, n), calls: make([]call, n), bytes: len(m), done: make(chan struct{})}
	for i := range g.ops {
		_, _, tag := protowire.ConsumeTag(m)
		b, size := protowire.ConsumeBytes(m[tag:])
		m = m[tag+size:]
		o, c := &g.ops[i], &g.calls[i]
		*o, c.out.err = parseOperation(b)
		if c.group = g; o.kind != opGet {
			c.record = b
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
	_ = stream.SetHeader(*s.leader.Load())
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
		var m wireBytes
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
		_, pool, err := admit(p.stream.Context(), func() (proto.Message, int, error) { return nil, most, nil })
		if err != nil { // what it answers is done
			return toStatus(fmt.Errorf("%w: no room for the answers: %w", errOutcomeUnknown, err), true)
		}
		var b []byte
		b, next = p.s.appendResults(make([]byte, 0, 16*(len(g.ops)-i)), g, i)
		if pool, ok := pool.(*answerPool); ok {
			pool.fit(cap(b))
		}
		if err := p.stream.SendMsg(&wireBytes{b, pool}); err != nil {
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

// appendResult appends an OperationResult.
func (s *server) appendResult(b []byte, o *kvOp, err error, r result) []byte {
	kind, message := o.kind, [32]byte{}
	m := message[:0]
	if err == nil && kind == opGet {
		var it item
		var ok bool
		if it, ok, err = s.n.store.get(string(o.key)); ok && err == nil {
			m = slices.Grow(m, len(it.value)+16)
			m = protowire.AppendTag(m, 1, protowire.BytesType)
			m = protowire.AppendBytes(m, it.value)
			m = appendVarint(m, 2, it.version)
		}
	}
	switch {
	case err != nil:
		kind, m = 5, appendError(m, toStatus(o.unknown(err), true))
	case kind == opSet:
		m = appendVarint(appendVarint(m, 1, r.version), 2, protowire.EncodeBool(r.compareFailed))
	case kind == opDelete:
		m = appendVarint(m, 1, protowire.EncodeBool(r.found))
		m = appendVarint(appendVarint(m, 2, r.version), 3, protowire.EncodeBool(r.compareFailed))
	case kind == opOpenSession:
		m = appendVarint(m, 1, r.version)
	}
	b = protowire.AppendTag(b, kind, protowire.BytesType)
	return protowire.AppendBytes(b, m)
}

func appendVarint(b []byte, num protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), v)
}

// appendError appends an OperationError.
func appendError(b []byte, err error) []byte {
	b = appendVarint(b, 1, uint64(status.Code(err)))
	b = appendVarint(b, 2, uint64(kvpb.ErrorReason_value["ERROR_REASON_"+errorReason(err)]))
	b = protowire.AppendTag(b, 3, protowire.BytesType)
	return protowire.AppendString(b, status.Convert(err).Message())
}
