// Memory says what keys, idle connections, and clients that never read cost a
// node in memory, and what keys cost a member of etcd.
//
//	cd bench && go run ./memory
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
)

// options are the program's settings.
type options struct {
	sizes       load.Sizes
	connections int
	pause       time.Duration
	etcd        bool
	program     cluster.Program
}

func main() { os.Exit(load.Main("memory", execute)) }

func execute(ctx context.Context, args []string) error {
	if served, err := etcd.Serve(args); served {
		return err
	}
	return load.Execute(parseOptions, run)(ctx, args)
}

// parseOptions reads the settings.
func parseOptions(args []string, stderr io.Writer) (options, error) {
	o := options{}
	fs := load.NewFlags("memory", "measures what raft-key-value takes of it.", stderr)
	load.SizeFlags(fs, &o.sizes, 1_000_000)
	fs.IntVar(&o.connections, "connections", 2000, "connections that do nothing")
	fs.DurationVar(&o.pause, "pause", 5*time.Second, "time before each look at a process, for it to come to rest")
	fs.BoolVar(&o.etcd, "etcd", true, "measure etcd, too")
	o.program.Flags(fs)
	if err := load.ParseQuick(fs, args, "keys", "20000", "connections", "500", "pause", "200ms"); err != nil {
		return o, err
	}
	switch {
	case o.connections < 1 || o.connections > 16<<10:
		return o, fmt.Errorf("--connections %d is not between 1 and 16384, which is what a node takes", o.connections)
	case o.pause < 0:
		return o, errors.New("--pause is negative")
	}
	return o, o.sizes.Check()
}

// run measures and reports.
func run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	// Collections of the processes that are started are logged: that says what
	// of their heaps is in use. This one has read it already.
	if err := os.Setenv("GODEBUG", "gctrace=1"); err != nil {
		return err
	}
	return o.program.In(ctx, "memory", func(dir, binary string) error {
		m := &memory{options: o, dir: dir, binary: binary, stdout: stdout, stderr: stderr}
		return errors.Join(m.keys(ctx), m.clients(ctx))
	})
}
