package main

import (
	"fmt"
	"html"
	"math"
	"strings"

	"raft-key-value/bench/internal/load"
)

// The picture's size and margins, in pixels.
const (
	plotWidth, plotHeight                  = 860, 520
	marginLeft, marginRight                = 72, 120
	marginTop, marginBottom                = 78, 62
	plotInnerWidth                         = plotWidth - marginLeft - marginRight
	plotInnerHeight                        = plotHeight - marginTop - marginBottom
	colorTarget, colorBare, colorGrid, ink = "#1f6feb", "#8b949e", "#e6e8eb", "#24292f"
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
	step := tickStep(a.maxX)
	return axes{step * math.Ceil(a.maxX/step), a.minY / 1.3, a.maxY * 1.3}
}

func (a axes) px(x float64) float64 { return marginLeft + x/a.maxX*plotInnerWidth }

func (a axes) py(y float64) float64 {
	return marginTop + plotInnerHeight*(1-math.Log(y/a.minY)/math.Log(a.maxY/a.minY))
}

// tickStep is a round number that divides an axis into five or so.
func tickStep(most float64) float64 {
	step := math.Pow(10, math.Floor(math.Log10(most)))
	for _, f := range []float64{.1, .2, .5, 1} {
		if most/(step*f) <= 7 {
			return step * f
		}
	}
	return 2 * step
}

// svg draws latency against throughput.
func (r *report) svg() []byte {
	curves := r.curves()
	a := newAxes(curves)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13" fill="%s">`+"\n", plotWidth, plotHeight, plotWidth, plotHeight, ink)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", plotWidth, plotHeight)
	text(&b, marginLeft, 28, "start", `font-size="17" font-weight="600"`, "Latency against throughput: "+r.operations())
	text(&b, marginLeft, 49, "start", `fill="#57606a"`, r.subtitle())
	a.drawGrid(&b)
	for _, c := range curves {
		c.draw(&b, a)
	}
	drawLegend(&b, curves)
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

func (r *report) subtitle() string {
	s := r.Settings
	what := "numbers at the points: clients"
	if len(r.Points) > 0 && r.Points[0].Rate > 0 {
		what = "each point: a fixed rate"
	}
	return fmt.Sprintf("%s, keys of %d bytes, values of %d; %d CPUs for nodes and load; %s", s.Mode, s.KeySize, s.ValueSize, r.Machine.CPUs, what)
}

func text(b *strings.Builder, x, y float64, anchor, attributes, s string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s" %s>%s</text>`+"\n", x, y, anchor, attributes, html.EscapeString(s))
}

func line(b *strings.Builder, x1, y1, x2, y2 float64, attributes string) {
	fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" %s/>`+"\n", x1, y1, x2, y2, attributes)
}

func (a axes) drawGrid(b *strings.Builder) {
	const bottom, right = marginTop + plotInnerHeight, marginLeft + plotInnerWidth
	grid := `stroke="` + colorGrid + `"`
	for step, x := tickStep(a.maxX), 0.0; x <= a.maxX*1.001; x += step {
		line(b, a.px(x), marginTop, a.px(x), bottom, grid)
		text(b, a.px(x), bottom+20, "middle", "", load.Count(x))
	}
	for decade := math.Pow(10, math.Floor(math.Log10(a.minY))); decade <= a.maxY; decade *= 10 {
		for _, f := range []float64{1, 2, 5} {
			if y := decade * f; y >= a.minY && y <= a.maxY {
				line(b, marginLeft, a.py(y), right, a.py(y), grid)
				text(b, marginLeft-8, a.py(y)+4.5, "end", "", fmt.Sprintf("%.4g", y))
			}
		}
	}
	line(b, marginLeft, bottom, right, bottom, `stroke="`+ink+`"`)
	text(b, marginLeft+plotInnerWidth/2, plotHeight-16, "middle", "", "operations a second")
	fmt.Fprintf(b, `<text transform="translate(20 %d) rotate(-90)" text-anchor="middle">latency in ms</text>`+"\n", marginTop+plotInnerHeight/2)
}

func (c *curve) draw(b *strings.Builder, a axes) {
	var path []string
	for i := range c.x {
		path = append(path, fmt.Sprintf("%.1f,%.1f", a.px(c.x[i]), a.py(c.y[i])))
	}
	dash := ""
	if c.dashed {
		dash = ` stroke-dasharray="6 4"`
	}
	fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", strings.Join(path, " "), c.color, dash)
	for i := range c.x {
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s" stroke="#ffffff"/>`+"\n", a.px(c.x[i]), a.py(c.y[i]), c.color)
		if c.labels[i] != "" {
			text(b, a.px(c.x[i]), a.py(c.y[i])+19, "middle", `font-size="11" fill="`+c.color+`" paint-order="stroke" stroke="#ffffff" stroke-width="3"`, c.labels[i])
		}
	}
}

// drawLegend names the curves, on the right, from the top.
func drawLegend(b *strings.Builder, curves []curve) {
	const x = marginLeft + plotInnerWidth + 14
	for i := range curves {
		c := &curves[len(curves)-1-i]
		y := float64(marginTop + 8 + 22*i)
		attributes := `stroke-width="2" stroke="` + c.color + `"`
		if c.dashed {
			attributes += ` stroke-dasharray="6 4"`
		}
		line(b, x, y, x+22, y, attributes)
		text(b, x+28, y+4.5, "start", `font-size="11"`, c.name)
	}
}
