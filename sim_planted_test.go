// Bugs that are planted in the simulator, to see that it finds them. drawConfig leaves
// them out.

package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/cryptotest"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

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
	disowned  bool // snapshots come without the owners of sessions
	careless  bool // a write is applied as often as it comes
	sameCount bool // all writes of an entry have one version
	unsettled bool // a change of membership is answered as soon as it is committed
	cached    bool // an operator's request is answered on the word of an earlier one's entry
	inPlace   bool // pages that a client's view has are changed in place
	impatient bool // a local read does not wait for its version
	keyCount  bool // a DeleteRange counts a version for each key
	unlike    bool // nodes have other limits of DeleteRange
	uncounted bool // snapshots come without how many keys DeleteRanges have deleted
	skip      bool // a history goes on after a snapshot as if it had all before
	toldAgain bool // a watch that goes on elsewhere is told of the last version again
	ahead     bool // watchers say that events were passed over before they are
	lateStart bool // a watch from now on misses what comes until it is added
	leftOut   bool // one key that a DeleteRange has deleted is no event
	halfOfAll bool // a founder takes the claims of most for those of all
	promised  bool // a member of a cluster makes claims

	riseAlone  bool // a leader raises the level and asks nobody
	overstated bool // programs say that they speak a level which they do not
	deaf       bool // what other nodes say of their room does not count
	refusedToo bool // a Set that is refused for want of room is proposed all the same
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
		{"snapshots without the owners of sessions", func(c *simConfig) { c.disowned = true }},
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
		{"a view that sees later writes", func(c *simConfig) { c.inPlace = true }},
		{"a local read answered before its version", func(c *simConfig) { c.impatient = true }},
		{"a range deleted with a version for each key", func(c *simConfig) { c.keyCount = true }},
		{"other limits of DeleteRange on other nodes", func(c *simConfig) { c.unlike = true }},
		{"snapshots without the counts of DeleteRanges", func(c *simConfig) { c.uncounted = true }},
		{"a level raised before all speak it", func(c *simConfig) { c.riseAlone, c.levels = true, true }},
		{"programs that say a level which they do not speak", func(c *simConfig) { c.overstated, c.levels = true, true }},
		{"a quota by the node's own limit alone", func(c *simConfig) { c.deaf = true }},
		{"Sets that were refused and proposed", func(c *simConfig) { c.refusedToo = true }},
	}
	bugs = append(bugs, []bug{
		{"a cluster formed with the claims of most", func(c *simConfig) {
			c.halfOfAll = true
			c.formEvery = 20
		}},
		{"a member of a cluster that makes claims", func(c *simConfig) {
			c.promised = true
			c.formEvery = 20
		}},
	}...)
	ofWatches := []bug{
		{"a history that goes on after a snapshot", func(c *simConfig) { c.skip = true }},
		{"a watch told twice where it goes on", func(c *simConfig) { c.toldAgain = true }},
		{"progress of watches ahead of their events", func(c *simConfig) { c.ahead = true }},
		{"a watch that begins too late", func(c *simConfig) { c.lateStart = true }},
		{"an event of a DeleteRange left out", func(c *simConfig) { c.leftOut = true }},
	}
	find := func(t *testing.T, plant func(*simConfig)) {
		for seed := range uint64(*simBugs) {
			if _, err := simulate(t, seed+1, 6000, nil, plant); err != nil {
				t.Logf("found with %d seeds: %s", seed+1, strings.SplitN(err.Error(), "\n", 2)[0])
				return
			}
		}
		t.Error("not found")
	}
	for _, tt := range bugs {
		t.Run(tt.name, func(t *testing.T) {
			find(t, func(c *simConfig) {
				c.watches = 0 // they would be told of it before others see it
				tt.plant(c)
			})
		})
	}
	for _, tt := range ofWatches {
		t.Run(tt.name, func(t *testing.T) { find(t, tt.plant) })
	}
}

// disowned are sessions as they would be if nobody owned them.
func disowned(s *sessions) *sessions {
	without := newSessions()
	o := without.owners.of("")
	for _, ses := range s.all() {
		without.byID[ses.id] = without.owners.add(&session{id: ses.id, owner: o, answers: ses.answers})
	}
	return without
}

// forgetDeleted makes answers say that DeleteRanges have deleted nothing.
func forgetDeleted(s *sessions) {
	for _, e := range s.byID {
		answers := e.Value.(*session).answers
		for i := range answers {
			answers[i].deleted = 0
		}
	}
}

// readBadly plants the bugs of reading.
func (p *proc) readBadly() {
	n := p.n
	if p.s.cfg.impatient {
		n.calls.releaseVersion(math.MaxUint64)
	}
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

// isProposedSet reports whether a client waits for a Set that raft has taken.
func (a *attempt) isProposedSet() bool {
	return a.o.kind == "set" && a.o.sent == a && a.c.state.Load() == callProposed
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
