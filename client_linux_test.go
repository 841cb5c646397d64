package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

// openTerminal opens a terminal that nobody sees: what is written to keyboard can be read from
// it, line by line.
func openTerminal(t *testing.T) (keyboard, terminal *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = keyboard.Close() })
	control := func(request uintptr, value *int32) {
		_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, keyboard.Fd(), request, uintptr(unsafe.Pointer(value)))
		if errno != 0 {
			t.Skip(errno)
		}
	}
	var unlocked, number int32
	control(syscall.TIOCSPTLCK, &unlocked)
	control(syscall.TIOCGPTN, &number)
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = terminal.Close() })
	return keyboard, terminal
}

// TestClientAsksBeforeDelete: only yes means yes.
func TestClientAsksBeforeDelete(t *testing.T) {
	f := newFakeNode(t)
	for _, test := range []struct {
		keys  int
		typed string
		exit  int
		out   string
		errs  string
	}{
		{2, "yes\n", exitYes, "deleted keys: 2\n", `This deletes 2 keys, from "k0" on; type yes: `},
		{3, "yes\n", exitYes, "deleted keys: 3\n", `This deletes 3 keys, from "k0" on; type yes: `},
		{4, "yes\n", exitYes, "deleted keys: 4\n", `This deletes 3 keys or more, from "k0" on; type yes: `},
		{4, "y\n", exitNotDone, "", "type yes: raft-key-value: delete: nothing was deleted: the answer is not yes\n"},
		{4, "\n", exitNotDone, "", "nothing was deleted"},
		{4, "\x04", exitNotDone, "", "nothing was deleted"}, // the end of the input
		{0, "", exitNo, "", "raft-key-value: delete: not found\n"},
	} {
		f.do(func() { clear(f.data) })
		for i := range test.keys {
			f.put(fmt.Sprint("k", i), "v")
		}
		keyboard, terminal := openTerminal(t)
		if _, err := keyboard.WriteString(test.typed); err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		args := []string{"delete", "--prefix", "k", "--endpoints", f.addr}
		if got := runClient(t.Context(), args, terminal, &out, &errs); got != test.exit {
			t.Errorf("%q: exit status %d, want %d: %s", test.typed, got, test.exit, &errs)
		}
		wantText(t, test.typed, out.String(), test.out)
		wantPart(t, errs.String(), test.errs)
		left := test.keys
		if test.exit == exitYes {
			left = 0
		}
		if len(f.data) != left {
			t.Errorf("%q: %d keys are left", test.typed, len(f.data))
		}
		f.do(func() { clear(f.data) })
	}
	// As JSON, there is no way to ask.
	_, terminal := openTerminal(t)
	var errs bytes.Buffer
	args := []string{"delete", "--prefix", "k", "-o", "json", "--endpoints", f.addr}
	if got := runClient(t.Context(), args, terminal, &bytes.Buffer{}, &errs); got != exitUsage || !strings.Contains(errs.String(), "--yes") {
		t.Errorf("exit status %d: %s", got, &errs)
	}
}

// TestClientBackupToTerminal: nobody wants that.
func TestClientBackupToTerminal(t *testing.T) {
	_, terminal := openTerminal(t)
	for _, from := range [][]string{{"--data-dir", realDirectory(t)}, {"--endpoints", closedAddress}} {
		var errs bytes.Buffer
		exit := runClient(t.Context(), append([]string{"backup", "-"}, from...), nil, terminal, &errs)
		if exit != exitUsage {
			t.Errorf("exit status %d: %s", exit, &errs)
		}
		wantPart(t, errs.String(), "stdout is a terminal, and a backup is no text")
	}
}

// TestClientProgress: a terminal is shown how far a restore is, and that goes away; a program sees
// nothing of it.
func TestClientProgress(t *testing.T) {
	for _, test := range []struct {
		output string
		shows  bool
	}{{"text", true}, {"json", false}} {
		keyboard, terminal := openTerminal(t)
		log, err := os.Create(filepath.Join(t.TempDir(), "log"))
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		for _, stderr := range []*os.File{terminal, log} {
			c := newClient(&invocation{output: test.output}, nil, &bytes.Buffer{}, stderr)
			say := c.progressOf("restoring", "keys")
			say(10, 200)
			say(20, 200)
			_ = c.print("done", "done\n")
			fmt.Fprintln(stderr, "end")
		}
		text, err := os.ReadFile(log.Name())
		if err != nil || string(text) != "end\n" {
			t.Errorf("a file is shown %q, %v", text, err)
		}
		var shown []byte
		for !bytes.Contains(shown, []byte("end")) {
			b := make([]byte, 4096)
			n, err := keyboard.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			shown = append(shown, b[:n]...)
		}
		if !test.shows {
			wantText(t, "shown", string(shown), "end\r\n")
			continue
		}
		wantPart(t, string(shown), "\r\x1b[Krestoring: 10 of 200 keys, ")
		wantPart(t, string(shown), " a second\r\x1b[Krestoring: 20 of 200 keys, ")
		wantPart(t, string(shown), " a second\r\x1b[Kend")
	}
}

// TestClientProgressOfRestore: it is told while the file is read.
func TestClientProgressOfRestore(t *testing.T) {
	backup, path, pipe := pipeOf(t, 20000)
	keyboard, terminal := openTerminal(t)
	ended := make(chan int, 1)
	go func() {
		args := []string{"restore", path, "--data-dir", filepath.Join(t.TempDir(), "data"), "--id", "5", "--addr", "127.0.0.1:5"}
		ended <- runClient(t.Context(), args, nil, &bytes.Buffer{}, terminal)
	}()
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		var all []byte
		for b := make([]byte, 4096); !bytes.Contains(all, []byte(" of 20000 keys, ")); {
			n, err := keyboard.Read(b)
			if err != nil {
				return
			}
			all = append(all, b[:n]...)
		}
	}()
	sent := 0
	eventually(t, func() error { // more and more of it, but for the end, until something is shown
		select {
		case <-shown:
			return nil
		default:
		}
		n := min(8<<10, len(backup)*9/10-sent)
		_, err := pipe.Write(backup[sent : sent+n])
		sent += n
		return errors.Join(err, errors.New("nothing is shown"))
	})
	if _, err := pipe.Write(backup[sent:]); err != nil {
		t.Fatal(err)
	}
	pipe.Close()
	if exit := <-ended; exit != exitYes {
		t.Errorf("exit status %d", exit)
	}
}
