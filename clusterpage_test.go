// The page that shows the cluster, its JSON, and its curves.

package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// shownStatus is what these tests read of /status.
type shownStatus struct {
	Time    string  `json:"time"`
	Node    string  `json:"node_id"`
	Summary summary `json:"summary"`
	Members []struct {
		Node      string `json:"node_id"`
		Reachable bool   `json:"reachable"`
		Address   string `json:"address"`
	} `json:"members"`
	Notes []note `json:"notes"`
	Calls struct {
		Seconds float64
		Reads   []float64
	} `json:"calls"`
}

func (c *webClient) status(address string) (*shownStatus, error) {
	resp, body, err := c.ask(http.MethodGet, address, "/status")
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", resp.Status, body)
	}
	s := &shownStatus{}
	return s, json.Unmarshal([]byte(body), s)
}

// shows waits until a node shows the cluster in such a sentence, and so many members.
func (c *webClient) shows(address, text string, members int) *shownStatus {
	c.t.Helper()
	var shown *shownStatus
	eventually(c.t, func() error {
		s, err := c.status(address)
		if err != nil {
			return err
		}
		if !strings.Contains(s.Summary.Text, text) || len(s.Members) != members {
			return fmt.Errorf("it shows %q and %d members", s.Summary.Text, len(s.Members))
		}
		shown = s
		return nil
	})
	return shown
}

// TestClusterPage: a node shows all members as they are, without TLS and with it: healthy, one
// down, and no quorum.
func TestClusterPage(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T, uint64, ...func(*options)) *testCluster{
		"plain": newCluster, "TLS": newSecureCluster,
	} {
		t.Run(name, func(t *testing.T) {
			w := &webs{t: t}
			c := start(t, 3, w.set)
			reader := newWebClient(t, c.pki, "")
			if c.pki != "" {
				reader = newWebClient(t, c.pki, "reader")
			}
			for id := range uint64(3) {
				reader.shows(w.address(id+1), "there is no cluster", 1)
			}
			c.init(1, 2, 3)
			for id := range uint64(3) {
				s := reader.shows(w.address(id+1), "3 of 3 voters are up", 3)
				if s.Node != fmt.Sprint(id+1) || s.Summary.State != stateOK {
					t.Errorf("node %d says %+v", id+1, s)
				}
			}
			c.kill(3)
			s := reader.shows(w.address(1), "2 of 3 voters are up", 3)
			if s.Members[2].Reachable || s.Summary.Clusters[0].MayFail != 0 {
				t.Errorf("node 3 has been killed: %+v", s)
			}
			c.kill(2)
			reader.shows(w.address(1), "no leader: 1 of 3 voters answers", 3)
		})
	}
}

// TestClusterPageIsForReaders: who shows no certificate, that of a node, or one of another CA, sees
// neither the page nor its data.
func TestClusterPageIsForReaders(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newSecureCluster(t, 1, w.set)
	testCertificate(t, testAuthority(t, t.TempDir(), "ca"), c.pki, "stranger", "reader", nil)
	for _, path := range []string{"/", "/status"} {
		for name, want := range map[string]int{
			"": http.StatusUnauthorized, "stranger": http.StatusUnauthorized, "node1": http.StatusForbidden,
			"reader": http.StatusOK, "client": http.StatusOK, "admin": http.StatusOK,
		} {
			newWebClient(t, c.pki, name).get(w.address(1), path, want)
		}
	}
}

// TestClusterPageWithoutConnections: a node shows itself though its certificate has ended, and so
// nobody reaches it; others say that it has ended. Members are asked by their ids, for a certificate
// need not have the address of a node that has moved.
func TestClusterPageWithoutConnections(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	dir, ca := testPKI(t, 2)
	c.pki = dir
	c.start(1, "127.0.0.1:0")
	c.start(2, "127.0.0.1:0")
	c.init(1, 2)
	of := func(id uint64) *surveyor {
		s := c.nodes[id].server
		return &surveyor{s, &startPlan{}, newCallRecorder(s.methods, &s.operations)}
	}
	surveyOf := func(id uint64) *clusterStatus { return of(id).survey(t.Context()) }
	if _, ids := of(1).others(); ids[c.nodes[2].address] != 2 {
		t.Errorf("the ids at addresses are %v: whose certificate lacks its address is refused", ids)
	}
	ends := time.Now().Add(15 * time.Second) // long enough to be read
	testCertificate(t, ca, dir, "node1", "node/1", func(x *x509.Certificate) { x.NotAfter = ends })
	eventually(t, func() error {
		notes := fmt.Sprint(surveyOf(2).Notes)
		if !strings.Contains(notes, "replace the certificate of node 1 at "+c.nodes[1].address+": it has ended") {
			return fmt.Errorf("node 2 says %s", notes)
		}
		return nil
	})
	own := surveyOf(1)
	if !own.Members[0].Reachable || !strings.Contains(fmt.Sprint(own.Notes), "replace the certificate of node 1") {
		t.Errorf("node 1 says of itself: %v, %v", own.Members[0], own.Notes)
	}
}

