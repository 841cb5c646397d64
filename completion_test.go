package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestCompletions: what may stand in place of the last word, for commands, flags, their values,
// and arguments.
func TestCompletions(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"st":                              "status",
		"re":                              "remove restore",
		"nosuch ":                         "",
		"health --se":                     "--service",
		"health -se":                      "-service",
		"health --service ":               "raftkv.v1.KVService raftkv.v1.restart",
		"health --service=raftkv.v1.r":    "--service=raftkv.v1.restart",
		"health --service raftkv.v1.r":    "raftkv.v1.restart",
		"health --wait --ser":             "--service",
		"get -o ":                         "text json",
		"get -o=j":                        "-o=json",
		"-o json ge":                      "get",
		"--endpoints h:1 -o json get k -": "--cert-file --endpoints --key-file --local --min-version -o --timeout --trusted-ca-file",
		"get -":                           "--cert-file --endpoints --key-file --local --min-version -o --timeout --trusted-ca-file",
		"get k ":                          "",
		"get -- -":                        "",
		"get --cert-file ":                ":files",
		"get --cert-file=p":               ":files",
		"get --cert-file p --key":         "--key-file",
		"get --endpoints ":                "",
		"get --nosuch=":                   "",
		"backup ":                         ":files",
		"backup x ":                       "",
		"backup --data-dir ":              ":dirs",
		"verify ./d":                      ":files",
		"certs ":                          ":dirs",
		"restore --data-dir=":             ":dirs",
		"help tr":                         "transfer-leader",
		"completion ":                     "bash zsh",
		"--log-":                          "--log-bytes --log-format --log-level",
		"--log-format ":                   "text json",
		"--log-level w":                   "warn",
		"--id 1 --join-as ":               "voter learner",
		"--id 1 --data-dir ":              ":dirs",
		"--id 1 --addr h:1 --peer-ca":     "--peer-ca-file",
		"--id st":                         "",
		"--vers":                          "--version",
	} {
		got := strings.Join(completionsOf(strings.Split(line, " ")), " ")
		wantText(t, fmt.Sprintf("%q", line), got, want)
	}
	if got := completionsOf(strings.Split("", " ")); !slices.Equal(got, commandNames()) {
		t.Errorf("of nothing: %q", got)
	}
	if got := completionsOf(nil); got != nil {
		t.Errorf("of no word: %q", got)
	}
}

// TestCompletedValuesAreTaken: each value that is offered is one that the flag takes, and each flag
// that is offered is there.
func TestCompletedValuesAreTaken(t *testing.T) {
	t.Parallel()
	left := map[string]bool{}
	for name := range choices {
		left[name] = true
	}
	check := func(fs *flag.FlagSet, isRight func() error) {
		fs.VisitAll(func(f *flag.Flag) {
			for _, value := range choices[f.Name] {
				delete(left, f.Name)
				if err := fs.Set(f.Name, value); err != nil {
					t.Errorf("%s: -%s %s: %v", fs.Name(), f.Name, value, err)
				}
				if err := isRight(); err != nil {
					t.Errorf("%s: -%s %s: %v", fs.Name(), f.Name, value, err)
				}
			}
		})
	}
	o := defaultOptions()
	check(nodeFlags(&o), func() error { return nil })
	health := &invocation{name: "health", command: commands()["health"]}
	check(health.flagSet(), func() error { return health.command.check(health) })
	if len(left) > 0 {
		t.Errorf("no flag has the choices of %v", left)
	}
}

