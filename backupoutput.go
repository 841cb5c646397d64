// Where a backup goes: a file that has its name only once all is in it, or stdout.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// backupOutput is a backup that is being written.
type backupOutput interface {
	io.Writer
	// rewind takes back what was written, or says why it cannot.
	rewind() error
	// finish makes what was written the backup.
	finish() error
	// close ends the writing. What is not finished is removed, where it can be.
	close()
	// spoilt adds to an error of a backup that is not finished what became of it.
	spoilt(error) error
}

// outputError is an error of writing a backup: no other node would help.
type outputError struct{ error }

func (e outputError) Unwrap() error { return e.error }

// openOutput begins the file of a backup, or writes to stdout, which - stands for.
func (c *client) openOutput(ctx context.Context, path string) (backupOutput, error) {
	if path != "-" && c.dataDir != "" {
		if err := checkOutside(path, c.dataDir); err != nil {
			return nil, err
		}
	}
	if path != "-" {
		return createBackup(path)
	}
	if c.printsToTerminal() {
		return nil, usageError("stdout is a terminal, and a backup is no text: " +
			"name a FILE, or send stdout to a file or a program")
	}
	out := newBackupStream(ctx, c.stdout)
	c.stdout = c.stderr // The result goes there: stdout is the backup.
	return out, nil
}

// backupFile is a backup in a file.
type backupFile struct {
	*os.File
	path  string // its final name
	named bool   // it has that
}

func createBackup(path string) (*backupFile, error) {
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("%w: if no other backup writes it, one was killed: delete it", err)
	}
	if err != nil {
		return nil, err
	}
	b := &backupFile{File: f, path: path}
	if err := checkAbsent(path); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *backupFile) Write(p []byte) (int, error) {
	n, err := b.File.Write(p)
	if err != nil {
		return n, outputError{err}
	}
	return n, nil
}

func (b *backupFile) rewind() error {
	if _, err := b.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return b.Truncate(0)
}

// finish makes the file durable under its final name, which no other file may have.
func (b *backupFile) finish() error {
	if err := b.Sync(); err != nil {
		return err
	}
	if err := nameOnce(b.Name(), b.path, os.Link); err != nil {
		return err
	}
	b.named = true
	return osFS{}.syncDir(filepath.Dir(b.path))
}

// nameOnce gives a file another name, which no file may have, not even one that was made just now:
// that, a rename would replace. link is os.Link, but in tests.
func nameOnce(from, to string, link func(from, to string) error) error {
	err := link(from, to)
	if errors.Is(err, os.ErrExist) {
		return alreadyThere(to)
	}
	if err == nil {
		_ = os.Remove(from) // what is left of it takes the name from no other backup
		return nil
	}
	// A file system without links, such as FAT: a file that is empty takes the name first.
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return alreadyThere(to)
	}
	if err != nil {
		return err
	}
	_ = f.Close()
	err = os.Rename(from, to)
	if err != nil {
		_ = os.Remove(to)
	}
	return err
}

func alreadyThere(path string) error {
	return &os.PathError{Op: "create", Path: path, Err: os.ErrExist}
}

func (b *backupFile) close() {
	_ = b.Close()
	if !b.named {
		_ = os.Remove(b.Name())
	}
}

func (b *backupFile) spoilt(err error) error { return err }

// checkAbsent returns an error if there is a file of this name.
func checkAbsent(path string) error {
	_, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		return alreadyThere(path)
	}
	return err
}

// checkOutside refuses a file in a data directory that is saved, or anywhere below it: nothing
// there is changed.
func checkOutside(path, dataDir string) error {
	saved, err := os.Stat(dataDir)
	if err != nil {
		return nil // whoever reads it finds the error
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return nil // likewise who makes the file
	}
	for {
		info, err := os.Stat(dir)
		if err == nil && os.SameFile(info, saved) {
			return usageError("%s would be in the data directory %s, where nothing is changed", path, dataDir)
		}
		above := filepath.Dir(dir)
		if above == dir {
			return nil
		}
		dir = above
	}
}

// backupStream is a backup that is written to stdout, from a goroutine: whoever reads it may stop
// reading, and nothing can interrupt a write. If ctx ends first, the goroutine goes on until the
// process ends.
type backupStream struct {
	ctx     context.Context
	stdout  io.Writer
	pipe    *io.PipeWriter // to the goroutine
	written bool           // something may have got out
	ended   chan struct{}  // closed when the goroutine has ended
	err     error          // of the goroutine, once it has ended
	stop    func() bool    // stops waiting for ctx
	broken  chan os.Signal // SIGPIPE, which would end the process without a word
}

func newBackupStream(ctx context.Context, stdout io.Writer) *backupStream {
	r, w := io.Pipe()
	s := &backupStream{
		ctx:    ctx,
		stdout: stdout,
		pipe:   w,
		ended:  make(chan struct{}),
		stop:   context.AfterFunc(ctx, func() { r.CloseWithError(ctx.Err()) }),
		broken: make(chan os.Signal, 1),
	}
	signal.Notify(s.broken, syscall.SIGPIPE)
	go func() {
		defer close(s.ended)
		_, s.err = io.Copy(stdout, r)
		r.CloseWithError(s.err)
	}()
	return s
}

func (s *backupStream) Write(p []byte) (int, error) {
	s.written = true
	n, err := s.pipe.Write(p)
	if err != nil {
		return n, outputError{err}
	}
	return n, nil
}

func (s *backupStream) rewind() error {
	if s.written {
		return errors.New("stdout cannot be begun anew at another node")
	}
	return nil
}

// finish waits until all is written.
func (s *backupStream) finish() error {
	_ = s.pipe.Close()
	select {
	case <-s.ended:
		if s.err != nil {
			return s.err
		}
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
	return s.sync()
}

// sync makes a file durable that the shell has opened.
func (s *backupStream) sync() error {
	f, isFile := s.stdout.(*os.File)
	if !isFile {
		return nil
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	return f.Sync()
}

func (s *backupStream) close() {
	_ = s.pipe.CloseWithError(errors.New("the backup has failed"))
	select {
	case <-s.ended:
	case <-s.ctx.Done():
	}
	s.stop()
	signal.Stop(s.broken)
}

func (s *backupStream) spoilt(err error) error {
	if !s.written {
		return err
	}
	return fmt.Errorf("%w; what was written to stdout is no backup", err)
}
