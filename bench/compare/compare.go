package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
)

// clusterSize is how many nodes each cluster has.
const clusterSize = 3

// compare has what is measured.
type compare struct {
	options
	dir     string // for all data
	tls     cluster.Identities
	binary  string // of the node
	stderr  io.Writer
	leftOut []string

	echo            *load.Echo
	pingPong        time.Duration
	bare            *load.KV
	memory, disk    *cluster.Ours // nil: left out
	noSync, sync    *etcd.Cluster // nil: left out
	fsync           time.Duration
	pipelineLeftOut bool
}

// startMachine makes certificates, if there are to be any, and measures the machine.
func (c *compare) startMachine(ctx context.Context) (err error) {
	if c.secure {
		if c.tls, err = cluster.MakeIdentities(ctx, c.binary, filepath.Join(c.dir, "certificates"), clusterSize); err != nil {
			return err
		}
	}
	if c.echo, err = load.StartEcho(c.sizes.Value, c.tls.Member(1)); err != nil {
		return err
	}
	if c.pingPong, err = c.echo.PingPong(); err != nil {
		return err
	}
	c.fsync, err = syncTime(c.dir)
	return err
}

// start starts all systems and makes all ready that is not to be measured.
func (c *compare) start(ctx context.Context) (err error) {
	if err := c.startMachine(ctx); err != nil {
		return err
	}
	if c.bare, err = load.DialKV([]string{c.echo.RPC}, cluster.Connections, c.tls.Client()); err != nil {
		return err
	}
	if err := c.startOurs(ctx); err != nil {
		return err
	}
	if c.etcd {
		fmt.Fprintf(c.stderr, "starting etcd %s\n", etcd.Version())
		if c.noSync, err = etcd.Start(ctx, c.config("etcd-memory", false)); err != nil {
			return err
		}
		if c.durable {
			if c.sync, err = etcd.Start(ctx, c.config("etcd-disk", true)); err != nil {
				return err
			}
		}
	}
	return c.prepare(ctx)
}

func (c *compare) startOurs(ctx context.Context) (err error) {
	fmt.Fprintln(c.stderr, "starting raft-key-value")
	if c.memory, err = cluster.StartOurs(ctx, c.config("memory", false)); err != nil {
		return err
	}
	if !c.durable {
		return nil
	}
	c.disk, err = cluster.StartOurs(ctx, c.config("disk", true))
	if errors.Is(err, cluster.ErrNoDataDir) {
		c.leaveOut("durable writes: %v", err)
		return nil
	}
	return err
}

func (c *compare) config(name string, durable bool) cluster.Config {
	return cluster.Config{Binary: c.binary, Dir: filepath.Join(c.dir, name), Size: clusterSize, Durable: durable, TLS: c.tls}
}

// leaveOut says what is not measured, now and with the result.
func (c *compare) leaveOut(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	fmt.Fprintf(c.stderr, "left out: %s\n", s)
	c.leftOut = append(c.leftOut, s)
}

// prepare sets all keys and opens sessions.
func (c *compare) prepare(ctx context.Context) error {
	fmt.Fprintln(c.stderr, "setting all keys")
	fill := load.Options{Keys: c.sizes.Keys, KeySize: c.sizes.Key, Value: load.Value(c.sizes.Value)}
	for _, t := range []load.Target{c.memory.KV, c.etcdTarget(c.noSync, false)} {
		if t != nil {
			if err := load.Fill(ctx, t, fill); err != nil {
				return err
			}
		}
	}
	if c.pipeline {
		if err := c.memory.CheckPipeline(ctx); errors.Is(err, load.ErrNoPipeline) {
			c.pipelineLeftOut = true
			c.leaveOut("streams: %v", err)
		} else if err != nil {
			return err
		}
	}
	if !c.sessions {
		return nil
	}
	kvs := []*load.KV{c.bare, c.memory.KV}
	if c.disk != nil {
		kvs = append(kvs, c.disk.KV)
	}
	for _, kv := range kvs {
		if err := kv.OpenSessions(ctx, slices.Max(c.clients)); err != nil {
			return err
		}
	}
	return nil
}

// etcdTarget is nil if there is no such cluster.
func (c *compare) etcdTarget(e *etcd.Cluster, serializable bool) load.Target {
	if e == nil {
		return nil
	}
	return etcd.Target{Cluster: e, Serializable: serializable}
}

