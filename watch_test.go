package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// testWatch is a watch of a client that goes on elsewhere when its stream ends.
type testWatch struct {
	c         *testCluster
	req       *kvpb.WatchRequest
	stream    kvpb.KVService_WatchClient
	end       context.CancelFunc
	clusterID uint64
	version   uint64 // all up to it was told
	events    []*kvpb.Event
}

// watch begins a watch at a node.
func (c *testCluster) watch(via uint64, req *kvpb.WatchRequest) *testWatch {
	c.t.Helper()
	w := &testWatch{c: c, req: req}
	if err := w.open(via); err != nil {
		c.t.Fatalf("Watch %v at node %d: %v", req, via, err)
	}
	return w
}

// open opens the stream, and reads its first response.
func (w *testWatch) open(via uint64) error {
	if w.end != nil {
		w.end()
	}
	var ctx context.Context
	ctx, w.end = context.WithCancel(w.c.ctx)
	var err error
	w.stream, err = w.c.nodes[via].Watch(ctx, w.req)
	if err != nil {
		return err
	}
	resp, err := w.stream.Recv()
	if err != nil {
		return err
	}
	isFirst := resp.ClusterId != 0 && len(resp.Events) == 0
	isResume := w.req.FromVersion == 0 || resp.Version == w.req.FromVersion-1
	if !isFirst || !isResume {
		return fmt.Errorf("the first response is %v", resp)
	}
	w.clusterID = resp.ClusterId
	w.version = resp.Version
	return nil
}

// resume goes on at another node.
func (w *testWatch) resume(via uint64) error {
	w.req.FromVersion = w.version + 1
	w.req.ClusterId = w.clusterID
	return w.open(via)
}

// read reads one response, and looks whether it may be.
func (w *testWatch) read() error {
	resp, err := w.stream.Recv()
	if err != nil {
		return err
	}
	last := w.version
	for _, e := range resp.Events {
		isTwice := e.Version == last && len(w.events) > 0 && e.Key <= w.events[len(w.events)-1].Key
		if e.Version < last || e.Version <= w.version || isTwice || e.Version > resp.Version {
			return fmt.Errorf("after version %d: %v in %v", last, e, resp)
		}
		last = e.Version
		w.events = append(w.events, e)
	}
	if resp.Version < w.version {
		return fmt.Errorf("it told up to %d before, and now to %d", w.version, resp.Version)
	}
	w.version = resp.Version
	return nil
}

// until reads until all up to a version was told.
func (w *testWatch) until(version uint64) {
	w.c.t.Helper()
	for w.version < version {
		if err := w.read(); err != nil {
			w.c.t.Fatal(err)
		}
	}
}

func (w *testWatch) text() string {
	var lines []string
	for _, e := range w.events {
		if e.Value == nil {
			lines = append(lines, fmt.Sprintf("-%s@%d", e.Key, e.Version))
			continue
		}
		lines = append(lines, fmt.Sprintf("%s=%s@%d", e.Key, e.Value, e.Version))
	}
	return strings.Join(lines, " ")
}

