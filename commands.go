// The command line's sub-commands: their table, flags, arguments and help.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"raft-key-value/kvpb"
)

const (
	defaultEndpoint  = "127.0.0.1:21001"
	endpointVariable = variablePrefix + "ENDPOINTS"
)

// The exit statuses of sub-commands.
const (
	exitYes     = 0
	exitNo      = 1 // a key is not there, a compare failed, a node is not SERVING
	exitUsage   = 2
	exitNotDone = 3 // nothing was changed, or what was read is not known
	exitUnknown = 4 // it may or may not have been done
)

// command is a sub-command. The first line of its help is a summary.
type command struct {
	args     []argument
	optional bool // the last argument may be left out
	repeated bool // the last argument may be given any number of times
	help     string
	timeout  time.Duration
	offline  bool // it calls no node
	run      func(*client, context.Context) error
	flags    func(*client, *flag.FlagSet)
	check    func(*client) error // of the flags; nil: there is nothing to check
}

// commands is a function because help refers to it.
func commands() map[string]*command {
	const short, long = 5 * time.Second, time.Minute
	return map[string]*command{
		"init": {
			args: []argument{memberArgument}, repeated: true, timeout: long, run: (*client).init,
			help: `make a cluster of these voters
The first one is called, if neither --endpoints nor the environment names another.`,
			flags: func(c *client, fs *flag.FlagSet) {
				fs.BoolVar(&c.force, "force", false, "make it although a cluster has just called a member, "+
					"and do not wait for members that have just started, which one may call yet")
			},
		},
		"add-learner": {
			args: []argument{memberArgument}, timeout: long, run: (*client).addLearner,
			help: `add a node without a vote and wait until it has caught up
A member that has moved gets the new address, and keeps its role.`,
		},
		"promote": {
			args: []argument{idArgument}, repeated: true, timeout: long, run: (*client).promote,
			help: `make these learners voters
All other members stay as they are.`,
		},
		"demote": {
			args: []argument{idArgument}, repeated: true, timeout: long, run: (*client).demote,
			help: `make these voters learners
All other members stay as they are.`,
		},
		"change-membership": {
			args: []argument{idArgument}, repeated: true, timeout: long, run: (*client).changeMembership,
			help: `make these members, and no others, the voters
If others are voters, --remove-others or --retain has to say what becomes of them. Learners
that are not named stay. To change the role of some members only, see promote and demote.
It fails if somebody else changes the membership meanwhile.`,
			flags: func(c *client, fs *flag.FlagSet) {
				fs.BoolVar(&c.retain, "retain", false, "keep the other voters as learners")
				fs.BoolVar(&c.removeOthers, "remove-others", false, "remove the other voters from the cluster")
			},
			check: func(c *client) error {
				if c.retain && c.removeOthers {
					return errors.New("--retain and --remove-others: want one of them")
				}
				return nil
			},
		},
		"remove": {
			args: []argument{idArgument}, timeout: long, run: (*client).remove,
			help: "remove a voter or a learner",
		},
		"transfer-leader": {
			args: []argument{idArgument}, timeout: short, run: (*client).transferLeader,
			help: "make this voter the leader",
		},
		"set": {
			args: []argument{keyArgument, valueArgument}, timeout: short, run: (*client).set,
			help: `write a key; the VALUE - is read from stdin
The exit status is 1 if the key has not the version that --if-version wants.`,
			flags: func(c *client, fs *flag.FlagSet) {
				c.versionFlag(fs, "only if the key has this `VERSION`; 0: only if it is not there")
			},
		},
		"get": {
			args: []argument{keyArgument}, timeout: short, run: (*client).get,
			help: `print the exact bytes of a value, and a newline on a terminal
The exit status is 1 if the key is not there.`,
			flags: (*client).localFlag,
		},
		"list": {
			args: []argument{prefixArgument}, optional: true, timeout: short, run: (*client).list,
			help: `print keys in order, with versions and values
A line is a key, a version, and a value, quoted as Go does, with tabs between.
With -o json, a line is a page: a ListResponse.`,
			flags: func(c *client, fs *flag.FlagSet) {
				c.localFlag(fs)
				fs.BoolVar(&c.keysOnly, "keys-only", false, "print the keys alone; with -o json, values are empty")
				numberVar(fs, &c.limit, "limit", "the most `KEYS` to print; 0: all")
			},
		},
		"delete": {
			args: []argument{keyArgument}, timeout: short, run: (*client).delete,
			help: `remove a key
The exit status is 1 if it was not there, or has not the version that --if-version wants.`,
			flags: func(c *client, fs *flag.FlagSet) { c.versionFlag(fs, "only if the key has this `VERSION`, not 0") },
			check: func(c *client) error {
				if c.ifVersion != nil && *c.ifVersion == 0 {
					return errors.New("--if-version 0: no key has it; a key that is not there cannot be deleted")
				}
				return nil
			},
		},
		"status": {
			timeout: short, run: (*client).status,
			help: `show every member as it sees itself
What is not known is a dash. The JSON is {"members": [{"node_id", "address", "reachable",
"error", "cluster_id", "metrics"}]}, where cluster_id is the node's cluster, or else the one
that lists it, and metrics is a MetricsResponse or null; an id of 0 is not known.
The exit status is 3 if no node answers, or if nodes of several clusters do.`,
		},
		"health": {
			timeout: short, run: (*client).health,
			help: `ask the first endpoint that can answer for its health
The exit status is 0 only if it is SERVING, 1 if it is not; 3 if none can answer, or if the
endpoints are in several clusters.`,
			flags: func(c *client, fs *flag.FlagSet) {
				fs.StringVar(&c.service, "service", healthNames[0], "`NAME` to ask for: "+strings.Join(healthNames, ", "))
				fs.BoolVar(&c.wait, "wait", false, "wait for SERVING until the timeout")
			},
			check: func(c *client) error {
				if !slices.Contains(healthNames, c.service) {
					return fmt.Errorf("--service %q: want one of: %s", c.service, strings.Join(healthNames, ", "))
				}
				return nil
			},
		},
		"backup": {
			args: []argument{fileArgument}, timeout: time.Hour, run: (*client).backup,
			help: `write all that a cluster holds to a file
The file must not be there yet, and is only once it is whole.`,
		},
		"restore": {
			args: []argument{fileArgument}, timeout: time.Hour, offline: true, run: (*client).restore,
			help: `make a data directory from a backup, offline
It is that of a new cluster with one voter. Start that node with the same id, address
and directory, and add others. Keys, with their versions, and sessions are those of the
backup. What is written then has higher versions than any before, by this machine's clock.`,
			flags: func(c *client, fs *flag.FlagSet) {
				c.node = &kvpb.Node{}
				fs.StringVar(&c.dataDir, "data-dir", "", "`DIRECTORY` to make; it may be there, and empty")
				numberVar(fs, &c.node.Id, "id", "the node's `NUMBER`, not 0")
				fs.StringVar(&c.node.Address, "addr", "", "`HOST:PORT` at which others reach the node")
			},
			check: func(c *client) error {
				if c.dataDir == "" || c.node.Id == 0 || c.node.Address == "" {
					return errors.New("--data-dir, --id and --addr are needed")
				}
				if err := checkMemberAddress(c.node.Address); err != nil {
					return fmt.Errorf("--addr %w", err)
				}
				return nil
			},
		},
		"version": {
			timeout: short, offline: true, run: (*client).version,
			help: "print the version",
		},
		"help": {
			args: []argument{commandArgument}, optional: true, timeout: short, offline: true, run: (*client).help,
			help: "explain a command",
		},
	}
}

