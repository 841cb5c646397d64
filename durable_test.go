// Nodes with data directories, in one process and as real ones: what survives
// what, and backups.

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

var kills = flag.Int("kills", 6, "how many times TestDurableKills kills nodes with -9")

// newDurable starts nodes 1 to n, each with a directory of its own below dir.
func newDurable(t *testing.T, n uint64, set ...func(*options)) (c *testCluster, dir func(uint64) string) {
	t.Helper()
	parent := t.TempDir()
	dir = func(id uint64) string { return filepath.Join(parent, fmt.Sprint(id)) }
	return newCluster(t, n, append(set, func(o *options) { o.durable, o.dataDir = true, dir(o.id) })...), dir
}

// raftIDs returns the raft IDs that nodes go by.
func (c *testCluster) raftIDs(ids ...uint64) (raftIDs []uint64) {
	c.t.Helper()
	for _, id := range ids {
		m, err := c.metrics(id)
		if err != nil || !m.Durable {
			c.t.Fatal(m, err)
		}
		raftIDs = append(raftIDs, m.RaftId)
	}
	return raftIDs
}

// ends waits until a node has stopped by itself, and checks that it says so.
func (c *testCluster) ends(id uint64, cause error, words ...string) {
	c.t.Helper()
	n := c.nodes[id]
	defer n.conn.Close()
	delete(c.nodes, id)
	select {
	case err := <-n.ended:
		if !errors.Is(err, cause) {
			c.t.Fatalf("it ended with %v", err)
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				c.t.Errorf("%v\ndoes not say %q", err, w)
			}
		}
	case <-time.After(pollDeadline):
		n.cancel()
		c.t.Fatal("it goes on")
	}
}

// TestDurable: a node comes back as what it was, all at once too, and one that
// was wiped is taken back.
func TestDurable(t *testing.T) {
	t.Parallel()
	c, dir := newDurable(t, 3)
	c.init(1, 2, 3)
	before := c.raftIDs(1, 2, 3)
	c.works(1, 2, 3)
	version := c.set(2, "k", "v")
	c.killed(2)
	c.settled(1, 2, 3)
	c.wants(2, false, "k", "v", version)
	c.restart(3)
	c.settled(1, 2, 3)

	version = c.set(3, "k", "all")
	addresses := map[uint64]string{}
	for id, n := range c.nodes {
		addresses[id] = n.address
	}
	for id := range addresses {
		c.kill(id)
	}
	for id, address := range addresses {
		c.start(id, address)
	}
	c.settled(1, 2, 3)
	for id := range addresses {
		c.wants(id, false, "k", "all", version)
	}
	if after := c.raftIDs(1, 2, 3); !slices.Equal(before, after) {
		t.Fatalf("they were %x and are %x", before, after)
	}

	c.kill(3)
	if err := os.RemoveAll(dir(3)); err != nil {
		t.Fatal(err)
	}
	c.start(3, addresses[3])
	c.settled(1, 2, 3)
	if c.raftIDs(3)[0] == before[2] {
		t.Fatal("a raft ID was used again")
	}
	c.wants(3, false, "k", "all", version)
	c.works(1, 2, 3)
	c.sameStates(1, 2, 3)
}

// TestDurableAlone: with one voter, all is on its disk.
func TestDurableAlone(t *testing.T) {
	t.Parallel()
	c, dir := newDurable(t, 1)
	c.init(1)
	for i := range 20 {
		version := c.set(1, "k", fmt.Sprint(i))
		if i%5 == 0 {
			c.killed(1)
			c.settled(1)
		}
		c.wants(1, false, "k", fmt.Sprint(i), version)
	}
	_, err := openDisk(osFS{}, dir(1), 1<<20, quiet())
	if err == nil || !strings.Contains(err.Error(), "another process uses it") {
		t.Fatal(err)
	}
	c.stop(1)
	d, err := openDisk(osFS{}, dir(1), 1<<20, quiet())
	if err != nil {
		t.Fatal(err)
	}
	d.close()
	if _, err := openDisk(osFS{}, filepath.Join(dir(1), "no", "parent"), 1<<20, quiet()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "has to be there") {
		t.Fatal(err)
	}
}

