// Profiles of the program by HTTP, with --pprof: for admins, one at a time. net/http/pprof has the
// same, but for whoever asks, and as many as are asked for.

package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"runtime/pprof"
	"runtime/trace"
	"strconv"
	"time"
)

const (
	profilePrefix = "/debug/pprof/"
	// maxProfileTime bounds a profile, or a trace, and profileTime is how long it is if nobody says.
	maxProfileTime = 5 * time.Minute
	profileTime    = 30 * time.Second
	traceTime      = time.Second
	// impatience is how long a part of a trace may take to be read.
	impatience = time.Second
)

// snapshotProfiles are the profiles that show a moment, or all since the start.
var snapshotProfiles = []string{"allocs", "goroutine", "heap", "threadcreate"}

// profiler makes profiles.
type profiler struct {
	s    *server
	busy chan struct{} // full while one is made
}

// addPages adds the pages of profiles.
func (p *profiler) addPages(pages map[string]httpPage) {
	for _, name := range snapshotProfiles {
		pages[profilePrefix+name] = p.page(func(w http.ResponseWriter, r *http.Request) error { return writeProfile(w, r, name) })
	}
	pages[profilePrefix+"profile"] = p.page(func(w http.ResponseWriter, r *http.Request) error {
		return p.during(r, profileTime, func() error { return pprof.StartCPUProfile(w) }, pprof.StopCPUProfile)
	})
	pages[profilePrefix+"trace"] = p.page(func(w http.ResponseWriter, r *http.Request) error {
		return p.during(r, traceTime, func() error { return trace.Start(impatientWriter{w}) }, trace.Stop)
	})
}

// impatientWriter writes to a reader that has to take each part within impatience, or gets no more:
// Go keeps in memory what a trace is not read of.
type impatientWriter struct{ http.ResponseWriter }

func (w impatientWriter) Write(part []byte) (int, error) {
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(impatience))
	return w.ResponseWriter.Write(part)
}

// page is a page that answers with what write writes, in the format of the tools, if no other
// profile is being made.
func (p *profiler) page(write func(http.ResponseWriter, *http.Request) error) httpPage {
	return httpPage{admins, func(w http.ResponseWriter, r *http.Request) {
		select {
		case p.busy <- struct{}{}:
			defer func() { <-p.busy }()
		default:
			writeText(w, http.StatusServiceUnavailable, "another profile is being made")
			return
		}
		p.answer(w, r, write)
	}}
}

// errProfileTime is the error of a request for a profile of no length, or too long.
var errProfileTime = fmt.Errorf("seconds: want a whole number from 1 to %d", maxProfileTime/time.Second)

// answer is page for a profile whose turn it is.
func (p *profiler) answer(w http.ResponseWriter, r *http.Request, write func(http.ResponseWriter, *http.Request) error) {
	if r.Method == http.MethodHead {
		return
	}
	begun := time.Now()
	c := http.NewResponseController(w)
	_ = c.SetWriteDeadline(begun.Add(maxProfileTime + httpWriteTimeout)) // fails only of a connection that has none
	w.Header().Set("Content-Type", "application/octet-stream")
	err := write(w, r)
	if errors.Is(err, errProfileTime) {
		writeText(w, http.StatusBadRequest, err.Error())
	}
	p.s.n.logger.Info("request of an operator", "by", p.caller(r), "from", r.RemoteAddr, "method", r.URL.Path,
		"took", time.Since(begun).Round(time.Millisecond), "err", err)
}

// caller says who has sent a request.
func (p *profiler) caller(r *http.Request) string {
	who, err := p.s.httpCaller(r)
	if err != nil { // it was admitted before: the certificates have changed since
		return "nobody"
	}
	return who.String()
}

// writeProfile writes a profile that is there; with ?debug=1, or 2, as text.
func writeProfile(w io.Writer, r *http.Request, name string) error {
	debug, _ := strconv.Atoi(r.URL.Query().Get("debug"))
	if name == "heap" && r.URL.Query().Has("gc") {
		runtime.GC()
	}
	return pprof.Lookup(name).WriteTo(w, debug)
}

// during starts something and stops it after ?seconds, or when the request ends.
func (p *profiler) during(r *http.Request, length time.Duration, start func() error, stop func()) error {
	if text := r.URL.Query().Get("seconds"); text != "" {
		seconds, err := strconv.ParseUint(text, 10, 16)
		length = time.Duration(seconds) * time.Second
		if err != nil || length == 0 || length > maxProfileTime {
			return errProfileTime
		}
	}
	if err := start(); err != nil {
		return err
	}
	defer stop()
	sleep(r.Context(), length)
	return r.Context().Err()
}
