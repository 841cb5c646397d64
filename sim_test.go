// The simulator: the real Ready loop, store and log of several nodes over a
// simulated network and clock, in one goroutine and from one seed. It checks
// what must always hold, and replays exactly.
//
// A step is one event: a message, a tick, a call, an operator's request or a
// fault. After each step, on the node that took it: I3 one leader a term, I4
// committed entries never change, I6 nothing goes back, I2 an acknowledged
// write is the one committed, no read of anything else, no raft ID twice, no
// node stops. Whenever a node's applied index is a multiple of stateEvery, and
// at the end: I5 equal states. At the end: I1 porcupine, I9 all heals.

package main

import (
	"bytes"
	"cmp"
	"container/heap"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

var (
	simSeeds = flag.Int("sim.seeds", 16, "how many seeds TestSimulate runs")
	simSteps = flag.Int("sim.steps", 8000, "how many steps of each seed it runs before all faults end")
	simSeed  = flag.Uint64("sim.seed", 1, "the first seed")
	simTrace = flag.Bool("sim.trace", false, "print the whole trace")
)

const (
	// simTick is a node's tick, nominally, in units of simulated time.
	simTick = 1000
	// stateEvery is between two indexes at which states are compared.
	stateEvery = 32
	// settleTicks is how long healing may take once all faults have ended.
	settleTicks = 6000
	// traceLines is how much of the trace a failure prints.
	traceLines = 60
)

// simConfig is what a seed draws before its run starts. Times are in ticks.
type simConfig struct {
	steps         int
	nodes, voters int
	election      int
	logBytes      int64
	latency       float64 // mean
	spike         float64 // probability of a latency 20 times as long
	lag           float64 // most that a node's loop rests with work in its inbox
	loss, dup     float64
	reorder       bool
	late          float64 // probability that a message outlives its stream
	queue         int     // messages that a stream holds
	snapshotDies  float64
	clients, keys int
	valueBytes    int
	think         float64 // mean, between two calls of a client
	timeout       float64 // mean, of a call
	faultEvery    float64
	outage        float64 // mean, of a fault that lasts
	faults        []string
	adminEvery    float64

	reckless bool // operators ask for voters of whom a majority is dead

	// Bugs that tests plant.
	reuseID   bool // a restarted process has its old raft ID
	crossLife bool // messages reach the next life
	readNow   bool // a read is answered without asking anybody
	ackEarly  bool // a write is acknowledged when raft has taken it
	forget    bool // snapshots come without the proposers
	twice     bool // batches are applied as often as they come
}

var simFaults = []string{"kill", "kill", "stop", "pause", "isolate", "split", "one-way", "drop", "loss", "slow", "rate"}

func drawConfig(rng *rand.Rand, steps int) simConfig {
	pick := func(vs ...float64) float64 { return vs[rng.IntN(len(vs))] }
	c := simConfig{
		steps: steps, nodes: 3 + rng.IntN(3), election: int(pick(10, 15, 30)), logBytes: int64(pick(8<<10, 16<<10, 64<<10)),
		latency: pick(.05, .3, 1, 2), spike: pick(0, 0, .01, .05), lag: pick(0, 0, .5, 2),
		loss: pick(0, 0, .01, .05), dup: pick(0, .02, .1), reorder: rng.IntN(3) == 0, late: pick(0, .5, 1), queue: int(pick(20, 1000)),
		snapshotDies: pick(0, .2, .5), clients: 1 + rng.IntN(6), keys: 1 + rng.IntN(8), valueBytes: int(pick(0, 100, 400)),
		think: pick(.5, 2, 10), timeout: pick(30, 100, 300), faultEvery: pick(20, 60, 200), outage: pick(20, 60, 150), adminEvery: pick(60, 200, 1000),
	}
	c.voters = min(c.nodes, int(pick(1, 2, 3, 3, 3, 5)))
	for _, f := range simFaults {
		if rng.IntN(3) > 0 {
			c.faults = append(c.faults, f)
		}
	}
	return c
}

// event is something that will happen. With a process it happens there: not
// if that has died, and later if it is stopped.
type event struct {
	at  int64
	seq uint64
	p   *proc
	f   func()
}

type eventQueue []*event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(*event)) }
func (q *eventQueue) Pop() any {
	e := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return e
}

// site is where a node runs, one process after another.
type site struct {
	i     int
	node  *kvpb.Node
	cur   *proc  // nil: dead
	old   uint64 // the last raft ID
	lives int
}

// proc is a process: a node from its start to its death. It is the node's
// transport, and has the state that the real one has.
type proc struct {
	s      *sim
	site   *site
	n      *node
	dead   bool
	paused bool
	held   []*event // for when it goes on
	inTurn bool
	soon   bool // a turn is scheduled
	rate   float64

	raftID       uint64 // as last seen, and below it what belongs to it
	term, commit uint64
	applied      uint64
	version      map[string]uint64        // of local reads
	tail         map[uint64]*raftpb.Entry // of the log, from applied on: it may be compacted in the turn that applies it
	installed    uint64

	members   map[uint64]*kvpb.Node
	peers     map[uint64]*simPeer
	inbound   map[uint64]*simStream
	receiving map[uint64]*transfer
	sending   []*transfer
	calls     []*op
	hellos    []*simStream // on their way to here
}

// sim is a run.
type sim struct {
	cfg     simConfig
	seed    uint64
	rng     *rand.Rand
	now     int64
	seq     uint64
	step    uint64
	queue   eventQueue
	sites   []*site
	cut     [][]int // by site, from and to: partitions in force
	lossNow float64 // while a burst lasts
	slowNow float64
	calm    bool // no more faults
	running bool // faults have begun
	quiet   bool // no more calls

	oracle  oracle
	leaders map[uint64]uint64 // by term
	lives   map[uint64]string // by raft ID and by life: whose it was
	states  map[uint64]uint64 // by index: hash
	names   map[uint64]string // of raft IDs
	clients []*caller
	admins  []*admin
	values  map[string]*op
	seen    map[string]uint64 // by key: the newest version that a client has been told of
	history []*op
	clock   int64

	count map[string]int
	lines int
	lazy  [traceLines]traceLine
	sink  io.Writer // gets the whole trace
}

type traceLine struct {
	step   uint64
	now    int64
	format string
	args   []any
}

func (l traceLine) String() string {
	return fmt.Sprintf("%6d %9.3f  %s", l.step, float64(l.now)/simTick, fmt.Sprintf(l.format, l.args...))
}

// simFailure is what a run that went wrong panics with.
type simFailure string

func (s *sim) failf(format string, args ...any) {
	panic(simFailure(fmt.Sprintf(format, args...)))
}

// trace keeps a line. What it is given must not change, but processes may.
func (s *sim) trace(format string, args ...any) {
	for i, a := range args {
		if p, ok := a.(*proc); ok {
			args[i] = p.String()
		}
	}
	l := traceLine{s.step, s.now, format, args}
	s.lazy[s.lines%traceLines] = l
	s.lines++
	if s.sink != nil {
		fmt.Fprintln(s.sink, l)
	}
}

func (s *sim) tail() string {
	var b strings.Builder
	for i := max(0, s.lines-traceLines); i < s.lines; i++ {
		fmt.Fprintln(&b, s.lazy[i%traceLines])
	}
	return b.String()
}

func newSim(seed uint64, cfg simConfig, rng *rand.Rand, sink io.Writer) *sim {
	s := &sim{
		cfg: cfg, seed: seed, rng: rng, sink: sink, leaders: map[uint64]uint64{}, lives: map[uint64]string{},
		states: map[uint64]uint64{}, names: map[uint64]string{}, values: map[string]*op{}, seen: map[string]uint64{}, count: map[string]int{},
	}
	for i := range cfg.nodes {
		s.sites = append(s.sites, &site{i: i, node: &kvpb.Node{Id: uint64(i + 1), Address: fmt.Sprintf("node%d:1", i+1)}})
		s.cut = append(s.cut, make([]int, cfg.nodes))
	}
	s.trace("seed %d: %+v", seed, cfg)
	for _, st := range s.sites {
		s.start(st)
	}
	return s
}

// after schedules f in so many ticks.
func (s *sim) after(ticks float64, p *proc, f func()) {
	s.schedule(s.now+int64(ticks*simTick), p, f)
}

func (s *sim) schedule(at int64, p *proc, f func()) {
	s.seq++
	heap.Push(&s.queue, &event{at: at, seq: s.seq, p: p, f: f})
}

// next makes the next event happen.
func (s *sim) next() {
	e := heap.Pop(&s.queue).(*event)
	s.now = max(s.now, e.at)
	switch {
	case e.p != nil && e.p.dead:
	case e.p != nil && e.p.paused:
		e.p.held = append(e.p.held, e)
	default:
		s.step++
		e.f()
	}
}

