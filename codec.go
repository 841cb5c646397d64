// How requests are decoded, and answers that are encoded already are sent.

package main

import (
	"context"
	"slices"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// encoded is a message as it is on the wire: one that was received, or one that is
// sent, with the pool that its buffer goes to when it is written.
type encoded struct {
	b    []byte
	pool mem.BufferPool
}

// refuseMalformed is a service whose unary methods refuse a request that cannot be
// decoded, for it is no protobuf or a string in it is not UTF-8, with INVALID_ARGUMENT and
// a reason. gRPC alone would answer INTERNAL, and not ask an interceptor before. What comes
// on streams is refused so by decodedStream.
func (s *server) refuseMalformed(generated *grpc.ServiceDesc) *grpc.ServiceDesc {
	desc := *generated
	desc.Methods = slices.Clone(desc.Methods)
	for i := range desc.Methods {
		desc.Methods[i].Handler = s.decodeOrRefuse(desc.Methods[i].Handler)
	}
	return &desc
}

func (s *server) decodeOrRefuse(handle grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, decode func(any) error, i grpc.UnaryServerInterceptor) (any, error) {
		decodeOne := func(message any) error {
			d := decoding{message: message}
			if err := decode(&d); err != nil {
				return err
			}
			if d.err == nil {
				return nil
			}
			method, _ := grpc.Method(ctx) // it is there while a method is called
			return s.endUnary(ctx, method, nil, time.Now(), d.refusal())
		}
		return handle(srv, ctx, decodeOne, i)
	}
}

// decodedStream is a stream that refuses a message which cannot be decoded.
type decodedStream struct{ grpc.ServerStream }

func (s decodedStream) RecvMsg(message any) error {
	if _, isRaw := message.(*encoded); isRaw {
		return s.ServerStream.RecvMsg(message)
	}
	d := decoding{message: message}
	if err := s.ServerStream.RecvMsg(&d); err != nil {
		return err
	}
	if d.err != nil {
		return d.refusal()
	}
	return nil
}

// decoding is a message that is received, and why it could not be decoded.
type decoding struct {
	message any
	err     error
	notUTF8 string // the field that the error is about; empty: it is about another thing
}

// refusal is the error of a message that could not be decoded.
func (d *decoding) refusal() error {
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

// codec is gRPC's for protobuf. It takes encoded messages as they are: answers that
// are counted until they are written, and what goes through a Pipeline. And it leaves
// the error of a decoding to whoever wants it: gRPC ends the call with any other.
type codec struct{ encoding.CodecV2 }

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch m := v.(type) {
	case *encoded:
		m.b = data.Materialize()
		return nil
	case *decoding:
		m.err = c.CodecV2.Unmarshal(data, m.message)
		if message, ok := m.message.(proto.Message); ok && m.err != nil {
			m.notUTF8 = fieldNotUTF8(message.ProtoReflect().Descriptor(), data.Materialize())
		}
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*encoded); ok {
		return mem.BufferSlice{mem.NewBuffer(&m.b, m.pool)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// encodeAdmitted has f make an answer when there is room for it, and encodes it into a
// buffer that counts until it is written.
func encodeAdmitted(ctx context.Context, f func() (any, error)) (any, error) {
	m, pool, err := admit(ctx, func() (proto.Message, int, error) {
		resp, err := f()
		if err != nil {
			return nil, 0, err
		}
		m := resp.(proto.Message)
		return m, proto.Size(m), nil
	})
	if err != nil {
		return nil, err
	}
	sized := proto.MarshalOptions{UseCachedSize: true}
	b, err := sized.MarshalAppend(make([]byte, 0, sized.Size(m)), m)
	if err != nil {
		return nil, err
	}
	return &encoded{b, pool}, nil
}
