package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	"raft-key-value/kvpb"
)

// TestLogFormat: a line of JSON has the names of the text, and values as they are in the text.
func TestLogFormat(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ format, want string }{
		{"text", `level=WARN msg="two words" node=7 addr=127.0.0.1:1 took=1.5s err="no way" n=3 joint=true` + "\n"},
		{"json", `"level":"WARN","msg":"two words","node":7,"addr":"127.0.0.1:1","took":"1.5s","err":"no way","n":3,"joint":true}` + "\n"},
	} {
		o := defaultOptions()
		o.id = 7
		o.logFormat = test.format
		o.logLevel = slog.LevelWarn
		var log strings.Builder
		logger := newLogger(&log, &o)
		logger.Info("left out")
		logger.Warn("two words", "addr", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}, "took", 1500*time.Millisecond,
			"err", errors.New("no way"), "n", 3, "joint", true)
		_, line, _ := strings.Cut(log.String(), " ")
		if test.format == "json" {
			_, line, _ = strings.Cut(log.String(), ",")
		}
		wantText(t, test.format, line, test.want)
		if strings.Contains(log.String(), "left out") {
			t.Errorf("%s: the level is not kept: %s", test.format, &log)
		}
	}
}

// TestLogOfProcessInJSON: with --log-format json, all that a node logs is.
func TestLogOfProcessInJSON(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	status, log := endOfProcess(t, "--id", "3", "--addr", l.Addr().String(), "--log-format", "json")
	if status != exitFailed {
		t.Errorf("status %d", status)
	}
	var last struct {
		Level, Msg string
		Node       uint64
		Err        string
	}
	for line := range strings.Lines(log) {
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Errorf("%v: %q", err, line)
		}
	}
	wantText(t, "last line", last.Msg, "stopped")
	wantPart(t, last.Err, "address already in use")
	if last.Node != 3 {
		t.Errorf("it is of node %d", last.Node)
	}
}

// TestPlannedRestartIsNoWarning: nodes in memory that are stopped one after the other, while the
// cluster can do without each, are no loss. One that is killed is.
func TestPlannedRestartIsNoWarning(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	log := &lockedBuffer{}
	c.log = log
	for id := range uint64(3) {
		c.start(id+1, "127.0.0.1:0")
	}
	c.init(1, 2, 3)
	ready := func() (leader uint64) {
		leader = c.settled(1, 2, 3)
		for id := range c.nodes {
			c.health(id, restartHealth, grpc_health_v1.HealthCheckResponse_SERVING)
		}
		return leader
	}
	leader := ready()
	for _, id := range []uint64{leader, leader%3 + 1} {
		said := &lockedBuffer{}
		for tries := 0; ; tries++ {
			before := len(log.String())
			c.restart(id)
			ready()
			said = &lockedBuffer{}
			_, _ = said.Write([]byte(log.String()[before:]))
			wasAlone := len(linesWith(said, "while too few others answered")) > 0 // on a busy machine, for a moment
			if !wasAlone || tries == 5 {
				break
			}
		}
		wantLevels(t, said, "a node has lost its memory", 0, 0)
		wantLevels(t, said, "peer lost", 0, 0)
		wantLevels(t, said, "refuses", 0, 0)
		if len(linesWith(said, peerStops)) == 0 {
			t.Errorf("nobody has heard that node %d stops: %s", id, said)
		}
		back := linesWith(said, "a node is back from a restart")
		if len(back) == 0 || !strings.Contains(back[0], fmt.Sprintf("peer=%d address=%s", id, c.nodes[id].address)) {
			t.Errorf("node %d is back: %q", id, back)
		}
	}

	leader = ready()
	before := len(log.String())
	c.killed(leader)
	ready()
	said := &lockedBuffer{}
	_, _ = said.Write([]byte(log.String()[before:]))
	wantLevels(t, said, fmt.Sprintf(`msg="%s"`, peerDisconnected), 0, 2)
	lost := linesWith(said, "a node has lost its memory")
	if len(lost) == 0 || !strings.Contains(lost[0], "level=WARN") {
		t.Errorf("of a node that was killed, the log says %q", lost)
	}
	wantLevels(t, said, "a node is back from a restart", 0, 0)
}

