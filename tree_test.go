package main

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// checkTree looks whether a tree is as it has to be: its pages in order and of their sizes,
// and all that it has is in want.
func checkTree(t testing.TB, root *page, want map[string]item) {
	t.Helper()
	depth := -1
	var walk func(p *page, level int, from, to []byte)
	walk = func(p *page, level int, from, to []byte) {
		if p != root && p.count() < p.leastCells() {
			t.Fatalf("a page has %d cells", p.count())
		}
		size := 0
		for i := range p.count() {
			size += p.cellSize(i)
			key := p.key(i)
			isFirst := i == 0 && !p.isLeaf()
			if isFirst != (len(key) == 0 && !p.isLeaf()) {
				t.Fatalf("cell %d of a branch has the key %q", i, key)
			}
			if i > 0 && bytes.Compare(p.key(i-1), key) >= 0 {
				t.Fatalf("%q is followed by %q", p.key(i-1), key)
			}
			isOutside := bytes.Compare(key, from) < 0 || to != nil && bytes.Compare(key, to) >= 0
			if !isFirst && isOutside {
				t.Fatalf("%q is in a page from %q to %q", key, from, to)
			}
		}
		if size != p.size() || len(p.data) > 512 && p.gone > len(p.data)/3 {
			t.Fatalf("the cells take %d of %d bytes, %d are gone", size, len(p.data), p.gone)
		}
		if !p.isLeaf() {
			for i, child := range p.children {
				low, high := p.key(i), to
				if i == 0 {
					low = from
				}
				if i+1 < len(p.children) {
					high = p.key(i + 1)
				}
				walk(child, level+1, low, high)
			}
			return
		}
		if depth >= 0 && depth != level {
			t.Fatalf("leaves at the levels %d and %d", depth, level)
		}
		depth = level
		for i := range p.count() {
			if p.marks[i] != markOf(p.key(i)) {
				t.Fatalf("%q has the mark %d", p.key(i), p.marks[i])
			}
		}
	}
	walk(root, 0, nil, nil)
	got := 0
	v := treeView{root: root}
	for key, it := range v.from(nil) {
		w, ok := want[string(key)]
		if !ok || w.version != it.version || !bytes.Equal(w.value, it.value) {
			t.Fatalf("%q has version %d, want %d (%v)", key, it.version, w.version, ok)
		}
		got++
	}
	if got != len(want) {
		t.Fatalf("%d keys, want %d", got, len(want))
	}
}

// treeRun compares a tree and views of it with maps.
type treeRun struct {
	t     *testing.T
	tree  *tree
	want  map[string]item
	views []treeViewRun
	next  uint64
}

type treeViewRun struct {
	view treeView
	want map[string]item
}

func newTreeRun(t *testing.T) *treeRun {
	return &treeRun{t: t, tree: newTree(), want: map[string]item{}}
}

func (r *treeRun) set(key string, value []byte) {
	r.next++
	_, was := r.want[key]
	if found := r.tree.set([]byte(key), item{value, r.next}); found != was {
		r.t.Fatalf("set %q: found %v, want %v", key, found, was)
	}
	r.want[key] = item{bytes.Clone(value), r.next}
}

func (r *treeRun) delete(key string) {
	_, was := r.want[key]
	if found := r.tree.delete([]byte(key)); found != was {
		r.t.Fatalf("delete %q: found %v, want %v", key, found, was)
	}
	delete(r.want, key)
}

func (r *treeRun) deleteRange(start, end string) {
	keys := keyRange{start: []byte(start), end: []byte(end)}
	r.tree.deleteRange(keys)
	for key := range r.want {
		if keys.has([]byte(key)) {
			delete(r.want, key)
		}
	}
}

func (r *treeRun) get(key string) {
	it, found := r.tree.get([]byte(key))
	want, was := r.want[key]
	if found != was || it.version != want.version || !bytes.Equal(it.value, want.value) {
		r.t.Fatalf("get %q: version %d, %v; want %d, %v", key, it.version, found, want.version, was)
	}
}

func (r *treeRun) open() {
	r.views = append(r.views, treeViewRun{r.tree.view(), maps.Clone(r.want)})
	r.tree.counted = r.tree.epoch
}

func (r *treeRun) check() {
	r.t.Helper()
	size := uint64(0)
	for k, it := range r.want {
		size += uint64(len(k) + len(it.value))
	}
	if r.tree.keys != uint64(len(r.want)) || r.tree.bytes != size {
		r.t.Fatalf("%d keys, %d bytes, want %d, %d", r.tree.keys, r.tree.bytes, len(r.want), size)
	}
	checkTree(r.t, r.tree.root, r.want)
	for _, v := range r.views {
		checkTree(r.t, v.view.root, v.want)
		if v.view.keys != uint64(len(v.want)) {
			r.t.Fatalf("a view has %d keys, want %d", v.view.keys, len(v.want))
		}
	}
}