// TestWatch watches keys, prefixes and ranges at each node, from now on and from before.
func TestWatch(t *testing.T) {
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	before := c.set(1, "a1", "before")
	for id := uint64(1); id <= 3; id++ {
		first := c.set(id, "z", "acknowledged")
		key := c.watch(id, &kvpb.WatchRequest{Key: "a1"})
		prefix := c.watch(id, &kvpb.WatchRequest{Prefix: "a"})
		ranged := c.watch(id, &kvpb.WatchRequest{Start: "a2", End: "b"})
		all := c.watch(id, &kvpb.WatchRequest{})
		old := c.watch(id, &kvpb.WatchRequest{Prefix: "a", FromVersion: before})
		if all.version < first {
			t.Errorf("a watch begins at version %d, after %d", all.version, first)
		}
		v := c.set(1, "a1", "")
		c.set(2, "a2", "x")
		c.set(3, "b1", "y")
		if _, err := c.nodes[id].DeleteRange(c.ctx, &kvpb.DeleteRangeRequest{Prefix: "a"}); err != nil {
			t.Fatal(err)
		}
		last := c.set(id, "a1", "again")
		for w, want := range map[*testWatch]string{
			key:    fmt.Sprintf("a1=@%d -a1@%d a1=again@%d", v, v+3, v+4),
			prefix: fmt.Sprintf("a1=@%d a2=x@%d -a1@%d -a2@%d a1=again@%d", v, v+1, v+3, v+3, v+4),
			ranged: fmt.Sprintf("a2=x@%d -a2@%d", v+1, v+3),
			all:    fmt.Sprintf("a1=@%d a2=x@%d b1=y@%d -a1@%d -a2@%d a1=again@%d", v, v+1, v+2, v+3, v+3, v+4),
		} {
			w.until(last)
			wantText(t, fmt.Sprint("node ", id, " ", w.req), w.text(), want)
			w.end()
		}
		old.until(last)
		wantPart(t, old.text(), fmt.Sprintf("a1=before@%d", before))
		wantPart(t, old.text(), prefix.text())
		old.end()
	}
	// All is told once nothing is written any more, and then every second.
	w := c.watch(2, &kvpb.WatchRequest{Key: "none"})
	last := c.set(1, "z", "z")
	w.until(last)
	if err := w.read(); err != nil || len(w.events) > 0 {
		t.Errorf("without events: %v, %q", err, w.text())
	}
	w.end()
	for id := range uint64(3) {
		s := c.nodes[id+1].server
		eventually(t, func() error {
			s.watchers.mu.Lock()
			defer s.watchers.mu.Unlock()
			if s.watchers.total.count > 0 {
				return fmt.Errorf("%d watches are left", s.watchers.total.count)
			}
			return nil
		})
	}
}

