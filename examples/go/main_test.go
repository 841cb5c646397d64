package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math"
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

const (
	// some is how many more values are to be seen before the next thing happens.
	some = 100
	// runLimit is generous: it says that a program hangs.
	runLimit = 2 * time.Minute
)

// TestCounters runs the counter of each language on a cluster of three nodes, kills two leaders
// meanwhile, one after the other, and looks that each addition was made once and that the
// follower was told of each.
func TestCounters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	node := build(t, filepath.Join("..", ".."), filepath.Join(dir, "raft-key-value"))
	counters := []program{{"Go", []string{build(t, ".", filepath.Join(dir, "counter"))}, nil}}
	python, why := findPython(t)
	if why == "" {
		counters = append(counters, program{"Python", []string{python.interpreter, "counter.py"}, &python})
	}
	for _, pki := range []string{"", filepath.Join(dir, "pki")} {
		name := "without TLS"
		if pki != "" {
			name = "with TLS"
		}
		t.Run(name, func(t *testing.T) {
			c := startCluster(t, node, pki)
			for _, p := range counters {
				t.Run(p.name, func(t *testing.T) { c.survives(t, p) })
			}
			if why != "" {
				t.Run("Python", func(t *testing.T) { t.Skip(why) })
			}
		})
	}
}

// build makes a program of the package in a directory.
func build(t *testing.T, dir, file string) string {
	t.Helper()
	cmd := exec.Command("go", "build", "-o", file, ".")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("go build in %s: %v\n%s", dir, err, out)
	}
	return file
}

// program is a counter.
type program struct {
	name    string
	command []string
	python  *python // nil: it is not in Python
}

// python runs the programs of examples/python.
type python struct {
	interpreter string
	generated   string // the directory with the code that is generated from kv.proto
}

// findPython finds it, or else says why there is none. EXAMPLES_PYTHON names a python3 that has
// what requirements.txt lists.
func findPython(t *testing.T) (p python, why string) {
	t.Helper()
	p = python{os.Getenv("EXAMPLES_PYTHON"), t.TempDir()}
	isWanted := p.interpreter != ""
	if !isWanted {
		p.interpreter = "python3"
	}
	// As the README says, but with the generated code elsewhere.
	cmd := exec.Command(p.interpreter, "-m", "grpc_tools.protoc", "-I", "raftkv/v1=../..",
		"--python_out="+p.generated, "--grpc_python_out="+p.generated, "raftkv/v1/kv.proto")
	p.prepare(cmd)
	out, err := cmd.CombinedOutput()
	if err != nil && isWanted {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	if err != nil {
		return p, fmt.Sprintf("python3 does not have what examples/python/requirements.txt lists: %v: %s", err, out)
	}
	return p, ""
}

// prepare has a command run in examples/python, find the generated code, and leave nothing behind.
func (p *python) prepare(cmd *exec.Cmd) {
	cmd.Dir = filepath.Join("..", "python")
	cmd.Env = append(os.Environ(), "PYTHONPATH="+p.generated, "PYTHONDONTWRITEBYTECODE=1")
}

// TestPython runs the tests of the client in Python.
func TestPython(t *testing.T) {
	t.Parallel()
	p, why := findPython(t)
	if why != "" {
		t.Skip(why)
	}
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.interpreter, "-m", "unittest", "test_rkv")
	p.prepare(cmd)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// survives runs a counter. Twice meanwhile, it kills the leader, and starts it again. The second
// time, a node without its memory is up: it cannot tell a follower what was written before that.
func (c *cluster) survives(t *testing.T, p program) {
	key := "counter/" + p.name
	args := []string{"-nodes", strings.Join(c.addresses(), ","), "-counter", key,
		"-adds", "0"} // until it is told to stop
	if c.pki != "" {
		args = append(args, "-cert", c.file("client.pem"), "-key-file", c.file("client.key"), "-ca", c.file("ca.pem"))
	}
	for i, arg := range args {
		if strings.HasPrefix(arg, "-") {
			args[i] = "-" + arg // as Python has them, and Go, too
		}
	}
	command := slices.Concat(p.command, args)
	cmd := exec.Command(command[0], command[1:]...)
	if p.python != nil {
		p.python.prepare(cmd)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hangs := time.AfterFunc(runLimit, func() { _ = cmd.Process.Kill() })
	defer hangs.Stop()

	var lines []string
	var killed []int // ids of leaders
	enough := some   // the value after which the next leader is killed, or all was seen
	for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
		lines = append(lines, scanner.Text())
		if len(lines) < enough {
			continue
		}
		if len(killed) == 2 {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			enough = math.MaxInt
			continue
		}
		killed = append(killed, c.replaceLeader(t))
		enough = c.number(t, key) + some
	}
	err = cmd.Wait()
	if err != nil || len(killed) < 2 {
		t.Fatalf("%s: %v, after %d lines and the loss of nodes %v\n%s", p.name, err, len(lines), killed, stderr.String())
	}
	value := c.number(t, key)
	t.Logf("it counted to %d, and nodes %v were killed; stderr: %s", value, killed, stderr.String())
	checkLines(t, lines, value)
}

// number is what a counter has.
func (c *cluster) number(t *testing.T, key string) int {
	t.Helper()
	value, err := c.command("get", key, "--timeout", "30s")
	n, syntax := strconv.Atoi(value)
	if err != nil || syntax != nil {
		t.Fatalf("%s is %q: %v", key, value, err)
	}
	return n
}

// replaceLeader kills the leader, starts it again, and returns its id.
func (c *cluster) replaceLeader(t *testing.T) int {
	t.Helper()
	n := c.leader(t)
	n.kill()
	c.start(t, n)
	c.awaitHealth(t)
	return n.id
}

// checkLines looks that a counter was told of each value once, in order, up to the last one, and
// that as many additions were acknowledged.
func checkLines(t *testing.T, lines []string, all int) {
	t.Helper()
	last := lines[len(lines)-1]
	if last != fmt.Sprintf("added %d", all) {
		t.Errorf("the last line is %q", last)
	}
	value, version := 0, uint64(0)
	for i, line := range lines[:len(lines)-1] {
		var what string
		var newValue int
		var newVersion uint64
		_, err := fmt.Sscanf(line, "%s %d of version %d", &what, &newValue, &newVersion)
		if err != nil {
			t.Fatalf("line %d: %q: %v", i+1, line, err)
		}
		isFirst := i == 0 && what == "begins" // perhaps after some additions
		isNext := what == "is" && newValue == value+1 && newVersion > version
		if !isFirst && !isNext {
			t.Fatalf("line %d: %q, after the value %d of version %d", i+1, line, value, version)
		}
		value, version = newValue, newVersion
	}
	if value != all {
		t.Errorf("the last value told is %d", value)
	}
}

// cluster is three nodes, each a process.
type cluster struct {
	program string
	pki     string // the directory with certificates; empty: there is no TLS
	logs    string // the directory
	nodes   []*node
}

type node struct {
	id      int
	address string
	cmd     *exec.Cmd
}

func startCluster(t *testing.T, program, pki string) *cluster {
	t.Helper()
	c := &cluster{program: program, pki: pki, logs: t.TempDir()}
	if pki != "" {
		// The second name is one of all nodes, for Python.
		out, err := c.command("certs", pki, "--nodes", "1=127.0.0.1,1=kv,2=127.0.0.1,2=kv,3=127.0.0.1,3=kv")
		if err != nil {
			t.Fatalf("certs: %v\n%s", err, out)
		}
	}
	var members []string
	for id := 1; id <= 3; id++ {
		n := &node{id: id, address: "127.0.0.1:0"}
		c.nodes = append(c.nodes, n)
		c.start(t, n)
		t.Cleanup(n.kill)
		members = append(members, fmt.Sprintf("%d=%s", id, n.address))
	}
	out, err := c.command(append([]string{"init"}, members...)...)
	if err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	c.awaitHealth(t)
	return c
}

// file is a file of the certificates.
func (c *cluster) file(name string) string { return filepath.Join(c.pki, name) }

func (c *cluster) addresses() (addresses []string) {
	for _, n := range c.nodes {
		addresses = append(addresses, n.address)
	}
	return addresses
}

// environment is that of nodes and commands: nothing of whoever runs the test.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "RAFT_KEY_VALUE_") })
}

