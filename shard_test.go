package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protodelim"

	"raft-key-value/kvpb"
)

// checkShard checks what must hold for every shard.
func checkShard(t testing.TB, sh *shard) {
	t.Helper()
	live, gone := 0, 0
	for at := 0; at < len(sh.data); {
		key, it, next := sh.unpack(at)
		if it.version == 0 {
			gone += next - at
		} else if live++; int(sh.index[hashOf(key)]) != at {
			t.Fatalf("%q is at %d, its index says %d", key, at, sh.index[hashOf(key)])
		}
		at = next
	}
	if live != len(sh.index) || gone != sh.gone || gone > len(sh.data)/2 || len(sh.data)-gone > maxShardData {
		t.Fatalf("%d keys, %d bytes of %d gone; it counts %d keys, %d bytes", live, gone, len(sh.data), len(sh.index), sh.gone)
	}
	for _, it := range sh.rest {
		if it.version == 0 {
			t.Fatal("what is gone is in rest")
		}
	}
}

// all yields all keys.
func (sh *shard) all(yield func(key []byte, it item) bool) {
	for key, it := range sh.packed {
		if !yield(key, it) {
			return
		}
	}
	for key, it := range sh.others {
		if !yield(key, it) {
			return
		}
	}
}

// shardWrites are writes to a shard, as a store makes them, and their model.
type shardWrites struct {
	t     *testing.T
	sh    shard
	model map[string]item
}

func (w *shardWrites) set(key string, value []byte) {
	k := []byte(key)
	it := item{value, w.model[key].version + 1}
	if old, at, found := w.sh.find(hashOf(k), k); found {
		w.sh.replace(hashOf(k), k, at, old, it)
	} else {
		w.sh.add(hashOf(k), k, it)
	}
	w.model[key] = item{bytes.Clone(value), it.version}
	clear(value) // its caller uses it again
	clear(k)
}

func (w *shardWrites) remove(key string) {
	if _, at, found := w.sh.find(hashOf([]byte(key)), []byte(key)); found {
		w.sh.remove(hashOf([]byte(key)), []byte(key), at)
	}
	delete(w.model, key)
}

func (w *shardWrites) check() {
	w.t.Helper()
	checkShard(w.t, &w.sh)
	got := map[string]item{}
	for key, it := range w.sh.all {
		if _, twice := got[string(key)]; twice {
			w.t.Fatalf("%q is there twice", key)
		}
		got[string(key)] = it.kept()
	}
	if !sameItems(got, w.model) {
		w.t.Fatalf("%d keys are not those of the model, %d", len(got), len(w.model))
	}
	for key, want := range w.model {
		if it, _, found := w.sh.find(hashOf([]byte(key)), []byte(key)); !found || it.version != want.version || !bytes.Equal(it.value, want.value) {
			w.t.Fatalf("%q is %v, want %v", key, it, want)
		}
	}
	if _, _, found := w.sh.find(hashOf([]byte("none")), []byte("none")); found {
		w.t.Fatal("it has found what is not there")
	}
}

func TestShard(t *testing.T) {
	for seed := range uint64(4) {
		r := seededRand(seed)
		w := &shardWrites{t: t, model: map[string]item{}}
		sizes := []int{0, 1, 100, 100, maxPacked, maxPacked + 1}
		for i := range 4000 {
			key := strings.Repeat("k", 1+r.IntN(3)) + fmt.Sprint(r.IntN(50))
			if r.IntN(4) == 0 {
				w.remove(key)
			} else {
				w.set(key, bytes.Repeat([]byte{byte(i)}, sizes[r.IntN(len(sizes))]))
			}
			if i%10 == 0 {
				w.check()
			}
		}
		for key := range maps.Clone(w.model) {
			w.remove(key)
		}
		if w.check(); len(w.sh.data) != 0 || w.sh.index != nil {
			t.Errorf("an empty shard has %d bytes, and an index %v", len(w.sh.data), w.sh.index != nil)
		}
	}
}

