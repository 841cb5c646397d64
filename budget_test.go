// Tests of the budget: how memory is found out, and divided.

package main

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakeRoot is a directory with the files of /proc and /sys that say how much memory there is.
func fakeRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestFindMemory: the least of what cgroups of both versions and the machine allow.
func TestFindMemory(t *testing.T) {
	const (
		meminfo = "MemTotal:       16000000 kB\nMemFree: 1 kB\n"
		v2      = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
		v1      = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
	)
	files := func(more ...string) map[string]string {
		m := map[string]string{"proc/meminfo": meminfo}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	for _, tt := range []struct {
		name  string
		files map[string]string
		bytes uint64
		from  string
	}{
		{"nothing", map[string]string{}, 0, "nobody"},
		{"the machine alone", files(), 16000000 << 10, "the machine"},
		{"version 2", files("proc/self/mountinfo", v2, "proc/self/cgroup", "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max", "209715200\n", "sys/fs/cgroup/a/memory.max", "max\n"), 200 << 20, "cgroup /sys/fs/cgroup/a/b"},
		{"version 2, a parent has less", files("proc/self/mountinfo", v2, "proc/self/cgroup", "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max", "209715200\n", "sys/fs/cgroup/a/memory.max", "104857600\n"), 100 << 20, "cgroup /sys/fs/cgroup/a"},
		{"version 2 in a namespace", files("proc/self/mountinfo", v2, "proc/self/cgroup", "0::/\n",
			"sys/fs/cgroup/memory.max", "209715200\n"), 200 << 20, "cgroup /sys/fs/cgroup"},
		{"version 2 without a limit", files("proc/self/mountinfo", v2, "proc/self/cgroup", "0::/a\n",
			"sys/fs/cgroup/a/memory.max", "max\n"), 16000000 << 10, "the machine"},
		{"version 1", files("proc/self/mountinfo", v1+v2, "proc/self/cgroup", "4:memory:/a\n1:cpu:/b\n0::/\n",
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes", "209715200\n"), 200 << 20, "cgroup /sys/fs/cgroup/memory/a"},
		{"version 1 without a limit", files("proc/self/mountinfo", v1, "proc/self/cgroup", "4:memory:/a\n",
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"), 16000000 << 10, "the machine"},
		{"version 1 in a container", files("proc/self/mountinfo",
			"35 31 0:32 /docker/c1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n", "proc/self/cgroup", "4:memory:/docker/c1\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes", "209715200\n"), 200 << 20, "cgroup /sys/fs/cgroup/memory"},
		{"a mount of others", files("proc/self/mountinfo",
			"35 31 0:32 /docker/c2 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n", "proc/self/cgroup", "4:memory:/docker/c1\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes", "209715200\n"), 200 << 20, "cgroup /sys/fs/cgroup/memory"},
		{"more than the machine has", files("proc/self/mountinfo", v2, "proc/self/cgroup", "0::/a\n",
			"sys/fs/cgroup/a/memory.max", "999999999999\n"), 16000000 << 10, "the machine"},
		{"rubbish", files("proc/self/mountinfo", "x\n1 2 3 - cgroup2\n- - -\n\n", "proc/self/cgroup", "x\n0:\n"), 16000000 << 10, "the machine"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := findMemory(fakeRoot(t, tt.files), func(string) (string, bool) { return "", false })
			if m.bytes != tt.bytes || m.from != tt.from || m.goLimit != 0 {
				t.Errorf("%d from %q, Go's limit is %d; want %d from %q", m.bytes, m.from, m.goLimit, tt.bytes, tt.from)
			}
		})
	}
}

// TestBudget: the parts are what docs/operations.md says, together no more than Go's limit, and
// the store gets what flags leave.
func TestBudget(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		name                         string
		m                            memoryFound
		args                         string
		goal, clients, log, watch, q uint64
		store                        uint64
	}{
		{"200 MiB", memoryFound{bytes: 200 * mib}, "", 175, 29, 3, 7, 7, 21},
		{"1 GiB", memoryFound{bytes: 1024 * mib}, "", 896, 149, 18, 37, 37, 134},
		{"24 GiB", memoryFound{bytes: 24 << 30}, "", 21504, 256, 64, 64, 64, 5194},
		{"GOMEMLIMIT", memoryFound{bytes: 24 << 30, goLimit: 175 * mib}, "", 175, 29, 3, 7, 7, 21},
		{"GOMEMLIMIT beyond the memory", memoryFound{bytes: 200 * mib, goLimit: 1 << 40}, "", 175, 29, 3, 7, 7, 21},
		{"GOMEMLIMIT alone", memoryFound{goLimit: 175 * mib}, "", 175, 29, 3, 7, 7, 21},
		{"next to nothing", memoryFound{bytes: 16 * mib}, "", 14, 2, 1, 4, 4, 1},
		{"flags", memoryFound{bytes: 1024 * mib}, "--log-bytes=67108864 --watch-bytes=4194304", 896, 149, 64, 4, 37, 97},
		{"a limit", memoryFound{bytes: 200 * mib}, "--max-store-bytes=104857600", 175, 29, 3, 7, 7, 100},
		{"nobody says", memoryFound{}, "", 0, 256, 64, 64, 64, math.MaxUint64 / mib},
		{"nobody says, a limit", memoryFound{}, "--max-store-bytes=104857600", 0, 256, 64, 64, 64, 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"--id=1", "--addr=127.0.0.1:1"}, strings.Fields(tt.args)...)
			o, err := parseOptions(args, nil, func(string) (string, bool) { return "", false })
			if err != nil {
				t.Fatal(err)
			}
			b := budgetOf(tt.m, &o)
			got := [6]uint64{b.goal / mib, b.clients / mib, b.log / mib, b.watch / mib, b.queued / mib, b.store / mib}
			if want := [6]uint64{tt.goal, tt.clients, tt.log, tt.watch, tt.q, tt.store}; got != want {
				t.Errorf("goal, clients, log, watch, queued and store are %d, want %d", got, want)
			}
			b.apply(&o)
			if o.maxStoreBytes != b.store || o.logBytes != b.log || o.watchBytes != b.watch {
				t.Errorf("the options are %+v", o)
			}
		})
	}
	for m := uint64(64 * mib); m < 1<<40; m += m/3 + 12345 {
		o := defaultOptions()
		b := budgetOf(memoryFound{bytes: m}, &o)
		all := idleBytes + b.clients + 4*b.log + b.watch + b.views + b.queued + 4*b.store
		if all > b.goal || all < b.goal-8 {
			t.Errorf("of %d bytes, Go may take %d, and the parts are %d", m, b.goal, all)
		}
	}
}

