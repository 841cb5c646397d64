// Bench puts a cluster that runs under load and says how fast it is, beside bare
// RPC: a unary gRPC call of the same messages to a process that does nothing.
//
//	cd bench && go run . --endpoints 127.0.0.1:21001,127.0.0.1:21002,127.0.0.1:21003
//
// Four other programs start all that they measure, each from its directory:
//
//	go run ./compare    this store beside etcd
//	go run ./growth     more nodes, larger values, more clients, more keys
//	go run ./stalls     how long sets take while something might hold them up
//	go run ./memory     what keys, connections and clients cost
//
// They are programs and not sub-commands of one, because that one would link
// etcd: 60 modules in place of 8. Only compare and memory need it. What the
// programs have in common is in internal/.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"raft-key-value/bench/internal/load"
)

// options are the program's settings.
type options struct {
	endpoints   []string
	op          string
	setShare    float64
	sizes       load.Sizes
	clients     []int
	rates       []float64
	connections int
	depth       int
	mode        string
	target      string
	local       bool
	sessions    bool
	fill        bool
	duration    time.Duration
	warmup      time.Duration
	rounds      int
	bare        bool
	bareClients int
	output      string
	plot        string
}

func main() { os.Exit(load.Main("bench", load.Execute(parseOptions, run))) }

// What --plot draws if no clients are named: with pipelines, as many as have
// half of the operations in flight that a node takes.
const pipelineSweep, sweep = "1,2,4,8,16,32", pipelineSweep + ",64,128,256,512"

// parseOptions reads the settings.
func parseOptions(args []string, stderr io.Writer) (options, error) {
	o := options{}
	fs := load.NewFlags("bench", "puts a raft-key-value cluster under load. See also ./compare, ./growth, ./stalls and ./memory.", stderr)
	endpoints := fs.String("endpoints", "127.0.0.1:21001", "`host:port,...` of nodes")
	fs.StringVar(&o.op, "op", "set", "set, get or mixed")
	fs.Float64Var(&o.setShare, "set-share", .5, "share of sets in mixed")
	load.SizeFlags(fs, &o.sizes, 10_000)
	clients := fs.String("clients", "", "how many at once; `n,...` measures one after the other (default 64, or 8 pipelines; with --plot "+sweep+", or pipelines to 32)")
	rates := fs.String("rate", "", "operations a second of all clients, whether they are answered or not; `n,...` measures one after the other (default: each client's next operation follows its last)")
	fs.IntVar(&o.connections, "connections", 16, "the most connections; never more than clients")
	fs.IntVar(&o.depth, "depth", 0, "operations in flight of each client (default 1; in a pipeline 1000)")
	fs.StringVar(&o.mode, "mode", "unary", "unary, or pipeline: a stream for each client")
	fs.StringVar(&o.target, "target", "leader", "leader: the node that leads, whether it is an endpoint or not; all: every one of --endpoints, and no other node, with its share of the connections")
	fs.BoolVar(&o.local, "local", false, "read what the called node has applied")
	fs.BoolVar(&o.sessions, "sessions", true, "give writes ids, so that they take effect once")
	fs.BoolVar(&o.fill, "fill", true, "set every key once before keys are read")
	fs.DurationVar(&o.duration, "duration", 10*time.Second, "time of each measurement, all rounds together")
	fs.DurationVar(&o.warmup, "warmup", 250*time.Millisecond, "time before each round that does not count")
	fs.IntVar(&o.rounds, "rounds", 5, "rounds of bare RPC and target in turn; the median counts")
	fs.BoolVar(&o.bare, "bare", true, "measure bare RPC, too")
	fs.IntVar(&o.bareClients, "bare-clients", 0, "clients of bare RPC (default: as of the target; for a pipeline 256)")
	fs.StringVar(&o.output, "o", "text", "text or json")
	fs.StringVar(&o.plot, "plot", "", "`file.svg` for a picture of latency against throughput")
	if err := load.ParseFlags(fs, args); err != nil {
		return o, err
	}
	for e := range strings.SplitSeq(*endpoints, ",") {
		o.endpoints = append(o.endpoints, strings.TrimSpace(e))
	}
	if draw, pipeline := o.plot != "" && *rates == "", o.mode == "pipeline"; *clients == "" {
		switch {
		case draw && pipeline:
			*clients = pipelineSweep
		case draw:
			*clients = sweep
		case pipeline:
			*clients = "8"
		default:
			*clients = "64"
		}
	}
	var err error
	if o.clients, err = load.ParseList(*clients, strconv.Atoi); err != nil {
		return o, fmt.Errorf("--clients: %w", err)
	}
	if *rates != "" {
		if o.rates, err = load.ParseList(*rates, func(s string) (float64, error) { return strconv.ParseFloat(s, 64) }); err != nil {
			return o, fmt.Errorf("--rate: %w", err)
		}
	}
	o.defaults()
	return o, o.check()
}