// command runs a sub-command, and returns what it prints to stdout.
func (c *cluster) command(args ...string) (string, error) {
	cmd := exec.Command(c.program, args...)
	cmd.Env = append(environment(), "RAFT_KEY_VALUE_ENDPOINTS="+strings.Join(c.addresses(), ","))
	if len(c.nodes) == 0 {
		cmd.Env = environment()
	}
	if c.pki != "" && len(c.nodes) > 0 {
		cmd.Env = append(cmd.Env, "RAFT_KEY_VALUE_CERT_FILE="+c.file("admin.pem"),
			"RAFT_KEY_VALUE_KEY_FILE="+c.file("admin.key"), "RAFT_KEY_VALUE_TRUSTED_CA_FILE="+c.file("ca.pem"))
	}
	out, err := cmd.Output()
	if exit, ok := err.(*exec.ExitError); ok {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	return string(out), err
}

var readyLine = regexp.MustCompile(` msg=ready .*advertise=(\S+)`)

// start starts a node, at the address that it had before if it had one.
func (c *cluster) start(t *testing.T, n *node) {
	t.Helper()
	log, err := os.CreateTemp(c.logs, "log")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	args := []string{"--id", fmt.Sprint(n.id), "--addr", n.address}
	if c.pki != "" {
		own := fmt.Sprintf("node%d", n.id)
		args = append(args, "--cert-file", c.file(own+".pem"), "--key-file", c.file(own+".key"),
			"--trusted-ca-file", c.file("ca.pem"))
	}
	n.cmd = exec.Command(c.program, args...)
	n.cmd.Env, n.cmd.Stderr = environment(), log
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(log.Name())
		if m := readyLine.FindSubmatch(text); m != nil {
			n.address = string(m[1])
			return
		}
		if time.Now().After(deadline) {
			n.kill()
			t.Fatalf("node %d is not ready: %v\n%s", n.id, err, text)
		}
	}
}

// kill ends a node at once.
func (n *node) kill() {
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
}

// awaitHealth waits until all nodes are ready for calls.
func (c *cluster) awaitHealth(t *testing.T) {
	t.Helper()
	for _, n := range c.nodes {
		out, err := c.command("health", "--endpoints", n.address, "--wait", "--timeout", "30s")
		if err != nil {
			t.Fatalf("node %d: %v\n%s", n.id, err, out)
		}
	}
}

// leader is the node that leads.
func (c *cluster) leader(t *testing.T) *node {
	t.Helper()
	out, err := c.command("status", "-o", "json")
	var survey struct {
		Members []struct {
			NodeID  string `json:"node_id"`
			Metrics *struct {
				Role string `json:"role"`
			} `json:"metrics"`
		} `json:"members"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &survey)
	}
	if err != nil {
		t.Fatalf("status: %v\n%s", err, out)
	}
	for _, m := range survey.Members {
		for _, n := range c.nodes {
			leads := m.Metrics != nil && m.Metrics.Role == "ROLE_LEADER"
			if leads && m.NodeID == fmt.Sprint(n.id) {
				return n
			}
		}
	}
	t.Fatalf("nobody leads: %s", out)
	return nil
}
