// Tests of what the command line takes: arguments and flags, each checked by what
// it is, before anything is done, and exit statuses.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"raft-key-value/kvpb"
)

// wrongArguments are some that are not what they should be, by what that is.
var wrongArguments = map[argument][]string{
	keyArgument:    {"", "\xff", "a\xc3", strings.Repeat("k", maxKeyBytes+1)},
	valueArgument:  {strings.Repeat("v", maxValueBytes+1)},
	prefixArgument: {"\xff", "a\xc3", strings.Repeat("k", maxKeyBytes+1)},
	fileArgument:   {"", "-"},
	idArgument:     {"", "0", "x", "1=a:1", "1.5", "18446744073709551616", " 1"},
	memberArgument: {
		"", "1", "0=a:1", "x=a:1", "1=", "1=a", "1=a:", "1=:1", "1=a:0", "1=a:x", "1=a:http", "1=a:65536", "1=a:-1",
		"1=a b:1", "1=a\xff:1", "1=0.0.0.0:1", "1=[::]:1", "1=" + strings.Repeat("a", maxAddressBytes) + ":1",
	},
	commandArgument: {"", "nosuch"},
}

var rightArguments = map[argument]string{
	keyArgument: "k", valueArgument: "v", prefixArgument: "p", fileArgument: "f", idArgument: "7",
	memberArgument: "7=a:1", commandArgument: "get",
}

// TestArgumentsAreCheckedByWhatTheyAre: in each place of each sub-command, and
// before a node is called or a file made.
func TestArgumentsAreCheckedByWhatTheyAre(t *testing.T) {
	f := newFakeNode(t)
	t.Setenv(endpointVariable, f.addr)
	t.Chdir(t.TempDir())
	for name, cmd := range commands() {
		for i, kind := range cmd.args {
			if len(wrongArguments[kind]) == 0 {
				t.Errorf("%s: no %v is wrong", name, kind)
			}
			for _, wrong := range wrongArguments[kind] {
				line := []string{name}
				if name == "restore" {
					line = append(line, "--data-dir", "d", "--id", "1", "--addr", "a:1")
				}
				line = append(line, "--")
				for _, before := range cmd.args[:i] {
					line = append(line, rightArguments[before])
				}
				line = append(line, wrong)
				for _, after := range cmd.args[i+1:] {
					line = append(line, rightArguments[after])
				}
				runCommand(t, exitUsage, "", line...)
				if cmd.repeated {
					runCommand(t, exitUsage, "", name, rightArguments[kind], wrong)
				}
			}
		}
		if cmd.repeated {
			arg := rightArguments[cmd.args[0]]
			_, errs := runCommand(t, exitUsage, "", name, arg, arg)
			wantPart(t, errs, "the id 7 stands there twice")
		}
	}
	if _, n := f.take(); n != 0 || f.asked != 0 || f.opened != 0 {
		t.Errorf("a node was called %d times, asked %d times, and opened %d sessions", n, f.asked, f.opened)
	}
	if names, err := os.ReadDir("."); err != nil || len(names) > 0 {
		t.Error(names, err)
	}
}

// TestEndpointsAreChecked: of the flag and of the environment; blanks at commas
// do not matter.
func TestEndpointsAreChecked(t *testing.T) {
	f := newFakeNode(t)
	for _, list := range []string{
		"a", "a:", ":1", "a:x", "a:http", "a:65536", "a:0", "a b:1", ",", "a:1,", "a:1,,b:1", "a:1;b:1", "a:1 b:1", " ",
	} {
		_, errs := runCommand(t, exitUsage, "", "get", "k", "--endpoints", list)
		wantPart(t, errs, "get: --endpoints: address ")
		t.Setenv(endpointVariable, list)
		_, errs = runCommand(t, exitUsage, "", "get", "k")
		wantPart(t, errs, "get: "+endpointVariable+": address ")
	}
	for _, list := range []string{f.addr + ", " + closedAddress, "  " + f.addr + " ,\t" + f.addr + "\n"} {
		t.Setenv(endpointVariable, list)
		runCommand(t, exitYes, "", "set", "k", "v")
	}
}

