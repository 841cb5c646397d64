// Tests of certificates.go and handshakes.go: who may connect to whom, and until when.

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"raft-key-value/kvpb"
)

// always is valid in the year 2000, too, in which the fake clock begins.
var always = validity{time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2090, 1, 1, 0, 0, 0, 0, time.UTC)}

// testAuthority makes a CA whose certificate is a file.
func testAuthority(t testing.TB, dir, name string) *authority {
	t.Helper()
	a, err := newAuthority(name, always)
	if err != nil {
		t.Fatal(err)
	}
	testFile(t, filepath.Join(dir, name+".pem"), encodeCertificate(a.certificate.Raw))
	return a
}

func testFile(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// testCertificate makes a principal's certificate and key, two files. change makes of it
// what is wrong with it; nil: nothing is.
func testCertificate(t testing.TB, a *authority, dir, name, who string, change func(*x509.Certificate)) {
	t.Helper()
	p, err := parsePrincipal(principalScheme + ":" + who)
	if err != nil {
		t.Fatal(err)
	}
	template := p.template([]string{"127.0.0.1", "127.0.0.2", "localhost"}, always)
	if p.role == roleNode {
		template.DNSNames = append(template.DNSNames, fmt.Sprintf("node%d", p.node)) // in a bubble
	}
	if change != nil {
		change(template)
	}
	certificate, key, err := a.issue(template)
	if err != nil {
		t.Fatal(err)
	}
	testFile(t, filepath.Join(dir, name+".pem"), certificate)
	testFile(t, filepath.Join(dir, name+".key"), key)
}

// testPKI makes a directory with a CA, ca.pem, and certificates of nodes 1 to n, node1.pem
// and so on, and of an admin, a client and a reader.
func testPKI(t testing.TB, n uint64) (dir string, ca *authority) {
	t.Helper()
	dir = t.TempDir()
	ca = testAuthority(t, dir, "ca")
	for id := range n {
		testCertificate(t, ca, dir, fmt.Sprintf("node%d", id+1), fmt.Sprintf("node/%d", id+1), nil)
	}
	for _, who := range []string{"admin", "client", "reader"} {
		testCertificate(t, ca, dir, who, who, nil)
	}
	return dir, ca
}

// testFiles are the files of a certificate in a directory of testPKI.
func testFiles(dir, name string) certificateFiles {
	return certificateFiles{
		cert:      filepath.Join(dir, name+".pem"),
		key:       filepath.Join(dir, name+".key"),
		trustedCA: filepath.Join(dir, "ca.pem"),
	}
}

// testCredentials are those of a call to any node at an address, by a certificate in a
// directory of testPKI; without a directory, there is no TLS.
func testCredentials(t testing.TB, dir, name, address string) credentials.TransportCredentials {
	t.Helper()
	if dir == "" {
		return insecure.NewCredentials()
	}
	c, err := openCertificates(testFiles(dir, name), 0, quiet())
	if err != nil {
		t.Fatal(err)
	}
	host, _, _ := net.SplitHostPort(address)
	return &dialCredentials{certificates: c, host: host}
}

// newSecureCluster is newCluster over TLS.
func newSecureCluster(t *testing.T, n uint64, set ...func(*options)) *testCluster {
	t.Helper()
	c := newCluster(t, 0, set...)
	c.pki, _ = testPKI(t, n)
	for id := range n {
		c.start(id+1, "127.0.0.1:0")
	}
	return c
}

// TestSecureCluster: all that nodes say to each other goes over TLS: a cluster is made,
// requests are forwarded, a snapshot is sent, a node restarts.
func TestSecureCluster(t *testing.T) {
	t.Parallel()
	c := newSecureCluster(t, 3)
	c.init(1, 2)
	leader := c.settled(1, 2)
	follower := 3 - leader
	c.set(follower, "k", strings.Repeat("v", 2*maxHandshakeBytes)) // a bound of handshakes only
	c.addLearner(follower, 3)
	c.change(follower, &kvpb.ChangeMembershipRequest{Members: []uint64{1, 2, 3}})
	c.settled(1, 2, 3)
	c.restart(follower)
	c.settled(1, 2, 3)
	c.works(1, 2, 3)
	m, err := c.metrics(leader)
	if err != nil {
		t.Fatal(err)
	}
	if m.CertificateNotAfter != always.until.Unix() {
		t.Errorf("the certificate ends at %d, says the node", m.CertificateNotAfter)
	}
}

// refusedBy calls a node with some credentials, and returns why it is not answered.
func refusedBy(t *testing.T, address string, by credentials.TransportCredentials) error {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(by), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), rpcTimeout)
	defer cancel()
	_, err = kvpb.NewClusterServiceClient(conn).Metrics(ctx, &kvpb.MetricsRequest{})
	return err
}

