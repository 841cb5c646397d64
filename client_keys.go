// The sub-commands on single keys: set, get and delete.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"raft-key-value/kvpb"
)

var errNotFound = noError("not found")

func (c *client) set(ctx context.Context) error {
	value, err := c.valueToSet(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout) // If stdin was waited for, it begins now.
	defer cancel()
	id, err := c.newID(ctx)
	if err != nil {
		return err
	}
	resp, err := c.kv().Set(ctx, &kvpb.SetRequest{
		Key:             c.args[0],
		Value:           value,
		ExpectedVersion: c.ifVersion,
		RequestId:       id,
	})
	if err := c.printResponse(resp, err, ""); err != nil {
		return err
	}
	if resp.CompareFailed {
		return compareError(resp.Version)
	}
	return nil
}

// valueToSet is the argument VALUE, or what stdin has.
func (c *client) valueToSet(ctx context.Context) ([]byte, error) {
	if c.args[1] != "-" {
		return []byte(c.args[1]), nil
	}
	value, err := readAtMost(ctx, c.stdin, maxValueBytes+1)
	if err != nil {
		return nil, err
	}
	if len(value) > maxValueBytes {
		return nil, usageError("stdin has more than %d bytes, which is the limit", maxValueBytes)
	}
	return value, nil
}

// readAtMost reads all of r, up to a limit in bytes. If ctx ends first, the goroutine
// that reads goes on until the process ends: nothing can interrupt it.
func readAtMost(ctx context.Context, r io.Reader, limit int64) ([]byte, error) {
	value, w := io.Pipe()
	go func() {
		_, err := io.Copy(w, io.LimitReader(r, limit))
		w.CloseWithError(err)
	}()
	stop := context.AfterFunc(ctx, func() { w.CloseWithError(fmt.Errorf("reading stdin: %w", ctx.Err())) })
	defer stop()
	return io.ReadAll(value)
}

// newID opens a session for one write, which may then be sent again and again.
func (c *client) newID(ctx context.Context) (*kvpb.RequestId, error) {
	resp, err := c.kv().OpenSession(ctx, &kvpb.OpenSessionRequest{})
	if failed, ok := errors.AsType[*commandError](err); ok {
		return nil, noSession(failed)
	}
	if err != nil {
		return nil, err
	}
	return &kvpb.RequestId{Session: resp.Session, Sequence: 1}, nil
}

// noSession is the error of a write that was never sent, because no session could be
// opened for it. Nodes say OUTCOME_UNKNOWN of a session that may have been opened; of
// the write, the outcome is known.
func noSession(failed *commandError) *commandError {
	e := *failed
	e.Endpoints = nil
	for _, r := range failed.Endpoints {
		if r.Reason == reasonOutcomeUnknown {
			r.Error = fmt.Sprintf("whether a session was opened is not known (%s %s)", r.Code, r.Reason)
			r.Reason = ""
		}
		e.Endpoints = append(e.Endpoints, r)
	}
	e.Text = "nothing was written: no session could be opened: " + textOf(e.Endpoints)
	e.Reason = firstReason(e.Endpoints)
	return &e
}

func compareError(version uint64) error {
	if version == 0 {
		return noError("compare failed: the key is not there")
	}
	return noError("compare failed: the key has version %d", version)
}

func (c *client) get(ctx context.Context) error {
	resp, err := c.kv().Get(ctx, &kvpb.GetRequest{
		Key:        c.args[0],
		Local:      c.local,
		MinVersion: c.minVersion,
	})
	text := string(resp.GetValue())
	if resp.GetValue() != nil && c.printsToTerminal() {
		text += "\n"
	}
	if err := c.printResponse(resp, err, text); err != nil {
		return err
	}
	if resp.Value == nil {
		return errNotFound
	}
	return nil
}

func (c *client) printsToTerminal() bool {
	f, isFile := c.stdout.(*os.File)
	return isFile && isTerminal(f)
}

// isTerminal reports whether a person may be at a file's other end.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(info, null)
}

// delete deletes a key, or a range of them.
func (c *client) delete(ctx context.Context) error {
	if c.hasRange() {
		return c.deleteRange(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.deleteKey(ctx)
}

func (c *client) deleteKey(ctx context.Context) error {
	id, err := c.newID(ctx)
	if err != nil {
		return err
	}
	resp, err := c.kv().Delete(ctx, &kvpb.DeleteRequest{
		Key:             c.args[0],
		ExpectedVersion: c.ifVersion,
		RequestId:       id,
	})
	if err := c.printResponse(resp, err, ""); err != nil {
		return err
	}
	switch {
	case resp.CompareFailed:
		return compareError(resp.Version)
	case !resp.Deleted:
		return errNotFound
	}
	return nil
}
