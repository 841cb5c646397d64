// The sub-command watch.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

const (
	// watchTimeout is how long watch looks for an endpoint to go on at, unless --timeout says
	// another: a cluster may be without a leader for a while.
	watchTimeout = time.Minute
	// watchSilence is how long a node may say nothing: one that does not hang says how far it
	// is every second.
	watchSilence = 5 * watchProgress
)

// watchOrder is what watch is to tell of, besides the keys that a prefix or bounds name.
type watchOrder struct {
	key   string // empty: none alone
	from  uint64 // the first version; 0: what is written from now on
	until uint64 // the last version; 0: there is no last one
}

func (in *invocation) watchFlags(fs *flag.FlagSet) {
	in.watch = &watchOrder{}
	notEmptyVar(fs, &in.watch.key, "key", "only this `KEY`")
	in.boundFlags(fs)
	numberVar(fs, &in.watch.from, "from-version", "begin with the write of this `VERSION`; 0: with the next one")
	numberVar(fs, &in.watch.until, "until-version", "end once all writes up to this `VERSION` are told; 0: go on")
}

func (in *invocation) checkWatchFlags() error {
	if _, err := filterOf(in.watchRequest()); err != nil {
		return errors.New(status.Convert(err).Message())
	}
	endsBefore := in.watch.until > 0 && in.watch.until < in.watch.from
	if endsBefore {
		return fmt.Errorf("--until-version %d: it is before --from-version %d", in.watch.until, in.watch.from)
	}
	return nil
}

func (in *invocation) watchRequest() *kvpb.WatchRequest {
	return &kvpb.WatchRequest{
		Key:         in.watch.key,
		Prefix:      in.prefix,
		Start:       in.start,
		End:         in.end,
		FromVersion: in.watch.from,
	}
}

// watchKeys prints events until it is interrupted, all that was asked for is told, or no
// endpoint can tell what comes next.
func (c *client) watchKeys(ctx context.Context) error {
	w := &keyWatch{client: c, req: c.watchRequest()}
	err := w.run(ctx)
	isInterrupted := err != nil && ctx.Err() != nil
	if !isInterrupted {
		return err
	}
	if c.watch.until > 0 {
		return fmt.Errorf("it was interrupted before all up to version %d was told", c.watch.until)
	}
	return nil
}

// keyWatch is one run of watch, which goes from endpoint to endpoint.
type keyWatch struct {
	*client
	req   *kvpb.WatchRequest // for what was not told yet
	pause pauses             // since the last stream that has told something
	left  *reply             // of the endpoint whose stream has broken; nil: none has
}

func (w *keyWatch) run(ctx context.Context) error {
	for {
		s, err := w.open(ctx)
		if err != nil {
			return err
		}
		broken, err := w.follow(s)
		s.close()
		if broken == nil {
			return err
		}
		left := replyOf(s.endpoint.address, broken)
		if !mayWatchElsewhere(broken) {
			return whyWatchEnds([]reply{left})
		}
		w.left = &left
		w.calls.postpone(left.Endpoint)
		w.rest(ctx, retryAfter(broken))
	}
}

// rest makes a pause: the longer of what a node has asked for and a random one.
func (w *keyWatch) rest(ctx context.Context, asked time.Duration) {
	sleep(ctx, max(asked, w.pause.next()))
}

// open opens a stream at the first endpoint that can tell what comes next. It asks all
// endpoints again and again until the timeout.
func (w *keyWatch) open(ctx context.Context) (*watchedStream, error) {
	search, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	var replies []reply
	for {
		r := w.calls.newRound(search)
		s, asked, isHopeless := w.openAt(ctx, r)
		r.end()
		if s != nil {
			return s, nil
		}
		timeIsUp := isOutOfTime(search)
		if replies == nil || !timeIsUp { // What failed before the time was up says more.
			replies = r.replies
		}
		if timeIsUp || isHopeless || knowNothingMore(replies) {
			return nil, whyWatchEnds(replies)
		}
		w.rest(search, asked)
	}
}

