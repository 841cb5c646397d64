// What takes long is said once in a while, as a warning: writes to the disk, turns of the loop,
// calls, and peers. Whoever does it measures it, by its own clock; the loop counts ticks.

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// What takes longer is slow.
const (
	slowTurn  = 100 * time.Millisecond // as long as the default between two heartbeats
	slowWrite = 500 * time.Millisecond // less than the default election timeout
	slowSend  = time.Second
	slowCall  = time.Second
	// slowAnswer is how long a member may leave its leader without an answer, and an election
	// timeout, if that is longer: it is asked with each heartbeat.
	slowAnswer = time.Second
)

// slowFor is for how long it is told in Metrics that something took long.
const slowFor = time.Minute

// slowLogInterval is the least time between two lines of a kind, unless the second one says at
// least twice as much.
const slowLogInterval = 10 * time.Second

// slowLog says when a line of its kind may be logged. Any goroutine may call its methods.
type slowLog struct {
	mu      sync.Mutex
	said    time.Time     // when a line was logged
	took    time.Duration // what it has said
	leftOut int           // how many were not logged since
	worst   time.Duration // of these

	last   time.Time     // when something took long
	lately time.Duration // the longest of those of which none came slowFor after the one before
}

// text says what took long in the last minute, and how long at most; empty: nothing.
func (l *slowLog) text(now time.Time, what string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	ago := now.Sub(l.last)
	if l.last.IsZero() || ago >= slowFor {
		return ""
	}
	return fmt.Sprintf("%s took %v, the last time %v ago", what, l.lately.Round(time.Millisecond), ago.Round(time.Second))
}

// due takes in that something took long, and reports whether a line may be logged now. If so, it
// returns what the line has to say of those that were left out since the last one.
func (l *slowLog) due(now time.Time, took time.Duration) (others []any, isDue bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.last) >= slowFor {
		l.lately = 0
	}
	l.last = now
	l.lately = max(l.lately, took)
	isSoon := !l.said.IsZero() && now.Sub(l.said) < slowLogInterval
	if isSoon && took < 2*l.took {
		l.leftOut++
		l.worst = max(l.worst, took)
		return nil, false
	}
	if l.leftOut > 0 {
		others = []any{"others", l.leftOut, "worst", max(l.worst, took).Round(time.Millisecond)}
	}
	l.said = now
	l.took = took
	l.leftOut = 0
	l.worst = 0
	return others, true
}

// noteSlowCall logs a unary call that took long, or had less time than that and has used it up.
func (s *server) noteSlowCall(ctx context.Context, method string, req any, took time.Duration, err error) {
	code := status.Code(err)
	isSlow := took >= slowCall || code == codes.DeadlineExceeded
	if !isSlow || isMeantToWait(method, req) {
		return
	}
	others, isDue := s.slowCalls.due(time.Now(), took)
	if !isDue {
		return
	}
	args := append(callerArgs(ctx), "method", strings.TrimPrefix(method, "/"),
		"took", took.Round(time.Millisecond), "code", codeName(status.Convert(err)))
	s.n.logger.Warn("a call took long", append(args, others...)...)
}

// isMeantToWait reports whether a unary call waits for something else than this cluster's work:
// the requests of operators for nodes that catch up, of which the log says how long each took;
// those of nodes for other nodes; and a local read for a version that is yet to be written.
// Streams are not measured at all: they last as long as their callers want, or read slowly.
func isMeantToWait(method string, req any) bool {
	if method == kvpb.ClusterService_Metrics_FullMethodName {
		return false
	}
	if strings.HasPrefix(method, clusterPrefix) || strings.HasPrefix(method, raftPrefix) {
		return true
	}
	waiting, ok := req.(interface{ GetMinVersion() uint64 })
	return ok && waiting.GetMinVersion() > 0
}

// noteSlowSend logs that a peer took long to take a batch of messages.
func (p *peer) noteSlowSend(took time.Duration) {
	if took < slowSend {
		return
	}
	others, isDue := p.slowSends.due(time.Now(), took)
	if !isDue {
		return
	}
	p.mu.Lock()
	node := p.addresses.known
	waiting := len(p.queue.messages)
	p.mu.Unlock()
	args := append(peerArgs(node), "took", took.Round(time.Millisecond), "waiting", waiting)
	p.log.logger.Warn("a peer takes messages slowly: it, or the network, is slow", append(args, others...)...)
}

