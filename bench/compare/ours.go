package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"raft-key-value/bench/internal/load"
	"raft-key-value/kvpb"
)

// clusterSize is how many nodes each cluster has.
const clusterSize = 3

// startTimeout bounds the wait for a cluster to come up.
const startTimeout = 30 * time.Second

// ours is a cluster of this store.
type ours struct {
	nodes []*process
	*load.KV
}

// process is a node's.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// errNoDataDir says that the program has no durable mode.
var errNoDataDir = errors.New("the program knows no --data-dir")

func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	return cmd
}

// startOurs starts a cluster and connects to its leader.
func startOurs(ctx context.Context, binary, dir string, durable bool) (_ *ours, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	o := &ours{}
	defer func() {
		if err != nil {
			o.stop()
		}
	}()
	var members []*kvpb.Node
	var addresses []string
	for id := range uint64(clusterSize) {
		address, err := o.startNode(ctx, binary, filepath.Join(dir, fmt.Sprint(id+1)), id+1, durable)
		if err != nil {
			return nil, err
		}
		members = append(members, &kvpb.Node{Id: id + 1, Address: address})
		addresses = append(addresses, address)
	}
	conns, err := load.Dial(addresses[:1], 1)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conns[0].Close() }()
	if _, err := kvpb.NewClusterServiceClient(conns[0]).Init(ctx, &kvpb.InitRequest{Members: members}); err != nil {
		return nil, fmt.Errorf("init: %w", err)
	}
	leader, err := load.Leader(ctx, addresses)
	if err != nil {
		return nil, err
	}
	o.KV, err = load.DialKV([]string{leader}, connections)
	return o, err
}

var readyLine = regexp.MustCompile(` msg=ready .*advertise=(\S+)`)

// startNode starts a node on a port that the system picks, and waits until it
// says which.
func (o *ours) startNode(ctx context.Context, binary, dir string, id uint64, durable bool) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	args := []string{"--id", fmt.Sprint(id), "--addr", "127.0.0.1:0"}
	if durable {
		args = append(args, "--data-dir", filepath.Join(dir, "data"))
	}
	path := filepath.Join(dir, "log")
	log, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(binary, args...)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return "", err
	}
	p := &process{cmd, make(chan struct{})}
	o.nodes = append(o.nodes, p)
	go func() { _ = cmd.Wait(); close(p.ended) }()
	for over := false; ; {
		text, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		if m := readyLine.FindSubmatch(text); m != nil {
			return string(m[1]), nil
		}
		if over && strings.Contains(string(text), "not defined: -data-dir") {
			return "", errNoDataDir
		} else if over {
			return "", fmt.Errorf("node %d did not start: %s", id, text)
		}
		select {
		case <-p.ended:
			over = true
		case <-ctx.Done():
			return "", fmt.Errorf("node %d is not ready: %w\n%s", id, ctx.Err(), text)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop ends the nodes: they have nothing that is to be kept.
func (o *ours) stop() {
	if o.KV != nil {
		o.Close()
	}
	for _, p := range o.nodes {
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}