// openAt opens a stream at the first endpoint of a round that can tell what comes next. If
// there is none, it returns the longest pause that one has asked for, and whether asking again
// is of no use.
func (w *keyWatch) openAt(ctx context.Context, r *round) (s *watchedStream, asked time.Duration, isHopeless bool) {
	for e := r.next(); e != nil; e = r.next() {
		s, err := w.openStream(ctx, e)
		if err == nil {
			r.take(e)
			return s, 0, false
		}
		r.record(e, err)
		if !mayWatchElsewhere(err) {
			return nil, 0, true
		}
		asked = max(asked, retryAfter(err))
	}
	return nil, asked, false
}

// openStream opens a stream at an endpoint, and waits for its first response.
func (w *keyWatch) openStream(ctx context.Context, e *endpoint) (*watchedStream, error) {
	ctx, giveUp := context.WithCancelCause(ctx)
	s := &watchedStream{endpoint: e, ctx: ctx, giveUp: giveUp}
	s.silence = time.AfterFunc(watchSilence, func() { giveUp(errWatchSilent) })
	stream, err := kvpb.NewKVServiceClient(e.conn).Watch(ctx, w.req)
	if err != nil {
		s.stop()
		return nil, err
	}
	s.stream = stream
	s.first, err = s.recv()
	if err != nil {
		s.stop()
		return nil, w.whyNotBegun(e, err)
	}
	return s, nil
}

// whyNotBegun is why a stream has no first response. A node that waits until it has what is before
// says nothing.
func (w *keyWatch) whyNotBegun(e *endpoint, err error) error {
	has := e.metrics.GetVersion()
	isWaiting := err == errWatchSilent && w.req.FromVersion > has+1
	if !isWaiting {
		return err
	}
	return status.Errorf(codes.DeadlineExceeded, "no response in %v: it had version %d, and waits for version %d",
		watchSilence, has, w.req.FromVersion-1)
}

// follow prints what a stream tells. It returns why the stream has broken, or else the error,
// or none, that ends the command.
func (w *keyWatch) follow(s *watchedStream) (broken, err error) {
	if w.left != nil {
		w.warn(fmt.Sprintf("%s: %s; the watch goes on at %s, from version %d",
			w.left.Endpoint, w.left.Error, s.endpoint.address, w.req.FromVersion))
	}
	w.req.ClusterId = s.first.ClusterId
	resp := s.first
	for {
		if err := w.tell(resp); err != nil {
			return nil, err
		}
		isDone := w.watch.until > 0 && resp.Version >= w.watch.until
		if isDone {
			return nil, nil
		}
		resp, broken = s.recv()
		if broken != nil {
			return broken, nil
		}
		w.pause = pauses{}
	}
}

// tell prints the events of a response, and goes on behind it.
func (w *keyWatch) tell(resp *kvpb.WatchResponse) error {
	events := resp.Events
	isLate := func(e *kvpb.Event) bool { return w.watch.until > 0 && e.Version > w.watch.until }
	if i := slices.IndexFunc(events, isLate); i >= 0 {
		events = events[:i]
	}
	w.req.FromVersion = resp.Version + 1
	if len(events) == 0 {
		return nil
	}
	var lines bytes.Buffer
	for _, e := range events {
		if err := w.appendLine(&lines, e); err != nil {
			return err
		}
	}
	_, err := w.stdout.Write(lines.Bytes())
	return err
}

func (w *keyWatch) appendLine(lines *bytes.Buffer, e *kvpb.Event) error {
	if w.output == "json" {
		return json.NewEncoder(lines).Encode(protoJSON{e})
	}
	line := appendEvent(lines.AvailableBuffer(), e)
	lines.Write(append(line, '\n'))
	return nil
}

// appendEvent appends an event as text. A value is quoted, so that none looks like a deletion.
func appendEvent(b []byte, e *kvpb.Event) []byte {
	b = strconv.AppendQuote(b, e.Key)
	b = append(b, '\t')
	b = strconv.AppendUint(b, e.Version, 10)
	b = append(b, '\t')
	if e.Value == nil {
		return append(b, "deleted"...)
	}
	return strconv.AppendQuote(b, string(e.Value))
}