// TestDurableForgotten: a node that was started without its directory, and then with
// it, is healthy again, although its cluster has taken the other life in.
func TestDurableForgotten(t *testing.T) {
	t.Parallel() // it mostly waits
	c, _ := newDurable(t, 3)
	c.init(1, 2, 3)
	durable := c.options
	leader := c.settled(1, 2, 3)
	for _, id := range []uint64{1 + leader%3, leader} {
		before := c.raftIDs(id)
		address := c.nodes[id].address
		c.kill(id)
		c.options = func(o *options) { durable(o); o.durable, o.dataDir = false, "" }
		added := c.when(livesOf(id, 2))
		c.start(id, address)
		added(func() { c.kill(id) })
		c.options = durable
		c.start(id, address)
		c.health(id, "raftkv.v1.KVService", grpc_health_v1.HealthCheckResponse_SERVING)
		c.health(id, restartHealth, grpc_health_v1.HealthCheckResponse_SERVING)
		c.settled(1, 2, 3)
		if after := c.raftIDs(id); !slices.Equal(before, after) {
			t.Errorf("node %d was %x and is %x", id, before, after)
		}
		c.addLearner(id, id)
		c.works(1, 2, 3)
	}
}

// TestDurableRemoved: a node that was removed while it was away, or is removed
// now, stops and says so, and so it does when it starts again.
func TestDurableRemoved(t *testing.T) {
	t.Parallel()
	c, dir := newDurable(t, 3)
	c.init(1, 2, 3)
	address := c.nodes[3].address
	c.stop(3)
	for range 2 {
		c.change(1, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2}})
		c.settled(1, 2)
		if c.nodes[3] == nil {
			c.start(3, address)
		}
		c.ends(3, errRemoved, "it is no member of its cluster any more", "move the directory away")
		var log bytes.Buffer
		c.log = &log
		c.start(3, address)
		c.log = nil
		c.ends(3, errRemoved, "it is no member of its cluster any more", "move the directory away")
		if strings.Contains(log.String(), "msg=stopped") { // whoever gets the error logs it
			t.Error(&log)
		}
		if err := os.RemoveAll(dir(3)); err != nil {
			t.Fatal(err)
		}
		c.start(3, address)
		c.addLearner(1, 3)
		c.change(2, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
		c.settled(1, 2, 3)
		c.works(1, 2, 3)
	}
}

// TestDurableRolledBack: a directory in place of which an older copy was put.
func TestDurableRolledBack(t *testing.T) {
	t.Parallel()
	c, dir := newDurable(t, 3)
	c.init(1, 2, 3)
	c.works(1, 2, 3)
	c.transfer(1, 1)
	address := c.nodes[3].address
	c.stop(3)
	copied := dir(3) + ".copy"
	if err := os.CopyFS(copied, os.DirFS(dir(3))); err != nil {
		t.Fatal(err)
	}
	c.start(3, address)
	c.settled(1, 2, 3)
	version := c.set(3, "k", "v")
	c.stop(3)
	if err := errors.Join(os.RemoveAll(dir(3)), os.Rename(copied, dir(3))); err != nil {
		t.Fatal(err)
	}
	c.start(3, address)
	c.ends(3, errContradiction, "rolled back", "keep all data directories", fmt.Sprintf("node 1 at %s", c.nodes[1].address))
	c.works(1, 2)
	if err := os.RemoveAll(dir(3)); err != nil {
		t.Fatal(err)
	}
	c.start(3, address)
	c.settled(1, 2, 3)
	c.wants(3, false, "k", "v", version)
}

