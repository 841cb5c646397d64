// Trees: the keys of a store in order, with views that cost nothing until something is written.

package main

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"iter"
	"slices"
)

const (
	// maxPageBytes is what the cells of a page take before it is split. With less there are
	// more pages for the garbage collector to look at; with more, the first write to a page
	// after a view was opened copies more.
	maxPageBytes = 8 << 10
	// maxPacked is the largest value that is packed into a page. A larger one has memory of
	// its own, which is never changed.
	maxPacked = 1 << 10
	// versionBytes of a leaf's cell stand before the value.
	versionBytes = 8
)

// item is a value and the version of the write that set it. A new field has to go through
// versionBytes, item, setItem, addItem and takeAll here, and through snapshotformat.go.
type item struct {
	value   []byte
	version uint64
}

// keyItem is an item with its key.
type keyItem struct {
	key []byte
	item
}

// kept returns an item of a tree that the tree's next writes do not change.
func (it item) kept() item {
	if len(it.value) <= maxPacked {
		it.value = bytes.Clone(it.value)
	}
	return it
}

// markSeed keeps clients from choosing keys that all have the same mark.
var markSeed = maphash.MakeSeed()

// markOf is a byte of a key's hash.
func markOf(key []byte) byte { return byte(maphash.Bytes(markSeed, key)) }

// page is a leaf or a branch of a B+tree. A leaf has a cell for each key, with its version
// and its value. A branch has a cell for each child, with the lowest key that the child may
// have; the first one's is empty.
type page struct {
	epoch uint64 // of the tree, when the page was made: see tree.own
	cells
	children []*page // of a branch, by cell
	marks    []byte  // of a leaf, by cell: markOf its key, so that most cells need no look
	// large is of a leaf, by cell: its value, if that is over maxPacked, else nil. If it is nil, no
	// cell has one.
	large []*largeValue
}

func (p *page) isLeaf() bool { return p.children == nil }

// leastCells is how many cells a page has at least, unless it is the root. Of a branch they are
// two, or keys of the greatest length would make the tree higher without end.
func (p *page) leastCells() int {
	if p.isLeaf() {
		return 1
	}
	return 2
}

// childOf returns which child has a key, if any has.
func (p *page) childOf(key []byte) int {
	i, found := p.find(key)
	if found {
		return i
	}
	return max(i-1, 0)
}

// lookUp returns the cell of a leaf that has a key, or -1.
func (p *page) lookUp(key []byte) int {
	mark := markOf(key)
	for from := 0; ; {
		i := bytes.IndexByte(p.marks[from:], mark)
		if i < 0 {
			return -1
		}
		if bytes.Equal(p.key(from+i), key) {
			return from + i
		}
		from += i + 1
	}
}

// item returns what a cell of a leaf holds. If the page is changed, so may be the value,
// unless it is over maxPacked.
func (p *page) item(i int) item {
	rest := p.rest(i)
	it := item{version: binary.LittleEndian.Uint64(rest), value: rest[versionBytes:]}
	if large := p.largeOf(i); large != nil {
		it.value = large.bytes
	}
	return it
}

func (p *page) largeOf(i int) *largeValue {
	if p.large == nil {
		return nil
	}
	return p.large[i]
}

// largeValue is a value over maxPacked. Nobody changes it.
type largeValue struct {
	bytes []byte
	epoch uint64 // of the tree, when it was set
}

// setItem gives a cell of a leaf an item: its value is packed, unless large is not nil.
func (p *page) setItem(i int, version uint64, packed []byte, large *largeValue) {
	rest := p.resize(i, versionBytes+len(packed))
	binary.LittleEndian.PutUint64(rest, version)
	copy(rest[versionBytes:], packed)
	if large != nil && p.large == nil {
		p.large = make([]*largeValue, p.count())
	}
	if p.large != nil {
		p.large[i] = large
	}
}

