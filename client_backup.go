// The sub-commands backup and restore.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"raft-key-value/kvpb"
)

// backup makes a file that has its name only once all of it is there, was checked,
// and is durable.
func (c *client) backup(ctx context.Context) error {
	path := c.args[0]
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: if no other backup writes it, one was killed: delete it", err)
	}
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // If all goes well, the file has its final name by then.
	defer f.Close()
	if err := checkAbsent(path); err != nil {
		return err
	}
	s, err := c.backupInto(ctx, f)
	if err != nil {
		return err
	}
	if err := giveName(f, path); err != nil {
		return err
	}
	c.madeFiles = true
	return c.printState(s, "wrote")
}

// checkAbsent returns an error if there is a file of this name.
func checkAbsent(path string) error {
	_, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = &os.PathError{Op: "create", Path: path, Err: os.ErrExist}
	}
	return err
}

// giveName makes a file durable under its final name, which no other file may have.
func giveName(f *os.File, path string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := checkAbsent(path); err != nil { // Downloading it took a while.
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return osFS{}.syncDir(filepath.Dir(path))
}

// backupInto asks one endpoint after another, until one has sent a whole backup.
func (c *client) backupInto(ctx context.Context, f *os.File) (*store, error) {
	r := c.calls.newRound(ctx)
	defer r.end()
	for e := r.next(); e != nil; e = r.next() {
		s, err := c.backupFrom(ctx, e, f)
		if err == nil {
			return s, nil
		}
		if _, isOfFile := errors.AsType[*os.PathError](err); isOfFile {
			return nil, err // No other node would help.
		}
		r.record(e, err)
		if err := rewind(f); err != nil {
			return nil, err
		}
	}
	return nil, callError(r.replies)
}

// rewind empties a file.
func rewind(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return f.Truncate(0)
}

// backupFrom writes what one endpoint sends to a file, and checks it on its way.
func (c *client) backupFrom(ctx context.Context, e *endpoint, f *os.File) (*store, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := kvpb.NewClusterServiceClient(e.conn).Backup(ctx, &kvpb.BackupRequest{})
	if err != nil {
		return nil, err
	}
	var broken error // the stream's error, which says more than that the snapshot ends too soon
	receive := func() ([]byte, error) {
		resp, err := stream.Recv()
		if err != nil && err != io.EOF {
			broken = err
		}
		return resp.GetData(), err
	}
	s, err := scanSnapshot(io.TeeReader(&chunkReader{recv: receive}, f), false, programLevel, c.keysDone)
	return s, cmp.Or(broken, err)
}

// restore makes a data directory. If it fails, it takes away what it has made, and
// the directory, too, if that was not there.
func (c *client) restore(ctx context.Context) error {
	f, err := os.Open(c.args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	before := lookAt(c.dataDir)
	d, err := openDisk(osFS{}, c.dataDir, defaultOptions().logBytes, c.logger())
	if err != nil {
		return err
	}
	defer d.close()
	stopWatching := context.AfterFunc(ctx, func() { f.Close() }) // That ends reading.
	defer stopWatching()
	s, err := d.restore(c.node, time.Now(), func() (*store, error) {
		before.wasEmpty = true // Else d would not read the snapshot.
		s, err := scanSnapshot(f, true, programLevel, c.keysDone)
		if err != nil {
			err = fmt.Errorf("%s: %w", f.Name(), cmp.Or(ctx.Err(), err))
		}
		return s, err
	})
	if err != nil {
		before.bringBack(d)
		return err
	}
	c.madeFiles = true
	return c.printState(s, "restored")
}

// directoryBefore is what a data directory was before restore.
type directoryBefore struct {
	wasThere  bool
	wasLocked bool // its file LOCK was there
	wasEmpty  bool
}

// lookAt looks at a directory, but not whether it is empty.
func lookAt(dir string) *directoryBefore {
	_, dirErr := os.Lstat(dir)
	_, lockErr := os.Lstat(filepath.Join(dir, "LOCK"))
	return &directoryBefore{
		wasThere:  !errors.Is(dirErr, os.ErrNotExist),
		wasLocked: !errors.Is(lockErr, os.ErrNotExist),
	}
}

// bringBack undoes a restore that has failed, as far as it can.
func (b *directoryBefore) bringBack(d *disk) {
	if b.wasEmpty && d.wal != nil {
		d.wal.close() // That ends the goroutine that fills a segment.
	}
	if b.wasEmpty {
		_, _ = d.recover(0) // It removes what is not finished. What is finished is not node 0's.
	}
	if !b.wasLocked {
		_ = d.remove("LOCK")
	}
	if !b.wasThere {
		_ = d.fs.remove(d.dir) // It fails if there is something in the directory.
	}
}

// logger prints what a part of a node logs.
func (c *client) logger() *slog.Logger {
	if c.output == "json" {
		return slog.New(slog.NewJSONHandler(c.stderr, nil))
	}
	return slog.New(slog.NewTextHandler(c.stderr, nil))
}

func (c *client) printState(s *store, did string) error {
	h := s.header()
	text := fmt.Sprintf("%s keys: %d, version: %d, cluster: %016x\n", did, h.Keys, h.Version, h.ClusterId)
	return c.print(protoJSON{h}, text)
}
