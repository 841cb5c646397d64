package main

import (
	"context"
	"fmt"
	"io"
	"slices"

	"raft-key-value/bench/internal/load"
)

// bench has what is measured.
type bench struct {
	options
	stderr    io.Writer
	addresses []string // of the nodes under load
	kv        *load.KV
	echo      *load.KV // nil: bare RPC is not measured
}

// connect finds the nodes and makes all ready that is not to be measured.
func (b *bench) connect(ctx context.Context, echo string) (err error) {
	b.addresses = b.endpoints
	if b.target == "leader" {
		leader, err := load.Leader(ctx, b.endpoints, load.Identity{})
		if err != nil {
			return err
		}
		b.addresses = []string{leader}
		fmt.Fprintf(b.stderr, "the leader is %s\n", leader)
	}
	if b.kv, err = load.DialKV(b.addresses, b.connections, load.Identity{}); err != nil {
		return err
	}
	b.kv.Local = b.local
	if b.mode == "pipeline" {
		if err := b.kv.CheckPipeline(ctx); err != nil {
			return err
		}
	}
	if b.bare {
		if b.echo, err = load.DialKV([]string{echo}, b.connections, load.Identity{}); err != nil {
			return err
		}
	}
	if b.setShare < 1 && b.fill {
		fmt.Fprintf(b.stderr, "setting %s keys\n", load.Count(float64(b.sizes.Keys)))
		if err := load.Fill(ctx, b.kv, load.Options{Keys: b.sizes.Keys, KeySize: b.sizes.Key, Value: load.Value(b.sizes.Value), Progress: b.progress("fill")}); err != nil {
			return err
		}
	}
	if !b.sessions || b.setShare == 0 {
		return nil
	}
	clients := max(slices.Max(b.clients), b.bareClients)
	if b.echo != nil {
		if err := b.echo.OpenSessions(ctx, clients); err != nil {
			return err
		}
	}
	return b.kv.OpenSessions(ctx, slices.Max(b.clients))
}

func (b *bench) close() {
	for _, k := range []*load.KV{b.kv, b.echo} {
		if k != nil {
			k.Close()
		}
	}
}

// progress says once a second how a run goes.
func (b *bench) progress(what string) func(load.Result) {
	return func(r load.Result) {
		fmt.Fprintf(b.stderr, "%s: %s/s, p50 %s ms, p99 %s ms, errors %s\n", what, load.Count(r.Throughput()),
			load.Milliseconds(r.Latency.Quantile(.5)), load.Milliseconds(r.Latency.Quantile(.99)), load.Count(float64(r.Failed())))
	}
}

// bareLoad is the load on bare RPC that goes with one on the nodes.
func (b *bench) bareLoad(l load.Options) load.Options {
	if l.Pipeline {
		l.Pipeline, l.Depth = false, 1
	}
	if b.bareClients > 0 {
		l.Clients = b.bareClients
	}
	return l
}

// measure measures bare RPC and the nodes in turn.
func (b *bench) measure(ctx context.Context, l load.Options) (*point, error) {
	bareLoad := b.bareLoad(l)
	p := &point{Clients: l.Clients, Rate: l.Rate}
	target, bare := &series{}, &series{}
	for round := range b.rounds {
		if b.echo != nil {
			if err := b.round(ctx, bare, fmt.Sprintf("%s, round %d of %d, bare RPC", p.name(), round+1, b.rounds), bareLoad, b.echo); err != nil {
				return nil, err
			}
		}
		if err := b.round(ctx, target, fmt.Sprintf("%s, round %d of %d", p.name(), round+1, b.rounds), l, b.kv); err != nil {
			return nil, err
		}
	}
	p.Target = target.measurement()
	if b.echo != nil {
		p.Bare, p.BareClients = new(bare.measurement()), bareLoad.Clients
		p.Share = load.MedianRatio(target.throughputs, bare.throughputs)
	}
	return p, nil
}

// series are the rounds of one target.
type series struct {
	load.Result
	throughputs []float64
}

func (b *bench) round(ctx context.Context, s *series, what string, l load.Options, k *load.KV) error {
	l.Progress = b.progress(what + ", so far")
	r, err := load.Run(ctx, l, k)
	if err != nil {
		return err
	}
	b.progress(what)(r)
	s.Add(r)
	s.throughputs = append(s.throughputs, r.Throughput())
	return nil
}

// measurement sums a series up.
func (s *series) measurement() measurement {
	return measurement{Throughput: load.Median(s.throughputs), Latencies: load.LatenciesOf(s.Latency), Operations: s.Operations, Errors: s.Errors, Unsent: s.Unsent}
}
