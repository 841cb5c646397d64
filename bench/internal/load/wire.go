package load

import (
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// The messages of Pipeline are written and read here as they are on the wire:
// objects for each operation would take a third of the machine, and be what is
// measured.

// wire is a message as it is on the wire.
type wire struct{ b []byte }

// wireCodec is gRPC's, but for wire.
type wireCodec struct{ encoding.CodecV2 }

func (c wireCodec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*wire); ok {
		return mem.BufferSlice{mem.SliceBuffer(m.b)}, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c wireCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*wire); ok {
		m.b = data.Materialize()
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

var onWire = grpc.ForceCodecV2(wireCodec{encoding.GetCodecV2("proto")})

// appendOperation appends an operation to a PipelineRequest.
func (k *KV) appendOperation(b []byte, client int, op Operation) []byte {
	if !op.Set {
		get := &kvpb.Operation{Operation: &kvpb.Operation_Get{Get: &kvpb.GetRequest{Key: op.Key, Local: k.Local}}}
		m, _ := proto.Marshal(get) // never fails
		return protowire.AppendBytes(protowire.AppendTag(b, 1, protowire.BytesType), m)
	}
	id := k.requestID(client)
	idSize := protowire.SizeTag(1) + protowire.SizeVarint(id.GetSession()) + protowire.SizeTag(2) + protowire.SizeVarint(id.GetSequence())
	size := protowire.SizeTag(1) + protowire.SizeBytes(len(op.Key)) + protowire.SizeTag(2) + protowire.SizeBytes(len(op.Value))
	if id != nil {
		size += protowire.SizeTag(4) + protowire.SizeBytes(idSize)
	}
	b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.BytesType), uint64(protowire.SizeTag(1)+protowire.SizeBytes(size)))
	b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.BytesType), uint64(size))
	b = protowire.AppendString(protowire.AppendTag(b, 1, protowire.BytesType), op.Key)
	b = protowire.AppendBytes(protowire.AppendTag(b, 2, protowire.BytesType), op.Value)
	if id != nil {
		b = protowire.AppendVarint(protowire.AppendTag(b, 4, protowire.BytesType), uint64(idSize))
		b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.VarintType), id.Session)
		b = protowire.AppendVarint(protowire.AppendTag(b, 2, protowire.VarintType), id.Sequence)
	}
	return b
}

var errNotPipeline = errors.New("an answer that is no PipelineResponse")

// eachResult calls f with each result of a PipelineResponse.
func eachResult(m []byte, f func(result []byte)) (n int, err error) {
	for len(m) > 0 {
		num, typ, tag := protowire.ConsumeTag(m)
		if tag < 0 || num != 1 || typ != protowire.BytesType {
			return n, errNotPipeline
		}
		b, size := protowire.ConsumeBytes(m[tag:])
		if size < 0 {
			return n, errNotPipeline
		}
		f(b)
		n, m = n+1, m[tag+size:]
	}
	return n, nil
}

// wireError is the error of an OperationResult.
func wireError(b []byte) error {
	if num, _, _ := protowire.ConsumeTag(b); num == 1 { // a Set's
		return nil
	}
	r := &kvpb.OperationResult{}
	if err := proto.Unmarshal(b, r); err != nil {
		return status.Convert(err).Err()
	}
	return resultError(r)
}
