// A node in a cgroup of 200 MiB: no client kills it by what it stores.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// memoryCgroup makes a cgroup for so many bytes, of either version, and returns its directory. The
// test is skipped where it may not.
func memoryCgroup(t *testing.T, bytes int) string {
	t.Helper()
	needsOwnMemory(t)
	for top, file := range map[string]string{"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"} {
		if _, err := os.Stat(filepath.Join(top, "cgroup.procs")); err != nil { // no group is there
			continue
		}
		dir := filepath.Join(top, fmt.Sprintf("rkv-test-%d-%x", os.Getpid(), randomID()))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { // its processes have been killed, and are about to be gone
			eventually(t, func() error { return os.Remove(dir) })
		})
		if os.WriteFile(filepath.Join(dir, file), []byte(strconv.Itoa(bytes)), 0o644) == nil {
			return dir
		}
	}
	t.Skip("no cgroup of memory may be made here")
	return ""
}

// inCgroup is the command that runs another one in a cgroup.
func inCgroup(dir string) []string {
	return []string{"sh", "-c", `echo $$ > ` + dir + `/cgroup.procs && exec "$0" "$@"`}
}

// isRunning reports whether a process has not ended.
func (p *process) isRunning() bool {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	_, rest, _ := strings.Cut(string(text), ") ")
	return rest != "" && rest[0] != 'Z'
}

// TestSmallNode: in 200 MiB, a node takes what it has room for, however large values are, refuses
// the rest, and is not killed, nor when it starts again. Deletes make room.
func TestSmallNode(t *testing.T) {
	for _, bytes := range []int{maxValueBytes, 500, 0} {
		t.Run(fmt.Sprint(bytes), func(t *testing.T) {
			dir := memoryCgroup(t, 200<<20)
			p := &process{id: 1, address: "127.0.0.1:0", within: inCgroup(dir), args: []string{"--data-dir", filepath.Join(t.TempDir(), "data")}}
			formCluster(t, []*process{p})
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
			defer cancel()
			peak := sampleMemory(p)
			first := fillNode(ctx, t, p, bytes)
			overwrite(ctx, t, p, bytes, 2*time.Second)
			if !p.isRunning() {
				t.Fatal("it was killed")
			}
			t.Logf("%d keys; it took %d MiB more at most", first, peak()>>20)
			p.signal(syscall.SIGTERM)
			p.start()
			awaitHealthy(t, []*process{p}, 30*time.Second)
			if more := fillNode(ctx, t, p, bytes); more > first/10+1 {
				t.Errorf("when it has started again, it takes %d more keys", more)
			}
			for deleted := uint64(maxRangeKeys); deleted == maxRangeKeys; {
				resp, err := p.kv.List(ctx, &kvpb.ListRequest{Limit: maxListItems, KeysOnly: true})
				if err != nil {
					t.Fatal(err)
				}
				deleted = uint64(len(resp.Items))
				end := ""
				if resp.NextPageToken != "" {
					end = resp.Items[len(resp.Items)-1].Key
				}
				req := &kvpb.DeleteRangeRequest{Prefix: "k"}
				if end != "" {
					req = &kvpb.DeleteRangeRequest{End: end}
				}
				if _, err := p.kv.DeleteRange(ctx, req); err != nil {
					t.Fatal(err)
				}
				if end == "" {
					break
				}
			}
			if again := fillNode(ctx, t, p, bytes); again < first*9/10 {
				t.Errorf("after all was deleted, it takes %d keys, before %d", again, first)
			}
		})
	}
}

// fillNode sets keys until one is refused, and returns how many were not.
func fillNode(ctx context.Context, t *testing.T, p *process, size int) int {
	t.Helper()
	var filling sync.WaitGroup
	var taken, next atomic.Int64
	full := make(chan error, 4)
	value := bytes.Repeat([]byte("v"), size)
	prefix := fmt.Sprintf("k%x-", randomID())
	for range 4 {
		filling.Go(func() { full <- fillOver(ctx, p.conn, prefix, value, &next, &taken) })
	}
	filling.Wait()
	for range 4 {
		if err := <-full; err != nil {
			text, _ := os.ReadFile(p.log)
			t.Fatalf("after %d keys: %v; running: %v\n%s", taken.Load(), err, p.isRunning(), text[max(0, len(text)-2000):])
		}
	}
	return int(taken.Load())
}

// fillOver sets keys by a Pipeline until one is refused.
func fillOver(ctx context.Context, conn *grpc.ClientConn, prefix string, value []byte, next, taken *atomic.Int64) error {
	s, err := kvpb.NewKVServiceClient(conn).Pipeline(ctx)
	if err != nil {
		return err
	}
	batch := max(1, min(2000, maxValueBytes/(len(value)+100)))
	for {
		req := &kvpb.PipelineRequest{}
		for range batch {
			req.Operations = append(req.Operations, setOp(fmt.Sprintf("%s%d", prefix, next.Add(1)), string(value)))
		}
		if err := s.Send(req); err != nil {
			return err
		}
		refused := 0
		for got := 0; got < batch; {
			resp, err := s.Recv()
			if err != nil {
				return err
			}
			for _, r := range resp.Results {
				got++
				switch {
				case r.GetError() == nil:
					taken.Add(1)
				case r.GetError().Reason == kvpb.ErrorReason_ERROR_REASON_QUOTA:
					refused++
				default:
					return errors.New(r.GetError().Message)
				}
			}
		}
		if refused == batch {
			return s.CloseSend()
		}
	}
}

