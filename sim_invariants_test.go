// What must hold in the simulator, and the oracle that knows it.
//
// After each turn, on the node that took it:
//
//   - I2: an acknowledged write is the one committed, and nothing else is read;
//   - I3: a term has one leader;
//   - I4: committed entries never change;
//   - I6: nothing goes back;
//   - I7: what a message promises is on the disk;
//   - no raft ID is used twice, and no node stops;
//   - I11: no node is in a cluster of a level that its program does not speak; only an older
//     program that was started in place of a newer one meets such a level.
//
// With each response to a watch: it has what the log has made of the keys of the watch from
// the version of the response before to its own, and nothing else. A node says that its
// history is too short only if it is.
//
// With each proposal: it makes the store no larger than any member allows of which its node was
// told. With each entry: the store exceeds that by no more than what all nodes have in flight. At
// the end all members know the least limit, and deletes make room for Sets. That what is refused
// is never applied holds for all calls.
//
// With each page of a list or a scan: it is what the log has made of the range by the
// version of its view, which is as new as the read asks for. With each local read: it is
// as new as it asks for.
//
// At each index that is a multiple of stateEvery, and at the end, I5: states are equal.
// With each answer to a write with an id, I8: it is the first one. With each answer to an
// operator: whoever gives it led, and what it says was so, at some moment since the
// request. At the end, I1: what clients saw is linearizable, by porcupine, and I9: all
// heals, and watches are told of all. I10 is that planted bugs are found, see sim_planted_test.go.
// I11: no cluster is formed beside the one that lives, see sim_starting_test.go.

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// check checks the invariants that one node can break in one turn.
func (p *proc) check() {
	s, n := p.s, p.n
	if n.err != nil && n.err != errStopping {
		s.failf("node %v stops: %v", p, n.err)
	}
	p.identify()
	p.checkLevel()
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
	level    uint32
	last     map[uint64]uint64 // by proposer
	version  uint64
	keys     map[string][]change
	versions map[uint64]change
	ranges   []*deletion // all that DeleteRanges have done, in the order of the log
	// sessions are those never used, the oldest first, and then the others, the one used
	// the longest ago first.
	sessions []*modelSession
	opened   map[uint64]bool      // all sessions ever
	tooFar   map[[2]uint64]bool   // all writes ever that were, by session and sequence
	first    map[[2]uint64]result // all answers ever, likewise
	applied  []appliedEntry       // by index
	eras     []era
	size     uint64           // of the store, as quotas count it
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
		applied:  make([]appliedEntry, 2),
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
	owner       string
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

	deletion *deletion // of a version that a DeleteRange has, and that has no key
}

// deletion is what a DeleteRange did.
type deletion struct {
	bounds bounds
	keys   []string // that it deleted
	answer result
	at     int64 // when it was first applied, as calls are ordered
	op     *op   // whose it was, if that is known
}

// bounds are a range as a request names it, and what that means: without keyRange, which is
// what the simulator checks.
type bounds struct{ prefix, start, end string }

func (b bounds) String() string {
	if b == (bounds{}) {
		return ""
	}
	return fmt.Sprintf("[%q %q-%q]", b.prefix, b.start, b.end)
}

// has reports whether a key is in the range.
func (b bounds) has(key string) bool {
	isBefore := b.end == "" || key < b.end
	return strings.HasPrefix(key, b.prefix) && key >= b.start && isBefore
}

