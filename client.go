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
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const defaultEndpoint = "127.0.0.1:21001"

// The wait for a node that is asked how it is, and between two such questions.
const askTimeout, pollInterval = 2 * time.Second, 200 * time.Millisecond

// client is one run of a sub-command: its flags and arguments. It is what the
// stubs of its calls take for a connection, by Invoke; no stream goes that way.
type client struct {
	grpc.ClientConnInterface
	stdin           io.Reader
	stdout, stderr  io.Writer
	output, service string
	retain, wait    bool
	refused         bool   // a node has called a request invalid
	local, keysOnly bool   // local: no other node can answer for the called one
	limit           uint64 // of keys to list
	timeout         time.Duration
	endpoints, args []string
	ids             []uint64     // of arguments ID and ID=ADDR
	nodes           []*kvpb.Node // of arguments ID=ADDR
	ifVersion       *uint64
	dataDir         string
	node            *kvpb.Node // whose directory is to be made
}

// runClient runs the sub-command args[0] and returns the exit status: 0; 2 for
// a usage error; 1 for any other failure, a missing key included.
func runClient(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c, exit := &client{stdin: stdin, stdout: stdout, stderr: stderr}, 2
	err := c.parse(args[0], args[1:])
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, c.timeout)
		defer cancel()
		err = commands()[args[0]].run(c, ctx)
		exit = oneOf(c.refused, 2, 1)
	}
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	see := oneOf(exit == 2, "; see raft-key-value help "+args[0], "")
	fmt.Fprintf(stderr, "raft-key-value: %s: %s%s\n", args[0], strings.Join(strings.Fields(err.Error()), " "), see)
	return exit
}

func (c *client) init(ctx context.Context) error {
	resp, err := c.cluster().Init(ctx, &kvpb.InitRequest{Members: c.nodes})
	return c.show(resp, err, fmt.Sprintf("a cluster is initialised, voters: %v\n", c.ids))
}

// addLearner says meanwhile how far the learner has got.
func (c *client) addLearner(ctx context.Context) error {
	id := c.ids[0]
	was := findMember(bestMetrics(c.ask(ctx, c.endpoints)), id)
	text := fmt.Sprintf("node %d is a %s and has caught up", id, oneOf(was.GetVoter(), "voter", "learner"))
	if old, now := was.GetNode().GetAddress(), c.nodes[0].Address; was != nil && old != now {
		text += fmt.Sprintf(", at %s in place of %s", now, old)
	}
	watch, done := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watcher := *c // Invoke sorts c's endpoints
	watching.Go(func() {
		for last := ""; watch.Err() == nil; {
			sleep(watch, pollInterval)
			best := bestMetrics(watcher.survey(watch))
			progress := findMember(best, id).GetProgress()
			line := fmt.Sprintf("node %d: %d of %d entries\n", id, progress.GetMatchIndex(), best.GetLastIndex())
			if progress != nil && line != last {
				io.WriteString(c.stderr, line)
				last = line
			}
		}
	})
	defer watching.Wait()
	defer done()
	resp, err := c.cluster().AddLearner(ctx, &kvpb.AddLearnerRequest{Node: c.nodes[0]})
	return c.show(resp, err, text+"\n")
}

func (c *client) changeMembership(ctx context.Context) error {
	resp, err := c.cluster().ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Members: c.ids, Retain: c.retain})
	return c.show(resp, err, fmt.Sprintf("voters: %v\n", c.ids))
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
		if c.refused = len(req.Value) > maxValueBytes; c.refused {
			return fmt.Errorf("stdin has more than %d bytes, which is the limit", maxValueBytes)
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
	if err != nil { // A node calls it a write; what the user wrote was never sent.
		said := strings.ReplaceAll(err.Error(), errOutcomeUnknown.Error(), "whether one was opened is not known")
		return nil, fmt.Errorf("nothing was written: no session could be opened: %s", said)
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

var errNotFound = errors.New("not found")

func compareError(version uint64) error {
	if version == 0 {
		return errors.New("compare failed: the key is not there")
	}
	return fmt.Errorf("compare failed: the key has version %d", version)
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

func oneOf[T any](b bool, yes, no T) T {
	if b {
		return yes
	}
	return no
}

// backup asks one endpoint after another.
func (c *client) backup(ctx context.Context) error {
	var failures []string
	for _, addr := range c.endpoints {
		s, err := c.backupFrom(ctx, addr, c.args[0])
		if err == nil {
			return c.printState(s, "wrote")
		}
		if errors.As(err, new(*os.PathError)) {
			return err // no other node would help
		}
		failures = append(failures, fmt.Sprintf("%s: %v", addr, readable(err)))
	}
	return errors.New(strings.Join(failures, "; "))
}

// backupFrom makes a file that has its name only once all of it is there, was
// checked, and is durable.
func (c *client) backupFrom(ctx context.Context, addr, path string) (s *store, err error) {
	conn := dial(addr)
	defer conn.Close()
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, oneOf(errors.Is(err, os.ErrExist), ": if no other backup writes it, one was killed: delete it", ""))
	}
	defer os.Remove(f.Name()) // unless it has got its name
	defer f.Close()
	absent := func() error {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			return cmp.Or[error](err, &os.PathError{Op: "create", Path: path, Err: os.ErrExist})
		}
		return nil
	}
	if err = absent(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := alarm(cancel)
	defer silent.Stop()
	stream, err := kvpb.NewClusterServiceClient(conn).Backup(ctx, &kvpb.BackupRequest{})
	if err != nil {
		return nil, err
	}
	var broken error
	s, err = scanSnapshot(io.TeeReader(&chunkReader{recv: func() ([]byte, error) {
		resp, err := stream.Recv()
		silent.Reset(helloTimeout)
		if err != nil && err != io.EOF {
			broken = err
		}
		return resp.GetData(), err
	}}, f), false, c.progress)
	return s, ifNot(cmp.Or(broken, err), f.Sync, absent, func() error { return os.Rename(f.Name(), path) },
		func() error { return osFS{}.syncDir(filepath.Dir(path)) })
}

func (c *client) restore(ctx context.Context) error {
	f, err := os.Open(c.args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	_, there := os.Lstat(c.dataDir)
	_, locked := os.Lstat(filepath.Join(c.dataDir, "LOCK"))
	d, err := openDisk(osFS{}, c.dataDir, defaultOptions().logBytes, slog.New(slog.NewTextHandler(c.stderr, nil)))
	if err != nil {
		return err
	}
	defer d.close()
	defer context.AfterFunc(ctx, func() { f.Close() })() // ends reading
	empty := false
	s, err := d.restore(c.node, time.Now(), func() (*store, error) {
		empty = true // or it would not ask
		s, err := scanSnapshot(f, true, c.progress)
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
	return c.printState(s, "restored")
}

func (c *client) progress(keys, all uint64) { fmt.Fprintf(c.stderr, "%d of %d keys\n", keys, all) }

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
	if c.output == "json" {
		return json.NewEncoder(c.stdout).Encode(v)
	}
	_, err := io.WriteString(c.stdout, text)
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
