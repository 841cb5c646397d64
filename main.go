// Raft-key-value is a replicated key-value store: etcd's raft library, a gRPC
// stream between each two nodes, and a map.
//
// Calls flow one way: service → node → network, log, store. What comes back
// from the network is handed to functions that the node gave it.
//
// # Goroutines
//
//   - The loop (node.run), one a node. It alone touches the RawNode, the log,
//     the fields of node, and writes to the store. Everybody else leaves work in
//     its inbox and reads what it publishes.
//   - The writer (disk.run), one a node with a data directory: it alone touches
//     the log on disk. Beside it, one goroutine fills the log's next segment and
//     one writes a snapshot from a view (disk.start).
//   - A peer (peer.run), one for each other member: it keeps a stream open and
//     sends what the loop queued. Beside it a goroutine waits for the stream's
//     end, and a timer for an answer to its hello.
//   - A dial (target.dial), in a goroutine of gRPC's, has one for each of its tries
//     to connect, which end with it, and one for a lookup of a name, which may go on
//     for the next dial.
//   - A hearer (network.serve), one for each stream from a peer and each
//     snapshot received: it decodes and leaves messages in the inbox, or builds
//     a new store that nobody else sees before the loop installs it.
//   - A snapshot sender (peer.sendSnapshot, or network.serve for a backup), one for
//     each snapshot on its way out: it reads a view, which nobody changes.
//   - gRPC's own: one for each call, streamWorkers of which serve the next one
//     too. A call waits in server.call or node.await, reads the store under its
//     lock, and waits in admit for room for its answer.
//     A Pipeline's call sends answers, and a second goroutine receives.
//     The view of a List is closed by a goroutine when its call has ended.
//   - main and run: they wait for a signal, the loop, gRPC's Serve and its
//     GracefulStop, each in a goroutine.
//   - A sub-command asks several nodes at once, and waits for stdin, in
//     goroutines of its own.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate

// stopTimeout bounds the wait for calls to end, flushTimeout for their answers
// to be written: together less than the 10 s after which Docker kills, and systemd
// and Kubernetes wait longer.
const stopTimeout, flushTimeout = 8 * time.Second, time.Second

// options are a node's settings.
type options struct {
	id        uint64
	addr      string        // host:port to listen on
	advertise string        // host:port for the others; empty: the one listened on
	heartbeat time.Duration // between two heartbeats of a leader
	election  time.Duration // without a heartbeat before an election, at least
	durable   bool          // or else all is in memory only
	dataDir   string
	logBytes  uint64 // of entries, before old ones are dropped
	insecure  bool   // beyond loopback without TLS
	logLevel  slog.Level
	version   bool // it is to be printed, and nothing else

	files    uint64                                          // in place of RLIMIT_NOFILE, for tests
	listener net.Listener                                    // in place of addr, for tests
	dialer   func(context.Context, string) (net.Conn, error) // in place of TCP, for tests
	redial   time.Duration                                   // in place of redialTime, for tests; 0: not
	onApply  func(*raftpb.Entry)                             // called by the loop, for tests
	limits   raftLimits                                      // of a node that has been made
}

func defaultOptions() options {
	return options{heartbeat: 100 * time.Millisecond, election: 600 * time.Millisecond, logBytes: 64 << 20}
}

// ballast is never touched: it costs address space, not memory. It has the
// collector wait for as much garbage however small the store is, and takes
// nothing from a large one. A collection also shrinks the stacks of gRPC's
// workers, which the next call has to grow again.
var ballast = make([]byte, 64<<20)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	status := execute(ctx, os.Args[1:])
	runtime.KeepAlive(ballast)
	os.Exit(status)
}

// execute runs a node or a sub-command and returns the exit status.
func execute(ctx context.Context, args []string) int {
	if command := findCommand(args); command != nil {
		return runClient(ctx, command, os.Stdin, os.Stdout, os.Stderr)
	}
	o, err := parseOptions(args, os.Stdout, os.LookupEnv)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		for _, name := range unknownVariables(os.Environ()) {
			fmt.Fprintln(os.Stderr, "raft-key-value: warning: no flag has the environment variable "+name)
		}
		fmt.Fprintf(os.Stderr, "raft-key-value: %v; see raft-key-value --help\n", err)
		return 2
	}
	if o.version {
		return runClient(ctx, []string{"version"}, os.Stdin, os.Stdout, os.Stderr)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: o.logLevel})).With("node", o.id)
	for _, name := range unknownVariables(os.Environ()) {
		log.Warn("no flag has this environment variable", "name", name)
	}
	if err := run(ctx, o, log, func(*server) {}); err != nil {
		log.Error("stopped", "err", err)
		return 1
	}
	log.Info("stopped")
	return 0
}

const usage = `raft-key-value runs a node of a replicated key-value store, or a sub-command.

A node (raft-key-value --help lists all flags):
  raft-key-value --id N --addr HOST:PORT [--data-dir DIRECTORY]

Sub-commands (raft-key-value help COMMAND tells more):
%s`