// expo is an exponentially distributed time.
func (s *sim) expo(mean float64) float64 { return mean * min(s.rng.ExpFloat64(), 6) }

func (s *sim) chance(p float64) bool { return p > 0 && s.rng.Float64() < p }

// alive returns the processes that run, or are stopped.
func (s *sim) alive() []*proc {
	var ps []*proc
	for _, st := range s.sites {
		if st.cur != nil {
			ps = append(ps, st.cur)
		}
	}
	return ps
}

func (s *sim) anyProc() *proc {
	ps := s.alive()
	if len(ps) == 0 {
		return nil
	}
	return ps[s.rng.IntN(len(ps))]
}

func (s *sim) name(raftID uint64) string {
	if n, ok := s.names[raftID]; ok {
		return n
	}
	return fmt.Sprintf("%x", raftID)
}

func (p *proc) String() string { return p.s.name(p.raftID) }

// start starts a process at a site.
func (s *sim) start(st *site) {
	o := defaultOptions()
	o.heartbeat, o.election = 100*time.Millisecond, time.Duration(s.cfg.election)*20*time.Millisecond
	o.logBytes, o.id = s.cfg.logBytes, st.node.Id
	p := &proc{
		s: s, site: st, peers: map[uint64]*simPeer{}, inbound: map[uint64]*simStream{}, receiving: map[uint64]*transfer{},
		rate: .8 + .4*s.rng.Float64(),
	}
	p.n = newNode(o, st.node, slog.New(&simLog{s: s, p: p}))
	p.n.net = p
	st.cur = p
	if old := st.old; old != 0 && s.cfg.reuseID {
		p.n.raftID = old
		if err := p.n.start(); err != nil {
			s.failf("starting under the old raft ID: %v", err)
		}
	}
	p.identify()
	s.trace("%v starts at %s", p, st.node.Address)
	s.after(s.rng.Float64(), p, p.tick)
}

// identify sees whether the node has become somebody new.
func (p *proc) identify() {
	if p.raftID == p.n.raftID {
		return
	}
	s, n := p.s, p.n
	p.raftID, p.term, p.commit, p.applied, p.version, p.tail = n.raftID, 0, 0, 0, map[string]uint64{}, map[uint64]*raftpb.Entry{}
	s.count["lives"]++
	p.site.old = n.raftID
	if s.cfg.reuseID {
		delete(s.lives, n.raftID)
	}
	p.site.lives++
	name := fmt.Sprintf("%d.%d", n.self.Id, p.site.lives)
	for _, id := range []uint64{n.raftID, n.life} {
		if other, ok := s.lives[id]; ok {
			s.failf("the ID %x of %s was that of %s", id, name, other)
		}
		s.lives[id] = name
	}
	s.names[n.raftID] = name
}

// simLog puts the node's own log into the trace.
type simLog struct {
	s *sim
	p *proc
}

func (l *simLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }
func (l *simLog) WithAttrs([]slog.Attr) slog.Handler               { return l }
func (l *simLog) WithGroup(string) slog.Handler                    { return l }
func (l *simLog) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool { fmt.Fprintf(&b, " %s=%v", a.Key, a.Value); return true })
	if !strings.HasPrefix(r.Message, "raft: ") {
		l.s.count["log: "+r.Message]++
	}
	l.s.trace("  %v logs: %s", l.p, b.String())
	if r.Message == "the cluster cannot go on" && slices.ContainsFunc(l.s.alive(), func(q *proc) bool { return q.n.store.index > l.p.n.store.index }) {
		l.s.count["alarms of nodes that lag"]++
	} else if r.Message == "the cluster cannot go on" {
		l.s.failf("%v says that too much memory is lost, and that is not so:%s", l.p, l.s.overview())
	}
	return nil
}

// tick is the process's clock.
func (p *proc) tick() {
	p.s.after(p.rate*(.9+.2*p.s.rng.Float64()), p, p.tick)
	p.turn(1)
}

// wake has the process take a turn, at once or soon.
func (p *proc) wake() {
	if lag := p.s.cfg.lag; p.inTurn || p.s.chance(min(lag, .7)) {
		if !p.soon {
			p.soon = true
			p.s.after(lag*p.s.rng.Float64(), p, func() { p.turn(0) })
		}
	} else if !p.soon && !p.paused {
		p.turn(0)
	}
}

// turn runs the loop's body once and checks what it has done.
func (p *proc) turn(ticks int) {
	p.soon, p.inTurn = false, true
	in := p.n.in.take()
	in.ticks = ticks
	if p.s.cfg.twice {
		clear(p.n.store.proposers)
	}
	p.n.turn(in)
	p.inTurn = false
	p.check()
	p.poll()
}

// check checks the invariants that one node can break in one turn.
func (p *proc) check() {
	s, n := p.s, p.n
	if n.err != nil && n.err != errStopping {
		s.failf("node %v stops: %v", p, n.err)
	}
	p.identify()
	if n.rn != nil {
		st := n.rn.BasicStatus()
		term, commit := st.GetTerm(), st.GetCommit()
		if term < p.term || commit < p.commit || n.store.index < p.applied {
			s.failf("I6: %v goes back from term %d, commit %d, applied %d to %d, %d, %d", p, p.term, p.commit, p.applied, term, commit, n.store.index)
		}
		if n.store.index > commit || n.raft.prevIndex > n.store.index {
			s.failf("I6: %v has compacted %d, applied %d, committed %d", p, n.raft.prevIndex, n.store.index, commit)
		}
		if term > p.term || st.RaftState == raft.StateLeader {
			if leader, ok := s.leaders[term]; st.RaftState == raft.StateLeader && !ok {
				s.leaders[term] = n.raftID
				s.count["elections"]++
				s.trace("%v leads term %d", p, term)
			} else if st.RaftState == raft.StateLeader && leader != n.raftID {
				s.failf("I3: %v and %s both lead term %d", p, s.name(leader), term)
			}
		}
		p.term, p.commit = term, commit
	}
	p.keepTail()
	if n.store.index > p.applied {
		s.observe(p, p.applied+1, n.store.index)
		p.applied = n.store.index
		if p.applied%stateEvery == 0 {
			s.compareState(p)
		}
	}
}

// entry returns an entry of the node's log.
func (p *proc) entry(i uint64) *raftpb.Entry {
	if es, err := p.n.raft.Entries(i, i+1, math.MaxUint64); err == nil {
		return es[0]
	}
	return nil
}

func (p *proc) keepTail() {
	if c := p.n.count.SnapshotsInstalled; c != p.installed {
		p.installed = c
		clear(p.tail)
	}
	for i := p.n.raft.last(); i > max(p.applied, p.n.raft.prevIndex); i-- {
		e := p.entry(i)
		if p.tail[i] == e {
			break
		}
		p.tail[i] = e
	}
}

// stateOf hashes what a snapshot of a node would hold.
func stateOf(n *node) uint64 {
	v := n.store.open()
	defer v.close()
	h := fnv.New64a()
	_ = v.writeTo(h)
	return h.Sum64()
}

func (s *sim) compareState(p *proc) {
	h := stateOf(p.n)
	if other, ok := s.states[p.applied]; ok && other != h {
		s.failf("I5: %v has another state at index %d than others had", p, p.applied)
	} else if ok {
		s.count["states compared"]++
	}
	s.states[p.applied] = h
}

// oracle is the history that is committed, and what it means.
type oracle struct {
	entries  []*raftpb.Entry // [0]: nil; [1]: made by bootstrap
	conf     *raftpb.ConfState
	last     map[uint64]uint64 // by proposer
	version  uint64
	keys     map[string][]change
	versions map[uint64]change
}

// change is what a write did to a key.
type change struct {
	key     string
	value   string
	present bool // the key, thereafter
	found   bool // the key, before
	version uint64
	at      int64 // when it was first applied, as calls are ordered
	op      *op   // whose it was, if that is known
}

// observe learns which entries a node has applied.
func (s *sim) observe(p *proc, from, to uint64) {
	o := &s.oracle
	for i := from; i <= to; i++ {
		e := p.tail[i]
		delete(p.tail, i)
		switch {
		case i < uint64(len(o.entries)):
			if was := o.entries[i]; e != nil && was != nil && (was.GetTerm() != e.GetTerm() || was.GetType() != e.GetType() || !bytes.Equal(was.GetData(), e.GetData())) {
				s.failf("I4: %v has applied entry %d as %s, it was %s", p, i, entryText(e), entryText(was))
			}
		case e == nil && i > 1:
			s.failf("the simulator has not seen entry %d before %v has applied and compacted it", i, p)
		case e == nil:
			*o = oracle{entries: []*raftpb.Entry{nil, nil}, conf: p.n.store.conf, last: map[uint64]uint64{}, keys: map[string][]change{}, versions: map[uint64]change{}}
		default:
			o.entries = append(o.entries, proto.CloneOf(e))
			s.commit(e)
		}
	}
}

