// The HTTP server, which runs if --http-addr is given: what probes, Prometheus and browsers
// ask. Who may ask what is in one table, pages.

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	"raft-key-value/kvpb"
)

const (
	// httpReadTimeout bounds the wait for a request, its handshake included, and httpWriteTimeout
	// that for its answer to be made and read.
	httpReadTimeout  = 5 * time.Second
	httpWriteTimeout = 10 * time.Second
	// httpLoopTimeout bounds the wait for the loop, for what only it knows.
	httpLoopTimeout = time.Second
	// httpFlushTimeout bounds the wait for answers to be read when the node ends.
	httpFlushTimeout = 500 * time.Millisecond
	// maxHTTPHeader bounds the header of a request. Go reads 4 KiB more.
	maxHTTPHeader = 8 << 10
)

// httpPage is what is at a path.
type httpPage struct {
	// who may see it, with TLS; nil: whoever asks, also without a certificate. Without TLS,
	// everybody may see all.
	who   roles
	serve http.HandlerFunc
}

// httpServer answers HTTP requests. Each has a connection of its own: so none that is idle
// keeps a place, and the certificates are always those of now.
type httpServer struct {
	s       *server
	address net.Addr // it listens on
	hosts   []string // by which requests may name this node, without TLS
	pages   map[string]httpPage
	curves  *callRecorder

	server      *http.Server
	endRequests context.CancelFunc
	connections sync.WaitGroup
	serving     *background
	recording   *background // of the curves
	errors      rareLog     // lines of the log about what strangers send
}

// startHTTP starts the HTTP server of a node; nil: there is to be none.
func startHTTP(s *server, o *options) (*httpServer, error) {
	if o.httpAddr == "" {
		return nil, nil
	}
	listener, err := o.listenHTTP()
	if err != nil {
		return nil, err
	}
	h := newHTTPServer(s, o)
	h.start(listener)
	return h, nil
}

// newHTTPServer makes a server that does not listen yet.
func newHTTPServer(s *server, o *options) *httpServer {
	h := &httpServer{s: s, hosts: o.hostNames()}
	h.curves = newCallRecorder(s.methods, &s.operations)
	ctx, end := context.WithCancel(context.Background())
	view := &clusterView{ctx: ctx, survey: (&surveyor{s, &o.plan, h.curves}).survey}
	h.pages = map[string]httpPage{
		"/":        {readers, view.page},
		"/status":  {readers, view.status},
		"/livez":   {nil, h.livez},
		"/readyz":  {nil, h.readyz},
		"/metrics": {readers, newMetricsPage(s).ServeHTTP},
	}
	if o.pprof {
		p := &profiler{s: s, busy: make(chan struct{}, 1)}
		p.addPages(h.pages)
	}
	h.endRequests = end
	h.server = &http.Server{
		Handler:                      h,
		ReadTimeout:                  httpReadTimeout,
		WriteTimeout:                 httpWriteTimeout,
		MaxHeaderBytes:               maxHTTPHeader,
		DisableGeneralOptionsHandler: true,
		Protocols:                    new(http.Protocols),
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		ConnState:                    h.count,
		ErrorLog:                     log.New(h, "", 0),
	}
	h.server.Protocols.SetHTTP1(true)
	h.server.SetKeepAlivesEnabled(false)
	return h
}

// start serves what a listener accepts, until stop.
func (h *httpServer) start(listener net.Listener) {
	h.address = listener.Addr()
	listener = newHTTPListener(listener)
	if h.s.certificates != nil {
		listener = tls.NewListener(listener, h.s.certificates.forHTTP())
	}
	h.recording = inBackground(func() error {
		h.curves.run(h.server.BaseContext(listener))
		return nil
	})
	h.serving = inBackground(func() error {
		err := h.server.Serve(listener)
		if !errors.Is(err, http.ErrServerClosed) {
			h.s.n.logger.Error("HTTP is served no more", "err", err)
		}
		return nil
	})
}

// listenHTTP listens where HTTP is to be served.
func (o *options) listenHTTP() (net.Listener, error) {
	if o.httpListener != nil {
		return o.httpListener, nil
	}
	return net.Listen("tcp", o.httpAddr)
}