const helpNotes = `Flags stand before or after the arguments; what follows -- is an argument. --endpoints, --timeout and
-o may stand before the command, too.
An endpoint that does not answer in 2 s, or that is in no cluster, is passed over (but init wants such).
What reads or writes keys is tried until the timeout, if that can do no harm; a local read once at each endpoint.
With -o json, an answer is as kv.proto has it, 64-bit numbers as strings, values in base64. What is printed to
stderr is JSON, too, a line each: {"warning"}, or {"error", "status", "reason", "endpoints": [{"endpoint",
"error", "code", "reason"}]}, where status is the exit status and a reason an ErrorReason of kv.proto.
The exit status is 0 for yes or done, 1 for no, 2 for a usage error, 3 if it was not done or no node could
answer, and 4 if it is not known whether it was done.
`

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

// usage names the arguments.
func (cmd *command) usage() string {
	var words []string
	for _, a := range cmd.args {
		words = append(words, a.String())
	}
	if last := len(words) - 1; cmd.optional {
		words[last] = "[" + words[last] + "]"
	} else if cmd.repeated {
		words = append(words, "["+words[last]+" ...]")
	}
	return strings.Join(words, " ")
}

func (c *client) help(context.Context) error {
	if len(c.args) == 1 {
		return c.parse(c.args[0], []string{"--help"})
	}
	return c.print(commandList(), fmt.Sprintf(usage, commandList()))
}

const usage = `raft-key-value runs a node of a replicated key-value store, or a sub-command.

A node (raft-key-value --help lists all flags):
  raft-key-value --id N --addr HOST:PORT [--data-dir DIRECTORY]

Sub-commands (raft-key-value help COMMAND tells more):
%s`
