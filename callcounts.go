// How many calls there were of each method, what they ended with, and how long they took.

package main

import (
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// operationCounts are the operations of Pipelines that were answered.
type operationCounts struct{ ok, failed atomic.Uint64 }

// numberOfCodes is how many codes gRPC has; they are counted from 0.
const numberOfCodes = codes.Unauthenticated + 1

// methodCounts are the calls of one method that have ended. Any goroutine may call its methods.
//
// The calls that have ended with OK are counted by how long they took, and the others by their
// code: how long these took says how long their callers wait. So a call that succeeds costs no
// third addition.
type methodCounts struct {
	name     string // of the method, with its service
	isUnary  bool
	seconds  *histogram                   // of calls with OK; nil: of a stream
	byCode   [numberOfCodes]atomic.Uint64 // all but OK of a unary method
	expected []codes.Code                 // that are told from the start
}

// The codes that are told from the start, of each method: a rate is of two values, so it misses
// the first call of a series that begins with it. They are those that the API gives; any other is
// told once there was one.
var (
	onlyOK      = []codes.Code{codes.OK}
	commonCodes = []codes.Code{
		codes.OK, codes.Canceled, codes.InvalidArgument, codes.DeadlineExceeded, codes.PermissionDenied,
		codes.ResourceExhausted, codes.FailedPrecondition, codes.Internal, codes.Unavailable,
	}
	kvCodes      = append([]codes.Code{codes.OutOfRange, codes.DataLoss}, commonCodes...)
	clusterCodes = append([]codes.Code{codes.NotFound, codes.AlreadyExists, codes.Aborted, codes.DataLoss}, commonCodes...)
)

func newMethodCounts(service, method string, isUnary bool) *methodCounts {
	m := &methodCounts{name: service + "/" + method, isUnary: isUnary, expected: onlyOK}
	switch "/" + service + "/" {
	case kvPrefix:
		m.expected = kvCodes
	case clusterPrefix:
		m.expected = clusterCodes
	}
	if isUnary {
		m.seconds = newTimes(100*time.Microsecond, 250*time.Microsecond, 500*time.Microsecond,
			time.Millisecond, 2500*time.Microsecond, 5*time.Millisecond, 10*time.Millisecond, 25*time.Millisecond,
			50*time.Millisecond, 100*time.Millisecond, 250*time.Millisecond, 500*time.Millisecond,
			time.Second, 2500*time.Millisecond, 5*time.Second, 10*time.Second)
	}
	return m
}

// ended counts a call that has ended with an error, or nil, and took so long.
func (m *methodCounts) ended(err error, took time.Duration) {
	if err == nil && m.isUnary {
		m.seconds.observeTime(took)
		return
	}
	m.note(err)
}

// note counts a call that has ended with an error, or nil, whose time says nothing: it is a
// stream, or was refused before it began.
func (m *methodCounts) note(err error) {
	code := status.Code(err)
	if code >= numberOfCodes {
		code = codes.Unknown // so gRPC tells it, too
	}
	m.byCode[code].Add(1)
}

// count is how many calls have ended with a code.
func (m *methodCounts) count(code codes.Code) uint64 {
	if code == codes.OK && m.isUnary {
		return m.seconds.count()
	}
	return m.byCode[code].Load()
}

// write writes how many calls of the method have ended with each code.
func (m *methodCounts) write(t *metricsText) {
	for code := range numberOfCodes {
		count := m.count(code)
		if count > 0 || slices.Contains(m.expected, code) {
			t.number(count, "method", m.name, "code", codeName(status.New(code, "")))
		}
	}
}
