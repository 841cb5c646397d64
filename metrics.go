// What /metrics tells: all metrics of this program, in one order. What only the loop knows, it is
// asked for; what must be told when the loop hangs is in atomics, or behind locks.

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"raft-key-value/kvpb"
)

// metricsPage answers with the metrics.
type metricsPage struct {
	s *server

	mu   sync.Mutex // one request at a time
	last loopFacts  // that the loop has told
	text metricsText
}

func newMetricsPage(s *server) *metricsPage {
	nothing := &kvpb.MetricsResponse{Role: kvpb.Role_ROLE_UNINITIALIZED}
	return &metricsPage{s: s, last: loopFacts{MetricsResponse: nothing}}
}

// ServeHTTP implements http.Handler.
func (p *metricsPage) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	text := p.write(r.Context())
	w.Header().Set("Content-Type", metricsType)
	_, _ = w.Write(text) // fails only if the other end has gone
}

// write returns the text. It is the caller's: a reader that is slow keeps no other one waiting.
func (p *metricsPage) write(ctx context.Context) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	facts, answered := p.s.askLoop(ctx)
	if answered {
		p.last = facts
	}
	t := &p.text
	t.b = t.b[:0]
	p.s.writeMetrics(t, &p.last, answered)
	return bytes.Clone(t.b)
}

// loopFacts are what only the loop knows, as of one moment.
type loopFacts struct {
	*kvpb.MetricsResponse
	snapshotIndex uint64 // of the data directory
	snapshotBytes uint64 // about
	loggedBytes   uint64
	queuedJobs    int // that the disk has not done
	peers         []peerFacts
}

// peerFacts are what the loop knows of a peer.
type peerFacts struct {
	node      uint64
	raftIDs   []uint64 // more than one while a node is taken back
	connected bool
	hasLag    bool // this node leads, so the rest is known
	lag       uint64
	lagging   bool
}

// askLoop asks the loop for what only it knows; false: it does not answer in time.
func (s *server) askLoop(ctx context.Context) (facts loopFacts, answered bool) {
	ctx, cancel := context.WithTimeout(ctx, httpLoopTimeout)
	defer cancel()
	told := make(chan loopFacts, 1) // the loop may come to it when nobody waits any more
	err := s.n.do(ctx, func() error {
		told <- s.n.facts()
		return nil
	})
	if err != nil {
		return facts, false
	}
	return <-told, true
}

// facts are what the loop tells of itself.
func (n *node) facts() loopFacts {
	m := n.metrics()
	d := &n.durable
	return loopFacts{
		MetricsResponse: m,
		snapshotIndex:   d.snapshotIndex,
		snapshotBytes:   d.lastBytes,
		loggedBytes:     d.logged,
		queuedJobs:      d.queued,
		peers:           peersOf(m),
	}
}

// peersOf returns the other nodes among the members, by id. A node that is being taken back is
// there twice, under two raft IDs: it is as connected as one of these, and as far behind as the other.
func peersOf(m *kvpb.MetricsResponse) []peerFacts {
	var peers []peerFacts
	for _, member := range m.Members { // by id
		if member.Node.Id == m.Node.Id {
			continue
		}
		last := len(peers) - 1
		if last < 0 || peers[last].node != member.Node.Id {
			peers = append(peers, peerFacts{node: member.Node.Id})
			last++
		}
		p := &peers[last]
		p.raftIDs = append(p.raftIDs, member.RaftId)
		p.connected = p.connected || member.Connected
		if member.Progress != nil {
			p.hasLag = true
			p.lag = max(p.lag, m.LastIndex-min(m.LastIndex, member.Progress.MatchIndex))
		}
		p.lagging = p.lagging || member.Lagging != ""
	}
	return peers
}

// writeMetrics writes all metrics. answered: the facts are of now.
func (s *server) writeMetrics(t *metricsText, f *loopFacts, answered bool) {
	s.writeIdentity(t, f)
	s.writeState(t, f, answered)
	s.writeLog(t, f)
	s.writeLoop(t, f)
	s.writePeers(t, f)
	s.writeCalls(t)
	s.writeClients(t, f)
	s.writeStore(t, f)
	s.writeReads(t)
	s.writeDisk(t, f)
	if s.certificates != nil {
		t.gauge("rkv_certificate_not_after_timestamp_seconds", "When the node's certificate ends, since 1970.",
			float64(s.certificates.latest().until.Unix()))
	}
	writeProcess(t)
}

func (s *server) writeIdentity(t *metricsText, f *loopFacts) {
	t.begin("rkv_build_info", "gauge", "1; the labels say which program it is, and the highest level that it speaks.")
	t.number(1, "version", buildVersion(), "go_version", runtime.Version(), "level", fmt.Sprint(s.n.opts.level))
	t.begin("rkv_node_info", "gauge", "1; the labels say which node it is, and of which cluster, 0 for none.")
	t.number(1, "node", fmt.Sprint(s.n.self.Id), "cluster", fmt.Sprintf("%016x", f.ClusterId))
}

