package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/load"
)

const (
	keySize = 16
	// maxData bounds what the keys of a table of values hold: 10,000 values of
	// 1 MiB would not fit.
	maxData = 64 << 20
	// maxInFlight bounds the values on their way: a node closes a connection
	// rather than keep more than 24 MiB of answers that are not yet sent.
	maxInFlight = 16 << 20
	// manyKeys and more are measured alone: clusters that hold so many do not
	// fit beside each other.
	manyKeys = 1_000_000
	// overhead is what a node takes for a key beside its bytes, about.
	overhead = 110
)

// setup is what a cluster and its load are like.
type setup struct {
	nodes, value int
	keys         uint64
	clients      int
}

// base is what is varied, in one of its parts at a time.
var base = setup{nodes: 3, value: 128, keys: 10_000, clients: 64}

// point is a setup and what was measured there.
type point struct {
	setup
	set, get series
	leftOut  string // why it was not measured
}

// series are the rounds of one operation.
type series struct {
	load.Result
	throughputs, bare []float64
	cpu               time.Duration // of all nodes
}

// table is what a part of the setup is varied in.
type table struct {
	title, what string
	label       func(setup) string
	points      []*point
}

// tables are those that were asked for.
func (o *options) tables() (tables []*table) {
	count := func(n int) string { return load.Count(float64(n)) }
	add := func(title, what string, points []*point, label func(setup) string) {
		if len(points) > 0 {
			tables = append(tables, &table{title, what, label, points})
		}
	}
	add("Nodes", "nodes", each(o.nodes, func(s *setup, n int) { s.nodes = n }), func(s setup) string { return count(s.nodes) })
	add("Size of values", "value", each(o.values, func(s *setup, n int) {
		s.value = n
		s.keys = min(s.keys, maxData/uint64(max(n, 1)))
		s.clients = min(s.clients, maxInFlight/max(n, 1))
	}), setup.labelValue)
	add("Clients", "clients", each(o.clients, func(s *setup, n int) { s.clients = n }), func(s setup) string { return count(s.clients) })
	add("Keys", "keys", each(o.keys, func(s *setup, n uint64) { s.keys = n }), func(s setup) string { return count(int(s.keys)) })
	return tables
}

func each[T any](list []T, vary func(*setup, T)) (points []*point) {
	for _, v := range list {
		p := &point{setup: base}
		vary(&p.setup, v)
		points = append(points, p)
	}
	return points
}

// labelValue names a size of values, and what else had to vary.
func (s setup) labelValue() string {
	label := size(s.value)
	if s.keys != base.keys {
		label += fmt.Sprintf(", %s keys", load.Count(float64(s.keys)))
	}
	if s.clients != base.clients {
		label += fmt.Sprintf(", %d clients", s.clients)
	}
	return label
}

// size writes a number of bytes.
func size(n int) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10 && n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}

// memory is about what the nodes of a setup take: the collector lets a heap
// grow to twice of what is in use.
func (s setup) memory() int64 {
	return 2 * int64(s.nodes) * int64(s.keys) * int64(keySize+s.value+overhead)
}

// stage is where a table's points are measured: their clusters, and the bare
// RPC of each.
type stage struct {
	options
	dir, binary string
	stderr      io.Writer
	most        int64                   // bytes that all nodes may take; 0: what they like
	clusters    map[setup]*cluster.Ours // by setup without clients
	echoes      map[int]*load.Echo      // by size of values
	bare        map[int]*load.KV        // likewise
}

// measure measures a table: all points in turn, but those with many keys each
// alone.
func (s *stage) measure(ctx context.Context, t *table) error {
	var together []*point
	for _, p := range t.points {
		if p.keys < manyKeys {
			together = append(together, p)
		}
	}
	groups := [][]*point{together}
	for _, p := range t.points {
		if p.keys >= manyKeys {
			groups = append(groups, []*point{p})
		}
	}
	for i, points := range groups {
		if len(points) == 0 {
			continue
		}
		if p := points[0]; p.keys >= manyKeys {
			free, err := cluster.Available()
			if s.most = free / 10 * 8; err != nil || p.memory() > s.most {
				p.leftOut = fmt.Sprintf("left out: it takes about %d MiB, and %d are free", p.memory()>>20, free>>20)
				fmt.Fprintf(s.stderr, "%s: %s: %s\n", t.title, t.label(p.setup), p.leftOut)
				continue
			}
		}
		if err := s.measureGroup(ctx, t, filepath.Join(s.dir, fmt.Sprint(i)), points); err != nil {
			return fmt.Errorf("%s: %w", t.title, err)
		}
	}
	return nil
}

