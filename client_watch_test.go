// Tests of the sub-command watch, against fake nodes and real ones: what it prints, where it
// goes on, and what ends it.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

func (f *fakeNode) Watch(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
	if err := f.count(s.Context(), r); err != nil {
		return err
	}
	f.mu.Lock()
	watched := f.watched
	f.mu.Unlock()
	if watched != nil {
		return watched(r, s)
	}
	return tellAndWait()(r, s)
}

// tellAndWait tells of events, after a first response that says which version is before, and
// then waits for the end of the call.
func tellAndWait(events ...*kvpb.Event) func(*kvpb.WatchRequest, kvpb.KVService_WatchServer) error {
	return func(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
		if err := tellEvents(r, s, events...); err != nil {
			return err
		}
		<-s.Context().Done()
		return s.Context().Err()
	}
}

// tellEvents tells of events in one response. The last write before them is version 7.
func tellEvents(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer, events ...*kvpb.Event) error {
	version := uint64(7)
	if r.FromVersion > 0 {
		version = r.FromVersion - 1
	}
	if err := s.Send(&kvpb.WatchResponse{ClusterId: 10, Version: version}); err != nil {
		return err
	}
	if len(events) == 0 {
		return nil
	}
	return s.Send(&kvpb.WatchResponse{Version: events[len(events)-1].Version, Events: events})
}

func setEvent(key, value string, version uint64) *kvpb.Event {
	return &kvpb.Event{Key: key, Value: present([]byte(value)), Version: version}
}

func deleteEvent(key string, version uint64) *kvpb.Event {
	return &kvpb.Event{Key: key, Version: version}
}

// TestClientWatch: what it asks for, and prints.
func TestClientWatch(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv(endpointVariable, f.addr)
	f.do(func() {
		f.watched = tellAndWait(setEvent("a\t", "deleted", 8), setEvent("b", "", 9),
			deleteEvent("b", 10), deleteEvent("c", 10), setEvent("d", "v", 12))
	})
	lines := []string{"\"a\\t\"\t8\t\"deleted\"\n", "\"b\"\t9\t\"\"\n", "\"b\"\t10\tdeleted\n", "\"c\"\t10\tdeleted\n", "\"d\"\t12\t\"v\"\n"}
	for _, test := range []struct {
		args string
		sent *kvpb.WatchRequest
		out  []string
	}{
		{"--until-version 12", &kvpb.WatchRequest{}, lines},
		{"a --until-version 11", &kvpb.WatchRequest{Prefix: "a"}, lines[:4]},
		{"--key a --until-version 10", &kvpb.WatchRequest{Key: "a"}, lines[:4]},
		{"--start a --end b --until-version 8", &kvpb.WatchRequest{Start: "a", End: "b"}, lines[:1]},
		{"--start a --from-version 8 --until-version 9", &kvpb.WatchRequest{Start: "a", FromVersion: 8}, lines[:2]},
		{"--until-version 7", &kvpb.WatchRequest{}, nil},
		{"--until-version 12 -o json", &kvpb.WatchRequest{}, []string{
			`{"key":"a\t","value":"ZGVsZXRlZA==","version":"8"}` + "\n",
			`{"key":"b","value":"","version":"9"}` + "\n",
			`{"key":"b","version":"10"}` + "\n",
			`{"key":"c","version":"10"}` + "\n",
			`{"key":"d","value":"dg==","version":"12"}` + "\n",
		}},
	} {
		out, errs := runCommand(t, exitYes, "", append([]string{"watch"}, strings.Fields(test.args)...)...)
		wantText(t, test.args, out+errs, strings.Join(test.out, ""))
		if req, _ := f.take(); !proto.Equal(req, test.sent) {
			t.Errorf("%s: sent %v, want %v", test.args, req, test.sent)
		}
	}
	for args, want := range map[string]string{
		"a --key b":                          "key: it is not for a request that has prefix, start or end",
		"--key b --end c":                    "key: it is not for a request that has prefix, start or end",
		"a --start b":                        "prefix: it is not for a request that has start or end",
		"--start b --end a":                  "end: it is not after start",
		"--key":                              "key",
		"--key=":                             "it is empty",
		"--from-version -1":                  "want a whole number",
		"--until-version x":                  "want a whole number",
		"a b":                                "want: [PREFIX]",
		"--key " + "k\xff":                   "UTF-8",
		"--from-version 9 --until-version 8": "--until-version 8: it is before --from-version 9",
	} {
		_, errs := runCommand(t, exitUsage, "", append([]string{"watch"}, strings.Fields(args)...)...)
		wantPart(t, errs, want)
	}
	if _, n := f.take(); n > 0 {
		t.Errorf("%d calls were made", n)
	}
}

