// Tests of handshakes.go: connections that begin, and those that end.

package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// TestHandshakesYield: of the connections whose handshake is unfinished, the oldest yields
// when there are too many; but one from a host of nodes only to another one from there.
func TestHandshakesYield(t *testing.T) {
	h := handshakes{limit: 4}
	conns := make([]*limitedConn, 6)
	for i := range conns {
		conns[i] = &limitedConn{}
	}
	peer := &limitedConn{}
	if h.add(peer, true) != nil {
		t.Error("somebody yields to the first one")
	}
	var yielded []*limitedConn
	for _, c := range conns {
		if y := h.add(c, false); y != nil {
			yielded = append(yielded, y)
		}
	}
	for i, y := range yielded {
		if y != conns[i] {
			t.Errorf("%d yields in another order", i)
		}
	}
	if len(yielded) != 4 {
		t.Errorf("%d have yielded", len(yielded))
	}
	if !h.remove(peer) || !h.remove(conns[5]) || h.remove(conns[0]) {
		t.Error("it does not know whom it has")
	}
	more := []*limitedConn{{}, {}, {}}
	for i, c := range more {
		y := h.add(c, true)
		if (y != nil) != (i == 2) {
			t.Errorf("host of a node, %d: %v", i, y != nil)
		}
	}
}

// TestNodeHosts: the hosts of nodes are remembered, as many as there may be members.
func TestNodeHosts(t *testing.T) {
	var h nodeHosts
	host := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	for i := range 2 * maxNodeHosts {
		h.add(host(i))
	}
	if len(h.seen) > maxNodeHosts || !h.has(host(2*maxNodeHosts-1)) || h.has(netip.Addr{}) {
		t.Errorf("%d hosts", len(h.seen))
	}
}

// flood opens connections from a host until stop is called, and says nothing on them.
func flood(t *testing.T, from, address string) (opened *atomic.Int64, stop func()) {
	opened = new(atomic.Int64)
	ctx, cancel := context.WithCancel(t.Context())
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	var floods sync.WaitGroup
	for range 4 {
		floods.Go(func() {
			var open []net.Conn
			for ctx.Err() == nil {
				conn, err := dialer.DialContext(ctx, "tcp", address)
				if err != nil {
					continue
				}
				opened.Add(1)
				open = append(open, conn)
				if len(open) > 100 {
					_ = open[0].Close()
					open = open[1:]
				}
			}
			for _, conn := range open {
				_ = conn.Close()
			}
		})
	}
	return opened, func() { cancel(); floods.Wait() }
}

// TestHandshakeFlood: during a flood of connections that never shake hands, from elsewhere,
// a node that restarts is connected again.
func TestHandshakeFlood(t *testing.T) {
	t.Parallel()
	c := newSecureCluster(t, 3)
	c.init(1, 2, 3)
	c.settled(1, 2, 3)
	opened, stop := flood(t, "127.0.0.2", c.nodes[1].address)
	defer stop()
	eventually(t, func() error {
		if opened.Load() < 2*maxHandshakes {
			return fmt.Errorf("%d connections", opened.Load())
		}
		return nil
	})
	began := time.Now()
	c.restart(2)
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
	t.Logf("node 2 was back after %v, beside %d connections", time.Since(began), opened.Load())
	m, err := c.metrics(1)
	if err != nil {
		t.Fatal(err)
	}
	if m.HandshakesFailed == 0 {
		t.Error("no failed handshake is counted")
	}
}

// TestHandshakesEndWithTheListener: connections whose handshake is unfinished do not keep a
// node that stops, however silent they are.
func TestHandshakesEndWithTheListener(t *testing.T) {
	t.Parallel()
	l := newLimiter(&refusing{}, places{handshakes: 4}, &certificates{}, quiet())
	here, there := net.Pipe()
	l.beginHandshake(&limitedConn{Conn: here, l: l})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_ = there.SetReadDeadline(time.Now().Add(rpcTimeout))
	if _, err := there.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("it is open: %v", err)
	}
}

// TestHandshakeBytes: who has not shown who they are is read no further than that takes.
func TestHandshakeBytes(t *testing.T) {
	t.Parallel()
	here, there := net.Pipe()
	defer func() { _ = here.Close() }()
	h := &handshakeConn{Conn: here, left: 10}
	go func() { // ends with the pipe
		defer func() { _ = there.Close() }()
		_, _ = there.Write(make([]byte, 15))
	}()
	for _, want := range []int{8, 2} {
		if n, err := h.Read(make([]byte, 8)); n != want || err != nil {
			t.Errorf("%d bytes, want %d: %v", n, want, err)
		}
	}
	if n, err := h.Read(make([]byte, 8)); n != 0 || err != errLongHandshake {
		t.Errorf("%d bytes beyond the limit: %v", n, err)
	}
	h.isDone = true
	if n, err := h.Read(make([]byte, 8)); n != 5 || err != nil {
		t.Errorf("%d bytes behind the handshake, want 5: %v", n, err)
	}
}

