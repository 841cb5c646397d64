package load

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func testRand() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// TestHistogram compares quantiles with exact ones.
func TestHistogram(t *testing.T) {
	for name, draw := range map[string]func(*rand.Rand) float64{
		"uniform":     func(rng *rand.Rand) float64 { return rng.Float64() * 1e7 },
		"exponential": func(rng *rand.Rand) float64 { return rng.ExpFloat64() * 1e6 },
		"wide":        func(rng *rand.Rand) float64 { return math.Exp(rng.Float64() * math.Log(1e11)) },
		"small":       func(rng *rand.Rand) float64 { return float64(rng.IntN(200)) },
	} {
		rng := testRand()
		var h, half1, half2 Histogram
		var exact []time.Duration
		for i := range 20_000 {
			d := time.Duration(draw(rng))
			exact = append(exact, d)
			h.Record(d)
			[]*Histogram{&half1, &half2}[i%2].Record(d)
		}
		slices.Sort(exact)
		half1.Add(&half2)
		for _, q := range []float64{0, .001, .5, .9, .99, .999, 1} {
			want := exact[max(0, int(q*float64(len(exact))+.5)-1)]
			got := h.Quantile(q)
			if diff := math.Abs(float64(got - want)); diff > 1+.016*float64(want) {
				t.Errorf("%s: quantile %v is %v, not %v", name, q, got, want)
			}
			if sum := half1.Quantile(q); sum != got {
				t.Errorf("%s: quantile %v of two halves is %v, of the whole %v", name, q, sum, got)
			}
		}
		if h.Max() != exact[len(exact)-1] || half1.Max() != h.Max() || h.Count() != 20_000 || half1.Count() != 20_000 {
			t.Errorf("%s: max %v and %v, not %v; count %d and %d", name, h.Max(), half1.Max(), exact[len(exact)-1], h.Count(), half1.Count())
		}
	}
}

// TestHistogramBuckets checks that each value lies in a bucket near it, up to
// what cannot be told apart.
func TestHistogramBuckets(t *testing.T) {
	last := -1
	for v := uint64(0); v < 1<<maxBits; v += 1 + v/200 {
		b := bucketOf(v)
		if b < last || b >= numBuckets {
			t.Fatalf("%d lies in bucket %d, after %d", v, b, last)
		}
		last = b
		if m := float64(middleOf(b)); math.Abs(m-float64(v)) > float64(v)/128+.5 {
			t.Fatalf("%d lies in bucket %d around %v", v, b, m)
		}
	}
	var h Histogram
	if h.Quantile(.5) != 0 {
		t.Error("a histogram of nothing has a median")
	}
	h.Record(-time.Second)
	h.Record(1000 * time.Hour)
	if h.Count() != 2 || h.Quantile(.1) != 0 || h.Max() != 1<<maxBits-1 {
		t.Errorf("out of bounds: %v to %v", h.Quantile(.1), h.Max())
	}
}
