package etcd

import (
	"context"
	"fmt"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"raft-key-value/bench/internal/load"
)

// WatchConns are connections to the leader for watches.
type WatchConns struct {
	Target
	share   bool // all watches of a connection are on one stream, as etcd's client has them
	watches []etcdserverpb.WatchClient
}

// DialWatches makes connections for watches.
func (e *Cluster) DialWatches(connections int, share bool) (*WatchConns, error) {
	conns, err := load.Dial([]string{e.address}, connections, e.as)
	if err != nil {
		return nil, err
	}
	c := &WatchConns{Target: Target{Cluster: &Cluster{conns: conns}}, share: share}
	for _, conn := range conns {
		c.stubs = append(c.stubs, etcdserverpb.NewKVClient(conn))
		c.watches = append(c.watches, etcdserverpb.NewWatchClient(conn))
	}
	return c, nil
}

// Close closes the connections.
func (c *WatchConns) Close() { closeAll(c.conns) }

func closeAll(conns []*grpc.ClientConn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

// Watch begins watches on a client's connection, and returns once all of them tell of what is
// written from then on.
func (c *WatchConns) Watch(ctx context.Context, w *load.Watches, client int, of load.WatchedKeys) error {
	reqs := createRequests(of)
	if c.share {
		return c.watchOnStream(ctx, w, client, reqs)
	}
	for _, req := range reqs {
		if err := c.watchOnStream(ctx, w, client, []*etcdserverpb.WatchCreateRequest{req}); err != nil {
			return err
		}
	}
	return nil
}

func createRequests(of load.WatchedKeys) (reqs []*etcdserverpb.WatchCreateRequest) {
	for _, key := range of.Keys {
		reqs = append(reqs, &etcdserverpb.WatchCreateRequest{Key: []byte(key)})
	}
	for range of.Prefixes {
		start, end := ends(load.Range{Prefix: of.Prefix})
		reqs = append(reqs, &etcdserverpb.WatchCreateRequest{Key: start, RangeEnd: end})
	}
	return reqs
}

// watchOnStream opens a stream with watches.
func (c *WatchConns) watchOnStream(ctx context.Context, w *load.Watches, client int, reqs []*etcdserverpb.WatchCreateRequest) error {
	s, err := c.watches[client%len(c.watches)].Watch(ctx)
	if err != nil {
		return fmt.Errorf("opening a watch: %w", err)
	}
	for _, req := range reqs {
		err := s.Send(&etcdserverpb.WatchRequest{RequestUnion: &etcdserverpb.WatchRequest_CreateRequest{CreateRequest: req}})
		if err != nil {
			return fmt.Errorf("opening a watch: %w", err)
		}
		resp, err := s.Recv()
		if err != nil {
			return fmt.Errorf("opening a watch: %w", err)
		}
		if resp.Canceled {
			return fmt.Errorf("opening a watch: it was cancelled: %s", resp.CancelReason)
		}
	}
	w.Go(ctx, func() error {
		for {
			resp, err := s.Recv()
			if err != nil {
				return err
			}
			if resp.Canceled {
				return fmt.Errorf("a watch was cancelled: %s", resp.CancelReason)
			}
			for _, e := range resp.Events {
				w.Event(e.Kv.Value)
			}
		}
	})
	return nil
}
