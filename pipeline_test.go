// Pipelines.

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

func setOp(key, value string) *kvpb.Operation {
	return &kvpb.Operation{Operation: &kvpb.Operation_Set{Set: &kvpb.SetRequest{Key: key, Value: []byte(value)}}}
}

func getOp(key string, local bool) *kvpb.Operation {
	return &kvpb.Operation{Operation: &kvpb.Operation_Get{Get: &kvpb.GetRequest{Key: key, Local: local}}}
}

func deleteOp(key string) *kvpb.Operation {
	return &kvpb.Operation{Operation: &kvpb.Operation_Delete{Delete: &kvpb.DeleteRequest{Key: key}}}
}

// exchange sends operations on a stream and returns their results.
func exchange(s kvpb.KVService_PipelineClient, ops ...*kvpb.Operation) (results []*kvpb.OperationResult, err error) {
	if err := s.Send(&kvpb.PipelineRequest{Operations: ops}); err != nil {
		return nil, err
	}
	for len(results) < len(ops) {
		resp, err := s.Recv()
		if err != nil {
			return results, err
		}
		results = append(results, resp.Results...)
	}
	return results, nil
}

// TestPipeline: all kinds of operations, answers in order, a bad one failing
// alone, through every node.
func TestPipeline(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	for id := range uint64(3) {
		id++
		s, err := c.nodes[id].Pipeline(c.ctx)
		if err != nil {
			t.Fatal(err)
		}
		open := &kvpb.Operation{Operation: &kvpb.Operation_OpenSession{OpenSession: &kvpb.OpenSessionRequest{}}}
		r, err := exchange(s, open, setOp("a", "1"), setOp("", "x"), setOp("b", strings.Repeat("x", maxValueBytes+1)), &kvpb.Operation{}, deleteOp("absent"), setOp("empty", ""))
		if err != nil {
			t.Fatal(err)
		}
		for i, field := range map[int]string{2: "key: it is empty", 3: "value: it has", 4: "operation"} {
			if e := r[i].GetError(); e.GetCode() != int32(codes.InvalidArgument) || e.GetReason() != kvpb.ErrorReason_ERROR_REASON_INVALID_FIELD || !strings.HasPrefix(e.GetMessage(), field) {
				t.Errorf("result %d: %v", i, r[i])
			}
		}
		session, first := r[0].GetOpenSession().GetSession(), r[1].GetSet().GetVersion()
		if session == 0 || first == 0 || r[5].GetDelete() == nil || r[5].GetDelete().Deleted || r[6].GetSet().GetVersion() != first+2 {
			t.Fatalf("node %d: %v", id, r)
		}
		again := setOp("a", "2")
		again.GetSet().RequestId = &kvpb.RequestId{Session: session, Sequence: 1}
		compare := setOp("a", "3")
		compare.GetSet().ExpectedVersion = new(first)
		unknown := setOp("a", "4")
		unknown.GetSet().RequestId = &kvpb.RequestId{Session: 1 << 50, Sequence: 1}
		if r, err = exchange(s, again, again, compare, unknown); err != nil {
			t.Fatal(err)
		}
		if v := r[0].GetSet().GetVersion(); v != first+3 || r[1].GetSet().GetVersion() != v || !r[2].GetSet().GetCompareFailed() || r[2].GetSet().GetVersion() != v ||
			r[3].GetError().GetReason() != kvpb.ErrorReason_ERROR_REASON_SESSION_UNKNOWN {
			t.Fatalf("node %d: %v", id, r)
		}
		if r, err = exchange(s, getOp("a", false), getOp("absent", false), getOp("empty", true)); err != nil {
			t.Fatal(err)
		}
		if a := r[0].GetGet(); string(a.Value) != "2" || a.Version != first+3 || r[1].GetGet() == nil || r[1].GetGet().Value != nil || r[2].GetGet().Value == nil {
			t.Fatalf("node %d: %v", id, r)
		}
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Fatal(err)
		}
	}
	c.sameStates(1, 2, 3)
}

