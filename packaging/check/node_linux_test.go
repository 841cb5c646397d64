package check

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"
)

// testLimit is generous: it says that something never happens.
const testLimit = time.Minute

// node is a process that a test has started.
type node struct {
	cmd     *exec.Cmd
	log     string // its file
	address string
	http    string
}

var readyLine = regexp.MustCompile(` msg=ready .*advertise=(\S+).* http=(\S+)`)

// startNode starts a node by a command, and waits until it listens.
func startNode(t *testing.T, cmd *exec.Cmd) *node {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd.Stderr = log
	n := &node{cmd: cmd, log: log.Name()}
	err = cmd.Start()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EINVAL) {
		t.Skipf("there are no namespaces here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	eventually(t, func() error {
		text, err := os.ReadFile(n.log)
		if m := readyLine.FindSubmatch(text); m != nil {
			n.address, n.http = string(m[1]), string(m[2])
			return nil
		}
		return fmt.Errorf("the node is not ready: %v\n%s", err, text)
	})
	return n
}

// eventually polls f until it returns nil. Nothing else sleeps.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(testLimit); ; time.Sleep(10 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still after %v: %v", testLimit, err)
		}
	}
}

// stop has a node end by SIGTERM, and looks that it ends well, and soon.
func (n *node) stop(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(testLimit, func() { _ = n.cmd.Process.Kill() })
	defer late.Stop()
	if err := n.cmd.Wait(); err != nil {
		text, _ := os.ReadFile(n.log)
		t.Fatalf("SIGTERM: %v\n%s", err, text)
	}
}

// command runs a sub-command for a node, and returns what it prints.
func (n *node) command(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(buildProgram(t), append(args, "--endpoints", n.address, "--timeout", "30s")...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// copyFile copies a file, which everybody may run then.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o755); err != nil {
		t.Fatal(err)
	}
}

func makeDirectory(t *testing.T, elements ...string) string {
	t.Helper()
	dir := filepath.Join(elements...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}
