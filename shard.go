// Shards: the keys of a store, in memory that the garbage collector has nothing
// to follow in. With pointers to each of a million keys it takes long enough for
// answers to wait for it.

package main

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"unsafe"
)

const (
	// maxPacked is the largest value that is kept in a shard's data, maxShardData
	// what live keys may take there: it bounds the copies that writes wait for, for
	// nothing else of a shard is copied.
	maxPacked    = 1 << 10
	maxShardData = 1 << 20
	// packedHeader is the version, 0 if the key is gone, and the lengths of key
	// and value.
	packedHeader = 8 + 4 + 2
)

// hashSeed keeps clients from choosing keys of one hash. They can choose keys of
// one shard, of which only headers are copied beside data.
var hashSeed = maphash.MakeSeed()

// shard is a part of the keys. Each is in one place.
type shard struct {
	index map[uint32]uint32 // by hash of the key: where in data it is
	data  []byte            // one key behind the other, in no order
	gone  int               // bytes of keys in data that are there no more
	rest  map[string]item   // values over maxPacked, keys whose hash another has, and what data has no room for
}

func hashOf(key []byte) uint32 { return uint32(maphash.Bytes(hashSeed, key)) }

// unpack returns the key in data at an offset, and the offset of the next.
func (sh *shard) unpack(at int) (key []byte, it item, next int) {
	b := sh.data[at:]
	value := packedHeader + int(binary.LittleEndian.Uint32(b[8:]))
	end := value + int(binary.LittleEndian.Uint16(b[12:]))
	return b[packedHeader:value:value], item{b[value:end:end], binary.LittleEndian.Uint64(b)}, at + end
}

// find returns the item of a key, and where in data it is, or -1. What is in data
// changes with the next write: see item.kept.
func (sh *shard) find(hash uint32, key []byte) (it item, at int, found bool) {
	if at, ok := sh.index[hash]; ok {
		if k, it, _ := sh.unpack(int(at)); bytes.Equal(k, key) {
			return it, int(at), true
		}
	}
	it, found = sh.rest[string(key)]
	return it, -1, found
}

// replace makes it the item of a key, in place of the one that find has found.
func (sh *shard) replace(hash uint32, key []byte, at int, old, it item) {
	if at >= 0 && len(old.value) == len(it.value) {
		binary.LittleEndian.PutUint64(sh.data[at:], it.version)
		copy(old.value, it.value)
		return
	}
	sh.remove(hash, key, at)
	sh.add(hash, key, it)
}

// add adds a key that is not there.
func (sh *shard) add(hash uint32, key []byte, it item) {
	_, taken := sh.index[hash]
	if size := packedHeader + len(key) + len(it.value); taken || len(it.value) > maxPacked || len(sh.data)-sh.gone+size > maxShardData {
		if sh.rest == nil {
			sh.rest = map[string]item{}
		}
		sh.rest[string(key)] = item{bytes.Clone(it.value), it.version}
		return
	}
	if sh.index == nil {
		sh.index = map[uint32]uint32{}
	}
	sh.index[hash] = uint32(len(sh.data))
	sh.data = binary.LittleEndian.AppendUint64(sh.data, it.version)
	sh.data = binary.LittleEndian.AppendUint32(sh.data, uint32(len(key)))
	sh.data = binary.LittleEndian.AppendUint16(sh.data, uint16(len(it.value)))
	sh.data = append(append(sh.data, key...), it.value...)
}

// remove removes the key that find has found.
func (sh *shard) remove(hash uint32, key []byte, at int) {
	if at < 0 {
		delete(sh.rest, string(key))
		return
	}
	delete(sh.index, hash)
	binary.LittleEndian.PutUint64(sh.data[at:], 0)
	_, _, next := sh.unpack(at)
	if sh.gone += next - at; sh.gone > len(sh.data)/2 {
		sh.pack()
	}
}

// pack takes what is gone out of data.
func (sh *shard) pack() {
	end := 0
	for at := 0; at < len(sh.data); {
		key, it, next := sh.unpack(at)
		if it.version != 0 {
			sh.index[hashOf(key)] = uint32(end)
			end += copy(sh.data[end:], sh.data[at:next])
		}
		at = next
	}
	if sh.data, sh.gone = sh.data[:end], 0; end < cap(sh.data)/4 {
		sh.data = bytes.Clone(sh.data)
	}
	if end == 0 {
		sh.index = nil // else a map keeps its room
	}
}

// packed yields the keys in data, which change with the next write.
func (sh *shard) packed(yield func(key []byte, it item) bool) {
	for at := 0; at < len(sh.data); {
		key, it, next := sh.unpack(at)
		if it.version != 0 && !yield(key, it) {
			return
		}
		at = next
	}
}

// others yields the keys in rest. Nothing changes them, or what was yielded.
func (sh *shard) others(yield func(key []byte, it item) bool) {
	for key, it := range sh.rest {
		if !yield(unsafe.Slice(unsafe.StringData(key), len(key)), it) { // long ones are not to be copied for a look
			return
		}
	}
}

// kept returns an item that later writes do not change.
func (it item) kept() item {
	if len(it.value) <= maxPacked {
		it.value = bytes.Clone(it.value)
	}
	return it
}
