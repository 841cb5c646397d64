// Tests of access.go: who may call what, and what the log says of it.

package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"raft-key-value/kvpb"
)

// mayCall says of each method which roles may call it: access, as it is meant.
var mayCall = map[string]string{
	"raftkv.v1.KVService/Get":                                       "reader client admin",
	"raftkv.v1.KVService/List":                                      "reader client admin",
	"raftkv.v1.KVService/Scan":                                      "reader client admin",
	"raftkv.v1.KVService/Watch":                                     "reader client admin",
	"raftkv.v1.KVService/Pipeline":                                  "reader client admin",
	"raftkv.v1.KVService/Set":                                       "client admin",
	"raftkv.v1.KVService/Delete":                                    "client admin",
	"raftkv.v1.KVService/DeleteRange":                               "client admin",
	"raftkv.v1.KVService/OpenSession":                               "client admin",
	"raftkv.v1.ClusterService/Metrics":                              "reader client admin node",
	"raftkv.v1.ClusterService/Init":                                 "admin",
	"raftkv.v1.ClusterService/AddLearner":                           "admin",
	"raftkv.v1.ClusterService/ChangeMembership":                     "admin",
	"raftkv.v1.ClusterService/TransferLeader":                       "admin",
	"raftkv.v1.ClusterService/Backup":                               "admin",
	"raftkv.v1.RaftService/Stream":                                  "node",
	"raftkv.v1.RaftService/InstallSnapshot":                         "node",
	"raftkv.v1.RaftService/Claim":                                   "node",
	"raftkv.v1.RaftService/Join":                                    "node",
	"grpc.health.v1.Health/Check":                                   "reader client admin node",
	"grpc.health.v1.Health/List":                                    "reader client admin node",
	"grpc.health.v1.Health/Watch":                                   "reader client admin node",
	"grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      "reader client admin node",
	"grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "reader client admin node",
}

// TestAccess: over TLS, each role may call what it is meant to, and nothing else, of all
// that the server has.
func TestAccess(t *testing.T) {
	t.Parallel()
	c := newSecureCluster(t, 1)
	c.init(1)
	c.settled(1)
	n := c.nodes[1]
	var methods []string
	for name, service := range n.server.grpc.GetServiceInfo() {
		for _, m := range service.Methods {
			methods = append(methods, name+"/"+m.Name)
		}
	}
	if len(methods) != len(mayCall) || len(methods) != len(access) {
		t.Errorf("the server has %d methods, of which %d are meant for somebody, and %d are in the table",
			len(methods), len(mayCall), len(access))
	}
	for _, role := range []string{"reader", "client", "admin", "node1"} {
		conn := dialNode(t, n.address, testCredentials(t, c.pki, role, n.address))
		for _, method := range methods {
			isMeant := slices.Contains(strings.Fields(mayCall[method]), strings.TrimRight(role, "1"))
			err := callMalformed(c.ctx, conn, "/"+method)
			if isMeant == (status.Code(err) == codes.PermissionDenied) {
				t.Errorf("%s calls %s: %v", role, method, err)
			}
			if !isMeant {
				wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED")
			}
		}
		_ = conn.Close()
	}
	if m, err := c.metrics(1); err != nil || m.RequestsRefused == 0 {
		t.Errorf("%d refused calls are counted, %v", m.GetRequestsRefused(), err)
	}
}

// callMalformed calls a method with a request that it cannot decode, or that asks nothing,
// and returns the error.
func callMalformed(ctx context.Context, conn *grpc.ClientConn, method string) error {
	// A field 15 of a type that there is not.
	_, _, err := callRaw(ctx, conn, method, []byte{15<<3 | 7})
	return err
}

// callRaw calls a method of any kind with a request as it is on the wire. It returns the
// first answer and the trailer.
func callRaw(
	ctx context.Context, conn *grpc.ClientConn, method string, request []byte,
) (answer []byte, trailer metadata.MD, err error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	s, err := conn.NewStream(ctx, desc, method, grpc.ForceCodec(bytesCodec{}))
	if err != nil {
		return nil, nil, err
	}
	if err := s.SendMsg(request); err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	if err := s.CloseSend(); err != nil {
		return nil, nil, err
	}
	if err := s.RecvMsg(&answer); err != nil {
		return nil, s.Trailer(), err
	}
	return answer, nil, nil
}

