// Tests of store.go, view.go and snapshotformat.go: the replicated state, views of it, and the
// snapshots that are written from them. What applies writes in other tests is here.

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// readSnapshot reads a snapshot into a new store, or says why it is none.
func readSnapshot(r io.Reader) (*store, error) {
	s, _, err := scanSnapshot(r, snapshotScan{speaks: programLevel})
	return s, err
}

// newTestStore is the store of a cluster whose voters are 1 to 3.
func newTestStore() *store {
	s := newStore()
	s.clusterID, s.index, s.term = 7, 1, 1
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 2, 3}, AutoLeave: new(false)}, plainMembers(1, 2, 3))
	return s
}

func setWrite(key, value string) *kvpb.Write {
	return &kvpb.Write{Operation: &kvpb.Write_Set{Set: &kvpb.SetRequest{Key: key, Value: []byte(value)}}}
}

func deleteWrite(key string) *kvpb.Write {
	return &kvpb.Write{Operation: &kvpb.Write_Delete{Delete: &kvpb.DeleteRequest{Key: key}}}
}

// encodeWrite is what a service makes of a request.
func encodeWrite(w *kvpb.Write) ([]byte, error) { return proto.Marshal(w) }

// tryBatch applies a batch as the next entry.
func tryBatch(t testing.TB, s *store, proposer, sequence uint64, ws ...*kvpb.Write) []outcome {
	t.Helper()
	s.index++
	p, q, results, err := s.apply(mustMarshal(t, &kvpb.Batch{Proposer: proposer, Sequence: sequence, Writes: ws}))
	if err != nil || p != proposer || q != sequence {
		t.Fatalf("apply: batch %d of %d, err %v", q, p, err)
	}
	return results
}

// applyBatch is tryBatch with writes that all have an answer.
func applyBatch(t testing.TB, s *store, proposer, sequence uint64, ws ...*kvpb.Write) (results []result) {
	t.Helper()
	for _, o := range tryBatch(t, s, proposer, sequence, ws...) {
		if o.err != nil {
			t.Fatal(o.err)
		}
		results = append(results, o.result)
	}
	return results
}

// contents returns all keys and checks what must hold for every store.
func contents(t testing.TB, s *store) map[string]item {
	t.Helper()
	all := map[string]item{}
	var size uint64
	for k, it := range (treeView{root: s.tree.root}).from(nil) {
		if it.version == 0 || it.version > s.version {
			t.Fatalf("key %q has version %d", k, it.version)
		}
		all[string(k)] = it.kept()
		size += uint64(len(k) + len(it.value))
	}
	checkTree(t, s.tree.root, all)
	if keys, bytes := s.tree.keys, s.tree.bytes; keys != uint64(len(all)) || bytes != size {
		t.Fatalf("it counts %d keys and %d bytes, and has %d and %d", keys, bytes, len(all), size)
	}
	return all
}

func sameItems(a, b map[string]item) bool {
	return maps.EqualFunc(a, b, func(x, y item) bool { return x.version == y.version && bytes.Equal(x.value, y.value) })
}

func viewBytes(t testing.TB, v *view) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := v.writeTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func snapshotBytes(t testing.TB, s *store) []byte {
	t.Helper()
	v := s.openView()
	defer v.close()
	return viewBytes(t, v)
}

func keysForTest() []string {
	var keys []string
	for i := range 36 {
		keys = append(keys, fmt.Sprintf("k%d", i))
	}
	return keys
}

// filledStore is a store with one member and keys of 16 + 128 bytes.
func filledStore(keys int) *store {
	s := newStore()
	s.members[1] = &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}
	for i := range keys {
		v := make([]byte, 128)
		binary.BigEndian.PutUint64(v, uint64(i))
		s.tree.set([]byte(benchKey(uint64(i))), item{v, uint64(i + 1)})
	}
	s.version = uint64(keys)
	return s
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

// benchKey is a key of 16 bytes.
func benchKey(i uint64) string { return fmt.Sprintf("%016x", i) }

func TestStoreModel(t *testing.T) {
	for seed := range uint64(3) {
		r := seededRand(seed)
		s, model := newTestStore(), map[string]item{}
		keys, sequences, version := keysForTest(), map[uint64]uint64{}, uint64(0)
		var views []*view
		for range 1000 {
			switch r.IntN(40) { // views must change nothing
			case 0:
				views = append(views, s.openView())
			case 1:
				if len(views) > 0 {
					views[0].close()
					views = views[1:]
				}
			}
			var ws []*kvpb.Write
			var want []result
			next := maps.Clone(model)
			for range 1 + r.IntN(4) {
				key := keys[r.IntN(len(keys))]
				_, found := next[key]
				want = append(want, result{version: version + uint64(len(want)) + 1, found: found})
				if r.IntN(3) == 0 {
					ws = append(ws, deleteWrite(key))
					delete(next, key)
				} else {
					value := strings.Repeat("v", r.IntN(50))
					ws = append(ws, setWrite(key, value))
					next[key] = item{[]byte(value), version + uint64(len(want))}
				}
			}
			proposer := 1 + r.Uint64N(3)
			sequence := sequences[proposer] + 1 + r.Uint64N(3)
			switch r.IntN(8) {
			case 0:
				proposer, want = 4, nil // no member
			case 1:
				sequence, want = r.Uint64N(sequences[proposer]+1), nil // was applied
			default:
				model, sequences[proposer] = next, sequence
				version += uint64(len(want))
			}
			if got := applyBatch(t, s, proposer, sequence, ws...); !slices.Equal(got, want) {
				t.Fatalf("seed %d: results %v, want %v", seed, got, want)
			}
			key := keys[r.IntN(len(keys))]
			got, found, err := s.get([]byte(key))
			want1, wantFound := model[key]
			if err != nil || found != wantFound || got.version != want1.version || !bytes.Equal(got.value, want1.value) {
				t.Fatalf("seed %d: get(%q) = %v, %v, %v, want %v, %v", seed, key, got, found, err, want1, wantFound)
			}
			if s.version != version || !maps.Equal(s.proposers, sequences) {
				t.Fatalf("seed %d: version %d, want %d; proposers %v, want %v", seed, s.version, version, s.proposers, sequences)
			}
		}
		if !sameItems(contents(t, s), model) {
			t.Fatalf("seed %d: the store is not the model", seed)
		}
	}
}