func TestFlagsAreChecked(t *testing.T) {
	t.Setenv(endpointVariable, closedAddress)
	for line, hint := range map[string]string{
		"delete k --if-version 0":                                     "no key has it",
		"change-membership 1 --retain --remove-others":                "want one of them",
		"restore f --id 1 --data-dir d --addr a:0":                    "--addr address \"a:0\": want where",
		"restore f --id 1 --data-dir d --addr a:x":                    "want a port from 0 to 65535, not \"x\"",
		"restore f --id 1 --data-dir d":                               "are needed",
		"get k ---":                                                   "bad flag syntax",
		"init 1=a:1 --force=x":                                        "invalid boolean value",
		"get --endpoints a:1 --endpoints a:99999 k":                   "want a port",
		"change-membership " + strings.Repeat("1 ", maxMembers) + "1": "wrong number of arguments: 65",
		"change-membership --remove-others=maybe 1":                   "invalid boolean value",
		"change-membership --retain=maybe 1":                          "-retain: want true or false",
		"set k --if-version --nosuch v":                               "want a version",
		"get --nosuch k":                                              "not defined: -nosuch",
		"get k --timeout":                                             "needs an argument",
		"get k --nosuch=1":                                            "goes behind --",
		"health --service ":                                           "needs an argument",
		"status --endpoints a:1 x":                                    "want: none",
		"list a b":                                                    "want: [PREFIX]",
		"set k":                                                       "want: KEY VALUE",
		"init":                                                        "want: ID=ADDR [ID=ADDR ...]",
		"help --endpoints a:1":                                        "flag provided but not defined: -endpoints",
		"restore --endpoints a:1 f --id 1 --data-dir d --addr 0.0.0.0:1": "flag provided but not defined: -endpoints",
	} {
		_, errs := runCommand(t, exitUsage, "", strings.Fields(line)...)
		wantPart(t, errs, hint)
	}
}

// TestErrorsAsJSON: wherever -o json stands, an error is one object, with the
// exit status, and what each endpoint said.
func TestErrorsAsJSON(t *testing.T) {
	f, fresh := newFakeNode(t), newFakeNode(t)
	fresh.setMetrics(&kvpb.MetricsResponse{})
	parse := func(errs string) (e commandError) {
		t.Helper()
		if err := json.Unmarshal([]byte(errs), &e); err != nil {
			t.Fatalf("%v: %s", err, errs)
		}
		return e
	}
	for _, line := range []string{"get --nosuch -o json k", "-o=json", "--timeout x -o json k", "-o json --timeout 0s k", "--- k -o json"} {
		_, errs := runCommand(t, exitUsage, "", append([]string{"get"}, strings.Fields(line)...)...)
		if e := parse(errs); e.Status != exitUsage || !strings.Contains(e.Text, "; see raft-key-value help get") {
			t.Errorf("%q: %+v", line, e)
		}
	}
	_, errs := runCommand(t, exitUsage, "", "get", "-o", "yaml", "k")
	wantPart(t, errs, "raft-key-value: get: -o \"yaml\"")

	endpoints := strings.Join([]string{closedAddress, fresh.addr}, ",")
	_, errs = runCommand(t, exitNotDone, "", "transfer-leader", "2", "-o", "json", "--endpoints", endpoints)
	e := parse(errs)
	want := []reply{{closedAddress, "", "UNAVAILABLE", ""}, {fresh.addr, "", "FAILED_PRECONDITION", "NOT_INITIALIZED"}}
	for i := range e.Endpoints {
		wantPart(t, e.Text, e.Endpoints[i].Endpoint+": "+e.Endpoints[i].Error)
		e.Endpoints[i].Error = ""
	}
	if !slices.Equal(e.Endpoints, want) || e.Reason != "NOT_INITIALIZED" {
		t.Errorf("%+v", e)
	}
	t.Setenv(variablePrefix+"ENDPONTS", "x")
	_, errs = runCommand(t, exitYes, "", "set", "k", "v", "-o", "json", "--endpoints", f.addr)
	wantText(t, "stderr", errs, `{"warning":"no flag has the environment variable RAFT_KEY_VALUE_ENDPONTS"}`+"\n")
	_, errs = runCommand(t, exitYes, "", "set", "k", "v", "--endpoints", f.addr)
	wantText(t, "stderr", errs, "raft-key-value: warning: no flag has the environment variable RAFT_KEY_VALUE_ENDPONTS\n")
}

