// One run of a sub-command as it was typed: the sub-command is found among a
// process's arguments, and its flags and arguments are parsed and checked.

package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// invocation is one run of a sub-command: what its flags and arguments say.
type invocation struct {
	name    string
	command *command

	output       string // text or json
	timeout      time.Duration
	endpointList string   // the flag; empty: it is not given
	endpoints    []string // addresses to call; nil: the sub-command calls no node
	tls          certificateFiles

	args  []string     // all arguments
	ids   []uint64     // of arguments ID and ID=ADDR
	nodes []*kvpb.Node // of arguments ID and ID=ADDR; the former have no address

	// Flags that only some sub-commands have:
	force        bool
	retain       bool
	removeOthers bool
	local        bool
	minVersion   uint64 // that a local read waits for; 0: none
	keysOnly     bool
	limit        uint64     // of keys to list; 0: all
	prefix       string     // of the keys of a range: a flag, or an argument
	start, end   string     // of a range; empty: the first key, and no end
	yes          bool       // do not ask
	ifVersion    *uint64    // nil: any version
	service      string     // the health name
	wait         bool       // for SERVING
	dataDir      string     // to be made by restore, or read by backup
	bareSnapshot bool       // restore takes a snapshot that is no backup
	node         *kvpb.Node // whose data directory restore makes
	certs        *certOrder
	watch        *watchOrder
}

// sharedFlags are the flags that may stand before the sub-command, too. An alias may
// have them before each: those that call no node ignore --endpoints there.
var sharedFlags = []string{"endpoints", "o", "timeout"}

// findCommand finds the sub-command among a process's arguments and puts it first,
// before the shared flags that stand before it. It returns nil if the arguments are
// those of a node, or of nothing.
func findCommand(args []string) ([]string, error) {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, name := range sharedFlags {
		fs.String(name, "", "")
	}
	for len(args) > 0 && isFlag(args[0]) {
		rest, err := takeFlag(fs, args)
		isSubCommand := fs.NFlag() > 0 // A node has none of the shared flags.
		unknown, isUnknown := errors.AsType[*unknownFlag](err)
		switch {
		case err == nil:
			args = rest
		case isSubCommand && errors.Is(err, flag.ErrHelp):
			return []string{"help"}, nil
		case isSubCommand && isUnknown && !isNodeFlag(unknown.name):
			return nil, fmt.Errorf("-%s stands before the sub-command; only -%s may",
				unknown.name, strings.Join(sharedFlags, ", -"))
		default:
			return nil, nil
		}
	}
	if len(args) == 0 || !isCommand(args[0]) {
		if len(args) > 0 && fs.NFlag() > 0 {
			return nil, fmt.Errorf("unknown sub-command %q", args[0])
		}
		return nil, nil
	}
	name := args[0]
	found := []string{name}
	fs.Visit(func(f *flag.Flag) {
		isIgnored := f.Name == "endpoints" && commands()[name].offline
		if !isIgnored {
			found = append(found, "-"+f.Name+"="+f.Value.String())
		}
	})
	return append(found, args[1:]...), nil
}

// parseInvocation parses what stands behind the name of a sub-command. It returns
// flag.ErrHelp if help is asked for. The invocation is never nil: its output says how
// the error is to be printed.
func parseInvocation(name string, args []string) (*invocation, error) {
	in := &invocation{name: name, command: commands()[name]}
	fs := in.flagSet()
	var behindDashes []string
	if i := slices.Index(args, "--"); i >= 0 {
		behindDashes = args[i+1:]
		args = args[:i]
	}
	given, err := parseFlags(fs, args)
	if err != nil {
		return in, err
	}
	if in.output != "text" && in.output != "json" {
		return in, fmt.Errorf("-o %q: want text or json", in.output)
	}
	if in.timeout <= 0 {
		return in, fmt.Errorf("--timeout %v: want more than 0", in.timeout)
	}
	if err := in.takeArguments(append(given, behindDashes...)); err != nil {
		return in, err
	}
	if err := in.chooseEndpoints(isGiven(fs, "endpoints")); err != nil {
		return in, err
	}
	if err := in.chooseCertificates(fs); err != nil {
		return in, err
	}
	if in.command.check == nil {
		return in, nil
	}
	return in, in.command.check(in)
}

