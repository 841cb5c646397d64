// The data directory. First over a simulated file system: nodes without goroutines,
// whose disk fails at any call, and comes back in any way. Then in real directories, of
// nodes in one process and of real ones: what survives what, and backups.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/cryptotest"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

const (
	diskLogBytes = 2 * simSegment
	leaderID     = 77 // the raft ID of whom diskFollower hears
)

// diskNode is a process with a data directory, and what it sent.
type diskNode struct {
	fs     *simFS
	n      *node
	d      *disk
	sent   []*raftpb.Message
	masked bool     // it was to say hello as somebody else
	beside []func() // what the disk does beside the writer
	slow   []func() // the same, if it is slow
}

func (d *diskNode) send(_ uint64, ms []*raftpb.Message) { d.sent = append(d.sent, ms...) }

func (d *diskNode) sendSnapshot(uint64, uint64, *view) {}

func (d *diskNode) setLevel(uint32)                   {}
func (d *diskNode) tellRooms(_, _ []*kvpb.RoomReport) {}

func (d *diskNode) setMembers(uint64, uint64, map[uint64]*kvpb.Node, []uint64) {
	d.masked = d.masked || d.n.hello().From.RaftId != d.n.id.raftID
}

// newDiskNode is a process that has not opened its directory yet.
func newDiskNode(fs *simFS, id uint64) *diskNode {
	o := defaultOptions()
	o.logBytes = diskLogBytes
	p := &diskNode{fs: fs, n: newNode(o, &kvpb.Node{Id: id, Address: fmt.Sprintf("127.0.0.1:%d", id)}, quiet())}
	p.n.net = p
	return p
}

// openDiskNode starts a process.
func openDiskNode(fs *simFS, id uint64) (*diskNode, error) {
	p := newDiskNode(fs, id)
	var err error
	if p.d, err = openDisk(fs, simDir, diskLogBytes, quiet()); err != nil {
		return nil, err
	}
	p.d.background, p.d.start = func(f func()) { f() }, p.later
	if err := p.n.open(p.d); err != nil {
		return nil, err
	}
	if p.masked {
		return nil, fmt.Errorf("%w: it says hello before it is known who it is", errModel)
	}
	return p, p.settle()
}

// later leaves to settle what the disk does beside the writer.
func (p *diskNode) later(f func()) { p.beside = append(p.beside, f) }

// settle lets loop and writer work until nothing is left to do.
func (p *diskNode) settle() error {
	for p.n.err == nil {
		in := p.n.inbox.take()
		if len(in.events)+len(in.calls)+len(in.messages) > 0 {
			p.n.turn(in)
		} else if len(p.beside) > 0 {
			f := p.beside[0]
			p.beside = p.beside[1:]
			f()
		} else if p.d.write() == nil && len(p.n.inbox.next.events) == 0 {
			return nil
		}
	}
	return p.n.err
}

// TestDiskCleanFaults: what is left of a directory that was never finished is
// cleaned up whatever happens to that.
func TestDiskCleanFaults(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	made, cleaned := 1, 0
	begin := func(fs *simFS) error {
		f, err := openFollower(fs)
		if err != nil {
			return err
		}
		return f.snapshot()
	}
	for at := 1; made > 0; at++ {
		for crash := range 60 {
			fs := newSimFS()
			fs.failAt, fs.fault = at, faultCrash
			if begin(fs) == nil {
				made = 0
				break
			}
			r := seededRand(uint64(at*100 + crash))
			fs = fs.lose(r)
			if fs.names[simPath(1)] == nil || fs.names[simDir+"/identity"] != nil {
				break // hardly anything to clean up, or nothing
			}
			cleaned++
			fs.failAt, fs.fault = 2+crash%15, faultCrash
			_, _ = openDiskNode(fs, 2)
			if err := begin(fs.lose(r)); err != nil {
				t.Fatalf("after %d calls, then %d: %v", at, fs.failAt, err)
			}
		}
	}
	if cleaned < 100 {
		t.Fatalf("hardly anything to clean up: %d", cleaned)
	}
}

// slowDown makes snapshots wait until do or the test lets them be written.
func (p *diskNode) slowDown() {
	p.d.start = func(f func()) { p.slow = append(p.slow, f) }
}

// lead makes a cluster's only voter its leader.
func (p *diskNode) lead() error {
	p.n.inbox.event(func() { _ = p.n.rn.Campaign() })
	if err := p.settle(); err != nil {
		return err
	}
	if !p.n.leads() {
		return errors.New("it does not lead")
	}
	return nil
}

// diskOp is a write. A value of nil deletes.
type diskOp struct {
	key   string
	value []byte
}

// call makes a write that somebody waits for.
func (p *diskNode) call(op diskOp) (*call, error) {
	w := deleteWrite(op.key)
	if op.value != nil {
		w = setWrite(op.key, string(op.value))
	}
	record, err := proto.Marshal(w)
	if err != nil {
		return nil, err
	}
	c := &call{write: record, done: make(chan outcome, 1)}
	return c, p.n.inbox.call(c)
}

// do makes a write. It was acknowledged if the error is nil.
func (p *diskNode) do(op diskOp) error {
	c, err := p.call(op)
	if err != nil {
		return err
	}
	failed := p.settle()
	for slow := p.slow; failed == nil && len(slow) > 0; slow = slow[1:] {
		p.slow = slow[1:]
		slow[0]()
		failed = p.settle()
	}
	select {
	case o := <-c.done:
		return o.err
	default:
		return cmp.Or(failed, errors.New("no answer"))
	}
}

// diskModel is the state after each write of a script.
type diskModel []map[string]item

func modelOf(script []diskOp) diskModel {
	m := diskModel{{}}
	for i, op := range script {
		next := map[string]item{}
		for k, it := range m[i] {
			next[k] = it
		}
		if op.value == nil {
			delete(next, op.key)
		} else {
			next[op.key] = item{op.value, uint64(i + 1)}
		}
		m = append(m, next)
	}
	return m
}

// differs says how a node's state differs from that after n writes.
func (m diskModel) differs(s *store, n int) string {
	if s.version != uint64(n) || s.tree.keys != uint64(len(m[n])) {
		return fmt.Sprintf("%d keys of version %d, not %d of version %d", s.tree.keys, s.version, len(m[n]), n)
	}
	for k, want := range m[n] {
		if it, ok, err := s.get([]byte(k)); err != nil || !ok || it.version != want.version || !bytes.Equal(it.value, want.value) {
			return fmt.Sprintf("%q is %d bytes of version %d (%v), not %d of version %d", k, len(it.value), it.version, err, len(want.value), want.version)
		}
	}
	return ""
}

func diskScript(r *rand.Rand, n, size int) (ops []diskOp) {
	for i := range n {
		op := diskOp{key: fmt.Sprint("k", r.IntN(9)), value: bytes.Repeat([]byte{byte(i)}, r.IntN(size))}
		if r.IntN(6) == 0 {
			op.value = nil
		}
		ops = append(ops, op)
	}
	return ops
}

// comeBack is how the machine comes back.
func (s *simFS) comeBack(how string, r *rand.Rand) *simFS {
	switch how {
	case "restart", "evict":
		return s.restart(how == "evict")
	case "lose":
		return s.lose(nil)
	}
	return s.lose(r)
}

// checkFailed: a node that stopped has done nothing any more but to remove
// what it had not finished, and does nothing now.
func checkFailed(p *diskNode, at int) error {
	after := p.fs.calls[min(at, len(p.fs.calls)):]
	if i := slices.IndexFunc(after, func(c string) bool { return !strings.HasPrefix(c, "remove") }); i >= 0 && p.fs.fault != faultCrash {
		return fmt.Errorf("%w: after the failure it went on: %q", errModel, after)
	}
	calls := len(p.fs.calls)
	if err := p.do(diskOp{"late", []byte("late")}); err == nil || len(p.fs.calls) != calls {
		return fmt.Errorf("%w: a write after the failure: %v, %q", errModel, err, p.fs.calls[calls:])
	}
	return nil
}