func TestStoreApply(t *testing.T) {
	s := newTestStore()
	if got := applyBatch(t, s, 1, 1, setWrite("a", "1"), setWrite("a", "2"), deleteWrite("a"), deleteWrite("a")); !slices.Equal(got, []result{{version: 1}, {version: 2, found: true}, {version: 3, found: true}, {version: 4}}) {
		t.Errorf("results %v: each write has a version of its own", got)
	}
	applyBatch(t, s, 1, 5, setWrite("a", "3"))
	before := snapshotBytes(t, s)
	for _, c := range []struct{ proposer, sequence uint64 }{{1, 5}, {1, 4}, {1, 1}, {1, 0}, {2, 0}, {4, 1}, {0, 1}} {
		s.index-- // the header has it
		if got := applyBatch(t, s, c.proposer, c.sequence, setWrite("b", "x")); got != nil || !bytes.Equal(snapshotBytes(t, s), before) {
			t.Errorf("batch %d of %d was applied: %v", c.sequence, c.proposer, got)
		}
	}
	if p, q, results, err := s.apply(nil); p != 0 || q != 0 || results != nil || err != nil || !bytes.Equal(snapshotBytes(t, s), before) {
		t.Errorf("an empty entry: %d, %d, %v, %v", p, q, results, err)
	}
	if _, _, _, err := s.apply([]byte{0xff}); err == nil {
		t.Error("garbage was applied")
	}
	if _, _, _, err := s.apply(mustMarshal(t, &kvpb.Batch{Proposer: 1, Sequence: 9, Writes: []*kvpb.Write{{}}})); err == nil {
		t.Error("a write of an unknown kind was applied")
	}
	// A batch of one who was removed after it was proposed.
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 2}}, nil)
	if got := applyBatch(t, s, 3, 1, setWrite("b", "x")); got != nil {
		t.Error("a batch of a removed member was applied")
	}
	if _, _, err := newStore().get([]byte("a")); err != errNotInitialized {
		t.Errorf("get in no cluster: %v", err)
	}
}

func TestStoreConfigure(t *testing.T) {
	s := newTestStore()
	applyBatch(t, s, 3, 1, setWrite("a", "1"))
	published := s.members
	moved := &kvpb.Member{RaftId: 2, Node: &kvpb.Node{Id: 2, Address: "moved:1"}}
	// Each of the four sets makes a member.
	cs := &raftpb.ConfState{Voters: []uint64{1, 4}, Learners: []uint64{5}, VotersOutgoing: []uint64{1, 2}, LearnersNext: []uint64{2}}
	s.configure(cs, append(plainMembers(4, 5), moved))
	if got := slices.Sorted(maps.Keys(s.members)); !slices.Equal(got, []uint64{1, 2, 4, 5}) || s.members[2].Address != "moved:1" {
		t.Errorf("members %v", s.members)
	}
	if !slices.Equal(s.removed, []uint64{3}) || len(s.proposers) != 0 || s.conf != cs {
		t.Errorf("removed %v, proposers %v", s.removed, s.proposers)
	}
	if len(published) != 3 || published[2].Address != "n2:1" {
		t.Errorf("the map of before has changed: %v", published)
	}
	if !isJoint(cs) || isJoint(&raftpb.ConfState{Voters: []uint64{1}}) {
		t.Error("isJoint")
	}
	if got, want := describeMembers(cs, s.members), "1=n1:1 voter, 2=moved:1 leaving, 4=n4:1 voter, 5=n5:1 learner"; got != want {
		t.Errorf("describeMembers: %s, want %s", got, want)
	}
	s.members[9] = plainNode(1) // the node's next life
	if got := s.raftIDsOf(1); !slices.Equal(got, []uint64{1, 9}) {
		t.Errorf("raftIDsOf(1) = %v", got)
	}
	if ms := sortedMembers(s.members); ms[0].RaftId != 1 || ms[1].RaftId != 9 || ms[2].RaftId != 2 {
		t.Errorf("sortedMembers: %v", ms)
	}

	s = newTestStore()
	for id := uint64(10); id < 10+maxRemoved+5; id++ {
		s.configure(&raftpb.ConfState{Voters: []uint64{1, id}}, plainMembers(id))
		before := s.removed
		s.configure(&raftpb.ConfState{Voters: []uint64{1}}, nil)
		if len(before) > 0 && &before[0] == &s.removed[0] {
			t.Fatal("removed, which may have been published, was changed in place")
		}
	}
	if n := len(s.removed); n != maxRemoved || s.removed[0] != 15 || s.removed[n-1] != 10+maxRemoved+4 {
		t.Errorf("it remembers %d removed, %d to %d", n, s.removed[0], s.removed[n-1])
	}
	if !slices.Equal(s.former, s.removed) { // plainMembers has them alike
		t.Errorf("it remembers the nodes %v", s.former)
	}
	again, err := readSnapshot(bytes.NewReader(snapshotBytes(t, s)))
	if err != nil {
		t.Fatalf("with all removed: %v", err)
	}
	if !slices.Equal(again.former, s.former) {
		t.Errorf("after a snapshot it remembers the nodes %v", again.former)
	}

	s = newTestStore()
	life := []*kvpb.Member{{RaftId: 9, Node: plainNode(3)}}
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 2, 9}}, life) // 3 is replaced
	if len(s.former) > 0 {
		t.Errorf("who is in another life counts as removed: %v", s.former)
	}
	s.configure(&raftpb.ConfState{Voters: []uint64{1}}, nil)
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 2}}, plainMembers(2)) // for a while
	s.configure(&raftpb.ConfState{Voters: []uint64{1}}, nil)
	if !slices.Equal(s.former, []uint64{3, 2}) {
		t.Errorf("it remembers the nodes %v, want 3 and 2, once each", s.former)
	}
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 5, 6}}, plainMembers(5, 6))
	s.configure(&raftpb.ConfState{Voters: []uint64{1}}, nil, 5)
	if !slices.Equal(s.former, []uint64{3, 2, 6}) {
		t.Errorf("it remembers the nodes %v, want 3, 2 and 6: node 5 was lost", s.former)
	}
}

