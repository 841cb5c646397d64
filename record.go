// Writes on their way to the log and out of it, without garbage: messages of
// kv.proto, parsed where they lie.

package main

import (
	"fmt"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Kinds of operations: the field numbers of Operation and, but for opGet, Write.
const (
	opSet         protowire.Number = 1
	opDelete      protowire.Number = 2
	opOpenSession protowire.Number = 3
	opGet         protowire.Number = 4
)

// kvOp is an Operation or a Write. Its slices are part of what it was
// parsed from.
type kvOp struct {
	kind              protowire.Number
	key, value        []byte
	compares          bool
	expected          uint64 // the key's version, if compares
	hasID             bool
	session, sequence uint64
	local             bool
}

var errMalformed = invalid("operation", "it is none, or has a field that this node does not know, or twice")

// encodeOperation encodes a request as an Operation. It allocates once.
func encodeOperation(kind protowire.Number, req proto.Message) ([]byte, error) {
	size := proto.Size(req)
	b := make([]byte, 0, size+8)
	b = protowire.AppendTag(b, kind, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, req)
}

// eachField calls f for each field of a message: with v for a varint, with b
// for bytes. Other types are errors, and so is a field that f has had, unless it
// is the repeated one.
func eachField(m []byte, repeated protowire.Number, f func(num protowire.Number, v uint64, b []byte) error) error {
	seen := uint64(0)
	for len(m) > 0 {
		num, typ, n := protowire.ConsumeTag(m)
		if n < 0 || num > 63 || seen&(1<<num) != 0 {
			return errMalformed
		}
		seen |= 1 << num &^ (1 << repeated)
		m = m[n:]
		v, b := uint64(0), []byte(nil)
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(m)
		case protowire.BytesType:
			b, n = protowire.ConsumeBytes(m)
			if b == nil {
				b = []byte{} // or it would be a varint's
			}
		default:
			n = -1
		}
		if n < 0 {
			return errMalformed
		}
		if err := f(num, v, b); err != nil {
			return err
		}
		m = m[n:]
	}
	return nil
}

// parseOperation parses an Operation, or a Write, and checks it.
func parseOperation(m []byte) (o kvOp, err error) {
	err = eachField(m, 0, func(num protowire.Number, _ uint64, b []byte) error {
		if o.kind != 0 || num > opGet || b == nil {
			return errMalformed
		}
		o.kind = num
		return eachField(b, 0, o.field)
	})
	switch {
	case err != nil:
	case o.kind == 0:
		err = errMalformed
	case o.kind != opOpenSession:
		err = o.check()
	}
	return o, err
}

// field takes a field of the request of o's kind.
func (o *kvOp) field(num protowire.Number, v uint64, b []byte) error {
	isBytes := b != nil
	switch {
	case num == 1 && isBytes && o.kind != opOpenSession:
		o.key = b
	case num == 2 && isBytes && o.kind == opSet:
		o.value = b
	case num == 2 && !isBytes && o.kind == opGet:
		o.local = v != 0
	case num == 3 && !isBytes && o.kind == opSet, num == 2 && !isBytes && o.kind == opDelete:
		o.compares, o.expected = true, v
	case num == 4 && isBytes && o.kind == opSet, num == 3 && isBytes && o.kind == opDelete:
		o.hasID = true
		return eachField(b, 0, func(num protowire.Number, v uint64, b []byte) error {
			switch {
			case num == 1 && b == nil:
				o.session = v
			case num == 2 && b == nil:
				o.sequence = v
			default:
				return errMalformed
			}
			return nil
		})
	default:
		return errMalformed
	}
	return nil
}

// check finds what a service refuses.
func (o *kvOp) check() error {
	switch {
	case len(o.key) == 0:
		return invalid("key", "it is empty")
	case len(o.key) > maxKeyBytes:
		return invalid("key", "it has %d bytes, the limit is %d", len(o.key), maxKeyBytes)
	case !utf8.Valid(o.key):
		return invalid("key", "it is not UTF-8")
	case len(o.value) > maxValueBytes:
		return invalid("value", "it has %d bytes, the limit is %d", len(o.value), maxValueBytes)
	case o.kind == opDelete && o.compares && o.expected == 0:
		return invalid("expected_version", "it is 0: there is nothing to delete")
	case o.hasID && o.session == 0:
		return invalid("request_id.session", "it is 0")
	case o.hasID && o.sequence == 0:
		return invalid("request_id.sequence", "it is 0")
	}
	return nil
}

// batch is a Batch that was parsed.
type batch struct {
	proposer, sequence uint64
	writes             []kvOp
}

// parseBatch parses the data of an entry and checks each write. It may put the
// writes into room. There is a limit to what it allocates: a write has four
// bytes at least.
func parseBatch(data []byte, room []kvOp) (b batch, err error) {
	b.writes = room[:0]
	err = eachField(data, 3, func(num protowire.Number, v uint64, m []byte) error {
		switch {
		case num == 1 && m == nil:
			b.proposer = v
		case num == 2 && m == nil:
			b.sequence = v
		case num == 3 && m != nil:
			w, err := parseOperation(m)
			if w.kind == opGet {
				err = errMalformed
			}
			if err != nil {
				return fmt.Errorf("write %d of a batch: %w", len(b.writes)+1, err)
			}
			b.writes = append(b.writes, w)
		default:
			return errMalformed
		}
		return nil
	})
	return b, err
}
