package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// factsFrom makes up the facts of a cluster: a letter for each member, whose nodes are 1, 2 and so
// on. v: a voter, o: a voter that is being left, b: both, l: a learner. Behind it, +: it is up,
// *: it answers and is not up, -: it does not answer, !: it has lost its memory.
func factsFrom(t *testing.T, leader uint64, members string) clusterFacts {
	t.Helper()
	f := clusterFacts{id: 0xabc, leader: leader}
	for i, word := range strings.Fields(members) {
		kind, state := word[0], word[1]
		m := memberFacts{
			id:         uint64(i + 1),
			voter:      kind == 'v' || kind == 'b',
			outgoing:   kind == 'o' || kind == 'b',
			learner:    kind == 'l',
			answers:    state == '+' || state == '*',
			up:         state == '+',
			lostMemory: state == '!',
		}
		f.members = append(f.members, m)
	}
	return f
}

// TestSummary: the sentence, the state and how many may fail follow from the facts.
func TestSummary(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		leader              uint64
		members, state, say string
		mayFail             int
	}{
		{1, "v+ v+ v+", stateOK, "3 of 3 voters are up, leader 1, one more may fail", 1},
		{2, "v+ v+ v-", stateDegraded, "2 of 3 voters are up, leader 2, no more may fail", 0},
		{2, "v+ v+ v*", stateDegraded, "2 of 3 voters are up, leader 2, no more may fail", 0},
		{1, "v+", stateOK, "1 of 1 voters is up, leader 1, no more may fail", 0},
		{1, "v+ v+", stateOK, "2 of 2 voters are up, leader 1, no more may fail", 0},
		{1, "v+ v+ v+ v+", stateOK, "4 of 4 voters are up, leader 1, one more may fail", 1},
		{1, "v+ v+ v+ v+ v+", stateOK, "5 of 5 voters are up, leader 1, 2 more may fail", 2},
		{1, "v+ v+ v+ l+", stateOK, "3 of 3 voters and 1 of 1 learners are up, leader 1, one more may fail", 1},
		{1, "v+ v+ v+ l-", stateDegraded, "3 of 3 voters and 0 of 1 learners are up, leader 1, one more may fail", 1},
		{1, "v+ v* v-", stateDegraded, "leader 1, but only 1 of 3 voters is up, and that is too few to go on", 0},
		{1, "v+ v+ v!", stateDegraded, "2 of 3 voters are up, leader 1, no more may fail", 0},
		{0, "v* v- v-", stateNoLeader, "no leader: 1 of 3 voters answers, and 2 are needed", 0},
		{0, "v- v- v- l*", stateNoLeader, "no leader: 0 of 3 voters answer, and 2 are needed", 0},
		{0, "v* v* v-", stateNoLeader, "no leader: 2 of 3 voters answer, which is enough: they elect one, or do not reach each other", 0},
		{0, "v* v- v!", stateNoLeader, "no leader: 1 of 3 voters answers, and 2 are needed", 0},
		{0, "v* v! v!", stateLost, "the cluster cannot go on: 2 of 3 voters have lost all that they knew, and 2 are needed with it", 0},
		{0, "v!", stateLost, "the cluster cannot go on: 1 of 1 voters has lost all that they knew, and 1 are needed with it", 0},
		{1, "b+ b+ o+ v+", stateOK, "3 of 3 old voters and 3 of 3 new voters are up, leader 1, one more may fail; " +
			"a change of membership is half way", 1},
		{1, "b+ b+ o- v+", stateDegraded, "2 of 3 old voters and 3 of 3 new voters are up, leader 1, no more may fail; " +
			"a change of membership is half way", 0},
		{1, "b+ b+ o+ v-", stateDegraded, "3 of 3 old voters and 2 of 3 new voters are up, leader 1, no more may fail; " +
			"a change of membership is half way", 0},
		{0, "b* b* o- o- v*", stateNoLeader, "no leader: 2 of 4 old voters answer, and 3 are needed; a change of membership is half way", 0},
		{0, "b* o* o* v- v-", stateNoLeader, "no leader: 1 of 3 new voters answers, and 2 are needed; a change of membership is half way", 0},
		{0, "b* b* v* o! o! o!", stateLost, "the cluster cannot go on: 3 of 5 voters have lost all that they knew, and 3 are needed with it; " +
			"a change of membership is half way", 0},
	} {
		f := &surveyFacts{answers: 1, clusters: []clusterFacts{factsFrom(t, test.leader, test.members)}}
		s := summarize(f)
		name := fmt.Sprintf("%s, leader %d", test.members, test.leader)
		wantText(t, name, s.Text, test.say)
		wantText(t, name+": state", s.State, test.state)
		if got := s.Clusters[0].MayFail; got != test.mayFail {
			t.Errorf("%s: %d may fail, want %d", name, got, test.mayFail)
		}
	}
}

