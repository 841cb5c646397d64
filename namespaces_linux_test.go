// Ring 3, in namespaces of the test's own. Real processes, and between them a router that
// is the test: it reads each packet from a TUN device, and passes it on, late, or not at
// all. And real disks, one that stalls and one that is full.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

// namespaceVariable tells a test that it runs in namespaces of its own.
const namespaceVariable = "RAFT_KEY_VALUE_TEST_NAMESPACE"

// inNamespace runs the test again, in a process with namespaces of its own for
// the network, mounts and processes: whatever it makes there ends with it. It
// returns true in that process.
func inNamespace(t *testing.T) bool {
	if os.Getenv(namespaceVariable) != "" {
		return true
	}
	t.Parallel() // it mostly waits
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), *soak+2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "-test.run=^"+t.Name()+"$", "-test.v", "-soak="+soak.String())
	cmd.Env = append(os.Environ(), namespaceVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	switch {
	case cmd.Process == nil:
		t.Skipf("there are no namespaces here: %v", err)
	case strings.Contains(string(out), "--- SKIP: "+t.Name()):
		t.Skipf("%s", out)
	case err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()):
		t.Errorf("%v\n%s", err, out)
	default:
		t.Logf("%s", out)
	}
	return false
}

// router joins hosts 1 to n, each a namespace with the address 10.77.i.2. The
// test itself reaches them directly.
type router struct {
	tun *os.File

	mu            sync.Mutex
	lost          map[[2]int]bool // by from and to
	loss          float64         // of all others
	delay, jitter time.Duration
	counts        map[string]int
}

func newRouter(t *testing.T, hosts int) *router {
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Skipf("%s does not work here: %v", what, err)
		}
	}
	run := func(command string) {
		t.Helper()
		args := strings.Fields(command)
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		must(command, err)
	}
	// ip keeps its namespaces in /run/netns.
	must("mount", errors.Join(syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""), syscall.Mount("tmpfs", "/run", "tmpfs", 0, "")))
	must("forwarding", os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600))
	r := &router{lost: map[[2]int]bool{}, counts: map[string]int{}}
	var err error
	r.tun, err = openTUN("tun0")
	must("/dev/net/tun", err)
	run("ip link set lo up")
	run("ip link set tun0 up")
	run("ip route add 10.77.0.0/16 dev tun0 table 77")
	for i := 1; i <= hosts; i++ {
		run(fmt.Sprintf("ip netns add host%d", i))
		run(fmt.Sprintf("ip link add port%d type veth peer name eth0 netns host%d", i, i))
		run(fmt.Sprintf("ip address add 10.77.%d.1/24 dev port%d", i, i))
		run(fmt.Sprintf("ip link set port%d up", i))
		run(fmt.Sprintf("ip rule add iif port%d table 77", i)) // to us by way of the table local, which comes first
		run(fmt.Sprintf("ip -n host%d address add 10.77.%d.2/24 dev eth0", i, i))
		run(fmt.Sprintf("ip -n host%d link set lo up", i))
		run(fmt.Sprintf("ip -n host%d link set eth0 up", i))
		run(fmt.Sprintf("ip -n host%d route add default via 10.77.%d.1", i, i))
	}
	ended := make(chan struct{})
	go func() { defer close(ended); r.run() }()
	t.Cleanup(func() { _ = r.tun.Close(); <-ended })
	return r
}

func openTUN(name string) (*os.File, error) {
	fd, err := syscall.Open("/dev/net/tun", syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	req := struct { // struct ifreq
		name  [16]byte
		flags uint16
		_     [22]byte
	}{flags: 1 | 0x1000} // IFF_TUN, IFF_NO_PI
	copy(req.name[:], name)
	const tunSetIff = 0x400454ca // TUNSETIFF
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), tunSetIff, uintptr(unsafe.Pointer(&req))); errno != 0 {
		_ = syscall.Close(fd)
		return nil, errno
	}
	return os.NewFile(uintptr(fd), name), nil
}

// run passes packets on until the device is closed.
func (r *router) run() {
	b := make([]byte, 64<<10)
	for {
		n, err := r.tun.Read(b)
		if err != nil {
			return
		}
		if n < 20 || b[0]>>4 != 4 { // not IPv4
			continue
		}
		late, ok := r.fate(int(b[14]), int(b[18]))
		switch {
		case !ok:
		case late == 0:
			_, _ = r.tun.Write(b[:n])
		default:
			p := slices.Clone(b[:n])
			time.AfterFunc(late, func() { _, _ = r.tun.Write(p) })
		}
	}
}

