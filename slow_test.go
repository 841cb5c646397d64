// Tests of slow.go: what takes long is said, with who and how long, and not too often.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

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
		synctest.Test(t, func(t *testing.T) {
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
