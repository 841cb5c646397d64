// Tests of owners.go: whose session goes when there are too many.

package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

// testOwners are owners, in order.
var testOwners = []string{"", "admin", "client/a", "client/b", "node/7"}

// TestWhoseSessionGoes: each session is its owner's letter and its number. One that is
// opened stands there the first time, one that is used has a mark.
func TestWhoseSessionGoes(t *testing.T) {
	owners := map[byte]string{'a': "admin", 'b': "client/b", 'c': "client/c"}
	for name, tt := range map[string]struct {
		limit int
		steps string
		want  string
	}{
		"there is room":               {5, "a1 a2 b3 c4 b5", "a1 a2 b3 b5 c4"},
		"all of one":                  {4, "a1 a2 a3 a4 a5", "a2 a3 a4 a5"},
		"another's is opened":         {4, "a1 a2 a3 a4 b5", "a2 a3 a4 b5"},
		"of whoever has the most":     {4, "a1 b2 b3 c4 c5", "a1 b3 c4 c5"},
		"the caller has the most":     {4, "b1 b2 b3 a4 b5", "a4 b2 b3 b5"},
		"the caller has as many":      {4, "a1 a2 b3 b4 b5", "a1 a2 b4 b5"},
		"the first by name":           {4, "b1 b2 a3 a4 c5", "a4 b1 b2 c5"},
		"one by one":                  {4, "a1 a2 a3 a4 b5 b6 b7", "a3 a4 b6 b7"},
		"used longest ago":            {4, "a1 a2 a3 a1! a2! a3! a1! b4 b5", "a3 a1 b4 b5"},
		"never used":                  {4, "a1 a2 a3 a1! a3! b4 b4! b5", "a1 a3 b5 b4"},
		"of its own that were used":   {3, "a1 a2 a1! a2! b3 a4", "a4 a2 b3"},
		"an owner's last one":         {2, "a1 b2 c3", "b2 c3"},
		"an owner who comes back":     {2, "a1 b2 c3 a4", "a4 c3"},
		"only one is kept":            {1, "a1 a2 b3 b4", "b4"},
		"an owner who has none again": {2, "a1 b2 c3 b4 b5", "b5 c3"},
	} {
		s := &sessionStore{newTestStore(), t, 0}
		s.sessions.limit = tt.limit
		for step := range strings.FieldsSeq(tt.steps) {
			var id uint64
			_, _ = fmt.Sscan(strings.TrimSuffix(step[1:], "!"), &id)
			if strings.HasSuffix(step, "!") {
				s.uses(id, 1, s.sessions.byID[id].Value.(*session).highest()+1)
				continue
			}
			s.wants(openWriteOf(id, owners[step[0]]), 0, opened)
		}
		var left []string
		for _, ses := range inOrder(s.sessions.all()) {
			letter := strings.TrimPrefix(ses.owner.name, "client/")[:1]
			left = append(left, fmt.Sprint(letter, ses.id))
		}
		if got := strings.Join(left, " "); got != tt.want {
			t.Errorf("%s: %s: left are %s, want %s", name, tt.steps, got, tt.want)
		}
	}
}

// TestOwnersModel opens and uses sessions of several owners, with snapshots between, and
// looks who loses one to whom.
func TestOwnersModel(t *testing.T) {
	t.Parallel()
	lost, kept := 0, 0
	for seed := range uint64(1000) {
		r := seededRand(seed)
		s := newSessions()
		s.limit = 1 + r.IntN(1+r.IntN(40))
		owners := testOwners[:1+r.IntN(len(testOwners))]
		var model []*modelSession // as oracle has them
		for id := uint64(1); id < 100; id++ {
			if used := r.IntN(2 * s.limit); used < len(model) {
				ses := model[used]
				kept, err := s.use(ses.id, ses.highest+1)
				if err != nil {
					t.Fatalf("seed %d: session %d: %v", seed, ses.id, err)
				}
				ses.highest++
				s.remember(kept, ses.highest, result{version: id})
				model = append(slices.Delete(model, used, used+1), ses)
			}
			owner := owners[min(r.IntN(len(owners)), r.IntN(len(owners)))]
			if len(model) == s.limit {
				drop := toDrop(model, owner)
				if loses := model[drop].owner; loses != owner {
					lost++
					if hasFairShare(model, loses, owner) {
						t.Fatalf("seed %d: %q loses a session to %q", seed, loses, owner)
					}
				} else {
					kept++
				}
				model = slices.Delete(model, drop, drop+1)
			}
			unused := slices.IndexFunc(model, func(ses *modelSession) bool { return ses.highest > 0 })
			if unused < 0 {
				unused = len(model)
			}
			model = slices.Insert(model, unused, &modelSession{id: id, owner: owner})
			if err := s.add(id, owner); err != nil {
				t.Fatal(err)
			}
			if r.IntN(150) == 0 {
				s = restoredSessions(t, s)
			}
			all := inOrder(s.all())
			if !slices.EqualFunc(byOwner(model), all, (*modelSession).is) || s.count() != len(all) {
				t.Fatalf("seed %d: sessions %v, want %v", seed, all, byOwner(model))
			}
			if len(s.owners.heap) != len(s.owners.byName) {
				t.Fatalf("seed %d: %d owners, %d by name", seed, len(s.owners.heap), len(s.owners.byName))
			}
		}
	}
	if lost < 1000 || kept < 1000 {
		t.Errorf("%d sessions were lost to another's, %d to the owner's own", lost, kept)
	}
}