// TestClientWatchGoesOn: from the version after the last one that was told, in the same
// cluster, at the endpoint after the one that has failed, which stderr names.
func TestClientWatchGoesOn(t *testing.T) {
	t.Parallel()
	stopping := withResumePause(toStatus(errStopping, true))
	for name, broken := range map[string]error{
		"stopping":   stopping,
		"overloaded": apiError(codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED, "too many"),
		"compacted":  compacted(&compactedError{100}),
		"broken":     status.Error(codes.Unavailable, "broken"),
		"reset":      status.Error(codes.Internal, "reset"),
		"unknown":    status.Error(codes.Unknown, "unknown"),
		"cancelled":  status.Error(codes.Canceled, "cancelled"),
		"ended":      nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, second, third := newFakeNode(t), newFakeNode(t), newFakeNode(t)
			first.do(func() {
				first.watched = func(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
					if err := tellEvents(r, s, setEvent("k", "1", 8), setEvent("k", "2", 9)); err != nil {
						return err
					}
					return broken
				}
			})
			second.do(func() {
				second.watched = func(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
					if err := tellEvents(r, s, setEvent("k", "3", 20)); err != nil {
						return err
					}
					return stopping
				}
			})
			third.do(func() { third.watched = tellAndWait(setEvent("k", "4", 21)) })
			args := []string{"watch", "--until-version", "21", "--endpoints", first.addr + "," + second.addr + "," + third.addr}
			var out, errs bytes.Buffer
			if got := runClient(t.Context(), args, nil, &out, &errs); got != exitYes {
				t.Fatalf("exit status %d: %s", got, &errs)
			}
			wantText(t, "events", out.String(), "\"k\"\t8\t\"1\"\n\"k\"\t9\t\"2\"\n\"k\"\t20\t\"3\"\n\"k\"\t21\t\"4\"\n")
			for i, want := range []string{
				fmt.Sprintf("the watch goes on at %s, from version 10\n", second.addr),
				fmt.Sprintf("the watch goes on at %s, from version 21\n", third.addr),
			} {
				line := strings.SplitAfter(errs.String(), "\n")[i]
				wantPart(t, line, want)
				wantPart(t, line, "raft-key-value: warning: "+[]string{first.addr, second.addr}[i]+": ")
			}
			if n := strings.Count(errs.String(), "\n"); n != 2 {
				t.Errorf("stderr has %d lines: %s", n, &errs)
			}
			said := "the node has ended the watch without a reason"
			if broken != nil {
				said = status.Convert(broken).Message()
			}
			wantPart(t, errs.String(), said)
			for f, from := range map[*fakeNode]uint64{second: 10, third: 21} {
				want := &kvpb.WatchRequest{FromVersion: from, ClusterId: 10}
				if req, _ := f.take(); !proto.Equal(req, want) {
					t.Errorf("sent %v, want %v", req, want)
				}
			}
		})
	}
	// What no other endpoint would do otherwise ends it.
	for _, final := range []error{
		apiError(codes.PermissionDenied, kvpb.ErrorReason_ERROR_REASON_PERMISSION_DENIED, "denied"),
		status.Error(codes.Unimplemented, "unimplemented"),
	} {
		for _, isLate := range []bool{false, true} {
			first, second := newFakeNode(t), newFakeNode(t)
			first.do(func() {
				first.watched = func(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
					if isLate {
						_ = tellEvents(r, s)
					}
					return final
				}
			})
			_, errs := runCommand(t, exitNotDone, "", "watch", "--endpoints", first.addr+","+second.addr)
			wantPart(t, errs, status.Convert(final).Message())
			if _, n := second.take(); n > 0 {
				t.Errorf("the second endpoint was called after %v", final)
			}
		}
	}
}