// TestNobodyIsAnyone: with TLS, a connection without a principal may call nothing: it is
// taken for one only by a mistake of this program.
func TestNobodyIsAnyone(t *testing.T) {
	dir, _ := testPKI(t, 1)
	certificates, err := openCertificates(testFiles(dir, "node1"), 1, quiet())
	if err != nil {
		t.Fatal(err)
	}
	s := &server{certificates: certificates}
	for method := range access {
		if err := s.authorize(t.Context(), method); status.Code(err) != codes.PermissionDenied {
			t.Errorf("anyone calls %s: %v", method, err)
		}
	}
	if s.mayWrite(t.Context()) {
		t.Error("anyone writes in a Pipeline")
	}
}

// TestReadersPipeline: a reader's reads in a Pipeline are answered, its writes are refused,
// each in its place.
func TestReadersPipeline(t *testing.T) {
	t.Parallel()
	c := newSecureCluster(t, 1)
	c.init(1)
	c.settled(1)
	c.set(1, "k", "v")
	n := c.nodes[1]
	conn := dialNode(t, n.address, testCredentials(t, c.pki, "reader", n.address))
	defer func() { _ = conn.Close() }()
	s, err := kvpb.NewKVServiceClient(conn).Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	open := &kvpb.Operation{Operation: &kvpb.Operation_OpenSession{OpenSession: &kvpb.OpenSessionRequest{}}}
	results, err := exchange(s, getOp("k", false), setOp("k", "w"), deleteOp("k"), open, getOp("k", true))
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range results {
		isRead := i == 0 || i == len(results)-1
		if isRead && string(r.GetGet().GetValue()) != "v" {
			t.Errorf("operation %d: %v", i, r)
		}
		if !isRead && codes.Code(r.GetError().GetCode()) != codes.PermissionDenied {
			t.Errorf("operation %d is not refused: %v", i, r)
		}
		if !isRead {
			wantPart(t, r.GetError().GetMessage(), "a reader may not write: that needs the role client or admin")
		}
	}
	if m, err := c.metrics(1); err != nil || m.RequestsRefused != 3 {
		t.Errorf("%d refused operations are counted, %v", m.GetRequestsRefused(), err)
	}
}

// TestPathsThatAreNone: what a caller has as a path need be no method. It is refused, and
// the node can end.
func TestPathsThatAreNone(t *testing.T) {
	t.Parallel()
	log := &sharedLog{}
	c := newCluster(t, 0)
	c.pki, _ = testPKI(t, 1)
	c.log = log
	n := c.start(1, "127.0.0.1:0")
	shown, err := loadPair(testFiles(c.pki, "reader"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/" + strings.Repeat("zq", 1000), "", "/", "x", "raftkv.v1.KVService/Get"} {
		conn, err := tls.Dial("tcp", n.address, &tls.Config{
			Certificates:       []tls.Certificate{shown},
			InsecureSkipVerify: true,
			NextProtos:         []string{"h2"},
		})
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(rpcTimeout))
		r := &rude{Conn: conn, next: 1}
		_, err = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
		if err == nil {
			err = r.frame(frameSettings, 0, 0, nil)
		}
		if err == nil {
			_, err = r.call(path, -1)
		}
		for header := make([]byte, 9); err == nil && header[3] != frameHeaders; {
			if _, err = io.ReadFull(conn, header); err == nil {
				_, err = io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(header)>>8))
			}
		}
		if err != nil {
			t.Errorf("a call of %.20q is not answered: %v", path, err)
		}
		_ = conn.Close()
	}
	if refused := n.server.refused.Load(); refused != 5 {
		t.Errorf("%d calls are refused, want 5", refused)
	}
	if strings.Contains(log.String(), strings.Repeat("zq", maxQuotedInput)) {
		t.Error("the log has all of a path") // the first refusal is logged, the others may be left out
	}
}

// TestAuditedRequest: what the log says of a request is short, and costs little.
func TestAuditedRequest(t *testing.T) {
	node := &kvpb.Node{Id: 5, Address: "h\"\n:1"}
	for want, req := range map[string]proto.Message{
		`node{id:5 address:"h\"\n:1"}`: &kvpb.AddLearnerRequest{Node: node},
		`members:1 members:2 retain:true expected{members{node{id:5 address:"h\"\n:1"}}}`: &kvpb.ChangeMembershipRequest{
			Members:  []uint64{1, 2},
			Retain:   true,
			Expected: &kvpb.Membership{Members: []*kvpb.ExpectedMember{{Node: node}}},
		},
		``: &kvpb.BackupRequest{},
	} {
		if got := auditedRequest(req); got != want {
			t.Errorf("the log has %q, want %q", got, want)
		}
	}
	for name, req := range map[string]proto.Message{
		"address": &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 5, Address: strings.Repeat("\x01", 4<<20)}},
		"ids":     &kvpb.ChangeMembershipRequest{Members: make([]uint64, 1<<20)},
		"nodes":   &kvpb.InitRequest{Members: slices.Repeat([]*kvpb.Node{node}, 1<<16)},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got := auditedRequest(req)
		runtime.ReadMemStats(&after)
		if len(got) < maxAuditedRequest || len(got) > maxAuditedRequest+len("…") {
			t.Errorf("%s: the log has %d bytes", name, len(got))
		}
		if cost := after.TotalAlloc - before.TotalAlloc; cost > 64<<10 {
			t.Errorf("%s: that takes %d bytes", name, cost)
		}
	}
}

