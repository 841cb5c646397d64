package load

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// usageError is an error of the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// Usage makes an error one of the command line.
func Usage(err error) error { return usageError{err} }

// Main runs a program, or the echo process if this is one, until it has ended
// or a signal ends it; SIGPIPE is one, so that what it started ends with it. It
// returns the exit status.
func Main(name string, run func(ctx context.Context, args []string) error) int {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer cancel()
	served, err := ServeEcho(os.Args[1:])
	if !served {
		err = run(ctx, os.Args[1:])
	}
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// Execute parses a command line and runs a program with the options in it.
func Execute[O any](parse func([]string, io.Writer) (O, error), run func(context.Context, O, io.Writer, io.Writer) error) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		o, err := parse(args, os.Stderr)
		if err != nil {
			return Usage(err)
		}
		return run(ctx, o, os.Stdout, os.Stderr)
	}
}

// NewFlags are the flags of a program, still to be defined, that does what its
// usage says.
func NewFlags(name, does string, stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintf(stderr, "%s %s\n\nFlags:\n", name, does)
		fs.PrintDefaults()
	}
	return fs
}

// ParseFlags parses a command line that has flags only.
func ParseFlags(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("unknown argument %q", fs.Arg(0))
	}
	return nil
}

// ParseQuick is ParseFlags for a program with --quick: that sets flags, name and
// value in turn, that the command line did not.
func ParseQuick(fs *flag.FlagSet, args []string, pairs ...string) error {
	quick := fs.Bool("quick", false, "try the program: a little of everything, for figures that mean nothing")
	if err := ParseFlags(fs, args); err != nil || !*quick {
		return err
	}
	return SetUnlessGiven(fs, pairs...)
}

// SetUnlessGiven sets flags, name and value in turn, that the command line did not.
func SetUnlessGiven(fs *flag.FlagSet, pairs ...string) error {
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for i := 0; i < len(pairs); i += 2 {
		if !given[pairs[i]] {
			if err := fs.Set(pairs[i], pairs[i+1]); err != nil {
				return err
			}
		}
	}
	return nil
}

// Wait waits, or until ctx ends.
func Wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// ParseList parses numbers that are separated by commas.
func ParseList[T any](s string, parse func(string) (T, error)) (numbers []T, err error) {
	for part := range strings.SplitSeq(s, ",") {
		n, err := parse(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("%q is no number of these", part)
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}

// SizeFlags defines the flags that say what keys and values are like, and of how
// many keys by default.
func SizeFlags(fs *flag.FlagSet, o *Sizes, keys uint64) {
	fs.IntVar(&o.Key, "key-size", 16, "`bytes` of a key, which starts with "+keyPrefix)
	fs.IntVar(&o.Value, "value-size", 128, "`bytes` of a value")
	fs.Uint64Var(&o.Keys, "keys", keys, "keys to choose from, all equally often")
}

// Sizes say what keys and values are like.
type Sizes struct {
	Key, Value int
	Keys       uint64
}

// Check says which flag is out of bounds.
func (s Sizes) Check() error {
	digits := s.Key - len(keyPrefix)
	switch {
	case digits < 1 || s.Key > 64<<10:
		return fmt.Errorf("--key-size %d is not between %d and 65536", s.Key, len(keyPrefix)+1)
	case s.Value < 0 || s.Value > 1<<20:
		return fmt.Errorf("--value-size %d is not between 0 and 1048576", s.Value)
	case s.Keys < 1 || digits < 16 && s.Keys > 1<<(4*digits):
		return fmt.Errorf("--keys %d do not fit into --key-size %d", s.Keys, s.Key)
	}
	return nil
}

// CheckClients says which number of clients is out of bounds.
func CheckClients(clients []int) error {
	for _, c := range clients {
		if c < 1 || c > 10_000 {
			return fmt.Errorf("--clients %d is not between 1 and 10000", c)
		}
	}
	return nil
}
