package load

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"

	"raft-key-value/kvpb"
)

// echo answers the messages of a node, and does nothing: bare RPC.
type echo struct {
	kvpb.UnimplementedKVServiceServer
	value []byte
}

func (e *echo) Set(context.Context, *kvpb.SetRequest) (*kvpb.SetResponse, error) {
	return &kvpb.SetResponse{Version: 1}, nil
}

func (e *echo) Get(context.Context, *kvpb.GetRequest) (*kvpb.GetResponse, error) {
	return &kvpb.GetResponse{Value: e.value, Version: 1}, nil
}

func (e *echo) OpenSession(context.Context, *kvpb.OpenSessionRequest) (*kvpb.OpenSessionResponse, error) {
	return &kvpb.OpenSessionResponse{Session: 1 << 62}, nil // as long as those of nodes are
}

// newEcho is a server with gRPC's stock settings.
func newEcho(valueSize int, as Identity) (*grpc.Server, error) {
	transport, err := as.credentials()
	if err != nil {
		return nil, err
	}
	s := grpc.NewServer(grpc.Creds(transport))
	kvpb.RegisterKVServiceServer(s, &echo{value: Value(valueSize)})
	return s, nil
}

// Value is a value of size bytes.
func Value(size int) []byte {
	return slices.Repeat([]byte("v"), size)
}

// echoCommand is the hidden sub-command of the programs that use StartEcho: the size of a
// value, and the files of the identity, which are empty without TLS.
const echoCommand = "serve-echo"

// ServeEcho serves as the echo process if args say that this is one.
func ServeEcho(args []string) (served bool, err error) {
	if len(args) != 5 || args[0] != echoCommand {
		return false, nil
	}
	size, err := strconv.Atoi(args[1])
	if err != nil {
		return true, err
	}
	rpc, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return true, err
	}
	bare, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return true, err
	}
	server, err := newEcho(size, Identity{Cert: args[2], Key: args[3], CA: args[4]})
	if err != nil {
		return true, err
	}
	go func() { _ = server.Serve(rpc) }()
	go echoBytes(bare)
	ServeUntilParentEnds(rpc.Addr(), bare.Addr())
	return true, nil
}

// echoBytes sends back what it receives.
func echoBytes(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { _, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}); _ = c.Close() }()
	}
}

// ServeUntilParentEnds tells the parent what it waits for, and returns once
// the parent closes this process's stdin, or has died.
func ServeUntilParentEnds(ready ...any) {
	signal.Ignore(os.Interrupt) // Ctrl-C reaches all processes: the parent ends this one
	fmt.Println(ready...)
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// Child is this program again, in a process of its own.
type Child struct {
	cmd   *exec.Cmd
	stdin io.Closer
	Ready []string // what it said when it was ready
}

// StartSelf starts this program with a sub-command that ends in
// ServeUntilParentEnds, and waits until it is ready.
func StartSelf(stderr io.Writer, args ...string) (*Child, error) {
	path, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &Child{cmd: exec.Command(path, args...)}
	c.cmd.Stderr = stderr
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	late := time.AfterFunc(30*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer late.Stop()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		c.Stop()
		return nil, fmt.Errorf("%s did not start: %w", args[0], err)
	}
	c.Ready = strings.Fields(line)
	return c, nil
}

// PID is the process's.
func (c *Child) PID() int { return c.cmd.Process.Pid }

// Stop ends the process and waits for it.
func (c *Child) Stop() {
	_ = c.stdin.Close()
	late := time.AfterFunc(5*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer late.Stop()
	_ = c.cmd.Wait()
}

// Echo is the echo process: its gRPC server, and one that echoes bytes.
type Echo struct {
	*Child
	RPC, Bytes string
}

// StartEcho starts the echo process. Its bytes go without TLS in any case.
func StartEcho(valueSize int, as Identity) (*Echo, error) {
	c, err := StartSelf(os.Stderr, echoCommand, strconv.Itoa(valueSize), as.Cert, as.Key, as.CA)
	if err != nil {
		return nil, err
	}
	if len(c.Ready) != 2 {
		c.Stop()
		return nil, fmt.Errorf("the echo process said %q", c.Ready)
	}
	return &Echo{c, c.Ready[0], c.Ready[1]}, nil
}

// PingPong is the median time of a byte to the process and back over TCP.
func (e *Echo) PingPong() (time.Duration, error) { return pingPong(e.Bytes) }

func pingPong(address string) (time.Duration, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(grace))
	var b [1]byte
	times := make([]time.Duration, 2000)
	for i := range times {
		start := time.Now()
		if _, err := c.Write(b[:]); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return 0, err
		}
		times[i] = time.Since(start)
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}
