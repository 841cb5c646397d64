// Ring 3. Two programs in one cluster: rolling upgrades, and back.

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"raft-key-value/kvpb"
)

// baseline is the commit whose program the upgrade begins with: the oldest that a cluster may
// be upgraded from. It is set anew whenever something is changed that all programs of a
// cluster have to know; once there are releases, that is the last release.
const baseline = "9d0a2900617ba0ceab1eb4c4bad80df76f7464bb"

// buildProgram builds the program whose sources are in a directory, with build tags, and
// returns its file.
func buildProgram(t *testing.T, dir, tags string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "raft-key-value")
	cmd := exec.Command("go", "build", "-tags", tags, "-o", file, ".")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the program in %s: %v: %s", dir, err, out)
	}
	return file
}

// buildOlder builds the program of the baseline, or, where its commit is not at hand, that of
// the present sources, which speaks the same level.
func buildOlder(t *testing.T) string {
	t.Helper()
	dir, err := checkOut(t, baseline)
	if err != nil {
		t.Logf("the older program is that of the present sources: %v", err)
		dir = "."
	}
	return buildProgram(t, dir, "")
}

// checkOut puts the files of a commit into a directory.
func checkOut(t *testing.T, commit string) (dir string, err error) {
	t.Helper()
	if commit == "" {
		return "", errors.New("there is no older commit")
	}
	archive, err := exec.Command("git", "archive", commit).Output()
	if err != nil {
		return "", fmt.Errorf("git archive %s: %w", commit, err)
	}
	dir = t.TempDir()
	files := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := files.Next()
		if err == io.EOF {
			return dir, nil
		}
		if err != nil {
			return "", err
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, 0o755)
		}
		if h.Typeflag == tar.TypeReg {
			var b []byte
			b, err = io.ReadAll(files)
			err = errors.Join(err, os.WriteFile(path, b, 0o644))
		}
		if err != nil {
			return "", err
		}
	}
}

// fleet is a cluster of processes that are upgraded.
type fleet struct {
	t  *testing.T
	ps []*process
}

// roll stops processes as systemd would, one after another, and starts another program in
// their place.
func (f *fleet) roll(program string, ids ...uint64) {
	f.t.Helper()
	for _, id := range ids {
		p := f.ps[id-1]
		p.signal(syscall.SIGTERM)
		p.program = program
		p.start()
		f.settled()
	}
}

// settled waits until nodes 1 to 3 vote, node 4 does not, and all are healthy.
func (f *fleet) settled() {
	f.t.Helper()
	eventually(f.t, func() error {
		for _, p := range f.ps {
			m, err := p.metrics()
			if err != nil {
				return err
			}
			voters, learners := membersOf(m)
			asWanted := len(voters) == 3 && len(learners) == 1 && !m.Joint
			if !asWanted || !m.Healthy {
				return fmt.Errorf("node %d: %v", p.id, m)
			}
		}
		return nil
	})
}

// wantsLevel waits until all nodes know the level of their cluster.
func (f *fleet) wantsLevel(level uint32) {
	f.t.Helper()
	eventually(f.t, func() error {
		for _, p := range f.ps {
			m, err := p.metrics()
			if err != nil {
				return err
			}
			if m.Level != level {
				return fmt.Errorf("node %d knows level %d, want %d", p.id, m.Level, level)
			}
		}
		return nil
	})
}

// load has clients call all nodes until stop is called.
func (f *fleet) load(h *history) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	for client := range 2 * len(f.ps) {
		clients.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(client)))
			for i := 0; ctx.Err() == nil; i++ {
				op := registerOp{name: []string{"get", "set", "set", "delete"}[r.IntN(4)], key: fmt.Sprint("key ", r.IntN(5))}
				if op.name == "set" {
					op.value = fmt.Sprintf("%d of client %d", i, client)
				}
				call, end := context.WithTimeout(context.Background(), rpcTimeout)
				_ = h.do(call, f.ps[r.IntN(len(f.ps))].kv, client, op)
				end()
				sleep(ctx, time.Millisecond)
			}
		})
	}
	stop = sync.OnceFunc(func() { cancel(); clients.Wait() })
	f.t.Cleanup(stop)
	return stop
}

// TestRollingUpgrade rolls a cluster of real processes, a learner among them, from one program
// to the next, and back as long as there is a way back, under load: nothing is lost, nobody
// stops, and the level rises with the last one. Then the older program is refused.
func TestRollingUpgrade(t *testing.T) {
	older := buildOlder(t)
	newer := buildProgram(t, ".", "nextlevel")
	for _, durable := range []bool{false, true} {
		t.Run(fmt.Sprintf("durable=%v", durable), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, older, durable)
			h := newHistory()
			stop := f.load(h)
			h.floor(t, 200)
			f.wantsLevel(firstLevel)
			f.roll(newer, 1, 2)
			h.floor(t, 200)
			f.roll(older, 2) // there is a way back
			h.floor(t, 200)
			f.roll(newer, 3, 2)
			h.floor(t, 200)
			f.wantsLevel(firstLevel) // for the learner is older
			f.roll(newer, 4)
			f.wantsLevel(nextLevel)
			h.floor(t, 200)
			f.refusesOlder(older, durable)
			h.floor(t, 200)
			f.roll(newer, 3)
			f.wantsLevel(nextLevel)
			h.floor(t, 200)
			stop()
			for key := range 5 {
				get := registerOp{name: "get", key: fmt.Sprint("key ", key)}
				eventually(t, func() error { return h.do(t.Context(), f.ps[3].kv, -1, get) })
			}
			h.check(t)
		})
	}
}