// eachFault runs a scenario with each of its calls failing in each way. Run
// reports how far it got; verify starts again and compares.
func eachFault[T any](t *testing.T, run func(*simFS) (T, error), verify func(*simFS, T) error, rare ...string) {
	t.Helper()
	cryptotest.SetGlobalRandom(t, 1)
	fs := newSimFS()
	if _, err := run(fs); err != nil {
		t.Fatal(err)
	}
	calls, runs, survived := fs.calls, 0, 0
	kinds := map[string]int{}
	for at := 1; at <= len(calls); at += raceStep(7) {
		kinds[strings.Fields(calls[at-1])[0]]++
		for fault := range numFaults {
			if fault == faultENOSPC && !strings.HasPrefix(calls[at-1], "write") {
				continue
			}
			hows := []string{"restart", "lose", "some", "evict", "some"}
			if from := (at + 2*int(fault)) % 5; at > 40 { // the directory is made: one of them
				hows = hows[from : from+1]
			}
			for i, how := range hows {
				fs := newSimFS()
				fs.failAt, fs.fault = at, fault
				got, err := run(fs)
				if err == nil && saves(calls, at) {
					err = fmt.Errorf("%w: a snapshot failed, and the node went on", errModel)
				}
				if errors.Is(err, errModel) {
					t.Fatalf("call %d of %d (%s), fault %d: %v", at, len(calls), calls[at-1], fault, err)
				}
				if runs++; err == nil {
					survived++
				}
				fs = fs.comeBack(how, seededRand(uint64(at)+uint64(fault)<<32+uint64(i)<<48))
				if err := verify(fs, got); err != nil {
					t.Fatalf("call %d of %d (%s), fault %d, %s: %v", at, len(calls), calls[at-1], fault, how, err)
				}
			}
		}
	}
	t.Logf("%d runs, %d went on; calls: %v", runs, survived, kinds)
	for _, kind := range []string{"create", "open", "readDir", "write", "sync", "rename", "remove", "syncDir"} {
		if kinds[kind] == 0 && !slices.Contains(rare, kind) && raceStep(2) == 1 {
			t.Errorf("no call of %s", kind)
		}
	}
}

// saves reports whether a call is of writing a snapshot.
func saves(calls []string, at int) bool {
	for i := at - 1; i >= 0; i-- {
		switch c := strings.TrimPrefix(calls[i], "create d/"); {
		case strings.HasPrefix(c, "rename") && i < at-1:
			return false
		case c != calls[i]:
			return len(c) == len("0123456789abcdef.tmp")
		}
	}
	return false
}

// aloneRun is how far a cluster of one voter got.
type aloneRun struct {
	made bool // bootstrap was acknowledged
	done int  // writes that were
}

// TestDiskFaults: a cluster of one voter that writes, compacts and restarts has
// after any fault what was acknowledged, or one write more.
func TestDiskFaults(t *testing.T) {
	script := diskScript(seededRand(1), 30, 900)
	model := modelOf(script)
	run := func(fs *simFS) (r aloneRun, err error) {
		p, err := openDiskNode(fs, 1)
		if err != nil {
			return r, err
		}
		if _, err := p.n.bootstrap(nil); err != nil {
			return r, err
		}
		if err := p.settle(); err != nil {
			return r, cmp.Or(checkFailed(p, fs.failAt), err)
		}
		p.slowDown()
		for r.made = true; r.done < len(script); r.done++ {
			if r.done == len(script)*2/3 {
				if p.d.close(); p.n.err != nil { // by a snapshot behind the last write
					return r, cmp.Or(checkFailed(p, fs.failAt), p.n.err)
				}
				if p, err = openDiskNode(fs, 1); err == nil {
					err = p.lead()
				}
				if err != nil {
					return r, err
				}
				p.slowDown()
			}
			if err := p.do(script[r.done]); err != nil {
				return r, cmp.Or(checkFailed(p, fs.failAt), err)
			}
		}
		if p.n.durable.snapshotIndex < 14 {
			return r, fmt.Errorf("%w: hardly a snapshot", errModel)
		}
		return r, nil
	}
	verify := func(fs *simFS, r aloneRun) error {
		saved, savedErr := readSaved(fs)
		if fs.mutates() {
			return fmt.Errorf("whoever only reads it changes it: %q", fs.calls)
		}
		p, err := openDiskNode(fs, 1)
		if err != nil {
			return err
		}
		if p.n.rn == nil {
			if r.made {
				return errors.New("it is in no cluster any more")
			}
			if err := holdsNothing(savedErr); err != nil {
				return err
			}
			if _, err := p.n.bootstrap(nil); err != nil {
				return err
			}
		} else if err := cmp.Or(p.lead(), differsFromSaved(p.n, saved, savedErr)); err != nil {
			return err
		}
		if err := p.settle(); err != nil {
			return err
		}
		n := int(p.n.store.version)
		if n != r.done && n != r.done+1 {
			return fmt.Errorf("%d writes, %d were acknowledged", n, r.done)
		}
		if d := model.differs(p.n.store, n); d != "" {
			return errors.New(d)
		}
		more := diskScript(seededRand(2), 12, 900)
		all := modelOf(slices.Concat(script[:n], more))
		for i, op := range more {
			if err := p.do(op); err != nil {
				return fmt.Errorf("write %d after it: %w", i, err)
			}
		}
		fs = fs.lose(nil)
		if p, err = openDiskNode(fs, 1); err == nil {
			err = p.lead()
		}
		if err != nil {
			return err
		}
		if d := all.differs(p.n.store, n+len(more)); d != "" {
			return fmt.Errorf("after it: %s", d)
		}
		return tidy(fs, p)
	}
	eachFault(t, run, verify)
}

// tidy: a directory holds what counts, and nothing else.
func tidy(fs *simFS, p *diskNode) error {
	var names []string
	for path := range fs.names {
		names = append(names, strings.TrimPrefix(path, simDir+"/"))
	}
	slices.Sort(names)
	snaps := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return !strings.HasSuffix(n, ".snap") })
	temps := slices.DeleteFunc(slices.Clone(names), func(n string) bool {
		return !strings.HasSuffix(n, ".tmp") || strings.HasSuffix(n, ".wal.tmp")
	})
	if len(snaps) != 1 || len(temps) > 0 || len(names) > 12 {
		return fmt.Errorf("left in the directory: %q", names)
	}
	return nil
}

// diskFollower is a node that hears a leader, who is not there: the test says
// what it says.
type diskFollower struct {
	*diskNode
	hello  *kvpb.Hello
	leader *store // all that the leader applied
	last   uint64 // the index of its last entry
	term   uint64
	acked  promise
}

// promise is what a follower has told others.
type promise struct {
	raftID     uint64
	index      uint64 // acknowledged in term
	term, vote uint64
}

func openFollower(fs *simFS) (*diskFollower, error) {
	p, err := openDiskNode(fs, 2)
	if err != nil {
		return nil, err
	}
	f := &diskFollower{diskNode: p, leader: newStore(), term: 5, last: 10}
	me, leader := p.n.self, &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}
	s := f.leader
	s.clusterID, s.index, s.term = 9, f.last, f.term
	s.configure(&raftpb.ConfState{Voters: []uint64{leaderID, p.n.id.raftID, 1 << 40}, AutoLeave: new(false)}, []*kvpb.Member{
		{RaftId: leaderID, Node: leader}, {RaftId: p.n.id.raftID, Node: me}, {RaftId: 1 << 40, Node: &kvpb.Node{Id: 3, Address: "127.0.0.1:3"}}})
	f.connect()
	return f, p.settle()
}

// connect opens a stream from the leader, and one from node 3.
func (f *diskFollower) connect() {
	f.hello = &kvpb.Hello{ClusterId: 9, From: &kvpb.Peer{RaftId: leaderID, Life: 1}, To: &kvpb.Peer{RaftId: f.n.id.raftID, Life: f.n.id.life}}
	f.n.peerUp(leaderID, false, nil)
	f.n.peerUp(1<<40, false, nil)
}

// hears lets messages of the leader, or of node 3, arrive, and notes what the
// node promises.
func (f *diskFollower) hears(ms ...*raftpb.Message) error {
	for _, m := range ms {
		h := proto.CloneOf(f.hello)
		h.From.RaftId = m.GetFrom()
		if err := f.n.receiveMessages(context.Background(), []inbound{{f.to(m), h}}); err != nil {
			return err
		}
	}
	err := f.settle()
	f.note()
	return err
}

func (f *diskFollower) to(m *raftpb.Message) *raftpb.Message {
	m.To = new(f.n.id.raftID)
	return m
}

