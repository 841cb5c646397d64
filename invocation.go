// One run of a sub-command as it was typed: its flags and arguments, found among a
// process's arguments, parsed and checked.

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
	"unicode/utf8"

	"raft-key-value/kvpb"
)

// argument is what an argument of a sub-command is. That tells how it is checked.
type argument int

const (
	keyArgument argument = iota
	valueArgument
	prefixArgument
	fileArgument
	idArgument
	memberArgument
	commandArgument
)

// String is the argument's name in the help text.
func (a argument) String() string {
	return [...]string{"KEY", "VALUE", "PREFIX", "FILE", "ID", "ID=ADDR", "COMMAND"}[a]
}

// findCommand finds the sub-command among a process's arguments and puts it
// first: flags that all sub-commands have may stand before it. It returns nil if
// the arguments are none of a sub-command.
func findCommand(args []string) []string {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, name := range []string{"endpoints", "o", "timeout"} {
		fs.String(name, "", "")
	}
	if fs.Parse(args) != nil || !isCommand(fs.Arg(0)) || slices.Contains(args[:len(args)-fs.NArg()], "--") {
		return nil
	}
	found := []string{fs.Arg(0)}
	fs.Visit(func(f *flag.Flag) {
		if f.Name == "endpoints" && commands()[found[0]].offline {
			return // an alias may have it before every sub-command
		}
		found = append(found, "-"+f.Name+"="+f.Value.String())
	})
	return append(found, fs.Args()[1:]...)
}

// parse sets c's fields by the flags and arguments, or prints the help text.
func (c *client) parse(name string, args []string) error {
	cmd, fs := commands()[name], flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&c.output, "o", "text", "`FORMAT` of the output: text or json")
	c.timeout = cmd.timeout
	durationVar(fs, &c.timeout, "timeout", "`DURATION` until the command gives up")
	variable := os.Getenv(endpointVariable)
	endpoints := cmp.Or(variable, oneOf(name == "init", "", defaultEndpoint))
	if !cmd.offline {
		fs.StringVar(&endpoints, "endpoints", endpoints,
			"the nodes to call, `HOST:PORT,...`, in this order; or environment "+endpointVariable)
	}
	if cmd.flags != nil {
		cmd.flags(c, fs)
	}
	var rest []string
	if i := slices.Index(args, "--"); i >= 0 {
		args, rest = args[:i], args[i+1:]
	}
	given, err := parseFlags(fs, args)
	if errors.Is(err, flag.ErrHelp) {
		words := strings.TrimSpace(name + " [FLAGS] " + cmd.usage())
		fmt.Fprintf(c.stdout, "Usage: raft-key-value %s\n\nTo %s\n\n%s", words, cmd.help, helpNotes)
		fs.SetOutput(c.stdout)
		fs.PrintDefaults()
	}
	if err != nil {
		return err
	}
	if c.output != "text" && c.output != "json" {
		return fmt.Errorf("-o %q: want text or json", c.output)
	}
	if c.timeout <= 0 {
		return fmt.Errorf("--timeout %v: want more than 0", c.timeout)
	}
	if err := c.takeArguments(cmd, append(given, rest...)); err != nil {
		return err
	}
	if endpoints == "" && name == "init" {
		endpoints = c.nodes[0].Address
	}
	if !cmd.offline {
		if c.endpoints, err = splitEndpoints(endpoints); err != nil {
			return fmt.Errorf("%s: %w", oneOf(endpoints == variable, endpointVariable, "--endpoints"), err)
		}
	}
	if cmd.check != nil {
		return cmd.check(c)
	}
	return nil
}

// parseFlags sets flags, and returns what lies between them: the arguments. It
// goes on after an error, so that an -o behind it tells how to print it.
func parseFlags(fs *flag.FlagSet, args []string) (given []string, first error) {
	for len(args) > 0 {
		err := fs.Parse(args) // It stops at the first argument.
		if errors.Is(err, flag.ErrHelp) {
			return nil, cmp.Or(first, err)
		}
		if err != nil && strings.HasPrefix(err.Error(), "flag provided") {
			err = fmt.Errorf("%w; an argument that starts with - goes behind --", err)
		}
		first = cmp.Or(first, err)
		left := fs.Args()
		switch {
		case err == nil && len(left) > 0:
			given, left = append(given, left[0]), left[1:]
		case len(left) == len(args): // it has not even taken the flag
			left = left[1:]
		}
		args = left
	}
	return given, first
}

// takeArguments checks the arguments and sets c's fields by them.
func (c *client) takeArguments(cmd *command, args []string) error {
	least, most := len(cmd.args), len(cmd.args)
	if cmd.optional {
		least--
	}
	if cmd.repeated {
		most = maxMembers // only members are given in any number
	}
	if len(args) < least || len(args) > most {
		return fmt.Errorf("wrong number of arguments: %d; want: %s", len(args), cmp.Or(cmd.usage(), "none"))
	}
	for i, arg := range args {
		if err := c.takeArgument(cmd.args[min(i, len(cmd.args)-1)], arg); err != nil {
			return err
		}
	}
	return nil
}

func (c *client) takeArgument(kind argument, arg string) error {
	switch kind {
	case keyArgument, prefixArgument:
		if kind == keyArgument && arg == "" || !utf8.ValidString(arg) {
			return fmt.Errorf("%v %q: want UTF-8%s", kind, arg, oneOf(kind == keyArgument, ", and not nothing", ""))
		}
		if len(arg) > maxKeyBytes {
			return fmt.Errorf("%v: it has %d bytes, the limit is %d", kind, len(arg), maxKeyBytes)
		}
	case valueArgument:
		if len(arg) > maxValueBytes {
			return fmt.Errorf("%v: it has %d bytes, the limit is %d", kind, len(arg), maxValueBytes)
		}
	case fileArgument:
		if arg == "" || arg == "-" {
			return fmt.Errorf("%v %q: want the name of a file, not stdin or stdout", kind, arg)
		}
	case idArgument, memberArgument:
		if err := c.takeMember(kind, arg); err != nil {
			return err
		}
	case commandArgument:
		if !isCommand(arg) {
			return fmt.Errorf("unknown command: %q", arg)
		}
	}
	c.args = append(c.args, arg)
	return nil
}

func (c *client) takeMember(kind argument, arg string) error {
	number, address, hasAddress := strings.Cut(arg, "=")
	id, err := strconv.ParseUint(number, 10, 64)
	if err != nil || id == 0 || hasAddress != (kind == memberArgument) {
		return fmt.Errorf("%q: want %v, an ID being a positive number", arg, kind)
	}
	if slices.Contains(c.ids, id) {
		return fmt.Errorf("%q: the id %d stands there twice", arg, id)
	}
	if hasAddress {
		if err := checkMemberAddress(address); err != nil {
			return err
		}
	}
	c.ids = append(c.ids, id)
	c.nodes = append(c.nodes, &kvpb.Node{Id: id, Address: address})
	return nil
}

func (c *client) localFlag(fs *flag.FlagSet) {
	fs.BoolVar(&c.local, "local", false, "read what the called node has; it may be old")
}

func (c *client) versionFlag(fs *flag.FlagSet, usage string) {
	fs.Func("if-version", usage, func(s string) error {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return errors.New("want a version as list prints it, or 0") // err is of strconv
		}
		c.ifVersion = &n
		return nil
	})
}
