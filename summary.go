// A cluster in a sentence: how many voters are up, who leads, and how many more may fail. It is a
// function of facts alone, for whoever has them: status asks all nodes.

package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// surveyFacts are what a summary goes by.
type surveyFacts struct {
	answers  int            // nodes that answer, in a cluster or not
	clusters []clusterFacts // that nodes which answer are in, each once
}

// clusterFacts are what is known of one cluster.
type clusterFacts struct {
	id      uint64
	leader  uint64        // the id of the node that leads, by what its members say; 0: there is none
	leading []leaderFacts // all that say of themselves that they lead
	members []memberFacts // a node that is just being taken back is there twice
}

// leaderFacts are what a node says that leads.
type leaderFacts struct {
	id   uint64
	term uint64
}

// memberFacts are what is known of a member.
type memberFacts struct {
	id         uint64 // of its node
	voter      bool   // in a joint configuration: once that is left
	outgoing   bool   // it is a voter of the configuration that is being left
	learner    bool
	answers    bool // it has answered, as a member of this cluster
	up         bool // it is in its role, knows a leader, and keeps up with it
	lostMemory bool // its node runs, and knows nothing of what the member has promised
}

// The states of a cluster, or of what was found in place of one.
const (
	stateOK        = "ok"
	stateDegraded  = "degraded"   // it goes on, and some members are not up
	stateNoLeader  = "no_leader"  // it does not go on, until voters come back
	stateLost      = "lost"       // it never goes on
	stateSplit     = "split"      // several clusters, or two leaders of a term
	stateNoCluster = "no_cluster" // whoever answers is in none
	stateNoAnswer  = "no_answer"  // nobody answers
)

// summary is what the facts come to. It is printed with -o json.
type summary struct {
	State    string            `json:"state"`
	Text     string            `json:"text"` // a sentence
	Clusters []*clusterSummary `json:"clusters"`
}

// clusterSummary is what the facts of one cluster come to.
type clusterSummary struct {
	ClusterID uint64 `json:"cluster_id,string"`
	State     string `json:"state"`
	Text      string `json:"text"`
	Leader    uint64 `json:"leader,string"` // 0: there is none
	// MayFail is how many more voters may fail before the cluster stops.
	MayFail  int   `json:"may_fail"`
	Voters   count `json:"voters"`
	Outgoing count `json:"outgoing_voters"` // 0 of 0: no change of membership is half way
	Learners count `json:"learners"`
}

// count is how many members of a kind there are, and how many of them are up.
type count struct {
	All        int `json:"all"`
	Up         int `json:"up"`
	Answer     int `json:"answer"`
	LostMemory int `json:"lost_memory"`
}

// summarize says what the facts come to.
func summarize(f *surveyFacts) *summary {
	s := &summary{Clusters: []*clusterSummary{}} // In JSON it is a list, not null.
	for i := range f.clusters {
		s.Clusters = append(s.Clusters, summarizeCluster(&f.clusters[i]))
	}
	switch {
	case f.answers == 0:
		s.State = stateNoAnswer
		s.Text = "no node answers"
	case len(s.Clusters) == 0:
		s.State = stateNoCluster
		s.Text = fmt.Sprintf("there is no cluster: of %d nodes that answer, none is in one", f.answers)
	case len(s.Clusters) == 1:
		s.State = s.Clusters[0].State
		s.Text = s.Clusters[0].Text
	default:
		s.State = stateSplit
		s.Text = fmt.Sprintf("ATTENTION: there are %d clusters, not one", len(s.Clusters))
		for _, c := range s.Clusters {
			s.Text += fmt.Sprintf("; cluster %016x: %s", c.ClusterID, c.Text)
		}
	}
	return s
}

func summarizeCluster(f *clusterFacts) *clusterSummary {
	s := &clusterSummary{
		ClusterID: f.id,
		Leader:    f.leader,
		Voters:    f.count(func(m *memberFacts) bool { return m.voter }),
		Outgoing:  f.count(func(m *memberFacts) bool { return m.outgoing }),
		Learners:  f.count(func(m *memberFacts) bool { return m.learner }),
	}
	rivals := f.leadersOfOneTerm()
	switch {
	case len(rivals) > 1:
		s.State = stateSplit
		s.Text = fmt.Sprintf("ATTENTION: %s lead term %d at once, which must never be: end all clients, "+
			"and keep all directories", nodeList(idsOf(rivals)), rivals[0].term)
	case s.Leader == 0 && s.isLost():
		s.State = stateLost
		s.Text = "the cluster cannot go on: " + s.whyLost()
	case s.Leader == 0:
		s.State = stateNoLeader
		s.Text = "no leader: " + s.whyNoLeader()
	default:
		s.judgeLed()
	}
	if s.isJoint() {
		s.Text += "; a change of membership is half way"
	}
	if len(f.leading) > 1 && len(rivals) == 0 {
		s.Text += fmt.Sprintf("; ATTENTION: %s say that they lead, in different terms: if that stays so, "+
			"nobody reaches the older of them", nodeList(idsOf(f.leading)))
	}
	return s
}

