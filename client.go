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
	"maps"
	"net"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// client is one run of a sub-command.
type client struct {
	stdin          io.Reader
	stdout, stderr io.Writer

	// The flags and the arguments. Of ids and nodes at most one is set.
	endpoints, args                       []string
	timeout                               time.Duration
	endpointList, output, service         string
	local, retain, progress, untilServing bool
	ids                                   []uint64
	nodes                                 []*kvpb.Node
}

// command is a sub-command. What args starts with tells how arguments are
// checked; one without a timeout calls nobody.
type command struct {
	name, args, summary, details string
	min, max                     int
	timeout                      time.Duration
	run                          func(*client, context.Context) error
	flags                        func(*client, *flag.FlagSet)
}

// commands is a function because help refers to it.
func commands() []*command {
	const short, long, many = 5 * time.Second, time.Minute, 1 << 16
	return []*command{
		{"init", "ID=ADDR [ID=ADDR ...]", "make a cluster of these voters",
			"It is sent to the first ADDR unless endpoints are given.", 1, many, long, (*client).init, nil},
		{"add-learner", "ID=ADDR", "add a node without a vote and wait until it has caught up", "", 1, 1, long, (*client).addLearner,
			func(c *client, fs *flag.FlagSet) {
				fs.BoolVar(&c.progress, "progress", false, "show the progress even if stderr is no terminal")
			}},
		{"change-membership", "ID [ID ...]", "make these members the voters", "", 1, many, long, (*client).changeMembership,
			func(c *client, fs *flag.FlagSet) {
				fs.BoolVar(&c.retain, "retain", false, "keep voters that are not named as learners")
			}},
		{"remove", "ID", "remove a voter or a learner", "", 1, 1, short, (*client).remove, nil},
		{"transfer-leader", "ID", "make this voter the leader", "", 1, 1, short, (*client).transferLeader, nil},
		{"set", "KEY VALUE", "write a key",
			"The VALUE - is read from stdin. Arguments that start with a dash stand behind --.\n" +
				`With -o json: {"version"}.`, 2, 2, short, (*client).set, nil},
		{"get", "KEY", "print a key's value",
			"It prints the value's bytes, with a newline on a terminal only; -o json:\n" +
				`{"key", "value", "version"}, the value in base64.` + "\n" +
				"The exit status is 1 if the key is not there.", 1, 1, short, (*client).get,
			func(c *client, fs *flag.FlagSet) {
				fs.BoolVar(&c.local, "local", false, "read what the called node has applied; it may be old")
			}},
		{"delete", "KEY", "remove a key", `With -o json: {"deleted", "version"}.` + "\n" +
			"The exit status is 1 if the key was not there.", 1, 1, short, (*client).delete, nil},
		{"status", "", "show every member as it sees itself",
			`With -o json: {"members": [{"node_id", "address", "reachable", "error", "metrics"}]},` + "\n" +
				"metrics being MetricsResponse of kv.proto or null; 64-bit numbers are strings.\n" +
				"A node has 2s to answer, or the timeout if that is shorter.\n" +
				"The exit status is 1 if no node answers.", 0, 0, short, (*client).status, nil},
		{"health", "", "print the health of the first endpoint that answers",
			"The exit status is 0 only if it is SERVING.", 0, 0, short, (*client).health,
			func(c *client, fs *flag.FlagSet) {
				fs.StringVar(&c.service, "service", kvpb.KVService_ServiceDesc.ServiceName, "`NAME` of the service to ask for")
				fs.BoolVar(&c.untilServing, "wait", false, "wait for SERVING until the timeout")
			}},
		{"version", "", "print the version", "", 0, 0, 0, (*client).version, nil},
		{"help", "[COMMAND]", "explain a command", "", 0, 1, 0, (*client).help, nil},
	}
}

func findCommand(name string) *command {
	for _, cmd := range commands() {
		if cmd.name == name {
			return cmd
		}
	}
	return nil
}

