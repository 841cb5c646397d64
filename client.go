// The command line's client half: what the sub-commands do, and how their
// results and errors are printed.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// client is one run of a sub-command: its flags and arguments. It is what the
// stubs of its calls take for a connection, by Invoke; no stream goes that way.
type client struct {
	grpc.ClientConnInterface
	stdin           io.Reader
	stdout, stderr  io.Writer
	output, service string
	retain, wait    bool
	removeOthers    bool
	force           bool
	local, keysOnly bool   // local: no other node can answer for the called one
	limit           uint64 // of keys to list
	timeout         time.Duration
	endpoints, args []string
	ids             []uint64     // of arguments ID and ID=ADDR
	nodes           []*kvpb.Node // of arguments ID=ADDR
	ifVersion       *uint64
	dataDir         string
	node            *kvpb.Node // whose directory is to be made

	clusterID uint64 // of the nodes that are called; 0: none was found yet
	changed   bool   // what the command is to change is changed
}

// commandError says why the exit status of a sub-command is not 0. With -o json,
// it is what is printed.
type commandError struct {
	Text      string  `json:"error"`
	Status    int     `json:"status"` // of the process
	Reason    string  `json:"reason"` // the last one that a node gave; empty: there is none
	Endpoints []reply `json:"endpoints"`
}

func (e *commandError) Error() string { return e.Text }

// say is the same error with other words.
func (e *commandError) say(text string) *commandError {
	return &commandError{text, e.Status, e.Reason, e.Endpoints}
}

// noError is an answer that is "no".
func noError(format string, args ...any) error {
	return &commandError{Text: fmt.Sprintf(format, args...), Status: exitNo}
}

func usageError(format string, args ...any) error {
	return &commandError{Text: fmt.Sprintf(format, args...), Status: exitUsage}
}

// runClient runs the sub-command args[0] and returns the exit status.
func runClient(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &client{stdin: stdin, stdout: stdout, stderr: stderr}
	err := c.parse(args[0], args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return exitYes
	}
	if err != nil {
		return c.fail(args[0], usageError("%v", err))
	}
	for _, name := range unknownVariables(os.Environ()) {
		c.warn("no flag has the environment variable " + name)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err = commands()[args[0]].run(c, ctx)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return exitYes
	}
	return c.fail(args[0], err)
}

// fail prints an error, as one line, and returns the exit status.
func (c *client) fail(name string, err error) int {
	e := &commandError{Text: err.Error(), Status: exitNotDone}
	if known, ok := errors.AsType[*commandError](err); ok {
		e = known.say(err.Error())
	}
	if e.Status == exitUsage {
		e.Text += "; see raft-key-value help " + name
	}
	if e.Endpoints == nil {
		e.Endpoints = []reply{} // as JSON, a list
	}
	e.Text = strings.Join(strings.Fields(e.Text), " ")
	if c.output == "json" {
		_ = encodeJSON(c.stderr, e)
	} else {
		fmt.Fprintf(c.stderr, "raft-key-value: %s: %s\n", name, e.Text)
	}
	return e.Status
}

// warn says on stderr what does not change the exit status.
func (c *client) warn(text string) {
	if c.output == "json" {
		_ = encodeJSON(c.stderr, map[string]string{"warning": text})
		return
	}
	fmt.Fprintf(c.stderr, "raft-key-value: warning: %s\n", text)
}

// progress tells people how far something is.
func (c *client) progress(format string, args ...any) {
	if c.output != "json" {
		fmt.Fprintf(c.stderr, format+"\n", args...)
	}
}

func (c *client) keysDone(keys, all uint64) { c.progress("%d of %d keys", keys, all) }

// encodeJSON writes a value as a line.
func encodeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func (c *client) init(ctx context.Context) error {
	resp, err := c.cluster().Init(ctx, &kvpb.InitRequest{Members: c.nodes, Force: c.force})
	return c.show(resp, err, fmt.Sprintf("a cluster is initialised, voters: %v\n", c.ids))
}

// addLearner says meanwhile how far the learner has got.
func (c *client) addLearner(ctx context.Context) error {
	present, err := c.present(ctx)
	if err != nil {
		return err
	}
	id := c.ids[0]
	was := findMember(present, id)
	text := fmt.Sprintf("node %d is a %s and has caught up", id, oneOf(was.GetVoter(), "voter", "learner"))
	if old, now := was.GetNode().GetAddress(), c.nodes[0].Address; was != nil && old != now {
		text += fmt.Sprintf(", at %s in place of %s", now, old)
	}
	watch, done := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watcher := *c // Invoke sorts c's endpoints
	watching.Go(func() { watcher.watchLearner(watch, id) })
	defer watching.Wait()
	defer done()
	resp, err := c.cluster().AddLearner(ctx, &kvpb.AddLearnerRequest{Node: c.nodes[0]})
	return c.show(resp, err, text+"\n")
}

// watchLearner says how far a learner has got, until ctx ends.
func (c *client) watchLearner(ctx context.Context, id uint64) {
	for last := ""; ctx.Err() == nil; sleep(ctx, pollInterval) {
		best := c.survey(ctx).best[c.clusterID]
		progress := findMember(best, id).GetProgress()
		line := fmt.Sprintf("node %d: %d of %d entries", id, progress.GetMatchIndex(), best.GetLastIndex())
		if progress != nil && line != last {
			c.progress("%s", line)
			last = line
		}
	}
}

