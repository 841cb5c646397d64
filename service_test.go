// Tests of service.go, pipeline.go and operation.go: what clients call, well-formed or
// not, how it is answered, and in which time.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/health" // has gRPC's clients check it
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protodelim"
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
		{kvpb.KVService_List_FullMethodName, withUnknown(&kvpb.ListRequest{})},
		{kvpb.KVService_DeleteRange_FullMethodName, withUnknown(&kvpb.DeleteRangeRequest{Prefix: "k"})},
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
	s.n.store.tree.set([]byte("never more"), item{nil, 1})
	s.n.store.tree.set([]byte("once more"), item{make([]byte, maxPacked+1), 2})
	s.n.store.tree.set([]byte("once more"), item{nil, 3})
	for _, key := range []string{"never more", "once more"} {
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
	open := &kvpb.NewSession{Session: 1 << 62, Owner: "client/shop"}
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
	withFakeClock(t, func(t *testing.T) {
		l := newLimiter(&refusing{left: 1}, wide, nil, quiet())
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx := grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: conn.RemoteAddr()})
		s := &server{n: turnNode()}
		s.n.store.clusterID = 1
		large := func(fill string) []byte { return []byte(strings.Repeat(fill, maxValueBytes)) }
		s.n.store.tree.set([]byte("large"), item{large("a"), 1})
		s.n.store.tree.set([]byte("small"), item{[]byte("v"), 2})
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
		var untaken []*answerPool
		for range connLargeAnswers {
			a, err := connOf(ctx).l.answers.admit(ctx, sharer{conn: connOf(ctx)}, maxValueBytes)
			if err != nil {
				t.Fatal(err)
			}
			untaken = append(untaken, a)
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
		s.n.store.tree.set([]byte("large"), item{large("b"), 3})
		s.n.store.mu.Unlock()
		rounds = 0
		untaken[0].Put(nil)
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

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }

func (rawCodec) Unmarshal([]byte, any) error { return nil }

func (rawCodec) Name() string { return "proto" }

// bytesCodec sends and receives bytes as they are.
type bytesCodec struct{ rawCodec }

func (bytesCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = slices.Clone(b)
	return nil
}

// badCall is a call that a node has to refuse.
type badCall struct {
	name   string
	code   codes.Code
	reason string
	call   func(context.Context, *testNode) error
}

func badSet(name, key string, value []byte) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.Set(ctx, &kvpb.SetRequest{Key: key, Value: value})
		return err
	}}
}

func badGet(name, key string, local bool) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.Get(ctx, &kvpb.GetRequest{Key: key, Local: local})
		return err
	}}
}

func badList(name string, req *kvpb.ListRequest) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.List(ctx, req)
		return err
	}}
}

func badDelete(name, key string) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) error {
		_, err := n.Delete(ctx, &kvpb.DeleteRequest{Key: key})
		return err
	}}
}

func badWrite(name string, w *kvpb.Write) badCall {
	return badCall{name, codes.InvalidArgument, "INVALID_FIELD", func(ctx context.Context, n *testNode) (err error) {
		if set := w.GetSet(); set != nil {
			_, err = n.Set(ctx, set)
		} else {
			_, err = n.Delete(ctx, w.GetDelete())
		}
		return err
	}}
}

func badLearner(name string, id uint64, address string, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		_, err := n.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: id, Address: address}})
		return err
	}}
}

func badChange(name string, req *kvpb.ChangeMembershipRequest, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		_, err := n.ChangeMembership(ctx, req)
		return err
	}}
}

func badTransfer(name string, to uint64, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		_, err := n.TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: to})
		return err
	}}
}

func badBytes(name, method, message string, code codes.Code, reason string) badCall {
	return badCall{name, code, reason, func(ctx context.Context, n *testNode) error {
		return n.conn.Invoke(ctx, method, []byte(message), nil, grpc.ForceCodec(rawCodec{}))
	}}
}

// badStream is what is no gRPC at all: the node has to hang up.
func badStream(name, text string) badCall {
	return badCall{name, codes.OK, "", func(_ context.Context, n *testNode) error {
		conn, err := net.Dial("tcp", n.address)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, text) // it may hang up before the end
		_ = conn.SetReadDeadline(time.Now().Add(rpcTimeout))
		if _, err = io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.New("the connection stays open")
		}
		return nil
	}}
}

func badHello(name string, want kvpb.Verdict, change func(*kvpb.Hello)) badCall {
	return badCall{name, codes.OK, "", func(_ context.Context, n *testNode) error {
		h, err := stranger(n)
		if err != nil {
			return err
		}
		change(h)
		if w, err := greetNode(n, h); err != nil || w.Verdict != want {
			return fmt.Errorf("%v, %v, want %v", w, err, want)
		}
		return nil
	}}
}

// badSnapshot would erase a node that took it.
func badSnapshot(name string, code codes.Code, change func(*kvpb.InstallSnapshotRequest, *kvpb.SnapshotHeader)) badCall {
	return badCall{name, code, "", func(ctx context.Context, n *testNode) error {
		hello, err := stranger(n)
		if err != nil {
			return err
		}
		first := &kvpb.InstallSnapshotRequest{Hello: hello, Term: 1 << 20}
		header := &kvpb.SnapshotHeader{
			Format: 1, ClusterId: hello.ClusterId, Index: 1 << 30, Term: 1 << 20,
			ConfState: &kvpb.ConfState{Voters: []uint64{77, hello.To.RaftId}},
			Members:   []*kvpb.Member{{RaftId: 77, Node: hello.From.Node}, {RaftId: hello.To.RaftId, Node: hello.To.Node}},
		}
		change(first, header)
		var b bytes.Buffer
		for _, r := range []*kvpb.SnapshotRecord{{Record: &kvpb.SnapshotRecord_Header{Header: header}}, {Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{}}}} {
			if _, err := protodelim.MarshalTo(&b, r); err != nil {
				return err
			}
		}
		damage := first.Data
		first.Data = framed(b.Bytes())
		copy(first.Data[8+4:], damage)
		peer, hangUp := callAsPeer(n)
		defer hangUp()
		s, err := peer.InstallSnapshot(ctx)
		if err != nil {
			return err
		}
		if err := s.Send(first); err != nil && err != io.EOF {
			return err
		}
		_, err = s.CloseAndRecv()
		return err
	}}
}

