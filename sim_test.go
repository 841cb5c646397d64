// The simulator: the real Ready loop, store and log of several nodes over a
// simulated network and clock, in one goroutine and from one seed. It checks
// what must always hold, and replays exactly.
//
// A step is one event: a message, a tick, a call, an operator's request or a
// fault. After each step, on the node that took it: I3 one leader a term, I4
// committed entries never change, I6 nothing goes back, I2 an acknowledged
// write is the one committed, no read of anything else, no raft ID twice, no
// node stops. Whenever a node's applied index is a multiple of stateEvery, and
// at the end: I5 equal states. With each answer to a write with an id: I8 it is
// the first one. With each answer to an operator: whoever gives it led, and what it
// says was so, at some moment since the request. At the end: I1 porcupine, I9 all heals.

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
	simSeeds = flag.Int("sim.seeds", 40, "how many seeds TestSimulate runs")
	simSteps = flag.Int("sim.steps", 8000, "how many steps of each seed it runs before all faults end")
	simSeed  = flag.Uint64("sim.seed", 1, "the first seed")
	simBugs  = flag.Int("sim.bugs", 600, "how many seeds TestSimulatorFindsBugs runs for each")
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
	steps         int // before all faults end
	nodes, voters int
	election      int    // election timeout
	logBytes      uint64 // after which a node compacts its log
	limits        raftLimits

	latency      float64 // mean
	spike        float64 // probability of a latency 20 times as long
	lag          float64 // most that a node's loop rests with work in its inbox
	loss, dup    float64 // probability that a message is lost, that it comes twice
	reorder      bool    // messages of a stream may overtake each other
	late         float64 // probability that a message outlives its stream
	queue        int     // messages that a stream holds
	snapshotDies float64 // probability that a snapshot is lost half way
	transfer     float64 // how much longer than a message a snapshot takes, on average

	durable float64 // probability that a site has a disk
	disk    float64 // mean time of a write to it

	clients, keys int
	valueBytes    int     // at most
	think         float64 // mean, between two calls of a client
	timeout       float64 // mean, of a call
	sessions      int     // that are kept
	answers       int     // that each session keeps

	faultEvery float64 // mean, between two faults
	outage     float64 // mean, of a fault that lasts
	faults     []string

	adminEvery float64 // mean, between two requests of operators
	operators  int     // requests at a time
	reckless   bool    // operators ask for voters of whom a majority is dead

	plantedBugs
}

// plantedBugs are those that tests plant, to see that they are found.
type plantedBugs struct {
	reuseID   bool // a restarted process has its old raft ID
	crossLife bool // messages reach the next life
	readNow   bool // a read is answered without asking anybody
	ackEarly  bool // a write is acknowledged when raft has taken it
	forget    bool // snapshots come without the proposers
	twice     bool // batches are applied as often as they come
	ackUnsync bool // what depends on the disk does not wait for it
	dropVote  bool // the hard state does not get to the disk
	noVote    bool // the vote does not get to the disk
	hasty     bool // a read is answered before what it has to see is applied
	early     bool // a leader asks raft before it has applied an entry of its term
	byIndex   bool // a write is acknowledged for the next entry, whosever that is
	wrongConf bool // snapshots come without a voter
	again     bool // snapshots say that they end an entry earlier than they do
	strangers bool // snapshots come without the sessions
	careless  bool // a write is applied as often as it comes
	sameCount bool // all writes of an entry have one version
	unsettled bool // a change of membership is answered as soon as it is committed
	cached    bool // an operator's request is answered on the word of an earlier one's entry
}

// simFaults are the kinds of faults, those twice that are to come more often.
var simFaults = []string{
	"kill", "kill", "stop", "pause", "isolate", "split", "one-way", "drop", "loss", "slow", "rate", "power", "power",
	"all", "disk", "stall", "wipe", "freeze", "freeze", "forget", "unplug", "move", "move",
}

// drawConfig draws what a run is like. Whoever adds a draw adds it at the end, or every
// seed becomes another run.
func drawConfig(rng *rand.Rand, steps int) simConfig {
	pick := func(vs ...float64) float64 { return vs[rng.IntN(len(vs))] }
	c := simConfig{
		steps:        steps,
		nodes:        3 + rng.IntN(3),
		election:     int(pick(10, 15, 30)),
		logBytes:     uint64(pick(8<<10, 16<<10, 64<<10)),
		latency:      pick(.05, .3, 1, 2),
		spike:        pick(0, 0, .01, .05),
		lag:          pick(0, 0, .5, 2),
		loss:         pick(0, 0, .01, .05),
		dup:          pick(0, .02, .1),
		reorder:      rng.IntN(3) == 0,
		late:         pick(0, .5, 1),
		queue:        int(pick(20, 1000)),
		snapshotDies: pick(0, .2, .5),
		clients:      1 + rng.IntN(6),
		keys:         1 + rng.IntN(8),
		valueBytes:   int(pick(0, 700, 3000)),
		think:        pick(.5, 2, 10),
		timeout:      pick(30, 100, 300),
		faultEvery:   pick(3, 20, 60, 200),
		outage:       pick(5, 20, 60, 150),
		adminEvery:   pick(15, 60, 200, 1000),
		sessions:     int(pick(2, 4, 20)),
		answers:      int(pick(1, 4, 20)),
		limits:       defaultRaftLimits(),
	}
	if rng.IntN(2) == 0 {
		c.limits = raftLimits{
			message:       uint64(pick(0, 500, 4000)),
			ready:         uint64(pick(500, 4000)),
			uncommitted:   uint64(pick(2000, 20000)),
			inflight:      int(pick(1, 2, 10)),
			inflightBytes: 1 << 20,
		}
	}
	c.operators = int(pick(2, 2, 8))
	c.voters = min(c.nodes, int(pick(1, 2, 3, 3, 3, 5)))
	c.durable = pick(0, 0, .5, 1, 1, 1)
	c.disk = pick(.01, .1, .5, 2)
	if rng.IntN(4) == 0 { // soon too much is needed of the log
		c.logBytes = 2 << 10
	}
	c.transfer = pick(10, 10, 100, 1000)
	for _, f := range simFaults {
		if rng.IntN(3) > 0 {
			c.faults = append(c.faults, f)
		}
	}
	return c
}

// anchored reports whether the first site never moves and stays a member: members
// that move have to meet somewhere.
func (c simConfig) anchored() bool { return slices.Contains(c.faults, "move") }

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
	node  *kvpb.Node // another one whenever it has moved
	moves int
	cur   *proc  // the process that runs; nil: none does
	old   uint64 // the raft ID of the last process
	lives int    // how many raft IDs its processes have had
	most  uint64 // index of the last entry that it ever applied

	fs      *simFS // nil: it has no disk
	slow    int64  // until then the disk does nothing
	forgets bool   // processes are started without the disk
	onDisk  uint64 // the raft ID of the node whose data directory is on the disk
}

// keeps is the raft ID that a process will have again that starts here; 0: a
// new one.
func (st *site) keeps() uint64 {
	if st.forgets || st.fs == nil || st.fs.names[simDir+"/identity"] == nil {
		return 0
	}
	return st.onDisk
}

// proc is a process: a node from its start to its death. It is the node's
// transport, and has the state that the real one has.
type proc struct {
	s    *sim
	site *site
	n    *node

	dead   bool
	paused bool     // as by SIGSTOP
	held   []*event // what would have happened while it was paused
	inTurn bool
	soon   bool    // a turn is scheduled
	rate   float64 // how long its tick takes

	// What the node had after its last turn. All but the raft ID belongs to that.
	raftID       uint64
	term, commit uint64
	applied      uint64
	confAt       uint64                   // index of the last change of membership applied
	version      map[string]uint64        // by key: what a local read has seen
	fresh        map[uint64]*raftpb.Entry // applied, and not yet observed

	// The transport.
	members   map[uint64]*kvpb.Node
	removed   []uint64
	peers     map[uint64]*simPeer
	inbound   map[uint64]*simStream
	receiving map[uint64]*transfer
	sending   []*transfer
	hellos    []*simStream // on their way to here

	calls   []*attempt // that have not ended
	witness witness    // of the last operator's request

	disk    *disk
	writing bool          // the disk is at work
	written kvpb.LogBatch // what the disk has of the log, in short: hard state and the last index
	broken  bool          // the disk has failed
	doomed  float64       // not 0: how long the power is lost once the disk writes
}

// established is the last membership that an operator was told of.
type established struct {
	index   uint64
	conf    *raftpb.ConfState
	removed []uint64
}

// sim is a run.
type sim struct {
	cfg  simConfig
	seed uint64
	rng  *rand.Rand

	// Time and what will happen.
	now   int64 // in units of which a tick has simTick
	seq   uint64
	step  uint64
	queue eventQueue

	// The world.
	sites   []*site
	cut     [][]int // by site, from and to: how many partitions in force cut them
	lossNow float64 // probability that a message is lost, while a burst lasts
	slowNow float64 // probability that it is late
	late    int64   // when all has arrived that the network was given

	// How far the run is.
	running bool // faults have begun
	calm    bool // no more faults
	quiet   bool // no more calls

	// What nodes have done, to be compared with the oracle and with each other.
	oracle  oracle
	leaders map[uint64]uint64 // by term: the life of its leader
	lives   map[uint64]string // by raft ID and by life: the name of whose it was
	states  map[uint64]uint64 // by index: the hash of the state
	names   map[uint64]string // of raft IDs

	// Clients.
	clients []*caller
	values  map[string]*op    // by the value that they set
	ids     map[[2]uint64]*op // by session and sequence
	seen    map[string]uint64 // by key: the newest version that a client has been told of
	history []*op
	clock   int64 // orders begins and ends of calls, see tock

	// Operators.
	admins []*admin
	told   established

	// What a run prints.
	count map[string]int
	lines int
	lazy  [traceLines]traceLine // the last lines of the trace
	sink  io.Writer             // gets the whole trace
}

// traceLine is a line of the trace. It is formatted only if it is printed.
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

// failf ends a run that went wrong.
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

// tail is the end of the trace.
func (s *sim) tail() string {
	var b strings.Builder
	for i := max(0, s.lines-traceLines); i < s.lines; i++ {
		fmt.Fprintln(&b, s.lazy[i%traceLines])
	}
	return b.String()
}