// TestWatchRefused: what is asked for is malformed, not there any more, or of another cluster.
func TestWatchRefused(t *testing.T) {
	c := newCluster(t, 1, func(o *options) { o.watchBytes = 200 << 10 })
	refused := func(req *kvpb.WatchRequest, code codes.Code, reason string) error {
		t.Helper()
		s, err := c.nodes[1].Watch(c.ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Recv()
		wantError(t, err, code, reason)
		return err
	}
	refused(&kvpb.WatchRequest{}, codes.Unavailable, "NOT_INITIALIZED")
	c.init(1)
	for _, req := range []*kvpb.WatchRequest{
		{Key: "a", Prefix: "a"}, {Key: "a", End: "b"}, {Prefix: "a", Start: "a"}, {Start: "b", End: "a"},
		{Key: strings.Repeat("k", maxKeyBytes+1)}, {Prefix: strings.Repeat("k", maxKeyBytes+1)},
	} {
		refused(req, codes.InvalidArgument, "INVALID_FIELD")
	}
	c.fill(1, 4)
	last := c.set(1, "k", "v")
	err := refused(&kvpb.WatchRequest{FromVersion: 1}, codes.OutOfRange, "COMPACTED")
	oldest, convErr := strconv.ParseUint(infoOf(err).Metadata["oldest_version"], 10, 64)
	if convErr != nil || oldest < 2 || oldest > last {
		t.Errorf("%v names no version that there is", err)
	}
	w := c.watch(1, &kvpb.WatchRequest{FromVersion: oldest})
	w.until(last)
	wantPart(t, w.text(), fmt.Sprintf("k=v@%d", last))
	err = refused(&kvpb.WatchRequest{FromVersion: oldest, ClusterId: w.clusterID + 1}, codes.FailedPrecondition, "OTHER_CLUSTER")
	wantText(t, "the cluster's id", infoOf(err).Metadata["cluster_id"], strconv.FormatUint(w.clusterID, 10))
	w.end()
}

// TestWatchWaits: for a version that the node has not applied, and no longer than there is a
// leader.
func TestWatchWaits(t *testing.T) {
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	leader := c.settled(1, 2, 3)
	follower := 1 + leader%3
	version := c.set(leader, "k", "v")
	s, err := c.nodes[follower].Watch(c.ctx, &kvpb.WatchRequest{FromVersion: version + 2})
	if err != nil {
		t.Fatal(err)
	}
	c.inLoop(follower, func(n *node) error {
		if len(n.calls.waits.calls) != 1 {
			return fmt.Errorf("%d calls wait for a version", len(n.calls.waits.calls))
		}
		return nil
	})
	c.set(leader, "k", "v2")
	c.set(leader, "k", "v3")
	first, err := s.Recv()
	if err != nil || first.Version != version+1 || len(first.Events) > 0 {
		t.Fatalf("the first response is %v, %v", first, err)
	}
	second, err := s.Recv()
	if err != nil || len(second.Events) != 1 || second.Events[0].Version != version+2 {
		t.Fatalf("the second response is %v, %v", second, err)
	}
	c.cut(follower)
	for {
		if _, err = s.Recv(); err != nil {
			break
		}
	}
	wantError(t, err, codes.Unavailable, "NO_LEADER")
	if retryOf(err) == 0 {
		t.Errorf("%v does not say when to go on", err)
	}
	s, err = c.nodes[follower].Watch(c.ctx, &kvpb.WatchRequest{FromVersion: version})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	wantError(t, err, codes.Unavailable, "NO_LEADER")
	c.heal()
	w := &testWatch{c: c, req: &kvpb.WatchRequest{FromVersion: version}}
	eventually(t, func() error { return w.open(follower) })
	w.until(version + 2)
	wantText(t, "after the cut", w.text(), fmt.Sprintf("k=v@%d k=v2@%d k=v3@%d", version, version+1, version+2))
	w.end()
}

// TestWatchGoesOn: a watch that goes from node to node, while leaders are killed and nodes stop
// and come back with a snapshot, tells of each write once, in order. It began with a Scan.
func TestWatchGoesOn(t *testing.T) {
	c, _ := newDurable(t, 3)
	c.init(1, 2, 3)
	c.settled(1, 2, 3)
	ctx, stopWriting := context.WithCancel(c.ctx)
	defer stopWriting()
	type write struct {
		key     string
		version uint64
	}
	var mu sync.Mutex
	var written []write
	var writers sync.WaitGroup
	addresses := map[uint64]string{}
	for id, n := range c.nodes {
		addresses[id] = n.address
	}
	for w := range uint64(3) {
		kv := dialed(t, addresses[w+1])
		writers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprintf("k%d-%d", w, i)
				resp, err := kv.Set(ctx, &kvpb.SetRequest{Key: key, Value: []byte(key)})
				if err != nil {
					sleep(ctx, 20*time.Millisecond)
					continue
				}
				mu.Lock()
				written = append(written, write{key, resp.Version})
				mu.Unlock()
			}
		})
	}
	defer writers.Wait()
	defer stopWriting()

	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(written)
	}
	more := func(n int) {
		t.Helper()
		goal := count() + n
		eventually(t, func() error {
			if count() < goal {
				return fmt.Errorf("%d writes, want %d", count(), goal)
			}
			return nil
		})
	}
	more(50)
	scan, err := c.nodes[1].Scan(c.ctx, &kvpb.ScanRequest{Prefix: "k"})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]uint64{}
	first, err := scan.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for resp, err := scan.Recv(); err == nil; resp, err = scan.Recv() {
		for _, it := range resp.Items {
			seen[it.Key] = it.Version
		}
	}
	w := &testWatch{c: c, version: first.Version, clusterID: first.ClusterId, req: &kvpb.WatchRequest{Prefix: "k"}}
	via := uint64(1)
	goOn := func() {
		t.Helper()
		eventually(t, func() error {
			via = 1 + via%3
			if c.nodes[via] == nil {
				return fmt.Errorf("node %d is away", via)
			}
			err := w.resume(via)
			if status.Code(err) == codes.OutOfRange {
				t.Fatal(err)
			}
			return err
		})
	}
	goOn()
	follow := func(writes int) {
		t.Helper()
		goal := len(w.events) + writes
		for len(w.events) < goal {
			err := w.read()
			if err == nil {
				continue
			}
			// kill closes the test's own connection to the node, too.
			nodeHasEnded := status.Code(err) == codes.Unavailable
			connIsClosed := status.Code(err) == codes.Canceled
			if !nodeHasEnded && !connIsClosed {
				t.Fatal(err)
			}
			goOn()
		}
	}
	for range 2 {
		follow(50)
		leader := c.settled(1, 2, 3)
		address := c.nodes[leader].address
		c.kill(leader)
		follow(50)
		c.start(leader, address)
		c.settled(1, 2, 3)
		follow(50)
		c.restart(via) // which ends the watch
		follow(50)
		c.settled(1, 2, 3)
	}
	stopWriting()
	writers.Wait()
	last := c.set(1+via%3, "k", "last")
	for w.version < last {
		if err := w.read(); err != nil {
			goOn()
		}
	}
	w.end()
	for _, e := range w.events {
		if seen[e.Key] != 0 {
			t.Errorf("%v was told twice", e)
		}
		seen[e.Key] = e.Version
	}
	for _, x := range written {
		if seen[x.key] != x.version {
			t.Errorf("%s of version %d was told with version %d", x.key, x.version, seen[x.key])
		}
	}
	isSorted := slices.IsSortedFunc(w.events, func(a, b *kvpb.Event) int { return int(a.Version) - int(b.Version) })
	if !isSorted {
		t.Error("the events are in no order")
	}
}

