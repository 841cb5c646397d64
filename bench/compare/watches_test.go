package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"raft-key-value/bench/internal/load"
)

// TestWatches measures few watchers of both stores. Their events are all told, else it would
// print errors.
func TestWatches(t *testing.T) {
	text := measured(t, "--watches --watchers 20 --prefix-watchers 3 --watch-connections 4 --keys 20 --pause 0s --prefix-rate 200")
	const latencies = ` +[\d.,]+/[\d.,]+ `
	for _, want := range []string{
		`\| none +\| +raft-key-value \|`, `\| none +\| +etcd \|`,
		`\| 20 of a key each +\| +Watch \|` + latencies + `\| +\d+ % \|` + latencies + `\| +\| +[1-9]`,
		`\| 20 of a key each +\| +etcd watch, a stream each \|` + latencies,
		`\| 20 of a key each +\| +etcd watch, a stream a connection \|` + latencies,
		`\| 3 of one prefix +\| +Watch \|` + latencies,
		`\| 3 of one prefix +\| +etcd watch, a stream each \|` + latencies,
		`\| 3 of one prefix +\| +etcd watch, a stream a connection \|` + latencies,
	} {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
}

// TestShapes: each watcher is on one connection, and each key has one or all.
func TestShapes(t *testing.T) {
	for shape, want := range map[watchShape]string{
		{0, false}: "none", {1, false}: "1 of a key", {1000, false}: "1,000 of a key each", {1000, true}: "1,000 of one prefix",
	} {
		if shape.String() != want {
			t.Errorf("%+v is %v", shape, shape)
		}
	}
	own := watchShape{watchers: 5}
	var keys []string
	for i := range 2 {
		of := own.on(i, 2, 16)
		if of.Prefixes > 0 || of.Prefix != "" {
			t.Errorf("%+v", of)
		}
		keys = append(keys, of.Keys...)
	}
	for i := range 10 {
		if !slices.Contains(keys, own.watchedKey(i, 16)) {
			t.Errorf("write %d is of a key that nobody watches", i)
		}
	}
	if slices.Sort(keys); len(slices.Compact(keys)) != 5 {
		t.Errorf("keys: %v", keys)
	}
	of := watchShape{watchers: 5, prefix: true}.on(0, 2, 16)
	if of.Prefixes != 3 || len(of.Keys) > 0 {
		t.Errorf("%+v", of)
	}
	written := map[string]bool{}
	for i := range 100 {
		key := watchShape{5, true}.watchedKey(i, 16)
		written[key] = true
		if !strings.HasPrefix(key, of.Prefix) {
			t.Errorf("%s has not the prefix %s", key, of.Prefix)
		}
	}
	if len(written) != prefixKeys {
		t.Errorf("%d keys of the prefix are written", len(written))
	}
}

// fakeStore is a store that does a write by a function.
type fakeStore func(op load.Operation) error

func (f fakeStore) Do(_ context.Context, _ int, op load.Operation) error { return f(op) }

// TestTimedWrites runs on a fake clock: two watchers are told of each write 2 ms before its
// answer, or 3 ms after it.
func TestTimedWrites(t *testing.T) {
	for _, test := range []struct {
		name      string
		times     int // that the second watcher is told
		wantError string
	}{{"told", 1, ""}, {"not told", 0, "MISSING EVENT: 25"}, {"told twice", 2, "EVENT TWICE: 25"}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := &compare{options: options{warmup: 500 * time.Millisecond, duration: 2 * time.Second}}
				c.sizes = load.Sizes{Key: 16, Value: 20}
				c.watching.prefixRate = 10
				cell := &watchCell{shape: watchShape{watchers: 2, prefix: true}}
				w := newTimedWrites(cell, c)
				n := 0
				err := w.write(t.Context(), fakeStore(func(op load.Operation) error {
					if number, ok := tagOf(op.Value); !ok || number != uint64(n) || len(op.Value) != 20 || !op.Set {
						t.Errorf("write %d is %+v", n, op)
					}
					n++
					time.Sleep(3 * time.Millisecond)
					w.event(op.Value)
					time.Sleep(2 * time.Millisecond)
					time.AfterFunc(3*time.Millisecond, func() {
						for range test.times {
							w.event(op.Value)
						}
					})
					return nil
				}))
				time.Sleep(time.Second)
				w.count()
				if err != nil || n != 25 {
					t.Fatalf("%d writes, %v", n, err)
				}
				if got := load.Errors(cell.errors); got != test.wantError {
					t.Errorf("errors %q, want %q", got, test.wantError)
				}
				if test.times != 1 {
					return
				}
				if cell.timed != 40 || cell.early != 20 || cell.afterAnswer.Count() != 40 || w.events.Load() != 50 {
					t.Errorf("%d timed, %d early, %d latencies, %d events", cell.timed, cell.early, cell.afterAnswer.Count(), w.events.Load())
				}
				got := fmt.Sprint(cell.afterAnswer.Quantile(.5), cell.afterAnswer.Max(), cell.afterCall.Max())
				if got != "0s 3ms 8ms" {
					t.Error(got)
				}
			})
		})
	}
}

