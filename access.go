// Who may do what, and what the log says of it.

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"raft-key-value/kvpb"
)

// roles is a set of roles.
type roles []role

var (
	everybody = roles{roleReader, roleClient, roleAdmin, roleNode}
	readers   = roles{roleReader, roleClient, roleAdmin}
	writers   = roles{roleClient, roleAdmin}
	admins    = roles{roleAdmin}
	nodes     = roles{roleNode}
)

func (rs roles) has(r role) bool { return slices.Contains(rs, r) }

func (rs roles) String() string {
	var names []string
	for _, r := range rs {
		names = append(names, r.String())
	}
	return strings.Join(names, " or ")
}

// access says who may call a method, with TLS. What is not here nobody may call. Besides,
// a node may call what it forwards for somebody else, which is in forwardable, and a
// reader's writes in a Pipeline are refused one by one.
var access = map[string]roles{
	kvpb.KVService_Get_FullMethodName:         readers,
	kvpb.KVService_List_FullMethodName:        readers,
	kvpb.KVService_Scan_FullMethodName:        readers,
	kvpb.KVService_Watch_FullMethodName:       readers,
	kvpb.KVService_Pipeline_FullMethodName:    readers,
	kvpb.KVService_Set_FullMethodName:         writers,
	kvpb.KVService_Delete_FullMethodName:      writers,
	kvpb.KVService_DeleteRange_FullMethodName: writers,
	kvpb.KVService_OpenSession_FullMethodName: writers,

	kvpb.ClusterService_Metrics_FullMethodName:          everybody,
	kvpb.ClusterService_Init_FullMethodName:             admins,
	kvpb.ClusterService_AddLearner_FullMethodName:       admins,
	kvpb.ClusterService_ChangeMembership_FullMethodName: admins,
	kvpb.ClusterService_TransferLeader_FullMethodName:   admins,
	kvpb.ClusterService_Backup_FullMethodName:           admins,

	kvpb.RaftService_Stream_FullMethodName:          nodes,
	kvpb.RaftService_InstallSnapshot_FullMethodName: nodes,
	kvpb.RaftService_Claim_FullMethodName:           nodes,
	kvpb.RaftService_Join_FullMethodName:            nodes,

	grpc_health_v1.Health_Check_FullMethodName: everybody,
	grpc_health_v1.Health_List_FullMethodName:  everybody,
	grpc_health_v1.Health_Watch_FullMethodName: everybody,

	reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName:      everybody,
	reflectionalphapb.ServerReflection_ServerReflectionInfo_FullMethodName: everybody,
}

// forwardable are the methods that one node calls at another for whoever has called it.
var forwardable = []string{
	kvpb.ClusterService_Init_FullMethodName,
	kvpb.ClusterService_AddLearner_FullMethodName,
	kvpb.ClusterService_ChangeMembership_FullMethodName,
	kvpb.ClusterService_TransferLeader_FullMethodName,
}

const (
	clusterPrefix = "/raftkv.v1.ClusterService/"
	kvPrefix      = "/raftkv.v1.KVService/"
	raftPrefix    = "/raftkv.v1.RaftService/"

	// forwardMetadata says that a node forwards the request, and forwardedForMetadata for
	// whom. Both are believed from nodes only, and from everybody without TLS.
	forwardMetadata      = "x-raft-forwarded"
	forwardedForMetadata = "x-raft-forwarded-for"
	// reasonMetadata is the trailer with the reason of an error, an ErrorReason without its
	// prefix, for those who do not decode its details.
	reasonMetadata = "x-raft-reason"
)

// isNodesCall reports whether a call may have been made by a node: without TLS, any call may.
func isNodesCall(ctx context.Context) bool {
	who := callerOf(ctx)
	return who.role == roleNode || who.role == roleAnyone
}

// wasForwarded reports whether a request comes from another node, which forwards it.
func wasForwarded(ctx context.Context) bool {
	md, _ := metadata.FromIncomingContext(ctx)
	return isNodesCall(ctx) && len(md.Get(forwardMetadata)) > 0
}

// forwarding is the context of a request that this node forwards, for whoever has called it.
func forwarding(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, forwardMetadata, "1", forwardedForMetadata, forWhom(ctx))
}

