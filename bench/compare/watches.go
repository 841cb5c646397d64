package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
)

const (
	// prefixKeys is how many keys the watched prefix has: those that differ in the last digit.
	prefixKeys = 16
	// maxWatchers and maxStreams are what a node takes, of all and of one connection.
	// With TLS a principal gets half of all.
	maxWatchers = 10_000
	maxStreams  = 1024
	// eventsTimeout bounds the wait for events that have not come.
	eventsTimeout = 10 * time.Second
)

// watchOptions are the settings of --watches.
type watchOptions struct {
	list           string
	watchers       []int // each of one key of its own
	prefixWatchers int   // of one prefix
	connections    int
	rate           float64 // of the writer, in writes a second
	prefixRate     float64
	pause          time.Duration
}

func (o *watchOptions) flags(fs *flag.FlagSet) {
	fs.StringVar(&o.list, "watchers", "1,100,10000", "with --watches: how many watch a key of their own; `n,...`")
	fs.IntVar(&o.prefixWatchers, "prefix-watchers", 1000, "with --watches: how many watch one prefix, of 16 keys; 0: leave that out")
	fs.IntVar(&o.connections, "watch-connections", 200, "with --watches: connections that watchers share")
	fs.Float64Var(&o.rate, "watch-rate", 200, "with --watches: `writes` a second that are timed, of keys with watchers of their own")
	fs.Float64Var(&o.prefixRate, "prefix-rate", 10, "with --watches: the same, of keys of the prefix, for all its watchers")
	fs.DurationVar(&o.pause, "pause", time.Second, "with --watches: time before each look at the memory of a process")
}

func (o *options) checkWatches() error {
	w := &o.watching
	if slices.Min(w.watchers) < 1 || w.prefixWatchers < 0 {
		return errors.New("--watchers have to be 1 or more each, --prefix-watchers 0 or more")
	}
	most := maxWatchers
	if o.secure {
		most /= 2
	}
	all := append(slices.Clone(w.watchers), w.prefixWatchers)
	for _, n := range all {
		switch {
		case n > most:
			return fmt.Errorf("--watchers and --prefix-watchers: %d is more than %d, which is what a node takes of one principal", n, most)
		case uint64(n) > o.sizes.Keys:
			return fmt.Errorf("--watchers: there are not as many --keys as %d", n)
		case n > w.connections*maxStreams:
			return fmt.Errorf("--watch-connections %d: a node takes %d watches of a connection", w.connections, maxStreams)
		}
	}
	switch {
	case w.connections > 1000:
		return fmt.Errorf("--watch-connections %d is more than 1000", w.connections)
	case w.rate < 1 || w.prefixRate < 1:
		return errors.New("--watch-rate and --prefix-rate have to be 1 or more")
	case w.pause < 0:
		return errors.New("--pause is negative")
	case len(o.clients) != 1:
		return errors.New("--clients: --watches takes one number")
	case o.sizes.Value < taggedBytes || o.sizes.Keys < prefixKeys:
		return fmt.Errorf("--watches needs a --value-size of %d or more, and --keys of %d or more", taggedBytes, prefixKeys)
	}
	return nil
}

// The names of the systems that --watches measures, without watchers and with them.
const (
	storeOurs       = "raft-key-value"
	storeEtcd       = "etcd"
	watchOurs       = "Watch"
	watchEtcd       = "etcd watch, a stream each"
	watchEtcdShared = "etcd watch, a stream a connection"
)

// watchConns are connections of a store for watches.
type watchConns interface {
	load.Target
	Watch(ctx context.Context, w *load.Watches, client int, of load.WatchedKeys) error
	Close()
}

// watchStore is a cluster that was started for one measurement.
type watchStore struct {
	load.Target
	pid  int // of its leader, which all calls go to
	dial func(connections int) (watchConns, error)
	stop func()
}

// watchShape is who watches what.
type watchShape struct {
	watchers int
	prefix   bool // all of them one prefix; else each a key of its own
}

func (s watchShape) String() string {
	switch {
	case s.watchers == 0:
		return "none"
	case s.prefix:
		return load.Count(float64(s.watchers)) + " of one prefix"
	case s.watchers == 1:
		return "1 of a key"
	}
	return load.Count(float64(s.watchers)) + " of a key each"
}