// A shard's data has an end, and what does not fit is kept beside it.
func TestShardIsFull(t *testing.T) {
	w := &shardWrites{t: t, model: map[string]item{}}
	for i := range 2 * maxShardData / maxPacked {
		w.set(fmt.Sprint("key ", i), bytes.Repeat([]byte{byte(i)}, maxPacked))
	}
	if w.check(); len(w.sh.rest) < maxShardData/maxPacked/2 || len(w.sh.data) < maxShardData-2*maxPacked {
		t.Errorf("it has %d bytes, and %d keys beside them", len(w.sh.data), len(w.sh.rest))
	}
	for i := range maxShardData / maxPacked { // they make room for others
		w.remove(fmt.Sprint("key ", i))
	}
	w.check()
	before := len(w.sh.rest)
	w.set("late", make([]byte, maxPacked))
	w.set(fmt.Sprint("key ", 2*maxShardData/maxPacked-1), make([]byte, maxPacked-1))
	if w.check(); len(w.sh.rest) != before-1 {
		t.Errorf("%d keys are beside it, want %d", len(w.sh.rest), before-1)
	}
}

// Two keys of one hash: nobody can find such, so the test says what a hash is.
func TestShardCollision(t *testing.T) {
	for _, second := range []string{"b", "longer"} {
		var sh shard
		a, b := []byte("a"), []byte(second)
		want := func(key []byte, value string) {
			t.Helper()
			if it, _, found := sh.find(7, key); found != (value != "") || string(it.value) != value {
				t.Errorf("%q is %q, %v, want %q", key, it.value, found, value)
			}
		}
		put := func(key []byte, value string) {
			if old, at, found := sh.find(7, key); found {
				sh.replace(7, key, at, old, item{[]byte(value), 2})
			} else {
				sh.add(7, key, item{[]byte(value), 1})
			}
		}
		del := func(key []byte) {
			_, at, _ := sh.find(7, key)
			sh.remove(7, key, at)
		}
		put(a, "1")
		want(b, "")
		put(b, "2")
		put(b, "3")
		want(a, "1")
		want(b, "3")
		put(a, "one")
		want(a, "one")
		want(b, "3")
		del(a)
		want(a, "")
		want(b, "3")
		put(a, "again")
		del(b)
		want(a, "again")
		want(b, "")
	}
}

// What a reader, a view or a session has been given stays as it is.
func TestValuesAreKept(t *testing.T) {
	s := newTestStore()
	applyBatch(t, s, 1, 1, setWrite("k", "old"))
	it, _, _ := s.get([]byte("k"))
	v := s.openView()
	defer v.close()
	i := shardOf("k")
	everything := func([]byte) bool { return true }
	before := v.shard(i, make([]byte, 0, 1<<10), everything)[0]
	without := v.shard(i, nil, everything)[0]
	data := mustMarshal(t, &kvpb.Batch{Proposer: 1, Sequence: 2, Writes: []*kvpb.Write{setWrite("k", "new"), setWrite("long", strings.Repeat("x", maxPacked+1))}})
	if _, _, _, err := s.apply(data); err != nil {
		t.Fatal(err)
	}
	clear(data) // of a log that has been compacted
	after := v.shard(i, nil, everything)[0]
	for _, got := range []item{it, before.item, without.item, after.item} {
		if string(got.value) != "old" || got.version != 1 {
			t.Errorf("%q of version %d, want old", got.value, got.version)
		}
	}
	for key, want := range map[string]string{"k": "new", "long": strings.Repeat("x", maxPacked+1)} {
		if it, _, _ := s.get([]byte(key)); string(it.value) != want {
			t.Errorf("%q is %q", key, it.value)
		}
	}
	// Keys, too, when others take their place.
	keys := crowded()
	for n, room := range [][]byte{nil, make([]byte, 0, 1<<10)} {
		var sets, deletes []*kvpb.Write
		for _, key := range keys {
			sets, deletes = append(sets, setWrite(key, key)), append(deletes, deleteWrite(key))
		}
		applyBatch(t, s, 1, 10+2*uint64(n), sets...)
		v := s.openView()
		items := v.shard(shardOf(keys[0]), room, everything)
		v.close()
		applyBatch(t, s, 1, 11+2*uint64(n), append(deletes, sets[5], sets[4])...)
		for _, it := range items {
			if string(it.key) != string(it.value) {
				t.Errorf("the key of %q is %q", it.value, it.key)
			}
		}
	}
}

