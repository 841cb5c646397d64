// The command line's sub-commands: their table, flags, arguments and help.

package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"raft-key-value/kvpb"
)

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

func (c *client) help(context.Context) error {
	if len(c.args) == 1 {
		return c.parse(c.args[0], []string{"--help"})
	}
	return c.print(commandList(), fmt.Sprintf(usage, commandList()))
}