// fan is how many events a write of a watched key makes.
func (s watchShape) fan() uint64 {
	if s.prefix {
		return uint64(s.watchers)
	}
	return uint64(min(s.watchers, 1))
}

// watchedKey is the key of the timed write i.
func (s watchShape) watchedKey(i, keySize int) string {
	if s.prefix {
		return load.Key(uint64(i%prefixKeys), keySize)
	}
	return load.Key(uint64(i%max(s.watchers, 1)), keySize)
}

// on is what is watched on one of so many connections.
func (s watchShape) on(connection, connections, keySize int) (of load.WatchedKeys) {
	if s.prefix {
		of.Prefix = load.Key(0, keySize)[:keySize-1]
	}
	for i := connection; i < s.watchers; i += connections {
		if s.prefix {
			of.Prefixes++
			continue
		}
		of.Keys = append(of.Keys, load.Key(uint64(i), keySize))
	}
	return of
}

// watchCell is one system with one shape of watchers, measured once in each round by a
// cluster that was started for that.
type watchCell struct {
	name  string
	store string // which is the name of the cell without watchers to compare with
	shape watchShape
	start func(ctx context.Context, dir string) (*watchStore, error)

	afterAnswer, afterCall load.Histogram
	timed, early           uint64
	bytesEach              []float64 // of memory, of the leader's process
	sets, events           []float64 // a second
	errors                 map[string]uint64
}

// planWatches lists what is measured in a round, in order.
func (c *compare) planWatches() (cells []*watchCell) {
	add := func(name, store string, shape watchShape, start func(context.Context, string) (*watchStore, error)) {
		cells = append(cells, &watchCell{name: name, store: store, shape: shape, start: start})
	}
	ownStreams := func(ctx context.Context, dir string) (*watchStore, error) {
		return c.startWatchedEtcd(ctx, dir, false)
	}
	shared := func(ctx context.Context, dir string) (*watchStore, error) {
		return c.startWatchedEtcd(ctx, dir, true)
	}
	add(storeOurs, storeOurs, watchShape{}, c.startWatched)
	if c.etcd {
		add(storeEtcd, storeEtcd, watchShape{}, ownStreams)
	}
	var shapes []watchShape
	for _, n := range c.watching.watchers {
		shapes = append(shapes, watchShape{watchers: n})
	}
	if c.watching.prefixWatchers > 0 {
		shapes = append(shapes, watchShape{watchers: c.watching.prefixWatchers, prefix: true})
	}
	for _, shape := range shapes {
		add(watchOurs, storeOurs, shape, c.startWatched)
		if c.etcd {
			add(watchEtcd, storeEtcd, shape, ownStreams)
			add(watchEtcdShared, storeEtcd, shape, shared)
		}
	}
	return cells
}

// runWatches measures, and reports.
func (c *compare) runWatches(ctx context.Context, stdout io.Writer) error {
	if err := c.startMachine(ctx); err != nil {
		return err
	}
	cells := c.planWatches()
	done := 0
	for round := range c.rounds {
		order := slices.Clone(cells)
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, cell := range order {
			if err := c.measureWatches(ctx, cell); err != nil {
				return fmt.Errorf("%s, watchers %v: %w", cell.name, cell.shape, err)
			}
			done++
			fmt.Fprintf(c.stderr, "%d/%d: watchers %v, %s: %s sets/s\n", done, len(cells)*c.rounds, cell.shape, cell.name, load.Count(cell.sets[round]))
		}
	}
	return c.watchReport(cells).write(stdout, c.output)
}

func (c *compare) startWatched(ctx context.Context, dir string) (_ *watchStore, err error) {
	o, err := cluster.StartOurs(ctx, c.config(dir, false))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			o.Stop()
		}
	}()
	if err := o.Settle(ctx); err != nil {
		return nil, err
	}
	if c.sessions {
		if err := o.OpenSessions(ctx, max(load.FillStreams, c.clients[0])); err != nil {
			return nil, err
		}
	}
	dial := func(connections int) (watchConns, error) {
		return load.DialKV([]string{o.Leader.Address}, connections, c.tls.Client())
	}
	fill := load.Options{Pipeline: true, Keys: c.sizes.Keys, KeySize: c.sizes.Key, Value: load.Value(c.sizes.Value)}
	return &watchStore{o.KV, o.Leader.PID(), dial, o.Stop}, load.Fill(ctx, o.KV, fill)
}

