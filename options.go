// A node's settings, by flags and the environment.

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
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

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
	// watchBytes bounds the history of writes that watches can go back to.
	watchBytes uint64
	// maxStoreBytes is how large the store may become, by store.size; 0: as large as it will.
	maxStoreBytes uint64
	// viewBytes, queuedBytes and clientBytes are what the budget has for them; 0: as much as
	// they ever get.
	viewBytes, queuedBytes, clientBytes uint64

	plan     startPlan // which cluster the node is to become a member of
	tls      certificateFiles
	insecure bool   // beyond loopback without TLS
	httpAddr string // host:port to serve HTTP on; empty: there is no HTTP
	pprof    bool   // HTTP serves profiles
	logLevel slog.Level
	// logFormat is text or json.
	logFormat string
	maxLevel  uint32 // that the cluster may rise to as far as this node goes; 0: any
	version   bool   // the version is to be printed, and no node to be run
	// supervisor is told when the node is ready, and when it stops.
	supervisor supervisor

	variables map[string]string // by flag: the environment variable that has set it
	given     map[string]bool   // by flag: it is set, by one or the other

	files    uint64       // in place of RLIMIT_NOFILE, for tests
	listener net.Listener // in place of addr, for tests
	// httpListener stands in place of httpAddr, which is then any name, for tests.
	httpListener net.Listener
	dialer       func(context.Context, string) (net.Conn, error) // in place of TCP, for tests
	redial       time.Duration                                   // in place of redialTime, for tests; 0: not
	onApply      func(*raftpb.Entry)                             // called by the loop, for tests
	onPropose    func(sequence uint64, data []byte)              // called by the loop, for tests
	limits       raftLimits                                      // of a node that has been made
	level        uint32                                          // that the program speaks: programLevel, but in tests
}

const (
	minHeartbeat  = 10 * time.Millisecond
	maxHeartbeat  = leaderWait
	minElection   = 3 // heartbeats
	maxElection   = time.Hour
	minLogBytes   = 1 << 20
	minWatchBytes = 4 << 20 // several times the largest entry
	maxLogBytes   = 1 << 40
	minStoreBytes = 1 << 20
	maxStoreBytes = 1 << 50
)

func defaultOptions() options {
	return options{heartbeat: 100 * time.Millisecond, election: 600 * time.Millisecond, logBytes: 64 << 20, watchBytes: defaultWatchBytes, level: programLevel, logFormat: "text"}
}

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

// nodeFlags are the flags of a node that have environment variables, too. They set o.
func nodeFlags(o *options) *flag.FlagSet {
	fs := flag.NewFlagSet("raft-key-value", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	numberVar(fs, &o.id, "id", "the node's `number` in its cluster, not 0")
	fs.StringVar(&o.addr, "addr", "", "`host:port` to listen on; port 0 picks one")
	fs.StringVar(&o.advertise, "advertise", "",
		"`host:port` at which others reach this node (default: the address listened on)")
	durationVar(fs, &o.heartbeat, "heartbeat", "time between a leader's heartbeats")
	durationVar(fs, &o.election, "election-timeout", "least time without a leader before an election")
	setDataDir := func(s string) error {
		o.dataDir = s
		o.durable = true
		return nil
	}
	fs.Func("data-dir",
		"`directory` that keeps all that the node has promised (default: it is in memory only)", setDataDir)
	numberVar(fs, &o.logBytes, "log-bytes",
		fmt.Sprintf("`bytes` of log entries kept before old ones are dropped (default %d, or less by the memory)", o.logBytes))
	numberVar(fs, &o.watchBytes, "watch-bytes",
		fmt.Sprintf("`bytes` of past writes kept for watches that go on (default %d, or less by the memory)", o.watchBytes))
	fs.Func("max-level", "`level` that this node lets its cluster rise to at most (default: all that its program speaks)",
		func(s string) error {
			level, err := strconv.ParseUint(s, 10, 32)
			if err != nil || level == 0 {
				return errors.New("want a level: 1 or more")
			}
			o.maxLevel = uint32(level)
			return nil
		})
	planFlags(fs, &o.plan)
	numberVar(fs, &o.maxStoreBytes, "max-store-bytes", "`bytes` of keys and values, 64 for each key, and of sessions, "+
		"beyond which Sets that need more are refused (default: by the memory)")
	certificateFlags(fs, &o.tls)
	fileVar(fs, &o.tls.peerCA, "peer-ca-file",
		"`file` with the CAs of the nodes' certificates (default: those of --trusted-ca-file)")
	boolVar(fs, &o.insecure, "insecure", "allow addresses beyond loopback without TLS")
	setLogLevel := func(s string) error {
		if o.logLevel.UnmarshalText([]byte(s)) != nil {
			return errors.New("want debug, info, warn or error")
		}
		return nil
	}
	fs.StringVar(&o.httpAddr, "http-addr", "",
		"`host:port` to serve HTTP on: a page at /, /status, /metrics, /livez and /readyz (default: there is no HTTP)")
	boolVar(fs, &o.pprof, "pprof", "serve profiles by HTTP, at "+profilePrefix+", for admins")
	fs.Func("log-level", "`LEVEL` from which on lines are logged: debug, info, warn or error (default info)", setLogLevel)
	setLogFormat := func(s string) error {
		if s != "text" && s != "json" {
			return errors.New("want text or json")
		}
		o.logFormat = s
		return nil
	}
	fs.Func("log-format", "`FORMAT` of the log: text or json (default text)", setLogFormat)
	return fs
}

// certificateFlags are the flags for TLS that nodes and sub-commands have alike. They set f.
func certificateFlags(fs *flag.FlagSet, f *certificateFiles) {
	fileVar(fs, &f.cert, "cert-file", "`file` with the certificate to show, in PEM; with it, there is TLS")
	fileVar(fs, &f.key, "key-file", "`file` with its private key")
	fileVar(fs, &f.trustedCA, "trusted-ca-file", "`file` with the CAs whose certificates are accepted")
}

// fileVar is fs.StringVar for the name of a file. It refuses an empty one: a variable in the
// command line that is not set would do without TLS.
func fileVar(fs *flag.FlagSet, path *string, name, usage string) {
	fs.Func(name, usage, func(s string) error {
		if s == "" {
			return errors.New("name a file, or leave it out")
		}
		*path = s
		return nil
	})
}

// parseOptions reads a node's settings from the environment, and from flags, which go
// before it. It prints the help, if that is asked for, and returns flag.ErrHelp.
func parseOptions(args []string, stdout io.Writer, env func(string) (string, bool)) (options, error) {
	o := defaultOptions()
	fs := nodeFlags(&o)
	boolVar(fs, &o.version, "version", "print the version and end")
	environmentErr := o.takeEnvironment(env)
	err := fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, usage+"\nFlags of a node; each but --version has an environment variable, such as\n"+
			"RAFT_KEY_VALUE_ELECTION_TIMEOUT for --election-timeout:\n", commandList())
		fs.SetOutput(stdout)
		fs.PrintDefaults()
		fmt.Fprint(stdout, exitHelp)
		return o, err
	}
	if environmentErr != nil {
		return o, environmentErr
	}
	if err != nil {
		return o, err
	}
	if isCommand(fs.Arg(0)) {
		return o, fmt.Errorf("before all flags goes the sub-command %q", fs.Arg(0))
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unknown sub-command %q", fs.Arg(0))
	}
	if o.version {
		return o, nil
	}
	fs.Visit(func(f *flag.Flag) {
		delete(o.variables, f.Name)
		o.given[f.Name] = true
	})
	return o, o.check()
}

