// TLS: what this process shows to prove who it is, and by what it checks who others are.

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

const (
	// certificateReadInterval is how often the files are looked at, and the connections.
	certificateReadInterval = time.Second
	// A certificate that ends within certificateWarning is warned about, every
	// certificateWarningInterval.
	certificateWarning         = 30 * 24 * time.Hour
	certificateWarningInterval = 24 * time.Hour
	// maxCertificateFile bounds what is read of a file: a mistyped name may be anything.
	maxCertificateFile = 1 << 20
	// maxChain bounds the certificates that one end shows: among many, it takes long to find
	// those that lead to a CA.
	maxChain = 8
)

// certificateFiles are the files, in PEM, that TLS needs. Without the first three there is
// no TLS.
type certificateFiles struct {
	cert      string // the own certificate, and those between it and its CA
	key       string // its private key
	trustedCA string // the CAs of everybody else's certificates
	peerCA    string // the CAs of the certificates of nodes; empty: trustedCA
}

// areGiven reports whether there is to be TLS.
func (f certificateFiles) areGiven() bool { return f != certificateFiles{} }

// areAll reports whether there is all that TLS needs.
func (f certificateFiles) areAll() bool { return f.cert != "" && f.key != "" && f.trustedCA != "" }

// certificates are the present content of the files. A node reads them again when they have
// changed, for the handshakes that follow; a command reads them once. Any goroutine may call
// latest, accept and the dialling; no handshake waits for a file.
type certificates struct {
	files  certificateFiles
	node   uint64 // the id of the node that this process is; 0: it is a command
	logger *slog.Logger

	current   atomic.Pointer[keyring] // of the last files that could be used
	nodeHosts nodeHosts               // where nodes have shown their certificates

	// These are watch's alone.
	content  fileContent // of the files when they were last read; empty: they could not be read
	isUsed   bool        // content is what current was made of
	warnedAt time.Time   // when the log last said that the certificate ends soon

	mu   sync.Mutex // guards open
	open map[*secureConn]bool
}

// fileContent is what the files have, in the order of certificateFiles.
type fileContent struct{ cert, key, trustedCA, peerCA string }

// keyring is what is needed for a handshake. Nothing changes it.
type keyring struct {
	own     tls.Certificate
	who     principal
	until   time.Time      // when the first certificate of the own chain ends
	clients *x509.CertPool // the CAs of clients, readers and admins
	nodes   *x509.CertPool // the CAs of nodes
}

// openCertificates reads the files for a node, or for a command (node 0), and refuses what
// nobody would accept.
func openCertificates(files certificateFiles, node uint64, logger *slog.Logger) (*certificates, error) {
	c := &certificates{files: files, node: node, logger: logger, open: map[*secureConn]bool{}}
	content, err := files.read()
	if err != nil {
		return nil, err
	}
	k, err := c.parse(content)
	if err != nil {
		return nil, err
	}
	c.content = content
	c.isUsed = true
	c.current.Store(k)
	return c, nil
}

func (f certificateFiles) read() (fileContent, error) {
	var c fileContent
	for _, file := range []struct {
		path string
		to   *string
	}{{f.cert, &c.cert}, {f.key, &c.key}, {f.trustedCA, &c.trustedCA}, {f.peerCA, &c.peerCA}} {
		if file.path == "" {
			continue
		}
		text, err := readCertificateFile(file.path)
		if err != nil {
			return fileContent{}, err
		}
		*file.to = text
	}
	return c, nil
}

func readCertificateFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	text, err := io.ReadAll(io.LimitReader(file, maxCertificateFile+1)) // a device says no size
	if err != nil {
		return "", err
	}
	if len(text) > maxCertificateFile {
		return "", fmt.Errorf("%s: it has more than %d bytes", path, maxCertificateFile)
	}
	return string(text), nil
}

