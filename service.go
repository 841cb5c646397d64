// The gRPC services that clients and operators call.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

const (
	maxKeyBytes   = 64 << 10
	maxValueBytes = 1 << 20
	// maxWriteBytes bounds an encoded write.
	maxWriteBytes = maxKeyBytes + maxValueBytes + 64
	// maxMembers bounds a cluster, and with it what a request may name.
	maxMembers = 64
	// maxStreamsPerConnection bounds the calls that run on one connection.
	maxStreamsPerConnection = 4096
	// adminTimeout bounds requests of ClusterService that have no deadline.
	adminTimeout = time.Minute
	// probeTimeout bounds the wait for a node to say who it is.
	probeTimeout = 3 * time.Second

	errorDomain     = "kv.v1"
	leaderMetadata  = "x-raft-leader"
	forwardMetadata = "x-raft-forwarded"
	// restartHealth is the health name that says: the next node may restart.
	restartHealth = "restart"
)

// apiError makes an error of the API; pairs are metadata of its ErrorInfo.
func apiError(code codes.Code, reason kvpb.ErrorReason, message string, pairs ...string) error {
	info := &errdetails.ErrorInfo{Domain: errorDomain, Reason: strings.TrimPrefix(reason.String(), "ERROR_REASON_")}
	for i := 0; i+1 < len(pairs); i += 2 {
		if info.Metadata == nil {
			info.Metadata = map[string]string{}
		}
		info.Metadata[pairs[i]] = pairs[i+1]
	}
	st, err := status.New(code, message).WithDetails(info)
	if err != nil {
		return status.Error(code, message)
	}
	return st.Err()
}

func invalid(field, format string, args ...any) error {
	return apiError(codes.InvalidArgument, kvpb.ErrorReason_ERROR_REASON_INVALID_FIELD, field+": "+fmt.Sprintf(format, args...), "field", field)
}

func validateKey(key string) error {
	if key == "" {
		return invalid("key", "it is empty")
	}
	if len(key) > maxKeyBytes {
		return invalid("key", "it has %d bytes, the limit is %d", len(key), maxKeyBytes)
	}
	return nil
}

func validateValue(value []byte) error {
	if len(value) > maxValueBytes {
		return invalid("value", "it has %d bytes, the limit is %d", len(value), maxValueBytes)
	}
	return nil
}

func validateNode(field string, n *kvpb.Node) error {
	if n.GetId() == 0 {
		return invalid(field+".id", "it is 0")
	}
	if host, port, err := net.SplitHostPort(n.GetAddress()); err != nil || host == "" || port == "" || len(n.GetAddress()) > 256 {
		return invalid(field+".address", "%q is not host:port", n.GetAddress())
	}
	return nil
}

// toStatus makes the errors of the loop those of the API.
func toStatus(err error, kv bool) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	code, reason := codes.Internal, kvpb.ErrorReason_ERROR_REASON_UNSPECIFIED
	switch {
	case errors.Is(err, errNoLeader):
		code, reason = codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER
	case errors.Is(err, errNotLeader):
		code, reason = codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NOT_LEADER
	case errors.Is(err, errOutcomeUnknown):
		code, reason = codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN
	case errors.Is(err, errNotInitialized) && kv:
		code, reason = codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED
	case errors.Is(err, errNotInitialized):
		code, reason = codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED
	case errors.Is(err, errInCluster):
		code, reason = codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED
	case errors.Is(err, errOverloaded):
		code, reason = codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED
	case errors.Is(err, errStopping):
		code, reason = codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_STOPPING
	case errors.Is(err, errContradiction):
		code, reason = codes.DataLoss, kvpb.ErrorReason_ERROR_REASON_CORRUPT
	case errors.Is(err, context.DeadlineExceeded):
		code, reason = codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE
	case errors.Is(err, context.Canceled):
		code, reason = codes.Canceled, kvpb.ErrorReason_ERROR_REASON_DEADLINE
	}
	return apiError(code, reason, err.Error())
}

