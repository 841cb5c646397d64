package rkv

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"raft-key-value/kvpb"
)

// ErrOutcomeUnknown is in the error of a write that may have been applied, or may be applied
// later: what became of it, the key's value tells.
var ErrOutcomeUnknown = errors.New("the outcome of the write is unknown")

// Session makes writes that take effect once, however often they are sent. It makes one at a
// time. A program that wants many at a time opens several sessions: a session could have up to
// 1,023 in flight, but none may lag behind the newest by more.
type Session struct {
	client *Client

	mu       sync.Mutex
	number   uint64 // as OpenSession answered it; 0: it is not open
	sequence uint64 // of the last write
}

// NewSession makes a session, which the first write opens.
func (c *Client) NewSession() *Session { return &Session{client: c} }

// Condition says when a Set is to take effect.
type Condition struct {
	version *uint64 // that the key has to have; nil: whichever
}

// Always has a Set take effect whatever the key has.
func Always() Condition { return Condition{} }

// IfVersion has a Set take effect only if the key has this version; 0: only if it is absent.
func IfVersion(version uint64) Condition { return Condition{version: &version} }

// Set writes a key, until ctx ends. It returns the version of the write, and false if the
// condition was not met: then it is the version that the key has.
//
// If several tries were needed, the answer is that of the one which was applied. Without the
// request ID, a compare-and-set whose first answer was lost would find its own write there.
func (s *Session) Set(ctx context.Context, key string, value []byte, when Condition) (version uint64, done bool, err error) {
	var resp *kvpb.SetResponse
	err = s.write(ctx, func(ctx context.Context, id *kvpb.RequestId) (err error) {
		resp, err = s.client.kv.Set(ctx, &kvpb.SetRequest{
			Key:             key,
			Value:           value,
			ExpectedVersion: when.version,
			RequestId:       id,
		})
		return err
	})
	return resp.GetVersion(), err == nil && !resp.GetCompareFailed(), err
}

// Delete removes a key. It reports whether the key was there.
func (s *Session) Delete(ctx context.Context, key string) (deleted bool, err error) {
	var resp *kvpb.DeleteResponse
	err = s.write(ctx, func(ctx context.Context, id *kvpb.RequestId) (err error) {
		resp, err = s.client.kv.Delete(ctx, &kvpb.DeleteRequest{Key: key, RequestId: id})
		return err
	})
	return resp.GetDeleted(), err
}

// Update has a key's value changed by a function of it, as if nobody else wrote meanwhile.
// The function may be called several times.
func (s *Session) Update(ctx context.Context, key string, change func(old []byte) ([]byte, error)) (Value, error) {
	pause := pauses{first: 20 * time.Millisecond, longest: time.Second}
	for {
		old, err := s.client.Get(ctx, key)
		if err != nil {
			return Value{}, err
		}
		data, err := change(old.Data)
		if err != nil {
			return Value{}, err
		}
		version, done, err := s.Set(ctx, key, data, IfVersion(old.Version))
		if err != nil {
			return Value{}, err
		}
		if done {
			return Value{Data: data, Version: version}, nil
		}
		if !pause.wait(ctx, nil) { // for whoever was first may be about to write again
			return Value{}, ctx.Err()
		}
	}
}

// write makes a write under the next request ID, the same one in every try.
func (s *Session) write(ctx context.Context, try func(context.Context, *kvpb.RequestId) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.open(ctx); err != nil {
		return err
	}
	s.sequence++
	id := &kvpb.RequestId{Session: s.number, Sequence: s.sequence}
	unknown, err := repeat(ctx, func(ctx context.Context) error { return try(ctx, id) })
	if err == nil {
		return nil
	}
	switch reason(err) {
	case "SESSION_UNKNOWN", "SEQUENCE_TOO_OLD":
		// The cluster does not know any more what was applied under this ID.
		s.number = 0
		unknown = true
	case "SEQUENCE_TOO_FAR": // too many writes were given up, or refused for want of room
		s.number = 0
	}
	if unknown {
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
	}
	return err
}

// open opens the session, unless it is open. A session that nobody knows of does no harm, so
// OpenSession may be sent again.
func (s *Session) open(ctx context.Context) error {
	if s.number != 0 {
		return nil
	}
	var resp *kvpb.OpenSessionResponse
	_, err := repeat(ctx, func(ctx context.Context) (err error) {
		resp, err = s.client.kv.OpenSession(ctx, &kvpb.OpenSessionRequest{})
		return err
	})
	if err != nil {
		return err
	}
	s.number, s.sequence = resp.Session, 0
	return nil
}