// addItem adds a cell to a leaf.
func (p *page) addItem(i int, key []byte, version uint64, packed []byte, large *largeValue) {
	p.insert(i, key, versionBytes+len(packed))
	p.marks = slices.Insert(p.marks, i, markOf(key))
	if p.large != nil {
		p.large = slices.Insert(p.large, i, nil)
	}
	p.setItem(i, version, packed, large)
}

// addChild adds a cell to a branch.
func (p *page) addChild(i int, from []byte, child *page) {
	p.insert(i, from, 0)
	p.children = slices.Insert(p.children, i, child)
}

// removeCells removes some cells, with what belongs to them.
func (p *page) removeCells(from, to int) {
	p.remove(from, to)
	if !p.isLeaf() {
		p.children = slices.Delete(p.children, from, to)
		return
	}
	p.marks = slices.Delete(p.marks, from, to)
	if p.large != nil {
		p.large = slices.Delete(p.large, from, to)
	}
}

// part returns a new page with copies of some of the cells.
func (p *page) part(epoch uint64, from, to int) *page {
	part := &page{epoch: epoch, cells: p.packed(from, to)}
	if !p.isLeaf() {
		part.children = slices.Clone(p.children[from:to])
		return part
	}
	part.marks = slices.Clone(p.marks[from:to])
	if p.large != nil {
		part.large = slices.Clone(p.large[from:to])
	}
	return part
}

// clone returns a copy of a page. They share values over maxPacked, and children.
func (p *page) clone(epoch uint64) *page {
	return &page{
		epoch:    epoch,
		cells:    p.cells.clone(),
		children: slices.Clone(p.children),
		marks:    bytes.Clone(p.marks),
		large:    slices.Clone(p.large),
	}
}

// memory is about what a page takes, but for its children and for values over maxPacked.
func (p *page) memory() uint64 {
	const (
		ofPage    = 160
		ofCell    = 4 + 1 // starts and marks
		ofPointer = 8
	)
	pointers := len(p.children) + len(p.large)
	return uint64(ofPage + len(p.data) + ofCell*len(p.starts) + ofPointer*pointers)
}

// splitsAt returns where a page that is too large is split: in the middle; but if a cell was
// added at its end, before that cell, so that ascending keys leave full pages behind.
func (p *page) splitsAt(added int) int {
	at := added
	isAscending := added == p.count()-1
	if !isAscending {
		at = p.middle()
	}
	least := p.leastCells()
	return min(max(at, least), p.count()-least)
}

// middle returns the cell before which half of the bytes are, about.
func (p *page) middle() int {
	before := 0
	for i := range p.count() {
		before += p.cellSize(i)
		if before > p.size()/2 {
			return i
		}
	}
	return p.count()
}

// separator is the shortest key that is above all before a cell of a leaf, and not above that
// cell's.
func (p *page) separator(i int) []byte {
	before, key := p.key(i-1), p.key(i)
	shared := 0
	for shared < len(before) && before[shared] == key[shared] {
		shared++
	}
	return key[:shared+1]
}

func (p *page) isTooLarge() bool { return p.size() > maxPageBytes && p.count() >= 2*p.leastCells() }

func (p *page) isTooSmall() bool { return p.size() < maxPageBytes/4 || p.count() < p.leastCells() }

// tree is an ordered map from keys to items. Its owner has a lock: set, delete and view need it
// for writing, get for reading. A view needs none.
type tree struct {
	root  *page
	epoch uint64 // pages of earlier ones may be parts of views
	keys  uint64
	bytes uint64 // of all keys and values
	// copied is the bytes of pages that writes have copied, and dropped those of values that they have
	// replaced or deleted. They only grow.
	copied, dropped uint64
	// kept is the memory, in bytes, of what writes have replaced since the tree was made, while it
	// was a part of a view that counts. It only grows. Views count up to the epoch counted: what
	// was made in an earlier one may be a part of them.
	kept    uint64
	counted uint64 // 0: no view counts
}

// treeView is a tree as it was when the view was taken. Anyone may read it, without a lock,
// and lets go of it when they like.
type treeView struct {
	root        *page
	keys, bytes uint64
	epoch       uint64 // it has pages of earlier ones only
}

