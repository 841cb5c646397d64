// The sub-commands on ranges of keys: list, and delete of a range.

package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// list prints the keys of a range as they were at one moment, from the first one on.
func (c *client) list(ctx context.Context) error {
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	l := &rangeListing{
		client: c,
		left:   cmp.Or(c.limit, math.MaxUint64),
		late:   status.Errorf(codes.DeadlineExceeded, "no answer in %v", c.timeout),
	}
	l.patience = time.AfterFunc(c.timeout, func() { giveUp(l.late) })
	defer l.patience.Stop()
	scan := func(e *endpoint) (metadata.MD, error) {
		err := l.listFrom(ctx, e)
		if !l.begun {
			return nil, err
		}
		l.err = err // Another node would show another moment.
		return nil, nil
	}
	err := c.calls.callAny(ctx, kvpb.KVService_Scan_FullMethodName, scan)
	return cmp.Or(l.err, err)
}

// rangeListing is one run of list.
type rangeListing struct {
	*client
	left     uint64      // keys that may be printed yet
	begun    bool        // something was printed
	printed  uint64      // keys
	last     string      // the key that was printed last
	err      error       // of a listing that has begun
	patience *time.Timer // ends the listing, because of late
	late     error
}

// listFrom lists the keys of one endpoint.
func (l *rangeListing) listFrom(ctx context.Context, e *endpoint) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := kvpb.NewKVServiceClient(e.conn).Scan(ctx, &kvpb.ScanRequest{
		Prefix:     l.prefix,
		Start:      l.start,
		End:        l.end,
		KeysOnly:   l.keysOnly,
		Local:      l.local,
		MinVersion: l.minVersion,
	})
	if err != nil {
		return l.whyEnded(ctx, e, err)
	}
	head, err := stream.Recv()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return l.whyEnded(ctx, e, err)
	}
	for l.left > 0 {
		resp, err := stream.Recv()
		if err == io.EOF {
			return l.begin(head)
		}
		if err != nil {
			return l.whyEnded(ctx, e, err)
		}
		l.patience.Stop() // Whoever reads the output may take long.
		if err := l.begin(head); err != nil {
			return err
		}
		if err := l.show(resp); err != nil {
			return err
		}
		l.patience.Reset(l.timeout)
	}
	return nil
}

// begin prints the first response, unless something was printed.
func (l *rangeListing) begin(head *kvpb.ScanResponse) error {
	if l.begun {
		return nil
	}
	l.begun = true
	return l.show(head)
}

// show prints a response, or as much of it as is wanted.
func (l *rangeListing) show(resp *kvpb.ScanResponse) error {
	shown := min(l.left, uint64(len(resp.Items)))
	resp.Items = resp.Items[:shown]
	if err := l.printResponse(resp, nil, l.lines(resp.Items)); err != nil {
		return err
	}
	if shown == 0 {
		return nil
	}
	l.left -= shown
	l.printed += shown
	l.last = resp.Items[shown-1].Key
	return nil
}

// whyEnded is the error of a listing whose stream has ended too soon.
func (l *rangeListing) whyEnded(ctx context.Context, e *endpoint, err error) error {
	if context.Cause(ctx) == l.late {
		err = l.late
	}
	if !l.begun {
		return err
	}
	broken := callError([]reply{replyOf(e.address, err)})
	return broken.withText(fmt.Sprintf("it broke off after %d keys, the last of which is %q: %s",
		l.printed, l.last, broken.Text))
}

// lines is a line for each key.
func (l *rangeListing) lines(items []*kvpb.KeyValue) string {
	if l.output == "json" {
		return ""
	}
	var b []byte
	for _, item := range items {
		b = strconv.AppendQuote(b, item.Key)
		if !l.keysOnly {
			b = append(b, '\t')
			b = strconv.AppendUint(b, item.Version, 10)
			b = append(b, '\t')
			b = strconv.AppendQuote(b, string(item.Value))
		}
		b = append(b, '\n')
	}
	return string(b)
}

// deleteRange deletes all keys of a range, and prints how many these were.
func (c *client) deleteRange(ctx context.Context) error {
	if !c.yes {
		if err := c.askBeforeDelete(ctx); err != nil {
			return err
		}
	}
	d := &rangeDelete{client: c}
	if err := d.run(ctx); err != nil {
		return d.halfWay(err)
	}
	text := ""
	if d.sum.Deleted > 0 {
		text = fmt.Sprintf("deleted keys: %d\n", d.sum.Deleted)
	}
	if err := c.printResponse(&d.sum, nil, text); err != nil {
		return err
	}
	if d.sum.Deleted == 0 {
		return errNotFound
	}
	return nil
}