// TestNodesSpeakForThemselves: a node may not say hello, send a snapshot or claim a member
// in another node's name.
func TestNodesSpeakForThemselves(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	c.pki, _ = testPKI(t, 2)
	n := c.start(1, "127.0.0.1:0")
	conn := dialNode(t, n.address, testCredentials(t, c.pki, "node2", n.address))
	defer func() { _ = conn.Close() }()
	raft := kvpb.NewRaftServiceClient(conn)
	for id, isRefused := range map[uint64]bool{2: false, 3: true} {
		from := &kvpb.Peer{Node: &kvpb.Node{Id: id, Address: "127.0.0.1:1"}, RaftId: 5, Life: 5}
		h := &kvpb.Hello{From: from, To: &kvpb.Peer{}}
		refused := map[string]error{}
		s, err := raft.Stream(c.ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Send(&kvpb.StreamRequest{Hello: h})
		_, refused["hello"] = s.Recv()
		snapshot, err := raft.InstallSnapshot(c.ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = snapshot.Send(&kvpb.InstallSnapshotRequest{Hello: h})
		_, refused["snapshot"] = snapshot.CloseAndRecv()
		_, refused["claim"] = raft.Claim(c.ctx, &kvpb.ClaimRequest{Founder: from})
		for what, err := range refused {
			if (status.Code(err) == codes.PermissionDenied) != isRefused {
				t.Errorf("node 2 as node %d: %s: %v", id, what, err)
			}
		}
	}
}

// TestForwardingIsANodes: a request that says it was forwarded is believed from a node
// only. A node that forwards for nobody may not do what operators may.
func TestForwardingIsANodes(t *testing.T) {
	t.Parallel()
	log := &sharedLog{}
	c := newCluster(t, 0, steady)
	c.pki, _ = testPKI(t, 2)
	c.log = log
	c.start(1, "127.0.0.1:0")
	c.start(2, "127.0.0.1:0")
	c.init(1, 2)
	leader := c.settled(1, 2)
	follower := c.nodes[3-leader]
	forwarded := metadata.AppendToOutgoingContext(c.ctx, forwardMetadata, "1", forwardedForMetadata, `admin/"alice"`)
	req := &kvpb.TransferLeaderRequest{NodeId: leader}
	as := func(name string, address string) kvpb.ClusterServiceClient {
		conn := dialNode(t, address, testCredentials(t, c.pki, name, address))
		t.Cleanup(func() { _ = conn.Close() })
		return kvpb.NewClusterServiceClient(conn)
	}
	if _, err := as("admin", follower.address).TransferLeader(forwarded, req); err != nil {
		t.Errorf("an admin's request is taken for one that was forwarded: %v", err)
	}
	if _, err := as("client", follower.address).TransferLeader(forwarded, req); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a client forwards: %v", err)
	}
	node := as(fmt.Sprintf("node%d", follower.id), c.nodes[leader].address)
	if _, err := node.TransferLeader(c.ctx, req); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a node is an operator: %v", err)
	}
	if _, err := node.TransferLeader(forwarded, req); err != nil {
		t.Errorf("a node does not forward: %v", err)
	}
	backup, err := node.Backup(forwarded, &kvpb.BackupRequest{})
	if err == nil {
		_, err = backup.Recv()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a node forwards what nodes do not forward: %v", err)
	}
	for _, part := range []string{
		`msg="request of an operator" node=` + fmt.Sprint(leader) + ` by=node/` + fmt.Sprint(follower.id),
		`for=admin `, // the admin's own request, forwarded by the follower
		`for="admin/\"alice\""`,
		`method=TransferLeader`,
		`msg="a call was refused"`,
		`client may not call raftkv.v1.ClusterService/TransferLeader: that needs the role admin`,
	} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("the log lacks %q", part)
		}
	}
}