// takeEnvironment sets what environment variables set.
func (o *options) takeEnvironment(env func(string) (string, bool)) error {
	o.variables = map[string]string{}
	o.given = map[string]bool{}
	fs := nodeFlags(o)
	var first error
	fs.VisitAll(func(f *flag.Flag) {
		name := variableOf(f.Name)
		value, isSet := env(name)
		if !isSet {
			return
		}
		o.variables[f.Name] = name
		o.given[f.Name] = true
		err := fs.Set(f.Name, value)
		if err != nil && first == nil {
			first = fmt.Errorf("invalid value %q of %s: %w", value, name, err)
		}
	})
	return first
}

// nameOf is what a user knows a setting by: its flag, or the environment variable
// that has set it.
func (o *options) nameOf(flag string) string {
	if name, ok := o.variables[flag]; ok {
		return name
	}
	return "--" + flag
}

// durationVar is fs.DurationVar, but its error says what is wanted: a unit, too.
func durationVar(fs *flag.FlagSet, d *time.Duration, name, usage string) {
	fs.Func(name, fmt.Sprintf("%s (default %s)", usage, durationText(*d)), func(s string) error {
		value, err := time.ParseDuration(s)
		if err != nil {
			return errors.New("want a number and its unit, such as 500ms or 2m")
		}
		*d = value
		return nil
	})
}

// durationText is a duration as people write it: 1m, not 1m0s.
func durationText(d time.Duration) string {
	text := strings.Replace(d.String(), "m0s", "m", 1)
	return strings.Replace(text, "h0m", "h", 1)
}

// boolVar is fs.BoolVar, but its error says what is wanted. The default is false.
func boolVar(fs *flag.FlagSet, b *bool, name, usage string) {
	fs.BoolFunc(name, usage, func(s string) error {
		value, err := strconv.ParseBool(s)
		if err != nil {
			return errors.New("want true or false")
		}
		*b = value
		return nil
	})
}

// numberVar is fs.Uint64Var, but its error says what is wanted.
func numberVar(fs *flag.FlagSet, n *uint64, name, usage string) {
	fs.Func(name, usage, func(s string) error {
		value, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return errors.New("want a whole number, 0 or more")
		}
		*n = value
		return nil
	})
}

