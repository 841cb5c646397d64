package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"raft-key-value/kvpb"
)

// TestRoomTurns: it is the turn of the connection that has least, however many wait before
// it, and none has more than its share.
func TestRoomTurns(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		var looks atomic.Int32 // those who wait look, each in a goroutine of its own
		r := newRoom(roomLimits{4, 3, 3}, func() { looks.Add(1) })
		greedy, modest := sharer{conn: &limitedConn{}}, sharer{conn: &limitedConn{}}
		got := make(chan sharer, 10)
		wait := func(c sharer) {
			if err := r.take(t.Context(), c, 1); err != nil {
				t.Error(err)
			}
			got <- c
		}
		for range 6 {
			go wait(greedy)
		}
		synctest.Wait()
		if len(got) != 3 {
			t.Fatalf("one connection has %d of 4 places, its share is 3", len(got))
		}
		if !r.tryTake(modest, 1) || r.tryTake(modest, 1) {
			t.Error("another has not got the place that is left, or one more")
		}
		go wait(modest)
		synctest.Wait()
		for range 3 {
			<-got
		}
		r.release(greedy, 1)
		synctest.Wait()
		if len(got) != 1 || <-got != modest {
			t.Error("it was the turn of the connection that has less")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*roomTick/2)
		defer cancel()
		if err := r.take(ctx, modest, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("there was no room: %v", err)
		}
		if looks.Load() == 0 {
			t.Error("nobody looks for connections that stall while others wait")
		}
		r.release(modest, 2)
		synctest.Wait()
		for range 2 {
			r.release(greedy, 1)
		}
		synctest.Wait()
		for range 3 {
			r.release(greedy, 1)
		}
		if r.used != 0 || len(r.holders) != 0 {
			t.Errorf("%d are used, by %d connections, when all was given back", r.used, len(r.holders))
		}
	})
}

// TestRoomIsLeft: once half of a room is taken, a sharer gets no more than the late share, and
// waits if it has that, though there is room. Others find some then. A connection's streams
// take nothing from its calls.
func TestRoomIsLeft(t *testing.T) {
	r := newRoom(roomLimits{all: 16, share: 6, late: 2}, func() {})
	takes := func(s sharer) int {
		n := 0
		for r.tryTake(s, 1) {
			n++
		}
		return n
	}
	streams := sharer{conn: &limitedConn{}, streams: true}
	calls := sharer{conn: streams.conn}
	for i, want := range []int{6, 2, 2} {
		s := []sharer{streams, calls, {conn: &limitedConn{}}}[i]
		if got := takes(s); got != want {
			t.Errorf("sharer %d has got %d places, want %d", i, got, want)
		}
	}
	withFakeClock(t, func(t *testing.T) {
		got := false
		go func() { got = r.take(t.Context(), streams, 1) == nil }()
		synctest.Wait()
		if got {
			t.Error("who has more than the late share has got one more")
		}
		if !r.tryTake(sharer{conn: &limitedConn{}}, 3) {
			t.Error("who has nothing has not got one amount, for somebody waits who has a lot")
		}
		r.release(streams, 6)
		synctest.Wait()
		if !got {
			t.Error("it waits, though less than half is taken")
		}
	})
}

// TestRoomIsNotOvertaken: while somebody waits whose turn it is, others take nothing, though what
// they want is there: a large amount would never be.
func TestRoomIsNotOvertaken(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		r := newRoom(roomLimits{all: 10, share: 10, late: 10}, func() {})
		has, waits, comes := sharer{conn: &limitedConn{}}, sharer{conn: &limitedConn{}}, sharer{conn: &limitedConn{}}
		if !r.tryTake(has, 8) {
			t.Fatal("there is no room in an empty one")
		}
		got := false
		go func() { got = r.take(t.Context(), waits, 5) == nil }()
		synctest.Wait()
		if r.tryTake(comes, 1) {
			t.Error("who comes later has overtaken who waits")
		}
		r.release(has, 8)
		synctest.Wait()
		if !got || !r.tryTake(comes, 1) {
			t.Errorf("there is room for both: %v", got)
		}
	})
}

