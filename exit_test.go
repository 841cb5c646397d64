// Tests of exit.go: the exit status of a node's process.

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

var errGoesOn = errors.New("the process goes on")

// endOfProcess runs a node that is to end by itself, and returns its exit status and its log.
func endOfProcess(t *testing.T, args ...string) (status int, log string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	cmd := commandOf(f, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := inBackground(cmd.Wait)
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended.ended })
	eventually(t, func() error {
		select {
		case <-ended.ended:
			return nil
		default:
			return errGoesOn
		}
	})
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(text)
}

// wantEnd is endOfProcess, and checks both.
func wantEnd(t *testing.T, status int, words string, args ...string) {
	t.Helper()
	got, log := endOfProcess(t, args...)
	if got != status || !strings.Contains(log, words) {
		t.Errorf("%q: status %d, want %d and %q: %s", args, got, status, words, log)
	}
}

// TestNodesExitStatus: a process says by its exit status whether it is to be started again.
func TestNodesExitStatus(t *testing.T) {
	t.Parallel()
	ps := []*process{{id: 1, address: "127.0.0.1:0"}, {id: 2, address: "127.0.0.1:0"}, {id: 3, address: "127.0.0.1:0"}}
	for _, p := range ps {
		p.args = []string{"--data-dir", filepath.Join(t.TempDir(), "data")}
	}
	formCluster(t, ps)
	ps[1].signal(syscall.SIGTERM)
	wantEnd(t, exitForGood, "started without --data-dir", "--id", "2", "--addr", ps[1].address) // once there is a leader
	ps[1].start()
	awaitHealthy(t, ps, 30*time.Second)
	removed := ps[2]
	runOperator(t, "remove", "3", "--endpoints", ps[0].address)
	if err := removed.cmd.Wait(); removed.cmd.ProcessState.ExitCode() != exitForGood {
		t.Errorf("it was removed: %v", err)
	}
	again := append([]string{"--id", "3", "--addr", removed.address}, removed.args...)
	wantEnd(t, exitForGood, "it is no member of its cluster any more", again...)

	wantEnd(t, exitFailed, "address already in use", "--id", "9", "--addr", ps[0].address)
	wantEnd(t, exitUsage, "--addr is needed", "--id", "9")
	dir := ps[0].args[1]
	wantEnd(t, exitFailed, "another process uses it", "--id", "1", "--addr", "127.0.0.1:0", "--data-dir", dir)
	ps[0].signal(syscall.SIGTERM)
	if status := ps[0].cmd.ProcessState.ExitCode(); status != exitYes {
		t.Errorf("SIGTERM: status %d", status)
	}
	wantEnd(t, exitForGood, "it is that of node 1, this is node 9",
		"--id", "9", "--addr", "127.0.0.1:0", "--data-dir", dir)
	logs, err := filepath.Glob(filepath.Join(dir, "*.wal"))
	if err != nil || len(logs) == 0 {
		t.Fatal(logs, err)
	}
	if err := os.Truncate(logs[0], 100); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, exitForGood, logs[0], "--id", "1", "--addr", "127.0.0.1:0", "--data-dir", dir)
	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "photo.jpg"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, exitForGood, "it is not empty: there is photo.jpg", "--id", "9", "--addr", "127.0.0.1:0", "--data-dir", foreign)
	wantEnd(t, exitFailed, "has to be there", "--id", "9", "--addr", "127.0.0.1:0", "--data-dir", filepath.Join(foreign, "no", "parent"))
}

// TestPlanOfANodeWithState: a list that does not name the node as it is now is a usage error of a
// new one. One with state is who it was, and warns.
func TestPlanOfANodeWithState(t *testing.T) {
	t.Parallel()
	p := &process{id: 1, address: "127.0.0.1:0"}
	dir := filepath.Join(t.TempDir(), "data")
	others := []string{"--data-dir", dir, "--initial-cluster", "2=127.0.0.1:2"}
	isNotNamed := "--initial-cluster does not name this node"
	args := append([]string{"--id", "1", "--addr", deadAddress(t)}, others...)
	status, log := endOfProcess(t, args...)
	if status != exitUsage || !strings.Contains(log, isNotNamed) || !strings.Contains(log, "start_again=false") {
		t.Errorf("a new node: status %d, %s", status, log)
	}
	p.args = []string{"--data-dir", dir}
	formCluster(t, []*process{p})
	for _, plan := range [][]string{{"--initial-cluster", "2=127.0.0.1:2"}, {"--join", p.address}} {
		p.signal(syscall.SIGTERM)
		p.args = append([]string{"--data-dir", dir}, plan...)
		p.start()
		awaitHealthy(t, []*process{p}, 30*time.Second)
		log, err := os.ReadFile(p.log)
		if err != nil || !strings.Contains(string(log), "ignores a flag that would be refused") {
			t.Errorf("%v: %v: %s", plan, err, log)
		}
		if err := os.Truncate(p.log, 0); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHelpHasExitStatuses: --help names each.
func TestHelpHasExitStatuses(t *testing.T) {
	var out strings.Builder
	none := func(string) (string, bool) { return "", false }
	_, _ = parseOptions([]string{"--help"}, &out, none)
	for _, line := range []string{"\n  0  it was told to stop", "\n  1  it could not", "\n  2  usage", "\n  5  it must not be"} {
		wantPart(t, out.String(), line)
	}
}