// server is what a node offers by gRPC.
type server struct {
	kvpb.UnimplementedKVServiceServer
	kvpb.UnimplementedClusterServiceServer
	n      *node
	net    *network
	grpc   *grpc.Server
	health *health.Server
	leader atomic.Pointer[metadata.MD] // x-raft-leader

	mu       sync.Mutex
	inFlight int
	idle     chan struct{} // closed when stopping and nothing is in flight
}

func newServer(n *node, nw *network) *server {
	s := &server{n: n, net: nw, health: health.NewServer()}
	s.leader.Store(&metadata.MD{})
	s.grpc = grpc.NewServer(
		grpc.UnaryInterceptor(s.intercept),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		grpc.InitialWindowSize(windowBytes),
		grpc.InitialConnWindowSize(windowBytes),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.ConnectionTimeout(helloTimeout),
	)
	kvpb.RegisterKVServiceServer(s.grpc, s)
	kvpb.RegisterClusterServiceServer(s.grpc, s)
	kvpb.RegisterRaftServiceServer(s.grpc, nw)
	grpc_health_v1.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.health.SetServingStatus(kvpb.ClusterService_ServiceDesc.ServiceName, grpc_health_v1.HealthCheckResponse_SERVING)
	s.published(n.pub.Load())
	n.onPublish = s.published
	return s
}

// published follows the loop: it is called there.
func (s *server) published(p *published) {
	md := metadata.MD{}
	if p.leader != nil {
		md.Set(leaderMetadata, p.leader.Address)
	}
	s.leader.Store(&md)
	set := func(name string, ok bool) {
		st := grpc_health_v1.HealthCheckResponse_NOT_SERVING
		if ok {
			st = grpc_health_v1.HealthCheckResponse_SERVING
		}
		s.health.SetServingStatus(name, st)
	}
	healthy := p.clusterID != 0 && p.unhealthy == ""
	set(kvpb.KVService_ServiceDesc.ServiceName, healthy)
	set(restartHealth, healthy && !isJoint(p.conf))
}

// intercept names the leader in every answer, and counts calls for stop.
func (s *server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	s.mu.Lock()
	if s.idle != nil {
		s.mu.Unlock()
		return nil, toStatus(errStopping, true)
	}
	s.inFlight++
	s.mu.Unlock()
	defer s.left()
	resp, err := handler(ctx, req)
	if err != nil {
		_ = grpc.SetTrailer(ctx, *s.leader.Load())
		return nil, toStatus(err, strings.HasPrefix(info.FullMethod, "/"+kvpb.KVService_ServiceDesc.ServiceName))
	}
	_ = grpc.SetHeader(ctx, *s.leader.Load())
	return resp, nil
}

func (s *server) left() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inFlight--; s.idle != nil && s.inFlight == 0 {
		close(s.idle)
	}
}

// stop hands leadership over, refuses new calls, and waits for those that run
// until ctx ends.
func (s *server) stop(ctx context.Context) {
	s.health.Shutdown()
	s.handOver(ctx)
	s.mu.Lock()
	s.idle = make(chan struct{})
	if s.inFlight == 0 {
		close(s.idle)
	}
	s.mu.Unlock()
	select {
	case <-s.idle:
	case <-ctx.Done():
	}
}

// handOver makes another voter the leader, if this node leads and one can.
func (s *server) handOver(ctx context.Context) {
	n := s.n
	ctx, cancel := context.WithTimeout(ctx, 2*n.opts.election)
	defer cancel()
	_ = n.await(ctx, func() (bool, error) {
		if n.role != raft.StateLeader {
			return true, nil
		}
		to := n.successor(n.store.conf.GetVoters())
		if to != 0 && n.mayChange() {
			n.transferLeader(to)
		}
		return to == 0, nil
	})
}

// successor returns the raft ID among ids, another than this node, that has
// most of the log and has been heard of; 0: there is none.
func (n *node) successor(ids []uint64) (best uint64) {
	progress := n.progressOf()
	for _, id := range ids {
		pr, ok := progress[id]
		if ok && id != n.raftID && !pr.IsLearner && pr.RecentActive && n.connected[id] && (best == 0 || pr.Match > progress[best].Match) {
			best = id
		}
	}
	return best
}

