package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"raft-key-value/bench/internal/etcd"
)

// TestMain makes the test a member of etcd, too.
func TestMain(m *testing.M) {
	if served, _ := etcd.Serve(os.Args[1:]); !served {
		os.Exit(m.Run())
	}
}

func TestOptions(t *testing.T) {
	for args, want := range map[string]string{
		"":                    "",
		"--quick":             "",
		"--keys 0":            "--keys",
		"--connections 0":     "--connections",
		"--connections 16385": "--connections",
		"--pause -1s":         "--pause",
		"stray":               "stray",
	} {
		_, err := parseOptions(strings.Fields(args), io.Discard)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// TestMeasure measures a node and a member of etcd with few keys: what they
// cost is noise, but values of 64 KiB are seen.
func TestMeasure(t *testing.T) {
	t.Setenv("GODEBUG", os.Getenv("GODEBUG")) // run sets it
	o, err := parseOptions(strings.Fields("--keys 300 --value-size 65536 --connections 20 --pause 0s --source ../.."), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	if err := run(t.Context(), o, &stdout, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`\| node +\| +[1-9]\d+,\d{3} \| +[1-9]\d+,\d{3} \|`, `\| etcd v\S+ member +\| +-?[\d,]+ \| +[1-9]\d+,\d{3} \|`,
		`\| a connection that does nothing, of 20 `, `\| 1 that ask .* \d\d+\.\d MiB \|`, `\| 4 that ask `,
	} {
		if !regexp.MustCompile(want).MatchString(stdout.String()) {
			t.Errorf("no %s in\n%s", want, &stdout)
		}
	}
}

func TestCollections(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	const text = `time=x msg=ready
gc 7 @0.106s 2%: 0.030+1.2+0.005 ms clock, 0.060+0.3/0.9/0.1+0.010 ms cpu, 8->9->5 MB, 9 MB goal, 0 MB stacks, 0 MB globals, 2 P
gc 8 @0.206s 2%: 0.030+1.2+0.005 ms clock, 0.060+0.3/0.9/0.1+0.010 ms cpu, 10->11->6 MB, 11 MB goal, 0 MB stacks, 0 MB globals, 2 P
`
	for given, want := range map[string]int{"": 0, text: 8} {
		if err := os.WriteFile(path, []byte(given), 0o644); err != nil {
			t.Fatal(err)
		}
		if n, inUse, err := collections(path); n != want || want > 0 && inUse != 6<<20 || err != nil {
			t.Errorf("%d, %d, %v", n, inUse, err)
		}
	}
}
