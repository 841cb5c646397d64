package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
)

// report is all that was measured; -o json writes it as it is.
type report struct {
	head
	Clients []int     `json:"clients"`
	Page    int       `json:"page,omitempty"` // of --ranges
	Cells   []*result `json:"cells"`
}

// head is what all reports begin with.
type head struct {
	Machine   load.Machine `json:"machine"`
	FsyncUs   float64      `json:"fsync_us"`
	Etcd      string       `json:"etcd,omitempty"`
	KeySize   int          `json:"key_size"`
	ValueSize int          `json:"value_size"`
	Keys      uint64       `json:"keys"`
	Sessions  bool         `json:"sessions"`
	TLS       bool         `json:"tls"`
	Rounds    int          `json:"rounds"`
	Seconds   float64      `json:"seconds"`
	LeftOut   []string     `json:"left_out,omitempty"`
}

// result is a cell, measured.
type result struct {
	Name       string    `json:"name"`
	Clients    int       `json:"clients"`
	InFlight   int       `json:"in_flight"`
	Throughput float64   `json:"throughput"`
	Rounds     []float64 `json:"rounds"`
	load.Latencies
	Errors map[string]uint64 `json:"errors,omitempty"`
	// Medians of the ratios in each round; 0: not measured.
	ShareOfBare float64 `json:"share_of_bare,omitempty"`
	TimesEtcd   float64 `json:"times_etcd,omitempty"`
}

// ceilings and rivals name what each is compared with.
var (
	ceilings = map[string]string{
		setMemory: bareSet, setDisk: bareSet, etcdNoSync: bareSet, etcdSync: bareSet,
		getRead: bareGet, getLocal: bareGet, etcdRead: bareGet, etcdLocal: bareGet,
		streamMemory: bareSet, streamDisk: bareSet,
	}
	rivals = map[string]string{
		setMemory: etcdNoSync, setDisk: etcdSync, getRead: etcdRead, getLocal: etcdLocal,
		streamMemory: etcdNoSync, streamDisk: etcdSync,
		listRange: etcdRange, listPrefix: etcdPrefix, scanAll: etcdStream, deleteRange: etcdDelete,
	}
)

// head is the head of a report.
func (c *compare) head() head {
	h := head{
		Machine: load.ThisMachine(c.pingPong), FsyncUs: float64(c.fsync) / float64(time.Microsecond),
		KeySize: c.sizes.Key, ValueSize: c.sizes.Value, Keys: c.sizes.Keys, Sessions: c.sessions, TLS: c.secure, Rounds: c.rounds, Seconds: c.duration.Seconds(),
		LeftOut: c.leftOut,
	}
	if c.etcd {
		h.Etcd = etcd.Version()
	}
	return h
}

// report compares the cells with each other.
func (c *compare) report(cells []*cell) *report {
	r := &report{head: c.head(), Clients: c.clients}
	if c.ranges {
		r.Page = c.page
	}
	find := func(name string, clients int) []float64 {
		for _, o := range cells {
			if o.name == name && o.load.Clients == clients {
				return o.throughputs
			}
		}
		return nil
	}
	for _, o := range cells {
		ceiling, rival := find(ceilings[o.name], o.load.Clients), find(rivals[o.name], o.load.Clients)
		if o.load.Pipeline {
			// A stream is compared with bare RPC at 256 clients, and with the best of etcd.
			ceiling, rival = find(ceilings[o.name], pipelineCeiling), nil
			for _, n := range c.clients {
				if v := find(rivals[o.name], n); load.Median(v) > load.Median(rival) {
					rival = v
				}
			}
		}
		r.Cells = append(r.Cells, &result{
			Name: o.name, Clients: o.load.Clients, InFlight: o.load.Clients * o.load.Depth, Throughput: load.Median(o.throughputs), Rounds: o.throughputs,
			Latencies: load.LatenciesOf(o.result.Latency), Errors: o.result.Errors,
			ShareOfBare: load.MedianRatio(o.throughputs, ceiling), TimesEtcd: load.MedianRatio(o.throughputs, rival),
		})
	}
	return r
}

// pipelineCeiling is with how many clients of bare RPC a stream is compared.
const pipelineCeiling = 256

func (r *report) find(name string, clients int) *result {
	i := slices.IndexFunc(r.Cells, func(c *result) bool { return c.Name == name && c.Clients == clients })
	if i < 0 {
		return nil
	}
	return r.Cells[i]
}