// forwarded makes a call look as if another node had passed it on.
func forwarded(b badCall) badCall {
	call := b.call
	b.name = "forwarded: " + b.name
	b.call = func(ctx context.Context, n *testNode) error {
		return call(metadata.AppendToOutgoingContext(ctx, "x-raft-forwarded", "1"), n)
	}
	return b
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4, steady)
	c.start(5, "127.0.0.1:0") // in no cluster
	c.start(6, "127.0.0.1:0") // in another cluster
	c.init(6)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	was4 := c.nodes[4].address
	c.stop(4)
	c.start(7, was4)
	c.works(1, 2, 3)
	leader := c.settled(1, 2, 3)
	follower := 1 + leader%3
	eventually(t, func() error { // 4 will never have what is written now
		m, err := c.metrics(leader)
		for _, ms := range m.GetMembers() {
			if ms.Node.Id == 4 && ms.GetProgress().GetCaughtUp() {
				err = errors.New("node 4 counts as caught up")
			}
		}
		return err
	})

	const invalid = codes.InvalidArgument
	voters := func(ids ...uint64) *kvpb.ChangeMembershipRequest {
		return &kvpb.ChangeMembershipRequest{Members: ids}
	}
	long := strings.Repeat("k", 64<<10+1)
	address2 := c.nodes[2].address
	bad := []badCall{
		badSet("set of an empty key", "", nil),
		badSet("set of a long key", long, nil),
		badSet("a long value", "k", make([]byte, 1<<20+1)),
		badGet("get of an empty key", "", false),
		badGet("local get of a long key", long, true),
		badDelete("delete of an empty key", ""),
		badWrite("set with session 0", withID(0, 1, setWrite("k", "v"))),
		badWrite("set with sequence 0", withID(1, 0, setWrite("k", "v"))),
		badWrite("delete with session 0", withID(0, 1, deleteWrite("k"))),
		badWrite("delete with sequence 0", withID(1, 0, deleteWrite("k"))),
		badWrite("delete of what must not exist", deleteIf("k", 0)),
		badDelete("delete of a long key", long),
		badList("list of a long prefix", &kvpb.ListRequest{Prefix: long}),
		badList("list from a long token", &kvpb.ListRequest{PageToken: long, Local: true}),
		badList("list of too much", &kvpb.ListRequest{Limit: 10_001}),
		badBytes("set of a key that is no UTF-8", kvpb.KVService_Set_FullMethodName, "\x0a\x01\xff", invalid, "INVALID_FIELD"),
		badBytes("delete of a key that is no UTF-8", kvpb.KVService_Delete_FullMethodName, "\x0a\x01\xff", invalid, "INVALID_FIELD"),
		badBytes("a message that is cut off", kvpb.KVService_Set_FullMethodName, "\x0a\x05k", invalid, "INVALID_FIELD"),
		badBytes("a get with an unknown field", kvpb.KVService_Get_FullMethodName, "\x0a\x01k\x48\x01", invalid, "INVALID_FIELD"),
		badBytes("a get with a key that is a number", kvpb.KVService_Get_FullMethodName, "\x08\x01", invalid, "INVALID_FIELD"),
		badBytes("a message that is far too long", kvpb.KVService_Set_FullMethodName, strings.Repeat("x", 9<<20), codes.ResourceExhausted, ""),
		badBytes("an unknown method", "/raftkv.v1.KVService/Steal", "", codes.Unimplemented, ""),

		badLearner("learner with id 0", 0, c.nodes[5].address, invalid, "INVALID_FIELD"),
		badLearner("learner without address", 5, "", invalid, "INVALID_FIELD"),
		badLearner("learner without port", 5, "127.0.0.1", invalid, "INVALID_FIELD"),
		badLearner("learner without host", 5, ":1", invalid, "INVALID_FIELD"),
		badLearner("learner with an endless address", 5, strings.Repeat("h", 300)+":1", invalid, "INVALID_FIELD"),
		badLearner("learner whose address has another node", 8, c.nodes[5].address, codes.FailedPrecondition, "WRONG_NODE"),
		badLearner("learner with a member's id and another's address", 2, c.nodes[5].address, codes.FailedPrecondition, "WRONG_NODE"),
		badLearner("learner at a member's address", 8, address2, codes.FailedPrecondition, "WRONG_NODE"),
		badLearner("learner at the address of a member that has gone", 7, was4, codes.AlreadyExists, "MEMBER_EXISTS"),
		badLearner("learner of another cluster", 6, c.nodes[6].address, codes.FailedPrecondition, "ALREADY_INITIALIZED"),
		badLearner("unreachable learner", 8, deadAddress(t), codes.Unavailable, "UNREACHABLE"),

		badChange("no voters", voters(), invalid, "INVALID_FIELD"),
		badChange("voter 0", voters(0, 1, 2), invalid, "INVALID_FIELD"),
		badChange("a voter twice", voters(1, 2, 2), invalid, "INVALID_FIELD"),
		badChange("a voter that is to leave", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}, Remove: []uint64{2}}, invalid, "INVALID_FIELD"),
		badChange("too many voters", voters(slices.Collect(func(yield func(uint64) bool) {
			for i := uint64(1); i < 100 && yield(i); i++ {
			}
		})...), invalid, "INVALID_FIELD"),
		badChange("an unknown voter", voters(1, 2, 3, 99), codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("a voter that is not there", voters(1, 2, 3, 4), codes.Unavailable, "UNREACHABLE"),
		badChange("no voter left", &kvpb.ChangeMembershipRequest{Remove: []uint64{1, 2, 3}}, invalid, "INVALID_FIELD"),
		badChange("an unknown member to be removed", &kvpb.ChangeMembershipRequest{Remove: []uint64{99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("a learner and an unknown one to be removed", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4, 99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("voters, and who is promoted", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Promote: []uint64{4}}, invalid, "INVALID_FIELD"),
		badChange("voters, and who is demoted", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}, Demote: []uint64{3}}, invalid, "INVALID_FIELD"),
		badChange("retained, and demoted", &kvpb.ChangeMembershipRequest{Demote: []uint64{3}, Retain: true}, invalid, "INVALID_FIELD"),
		badChange("promoted and demoted", &kvpb.ChangeMembershipRequest{Promote: []uint64{3}, Demote: []uint64{3}}, invalid, "INVALID_FIELD"),
		badChange("promoted and removed", &kvpb.ChangeMembershipRequest{Promote: []uint64{4}, Remove: []uint64{4}}, invalid, "INVALID_FIELD"),
		badChange("nobody promoted", &kvpb.ChangeMembershipRequest{Promote: []uint64{0}}, invalid, "INVALID_FIELD"),
		badChange("all demoted", &kvpb.ChangeMembershipRequest{Demote: []uint64{1, 2, 3}}, invalid, "INVALID_FIELD"),
		badChange("an unknown one to be promoted", &kvpb.ChangeMembershipRequest{Promote: []uint64{99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("an unknown one to be demoted", &kvpb.ChangeMembershipRequest{Demote: []uint64{99}}, codes.NotFound, "UNKNOWN_MEMBER"),
		badChange("a learner promoted that is not there", &kvpb.ChangeMembershipRequest{Promote: []uint64{4}}, codes.Unavailable, "UNREACHABLE"),
		badChange("nobody expected", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: &kvpb.Membership{}}, invalid, "INVALID_FIELD"),
		badChange("a member expected without node", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: &kvpb.Membership{Members: []*kvpb.ExpectedMember{{}}}}, invalid, "INVALID_FIELD"),
		badChange("too many expected", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: &kvpb.Membership{Members: make([]*kvpb.ExpectedMember, 2*maxMembers+1)}}, invalid, "INVALID_FIELD"),
		badChange("another membership expected", &kvpb.ChangeMembershipRequest{Remove: []uint64{4}, Expected: expectedOf([]uint64{1, 2, 3}, []uint64{4})}, codes.Aborted, "MEMBERSHIP_CHANGED"),
		badTransfer("leader 0", 0, invalid, "INVALID_FIELD"),
		badTransfer("an unknown leader", 99, codes.NotFound, "UNKNOWN_MEMBER"),
		badTransfer("a learner as leader", 4, codes.FailedPrecondition, "NOT_CAUGHT_UP"),
		{"init again", codes.FailedPrecondition, "ALREADY_INITIALIZED", func(ctx context.Context, n *testNode) error {
			_, err := n.Init(ctx, &kvpb.InitRequest{Members: []*kvpb.Node{{Id: n.id, Address: n.address}}})
			return err
		}},

		badStream("nothing but noise", strings.Repeat("\x00\xff\x16noise\r\n", 1000)),
		badStream("HTTP/1", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		badStream("HTTP/2, then noise", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+strings.Repeat("\xff", 1000)),
		{"a stream without hello", invalid, "", func(_ context.Context, n *testNode) error {
			_, err := greetNode(n, nil)
			return err
		}},
		badHello("hello from another cluster", kvpb.Verdict_VERDICT_OTHER_CLUSTER, func(h *kvpb.Hello) { h.ClusterId++ }),
		badHello("hello from no cluster", kvpb.Verdict_VERDICT_OTHER_CLUSTER, func(h *kvpb.Hello) { h.ClusterId = 0 }),
		badHello("hello to another raft ID", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.RaftId++ }),
		badHello("hello to another life", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.Life++ }),
		badHello("hello to another id", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.Node.Id++ }),
		badHello("hello to another address", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.To.Node.Address = "127.0.0.1:1" }),
		badHello("hello from itself", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.From.RaftId = h.To.RaftId }),
		badHello("hello from nobody", kvpb.Verdict_VERDICT_NOT_ME, func(h *kvpb.Hello) { h.From = nil }),
		badSnapshot("a snapshot from a stranger", codes.FailedPrecondition, func(*kvpb.InstallSnapshotRequest, *kvpb.SnapshotHeader) {}),
		badSnapshot("a snapshot of another cluster", codes.FailedPrecondition, func(_ *kvpb.InstallSnapshotRequest, h *kvpb.SnapshotHeader) { h.ClusterId++ }),
		badSnapshot("a snapshot from another cluster", codes.FailedPrecondition, func(r *kvpb.InstallSnapshotRequest, h *kvpb.SnapshotHeader) { h.ClusterId++; r.Hello.ClusterId++ }),
		badSnapshot("a snapshot for another life", codes.FailedPrecondition, func(r *kvpb.InstallSnapshotRequest, _ *kvpb.SnapshotHeader) { r.Hello.To.Life++ }),
		badSnapshot("a snapshot from nobody to nobody", codes.FailedPrecondition, func(r *kvpb.InstallSnapshotRequest, _ *kvpb.SnapshotHeader) {
			r.Hello.From, r.Hello.To.RaftId = nil, 0
		}),
		badSnapshotOfPeer("a damaged snapshot", codes.DataLoss, func(r *kvpb.InstallSnapshotRequest, _ *kvpb.SnapshotHeader) { r.Data = []byte("a checksum")[:4] }),
		badSnapshotOfPeer("a snapshot without index", codes.DataLoss, func(_ *kvpb.InstallSnapshotRequest, h *kvpb.SnapshotHeader) { h.Index = 0 }),
	}
	for i, b := range bad {
		t.Run(b.name, func(t *testing.T) {
			before := c.picture(1)
			for _, id := range []uint64{leader, follower} { // the leader then, at least
				wantError(t, b.call(c.ctx, c.nodes[id]), b.code, b.reason)
			}
			if after := c.picture(1); after != before {
				t.Errorf("the state was %q and is %q", before, after)
			}
			c.works(uint64(1+i%3), uint64(1+(i+1)%3))
		})
	}
	// What was forwarded goes back, instead of round in circles, even if it
	// could be done.
	for _, b := range []badCall{
		forwarded(badLearner("add-learner", 5, c.nodes[5].address, codes.Unavailable, "NOT_LEADER")),
		forwarded(badChange("change-membership", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}, Remove: []uint64{4}}, codes.Unavailable, "NOT_LEADER")),
		forwarded(badTransfer("transfer-leader", 1, codes.Unavailable, "NOT_LEADER")),
	} {
		t.Run(b.name, func(t *testing.T) {
			leader := c.settled(1, 2, 3)
			before := c.picture(1)
			for id := uint64(1); id <= 3; id++ {
				if id != leader {
					wantError(t, b.call(c.ctx, c.nodes[id]), b.code, b.reason)
				}
			}
			if after := c.picture(1); after != before {
				t.Errorf("the state was %q and is %q", before, after)
			}
		})
	}
	c.uninitialized(5, 7)
	c.sameStates(1, 2, 3)
}