// TestDurableBehind: a node that was away for longer than the log reaches back
// gets a snapshot onto its disk, and starts again from that.
func TestDurableBehind(t *testing.T) {
	t.Parallel()
	c, dir := newDurable(t, 3, func(o *options) { o.logBytes = 64 << 10 })
	c.init(1, 2, 3)
	before, address := c.raftIDs(3), c.nodes[3].address
	c.kill(3)
	c.fill(1, 24)
	c.start(3, address)
	c.settled(1, 2, 3)
	if m, err := c.metrics(3); err != nil || m.SnapshotsInstalled == 0 {
		t.Fatal(m, err)
	}
	c.sameStates(1, 2, 3)
	c.killed(3)
	c.settled(1, 2, 3)
	if m, err := c.metrics(3); err != nil || m.SnapshotsInstalled != 0 || !slices.Equal(c.raftIDs(3), before) {
		t.Fatal(m, err)
	}
	c.works(1, 2, 3)
	c.sameStates(1, 2, 3)
	for id := range uint64(3) { // and the disk is bounded, here as in TestDiskBounded
		size := int64(0)
		entries, err := os.ReadDir(dir(id + 1))
		for _, e := range entries {
			if info, err := e.Info(); err == nil && strings.Contains(e.Name(), ".wal") {
				size += info.Size()
			}
		}
		if err != nil || size == 0 || size > 8*64<<10+2<<16 {
			t.Errorf("node %d: %d bytes of log, %v", id+1, size, err)
		}
	}
}

// TestDurableMoved: a node with its directory at another address.
func TestDurableMoved(t *testing.T) {
	t.Parallel()
	c, _ := newDurable(t, 3)
	c.init(1, 2, 3)
	before := c.raftIDs(3)
	old := c.nodes[3].address
	c.stop(3)
	var log bytes.Buffer
	c.log = &log
	c.start(3, "127.0.0.1:0")
	c.log = nil
	c.addLearner(1, 3)
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
	if after := c.raftIDs(3); !slices.Equal(before, after) {
		t.Fatal("it is somebody else")
	}
	address := c.nodes[3].address
	c.stop(3)
	wantPart(t, log.String(), fmt.Sprintf("known=%s advertise=%s", old, address))
	log.Reset()
	c.log = &log
	c.start(3, address)
	c.stop(3)
	if strings.Contains(log.String(), "another address") {
		t.Error(&log)
	}
}

// TestBrokenNodeServesNobody: a node that ends does not do any more what an
// operator asks.
func TestBrokenNodeServesNobody(t *testing.T) {
	n := turnNode()
	n.err = errRemoved
	n.calls.requests = []*pendingRequest{{ctx: t.Context(), done: make(chan error, 1), poll: func() (bool, error) { t.Error("called"); return true, nil }}}
	n.turn(input{})
	if c := n.calls.requests[0]; len(c.done) != 0 {
		t.Fatal("ended too early")
	}
}

