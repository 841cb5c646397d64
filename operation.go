// One operation of a client: parsed, checked, answered. Operations and the writes of
// the log are messages of kv.proto that are parsed where they lie, without a copy: the
// loop of each node parses each write of its cluster.

package main

import (
	"fmt"
	"math"
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
	opDeleteRange protowire.Number = 6
)

// operation is an Operation or a Write. Its slices are parts of the bytes that it was
// parsed from.
type operation struct {
	kind              protowire.Number
	compares          bool
	hasID             bool
	local             bool
	key, value        []byte
	prefix            []byte // of a DeleteRange, like start and end
	start, end        []byte
	minVersion        uint64 // of a local Get
	expected          uint64 // the key's version, if compares
	session, sequence uint64 // of the request_id; or session is the one to be opened
	owner             []byte // of the session to be opened
}

var errMalformed = invalid("operation", "it is none, or has a field that this node does not know, or twice")

// errUnknownField is for a request that would mean something else without the field.
var errUnknownField = invalid("request", "it has a field that this node does not know")

// fields reads the fields of a message one by one. It stops before a field that is
// malformed, or there a second time: then rest is not empty.
type fields struct {
	rest     []byte           // what was not read
	repeated protowire.Number // the one field that may be there more than once
	seen     uint64           // a bit for each field that was read, but for repeated

	num protowire.Number // of the field that was read last
	v   uint64           // its value, if it is a varint
	b   []byte           // its value, if it is bytes; else nil
}

// next reads a field; false: there is none, or it is not read.
func (f *fields) next() bool {
	if len(f.rest) == 0 {
		return false
	}
	const tagBytes = 1 // our fields have numbers below 16
	tag := f.rest[0]
	num, typ := protowire.Number(tag>>3), protowire.Type(tag&7)
	isTag := num != 0 && tag < 0x80
	if !isTag || f.seen&(1<<num) != 0 {
		return false
	}
	f.num = num
	f.v = 0
	f.b = nil
	size := -1
	switch typ {
	case protowire.VarintType:
		f.v, size = protowire.ConsumeVarint(f.rest[tagBytes:])
	case protowire.BytesType:
		f.b, size = protowire.ConsumeBytes(f.rest[tagBytes:])
	}
	if size < 0 {
		return false
	}
	if num != f.repeated {
		f.seen |= 1 << num
	}
	f.rest = f.rest[tagBytes+size:]
	return true
}

// isBytes and isVarint say whether the field that was read last is this one.
func (f *fields) isBytes(num protowire.Number) bool  { return f.num == num && f.b != nil }
func (f *fields) isVarint(num protowire.Number) bool { return f.num == num && f.b == nil }

// parseOperation parses an Operation: what a client asks for.
func (o *operation) parseOperation(m []byte) error {
	if err := o.parse(m); err != nil {
		return err
	}
	if o.kind == opNewSession {
		return errMalformed
	}
	return nil
}

// parseWrite parses a Write: what stands in the log.
func (o *operation) parseWrite(m []byte) error {
	if err := o.parse(m); err != nil {
		return err
	}
	if o.kind == opGet || o.kind == opOpenSession {
		return errMalformed
	}
	return nil
}

// parseCall parses an Operation and returns the Write that has it done: mostly the same
// bytes, for Set and Delete have the same field numbers in both. nil: it is a read. A
// session that is opened gets the owner.
func (o *operation) parseCall(m []byte, owner string) (write []byte, err error) {
	if err := o.parseOperation(m); err != nil {
		return nil, err
	}
	switch o.kind {
	case opGet:
		return nil, nil
	case opOpenSession:
		o.session = randomID()
		return appendNewSession(nil, o.session, owner), nil
	}
	return m, nil
}

// parse parses an Operation or a Write, and checks it.
func (o *operation) parse(m []byte) error {
	*o = operation{}
	outer := fields{rest: m}
	isRequest := outer.next() && outer.b != nil && outer.num <= opDeleteRange
	if !isRequest || len(outer.rest) > 0 {
		return errMalformed
	}
	o.kind = outer.num
	f := fields{rest: outer.b}
	for len(f.rest) > 0 {
		if !f.next() || !o.take(&f) {
			return errMalformed
		}
	}
	return o.check()
}

// take takes a field of the request that o's kind has; false: it has no such field.
func (o *operation) take(f *fields) bool {
	switch o.kind {
	case opSet:
		return o.takeOfSet(f)
	case opDelete:
		return o.takeOfDelete(f)
	case opGet:
		return o.takeOfGet(f)
	case opNewSession:
		return o.takeOfNewSession(f)
	case opDeleteRange:
		return o.takeOfDeleteRange(f)
	}
	return false // an OpenSessionRequest has no fields
}