// present is the leader's view of the cluster, or else that of the first endpoint
// that can answer.
func (c *client) present(ctx context.Context) (*kvpb.MetricsResponse, error) {
	r := c.newRound(ctx, false)
	defer r.end()
	e := r.next()
	if e == nil {
		return nil, callError(r.answers, false, false)
	}
	c.prefer(e.address)
	if e.metrics.Role == kvpb.Role_ROLE_LEADER || e.metrics.Leader == nil {
		return e.metrics, nil
	}
	answers := c.ask(ctx, []string{e.metrics.Leader.Address})
	defer closeAll(answers)
	led := answers[0].metrics
	if led.GetRole() == kvpb.Role_ROLE_LEADER && led.GetClusterId() == c.clusterID {
		return led, nil
	}
	return e.metrics, nil
}

// changeMembership makes c's ids the voters of the membership that it sees: a node
// refuses if another one is there by then.
func (c *client) changeMembership(ctx context.Context) error {
	present, err := c.present(ctx)
	if err != nil {
		return err
	}
	expected := membershipOf(present)
	var others []uint64
	for _, m := range expected.Members {
		if m.Voter && !slices.Contains(c.ids, m.Node.Id) {
			others = append(others, m.Node.Id)
		}
	}
	if len(others) > 0 && !c.retain && !c.removeOthers {
		return usageError("it would remove %s from the cluster: --remove-others does that, --retain keeps %s; "+
			"promote makes learners voters and leaves all others as they are",
			nodeList(others), oneOf(len(others) == 1, "it as a learner", "them as learners"))
	}
	resp, err := c.cluster().ChangeMembership(ctx,
		&kvpb.ChangeMembershipRequest{Members: c.ids, Retain: c.retain, Expected: expected})
	return c.show(resp, err, fmt.Sprintf("voters: %v\n", c.ids))
}

// membershipOf is who a cluster's members are once no change is running. A node
// that comes back has two lives there for a moment: the leader counts them as one.
func membershipOf(m *kvpb.MetricsResponse) *kvpb.Membership {
	membership := &kvpb.Membership{}
	for _, s := range m.Members {
		if s.Voter || s.Learner { // else it is on its way out
			membership.Members = append(membership.Members, &kvpb.ExpectedMember{Node: s.Node, Voter: s.Voter})
		}
	}
	slices.SortStableFunc(membership.Members, func(a, b *kvpb.ExpectedMember) int {
		return cmp.Compare(a.Node.GetId(), b.Node.GetId())
	})
	return membership
}

// nodeList names nodes, as in "nodes 1, 2 and 3".
func nodeList(ids []uint64) string {
	var words []string
	for _, id := range ids {
		words = append(words, strconv.FormatUint(id, 10))
	}
	last := len(words) - 1
	if last == 0 {
		return "node " + words[0]
	}
	return "nodes " + strings.Join(words[:last], ", ") + " and " + words[last]
}

func (c *client) promote(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Promote: c.ids})
	return c.show(resp, err, nodeList(c.ids)+oneOf(len(c.ids) == 1, " is a voter\n", " are voters\n"))
}

func (c *client) demote(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Demote: c.ids})
	return c.show(resp, err, nodeList(c.ids)+oneOf(len(c.ids) == 1, " is a learner\n", " are learners\n"))
}

func (c *client) remove(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Remove: c.ids})
	return c.show(resp, err, fmt.Sprintf("node %d is removed\n", c.ids[0]))
}

func (c *client) transferLeader(ctx context.Context) error {
	resp, err := c.cluster().TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: c.ids[0]})
	return c.show(resp, err, fmt.Sprintf("node %d leads\n", c.ids[0]))
}

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

func (c *client) version(context.Context) error {
	return c.print(map[string]string{"version": buildVersion()}, "raft-key-value "+buildVersion()+"\n")
}

// buildVersion is the module's version, which has the commit of an untagged build.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// protoJSON is a message as encoding/json is to write it.
type protoJSON struct{ proto.Message }

func (p protoJSON) MarshalJSON() ([]byte, error) {
	return protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(p.Message)
}

// print prints a result as JSON, or the text that says the same.
func (c *client) print(v any, text string) error {
	var err error
	if c.output == "json" {
		err = json.NewEncoder(c.stdout).Encode(v)
	} else {
		_, err = io.WriteString(c.stdout, text)
	}
	if err != nil && c.changed {
		return &commandError{Text: "it is done, but its result could not be printed: " + err.Error(), Status: exitUnknown}
	}
	return err
}

// show prints the result of a call that has not failed.
func (c *client) show(resp proto.Message, err error, text string) error {
	if err != nil {
		return err
	}
	return c.print(protoJSON{resp}, text)
}

func (c *client) kv() kvpb.KVServiceClient           { return kvpb.NewKVServiceClient(c) }
func (c *client) cluster() kvpb.ClusterServiceClient { return kvpb.NewClusterServiceClient(c) }