func entryText(e *raftpb.Entry) string {
	return fmt.Sprintf("%v of term %d with %d bytes", e.GetType(), e.GetTerm(), len(e.GetData()))
}

// commit applies an entry to the oracle.
func (s *sim) commit(e *raftpb.Entry) {
	o := &s.oracle
	s.count["entries"]++
	if e.GetType() != raftpb.EntryNormal {
		cc, _, err := decodeConfChange(e)
		if err != nil {
			s.failf("entry %d: %v", e.GetIndex(), err)
		}
		if cs, err := tryConfChange(o.conf, cc); err == nil {
			o.conf = cs
			s.count["changes of membership"]++
		} else {
			s.count["changes of membership skipped"]++
		}
		return
	}
	var b kvpb.Batch
	if err := proto.Unmarshal(e.GetData(), &b); err != nil {
		s.failf("entry %d: %v", e.GetIndex(), err)
	}
	if len(b.Writes) == 0 {
		return
	}
	if !slices.Contains(confIDs(o.conf), b.Proposer) || b.Sequence <= o.last[b.Proposer] {
		s.count["batches skipped"]++
		return
	}
	o.last[b.Proposer] = b.Sequence
	for _, w := range b.Writes {
		o.version++
		c := change{key: w.GetDelete().GetKey(), version: o.version, at: s.tock()}
		if set := w.GetSet(); set != nil {
			c.key, c.value, c.present = set.Key, string(set.Value), true
			op := s.values[c.value]
			if op == nil || op.key != c.key || op.committed != 0 {
				s.failf("I2: entry %d sets %q to %q, which nobody wrote, or again", e.GetIndex(), c.key, c.value)
			}
			op.committed, c.op = c.version, op
		}
		if h := o.keys[c.key]; len(h) > 0 {
			c.found = h[len(h)-1].present
		}
		o.keys[c.key] = append(o.keys[c.key], c)
		o.versions[c.version] = c
		s.count["writes committed"]++
	}
}

// simPeer is a process's way to a peer, as peer in network.go.
type simPeer struct {
	raftID uint64
	node   *kvpb.Node
	life   uint64 // 0: no stream
	stream *simStream
	ended  bool
}

// simStream carries messages from one process to another.
type simStream struct {
	from, to *proc
	peer     *simPeer
	hello    *kvpb.Hello
	queued   int
	last     int64 // when its last message arrives: order is kept
	closed   bool  // at the receiver
}