func (r *report) write(w io.Writer, format string) error {
	if format == "json" {
		return writeJSON(w, r)
	}
	r.head.write(w)
	if r.Etcd != "" {
		fmt.Fprintf(w, "× is the multiple of etcd %s that does the same.\n", r.Etcd)
	}
	if r.Page > 0 {
		r.writeRanges(w)
	} else {
		r.writeSingle(w)
	}
	for _, c := range r.Cells {
		if len(c.Errors) > 0 {
			fmt.Fprintf(w, "Errors of %s, clients %d: %s\n", c.Name, c.Clients, load.Errors(c.Errors))
		}
	}
	return nil
}

func writeJSON(w io.Writer, r any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// write tells of the machine and of what was done.
func (r *head) write(w io.Writer) {
	fmt.Fprintf(w, "\n%s; write and fsync of 4 KiB: %.0f µs\n", r.Machine, r.FsyncUs)
	fmt.Fprintf(w, "Three nodes and the load on this machine; keys of %d bytes, values of %d, %s keys; ", r.KeySize, r.ValueSize, load.Count(float64(r.Keys)))
	if r.Sessions {
		fmt.Fprintf(w, "writes with ids; ")
	} else {
		fmt.Fprintf(w, "writes without ids; ")
	}
	if r.TLS {
		fmt.Fprintf(w, "all over TLS 1.3; ")
	}
	fmt.Fprintf(w, "medians of %d rounds of %v s.\n", r.Rounds, r.Seconds)
	for _, s := range r.LeftOut {
		fmt.Fprintf(w, "Left out: %s\n", s)
	}
}

// writeSingle tells of single keys.
func (r *report) writeSingle(w io.Writer) {
	fmt.Fprintf(w, "\nShare of bare RPC:\n\n")
	load.Table(w, r.table([]string{setMemory, getRead, getLocal, setDisk, etcdNoSync, etcdRead, etcdLocal, etcdSync}, (*result).share))
	fmt.Fprintf(w, "\nOperations a second (p50/p99 in ms):\n\n")
	load.Table(w, r.table([]string{bareSet, setMemory, etcdNoSync, setDisk, etcdSync, bareGet, getRead, etcdRead, getLocal, etcdLocal}, (*result).figures))
	r.writeStreams(w)
}

// table has a row for each name that was measured, and a column for each
// number of clients.
func (r *report) table(names []string, show func(*result) string) [][]string {
	rows := [][]string{{"clients"}}
	for _, n := range r.Clients {
		rows[0] = append(rows[0], load.Count(float64(n)))
	}
	for _, name := range names {
		if r.find(name, r.Clients[0]) == nil {
			continue
		}
		row := []string{name}
		for _, n := range r.Clients {
			row = append(row, show(r.find(name, n)))
		}
		rows = append(rows, row)
	}
	return rows
}

func (c *result) share() string {
	s := fmt.Sprintf("%.2f", c.ShareOfBare)
	if c.TimesEtcd > 0 {
		s += fmt.Sprintf(" · %.1f×", c.TimesEtcd)
	}
	return s
}

func (c *result) figures() string {
	return fmt.Sprintf("%s (%s/%s)", load.Count(c.Throughput), milliseconds(c.P50), milliseconds(c.P99))
}

// milliseconds writes milliseconds to three digits.
func milliseconds(v float64) string {
	return load.Milliseconds(time.Duration(v * float64(time.Millisecond)))
}

// writeStreams tells of streams, if they were measured.
func (r *report) writeStreams(w io.Writer) {
	rows := [][]string{{"one stream", "ops/s (p50/p99 in ms)", fmt.Sprintf("of bare RPC at %d clients", pipelineCeiling), "of etcd's best put"}}
	for _, name := range []string{streamMemory, streamDisk} {
		if c := r.find(name, 1); c != nil {
			rows = append(rows, []string{fmt.Sprintf("%s, %s sets in flight", name, load.Count(float64(c.InFlight))), c.figures(), times(c.ShareOfBare), times(c.TimesEtcd)})
		}
	}
	if len(rows) > 1 {
		fmt.Fprintln(w)
		load.Table(w, rows)
	}
}

// times is a multiple; 0: not measured.
func times(v float64) string {
	if v == 0 {
		return "not measured"
	}
	return fmt.Sprintf("%.1f×", v)
}