// flagSet has the flags of the sub-command. They set the invocation's fields.
func (in *invocation) flagSet() *flag.FlagSet {
	fs := flag.NewFlagSet(in.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&in.output, "o", "text", "`FORMAT` of the output: text or json")
	in.timeout = in.command.timeout
	gives := "`DURATION` until the command gives up"
	if in.command.getsOn {
		gives = "`DURATION` without any progress until the command gives up"
	}
	durationVar(fs, &in.timeout, "timeout", gives)
	if !in.command.offline {
		last := defaultEndpoint
		if in.command.callsFirstMember {
			last = "the address of the first member"
		}
		fs.StringVar(&in.endpointList, "endpoints", "", fmt.Sprintf(
			"the nodes to call, `HOST:PORT,...`, in this order (default: environment %s, or else %s)",
			endpointVariable, last))
		certificateFlags(fs, &in.tls)
	}
	if in.command.flags != nil {
		in.command.flags(in, fs)
	}
	return fs
}

// readsValue reports whether set waits for its value on stdin. Its timeout begins once that is there:
// whoever writes it may take long.
func (in *invocation) readsValue() bool { return in.name == "set" && in.args[1] == "-" }

// callsNodes reports whether the sub-command calls nodes. What it needs for that is else ignored.
func (in *invocation) callsNodes() bool { return !in.command.offline && in.dataDir == "" }

// chooseEndpoints takes the endpoints from the flag, or else from the environment, or
// else the default.
func (in *invocation) chooseEndpoints(isFlagGiven bool) error {
	if !in.callsNodes() {
		return nil
	}
	list := in.endpointList
	source := "--endpoints"
	if !isFlagGiven {
		list = os.Getenv(endpointVariable)
		source = endpointVariable
	}
	if list == "" && !isFlagGiven {
		list = defaultEndpoint
		if in.command.callsFirstMember {
			list = in.nodes[0].Address
		}
	}
	endpoints, err := splitEndpoints(list)
	if err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	in.endpoints = endpoints
	return nil
}

// chooseCertificates takes the files for TLS that no flag has given from the environment.
func (in *invocation) chooseCertificates(fs *flag.FlagSet) error {
	if !in.callsNodes() {
		return nil
	}
	for _, name := range []string{"cert-file", "key-file", "trusted-ca-file"} {
		value, isSet := os.LookupEnv(variableOf(name))
		if !isSet || isGiven(fs, name) {
			continue
		}
		if err := fs.Set(name, value); err != nil {
			return fmt.Errorf("invalid value %q of %s: %w", value, variableOf(name), err)
		}
	}
	if in.tls.areGiven() && !in.tls.areAll() {
		return errors.New("TLS needs --cert-file, --key-file and --trusted-ca-file: give all three, or none")
	}
	return nil
}

// parseFlags sets flags, and returns what stands between them: the arguments. It goes
// on after an error and returns the first one, so that an -o behind it still says how
// to print it.
func parseFlags(fs *flag.FlagSet, args []string) (arguments []string, first error) {
	for len(args) > 0 {
		if !isFlag(args[0]) {
			arguments = append(arguments, args[0])
			args = args[1:]
			continue
		}
		rest, err := takeFlag(fs, args)
		if first == nil {
			first = err
		}
		if errors.Is(err, flag.ErrHelp) {
			return nil, first
		}
		args = rest
	}
	return arguments, first
}

// isNodeFlag reports whether a node has a flag of this name.
func isNodeFlag(name string) bool {
	o := defaultOptions()
	return nodeFlags(&o).Lookup(name) != nil
}

// unknownFlag is the error of a flag that a sub-command does not have.
type unknownFlag struct{ name string }

func (e *unknownFlag) Error() string {
	return fmt.Sprintf("flag provided but not defined: -%s; an argument that starts with - goes behind --", e.name)
}

// takeFlag sets the flag that args begin with, and returns what stands behind it and
// its value, also if it returns an error.
func takeFlag(fs *flag.FlagSet, args []string) (rest []string, err error) {
	name, _, hasValue := strings.Cut(strings.TrimPrefix(args[0][1:], "-"), "=")
	f := fs.Lookup(name)
	isHelp := name == "h" || name == "help"
	isMalformed := name == "" || name[0] == '-' // Parse says so.
	if f == nil && !isHelp && !isMalformed {
		return args[1:], &unknownFlag{name}
	}
	length := 1
	if f != nil && !hasValue && !isBoolean(f) {
		length = min(2, len(args)) // Parse misses a value that is not there.
	}
	return args[length:], fs.Parse(args[:length])
}

