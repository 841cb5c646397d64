package main

import (
	"bytes"
	"encoding/xml"
	"io"
	"strconv"
	"strings"
	"testing"
)

// TestPlot checks that the picture is well-formed, shows every point, and has
// no two names in one place, however near the ends of the curves are.
func TestPlot(t *testing.T) {
	for i, clients := range [][]int{{1, 64, 256, 1000}, {1000, 1}, {7}} {
		most := []float64{50, 1, 1}[i] // of bare RPC: the others are near the axis, or near it
		r := &report{Clients: clients}
		for _, panel := range panels {
			for i, c := range panel.curves {
				for _, n := range clients {
					v := float64(1000 + n + i)
					if i == 0 {
						v *= most
					}
					r.Cells = append(r.Cells, &result{Name: c.cell, Clients: n, InFlight: n, Throughput: v})
				}
			}
		}
		circles, labels := 0, map[string][]float64{}
		for d := xml.NewDecoder(bytes.NewReader(r.svg())); ; {
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
			at := map[string]string{}
			for _, a := range e.Attr {
				at[a.Name.Local] = a.Value
				if strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf") {
					t.Errorf("%s of %s is %s", a.Name.Local, e.Name.Local, a.Value)
				}
			}
			if at["font-weight"] == "500" {
				y, err := strconv.ParseFloat(at["y"], 64)
				if err != nil || y < plotTop || y > plotBottom+5 {
					t.Errorf("a name at %q", at["y"])
				}
				for _, other := range labels[at["x"]] {
					if y-other < labelHeight-.2 && other-y < labelHeight-.2 {
						t.Errorf("names at %v and %v", y, other)
					}
				}
				labels[at["x"]] = append(labels[at["x"]], y)
			}
		}
		if circles != len(r.Cells) || len(labels) != 2 {
			t.Errorf("%d circles for %d points, names in %d columns", circles, len(r.Cells), len(labels))
		}
	}
	if svg := (&report{Clients: []int{1}}).svg(); xml.Unmarshal(svg, new(struct{})) != nil {
		t.Errorf("nothing measured: %s", svg)
	}
}
