// The metrics: their text, where their numbers come from, and that the manual has all of them.

package main

import (
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

// series are the values of /metrics, by name and labels as they are written.
type series map[string]float64

// parseSeries parses the text of metrics, and fails the test unless it is as this program writes it: each metric
// once, with its help and its type first.
func parseSeries(t *testing.T, text string) (series, map[string]string) {
	t.Helper()
	all, types := series{}, map[string]string{}
	name := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if help, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, _, _ = strings.Cut(help, " ")
			if types[name] != "" {
				t.Errorf("%s is there twice", name)
			}
			continue
		}
		if kind, ok := strings.CutPrefix(line, "# TYPE "+name+" "); ok {
			types[name] = kind
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		_, isTwice := all[line[:max(i, 0)]]
		if i < 0 || err != nil || !strings.HasPrefix(line, name) || types[name] == "" || isTwice {
			t.Fatalf("%q is no value of %s: %v", line, name, err)
		}
		all[line[:i]] = value
	}
	return all, types
}

// metricsOf asks a node.
func (w *webs) metricsOf(web *webClient, id uint64) series {
	w.t.Helper()
	all, _ := parseSeries(w.t, web.get(w.address(id), "/metrics", http.StatusOK))
	return all
}

// tells waits until a node tells these values, and returns all.
func (w *webs) tells(web *webClient, id uint64, want series) (all series) {
	w.t.Helper()
	eventually(w.t, func() error {
		all = w.metricsOf(web, id)
		return all.are(want)
	})
	return all
}

func (s series) are(want series) error {
	for name, value := range want {
		if got, ok := s[name]; !ok || got != value {
			return fmt.Errorf("%s: %v (%v), want %v", name, got, ok, value)
		}
	}
	return nil
}

func TestMetricsText(t *testing.T) {
	var m metricsText
	m.counter("a_total", "What.", math.MaxUint64)
	m.gauge("b", "That.", 0.1)
	m.gaugeIf("c", "If.", true)
	m.begin("d", "gauge", "Labels.")
	m.value(math.Inf(1), "x", "a\\b\"c\nd", "y", "")
	m.number(7)
	h := newTimes(time.Millisecond, 2500*time.Millisecond)
	for _, d := range []time.Duration{-1, 0, time.Millisecond, time.Millisecond + 1, time.Second, time.Minute} {
		h.observeTime(d)
	}
	m.begin("e_seconds", "histogram", "Times.")
	m.histogram(h, "of", "f")
	wantText(t, "text", string(m.b), `# HELP a_total What.
# TYPE a_total counter
a_total 18446744073709551615
# HELP b That.
# TYPE b gauge
b 0.1
# HELP c If.
# TYPE c gauge
c 1
# HELP d Labels.
# TYPE d gauge
d{x="a\\b\"c\nd",y=""} +Inf
d 7
# HELP e_seconds Times.
# TYPE e_seconds histogram
e_seconds_bucket{of="f",le="0.001"} 3
e_seconds_bucket{of="f",le="2.5"} 5
e_seconds_bucket{of="f",le="+Inf"} 6
e_seconds_sum{of="f"} 61.002000001
e_seconds_count{of="f"} 6
`)
	if sizes := newSizes(4, 64).bounds; !slices.Equal(sizes, []uint64{1, 4, 16, 64}) {
		t.Errorf("%d", sizes)
	}
}

// TestMethodCounts: each code has its series; those that were not expected, once there was a call.
func TestMethodCounts(t *testing.T) {
	unary := newMethodCounts("raftkv.v1.KVService", "Get", true)
	stream := newMethodCounts("grpc.health.v1.Health", "Watch", false)
	for _, m := range []*methodCounts{unary, stream} {
		m.ended(nil, time.Second)
		m.ended(errReadOnly, time.Hour)
		m.note(toStatus(errOverloaded, true))
		m.note(apiError(codes.Unauthenticated, 0, ""))
		m.note(apiError(codes.Code(99), 0, ""))
		for code, want := range map[codes.Code]uint64{
			codes.OK: 1, codes.PermissionDenied: 1, codes.ResourceExhausted: 1, codes.Unauthenticated: 1, codes.Unknown: 1, codes.Aborted: 0,
		} {
			if got := m.count(code); got != want {
				t.Errorf("%s: %v: %d, want %d", m.name, code, got, want)
			}
		}
		var text metricsText
		text.begin("x", "counter", "")
		m.write(&text)
		all, _ := parseSeries(t, string(text.b))
		want := len(m.expected) + 2 // UNAUTHENTICATED and UNKNOWN
		if m == stream {
			want = 5
		}
		if len(all) != want {
			t.Errorf("%d series, want %d:\n%s", len(all), want, text.b)
		}
	}
	if seconds := float64(unary.seconds.sum.Load()) / 1e9; seconds != 1 {
		t.Errorf("the calls took %v s", seconds) // not that with the error
	}
}