// A view copies what a page needs, whatever it has.
func TestViewPageSizes(t *testing.T) {
	s := newTestStore()
	value := strings.Repeat("v", maxPacked)
	var keys []string
	for i := range 40 {
		var ws []*kvpb.Write
		for j := range 500 {
			keys = append(keys, fmt.Sprintf("k%02d %03d", i, j))
			ws = append(ws, setWrite(keys[len(keys)-1], value))
		}
		applyBatch(t, s, 1, uint64(i)+1, ws...)
	}
	v := s.openView()
	defer v.close()
	const maxBytes = 100 << 10
	size := maxPacked + len(keys[0])
	var page []keyItem
	var more bool
	if n := allocated(func() { page, more = v.page("k", "", 10_000, maxBytes) }); n > 8<<20 {
		t.Errorf("%d bytes were copied for a page of %d", n, maxBytes)
	}
	var got []string
	for _, it := range page {
		got = append(got, string(it.key))
	}
	if !more || !slices.Equal(got, keys[:maxBytes/size]) {
		t.Errorf("%d keys, more %v, want %d", len(got), more, maxBytes/size)
	}
	// Small and large values, in no order of size: each page takes all that fits.
	r := seededRand(1)
	sizes := map[string]int{}
	for i := range 2000 {
		key := fmt.Sprintf("m%04d", i)
		sizes[key] = []int{10, maxPacked, 30 << 10}[r.IntN(3)]
		applyBatch(t, s, 1, 100+uint64(i), setWrite(key, strings.Repeat("v", sizes[key])))
	}
	w := s.openView()
	defer w.close()
	keys = slices.Sorted(maps.Keys(sizes))
	for after := ""; len(keys) > 0; {
		fit, size := 0, 0
		for fit < len(keys) && size+len(keys[fit])+sizes[keys[fit]] <= maxBytes {
			size += len(keys[fit]) + sizes[keys[fit]]
			fit++
		}
		page, more := w.page("m", after, 10_000, maxBytes)
		if len(page) != fit || more != (fit < len(keys)) || string(page[fit-1].key) != keys[fit-1] {
			t.Fatalf("%d keys after %q, more %v, want %d of %d", len(page), after, more, fit, len(keys))
		}
		after, keys = keys[fit-1], keys[fit:]
	}
}

// What of a shard is not in its data may be large, and is not copied to be looked at.
func TestLargeKeysAreNotCopied(t *testing.T) {
	s := newTestStore()
	long := strings.Repeat("k", maxKeyBytes-8)
	for i := range uint64(400) {
		applyBatch(t, s, 1, 1+i, setWrite(fmt.Sprintf("%s%04d", long, i), strings.Repeat("v", maxPacked+1)))
	}
	v := s.openView()
	defer v.close()
	page := func(prefix string, limit int) func() {
		return func() {
			if items, _ := v.page(prefix, "", limit, 1<<20); len(items) != limit {
				t.Errorf("%d items", len(items))
			}
		}
	}
	for what, f := range map[string]func(){"no key": page("none", 0), "a key": page("k", 1), "a snapshot": func() {
		if err := v.writeTo(io.Discard); err != nil {
			t.Error(err)
		}
	}} {
		if n := allocated(f); n > 3<<20 {
			t.Errorf("%s: %d bytes were copied", what, n)
		}
	}
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