// TestClusterPageOfStoppingNode: a survey, which waits for members that do not answer, ends with
// the HTTP server.
func TestClusterPageOfStoppingNode(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	v := &clusterView{ctx: ctx, survey: func(ctx context.Context) *clusterStatus {
		cancel()
		<-ctx.Done()
		return &clusterStatus{}
	}}
	v.show()
}

// TestRoleAndLag: what status -o json and the page say of members, also of those that do not answer,
// and of one that is listed twice, for it is being taken back.
func TestRoleAndLag(t *testing.T) {
	member := func(id, raftID, match uint64, set func(*kvpb.MemberStatus)) *kvpb.MemberStatus {
		m := &kvpb.MemberStatus{
			Node: &kvpb.Node{Id: id, Address: fmt.Sprint("n:", id)}, RaftId: raftID, Progress: &kvpb.Progress{MatchIndex: match},
		}
		set(m)
		return m
	}
	voter := func(m *kvpb.MemberStatus) { m.Voter = true }
	leader := &kvpb.MetricsResponse{
		Node: &kvpb.Node{Id: 1, Address: "n:1"}, RaftId: 1, ClusterId: 7, Role: kvpb.Role_ROLE_LEADER, LastIndex: 100, Level: 1,
		Members: []*kvpb.MemberStatus{
			member(1, 1, 100, voter), member(2, 2, 90, voter),
			member(3, 3, 0, func(m *kvpb.MemberStatus) { m.VoterOutgoing = true; m.Progress = nil }),
			member(4, 4, 50, func(m *kvpb.MemberStatus) { m.Learner = true }),
			member(5, 5, 99, voter), member(5, 6, 10, voter),
		},
	}
	fifth := &kvpb.MetricsResponse{
		Node: &kvpb.Node{Id: 5, Address: "n:5"}, RaftId: 5, ClusterId: 7, Role: kvpb.Role_ROLE_FOLLOWER,
	}
	asked := []*endpoint{{address: "n:1", metrics: leader}, {address: "n:5", metrics: fifth}}
	for _, address := range []string{"n:2", "n:3", "n:4", "old:1"} {
		asked = append(asked, &endpoint{address: address, err: errors.New("no")})
	}
	var got []string
	for _, r := range newSurvey(asked).rows {
		got = append(got, fmt.Sprintf("%d %s %s", r.NodeID, r.Role, r.Lag))
	}
	wantText(t, "rows", strings.Join(got, "; "), "1 leader 0; 2 voter 10; 3 leaving ; 4 learner 50; 5 follower 1; 0  ")
}

// TestClusterPageOfLongAgo: addresses at which nobody is any more, and no member is listed, are
// not shown once there is a cluster, and are while there is none.
func TestClusterPageOfLongAgo(t *testing.T) {
	gone := &memberRow{Address: "gone:1"}
	member := &memberRow{NodeID: 2, Address: "b:1"}
	waits := &memberRow{NodeID: 3, Address: "c:1", Reachable: true}
	s := &survey{rows: []*memberRow{gone, member, waits}}
	s.leaveOutStrangers()
	if len(s.rows) != 3 {
		t.Errorf("without a cluster, %d rows", len(s.rows))
	}
	s.views = map[uint64]*kvpb.MetricsResponse{7: {}}
	s.leaveOutStrangers()
	if !slices.Equal(s.rows, []*memberRow{member, waits}) {
		t.Errorf("with a cluster, %v", s.rows)
	}
}

