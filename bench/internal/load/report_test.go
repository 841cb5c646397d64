package load

import (
	"strings"
	"testing"
	"time"
)

func TestTable(t *testing.T) {
	var b strings.Builder
	Table(&b, [][]string{{"clients", "1", "1,000"}, {"Set", "12,345", "×2"}})
	want := `| clients |      1 | 1,000 |
|---------|-------:|------:|
| Set     | 12,345 |    ×2 |
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestNumbers(t *testing.T) {
	for n, want := range map[float64]string{0: "0", 999: "999", 1000: "1,000", 1234567.6: "1,234,568"} {
		if got := Count(n); got != want {
			t.Errorf("Count(%v) = %q", n, got)
		}
	}
	for d, want := range map[time.Duration]string{0: "0.00", 187 * time.Microsecond: "0.19", 12340 * time.Microsecond: "12.3", 1234 * time.Millisecond: "1,234"} {
		if got := Milliseconds(d); got != want {
			t.Errorf("Milliseconds(%v) = %q", d, got)
		}
	}
	if Median(nil) != 0 || Median([]float64{3, 1, 2}) != 2 || Median([]float64{4, 1}) != 2.5 {
		t.Error("Median")
	}
	// Ratios 2, 3, 0.5: not the ratio of the medians.
	if got := MedianRatio([]float64{2, 30, 50}, []float64{1, 10, 100}); got != 2 {
		t.Errorf("MedianRatio = %v", got)
	}
	if MedianRatio([]float64{1}, nil) != 0 || MedianRatio([]float64{1}, []float64{0}) != 0 {
		t.Error("MedianRatio of nothing")
	}
}
