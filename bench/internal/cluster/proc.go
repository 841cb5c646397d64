package cluster

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CPU is what a process has used of the processors: its CPU clock, whose number
// is made of the pid as clock_getcpuclockid(3) does it on Linux.
func CPU(pid int) (time.Duration, error) {
	const scheduled = 2 // CPUCLOCK_SCHED: to the nanosecond
	var t unix.Timespec
	if err := unix.ClockGettime(^int32(pid)<<3|scheduled, &t); err != nil {
		return 0, fmt.Errorf("the CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// Memory is what a process has in memory, in bytes: all of it, its own, and
// pages of files, which the system may take back.
type Memory struct{ RSS, Anon, File int64 }

// MemoryOf is a process's.
func MemoryOf(pid int) (m Memory, err error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	for name, v := range map[string]*int64{"VmRSS": &m.RSS, "RssAnon": &m.Anon, "RssFile": &m.File} {
		if *v, err = kilobytes(path, name); err != nil {
			return m, err
		}
	}
	return m, nil
}

// Available is how much memory the machine has left, in bytes.
func Available() (int64, error) { return kilobytes("/proc/meminfo", "MemAvailable") }

// kilobytes reads a line such as "VmRSS:   1234 kB", in bytes.
func kilobytes(path, name string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}
