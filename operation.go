// Writes on their way to the log and out of it, without garbage: messages of
// kv.proto, parsed where they lie.

package main

import (
	"fmt"
	"slices"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// A key and a value are bounded so that the largest write and its answer fit
	// maxMessageBytes several times, and a heartbeat waits for few of them.
	maxKeyBytes   = 64 << 10
	maxValueBytes = 1 << 20
	// maxWriteBytes bounds an encoded write.
	maxWriteBytes = maxKeyBytes + maxValueBytes + 128
)

// Kinds of operations: the field numbers of Operation and Write.
const (
	opSet         protowire.Number = 1
	opDelete      protowire.Number = 2
	opOpenSession protowire.Number = 3 // not of Write
	opGet         protowire.Number = 4 // not of Write
	opNewSession  protowire.Number = 5 // not of Operation
)

// kvOp is an Operation or a Write. Its slices are part of what it was
// parsed from.
type kvOp struct {
	kind              protowire.Number
	key, value        []byte
	compares          bool
	expected          uint64 // the key's version, if compares
	hasID             bool
	session, sequence uint64 // of the id; or session is the one to be opened
	local             bool
}

var errMalformed = invalid("operation", "it is none, or has a field that this node does not know, or twice")

// fields reads the fields of a message one by one. It stops before one that is
// malformed: then there is a rest.
type fields struct {
	rest     []byte
	repeated protowire.Number // no other field may be there twice
	seen     uint64

	num protowire.Number // of the field that was read
	v   uint64           // if it is a varint
	b   []byte           // if it is bytes; else nil
}

func (f *fields) next() bool {
	if len(f.rest) == 0 {
		return false
	}
	tag := f.rest[0] // no field of ours takes more
	num, typ, n := protowire.Number(tag>>3), protowire.Type(tag&7), 1
	if tag < 8 || tag >= 0x80 || f.seen&(1<<num) != 0 {
		return false
	}
	size := -1
	switch f.num, f.v, f.b = num, 0, nil; typ {
	case protowire.VarintType:
		f.v, size = protowire.ConsumeVarint(f.rest[n:])
	case protowire.BytesType:
		f.b, size = protowire.ConsumeBytes(f.rest[n:])
	}
	if size < 0 {
		return false
	}
	if num != f.repeated {
		f.seen |= 1 << num
	}
	f.rest = f.rest[n+size:]
	return true
}

// parseOperation parses what a client asks for.
func (o *kvOp) parseOperation(m []byte) error {
	err := o.parse(m)
	if err == nil && o.kind == opNewSession {
		return errMalformed
	}
	return err
}

// parseWrite parses what goes into the log.
func (o *kvOp) parseWrite(m []byte) error {
	err := o.parse(m)
	if err == nil && (o.kind == opGet || o.kind == opOpenSession) {
		return errMalformed
	}
	return err
}

// parse parses an Operation, or a Write, and checks it.
func (o *kvOp) parse(m []byte) error {
	f := fields{rest: m}
	if *o = (kvOp{}); !f.next() || len(f.rest) > 0 || f.b == nil || f.num > opNewSession {
		return errMalformed
	}
	o.kind = f.num
	for f = (fields{rest: f.b}); len(f.rest) > 0; {
		if !f.next() || !o.take(&f) {
			return errMalformed
		}
	}
	return o.check()
}

// take takes a field of the request of o's kind.
func (o *kvOp) take(f *fields) bool {
	isBytes := f.b != nil
	switch num := f.num; {
	case num == 1 && !isBytes && o.kind == opNewSession:
		o.session = f.v
	case num == 1 && isBytes && o.hasKey():
		o.key = f.b
	case num == 2 && isBytes && o.kind == opSet:
		o.value = f.b
	case num == 2 && !isBytes && o.kind == opGet:
		o.local = f.v != 0
	case num == 3 && !isBytes && o.kind == opSet, num == 2 && !isBytes && o.kind == opDelete:
		o.compares, o.expected = true, f.v
	case num == 4 && isBytes && o.kind == opSet, num == 3 && isBytes && o.kind == opDelete:
		o.hasID = true
		id := fields{rest: f.b}
		for len(id.rest) > 0 {
			switch ok := id.next(); {
			case ok && id.num == 1 && id.b == nil:
				o.session = id.v
			case ok && id.num == 2 && id.b == nil:
				o.sequence = id.v
			default:
				return false
			}
		}
	default:
		return false
	}
	return true
}

