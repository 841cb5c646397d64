// Tests of notify.go: what a supervisor is told, and when.

package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// fakeSupervisor listens as systemd does, at a path or an abstract name.
func fakeSupervisor(t *testing.T, address string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// wantTold waits for the next notification.
func wantTold(t *testing.T, conn *net.UnixConn, want string) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(pollDeadline)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := conn.Read(b)
	if err != nil {
		t.Fatalf("waiting for %s: %v", want, err)
	}
	wantText(t, "the notification", string(b[:n]), want)
}

// socketPath is that of a socket in a directory of its own: t.TempDir may be too long for one.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rkv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "notify")
}

// TestNotify: a node in no cluster, which is not healthy, says READY=1 once it answers, and
// STOPPING=1 when it is told to stop.
func TestNotify(t *testing.T) {
	t.Parallel()
	addresses := []string{socketPath(t)}
	if runtime.GOOS == "linux" {
		addresses = append(addresses, fmt.Sprintf("@raft-key-value-test-%d", os.Getpid()))
	}
	for _, address := range addresses {
		conn := fakeSupervisor(t, address)
		log, err := os.Create(filepath.Join(t.TempDir(), "log"))
		if err != nil {
			t.Fatal(err)
		}
		cmd := commandOf(log, "--id", "1", "--addr", "127.0.0.1:0")
		cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+address)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_ = log.Close()
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		wantTold(t, conn, "READY=1")
		text, err := os.ReadFile(log.Name())
		if err != nil || !readyLine.Match(text) {
			t.Errorf("READY=1 was said before the node listened: %s, %v", text, err)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		wantTold(t, conn, "STOPPING=1")
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

// TestFindSupervisor: NOTIFY_SOCKET may be missing, or be of a kind that this program does not
// know.
func TestFindSupervisor(t *testing.T) {
	for address, want := range map[string]supervisor{
		"":                    "",
		"/run/systemd/notify": "/run/systemd/notify",
		"@abstract":           "@abstract",
		"vsock:2:1234":        "",
		"relative":            "",
	} {
		env := func(name string) (string, bool) { return address, name == "NOTIFY_SOCKET" && address != "" }
		if got := findSupervisor(env); got != want {
			t.Errorf("%q: %q", address, got)
		}
	}
}

// TestTell: a supervisor that has gone, or does not read, keeps no node from going on.
func TestTell(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	supervisor("").tell(notifyReady, logger)
	wantText(t, "the log", log.String(), "")
	supervisor(socketPath(t)).tell(notifyReady, logger)
	wantPart(t, log.String(), "the supervisor cannot be told")

	address := socketPath(t)
	fakeSupervisor(t, address)
	var err error
	for range 10_000 { // more than any socket keeps
		if err = supervisor(address).send(notifyReady); err != nil {
			break
		}
	}
	if !os.IsTimeout(err) {
		t.Errorf("nobody reads: %v", err)
	}
}