// wantLevels wants so many lines at these levels of those that have some words.
func wantLevels(t *testing.T, log fmt.Stringer, words string, infos, warnings int) {
	t.Helper()
	lines := linesWith(log, words)
	got := [2]int{}
	for _, line := range lines {
		if strings.Contains(line, "level=INFO") {
			got[0]++
		}
		if strings.Contains(line, "level=WARN") {
			got[1]++
		}
	}
	if got != [2]int{infos, warnings} {
		t.Errorf("%q: want %d lines at INFO, %d at WARN; got %q", words, infos, warnings, lines)
	}
}

// TestRebirthIsExplained: which node's coming back without memory is no loss.
func TestRebirthIsExplained(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name      string
		state     int
		before    func(*node)
		isPlanned bool
	}{
		{"it has said nothing", following, func(n *node) { n.peerDown(2, true) }, false},
		{"there was no stream to it", following, func(n *node) {
			n.peers.disconnect(2)
			n.peerDown(2, true)
		}, true},
		{"it has said that it stops", following, func(n *node) {
			n.peerStops(2)
			n.peerDown(2, true)
		}, true},
		{"it has a directory", following, func(n *node) {
			n.noteDurable(2, 2)
			n.peerStops(2)
		}, false},
		{"it was back meanwhile", following, func(n *node) {
			n.peerStops(2)
			n.peerDown(2, true)
			n.peerUp(2, true, &kvpb.Peer{Node: plainNode(2), RaftId: 2})
			n.peerDown(2, true)
		}, false},
		{"the others are a majority", leading, func(n *node) {
			n.peerStops(2)
			n.peers.heard[3] = n.clock.now
		}, true},
		{"they are none", leading, func(n *node) {
			n.peerStops(2)
			n.peers.disconnect(3)
			n.clock.now += n.electionTicks() + 1
		}, false},
	} {
		l := newLone(t, test.state)
		log := &lockedBuffer{}
		l.n.logger = logInto(log)
		test.before(l.n)
		l.turn(0)
		l.n.noteRebirth(2, &kvpb.Peer{Node: plainNode(2), RaftId: 9, Life: 9})
		loss, planned := len(linesWith(log, "lost its memory")), len(linesWith(log, "back from a restart"))
		want := [2]int{1, 0}
		if test.isPlanned {
			want = [2]int{0, 1}
		}
		if got := [2]int{loss, planned}; got != want {
			t.Errorf("%s: %s", test.name, log)
		}
		if !strings.Contains(log.String(), "peer=2 address=n2:1") {
			t.Errorf("%s: it is not named: %s", test.name, log)
		}
	}
	l := newLone(t, following)
	l.n.peerStops(2)
	l.n.peerStops(77) // a stranger
	l.turn(0)
	l.n.peers.forget([]uint64{2})
	if len(l.n.peers.goodbyes) > 0 {
		t.Errorf("of members that are none: %v", l.n.peers.goodbyes)
	}
}

// TestFailedNodeSaysNoGoodbye: a node that cannot go on was not told to stop.
func TestFailedNodeSaysNoGoodbye(t *testing.T) {
	t.Parallel()
	c, log := startLogged(t)
	c.start(2, "127.0.0.1:0")
	c.init(1, 2)
	c.settled(1, 2)
	n := c.nodes[2].server.n
	n.inbox.event(func() { n.err = errContradiction })
	c.ends(2, errContradiction)
	eventually(t, func() error {
		if len(linesWith(log, peerDisconnected)) == 0 {
			return fmt.Errorf("the log says %s", log)
		}
		return nil
	})
	wantLevels(t, log, fmt.Sprintf(`msg="%s"`, peerStops), 0, 0)
}