// TestReasonTrailer: the reason of an error can be read without decoding its details, of
// unary calls and of streams.
func TestReasonTrailer(t *testing.T) {
	t.Parallel()
	c := newSecureCluster(t, 1)
	n := c.nodes[1]
	var md metadata.MD
	_, err := n.Get(c.ctx, &kvpb.GetRequest{Key: "k"}, grpc.Trailer(&md))
	wantError(t, err, codes.Unavailable, "NOT_INITIALIZED")
	if got := md.Get(reasonMetadata); len(got) != 1 || got[0] != "NOT_INITIALIZED" {
		t.Errorf("the trailer of Get has %q", got)
	}
	s, err := n.Backup(c.ctx, &kvpb.BackupRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	if err == nil {
		t.Fatal("there is a backup of nothing")
	}
	if got := s.Trailer().Get(reasonMetadata); len(got) != 1 || got[0] != reasonOf(err) {
		t.Errorf("the trailer of Backup has %q, the error is %v", got, err)
	}
}

// stringFields are the string fields of a message and of those in it, and for each a
// message on the wire in which it is not UTF-8.
func stringFields(m protoreflect.MessageDescriptor, depth int) map[string][]byte {
	found := map[string][]byte{}
	fields := m.Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		tag := protowire.AppendTag(nil, f.Number(), protowire.BytesType)
		switch {
		case f.Kind() == protoreflect.StringKind:
			found[string(f.Name())] = protowire.AppendString(tag, "\xff")
		case f.Kind() == protoreflect.MessageKind && depth > 0:
			for name, inner := range stringFields(f.Message(), depth-1) {
				found[string(f.Name())+"."+name] = protowire.AppendBytes(slices.Clone(tag), inner)
			}
		}
	}
	return found
}

// TestEachStringIsUTF8: each string of each request of each service has to be UTF-8.
func TestEachStringIsUTF8(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	c.settled(1)
	n := c.nodes[1]
	checked := map[string]int{}
	for service := range n.server.grpc.GetServiceInfo() {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
		if err != nil {
			t.Fatal(err)
		}
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			name := fmt.Sprintf("/%s/%s", service, methods.Get(i).Name())
			for field, request := range stringFields(methods.Get(i).Input(), 4) {
				checked[service]++
				conn := dialNode(t, n.address, insecure.NewCredentials()) // few hellos may come on one
				answer, trailer, err := callRaw(c.ctx, conn, name, request)
				_ = conn.Close()
				if name == kvpb.KVService_Pipeline_FullMethodName {
					var r kvpb.PipelineResponse
					_ = proto.Unmarshal(answer, &r)
					if code := codes.Code(r.GetResults()[0].GetError().GetCode()); code != codes.InvalidArgument {
						t.Errorf("%s: %s is not UTF-8: %v", name, field, &r)
					}
					continue
				}
				if status.Code(err) != codes.InvalidArgument || fieldOf(err) != field {
					t.Errorf("%s: %s is not UTF-8: %v, which names %q", name, field, err, fieldOf(err))
				}
				if got := trailer.Get(reasonMetadata); len(got) != 1 || got[0] != "INVALID_FIELD" {
					t.Errorf("%s: %s is not UTF-8: the trailer has %q", name, field, got)
				}
			}
		}
	}
	if len(checked) != 6 {
		t.Errorf("strings of %d services are checked: %v", len(checked), checked)
	}
}

// fillStrings sets all strings of a message, and of the messages in it, and each number to 3.
func fillStrings(m protoreflect.Message, text string, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		isMessage := f.Kind() == protoreflect.MessageKind
		if isMessage && depth == 0 {
			continue
		}
		value := func() protoreflect.Value {
			switch f.Kind() {
			case protoreflect.StringKind:
				return protoreflect.ValueOfString(text)
			case protoreflect.Uint64Kind:
				return protoreflect.ValueOfUint64(3)
			case protoreflect.MessageKind:
				inner := m.NewField(f)
				if f.IsList() {
					inner = inner.List().NewElement()
				}
				fillStrings(inner.Message(), text, depth-1)
				return inner
			}
			return protoreflect.Value{}
		}()
		switch {
		case !value.IsValid():
		case f.IsList():
			m.Mutable(f).List().Append(value)
		default:
			m.Set(f, value)
		}
	}
}