func TestList(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.init(1, 2, 3)
	want := map[string]bool{}
	for i := range 60 {
		key := fmt.Sprintf("%c/%02d", "ab"[i%2], i)
		want[key] = true
		c.set(1+uint64(i)%3, key, fmt.Sprint("value ", i))
	}
	keysOf := func(items []*kvpb.KeyValue) (keys []string) {
		for _, it := range items {
			keys = append(keys, it.Key)
		}
		return keys
	}
	all := slices.Sorted(maps.Keys(want))
	c.sameStates(1, 2, 3)
	for id := uint64(1); id <= 3; id++ {
		for _, tt := range []struct {
			req   *kvpb.ListRequest
			keys  []string
			pages int
		}{
			{&kvpb.ListRequest{}, all, 1},
			{&kvpb.ListRequest{Local: true}, all, 1},
			{&kvpb.ListRequest{Limit: 10_000}, all, 1},
			{&kvpb.ListRequest{Limit: 60}, all, 1},
			{&kvpb.ListRequest{Limit: 59}, all, 2},
			{&kvpb.ListRequest{Limit: 1, Local: true}, all, 60},
			{&kvpb.ListRequest{Limit: 7, Prefix: "b/", Local: true}, all[30:], 5},
			{&kvpb.ListRequest{Prefix: "a/0"}, all[:5], 1},
			{&kvpb.ListRequest{Prefix: "a/00"}, all[:1], 1},
			{&kvpb.ListRequest{Prefix: "a/000"}, nil, 1},
			{&kvpb.ListRequest{Prefix: "c"}, nil, 1},
			{&kvpb.ListRequest{PageToken: all[9]}, all[10:], 1},
			{&kvpb.ListRequest{PageToken: all[9] + "\x00", Limit: 25}, all[10:], 2},
			{&kvpb.ListRequest{PageToken: "zzz"}, nil, 1},
			{&kvpb.ListRequest{PageToken: strings.Repeat("a", maxKeyBytes), Prefix: "b", Limit: 30}, all[30:], 1},
		} {
			items, pages, err := c.listAll(id, tt.req)
			if err != nil || pages != tt.pages || !slices.Equal(keysOf(items), tt.keys) {
				t.Errorf("List %v through node %d: %q in %d pages, %v; want %q in %d", tt.req, id, keysOf(items), pages, err, tt.keys, tt.pages)
			}
			for _, it := range items[:min(3, len(items))] {
				c.wants(id, true, it.Key, string(it.Value), it.Version)
			}
		}
		for _, b := range []badCall{
			badList("a long prefix", &kvpb.ListRequest{Prefix: strings.Repeat("p", maxKeyBytes+1)}),
			badList("a long token", &kvpb.ListRequest{PageToken: strings.Repeat("p", maxKeyBytes+1)}),
			badList("too many", &kvpb.ListRequest{Limit: 10_001}),
		} {
			wantError(t, b.call(c.ctx, c.nodes[id]), b.code, b.reason)
		}
	}
	for _, local := range []bool{true, false} {
		_, err := c.nodes[4].List(c.ctx, &kvpb.ListRequest{Local: local})
		wantError(t, err, codes.Unavailable, "NOT_INITIALIZED")
	}
	// A write is seen at once, wherever it was made.
	for i := range 20 {
		c.set(1+uint64(i)%3, fmt.Sprintf("z/%02d", i), "v")
		if items, _, err := c.listAll(1+uint64(i+1)%3, &kvpb.ListRequest{Prefix: "z/"}); err != nil || len(items) != i+1 {
			t.Fatalf("after %d writes: %d items, %v", i+1, len(items), err)
		}
	}

	// Pages while others write: what was there throughout is in them.
	ctx, cancel := context.WithCancel(c.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var writes atomic.Int64
	for id := uint64(1); id <= 3; id++ {
		n := c.nodes[id]
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprintf("%c/%02d passing %d", "ab"[i%2], i%60, id)
				if _, err := n.Set(ctx, &kvpb.SetRequest{Key: key, Value: []byte("v")}); err != nil {
					return
				}
				// Present all the time, but not always the same.
				if _, err := n.Set(ctx, &kvpb.SetRequest{Key: all[i%len(all)], Value: []byte(fmt.Sprint(i, " by ", id))}); err != nil {
					return
				}
				if _, err := n.Delete(ctx, &kvpb.DeleteRequest{Key: key}); err != nil {
					return
				}
				writes.Add(3)
			}
		})
	}
	passing := false
	eventually(t, func() error {
		for id := uint64(1); id <= 3; id++ {
			for _, limit := range []uint32{3, 10, 10_000} {
				items, _, err := c.listAll(id, &kvpb.ListRequest{Limit: limit, Prefix: "a/", Local: limit == 10})
				if err != nil {
					return err
				}
				keys := keysOf(items)
				if !slices.IsSorted(keys) || len(slices.Compact(slices.Clone(keys))) != len(keys) {
					t.Fatalf("out of order, or twice: %q", keys)
				}
				passing = passing || len(keys) > 30
				if got := slices.DeleteFunc(keys, func(k string) bool { return !want[k] }); !slices.Equal(got, all[:30]) {
					t.Fatalf("not all that was there: %q", got)
				}
			}
		}
		if !passing || writes.Load() < 300 {
			return errors.New("nobody wrote meanwhile")
		}
		return nil
	})
	cancel()
	wg.Wait()

	// Large values: a page ends before it has more than 1 MiB, but never empty.
	large := strings.Repeat("x", 1<<20)
	for i := range 3 {
		c.set(1, fmt.Sprint("large ", i, " whole"), large)
		c.set(2, fmt.Sprint("large ", i, " half"), large[:1<<19])
		c.set(3, fmt.Sprint("large ", i, " small"), "v")
	}
	for id := uint64(1); id <= 3; id++ {
		items, pages, err := c.listAll(id, &kvpb.ListRequest{Prefix: "large "})
		if err != nil || len(items) != 9 || pages != 6 {
			t.Errorf("%d items of 9 in %d pages of 6: %v", len(items), pages, err)
		}
		resp, err := c.nodes[id].List(c.ctx, &kvpb.ListRequest{Prefix: "large 0 w"})
		if err != nil || len(resp.Items) != 1 || len(resp.Items[0].Value) != 1<<20 || resp.NextPageToken != "" {
			t.Errorf("a value of 1 MiB is no page: %d items, %v", len(resp.GetItems()), err)
		}
	}
}