// TestArrivalsYield: over the limit, the oldest request ends of the connection that has most,
// and what has ended counts no more.
func TestArrivalsYield(t *testing.T) {
	as := newArrivals(100)
	yielded := map[string]bool{}
	begin := func(c *limitedConn, name string, bytes int) *arrival {
		return as.begin(c, bytes, func(error) { yielded[name] = true })
	}
	large, small := &limitedConn{}, &limitedConn{}
	first := begin(small, "small", 20)
	begin(large, "oldest", 30)
	last := begin(large, "newer", 30)
	as.end(begin(small, "ended", 20))
	if len(yielded) != 0 {
		t.Fatalf("within the limit, %v have yielded", yielded)
	}
	begin(small, "last", 30)
	if len(yielded) != 1 || !yielded["oldest"] || as.yielded != 1 {
		t.Errorf("%v have yielded, %d are counted", yielded, as.yielded)
	}
	as.end(first)
	as.end(last)
	as.end(last)
	if as.bytes != 30 || len(as.of) != 1 {
		t.Errorf("%d bytes of %d connections are on their way", as.bytes, len(as.of))
	}
}

// alteredStream is gRPC's stream as another version of it might have it.
type alteredStream struct {
	grpc.ServerTransportStream
	rest []byte
}

func (s *alteredStream) ReadMessageHeader(header []byte) error {
	if len(s.rest) == 0 {
		return io.EOF
	}
	s.rest = s.rest[copy(header, s.rest):]
	return nil
}

