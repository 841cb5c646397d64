package rkv

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// tryTimeout bounds one try of a call: a node says after 2 s that there is no leader, and
// finding a new one takes about one.
const tryTimeout = 5 * time.Second

// repeat makes a call until it succeeds, fails for good, or ctx ends. The call has to be a read,
// an OpenSession, or a write with a request ID, the same one in every try: these may be sent
// again after whatever UNAVAILABLE or DEADLINE_EXCEEDED.
//
// unknown is whether a try that has failed may have been applied, or may be applied later.
func repeat(ctx context.Context, call func(context.Context) error) (unknown bool, err error) {
	pause := pauses{first: 200 * time.Millisecond, longest: time.Second}
	for {
		try, cancel := context.WithTimeout(ctx, tryTimeout)
		err := call(try)
		cancel()
		if err == nil {
			return false, nil
		}
		if mayBeApplied(err) {
			unknown = true
		}
		if !maySendAgain(err) {
			return unknown, err
		}
		if !pause.wait(ctx, err) {
			return unknown, err // which says more than ctx.Err
		}
	}
}

// maySendAgain reports whether a call that ended so may be sent again, soon and as it is.
func maySendAgain(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		return true
	case codes.ResourceExhausted:
		return reason(err) == "OVERLOADED" // and not QUOTA: that needs somebody who makes room
	}
	return false
}

// mayBeApplied reports whether a write that ended so may have been applied all the same.
func mayBeApplied(err error) bool {
	if reason := reason(err); reason != "" {
		return reason == "OUTCOME_UNKNOWN"
	}
	// The error is gRPC's. Others than these it gives before a write is applied.
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Internal, codes.Unknown:
		return true
	}
	return false
}

// reason is what a node says of its error; empty: the error is none of a node's.
func reason(err error) string {
	for _, detail := range status.Convert(err).Details() {
		info, ok := detail.(*errdetails.ErrorInfo)
		if ok && info.Domain == "raftkv.v1" {
			return info.Reason
		}
	}
	return ""
}

// retryDelay is how long a node asks to wait; 0: it does not say.
func retryDelay(err error) time.Duration {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.RetryDelay.AsDuration()
		}
	}
	return 0
}

// pauses are those between the tries of one call. Each is random, up to a limit that doubles:
// clients that a node has failed at one moment do not all come back at one moment.
type pauses struct {
	first, longest time.Duration // the longest that the first one may be, and that any may be
	limit          time.Duration // of the last one
}

// wait makes the pause after an error, or what the node asks for if that is longer. It reports
// whether there is time left.
func (p *pauses) wait(ctx context.Context, err error) bool {
	p.limit = min(max(2*p.limit, p.first), p.longest)
	timer := time.NewTimer(max(rand.N(p.limit), retryDelay(err)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// reset has the next pause be a first one.
func (p *pauses) reset() { p.limit = 0 }
