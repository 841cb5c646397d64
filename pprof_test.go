package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestProfiles: they are for admins, one at a time, and each ends with its request. Without --pprof,
// there is none.
func TestProfiles(t *testing.T) {
	w := &webs{t: t}
	withProfiles := func(o *options) { o.pprof = o.id == 1 }
	c := newSecureCluster(t, 2, w.set, withProfiles)
	admin := newWebClient(t, c.pki, "admin")
	for _, name := range snapshotProfiles {
		body := admin.get(w.address(1), profilePrefix+name, http.StatusOK)
		if _, err := gzip.NewReader(strings.NewReader(body)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		wantPart(t, admin.get(w.address(1), profilePrefix+name+"?debug=1", http.StatusOK), name[:4])
		admin.get(w.address(2), profilePrefix+name, http.StatusNotFound)
		newWebClient(t, c.pki, "client").get(w.address(1), profilePrefix+name, http.StatusForbidden)
		newWebClient(t, c.pki, "").get(w.address(1), profilePrefix+name, http.StatusUnauthorized)
	}
	for _, seconds := range []string{"0", "301", "-1", "x", "1.5"} {
		admin.get(w.address(1), profilePrefix+"profile?seconds="+seconds, http.StatusBadRequest)
	}
	body := admin.get(w.address(1), profilePrefix+"trace?seconds=1", http.StatusOK)
	wantPart(t, body[:min(len(body), 20)], "go 1.")

	const long = profilePrefix + "profile?seconds=300"
	leave := admin.begin(w.address(1), long)
	admin.becomes(w.address(1), profilePrefix+"heap", http.StatusServiceUnavailable)
	leave()
	admin.becomes(w.address(1), profilePrefix+"heap", http.StatusOK)
	defer admin.begin(w.address(1), long)()
	admin.becomes(w.address(1), profilePrefix+"heap", http.StatusServiceUnavailable)
	c.stop(1) // which ends the profile
}

// begin makes a request that takes long, until leave, which returns when it has ended.
func (c *webClient) begin(address, path string) (leave func()) {
	ctx, cancel := context.WithCancel(c.t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+path, nil)
		if err != nil {
			c.t.Error(err)
			return
		}
		for isBusy := true; isBusy; { // with a profile that the test has just asked for
			resp, err := c.client.Do(req)
			if err != nil {
				return
			}
			isBusy = resp.StatusCode == http.StatusServiceUnavailable
			_ = resp.Body.Close()
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}

// TestProfileIsNotCut: a profile may take longer than other requests.
func TestProfileIsNotCut(t *testing.T) {
	s := newIdleServer(t)
	o := defaultOptions()
	o.pprof = true
	h := newHTTPServer(s, &o)
	server := httptest.NewUnstartedServer(h)
	server.Config.ReadTimeout, server.Config.WriteTimeout = 50*time.Millisecond, 50*time.Millisecond
	server.Start()
	defer server.Close()
	defer h.endRequests()
	at := strings.TrimPrefix(server.URL, "http://")
	begun := time.Now()
	body := newWebClient(t, "", "").get(at, profilePrefix+"profile?seconds=1", http.StatusOK)
	if took := time.Since(begun); took < time.Second {
		t.Errorf("it was cut after %v", took)
	}
	if _, err := gzip.NewReader(bytes.NewReader([]byte(body))); err != nil {
		t.Error(err)
	}
}