// variablePrefix begins the names of all environment variables of the program.
const variablePrefix = "RAFT_KEY_VALUE_"

// variableOf is the environment variable of a node's flag.
func variableOf(flag string) string {
	return variablePrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// unknownVariables are the names of variables that look like the program's, and
// are not: perhaps a flag's name was mistyped.
func unknownVariables(environ []string) []string {
	known := map[string]bool{endpointVariable: true}
	o := defaultOptions()
	nodeFlags(&o).VisitAll(func(f *flag.Flag) { known[variableOf(f.Name)] = true })
	var unknown []string
	for _, variable := range environ {
		name, _, _ := strings.Cut(variable, "=")
		if strings.HasPrefix(name, variablePrefix) && !known[name] {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// nodeFlags are the flags of a node that have environment variables, too. They
// set o.
func nodeFlags(o *options) *flag.FlagSet {
	fs := flag.NewFlagSet("raft-key-value", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	numberVar(fs, &o.id, "id", "the node's `number` in its cluster, not 0")
	fs.StringVar(&o.addr, "addr", "", "`host:port` to listen on; port 0 picks one")
	fs.StringVar(&o.advertise, "advertise", "", "`host:port` at which others reach this node (default: the address listened on)")
	durationVar(fs, &o.heartbeat, "heartbeat", "time between a leader's heartbeats")
	durationVar(fs, &o.election, "election-timeout", "least time without a leader before an election")
	fs.Func("data-dir", "`directory` that keeps all that the node has promised (default: it is in memory only)", func(s string) error {
		o.dataDir, o.durable = s, true
		return nil
	})
	numberVar(fs, &o.logBytes, "log-bytes", fmt.Sprintf("`bytes` of log entries kept before old ones are dropped (default %d)", o.logBytes))
	fs.BoolVar(&o.insecure, "insecure", false, "allow addresses beyond loopback although there is no TLS yet")
	fs.Func("log-level", "debug, info, warn or error (default INFO)", func(s string) error {
		if o.logLevel.UnmarshalText([]byte(s)) != nil {
			return errors.New("want debug, info, warn or error")
		}
		return nil
	})
	return fs
}

// parseOptions reads a node's settings from flags and the environment.
func parseOptions(args []string, stdout io.Writer, env func(string) (string, bool)) (options, error) {
	o := defaultOptions()
	fs := nodeFlags(&o)
	var err error
	fs.VisitAll(func(f *flag.Flag) {
		name := variableOf(f.Name)
		if v, ok := env(name); ok && err == nil {
			if err = fs.Set(f.Name, v); err != nil {
				err = fmt.Errorf("invalid value %q of %s: %w", v, name, err)
			}
		}
	})
	fs.BoolVar(&o.version, "version", false, "print the version and end")
	if parsed := fs.Parse(args); err == nil || errors.Is(parsed, flag.ErrHelp) { // flags go before the environment
		err = parsed
	}
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, usage+"\nFlags of a node; each but --version has an environment variable, such as\n"+
			"RAFT_KEY_VALUE_ELECTION_TIMEOUT for --election-timeout:\n", commandList())
		fs.SetOutput(stdout)
		fs.PrintDefaults()
	}
	if arg := fs.Arg(0); err == nil && fs.NArg() > 0 {
		err = fmt.Errorf("%s %q", oneOf(isCommand(arg), "before all flags goes the sub-command", "unknown sub-command"), arg)
	}
	if o.version {
		return o, err
	}
	return o, ifNot(err, o.check)
}

// durationVar is fs.DurationVar, but its error says what is wanted: a unit, too.
func durationVar(fs *flag.FlagSet, d *time.Duration, name, usage string) {
	fs.Func(name, fmt.Sprintf("%s (default %v)", usage, *d), func(s string) (err error) {
		if *d, err = time.ParseDuration(s); err != nil {
			return errors.New("want a number and its unit, such as 500ms or 2m")
		}
		return nil
	})
}

// numberVar is fs.Uint64Var, but its error says what is wanted.
func numberVar(fs *flag.FlagSet, n *uint64, name, usage string) {
	fs.Func(name, usage, func(s string) (err error) {
		if *n, err = strconv.ParseUint(s, 10, 64); err != nil {
			return errors.New("want a whole number, 0 or more")
		}
		return nil
	})
}

func (o *options) check() error {
	switch {
	case o.id == 0:
		return errors.New("--id is needed, and not 0")
	case o.addr == "":
		return errors.New("--addr is needed: host:port to listen on")
	case o.durable && o.dataDir == "": // perhaps of a variable that was not set
		return errors.New("--data-dir is empty: name a directory, or leave it out")
	case o.heartbeat < 10*time.Millisecond || o.heartbeat > leaderWait:
		return fmt.Errorf("--heartbeat %v is not between 10ms and %v", o.heartbeat, leaderWait)
	case o.election < 3*o.heartbeat || o.election > time.Hour:
		return fmt.Errorf("--election-timeout %v is not between 3 heartbeats (%v) and 1h", o.election, 3*o.heartbeat)
	case o.logBytes < 1<<20 || o.logBytes > 1<<40:
		return fmt.Errorf("--log-bytes %d is not between 1 MiB and 1 TiB", o.logBytes)
	}
	for _, a := range []struct{ flag, address string }{{"addr", o.addr}, {"advertise", cmp.Or(o.advertise, o.addr)}} {
		host, port, err := splitListenAddress(a.address)
		ip, _ := netip.ParseAddr(host)
		switch {
		case err != nil:
			return fmt.Errorf("--%s: %w", a.flag, err)
		case a.flag == "advertise" && (isEverywhere(host) || o.advertise != "" && port == 0):
			return fmt.Errorf("--advertise has to say where the others find this node, %q does not", a.address)
		case host != "localhost" && !ip.Unmap().IsLoopback() && !o.insecure:
			return fmt.Errorf("%s is beyond loopback, and there is no TLS yet: anybody who reaches it may read and write; "+
				"--insecure allows that", a.address)
		}
	}
	return nil
}

// splitListenAddress takes host:port apart; the host may be empty, which means
// everywhere. A port is a number: names of services differ between machines.
func splitListenAddress(address string) (host string, port uint16, err error) {
	host, number, err := net.SplitHostPort(address)
	if err != nil || number == "" {
		return "", 0, fmt.Errorf("address %q: want host:port", address)
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("address %q: want a port from 0 to 65535, not %q", address, number)
	}
	strange := func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) || r == utf8.RuneError }
	if strings.ContainsFunc(host, strange) {
		return "", 0, fmt.Errorf("address %q: there is a blank, or what cannot be printed, in the host", address)
	}
	if len(address) > maxAddressBytes {
		return "", 0, fmt.Errorf("address: it has %d bytes, the limit is %d", len(address), maxAddressBytes)
	}
	return host, uint16(n), nil
}

// splitAddress takes the address of a node apart, which has to name a host.
func splitAddress(address string) (host string, port uint16, err error) {
	host, port, err = splitListenAddress(address)
	if err == nil && host == "" {
		err = fmt.Errorf("address %q: want host:port, and a host", address)
	}
	return host, port, err
}

// isEverywhere reports whether a host is all that a machine has: there, no other
// machine finds it.
func isEverywhere(host string) bool {
	ip, _ := netip.ParseAddr(host)
	return host == "" || ip.Unmap().WithZone("").IsUnspecified()
}

// run runs a node until ctx ends or the node cannot go on. It calls ready once
// the node answers calls.
func run(ctx context.Context, o options, log *slog.Logger, ready func(*server)) error {
	room, err := placesOf(cmp.Or(o.files, openFiles()))
	if err != nil {
		return err
	}
	listener := o.listener
	if listener == nil {
		if listener, err = net.Listen("tcp", o.addr); err != nil {
			return err
		}
	}
	host, _, _ := net.SplitHostPort(o.addr)
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	self := &kvpb.Node{Id: o.id, Address: cmp.Or(o.advertise, net.JoinHostPort(host, port))}
	n := newNode(o, self, log)
	nw := newNetwork(n, log, o.dialer)
	nw.setLimits(&o, room.peers)
	n.net = nw
	s := newServer(n, nw)
	if o.durable {
		d, err := openDisk(osFS{}, o.dataDir, o.logBytes, log)
		if err == nil {
			defer d.close()
			err = n.open(d)
		}
		if err != nil {
			_ = listener.Close()
			nw.close()
			return err
		}
		d.start(d.run)
	}

	loop, endLoop := context.WithCancel(context.Background())
	defer endLoop()
	loopErr, serveErr := make(chan error, 1), make(chan error, 1)
	go func() { loopErr <- n.run(loop) }()
	go func() { serveErr <- s.grpc.Serve(newLimiter(listener, room, log)) }()
	log.Log(ctx, max(slog.LevelInfo, o.logLevel), "ready", "addr", listener.Addr(), "advertise", self.Address, "durable", o.durable,
		"connections", room.clients, "peers", room.peers, "files", room.files)
	if n.status.latest.Load().clusterID == 0 {
		log.Info(errNotInitialized.Error())
	}
	ready(s)

	select {
	case err = <-loopErr:
		loopErr <- nil
	case err = <-serveErr:
		serveErr <- nil
	case <-ctx.Done():
		log.Info("stopping")
		stop, cancel := context.WithTimeout(context.Background(), stopTimeout)
		s.stop(stop)
		cancel()
	}
	// Calls have ended, or never will: what is left are streams.
	endLoop()
	err = errors.Join(err, <-loopErr)
	nw.close()
	written := make(chan struct{}) // the answers to the last calls
	go func() { s.grpc.GracefulStop(); close(written) }()
	select {
	case <-written:
	case <-time.After(flushTimeout):
		s.grpc.Stop() // which does not wait for whoever is stuck, as the other goes on to do
	}
	<-serveErr
	return err
}