func (s *alteredStream) Read(n int) (mem.BufferSlice, error) {
	b := s.rest[:n]
	s.rest = s.rest[n:]
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// cutStream has the header of a message of so many bytes, and all of these but the last.
type cutStream struct{ length, sent int }

func (s *cutStream) ReadMessageHeader(header []byte) error {
	binary.BigEndian.PutUint32(header[1:], uint32(s.length))
	return nil
}

func (s *cutStream) Read(n int) (mem.BufferSlice, error) {
	if s.sent+n >= s.length {
		return nil, io.EOF
	}
	s.sent += n
	return mem.BufferSlice{cutContent[:n]}, nil
}

var cutContent = mem.SliceBuffer(make([]byte, arrivalChunk))

// TestIncompleteRequestsAreNoGarbage: of messages that lack a byte, what they took is used again.
func TestIncompleteRequestsAreNoGarbage(t *testing.T) {
	const length = maxValueBytes
	const many = 200
	r := &requestReader{arrivals: newArrivals(maxArrivingBytes), conn: &limitedConn{}, call: newCallContext(t.Context()), limit: length}
	defer r.call.end(nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range many {
		r.stream = &cutStream{length: length}
		if _, _, err := r.next(); status.Code(err) != codes.Internal {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	// Others allocate meanwhile, and a collection, as the race detector, drops some of what is kept.
	most := many * length / 2
	if took := after.TotalAlloc - before.TotalAlloc; took > uint64(most) {
		t.Errorf("%d messages of %d bytes that lack one have taken %d bytes", many, length, took)
	}
}

// TestIncompleteBytes: a message counts as the blocks that it takes, and what gRPC has of it unread.
func TestIncompleteBytes(t *testing.T) {
	const unread = frameOverhead * arrivalChunk
	for length, want := range map[int]int{
		0: 0, 1: 1 + frameOverhead, arrivalChunk: arrivalChunk + unread, arrivalChunk + 1: blockBytes + unread,
		blockBytes: blockBytes + unread, blockBytes + 1: 2*blockBytes + unread,
	} {
		if got := incompleteBytes(length); got != want {
			t.Errorf("a message of %d bytes: %d, want %d", length, got, want)
		}
	}
}

// TestMessageOfBlocks: a message is what was sent, however many blocks it takes and however it
// comes, and is not overwritten by the next one.
func TestMessageOfBlocks(t *testing.T) {
	t.Parallel()
	r := &requestReader{arrivals: newArrivals(maxArrivingBytes), conn: &limitedConn{}, call: newCallContext(t.Context()), limit: maxValueBytes}
	defer r.call.end(nil)
	content := make([]byte, 5*blockBytes)
	rand.NewChaCha8([32]byte{}).Read(content)
	got := map[int][]byte{}
	for _, length := range []int{0, 1, blockBytes - 1, blockBytes, blockBytes + 1, 3 * blockBytes, 5*blockBytes - 1} {
		sent := append([]byte{0, 0, 0, 0, 0}, content[:length]...)
		binary.BigEndian.PutUint32(sent[1:], uint32(length))
		r.stream = &alteredStream{rest: sent}
		m, a, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		r.arrivals.end(a)
		got[length] = m
	}
	for length, m := range got {
		if !bytes.Equal(m, content[:length]) {
			t.Errorf("of %d bytes, others came", length)
		}
	}
}

// TestTransport: requests can be read from the streams of this version of gRPC; of one by which
// they cannot, the error says why.
func TestTransport(t *testing.T) {
	if err := checkTransport(canReadRequest); err != nil {
		t.Error(err)
	}
	broken := errors.New("broken")
	err := checkTransport(func(grpc.ServerTransportStream, string) error { return broken })
	if !errors.Is(err, broken) {
		t.Errorf("nobody has looked at a stream: %v", err)
	}
	stream := func(sent string) *alteredStream { return &alteredStream{rest: []byte(sent)} }
	if err := canReadRequest(stream("\x00\x00\x00\x00\x01x"), "x"); err != nil {
		t.Error(err)
	}
	for hint, altered := range map[string]grpc.ServerTransportStream{
		"lacks ReadMessageHeader":    struct{ grpc.ServerTransportStream }{},
		`"x" was sent, "y" was read`: stream("\x00\x00\x00\x00\x01y"),
		"larger than max":            stream("\x00\x01\x00\x00\x00x"), // of another order of bytes
	} {
		err := canReadRequest(altered, "x")
		if err == nil || !strings.Contains(err.Error(), hint) {
			t.Errorf("want an error with %q: %v", hint, err)
		}
	}
}

// TestRunningCalls: a node and a connection have their limits, and when half of all run, a
// connection has a lower one.
func TestRunningCalls(t *testing.T) {
	r := &runningCalls{limit: 8, share: 6, late: 2}
	begin := func(c *limitedConn) int {
		n := 0
		for r.begin(c) {
			n++
		}
		return n
	}
	if n := begin(&limitedConn{}); n != 4 {
		t.Errorf("the first connection has %d calls", n)
	}
	second := &limitedConn{}
	if n := begin(second); n != 2 {
		t.Errorf("when half of all run, a connection has %d calls", n)
	}
	r.end(second)
	if n := begin(second); n != 1 {
		t.Errorf("when one has ended, %d more begin", n)
	}
	if n := begin(&limitedConn{}) + begin(&limitedConn{}); n != 2 {
		t.Errorf("%d calls more than a node may have", n-2)
	}
	few := &runningCalls{limit: 100, share: 3, late: 2}
	alone := &limitedConn{}
	for few.begin(alone) && alone.running < 10 {
	}
	if alone.running != 3 {
		t.Errorf("a connection that may have 3 calls has %d", alone.running)
	}
}

// accepted makes connections of a limiter.
func accepted(t *testing.T, many int) []*limitedConn {
	t.Helper()
	l := newLimiter(&refusing{left: many}, wide, nil, quiet())
	var conns []*limitedConn
	for range many {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		conns = append(conns, c.(*limitedConn))
	}
	return conns
}

// TestAnswersUntaken: answers count by their size until they are written, their connection is
// closed, or gRPC has lost their buffer.
func TestAnswersUntaken(t *testing.T) {
	c := accepted(t, 1)[0]
	as := c.l.answers
	admit := func(bytes int) *answerPool {
		t.Helper()
		a, err := as.admit(t.Context(), sharer{conn: c}, bytes)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	want := func(what string, large, small int) {
		t.Helper()
		if as.large.used != large || as.small.used != small {
			t.Errorf("%s: %d large ones and %d bytes of small ones", what, as.large.used, as.small.used)
		}
	}
	large := admit(smallAnswer + 1)
	small := admit(smallAnswer)
	want("one of each", 1, smallAnswer)
	large.fit(2000)
	small.fit(3000)
	want("both have become small", 0, 5000)
	large.Put(nil)
	large.Put(nil)
	want("one is written", 0, 3000)
	admit(maxValueBytes)
	want("one more", 1, 3000)
	_ = c.Close()
	want("the connection is closed", 0, 0)
	small.Put(nil)
	if _, err := as.admit(t.Context(), sharer{conn: c}, 2000); !errors.Is(err, errOverloaded) {
		t.Errorf("an answer on a connection that is closed: %v", err)
	}
	want("nobody's", 0, 0)
}

// TestStalledIsClosed: while others wait, a connection is closed that has not taken an answer
// for long. One that takes its answers stays, and so does one for which nobody waits.
func TestStalledIsClosed(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		// Two connections have half of the places, and each of the others one, but the last.
		conns := accepted(t, 2+largeAnswers/2+1)
		as := conns[0].l.answers
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		take := func(c *limitedConn) *answerPool {
			a, err := as.admit(ctx, sharer{conn: c}, maxValueBytes)
			if err != nil {
				t.Error(err)
			}
			return a
		}
		last, reads := conns[len(conns)-1], conns[len(conns)-2]
		for range connLargeAnswers {
			take(conns[0])
			take(conns[1])
		}
		for _, c := range conns[2 : len(conns)-2] {
			take(c)
		}
		time.Sleep(10 * stallTimeout)
		if len(reads.l.conns) != len(conns) {
			t.Fatal("a connection was closed for nobody")
		}
		take(reads)
		take(last)
		if !reads.l.conns[reads] || !reads.l.conns[last] || len(reads.l.conns) != 2 {
			t.Errorf("%d connections are open", len(reads.l.conns))
		}
		closed, waited := reads.l.counts.stalled.Load(), as.large.waited.Load()
		if closed != uint64(len(conns)-2) || waited == 0 {
			t.Errorf("of those that were closed, %d are counted, and %d have waited", closed, waited)
		}
		for _, c := range conns {
			_ = c.Close()
		}
	})
}

// TestWaitingGetCopiesNothing: a Get that waits for room has no copy of the value,
// or a thousand of them would have a thousand.
func TestWaitingGetCopiesNothing(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		c := accepted(t, 1)[0]
		ctx := grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: c.RemoteAddr()})
		s := &server{n: turnNode()}
		s.n.store.clusterID = 1
		s.n.store.tree.set([]byte("k"), item{make([]byte, maxValueBytes), 1})
		var answers []any // that nobody has taken: the collector gives back what is lost
		defer func() { runtime.KeepAlive(answers) }()
		get := func() error {
			ctx, cancel := context.WithTimeout(ctx, time.Second/2)
			defer cancel()
			resp, err := s.answer(ctx, &kvpb.GetRequest{Key: "k", Local: true}, func(ctx context.Context, req any) (any, error) {
				return s.Get(ctx, req.(*kvpb.GetRequest))
			})
			answers = append(answers, resp)
			return err
		}
		for range connLargeAnswers {
			if err := get(); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		n := allocated(func() { err = get() })
		if !errors.Is(err, context.DeadlineExceeded) || n > maxValueBytes/2 {
			t.Errorf("it allocates %d bytes and ends with: %v", n, err)
		}
		_ = c.Close()
	})
}

