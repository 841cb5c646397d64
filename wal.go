// The log on disk: what this node promises is in it before the promise leaves.
//
// The log is a run of segments: files named by a number that goes up by one
// ("0000000000000001.wal"), full of zeros until they are written. In a segment,
// batches follow one another. A batch starts on a sector, ends with zeros up to
// the end of one, and never spans segments: one that is too large has a larger
// segment to itself. Integers are little-endian, checksums CRC-32C:
//
//	0 "rkv-wal" and a byte, the format's version; 8 the log's id; 16 segment
//	number; 24 batch number; 32 checksum of the batch before; 36 checksum of
//	all but these four bytes; 40 length of the payload; 44 payload: a LogBatch
//
// The first 40 bytes, and what the checksum covers if the length is where it
// is, stay in every version.
//
// A batch is written only after the one before it is synced, so a crash can
// damage none but the last: damage before an intact later batch is corruption.
// The checksum proves a batch by itself; the checksum before it and the numbers
// prove its place. The id is random: no stored value can pass for a batch.
//
// A segment gets its name after its first batch is synced: that one is never
// torn. It repeats the hard state, the snapshot mark and which segment is the
// oldest one needed: those before may go. While a segment is written, a
// goroutine fills the next one (".wal.tmp"), which it begins only once the one
// before has its name: if that is not there, it was lost.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	walMagic     = "rkv-wal\x01" // the last byte is the version
	sectorBytes  = 512
	headerBytes  = 44
	segmentBytes = 64 << 20 // by default
	zeroBytes    = 1 << 20  // synced at a time, for an append may wait behind it
)

var (
	errWALClosed = errors.New("the log is closed")
	errWALFormat = errors.New("it is of a format that this program does not know: start the newer one that wrote it")
	errNoBatch   = errors.New("no intact batch")
)

// walOptions tune a log.
type walOptions struct {
	id           uint64 // of the log; 0: any
	segmentBytes int    // a multiple of sectorBytes; 0: the default
	log          *slog.Logger
	background   func(func()) // runs what fills a segment; nil: a goroutine
	// check says what else must be found intact before openWAL changes anything.
	check func(*kvpb.LogBatch) error // or nil
}

// mergeBatch makes b say what b says and then c: replay does so with all, and
// whoever queues batches may. c must not be used any more.
func mergeBatch(b, c *kvpb.LogBatch) error {
	b.HardState, b.Snapshot = cmp.Or(c.HardState, b.HardState), cmp.Or(c.Snapshot, b.Snapshot)
	b.FirstSegment, b.Boots = cmp.Or(c.FirstSegment, b.FirstSegment), cmp.Or(c.Boots, b.Boots)
	if c.Discards {
		b.Discards, b.Entries = true, nil
	}
	for _, e := range c.Entries {
		keep := len(b.Entries)
		for keep > 0 && b.Entries[keep-1].Index >= e.Index {
			keep--
		}
		if keep > 0 && b.Entries[keep-1].Index+1 != e.Index {
			return fmt.Errorf("entry %d follows entry %d", e.Index, b.Entries[keep-1].Index)
		}
		b.Entries = append(b.Entries[:keep], e)
	}
	return nil
}

// walPlace is the place of a batch.
type walPlace struct {
	id, segment, batch uint64
	before             uint32 // checksum of the batch before
}

func placeOf(b []byte) walPlace {
	u := binary.LittleEndian.Uint64
	return walPlace{u(b[8:]), u(b[16:]), u(b[24:]), binary.LittleEndian.Uint32(b[32:])}
}

func checksumOf(b []byte) uint32 { return binary.LittleEndian.Uint32(b[36:]) }

func checksum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:36], castagnoli), castagnoli, b[40:])
}

// sectors rounds a size up to whole sectors.
func sectors(size int) int { return (size + sectorBytes - 1) / sectorBytes * sectorBytes }

// encode encodes the batch whose place is p.
func (p walPlace) encode(b *kvpb.LogBatch) ([]byte, error) {
	size := headerBytes + proto.Size(b)
	buf := make([]byte, headerBytes, sectors(size))
	buf, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(buf, b)
	buf = buf[:cap(buf)]
	copy(buf, walMagic)
	binary.LittleEndian.PutUint64(buf[8:], p.id)
	binary.LittleEndian.PutUint64(buf[16:], p.segment)
	binary.LittleEndian.PutUint64(buf[24:], p.batch)
	binary.LittleEndian.PutUint32(buf[32:], p.before)
	binary.LittleEndian.PutUint32(buf[40:], uint32(size-headerBytes))
	binary.LittleEndian.PutUint32(buf[36:], checksum(buf))
	return buf, err
}