// TestMetricsOfCluster: what nodes tell of themselves, of each other, and of calls.
func TestMetricsOfCluster(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c, _ := newDurable(t, 3, steady, w.set, func(o *options) { o.maxStoreBytes = 1 << 20 })
	web := newWebClient(t, "", "")
	before := w.metricsOf(web, 1)
	if err := before.are(series{
		`rkv_role{role="uninitialized"}`: 1, "rkv_has_leader": 0, "rkv_alive": 1, "rkv_ready": 0, "rkv_loop_answers": 1,
		`rkv_node_info{node="1",cluster="0000000000000000"}`: 1, `rkv_calls_total{method="raftkv.v1.KVService/Set",code="OK"}`: 0,
	}); err != nil {
		t.Error(err)
	}
	c.init(1, 2, 3)
	leader := c.settled(1, 2, 3)
	follower, away := 1+leader%3, 1+(leader+1)%3
	for i := range 10 {
		c.set(leader, fmt.Sprint("k", i), "value")
	}
	if err := getError(c, leader, false); err != nil {
		t.Fatal(err)
	}
	_, err := c.nodes[leader].Set(c.ctx, &kvpb.SetRequest{})
	wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	m, err := c.metrics(leader)
	if err != nil {
		t.Fatal(err)
	}
	const set = `{method="raftkv.v1.KVService/Set"`
	all := w.tells(web, leader, series{
		`rkv_role{role="leader"}`: 1, `rkv_role{role="follower"}`: 0, "rkv_has_leader": 1, "rkv_term": float64(m.Term), "rkv_ready": 1, "rkv_may_restart": 1,
		fmt.Sprintf(`rkv_node_info{node="%d",cluster="%016x"}`, leader, m.ClusterId): 1,
		`rkv_members{kind="voter"}`: 3, `rkv_members{kind="learner"}`: 0, "rkv_membership_joint": 0,
		"rkv_calls_total" + set + `,code="OK"}`: 10, "rkv_calls_total" + set + `,code="INVALID_ARGUMENT"}`: 1,
		"rkv_call_seconds_count" + set + "}": 10, "rkv_call_seconds_bucket" + set + `,le="+Inf"}`: 10,
		"rkv_proposal_writes_count": 10, "rkv_proposal_writes_sum": 10,
		"rkv_keys": 10, "rkv_store_bytes": 70, "rkv_quota_used_bytes": 70 + 640, "rkv_quota_bytes": 1 << 20, "rkv_writes_refused": 0,
		"rkv_version": float64(m.Version), "rkv_log_last_index": float64(m.LastIndex), "rkv_connections_limit": maxConnections,
		fmt.Sprintf(`rkv_peer_connected{peer="%d"}`, follower): 1, fmt.Sprintf(`rkv_peer_lag_entries{peer="%d"}`, follower): 0,
		fmt.Sprintf(`rkv_peer_lagging{peer="%d"}`, away): 0, fmt.Sprintf(`rkv_peer_queue_bytes{peer="%d"}`, away): 0,
	})
	if asked, released := all["rkv_read_round_reads_sum"], all["rkv_reads_released_total"]; asked < 1 || asked != released {
		t.Errorf("%v reads were asked for, %v released", asked, released)
	}
	for _, name := range []string{
		"rkv_loop_turn_seconds_count", "rkv_disk_snapshot_seconds_count", "rkv_disk_sync_seconds_count", "rkv_disk_batch_bytes_sum", "rkv_disk_free_bytes", "rkv_disk_reserve_bytes",
		"rkv_disk_log_bytes", "rkv_watch_history_bytes", "rkv_connections", "process_open_fds", "process_resident_memory_bytes", "go_goroutines",
		"go_memstats_heap_inuse_bytes",
	} {
		eventually(t, func() error { // the disk is looked at now and then
			if all := w.metricsOf(web, leader); all[name] <= 0 {
				return fmt.Errorf("%s: %v", name, all[name])
			}
			return nil
		})
	}
	for name := range before {
		if _, ok := all[name]; !ok && !strings.HasPrefix(name, "rkv_node_info") {
			t.Errorf("%s was there at the start only", name)
		}
	}
	if began := all["process_start_time_seconds"]; math.Abs(began-float64(time.Now().Unix())) > 3600 {
		t.Errorf("the process began at %v", began)
	}
	if _, ok := w.metricsOf(web, follower)[fmt.Sprintf(`rkv_peer_lag_entries{peer="%d"}`, leader)]; ok {
		t.Error("a follower says how far others are behind")
	}

	stream, err := c.nodes[leader].Pipeline(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exchange(stream, getOp("k1", false), getOp("", false), getOp("k2", true)); err != nil {
		t.Fatal(err)
	}
	w.tells(web, leader, series{`rkv_pipeline_operations_total{result="ok"}`: 2, `rkv_pipeline_operations_total{result="error"}`: 1})

	c.acknowledges(leader, away)
	c.cut(away)
	c.set(leader, "k", "v")
	w.tells(web, leader, series{
		fmt.Sprintf(`rkv_peer_connected{peer="%d"}`, away): 0, fmt.Sprintf(`rkv_peer_lag_entries{peer="%d"}`, away): 1, "rkv_may_restart": 0,
	})
	c.heal()
	c.settled(1, 2, 3)
	c.change(leader, &kvpb.ChangeMembershipRequest{Remove: []uint64{away}})
	eventually(t, func() error {
		for name := range w.metricsOf(web, leader) {
			if strings.Contains(name, fmt.Sprintf(`{peer="%d"}`, away)) {
				return fmt.Errorf("%s of a member that was removed", name)
			}
		}
		return nil
	})
}

// TestMetricsWhileTheLoopHangs: they are told all the same, with what the loop has told last.
func TestMetricsWhileTheLoopHangs(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newCluster(t, 1, w.set)
	web := newWebClient(t, "", "")
	c.init(1)
	before := w.tells(web, 1, series{"rkv_loop_answers": 1, "rkv_has_leader": 1})
	release := c.hold(1)
	during := w.metricsOf(web, 1)
	if err := during.are(series{"rkv_loop_answers": 0, "rkv_has_leader": 1, "rkv_term": before["rkv_term"]}); err != nil {
		t.Error(err)
	}
	release()
	w.tells(web, 1, series{"rkv_loop_answers": 1})
}

// TestPeersOfMetrics: a node that is there under two raft IDs is one peer.
func TestPeersOfMetrics(t *testing.T) {
	node := func(id uint64) *kvpb.Node { return &kvpb.Node{Id: id} }
	progress := func(match uint64) *kvpb.Progress { return &kvpb.Progress{MatchIndex: match} }
	m := &kvpb.MetricsResponse{Node: node(1), LastIndex: 10, Members: []*kvpb.MemberStatus{
		{Node: node(1), RaftId: 1, Progress: progress(10)},
		{Node: node(1), RaftId: 9}, // an earlier life of this node
		{Node: node(2), RaftId: 2, Progress: progress(0)},
		{Node: node(2), RaftId: 3, Progress: progress(9), Connected: true, Lagging: "slow"},
		{Node: node(3), RaftId: 4, Progress: progress(12)},
	}}
	got := fmt.Sprintf("%+v", peersOf(m))
	wantText(t, "peers", got, "[{node:2 raftIDs:[2 3] connected:true hasLag:true lag:10 lagging:true} "+
		"{node:3 raftIDs:[4] connected:false hasLag:true lag:0 lagging:false}]")
}

// TestMetricsAccess: with TLS, metrics are for those who may read. Who may not is told why, counted,
// and named in the log.
func TestMetricsAccess(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newCluster(t, 0, w.set)
	c.log = &sharedLog{}
	var ca *authority
	c.pki, ca = testPKI(t, 1)
	testCertificate(t, testAuthority(t, t.TempDir(), "other"), c.pki, "stranger", "admin", nil)
	testCertificate(t, ca, c.pki, "nobody", "reader", elsewhere)
	c.start(1, "127.0.0.1:0")
	refused := 0.0
	for name, want := range map[string]struct {
		code int
		part string
	}{
		"reader":   {http.StatusOK, "rkv_alive 1\n"},
		"client":   {http.StatusOK, "rkv_alive 1\n"},
		"admin":    {http.StatusOK, "rkv_alive 1\n"},
		"node1":    {http.StatusForbidden, "node/1 may not see this: that needs the role reader or client or admin\n"},
		"":         {http.StatusUnauthorized, "no certificate was shown; this needs a certificate of the role reader or client or admin\n"},
		"stranger": {http.StatusUnauthorized, "the certificate that was shown is not accepted: x509"},
	} {
		wantPart(t, newWebClient(t, c.pki, name).get(w.address(1), "/metrics", want.code), want.part)
		if want.code != http.StatusOK {
			refused++
		}
	}
	reader := newWebClient(t, c.pki, "reader")
	w.tells(reader, 1, series{`rkv_refused_total{why="role"}`: refused, "rkv_certificate_not_after_timestamp_seconds": float64(always.until.Unix())})
	eventually(t, func() error {
		if log := c.log.(*sharedLog).String(); !strings.Contains(log, `msg="a call was refused"`) || !strings.Contains(log, `method="GET /metrics"`) {
			return fmt.Errorf("the log says nothing of it: %s", log)
		}
		return nil
	})
	newWebClient(t, c.pki, "node1").get(w.address(1), "/nosuch", http.StatusNotFound)
	resp, _, err := reader.ask(http.MethodGet, w.address(1), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	wantText(t, "type", resp.Header.Get("Content-Type"), metricsType)
}

// TestMetricsAreInTheManual: operations.md has a table of all metrics, with their types and labels, and of no
// others.
func TestMetricsAreInTheManual(t *testing.T) {
	t.Parallel()
	w := &webs{t: t}
	c := newCluster(t, 0, steady, w.set, func(o *options) { o.durable, o.dataDir = true, t.TempDir()+fmt.Sprint("/", o.id) })
	c.pki, _ = testPKI(t, 2)
	c.start(1, "127.0.0.1:0")
	c.start(2, "127.0.0.1:0")
	c.init(1, 2)
	leader := c.settled(1, 2)
	text := newWebClient(t, c.pki, "reader").get(w.address(leader), "/metrics", http.StatusOK)
	all, types := parseSeries(t, text)
	told := map[string]string{}
	for name, kind := range types {
		told[name] = kind + ": " + strings.Join(labelsOf(all, name, kind), ", ")
	}
	manual, err := os.ReadFile("docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, part, _ := strings.Cut(string(manual), "\n## Metrics and alerts\n")
	part, _, _ = strings.Cut(part, "\n## ")
	row := regexp.MustCompile("(?m)^\\| `((?:rkv|go|process)_[a-z_]+)` \\| (\\w+) \\| ([a-z_, ]*?) ?\\|")
	documented := map[string]string{}
	for _, m := range row.FindAllStringSubmatch(part, -1) {
		documented[m[1]] = m[2] + ": " + m[3]
	}
	for name, want := range told {
		wantText(t, "the manual on "+name, documented[name], want)
	}
	for name := range documented {
		if told[name] == "" {
			t.Errorf("the manual has %s, which is not told", name)
		}
	}
}

// labelsOf are the names of the labels that a metric has.
func labelsOf(all series, metric, kind string) []string {
	suffixes := []string{""}
	if kind == "histogram" || kind == "summary" {
		suffixes = []string{"", "_bucket", "_sum", "_count"}
	}
	var labels []string
	for text := range all {
		name, rest, _ := strings.Cut(text, "{")
		isOfMetric := slices.ContainsFunc(suffixes, func(s string) bool { return name == metric+s })
		if !isOfMetric {
			continue
		}
		for _, m := range regexp.MustCompile(`([a-z_]+)="`).FindAllStringSubmatch(rest, -1) {
			if !slices.Contains(labels, m[1]) && m[1] != "le" && m[1] != "quantile" {
				labels = append(labels, m[1])
			}
		}
	}
	slices.Sort(labels)
	return labels
}

// BenchmarkCounted: what it costs a call to be counted.
func BenchmarkCounted(b *testing.B) {
	m := newMethodCounts("raftkv.v1.KVService", "Get", true)
	count := func() {
		begun := time.Now()
		m.ended(nil, time.Since(begun))
	}
	b.Run("alone", func(b *testing.B) {
		for b.Loop() {
			count()
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				count()
			}
		})
	})
}

// TestMetricsWhileStarting: also while the data directory is read, all series of a disk are there.
func TestMetricsWhileStarting(t *testing.T) {
	s := newIdleServer(t)
	s.n.opts.durable = true
	s.limiter = newLimiter(nil, places{}, nil, s.n.logger)
	withFakeClock(t, func(t *testing.T) { // it waits for the loop
		text := string(newMetricsPage(s).write(t.Context()))
		for _, line := range []string{"\nrkv_started 0\n", "\nrkv_loop_answers 0\n", "\nrkv_disk_sync_seconds_count 0\n", "\nrkv_disk_free_bytes 0\n"} {
			wantPart(t, text, line)
		}
	})
}

// stuckWriter is of a reader that takes nothing until it is released.
type stuckWriter struct {
	http.ResponseWriter
	begun, release chan struct{}
}

func (w *stuckWriter) Write(b []byte) (int, error) {
	close(w.begun)
	<-w.release
	return len(b), nil
}

// TestMetricsOfSlowReader: who does not take its answer keeps nobody else from one.
func TestMetricsOfSlowReader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	page := newMetricsPage(c.nodes[1].server)
	stuck := &stuckWriter{httptest.NewRecorder(), make(chan struct{}), make(chan struct{})}
	served := inBackground(func() error {
		page.ServeHTTP(stuck, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
		return nil
	})
	<-stuck.begun
	other := httptest.NewRecorder()
	page.ServeHTTP(other, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	wantPart(t, other.Body.String(), "\nrkv_started 1\n")
	close(stuck.release)
	<-served.ended
}