// judgeLed judges a cluster that has a leader.
func (s *clusterSummary) judgeLed() {
	spare := s.Voters.spare()
	if s.isJoint() {
		spare = min(spare, s.Outgoing.spare())
	}
	if spare < 0 { // The others have come back just now, or the leader is about to give up.
		s.State = stateDegraded
		s.Text = fmt.Sprintf("leader %d, but only %s, and that is too few to go on", s.Leader, s.membersUp())
		return
	}
	s.State = stateOK
	if !s.areAllUp() {
		s.State = stateDegraded
	}
	s.MayFail = spare
	s.Text = fmt.Sprintf("%s, leader %d, %s may fail", s.membersUp(), s.Leader, moreInWords(spare))
}

// count counts the members of a kind.
func (f *clusterFacts) count(isOfKind func(*memberFacts) bool) count {
	var c count
	for i := range f.members {
		m := &f.members[i]
		if !isOfKind(m) {
			continue
		}
		c.All++
		if m.up {
			c.Up++
		}
		if m.answers {
			c.Answer++
		}
		if m.lostMemory {
			c.LostMemory++
		}
	}
	return c
}

// leadersOfOneTerm are two or more that lead one term; nil: there are none.
func (f *clusterFacts) leadersOfOneTerm() []leaderFacts {
	byTerm := map[uint64][]leaderFacts{}
	for _, l := range f.leading {
		byTerm[l.term] = append(byTerm[l.term], l)
		if len(byTerm[l.term]) > 1 {
			return byTerm[l.term]
		}
	}
	return nil
}

func idsOf(leaders []leaderFacts) []uint64 {
	var ids []uint64
	for _, l := range leaders {
		ids = append(ids, l.id)
	}
	slices.Sort(ids)
	return ids
}

// needed is a majority.
func (c count) needed() int { return c.All/2 + 1 }

// spare is how many of the voters that are up may fail, negative if too few are.
func (c count) spare() int { return c.Up - c.needed() }

// isLost reports whether too few voters have their memory for a majority.
func (c count) isLost() bool { return c.All > 0 && c.All-c.LostMemory < c.needed() }

func (s *clusterSummary) isJoint() bool { return s.Outgoing.All > 0 }

func (s *clusterSummary) isLost() bool { return s.Voters.isLost() || s.Outgoing.isLost() }

func (s *clusterSummary) areAllUp() bool {
	return s.Voters.Up == s.Voters.All && s.Outgoing.Up == s.Outgoing.All && s.Learners.Up == s.Learners.All
}

// membersUp is who of all is up, as in "2 of 3 voters and 1 of 1 learners are up".
func (s *clusterSummary) membersUp() string {
	var parts []string
	add := func(c count, kind string) {
		parts = append(parts, ofAll(c.Up, c.All, kind))
	}
	if s.isJoint() {
		add(s.Outgoing, "old voter")
		add(s.Voters, "new voter")
	} else {
		add(s.Voters, "voter")
	}
	if s.Learners.All > 0 {
		add(s.Learners, "learner")
	}
	verb := " are up"
	if len(parts) == 1 && s.Voters.Up == 1 {
		verb = " is up"
	}
	return listInWords(parts) + verb
}

// whyNoLeader says whether enough voters answer for one to lead.
func (s *clusterSummary) whyNoLeader() string {
	c, kind := s.Voters, "voter"
	if s.isJoint() {
		kind = "new voter"
		if s.Outgoing.Answer-s.Outgoing.needed() < c.Answer-c.needed() {
			c, kind = s.Outgoing, "old voter"
		}
	}
	text := ofAll(c.Answer, c.All, kind) + " answer"
	if c.Answer == 1 {
		text += "s"
	}
	if c.Answer < c.needed() {
		return fmt.Sprintf("%s, and %d are needed", text, c.needed())
	}
	return text + ", which is enough: they elect one, or do not reach each other"
}

// whyLost says how many voters have lost their memory.
func (s *clusterSummary) whyLost() string {
	c := s.Voters
	if !c.isLost() {
		c = s.Outgoing
	}
	have := "have"
	if c.LostMemory == 1 {
		have = "has"
	}
	return fmt.Sprintf("%s %s lost all that they knew, and %d are needed with it",
		ofAll(c.LostMemory, c.All, "voter"), have, c.needed())
}

// ofAll is a part of all, as in "2 of 3 voters".
func ofAll(part, all int, kind string) string { return fmt.Sprintf("%d of %d %ss", part, all, kind) }

// moreInWords is how many more.
func moreInWords(n int) string {
	switch n {
	case 0:
		return "no more"
	case 1:
		return "one more"
	}
	return strconv.Itoa(n) + " more"
}

// listInWords is "a, b and c".
func listInWords(words []string) string {
	last := len(words) - 1
	if last == 0 {
		return words[0]
	}
	return strings.Join(words[:last], ", ") + " and " + words[last]
}

func formatID(id uint64) string { return strconv.FormatUint(id, 10) }