// parse makes a keyring of the files, if they fit together and the certificate is one that
// others accept.
func (c *certificates) parse(content fileContent) (*keyring, error) {
	own, err := tls.X509KeyPair([]byte(content.cert), []byte(content.key))
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", c.files.cert, c.files.key, err)
	}
	who, err := principalOf(own.Leaf)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.files.cert, err)
	}
	k := &keyring{own: own, who: who}
	k.clients, err = parsePool(c.files.trustedCA, content.trustedCA)
	if err != nil {
		return nil, err
	}
	k.nodes = k.clients
	if c.files.peerCA != "" {
		k.nodes, err = parsePool(c.files.peerCA, content.peerCA)
		if err != nil {
			return nil, err
		}
	}
	if err := c.checkOwn(k); err != nil {
		return nil, fmt.Errorf("%s: %w", c.files.cert, err)
	}
	return k, nil
}

// parsePool returns the CAs of a file. It refuses the file as a whole if there is anything
// else in it: a part that was passed over, because it is not written yet or is damaged,
// would be a CA that is not trusted any more.
func parsePool(path, content string) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	found := 0
	rest := []byte(content)
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: there is a %s in it, want certificates only", path, block.Type)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		pool.AddCert(certificate)
		found++
	}
	if found == 0 {
		return nil, fmt.Errorf("%s: there is no certificate in it", path)
	}
	if begun := strings.Count(content, "-----BEGIN "); begun != found {
		return nil, fmt.Errorf("%s: of its %d certificates, only %d are whole", path, begun, found)
	}
	return pool, nil
}

// checkOwn checks the own certificate, as the others will, and sets when it ends.
func (c *certificates) checkOwn(k *keyring) error {
	chain, err := k.ownChain()
	if err != nil {
		return err
	}
	if c.node == 0 {
		return k.checkOwnValidity(chain[0], time.Now())
	}
	wanted := principal{role: roleNode, node: c.node}
	if k.who != wanted {
		return fmt.Errorf("the certificate is of %v, this is %v", k.who, wanted)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		v, err := k.verify(chain, usage)
		if err != nil {
			return fmt.Errorf("others would not accept it as a node's, which needs the usages "+
				"serverAuth and clientAuth: %w", err)
		}
		k.until = v.until
	}
	return nil
}

// checkOwnValidity checks that the certificate of a command is valid now. By which CA the
// nodes check it, and which of those behind it they need for that, a command does not know.
func (k *keyring) checkOwnValidity(own *x509.Certificate, now time.Time) error {
	k.until = own.NotAfter
	if now.Before(own.NotBefore) {
		return fmt.Errorf("the certificate is not valid before %s", clockText(own.NotBefore))
	}
	if now.After(own.NotAfter) {
		return fmt.Errorf("the certificate has ended at %s", clockText(own.NotAfter))
	}
	return nil
}

// ownChain returns the own certificate and those between it and its CA.
func (k *keyring) ownChain() ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for _, der := range k.own.Certificate {
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, certificate)
	}
	return chain, nil
}

// verified is what a chain of certificates says that was checked.
type verified struct {
	who   principal
	until time.Time // when its first certificate ends
}

// verify checks a chain, its own certificate first, for a usage: it has to be of a
// principal, and signed by a CA of that principal's role. So a certificate that the CA of
// clients has signed never passes for a node's, whatever it says.
func (k *keyring) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) (verified, error) {
	if len(chain) == 0 {
		return verified{}, errors.New("there is no certificate")
	}
	if len(chain) > maxChain {
		return verified{}, fmt.Errorf("there are %d certificates, want at most %d", len(chain), maxChain)
	}
	who, err := principalOf(chain[0])
	if err != nil {
		return verified{}, err
	}
	roots := k.clients
	if who.role == roleNode {
		roots = k.nodes
	}
	between := x509.NewCertPool()
	for _, certificate := range chain[1:] {
		between.AddCert(certificate)
	}
	chains, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: between,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return verified{}, err
	}
	v := verified{who: who}
	for _, chain := range chains { // each is a way to trust it: the one that lasts longest counts
		if end := firstEnd(chain); end.After(v.until) {
			v.until = end
		}
	}
	return v, nil
}

