// Counts in one key, by compare-and-set, with several writers at a time, and follows what they
// write. Whichever node fails meanwhile, each addition is made once, and the follower is told of
// every value.
//
//	go run . -nodes 127.0.0.1:21001,127.0.0.1:21002,127.0.0.1:21003 -writers 4 -adds 100
//
// It prints a line for each value that it is told of, and at the end how many additions were
// acknowledged. Package rkv is the client.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"raft-key-value/examples/go/rkv"
	"raft-key-value/kvpb"
)

// addTimeout bounds one addition. It is longer than finding another leader takes.
const addTimeout = 30 * time.Second

func main() {
	var c counter
	nodes := flag.String("nodes", "127.0.0.1:21001", "host:port,... of all nodes")
	flag.StringVar(&c.config.CertFile, "cert", "", "file with the client's certificate, for TLS")
	flag.StringVar(&c.config.KeyFile, "key-file", "", "file with its private key")
	flag.StringVar(&c.config.CAFile, "ca", "", "file with the CA of the nodes' certificates")
	flag.StringVar(&c.key, "counter", "example/counter", "key to count in")
	flag.IntVar(&c.writers, "writers", 4, "how many add at a time")
	flag.IntVar(&c.adds, "adds", 100, "how often each of them adds 1; 0: until this program is told to stop")
	flag.Parse()
	c.config.Nodes = strings.Split(*nodes, ",")

	stopping, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(stopping, stop) // a second signal ends it at once
	if err := c.run(stopping, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "counter:", err)
		if errors.Is(err, rkv.ErrOutcomeUnknown) {
			os.Exit(4) // as raft-key-value does: 1 may have been added, or not
		}
		os.Exit(1)
	}
}

// counter is a key whose value is a number in decimal.
type counter struct {
	config        rkv.Config
	key           string
	writers, adds int
}

// run counts and follows, and ends once the follower has been told of the last addition. Once
// stopping ends, no further addition begins.
func (c *counter) run(stopping context.Context, stdout, stderr io.Writer) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	followed := make(chan error, 1)
	told := make(chan uint64) // versions of additions that the follower was told of
	go func() { followed <- c.follow(ctx, told, stdout, stderr) }()
	added := make(chan addition)
	go func() { added <- c.addAll(stopping) }()

	var all addition
	var toldVersion uint64
	isDone := false
	for !isDone || toldVersion < all.version {
		select {
		case err := <-followed:
			return err
		case toldVersion = <-told:
		case all = <-added:
			if all.err != nil {
				return all.err
			}
			isDone = true
		}
	}
	fmt.Fprintf(stdout, "added %d\n", all.count)
	return nil
}

// follow prints what the counter is, and each value that it gets.
func (c *counter) follow(ctx context.Context, told chan<- uint64, stdout, stderr io.Writer) error {
	tell := func(what string, version uint64, value []byte) {
		fmt.Fprintf(stdout, "%s %s of version %d\n", what, value, version)
		select {
		case told <- version:
		case <-ctx.Done():
		}
	}
	return rkv.Follow(ctx, c.config, rkv.Follower{
		Prefix: c.key,
		Begin: func(keys []*kvpb.KeyValue, _ uint64) {
			for _, k := range keys {
				if k.Key == c.key {
					tell("begins", k.Version, k.Value)
				}
			}
		},
		Change: func(events []*kvpb.Event) {
			for _, e := range events {
				if e.Key == c.key { // and not another key with this prefix
					tell("is", e.Version, e.Value)
				}
			}
		},
		Fail: func(err error) { fmt.Fprintln(stderr, "counter: goes on at another node:", err) },
	})
}

// addition is what came of adding.
type addition struct {
	count   int    // of additions that were acknowledged
	version uint64 // of the last one
	err     error
}

// addAll has all writers add, and waits for them.
func (c *counter) addAll(stopping context.Context) (all addition) {
	client, err := rkv.Dial(c.config)
	if err != nil {
		return addition{err: err}
	}
	defer func() { _ = client.Close() }()
	results := make(chan addition)
	for range c.writers {
		go func() { results <- c.add(stopping, client.NewSession()) }()
	}
	for range c.writers {
		one := <-results
		all.count += one.count
		all.version = max(all.version, one.version)
		all.err = errors.Join(all.err, one.err)
	}
	return all
}

// add adds 1 as often as a writer is to.
func (c *counter) add(stopping context.Context, session *rkv.Session) (sum addition) {
	isDone := func() bool { return c.adds > 0 && sum.count == c.adds }
	for !isDone() && stopping.Err() == nil {
		value, err := addOne(session, c.key)
		if err != nil {
			sum.err = err
			return sum
		}
		sum.count++
		sum.version = value.Version
	}
	return sum
}

func addOne(session *rkv.Session, key string) (rkv.Value, error) {
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	return session.Update(ctx, key, func(old []byte) ([]byte, error) {
		if old == nil {
			return []byte("1"), nil
		}
		n, err := strconv.ParseUint(string(old), 10, 64)
		if err != nil {
			return nil, err
		}
		return strconv.AppendUint(nil, n+1, 10), nil
	})
}
