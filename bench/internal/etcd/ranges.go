package etcd

import (
	"context"
	"io"

	"go.etcd.io/etcd/api/v3/etcdserverpb"

	"raft-key-value/bench/internal/load"
)

// ends are the first key of a range, and the one behind its last.
func ends(r load.Range) (start, end []byte) {
	if r.Prefix == "" {
		return []byte(r.Start), []byte(r.End)
	}
	end = []byte(r.Prefix) // ASCII: the last byte can be raised
	end[len(end)-1]++
	return []byte(r.Prefix), end
}

// Page reads the first keys of a range, at most limit, and says how many it got.
func (e *Cluster) Page(ctx context.Context, client int, r load.Range, limit int) (keys int, err error) {
	start, end := ends(r)
	req := &etcdserverpb.RangeRequest{Key: start, RangeEnd: end, Limit: int64(limit)}
	resp, err := e.stubs[client%len(e.stubs)].Range(ctx, req)
	return len(resp.GetKvs()), err
}

// Pages reads all keys of a range as they were at one moment, page by page, and says how many
// there were. Only the first page asks the leader: the others name its revision.
func (e *Cluster) Pages(ctx context.Context, r load.Range, limit int) (keys int, err error) {
	start, end := ends(r)
	req := &etcdserverpb.RangeRequest{Key: start, RangeEnd: end, Limit: int64(limit)}
	for {
		resp, err := e.stubs[0].Range(ctx, req)
		if err != nil {
			return keys, err
		}
		keys += len(resp.Kvs)
		if !resp.More || len(resp.Kvs) == 0 {
			return keys, nil
		}
		if !req.Serializable {
			req.Revision = resp.Header.Revision
			req.Serializable = true
		}
		req.Key = append(resp.Kvs[len(resp.Kvs)-1].Key, 0)
	}
}

// Stream reads all keys of a range as they were at one moment, on a stream, and says how many
// there were.
func (e *Cluster) Stream(ctx context.Context, r load.Range) (keys int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	start, end := ends(r)
	s, err := e.stubs[0].RangeStream(ctx, &etcdserverpb.RangeRequest{Key: start, RangeEnd: end})
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
		keys += len(resp.RangeResponse.GetKvs())
	}
}

// DeleteRange deletes all keys of a range, and says how many there were.
func (e *Cluster) DeleteRange(ctx context.Context, r load.Range) (keys int, err error) {
	start, end := ends(r)
	resp, err := e.stubs[0].DeleteRange(ctx, &etcdserverpb.DeleteRangeRequest{Key: start, RangeEnd: end})
	return int(resp.GetDeleted()), err
}