// isFoundAs reports whether a read finds what a change has left.
func (c change) isFoundAs(found bool, version uint64, value string) bool {
	if !c.present || !found {
		return c.present == found
	}
	return c.version == version && c.value == value
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
			o.noteEvents()
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
		cs, err := tryConfChange(o.conf, cc)
		if err == nil && !o.speak(ctx.Members) {
			err = errLevel
		}
		if err == nil {
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
	if b.Rise != nil {
		o.rise(b.Rise)
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
	s.checkSize(&b)
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
		s.open(index, open)
		return
	}
	if del := w.GetDeleteRange(); del != nil {
		s.commitDeletion(index, del)
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

// commitDeletion applies a DeleteRange to the oracle, if its id is new.
func (s *sim) commitDeletion(index uint64, del *kvpb.DeleteRangeRequest) {
	o, id := &s.oracle, del.RequestId
	if id != nil && !s.isNew(id) {
		return
	}
	d := &deletion{bounds: bounds{del.Prefix, del.Start, del.End}, at: s.tock()}
	o.ranges = append(o.ranges, d)
	if id != nil { // of one without, claim or ownDeletions finds the call
		of := s.ids[[2]uint64{id.Session, id.Sequence}]
		isWanted := of != nil && of.kind == "delete range" && of.bounds == d.bounds && of.deletion == nil
		if !isWanted {
			s.failf("I2: entry %d deletes the range %v, which nobody wanted, or again", index, d.bounds)
		}
		d.ownedBy(of)
	}
	there := o.asOf(o.version, d.bounds)
	if len(there) > s.cfg.rangeKeys {
		d.answer = result{tooMany: true}
		s.count["ranges with too many keys"]++
	} else {
		o.version++
		d.answer = result{version: o.version, deleted: uint32(len(there))}
		o.versions[o.version] = change{version: o.version, at: d.at, deletion: d}
		s.count["ranges deleted"]++
		s.count["keys deleted with a range"] += len(there)
		s.count["writes committed"]++
		for _, c := range there {
			d.keys = append(d.keys, c.key)
			o.keys[c.key] = append(o.keys[c.key], change{key: c.key, found: true, version: o.version, at: d.at})
		}
	}
	if d.op != nil {
		d.op.committed = d.answer.version
		o.first[d.op.key2()] = d.answer
	}
}

// ownedBy notes whose a deletion is.
func (d *deletion) ownedBy(o *op) {
	d.op = o
	o.deletion = d
	o.committed = d.answer.version
}

// asOf is what a range had at a version: of each key that was there its last change.
func (o *oracle) asOf(version uint64, b bounds) []change {
	var there []change
	for _, key := range slices.Sorted(maps.Keys(o.keys)) {
		if !b.has(key) {
			continue
		}
		history := o.keys[key]
		later := slices.IndexFunc(history, func(c change) bool { return c.version > version })
		if later < 0 {
			later = len(history)
		}
		if later > 0 && history[later-1].present {
			there = append(there, history[later-1])
		}
	}
	return there
}

// open opens a session in the oracle, where there may be place for more that
// were never used than for one.
func (s *sim) open(index uint64, open *kvpb.NewSession) {
	o := &s.oracle
	id := open.Session
	if id == 0 || o.opened[id] {
		s.failf("I8: entry %d opens session %d, again or by no number", index, id)
	}
	if len(o.sessions) == s.cfg.sessions {
		drop := toDrop(o.sessions, open.Owner)
		if o.sessions[drop].owner != open.Owner {
			s.count["sessions dropped for another's"]++
		}
		o.sessions = slices.Delete(o.sessions, drop, drop+1)
	}
	unused := slices.IndexFunc(o.sessions, func(ses *modelSession) bool { return ses.highest > 0 })
	if unused < 0 {
		unused = len(o.sessions)
	}
	opened := &modelSession{id: id, owner: open.Owner, answers: map[uint64]bool{}}
	o.sessions = slices.Insert(o.sessions, unused, opened)
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

// finishWrite compares what was acknowledged with what is committed, and with
// what was acknowledged before.
func (s *sim) finishWrite(o *op, r result) {
	if o.ended != 0 {
		if before := o.answer(); r != before && !s.cfg.ackEarly {
			s.failf("I8: %v was acknowledged with %+v, before that with %+v", o, r, before)
		}
		s.count["answers repeated"]++
		return
	}
	o.ended = s.tock()
	o.version = r.version
	o.found = r.found
	o.compare = r.compareFailed
	o.deleted = r.deleted
	o.tooMany = r.tooMany
	isSeen := r.version <= s.oracle.version
	if r.tooMany {
		isSeen = o.deletion != nil || s.claim(o)
	}
	if isSeen {
		s.checkAcknowledged(o, r)
	} else {
		s.count["acknowledged before seen"]++ // by a node that then left: checked at the end
	}
	s.seen[o.key] = max(s.seen[o.key], r.version)
	s.newest = max(s.newest, r.version)
	if d := o.deletion; d != nil {
		for _, key := range d.keys {
			s.seen[key] = max(s.seen[key], r.version)
		}
	}
	s.count["writes acknowledged"]++
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

// checkAcknowledged compares the answer to a write with what the oracle has of it.
func (s *sim) checkAcknowledged(o *op, r result) {
	first, ok := s.oracle.first[o.key2()]
	if o.id != nil && (!ok || r != first) {
		s.failf("I8: %v was acknowledged with %+v, its first answer is %+v, %v", o, r, first, ok)
	}
	changesNothing := o.compare || o.tooMany || o.kind == "open"
	if changesNothing {
		return
	}
	if r.version <= o.atLeast && !s.cfg.ackEarly {
		s.failf("I1: %v was acknowledged with version %d; when it began, version %d was known", o, r.version, o.atLeast)
	}
	if o.kind == "delete range" {
		if o.deletion == nil && !s.claim(o) {
			s.failf("I2: %v was acknowledged with %+v; committed is %+v", o, r, s.oracle.versions[r.version])
		}
		return
	}
	ch := s.oracle.versions[r.version]
	isIts := ch.key == o.key && ch.value == o.value && ch.present == (o.kind == "set")
	if !isIts || ch.found != r.found {
		s.failf("I2: %v was acknowledged with version %d, found %v; committed is %+v", o, r.version, r.found, ch)
	}
}

// finishRead reads, and checks that the key was in this state at some moment
// since the read began, and after all that anybody knew then.
func (s *sim) finishRead(a *attempt) {
	o := a.o
	if o.kind == "watch" {
		s.clients[o.client].watch.opened(a)
		return
	}
	if o.kind != "get" {
		s.openView(a)
		return
	}
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
		s.failf("I1: %v through %v is %.12q (%v) of version %d; version %d was known when it began, or asked for",
			o, a.p, it.value, ok, it.version, o.atLeast)
	}
	s.seen[o.key] = max(s.seen[o.key], it.version)
	s.newest = max(s.newest, it.version, o.minVersion)
	if o.local {
		s.checkNewEnough(o, a.p, a.p.n.store.version)
		s.count["local reads that waited for a version"]++
		return
	}
	s.count["reads"]++
}

// wasSo reports whether a key was as a read has it, at a moment after the version that the
// read has to see.
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

// settle ends all faults and checks that everything heals (I9).
func (s *sim) settle() {
	s.endFaults()
	s.until(settleTicks, s.unsettled)
	s.until(settleTicks, s.refusedForDisk) // once it is known who the members are
	s.quiet = true
	s.until(settleTicks, func() string {
		for _, c := range s.clients {
			if c.op != nil && c.watch == nil {
				return c.op.String() + " has not ended"
			}
		}
		return s.unsettled()
	})
	s.until(settleTicks, s.unrisen)
	s.until(settleTicks, s.refusedForDisk)
	s.makeRoom()
	s.checkFreshCalls()
	s.until(settleTicks, s.unequal)
	s.until(settleTicks, s.untold)
}

// endFaults ends all faults, starts all processes, and lets what is late arrive.
func (s *sim) endFaults() {
	s.trace("all faults end")
	s.calm = true
	s.cfg.latency = min(s.cfg.latency, .3)
	s.cfg.transfer = min(s.cfg.transfer, 20) // or a member is too slow for the writes that go on
	s.replaceAllOld()
	for _, st := range s.sites {
		if st.fs != nil {
			s.late = max(s.late, st.slow) // what a disk is at, it goes on with
			st.fs.failAt = 0
			st.slow = 0
			st.space.lowUntil = 0
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
	for _, st := range s.sites {
		if st.cur != nil && st.cur.n.opts.level < s.level {
			s.replaceRefused(st) // as an operator does who reads status
			return fmt.Sprintf("the program of node %d is too old", st.node.Id)
		}
	}
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
		if all := inOrder(st.sessions.all()); !slices.EqualFunc(byOwner(o.sessions), all, (*modelSession).is) {
			s.failf("I5: %v has sessions %v", p, all)
		} else if want := answersOf(all); st.sessions.answered != want {
			s.failf("I5: %v counts %d answers of sessions, there are %d", p, st.sessions.answered, want)
		}
		if st.tree.keys != present || st.version != o.version || o.conf.Equivalent(st.conf) != nil {
			s.failf("I5: %v has %d keys, version %d, %v; want %d, %d, %v",
				p, st.tree.keys, st.version, st.conf, present, o.version, o.conf)
		}
		if len(st.clientViews) > 0 {
			s.failf("%v has %d views open, and nobody reads them", p, len(st.clientViews))
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
	s.ownDeletions()
	histories := map[string][]porcupine.Operation{}
	for _, o := range s.history {
		isCheckedBefore := o.local || o.kind == "list" || o.kind == "scan"
		if o.kind == "open" || isCheckedBefore {
			continue
		}
		s.checkOutcome(o)
		if o.kind == "delete range" {
			s.addDeletion(histories, o)
			continue
		}
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
		if first != o.answer() {
			s.failf("I8: %v was acknowledged with version %d, its first answer is %+v", o, o.version, first)
		}
	}
	if isAnswered && o.kind == "delete range" && (o.deletion == nil || o.answer() != o.deletion.answer) {
		s.failf("I2: %v was acknowledged with %+v, but is %+v", o, o.answer(), o.deletion)
	}
	if o.failed && o.deletion != nil {
		s.failf("%v was refused, but committed", o)
	}
	if isAnswered && o.kind != "get" && !o.compare && !o.tooMany {
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

// claim finds the deletion that a DeleteRange without an id was acknowledged with, and
// notes that it is its. Those that deleted nothing are all alike: it takes the first.
func (s *sim) claim(o *op) bool {
	i := slices.IndexFunc(s.oracle.ranges, func(d *deletion) bool {
		isFree := d.op == nil && d.at > o.begun && d.bounds == o.bounds
		return isFree && d.answer == o.answer()
	})
	if i < 0 || o.id != nil {
		return false
	}
	s.oracle.ranges[i].ownedBy(o)
	return true
}

// ownDeletions finds a call for each committed DeleteRange, as ownDeletes does.
func (s *sim) ownDeletions() {
	var unknown []*op
	for _, o := range s.history {
		switch {
		case o.kind != "delete range" || o.id != nil || o.deletion != nil:
		case o.ended != 0:
			s.claim(o) // or else checkOutcome fails
		case !o.failed:
			unknown = append(unknown, o)
		}
	}
	for _, d := range s.oracle.ranges {
		if d.op != nil {
			continue
		}
		i := slices.IndexFunc(unknown, func(o *op) bool { return o.bounds == d.bounds && o.begun < d.at })
		if i < 0 {
			s.failf("I2: the range %v is deleted with %+v, which nobody wanted", d.bounds, d.answer)
		}
		d.ownedBy(unknown[i])
		unknown = slices.Delete(unknown, i, i+1)
	}
}

// addDeletion adds to the histories of keys what a DeleteRange did to each.
func (s *sim) addDeletion(histories map[string][]porcupine.Operation, o *op) {
	d := o.deletion
	if d == nil || d.answer.tooMany {
		return
	}
	for i := range s.cfg.keys {
		key := fmt.Sprintf("k%d", i)
		if !d.bounds.has(key) {
			continue
		}
		one := &op{kind: "delete", key: key, version: d.answer.version, found: slices.Contains(d.keys, key)}
		call := porcupine.Operation{ClientId: o.client, Input: one, Call: o.begun, Return: cmp.Or(o.ended, d.at)}
		histories[key] = append(histories[key], call)
	}
	s.count["calls checked"]++
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
