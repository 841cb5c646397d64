// Watch: events on a stream, one message at a time.

package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	// watchBytes is what the events of a response have before no further write goes into it.
	watchBytes = 32 << 10
	// watchProgress is the longest between two responses.
	watchProgress = time.Second
	// maxResumePause bounds the pause that a watch is told to make before it goes on at another
	// node: many end in one moment, and are not all to come to the others in one moment.
	maxResumePause = time.Second
)

// Watch implements KVService.
func (s *server) Watch(req *kvpb.WatchRequest, stream kvpb.KVService_WatchServer) error {
	err := s.watch(req, stream)
	if err == nil {
		return nil
	}
	return withResumePause(toStatus(err, true))
}

// withResumePause adds a RetryInfo to an error after which a watch is to go on elsewhere.
func withResumePause(err error) error {
	st := status.Convert(err)
	if st.Code() != codes.Unavailable {
		return err
	}
	st, _ = st.WithDetails(retryIn(rand.N(maxResumePause))) // fails only if the code is OK
	return st.Err()
}

func (s *server) watch(req *kvpb.WatchRequest, stream kvpb.KVService_WatchServer) error {
	filter, err := filterOf(req)
	if err != nil {
		return err
	}
	if hasUnknownFields(req) {
		return errUnknownField
	}
	allowed := s.watchers.allowed()
	if allowed.Err() != nil {
		return context.Cause(allowed)
	}
	ctx, cancel := whileAllowed(stream.Context(), allowed)
	defer cancel()
	w, err := s.watchers.add(filter, callerOf(ctx)) // before it waits: so many may wait, too
	if err != nil {
		return err
	}
	conn := connOf(ctx)
	conn.l.calls.beginWatch(conn)
	defer func() {
		s.watchers.remove(w)
		conn.l.calls.endWatch(conn)
	}()
	if err := s.awaitWatch(ctx, req); err != nil {
		return whyEnded(ctx, err)
	}
	h := s.n.store.history.view()
	from, err := watchFrom(&h, req)
	if err != nil {
		return whyEnded(ctx, err)
	}
	c := s.watchers.cursor(w, &h, from)
	_ = stream.SetHeader(*s.leaderMD.Load()) // fails only if the call has ended
	ws := &watchStream{stream: stream, conn: conn, ctx: ctx}
	if err := ws.send(&kvpb.WatchResponse{ClusterId: h.clusterID, Version: c.told()}); err != nil {
		return whyEnded(ctx, err)
	}
	return whyEnded(ctx, ws.tell(c))
}

// whileAllowed is ctx, but ends a little before its deadline, and when allowed does.
func whileAllowed(ctx, allowed context.Context) (context.Context, context.CancelFunc) {
	soon, cancelSoon := beforeDeadline(ctx)
	watching, cancel := context.WithCancelCause(soon)
	stop := context.AfterFunc(allowed, func() { cancel(context.Cause(allowed)) })
	return watching, func() {
		stop()
		cancel(nil)
		cancelSoon()
	}
}

// whyEnded is the error of a watch that has ended with err.
func whyEnded(ctx context.Context, err error) error {
	if old, ok := errors.AsType[*compactedError](err); ok {
		return compacted(old)
	}
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// awaitWatch waits until the node has applied all that is before a watch. It does not wait for a
// version of another cluster, which may never come.
func (s *server) awaitWatch(ctx context.Context, req *kvpb.WatchRequest) error {
	if req.FromVersion == 0 {
		return s.confirmRead(ctx)
	}
	h := s.n.store.history.view()
	if err := checkCluster(&h, req); err != nil {
		return err
	}
	return s.awaitRead(ctx, true, req.FromVersion-1)
}

// watchFrom returns the version that a watch is from, at a node that has applied all that is
// before, and whose watch that is.
func watchFrom(h *historyView, req *kvpb.WatchRequest) (from uint64, err error) {
	if err := checkCluster(h, req); err != nil {
		return 0, err
	}
	if req.FromVersion == 0 {
		return h.version + 1, nil
	}
	if req.FromVersion < h.oldest {
		return 0, &compactedError{h.oldest}
	}
	return req.FromVersion, nil
}

// checkCluster refuses a watch that was of another cluster.
func checkCluster(h *historyView, req *kvpb.WatchRequest) error {
	if h.clusterID == 0 {
		return errNotInitialized
	}
	isOther := req.ClusterId != 0 && req.ClusterId != h.clusterID
	if isOther {
		return otherCluster(h.clusterID)
	}
	return nil
}

func otherCluster(clusterID uint64) error {
	return errorWith(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_OTHER_CLUSTER,
		"the watch was of another cluster, or of this one before it was restored: begin again, with a Scan",
		"cluster_id", strconv.FormatUint(clusterID, 10))
}

func compacted(e *compactedError) error {
	return errorWith(codes.OutOfRange, kvpb.ErrorReason_ERROR_REASON_COMPACTED, e.Error(),
		"oldest_version", strconv.FormatUint(e.oldest, 10))
}

// watchStream is the stream of a watch.
type watchStream struct {
	stream grpc.ServerStream
	conn   *limitedConn
	ctx    context.Context // of whileAllowed
}

// tell sends events as they come, and progress in between.
func (w *watchStream) tell(c *cursor) error {
	progress := time.NewTimer(rand.N(watchProgress)) // many watches begin in one moment
	defer progress.Stop()
	isDue := false
	for {
		events, err := c.read(watchBytes)
		if err != nil {
			return err
		}
		if len(events) > 0 || isDue {
			resp := &kvpb.WatchResponse{Version: c.told(), Events: eventMessages(events)}
			if err := w.send(resp); err != nil {
				return err
			}
			isDue = false
		}
		select {
		case <-progress.C:
			isDue = true
			progress.Reset(watchProgress)
		case <-w.ctx.Done():
			return w.ctx.Err()
		case <-c.wake():
		}
	}
}

func eventMessages(events []keyEvent) []*kvpb.Event {
	messages := make([]*kvpb.Event, len(events))
	for i, e := range events {
		messages[i] = &kvpb.Event{Key: string(e.key), Version: e.version}
		if !e.deleted {
			messages[i].Value = present(e.value)
		}
	}
	return messages
}

// send sends a response, and waits until gRPC has written it: what a caller does not read
// takes one response of memory. If that is large, it has to have room.
func (w *watchStream) send(resp *kvpb.WatchResponse) error {
	pool := &watchPool{written: make(chan struct{})}
	size := proto.Size(resp)
	if size > uncountedAnswer {
		place, err := w.conn.l.answers.admit(w.ctx, sharer{conn: w.conn, streams: true}, size)
		if err != nil {
			return whyNoRoom(w.ctx, err)
		}
		pool.place = place
	}
	b, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 0, max(size, leastCounted)), resp)
	if err != nil {
		pool.Put(nil)
		return err
	}
	if err := w.stream.SendMsg(&encoded{b, pool}); err != nil {
		return err
	}
	select {
	case <-pool.written:
		return nil
	case <-w.ctx.Done():
		return w.ctx.Err()
	}
}

// watchPool is the pool of one response's buffer. gRPC gives that back when it is written, and
// mostly when the call has ended: whoever waits for it looks at that, too.
type watchPool struct {
	mem.NopBufferPool
	place   *answerPool // nil: it is too small to need one
	written chan struct{}
}

// Put implements mem.BufferPool.
func (p *watchPool) Put(*[]byte) {
	if p.place != nil {
		p.place.Put(nil)
	}
	close(p.written)
}