// endedStream has ended with a status, which only Recv tells.
type endedStream struct {
	kvpb.RaftService_StreamClient
	sent chan struct{} // closed by Send
}

func (s *endedStream) Send(*kvpb.StreamRequest) error {
	close(s.sent)
	return io.EOF
}

func (s *endedStream) Recv() (*kvpb.StreamResponse, error) {
	<-s.sent
	return nil, toStatus(errStopping, false)
}

// TestGoodbyeIsHeard: also if sending fails first.
func TestGoodbyeIsHeard(t *testing.T) {
	t.Parallel()
	nw := newNetwork(&sender{}, quiet(), nil)
	defer nw.close()
	p := newPeer(nw, 22, plainNode(2))
	p.connected(&kvpb.Peer{Node: plainNode(2), RaftId: 22, Life: 1}, plainNode(2))
	p.tellRooms([]*kvpb.RoomReport{{RaftId: 1}})
	a := &streamAttempt{peer: p}
	a.ctx, a.cancel = context.WithCancelCause(t.Context())
	err := a.send(&endedStream{sent: make(chan struct{})})
	wantText(t, "reason", errorReason(err), reasonStopping)
}

// TestLevelsOfPeerStates: what needs nobody is no warning.
func TestLevelsOfPeerStates(t *testing.T) {
	t.Parallel()
	for state, want := range map[string]slog.Level{
		peerConnected: slog.LevelInfo, peerMoved: slog.LevelInfo, peerStops: slog.LevelInfo, peerNotThere: slog.LevelInfo,
		peerDisconnected: slog.LevelWarn, peerUnreachable: slog.LevelWarn, peerRefuses: slog.LevelWarn,
	} {
		if got := levelOf(state); got != want {
			t.Errorf("%q is logged at %v, want %v", state, got, want)
		}
	}
	for _, test := range []struct {
		verdict       kvpb.Verdict
		mine, cluster uint64
		want          bool
	}{
		{kvpb.Verdict_VERDICT_NOT_ME, 5, 0, true},
		{kvpb.Verdict_VERDICT_NOT_ME, 5, 5, true},
		{kvpb.Verdict_VERDICT_OTHER_CLUSTER, 5, 0, true},
		{kvpb.Verdict_VERDICT_OTHER_CLUSTER, 0, 5, true},
		{kvpb.Verdict_VERDICT_OTHER_CLUSTER, 6, 5, false},
		{kvpb.Verdict_VERDICT_CALLED_TOO_OLD, 5, 0, false},
		{kvpb.Verdict_VERDICT_REMOVED, 5, 0, false},
	} {
		h := &kvpb.Hello{ClusterId: test.mine, To: &kvpb.Peer{Node: plainNode(2), RaftId: 2}}
		w := &kvpb.Welcome{Verdict: test.verdict, ClusterId: test.cluster, Peer: &kvpb.Peer{Node: plainNode(2), RaftId: 3}}
		if got := isOnItsWay(h, w); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
		w.Peer.Node = plainNode(3)
		isOther := test.verdict == kvpb.Verdict_VERDICT_NOT_ME
		if got := isOnItsWay(h, w); isOther && got {
			t.Errorf("another node than that which was called, %+v: %v", test, got)
		}
	}
}

// TestFullQueueIsSaid: once in a while, and of members alone.
func TestFullQueueIsSaid(t *testing.T) {
	t.Parallel()
	l := newLone(t, following)
	log := &lockedBuffer{}
	n := l.n
	n.logger = logInto(log)
	pause := n.ticksOf(slowLogInterval)
	for _, step := range []struct{ wait, raftID, lines uint64 }{{0, 77, 0}, {0, 3, 1}, {pause - 1, 3, 1}, {0, 2, 2}, {1, 3, 3}} {
		n.clock.now += step.wait
		n.followDown(step.raftID, false)
		if lines := linesWith(log, "messages to a peer are dropped"); uint64(len(lines)) != step.lines {
			t.Errorf("%+v: %q", step, lines)
		}
	}
}