func TestUnknownVariables(t *testing.T) {
	environ := []string{
		"RAFT_KEY_VALUE_IDD=1", "RAFT_KEY_VALUE_ID=1", "RAFT_KEY_VALUE_ELECTION_TIMEOUT=1s", "RAFT_KEY_VALUE_ENDPOINTS=a:1",
		"RAFT_KEY_VALUE_TIMEOUT=1s", "RAFT_KEY_VALUE_VERSION=", "OTHER=1", "RAFT_KEY_VALUE_",
	}
	want := []string{"RAFT_KEY_VALUE_", "RAFT_KEY_VALUE_IDD", "RAFT_KEY_VALUE_TIMEOUT", "RAFT_KEY_VALUE_VERSION"}
	if got := unknownVariables(environ); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestFlagsBeforeTheCommand(t *testing.T) {
	for line, want := range map[string]string{
		"get k":                 "get k",
		"--endpoints a:1 get k": "get -endpoints=a:1 k",
		"-o json --timeout=1s get k --endpoints b": "get -o=json -timeout=1s k --endpoints b",
		"--endpoints a:1 -o json version":          "version -o=json",
		"--endpoints a:1 restore f":                "restore f",
		"-o get get k":                             "get -o=get k",
		"--id 1 get k":                             "",
		"-- get k":                                 "",
		"--endpoints a:1":                          "",
		"--endpoints a:1 nosuch":                   "",
		"":                                         "",
	} {
		found, err := findCommand(strings.Fields(line))
		if got := strings.Join(found, " "); got != want || err != nil {
			t.Errorf("%q: %q, %v, want %q", line, got, err, want)
		}
	}
}

// TestFlagsBeforeTheCommandAreBlamed: the one that may not stand there, not one that
// may.
func TestFlagsBeforeTheCommandAreBlamed(t *testing.T) {
	for line, blamed := range map[string]string{
		"--endpoints a:1 --local get a":    "-local stands before the sub-command",
		"-o json --if-version=1 set k v":   "-if-version stands before the sub-command",
		"--timeout 1s --nosuch --id 1 get": "-nosuch stands before the sub-command",
	} {
		found, err := findCommand(strings.Fields(line))
		if found != nil || err == nil {
			t.Errorf("%q: %q, %v", line, found, err)
		}
		wantPart(t, fmt.Sprint(err), blamed)
	}
	for _, line := range []string{"--local get a", "--timeout 1s --id 1", "--endpoints", "-o ---"} {
		found, err := findCommand(strings.Fields(line)) // A node's line says what is wrong with it.
		if found != nil || err != nil {
			t.Errorf("%q: %q, %v", line, found, err)
		}
	}
	found, err := findCommand([]string{"--endpoints", "a:1", "--help"})
	if err != nil || !slices.Equal(found, []string{"help"}) {
		t.Errorf("help: %q, %v", found, err)
	}
}

// TestExitStatuses of the process: what stands before a sub-command, --version,
// and variables that nothing reads.
func TestExitStatuses(t *testing.T) {
	f := newFakeNode(t)
	f.put("k", "v")
	for _, test := range []struct {
		line, env      string
		status         int
		stdout, stderr string // parts
	}{
		{"--version", "", exitYes, "raft-key-value ", ""},
		{"-version", "", exitYes, "raft-key-value ", ""},
		{"--version x", "", exitUsage, "", "unknown sub-command"},
		{"--endpoints " + f.addr + " -o json get k", "", exitYes, `{"value":"dg==","version":"7"}`, ""},
		{"--endpoints " + f.addr + " get nosuch", "", exitNo, "", "not found"},
		{"--endpoints " + closedAddress + " transfer-leader 1", "", exitNotDone, "", "UNAVAILABLE"},
		{"--endpoints " + f.addr + " nosuch", "", exitUsage, "", "-endpoints"},
		{"--endpoints " + f.addr + " --local get k", "", exitUsage, "", "-local stands before"},
		{"get k", endpointVariable + "=" + f.addr, exitYes, "v", ""},
		{"get k --endpoints " + f.addr, "RAFT_KEY_VALUE_ENDPOINT=x", exitYes, "v", "the environment variable RAFT_KEY_VALUE_ENDPOINT\n"},
		{"--id 1", "RAFT_KEY_VALUE_ADRESS=x", exitUsage, "", "the environment variable RAFT_KEY_VALUE_ADRESS\n"},
		{"--id 1 --addr " + f.addr, "RAFT_KEY_VALUE_ADRESS=x", 1, "", "name=RAFT_KEY_VALUE_ADRESS"},
	} {
		log, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = log.Close() }()
		cmd := commandOf(log, strings.Fields(test.line)...)
		if test.env != "" {
			cmd.Env = append(cmd.Env, test.env)
		}
		var stdout bytes.Buffer
		cmd.Stdout = &stdout
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != test.status {
			t.Errorf("%q: %v, want status %d", test.line, err, test.status)
		}
		stderr, err := os.ReadFile(log.Name())
		if err != nil {
			t.Fatal(err)
		}
		wantPart(t, stdout.String(), test.stdout)
		wantPart(t, string(stderr), test.stderr)
		if test.stderr == "" && len(stderr) > 0 {
			t.Errorf("%q: stderr %q", test.line, stderr)
		}
	}
}