// stop ends all that was started.
func (c *compare) stop() {
	if c.bare != nil {
		c.bare.Close()
	}
	for _, o := range []*cluster.Ours{c.memory, c.disk} {
		if o != nil {
			o.Stop()
		}
	}
	for _, e := range []*etcd.Cluster{c.noSync, c.sync} {
		if e != nil {
			e.Stop()
		}
	}
	if c.echo != nil {
		c.echo.Stop()
	}
}

// syncTime is the median time to write 4 KiB to the end of a file and sync it.
func syncTime(dir string) (time.Duration, error) {
	f, err := os.Create(filepath.Join(dir, "sync"))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	times := make([]time.Duration, 101)
	for i := range times {
		start := time.Now()
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		times[i] = time.Since(start)
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

// The names of what is measured.
const (
	bareSet, bareGet         = "bare RPC, Set", "bare RPC, Get"
	setMemory, setDisk       = "Set, in memory", "Set, durable"
	getRead, getLocal        = "Get, linearizable", "Get, local"
	etcdNoSync, etcdSync     = "etcd put, no fsync", "etcd put, fsync"
	etcdRead, etcdLocal      = "etcd range, linearizable", "etcd range, serializable"
	streamMemory, streamDisk = "Pipeline, in memory", "Pipeline, durable"
)

// cell is one system under one load, measured once in each round.
type cell struct {
	name        string
	target      load.Target
	load        load.Options
	run         func(context.Context, load.Options) (load.Result, error) // nil: target is put under load
	throughputs []float64
	result      load.Result
}

// plan lists what is measured in a round, in order: each after its ceiling.
func (c *compare) plan() (cells []*cell) {
	base := load.Options{Depth: 1, Warmup: c.warmup, Duration: c.duration, Keys: c.sizes.Keys, KeySize: c.sizes.Key, Value: load.Value(c.sizes.Value)}
	add := func(name string, t load.Target, clients int, setShare float64, depth int, pipeline bool) {
		o := base
		o.Clients, o.SetShare, o.Depth, o.Pipeline = clients, setShare, depth, pipeline
		cells = append(cells, &cell{name: name, target: t, load: o})
	}
	for _, n := range c.clients {
		add(bareSet, c.bare, n, 1, 1, false)
		add(setMemory, c.memory.KV, n, 1, 1, false)
		if c.noSync != nil {
			add(etcdNoSync, c.etcdTarget(c.noSync, false), n, 1, 1, false)
		}
		if c.disk != nil {
			add(setDisk, c.disk.KV, n, 1, 1, false)
		}
		if c.sync != nil {
			add(etcdSync, c.etcdTarget(c.sync, false), n, 1, 1, false)
		}
		add(bareGet, c.bare, n, 0, 1, false)
		add(getRead, c.memory.KV, n, 0, 1, false)
		if c.noSync != nil {
			add(etcdRead, c.etcdTarget(c.noSync, false), n, 0, 1, false)
		}
		add(getLocal, c.memory.Locally(), n, 0, 1, false)
		if c.noSync != nil {
			add(etcdLocal, c.etcdTarget(c.noSync, true), n, 0, 1, false)
		}
	}
	if c.pipeline && !c.pipelineLeftOut {
		add(streamMemory, c.memory.KV, 1, 1, c.depth, true)
		if c.disk != nil {
			add(streamDisk, c.disk.KV, 1, 1, c.depth, true)
		}
	}
	return cells
}

func (c *cell) measure(ctx context.Context) (load.Result, error) {
	if c.run != nil {
		return c.run(ctx, c.load)
	}
	return load.Run(ctx, c.load, c.target)
}

// measure measures all cells, round after round. Every other round goes
// backwards, so that what drifts hits all alike.
func (c *compare) measure(ctx context.Context, cells []*cell) error {
	done := 0
	for round := range c.rounds {
		order := slices.Clone(cells)
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, cell := range order {
			r, err := cell.measure(ctx)
			if err != nil {
				return err
			}
			cell.result.Add(r)
			cell.throughputs = append(cell.throughputs, r.Throughput())
			done++
			fmt.Fprintf(c.stderr, "%d/%d: %d clients, %s: %s/s, errors %s\n", done, len(cells)*c.rounds, cell.load.Clients, cell.name, load.Count(r.Throughput()), load.Count(float64(r.Failed())))
		}
	}
	return nil
}
