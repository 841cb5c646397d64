// Frames: what carries the checksums of a snapshot, on the network as on disk, and of
// the file identity.

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// A framed stream is 8 bytes of magic, the last of them the version, and then frames. A
// frame is the length of its data, the CRC-32C of the data continued from the frame
// before, both 4 bytes and little-endian, and the data. Frames do not tell whether the
// stream is complete: the data have to, as a snapshot does by its footer. A checksum in the
// footer alone would save 8 bytes of 256 KiB, and find damage only after all was parsed, and not
// where it is.
const (
	frameMagic       = "rkvsnap\x01"
	frameHeaderBytes = 8
	maxFrameBytes    = 256 << 10 // with the header
)

var (
	castagnoli      = crc32.MakeTable(crc32.Castagnoli)
	errFrameFormat  = errors.New("it does not begin as it should")
	errFrameDamaged = errors.New("a frame is damaged")
	// errUnknownFormat is no sign of damage: another version of the program reads it.
	errUnknownFormat = errors.New("it is of a format that this program does not know")
)

// frameWriter makes frames of what is written to it, and writes each by one Write.
type frameWriter struct {
	w   io.Writer
	err error // of the magic
	sum uint32
	buf []byte
}

func newFrameWriter(w io.Writer) *frameWriter {
	f := &frameWriter{w: w, buf: make([]byte, frameHeaderBytes, 4<<10)}
	_, f.err = io.WriteString(w, frameMagic)
	return f
}

func (f *frameWriter) Write(b []byte) (n int, err error) {
	for len(b) > 0 {
		fits := min(maxFrameBytes-len(f.buf), len(b))
		f.buf = append(f.buf, b[:fits]...)
		n += fits
		b = b[fits:]
		if len(f.buf) < maxFrameBytes {
			continue
		}
		if err := f.flush(); err != nil {
			return n, err
		}
	}
	return n, nil
}

// flush writes the frame that has been begun, if there is one.
func (f *frameWriter) flush() error {
	data := f.buf[frameHeaderBytes:]
	if f.err != nil || len(data) == 0 {
		return f.err
	}
	f.sum = crc32.Update(f.sum, castagnoli, data)
	binary.LittleEndian.PutUint32(f.buf, uint32(len(data)))
	binary.LittleEndian.PutUint32(f.buf[4:], f.sum)
	_, err := f.w.Write(f.buf)
	f.buf = f.buf[:frameHeaderBytes]
	return err
}

// frameReader reads the data of frames. After an error, offset says where in the stream
// the frame begins that it could not read.
type frameReader struct {
	r      io.Reader
	sum    uint32
	offset int64  // of the next frame
	data   []byte // of the present frame: what is not read yet
	buf    []byte // holds data
}

func newFrameReader(r io.Reader) *frameReader { return &frameReader{r: r} }

func (f *frameReader) Read(b []byte) (int, error) {
	for len(f.data) == 0 {
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, f.data)
	f.data = f.data[n:]
	return n, nil
}

// next reads the next frame, and the magic before the first one.
func (f *frameReader) next() error {
	if f.offset == 0 {
		magic := make([]byte, len(frameMagic))
		if _, err := io.ReadFull(f.r, magic); err != nil {
			return noEOF(err)
		}
		version := len(magic) - 1
		if string(magic[:version]) == frameMagic[:version] && magic[version] > frameMagic[version] {
			return errUnknownFormat
		}
		if string(magic) != frameMagic {
			return errFrameFormat
		}
		f.offset = int64(len(magic))
		f.buf = make([]byte, 4<<10)
	}
	header := f.buf[:frameHeaderBytes]
	if _, err := io.ReadFull(f.r, header); err != nil {
		return err
	}
	size := binary.LittleEndian.Uint32(header)
	sum := binary.LittleEndian.Uint32(header[4:])
	if size == 0 || size > maxFrameBytes-frameHeaderBytes {
		return errFrameDamaged
	}
	if int(size) > len(f.buf) {
		f.buf = make([]byte, size)
	}
	data := f.buf[:size]
	if _, err := io.ReadFull(f.r, data); err != nil {
		return noEOF(err)
	}
	f.sum = crc32.Update(f.sum, castagnoli, data)
	if f.sum != sum {
		return errFrameDamaged
	}
	f.offset += int64(frameHeaderBytes + size)
	f.data = data
	return nil
}

var errCutShort = fmt.Errorf("it ends in the middle: %w", io.ErrUnexpectedEOF)

// noEOF makes of io.EOF, and the like, the error that says that a stream is not complete.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errCutShort
	}
	return err
}