// TestTree compares trees with maps, with keys and values of all lengths and up to four views.
func TestTree(t *testing.T) {
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := newTreeRun(t)
		long := seed%4 == 3 // keys that fill pages
		key := func() string {
			k := fmt.Sprintf("%0*d", 1+rng.IntN(8), rng.IntN(2000))
			if long && rng.IntN(4) == 0 {
				k = strings.Repeat(k, 1+rng.IntN(maxKeyBytes/len(k)))
			}
			return k
		}
		value := func() []byte {
			n := rng.IntN(64)
			switch rng.IntN(50) {
			case 0:
				n = maxPacked + rng.IntN(2)
			case 1:
				n = rng.IntN(8 << 10)
			}
			return bytes.Repeat([]byte{byte(rng.IntN(256))}, n)
		}
		sets := 3 + rng.IntN(6) // of 10: trees grow in some runs, and shrink in others
		ascending := 0
		steps := 6000
		if long {
			steps = 1500
		}
		for step := range steps {
			switch n := rng.IntN(10); {
			case seed%5 == 4 && n < 5:
				ascending++
				r.set(fmt.Sprintf("a%09d", ascending), value())
			case n < sets:
				r.set(key(), value())
			default:
				r.delete(key())
			}
			r.get(key())
			if rng.IntN(300) == 0 {
				start, end := key(), key()
				r.deleteRange(min(start, end), max(start, end))
			}
			if rng.IntN(200) == 0 {
				r.open()
				if len(r.views) > 4 {
					r.views = slices.Delete(r.views, 0, 1)
				}
			}
			if step%500 == 499 {
				r.check()
			}
			if step == steps/2 {
				sets = 9 - sets
			}
		}
		for k := range maps.Clone(r.want) {
			r.delete(k)
		}
		r.check()
		if r.tree.root.count() != 0 || !r.tree.root.isLeaf() {
			t.Fatalf("an empty tree has a root with %d cells", r.tree.root.count())
		}
	}
}

// FuzzTree has the fuzzer choose keys, values and when views are opened.
func FuzzTree(f *testing.F) {
	f.Add([]byte("\x00\x01a\x00\x02b\x01\x01\x02\x03"))
	f.Fuzz(func(t *testing.T, script []byte) {
		r := newTreeRun(t)
		take := func() int {
			if len(script) == 0 {
				return 0
			}
			b := int(script[0])
			script = script[1:]
			return b
		}
		for len(script) > 0 && r.next < 2000 {
			op, a, b := take(), take(), take()
			key := strings.Repeat(string(rune('a'+a%16)), 1+a/16) + fmt.Sprint(b%32)
			if op&0x80 != 0 {
				key = strings.Repeat(key, min(1+b*8, maxKeyBytes/len(key)))
			}
			switch op % 8 {
			case 0, 1, 2:
				r.set(key, bytes.Repeat([]byte{byte(a)}, b))
			case 3:
				r.set(key, bytes.Repeat([]byte{byte(a)}, b*16))
			case 4:
				r.delete(key)
			case 5:
				r.deleteRange(key, key+"5")
			case 6:
				r.get(key)
			case 7:
				r.open()
				if len(r.views) > 4 {
					r.views = r.views[1:]
				}
			}
		}
		r.check()
	})
}

// TestTreeReplaced counts the memory that views keep.
func TestTreeReplaced(t *testing.T) {
	r := newTreeRun(t)
	large := make([]byte, 100<<10)
	r.set("large", large)
	r.set("small", []byte("s"))
	for range 10 {
		r.set("large", large)
		r.set("small", []byte("s"))
	}
	if r.tree.kept != 0 {
		t.Errorf("%d bytes are kept without a view", r.tree.kept)
	}
	r.open()
	for range 10 {
		r.set("large", large)
	}
	if n := r.tree.kept; n < uint64(len(large)) || n > uint64(len(large))+4<<10 {
		t.Errorf("a view keeps %d bytes, want one value and one page", n)
	}
	r.check()
}

// TestTreeCountsAllThatViewsKeep deletes all keys, in both orders, whatever pages that merges.
func TestTreeCountsAllThatViewsKeep(t *testing.T) {
	for _, order := range []string{"ascending", "descending", "from the middle", "at once"} {
		r := newTreeRun(t)
		var keys []string
		for i := range 3000 {
			keys = append(keys, fmt.Sprintf("%05d", i))
			r.set(keys[i], make([]byte, 100))
		}
		r.open()
		kept := uint64(0)
		var walk func(p *page)
		walk = func(p *page) {
			kept += p.memory()
			for _, child := range p.children {
				walk(child)
			}
		}
		walk(r.views[0].view.root)
		switch order {
		case "descending":
			slices.Reverse(keys)
		case "from the middle":
			keys = append(keys[1500:], keys[:1500]...)
		}
		if order == "at once" {
			r.deleteRange("0", "9")
		} else {
			for _, key := range keys {
				r.delete(key)
			}
		}
		if r.tree.kept != kept {
			t.Errorf("%s: the view keeps %d bytes, %d are counted", order, kept, r.tree.kept)
		}
		r.check()
	}
}