// TestAnswerThatGrows: an answer that has become larger while it waited for room has room for what
// it is, not for what it was.
func TestAnswerThatGrows(t *testing.T) {
	const was = 2 * uncountedAnswer
	for _, is := range []int{smallAnswer / 2, maxValueBytes} {
		c := accepted(t, 1)[0]
		as := c.l.answers
		ctx := grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: c.RemoteAddr()})
		resp := &kvpb.GetResponse{Value: make([]byte, is)}
		answer, err := answerWhole(ctx, was, func() (any, error) { return resp, nil })
		if err != nil {
			t.Fatal(err)
		}
		large, small := 0, len(answer.(*encoded).b)
		if is > smallAnswer {
			large, small = 1, 0
		}
		if as.large.used != large || as.small.used != small {
			t.Errorf("an answer of %d bytes has room for %d large ones and %d bytes", is, as.large.used, as.small.used)
		}
	}
}

// TestPipelineIsReadNoFurther: while enough of a stream is not answered, no more is read of it.
func TestPipelineIsReadNoFurther(t *testing.T) {
	for name, fill := range map[string]func(p *pipeline){
		"operations": func(p *pipeline) { p.calls.Store(maxPipelineCalls) },
		"bytes":      func(p *pipeline) { p.bytes.Store(maxPipelineBytes) },
		"requests": func(p *pipeline) {
			for range maxQueuedRequests {
				p.requests <- nil
			}
		},
	} {
		p := &pipeline{requests: make(chan *pipelineRequest, maxQueuedRequests)}
		if !p.mayRead() {
			t.Errorf("%s: an idle stream is not read", name)
		}
		fill(p)
		if p.mayRead() {
			t.Errorf("%s: it is read on", name)
		}
	}
}