// forWhom is for whom this node forwards a request: who has called it, or, if nobody has, itself.
// That is the Init of --initial-cluster, and what it asks for.
func forWhom(ctx context.Context) string {
	if _, isCalled := grpcpeer.FromContext(ctx); !isCalled {
		return "itself"
	}
	return callerOf(ctx).String()
}

// admitCall refuses a call before anything of its request is read: if its connection is in
// a place that is not its caller's, or if its caller may not call the method. Such a call
// has no trailer with its reason.
func (s *server) admitCall(ctx context.Context, call *tap.Info) (context.Context, error) {
	err := inPlace(ctx, call.FullMethodName)
	if err == nil {
		err = s.authorize(ctx, call.FullMethodName)
		if err != nil {
			s.logRefusal(ctx, call.FullMethodName, err)
		}
	}
	if err != nil {
		s.noteEnd(call.FullMethodName, err)
		return ctx, err
	}
	return newCallContext(ctx), nil
}

// noteEnd counts a call that was not begun, or a stream that has ended with an error, or nil. There
// may be no such method.
func (s *server) noteEnd(method string, err error) {
	if m := s.methods[method]; m != nil {
		m.note(err)
	}
}

// authorize returns an error if the caller may not call a method.
func (s *server) authorize(ctx context.Context, method string) error {
	if s.certificates == nil {
		return nil // without TLS nobody knows who calls
	}
	who := callerOf(ctx)
	allowed := access[method]
	isForwarding := who.role == roleNode && wasForwarded(ctx)
	if isForwarding && slices.Contains(forwardable, method) {
		return nil
	}
	if allowed.has(who.role) {
		return nil
	}
	if len(allowed) == 0 {
		return denied("%v may not call %s: nobody may", who, quoteInput(method)) // it may be anything, or empty
	}
	return denied("%v may not call %s: that needs the role %v", who, strings.TrimPrefix(method, "/"), allowed)
}

func denied(format string, args ...any) error {
	return apiError(codes.PermissionDenied, kvpb.ErrorReason_ERROR_REASON_PERMISSION_DENIED, fmt.Sprintf(format, args...))
}

// mayWrite reports whether the caller of a Pipeline may write in it.
func (s *server) mayWrite(ctx context.Context) bool {
	return s.certificates == nil || writers.has(callerOf(ctx).role)
}

// errReadOnly is the error of a reader's write in a Pipeline.
var errReadOnly = denied("a reader may not write: that needs the role %v", writers)

// isFrom returns an error if a message of a node comes from another one, by its certificate.
func isFrom(ctx context.Context, node *kvpb.Node) error {
	who := callerOf(ctx)
	if who.role == roleAnyone || who.role == roleNode && who.node == node.GetId() {
		return nil
	}
	return denied("%v may not speak as node/%d", who, node.GetId())
}

// intercept covers the unary calls of all services: it names the leader in every answer,
// makes errors those of the API, lets stop wait for calls, and has the log tell what
// operators do.
func (s *server) intercept(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	s.inFlight.Add(1) // before it looks whether the node is stopping: stop looks the other way round
	defer s.inFlight.Add(-1)
	begun := time.Now()
	resp, err := s.answer(ctx, req, handler)
	if err := s.endUnary(ctx, info.FullMethod, req, begun, err); err != nil {
		return nil, err
	}
	return resp, nil
}

// endUnary says what goes with the answer to a unary call, and with its error, which it
// makes one of the API.
func (s *server) endUnary(ctx context.Context, method string, req any, begun time.Time, err error) error {
	s.nameLeader(ctx, err == nil)
	if err != nil {
		err = toStatus(err, strings.HasPrefix(method, kvPrefix))
		_ = grpc.SetTrailer(ctx, reasonTrailer(err)) // fails only if the call has ended
	}
	s.audit(ctx, method, req, begun, err)
	s.noteSlowCall(ctx, method, req, time.Since(begun), err)
	return err
}

// interceptStream is intercept for streams.
func (s *server) interceptStream(
	srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
) error {
	begun := time.Now()
	err := s.handleStream(srv, stream, info, handler)
	if err != nil {
		stream.SetTrailer(reasonTrailer(err))
	}
	s.noteEnd(info.FullMethod, err)
	s.audit(stream.Context(), info.FullMethod, nil, begun, err)
	return err
}

