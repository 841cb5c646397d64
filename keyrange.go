// Ranges of keys, as clients name them.

package main

import (
	"bytes"
	"unicode/utf8"
)

// keyRange is the keys from start on, and before end. The zero range has all keys.
type keyRange struct {
	start []byte
	end   []byte // nil: there is no end
}

// prefixRange is the keys that start with a prefix.
func prefixRange(prefix []byte) keyRange {
	end := bytes.Clone(prefix)
	for len(end) > 0 && end[len(end)-1] == 0xff {
		end = end[:len(end)-1]
	}
	if len(end) == 0 {
		return keyRange{start: prefix}
	}
	end[len(end)-1]++
	return keyRange{start: prefix, end: end}
}

// rangeOf is the range that a request names: by a prefix, or by start and end.
func rangeOf[T string | []byte](prefix, start, end T) keyRange {
	if len(prefix) > 0 {
		return prefixRange([]byte(prefix))
	}
	r := keyRange{start: []byte(start)}
	if len(end) > 0 {
		r.end = []byte(end)
	}
	return r
}

// checkRange checks the fields of a request that name a range.
func checkRange[T string | []byte](prefix, start, end T) error {
	for _, f := range []struct {
		name  string
		value []byte
	}{{"prefix", []byte(prefix)}, {"start", []byte(start)}, {"end", []byte(end)}} {
		if len(f.value) > maxKeyBytes {
			return invalid(f.name, "it has %d bytes, the limit is %d", len(f.value), maxKeyBytes)
		}
		if !utf8.Valid(f.value) {
			return invalid(f.name, "it is not UTF-8")
		}
	}
	hasBounds := len(start) > 0 || len(end) > 0
	if len(prefix) > 0 && hasBounds {
		return invalid("prefix", "it is not for a request that has start or end")
	}
	if len(end) > 0 && bytes.Compare([]byte(start), []byte(end)) >= 0 {
		return invalid("end", "it is not after start")
	}
	return nil
}

// checkDeleteRange is checkRange of what is to be deleted, which must have some bound: nobody
// deletes all by a slip.
func checkDeleteRange(prefix, start, end []byte) error {
	if len(prefix)+len(start)+len(end) == 0 {
		return invalid("prefix", "it is empty, and so are start and end: to delete all keys, give \"\\x00\" as start")
	}
	return checkRange(prefix, start, end)
}

// endsAfter reports whether a key is before the range's end.
func (r keyRange) endsAfter(key []byte) bool { return r.end == nil || bytes.Compare(key, r.end) < 0 }

func (r keyRange) has(key []byte) bool {
	return bytes.Compare(key, r.start) >= 0 && r.endsAfter(key)
}

// after is the part of the range behind a key. No key is empty, so behind "" is all of it.
func (r keyRange) after(key []byte) keyRange {
	start := append(bytes.Clone(key), 0)
	if bytes.Compare(start, r.start) < 0 {
		start = r.start
	}
	return keyRange{start: start, end: r.end}
}
