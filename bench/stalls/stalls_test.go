package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"raft-key-value/bench/internal/load"
)

func TestOptions(t *testing.T) {
	for args, want := range map[string]string{
		"":                  "",
		"--quick":           "",
		"--quick --keys 10": "",
		"--keys 0":          "--keys",
		"--rate -1":         "--rate",
		"--clients 0":       "--clients",
		"--rounds 0":        "--rounds",
		"--disk-windows 0":  "--disk-windows",
		"--window 1ms":      "--window",
		"--log-bytes 1000":  "--log-bytes",
		"stray":             "stray",
	} {
		o, err := parseOptions(strings.Fields(args), io.Discard)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", args, err)
		}
		if args == "" && o.sizes.Keys != 1_000_000 || args == "--quick --keys 10" && (o.sizes.Keys != 10 || o.rounds != 1) {
			t.Errorf("%q: %+v", args, o)
		}
	}
}

// TestMeasure has all stalls happen to real clusters, for a moment.
func TestMeasure(t *testing.T) {
	o, err := parseOptions(strings.Fields("--quick --keys 1000 --rate 300 --clients 8 --window 100ms --disk-windows 3 --source ../.."), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	if err := run(t.Context(), o, &stdout, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"in memory 300 a second, durable 300 a second",
		"| log compaction ", "| new keys: maps grow ", "| a new learner catches up, in ", "| a follower is killed ", "| a follower stands still ",
		"| the leader hands over, and back ", "| a snapshot is written, durable ", "| a new segment, durable ",
	} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("no %q in\n%s", want, &stdout)
		}
	}
	if n := strings.Count(stdout.String(), " 1 → 1 |"); n != 5 {
		t.Errorf("%d stalls happened, of 5 that always do:\n%s", n, &stdout)
	}
}

// TestLook checks which files of a data directory tell what.
func TestLook(t *testing.T) {
	dir := t.TempDir()
	see := func(name string, wantSegment, wantSnapshot string, wantWriting bool) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if segment, snapshot, writing := look(dir); segment != wantSegment || snapshot != wantSnapshot || writing != wantWriting {
			t.Errorf("with %s: %q, %q, %v", name, segment, snapshot, writing)
		}
	}
	see("LOCK", "", "", false)
	see("identity.tmp", "", "", false)
	see("0000000000000001.wal", "0000000000000001.wal", "", false)
	see("0000000000000002.wal.tmp", "0000000000000001.wal", "", false)
	see("0000000000000002.wal", "0000000000000002.wal", "", false)
	see("000000000000000a-000000000000000b.snap", "0000000000000002.wal", "000000000000000a-000000000000000b.snap", false)
	see("000000000000000c.tmp", "0000000000000002.wal", "000000000000000a-000000000000000b.snap", true)
}

// TestColumns checks the figures of samples that are made up.
func TestColumns(t *testing.T) {
	s := &stall{name: "x"}
	for _, ms := range []int{10, 20, 30} {
		h := &load.Histogram{}
		h.Record(time.Duration(ms) * time.Millisecond)
		s.with.add(load.Result{Latency: h})
	}
	if got := strings.Join(s.columns(), " | "); !strings.HasPrefix(got, "x | 0 → 3 | - → 20.") || !strings.HasSuffix(got, "| - → 30.0 | - → 20.00") {
		t.Error(got)
	}
}
