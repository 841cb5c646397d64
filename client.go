// The command line's client half: what the sub-commands do, and how their
// results and errors are printed.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// client is one run of a sub-command: its flags and arguments. It is what the
// stubs of its calls take for a connection, by Invoke; no stream goes that way.
type client struct {
	grpc.ClientConnInterface
	stdin           io.Reader
	stdout, stderr  io.Writer
	output, service string
	retain, wait    bool
	removeOthers    bool
	force           bool
	local, keysOnly bool   // local: no other node can answer for the called one
	limit           uint64 // of keys to list
	timeout         time.Duration
	endpoints, args []string
	ids             []uint64     // of arguments ID and ID=ADDR
	nodes           []*kvpb.Node // of arguments ID=ADDR
	ifVersion       *uint64
	dataDir         string
	node            *kvpb.Node // whose directory is to be made

	clusterID uint64 // of the nodes that are called; 0: none was found yet
	changed   bool   // what the command is to change is changed
}

// commandError says why the exit status of a sub-command is not 0. With -o json,
// it is what is printed.
type commandError struct {
	Text      string  `json:"error"`
	Status    int     `json:"status"` // of the process
	Reason    string  `json:"reason"` // the last one that a node gave; empty: there is none
	Endpoints []reply `json:"endpoints"`
}

func (e *commandError) Error() string { return e.Text }

// say is the same error with other words.
func (e *commandError) say(text string) *commandError {
	return &commandError{text, e.Status, e.Reason, e.Endpoints}
}

// noError is an answer that is "no".
func noError(format string, args ...any) error {
	return &commandError{Text: fmt.Sprintf(format, args...), Status: exitNo}
}

func usageError(format string, args ...any) error {
	return &commandError{Text: fmt.Sprintf(format, args...), Status: exitUsage}
}

// runClient runs the sub-command args[0] and returns the exit status.
func runClient(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &client{stdin: stdin, stdout: stdout, stderr: stderr}
	err := c.parse(args[0], args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return exitYes
	}
	if err != nil {
		return c.fail(args[0], usageError("%v", err))
	}
	for _, name := range unknownVariables(os.Environ()) {
		c.warn("no flag has the environment variable " + name)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err = commands()[args[0]].run(c, ctx)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return exitYes
	}
	return c.fail(args[0], err)
}

// fail prints an error, as one line, and returns the exit status.
func (c *client) fail(name string, err error) int {
	e := &commandError{Text: err.Error(), Status: exitNotDone}
	if known, ok := errors.AsType[*commandError](err); ok {
		e = known.say(err.Error())
	}
	if e.Status == exitUsage {
		e.Text += "; see raft-key-value help " + name
	}
	if e.Endpoints == nil {
		e.Endpoints = []reply{} // as JSON, a list
	}
	e.Text = strings.Join(strings.Fields(e.Text), " ")
	if c.output == "json" {
		_ = encodeJSON(c.stderr, e)
	} else {
		fmt.Fprintf(c.stderr, "raft-key-value: %s: %s\n", name, e.Text)
	}
	return e.Status
}

// warn says on stderr what does not change the exit status.
func (c *client) warn(text string) {
	if c.output == "json" {
		_ = encodeJSON(c.stderr, map[string]string{"warning": text})
		return
	}
	fmt.Fprintf(c.stderr, "raft-key-value: warning: %s\n", text)
}

// progress tells people how far something is.
func (c *client) progress(format string, args ...any) {
	if c.output != "json" {
		fmt.Fprintf(c.stderr, format+"\n", args...)
	}
}

func (c *client) keysDone(keys, all uint64) { c.progress("%d of %d keys", keys, all) }

// encodeJSON writes a value as a line.
func encodeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
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

// protoJSON is a message as encoding/json is to write it.
type protoJSON struct{ proto.Message }

func (p protoJSON) MarshalJSON() ([]byte, error) {
	return protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(p.Message)
}

// print prints a result as JSON, or the text that says the same.
func (c *client) print(v any, text string) error {
	var err error
	if c.output == "json" {
		err = json.NewEncoder(c.stdout).Encode(v)
	} else {
		_, err = io.WriteString(c.stdout, text)
	}
	if err != nil && c.changed {
		return &commandError{Text: "it is done, but its result could not be printed: " + err.Error(), Status: exitUnknown}
	}
	return err
}

// show prints the result of a call that has not failed.
func (c *client) show(resp proto.Message, err error, text string) error {
	if err != nil {
		return err
	}
	return c.print(protoJSON{resp}, text)
}

func (c *client) kv() kvpb.KVServiceClient           { return kvpb.NewKVServiceClient(c) }
func (c *client) cluster() kvpb.ClusterServiceClient { return kvpb.NewClusterServiceClient(c) }
