package cluster

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is what /proc/PID/stat counts in, on every Linux that Go runs on.
const ticksPerSecond = 100

// CPU is what a process has used of the processors, in steps of 10 ms.
func CPU(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // from the third on: see proc_pid_stat(5)
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * time.Second / ticksPerSecond, err
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