// setMembers implements transport.
func (p *proc) setMembers(clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64) {
	p.members = members
	for _, id := range slices.Sorted(maps.Keys(p.peers)) {
		peer := p.peers[id]
		if m := members[id]; m != nil && m.Address != peer.node.Address || m == nil && p.inbound[id] == nil || slices.Contains(removed, id) {
			p.endPeer(peer)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.inbound)) {
		st := p.inbound[id]
		if slices.Contains(removed, id) || st.hello.To.RaftId != raftID || !sameCluster(clusterID, members, st.hello) {
			p.s.after(0, nil, st.breakBoth)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(members)) {
		if p.peers[id] == nil && id != raftID {
			p.addPeer(id, members[id])
		}
	}
}

func (p *proc) addPeer(raftID uint64, node *kvpb.Node) {
	peer := &simPeer{raftID: raftID, node: node}
	p.peers[raftID] = peer
	p.s.after(p.s.latency(), p, func() { p.dial(peer) })
}

// endPeer gives a peer up for good.
func (p *proc) endPeer(peer *simPeer) {
	delete(p.peers, peer.raftID)
	peer.ended, peer.life = true, 0
	if st := peer.stream; st != nil {
		p.s.after(p.s.latency(), nil, st.close)
	}
	for _, t := range slices.Clone(p.sending) {
		if t.peer == peer {
			p.s.after(0, nil, func() { t.end(errors.New("the peer was given up")) })
		}
	}
	p.n.peerDown(peer.raftID, true, errors.New("the peer was given up"))
	p.s.after(0, p, p.wake)
}

// latency draws how long something takes on the network.
func (s *sim) latency() float64 {
	l := s.expo(s.cfg.latency)
	if !s.calm && (s.chance(s.cfg.spike) || s.chance(s.slowNow)) {
		l *= 20
	}
	return l
}

func (s *sim) isCut(from, to *site) bool { return !s.calm && s.cut[from.i][to.i] > 0 }

func (s *sim) siteOf(node *kvpb.Node) *site {
	return s.sites[slices.IndexFunc(s.sites, func(st *site) bool { return st.node.Address == node.Address })]
}

// at makes f happen at a process, later if it is stopped, and otherwise says
// that it has died.
func (s *sim) at(p *proc, f func()) bool {
	if p == nil || p.dead {
		return false
	}
	if p.paused {
		p.held = append(p.held, &event{p: p, f: f})
		return true
	}
	f()
	return true
}

// dial says hello to whoever is at a peer's address.
func (p *proc) dial(peer *simPeer) {
	s := p.s
	to := s.siteOf(peer.node)
	again := func(ticks float64) { s.after(ticks, p, func() { p.dial(peer) }) }
	if peer.ended || peer.stream != nil {
		return
	}
	if to.cur == nil || s.isCut(p.site, to) || s.isCut(to, p.site) {
		again(5 + 15*s.rng.Float64())
		return
	}
	st := &simStream{from: p, to: to.cur, peer: peer, hello: p.n.hello()}
	st.hello.To = &kvpb.Peer{Node: peer.node, RaftId: peer.raftID}
	peer.stream = st
	st.to.hellos = append(st.to.hellos, st)
	s.after(s.latency(), nil, func() {
		if s.isCut(p.site, to) || !s.at(st.to, st.greet) {
			st.breakBoth()
		}
	})
}

// greet answers a hello at its receiver.
func (st *simStream) greet() {
	p, s := st.to, st.to.s
	p.hellos = slices.DeleteFunc(p.hellos, func(o *simStream) bool { return o == st })
	w := p.n.accept(st.hello)
	from := st.hello.From
	if w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED {
		if p.peers[from.RaftId] == nil {
			p.addPeer(from.RaftId, from.Node)
		}
		if old := p.inbound[from.RaftId]; old != nil && old != st {
			old.closed = true
			s.after(s.latency(), nil, old.broken)
		}
		p.inbound[from.RaftId] = st
		p.n.peerUp(from.RaftId, from.Life, false)
		p.wake()
	}
	s.after(s.latency(), nil, func() {
		if s.isCut(p.site, st.from.site) || !s.at(st.from, func() { st.welcome(w) }) {
			st.breakBoth()
		}
	})
}

// welcome takes the answer at the dialer.
func (st *simStream) welcome(w *kvpb.Welcome) {
	p, peer := st.from, st.peer
	if peer.stream != st || peer.ended {
		st.close()
		return
	}
	if w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || w.Peer.RaftId != peer.raftID {
		p.s.trace("%v is refused by %s: %v", p, p.s.name(w.Peer.RaftId), w.Verdict)
		p.s.count["refused"]++
		p.n.refused(st.hello.From.RaftId, peer.raftID, w)
		st.close()
		st.broken()
		return
	}
	p.s.trace("%v has a stream to %v", p, st.to)
	p.s.count["streams"]++
	peer.life = w.Peer.Life
	p.n.peerUp(peer.raftID, w.Peer.Life, true)
	if st.closed { // it was replaced meanwhile
		st.broken()
	}
	p.wake()
}

// broken tells the dialer of its stream's end; it will dial again.
func (st *simStream) broken() {
	st.from.s.at(st.from, func() {
		p, peer := st.from, st.peer
		if peer.stream != st {
			return
		}
		peer.stream, peer.life = nil, 0
		if !peer.ended {
			p.n.peerDown(peer.raftID, true, errors.New("the stream ended"))
			p.s.after(5+15*p.s.rng.Float64(), p, func() { p.dial(peer) })
			p.wake()
		}
	})
}

// close tells the receiver of the stream's end.
func (st *simStream) close() {
	st.to.s.at(st.to, func() {
		p, id := st.to, st.hello.From.RaftId
		st.closed = true
		if p.inbound[id] != st {
			return
		}
		delete(p.inbound, id)
		if peer := p.peers[id]; peer != nil && p.members[id] == nil {
			p.endPeer(peer)
		}
	})
}

// breakBoth ends a stream; either end notices in its own time.
func (st *simStream) breakBoth() {
	s := st.from.s
	s.after(s.latency(), nil, st.close)
	s.after(s.latency(), nil, st.broken)
}

// send implements transport.
func (p *proc) send(to, life uint64, ms []*raftpb.Message) {
	s, peer := p.s, p.peers[to]
	if peer == nil || peer.life != life || peer.stream == nil {
		s.count["messages unsent"] += len(ms)
		return
	}
	st := peer.stream
	if st.queued+len(ms) > s.cfg.queue {
		s.count["queues full"]++
		p.n.peerDown(to, false, nil)
		s.after(0, p, p.wake)
		return
	}
	for _, m := range ms {
		s.count["messages"]++
		if s.isCut(p.site, st.to.site) || !s.calm && s.chance(max(s.cfg.loss, s.lossNow)) {
			s.count["messages lost"]++
			continue
		}
		st.transmit(m)
		if !s.calm && s.chance(s.cfg.dup) {
			s.count["messages duplicated"]++
			st.transmit(m)
		}
	}
}

func (st *simStream) transmit(m *raftpb.Message) {
	s := st.from.s
	st.queued++
	at := s.now + int64(s.latency()*simTick)
	if !s.cfg.reorder || s.calm {
		at = max(at, st.last+1)
		st.last = at
	}
	s.schedule(at, nil, func() {
		st.queued--
		to := st.to
		if s.cfg.crossLife && to.dead && to.site.cur != nil {
			to = to.site.cur
		}
		if s.isCut(st.from.site, st.to.site) || !s.at(to, func() { st.deliver(to, m) }) {
			s.count["messages lost"]++
		}
	})
}

// deliver hands a message over, through its wire format.
func (st *simStream) deliver(to *proc, m *raftpb.Message) {
	s := to.s
	if st.closed && !s.chance(s.cfg.late) {
		s.count["messages lost"]++
		return
	}
	h := st.hello
	if to != st.to {
		h = &kvpb.Hello{ClusterId: h.ClusterId, From: h.From, To: &kvpb.Peer{Node: h.To.Node, RaftId: to.raftID}}
		s.count["messages across lives"]++
	}
	b, err := proto.Marshal(&kvpb.StreamRequest{Messages: toWire([]*raftpb.Message{m})})
	var req kvpb.StreamRequest
	if err = cmp.Or(err, proto.Unmarshal(b, &req)); err != nil {
		s.failf("the message %s cannot be sent: %v", messageText{m}, err)
	}
	s.trace("%v → %v %s", st.from, to, messageText{m})
	_ = to.n.receiveMessages(context.Background(), fromWire(req.Messages, h))
	to.wake()
}

// messageText prints a message.
type messageText struct{ *raftpb.Message }

func (m messageText) String() string {
	b := fmt.Sprintf("%s t%d", m.GetType(), m.GetTerm())
	if m.GetIndex() > 0 || len(m.GetEntries()) > 0 {
		b += fmt.Sprintf(" at %d/%d +%d", m.GetIndex(), m.GetLogTerm(), len(m.GetEntries()))
	}
	if m.GetCommit() > 0 {
		b += fmt.Sprintf(" commit %d", m.GetCommit())
	}
	if m.GetReject() {
		b += fmt.Sprintf(" rejected, hint %d", m.GetRejectHint())
	}
	if len(m.GetContext()) > 0 {
		b += fmt.Sprintf(" ctx %x", m.GetContext())
	}
	return b
}

// transfer is a snapshot on its way.
type transfer struct {
	from, to *proc
	peer     *simPeer
	life     uint64
	term     uint64
	hello    *kvpb.Hello
	v        *view
	data     []byte
	ended    bool
	replaced bool
}

// sendSnapshot implements transport.
func (p *proc) sendSnapshot(to, life, term uint64, v *view) {
	s, peer := p.s, p.peers[to]
	if peer == nil {
		p.n.snapshotSent(to, v, errors.New("no stream to the peer"))
		s.after(0, p, p.wake)
		return
	}
	t := &transfer{from: p, peer: peer, life: life, term: term, v: v}
	p.sending = append(p.sending, t)
	s.count["snapshots"]++
	s.after(s.latency(), p, t.start)
}

func bytesOf(v *view) []byte {
	var b bytes.Buffer
	_ = v.writeTo(&b)
	return b.Bytes()
}

// start dials and sends the first chunk.
func (t *transfer) start() {
	p, s := t.from, t.from.s
	st := s.siteOf(t.peer.node)
	t.to, t.data = st.cur, bytesOf(t.v)
	t.hello = p.n.hello()
	t.hello.To = &kvpb.Peer{Node: t.peer.node, RaftId: t.peer.raftID, Life: t.life}
	s.after(500, nil, func() { t.end(errors.New("the receiver is silent")) })
	if st.cur == nil || s.isCut(p.site, st) || s.isCut(st, p.site) {
		s.after(10+s.expo(50), nil, func() { t.end(errors.New("the receiver cannot be reached")) })
		return
	}
	s.after(s.latency(), nil, func() {
		if s.isCut(p.site, st) || !s.at(t.to, t.arrive) {
			t.lose("on its way")
		}
	})
}

// lose has the sender learn, some time, that its snapshot was lost.
func (t *transfer) lose(why string) {
	s := t.from.s
	s.after(s.expo(20), nil, func() { t.end(errors.New("lost " + why)) })
}

// arrive is the first chunk at the receiver; the rest takes some time.
func (t *transfer) arrive() {
	p, s := t.to, t.to.s
	if w := p.n.accept(t.hello); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || t.hello.To.Life != w.Peer.Life {
		t.lose("as it was refused")
		return
	}
	from := t.hello.From.RaftId
	if old := p.receiving[from]; old != nil {
		old.replaced = true
		old.lose("to a newer one")
	}
	p.receiving[from] = t
	if !s.calm && s.chance(s.cfg.snapshotDies) {
		s.count["snapshots lost"]++
		if _, err := readSnapshot(bytes.NewReader(t.data[:s.rng.IntN(len(t.data))])); err == nil {
			s.failf("half of a snapshot was taken for a whole")
		}
		t.lose("half way")
		return
	}
	s.after(s.latency()*10, nil, func() {
		if s.isCut(t.from.site, p.site) || !s.at(p, t.install) {
			t.lose("in its middle")
		}
	})
}

// install is the last chunk at the receiver.
func (t *transfer) install() {
	p, s := t.to, t.to.s
	if t.replaced || t.ended || t.from.dead {
		return
	}
	if !bytes.Equal(t.data, bytesOf(t.v)) {
		s.failf("a view of %v has changed while it was open", t.from)
	}
	st, err := readSnapshot(bytes.NewReader(t.data))
	if err != nil {
		s.failf("a snapshot of %v cannot be read: %v", t.from, err)
	}
	if s.cfg.forget {
		clear(st.proposers)
	}
	delete(p.receiving, t.hello.From.RaftId)
	p.n.in.event(func() {
		err := p.n.stepSnapshot(t.hello, t.term, st)
		s.trace("%v → %v snapshot of %d, term %d: %v", t.from, p, t.v.header.Index, t.term, err)
		s.after(s.latency(), nil, func() {
			if s.isCut(p.site, t.from.site) {
				t.lose("the answer")
			} else {
				t.end(err)
			}
		})
	})
	p.wake()
}

// end tells the sender of its snapshot's fate.
func (t *transfer) end(err error) {
	t.from.s.at(t.from, func() {
		p := t.from
		if t.ended {
			return
		}
		t.ended = true
		p.sending = slices.DeleteFunc(p.sending, func(o *transfer) bool { return o == t })
		if err == nil {
			p.s.count["snapshots sent"]++
		}
		p.n.snapshotSent(t.peer.raftID, t.v, err)
		p.wake()
	})
}

// caller makes one call after another.
type caller struct {
	s  *sim
	id int
	n  int
	op *op // the one that runs
}

// op is a call of a client.
type op struct {
	client    int
	kind      string // set, delete, get
	key       string
	value     string
	c         *call
	p         *proc
	begun     int64
	ended     int64  // 0: it was given up, or its outcome is not known
	version   uint64 // of the write, or of what was read
	found     bool
	atLeast   uint64 // version of the key that was known when it began
	committed uint64 // version of the write, as the oracle knows it
	failed    bool   // nothing was or will be applied
}

func (o *op) String() string {
	return fmt.Sprintf("client %d: %s %s %.12s", o.client, o.kind, o.key, o.value)
}

// act makes a client's next call.
func (c *caller) act() {
	s := c.s
	p := s.anyProc()
	if p == nil || s.quiet {
		s.after(s.expo(s.cfg.think), nil, c.act)
		return
	}
	c.n++
	o := &op{client: c.id, p: p, key: fmt.Sprintf("k%d", s.rng.IntN(s.cfg.keys)), begun: s.tock()}
	o.atLeast = s.seen[o.key]
	w := &kvpb.Write{}
	switch k := s.rng.IntN(10); {
	case k < 5:
		o.kind, o.value = "set", fmt.Sprintf("%d.%d.%s", c.id, c.n, strings.Repeat(".", s.rng.IntN(s.cfg.valueBytes+1)))
		w.Operation = &kvpb.Write_Set{Set: &kvpb.SetRequest{Key: o.key, Value: []byte(o.value)}}
		s.values[o.value] = o
	case k < 6:
		o.kind = "delete"
		w.Operation = &kvpb.Write_Delete{Delete: &kvpb.DeleteRequest{Key: o.key}}
	default:
		o.kind = "get"
		s.readLocal(p, o.key)
	}
	o.c = &call{done: make(chan outcome, 1)}
	if o.kind != "get" {
		var err error
		if o.c.record, err = encodeWrite(w); err != nil {
			s.failf("%v: %v", o, err)
		}
	}
	c.op = o
	s.history = append(s.history, o)
	s.count["calls"]++
	s.after(s.expo(s.cfg.timeout)+1, nil, func() { c.timeout(o) })
	if o.kind == "get" && s.cfg.readNow {
		s.finishRead(o)
		return
	}
	if err := p.n.in.call(o.c); err != nil {
		c.finish(o, outcome{err: err})
		return
	}
	p.calls = append(p.calls, o)
	p.wake()
}

// tock orders the begins and ends of calls.
func (s *sim) tock() int64 {
	s.clock++
	return s.clock
}

// poll looks which calls have ended at a process.
func (p *proc) poll() {
	if len(p.calls) == 0 {
		return
	}
	calls := p.calls
	p.calls = nil
	for _, o := range calls {
		select {
		case out := <-o.c.done:
			p.s.clients[o.client].finish(o, out)
		default:
			if p.s.cfg.ackEarly && o.kind == "set" && o.c.state.Load() == callProposed {
				o.ended, o.version = p.s.tock(), 0
				p.s.clients[o.client].rest(o)
				continue
			}
			p.calls = append(p.calls, o)
		}
	}
}

// timeout gives a call up, as server.call does.
func (c *caller) timeout(o *op) {
	if c.op != o {
		return
	}
	o.failed = o.kind == "get" || o.c.state.CompareAndSwap(callQueued, callGivenUp)
	c.s.count["calls given up"]++
	c.rest(o)
}

// rest has the client make its next call some time, if this one was its last.
func (c *caller) rest(o *op) {
	if c.op == o {
		c.op = nil
		c.s.after(c.s.expo(c.s.cfg.think), nil, c.act)
	}
}

// finish takes the answer to a call.
func (c *caller) finish(o *op, out outcome) {
	s := c.s
	if c.op != o {
		return // given up
	}
	switch {
	case errors.Is(out.err, errOutcomeUnknown):
		s.count["outcomes unknown"]++
	case out.err != nil:
		s.count["calls refused"]++
		o.failed = true
	case o.kind == "get":
		if s.rng.IntN(4) > 0 {
			s.finishRead(o)
		} else { // whoever waited wakes late
			s.after(s.expo(1), nil, func() {
				if c.op == o && !o.p.dead {
					s.finishRead(o)
				}
			})
		}
		return
	default:
		s.finishWrite(o, out.result)
	}
	c.rest(o)
}

// finishWrite compares what was acknowledged with what is committed.
func (s *sim) finishWrite(o *op, r result) {
	o.ended, o.version, o.found = s.tock(), r.version, r.found
	ch := s.oracle.versions[r.version]
	if r.version > s.oracle.version {
		s.count["acknowledged before seen"]++ // by a node that then left: checked at the end
	} else if ch.key != o.key || ch.value != o.value || ch.present != (o.kind == "set") || ch.found != r.found {
		s.failf("I2: %v was acknowledged with version %d, found %v; committed is %+v", o, r.version, r.found, ch)
	}
	s.seen[o.key] = max(s.seen[o.key], r.version)
	s.count["writes acknowledged"]++
}

// finishRead reads, and checks that the key was in this state at some moment
// since the read began, and after all that anybody knew then.
func (s *sim) finishRead(o *op) {
	defer s.clients[o.client].rest(o)
	it, ok, err := o.p.n.store.get(o.key)
	if err != nil {
		o.failed = true
		return
	}
	o.ended, o.version, o.found, o.value = s.tock(), it.version, ok, string(it.value)
	h := s.oracle.keys[o.key]
	for i := len(h) - 1; i >= -1; i-- {
		if i >= 0 && (h[i].present != ok || ok && (h[i].version != it.version || h[i].value != o.value)) || i < 0 && ok {
			continue
		}
		if i+1 < len(h) && h[i+1].version <= o.atLeast {
			break
		}
		s.seen[o.key] = max(s.seen[o.key], it.version)
		s.count["reads"]++
		return
	}
	s.failf("I1: %v through %v is %.12q (%v) of version %d; when it began, version %d of the key was known", o, o.p, it.value, ok, it.version, o.atLeast)
}

// readLocal reads without asking anybody: something committed, and on one node
// nothing older than before.
func (s *sim) readLocal(p *proc, key string) {
	it, ok, err := p.n.store.get(key)
	if err != nil || !ok {
		return
	}
	if ch := s.oracle.versions[it.version]; ch.key != key || ch.value != string(it.value) || it.version < p.version[key] {
		s.failf("I2: a local read of %s at %v is %.12q of version %d, committed is %+v; before it was version %d", key, p, it.value, it.version, ch, p.version[key])
	}
	p.version[key] = it.version
	s.count["local reads"]++
}

// admin is an operator's request: f is called in the loop of whoever leads
// until it returns true or an error, as server.awaitChange does.
type admin struct {
	what     string
	f        func(n *node) (bool, error)
	then     func(error)
	deadline int64
	p        *proc
	c        *condition
	cancel   func()
}

var errNotNow = errors.New("not now")

// request starts an operator's request.
func (s *sim) request(what string, ticks float64, f func(n *node) (bool, error), then func(error)) {
	s.trace("an operator wants to %s", what)
	s.count["requests"]++
	s.admins = append(s.admins, &admin{what: what, f: f, then: then, deadline: s.now + int64(ticks*simTick)})
}

// operate follows the operators' requests.
func (s *sim) operate() {
	s.after(1, nil, s.operate)
	for _, a := range slices.Clone(s.admins) {
		done, err := s.pursue(a)
		if !done && s.now > a.deadline {
			done, err = true, context.DeadlineExceeded
		}
		if !done {
			continue
		}
		if a.cancel != nil {
			a.cancel()
		}
		s.admins = slices.DeleteFunc(s.admins, func(o *admin) bool { return o == a })
		if err == nil {
			s.count["requests done"]++
		}
		s.trace("the request to %s ends: %v", a.what, err)
		a.then(err)
	}
}

// pursue looks after a request.
func (s *sim) pursue(a *admin) (done bool, err error) {
	if a.c != nil {
		select {
		case err := <-a.c.done:
			if err == nil || !errors.Is(err, errNotLeader) && !errors.Is(err, errStopping) && !errors.Is(err, errNotInitialized) {
				return true, err
			}
		default:
			if !a.p.dead {
				return false, nil
			}
		}
		a.cancel()
		a.c = nil
	}
	var leaders []*proc
	for _, p := range s.alive() {
		if p.n.pub.Load().leading && !p.paused {
			leaders = append(leaders, p)
		}
	}
	if len(leaders) == 0 {
		return false, nil
	}
	a.p = leaders[s.rng.IntN(len(leaders))]
	n := a.p.n
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	a.c = &condition{ctx: ctx, done: make(chan error, 1), f: func() (bool, error) {
		if !n.leads() {
			return false, errNotLeader
		}
		return a.f(n)
	}}
	n.in.event(func() { n.conds = append(n.conds, a.c) })
	a.p.wake()
	return false, nil
}

// addLearner is server.addLearner.
func (s *sim) addLearner(st *site, then func(error)) {
	var raftID uint64
	s.request(fmt.Sprintf("add learner %d", st.node.Id), 150, func(n *node) (bool, error) {
		if raftID == 0 || n.store.members[raftID] == nil && s.rng.IntN(50) == 0 { // he asks once, or again
			if from := s.sites[n.self.Id-1]; st.cur == nil || st.cur.paused || s.isCut(from, st) || s.isCut(st, from) {
				return false, errNotNow
			}
			raftID = st.cur.n.accept(n.hello()).Peer.RaftId
			st.cur.wake()
		}
		ok, err := n.stepLearner(raftID, st.node)
		if err == errPastLife { // he asks again
			raftID, err = 0, nil
		}
		return ok, err
	}, then)
}

// changeMembership is server.changeMembership.
func (s *sim) changeMembership(req *kvpb.ChangeMembershipRequest, then func(error)) {
	s.request(fmt.Sprintf("have voters %v, retain %v, without %v", req.Members, req.Retain, req.Remove), 150, func(n *node) (bool, error) {
		if want, err := n.votersToBe(req); err == nil && !s.cfg.reckless && !isJoint(n.store.conf) && !s.remain(want, nil) {
			return false, errNotNow // an operator would not
		}
		return n.stepMembership(req)
	}, then)
}

// transfer is server.transferLeader.
func (s *sim) transferLeader(nodeID uint64) {
	var start uint64
	s.request(fmt.Sprintf("have %d lead", nodeID), 100, func(n *node) (bool, error) { return n.stepTransfer(nodeID, &start) }, func(error) {})
}

// boot makes the cluster, as server.Init does: no faults before that is done.
func (s *sim) boot() {
	p := s.sites[0].cur
	p.n.in.event(func() {
		if _, err := p.n.bootstrap(); err != nil {
			s.failf("bootstrap: %v", err)
		}
	})
	p.turn(0)
	s.operate()
	for i := range s.cfg.clients {
		c := &caller{s: s, id: i}
		s.clients = append(s.clients, c)
		s.after(s.expo(10), nil, c.act)
	}
	req := &kvpb.ChangeMembershipRequest{}
	for i := range s.cfg.voters {
		req.Members = append(req.Members, uint64(i+1))
	}
	var add func(i int)
	change := func() {
		s.changeMembership(req, func(err error) {
			if err != nil {
				add(1)
				return
			}
			s.begin()
		})
	}
	add = func(i int) {
		if i >= s.cfg.voters {
			change()
			return
		}
		s.addLearner(s.sites[i], func(err error) {
			if err != nil {
				i--
			}
			add(i + 1)
		})
	}
	add(1)
}

// begin lets faults happen, and operators have wishes.
func (s *sim) begin() {
	if s.running {
		return
	}
	s.running = true
	s.trace("the cluster is made")
	if len(s.cfg.faults) > 0 {
		s.after(s.expo(s.cfg.faultEvery), nil, s.fault)
	}
	s.after(s.expo(s.cfg.adminEvery), nil, s.wish)
}

// wish has an operator ask for something.
func (s *sim) wish() {
	if s.calm {
		return
	}
	s.after(s.expo(s.cfg.adminEvery), nil, s.wish)
	if len(s.admins) > 1 {
		return
	}
	st := s.sites[s.rng.IntN(len(s.sites))]
	switch s.rng.IntN(5) {
	case 0:
		s.transferLeader(st.node.Id)
	case 1, 2:
		s.addLearner(st, func(error) {})
	default:
		req := &kvpb.ChangeMembershipRequest{Retain: s.rng.IntN(2) == 0}
		some := s.anyProc()
		for _, st := range s.sites {
			if some == nil || len(some.n.store.raftIDsOf(st.node.Id)) == 0 && s.rng.IntN(10) > 0 {
				continue
			}
			if s.rng.IntN(3) > 0 {
				req.Members = append(req.Members, st.node.Id)
			} else if s.rng.IntN(4) == 0 {
				req.Remove = append(req.Remove, st.node.Id)
			}
		}
		if s.rng.IntN(4) == 0 { // all but some
			req.Remove, req.Members = append(req.Remove, st.node.Id), nil
			slices.Sort(req.Remove)
			req.Remove = slices.Compact(req.Remove)
		}
		if len(req.Members) > 0 || len(req.Remove) > 0 {
			s.changeMembership(req, func(error) {})
		}
	}
}

// remain reports whether a majority of voters still has its memory once a
// process, if any, has lost it.
func (s *sim) remain(voters []uint64, without *proc) bool {
	n := 0
	for _, p := range s.alive() {
		if p != without && p.n.rn != nil && slices.Contains(voters, p.n.raftID) {
			n++
		}
	}
	return len(voters) == 0 || n > len(voters)/2
}

// mayLose reports whether a process may lose its memory: a majority remains in
// both halves of every configuration that a member has applied, or will if the
// changes in its log are committed. Nodes that have not healed count as lost.
func (s *sim) mayLose(p *proc) bool {
	newest := &store{}
	for _, q := range s.alive() {
		if q.n.rn != nil && q.n.store.index > newest.index {
			newest = q.n.store
		}
	}
	for _, q := range s.alive() {
		if q.n.rn == nil || newest.members[q.n.raftID] == nil {
			continue
		}
		cs := q.n.store.conf
		for i := q.n.store.index; i <= q.n.raft.last(); i++ {
			if i > q.n.store.index {
				e := q.entry(i)
				if e.GetType() == raftpb.EntryNormal {
					continue
				}
				if cc, _, err := decodeConfChange(e); err == nil {
					if next, err := tryConfChange(cs, cc); err == nil {
						cs = next
					}
				}
			}
			if !s.remain(cs.GetVoters(), p) || !s.remain(cs.GetVotersOutgoing(), p) {
				return false
			}
		}
	}
	return true
}

// fault makes something go wrong.
func (s *sim) fault() {
	if s.calm {
		return
	}
	s.after(s.expo(s.cfg.faultEvery), nil, s.fault)
	kind := s.cfg.faults[s.rng.IntN(len(s.cfg.faults))]
	p := s.anyProc()
	if p == nil {
		return
	}
	length := s.expo(s.cfg.outage)
	fired := true
	switch kind {
	case "kill":
		if fired = s.mayLose(p); fired {
			p.die(length)
		}
	case "stop":
		if fired = s.mayLose(p) && !p.paused; fired {
			p.stop(length)
		}
	case "pause":
		if fired = !p.paused; fired {
			s.trace("FAULT: %v is stopped for %.0f ticks", p, length)
			p.paused = true
			s.after(length, nil, p.goOn)
		}
	case "drop":
		if ids := slices.Sorted(maps.Keys(p.peers)); len(ids) > 0 {
			if st := p.peers[ids[s.rng.IntN(len(ids))]].stream; st != nil {
				s.trace("FAULT: the stream from %v to %v breaks", st.from, st.to)
				st.breakBoth()
			}
		}
	case "loss":
		s.trace("FAULT: messages are lost for %.0f ticks", length)
		s.lossNow = .1 + .6*s.rng.Float64()
		s.after(length, nil, func() { s.lossNow = 0 })
	case "slow":
		s.trace("FAULT: the network is slow for %.0f ticks", length)
		s.slowNow = .3
		s.after(length, nil, func() { s.slowNow = 0 })
	case "rate":
		p.rate = .3 + 2*s.rng.Float64()
		s.trace("FAULT: a tick of %v takes %.2f", p, p.rate)
	default:
		s.partition(kind, p.site, length)
	}
	if fired {
		s.count["fault: "+kind]++
	} else {
		s.count["fault not allowed: "+kind]++
	}
}

// partition cuts pairs of sites for a while.
func (s *sim) partition(kind string, one *site, length float64) {
	var pairs [][2]int
	side := make([]bool, len(s.sites))
	for i := range side {
		side[i] = kind == "split" && s.rng.IntN(2) == 0 || kind != "split" && i == one.i
	}
	out, in := true, kind != "one-way"
	if !in {
		out = s.rng.IntN(2) == 0
		in = !out
	}
	for i := range side {
		for j := range side {
			if i != j && (side[i] && !side[j] && out || side[j] && !side[i] && in) && (kind != "one-way" || s.rng.IntN(3) > 0) {
				pairs = append(pairs, [2]int{i, j})
				s.cut[i][j]++
			}
		}
	}
	s.trace("FAULT: nothing gets from → to: %v for %.0f ticks", pairs, length)
	for _, p := range s.alive() {
		for _, id := range slices.Sorted(maps.Keys(p.peers)) {
			st := p.peers[id].stream
			if st != nil && s.isCut(p.site, st.to.site) && s.rng.IntN(2) == 0 {
				s.after(s.expo(20), nil, st.breakBoth) // TCP may notice
			}
		}
	}
	s.after(length, nil, func() {
		s.trace("what was cut is whole: %v", pairs)
		for _, c := range pairs {
			s.cut[c[0]][c[1]]--
		}
	})
}

// die ends a process at once; another starts after some ticks.
func (p *proc) die(length float64) {
	s, st := p.s, p.site
	s.trace("FAULT: %v dies for %.0f ticks", p, length)
	p.dead, st.cur = true, nil
	for _, o := range p.calls {
		s.clients[o.client].rest(o)
	}
	p.calls = nil
	for _, id := range slices.Sorted(maps.Keys(p.peers)) {
		if stream := p.peers[id].stream; stream != nil {
			s.after(s.latency(), nil, stream.close)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.inbound)) {
		s.after(s.latency(), nil, p.inbound[id].broken)
	}
	for _, stream := range p.hellos {
		s.after(s.latency(), nil, stream.broken)
	}
	for _, id := range slices.Sorted(maps.Keys(p.receiving)) {
		p.receiving[id].lose("with its receiver")
	}
	s.after(length, nil, func() {
		if st.cur == nil {
			s.start(st)
		}
	})
}

// stop ends a process as SIGTERM does: it hands leadership over first, if it
// can, and answers all calls.
func (p *proc) stop(length float64) {
	s, n := p.s, p.n
	if n.leads() && n.mayChange() {
		n.in.event(func() { n.handOver(n.store.conf.GetVoters()) })
		p.wake()
	}
	s.after(5, p, func() {
		if s.calm || !s.mayLose(p) {
			return
		}
		n.err = errStopping
		n.in.close()
		p.turn(0)
		n.failAll(errStopping)
		p.poll()
		p.die(length)
	})
}

// goOn continues a stopped process.
func (p *proc) goOn() {
	if p.dead || !p.paused {
		return
	}
	p.paused = false
	p.s.trace("%v goes on", p)
	for i, e := range p.held {
		p.s.schedule(p.s.now+int64(i), nil, func() { p.s.at(p, e.f) })
	}
	p.held = nil
}

// run runs it all. An error is an invariant that did not hold.
func (s *sim) run() (err error) { return s.try(s.all) }

func (s *sim) all() {
	s.boot()
	for s.step < uint64(s.cfg.steps) {
		s.next()
	}
	s.settle()
	s.linearizable()
}

// try makes a failure an error, with all that is needed to find its cause.
func (s *sim) try(f func()) (err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case simFailure:
			err = fmt.Errorf("%s\n%s", string(p), s.tail())
		default:
			err = fmt.Errorf("panic: %v\n%s\n%s", p, debug.Stack(), s.tail())
		}
	}()
	f()
	return nil
}