func (f *diskFollower) note() {
	for _, m := range f.sent {
		switch m.GetType() {
		case raftpb.MsgAppResp, raftpb.MsgVoteResp: // a follower's others may leave before
		default:
			continue
		}
		f.acked.raftID = f.n.id.raftID
		if m.GetTerm() > f.acked.term {
			f.acked.term, f.acked.vote = m.GetTerm(), 0
		}
		switch {
		case m.GetReject():
		case m.GetType() == raftpb.MsgAppResp:
			f.acked.index = max(f.acked.index, m.GetIndex())
		default:
			f.acked.vote = m.GetTo()
		}
	}
	f.sent = nil
}

// entries makes the leader's next entries: it has applied them when they are sent.
func (f *diskFollower) entries(ops ...diskOp) *raftpb.Message {
	m := message(raftpb.MsgApp, leaderID, f.term, func(m *raftpb.Message) {
		m.Index, m.LogTerm, m.Commit = new(f.last), new(f.leader.term), new(f.last)
	})
	for _, op := range ops {
		f.last++
		set := &kvpb.SetRequest{Key: op.key, Value: op.value}
		data, _ := proto.Marshal(&kvpb.Batch{Proposer: leaderID, Sequence: f.last, Writes: []*kvpb.Write{{Operation: &kvpb.Write_Set{Set: set}}}})
		m.Entries = append(m.Entries, logEntry(f.last, f.term, data))
		f.leader.index, f.leader.term = f.last, f.term
		_, _, _, _ = f.leader.apply(data)
	}
	return m
}

// snapshot lets the leader's state arrive.
func (f *diskFollower) snapshot() error {
	v := f.leader.openView()
	defer v.close()
	var b bytes.Buffer
	if err := v.writeTo(&b); err != nil {
		return err
	}
	s, err := f.n.readSnapshot(&b)
	if err != nil {
		return cmp.Or(f.settle(), err)
	}
	var stepped error
	f.n.inbox.event(func() { stepped = f.n.stepSnapshot(f.hello, f.term, s) })
	err = f.settle()
	f.note()
	return cmp.Or(err, stepped)
}

// TestDiskFollowerFaults: a node that joins by a snapshot, follows, votes, falls
// behind, gets another snapshot and compacts has after any fault what it
// promised.
func TestDiskFollowerFaults(t *testing.T) {
	states := func(script []diskOp) map[uint64]string { // by index
		f := &diskFollower{leader: newStore(), term: 5, last: 10}
		f.leader.members[leaderID] = &kvpb.Node{}
		m := map[uint64]string{10: keysOf(f.leader)}
		for _, op := range script {
			f.entries(op)
			m[f.last] = keysOf(f.leader)
		}
		return m
	}
	script := slices.DeleteFunc(diskScript(seededRand(3), 60, 900), func(op diskOp) bool { return op.value == nil })
	model := states(script)
	run := func(fs *simFS) (p promise, err error) {
		f, err := openFollower(fs)
		if err != nil {
			return p, err
		}
		next := func(n int) (ops []diskOp) {
			at := f.last - 10
			return script[at:min(at+uint64(n), uint64(len(script)))]
		}
		follow := func(until func() bool) func() error {
			return func() (err error) {
				for !until() && err == nil {
					if f.last == 10+uint64(len(script)) {
						return fmt.Errorf("%w: the script is too short", errModel)
					}
					err = f.hears(f.entries(next(2)...))
				}
				return err
			}
		}
		received := uint64(0)
		steps := []func() error{f.snapshot, follow(func() bool { return f.n.durable.snapshotIndex > 10 }), func() error { f.slowDown(); return nil },
			follow(func() bool { // and there are entries before, and room after, the mark in its segment
				g := f.d.wal.segments
				return f.n.durable.saving != 0 && g[len(g)-1].last > 0 && f.d.wal.offset <= f.d.wal.at.size/2
			})}
		steps = append(steps, func() error { // it votes for another, who does not win
			f.hears()
			f.term++
			for range 20 {
				f.n.turn(input{ticks: 100})
			}
			err := f.hears(message(raftpb.MsgVote, 1<<40, f.term, func(m *raftpb.Message) { m.Index, m.LogTerm = new(f.last), new(f.leader.term) }))
			if err == nil && f.acked.vote != 1<<40 {
				err = fmt.Errorf("%w: it does not vote", errModel)
			}
			f.term++
			return err
		}, func() error { f.entries(next(5)...); received = f.last; return f.snapshot() }, func() error {
			f.beside, f.slow = f.slow, nil // its snapshot has been overtaken
			f.d.start = f.later
			return cmp.Or(f.settle(), tidy(fs, f.diskNode))
		}, follow(func() bool { return f.last == 10+uint64(len(script)) }))
		for _, step := range steps {
			if err := step(); err != nil {
				if errors.Is(err, errModel) {
					return f.acked, err
				}
				before := f.acked
				failed := checkFailed(f.diskNode, fs.failAt)
				if f.note(); f.acked != before {
					failed = fmt.Errorf("%w: promised after the failure", errModel)
				}
				return f.acked, cmp.Or(failed, err)
			}
		}
		if f.acked.index != f.last || f.n.durable.snapshotIndex <= received {
			return f.acked, fmt.Errorf("%w: acknowledged %d of %d, last snapshot %d", errModel, f.acked.index, f.last, f.n.durable.snapshotIndex)
		}
		return f.acked, nil
	}
	verify := func(fs *simFS, p promise) error {
		saved, savedErr := readSaved(fs)
		if fs.mutates() {
			return fmt.Errorf("whoever only reads it changes it: %q", fs.calls)
		}
		f, err := openFollower(fs)
		if err != nil {
			return err
		}
		n := f.n
		if n.rn == nil {
			if p.term > 0 {
				return fmt.Errorf("it has forgotten all, and had promised %+v", p)
			}
			return cmp.Or(holdsNothing(savedErr), f.snapshot(), tidy(fs, f.diskNode))
		}
		if p.raftID != 0 && n.id.raftID != p.raftID {
			return errors.New("it is somebody else")
		}
		if h := n.log.hard; h.GetTerm() < p.term || h.GetTerm() == p.term && p.vote != 0 && h.GetVote() != p.vote {
			return fmt.Errorf("term %d and vote %x, and had promised %+v", h.GetTerm(), h.GetVote(), p)
		}
		if n.log.last() < p.index {
			return fmt.Errorf("its log ends at %d, and had promised %+v", n.log.last(), p)
		}
		f.term, f.last = n.log.hard.GetTerm()+1, n.log.last()
		f.leader.term, _ = n.log.Term(f.last)
		if err := f.hears(f.entries()); err != nil { // commits all of it
			return err
		}
		if n.store.index != f.last || keysOf(n.store) != model[f.last] {
			return fmt.Errorf("not what it was at %d: applied %d, of %d\n%s\n%s", f.last, n.store.index, len(model), keysOf(n.store), model[f.last])
		}
		return cmp.Or(differsFromSaved(n, saved, savedErr), tidy(fs, f.diskNode))
	}
	eachFault(t, run, verify)
}

// keysOf is all keys of a store.
func keysOf(s *store) string {
	var b strings.Builder
	for k, it := range (treeView{root: s.tree.root}).from(nil) {
		fmt.Fprintf(&b, "%s %x %d\n", k, it.value, it.version)
	}
	return b.String()
}

// backupOf is a cluster's state with so many keys, and a backup of it.
func backupOf(t *testing.T, keys int) (*store, []byte) {
	t.Helper()
	s := filledStore(keys)
	s.clusterID, s.index, s.term = 9, 7, 3
	s.configure(&raftpb.ConfState{Voters: []uint64{leaderID}}, []*kvpb.Member{{RaftId: leaderID, Node: &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}}})
	return s, backupBytes(t, s)
}

// backupBytes is a backup that a node would send of a store.
func backupBytes(t *testing.T, s *store) []byte {
	t.Helper()
	v := s.openBackup()
	defer v.close()
	return viewBytes(t, v)
}