// Get implements KVService.
func (s *server) Get(ctx context.Context, req *kvpb.GetRequest) (*kvpb.GetResponse, error) {
	if err := validateKey(req.Key); err != nil {
		return nil, err
	}
	if !req.Local {
		if _, err := s.call(ctx, nil); err != nil {
			return nil, err
		}
	}
	it, ok, err := s.n.store.get(req.Key)
	if err != nil || !ok {
		return &kvpb.GetResponse{}, err
	}
	if it.value == nil {
		it.value = []byte{} // empty, not absent
	}
	return &kvpb.GetResponse{Value: it.value, Version: it.version}, nil
}

// Set implements KVService.
func (s *server) Set(ctx context.Context, req *kvpb.SetRequest) (*kvpb.SetResponse, error) {
	if err := cmp.Or(validateKey(req.Key), validateValue(req.Value)); err != nil {
		return nil, err
	}
	r, err := s.write(ctx, &kvpb.Write{Operation: &kvpb.Write_Set{Set: req}})
	return &kvpb.SetResponse{Version: r.version}, err
}

// Delete implements KVService.
func (s *server) Delete(ctx context.Context, req *kvpb.DeleteRequest) (*kvpb.DeleteResponse, error) {
	if err := validateKey(req.Key); err != nil {
		return nil, err
	}
	r, err := s.write(ctx, &kvpb.Write{Operation: &kvpb.Write_Delete{Delete: req}})
	return &kvpb.DeleteResponse{Deleted: r.found, Version: r.version}, err
}

func (s *server) write(ctx context.Context, w *kvpb.Write) (result, error) {
	record, err := encodeWrite(w)
	if err != nil {
		return result{}, err
	}
	return s.call(ctx, record)
}

// call takes a write, or with no record a read, through the loop.
func (s *server) call(ctx context.Context, record []byte) (result, error) {
	c := &call{record: record, done: make(chan outcome, 1)}
	if err := s.n.in.call(c); err != nil {
		return result{}, err
	}
	select {
	case o := <-c.done:
		return o.result, o.err
	case <-ctx.Done():
		if record == nil || c.state.CompareAndSwap(callQueued, callGivenUp) {
			return result{}, ctx.Err()
		}
		if ctx.Err() == context.Canceled {
			return result{}, apiError(codes.Canceled, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN, errOutcomeUnknown.Error())
		}
		return result{}, errOutcomeUnknown
	}
}

