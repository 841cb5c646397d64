package load

import (
	"context"
	"io"

	"raft-key-value/kvpb"
)

// Range is the keys that start with a prefix; or, if that is empty, those from Start on and
// before End.
type Range struct{ Prefix, Start, End string }

// Page reads the first keys of a range, at most limit, and says how many it got.
func (k *KV) Page(ctx context.Context, client int, r Range, limit int) (keys int, err error) {
	req := &kvpb.ListRequest{Prefix: r.Prefix, Start: r.Start, End: r.End, Limit: uint32(limit)}
	resp, err := k.stub(client).List(ctx, req)
	return len(resp.GetItems()), err
}

// Scan reads all keys of a range as they were at one moment, and says how many there were.
func (k *KV) Scan(ctx context.Context, r Range) (keys int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := k.stub(0).Scan(ctx, &kvpb.ScanRequest{Prefix: r.Prefix, Start: r.Start, End: r.End})
	if err != nil {
		return 0, err
	}
	for {
		resp, err := s.Recv()
		if err == io.EOF {
			return keys, nil
		}
		if err != nil {
			return keys, err
		}
		keys += len(resp.Items)
	}
}

// DeleteRange deletes all keys of a range, and says how many there were.
func (k *KV) DeleteRange(ctx context.Context, r Range) (keys int, err error) {
	req := &kvpb.DeleteRangeRequest{Prefix: r.Prefix, Start: r.Start, End: r.End, RequestId: k.requestID(0)}
	resp, err := k.stub(0).DeleteRange(ctx, req)
	return int(resp.GetDeleted()), err
}
