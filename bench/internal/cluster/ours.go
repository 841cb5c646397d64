// Package cluster starts clusters of this store, each member a process on this
// machine.
package cluster

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/bench/internal/load"
	"raft-key-value/kvpb"
)

// Connections is the most that any system gets; fewer clients use fewer.
const Connections = 16

const (
	// StartTimeout bounds the wait for a cluster to come up.
	StartTimeout = 30 * time.Second
	// settleTimeout bounds the wait until all members have caught up.
	settleTimeout = time.Minute
	poll          = 20 * time.Millisecond
)

// Program says where the nodes' program and all data are.
type Program struct{ Binary, Source, Dir string }

// Flags defines the flags that say so.
func (p *Program) Flags(fs *flag.FlagSet) {
	fs.StringVar(&p.Binary, "binary", "", "`file` of the node's program (default: built from --source)")
	fs.StringVar(&p.Source, "source", "..", "`directory` of the node's source")
	fs.StringVar(&p.Dir, "dir", "", "`directory` for a temporary directory with all data; the disk there is what is measured (default: the system's)")
}

// In calls f with a temporary directory and the path of the node's program,
// which it makes if it is not given.
func (p *Program) In(ctx context.Context, name string, f func(dir, binary string) error) (err error) {
	dir, err := os.MkdirTemp(p.Dir, "raft-key-value-"+name+"-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if p.Binary != "" {
		binary, err := filepath.Abs(p.Binary)
		if err != nil {
			return err
		}
		return f(dir, binary)
	}
	binary := filepath.Join(dir, "raft-key-value")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", binary, ".")
	cmd.Dir = p.Source
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build in %s: %w\n%s", p.Source, err, out)
	}
	return f(dir, binary)
}

// Config says what cluster to start.
type Config struct {
	Binary  string // the node's program; etcd's is this one
	Dir     string // for data and logs
	Size    int    // how many members
	Durable bool
	TLS     Identities
	Args    []string  // more flags of each node
	Env     []string  // more environment of each node
	Stderr  io.Writer // of etcd's members; nil: this process's
}

// Ours is a cluster of this store, and connections to the node that led it when
// it was started.
type Ours struct {
	Config
	Nodes  []*Node
	Leader *Node
	Admin  kvpb.ClusterServiceClient // of the leader
	*load.KV
	admin *grpc.ClientConn
}

// Node is a process.
type Node struct {
	ID      uint64
	Address string
	Dir     string
	cmd     *exec.Cmd
	ended   chan struct{}
}

// PID is the process's.
func (n *Node) PID() int { return n.cmd.Process.Pid }

// DataDir is its data directory, if it has one; Log is what it said.
func (n *Node) DataDir() string { return filepath.Join(n.Dir, "data") }
func (n *Node) Log() string     { return filepath.Join(n.Dir, "log") }

// Signal signals the process.
func (n *Node) Signal(s syscall.Signal) error { return n.cmd.Process.Signal(s) }

// Kill ends the process, and waits for that.
func (n *Node) Kill() {
	_ = n.cmd.Process.Kill()
	<-n.ended
}

// ErrNoDataDir says that the program has no durable mode.
var ErrNoDataDir = errors.New("the program knows no --data-dir")

