package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/load"
	"raft-key-value/kvpb"
)

// clients measures what connections and clients cost that do nothing, or harm.
func (m *memory) clients(ctx context.Context) error {
	n, err := fileLimit(m.connections)
	if err != nil {
		return err
	}
	if n < m.connections {
		fmt.Fprintf(m.stderr, "%d connections in place of %d: no more files may be open\n", n, m.connections)
	}
	o, err := cluster.StartOurs(ctx, cluster.Config{Binary: m.binary, Dir: filepath.Join(m.dir, "clients"), Size: 1})
	if err != nil {
		return err
	}
	defer o.Stop()
	large := load.Options{Keys: 1, KeySize: 16, Value: load.Value(1 << 20)}
	if err := load.Fill(ctx, o.KV, large); err != nil {
		return err
	}
	rows := [][]string{{"what a node takes more for", "RSS"}}
	fmt.Fprintf(m.stderr, "%d connections\n", n)
	each, err := m.idle(ctx, o.Leader, n)
	if err != nil {
		return err
	}
	rows = append(rows, []string{fmt.Sprintf("a connection that does nothing, of %s", load.Count(float64(n))), fmt.Sprintf("%.1f KiB", each/1024)})
	for _, clients := range []int{1, 4} {
		fmt.Fprintf(m.stderr, "%d clients that do not read\n", clients)
		most, err := m.unread(ctx, o.Leader, clients)
		if err != nil {
			return err
		}
		rows = append(rows, []string{fmt.Sprintf("%d that ask 1,000 times for a value of 1 MiB and read no answer, at most", clients), fmt.Sprintf("%.1f MiB", float64(most)/(1<<20))})
	}
	fmt.Fprintln(m.stdout)
	load.Table(m.stdout, rows)
	return nil
}

// fileLimit has this process and its children open n files and some more, and
// says how many of the n they may.
func fileLimit(n int) (int, error) {
	const more = 200
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, err
	}
	need := uint64(n + more)
	if l.Cur >= need {
		return n, nil
	}
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: need, Max: max(need, l.Max)}) == nil {
		return n, nil
	}
	if l.Max <= more {
		return 0, fmt.Errorf("no more than %d files may be open", l.Max)
	}
	return min(n, int(l.Max-more)), nil
}

// idle makes connections that do nothing, and says what a node takes for each.
func (m *memory) idle(ctx context.Context, node *cluster.Node, n int) (float64, error) {
	load.Wait(ctx, m.pause)
	before, err := cluster.MemoryOf(node.PID())
	if err != nil {
		return 0, err
	}
	conns, errs := make([]net.Conn, n), make([]error, n)
	var wg sync.WaitGroup
	turns := make(chan struct{}, 64)
	for i := range n {
		turns <- struct{}{}
		wg.Go(func() {
			conns[i], _, errs[i] = dial(ctx, node.Address)
			<-turns
		})
	}
	wg.Wait()
	defer func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
	}()
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	load.Wait(ctx, m.pause)
	after, err := cluster.MemoryOf(node.PID())
	return float64(after.RSS-before.RSS) / float64(n), err
}

// dial makes a connection as a gRPC client does, up to its first call.
func dial(ctx context.Context, address string) (conn net.Conn, f *http2.Framer, err error) {
	var d net.Dialer
	if conn, err = d.DialContext(ctx, "tcp", address); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return nil, nil, err
	}
	f = http2.NewFramer(conn, conn)
	if err := f.WriteSettings(); err != nil {
		return nil, nil, err
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return nil, nil, err
		}
		if s, ok := frame.(*http2.SettingsFrame); ok && !s.IsAck() {
			return conn, f, f.WriteSettingsAck()
		}
	}
}

// unread has clients call for large values and not read what they get, and says
// how much more memory a node takes meanwhile, at most.
func (m *memory) unread(ctx context.Context, node *cluster.Node, clients int) (most int64, err error) {
	load.Wait(ctx, m.pause)
	before, err := cluster.MemoryOf(node.PID())
	if err != nil {
		return 0, err
	}
	req, err := proto.Marshal(&kvpb.GetRequest{Key: load.Key(0, 16)})
	if err != nil {
		return 0, err
	}
	for range clients {
		conn, f, err := dial(ctx, node.Address)
		if err != nil {
			return 0, err
		}
		defer func() { _ = conn.Close() }()
		for i := range uint32(1000) {
			if get(f, 2*i+1, req) != nil {
				break // the node has closed the connection, as it may
			}
		}
	}
	for end := time.Now().Add(max(m.pause, time.Second)); time.Now().Before(end) && ctx.Err() == nil; load.Wait(ctx, 10*time.Millisecond) {
		now, err := cluster.MemoryOf(node.PID())
		if err != nil {
			return 0, err
		}
		most = max(most, now.RSS-before.RSS)
	}
	return most, ctx.Err()
}

// get calls Get.
func get(f *http2.Framer, stream uint32, req []byte) error {
	var head bytes.Buffer
	h := hpack.NewEncoder(&head)
	h.SetMaxDynamicTableSize(0) // so that each is by itself
	for _, field := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", kvpb.KVService_Get_FullMethodName}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		if err := h.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]}); err != nil {
			return err
		}
	}
	if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: head.Bytes(), EndHeaders: true}); err != nil {
		return err
	}
	return f.WriteData(stream, true, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(req))), req...))
}