// For -race: the loop writes and opens views, others read and close them.
func TestStoreConcurrently(t *testing.T) {
	s, keys := newTestStore(), keysForTest()
	var done atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer done.Store(true)
	for i := range 2 {
		wg.Go(func() {
			last := map[string]uint64{}
			for j := i; !done.Load(); j++ {
				key := keys[j%len(keys)]
				it, found, err := s.get([]byte(key))
				if err != nil || found && (it.version < last[key] || !bytes.HasPrefix(it.value, []byte(key))) {
					t.Errorf("get(%q) = %v, %v, %v after version %d", key, it, found, err, last[key])
					return
				}
				if found {
					last[key] = it.version
				}
				runtime.Gosched()
			}
		})
	}
	r := seededRand(2)
	for i := range uint64(800) {
		key := keys[r.IntN(len(keys))]
		w := setWrite(key, fmt.Sprint(key, " ", i))
		if r.IntN(5) == 0 {
			w = deleteWrite(key)
		}
		applyBatch(t, s, 1, i+1, w)
		if i%100 == 50 {
			v := s.openView()
			want := viewBytes(t, v)
			wg.Go(func() {
				defer v.close()
				var b bytes.Buffer
				if err := v.writeTo(&b); err != nil || !bytes.Equal(b.Bytes(), want) {
					t.Errorf("a view has changed while it was written: %v", err)
				}
			})
		}
	}
}

// What a reader or a view has been given stays as it is.
func TestValuesAreKept(t *testing.T) {
	s := newTestStore()
	applyBatch(t, s, 1, 1, setWrite("k", "old"))
	it, _, _ := s.get([]byte("k"))
	v := s.openView()
	defer v.close()
	before := firstItem(t, v)
	data := mustMarshal(t, &kvpb.Batch{Proposer: 1, Sequence: 2, Writes: []*kvpb.Write{setWrite("k", "new"), setWrite("long", strings.Repeat("x", maxPacked+1))}})
	if _, _, _, err := s.apply(data); err != nil {
		t.Fatal(err)
	}
	clear(data) // of a log that has been compacted
	after := firstItem(t, v)
	for _, got := range []item{it, before.item, after.item} {
		if string(got.value) != "old" || got.version != 1 {
			t.Errorf("%q of version %d, want old", got.value, got.version)
		}
	}
	for key, want := range map[string]string{"k": "new", "long": strings.Repeat("x", maxPacked+1)} {
		if it, _, _ := s.get([]byte(key)); string(it.value) != want {
			t.Errorf("%q is %q", key, it.value)
		}
	}
}

func firstItem(t testing.TB, v *view) keyItem {
	t.Helper()
	items, _, err := v.page(keyRange{}, 1, 0)
	if err != nil || len(items) != 1 {
		t.Fatalf("%d items, %v", len(items), err)
	}
	return items[0]
}

func TestViews(t *testing.T) {
	r, keys := seededRand(1), keysForTest()
	s := newTestStore()
	sequence := uint64(0)
	write := func(n int) {
		for range n {
			sequence++
			w := setWrite(keys[r.IntN(len(keys))], fmt.Sprint(sequence))
			switch r.IntN(4) {
			case 0:
				w = deleteWrite(keys[r.IntN(len(keys))])
			case 1:
				w = setWrite(fmt.Sprint("new", sequence), "in a page that may be new")
			}
			applyBatch(t, s, 1, sequence, w)
		}
	}
	write(100)
	type open struct {
		v    *view
		want []byte
	}
	var views []open
	check := func() {
		t.Helper()
		for i, o := range views {
			if !bytes.Equal(viewBytes(t, o.v), o.want) {
				t.Fatalf("view %d has changed", i)
			}
		}
	}
	add := func() {
		v := s.openView()
		views = append(views, open{v, viewBytes(t, v)})
	}
	add()
	write(1)
	check()
	write(200)
	add()
	write(200)
	check()
	s.configure(&raftpb.ConfState{Voters: []uint64{1}}, nil)
	write(50)
	check()
	add()
	write(50)
	check()
	views[1].v.close() // neither the oldest nor the newest
	views = slices.Delete(views, 1, 2)
	write(200)
	check()
	views[1].v.close()
	views = views[:1]
	write(200)
	check()
	add() // while one of an older epoch is open
	write(200)
	check()
	// What s is replaced by is no view's, and open views are not part of it.
	other := newTestStore()
	applyBatch(t, other, 1, 1, setWrite(keys[0], "other"), setWrite("other", "x"))
	want := snapshotBytes(t, other)
	s.install(other)
	if !bytes.Equal(snapshotBytes(t, s), want) {
		t.Error("install")
	}
	check()
	add()
	sequence = 1
	write(200)
	check()
	contents(t, s)
	for _, o := range views {
		o.v.close()
		if _, _, err := o.v.page(keyRange{}, 1, 1); err != errViewEnded {
			t.Errorf("a closed view: %v", err)
		}
	}
}

// A write without a view copies nothing, and with one once.
func TestViewCosts(t *testing.T) {
	s := filledStore(1000)
	write := func() {
		for i := range uint64(1000) {
			s.tree.set([]byte(benchKey(i)), item{make([]byte, 128), s.version})
		}
	}
	cost := func() uint64 {
		before := s.tree.copied
		write()
		return s.tree.copied - before
	}
	if n := cost(); n != 0 {
		t.Errorf("%d bytes are copied without a view", n)
	}
	pages := uint64(0)
	var walk func(p *page)
	walk = func(p *page) {
		pages += p.memory()
		for _, child := range p.children {
			walk(child)
		}
	}
	walk(s.tree.root)
	for range 3 {
		v := s.openView()
		if n := cost(); n != pages {
			t.Errorf("%d bytes are copied, all pages are %d", n, pages)
		}
		if n := cost(); n != 0 {
			t.Errorf("%d bytes are copied a second time", n)
		}
		v.close()
	}
}