// shellCompletes runs a shell with a script behind that for completion, and returns what it prints.
func shellCompletes(t *testing.T, shell []string, name, script string) string {
	t.Helper()
	dir := t.TempDir()
	program := "#!/bin/sh\n" + mainVariable + "=1 exec '" + os.Args[0] + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "raft-key-value"), []byte(program), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"pki one.pem", "pki2.pem", "other"} {
		if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "pkidir"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, shell[0], append(shell[1:], "source <(./raft-key-value completion "+name+")\n"+script)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// TestBashCompletes: the script does in bash what it should, where bash takes words apart at = and :
// as well.
func TestBashCompletes(t *testing.T) {
	t.Parallel()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("there is no bash")
	}
	const asks = `
ask() { # the words as bash has them
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_POINT=${#COMP_LINE}
  _raft_key_value
  printf '%s|' "${COMPREPLY[@]}"
  echo
}
`
	var script strings.Builder
	script.WriteString(asks)
	var want []string
	for _, q := range []struct{ line, words, want string }{
		{"./raft-key-value sta", "./raft-key-value sta", "status|"},
		{"./raft-key-value re", "./raft-key-value re", "remove|restore|"},
		{"./raft-key-value get -o ", "./raft-key-value get -o ''", "text|json|"},
		{"./raft-key-value get -o=j", "./raft-key-value get -o = j", "json|"},
		{"./raft-key-value get -o=", "./raft-key-value get -o =", "text|json|"},
		{"./raft-key-value get --endpoints=h:1 --lo", "./raft-key-value get --endpoints = h : 1 --lo", "--local|"},
		{"./raft-key-value --log-l", "./raft-key-value --log-l", "--log-level|"},
		{"./raft-key-value verify pki", "./raft-key-value verify pki", "pki one.pem|pki2.pem|pkidir|"},
		{"./raft-key-value get --cert-file=pki2", "./raft-key-value get --cert-file = pki2", "pki2.pem|"},
		{"./raft-key-value certs pki", "./raft-key-value certs pki", "pkidir|"},
		{"./raft-key-value get k ", "./raft-key-value get k ''", "|"},
	} {
		fmt.Fprintf(&script, "COMP_LINE=%q\nask %s\n", q.line, q.words)
		want = append(want, q.want)
	}
	got := shellCompletes(t, []string{bash, "--norc", "-c"}, "bash", script.String())
	lines := strings.Split(strings.TrimSpace(got), "\n")
	if len(lines) != len(want) {
		t.Fatalf("%q", got)
	}
	for i, line := range lines {
		parts := strings.Split(strings.TrimSuffix(line, "|"), "|")
		if len(want[i]) > 1 && strings.Contains(want[i], "pki") {
			slices.Sort(parts) // in which order bash finds files is the system's
		}
		wantText(t, fmt.Sprint("question ", i), strings.Join(parts, "|")+"|", want[i])
	}
	registered := shellCompletes(t, []string{bash, "--norc", "-c"}, "bash", "complete -p raft-key-value")
	wantText(t, "complete -p", registered, "complete -F _raft_key_value raft-key-value\n")
}

// TestZshCompletes: the script does in zsh what it should. What zsh has for completion is replaced
// by functions that print how they were called.
func TestZshCompletes(t *testing.T) {
	t.Parallel()
	zsh, err := exec.LookPath("zsh")
	if err != nil {
		t.Skip("there is no zsh")
	}
	const before = `
compadd() { shift; print -r -- "$*" }
_files() { print -r -- "files $* $PREFIX" }
compset() { PREFIX=${PREFIX#*=} }
ask() { words=("$@"); CURRENT=$#; PREFIX=$words[-1]; _raft_key_value; print . }
ask ./raft-key-value sta
ask ./raft-key-value get -o ''
ask ./raft-key-value get -o=j
ask ./raft-key-value verify pki
ask ./raft-key-value get --cert-file=pki2
ask ./raft-key-value certs pki
ask ./raft-key-value get k ''
`
	out := shellCompletes(t, []string{zsh, "-f", "-c", "compdef() { print -r -- compdef $* }\neval \"$0\""}, "zsh", before)
	wantText(t, "zsh", out, "compdef _raft_key_value raft-key-value\n"+
		"status\n.\ntext json\n.\n-o=json\n.\nfiles  pki\n.\nfiles  pki2\n.\nfiles -/ pki\n.\n.\n")
}

// TestCompletionCommand: what else it is asked for is a usage error.
func TestCompletionCommand(t *testing.T) {
	t.Parallel()
	out, _ := runCommand(t, exitYes, "", "completion", "words", "--", "get", "--loc")
	wantText(t, "words", out, "--local\n")
	for _, args := range [][]string{{"completion"}, {"completion", "fish"}, {"completion", "bash", "x"}} {
		runCommand(t, exitUsage, "", args...)
	}
	var errs strings.Builder
	if got := runClient(t.Context(), []string{"completion", "words"}, nil, io.Discard, &errs); got != exitYes {
		t.Errorf("no word: exit status %d, %s", got, &errs)
	}
}
