package check

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const unitFile = "../systemd/raft-key-value.service"

// setting is the last value of a setting of the unit.
func setting(t *testing.T, name string) string {
	t.Helper()
	found := regexp.MustCompile(`(?m)^`+name+`=(.*)$`).FindAllStringSubmatch(readFile(t, unitFile), -1)
	if found == nil {
		t.Fatalf("the unit has no %s", name)
	}
	return found[len(found)-1][1]
}

// TestUnit looks at what the program needs of its unit.
func TestUnit(t *testing.T) {
	for name, want := range map[string]string{
		"Type":                     "notify",
		"Restart":                  "on-failure",
		"RestartPreventExitStatus": "2 5",
		"StartLimitIntervalSec":    "0",
		"TimeoutStartSec":          "infinity",
	} {
		if got := setting(t, name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	seconds, err := strconv.Atoi(setting(t, "TimeoutStopSec"))
	if err != nil || time.Duration(seconds)*time.Second <= stopTime {
		t.Errorf("a node is killed after %d s, and may take %v: %v", seconds, stopTime, err)
	}
	wantPart(t, readFile(t, "../systemd/sysusers.conf"), "\nu "+setting(t, "User")+" ")
	wantPart(t, readFile(t, "../systemd/node.env"), "\nRAFT_KEY_VALUE_DATA_DIR=/var/lib/"+setting(t, "StateDirectory")+"/")
}

// TestEnvironmentFile has the program itself check the settings: what it misses in the end is
// the certificate.
func TestEnvironmentFile(t *testing.T) {
	cmd := exec.Command(buildProgram(t))
	for line := range strings.Lines(readFile(t, "../systemd/node.env")) {
		line = strings.TrimSuffix(strings.TrimPrefix(line, "#RAFT"), "\n") // what is left out is right, too
		if strings.HasPrefix(line, "_KEY_VALUE_") {
			line = "RAFT" + line
		}
		if strings.HasPrefix(line, "RAFT_KEY_VALUE_") {
			cmd.Env = append(cmd.Env, line)
		}
	}
	if len(cmd.Env) != 8 {
		t.Errorf("it sets %v", cmd.Env)
	}
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() == 2 || !bytes.Contains(out, []byte("/etc/raft-key-value/node.pem")) {
		t.Errorf("%v: want it to miss its certificate:\n%s", err, out)
	}
}

// TestFiles looks that the unit's limit of files has room for all clients and peers.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	out, err := exec.Command(buildProgram(t), "certs", filepath.Join(dir, "pki"), "--nodes", "1=127.0.0.1").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	file := func(name string) string { return filepath.Join(dir, "pki", name) }
	n := startNode(t, exec.Command("sh", "-c", `ulimit -n "$1" && shift && exec "$@"`, "sh", setting(t, "LimitNOFILE"),
		buildProgram(t), "--id", "1", "--addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0",
		"--cert-file", file("node1.pem"), "--key-file", file("node1.key"), "--trusted-ca-file", file("ca.pem")))
	wantPart(t, readFile(t, n.log), " connections=2048 peers=80 ")
	n.stop(t, n.cmd.Process.Pid)
}

// helperVariable has the test's program run TestMemoryHelper alone.
const helperVariable = "RAFT_KEY_VALUE_CHECK_MEMORY"

// TestMemoryDenyWriteExecute looks that a node needs no memory that is written and then run. The
// kernel refuses that to it, nearly as systemd does.
func TestMemoryDenyWriteExecute(t *testing.T) {
	if setting(t, "MemoryDenyWriteExecute") != "yes" {
		t.Fatal("the unit does not deny it")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	watched := func(args ...string) *exec.Cmd {
		cmd := exec.Command(exe, "-test.run=^TestMemoryHelper$")
		command := append([]string{buildProgram(t)}, args...)
		cmd.Env = append(os.Environ(), helperVariable+"="+strings.Join(command, "\n"))
		return cmd
	}
	version := watched("version")
	out, err := version.CombinedOutput()
	if version.ProcessState.ExitCode() == 77 {
		t.Skipf("this kernel has no PR_SET_MDWE: %s", out)
	}
	if err != nil || !strings.HasPrefix(string(out), "raft-key-value ") {
		t.Fatalf("%v: %s", err, out)
	}
	n := startNode(t, watched("--id", "1", "--addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0",
		"--data-dir", filepath.Join(t.TempDir(), "data")))
	n.command(t, "init", "1="+n.address)
	n.command(t, "set", "key", "value")
	n.stop(t, n.cmd.Process.Pid)
}

// TestMemoryHelper becomes a program whose memory the kernel watches.
func TestMemoryHelper(t *testing.T) {
	command := strings.Split(os.Getenv(helperVariable), "\n")
	if command[0] == "" {
		return
	}
	const setMDWE, refuseExecGain = 65, 1
	_, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, setMDWE, refuseExecGain, 0)
	if errno != 0 {
		fmt.Println(errno)
		os.Exit(77)
	}
	t.Fatal(syscall.Exec(command[0], command, nil))
}

// analyze runs systemd-analyze, or skips the test.
func analyze(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("systemd-analyze", args...).CombinedOutput()
	if _, missing := exec.LookPath("systemd-analyze"); missing != nil {
		t.Skip("there is no systemd-analyze here")
	}
	if bytes.Contains(out, []byte("unrecognized option")) {
		t.Skipf("systemd-analyze is too old: %s", out)
	}
	if err != nil {
		t.Errorf("systemd-analyze %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestAnalyze has systemd read the unit, and judge what a node that was taken over could do.
func TestAnalyze(t *testing.T) {
	text := strings.Replace(readFile(t, unitFile), "ExecStart=/usr/local/bin/raft-key-value", "ExecStart="+buildProgram(t), 1)
	unit := filepath.Join(t.TempDir(), filepath.Base(unitFile))
	if err := os.WriteFile(unit, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out := analyze(t, "verify", unit)
	if strings.Contains(out, filepath.Base(unit)) {
		t.Errorf("systemd does not like it:\n%s", out)
	}
	analyze(t, "security", "--offline=true", "--threshold=20", unit) // 2.0 of 10
}

// calls are the system calls of a set, as systemd has it.
func calls(t *testing.T, set string) (names []string) {
	t.Helper()
	for line := range strings.Lines(analyze(t, "syscall-filter", set)) {
		name := strings.TrimSpace(line)
		isIndented := strings.HasPrefix(line, " ")
		switch {
		case !isIndented || strings.HasPrefix(name, "#") || name == "":
		case strings.HasPrefix(name, "@"):
			names = append(names, calls(t, name)...)
		default:
			names = append(names, name)
		}
	}
	return names
}

// TestSystemCalls looks that a node makes none that its unit forbids.
func TestSystemCalls(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("there is no strace here")
	}
	wantPart(t, readFile(t, unitFile), "\nSystemCallFilter=@system-service\nSystemCallFilter=~@privileged\n")
	allowed := calls(t, "@system-service")
	forbidden := calls(t, "@privileged")
	trace := filepath.Join(t.TempDir(), "trace")
	n := startNode(t, exec.Command("strace", "-f", "-qq", "-o", trace,
		buildProgram(t), "--id", "1", "--addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0",
		"--data-dir", filepath.Join(t.TempDir(), "data")))
	n.command(t, "init", "1="+n.address)
	n.command(t, "set", "key", "value")
	children := readFile(t, fmt.Sprintf("/proc/%d/task/%[1]d/children", n.cmd.Process.Pid))
	pid, err := strconv.Atoi(strings.TrimSpace(children))
	if err != nil {
		t.Fatal(err)
	}
	n.stop(t, pid)
	made := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\d+ +(\w+)\(`).FindAllStringSubmatch(readFile(t, trace), -1) {
		made[m[1]] = true
	}
	delete(made, "execve") // systemd's own
	for name := range made {
		if !slices.Contains(allowed, name) || slices.Contains(forbidden, name) {
			t.Errorf("a node calls %s", name)
		}
	}
	if !made["fsync"] && !made["fdatasync"] {
		t.Errorf("only these calls were seen: %v", made)
	}
}