// onLeader has the leader do a request of ClusterService: here by local, or
// there by remote. A request is forwarded once: what arrives forwarded at a
// node that does not lead goes back. All these requests state what shall be,
// so one that was cut short by a change of leader is simply made again.
func (s *server) onLeader(ctx context.Context, local func(context.Context) error, remote func(context.Context, kvpb.ClusterServiceClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	md, _ := metadata.FromIncomingContext(ctx)
	forwarded := len(md.Get(forwardMetadata)) > 0
	for {
		p := s.n.pub.Load()
		var err error
		switch {
		case p.clusterID == 0:
			return errNotInitialized
		case p.leading:
			err = local(ctx)
		case forwarded:
			return errNotLeader
		case p.leader != nil && p.lead != p.raftID:
			err = s.forward(ctx, p.leader.Address, remote)
		default:
			if err := s.awaitLeader(ctx); err != nil {
				return err
			}
			continue
		}
		if !errors.Is(err, errNotLeader) && status.Code(err) != codes.Unavailable || forwarded {
			return err
		}
		select { // before it is tried again: something has changed, or enough time has passed
		case <-p.next:
		case <-time.After(s.n.opts.heartbeat):
		case <-ctx.Done():
			return err
		}
	}
}

// awaitLeader waits until a leader is known that has settled.
func (s *server) awaitLeader(ctx context.Context) error {
	t := time.NewTimer(leaderWait)
	defer t.Stop()
	for {
		p := s.n.pub.Load()
		if p.leading || p.leader != nil && p.lead != p.raftID {
			return nil
		}
		select {
		case <-p.next:
		case <-t.C:
			return errNoLeader
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *server) forward(ctx context.Context, address string, remote func(context.Context, kvpb.ClusterServiceClient) error) error {
	conn, err := s.net.dial(address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return remote(metadata.AppendToOutgoingContext(ctx, forwardMetadata, "1"), kvpb.NewClusterServiceClient(conn))
}

// probe asks the node at an address who it is, and checks that it is the one
// that is meant.
func (s *server) probe(ctx context.Context, m *kvpb.Node) (*kvpb.Welcome, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	w, err := s.net.probe(ctx, m.Address)
	if err != nil {
		return nil, apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, fmt.Sprintf("node %d at %s does not answer: %s", m.Id, m.Address, status.Convert(err).Message()))
	}
	if there := w.Peer.Node; there.Id != m.Id || there.Address != m.Address {
		return nil, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_WRONG_NODE, fmt.Sprintf("%d=%s was asked for, but %d=%s answers", m.Id, m.Address, there.Id, there.Address))
	}
	return w, nil
}

// Init implements ClusterService.
func (s *server) Init(ctx context.Context, req *kvpb.InitRequest) (*kvpb.InitResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	if err := s.checkInit(req.Members); err != nil {
		return nil, err
	}
	if s.n.pub.Load().clusterID != 0 {
		return nil, errInCluster
	}
	for _, m := range req.Members {
		if m.Id == s.n.self.Id {
			continue
		}
		if w, err := s.probe(ctx, m); err != nil {
			return nil, err
		} else if w.ClusterId != 0 {
			return nil, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED, fmt.Sprintf("node %d at %s is in cluster %016x already", m.Id, m.Address, w.ClusterId))
		}
	}
	var clusterID uint64
	if err := s.n.do(ctx, func() (err error) { clusterID, err = s.n.bootstrap(); return err }); err != nil {
		return nil, err
	}
	ids := []uint64{s.n.self.Id}
	todo := []string{}
	for _, m := range req.Members {
		if m.Id != s.n.self.Id {
			ids = append(ids, m.Id)
			todo = append(todo, fmt.Sprintf("add-learner %d=%s", m.Id, m.Address))
		}
	}
	if len(ids) == 1 {
		return &kvpb.InitResponse{ClusterId: clusterID}, s.awaitLeader(ctx)
	}
	todo = append(todo, "change-membership "+strings.Trim(fmt.Sprint(ids), "[]"))
	for _, m := range req.Members {
		if m.Id != s.n.self.Id {
			if err := s.addLearner(ctx, m); err != nil {
				return nil, halfWay(err, clusterID, todo)
			}
			todo = todo[1:]
		}
	}
	if err := s.changeMembership(ctx, &kvpb.ChangeMembershipRequest{Members: ids}); err != nil {
		return nil, halfWay(err, clusterID, todo)
	}
	return &kvpb.InitResponse{ClusterId: clusterID}, nil
}

// halfWay says how far Init got, and what is left to type.
func halfWay(err error, clusterID uint64, todo []string) error {
	st := status.Convert(toStatus(err, false)).Proto()
	st.Message = fmt.Sprintf("cluster %016x was made, but: %s; what is left: %s", clusterID, st.Message, strings.Join(todo, ", then "))
	return status.FromProto(st).Err()
}

func (s *server) checkInit(members []*kvpb.Node) error {
	if len(members) == 0 || len(members) > maxMembers {
		return invalid("members", "there are %d, there have to be 1 to %d", len(members), maxMembers)
	}
	ids, addresses := map[uint64]bool{}, map[string]bool{}
	for _, m := range members {
		if err := validateNode("members", m); err != nil {
			return err
		}
		if ids[m.Id] || addresses[m.Address] {
			return invalid("members", "%d=%s has the id or the address of another", m.Id, m.Address)
		}
		ids[m.Id], addresses[m.Address] = true, true
		if (m.Id == s.n.self.Id) != (m.Address == s.n.self.Address) {
			return invalid("members", "%d=%s: this node is %d=%s", m.Id, m.Address, s.n.self.Id, s.n.self.Address)
		}
	}
	if !ids[s.n.self.Id] {
		return invalid("members", "the called node, %d=%s, is not among them", s.n.self.Id, s.n.self.Address)
	}
	return nil
}

// AddLearner implements ClusterService.
func (s *server) AddLearner(ctx context.Context, req *kvpb.AddLearnerRequest) (*kvpb.AddLearnerResponse, error) {
	if err := validateNode("node", req.Node); err != nil {
		return nil, err
	}
	return &kvpb.AddLearnerResponse{}, s.onLeader(ctx,
		func(ctx context.Context) error { return s.addLearner(ctx, req.Node) },
		func(ctx context.Context, c kvpb.ClusterServiceClient) error {
			_, err := c.AddLearner(ctx, req)
			return err
		})
}

// addLearner adds a node on the leader and waits until it has caught up.
func (s *server) addLearner(ctx context.Context, m *kvpb.Node) error {
	n := s.n
	raftID := n.pub.Load().raftID
	if m.Id != n.self.Id || m.Address != n.self.Address {
		w, err := s.probe(ctx, m)
		if err != nil {
			return err
		}
		if id := n.pub.Load().clusterID; w.ClusterId != 0 && w.ClusterId != id {
			return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED, fmt.Sprintf("node %d at %s is in another cluster, %016x", m.Id, m.Address, w.ClusterId))
		}
		raftID = w.Peer.RaftId
	}
	return s.awaitChange(ctx, func() (bool, error) {
		for id, other := range n.store.members {
			if id != raftID && (other.Id == m.Id || other.Address == m.Address) {
				return false, apiError(codes.AlreadyExists, kvpb.ErrorReason_ERROR_REASON_MEMBER_EXISTS, fmt.Sprintf("%d=%s is a member already", other.Id, other.Address))
			}
		}
		if n.store.members[raftID] != nil {
			return n.isCaughtUp(n.progressOf()[raftID]), nil
		}
		if len(n.store.members) >= maxMembers {
			return false, invalid("node", "the cluster has %d members, which is the limit", maxMembers)
		}
		if !n.mayChange() {
			return false, nil
		}
		return false, n.proposeChange([]*kvpb.Member{{RaftId: raftID, Node: m}}, confChange(raftpb.ConfChangeAddLearnerNode, raftID))
	})
}

