// Tests of KVService's unary methods, and of what covers all unary calls.

package main

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// TestMalformedRequests: what cannot be decoded is refused with a reason, by every unary
// method for clients and operators, and the answer names the leader as every other does.
func TestMalformedRequests(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	leader := c.nodes[1].address
	for _, method := range unaryMethods() {
		var trailer metadata.MD
		err := c.nodes[1].conn.Invoke(c.ctx, method, []byte("\x0a\x05k"), nil,
			grpc.ForceCodec(rawCodec{}), grpc.Trailer(&trailer))
		wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
		if named := trailer.Get(leaderMetadata); len(named) != 1 || named[0] != leader {
			t.Errorf("%s names %v as the leader, want %s", method, named, leader)
		}
	}
}

// TestUnknownFieldsAreRefused: a field that a node does not know might mean something
// else than what it would do, wherever it stands in a request.
func TestUnknownFieldsAreRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	unknown := protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1)
	withUnknown := func(m proto.Message) proto.Message {
		m = proto.Clone(m)
		m.ProtoReflect().SetUnknown(unknown)
		return m
	}
	id := withUnknown(&kvpb.RequestId{Session: 1, Sequence: 1}).(*kvpb.RequestId)
	for _, tt := range []struct {
		method string
		req    proto.Message
	}{
		{kvpb.KVService_Get_FullMethodName, withUnknown(&kvpb.GetRequest{Key: "k"})},
		{kvpb.KVService_Set_FullMethodName, withUnknown(&kvpb.SetRequest{Key: "k"})},
		{kvpb.KVService_Set_FullMethodName, &kvpb.SetRequest{Key: "k", RequestId: id}},
		{kvpb.KVService_Delete_FullMethodName, withUnknown(&kvpb.DeleteRequest{Key: "k"})},
		{kvpb.KVService_Delete_FullMethodName, &kvpb.DeleteRequest{Key: "k", RequestId: id}},
		{kvpb.KVService_OpenSession_FullMethodName, withUnknown(&kvpb.OpenSessionRequest{})},
	} {
		err := c.nodes[1].conn.Invoke(c.ctx, tt.method, mustMarshal(t, tt.req), nil, grpc.ForceCodec(rawCodec{}))
		wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
	c.wantsAbsent(1, "k")
}

// TestEmptyValueIsPresent: a key with an empty value is not absent, however the store
// keeps it.
func TestEmptyValueIsPresent(t *testing.T) {
	s := &server{n: turnNode()}
	s.n.store.clusterID = 1
	s.n.store.set([]byte("packed"), item{nil, 1})
	s.n.store.shards[shardOf("apart")].rest = map[string]item{"apart": {nil, 2}}
	for _, key := range []string{"packed", "apart"} {
		resp, err := s.Get(t.Context(), &kvpb.GetRequest{Key: key, Local: true})
		if err != nil || resp.Value == nil || resp.Version == 0 {
			t.Errorf("%s: %v, %v", key, resp, err)
		}
	}
}

// TestEncodeAsWrite: the log gets what protobuf would make of the write.
func TestEncodeAsWrite(t *testing.T) {
	set := &kvpb.SetRequest{
		Key: "k", Value: []byte("v"), ExpectedVersion: new(uint64),
		RequestId: &kvpb.RequestId{Session: 1, Sequence: 2},
	}
	del := &kvpb.DeleteRequest{Key: strings.Repeat("k", maxKeyBytes), ExpectedVersion: new(uint64(7))}
	open := &kvpb.NewSession{Session: 1 << 62}
	for _, tt := range []struct {
		kind protowire.Number
		req  proto.Message
		want *kvpb.Write
	}{
		{opSet, set, &kvpb.Write{Operation: &kvpb.Write_Set{Set: set}}},
		{opDelete, del, &kvpb.Write{Operation: &kvpb.Write_Delete{Delete: del}}},
		{opNewSession, open, &kvpb.Write{Operation: &kvpb.Write_NewSession{NewSession: open}}},
	} {
		encoded, err := encodeAsWrite(tt.kind, tt.req)
		if err != nil || string(encoded) != string(mustMarshal(t, tt.want)) {
			t.Errorf("%.99s is encoded as %.99q, %v", tt.want, encoded, err)
		}
	}
}