// TestRestoreFaults: a restore to which anything happens leaves an empty
// directory, or all of what it restores.
func TestRestoreFaults(t *testing.T) {
	backup, b := backupOf(t, 20)
	now := time.Now()
	restore := func(fs *simFS) (bool, error) {
		d, err := openDisk(fs, simDir, diskLogBytes, quiet())
		if err != nil {
			return false, err
		}
		d.background = func(f func()) { f() }
		_, err = d.restore(&kvpb.Node{Id: 5, Address: "127.0.0.1:5"}, now, func() (*store, error) { return readSnapshot(bytes.NewReader(b)) })
		d.close()
		return err == nil, err
	}
	begun := 0
	verify := func(fs *simFS, done bool) error {
		if fs.names[simDir+"/identity"] == nil {
			if done {
				return errors.New("it was restored, and is empty")
			}
			begun++
			if _, err := restore(fs); err != nil {
				return err
			}
		}
		p, err := openDiskNode(fs, 5)
		if err != nil {
			return err
		}
		if err := p.lead(); err != nil {
			return err
		}
		s := p.n.store
		if keysOf(s) != keysOf(backup) || s.version != versionAt(now) || s.clusterID == 9 || s.members[leaderID] != nil || len(s.members) != 1 || len(s.removed) > 0 {
			return fmt.Errorf("it is %v", s.header())
		}
		return cmp.Or(p.do(diskOp{"k", []byte("v")}), tidy(fs, p))
	}
	eachFault(t, restore, verify, "remove")
	if begun < 50/raceStep(10) {
		t.Errorf("restored again only %d times", begun)
	}
}

// TestDiskBounded: however slowly snapshots are written, the log is bounded, on
// disk and in memory: writing waits.
func TestDiskBounded(t *testing.T) {
	for _, size := range []int{1, 400, 1500, 5000} {
		p, err := openDiskNode(newSimFS(), 1)
		if err == nil {
			_, err = p.n.bootstrap(nil)
		}
		if err = cmp.Or(err, p.settle()); err != nil {
			t.Fatal(err)
		}
		p.slowDown()
		stalls, most, memory := 0, 0, uint64(0)
		for i := range 500 {
			c, err := p.call(diskOp{"k", make([]byte, size)})
			if err = cmp.Or(err, p.settle()); err != nil {
				t.Fatal(err)
			}
			if len(c.done) == 0 {
				stalls++
			}
			for len(c.done) == 0 { // until the snapshot is there
				if len(p.slow) == 0 {
					t.Fatalf("write %d is not acknowledged", i)
				}
				p.slow[0]()
				p.slow = p.slow[1:]
				if err := p.settle(); err != nil {
					t.Fatal(err)
				}
			}
			log, snaps := 0, 0
			for path, f := range p.fs.names {
				if strings.Contains(path, ".wal") {
					log += len(f.cache)
				} else if strings.HasSuffix(path, "p") { // .snap or .tmp
					snaps++
				}
			}
			if most, memory = max(most, log), max(memory, p.n.log.bytes); snaps > 3 { // one is on its way out
				t.Fatalf("%d snapshots", snaps)
			}
		}
		if stalls < 5 || most > 9*diskLogBytes || memory > diskLogBytes+uint64(size+100) {
			t.Errorf("values of %d bytes: %d stalls, %d bytes on disk, %d in memory", size, stalls, most, memory)
		}
		t.Logf("values of %d bytes: %d stalls, at most %d bytes on disk, %d in memory", size, stalls, most, memory)
	}
}

// TestDiskDiscards: of a snapshot that was received and not taken, nothing is
// left.
func TestDiskDiscards(t *testing.T) {
	f, err := openFollower(newSimFS())
	if err != nil {
		t.Fatal(err)
	}
	old := f.leader.openView()
	defer old.close()
	f.entries(diskOp{"k", []byte("v")})
	if err := f.snapshot(); err != nil {
		t.Fatal(err)
	}
	read := func(v *view) *store {
		var b bytes.Buffer
		_ = v.writeTo(&b)
		s, err := f.n.readSnapshot(&b)
		if err != nil || s.file == "" || f.fs.names[f.d.path(s.file)] == nil {
			t.Fatal(err, s)
		}
		return s
	}
	newer := f.leader
	newer.index++
	v := newer.openView()
	defer v.close()
	stranger := proto.CloneOf(f.hello)
	stranger.To.RaftId++
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, receive := range map[string]func(){
		"older":   func() { _ = f.n.stepSnapshot(f.hello, f.term, read(old)) },
		"another": func() { _ = f.n.stepSnapshot(stranger, f.term, read(v)) },
		"late":    func() { _ = f.n.receiveSnapshot(ended, f.hello, f.term, read(v)) },
		"half": func() {
			if _, err := f.n.readSnapshot(strings.NewReader(frameMagic)); err == nil {
				t.Error("that is no snapshot")
			}
		},
		"ending": func() {
			f.d.closing.Store(true) // writes no more of it than it has
			defer f.d.closing.Store(false)
			var b bytes.Buffer
			_ = v.writeTo(&b)
			if _, err := f.n.readSnapshot(&b); !errors.Is(err, errStopping) {
				t.Error(err)
			}
		},
	} {
		receive()
		if err := cmp.Or(f.settle(), tidy(f.fs, f.diskNode)); err != nil || f.n.store.index != 11 {
			t.Errorf("%s: %v, at %d", name, err, f.n.store.index)
		}
	}
}

// wantRefusal checks that a directory is refused in these words, and that
// nothing in it was changed.
func wantRefusal(t *testing.T, fs *simFS, id uint64, words ...string) {
	t.Helper()
	fs.calls = nil
	p, err := openDiskNode(fs, id)
	if err == nil {
		t.Fatalf("started, with entry %d", p.n.store.index)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v\ndoes not say %q", err, w)
		}
	}
	_, savedErr := readSaved(fs)
	isSame := savedErr != nil && savedErr.Error() == err.Error()
	if isAnothers := strings.Contains(err.Error(), "this is node"); !isSame && !isAnothers {
		t.Errorf("who only reads it is told %v\ninstead of %v", savedErr, err)
	}
	if !isForGood(err) {
		t.Errorf("it says that another start may succeed: %v", err)
	}
	if fs.mutates() {
		t.Errorf("something was changed: %q", fs.calls)
	}
}

// usedDir is the directory of a cluster of one voter, with a torn last batch,
// segments and a snapshot that a start would remove, so that all that it could
// change is there. Snap is the snapshot that counts.
func usedDir(t testing.TB) (fs *simFS, snap string) {
	t.Helper()
	fs = newSimFS()
	p, err := openDiskNode(fs, 1)
	if err == nil {
		_, err = p.n.bootstrap(nil)
	}
	if err = cmp.Or(err, p.settle()); err != nil {
		t.Fatal(err)
	}
	for _, op := range diskScript(seededRand(1), 40, 60) {
		if err := p.do(op); err != nil {
			t.Fatal(err)
		}
	}
	for p.d.wal.offset > sectorBytes { // until there is room
		if err := p.do(diskOp{"k", []byte("v")}); err != nil {
			t.Fatal(err)
		}
	}
	snap = p.d.path(p.d.wal.head.Snapshot.File)
	torn := encodeAt(t, p.d.wal.at, &kvpb.LogBatch{Entries: []*kvpb.Entry{{Index: 99, Data: make([]byte, 600)}}})
	clear(torn[sectorBytes:])
	if _, err := p.d.wal.file.WriteAt(torn, int64(p.d.wal.offset)); err != nil {
		t.Fatal(err)
	}
	fs = fs.clone()
	for _, name := range []string{"0000000000000001-0000000000000001.snap", "00000000000000aa.tmp"} {
		fs.names[p.d.path(name)] = fs.names[snap]
	}
	return fs, snap
}

