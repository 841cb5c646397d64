// Owners: whose sessions are whose, and whose session has to go when there are too many.

package main

import (
	"container/heap"
	"container/list"
	"errors"
)

// owner is a principal that has sessions, and these.
type owner struct {
	name   string     // as String of the principal has it; empty: everybody without TLS
	unused *list.List // of its *session without answers, the oldest first
	used   *list.List // of all its others, the one used the longest ago first
	place  int        // in owners.heap
}

func (o *owner) count() int { return o.unused.Len() + o.used.Len() }

// takeFirst takes the session out that has to go first.
func (o *owner) takeFirst() *session {
	from := o.used
	if o.unused.Len() >= max(1, o.count()/unusedDivisor) {
		from = o.unused
	}
	return from.Remove(from.Front()).(*session)
}

// owners are all that have sessions. Each change costs the logarithm of their number.
type owners struct {
	byName map[string]*owner
	heap   ownerHeap
}

func newOwners() *owners { return &owners{byName: map[string]*owner{}} }

// of returns the owner of a name, who may have no session yet.
func (os *owners) of(name string) *owner {
	if o := os.byName[name]; o != nil {
		return o
	}
	return &owner{name: name, unused: list.New(), used: list.New()}
}

// add gives a session to its owner.
func (os *owners) add(ses *session) *list.Element {
	o := ses.owner
	l := o.unused
	if len(ses.answers) > 0 {
		l = o.used
	}
	e := l.PushBack(ses)
	if o.count() == 1 {
		os.byName[o.name] = o
		heap.Push(&os.heap, o)
	} else {
		heap.Fix(&os.heap, o.place)
	}
	return e
}

// takeFor takes a session out to make room for one of an owner: of that owner's own, if
// nobody has more, and else of the first by name of those who have the most.
//
// So whoever has no more than an equal part of all sessions loses none to another owner.
// Who loses one has the most. If that were no more than an equal part, then all together,
// the opener with fewer among them, would have fewer than there may be, and none would go.
func (os *owners) takeFor(o *owner) *session {
	from := os.heap[0]
	if o.count() == from.count() {
		from = o
	}
	ses := from.takeFirst()
	if from.count() == 0 {
		delete(os.byName, from.name)
		heap.Remove(&os.heap, from.place)
	} else {
		heap.Fix(&os.heap, from.place)
	}
	return ses
}

// ownerHeap is a heap, as package heap has it, of all owners. The one that has the most
// sessions is at its root: the first by name, if there are several, for all nodes have to
// agree.
type ownerHeap []*owner

func (h ownerHeap) Len() int { return len(h) }

func (h ownerHeap) Less(i, j int) bool {
	if h[i].count() != h[j].count() {
		return h[i].count() > h[j].count()
	}
	return h[i].name < h[j].name
}

func (h ownerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place = i
	h[j].place = j
}

// Push implements heap.Interface.
func (h *ownerHeap) Push(x any) {
	o := x.(*owner)
	o.place = len(*h)
	*h = append(*h, o)
}

// Pop implements heap.Interface.
func (h *ownerHeap) Pop() any {
	last := len(*h) - 1
	o := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return o
}

var errOwner = errors.New("it is no principal's name")

// checkOwner returns an error if no session can have such an owner: the empty one, or a
// principal, which has at most 71 bytes. The log and snapshots have nothing else.
func checkOwner(name []byte) error {
	if len(name) == 0 {
		return nil
	}
	if _, err := parsePrincipal(principalScheme + ":" + string(name)); err != nil {
		return errOwner
	}
	return nil
}

// ownerOf returns the owner of the sessions that a principal opens.
func ownerOf(p principal) string {
	if p.role == roleAnyone {
		return ""
	}
	return p.String()
}