// firstEnd returns when the first certificate of a chain ends.
func firstEnd(chain []*x509.Certificate) time.Time {
	end := chain[0].NotAfter
	for _, certificate := range chain[1:] {
		if certificate.NotAfter.Before(end) {
			end = certificate.NotAfter
		}
	}
	return end
}

// latest returns the keyring for a handshake that begins now.
func (c *certificates) latest() *keyring { return c.current.Load() }

// watch looks after the certificates, and after the connections that were made with them,
// until ctx ends.
func (c *certificates) watch(ctx context.Context) {
	for ctx.Err() == nil {
		c.readAgain()
		c.recheck(time.Now())
		c.warn(time.Now())
		sleep(ctx, certificateReadInterval)
	}
}

// readAgain takes over what the files have now, if that has changed and can be used. A
// certificate and its key are replaced one after the other: in between they do not fit,
// and the old ones stay. What cannot be used is tried again each time: a certificate may
// not be valid yet.
func (c *certificates) readAgain() {
	content, err := c.files.read()
	isNews := content != c.content
	if err == nil && !isNews && c.isUsed {
		return
	}
	c.content = content // empty after an error of reading: that is logged once, too
	var k *keyring
	if err == nil {
		k, err = c.parse(content)
	}
	c.isUsed = err == nil
	if err != nil {
		if isNews {
			c.logger.Error("the certificates have changed and cannot be used: the old ones stay", "err", err)
		}
		return
	}
	c.current.Store(k)
	c.warnedAt = time.Time{}
	c.logger.Info("certificates read again", "ends", clockText(k.until))
}

// warn logs if the node's certificate ends soon, or has ended, once in a while.
func (c *certificates) warn(now time.Time) {
	k := c.latest()
	isSoon := k.until.Sub(now) < certificateWarning
	if !isSoon || now.Sub(c.warnedAt) < certificateWarningInterval {
		return
	}
	c.warnedAt = now
	text := "the certificate of this node ends soon: without another one, nobody can connect then"
	if now.After(k.until) {
		text = "the certificate of this node has ended: nobody can connect until there is another one"
	}
	c.logger.Warn(text, "ends", clockText(k.until), "file", c.files.cert)
}

// recheck ends the connections that may not go on. watch alone calls it.
func (c *certificates) recheck(now time.Time) {
	k := c.latest()
	c.mu.Lock()
	all := slices.Collect(maps.Keys(c.open))
	c.mu.Unlock()
	for _, s := range all {
		err := s.check(k, now)
		if err == nil {
			continue
		}
		c.logger.Warn("a connection is ended, for its certificates are not accepted any more",
			"by", s.who.String(), "from", s.RemoteAddr(), "err", err)
		s.forget()
		s.cut()
	}
}

// secureConn is a TLS connection whose both ends have shown who they are. A node ends it
// when the first certificate of either end does, or when the CAs do not vouch for the other
// end any more.
type secureConn struct {
	*tls.Conn
	who      principal // at the other end
	owner    *certificates
	chain    []*x509.Certificate // of the other end
	usage    x509.ExtKeyUsage    // of chain
	ownUntil time.Time           // when the certificates end that this end has shown

	// These are watch's alone, once the connection is in owner.open.
	checkedBy *keyring  // that has last vouched for chain
	until     time.Time // when, by checkedBy, the first certificate of chain ends
}

