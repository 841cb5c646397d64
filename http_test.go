// The HTTP server: probes, who may see what, and how little strangers can do to it.

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"
)

// webs are the HTTP servers of a cluster's nodes, by id, as listeners of the test's own.
type webs struct {
	t  *testing.T
	mu sync.Mutex
	at map[uint64]string
}

// set has a node serve HTTP, for newCluster.
func (w *webs) set(o *options) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	o.httpAddr = l.Addr().String()
	o.httpListener = l
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.at == nil {
		w.at = map[uint64]string{}
	}
	w.at[o.id] = o.httpAddr
}

func (w *webs) address(id uint64) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.at[id]
}

// webClient makes requests as somebody whose certificate is in a directory of testPKI, or, without
// a name, as somebody who has none; without a directory there is no TLS.
type webClient struct {
	t      *testing.T
	pki    string
	client *http.Client
}

func newWebClient(t *testing.T, pki, name string) *webClient {
	t.Helper()
	c := &webClient{t: t, pki: pki, client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	if pki == "" {
		return c
	}
	ca, err := os.ReadFile(filepath.Join(pki, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	config.RootCAs.AppendCertsFromPEM(ca)
	if name != "" {
		own, err := loadPair(testFiles(pki, name))
		if err != nil {
			t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{own}
	}
	c.client.Transport.(*http.Transport).TLSClientConfig = config
	return c
}

// ask makes a request, and returns the answer and its body.
func (c *webClient) ask(method, address, path string) (*http.Response, string, error) {
	scheme := "http"
	if c.pki != "" {
		scheme = "https"
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), rpcTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, scheme+"://"+address+path, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

// get wants a status, and returns the body.
func (c *webClient) get(address, path string, want int) string {
	c.t.Helper()
	resp, body, err := c.ask(http.MethodGet, address, path)
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode != want {
		c.t.Fatalf("%s: %s, want %d: %q", path, resp.Status, want, body)
	}
	return body
}

// becomes waits until a page has a status, and returns its body.
func (c *webClient) becomes(address, path string, want int) (body string) {
	c.t.Helper()
	eventually(c.t, func() error {
		resp, text, err := c.ask(http.MethodGet, address, path)
		if err == nil && resp.StatusCode != want {
			err = fmt.Errorf("%s: %s, want %d: %q", path, resp.Status, want, text)
		}
		body = text
		return err
	})
	return body
}

// TestHTTPProbes: a node in no cluster is alive and not ready; one with a leader is both.
func TestHTTPProbes(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newCluster(t, 1, w.set)
	web := newWebClient(t, "", "")
	at := w.address(1)
	wantText(t, "alive", web.get(at, "/livez", http.StatusOK), "ok\n")
	wantText(t, "not ready", web.get(at, "/readyz", http.StatusServiceUnavailable), "not ok\n")
	why := web.get(at, "/readyz?verbose", http.StatusServiceUnavailable)
	wantText(t, "why", why, "[+] loop: ok\n[-] calls: in no cluster\nnot ok\n")
	c.init(1)
	wantText(t, "ready", web.becomes(at, "/readyz", http.StatusOK), "ok\n")
	wantText(t, "all", web.get(at, "/readyz?verbose", http.StatusOK), "[+] loop: ok\n[+] calls: ok\nok\n")
	for path, want := range map[string]int{
		"/nosuch": http.StatusNotFound, "/livez/": http.StatusNotFound, "//livez": http.StatusNotFound, "/livez?x": http.StatusOK,
	} {
		web.get(at, path, want)
	}
	for _, method := range []string{http.MethodPost, http.MethodDelete, http.MethodOptions, http.MethodTrace} {
		resp, _, err := web.ask(method, at, "/livez")
		if err != nil || resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: %v, %v", method, resp, err)
		}
	}
	resp, body, err := web.ask(http.MethodHead, at, "/livez")
	if err != nil || resp.StatusCode != http.StatusOK || body != "" {
		t.Errorf("HEAD: %v, %q, %v", resp, body, err)
	}
	for name, want := range map[string]string{
		"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Type": "text/plain; charset=utf-8",
	} {
		wantText(t, name, resp.Header.Get(name), want)
	}
}

// TestHTTPOfStoppingNode: a node is not ready once it drains, and what is left of its HTTP
// server ends with it, also with a connection that says nothing.
func TestHTTPOfStoppingNode(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newCluster(t, 1, w.set)
	c.init(1)
	web := newWebClient(t, "", "")
	web.becomes(w.address(1), "/readyz", http.StatusOK)
	c.inLoop(1, func(n *node) error {
		c.nodes[1].server.draining = true
		c.nodes[1].server.onPublish(n.status.latest.Load())
		return nil
	})
	body := web.get(w.address(1), "/readyz?verbose", http.StatusServiceUnavailable)
	wantPart(t, body, "[-] calls: "+errStopping.Error())
	silent, err := net.Dial("tcp", w.address(1))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	c.stop(1)
	if _, _, err := web.ask(http.MethodGet, w.address(1), "/livez"); err == nil {
		t.Error("a node that has ended answers")
	}
}

// TestHTTPSecure: with TLS, whoever asks is told whether the node is alive and ready, and nothing
// else; why not is for those with a certificate that the node accepts.
func TestHTTPSecure(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newSecureCluster(t, 1, w.set)
	stranger := testAuthority(t, t.TempDir(), "other")
	testCertificate(t, stranger, c.pki, "stranger", "admin", nil)
	at := w.address(1)
	const withheld = "[+] loop: ok\n[-] calls: why is for those who show a certificate\nnot ok\n"
	for name, want := range map[string]string{
		"": withheld, "stranger": withheld, "reader": "[+] loop: ok\n[-] calls: in no cluster\nnot ok\n",
	} {
		web := newWebClient(t, c.pki, name)
		wantText(t, name, web.get(at, "/livez", http.StatusOK), "ok\n")
		wantText(t, name, web.get(at, "/readyz", http.StatusServiceUnavailable), "not ok\n")
		wantText(t, name, web.get(at, "/readyz?verbose", http.StatusServiceUnavailable), want)
	}
	c.init(1)
	newWebClient(t, c.pki, "").becomes(at, "/readyz", http.StatusOK)

	if _, _, err := newWebClient(t, "", "").ask(http.MethodGet, at, "/livez"); err != nil {
		t.Error(err) // it is answered in words, by net/http
	}
	raw, err := tls.Dial("tcp", at, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
	if err == nil {
		_ = raw.Close()
		t.Error("TLS 1.2 is spoken")
	}
}

// TestHTTPCertificateIsReadAgain: a handshake shows the certificate that the files have now.
func TestHTTPCertificateIsReadAgain(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newSecureCluster(t, 0, w.set)
	pki, ca := testPKI(t, 1)
	c.pki = pki
	c.start(1, "127.0.0.1:0")
	shown := func() string {
		resp, _, err := newWebClient(t, pki, "").ask(http.MethodGet, w.address(1), "/livez")
		if err != nil {
			t.Fatal(err)
		}
		return resp.TLS.PeerCertificates[0].SerialNumber.String()
	}
	before := shown()
	testCertificate(t, ca, pki, "node1", "node/1", nil)
	eventually(t, func() error {
		if shown() == before {
			return errors.New("it is still the old one")
		}
		return nil
	})
}

// TestHTTPHosts: without TLS, a request by a name that is not the node's own is refused, as a page
// makes it that has its name point to the node.
func TestHTTPHosts(t *testing.T) {
	o := defaultOptions()
	o.addr, o.advertise, o.httpAddr = "10.0.0.1:1", "db1.example:1", "metrics.example:2"
	h := newHTTPServer(newIdleServer(t), &o)
	for host, isOwn := range map[string]bool{
		"localhost": true, "LOCALHOST:9": true, "127.0.0.1": true, "127.0.0.1:80": true, "[::1]:80": true, "[::1]": true, "8.8.8.8": true,
		"db1.example:9": true, "DB1.example.": true, "metrics.example": true, "": true,
		"evil.example": false, "evil.example:2": false, "127.0.0.1.evil.example": false, "localhost.evil.example": false,
		"db1.example.evil.example": false, "0x7f.1:80": false, "xdb1.example": false, "@": false,
	} {
		r := httptest.NewRequest(http.MethodGet, "/livez", nil)
		r.Host = host
		answer := httptest.NewRecorder()
		h.ServeHTTP(answer, r)
		want := http.StatusMisdirectedRequest
		if isOwn {
			want = http.StatusOK
		}
		if answer.Code != want {
			t.Errorf("%q: %d, want %d", host, answer.Code, want)
		}
		r.TLS = &tls.ConnectionState{}
		answer = httptest.NewRecorder()
		h.ServeHTTP(answer, r)
		if answer.Code != http.StatusOK {
			t.Errorf("%q over TLS: %d", host, answer.Code)
		}
	}
}

// newIdleServer is the server of a node whose loop does not run.
func newIdleServer(t *testing.T) *server {
	t.Helper()
	n := turnNode()
	n.net = deafNetwork{}
	s := newServer(n, newNetwork(n, n.logger, nil), nil)
	t.Cleanup(func() {
		s.net.close()
		s.grpc.Stop()
	})
	return s
}

// TestHTTPWhileStarting: a node that reads its data directory is alive, and not ready.
func TestHTTPWhileStarting(t *testing.T) {
	s := newIdleServer(t)
	withFakeClock(t, func(t *testing.T) { // it waits for the loop
		o := defaultOptions()
		h := newHTTPServer(s, &o)
		for path, want := range map[string]string{
			"/livez":          "200 ok\n",
			"/readyz":         "503 not ok\n",
			"/readyz?verbose": "503 [+] loop: ok\n[-] calls: the node is starting, or its loop does not turn\nnot ok\n",
		} {
			answer := httptest.NewRecorder()
			h.ServeHTTP(answer, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://localhost"+path, nil))
			wantText(t, path, fmt.Sprint(answer.Code, " ", answer.Body), want)
		}
	})
}

// TestClockHTTPLiveness: /livez follows the loop, and no leader is needed for it. While the loop
// hangs, the node is not ready either.
func TestClockHTTPLiveness(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, b *bubble) {
		leader, rest := b.leaderAndRest()
		o := defaultOptions()
		s := b.nodes[leader].server
		h := newHTTPServer(s, &o)
		status := func(path string) int {
			answer := httptest.NewRecorder()
			h.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "http://localhost"+path, nil))
			return answer.Code
		}
		wants := func(when string, livez, readyz int) {
			t.Helper()
			if l, r := status("/livez"), status("/readyz"); l != livez || r != readyz {
				t.Errorf("%s: alive %d, ready %d", when, l, r)
			}
		}
		time.Sleep(time.Minute)
		wants("healthy", 200, 200)
		b.do(rest[0], black)
		b.do(rest[1], black)
		time.Sleep(time.Minute)
		wants("without a majority", 200, 503)
		b.do(rest[0], whole)
		b.do(rest[1], whole)
		time.Sleep(time.Minute)
		wants("healed", 200, 200)
		release := make(chan struct{})
		s.n.inbox.event(func() { <-release })
		time.Sleep(livenessTimeout - livenessInterval)
		wants("stuck for a while", 200, 200)
		time.Sleep(3 * livenessInterval)
		wants("stuck", 503, 503)
		close(release)
		time.Sleep(time.Minute)
		wants("released", 200, 200)
	})
}

// TestHTTPConnectionsAreBounded: those who connect and say nothing keep nobody out: the oldest yield at once.
func TestHTTPConnectionsAreBounded(t *testing.T) {
	s := newIdleServer(t)
	withFakeClock(t, func(t *testing.T) { // in which no time goes by that would end them
		o := defaultOptions()
		h := newHTTPServer(s, &o)
		l := bufconn.Listen(1 << 10)
		h.start(l)
		defer h.stop()
		ended := make(chan int, 3*maxHTTPConnections)
		for i := range 3 * maxHTTPConnections {
			conn, err := l.DialContext(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			go func() {
				_, _ = conn.Read(make([]byte, 1))
				ended <- i
			}()
			synctest.Wait()
		}
		for want := range 2 * maxHTTPConnections {
			if len(ended) == 0 {
				t.Fatalf("connection %d stays open", want)
			}
			if i := <-ended; i != want {
				t.Errorf("connection %d has ended, want %d", i, want)
			}
		}
		if len(ended) > 0 {
			t.Errorf("%d more have ended", len(ended))
		}
		conn, err := l.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"))
		answer, err := io.ReadAll(conn)
		if err != nil {
			t.Error(err)
		}
		wantPart(t, string(answer), "200 OK")
	})
}

// TestHTTPConnectionYields: the oldest connection yields, of the host that has most.
func TestHTTPConnectionYields(t *testing.T) {
	l := newHTTPListener(nil)
	host := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, i}) }
	for i, h := range []byte{1, 2, 3, 2, 3, 3, 1} {
		l.conns = append(l.conns, &httpConn{host: host(h), left: i})
	}
	for _, want := range []int{2, 0, 1, 4, 3, 5, 6} { // the last one of three, then of those with two, and so on
		c := l.nextToYield()
		if c.left != want {
			t.Errorf("connection %d yields, want %d", c.left, want)
		}
		l.remove(c)
	}
}

