// Benchmarks of the pieces. They measure; they never fail for being slow.

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// benchKey is a key of 16 bytes.
func benchKey(i uint64) string { return fmt.Sprintf("%016x", i) }

// filledStore is a store with one member and keys of 16 + 128 bytes.
func filledStore(keys int) *store {
	s := newStore()
	s.members[1] = &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}
	for i := range keys {
		v := make([]byte, 128)
		binary.BigEndian.PutUint64(v, uint64(i))
		s.set(benchKey(uint64(i)), item{v, uint64(i + 1)})
	}
	s.version = uint64(keys)
	return s
}

// BenchmarkSnapshotStall applies entries of 1,000 writes, in turn without a
// view and while a snapshot is being written from one, and reports the longest
// that an entry took in each case.
func BenchmarkSnapshotStall(b *testing.B) {
	for _, keys := range []int{1e6, 1e7} {
		b.Run(fmt.Sprintf("keys=%.0e", float64(keys)), func(b *testing.B) {
			s := filledStore(keys)
			rng := rand.New(rand.NewPCG(1, 2))
			batches := make([][]byte, 16)
			for i := range batches {
				batches[i] = benchBatch(rng, 1, keys, 1000)
			}
			apply := func(i int, longest *time.Duration) {
				start := time.Now()
				s.proposers[1] = 0
				if _, _, _, err := s.apply(batches[i%len(batches)]); err != nil {
					b.Fatal(err)
				}
				*longest = max(*longest, time.Since(start))
			}
			var without, with, open time.Duration
			for b.Loop() {
				start := time.Now()
				v := s.open()
				open = max(open, time.Since(start))
				written := make(chan error, 1)
				go func() { written <- v.writeTo(io.Discard) }()
				n := 0
				for done := false; !done; n++ {
					select {
					case err := <-written:
						if done = true; err != nil {
							b.Fatal(err)
						}
					default:
						apply(n, &with)
					}
				}
				v.close()
				for i := range n {
					apply(i, &without)
				}
			}
			b.ReportMetric(float64(without.Microseconds())/1000, "longest-without-ms")
			b.ReportMetric(float64(with.Microseconds())/1000, "longest-with-ms")
			b.ReportMetric(float64(open.Microseconds())/1000, "open-ms")
		})
	}
}

func benchBatch(rng *rand.Rand, sequence uint64, keys, writes int) []byte {
	batch := &kvpb.Batch{Proposer: 1, Sequence: sequence}
	for range writes {
		batch.Writes = append(batch.Writes, &kvpb.Write{Operation: &kvpb.Write_Set{Set: &kvpb.SetRequest{Key: benchKey(rng.Uint64N(uint64(keys))), Value: make([]byte, 128)}}})
	}
	data, err := proto.Marshal(batch)
	if err != nil {
		panic(err)
	}
	return data
}

// BenchmarkApply applies entries of 30 writes.
func BenchmarkApply(b *testing.B) {
	s := filledStore(1e5)
	data := benchBatch(rand.New(rand.NewPCG(1, 2)), 1, 1e5, 30)
	b.ReportAllocs()
	for b.Loop() {
		s.proposers[1] = 0
		if _, _, _, err := s.apply(data); err != nil {
			b.Fatal(err)
		}
	}
}
