// The command line's sub-commands: their table.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	defaultEndpoint  = "127.0.0.1:21001"
	endpointVariable = variablePrefix + "ENDPOINTS"
)

// The exit statuses of sub-commands.
const (
	exitYes     = 0
	exitNo      = 1 // a key is not there, a compare failed, a node is not SERVING, a watch has a gap
	exitUsage   = 2
	exitNotDone = 3 // it was not done, or not all of it, as the error says; or what was read is not known
	exitUnknown = 4 // it may or may not have been done
)

// The timeouts of sub-commands, unless --timeout says another.
const (
	callTimeout   = 5 * time.Second
	changeTimeout = time.Minute // A member has to catch up, or others have to answer.
	fileTimeout   = time.Hour
)

// asking is which nodes a sub-command asks.
type asking int

const (
	asksNobody       asking = iota
	asksAll                 // all endpoints, or all members
	asksOne                 // the first member that answers
	asksUntilTimeout        // that, again and again
	asksFounder             // the first endpoint that answers, in no cluster, too
)

// command is a sub-command.
type command struct {
	args     []argument
	optional bool   // the last argument may be left out
	repeated bool   // the last argument may be given up to maxArguments times
	summary  string // what the sub-command is for: a line
	details  string // more lines of its help; empty: there are none
	timeout  time.Duration
	offline  bool // it calls no node
	asks     asking
	// What its help says of it:
	readsLocally bool // it has the flag --local
	saysNo       bool // it may have the exit status exitNo
	mayBeUnknown bool // it may have the exit status exitUnknown
	isInstant    bool // it waits for nothing
	// getsOn: the timeout is not for all that it does, but for each time that it waits. It
	// sees to that itself.
	getsOn bool
	// callsFirstMember: without --endpoints and its variable, the first argument
	// ID=ADDR is called in place of defaultEndpoint.
	callsFirstMember bool

	flags func(*invocation, *flag.FlagSet) // adds those that not all have; nil: there are none
	check func(*invocation) error          // of the flags; nil: there is nothing to check
	run   func(*client, context.Context) error
}