// TestClientWatchHangs: a node that says nothing any more, or nothing at all, is left. One whose
// responses nobody takes for as long does not hang.
func TestClientWatchHangs(t *testing.T) {
	t.Parallel()
	silent := func(_ *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
		<-s.Context().Done()
		return s.Context().Err()
	}
	for name, hangs := range map[string]func(*kvpb.WatchRequest, kvpb.KVService_WatchServer) error{
		"from the first word": silent,
		"later":               tellAndWait(setEvent("k", "1", 8)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, second := newFakeNode(t), newFakeNode(t)
			first.do(func() { first.watched = hangs })
			second.do(func() { second.watched = tellAndWait(setEvent("k", "2", 9)) })
			out, errs := runWatch(t, exitYes, "--until-version", "9", "--endpoints", first.addr+","+second.addr)
			wantPart(t, out, "\"k\"\t9\t\"2\"\n")
			if name == "later" {
				wantPart(t, errs, first.addr+": no response in 5s")
			}
		})
	}
	t.Run("before the version", func(t *testing.T) {
		t.Parallel()
		f := newFakeNode(t)
		f.setMetrics(&kvpb.MetricsResponse{ClusterId: 10, Version: 7})
		f.do(func() { f.watched = silent })
		_, errs := runCommand(t, exitNotDone, "", "watch", "--from-version", "100", "--timeout", "7s", "--endpoints", f.addr)
		wantPart(t, errs, "it had version 7, and waits for version 99")
	})
	t.Run("slowly taken", func(t *testing.T) {
		t.Parallel()
		f := newFakeNode(t)
		taken := make(chan struct{})
		f.do(func() {
			f.watched = func(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
				if err := tellEvents(r, s, setEvent("k", "1", 8)); err != nil {
					return err
				}
				<-taken
				return tellAndWait(setEvent("k", "2", 9))(&kvpb.WatchRequest{FromVersion: 9}, s)
			}
		})
		out := &slowWriter{wait: func() { sleep(t.Context(), watchSilence+time.Second); close(taken) }}
		var errs bytes.Buffer
		args := []string{"watch", "--until-version", "9", "--endpoints", f.addr}
		if got := runClient(t.Context(), args, nil, out, &errs); got != exitYes || errs.Len() > 0 {
			t.Errorf("exit status %d: %s", got, &errs)
		}
	})
}

// runWatch is runCommand, but there may be warnings.
func runWatch(t *testing.T, want int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	if got := runClient(t.Context(), append([]string{"watch"}, args...), nil, &out, &errs); got != want {
		t.Errorf("%q: exit status %d, want %d: %s", args, got, want, &errs)
	}
	return out.String(), errs.String()
}

