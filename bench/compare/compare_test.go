package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/etcd"
	"raft-key-value/bench/internal/load"
)

// TestMain makes the test a member of etcd and the echo process, too.
func TestMain(m *testing.M) {
	if served, _ := etcd.Serve(os.Args[1:]); served {
		return
	}
	if served, _ := load.ServeEcho(os.Args[1:]); !served {
		os.Exit(m.Run())
	}
}

func TestOptions(t *testing.T) {
	for args, want := range map[string]string{
		"":                                     "",
		"--clients 1,2 --rounds 1":             "",
		"--tls":                                "",
		"--clients 0":                          "--clients",
		"--clients x":                          "--clients",
		"--rounds 0":                           "--rounds",
		"--duration 1ms":                       "--duration",
		"--warmup -1s":                         "--warmup",
		"--key-size 0":                         "--key-size",
		"--value-size 9999999":                 "--value-size",
		"--keys 0":                             "--keys",
		"--keys 257 --key-size 8":              "--keys",
		"--depth 1001":                         "--depth",
		"-o xml":                               "-o",
		"stray":                                "stray",
		"--ranges":                             "",
		"--watches":                            "",
		"--ranges --watches":                   "--watches",
		"--ranges --plot x":                    "--plot",
		"--ranges --page 0":                    "--page",
		"--ranges --page 10001":                "--page",
		"--ranges --value-size 600":            "--page",
		"--ranges --keys 4095":                 "--keys",
		"--ranges --keys 4096":                 "",
		"--watches --watchers x":               "--watchers",
		"--watches --watchers 0":               "--watchers",
		"--ranges --page 10001 --value-size 1": "--page",
		"--watches --prefix-watchers 0":        "",
		"--watches --watchers 10001 --keys 20000":              "--watchers",
		"--watches --tls":                                      "--watchers",
		"--watches --tls --watchers 5000":                      "",
		"--watches --keys 9999":                                "--keys",
		"--watches --keys 15 --watchers 1 --prefix-watchers 1": "--keys",
		"--watches --prefix-watchers -1":                       "--prefix-watchers",
		"--watches --watch-connections 0":                      "--watch-connections",
		"--watches --watch-connections 1001":                   "--watch-connections",
		"--watches --watch-connections 9":                      "--watch-connections",
		"--watches --watch-rate 0":                             "--watch-rate",
		"--watches --prefix-rate 0":                            "--prefix-rate",
		"--watches --pause -1s":                                "--pause",
		"--watches --clients 1,2":                              "--clients",
		"--watches --value-size 13":                            "--value-size",
	} {
		_, err := parseOptions(strings.Fields(args), io.Discard)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// TestDefaults: some depend on what is measured, unless the command line has them.
func TestDefaults(t *testing.T) {
	for args, want := range map[string]string{
		"":                                 "10000 [1 64 256 1000] 250ms 1s",
		"--ranges":                         "100000 [1 16] 250ms 1s",
		"--ranges --keys 5000 --clients 2": "5000 [2] 250ms 1s",
		"--watches":                        "10000 [64] 1s 2s",
		"--watches --duration 1s":          "10000 [64] 1s 1s",
	} {
		o, err := parseOptions(strings.Fields(args), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(o.sizes.Keys, o.clients, o.warmup, o.duration); got != want {
			t.Errorf("%q: %s, want %s", args, got, want)
		}
	}
}

// TestPlan checks that every cell has its ceiling and its rival, and uses the
// same load as they.
func TestPlan(t *testing.T) {
	o, err := parseOptions(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	c := &compare{options: o, bare: &load.KV{}, memory: &cluster.Ours{KV: &load.KV{}}, disk: &cluster.Ours{KV: &load.KV{}}, noSync: &etcd.Cluster{}, sync: &etcd.Cluster{}}
	cells := c.plan()
	if len(cells) != 10*4+2 {
		t.Fatalf("%d cells", len(cells))
	}
	find := func(name string, clients int) *cell {
		for _, o := range cells {
			if o.name == name && o.load.Clients == clients {
				return o
			}
		}
		t.Fatalf("no %s at %d", name, clients)
		return nil
	}
	for _, cell := range cells {
		if !cell.load.Pipeline && cell.target != load.Target(c.bare) {
			ceiling := find(ceilings[cell.name], cell.load.Clients)
			if ceiling.load.SetShare != cell.load.SetShare || ceiling.load.Depth != 1 {
				t.Errorf("%s: %+v, its ceiling %+v", cell.name, cell.load, ceiling.load)
			}
		}
		if rival := rivals[cell.name]; rival != "" && !cell.load.Pipeline {
			if r := find(rival, cell.load.Clients); r.load.SetShare != cell.load.SetShare {
				t.Errorf("%s: %+v, its rival %+v", cell.name, cell.load, r.load)
			}
		}
	}
	if k := find(getLocal, 64).target.(*load.KV); !k.Local || find(getRead, 64).target.(*load.KV).Local {
		t.Error("local and linearizable reads are the same")
	}
	if !find(etcdLocal, 64).target.(etcd.Target).Serializable || find(etcdRead, 64).target.(etcd.Target).Serializable {
		t.Error("serializable and linearizable ranges are the same")
	}
}

func reportText(t *testing.T, r *report) string {
	t.Helper()
	var text bytes.Buffer
	if err := r.write(&text, "text"); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// TestReport checks the figures of cells that are made up.
func TestReport(t *testing.T) {
	o, err := parseOptions([]string{"--clients", "1,256", "--rounds", "3"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	c := &compare{options: o, leftOut: []string{"something"}}
	made := func(name string, clients int, pipeline bool, throughputs ...float64) *cell {
		cell := &cell{name: name, load: load.Options{Clients: clients, Depth: 1, Pipeline: pipeline}, throughputs: throughputs}
		cell.result.Add(load.Result{Latency: &load.Histogram{}})
		cell.result.Latency.Record(time.Millisecond)
		return cell
	}
	cells := []*cell{
		made(bareSet, 1, false, 100, 200, 300), made(setMemory, 1, false, 50, 120, 90), made(etcdNoSync, 1, false, 25, 20, 30),
		made(bareSet, 256, false, 1000, 1000, 1000), made(setMemory, 256, false, 900, 900, 900), made(etcdNoSync, 256, false, 300, 300, 300),
		made(streamMemory, 1, true, 12000, 12000, 12000),
	}
	if strings.Contains(reportText(t, c.report(cells)), "TLS") {
		t.Error("it tells of TLS")
	}
	c.secure = true
	cells[1].result.Errors = map[string]uint64{"UNAVAILABLE": 2}
	r := c.report(cells)
	if !strings.Contains(string(r.svg()), "over TLS") {
		t.Error("the picture says nothing of TLS")
	}
	text := reportText(t, r)
	var js bytes.Buffer
	for _, want := range []string{
		"| clients            |           1 |         256 |",
		"| Set, in memory     | 0.50 · 3.0× | 0.90 · 3.0× |",
		"| etcd put, no fsync |        0.10 |        0.30 |",
		"| bare RPC, Set      | 200 (1.00/1.00) | 1,000 (1.00/1.00) |",
		"12,000 (1.00/1.00) |                      12.0× |              40.0× |",
		"Left out: something",
		"all over TLS 1.3",
		"Errors of Set, in memory, clients 1: UNAVAILABLE: 2",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	var back report
	if err := r.write(&js, "json"); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(js.Bytes(), &back); err != nil || len(back.Cells) != len(cells) || back.Cells[1].ShareOfBare != .5 {
		t.Errorf("%+v, %v", back, err)
	}
}
