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

// checkBeginning refuses files that are no snapshots for what they are.
func checkBeginning(br *bufio.Reader) error {
	b, err := br.Peek(len(frameMagic) + frameHeaderBytes + len(identityBeginning))
	if len(b) == 0 && err == io.EOF {
		return errEmpty
	}
	name := len(walMagic) - 1 // without the version
	if bytes.HasPrefix(b, []byte(walMagic[:name])) {
		return notSnapshot("it is a segment of a node's log, out of a data directory, and no backup")
	}
	isFramed := bytes.HasPrefix(b, []byte(frameMagic))
	if isFramed && bytes.HasSuffix(b, []byte(identityBeginning)) {
		return notSnapshot("it is the file identity of a data directory, and no backup")
	}
	return nil // what else it is, or an error of reading, is found by whoever reads on
}
