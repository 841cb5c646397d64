package main

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// loader is a client that sends Sets by a Pipeline as fast as it can, and reads the answers.
func loader(value int, done *atomic.Int64) func(ctx context.Context, address string, begun func()) {
	return func(ctx context.Context, address string, begun func()) {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		s, err := kvpb.NewKVServiceClient(conn).Pipeline(ctx)
		if err != nil {
			return
		}
		m := pipelineOf(min(500, (1<<20)/value), setOp("loaded", strings.Repeat("x", value)))
		go func() { // ends with the stream
			for s.Send(m) == nil {
			}
		}()
		for {
			resp, err := s.Recv()
			if err != nil {
				return
			}
			begun()
			for _, r := range resp.Results {
				if r.GetError() == nil {
					done.Add(1)
				} else {
					done.Add(-1e6) // it shows
				}
			}
		}
	}
}

// slowReader asks for large answers all the time, and takes 128 KiB a second.
func slowReader(done *atomic.Int64) func(ctx context.Context, address string, begun func()) {
	return func(ctx context.Context, address string, begun func()) {
		for ctx.Err() == nil {
			r, err := dialRude(address)
			if err != nil {
				sleep(ctx, 50*time.Millisecond)
				continue
			}
			stop := context.AfterFunc(ctx, func() { _ = r.Close() })
			req := marshalled(&kvpb.GetRequest{Key: "large", Local: true})
			for range 100 {
				s, err := r.call(getMethod, -1)
				if err == nil {
					err = r.message(s, true, req)
				}
				if err == nil {
					err = r.window(s, 2<<20)
				}
				if err != nil {
					break
				}
			}
			begun()
			for r.window(0, 32<<10) == nil && ctx.Err() == nil {
				done.Add(32 << 10)
				sleep(ctx, 250*time.Millisecond)
			}
			stop()
			_ = r.Close()
		}
	}
}

// BenchmarkBeside reports the 99th percentile of another client's Gets and Sets, with and
// without each flood beside it, and the flood's rate.
func BenchmarkBeside(b *testing.B) {
	var done atomic.Int64
	floods := []abuse{
		{"nothing", 0, nil},
		{"10 loaders of 100 bytes", 10, loader(100, &done)},
		{"10 loaders of 64 KiB", 10, loader(64<<10, &done)},
		{"6 slow readers", 6, slowReader(&done)},
	}
	for _, a := range floods {
		b.Run(a.name, func(b *testing.B) {
			ps := startProcesses(b, 3)
			p := leaderOf(b, ps)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "large", Value: make([]byte, maxValueBytes)}); err != nil {
				b.Fatal(err)
			}
			p99 := func(calls int, f func() error) time.Duration {
				took := make([]time.Duration, calls)
				for i := range took {
					start := time.Now()
					if err := f(); err != nil {
						b.Error(err)
					}
					took[i] = time.Since(start)
					time.Sleep(time.Millisecond)
				}
				slices.Sort(took)
				return took[len(took)*99/100]
			}
			set := func() error {
				_, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: "k", Value: make([]byte, 2000)})
				return err
			}
			get := func() error {
				_, err := p.kv.Get(ctx, &kvpb.GetRequest{Key: "k"})
				return err
			}
			large := func() error {
				_, err := p.kv.Get(ctx, &kvpb.GetRequest{Key: "large"})
				return err
			}
			p99(500, set)
			for b.Loop() {
				aloneSet, aloneGet, aloneLarge := p99(500, set), p99(500, get), p99(20, large)
				ready, stop := a.begin(p.address)
				<-ready
				start := time.Now()
				before := done.Load()
				besideSet, besideGet, besideLarge := p99(500, set), p99(500, get), p99(20, large)
				rate := float64(done.Load()-before) / time.Since(start).Seconds()
				stop()
				b.ReportMetric(rate, "flood/s")
				b.ReportMetric(float64(aloneSet.Microseconds()), "set-us")
				b.ReportMetric(float64(aloneGet.Microseconds()), "get-us")
				b.ReportMetric(float64(besideSet)/float64(aloneSet), "set-times")
				b.ReportMetric(float64(besideGet)/float64(aloneGet), "get-times")
				b.ReportMetric(float64(besideLarge)/float64(aloneLarge), "large-get-times")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
}

// marshalled encodes a message that can be.
func marshalled(m proto.Message) []byte {
	b, _ := proto.Marshal(m)
	return b
}
