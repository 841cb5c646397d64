// Package plot writes pictures as SVG.
package plot

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// The colours of what is in all pictures. The ground is light, so that they
// hold on a dark page, too.
const Ink, Muted, Grid, ground = "#24292f", "#57606a", "#e6e8eb", "#ffffff"

// Picture is one that is being drawn; all lengths are in pixels.
type Picture struct{ b strings.Builder }

// New begins a picture with a title and what stands below it.
func New(width, height, left float64, title, subtitle string) *Picture {
	p := &Picture{}
	p.add(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %v %v" width="%v" height="%v" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13" fill="%s">`, width, height, width, height, Ink)
	p.add(`<rect width="%v" height="%v" rx="6" fill="%s"/>`, width, height, ground)
	p.Text(left, 28, "start", `font-size="17" font-weight="600"`, title)
	p.Text(left, 49, "start", `fill="`+Muted+`"`, subtitle)
	return p
}

// End ends the picture.
func (p *Picture) End() []byte {
	p.add("</svg>")
	return []byte(p.b.String())
}

func (p *Picture) add(format string, args ...any) { fmt.Fprintf(&p.b, format+"\n", args...) }

// Text writes at a point that is its start, middle or end.
func (p *Picture) Text(x, y float64, anchor, attributes, s string) {
	p.add(`<text x="%.1f" y="%.1f" text-anchor="%s" %s>%s</text>`, x, y, anchor, attributes, html.EscapeString(s))
}

// Upwards writes upwards, the middle of it at a point.
func (p *Picture) Upwards(x, y float64, s string) {
	p.add(`<text transform="translate(%.1f %.1f) rotate(-90)" text-anchor="middle">%s</text>`, x, y, html.EscapeString(s))
}

// Line draws a straight line.
func (p *Picture) Line(x1, y1, x2, y2 float64, attributes string) {
	p.add(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" %s/>`, x1, y1, x2, y2, attributes)
}

// Curve draws lines from point to point, and the points.
func (p *Picture) Curve(x, y []float64, color string, dashed bool) {
	var path []string
	for i := range x {
		path = append(path, fmt.Sprintf("%.1f,%.1f", x[i], y[i]))
	}
	p.add(`<polyline points="%s" fill="none" %s/>`, strings.Join(path, " "), Stroke(color, dashed))
	for i := range x {
		p.add(`<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s" stroke="%s"/>`, x[i], y[i], color, ground)
	}
}

// Stroke has the attributes of a curve's line.
func Stroke(color string, dashed bool) string {
	s := `stroke-width="2" stroke="` + color + `"`
	if dashed {
		s += ` stroke-dasharray="6 4"`
	}
	return s
}

// TickStep is a round number that divides an axis into five or so.
func TickStep(most float64) float64 {
	step := math.Pow(10, math.Floor(math.Log10(most)))
	for _, f := range []float64{.1, .2, .5, 1} {
		if most/(step*f) <= 7 {
			return step * f
		}
	}
	return 2 * step
}