func isCommand(name string) bool { return findCommand(name) != nil }

// commandList is a line for each sub-command.
func commandList() string {
	var b strings.Builder
	for _, cmd := range commands() {
		fmt.Fprintf(&b, "  %-18s %s\n", cmd.name, cmd.summary)
	}
	return b.String()
}

// usageError is a mistake of the caller: exit status 2.
type usageError string

func (e usageError) Error() string { return string(e) }

func usagef(format string, args ...any) error { return usageError(fmt.Sprintf(format, args...)) }

// runClient runs one sub-command and returns the exit status: 0; 1 for a
// failure, a missing key or a failed comparison; 2 for a usage error.
func runClient(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 || !isCommand(args[0]) {
		fmt.Fprintf(stderr, "raft-key-value: unknown command: %q; see raft-key-value help\n", strings.Join(args[:min(1, len(args))], ""))
		return 2
	}
	cmd, c := findCommand(args[0]), &client{stdin: stdin, stdout: stdout, stderr: stderr}
	err := cmd.parse(c, args[1:])
	if err == nil {
		err = cmd.run(c, ctx)
	} else if errors.Is(err, flag.ErrHelp) {
		_, err = io.WriteString(stdout, cmd.usage())
	}
	if err == nil {
		return 0
	}
	message := strings.Join(strings.Fields(errorText(err)), " ")
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(stderr, "raft-key-value: %s: %s; see raft-key-value help %s\n", cmd.name, message, cmd.name)
		return 2
	}
	fmt.Fprintf(stderr, "raft-key-value: %s: %s\n", cmd.name, message)
	return 1
}

// flagSet has the flags of a sub-command, which set c's fields.
func (cmd *command) flagSet(c *client) *flag.FlagSet {
	fs := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&c.output, "o", "text", "`FORMAT` of the output: text or json")
	if cmd.timeout > 0 {
		endpoints := "127.0.0.1:21001"
		if cmd.name == "init" {
			endpoints = ""
		}
		fs.StringVar(&c.endpointList, "endpoints", cmp.Or(os.Getenv("RAFT_KEY_VALUE_ENDPOINTS"), endpoints),
			"the `HOST:PORT,...` to call, tried in this order; environment RAFT_KEY_VALUE_ENDPOINTS")
		fs.DurationVar(&c.timeout, "timeout", cmd.timeout, "`DURATION` until the command gives up")
	}
	if cmd.flags != nil {
		cmd.flags(c, fs)
	}
	return fs
}

// usage is the help text of a sub-command.
func (cmd *command) usage() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: raft-key-value %s [FLAGS] %s\n\nTo %s.\n", cmd.name, cmd.args, cmd.summary)
	if cmd.details != "" {
		fmt.Fprintln(&b, cmd.details)
	}
	b.WriteString("\nFlags, before or after the arguments:\n")
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	cmd.flagSet(new(client)).VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		dashes := "--"[:min(len(f.Name), 2)]
		fmt.Fprintf(w, "  %s%s %s\t%s (default %s)\n", dashes, f.Name, value, usage, cmp.Or(f.DefValue, "none"))
	})
	fmt.Fprintln(w, "  --help\tprint this text")
	w.Flush() // A strings.Builder takes everything.
	return b.String()
}

// parse sets c's fields by the flags and arguments and checks them.
func (cmd *command) parse(c *client, args []string) (err error) {
	fs := cmd.flagSet(c)
	for ended := false; !ended; { // Package flag stops at the first argument.
		if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
			return err
		} else if err != nil {
			return usageError(err.Error())
		}
		rest := fs.Args()
		used := len(args) - len(rest)
		if ended = len(rest) == 0 || used > 0 && args[used-1] == "--"; ended {
			c.args = append(c.args, rest...)
		} else {
			c.args, args = append(c.args, rest[0]), rest[1:]
		}
	}
	if cmd.timeout > 0 && (c.endpointList != "" || cmd.name != "init") {
		c.endpoints = strings.Split(c.endpointList, ",")
	}
	for _, addr := range c.endpoints {
		err = cmp.Or(err, checkAddress(addr))
	}
	switch n := len(c.args); {
	case n < cmd.min || n > cmd.max:
		return usagef("wrong number of arguments: %d; want: %s", n, cmp.Or(cmd.args, "none"))
	case c.output != "text" && c.output != "json":
		return usagef("-o %q: want text or json", c.output)
	case cmd.timeout > 0 && c.timeout <= 0:
		return usagef("--timeout %v: want a positive duration", c.timeout)
	case err != nil:
		return err
	}
	return c.parseArgs(cmd.args)
}

