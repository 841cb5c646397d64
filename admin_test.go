// What operators ask for at bad moments: beside each other, of nodes that do
// not answer, and under a leader that is new.

package main

import (
	"errors"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

// hold keeps a node's loop busy: its streams stay open, but it answers nothing.
func (c *testCluster) hold(id uint64) (release func()) {
	c.t.Helper()
	held, goOn := make(chan struct{}), make(chan struct{})
	c.nodes[id].server.n.in.event(func() { close(held); <-goOn })
	<-held
	release = sync.OnceFunc(func() { close(goOn) })
	c.t.Cleanup(release) // before the nodes are stopped
	return release
}

// inLoop polls a condition in a node's loop.
func (c *testCluster) inLoop(id uint64, f func(*node) error) {
	c.t.Helper()
	n := c.nodes[id].server.n
	eventually(c.t, func() error { return n.do(c.ctx, func() error { return f(n) }) })
}

// patient keeps the cluster from electing another leader by itself.
func patient(o *options) { o.election = o.heartbeat * 500 }

// staleView makes a node believe that it has applied no more than at a moment
// before: what it publishes stays as it was.
func (c *testCluster) staleView(id uint64, p published) (release func()) {
	c.t.Helper()
	release = c.hold(id)
	p.next = make(chan struct{})
	c.nodes[id].server.n.pub.Store(&p)
	return release
}

func TestRemoveAtOnce(t *testing.T) {
	c := newCluster(t, 5, patient)
	c.init(1, 2, 3, 4, 5)
	var wg sync.WaitGroup
	for id := uint64(4); id <= 5; id++ { // two operators
		wg.Go(func() { c.change(id-3, &kvpb.ChangeMembershipRequest{Remove: []uint64{id}}) })
	}
	wg.Wait()
	c.settled(1, 2, 3)

	// Node 2 does not know a learner yet that it is asked to have removed.
	without := *c.nodes[2].server.n.pub.Load()
	c.addLearner(1, 4)
	c.inLoop(2, func(n *node) error {
		if len(n.store.raftIDsOf(4)) == 0 {
			return errors.New("node 2 does not know node 4 yet")
		}
		return nil
	})
	with := *c.nodes[2].server.n.pub.Load()
	release := c.staleView(2, without)
	c.change(2, &kvpb.ChangeMembershipRequest{Remove: []uint64{4}})
	release()
	// It asks again, because whoever led then had no time to answer.
	release = c.staleView(2, with)
	c.change(2, &kvpb.ChangeMembershipRequest{Remove: []uint64{4}})
	_, err := c.nodes[2].ChangeMembership(c.ctx, &kvpb.ChangeMembershipRequest{Remove: []uint64{6}})
	wantError(t, err, codes.NotFound, "UNKNOWN_MEMBER")
	release()
}
