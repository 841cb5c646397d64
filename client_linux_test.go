package main

import (
	"bytes"
	"fmt"
	"os"
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