// parseArgs checks the arguments by their names in the usage text.
func (c *client) parseArgs(names string) (err error) {
	switch {
	case strings.HasPrefix(names, "KEY") && (c.args[0] == "" || !utf8.ValidString(c.args[0])):
		return usagef("key %q: want UTF-8 of at least one byte", c.args[0])
	case strings.HasPrefix(names, "ID="):
		for _, arg := range c.args {
			node, err := parseNode(arg)
			if err != nil {
				return err
			}
			if slices.ContainsFunc(c.nodes, func(o *kvpb.Node) bool { return o.GetId() == node.GetId() || o.GetAddress() == node.GetAddress() }) {
				return usagef("node %q: another one has this id or address", arg)
			}
			c.nodes = append(c.nodes, node)
		}
	case strings.HasPrefix(names, "ID"):
		c.ids, err = parseIDs(c.args...)
	}
	return err
}

func checkAddress(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || host == "" || portErr != nil || n == 0 {
		return usagef("address %q: want host:port", addr)
	}
	return nil
}

func parseIDs(args ...string) (ids []uint64, err error) {
	for _, arg := range args {
		id, err := strconv.ParseUint(arg, 10, 64)
		if err != nil || id == 0 || slices.Contains(ids, id) {
			return nil, usagef("id %q: want a positive number, each once", arg)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// parseNode reads ID=ADDR.
func parseNode(s string) (*kvpb.Node, error) {
	id, addr, ok := strings.Cut(s, "=")
	if !ok {
		return nil, usagef("node %q: want ID=ADDR", s)
	}
	ids, err := parseIDs(id)
	if err != nil {
		return nil, err
	}
	return &kvpb.Node{Id: ids[0], Address: addr}, checkAddress(addr)
}

func (c *client) init(ctx context.Context) error {
	if c.endpoints == nil {
		c.endpoints = []string{c.nodes[0].GetAddress()}
	}
	resp := new(kvpb.InitResponse)
	if err := c.call(ctx, effectChange, kvpb.ClusterService_Init_FullMethodName, &kvpb.InitRequest{Members: c.nodes}, resp); err != nil {
		return err
	}
	return c.print(resp, fmt.Sprintf("cluster %016x initialised: %d voter(s)\n", resp.GetClusterId(), len(c.nodes)))
}

func (c *client) addLearner(ctx context.Context) error {
	var watcher sync.WaitGroup
	defer watcher.Wait()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	if c.progress || isTerminal(c.stderr) {
		watcher.Go(func() { c.showProgress(watch, c.nodes[0].GetId()) })
	}
	return c.do(ctx, effectChange, kvpb.ClusterService_AddLearner_FullMethodName, &kvpb.AddLearnerRequest{Node: c.nodes[0]},
		new(kvpb.AddLearnerResponse), fmt.Sprintf("node %d is a learner and has caught up\n", c.nodes[0].GetId()))
}

// showProgress says how far a learner has got, each time that it has moved.
func (c *client) showProgress(ctx context.Context, id uint64) {
	ticker := time.NewTicker(500 * time.Millisecond)
	defer ticker.Stop()
	for last := ""; ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		best := bestMetrics(c.survey(ctx))
		for _, m := range best.GetMembers() {
			line := fmt.Sprintf("node %d: %d of %d entries\n", id, m.GetProgress().GetMatchIndex(), best.GetLastIndex())
			if m.GetNode().GetId() == id && m.GetLearner() && m.GetProgress() != nil && line != last {
				io.WriteString(c.stderr, line)
				last = line
			}
		}
	}
}

func (c *client) changeMembership(ctx context.Context) error {
	return c.change(ctx, &kvpb.ChangeMembershipRequest{Members: c.ids, Retain: c.retain})
}

// remove names all voters but one. It has them from the leader if that
// answers: a node that lags might not know the newest.
func (c *client) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	id, found, req := c.ids[0], false, new(kvpb.ChangeMembershipRequest)
	rows := c.survey(ctx)
	best := bestMetrics(rows)
	for _, m := range best.GetMembers() {
		if m.GetNode().GetId() == id {
			found = true
			if m.GetLearner() {
				req.RemoveLearners = []uint64{id}
			}
		} else if m.GetVoter() {
			req.Members = append(req.Members, m.GetNode().GetId())
		}
	}
	switch {
	case best == nil:
		return fmt.Errorf("no node answered: %s", rows[0].Error)
	case !found:
		return fmt.Errorf("no member has the id %d", id)
	case len(req.GetMembers()) == 0:
		return fmt.Errorf("node %d is the only voter", id)
	}
	return c.change(ctx, req)
}

func (c *client) change(ctx context.Context, req *kvpb.ChangeMembershipRequest) error {
	return c.do(ctx, effectChange, kvpb.ClusterService_ChangeMembership_FullMethodName, req,
		new(kvpb.ChangeMembershipResponse), fmt.Sprintf("voters: %v\n", req.GetMembers()))
}

func (c *client) transferLeader(ctx context.Context) error {
	return c.do(ctx, effectChange, kvpb.ClusterService_TransferLeader_FullMethodName, &kvpb.TransferLeaderRequest{NodeId: c.ids[0]},
		new(kvpb.TransferLeaderResponse), fmt.Sprintf("node %d leads\n", c.ids[0]))
}

func (c *client) set(ctx context.Context) (err error) {
	value := []byte(c.args[1])
	if c.args[1] == "-" {
		// One byte more than the server takes, for it to refuse.
		if value, err = io.ReadAll(io.LimitReader(c.stdin, 1<<20+1)); err != nil {
			return err
		}
	}
	return c.do(ctx, effectWrite, kvpb.KVService_Set_FullMethodName, &kvpb.SetRequest{Key: c.args[0], Value: value}, new(kvpb.SetResponse), "")
}

var errNotFound = errors.New("not found")

func (c *client) get(ctx context.Context) error {
	effect, resp := effectNone, new(kvpb.GetResponse)
	if c.local {
		effect = effectNoneOwn
	}
	if err := c.call(ctx, effect, kvpb.KVService_Get_FullMethodName, &kvpb.GetRequest{Key: c.args[0], Local: c.local}, resp); err != nil {
		return err
	}
	switch {
	case resp.Value == nil:
		return errNotFound
	case c.output == "json":
		return c.printJSON(map[string]any{"key": c.args[0], "value": resp.GetValue(), "version": strconv.FormatUint(resp.GetVersion(), 10)})
	case isTerminal(c.stdout):
		return c.print(resp, string(resp.GetValue())+"\n")
	}
	return c.print(resp, string(resp.GetValue()))
}

func (c *client) delete(ctx context.Context) error {
	resp := new(kvpb.DeleteResponse)
	err := c.do(ctx, effectWrite, kvpb.KVService_Delete_FullMethodName, &kvpb.DeleteRequest{Key: c.args[0]}, resp, "")
	if err == nil && !resp.GetDeleted() {
		return errNotFound
	}
	return err
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

// survey asks the endpoints and all members that they know, at the same time.
func (c *client) survey(ctx context.Context) []*memberRow {
	rows, ids, answers, pending := map[string]*memberRow{}, map[string]uint64{}, make(chan *memberRow), 0
	ask := func(addr string, id uint64) {
		if _, asked := ids[addr]; !asked {
			pending++
			go func() { answers <- c.ask(ctx, addr) }()
		}
		ids[addr] = max(ids[addr], id)
	}
	for _, addr := range c.endpoints {
		ask(addr, 0)
	}
	for ; pending > 0; pending-- {
		r := <-answers
		for _, m := range r.metrics.GetMembers() {
			ask(m.GetNode().GetAddress(), m.GetNode().GetId())
		}
		// An endpoint may be another name of a member.
		if old := rows[r.Address]; old == nil || !old.Reachable {
			rows[r.Address] = r
		}
	}
	for addr, r := range rows {
		r.NodeID = cmp.Or(r.NodeID, ids[addr])
	}
	return slices.SortedFunc(maps.Values(rows), func(a, b *memberRow) int {
		// An unknown id, 0, comes last.
		return cmp.Or(cmp.Compare(a.NodeID-1, b.NodeID-1), cmp.Compare(a.Address, b.Address))
	})
}

// ask asks one node for its metrics. It goes by the address it has itself.
func (c *client) ask(ctx context.Context, addr string) *memberRow {
	m := new(kvpb.MetricsResponse)
	_, _, err := callOne(ctx, addr, min(c.timeout, 2*time.Second), effectNoneOwn, kvpb.ClusterService_Metrics_FullMethodName, &kvpb.MetricsRequest{}, m)
	if err != nil {
		return &memberRow{Address: addr, Error: errorText(err)}
	}
	return &memberRow{m.GetNode().GetId(), cmp.Or(m.GetNode().GetAddress(), addr), true, "", protoJSON{m}, m}
}

// bestMetrics is the newest leader's, or else that of the node that knows
// most; nil if no node answered. The roles' numbers rise in this order.
func bestMetrics(rows []*memberRow) *kvpb.MetricsResponse {
	return slices.MaxFunc(rows, func(a, b *memberRow) int {
		return cmp.Or(cmp.Compare(a.metrics.GetRole(), b.metrics.GetRole()), cmp.Compare(a.metrics.GetTerm(), b.metrics.GetTerm()),
			cmp.Compare(a.metrics.GetAppliedIndex(), b.metrics.GetAppliedIndex()))
	}).metrics
}

func (c *client) status(ctx context.Context) error {
	rows := c.survey(ctx)
	if c.output == "json" {
		if err := c.printJSON(map[string]any{"members": rows}); err != nil {
			return err
		}
	} else if _, err := io.WriteString(c.stdout, statusText(rows)); err != nil {
		return err
	}
	if bestMetrics(rows) == nil {
		return errors.New("no node answered")
	}
	return nil
}

// statusText is a line for each node, then what needs words.
func statusText(rows []*memberRow) string {
	best := bestMetrics(rows)
	var table, notes strings.Builder
	votes, voters, outgoing := map[uint64]string{}, []uint64{}, []uint64{}
	for _, m := range best.GetMembers() {
		id := m.GetNode().GetId()
		votes[id] = cmp.Or(votes[id], "no")
		if m.GetVoter() {
			votes[id], voters = "yes", append(voters, id)
		}
		if m.GetVoterOutgoing() {
			outgoing = append(outgoing, id)
		}
	}
	if best.GetJoint() {
		fmt.Fprintf(&notes, "A change of membership is half way: from the voters %v to %v.\n", outgoing, voters)
	}
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tADDRESS\tHEALTH\tVOTER\tROLE\tLEADER\tTERM\tAPPLIED\tVERSION\tKEYS\tCLUSTER")
	for _, r := range rows {
		m, health := r.metrics, "ok"
		if !r.Reachable {
			health = "unreachable"
		} else if !m.GetHealthy() {
			health = "unhealthy"
		}
		if health != "ok" {
			fmt.Fprintf(&notes, "Node %s (%s) is %s: %s.\n", dashIfZero(r.NodeID), r.Address, health, cmp.Or(r.Error, m.GetUnhealthyReason()))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s", dashIfZero(r.NodeID), r.Address, health, cmp.Or(votes[r.NodeID], "-"))
		if r.Reachable {
			role := strings.ToLower(strings.TrimPrefix(m.GetRole().String(), "ROLE_"))
			fmt.Fprintf(w, "\t%s\t%s\t%d\t%d\t%d\t%d\t%016x", role, dashIfZero(m.GetLeader().GetId()),
				m.GetTerm(), m.GetAppliedIndex(), m.GetVersion(), m.GetKeys(), m.GetClusterId())
		}
		fmt.Fprintln(w)
	}
	w.Flush() // A strings.Builder takes everything.
	return table.String() + notes.String()
}

func dashIfZero(id uint64) string {
	if id == 0 {
		return "-"
	}
	return strconv.FormatUint(id, 10)
}

// health polls if it waits: a stream would end with a node that restarts.
func (c *client) health(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	if c.untilServing { // One connection that hangs must not take up the wait.
		c.timeout = min(c.timeout, 2*time.Second)
	}
	for {
		resp := new(healthpb.HealthCheckResponse)
		err := c.call(ctx, effectNoneOwn, healthpb.Health_Check_FullMethodName, &healthpb.HealthCheckRequest{Service: c.service}, resp)
		serving := err == nil && resp.GetStatus() == healthpb.HealthCheckResponse_SERVING
		if !serving && c.untilServing {
			select {
			case <-ticker.C:
				continue
			case <-ctx.Done():
			}
		}
		if err != nil {
			return err
		}
		if err := c.print(resp, resp.GetStatus().String()+"\n"); err != nil || serving {
			return err
		}
		return fmt.Errorf("%s is not serving", c.service)
	}
}

func (c *client) version(context.Context) error {
	if c.output == "json" {
		return c.printJSON(map[string]string{"version": buildVersion(), "go": runtime.Version()})
	}
	return c.print(nil, fmt.Sprintf("raft-key-value %s %s\n", buildVersion(), runtime.Version()))
}

// buildVersion is the module's version, which has the commit of an untagged build.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "devel"
	}
	return info.Main.Version
}

func (c *client) help(context.Context) error {
	if len(c.args) == 0 {
		_, err := io.WriteString(c.stdout, "Commands; raft-key-value help COMMAND explains one:\n"+commandList())
		return err
	}
	cmd := findCommand(c.args[0])
	if cmd == nil {
		return usagef("unknown command: %q", c.args[0])
	}
	_, err := io.WriteString(c.stdout, cmd.usage())
	return err
}

// protoJSON is a message as encoding/json is to write it.
type protoJSON struct{ proto.Message }

func (p protoJSON) MarshalJSON() ([]byte, error) {
	return protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(p.Message)
}

// print prints an answer as JSON, or the text that says the same.
func (c *client) print(resp proto.Message, text string) error {
	if c.output == "json" {
		return c.printJSON(protoJSON{resp})
	}
	_, err := io.WriteString(c.stdout, text)
	return err
}

// printJSON also takes out the spaces that protojson puts in at random.
func (c *client) printJSON(v any) error {
	enc := json.NewEncoder(c.stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// An effect of a call tells whether the call may be sent again.
const (
	effectNone    = ""
	effectNoneOwn = "own" // Reads the called node: no other can answer for it.
	effectWrite   = "write"
	effectChange  = "change"
)

func mutates(effect string) bool { return effect == effectWrite || effect == effectChange }

// do makes a call and prints its result.
func (c *client) do(ctx context.Context, effect, method string, req, resp proto.Message, text string) error {
	if err := c.call(ctx, effect, method, req, resp); err != nil {
		return err
	}
	return c.print(resp, text)
}

// call makes a call to one endpoint after another until one answers. What has
// an effect goes to a second one only if the first cannot have applied it.
func (c *client) call(ctx context.Context, effect, method string, req, resp proto.Message) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	var failure error
	tried := map[string]bool{}
	for queue := c.endpoints; len(queue) > 0; {
		addr := queue[0]
		queue = queue[1:]
		if tried[addr] {
			continue
		}
		tried[addr] = true
		share := max(time.Until(deadline)/time.Duration(len(queue)+1), time.Second)
		leader, sent, err := callOne(ctx, addr, share, effect, method, req, resp)
		if err == nil {
			return nil
		}
		if sent && !mayResend(effect, err) {
			return explainOutcome(effect, err)
		}
		if failure == nil || sent { // What a node says tells more than silence.
			failure = err
		}
		if leader != "" && effect != effectNoneOwn {
			queue = append([]string{leader}, queue...)
		}
	}
	return failure
}

// callOne makes a call to one endpoint, which has only its share of the time
// to connect and to be read. If sent is false, the call has not left.
func callOne(ctx context.Context, addr string, share time.Duration, effect, method string, req, resp proto.Message) (leader string, sent bool, err error) {
	conn, err := grpc.NewClient("dns:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return "", false, err
	}
	defer conn.Close()
	short, cancel := context.WithTimeout(ctx, share)
	defer cancel()
	if err := awaitReady(short, conn); err != nil {
		return "", false, err
	}
	if !mutates(effect) {
		ctx = short
	}
	var trailer metadata.MD
	err = conn.Invoke(ctx, method, req, resp, grpc.Trailer(&trailer))
	return strings.Join(trailer.Get("x-raft-leader"), ""), true, err
}

// awaitReady returns once the connection is there or has failed.
func awaitReady(ctx context.Context, conn *grpc.ClientConn) error {
	for {
		state := conn.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.Idle:
			conn.Connect()
		case connectivity.TransientFailure:
			// Only a call tells why, and this one has no effect.
			return cmp.Or(conn.Invoke(ctx, kvpb.ClusterService_Metrics_FullMethodName, &kvpb.MetricsRequest{}, new(kvpb.MetricsResponse)),
				status.Error(codes.Unavailable, "the connection failed"))
		}
		if !conn.WaitForStateChange(ctx, state) {
			return status.Errorf(codes.Unavailable, "no connection to %s: %v", strings.TrimPrefix(conn.Target(), "dns:///"), ctx.Err())
		}
	}
}

// nodeReason is the reason that a node gave; "" if the error is not a node's.
func nodeReason(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == "kv.v1" {
			return info.GetReason()
		}
	}
	return ""
}