// hasFairShare reports whether an owner has no more of all sessions than an equal part,
// when another one opens one.
func hasFairShare(all []*modelSession, owner, opener string) bool {
	owners := map[string]bool{opener: true}
	has := 0
	for _, ses := range all {
		owners[ses.owner] = true
		if ses.owner == owner {
			has++
		}
	}
	return has*len(owners) <= len(all)
}

// restoredSessions are sessions that have gone through a snapshot.
func restoredSessions(t *testing.T, s *sessions) *sessions {
	t.Helper()
	st := newTestStore()
	st.version = 1 << 20
	limit := s.limit
	st.sessions = s
	restored, err := readSnapshot(bytes.NewReader(snapshotBytes(t, st)))
	if err != nil {
		t.Fatal(err)
	}
	restored.sessions.limit = limit
	return restored.sessions
}

// TestOwnersAreChecked: the log takes no session whose owner is no principal, and a node
// takes any that a principal opens.
func TestOwnersAreChecked(t *testing.T) {
	longest := "client/" + strings.Repeat("x", maxPrincipalName)
	var o operation
	for _, owner := range []string{"", "client", "client/shop", "admin", "reader/r", "node/18446744073709551615", longest} {
		write := mustMarshal(t, openWriteOf(7, owner))
		if err := o.parseWrite(write); err != nil || string(o.owner) != owner {
			t.Errorf("%q: %q, %v", owner, o.owner, err)
		}
		if !bytes.Equal(appendNewSession(nil, 7, owner), write) {
			t.Errorf("%q is encoded in another way than by protobuf", owner)
		}
	}
	if len(longest) > 80 {
		t.Errorf("an owner has %d bytes", len(longest))
	}
	for _, owner := range []string{
		"anyone", "client/", "/shop", "Client", "client/a/b", "client/a b", "client/\x00", "client/é", "client ", "rkv:client",
		"node", "node/0", "node/01", "node/1/1", "root", longest + "x", strings.Repeat("x", maxValueBytes),
	} {
		err := o.parseWrite(mustMarshal(t, openWriteOf(7, owner)))
		wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
	for _, p := range []principal{{}, {role: roleClient}, {role: roleAdmin, name: "alice"}, {role: roleNode, node: 1<<64 - 1}} {
		if err := checkOwner([]byte(ownerOf(p))); err != nil {
			t.Errorf("%v owns sessions as %q: %v", p, ownerOf(p), err)
		}
	}
}

// TestNobodysSessionsArePushedOut: a client that opens sessions without end, on a stream or
// one by one, costs another client none of its own, whichever nodes they call.
func TestNobodysSessionsArePushedOut(t *testing.T) {
	t.Parallel()
	const limit = 20
	c := newCluster(t, 0)
	pki, ca := testPKI(t, 3)
	c.pki = pki
	testCertificate(t, ca, pki, "shop", "client/shop", nil)
	testCertificate(t, ca, pki, "batch", "client/batch", nil)
	for id := range uint64(3) {
		n := c.start(id+1, "127.0.0.1:0")
		if err := n.server.n.do(c.ctx, func() error { n.server.n.store.sessions.limit = limit; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	c.init(1, 2, 3)
	clientOf := func(id uint64, name string) kvpb.KVServiceClient {
		address := c.nodes[id].address
		conn := dialNode(t, address, testCredentials(t, pki, name, address))
		t.Cleanup(func() { _ = conn.Close() })
		return kvpb.NewKVServiceClient(conn)
	}
	shop := clientOf(1, "shop")
	batch := clientOf(2, "batch")

	var sessions []uint64
	for range limit / 2 {
		resp, err := shop.OpenSession(c.ctx, &kvpb.OpenSessionRequest{})
		if err != nil {
			t.Fatal(err)
		}
		sessions = append(sessions, resp.Session)
	}
	stream, err := batch.Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	open := &kvpb.Operation{Operation: &kvpb.Operation_OpenSession{OpenSession: &kvpb.OpenSessionRequest{}}}
	results, err := exchange(stream, slices.Repeat([]*kvpb.Operation{open}, 5*limit)...)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if r.GetOpenSession().GetSession() == 0 {
			t.Fatalf("OpenSession on a stream: %v", r)
		}
	}
	for range limit {
		if _, err := batch.OpenSession(c.ctx, &kvpb.OpenSessionRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, session := range sessions {
		if _, err := shop.Set(c.ctx, withID(session, 1, setWrite("k", "v")).GetSet()); err != nil {
			t.Errorf("session %d: %v", session, err)
		}
	}
	c.restart(3) // it gets a snapshot
	c.settled(1, 2, 3)
	c.sameStates(1, 2, 3)
	n := c.nodes[3].server.n
	err = n.do(c.ctx, func() error {
		for _, name := range []string{"client/batch", "client/shop"} {
			if got := n.store.sessions.owners.of(name).count(); got != limit/2 {
				t.Errorf("%s has %d sessions, want %d", name, got, limit/2)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