// TestLargeCertificates: a stranger's certificate that is too large is not read to its end,
// and the log has little of the names in one.
func TestLargeCertificates(t *testing.T) {
	t.Parallel()
	log := &sharedLog{}
	c := newCluster(t, 0)
	var ca *authority
	c.pki, ca = testPKI(t, 1)
	c.log = log
	n := c.start(1, "127.0.0.1:0")
	refused := func(want string) {
		t.Helper()
		eventually(t, func() error { // it is a line a second at most
			err := refusedBy(t, n.address, uncheckedCredentials(t, c.pki, "large"))
			if status.Code(err) != codes.Unavailable {
				t.Fatalf("it is answered: %v", err)
			}
			if !strings.Contains(log.String(), want) {
				return fmt.Errorf("the log lacks %q", want)
			}
			return nil
		})
	}
	long := strings.Repeat("n", maxHandshakeBytes)
	testCertificate(t, ca, c.pki, "large", "admin", func(x *x509.Certificate) { x.Subject.CommonName = long })
	refused(errLongHandshake.Error())

	// The error names the CA that stands behind the certificate, whose name is right and whose
	// key is not.
	var namesakes []*authority
	for range 2 {
		a, err := newAuthority(long[:10_000], always)
		if err != nil {
			t.Fatal(err)
		}
		namesakes = append(namesakes, a)
	}
	testCertificate(t, namesakes[0], c.pki, "large", "admin", nil)
	file := filepath.Join(c.pki, "large.pem")
	own, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	testFile(t, file, append(own, encodeCertificate(namesakes[1].certificate.Raw)...))
	refused("possibly because of")
	for line := range strings.Lines(log.String()) {
		if len(line) > 3*maxLoggedError {
			t.Errorf("a line has %d bytes: %.200s", len(line), line)
		}
	}
}

// TestPlacesByRole: nodes do not take the places of clients, nor clients those of nodes.
func TestPlacesByRole(t *testing.T) {
	l := newLimiter(&refusing{}, places{clients: 1, peers: 1, handshakes: 4}, &certificates{}, quiet())
	node := principal{role: roleNode, node: 2}
	client := principal{role: roleClient}
	take := func(who principal) (*limitedConn, error) {
		conn, _ := net.Pipe()
		c := &limitedConn{Conn: conn, l: l, who: who, unheardAt: time.Now()}
		l.mu.Lock()
		defer l.mu.Unlock()
		return c, l.takeAs(c, who)
	}
	for i, tt := range []struct {
		who  principal
		want error
	}{{client, nil}, {client, errNoPlace}, {node, nil}, {node, nil}, {node, nil}, {client, errNoPlace}} {
		if _, err := take(tt.who); err != tt.want {
			t.Errorf("%d: %v as %v", i, err, tt.who)
		}
	}
	if len(l.kept) != peerConnections || len(l.conns) != peerConnections+1 {
		t.Errorf("%d connections, %d of nodes", len(l.conns), len(l.kept))
	}
	l.mu.Lock()
	for c := range l.kept {
		c.streams = 1
	}
	l.mu.Unlock()
	if _, err := take(node); err != errNodePlaces {
		t.Errorf("a node takes the place of a peer that is heard: %v", err)
	}
}

// TestConnectionEnds: a connection ends when a certificate of either end does, even if a
// stream is open on it.
func TestConnectionEnds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	var ca *authority
	c.pki, ca = testPKI(t, 1)
	n := c.start(1, "127.0.0.1:0")
	c.init(1)
	c.settled(1)
	ends := time.Now().Add(10 * time.Second).Truncate(time.Second) // certificates have no fractions
	testCertificate(t, ca, c.pki, "short", "client/short", func(x *x509.Certificate) { x.NotAfter = ends })
	conn := dialNode(t, n.address, testCredentials(t, c.pki, "short", n.address))
	defer func() { _ = conn.Close() }()
	s, err := kvpb.NewKVServiceClient(conn).Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exchange(s, getOp("k", false)); err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv() // nothing is sent, so nothing comes, until the connection ends
	if status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ends with %v", err)
	}
	if time.Now().Before(ends) {
		t.Error("it has ended before its certificate")
	}
}