// fate says how late a packet arrives, if it does.
func (r *router) fate(from, to int) (late time.Duration, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.lost[[2]int{from, to}], rand.Float64() < r.loss:
		r.counts["lost"]++
		return 0, false
	case r.delay > 0:
		r.counts["late"]++
		return r.delay + rand.N(r.jitter), true
	}
	r.counts["passed"]++
	return 0, true
}

// lose loses what some hosts send to others.
func (r *router) lose(from, to []int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range from {
		for _, t := range to {
			r.lost[[2]int{f, t}] = true
		}
	}
}

func (r *router) slow(delay, jitter time.Duration, loss float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay, r.jitter, r.loss = delay, jitter, loss
}

// heal ends all faults, and says what they did.
func (r *router) heal() (counts map[string]int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	counts, r.counts = r.counts, map[string]int{}
	r.lost, r.delay, r.jitter, r.loss = map[[2]int]bool{}, 0, 0, 0
	return counts
}

// realCluster is three processes in namespaces, in the hands of a scenario.
type realCluster struct {
	t      *testing.T
	r      *router
	ps     []*process
	h      *history
	leader *process // when the scenario began
	term   uint64
	rest   []*process
}

func hosts(ps ...*process) (is []int) {
	for _, p := range ps {
		is = append(is, int(p.id))
	}
	return is
}

// deposed waits until the others have another leader, and then until they have
// taken writes under it.
func (c *realCluster) deposed() {
	c.t.Helper()
	eventually(c.t, func() error {
		for _, p := range c.rest {
			if m, err := p.metrics(); err != nil || m.Leader == nil || m.Leader.Id == c.leader.id {
				return fmt.Errorf("no new leader: %v, %v", m.GetLeader(), err)
			}
		}
		return nil
	})
	c.h.floor(c.t, 40)
}

// silenced waits until the old leader says that it is out of service.
func (c *realCluster) silenced() {
	c.t.Helper()
	eventually(c.t, func() error {
		if m, err := c.leader.metrics(); err != nil || m.Healthy {
			return fmt.Errorf("the old leader is healthy, or %v", err)
		}
		return nil
	})
}

// refuses checks that the old leader answers neither reads nor writes.
func (c *realCluster) refuses() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := c.leader.kv.Get(ctx, &kvpb.GetRequest{Key: "k"})
		wantError(c.t, err, codes.Unavailable, "NO_LEADER")
	})
	if _, err := c.leader.kv.Set(ctx, &kvpb.SetRequest{Key: "k"}); err == nil {
		c.t.Error("a leader that is alone takes a write")
	}
	wg.Wait()
}

// undisturbed checks that the leader has stayed.
func (c *realCluster) undisturbed() {
	c.t.Helper()
	if m, err := c.leader.metrics(); err != nil || m.Role != kvpb.Role_ROLE_LEADER || m.Term != c.term {
		c.t.Errorf("the leader of term %d has not stayed: %v, %v", c.term, m, err)
	}
}

// stale stops the leader, writes under another, and has the first thing that
// the old one does when it goes on be a read.
func (c *realCluster) stale() {
	c.t.Helper()
	stop := func(s syscall.Signal) { _ = c.leader.cmd.Process.Signal(s) }
	stop(syscall.SIGSTOP)
	defer stop(syscall.SIGCONT)
	c.deposed()
	ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
	defer cancel()
	set, err := c.rest[0].kv.Set(ctx, &kvpb.SetRequest{Key: "stale", Value: []byte("new")})
	if err != nil {
		c.t.Fatal(err)
	}
	type read struct {
		resp *kvpb.GetResponse
		err  error
	}
	done := make(chan read, 8)
	for range cap(done) {
		go func() {
			resp, err := c.leader.kv.Get(ctx, &kvpb.GetRequest{Key: "stale"})
			done <- read{resp, err}
		}()
	}
	stop(syscall.SIGCONT)
	for range cap(done) {
		if g := <-done; g.err == nil && g.resp.Version < set.Version {
			c.t.Errorf("a stale read: %v, written was %v", g.resp, set)
		}
	}
}

