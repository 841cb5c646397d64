// Requests that are on their way: gRPC has in memory what has come of them. They are read
// here rather than by gRPC, which would wait for ever for the last byte of each.

package main

import (
	"bytes"
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// maxArrivingBytes bounds the requests that are incomplete, or that nobody reads, of all
	// connections.
	maxArrivingBytes = 24 << 20
	// arrivalChunk is how much of a message is read at once. Of frames of one byte each, gRPC
	// needs frameOverhead for every byte until they are copied.
	arrivalChunk  = 1 << 10
	frameOverhead = 56
	// blockBytes is the size of the blocks in which a message is kept that is longer than
	// arrivalChunk, until all of it has come.
	blockBytes = 16 << 10

	// maxRequestBytes bounds a request of KVService: a write and what is around it.
	maxRequestBytes = maxWriteBytes + 1<<10
	// maxAdminBytes bounds a request of ClusterService: it names maxMembers at most, and
	// something over, that the error may say which field is too long.
	maxAdminBytes = 128 << 10
	// maxOtherBytes bounds a request of health and of reflection.
	maxOtherBytes = 4 << 10
)

// requestLimit bounds a request of a method.
func requestLimit(method string) int {
	switch {
	case strings.HasPrefix(method, kvPrefix):
		return maxRequestBytes
	case strings.HasPrefix(method, clusterPrefix):
		return maxAdminBytes
	case strings.HasPrefix(method, raftPrefix):
		return maxMessageBytes
	}
	return maxOtherBytes
}

// arrivals are the requests of all connections that are on their way. When they are too
// many bytes, the oldest one yields of the connection that has the most. Any goroutine may
// call its methods.
type arrivals struct {
	limit int

	mu      sync.Mutex
	bytes   int
	yielded uint64 // requests, since the start
	of      map[*limitedConn]*connArrivals
}

type connArrivals struct {
	bytes int
	calls list.List // of *arrival, in the order in which they came
}

// arrival is one request on its way. The mu of arrivals guards it.
type arrival struct {
	c     *limitedConn
	bytes int
	yield context.CancelCauseFunc
	place *list.Element // nil: it has ended, or yielded
}

// errTooManyCalls refuses a call before its request is read.
var errTooManyCalls = apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED,
	"too many calls run on this node, or on this connection")

var errRequestYielded = errors.New("too many requests are on their way to this node, " +
	"or are not read since their stream's answers are not taken: the oldest one has ended")

func newArrivals(limit int) *arrivals {
	return &arrivals{limit: limit, of: map[*limitedConn]*connArrivals{}}
}

// begin counts bytes until end is called. Until then, yield may be called.
func (as *arrivals) begin(c *limitedConn, bytes int, yield context.CancelCauseFunc) *arrival {
	a := &arrival{c: c, bytes: bytes, yield: yield}
	as.mu.Lock()
	defer as.mu.Unlock()
	of := as.of[c]
	if of == nil {
		of = &connArrivals{}
		as.of[c] = of
	}
	a.place = of.calls.PushBack(a)
	of.bytes += bytes
	as.bytes += bytes
	for as.bytes > as.limit {
		oldest := as.largest().calls.Front().Value.(*arrival)
		as.remove(oldest)
		as.yielded++
		oldest.yield(errRequestYielded)
	}
	return a
}

func (as *arrivals) end(a *arrival) {
	as.mu.Lock()
	defer as.mu.Unlock()
	as.remove(a)
}

// remove counts an arrival no more. mu is held.
func (as *arrivals) remove(a *arrival) {
	if a.place == nil {
		return
	}
	of := as.of[a.c]
	of.calls.Remove(a.place)
	a.place = nil
	of.bytes -= a.bytes
	as.bytes -= a.bytes
	if of.calls.Len() == 0 {
		delete(as.of, a.c)
	}
}

// largest returns what is on its way by the connection that has the most of it. mu is held.
func (as *arrivals) largest() *connArrivals {
	var largest *connArrivals
	for _, of := range as.of {
		if largest == nil || of.bytes > largest.bytes {
			largest = of
		}
	}
	return largest
}

// callContext is the context of a call that this node may end, before gRPC gives the call to
// anybody.
type callContext struct {
	context.Context
	end context.CancelCauseFunc
}

type callContextKey struct{}

// Value implements context.Context. By it, newRequestReader finds the callContext among the contexts
// that gRPC has made of it since.
func (c *callContext) Value(key any) any {
	if key == (callContextKey{}) {
		return c
	}
	return c.Context.Value(key)
}

