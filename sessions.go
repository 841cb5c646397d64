// Sessions: which writes were applied already, so that one that is repeated takes effect
// once.

package main

import (
	"cmp"
	"container/list"
	"errors"
	"fmt"
	"slices"

	"raft-key-value/kvpb"
)

const (
	// maxSessions is how many sessions are kept. All nodes of a cluster have to agree on
	// it, and on maxAnswers.
	maxSessions = 10_000
	// maxAnswers is how many sequences of a session, from the highest down, are told from
	// new ones, and how far above the highest the next one may be.
	maxAnswers = 1024
	// One in unusedDivisor sessions of an owner may be one that was never used, before a
	// new session takes the place of such a one. So a client has time to use the session
	// that it opened, and whoever opens many pushes out at most this part of the used ones
	// of its own owner.
	unusedDivisor = 10
	// sessionBytes is about what a session takes that was never used, with an owner of its own.
	sessionBytes = 256
	// rememberedBytes is about what an answer takes: 24 bytes, in slices that are not full.
	rememberedBytes = 32
	// sessionRecordBytes and answerRecordBytes are about what a snapshot has of each, with a long
	// name of the owner and with large versions.
	sessionRecordBytes = 112
	answerRecordBytes  = 20
)

// What a write that carries a request_id can end with besides an answer.
var (
	errSessionUnknown = errors.New("the session was never opened, or has been dropped: " +
		"the write was not applied now")
	errSequenceTooOld = errors.New("the sequence is too far below the highest of its session: " +
		"the write was not applied now")
	errSequenceTooFar = errors.New("the sequence is too far above the highest of its session: " +
		"the write was not applied; open another session")
	errSessionTaken = errors.New("the number drawn for the session is another's: " +
		"none was opened, the next call draws another")
)

// sessions are the sessions that a store knows. Nothing but the log determines them, so
// that all nodes know the same. The loop alone uses them.
type sessions struct {
	limit       int    // of sessions: maxSessions, but in tests
	answerLimit uint64 // of sequences: maxAnswers, but in tests

	byID   map[uint64]*list.Element // of one of the lists of its owner
	owners *owners
	last   *owner // of the session that restore added last; nil: it added none
	// answered is how many answers all of them remember.
	answered uint64
}

// session is what is known of a client's writes. Whoever knows its number may write in it:
// that is random and told to nobody but its owner, and a write may be repeated by whoever
// takes its client's place. Views share the answers: those that one has are not changed in place.
type session struct {
	id      uint64
	owner   *owner
	answers []firstAnswer // by sequence, the last of them the highest
}

// firstAnswer is the answer to the first write with a sequence. Repeats get it, too.
type firstAnswer struct {
	sequence uint64
	result
}

func newSessions() *sessions {
	return &sessions{
		limit:       maxSessions,
		answerLimit: maxAnswers,
		byID:        map[uint64]*list.Element{},
		owners:      newOwners(),
	}
}

func (s *sessions) count() int { return len(s.byID) }

// bytes is about what they take of memory.
func (s *sessions) bytes() uint64 {
	return sessionBytes*uint64(s.count()) + rememberedBytes*s.answered
}

// recordBytes is about what a snapshot has of them.
func (s *sessions) recordBytes() uint64 {
	return sessionRecordBytes*uint64(s.count()) + answerRecordBytes*s.answered
}

// all returns copies of all sessions, which share the answers: the unused ones of an owner,
// then its used ones, then those of another owner. It clips the answers, which has the next
// one go into a copy of them.
func (s *sessions) all() []session {
	all := make([]session, 0, len(s.byID))
	for _, o := range s.owners.heap {
		for _, l := range []*list.List{o.unused, o.used} {
			for e := l.Front(); e != nil; e = e.Next() {
				ses := e.Value.(*session)
				ses.answers = slices.Clip(ses.answers)
				all = append(all, *ses)
			}
		}
	}
	return all
}

// inOrder returns what all has returned in the order in which a snapshot has it: by owner.
// With many owners that takes time, so the loop leaves it to whoever writes the snapshot.
func inOrder(all []session) []session {
	return slices.SortedStableFunc(slices.Values(all), func(a, b session) int {
		return cmp.Compare(a.owner.name, b.owner.name)
	})
}

// add opens a session for an owner, unless there is one of that id. If there are too many,
// it drops another one.
func (s *sessions) add(id uint64, ownerName string) error {
	if s.byID[id] != nil {
		return errSessionTaken
	}
	o := s.owners.of(ownerName)
	if len(s.byID) >= s.limit {
		dropped := s.owners.takeFor(o)
		delete(s.byID, dropped.id)
		s.answered -= uint64(len(dropped.answers))
	}
	s.byID[id] = s.owners.add(&session{id: id, owner: o})
	return nil
}

