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
	"syscall"
	"time"

	"raft-key-value/kvpb"
)

// backup writes a backup of a running cluster, or of a data directory. A file has its name only
// once all of it is there, was checked, and is durable.
func (c *client) backup(ctx context.Context) error {
	out, err := c.openOutput(ctx, c.args[0])
	if err != nil {
		return err
	}
	defer out.close()
	h, err := c.backupTo(ctx, out)
	if err == nil {
		err = out.finish()
	}
	if err != nil {
		return out.spoilt(err)
	}
	c.madeFiles = true
	c.warnOfOrigin(h)
	return c.printState(h, "wrote")
}

func (c *client) backupTo(ctx context.Context, out backupOutput) (*kvpb.SnapshotHeader, error) {
	if c.dataDir != "" {
		return c.backupDirectory(ctx, out)
	}
	return c.backupCluster(ctx, out)
}

// backupCluster asks one endpoint after another, until one has sent a whole backup.
func (c *client) backupCluster(ctx context.Context, out backupOutput) (*kvpb.SnapshotHeader, error) {
	r := c.calls.newRound(ctx)
	defer r.end()
	for e := r.next(); e != nil; e = r.next() {
		h, err := c.backupFrom(ctx, e, out)
		if err == nil {
			return h, nil
		}
		if failed, isOutput := errors.AsType[outputError](err); isOutput {
			return nil, failed // No other node would help.
		}
		r.record(e, err)
		if err := out.rewind(); err != nil {
			failed := callError(r.replies)
			return nil, failed.withText(fmt.Sprintf("%s; %v", failed.Text, err))
		}
	}
	return nil, callError(r.replies)
}

// backupFrom writes what one endpoint sends.
func (c *client) backupFrom(
	ctx context.Context, e *endpoint, out backupOutput,
) (*kvpb.SnapshotHeader, error) {
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
	h, err := c.copyBackup(&chunkReader{recv: receive}, out)
	if err == errBareSnapshot {
		err = errors.New("it runs an older program, whose backups are not marked as such, and not restored")
	}
	return h, cmp.Or(broken, err)
}

// copyBackup writes a backup, and checks it on its way.
func (c *client) copyBackup(from io.Reader, out backupOutput) (*kvpb.SnapshotHeader, error) {
	_, h, err := scanSnapshot(io.TeeReader(from, out), snapshotScan{
		speaks:     programLevel,
		countsOnly: true,
		check:      checkIsBackup,
		say:        c.progressOf("writing the backup", "keys"),
	})
	if failed, isOutput := errors.AsType[outputError](err); isOutput {
		return nil, failed // The snapshot that is read may be whole.
	}
	return h, err
}

// backupDirectory writes a backup of what a data directory holds.
func (c *client) backupDirectory(ctx context.Context, out backupOutput) (*kvpb.SnapshotHeader, error) {
	saved, err := c.readDirectory(ctx, c.dataDir)
	if err != nil {
		return nil, err
	}
	v := saved.store.openView()
	defer v.close()
	v.header.Origin = kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_DIRECTORY
	v.header.Committed = saved.committed
	r, w := io.Pipe()
	defer r.Close() // That ends the goroutine.
	go func() { w.CloseWithError(v.writeTo(w)) }()
	return c.copyBackup(r, out)
}

// readDirectory reads a data directory, and shows how far it is.
func (c *client) readDirectory(ctx context.Context, dir string) (*savedDirectory, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	var what string // is read now
	var show func(done, all uint64)
	say := func(now, unit string, done, all uint64) {
		if now != what {
			what = now
			show = c.progressOf("reading the "+now, unit)
		}
		show(done, all)
	}
	saved, err := readDirectory(ctx, readOnlyFS{ctx: ctx}, dir, say)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = fmt.Errorf("%w: if that is a node, stop it, or ask it for a backup while it runs, "+
			"by --endpoints", err)
	}
	return saved, err
}

// checkIsBackup refuses a snapshot by its header if it is no backup.
func checkIsBackup(h *kvpb.SnapshotHeader) error {
	switch h.Origin {
	case kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_CLUSTER, kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_DIRECTORY:
		return nil
	case kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_UNSPECIFIED:
		return errBareSnapshot
	}
	return errUnknownOrigin
}

// checkOriginIsKnown refuses a snapshot by its header if nobody here knows what it is of.
func checkOriginIsKnown(h *kvpb.SnapshotHeader) error {
	if err := checkIsBackup(h); err != errBareSnapshot {
		return err
	}
	return nil
}

var errBareSnapshot = errors.New("it is a snapshot that is not marked as a backup. Out of a data directory, " +
	"it lacks what was written after it, which is in the log beside it: make a backup of the whole directory, " +
	"by backup --data-dir. If its log is lost, or if it is a backup by an older program, " +
	"restore --bare-snapshot takes it as it is")

var errUnknownOrigin = fmt.Errorf("it is a backup of a kind that a newer program has made: %w", errUnknownFormat)

// warnOfOrigin says what a backup of one directory may lack, and may have.
func (c *client) warnOfOrigin(h *kvpb.SnapshotHeader) {
	if h.Origin != kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_DIRECTORY {
		return
	}
	c.warn(fmt.Sprintf("this is what one node had, up to entry %d of term %d: "+
		"if it was behind, what was acknowledged later is missing", h.Index, h.Term))
	if h.Index > h.Committed {
		c.warn(fmt.Sprintf("after entry %d, none was known there to be committed: "+
			"the later ones may have been acknowledged, or may never have been committed", h.Committed))
	}
}

// restore makes a data directory. If it fails, it takes away what it has made, and
// the directory, too, if that was not there.
func (c *client) restore(ctx context.Context) error {
	f, err := openSaved(ctx, c.args[0], c.stdin)
	if err != nil {
		return err
	}
	defer f.close()
	before := lookAt(c.dataDir)
	d, err := openDisk(osFS{}, c.dataDir, defaultOptions().logBytes, c.logger())
	if err != nil {
		return err
	}
	defer d.close()
	var h *kvpb.SnapshotHeader
	s, err := d.restore(c.node, time.Now(), func() (*store, error) {
		before.wasEmpty = true // Else d would not read the snapshot.
		var s *store
		var err error
		s, h, err = f.scan(snapshotScan{check: c.checkMayRestore, say: c.progressOf("restoring", "keys")})
		return s, err
	})
	if err != nil {
		before.bringBack(d)
		return err
	}
	c.madeFiles = true
	c.warnOfOrigin(h)
	return c.printState(s.header(), "restored")
}

// checkMayRestore refuses what is no backup, but for a snapshot that the operator calls one.
func (c *client) checkMayRestore(h *kvpb.SnapshotHeader) error {
	err := checkIsBackup(h)
	if err == errBareSnapshot && c.bareSnapshot {
		return nil
	}
	return err
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

func (c *client) printState(h *kvpb.SnapshotHeader, did string) error {
	text := fmt.Sprintf("%s keys: %d, version: %d, cluster: %016x\n", did, h.Keys, h.Version, h.ClusterId)
	return c.print(protoJSON{h}, text)
}