// overwrite sets keys that are there, by values as large, while a backup and Scans that nobody
// reads keep what was there.
func overwrite(ctx context.Context, t *testing.T, p *process, size int, length time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	items, err := p.kv.List(ctx, &kvpb.ListRequest{Limit: 1000, KeysOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	var working sync.WaitGroup
	for range 4 {
		working.Go(func() {
			if s, err := p.cluster.Backup(ctx, &kvpb.BackupRequest{}); err == nil {
				_, _ = s.Recv()
			}
			if s, err := p.kv.Scan(ctx, &kvpb.ScanRequest{}); err == nil {
				_, _ = s.Recv()
			}
			<-ctx.Done()
		})
		working.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := items.Items[i%len(items.Items)].Key
				_, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: key, Value: make([]byte, size)})
				if err != nil && status.Code(err) != codes.DeadlineExceeded && reasonOf(err) != "NO_LEADER" {
					t.Errorf("a value as large as before: %v", err)
					return
				}
			}
		})
	}
	working.Wait()
}

// TestMemoryComesBack: what was deleted, and what small values have replaced, is given back to the
// system within a minute, but for what the log and the history keep, though nothing is called.
func TestMemoryComesBack(t *testing.T) {
	needsOwnMemory(t)
	const keys = 400
	for name, shrink := range map[string]func(context.Context, *process) error{
		"deleted": func(ctx context.Context, p *process) error {
			_, err := p.kv.DeleteRange(ctx, &kvpb.DeleteRangeRequest{Prefix: "k"})
			return err
		},
		"replaced": func(ctx context.Context, p *process) error {
			for i := range keys {
				if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: fmt.Sprintf("k%d", i)}); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := &process{id: 1, address: "127.0.0.1:0", args: []string{"--log-bytes", "1048576", "--watch-bytes", "4194304"}}
			formCluster(t, []*process{p})
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			idle := p.rss()
			for i := range keys {
				req := &kvpb.SetRequest{Key: fmt.Sprintf("k%d", i), Value: make([]byte, maxValueBytes)}
				if _, err := p.kv.Set(ctx, req); err != nil {
					t.Fatal(err)
				}
			}
			full := p.rss()
			if err := shrink(ctx, p); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			within(t, time.Minute, func() error {
				left := p.rss() - idle
				if left < 64<<20 {
					return nil
				}
				return fmt.Errorf("%d MiB are not given back, of %d", left>>20, (full-idle)>>20)
			})
			t.Logf("of %d MiB, %d are left after %v", (full-idle)>>20, (p.rss()-idle)>>20, time.Since(start))
		})
	}
}

// TestFreeSpace: the file system says how much of it is free.
func TestFreeSpace(t *testing.T) {
	free, err := osFS{}.free(t.TempDir())
	if err != nil || free < 1<<20 || free > 1<<60 {
		t.Errorf("%d, %v", free, err)
	}
	if _, err := (osFS{}).free(filepath.Join(t.TempDir(), "nothing")); err == nil {
		t.Error("there is free space where nothing is")
	}
}

// costlyFloods are those that cost a node in 200 MiB the most. The others are run with a -soak of a
// minute or more.
var costlyFloods = []string{
	"Sets that lack a byte, on 100 connections", "Sets in frames of a byte that lack one", "Pipelines of Gets that nobody reads",
	"idle Pipelines with large headers",
}

// TestSmallNodeIsAbused: in 200 MiB, a full node is not killed by clients that misbehave either.
func TestSmallNodeIsAbused(t *testing.T) {
	t.Parallel()
	for _, a := range slices.Concat(abuses, floods) {
		if *soak < time.Minute && !slices.Contains(costlyFloods, a.name) {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			p := &process{id: 1, address: "127.0.0.1:0", within: inCgroup(memoryCgroup(t, 200<<20))}
			formCluster(t, []*process{p})
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			for key, bytes := range map[string]int{"large": maxValueBytes, "small": uncountedAnswer - 64} {
				if _, err := p.kv.Set(ctx, &kvpb.SetRequest{Key: key, Value: make([]byte, bytes)}); err != nil {
					t.Fatal(err)
				}
			}
			fillNode(ctx, t, p, 20<<10)
			most := sampleMemory(p)
			ready, stop := a.begin(p.address)
			select {
			case <-ready:
			case <-ctx.Done():
			}
			more := most()
			stop()
			if !p.isRunning() {
				t.Errorf("it was killed, after it had taken %d MiB more", more>>20)
			}
			t.Logf("%d MiB more", more>>20)
		})
	}
}

// TestSmallCluster: of three nodes with 200 MiB each that are full, one is killed, and catches up
// while all is overwritten. None runs out of memory.
func TestSmallCluster(t *testing.T) {
	var ps []*process
	for i := range 3 {
		p := &process{id: uint64(i + 1), address: "127.0.0.1:0", within: inCgroup(memoryCgroup(t, 200<<20))}
		ps = append(ps, p)
	}
	formCluster(t, ps)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	for _, p := range ps {
		fillNode(ctx, t, p, 100<<10)
	}
	for range 3 {
		leader := leaderOf(t, ps)
		other := ps[leader.id%3]
		other.signal(syscall.SIGKILL)
		overwrite(ctx, t, leader, 100<<10, time.Second)
		other.start()
		overwrite(ctx, t, leader, 100<<10, 2*time.Second)
		awaitHealthy(t, ps, time.Minute)
		for _, p := range ps {
			if !p.isRunning() {
				t.Fatalf("node %d was killed", p.id)
			}
		}
	}
}
