// The log on disk: what this node promises is in it before the promise leaves.
//
// The log is a run of segments: files named by a number that goes up by one
// ("0000000000000001.wal"), full of zeros until they are written. In a segment,
// batches follow one another. A batch takes whole sectors of 512 bytes, and never
// spans segments: one that is too large has a larger segment to itself. Of a
// sector, 508 bytes are data. The data of a batch is a header, a payload, and
// zeros. Integers are little-endian, checksums CRC-32C:
//
//	0 "rkv-wal" and a byte, the format's version; 8 the log's id; 16 segment
//	number; 24 batch number; 32 checksum of the batch before; 36 checksum of
//	all data but these four bytes; 40 length of the payload; 44 size of the
//	segment; 48 1 if the batch says that the next segment's file is there, else
//	0; 52 payload: a LogBatch
//
// Each sector ends with a checksum of bytes 8 to 35 of the header, of the sector's
// number in the batch, and of its data. Layout, checksums and the fields before 44
// stay in every version.
//
// A batch is written over zeros that are durable, and only after the one before it
// is synced. A disk writes a sector whole or not at all. So of the last batch a
// loss of power can leave sectors as they were written, and zeros, and at least
// one that is missing: such a batch is torn, was never acknowledged, and is cut
// away. All else that is no intact batch is damage, of a batch of one sector too.
// That is also why close appends a batch that says nothing: all that was
// acknowledged is before it. The id is random: no stored value can pass for a batch.
//
// A segment gets its name after its first batch is synced, and has its full size
// by then: that batch is never torn, and a segment of another size is damaged. The
// first batch repeats the hard state, the snapshot mark and which segment is the
// oldest one needed: those before may go. While a segment is written, a goroutine
// fills the next one (".wal.tmp"), which it begins only once the one before has its
// name: if that is not there, it was lost. Before the log goes on in the next
// segment, the present one announces that its file is there: so all segments can be
// missed but those at the front, which may go.

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
	walMagic     = "rkv-wal\x02" // the last byte is the version
	sectorBytes  = 512
	sectorData   = sectorBytes - 4 // behind it is its checksum
	headerBytes  = 52
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
	logger       *slog.Logger
	background   func(func()) // runs what fills a segment; nil: a goroutine
	// verify says what else must be found intact before openWAL changes anything.
	verify func(*kvpb.LogBatch) error // or nil
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
	size               int    // of the segment
}

// placeOf returns the place that the header of a batch says it has.
func placeOf(b []byte) walPlace {
	u := binary.LittleEndian.Uint64
	return walPlace{u(b[8:]), u(b[16:]), u(b[24:]), binary.LittleEndian.Uint32(b[32:]), int(binary.LittleEndian.Uint32(b[44:]))}
}

// putHeader writes the place to a header.
func (p walPlace) putHeader(b []byte) {
	copy(b, walMagic)
	binary.LittleEndian.PutUint64(b[8:], p.id)
	binary.LittleEndian.PutUint64(b[16:], p.segment)
	binary.LittleEndian.PutUint64(b[24:], p.batch)
	binary.LittleEndian.PutUint32(b[32:], p.before)
	binary.LittleEndian.PutUint32(b[44:], uint32(p.size))
}

// announces reports whether a batch says that the next segment's file is there.
func announces(b []byte) bool { return binary.LittleEndian.Uint32(b[48:]) == 1 }

func checksumOf(b []byte) uint32 { return binary.LittleEndian.Uint32(b[36:]) }

// checksum is of all data of a batch but the checksum itself.
func checksum(data []byte) uint32 {
	return crc32.Update(crc32.Checksum(data[:36], castagnoli), castagnoli, data[40:])
}

// sectorSeed is what the checksums of a batch's sectors go on from: its place.
func sectorSeed(header []byte) uint32 { return crc32.Checksum(header[8:36], castagnoli) }

func sectorChecksum(seed uint32, number int, sector []byte) uint32 {
	var n [4]byte
	binary.LittleEndian.PutUint32(n[:], uint32(number))
	return crc32.Update(crc32.Update(seed, castagnoli, n[:]), castagnoli, sector[:sectorData])
}

func intactSector(seed uint32, number int, sector []byte) bool {
	return binary.LittleEndian.Uint32(sector[sectorData:]) == sectorChecksum(seed, number, sector)
}

// sectors returns how many bytes so much data takes, in whole sectors.
func sectors(data int) int { return (data + sectorData - 1) / sectorData * sectorBytes }

// batchBytes returns how many bytes the batch takes that a sector begins.
func batchBytes(first []byte) uint64 {
	data := headerBytes + uint64(binary.LittleEndian.Uint32(first[40:]))
	return (data + sectorData - 1) / sectorData * sectorBytes
}