// TestAwayWhileTheLevelRises: a node that has heard nothing of the rise, nor has it on its disk, is refused if
// it comes back with the older program, which says why; and catches up with the newer one.
func TestAwayWhileTheLevelRises(t *testing.T) {
	t.Parallel()
	older := buildOlder(t)
	newer := buildProgram(t, ".", "nextlevel")
	f := newFleet(t, older, true)
	f.roll(newer, 1, 2, 3)
	leader := leaderOf(t, f.ps[:3])
	away := f.ps[leader.id%3]
	others := &fleet{t: t}
	for _, p := range f.ps {
		if p != away {
			others.ps = append(others.ps, p)
		}
	}
	// Stopped, it is connected still, so the level rises without it: nobody who is down is passed over.
	if err := away.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	last := f.ps[3]
	last.signal(syscall.SIGTERM)
	last.program = newer
	last.start()
	others.wantsLevel(nextLevel)
	set := func(value string) {
		eventually(t, func() error { // of three voters two are there: an election may take long
			_, err := leader.kv.Set(t.Context(), &kvpb.SetRequest{Key: "later", Value: []byte(value)})
			return err
		})
	}
	set("v")
	away.signal(syscall.SIGKILL)

	away.program = older
	away.start() // which it does, for its directory has nothing of the rise
	eventually(t, func() error {
		text, err := os.ReadFile(away.log)
		if err == nil && !bytes.Contains(text, []byte("this program is too old for the cluster that calls this node: start a newer one")) {
			err = fmt.Errorf("it does not say that it is too old: %s", text[max(0, len(text)-2000):])
		}
		return err
	})
	refused := fmt.Sprintf("the program of node %d at %s speaks levels up to 1, and the cluster of this node is of a higher", away.id, away.address)
	for _, p := range others.ps[:2] {
		eventually(t, func() error {
			text, err := os.ReadFile(p.log)
			if err == nil && !bytes.Contains(text, []byte(refused)) {
				err = fmt.Errorf("node %d does not say that node %d is too old", p.id, away.id)
			}
			return err
		})
	}
	if m := away.metricsInTime(); m.Healthy || m.Level != firstLevel {
		t.Errorf("the older program: healthy: %v, level %d", m.Healthy, m.Level)
	}
	set("w")
	away.signal(syscall.SIGTERM)
	away.program = newer
	away.start()
	f.settled()
	f.wantsLevel(nextLevel)
	eventually(t, func() error {
		resp, err := away.kv.Get(t.Context(), &kvpb.GetRequest{Key: "later", Local: true})
		if err == nil && string(resp.Value) != "w" {
			err = errors.New("it has not caught up")
		}
		return err
	})
}

// newFleet makes a cluster of three voters and a learner that run a program.
func newFleet(t *testing.T, program string, durable bool) *fleet {
	t.Helper()
	f := &fleet{t: t}
	logs := t.TempDir()
	for id := uint64(1); id <= 4; id++ {
		p := &process{tb: t, id: id, address: "127.0.0.1:0", program: program, log: filepath.Join(logs, fmt.Sprint(id))}
		p.args = []string{"--heartbeat", "20ms", "--election-timeout", "250ms"}
		if durable {
			p.args = append(p.args, "--data-dir", filepath.Join(logs, fmt.Sprintf("data%d", id)), "--log-bytes", "1048576")
		}
		p.start()
		t.Cleanup(func() {
			p.signal(syscall.SIGKILL)
			_ = p.conn.Close()
			if t.Failed() {
				text, _ := os.ReadFile(p.log)
				t.Logf("node %d:\n%s", p.id, text[max(0, len(text)-4000):])
			}
		})
		f.ps = append(f.ps, p)
	}
	req := &kvpb.InitRequest{}
	for _, p := range f.ps[:3] {
		req.Members = append(req.Members, &kvpb.Node{Id: p.id, Address: p.address})
	}
	eventually(t, func() error {
		_, err := f.ps[0].cluster.Init(t.Context(), req)
		return err
	})
	eventually(t, func() error {
		_, err := f.ps[0].cluster.AddLearner(t.Context(), &kvpb.AddLearnerRequest{Node: &kvpb.Node{Id: 4, Address: f.ps[3].address}})
		return err
	})
	f.settled()
	return f
}

// refusesOlder replaces node 3 by the older program, after the rise: with a data directory it
// does not start, and without one it is not taken back.
func (f *fleet) refusesOlder(older string, durable bool) {
	f.t.Helper()
	p := f.ps[2]
	p.signal(syscall.SIGTERM)
	p.program = older
	if durable {
		text := p.failsToStart()
		if !strings.Contains(text, "this program is too old") {
			f.t.Errorf("it says: %s", text)
		}
		return
	}
	p.start()
	eventually(f.t, func() error {
		text, _ := os.ReadFile(f.ps[0].log)
		if !bytes.Contains(text, []byte("speaks levels up to 1")) {
			return errors.New("node 1 does not say that node 3 is too old")
		}
		return nil
	})
	if m := p.metricsInTime(); m.ClusterId != 0 {
		f.t.Errorf("the older program is in the cluster: %v", m)
	}
}

// failsToStart runs the process, which ends by itself with an error, and returns what it has
// logged.
func (p *process) failsToStart() string {
	p.tb.Helper()
	log, err := os.CreateTemp(p.tb.TempDir(), "log")
	if err != nil {
		p.tb.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd := commandOf(log, append([]string{"--id", fmt.Sprint(p.id), "--addr", p.address}, p.args...)...)
	cmd.Path = p.program
	err = cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitForGood {
		p.tb.Errorf("it ends with %v, not with exit status %d", err, exitForGood)
	}
	text, err := os.ReadFile(log.Name())
	if err != nil {
		p.tb.Fatal(err)
	}
	return string(text)
}