// TestClockHTTPSlow: a connection ends that does not say in time what it wants, that says too much,
// or that has got its answer.
func TestClockHTTPSlow(t *testing.T) {
	s := newIdleServer(t)
	withFakeClock(t, func(t *testing.T) {
		o := defaultOptions()
		h := newHTTPServer(s, &o)
		l := bufconn.Listen(1 << 10)
		h.start(l)
		defer h.stop()
		for what, test := range map[string]struct {
			sent, want string
			least      time.Duration
		}{
			"nothing":         {"", "", httpReadTimeout},
			"half":            {"GET /livez HTTP/1.1\r\nHost:", "", httpReadTimeout},
			"a long header":   {"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + strings.Repeat("x", 32<<10), "431", 0},
			"another version": {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "404", 0},
			"one request":     {"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", "200 OK", 0},
			"two requests":    {strings.Repeat("GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 2), "200 OK", 0},
			"a body":          {"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\nx", "200 OK", 0},
		} {
			conn, err := l.DialContext(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			go func() { _, _ = conn.Write([]byte(test.sent)) }()
			answer, _ := io.ReadAll(conn)
			took := time.Since(begun)
			_ = conn.Close()
			if strings.Count(string(answer), "HTTP/1.1 ") > 1 || !strings.Contains(string(answer), test.want) || (test.want == "") != (len(answer) == 0) {
				t.Errorf("%s: %q", what, answer)
			}
			between(t, what, took, test.least, httpReadTimeout)
		}
	})
}

// TestHTTPConnReadsLittle: of a connection no more is read than a handshake and a request have.
func TestHTTPConnReadsLittle(t *testing.T) {
	near, far := net.Pipe()
	c := &httpConn{Conn: near, l: newHTTPListener(nil), left: maxHTTPBytes}
	go func() { _, _ = far.Write(make([]byte, 2*maxHTTPBytes)) }()
	n, err := io.Copy(io.Discard, bufio.NewReader(c))
	if n != maxHTTPBytes || err != errLongHTTPRequest {
		t.Errorf("%d bytes, %v", n, err)
	}
	_ = far.Close()
	_ = c.Close()
}