// TestCertificatesOfCallers: a node refuses whoever does not show a certificate that is as
// it has to be, and says why in its log.
func TestCertificatesOfCallers(t *testing.T) {
	t.Parallel()
	log := &sharedLog{}
	c := newCluster(t, 0)
	var ca *authority
	c.pki, ca = testPKI(t, 1)
	c.log = log
	n := c.start(1, "127.0.0.1:0")
	other := testAuthority(t, c.pki, "other")
	for name, tt := range map[string]struct {
		by     *authority
		change func(*x509.Certificate)
		log    string
	}{
		"expired":       {ca, func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Hour) }, "expired"},
		"not yet valid": {ca, func(x *x509.Certificate) { x.NotBefore = time.Now().Add(time.Hour) }, "not yet valid"},
		"foreign":       {other, nil, "unknown authority"},
		"wrong usage": {ca, func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
			"incompatible key usage"},
		"no URI":   {ca, func(x *x509.Certificate) { x.URIs = nil }, "0 URIs"},
		"two URIs": {ca, func(x *x509.Certificate) { x.URIs = append(x.URIs, x.URIs[0]) }, "2 URIs"},
		"of nobody": {ca, func(x *x509.Certificate) {
			wrong := *x.URIs[0]
			wrong.Opaque = "king"
			x.URIs[0] = &wrong
		}, "none of rkv:node/ID"},
	} {
		t.Run(name, func(t *testing.T) {
			testCertificate(t, tt.by, c.pki, "bad", "admin", tt.change)
			err := refusedBy(t, n.address, uncheckedCredentials(t, c.pki, "bad"))
			if status.Code(err) != codes.Unavailable {
				t.Errorf("it is answered: %v", err)
			}
			eventually(t, func() error { // it is a line a second at most
				_ = refusedBy(t, n.address, uncheckedCredentials(t, c.pki, "bad"))
				if !strings.Contains(log.String(), tt.log) {
					return fmt.Errorf("the log lacks %q:\n%s", tt.log, log.String())
				}
				return nil
			})
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		pool := x509.NewCertPool()
		pool.AddCert(ca.certificate)
		if err := refusedBy(t, n.address, credentials.NewClientTLSFromCert(pool, "")); status.Code(err) != codes.Unavailable {
			t.Errorf("it is answered: %v", err)
		}
	})
	t.Run("no TLS", func(t *testing.T) {
		if err := refusedBy(t, n.address, insecure.NewCredentials()); status.Code(err) != codes.Unavailable {
			t.Errorf("it is answered: %v", err)
		}
	})
	if err := refusedBy(t, n.address, testCredentials(t, c.pki, "reader", n.address)); err != nil {
		t.Errorf("a reader is refused: %v", err)
	}
}

