// Growth varies one thing at a time, nodes, values, clients, keys, and prints
// how fast sets and linearizable gets are at each, in memory, beside bare RPC.
//
//	cd bench && go run ./growth
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/load"
)

// options are the program's settings. A list that is empty leaves its table out.
type options struct {
	nodes, values, clients []int
	keys                   []uint64
	rounds                 int
	duration, warmup       time.Duration
	program                cluster.Program
}

func main() { os.Exit(load.Main("growth", load.Execute(parseOptions, run))) }

// parseOptions reads the settings.
func parseOptions(args []string, stderr io.Writer) (options, error) {
	o := options{}
	fs := load.NewFlags("growth", "measures how raft-key-value does as things grow.", stderr)
	nodes := fs.String("nodes", "1,3,5,7", "sizes of the cluster; `n,...`, as in all lists; empty: no such table")
	values := fs.String("values", "16,128,1024,16384,131072,1048576", "bytes of a value")
	clients := fs.String("clients", "1,4,16,64,256,1000", "how many at once")
	keys := fs.String("keys", "1000,10000,100000,1000000,10000000", "keys to choose from")
	fs.IntVar(&o.rounds, "rounds", 5, "rounds of all points of a table in turn; medians count")
	fs.DurationVar(&o.duration, "duration", 800*time.Millisecond, "time of each measurement in each round")
	fs.DurationVar(&o.warmup, "warmup", 200*time.Millisecond, "time before each measurement that does not count")
	o.program.Flags(fs)
	if err := load.ParseQuick(fs, args, "nodes", "1,3", "values", "128,1048576", "clients", "1,64", "keys", "1000,1000000",
		"rounds", "2", "duration", "100ms", "warmup", "20ms"); err != nil {
		return o, err
	}
	var errs [4]error
	o.nodes, errs[0] = parseInts("nodes", *nodes)
	o.values, errs[1] = parseInts("values", *values)
	o.clients, errs[2] = parseInts("clients", *clients)
	var k []int
	if k, errs[3] = parseInts("keys", *keys); errs[3] == nil {
		for _, n := range k {
			o.keys = append(o.keys, uint64(n))
		}
	}
	return o, errors.Join(append(errs[:], o.check())...)
}

// parseInts parses a list; that of "" is empty.
func parseInts(name, s string) ([]int, error) {
	if s == "" {
		return nil, nil
	}
	n, err := load.ParseList(s, strconv.Atoi)
	if err != nil {
		err = fmt.Errorf("--%s: %w", name, err)
	}
	return n, err
}

func (o *options) check() error {
	if o.rounds < 1 || o.duration < 10*time.Millisecond || o.warmup < 0 {
		return errors.New("--rounds has to be 1 or more, --duration 10ms or more, --warmup not negative")
	}
	for _, n := range o.nodes {
		if n < 1 || n > 31 {
			return fmt.Errorf("--nodes %d is not between 1 and 31", n)
		}
	}
	for _, v := range o.values {
		if v < 0 || v > 1<<20 {
			return fmt.Errorf("--values %d is not between 0 and 1048576", v)
		}
	}
	for _, k := range o.keys {
		if k < 1 || k > 1e9 {
			return fmt.Errorf("--keys %d is not between 1 and 1000000000", k)
		}
	}
	return load.CheckClients(o.clients)
}

// run measures all tables and prints each once it is there.
func run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	return o.program.In(ctx, "growth", func(dir, binary string) error {
		echo, err := load.StartEcho(base.value, load.Identity{})
		if err != nil {
			return err
		}
		pingPong, err := echo.PingPong()
		echo.Stop()
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "%s\n%s", load.ThisMachine(pingPong), o.explain())
		for i, t := range o.tables() {
			s := stage{options: o, dir: fmt.Sprintf("%s/%d", dir, i), binary: binary, stderr: stderr}
			if err := s.measure(ctx, t); err != nil {
				return err
			}
			t.write(stdout)
		}
		return nil
	})
}