// TestWatchOfHungNode: a node whose loop hangs sends its watches elsewhere.
func TestWatchOfHungNode(t *testing.T) {
	c := newCluster(t, 1)
	c.init(1)
	w := c.watch(1, &kvpb.WatchRequest{})
	release := c.hold(1)
	var err error
	for err == nil {
		err = w.read()
	}
	wantError(t, err, codes.Unavailable, "UNREACHABLE")
	release()
	eventually(t, func() error { return w.resume(1) })
	w.until(c.set(1, "k", "v"))
	wantPart(t, w.text(), "k=v")
	w.end()
}

// TestWatchOfFailedNode: a node that fails says so to its watches.
func TestWatchOfFailedNode(t *testing.T) {
	c := newCluster(t, 1)
	c.init(1)
	w := c.watch(1, &kvpb.WatchRequest{})
	cause := errors.New("broken by the test")
	n := c.nodes[1].server.n
	n.inbox.event(func() { n.err = cause })
	var err error
	for err == nil {
		err = w.read()
	}
	wantError(t, err, codes.Unavailable, "NODE_FAILED")
	w.end()
	c.ends(1, cause)
}

// TestWaitingWatches: those that wait for a version count as watches, and one of another
// cluster does not wait.
func TestWaitingWatches(t *testing.T) {
	c := newCluster(t, 1)
	c.init(1)
	first := c.watch(1, &kvpb.WatchRequest{})
	first.end()
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	const waiting = 3
	for range waiting {
		if _, err := c.nodes[1].Watch(ctx, &kvpb.WatchRequest{FromVersion: 1 << 40}); err != nil {
			t.Fatal(err)
		}
	}
	ws := c.nodes[1].server.watchers
	counts := func(want int) {
		t.Helper()
		eventually(t, func() error {
			ws.mu.Lock()
			defer ws.mu.Unlock()
			if ws.total.count != want {
				return fmt.Errorf("%d watches, want %d", ws.total.count, want)
			}
			return nil
		})
	}
	counts(waiting)
	s, err := c.nodes[1].Watch(c.ctx, &kvpb.WatchRequest{FromVersion: 1 << 40, ClusterId: first.clusterID + 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	wantError(t, err, codes.FailedPrecondition, "OTHER_CLUSTER")
	cancel()
	counts(0)
}

// TestUnreadWatch: a watch that is not read keeps one response, and is told so when it has
// fallen behind.
func TestUnreadWatch(t *testing.T) {
	c := newCluster(t, 1, func(o *options) { o.watchBytes = 1 << 20 })
	c.init(1)
	s, err := c.nodes[1].Watch(c.ctx, &kvpb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	c.fill(1, 100)
	events := 0
	for {
		resp, err := s.Recv()
		if err != nil {
			wantError(t, err, codes.OutOfRange, "COMPACTED")
			break
		}
		events += len(resp.Events)
	}
	if events > 20 {
		t.Errorf("%d events of 64 KiB were kept for a watch that was not read", events)
	}
}

// dialed is a client of one address, whoever answers there.
func dialed(t *testing.T, address string) kvpb.KVServiceClient {
	t.Helper()
	conn := dialNode(t, address, insecure.NewCredentials())
	t.Cleanup(func() { _ = conn.Close() })
	return kvpb.NewKVServiceClient(conn)
}

// retryOf is after how long an error says to try again; 0: it does not say.
func retryOf(err error) time.Duration {
	for _, d := range status.Convert(err).Details() {
		if retry, ok := d.(*errdetails.RetryInfo); ok {
			return retry.RetryDelay.AsDuration()
		}
	}
	return 0
}
