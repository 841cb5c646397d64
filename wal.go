// The log on disk: whatever this node promises is in it before the promise leaves.
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
// stay in every version. The log's id is random and told to nobody, so no client can
// write a value that passes for a batch.
//
// # Torn or damaged
//
// A batch is written over zeros that are durable, and only after the batch before it
// was synced. A disk writes a sector whole or not at all. So a loss of power can only
// leave the last batch incomplete: each of its sectors is as it was written, or is
// zeros, and at least one is zeros. Such a batch is torn. It was never acknowledged,
// and is cut away. Everything else that is not an intact batch is damage, and the log
// is refused.
//
// Damage that turns sectors of the last batch into zeros looks like a torn batch. At
// a clean stop the last batch is therefore an empty one: then no acknowledged batch can
// be cut away.
//
// # Segments
//
// A segment gets its full size and its first batch, and is synced, before it gets its
// name. So a first batch is never torn, and a segment of another size than its header
// says is damaged. The first batch repeats the hard state, the snapshot mark and the
// number of the oldest segment that is needed: the segments before that can be removed.
//
// No segment can be lost unnoticed, but at the front, where they may be removed:
//   - While a segment is written, a goroutine fills the next one, ".wal.tmp". It begins
//     only once the segment before has its name. If that is missing, it was lost.
//   - Before the log goes on in the next segment, the last batch of the present one
//     announces that the next one's file is there. If it is missing, it was lost.

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
	errWALFormat = fmt.Errorf("%w: start the newer one that wrote it", errUnknownFormat)
	errNoBatch   = errors.New("no intact batch")
)

// walOptions tune a log.
type walOptions struct {
	id           uint64 // of the log; 0: any
	segmentBytes int    // a multiple of sectorBytes; 0: the default
	logger       *slog.Logger
	background   func(func()) // runs what fills a segment; nil: a goroutine
	speaks       uint32       // the highest level that this program speaks
	counts       *diskCounts  // of what append writes; nil: nobody wants to know
	// say is told now and then how many of all segments were read; nil: nobody wants to know.
	say func(segments, all uint64)
	// verify finds out whether what the log holds fits the rest of the directory. It is
	// called before openWAL changes anything, and may be nil.
	verify func(*kvpb.LogBatch) error
}

