package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
)

// maxPageBytes bounds the keys and values of a page, so that neither store cuts it.
const maxPageBytes = 1 << 19

// The names of what --ranges measures.
const (
	listRange, etcdRange    = "List, range", "etcd Range, range"
	listPrefix, etcdPrefix  = "List, prefix", "etcd Range, prefix"
	scanAll                 = "Scan"
	etcdStream, etcdPages   = "etcd RangeStream", "etcd Range, pages at one revision"
	deleteRange, etcdDelete = "DeleteRange", "etcd DeleteRange"
)

func (o *options) checkRanges() error {
	_, inPrefix := o.prefix()
	pageBytes := o.page * (o.sizes.Key + o.sizes.Value)
	switch {
	case o.page < 1 || o.page > 10_000 || pageBytes > maxPageBytes:
		return fmt.Errorf("--page %d is not between 1 and 10000, or has more than %d bytes", o.page, maxPageBytes)
	case o.sizes.Keys < inPrefix:
		return fmt.Errorf("--keys %d: that is less than a prefix has, %d", o.sizes.Keys, inPrefix)
	}
	return nil
}

// prefix is how many digits short of a key a prefix is that has a page of keys or more, and
// how many keys it has.
func (o *options) prefix() (digits int, keys uint64) {
	keys = 1
	for keys < uint64(o.page) {
		keys *= 16
		digits++
	}
	return digits, keys
}

// startRanges starts both stores and sets all keys.
func (c *compare) startRanges(ctx context.Context) (err error) {
	if err := c.startMachine(ctx); err != nil {
		return err
	}
	fmt.Fprintln(c.stderr, "starting raft-key-value")
	if c.memory, err = cluster.StartOurs(ctx, c.config("memory", false)); err != nil {
		return err
	}
	if c.sessions {
		if err := c.memory.OpenSessions(ctx, load.FillStreams); err != nil {
			return err
		}
	}
	if c.etcd {
		fmt.Fprintf(c.stderr, "starting etcd %s\n", etcd.Version())
		if c.noSync, err = etcd.Start(ctx, c.config("etcd-memory", false)); err != nil {
			return err
		}
	}
	fmt.Fprintln(c.stderr, "setting all keys")
	for _, s := range c.rangeStores() {
		if err := s.set(ctx, 0, c.sizes.Keys); err != nil {
			return err
		}
	}
	return nil
}

// rangeStore is a store, by its operations on ranges, each with the name of what it is
// measured as.
type rangeStore struct {
	pages interface {
		Page(ctx context.Context, client int, r load.Range, limit int) (keys int, err error)
		DeleteRange(ctx context.Context, r load.Range) (keys int, err error)
	}
	// set sets so many keys from the first on.
	set                         func(ctx context.Context, first, keys uint64) error
	rangeName, prefixName, name string // name: of DeleteRange
	fullReads                   []fullRead
}

// fullRead is a way to read all keys of a range as they were at one moment.
type fullRead struct {
	name string
	read func(context.Context, load.Range) (keys int, err error)
}

// rangeStores are the stores that were started: this one, and then etcd.
func (c *compare) rangeStores() []*rangeStore {
	options := load.Options{Pipeline: true, KeySize: c.sizes.Key, Value: load.Value(c.sizes.Value)}
	stores := []*rangeStore{{
		pages: c.memory.KV, rangeName: listRange, prefixName: listPrefix, name: deleteRange,
		fullReads: []fullRead{{scanAll, c.memory.Scan}},
		set: func(ctx context.Context, first, keys uint64) error {
			o := options
			o.First, o.Keys = first, keys
			return load.Fill(ctx, c.memory.KV, o)
		},
	}}
	if c.noSync == nil {
		return stores
	}
	pages := func(ctx context.Context, r load.Range) (int, error) { return c.noSync.Pages(ctx, r, c.page) }
	return append(stores, &rangeStore{
		pages: c.noSync, rangeName: etcdRange, prefixName: etcdPrefix, name: etcdDelete,
		fullReads: []fullRead{{etcdStream, c.noSync.Stream}, {etcdPages, pages}},
		set: func(ctx context.Context, first, keys uint64) error {
			o := options
			o.First, o.Keys = first, keys
			return c.noSync.Fill(ctx, o)
		},
	})
}

// planRanges lists what is measured in a round, in order: this store's, and then etcd's.
func (c *compare) planRanges() (cells []*cell) {
	base := load.Options{Depth: 1, Warmup: c.warmup, Duration: c.duration, KeySize: c.sizes.Key}
	stores := c.rangeStores()
	digits, inPrefix := c.prefix()
	for _, n := range c.clients {
		for _, s := range stores {
			o := base
			o.Clients = n
			o.Keys = c.sizes.Keys - uint64(c.page) + 1 // each has a page from it on
			cells = append(cells, &cell{name: s.rangeName, target: rangePages{s, c.page}, load: o})
		}
		for _, s := range stores {
			o := base
			o.Clients = n
			o.Keys = c.sizes.Keys / inPrefix * inPrefix // each is in a prefix that is full
			cells = append(cells, &cell{name: s.prefixName, target: prefixPages{s, c.page, digits}, load: o})
		}
	}
	base.Clients = 1
	base.Keys = c.sizes.Keys
	for _, s := range stores {
		for _, r := range s.fullReads {
			read := func(ctx context.Context, _ int) (time.Duration, error) {
				begin := time.Now()
				n, err := r.read(ctx, load.Range{Prefix: load.AllKeys})
				return time.Since(begin), absent(n, c.sizes.Keys, err)
			}
			cells = append(cells, &cell{name: r.name, load: base, run: again(read)})
		}
	}
	for _, s := range stores {
		cells = append(cells, &cell{name: s.name, load: base, run: again(c.deleteAndSet(s))})
	}
	return cells
}

