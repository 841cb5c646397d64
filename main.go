// Raft-key-value is a replicated key-value store: etcd's raft library, a gRPC
// stream between each two nodes, and a map.
//
// Calls flow one way: service → node → network, log, store. What comes back
// from the network is handed to functions that the node gave it. docs/design.md
// follows one Set and one Get from end to end, and says which file is which.
//
// # Goroutines
//
//   - The loop (node.run), one a node. It alone touches the RawNode, the log,
//     the fields of node, and writes to the store. Everybody else leaves work in
//     its inbox and reads what it publishes.
//   - The writer (disk.run), one a node with a data directory: it alone touches
//     the log on disk. Beside it, one goroutine fills the log's next segment and
//     one writes a snapshot from a view (disk.start).
//   - A peer (peer.run), one for each other member, and for each stranger that has a
//     stream to this node: it keeps a stream open and sends what the loop queued. Beside it a goroutine waits for the stream's
//     end, and a timer for an answer to its hello.
//   - A dial (target.dial), in a goroutine of gRPC's, has one for each of its tries
//     to connect, which end with it, and one for a query of a name, which may go on
//     for the next dial.
//   - A hearer (network.serve), one for each stream from a peer and each
//     snapshot received: it decodes and leaves messages in the inbox, or builds
//     a new store that nobody else sees before the loop installs it.
//   - A snapshot sender (peer.sendSnapshot, or network.serve for a backup), one for
//     each snapshot on its way out: it reads a view, which nobody changes.
//   - A founder (founder.run), in the goroutine of an Init, asks several members at
//     once, each in a goroutine that ends with the request.
//   - gRPC's own: one for each call, streamWorkers of which serve the next one
//     too. A call waits in server.call or node.await, reads the store under its
//     lock, and waits in rooms for memory for its request and its answer.
//     A Pipeline's call sends answers, and a second goroutine receives.
//     Backup and Scan send in a goroutine of their own, and the view of a Backup is closed by
//     one when its call has ended.
//   - The teller (watchers.run), one a node: it passes over the events of the history,
//     and wakes the watches that they concern, each in its call.
//   - The watcher (server.watchLoop), one a node: it asks the loop once a second
//     whether it turns.
//   - The HTTP server (httpServer.start), with --http-addr: one that accepts, and one for each
//     connection, which ends with its request; and one that makes the curves of the page.
//   - The starter (starter.run), one a node: while the node is in no cluster, or with --join
//     finds no member, it does what --initial-cluster or --join says. And while a cluster in memory
//     that is half made has no leader, it asks whether that never goes on.
//   - The watcher of certificates (certificates.watch), one a node with TLS: it looks
//     once a second whether their files have changed.
//   - The one that looks at the free space of the disk, one a node with a data directory
//     (node.watchSpace).
//   - The one that gives memory back when the store has dropped much (node.collect).
//   - main and run: they wait for a signal, the loop, gRPC's Serve and its
//     GracefulStop, each in a goroutine.
//   - A sub-command asks several nodes at once, waits for stdin and stdout, and makes a
//     backup of a directory, in goroutines of its own.
//
// # Words
//
// The words are those of the Raft paper, of etcd's raft and of gRPC. Besides, this
// program has some of its own:
//
//   - A raft ID is what raft knows a member by. A node takes a new one whenever it
//     has lost its memory; the id that operators give to a node stays.
//   - A life is one process's use of a raft ID. With a data directory, a raft ID has many
//     lives; without one, it has one.
//   - A turn is one pass of the loop: input in, effects out. Draining is to handle
//     Readys until raft has none.
//   - A view is the store as of one index, which stays as it is while writes go on.
//   - A Batch is the writes of one entry; a proposal is this node's Batch in flight.
//   - A session remembers what its client's writes were answered, by request_id.
//   - A round is one ReadIndex for all reads that wait.
//   - The mark says which snapshot on disk counts: its index, term and file.
//   - The level of a cluster says what its members may write; a program speaks all levels
//     up to a highest one.
//   - A claim is what a node in no cluster promises to an Init, whose node is the
//     founder.
//   - A hint says that a peer is at another address than the configuration has. It
//     is believed once the peer answers there.
//   - Rivals are two processes that go by one raft ID: one is a copy.
//   - A witness is an entry after a configuration: whoever stores it knows that the
//     configuration is committed.
//   - A rule looks at facts (clusterState) and says the next step; the node performs it.
//   - A rebirth: the node of a member has answered under another raft ID, without memory.
//   - A principal is who somebody is, by the certificate that they show.
//   - A node is dispensable if the cluster can do without it for a restart.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"raft-key-value/kvpb"
)