// intactBatch returns the batch that b begins with, unless it is damaged.
func intactBatch(b []byte) []byte {
	if len(b) < sectorBytes {
		return nil
	}
	size := uint64(binary.LittleEndian.Uint32(b[40:])) + headerBytes + sectorBytes - 1
	if size -= size % sectorBytes; size > uint64(len(b)) || checksum(b[:size]) != checksumOf(b) {
		return nil
	}
	return b[:size]
}

// decodeBatch decodes the batch that b begins with. The error is errNoBatch if
// it is damaged. What this allocates is bounded by the length of b.
func decodeBatch(b []byte) (raw []byte, batch *kvpb.LogBatch, err error) {
	if raw = intactBatch(b); raw == nil {
		return nil, nil, errNoBatch
	}
	if string(raw[:8]) != walMagic {
		return raw, nil, errWALFormat
	}
	batch = &kvpb.LogBatch{}
	err = proto.Unmarshal(raw[headerBytes:][:binary.LittleEndian.Uint32(raw[40:])], batch)
	return raw, batch, err
}

// laterBatch looks for an intact batch behind the one that b begins with and
// whose place is p.
func (p walPlace) laterBatch(b []byte) bool {
	for ; len(b) > sectorBytes; b = b[sectorBytes:] {
		l := placeOf(b[sectorBytes:])
		if l.id == p.id && l.segment == p.segment && l.batch >= p.batch && intactBatch(b[sectorBytes:]) != nil {
			return true
		}
	}
	return false
}

// wal is an open log. One goroutine at a time uses it.
type wal struct {
	fs   fileSystem
	dir  string
	opts walOptions
	err  error // the first one: nothing is written after it

	at       walPlace // of the next batch
	file     file     // the newest segment
	offset   int      // of the next batch
	size     int      // of the newest segment
	segments []walSegment
	head     *kvpb.LogBatch // what the first batch of a segment repeats
	next     chan error     // tells when the next segment is filled; nil: none is
}

// walSegment is a segment and the highest index of an entry in it.
type walSegment struct{ number, last uint64 }

// openWAL opens the log in a directory and returns what it holds: the entries
// are those after the snapshot. If there is no log, it makes one and returns
// nil. Until all is found intact, it changes nothing.
func openWAL(fs fileSystem, dir string, o walOptions) (*wal, *kvpb.LogBatch, error) {
	o.segmentBytes = cmp.Or(o.segmentBytes, segmentBytes)
	if o.background == nil {
		o.background = func(f func()) { go f() }
	}
	w := &wal{fs: fs, dir: dir, opts: o, head: &kvpb.LogBatch{FirstSegment: 1}}
	numbers, err := w.list()
	var state *kvpb.LogBatch
	if err == nil && len(numbers) > 0 {
		state, err = w.replay(numbers)
	}
	if err == nil {
		w.fillNext()
	}
	if err == nil && state == nil {
		w.at = walPlace{id: cmp.Or(o.id, randomID()), batch: 1}
		err = w.append(&kvpb.LogBatch{})
	}
	if err != nil {
		w.close()
		return nil, nil, err
	}
	return w, state, nil
}

func (w *wal) path(segment uint64) string {
	return filepath.Join(w.dir, fmt.Sprintf("%016x.wal", segment))
}

func (w *wal) damage(segment uint64, offset int, format string, args ...any) error {
	return fmt.Errorf("%s, offset %d: %s. %s", w.path(segment), offset, fmt.Sprintf(format, args...), whatToDo)
}

// list returns the numbers of all segments.
func (w *wal) list() (numbers []uint64, err error) {
	names, err := w.fs.readDir(w.dir)
	newest := uint64(0)
	for _, name := range names {
		base, suffix, _ := strings.Cut(name, ".")
		n, err := strconv.ParseUint(base, 16, 64)
		switch {
		case err != nil || len(base) != 16: // not a file of the log
		case suffix == "wal":
			numbers, newest = append(numbers, n), n
		case suffix == "wal.tmp" && n > newest+1:
			return nil, w.damage(n-1, 0, "the segment is missing, for the next one was begun")
		}
	}
	return numbers, err
}

