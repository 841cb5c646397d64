package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"io"
	"os"
	"strings"
	"testing"

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
		"":                              "",
		"--op get --set-share .2":       "",
		"--mode pipeline":               "",
		"--mode pipeline --clients 1,2": "",
		"--rate 1000,2000 --clients 5":  "",
		"--plot x.svg":                  "",
		"--depth 2000 --sessions=false": "",
		"--keys 256 --key-size 8":       "",
		"--op put":                      "--op",
		"--mode fast":                   "--mode",
		"--target some":                 "--target",
		"-o xml":                        "-o",
		"--set-share 2 --op mixed":      "--set-share",
		"--set-share NaN --op mixed":    "--set-share",
		"--key-size 6":                  "--key-size",
		"--keys 257 --key-size 8":       "--keys",
		"--keys 0":                      "--keys",
		"--value-size -1":               "--value-size",
		"--clients 0":                   "--clients",
		"--clients 1,x":                 "--clients",
		"--connections 0":               "--connections",
		"--depth -1":                    "--depth",
		"--depth 1001":                  "--depth",
		"--rate 0":                      "--rate",
		"--rate x":                      "--rate",
		"--rate 1,2 --clients 1,2":      "--rate",
		"--rounds 0":                    "--rounds",
		"--duration 40ms":               "--duration",
		"--warmup -1s":                  "--duration",
		"stray":                         "stray",
		"--unheard":                     "unheard",
	} {
		_, err := parseOptions(strings.Fields(args), io.Discard)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestDefaults(t *testing.T) {
	parse := func(args string) options {
		o, err := parseOptions(strings.Fields(args), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	if o := parse(""); len(o.loads()) != 1 || o.loads()[0].Clients != 64 || o.loads()[0].SetShare != 1 || o.depth != 1 || !o.sessions || o.bareClients != 0 {
		t.Errorf("%+v", o)
	}
	if o := parse("--op get"); o.setShare != 0 {
		t.Errorf("%+v", o)
	}
	if o := parse("--mode pipeline"); o.depth != 1000 || o.bareClients != 256 || o.loads()[0].Clients != 8 || !o.loads()[0].Pipeline {
		t.Errorf("%+v", o)
	}
	piped := &bench{options: parse("--mode pipeline")}
	if l := piped.bareLoad(piped.loads()[0]); l.Pipeline || l.Depth != 1 || l.Clients != 256 {
		t.Errorf("%+v", l)
	}
	if b := (&bench{options: parse("--depth 3")}); b.bareLoad(b.loads()[0]).Depth != 3 || b.bareLoad(b.loads()[0]).Clients != 64 {
		t.Errorf("%+v", b)
	}
	if l := new(parse("--plot x.svg")).loads(); len(l) != 10 || l[9].Clients != 512 {
		t.Errorf("%+v", l)
	}
	if l := new(parse("--plot x.svg --mode pipeline")).loads(); len(l) != 6 || l[5].Clients != 32 {
		t.Errorf("%+v", l)
	}
	if l := new(parse("--plot x.svg --rate 10,20.5")).loads(); len(l) != 2 || l[1].Rate != 20.5 || l[1].Clients != 64 {
		t.Errorf("%+v", l)
	}
}

// testReport has points as a machine might give, and one without an answer.
func testReport() *report {
	r := &report{Settings: settings{Op: "set", SetShare: 1, KeySize: 16, ValueSize: 128, Mode: "a<b&c", Depth: 1, Target: "leader", Addresses: []string{"127.0.0.1:1"}}}
	for i, n := range []int{1, 64, 1000} {
		r.Points = append(r.Points, &point{
			Clients: n, Share: .5, BareClients: n,
			Target: measurement{Throughput: 1000 * float64(i+1), Latencies: load.Latencies{P50: .1, P90: .2, P99: 10, P999: 20, Max: 1234}},
			Bare:   &measurement{Throughput: 2000 * float64(i+1), Latencies: load.Latencies{P50: .05, P99: 1}},
		})
	}
	r.Points = append(r.Points, &point{Clients: 2000, Target: measurement{Errors: map[string]uint64{"UNAVAILABLE NO_LEADER": 7, "DEADLINE_EXCEEDED": 12000}, Unsent: 3}})
	return r
}

func TestReport(t *testing.T) {
	var text, js bytes.Buffer
	r := testReport()
	if err := r.write(&text, "text"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| 64 clients    | 2,000 |        0.50 |   0.10 | 0.20 | 10.0 |  20.0 | 1,234 |      0 |      4,000 |   0.05 | 1.00 |",
		"| 2,000 clients |     0 |             |   0.00 | 0.00 | 0.00 |  0.00 |  0.00 | 12,007 |            |        |      |",
		"2,000 clients: errors: DEADLINE_EXCEEDED: 12,000, UNAVAILABLE NO_LEADER: 7\n",
		"2,000 clients: 3 were due and not sent",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, &text)
		}
	}
	var back report
	if err := r.write(&js, "json"); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(js.Bytes(), &back); err != nil || len(back.Points) != 4 || back.Points[1].Target.P99 != 10 || back.Points[1].Bare.Throughput != 4000 {
		t.Errorf("%+v, %v", back, err)
	}
}

// TestPlot checks that the picture is well-formed, shows what it should, and
// nothing outside of it, with points, with one and with none.
func TestPlot(t *testing.T) {
	full := testReport()
	for _, r := range []*report{full, {Points: full.Points[:1]}, {Points: full.Points[3:]}, {}} {
		d := xml.NewDecoder(bytes.NewReader(r.svg()))
		circles := 0
		for {
			token, err := d.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			e, ok := token.(xml.StartElement)
			if !ok {
				continue
			}
			if e.Name.Local == "circle" {
				circles++
			}
			for _, a := range e.Attr {
				if strings.ContainsAny(a.Value, "NI") && (strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf")) {
					t.Errorf("%s of %s is %s", a.Name.Local, e.Name.Local, a.Value)
				}
			}
		}
		points := 0
		for _, p := range r.Points {
			if p.Target.Throughput > 0 {
				points++
			}
		}
		if circles != 4*points {
			t.Errorf("%d circles for %d points", circles, points)
		}
	}
	a := newAxes(full.curves())
	for _, c := range full.curves() {
		for i := range c.x {
			if x, y := a.px(c.x[i]), a.py(c.y[i]); x < marginLeft || x > plotWidth-marginRight || y < marginTop || y > plotHeight-marginBottom {
				t.Errorf("%s: point %d lies at %v, %v", c.name, i, x, y)
			}
		}
	}
}