// uncheckedCredentials show a certificate that openCertificates would refuse.
func uncheckedCredentials(t *testing.T, dir, name string) credentials.TransportCredentials {
	t.Helper()
	by := testCredentials(t, dir, "client", "127.0.0.1:1").(*dialCredentials)
	pair, err := loadPair(testFiles(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	k := *by.current.Load()
	k.own = pair
	k.until = always.until
	by.current.Store(&k)
	return by
}

// TestCertificatesOfNodes: whoever dials a node refuses any other answerer.
func TestCertificatesOfNodes(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 2)
	other := testAuthority(t, dir, "other")
	for name, tt := range map[string]struct {
		by     *authority
		who    string
		change func(*x509.Certificate)
		node   uint64 // that is dialled; 0: any, at 127.0.0.1
		want   string // part of the error; empty: it is accepted
	}{
		"as dialled":      {ca, "node/2", nil, 2, ""},
		"any node":        {ca, "node/2", nil, 0, ""},
		"another node":    {ca, "node/2", nil, 3, "of node/2, and node/3 was called"},
		"a client":        {ca, "client", asServer, 0, "of client, and of no node"},
		"an admin":        {ca, "admin", asServer, 2, "of admin, and of no node"},
		"foreign":         {other, "node/2", nil, 2, "unknown authority"},
		"expired":         {ca, "node/2", func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Hour) }, 2, "expired"},
		"wrong usage":     {ca, "node/2", func(x *x509.Certificate) { x.ExtKeyUsage = x.ExtKeyUsage[:1] }, 2, "incompatible key usage"},
		"no URI":          {ca, "node/2", func(x *x509.Certificate) { x.URIs = nil }, 0, "0 URIs"},
		"wrong host":      {ca, "node/2", elsewhere, 0, "127.0.0.1"},
		"node, elsewhere": {ca, "node/2", elsewhere, 2, ""},
	} {
		t.Run(name, func(t *testing.T) {
			testCertificate(t, tt.by, dir, "shown", tt.who, tt.change)
			pair, err := loadPair(testFiles(dir, "shown"))
			if err != nil {
				t.Fatal(err)
			}
			c, err := openCertificates(testFiles(dir, "client"), 0, quiet())
			if err != nil {
				t.Fatal(err)
			}
			d := &dialCredentials{certificates: c, node: tt.node, host: "127.0.0.1"}
			err = shakeHandsWith(t, pair, d)
			if tt.want == "" && err != nil {
				t.Error(err)
			}
			if tt.want != "" {
				wantPart(t, fmt.Sprint(err), tt.want)
			}
		})
	}
}

// TestHostOfCertificate: a command looks for the host of its address in the certificate, without
// the zone, which is this machine's own.
func TestHostOfCertificate(t *testing.T) {
	for address, want := range map[string]string{
		"db.example:21001":     "db.example",
		"[::1]:21001":          "::1",
		"[fe80::1%eth0]:21001": "fe80::1",
		"127.0.0.1:21001":      "127.0.0.1",
	} {
		d := &dialer{certificates: &certificates{}}
		wantText(t, address, d.credentials(&kvpb.Node{Address: address}).(*dialCredentials).host, want)
	}
}