// TestDiskRefuses: what is damaged, missing or another's.
func TestDiskRefuses(t *testing.T) {
	const advice, backup = "move the data directory away", "restore a backup"
	identity := simDir + "/identity"
	edit := func(change func(*kvpb.Identity)) func(*simFS) {
		return func(fs *simFS) {
			var id kvpb.Identity
			if err := proto.Unmarshal(unframed(t, fs.names[identity].cache), &id); err != nil {
				t.Fatal(err)
			}
			change(&id)
			b, err := proto.Marshal(&id)
			if err != nil {
				t.Fatal(err)
			}
			fs.names[identity].cache = framed(b)
		}
	}
	first, snap := usedDir(t)
	other, _ := usedDir(t)
	logs := func(fs *simFS) (paths []string) {
		for path := range fs.names {
			if strings.HasSuffix(path, ".wal") {
				paths = append(paths, path)
			}
		}
		slices.Sort(paths)
		return paths
	}
	for name, c := range map[string]struct {
		damage func(*simFS)
		words  []string
	}{
		"another node's":         {edit(func(id *kvpb.Identity) { id.NodeId = 4 }), []string{"it is that of node 4, this is node 1"}},
		"newer identity":         {edit(func(id *kvpb.Identity) { id.Format++ }), []string{"of format 2", "start the newer one"}},
		"newer frames":           {func(fs *simFS) { fs.names[identity].cache[7]++ }, []string{"identity", "format that this program does not know"}},
		"no format":              {edit(func(id *kvpb.Identity) { id.Format = 0 }), []string{"identity is invalid", advice, backup}},
		"no cluster":             {edit(func(id *kvpb.Identity) { id.ClusterId = 0 }), []string{"identity is invalid", advice, backup}},
		"another cluster's":      {edit(func(id *kvpb.Identity) { id.ClusterId++ }), []string{snap, "of cluster", advice, backup}},
		"another log's identity": {edit(func(id *kvpb.Identity) { id.LogId++ }), []string{"of log", advice, backup}},
		"another directory's":    {func(fs *simFS) { fs.names[identity] = other.names[identity] }, []string{"of log", advice, backup}},
		"identity missing":       {func(fs *simFS) { delete(fs.names, identity) }, []string{"no file named identity", advice, backup}},
		"identity empty":         {func(fs *simFS) { fs.names[identity].cache = nil }, []string{"identity, offset 0: it ends in the middle", advice, backup}},
		"log missing": {func(fs *simFS) {
			for _, path := range logs(fs) {
				delete(fs.names, path)
			}
		}, []string{"its log, files named *.wal, is missing", advice, backup}},
		"oldest segment missing": {func(fs *simFS) { delete(fs.names, logs(fs)[0]) }, []string{logs(first)[0] + ", offset 0: the segment is missing", advice, backup}},
		"snapshot missing":       {func(fs *simFS) { delete(fs.names, snap) }, []string{snap[2:], "does not exist", advice, backup}},
		"snapshot cut":           {func(fs *simFS) { f := fs.names[snap]; f.cache = f.cache[:len(f.cache)-1] }, []string{snap + ": snapshot, offset 8: it ends in the middle", advice, backup}},
		"snapshot empty":         {func(fs *simFS) { fs.names[snap].cache = nil }, []string{snap + ": snapshot, offset 0: it ends in the middle", advice, backup}},
		"another snapshot": {func(fs *simFS) {
			h := &kvpb.SnapshotHeader{Format: snapshotFormat, Level: firstLevel, ClusterId: 1, Index: 1, Term: 1, ConfState: &kvpb.ConfState{Voters: []uint64{1}}, Members: []*kvpb.Member{{RaftId: 1, Node: &kvpb.Node{Id: 1}}}}
			fs.names[snap].cache = recordBytes(t, &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Header{Header: h}}, &kvpb.SnapshotRecord{Record: &kvpb.SnapshotRecord_Footer{Footer: &kvpb.SnapshotFooter{}}})
		}, []string{snap + ": it is of entry 1 of cluster 0000000000000001, and should be", advice, backup}},
	} {
		t.Run(name, func(t *testing.T) {
			fs := first.clone()
			c.damage(fs)
			wantRefusal(t, fs, 1, c.words...)
		})
	}
	p, err := openDiskNode(first, 1) // and undamaged it is not refused
	if err != nil {
		t.Fatal(err)
	}
	p.n.turn(input{ticks: 1}) // and leads at once, as there is nobody else
	if err := cmp.Or(p.settle(), tidy(first, p)); err != nil || !p.n.leads() {
		t.Fatal(p.n.leads(), err)
	}
}

// TestDiskSystemErrors: an error of the system is named as it is: it is no damage, and
// nothing is to be moved away for it.
func TestDiskSystemErrors(t *testing.T) {
	used, snap := usedDir(t)
	opened := used.clone()
	if _, err := openDiskNode(opened, 1); err != nil {
		t.Fatal(err)
	}
	reads := 0
	for at, call := range opened.calls {
		if !strings.HasPrefix(call, "read") && !strings.HasPrefix(call, "open") {
			break
		}
		reads++
		fs := used.clone()
		fs.failAt, fs.fault = at+1, faultEIO
		_, err := openDiskNode(fs, 1)
		if at == 0 && err == nil {
			continue // whether the directory is another's; it is read again
		}
		if !errors.Is(err, syscall.EIO) || strings.Contains(err.Error(), "move the data directory") || fs.mutates() {
			t.Errorf("%s: %v, %q", call, err, fs.calls)
		}
		if isForGood(err) {
			t.Errorf("%s: it says that another start is no use: %v", call, err)
		}
	}
	if reads < 8 || !slices.Contains(opened.calls[:reads], "open "+snap) {
		t.Errorf("%d calls: %q", reads, opened.calls[:reads])
	}
	for _, errno := range []syscall.Errno{syscall.EWOULDBLOCK, syscall.ENOLCK, syscall.ENOSYS, syscall.EBADF} {
		err := lockError("d/LOCK", errno)
		if used := strings.Contains(err.Error(), "another process"); used != (errno == syscall.EWOULDBLOCK) || !errors.Is(err, errno) {
			t.Errorf("%v: %v", errno, err)
		}
	}
}

// TestDiskEveryByte: damage to any byte of the identity or of a snapshot.
func TestDiskEveryByte(t *testing.T) {
	fs, snap := usedDir(t)
	for path, step := range map[string]int{simDir + "/identity": 1, snap: raceStep(7)} {
		b := fs.names[path].cache
		for i := 0; i < len(b); i += step {
			bit := byte(1) << (i % 8)
			b[i] ^= bit
			words := "move the data directory away"
			switch {
			case i < 7:
				words = "does not begin as it should"
			case i == 7:
				words = "of a format that this program does not know"
			}
			wantRefusal(t, fs, 1, path[2:], "offset", words)
			if b[i] ^= bit; t.Failed() {
				t.Fatalf("byte %d of %d of %s", i, len(b), path)
			}
		}
	}
}

// TestDiskRemovalTold: who is removed is told so only once the node would know
// it after a power loss. Else it might need the vote of one that has left.
func TestDiskRemovalTold(t *testing.T) {
	const learner = 77
	p, err := openDiskNode(newSimFS(), 1)
	if err != nil {
		t.Fatal(err)
	}
	change := func(kind raftpb.ConfChangeType, members ...*kvpb.Member) {
		p.n.inbox.event(func() {
			if err := p.n.proposeChange(members, confChange(kind, learner)); err != nil {
				t.Error(err)
			}
		})
	}
	p.n.inbox.event(func() { _, _ = p.n.bootstrap(nil) })
	if err := p.settle(); err != nil {
		t.Fatal(err)
	}
	change(raftpb.ConfChangeAddLearnerNode, &kvpb.Member{RaftId: learner, Node: plainNode(7)})
	if err := p.settle(); err != nil || p.n.store.members[learner] == nil {
		t.Fatalf("the learner is no member: %v", err)
	}
	change(raftpb.ConfChangeRemoveNode)
	applied := 0
	for !slices.Contains(p.n.hello().Removed, learner) {
		if applied++; applied > 20 {
			t.Fatal("it is never told")
		}
		if p.n.turn(p.n.inbox.take()); len(p.n.inbox.next.events) > 0 {
			continue
		}
		if slices.Contains(p.n.hello().Removed, learner) {
			break
		}
		_ = p.d.write()
	}
	again, err := openDiskNode(p.fs.lose(nil), 1)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(again.n.store.removed, learner) {
		t.Errorf("it was told, and is forgotten: %v", again.n.store.members)
	}
}

