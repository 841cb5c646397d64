package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"raft-key-value/bench/internal/load"
)

// report is all that was measured; -o json writes it as it is.
type report struct {
	Machine  load.Machine `json:"machine"`
	Settings settings     `json:"settings"`
	Points   []*point     `json:"points"`
}

type settings struct {
	Addresses   []string `json:"addresses"`
	Op          string   `json:"op"`
	SetShare    float64  `json:"set_share"`
	KeySize     int      `json:"key_size"`
	ValueSize   int      `json:"value_size"`
	Keys        uint64   `json:"keys"`
	Connections int      `json:"connections"`
	Depth       int      `json:"depth"`
	Mode        string   `json:"mode"`
	Target      string   `json:"target"`
	Local       bool     `json:"local"`
	Sessions    bool     `json:"sessions"`
	Seconds     float64  `json:"seconds"`
	Rounds      int      `json:"rounds"`
}

func (o *options) settings(addresses []string) settings {
	return settings{addresses, o.op, o.setShare, o.sizes.Key, o.sizes.Value, o.sizes.Keys, o.connections, o.depth, o.mode, o.target, o.local, o.sessions, o.duration.Seconds(), o.rounds}
}

// point is one load.
type point struct {
	Clients     int          `json:"clients"`
	Rate        float64      `json:"rate,omitempty"`
	Target      measurement  `json:"target"`
	BareClients int          `json:"bare_clients,omitempty"`
	Bare        *measurement `json:"bare,omitempty"`
	Share       float64      `json:"share_of_bare,omitempty"`
}

type measurement struct {
	Throughput float64 `json:"throughput"`
	load.Latencies
	Operations uint64            `json:"operations"`
	Errors     map[string]uint64 `json:"errors,omitempty"`
	Unsent     uint64            `json:"unsent,omitempty"`
}

// name is what tells a point from others.
func (p *point) name() string {
	if p.Rate > 0 {
		return load.Count(p.Rate) + "/s"
	}
	if p.Clients == 1 {
		return "1 client"
	}
	return load.Count(float64(p.Clients)) + " clients"
}

func (r *report) write(w io.Writer, format string) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	s := r.Settings
	fmt.Fprintf(w, "\n%s\n", r.Machine)
	fmt.Fprintf(w, "%s, keys of %d bytes, values of %d; %s, %d in flight each; %s: %s\n\n", r.operations(), s.KeySize, s.ValueSize, s.Mode, s.Depth, s.Target, strings.Join(s.Addresses, ", "))
	rows := [][]string{{"", "ops/s", "of bare RPC", "p50 ms", "p90", "p99", "p99.9", "max", "errors", "bare RPC/s", "p50 ms", "p99"}}
	for _, p := range r.Points {
		rows = append(rows, p.row())
	}
	load.Table(w, rows)
	for _, p := range r.Points {
		for _, m := range []struct {
			what string
			*measurement
		}{{"", &p.Target}, {"bare RPC, ", p.Bare}} {
			if m.measurement != nil && len(m.Errors) > 0 {
				fmt.Fprintf(w, "%s%s: errors: %s\n", m.what, p.name(), load.Errors(m.Errors))
			}
			if m.measurement != nil && m.Unsent > 0 {
				fmt.Fprintf(w, "%s%s: %s were due and not sent: no client was free; they count in the latency with the time that they waited\n", m.what, p.name(), load.Count(float64(m.Unsent)))
			}
		}
	}
	return nil
}

func (p *point) row() []string {
	ms := func(v float64) string { return load.Milliseconds(time.Duration(v * float64(time.Millisecond))) }
	t := p.Target
	failed := uint64(0)
	for _, n := range t.Errors {
		failed += n
	}
	row := []string{p.name(), load.Count(t.Throughput), "", ms(t.P50), ms(t.P90), ms(t.P99), ms(t.P999), ms(t.Max), load.Count(float64(failed)), "", "", ""}
	if p.Bare != nil {
		row[2] = fmt.Sprintf("%.2f", p.Share)
		row[9], row[10], row[11] = load.Count(p.Bare.Throughput), ms(p.Bare.P50), ms(p.Bare.P99)
	}
	return row
}

// operations describes what was done.
func (r *report) operations() string {
	reads := "linearizable gets"
	if r.Settings.Local {
		reads = "local gets"
	}
	switch r.Settings.SetShare {
	case 1:
		return "sets"
	case 0:
		return reads
	}
	return fmt.Sprintf("%.0f %% sets, %s", 100*r.Settings.SetShare, reads)
}
