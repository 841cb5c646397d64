package main

import (
	"fmt"
	"io"
	"strings"

	"raft-key-value/bench/internal/load"
)

// write writes the table, in Markdown.
func (s *stalls) write(w io.Writer) {
	fmt.Fprintf(w, `Latency of sets in ms, without → with, at %s keys of %d bytes with values of %d.
Three nodes and the load on one machine; sets come at a fixed rate (%s) and count from when they are due.
p50 to max are of the samples of all windows together; the last column is the median of the windows' own p99.9.

`, load.Count(float64(s.sizes.Keys)), s.sizes.Key, s.sizes.Value, strings.Join(s.rates, ", "))
	rows := [][]string{{"", "windows", "p50", "p99", "p99.9", "max", "p99.9 of a window"}}
	for _, row := range s.rows {
		rows = append(rows, row.columns())
	}
	load.Table(w, rows)
	for _, row := range s.rows {
		for i, m := range []*samples{&row.without, &row.with} {
			if len(m.Errors) > 0 || m.Unsent > 0 {
				fmt.Fprintf(w, "\n%s, %s: %s due and not sent; errors: %s\n", row.name, []string{"without", "with"}[i], load.Count(float64(m.Unsent)), load.Errors(m.Errors))
			}
		}
	}
}

func (s *stall) columns() []string {
	columns := []string{s.name, fmt.Sprintf("%d → %d", len(s.without.p999), len(s.with.p999))}
	figures := func(m *samples) []string {
		if m.Latency == nil {
			return []string{"-", "-", "-", "-", "-"}
		}
		ms := func(q float64) string { return load.Milliseconds(m.Latency.Quantile(q)) }
		return []string{ms(.5), ms(.99), ms(.999), load.Milliseconds(m.Latency.Max()), fmt.Sprintf("%.2f", load.Median(m.p999))}
	}
	without, with := figures(&s.without), figures(&s.with)
	for i := range without {
		columns = append(columns, without[i]+" → "+with[i])
	}
	return columns
}
