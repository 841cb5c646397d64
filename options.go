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