// silence is what a leader has seen of a member that is connected.
type silence struct {
	since  uint64 // tick in which the leader first saw it connected
	warned bool   // the log says that it does not answer
}

// followSilences says which members are connected and do not answer, and when they do again. The
// leader calls it at each heartbeat.
func (n *node) followSilences() {
	silences := n.catchup.silences
	for id := range silences {
		if !n.peers.connected[id] || n.store.members[id] == nil {
			delete(silences, id) // it is said that it is lost
		}
	}
	for _, m := range sortedMembers(n.store.members) {
		if !n.peers.connected[m.RaftId] {
			continue
		}
		s := silences[m.RaftId]
		if s == nil {
			s = &silence{since: n.clock.now}
			silences[m.RaftId] = s
		}
		heard := max(n.peers.heard[m.RaftId], s.since)
		silent := n.clock.now - heard
		isSilent := silent > max(n.ticksOf(slowAnswer), n.electionTicks())
		switch {
		case isSilent && !s.warned:
			s.warned = true
			args := append(n.peerArgs(m.RaftId), "for", n.durationOf(silent))
			n.logger.Warn("a peer is connected and does not answer: it hangs, or the network does", args...)
		case !isSilent && s.warned:
			n.logger.Info("a peer answers again", n.peerArgs(m.RaftId)...)
			delete(silences, m.RaftId)
		}
	}
}

// noteSlowTurn logs that a turn of the loop took long. Nothing else goes on meanwhile.
func (n *node) noteSlowTurn(in *input, took time.Duration) {
	if took < slowTurn {
		return
	}
	others, isDue := n.slowTurns.due(time.Now(), took)
	if !isDue {
		return
	}
	args := []any{"took", took.Round(time.Millisecond), "messages", len(in.messages), "calls", len(in.calls)}
	n.logger.Warn("a turn of the loop took long: this node does nothing else meanwhile; "+
		"the machine, or the process, may have been halted", append(args, others...)...)
}

// noteSlowWrite logs that the disk took long to make the log durable. The first job of a directory
// is exempt: it may have a snapshot of the whole store.
func (d *disk) noteSlowWrite(jobs []diskJob, took time.Duration) {
	isFirst := len(jobs) > 0 && jobs[0].identity != nil
	if took < slowWrite || isFirst {
		return
	}
	others, isDue := d.slowWrites.due(time.Now(), took)
	if !isDue {
		return
	}
	args := []any{"dir", d.dir, "took", took.Round(time.Millisecond), "batches", len(jobs)}
	d.logger.Warn("a write to the disk took long: writes wait for it", append(args, others...)...)
}

// slowTexts says what has taken long in the last minute. Only the loop may call it.
func (n *node) slowTexts(now time.Time) []string {
	var texts []string
	if n.durable.disk != nil {
		texts = append(texts, n.durable.disk.slowWrites.text(now, "a write to the disk"))
	}
	texts = append(texts, n.slowTurns.text(now, "a turn of the loop"))
	for _, m := range sortedMembers(n.store.members) {
		s := n.catchup.silences[m.RaftId]
		if s != nil && s.warned {
			texts = append(texts, fmt.Sprintf("node %d is connected and does not answer", m.Node.Id))
		}
	}
	return texts
}

// slowPeers says which peers have taken messages slowly in the last minute.
func (nw *network) slowPeers(now time.Time) []string {
	var texts []string
	nw.mu.Lock()
	peers := slices.Collect(maps.Values(nw.peers))
	nw.mu.Unlock()
	for _, p := range peers {
		p.mu.Lock()
		id := p.addresses.known.GetId()
		p.mu.Unlock()
		texts = append(texts, p.slowSends.text(now, fmt.Sprintf("sending to node %d", id)))
	}
	slices.Sort(texts)
	return texts
}

// withoutEmpty leaves out what is not there.
func withoutEmpty(texts []string) []string {
	return slices.DeleteFunc(texts, func(text string) bool { return text == "" })
}