// errWatchSilent ends a stream whose node hangs.
var errWatchSilent = status.Errorf(codes.DeadlineExceeded, "no response in %v", watchSilence)

// watchedStream is an open stream, on an endpoint's connection, which is its own.
type watchedStream struct {
	endpoint *endpoint
	ctx      context.Context // ends because of errWatchSilent if the node is silent for too long
	giveUp   context.CancelCauseFunc
	silence  *time.Timer
	stream   kvpb.KVService_WatchClient
	first    *kvpb.WatchResponse
}

// recv waits for the next response. Between two calls of it, time does not count: whoever reads
// the output may take long.
func (s *watchedStream) recv() (*kvpb.WatchResponse, error) {
	s.silence.Reset(watchSilence)
	resp, err := s.stream.Recv()
	s.silence.Stop()
	if err == nil {
		return resp, nil
	}
	if context.Cause(s.ctx) == errWatchSilent {
		return nil, errWatchSilent
	}
	if err == io.EOF {
		return nil, status.Error(codes.Unavailable, "the node has ended the watch without a reason")
	}
	return nil, err
}

// stop ends the stream.
func (s *watchedStream) stop() {
	s.silence.Stop()
	s.giveUp(nil)
}

// close ends the stream and its connection.
func (s *watchedStream) close() {
	s.stop()
	s.endpoint.close()
}

// mayWatchElsewhere reports whether a watch that failed with an error may go on at another
// endpoint. One that has dropped what comes next, or is in another cluster, is passed over
// like one that is not there.
func mayWatchElsewhere(err error) bool {
	switch reason := errorReason(err); reason {
	case reasonCompacted, reasonOtherCluster:
		return true
	case "": // gRPC's own: a stream may break with any of these
		broken := []codes.Code{codes.Internal, codes.Unknown, codes.Canceled}
		if slices.Contains(broken, status.Code(err)) {
			return true
		}
	}
	mayRepeat, _ := afterFailure(kvpb.KVService_Watch_FullMethodName, err)
	return mayRepeat
}

// knowNothingMore reports whether no endpoint will tell what comes next, by what all of them
// said: it is dropped where it was, or all are in another cluster. A node that could not tell
// for now, or that does not answer, may do so soon.
func knowNothingMore(replies []reply) bool {
	compacted, others := 0, 0
	for _, r := range replies {
		switch r.Reason {
		case reasonCompacted:
			compacted++
		case reasonOtherCluster:
			others++
		case reasonNotInitialized: // once it is in a cluster, it does not know what was before
		default: // it may come back with what is on its disk
			return false
		}
	}
	areAllOthers := others > 0 && others == len(replies)
	return compacted > 0 || areAllOthers
}

// whyWatchEnds is the error of a watch that no endpoint can go on with.
func whyWatchEnds(replies []reply) error {
	e := callError(replies)
	isReason := func(reason string) bool {
		return slices.ContainsFunc(replies, func(r reply) bool { return r.Reason == reason })
	}
	switch {
	case !knowNothingMore(replies):
		return e
	case isReason(reasonCompacted):
		e.Reason = reasonCompacted
		e.Text = "what was written next is not known any more"
	default:
		e.Reason = reasonOtherCluster
		e.Text = "the cluster is another one now, or was restored"
	}
	e.Status = exitNo
	e.Text += ": see what is there by list -o json, and go on by watch --from-version, " +
		"with the version of its first line plus 1; " + textOf(replies)
	return e
}

// retryAfter is how long an error asks for a pause; 0: it does not.
func retryAfter(err error) time.Duration {
	for _, d := range status.Convert(err).Details() {
		if retry, ok := d.(*errdetails.RetryInfo); ok {
			return retry.RetryDelay.AsDuration()
		}
	}
	return 0
}