// isFlag reports whether an argument is written as a flag; - means stdin, and -- ends
// the flags.
func isFlag(arg string) bool {
	return strings.HasPrefix(arg, "-") && arg != "-" && arg != "--"
}

// isBoolean reports whether a flag needs no value. Package flag has its word for it.
func isBoolean(f *flag.Flag) bool {
	b, ok := f.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// isGiven reports whether a flag was set by an argument.
func isGiven(fs *flag.FlagSet, name string) bool {
	given := false
	fs.Visit(func(f *flag.Flag) { given = given || f.Name == name })
	return given
}

func (in *invocation) localFlags(fs *flag.FlagSet) {
	boolVar(fs, &in.local, "local", "read what the called node has; it may be old")
	numberVar(fs, &in.minVersion, "min-version", "with --local: wait until the called node has "+
		"the write of this `VERSION`, such as set -o json prints it")
}

func (in *invocation) checkLocalFlags() error {
	if in.minVersion > 0 && !in.local {
		return errors.New("--min-version: it is for --local; " +
			"other reads see every write that was acknowledged")
	}
	return nil
}

// boundFlags are the flags of a range that has no prefix.
func (in *invocation) boundFlags(fs *flag.FlagSet) {
	notEmptyVar(fs, &in.start, "start", "only keys from this `KEY` on")
	notEmptyVar(fs, &in.end, "end", "only keys before this `KEY`")
}

// notEmptyVar is a flag whose value is not empty: a script's variable that is not set must
// not widen a range.
func notEmptyVar(fs *flag.FlagSet, value *string, name, usage string) {
	fs.Func(name, usage, func(s string) error {
		if s == "" {
			return errors.New("it is empty; leave the flag out")
		}
		*value = s
		return nil
	})
}

// hasRange reports whether the flags or arguments name a range, but for that of all keys.
func (in *invocation) hasRange() bool { return in.prefix+in.start+in.end != "" }

// checkRange checks a range as nodes do.
func (in *invocation) checkRange() error {
	if err := checkRange(in.prefix, in.start, in.end); err != nil {
		return errors.New(status.Convert(err).Message())
	}
	return nil
}

func (in *invocation) checkListFlags() error {
	if err := in.checkLocalFlags(); err != nil {
		return err
	}
	return in.checkRange()
}

func (in *invocation) deleteFlags(fs *flag.FlagSet) {
	in.versionFlag(fs, "only if the key has this `VERSION`, not 0")
	notEmptyVar(fs, &in.prefix, "prefix", "remove all keys that start with `PREFIX`")
	in.boundFlags(fs)
	boolVar(fs, &in.yes, "yes", "do not ask before a range is removed")
}

func (in *invocation) checkDeleteFlags() error {
	hasKey := len(in.args) > 0
	if hasKey == in.hasRange() {
		return errors.New("want either a KEY, or --prefix, --start or --end")
	}
	if in.hasRange() && in.ifVersion != nil {
		return errors.New("--if-version: it is for a KEY")
	}
	if in.ifVersion != nil && *in.ifVersion == 0 {
		return errors.New("--if-version 0: no key has it; a key that is not there cannot be deleted")
	}
	return in.checkRange()
}

func (in *invocation) versionFlag(fs *flag.FlagSet, usage string) {
	fs.Func("if-version", usage, func(s string) error {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return errors.New("want a version as list prints it, or 0")
		}
		in.ifVersion = &n
		return nil
	})
}

func (in *invocation) backupFlags(fs *flag.FlagSet) {
	notEmptyVar(fs, &in.dataDir, "data-dir", "back up this `DIRECTORY` of a node that does not run, and call no node")
}

func (in *invocation) restoreFlags(fs *flag.FlagSet) {
	in.node = &kvpb.Node{}
	fs.StringVar(&in.dataDir, "data-dir", "", "`DIRECTORY` to make; it may be there, and empty")
	numberVar(fs, &in.node.Id, "id", "the node's `NUMBER`, not 0")
	fs.StringVar(&in.node.Address, "addr", "", "`HOST:PORT` at which others reach the node")
	boolVar(fs, &in.bareSnapshot, "bare-snapshot", "FILE is a snapshot out of a data directory whose log is lost, "+
		"and what was in that, too")
}