func newCallContext(parent context.Context) *callContext {
	ctx, end := context.WithCancelCause(parent)
	return &callContext{ctx, end}
}

// transportStream is gRPC's end of a call, as far as it is used here. gRPC has these methods
// for itself, and may change them: checkTransport sees whether it has.
type transportStream interface {
	ReadMessageHeader(header []byte) error
	Read(n int) (mem.BufferSlice, error)
}

// checkTransport returns an error if a request cannot be read from a stream of gRPC's, as it may
// not be with another version: if canRead says so of a call that is made in memory.
func checkTransport(canRead func(_ grpc.ServerTransportStream, request string) error) error {
	request := "a request"
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request))), request...)
	call := &http.Request{
		Method:     http.MethodPost,
		URL:        &url.URL{Path: "/service/method"},
		Header:     http.Header{"Content-Type": {"application/grpc"}},
		ProtoMajor: 2,
		Body:       io.NopCloser(bytes.NewReader(frame)),
	}
	err := errors.New("it has not made the call")
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		err = canRead(grpc.ServerTransportStreamFromContext(stream.Context()), request)
		return nil
	}))
	s.ServeHTTP(unread{http.Header{}}, call)
	if err != nil {
		return fmt.Errorf("this program was built with version %s of grpc-go, by which it cannot read requests: %w",
			grpc.Version, err)
	}
	return nil
}

// canReadRequest returns an error if a call's only request cannot be read from its stream.
func canReadRequest(stream grpc.ServerTransportStream, request string) error {
	readable, ok := stream.(transportStream)
	if !ok {
		return fmt.Errorf("a stream, a %T, lacks ReadMessageHeader(header []byte) error or "+
			"Read(n int) (mem.BufferSlice, error)", stream)
	}
	r := &requestReader{
		arrivals: newArrivals(maxArrivingBytes),
		conn:     &limitedConn{},
		call:     newCallContext(context.Background()),
		stream:   readable,
		limit:    len(request),
	}
	defer r.call.end(nil)
	got, a, err := r.only()
	if err != nil {
		return err
	}
	r.arrivals.end(a)
	if string(got) != request {
		return fmt.Errorf("%q was sent, %q was read", request, got)
	}
	return nil
}

// unread takes the answer to checkTransport's call.
type unread struct{ header http.Header }

func (u unread) Header() http.Header       { return u.header }
func (unread) Write(b []byte) (int, error) { return len(b), nil }
func (unread) WriteHeader(int)             {}
func (unread) Flush()                      {}

// block has a part of a message, not all of which has come.
type block [blockBytes]byte

// freeBlocks are used again, whether the rest of their message came or not. Were they garbage,
// whoever sends messages without their last byte would make more of it than the collector of
// a small, busy machine can keep up with.
var freeBlocks = sync.Pool{New: func() any { return new(block) }}

// requestReader reads the requests of one call.
type requestReader struct {
	arrivals *arrivals
	conn     *limitedConn
	call     *callContext
	stream   transportStream
	limit    int
}

func newRequestReader(ctx context.Context, as *arrivals) *requestReader {
	method, _ := grpc.Method(ctx)
	stream := grpc.ServerTransportStreamFromContext(ctx)
	return &requestReader{
		arrivals: as,
		conn:     connOf(ctx),
		call:     ctx.Value(callContextKey{}).(*callContext),
		stream:   stream.(transportStream), // checkTransport has seen that it is one
		limit:    requestLimit(method),
	}
}

// next returns the next request, which counts as on its way until its arrival ends; io.EOF:
// there is none.
func (r *requestReader) next() ([]byte, *arrival, error) {
	var header [5]byte
	if err := r.stream.ReadMessageHeader(header[:]); err != nil {
		return nil, nil, r.whyEnded(err)
	}
	if header[0] != 0 {
		return nil, nil, status.Error(codes.Internal, "grpc: compressed flag set with identity or empty encoding")
	}
	length := binary.BigEndian.Uint32(header[1:])
	if uint64(length) > uint64(r.limit) {
		return nil, nil, status.Errorf(codes.ResourceExhausted,
			"grpc: received message larger than max (%d vs. %d)", length, r.limit)
	}
	rest := int(length)
	a := r.arrivals.begin(r.conn, incompleteBytes(rest), r.call.end)
	m, err := r.message(rest)
	if err != nil {
		r.arrivals.end(a)
		return nil, nil, r.whyEnded(unexpectedEOF(err))
	}
	return m, a, nil
}