func confChange(t raftpb.ConfChangeType, raftID uint64) *raftpb.ConfChangeSingle {
	return &raftpb.ConfChangeSingle{Type: t.Enum(), NodeId: new(raftID)}
}

// awaitChange waits on the leader until f says that the membership is as it
// shall be.
func (s *server) awaitChange(ctx context.Context, f func() (bool, error)) error {
	n := s.n
	var busy atomic.Bool // with somebody else's change
	err := n.await(ctx, func() (bool, error) {
		if !n.leads() {
			return false, errNotLeader
		}
		busy.Store(isJoint(n.store.conf))
		return f()
	})
	if errors.Is(err, context.DeadlineExceeded) && busy.Load() {
		return apiError(codes.Aborted, kvpb.ErrorReason_ERROR_REASON_CHANGE_IN_PROGRESS, "another change of membership was running until the deadline")
	}
	return err
}

// ChangeMembership implements ClusterService.
func (s *server) ChangeMembership(ctx context.Context, req *kvpb.ChangeMembershipRequest) (*kvpb.ChangeMembershipResponse, error) {
	if len(req.Members) == 0 || len(req.Members) > maxMembers || len(req.RemoveLearners) > maxMembers {
		return nil, invalid("members", "there are %d, there have to be 1 to %d", len(req.Members), maxMembers)
	}
	ids := slices.Sorted(slices.Values(slices.Concat(req.Members, req.RemoveLearners)))
	if ids[0] == 0 || len(slices.Compact(ids)) < len(req.Members)+len(req.RemoveLearners) {
		return nil, invalid("members", "an id is 0 or stands there twice")
	}
	return &kvpb.ChangeMembershipResponse{}, s.onLeader(ctx,
		func(ctx context.Context) error { return s.changeMembership(ctx, req) },
		func(ctx context.Context, c kvpb.ClusterServiceClient) error {
			_, err := c.ChangeMembership(ctx, req)
			return err
		})
}