// commands has all sub-commands by name. It is a function because help refers to it.
func commands() map[string]*command {
	return map[string]*command{
		"init": {
			args:             []argument{memberArgument},
			repeated:         true,
			summary:          "make a cluster of these voters",
			details:          "If it is repeated, with the same voters, it succeeds and changes nothing.",
			timeout:          changeTimeout,
			asks:             asksFounder,
			mayBeUnknown:     true,
			callsFirstMember: true,
			flags: func(in *invocation, fs *flag.FlagSet) {
				boolVar(fs, &in.force, "force", "make it although a cluster has just called a member, or one "+
					"was started for another cluster, and do not wait for members that have just started, which one may call yet")
			},
			run: (*client).init,
		},
		"add-learner": {
			args:         []argument{memberArgument},
			summary:      "add a node without a vote and wait until it has caught up",
			details:      "A member that has moved gets the new address, and keeps its role.",
			timeout:      changeTimeout,
			asks:         asksOne,
			mayBeUnknown: true,
			run:          (*client).addLearner,
		},
		"promote": {
			args:         []argument{idArgument},
			repeated:     true,
			summary:      "make these learners voters",
			details:      "All other members stay as they are.",
			timeout:      changeTimeout,
			asks:         asksOne,
			mayBeUnknown: true,
			run:          (*client).promote,
		},
		"demote": {
			args:         []argument{idArgument},
			repeated:     true,
			summary:      "make these voters learners",
			details:      "All other members stay as they are.",
			timeout:      changeTimeout,
			asks:         asksOne,
			mayBeUnknown: true,
			run:          (*client).demote,
		},
		"change-membership": {
			args:     []argument{idArgument},
			repeated: true,
			summary:  "make these members, and no others, the voters",
			details: `If others are voters, --remove-others or --retain has to say what becomes of them. Learners
that are not named stay. To change the role of some members only, see promote and demote.
It fails if somebody else changes the membership meanwhile.`,
			timeout:      changeTimeout,
			asks:         asksOne,
			mayBeUnknown: true,
			flags: func(in *invocation, fs *flag.FlagSet) {
				boolVar(fs, &in.retain, "retain", "keep the other voters as learners")
				boolVar(fs, &in.removeOthers, "remove-others", "remove the other voters from the cluster")
			},
			check: func(in *invocation) error {
				if in.retain && in.removeOthers {
					return errors.New("--retain and --remove-others: want one of them")
				}
				return nil
			},
			run: (*client).changeMembership,
		},
		"remove": {
			args:         []argument{idArgument},
			summary:      "remove a voter or a learner",
			timeout:      changeTimeout,
			asks:         asksOne,
			mayBeUnknown: true,
			run:          (*client).remove,
		},
		"transfer-leader": {
			args:         []argument{idArgument},
			summary:      "make this voter the leader",
			timeout:      callTimeout,
			asks:         asksOne,
			mayBeUnknown: true,
			run:          (*client).transferLeader,
		},
		"set": {
			args:    []argument{keyArgument, valueArgument},
			summary: "write a key; the VALUE - is read from stdin",
			details: `The exit status is 1 if the key has not the version that --if-version wants.
If the value comes from stdin, --timeout begins once that has ended.`,
			timeout:      callTimeout,
			asks:         asksUntilTimeout,
			saysNo:       true,
			mayBeUnknown: true,
			flags: func(in *invocation, fs *flag.FlagSet) {
				in.versionFlag(fs, "only if the key has this `VERSION`; 0: only if it is not there")
			},
			run: (*client).set,
		},
		"get": {
			args:         []argument{keyArgument},
			summary:      "print the exact bytes of a value, and a newline on a terminal",
			details:      "The exit status is 1 if the key is not there.",
			timeout:      callTimeout,
			asks:         asksUntilTimeout,
			readsLocally: true,
			saysNo:       true,
			flags:        (*invocation).localFlags,
			check:        (*invocation).checkLocalFlags,
			run:          (*client).get,
		},
		"list": {
			args:     []argument{prefixArgument},
			optional: true,
			summary:  "print keys in order, with versions and values",
			details: `All that it prints was so at one moment. A line is a key, a version, and a value, quoted as
Go does, with tabs between. With -o json, a line is a ScanResponse: the first one has the
cluster and the version of the last write, the others have the keys.
If a node fails before the first key, another one is asked. Later, the command ends, and the
error says how far it got. A node ends a list whose output nobody takes for 10 s.`,
			timeout:      callTimeout,
			asks:         asksUntilTimeout,
			readsLocally: true,
			getsOn:       true,
			flags: func(in *invocation, fs *flag.FlagSet) {
				in.localFlags(fs)
				in.boundFlags(fs)
				boolVar(fs, &in.keysOnly, "keys-only", "print the keys alone; with -o json, values are empty")
				numberVar(fs, &in.limit, "limit", "the most `KEYS` to print; 0: all")
			},
			check: (*invocation).checkListFlags,
			run:   (*client).list,
		},
		"delete": {
			args:     []argument{keyArgument},
			optional: true,
			summary:  "remove a key, or all keys of a range",
			details: `The exit status is 1 if none was there, or the key has not the version that --if-version wants.
For a range it asks first, unless --yes is given, and prints how many keys it has removed.
Up to 10,000 keys, or 1 MiB of keys, go at once. More go one part after the other, until none
is left: others see some of them gone. If it fails half way, the exit status is 4.`,
			timeout:      callTimeout,
			asks:         asksUntilTimeout,
			saysNo:       true,
			mayBeUnknown: true,
			getsOn:       true,
			flags:        (*invocation).deleteFlags,
			check:        (*invocation).checkDeleteFlags,
			run:          (*client).delete,
		},
		"watch": {
			args:     []argument{prefixArgument},
			optional: true,
			summary:  "print what is written and deleted, as it comes",
			details: `A line is a key, the version of the write, and the value, quoted as Go does, with tabs
between; of a key that was deleted, it is the word deleted. With -o json, a line is an Event.
Each event is told once, in the order of versions. Those of one DeleteRange share a version.
It goes on until it is interrupted, whose exit status is 0 unless --until-version was not
reached. If a node fails, or says nothing for 5 s, another endpoint is asked, and stderr says so.
The exit status is 1 if no node knows any more what comes next: for it was written too long
ago, or the cluster is another one now, or was restored. To begin again without a gap, see what
is there by list -o json, and go on by watch --from-version, with the version of its first
line plus 1.`,
			timeout: watchTimeout,
			asks:    asksUntilTimeout,
			saysNo:  true,
			getsOn:  true,
			flags:   (*invocation).watchFlags,
			check:   (*invocation).checkWatchFlags,
			run:     (*client).watchKeys,
		},
		"status": {
			summary: "show the cluster in a sentence, and every member as it sees itself",
			details: `The first line says how many voters are up, who leads, and how many more may fail. A member is up
if it is in its role and keeps up with the leader; of one that does not answer here, its leader says so.
LAG is how many entries of the leader's log a member has not stored. STORE is used of the quota; DISK is free on the
disk of the data directory: yes if that is not known, no if there is no directory. What is not known is a dash.
The JSON is {"summary": {"state", "text", "clusters": [{"cluster_id", "state", "text", "leader",
"may_fail", "voters", "outgoing_voters", "learners"}]}, "members": [{"node_id", "address", "reachable",
"error", "cluster_id", "certificate_ends_soon", "role", "lag", "metrics"}], "notes": [{"attention", "text"}]}. A state is ok, degraded, no_leader, lost (the cluster
cannot go on), split (several clusters, or two leaders of a term), no_cluster or no_answer; of voters,
outgoing_voters (those of before a change that is half way) and learners, it has {"all", "up",
"answer", "lost_memory"}. Of a member, cluster_id is the node's cluster, or else the one that lists it,
certificate_ends_soon says that the node's certificate ends within 30 days, by the clock here, or has
ended, role is as in the table, or of a node that does not answer, voter, learner or leaving, lag is empty
if it is not known, and metrics is a MetricsResponse or null; an id of 0 is not known.
The exit status is 3 if no node answers, if nodes of several clusters do, or if two lead one term.`,
			timeout: callTimeout,
			asks:    asksAll,
			run:     (*client).status,
		},
		"health": {
			summary: "ask the first endpoint that can answer for its health",
			details: `The exit status is 0 only if it is SERVING, 1 if it is not; 3 if none can answer, or if the
endpoints are in several clusters.`,
			timeout: callTimeout,
			asks:    asksAll,
			saysNo:  true,
			flags: func(in *invocation, fs *flag.FlagSet) {
				fs.StringVar(&in.service, "service", healthNames[0], "`NAME` to ask for: "+healthUsage)
				boolVar(fs, &in.wait, "wait", "wait for SERVING until the timeout")
			},
			check: func(in *invocation) error {
				if !slices.Contains(healthNames, in.service) {
					return fmt.Errorf("--service %q: want one of: %s", in.service, healthUsage)
				}
				return nil
			},
			run: (*client).health,
		},
		"backup": {
			args:    []argument{fileArgument},
			summary: "write all that a cluster holds to a file, or to stdout",
			details: `The file must not be there yet, and is only once it is whole. The FILE - is stdout: then the
result goes to stderr, and the exit status is 0 only if the whole backup was written.
With --data-dir, it is a backup of what one node has in its data directory, offline: the way out
when a majority of the directories is lost. Nothing in the directory is changed. The backup may
lack what was acknowledged, if this node was behind, and may have what was not: the last entries
of its log. Of several directories, take that whose entry has the highest term, and among these the
highest number; verify prints both. It takes as much memory as the node.`,
			timeout:      fileTimeout,
			asks:         asksOne,
			mayBeUnknown: true,
			flags:        (*invocation).backupFlags,
			run:          (*client).backup,
		},
		"restore": {
			args:    []argument{fileArgument},
			summary: "make a data directory from a backup, offline",
			details: `The FILE - is stdin. The directory is that of a new cluster with one voter. Start that node
with the same id, address and directory, and add others. Keys, with their versions, and
sessions are those of the backup. What is written then has higher versions than any before, by
this machine's clock. What is no backup is refused: a segment of a log, a directory, and a
snapshot out of a directory, which lacks what is in the log beside it.`,
			timeout:      fileTimeout,
			mayBeUnknown: true,
			offline:      true,
			flags:        (*invocation).restoreFlags,
			check:        (*invocation).checkRestoreFlags,
			run:          (*client).restore,
		},
		"verify": {
			args:    []argument{savedArgument},
			summary: "check a backup, or the data directory of a node that does not run",
			details: `It reads all that counts, compares every checksum and every record, and changes nothing. Of a
backup, FILE may be - for stdin. Of a directory, it takes as much memory as the node.
It prints what it is, the cluster and its level, and the last entry of raft's log in it, with the term; then the
version, keys and sessions as they are after that entry. With -o json, the answer is {"kind",
"cluster_id", "node_id", "raft_id", "level", "index", "term", "committed", "version", "keys",
"sessions", "snapshot_index", "torn", "left_over"}, where kind is backup_of_cluster, backup_of_directory,
snapshot or directory.
The exit status is 0 if it is whole, 1 if it is damaged, 3 if it cannot be read: for there is none,
or a node uses it, or another version of the program has written it.`,
			timeout: fileTimeout,
			saysNo:  true,
			offline: true,
			run:     (*client).verify,
		},
		"certs": {
			args:    []argument{directoryArgument},
			summary: "make certificates for a trial cluster, offline",
			details: `The first time, DIR gets a CA, ca.pem and ca.key, and certificates with their keys for
an admin, a client and a reader. Each time, it gets those that are asked for. Nothing is
overwritten. With -o json, the answer is {"files": [PATH, ...]}.
Whoever has ca.key can be anybody: keep it away from the nodes.`,
			timeout:      callTimeout,
			mayBeUnknown: true,
			offline:      true,
			flags:        (*invocation).certsFlags,
			check:        (*invocation).checkCertsFlags,
			run:          (*client).makeCerts,
		},
		"completion": {
			args:     []argument{shellArgument, wordArgument},
			optional: true,
			repeated: true,
			summary:  "print a script with which a shell completes commands, flags and files",
			details: `In ~/.bashrc: source <(raft-key-value completion bash)
In ~/.zshrc, behind compinit: source <(raft-key-value completion zsh)
The script asks by completion words -- WORD ... what may stand in place of the last word.`,
			timeout:   callTimeout,
			isInstant: true,
			offline:   true,
			check:     (*invocation).checkCompletion,
			run:       (*client).completion,
		},
		"version": {
			summary:   "print the version",
			timeout:   callTimeout,
			isInstant: true,
			offline:   true,
			run:       (*client).version,
		},
		"help": {
			args:      []argument{commandArgument},
			optional:  true,
			summary:   "explain a command",
			timeout:   callTimeout,
			isInstant: true,
			offline:   true,
			run:       (*client).help,
		},
	}
}

func isCommand(name string) bool { return commands()[name] != nil }

// usage names the arguments.
func (cmd *command) usage() string {
	var words []string
	for _, a := range cmd.args {
		words = append(words, a.String())
	}
	last := len(words) - 1
	switch {
	case cmd.optional && cmd.repeated:
		words[last] = "[" + words[last] + " ...]"
	case cmd.optional:
		words[last] = "[" + words[last] + "]"
	case cmd.repeated:
		words = append(words, "["+words[last]+" ...]")
	}
	return strings.Join(words, " ")
}
