// The frames of HTTP/2 on a connection. They say how many calls of it are open: gRPC keeps an
// answer that its client does not take, and does not tell.

package main

import "encoding/binary"

const (
	http2HeaderBytes  = 9
	http2PrefaceBytes = 24 // what a client says before its first frame

	// Kinds of frames, and the flag of the last one of a stream (RFC 9113, section 6).
	headersFrame  = 1
	resetFrame    = 3
	endStreamFlag = 1
)

// http2Frames follows the frames of one direction of a connection, in whatever parts they come.
type http2Frames struct {
	skip   int // bytes that are to come before the next header
	header [http2HeaderBytes]byte
	has    int // bytes of header
}

// next takes bytes in up to the end of the next frame header, and returns those behind it; nil:
// there is no other header.
func (f *http2Frames) next(b []byte) []byte {
	skipped := min(f.skip, len(b))
	f.skip -= skipped
	b = b[skipped:]
	n := copy(f.header[f.has:], b)
	f.has += n
	if f.has < http2HeaderBytes {
		return nil
	}
	f.has = 0
	f.skip = int(binary.BigEndian.Uint32(f.header[:]) >> 8)
	return b[n:]
}

// frame is of the header that next has found.
func (f *http2Frames) frame() (kind, flags byte, stream uint32) {
	return f.header[3], f.header[4], binary.BigEndian.Uint32(f.header[5:]) &^ (1 << 31)
}