func (c *compare) startWatchedEtcd(ctx context.Context, dir string, share bool) (*watchStore, error) {
	e, err := etcd.Start(ctx, c.config(dir, false))
	if err != nil {
		return nil, err
	}
	dial := func(connections int) (watchConns, error) { return e.DialWatches(connections, share) }
	s := &watchStore{etcd.Target{Cluster: e}, e.Leader.PID(), dial, e.Stop}
	fill := load.Options{Keys: c.sizes.Keys, KeySize: c.sizes.Key, Value: load.Value(c.sizes.Value)}
	if err := e.Fill(ctx, fill); err != nil {
		e.Stop()
		return nil, err
	}
	return s, nil
}

// measureWatches measures a cell once: memory, then latency at a rate, then how much can be
// written.
func (c *compare) measureWatches(ctx context.Context, cell *watchCell) error {
	const dir = "watched"
	defer func() { _ = os.RemoveAll(filepath.Join(c.dir, dir)) }()
	s, err := cell.start(ctx, dir)
	if err != nil {
		return err
	}
	defer s.stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t := newTimedWrites(cell, c)
	w := &load.Watches{Event: t.event}
	defer w.Wait()
	defer cancel()
	closeConns, err := c.openWatches(ctx, s, cell, w)
	defer closeConns()
	if err != nil {
		return err
	}
	if err := t.write(ctx, s); err != nil {
		return err
	}
	o := load.Options{
		Clients: c.clients[0], Depth: 1, Warmup: c.warmup, Duration: c.duration, SetShare: 1,
		Keys: c.sizes.Keys, KeySize: c.sizes.Key, Value: load.Value(c.sizes.Value),
	}
	begin := time.Now()
	before := t.events.Load()
	r, err := load.Run(ctx, o, s)
	if err != nil {
		return err
	}
	events := float64(t.events.Load() - before)
	cell.events = append(cell.events, events/time.Since(begin).Seconds())
	cell.sets = append(cell.sets, r.Throughput())
	cell.addErrors(r.Errors)
	cancel()
	cell.addErrors(w.Wait())
	t.count()
	return nil
}

func (c *watchCell) addErrors(errors map[string]uint64) {
	for name, n := range errors {
		if c.errors == nil {
			c.errors = map[string]uint64{}
		}
		c.errors[name] += n
	}
}

// openWatches opens all watches, and measures what memory they take: connections are made
// before, for both stores alike, and are not counted. Without watches, it takes as long, so
// that all clusters are of one age when they are measured.
func (c *compare) openWatches(ctx context.Context, s *watchStore, cell *watchCell, w *load.Watches) (closeConns func(), err error) {
	connections := max(1, min(c.watching.connections, cell.shape.watchers))
	conns, err := s.dial(connections)
	if err != nil {
		return func() {}, err
	}
	err = each(connections, func(i int) error { return conns.Do(ctx, i, load.Operation{Key: load.Key(0, c.sizes.Key)}) })
	if err != nil {
		return conns.Close, err
	}
	load.Wait(ctx, c.watching.pause)
	before, err := cluster.MemoryOf(s.pid)
	if err != nil {
		return conns.Close, err
	}
	err = each(connections, func(i int) error { return conns.Watch(ctx, w, i, cell.shape.on(i, connections, c.sizes.Key)) })
	if err != nil {
		return conns.Close, err
	}
	load.Wait(ctx, c.watching.pause)
	after, err := cluster.MemoryOf(s.pid)
	if cell.shape.watchers > 0 {
		cell.bytesEach = append(cell.bytesEach, float64(after.RSS-before.RSS)/float64(cell.shape.watchers))
	}
	return conns.Close, err
}

// each does something for each connection, for a few of them at a time: a node takes no more
// than 128 handshakes at once. It returns the first connection's error.
func each(connections int, do func(i int) error) error {
	const atOnce = 16
	errs := make([]error, connections)
	var wg sync.WaitGroup
	for first := range min(atOnce, connections) {
		wg.Go(func() {
			for i := first; i < connections; i += atOnce {
				errs[i] = do(i)
			}
		})
	}
	wg.Wait()
	return cmp.Or(errs...)
}

