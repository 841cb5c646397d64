package etcd

import (
	"context"
	"net"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"

	"raft-key-value/bench/internal/load"
)

// fakeWatches is a server that tells each watch of one event, and then cancels it. It refuses
// the key "refused".
type fakeWatches struct {
	etcdserverpb.UnimplementedWatchServer
	streams chan struct{}
}

func (f *fakeWatches) Watch(s etcdserverpb.Watch_WatchServer) error {
	f.streams <- struct{}{}
	for {
		req, err := s.Recv()
		if err != nil {
			return err
		}
		key := string(req.GetCreateRequest().Key)
		answers := []*etcdserverpb.WatchResponse{{Created: true, Canceled: key == "refused"}}
		if key == "last" {
			event := &mvccpb.Event{Kv: &mvccpb.KeyValue{Value: []byte("value")}}
			answers = append(answers, &etcdserverpb.WatchResponse{Events: []*mvccpb.Event{event}})
			answers = append(answers, &etcdserverpb.WatchResponse{Canceled: true})
		}
		for _, a := range answers {
			if err := s.Send(a); err != nil {
				return err
			}
		}
	}
}

// TestWatch: watches share a stream, or do not; one that is refused, and one that ends, is an
// error.
func TestWatch(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fake := &fakeWatches{streams: make(chan struct{}, 10)}
	server := grpc.NewServer()
	etcdserverpb.RegisterWatchServer(server, fake)
	served := make(chan error)
	go func() { served <- server.Serve(l) }()
	defer func() {
		server.Stop()
		<-served
	}()
	e := &Cluster{address: l.Addr().String()}
	for streams, share := range map[int]bool{2: false, 1: true} {
		ctx, cancel := context.WithCancel(t.Context())
		conns, err := e.DialWatches(1, share)
		if err != nil {
			t.Fatal(err)
		}
		told := make(chan string, 10)
		w := &load.Watches{Event: func(value []byte) { told <- string(value) }}
		if err := conns.Watch(ctx, w, 0, load.WatchedKeys{Keys: []string{"first", "last"}}); err != nil {
			t.Fatal(err)
		}
		if got := <-told; got != "value" {
			t.Errorf("it is told %q", got)
		}
		if got := len(fake.streams); got != streams {
			t.Errorf("%d streams, want %d", got, streams)
		}
		if share { // the only stream ends by itself
			if got := load.Errors(w.Wait()); got != "UNKNOWN: 1" {
				t.Errorf("it ended with %q", got)
			}
		}
		for _, keys := range [][]string{{"refused"}, {"first", "refused"}} {
			err := conns.Watch(ctx, w, 0, load.WatchedKeys{Keys: keys})
			if err == nil || !strings.Contains(err.Error(), "cancelled") {
				t.Errorf("%v: %v", keys, err)
			}
		}
		cancel()
		w.Wait()
		conns.Close()
		for range len(fake.streams) {
			<-fake.streams
		}
	}
	of := load.WatchedKeys{Prefix: "bench-", Prefixes: 2}
	want := "bench- bench. bench- bench."
	var got []string
	for _, req := range createRequests(of) {
		got = append(got, string(req.Key), string(req.RangeEnd))
	}
	if !slices.Equal(got, strings.Fields(want)) {
		t.Errorf("%+v is %q", of, got)
	}
}