// settle ends all faults and checks that everything heals (I9).
func (s *sim) settle() {
	s.trace("all faults end")
	s.calm = true
	s.cfg.latency = min(s.cfg.latency, .3)
	for _, st := range s.sites {
		if st.cur == nil {
			s.start(st)
		}
		st.cur.rate = 1
		st.cur.goOn()
	}
	s.begin()
	s.until(settleTicks, s.unsettled)
	s.quiet = true
	s.until(settleTicks, func() string {
		for _, c := range s.clients {
			if c.op != nil {
				return c.op.String() + " has not ended"
			}
		}
		return s.unsettled()
	})
	// A fresh write through any member, and a read of it through all.
	members := s.members()
	o := &op{client: -1, kind: "set", key: "fresh", value: "fresh", begun: s.tock()}
	s.values[o.value] = o
	w, _ := encodeWrite(&kvpb.Write{Operation: &kvpb.Write_Set{Set: &kvpb.SetRequest{Key: o.key, Value: []byte(o.value)}}})
	s.finishWrite(o, s.ask(members[s.rng.IntN(len(members))], w))
	for _, p := range members {
		s.ask(p, nil)
		if it, ok, err := p.n.store.get("fresh"); err != nil || !ok || it.version != o.version {
			s.failf("I9: a fresh read through %v: %v, %v, %v; want version %d", p, it, ok, err, o.version)
		}
	}
	s.until(settleTicks, s.unequal)
}

