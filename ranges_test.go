package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

func deleteRangeWrite(prefix, start, end string) *kvpb.Write {
	return &kvpb.Write{Operation: &kvpb.Write_DeleteRange{DeleteRange: &kvpb.DeleteRangeRequest{Prefix: prefix, Start: start, End: end}}}
}

// TestDeleteRange deletes ranges in a store: all of one, with one version, or nothing.
func TestDeleteRange(t *testing.T) {
	s := newTestStore()
	sequence := uint64(0)
	apply := func(ws ...*kvpb.Write) []result {
		t.Helper()
		sequence++
		return applyBatch(t, s, 1, sequence, ws...)
	}
	keys := func() string {
		var keys []string
		for k := range contents(t, s) {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		return strings.Join(keys, " ")
	}
	fill := func() {
		t.Helper()
		for _, k := range []string{"a", "ab", "abc", "b", "ba", "c"} {
			apply(setWrite(k, k))
		}
	}
	for _, c := range []struct {
		prefix, start, end string
		deleted            uint32
		left               string
	}{
		{"ab", "", "", 2, "a b ba c"},
		{"x", "", "", 0, "a ab abc b ba c"},
		{"", "ab", "ba", 3, "a ba c"},
		{"", "b", "", 3, "a ab abc"},
		{"", "", "b", 3, "b ba c"},
		{"", "\x00", "", 6, ""},
	} {
		fill()
		before := s.version
		want := []result{{version: before + 1, deleted: c.deleted}}
		if got := apply(deleteRangeWrite(c.prefix, c.start, c.end)); !slices.Equal(got, want) {
			t.Errorf("%+v: %v, want %v", c, got, want)
		}
		if got := keys(); got != c.left {
			t.Errorf("%+v leaves %q", c, got)
		}
	}

	// A repeat gets the first answer, also after a snapshot.
	fill()
	apply(openWrite(5))
	first := apply(withID(5, 1, deleteRangeWrite("a", "", "")))
	fill()
	s.install(restored(t, s))
	again := apply(withID(5, 1, deleteRangeWrite("a", "", "")))
	if !slices.Equal(again, first) || first[0].deleted != 3 {
		t.Errorf("a repeat got %v, the first was %v", again, first)
	}
	if got := keys(); got != "a ab abc b ba c" {
		t.Errorf("a repeat leaves %q", got)
	}
}

func restored(t *testing.T, s *store) *store {
	t.Helper()
	again, err := readSnapshot(strings.NewReader(string(snapshotBytes(t, s))))
	if err != nil {
		t.Fatal(err)
	}
	return again
}

// TestDeleteRangeIsBounded deletes as many keys, and as many bytes of keys, as it may, and one
// more.
func TestDeleteRangeIsBounded(t *testing.T) {
	long := strings.Repeat("l", 32<<10)
	for name, c := range map[string]struct {
		keys    int
		prefix  string
		tooMany bool
	}{
		"all keys":     {maxRangeKeys, "k", false},
		"one key more": {maxRangeKeys + 1, "k", true},
		"all bytes":    {31, long, false},
		"a key more":   {32, long, true},
	} {
		s := newTestStore()
		sequence := uint64(0)
		for i := range c.keys {
			sequence++
			applyBatch(t, s, 1, sequence, setWrite(fmt.Sprintf("%s%06d", c.prefix, i), "v"))
		}
		before := s.version
		applyBatch(t, s, 1, sequence+1, openWrite(5))
		w := withID(5, 1, deleteRangeWrite(c.prefix, "", ""))
		want := result{version: before + 1, deleted: uint32(c.keys)}
		left := uint64(0)
		if c.tooMany {
			want = result{tooMany: true}
			left = uint64(c.keys)
		}
		for i := range uint64(2) { // the second is a repeat
			if got := applyBatch(t, s, 1, sequence+2+i, w); got[0] != want {
				t.Errorf("%s: %+v, want %+v", name, got[0], want)
			}
		}
		if s.tree.keys != left || s.version != before+uint64(min(1, want.version)) {
			t.Errorf("%s: %d keys are left, the version is %d", name, s.tree.keys, s.version)
		}
		s.install(restored(t, s))
		if got := applyBatch(t, s, 1, sequence+4, w); got[0] != want {
			t.Errorf("%s: after a snapshot: %+v, want %+v", name, got[0], want)
		}
	}
}

// TestFewDeleteRangesShareAnEntry: each may make the loop look at many keys.
func TestFewDeleteRangesShareAnEntry(t *testing.T) {
	encoded, err := encodeWrite(deleteRangeWrite("k", "", ""))
	if err != nil {
		t.Fatal(err)
	}
	var c callsInFlight
	for range 100 {
		c.add(&call{write: encoded, done: make(chan outcome, 1)}, 1)
	}
	p := c.nextProposal(1, programLevel, 1)
	if n := len(p.calls); n < 4 || n > 8 {
		t.Errorf("%d of them share an entry", n)
	}
}

// rangeReader reads ranges of one node.
type rangeReader struct {
	c    *testCluster
	node *testNode
	min  uint64 // what is read is not older than this version
}

func (r *rangeReader) take(items []*kvpb.KeyValue, keysOnly bool, keys []string) []string {
	r.c.t.Helper()
	for _, it := range items {
		keys = append(keys, it.Key)
		hasValue := string(it.Value) == "v"+it.Key
		if hasValue == keysOnly {
			r.c.t.Errorf("%q is %q", it.Key, it.Value)
		}
	}
	return keys
}

func (r *rangeReader) list(req *kvpb.ListRequest) (keys []string) {
	r.c.t.Helper()
	for {
		resp, err := r.node.List(r.c.ctx, req)
		if err != nil {
			r.c.t.Fatal(err)
		}
		if resp.Version < r.min {
			r.c.t.Errorf("a page is of version %d", resp.Version)
		}
		keys = r.take(resp.Items, req.KeysOnly, keys)
		if resp.NextPageToken == "" {
			return keys
		}
		req.PageToken = resp.NextPageToken
	}
}

func (r *rangeReader) scan(req *kvpb.ScanRequest) (keys []string) {
	r.c.t.Helper()
	stream, err := r.node.Scan(r.c.ctx, req)
	if err != nil {
		r.c.t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || first.ClusterId == 0 || first.Version < r.min || len(first.Items) > 0 {
		r.c.t.Fatalf("the first response is %v, %v", first, err)
	}
	for {
		resp, err := stream.Recv()
		if err == io.EOF {
			return keys
		}
		if err != nil {
			r.c.t.Fatal(err)
		}
		keys = r.take(resp.Items, req.KeysOnly, keys)
	}
}

// TestRangesOfCluster lists, scans and deletes ranges through each node.
func TestRangesOfCluster(t *testing.T) {
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	var keys []string
	for i := range 500 {
		keys = append(keys, fmt.Sprintf("k%03d", i))
	}
	for i, k := range keys {
		c.set(uint64(1+i%3), k, "v"+k)
	}
	for id := uint64(1); id <= 3; id++ {
		reader := &rangeReader{c: c, node: c.nodes[id], min: uint64(len(keys))}
		for _, r := range []struct {
			prefix, start, end string
			want               []string
		}{
			{"", "", "", keys},
			{"k1", "", "", keys[100:200]},
			{"", "k1", "k25", keys[100:250]},
			{"", "k490", "", keys[490:]},
			{"", "", "k01", keys[:10]},
			{"x", "", "", nil},
		} {
			for _, only := range []bool{false, true} {
				got := reader.list(&kvpb.ListRequest{Prefix: r.prefix, Start: r.start, End: r.end, Limit: 70, KeysOnly: only})
				if !slices.Equal(got, r.want) {
					t.Errorf("node %d, %q %q %q: List has %d keys, want %d", id, r.prefix, r.start, r.end, len(got), len(r.want))
				}
				got = reader.scan(&kvpb.ScanRequest{Prefix: r.prefix, Start: r.start, End: r.end, KeysOnly: only})
				if !slices.Equal(got, r.want) {
					t.Errorf("node %d, %q %q %q: Scan has %d keys, want %d", id, r.prefix, r.start, r.end, len(got), len(r.want))
				}
			}
		}
	}
	resp, err := c.nodes[2].DeleteRange(c.ctx, &kvpb.DeleteRangeRequest{Prefix: "k1"})
	if err != nil || resp.Deleted != 100 || resp.Version != uint64(len(keys))+1 || resp.TooMany {
		t.Fatalf("DeleteRange: %v, %v", resp, err)
	}
	for id := uint64(1); id <= 3; id++ {
		got, err := c.nodes[id].Get(c.ctx, &kvpb.GetRequest{Key: "k150", Local: true, MinVersion: resp.Version})
		if err != nil || got.Value != nil {
			t.Errorf("node %d: after the DeleteRange, k150 is %v, %v", id, got, err)
		}
	}
}

// TestPagesOfKeys: a page of keys only is full of these, whatever values they have.
func TestPagesOfKeys(t *testing.T) {
	c := newCluster(t, 1)
	c.init(1)
	const keys = 5
	for i := range keys {
		c.set(1, fmt.Sprint("k", i), strings.Repeat("v", maxListBytes/2))
	}
	for _, only := range []bool{false, true} {
		resp, err := c.nodes[1].List(c.ctx, &kvpb.ListRequest{KeysOnly: only})
		if err != nil {
			t.Fatal(err)
		}
		want := 1
		if only {
			want = keys
		}
		if n := len(resp.Items); n != want || only != (resp.NextPageToken == "") {
			t.Errorf("keys only %v: a page has %d keys, want %d; the next one is %q", only, n, want, resp.NextPageToken)
		}
	}
}

// TestScansAreBounded: a node has its limit, and a principal half of it; without TLS there is one.
func TestScansAreBounded(t *testing.T) {
	begin := func(r *runningScans, p principal) int {
		n := 0
		for r.begin(p) {
			n++
		}
		return n
	}
	r := &runningScans{}
	a, b := principal{role: roleClient, name: "a"}, principal{role: roleReader, name: "b"}
	for i, p := range []principal{a, b, {role: roleAdmin}} {
		if n, want := begin(r, p), []int{maxScans / 2, maxScans / 2, 0}[i]; n != want {
			t.Errorf("%v has begun %d Scans, want %d", p, n, want)
		}
	}
	r.end(a)
	if n := begin(r, a); n != 1 {
		t.Errorf("when one has ended, %d more begin", n)
	}
	for range maxScans / 2 {
		r.end(a)
		r.end(b)
	}
	if r.count != 0 || len(r.of) != 0 {
		t.Errorf("%d Scans of %d principals are left", r.count, len(r.of))
	}
	if n := begin(r, principal{}); n != maxScans {
		t.Errorf("without TLS, %d Scans begin", n)
	}
	c := newCluster(t, 1)
	c.nodes[1].server.scans.count = maxScans
	stream, err := c.nodes[1].Scan(c.ctx, &kvpb.ScanRequest{Local: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantError(t, err, codes.ResourceExhausted, "OVERLOADED")
}

// bareStream is a stream of which only the context is asked for.
type bareStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s bareStream) Context() context.Context { return s.ctx }

// TestStreamsEndWell: a stream that has sent all was not cancelled, however often.
func TestStreamsEndWell(t *testing.T) {
	c := newCluster(t, 1)
	s := c.nodes[1].server
	for i := range 50_000 {
		err := s.serveReader(bareStream{ctx: c.ctx}, func(context.Context, func()) error { return nil })
		if err != nil {
			t.Fatalf("stream %d ends with %v", i, err)
		}
	}
}

// TestMinVersion has local reads wait for a version.
func TestMinVersion(t *testing.T) {
	c := newCluster(t, 3)
	c.init(1, 2, 3)
	version := c.set(1, "k", "old")
	type answer struct {
		value string
		err   error
	}
	for id := uint64(1); id <= 3; id++ {
		kv := c.nodes[id]
		answers := make(chan answer, 3)
		want := version + 1
		get := &kvpb.GetRequest{Key: "k", Local: true, MinVersion: want}
		go func() {
			resp, err := kv.Get(c.ctx, get)
			answers <- answer{string(resp.GetValue()), err}
		}()
		go func() {
			resp, err := kv.List(c.ctx, &kvpb.ListRequest{Prefix: "k", Local: true, MinVersion: want})
			a := answer{err: err}
			for _, it := range resp.GetItems() {
				a.value += string(it.Value)
			}
			answers <- a
		}()
		go func() {
			s, err := kv.Pipeline(c.ctx)
			if err != nil {
				answers <- answer{err: err}
				return
			}
			rs, err := exchange(s, &kvpb.Operation{Operation: &kvpb.Operation_Get{Get: get}})
			if err != nil {
				answers <- answer{err: err}
				return
			}
			answers <- answer{value: string(rs[0].GetGet().GetValue())}
			_ = s.CloseSend()
		}()
		n := kv.server.n
		eventually(t, func() error {
			return n.do(c.ctx, func() error {
				if w := len(n.calls.waits.calls); w != 3 {
					return fmt.Errorf("%d reads wait", w)
				}
				return nil
			})
		})
		value := fmt.Sprint("new ", id)
		version = c.set(1+id%3, "k", value)
		for range 3 {
			if a := <-answers; a.err != nil || a.value != value {
				t.Errorf("node %d: %q, %v, want %q", id, a.value, a.err, value)
			}
		}
		got, err := kv.Get(c.ctx, &kvpb.GetRequest{Key: "k", Local: true, MinVersion: version}) // is applied
		if err != nil || string(got.Value) != value {
			t.Errorf("node %d: %v, %v", id, got, err)
		}
		_, err = kv.Get(c.ctx, &kvpb.GetRequest{Key: "k", MinVersion: version})
		wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
}

// TestReadsThatAreGivenUp: what waits for a version that does not come leaves the loop when its
// caller does.
func TestReadsThatAreGivenUp(t *testing.T) {
	c := newCluster(t, 1)
	c.init(1)
	n := c.nodes[1]
	waits := func(want int) {
		t.Helper()
		c.inLoop(1, func(n *node) error {
			n.inbox.mu.Lock()
			defer n.inbox.mu.Unlock()
			if w := len(n.calls.waits.calls); w != want || n.inbox.callCount != want {
				return fmt.Errorf("%d reads wait, %d calls are counted, want %d", w, n.inbox.callCount, want)
			}
			return nil
		})
	}
	ctx, cancel := context.WithCancel(c.ctx)
	get := &kvpb.GetRequest{Key: "k", Local: true, MinVersion: 1 << 60}
	done := make(chan struct{})
	for range 10 {
		go func() {
			_, _ = n.Get(ctx, get)
			done <- struct{}{}
		}()
	}
	if _, err := n.Scan(ctx, &kvpb.ScanRequest{Local: true, MinVersion: 1 << 60}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Watch(ctx, &kvpb.WatchRequest{FromVersion: 1 << 60}); err != nil {
		t.Fatal(err)
	}
	s, err := n.Pipeline(ctx)
	if err != nil {
		t.Fatal(err)
	}
	gets := pipelineOf(10, &kvpb.Operation{Operation: &kvpb.Operation_Get{Get: get}})
	if err := s.Send(gets); err != nil {
		t.Fatal(err)
	}
	waits(22)
	if running := n.server.scans.count; running != 0 {
		t.Errorf("%d Scans that wait have the place of one that runs", running)
	}
	cancel()
	for range 10 {
		<-done
	}
	waits(0)
}

// TestListsThatWaitHaveNoPlace: a List that waits for a version has none of the places of large
// answers, of which there are few.
func TestListsThatWaitHaveNoPlace(t *testing.T) {
	c := newCluster(t, 1)
	c.init(1)
	n := c.nodes[1]
	const many = 2 * connLargeAnswers
	errs := make(chan error, many)
	version := c.set(1, "k", "v")
	for range many {
		go func() {
			_, err := n.List(c.ctx, &kvpb.ListRequest{Local: true, MinVersion: version + 1})
			errs <- err
		}()
	}
	c.inLoop(1, func(n *node) error {
		if w := len(n.calls.waits.calls); w != many {
			return fmt.Errorf("%d Lists wait", w)
		}
		return nil
	})
	large := n.server.limiter.answers.large
	large.mu.Lock()
	used := large.used
	large.mu.Unlock()
	if used != 0 {
		t.Errorf("Lists that wait have %d places", used)
	}
	c.set(1, "k", "w")
	for range many {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// TestVersionWaitsEnd: a wait for a version without a deadline ends, too.
func TestVersionWaitsEnd(t *testing.T) {
	n := turnNode()
	n.net = deafNetwork{}
	if _, err := n.bootstrap(nil); err != nil {
		t.Fatal(err)
	}
	n.turn(input{ticks: int(n.ticksOf(leaderWait)) / 2})
	wait := &call{minVersion: 1 << 60, done: make(chan outcome, 1)}
	n.turn(input{calls: []*call{wait}})
	ticks := int(n.ticksOf(maxVersionWait))
	for i := range ticks + 1 {
		if len(wait.done) > 0 {
			if i < ticks-1 {
				t.Fatalf("it ends after %d ticks: %v", i, (<-wait.done).err)
			}
			break
		}
		n.turn(input{ticks: 1})
	}
	if o := <-wait.done; o.err != context.DeadlineExceeded {
		t.Errorf("it ends with %v", o.err)
	}
}
