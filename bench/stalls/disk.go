package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/load"
)

// onDisk measures a durable cluster whose log is small, window after window,
// and sorts them by what the nodes did meanwhile.
func (s *stalls) onDisk(ctx context.Context) error {
	o, err := s.start(ctx, "durable", true, s.logBytes)
	if err != nil {
		return err
	}
	l, err := s.load(ctx, "durable", o, s.window/2)
	if err != nil {
		return err
	}
	var quiet samples
	snapshot, roll := &stall{name: "a snapshot is written, durable"}, &stall{name: "a new segment, durable"}
	s.rows = append(s.rows, snapshot, roll)
	// Once more as many, if some of what is looked for did not come often enough.
	for i := 0; i < s.diskWindows || i < 2*s.diskWindows && min(len(quiet.p999), len(snapshot.with.p999), len(roll.with.p999)) < s.rounds; i++ {
		w := watch(o)
		r, err := load.Run(ctx, l, o.KV)
		snapshots, rolls := w.stop()
		if err != nil {
			return err
		}
		what := "neither"
		switch {
		case snapshots:
			snapshot.with.add(r)
			what = "a snapshot"
		case rolls:
			roll.with.add(r)
			what = "a new segment"
		default:
			quiet.add(r)
		}
		fmt.Fprintf(s.stderr, "durable, window %d of %d: p99.9 %s ms: %s\n", i+1, s.diskWindows, load.Milliseconds(r.Latency.Quantile(.999)), what)
	}
	if min(len(quiet.p999), len(snapshot.with.p999), len(roll.with.p999)) < s.rounds {
		fmt.Fprintln(s.stderr, "durable: some of what was looked for came seldom: try another --log-bytes")
	}
	snapshot.without, roll.without = quiet, quiet
	return nil
}

// watcher looks at data directories until it is stopped.
type watcher struct {
	ending, ended    chan struct{}
	snapshots, rolls bool
}

// watch begins to look at those of all nodes, in a goroutine.
func watch(o *cluster.Ours) *watcher {
	w := &watcher{ending: make(chan struct{}), ended: make(chan struct{})}
	var dirs, newest []string
	for _, n := range o.Nodes {
		dirs = append(dirs, n.DataDir())
		segment, _, _ := look(n.DataDir())
		newest = append(newest, segment)
	}
	_, snapshot, _ := look(dirs[0])
	go func() {
		defer close(w.ended)
		t := time.NewTicker(10 * time.Millisecond)
		defer t.Stop()
		for last := false; ; {
			for i, dir := range dirs {
				segment, named, writing := look(dir)
				w.rolls = w.rolls || segment != newest[i]
				w.snapshots = w.snapshots || writing || i == 0 && named != snapshot
			}
			if last {
				return
			}
			select {
			case <-t.C:
			case <-w.ending:
				last = true
			}
		}
	}()
	return w
}

// stop says whether any node was writing a snapshot, and began a segment.
func (w *watcher) stop() (snapshots, rolls bool) {
	close(w.ending)
	<-w.ended
	return w.snapshots, w.rolls
}

// look finds the newest segment and snapshot in a data directory, and whether a
// snapshot is being written. See disk.go of the store for the names.
func look(dir string) (segment, snapshot string, writing bool) {
	entries, _ := os.ReadDir(dir) // sorted
	for _, e := range entries {
		switch name := e.Name(); {
		case strings.HasSuffix(name, ".wal"):
			segment = name
		case strings.HasSuffix(name, ".snap"):
			snapshot = name
		case strings.HasSuffix(name, ".tmp") && !strings.HasSuffix(name, ".wal.tmp") && name != "identity.tmp":
			writing = true
		}
	}
	return segment, snapshot, writing
}
