// The parts of a peer, each alone. What a peer and the network do with them is tested in
// peers_test.go.

package main

import (
	"slices"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// appendOf is a message with an entry of so many bytes.
func appendOf(bytes int) *raftpb.Message {
	return &raftpb.Message{Entries: []*raftpb.Entry{{Data: make([]byte, bytes)}}}
}

// TestSendQueueIsBounded: a queue takes no more than maxPeerMessages, nor anything once it
// has more than maxPeerBytes; what does not fit is dropped as a whole.
func TestSendQueueIsBounded(t *testing.T) {
	var q sendQueue
	if !q.add(make([]*raftpb.Message, maxPeerMessages-1)) || q.dropping {
		t.Error("there is no room for almost all")
	}
	if q.add(make([]*raftpb.Message, 2)) || !q.dropping || len(q.messages) != maxPeerMessages-1 {
		t.Errorf("more messages than it may have: %d", len(q.messages))
	}
	if !q.add(make([]*raftpb.Message, 1)) {
		t.Error("one more would fit")
	}

	q = sendQueue{}
	large := appendOf(maxPeerBytes / 4)
	for q.add([]*raftpb.Message{large}) {
		if len(q.messages) > 4 {
			t.Fatalf("%d bytes are queued", q.bytes)
		}
	}
	if len(q.messages) != 4 || !q.dropping {
		t.Errorf("%d bytes are queued", q.bytes)
	}
	for range 4 {
		if len(q.takeBatch()) != 1 {
			t.Error("a batch goes on behind a message that fills it")
		}
	}
	if q.bytes != 0 || q.dropping || len(q.takeBatch()) != 0 {
		t.Errorf("it is empty, and has %d bytes; it is dropping: %v", q.bytes, q.dropping)
	}
}

// TestSendQueueKeepsOrder: batches have all messages in order, and the room of those that
// were taken is free again.
func TestSendQueueKeepsOrder(t *testing.T) {
	var q sendQueue
	var added, taken []*raftpb.Message
	for range 10 {
		ms := []*raftpb.Message{appendOf(maxStreamBytes / 3), appendOf(10)}
		if !q.add(ms) {
			t.Fatal("there is no room")
		}
		added = append(added, ms...)
	}
	batches := 0
	for ms := q.takeBatch(); len(ms) > 0; ms = q.takeBatch() {
		taken = append(taken, ms...)
		batches++
	}
	if !slices.Equal(added, taken) || batches != 4 {
		t.Errorf("%d of %d messages in %d batches", len(taken), len(added), batches)
	}
	if q.bytes != 0 {
		t.Errorf("%d bytes are counted that are not there", q.bytes)
	}
}

// TestPeerAddressesInTurn: the known address and the newest hint's are tried in turn; a hint
// at the known address is none.
func TestPeerAddressesInTurn(t *testing.T) {
	at := func(address string) *moveHint {
		return &moveHint{7, &kvpb.Peer{Node: &kvpb.Node{Id: 2, Address: address}, RaftId: 2, Life: 5}}
	}
	a := peerAddresses{known: &kvpb.Node{Id: 2, Address: "known:1"}}
	next := func(want string, isHint, isOnly bool) {
		t.Helper()
		target := a.next()
		if target.node.Address != want || (target.hint != nil) != isHint || target.isOnly != isOnly {
			t.Errorf("%+v is next, want %s", target, want)
		}
	}
	next("known:1", false, true)
	next("known:1", false, true)
	a.take(at("old:1"))
	a.take(at("new:1"))
	next("new:1", true, false)
	next("known:1", false, false)
	next("new:1", true, false)
	a.take(at("known:1"))
	next("known:1", false, true)
}

// TestRivalsTakeTurns: two lives that come back in turn are told once; one that says hello
// again, or was late once, is none of them.
func TestRivalsTakeTurns(t *testing.T) {
	for name, test := range map[string]struct {
		lives []uint64
		at    int // the hello that tells; 0: none does
	}{
		"one life":           {[]uint64{1, 1, 1, 1}, 0},
		"one after another":  {[]uint64{1, 2, 3, 4, 5}, 0},
		"one hello was late": {[]uint64{1, 2, 1, 3, 4}, 0},
		"two were late once": {[]uint64{1, 2, 1, 3, 4, 3, 5}, 0},
		"two in turn":        {[]uint64{1, 2, 1, 2, 1, 2}, 4},
		"two, saying more":   {[]uint64{1, 1, 2, 2, 1, 1, 2, 1}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			var r rivals
			for i, life := range test.lives {
				if takeTurns := r.note(life); takeTurns != (i+1 == test.at) {
					t.Errorf("hello %d, of life %d: %v", i+1, life, takeTurns)
				}
			}
		})
	}
}