// incompleteBytes is what a message of this length takes of memory until all of it has come.
func incompleteBytes(length int) int {
	unread := frameOverhead * min(length, arrivalChunk)
	if length <= arrivalChunk {
		return length + unread
	}
	return blocksFor(length)*blockBytes + unread
}

// blocksFor is how many blocks a message of this length takes.
func blocksFor(length int) int { return (length + blockBytes - 1) / blockBytes }

// message returns a message of this length when all of it has come.
func (r *requestReader) message(length int) ([]byte, error) {
	if length <= arrivalChunk {
		m := make([]byte, length)
		return m, r.fill(m)
	}
	blocks := make([][]byte, 0, blocksFor(length))
	defer func() {
		for _, b := range blocks {
			freeBlocks.Put((*block)(b[:blockBytes]))
		}
	}()
	for rest := length; rest > 0; rest -= min(rest, blockBytes) {
		b := freeBlocks.Get().(*block)[:min(rest, blockBytes)]
		blocks = append(blocks, b)
		if err := r.fill(b); err != nil {
			return nil, err
		}
	}
	return bytes.Join(blocks, nil), nil
}

// fill reads so much of a message.
func (r *requestReader) fill(b []byte) error {
	for len(b) > 0 {
		chunk, err := r.stream.Read(min(len(b), arrivalChunk))
		if err != nil {
			return err
		}
		for _, buffer := range chunk {
			b = b[copy(b, buffer.ReadOnlyData()):]
		}
		chunk.Free()
	}
	return nil
}

// only returns the request of a call that has one. Nothing more of the call can come then.
func (r *requestReader) only() ([]byte, *arrival, error) {
	m, a, err := r.next()
	if err == io.EOF {
		err = status.Error(codes.Internal, "cardinality violation: received no request message")
	}
	if err != nil {
		return nil, nil, err
	}
	var more [1]byte
	err = r.stream.ReadMessageHeader(more[:])
	if err == io.EOF {
		return m, a, nil
	}
	r.arrivals.end(a)
	if err == nil {
		return nil, nil, status.Error(codes.Internal, "cardinality violation: received multiple request messages")
	}
	return nil, nil, r.whyEnded(err)
}

// stall counts what gRPC may have in memory of a stream that is not read, until the arrival
// ends.
func (r *requestReader) stall() *arrival { return r.arrivals.begin(r.conn, windowBytes, r.call.end) }

// whyEnded is why nothing more can be read.
func (r *requestReader) whyEnded(err error) error {
	if context.Cause(r.call) == errRequestYielded {
		return whyNoRoom(r.call, err)
	}
	if err == io.ErrUnexpectedEOF {
		return status.Error(codes.Internal, err.Error())
	}
	return err
}

// whyNoRoom is why a call has not got room: err, or that its request had to yield, if that is what
// ended its context.
func whyNoRoom(ctx context.Context, err error) error {
	if context.Cause(ctx) == errRequestYielded {
		return toStatus(errRequestYielded, true)
	}
	return err
}

func unexpectedEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// readStream is a stream whose requests a requestReader reads.
type readStream struct {
	grpc.ServerStream
	reader *requestReader
	info   *grpc.StreamServerInfo
}

// RecvMsg implements grpc.ServerStream.
func (s *readStream) RecvMsg(m any) error {
	receive := s.reader.next
	if !s.info.IsClientStream {
		receive = s.reader.only
	}
	b, a, err := receive()
	if err != nil {
		return err
	}
	defer s.reader.arrivals.end(a)
	return decode(b, m.(proto.Message))
}

// SendMsg implements grpc.ServerStream. If the stream has many requests, the answer to each counts
// until it is taken, as that to a unary call. While it waits for room, nothing of the stream is
// read, so what gRPC has received of it counts, too. A Pipeline has counted its answers itself, and
// sends them encoded.
func (s *readStream) SendMsg(m any) error {
	answer, ok := m.(proto.Message)
	if !ok || !s.info.IsClientStream {
		return s.ServerStream.SendMsg(m)
	}
	defer s.reader.arrivals.end(s.reader.stall())
	c := s.reader.conn
	place, err := c.l.answers.admit(s.Context(), sharer{c, true}, max(leastCounted, proto.Size(answer)))
	if err != nil {
		return whyNoRoom(s.Context(), err)
	}
	b, err := place.encode(answer)
	if err != nil {
		return err
	}
	return s.ServerStream.SendMsg(b)
}