// TestChangesWhoseAnswerIsNotPrinted: the status must not say that nothing was
// done.
func TestChangesWhoseAnswerIsNotPrinted(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer func() { _ = full.Close() }()
	f := newFakeNode(t)
	f.put("k", "v")
	for line, want := range map[string]int{"remove 2": exitUnknown, "set k v -o json": exitUnknown, "get k": exitNotDone, "status": exitNotDone} {
		var errs bytes.Buffer
		args := append(strings.Fields(line), "--endpoints", f.addr)
		if got := runClient(t.Context(), args, nil, full, &errs); got != want {
			t.Errorf("%q: exit status %d, want %d: %s", line, got, want, &errs)
		}
		wantPart(t, errs.String(), "no space left")
		if strings.Contains(errs.String(), "it is done") != (want == exitUnknown) {
			t.Errorf("%q: %s", line, &errs)
		}
	}
}

func memberStatus(id uint64, role string) *kvpb.MemberStatus {
	return &kvpb.MemberStatus{
		Node:  &kvpb.Node{Id: id, Address: fmt.Sprintf("h:%d", id)},
		Voter: role == "voter", Learner: role == "learner", VoterOutgoing: role == "leaving",
	}
}

// TestChangesOfMembership: what is sent; voters are dropped only by who says so.
func TestChangesOfMembership(t *testing.T) {
	follower, leader := newFakeNode(t), newFakeNode(t)
	t.Setenv(endpointVariable, follower.addr)
	expected := func(members ...*kvpb.MemberStatus) *kvpb.Membership {
		m := &kvpb.Membership{}
		for _, s := range members {
			m.Members = append(m.Members, &kvpb.ExpectedMember{Node: s.Node, Voter: s.Voter})
		}
		return m
	}
	one, two, three, four := memberStatus(1, "voter"), memberStatus(2, "voter"), memberStatus(3, "voter"), memberStatus(4, "learner")
	// The follower lags behind: it knows neither node 3 nor 4.
	follower.setMetrics(&kvpb.MetricsResponse{
		ClusterId: 10, Role: kvpb.Role_ROLE_FOLLOWER, Leader: &kvpb.Node{Id: 2, Address: leader.addr},
		Members: []*kvpb.MemberStatus{one, two},
	})
	leaderHas := func(members ...*kvpb.MemberStatus) {
		leader.setMetrics(&kvpb.MetricsResponse{ClusterId: 10, Role: kvpb.Role_ROLE_LEADER, Members: members})
	}
	leaderHas(four, three, two, one)
	all := expected(one, two, three, four)
	for _, test := range []struct {
		line string
		sent *kvpb.ChangeMembershipRequest // nil: none
		out  string
	}{
		{"change-membership 4", nil, "it would remove nodes 1, 2 and 3 from the cluster: --remove-others does that, --retain keeps them as learners"},
		{"change-membership 1 2 4", nil, "it would remove node 3 from the cluster: --remove-others does that, --retain keeps it as a learner"},
		{"change-membership 1 2 3 4", &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3, 4}, Expected: all}, "voters: [1 2 3 4]\n"},
		{"change-membership 2 1 --remove-others", &kvpb.ChangeMembershipRequest{Members: []uint64{2, 1}, Expected: all}, "voters: [2 1]\n"},
		{"change-membership 4 --retain", &kvpb.ChangeMembershipRequest{Members: []uint64{4}, Retain: true, Expected: all}, "voters: [4]\n"},
		{"promote 4", &kvpb.ChangeMembershipRequest{Promote: []uint64{4}}, "node 4 is a voter\n"},
		{"promote 4 5", &kvpb.ChangeMembershipRequest{Promote: []uint64{4, 5}}, "nodes 4 and 5 are voters\n"},
		{"demote 3", &kvpb.ChangeMembershipRequest{Demote: []uint64{3}}, "node 3 is a learner\n"},
		{"demote 3 2 1", &kvpb.ChangeMembershipRequest{Demote: []uint64{3, 2, 1}}, "nodes 3, 2 and 1 are learners\n"},
		{"remove 2", &kvpb.ChangeMembershipRequest{Remove: []uint64{2}}, "node 2 is removed\n"},
	} {
		exit := exitYes
		calls := 1
		if test.sent == nil {
			exit = exitUsage
			calls = 0
		}
		out, errs := runCommand(t, exit, "", strings.Fields(test.line)...)
		wantPart(t, out+errs, test.out)
		sent, n := follower.take()
		if n != calls || test.sent != nil && !proto.Equal(sent, test.sent) {
			t.Errorf("%s: sent %d times, %v, want %v", test.line, n, sent, test.sent)
		}
	}
	// Who is on its way out is no voter to be kept; a node of two lives is sent as it is.
	old := memberStatus(2, "learner")
	for _, lives := range [][]*kvpb.MemberStatus{{old, two}, {two, old}} {
		leaderHas(append(lives, memberStatus(1, "leaving"), three)...)
		runCommand(t, exitYes, "", "change-membership", "2", "3")
		want := &kvpb.ChangeMembershipRequest{Members: []uint64{2, 3}, Expected: expected(append(lives, three)...)}
		if sent, _ := follower.take(); !proto.Equal(sent, want) {
			t.Errorf("sent %v, want %v", sent, want)
		}
	}
	runCommand(t, exitYes, "", "init", "1=h:1", "--force")
	if sent, _ := follower.take(); !sent.(*kvpb.InitRequest).Force {
		t.Errorf("sent %v", sent)
	}
}