func (o *options) check() error {
	if o.id == 0 {
		return fmt.Errorf("%s is needed, and not 0", o.nameOf("id"))
	}
	if o.addr == "" {
		return fmt.Errorf("%s is needed: host:port to listen on", o.nameOf("addr"))
	}
	if o.durable && o.dataDir == "" { // A variable in the command line may not have been set.
		return fmt.Errorf("%s is empty: name a directory, or leave it out", o.nameOf("data-dir"))
	}
	if o.heartbeat < minHeartbeat || o.heartbeat > maxHeartbeat {
		return fmt.Errorf("%s %v is not between %v and %v",
			o.nameOf("heartbeat"), o.heartbeat, minHeartbeat, maxHeartbeat)
	}
	leastElection := minElection * o.heartbeat
	if o.election < leastElection || o.election > maxElection {
		return fmt.Errorf("%s %v is not between %d heartbeats (%v) and %v",
			o.nameOf("election-timeout"), o.election, minElection, leastElection, maxElection)
	}
	if o.logBytes < minLogBytes || o.logBytes > maxLogBytes {
		return fmt.Errorf("%s %d is not between 1 MiB and 1 TiB", o.nameOf("log-bytes"), o.logBytes)
	}
	if o.watchBytes < minWatchBytes || o.watchBytes > maxLogBytes {
		return fmt.Errorf("%s %d is not between 4 MiB and 1 TiB", o.nameOf("watch-bytes"), o.watchBytes)
	}
	isTooSmall := o.given["max-store-bytes"] && o.maxStoreBytes < minStoreBytes
	if isTooSmall || o.maxStoreBytes > maxStoreBytes {
		return fmt.Errorf("%s %d is not between 1 MiB and 1 PiB", o.nameOf("max-store-bytes"), o.maxStoreBytes)
	}
	if err := o.checkTLS(); err != nil {
		return err
	}
	if err := o.checkReach("addr", o.addr); err != nil {
		return err
	}
	if err := o.checkAdvertised(); err != nil {
		return err
	}
	if err := o.checkHTTP(); err != nil {
		return err
	}
	return o.checkPlan()
}

// checkHTTP checks where HTTP is to be served.
func (o *options) checkHTTP() error {
	if o.httpAddr == "" && o.given["http-addr"] { // A variable in the command line may not have been set.
		return fmt.Errorf("%s is empty: give host:port, or leave it out", o.nameOf("http-addr"))
	}
	if o.httpAddr == "" {
		if o.pprof {
			return fmt.Errorf("%s goes with --http-addr", o.nameOf("pprof"))
		}
		return nil
	}
	if err := o.checkReach("http-addr", o.httpAddr); err != nil {
		return err
	}
	host, _, _ := net.SplitHostPort(o.httpAddr)
	isForAnybody := !o.tls.areGiven() && !isLoopback(host)
	if o.pprof && isForAnybody {
		return fmt.Errorf("%s needs TLS, or loopback: profiles are for admins, and here anybody could have them", o.nameOf("pprof"))
	}
	return nil
}

// checkTLS checks that there is all or nothing of what TLS needs.
func (o *options) checkTLS() error {
	if !o.tls.areGiven() {
		return nil
	}
	if !o.tls.areAll() {
		return fmt.Errorf("TLS needs %s, %s and %s: give all three, or none",
			o.nameOf("cert-file"), o.nameOf("key-file"), o.nameOf("trusted-ca-file"))
	}
	if o.insecure {
		return fmt.Errorf("%s allows to do without TLS, and there is a certificate: leave one of them out", o.nameOf("insecure"))
	}
	return nil
}

// checkReach checks an address, and that only this machine reaches it, or that there is
// TLS, or that anybody may.
func (o *options) checkReach(flag, address string) error {
	host, _, err := splitListenAddress(address)
	if err != nil {
		return fmt.Errorf("%s: %w", o.nameOf(flag), err)
	}
	mayReach := o.tls.areGiven() || o.insecure
	if !isLoopback(host) && !mayReach {
		return fmt.Errorf("%s is beyond loopback, and there is no TLS: give --cert-file, --key-file and "+
			"--trusted-ca-file, which raft-key-value certs makes, or --insecure, with which anybody who reaches it "+
			"may read and write", address)
	}
	return nil
}

// isLoopback reports whether only this machine reaches a host.
func isLoopback(host string) bool {
	ip, _ := netip.ParseAddr(host)
	return host == "localhost" || ip.Unmap().IsLoopback()
}

// isExposed reports whether others than this machine may reach the node, and it does not
// ask who they are.
func (o *options) isExposed() bool {
	if o.tls.areGiven() {
		return false
	}
	for _, address := range []string{o.addr, o.advertise, o.httpAddr} {
		host, _, err := net.SplitHostPort(address)
		if err == nil && !isLoopback(host) {
			return true
		}
	}
	return false
}

// checkAdvertised checks the address at which others are to reach the node: a host of
// its own, and a port. Only if it is the one that is listened on, its port may be 0.
func (o *options) checkAdvertised() error {
	address := cmp.Or(o.advertise, o.addr)
	host, port, err := splitListenAddress(address)
	if err != nil {
		return fmt.Errorf("%s: %w", o.nameOf("advertise"), err)
	}
	hasNoPort := o.advertise != "" && port == 0
	if isEverywhere(host) || hasNoPort {
		return fmt.Errorf("%s has to say where the others find this node, %q does not", o.nameOf("advertise"), address)
	}
	return o.checkReach("advertise", address)
}