// hostNames are the hosts of the node's addresses.
func (o *options) hostNames() []string {
	var names []string
	for _, address := range []string{o.httpAddr, o.addr, o.advertise} {
		host, _, err := net.SplitHostPort(address)
		if err == nil && host != "" {
			names = append(names, host)
		}
	}
	return names
}

// stop ends the server, and returns once nothing of it runs. A nil server has ended.
func (h *httpServer) stop() {
	if h == nil {
		return
	}
	h.endRequests()
	ctx, cancel := context.WithTimeout(context.Background(), httpFlushTimeout)
	defer cancel()
	if h.server.Shutdown(ctx) != nil {
		_ = h.server.Close()
	}
	<-h.serving.ended
	<-h.recording.ended
	h.connections.Wait()
}

// count counts the connections, from which their goroutines begin until these end.
func (h *httpServer) count(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		h.connections.Add(1)
	case http.StateClosed:
		h.connections.Done()
	}
}

// Write takes what net/http logs: mostly of handshakes that have failed.
func (h *httpServer) Write(line []byte) (int, error) {
	leftOut, isDue := h.errors.due(time.Now())
	if isDue {
		text := strings.TrimSpace(beginning(string(line), maxLoggedError))
		h.s.n.logger.Warn("HTTP", "err", text, "others", leftOut)
	}
	return len(line), nil
}

// httpRefusal is why a request is not answered.
type httpRefusal struct {
	code int
	text string
}

func refuseHTTP(code int, format string, args ...any) *httpRefusal {
	return &httpRefusal{code, fmt.Sprintf(format, args...)}
}

// ServeHTTP implements http.Handler.
func (h *httpServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	page, refusal := h.admit(r)
	if refusal == nil {
		page.serve(w, r)
		return
	}
	if refusal.code == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", "GET, HEAD")
	}
	writeText(w, refusal.code, refusal.text)
}

// writeText answers with a line of text.
func writeText(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = fmt.Fprintln(w, text) // fails only if the other end has gone
}

// admit finds the page that is asked for, or says why it may not be seen.
func (h *httpServer) admit(r *http.Request) (httpPage, *httpRefusal) {
	if r.TLS == nil && !h.isOwnHost(r.Host) {
		return httpPage{}, refuseHTTP(http.StatusMisdirectedRequest,
			"this node is asked for by a host that is none of its own, %s", quoteInput(r.Host))
	}
	page, isThere := h.pages[r.URL.Path]
	if !isThere {
		return page, refuseHTTP(http.StatusNotFound, "there is nothing here")
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return page, refuseHTTP(http.StatusMethodNotAllowed, "want GET or HEAD")
	}
	if page.who == nil {
		return page, nil
	}
	return page, h.authorize(r, page.who)
}

