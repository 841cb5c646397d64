package cluster

import (
	"os"
	"runtime/debug"
	"syscall"
	"testing"
	"time"

	"raft-key-value/kvpb"
)

// TestProc looks at this process, which uses a tenth of a second and 64 MiB.
func TestProc(t *testing.T) {
	pid := os.Getpid()
	before, err := CPU(pid)
	if err != nil {
		t.Skip(err) // not on Linux
	}
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		t.Fatal(err)
	}
	if used := time.Duration(own.Utime.Nano() + own.Stime.Nano()); before > used+time.Second || used > before+time.Second {
		t.Errorf("%v by the clock, %v by getrusage", before, used)
	}
	for used := before; used < before+100*time.Millisecond; {
		if used, err = CPU(pid); err != nil {
			t.Fatal(err)
		}
	}
	debug.FreeOSMemory() // what a test before has left would be taken anew
	memory, err := MemoryOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	large := make([]byte, 64<<20)
	for i := range large {
		large[i] = 1
	}
	after, err := MemoryOf(pid)
	if err != nil || after.RSS-memory.RSS < 48<<20 || after.Anon-memory.Anon < 48<<20 || after.File-memory.File > 16<<20 || large[0] != 1 {
		t.Errorf("%+v, then %+v, %v", memory, after, err)
	}
	if free, err := Available(); err != nil || free < 1<<20 {
		t.Errorf("%d bytes, %v", free, err)
	}
}

// TestSettled takes away one by one what a settled cluster has.
func TestSettled(t *testing.T) {
	settledMetrics := func() *kvpb.MetricsResponse {
		m := &kvpb.MetricsResponse{Role: kvpb.Role_ROLE_LEADER, Node: &kvpb.Node{Id: 1}}
		for id := uint64(1); id <= 3; id++ {
			m.Members = append(m.Members, &kvpb.MemberStatus{Node: &kvpb.Node{Id: id}, Voter: true, Connected: true, Progress: &kvpb.Progress{CaughtUp: true}})
		}
		return m
	}
	if !settled(settledMetrics(), 3) {
		t.Error("a cluster that has settled has not")
	}
	for name, change := range map[string]func(*kvpb.MetricsResponse){
		"a follower":    func(m *kvpb.MetricsResponse) { m.Role = kvpb.Role_ROLE_FOLLOWER },
		"joint":         func(m *kvpb.MetricsResponse) { m.Joint = true },
		"one too few":   func(m *kvpb.MetricsResponse) { m.Members = m.Members[:2] },
		"no voter":      func(m *kvpb.MetricsResponse) { m.Members[1].Voter = false },
		"a learner":     func(m *kvpb.MetricsResponse) { m.Members[1].Learner = true },
		"not connected": func(m *kvpb.MetricsResponse) { m.Members[2].Connected = false },
		"behind":        func(m *kvpb.MetricsResponse) { m.Members[2].Progress.CaughtUp = false },
	} {
		m := settledMetrics()
		if change(m); settled(m, 3) {
			t.Errorf("%s: the cluster has settled", name)
		}
	}
}