// TestNetwork breaks the network between processes, or the processes, while
// clients of all of them record what they see.
func TestNetwork(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	r := newRouter(t, 3)
	var ps []*process
	for i := uint64(1); i <= 3; i++ {
		ps = append(ps, &process{
			id: i, address: fmt.Sprintf("10.77.%d.2:7000", i), within: []string{"ip", "netns", "exec", fmt.Sprintf("host%d", i)},
			args: []string{"--insecure", "--heartbeat=50ms", "--election-timeout=300ms"},
		})
	}
	formCluster(t, ps)
	var stubs []kvpb.KVServiceClient
	for _, p := range ps {
		stubs = append(stubs, p.kv)
	}
	scenarios := []struct {
		name  string
		fired string // what the router has to have counted
		run   func(c *realCluster)
	}{
		{"the leader alone", "lost", func(c *realCluster) {
			r.lose(hosts(c.leader), hosts(c.rest...))
			r.lose(hosts(c.rest...), hosts(c.leader))
			c.deposed()
			c.silenced()
			c.refuses()
		}},
		{"nobody hears the leader", "lost", func(c *realCluster) {
			r.lose(hosts(c.leader), hosts(c.rest...))
			c.deposed()
			c.silenced()
		}},
		{"the leader hears nobody", "lost", func(c *realCluster) {
			r.lose(hosts(c.rest...), hosts(c.leader))
			c.deposed()
			c.silenced()
		}},
		{"a follower hears nobody", "lost", func(c *realCluster) {
			r.lose(hosts(c.leader, c.rest[1]), hosts(c.rest[0]))
			eventually(t, func() error {
				if m, err := c.rest[0].metrics(); err != nil || m.Leader != nil {
					return fmt.Errorf("it still has a leader, or %v", err)
				}
				return nil
			})
			c.h.floor(t, 40)
			c.undisturbed()
		}},
		{"slow and lossy", "late", func(c *realCluster) {
			r.slow(5*time.Millisecond, 20*time.Millisecond, .01)
			c.h.floor(t, 40)
		}},
		{"the leader pauses", "", func(c *realCluster) { c.stale() }},
		{"kill -9", "", func(c *realCluster) {
			p := c.ps[rand.IntN(3)]
			p.signal(syscall.SIGKILL)
			c.h.floor(t, 40)
			p.start()
		}},
	}
	for round, start := 0, time.Now(); round < len(scenarios) || time.Since(start) < *soak && *soak > 3*time.Second; round++ {
		s := scenarios[round%len(scenarios)]
		began := time.Now()
		awaitHealthy(t, ps, 20*time.Second)
		c := &realCluster{t: t, r: r, ps: ps, h: newHistory(), leader: leaderOf(t, ps)}
		for _, p := range ps {
			if p != c.leader {
				c.rest = append(c.rest, p)
			}
		}
		c.term = c.leader.metricsInTime().Term
		stop := c.h.load(stubs, func(i int) string { return fmt.Sprintf("key %d.%d", round, i) }, 10*time.Millisecond, time.Second, false)
		c.h.floor(t, 20)
		r.heal()
		s.run(c)
		if counts := r.heal(); s.fired != "" && counts[s.fired] == 0 {
			t.Errorf("%s: the fault has not fired: %v", s.name, counts)
		}
		awaitHealthy(t, ps, 20*time.Second)
		c.h.floor(t, 20)
		stop()
		for i := range ps {
			for k := range 5 {
				ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
				if err := c.h.do(ctx, stubs[i], -1, registerOp{name: "get", key: fmt.Sprintf("key %d.%d", round, k)}); err != nil {
					t.Error(err)
				}
				cancel()
			}
		}
		c.h.check(t)
		t.Logf("%s: ok in %v", s.name, time.Since(began))
	}
	sameListings(t, ps)
}

// hostProcess is a node of a router's host, not started. Its time-outs are those of
// a cluster whose nodes are far apart.
func hostProcess(i int, args ...string) *process {
	return &process{
		id: uint64(i), address: fmt.Sprintf("10.77.%d.2:7000", i),
		within: []string{"ip", "netns", "exec", fmt.Sprintf("host%d", i)},
		args:   append([]string{"--insecure", "--heartbeat=500ms", "--election-timeout=3s"}, args...),
	}
}

