package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
	"raft-key-value/kvpb"
)

// collectTimeout bounds the wait for a process to collect its garbage.
const collectTimeout = time.Minute

// memory has what is measured.
type memory struct {
	options
	dir, binary    string
	stdout, stderr io.Writer
}

// system is a member of a cluster of one.
type system struct {
	name string
	pid  int
	log  string // where its collections are
	load.Target
	fill func(context.Context) error
}

// footprint is what a process takes, in bytes.
type footprint struct {
	cluster.Memory
	heap int64 // in use at the last collection
}

// keys measures what a key costs.
func (m *memory) keys(ctx context.Context) error {
	value := load.Value(m.sizes.Value)
	node, err := cluster.StartOurs(ctx, cluster.Config{Binary: m.binary, Dir: filepath.Join(m.dir, "node"), Size: 1})
	if err != nil {
		return err
	}
	defer node.Stop()
	raw := m.sizes.Key + m.sizes.Value
	rows := [][]string{{fmt.Sprintf("bytes per key (raw data: %d)", raw), "heap in use", "RSS", "of it files' pages"}}
	measure := func(s system) error {
		row, err := m.perKey(ctx, s)
		rows = append(rows, row)
		return err
	}
	if err := measure(system{"node", node.Leader.PID(), node.Leader.Log(), node.KV, func(ctx context.Context) error {
		return load.Fill(ctx, node.KV, load.Options{Pipeline: true, Keys: m.sizes.Keys, KeySize: m.sizes.Key, Value: value})
	}}); err != nil {
		return err
	}
	metrics, err := node.Admin.Metrics(ctx, &kvpb.MetricsRequest{})
	if err != nil {
		return err
	}
	node.Stop()
	if m.etcd {
		if err := m.etcdKeys(ctx, value, measure); err != nil {
			return err
		}
	}
	fmt.Fprintf(m.stdout, "%s keys of %d bytes with values of %d, in a cluster of one in memory; less what it takes with one key. RSS %v after the load, which ends with reads.\nThe node's log, which goes up to --log-bytes and then no further, is %.0f of its bytes.\n\n",
		load.Count(float64(m.sizes.Keys)), m.sizes.Key, m.sizes.Value, m.pause, float64(metrics.LogBytes)/float64(m.sizes.Keys))
	load.Table(m.stdout, rows)
	return nil
}

func (m *memory) etcdKeys(ctx context.Context, value []byte, measure func(system) error) error {
	path := filepath.Join(m.dir, "etcd.log")
	log, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	e, err := etcd.Start(ctx, cluster.Config{Dir: filepath.Join(m.dir, "etcd"), Size: 1, Stderr: log})
	if err != nil {
		return err
	}
	defer e.Stop()
	return measure(system{"etcd " + etcd.Version() + " member", e.Members[0].PID(), path, etcd.Target{Cluster: e}, func(ctx context.Context) error {
		return e.Fill(ctx, load.Options{Keys: m.sizes.Keys, KeySize: m.sizes.Key, Value: value})
	}})
}

// perKey fills a system with keys, and is a row of what that took.
func (m *memory) perKey(ctx context.Context, s system) ([]string, error) {
	one := load.Options{Keys: 1, KeySize: m.sizes.Key, Value: load.Value(m.sizes.Value)}
	if err := load.Fill(ctx, s.Target, one); err != nil {
		return nil, err
	}
	fmt.Fprintf(m.stderr, "%s: one key\n", s.name)
	before, err := m.footprint(ctx, s, one)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(m.stderr, "%s: setting %s keys\n", s.name, load.Count(float64(m.sizes.Keys)))
	if err := s.fill(ctx); err != nil {
		return nil, err
	}
	one.Keys = m.sizes.Keys
	after, err := m.footprint(ctx, s, one)
	each := func(after, before int64) string {
		return load.Count(float64(after-before) / float64(m.sizes.Keys))
	}
	return []string{s.name, each(after.heap, before.heap), each(after.RSS, before.RSS), each(after.File, before.File)}, err
}

// footprint reads until a process has collected its garbage twice, for what a
// collection finds in use may have been given up while it ran, and looks at the
// process some time after that.
func (m *memory) footprint(ctx context.Context, s system, reads load.Options) (f footprint, err error) {
	reads.Clients, reads.Depth, reads.Duration = 16, 1, 100*time.Millisecond
	first, _, err := collections(s.log)
	for begin := time.Now(); err == nil && time.Since(begin) < collectTimeout; {
		if _, err = load.Run(ctx, reads, s.Target); err != nil {
			break
		}
		var n int
		if n, f.heap, err = collections(s.log); n >= first+2 {
			load.Wait(ctx, m.pause)
			f.Memory, err = cluster.MemoryOf(s.pid)
			return f, err
		}
	}
	return f, errors.Join(err, fmt.Errorf("%s did not collect its garbage in %v", s.name, collectTimeout))
}

var gcLine = regexp.MustCompile(`(?m)^gc (\d+) @.* \d+->\d+->(\d+) MB, `)

// collections says how many there were, and what was in use after the last: see
// gctrace of the package runtime.
func collections(log string) (n int, inUse int64, err error) {
	text, err := os.ReadFile(log)
	if err != nil {
		return 0, 0, err
	}
	all := gcLine.FindAllSubmatch(text, -1)
	if len(all) == 0 {
		return 0, 0, nil
	}
	last := all[len(all)-1]
	if n, err = strconv.Atoi(string(last[1])); err != nil {
		return 0, 0, err
	}
	inUse, err = strconv.ParseInt(string(last[2]), 10, 64)
	return n, inUse << 20, err
}