// TestErrorsDoNotEcho: whatever a request has, an error has no more than 64 bytes of it.
func TestErrorsDoNotEcho(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	c.settled(1)
	n := c.nodes[1]
	unit := "zq"
	for _, text := range []string{
		strings.Repeat(unit, 100),        // a key as good as any, an address without a port
		strings.Repeat(unit, 100) + ":1", // an address, at which nobody is
		strings.Repeat(unit, 100_000),
		strings.Repeat(unit, 100) + "\n:1",
		strings.Repeat("\x00", 1000),
		strings.Repeat("\"", 1000) + ":1",
		strings.Repeat("é", 100) + ":1",
	} {
		for _, service := range []*grpc.ServiceDesc{&kvpb.KVService_ServiceDesc, &kvpb.ClusterService_ServiceDesc} {
			methods := kvpb.File_raftkv_v1_kv_proto.Services().ByName(protoreflect.FullName(service.ServiceName).Name()).Methods()
			for i := range methods.Len() {
				method := methods.Get(i)
				if method.IsStreamingClient() || method.IsStreamingServer() {
					continue
				}
				req := dynamicpb.NewMessage(method.Input())
				fillStrings(req, text, 3)
				ctx, cancel := context.WithTimeout(c.ctx, rpcTimeout)
				var trailer metadata.MD
				var resp []byte
				name := fmt.Sprintf("/%s/%s", service.ServiceName, method.Name())
				err := n.conn.Invoke(ctx, name, mustMarshal(t, req), &resp, grpc.ForceCodec(bytesCodec{}), grpc.Trailer(&trailer))
				cancel()
				for _, told := range []string{fmt.Sprint(err), fmt.Sprint(status.Convert(err).Proto()), fmt.Sprint(trailer)} {
					if strings.Contains(told, strings.Repeat(unit, maxQuotedInput/2+1)) {
						t.Errorf("%s with strings of %d bytes: %.300s", name, len(text), told)
					}
					if len(told) > 2<<10 {
						t.Errorf("%s with %.9q...: %d bytes are told: %.300s", name, text, len(told), told)
					}
				}
			}
		}
	}
}

// TestErrorsAreShort: also an error that has much to name fits the headers that clients
// take, and is UTF-8.
func TestErrorsAreShort(t *testing.T) {
	err := invalid("members", "%s", strings.Repeat("é", 1<<20))
	message := status.Convert(err).Message()
	if len(message) > maxErrorBytes+len("…") || len(message) < maxErrorBytes-2 || !utf8.ValidString(message) {
		t.Errorf("the message has %d bytes: %.99q", len(message), message)
	}
	if errorReason(err) != "INVALID_FIELD" || fieldOf(err) != "members" {
		t.Errorf("it has lost its details: %q, %q", errorReason(err), fieldOf(err))
	}
}

// unknownCompressor is a compression that no node knows. It leaves messages as they are.
type unknownCompressor struct{}

func (unknownCompressor) Do(w io.Writer, b []byte) error {
	_, err := w.Write(b)
	return err
}

func (unknownCompressor) Type() string { return "unknown" }

// TestCodesOfGRPC: what gRPC itself refuses has its code, no reason, and is not applied.
func TestCodesOfGRPC(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	c.settled(1)
	n := c.nodes[1]
	wantCode := func(what string, err error, want codes.Code) {
		t.Helper()
		if status.Code(err) != want || errorReason(err) != "" {
			t.Errorf("%s: %v, reason %q, want %v without a reason", what, err, errorReason(err), want)
		}
	}
	large := make([]byte, maxRequestBytes)
	_, err := n.Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: large})
	wantCode("a Set that is too large", err, codes.ResourceExhausted)
	_, err = n.AddLearner(c.ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 2, Address: string(large)}})
	wantCode("an AddLearner that is too large", err, codes.ResourceExhausted)
	s, err := n.Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, err = exchange(s, setOp("k", string(large)))
	wantCode("a Pipeline's request that is too large", err, codes.ResourceExhausted)

	//lint:ignore SA1019 What has taken its place is registered for the whole program.
	compressed := grpc.WithCompressor(unknownCompressor{})
	conn, err := grpc.NewClient("passthrough:///"+n.address, grpc.WithTransportCredentials(insecure.NewCredentials()), compressed)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = kvpb.NewKVServiceClient(conn).Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: []byte("v")})
	wantCode("a Set in an unknown compression", err, codes.Unimplemented)
	s, err = kvpb.NewKVServiceClient(conn).Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, err = exchange(s, setOp("k", "v"))
	wantCode("a Pipeline in an unknown compression", err, codes.Unimplemented)
	wantCode("an unknown method", callMalformed(c.ctx, n.conn, "/raftkv.v1.KVService/Steal"), codes.Unimplemented)
	c.wantsAbsent(1, "k")
}