// until runs until f has nothing to complain about.
func (s *sim) until(ticks float64, f func() string) {
	deadline := s.now + int64(ticks*simTick)
	for next := s.now; ; s.next() {
		if s.now < next {
			continue
		}
		next += 10 * simTick
		if why := f(); why == "" {
			return
		} else if s.now > deadline {
			s.failf("I9: after %v ticks without a fault %s", ticks, why)
		}
	}
}

// ask makes a call that must succeed.
func (s *sim) ask(p *proc, record []byte) (r result) {
	c := &call{record: record, done: make(chan outcome, 1)}
	if err := p.n.in.call(c); err != nil {
		s.failf("I9: %v", err)
	}
	p.wake()
	s.until(settleTicks, func() string {
		select {
		case o := <-c.done:
			if errors.Is(o.err, errNoLeader) { // it was stopped until now: not applied, so once more
				c = &call{record: record, done: make(chan outcome, 1)}
				_ = p.n.in.call(c)
				return "nobody leads"
			}
			if o.err != nil {
				s.failf("I9: a fresh call of %v: %v", p, o.err)
			}
			r = o.result
			return ""
		default:
			return fmt.Sprintf("a fresh call of %v does not end", p)
		}
	})
	return r
}

// members returns the processes that belong to the cluster.
func (s *sim) members() []*proc {
	return slices.DeleteFunc(s.alive(), func(p *proc) bool { return p.n.rn == nil })
}

