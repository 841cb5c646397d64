// Tests of slow.go: what takes long is said, with who and how long, and not too often.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

func logInto(b *lockedBuffer) *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

// linesWith are the lines of a log that have some words.
func linesWith(log fmt.Stringer, words string) (lines []string) {
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, words) {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestSlowLog: a line in 10 s, with what was left out since the last one; and another one at once
// if it says twice as much.
func TestSlowLog(t *testing.T) {
	t.Parallel()
	var l slowLog
	begin := time.Unix(1000, 0)
	note := func(after, took time.Duration, want string) {
		t.Helper()
		others, isDue := l.due(begin.Add(after), took)
		got := "-"
		if isDue {
			got = strings.Trim(fmt.Sprint(others), "[]")
		}
		wantText(t, fmt.Sprint(after), got, want)
	}
	note(0, time.Second, "")
	note(1*time.Second, 900*time.Millisecond, "-")
	note(2*time.Second, 1900*time.Millisecond, "-")
	note(slowLogInterval-1, time.Second, "-")
	note(slowLogInterval, time.Second, "others 3 worst 1.9s")
	note(slowLogInterval+1, 2*time.Second, "")
	note(slowLogInterval+2, 3999*time.Millisecond, "-")
	note(slowLogInterval+3, 4*time.Second, "others 1 worst 4s")
	note(2*slowLogInterval+3, time.Second, "")
}

// TestSlowCallIsSaid: a call over a second, or one that has used up its time, is; one that is
// meant to wait is not.
func TestSlowCallIsSaid(t *testing.T) {
	t.Parallel()
	late := status.Error(codes.DeadlineExceeded, "late")
	for _, test := range []struct {
		method string
		req    any
		took   time.Duration
		err    error
		isSaid bool
	}{
		{kvpb.KVService_Set_FullMethodName, &kvpb.SetRequest{}, slowCall, nil, true},
		{kvpb.KVService_Set_FullMethodName, &kvpb.SetRequest{}, slowCall - 1, nil, false},
		{kvpb.KVService_Set_FullMethodName, &kvpb.SetRequest{}, time.Millisecond, late, true},
		{kvpb.KVService_Set_FullMethodName, &kvpb.SetRequest{}, time.Millisecond, errNoLeader, false},
		{kvpb.KVService_Get_FullMethodName, &kvpb.GetRequest{}, slowCall, nil, true},
		{kvpb.KVService_Get_FullMethodName, &kvpb.GetRequest{Local: true, MinVersion: 9}, time.Minute, late, false},
		{kvpb.KVService_List_FullMethodName, &kvpb.ListRequest{Local: true, MinVersion: 9}, time.Minute, nil, false},
		{kvpb.ClusterService_Metrics_FullMethodName, &kvpb.MetricsRequest{}, slowCall, nil, true},
		{kvpb.ClusterService_AddLearner_FullMethodName, &kvpb.AddLearnerRequest{}, time.Minute, late, false},
		{kvpb.ClusterService_Init_FullMethodName, &kvpb.InitRequest{}, time.Minute, nil, false},
		{kvpb.RaftService_Join_FullMethodName, &kvpb.JoinRequest{}, time.Minute, nil, false},
		{"/grpc.health.v1.Health/Check", nil, slowCall, nil, true},
	} {
		log := &lockedBuffer{}
		s := &server{n: &node{logger: logInto(log)}}
		s.noteSlowCall(context.Background(), test.method, test.req, test.took, test.err)
		lines := linesWith(log, `msg="a call took long"`)
		if isSaid := len(lines) == 1; isSaid != test.isSaid {
			t.Errorf("%s, %v, %v: %q, want it said: %v", test.method, test.took, test.err, lines, test.isSaid)
		}
		if test.isSaid {
			wantPart(t, lines[0], "method="+test.method[1:]+" took="+test.took.String()+" code=")
		}
	}
}

// TestSlowCallOfCluster: a Set that finds no majority in its time is said by the node that was
// called.
func TestSlowCallOfCluster(t *testing.T) {
	t.Parallel()
	c, log := startLogged(t, patient)
	c.start(2, "127.0.0.1:0")
	c.init(1, 2)
	c.settled(1, 2)
	c.kill(2)
	eventually(t, func() error { // on a busy machine, a call can be late before the node has it
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := c.nodes[1].Set(ctx, &kvpb.SetRequest{Key: "k"})
		if err == nil {
			t.Fatal("it has a majority")
		}
		for _, line := range linesWith(log, "a call took long") {
			if strings.Contains(line, "KVService/Set") {
				return nil
			}
		}
		return fmt.Errorf("no line after: %w", err)
	})
}

// slowFS takes long to sync files.
type slowFS struct {
	fileSystem
	takes time.Duration
}

type slowFile struct {
	file
	takes time.Duration
}

func (f slowFile) sync() error {
	time.Sleep(f.takes)
	return f.file.sync()
}

func (fs slowFS) create(path string) (file, error) {
	f, err := fs.fileSystem.create(path)
	return slowFile{f, fs.takes}, err
}

func (fs slowFS) open(path string) (file, error) {
	f, err := fs.fileSystem.open(path)
	return slowFile{f, fs.takes}, err
}

// TestSlowDiskIsSaid: by the writer, which waits for it; that the first job took long is not.
func TestSlowDiskIsSaid(t *testing.T) {
	for _, takes := range []time.Duration{slowWrite / 2, slowWrite} {
		dir := t.TempDir()
		withFakeClock(t, func(t *testing.T) {
			log := &lockedBuffer{}
			o := defaultOptions()
			n := newNode(o, plainNode(1), logInto(log))
			n.net = deafNetwork{}
			d, err := openDisk(slowFS{osFS{}, takes}, dir, o.logBytes, n.logger)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.open(d); err != nil {
				t.Fatal(err)
			}
			d.start(d.run)
			ctx, cancel := context.WithCancel(t.Context())
			loop := inBackground(func() error { return n.run(ctx) })
			err = n.do(ctx, func() error { _, err := n.bootstrap(nil); return err })
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * slowLogInterval) // of the bubble
			cancel()
			<-loop.ended
			d.close()
			lines := linesWith(log, "a write to the disk took long")
			isSaid := len(lines) > 0
			if isSaid != (takes >= slowWrite) {
				t.Errorf("syncs take %v: %q", takes, lines)
			}
			for _, line := range lines {
				wantPart(t, line, "level=WARN")
				wantPart(t, line, "took="+takes.String())
				wantPart(t, line, "dir="+dir)
			}
		})
	}
}