// handleStream has a stream's method handle it. What others than nodes send is read by a
// requestReader, and their streams count as running calls.
func (s *server) handleStream(
	srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
) error {
	if strings.HasPrefix(info.FullMethod, raftPrefix) {
		return handler(srv, decodedStream{stream})
	}
	end, err := beginCall(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	defer end()
	reader := newRequestReader(stream.Context(), connOf(stream.Context()).l.arrivals)
	return handler(srv, &readStream{stream, reader, info})
}

// reasonTrailer is the trailer with the reason of an error; empty: it has none.
func reasonTrailer(err error) metadata.MD {
	reason := errorReason(err)
	if reason == "" {
		return nil
	}
	return metadata.Pairs(reasonMetadata, reason)
}

// maxAuditedRequest bounds what the log says of a request.
const maxAuditedRequest = 200

// audit logs a call that was refused, and each request of an operator when it has ended.
func (s *server) audit(ctx context.Context, method string, req any, begun time.Time, err error) {
	if status.Code(err) == codes.PermissionDenied {
		s.logRefusal(ctx, method, err)
		return
	}
	isOperators := strings.HasPrefix(method, clusterPrefix) && method != kvpb.ClusterService_Metrics_FullMethodName
	if !isOperators {
		return
	}
	args := append(callerArgs(ctx), "method", method[len(clusterPrefix):], "request", auditedRequest(req),
		"took", time.Since(begun).Round(time.Millisecond), "code", codeName(status.Convert(err)))
	if err != nil {
		args = append(args, "reason", errorReason(err))
	}
	s.n.logger.Info("request of an operator", args...)
}

// logRefusal counts a refused call, and logs it, if it is not refused with many others.
func (s *server) logRefusal(ctx context.Context, method string, err error) {
	s.logRefusals(ctx, method, err, 1)
}

// logRefusals is logRefusal for so many refusals of one kind. A method that nobody may
// call is whatever its caller has sent.
func (s *server) logRefusals(ctx context.Context, method string, err error, many int) {
	s.noteRefusals(callerArgs(ctx), method, status.Convert(err).Message(), many)
}

// noteRefusals counts refusals, and logs one of them, if there are not many others. by says who
// has called.
func (s *server) noteRefusals(by []any, method, why string, many int) {
	s.refused.Add(uint64(many))
	leftOut, isDue := s.refusalLog.due(time.Now())
	if !isDue {
		return
	}
	args := append(by, "method", beginning(method, maxQuotedInput), "err", why, "others", leftOut)
	s.n.logger.Warn("a call was refused", args...)
}

// callerArgs says in the log who has made a call, and for whom.
func callerArgs(ctx context.Context) []any {
	args := []any{"by", callerOf(ctx).String(), "from", remoteAddress(ctx)}
	md, _ := metadata.FromIncomingContext(ctx)
	if named := md.Get(forwardedForMetadata); wasForwarded(ctx) && len(named) > 0 {
		args = append(args, "for", beginning(named[0], maxQuotedInput))
	}
	return args
}

// auditedRequest is what the log says of a request. It takes no more memory than it says,
// however large the request is.
func auditedRequest(req any) string {
	m, ok := req.(proto.Message)
	if !ok {
		return ""
	}
	return beginning(string(appendFields(nil, m.ProtoReflect())), maxAuditedRequest)
}

// appendFields appends the fields of a message that are set, until there are
// maxAuditedRequest bytes; the last one may go beyond.
func appendFields(b []byte, m protoreflect.Message) []byte {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !m.Has(f) {
			continue
		}
		if !f.IsList() {
			b = appendField(b, f, m.Get(f))
			continue
		}
		list := m.Get(f).List()
		for k := range list.Len() {
			b = appendField(b, f, list.Get(k))
		}
	}
	return b
}

func appendField(b []byte, f protoreflect.FieldDescriptor, v protoreflect.Value) []byte {
	if len(b) >= maxAuditedRequest {
		return b
	}
	if len(b) > 0 && b[len(b)-1] != '{' {
		b = append(b, ' ')
	}
	b = append(b, f.Name()...)
	switch f.Kind() {
	case protoreflect.MessageKind:
		b = append(b, '{')
		b = appendFields(b, v.Message())
		return append(b, '}')
	case protoreflect.StringKind:
		return append(append(b, ':'), quoteInput(v.String())...)
	case protoreflect.BytesKind:
		return fmt.Appendf(b, ":%d bytes", len(v.Bytes()))
	}
	return fmt.Appendf(b, ":%v", v.Interface())
}