// TestDeadlines: a call ends a margin before its caller's deadline, wherever it
// waits, and once.
func TestDeadlines(t *testing.T) {
	leaderless := func() *node { // for a moment
		l := newLone(t, following)
		l.n.peerDown(2, true)
		l.turn(0)
		return l.n
	}
	n := leaderless()
	newCall := func(record []byte) *call {
		return &call{write: record, since: n.clock.wall, wait: 3, done: make(chan outcome, 1)}
	}
	write, read := newCall([]byte{1}), newCall(nil)
	n.turn(input{calls: []*call{write, read}})
	asked, confirmed, proposed, patient := newCall(nil), newCall(nil), newCall([]byte{1}), &call{write: []byte{1}, done: make(chan outcome, 1)}
	n.calls.round, n.calls.confirmed, n.calls.own = readRound{calls: []*call{asked}}, []readRound{{calls: []*call{confirmed}}}, &proposal{calls: []*call{proposed, patient}}
	n.turn(input{ticks: 2})
	for i, c := range []*call{write, read, asked, confirmed, proposed, patient} {
		if len(c.done) != 0 {
			t.Errorf("call %d ends early: %v", i, (<-c.done).err)
		}
	}
	n.turn(input{ticks: 1})
	for i, c := range []*call{write, read, asked, confirmed, proposed} {
		want := errNoLeader // tells more than that the time is up
		if c == proposed {
			want = errUnknownInTime
		}
		if len(c.done) != 1 {
			t.Errorf("call %d does not end", i)
		} else if o := <-c.done; !errors.Is(o.err, want) {
			t.Errorf("call %d: %v, want %v", i, o.err, want)
		}
	}
	if n.calls.own == nil || len(n.calls.writes)+len(n.calls.reads)+len(n.calls.round.calls)+len(n.calls.confirmed[0].calls) != 0 {
		t.Error("what has ended still waits, or the proposal does not")
	}
	n.calls.failAll(errStopping)
	if len(proposed.done) != 0 || len(patient.done) != 1 {
		t.Error("it ends twice, or its neighbour does not")
	}
	// Ticks that a busy loop misses count.
	for _, missed := range []uint64{8, 9} {
		n := leaderless()
		c := &call{write: []byte{1}, wait: 10, done: make(chan outcome, 1)}
		n.turn(input{ticks: 3, calls: []*call{c}})
		n.turn(input{ticks: 1, elapsed: 3 + missed})
		if (len(c.done) == 1) != (missed == 9) {
			t.Errorf("with %d ticks missed: %d calls have ended", missed, len(c.done))
		}
	}

	s := &server{n: n}
	for left, want := range map[time.Duration]time.Duration{time.Hour: maxMargin, time.Second: maxMargin, 300 * time.Millisecond: 30 * time.Millisecond} {
		if got := margin(left); got != want {
			t.Errorf("the margin of %v is %v, want %v", left, got, want)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	// Whatever time that took, it is below a tick.
	if end := time.Duration(s.ticksLeft(ctx)) * n.tickDuration(); end > time.Hour-maxMargin || end < time.Hour-time.Minute {
		t.Errorf("a call of an hour ends after %v", end)
	}
	for _, left := range []time.Duration{-time.Hour, 0, 2 * n.tickDuration()} {
		ctx, cancel := context.WithTimeout(context.Background(), left)
		defer cancel()
		if w := s.ticksLeft(ctx); w != 0 {
			t.Errorf("with %v left it waits %d ticks: it might end at once", left, w)
		}
	}
	if s.ticksLeft(context.Background()) != 0 {
		t.Error("there is no deadline")
	}
}

// TestMargin: operators' requests end early, and all of them some time.
func TestMargin(t *testing.T) {
	deadline := time.Now().Add(time.Hour)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	ctx, cancel = inTime(ctx)
	defer cancel()
	if got, ok := ctx.Deadline(); !ok || !got.Equal(deadline.Add(-maxMargin)) {
		t.Errorf("%v, want %v", got, deadline.Add(-maxMargin))
	}
	ctx, cancel = inTime(context.Background())
	defer cancel()
	if _, ok := ctx.Deadline(); !ok {
		t.Error("no deadline")
	}
}

// TestReasonBeforeDeadline: a node whose loop hangs, as with a disk that does, still says
// of each call why it ends, before its caller's deadline; so does one that has no place for
// a call.
func TestReasonBeforeDeadline(t *testing.T) {
	t.Parallel()
	inOneBubble(t, 1, "", func(t *testing.T, b *bubble) {
		b.settled(1)
		n := b.nodes[1]
		calls := map[string]func(context.Context) error{
			"Get":    func(ctx context.Context) error { _, err := n.Get(ctx, &kvpb.GetRequest{Key: "k"}); return err },
			"Set":    func(ctx context.Context) error { _, err := n.Set(ctx, &kvpb.SetRequest{Key: "k"}); return err },
			"Delete": func(ctx context.Context) error { _, err := n.Delete(ctx, &kvpb.DeleteRequest{Key: "k"}); return err },
			"large Set": func(ctx context.Context) error {
				_, err := n.Set(ctx, &kvpb.SetRequest{Key: "k", Value: make([]byte, uncountedWrite)})
				return err
			},
			"OpenSession": func(ctx context.Context) error { _, err := n.OpenSession(ctx, &kvpb.OpenSessionRequest{}); return err },
			"List":        func(ctx context.Context) error { _, err := n.List(ctx, &kvpb.ListRequest{}); return err },
			"local List": func(ctx context.Context) error {
				_, err := n.List(ctx, &kvpb.ListRequest{Local: true, MinVersion: 1 << 50})
				return err
			},
			"Metrics": func(ctx context.Context) error { _, err := n.Metrics(ctx, &kvpb.MetricsRequest{}); return err },
			"TransferLeader": func(ctx context.Context) error {
				_, err := n.TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: 1})
				return err
			},
			"Init": func(ctx context.Context) error {
				_, err := n.Init(ctx, &kvpb.InitRequest{Members: b.proto(1)})
				return err
			},
			"Claim": func(ctx context.Context) error {
				_, err := kvpb.NewRaftServiceClient(n.conn).Claim(ctx, &kvpb.ClaimRequest{To: b.proto(1)[0]})
				return err
			},
			"Backup": func(ctx context.Context) error {
				s, err := n.Backup(ctx, &kvpb.BackupRequest{})
				if err == nil {
					_, err = s.Recv()
				}
				return err
			},
			"Pipeline": func(ctx context.Context) error {
				s, err := n.Pipeline(ctx)
				if err == nil {
					_, err = exchange(s, setOp("k", "v"))
				}
				return err
			},
		}
		all := slices.Collect(maps.Keys(calls))
		wantReasons := func(what string, names ...string) {
			for _, name := range names {
				ctx, cancel := context.WithTimeout(b.ctx, 2*time.Second)
				err := calls[name](ctx)
				if errorReason(err) == "" || ctx.Err() != nil {
					t.Errorf("%s: %s: %v", what, name, err)
				}
				isOpen := name == "Pipeline" // what it has not answered may have been made
				if isOpen != (errorReason(err) == "OUTCOME_UNKNOWN") {
					t.Errorf("%s: %s: whether it was made: %v", what, name, err)
				}
				cancel()
			}
		}
		release := b.hold(1)
		wantReasons("the loop hangs", all...)
		release()
		ctx, cancel := context.WithTimeout(b.ctx, 2*time.Second)
		defer cancel()
		err := n.server.Backup(&kvpb.BackupRequest{}, &unreadBackup{ctx: ctx})
		if errorReason(err) != "DEADLINE" || ctx.Err() != nil {
			t.Errorf("a backup that is not read: %v", err)
		}
		for range maxLists {
			n.server.lists <- struct{}{}
		}
		wantReasons("all Lists run", "List", "local List")
		for range maxLists {
			<-n.server.lists
		}
		release = fillRoom(n.server.limiter.writes)
		wantReasons("no room for requests", "large Set")
		release()
		release = fillRoom(n.server.limiter.pipelines)
		wantReasons("no room for operations", "Pipeline")
		release()
		for _, name := range []string{"large Set", "Pipeline"} {
			if err := calls[name](b.ctx); err != nil {
				t.Errorf("there is room again: %s: %v", name, err)
			}
		}
	})
}