// TestBackup: what is restored from a backup under load is a moment of it, and
// goes on from there: versions, sessions, members.
func TestBackup(t *testing.T) {
	t.Parallel()
	for _, durable := range []bool{false, true} {
		t.Run(fmt.Sprint("durable=", durable), func(t *testing.T) {
			c, dir := newDurable(t, 0)
			if !durable {
				c.options = func(o *options) { o.heartbeat, o.election = 20*time.Millisecond, 250*time.Millisecond }
			}
			for id := range uint64(2) {
				c.start(id+1, "127.0.0.1:0")
			}
			c.init(1, 2)
			opened, err := c.nodes[1].OpenSession(c.ctx, &kvpb.OpenSessionRequest{})
			if err != nil {
				t.Fatal(err)
			}
			once := &kvpb.SetRequest{Key: "once", Value: []byte("1"), RequestId: &kvpb.RequestId{Session: opened.Session, Sequence: 1}}
			first, err := c.nodes[1].Set(c.ctx, once)
			if err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			written := make(chan uint64, 1)
			go func() {
				i := uint64(0)
				for ctx.Err() == nil {
					if _, err := c.nodes[1].Set(ctx, &kvpb.SetRequest{Key: fmt.Sprint("k", i%100), Value: []byte(fmt.Sprint(i))}); err == nil {
						i++
					}
				}
				written <- i
			}()
			eventually(t, func() error {
				if m, err := c.metrics(2); err != nil || m.Keys < 50 {
					return fmt.Errorf("%v, %v", m, err)
				}
				return nil
			})
			start, _ := c.metrics(1)
			file := filepath.Join(t.TempDir(), "backup")
			out, _ := runCommand(t, 0, "", "backup", "--endpoints", deadAddress(t)+","+c.nodes[2].address, file)
			var keys, version uint64
			if _, err := fmt.Sscanf(out, "wrote keys: %d, version: %d,", &keys, &version); err != nil {
				t.Fatal(out, err)
			}
			stop()
			all := <-written
			runCommand(t, exitNotDone, "", "backup", "--endpoints", c.nodes[2].address, file) // it is there

			restored := dir(5)
			out, _ = runCommand(t, 0, "", "restore", file, "--data-dir", restored, "--id", "5", "--addr", "127.0.0.1:1", "-o", "json")
			wantPart(t, out, `"version":`)
			r := &testCluster{t: t, ctx: c.ctx, nodes: map[uint64]*testNode{}, options: func(o *options) { o.durable, o.dataDir = true, dir(o.id) }}
			n := r.start(5, "127.0.0.1:0")
			defer func() { r.stop(5) }()
			r.settled(5)
			m, err := r.metrics(5)
			if err != nil || version < start.Version || version > all+2 || m.Keys != keys || m.Sessions != 1 || m.ClusterId == start.ClusterId {
				t.Fatalf("%v, %v; backup of version %d began at %v", m, err, version, start)
			}
			if first := versionAt(time.Now().Add(-time.Minute)); m.Version < first {
				t.Errorf("the restored cluster begins with version %d, want %d at least", m.Version, first)
			}
			items, _, err := r.listAll(5, &kvpb.ListRequest{})
			if err != nil || len(items) != int(m.Keys) {
				t.Fatal(items, err)
			}
			for _, kv := range items { // write i of the load has version i + 2: none is missing up to the last
				i, _ := strconv.ParseUint(string(kv.Value), 10, 64)
				if kv.Key != "once" && (kv.Version != i+2 || kv.Version+100 <= version) {
					t.Errorf("%q = %d of version %d, in a backup of version %d", kv.Key, i, kv.Version, version)
				}
			}
			if again, err := n.Set(r.ctx, once); err != nil || !proto.Equal(again, first) {
				t.Errorf("%v, and again %v, %v", first, again, err)
			}
			if v := r.set(5, "k", "v"); v != m.Version+1 {
				t.Errorf("version %d follows %d", v, m.Version)
			}
			r.start(6, "127.0.0.1:0")
			defer func() { r.stop(6) }()
			r.done(func() error { // at the address where it is now
				_, err := n.AddLearner(r.ctx, &kvpb.AddLearnerRequest{Node: r.proto(5)[0]})
				return err
			})
			r.addLearner(5, 6)
			r.change(5, &kvpb.ChangeMembershipRequest{Members: []uint64{5, 6}})
			r.settled(5, 6)
			r.works(5, 6)
		})
	}
}