func asServer(x *x509.Certificate) { x.ExtKeyUsage = append(x.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }

// elsewhere is a certificate for another host.
func elsewhere(x *x509.Certificate) {
	x.IPAddresses = nil
	x.DNSNames = []string{"db.example"}
}

// TestPeerCA: with a CA of their own for nodes, a node's certificate that the other CA has
// signed is none; and the other way round.
func TestPeerCA(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 1)
	peers := testAuthority(t, dir, "peers")
	testCertificate(t, peers, dir, "node1", "node/1", nil)
	testCertificate(t, ca, dir, "impostor", "node/1", nil)
	testCertificate(t, peers, dir, "eve", "admin/eve", nil)
	files := testFiles(dir, "node1")
	files.peerCA = filepath.Join(dir, "peers.pem")
	c, err := openCertificates(files, 1, quiet())
	if err != nil {
		t.Fatal(err)
	}
	k := c.latest()
	for name, isAccepted := range map[string]bool{"node1": true, "admin": true, "impostor": false, "eve": false} {
		pair, err := loadPair(testFiles(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		chain := []*x509.Certificate{pair.Leaf}
		if _, err := k.verify(chain, x509.ExtKeyUsageClientAuth); (err == nil) != isAccepted {
			t.Errorf("%s: %v", name, err)
		}
	}
	files.cert = filepath.Join(dir, "impostor.pem")
	files.key = filepath.Join(dir, "impostor.key")
	if _, err := openCertificates(files, 1, quiet()); err == nil {
		t.Error("a node starts with a certificate that the others do not accept")
	}
}

// TestOwnCertificate: a node does not start with a certificate that nobody would accept.
func TestOwnCertificate(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 2)
	other := testAuthority(t, dir, "other")
	for name, tt := range map[string]struct {
		by     *authority
		who    string
		change func(*x509.Certificate)
		want   string
	}{
		"another node": {ca, "node/2", nil, "is of node/2, this is node/1"},
		"an admin":     {ca, "admin", asServer, "is of admin, this is node/1"},
		"expired":      {ca, "node/1", func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Hour) }, "expired"},
		"foreign":      {other, "node/1", nil, "unknown authority"},
		"no server":    {ca, "node/1", func(x *x509.Certificate) { x.ExtKeyUsage = x.ExtKeyUsage[:1] }, "serverAuth and clientAuth"},
		"no client":    {ca, "node/1", func(x *x509.Certificate) { x.ExtKeyUsage = x.ExtKeyUsage[1:] }, "serverAuth and clientAuth"},
		"no URI":       {ca, "node/1", func(x *x509.Certificate) { x.URIs = nil }, "0 URIs"},
	} {
		testCertificate(t, tt.by, dir, "own", tt.who, tt.change)
		_, err := openCertificates(testFiles(dir, "own"), 1, quiet())
		if err == nil {
			t.Errorf("%s: it starts", name)
			continue
		}
		wantPart(t, err.Error(), tt.want)
	}
	for want, spoil := range map[string]func(*certificateFiles){
		"does not match": func(f *certificateFiles) { f.key = filepath.Join(dir, "node2.key") },
		"no such file":   func(f *certificateFiles) { f.cert = filepath.Join(dir, "none.pem") },
		"is a directory": func(f *certificateFiles) { f.trustedCA = dir },
	} {
		files := testFiles(dir, "node1")
		spoil(&files)
		_, err := openCertificates(files, 1, quiet())
		wantPart(t, fmt.Sprint(err), want)
	}
}

// TestCAFiles: a file of CAs is taken as a whole, or not at all.
func TestCAFiles(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 1)
	own := encodeCertificate(ca.certificate.Raw)
	other := encodeCertificate(testAuthority(t, dir, "other").certificate.Raw)
	key, err := encodeKey(ca.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		content []byte
		want    string // part of the error; empty: it is taken
	}{
		"two":           {slices.Concat([]byte("# both\n"), own, []byte("\n"), other), ""},
		"none":          {[]byte("# none\n"), "there is no certificate in it"},
		"half written":  {slices.Concat(own, other[:len(other)/2]), "of its 2 certificates, only 1 are whole"},
		"damaged":       {slices.Concat(own, bytes.Replace(other, []byte("\nM"), []byte("\n!"), 1), own), "of its 3 certificates, only 2"},
		"no DER":        {slices.Concat(own, encodeCertificate([]byte("x"))), "malformed"},
		"a key, too":    {slices.Concat(own, key), "there is a PRIVATE KEY in it"},
		"without limit": {slices.Concat(own, bytes.Repeat([]byte("\n"), maxCertificateFile)), "more than 1048576 bytes"},
	} {
		files := testFiles(dir, "node1")
		files.trustedCA = filepath.Join(dir, "tried.pem")
		testFile(t, files.trustedCA, tt.content)
		_, err := openCertificates(files, 1, quiet())
		if tt.want == "" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if tt.want != "" {
			wantPart(t, fmt.Sprint(err), tt.want)
		}
	}
}