// The views of clients end, the oldest first, when they keep too much; those of snapshots do
// not.
func TestViewsOfClientsEnd(t *testing.T) {
	s := newTestStore()
	value := strings.Repeat("v", 1<<20)
	sequence := uint64(0)
	write := func() {
		sequence++
		applyBatch(t, s, 1, sequence, setWrite("k", value))
	}
	open := func() *view {
		t.Helper()
		v, err := s.openKeys()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	isOpen := func(v *view) bool {
		_, _, err := v.page(keyRange{}, 1, 0)
		if err != nil && err != errViewEnded {
			t.Fatal(err)
		}
		return err == nil
	}
	write()
	snapshot := s.openView()
	defer snapshot.close()
	var views []*view
	for range minViewBytes>>20 - 1 {
		views = append(views, open())
		write()
	}
	for range 3 {
		write() // no view has what is replaced
	}
	for i, v := range views {
		if !isOpen(v) {
			t.Fatalf("view %d has ended", i)
		}
	}
	views[1].close()
	for range 2 {
		views = append(views, open())
		write()
	}
	if isOpen(views[0]) {
		t.Error("the oldest view keeps too much, and is open")
	}
	if !isOpen(views[2]) {
		t.Error("a view that keeps no more than it may has ended")
	}
	if !isOpen(snapshot) {
		t.Error("the view of a snapshot has ended")
	}
	backup := s.openBackup()
	s.install(newTestStore())
	if isOpen(views[2]) || isOpen(backup) {
		t.Error("a view of what was before is open")
	}
	if !isOpen(snapshot) {
		t.Error("the view of a snapshot has ended")
	}
	for _, v := range views {
		v.close()
	}
	if len(s.clientViews) != 0 {
		t.Errorf("%d views are open", len(s.clientViews))
	}
	if _, err := newStore().openKeys(); err != errNotInitialized {
		t.Errorf("a view of a node in no cluster: %v", err)
	}
}

// TestListsCountNotForScans: what a List has copied, and is done with, does not end a Scan.
func TestListsCountNotForScans(t *testing.T) {
	s := filledStore(2000)
	s.clusterID = 7
	scan, err := s.openKeys()
	if err != nil {
		t.Fatal(err)
	}
	defer scan.close()
	write := func() {
		for i := range uint64(2000) {
			s.tree.set([]byte(benchKey(i)), item{make([]byte, 128), s.version})
		}
	}
	write()
	kept := s.tree.kept
	if kept == 0 {
		t.Error("what the Scan keeps is not counted")
	}
	for range 10 {
		list, err := s.openPage()
		if err != nil {
			t.Fatal(err)
		}
		list.close()
		write()
	}
	if s.tree.kept != kept {
		t.Errorf("%d bytes are counted, and %d before the Lists", s.tree.kept, kept)
	}
}

// TestRangesLetGoOfTheLock: each DeleteRange may take long.
func TestRangesLetGoOfTheLock(t *testing.T) {
	s := filledStore(100)
	w := operation{kind: opDeleteRange, prefix: []byte("0")}
	set := operation{kind: opSet, key: []byte("k")}
	results := s.applySome([]operation{set, w, w, set}, nil)
	if len(results) != 2 {
		t.Errorf("%d writes in one go, want two", len(results))
	}
}

func TestViewPage(t *testing.T) {
	r := seededRand(4)
	s := newTestStore()
	var ws []*kvpb.Write
	for i := range 6000 {
		ws = append(ws, setWrite(fmt.Sprintf("%c%05d", "ab"[i%2], r.IntN(50000)), strings.Repeat("v", i%7)))
	}
	applyBatch(t, s, 1, 1, ws...)
	v := s.openView()
	defer v.close()
	all := contents(t, s)
	keys := slices.Sorted(maps.Keys(all))
	for i := range uint64(500) { // is not in the view
		applyBatch(t, s, 2, i+1, setWrite(fmt.Sprintf("a%05d", r.IntN(50000)), "later"), deleteWrite(keys[r.IntN(len(keys))]))
	}
	for _, c := range []struct {
		prefix, after   string
		limit, maxBytes int
	}{
		{"", "", 1, 1 << 20}, {"", "", len(keys), 1 << 20}, {"", "", len(keys) - 1, 1 << 20},
		{"a", "", 100, 1 << 20}, {"c", "", 100, 1 << 20}, {"a0", "", 1 << 20, 1 << 20}, {keys[7], "", 2, 100},
		{"", keys[0], 5, 1 << 20}, {"", keys[len(keys)-1], 5, 1 << 20}, {"a", "b", 5, 1 << 20}, {"b", keys[1] + "x", 5, 1 << 20},
		{"", "", 100, 0}, {"", "", 100, 13}, {"", keys[3], 100, 50},
	} {
		var want []string
		size, more := 0, false
		for _, key := range keys {
			if key <= c.after || !strings.HasPrefix(key, c.prefix) {
				continue
			}
			size += len(key) + len(all[key].value)
			if more = len(want) == c.limit || len(want) > 0 && size > c.maxBytes; more {
				break
			}
			want = append(want, key)
		}
		page, gotMore, err := v.page(prefixRange([]byte(c.prefix)).after([]byte(c.after)), c.limit, c.maxBytes)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, it := range page {
			got = append(got, string(it.key))
			if want := all[string(it.key)]; it.version != want.version || !bytes.Equal(it.value, want.value) {
				t.Fatalf("%+v: %q is %v, want %v", c, it.key, it.item, want)
			}
		}
		if !slices.Equal(got, want) || gotMore != more {
			t.Errorf("%+v: %d keys, more %v, want %d, %v", c, len(got), gotMore, len(want), more)
		}
	}
}

func TestRanges(t *testing.T) {
	for _, c := range []struct {
		r       keyRange
		in, out []string
	}{
		{keyRange{}, []string{"", "a", "\xff\xff"}, nil},
		{keyRange{start: []byte("b"), end: []byte("d")}, []string{"b", "bb", "c", "cz"}, []string{"", "a", "az", "d", "da"}},
		{prefixRange([]byte("ab")), []string{"ab", "aba", "ab\xff"}, []string{"a", "aa", "ac", "b"}},
		{prefixRange([]byte("a\xff")), []string{"a\xff", "a\xffz"}, []string{"a", "b"}},
		{prefixRange([]byte("\xff\xff")), []string{"\xff\xff", "\xff\xffa"}, []string{"\xff", "\xfe"}},
		{prefixRange(nil).after([]byte("k")), []string{"k\x00", "ka", "l"}, []string{"k", "a"}},
		{prefixRange([]byte("m")).after([]byte("k")), []string{"m", "mm"}, []string{"k", "l", "n"}},
	} {
		for _, key := range c.in {
			if !c.r.has([]byte(key)) {
				t.Errorf("%q is not in %q", key, c.r)
			}
		}
		for _, key := range c.out {
			if c.r.has([]byte(key)) {
				t.Errorf("%q is in %q", key, c.r)
			}
		}
	}
}

// TestLocksAreShort applies an entry whose writes copy much.
func TestLocksAreShort(t *testing.T) {
	s := newTestStore()
	long := strings.Repeat("k", 8<<10)
	var ws []*kvpb.Write
	for i := range 800 {
		ws = append(ws, setWrite(fmt.Sprintf("%s%04d", long, i), "v"))
	}
	for i := range uint64(8) {
		applyBatch(t, s, 1, i+1, ws[100*i:100*i+100]...)
	}
	for name, c := range map[string]struct {
		writes []*kvpb.Write
		copies bool
	}{"many": {slices.Repeat([]*kvpb.Write{setWrite("a", "v")}, 3*maxLockedWrites), false}, "large": {ws, true}} {
		v := s.openView()
		b, err := parseBatch(mustMarshal(t, &kvpb.Batch{Proposer: 1, Writes: c.writes}), nil, programLevel)
		if err != nil {
			t.Fatal(err)
		}
		var results []outcome
		for len(results) < len(b.writes) {
			copied, before := s.tree.copied, len(results)
			results = s.applySome(b.writes, results)
			const copiedByOne = 1 << 20
			if n := s.tree.copied - copied; n > maxLockedBytes+copiedByOne {
				t.Errorf("%s: %d bytes are copied in one go", name, n)
			}
			n := len(results) - before
			if n == 0 || n > maxLockedWrites {
				t.Errorf("%s: %d writes in one go", name, n)
			}
			isCut := n < maxLockedWrites && len(results) < len(b.writes)
			if isCut != c.copies && len(results) < len(b.writes) {
				t.Errorf("%s: %d writes in one go", name, n)
			}
		}
		v.close()
	}
	contents(t, s)
}

// validHeader is the header of a small valid snapshot of version 9.
func validHeader() *kvpb.SnapshotHeader {
	return &kvpb.SnapshotHeader{
		Format: snapshotFormat, Level: firstLevel, ClusterId: 7, Index: 5, Term: 2, Version: 9,
		ConfState: &kvpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{3}},
		Members:   plainMembers(1, 2, 3),
		Removed:   []uint64{4},
		Proposers: []*kvpb.Proposer{{RaftId: 1, Sequence: 8}},
	}
}