// TestClientWatchEnds: when no node knows any more what comes next. A node that does not know it
// is passed over while another one may.
func TestClientWatchEnds(t *testing.T) {
	t.Parallel()
	fails := func(err error) func(*fakeNode) {
		return func(f *fakeNode) { f.failWith(func(context.Context) error { return err }) }
	}
	old := fails(compacted(&compactedError{100}))
	other := fails(otherCluster(11))
	isElsewhere := func(f *fakeNode) { f.setMetrics(&kvpb.MetricsResponse{ClusterId: 11}) }
	isFresh := func(f *fakeNode) { f.setMetrics(&kvpb.MetricsResponse{}) }
	tells := func(f *fakeNode) { f.do(func() { f.watched = tellAndWait(setEvent("k", "v", 9)) }) }
	noLeader := apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER, "none leads")
	atFirst := func(err error) func(*fakeNode) { // and then it tells
		return func(f *fakeNode) {
			tells(f)
			calls := 0
			f.failWith(func(context.Context) error {
				calls++
				if calls == 1 {
					return err
				}
				return nil
			})
		}
	}
	const (
		compactedText = "what was written next is not known any more: see what is there by list -o json"
		otherText     = "the cluster is another one now, or was restored: see what is there by list -o json"
	)
	for name, test := range map[string]struct {
		nodes  []func(*fakeNode) // after the first one, which has told of version 8, and stops
		after  func(*fakeNode)   // what becomes of the first one
		exit   int
		reason string
		text   string
	}{
		"compacted":                  {[]func(*fakeNode){old, old}, old, exitNo, "COMPACTED", compactedText},
		"compacted here":             {[]func(*fakeNode){old, tells}, old, exitYes, "", ""},
		"compacted, and no leader":   {[]func(*fakeNode){old, atFirst(noLeader)}, old, exitYes, "", ""},
		"compacted, and a new one":   {[]func(*fakeNode){old, isFresh}, old, exitNo, "COMPACTED", compactedText},
		"compacted, or restored":     {[]func(*fakeNode){old, other}, old, exitNo, "COMPACTED", compactedText},
		"restored":                   {[]func(*fakeNode){other, isElsewhere}, isElsewhere, exitNo, "OTHER_CLUSTER", otherText},
		"restored, says the node":    {[]func(*fakeNode){other, other}, other, exitNo, "OTHER_CLUSTER", otherText},
		"another cluster's is there": {[]func(*fakeNode){isElsewhere, tells}, old, exitYes, "", ""},
		"another's, and no leader":   {[]func(*fakeNode){other, atFirst(noLeader)}, isElsewhere, exitYes, "", ""},
		"another's, and a new one":   {[]func(*fakeNode){other, isFresh}, isElsewhere, exitNotDone, "OTHER_CLUSTER", "in another cluster"},
		"another's, and none leads":  {[]func(*fakeNode){other, fails(noLeader)}, isElsewhere, exitNotDone, "NO_LEADER", "none leads"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := newFakeNode(t)
			first.do(func() {
				first.watched = func(r *kvpb.WatchRequest, s kvpb.KVService_WatchServer) error {
					if err := tellEvents(r, s, setEvent("k", "v", 8)); err != nil {
						return err
					}
					test.after(first)
					return toStatus(errStopping, true)
				}
			})
			endpoints := []string{first.addr}
			for _, becomes := range test.nodes {
				f := newFakeNode(t)
				becomes(f)
				endpoints = append(endpoints, f.addr)
			}
			timeout := "20s"
			if test.exit == exitNotDone {
				timeout = fullTimeout.String()
			}
			args := []string{"--until-version", "9", "-o", "json", "--timeout", timeout, "--endpoints", strings.Join(endpoints, ",")}
			_, errs := runWatch(t, test.exit, args...)
			if test.exit != exitYes {
				wantPart(t, errs, test.text)
				lines := strings.Split(strings.TrimSpace(errs), "\n")
				var e commandError
				if err := json.Unmarshal([]byte(lines[len(lines)-1]), &e); err != nil || e.Reason != test.reason {
					t.Errorf("the reason is %q, want %q: %v", e.Reason, test.reason, err)
				}
			}
		})
	}
}

// TestClientWatchIsInterrupted: that is how it ends, unless it was to come further.
func TestClientWatchIsInterrupted(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		exit int
		text string
	}{
		{nil, exitYes, ""},
		{[]string{"--until-version", "9"}, exitNotDone, "it was interrupted before all up to version 9 was told"},
	} {
		f := newFakeNode(t)
		f.do(func() { f.watched = tellAndWait(setEvent("k", "v", 8)) })
		ctx, interrupt := context.WithCancel(t.Context())
		out := &writeHook{then: interrupt}
		var errs bytes.Buffer
		args := append([]string{"watch", "--endpoints", f.addr}, test.args...)
		if got := runClient(ctx, args, nil, out, &errs); got != test.exit {
			t.Errorf("%q: exit status %d: %s", args, got, &errs)
		}
		wantPart(t, errs.String(), test.text)
		interrupt()
	}
	// While it looks for an endpoint:
	ctx, interrupt := context.WithCancel(t.Context())
	f := newFakeNode(t)
	f.failWith(func(context.Context) error { interrupt(); return toStatus(errNoLeader, true) })
	var errs bytes.Buffer
	if got := runClient(ctx, []string{"watch", "--endpoints", f.addr}, nil, io.Discard, &errs); got != exitYes {
		t.Errorf("exit status %d: %s", got, &errs)
	}
}

