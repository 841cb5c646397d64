// A file that should be a backup: what it is, and whether it is whole.

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"unicode"
	"unicode/utf8"

	"raft-key-value/kvpb"
)

// savedFile is a file, or stdin, that a backup is read from until ctx ends.
type savedFile struct {
	ctx  context.Context
	name string
	r    io.Reader
	from io.Closer   // closing it ends reading
	stop func() bool // stops waiting for ctx
}

// openSaved opens the file of a backup; - is stdin. A directory is none.
func openSaved(ctx context.Context, path string, stdin io.Reader) (*savedFile, error) {
	if path == "-" {
		return readStdin(ctx, stdin), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s: it is a directory, and no backup; backup --data-dir makes one of it", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	s := &savedFile{ctx: ctx, name: path, r: f, from: f}
	s.stop = context.AfterFunc(ctx, func() { f.Close() })
	return s, nil
}

// readStdin reads stdin in a goroutine, which goes on until the process ends if ctx ends first:
// nothing can interrupt it.
func readStdin(ctx context.Context, stdin io.Reader) *savedFile {
	r, w := io.Pipe()
	go func() {
		_, err := io.Copy(w, stdin)
		w.CloseWithError(err)
	}()
	s := &savedFile{ctx: ctx, name: "stdin", r: r, from: r}
	s.stop = context.AfterFunc(ctx, func() { r.Close() })
	return s
}

func (s *savedFile) close() {
	s.stop()
	_ = s.from.Close()
}

// scan reads the file as a snapshot. Its errors name the file, and say what it is if it is none.
func (s *savedFile) scan(o snapshotScan) (*store, *kvpb.SnapshotHeader, error) {
	br := bufio.NewReaderSize(s.r, 64<<10)
	err := checkBeginning(br)
	if err != nil {
		return nil, nil, s.failed(err)
	}
	o.speaks = programLevel
	st, h, err := scanSnapshot(br, o)
	if err != nil {
		return nil, nil, s.failed(err)
	}
	return st, h, nil
}

func (s *savedFile) failed(err error) error {
	if s.ctx.Err() != nil {
		err = s.ctx.Err()
	}
	return fmt.Errorf("%s: %w", s.name, err)
}

// notSnapshot is the error of a file that is whole, perhaps, but another thing.
type notSnapshot string

func (e notSnapshot) Error() string { return string(e) }

// identityBeginning is how the data of a file identity begin: with Identity.format.
const identityBeginning = "\x08\x01"

var errEmpty = errors.New("offset 0: it is empty")

// otherFiles are beginnings of files that are no backups, and what such files are.
var otherFiles = []struct{ beginning, is string }{
	{walMagic[:len(walMagic)-1], "it is a segment of a node's log, out of a data directory, and no backup"},
	{"\x1f\x8b", "it is compressed by gzip, and no backup as it is: read what gzip -dc makes of it, by -"},
	{"\x28\xb5\x2f\xfd", "it is compressed by zstd, and no backup as it is: read what zstd -dc makes of it, by -"},
	{"\xfd7zXZ\x00", "it is compressed by xz, and no backup as it is: read what xz -dc makes of it, by -"},
	{"BZh", "it is compressed by bzip2, and no backup as it is: read what bzip2 -dc makes of it, by -"},
	{"PK\x03\x04", "it is a zip archive, and no backup"},
}

const (
	errText    = notSnapshot("it is a text, and no backup")
	errUnknown = notSnapshot("it begins as no backup does, and as nothing else that is known here")
)

// beginningBytes are enough to tell a text from other files.
const beginningBytes = 512

// checkBeginning refuses files that are no snapshots for what they are. A file that begins a little
// like a snapshot, or with zeros, as what was lost on a disk reads, may be a damaged one.
func checkBeginning(br *bufio.Reader) error {
	b, err := br.Peek(beginningBytes)
	if len(b) == 0 && err == io.EOF {
		return errEmpty
	}
	if len(b) == 0 {
		return nil // whoever reads on finds the error
	}
	for _, other := range otherFiles {
		if bytes.HasPrefix(b, []byte(other.beginning)) {
			return notSnapshot(other.is)
		}
	}
	if isIdentity(b) {
		return notSnapshot("it is the file identity of a data directory, and no backup")
	}
	magic := b[:min(len(b), len(frameMagic))]
	switch {
	case resembles(magic, frameMagic), allZero(magic):
		return nil
	case isText(b):
		return errText
	}
	return errUnknown
}

// isIdentity reports whether the beginning of a file is that of a file identity.
func isIdentity(b []byte) bool {
	data := len(frameMagic) + frameHeaderBytes
	isFramed := bytes.HasPrefix(b, []byte(frameMagic)) && len(b) > data
	return isFramed && bytes.HasPrefix(b[data:], []byte(identityBeginning))
}

// resembles reports whether half of the bytes are those of a magic.
func resembles(b []byte, magic string) bool {
	same := 0
	for i := range b {
		if b[i] == magic[i] {
			same++
		}
	}
	return 2*same >= len(b)
}

// isText reports whether the beginning of a file is UTF-8 without control characters. Its last character
// may be cut.
func isText(b []byte) bool {
	isControl := func(r rune) bool { return unicode.IsControl(r) && !unicode.IsSpace(r) }
	for len(b) > 0 {
		r, size := utf8.DecodeRune(b)
		isCut := !utf8.FullRune(b)
		if isCut {
			return true
		}
		isBroken := r == utf8.RuneError && size == 1
		if isBroken || isControl(r) {
			return false
		}
		b = b[size:]
	}
	return true
}