// headerOf is a valid header before so many sessions and keys.
func headerOf(sessions, keys uint64) *kvpb.SnapshotRecord {
	return headerRecord(func(h *kvpb.SnapshotHeader) { h.Sessions, h.Keys = sessions, keys })
}

func sessionRecord(id, highest uint64, answers ...*kvpb.Answer) *kvpb.SnapshotRecord {
	return &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Session{Session: &kvpb.Session{Id: id, Highest: highest, Answers: answers}}}
}

// ownedRecord is sessionRecord of an owner's session.
func ownedRecord(owner string, id, highest uint64, answers ...*kvpb.Answer) *kvpb.SnapshotRecord {
	r := sessionRecord(id, highest, answers...)
	r.GetSession().Owner = owner
	return r
}

// answersTo are answers of version 9 to sequences.
func answersTo(sequences ...uint64) (answers []*kvpb.Answer) {
	for _, q := range sequences {
		answers = append(answers, &kvpb.Answer{Sequence: q, Version: 9})
	}
	return answers
}

func headerRecord(change func(h *kvpb.SnapshotHeader)) *kvpb.SnapshotRecord {
	h := validHeader()
	change(h)
	return &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Header{Header: h}}
}

func keyRecord(key string, version uint64) *kvpb.SnapshotRecord {
	return &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_KeyValue{KeyValue: &kvpb.KeyValue{Key: key, Value: []byte("v"), Version: version}}}
}

func valueRecord(key string, size int) *kvpb.SnapshotRecord {
	r := keyRecord(key, 1)
	r.GetKeyValue().Value = make([]byte, size)
	return r
}

func footerRecord(keys uint64) *kvpb.SnapshotRecord {
	return &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{Keys: keys}}}
}

func recordBytes(t testing.TB, records ...*kvpb.SnapshotRecord) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, r := range records {
		if _, err := protodelim.MarshalTo(&b, r); err != nil {
			t.Fatal(err)
		}
	}
	return framed(b.Bytes())
}

// framed is what a frameWriter makes of bytes.
func framed(b []byte) []byte {
	var out bytes.Buffer
	w := newFrameWriter(&out)
	_, _ = w.Write(b)
	_ = w.flush()
	return out.Bytes()
}