// isOwnHost reports whether a request without TLS may be for this node, by its header Host. A
// page of a stranger may have a browser on this machine, or in this network, ask the node: it
// gets a name of its own to point here, after its page was loaded by it (DNS rebinding), and then
// the browser lets it read the answers. But the header has that name: so a name has to be one that
// this node was given. An IP address, or localhost, is nobody's to point elsewhere. Without the
// header, no browser has asked. With TLS, the certificate does not have the name.
func (h *httpServer) isOwnHost(header string) bool {
	host, _, err := net.SplitHostPort(header)
	if err != nil {
		host = header // without a port
	}
	host = strings.TrimSuffix(strings.Trim(host, "[]"), ".")
	if host == "" || strings.EqualFold(host, "localhost") {
		return true
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return slices.ContainsFunc(h.hosts, func(own string) bool { return strings.EqualFold(own, host) })
}

// authorize returns why whoever has sent a request may not see what these roles may.
func (h *httpServer) authorize(r *http.Request, allowed roles) *httpRefusal {
	who, err := h.s.httpCaller(r)
	if err != nil {
		refusal := refuseHTTP(http.StatusUnauthorized, "%v; this needs a certificate of the role %v", err, allowed)
		h.noteRefusal(r, "nobody", refusal)
		return refusal
	}
	if who.role == roleAnyone || allowed.has(who.role) {
		return nil
	}
	refusal := refuseHTTP(http.StatusForbidden, "%v may not see this: that needs the role %v", who, allowed)
	h.noteRefusal(r, who.String(), refusal)
	return refusal
}

// errNoCertificate is why somebody is nobody.
var errNoCertificate = errors.New("no certificate was shown")

// httpCaller returns who has sent a request, by the certificate that the connection has shown,
// which has to be one that this node accepts now. Without TLS, it is anyone.
func (s *server) httpCaller(r *http.Request) (principal, error) {
	if r.TLS == nil {
		return principal{}, nil
	}
	if len(r.TLS.PeerCertificates) == 0 {
		return principal{}, errNoCertificate
	}
	v, err := s.certificates.latest().verify(r.TLS.PeerCertificates, x509.ExtKeyUsageClientAuth)
	if err != nil {
		return principal{}, fmt.Errorf("the certificate that was shown is not accepted: %w", err)
	}
	return v.who, nil
}

// noteRefusal counts a refused request, and logs it, as those of gRPC.
func (h *httpServer) noteRefusal(r *http.Request, who string, refusal *httpRefusal) {
	by := []any{"by", who, "from", r.RemoteAddr}
	h.s.noteRefusals(by, r.Method+" "+r.URL.Path, refusal.text, 1)
}

// forHTTP is how the HTTP server shakes hands. A certificate of the other end is asked for, and
// need not be there; httpCaller checks it.
func (c *certificates) forHTTP() *tls.Config {
	return &tls.Config{
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			config := c.latest().config()
			config.NextProtos = []string{"http/1.1"}
			config.ClientAuth = tls.RequestClientCert
			config.SessionTicketsDisabled = true // each handshake asks for the certificate
			return config, nil
		},
	}
}

// isServing reports whether a name of the health service is SERVING.
func (s *server) isServing(name string) bool {
	resp, err := s.health.Check(context.Background(), &grpc_health_v1.HealthCheckRequest{Service: name})
	return err == nil && resp.Status == grpc_health_v1.HealthCheckResponse_SERVING
}

// livez says whether the process answers and its loop turns. It must not depend on anything
// else: whoever asks restarts the node if not, and one in memory loses what it has.
func (h *httpServer) livez(w http.ResponseWriter, _ *http.Request) {
	if h.s.isServing(livenessHealth) {
		writeText(w, http.StatusOK, "ok")
		return
	}
	writeText(w, http.StatusServiceUnavailable, "not ok")
}

// readyz says whether the node should get calls. With ?verbose, it lists what that depends on,
// and to whoever may read, it says why not.
func (h *httpServer) readyz(w http.ResponseWriter, r *http.Request) {
	turns := h.s.isServing(livenessHealth)
	serves := h.s.isServing(kvpb.KVService_ServiceDesc.ServiceName)
	code := http.StatusOK
	text := "ok"
	isReady := turns && serves
	if !isReady {
		code = http.StatusServiceUnavailable
		text = "not ok"
	}
	if !r.URL.Query().Has("verbose") {
		writeText(w, code, text)
		return
	}
	why := func(ask func(context.Context) string) string {
		if _, err := h.s.httpCaller(r); err != nil {
			return "why is for those who show a certificate"
		}
		return ask(r.Context())
	}
	lines := []string{"[+] loop: ok", "[+] calls: ok", text}
	if !turns {
		lines[0] = "[-] loop: " + why(func(context.Context) string { return errLoopHangs.Error() })
	}
	if !serves {
		lines[1] = "[-] calls: " + why(h.s.whyNotServing)
	}
	writeText(w, code, strings.Join(lines, "\n"))
}

// whyNotServing says why KVService is NOT_SERVING.
func (s *server) whyNotServing(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, httpLoopTimeout)
	defer cancel()
	var why string
	err := s.n.do(ctx, func() error {
		why = s.n.whyUnhealthyNow()
		if s.draining {
			why = errStopping.Error()
		}
		return nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return "the node is starting, or its loop does not turn"
	}
	if err != nil {
		return err.Error()
	}
	if why == "" {
		return "it has just become ready"
	}
	return why
}
