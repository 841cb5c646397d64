// The command line's client half: how a sub-command is run, and how its results and
// errors are printed.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// client is one run of a sub-command.
type client struct {
	*invocation
	calls     *apiCaller
	stdin     io.Reader
	stdout    io.Writer
	stderr    io.Writer
	madeFiles bool // all that the sub-command is to make is there
	showsLine bool // the last line on stderr shows progress, and has no end
}

func newClient(in *invocation, stdin io.Reader, stdout, stderr io.Writer) *client {
	calls := &apiCaller{
		endpoints:   in.endpoints,
		connections: newConnectionPool(),
		timeout:     in.timeout,
		local:       in.local,
	}
	return &client{invocation: in, calls: calls, stdin: stdin, stdout: stdout, stderr: stderr}
}

// runClient runs the sub-command args[0] and returns the exit status.
func runClient(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	in, err := parseInvocation(args[0], args[1:])
	c := newClient(in, stdin, stdout, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return c.exit(c.printHelp(in.name))
	}
	for _, name := range unknownVariables(os.Environ()) { // it may be why there is an error
		c.warn("no flag has the environment variable " + name)
	}
	if err != nil {
		return c.exit(usageError("%v", err))
	}
	if in.callsNodes() && in.tls.areGiven() {
		quiet := slog.New(slog.DiscardHandler)
		c.calls.certificates, err = openCertificates(in.tls, 0, quiet)
		if err != nil {
			return c.exit(usageError("%v", err))
		}
	}
	defer c.calls.connections.close()
	if in.command.getsOn || in.readsValue() {
		return c.exit(in.command.run(c, ctx))
	}
	ctx, cancel := context.WithTimeout(ctx, in.timeout)
	defer cancel()
	return c.exit(in.command.run(c, ctx))
}

// exit returns the exit status, and prints the error, if there is one, as a line.
func (c *client) exit(err error) int {
	if err == nil {
		return exitYes
	}
	c.endLine()
	e := &commandError{Status: exitNotDone}
	if known, ok := errors.AsType[*commandError](err); ok {
		e = known
	}
	e = e.withText(err.Error())
	if e.Status == exitUsage {
		e.Text += "; see raft-key-value help " + c.name
	}
	if e.Endpoints == nil {
		e.Endpoints = []reply{} // In JSON it is a list, not null.
	}
	e.Text = strings.Join(strings.Fields(e.Text), " ") // without line breaks
	if c.output == "json" {
		_ = encodeJSON(c.stderr, e)
	} else {
		fmt.Fprintf(c.stderr, "raft-key-value: %s: %s\n", c.name, e.Text)
	}
	return e.Status
}

// commandError says why the exit status of a sub-command is not 0. With -o json,
// it is what is printed.
type commandError struct {
	Text      string  `json:"error"`
	Status    int     `json:"status"` // of the process
	Reason    string  `json:"reason"` // of a node, an ErrorReason without its prefix; empty: there is none
	Endpoints []reply `json:"endpoints"`
}

func (e *commandError) Error() string { return e.Text }

// withText returns the same error with another text.
func (e *commandError) withText(text string) *commandError {
	other := *e
	other.Text = text
	return &other
}

// noError is the error of a question whose answer is "no".
func noError(format string, args ...any) error {
	return &commandError{Text: fmt.Sprintf(format, args...), Status: exitNo}
}

func usageError(format string, args ...any) error {
	return &commandError{Text: fmt.Sprintf(format, args...), Status: exitUsage}
}

// warn prints to stderr what does not change the exit status.
func (c *client) warn(text string) {
	c.endLine()
	if c.output == "json" {
		_ = encodeJSON(c.stderr, map[string]string{"warning": text})
		return
	}
	fmt.Fprintf(c.stderr, "raft-key-value: warning: %s\n", text)
}

// progress tells people, but no programs, how far the sub-command has got.
func (c *client) progress(format string, args ...any) {
	if c.output != "json" {
		fmt.Fprintf(c.stderr, format+"\n", args...)
	}
}

// print prints a result as JSON, or the text that says the same.
func (c *client) print(v any, text string) error {
	c.endLine()
	var err error
	if c.output == "json" {
		err = json.NewEncoder(c.stdout).Encode(v)
	} else {
		_, err = io.WriteString(c.stdout, text)
	}
	if err != nil && (c.madeFiles || c.calls.changed) {
		return &commandError{
			Text:   "it is done, but its result could not be printed: " + err.Error(),
			Status: exitUnknown,
		}
	}
	return err
}

// printResponse prints the response of a call that has not failed, and passes on the
// error of one that has.
func (c *client) printResponse(resp proto.Message, err error, text string) error {
	if err != nil {
		return err
	}
	return c.print(protoJSON{resp}, text)
}

// protoJSON is a message as encoding/json is to write it.
type protoJSON struct{ proto.Message }

func (p protoJSON) MarshalJSON() ([]byte, error) {
	return protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(p.Message)
}

// encodeJSON writes a value as a line.
func encodeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func (c *client) kv() kvpb.KVServiceClient           { return kvpb.NewKVServiceClient(c.calls) }
func (c *client) cluster() kvpb.ClusterServiceClient { return kvpb.NewClusterServiceClient(c.calls) }

func (c *client) help(context.Context) error {
	if len(c.args) == 1 {
		return c.printHelp(c.args[0])
	}
	return c.print(commandList(), fmt.Sprintf(usage, commandList()))
}

// printHelp prints the help of a sub-command, as text also with -o json.
func (c *client) printHelp(name string) error {
	_, err := io.WriteString(c.stdout, commandHelp(name))
	return err
}

func (c *client) version(context.Context) error {
	return c.print(map[string]string{"version": buildVersion()}, "raft-key-value "+buildVersion()+"\n")
}

// buildVersion is the module's version, which has the commit of an untagged build.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