// unframed is what is in frames.
func unframed(t testing.TB, b []byte) []byte {
	t.Helper()
	b, err := io.ReadAll(newFrameReader(bytes.NewReader(b)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// realSnapshots are real ones: empty, small, joint, and after changes.
func realSnapshots(t testing.TB) [][]byte {
	s := newTestStore()
	empty := snapshotBytes(t, s)
	applyBatch(t, s, 1, 1, setWrite("a", "1"), setWrite("b", ""), setWrite("c", "x"), setWrite("d", "y"), deleteWrite("b"))
	applyBatch(t, s, 2, 1, openWrite(5), openWrite(6), openWrite(7), openWrite(1<<64-1))
	applyBatch(t, s, 2, 2, withID(7, 1024, setWrite("a", "2")), withID(7, 2000, setWrite("a", "2")), withID(7, 1000, setIf("a", "3", 4)), withID(6, 1, deleteWrite("a")), withID(6, 2, setIf("a", "4", 0)), withID(6, 3, setIf("a", "5", 0)))
	applyBatch(t, s, 2, 3, openWriteOf(8, "client/shop"), openWriteOf(9, "admin"), openWriteOf(10, "client/shop"), withID(8, 1, deleteWrite("a")))
	small := snapshotBytes(t, s)
	s.configure(&raftpb.ConfState{Voters: []uint64{1, 4}, Learners: []uint64{5}, VotersOutgoing: []uint64{1, 2}, LearnersNext: []uint64{2}, AutoLeave: new(true)}, plainMembers(4, 5))
	joint := snapshotBytes(t, s)
	return [][]byte{empty, small, joint}
}

func TestSnapshotRoundTrip(t *testing.T) {
	for i, b := range realSnapshots(t) {
		s, err := readSnapshot(iotestOneByte{bytes.NewReader(b)})
		if err != nil {
			t.Fatalf("snapshot %d: %v", i, err)
		}
		contents(t, s)
		if got := snapshotBytes(t, s); !bytes.Equal(got, b) {
			t.Errorf("snapshot %d: written again it is another", i)
		}
	}
	// Everything at its limit.
	s := newTestStore()
	applyBatch(t, s, 1, 1, setWrite(strings.Repeat("k", maxKeyBytes), strings.Repeat("\xff", maxValueBytes)))
	for i := range uint64(300) {
		applyBatch(t, s, 1+i%3, 2+i, setWrite(fmt.Sprint(i%200), fmt.Sprint(i)))
	}
	b := snapshotBytes(t, s)
	restored, err := readSnapshot(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if !sameItems(contents(t, restored), contents(t, s)) || !bytes.Equal(snapshotBytes(t, restored), b) {
		t.Error("the restored store is another")
	}
	// It goes on as the other does.
	for _, x := range []*store{s, restored} {
		applyBatch(t, x, 1, 302, setWrite("late", "1")) // what came before was 301 and less
		applyBatch(t, x, 1, 302, setWrite("late", "2"))
		applyBatch(t, x, 3, 303, deleteWrite("1"), setWrite("c", ""))
	}
	if !bytes.Equal(snapshotBytes(t, s), snapshotBytes(t, restored)) {
		t.Error("the restored store goes on in another way")
	}
}

type iotestOneByte struct{ r io.Reader }

func (o iotestOneByte) Read(b []byte) (int, error) { return o.r.Read(b[:min(1, len(b))]) }

// Two histories with the same outcome: in the second, maps have grown and
// shrunk, views were open, and half of it came by a snapshot.
func TestSnapshotDeterministic(t *testing.T) {
	keys := keysForTest()
	a, b := newTestStore(), newTestStore()
	applyBatch(t, a, 2, 1, deleteWrite("junk"))
	applyBatch(t, a, 1, 1, deleteWrite("junk"), deleteWrite("junk"))
	applyBatch(t, b, 1, 1, setWrite("junk", "x"), setWrite(keys[3], "y"))
	applyBatch(t, b, 2, 1, deleteWrite("junk"))
	a.index++
	for i, key := range keys {
		if i == len(keys)/2 {
			s, err := readSnapshot(bytes.NewReader(snapshotBytes(t, b)))
			if err != nil {
				t.Fatal(err)
			}
			b.install(s)
			v := b.openView()
			defer v.close()
		}
		applyBatch(t, a, 1, uint64(i)+2, deleteWrite("junk"), setWrite(key, key))
		applyBatch(t, b, 1, uint64(i)+2, setWrite("junk", "x"), setWrite(key, key))
	}
	for _, s := range []*store{a, b} {
		applyBatch(t, s, 3, 1, deleteWrite("junk"))
	}
	b.index = a.index
	want := snapshotBytes(t, a)
	for range 10 { // a walk over a map in its own order may be right by chance
		if !bytes.Equal(snapshotBytes(t, b), want) {
			t.Fatal("equal stores write different snapshots")
		}
	}
}

func TestSnapshotRefused(t *testing.T) {
	header := headerRecord(func(*kvpb.SnapshotHeader) {})
	low, high := "a", "b"
	with := func(change func(h *kvpb.SnapshotHeader)) []*kvpb.SnapshotRecord {
		return []*kvpb.SnapshotRecord{headerRecord(change), footerRecord(0)}
	}
	conf := func(cs *kvpb.ConfState, ids ...uint64) []*kvpb.SnapshotRecord {
		return with(func(h *kvpb.SnapshotHeader) { h.ConfState, h.Members, h.Proposers = cs, plainMembers(ids...), nil })
	}
	valid := map[string][]*kvpb.SnapshotRecord{
		"empty":    {header, footerRecord(0)},
		"keys":     {headerOf(0, 2), keyRecord(low, 9), keyRecord(high, 1), footerRecord(2)},
		"sessions": {headerOf(2, 1), sessionRecord(1, 0), sessionRecord(9, 1024, answersTo(1, 1024)...), keyRecord(low, 9), footerRecord(1)},
		"owners": {
			headerOf(5, 0), sessionRecord(4, 0), sessionRecord(9, 1, answersTo(1)...), ownedRecord("admin", 5, 1, answersTo(1)...),
			ownedRecord("client/shop", 1, 0), ownedRecord("client/shop", 7, 1, answersTo(1)...), footerRecord(0),
		},
		"highest session":    {headerOf(1, 0), sessionRecord(1<<64-1, 1<<64-1, answersTo(1<<64-1024, 1<<64-1)...), footerRecord(0)},
		"failed compare":     {headerOf(1, 0), sessionRecord(9, 7, &kvpb.Answer{Sequence: 7, CompareFailed: true}), footerRecord(0)},
		"most removed":       with(func(h *kvpb.SnapshotHeader) { h.Removed = make([]uint64, maxRemoved) }),
		"no proposers":       with(func(h *kvpb.SnapshotHeader) { h.Proposers = nil }),
		"one node twice":     with(func(h *kvpb.SnapshotHeader) { h.Members[2].Node = plainNode(1) }),
		"joint":              conf(&kvpb.ConfState{Voters: []uint64{1, 3}, VotersOutgoing: []uint64{1, 2}}, 1, 2, 3),
		"joint, auto-leave":  conf(&kvpb.ConfState{Voters: []uint64{3}, VotersOutgoing: []uint64{1, 2}, AutoLeave: true}, 1, 2, 3),
		"joint, learners":    conf(&kvpb.ConfState{Voters: []uint64{1}, VotersOutgoing: []uint64{1, 2}, Learners: []uint64{3}, LearnersNext: []uint64{2}}, 1, 2, 3),
		"order of no matter": conf(&kvpb.ConfState{Voters: []uint64{3, 1, 2}}, 2, 1, 3),
	}
	for name, records := range valid {
		s, err := readSnapshot(bytes.NewReader(recordBytes(t, records...)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		contents(t, s)
	}
	for name, records := range map[string][]*kvpb.SnapshotRecord{
		"nothing":                {},
		"no header":              {footerRecord(0)},
		"no level":               with(func(h *kvpb.SnapshotHeader) { h.Level = 0 }),
		"a newer level":          with(func(h *kvpb.SnapshotHeader) { h.Level = programLevel + 1 }),
		"an unknown field":       with(func(h *kvpb.SnapshotHeader) { h.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) }),
		"key for a header":       {keyRecord(low, 1), footerRecord(1)},
		"empty record":           {{}, footerRecord(0)},
		"empty record later":     {header, {}, footerRecord(0)},
		"header only":            {header},
		"no footer":              {headerOf(0, 1), keyRecord(low, 1)},
		"two headers":            {header, header, footerRecord(0)},
		"footer too high":        {headerOf(0, 1), keyRecord(low, 1), footerRecord(2)},
		"footer too low":         {headerOf(0, 1), keyRecord(low, 1), footerRecord(0)},
		"two footers":            {header, footerRecord(0), footerRecord(0)},
		"key after the footer":   {header, footerRecord(0), keyRecord(low, 1)},
		"keys out of order":      {headerOf(0, 2), keyRecord(high, 1), keyRecord(low, 2), footerRecord(2)},
		"key twice":              {headerOf(0, 2), keyRecord(low, 1), keyRecord(low, 1), footerRecord(2)},
		"key twice, once count":  {headerOf(0, 1), keyRecord(low, 1), keyRecord(low, 2), footerRecord(1)},
		"empty key":              {headerOf(0, 1), keyRecord("", 1), footerRecord(1)},
		"key too long":           {headerOf(0, 1), keyRecord(strings.Repeat("k", maxKeyBytes+1), 1), footerRecord(1)},
		"value too long":         {headerOf(0, 1), valueRecord("k", maxValueBytes+1), footerRecord(1)},
		"version too high":       {headerOf(0, 1), keyRecord(low, 10), footerRecord(1)},
		"version 0":              {headerOf(0, 1), keyRecord(low, 0), footerRecord(1)},
		"header with more keys":  {headerOf(0, 2), keyRecord(low, 1), footerRecord(1)},
		"header with fewer":      {headerOf(0, 0), keyRecord(low, 1), footerRecord(1)},
		"session missing":        {headerOf(2, 0), sessionRecord(9, 0), footerRecord(0)},
		"session too many":       {headerOf(0, 0), sessionRecord(9, 0), footerRecord(0)},
		"session behind a key":   {headerOf(1, 1), keyRecord(low, 1), sessionRecord(9, 0), footerRecord(1)},
		"session 0":              {headerOf(1, 0), sessionRecord(0, 0), footerRecord(0)},
		"unused behind used":     {headerOf(2, 0), sessionRecord(9, 1, answersTo(1)...), sessionRecord(1, 0), footerRecord(0)},
		"owner's unused later":   {headerOf(2, 0), ownedRecord("client", 9, 1, answersTo(1)...), ownedRecord("client", 1, 0), footerRecord(0)},
		"owners out of order":    {headerOf(2, 0), ownedRecord("client", 9, 0), ownedRecord("admin", 1, 0), footerRecord(0)},
		"owner of none later":    {headerOf(2, 0), ownedRecord("client", 9, 0), sessionRecord(1, 0), footerRecord(0)},
		"owner who is nobody":    {headerOf(1, 0), ownedRecord("client/", 9, 0), footerRecord(0)},
		"session twice":          {headerOf(2, 0), sessionRecord(9, 0), sessionRecord(9, 0), footerRecord(0)},
		"sequence 0":             {headerOf(1, 0), sessionRecord(9, 1, answersTo(0, 1)...), footerRecord(0)},
		"sequences out of order": {headerOf(1, 0), sessionRecord(9, 1, answersTo(2, 1)...), footerRecord(0)},
		"sequence twice":         {headerOf(1, 0), sessionRecord(9, 1, answersTo(1, 1)...), footerRecord(0)},
		"highest is not there":   {headerOf(1, 0), sessionRecord(9, 2, answersTo(1)...), footerRecord(0)},
		"highest of none":        {headerOf(1, 0), sessionRecord(9, 1), footerRecord(0)},
		"below the window":       {headerOf(1, 0), sessionRecord(9, 1025, answersTo(1, 1025)...), footerRecord(0)},
		"answer's version":       {headerOf(1, 0), sessionRecord(9, 1, &kvpb.Answer{Sequence: 1, Version: 10}), footerRecord(0)},
		"answer without one":     {headerOf(1, 0), sessionRecord(9, 1, &kvpb.Answer{Sequence: 1}), footerRecord(0)},
		"format 0":               with(func(h *kvpb.SnapshotHeader) { h.Format = 0 }),
		"format 2":               with(func(h *kvpb.SnapshotHeader) { h.Format = 2 }),
		"format 4":               with(func(h *kvpb.SnapshotHeader) { h.Format = 4 }),
		"voter to be promoted":   with(func(h *kvpb.SnapshotHeader) { h.Members[0].Promote = true }),
		"member of an Init":      with(func(h *kvpb.SnapshotHeader) { h.Founding = []*kvpb.Node{{Address: "a:1"}} }),
		"members of an Init": with(func(h *kvpb.SnapshotHeader) {
			h.Founding = slices.Repeat([]*kvpb.Node{{Id: 1, Address: "a:1"}}, maxMembers+1)
		}),
		"no cluster":            with(func(h *kvpb.SnapshotHeader) { h.ClusterId = 0 }),
		"no index":              with(func(h *kvpb.SnapshotHeader) { h.Index = 0 }),
		"no term":               with(func(h *kvpb.SnapshotHeader) { h.Term = 0 }),
		"too many former":       with(func(h *kvpb.SnapshotHeader) { h.Former = slices.Repeat([]uint64{1}, maxRemoved+1) }),
		"a former member 0":     with(func(h *kvpb.SnapshotHeader) { h.Former = []uint64{0} }),
		"too many removed":      with(func(h *kvpb.SnapshotHeader) { h.Removed = make([]uint64, maxRemoved+1) }),
		"member 0":              with(func(h *kvpb.SnapshotHeader) { h.Members[2].RaftId = 0 }),
		"member without node":   with(func(h *kvpb.SnapshotHeader) { h.Members[2].Node = nil }),
		"member with node 0":    with(func(h *kvpb.SnapshotHeader) { h.Members[2].Node.Id = 0 }),
		"member twice":          with(func(h *kvpb.SnapshotHeader) { h.Members = append(h.Members, h.Members[2]) }),
		"member too many":       with(func(h *kvpb.SnapshotHeader) { h.Members = plainMembers(1, 2, 3, 4) }),
		"member missing":        with(func(h *kvpb.SnapshotHeader) { h.Members = plainMembers(1, 2) }),
		"other member":          with(func(h *kvpb.SnapshotHeader) { h.Members = plainMembers(1, 2, 4) }),
		"proposer no member":    with(func(h *kvpb.SnapshotHeader) { h.Proposers[0].RaftId = 4 }),
		"proposer 0":            with(func(h *kvpb.SnapshotHeader) { h.Proposers[0].RaftId = 0 }),
		"no configuration":      conf(nil),
		"no voters":             conf(&kvpb.ConfState{Learners: []uint64{1}}, 1),
		"voter 0":               conf(&kvpb.ConfState{Voters: []uint64{0, 1}}, 1),
		"voter twice":           conf(&kvpb.ConfState{Voters: []uint64{1, 1}}, 1),
		"voter and learner":     conf(&kvpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{2}}, 1, 2),
		"auto-leave, not joint": conf(&kvpb.ConfState{Voters: []uint64{1}, AutoLeave: true}, 1),
		"next, not joint":       conf(&kvpb.ConfState{Voters: []uint64{1}, LearnersNext: []uint64{2}}, 1, 2),
		"next, not outgoing":    conf(&kvpb.ConfState{Voters: []uint64{1}, VotersOutgoing: []uint64{1}, LearnersNext: []uint64{2}}, 1, 2),
		"joint without voters":  conf(&kvpb.ConfState{VotersOutgoing: []uint64{1}}, 1),
		"learner and outgoing":  conf(&kvpb.ConfState{Voters: []uint64{1}, VotersOutgoing: []uint64{1, 2}, Learners: []uint64{2}}, 1, 2),
	} {
		if _, err := readSnapshot(bytes.NewReader(recordBytes(t, records...))); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	b := recordBytes(t, valid["keys"]...)
	if _, err := readSnapshot(bytes.NewReader(append(slices.Clone(b), 0))); err == nil {
		t.Error("a byte behind the footer: accepted")
	}
	if _, err := readSnapshot(io.MultiReader(bytes.NewReader(b), iotestError{})); err == nil {
		t.Error("an error behind the footer: taken for the end")
	}
	for i := range b {
		if _, err := readSnapshot(bytes.NewReader(b[:i])); err == nil {
			t.Errorf("cut at byte %d of %d: accepted", i, len(b))
		} else if !strings.Contains(err.Error(), io.ErrUnexpectedEOF.Error()) {
			t.Errorf("cut at byte %d of %d: %v", i, len(b), err)
		}
	}
}

type iotestError struct{}

func (iotestError) Read([]byte) (int, error) { return 0, io.ErrNoProgress }

// Every flipped bit is refused.
func TestSnapshotBitFlips(t *testing.T) {
	b := realSnapshots(t)[1]
	for i := range b {
		for bit := range 8 {
			flipped := slices.Clone(b)
			flipped[i] ^= 1 << bit
			if _, err := readSnapshot(bytes.NewReader(flipped)); err == nil {
				t.Errorf("bit %d of byte %d: accepted", bit, i)
			}
		}
	}
}

// maxAllocated bounds what reading n bytes allocates: an empty store, one
// record that is announced but does not come, and what protobuf makes of the rest.
func maxAllocated(n int) uint64 { return maxRecordBytes + 2<<20 + 128*uint64(n) }

func TestSnapshotAllocation(t *testing.T) {
	header := unframed(t, recordBytes(t, headerRecord(func(*kvpb.SnapshotHeader) {})))
	for _, size := range []uint64{maxRecordBytes, maxRecordBytes + 1, 1 << 31, 1 << 40, 1<<63 - 1, 1<<64 - 1} {
		for _, prefix := range [][]byte{nil, header} {
			b := framed(append(protowire.AppendVarint(slices.Clone(prefix), size), "some bytes"...))
			var err error
			if n := allocated(func() { _, err = readSnapshot(bytes.NewReader(b)) }); err == nil || n > maxAllocated(len(b)) {
				t.Errorf("a record of %d bytes: %v, %d bytes were allocated", size, err, n)
			}
		}
	}
}

func FuzzReadSnapshot(f *testing.F) {
	for _, b := range realSnapshots(f) {
		f.Add(b)
	}
	header := headerRecord(func(*kvpb.SnapshotHeader) {})
	f.Add(recordBytes(f, headerOf(0, 1), keyRecord("a", 1), footerRecord(1)))
	f.Add(recordBytes(f, headerOf(2, 1), sessionRecord(1, 0), sessionRecord(9, 1024, answersTo(1, 5, 1024)...), keyRecord("a", 1), footerRecord(1)))
	f.Add(recordBytes(f, header, footerRecord(0)))
	f.Add(framed(protowire.AppendVarint(unframed(f, recordBytes(f, header)), maxRecordBytes)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 16 { // with the right checksum, or hardly anything gets further
			binary.LittleEndian.PutUint32(b[8:], uint32(min(len(b)-16, maxFrameBytes-frameHeaderBytes)))
			binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b[16:][:binary.LittleEndian.Uint32(b[8:])], castagnoli))
		}
		var s *store
		var err error
		if n := allocated(func() { s, err = readSnapshot(bytes.NewReader(b)) }); n > maxAllocated(len(b)) {
			t.Errorf("%d bytes made it allocate %d", len(b), n)
		}
		if err != nil {
			return
		}
		items := contents(t, s)
		again := snapshotBytes(t, s)
		s2, err := readSnapshot(bytes.NewReader(again))
		if err != nil {
			t.Fatalf("it was accepted, but not when written again: %v", err)
		}
		if !sameItems(contents(t, s2), items) || !bytes.Equal(snapshotBytes(t, s2), again) {
			t.Error("written again, it is another store")
		}
	})
}

// What is written without messages is what protobuf makes of them.
func TestAppendKeyValue(t *testing.T) {
	for _, it := range []keyItem{
		{[]byte("k"), item{nil, 1}}, {[]byte("käse"), item{[]byte("v"), 300}},
		{bytes.Repeat([]byte("k"), maxKeyBytes), item{bytes.Repeat([]byte("\xff"), maxValueBytes), 1<<64 - 1}},
		{bytes.Repeat([]byte("k"), 126), item{bytes.Repeat([]byte("v"), 127), 1 << 35}},
	} {
		rec := &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_KeyValue{KeyValue: &kvpb.KeyValue{Key: string(it.key), Value: it.value, Version: it.version}}}
		var want bytes.Buffer
		if _, err := protodelim.MarshalTo(&want, rec); err != nil {
			t.Fatal(err)
		}
		if got := appendKeyValue(nil, it); !bytes.Equal(got, want.Bytes()) {
			t.Errorf("%.10q: %x, want %x", it.key, got[:10], want.Bytes()[:10])
		}
		b := mustMarshal(t, rec)
		if got, ok := parseKeyValue(b); !ok || !bytes.Equal(got.key, it.key) || !bytes.Equal(got.value, it.value) || got.version != it.version {
			t.Errorf("%.10q is not parsed", it.key)
		}
		for _, bad := range [][]byte{b[:len(b)-1], append(bytes.Clone(b), 0), append(bytes.Clone(b), b...)} {
			if _, ok := parseKeyValue(bad); ok {
				t.Errorf("%.10q: what is malformed is parsed", it.key)
			}
		}
	}
	key := &kvpb.KeyValue{Key: "k", Version: 1}
	key.ProtoReflect().SetUnknown([]byte{9 << 3, 1}) // of a newer version
	if _, ok := parseKeyValue(mustMarshal(t, &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_KeyValue{KeyValue: key}})); ok {
		t.Error("a field that this node does not know is passed over")
	}
	if _, ok := parseKeyValue([]byte{2<<3 | 2, 3, 1<<3 | 2, 1, 0xff}); ok {
		t.Error("a key that is not UTF-8 is taken")
	}
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