// unsettled says what is not as it shall be without faults; empty: all is.
func (s *sim) unsettled() string {
	var leader *proc
	for _, p := range s.alive() {
		if p.n.rn != nil && p.n.role == raft.StateLeader {
			if leader != nil {
				return fmt.Sprintf("%v and %v lead", leader, p)
			}
			leader = p
		}
	}
	if leader == nil || !leader.n.leads() {
		return "nobody leads: " + s.overview()
	}
	members := leader.n.store.members
	for _, p := range s.alive() {
		if p.n.rn == nil {
			continue
		}
		if !proto.Equal(members[p.n.raftID], p.site.node) {
			return fmt.Sprintf("%v is in the cluster, but no member of it: %s", p, s.overview())
		}
		if why := p.n.whyUnhealthy(); why != "" {
			return fmt.Sprintf("%v is unhealthy, %s: %s", p, why, s.overview())
		}
	}
	if n := len(s.members()); n != len(members) || isJoint(leader.n.store.conf) || len(s.admins) > 0 {
		return fmt.Sprintf("there are %d members, %d of them alive, requests %v: %s", len(members), n, len(s.admins), s.overview())
	}
	return ""
}

// overview describes all nodes.
func (s *sim) overview() string {
	var b strings.Builder
	for _, p := range s.alive() {
		n := p.n
		if n.rn == nil {
			fmt.Fprintf(&b, "\n  %v in no cluster", p)
			continue
		}
		st := n.rn.BasicStatus()
		names := func(ids []uint64) (out []string) {
			for _, id := range ids {
				out = append(out, s.name(id))
			}
			return out
		}
		cs := n.store.conf
		fmt.Fprintf(&b, "\n  %v %v term %d lead %s applied %d commit %d log %d-%d; voters %v outgoing %v learners %v next %v; connected", p, st.RaftState, st.GetTerm(), s.name(st.Lead),
			n.store.index, st.GetCommit(), n.raft.prevIndex+1, n.raft.last(), names(cs.GetVoters()), names(cs.GetVotersOutgoing()), names(cs.GetLearners()), names(cs.GetLearnersNext()))
		fmt.Fprintf(&b, " %v", names(slices.Sorted(maps.Keys(n.connected))))
	}
	return b.String()
}

// unequal says in what the members differ, from each other and the oracle.
func (s *sim) unequal() string {
	o := &s.oracle
	for _, p := range s.members() {
		st := p.n.store
		if st.index != uint64(len(o.entries)-1) {
			return fmt.Sprintf("%v has applied %d of %d", p, st.index, len(o.entries)-1)
		}
		s.compareState(p)
		present := uint64(0)
		for _, key := range slices.Sorted(maps.Keys(o.keys)) {
			want := o.keys[key][len(o.keys[key])-1]
			it, ok, err := st.get(key)
			if err != nil || ok != want.present || ok && (it.version != want.version || string(it.value) != want.value) {
				s.failf("I5: %s at %v is %v, %v, %v; want %+v", key, p, it, ok, err, want)
			}
			if ok {
				present++
			}
		}
		if keys, _ := st.size(); keys != present || st.version != o.version || o.conf.Equivalent(st.conf) != nil {
			s.failf("I5: %v has %d keys, version %d, %v; want %d, %d, %v", p, keys, st.version, st.conf, present, o.version, o.conf)
		}
	}
	return ""
}

// keyState is the model of a key.
type keyState struct {
	present bool
	value   string
	version uint64 // of the last write
}

// linearizable checks the history of each key, by porcupine. Whether a write
// without an outcome took effect, and by when, the oracle knows.
func (s *sim) linearizable() {
	s.ownDeletes()
	histories := map[string][]porcupine.Operation{}
	for _, o := range s.history {
		end := o.ended
		switch {
		case o.kind != "get" && o.committed == 0 && end != 0:
			s.failf("I2: %v was acknowledged, but never committed", o)
		case o.kind == "set" && end != 0 && !s.cfg.ackEarly && (o.version != o.committed || o.found != s.oracle.versions[o.committed].found):
			s.failf("I2: %v was acknowledged with version %d, but is version %d", o, o.version, o.committed)
		case o.kind == "set" && o.committed != 0 && o.failed:
			s.failf("%v was refused, but committed", o)
		case o.kind == "get" && end == 0, o.kind != "get" && o.committed == 0:
			continue
		case o.kind != "get":
			ch := s.oracle.versions[o.committed]
			end = cmp.Or(end, ch.at)
			o.version, o.found = ch.version, ch.found
		}
		histories[o.key] = append(histories[o.key], porcupine.Operation{ClientId: o.client, Input: o, Call: o.begun, Return: end})
		s.count["calls checked"]++
	}
	model := porcupine.Model{Init: func() any { return keyState{} }, Step: stepKey}
	for _, key := range slices.Sorted(maps.Keys(histories)) {
		if !porcupine.CheckOperations(model, histories[key]) {
			s.failf("I1: the history of %s is not linearizable", key)
		}
	}
}

