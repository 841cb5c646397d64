// The help of the command line.

package main

import (
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

const helpNotes = `Flags stand before or after the arguments; what follows -- is an argument. --endpoints, --timeout and
-o may stand before the command, too.
An endpoint is passed over if it does not answer in 2 s, or in half of the timeout if
that is less. So is one that is in no cluster, but not by init.
What reads or writes keys is tried until the timeout, if that can do no harm; a local read once at each endpoint.
With -o json, an answer is as kv.proto has it, 64-bit numbers as strings, values in base64. What is printed to
stderr is JSON, too, a line each: {"warning"}, or {"error", "status", "reason", "endpoints": [{"endpoint",
"error", "code", "reason"}]}, where status is the exit status and a reason an ErrorReason of kv.proto.
The exit status is 0 for yes or done, 1 for no, 2 for a usage error, 3 if it was not done or no node could
answer, and 4 if it is not known whether it was done.
`

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
	fmt.Fprint(&b, "\n", helpNotes)
	fs := in.flagSet()
	fs.SetOutput(&b)
	fs.PrintDefaults()
	return b.String()
}
