// What is found at a start that nobody expects, and what is done about it.

package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"raft-key-value/kvpb"
)

// TestLastBatchDamaged: a start goes on whatever the last batch said that was
// damaged, unless it is the first of its segment.
func TestLastBatchDamaged(t *testing.T) {
	p, err := openDiskNode(newSimFS(), 1)
	if err == nil {
		_, err = p.n.bootstrap()
	}
	if err != nil || p.settle() != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		if err := p.do(diskOp{"k", make([]byte, 400)}); err != nil {
			t.Fatal(err)
		}
		fs, newest := p.fs.lose(nil).clone(), ""
		for path := range fs.names {
			if strings.HasSuffix(path, ".wal") {
				newest = max(newest, path)
			}
		}
		f, off, last := fs.names[newest], 0, 0
		for {
			raw, _, err := decodeBatch(f.cache[off:])
			if err != nil {
				break
			}
			last, off = off, off+len(raw)
		}
		if last == 0 {
			continue
		}
		_, b, _ := decodeBatch(f.cache[last:])
		f.cache[last+40] ^= 1
		if _, err := openDiskNode(fs, 1); err != nil {
			t.Errorf("write %d, last batch {%.80v}: %.160v", i, b.String(), err)
		}
	}
}

// TestSnapshotOfAnother: a directory that lost its identity and its log, but not
// the segment that was being filled, is refused; one with any snapshot is not
// empty for a restore.
func TestSnapshotOfAnother(t *testing.T) {
	fs, snap := usedDir(t)
	for path := range fs.names {
		if strings.HasSuffix(path, ".wal") || strings.HasSuffix(path, "/identity") {
			delete(fs.names, path)
		}
	}
	fs = fs.clone()
	wantRefusal(t, fs, 1, "identity")
	if fs.names[snap] == nil {
		t.Error("the snapshot is gone")
	}
	for path := range fs.names {
		if path != snap {
			delete(fs.names, path)
		}
	}
	fs = fs.clone()
	d, err := openDisk(fs, simDir, diskLogBytes, quiet())
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.restore(&kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, func() (*store, error) { return nil, errors.New("it is damaged") })
	if err == nil || !strings.Contains(err.Error(), "not empty") || fs.names[snap] == nil {
		t.Error("restored into it: ", err, slices.Collect(func(y func(string) bool) {
			for n := range fs.names {
				if !y(n) {
					return
				}
			}
		}))
	}
}

// TestCleanKeepsWhatSays: an unfinished directory whose clean-up fails once is cleaned up by the next start.
func TestCleanKeepsWhatSays(t *testing.T) {
	fs := newSimFS()
	for _, n := range []string{"identity.tmp", "0000000000000001.wal", "0000000000000001-0000000000000002.snap", "0000000000000002.wal.tmp"} {
		fs.names[simDir+"/"+n] = &simFile{}
	}
	for at := 1; at < 20; at++ {
		for fault := range numFaults {
			c := fs.clone()
			c.failAt, c.fault = at, fault
			_, err := openDiskNode(c, 1)
			c.failAt = 0
			c.crashed = false
			if err == nil {
				continue
			}
			if _, err2 := openDiskNode(c.restart(false), 1); err2 != nil {
				t.Errorf("call %d, fault %d: %v; then %.150v", at, fault, err, err2)
			}
		}
	}
}