// fillRoom takes all of a room that is empty, for a connection that is nobody's.
func fillRoom(r *room) (release func()) {
	nobody := sharer{conn: &limitedConn{}}
	all := r.limits.all
	r.mu.Lock()
	defer r.mu.Unlock()
	r.holders[nobody] = &roomHolder{used: all}
	r.used += all
	return func() { r.release(nobody, all) }
}

// unreadBackup is the stream of a Backup whose caller does not read.
type unreadBackup struct {
	kvpb.ClusterService_BackupServer
	ctx context.Context
}

func (s *unreadBackup) Context() context.Context { return s.ctx }

func (s *unreadBackup) Send(*kvpb.BackupResponse) error {
	<-s.ctx.Done()
	return s.ctx.Err()
}

// TestNoRoomInTime: an answer that waits for room ends before its caller's deadline.
func TestNoRoomInTime(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		l := newLimiter(&refusing{left: 1}, wide, nil, quiet())
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := conn.(*limitedConn)
		for range connLargeAnswers {
			pool, err := l.answers.admit(t.Context(), sharer{conn: c}, smallAnswer+1)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Put(nil)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err = l.answers.admit(ctx, sharer{conn: c}, smallAnswer+1)
		if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			t.Errorf("%v; at the caller: %v", err, ctx.Err())
		}
	})
}

// TestPings: a client may ping every 5 s, on a network that delays some pings more than
// others; one that pings all the time is told to go.
func TestPings(t *testing.T) {
	t.Parallel()
	inOneBubble(t, 1, "", func(t *testing.T, b *bubble) {
		// isSentAway pings a node, with these pauses in turn.
		isSentAway := func(pauses ...time.Duration) bool {
			conn, err := b.dial(b.ctx, "client", addressIn(1))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			r := &rude{Conn: conn, next: 1}
			if _, err := io.WriteString(r, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			if err := r.frame(frameSettings, 0, 0, nil); err != nil {
				t.Fatal(err)
			}
			goAway := make(chan bool, 1)
			go func() {
				header := make([]byte, 9)
				for {
					if _, err := io.ReadFull(conn, header); err != nil {
						goAway <- false
						return
					}
					if header[3] == frameGoAway {
						goAway <- true
						return
					}
					_, _ = io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(header)>>8))
				}
			}()
			for i := range 20 {
				_ = r.frame(framePing, 0, 0, make([]byte, 8)) // fails once it is sent away
				time.Sleep(pauses[i%len(pauses)])
			}
			_ = conn.Close()
			return <-goAway
		}
		if isSentAway(6500*time.Millisecond, 3500*time.Millisecond, 3500*time.Millisecond, 3500*time.Millisecond) {
			t.Error("a client that pings every 5 s, or somewhat sooner, is sent away")
		}
		if !isSentAway(time.Second) {
			t.Error("a client may ping every second")
		}
	})
}

// TestAnswersInTime: a request that its deadline cuts short is answered before
// that, so that the caller learns why.
func TestAnswersInTime(t *testing.T) {
	t.Parallel()
	caller, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	earlier, cancel := inTime(caller)
	defer cancel()
	theirs, _ := caller.Deadline()
	if ours, ok := earlier.Deadline(); !ok || theirs.Sub(ours) != 100*time.Millisecond {
		t.Errorf("it waits until %v, its caller until %v", ours, theirs)
	}
	c := newCluster(t, 3, patient)
	// soon makes a call that cannot be done. On a busy machine even that answer may be late, or
	// the loop may have no turn until the deadline: then the call is made again.
	soon := func(f func(context.Context) error) (err error) {
		t.Helper()
		eventually(t, func() error {
			ctx, cancel := context.WithTimeout(c.ctx, 500*time.Millisecond)
			defer cancel()
			err = f(ctx)
			if reason := reasonOf(err); reason == "" || reason == "DEADLINE" {
				return fmt.Errorf("no node says why, but: %v", err)
			}
			return nil
		})
		return err
	}
	release := c.holdOnceClaimed(2)
	half, cancel := context.WithTimeout(c.ctx, 5*time.Second)
	defer cancel()
	// Not by way of gRPC: on a busy machine, its answer might be late.
	_, err := c.nodes[1].server.Init(half, &kvpb.InitRequest{Members: c.proto(1, 2, 3)})
	wantError(t, toStatus(err, false), codes.DeadlineExceeded, "OUTCOME_UNKNOWN")
	wantPart(t, err.Error(), fmt.Sprintf("was made, but: the change was begun, whether it was or will be made is not known: context deadline exceeded; what is left, with --endpoints %s: "+
		"add-learner 2=%s, then add-learner 3=%s, then change-membership 1 2 3", c.nodes[1].address, c.nodes[2].address, c.nodes[3].address))
	release()
	c.addLearner(1, 2)

	c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}})
	c.settled(1, 2)

	release = c.hold(2) // nothing is committed any more
	// So much time that node 3 is asked who it is, and answers, on a busy machine, too.
	ctx, cancel := context.WithTimeout(c.ctx, 3*time.Second)
	defer cancel()
	_, err = c.nodes[1].server.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: c.proto(3)[0]})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("whoever began a change got: %v", err)
	}
	wantError(t, soon(func(ctx context.Context) error {
		_, err := c.nodes[1].ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Members: []uint64{1}})
		return err
	}), codes.Aborted, "CHANGE_IN_PROGRESS")
	wantError(t, soon(func(ctx context.Context) error {
		_, err := c.nodes[1].TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: 2})
		return err
	}), codes.Aborted, "CHANGE_IN_PROGRESS")
	release()
	c.stop(1) // hands over, right behind a change
}

