// How requests are decoded, and answers that are encoded already are sent.

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// encoded is a message that is sent, as it is on the wire, with the pool that its buffer
// goes to when it is written.
type encoded struct {
	b    []byte
	pool mem.BufferPool
}

// guard is a service whose unary methods read their request by a requestReader, and count as
// running calls. They refuse a request that cannot be decoded, for it is no protobuf or a
// string in it is not UTF-8, with INVALID_ARGUMENT and a reason. And the calls of its methods are
// counted.
func (s *server) guard(generated *grpc.ServiceDesc) *grpc.ServiceDesc {
	desc := *generated
	desc.Methods = slices.Clone(desc.Methods)
	for i := range desc.Methods {
		m := newMethodCounts(desc.ServiceName, desc.Methods[i].MethodName, true)
		s.methods["/"+m.name] = m
		desc.Methods[i].Handler = m.around(s.guardMethod(desc.Methods[i].Handler))
	}
	for _, stream := range desc.Streams {
		m := newMethodCounts(desc.ServiceName, stream.StreamName, false)
		s.methods["/"+m.name] = m
	}
	return &desc
}

// around counts the calls that a method handles.
func (m *methodCounts) around(handle grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, d func(any) error, i grpc.UnaryServerInterceptor) (any, error) {
		begun := time.Now()
		resp, err := handle(srv, ctx, d, i)
		m.ended(err, time.Since(begun))
		return resp, err
	}
}

func (s *server) guardMethod(handle grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, _ func(any) error, i grpc.UnaryServerInterceptor) (any, error) {
		method, _ := grpc.Method(ctx) // it is there while a method is called
		end, err := beginCall(ctx, method)
		if err != nil {
			return nil, s.endUnary(ctx, method, nil, time.Now(), err)
		}
		defer end()
		var done func()
		defer func() {
			if done != nil {
				done()
			}
		}()
		decode := func(m any) (err error) {
			done, err = s.receiveOnly(ctx, m.(proto.Message))
			if err == nil {
				return nil
			}
			return s.endUnary(ctx, method, nil, time.Now(), err)
		}
		return handle(srv, ctx, decode, i)
	}
}

// beginCall counts a call until end is called. Nodes' own calls do not count.
func beginCall(ctx context.Context, method string) (end func(), err error) {
	if strings.HasPrefix(method, raftPrefix) {
		return func() {}, nil
	}
	c := connOf(ctx)
	if !c.l.calls.begin(c) {
		return nil, errTooManyCalls
	}
	return func() { c.l.calls.end(c) }, nil
}

// receiveOnly receives the request of a unary call. If that is large, it has room until done.
func (s *server) receiveOnly(ctx context.Context, m proto.Message) (done func(), err error) {
	c := connOf(ctx)
	b, a, err := newRequestReader(ctx, c.l.arrivals).only()
	if err != nil {
		return nil, err
	}
	defer c.l.arrivals.end(a)
	if len(b) > uncountedWrite {
		bytes := len(b)
		soon, cancel := beforeDeadline(ctx)
		defer cancel()
		if err := c.l.writes.take(soon, sharer{conn: c}, bytes); err != nil {
			return nil, whyNoRoom(ctx, fmt.Errorf("there is no room for the request: %w", err))
		}
		done = func() { c.l.writes.release(sharer{conn: c}, bytes) }
	}
	return done, decode(b, m)
}

// decodedStream is a stream of a node that refuses a message which cannot be decoded.
type decodedStream struct{ grpc.ServerStream }

// RecvMsg implements grpc.ServerStream.
func (s decodedStream) RecvMsg(message any) error {
	d := decoding{message: message.(proto.Message)}
	if err := s.ServerStream.RecvMsg(&d); err != nil {
		return err
	}
	return d.refusal()
}

// decode decodes a request, or says what is wrong with it.
func decode(b []byte, m proto.Message) error {
	d := decoding{message: m}
	d.decode(b)
	return d.refusal()
}

// decoding is a message that is received, and why it could not be decoded.
type decoding struct {
	message proto.Message
	err     error
	notUTF8 string // the field that the error is about; empty: it is about another thing
}

func (d *decoding) decode(b []byte) {
	d.err = proto.Unmarshal(b, d.message)
	if d.err != nil {
		d.notUTF8 = fieldNotUTF8(d.message.ProtoReflect().Descriptor(), b)
	}
}

// refusal is the error of a message that could not be decoded; nil: it could.
func (d *decoding) refusal() error {
	if d.err == nil {
		return nil
	}
	if d.notUTF8 != "" {
		return invalid(d.notUTF8, "it is not UTF-8")
	}
	return invalid("request", "%v", d.err)
}

// fieldNotUTF8 names the first string field of an encoded message that is not UTF-8, as
// errors of the API name fields; empty: there is none. The error of protobuf's own
// decoder does not say which.
func fieldNotUTF8(message protoreflect.MessageDescriptor, b []byte) string {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return ""
		}
		b = b[n:]
		size := protowire.ConsumeFieldValue(number, kind, b)
		if size < 0 {
			return ""
		}
		field := message.Fields().ByNumber(number)
		if field != nil && kind == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(b)
			if name := nameIfNotUTF8(field, value); name != "" {
				return name
			}
		}
		b = b[size:]
	}
	return ""
}

func nameIfNotUTF8(field protoreflect.FieldDescriptor, value []byte) string {
	name := string(field.Name())
	switch field.Kind() {
	case protoreflect.StringKind:
		if !utf8.Valid(value) {
			return name
		}
	case protoreflect.MessageKind:
		if inner := fieldNotUTF8(field.Message(), value); inner != "" {
			return name + "." + inner
		}
	}
	return ""
}

// codec is gRPC's for protobuf. It sends encoded messages as they are: answers that are
// counted until they are written. And it leaves the error of a decoding to whoever wants it:
// gRPC ends the call with any other.
type codec struct{ encoding.CodecV2 }

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	d, ok := v.(*decoding)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	b := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer b.Free()
	d.decode(b.ReadOnlyData())
	return nil
}

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*encoded); ok {
		return mem.BufferSlice{mem.NewBuffer(&m.b, m.pool)}, nil
	}
	return c.CodecV2.Marshal(v)
}
