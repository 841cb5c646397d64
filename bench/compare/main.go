// Compare runs the same load against bare RPC, this store and etcd, in memory
// and on disk, in turn on this machine, and prints what share of bare RPC each
// reaches.
//
//	cd bench && go run ./compare
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
)

// options are the program's settings.
type options struct {
	clients  []int
	rounds   int
	duration time.Duration
	warmup   time.Duration
	sizes    load.Sizes
	depth    int
	sessions bool
	etcd     bool
	durable  bool
	pipeline bool
	secure   bool
	ranges   bool // in place of all that follows from the flags above
	page     int
	watches  bool // the same
	watching watchOptions
	program  cluster.Program
	output   string
	plot     string
}

func main() { os.Exit(load.Main("compare", execute)) }

func execute(ctx context.Context, args []string) error {
	if served, err := etcd.Serve(args); served {
		return err
	}
	return load.Execute(parseOptions, run)(ctx, args)
}

// parseOptions reads the settings.
func parseOptions(args []string, stderr io.Writer) (options, error) {
	o := options{}
	fs := load.NewFlags("compare", "measures raft-key-value beside etcd and bare RPC.", stderr)
	clients := fs.String("clients", "1,64,256,1000", "how many at once; `n,...`. With --ranges 1,16, and with --watches 64 that write, if this says nothing else")
	fs.IntVar(&o.rounds, "rounds", 5, "rounds of all systems in turn; medians count")
	fs.DurationVar(&o.duration, "duration", time.Second, "time of each measurement in each round; with --watches 2s if this says nothing else")
	fs.DurationVar(&o.warmup, "warmup", 250*time.Millisecond, "time before each measurement that does not count; with --watches 1s if this says nothing else")
	load.SizeFlags(fs, &o.sizes, 10_000) // with --ranges: 100,000
	fs.IntVar(&o.depth, "depth", 1000, "sets in flight on a stream")
	fs.BoolVar(&o.sessions, "sessions", true, "give writes ids, so that they take effect once")
	fs.BoolVar(&o.etcd, "etcd", true, "measure etcd, too")
	fs.BoolVar(&o.durable, "durable", true, "measure writes to disk, too")
	fs.BoolVar(&o.pipeline, "pipeline", true, "measure streams, too")
	fs.BoolVar(&o.secure, "tls", false, "measure all over TLS 1.3, bare RPC and etcd, too; both sides show certificates")
	fs.BoolVar(&o.ranges, "ranges", false, "measure pages, full reads and deletes of ranges in place of single keys; of 100,000 keys if --keys says nothing else")
	fs.IntVar(&o.page, "page", 1000, "with --ranges: keys of a page, and of a range that is deleted")
	fs.BoolVar(&o.watches, "watches", false, "measure watches in place of single keys")
	o.watching.flags(fs)
	o.program.Flags(fs)
	fs.StringVar(&o.output, "o", "text", "text or json")
	fs.StringVar(&o.plot, "plot", "", "`file.svg` for a picture of operations a second by number of clients")
	if err := load.ParseFlags(fs, args); err != nil {
		return o, err
	}
	err := o.setDefaults(fs)
	if err != nil {
		return o, err
	}
	if o.watching.watchers, err = load.ParseList(o.watching.list, strconv.Atoi); err != nil {
		return o, fmt.Errorf("--watchers: %w", err)
	}
	if o.clients, err = load.ParseList(*clients, strconv.Atoi); err != nil {
		return o, fmt.Errorf("--clients: %w", err)
	}
	return o, o.check()
}

// setDefaults sets the flags whose default depends on what is measured.
func (o *options) setDefaults(fs *flag.FlagSet) error {
	switch {
	case o.ranges:
		return load.SetUnlessGiven(fs, "keys", "100000", "clients", "1,16")
	case o.watches:
		return load.SetUnlessGiven(fs, "clients", "64", "duration", "2s", "warmup", "1s")
	}
	return nil
}

func (o *options) check() error {
	switch {
	case o.rounds < 1 || o.duration < 10*time.Millisecond || o.warmup < 0:
		return errors.New("--rounds has to be 1 or more, --duration 10ms or more, --warmup not negative")
	case o.depth < 1 || o.depth > 1000:
		return fmt.Errorf("--depth %d is not between 1 and 1000, which is what a session remembers", o.depth)
	case o.output != "text" && o.output != "json":
		return fmt.Errorf("-o %q is not text or json", o.output)
	}
	if err := cmp.Or(o.sizes.Check(), load.CheckClients(o.clients)); err != nil {
		return err
	}
	if o.ranges || o.watches {
		return o.checkKind()
	}
	return nil
}

// checkKind checks what --ranges and --watches need besides.
func (o *options) checkKind() error {
	switch {
	case o.ranges && o.watches:
		return errors.New("--ranges and --watches are two measurements: ask for one")
	case o.plot != "":
		return errors.New("--plot is for neither --ranges nor --watches")
	case o.ranges:
		return o.checkRanges()
	}
	return o.checkWatches()
}

// run starts everything, measures, reports, and ends everything.
func run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	return o.program.In(ctx, "compare", func(dir, binary string) error {
		c := &compare{options: o, dir: dir, binary: binary, stderr: stderr}
		defer c.stop()
		if o.watches {
			return c.runWatches(ctx, stdout)
		}
		start, plan := c.start, c.plan
		if o.ranges {
			start, plan = c.startRanges, c.planRanges
		}
		if err := start(ctx); err != nil {
			return err
		}
		cells := plan()
		each := o.warmup + o.duration
		fmt.Fprintf(stderr, "%d measurements of %v: about %v\n", len(cells)*o.rounds, each, (time.Duration(len(cells)*o.rounds) * (each + 50*time.Millisecond)).Round(time.Second))
		if err := c.measure(ctx, cells); err != nil {
			return err
		}
		r := c.report(cells)
		err := r.write(stdout, o.output)
		if o.plot != "" {
			err = errors.Join(err, os.WriteFile(o.plot, r.svg(), 0o644))
		}
		return err
	})
}
