package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/load"
	"raft-key-value/kvpb"
)

const (
	clusterSize = 3
	learnerID   = clusterSize + 1
	// quietLog is more than what is logged here: nothing is compacted.
	quietLog = 4 << 30
	// share is that of what a closed loop reaches that the load is: so little
	// that operations do not wait for each other.
	share, closedClients = 3, 64
)

// stalls has what is measured.
type stalls struct {
	options
	dir, binary string
	stderr      io.Writer
	clusters    []*cluster.Ours
	rows        []*stall
	rates       []string // what was found, in words
}

// stall is something that may hold writes up.
type stall struct {
	name string
	o    *cluster.Ours // it happens here, and what is without it elsewhere or at another time
	next *atomic.Uint64
	// before makes ready.
	before func(context.Context) error
	// during runs beside a window, and the window lasts until it has ended.
	during func(context.Context) error
	// after puts back what during did.
	after func(context.Context) error
	// count tells by a difference whether it has happened; nil: it has.
	count func(context.Context) (uint64, error)

	without, with samples
}

// samples are windows.
type samples struct {
	load.Result
	p999 []float64 // of each window, in ms
}

func (s *samples) add(r load.Result) {
	s.Add(r)
	s.p999 = append(s.p999, load.LatenciesOf(r.Latency).P999)
}

// start starts a cluster with all keys.
func (s *stalls) start(ctx context.Context, name string, durable bool, logBytes int64) (*cluster.Ours, error) {
	fmt.Fprintf(s.stderr, "%s: setting %s keys\n", name, load.Count(float64(s.sizes.Keys)))
	o, err := cluster.StartOurs(ctx, cluster.Config{
		Binary: s.binary, Dir: filepath.Join(s.dir, name), Size: clusterSize, Durable: durable, Args: []string{"--log-bytes", fmt.Sprint(logBytes)},
	})
	if err != nil {
		return nil, err
	}
	s.clusters = append(s.clusters, o)
	if err := load.Fill(ctx, o.KV, load.Options{Pipeline: true, Keys: s.sizes.Keys, KeySize: s.sizes.Key, Value: load.Value(s.sizes.Value)}); err != nil {
		return nil, err
	}
	return o, errors.Join(o.OpenSessions(ctx, max(s.clients, closedClients)), o.Settle(ctx))
}

func (s *stalls) stop() {
	for _, o := range s.clusters {
		o.Stop()
	}
	s.clusters = nil
}

// load is the load of a window. The rate is found if none was given.
func (s *stalls) load(ctx context.Context, name string, o *cluster.Ours, window time.Duration) (load.Options, error) {
	l := load.Options{Clients: closedClients, Depth: 1, Warmup: window / 8, Duration: window, SetShare: 1, Keys: s.sizes.Keys, KeySize: s.sizes.Key, Value: load.Value(s.sizes.Value)}
	rate := s.rate
	if rate == 0 {
		closed := l
		closed.Duration *= 2
		r, err := load.Run(ctx, closed, o.KV)
		if err != nil {
			return l, err
		}
		rate = max(r.Throughput()/share, 10)
	}
	s.rates = append(s.rates, fmt.Sprintf("%s %s a second", name, load.Count(rate)))
	fmt.Fprintf(s.stderr, "%s: %s sets a second\n", name, load.Count(rate))
	l.Clients, l.Rate = s.clients, rate
	return l, nil
}

// inMemory measures what happens without a disk, and quiet windows in between.
func (s *stalls) inMemory(ctx context.Context) error {
	quiet, err := s.start(ctx, "in memory", false, quietLog)
	if err != nil {
		return err
	}
	small, err := s.start(ctx, "in memory, small log", false, 1<<20)
	if err != nil {
		return err
	}
	l, err := s.load(ctx, "in memory", quiet, s.window)
	if err != nil {
		return err
	}
	rows := s.stallsOf(quiet, small)
	s.rows = append(s.rows, rows...)
	for round := range s.rounds {
		for _, row := range rows {
			if err := s.both(ctx, row, quiet, l); err != nil {
				return fmt.Errorf("%s: %w", row.name, err)
			}
			with := "it was not seen yet"
			if len(row.with.p999) > 0 {
				with = fmt.Sprintf("with %.2f ms", load.Median(row.with.p999))
			}
			fmt.Fprintf(s.stderr, "round %d of %d: %s: p99.9 without %.2f ms, %s\n", round+1, s.rounds, row.name, load.Median(row.without.p999), with)
		}
	}
	return nil
}

