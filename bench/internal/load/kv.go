package load

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// KV is a cluster of ours, or an echo server.
type KV struct {
	Local    bool // reads ask only the node that is called
	conns    []*grpc.ClientConn
	stubs    []kvpb.KVServiceClient
	sessions []*session // by client; none: writes carry no id
}

// session is a client's.
type session struct {
	id       uint64
	sequence atomic.Uint64
}

// Dial makes connections with gRPC's stock settings, spread over addresses.
func Dial(addresses []string, connections int, by Identity) (conns []*grpc.ClientConn, err error) {
	transport, err := by.credentials()
	if err != nil {
		return nil, err
	}
	for i := range connections {
		c, err := grpc.NewClient("passthrough:///"+addresses[i%len(addresses)], grpc.WithTransportCredentials(transport))
		if err != nil {
			return nil, err
		}
		conns = append(conns, c)
	}
	return conns, nil
}

// DialKV makes connections to nodes.
func DialKV(addresses []string, connections int, by Identity) (*KV, error) {
	conns, err := Dial(addresses, connections, by)
	k := &KV{conns: conns}
	for _, c := range conns {
		k.stubs = append(k.stubs, kvpb.NewKVServiceClient(c))
	}
	return k, err
}

// Close closes the connections.
func (k *KV) Close() {
	for _, c := range k.conns {
		_ = c.Close()
	}
}

// Locally is the same cluster, but reads are local.
func (k *KV) Locally() *KV {
	l := *k
	l.Local = true
	return &l
}

// ErrNoSessions says that the nodes are too old for sessions.
var ErrNoSessions = errors.New("the nodes do not implement OpenSession: --sessions=false sends writes without ids")

// OpenSessions opens a session for each client that has none.
func (k *KV) OpenSessions(ctx context.Context, clients int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	errs := make(chan error, max(clients, 1))
	for client := len(k.sessions); client < clients; client++ {
		s := &session{}
		k.sessions = append(k.sessions, s)
		wg.Go(func() {
			resp, err := k.stub(client).OpenSession(ctx, &kvpb.OpenSessionRequest{})
			s.id = resp.GetSession()
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if status.Code(err) == codes.Unimplemented {
			return ErrNoSessions
		}
		if err != nil {
			return fmt.Errorf("opening a session: %w", err)
		}
	}
	return nil
}

func (k *KV) stub(client int) kvpb.KVServiceClient { return k.stubs[client%len(k.stubs)] }

// requestID names a client's next write.
func (k *KV) requestID(client int) *kvpb.RequestId {
	if len(k.sessions) == 0 {
		return nil
	}
	s := k.sessions[client]
	return &kvpb.RequestId{Session: s.id, Sequence: s.sequence.Add(1)}
}

// Do implements Target.
func (k *KV) Do(ctx context.Context, client int, op Operation) error {
	if op.Set {
		_, err := k.stub(client).Set(ctx, &kvpb.SetRequest{Key: op.Key, Value: op.Value, RequestId: k.requestID(client)})
		return err
	}
	resp, err := k.stub(client).Get(ctx, &kvpb.GetRequest{Key: op.Key, Local: k.Local})
	if err == nil && resp.Value == nil {
		return ErrAbsent
	}
	return err
}

// Leader asks the nodes who leads.
func Leader(ctx context.Context, endpoints []string, by Identity) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conns, err := Dial(endpoints, len(endpoints), by)
	if err != nil {
		return "", err
	}
	var leader string
	var term uint64
	var errs []error
	for i, c := range conns {
		m, err := kvpb.NewClusterServiceClient(c).Metrics(ctx, &kvpb.MetricsRequest{})
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", endpoints[i], err))
		} else if m.Leader != nil && m.Term > term {
			leader, term = m.Leader.Address, m.Term
		}
		_ = c.Close()
	}
	if leader == "" {
		return "", errors.Join(append([]error{errors.New("no node knows a leader")}, errs...)...)
	}
	return leader, nil
}

// FillStreams is how many streams Fill uses. If there are sessions, each needs one.
const FillStreams = 4

// Fill sets every key once. Of o it takes the keys, the first of them, the value, the
// progress and whether it does so on streams.
func Fill(ctx context.Context, t Target, o Options) error {
	o.Clients, o.Depth, o.Fill = 256, 1, true
	if o.Pipeline {
		o.Clients, o.Depth = FillStreams, 1000
	}
	r, err := Run(ctx, o, t)
	if err == nil && r.Failed() > 0 {
		err = fmt.Errorf("setting the keys failed: %s", Errors(r.Errors))
	}
	return err
}