func (s *server) changeMembership(ctx context.Context, req *kvpb.ChangeMembershipRequest) error {
	n := s.n
	return s.awaitChange(ctx, func() (bool, error) {
		if isJoint(n.store.conf) {
			return false, nil
		}
		want, err := n.resolve(req.Members)
		if err != nil {
			return false, err
		}
		changes, err := n.changesTo(want, req)
		if err != nil || len(changes) == 0 {
			return true, err
		}
		if !n.mayChange() {
			return false, nil
		}
		if !slices.Contains(want, n.raftID) {
			// This node leaves: the change is made by one who stays.
			if to := n.successor(want); to != 0 {
				n.transferLeader(to)
				return false, nil
			}
			if changes = changes[:0]; len(want) > 0 {
				for _, id := range want { // nobody who stays is a voter yet
					if !slices.Contains(n.store.conf.GetVoters(), id) {
						changes = append(changes, confChange(raftpb.ConfChangeAddNode, id))
					}
				}
			}
			if len(changes) == 0 {
				return false, nil // they are voters, but not heard of: wait
			}
		}
		return false, n.proposeChange(nil, changes...)
	})
}

// resolve returns the raft IDs of nodes.
func (n *node) resolve(nodeIDs []uint64) ([]uint64, error) {
	var ids []uint64
	for _, nodeID := range nodeIDs {
		of := n.store.raftIDsOf(nodeID)
		if len(of) == 0 {
			return nil, apiError(codes.NotFound, kvpb.ErrorReason_ERROR_REASON_UNKNOWN_MEMBER, fmt.Sprintf("no member has the id %d", nodeID), "id", strconv.FormatUint(nodeID, 10))
		}
		ids = append(ids, of...)
	}
	return ids, nil
}

// changesTo returns what changes the configuration to one with the wanted
// voters; nothing, if that is so already.
func (n *node) changesTo(want []uint64, req *kvpb.ChangeMembershipRequest) ([]*raftpb.ConfChangeSingle, error) {
	var changes []*raftpb.ConfChangeSingle
	voters, progress := n.store.conf.GetVoters(), n.progressOf()
	for _, id := range want {
		if slices.Contains(voters, id) {
			continue
		}
		if pr := progress[id]; !n.isCaughtUp(pr) {
			return nil, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP, fmt.Sprintf("node %s is too far behind to vote: it has entry %d of %d", n.describe(id), pr.Match, n.store.index))
		}
		changes = append(changes, confChange(raftpb.ConfChangeAddNode, id))
	}
	for _, id := range voters {
		if slices.Contains(want, id) {
			continue
		}
		t := raftpb.ConfChangeRemoveNode
		if req.Retain {
			t = raftpb.ConfChangeAddLearnerNode
		}
		changes = append(changes, confChange(t, id))
	}
	for _, nodeID := range req.RemoveLearners {
		for _, id := range n.store.raftIDsOf(nodeID) {
			if slices.Contains(n.store.conf.GetLearners(), id) {
				changes = append(changes, confChange(raftpb.ConfChangeRemoveNode, id))
			}
		}
	}
	return changes, nil
}

// TransferLeader implements ClusterService.
func (s *server) TransferLeader(ctx context.Context, req *kvpb.TransferLeaderRequest) (*kvpb.TransferLeaderResponse, error) {
	if req.NodeId == 0 {
		return nil, invalid("node_id", "it is 0")
	}
	return &kvpb.TransferLeaderResponse{}, s.onLeader(ctx,
		func(ctx context.Context) error { return s.transferLeader(ctx, req.NodeId) },
		func(ctx context.Context, c kvpb.ClusterServiceClient) error {
			_, err := c.TransferLeader(ctx, req)
			return err
		})
}

