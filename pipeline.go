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
	"google.golang.org/grpc/encoding"
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
	// answerBytes is where answers are cut into messages: one more may follow.
	answerBytes = 256 << 10
)

// wireBytes is a message as it is on the wire, and where its buffer goes then.
type wireBytes struct {
	b    []byte
	pool mem.BufferPool
}

// kvRequest is a request of KVService, as the Operation that it is.
type kvRequest struct {
	s         *server
	kind      protowire.Number
	operation []byte
}

// codec is gRPC's, but for wireBytes and kvRequest.
type codec struct{ encoding.CodecV2 }

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch m := v.(type) {
	case *wireBytes:
		m.b = data.Materialize()
	case *kvRequest:
		b := protowire.AppendTag(make([]byte, 0, data.Len()+8), m.kind, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(data.Len()))
		for _, part := range data {
			b = append(b, part.ReadOnlyData()...)
		}
		m.operation = b
	default:
		return c.CodecV2.Unmarshal(data, v)
	}
	return nil
}

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*wireBytes); ok {
		return mem.BufferSlice{mem.NewBuffer(&m.b, m.pool)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// kvService is KVService, with operate in place of the methods that it can be.
func kvService() *grpc.ServiceDesc {
	d := kvpb.KVService_ServiceDesc
	d.Methods = slices.Clone(d.Methods)
	kinds := map[string]protowire.Number{"Get": opGet, "Set": opSet, "Delete": opDelete, "OpenSession": opOpenSession}
	for i := range d.Methods {
		m := &d.Methods[i]
		kind, ok := kinds[m.MethodName]
		if !ok {
			continue
		}
		info := &grpc.UnaryServerInfo{FullMethod: "/" + d.ServiceName + "/" + m.MethodName}
		m.Handler = func(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			req := &kvRequest{s: srv.(*server), kind: kind}
			if err := decode(req); err != nil {
				return nil, err
			}
			return intercept(ctx, req, info, operate)
		}
	}
	return &d
}

// operate does what a kvRequest asks.
func operate(ctx context.Context, req any) (any, error) {
	m := req.(*kvRequest)
	var o kvOp
	if err := o.parseOperation(m.operation); err != nil {
		return nil, err
	}
	if o.kind == opGet {
		return m.s.get(ctx, &o)
	}
	write := m.operation
	if o.kind == opOpenSession {
		write = o.newSession()
	}
	r, err := m.s.call(ctx, write)
	if err != nil {
		return nil, o.unknown(err)
	}
	return &wireBytes{appendAnswer(make([]byte, 0, 16), &o, r, nil), mem.NopBufferPool{}}, nil
}

func (s *server) get(ctx context.Context, o *kvOp) (any, error) {
	if !o.local {
		if _, err := s.call(ctx, nil); err != nil {
			return nil, err
		}
	}
	var found bool
	it, pool, err := admit(ctx, func() (it item, size int, err error) {
		it, found, err = s.n.store.get(o.key)
		return it, len(it.value) + 16, err
	})
	if err != nil {
		return nil, err
	}
	return &wireBytes{appendAnswer(make([]byte, 0, len(it.value)+16), o, result{version: it.version, found: found}, it.value), pool}, nil
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
		_, pool, err := admit(p.stream.Context(), func() (struct{}, int, error) { return struct{}{}, most, nil })
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