//go:generate go run buf.go generate

// Together they are less than the 10 s after which Docker kills a process that was
// told to stop; systemd and Kubernetes wait longer.
const (
	stopTimeout  = 8 * time.Second // for calls to end
	flushTimeout = time.Second     // for their answers to be written
)

// ballastBytes is memory that nobody touches, so the system never provides it. The
// collector counts it as live, and lets 64 MiB more garbage gather before it starts:
// a node takes up to so much more, and a large store hardly notices. With little memory,
// there is less of it. A collection
// also shrinks the stacks of gRPC's workers, which the next call has to grow again.
//
// With 10,000 keys of 128 bytes, a node without ballast collects four times as often
// and does 0.95 times as many calls with 64 clients, 0.965 times with 256: medians of
// 246 and 244 paired ratios, 95 % intervals 0.925 to 0.996 and 0.917 to 0.996. GOGC
// does not replace it: it lets the garbage of a large store grow with the store.
const ballastBytes = 64 << 20

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(execute(ctx, os.Args[1:]))
}

// execute runs a node or a sub-command and returns the exit status.
func execute(ctx context.Context, args []string) int {
	command, err := findCommand(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "raft-key-value: %v; see raft-key-value help\n", err)
		return exitUsage
	}
	if command != nil {
		return runClient(ctx, command, os.Stdin, os.Stdout, os.Stderr)
	}
	o, err := parseOptions(args, os.Stdout, os.LookupEnv)
	if errors.Is(err, flag.ErrHelp) {
		return exitYes
	}
	if err != nil {
		for _, name := range unknownVariables(os.Environ()) {
			fmt.Fprintln(os.Stderr, "raft-key-value: warning: no flag has the environment variable "+name)
		}
		fmt.Fprintf(os.Stderr, "raft-key-value: %v; see raft-key-value --help\n", err)
		return exitUsage
	}
	if o.version {
		return runClient(ctx, []string{"version"}, os.Stdin, os.Stdout, os.Stderr)
	}
	logger := newLogger(os.Stderr, &o)
	for _, name := range unknownVariables(os.Environ()) {
		logger.Warn("no flag has this environment variable", "name", name)
	}
	o.supervisor = findSupervisor(os.LookupEnv)
	found := findMemory("/", os.LookupEnv)
	budget := budgetOf(found, &o)
	budget.apply(&o)
	budget.announce(logger, &o)
	ballast := budget.limitMemory(found)
	defer runtime.KeepAlive(ballast)
	err = run(ctx, o, logger, func(*server) {})
	if err != nil {
		logger.Error("stopped", "err", err, "start_again", exitOf(err) == exitFailed)
	} else {
		logger.Info("stopped")
	}
	return exitOf(err)
}

