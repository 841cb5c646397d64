// How requests are decoded, and answers that are encoded already are sent.

package main

import (
	"context"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// encoded is a message as it is on the wire: one that was received, or one that is
// sent, with the pool that its buffer goes to when it is written.
type encoded struct {
	b    []byte
	pool mem.BufferPool
}

// refuseMalformed is a service whose methods refuse a request that cannot be decoded,
// for it is no protobuf or a string in it is not UTF-8, with INVALID_ARGUMENT and a
// reason. gRPC alone would answer INTERNAL, and not ask an interceptor before.
func refuseMalformed(generated *grpc.ServiceDesc) *grpc.ServiceDesc {
	desc := *generated
	desc.Methods = slices.Clone(desc.Methods)
	for i := range desc.Methods {
		desc.Methods[i].Handler = decodeOrRefuse(desc.Methods[i].Handler)
	}
	return &desc
}

func decodeOrRefuse(handle grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, decode func(any) error, i grpc.UnaryServerInterceptor) (any, error) {
		decodeOne := func(message any) error {
			d := decoding{message: message}
			if err := decode(&d); err != nil {
				return err
			}
			if d.err != nil {
				srv.(*server).nameLeader(ctx, false)
				return invalid("request", "%v", d.err)
			}
			return nil
		}
		return handle(srv, ctx, decodeOne, i)
	}
}

// decoding is a message that is received, and why it could not be decoded.
type decoding struct {
	message any
	err     error
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
