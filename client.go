// The command line's client half: the sub-commands that call a node, how they
// find one that answers, and how their results and errors are printed.

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
	"maps"
	"math"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
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

// command is a sub-command. The first line of its help is a summary.
type command struct {
	args, help string
	min, max   int // arguments
	timeout    time.Duration
	run        func(*client, context.Context) error
	flags      func(*client, *flag.FlagSet)
}

// commands is a function because help refers to it.
func commands() map[string]*command {
	const short, long, many = 5 * time.Second, time.Minute, 1 << 16
	local := func(c *client, fs *flag.FlagSet) {
		fs.BoolVar(&c.local, "local", false, "read what the called node has; it may be old")
	}
	return map[string]*command{
		"init": {"ID=ADDR [ID=ADDR ...]", "make a cluster of these voters\nThe first one is called, if neither --endpoints nor the environment names another.",
			1, many, long, (*client).init, nil},
		"add-learner": {"ID=ADDR", "add a node without a vote and wait until it has caught up\nA member that has moved gets the new address, and keeps its role.",
			1, 1, long, (*client).addLearner, nil},
		"change-membership": {"ID [ID ...]", "make these members the voters", 1, many, long, (*client).changeMembership,
			func(c *client, fs *flag.FlagSet) {
				fs.BoolVar(&c.retain, "retain", false, "keep the other voters as learners")
			}},
		"remove":          {"ID", "remove a voter or a learner", 1, 1, long, (*client).remove, nil},
		"transfer-leader": {"ID", "make this voter the leader", 1, 1, short, (*client).transferLeader, nil},
		"set":             {"KEY VALUE", "write a key; the VALUE - is read from stdin", 2, 2, short, (*client).set, (*client).versionFlag},
		"get":             {"KEY", "print the exact bytes of a value, and a newline on a terminal\nThe exit status is 1 if the key is not there.", 1, 1, short, (*client).get, local},
		"list": {"[PREFIX]", `print keys in order, with versions and values
A line is a key, a version, and a value, quoted as Go does, with tabs between.
With -o json, a line is a page: a ListResponse.`, 0, 1, short, (*client).list, func(c *client, fs *flag.FlagSet) {
			local(c, fs)
			fs.BoolVar(&c.keysOnly, "keys-only", false, "print the keys alone; with -o json, values are empty")
			numberVar(fs, &c.limit, "limit", "the most `KEYS` to print; 0: all")
		}},
		"delete": {"KEY", "remove a key\nThe exit status is 1 if it was not there.", 1, 1, short, (*client).delete, (*client).versionFlag},
		"status": {"", `show every member as it sees itself
The JSON is {"members": [{"node_id", "address", "reachable", "error", "metrics"}]}, where
metrics is a MetricsResponse or null. A node or leader of 0 is not known.
The exit status is 1 if no node answers.`, 0, 0, short, (*client).status, nil},
		"health": {"", "ask the first endpoint that answers for its health\nThe exit status is 0 only if it is SERVING.",
			0, 0, short, (*client).health, func(c *client, fs *flag.FlagSet) {
				fs.StringVar(&c.service, "service", kvpb.KVService_ServiceDesc.ServiceName, "`NAME` to ask for: "+strings.Join(healthNames, ", "))
				fs.BoolVar(&c.wait, "wait", false, "wait for SERVING until the timeout")
			}},
		"backup": {"FILE", "write all that a cluster holds to a file\nThe file must not be there yet, and is only once it is whole.", 1, 1, time.Hour, (*client).backup, nil},
		"restore": {"FILE", `make a data directory from a backup, offline
It is that of a new cluster with one voter. Start that node with the same id, address
and directory, and add others. Keys, with their versions, and sessions are those of the
backup. What is written then has higher versions than any before, by this machine's clock.`, 1, 1, time.Hour, (*client).restore, func(c *client, fs *flag.FlagSet) {
			c.node = &kvpb.Node{}
			fs.StringVar(&c.dataDir, "data-dir", "", "`DIRECTORY` to make; it may be there, and empty")
			numberVar(fs, &c.node.Id, "id", "the node's `NUMBER`, not 0")
			fs.StringVar(&c.node.Address, "addr", "", "`HOST:PORT` at which others reach the node")
		}},
		"version": {"", "print the version", 0, 0, short, (*client).version, nil},
		"help":    {"[COMMAND]", "explain a command", 0, 1, short, (*client).help, nil},
	}
}

