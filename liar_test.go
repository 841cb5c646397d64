// Peers that lie about who they are, and clients that ask for too much at once.

package main

import (
	"context"
	"fmt"
	"math"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// liar answers every hello with a raft ID that raft keeps for itself.
type liar struct {
	kvpb.UnimplementedRaftServiceServer
	node   *kvpb.Node
	raftID uint64
}

func (l *liar) Stream(s kvpb.RaftService_StreamServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	return s.Send(&kvpb.StreamResponse{Welcome: &kvpb.Welcome{
		Verdict: kvpb.Verdict_VERDICT_ACCEPTED, Peer: &kvpb.Peer{Node: l.node, RaftId: l.raftID, Life: 5}}})
}

func newLiar(t *testing.T, id, raftID uint64) *kvpb.Node {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &kvpb.Node{Id: id, Address: lis.Addr().String()}
	g := grpc.NewServer()
	kvpb.RegisterRaftServiceServer(g, &liar{node: n, raftID: raftID})
	go func() { _ = g.Serve(lis) }()
	t.Cleanup(g.Stop)
	return n
}

// A learner whose welcome has a raft ID out of range stops nobody.
func TestWelcomeOutOfRange(t *testing.T) {
	t.Parallel()
	for nodes, raftIDs := range map[uint64][]uint64{1: {0, math.MaxUint64}, 3: {maxRaftID}} {
		for _, raftID := range raftIDs {
			t.Run(fmt.Sprintf("%d nodes, raft ID %x", nodes, raftID), func(t *testing.T) {
				c := newCluster(t, nodes)
				ids := []uint64{1, 2, 3}[:nodes]
				c.init(ids...)
				ctx, cancel := context.WithTimeout(c.ctx, 2*time.Second)
				defer cancel()
				_, err := c.nodes[1].AddLearner(ctx, &kvpb.AddLearnerRequest{Node: newLiar(t, 9, raftID)})
				t.Log("AddLearner:", err)
				if err == nil {
					t.Error("it was added")
				}
				for _, id := range ids {
					ctx, cancel := context.WithTimeout(c.ctx, 5*time.Second)
					_, err := c.nodes[id].Set(ctx, &kvpb.SetRequest{Key: "k", Value: []byte("v")})
					cancel()
					if err != nil {
						t.Errorf("a Set on node %d: %v", id, err)
					}
				}
			})
		}
	}
}

// A hello from a raft ID that raft keeps for itself is refused.
func TestHelloOutOfRange(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	h, err := stranger(c.nodes[1])
	if err != nil {
		t.Fatal(err)
	}
	h.From.RaftId = math.MaxUint64
	if w := c.nodes[1].server.n.accept(h); w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED {
		t.Error("accepted")
	}
}

// No more than maxLists Lists run at a time: each keeps what is overwritten.
func TestListsAreBounded(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	s := c.nodes[1].server
	for range maxLists {
		s.lists <- struct{}{}
	}
	ctx, cancel := context.WithTimeout(c.ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := c.nodes[1].List(ctx, &kvpb.ListRequest{}); err == nil {
		t.Error("one more runs")
	}
	<-s.lists
	if _, err := c.nodes[1].List(c.ctx, &kvpb.ListRequest{}); err != nil {
		t.Error(err)
	}
}

// TestHellosAreBounded: a connection that says hello without end is closed.
func TestHellosAreBounded(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1).nodes[1]
	conn := dial(n.address)
	defer func() { _ = conn.Close() }()
	var err error
	for hellos := 0; err == nil; hellos++ {
		if hellos > 1000 {
			t.Fatal("there is no limit")
		}
		var s kvpb.RaftService_StreamClient
		if s, err = kvpb.NewRaftServiceClient(conn).Stream(t.Context()); err == nil {
			_ = s.Send(&kvpb.StreamRequest{Hello: &kvpb.Hello{}})
			_, err = s.Recv()
		}
	}
	if c := status.Code(err); c != codes.Unavailable && c != codes.ResourceExhausted {
		t.Error(err)
	}
}