// newSim makes the world, and starts a process at each site.
func newSim(seed uint64, cfg simConfig, rng *rand.Rand, sink io.Writer) *sim {
	s := &sim{
		cfg:     cfg,
		seed:    seed,
		rng:     rng,
		sink:    sink,
		leaders: map[uint64]uint64{},
		lives:   map[uint64]string{},
		states:  map[uint64]uint64{},
		names:   map[uint64]string{},
		values:  map[string]*op{},
		ids:     map[[2]uint64]*op{},
		seen:    map[string]uint64{},
		count:   map[string]int{},
	}
	for i := range cfg.nodes {
		st := &site{i: i, node: &kvpb.Node{Id: uint64(i + 1), Address: fmt.Sprintf("node%d:1", i+1)}}
		if rng.Float64() < cfg.durable || i == 0 && cfg.anchored() {
			st.fs = newSimFS()
		}
		s.sites = append(s.sites, st)
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

// schedule has f happen at a time, at a process unless that is nil.
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

// expo draws a time that is exponentially distributed, but for its longest values.
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

// anyProc draws one of them; nil: there is none.
func (s *sim) anyProc() *proc {
	ps := s.alive()
	if len(ps) == 0 {
		return nil
	}
	return ps[s.rng.IntN(len(ps))]
}

// name is how the trace calls a node: by its id, and the how manieth raft ID it has.
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
	o.heartbeat = 100 * time.Millisecond
	o.election = time.Duration(s.cfg.election) * 20 * time.Millisecond
	o.logBytes = s.cfg.logBytes
	o.id = st.node.Id
	p := &proc{
		s:         s,
		site:      st,
		peers:     map[uint64]*simPeer{},
		inbound:   map[uint64]*simStream{},
		receiving: map[uint64]*transfer{},
		rate:      .8 + .4*s.rng.Float64(),
		fresh:     map[uint64]*raftpb.Entry{},
	}
	p.n = newNode(o, st.node, slog.New(&simLog{s: s, p: p}))
	p.n.net = p
	p.n.opts.onApply = func(e *raftpb.Entry) {
		p.fresh[e.GetIndex()] = e
		if e.GetType() != raftpb.EntryNormal {
			p.confAt = e.GetIndex()
		}
		if s.cfg.byIndex {
			p.acknowledge(e)
		}
	}
	p.n.store.sessions.limit, p.n.store.sessions.answerLimit, p.n.store.plantedSameVersion = s.cfg.sessions, uint64(s.cfg.answers), s.cfg.sameCount
	st.cur = p
	if old := st.old; old != 0 && s.cfg.reuseID {
		p.n.id.raftID = old
		if err := p.n.start(); err != nil {
			s.failf("starting under the old raft ID: %v", err)
		}
	}
	p.n.opts.limits = s.cfg.limits
	if st.fs != nil && !st.forgets {
		p.openDisk()
	}
	p.identify()
	s.trace("%v starts at %s", p, st.node.Address)
	s.after(s.rng.Float64(), p, p.tick)
}

// identify sees whether the node has become somebody new.
func (p *proc) identify() {
	if p.raftID == p.n.id.raftID {
		return
	}
	s, n := p.s, p.n
	p.raftID = n.id.raftID
	p.term = 0
	p.commit = 0
	p.applied = 0
	p.version = map[string]uint64{}
	s.count["lives"]++
	p.site.old = n.id.raftID
	if p.disk != nil {
		p.site.onDisk = n.id.raftID
	}
	if s.cfg.reuseID {
		delete(s.lives, n.id.raftID)
	}
	p.site.lives++
	name := fmt.Sprintf("%d.%d", n.self.Id, p.site.lives)
	if was, ok := s.names[n.id.raftID]; ok && n.durable.snapshotIndex != 0 && was[0] == name[0] { // it has kept its memory
		delete(s.lives, n.id.raftID)
	}
	for _, id := range []uint64{n.id.raftID, n.id.life} {
		if other, ok := s.lives[id]; ok {
			s.failf("the ID %x of %s was that of %s", id, name, other)
		}
		s.lives[id] = name
	}
	s.names[n.id.raftID] = name
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
	if r.Message == "the cluster cannot go on" {
		l.checkAlarm()
	}
	return nil
}

// checkAlarm is called when a node says that too much memory is lost. In the simulator
// that is never so, but a node that lags cannot know.
func (l *simLog) checkAlarm() {
	knowsMore := func(st *site) bool {
		hasMemory := st.cur != nil || st.keeps() != 0
		return hasMemory && st.most > l.p.n.store.index
	}
	if !slices.ContainsFunc(l.s.sites, knowsMore) {
		l.s.failf("%v says that too much memory is lost, and that is not so:%s", l.p, l.s.overview())
	}
	l.s.count["alarms of nodes that lag"]++
}

// tick is the process's clock.
func (p *proc) tick() {
	p.s.after(p.rate*(.9+.2*p.s.rng.Float64()), p, p.tick)
	p.turn(1)
}

// wake has the process take a turn, at once or soon.
func (p *proc) wake() {
	lag := p.s.cfg.lag
	isLate := p.inTurn || p.s.chance(min(lag, .7))
	if p.soon {
		return
	}
	if isLate {
		p.soon = true
		p.s.after(lag*p.s.rng.Float64(), p, func() { p.turn(0) })
	} else if !p.paused {
		p.turn(0)
	}
}

// turn runs the loop's body once and checks what it has done.
func (p *proc) turn(ticks int) {
	p.soon, p.inTurn = false, true
	in := p.n.inbox.take()
	in.ticks = ticks
	if p.s.cfg.twice {
		clear(p.n.store.proposers)
	}
	if s := p.n.store; p.s.cfg.careless { // all but the highest
		for e := s.sessions.used.Front(); e != nil; e = e.Next() {
			ses := e.Value.(*session)
			ses.answers = ses.answers[len(ses.answers)-1:]
		}
	}
	p.n.turn(in)
	p.readBadly()
	p.inTurn = false
	if n := p.n; n.err == errRemoved || n.err != nil && p.broken {
		p.giveUp()
		return
	}
	p.check()
	p.poll()
	p.startWriting()
}

// readBadly plants the bugs of reading.
func (p *proc) readBadly() {
	n := p.n
	if p.s.cfg.hasty {
		for _, r := range n.calls.confirmed {
			for _, c := range r.calls {
				n.calls.finish(c, outcome{})
			}
		}
		n.calls.confirmed = nil
	}
	if !p.s.cfg.early || n.rn == nil {
		return
	}
	isNewLeader := n.raft.role == raft.StateLeader && !n.leads()
	mayAsk := n.calls.round.ctx == nil && len(n.calls.reads) > 0
	if isNewLeader && mayAsk {
		term := n.store.term
		n.store.term = n.raft.term // as if
		n.askRead()
		n.store.term = term
		p.s.after(0, p, p.wake)
	}
}

// acknowledge takes another node's entry for that of the writes in flight.
func (p *proc) acknowledge(e *raftpb.Entry) {
	n := p.n
	if n.calls.own == nil || n.clock.now >= n.calls.own.proposeAt || e.GetType() != raftpb.EntryNormal {
		return
	}
	var b kvpb.Batch
	err := proto.Unmarshal(e.GetData(), &b)
	if err != nil || len(b.Writes) == 0 || b.Proposer == n.id.raftID {
		return
	}
	for i, c := range n.calls.own.calls {
		n.calls.finish(c, outcome{result: result{version: n.store.version + 1 + uint64(i)}})
	}
	n.calls.own = nil
}

// openDisk opens the process's data directory.
func (p *proc) openDisk() {
	s, st := p.s, p.site
	d, err := openDisk(st.fs, simDir, s.cfg.logBytes, p.n.logger)
	if err != nil {
		s.failf("%v cannot lock its data directory: %v", st.node, err)
	}
	d.background = func(f func()) { f() }
	d.start = func(f func()) { s.after(s.diskTime(st), p, func() { p.onDisk(f) }) }
	p.disk = d
	if err := p.n.open(d); err != nil {
		s.failf("node %d does not start from its data directory: %v", st.node.Id, err)
	}
	if n := p.n; n.rn != nil {
		s.count["starts from a disk"]++
		p.written.HardState = wireHardState(n.log.hard)
		p.written.FirstSegment = n.log.last()
	}
}

// diskTime draws how long a disk takes for what it is to do next.
func (s *sim) diskTime(st *site) float64 {
	return s.expo(s.cfg.disk) + max(0, float64(st.slow-s.now)/simTick)
}

// onDisk does something on the disk, which may fail at it.
func (p *proc) onDisk(f func()) {
	fs := p.site.fs
	f()
	p.broken = p.broken || fs.failAt > 0 && len(fs.calls) >= fs.failAt
	p.wake()
}

// startWriting has the disk write what is queued, some time.
func (p *proc) startWriting() {
	if p.disk == nil || p.writing || len(p.disk.queue) == 0 {
		return
	}
	p.writing = true
	if p.s.cfg.ackUnsync {
		for i, j := range p.disk.queue {
			j.done(nil)
			p.disk.queue[i].done = func(error) {}
		}
	}
	p.s.after(p.s.diskTime(p.site), p, func() {
		p.writing = false
		if p.doomed > 0 && p.site.keeps() != 0 {
			p.losePower(p.doomed)
		} else {
			p.onDisk(p.write)
		}
	})
}

// write is a pass of the writer. It notes what the disk has then.
func (p *proc) write() {
	s, w := p.s, &kvpb.LogBatch{HardState: p.written.HardState, FirstSegment: p.written.FirstSegment}
	for _, j := range p.disk.queue {
		if s.cfg.dropVote {
			j.batch.HardState = nil
		}
		if h := j.batch.HardState; h != nil && s.cfg.noVote {
			h.Vote = 0
		}
		w.HardState = cmp.Or(j.batch.HardState, w.HardState)
		if j.batch.Discards {
			w.FirstSegment = j.batch.Snapshot.Index
		} else if j.view != nil {
			w.FirstSegment = j.view.header.Index
		}
		for _, e := range j.batch.Entries {
			w.FirstSegment = e.Index
		}
	}
	if p.disk.write() == nil && !p.disk.suspended {
		p.written.HardState, p.written.FirstSegment = w.HardState, w.FirstSegment
	}
	s.count["disk writes"]++
}

// promises checks that what a message promises is on the disk (I7).
func (p *proc) promises(m *raftpb.Message) {
	if p.disk == nil || p.n.durable.snapshotIndex == 0 || m.GetReject() {
		return
	}
	h := p.written.HardState
	hasVoted := func(candidate uint64) bool {
		return h.GetTerm() > m.GetTerm() || h.GetTerm() == m.GetTerm() && h.GetVote() == candidate
	}
	switch m.GetType() {
	case raftpb.MsgVote: // it goes for this node's own vote, too
		if !hasVoted(m.GetFrom()) {
			p.s.failf("I7: %v calls for votes in term %d, the disk has %v", p, m.GetTerm(), h)
		}
	case raftpb.MsgVoteResp:
		if !hasVoted(m.GetTo()) {
			p.s.failf("I7: %v grants a vote in term %d, the disk has %v", p, m.GetTerm(), h)
		}
	case raftpb.MsgAppResp:
		last := p.written.FirstSegment // a later term may have replaced what is acknowledged
		hasEntry := h.GetTerm() > m.GetTerm() || h.GetTerm() == m.GetTerm() && last >= m.GetIndex()
		if !hasEntry {
			p.s.failf("I7: %v acknowledges entry %d in term %d, the disk has entry %d, %v",
				p, m.GetIndex(), m.GetTerm(), last, h)
		}
	}
}

// giveUp ends a process whose node has stopped by itself: its disk has failed,
// or it was removed, and whoever runs it empties the directory.
func (p *proc) giveUp() {
	p.s.trace("%v stops: %v", p, p.n.err)
	p.s.count["stops: "+errorClass(p.n.err)]++
	p.n.calls.failAll(p.n.err)
	p.poll()
	if p.n.err == errRemoved {
		p.site.fs = newSimFS()
	}
	p.die(p.s.expo(20))
}

// errorClass is why a node has stopped by itself, as counts call it.
func errorClass(err error) string {
	if err == errRemoved {
		return "removed"
	}
	return "disk"
}

// check checks the invariants that one node can break in one turn.
func (p *proc) check() {
	s, n := p.s, p.n
	if n.err != nil && n.err != errStopping {
		s.failf("node %v stops: %v", p, n.err)
	}
	p.identify()
	if n.rn != nil {
		p.checkProgress()
	}
	if n.store.index > p.applied {
		s.observe(p, p.applied+1, n.store.index)
		p.applied = n.store.index
		p.site.most = max(p.site.most, p.applied)
		if p.applied%stateEvery == 0 {
			s.compareState(p)
		}
	}
}

// checkProgress checks that a node in a cluster does not go back (I6), leads a term that
// is its own (I3), and keeps no more of its log than it may.
func (p *proc) checkProgress() {
	s, n := p.s, p.n
	st := n.rn.BasicStatus()
	term, commit, applied := st.GetTerm(), st.GetCommit(), n.store.index
	if term < p.term || commit < p.commit || applied < p.applied {
		s.failf("I6: %v goes back from term %d, commit %d, applied %d to %d, %d, %d",
			p, p.term, p.commit, p.applied, term, commit, applied)
	}
	if applied > commit || n.log.prevIndex > applied {
		s.failf("I6: %v has compacted %d, applied %d, committed %d", p, n.log.prevIndex, applied, commit)
	}
	p.term = term
	p.commit = commit
	if st.RaftState == raft.StateLeader {
		p.leads(term)
	}
	hasApplied := applied > p.applied
	kept := n.log.bytesTo(applied)
	if n.leads() && hasApplied && kept > max(n.opts.logBytes, n.keptBytes()) {
		s.failf("%v keeps %d bytes of its log, more than %d", p, kept, n.keptBytes())
	}
}

// leads notes that a process leads a term, which nobody else may have led (I3).
func (p *proc) leads(term uint64) {
	s, life := p.s, p.n.id.life
	leader, ok := s.leaders[term]
	if ok && leader != life {
		s.failf("I3: %v leads term %d, as another has, or it before it was started again", p, term)
	}
	if !ok {
		s.leaders[term] = life
		s.count["elections"]++
		s.trace("%v leads term %d", p, term)
	}
}

// entry returns an entry of the node's log.
func (p *proc) entry(i uint64) *raftpb.Entry {
	if es, err := p.n.log.Entries(i, i+1, math.MaxUint64); err == nil {
		return es[0]
	}
	return nil
}

// stateOf hashes what a snapshot of a node would hold.
func stateOf(n *node) uint64 {
	v := n.store.openView()
	defer v.close()
	h := fnv.New64a()
	_ = v.writeTo(h)
	return h.Sum64()
}

// compareState compares a node's state with that of all others at the same index (I5).
func (s *sim) compareState(p *proc) {
	h := stateOf(p.n)
	other, ok := s.states[p.applied]
	if ok && other != h {
		s.failf("I5: %v has another state at index %d than others had", p, p.applied)
	}
	if ok {
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
	// sessions are those never used, the oldest first, and then the others, the one used
	// the longest ago first.
	sessions []*modelSession
	opened   map[uint64]bool      // all sessions ever
	tooFar   map[[2]uint64]bool   // all writes ever that were, by session and sequence
	first    map[[2]uint64]result // all answers ever, likewise
	eras     []era
	terms    map[uint64]int64 // when an entry of each was first applied
}

// newOracle is the oracle once the cluster is made: the entry of bootstrap is applied.
func newOracle(now int64, st *store) oracle {
	return oracle{
		entries:  []*raftpb.Entry{nil, nil},
		conf:     st.conf,
		last:     map[uint64]uint64{},
		keys:     map[string][]change{},
		versions: map[uint64]change{},
		opened:   map[uint64]bool{},
		tooFar:   map[[2]uint64]bool{},
		first:    map[[2]uint64]result{},
		eras:     []era{{now, st.conf, st.members}},
		terms:    map[uint64]int64{},
	}
}

// era is a membership, which holds from when it was first applied until the next is.
type era struct {
	from    int64
	conf    *raftpb.ConfState
	members map[uint64]*kvpb.Node
}

// modelSession is what a session is meant to be.
type modelSession struct {
	id, highest uint64
	answers     map[uint64]bool // by sequence: there is one
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
		e := p.fresh[i]
		delete(p.fresh, i)
		switch {
		case i < uint64(len(o.entries)):
			was := o.entries[i]
			if e != nil && was != nil && !sameEntry(was, e) {
				s.failf("I4: %v has applied entry %d as %s, it was %s", p, i, entryText(e), entryText(was))
			}
		case e == nil && i > 1:
			s.failf("the simulator has not seen entry %d before %v has applied and compacted it", i, p)
		case e == nil:
			*o = newOracle(s.tock(), p.n.store)
		default:
			o.entries = append(o.entries, proto.CloneOf(e))
			s.commit(e)
		}
	}
}

func sameEntry(a, b *raftpb.Entry) bool {
	return a.GetTerm() == b.GetTerm() && a.GetType() == b.GetType() && bytes.Equal(a.GetData(), b.GetData())
}

func entryText(e *raftpb.Entry) string {
	return fmt.Sprintf("%v of term %d with %d bytes", e.GetType(), e.GetTerm(), len(e.GetData()))
}

// commit applies an entry to the oracle.
func (s *sim) commit(e *raftpb.Entry) {
	o := &s.oracle
	s.count["entries"]++
	if o.terms[e.GetTerm()] == 0 {
		o.terms[e.GetTerm()] = s.tock()
	}
	if e.GetType() != raftpb.EntryNormal {
		cc, ctx, err := decodeConfChange(e)
		if err != nil {
			s.failf("entry %d: %v", e.GetIndex(), err)
		}
		if cs, err := tryConfChange(o.conf, cc); err == nil {
			o.conf = cs
			s.begins(cs, ctx.Members)
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
		s.commitWrite(e.GetIndex(), w)
	}
}

// begins notes that another membership holds.
func (s *sim) begins(cs *raftpb.ConfState, changed []*kvpb.Member) {
	o := &s.oracle
	members := maps.Clone(o.eras[len(o.eras)-1].members)
	for _, m := range changed {
		members[m.RaftId] = m.Node
	}
	maps.DeleteFunc(members, func(id uint64, _ *kvpb.Node) bool { return !slices.Contains(confIDs(cs), id) })
	o.eras = append(o.eras, era{s.tock(), cs, members})
}

// held reports whether a membership of some kind was in force at some moment since.
func (o *oracle) held(since int64, f func(era) bool) bool {
	for i, e := range o.eras {
		if (i+1 == len(o.eras) || o.eras[i+1].from > since) && f(e) {
			return true
		}
	}
	return false
}

// livesOf counts those of a node, and its votes.
func (e era) livesOf(id uint64) (lives, votes int) {
	for raftID, m := range e.members {
		if m.Id != id {
			continue
		}
		lives++
		if slices.Contains(e.conf.GetVoters(), raftID) {
			votes++
		}
	}
	return lives, votes
}

// fulfils reports whether a membership is as a request wants it.
func (e era) fulfils(req *kvpb.ChangeMembershipRequest) bool {
	all := func(ids []uint64, f func(lives, votes int) bool) bool {
		return !slices.ContainsFunc(ids, func(id uint64) bool { return !f(e.livesOf(id)) })
	}
	isVoter := func(_, votes int) bool { return votes == 1 }
	isLearner := func(lives, votes int) bool { return lives > 0 && votes == 0 }
	isGone := func(lives, _ int) bool { return lives == 0 }
	if isJoint(e.conf) {
		return false
	}
	if len(req.Members) > 0 && len(req.Members) != len(e.conf.GetVoters()) {
		return false
	}
	haveVotes := all(req.Members, isVoter) && all(req.Promote, isVoter)
	return haveVotes && all(req.Demote, isLearner) && all(req.Remove, isGone)
}

// lacks reports whether a node that a request names is no member.
func (e era) lacks(req *kvpb.ChangeMembershipRequest) bool {
	return slices.ContainsFunc(slices.Concat(req.Members, req.Promote, req.Demote, req.Remove), func(id uint64) bool {
		lives, _ := e.livesOf(id)
		return lives == 0
	})
}

// membership is the one as operators know it.
func (e era) membership() *kvpb.Membership {
	m := &kvpb.Membership{}
	for _, member := range sortedMembers(e.members) {
		isVoter := slices.Contains(e.conf.GetVoters(), member.RaftId)
		m.Members = append(m.Members, &kvpb.ExpectedMember{Node: member.Node, Voter: isVoter})
	}
	return m
}

// commitWrite applies a write to the oracle, if its id is new.
func (s *sim) commitWrite(index uint64, w *kvpb.Write) {
	o := &s.oracle
	if open := w.GetNewSession(); open != nil {
		s.open(index, open.Session)
		return
	}
	c := change{at: s.tock()}
	var id *kvpb.RequestId
	var expected *uint64
	if set := w.GetSet(); set != nil {
		id = set.RequestId
		expected = set.ExpectedVersion
		c.key = set.Key
		c.value = string(set.Value)
		c.present = true
		c.op = s.values[c.value]
	} else {
		del := w.GetDelete()
		id = del.RequestId
		expected = del.ExpectedVersion
		c.key = del.Key
		c.op = s.ids[[2]uint64{id.GetSession(), id.GetSequence()}] // nil without an id
	}
	if id != nil && !s.isNew(id) {
		return
	}
	present := uint64(0) // the key's version
	if h := o.keys[c.key]; len(h) > 0 && h[len(h)-1].present {
		present, c.found = h[len(h)-1].version, true
	}
	if expected != nil && *expected != present {
		s.count["compares failed"]++
		if id != nil {
			o.first[[2]uint64{id.Session, id.Sequence}] = result{version: present, compareFailed: true}
		}
		return
	}
	isWanted := c.op != nil && c.op.key == c.key && c.op.committed == 0
	isNamed := c.present || id != nil // of a delete without an id, ownDeletes finds the call
	if isNamed && !isWanted {
		s.failf("I2: entry %d sets %q to %q, which nobody wrote, or again", index, c.key, c.value)
	}
	o.version++
	c.version = o.version
	if c.op != nil {
		c.op.committed = c.version
	}
	if id != nil {
		o.first[[2]uint64{id.Session, id.Sequence}] = result{version: c.version, found: c.found}
	}
	o.keys[c.key] = append(o.keys[c.key], c)
	o.versions[c.version] = c
	s.count["writes committed"]++
}

// open opens a session in the oracle, where there may be place for more that
// were never used than for one.
func (s *sim) open(index, id uint64) {
	o := &s.oracle
	if id == 0 || o.opened[id] {
		s.failf("I8: entry %d opens session %d, again or by no number", index, id)
	}
	unused := slices.IndexFunc(o.sessions, func(ses *modelSession) bool { return ses.highest > 0 })
	if unused < 0 {
		unused = len(o.sessions)
	}
	if len(o.sessions) == s.cfg.sessions {
		drop := unused // the one used the longest ago
		if unused >= max(1, s.cfg.sessions/unusedDivisor) {
			drop = 0
			unused--
		}
		o.sessions = slices.Delete(o.sessions, drop, drop+1)
	}
	o.sessions = slices.Insert(o.sessions, unused, &modelSession{id: id, answers: map[uint64]bool{}})
	o.opened[id] = true
	s.count["sessions opened"]++
}

// sessionOf finds a session that the oracle keeps.
func (o *oracle) sessionOf(id uint64) (i int, ses *modelSession) {
	for i, ses := range o.sessions {
		if ses.id == id {
			return i, ses
		}
	}
	return -1, nil
}

// tooOld reports whether a session cannot know any more what a sequence was.
func (s *sim) tooOld(ses *modelSession, sequence uint64) bool {
	return ses.highest >= uint64(s.cfg.answers) && sequence <= ses.highest-uint64(s.cfg.answers)
}

// isNew reports whether a write is to be applied, by its id.
func (s *sim) isNew(id *kvpb.RequestId) bool {
	o := &s.oracle
	i, ses := o.sessionOf(id.Session)
	if ses == nil {
		s.count["writes without a session"]++
		return false
	}
	if s.tooOld(ses, id.Sequence) {
		s.count["writes too old"]++
		return false
	}
	if id.Sequence > ses.highest+uint64(s.cfg.answers) {
		s.count["writes too far"]++
		o.tooFar[[2]uint64{id.Session, id.Sequence}] = true
		return false
	}
	o.sessions = append(slices.Delete(o.sessions, i, i+1), ses)
	if ses.answers[id.Sequence] {
		s.count["writes repeated"]++
		return false
	}
	ses.highest = max(ses.highest, id.Sequence)
	ses.answers[id.Sequence] = true
	return true
}

// simPeer is a process's way to a peer, as peer in network.go.
type simPeer struct {
	raftID   uint64
	node     *kvpb.Node
	life     uint64 // 0: no stream
	at       *kvpb.Node
	claim    *moveHint
	claimDue bool
	stream   *simStream
	ended    bool
}

func (peer *simPeer) isAt(m *kvpb.Node) bool {
	if peer.life != 0 && peer.at.Address == m.Address {
		peer.node, peer.claim = m, nil
	}
	return peer.node.Address == m.Address
}

func (peer *simPeer) claimed(c *moveHint) {
	switch {
	case c.peer.Node.Id != peer.node.Id:
	case c.peer.Node.Address != peer.node.Address:
		peer.claim = c
	default:
		peer.claim = nil
		if peer.life != 0 && peer.life != c.peer.Life && peer.at.Address != peer.node.Address {
			peer.stream.breakBoth()
		}
	}
}

func (peer *simPeer) rival(from *kvpb.Peer) bool {
	address := from.Node.Address
	return peer.life != 0 && peer.life != from.Life && peer.at.Address != address && peer.node.Address != address
}

func (peer *simPeer) next() peerTarget {
	to := peerTarget{node: peer.node}
	if peer.claimDue && peer.claim != nil {
		to.node, to.hint = peer.claim.peer.Node, peer.claim
	}
	peer.claimDue = to.hint == nil
	return to
}

// simStream carries messages from one process to another.
type simStream struct {
	from, to *proc
	peer     *simPeer
	target   peerTarget
	hello    *kvpb.Hello
	queued   int
	last     int64 // when its last message arrives: order is kept
	closed   bool  // at the receiver
	frozen   bool  // what arrives is held, and then arrives at once
	held     []*raftpb.Message
}

// setMembers implements transport.
func (p *proc) setMembers(clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64) {
	p.members, p.removed = members, removed
	for _, id := range slices.Sorted(maps.Keys(p.peers)) {
		peer := p.peers[id]
		if m := members[id]; m != nil && !peer.isAt(m) || m == nil && p.inbound[id] == nil || slices.Contains(removed, id) {
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
	if st := p.inbound[raftID]; st != nil {
		peer.claimed(&moveHint{st.hello.ClusterId, st.hello.From})
	}
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
	p.n.peerDown(peer.raftID, true)
	p.s.after(0, p, p.wake)
}

// latency draws how long something takes on the network.
func (s *sim) latency() float64 {
	l := s.expo(s.cfg.latency)
	if !s.calm && (s.chance(s.cfg.spike) || s.chance(s.slowNow)) {
		l *= 20
	}
	s.late = max(s.late, s.now+int64(l*simTick))
	return l
}

func (s *sim) isCut(from, to *site) bool { return !s.calm && s.cut[from.i][to.i] > 0 }

// siteOf is the site at an address; nil: it has moved.
func (s *sim) siteOf(node *kvpb.Node) *site {
	for _, st := range s.sites {
		if st.node.Address == node.Address {
			return st
		}
	}
	return nil
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
	again := func(ticks float64) { s.after(ticks, p, func() { p.dial(peer) }) }
	if peer.ended || peer.stream != nil {
		return
	}
	target := peer.next()
	to := s.siteOf(target.node)
	if to == nil || to.cur == nil || s.isCut(p.site, to) || s.isCut(to, p.site) {
		again(5 + 15*s.rng.Float64())
		return
	}
	st := &simStream{from: p, to: to.cur, peer: peer, target: target, hello: p.n.hello()}
	st.hello.To = &kvpb.Peer{Node: target.node, RaftId: peer.raftID}
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
	if w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED && slices.Contains(p.removed, from.RaftId) {
		st.breakBoth()
		return
	}
	if peer := p.peers[from.RaftId]; w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED && peer != nil && peer.rival(from) {
		w.Verdict = kvpb.Verdict_VERDICT_RIVAL
	}
	if w.Verdict == kvpb.Verdict_VERDICT_ACCEPTED {
		if p.peers[from.RaftId] == nil {
			p.addPeer(from.RaftId, from.Node)
		}
		p.peers[from.RaftId].claimed(&moveHint{st.hello.ClusterId, from})
		for _, id := range slices.Sorted(maps.Keys(p.inbound)) {
			if id != from.RaftId && p.members[id] != nil {
				w.Peers = append(w.Peers, p.inbound[id].hello.From)
			}
		}
		if old := p.inbound[from.RaftId]; old != nil && old != st {
			old.closed = true
			s.after(s.latency(), nil, old.broken)
		}
		p.inbound[from.RaftId] = st
		p.n.peerUp(from.RaftId, false)
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
	if !st.target.answers(peer.raftID, w) {
		p.s.trace("%v is refused by %s: %v", p, p.s.name(w.Peer.RaftId), w.Verdict)
		p.s.count["refused"]++
		if st.target.hint == nil {
			p.n.refused(st.hello.From.RaftId, peer.raftID, w)
		}
		st.close()
		st.broken()
		return
	}
	p.s.trace("%v has a stream to %v", p, st.to)
	p.s.count["streams"]++
	peer.life, peer.at = w.Peer.Life, st.target.node
	p.n.peerUp(peer.raftID, true)
	if st.target.hint != nil {
		p.s.count["found elsewhere"]++
		p.n.peerMoved(peer.raftID, st.target.node)
	} else {
		peer.claim = nil
	}
	if old := p.inbound[peer.raftID]; old != nil && peer.rival(old.hello.From) {
		old.breakBoth()
	}
	for _, at := range w.Peers {
		if other := p.peers[at.RaftId]; other != nil && other.life == 0 && p.inbound[at.RaftId] == nil {
			other.claimed(&moveHint{st.hello.ClusterId, at})
		}
	}
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
			p.n.peerDown(peer.raftID, true)
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
func (p *proc) send(to uint64, ms []*raftpb.Message) {
	s, peer := p.s, p.peers[to]
	if peer == nil || peer.life == 0 || peer.stream == nil {
		s.count["messages unsent"] += len(ms)
		return
	}
	for _, m := range ms {
		p.promises(m)
	}
	st := peer.stream
	if st.queued+len(ms) > s.cfg.queue {
		s.count["queues full"]++
		p.n.peerDown(to, false)
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

// transmit gives a message to the network, which delivers it some time.
func (st *simStream) transmit(m *raftpb.Message) {
	s := st.from.s
	st.queued++
	at := s.now + int64(s.latency()*simTick)
	if !s.cfg.reorder || s.calm {
		at = max(at, st.last+1)
		st.last = at
	}
	s.schedule(at, nil, func() {
		if st.frozen {
			st.held = append(st.held, m)
			return
		}
		st.arrive(m)
	})
}

// arrive delivers messages in one turn.
func (st *simStream) arrive(ms ...*raftpb.Message) {
	s := st.from.s
	st.queued -= len(ms)
	to := st.to
	if s.cfg.crossLife && to.dead && to.site.cur != nil {
		to = to.site.cur
	}
	all := func() {
		for _, m := range ms {
			st.deliver(to, m)
		}
		to.wake()
	}
	if s.isCut(st.from.site, st.to.site) || !s.at(to, all) {
		s.count["messages lost"] += len(ms)
	}
}

// freeze holds what arrives by a stream for a while, and then delivers it at once.
func (st *simStream) freeze(length float64) {
	s := st.from.s
	s.trace("FAULT: what %v sends to %v stalls for %.0f ticks", st.from, st.to, length)
	st.frozen = true
	s.after(length, nil, func() {
		held := st.held
		st.frozen, st.held = false, nil
		s.count["messages held"] += len(held)
		if len(held) > 0 {
			st.arrive(held...)
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
	if st.from.dead && st.from.site.cur != nil && st.from.site.cur.raftID == st.from.raftID {
		s.count["messages of ended processes"]++
	}
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
	term     uint64
	hello    *kvpb.Hello
	v        *view
	data     []byte
	ended    bool
	replaced bool
}

// sendSnapshot implements transport.
func (p *proc) sendSnapshot(to, term uint64, v *view) {
	s, peer := p.s, p.peers[to]
	if peer == nil {
		p.n.snapshotSent(to, v, errors.New("no stream to the peer"))
		s.after(0, p, p.wake)
		return
	}
	t := &transfer{from: p, peer: peer, term: term, v: v}
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
	node := oneOf(t.peer.life != 0, t.peer.at, t.peer.node)
	st := s.siteOf(node)
	t.data, t.hello = bytesOf(t.v), p.n.hello()
	t.hello.To = &kvpb.Peer{Node: node, RaftId: t.peer.raftID, Life: t.peer.life}
	s.after(500, nil, func() { t.end(errors.New("the receiver is silent")) })
	if st != nil {
		t.to = st.cur
	}
	if t.to == nil || s.isCut(p.site, st) || s.isCut(st, p.site) {
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
	from := t.hello.From.RaftId
	if w := p.n.accept(t.hello); w.Verdict != kvpb.Verdict_VERDICT_ACCEPTED || p.inbound[from] == nil {
		t.lose("as it was refused")
		return
	}
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
	s.after(s.latency()*max(10, s.cfg.transfer), nil, func() {
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
	if t.v.givenUp.Load() && s.rng.IntN(2) == 0 { // or all of it was sent before that
		s.count["snapshots given up"]++
		t.end(errTooSlow)
		return
	}
	if !bytes.Equal(t.data, bytesOf(t.v)) {
		s.failf("a view of %v has changed while it was open", t.from)
	}
	var st *store
	var err error
	if p.disk == nil {
		st, err = p.n.readSnapshot(bytes.NewReader(t.data))
	} else {
		p.onDisk(func() { st, err = p.n.readSnapshot(bytes.NewReader(t.data)) })
	}
	if err != nil && !p.broken {
		s.failf("a snapshot of %v cannot be read: %v", t.from, err)
	} else if err != nil {
		return
	}
	if s.cfg.forget {
		clear(st.proposers)
	}
	if v := st.conf.Voters; s.cfg.wrongConf && len(v) > 1 {
		st.conf.Voters = v[:len(v)-1]
		delete(st.members, v[len(v)-1])
	}
	if s.cfg.again && st.index > 2 {
		st.index--
	}
	if s.cfg.strangers {
		st.sessions = newSessions()
	}
	delete(p.receiving, t.hello.From.RaftId)
	p.n.inbox.event(func() {
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
	s        *sim
	id       int
	n        int
	op       *op // the one that runs
	session  uint64
	sequence uint64
	past     []*op // some writes with ids, to be sent again
}

// op is a call of a client: one write, however often it is sent.
type op struct {
	client    int
	kind      string // set, delete, get, open
	key       string
	value     string
	id        *kvpb.RequestId
	session   uint64 // that it opens
	expected  *uint64
	record    []byte
	sent      *attempt // the one that it waits for
	begun     int64
	ended     int64  // 0: it was given up, or its outcome is not known
	version   uint64 // of the write, or of what was read
	found     bool
	compare   bool   // it failed
	atLeast   uint64 // version of the key that was known when it began
	committed uint64 // version of the write, as the oracle knows it
	unknown   bool   // the fate of an attempt is not
	failed    bool   // nothing was or will be applied
}

// attempt is an op on its way through a process.
type attempt struct {
	o *op
	c *call
	p *proc
}

func (o *op) String() string {
	return fmt.Sprintf("client %d: %s %s %.12s %v", o.client, o.kind, o.key, o.value, o.id)
}

// act makes a client's next call: a new one, or a past write once more.
func (c *caller) act() {
	s := c.s
	if s.quiet {
		s.after(s.expo(s.cfg.think), nil, c.act)
		return
	}
	if len(c.past) > 0 && s.rng.IntN(8) == 0 {
		c.op = c.past[s.rng.IntN(len(c.past))]
		c.op.failed = false
		s.count["calls repeated"]++
	} else {
		c.op = c.newOp()
		s.history = append(s.history, c.op)
		s.count["calls"]++
	}
	c.send(c.op)
}

// newOp draws a call.
func (c *caller) newOp() *op {
	s := c.s
	c.n++
	o := &op{client: c.id, key: fmt.Sprintf("k%d", s.rng.IntN(s.cfg.keys)), begun: s.tock()}
	o.atLeast = s.seen[o.key]
	w := &kvpb.Write{}
	switch k := s.rng.IntN(10); {
	case k < 6 && (c.session == 0 || s.rng.IntN(30) == 0):
		o.kind = "open"
		o.key = ""
		o.session = randomID()
		w = openWrite(o.session)
	case k < 5:
		o.kind = "set"
		o.value = fmt.Sprintf("%d.%d.%s", c.id, c.n, strings.Repeat(".", s.rng.IntN(s.cfg.valueBytes+1)))
		s.values[o.value] = o
		c.identify(o)
		if s.rng.IntN(4) == 0 {
			o.expected = new(s.seen[o.key] * uint64(min(1, s.rng.IntN(4))))
		}
		set := &kvpb.SetRequest{Key: o.key, Value: []byte(o.value), RequestId: o.id, ExpectedVersion: o.expected}
		w.Operation = &kvpb.Write_Set{Set: set}
	case k < 6:
		o.kind = "delete"
		c.identify(o)
		if o.id != nil && o.atLeast != 0 && s.rng.IntN(2) == 0 {
			o.expected = &o.atLeast
		}
		del := &kvpb.DeleteRequest{Key: o.key, RequestId: o.id, ExpectedVersion: o.expected}
		w.Operation = &kvpb.Write_Delete{Delete: del}
	default:
		o.kind = "get"
		return o
	}
	var err error
	if o.record, err = encodeWrite(w); err != nil {
		s.failf("%v: %v", o, err)
	}
	return o
}

// farAway is a sequence that no client gets to.
const farAway = 1 << 40

// identify gives most writes an id.
func (c *caller) identify(o *op) {
	s := c.s
	if s.rng.IntN(4) == 0 {
		return
	}
	if s.rng.IntN(50) == 0 { // a stranger's guess
		o.id = &kvpb.RequestId{Session: c.session, Sequence: farAway + s.rng.Uint64N(farAway)}
		s.ids[o.key2()] = o
		return
	}
	c.sequence += uint64(min(1+s.rng.IntN(2)*s.rng.IntN(3), s.cfg.answers))
	o.id = &kvpb.RequestId{Session: c.session, Sequence: c.sequence}
	s.ids[[2]uint64{c.session, c.sequence}] = o
	c.past = append(c.past, o)
	if len(c.past) > 6 {
		c.past = c.past[1:]
	}
}

// send sends an op through some node.
func (c *caller) send(o *op) {
	s, p := c.s, c.s.anyProc()
	if p == nil {
		s.after(s.expo(s.cfg.think), nil, func() { c.send(o) })
		return
	}
	a := &attempt{o: o, p: p, c: &call{write: o.record, done: make(chan outcome, 1)}}
	o.sent = a
	timeout := s.expo(s.cfg.timeout) + 1
	if s.rng.IntN(2) == 0 {
		a.c.wait = uint64(timeout)
	}
	s.after(timeout, nil, func() { c.timeout(a) })
	if o.kind == "get" {
		s.readLocal(p, o.key)
		if s.cfg.readNow {
			s.finishRead(a)
			return
		}
	}
	if err := p.n.inbox.call(a.c); err != nil {
		c.finish(a, outcome{err: err})
		return
	}
	p.calls = append(p.calls, a)
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
	for _, a := range calls {
		select {
		case out := <-a.c.done:
			p.s.clients[a.o.client].finish(a, out)
		default:
			if p.s.cfg.ackEarly && a.isProposedSet() {
				a.o.ended = p.s.tock()
				a.o.version = 0
				a.o.sent = nil
				p.s.clients[a.o.client].rest()
				continue
			}
			p.calls = append(p.calls, a)
		}
	}
}

// isProposedSet reports whether a client waits for a Set that raft has taken.
func (a *attempt) isProposedSet() bool {
	return a.o.kind == "set" && a.o.sent == a && a.c.state.Load() == callProposed
}

// timeout gives a call up, as server.call does.
func (c *caller) timeout(a *attempt) {
	if a.o.sent != a {
		return
	}
	c.s.count["calls given up"]++
	c.again(a, a.o.kind == "get" || a.c.state.CompareAndSwap(callQueued, callGivenUp))
}

// rest has the client make its next call some time.
func (c *caller) rest() {
	c.op = nil
	c.s.after(c.s.expo(c.s.cfg.think), nil, c.act)
}

// again sends a write with an id another time, for a while; of the last attempt
// it is known, or not, that it will not be applied.
func (c *caller) again(a *attempt, refused bool) {
	s, o := c.s, a.o
	o.sent = nil
	o.unknown = o.unknown || !refused
	if o.id != nil && s.rng.IntN(10) > 0 {
		s.after(s.expo(s.cfg.think), nil, func() { c.send(o) })
		return
	}
	c.giveUp(o)
}

// giveUp has the client go on without an answer. If all attempts were refused, nothing
// was or will be applied.
func (c *caller) giveUp(o *op) {
	o.failed = !o.unknown && o.ended == 0
	c.rest()
}

// finish takes the answer to a call.
func (c *caller) finish(a *attempt, out outcome) {
	s, o := c.s, a.o
	if o.sent != a {
		return // given up
	}
	switch {
	case errors.Is(out.err, errOutcomeUnknown):
		s.count["outcomes unknown"]++
		c.again(a, false)
	case out.err == errSessionUnknown, out.err == errSequenceTooOld, out.err == errSequenceTooFar:
		s.count["writes refused by session"]++
		if a.p.n.rn != nil && !s.mayRefuse(o, out.err) {
			s.failf("I8: %v is refused: %v", o, out.err)
		}
		if out.err != errSequenceTooOld && o.id.Session == c.session && o.id.Sequence < farAway {
			c.session, c.sequence = 0, 0
		}
		o.sent = nil
		c.giveUp(o)
	case out.err != nil:
		s.count["calls refused"]++
		c.again(a, true)
	case o.kind == "get":
		if s.rng.IntN(4) > 0 {
			s.finishRead(a)
		} else { // whoever waited wakes late
			s.after(s.expo(1), nil, func() {
				if o.sent == a && !a.p.dead {
					s.finishRead(a)
				}
			})
		}
	default:
		s.finishWrite(o, out.result)
		if o.kind == "open" {
			if a.p.n.rn != nil && !s.oracle.opened[o.session] {
				s.failf("I8: %v was acknowledged, and session %d was never opened", o, o.session)
			}
			c.session, c.sequence = o.session, 0
		}
		o.sent = nil
		c.rest()
	}
}

// mayRefuse reports whether a write's session is a reason to refuse it.
func (s *sim) mayRefuse(o *op, err error) bool {
	_, ses := s.oracle.sessionOf(o.id.Session)
	switch err {
	case errSessionUnknown:
		return ses == nil
	case errSequenceTooOld:
		return ses == nil || s.tooOld(ses, o.id.Sequence)
	default: // errSequenceTooFar
		return s.oracle.tooFar[o.key2()]
	}
}

// finishWrite compares what was acknowledged with what is committed, and with
// what was acknowledged before.
func (s *sim) finishWrite(o *op, r result) {
	if o.ended != 0 {
		if before := (result{o.version, o.found, o.compare}); r != before && !s.cfg.ackEarly {
			s.failf("I8: %v was acknowledged with %+v, before that with %+v", o, r, before)
		}
		s.count["answers repeated"]++
		return
	}
	o.ended = s.tock()
	o.version = r.version
	o.found = r.found
	o.compare = r.compareFailed
	if r.version > s.oracle.version {
		s.count["acknowledged before seen"]++ // by a node that then left: checked at the end
	} else {
		s.checkAcknowledged(o, r)
	}
	s.seen[o.key] = max(s.seen[o.key], r.version)
	s.count["writes acknowledged"]++
}

// checkAcknowledged compares the answer to a write with what the oracle has of it.
func (s *sim) checkAcknowledged(o *op, r result) {
	first, ok := s.oracle.first[o.key2()]
	if o.id != nil && (!ok || r != first) {
		s.failf("I8: %v was acknowledged with %+v, its first answer is %+v, %v", o, r, first, ok)
	}
	if o.compare {
		return
	}
	ch := s.oracle.versions[r.version]
	isIts := ch.key == o.key && ch.value == o.value && ch.present == (o.kind == "set")
	if !isIts || ch.found != r.found {
		s.failf("I2: %v was acknowledged with version %d, found %v; committed is %+v", o, r.version, r.found, ch)
	}
}

// key2 is the id as the key of a map.
func (o *op) key2() [2]uint64 { return [2]uint64{o.id.GetSession(), o.id.GetSequence()} }

// finishRead reads, and checks that the key was in this state at some moment
// since the read began, and after all that anybody knew then.
func (s *sim) finishRead(a *attempt) {
	o := a.o
	o.sent = nil
	defer s.clients[o.client].rest()
	it, ok, err := a.p.n.store.get([]byte(o.key))
	if err != nil {
		o.failed = true
		return
	}
	o.ended = s.tock()
	o.version = it.version
	o.found = ok
	o.value = string(it.value)
	if !s.oracle.wasSo(o) {
		s.failf("I1: %v through %v is %.12q (%v) of version %d; when it began, version %d of the key was known",
			o, a.p, it.value, ok, it.version, o.atLeast)
	}
	s.seen[o.key] = max(s.seen[o.key], it.version)
	s.count["reads"]++
}

// wasSo reports whether a key was as a read has it, at a moment after which the version
// that was known when the read began had not been replaced yet.
func (o *oracle) wasSo(read *op) bool {
	history := o.keys[read.key]
	for i := len(history) - 1; i >= -1; i-- {
		state := change{} // before the first change: no such key
		if i >= 0 {
			state = history[i]
		}
		if !state.isFoundAs(read.found, read.version, read.value) {
			continue
		}
		next := i + 1
		return next == len(history) || history[next].version > read.atLeast
	}
	return false
}

// isFoundAs reports whether a read finds what a change has left.
func (c change) isFoundAs(found bool, version uint64, value string) bool {
	if !c.present || !found {
		return c.present == found
	}
	return c.version == version && c.value == value
}

// readLocal reads without asking anybody: something committed, and on one node
// nothing older than before.
func (s *sim) readLocal(p *proc, key string) {
	it, ok, err := p.n.store.get([]byte(key))
	if err != nil || !ok {
		return
	}
	ch := s.oracle.versions[it.version]
	isCommitted := ch.key == key && ch.value == string(it.value)
	if !isCommitted || it.version < p.version[key] {
		s.failf("I2: a local read of %s at %v is %.12q of version %d, committed is %+v; before it was version %d",
			key, p, it.value, it.version, ch, p.version[key])
	}
	p.version[key] = it.version
	s.count["local reads"]++
}

// admin is an operator's request. Its steps are taken in the loop of whoever leads
// until it is answered, as server.onLeader has it.
type admin struct {
	what     string
	steps    func(n *node) func(*leaderState) nextStep
	done     func(p *proc)        // called in the loop that answers
	again    func(err error) bool // whether it is asked again; nil: it is not
	isTrue   func(err error) bool // whether an answer is; nil: any is
	then     func(error)
	begun    int64 // as calls are ordered
	deadline int64
	p        *proc
	term     uint64 // of whoever answered
	c        *pendingRequest
	cancel   func()
}

// errNotNow is of requests that an operator would not make now.
var errNotNow = errors.New("not now")

// request starts an operator's request.
func (s *sim) request(a *admin, ticks float64) {
	s.trace("an operator wants to %s", a.what)
	s.count["requests"]++
	a.begun, a.deadline = s.tock(), s.now+int64(ticks*simTick)
	s.admins = append(s.admins, a)
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
			asksAnother := errors.Is(err, errNotLeader) || errors.Is(err, errStopping) || errors.Is(err, errNotInitialized)
			if asksAnother {
				break
			}
			s.judge(a, err)
			if a.again == nil || !a.again(err) {
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
		if p.n.status.latest.Load().leading && !p.paused {
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
	r := &request{n: n, next: a.steps(n)}
	a.c = &pendingRequest{ctx: ctx, done: make(chan error, 1), poll: func() (bool, error) { return a.advance(r) }}
	n.inbox.event(func() { n.calls.requests = append(n.calls.requests, a.c) })
	a.p.wake()
	return false, nil
}

// advance is request.poll, with the bugs of answering too early.
func (a *admin) advance(r *request) (done bool, err error) {
	p := a.p
	if p.s.cfg.cached {
		r.witness = p.witness
	}
	if p.s.cfg.unsettled && r.n.leads() {
		done, err = r.n.perform(r.next(r.n.leaderState())).answer()
	} else {
		done, err = r.poll()
	}
	p.witness = r.witness
	a.term = r.n.raft.term
	if done && err == nil && a.done != nil {
		a.done(p)
	}
	return done, err
}

// judge checks an answer to an operator. It is given by a leader that no other had
// taken the place of when he asked, and true of some moment since.
func (s *sim) judge(a *admin, err error) {
	for _, term := range slices.Sorted(maps.Keys(s.oracle.terms)) {
		committedAt := s.oracle.terms[term]
		if term > a.term && committedAt < a.begun {
			s.failf("the request to %s is answered with %v in term %d, when one of term %d had committed before",
				a.what, err, a.term, term)
		}
	}
	if a.isTrue != nil && !a.isTrue(err) {
		s.failf("the request to %s is answered with %v, which is not true of any moment since", a.what, err)
	}
	s.count["answers to operators judged"]++
}

// addLearner is server.addLearner.
func (s *sim) addLearner(st *site, then func(error)) {
	var raftID uint64
	at := st.node
	a := &admin{what: fmt.Sprintf("add learner %d", st.node.Id), then: then}
	a.steps = func(n *node) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep {
			if raftID == 0 || n.store.members[raftID] == nil && s.rng.IntN(50) == 0 { // he asks once, or again
				if from := s.sites[n.self.Id-1]; st.cur == nil || st.cur.paused || s.isCut(from, st) || s.isCut(st, from) {
					return failStep(errNotNow)
				}
				raftID, at = st.cur.n.accept(n.hello()).Peer.RaftId, st.node
				st.cur.wake()
			}
			return l.learnerStep(raftID, at)
		}
	}
	a.again = func(err error) bool {
		if err != errPastLife {
			return false
		}
		raftID = 0
		return true
	}
	a.isTrue = func(err error) bool {
		return err != nil || s.oracle.held(a.begun, func(e era) bool {
			lives, _ := e.livesOf(st.node.Id)
			return lives == 1 && proto.Equal(e.members[raftID], at)
		})
	}
	s.request(a, 150)
}

// changeMembership is server.changeMembership.
func (s *sim) changeMembership(req *kvpb.ChangeMembershipRequest, then func(error)) {
	if err := validateChange(req); err != nil {
		s.failf("the operator wants what cannot be: %v", err)
	}
	a := &admin{what: fmt.Sprintf("have voters %v, retain %v, without %v, promote %v, demote %v, expecting %v",
		req.Members, req.Retain, req.Remove, req.Promote, req.Demote, describeExpected(req.Expected))}
	a.steps = func(n *node) func(*leaderState) nextStep {
		return func(l *leaderState) nextStep {
			if want, err := l.votersToBe(req); err == nil && !s.cfg.reckless && !isJoint(n.store.conf) && !s.remain(want, nil) {
				return failStep(errNotNow) // an operator would not
			}
			return l.membershipStep(req)
		}
	}
	a.done = func(p *proc) {
		if p.confAt > s.told.index {
			s.told = established{p.confAt, p.n.store.conf, p.n.store.removed}
		}
	}
	a.isTrue = func(err error) bool {
		s.count["changes answered: "+cmp.Or(errorReason(err), oneOf(err == nil, "done", "other"))]++
		switch {
		case err == nil:
			return s.oracle.held(a.begun, func(e era) bool { return e.fulfils(req) })
		case errorReason(err) == "UNKNOWN_MEMBER":
			return s.oracle.held(a.begun, func(e era) bool { return e.lacks(req) })
		case errorReason(err) == "MEMBERSHIP_CHANGED":
			return s.oracle.held(a.begun, func(e era) bool {
				another := !isJoint(e.conf) && !proto.Equal(e.membership(), req.Expected)
				return another && (!e.fulfils(req) || e.lacks(req)) // to remove who never was there is no success
			})
		}
		return true
	}
	a.then = func(err error) {
		if err == nil {
			s.after(s.expo(2), nil, s.dismiss)
		}
		then(err)
	}
	s.request(a, 150)
}

// describeExpected is not protobuf's text, which is unstable on purpose.
func describeExpected(m *kvpb.Membership) (text string) {
	for _, e := range m.GetMembers() {
		text += fmt.Sprintf("%d %v ", e.Node.Id, e.Voter)
	}
	return text
}

// dismiss has an operator end the processes of nodes that are no members any more,
// as far as he was told, and delete what they have kept.
func (s *sim) dismiss() {
	if s.calm {
		return
	}
	for _, st := range s.sites {
		was := st.keeps()
		if st.cur != nil {
			was = st.cur.n.id.raftID
		}
		if !slices.Contains(s.told.removed, was) {
			continue
		}
		s.trace("an operator ends node %d for good", st.node.Id)
		s.count["dismissed"]++
		if st.fs != nil {
			st.fs = newSimFS()
		}
		if st.cur != nil {
			st.cur.die(s.expo(s.cfg.outage))
		}
	}
}

// transferLeader is server.TransferLeader.
func (s *sim) transferLeader(nodeID uint64) {
	a := &admin{what: fmt.Sprintf("have %d lead", nodeID), then: func(error) {}}
	a.steps = func(*node) func(*leaderState) nextStep { return (&leaderTransfer{to: nodeID}).step }
	a.isTrue = func(err error) bool { return err != nil || a.p.n.self.Id == nodeID }
	s.request(a, 100)
}

// boot makes the cluster, as server.Init does: no faults before that is done.
func (s *sim) boot() {
	p := s.sites[0].cur
	p.n.inbox.event(func() {
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
	if len(s.admins) >= s.cfg.operators {
		return
	}
	st := s.sites[s.rng.IntN(len(s.sites))]
	switch s.rng.IntN(5) {
	case 0:
		s.transferLeader(st.node.Id)
	case 1, 2:
		s.addLearner(st, func(error) {})
	default:
		req := s.drawChange(st)
		isNothing := len(req.Members)+len(req.Promote)+len(req.Demote)+len(req.Remove) == 0
		expectsNobody := req.Expected != nil && len(req.Expected.Members) == 0
		if !isNothing && !expectsNobody {
			s.changeMembership(req, func(error) {})
		}
	}
}

// drawChange draws a change of membership, some of which are about one site.
func (s *sim) drawChange(one *site) *kvpb.ChangeMembershipRequest {
	req := &kvpb.ChangeMembershipRequest{Retain: s.rng.IntN(2) == 0}
	some := s.anyProc()
	for _, st := range s.sites {
		if some == nil {
			continue
		}
		isMember := len(some.n.store.raftIDsOf(st.node.Id)) > 0
		if !isMember && s.rng.IntN(10) > 0 {
			continue
		}
		if s.rng.IntN(3) > 0 {
			req.Members = append(req.Members, st.node.Id)
		} else if s.rng.IntN(4) == 0 {
			req.Remove = append(req.Remove, st.node.Id)
		}
	}
	if s.rng.IntN(4) == 0 { // all but some
		req.Members = nil
		req.Remove = append(req.Remove, one.node.Id)
		slices.Sort(req.Remove)
		req.Remove = slices.Compact(req.Remove)
	}
	if s.cfg.anchored() {
		anchor := s.sites[0].node.Id
		req.Remove = slices.DeleteFunc(req.Remove, func(id uint64) bool { return id == anchor })
		if len(req.Members) > 0 && req.Members[0] != anchor {
			req.Members = slices.Insert(req.Members, 0, anchor)
		}
	}
	if s.rng.IntN(3) == 0 { // in terms of what changes
		req.Promote = req.Members
		req.Members = nil
		req.Retain = false
		if len(req.Promote) > 1 && s.rng.IntN(2) == 0 {
			req.Demote, req.Promote = req.Promote[:1], req.Promote[1:]
		}
	}
	if some != nil && s.rng.IntN(2) == 0 {
		req.Expected = era{conf: some.n.store.conf, members: some.n.store.members}.membership()
	}
	return req
}

// remain reports whether a majority of voters still has its memory once a
// process, if any, has lost it.
func (s *sim) remain(voters []uint64, without *proc) bool {
	n := 0
	for _, st := range s.sites {
		raftID := st.keeps()
		if p := st.cur; p != nil {
			raftID = p.n.id.raftID
			if p == without || p.n.rn == nil {
				continue
			}
		}
		if slices.Contains(voters, raftID) {
			n++
		}
	}
	return len(voters) == 0 || n > len(voters)/2
}

// mayLose reports whether a process may lose its memory: a majority remains in
// both halves of every configuration that a member has applied, or will if the
// changes in its log are committed; but for those before the one that operators
// were told of last. Nodes that have not healed count as lost.
func (s *sim) mayLose(p *proc) bool {
	for _, st := range s.sites {
		if st.cur == nil && st.keeps() != 0 {
			return false // nobody knows what it has applied
		}
	}
	newest := &store{}
	for _, q := range s.alive() {
		if q.n.rn == nil {
			continue
		}
		if q.site.keeps() != 0 && q.confAt > max(s.told.index, q.written.HardState.GetCommit()) {
			return false // started again, it may count on who votes no more
		}
		if q.n.store.index > newest.index {
			newest = q.n.store
		}
	}
	for _, q := range s.alive() {
		if q.n.rn == nil || newest.members[q.n.id.raftID] == nil {
			continue
		}
		for _, cs := range s.configurations(q) {
			if !s.remain(cs.GetVoters(), p) || !s.remain(cs.GetVotersOutgoing(), p) {
				return false
			}
		}
	}
	return true
}

// configurations are the one that a member has applied, or that operators were told of
// since, and those that follow if all of its log is committed.
func (s *sim) configurations(p *proc) []*raftpb.ConfState {
	from, cs := p.n.store.index, p.n.store.conf
	if s.told.index > from {
		from, cs = s.told.index, s.told.conf
	}
	all := []*raftpb.ConfState{cs}
	for i := from + 1; i <= p.n.log.last(); i++ {
		e := p.entry(i)
		if e.GetType() == raftpb.EntryNormal {
			continue
		}
		cc, _, err := decodeConfChange(e)
		if err != nil {
			continue
		}
		next, err := tryConfChange(cs, cc)
		if err != nil {
			continue
		}
		cs = next
		all = append(all, cs)
	}
	return all
}

// fault makes something go wrong, some time after the last fault.
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
	if s.cause(kind, p, s.expo(s.cfg.outage)) {
		s.count["fault: "+kind]++
	} else {
		s.count["fault not allowed: "+kind]++
	}
}

// cause makes something go wrong with a process, or with the whole network. A fault that
// would lose the cluster by right, or that finds nothing to break, is not allowed.
func (s *sim) cause(kind string, p *proc, length float64) (allowed bool) {
	switch kind {
	case "kill", "stop", "pause", "rate":
		return s.disturb(kind, p, length)
	case "power", "all", "disk", "stall", "wipe", "forget":
		return s.breakMemory(kind, p, length)
	case "move":
		return p.move(length)
	default:
		return s.breakNetwork(kind, p, length)
	}
}

// disturb ends a process, or has it run badly.
func (s *sim) disturb(kind string, p *proc, length float64) (allowed bool) {
	switch kind {
	case "kill":
		if p.site.keeps() == 0 && !s.mayLose(p) {
			return false
		}
		p.die(length)
	case "stop":
		if p.site.keeps() == 0 && !s.mayLose(p) || p.paused {
			return false
		}
		p.stop(length)
	case "pause":
		if p.paused {
			return false
		}
		s.trace("FAULT: %v is stopped for %.0f ticks", p, length)
		p.paused = true
		s.after(length, nil, p.goOn)
	case "rate":
		p.rate = .3 + 2*s.rng.Float64()
		s.trace("FAULT: a tick of %v takes %.2f", p, p.rate)
	}
	return true
}

// breakMemory has something happen to disks, or to all that was not on them.
func (s *sim) breakMemory(kind string, p *proc, length float64) (allowed bool) {
	durable := p.site.keeps() != 0
	switch kind {
	case "power":
		if !durable {
			return false
		}
		if s.rng.IntN(2) == 0 {
			p.losePower(length)
		} else {
			p.doomed = length
		}
	case "all":
		found := false
		for _, p := range s.alive() {
			if p.site.keeps() != 0 {
				found = true
				p.losePower(length)
			}
		}
		return found
	case "disk":
		if p.disk == nil {
			return false
		}
		p.breakDisk(s.rng.IntN(40), simFault(s.rng.IntN(int(faultCrash))))
	case "stall":
		if p.disk == nil {
			return false
		}
		s.trace("FAULT: the disk of %v stalls for %.0f ticks", p, length)
		p.site.slow = s.now + int64(length*simTick)
	case "wipe":
		if !durable || !s.mayForget(p) {
			return false
		}
		s.trace("FAULT: %v loses its disk", p)
		p.site.fs = newSimFS()
		p.die(length)
	case "forget":
		if !durable || !s.mayForget(p) {
			return false
		}
		s.trace("FAULT: %v is started without its disk", p)
		p.site.forgets = true
		p.die(length)
		s.after(length+s.expo(s.cfg.outage), nil, func() { s.remember(p.site) })
	}
	return true
}

// mayForget reports whether a process with a disk may be started without what is on
// it. Where members move it may not, for one that has moved would not be found.
func (s *sim) mayForget(p *proc) bool { return !s.cfg.anchored() && s.mayLose(p) }

// move has a node be started at another address.
func (p *proc) move(length float64) (allowed bool) {
	st := p.site
	if st.i == 0 || st.keeps() == 0 {
		return false
	}
	p.die(length)
	if st.keeps() != 0 {
		st.moves++
		st.node = &kvpb.Node{Id: st.node.Id, Address: fmt.Sprintf("node%d:%d", st.node.Id, st.moves+1)}
		p.s.trace("node %d moves to %s", st.node.Id, st.node.Address)
	}
	return true
}

// breakNetwork has messages be lost or late, or streams break.
func (s *sim) breakNetwork(kind string, p *proc, length float64) (allowed bool) {
	switch kind {
	case "freeze":
		found := false
		for _, id := range slices.Sorted(maps.Keys(p.peers)) {
			st := p.peers[id].stream
			if st != nil && !st.frozen && s.rng.IntN(2) == 0 {
				found = true
				st.freeze(length)
			}
		}
		return found
	case "drop":
		ids := slices.Sorted(maps.Keys(p.peers))
		if len(ids) == 0 {
			break
		}
		if st := p.peers[ids[s.rng.IntN(len(ids))]].stream; st != nil {
			s.trace("FAULT: the stream from %v to %v breaks", st.from, st.to)
			st.breakBoth()
		}
	case "loss":
		s.trace("FAULT: messages are lost for %.0f ticks", length)
		s.lossNow = .1 + .6*s.rng.Float64()
		s.after(length, nil, func() { s.lossNow = 0 })
	case "slow":
		s.trace("FAULT: the network is slow for %.0f ticks", length)
		s.slowNow = .3
		s.after(length, nil, func() { s.slowNow = 0 })
	case "unplug":
		for _, q := range s.alive() {
			if q.n.raft.role == raft.StateLeader {
				p = q
			}
		}
		s.partition(kind, p.site, length)
	default:
		s.partition(kind, p.site, length)
	}
	return true
}

// remember has a site be started with its disk again, once its process may go.
func (s *sim) remember(st *site) {
	if s.calm {
		return
	}
	switch p := st.cur; {
	case p == nil:
		st.forgets = false
	case s.mayLose(p):
		s.trace("%v is to be started with the disk again", p)
		p.die(s.expo(10))
		st.forgets = false
	default:
		s.after(20, nil, func() { s.remember(st) })
	}
}

// partition cuts pairs of sites for a while.
func (s *sim) partition(kind string, one *site, length float64) {
	var pairs [][2]int
	side := make([]bool, len(s.sites))
	for i := range side {
		if kind == "split" {
			side[i] = s.rng.IntN(2) == 0
		} else {
			side[i] = i == one.i
		}
	}
	oneWay := kind == "one-way"
	out, in := true, true
	if oneWay {
		out = s.rng.IntN(2) == 0
		in = !out
	}
	for i := range side {
		for j := range side {
			leaves, enters := side[i] && !side[j], side[j] && !side[i]
			if (!leaves || !out) && (!enters || !in) {
				continue
			}
			if oneWay && s.rng.IntN(3) == 0 { // some still get through
				continue
			}
			pairs = append(pairs, [2]int{i, j})
			s.cut[i][j]++
		}
	}
	s.trace("FAULT: nothing gets from → to: %v for %.0f ticks", pairs, length)
	for _, p := range s.alive() {
		for _, id := range slices.Sorted(maps.Keys(p.peers)) {
			st := p.peers[id].stream
			if st == nil || !s.isCut(p.site, st.to.site) {
				continue
			}
			if kind == "unplug" {
				s.after(0, nil, st.breakBoth) // who leads there learns last that he does not
			} else if s.rng.IntN(2) == 0 {
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

// breakDisk makes a call to the file system fail, after some others.
func (p *proc) breakDisk(calls int, fault simFault) {
	fs := p.site.fs
	p.s.trace("FAULT: the disk of %v fails in %d calls: %d", p, calls, fault)
	fs.failAt, fs.fault = len(fs.calls)+1+calls, fault
}

// losePower ends a process in the middle of what its disk does, and what was
// not synced is gone, or torn.
func (p *proc) losePower(length float64) {
	s, st := p.s, p.site
	if len(p.disk.queue) > 0 {
		calls := 0 // it is written, and not synced
		if s.rng.IntN(2) == 0 {
			calls = s.rng.IntN(12)
		}
		p.breakDisk(calls, faultCrash)
		_ = p.disk.write()
	}
	p.die(length)
	s.count["power lost"]++
	r := s.rng
	if s.rng.IntN(3) == 0 {
		r = nil
	}
	st.fs = st.fs.lose(r)
}

// die ends a process at once; another starts after some ticks.
func (p *proc) die(length float64) {
	s, st := p.s, p.site
	s.trace("FAULT: %v dies for %.0f ticks", p, length)
	p.dead, st.cur = true, nil
	if st.fs != nil {
		st.fs = st.fs.restart(s.rng.IntN(2) == 0)
	}
	for _, a := range p.calls {
		if a.o.sent == a {
			s.clients[a.o.client].again(a, false)
		}
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
		n.inbox.event(func() { n.handOver(n.store.conf.GetVoters()) })
		p.wake()
	}
	s.after(5, p, func() {
		if s.calm || p.site.keeps() == 0 && !s.mayLose(p) {
			return
		}
		n.err = errStopping
		n.inbox.close()
		p.turn(0)
		n.calls.failAll(errStopping)
		p.poll()
		if p.disk != nil {
			p.disk.close()
		}
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

// all runs a cluster from its making to its healing.
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
	s.endFaults()
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
	s.checkFreshCalls()
	s.until(settleTicks, s.unequal)
}

// endFaults ends all faults, starts all processes, and lets what is late arrive.
func (s *sim) endFaults() {
	s.trace("all faults end")
	s.calm = true
	s.cfg.latency = min(s.cfg.latency, .3)
	s.cfg.transfer = min(s.cfg.transfer, 20) // or a member is too slow for the writes that go on
	for _, st := range s.sites {
		if st.fs != nil {
			s.late = max(s.late, st.slow) // what a disk is at, it goes on with
			st.fs.failAt = 0
			st.slow = 0
		}
		if st.cur == nil {
			s.start(st)
		}
		st.cur.rate = 1
		st.cur.doomed = 0
		st.cur.goOn()
	}
	s.begin()
	if s.late <= s.now+int64(6*s.cfg.latency*simTick) {
		return
	}
	// What is sent now waits behind what comes late: an election can be due that
	// nothing shows yet.
	for end := s.late + int64(2*s.cfg.election*simTick); s.now < end; {
		s.next()
	}
}

// checkFreshCalls makes calls that have to succeed, now that all has healed.
func (s *sim) checkFreshCalls() {
	// A fresh write through any member, and a read of it through all.
	members := s.members()
	o := &op{client: -1, kind: "set", key: "fresh", value: "fresh", begun: s.tock()}
	s.values[o.value] = o
	w, _ := encodeWrite(setWrite(o.key, o.value))
	s.finishWrite(o, s.ask(members[s.rng.IntN(len(members))], w))
	for _, p := range members {
		s.ask(p, nil)
		it, ok, err := p.n.store.get([]byte("fresh"))
		isFresh := ok && it.version == o.version
		if err != nil || !isFresh {
			s.failf("I9: a fresh read through %v: %v, %v, %v; want version %d", p, it, ok, err, o.version)
		}
	}
	// A retry through each of them takes effect once.
	id := randomID()
	w, _ = encodeWrite(openWrite(id))
	s.ask(members[0], w)
	o = &op{client: -1, kind: "set", key: "once", value: "once", begun: s.tock()}
	o.id = &kvpb.RequestId{Session: id, Sequence: 1}
	s.values[o.value] = o
	w, _ = encodeWrite(withID(id, 1, setWrite(o.key, o.value)))
	for _, p := range members {
		s.finishWrite(o, s.ask(p, w))
	}
}

// until runs until f has nothing to complain about.
func (s *sim) until(ticks float64, f func() string) {
	deadline := s.now + int64(ticks*simTick)
	for next := s.now; ; s.next() {
		if s.now < next {
			continue
		}
		next += 10 * simTick
		why := f()
		if why == "" {
			return
		}
		if s.now > deadline {
			s.failf("I9: after %v ticks without a fault %s", ticks, why)
		}
	}
}

// ask makes a call that must succeed.
func (s *sim) ask(p *proc, record []byte) (r result) {
	c := &call{write: record, done: make(chan outcome, 1)}
	if err := p.n.inbox.call(c); err != nil {
		s.failf("I9: %v", err)
	}
	p.wake()
	s.until(settleTicks, func() string {
		select {
		case o := <-c.done:
			if errors.Is(o.err, errNoLeader) { // it was stopped until now: not applied, so once more
				c = &call{write: record, done: make(chan outcome, 1)}
				_ = p.n.inbox.call(c)
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
	return slices.DeleteFunc(s.alive(), func(p *proc) bool { return p.n.rn == nil || p.astray() })
}

// astray reports whether a process cannot know that it was removed: too few of the
// voters that it knows are where it knows them, and could say so. An operator sees
// in status that the others do not list it.
func (p *proc) astray() bool {
	n := p.n
	others, told := 0, 0
	for _, id := range n.store.conf.GetVoters() {
		if id == p.raftID {
			continue
		}
		others++
		node := n.store.members[id]
		st := p.s.siteOf(node)
		if st == nil || st.cur == nil || st.node.Id != node.Id {
			continue
		}
		if slices.Contains(st.cur.n.store.removed, p.raftID) {
			told++
		}
	}
	return n.raft.lead == 0 && told <= others/2
}

// restartStray is what an operator does with a node that cannot know that its life was
// removed, while another life of it is a member still: he starts it without what it has.
func (s *sim) restartStray(p, leader *proc) {
	members := leader.n.store
	isFound := slices.ContainsFunc(members.raftIDsOf(p.site.node.Id), func(id uint64) bool {
		return proto.Equal(members.members[id], p.site.node) // one that has moved is not, without what it has
	})
	if !isFound || p.n.rn == nil || p.n.election.leaderlessTicks < 4*p.n.electionTicks() {
		return
	}
	s.count["strays restarted"]++
	if p.site.fs != nil {
		p.site.fs = newSimFS()
	}
	p.die(5)
}

// unsettled says what is not as it shall be without faults; empty: all is.
func (s *sim) unsettled() string {
	var leader *proc
	for _, p := range s.alive() {
		if p.n.rn != nil && p.n.raft.role == raft.StateLeader {
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
		stranger := !proto.Equal(members[p.n.id.raftID], p.site.node)
		if stranger && p.astray() {
			s.restartStray(p, leader)
			continue
		}
		if p.n.rn == nil {
			continue
		}
		if stranger {
			return fmt.Sprintf("%v is in the cluster, but no member of it: %s", p, s.overview())
		}
		if why := p.n.whyUnhealthy(); why != "" {
			return fmt.Sprintf("%v is unhealthy, %s: %s", p, why, s.overview())
		}
	}
	n := len(s.members())
	if n != len(members) || isJoint(leader.n.store.conf) || len(s.admins) > 0 {
		return fmt.Sprintf("there are %d members, %d of them alive, requests %v: %s",
			len(members), n, len(s.admins), s.overview())
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
		fmt.Fprintf(&b, "\n  %v %v term %d lead %s", p, st.RaftState, st.GetTerm(), s.name(st.Lead))
		fmt.Fprintf(&b, " applied %d commit %d log %d-%d;", n.store.index, st.GetCommit(), n.log.prevIndex+1, n.log.last())
		fmt.Fprintf(&b, " voters %v outgoing %v", names(cs.GetVoters()), names(cs.GetVotersOutgoing()))
		fmt.Fprintf(&b, " learners %v next %v;", names(cs.GetLearners()), names(cs.GetLearnersNext()))
		fmt.Fprintf(&b, " connected %v", names(slices.Sorted(maps.Keys(n.peers.connected))))
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
			it, ok, err := st.get([]byte(key))
			if err != nil || !want.isFoundAs(ok, it.version, string(it.value)) {
				s.failf("I5: %s at %v is %v, %v, %v; want %+v", key, p, it, ok, err, want)
			}
			if ok {
				present++
			}
		}
		var kept []uint64
		for _, ses := range st.sessions.all() {
			kept = append(kept, ses.id)
		}
		if !slices.EqualFunc(o.sessions, kept, func(ses *modelSession, id uint64) bool { return ses.id == id }) {
			s.failf("I5: %v has sessions %d", p, kept)
		}
		if st.keys != present || st.version != o.version || o.conf.Equivalent(st.conf) != nil {
			s.failf("I5: %v has %d keys, version %d, %v; want %d, %d, %v",
				p, st.keys, st.version, st.conf, present, o.version, o.conf)
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

// linearizable checks the history of each key, by porcupine (I1). Whether a write
// without an outcome took effect, and by when, the oracle knows.
func (s *sim) linearizable() {
	s.ownDeletes()
	histories := map[string][]porcupine.Operation{}
	for _, o := range s.history {
		if o.kind == "open" {
			continue
		}
		s.checkOutcome(o)
		tookEffect := o.compare || o.committed != 0
		if o.kind == "get" {
			tookEffect = o.ended != 0
		}
		if !tookEffect {
			continue
		}
		end := o.ended
		if o.kind != "get" && !o.compare {
			ch := s.oracle.versions[o.committed]
			end = cmp.Or(end, ch.at)
			o.version = ch.version
			o.found = ch.found
		}
		call := porcupine.Operation{ClientId: o.client, Input: o, Call: o.begun, Return: end}
		histories[o.key] = append(histories[o.key], call)
		s.count["calls checked"]++
	}
	model := porcupine.Model{Init: func() any { return keyState{} }, Step: stepKey}
	for _, key := range slices.Sorted(maps.Keys(histories)) {
		if !porcupine.CheckOperations(model, histories[key]) {
			s.failf("I1: the history of %s is not linearizable", key)
		}
	}
}

// checkOutcome compares what a client was told of its call in the end with what the
// oracle has of it.
func (s *sim) checkOutcome(o *op) {
	isAnswered := o.ended != 0
	if isAnswered && o.id != nil && !s.cfg.ackEarly {
		first := s.oracle.first[o.key2()]
		if first != (result{o.version, o.found, o.compare}) {
			s.failf("I8: %v was acknowledged with version %d, its first answer is %+v", o, o.version, first)
		}
	}
	if isAnswered && o.kind != "get" && !o.compare {
		if o.committed == 0 {
			s.failf("I2: %v was acknowledged, but never committed", o)
		}
		isIts := o.version == o.committed && o.found == s.oracle.versions[o.committed].found
		if o.kind == "set" && !isIts && !s.cfg.ackEarly {
			s.failf("I2: %v was acknowledged with version %d, but is version %d", o, o.version, o.committed)
		}
	}
	if (o.failed || o.compare) && o.committed != 0 {
		s.failf("%v was refused, but committed", o)
	}
}

// ownDeletes finds a call for each committed delete: deletes are all alike, so
// one that nobody was told of is given to the first call that may have been it.
func (s *sim) ownDeletes() {
	unknown := map[string][]*op{}
	for _, o := range s.history {
		switch {
		case o.kind != "delete" || o.compare || o.committed != 0:
		case o.ended != 0:
			ch := s.oracle.versions[o.version]
			if ch.key != o.key || ch.present || ch.found != o.found {
				s.failf("I2: %v was acknowledged with version %d, which is %+v", o, o.version, ch)
			}
			o.committed, ch.op = o.version, o
			s.oracle.versions[o.version] = ch
		case o.id == nil && !o.failed:
			unknown[o.key] = append(unknown[o.key], o)
		}
	}
	for _, v := range slices.Sorted(maps.Keys(s.oracle.versions)) {
		ch := s.oracle.versions[v]
		if ch.op != nil || ch.key == "" {
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

// stepKey is a step of porcupine's model: whether a call may have had this answer, and
// what the key is then.
func stepKey(state, in, _ any) (bool, any) {
	k, o := state.(keyState), in.(*op)
	present := uint64(0)
	if k.present {
		present = k.version
	}
	switch {
	case o.kind == "get":
		isSame := o.value == k.value && o.version == k.version
		return o.found == k.present && (!k.present || isSame), k
	case o.compare:
		return o.version == present && *o.expected != present, k
	case o.expected != nil && *o.expected != present:
		return false, k
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
	w, _ := encodeWrite(setWrite(o.key, o.value))
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
		if it, _, err := p.n.store.get([]byte(o.key)); err != nil || string(it.value) != o.value {
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
			cfg := simConfig{
				nodes:       3,
				voters:      3,
				election:    10,
				logBytes:    64 << 10,
				limits:      defaultRaftLimits(),
				latency:     .1,
				queue:       1000,
				keys:        1,
				sessions:    4,
				answers:     4,
				adminEvery:  1e9,
				plantedBugs: plantedBugs{reuseID: reuse},
			}
			s := newSim(1, cfg, rand.New(rand.NewPCG(1, 1)), nil)
			err := s.try(s.loseMemory)
			switch {
			case !reuse && err != nil:
				t.Error(err)
			case reuse && err == nil:
				t.Error("nothing was lost")
			case reuse:
				t.Log(err)
			}
		})
	}
}

// TestSimulatorFindsBugs plants bugs and sees that they are found (I10).
func TestSimulatorFindsBugs(t *testing.T) {
	type bug struct {
		name  string
		plant func(*simConfig)
	}
	bugs := []bug{
		{"a raft ID used again", func(c *simConfig) { c.reuseID = true }},
		{"a read without ReadIndex", func(c *simConfig) { c.readNow = true }},
		{"a write acknowledged when it is proposed", func(c *simConfig) { c.ackEarly = true }},
		{"snapshots without proposers", func(c *simConfig) { c.forget = true }},
		{"batches applied again", func(c *simConfig) { c.twice = true }},
		{"answers before the disk has synced", func(c *simConfig) { c.ackUnsync, c.durable = true, 1 }},
		{"a hard state that does not get to the disk", func(c *simConfig) { c.dropVote, c.durable = true, 1 }},
		{"a vote that does not get to the disk", func(c *simConfig) { c.noVote, c.durable = true, 1 }},
		{"a read answered before it is applied", func(c *simConfig) { c.hasty = true }},
		{"a read of a leader that is not sure of its commits", func(c *simConfig) {
			c.early = true
			c.voters = 1
			c.durable = 1
			c.disk = .5
			c.clients = 6
			c.keys = 1
			c.think = .5
			c.faults = []string{"kill", "power"}
			c.faultEvery = 20
			c.outage = 3
			c.adminEvery = 1e9
		}},
		{"a write acknowledged for another's entry", func(c *simConfig) { c.byIndex = true }},
		{"snapshots without a voter", func(c *simConfig) { c.wrongConf = true }},
		{"snapshots whose last entry is applied again", func(c *simConfig) { c.again = true }},
		{"snapshots without sessions", func(c *simConfig) { c.strangers = true }},
		{"a retry applied twice", func(c *simConfig) { c.careless = true }},
		{"writes of one entry with one version", func(c *simConfig) { c.sameCount = true }},
		{"a change of membership answered before most know it", func(c *simConfig) {
			c.unsettled = true
			c.nodes = 5
			c.voters = 3
			c.latency = 2
			c.faults = []string{"kill", "wipe", "drop", "isolate"}
			c.faultEvery = 3
			c.adminEvery = 20
		}},
		{"an operator answered on the word of an earlier entry", func(c *simConfig) {
			c.cached = true
			c.nodes = 4
			c.voters = 3
			c.election = 30
			c.faults = []string{"unplug"}
			c.faultEvery = 60
			c.adminEvery = 2
			c.operators = 8
		}},
	}
	for _, tt := range bugs {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(*simBugs) {
				if _, err := simulate(t, seed+1, 6000, nil, tt.plant); err != nil {
					t.Logf("found with %d seeds: %s", seed+1, strings.SplitN(err.Error(), "\n", 2)[0])
					return
				}
			}
			t.Error("not found")
		})
	}
}

// TestMessagesAcrossLives has what was sent to a process reach the next one, addressed
// to it, and what a process sent arrive when the next one is there. With a new raft ID
// in each life, or with all that was promised on disk, that does no harm.
func TestMessagesAcrossLives(t *testing.T) {
	across, ended := 0, 0
	for seed := range uint64(80) {
		t.Run(fmt.Sprint(seed+1), func(t *testing.T) {
			s, err := simulate(t, seed+1, 4000, nil, func(c *simConfig) {
				c.crossLife, c.late, c.durable, c.faults = true, 1, float64(seed%2), append(c.faults, "kill", "kill")
				c.outage = 3 // so that the next process is there soon
			})
			if err != nil {
				t.Error(err)
			}
			across += s.count["messages across lives"]
			ended += s.count["messages of ended processes"]
		})
	}
	if across == 0 || ended == 0 {
		t.Errorf("there were %d to the next process, and %d of the one before", across, ended)
	}
	t.Logf("%d to the next process, %d of the one before", across, ended)
}