// ownDeletes finds a call for each committed delete: deletes are all alike, so
// one that nobody was told of is given to the first call that may have been it.
func (s *sim) ownDeletes() {
	unknown := map[string][]*op{}
	for _, o := range s.history {
		if o.kind == "delete" && o.ended != 0 {
			ch := s.oracle.versions[o.version]
			if ch.key != o.key || ch.present || ch.found != o.found {
				s.failf("I2: %v was acknowledged with version %d, which is %+v", o, o.version, ch)
			}
			o.committed, ch.op = o.version, o
			s.oracle.versions[o.version] = ch
		} else if o.kind == "delete" && !o.failed {
			unknown[o.key] = append(unknown[o.key], o)
		}
	}
	for _, v := range slices.Sorted(maps.Keys(s.oracle.versions)) {
		ch := s.oracle.versions[v]
		if ch.op != nil {
			continue
		}
		u := unknown[ch.key]
		if len(u) == 0 || u[0].begun > ch.at {
			s.failf("I2: version %d deletes %s, which nobody wanted", v, ch.key)
		}
		u[0].committed = v
		unknown[ch.key] = u[1:]
	}
}

func stepKey(state, in, _ any) (bool, any) {
	k, o := state.(keyState), in.(*op)
	if o.kind == "get" {
		return o.found == k.present && (!k.present || o.value == k.value && o.version == k.version), k
	}
	return o.version > k.version && o.found == k.present, keyState{o.kind == "set", o.value, o.version}
}

// simulate runs a seed.
func simulate(t *testing.T, seed uint64, steps int, sink io.Writer, change func(*simConfig)) (*sim, error) {
	cryptotest.SetGlobalRandom(t, seed)
	rng := rand.New(rand.NewPCG(seed, 0x5eed))
	cfg := drawConfig(rng, steps)
	if change != nil {
		change(&cfg)
	}
	s := newSim(seed, cfg, rng, sink)
	return s, s.run()
}

func TestSimulate(t *testing.T) {
	total := map[string]int{}
	for i := range *simSeeds {
		seed := *simSeed + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			var sink io.Writer
			if *simTrace {
				sink = os.Stdout
			}
			s, err := simulate(t, seed, *simSteps, sink, nil)
			if err != nil {
				t.Errorf("%v\nreplay: go test -run 'TestSimulate$' -sim.seed=%d -sim.steps=%d -sim.seeds=1 .", err, seed, *simSteps)
			}
			s.count["seeds"]++
			s.count["steps"] += int(s.step)
			for k, n := range s.count {
				total[k] += n
			}
		})
	}
	for _, k := range slices.Sorted(maps.Keys(total)) {
		t.Logf("%9d %s", total[k], k)
	}
}

// traceHash is the hash of the trace of a whole run.
func traceHash(t *testing.T, seed uint64) (sum string) {
	t.Run(fmt.Sprint(seed), func(t *testing.T) {
		h := sha256.New()
		if s, err := simulate(t, seed, 5000, h, nil); err != nil || s.lines < 300 {
			t.Errorf("%d lines: %v", s.lines, err)
		}
		sum = fmt.Sprintf("%x", h.Sum(nil))
	})
	return sum
}

// TestSimReplays runs seeds twice here, and in another process.
func TestSimReplays(t *testing.T) {
	const child = "RAFT_KEY_VALUE_SIM_CHILD"
	var here, again []string
	for _, seed := range []uint64{3, 4} {
		here = append(here, traceHash(t, seed))
	}
	if os.Getenv(child) != "" {
		fmt.Println("traces", here)
		return
	}
	for _, seed := range []uint64{3, 4} {
		again = append(again, traceHash(t, seed))
	}
	if !slices.Equal(here, again) {
		t.Fatalf("the same seeds have other traces: %v, %v", here, again)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		cmd := exec.Command(exe, "-test.run=^TestSimReplays$")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), fmt.Sprintln("traces", here)) {
			t.Fatalf("another process has other traces than %v: %v\n%s", here, err, out)
		}
	}
}

// cutOff separates a site from all others, or ends that.
func (s *sim) cutOff(st *site, by int) {
	for _, o := range s.sites {
		if o != st {
			s.cut[st.i][o.i] += by
			s.cut[o.i][st.i] += by
		}
	}
}

// loseMemory acknowledges a write on nodes 1 and 2 only, lets node 1 lose its
// memory, and leaves it alone with node 3, which never heard of the write.
func (s *sim) loseMemory() {
	s.boot()
	s.until(1000, func() string {
		if len(s.admins) > 0 {
			return "the cluster is not made"
		}
		return s.unsettled()
	})
	one, two, three := s.sites[0], s.sites[1], s.sites[2]
	s.cutOff(three, 1)
	o := &op{kind: "set", key: "k0", value: "acknowledged", begun: s.tock()}
	s.values[o.value] = o
	w, _ := encodeWrite(&kvpb.Write{Operation: &kvpb.Write_Set{Set: &kvpb.SetRequest{Key: o.key, Value: []byte(o.value)}}})
	s.finishWrite(o, s.ask(one.cur, w))
	s.history = append(s.history, o)
	one.cur.die(1)
	s.cutOff(two, 1)
	s.cut[0][2], s.cut[2][0] = 0, 0
	for end := s.now + 300*simTick; s.now < end; {
		s.next()
	}
	s.cutOff(two, -1)
	s.cut[0][2], s.cut[2][0] = 0, 0
	s.settle()
	s.linearizable()
	for _, p := range s.members() {
		if it, _, err := p.n.store.get(o.key); err != nil || string(it.value) != o.value {
			s.failf("I2: %v has lost an acknowledged write: it has %q, %v", p, it.value, err)
		}
	}
	if n := len(s.members()); n != 3 {
		s.failf("%d members", n)
	}
}

// TestSameRaftIDLosesWrite shows why a raft ID is used once.
func TestSameRaftIDLosesWrite(t *testing.T) {
	for _, reuse := range []bool{false, true} {
		t.Run(fmt.Sprintf("reuse=%v", reuse), func(t *testing.T) {
			cryptotest.SetGlobalRandom(t, 1)
			cfg := simConfig{nodes: 3, voters: 3, election: 10, logBytes: 64 << 10, latency: .1, queue: 1000, keys: 1, adminEvery: 1e9, reuseID: reuse}
			s := newSim(1, cfg, rand.New(rand.NewPCG(1, 1)), nil)
			err := s.try(s.loseMemory)
			if !reuse && err != nil {
				t.Error(err)
			} else if reuse && err == nil {
				t.Error("nothing was lost")
			} else if reuse {
				t.Log(err)
			}
		})
	}
}

// TestSimulatorFindsBugs plants bugs and sees that they are found (I10).
func TestSimulatorFindsBugs(t *testing.T) {
	for _, tt := range []struct {
		name  string
		plant func(*simConfig)
	}{
		{"a raft ID used again", func(c *simConfig) { c.reuseID = true }},
		{"a read without ReadIndex", func(c *simConfig) { c.readNow = true }},
		{"a write acknowledged when it is proposed", func(c *simConfig) { c.ackEarly = true }},
		{"snapshots without proposers", func(c *simConfig) { c.forget = true }},
		{"batches applied again", func(c *simConfig) { c.twice = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(200) {
				if _, err := simulate(t, seed+1, 4000, nil, tt.plant); err != nil {
					t.Logf("found with %d seeds: %s", seed+1, strings.SplitN(err.Error(), "\n", 2)[0])
					return
				}
			}
			t.Error("not found")
		})
	}
}

// TestMessagesAcrossLives lets the network break its promise: what was sent to
// a process reaches the next one, addressed to it. With a new raft ID in each
// life that does no harm.
func TestMessagesAcrossLives(t *testing.T) {
	across := 0
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed+1), func(t *testing.T) {
			s, err := simulate(t, seed+1, 4000, nil, func(c *simConfig) {
				c.crossLife, c.late, c.faults = true, 1, append(c.faults, "kill", "kill")
			})
			if err != nil {
				t.Error(err)
			}
			across += s.count["messages across lives"]
		})
	}
	if across == 0 {
		t.Error("there was none")
	}
}
