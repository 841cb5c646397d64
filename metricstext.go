// The text format of Prometheus, version 0.0.4, as far as this program writes it.

package main

import (
	"strconv"
	"strings"
)

// metricsType is what HTTP calls the format.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// metricsText is metrics as text. Each metric is begun by counter, gauge, begin or summary, and
// its values follow.
type metricsText struct {
	b    []byte
	name string // of the metric that was begun last
}

// counter writes a metric with one value, which only grows.
func (t *metricsText) counter(name, help string, value uint64) {
	t.begin(name, "counter", help)
	t.number(value)
}

// gauge writes a metric with one value.
func (t *metricsText) gauge(name, help string, value float64) {
	t.begin(name, "gauge", help)
	t.value(value)
}

// gaugeOf is gauge for a whole number.
func (t *metricsText) gaugeOf(name, help string, value uint64) {
	t.begin(name, "gauge", help)
	t.number(value)
}

// gaugeIf is gauge for what is so, 1, or not, 0.
func (t *metricsText) gaugeIf(name, help string, isSo bool) {
	t.begin(name, "gauge", help)
	t.yesNo(isSo)
}

// begin begins a metric. A line feed or a backslash has no place in help.
func (t *metricsText) begin(name, kind, help string) {
	t.name = name
	t.b = append(t.b, "# HELP "+name+" "+help+"\n# TYPE "+name+" "+kind+"\n"...)
}

// value writes a value; labels are names and values in turn.
func (t *metricsText) value(value float64, labels ...string) {
	t.series("", labels)
	t.b = append(strconv.AppendFloat(t.b, value, 'g', -1, 64), '\n')
}

// number is value for a whole number.
func (t *metricsText) number(value uint64, labels ...string) {
	t.series("", labels)
	t.b = append(strconv.AppendUint(t.b, value, 10), '\n')
}

// yesNo is value for what is so, 1, or not, 0.
func (t *metricsText) yesNo(isSo bool, labels ...string) {
	value := uint64(0)
	if isSo {
		value = 1
	}
	t.number(value, labels...)
}

// histogram writes the series of a histogram.
func (t *metricsText) histogram(h *histogram, labels ...string) {
	sum := h.sum.Load()
	below := uint64(0)
	bucket := append(append([]string{}, labels...), "le", "")
	for i := range h.counts {
		below += h.counts[i].Load()
		bound := "+Inf"
		if i < len(h.bounds) {
			bound = strconv.FormatFloat(float64(h.bounds[i])/h.unit, 'g', -1, 64)
		}
		bucket[len(bucket)-1] = bound
		t.suffixed("_bucket", float64(below), bucket)
	}
	t.suffixed("_sum", float64(sum)/h.unit, labels)
	t.suffixed("_count", float64(below), labels)
}

// suffixed writes one series of a histogram or a summary.
func (t *metricsText) suffixed(suffix string, value float64, labels []string) {
	t.series(suffix, labels)
	t.b = append(strconv.AppendFloat(t.b, value, 'g', -1, 64), '\n')
}

// labelEscapes are what a label's value may not have as it is.
var labelEscapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// series writes the name of a series, and a blank.
func (t *metricsText) series(suffix string, labels []string) {
	t.b = append(t.b, t.name+suffix...)
	for i := 0; i < len(labels); i += 2 {
		separator := byte(',')
		if i == 0 {
			separator = '{'
		}
		t.b = append(t.b, separator)
		t.b = append(t.b, labels[i]+`="`+labelEscapes.Replace(labels[i+1])+`"`...)
	}
	if len(labels) > 0 {
		t.b = append(t.b, '}')
	}
	t.b = append(t.b, ' ')
}