// TestCertificatesBehindTheOwn: what stands behind a command's certificate is for the nodes
// to check: that one of them has ended says nothing.
func TestCertificatesBehindTheOwn(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 0)
	testCertificate(t, ca, dir, "ended", "client", func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Hour) })
	if _, err := openCertificates(testFiles(dir, "ended"), 0, quiet()); err == nil {
		t.Error("a command begins with a certificate that has ended")
	}
	var both []byte
	for _, name := range []string{"client.pem", "ended.pem"} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, content...)
	}
	testFile(t, filepath.Join(dir, "client.pem"), both)
	if _, err := openCertificates(testFiles(dir, "client"), 0, quiet()); err != nil {
		t.Error(err)
	}
}

// TestLongChain: a chain of many certificates is refused before it is looked through.
func TestLongChain(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 0)
	c, err := openCertificates(testFiles(dir, "client"), 0, quiet())
	if err != nil {
		t.Fatal(err)
	}
	chain := []*x509.Certificate{c.latest().own.Leaf}
	for len(chain) < maxChain {
		chain = append(chain, ca.certificate)
	}
	if _, err := c.latest().verify(chain, x509.ExtKeyUsageClientAuth); err != nil {
		t.Error(err)
	}
	_, err = c.latest().verify(append(chain, ca.certificate), x509.ExtKeyUsageClientAuth)
	wantPart(t, fmt.Sprint(err), "there are 9 certificates, want at most 8")
}

// TestCertificatesAreReadAgain: new files serve new handshakes; what does not fit together
// leaves the old ones, and is logged once.
func TestCertificatesAreReadAgain(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 1)
	log := &sharedLog{}
	c, err := openCertificates(testFiles(dir, "node1"), 1, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	first := c.latest()
	testCertificate(t, ca, dir, "new", "node/1", nil)
	replace := func(ending string) {
		content, err := os.ReadFile(filepath.Join(dir, "new"+ending))
		if err != nil {
			t.Fatal(err)
		}
		testFile(t, filepath.Join(dir, "node1"+ending), content)
	}
	readNow := func() *keyring {
		c.readAgain()
		return c.latest()
	}
	replace(".pem")
	for range 3 {
		if readNow() != first {
			t.Fatal("a certificate without its key is taken")
		}
	}
	if n := strings.Count(log.String(), "cannot be used"); n != 1 {
		t.Errorf("that is logged %d times:\n%s", n, log.String())
	}
	replace(".key")
	second := readNow()
	if second == first {
		t.Fatal("the new certificate is not taken")
	}
	if readNow() != second {
		t.Error("what has not changed is taken again")
	}
	if err := os.Remove(filepath.Join(dir, "ca.pem")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if readNow() != second {
			t.Fatal("a file that is gone takes the old one along")
		}
	}
	if n := strings.Count(log.String(), "cannot be used"); n != 2 {
		t.Errorf("that is logged %d times:\n%s", n, log.String())
	}
}

// TestNewCertificateNotYetValid: new files whose certificate is not valid yet, by a clock
// that is late, are used once it is.
func TestNewCertificateNotYetValid(t *testing.T) {
	t.Parallel()
	withFakeClock(t, func(t *testing.T) {
		dir, ca := testPKI(t, 1)
		c, err := openCertificates(testFiles(dir, "node1"), 1, quiet())
		if err != nil {
			t.Fatal(err)
		}
		first := c.latest()
		testCertificate(t, ca, dir, "node1", "node/1", func(x *x509.Certificate) { x.NotBefore = time.Now().Add(time.Minute) })
		c.readAgain()
		if c.latest() != first {
			t.Error("a certificate is used before it is valid")
		}
		time.Sleep(time.Minute)
		c.readAgain()
		if c.latest() == first {
			t.Error("the new certificate is not used though it is valid now")
		}
	})
}