// TestFarNodes: nodes whose messages take 300 ms there and back become a cluster, and
// whoever restarts is back in it.
func TestFarNodes(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	r := newRouter(t, 3)
	r.slow(150*time.Millisecond, time.Millisecond, 0)
	ps := []*process{hostProcess(1), hostProcess(2), hostProcess(3)}
	formCluster(t, ps)
	write := func(via *process, key string) {
		ctx, cancel := context.WithTimeout(context.Background(), rpcTimeout)
		defer cancel()
		if _, err := via.kv.Set(ctx, &kvpb.SetRequest{Key: key}); err != nil {
			t.Error(err)
		}
	}
	for _, p := range ps {
		write(p, fmt.Sprint(p.id))
	}
	back := ps[2]
	if back == leaderOf(t, ps) {
		back = ps[1]
	}
	back.signal(syscall.SIGKILL)
	back.start()
	awaitHealthy(t, ps, 30*time.Second)
	write(back, "back")
	sameListings(t, ps)
	if counts := r.heal(); counts["late"] == 0 {
		t.Errorf("the network was not slow: %v", counts)
	}
}

// TestDeadAddress: of the addresses that a name stands for, the first one is silent.
// Peers, the leader that a request is forwarded to, and commands are found at the
// second one.
func TestDeadAddress(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	r := newRouter(t, 3)
	const nobody = 9
	r.lose([]int{1, 2, 3}, []int{nobody})
	names := "127.0.0.1 localhost\n"
	var ps []*process
	for i := 1; i <= 3; i++ {
		names += fmt.Sprintf("10.77.%d.2 node%d\n10.77.%d.2 node%d\n", nobody, i, i, i)
		listen := fmt.Sprintf("--addr=10.77.%d.2:7000", i) // not its name, which is its address from then on
		ps = append(ps, hostProcess(i, listen, fmt.Sprintf("--advertise=node%d:7000", i)))
	}
	file := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(file, []byte(names), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(file, "/etc/hosts", "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("mount over /etc/hosts does not work here: %v", err)
	}
	formCluster(t, ps)
	command := func(args ...string) (string, error) {
		cmd := commandOf(nil, args...)
		cmd.Args = append(slices.Clone(ps[0].within), cmd.Args...)
		cmd.Path, cmd.Err = exec.LookPath(ps[0].within[0])
		out, err := cmd.Output()
		return string(out), err
	}
	endpoints := []string{"--endpoints", "node1:7000,node2:7000,node3:7000"}
	if out, err := command(append([]string{"set", "k", "v"}, endpoints...)...); err != nil {
		t.Errorf("set: %v: %s", err, out)
	}
	out, err := command(append([]string{"status"}, endpoints...)...)
	if err != nil || strings.Contains(out, "unreachable") {
		t.Errorf("status: %v: %s", err, out)
	}
	for i := range ps { // one of them to two that do not lead
		to := fmt.Sprint(i + 1)
		if out, err := command("transfer-leader", to, "--endpoints", "node1:7000", "--timeout", "20s"); err != nil {
			t.Errorf("transfer-leader %s: %v: %s", to, err, out)
		}
	}
	ps[2].signal(syscall.SIGKILL)
	ps[2].start()
	awaitHealthy(t, ps, 30*time.Second)
	if counts := r.heal(); counts["lost"] == 0 {
		t.Errorf("nobody has tried the dead address: %v", counts)
	}
}

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
	run("mount", "-t", "proc", "proc", "/proc") // has the processes of this namespace
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
	before := leader.metricsInTime()
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
	filler.Go(func() { // a node frees space when it drops an old snapshot
		for filling.Err() == nil {
			if _, err := f.Write(make([]byte, 64<<10)); err != nil {
				sleep(filling, time.Millisecond)
			}
		}
	})
	// Others refuse Sets, or the disk was full so soon that the node has ended.
	eventually(t, func() error {
		m, err := ps[1].metrics()
		if err == nil && leader.isRunning() && !strings.Contains(m.WritesRefused, "the disk of node 1") {
			err = fmt.Errorf("Sets are not refused: %q", m.WritesRefused)
		}
		return err
	})
	full()
	filler.Wait()
	_ = f.Close()
	if err := os.Remove(rubbish); err != nil {
		t.Fatal(err)
	}
	if !leader.isRunning() {
		_ = leader.cmd.Wait()
		if text, _ := os.ReadFile(leader.log); leader.cmd.ProcessState.ExitCode() != 1 || !bytes.Contains(text, []byte("no space left on device")) {
			t.Errorf("with a full disk the node ended with %v: %s", leader.cmd.ProcessState, text[max(0, len(text)-1000):])
		}
		leader.start()
	}
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