// TestSlowTurnIsSaid: by the loop, with what came in.
func TestSlowTurnIsSaid(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		log := &lockedBuffer{}
		n := newNode(defaultOptions(), plainNode(1), logInto(log))
		n.net = deafNetwork{}
		ctx, cancel := context.WithCancel(t.Context())
		loop := inBackground(func() error { return n.run(ctx) })
		for _, takes := range []time.Duration{slowTurn - 1, 150 * time.Millisecond, 140 * time.Millisecond} {
			err := n.do(ctx, func() error {
				time.Sleep(takes)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(slowLogInterval)
		if err := n.do(ctx, func() error { time.Sleep(slowTurn); return nil }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		cancel()
		<-loop.ended
		lines := linesWith(log, "a turn of the loop took long")
		if len(lines) != 2 {
			t.Fatalf("lines %q", lines)
		}
		wantPart(t, lines[0], "took=150ms messages=0 calls=0")
		wantPart(t, lines[1], "took=100ms messages=0 calls=0 others=1 worst=140ms")
	})
}

// slowStream takes long to send.
type slowStream struct {
	kvpb.RaftService_StreamClient
	takes time.Duration
	ctx   context.Context
	sent  int
}

func (s *slowStream) Send(*kvpb.StreamRequest) error {
	time.Sleep(s.takes)
	s.sent++
	return nil
}

func (s *slowStream) Recv() (*kvpb.StreamResponse, error) {
	<-s.ctx.Done()
	return nil, s.ctx.Err()
}

// TestSlowPeerIsSaid: by its goroutine, which waits for it to take messages.
func TestSlowPeerIsSaid(t *testing.T) {
	for _, takes := range []time.Duration{slowSend - 1, slowSend} {
		withFakeClock(t, func(t *testing.T) {
			log := &lockedBuffer{}
			nw := newNetwork(&sender{}, logInto(log), nil)
			p := newPeer(nw, 22, plainNode(2))
			p.connected(&kvpb.Peer{Node: plainNode(2), RaftId: 22, Life: 1}, plainNode(2))
			a := &streamAttempt{peer: p}
			a.ctx, a.cancel = context.WithCancelCause(t.Context())
			s := &slowStream{takes: takes, ctx: a.ctx}
			sending := inBackground(func() error { return a.send(s) })
			for range 3 {
				p.tellRooms([]*kvpb.RoomReport{{RaftId: 1}})
				time.Sleep(2 * slowSend)
			}
			a.cancel(nil)
			<-sending.ended
			nw.close()
			lines := linesWith(log, "a peer takes messages slowly")
			switch {
			case s.sent != 3:
				t.Errorf("%d batches were sent", s.sent)
			case takes < slowSend && len(lines) == 0:
			case takes == slowSend && len(lines) == 1:
				wantPart(t, lines[0], "peer=2 address=n2:1 took=1s waiting=0")
			default:
				t.Errorf("a batch takes %v: %q", takes, lines)
			}
		})
	}
}

// TestSilentPeerIsSaid: a leader says once that a member is connected and does not answer, and
// once that it does again. What it heard of it before it was connected does not count.
func TestSilentPeerIsSaid(t *testing.T) {
	l := newLone(t, leading)
	log := &lockedBuffer{}
	n := l.n
	n.logger = logInto(log)
	heartbeats := func(ticks uint64, heard ...uint64) {
		for range ticks {
			n.clock.now++
			for _, id := range heard {
				n.peers.heard[id] = n.clock.now
			}
			n.followSilences()
		}
	}
	limit := max(n.ticksOf(slowAnswer), n.electionTicks())
	said := func(silent, again int) {
		t.Helper()
		warned, over := linesWith(log, "does not answer"), linesWith(log, "answers again")
		if len(warned) != silent || len(over) != again {
			t.Fatalf("want %d and %d lines: %s", silent, again, log)
		}
	}
	heartbeats(2*limit, 2, 3)
	said(0, 0)
	heartbeats(limit, 2)
	said(0, 0)
	heartbeats(1, 2)
	said(1, 0)
	wantPart(t, log.String(), "peer=3 address=n3:1 for=1s")
	heartbeats(5*limit, 2)
	said(1, 0)
	heartbeats(3, 2, 3)
	said(1, 1)
	n.peers.disconnect(3)
	heartbeats(5*limit, 2)
	n.peers.connect(3)
	heartbeats(limit, 2)
	said(1, 1)
	heartbeats(2, 2)
	said(2, 1)
	n.catchup.forget()
	if len(n.catchup.silences) > 0 {
		t.Error("another leader's term begins with the silences of this one")
	}
}

// TestLeaderSaysWhoIsSilent: it looks at each heartbeat.
func TestLeaderSaysWhoIsSilent(t *testing.T) {
	l := newLone(t, leading)
	log := &lockedBuffer{}
	l.n.logger = logInto(log)
	for range 3 * l.n.ticksOf(slowAnswer) {
		l.turn(1)
		l.n.peers.heard[2] = l.n.clock.now
		l.n.rn.ReportUnreachable(3)
		if len(linesWith(log, "does not answer")) > 0 {
			return
		}
	}
	t.Errorf("nothing is said: leader %v, %s", l.n.leads(), log)
}

// TestSlowText: for a minute, it is told what took long, and how long at most.
func TestSlowText(t *testing.T) {
	t.Parallel()
	var l slowLog
	begin := time.Unix(1000, 0)
	wantText(t, "nothing yet", l.text(begin, "it"), "")
	l.due(begin, 3*time.Second)
	l.due(begin.Add(50*time.Second), time.Second)
	wantText(t, "the longest", l.text(begin.Add(80*time.Second), "it"), "it took 3s, the last time 30s ago")
	wantText(t, "a minute later", l.text(begin.Add(50*time.Second+slowFor), "it"), "")
	l.due(begin.Add(50*time.Second+slowFor), 2*time.Second)
	wantText(t, "long after", l.text(begin.Add(50*time.Second+slowFor), "it"), "it took 2s, the last time 0s ago")
}

// TestSlowIsInMetrics: what took long, of each kind, is in Metrics, and in what status says.
func TestSlowIsInMetrics(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := newCluster(t, 2, steady, func(o *options) { o.durable, o.dataDir = true, fmt.Sprintf("%s/%d", dir, o.id) })
	c.init(1, 2)
	leader := c.settled(1, 2)
	now := time.Now()
	s := c.nodes[leader].server
	// Hours, for what really takes long on a busy machine is told as well, and the longest wins.
	s.slowCalls.due(now, time.Hour)
	for _, p := range s.net.peers {
		p.slowSends.due(now, 2*time.Hour)
	}
	c.inLoop(leader, func(n *node) error {
		n.slowTurns.due(now, 3*time.Hour)
		n.durable.disk.slowWrites.due(now, 4*time.Hour)
		for id := range n.store.members {
			n.catchup.silences[id] = &silence{warned: id != n.id.raftID, since: n.clock.now}
		}
		// The answer is made in this turn: the next heartbeat sees that the other one answers.
		texts := strings.Join(n.slowTexts(now), "; ")
		wantPart(t, texts, "connected and does not answer")
		return nil
	})
	m, err := s.Metrics(t.Context(), &kvpb.MetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	texts := strings.Join(m.Slow, "\n")
	for _, part := range []string{"a call took 1h0m0s", "sending to node ", "took 2h0m0s", "a turn of the loop took 3h0m0s", "a write to the disk took 4h0m0s"} {
		wantPart(t, texts, part)
	}
	if other, err := c.metrics(3 - leader); err != nil || slices.Contains(other.Slow, "") {
		t.Errorf("of the other node: %q, %v", other.GetSlow(), err)
	}
	notes := (&survey{rows: []*memberRow{{NodeID: leader, metrics: m}}}).notes()
	wantPart(t, fmt.Sprint(notes), fmt.Sprintf("{true slow at node %d: a call took 1h0m0s", leader))
}

// TestNoteQuotaIsNearlyFull: it is said from nine tenths on, until writes are refused, which says more.
func TestNoteQuotaIsNearlyFull(t *testing.T) {
	for _, tt := range []struct {
		used    uint64
		refused string
		isSaid  bool
	}{{899 << 20, "", false}, {900 << 20, "", true}, {1000 << 20, "it is full", false}} {
		m := &kvpb.MetricsResponse{Quota: 1000 << 20, QuotaUsed: tt.used, WritesRefused: tt.refused}
		s := &survey{views: map[uint64]*kvpb.MetricsResponse{7: m}}
		if isSaid := strings.Contains(fmt.Sprint(s.notes()), "of 1000 MiB that may be stored are used"); isSaid != tt.isSaid {
			t.Errorf("%d used, %q: said: %v", tt.used, tt.refused, isSaid)
		}
	}
}