// TestShrunk: with little memory, limits have room for the largest request, and no limit is larger
// than with much.
func TestShrunk(t *testing.T) {
	full := newLimiter(&refusing{}, wide, nil, quiet())
	for _, bytes := range []uint64{0, clientBytes, clientBytes / 9, 1 << 20, 1} {
		l := newLimiter(&refusing{}, wide, nil, quiet())
		l.shrink(&options{clientBytes: bytes})
		for name, rooms := range map[string][2]roomLimits{
			"writes":        {l.writes.limits, full.writes.limits},
			"pipelines":     {l.pipelines.limits, full.pipelines.limits},
			"large answers": {l.answers.large.limits, full.answers.large.limits},
			"small answers": {l.answers.small.limits, full.answers.small.limits},
		} {
			got, most := rooms[0], rooms[1]
			isSane := got.late >= 1 && got.share >= got.late && got.all >= got.share
			isSmaller := got.all <= most.all && got.share <= most.share && got.late <= most.late
			if !isSane || !isSmaller {
				t.Errorf("of %d bytes, %s have %+v, of all %+v", bytes, name, got, most)
			}
			if bytes == 0 && got != most {
				t.Errorf("%s are shrunk to %+v from %+v, for nothing", name, got, most)
			}
		}
		if l.writes.limits.all < maxRequestBytes || l.pipelines.limits.all < mostOfPipeline || l.arrivals.limit < maxMessageBytes {
			t.Errorf("of %d bytes, there is no room for the largest request", bytes)
		}
		if l.calls.limit < 1 || l.calls.openLimit < l.calls.limit || l.places.clients < 1 {
			t.Errorf("of %d bytes, there are no calls", bytes)
		}
	}
}
