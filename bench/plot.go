package main

import (
	"fmt"
	"math"

	"raft-key-value/bench/internal/load"
	"raft-key-value/bench/internal/plot"
)

// The picture's size and margins, in pixels.
const (
	plotWidth, plotHeight   = 860, 520
	marginLeft, marginRight = 72, 120
	marginTop, marginBottom = 78, 62
	plotInnerWidth          = plotWidth - marginLeft - marginRight
	plotInnerHeight         = plotHeight - marginTop - marginBottom
	colorTarget, colorBare  = "#1f6feb", "#8b949e"
)

// curve is a line of the picture: points from left to right as measured.
type curve struct {
	name   string
	color  string
	dashed bool
	x, y   []float64
	labels []string
}

// curves are what the report has to show.
func (r *report) curves() []curve {
	p50, p99 := curve{name: "p50", color: colorTarget}, curve{name: "p99", color: colorTarget, dashed: true}
	bare50, bare99 := curve{name: "bare RPC p50", color: colorBare}, curve{name: "bare RPC p99", color: colorBare, dashed: true}
	for _, p := range r.Points {
		label := load.Count(float64(p.Clients))
		if p.Rate > 0 {
			label = "" // the axis says it
		}
		p50.add(p.Target.Throughput, p.Target.P50, label)
		p99.add(p.Target.Throughput, p.Target.P99, "")
		if p.Bare != nil && p.BareClients == p.Clients {
			bare50.add(p.Bare.Throughput, p.Bare.P50, "")
			bare99.add(p.Bare.Throughput, p.Bare.P99, "")
		}
	}
	var curves []curve
	for _, c := range []curve{bare99, bare50, p99, p50} {
		if len(c.x) > 0 {
			curves = append(curves, c)
		}
	}
	return curves
}

func (c *curve) add(x, y float64, label string) {
	if x > 0 && y > 0 {
		c.x, c.y, c.labels = append(c.x, x), append(c.y, y), append(c.labels, label)
	}
}

// axes map throughput, from 0, and latency, logarithmic, to pixels.
type axes struct{ maxX, minY, maxY float64 }

func newAxes(curves []curve) axes {
	a := axes{minY: math.Inf(1)}
	for _, c := range curves {
		for i := range c.x {
			a.maxX, a.minY, a.maxY = max(a.maxX, c.x[i]), min(a.minY, c.y[i]), max(a.maxY, c.y[i])
		}
	}
	if a.maxX == 0 {
		return axes{1, .1, 10}
	}
	step := plot.TickStep(a.maxX)
	return axes{step * math.Ceil(a.maxX/step), a.minY / 1.3, a.maxY * 1.3}
}

func (a axes) px(x float64) float64 { return marginLeft + x/a.maxX*plotInnerWidth }

func (a axes) py(y float64) float64 {
	return marginTop + plotInnerHeight*(1-math.Log(y/a.minY)/math.Log(a.maxY/a.minY))
}

// svg draws latency against throughput.
func (r *report) svg() []byte {
	curves := r.curves()
	a := newAxes(curves)
	p := plot.New(plotWidth, plotHeight, marginLeft, "Latency against throughput: "+r.operations(), r.subtitle())
	a.drawGrid(p)
	for _, c := range curves {
		c.draw(p, a)
	}
	drawLegend(p, curves)
	return p.End()
}

func (r *report) subtitle() string {
	s := r.Settings
	what := "numbers at the points: clients"
	if len(r.Points) > 0 && r.Points[0].Rate > 0 {
		what = "each point: a fixed rate"
	}
	return fmt.Sprintf("%s, keys of %d bytes, values of %d; %d CPUs for nodes and load; %s", s.Mode, s.KeySize, s.ValueSize, r.Machine.CPUs, what)
}

func (a axes) drawGrid(p *plot.Picture) {
	const bottom, right = marginTop + plotInnerHeight, marginLeft + plotInnerWidth
	grid := `stroke="` + plot.Grid + `"`
	for step, x := plot.TickStep(a.maxX), 0.0; x <= a.maxX*1.001; x += step {
		p.Line(a.px(x), marginTop, a.px(x), bottom, grid)
		p.Text(a.px(x), bottom+20, "middle", "", load.Count(x))
	}
	for decade := math.Pow(10, math.Floor(math.Log10(a.minY))); decade <= a.maxY; decade *= 10 {
		for _, f := range []float64{1, 2, 5} {
			if y := decade * f; y >= a.minY && y <= a.maxY {
				p.Line(marginLeft, a.py(y), right, a.py(y), grid)
				p.Text(marginLeft-8, a.py(y)+4.5, "end", "", fmt.Sprintf("%.4g", y))
			}
		}
	}
	p.Line(marginLeft, bottom, right, bottom, `stroke="`+plot.Ink+`"`)
	p.Text(marginLeft+plotInnerWidth/2, plotHeight-16, "middle", "", "operations a second")
	p.Upwards(20, marginTop+plotInnerHeight/2, "latency in ms")
}

func (c *curve) draw(p *plot.Picture, a axes) {
	var x, y []float64
	for i := range c.x {
		x, y = append(x, a.px(c.x[i])), append(y, a.py(c.y[i]))
	}
	p.Curve(x, y, c.color, c.dashed)
	for i, label := range c.labels {
		if label != "" {
			p.Text(x[i], y[i]+19, "middle", `font-size="11" fill="`+c.color+`" paint-order="stroke" stroke="#ffffff" stroke-width="3"`, label)
		}
	}
}

// drawLegend names the curves, on the right, from the top.
func drawLegend(p *plot.Picture, curves []curve) {
	const x = marginLeft + plotInnerWidth + 14
	for i := range curves {
		c := &curves[len(curves)-1-i]
		y := float64(marginTop + 8 + 22*i)
		p.Line(x, y, x+22, y, plot.Stroke(c.color, c.dashed))
		p.Text(x+28, y+4.5, "start", `font-size="11"`, c.name)
	}
}