func (s *server) transferLeader(ctx context.Context, nodeID uint64) error {
	n := s.n
	var start uint64 // tick of the first try
	return n.await(ctx, func() (bool, error) {
		if lead := n.store.members[n.lead]; lead != nil && lead.Id == nodeID {
			return true, nil
		}
		if n.role != raft.StateLeader {
			if n.lead == 0 && start != 0 && n.now-start < 2*uint64(n.electionTicks()) {
				return false, nil // the election that was asked for
			}
			return false, errNotLeader
		}
		ids, err := n.resolve([]uint64{nodeID})
		if err != nil {
			return false, err
		}
		if !slices.Contains(n.store.conf.GetVoters(), ids[0]) {
			return false, apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_CAUGHT_UP, fmt.Sprintf("node %d is no voter", nodeID))
		}
		if start != 0 && n.now-start > 2*uint64(n.electionTicks()) {
			return false, apiError(codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE, fmt.Sprintf("node %d did not take over", nodeID))
		}
		if n.mayChange() {
			start = cmp.Or(start, n.now)
			n.transferLeader(ids[0])
		}
		return false, nil
	})
}

// Metrics implements ClusterService.
func (s *server) Metrics(ctx context.Context, _ *kvpb.MetricsRequest) (*kvpb.MetricsResponse, error) {
	var m *kvpb.MetricsResponse
	err := s.n.do(ctx, func() error { m = s.n.metrics(); return nil })
	if err != nil {
		return nil, err
	}
	m.MessagesDropped += s.net.dropped.Load()
	m.BuildVersion = buildVersion()
	return m, nil
}

// metrics is the node's own view; only the loop may call it.
func (n *node) metrics() *kvpb.MetricsResponse {
	c, s := n.counters, n.store
	m := &kvpb.MetricsResponse{
		Node: n.self, RaftId: n.raftID, ClusterId: s.clusterID, Role: kvpb.Role_ROLE_UNINITIALIZED, Leader: s.members[n.lead],
		FirstIndex: n.raft.prevIndex + 1, LastIndex: n.raft.last(), AppliedIndex: s.index, Joint: isJoint(s.conf), Version: s.version, LogBytes: n.raft.bytes,
		EntriesApplied: c.entries, WritesApplied: c.writes, ReadsReleased: c.reads, ReadRounds: c.rounds, LeaderChanges: c.leaders,
		SnapshotsSent: c.snapshotsSent, SnapshotsInstalled: c.snapshotsInstalled, MessagesDropped: c.dropped, UnhealthyReason: n.whyUnhealthy(),
	}
	m.Healthy = m.UnhealthyReason == ""
	m.Keys, m.StoreBytes = s.size()
	if n.rn == nil {
		return m
	}
	st := n.rn.BasicStatus()
	m.Term, m.CommitIndex = st.GetTerm(), st.GetCommit()
	switch {
	case n.role == raft.StateLeader:
		m.Role = kvpb.Role_ROLE_LEADER
	case n.role != raft.StateFollower:
		m.Role = kvpb.Role_ROLE_CANDIDATE
	case slices.Contains(s.conf.GetLearners(), n.raftID):
		m.Role = kvpb.Role_ROLE_LEARNER
	default:
		m.Role = kvpb.Role_ROLE_FOLLOWER
	}
	progress := n.progressOf()
	for _, member := range sortedMembers(s.members) {
		id := member.RaftId
		ms := &kvpb.MemberStatus{
			Node: member.Node, RaftId: id, Connected: n.connected[id] || id == n.raftID,
			Voter: slices.Contains(s.conf.GetVoters(), id), VoterOutgoing: slices.Contains(s.conf.GetVotersOutgoing(), id),
			Learner: slices.Contains(s.conf.GetLearners(), id) || slices.Contains(s.conf.GetLearnersNext(), id),
		}
		if pr, ok := progress[id]; ok {
			ms.Progress = &kvpb.Progress{MatchIndex: pr.Match, NextIndex: pr.Next, State: pr.State.String(), RecentActive: pr.RecentActive, CaughtUp: n.isCaughtUp(pr)}
		}
		m.Members = append(m.Members, ms)
	}
	return m
}