// TestUnknownOutcomes: what a client is told of a write that the node has sent
// off and does not know the fate of.
func TestUnknownOutcomes(t *testing.T) {
	var late atomic.Bool
	plain, withIDs := []*kvpb.Write{setWrite("k", "v"), deleteWrite("k")}, []*kvpb.Write{withID(1, 1, setWrite("k", "v")), withID(1, 1, deleteWrite("k")), openWrite(1)}
	for _, tt := range []struct {
		name   string
		writes []*kvpb.Write
		end    func(n *node, cancel func())
		code   codes.Code
		reason string
	}{
		{"no leader for long", plain, func(n *node, _ func()) { n.calls.failOwn() }, codes.DeadlineExceeded, "OUTCOME_UNKNOWN"},
		{"no leader for long", withIDs, func(n *node, _ func()) { n.calls.failOwn() }, codes.Unavailable, "OUTCOME_UNKNOWN"},
		{"the node stops", withIDs, func(n *node, _ func()) { n.calls.failAll(errStopping) }, codes.Unavailable, "OUTCOME_UNKNOWN"},
		{"its deadline", plain, func(n *node, _ func()) { n.turn(input{ticks: 20}) }, codes.DeadlineExceeded, "OUTCOME_UNKNOWN"},
		{"its deadline", withIDs, func(n *node, _ func()) { n.turn(input{ticks: 20}) }, codes.DeadlineExceeded, "OUTCOME_UNKNOWN"},
		{"its deadline, as seen by its goroutine", withIDs, func(_ *node, cancel func()) { late.Store(true); cancel() }, codes.DeadlineExceeded, "OUTCOME_UNKNOWN"},
		{"its caller", withIDs, func(_ *node, cancel func()) { cancel() }, codes.Canceled, "OUTCOME_UNKNOWN"},
	} {
		for _, w := range tt.writes {
			n := turnNode()
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() {
				_, err := writeAs(lateContext{ctx, &late}, &server{n: n}, w)
				ended <- err
			}()
			var in input
			eventually(t, func() error {
				if in = n.inbox.take(); len(in.calls) == 0 {
					return errors.New("it has not come")
				}
				return nil
			})
			in.calls[0].wait = 20
			in.calls[0].state.Store(callProposed)
			n.calls.own = &proposal{calls: in.calls}
			late.Store(false)
			tt.end(n, cancel)
			err := toStatus(<-ended, true)
			cancel()
			if wantError(t, err, tt.code, tt.reason); t.Failed() {
				t.Fatalf("%s: %v", tt.name, w)
			}
		}
	}
}

// lateContext has ended by its deadline, if late says so.
type lateContext struct {
	context.Context
	late *atomic.Bool
}

func (c lateContext) Err() error {
	if err := c.Context.Err(); err == nil || !c.late.Load() {
		return err
	}
	return context.DeadlineExceeded
}

// TestReasonsArrive: the client is told the reason before its own deadline
// ends the call.
func TestReasonsArrive(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.init(1, 2)
	leader := c.settled(1, 2)
	c.cut(leader)
	for _, call := range []func(ctx context.Context, n *testNode) error{
		func(ctx context.Context, n *testNode) error {
			_, err := n.Set(ctx, &kvpb.SetRequest{Key: "k"})
			return err
		},
		badGet("", "k", false).call,
		badLearner("", leader, c.nodes[leader].address, 0, "").call,
	} {
		eventually(t, func() error { // the machine may be busy for so long
			ctx, cancel := context.WithTimeout(c.ctx, 500*time.Millisecond)
			defer cancel()
			if err := call(ctx, c.nodes[leader]); err == nil || reasonOf(err) == "" {
				return fmt.Errorf("got %w %q", err, reasonOf(err))
			}
			return nil
		})
	}
}

// TestServiceConfig: gRPC's clients retry as docs/api.md has it, over the nodes
// that are healthy.
func TestServiceConfig(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	_, config, _ := strings.Cut(string(doc), "```json\n")
	config, _, _ = strings.Cut(config, "```")
	nodes := map[string]*fakeNode{}
	r := manual.NewBuilderWithScheme("test")
	state := resolver.State{}
	for i := range 3 {
		f := newFakeNode(t)
		if i > 0 {
			f.health.SetServingStatus(kvpb.KVService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
		}
		nodes[f.addr] = f
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: f.addr}}})
	}
	r.InitialState(state)
	conn, err := grpc.NewClient("test:///nodes", grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultServiceConfig(config))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), rpcTimeout)
	defer cancel()
	kv := kvpb.NewKVServiceClient(conn)
	calls := func() (all []int) {
		for _, e := range state.Endpoints {
			_, n := nodes[e.Addresses[0].Addr].take()
			all = append(all, n)
		}
		return all
	}
	var total [3]int
	eventually(t, func() error {
		if _, err := kv.Get(ctx, &kvpb.GetRequest{Key: "k"}); err != nil {
			t.Fatal(err)
		}
		for i, n := range calls() {
			total[i] += n
		}
		if total[1] == 0 || total[2] == 0 {
			return fmt.Errorf("the nodes got %d calls", total)
		}
		return nil
	})
	if total[0] != 0 {
		t.Error("a node that is not SERVING was called")
	}
	var tries atomic.Int32
	for _, f := range nodes {
		f.failWith(func(context.Context) error {
			if tries.Add(1) < 5 {
				return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, "unknown")
			}
			return nil
		})
	}
	set := withID(7, 1, setWrite("k", "v")).GetSet()
	if _, err := kv.Set(ctx, set); err != nil {
		t.Fatal(err)
	}
	if n := calls(); n[0] != 0 || n[1] < 2 || n[2] < 2 || n[1]+n[2] != 5 {
		t.Errorf("the nodes got %d calls", n)
	}
	for _, f := range nodes {
		for _, id := range f.ids {
			if !proto.Equal(id, set.RequestId) {
				t.Errorf("sent under %v", id)
			}
		}
	}
}

// writeAs calls the method of a write. Of OpenSession, the node draws the number.
func writeAs(ctx context.Context, s *server, w *kvpb.Write) (result, error) {
	switch op := w.Operation.(type) {
	case *kvpb.Write_Set:
		a, err := s.Set(ctx, op.Set)
		return result{version: a.GetVersion(), compareFailed: a.GetCompareFailed()}, err
	case *kvpb.Write_Delete:
		a, err := s.Delete(ctx, op.Delete)
		return result{version: a.GetVersion(), found: a.GetDeleted(), compareFailed: a.GetCompareFailed()}, err
	case *kvpb.Write_DeleteRange:
		a, err := s.DeleteRange(ctx, op.DeleteRange)
		return result{version: a.GetVersion(), deleted: uint32(a.GetDeleted()), tooMany: a.GetTooMany()}, err
	}
	_, err := s.OpenSession(ctx, &kvpb.OpenSessionRequest{})
	return result{}, err
}

func TestReflection(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	ctx, cancel := context.WithTimeout(c.ctx, rpcTimeout)
	defer cancel()
	s, err := grpc_reflection_v1.NewServerReflectionClient(c.nodes[1].conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, service := range resp.GetListServicesResponse().GetService() {
		names = append(names, service.Name)
	}
	for _, want := range []string{"raftkv.v1.KVService", "raftkv.v1.ClusterService", "raftkv.v1.RaftService", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("reflection lists %q, not %s", names, want)
		}
	}
}

// TestRegisteredNames checks the names that all protobuf files of a program share: a
// program that links another kv.proto, such as etcd's client, panics at its start if
// this one is registered under that name.
func TestRegisteredNames(t *testing.T) {
	t.Parallel()
	file := kvpb.File_raftkv_v1_kv_proto
	wantText(t, "the file's path", file.Path(), "raftkv/v1/kv.proto")
	wantText(t, "the file's package", string(file.Package()), "raftkv.v1")
}

func setOp(key, value string) *kvpb.Operation {
	return &kvpb.Operation{Operation: &kvpb.Operation_Set{Set: &kvpb.SetRequest{Key: key, Value: []byte(value)}}}
}

