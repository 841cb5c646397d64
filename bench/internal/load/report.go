package load

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Table writes a table that is one in Markdown, too. The first row is the head.
func Table(w io.Writer, rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for i, row := range rows {
		for j, cell := range row {
			pad := strings.Repeat(" ", widths[j]-utf8.RuneCountInString(cell))
			if j == 0 {
				fmt.Fprintf(w, "| %s%s |", cell, pad)
			} else {
				fmt.Fprintf(w, " %s%s |", pad, cell)
			}
		}
		fmt.Fprintln(w)
		if i == 0 {
			fmt.Fprintf(w, "|%s|", strings.Repeat("-", widths[0]+2))
			for _, n := range widths[1:] {
				fmt.Fprintf(w, "%s:|", strings.Repeat("-", n+1))
			}
			fmt.Fprintln(w)
		}
	}
}

// Count writes a number with commas.
func Count(n float64) string {
	s := strconv.FormatFloat(n, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// Milliseconds writes a duration to three digits.
func Milliseconds(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms < 10:
		return strconv.FormatFloat(ms, 'f', 2, 64)
	case ms < 100:
		return strconv.FormatFloat(ms, 'f', 1, 64)
	}
	return Count(ms)
}

// Median is the median of numbers; 0 if there are none.
func Median(numbers []float64) float64 {
	s := slices.Sorted(slices.Values(numbers))
	if len(s) == 0 {
		return 0
	}
	return (s[len(s)/2] + s[(len(s)-1)/2]) / 2
}

// MedianRatio is the median of the ratios of each two numbers that were
// measured one after the other; 0 if there are none.
func MedianRatio(numbers, to []float64) float64 {
	var ratios []float64
	for i := range min(len(numbers), len(to)) {
		if to[i] > 0 {
			ratios = append(ratios, numbers[i]/to[i])
		}
	}
	return Median(ratios)
}

// Errors lists errors, the most frequent first.
func Errors(errors map[string]uint64) string {
	names := slices.SortedFunc(maps.Keys(errors), func(a, b string) int {
		return cmp.Or(cmp.Compare(errors[b], errors[a]), cmp.Compare(a, b))
	})
	var parts []string
	for _, name := range names {
		parts = append(parts, fmt.Sprintf("%s: %s", name, Count(float64(errors[name]))))
	}
	return strings.Join(parts, ", ")
}

// Machine says what a figure was measured on.
type Machine struct {
	CPUs       int     `json:"cpus"`
	OS         string  `json:"os"`
	Arch       string  `json:"arch"`
	Go         string  `json:"go"`
	PingPongUs float64 `json:"tcp_ping_pong_us"`
}

// ThisMachine is the machine that this process runs on.
func ThisMachine(pingPong time.Duration) Machine {
	return Machine{runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version(), float64(pingPong) / float64(time.Microsecond)}
}

func (m Machine) String() string {
	return fmt.Sprintf("%d CPUs, %s/%s, %s; TCP ping-pong on loopback: %.1f µs", m.CPUs, m.OS, m.Arch, m.Go, m.PingPongUs)
}

// Latencies are a run's, in milliseconds.
type Latencies struct {
	P50  float64 `json:"p50_ms"`
	P90  float64 `json:"p90_ms"`
	P99  float64 `json:"p99_ms"`
	P999 float64 `json:"p999_ms"`
	Max  float64 `json:"max_ms"`
}

// LatenciesOf are those of a histogram.
func LatenciesOf(h *Histogram) Latencies {
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return Latencies{ms(h.Quantile(.5)), ms(h.Quantile(.9)), ms(h.Quantile(.99)), ms(h.Quantile(.999)), ms(h.Max())}
}