func (c *client) versionFlag(fs *flag.FlagSet) {
	fs.Func("if-version", "only if the key has this `VERSION`, or exit status 1; 0, for set: only if it is not there", func(s string) error {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return errors.New("want a version as list prints it, or 0") // err is of strconv
		}
		c.ifVersion = &n
		return nil
	})
}

var healthNames = []string{kvpb.KVService_ServiceDesc.ServiceName, restartHealth, kvpb.ClusterService_ServiceDesc.ServiceName}

const helpNotes = "Flags stand before or after the arguments; what follows -- is an argument.\n" +
	"What reads or writes keys is tried until the timeout, if that can do no harm; a local read once at each endpoint.\n" +
	"With -o json, an answer is as kv.proto has it, 64-bit numbers as strings, values in base64.\n"

func isCommand(name string) bool { return commands()[name] != nil }

// commandList is a line for each sub-command.
func commandList() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(commands())) {
		summary, _, _ := strings.Cut(commands()[name].help, "\n")
		fmt.Fprintf(&b, "  %-18s %s\n", name, summary)
	}
	return b.String()
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

// parse sets c's fields by the flags and arguments, or prints the help text.
func (c *client) parse(name string, args []string) error {
	cmd, fs := commands()[name], flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&c.output, "o", "text", "`FORMAT` of the output: text or json")
	c.timeout = cmd.timeout
	durationVar(fs, &c.timeout, "timeout", "`DURATION` until the command gives up")
	endpoints, calls := "", !slices.Contains([]string{"help", "restore", "version"}, name)
	if calls {
		fs.StringVar(&endpoints, "endpoints", cmp.Or(os.Getenv("RAFT_KEY_VALUE_ENDPOINTS"), oneOf(name == "init", "", defaultEndpoint)),
			"the nodes to call, `HOST:PORT,...`, in this order; or environment RAFT_KEY_VALUE_ENDPOINTS")
	}
	if cmd.flags != nil {
		cmd.flags(c, fs)
	}
	var rest []string
	if i := slices.Index(args, "--"); i >= 0 {
		args, rest = args[:i], args[i+1:]
	}
	err := fs.Parse(args) // It stops at the first argument.
	for ; err == nil && fs.NArg() > 0; err = fs.Parse(fs.Args()[1:]) {
		c.args = append(c.args, fs.Arg(0))
	}
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(c.stdout, "Usage: raft-key-value %s\n\nTo %s\n\n%s", strings.TrimSpace(name+" [FLAGS] "+cmd.args), cmd.help, helpNotes)
		fs.SetOutput(c.stdout)
		fs.PrintDefaults()
	}
	if err != nil {
		return fmt.Errorf("%w%s", err, oneOf(strings.HasPrefix(err.Error(), "flag provided"), "; an argument that starts with - goes behind --", ""))
	}
	c.args = append(c.args, rest...)
	if endpoints == "" && name == "init" && len(c.args) > 0 {
		_, endpoints, _ = strings.Cut(c.args[0], "=")
	}
	if calls {
		c.endpoints = strings.Split(endpoints, ",")
	}
	return c.check(cmd.args, cmd.min, cmd.max)
}