func (o *operation) takeOfSet(f *fields) bool {
	switch {
	case f.isBytes(1):
		o.key = f.b
	case f.isBytes(2):
		o.value = f.b
	case f.isVarint(3):
		o.compares, o.expected = true, f.v
	case f.isBytes(4):
		return o.takeRequestID(f.b)
	default:
		return false
	}
	return true
}

func (o *operation) takeOfDelete(f *fields) bool {
	switch {
	case f.isBytes(1):
		o.key = f.b
	case f.isVarint(2):
		o.compares, o.expected = true, f.v
	case f.isBytes(3):
		return o.takeRequestID(f.b)
	default:
		return false
	}
	return true
}

func (o *operation) takeOfGet(f *fields) bool {
	switch {
	case f.isBytes(1):
		o.key = f.b
	case f.isVarint(2):
		o.local = f.v != 0
	case f.isVarint(3):
		o.minVersion = f.v
	default:
		return false
	}
	return true
}

func (o *operation) takeOfNewSession(f *fields) bool {
	switch {
	case f.isVarint(1):
		o.session = f.v
	case f.isBytes(2):
		o.owner = f.b
	default:
		return false
	}
	return true
}

func (o *operation) takeOfDeleteRange(f *fields) bool {
	switch {
	case f.isBytes(1):
		o.prefix = f.b
	case f.isBytes(2):
		o.start = f.b
	case f.isBytes(3):
		o.end = f.b
	case f.isBytes(4):
		return o.takeRequestID(f.b)
	default:
		return false
	}
	return true
}

func (o *operation) takeRequestID(m []byte) bool {
	o.hasID = true
	f := fields{rest: m}
	for f.next() {
		switch {
		case f.isVarint(1):
			o.session = f.v
		case f.isVarint(2):
			o.sequence = f.v
		default:
			return false
		}
	}
	return len(f.rest) == 0
}

// check finds what a service refuses of an operation, and a leader or the log of a write.
func (o *operation) check() error {
	switch o.kind {
	case opOpenSession:
		return nil
	case opNewSession:
		if o.session == 0 {
			return invalid("session", "it is 0")
		}
		if err := checkOwner(o.owner); err != nil {
			return invalid("owner", "%v", err)
		}
		return nil
	}
	if o.kind == opDeleteRange {
		if err := checkDeleteRange(o.prefix, o.start, o.end); err != nil {
			return err
		}
		return o.checkRequestID()
	}
	if err := checkKey(o.key); err != nil {
		return err
	}
	if err := checkMinVersion(o.local, o.minVersion); err != nil {
		return err
	}
	if len(o.value) > maxValueBytes {
		return invalid("value", "it has %d bytes, the limit is %d", len(o.value), maxValueBytes)
	}
	deletesAbsent := o.kind == opDelete && o.compares && o.expected == 0
	if deletesAbsent {
		return invalid("expected_version", "it is 0: there is nothing to delete")
	}
	return o.checkRequestID()
}

func (o *operation) checkRequestID() error {
	if o.hasID && o.session == 0 {
		return invalid("request_id.session", "it is 0")
	}
	if o.hasID && o.sequence == 0 {
		return invalid("request_id.sequence", "it is 0")
	}
	return nil
}

func checkKey(key []byte) error {
	switch {
	case len(key) == 0:
		return invalid("key", "it is empty")
	case len(key) > maxKeyBytes:
		return invalid("key", "it has %d bytes, the limit is %d", len(key), maxKeyBytes)
	case !utf8.Valid(key):
		return invalid("key", "it is not UTF-8")
	}
	return nil
}

// rangeBytes is what a DeleteRange counts for in a proposal, at least: each may make the loop
// look at maxRangeKeys keys.
const rangeBytes = maxEntryBytes / 8

// proposedBytes is what an encoded Write counts for in a proposal.
func proposedBytes(write []byte) int {
	isRange := len(write) > 0 && write[0] == byte(protowire.EncodeTag(opDeleteRange, protowire.BytesType))
	if isRange {
		return max(len(write), rangeBytes)
	}
	return len(write)
}

// checkMinVersion checks the min_version of a read.
func checkMinVersion(local bool, minVersion uint64) error {
	if minVersion > 0 && !local {
		return invalid("min_version", "it is for local reads: others see every write that was acknowledged")
	}
	return nil
}

