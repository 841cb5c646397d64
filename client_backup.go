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

// backup makes a file that has its name only once all of it is there, was
// checked, and is durable.
func (c *client) backup(ctx context.Context) error {
	path := c.args[0]
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: if no other backup writes it, one was killed: delete it", err)
	}
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // unless it has got its name
	defer f.Close()
	absent := func() error {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			return cmp.Or[error](err, &os.PathError{Op: "create", Path: path, Err: os.ErrExist})
		}
		return nil
	}
	if err := absent(); err != nil {
		return err
	}
	s, err := c.backupInto(ctx, f)
	err = ifNot(err, f.Sync, absent, func() error { return os.Rename(f.Name(), path) },
		func() error { return osFS{}.syncDir(filepath.Dir(path)) })
	if err != nil {
		return err
	}
	c.changed = true
	return c.printState(s, "wrote")
}

// backupInto asks one endpoint after another, until one has sent all of it.
func (c *client) backupInto(ctx context.Context, f *os.File) (*store, error) {
	r := c.newRound(ctx, false)
	defer r.end()
	for e := r.next(); e != nil; e = r.next() {
		s, err := c.backupFrom(ctx, e, f)
		if err == nil || errors.As(err, new(*os.PathError)) { // of f: no other node would help
			return s, err
		}
		r.say(e, err)
		if err := rewind(f); err != nil {
			return nil, err
		}
	}
	return nil, callError(r.answers, false, false)
}

// rewind empties a file.
func rewind(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return f.Truncate(0)
}

// backupFrom writes what one endpoint sends, and checks it.
func (c *client) backupFrom(ctx context.Context, e *endpoint, f *os.File) (*store, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := kvpb.NewClusterServiceClient(e.conn).Backup(ctx, &kvpb.BackupRequest{})
	if err != nil {
		return nil, err
	}
	var broken error
	receive := func() ([]byte, error) {
		resp, err := stream.Recv()
		if err != nil && err != io.EOF {
			broken = err
		}
		return resp.GetData(), err
	}
	s, err := scanSnapshot(io.TeeReader(&chunkReader{recv: receive}, f), false, c.keysDone)
	return s, cmp.Or(broken, err)
}

func (c *client) restore(ctx context.Context) error {
	f, err := os.Open(c.args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	_, there := os.Lstat(c.dataDir)
	_, locked := os.Lstat(filepath.Join(c.dataDir, "LOCK"))
	d, err := openDisk(osFS{}, c.dataDir, defaultOptions().logBytes, c.logger())
	if err != nil {
		return err
	}
	defer d.close()
	defer context.AfterFunc(ctx, func() { f.Close() })() // ends reading
	empty := false
	s, err := d.restore(c.node, time.Now(), func() (*store, error) {
		empty = true // or it would not ask
		s, err := scanSnapshot(f, true, c.keysDone)
		if err != nil {
			err = fmt.Errorf("%s: %w", f.Name(), cmp.Or(ctx.Err(), err))
		}
		return s, err
	})
	if err != nil {
		if empty && d.wal != nil {
			d.wal.close() // ends who fills a segment
		}
		if empty {
			_, _ = d.recover(0) // what is not finished goes; what is, is not node 0's
		}
		if errors.Is(locked, os.ErrNotExist) {
			_ = d.remove("LOCK")
		}
		if errors.Is(there, os.ErrNotExist) {
			_ = d.fs.remove(d.dir) // unless there is something in it
		}
		return err
	}
	c.changed = true
	return c.printState(s, "restored")
}

// logger is for what a part of a node has to say.
func (c *client) logger() *slog.Logger {
	if c.output == "json" {
		return slog.New(slog.NewJSONHandler(c.stderr, nil))
	}
	return slog.New(slog.NewTextHandler(c.stderr, nil))
}

func (c *client) printState(s *store, did string) error {
	h := s.header()
	return c.print(protoJSON{h}, fmt.Sprintf("%s keys: %d, version: %d, cluster: %016x\n", did, h.Keys, h.Version, h.ClusterId))
}