// mergeBatch makes b say what b and then c say. Afterwards b refers to parts of c, so
// neither may be changed but by mergeBatch(b, …).
func mergeBatch(b, c *kvpb.LogBatch) error {
	b.HardState = cmp.Or(c.HardState, b.HardState)
	b.Snapshot = cmp.Or(c.Snapshot, b.Snapshot)
	b.FirstSegment = cmp.Or(c.FirstSegment, b.FirstSegment)
	b.Boots = cmp.Or(c.Boots, b.Boots)
	b.Level = max(b.Level, c.Level)
	if c.Discards {
		b.Discards = true
		b.Entries = nil
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

// walPlace is where in a log a batch is, or is to be.
type walPlace struct {
	id, segment, batch uint64
	before             uint32 // checksum of the batch before
	size               int    // of the segment
}

// placeOf returns the place that the header of a batch says it has.
func placeOf(header []byte) walPlace {
	return walPlace{
		id:      binary.LittleEndian.Uint64(header[8:]),
		segment: binary.LittleEndian.Uint64(header[16:]),
		batch:   binary.LittleEndian.Uint64(header[24:]),
		before:  binary.LittleEndian.Uint32(header[32:]),
		size:    int(binary.LittleEndian.Uint32(header[44:])),
	}
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

// checksumOf returns the checksum that the header of a batch says it has.
func checksumOf(header []byte) uint32 { return binary.LittleEndian.Uint32(header[36:]) }

// checksum computes it, over all data of a batch but the checksum itself.
func checksum(data []byte) uint32 {
	return crc32.Update(crc32.Checksum(data[:36], castagnoli), castagnoli, data[40:])
}

// sectorSeed is the checksum of a batch's place, from which those of its sectors go on.
func sectorSeed(header []byte) uint32 { return crc32.Checksum(header[8:36], castagnoli) }

func sectorChecksum(seed uint32, number int, sector []byte) uint32 {
	var n [4]byte
	binary.LittleEndian.PutUint32(n[:], uint32(number))
	return crc32.Update(crc32.Update(seed, castagnoli, n[:]), castagnoli, sector[:sectorData])
}

func intactSector(seed uint32, number int, sector []byte) bool {
	return binary.LittleEndian.Uint32(sector[sectorData:]) == sectorChecksum(seed, number, sector)
}

// sectors returns how many bytes in a segment so many bytes of data take.
func sectors(data int) int { return (data + sectorData - 1) / sectorData * sectorBytes }

// batchBytes returns how many bytes in a segment the batch takes whose first sector this
// is.
func batchBytes(first []byte) uint64 {
	data := headerBytes + uint64(binary.LittleEndian.Uint32(first[40:]))
	return (data + sectorData - 1) / sectorData * sectorBytes
}

// encode encodes the batch whose place is p.
func (p walPlace) encode(b *kvpb.LogBatch, announces bool) ([]byte, error) {
	size := headerBytes + proto.Size(b)
	buf := make([]byte, headerBytes, sectors(size))
	buf, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(buf, b)
	if err != nil {
		return nil, err
	}
	buf = buf[:cap(buf)]
	p.putHeader(buf)
	binary.LittleEndian.PutUint32(buf[40:], uint32(size-headerBytes))
	if announces {
		binary.LittleEndian.PutUint32(buf[48:], 1)
	}
	layOut(buf)
	return buf, nil
}

// layOut makes sectors of the data at the start of b, and adds all checksums.
func layOut(b []byte) {
	n := len(b) / sectorBytes
	data := b[:n*sectorData]
	binary.LittleEndian.PutUint32(b[36:], checksum(data))
	seed := sectorSeed(b)
	for i := n - 1; i >= 0; i-- { // from the end, so that no data is overwritten before it has moved
		sector := b[i*sectorBytes:][:sectorBytes]
		copy(sector, data[i*sectorData:][:sectorData])
		binary.LittleEndian.PutUint32(sector[sectorData:], sectorChecksum(seed, i, sector))
	}
}

// intactBatch returns the batch at the start of b, as it is and its data alone. It returns
// nil if the batch is not intact.
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

// decodeBatch decodes the batch at the start of b, and returns it as it is, too. The error
// is errNoBatch if the batch is not intact. The length of b bounds what it allocates.
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

// torn reports whether b, the rest of a segment, is what a loss of power can leave of the
// batch that was to be written at place p: each of the batch's sectors is intact or
// zeros, one at least is zeros, and so is everything behind the batch.
func (p walPlace) torn(b []byte) bool {
	var header [headerBytes]byte
	p.putHeader(header[:])
	seed := sectorSeed(header[:])
	end := uint64(len(b)) // of the batch, if its first sector does not say
	if intactSector(seed, 0, b) {
		end = batchBytes(b)
	}
	if end > uint64(len(b)) {
		return false // no batch goes beyond its segment
	}
	missing := false
	for at := 0; at < len(b); at += sectorBytes {
		sector := b[at:][:sectorBytes]
		inBatch := uint64(at) < end
		if inBatch && intactSector(seed, at/sectorBytes, sector) {
			continue
		}
		if !allZero(sector) {
			return false
		}
		missing = missing || inBatch
	}
	return missing
}

func allZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

// wal is an open log. One goroutine at a time uses it.
type wal struct {
	fs   fileSystem
	dir  string
	opts walOptions
	err  error // the first one: nothing is written after it

	segments []walSegment   // all that are there, the newest one last
	head     *kvpb.LogBatch // what the first batch of a segment repeats
	next     chan error     // tells when the next segment is filled; nil: none is

	// The newest segment.
	file      file
	at        walPlace // of the next batch
	offset    int      // of the next batch
	announced bool     // a batch says that the next segment's file is there
}

// walSegment is a segment and the highest index of an entry in it.
type walSegment struct{ number, last uint64 }

// openWAL opens the log in a directory and returns what it holds: the entries
// are those after the snapshot. If there is no log, it makes one and returns
// nil. Until it has found everything intact, it changes nothing.
func openWAL(fs fileSystem, dir string, o walOptions) (*wal, *kvpb.LogBatch, error) {
	o.segmentBytes = cmp.Or(o.segmentBytes, segmentBytes)
	if o.background == nil {
		o.background = func(f func()) { go f() }
	}
	w := &wal{fs: fs, dir: dir, opts: o, head: &kvpb.LogBatch{FirstSegment: 1}}
	state, err := w.start()
	if err != nil {
		w.close()
		return nil, nil, err
	}
	return w, state, nil
}

func (w *wal) start() (*kvpb.LogBatch, error) {
	numbers, filled, err := w.list()
	if err != nil {
		return nil, err
	}
	if len(numbers) == 0 {
		w.at = walPlace{id: cmp.Or(w.opts.id, randomID()), batch: 1}
		w.fillNext()
		return nil, w.append(&kvpb.LogBatch{})
	}
	state, err := w.replay(numbers, filled)
	if err != nil {
		return nil, err
	}
	w.fillNext()
	return state, nil
}

// readWAL reads the log in a directory, which has one, as openWAL does, and changes nothing. Torn
// says where a torn batch is left out; empty: there is none.
func readWAL(fs fileSystem, dir string, o walOptions) (state *kvpb.LogBatch, torn string, err error) {
	w := &wal{fs: fs, dir: dir, opts: o}
	numbers, filled, err := w.list()
	if err != nil {
		return nil, "", err
	}
	state, tail, err := w.read(numbers, filled)
	if err != nil {
		return nil, "", err
	}
	if tail.torn {
		torn = fmt.Sprintf("%s, offset %d", w.path(w.at.segment), w.offset)
	}
	return state, torn, nil
}

func (w *wal) path(segment uint64) string {
	return filepath.Join(w.dir, fmt.Sprintf("%016x.wal", segment))
}

// damage makes the error that says where the log is damaged.
func (w *wal) damage(segment uint64, offset int, format string, args ...any) error {
	return fmt.Errorf("%s, offset %d: %s. %s", w.path(segment), offset, fmt.Sprintf(format, args...), whatToDo)
}

// list returns the numbers of all segments, and that of the segment that is, or was,
// being filled; 0: there is none.
func (w *wal) list() (numbers []uint64, filled uint64, err error) {
	names, err := w.fs.readDir(w.dir)
	if err != nil {
		return nil, 0, err
	}
	newest := uint64(0)
	for _, name := range names {
		base, suffix, _ := strings.Cut(name, ".")
		n, err := strconv.ParseUint(base, 16, 64)
		if err != nil || len(base) != 16 {
			continue // not a file of the log
		}
		if suffix == "wal" {
			numbers = append(numbers, n)
			newest = n
		}
		if suffix == "wal.tmp" {
			if n > newest+1 {
				return nil, 0, w.damage(n-1, 0, "the segment is missing, for the next one was begun")
			}
			filled = n
		}
	}
	return numbers, filled, nil
}

// replay reads the log, and has it go on from there.
func (w *wal) replay(numbers []uint64, filled uint64) (*kvpb.LogBatch, error) {
	s, tail, err := w.read(numbers, filled)
	if err != nil {
		return nil, err
	}
	// All is intact: from here on, the log is changed.
	if tail.torn {
		w.opts.logger.Warn("the last batch of the log is torn, as after a crash: it is cut off, and nothing in it was acknowledged",
			"file", w.path(w.at.segment), "offset", w.offset)
	}
	w.head = headOf(s)
	if err := w.rewrite(tail); err != nil {
		return nil, err
	}
	// The process before may have ended before the name of the newest segment was durable, and
	// that segment says which ones are to be removed.
	if err := w.fs.syncDir(w.dir); err != nil {
		return nil, err
	}
	if err := w.removeFront(); err != nil {
		return nil, err
	}
	return s, nil
}

// read reads the newest segment and those that precede it without a gap, and merges
// all that they say. That includes which segment is the oldest one needed. It changes
// nothing.
func (w *wal) read(numbers []uint64, filled uint64) (*kvpb.LogBatch, walTail, error) {
	first := len(numbers) - 1
	for first > 0 && numbers[first-1] == numbers[first]-1 {
		first--
	}
	for _, n := range numbers[:first] {
		w.segments = append(w.segments, walSegment{number: n}) // for removeFront
	}
	s := &kvpb.LogBatch{}
	var tail walTail
	said := time.Now()
	for i, n := range numbers[first:] {
		newest := first+i == len(numbers)-1
		var err error
		tail, err = w.replaySegment(s, n, newest)
		if err != nil {
			return nil, walTail{}, err
		}
		if w.opts.say != nil && time.Since(said) > progressEvery {
			said = time.Now()
			w.opts.say(uint64(i+1), uint64(len(numbers)-first))
		}
	}

	mark := s.Snapshot.GetIndex()
	s.Entries = slices.DeleteFunc(s.Entries, func(e *kvpb.Entry) bool { return e.Index <= mark })
	if err := w.findGaps(s, numbers[first], filled); err != nil {
		return nil, walTail{}, err
	}
	if h := s.HardState; h != nil {
		h.Commit = max(h.Commit, mark) // raft insists, and a snapshot holds what is committed
	}
	if w.opts.verify != nil {
		if err := w.opts.verify(s); err != nil {
			return nil, walTail{}, err
		}
	}
	return s, tail, nil
}

// findGaps refuses a log that is intact as far as it is there, but not all there.
func (w *wal) findGaps(s *kvpb.LogBatch, oldest, filled uint64) error {
	next := w.at.segment + 1
	if w.announced && filled != next {
		return w.damage(next, 0, "the segment is missing, for the one before says that its file is there")
	}
	if s.FirstSegment < oldest {
		return w.damage(oldest-1, 0, "the segment is missing")
	}
	mark := s.Snapshot.GetIndex()
	if len(s.Entries) > 0 && s.Entries[0].Index != mark+1 {
		return w.damage(oldest, 0, "entries are missing between the snapshot of entry %d and entry %d",
			mark, s.Entries[0].Index)
	}
	return nil
}

// walTail is the newest segment from its last intact batch on, with zeros in place of a
// torn one.
type walTail struct {
	data   []byte
	offset int
	torn   bool // zeros are in place of a torn batch
}

// rewrite opens the newest segment and writes its tail once more. If the process that
// wrote it failed to sync it, then the page cache has it, the disk has not, and the
// kernel does not know of the difference any more.
func (w *wal) rewrite(tail walTail) error {
	f, err := w.fs.open(w.path(w.at.segment))
	if err != nil {
		return err
	}
	w.file = f
	return writeSync(f, tail.data, tail.offset)
}

// replaySegment merges what a segment says into s, and returns the segment's tail.
func (w *wal) replaySegment(s *kvpb.LogBatch, n uint64, newest bool) (walTail, error) {
	b, err := w.fs.readFile(w.path(n))
	if err != nil {
		return walTail{}, err
	}
	w.segments = append(w.segments, walSegment{number: n})
	w.at.segment = n
	w.at.size = len(b)
	w.offset = 0
	w.announced = false
	last := 0 // offset of the last intact batch
	for {
		raw, batch, err := decodeBatch(b[w.offset:])
		if err == errNoBatch {
			break
		}
		if err == nil {
			err = w.checkKnown(batch)
		}
		isNewer := err == errWALFormat || errors.Is(err, errLevel)
		if isNewer {
			return walTail{}, fmt.Errorf("%s: %w", w.path(n), err)
		}
		size := placeOf(raw).size
		if w.offset == 0 && size != len(b) {
			return walTail{}, w.damage(n, min(size, len(b)),
				"the segment is %d bytes long, and was %d before it got its name", len(b), size)
		}
		if err == nil {
			err = w.replayBatch(s, batch, raw)
		}
		if err != nil {
			return walTail{}, w.damage(n, w.offset, "%v", err)
		}
		last = w.offset
		w.wrote(batch, raw)
	}
	rest := b[w.offset:]
	torn, err := w.cutTorn(rest, newest)
	if err != nil {
		return walTail{}, err
	}
	return walTail{data: b[last:], offset: last, torn: torn}, nil
}

// checkKnown refuses a batch of a newer program.
func (w *wal) checkKnown(batch *kvpb.LogBatch) error {
	if err := checkLevel("the log", batch.Level, w.opts.speaks); err != nil {
		return err
	}
	if len(batch.ProtoReflect().GetUnknown()) > 0 {
		return fmt.Errorf("%w: the log has a field that it does not know: start a newer one", errLevel)
	}
	return nil
}

// replayBatch merges a batch into s, if it is the one that has to follow.
func (w *wal) replayBatch(s, batch *kvpb.LogBatch, raw []byte) error {
	p := placeOf(raw)
	if w.at.id == 0 { // the oldest batch of all that are read says where the log begins
		w.at.id = cmp.Or(w.opts.id, p.id)
		w.at.batch = p.batch
		w.at.before = p.before
	}
	if p != w.at {
		return fmt.Errorf("batch %d of segment %d of log %x is in the place of batch %d of segment %d of log %x, "+
			"or batches before it are missing", p.batch, p.segment, p.id, w.at.batch, w.at.segment, w.at.id)
	}
	return mergeBatch(s, batch)
}

// cutTorn clears the rest of a segment, as it was read, behind its last intact batch, if a torn
// batch is there. It refuses anything else but zeros.
func (w *wal) cutTorn(rest []byte, newest bool) (torn bool, err error) {
	n := w.at.segment
	if w.offset == 0 {
		return false, w.damage(n, 0, "the first batch is damaged, which was whole before the segment got its name")
	}
	if allZero(rest) {
		return false, nil
	}
	if !newest {
		return false, w.damage(n, w.offset, "a batch is damaged, and later ones were written")
	}
	if !w.at.torn(rest) {
		return false, w.damage(n, w.offset, "a batch is damaged, and not by a loss of power: "+
			"that leaves each sector as it was written, or as zeros")
	}
	clear(rest)
	return true, nil
}

// wrote moves the place of the next batch behind a batch that is in the segment.
func (w *wal) wrote(batch *kvpb.LogBatch, raw []byte) {
	w.at.batch++
	w.at.before = checksumOf(raw)
	w.offset += len(raw)
	if announces(raw) {
		w.announced = true
	}
	newest := &w.segments[len(w.segments)-1]
	for _, e := range batch.Entries {
		newest.last = max(newest.last, e.Index)
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

// headOf returns what the first batch of a segment repeats of the batches before.
func headOf(b *kvpb.LogBatch) *kvpb.LogBatch {
	return &kvpb.LogBatch{
		HardState:    b.HardState,
		Snapshot:     b.Snapshot,
		FirstSegment: b.FirstSegment,
		Boots:        b.Boots,
		Level:        b.Level,
	}
}

// write writes a batch to the newest segment or, if there is no room, to the next one.
func (w *wal) write(b *kvpb.LogBatch) error {
	withHead := headOf(w.head)
	if err := mergeBatch(withHead, b); err != nil {
		return err
	}
	w.head = headOf(withHead)
	b.Level = w.head.Level
	raw, err := w.at.encode(b, false)
	if err != nil {
		return err
	}
	if w.offset+len(raw)+sectorBytes > w.at.size { // the last sector is announce's
		return w.roll(withHead)
	}
	if err := w.writeBatch(raw, w.offset); err != nil {
		return err
	}
	w.wrote(b, raw)
	return nil
}

// writeBatch makes a batch durable in the newest segment.
func (w *wal) writeBatch(raw []byte, offset int) error {
	if _, err := w.file.WriteAt(raw, int64(offset)); err != nil {
		return err
	}
	begun := time.Now()
	if err := w.file.sync(); err != nil {
		return err
	}
	w.opts.counts.synced(len(raw), time.Since(begun))
	return nil
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
	if err != nil && w.fill(temp) != nil { // a second try, with a new file: there may be space now
		return err
	}
	if w.file != nil {
		if err := w.announce(); err != nil {
			return err
		}
		_ = w.file.Close() // it is synced
	}
	w.at.segment++
	w.at.size = max(sectors(headerBytes+proto.Size(b))+sectorBytes, w.opts.segmentBytes)
	raw, err := w.at.encode(b, false)
	if err != nil {
		return err
	}
	w.file, err = w.fs.open(temp)
	if err != nil {
		return err
	}
	if err := w.lengthen(); err != nil {
		return err
	}
	if err := w.writeBatch(raw, 0); err != nil {
		return err
	}
	if err := w.fs.rename(temp, w.path(w.at.segment)); err != nil {
		return err
	}
	if err := w.fs.syncDir(w.dir); err != nil {
		return err
	}
	w.segments = append(w.segments, walSegment{number: w.at.segment})
	w.offset = 0
	w.announced = false
	w.wrote(b, raw)
	w.fillNext()
	return nil
}

// announce appends a batch, where there is always room for it, that says that the file of
// the next segment is there. After a crash in the midst of roll, it is there already.
func (w *wal) announce() error {
	if w.announced {
		return nil
	}
	nothing := &kvpb.LogBatch{}
	raw, err := w.at.encode(nothing, true)
	if err != nil {
		return err
	}
	if err := writeSync(w.file, raw, w.offset); err != nil {
		return err
	}
	w.wrote(nothing, raw)
	return nil
}

// lengthen gives the file of the newest segment its size, if that is more than was filled.
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
	temp := w.path(w.at.segment+1) + ".tmp"
	next := make(chan error, 1)
	w.next = next
	w.opts.background(func() { next <- w.fill(temp) })
}

// fill fills a new file with zeros, and makes its name durable. Overwriting zeros can be
// synced twice as fast as making a file grow.
func (w *wal) fill(path string) error {
	f, err := w.fs.create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	zeros := make([]byte, min(zeroBytes, w.opts.segmentBytes))
	for n := 0; n < w.opts.segmentBytes; n += len(zeros) {
		part := zeros[:min(len(zeros), w.opts.segmentBytes-n)]
		if err := writeSync(f, part, n); err != nil {
			return err
		}
	}
	return w.fs.syncDir(w.dir)
}

// truncateFront removes the oldest segments, up to the first one that holds an entry
// after index, or after the snapshot. It first makes durable which segment is then the
// oldest one needed, so that the missing ones do not pass for lost.
func (w *wal) truncateFront(index uint64) error {
	index = min(index, w.head.Snapshot.GetIndex())
	n := 0
	for n < len(w.segments)-1 && w.segments[n].last <= index {
		n++
	}
	if n == 0 {
		return w.err
	}
	if err := w.append(&kvpb.LogBatch{FirstSegment: w.segments[n].number}); err != nil {
		return err
	}
	w.err = w.removeFront()
	return w.err
}

// removeFront removes the segments before the oldest one needed, and makes the
// directory durable as it is then.
func (w *wal) removeFront() error {
	for w.segments[0].number < w.head.FirstSegment {
		if err := w.fs.remove(w.path(w.segments[0].number)); err != nil {
			return err
		}
		w.segments = w.segments[1:]
	}
	return w.fs.syncDir(w.dir)
}

// close ends the goroutine and closes the log. Whatever was appended is synced.
func (w *wal) close() {
	if w.next != nil {
		<-w.next
		w.next = nil
	}
	if w.file != nil {
		_ = w.file.Close()
		w.file = nil
	}
	if w.err == nil {
		w.err = errWALClosed
	}
}
