// Cells: sorted keys, each with some bytes, packed into memory that the garbage collector has
// nothing to follow in.

package main

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// cellHeader is the length of the key and that of the rest, before the two.
const cellHeader = 4 + 2

// cells are keys in order, each with its rest, which is shorter than 64 KiB. What key and rest
// return are parts of data. Nothing changes them there but whoever fills the rest of resize:
// a rest that keeps its length stays where it is.
type cells struct {
	starts []uint32 // where in data each cell begins, in the order of the keys
	data   []byte   // the cells, in no order, and what was left behind
	gone   int      // bytes of data that no cell has any more
}

func (c *cells) count() int { return len(c.starts) }

// size is what the cells take of data.
func (c *cells) size() int { return len(c.data) - c.gone }

// cell returns a cell, and all that follows it in data.
func (c *cells) cell(i int) []byte { return c.data[c.starts[i]:] }

func keyLength(cell []byte) int  { return int(binary.LittleEndian.Uint32(cell)) }
func restLength(cell []byte) int { return int(binary.LittleEndian.Uint16(cell[4:])) }

func (c *cells) key(i int) []byte {
	cell := c.cell(i)
	end := cellHeader + keyLength(cell)
	return cell[cellHeader:end:end]
}

func (c *cells) rest(i int) []byte {
	cell := c.cell(i)
	start := cellHeader + keyLength(cell)
	end := start + restLength(cell)
	return cell[start:end:end]
}

func (c *cells) cellSize(i int) int {
	cell := c.cell(i)
	return cellHeader + keyLength(cell) + restLength(cell)
}

// find returns the first cell whose key is not below the given one, and whether it has that key.
func (c *cells) find(key []byte) (i int, found bool) {
	low, high := 0, len(c.starts)
	for low < high {
		middle := int(uint(low+high) / 2)
		switch order := bytes.Compare(c.key(middle), key); {
		case order < 0:
			low = middle + 1
		case order > 0:
			high = middle
		default:
			return middle, true
		}
	}
	return low, false
}

// insert inserts a cell, whose rest the caller fills.
func (c *cells) insert(i int, key []byte, restBytes int) (rest []byte) {
	start := c.add(key, restBytes)
	c.starts = slices.Insert(c.starts, i, uint32(start))
	return c.rest(i)
}

// add adds a cell to data, and returns where it begins.
func (c *cells) add(key []byte, restBytes int) int {
	start := len(c.data)
	size := cellHeader + len(key) + restBytes
	c.data = slices.Grow(c.data, size)[:start+size]
	cell := c.data[start:]
	binary.LittleEndian.PutUint32(cell, uint32(len(key)))
	binary.LittleEndian.PutUint16(cell[4:], uint16(restBytes))
	copy(cell[cellHeader:], key)
	return start
}

// resize gives a cell a rest of another length, which the caller fills.
func (c *cells) resize(i int, restBytes int) (rest []byte) {
	if restBytes == restLength(c.cell(i)) {
		return c.rest(i)
	}
	c.gone += c.cellSize(i)
	key := c.key(i)
	c.starts[i] = uint32(c.add(key, restBytes))
	c.packIfSparse()
	return c.rest(i)
}

// remove removes some cells.
func (c *cells) remove(from, to int) {
	for i := from; i < to; i++ {
		c.gone += c.cellSize(i)
	}
	c.starts = slices.Delete(c.starts, from, to)
	c.packIfSparse()
}

// packIfSparse packs the cells if a third of data has been left behind.
func (c *cells) packIfSparse() {
	if c.gone > len(c.data)/3 {
		*c = c.packed(0, c.count())
	}
}

// packed returns copies of some of the cells, without what was left behind.
func (c *cells) packed(from, to int) cells {
	size := 0
	for i := from; i < to; i++ {
		size += c.cellSize(i)
	}
	s := cells{starts: make([]uint32, 0, to-from), data: make([]byte, 0, size)}
	for i := from; i < to; i++ {
		s.starts = append(s.starts, uint32(len(s.data)))
		s.data = append(s.data, c.cell(i)[:c.cellSize(i)]...)
	}
	return s
}

// clone returns a copy that shares nothing.
func (c *cells) clone() cells {
	return cells{starts: slices.Clone(c.starts), data: bytes.Clone(c.data), gone: c.gone}
}