// TestUnreadPipelinesLeaveCalls: Pipelines whose answers are not read have all that streams may
// have of their connection, and its calls are answered all the same.
func TestUnreadPipelinesLeaveCalls(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	n := c.nodes[1]
	c.set(1, "big", strings.Repeat("x", maxValueBytes))
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	for range connLargeAnswers {
		s, err := n.Pipeline(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(pipelineOf(8, getOp("big", true))); err != nil {
			t.Fatal(err)
		}
	}
	large := n.server.limiter.answers.large
	eventually(t, func() error {
		large.mu.Lock()
		defer large.mu.Unlock()
		if large.used < connLargeAnswers || large.waiters == 0 {
			return fmt.Errorf("%d answers are not taken, %d wait", large.used, large.waiters)
		}
		return nil
	})
	ctx, cancelGet := context.WithTimeout(ctx, stallTimeout/2) // before a connection is closed for it
	defer cancelGet()
	if _, err := n.Get(ctx, &kvpb.GetRequest{Key: "big"}); err != nil {
		t.Error(err)
	}
}

func getOp(key string, local bool) *kvpb.Operation {
	return &kvpb.Operation{Operation: &kvpb.Operation_Get{Get: &kvpb.GetRequest{Key: key, Local: local}}}
}

func deleteOp(key string) *kvpb.Operation {
	return &kvpb.Operation{Operation: &kvpb.Operation_Delete{Delete: &kvpb.DeleteRequest{Key: key}}}
}

// exchange sends operations on a stream and returns their results.
func exchange(s kvpb.KVService_PipelineClient, ops ...*kvpb.Operation) (results []*kvpb.OperationResult, err error) {
	err = s.Send(&kvpb.PipelineRequest{Operations: ops})
	hasEnded := err == io.EOF // Recv says why
	if err != nil && !hasEnded {
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
		if n, err := countOperations(m); err == nil {
			t.Errorf("%s: %d operations", name, n)
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
		return p.kind == opGet && string(p.key) == op.Get.Key && p.local == op.Get.Local && p.minVersion == op.Get.MinVersion
	case *kvpb.Operation_DeleteRange:
		r := op.DeleteRange
		isRange := string(p.prefix) == r.Prefix && string(p.start) == r.Start && string(p.end) == r.End
		return p.kind == opDeleteRange && isRange && id(r.RequestId)
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
	owner := protowire.AppendTag(nil, opOpenSession, protowire.BytesType)
	owner = protowire.AppendBytes(owner, mustMarshal(t, &kvpb.NewSession{Owner: "client/shop"}))
	for name, b := range map[string][]byte{"of the log": chosen, "within the request": within, "an owner": owner} {
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

	two := mustMarshal(t, &kvpb.PipelineRequest{Operations: []*kvpb.Operation{open, open}})
	g := parsePipelineRequest(two, 2, true, "client/shop")
	drawn := map[uint64]bool{0: true}
	for i := range g.calls {
		if err := o.parseWrite(g.calls[i].write); err != nil || drawn[o.session] || string(o.owner) != "client/shop" {
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
	id := &kvpb.RequestId{Session: 1, Sequence: 2}
	set := &kvpb.SetRequest{Key: "k", ExpectedVersion: new(uint64(3)), RequestId: id}
	get := &kvpb.GetRequest{Key: "k", Local: true, MinVersion: 4}
	for _, o := range []*kvpb.Operation{
		setOp("k", "v"),
		deleteOp("k"),
		getOp("k", true),
		{Operation: &kvpb.Operation_Set{Set: set}},
		{Operation: &kvpb.Operation_Get{Get: get}},
		{Operation: &kvpb.Operation_DeleteRange{DeleteRange: &kvpb.DeleteRangeRequest{Prefix: "k", RequestId: id}}},
		{Operation: &kvpb.Operation_DeleteRange{DeleteRange: &kvpb.DeleteRangeRequest{Start: "k", End: "l"}}},
	} {
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
		isWrite := p.kind == opSet || p.kind == opDelete || p.kind == opDeleteRange
		if _, err := parseBatch(append([]byte{0x1a}, protowire.AppendBytes(nil, b)...), nil, programLevel); (err == nil) != isWrite {
			t.Errorf("%+v as a write: %v", p, err)
		}
	})
}

// unaryMethods are those that clients and operators may call, in a fixed order.
func unaryMethods() (names []string) {
	for _, d := range []grpc.ServiceDesc{kvpb.KVService_ServiceDesc, kvpb.ClusterService_ServiceDesc} {
		for _, m := range d.Methods {
			names = append(names, "/"+d.ServiceName+"/"+m.MethodName)
		}
	}
	return names
}

// model is what a node with one client has to answer.
type model struct {
	items   map[string]item
	version uint64
}

// expect says what a call has to answer, and does to the model what it does;
// nil: an error. ok is false if the model does not know.
func (m *model) expect(method string, req []byte) (want proto.Message, ok bool) {
	unusual := false // has a field twice perhaps: known to protobuf, refused by a node
	valid := func(r proto.Message, err func() error) bool {
		ok := proto.Unmarshal(req, r) == nil && err() == nil && len(r.ProtoReflect().GetUnknown()) == 0
		unusual = proto.Size(r) != len(req)
		return ok
	}
	switch method[strings.LastIndex(method, "/")+1:] {
	case "Get":
		var r kvpb.GetRequest
		if !valid(&r, func() error { return (&operation{kind: opGet, key: []byte(r.Key)}).check() }) {
			return nil, true
		}
		if unusual {
			return nil, false
		}
		it, found := m.items[r.Key]
		resp := &kvpb.GetResponse{Version: it.version}
		if found {
			resp.Value = append([]byte{}, it.value...)
		}
		return resp, true
	case "Set":
		var r kvpb.SetRequest
		if !valid(&r, func() error {
			return cmp.Or((&operation{kind: opGet, key: []byte(r.Key)}).check(), (&operation{kind: opSet, key: []byte("k"), value: r.Value}).check())
		}) {
			return nil, true
		}
		if unusual || r.ExpectedVersion != nil || r.RequestId != nil {
			return nil, false
		}
		m.version++
		m.items[r.Key] = item{r.Value, m.version}
		return &kvpb.SetResponse{Version: m.version}, true
	case "Delete":
		var r kvpb.DeleteRequest
		if !valid(&r, func() error { return (&operation{kind: opGet, key: []byte(r.Key)}).check() }) {
			return nil, true
		}
		if unusual || r.ExpectedVersion != nil || r.RequestId != nil {
			return nil, false
		}
		_, found := m.items[r.Key]
		m.version++
		delete(m.items, r.Key)
		return &kvpb.DeleteResponse{Deleted: found, Version: m.version}, true
	case "OpenSession":
		return nil, len(req) > 0 // else it answers a number that nobody knows
	}
	return nil, false
}

// listing is all that a node has, page by page.
func listing(ctx context.Context, kv kvpb.KVServiceClient, limit uint32) (map[string]item, error) {
	items := map[string]item{}
	for token := ""; ; {
		resp, err := kv.List(ctx, &kvpb.ListRequest{Limit: limit, PageToken: token})
		if err != nil {
			return nil, err
		}
		for _, kv := range resp.Items {
			if kv.Key <= token && token != "" {
				return nil, fmt.Errorf("key %q comes behind %q", kv.Key, token)
			}
			items[kv.Key] = item{kv.Value, kv.Version}
		}
		if token = resp.NextPageToken; token == "" {
			return items, nil
		}
	}
}

// FuzzServices calls a cluster of one with anything, through gRPC: what is
// valid is done, what is not is refused with a reason and changes nothing.
func FuzzServices(f *testing.F) {
	methods := unaryMethods()
	index := func(name string) byte {
		return byte(slices.IndexFunc(methods, func(m string) bool { return strings.HasSuffix(m, "/"+name) }))
	}
	call := func(name string, r proto.Message) []byte { return step(index(name), mustMarshal(f, r)) }
	stream := func(which byte, r proto.Message) []byte { return step(254+which, mustMarshal(f, r)) }
	hello := &kvpb.Hello{From: &kvpb.Peer{Node: plainNode(2), RaftId: 2, Life: 2}, To: &kvpb.Peer{Node: plainNode(1), RaftId: 3}}
	f.Add(slices.Concat(
		call("Set", &kvpb.SetRequest{Key: "a", Value: []byte("1")}), call("Set", &kvpb.SetRequest{Key: "b"}), call("Get", &kvpb.GetRequest{Key: "a"}),
		call("Get", &kvpb.GetRequest{Key: "b", Local: true}), call("Delete", &kvpb.DeleteRequest{Key: "a"}), call("Delete", &kvpb.DeleteRequest{Key: "a"}),
		call("List", &kvpb.ListRequest{Prefix: "b", Limit: 1}), call("List", &kvpb.ListRequest{Limit: maxListItems + 1}), call("Metrics", &kvpb.MetricsRequest{}),
	))
	f.Add(slices.Concat(
		call("Set", &kvpb.SetRequest{}), call("Get", &kvpb.GetRequest{}), call("Delete", &kvpb.DeleteRequest{}), call("Set", &kvpb.SetRequest{Key: strings.Repeat("k", maxKeyBytes+1)}),
		step(index("Set"), []byte("\x0a\x02\xff\xfe")), step(index("Set"), []byte("\x0a\x01k\x30\x01")), step(index("Get"), []byte{0x80}), call("List", &kvpb.ListRequest{PageToken: "zzz"}),
	))
	f.Add(slices.Concat(
		call("OpenSession", &kvpb.OpenSessionRequest{}), step(index("OpenSession"), mustMarshal(f, &kvpb.NewSession{Session: 7, Owner: "client"})), call("Set", &kvpb.SetRequest{Key: "a"}),
	))
	f.Add(slices.Concat(
		call("Init", &kvpb.InitRequest{Members: []*kvpb.Node{plainNode(1)}}), call("Init", &kvpb.InitRequest{}), call("AddLearner", &kvpb.AddLearnerRequest{Node: plainNode(2)}),
		call("AddLearner", &kvpb.AddLearnerRequest{Node: plainNode(1)}), call("AddLearner", &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 5, Address: "n1:1"}}),
		call("ChangeMembership", &kvpb.ChangeMembershipRequest{Members: []uint64{1}}), call("ChangeMembership", &kvpb.ChangeMembershipRequest{Members: []uint64{2}}),
		call("TransferLeader", &kvpb.TransferLeaderRequest{NodeId: 1}), call("TransferLeader", &kvpb.TransferLeaderRequest{NodeId: 2}),
	))
	f.Add(slices.Concat(
		stream(0, &kvpb.StreamRequest{Hello: hello}), stream(0, &kvpb.StreamRequest{}), stream(0, &kvpb.StreamRequest{Hello: &kvpb.Hello{To: &kvpb.Peer{}}}),
		stream(1, &kvpb.InstallSnapshotRequest{Hello: hello, Term: 5, Data: snapshotBytes(f, newTestStore())}), step(254, []byte("nonsense")),
	))
	f.Fuzz(func(t *testing.T, script []byte) {
		withFakeClock(t, func(t *testing.T) {
			l := bufconn.Listen(64 << 10)
			o := defaultOptions()
			o.id, o.advertise, o.listener, o.logLevel = 1, plainNode(1).Address, l, slog.LevelError
			o.dialer = func(ctx context.Context, to string) (net.Conn, error) {
				if to != o.advertise {
					return nil, errors.New("nobody is there")
				}
				return l.DialContext(ctx)
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended, ready := make(chan error, 1), make(chan *server, 1)
			go func() { ended <- run(ctx, o, slog.New(slog.DiscardHandler), func(s *server) { ready <- s }) }()
			<-ready
			dial := func() *grpc.ClientConn {
				conn, err := grpc.NewClient("passthrough:///"+o.advertise, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(o.dialer))
				if err != nil {
					t.Fatal(err)
				}
				return conn
			}
			conn := dial()
			defer func() {
				cancel()
				_ = conn.Close()
				if err := <-ended; err != nil {
					t.Error(err)
				}
				time.Sleep(time.Second)
			}()
			exercise(t, ctx, conn, dial, methods, script)
		})
	})
}

// exercise makes the calls of a script and checks their answers.
func exercise(t *testing.T, ctx context.Context, conn *grpc.ClientConn, dial func() *grpc.ClientConn, methods []string, script []byte) {
	kv, cluster := kvpb.NewKVServiceClient(conn), kvpb.NewClusterServiceClient(conn)
	if _, err := cluster.Init(ctx, &kvpb.InitRequest{Members: []*kvpb.Node{plainNode(1)}}); err != nil {
		t.Fatal(err)
	}
	m := &model{items: map[string]item{}}
	steps(script, func(what byte, data []byte) bool {
		if what >= 254 {
			stranger := dial() // one connection has only few hellos
			hostileStream(t, ctx, stranger, what == 255, data)
			_ = stranger.Close()
			return true
		}
		method := methods[int(what)%len(methods)]
		var out []byte
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := conn.Invoke(call, method, data, &out, grpc.ForceCodec(bytesCodec{}))
		cancel()
		if code := status.Code(err); err != nil && code != codes.Internal && reasonOf(err) == "" && code != codes.Unimplemented {
			t.Fatalf("%s: %v, without a reason", method, err)
		}
		want, known := m.expect(method, data)
		switch {
		case known && (err == nil) != (want != nil):
			t.Fatalf("%s(%q): %v, want %v", method, data, err, want)
		case known && want != nil:
			got := want.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(out, got); err != nil || !proto.Equal(got, want) {
				t.Fatalf("%s(%q) = %v, %v, want %v", method, data, got, err, want)
			}
		case !known: // what it did, nobody can say: start from what there is
			metrics, err := cluster.Metrics(ctx, &kvpb.MetricsRequest{})
			if err != nil || metrics.Version < m.version {
				t.Fatalf("after %s: %v, %v", method, metrics, err)
			}
			items, err := listing(ctx, kv, 0)
			if err != nil || metrics.Version == m.version && !sameItems(items, m.items) {
				t.Fatalf("after %s: %v", method, err)
			}
			m.version, m.items = metrics.Version, items
		}
		return true
	})
	items, err := listing(ctx, kv, 2)
	if err != nil || !sameItems(items, m.items) {
		t.Fatalf("%v, want %v: %v", slices.Sorted(maps.Keys(items)), slices.Sorted(maps.Keys(m.items)), err)
	}
	metrics, err := cluster.Metrics(ctx, &kvpb.MetricsRequest{})
	if err != nil || !metrics.Healthy || metrics.Version != m.version || metrics.Keys != uint64(len(m.items)) || len(metrics.Members) != 1 || metrics.Role != kvpb.Role_ROLE_LEADER {
		t.Fatalf("%v, %v; want version %d, %d keys", metrics, err, m.version, len(m.items))
	}
}

// hostileStream sends a peer's first request. Nobody is a peer of this node.
func hostileStream(t *testing.T, ctx context.Context, conn *grpc.ClientConn, snapshot bool, data []byte) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	desc, method := &kvpb.RaftService_ServiceDesc.Streams[0], kvpb.RaftService_Stream_FullMethodName
	if snapshot {
		desc, method = &kvpb.RaftService_ServiceDesc.Streams[1], kvpb.RaftService_InstallSnapshot_FullMethodName
	}
	s, err := conn.NewStream(ctx, desc, method, grpc.ForceCodec(bytesCodec{}))
	if err != nil {
		t.Fatal(err)
	}
	_ = s.SendMsg(data)
	_ = s.CloseSend()
	for {
		var out []byte
		if err = s.RecvMsg(&out); err != nil {
			break
		}
	}
	if status.Code(err) == codes.DeadlineExceeded {
		t.Fatal("the stream does not end")
	}
}