// rangeDelete deletes a range: at once, or one part after the other. No write of it takes
// effect twice, for each has an id.
type rangeDelete struct {
	*client
	id  *kvpb.RequestId          // of the write that was sent last
	sum kvpb.DeleteRangeResponse // of all writes; the version is that of the last one
}

// run deletes until nothing was left at the moment of its last write.
func (d *rangeDelete) run(ctx context.Context) error {
	if err := d.openSession(ctx); err != nil {
		return err
	}
	for {
		resp, err := d.write(ctx, &kvpb.DeleteRangeRequest{Prefix: d.prefix, Start: d.start, End: d.end})
		if err != nil {
			return err
		}
		if !resp.TooMany {
			return nil
		}
		if err := d.deleteFullPages(ctx); err != nil {
			return err
		}
	}
}

func (d *rangeDelete) openSession(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	id, err := d.newID(ctx)
	if err != nil {
		return err
	}
	d.id = &kvpb.RequestId{Session: id.Session}
	return nil
}

// deleteFullPages deletes the keys of the range's first page, but for its last key, until
// the first page is the only one. The last key is the end, which is not deleted: what would
// stand just behind it may be longer than a key may be. A page that others follow has more
// than one key, for it is cut at 1 MiB of keys. If others write between its keys, there may be
// too many of them, and the next page has them.
func (d *rangeDelete) deleteFullPages(ctx context.Context) error {
	for {
		page, err := d.firstPage(ctx)
		if err != nil {
			return err
		}
		if page.NextPageToken == "" {
			return nil
		}
		first := page.Items[0].Key
		last := page.Items[len(page.Items)-1].Key
		if _, err := d.write(ctx, &kvpb.DeleteRangeRequest{Start: first, End: last}); err != nil {
			return err
		}
	}
}

// write makes one write of a range, under the next id.
func (d *rangeDelete) write(
	ctx context.Context, req *kvpb.DeleteRangeRequest,
) (*kvpb.DeleteRangeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	d.id.Sequence++
	req.RequestId = d.id
	resp, err := d.kv().DeleteRange(ctx, req)
	if err != nil {
		return nil, err
	}
	d.sum.Deleted += resp.Deleted
	d.sum.Version = resp.Version
	return resp, nil
}

// halfWay is the error of a deletion that has failed. If something was deleted, it must not
// be taken for one that has done nothing.
func (d *rangeDelete) halfWay(err error) error {
	failed, ok := errors.AsType[*commandError](err)
	if !ok || d.sum.Deleted == 0 {
		return err
	}
	e := *failed
	e.Status = exitUnknown
	e.Text = fmt.Sprintf("%d keys were deleted, others may be left: %s", d.sum.Deleted, failed.Text)
	return &e
}

// firstPage is as much of the keys of a range as a page has.
func (c *client) firstPage(ctx context.Context) (*kvpb.ListResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.kv().List(ctx, &kvpb.ListRequest{
		Prefix:   c.prefix,
		Start:    c.start,
		End:      c.end,
		KeysOnly: true,
		Limit:    maxListItems,
	})
}

// askBeforeDelete asks whoever is at the terminal. It fails unless the answer is yes.
func (c *client) askBeforeDelete(ctx context.Context) error {
	stdin, isFile := c.stdin.(*os.File)
	canAsk := isFile && isTerminal(stdin) && c.output != "json"
	if !canAsk {
		return usageError("there is nobody to ask: --yes removes the keys without that")
	}
	page, err := c.firstPage(ctx)
	if err != nil {
		return err
	}
	if len(page.Items) == 0 {
		return errNotFound
	}
	more := ""
	if page.NextPageToken != "" {
		more = " or more"
	}
	fmt.Fprintf(c.stderr, "This deletes %d keys%s, from %q on; type yes: ",
		len(page.Items), more, page.Items[0].Key)
	answer, err := readLine(ctx, stdin)
	if err != nil {
		return err
	}
	if strings.TrimSpace(answer) != "yes" {
		return errors.New("nothing was deleted: the answer is not yes")
	}
	return nil
}

// readLine reads a line. If ctx ends first, the goroutine that reads goes on until the
// process ends: nothing can interrupt it.
func readLine(ctx context.Context, r io.Reader) (string, error) {
	lines := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(r).ReadString('\n') // What came before the error is the answer.
		lines <- line
	}()
	select {
	case line := <-lines:
		return line, nil
	case <-ctx.Done():
		return "", fmt.Errorf("reading the answer: %w", ctx.Err())
	}
}