// StartOurs starts a cluster and connects to its leader.
func StartOurs(ctx context.Context, c Config) (_ *Ours, err error) {
	ctx, cancel := context.WithTimeout(ctx, StartTimeout)
	defer cancel()
	o := &Ours{Config: c}
	defer func() {
		if err != nil {
			o.Stop()
		}
	}()
	var members []*kvpb.Node
	var addresses []string
	for id := range uint64(c.Size) {
		n, err := o.Start(ctx, id+1, "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		members = append(members, &kvpb.Node{Id: n.ID, Address: n.Address})
		addresses = append(addresses, n.Address)
	}
	first, err := load.Dial(addresses[:1], 1, c.TLS.Admin())
	if err != nil {
		return nil, err
	}
	defer func() { _ = first[0].Close() }()
	if _, err := kvpb.NewClusterServiceClient(first[0]).Init(ctx, &kvpb.InitRequest{Members: members}); err != nil {
		return nil, fmt.Errorf("init: %w", err)
	}
	leader, err := load.Leader(ctx, addresses, c.TLS.Admin())
	if err != nil {
		return nil, err
	}
	i := slices.Index(addresses, leader)
	if i < 0 {
		return nil, fmt.Errorf("the leader is %s, which is none of the nodes", leader)
	}
	o.Leader = o.Nodes[i]
	admin, err := load.Dial([]string{leader}, 1, c.TLS.Admin())
	if err != nil {
		return nil, err
	}
	o.admin = admin[0]
	o.Admin = kvpb.NewClusterServiceClient(o.admin)
	o.KV, err = load.DialKV([]string{leader}, Connections, c.TLS.Client())
	return o, err
}

var readyLine = regexp.MustCompile(` msg=ready .*advertise=(\S+)`)

// Start starts a node, and waits until it says that it is ready and where. It
// takes the place of one with its id.
func (o *Ours) Start(ctx context.Context, id uint64, address string) (*Node, error) {
	n := &Node{ID: id, Dir: filepath.Join(o.Dir, fmt.Sprint(id)), ended: make(chan struct{})}
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		return nil, err
	}
	args := append([]string{"--id", fmt.Sprint(id), "--addr", address}, o.Args...)
	if o.Durable {
		args = append(args, "--data-dir", n.DataDir())
	}
	if as := o.TLS.Member(id); !as.IsZero() {
		args = append(args, "--cert-file", as.Cert, "--key-file", as.Key, "--trusted-ca-file", as.CA)
	}
	log, err := os.Create(n.Log())
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	n.cmd = exec.Command(o.Binary, args...)
	n.cmd.Stderr, n.cmd.Env = log, append(os.Environ(), o.Env...)
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	o.Nodes = append(slices.DeleteFunc(o.Nodes, func(old *Node) bool { return old.ID == id }), n)
	go func() { _ = n.cmd.Wait(); close(n.ended) }()
	return n, n.ready(ctx)
}

// ready waits until the node says that it is ready.
func (n *Node) ready(ctx context.Context) error {
	t := time.NewTicker(poll)
	defer t.Stop()
	for over := false; ; {
		text, err := os.ReadFile(n.Log())
		if err != nil {
			return err
		}
		if m := readyLine.FindSubmatch(text); m != nil {
			n.Address = string(m[1])
			return nil
		}
		if over && strings.Contains(string(text), "not defined: -data-dir") {
			return ErrNoDataDir
		} else if over {
			return fmt.Errorf("node %d did not start: %s", n.ID, text)
		}
		select {
		case <-n.ended:
			over = true
		case <-ctx.Done():
			return fmt.Errorf("node %d is not ready: %w\n%s", n.ID, ctx.Err(), text)
		case <-t.C:
		}
	}
}

// Settle waits until the node that is connected to leads, for which it asks,
// and all the others are connected and have caught up.
func (o *Ours) Settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	t := time.NewTicker(poll)
	defer t.Stop()
	for {
		m, err := o.Admin.Metrics(ctx, &kvpb.MetricsRequest{})
		if status.Code(err) == codes.Canceled {
			return err
		}
		if err == nil && m.Leader != nil && m.Leader.Id != o.Leader.ID {
			_, err = o.Admin.TransferLeader(ctx, &kvpb.TransferLeaderRequest{NodeId: o.Leader.ID})
		} else if err == nil && settled(m, o.Size) {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("the cluster does not settle: %w: %w, %v", ctx.Err(), err, m)
		}
	}
}

func settled(m *kvpb.MetricsResponse, size int) bool {
	return m.Role == kvpb.Role_ROLE_LEADER && !m.Joint && len(m.Members) == size && !slices.ContainsFunc(m.Members, func(s *kvpb.MemberStatus) bool {
		return !s.Voter || s.Learner || !s.Connected || !s.Progress.GetCaughtUp() && s.Node.Id != m.Node.Id
	})
}

// CPU is what all nodes have used of the processors.
func (o *Ours) CPU() (sum time.Duration, err error) {
	for _, n := range o.Nodes {
		t, err := CPU(n.PID())
		if err != nil {
			return 0, err
		}
		sum += t
	}
	return sum, nil
}

// Stop ends the nodes: they have nothing that is to be kept.
func (o *Ours) Stop() {
	if o.KV != nil {
		o.Close()
	}
	if o.admin != nil {
		_ = o.admin.Close()
	}
	for _, n := range o.Nodes {
		n.Kill()
	}
}
