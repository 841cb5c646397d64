package main

import (
	"fmt"
	"io"
	"time"

	"raft-key-value/bench/internal/load"
)

// explain says what the tables hold.
func (o *options) explain() string {
	return fmt.Sprintf(`
In each table one thing varies; the rest is %d nodes in memory, %d clients, keys of %d bytes, values of %d, %s keys.
Nodes and load share the machine. Medians of %d rounds of %v; latencies of all rounds, p50 / p99 / p99.9 in ms.
Share: of bare RPC of the same messages with as many clients in the same round. CPU: µs of all nodes for each operation.
`, base.nodes, base.clients, keySize, base.value, load.Count(float64(base.keys)), o.rounds, o.duration)
}

// write writes the table, in Markdown.
func (t *table) write(w io.Writer) {
	fmt.Fprintf(w, "\n### %s\n\n", t.title)
	rows := [][]string{{t.what, "Set/s", "share", "latency", "CPU", "Get/s", "share", "latency", "CPU"}}
	for _, p := range t.points {
		if p.leftOut != "" {
			continue
		}
		rows = append(rows, append(append([]string{t.label(p.setup)}, p.set.columns()...), p.get.columns()...))
	}
	load.Table(w, rows)
	for _, p := range t.points {
		if p.leftOut != "" {
			fmt.Fprintf(w, "\n%s: %s\n", t.label(p.setup), p.leftOut)
		}
		for i, s := range []*series{&p.set, &p.get} {
			if len(s.Errors) > 0 {
				fmt.Fprintf(w, "\nErrors of %s at %s: %s\n", []string{"Set", "Get"}[i], t.label(p.setup), load.Errors(s.Errors))
			}
		}
	}
}

func (s *series) columns() []string {
	cpu := "-"
	if s.Operations > 0 {
		cpu = load.Count(float64(s.cpu) / float64(time.Microsecond) / float64(s.Operations))
	}
	ms := func(q float64) string { return load.Milliseconds(s.Latency.Quantile(q)) }
	return []string{
		load.Count(load.Median(s.throughputs)), fmt.Sprintf("%.2f", load.MedianRatio(s.throughputs, s.bare)),
		fmt.Sprintf("%s / %s / %s", ms(.5), ms(.99), ms(.999)), cpu,
	}
}