// defaults fills in what depends on other settings.
func (o *options) defaults() {
	if o.depth == 0 && o.mode == "pipeline" {
		o.depth = 1000
	} else if o.depth == 0 {
		o.depth = 1
	}
	if o.bareClients == 0 && o.mode == "pipeline" {
		o.bareClients = 256
	}
	switch o.op {
	case "set":
		o.setShare = 1
	case "get":
		o.setShare = 0
	}
}

func (o *options) check() error {
	oneOf := func(v string, of ...string) bool {
		for _, s := range of {
			if v == s {
				return true
			}
		}
		return false
	}
	switch {
	case !oneOf(o.op, "set", "get", "mixed"):
		return fmt.Errorf("--op %q is not set, get or mixed", o.op)
	case !oneOf(o.mode, "unary", "pipeline"):
		return fmt.Errorf("--mode %q is not unary or pipeline", o.mode)
	case !oneOf(o.target, "leader", "all"):
		return fmt.Errorf("--target %q is not leader or all", o.target)
	case !oneOf(o.output, "text", "json"):
		return fmt.Errorf("-o %q is not text or json", o.output)
	case !(o.setShare >= 0 && o.setShare <= 1):
		return fmt.Errorf("--set-share %v is not between 0 and 1", o.setShare)
	case o.connections < 1 || o.connections > 10_000:
		return fmt.Errorf("--connections %d is not between 1 and 10000", o.connections)
	case o.depth < 1 || o.depth > 65536:
		return fmt.Errorf("--depth %d is not between 1 and 65536", o.depth)
	case o.sessions && o.setShare > 0 && o.depth > 1000:
		return fmt.Errorf("--depth %d: a session remembers 1024 writes, so 1000 may be in flight; or --sessions=false", o.depth)
	case o.rounds < 1 || o.warmup < 0 || o.duration/time.Duration(o.rounds) < 10*time.Millisecond:
		return fmt.Errorf("--duration %v in %d --rounds leaves less than 10ms for each", o.duration, o.rounds)
	case len(o.rates) > 0 && len(o.clients) > 1:
		return errors.New("either --clients or --rate may be a list")
	}
	for _, r := range o.rates {
		if !(r > 0 && r <= 1e7) {
			return fmt.Errorf("--rate %v is not between 0 and 10000000", r)
		}
	}
	return cmp.Or(o.sizes.Check(), load.CheckClients(o.clients))
}

// run measures and reports.
func run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	echo, err := load.StartEcho(o.sizes.Value, load.Identity{})
	if err != nil {
		return err
	}
	defer echo.Stop()
	pingPong, err := echo.PingPong()
	if err != nil {
		return err
	}
	b := &bench{options: o, stderr: stderr}
	defer b.close()
	if err := b.connect(ctx, echo.RPC); err != nil {
		return err
	}
	rep := &report{Machine: load.ThisMachine(pingPong), Settings: o.settings(b.addresses)}
	for _, l := range o.loads() {
		p, err := b.measure(ctx, l)
		if err != nil {
			return err
		}
		rep.Points = append(rep.Points, p)
	}
	err = rep.write(stdout, o.output)
	if o.plot != "" {
		err = errors.Join(err, os.WriteFile(o.plot, rep.svg(), 0o644))
	}
	return err
}

// loads are the points to be measured.
func (o *options) loads() (loads []load.Options) {
	base := load.Options{
		Clients: o.clients[0], Depth: o.depth, Pipeline: o.mode == "pipeline", Warmup: o.warmup, Duration: o.duration / time.Duration(o.rounds),
		SetShare: o.setShare, Keys: o.sizes.Keys, KeySize: o.sizes.Key, Value: load.Value(o.sizes.Value),
	}
	for _, r := range o.rates {
		base.Rate = r
		loads = append(loads, base)
	}
	if len(o.rates) > 0 {
		return loads
	}
	for _, c := range o.clients {
		base.Clients = c
		loads = append(loads, base)
	}
	return loads
}