// TestSummaryOfWhatMustNotBe: two clusters, and two leaders, are said loudly.
func TestSummaryOfWhatMustNotBe(t *testing.T) {
	t.Parallel()
	check := func(f *surveyFacts, state, text string) {
		t.Helper()
		s := summarize(f)
		wantText(t, "text", s.Text, text)
		wantText(t, "state", s.State, state)
	}
	check(&surveyFacts{}, stateNoAnswer, "no node answers")
	check(&surveyFacts{answers: 2}, stateNoCluster, "there is no cluster: of 2 nodes that answer, none is in one")

	one := factsFrom(t, 1, "v+ v+ v+")
	other := factsFrom(t, 0, "v* v-")
	other.id = 0xdef
	check(&surveyFacts{answers: 4, clusters: []clusterFacts{one, other}}, stateSplit,
		"ATTENTION: there are 2 clusters, not one; "+
			"cluster 0000000000000abc: 3 of 3 voters are up, leader 1, one more may fail; "+
			"cluster 0000000000000def: no leader: 1 of 2 voters answers, and 2 are needed")

	one.leading = []leaderFacts{{1, 7}, {3, 8}}
	check(&surveyFacts{answers: 3, clusters: []clusterFacts{one}}, stateOK,
		"3 of 3 voters are up, leader 1, one more may fail; ATTENTION: nodes 1 and 3 say that they lead, in "+
			"different terms: if that stays so, nobody reaches the older of them")
	one.leading = []leaderFacts{{1, 7}, {3, 8}, {2, 8}}
	check(&surveyFacts{answers: 3, clusters: []clusterFacts{one}}, stateSplit,
		"ATTENTION: nodes 2 and 3 lead term 8 at once, which must never be: end all clients, and keep all directories")
	one.leading = []leaderFacts{{1, 7}}
	check(&surveyFacts{answers: 3, clusters: []clusterFacts{one}}, stateOK, "3 of 3 voters are up, leader 1, one more may fail")
}

// TestSummaryAsJSON: its fields are named as help status says, and a list is never null.
func TestSummaryAsJSON(t *testing.T) {
	t.Parallel()
	text, err := json.Marshal(summarize(&surveyFacts{}))
	if err != nil {
		t.Fatal(err)
	}
	wantText(t, "no answer", string(text), `{"state":"no_answer","text":"no node answers","clusters":[]}`)
	f := &surveyFacts{answers: 2, clusters: []clusterFacts{factsFrom(t, 1, "v+ v- v! l*")}}
	text, err = json.Marshal(summarize(f))
	if err != nil {
		t.Fatal(err)
	}
	const say = "leader 1, but only 1 of 3 voters and 0 of 1 learners are up, and that is too few to go on"
	wantText(t, "one cluster", string(text), `{"state":"degraded","text":"`+say+`","clusters":[{"cluster_id":"2748",`+
		`"state":"degraded","text":"`+say+`","leader":"1","may_fail":0,`+
		`"voters":{"all":3,"up":1,"answer":1,"lost_memory":1},"outgoing_voters":{"all":0,"up":0,"answer":0,"lost_memory":0},`+
		`"learners":{"all":1,"up":0,"answer":1,"lost_memory":0}}]}`)
}