// TestGetThatWaits: a Get whose answer is large waits for room, asks nobody again when
// there is some, and answers what is there by then. One whose answer is small waits for
// nothing.
func TestGetThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(&refusing{left: 1}, wide, quiet())
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx := grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: conn.RemoteAddr()})
		s := &server{n: turnNode()}
		s.n.store.clusterID = 1
		large := func(fill string) []byte { return []byte(strings.Repeat(fill, maxValueBytes)) }
		s.n.store.set([]byte("large"), item{large("a"), 1})
		s.n.store.set([]byte("small"), item{[]byte("v"), 2})
		rounds := 0
		get := func(key string) (any, error) {
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			return s.answer(ctx, &kvpb.GetRequest{Key: key}, func(ctx context.Context, req any) (any, error) {
				r := proto.CloneOf(req.(*kvpb.GetRequest))
				if !r.Local {
					rounds++
					r.Local = true // no loop runs here
				}
				return s.Get(ctx, r)
			})
		}
		_, pool, err := admit(ctx, func() (any, int, error) { return nil, maxConnectionUnread, nil })
		if err != nil {
			t.Fatal(err)
		}
		answered := make(chan *kvpb.GetResponse, 1)
		go func() {
			resp, err := get("large")
			if err != nil {
				t.Error(err)
				answered <- nil
				return
			}
			var got kvpb.GetResponse
			if err := proto.Unmarshal(resp.(*encoded).b, &got); err != nil {
				t.Error(err)
			}
			answered <- &got
		}()
		synctest.Wait()
		if resp, err := get("small"); err != nil || string(resp.(*kvpb.GetResponse).Value) != "v" {
			t.Errorf("a small answer: %v, %v", resp, err)
		}
		select {
		case <-answered:
			t.Fatal("there was room")
		default:
		}
		s.n.store.mu.Lock()
		s.n.store.set([]byte("large"), item{large("b"), 3})
		s.n.store.mu.Unlock()
		rounds = 0
		pool.Put(nil)
		if got := <-answered; got.GetVersion() != 3 || rounds != 0 {
			t.Errorf("it answers version %d, and asks %d times more", got.GetVersion(), rounds)
		}
	})
}

// TestFieldsThatAreNotUTF8: the error names the field, in a message within another, too.
func TestFieldsThatAreNotUTF8(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	for _, test := range []struct{ method, message, field string }{
		{kvpb.KVService_Set_FullMethodName, "\x0a\x01\xff", "key"},
		{kvpb.KVService_Delete_FullMethodName, "\x0a\x02k\xff", "key"},
		{kvpb.KVService_List_FullMethodName, "\x0a\x01\xff", "prefix"},
		{kvpb.ClusterService_AddLearner_FullMethodName, "\x0a\x03\x12\x01\xff", "node.address"},
		{kvpb.KVService_Set_FullMethodName, "\x0a\x05k", "request"},
		{kvpb.KVService_Set_FullMethodName, "\x0a\x01k\x12\x05v", "request"},
	} {
		var answer encoded
		err := c.nodes[1].conn.Invoke(c.ctx, test.method, &encoded{b: []byte(test.message)}, &answer,
			grpc.ForceCodecV2(codec{encoding.GetCodecV2("proto")}))
		if status.Code(err) != codes.InvalidArgument || fieldOf(err) != test.field {
			t.Errorf("%s of %q: %v, which names %q, want %q", test.method, test.message, err, fieldOf(err), test.field)
		}
	}
}

// fieldOf is the field that an error names.
func fieldOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.Metadata["field"]
		}
	}
	return ""
}