// encode encodes the batch whose place is p.
func (p walPlace) encode(b *kvpb.LogBatch, announces bool) ([]byte, error) {
	size := headerBytes + proto.Size(b)
	buf := make([]byte, headerBytes, sectors(size))
	buf, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(buf, b)
	buf = buf[:cap(buf)]
	p.putHeader(buf)
	binary.LittleEndian.PutUint32(buf[40:], uint32(size-headerBytes))
	if announces {
		binary.LittleEndian.PutUint32(buf[48:], 1)
	}
	layOut(buf)
	return buf, err
}

// layOut makes sectors of the data that b begins with, and adds all checksums.
func layOut(b []byte) {
	n := len(b) / sectorBytes
	data := b[:n*sectorData]
	binary.LittleEndian.PutUint32(b[36:], checksum(data))
	seed := sectorSeed(b)
	for i := n - 1; i >= 0; i-- { // the last one first: none is overwritten before it has moved
		sector := b[i*sectorBytes:][:sectorBytes]
		copy(sector, data[i*sectorData:][:sectorData])
		binary.LittleEndian.PutUint32(sector[sectorData:], sectorChecksum(seed, i, sector))
	}
}

// intactBatch returns the batch that b begins with, and its data; nil if it is
// damaged.
func intactBatch(b []byte) (raw, data []byte) {
	if len(b) < sectorBytes {
		return nil, nil
	}
	seed := sectorSeed(b)
	if !intactSector(seed, 0, b) || batchBytes(b) > uint64(len(b)) {
		return nil, nil
	}
	raw = b[:batchBytes(b)]
	n := len(raw) / sectorBytes
	data = make([]byte, 0, n*sectorData)
	for i := range n {
		sector := raw[i*sectorBytes:][:sectorBytes]
		if !intactSector(seed, i, sector) {
			return nil, nil
		}
		data = append(data, sector[:sectorData]...)
	}
	if checksum(data) != checksumOf(data) {
		return nil, nil
	}
	return raw, data
}

// decodeBatch decodes the batch that b begins with. The error is errNoBatch if
// it is damaged. What this allocates is bounded by the length of b.
func decodeBatch(b []byte) (raw []byte, batch *kvpb.LogBatch, err error) {
	raw, data := intactBatch(b)
	if raw == nil {
		return nil, nil, errNoBatch
	}
	if string(data[:8]) != walMagic {
		return raw, nil, errWALFormat
	}
	batch = &kvpb.LogBatch{}
	err = proto.Unmarshal(data[headerBytes:][:binary.LittleEndian.Uint32(data[40:])], batch)
	return raw, batch, err
}

// torn reports whether b, the rest of a segment, is what a loss of power can leave
// while the batch is written whose place is p: each sector is there as it was
// written, or is zeros, and one of the batch's is missing.
func (p walPlace) torn(b []byte) bool {
	var header [headerBytes]byte
	p.putHeader(header[:])
	seed := sectorSeed(header[:])
	end := uint64(len(b)) // of the batch, as far as that is known
	if intactSector(seed, 0, b) {
		end = batchBytes(b)
	}
	missing := false
	for at := 0; at < len(b); at += sectorBytes {
		sector := b[at:][:sectorBytes]
		inBatch := uint64(at) < end
		switch {
		case inBatch && intactSector(seed, at/sectorBytes, sector):
		case !allZero(sector):
			return false
		case inBatch:
			missing = true
		}
	}
	return missing && end <= uint64(len(b))
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
	segments []walSegment
	head     *kvpb.LogBatch // what the first batch of a segment repeats
	next     chan error     // tells when the next segment is filled; nil: none is

	announced bool // the newest segment says that the next one's file is there
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
	numbers, filled, err := w.list()
	var state *kvpb.LogBatch
	if err == nil && len(numbers) > 0 {
		state, err = w.replay(numbers, filled)
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

// list returns the numbers of all segments, and of the one that was being filled;
// 0: there is none.
func (w *wal) list() (numbers []uint64, filled uint64, err error) {
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
			return nil, 0, w.damage(n-1, 0, "the segment is missing, for the next one was begun")
		case suffix == "wal.tmp":
			filled = n
		}
	}
	return numbers, filled, err
}

// replay reads the segments that precede the newest one without a gap. If more
// are needed, the newest says so.
func (w *wal) replay(numbers []uint64, filled uint64) (*kvpb.LogBatch, error) {
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
			w.opts.logger.Info("reading the log", "segments", i+1-first, "of", len(numbers)-first)
		}
	}
	if next := w.at.segment + 1; w.announced && filled != next {
		return nil, w.damage(next, 0, "the segment is missing, for the one before says that its file is there")
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
	if w.opts.verify != nil {
		if err := w.opts.verify(s); err != nil {
			return nil, err
		}
	}
	w.head = headOf(s)
	w.file, err = w.fs.open(w.path(w.at.segment))
	return s, ifNot(err, func() error { return writeSync(w.file, again, offset) }, w.removeFront)
}