// check checks the arguments by their names in the help text.
func (c *client) check(names string, least, most int) error {
	addrs := slices.Clone(c.endpoints)
	switch n := len(c.args); {
	case n < least || n > most:
		return fmt.Errorf("wrong number of arguments: %d; want: %s", n, cmp.Or(names, "none"))
	case c.output != "text" && c.output != "json":
		return fmt.Errorf("-o %q: want text or json", c.output)
	case c.timeout <= 0:
		return fmt.Errorf("--timeout %v: want more than 0", c.timeout)
	case strings.HasPrefix(names, "KEY") && (c.args[0] == "" || !utf8.ValidString(c.args[0])):
		return fmt.Errorf("key %q: want UTF-8, and not nothing", c.args[0])
	case names == "[COMMAND]" && n > 0 && !isCommand(c.args[0]):
		return fmt.Errorf("unknown command: %q", c.args[0])
	case names == "FILE" && c.args[0] == "-":
		return errors.New("FILE \"-\": want the name of a file, not stdin or stdout")
	case c.service != "" && !slices.Contains(healthNames, c.service):
		return fmt.Errorf("--service %q: want one of: %s", c.service, strings.Join(healthNames, ", "))
	case c.node != nil && (c.dataDir == "" || c.node.Id == 0 || c.node.Address == ""):
		return errors.New("--data-dir, --id and --addr are needed")
	case c.node != nil:
		addrs = append(addrs, c.node.Address)
	case strings.HasPrefix(names, "ID"):
		for _, arg := range c.args {
			number, addr, hasAddr := strings.Cut(arg, "=")
			id, err := strconv.ParseUint(number, 10, 64)
			if err != nil || id == 0 || hasAddr != strings.HasPrefix(names, "ID=") {
				return fmt.Errorf("%q: want %s, an ID being a positive number", arg, names)
			}
			c.ids, c.nodes = append(c.ids, id), append(c.nodes, &kvpb.Node{Id: id, Address: addr})
			if hasAddr {
				addrs = append(addrs, addr)
			}
		}
	}
	for _, addr := range addrs {
		host, port, err := net.SplitHostPort(addr)
		if err != nil || host == "" || port == "" {
			return fmt.Errorf("address %q: want HOST:PORT", addr)
		}
		if c.node != nil && (isEverywhere(host) || port == "0") {
			return fmt.Errorf("--addr %q: want where the others find the node", addr)
		}
	}
	return nil
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

// memberRow is what survey learned of one node, in the format of status.
type memberRow struct {
	NodeID    uint64         `json:"node_id,string"`
	Address   string         `json:"address"`
	Reachable bool           `json:"reachable"`
	Error     string         `json:"error"`
	Metrics   json.Marshaler `json:"metrics"`
	metrics   *kvpb.MetricsResponse
}

// survey asks the endpoints and then all other members that they name.
func (c *client) survey(ctx context.Context) []*memberRow {
	lives, ids, others := map[uint64]bool{}, map[string]uint64{}, map[string]bool{}
	rows := slices.DeleteFunc(c.ask(ctx, c.endpoints), func(r *memberRow) bool { // one node can have two addresses
		id := r.metrics.GetRaftId()
		again := lives[id]
		lives[id] = id != 0
		return again
	})
	for _, r := range rows {
		for _, m := range r.metrics.GetMembers() {
			ids[m.Node.GetAddress()] = m.Node.GetId()
			if !lives[m.RaftId] && !slices.Contains(c.endpoints, m.Node.GetAddress()) {
				others[m.Node.GetAddress()] = true
			}
		}
	}
	rows = append(rows, c.ask(ctx, slices.Collect(maps.Keys(others)))...)
	for _, r := range rows {
		if id := ids[r.Address]; id != 0 && r.NodeID != 0 && r.NodeID != id {
			*r = memberRow{Address: r.Address, Error: fmt.Sprintf("node %d answers there", r.NodeID)}
		}
		r.NodeID = cmp.Or(r.NodeID, ids[r.Address])
	}
	slices.SortFunc(rows, func(a, b *memberRow) int { return cmp.Compare(a.NodeID-1, b.NodeID-1) }) // 0 comes last
	return rows
}

// ask asks nodes for their metrics, all at the same time. It takes at most
// half of the timeout.
func (c *client) ask(ctx context.Context, addrs []string) []*memberRow {
	rows := make([]*memberRow, len(addrs))
	var answers sync.WaitGroup
	for i, addr := range addrs {
		answers.Go(func() {
			m := new(kvpb.MetricsResponse)
			_, err := send(ctx, addr, min(c.timeout/2, askTimeout), kvpb.ClusterService_Metrics_FullMethodName, &kvpb.MetricsRequest{}, m)
			rows[i] = &memberRow{m.GetNode().GetId(), addr, true, "", protoJSON{m}, m}
			if err != nil {
				rows[i] = &memberRow{Address: addr, Error: err.Error()}
			}
		})
	}
	answers.Wait()
	return rows
}

// bestMetrics is the newest leader's, or else that of some other node; nil if
// no node answered. The numbers of the roles end with the leader's.
func bestMetrics(rows []*memberRow) *kvpb.MetricsResponse {
	return slices.MaxFunc(rows, func(a, b *memberRow) int {
		return cmp.Or(cmp.Compare(a.metrics.GetRole(), b.metrics.GetRole()), cmp.Compare(a.metrics.GetTerm(), b.metrics.GetTerm()))
	}).metrics
}

func findMember(m *kvpb.MetricsResponse, id uint64) *kvpb.MemberStatus {
	if i := slices.IndexFunc(m.GetMembers(), func(s *kvpb.MemberStatus) bool { return s.Node.GetId() == id }); i >= 0 {
		return m.Members[i]
	}
	return nil
}

func (c *client) status(ctx context.Context) error {
	rows := c.survey(ctx)
	best := bestMetrics(rows)
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tADDRESS\tHEALTH\tVOTER\tROLE\tLEADER\tTERM\tAPPLIED\tVERSION\tKEYS\tDISK\tCLUSTER\tREASON")
	for _, r := range rows {
		m, voter := r.metrics, oneOf(findMember(best, r.NodeID).GetVoter(), "yes", "no")
		fmt.Fprintf(w, "%d\t%s\t", r.NodeID, r.Address)
		if !r.Reachable {
			fmt.Fprintf(w, "unreachable\t%s\t-\t-\t-\t-\t-\t-\t-\t-\t%s\n", voter, r.Error)
			continue
		}
		role := strings.ToLower(strings.TrimPrefix(m.Role.String(), "ROLE_"))
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%s\t%016x\t%s\n", oneOf(m.Healthy, "ok", "unhealthy"), voter, role, m.Leader.GetId(),
			m.Term, m.AppliedIndex, m.Version, m.Keys, oneOf(m.Durable, "yes", "no"), m.ClusterId, m.UnhealthyReason)
	}
	w.Flush() // A strings.Builder takes everything.
	err := c.print(map[string]any{"members": rows}, regexp.MustCompile(" +\n").ReplaceAllString(table.String(), "\n"))
	if best == nil {
		return cmp.Or(err, errors.New("no node answered"))
	} else if best.ClusterId == 0 {
		fmt.Fprintln(c.stderr, "no node that was asked is in a cluster; --endpoints asks others")
	}
	return err
}