// TestUnaryCallsGoFirst: a proposal has the write of a unary call before those of Pipelines that
// came earlier, and less of these while unary calls come.
func TestUnaryCallsGoFirst(t *testing.T) {
	c := callsInFlight{}
	add := func(many, bytes int, request *pipelineRequest) (last *call) {
		for range many {
			last = &call{write: make([]byte, bytes), request: request, done: make(chan outcome, 1)}
			c.add(last, 0)
		}
		return last
	}
	const many = 2 * maxSharedWrites
	pipelined := &pipelineRequest{}
	add(many, 10, pipelined)
	if p := c.newProposal(1, programLevel); len(p.calls) != many {
		t.Errorf("without unary calls, a proposal has %d writes", len(p.calls))
	}
	add(20, maxSharedLoad/4, pipelined)
	unary := add(1, 10, nil)
	p := c.newProposal(1, programLevel)
	if p.calls[0] != unary || len(p.calls) != 1+3 {
		t.Errorf("a proposal has %d writes; the unary call's is first: %v", len(p.calls), p.calls[0] == unary)
	}
	c.loads = nil
	add(many, 10, pipelined)
	if p := c.newProposal(1, programLevel); len(p.calls) != maxSharedWrites {
		t.Errorf("soon after a unary call, a proposal has %d small writes", len(p.calls))
	}
	add(20, maxEntryBytes/16-4, nil)
	p = c.newProposal(1, programLevel)
	if last := p.calls[len(p.calls)-1]; last.request == nil {
		t.Error("unary calls leave nothing to Pipelines")
	}
}

