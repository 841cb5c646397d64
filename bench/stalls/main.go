// Stalls keeps sets coming to a cluster at a fixed rate, and prints how long
// they take with and without what might hold them up: snapshots, compaction,
// segments, maps that grow, learners, followers that are dead or slow.
//
//	cd bench && go run ./stalls
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/load"
)

// options are the program's settings.
type options struct {
	sizes        load.Sizes
	rate         float64
	clients      int
	rounds       int
	window       time.Duration
	diskWindows  int
	logBytes     int64
	memory, disk bool
	program      cluster.Program
}

func main() { os.Exit(load.Main("stalls", load.Execute(parseOptions, run))) }

// parseOptions reads the settings.
func parseOptions(args []string, stderr io.Writer) (options, error) {
	o := options{}
	fs := load.NewFlags("stalls", "measures what holds up the writes to raft-key-value.", stderr)
	load.SizeFlags(fs, &o.sizes, 1_000_000)
	fs.Float64Var(&o.rate, "rate", 0, "sets a second (default: a third of what 64 clients reach in a closed loop)")
	fs.IntVar(&o.clients, "clients", 256, "the most sets in flight")
	fs.IntVar(&o.rounds, "rounds", 5, "windows with each stall in memory, and as many without")
	fs.DurationVar(&o.window, "window", 2*time.Second, "time of a window; on disk half as much")
	fs.IntVar(&o.diskWindows, "disk-windows", 60, "windows on disk, with and without snapshots and new segments as they come")
	fs.Int64Var(&o.logBytes, "log-bytes", 16<<20, "`bytes` of log between two snapshots on disk; a segment is a quarter of it")
	fs.BoolVar(&o.memory, "in-memory", true, "measure what happens in memory")
	fs.BoolVar(&o.disk, "durable", true, "measure what happens on disk, too")
	o.program.Flags(fs)
	if err := load.ParseQuick(fs, args, "keys", "20000", "rounds", "1", "window", "300ms", "disk-windows", "20", "log-bytes", "1048576"); err != nil {
		return o, err
	}
	return o, o.check()
}

func (o *options) check() error {
	switch {
	case o.rounds < 1 || o.diskWindows < 1 || o.window < 20*time.Millisecond:
		return errors.New("--rounds and --disk-windows have to be 1 or more, --window 20ms or more")
	case !(o.rate >= 0 && o.rate <= 1e6):
		return fmt.Errorf("--rate %v is not between 0 and 1000000", o.rate)
	case o.logBytes < 1<<20:
		return fmt.Errorf("--log-bytes %d is less than 1 MiB", o.logBytes)
	}
	if err := load.CheckClients([]int{o.clients}); err != nil {
		return err
	}
	return o.sizes.Check()
}

// run measures and reports.
func run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	return o.program.In(ctx, "stalls", func(dir, binary string) error {
		s := &stalls{options: o, dir: dir, binary: binary, stderr: stderr}
		defer s.stop()
		if o.memory {
			if err := s.inMemory(ctx); err != nil {
				return err
			}
			s.stop()
		}
		if o.disk {
			if err := s.onDisk(ctx); err != nil {
				return err
			}
		}
		s.write(stdout)
		return nil
	})
}