func oneOf[T any](b bool, yes, no T) T {
	if b {
		return yes
	}
	return no
}

// health polls if it waits: a stream would end with a node that restarts.
func (c *client) health(ctx context.Context) (err error) {
	c.local, c.timeout = true, min(c.timeout, askTimeout) // One node that hangs must not take up the wait.
	for {
		resp, now := healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{Service: c.service})
		if now == nil && resp.Status == healthpb.HealthCheckResponse_SERVING {
			return c.print(protoJSON{resp}, "SERVING, says "+c.endpoints[0]+"\n")
		} else if now == nil {
			now = fmt.Errorf("%q is %v: %s", c.service, resp.Status, c.whyUnhealthy(ctx))
		}
		if err == nil || ctx.Err() == nil {
			err = now // what failed before the time was up tells more
		}
		if !c.wait || ctx.Err() != nil {
			return err
		}
		sleep(ctx, pollInterval)
	}
}

// whyUnhealthy asks who answers first, as health did.
func (c *client) whyUnhealthy(ctx context.Context) string {
	m, err := c.cluster().Metrics(ctx, &kvpb.MetricsRequest{})
	if err != nil {
		return err.Error()
	}
	why := m.UnhealthyReason
	if c.service == restartHealth {
		why = m.RestartReason
	}
	why = cmp.Or(why, "it was, a moment ago")
	return fmt.Sprintf("node %d at %s: %s", m.Node.GetId(), m.Node.GetAddress(), why)
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

func (c *client) help(context.Context) error {
	if len(c.args) == 1 {
		return c.parse(c.args[0], []string{"--help"})
	}
	return c.print(commandList(), fmt.Sprintf(usage, commandList()))
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

// Invoke sends a request to one endpoint after another until one answers. What
// has an effect goes to a second one only if the first cannot have applied it,
// or if it takes effect once. What KVService is asked is sent until the timeout.
func (c *client) Invoke(ctx context.Context, method string, req, resp any, _ ...grpc.CallOption) error {
	unknown := false
	var said []string
	for {
		addrs, failures, again := slices.Clone(c.endpoints), []string{}, true
		for i := 0; i < len(addrs) && again; i++ {
			f, err := send(ctx, addrs[i], c.timeout/time.Duration(len(addrs)), method, req, resp)
			if err == nil {
				c.endpoints = slices.Concat(addrs[i:i+1], addrs[:i], addrs[i+1:]) // the next one goes there first
				return nil
			}
			failures = append(failures, addrs[i]+": "+err.Error())
			again, unknown, c.refused = f.again, unknown || f.unknown, f.refused
			if f.leader != "" && !c.local && !slices.Contains(addrs[:i+1], f.leader) {
				addrs = slices.Insert(addrs, i+1, f.leader)
			}
		}
		if said == nil || ctx.Err() == nil {
			said = failures // what failed before the time was up tells more
		}
		if !again || c.local || !strings.HasPrefix(method, "/"+kvpb.KVService_ServiceDesc.ServiceName) || ctx.Err() != nil {
			return errors.New(oneOf(unknown, "the outcome is unknown, it may or may not have been applied: ", "") + strings.Join(said, "; "))
		}
		sleep(ctx, pollInterval)
	}
}

// failure is what a call to one node that failed means for others.
type failure struct {
	leader  string // where to go next
	again   bool   // another node may be tried
	unknown bool   // it may or may not have been applied
	refused bool   // as invalid
}

// send makes a call to one node, which has only its share of the time to
// answer at all, and to do what may be sent again.
func send(ctx context.Context, addr string, share time.Duration, method string, req, resp any) (f failure, err error) {
	conn := dial(addr)
	defer conn.Close()
	short, cancel := context.WithTimeout(ctx, share)
	defer cancel()
	if slices.Contains(reads, method) || slices.Contains(writes, method) {
		ctx = short
	}
	var trailer metadata.MD
	// A first call without an effect tells whether anybody is there.
	if _, err = healthpb.NewHealthClient(conn).Check(short, &healthpb.HealthCheckRequest{}, grpc.Trailer(&trailer)); err != nil {
		f.again = true
	} else if err = conn.Invoke(ctx, method, req, resp, grpc.Trailer(&trailer)); err != nil {
		f.again, f.unknown = judge(method, err)
		f.refused = status.Code(err) == codes.InvalidArgument
	}
	f.leader = strings.Join(trailer.Get(leaderMetadata), "")
	return f, readable(err)
}

// reads are the methods without an effect, writes those that take effect once
// however often they are sent: all have an id, or open a session for it.
var (
	reads  = []string{kvpb.KVService_Get_FullMethodName, kvpb.KVService_List_FullMethodName, kvpb.ClusterService_Metrics_FullMethodName, healthpb.Health_Check_FullMethodName}
	writes = []string{kvpb.KVService_OpenSession_FullMethodName, kvpb.KVService_Set_FullMethodName, kvpb.KVService_Delete_FullMethodName}
)

// judge tells of a call that failed whether it may be sent to another node, and
// whether its effect is not known. A node's UNAVAILABLE means "not applied", or
// that it may be sent again, but gRPC has one of its own for a connection that
// broke. A node's DEADLINE means "not applied" for a write of a key, but not
// for a change of the cluster.
func judge(method string, err error) (again, unknown bool) {
	code, reason := status.Code(err), errorReason(err)
	transient := code == codes.Unavailable || code == codes.DeadlineExceeded
	switch {
	case slices.Contains(reads, method) || method == kvpb.KVService_OpenSession_FullMethodName:
		return transient, false
	case slices.Contains(writes, method):
		return transient, reason == "" || reason == "OUTCOME_UNKNOWN"
	case reason == "UNREACHABLE", reason != "" && method == kvpb.ClusterService_Init_FullMethodName: // no other node knows better
		return false, false
	case code == codes.Unavailable && reason != "": // that is about the called node
		return true, false
	}
	return false, reason == "" || code == codes.DeadlineExceeded
}

// readable makes an error of gRPC one for people.
func readable(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	text := strings.Replace(st.Message(), `connection error: desc = "transport: Error while dialing: `, `"`, 1)
	return fmt.Errorf("%s (%s)", text, strings.TrimSpace(code.Code(st.Code()).String()+" "+errorReason(err)))
}