// TestUnaryCallsAreExpected: proposals leave room for the next unary call until about as much
// after the last one as that was after the one before, and not for long after a single one.
func TestUnaryCallsAreExpected(t *testing.T) {
	c := callsInFlight{}
	const bytes = maxSharedLoad/8 - 4 // as many fit as may be sent with unary calls
	isShared := func() bool {
		c.loads = nil
		for range 9 {
			c.add(&call{write: make([]byte, bytes), request: &pipelineRequest{}}, 0)
		}
		return len(c.newProposal(1, programLevel).calls) <= 8
	}
	propose := func(many int) (shared int) {
		for range many {
			if isShared() {
				shared++
			}
		}
		return shared
	}
	unary := func() {
		c.add(&call{done: make(chan outcome, 1)}, 0) // a read
	}
	const soon = sharedBytes / maxSharedLoad
	propose(longestGap/maxSharedLoad + 1)
	unary()
	if n := propose(longestGap/maxSharedLoad + 1); n != soon {
		t.Errorf("after a single call, %d proposals leave room", n)
	}
	unary()
	unary()
	if n := propose(100); n != soon {
		t.Errorf("after two calls at once, %d proposals leave room", n)
	}
	unary()
	unary()
	if n := propose(100); n != 100 {
		t.Errorf("only %d of 100 proposals leave room for a call that comes each time", n)
	}
	unary()
	if n := propose(1000); n < 200 || n > 500 {
		t.Errorf("when calls come no more, %d proposals leave room", n)
	}
}

// TestLargeLoadsTakeTurns: a Pipeline's write that is too large to be in one proposal with those
// of unary calls is in the second, however many of them come.
func TestLargeLoadsTakeTurns(t *testing.T) {
	c := callsInFlight{}
	load := &call{write: make([]byte, maxWriteBytes), request: &pipelineRequest{}}
	c.add(load, 0)
	unaryToo := false
	for i := range 2 {
		for range 100 {
			c.add(&call{write: make([]byte, 100), done: make(chan outcome, 1)}, 0)
		}
		p := c.newProposal(1, programLevel)
		if hasLoad := slices.Contains(p.calls, load); hasLoad != (i == 1) {
			t.Errorf("proposal %d has it: %v", i, hasLoad)
		}
		unaryToo = unaryToo || len(p.calls) == 100
	}
	if !unaryToo {
		t.Error("it goes before unary calls")
	}
	if c.loadFirst {
		t.Error("the next proposal begins with a Pipeline's write, too")
	}
	if p := c.newProposal(1, programLevel); len(p.calls) != 100 {
		t.Errorf("the third has %d writes", len(p.calls))
	}
}

// TestResultsFit: what is reserved for results is enough for them, and small for those of writes.
func TestResultsFit(t *testing.T) {
	largest := result{version: 1<<53 - 1, found: true, compareFailed: true}
	s := &server{n: turnNode()}
	for _, kind := range []protowire.Number{opSet, opDelete, opNewSession} {
		o := operation{kind: kind, session: 1<<64 - 1}
		if kind != opNewSession {
			o.key = []byte("k")
		}
		r := &pipelineRequest{ops: slices.Repeat([]operation{o}, 500), calls: make([]call, 500)}
		for i := range r.calls {
			r.calls[i].outcome.result = largest
		}
		b, next := s.appendResults(nil, r, 0)
		if next != 500 || len(b) > r.mostOf(0) || r.mostOf(0) > smallAnswer {
			t.Errorf("operation %d: %d results are %d bytes, for which %d were reserved", kind, next, len(b), r.mostOf(0))
		}
		noLeader := fmt.Errorf("%w: %s", errNoLeader, strings.Repeat("x", 2*maxErrorBytes)) // it names many voters
		for _, err := range []error{errUnknownInTime, errOutcomeUnknown, noLeader, errReadOnly, errMalformed} {
			for _, many := range []int{10, 500} {
				r.ops, r.calls = r.ops[:many], r.calls[:many]
				for i := range r.calls {
					r.ops[i].hasID = true
					r.calls[i].outcome.err = err
				}
				b, _ = s.appendResults(nil, r, 0)
				if len(b) > r.mostOf(0) {
					t.Errorf("operation %d: %d errors are %d bytes, for which %d were reserved: %v",
						kind, many, len(b), r.mostOf(0), beginning(err.Error(), 50))
				}
				r.ops, r.calls = r.ops[:500], r.calls[:500]
			}
		}
	}
}
