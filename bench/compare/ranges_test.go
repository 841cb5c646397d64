package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"raft-key-value/bench/internal/load"
)

// measured is what a small run prints, which has no errors.
func measured(t *testing.T, args string) string {
	t.Helper()
	o, err := parseOptions(strings.Fields(args+" --source ../.. --rounds 1 --duration 20ms --warmup 0s"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	o.program.Dir = t.TempDir()
	var stdout bytes.Buffer
	if err := run(t.Context(), o, &stdout, io.Discard); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(stdout.String(), "Errors of") {
		t.Error(stdout.String())
	}
	return stdout.String()
}

// TestRanges measures few keys of both stores.
func TestRanges(t *testing.T) {
	text := measured(t, "--ranges --keys 40 --page 10 --clients 1,2")
	const figure = `[1-9][\d,]* \([\d.,]+/[\d.,]+\)`
	for _, want := range []string{
		`\| List, range +\| +` + figure + ` · [\d.]+× \| +` + figure + ` · [\d.]+× \|`,
		`\| etcd Range, range +\| +` + figure + ` \| +` + figure + ` \|`,
		`\| List, prefix +\| +` + figure + ` ·`, `\| etcd Range, prefix +\| +` + figure,
		`a prefix 16:`,
		`\| Scan +\| +[1-9][\d,]+ \| .*× \|`, `\| etcd RangeStream +\| +[1-9][\d,]+ \|`,
		`\| etcd Range, pages at one revision +\| +[1-9][\d,]+ \|`,
		`\| DeleteRange +\| +[1-9][\d,]+ \| .*× \|`, `\| etcd DeleteRange +\| +[1-9][\d,]+ \|`,
	} {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
}

// keySet is keys that are there, as a store that pages and deletes.
type keySet struct {
	keys  []string
	asked []load.Range
}

func (s *keySet) Page(_ context.Context, _ int, r load.Range, limit int) (n int, err error) {
	s.asked = append(s.asked, r)
	for _, k := range s.keys {
		isIn := r.Prefix != "" && strings.HasPrefix(k, r.Prefix) || r.Prefix == "" && k >= r.Start && k < r.End
		if isIn && n < limit {
			n++
		}
	}
	return n, nil
}

func (s *keySet) DeleteRange(ctx context.Context, r load.Range) (int, error) {
	before := len(s.keys)
	s.keys = slices.DeleteFunc(s.keys, func(k string) bool { return k >= r.Start && k < r.End })
	return before - len(s.keys), nil
}

// TestPages: a page has the keys that it should, and fewer are an error.
func TestPages(t *testing.T) {
	set := &keySet{}
	for i := range uint64(20) {
		set.keys = append(set.keys, load.Key(i, 16))
	}
	store := &rangeStore{pages: set}
	ranged := rangePages{store, 10}
	prefixed := prefixPages{store, 10, 1}
	get := func(i uint64) load.Operation { return load.Operation{Key: load.Key(i, 16)} }
	for i := range uint64(11) {
		if err := ranged.Do(t.Context(), 0, get(i)); err != nil {
			t.Errorf("from key %d: %v", i, err)
		}
	}
	if err := prefixed.Do(t.Context(), 0, get(15)); err != nil {
		t.Error(err)
	}
	if got := set.asked[len(set.asked)-1].Prefix; got != "bench-000000000" {
		t.Errorf("the prefix is %q", got)
	}
	if err := ranged.Do(t.Context(), 0, get(11)); err != load.ErrAbsent {
		t.Errorf("9 keys are a page of 10: %v", err)
	}
	if err := prefixed.Do(t.Context(), 0, get(16)); err != load.ErrAbsent {
		t.Errorf("4 keys are a page of 10: %v", err)
	}
}

// TestDeleteAndSet: each time another range is deleted, and set again; what is not there is an
// error.
func TestDeleteAndSet(t *testing.T) {
	o := options{page: 10}
	o.sizes = load.Sizes{Key: 16, Keys: 25}
	set := &keySet{}
	var firsts []uint64
	store := &rangeStore{pages: set, set: func(_ context.Context, first, keys uint64) error {
		firsts = append(firsts, first)
		for i := range keys {
			set.keys = append(set.keys, load.Key(first+i, 16))
		}
		return nil
	}}
	if err := store.set(t.Context(), 0, 25); err != nil {
		t.Fatal(err)
	}
	do := (&compare{options: o}).deleteAndSet(store)
	for i := range 3 {
		if _, err := do(t.Context(), i); err != nil || len(set.keys) != 25 {
			t.Errorf("%d keys, %v", len(set.keys), err)
		}
	}
	if !slices.Equal(firsts, []uint64{0, 0, 10, 0}) {
		t.Errorf("ranges from %v", firsts[1:])
	}
	set.keys = set.keys[:20]
	if _, err := do(t.Context(), 0); err != load.ErrAbsent {
		t.Errorf("5 keys are a range of 10: %v", err)
	}
}

// TestAgain runs on a fake clock. What sets up does not count, nor does the warm-up, nor what
// fails.
func TestAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := errors.New("failed")
		do := func(_ context.Context, i int) (time.Duration, error) {
			time.Sleep(100 * time.Millisecond)
			if i == 5 {
				return 0, failed
			}
			return 10 * time.Millisecond, nil
		}
		o := load.Options{Warmup: 200 * time.Millisecond, Duration: time.Second}
		r, err := again(do)(t.Context(), o)
		if err != nil || r.Operations != 9 || r.Failed() != 1 || r.Throughput() != 100 || r.Latency.Max() != 10*time.Millisecond {
			t.Errorf("%+v, %v/s, %v", r, r.Throughput(), err)
		}
		o = load.Options{Duration: 10 * time.Millisecond} // less than one takes
		if r, err := again(do)(t.Context(), o); err != nil || r.Operations != 1 {
			t.Errorf("%+v, %v", r, err)
		}
	})
}