// timedWrites are the writes of one writer at a rate. Their values have numbers, by which a
// watcher knows which write it is told of.
type timedWrites struct {
	cell           *watchCell
	keySize        int
	value          []byte
	rate           float64
	uncounted      int // writes of the warm-up
	begin          time.Time
	called, answer []atomic.Int64 // when: nanoseconds since begin; 0: not yet
	arrived, early atomic.Uint64  // events of these writes; those counted that came before the answer
	events         atomic.Uint64  // all, whoever wrote
}

func newTimedWrites(cell *watchCell, c *compare) *timedWrites {
	t := &timedWrites{cell: cell, keySize: c.sizes.Key, value: load.Value(c.sizes.Value), rate: c.watching.rate}
	if cell.shape.prefix {
		t.rate = c.watching.prefixRate
	}
	t.uncounted = int(t.rate * c.warmup.Seconds())
	all := t.uncounted + max(1, int(t.rate*c.duration.Seconds()))
	t.called = make([]atomic.Int64, all)
	t.answer = make([]atomic.Int64, all)
	t.begin = time.Now()
	return t
}

// event takes the value of an event. An event that comes before the answer to its write
// counts as if both came at once.
func (t *timedWrites) event(value []byte) {
	t.events.Add(1)
	i, ok := tagOf(value)
	if !ok {
		return
	}
	now := t.since()
	answer := t.answer[i].Load()
	if i >= uint64(t.uncounted) {
		t.cell.afterCall.Record(time.Duration(now - t.called[i].Load()))
		if answer == 0 {
			t.early.Add(1)
			answer = now
		}
		t.cell.afterAnswer.Record(time.Duration(now - answer))
	}
	t.arrived.Add(1)
}

// since is the time since the beginning, not 0.
func (t *timedWrites) since() int64 { return max(1, int64(time.Since(t.begin))) }

// write makes all writes, one after the other, and waits for their events.
func (t *timedWrites) write(ctx context.Context, to load.Target) error {
	start := time.Now()
	for i := range t.called {
		due := start.Add(time.Duration(float64(i) / t.rate * float64(time.Second)))
		load.Wait(ctx, time.Until(due))
		op := load.Operation{Set: true, Key: t.cell.shape.watchedKey(i, t.keySize), Value: tagged(t.value, uint64(i))}
		t.called[i].Store(t.since())
		if err := to.Do(ctx, 0, op); err != nil {
			return fmt.Errorf("a write that is timed: %w", err)
		}
		t.answer[i].Store(t.since())
	}
	want := uint64(len(t.called)) * t.cell.shape.fan()
	for end := time.Now().Add(eventsTimeout); t.arrived.Load() < want && time.Now().Before(end); {
		load.Wait(ctx, 10*time.Millisecond)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// count counts what was told, when nothing more is. Each event has to have come once.
func (t *timedWrites) count() {
	want := uint64(len(t.called)) * t.cell.shape.fan()
	got := t.arrived.Load()
	if got < want {
		t.cell.addErrors(map[string]uint64{"MISSING EVENT": want - got})
	}
	if got > want {
		t.cell.addErrors(map[string]uint64{"EVENT TWICE": got - want})
	}
	t.cell.early += t.early.Load()
	t.cell.timed += uint64(len(t.called)-t.uncounted) * t.cell.shape.fan()
}

// tag tells the values of writes that are timed. Behind it is the number of the write.
var tag = []byte("timed-")

// taggedBytes is how long a value has to be for that.
const taggedBytes = 6 + 8

// tagged is a value with a number.
func tagged(value []byte, number uint64) []byte {
	v := slices.Clone(value)
	copy(v, binary.BigEndian.AppendUint64(slices.Clone(tag), number))
	return v
}

// tagOf is the number in a value, if it has one.
func tagOf(value []byte) (number uint64, ok bool) {
	rest, ok := bytes.CutPrefix(value, tag)
	if !ok || len(rest) < 8 {
		return 0, false
	}
	return binary.BigEndian.Uint64(rest), true
}