// TestBackupRefused: what cannot be a backup, or be restored, leaves nothing.
func TestBackupRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	dir := t.TempDir()
	file, data := filepath.Join(dir, "backup"), filepath.Join(dir, "data")
	backup := func(want int, addr string) string {
		t.Helper()
		_, errs := runCommand(t, want, "", "backup", "--endpoints", addr, "--timeout", "10s", file)
		return errs
	}
	if err := os.WriteFile(file+".tmp", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantPart(t, backup(exitNotDone, deadAddress(t)), "raft-key-value: backup: open "+file+".tmp: file exists: if no other backup writes it")
	if err := os.Remove(file + ".tmp"); err != nil {
		t.Fatal(err)
	}
	wantPart(t, backup(exitNotDone, deadAddress(t)), "UNAVAILABLE")
	c.init(1)
	c.set(1, "k", "v")

	// A node that sends half of it, or another thing, or ends in the middle.
	whole := filepath.Join(dir, "whole")
	runCommand(t, 0, "", "backup", "--endpoints", c.nodes[1].address, whole)
	b, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(b); at += 7 {
		damaged := slices.Clone(b)
		damaged[at] ^= 0x10
		for _, bad := range [][]byte{b[:at], damaged} {
			if err := os.WriteFile(file, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			_, errs := runCommand(t, exitNotDone, "", "restore", file, "--data-dir", data, "--id", "1", "--addr", "127.0.0.1:1")
			wantPart(t, errs, file+": snapshot")
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	f := newFakeNode(t)
	for _, sent := range [][]byte{nil, b[:len(b)/2], b[:len(b)-1], append(slices.Clone(b), b...)} {
		f.mu.Lock()
		f.backup = sent
		f.mu.Unlock()
		wantPart(t, backup(exitNotDone, f.addr), "snapshot")
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 { // whole
		t.Fatal(names, err)
	}

	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	restore := []string{"restore", whole, "--data-dir", data, "--id", "1", "--addr", "127.0.0.1:1"}
	for _, missing := range []string{"--data-dir", "--id", "--addr"} {
		i := slices.Index(restore, missing)
		runCommand(t, 2, "", slices.Concat(restore[:i], restore[i+2:])...)
	}
	for _, name := range []string{"notes", "identity", "0000000000000001-0000000000000002.snap", simPath(1)[2:]} {
		path := filepath.Join(data, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, errs := runCommand(t, exitNotDone, "", restore...)
		if name != simPath(1)[2:] {
			wantPart(t, errs, "it is not empty: there is "+name)
		}
		if names, err := os.ReadDir(data); len(names) != 1 || os.Remove(path) != nil {
			t.Error("it should be as it was: ", names, err)
		}
	}
	d, err := openDisk(osFS{}, data, 1<<20, quiet())
	if err != nil {
		t.Fatal(err)
	}
	_, errs := runCommand(t, exitNotDone, "", restore...)
	wantPart(t, errs, "another process uses it")
	d.close()
	runCommand(t, 0, "", restore...)
	_, errs = runCommand(t, exitNotDone, "", restore...)
	wantPart(t, errs, "it is not empty: there is identity")

	// So many at a time.
	s := c.nodes[1].server
	s.backups.Add(maxBackups)
	wantPart(t, backup(exitNotDone, c.nodes[1].address), "OVERLOADED")
	s.backups.Add(-maxBackups)
	backup(0, c.nodes[1].address)

	// So many as anybody likes on a connection: they are no hellos.
	for range 3 * maxHellos {
		stream, err := c.nodes[1].Backup(c.ctx, &kvpb.BackupRequest{})
		for err == nil {
			_, err = stream.Recv()
		}
		if err != io.EOF {
			t.Fatal(err)
		}
	}
}

// TestClockBackup: a caller who reads slowly gets a backup, one who does not
// read is given up, and no backup keeps a node from stopping.
func TestClockBackup(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, b *bubble) {
		b.fill(1, 40) // more than the windows hold
		n := b.nodes[1].server
		open := func() kvpb.ClusterService_BackupClient {
			s, err := b.nodes[1].Backup(b.ctx, &kvpb.BackupRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		rest := func(s kvpb.ClusterService_BackupClient, pause time.Duration) error {
			for {
				time.Sleep(pause)
				if _, err := s.Recv(); err != nil {
					return err
				}
			}
		}
		if err := rest(open(), helloTimeout/2); err != io.EOF {
			t.Errorf("read slowly: %v", err)
		}
		s := open()
		start := time.Now()
		for n.backups.Load() > 0 && time.Since(start) < 10*helloTimeout {
			time.Sleep(time.Second)
		}
		between(t, "the wait for a caller who does not read", time.Since(start), helloTimeout, helloTimeout+2*time.Second)
		time.Sleep(time.Second) // for what follows the call's end
		n.n.store.mu.Lock()
		if v := len(n.n.store.views); v != 0 {
			t.Errorf("%d views are open", v)
		}
		n.n.store.mu.Unlock()
		wantError(t, rest(s, 0), codes.DeadlineExceeded, "DEADLINE")
		s = open()
		start = time.Now()
		b.nodes[1].cancel()
		err := <-b.nodes[1].ended
		b.nodes[1].ended <- err // for stop
		between(t, "the stop", time.Since(start), 0, 2*time.Second)
		if err := rest(s, 0); status.Code(err) != codes.Unavailable { // the reason may not get past what was not read
			t.Error(err)
		}
	})
}

// TestClockBackupCut: a node that is cut off, or in no cluster, backs nothing up.
func TestClockBackupCut(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		_, rest := b.leaderAndRest()
		b.do(rest[0], cut)
		b.boot(4)
		backup := func(id uint64) error {
			s, err := b.nodes[id].Backup(b.ctx, &kvpb.BackupRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		}
		wantError(t, backup(rest[0]), codes.Unavailable, "NO_LEADER")
		wantError(t, backup(4), codes.FailedPrecondition, "NOT_INITIALIZED")
		b.do(rest[0], whole)
	})
}

func (f *fakeNode) Backup(_ *kvpb.BackupRequest, s kvpb.ClusterService_BackupServer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return s.Send(&kvpb.BackupResponse{Data: f.backup})
}

// TestDurableKills kills nodes with -9 under load, one or all: nothing that was
// acknowledged is missing, and they come back as who they were. -kills=200 is
// the long form.
func TestDurableKills(t *testing.T) {
	dir := t.TempDir()
	var ps []*process
	for i := range 3 {
		args := []string{"--data-dir", filepath.Join(dir, fmt.Sprint(i)), "--log-bytes", "1048576"}
		ps = append(ps, &process{id: uint64(i + 1), address: "127.0.0.1:0", args: args})
	}
	formCluster(t, ps)
	raftIDs := func() (ids []uint64) {
		for _, p := range ps {
			m, err := p.metrics()
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, m.RaftId)
		}
		return ids
	}
	before := raftIDs()
	cs, stop := startCounters(t, 6, func() *process { return ps[rand.IntN(len(ps))] })
	writes := func() (n uint64) {
		for _, c := range cs {
			n += c.writes.Load()
		}
		return n
	}
	all := 0
	for i := range *kills {
		for floor := writes(); writes() < floor+50; { // under load
			time.Sleep(time.Millisecond)
		}
		victims := ps[:0:0]
		if victims = append(victims, ps[rand.IntN(len(ps))]); i%3 == 0 {
			victims, all = ps, all+1
		}
		for _, p := range victims {
			_ = p.cmd.Process.Signal(syscall.SIGKILL)
		}
		for _, p := range victims {
			p.signal(syscall.SIGKILL)
			p.start()
		}
		awaitHealthy(t, ps, pollDeadline)
	}
	stop()
	for _, c := range cs {
		for _, p := range ps {
			if err := c.check(context.Background(), p); err != nil {
				t.Error(err)
			}
		}
	}
	sameListings(t, ps)
	if after := raftIDs(); !slices.Equal(before, after) {
		t.Errorf("they were %x and are %x", before, after)
	}
	t.Logf("%d kills, %d of them of all nodes at once, %d writes acknowledged", *kills, all, writes())
}