// opened looks after a connection until it is closed. Its other end was verified by k, for
// a usage.
func (c *certificates) opened(conn *tls.Conn, k *keyring, v verified, usage x509.ExtKeyUsage) *secureConn {
	s := &secureConn{
		Conn:      conn,
		who:       v.who,
		owner:     c,
		chain:     conn.ConnectionState().PeerCertificates,
		usage:     usage,
		ownUntil:  k.until,
		checkedBy: k,
		until:     v.until,
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[s] = true
	return s
}

// check returns an error if the connection may not go on: if a certificate has ended, by
// the clock as it is now, or if k does not vouch for the other end.
func (s *secureConn) check(k *keyring, now time.Time) error {
	if s.checkedBy != k {
		v, err := k.verify(s.chain, s.usage)
		if err != nil {
			return err
		}
		s.checkedBy = k
		s.until = v.until
	}
	if now.After(s.until) {
		return fmt.Errorf("the certificate of the other end has ended at %s", clockText(s.until))
	}
	if now.After(s.ownUntil) {
		return fmt.Errorf("the certificate of this end has ended at %s", clockText(s.ownUntil))
	}
	return nil
}

// cut ends the connection without a word to the other end, and so without waiting for it.
// Whoever uses it closes it then.
func (s *secureConn) cut() { _ = s.NetConn().Close() }

// forget has nothing more done with a connection that somebody else closes.
func (s *secureConn) forget() {
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	delete(s.owner.open, s)
}

func (s *secureConn) Close() error {
	s.forget()
	return s.Conn.Close()
}

// accept has the other end of a connection show who it is, and shows it who this node is.
// ctx bounds the time.
func (c *certificates) accept(ctx context.Context, raw net.Conn) (*secureConn, error) {
	k := c.latest()
	var v verified
	config := k.config()
	config.ClientAuth = tls.RequireAnyClientCert // which VerifyConnection checks, by the CA of its role
	config.SessionTicketsDisabled = true         // each handshake asks for the certificate
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		v, err = k.verify(state.PeerCertificates, x509.ExtKeyUsageClientAuth)
		return err
	}
	bounded := &handshakeConn{Conn: raw, left: maxHandshakeBytes}
	conn := tls.Server(bounded, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	bounded.isDone = true
	c.noteHost(raw, v)
	return c.opened(conn, k, v, x509.ExtKeyUsageClientAuth), nil
}

// noteHost notes from which host a node comes, or at which it was found.
func (c *certificates) noteHost(raw net.Conn, v verified) {
	if v.who.role == roleNode {
		c.nodeHosts.add(hostOf(raw.RemoteAddr()))
	}
}

// config is what both ends of a handshake need.
func (k *keyring) config() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{k.own},
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2"},
	}
}

// dialCredentials are the credentials of a connection to a node, for gRPC.
type dialCredentials struct {
	*certificates
	node uint64 // the id of the node that is meant; 0: any node, at a host of its certificate
	host string
}

// ClientHandshake implements credentials.TransportCredentials.
func (d *dialCredentials) ClientHandshake(
	ctx context.Context, _ string, raw net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	k := d.latest()
	var v verified
	config := k.config()
	config.ServerName = d.host
	config.InsecureSkipVerify = true // VerifyConnection does it: crypto/tls would insist on the host's name
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		v, err = d.check(k, state.PeerCertificates)
		return err
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, nil, err
	}
	d.noteHost(raw, v)
	info := credentials.TLSInfo{
		State:          conn.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}
	return d.opened(conn, k, v, x509.ExtKeyUsageServerAuth), info, nil
}

// check checks that a chain is of the node that is meant. Among nodes it is the id that
// counts: a node may be at another address than its certificate was made for. A command
// knows nothing of a node but its host.
func (d *dialCredentials) check(k *keyring, chain []*x509.Certificate) (verified, error) {
	v, err := k.verify(chain, x509.ExtKeyUsageServerAuth)
	if err != nil {
		return v, err
	}
	if v.who.role != roleNode {
		return v, fmt.Errorf("the certificate is of %v, and of no node", v.who)
	}
	if d.node == 0 {
		return v, chain[0].VerifyHostname(d.host)
	}
	if v.who.node != d.node {
		return v, fmt.Errorf("the certificate is of %v, and node/%d was called", v.who, d.node)
	}
	return v, nil
}

// ServerHandshake implements credentials.TransportCredentials. The limiter shakes hands
// with those who connect to a node.
func (d *dialCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for dialling")
}

// Info implements credentials.TransportCredentials.
func (d *dialCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (d *dialCredentials) Clone() credentials.TransportCredentials {
	clone := *d
	return &clone
}

// OverrideServerName implements credentials.TransportCredentials.
func (d *dialCredentials) OverrideServerName(string) error { return nil }