func newTree() *tree { return &tree{root: &page{}} }

// view takes a view. From now on a page is copied before it is changed, once.
func (t *tree) view() treeView {
	t.epoch++
	return treeView{root: t.root, keys: t.keys, bytes: t.bytes, epoch: t.epoch}
}

// replaced is what writes have replaced at most, while views may have had it. It only grows.
func (t *tree) replaced() uint64 { return t.copied + t.dropped }

// own returns a page that may be changed: a copy, if views may have the page.
func (t *tree) own(p *page) *page {
	if p.epoch == t.epoch {
		return p
	}
	t.copied += p.memory()
	t.countKept(p.epoch, p.memory())
	return p.clone(t.epoch)
}

// countKept counts memory of some epoch that a write replaces, if views that count keep it.
func (t *tree) countKept(epoch, bytes uint64) {
	if epoch < t.counted {
		t.kept += bytes
	}
}

// get returns the item of a key. The next write may change a value up to maxPacked.
func (t *tree) get(key []byte) (item, bool) { return t.root.get(key) }

func (p *page) get(key []byte) (item, bool) {
	for !p.isLeaf() {
		p = p.children[p.childOf(key)]
	}
	i := p.lookUp(key)
	if i < 0 {
		return item{}, false
	}
	return p.item(i), true
}

// set gives a key a copy of an item, and reports whether the key was there.
func (t *tree) set(key []byte, it item) (found bool) {
	t.root = t.own(t.root)
	added, found := t.setIn(t.root, key, it)
	if t.root.isTooLarge() {
		top := &page{epoch: t.epoch}
		top.addChild(0, nil, t.root)
		t.split(top, 0, added)
		t.root = top
	}
	return found
}

// setIn sets a key in a page that the tree owns, or below. It returns the place of the cell
// that it has added to this page, or -1.
func (t *tree) setIn(p *page, key []byte, it item) (added int, found bool) {
	if p.isLeaf() {
		return t.setInLeaf(p, key, it)
	}
	i := p.childOf(key)
	child := t.own(p.children[i])
	p.children[i] = child
	added, found = t.setIn(child, key, it)
	if !child.isTooLarge() {
		return -1, found
	}
	t.split(p, i, added)
	return i + 1, found
}

func (t *tree) setInLeaf(p *page, key []byte, it item) (added int, found bool) {
	t.bytes += uint64(len(it.value))
	packed := it.value
	var large *largeValue
	if len(it.value) > maxPacked {
		packed = nil
		large = &largeValue{bytes: bytes.Clone(it.value), epoch: t.epoch}
	}
	i := p.lookUp(key)
	if i >= 0 {
		t.uncount(p, i)
		p.setItem(i, it.version, packed, large)
		return -1, true
	}
	t.keys++
	t.bytes += uint64(len(key))
	i, _ = p.find(key)
	p.addItem(i, key, it.version, packed, large)
	return i, false
}

// uncount takes the item of a cell out of bytes, and counts a value that views keep.
func (t *tree) uncount(p *page, i int) {
	bytes := uint64(len(p.item(i).value))
	t.bytes -= bytes
	t.dropped += bytes
	if large := p.largeOf(i); large != nil {
		t.countKept(large.epoch, bytes)
	}
}

// split splits a child that is too large. The last cell was added to it at a place, or
// nowhere: -1.
func (t *tree) split(parent *page, i, added int) {
	child := parent.children[i]
	at := child.splitsAt(added)
	left, right := child.part(t.epoch, 0, at), child.part(t.epoch, at, child.count())
	from := child.key(at)
	if child.isLeaf() {
		from = child.separator(at)
	} else {
		right.clearFirstKey()
	}
	parent.children[i] = left
	parent.addChild(i+1, from, right)
}

// clearFirstKey makes the first key of a branch empty: its parent has it.
func (p *page) clearFirstKey() {
	child := p.children[0]
	p.removeCells(0, 1)
	p.addChild(0, nil, child)
}

