// Frames: the checksums that a snapshot carries wherever it goes, by network or
// to disk, and the identity file too.

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// A framed stream is 8 bytes of magic, the last of them the version, and then
// frames: length of the data, CRC-32C of the data continued from the frame
// before, both 4 bytes and little-endian, and the data. That what is inside is
// whole, it has to say itself.
const (
	frameMagic       = "rkvsnap\x01"
	frameHeaderBytes = 8
	maxFrameBytes    = 256 << 10 // with the header
)

var (
	castagnoli      = crc32.MakeTable(crc32.Castagnoli)
	errFrameFormat  = errors.New("it does not begin as it should, or is of a format that this program does not know")
	errFrameDamaged = errors.New("a frame is damaged")
)

// frameWriter writes what it is given in frames, each by one Write.
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
	for len(b) > 0 && err == nil {
		room := min(maxFrameBytes-len(f.buf), len(b))
		f.buf = append(f.buf, b[:room]...)
		n, b = n+room, b[room:]
		if len(f.buf) == maxFrameBytes {
			err = f.flush()
		}
	}
	return n, err
}

// flush writes the frame that was begun, if one was.
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

// frameReader reads frames. After an error, offset is where.
type frameReader struct {
	r      io.Reader
	sum    uint32
	offset int64 // of the next frame
	data   []byte
	buf    []byte
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

func (f *frameReader) next() error {
	if f.offset == 0 {
		magic := make([]byte, len(frameMagic))
		if _, err := io.ReadFull(f.r, magic); err != nil {
			return noEOF(err)
		}
		if string(magic) != frameMagic {
			return errFrameFormat
		}
		f.offset, f.buf = int64(len(magic)), make([]byte, 4<<10)
	}
	header := f.buf[:frameHeaderBytes]
	if _, err := io.ReadFull(f.r, header); err != nil {
		return err
	}
	size, sum := binary.LittleEndian.Uint32(header), binary.LittleEndian.Uint32(header[4:])
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
	if f.sum = crc32.Update(f.sum, castagnoli, data); f.sum != sum {
		return errFrameDamaged
	}
	f.offset += int64(frameHeaderBytes + size)
	f.data = data
	return nil
}

var errCutShort = fmt.Errorf("it ends in the middle: %w", io.ErrUnexpectedEOF)

// noEOF makes an end in the middle recognisable as one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errCutShort
	}
	return err
}
