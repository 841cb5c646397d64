package etcd

import (
	"testing"

	"raft-key-value/bench/internal/load"
)

// TestEnds: a prefix is the range up to the first key that has it no more.
func TestEnds(t *testing.T) {
	for r, want := range map[load.Range][2]string{
		{Start: "a", End: "b"}: {"a", "b"},
		{Prefix: "bench-"}:     {"bench-", "bench."},
		{Prefix: "bench-09"}:   {"bench-09", "bench-0:"},
	} {
		start, end := ends(r)
		if got := [2]string{string(start), string(end)}; got != want {
			t.Errorf("%+v: %q, want %q", r, got, want)
		}
	}
}