func (o *kvOp) hasKey() bool { return o.kind != opOpenSession && o.kind != opNewSession }

// check finds what a service, or a leader, refuses.
func (o *kvOp) check() error {
	switch {
	case o.kind == opNewSession && o.session == 0:
		return invalid("session", "it is 0")
	case !o.hasKey():
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

// newSession draws the number of the session that is asked for, and returns the
// Write that opens it.
func (o *kvOp) newSession() []byte {
	o.session = randomID()
	return appendNewSession(nil, o.session)
}

func appendNewSession(b []byte, session uint64) []byte {
	m := appendVarint(nil, 1, session)
	return protowire.AppendBytes(protowire.AppendTag(b, opNewSession, protowire.BytesType), m)
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
	for f := (fields{rest: data, repeated: 3}); len(f.rest) > 0; {
		switch ok := f.next(); {
		case ok && f.num == 1 && f.b == nil:
			b.proposer = f.v
		case ok && f.num == 2 && f.b == nil:
			b.sequence = f.v
		case ok && f.num == 3 && f.b != nil:
			b.writes = append(b.writes, kvOp{})
			w := &b.writes[len(b.writes)-1]
			if err := w.parseWrite(f.b); err != nil {
				return b, fmt.Errorf("write %d of a batch: %w", len(b.writes), err)
			}
		default:
			return b, errMalformed
		}
	}
	return b, nil
}

// appendAnswer appends the answer to an operation; value is that of the key that a
// Get has found.
func appendAnswer(b []byte, o *kvOp, r result, value []byte) []byte {
	switch o.kind {
	case opGet:
		if r.found {
			b = protowire.AppendBytes(protowire.AppendTag(b, 1, protowire.BytesType), value)
		}
		b = appendVarint(b, 2, r.version)
	case opSet:
		b = appendVarint(appendVarint(b, 1, r.version), 2, protowire.EncodeBool(r.compareFailed))
	case opDelete:
		b = appendVarint(b, 1, protowire.EncodeBool(r.found))
		b = appendVarint(appendVarint(b, 2, r.version), 3, protowire.EncodeBool(r.compareFailed))
	case opOpenSession:
		b = appendVarint(b, 1, o.session)
	}
	return b
}

// appendResult appends an OperationResult.
func (s *server) appendResult(b []byte, o *kvOp, err error, r result) []byte {
	var it item
	if err == nil && o.kind == opGet {
		it, r.found, err = s.n.store.get(o.key)
		r.version = it.version
	}
	kind, m := o.kind, make([]byte, 0, 32)
	if err != nil {
		kind, m = 5, appendError(m, toStatus(o.sayIfRepeatable(err), true))
	} else {
		m = appendAnswer(slices.Grow(m, len(it.value)+16), o, r, it.value)
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

// encodeAsWrite encodes the Write of a request as protobuf would, without a message for it.
func encodeAsWrite(kind protowire.Number, req proto.Message) ([]byte, error) {
	sized := proto.MarshalOptions{UseCachedSize: true}
	size := proto.Size(req)
	b := make([]byte, 0, protowire.SizeTag(kind)+protowire.SizeBytes(size))
	b = protowire.AppendTag(b, kind, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b, err := sized.MarshalAppend(b, req)
	if err != nil {
		return nil, invalid("operation", "%v", err)
	}
	return b, nil
}

// sayIfRepeatable makes an unknown outcome one after which the write may be sent
// again, if it may. Its caller has time left.
func (o *kvOp) sayIfRepeatable(err error) error {
	opensSession := o.kind == opOpenSession || o.kind == opNewSession // a second session does no harm
	if err == errOutcomeUnknown && (o.hasID || opensSession) {
		return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, err.Error()+"; it may be sent again")
	}
	return err
}

// hasUnknownFields says of a request that it has fields which this node does not know.
func hasUnknownFields(req proto.Message) bool { return len(req.ProtoReflect().GetUnknown()) > 0 }

// present is the value of a key that is there: an empty one is not nil.
func present(value []byte) []byte {
	if value == nil {
		return []byte{}
	}
	return value
}
