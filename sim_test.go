// Ring 1, the simulator: the real Ready loop, store and log of several nodes over a
// simulated network and clock, in one goroutine and from one seed. It checks what must
// always hold, and replays exactly.
//
// A step is one event: a message, a tick, a call, an operator's request or a fault. This
// file has the world: events and time, sites and their processes, disks, the network, and
// a run from its start to its end. Beside it are:
//
//   - sim_clients_test.go: clients and operators, and what they call;
//   - sim_views_test.go: what clients list and scan, and what that shows;
//   - sim_watches_test.go: what clients watch, and what they are told;
//   - sim_levels_test.go: which programs nodes run;
//   - sim_starting_test.go: nodes that form clusters and join them by themselves;
//   - sim_quota_test.go: what may be stored, where sites have room for less;
//   - sim_space_test.go: disks that are about to be full;
//   - sim_faults_test.go: what goes wrong;
//   - sim_invariants_test.go: what must hold, and the oracle that knows it;
//   - sim_planted_test.go: bugs that are planted to see that they are found.

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
	rangeKeys     int     // that a DeleteRange deletes at most

	watches      int     // clients that watch
	passing      float64 // mean, until a node's watchers pass over what is new
	historyBytes uint64  // of past writes that a node keeps for watches

	levels bool   // nodes run programs of two levels
	fills  bool   // disks are about to be full now and then
	quota  uint64 // the least that a site lets the store become, others let it twice as large, or more; 0: there is none

	faultEvery float64 // mean, between two faults
	outage     float64 // mean, of a fault that lasts
	faults     []string

	adminEvery float64 // mean, between two requests of operators
	operators  int     // requests at a time
	reckless   bool    // operators ask for voters of whom a majority is dead

	formEvery float64 // mean, between two tries of a node to form a cluster of all sites; 0: it has no list
	joins     bool    // nodes ask to join, and operators need not add all

	plantedBugs
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
	c.rangeKeys = int(pick(1, 3, 3, 10))
	if rng.IntN(3) == 0 { // the tree has several pages
		c.keys = 40
	}
	c.watches = int(pick(0, 1, 3, 6))
	c.passing = pick(.1, 1, 10)
	c.historyBytes = uint64(pick(2<<10, 16<<10, defaultWatchBytes, defaultWatchBytes))
	c.levels = rng.IntN(2) == 0
	c.formEvery = pick(0, 20, 100)
	c.joins = rng.IntN(2) == 0
	if rng.IntN(4) == 0 { // clients would soon store far more
		c.quota = uint64(pick(1500, 4000))
		c.keys = 100
		c.valueBytes = 300
		c.clients = min(c.clients, 3)
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

func (q *eventQueue) Push(x any) { *q = append(*q, x.(*event)) }

func (q *eventQueue) Pop() any {
	e := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return e
}

// sim is a run.
type sim struct {
	cfg  simConfig
	seed uint64
	rng  *rand.Rand
	// fills is drawn from for disks that are about to be full alone.
	fills *rand.Rand

	// Time and what will happen.
	now   int64 // in units of which a tick has simTick
	seq   uint64
	step  uint64
	queue eventQueue

	// The world.
	sites   []*site
	list    []*kvpb.Node // all sites, as --initial-cluster names them
	cut     [][]int      // by site, from and to: how many partitions in force cut them
	lossNow float64      // probability that a message is lost, while a burst lasts
	slowNow float64      // probability that it is late
	late    int64        // when all has arrived that the network was given

	// How far the run is.
	running bool // faults have begun
	calm    bool // no more faults
	quiet   bool // no more calls
	wasLow  bool // a disk was about to be full

	// What nodes have done, to be compared with the oracle and with each other.
	oracle  oracle
	leaders map[uint64]uint64 // by term: the life of its leader
	lives   map[uint64]string // by raft ID and by life: the name of whose it was
	states  map[uint64]uint64 // by index: the hash of the state
	names   map[uint64]string // of raft IDs
	spoke   map[uint64]bool   // by raft ID: a process of the newer program went by it
	level   uint32            // the highest that any node has applied

	// Clients.
	clients []*caller // those that watch are the last ones
	watches []*simWatch
	values  map[string]*op    // by the value that they set
	ids     map[[2]uint64]*op // by session and sequence
	seen    map[string]uint64 // by key: the newest version that a client has been told of
	newest  uint64            // the newest version that a client has been told of
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

// newSim makes the world, and starts a process at each site.
func newSim(seed uint64, cfg simConfig, rng *rand.Rand, sink io.Writer) *sim {
	s := &sim{
		cfg:     cfg,
		seed:    seed,
		rng:     rng,
		fills:   rand.New(rand.NewPCG(seed, 0xf111)),
		sink:    sink,
		leaders: map[uint64]uint64{},
		lives:   map[uint64]string{},
		states:  map[uint64]uint64{},
		names:   map[uint64]string{},
		spoke:   map[uint64]bool{},
		level:   firstLevel,
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
		st.space.muteFrom = math.MaxInt64
		if cfg.quota != 0 {
			st.limit = cfg.quota * uint64(1+(i+int(seed))%3)
		}
		s.sites = append(s.sites, st)
		s.list = append(s.list, st.node)
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

// latency draws how long something takes on the network.
func (s *sim) latency() float64 {
	l := s.expo(s.cfg.latency)
	if !s.calm && (s.chance(s.cfg.spike) || s.chance(s.slowNow)) {
		l *= 20
	}
	s.late = max(s.late, s.now+int64(l*simTick))
	return l
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

// simLog puts the node's own log into the trace.
type simLog struct {
	s *sim
	p *proc
}

func (l *simLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

func (l *simLog) WithAttrs([]slog.Attr) slog.Handler { return l }

func (l *simLog) WithGroup(string) slog.Handler { return l }

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

// site is where a node runs, one process after another.
type site struct {
	i     int
	node  *kvpb.Node // another one whenever it has moved
	moves int
	cur   *proc  // the process that runs; nil: none does
	old   uint64 // the raft ID of the last process
	lives int    // how many raft IDs its processes have had
	most  uint64 // index of the last entry that it ever applied

	speaks uint32 // the level of the program that is installed; 0: the first
	// mustUpgrade: the next process is of the newer program.
	mustUpgrade bool
	limit       uint64 // how large a store it has room for

	fs      *simFS // nil: it has no disk
	slow    int64  // until then the disk does nothing
	space   siteSpace
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
	level        uint32
	applied      uint64
	confAt       uint64                   // index of the last change of membership applied
	version      map[string]uint64        // by key: what a local read has seen
	viewed       uint64                   // the version of the last view
	fresh        map[uint64]*raftpb.Entry // applied, and not yet observed

	// The transport.
	members   map[uint64]*kvpb.Node
	removed   []uint64
	peers     map[uint64]*simPeer
	inbound   map[uint64]*simStream
	receiving map[uint64]*transfer
	sending   []*transfer
	hellos    []*simStream // on their way to here
	rooms     []*kvpb.RoomReport
	told      map[uint64]toldLimit // by raft ID: what members have said that they have room for
	space     toldSpace
	proposed  map[uint64]uint64 // by sequence: the least limit that counted when it was proposed

	calls   []*attempt // that have not ended
	witness witness    // of the last operator's request

	watchers    *watchers
	willPass    bool   // they pass soon
	passing     bool   // they are at it
	interleaved bool   // something is done between two steps of theirs
	installed   uint64 // snapshots, before the last turn
	received    uint64 // index of the last snapshot that raft was given
	replacedAt  uint64 // index at which all came with a snapshot, or from the disk; 0: nothing has

	disk    *disk
	writing bool          // the disk is at work
	written kvpb.LogBatch // what the disk has of the log, in short: hard state and the last index
	broken  bool          // the disk has failed
	doomed  float64       // not 0: how long the power is lost once the disk writes
}

func (p *proc) String() string { return p.s.name(p.raftID) }

// established is the last membership that an operator was told of.
type established struct {
	index   uint64
	conf    *raftpb.ConfState
	removed []uint64
}

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

// members returns the processes that belong to the cluster.
func (s *sim) members() []*proc {
	return slices.DeleteFunc(s.alive(), func(p *proc) bool { return p.n.rn == nil || p.astray() })
}

// start starts a process at a site.
func (s *sim) start(st *site) {
	o := defaultOptions()
	o.heartbeat = 100 * time.Millisecond
	o.election = time.Duration(s.cfg.election) * 20 * time.Millisecond
	o.logBytes = s.cfg.logBytes
	o.watchBytes = s.cfg.historyBytes
	o.maxStoreBytes = st.limit
	o.id = st.node.Id
	s.installProgram(st)
	p := &proc{
		s:         s,
		site:      st,
		peers:     map[uint64]*simPeer{},
		inbound:   map[uint64]*simStream{},
		receiving: map[uint64]*transfer{},
		rate:      .8 + .4*s.rng.Float64(),
		fresh:     map[uint64]*raftpb.Entry{},
		told:      map[uint64]toldLimit{},
		proposed:  map[uint64]uint64{},
	}
	p.n = newNode(o, st.node, slog.New(&simLog{s: s, p: p}))
	p.n.net = p
	p.n.opts.onPropose = func(sequence uint64, data []byte) {
		p.checkRoom(sequence, data)
		p.checkSpace(sequence, data)
	}
	p.n.quota.plantedDeaf = s.cfg.deaf
	p.n.opts.onApply = func(e *raftpb.Entry) {
		p.fresh[e.GetIndex()] = e
		if e.GetType() != raftpb.EntryNormal {
			p.confAt = e.GetIndex()
		}
		if s.cfg.byIndex {
			p.acknowledge(e)
		}
	}
	p.speak()
	p.prepareStore()
	p.prepareWatchers()
	st.cur = p
	if old := st.old; old != 0 && s.cfg.reuseID {
		p.n.id.raftID = old
		if err := p.n.start(); err != nil {
			s.failf("starting under the old raft ID: %v", err)
		}
	}
	p.n.opts.limits = s.cfg.limits
	if st.fs != nil && !st.forgets && !p.openDisk() {
		p.die(s.expo(s.cfg.outage))
		return
	}
	if s.cfg.fills && p.disk != nil {
		s.after(1, p, p.look)
	}
	p.identify()
	s.trace("%v starts at %s", p, st.node.Address)
	s.after(s.rng.Float64(), p, p.tick)
	p.formSoon()
	p.giveUpSoon()
}

// prepareStore makes limits of the store small, and plants the bugs that are in it.
func (p *proc) prepareStore() {
	cfg, st := &p.s.cfg, p.n.store
	st.sessions.limit = cfg.sessions
	st.sessions.answerLimit = uint64(cfg.answers)
	st.rangeKeys = cfg.rangeKeys
	if cfg.unlike {
		st.rangeKeys += p.site.i % 2
	}
	st.plantedSameVersion = cfg.sameCount
	st.plantedKeyVersions = cfg.keyCount
	st.plantedLeftOut = cfg.leftOut
}

// identify sees whether the node has become somebody new.
func (p *proc) identify() {
	if p.raftID == p.n.id.raftID {
		return
	}
	s, n := p.s, p.n
	p.raftID = n.id.raftID
	p.level = 0
	p.noteProgram()
	p.term = 0
	p.commit = 0
	p.applied = 0
	p.version = map[string]uint64{}
	p.viewed = 0
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
		for _, e := range s.sessions.byID {
			ses := e.Value.(*session)
			ses.answers = ses.answers[max(0, len(ses.answers)-1):]
		}
	}
	p.raiseBadly()
	p.n.turn(in)
	p.readBadly()
	p.inTurn = false
	if installed := p.n.status.count.SnapshotsInstalled; installed != p.installed {
		p.installed = installed
		p.replacedAt = p.received
	}
	if n := p.n; n.err == errRemoved || p.stopsTooOld(n.err) || n.err != nil && p.broken {
		p.giveUp()
		return
	}
	p.check()
	p.poll()
	p.passSoon()
	p.startWriting()
}

// openDisk opens the process's data directory; false: its program is too old for it.
func (p *proc) openDisk() bool {
	s, st := p.s, p.site
	d, err := openDisk(st.fs, simDir, s.cfg.logBytes, p.n.logger)
	if err != nil {
		s.failf("%v cannot lock its data directory: %v", st.node, err)
	}
	d.background = func(f func()) { f() }
	d.start = func(f func()) { s.after(s.diskTime(st), p, func() { p.onDisk(f) }) }
	p.disk = d
	if err := p.n.open(d); p.stopsTooOld(err) {
		d.close()
		return false
	} else if err != nil {
		s.failf("node %d does not start from its data directory: %v", st.node.Id, err)
	}
	if n := p.n; n.rn != nil {
		s.count["starts from a disk"]++
		p.written.HardState = wireHardState(n.log.hard)
		p.written.FirstSegment = n.log.last()
		p.replacedAt = n.durable.snapshotIndex
	}
	return true
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
	switch {
	case err == errRemoved:
		return "removed"
	case errors.Is(err, errLevel):
		return "too old"
	}
	return "disk"
}

// entry returns an entry of the node's log.
func (p *proc) entry(i uint64) *raftpb.Entry {
	if es, err := p.n.log.Entries(i, i+1, math.MaxUint64); err == nil {
		return es[0]
	}
	return nil
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

// tellRooms implements transport.
func (p *proc) tellRooms(all, news []*kvpb.RoomReport) {
	p.rooms = all
	for _, id := range slices.Sorted(maps.Keys(p.peers)) {
		peer := p.peers[id]
		if peer.life != 0 && peer.stream != nil {
			peer.stream.tellRooms(news)
		}
	}
}

// tellRooms sends who has how much room. Unlike messages, it is not lost while the stream
// lasts, and nothing overtakes it.
func (st *simStream) tellRooms(rooms []*kvpb.RoomReport) {
	s := st.from.s
	if len(rooms) == 0 {
		return
	}
	at := max(s.now+int64(s.latency()*simTick), st.last+1)
	st.last = at
	s.schedule(at, nil, func() {
		cut := s.isCut(st.from.site, st.to.site)
		if st.closed || cut {
			st.breakBoth()
			return
		}
		s.at(st.to, func() {
			p := st.to
			p.n.inbox.event(func() {
				p.hearLimits(st.hello, rooms)
				p.n.learnRooms(st.hello, rooms)
			})
			p.wake()
		})
	})
}

// setMembers implements transport.
func (p *proc) setMembers(clusterID, raftID uint64, members map[uint64]*kvpb.Node, removed []uint64) {
	p.members, p.removed = members, removed
	claims := map[uint64]*moveHint{}
	for _, id := range slices.Sorted(maps.Keys(p.peers)) {
		peer := p.peers[id]
		if m := members[id]; m != nil && !peer.isAt(m) || m == nil && p.inbound[id] == nil || slices.Contains(removed, id) {
			claims[id] = peer.claim
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
			p.addPeer(id, members[id], claims[id])
		}
	}
}

// setLevel breaks the streams from and to programs that do not speak a level.
func (p *proc) setLevel(level uint32) {
	for _, id := range slices.Sorted(maps.Keys(p.inbound)) {
		if st := p.inbound[id]; levelFromWire(st.hello.From.Level) < level {
			p.s.after(0, nil, st.breakBoth)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.peers)) {
		st := p.peers[id].stream
		if st != nil && st.to != nil && st.to.n.opts.level < level {
			p.s.after(0, nil, st.breakBoth)
		}
	}
}

// helloTo is the process's hello to whoever is at a site.
func (p *proc) helloTo(to *site) *kvpb.Hello {
	h := p.n.hello()
	if to.forgets {
		h.DurableNodes = nil // or it would end at once
	}
	return h
}

func (p *proc) addPeer(raftID uint64, node *kvpb.Node, claim *moveHint) {
	peer := &simPeer{raftID: raftID, node: node}
	p.peers[raftID] = peer
	if st := p.inbound[raftID]; st != nil {
		claim = &moveHint{st.hello.ClusterId, st.hello.From}
	}
	if claim != nil {
		peer.claimed(claim)
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
	st := &simStream{from: p, to: to.cur, peer: peer, target: target, hello: p.helloTo(to)}
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
	w.InMemory = w.InMemory && !p.site.forgets // or it would not be taken back
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
			p.addPeer(from.RaftId, from.Node, nil)
		}
		p.peers[from.RaftId].claimed(&moveHint{st.hello.ClusterId, from})
		for _, id := range slices.Sorted(maps.Keys(p.inbound)) {
			if id != from.RaftId {
				w.Peers = append(w.Peers, p.inbound[id].hello.From)
			}
		}
		if old := p.inbound[from.RaftId]; old != nil && old != st {
			old.closed = true
			s.after(s.latency(), nil, old.broken)
		}
		p.inbound[from.RaftId] = st
		p.n.peerUp(from.RaftId, false, from)
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
	p.n.peerUp(peer.raftID, true, w.Peer)
	st.tellRooms(p.rooms)
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
		other := p.peers[at.RaftId]
		isSelf := at.Node.Id == p.n.self.Id
		switch {
		case other == nil && !isSelf && !slices.Contains(p.removed, at.RaftId):
			p.addPeer(at.RaftId, at.Node, nil)
		case other != nil && other.life == 0 && p.inbound[at.RaftId] == nil:
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
	node := t.peer.node
	if t.peer.life != 0 {
		node = t.peer.at
	}
	st := s.siteOf(node)
	t.data, t.hello = bytesOf(t.v), p.n.hello()
	t.hello.DurableNodes = nil // a stream has said it
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
	if s.cfg.disowned {
		st.sessions = disowned(st.sessions)
	}
	if s.cfg.uncounted {
		forgetDeleted(st.sessions)
	}
	delete(p.receiving, t.hello.From.RaftId)
	p.n.inbox.event(func() {
		p.received = max(p.received, st.index)
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

// boot makes the cluster, as server.Init does: no faults before that is done.
func (s *sim) boot() {
	p := s.sites[0].cur
	var founding []*kvpb.Node
	for _, st := range s.sites[:s.cfg.voters] {
		founding = append(founding, st.node)
	}
	p.n.inbox.event(func() {
		if _, err := p.n.bootstrap(founding); err != nil {
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
	s.addWatches()
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
	if s.cfg.fills {
		s.fill()
	}
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

// simulate runs a seed.
func simulate(t *testing.T, seed uint64, steps int, sink io.Writer, change func(*simConfig)) (*sim, error) {
	cryptotest.SetGlobalRandom(t, seed)
	rng := rand.New(rand.NewPCG(seed, 0x5eed))
	cfg := drawConfig(rng, steps)
	cfg.fills = seed%3 == 0
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
	for _, seed := range []uint64{3, 5} {
		here = append(here, traceHash(t, seed))
	}
	if os.Getenv(child) != "" {
		fmt.Println("traces", here)
		return
	}
	for _, seed := range []uint64{3, 5} {
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
