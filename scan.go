// Scan: all keys of a range as they were at one moment, on a stream.

package main

import (
	"cmp"
	"context"
	"math"
	"sync"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

const (
	// maxScans bounds the Scans of a node. Each has two goroutines, and scanBytes or one item,
	// up to twice, in memory. A principal may have half of them, for one that reads slowly keeps
	// its Scans for long; without TLS there is one principal, which may have all.
	maxScans = 32
	// scanBytes is the keys and values of one response, unless a single item has more.
	scanBytes = 64 << 10
)

var errTooManyScans = apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED,
	"this node runs as many Scans as it may, in all or for this caller")

// runningScans are the Scans of a node. Any goroutine may call its methods.
type runningScans struct {
	limit int // maxScans, or less with little memory; constant

	mu    sync.Mutex
	count int
	of    map[principal]int
}

// begin counts a Scan until end; false: it is one too many.
func (r *runningScans) begin(p principal) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	most := cmp.Or(r.limit, maxScans)
	share := most / 2
	if p.role == roleAnyone {
		share = most
	}
	if r.count >= most || r.of[p] >= share {
		return false
	}
	if r.of == nil {
		r.of = map[principal]int{}
	}
	r.count++
	r.of[p]++
	return true
}

func (r *runningScans) end(p principal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count--
	r.of[p]--
	if r.of[p] == 0 {
		delete(r.of, p)
	}
}

// running is how many Scans run.
func (r *runningScans) running() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count
}

// Scan implements KVService. It gives up a caller who does not read.
func (s *server) Scan(req *kvpb.ScanRequest, stream kvpb.KVService_ScanServer) error {
	if err := s.scan(req, stream); err != nil {
		return toStatus(err, true)
	}
	return nil
}

func (s *server) scan(req *kvpb.ScanRequest, stream kvpb.KVService_ScanServer) error {
	if err := checkRange(req.Prefix, req.Start, req.End); err != nil {
		return err
	}
	if hasUnknownFields(req) {
		return errUnknownField
	}
	soon, stop := beforeDeadline(stream.Context())
	defer stop()
	if err := s.awaitRead(soon, req.Local, req.MinVersion); err != nil {
		return err
	}
	who := callerOf(stream.Context())
	if !s.scans.begin(who) {
		return errTooManyScans
	}
	defer s.scans.end(who)
	v, err := s.n.store.openKeys()
	if err != nil {
		return err
	}
	defer v.close()
	_ = stream.SetHeader(*s.leaderMD.Load()) // fails only if the call has ended
	return s.serveReader(stream, func(_ context.Context, sends func()) error {
		return sendScan(v, req, func(resp *kvpb.ScanResponse) error {
			sends()
			return stream.Send(resp)
		})
	})
}

// sendScan sends what a Scan shows of a view.
func sendScan(v *view, req *kvpb.ScanRequest, send func(*kvpb.ScanResponse) error) error {
	if err := send(&kvpb.ScanResponse{ClusterId: v.clusterID, Version: v.version}); err != nil {
		return err
	}
	r := rangeOf(req.Prefix, req.Start, req.End)
	for {
		items, more, err := v.page(r, math.MaxInt, scanBytes)
		if err != nil {
			return err
		}
		if len(items) == 0 {
			return nil
		}
		if err := send(&kvpb.ScanResponse{Items: keyValues(items, req.KeysOnly)}); err != nil {
			return err
		}
		if !more {
			return nil
		}
		r = r.after(items[len(items)-1].key)
	}
}