// TestConnectionCheck: a connection may go on while both ends' certificates last, and while
// the CAs vouch for the other end.
func TestConnectionCheck(t *testing.T) {
	t.Parallel()
	dir, ca := testPKI(t, 0)
	c, err := openCertificates(testFiles(dir, "client"), 0, quiet())
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	ends := now.Add(time.Hour)
	testCertificate(t, ca, dir, "other", "client", func(x *x509.Certificate) { x.NotAfter = ends })
	pair, err := loadPair(testFiles(dir, "other"))
	if err != nil {
		t.Fatal(err)
	}
	mine := c.latest()
	same := *mine
	foreign := *mine
	foreign.clients = x509.NewCertPool()
	later := ends.Add(time.Minute)
	for name, tt := range map[string]struct {
		by       *keyring  // that the connection is checked by
		until    time.Time // when the other end's chain ended, the last time
		ownUntil time.Time
		now      time.Time
		want     string // part of the error; empty: it may go on
	}{
		"as it was":            {mine, ends, later, now, ""},
		"the other has ended":  {mine, ends, later, later, "of the other end has ended"},
		"the own has ended":    {mine, ends, now, now.Add(time.Second), "of this end has ended"},
		"ends at this instant": {mine, ends, ends, ends, ""},
		"read again":           {&same, ends, later, now, ""},
		"ends sooner now":      {&same, later, later, later, "of the other end has ended"},
		"CA was taken out":     {&foreign, ends, later, now, "unknown authority"},
	} {
		s := &secureConn{
			chain: []*x509.Certificate{pair.Leaf}, usage: x509.ExtKeyUsageClientAuth,
			ownUntil: tt.ownUntil, checkedBy: mine, until: tt.until,
		}
		err := s.check(tt.by, tt.now)
		if tt.want == "" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if tt.want != "" {
			wantPart(t, fmt.Sprint(err), tt.want)
		}
	}
}

// TestCertificateWarning: the log warns of the end of the certificate, once a day.
func TestCertificateWarning(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		left  time.Duration
		warns int
	}{{certificateWarning - time.Minute, 1}, {certificateWarning + time.Hour, 0}} {
		dir, ca := testPKI(t, 0)
		testCertificate(t, ca, dir, "node1", "node/1", func(x *x509.Certificate) { x.NotAfter = time.Now().Add(tt.left) })
		log := &sharedLog{}
		c, err := openCertificates(testFiles(dir, "node1"), 1, slog.New(slog.NewTextHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			c.warn(time.Now())
		}
		if n := strings.Count(log.String(), "ends soon"); n != tt.warns {
			t.Errorf("%v before its end: %d warnings", tt.left, n)
		}
	}
}

// loadPair reads a certificate and its key.
func loadPair(files certificateFiles) (tls.Certificate, error) {
	return tls.LoadX509KeyPair(files.cert, files.key)
}

// shakeHandsWith has d shake hands with a server that shows a certificate and accepts any.
func shakeHandsWith(t *testing.T, shown tls.Certificate, d *dialCredentials) error {
	t.Helper()
	l := bufconn.Listen(64 << 10) // net.Pipe has no buffer: both ends would wait for each other
	defer func() { _ = l.Close() }()
	go func() { // ends with the listener, or the connection
		server, err := l.Accept()
		if err != nil {
			return
		}
		config := &tls.Config{Certificates: []tls.Certificate{shown}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}}
		conn := tls.Server(server, config)
		_ = conn.HandshakeContext(t.Context())
		_, _ = io.Copy(io.Discard, conn)
	}()
	client, err := l.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	conn, _, err := d.ClientHandshake(t.Context(), "", client)
	if err != nil {
		return err
	}
	return conn.(*secureConn).NetConn().Close()
}