// run runs a node until ctx ends or the node cannot go on. It calls ready once the
// node answers calls.
func run(ctx context.Context, o options, logger *slog.Logger, ready func(*server)) error {
	if err := checkTransport(canReadRequest); err != nil {
		return err
	}
	room, err := placesOf(cmp.Or(o.files, openFiles()), o.tls.areGiven(), o.httpAddr != "")
	if err != nil {
		return err
	}
	var certificates *certificates
	if o.tls.areGiven() {
		certificates, err = openCertificates(o.tls, o.id, logger)
		if err != nil {
			return err
		}
	}
	if o.isExposed() {
		logger.Warn("there is no TLS: whoever reaches this node may read and write all, and speak as a node")
	}
	listener, err := o.listen()
	if err != nil {
		return err
	}
	self := o.self(listener)
	n := newNode(o, self, logger)
	nw := newNetwork(n, logger, o.dialer)
	nw.setLimits(&o, room.peers)
	nw.dialer.certificates = certificates
	n.net = nw
	s := newServer(n, nw, certificates)
	s.limiter = newLimiter(listener, room, certificates, logger)
	s.limiter.shrink(&o)
	web, err := startHTTP(s, &o) // before the disk: a probe may ask while that is read
	if err != nil {
		s.abandon()
		return err
	}
	defer web.stop()
	if o.durable {
		d, err := startDisk(n, &o, logger)
		if err != nil {
			s.abandon()
			return err
		}
		defer d.close()
	}

	loopContext, endLoop := context.WithCancel(context.Background())
	defer endLoop()
	loop := inBackground(func() error { return n.run(loopContext) })
	go s.watchLoop(loopContext)
	go n.collect(loopContext)
	if o.durable {
		go n.watchSpace(loopContext)
	}
	if certificates != nil {
		go certificates.watch(loopContext)
	}
	serving := inBackground(func() error { return s.grpc.Serve(s.limiter) })
	// It is logged whatever the level: scripts wait for it.
	about := []any{"addr", listener.Addr(), "advertise", self.Address, "durable", o.durable,
		"connections", room.clients, "peers", room.peers, "files", room.files}
	if web != nil {
		about = append(about, "http", web.address)
	}
	logger.Log(ctx, max(slog.LevelInfo, o.logLevel), "ready", about...)
	o.supervisor.tell(notifyReady, logger)
	if n.status.latest.Load().clusterID == 0 {
		wait := "; if it was a member of one before, wait, and do not init: that cluster takes it back by itself"
		logger.Info(cmp.Or(o.plan.String(), errNotInitialized.Error()+wait))
	}
	starting := inBackground(func() error {
		newStarter(s).run(loopContext)
		return nil
	})
	ready(s)

	var serveErr error
	select {
	case <-loop.ended:
	case <-serving.ended:
		serveErr = serving.err
	case <-ctx.Done():
		logger.Info("stopping")
		o.supervisor.tell(notifyStopping, logger)
		stop, cancel := context.WithTimeout(context.Background(), stopTimeout)
		s.stop(stop)
		cancel()
	}

	// Calls have ended, or never will. What is left are streams of peers, and answers
	// that are not written yet.
	endLoop()
	<-loop.ended
	<-starting.ended
	s.watchers.stop(s.n.inbox.whyClosed()) // a node that has failed sends them elsewhere
	nw.failed.Store(loop.err != nil)
	nw.close()
	stopServing(s.grpc)
	<-serving.ended
	return errors.Join(serveErr, loop.err)
}

// abandon ends what there is of a server that serves nothing yet.
func (s *server) abandon() {
	_ = s.limiter.Close()
	s.net.close()
	s.grpc.Stop() // ends its workers
}

// listen listens where the node is to be reached.
func (o *options) listen() (net.Listener, error) {
	if o.listener != nil {
		return o.listener, nil
	}
	return net.Listen("tcp", o.addr)
}

// self is the node as the others know it: by the host as it was given, not by what
// that means on this machine, and by the port that is listened on.
func (o *options) self(listener net.Listener) *kvpb.Node {
	host, _, _ := net.SplitHostPort(o.addr)
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return &kvpb.Node{Id: o.id, Address: cmp.Or(o.advertise, net.JoinHostPort(host, port))}
}

// startDisk opens the node's data directory, has the node take over what is there, and
// starts what writes. Whoever calls it closes the disk.
func startDisk(n *node, o *options, logger *slog.Logger) (*disk, error) {
	d, err := openDisk(osFS{}, o.dataDir, o.logBytes, logger)
	if err != nil {
		return nil, err
	}
	if err := n.open(d); err != nil {
		d.close()
		return nil, err
	}
	if err := n.heedPlan(); err != nil {
		d.close()
		return nil, err
	}
	d.start(d.run)
	return d, nil
}

// background is a function that runs in a goroutine of its own.
type background struct {
	ended chan struct{} // closed once the function has returned
	err   error         // what it has returned
}

func inBackground(f func() error) *background {
	b := &background{ended: make(chan struct{})}
	go func() {
		defer close(b.ended)
		b.err = f()
	}()
	return b
}

// stopServing lets the server write the answers to the last calls, but does not wait
// longer than flushTimeout for clients that do not take them.
func stopServing(server *grpc.Server) {
	written := inBackground(func() error {
		server.GracefulStop()
		return nil
	})
	select {
	case <-written.ended:
	case <-time.After(flushTimeout):
		server.Stop()
	}
}
