package load

import (
	"context"
	"fmt"
	"maps"
	"sync"

	"raft-key-value/kvpb"
)

// WatchedKeys are what the watches on one connection are of: each watch of one key, or all
// of one prefix.
type WatchedKeys struct {
	Keys     []string
	Prefix   string // of Prefixes watches
	Prefixes int
}

// Watches are watches that go on: goroutines that read what comes until the context of their
// streams ends.
type Watches struct {
	Event func(value []byte) // called for each event of each watch, by many goroutines

	reading sync.WaitGroup
	mu      sync.Mutex
	errors  map[string]uint64
}

// Go reads a stream in a goroutine, by a function that returns why it has ended.
func (w *Watches) Go(ctx context.Context, read func() error) {
	w.reading.Go(func() {
		err := read()
		if ctx.Err() != nil {
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.errors == nil {
			w.errors = map[string]uint64{}
		}
		w.errors[ErrorName(err)]++
	})
}

// Wait waits until all have ended, and returns why some have before the context of their
// streams did.
func (w *Watches) Wait() map[string]uint64 {
	w.reading.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.errors)
}

// Watch begins watches on a client's connection, each on a stream of its own, and returns
// once all of them tell of what is written from then on.
func (k *KV) Watch(ctx context.Context, w *Watches, client int, of WatchedKeys) error {
	var reqs []*kvpb.WatchRequest
	for _, key := range of.Keys {
		reqs = append(reqs, &kvpb.WatchRequest{Key: key})
	}
	for range of.Prefixes {
		reqs = append(reqs, &kvpb.WatchRequest{Prefix: of.Prefix})
	}
	for _, req := range reqs {
		s, err := k.stub(client).Watch(ctx, req)
		if err != nil {
			return fmt.Errorf("opening a watch: %w", err)
		}
		if _, err := s.Recv(); err != nil { // the first response has no events
			return fmt.Errorf("opening a watch: %w", err)
		}
		w.Go(ctx, func() error {
			for {
				resp, err := s.Recv()
				if err != nil {
					return err
				}
				for _, e := range resp.Events {
					w.Event(e.Value)
				}
			}
		})
	}
	return nil
}