// measureGroup measures points round after round. Every other round goes
// backwards, so that what drifts hits all alike.
func (s *stage) measureGroup(ctx context.Context, t *table, dir string, points []*point) error {
	s.clusters, s.echoes, s.bare = map[setup]*cluster.Ours{}, map[int]*load.Echo{}, map[int]*load.KV{}
	defer s.stop()
	for i, p := range points {
		fmt.Fprintf(s.stderr, "%s: starting %s\n", t.title, t.label(p.setup))
		if err := s.start(ctx, filepath.Join(dir, fmt.Sprint(i)), p); err != nil {
			return err
		}
	}
	for round := range s.rounds {
		order := slices.Clone(points)
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, set := range []bool{true, false} {
			bare := map[setup]float64{} // what was measured in this round
			for _, p := range order {
				if err := s.round(ctx, p, set, bare); err != nil {
					return err
				}
			}
		}
		fmt.Fprintf(s.stderr, "%s: round %d of %d\n", t.title, round+1, s.rounds)
	}
	return nil
}

// cluster is the setup without what does not concern the nodes.
func (s setup) cluster() setup {
	s.clients = 0
	return s
}

// ceiling is the setup without what does not concern bare RPC.
func (s setup) ceiling() setup { return setup{value: s.value, clients: s.clients} }

// start starts what a point needs and other points have not.
func (s *stage) start(ctx context.Context, dir string, p *point) (err error) {
	if s.clusters[p.cluster()] == nil {
		c := cluster.Config{Binary: s.binary, Dir: dir, Size: p.nodes}
		if s.most > 0 { // rather collect often than take it from others
			c.Env = []string{fmt.Sprintf("GOMEMLIMIT=%d", s.most/int64(p.nodes))}
		}
		o, err := cluster.StartOurs(ctx, c)
		if err != nil {
			return err
		}
		s.clusters[p.cluster()] = o
		if err := load.Fill(ctx, o.KV, load.Options{Pipeline: true, Keys: p.keys, KeySize: keySize, Value: load.Value(p.value)}); err != nil {
			return err
		}
	}
	if s.echoes[p.value] == nil {
		if s.echoes[p.value], err = load.StartEcho(p.value, load.Identity{}); err != nil {
			return err
		}
		if s.bare[p.value], err = load.DialKV([]string{s.echoes[p.value].RPC}, cluster.Connections, load.Identity{}); err != nil {
			return err
		}
	}
	for _, k := range []*load.KV{s.clusters[p.cluster()].KV, s.bare[p.value]} {
		if err := k.OpenSessions(ctx, p.clients); err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) stop() {
	for _, o := range s.clusters {
		o.Stop()
	}
	for _, k := range s.bare {
		k.Close()
	}
	for _, e := range s.echoes {
		if e != nil {
			e.Stop()
		}
	}
}

// round measures an operation at a point once, and before it bare RPC, unless
// another point of the round has measured the same.
func (s *stage) round(ctx context.Context, p *point, set bool, bare map[setup]float64) error {
	l := load.Options{Clients: p.clients, Depth: 1, Duration: s.duration, Keys: p.keys, KeySize: keySize, Value: load.Value(p.value)}
	to := &p.get
	if set {
		l.SetShare, to = 1, &p.set
	}
	if _, done := bare[p.ceiling()]; !done {
		r, _, err := s.once(ctx, l, s.bare[p.value], func() (time.Duration, error) { return 0, nil })
		if err != nil {
			return err
		}
		bare[p.ceiling()] = r.Throughput()
	}
	o := s.clusters[p.cluster()]
	if err := o.Settle(ctx); err != nil {
		return err
	}
	r, used, err := s.once(ctx, l, o.KV, o.CPU)
	if err != nil {
		return err
	}
	to.Add(r)
	to.throughputs = append(to.throughputs, r.Throughput())
	to.bare = append(to.bare, bare[p.ceiling()])
	to.cpu += used
	return nil
}

// once measures, and how much of the processors was used meanwhile.
func (s *stage) once(ctx context.Context, l load.Options, t load.Target, cpu func() (time.Duration, error)) (load.Result, time.Duration, error) {
	warm := l
	warm.Duration = max(s.warmup, time.Millisecond)
	if _, err := load.Run(ctx, warm, t); err != nil {
		return load.Result{}, 0, err
	}
	before, err := cpu()
	if err != nil {
		return load.Result{}, 0, err
	}
	r, err := load.Run(ctx, l, t)
	if err != nil {
		return load.Result{}, 0, err
	}
	after, err := cpu()
	return r, after - before, err
}