// writeHook does something after each write.
type writeHook struct{ then func() }

func (w *writeHook) Write(b []byte) (int, error) {
	w.then()
	return len(b), nil
}

// TestClientWatchIsNotPrinted: it does not go on at another endpoint when nobody takes the output.
func TestClientWatchIsNotPrinted(t *testing.T) {
	f := newFakeNode(t)
	f.do(func() { f.watched = tellAndWait(setEvent("k", "v", 8)) })
	full := errors.New("the disk is full")
	var errs bytes.Buffer
	if got := runClient(t.Context(), []string{"watch", "--endpoints", f.addr}, nil, failingWriter{full}, &errs); got != exitNotDone {
		t.Errorf("exit status %d", got)
	}
	wantPart(t, errs.String(), full.Error())
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// TestClientWatchPauses: as long as a node asks for.
func TestClientWatchPauses(t *testing.T) {
	f := newFakeNode(t)
	const asked = time.Hour
	f.failWith(func(context.Context) error {
		st, _ := status.New(codes.Unavailable, "later").WithDetails(retryIn(asked))
		return st.Err()
	})
	in, err := parseInvocation("watch", []string{"--endpoints", f.addr})
	if err != nil {
		t.Fatal(err)
	}
	w := &keyWatch{client: newClient(in, nil, io.Discard, io.Discard), req: in.watchRequest()}
	r := w.calls.newRound(t.Context())
	defer r.end()
	s, pause, isHopeless := w.openAt(t.Context(), r)
	if s != nil || pause != asked || isHopeless {
		t.Errorf("%v, it pauses for %v, hopeless %v", s, pause, isHopeless)
	}
}

// lockedBuffer is a buffer that goroutines may share.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestClientWatchesCluster: while leaders are killed and come back, each write is printed once, in
// order.
func TestClientWatchesCluster(t *testing.T) {
	c, _ := newDurable(t, 3)
	c.init(1, 2, 3)
	c.settled(1, 2, 3)
	addresses := map[uint64]string{}
	for id, n := range c.nodes {
		addresses[id] = n.address
	}
	begin := c.set(1, "other", "v")
	leader := c.settled(1, 2, 3)
	endpoints := []string{addresses[leader]} // which is killed first
	for id, address := range addresses {
		if id != leader {
			endpoints = append(endpoints, address)
		}
	}
	ctx, interrupt := context.WithCancel(c.ctx)
	defer interrupt()
	var out, errs lockedBuffer
	ended := make(chan int, 1)
	go func() {
		args := []string{"watch", "k", "--from-version", fmt.Sprint(begin), "--endpoints", strings.Join(endpoints, ",")}
		ended <- runClient(ctx, args, nil, &out, &errs)
	}()
	want := ""
	printed := func() {
		t.Helper()
		eventually(t, func() error {
			if out.String() != want {
				return fmt.Errorf("printed %q, want %q; %s", out.String(), want, errs.String())
			}
			return nil
		})
	}
	write := func(via uint64) {
		for i := range 5 {
			v := c.set(via, "k", fmt.Sprint(i))
			want += fmt.Sprintf("\"k\"\t%d\t\"%d\"\n", v, i)
			c.set(via, "other", "v")
		}
	}
	for range 2 {
		leader := c.settled(1, 2, 3)
		write(leader)
		printed()
		c.kill(leader)
		write(leader%3 + 1)
		printed()
		c.start(leader, addresses[leader])
	}
	interrupt()
	if got := <-ended; got != exitYes {
		t.Errorf("exit status %d: %s", got, errs.String())
	}
	wantPart(t, errs.String(), "the watch goes on at")
	last := c.set(1, "k2", "v")
	all, _ := runWatch(t, exitYes, "k", "--from-version", fmt.Sprint(begin), "--until-version", fmt.Sprint(last),
		"--endpoints", endpoints[1])
	wantText(t, "all", all, want+fmt.Sprintf("\"k2\"\t%d\t\"v\"\n", last))
}
