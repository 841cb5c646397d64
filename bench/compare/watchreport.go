package main

import (
	"fmt"
	"io"

	"raft-key-value/bench/internal/load"
)

// watchReport is all that --watches measured; -o json writes it as it is.
type watchReport struct {
	head
	Writers     int            `json:"writers"`
	Connections int            `json:"connections"`
	Rate        float64        `json:"rate"`
	PrefixRate  float64        `json:"prefix_rate"`
	Cells       []*watchResult `json:"cells"`
}

// watchResult is a cell, measured.
type watchResult struct {
	Name     string `json:"name"`
	Watchers int    `json:"watchers"`
	Prefix   bool   `json:"prefix"`
	shape    watchShape
	// Of the events of the writes that were timed, in all rounds.
	AfterAnswer load.Latencies `json:"after_answer"`
	AfterCall   load.Latencies `json:"after_call"`
	Early       float64        `json:"early"` // the share that came before the answer
	// Medians of the rounds.
	BytesEach    float64           `json:"bytes_per_watcher"`
	SetsPerS     float64           `json:"sets_per_s"`
	EventsPerS   float64           `json:"events_per_s"`
	OfUnwatched  float64           `json:"of_unwatched,omitempty"` // sets, of those without watchers in the same round
	Rounds       []float64         `json:"rounds"`                 // sets a second
	MemoryRounds []float64         `json:"memory_rounds"`          // bytes per watcher
	Errors       map[string]uint64 `json:"errors,omitempty"`
}

func (c *compare) watchReport(cells []*watchCell) *watchReport {
	r := &watchReport{
		head: c.head(), Writers: c.clients[0], Connections: c.watching.connections,
		Rate: c.watching.rate, PrefixRate: c.watching.prefixRate,
	}
	unwatched := map[string][]float64{}
	for _, o := range cells {
		if o.shape.watchers == 0 {
			unwatched[o.store] = o.sets
		}
	}
	for _, o := range cells {
		v := &watchResult{
			Name: o.name, Watchers: o.shape.watchers, Prefix: o.shape.prefix, shape: o.shape,
			AfterAnswer: load.LatenciesOf(&o.afterAnswer), AfterCall: load.LatenciesOf(&o.afterCall),
			BytesEach: load.Median(o.bytesEach), MemoryRounds: o.bytesEach,
			SetsPerS: load.Median(o.sets), EventsPerS: load.Median(o.events), Rounds: o.sets,
			Errors: o.errors,
		}
		if o.timed > 0 {
			v.Early = float64(o.early) / float64(o.timed)
		}
		if o.shape.watchers > 0 {
			v.OfUnwatched = load.MedianRatio(o.sets, unwatched[o.store])
		}
		r.Cells = append(r.Cells, v)
	}
	return r
}

// leastForMemory is the fewest watchers whose memory is more than noise.
const leastForMemory = 1000

func (r *watchReport) write(w io.Writer, format string) error {
	if format == "json" {
		return writeJSON(w, r)
	}
	r.head.write(w)
	if r.Etcd != "" {
		fmt.Fprintf(w, "Beside etcd %s. ", r.Etcd)
	}
	fmt.Fprintf(w, "Each cluster was started for one measurement. Watchers share up to %d connections. Latency is of events of one writer: of keys with watchers of their own at %s writes a second, of the prefix at %s.\n",
		r.Connections, load.Count(r.Rate), load.Count(r.PrefixRate))
	fmt.Fprintf(w, "Sets are of %d clients, of any key: %d of them have the prefix.\n\n", r.Writers, prefixKeys)
	rows := [][]string{{"watchers", "", "event after the answer, p50/p99 ms", "before it", "after the call, p50/p99 ms", "KiB each", "sets/s", "of those unwatched", "events/s"}}
	for _, c := range r.Cells {
		rows = append(rows, c.row())
	}
	load.Table(w, rows)
	for _, c := range r.Cells {
		if len(c.Errors) > 0 {
			fmt.Fprintf(w, "Errors of %s, watchers %v: %s\n", c.Name, c.shape, load.Errors(c.Errors))
		}
	}
	return nil
}

func (c *watchResult) row() []string {
	row := []string{c.shape.String(), c.Name}
	if c.Watchers == 0 {
		return append(row, "", "", "", "", load.Count(c.SetsPerS), "", "")
	}
	memory := ""
	if c.Watchers >= leastForMemory {
		memory = fmt.Sprintf("%.1f", c.BytesEach/1024)
	}
	both := func(l load.Latencies) string { return milliseconds(l.P50) + "/" + milliseconds(l.P99) }
	return append(row, both(c.AfterAnswer), fmt.Sprintf("%.0f %%", 100*c.Early), both(c.AfterCall), memory,
		load.Count(c.SetsPerS), fmt.Sprintf("%.2f", c.OfUnwatched), load.Count(c.EventsPerS))
}