// replaySegment adds what a segment says to s. It returns what has to be written
// again, and where: all from the last batch on. If the process that wrote that
// failed to sync it, or the zeros over a torn one, the page cache has them and does
// not know that the disk has not.
func (w *wal) replaySegment(s *kvpb.LogBatch, n uint64, newest bool) (again []byte, offset int, err error) {
	b, err := w.fs.readFile(w.path(n))
	if err != nil {
		return nil, 0, err
	}
	w.at.segment, w.at.size, w.offset, w.announced = n, len(b), 0, false
	for {
		raw, batch, err := decodeBatch(b[w.offset:])
		if err == errNoBatch {
			break
		}
		if err == errWALFormat {
			return nil, 0, fmt.Errorf("%s: %w", w.path(n), err)
		}
		p := placeOf(raw)
		if w.offset == 0 && p.size != len(b) {
			return nil, 0, w.damage(n, min(p.size, len(b)),
				"the segment is %d bytes long, and was %d before it got its name", len(b), p.size)
		}
		if w.at.id == 0 { // the first one of all that there are
			w.at = walPlace{cmp.Or(w.opts.id, p.id), n, p.batch, p.before, len(b)}
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
		offset = w.offset
		w.announced = w.announced || announces(raw)
		w.wrote(batch, raw)
	}
	rest := b[w.offset:]
	switch {
	case w.offset == 0:
		return nil, 0, w.damage(n, 0, "the first batch is damaged, which was whole before the segment got its name")
	case allZero(rest):
	case !newest:
		return nil, 0, w.damage(n, w.offset, "a batch is damaged, and later ones were written")
	case !w.at.torn(rest):
		return nil, 0, w.damage(n, w.offset, "a batch is damaged, and not by a loss of power: "+
			"that leaves each sector as it was written, or as zeros")
	default:
		w.opts.logger.Warn("the last batch of the log is torn: cut there", "file", w.path(n), "offset", w.offset)
		clear(rest)
	}
	return b[offset:], offset, nil
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
	raw, err := w.at.encode(b, false)
	if err != nil {
		return err
	}
	if w.offset+len(raw)+sectorBytes > w.at.size { // the last sector is announce's
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
	temp := w.path(w.at.segment+1) + ".tmp"
	err := <-w.next
	w.next = nil
	if err != nil && w.fill(temp) != nil { // again, as a new file: there may be space now
		return err
	}
	if w.file != nil {
		if err := w.announce(); err != nil {
			return err
		}
		w.file.Close() // synced
	}
	w.at.segment++
	w.at.size = max(sectors(headerBytes+proto.Size(b))+sectorBytes, w.opts.segmentBytes)
	raw, err := w.at.encode(b, false)
	if err != nil {
		return err
	}
	w.file, err = w.fs.open(temp)
	err = ifNot(err,
		w.lengthen,
		func() error { return writeSync(w.file, raw, 0) },
		func() error { return w.fs.rename(temp, w.path(w.at.segment)) },
		func() error { return w.fs.syncDir(w.dir) })
	if err != nil {
		return err
	}
	w.segments = append(w.segments, walSegment{number: w.at.segment})
	w.offset, w.announced = 0, false
	w.wrote(b, raw)
	w.fillNext()
	return nil
}

// announce appends, where there is always room for it, that the file of the next
// segment is there. A log that went on in that before a crash has said so already.
func (w *wal) announce() error {
	if w.announced {
		return nil
	}
	nothing := &kvpb.LogBatch{}
	raw, err := w.at.encode(nothing, true)
	err = ifNot(err, func() error { return writeSync(w.file, raw, w.offset) })
	if err != nil {
		return err
	}
	w.announced = true
	w.wrote(nothing, raw)
	return nil
}

// lengthen makes the file of a segment as long as it has to be, if that is more than
// was filled.
func (w *wal) lengthen() error {
	if w.at.size == w.opts.segmentBytes {
		return nil
	}
	_, err := w.file.WriteAt(make([]byte, sectorBytes), int64(w.at.size-sectorBytes))
	return err
}

// fillNext has a goroutine fill the next segment. The file is the goroutine's
// until roll or close has heard from it.
func (w *wal) fillNext() {
	next, temp := make(chan error, 1), w.path(w.at.segment+1)+".tmp"
	w.next = next
	w.opts.background(func() { next <- w.fill(temp) })
}

// fill fills a new file with zeros, and makes its name durable: what is written over
// them is synced twice as fast as what makes a file grow.
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
	return ifNot(err, func() error { return w.fs.syncDir(w.dir) })
}

// truncateFront removes the segments that nobody needs who needs no entry up to
// index: those without an entry after it and after the snapshot. That they are
// needed no longer is written first.
func (w *wal) truncateFront(index uint64) error {
	index = min(index, w.head.Snapshot.GetIndex())
	n := 0
	for n < len(w.segments)-1 && w.segments[n].last <= index {
		n++
	}
	if n > 0 && w.append(&kvpb.LogBatch{FirstSegment: w.segments[n].number}) == nil {
		w.err = w.removeFront()
	}
	return w.err
}

// removeFront removes the segments before the oldest one needed, and makes the
// directory durable as it is then.
func (w *wal) removeFront() error {
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