// TestClusterPageIsShared: all who look within a second get the same survey, so that those who
// look do not load the members.
func TestClusterPageIsShared(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		asked := 0
		v := &clusterView{ctx: t.Context(), survey: func(context.Context) *clusterStatus {
			asked++
			return &clusterStatus{Time: time.Now()}
		}}
		v.show()
		time.Sleep(surveyAge - 1)
		v.show()
		if asked != 1 {
			t.Errorf("asked %d times within a second", asked)
		}
		time.Sleep(1 * time.Nanosecond)
		v.show()
		if asked != 2 {
			t.Errorf("asked %d times in a second", asked)
		}
	})
}

// TestPageIsAlone: the page runs its own script alone, by the hash that its policy has, and loads
// nothing of anybody else.
func TestPageIsAlone(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	newCluster(t, 1, w.set)
	resp, body, err := newWebClient(t, "", "").ask(http.MethodGet, w.address(1), "/")
	if err != nil {
		t.Fatal(err)
	}
	policy := resp.Header.Get("Content-Security-Policy")
	for _, part := range []string{"default-src 'none'", "connect-src 'self'", hashOf("script"), hashOf("style"), "frame-ancestors 'none'"} {
		if !strings.Contains(policy, part) {
			t.Errorf("the policy lacks %s: %s", part, policy)
		}
	}
	if hashOf("script") == hashOf("style") {
		t.Error("script and style have one hash")
	}
	// What the policy would refuse: elements and attributes that the hashes do not cover.
	for _, pattern := range []string{`<script[^>]+>`, `<link[^>]+href="[^d]`, `\sstyle="`, `\son[a-z]+="`, `https?://[^w]`, `@import`, `innerHTML`} {
		if found := regexp.MustCompile(pattern).FindString(body); found != "" {
			t.Errorf("the page has %q", found)
		}
	}
	if strings.Count(body, "<script>") != 1 || strings.Count(body, "<style>") != 1 {
		t.Error("want one script and one style")
	}
}

// TestCallCurves: what was called between two points makes the newer one; old points go.
func TestCallCurves(t *testing.T) {
	methods := map[string]*methodCounts{}
	for _, name := range []string{
		kvpb.KVService_Get_FullMethodName, kvpb.KVService_List_FullMethodName, kvpb.KVService_Set_FullMethodName,
		kvpb.KVService_Delete_FullMethodName, kvpb.KVService_DeleteRange_FullMethodName, kvpb.KVService_OpenSession_FullMethodName,
	} {
		service, method, _ := strings.Cut(name[1:], "/")
		methods[name] = newMethodCounts(service, method, true)
	}
	var operations operationCounts
	methods[kvpb.KVService_Get_FullMethodName].ended(nil, time.Millisecond) // before the first point
	r := newCallRecorder(methods, &operations)
	for range 98 {
		methods[kvpb.KVService_Get_FullMethodName].ended(nil, time.Millisecond)
	}
	methods[kvpb.KVService_List_FullMethodName].ended(nil, 20*time.Millisecond)
	methods[kvpb.KVService_List_FullMethodName].ended(nil, time.Minute)
	methods[kvpb.KVService_Set_FullMethodName].ended(nil, time.Minute)
	methods[kvpb.KVService_Set_FullMethodName].ended(status.Error(codes.Unavailable, ""), time.Second)
	methods[kvpb.KVService_Set_FullMethodName].ended(status.Error(codes.InvalidArgument, ""), time.Second)
	operations.ok.Add(10)
	r.record()
	want := callCurves{
		Seconds: 5, Points: curvePoints,
		Reads: []float64{20}, Writes: []float64{.2}, Failed: []float64{.2}, Pipelined: []float64{2},
		ReadP99: []float64{.025}, WriteP99: []float64{20},
	}
	if got := fmt.Sprint(*r.latest()); got != fmt.Sprint(want) {
		t.Errorf("%s, want %v", got, want)
	}
	shown := r.latest()
	for range curvePoints {
		r.record()
	}
	if len(shown.Reads) != 1 {
		t.Error("curves that were shown have changed")
	}
	last := r.latest()
	if len(last.Reads) != curvePoints || slices.Max(last.Reads) != 0 || slices.Max(last.ReadP99) != 0 {
		t.Errorf("after ten idle minutes: %+v", last)
	}
}
