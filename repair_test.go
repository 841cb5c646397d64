// What is found at a start that nobody expects, and what is done about it.

package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"raft-key-value/kvpb"
)

// writingNode is a cluster of one voter that has made so many writes, in segments
// of so many bytes.
func writingNode(t *testing.T, writes, segmentBytes int) *diskNode {
	t.Helper()
	p, err := openDiskNode(newSimFS(), 1)
	if err == nil {
		p.d.segmentBytes = segmentBytes
		_, err = p.n.bootstrap()
	}
	if err = cmp.Or(err, p.settle()); err != nil {
		t.Fatal(err)
	}
	for i := range writes {
		if err := p.do(diskOp{fmt.Sprint("k", i), []byte("acknowledged")}); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// newestSegment returns the newest segment's path, and where its last batch is.
func newestSegment(fs *simFS) (path string, from, to int) {
	for name := range fs.names {
		if strings.HasSuffix(name, ".wal") {
			path = max(path, name)
		}
	}
	for {
		raw, _, err := decodeBatch(fs.names[path].cache[to:])
		if err != nil {
			return path, from, to
		}
		from, to = to, to+len(raw)
	}
}

// TestLastBatchDamaged: whatever the last batch said, damage to it is not taken for
// a torn tail, after a kill or after a clean stop.
func TestLastBatchDamaged(t *testing.T) {
	p := writingNode(t, 0, diskLogBytes/4)
	for i := range 200 {
		if err := p.do(diskOp{"k", make([]byte, 400)}); err != nil {
			t.Fatal(err)
		}
		fs := p.fs.lose(nil).clone()
		path, from, to := newestSegment(fs)
		for _, at := range []int{from, from + 40, from + 60, to - 1} {
			fs.names[path].cache[at] ^= 1
			wantRefusal(t, fs, 1, fmt.Sprintf("%s, offset %d: ", path, from), "damaged", "move the data directory away")
			if fs.names[path].cache[at] ^= 1; t.Failed() {
				t.Fatalf("write %d, byte %d of the last batch, %d to %d", i, at, from, to)
			}
		}
		if _, err := openDiskNode(fs, 1); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStoppedLogDamaged: after a clean stop, any damage to a batch that was
// acknowledged is found, zeros in its place included, which a loss of power leaves,
// too.
func TestStoppedLogDamaged(t *testing.T) {
	p := writingNode(t, 2, 2*simSegment)
	if err := p.do(diskOp{"large", bytes.Repeat([]byte{7}, 700)}); err != nil {
		t.Fatal(err)
	}
	path, from, to := newestSegment(p.fs)
	if to-from != 2*sectorBytes {
		t.Fatalf("the last batch takes %d bytes", to-from)
	}
	killed := p.fs.clone()
	p.d.close()
	stopped := p.fs.lose(nil)
	for at := from; at < to; at++ {
		fs := stopped.clone()
		fs.names[path].cache[at] ^= 1
		wantRefusal(t, fs, 1, fmt.Sprintf("%s, offset %d: ", path, from), "damaged")
	}
	for sector := from; sector < to; sector += sectorBytes {
		fs := stopped.clone()
		clear(fs.names[path].cache[sector:][:sectorBytes])
		wantRefusal(t, fs, 1, fmt.Sprintf("%s, offset %d: ", path, from), "damaged")
		if t.Failed() {
			t.Fatalf("offset %d", sector)
		}
		clear(killed.names[path].cache[sector:][:sectorBytes])
	}
	q, err := openDiskNode(killed, 1) // which cannot be told from a batch that was not written
	if err != nil {
		t.Fatal(err)
	}
	if err := q.lead(); err != nil || q.n.store.keys != 2 {
		t.Fatalf("%d keys, %v", q.n.store.keys, err)
	}
	if q, err = openDiskNode(stopped, 1); err == nil {
		err = q.lead()
	}
	if err != nil || q.n.store.keys != 3 {
		t.Fatalf("%d keys, %v", q.n.store.keys, err)
	}
}

// TestFailedLogIsNotStopped: a node that has failed does not end its log as one that
// was stopped does.
func TestFailedLogIsNotStopped(t *testing.T) {
	for _, fails := range []bool{false, true} {
		p := writingNode(t, 1, simSegment)
		if fails {
			p.n.diskFailed(syscall.EIO)
		}
		p.fs.calls = nil
		p.d.close()
		if written := p.fs.mutates(); written == fails {
			t.Errorf("fails %v: %q", fails, p.fs.calls)
		}
	}
}

// TestSegmentsCut: a segment that was cut, or is missing with all that follow it,
// is found out, whatever is left.
func TestSegmentsCut(t *testing.T) {
	p := writingNode(t, 9, diskLogBytes/4)
	p.d.close()
	newest, _, _ := newestSegment(p.fs)
	made := len(p.fs.names[newest].cache)
	for size := 0; size < made; size++ {
		fs := p.fs.clone()
		fs.names[newest].cache = fs.names[newest].cache[:size]
		wantRefusal(t, fs, 1, newest+", offset ", "move the data directory away")
	}
	segments := 0
	fs := p.fs.clone()
	for path := newest; fs.names[path] != nil; segments++ { // one more each time
		delete(fs.names, path)
		delete(fs.names, simPath(int(p.d.wal.at.segment)+1)+".tmp")
		wantRefusal(t, fs, 1, "missing")
		path = simPath(int(p.d.wal.at.segment) - 1 - segments)
	}
	if segments < 3 {
		t.Errorf("only %d segments", segments)
	}
}

// TestSnapshotOfAnother: a directory that lost its identity and its log, but not
// the segment that was being filled, or not its snapshots, is refused, and says what
// was found; one with any snapshot is not empty for a restore.
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
	wantRefusal(t, fs, 1, "it has "+strings.TrimPrefix(snap, simDir+"/")+", but no file named identity", "move the data directory away")
	if fs.names[snap] == nil {
		t.Error("the only snapshot is gone")
	}
	d, err := openDisk(fs, simDir, diskLogBytes, quiet())
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.restore(&kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, time.Now(), func() (*store, error) { return nil, errors.New("it is damaged") })
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