// use returns the session of a write and makes it the one used last. It refuses a write
// of which nobody knows whether it was applied, and one that the session's client would
// not send next: these use no session.
func (s *sessions) use(id, sequence uint64) (*session, error) {
	e := s.byID[id]
	if e == nil {
		return nil, errSessionUnknown
	}
	ses := e.Value.(*session)
	highest := ses.highest()
	if highest > s.answerLimit && sequence <= highest-s.answerLimit {
		return nil, errSequenceTooOld
	}
	if sequence > highest && sequence-highest > s.answerLimit {
		return nil, errSequenceTooFar
	}
	if len(ses.answers) > 0 {
		ses.owner.used.MoveToBack(e)
		return ses, nil
	}
	ses.owner.unused.Remove(e) // it is about to get its first answer
	s.byID[id] = ses.owner.used.PushBack(ses)
	return ses, nil
}

// remember adds the answer to a write that was new, and forgets those that are too old
// then.
func (s *sessions) remember(ses *session, sequence uint64, r result) {
	i, _ := ses.find(sequence)
	ses.answers = slices.Insert(ses.answers, i, firstAnswer{sequence, r})
	s.answered++
	highest := ses.highest()
	for highest > s.answerLimit && ses.answers[0].sequence <= highest-s.answerLimit {
		ses.answers = ses.answers[1:]
		s.answered--
	}
}

// replace takes over the sessions of t, which must not be used any more, but not t's
// limits.
func (s *sessions) replace(t *sessions) {
	s.byID = t.byID
	s.owners = t.owners
	s.answered = t.answered
}

// knows reports whether a write of a session has its answer.
func (s *sessions) knows(id, sequence uint64) bool {
	e := s.byID[id]
	if e == nil {
		return false
	}
	_, isAnswered := e.Value.(*session).answer(sequence)
	return isAnswered
}

// restore adds a session of a snapshot whose last version this is. It refuses one that
// no store can have, or not at this place: the order is that of inOrder.
func (s *sessions) restore(m *kvpb.Session, version uint64) error {
	isNew := m.Id != 0 && s.byID[m.Id] == nil
	if !isNew || len(s.byID) >= s.limit {
		return errors.New("its id is invalid, or it is out of place")
	}
	if err := checkOwner([]byte(m.Owner)); err != nil {
		return fmt.Errorf("its owner: %w", err)
	}
	if s.last != nil && m.Owner < s.last.name {
		return errors.New("it follows one of a later owner")
	}
	answers, err := s.restoreAnswers(m, version)
	if err != nil {
		return err
	}
	o := s.owners.of(m.Owner)
	if len(answers) == 0 && o.used.Len() > 0 {
		return errors.New("it was never used, and follows one that was")
	}
	s.byID[m.Id] = s.owners.add(&session{id: m.Id, owner: o, answers: answers})
	s.answered += uint64(len(answers))
	s.last = o
	return nil
}

// restoreAnswers returns the answers of a snapshot's session.
func (s *sessions) restoreAnswers(m *kvpb.Session, version uint64) ([]firstAnswer, error) {
	ses := &session{answers: make([]firstAnswer, len(m.Answers))}
	before := uint64(0)
	for i, a := range m.Answers {
		hasVersion := a.Version > 0 || a.CompareFailed || a.TooMany
		known := a.Version <= version && hasVersion && a.Deleted <= maxRangeKeys
		if a.Sequence <= before || !known {
			return nil, errors.New("an answer is invalid or out of place")
		}
		before = a.Sequence
		ses.answers[i] = firstAnswer{a.Sequence, result{
			version:       a.Version,
			deleted:       uint32(a.Deleted),
			found:         a.Found,
			compareFailed: a.CompareFailed,
			tooMany:       a.TooMany,
		}}
	}
	tooOld := m.Highest > s.answerLimit && ses.lowest() <= m.Highest-s.answerLimit
	if ses.highest() != m.Highest || tooOld {
		return nil, errors.New("its answers are not the last ones")
	}
	return ses.answers, nil
}

// highest returns the highest sequence that has an answer; 0: there is none.
func (ses *session) highest() uint64 {
	if len(ses.answers) == 0 {
		return 0
	}
	return ses.answers[len(ses.answers)-1].sequence
}

func (ses *session) lowest() uint64 {
	if len(ses.answers) == 0 {
		return 0
	}
	return ses.answers[0].sequence
}

// find returns where in answers that to a sequence is, or would be.
func (ses *session) find(sequence uint64) (i int, found bool) {
	if sequence > ses.highest() { // most are
		return len(ses.answers), false
	}
	return slices.BinarySearchFunc(ses.answers, sequence, func(a firstAnswer, sequence uint64) int {
		return cmp.Compare(a.sequence, sequence)
	})
}

// answer returns the answer to a write that was applied before.
func (ses *session) answer(sequence uint64) (result, bool) {
	i, found := ses.find(sequence)
	if !found {
		return result{}, false
	}
	return ses.answers[i].result, true
}
