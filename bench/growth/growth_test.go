package main

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"raft-key-value/bench/internal/load"
)

// TestMain makes the test the echo process, too.
func TestMain(m *testing.M) {
	if served, _ := load.ServeEcho(os.Args[1:]); !served {
		os.Exit(m.Run())
	}
}

func TestOptions(t *testing.T) {
	for args, want := range map[string]string{
		"":                                      "",
		"--quick":                               "",
		"--nodes= --values= --clients= --keys=": "",
		"--nodes 0":                             "--nodes",
		"--nodes x":                             "--nodes",
		"--values -1":                           "--values",
		"--values 1048577":                      "--values",
		"--clients 0":                           "--clients",
		"--keys 0":                              "--keys",
		"--rounds 0":                            "--rounds",
		"--duration 1ms":                        "--duration",
		"--warmup -1s":                          "--warmup",
		"stray":                                 "stray",
	} {
		_, err := parseOptions(strings.Fields(args), io.Discard)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// TestTables checks that one thing varies in each table, and that what is
// measured together fits into the machine.
func TestTables(t *testing.T) {
	o, err := parseOptions(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	tables := o.tables()
	if len(tables) != 4 {
		t.Fatalf("%d tables", len(tables))
	}
	for _, table := range tables {
		var together int64
		based := 0
		for _, p := range table.points {
			if p.setup == base {
				based++
			}
			if p.keys < manyKeys {
				together += p.memory()
			}
		}
		if based != 1 || together > 3<<30 {
			t.Errorf("%s: %d points are the base, all together take %d MiB", table.title, based, together>>20)
		}
	}
	if s := tables[1].points[5].setup; tables[1].label(s) != "1 MiB, 64 keys, 16 clients" || tables[1].label(base) != "128 B" {
		t.Errorf("%q, %q", tables[1].label(s), tables[1].label(base))
	}
}

// TestMeasure measures real clusters, for a moment.
func TestMeasure(t *testing.T) {
	o, err := parseOptions(strings.Fields("--nodes 1 --values= --clients 1,3 --keys 100000000000000 --source ../.."), io.Discard)
	if err == nil {
		t.Fatal("more keys than any machine holds")
	}
	o.rounds, o.duration, o.warmup = 2, 200*time.Millisecond, 0
	o.keys = []uint64{100_000_000_000}
	var stdout bytes.Buffer
	if err := run(t.Context(), o, &stdout, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"### Nodes", "\n| 1     | ", "### Clients", "\n| 3       | ", "### Keys", "100,000,000,000: left out"} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("no %q in\n%s", want, &stdout)
		}
	}
	for line := range strings.Lines(stdout.String()) {
		if strings.HasPrefix(line, "Errors") || strings.HasPrefix(line, "| ") && (strings.Contains(line, " 0.00 | ") || strings.Contains(line, " 0 |")) {
			t.Errorf("%s", line)
		}
	}
}