// TestPipelineOrder: many requests in flight; writes are applied in order.
func TestPipelineOrder(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	s, err := c.nodes[2].Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	const requests, each = 200, 50
	go func() {
		for i := range requests {
			var ops []*kvpb.Operation
			for k := range each {
				ops = append(ops, setOp(fmt.Sprint(k%7), fmt.Sprint(i*each+k)))
			}
			_ = s.Send(&kvpb.PipelineRequest{Operations: ops})
		}
		_ = s.CloseSend()
	}()
	var versions []uint64
	for {
		resp, err := s.Recv()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		for _, r := range resp.Results {
			versions = append(versions, r.GetSet().GetVersion())
		}
	}
	if len(versions) != requests*each || versions[0] == 0 || !slices.IsSorted(versions) || len(slices.Compact(versions)) != requests*each {
		t.Errorf("%d versions, from %d on", len(versions), versions[0])
	}
}

// TestPipelineBounds: a client that does not read is not read from, and the
// others go on. Malformed and too large requests end the stream.
func TestPipelineBounds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	s, err := c.nodes[1].Pipeline(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c.set(1, "big", strings.Repeat("x", maxValueBytes))
	sent := make(chan error, 1)
	var ops []*kvpb.Operation
	for range 64 {
		ops = append(ops, getOp("big", true)) // 64 MiB of answers
	}
	go func() {
		for {
			if err := s.Send(&kvpb.PipelineRequest{Operations: ops}); err != nil {
				sent <- err
				return
			}
		}
	}()
	var calls int64
	in := &c.nodes[1].server.n.inbox
	eventually(t, func() error {
		in.mu.Lock()
		defer in.mu.Unlock()
		if calls = int64(in.callCount); calls > maxPipelineCalls+64 {
			t.Fatalf("%d calls", calls)
		}
		return nil
	})
	c.set(1, "other", "goes on")
	cancel()
	if err := <-sent; err == nil {
		t.Error("it was read")
	}

	for name, m := range map[string][]byte{
		"malformed":        []byte("\x0a\x7f"),
		"an unknown field": []byte("\x12\x00"),
		"too many":         []byte(strings.Repeat("\x0a\x00", maxPipelineCalls+1)),
	} {
		if g, err := parsePipelineRequest(m); err == nil {
			t.Errorf("%s: %d operations", name, len(g.ops))
		}
	}
}

// TestParseOperation: it takes what protobuf makes, and nothing else.
func TestParseOperation(t *testing.T) {
	v := uint64(7)
	for _, o := range []*kvpb.Operation{
		setOp("k", "v"), setOp("k", ""), deleteOp("k"), getOp("k", false), getOp("k", true),
		{Operation: &kvpb.Operation_OpenSession{OpenSession: &kvpb.OpenSessionRequest{}}},
		{Operation: &kvpb.Operation_Set{Set: &kvpb.SetRequest{Key: "k", Value: []byte("v"), ExpectedVersion: &v, RequestId: &kvpb.RequestId{Session: 1, Sequence: 2}}}},
		{Operation: &kvpb.Operation_Set{Set: &kvpb.SetRequest{Key: "k", ExpectedVersion: new(uint64)}}},
		{Operation: &kvpb.Operation_Delete{Delete: &kvpb.DeleteRequest{Key: "k", ExpectedVersion: &v, RequestId: &kvpb.RequestId{Session: 1, Sequence: 2}}}},
	} {
		b := mustMarshal(t, o)
		p, err := parseOperation(b)
		if err != nil || !sameOperation(p, o) {
			t.Errorf("%v: %+v, %v", o, p, err)
		}
		for i := range b {
			if _, err := parseOperation(b[:i]); err == nil {
				t.Errorf("%v, cut at %d: accepted", o, i)
			}
		}
		if _, err := parseOperation(append(slices.Clone(b), b...)); err == nil {
			t.Errorf("%v, twice: accepted", o)
		}
		unknown := protowire.AppendTag(slices.Clone(b), 9, protowire.VarintType)
		if _, err := parseOperation(protowire.AppendVarint(unknown, 1)); err == nil {
			t.Errorf("%v with an unknown field: accepted", o)
		}
	}
}

