// What operators type to change the membership, done by real nodes.

package main

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"
)

// votersOf are the ids of a cluster's voters, and of its learners, as a node has
// them.
func votersOf(t *testing.T, c *testCluster, id uint64) (voters, learners []uint64) {
	t.Helper()
	m, err := c.metrics(id)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range membershipOf(m).Members {
		if s.Voter {
			voters = append(voters, s.Node.Id)
		} else {
			learners = append(learners, s.Node.Id)
		}
	}
	return voters, learners
}

// TestOperatorsPromoteAndDemote: all others stay as they are.
func TestOperatorsPromoteAndDemote(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.addLearner(1, 5)
	for _, test := range []struct {
		line             string
		voters, learners []uint64
	}{
		{"promote 4", []uint64{1, 2, 3, 4}, []uint64{5}},
		{"promote 4", []uint64{1, 2, 3, 4}, []uint64{5}},
		{"demote 2", []uint64{1, 3, 4}, []uint64{2, 5}},
		{"promote 2 5", []uint64{1, 2, 3, 4, 5}, nil},
		{"demote 4 5", []uint64{1, 2, 3}, []uint64{4, 5}},
	} {
		runCommand(t, exitYes, "", append(strings.Fields(test.line), "--endpoints", c.nodes[2].address)...)
		leader := c.nodes[2].server.n.status.latest.Load().leader
		voters, learners := votersOf(t, c, leader.Id)
		if fmt.Sprint(voters) != fmt.Sprint(test.voters) || fmt.Sprint(learners) != fmt.Sprint(test.learners) {
			t.Errorf("%s: voters %v, learners %v, want %v and %v", test.line, voters, learners, test.voters, test.learners)
		}
	}
	_, errs := runCommand(t, exitNotDone, "", "promote", "9", "--endpoints", c.nodes[1].address)
	wantPart(t, errs, "UNKNOWN_MEMBER")
}

// TestTwoOperators: each adds a voter at the same time; who is told that it is done
// is told the truth, and the other one why not.
func TestTwoOperators(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5)
	c.init(1, 2, 3)
	c.addLearner(1, 4)
	c.addLearner(1, 5)
	for range 5 {
		runCommand(t, exitYes, "", "change-membership", "1", "2", "3", "--retain", "--endpoints", c.nodes[1].address)
		var both sync.WaitGroup
		exits, errs := make([]int, 2), make([]bytes.Buffer, 2)
		for i, id := range []uint64{4, 5} {
			args := []string{"change-membership", "1", "2", "3", fmt.Sprint(id), "--endpoints", c.nodes[uint64(i)+2].address}
			both.Go(func() { exits[i] = runClient(t.Context(), args, nil, &bytes.Buffer{}, &errs[i]) })
		}
		both.Wait()
		for i := range exits {
			// Who read the membership after the other's change would drop that one's voter.
			told := exits[i] == exitNotDone && strings.Contains(errs[i].String(), "MEMBERSHIP_CHANGED") ||
				exits[i] == exitUsage && strings.Contains(errs[i].String(), "it would remove node")
			if exits[i] != exitYes && !told {
				t.Errorf("exit status %d: %s", exits[i], &errs[i])
			}
		}
		if exits[0] == exitYes && exits[1] == exitYes {
			t.Fatal("both are told that it is done")
		}
	}
}
