// Sessions: which writes were applied already, so that one that is repeated takes effect
// once.

package main

import (
	"container/list"
	"errors"

	"raft-key-value/kvpb"
)

const (
	// maxSessions is how many sessions are kept, maxAnswers how many sequences
	// of each are told from new ones, and how far above the highest the next may
	// be. All nodes of a cluster have to agree.
	maxSessions, maxAnswers = 10_000, 1024
	// One in unusedDivisor sessions may be one that was never used, before a new session
	// takes the place of such a one. So a client has time to use the session that it
	// opened, and whoever opens many pushes out at most this part of the used ones.
	unusedDivisor = 10
)

// What a write that carries a request_id can end with besides an answer.
var (
	errSessionUnknown = errors.New("the session was never opened, or has been dropped: the write was not applied now")
	errSequenceTooOld = errors.New("the sequence is too far below the highest of its session: the write was not applied now")
	errSequenceTooFar = errors.New("the sequence is too far above the highest of its session: the write was not applied; open another session")
	errSessionTaken   = errors.New("the number drawn for the session is another's: none was opened, the next call draws another")
)

// session is what is known of a client's writes. Views share the answers: what
// stands in them is not changed while one is open.
type session struct {
	id      uint64
	answers []firstAnswer // by sequence, the last of them the highest
}

// firstAnswer is the one that repeats of a sequence get, too.
type firstAnswer struct {
	sequence uint64
	result
}

func (s *session) highest() uint64 {
	if len(s.answers) == 0 {
		return 0
	}
	return s.answers[len(s.answers)-1].sequence
}

// openSession adds a session, unless there is one of that id.
func (s *store) openSession(id uint64) error {
	if s.sessions[id] != nil {
		return errSessionTaken
	}
	if len(s.sessions) >= s.sessionLimit {
		s.dropSession()
	}
	s.sessions[id] = s.unused.PushBack(&session{id: id})
	return nil
}

// dropSession makes room for a session.
func (s *store) dropSession() {
	from := s.recent
	if s.unused.Len() >= max(1, s.sessionLimit/unusedDivisor) {
		from = s.unused
	}
	ses := from.Remove(from.Front()).(*session)
	delete(s.sessions, ses.id)
}

// useSession makes a session the one used last. If it has no answer, it is about
// to get its first.
func (s *store) useSession(e *list.Element) {
	ses := e.Value.(*session)
	if len(ses.answers) > 0 {
		s.recent.MoveToBack(e)
		return
	}
	s.unused.Remove(e)
	s.sessions[ses.id] = s.recent.PushBack(ses)
}

func (s *store) restoreSession(m *kvpb.Session) error {
	if m.Id == 0 || s.sessions[m.Id] != nil || len(s.sessions) >= maxSessions {
		return errors.New("its id is invalid, or it is out of place")
	}
	ses := &session{id: m.Id, answers: make([]firstAnswer, len(m.Answers))}
	for i, a := range m.Answers {
		ses.answers[i] = firstAnswer{a.Sequence, result{a.Version, a.Found, a.CompareFailed}}
		if a.Sequence == 0 || i > 0 && a.Sequence <= m.Answers[i-1].Sequence || a.Version > s.version || a.Version == 0 && !a.CompareFailed {
			return errors.New("an answer is invalid or out of place")
		}
	}
	if ses.highest() != m.Highest || m.Highest > maxAnswers && ses.answers[0].sequence <= m.Highest-maxAnswers {
		return errors.New("its answers are not the last ones")
	}
	if len(ses.answers) > 0 {
		s.sessions[m.Id] = s.recent.PushBack(ses)
		return nil
	}
	if s.recent.Len() > 0 {
		return errors.New("it was never used, and follows one that was")
	}
	s.sessions[m.Id] = s.unused.PushBack(ses)
	return nil
}