func sameOperation(p operation, o *kvpb.Operation) bool {
	id := func(id *kvpb.RequestId) bool {
		return p.hasID == (id != nil) && p.session == id.GetSession() && p.sequence == id.GetSequence()
	}
	expects := func(v *uint64) bool { return p.compares == (v != nil) && (v == nil || *v == p.expected) }
	switch op := o.Operation.(type) {
	case *kvpb.Operation_Set:
		s := op.Set
		return p.kind == opSet && string(p.key) == s.Key && string(p.value) == string(s.Value) && expects(s.ExpectedVersion) && id(s.RequestId)
	case *kvpb.Operation_Delete:
		return p.kind == opDelete && string(p.key) == op.Delete.Key && expects(op.Delete.ExpectedVersion) && id(op.Delete.RequestId)
	case *kvpb.Operation_Get:
		return p.kind == opGet && string(p.key) == op.Get.Key && p.local == op.Get.Local
	}
	return p.kind == opOpenSession && o.GetOpenSession() != nil
}

func parseOperation(b []byte) (o operation, err error) {
	err = o.parseOperation(b)
	return o, err
}

// TestNumbersAreNotChosen: a client opens no session by a number, however it puts
// that, and a peer none without one. The node that is called draws all of them.
func TestNumbersAreNotChosen(t *testing.T) {
	open := &kvpb.Operation{Operation: &kvpb.Operation_OpenSession{OpenSession: &kvpb.OpenSessionRequest{}}}
	chosen := mustMarshal(t, openWrite(7))
	within := protowire.AppendTag(nil, opOpenSession, protowire.BytesType)
	within = protowire.AppendBytes(within, mustMarshal(t, &kvpb.NewSession{Session: 7}))
	for name, b := range map[string][]byte{"of the log": chosen, "within the request": within} {
		if o, err := parseOperation(b); err == nil {
			t.Errorf("%s: %+v is taken from a client", name, o)
		} else {
			wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
		}
	}
	var o operation
	for name, b := range map[string][]byte{"a client's": mustMarshal(t, open), "within a client's": within, "no number": mustMarshal(t, openWrite(0))} {
		if err := o.parseWrite(b); err == nil {
			t.Errorf("%s: %+v is taken from a peer", name, o)
		}
	}
	if err := o.parseWrite(chosen); err != nil || o.session != 7 {
		t.Errorf("%+v, %v", o, err)
	}

	g, err := parsePipelineRequest(mustMarshal(t, &kvpb.PipelineRequest{Operations: []*kvpb.Operation{open, open}}))
	if err != nil {
		t.Fatal(err)
	}
	drawn := map[uint64]bool{0: true}
	for i := range g.calls {
		if err := o.parseWrite(g.calls[i].write); err != nil || drawn[o.session] {
			t.Errorf("%+v, %v; drawn before: %v", o, err, drawn)
		}
		drawn[o.session] = true
		var answer kvpb.OperationResult
		b := (&server{}).appendResult(nil, &g.ops[i], nil, result{})
		if err := proto.Unmarshal(b, &answer); err != nil || answer.GetOpenSession().GetSession() != o.session {
			t.Errorf("session %d is opened, %v, %v answered", o.session, &answer, err)
		}
	}
}

// FuzzParseOperation: what is accepted says the same to protobuf.
func FuzzParseOperation(f *testing.F) {
	for _, o := range []*kvpb.Operation{setOp("k", "v"), deleteOp("k"), getOp("k", true), {Operation: &kvpb.Operation_Set{Set: &kvpb.SetRequest{Key: "k", ExpectedVersion: new(uint64(3)), RequestId: &kvpb.RequestId{Session: 1, Sequence: 2}}}}} {
		b, err := proto.Marshal(o)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseOperation(b)
		if err != nil {
			return
		}
		var o kvpb.Operation
		if err := proto.Unmarshal(b, &o); err != nil || !sameOperation(p, &o) {
			t.Errorf("%+v is %v, %v", p, &o, err)
		}
		if _, err := parseBatch(append([]byte{0x1a}, protowire.AppendBytes(nil, b)...), nil); (err == nil) != (p.kind == opSet || p.kind == opDelete) {
			t.Error(err)
		}
	})
}
