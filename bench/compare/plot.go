package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"raft-key-value/bench/internal/load"
	"raft-key-value/bench/internal/plot"
)

// The picture's measures, in pixels: two panels, each with room for the names
// of its curves on the right.
const (
	plotWidth, plotHeight         = 1010, 470
	plotTop, plotBottom           = 104, 404
	panelLeft, panelEvery         = 76, 494
	panelWidth                    = 290
	labelGap                      = 14 // between a curve's end and its name
	labelHeight                   = 16
	colorBare, colorOurs, colorIt = "#6e7781", "#0969da", "#bc4c00"
)

// curve is one system in a panel.
type curve struct {
	cell, name, color string
	dashed            bool
}

// panels are what the picture shows, side by side at one scale.
var panels = []struct {
	title  string
	curves []curve
}{
	{"Set", []curve{
		{bareSet, "bare RPC", colorBare, false},
		{setMemory, "Set, in memory", colorOurs, false}, {setDisk, "Set, durable", colorOurs, true},
		{etcdNoSync, "etcd, no fsync", colorIt, false}, {etcdSync, "etcd, fsync", colorIt, true},
	}},
	{"Get", []curve{
		{bareGet, "bare RPC", colorBare, false},
		{getLocal, "Get, local", colorOurs, true}, {getRead, "Get, linearizable", colorOurs, false},
		{etcdLocal, "etcd, serializable", colorIt, true}, {etcdRead, "etcd, linearizable", colorIt, false},
	}},
}

// svg draws operations a second by number of clients.
func (r *report) svg() []byte {
	title := "Operations a second by number of clients"
	if r.TLS {
		title += ", over TLS"
	}
	p := plot.New(plotWidth, plotHeight, panelLeft, title,
		fmt.Sprintf("Three nodes and the load on one machine of %d CPUs; keys of %d bytes, values of %d; medians of %d rounds", r.Machine.CPUs, r.KeySize, r.ValueSize, r.Rounds))
	most := 1.0
	for _, c := range r.Cells {
		if c.Clients == c.InFlight { // not a stream: that is far above
			most = max(most, c.Throughput)
		}
	}
	step := plot.TickStep(most)
	most = step * math.Ceil(most/step)
	y := func(v float64) float64 { return plotBottom - v/most*(plotBottom-plotTop) }
	for i, panel := range panels {
		left := float64(panelLeft + i*panelEvery)
		p.Text(left, plotTop-18, "start", `font-size="15" font-weight="600"`, panel.title)
		for v := 0.0; v <= most*1.001; v += step {
			p.Line(left, y(v), left+panelWidth, y(v), `stroke="`+plot.Grid+`"`)
			p.Text(left-8, y(v)+4.5, "end", `font-size="12"`, load.Count(v))
		}
		for _, n := range r.Clients {
			p.Line(r.x(left, n), plotBottom, r.x(left, n), plotBottom+5, `stroke="`+plot.Ink+`"`)
			p.Text(r.x(left, n), plotBottom+20, "middle", `font-size="12"`, load.Count(float64(n)))
		}
		p.Line(left, plotBottom, left+panelWidth, plotBottom, `stroke="`+plot.Ink+`"`)
		p.Text(left+panelWidth/2, plotBottom+44, "middle", "", "clients (logarithmic)")
		p.Upwards(left-58, (plotTop+plotBottom)/2, "operations a second")
		r.drawCurves(p, left, y, panel.curves)
	}
	return p.End()
}

// x is where so many clients are in the panel that begins at left.
func (r *report) x(left float64, clients int) float64 {
	least, most := math.Log(float64(slices.Min(r.Clients))), math.Log(float64(slices.Max(r.Clients)))
	if least == most {
		return left + panelWidth/2
	}
	const margin = 14
	return left + margin + (math.Log(float64(clients))-least)/(most-least)*(panelWidth-2*margin)
}

func (r *report) drawCurves(p *plot.Picture, left float64, y func(float64) float64, curves []curve) {
	clients := slices.Sorted(slices.Values(r.Clients))
	var labels []label
	for _, c := range curves {
		var xs, ys []float64
		for _, n := range clients {
			if m := r.find(c.cell, n); m != nil {
				xs, ys = append(xs, r.x(left, n)), append(ys, y(m.Throughput))
			}
		}
		if len(xs) > 0 {
			p.Curve(xs, ys, c.color, c.dashed)
			labels = append(labels, label{curve: c, x: xs[len(xs)-1], end: ys[len(ys)-1]})
		}
	}
	for _, l := range spread(labels) {
		x := left + panelWidth + labelGap
		p.Line(l.x+5, l.end, x-3, l.y, `stroke-width="1" stroke-opacity=".5" stroke="`+l.color+`"`)
		p.Text(x, l.y+4.5, "start", `font-weight="500" fill="`+l.color+`"`, l.name)
	}
}

// label is a curve's name: as near to its end as others let it be.
type label struct {
	curve
	x, end float64 // of the curve
	y      float64
}

// spread finds places that are labelHeight apart, in the order of the ends.
func spread(labels []label) []label {
	slices.SortStableFunc(labels, func(a, b label) int { return cmp.Compare(a.end, b.end) })
	for i := range labels {
		labels[i].y = labels[i].end
		if i > 0 {
			labels[i].y = max(labels[i].y, labels[i-1].y+labelHeight)
		}
	}
	for i := len(labels) - 1; i >= 0; i-- { // what went below the axis goes up
		bottom := float64(plotBottom)
		if i < len(labels)-1 {
			bottom = labels[i+1].y - labelHeight
		}
		labels[i].y = min(labels[i].y, bottom)
	}
	return labels
}