// delete removes a key, and reports whether it was there.
func (t *tree) delete(key []byte) (found bool) {
	if _, found := t.get(key); !found {
		return false // and nothing is copied
	}
	t.deleteFrom(key, func(other []byte) bool { return bytes.Equal(other, key) })
	return true
}

// deleteRange removes all keys of a range.
func (t *tree) deleteRange(r keyRange) {
	for {
		var first []byte
		for key := range t.from(r.start) {
			if r.endsAfter(key) {
				first = bytes.Clone(key)
			}
			break
		}
		if first == nil {
			return
		}
		t.deleteFrom(first, r.endsAfter)
	}
}

// deleteFrom removes a key that is there, and with it those behind it in its leaf, up to one
// that is not to be deleted.
func (t *tree) deleteFrom(key []byte, isDeleted func(key []byte) bool) {
	t.root = t.own(t.root)
	t.deleteIn(t.root, key, isDeleted)
	for len(t.root.children) == 1 {
		t.root = t.root.children[0]
	}
}

// deleteIn is deleteFrom in a page that the tree owns.
func (t *tree) deleteIn(p *page, key []byte, isDeleted func(key []byte) bool) {
	if p.isLeaf() {
		first, _ := p.find(key)
		end := first
		for end < p.count() && isDeleted(p.key(end)) {
			t.uncount(p, end)
			t.keys--
			t.bytes -= uint64(len(p.key(end)))
			end++
		}
		p.removeCells(first, end)
		return
	}
	i := p.childOf(key)
	child := t.own(p.children[i])
	p.children[i] = child
	t.deleteIn(child, key, isDeleted)
	if child.isTooSmall() {
		t.merge(p, i)
	}
}

// merge merges a child that is too small with a neighbour, if it has one with room. A child
// that has too few cells is merged in any case. If the page is too large then, the next set in
// it splits it.
func (t *tree) merge(parent *page, i int) {
	if len(parent.children) == 1 {
		return
	}
	i = max(i-1, 0)
	left, right := parent.children[i], parent.children[i+1]
	hasTooFew := min(left.count(), right.count()) < left.leastCells()
	isRoomy := left.size()+right.size() <= maxPageBytes*3/4
	if !hasTooFew && !isRoomy {
		return
	}
	t.countKept(right.epoch, right.memory())
	left = t.own(left)
	left.takeAll(right, parent.key(i+1))
	parent.children[i] = left
	parent.removeCells(i+1, i+2)
}

// takeAll adds the cells of the page that follows. from is the key that the parent has for it.
func (p *page) takeAll(next *page, from []byte) {
	for i := range next.count() {
		switch {
		case next.isLeaf():
			it := next.item(i)
			large := next.largeOf(i)
			if large != nil {
				it.value = nil
			}
			p.addItem(p.count(), next.key(i), it.version, it.value, large)
		case i == 0:
			p.addChild(p.count(), from, next.children[0])
		default:
			p.addChild(p.count(), next.key(i), next.children[i])
		}
	}
}

// from yields the keys of the tree from one on, in order. What it yields is valid until the next
// write.
func (t *tree) from(key []byte) iter.Seq2[[]byte, item] { return treeView{root: t.root}.from(key) }

// from yields the keys of a view from one on, in order. Nothing changes what it yields.
func (v treeView) from(key []byte) iter.Seq2[[]byte, item] {
	return func(yield func([]byte, item) bool) {
		v.root.from(key, yield)
	}
}

func (p *page) from(key []byte, yield func([]byte, item) bool) bool {
	if p.isLeaf() {
		first, _ := p.find(key)
		for i := first; i < p.count(); i++ {
			if !yield(p.key(i), p.item(i)) {
				return false
			}
		}
		return true
	}
	for i := p.childOf(key); i < len(p.children); i++ {
		if !p.children[i].from(key, yield) {
			return false
		}
	}
	return true
}