// replay reads the segments that precede the newest one without a gap. If more
// are needed, the newest says so.
func (w *wal) replay(numbers []uint64) (*kvpb.LogBatch, error) {
	first := len(numbers) - 1
	for first > 0 && numbers[first-1] == numbers[first]-1 {
		first--
	}
	s := &kvpb.LogBatch{}
	var again []byte
	var offset int
	var err error
	said := time.Now()
	for i, n := range numbers {
		w.segments = append(w.segments, walSegment{number: n})
		if i < first {
			continue
		}
		if again, offset, err = w.replaySegment(s, n, i == len(numbers)-1); err != nil {
			return nil, err
		}
		if time.Since(said) > progressEvery {
			said = time.Now()
			w.opts.log.Info("reading the log", "segments", i+1-first, "of", len(numbers)-first)
		}
	}
	oldest, mark := numbers[first], s.Snapshot.GetIndex()
	s.Entries = slices.DeleteFunc(s.Entries, func(e *kvpb.Entry) bool { return e.Index <= mark })
	switch {
	case s.FirstSegment < oldest:
		return nil, w.damage(oldest-1, 0, "the segment is missing")
	case len(s.Entries) > 0 && s.Entries[0].Index != mark+1:
		return nil, w.damage(oldest, 0, "entries are missing between the snapshot of entry %d and entry %d", mark, s.Entries[0].Index)
	}
	if h := s.HardState; h != nil {
		h.Commit = max(h.Commit, mark) // raft insists, and a snapshot holds what is committed
	}
	if w.opts.check != nil {
		if err := w.opts.check(s); err != nil {
			return nil, err
		}
	}
	w.head = headOf(s)
	w.file, err = w.fs.open(w.path(w.at.segment))
	return s, ifNot(err, func() error { return writeSync(w.file, again, offset) }, w.drop)
}

// replaySegment adds what a segment says to s. It returns what has to be
// written again, and where: the last batch, for if the process that wrote it
// failed to sync it, the page cache has it and does not know that the disk has
// not; and zeros over a batch that was torn.
func (w *wal) replaySegment(s *kvpb.LogBatch, n uint64, newest bool) (again []byte, offset int, err error) {
	b, err := w.fs.readFile(w.path(n))
	if err != nil {
		return nil, 0, err
	}
	b = append(b, make([]byte, -len(b)&(sectorBytes-1))...)
	w.at.segment, w.offset, w.size = n, 0, len(b)
	for {
		raw, batch, err := decodeBatch(b[w.offset:])
		if err == errNoBatch {
			break
		}
		if err == errWALFormat {
			return nil, 0, fmt.Errorf("%s: %w", w.path(n), err)
		}
		p := placeOf(raw)
		if w.at.id == 0 { // the first one of all that there are
			w.at = walPlace{cmp.Or(w.opts.id, p.id), n, p.batch, p.before}
		}
		if p != w.at {
			err = fmt.Errorf("batch %d of segment %d of log %x is in the place of batch %d of segment %d of log %x, or batches before it are missing",
				p.batch, p.segment, p.id, w.at.batch, n, w.at.id)
		}
		if err == nil {
			err = mergeBatch(s, batch)
		}
		if err != nil {
			return nil, 0, w.damage(n, w.offset, "%v", err)
		}
		again, offset = raw, w.offset
		w.wrote(batch, raw)
	}
	rest := b[w.offset:]
	switch torn := !allZero(rest); {
	case w.offset == 0:
		return nil, 0, w.damage(n, 0, "the first batch is damaged, which was whole before the segment got its name")
	case torn && (!newest || w.at.laterBatch(rest)):
		return nil, 0, w.damage(n, w.offset, "a batch is damaged that is not the last one")
	case torn:
		w.opts.log.Warn("the last batch of the log is torn: cut there", "file", w.path(n), "offset", w.offset)
		clear(rest)
		again = b[offset:]
	}
	return again, offset, nil
}

func allZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

// wrote goes on behind a batch.
func (w *wal) wrote(batch *kvpb.LogBatch, raw []byte) {
	w.at.batch, w.at.before, w.offset = w.at.batch+1, checksumOf(raw), w.offset+len(raw)
	g := &w.segments[len(w.segments)-1]
	for _, e := range batch.Entries {
		g.last = max(g.last, e.Index)
	}
}