// TestDiskChangeAnswered: once a change of membership is answered, it is in effect
// after a loss of power, too, so that whoever votes no more may end.
func TestDiskChangeAnswered(t *testing.T) {
	const learner = 7
	p, err := openDiskNode(newSimFS(), 1)
	if err != nil {
		t.Fatal(err)
	}
	p.n.inbox.event(func() { _, _ = p.n.bootstrap(nil) })
	if err := p.settle(); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []raftpb.ConfChangeType{raftpb.ConfChangeAddLearnerNode, raftpb.ConfChangeRemoveNode} {
		changed := func(n *node) bool {
			return slices.Contains(n.store.conf.GetLearners(), learner) == (kind == raftpb.ConfChangeAddLearnerNode)
		}
		var members []*kvpb.Member
		if kind == raftpb.ConfChangeAddLearnerNode {
			members = plainMembers(learner)
		}
		p.n.inbox.event(func() {
			if err := p.n.proposeChange(members, confChange(kind, learner)); err != nil {
				t.Error(err)
			}
		})
		ask := func(next func(*leaderState) nextStep) *request { return &request{n: p.n, next: next} }
		waiting := map[string]*request{
			"the voters": ask(func(l *leaderState) nextStep {
				return l.membershipStep(&kvpb.ChangeMembershipRequest{Members: []uint64{1}})
			}),
			"the leader as a member":   ask(func(l *leaderState) nextStep { return l.learnerStep(&kvpb.Peer{RaftId: p.n.id.raftID, Node: p.n.self}) }),
			"the leader as the leader": ask((&leaderTransfer{to: 1}).step),
		}
		if kind == raftpb.ConfChangeRemoveNode {
			waiting["the removal, again"] = ask(func(l *leaderState) nextStep {
				return l.membershipStep(&kvpb.ChangeMembershipRequest{Remove: []uint64{learner}})
			})
		}
		waited := false
		var last *request
		for i := 0; len(waiting) > 0; i++ {
			if i > 40 {
				t.Fatalf("%v: never answered: %v", kind, waiting)
			}
			if p.n.turn(p.n.inbox.take()); len(p.n.inbox.next.events) > 0 {
				continue
			}
			if !changed(p.n) {
				_ = p.d.write()
				continue
			}
			for what, r := range waiting {
				done, err := r.poll()
				if err != nil {
					t.Fatalf("%v, %s: %v", kind, what, err)
				}
				waited = waited || !done
				if !done {
					continue
				}
				last = r
				delete(waiting, what)
				again, err := openDiskNode(p.fs.lose(nil), 1)
				if err != nil {
					t.Fatal(err)
				}
				if !changed(again.n) {
					t.Errorf("%v: asked for %s, it is answered, but not in effect after a loss of power", kind, what)
				}
			}
			_ = p.d.write()
		}
		if !waited {
			t.Errorf("%v: all is answered at once", kind)
		}
		last.witness.term-- // as if it had led before, too: what it proposed then may be gone
		if last.seekWitness() {
			t.Error("an entry of an earlier term counts")
		}
		if err := p.settle(); err != nil {
			t.Fatal(err)
		}
		if !last.seekWitness() {
			t.Error("there is no entry of this term")
		}
	}
}