// mayResend: a node's UNAVAILABLE means "not applied", but gRPC has one of its
// own for a connection that broke.
func mayResend(effect string, err error) bool {
	code := status.Code(err)
	if mutates(effect) {
		return code == codes.Unavailable && nodeReason(err) != ""
	}
	return code == codes.Unavailable || code == codes.DeadlineExceeded
}

// explainOutcome says so if the fate of a write or a change is not known.
func explainOutcome(effect string, err error) error {
	st, reason, unknown := status.Convert(err), nodeReason(err), false
	switch st.Code() {
	case codes.DeadlineExceeded:
		unknown = reason != "DEADLINE" || effect == effectChange
	case codes.Unavailable, codes.Canceled, codes.Internal, codes.Unknown:
		unknown = reason == ""
	}
	if !unknown || !mutates(effect) {
		return err
	}
	p := st.Proto()
	p.Message = fmt.Sprintf("the outcome is unknown, the %s may or may not have been applied: %s", effect, p.GetMessage())
	return status.ErrorProto(p)
}

var innerCapital = regexp.MustCompile(`\B[A-Z]`)

// errorText is an error's message, for that of a call with its code and reason.
func errorText(err error) string {
	st, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	code := strings.ToUpper(innerCapital.ReplaceAllString(st.Code().String(), "_$0"))
	return fmt.Sprintf("%s (%s)", st.Message(), strings.TrimSpace(code+" "+nodeReason(err)))
}