func (in *invocation) checkRestoreFlags() error {
	areGiven := in.dataDir != "" && in.node.Id != 0 && in.node.Address != ""
	if !areGiven {
		return errors.New("--data-dir, --id and --addr are needed")
	}
	if err := checkMemberAddress(in.node.Address); err != nil {
		return fmt.Errorf("--addr %w", err)
	}
	return nil
}

// argument is what an argument of a sub-command is. That says how it is checked.
type argument int

const (
	keyArgument argument = iota
	valueArgument
	prefixArgument
	fileArgument // - is stdin, or stdout
	savedArgument
	directoryArgument
	idArgument
	memberArgument
	commandArgument
	shellArgument
	wordArgument
)

// String is the argument's name in the help text.
func (a argument) String() string {
	return [...]string{"KEY", "VALUE", "PREFIX", "FILE", "FILE|DIR", "DIR", "ID", "ID=ADDR", "COMMAND", "bash|zsh", "WORD"}[a]
}

// maxArguments bounds what is given in any number: members of a cluster, and words to be completed.
const maxArguments = maxMembers

// takeArguments checks the arguments and sets the invocation's fields by them.
func (in *invocation) takeArguments(args []string) error {
	cmd := in.command
	least := len(cmd.args)
	most := len(cmd.args)
	if cmd.optional {
		least--
	}
	if cmd.repeated {
		most = maxArguments
	}
	if len(args) < least || len(args) > most {
		return fmt.Errorf("wrong number of arguments: %d; want: %s", len(args), cmp.Or(cmd.usage(), "none"))
	}
	for i, arg := range args {
		kind := cmd.args[min(i, len(cmd.args)-1)]
		if err := in.takeArgument(kind, arg); err != nil {
			return err
		}
	}
	return nil
}

func (in *invocation) takeArgument(kind argument, arg string) error {
	var err error
	switch kind {
	case keyArgument:
		err = checkKeyArgument(kind, arg)
	case prefixArgument:
		err = checkKeyArgument(kind, arg)
		in.prefix = arg
	case valueArgument:
		err = checkLength(kind, arg, maxValueBytes)
	case fileArgument, savedArgument, directoryArgument:
		if arg == "" {
			err = fmt.Errorf("%v: it is empty", kind)
		}
	case idArgument, memberArgument:
		err = in.takeMember(kind, arg)
	case commandArgument:
		if !isCommand(arg) {
			err = fmt.Errorf("unknown command: %q", arg)
		}
	}
	if err != nil {
		return err
	}
	in.args = append(in.args, arg)
	return nil
}

// checkKeyArgument checks a key, or a prefix of keys, which may be empty.
func checkKeyArgument(kind argument, arg string) error {
	if kind == keyArgument && arg == "" {
		return fmt.Errorf("%v: it is empty", kind)
	}
	if !utf8.ValidString(arg) {
		return fmt.Errorf("%v %q: want UTF-8", kind, arg)
	}
	return checkLength(kind, arg, maxKeyBytes)
}

func checkLength(kind argument, arg string, limit int) error {
	if len(arg) > limit {
		return fmt.Errorf("%v: it has %d bytes, the limit is %d", kind, len(arg), limit)
	}
	return nil
}

// takeMember checks an argument ID or ID=ADDR and adds it to ids and nodes.
func (in *invocation) takeMember(kind argument, arg string) error {
	number, address, hasAddress := strings.Cut(arg, "=")
	wantsAddress := kind == memberArgument
	id, err := strconv.ParseUint(number, 10, 64)
	if err != nil || id == 0 || hasAddress != wantsAddress {
		return fmt.Errorf("%q: want %v, an ID being a positive number", arg, kind)
	}
	if slices.Contains(in.ids, id) {
		return fmt.Errorf("%q: the id %d stands there twice", arg, id)
	}
	if hasAddress {
		if err := checkMemberAddress(address); err != nil {
			return err
		}
	}
	in.ids = append(in.ids, id)
	in.nodes = append(in.nodes, &kvpb.Node{Id: id, Address: address})
	return nil
}