// stallsOf are those that a cluster in memory can be made to have; small is one
// that compacts its log again and again.
func (s *stalls) stallsOf(quiet, small *cluster.Ours) []*stall {
	var next atomic.Uint64
	next.Store(s.sizes.Keys)
	return []*stall{
		{name: "log compaction", o: small, count: func(ctx context.Context) (uint64, error) {
			m, err := small.Admin.Metrics(ctx, &kvpb.MetricsRequest{})
			return m.GetFirstIndex(), err
		}},
		{name: "new keys: maps grow", o: quiet, next: &next},
		s.learner(quiet),
		s.killed(quiet),
		{name: "a follower stands still", o: quiet, during: func(ctx context.Context) error {
			f := follower(quiet)
			if err := f.Signal(syscall.SIGSTOP); err != nil {
				return err
			}
			load.Wait(ctx, s.window*3/4)
			return f.Signal(syscall.SIGCONT)
		}},
		{name: "the leader hands over, and back", o: quiet, during: func(ctx context.Context) error {
			load.Wait(ctx, s.window/4)
			_, err := quiet.Admin.TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: follower(quiet).ID})
			if err != nil {
				return err
			}
			load.Wait(ctx, s.window/4)
			_, err = quiet.Admin.TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: quiet.Leader.ID})
			return err
		}},
	}
}

// learner is a fourth node that is added, and removed.
func (s *stalls) learner(o *cluster.Ours) *stall {
	var node *cluster.Node
	var took []float64
	row := &stall{name: "a new learner catches up", o: o}
	row.before = func(ctx context.Context) (err error) {
		node, err = o.Start(ctx, learnerID, "127.0.0.1:0")
		return err
	}
	row.during = func(ctx context.Context) error {
		begin := time.Now()
		_, err := o.Admin.AddLearner(ctx, &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: learnerID, Address: node.Address}})
		took = append(took, time.Since(begin).Seconds())
		row.name = fmt.Sprintf("a new learner catches up, in %.1f s", load.Median(took))
		return err
	}
	row.after = func(ctx context.Context) error {
		_, err := o.Admin.ChangeMembership(ctx, &kvpb.ChangeMembershipRequest{Remove: []uint64{learnerID}})
		node.Kill()
		return err
	}
	return row
}

// killed is a follower that is killed, and comes back without its memory.
func (s *stalls) killed(o *cluster.Ours) *stall {
	var node *cluster.Node
	return &stall{
		name: "a follower is killed", o: o,
		during: func(context.Context) error {
			node = follower(o)
			node.Kill()
			return nil
		},
		after: func(ctx context.Context) error {
			_, err := o.Start(ctx, node.ID, node.Address)
			return err
		},
	}
}

func follower(o *cluster.Ours) *cluster.Node {
	for _, n := range o.Nodes {
		if n != o.Leader && n.ID != learnerID {
			return n
		}
	}
	return nil
}

// both measures a window without a stall, and one with it.
func (s *stalls) both(ctx context.Context, row *stall, quiet *cluster.Ours, l load.Options) error {
	if err := quiet.Settle(ctx); err != nil {
		return err
	}
	r, err := window(ctx, quiet, l, nil)
	if err != nil {
		return err
	}
	row.without.add(r)
	before, err := row.counted(ctx)
	if err != nil {
		return err
	}
	if row.before != nil {
		if err := row.before(ctx); err != nil {
			return err
		}
	}
	l.Next = row.next
	if r, err = window(ctx, row.o, l, row.during); err != nil {
		return err
	}
	if row.after != nil {
		if err := row.after(ctx); err != nil {
			return err
		}
	}
	after, err := row.counted(ctx)
	if row.count == nil || after != before {
		row.with.add(r)
	}
	return err
}

func (s *stall) counted(ctx context.Context) (uint64, error) {
	if s.count == nil {
		return 0, nil
	}
	return s.count(ctx)
}

// window measures until during, which begins with it, has ended, and once at
// least.
func window(ctx context.Context, o *cluster.Ours, l load.Options, during func(context.Context) error) (sum load.Result, err error) {
	ended := make(chan error, 1)
	if during == nil {
		ended <- nil
	} else {
		go func() {
			load.Wait(ctx, l.Warmup)
			ended <- during(ctx)
		}()
	}
	for {
		r, err := load.Run(ctx, l, o.KV)
		if err != nil {
			return sum, errors.Join(err, <-ended)
		}
		sum.Add(r)
		l.Warmup = 0
		select {
		case err := <-ended:
			return sum, err
		default:
		}
	}
}
