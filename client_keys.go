// The sub-commands on keys: set, get, list and delete.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"raft-key-value/kvpb"
)

func (c *client) set(ctx context.Context) (err error) {
	req := &kvpb.SetRequest{Key: c.args[0], Value: []byte(c.args[1]), ExpectedVersion: c.ifVersion}
	if c.args[1] == "-" {
		if req.Value, err = readValue(ctx, c.stdin); err != nil {
			return err
		}
		if len(req.Value) > maxValueBytes {
			return usageError("stdin has more than %d bytes, which is the limit", maxValueBytes)
		}
	}
	if req.RequestId, err = c.newID(ctx); err != nil {
		return err
	}
	resp, err := c.kv().Set(ctx, req)
	if err = c.show(resp, err, ""); err == nil && resp.CompareFailed {
		err = compareError(resp.Version)
	}
	return err
}

// newID opens a session for one write, which may then be sent again and again.
func (c *client) newID(ctx context.Context) (*kvpb.RequestId, error) {
	resp, err := c.kv().OpenSession(ctx, &kvpb.OpenSessionRequest{})
	if e, ok := errors.AsType[*commandError](err); ok { // A node calls it a write; what the user wrote was never sent.
		said := strings.ReplaceAll(e.Text, errOutcomeUnknown.Error(), "whether one was opened is not known")
		e = e.say("nothing was written: no session could be opened: " + said)
		if e.Reason == "OUTCOME_UNKNOWN" {
			e.Reason = "" // it is known of the write
		}
		return nil, e
	}
	if err != nil {
		return nil, err
	}
	return &kvpb.RequestId{Session: resp.Session, Sequence: 1}, nil
}

// readValue reads all of r, up to one byte more than a node takes. If ctx ends
// first, what reads goes on until the process ends.
func readValue(ctx context.Context, r io.Reader) ([]byte, error) {
	value, w := io.Pipe()
	go func() {
		_, err := io.Copy(w, io.LimitReader(r, maxValueBytes+1))
		w.CloseWithError(err)
	}()
	defer context.AfterFunc(ctx, func() { w.CloseWithError(fmt.Errorf("reading stdin: %w", ctx.Err())) })()
	return io.ReadAll(value)
}

var errNotFound = noError("not found")

func compareError(version uint64) error {
	if version == 0 {
		return noError("compare failed: the key is not there")
	}
	return noError("compare failed: the key has version %d", version)
}

func (c *client) get(ctx context.Context) error {
	resp, err := c.kv().Get(ctx, &kvpb.GetRequest{Key: c.args[0], Local: c.local})
	text := string(resp.GetValue())
	if info, err := os.Stdout.Stat(); resp.GetValue() != nil && c.stdout == os.Stdout && err == nil && info.Mode()&os.ModeCharDevice != 0 {
		text += "\n" // on a terminal
	}
	if err = c.show(resp, err, text); err == nil && resp.Value == nil {
		err = errNotFound
	}
	return err
}

// list prints page after page; with -o json each is a line.
func (c *client) list(ctx context.Context) error {
	req := &kvpb.ListRequest{Prefix: strings.Join(c.args, ""), Local: c.local}
	for left := cmp.Or(c.limit, math.MaxUint64); ; {
		req.Limit = uint32(min(left, 1000))
		resp, err := c.kv().List(ctx, req)
		var lines strings.Builder
		for _, kv := range resp.GetItems() {
			rest := fmt.Sprintf("\t%d\t%q", kv.Version, kv.Value)
			if c.keysOnly {
				kv.Value, rest = nil, ""
			}
			fmt.Fprintf(&lines, "%q%s\n", kv.Key, rest)
		}
		left -= min(left, uint64(len(resp.GetItems())))
		if err = c.show(resp, err, lines.String()); err != nil || resp.NextPageToken == "" || left == 0 {
			return err
		}
		req.PageToken = resp.NextPageToken
	}
}

func (c *client) delete(ctx context.Context) (err error) {
	req := &kvpb.DeleteRequest{Key: c.args[0], ExpectedVersion: c.ifVersion}
	if req.RequestId, err = c.newID(ctx); err != nil {
		return err
	}
	resp, err := c.kv().Delete(ctx, req)
	switch err = c.show(resp, err, ""); {
	case err != nil || resp.Deleted:
		return err
	case resp.CompareFailed:
		return compareError(resp.Version)
	}
	return errNotFound
}
