// How a node without a leader gets one, beyond what raft does by itself.

package main

import (
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// election is when and how this node looks for another leader.
type election struct {
	leadHeard       uint64        // tick of the leader's last message
	leaderlessTicks uint64        // ticks without a leader
	campaignAt      uint64        // tick in which to call an election, if there is no leader then; 0: none
	deafTo          uint64        // raft ID of a leader whose stream broke, not heard until deafUntil; 0: none
	deafUntil       uint64        // tick
	learned         learnedCommit // what a peer knows to be committed, and this node does not know yet
}

// countLeaderless is called in every tick; it says once that there is no leader.
func (n *node) countLeaderless() {
	if n.raft.lead != 0 {
		n.election.leaderlessTicks = 0
		return
	}
	n.election.leaderlessTicks++
	if n.election.leaderlessTicks == 2*n.electionTicks() {
		n.logger.Warn("no leader", "for", 2*n.opts.election, "why", n.noLeader().Error(),
			"members", describeMembers(n.store.conf, n.store.members))
	}
}

// leaderLost brings an election forward: the stream to the leader broke, which
// it does at once if the process has died. If the leader lives, PreVote and the
// others, who hear of it, keep an election from succeeding. Voters take turns,
// so as not to split the vote.
//
// For a moment, whatever this voter's turn, what the leader sent last is not heard:
// it would make the leader the leader again, and cost a whole election timeout. That
// ends with time and not only with the next stream, for perhaps this node alone cannot
// connect to the leader: as long as the leader's own stream goes on, this node applies
// what it commits, and does not serve local reads that are ever older.
func (n *node) leaderLost() {
	rank := uint64(0)
	for _, id := range n.store.conf.GetVoters() {
		if id < n.id.raftID && id != n.raft.lead {
			rank++
		}
	}
	n.election.campaignAt = n.clock.now + 1 + rank*n.electionTicks()/10
	n.election.deafTo = n.raft.lead
	n.election.deafUntil = n.clock.now + n.electionTicks()/5
	_ = n.rn.ForgetLeader()
}

// isDeafTo reports whether messages of a peer are not heard for a moment.
func (n *node) isDeafTo(from uint64) bool {
	return from == n.election.deafTo && n.clock.now < n.election.deafUntil
}

// forgetSilentLeader has raft forget a leader that was not heard for two election
// timeouts. A learner never campaigns, so raft lets it keep a dead leader for ever.
func (n *node) forgetSilentLeader() {
	follows := n.raft.lead != 0 && n.raft.lead != n.id.raftID
	if follows && n.clock.now-n.election.leadHeard > 2*n.electionTicks() {
		_ = n.rn.ForgetLeader()
	}
}

// campaignInTurn calls an election when it is this voter's turn, after leaderLost.
func (n *node) campaignInTurn() {
	isTurn := n.clock.now == n.election.campaignAt && n.raft.lead == 0
	mayCampaign := n.raft.role == raft.StateFollower && n.isVoter(n.id.raftID)
	if isTurn && mayCampaign {
		_ = n.rn.Campaign()
	}
}

// answerAlive tells a node that calls for votes that this one is there. Raft says
// nothing to such a call while it hears a leader; the caller, which may be cut off from
// that one alone, would take this node for dead. To raft the answer means nothing: the
// caller does not lead in its present term.
func (n *node) answerAlive(m *raftpb.Message) {
	if n.raft.lead == 0 || m.GetTerm() <= 1 {
		return
	}
	n.send(&raftpb.Message{
		Type: raftpb.MsgHeartbeatResp.Enum(),
		From: new(n.id.raftID),
		To:   m.From,
		Term: new(m.GetTerm() - 1), // the caller's own: a MsgPreVote has the next one
	})
}

// learnedCommit is an entry that a peer knows to be committed.
type learnedCommit struct {
	index uint64
	term  uint64 // of the entry
	from  uint64 // raft ID of the peer; 0: nothing was learned
	tick  uint64 // in which it was learned
}

// learnCommit remembers what the sender of an answer to a call for votes knows to
// be committed. A node without a leader can need that: if it has forgotten, or never
// heard, that a change of membership is committed, it asks for votes by the old
// configuration, perhaps of nodes that have left for good, or that are learners by now
// and refuse, since their log is longer.
func (n *node) learnCommit(m *raftpb.Message) {
	isAnswer := m.GetType() == raftpb.MsgVoteResp || m.GetType() == raftpb.MsgPreVoteResp
	if !isAnswer || m.GetCommit() <= n.rn.BasicStatus().GetCommit() {
		return
	}
	if m.GetCommit() > n.election.learned.index {
		n.election.learned = learnedCommit{
			index: m.GetCommit(),
			term:  m.GetLogTerm(),
			from:  m.GetFrom(),
			tick:  n.clock.now,
		}
	}
}

// commitLearned has raft commit what was learned, once that cannot cost this node an
// election that it would win: it has lost its campaign, or has waited for half an
// election timeout. In the second case it then calls for votes again, by the configuration
// that it knows now. Raft takes a commit index from a leader only: so it is given a
// heartbeat as if the peer led, and forgets that leader at once.
func (n *node) commitLearned() {
	learned := n.election.learned
	if learned.from == 0 {
		return
	}
	if n.raft.lead != 0 || n.raft.role == raft.StateLeader {
		n.election.learned = learnedCommit{} // a leader commits it
		return
	}
	campaigns := n.raft.role != raft.StateFollower
	if campaigns && n.clock.now-learned.tick < n.electionTicks()/2 {
		return
	}
	n.election.learned = learnedCommit{}
	if !n.hasUncommitted(learned) {
		return
	}
	_ = n.rn.Step(&raftpb.Message{
		Type:   raftpb.MsgHeartbeat.Enum(),
		From:   &learned.from,
		To:     new(n.id.raftID),
		Term:   new(n.rn.BasicStatus().GetTerm()),
		Commit: &learned.index,
	})
	_ = n.rn.ForgetLeader()
	n.drain() // the configuration may be another one now
	if campaigns && n.isRunning() && n.isVoter(n.id.raftID) {
		_ = n.rn.Campaign()
	}
}

// hasUncommitted reports whether this node, still without a leader, has the entry that a
// peer knows to be committed, and does not know so yet. Equal entries have equal ones
// before them (Raft paper, section 5.3).
func (n *node) hasUncommitted(learned learnedCommit) bool {
	log := n.drainedLog()
	if log == nil || n.raft.lead != 0 {
		return false
	}
	term, err := log.Term(learned.index)
	if err != nil || term != learned.term {
		return false
	}
	return learned.index > n.rn.BasicStatus().GetCommit()
}

// tellCommit adds to a message the last entry that this node knows to be committed.
func (n *node) tellCommit(m *raftpb.Message) {
	log := n.drainedLog()
	if log == nil {
		return
	}
	commit := n.rn.BasicStatus().GetCommit()
	term, err := log.Term(commit)
	if err != nil {
		return
	}
	m.Commit = &commit
	m.LogTerm = &term
}
