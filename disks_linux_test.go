// Ring 3, with a disk that stalls and one that is full.

package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Requests of ioctl(2) that stop all writes to a file system, and let them go on.
const fiFreeze, fiThaw = 0xC0045877, 0xC0045878

// TestDisks has the leader's disk, a file system of its own, stall and then run
// full, under load. A stall costs no election, and no write through the others
// (the leader itself applies what is on its disk); a full disk ends the node
// before it promises anything more, and with space it is back as who it was.
func TestDisks(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	run := func(name string, args ...string) {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Skipf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	dir := t.TempDir()
	image, mount := filepath.Join(dir, "image"), filepath.Join(dir, "mount")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 48<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	run("ip", "link", "set", "lo", "up")
	run("mkfs.ext4", "-q", "-m", "0", "-F", image)
	run("mount", "--make-rprivate", "/")
	run("mount", "-o", "loop", image, mount)
	t.Cleanup(func() { _ = syscall.Unmount(mount, 0) }) // after the nodes
	disk, err := os.Open(mount)
	if err != nil {
		t.Fatal(err)
	}
	ioctl := func(request uintptr) {
		if _, _, err := syscall.Syscall(syscall.SYS_IOCTL, disk.Fd(), request, 0); err != 0 && request == fiFreeze {
			t.Skipf("the file system cannot be frozen: %v", err)
		}
	}
	var ps []*process
	for i, parent := range []string{mount, dir, dir} {
		args := []string{"--data-dir", filepath.Join(parent, fmt.Sprint("data", i)), "--log-bytes", "1048576"}
		ps = append(ps, &process{id: uint64(i + 1), address: "127.0.0.1:0", args: args})
	}
	formCluster(t, ps)
	t.Cleanup(func() { ioctl(fiThaw); _ = disk.Close() }) // before the nodes, or they could not end
	leader := leaderOf(t, ps)
	if leader != ps[0] {
		t.Fatal("the first one does not lead")
	}
	before, err := leader.metrics()
	if err != nil {
		t.Fatal(err)
	}
	cs, stop := startCounters(t, 6, func() *process { return ps[1+rand.IntN(2)] })
	progress := func() {
		t.Helper()
		count := func() (n uint64) {
			for _, c := range cs {
				n += c.writes.Load()
			}
			return n
		}
		floor := count() + 100
		eventually(t, func() error {
			if n := count(); n < floor {
				return fmt.Errorf("%d writes, waiting for %d", n, floor)
			}
			return nil
		})
	}
	progress()
	ioctl(fiFreeze)
	progress() // the others are a majority
	ioctl(fiThaw)
	progress()
	if m, err := leader.metrics(); err != nil || m.Term != before.Term {
		t.Errorf("the stall cost an election, or %v: term %d, before it %d", err, m.GetTerm(), before.Term)
	}

	rubbish := filepath.Join(mount, "rubbish")
	f, err := os.Create(rubbish)
	if err != nil {
		t.Fatal(err)
	}
	filling, full := context.WithCancel(context.Background())
	var filler sync.WaitGroup
	filler.Go(func() { // until the node has ended: it frees space when it drops an old snapshot
		for filling.Err() == nil {
			if _, err := f.Write(make([]byte, 64<<10)); err != nil {
				sleep(filling, time.Millisecond)
			}
		}
	})
	alarm := time.AfterFunc(pollDeadline, func() { _ = leader.cmd.Process.Kill() })
	err = leader.cmd.Wait() // its writes go on, so it needs space
	alarm.Stop()
	full()
	filler.Wait()
	_ = f.Close()
	if text, _ := os.ReadFile(leader.log); leader.cmd.ProcessState.ExitCode() != 1 || !bytes.Contains(text, []byte("no space left on device")) {
		t.Errorf("with a full disk the node ended with %v: %s", err, text[max(0, len(text)-1000):])
	}
	progress()
	if err := os.Remove(rubbish); err != nil {
		t.Fatal(err)
	}
	leader.start()
	awaitHealthy(t, ps, pollDeadline)
	progress()
	stop()
	if m, err := leader.metrics(); err != nil || m.RaftId != before.RaftId {
		t.Errorf("it came back as somebody else, or %v", err)
	}
	for _, c := range cs {
		for _, p := range ps {
			if err := c.check(context.Background(), p); err != nil {
				t.Error(err)
			}
		}
	}
	sameListings(t, ps)
}
