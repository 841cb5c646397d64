package rkv

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// silence is after how long without a response a node is left: it sends one every second.
const silence = 5 * time.Second

var errSilent = errors.New("the node says nothing")

// Follower is told of all keys that start with a prefix.
type Follower struct {
	Prefix string
	// Begin takes all keys as they were at one moment. It is called at first, and again if the
	// nodes do not know any more what was written since, or the cluster was restored.
	Begin func(keys []*kvpb.KeyValue, version uint64)
	// Change takes the writes after that: each once, in the order of versions, none left out.
	Change func(events []*kvpb.Event)
	// Fail takes what has ended a stream, which goes on at another node. It may be nil.
	Fail func(error)
}

// Follow tells a follower of keys and writes, until ctx ends, or a node refuses for good. It is
// connected to one node at a time, and takes the next one when that fails: so it knows when it has
// asked all of them.
func Follow(ctx context.Context, c Config, f Follower) error {
	if len(c.Nodes) == 0 {
		return errors.New("there is no node to follow")
	}
	p := position{Follower: f}
	pause := pauses{first: time.Second, longest: 5 * time.Second}
	for i := rand.N(len(c.Nodes)); ; i++ { // many followers share the nodes among them
		one := c
		one.Nodes = []string{c.Nodes[i%len(c.Nodes)]}
		before := p.version
		err := p.followAt(ctx, one)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if isRefused(err) {
			return err
		}
		if f.Fail != nil {
			f.Fail(err)
		}
		p.note(err, len(c.Nodes))
		if p.version != before { // it got on
			pause.reset()
		}
		if !pause.wait(ctx, err) {
			return ctx.Err()
		}
	}
}

// isRefused reports whether every node would end the call in this way.
func isRefused(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return true
	}
	return false
}

// position is how far a follower is told.
type position struct {
	Follower
	clusterID uint64 // 0: it begins anew
	version   uint64 // up to which it is told all
	compacted int    // how many nodes have not known what comes next
}

// note has the follower begin anew if an error says that it cannot go on.
func (p *position) note(err error, nodes int) {
	switch reason(err) {
	case "OTHER_CLUSTER":
		p.clusterID = 0
	case "COMPACTED":
		p.compacted++
		if p.compacted >= nodes { // until then, another node may know more
			p.clusterID = 0
		}
	}
}

// followAt tells the follower what comes next, by one node, until the stream ends.
func (p *position) followAt(ctx context.Context, node Config) error {
	client, err := Dial(node)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	// A Scan and a Watch need no deadline, but are ended when they are silent.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	err = p.scanAndWatch(ctx, client.kv, watchdog)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (p *position) scanAndWatch(ctx context.Context, kv kvpb.KVServiceClient, watchdog *time.Timer) error {
	if p.clusterID == 0 {
		if err := p.scan(ctx, kv, watchdog); err != nil {
			return err
		}
	}
	stream, err := kv.Watch(ctx, &kvpb.WatchRequest{
		Prefix:      p.Prefix,
		FromVersion: p.version + 1, // what the Scan, or the Watch before, has not told
		ClusterId:   p.clusterID,
	})
	if err != nil {
		return err
	}
	if _, err := stream.Recv(); err != nil { // the first response has no events
		return err
	}
	for {
		watchdog.Reset(silence)
		resp, err := stream.Recv()
		if err == io.EOF {
			return status.Error(codes.Unavailable, "the node has ended the watch")
		}
		if err != nil {
			return err
		}
		if len(resp.Events) > 0 {
			watchdog.Stop() // it is the follower's time
			p.Change(resp.Events)
		}
		p.version = resp.Version // after its events: the next Watch begins behind them
		p.compacted = 0
	}
}

// scan has the follower begin with all keys, once they are here.
func (p *position) scan(ctx context.Context, kv kvpb.KVServiceClient, watchdog *time.Timer) error {
	stream, err := kv.Scan(ctx, &kvpb.ScanRequest{Prefix: p.Prefix})
	if err != nil {
		return err
	}
	var first *kvpb.ScanResponse
	var keys []*kvpb.KeyValue
	for {
		resp, err := stream.Recv()
		if err == io.EOF { // and no other end: it has shown all
			break
		}
		if err != nil {
			return err
		}
		watchdog.Reset(silence)
		if first == nil {
			first = resp
		}
		keys = append(keys, resp.Items...)
	}
	if first == nil {
		return status.Error(codes.Internal, "a Scan without a response")
	}
	watchdog.Stop()
	p.Begin(keys, first.Version)
	watchdog.Reset(silence)
	p.clusterID, p.version = first.ClusterId, first.Version
	p.compacted = 0
	return nil
}