// appendNewSession appends the Write that opens a session.
func appendNewSession(b []byte, session uint64, owner string) []byte {
	m := appendVarint(nil, 1, session)
	if owner != "" {
		m = protowire.AppendTag(m, 2, protowire.BytesType)
		m = protowire.AppendString(m, owner)
	}
	return protowire.AppendBytes(protowire.AppendTag(b, opNewSession, protowire.BytesType), m)
}

// batch is a Batch that was parsed.
type batch struct {
	proposer, sequence uint64
	writes             []operation
	rise               *kvpb.LevelRise // nil: it raises no level
}

// parseBatch parses the data of an entry and checks each write, in room if they fit in
// there. What it allocates is bounded by the data: a write takes four bytes at least. It
// refuses a batch of a level that is not spoken.
func parseBatch(data []byte, room []operation, speaks uint32) (batch, error) {
	b := batch{writes: room[:0]}
	f := fields{rest: data, repeated: 3}
	for f.next() {
		switch {
		case f.isVarint(1):
			b.proposer = f.v
		case f.isVarint(2):
			b.sequence = f.v
		case f.isVarint(4):
			if err := checkLevel("the entry", uint32(min(f.v, math.MaxUint32)), speaks); err != nil {
				return b, err
			}
		case f.isBytes(5):
			b.rise = &kvpb.LevelRise{}
			if err := proto.Unmarshal(f.b, b.rise); err != nil {
				return b, fmt.Errorf("a rise of the level: %w", err)
			}
		case f.isBytes(3):
			b.writes = append(b.writes, operation{})
			w := &b.writes[len(b.writes)-1]
			if err := w.parseWrite(f.b); err != nil {
				return b, fmt.Errorf("write %d of a batch: %w", len(b.writes), err)
			}
		default:
			return b, errMalformed
		}
	}
	if len(f.rest) > 0 {
		return b, errMalformed
	}
	isRiseAlone := b.proposer == 0 && b.sequence == 0 && len(b.writes) == 0
	if b.rise != nil && !isRiseAlone {
		return b, errMalformed
	}
	return b, nil
}

// appendAnswer appends the response to an operation. Of a Get, r has whether the key was
// found and its version, and value is its value.
func appendAnswer(b []byte, o *operation, r result, value []byte) []byte {
	switch o.kind {
	case opGet:
		if r.found {
			b = protowire.AppendTag(b, 1, protowire.BytesType)
			b = protowire.AppendBytes(b, value)
		}
		b = appendVarint(b, 2, r.version)
	case opSet:
		b = appendVarint(b, 1, r.version)
		b = appendVarint(b, 2, protowire.EncodeBool(r.compareFailed))
	case opDelete:
		b = appendVarint(b, 1, protowire.EncodeBool(r.found))
		b = appendVarint(b, 2, r.version)
		b = appendVarint(b, 3, protowire.EncodeBool(r.compareFailed))
	case opOpenSession:
		b = appendVarint(b, 1, o.session)
	case opDeleteRange:
		b = appendVarint(b, 1, uint64(r.deleted))
		b = appendVarint(b, 2, r.version)
		b = appendVarint(b, 3, protowire.EncodeBool(r.tooMany))
	}
	return b
}

// resultError is the field number of the error in OperationResult; the answers have the
// numbers of their operations.
const resultError protowire.Number = 5

// appendResult appends an OperationResult. A Get reads the store only now.
func (s *server) appendResult(b []byte, o *operation, err error, r result) []byte {
	var it item
	if err == nil && o.kind == opGet {
		it, r.found, err = s.n.store.get(o.key)
		r.version = it.version
	}
	if err != nil {
		m := appendError(nil, toStatus(o.sayIfRepeatable(err), true))
		b = protowire.AppendTag(b, resultError, protowire.BytesType)
		return protowire.AppendBytes(b, m)
	}
	m := slices.Grow(make([]byte, 0, 32), len(it.value)+16) // on the stack, if the value is small
	m = appendAnswer(m, o, r, it.value)
	b = protowire.AppendTag(b, o.kind, protowire.BytesType)
	return protowire.AppendBytes(b, m)
}

// appendVarint appends a field that is a varint; 0 is left out, as proto3 does.
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
func (o *operation) sayIfRepeatable(err error) error {
	opensSession := o.kind == opOpenSession || o.kind == opNewSession // a second session does no harm
	if err == errOutcomeUnknown && (o.hasID || opensSession) {
		unknown := kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN
		return apiError(codes.Unavailable, unknown, err.Error()+"; it may be sent again")
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