// roleNames are the roles that a node may have, as roleName has them.
var roleNames = []string{"uninitialized", "learner", "follower", "candidate", "leader"}

func roleName(r kvpb.Role) string { return strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_")) }

func (s *server) writeState(t *metricsText, f *loopFacts, answered bool) {
	alive := s.isServing(livenessHealth)
	t.gaugeIf("rkv_alive", "Whether the loop turns, as /livez has it.", alive)
	t.gaugeIf("rkv_ready", "Whether the node should get calls, as /readyz has it.",
		alive && s.isServing(kvpb.KVService_ServiceDesc.ServiceName))
	t.gaugeIf("rkv_may_restart", "Whether the cluster can do without this node.", s.isServing(restartHealth))
	t.gaugeIf("rkv_started", "Whether the loop has begun to turn: until then, the data directory is read.", s.n.status.started.Load())
	t.gaugeIf("rkv_loop_answers", "Whether the loop has answered in time; if not, what it tells is of an earlier moment.", answered)
	t.begin("rkv_role", "gauge", "1 for the role that the node has in raft, 0 for the others.")
	for _, name := range roleNames {
		t.yesNo(name == roleName(f.Role), "role", name)
	}
	t.gaugeIf("rkv_has_leader", "Whether the node knows a leader.", f.Leader != nil)
	t.gaugeOf("rkv_term", "The term of raft.", f.Term)
	t.counter("rkv_leader_changes_total", "Leaders that the node has come to know.", f.LeaderChanges)
	t.gaugeOf("rkv_level", "The level of the cluster, 0 for none.", uint64(f.Level))
	t.gaugeOf("rkv_rises_to_level", "The level that this node lets its cluster rise to.", uint64(f.RisesTo))
	voters, learners := uint64(0), uint64(0)
	for _, m := range f.Members {
		switch {
		case m.Voter:
			voters++
		case m.Learner:
			learners++
		}
	}
	t.begin("rkv_members", "gauge", "Members of the configuration.")
	t.number(voters, "kind", "voter")
	t.number(learners, "kind", "learner")
	t.gaugeIf("rkv_membership_joint", "Whether a change of membership is half way.", f.Joint)
}

func (s *server) writeLog(t *metricsText, f *loopFacts) {
	t.gaugeOf("rkv_log_first_index", "The first entry in memory.", f.FirstIndex)
	t.gaugeOf("rkv_log_last_index", "The last entry in memory.", f.LastIndex)
	t.gaugeOf("rkv_log_commit_index", "The last entry that is known to be committed.", f.CommitIndex)
	t.gaugeOf("rkv_log_applied_index", "The last entry that is applied.", f.AppliedIndex)
	t.gaugeOf("rkv_log_bytes", "Memory of the log's entries.", f.LogBytes)
	t.gaugeOf("rkv_log_limit_bytes", "The flag --log-bytes, or what follows from the memory.", s.n.opts.logBytes)
	t.counter("rkv_entries_applied_total", "Entries applied.", f.EntriesApplied)
	t.counter("rkv_writes_applied_total", "Writes applied, but for sessions that were opened.", f.WritesApplied)
	t.gaugeOf("rkv_write_limit_bytes_per_second", "Bytes of entries a second to which this leader slows writes, 0 for no limit.", f.WriteLimit)
}

func (s *server) writeLoop(t *metricsText, f *loopFacts) {
	c := &s.n.turns
	t.begin("rkv_loop_turn_seconds", "histogram", "Time that turns of the loop took.")
	t.histogram(c.seconds)
	t.begin("rkv_proposal_writes", "histogram", "Writes that share a proposal of this node, each time that it is made.")
	t.histogram(c.proposalWrites)
	t.begin("rkv_read_round_reads", "histogram", "Linearizable reads that share a question to the leader.")
	t.histogram(c.roundReads)
	t.counter("rkv_reads_released_total", "Linearizable reads answered.", f.ReadsReleased)
	inbox := s.n.inbox.load()
	t.gaugeOf("rkv_inbox_calls", "Calls that have not ended, in the inbox or in the loop.", uint64(inbox.calls))
	t.gaugeOf("rkv_inbox_calls_limit", "Calls beyond which others are refused.", uint64(s.n.inbox.queuedCalls))
	t.gaugeOf("rkv_inbox_call_bytes", "Bytes of these calls' writes.", uint64(inbox.callBytes))
	t.gaugeOf("rkv_inbox_call_limit_bytes", "Bytes beyond which others are refused.", uint64(s.n.inbox.queuedBytes))
	t.gaugeOf("rkv_inbox_message_bytes", "Bytes of peers' messages that the loop has not taken.", uint64(inbox.messageBytes))
}

func (s *server) writePeers(t *metricsText, f *loopFacts) {
	queues := s.net.queues()
	of := func(name, kind, help string, write func(peer string, p *peerFacts)) {
		t.begin(name, kind, help)
		for i := range f.peers {
			write(strconv.FormatUint(f.peers[i].node, 10), &f.peers[i])
		}
	}
	of("rkv_peer_connected", "gauge", "Whether this node's stream to a member is open.", func(peer string, p *peerFacts) {
		t.yesNo(p.connected, "peer", peer)
	})
	of("rkv_peer_queue_messages", "gauge", "Messages that wait to be sent to a member.", func(peer string, p *peerFacts) {
		t.number(queues.of(p.raftIDs).messages, "peer", peer)
	})
	of("rkv_peer_queue_bytes", "gauge", "Bytes of these messages.", func(peer string, p *peerFacts) {
		t.number(queues.of(p.raftIDs).bytes, "peer", peer)
	})
	of("rkv_peer_lag_entries", "gauge", "Entries that a member has not stored, as far as this leader knows.",
		func(peer string, p *peerFacts) {
			if p.hasLag {
				t.number(p.lag, "peer", peer)
			}
		})
	of("rkv_peer_lagging", "gauge", "Whether a member is too slow for this leader, as status says why.",
		func(peer string, p *peerFacts) {
			if p.hasLag {
				t.yesNo(p.lagging, "peer", peer)
			}
		})
	t.counter("rkv_messages_dropped_total", "Messages from and to peers that were dropped.",
		f.MessagesDropped+s.net.dropped.Load())
	t.counter("rkv_snapshots_sent_total", "Snapshots sent to members.", f.SnapshotsSent)
	t.counter("rkv_snapshots_installed_total", "Snapshots received and installed.", f.SnapshotsInstalled)
}

func (s *server) writeCalls(t *metricsText) {
	var methods []*methodCounts
	for _, m := range s.methods {
		methods = append(methods, m)
	}
	slices.SortFunc(methods, func(a, b *methodCounts) int { return strings.Compare(a.name, b.name) })
	t.begin("rkv_calls_total", "counter", "Calls that have ended, by what with.")
	for _, m := range methods {
		m.write(t)
	}
	t.begin("rkv_call_seconds", "histogram", "Time that unary calls took which have ended with OK.")
	for _, m := range methods {
		if m.isUnary {
			t.histogram(m.seconds, "method", m.name)
		}
	}
	t.begin("rkv_pipeline_operations_total", "counter", "Operations of Pipelines that were answered, with a result or an error.")
	t.number(s.operations.ok.Load(), "result", "ok")
	t.number(s.operations.failed.Load(), "result", "error")
}

// writeClients writes what clients occupy, and what was refused them.
func (s *server) writeClients(t *metricsText, f *loopFacts) {
	l := s.limiter
	c := l.load()
	t.gaugeOf("rkv_connections", "Connections in the places of clients.", c.clients)
	t.gaugeOf("rkv_connections_limit", "Places for clients.", uint64(l.places.clients))
	t.gaugeOf("rkv_handshakes", "TLS handshakes that are unfinished.", c.handshakes)
	t.gaugeOf("rkv_calls_running", "Calls that run, without watches.", c.running)
	t.gaugeOf("rkv_calls_running_limit", "Calls that may run.", uint64(l.calls.limit))
	t.gaugeOf("rkv_calls_open", "Calls whose answers are not taken, those that run included, without watches.", c.open)
	t.gaugeOf("rkv_calls_open_limit", "Calls that may be open.", uint64(l.calls.openLimit))
	t.gaugeOf("rkv_arriving_bytes", "Bytes of requests that are incomplete, or not read.", c.arriving)
	t.gaugeOf("rkv_arriving_limit_bytes", "Bytes beyond which the oldest of them ends.", uint64(l.arrivals.limit))
	rooms := []struct {
		name string
		*room
	}{{"answers", l.answers.small}, {"pipelines", l.pipelines}, {"writes", l.writes}}
	t.begin("rkv_room_bytes", "gauge", "Memory that calls have of a room that they share.")
	for _, r := range rooms {
		t.number(r.taken(), "room", r.name)
	}
	t.begin("rkv_room_limit_bytes", "gauge", "Memory of that room.")
	for _, r := range rooms {
		t.number(uint64(r.limits.all), "room", r.name)
	}
	t.gaugeOf("rkv_large_answers", "Answers over 64 KiB that are not taken.", l.answers.large.taken())
	t.gaugeOf("rkv_large_answers_limit", "Places for these.", uint64(l.answers.large.limits.all))
	t.begin("rkv_room_waits_total", "counter", "Calls that had to wait for one of these rooms, or for the place of a large answer.")
	for _, r := range rooms {
		t.number(r.waited.Load(), "room", r.name)
	}
	t.number(l.answers.large.waited.Load(), "room", "large_answers")
	t.begin("rkv_refused_total", "counter", "What was refused, by why.")
	t.number(s.refused.Load(), "why", "role")
	t.number(f.SetsRefused, "why", "quota")
	t.number(c.callsRefused, "why", "calls")
	t.number(s.queueIsFull.Load(), "why", "queue")
	t.number(c.requestsYielded, "why", "requests")
	t.number(c.badHandshakes, "why", "handshake")
	t.number(c.noPlace, "why", "connections")
	t.begin("rkv_connections_closed_total", "counter", "Connections that the node has closed for what they kept, by why.")
	t.number(l.counts.stalled.Load(), "why", "stalled")
	t.number(l.counts.untaken.Load(), "why", "untaken")
}

func (s *server) writeStore(t *metricsText, f *loopFacts) {
	t.gaugeOf("rkv_version", "The version of the last write applied.", f.Version)
	t.gaugeOf("rkv_keys", "Keys.", f.Keys)
	t.gaugeOf("rkv_store_bytes", "Bytes of keys and values.", f.StoreBytes)
	t.gaugeOf("rkv_quota_used_bytes", "What counts against the quota: the same, 64 bytes for each key, sessions, and the answers that they remember.", f.QuotaUsed)
	t.gaugeOf("rkv_quota_bytes", "The quota: the least of all members, as far as the node knows.", f.Quota)
	t.gaugeOf("rkv_max_store_bytes", "The quota that this node has said.", f.MaxStoreBytes)
	t.gaugeIf("rkv_writes_refused", "Whether Sets are refused, for the quota or for want of disk, as status says why.", f.WritesRefused != "")
	t.gaugeOf("rkv_sessions", "Sessions that are open.", f.Sessions)
}

// writeReads writes what keeps memory for those who read many keys, or watch.
func (s *server) writeReads(t *metricsText) {
	views := s.n.store.viewLoad()
	t.gaugeOf("rkv_views", "Moments of the store that Scans and backups show.", uint64(views.open))
	t.gaugeOf("rkv_views_kept_bytes", "Memory of what was overwritten since the oldest of these.", views.kept)
	t.gaugeOf("rkv_views_kept_limit_bytes", "Memory beyond which the oldest one ends.", views.limit)
	t.gaugeOf("rkv_scans", "Scans that run.", uint64(s.scans.running()))
	t.gaugeOf("rkv_backups", "Backups that run.", uint64(s.backups.Load()))
	t.gaugeOf("rkv_watches", "Watches.", uint64(s.watchers.count()))
	t.gaugeOf("rkv_watches_limit", "Watches that there may be.", uint64(s.watchers.limit))
	h := s.n.store.history.load()
	t.gaugeOf("rkv_watch_history_bytes", "Bytes of past writes that watches can go back to.", h.bytes)
	t.gaugeOf("rkv_watch_history_limit_bytes", "The flag --watch-bytes, or what follows from the memory.", h.limit)
	t.gaugeOf("rkv_watch_oldest_version", "The first version that a watch can go back to.", h.oldest)
}

// writeDisk writes what there is of a node with a data directory only.
func (s *server) writeDisk(t *metricsText, f *loopFacts) {
	if !s.n.opts.durable {
		return
	}
	counts := s.n.durable.counts.Load()
	if counts == nil { // the directory is not open yet
		counts = new(newDiskCounts())
	}
	t.begin("rkv_disk_sync_seconds", "histogram", "Time that a written batch of the log took to be synced.")
	t.histogram(counts.syncSeconds)
	t.begin("rkv_disk_batch_bytes", "histogram", "Bytes of these batches.")
	t.histogram(counts.batchBytes)
	t.gaugeOf("rkv_disk_queue_jobs", "Jobs that the disk has not done.", uint64(f.queuedJobs))
	t.gaugeOf("rkv_disk_free_bytes", "Bytes that are free, less what was written since the last look.", f.DiskFree)
	t.gaugeOf("rkv_disk_reserve_bytes", "Bytes that have to be free for Sets to be taken.", f.DiskReserve)
	t.gaugeOf("rkv_disk_log_bytes", "Bytes of the log that the last snapshot does not cover.", f.loggedBytes)
	t.gaugeOf("rkv_disk_snapshot_bytes", "About the bytes of the last snapshot.", f.snapshotBytes)
	t.gaugeOf("rkv_disk_snapshot_index", "The last entry that the last snapshot covers.", f.snapshotIndex)
	t.begin("rkv_disk_snapshot_seconds", "histogram", "Time that it took to save a snapshot, with pauses for the log.")
	t.histogram(counts.snapshotSeconds)
}
