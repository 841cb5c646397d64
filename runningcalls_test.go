// Tests of runningcalls.go and http2.go.

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"raft-key-value/kvpb"
)

// frameOf is a frame of HTTP/2 with so many bytes.
func frameOf(kind, flags byte, stream uint32, bytes int) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(bytes)<<8|uint32(kind))
	b = binary.BigEndian.AppendUint32(append(b, flags), stream)
	return append(b, make([]byte, bytes)...)
}

// TestHTTP2Frames: frames are found in whatever parts they come.
func TestHTTP2Frames(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	for range 1000 {
		var sent []byte
		var want []string
		for range random.IntN(10) {
			kind, flags := byte(random.IntN(10)), byte(random.IntN(256))
			stream := random.Uint32() >> 1
			sent = append(sent, frameOf(kind, flags, stream, random.IntN(30))...)
			want = append(want, fmt.Sprint(kind, flags, stream))
		}
		skip := random.IntN(30)
		f := http2Frames{skip: skip}
		sent = append(make([]byte, skip), sent...)
		var got []string
		for len(sent) > 0 {
			n := 1 + random.IntN(min(len(sent), 40))
			for b := f.next(sent[:n]); b != nil; b = f.next(b) {
				got = append(got, fmt.Sprint(f.frame()))
			}
			sent = sent[n:]
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%q, want %q", got, want)
		}
	}
}

// TestOpenCalls: a call is open until its last frame, or a reset, either way; and when too many
// are, the connection yields that has taken the fewest answers, and no other.
func TestOpenCalls(t *testing.T) {
	conns := accepted(t, 3)
	l := conns[0].l
	l.calls.openLimit = 8
	reads := func(c *limitedConn, kind byte, streams ...uint32) {
		for _, s := range streams {
			if l.calls.read(c, frameOf(kind, 0, s, 5)) {
				l.cutUntaken()
			}
		}
	}
	for _, c := range conns {
		l.calls.read(c, make([]byte, http2PrefaceBytes))
	}
	wantOpen := func(what string, want ...int) {
		t.Helper()
		total := 0
		for i, c := range conns {
			if len(c.open.streams) != want[i] {
				t.Errorf("%s: connection %d has %d open calls, want %d", what, i, len(c.open.streams), want[i])
			}
			total += want[i]
		}
		if l.calls.open != total {
			t.Errorf("%s: %d are open on the node, want %d", what, l.calls.open, total)
		}
	}
	reads(conns[0], headersFrame, 1, 3, 5, 5, 3, 7)
	wantOpen("begun", 4, 0, 0)
	l.calls.wrote(conns[0], frameOf(headersFrame, 0, 1, 5))
	l.calls.wrote(conns[0], frameOf(0, endStreamFlag, 1, 5))
	wantOpen("answered in part", 4, 0, 0)
	l.calls.wrote(conns[0], frameOf(headersFrame, endStreamFlag, 1, 5))
	wantOpen("answered", 3, 0, 0)
	l.calls.wrote(conns[0], frameOf(resetFrame, 0, 1, 4))
	reads(conns[0], resetFrame, 1, 3)
	l.calls.wrote(conns[0], frameOf(resetFrame, 0, 5, 4))
	wantOpen("ended", 1, 0, 0)

	for range 4 {
		if !l.calls.begin(conns[1]) {
			t.Fatal("a call may not run")
		}
	}
	reads(conns[1], headersFrame, 1, 3, 5, 7)
	reads(conns[2], headersFrame, 1, 3, 5)
	wantOpen("as many as may be", 1, 4, 3)
	reads(conns[0], headersFrame, 9)
	wantOpen("one too many", 2, 4, 0)
	if !l.conns[conns[0]] || !l.conns[conns[1]] || l.conns[conns[2]] {
		t.Error("it is not the connection with most untaken answers that is closed")
	}
	if closed := l.counts.untaken.Load(); closed != 1 {
		t.Errorf("%d that were closed are counted", closed)
	}
	reads(conns[2], headersFrame, 7)
	wantOpen("after it was closed", 2, 4, 0)
	_ = conns[1].Close()
	wantOpen("a connection is closed", 2, 0, 0)
}

// TestWatchesAreNoOpenCalls: watches stay open for long, and have a bound of their own.
func TestWatchesAreNoOpenCalls(t *testing.T) {
	c := accepted(t, 1)[0]
	r := c.l.calls
	r.openLimit = 2
	r.read(c, make([]byte, http2PrefaceBytes))
	opens := func(stream uint32) (tooMany bool) { return r.read(c, frameOf(headersFrame, 0, stream, 5)) }
	for i := range uint32(5) {
		if opens(2*i + 1) {
			t.Fatalf("watch %d is one too many", i)
		}
		if !r.begin(c) {
			t.Fatal("a watch may not begin")
		}
		r.beginWatch(c)
	}
	if opens(101) || opens(103) || r.untaken(c) != 0 {
		t.Error("calls beside watches are too many")
	}
	if !opens(105) || r.untaken(c) != 3 {
		t.Errorf("%d calls are not taken, want 3", r.untaken(c))
	}
	if r.running != 0 {
		t.Errorf("%d watches count as running calls", r.running)
	}
	for range 5 {
		r.endWatch(c)
		r.end(c)
	}
	if r.untaken(c) != 8 || r.watches != 0 || c.watches != 0 {
		t.Errorf("%d calls are not taken, of which 5 were watches", r.untaken(c))
	}
}

// TestOpenCallsAreClosed: however a call ends, it is open no more.
func TestOpenCallsAreClosed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.init(1)
	n := c.nodes[1]
	conn := dialNode(t, n.address, insecure.NewCredentials())
	defer func() { _ = conn.Close() }()
	kv := kvpb.NewKVServiceClient(conn)
	long, cancel := context.WithCancel(c.ctx)
	defer cancel()
	if _, err := kv.Pipeline(long); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		_, _ = kv.Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: make([]byte, 100<<10)})
		_, _ = kv.Get(c.ctx, &kvpb.GetRequest{Key: "k"})
		_, _ = kv.Get(c.ctx, &kvpb.GetRequest{})
		large := metadata.AppendToOutgoingContext(c.ctx, "x-large", strings.Repeat("x", 2*maxHeaderBytes))
		_, _ = kv.Get(large, &kvpb.GetRequest{Key: "k"})
		_, _ = kv.Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: make([]byte, 2*maxRequestBytes)}, grpc.MaxCallSendMsgSize(8<<20))
		_ = conn.Invoke(c.ctx, "/no.such.Service/Method", &kvpb.GetRequest{}, &kvpb.GetResponse{})
		for _, wait := range []time.Duration{0, time.Microsecond, 100 * time.Microsecond, time.Millisecond} {
			soon, cancel := context.WithTimeout(c.ctx, wait)
			_, _ = kv.Set(soon, &kvpb.SetRequest{Key: "k", Value: make([]byte, 100<<10)})
			if s, err := kv.Pipeline(soon); err == nil {
				_ = s.Send(pipelineOf(10, getOp("k", false)))
			}
			cancel()
		}
	}
	calls := n.server.limiter.calls
	open := func() int {
		calls.mu.Lock()
		defer calls.mu.Unlock()
		return calls.open
	}
	eventually(t, func() error {
		if open() != 1 {
			return fmt.Errorf("%d calls are open, besides the Pipeline", open()-1)
		}
		return nil
	})
	cancel()
	eventually(t, func() error {
		if open() != 0 {
			return fmt.Errorf("%d calls are open", open())
		}
		return nil
	})
}