// rangePages is the pages of a range that just has one, as a target of reads.
type rangePages struct {
	*rangeStore
	page int
}

// Do implements load.Target: it reads the page that begins with a key.
func (p rangePages) Do(ctx context.Context, client int, op load.Operation) error {
	first, err := load.Number(op.Key)
	if err != nil {
		return err
	}
	n, err := p.pages.Page(ctx, client, keysFrom(first, p.page, len(op.Key)), p.page)
	return absent(n, uint64(p.page), err)
}

// prefixPages is the first pages of prefixes, as a target of reads.
type prefixPages struct {
	*rangeStore
	page   int
	digits int // that a prefix has less than a key
}

// Do implements load.Target: it reads the first page of the prefix that a key has.
func (p prefixPages) Do(ctx context.Context, client int, op load.Operation) error {
	r := load.Range{Prefix: op.Key[:len(op.Key)-p.digits]}
	n, err := p.pages.Page(ctx, client, r, p.page)
	return absent(n, uint64(p.page), err)
}

// keysFrom is the range of so many keys from the first on.
func keysFrom(first uint64, keys, size int) load.Range {
	return load.Range{Start: load.Key(first, size), End: load.Key(first+uint64(keys)-1, size) + "\x00"}
}

// absent is the error of what found n keys where there are more, or fewer.
func absent(n int, want uint64, err error) error {
	if err == nil && uint64(n) != want {
		return load.ErrAbsent
	}
	return err
}

// deleteAndSet deletes a range of a page, another one each time, and sets its keys again. The
// time is that of the delete.
func (c *compare) deleteAndSet(s *rangeStore) func(context.Context, int) (time.Duration, error) {
	page := uint64(c.page)
	return func(ctx context.Context, i int) (time.Duration, error) {
		first := uint64(i) % (c.sizes.Keys / page) * page
		begin := time.Now()
		n, err := s.pages.DeleteRange(ctx, keysFrom(first, c.page, c.sizes.Key))
		took := time.Since(begin)
		if err := absent(n, page, err); err != nil {
			return took, err
		}
		return took, s.set(ctx, first, page)
	}
}

// again does something once, and then again and again until the duration is over. It says how
// long that took, setting up not counted. The first time, and what the warm-up has time for,
// does not count.
func again(do func(ctx context.Context, i int) (time.Duration, error)) func(context.Context, load.Options) (load.Result, error) {
	return func(ctx context.Context, o load.Options) (load.Result, error) {
		r := load.Result{Latency: &load.Histogram{}, Errors: map[string]uint64{}}
		begin := time.Now().Add(o.Warmup)
		end := begin.Add(o.Duration)
		for i := 0; r.Operations+r.Failed() == 0 || time.Now().Before(end); i++ {
			isWarm := i > 0 && !time.Now().Before(begin)
			took, err := do(ctx, i)
			if ctx.Err() != nil {
				return r, ctx.Err()
			}
			switch {
			case !isWarm:
			case err != nil:
				r.Errors[load.ErrorName(err)]++
			default:
				r.Operations++
				r.Elapsed += took
				r.Latency.Record(took)
			}
		}
		return r, nil
	}
}

// writeRanges tells of ranges.
func (r *report) writeRanges(w io.Writer) {
	_, inPrefix := (&options{page: r.Page}).prefix()
	page := load.Count(float64(r.Page))
	fmt.Fprintf(w, "\nPages of %s keys a second (p50/p99 in ms). A range has just so many, a prefix %s:\n\n", page, load.Count(float64(inPrefix)))
	load.Table(w, r.table([]string{listRange, etcdRange, listPrefix, etcdPrefix}, (*result).figuresAndTimes))
	fmt.Fprintf(w, "\nAll keys as they were at one moment, and %s keys deleted; one caller, latencies in ms:\n\n", page)
	rows := [][]string{{"", "keys a second", "p50", "p99", "of etcd's"}}
	for _, name := range []string{scanAll, etcdStream, etcdPages, deleteRange, etcdDelete} {
		c := r.find(name, 1)
		if c == nil {
			continue
		}
		keys := float64(r.Keys)
		if name == deleteRange || name == etcdDelete {
			keys = float64(r.Page)
		}
		of := ""
		if c.TimesEtcd > 0 {
			of = times(c.TimesEtcd)
		}
		rows = append(rows, []string{name, load.Count(c.Throughput * keys), milliseconds(c.P50), milliseconds(c.P99), of})
	}
	load.Table(w, rows)
}

func (c *result) figuresAndTimes() string {
	s := c.figures()
	if c.TimesEtcd > 0 {
		s += fmt.Sprintf(" · %.1f×", c.TimesEtcd)
	}
	return s
}