// TestRevoked: when the CA that vouched for a connection is taken out of the file, the
// connection ends, and its streams; others stay.
func TestRevoked(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0)
	c.pki, _ = testPKI(t, 1)
	old := testAuthority(t, c.pki, "old")
	testCertificate(t, old, c.pki, "eve", "client/eve", nil)
	file := filepath.Join(c.pki, "ca.pem")
	present, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	testFile(t, file, append(encodeCertificate(old.certificate.Raw), present...))
	n := c.start(1, "127.0.0.1:0")
	c.init(1)
	c.settled(1)
	eve := dialNode(t, n.address, testCredentials(t, c.pki, "eve", n.address))
	defer func() { _ = eve.Close() }()
	s, err := kvpb.NewKVServiceClient(eve).Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exchange(s, setOp("k", "v")); err != nil {
		t.Fatal(err)
	}
	stays, err := n.Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	testFile(t, file, present)
	if _, err := s.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ends with %v", err)
	}
	if results, err := exchange(stays, getOp("k", false)); err != nil || string(results[0].GetGet().GetValue()) != "v" {
		t.Errorf("another's stream: %v, %v", results, err)
	}
	if err := refusedBy(t, n.address, uncheckedCredentials(t, c.pki, "eve")); status.Code(err) != codes.Unavailable {
		t.Errorf("it is back: %v", err)
	}
}

// TestRotation: certificates, and then the CA, are replaced under load, and no call fails.
func TestRotation(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 0, steady)
	var ca *authority
	c.pki, ca = testPKI(t, 3)
	for id := range uint64(3) {
		c.start(id+1, "127.0.0.1:0")
	}
	c.init(1, 2, 3)
	c.settled(1, 2, 3)
	ctx, cancel := context.WithCancel(c.ctx)
	var clients sync.WaitGroup
	var calls atomic.Int64
	var all []*certificates
	for _, n := range c.nodes {
		all = append(all, n.server.certificates)
	}
	for id := range uint64(3) {
		address := c.nodes[id+1].address
		by := testCredentials(t, c.pki, "client", address)
		files := by.(*dialCredentials).certificates
		all = append(all, files)
		clients.Go(func() { files.watch(ctx) }) // a client that outlives its certificate
		clients.Go(func() {
			for ctx.Err() == nil {
				conn := dialNode(t, address, by)
				kv := kvpb.NewKVServiceClient(conn)
				for range 10 {
					_, err := kv.Set(ctx, &kvpb.SetRequest{Key: fmt.Sprint("k", id), Value: []byte("v")})
					if err != nil && ctx.Err() == nil {
						t.Errorf("call %d fails: %v", calls.Load(), err)
					}
					calls.Add(1)
				}
				_ = conn.Close()
			}
		})
	}
	issueAll := func(by *authority) {
		for id := range 3 {
			testCertificate(t, by, c.pki, fmt.Sprintf("node%d", id+1), fmt.Sprintf("node/%d", id+1), nil)
		}
		for _, who := range []string{"admin", "client", "reader"} {
			testCertificate(t, by, c.pki, who, who, nil)
		}
	}
	allRead := func(has func(*keyring) bool) {
		t.Helper()
		eventually(t, func() error {
			for _, files := range all {
				if !has(files.latest()) {
					return fmt.Errorf("%s has not been read again", files.files.cert)
				}
			}
			return nil
		})
	}
	signedBy := func(a *authority) func(*keyring) bool {
		return func(k *keyring) bool { return k.own.Leaf.CheckSignatureFrom(a.certificate) == nil }
	}
	var firsts []*x509.Certificate
	for _, files := range all {
		firsts = append(firsts, files.latest().own.Leaf)
	}
	issueAll(ca)
	allRead(func(k *keyring) bool { return !slices.ContainsFunc(firsts, k.own.Leaf.Equal) })

	// Another CA: all trust both, then all get certificates of the new one, then none
	// trusts the old one.
	next := testAuthority(t, c.pki, "next")
	oldPEM, newPEM := encodeCertificate(ca.certificate.Raw), encodeCertificate(next.certificate.Raw)
	testFile(t, filepath.Join(c.pki, "ca.pem"), append(oldPEM, newPEM...))
	allRead(func(k *keyring) bool { return k.clients.Equal(poolOf(ca, next)) })
	issueAll(next)
	allRead(signedBy(next))
	c.settled(1, 2, 3)
	if calls.Load() == 0 {
		t.Error("no call was made")
	}
	cancel()
	clients.Wait()
	all = all[:len(c.nodes)]
	testFile(t, filepath.Join(c.pki, "ca.pem"), newPEM)
	allRead(func(k *keyring) bool { return k.clients.Equal(poolOf(next)) })
	for _, n := range c.nodes { // whose connection to the test has an old certificate
		_ = n.conn.Close()
		n.conn = dialNode(t, n.address, testCredentials(t, c.pki, "admin", n.address))
		n.KVServiceClient, n.ClusterServiceClient = kvpb.NewKVServiceClient(n.conn), kvpb.NewClusterServiceClient(n.conn)
	}
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
}

func poolOf(authorities ...*authority) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, a := range authorities {
		pool.AddCert(a.certificate)
	}
	return pool
}