// append makes a batch durable, by one sync. After an error nobody knows what
// is on the disk, and another sync would not tell: nothing is written any more.
func (w *wal) append(b *kvpb.LogBatch) error {
	if w.err == nil {
		w.err = w.write(b)
	}
	return w.err
}

// headOf is what the first batch of a segment repeats of those before.
func headOf(b *kvpb.LogBatch) *kvpb.LogBatch {
	return &kvpb.LogBatch{HardState: b.HardState, Snapshot: b.Snapshot, FirstSegment: b.FirstSegment, Boots: b.Boots}
}

func (w *wal) write(b *kvpb.LogBatch) error {
	head := headOf(w.head)
	if err := mergeBatch(head, b); err != nil {
		return err
	}
	raw, err := w.at.encode(b)
	if err != nil {
		return err
	}
	if w.offset+len(raw) > w.size {
		err = w.roll(head)
	} else if err = writeSync(w.file, raw, w.offset); err == nil {
		w.wrote(b, raw)
	}
	head.Entries, w.head = nil, head
	return err
}

func writeSync(f file, b []byte, offset int) error {
	if _, err := f.WriteAt(b, int64(offset)); err != nil {
		return err
	}
	return f.sync()
}

// roll writes a batch as the first one of the next segment.
func (w *wal) roll(b *kvpb.LogBatch) error {
	w.at.segment++
	raw, err := w.at.encode(b)
	if err != nil {
		return err
	}
	temp := w.path(w.at.segment) + ".tmp"
	err, w.next = <-w.next, nil
	if err != nil && w.fill(temp) != nil { // again, as a new file: there may be space now
		return err
	}
	if w.file != nil {
		w.file.Close() // synced
	}
	w.file, err = w.fs.open(temp)
	err = ifNot(err,
		func() error { return writeSync(w.file, raw, 0) },
		func() error { return w.fs.rename(temp, w.path(w.at.segment)) },
		func() error { return w.fs.syncDir(w.dir) })
	if err != nil {
		return err
	}
	w.segments = append(w.segments, walSegment{number: w.at.segment})
	w.offset, w.size = 0, max(len(raw), w.opts.segmentBytes)
	w.wrote(b, raw)
	w.fillNext()
	return nil
}

// fillNext has a goroutine fill the next segment. The file is the goroutine's
// until roll or close has heard from it.
func (w *wal) fillNext() {
	next, temp := make(chan error, 1), w.path(w.at.segment+1)+".tmp"
	w.next = next
	w.opts.background(func() { next <- w.fill(temp) })
}

// fill fills a new file with zeros: what is written over them is synced twice
// as fast as what makes a file grow.
func (w *wal) fill(path string) error {
	f, err := w.fs.create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	zeros := make([]byte, min(zeroBytes, w.opts.segmentBytes))
	for n := 0; n < w.opts.segmentBytes && err == nil; n += len(zeros) {
		err = writeSync(f, zeros[:min(len(zeros), w.opts.segmentBytes-n)], n)
	}
	return err
}

// release removes the segments that nobody needs who needs no entry up to
// index: those without an entry after it and after the snapshot. That they are
// needed no longer is written first.
func (w *wal) release(index uint64) error {
	index = min(index, w.head.Snapshot.GetIndex())
	n := 0
	for n < len(w.segments)-1 && w.segments[n].last <= index {
		n++
	}
	if n > 0 && w.append(&kvpb.LogBatch{FirstSegment: w.segments[n].number}) == nil &&
		w.append(&kvpb.LogBatch{}) == nil { // so that what says so is not the last batch, which can be cut away
		w.err = w.drop()
	}
	return w.err
}

// drop removes the segments before the oldest one needed, and makes the
// directory durable as it is then.
func (w *wal) drop() error {
	for ; w.segments[0].number < w.head.FirstSegment; w.segments = w.segments[1:] {
		if err := w.fs.remove(w.path(w.segments[0].number)); err != nil {
			return err
		}
	}
	return w.fs.syncDir(w.dir)
}

// close ends the goroutine and closes the log. What was appended is synced.
func (w *wal) close() {
	if w.next != nil {
		<-w.next
	}
	if w.file != nil {
		w.file.Close()
	}
	w.err, w.next, w.file = cmp.Or(w.err, errWALClosed), nil, nil
}
