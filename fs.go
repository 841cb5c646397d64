// The file system: the calls by which the data directory is read and made durable, behind
// an interface, so that tests can have each of them fail.

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// fileSystem has the calls of package os, most of them under the same names.
type fileSystem interface {
	create(path string) (file, error) // empties it if it exists
	open(path string) (file, error)   // to read and write
	readFile(path string) ([]byte, error)
	rename(from, to string) error
	remove(path string) error
	readDir(dir string) ([]string, error) // names, sorted
	// lock locks a directory for this process, until the Closer is closed. It makes the
	// directory if it is not there.
	lock(dir string) (io.Closer, error)
	// free returns how many bytes of the file system that a directory is in are free for this
	// process. It may block.
	free(dir string) (uint64, error)
	// syncDir makes the names in a directory durable.
	syncDir(dir string) error
}

type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// sync makes the content durable, and the metadata that is needed to read it.
	sync() error
}

type osFS struct{}

type osFile struct{ *os.File }

func (osFS) create(path string) (file, error)     { return openFile(path, os.O_CREATE|os.O_TRUNC) }
func (osFS) open(path string) (file, error)       { return openFile(path, 0) }
func (osFS) readFile(path string) ([]byte, error) { return os.ReadFile(path) }
func (osFS) rename(from, to string) error         { return os.Rename(from, to) }
func (osFS) remove(path string) error             { return os.Remove(path) }

func openFile(path string, flag int) (file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|flag, 0o600)
	return osFile{f}, err
}

func (osFS) readDir(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

func (osFS) lock(dir string) (io.Closer, error) {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: the parent of a data directory has to be there", err)
	}
	if err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	// The directory's own name has to survive, too. Without permission to sync the parent,
	// this process cannot have made it.
	err = osFS{}.syncDir(filepath.Dir(filepath.Clean(dir)))
	if err != nil && !errors.Is(err, os.ErrPermission) {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "LOCK"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(f, syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("the data directory %s: %w", dir, lockError(f.Name(), err))
	}
	return heldLock{f}, nil
}

// heldLock is a file that is locked until Close.
type heldLock struct{ *os.File }

// Close unlocks the file, and closes it. To close it would not be enough: a process that is
// just being started has the file, too, until it runs its own program.
func (l heldLock) Close() error {
	err := lockFile(l.File, syscall.LOCK_UN)
	return errors.Join(err, l.File.Close())
}

// lockFile locks a file at once, or not at all. How is LOCK_EX, LOCK_SH, or LOCK_UN to unlock it.
func lockFile(f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		if err != syscall.EINTR { // EINTR: it did nothing, and is called again
			return err
		}
	}
}

// lockError says why a file cannot be locked: EWOULDBLOCK alone means that another process
// has the lock.
func lockError(name string, err error) error {
	if err == syscall.EWOULDBLOCK {
		return fmt.Errorf("another process uses it (%w)", err)
	}
	return &os.PathError{Op: "flock", Path: name, Err: err}
}

func (osFS) syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (f osFile) sync() error { return syncData(f.File) }
