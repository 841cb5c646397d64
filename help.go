// The help of the command line.

package main

import (
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
)

const usage = `raft-key-value runs a node of a replicated key-value store, or a sub-command.

A node (raft-key-value --help lists all flags):
  raft-key-value --id N --addr HOST:PORT [--data-dir DIRECTORY]

Sub-commands (raft-key-value help COMMAND tells more):
%s`

// notes are the lines of a command's help that others have, too: those that fit it.
func (cmd *command) notes() string {
	var b strings.Builder
	b.WriteString("Flags stand before or after the arguments; what follows -- is an argument. ")
	switch {
	case cmd.isInstant:
		b.WriteString("-o may stand before the\ncommand, too.\n")
	case cmd.offline:
		b.WriteString("--timeout and -o\nmay stand before the command, too.\n")
	default:
		b.WriteString("--endpoints, --timeout and\n-o may stand before the command, too. " +
			"The files for TLS may also be named by environment variables:\n")
		fmt.Fprintf(&b, "%s, %s and %s.\n", variableOf("cert-file"), variableOf("key-file"), variableOf("trusted-ca-file"))
	}
	switch cmd.asks {
	case asksOne:
		b.WriteString(passedOverNote + " So is one that is in no cluster.\n")
	case asksFounder:
		b.WriteString(passedOverNote + "\n")
	case asksUntilTimeout:
		b.WriteString(passedOverNote + " So is one that is in no cluster.\n" +
			"It is tried until the timeout, if that can do no harm")
		if cmd.readsLocally {
			b.WriteString("; a local read once at each endpoint")
		}
		b.WriteString(".\n")
	}
	b.WriteString(cmd.jsonNote())
	b.WriteString(cmd.statusNote())
	return b.String()
}

const passedOverNote = `An endpoint is passed over if it does not answer in 2 s, or in half of the timeout if
that is less.`

// jsonNote says what the command prints with -o json.
func (cmd *command) jsonNote() string {
	if cmd.isInstant {
		return ""
	}
	if cmd.asks == asksNobody {
		return `With -o json, stderr has JSON, too, a line each: {"warning"}, or {"error", "status", "reason", "endpoints"}, where
status is the exit status, and the last two are empty.
`
	}
	return `With -o json, messages are as kv.proto has them, 64-bit numbers as strings, values in base64; stderr has
JSON, too, a line each: {"warning"}, or {"error", "status", "reason", "endpoints": [{"endpoint", "error", "code",
"reason"}]}, where status is the exit status and a reason an ErrorReason of kv.proto.
`
}

// statusNote says which exit statuses the command has.
func (cmd *command) statusNote() string {
	if cmd.isInstant {
		return "The exit status is 0, or 2 for a usage error.\n"
	}
	yes := "done"
	if cmd.saysNo {
		yes = "yes or done, 1 for no"
	}
	notDone := "if it was not done or no node could answer"
	if cmd.offline {
		notDone = "if it was not done"
	}
	if !cmd.mayBeUnknown {
		return fmt.Sprintf("The exit status is 0 for %s, 2 for a usage error, and 3 %s.\n", yes, notDone)
	}
	return fmt.Sprintf("The exit status is 0 for %s, 2 for a usage error, 3 %s,\n"+
		"and 4 if it is not known whether it was done, or its result could not be printed.\n", yes, notDone)
}

// commandList is a line for each sub-command.
func commandList() string {
	all := commands()
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&b, "  %-18s %s\n", name, all[name].summary)
	}
	return b.String()
}

// commandHelp is the help of one sub-command.
func commandHelp(name string) string {
	in := &invocation{name: name, command: commands()[name]}
	line := strings.TrimSpace(name + " [FLAGS] " + in.command.usage())
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: raft-key-value %s\n\nTo %s\n", line, in.command.summary)
	if in.command.details != "" {
		fmt.Fprintln(&b, in.command.details)
	}
	fmt.Fprint(&b, "\n", in.command.notes())
	fs := in.shownFlags()
	fs.SetOutput(&b)
	fs.PrintDefaults()
	return b.String()
}

// shownFlags are the flags of which the help tells: a command that is done at once takes --timeout,
// so that an alias may have it, and does nothing with it.
func (in *invocation) shownFlags() *flag.FlagSet {
	all := in.flagSet()
	if !in.command.isInstant {
		return all
	}
	shown := flag.NewFlagSet(in.name, flag.ContinueOnError)
	all.VisitAll(func(f *flag.Flag) {
		if f.Name != "timeout" {
			shown.Var(f.Value, f.Name, f.Usage)
		}
	})
	return shown
}