// TestEach: each connection has its turn, few at a time, and an error is told.
func TestEach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		done := make([]bool, 33)
		failed := errors.New("failed")
		err := each(len(done), func(i int) error {
			time.Sleep(time.Second)
			done[i] = true
			if i == 20 {
				return failed
			}
			return nil
		})
		if err != failed || slices.Contains(done, false) {
			t.Errorf("%v, %v", done, err)
		}
		if took := time.Since(begin); took != 3*time.Second {
			t.Errorf("33 of a second each took %v", took)
		}
	})
}

// TestTags: only values of timed writes have a number.
func TestTags(t *testing.T) {
	value := load.Value(taggedBytes)
	if n, ok := tagOf(tagged(value, 1<<40)); !ok || n != 1<<40 || value[0] != 'v' {
		t.Errorf("%d, %v", n, ok)
	}
	for _, v := range [][]byte{nil, value, tag} {
		if _, ok := tagOf(v); ok {
			t.Errorf("%q has a number", v)
		}
	}
}

// TestWatchReport checks the figures of cells that are made up.
func TestWatchReport(t *testing.T) {
	o, err := parseOptions([]string{"--watches", "--rounds", "3"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	cells := []*watchCell{
		{name: storeOurs, store: storeOurs, sets: []float64{1000, 2000, 3000}},
		{name: storeEtcd, store: storeEtcd, sets: []float64{100, 100, 100}},
		{name: watchOurs, store: storeOurs, shape: watchShape{watchers: 1000}, sets: []float64{900, 1000, 2700}, events: []float64{7, 8, 9}, bytesEach: []float64{1024, 2048, 4096}, timed: 4, early: 1},
		{name: watchEtcd, store: storeEtcd, shape: watchShape{watchers: 1}, sets: []float64{50, 50, 50}, bytesEach: []float64{1e6}, errors: map[string]uint64{"MISSING EVENT": 2}},
	}
	cells[2].afterAnswer.Record(time.Millisecond)
	cells[2].afterCall.Record(2 * time.Millisecond)
	r := (&compare{options: o}).watchReport(cells)
	var text, js bytes.Buffer
	if err := r.write(&text, "text"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`\| none +\| +raft-key-value \| +\| +\| +\| +\| +2,000 \| +\| +\|`,
		`\| 1,000 of a key each \| +Watch \| +1\.00/1\.00 \| +25 % \| +2\.00/2\.00 \| +2\.0 \| +1,000 \| +0\.90 \| +8 \|`,
		`\| 1 of a key +\| +etcd watch, a stream each \| +0\.00/0\.00 \| +0 % \| +0\.00/0\.00 \| +\| +50 \| +0\.50 \| +0 \|`,
		`Errors of etcd watch, a stream each, watchers 1 of a key: MISSING EVENT: 2`,
		`up to 200 connections.* at 200 writes a second, of the prefix at 10\.`,
		`of 64 clients`,
	} {
		if !regexp.MustCompile(want).MatchString(text.String()) {
			t.Errorf("no %s in\n%s", want, &text)
		}
	}
	var back watchReport
	if err := r.write(&js, "json"); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(js.Bytes(), &back); err != nil || len(back.Cells) != len(cells) || back.Cells[2].BytesEach != 2048 || back.Writers != 64 {
		t.Errorf("%+v, %v", back, err)
	}
}