// TestDiskLeavesOthersAlone: a directory may hold what is not the node's, if it was
// put there later; but no node begins in one that is somebody else's.
func TestDiskLeavesOthersAlone(t *testing.T) {
	for _, used := range []bool{false, true} {
		fs := newSimFS()
		if used {
			fs, _ = usedDir(t)
		}
		foreign := []string{"LOCK", "backup.snap", "letter.tmp", "1.wal", "0123456789abcdef.snap", "2026-11-26.snap", "notes"}
		for _, name := range foreign {
			fs.names[simDir+"/"+name] = &simFile{}
		}
		fs = fs.clone()
		p, err := openDiskNode(fs, 1)
		if used && (err != nil || p.n.rn == nil) {
			t.Fatal(err)
		}
		if !used && (err == nil || !strings.HasSuffix(err.Error(), "it is not empty: there is 0123456789abcdef.snap. Nothing was changed")) {
			t.Errorf("it begins among others: %v", err)
		}
		if used {
			if err := p.d.removeBefore(&kvpb.SnapshotMark{Index: math.MaxUint64}); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range foreign {
			if fs.names[simDir+"/"+name] == nil {
				t.Errorf("%s is gone", name)
			}
		}
	}
}

// TestDiskSyncs: a write costs a sync on the leader and one on a follower. What
// is committed costs none.
func TestDiskSyncs(t *testing.T) {
	syncs := func(p *diskNode, f func() error) int {
		t.Helper()
		p.fs.calls = nil
		if err := f(); err != nil {
			t.Fatal(err)
		}
		return len(slices.DeleteFunc(p.fs.calls, func(c string) bool { return !strings.HasPrefix(c, "sync") }))
	}
	p, err := openDiskNode(newSimFS(), 1)
	if err != nil {
		t.Fatal(err)
	}
	p.d.segmentBytes = 1 << 20
	_, _ = p.n.bootstrap(nil)
	if err := p.settle(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if n := syncs(p, func() error { return p.do(diskOp{"k", []byte("v")}) }); n != 1 {
			t.Errorf("a write costs %d syncs on the leader", n)
		}
	}
	f, err := openFollower(newSimFS())
	if err != nil {
		t.Fatal(err)
	}
	f.d.segmentBytes = 1 << 20
	if err := f.snapshot(); err != nil {
		t.Fatal(err)
	}
	if n := syncs(f.diskNode, func() error { return f.hears(f.entries(diskOp{"k", []byte("v")})) }); n != 1 {
		t.Errorf("a write costs %d syncs on a follower", n)
	}
	if n := syncs(f.diskNode, func() error { return f.hears(f.entries()) }); n != 0 || f.n.store.index != f.last {
		t.Errorf("a commit costs %d syncs, applied %d of %d", n, f.n.store.index, f.last)
	}
	// A commit that comes while the disk writes waits for it, and costs none either.
	if n := syncs(f.diskNode, func() error {
		f.n.turn(input{messages: []inbound{{f.to(f.entries(diskOp{"k", []byte("w")})), f.hello}}})
		if err := f.d.write(); err != nil { // the loop does not know yet
			return err
		}
		before := f.n.durable.queued
		f.n.turn(input{messages: []inbound{{f.to(f.entries()), f.hello}}})
		if f.n.durable.queued != before+1 {
			t.Error("it did not have to wait")
		}
		return f.settle()
	}); n != 1 || f.n.store.index != f.last {
		t.Errorf("an entry, and its commit meanwhile, cost %d syncs, applied %d of %d", n, f.n.store.index, f.last)
	}
}

// BenchmarkStart: 10⁶ keys of 16 + 128 bytes, all in a snapshot, or a tenth of
// them again in the log behind it, 100 writes in an entry.
func BenchmarkStart(b *testing.B) {
	const keys, perEntry = 1_000_000, 100
	for _, inLog := range []int{0, keys / 10} {
		b.Run(fmt.Sprintf("log=%d", inLog), func(b *testing.B) {
			dir := filepath.Join(b.TempDir(), "data")
			open := func(fs fileSystem) (*node, *disk) {
				n := newNode(defaultOptions(), &kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, quiet())
				n.net = deafNetwork{}
				d, err := openDisk(fs, dir, n.opts.logBytes, quiet())
				if err == nil {
					err = n.open(d)
				}
				if err != nil {
					b.Fatal(err)
				}
				return n, d
			}
			n, d := open(noSync{})
			s := filledStore(keys) // as bootstrap leaves one, but for the keys
			s.clusterID, s.index, s.term = 9, 1, 1
			s.configure(&raftpb.ConfState{Voters: []uint64{1}}, []*kvpb.Member{{RaftId: 1, Node: n.self}})
			d.enqueue(diskJob{
				identity: &kvpb.Identity{Format: identityFormat, ClusterId: 9, NodeId: 1, RaftId: 1, LogId: 1}, view: s.openView(),
				batch: &kvpb.LogBatch{HardState: &kvpb.HardState{Term: 1, Commit: 1}}, done: func(error) {},
			})
			var data []byte
			for i := range inLog / perEntry {
				data = benchBatch(rand.New(rand.NewPCG(uint64(i), 0)), uint64(i+1), keys, perEntry)
				e := &kvpb.Entry{Index: uint64(i + 2), Term: 1, Data: data}
				d.enqueue(diskJob{batch: &kvpb.LogBatch{HardState: &kvpb.HardState{Term: 1, Commit: e.Index}, Entries: []*kvpb.Entry{e}}, done: func(error) {}})
				if err := d.write(); err != nil {
					b.Fatal(err)
				}
			}
			if err := d.write(); err != nil {
				b.Fatal(err)
			}
			d.close()
			for b.Loop() {
				n, d := open(osFS{})
				b.StopTimer()
				if n.store.tree.keys < keys || n.store.index != uint64(inLog/perEntry+1) {
					b.Fatalf("%d keys, applied %d", n.store.tree.keys, n.store.index)
				}
				d.close()
				n, d = nil, nil
				runtime.GC()
				b.StartTimer()
			}
			b.ReportMetric(keys*float64(b.N)/b.Elapsed().Seconds(), "keys/s")
		})
	}
}

// FuzzIdentity: whatever is in a file identity, and in frames: no panic, no
// more memory than a multiple of its size, and what is read can be written.
func FuzzIdentity(f *testing.F) {
	id, _ := proto.Marshal(&kvpb.Identity{Format: 1, ClusterId: 1, NodeId: 1, RaftId: 1, LogId: 1})
	f.Add(framed(id))
	f.Add(framed(append(id, 0xff)))
	f.Add(framed(make([]byte, maxFrameBytes)))
	f.Add([]byte(frameMagic + "\xff\xff\x03\x00abcd"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		fs := newSimFS()
		fs.names[simDir+"/identity"] = &simFile{cache: data}
		d, err := openDisk(fs, simDir, diskLogBytes, quiet())
		if err != nil {
			t.Fatal(err)
		}
		var got *kvpb.Identity
		if n, ok := allocates(10*len(data)+2*maxFrameBytes, func() { got, err = d.readIdentity() }); !ok {
			t.Errorf("%d bytes allocated for %d", n, len(data))
		}
		if err == nil && (got.Format != 1 || got.ClusterId == 0 || got.NodeId == 0 || got.LogId == 0 || got.RaftId == 0 || got.RaftId >= maxRaftID) {
			t.Error(got)
		}
		content, err := io.ReadAll(newFrameReader(bytes.NewReader(data)))
		if again := unframed(t, framed(content)); err == nil && !bytes.Equal(content, again) {
			t.Errorf("%d bytes are %d", len(content), len(again))
		}
	})
}

// writingNode is a cluster of one voter that has made so many writes, in segments
// of so many bytes.
func writingNode(t *testing.T, writes, segmentBytes int) *diskNode {
	t.Helper()
	p, err := openDiskNode(newSimFS(), 1)
	if err == nil {
		p.d.segmentBytes = segmentBytes
		_, err = p.n.bootstrap(nil)
	}
	if err = cmp.Or(err, p.settle()); err != nil {
		t.Fatal(err)
	}
	for i := range writes {
		if err := p.do(diskOp{fmt.Sprint("k", i), []byte("acknowledged")}); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// newestSegment returns the newest segment's path, and where its last batch is.
func newestSegment(fs *simFS) (path string, from, to int) {
	for name := range fs.names {
		if strings.HasSuffix(name, ".wal") {
			path = max(path, name)
		}
	}
	for {
		raw, _, err := decodeBatch(fs.names[path].cache[to:])
		if err != nil {
			return path, from, to
		}
		from, to = to, to+len(raw)
	}
}

// TestLastBatchDamaged: whatever the last batch said, damage to it is not taken for
// a torn tail, after a kill or after a clean stop.
func TestLastBatchDamaged(t *testing.T) {
	p := writingNode(t, 0, diskLogBytes/4)
	for i := range 200 {
		if err := p.do(diskOp{"k", make([]byte, 400)}); err != nil {
			t.Fatal(err)
		}
		fs := p.fs.lose(nil).clone()
		path, from, to := newestSegment(fs)
		for _, at := range []int{from, from + 40, from + 60, to - 1} {
			fs.names[path].cache[at] ^= 1
			wantRefusal(t, fs, 1, fmt.Sprintf("%s, offset %d: ", path, from), "damaged", "move the data directory away")
			if fs.names[path].cache[at] ^= 1; t.Failed() {
				t.Fatalf("write %d, byte %d of the last batch, %d to %d", i, at, from, to)
			}
		}
		if _, err := openDiskNode(fs, 1); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStoppedLogDamaged: after a clean stop, any damage to a batch that was
// acknowledged is found, zeros in its place included, which a loss of power leaves,
// too.
func TestStoppedLogDamaged(t *testing.T) {
	p := writingNode(t, 2, 2*simSegment)
	if err := p.do(diskOp{"large", bytes.Repeat([]byte{7}, 700)}); err != nil {
		t.Fatal(err)
	}
	path, from, to := newestSegment(p.fs)
	if to-from != 2*sectorBytes {
		t.Fatalf("the last batch takes %d bytes", to-from)
	}
	killed := p.fs.clone()
	p.d.close()
	stopped := p.fs.lose(nil)
	for at := from; at < to; at++ {
		fs := stopped.clone()
		fs.names[path].cache[at] ^= 1
		wantRefusal(t, fs, 1, fmt.Sprintf("%s, offset %d: ", path, from), "damaged")
	}
	for sector := from; sector < to; sector += sectorBytes {
		fs := stopped.clone()
		clear(fs.names[path].cache[sector:][:sectorBytes])
		wantRefusal(t, fs, 1, fmt.Sprintf("%s, offset %d: ", path, from), "damaged")
		if t.Failed() {
			t.Fatalf("offset %d", sector)
		}
		clear(killed.names[path].cache[sector:][:sectorBytes])
	}
	q, err := openDiskNode(killed, 1) // which cannot be told from a batch that was not written
	if err != nil {
		t.Fatal(err)
	}
	if err := q.lead(); err != nil || q.n.store.tree.keys != 2 {
		t.Fatalf("%d keys, %v", q.n.store.tree.keys, err)
	}
	if q, err = openDiskNode(stopped, 1); err == nil {
		err = q.lead()
	}
	if err != nil || q.n.store.tree.keys != 3 {
		t.Fatalf("%d keys, %v", q.n.store.tree.keys, err)
	}
}

// TestFailedLogIsNotStopped: a node that has failed does not end its log as one that
// was stopped does.
func TestFailedLogIsNotStopped(t *testing.T) {
	for _, fails := range []bool{false, true} {
		p := writingNode(t, 1, simSegment)
		if fails {
			p.n.diskFailed(syscall.EIO)
		}
		p.fs.calls = nil
		p.d.close()
		if written := p.fs.mutates(); written == fails {
			t.Errorf("fails %v: %q", fails, p.fs.calls)
		}
	}
}

// TestSegmentsCut: a segment that was cut, or is missing with all that follow it,
// is found out, whatever is left.
func TestSegmentsCut(t *testing.T) {
	p := writingNode(t, 9, diskLogBytes/4)
	p.d.close()
	newest, _, _ := newestSegment(p.fs)
	made := len(p.fs.names[newest].cache)
	for size := 0; size < made; size++ {
		fs := p.fs.clone()
		fs.names[newest].cache = fs.names[newest].cache[:size]
		wantRefusal(t, fs, 1, newest+", offset ", "move the data directory away")
	}
	segments := 0
	fs := p.fs.clone()
	for path := newest; fs.names[path] != nil; segments++ { // one more each time
		delete(fs.names, path)
		delete(fs.names, simPath(int(p.d.wal.at.segment)+1)+".tmp")
		wantRefusal(t, fs, 1, "missing")
		path = simPath(int(p.d.wal.at.segment) - 1 - segments)
	}
	if segments < 3 {
		t.Errorf("only %d segments", segments)
	}
}

// TestSnapshotOfAnother: a directory that lost its identity and its log, but not
// the segment that was being filled, or not its snapshots, is refused, and says what
// was found; one with any snapshot is not empty for a restore.
func TestSnapshotOfAnother(t *testing.T) {
	fs, snap := usedDir(t)
	for path := range fs.names {
		if strings.HasSuffix(path, ".wal") || strings.HasSuffix(path, "/identity") {
			delete(fs.names, path)
		}
	}
	fs = fs.clone()
	wantRefusal(t, fs, 1, "identity")
	if fs.names[snap] == nil {
		t.Error("the snapshot is gone")
	}
	for path := range fs.names {
		if path != snap {
			delete(fs.names, path)
		}
	}
	fs = fs.clone()
	wantRefusal(t, fs, 1, "it has "+strings.TrimPrefix(snap, simDir+"/")+", but no file named identity", "move the data directory away")
	if fs.names[snap] == nil {
		t.Error("the only snapshot is gone")
	}
	d, err := openDisk(fs, simDir, diskLogBytes, quiet())
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.restore(&kvpb.Node{Id: 1, Address: "127.0.0.1:1"}, time.Now(), func() (*store, error) { return nil, errors.New("it is damaged") })
	if err == nil || !strings.Contains(err.Error(), "not empty") || fs.names[snap] == nil {
		t.Error("restored into it: ", err, slices.Collect(func(y func(string) bool) {
			for n := range fs.names {
				if !y(n) {
					return
				}
			}
		}))
	}
}

// TestCleanKeepsWhatSays: an unfinished directory whose clean-up fails once is cleaned up by the next start.
func TestCleanKeepsWhatSays(t *testing.T) {
	fs := newSimFS()
	for _, n := range []string{"identity.tmp", "0000000000000001.wal", "0000000000000001-0000000000000002.snap", "0000000000000002.wal.tmp"} {
		fs.names[simDir+"/"+n] = &simFile{}
	}
	for at := 1; at < 20; at++ {
		for fault := range numFaults {
			c := fs.clone()
			c.failAt, c.fault = at, fault
			_, err := openDiskNode(c, 1)
			c.failAt = 0
			c.crashed = false
			if err == nil {
				continue
			}
			if _, err2 := openDiskNode(c.restart(false), 1); err2 != nil {
				t.Errorf("call %d, fault %d: %v; then %.150v", at, fault, err, err2)
			}
		}
	}
}

var kills = flag.Int("kills", 6, "how many times TestDurableKills kills nodes with -9")

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

// TestLockEndsWhenItIsClosed: also while a process that is just being started has its file.
func TestLockEndsWhenItIsClosed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	for _, fs := range []fileSystem{osFS{}, readOnlyFS{}} {
		held, err := fs.lock(dir)
		if err != nil {
			t.Fatal(err)
		}
		inherited, err := syscall.Dup(int(held.(heldLock).Fd()))
		if err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(inherited)
		if _, err := (osFS{}).lock(dir); err == nil {
			t.Fatalf("%T: two have the lock", fs)
		}
		if err := held.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := osFS{}.lock(dir)
		if err != nil {
			t.Fatalf("%T: %v", fs, err)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDirectoryThatCannotBeApplied: an entry that the program cannot apply is there at each start:
// no restart mends it.
func TestDirectoryThatCannotBeApplied(t *testing.T) {
	for name, kind := range map[string]raftpb.EntryType{"a write": raftpb.EntryNormal, "a change": raftpb.EntryConfChangeV2} {
		fs := newSimFS()
		f, err := openFollower(fs)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.snapshot(); err != nil {
			t.Fatal(err)
		}
		at := f.last + 1
		b := &kvpb.LogBatch{
			HardState: &kvpb.HardState{Term: f.term, Commit: at},
			Entries:   []*kvpb.Entry{{Index: at, Term: f.term, Type: kvpb.EntryType(kind), Data: []byte{0xff}}},
		}
		if err := f.d.wal.append(b); err != nil {
			t.Fatal(err)
		}
		_, err = openDiskNode(fs.restart(false), f.n.self.Id)
		if exitOf(err) != exitForGood || !strings.Contains(err.Error(), fmt.Sprintf("applying entry %d", at)) {
			t.Errorf("%s: %v, exit status %d", name, err, exitOf(err))
		}
	}
}

// TestToldToStop: a node that is told to stop ends with 0, whatever it hears in its last turn.
func TestToldToStop(t *testing.T) {
	hello := &kvpb.Hello{
		ClusterId:    7,
		From:         &kvpb.Peer{Node: plainNode(2), RaftId: 2, Life: 2},
		To:           &kvpb.Peer{Node: plainNode(1), RaftId: 5},
		DurableNodes: []uint64{1},
		Leading:      true,
	}
	l := newLone(t, following)
	l.n.durable.snapshotIndex = 1
	for what, happens := range map[string]func(n *node){
		"its directory is missed": func(n *node) { n.store.clusterID = 0; n.missDisk(hello) },
		"it was removed":          func(n *node) { n.endRemoved(nil) },
	} {
		l.n.err = errStopping
		happens(l.n)
		if l.n.err != errStopping {
			t.Errorf("%s: %v", what, l.n.err)
		}
		l.n.err = nil
		happens(l.n)
		if !isForGood(l.n.err) {
			t.Errorf("%s, and it goes on: %v", what, l.n.err)
		}
	}
}

// TestDurableMissed: a node that is started without the directory that its members know of
// ends, whoever tells it, and is not taken back in memory. With an empty one it is taken back,
// and its log says that it should not be empty. Once it was removed, it may be in memory.
func TestDurableMissed(t *testing.T) {
	t.Parallel() // it mostly waits
	c, _ := newDurable(t, 3)
	c.init(1, 2, 3)
	durable := c.options
	leader := c.settled(1, 2, 3)
	for _, id := range []uint64{1 + leader%3, leader} {
		c.inLoop(1+id%3, func(n *node) error {
			if !slices.Contains(n.peers.durableNodes, id) {
				return fmt.Errorf("it does not know node %d as durable", id)
			}
			return nil
		})
		before := c.raftIDs(id)
		address := c.nodes[id].address
		c.kill(id)
		c.also(inMemory)
		c.start(id, address)
		c.ends(id, errDiskMissing, "start it with the directory that it had", "says node ")
		c.options = durable
		c.start(id, address)
		c.settled(1, 2, 3)
		if after := c.raftIDs(id); !slices.Equal(before, after) {
			t.Errorf("node %d was %x and is %x", id, before, after)
		}
	}
	log := &sharedLog{}
	c.log = log
	address := c.nodes[3].address
	c.kill(3)
	empty := t.TempDir()
	c.also(func(o *options) { o.dataDir = empty })
	c.start(3, address)
	c.settled(1, 2, 3)
	wantPart(t, log.String(), "the data directory is empty, and its members know this node as one that had data in it")
	c.change(1, &kvpb.ChangeMembershipRequest{Remove: []uint64{3}})
	c.ends(3, errRemoved)
	for _, id := range []uint64{1, 2} {
		c.inLoop(id, func(n *node) error {
			if slices.Contains(n.peers.durableNodes, 3) {
				return errors.New("it takes node 3 for a durable member")
			}
			return nil
		})
	}
	c.also(inMemory)
	c.start(3, address)
	c.addLearner(1, 3)
	c.change(1, &kvpb.ChangeMembershipRequest{Promote: []uint64{3}})
	c.settled(1, 2, 3)
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
		empty := t.TempDir()
		c.also(func(o *options) { o.dataDir = empty })
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
	c, dir := newDurable(t, 3, steady)
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
	c.acknowledges(1, 3)
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
	const values = 24
	c.fill(1, values)
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
		const snapshot = values * 64 << 10
		if err != nil || size == 0 || size > 2*snapshot+2<<16 {
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
				c.also(inMemory)
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
			if at == 0 && len(bad) == 0 {
				wantPart(t, errs, file+": offset 0: it is empty")
				continue
			}
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
		if v := len(n.n.store.clientViews); v != 0 {
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
			ids = append(ids, p.metricsInTime().RaftId)
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

// TestSnapshotsFollowTheData: of a large store that is rewritten, a snapshot is saved when as
// much is logged as the last one was long, also after a start.
func TestSnapshotsFollowTheData(t *testing.T) {
	fsys := newSimFS()
	p, err := openDiskNode(fsys, 1)
	if err != nil {
		t.Fatal(err)
	}
	p.n.inbox.event(func() { _, _ = p.n.bootstrap(nil) })
	if err := p.lead(); err != nil {
		t.Fatal(err)
	}
	const keys, size = 100, 1000
	saved, last := 0, uint64(0)
	rewrite := func() {
		t.Helper()
		for i := range keys {
			if _, err := p.call(diskOp{fmt.Sprint("key", i), make([]byte, size)}); err != nil {
				t.Fatal(err)
			}
			if err := p.settle(); err != nil {
				t.Fatal(err)
			}
			if last != p.n.durable.snapshotIndex {
				last = p.n.durable.snapshotIndex
				saved++
			}
		}
	}
	rewrite()
	const times = 10
	check := func(when string) {
		t.Helper()
		saved = 0
		for range times {
			rewrite()
		}
		// A write takes two or three sectors of the log.
		if saved < times || saved > 2*times {
			t.Errorf("%s: %d snapshots are saved while the store is written %d times", when, saved, times)
		}
	}
	check("at first")
	p.d.close()
	p, err = openDiskNode(fsys, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.lead(); err != nil {
		t.Fatal(err)
	}
	if n := p.n.durable.lastBytes; n < keys*size {
		t.Errorf("after a start, the last snapshot has %d bytes", n)
	}
	check("after a start")
}
