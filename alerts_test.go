// The alerts of packaging/alerts.yml: each is for a fault, which is made here, and upon which the series that the
// alert reads take the values that it fires on. That it fires on these, promtool tests by packaging/alerts_test.yml.

package main

import (
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"raft-key-value/kvpb"
)

// alert is one of the file's.
type alert struct{ name, expr, runbook string }

// readAlerts reads the file.
func readAlerts(t *testing.T) (all []alert) {
	t.Helper()
	text, err := os.ReadFile("packaging/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	rule := regexp.MustCompile(`(?s)^(\w+)\n +expr: (.*?)\n        (?:for|labels):.*runbook: (\S+)\s*$`)
	for _, part := range strings.Split(string(text), "- alert: ")[1:] {
		m := rule.FindStringSubmatch(part)
		if m == nil {
			t.Fatalf("no rule: %s", part)
		}
		all = append(all, alert{m[1], m[2], m[3]})
	}
	return all
}

// headings are the anchors of the manual.
func headings(manual string) (anchors []string) {
	for line := range strings.Lines(manual) {
		if title := strings.TrimLeft(line, "#"); title != line && strings.HasPrefix(title, " ") {
			anchor := strings.ToLower(strings.ReplaceAll(strings.TrimSpace(title), " ", "-"))
			anchors = append(anchors, regexp.MustCompile(`[^a-z0-9-]`).ReplaceAllString(anchor, ""))
		}
	}
	return anchors
}

// TestAlertsAreInTheManual: the manual has each alert, and what to do about it, and each metric that an alert reads.
func TestAlertsAreInTheManual(t *testing.T) {
	manual, err := os.ReadFile("docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(manual), "\n### Alerts\n")
	table, _, _ = strings.Cut(table, "\n## ")
	suffix := regexp.MustCompile(`_(bucket|sum|count)$`)
	for _, a := range readAlerts(t) {
		anchor, isThere := strings.CutPrefix(a.runbook, "docs/operations.md#")
		if !isThere || !slices.Contains(headings(string(manual)), anchor) {
			t.Errorf("%s: the manual has no part %s", a.name, a.runbook)
		}
		row := regexp.MustCompile("(?m)^\\| `" + a.name + "` \\|.*\\]\\(#" + anchor + "\\).*$").FindString(table)
		if row == "" {
			t.Errorf("the manual's table has no %s that points to #%s", a.name, anchor)
		}
		if !strings.HasPrefix(a.expr, "up{") && !strings.Contains(a.expr, "rkv_") {
			t.Errorf("%s reads no metric of this program", a.name)
		}
		for _, name := range regexp.MustCompile(`\b(rkv|process|go)_[a-z_]+`).FindAllString(a.expr, -1) {
			if !strings.Contains(string(manual), "\n| `"+suffix.ReplaceAllString(name, "")+"` |") {
				t.Errorf("%s reads %s, which is not told", a.name, name)
			}
		}
	}
}

// faults make, for each alert, what it is for.
var faults = map[string]func(*testing.T){
	"RkvDown":               faultDown,
	"RkvLoopHangs":          faultLoopHangs,
	"RkvNoLeader":           faultNoLeader,
	"RkvInNoCluster":        faultClusters,
	"RkvTwoClusters":        faultClusters,
	"RkvNotReady":           faultNotReady,
	"RkvLeaderChanges":      faultLeaderChanges,
	"RkvCannotLoseANode":    faultVoterIsMissing,
	"RkvMemberDisconnected": faultVoterIsMissing,
	"RkvMemberTooSlow":      faultTooSlow,
	"RkvQuotaNearlyUsed":    faultQuota,
	"RkvWritesRefused":      faultQuota,
	"RkvDiskNearlyFull":     faultDiskNearlyFull,
	"RkvDiskSlow":           faultDiskSlow,
	"RkvCertificateEnds":    faultCertificateEnds,
	"RkvCallsFail":          faultNoLeader,
	"RkvOverloaded":         faultOverloaded,
	"RkvStrangers":          faultStrangers,
}

func TestAlertsFire(t *testing.T) {
	for _, a := range readAlerts(t) {
		fault := faults[a.name]
		if fault == nil {
			t.Errorf("%s is not tried", a.name)
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			if a.name != "RkvDiskSlow" { // which is in a bubble
				t.Parallel()
			}
			fault(t)
		})
	}
	if len(faults) != len(readAlerts(t)) {
		t.Errorf("%d faults, %d alerts", len(faults), len(readAlerts(t)))
	}
}

// watched is a cluster whose nodes tell metrics.
func watched(t *testing.T, n uint64, set ...func(*options)) (*testCluster, *webs, *webClient) {
	w := &webs{t: t}
	return newCluster(t, n, append(set, w.set)...), w, newWebClient(t, "", "")
}

func faultDown(t *testing.T) {
	c, w, web := watched(t, 1)
	w.metricsOf(web, 1)
	c.stop(1)
	if _, _, err := web.ask(http.MethodGet, w.address(1), "/metrics"); err == nil {
		t.Error("a node that has ended tells metrics")
	}
}

func faultLoopHangs(t *testing.T) {
	c, w, web := watched(t, 1)
	w.tells(web, 1, series{"rkv_loop_answers": 1, "rkv_alive": 1})
	c.hold(1)
	w.tells(web, 1, series{"rkv_loop_answers": 0})
	w.tells(web, 1, series{"rkv_alive": 0})
}

func faultNoLeader(t *testing.T) {
	c, w, web := watched(t, 2)
	c.init(1, 2)
	w.tells(web, 1, series{"rkv_has_leader": 1})
	c.kill(2)
	const failed = `rkv_calls_total{method="raftkv.v1.KVService/Set",code="UNAVAILABLE"}`
	before := w.tells(web, 1, series{"rkv_has_leader": 0, `rkv_role{role="uninitialized"}`: 0})
	_, err := c.nodes[1].Set(c.ctx, &kvpb.SetRequest{Key: "k"})
	wantError(t, err, codes.Unavailable, "NO_LEADER")
	w.tells(web, 1, series{failed: before[failed] + 1})
}

func faultClusters(t *testing.T) {
	c, w, web := watched(t, 2)
	w.tells(web, 1, series{`rkv_role{role="uninitialized"}`: 1})
	clusters := map[string]bool{}
	for id := range uint64(2) {
		c.init(id + 1)
		w.tells(web, id+1, series{`rkv_role{role="uninitialized"}`: 0})
		for name := range w.metricsOf(web, id+1) {
			if _, cluster, isInfo := strings.Cut(name, `rkv_node_info{node="`+fmt.Sprint(id+1)+`",cluster=`); isInfo {
				clusters[cluster] = true
			}
		}
	}
	if len(clusters) != 2 {
		t.Errorf("clusters: %v", clusters)
	}
}

// faultNotReady: a follower whose disk stalls hears its leader, and does not keep up.
func faultNotReady(t *testing.T) {
	w := &webs{t: t}
	c, _ := newDurable(t, 3, w.set)
	web := newWebClient(t, "", "")
	c.init(1, 2, 3)
	leader := c.settled(1, 2, 3)
	follower := 1 + leader%3
	d := c.nodes[follower].server.n.durable.disk
	d.suspend()
	defer d.resume()
	eventually(t, func() error {
		c.set(leader, "k", "v")
		return w.metricsOf(web, follower).are(series{"rkv_ready": 0, "rkv_has_leader": 1})
	})
}

func faultLeaderChanges(t *testing.T) {
	c, w, web := watched(t, 3)
	c.init(1, 2, 3)
	leader := c.settled(1, 2, 3)
	before := w.metricsOf(web, 1)["rkv_leader_changes_total"]
	for range 6 {
		to := 1 + leader%3
		c.transfer(leader, to)
		leader = c.settled(1, 2, 3)
	}
	if after := w.metricsOf(web, 1)["rkv_leader_changes_total"]; after <= before+5 {
		t.Errorf("%v leaders, %v before", after, before)
	}
}

func faultVoterIsMissing(t *testing.T) {
	c, w, web := watched(t, 3)
	c.init(1, 2, 3)
	leader := c.settled(1, 2, 3)
	away := 1 + leader%3
	connected := fmt.Sprintf(`rkv_peer_connected{peer="%d"}`, away)
	w.tells(web, leader, series{"rkv_may_restart": 1, connected: 1})
	c.kill(away)
	eventually(t, func() error {
		leader = c.settledAmong(leader, away)
		return w.metricsOf(web, leader).are(series{"rkv_may_restart": 0, `rkv_role{role="leader"}`: 1, connected: 0})
	})
}

// settledAmong returns who leads the nodes 1 to 3 but for one that is away.
func (c *testCluster) settledAmong(via, away uint64) uint64 {
	m, err := c.metrics(via)
	if err != nil || m.Leader == nil || m.Leader.Id == away {
		return via
	}
	return m.Leader.Id
}

func faultTooSlow(t *testing.T) {
	const offered = 4 * busyValue
	b := newBusyLeader(t, offered)
	s := &server{n: b.n, net: newNetwork(b.n, quiet(), nil)}
	told := func() series {
		var text metricsText
		facts := b.n.facts()
		s.writePeers(&text, &facts)
		all, _ := parseSeries(t, string(text.b))
		return all
	}
	for range 100 {
		b.follow(offered)
	}
	if err := told().are(series{`rkv_peer_lagging{peer="3"}`: 0}); err != nil {
		t.Error(err)
	}
	for i := 0; told().are(series{`rkv_peer_lagging{peer="3"}`: 1}) != nil; i++ {
		if i > 2000 {
			t.Fatal("it is not given up")
		}
		b.follow(busyValue)
	}
}

func faultQuota(t *testing.T) {
	c, w, web := watched(t, 1, func(o *options) { o.maxStoreBytes = minStoreBytes })
	c.init(1)
	used := func() float64 {
		all := w.metricsOf(web, 1)
		return all["rkv_quota_used_bytes"] / all["rkv_quota_bytes"]
	}
	for i := 0; used() <= 0.8; i++ {
		c.set(1, fmt.Sprint(i), strings.Repeat("v", 64<<10))
	}
	w.tells(web, 1, series{"rkv_writes_refused": 0, `rkv_refused_total{why="quota"}`: 0})
	_, err := c.nodes[1].Set(c.ctx, &kvpb.SetRequest{Key: "k", Value: make([]byte, minStoreBytes/2)})
	wantError(t, err, codes.ResourceExhausted, "QUOTA")
	w.tells(web, 1, series{"rkv_writes_refused": 1, `rkv_refused_total{why="quota"}`: 1})
}

// faultDiskNearlyFull: a log that may become larger than the disk.
func faultDiskNearlyFull(t *testing.T) {
	w := &webs{t: t}
	c, _ := newDurable(t, 1, w.set, func(o *options) { o.logBytes = maxLogBytes })
	web := newWebClient(t, "", "")
	c.init(1)
	eventually(t, func() error {
		all := w.metricsOf(web, 1)
		if free, reserve := all["rkv_disk_free_bytes"], all["rkv_disk_reserve_bytes"]; free >= 1.5*reserve {
			return fmt.Errorf("%v bytes are free, the reserve is %v", free, reserve)
		}
		return all.are(series{"rkv_writes_refused": 1})
	})
}

func faultDiskSlow(t *testing.T) {
	withFakeClock(t, func(t *testing.T) {
		counts := newDiskCounts()
		w, _, err := openWAL(slowFS{newSimFS(), 200 * time.Millisecond}, "dir", walOptions{id: 1, logger: quiet(), background: func(f func()) { f() }, counts: &counts})
		if err != nil {
			t.Fatal(err)
		}
		defer w.close()
		before := float64(counts.syncSeconds.count())
		for range 10 {
			if err := w.append(&kvpb.LogBatch{}); err != nil {
				t.Fatal(err)
			}
		}
		var text metricsText
		text.begin("x", "histogram", "")
		text.histogram(counts.syncSeconds)
		all, _ := parseSeries(t, string(text.b))
		if slow := all[`x_bucket{le="0.25"}`] - all[`x_bucket{le="0.1"}`]; slow < 10 || before > slow {
			t.Errorf("%v syncs took more than 0.1 s: %s", slow, text.b)
		}
	})
}

func faultCertificateEnds(t *testing.T) {
	w := &webs{t: t}
	c := newCluster(t, 0, w.set)
	var ca *authority
	c.pki, ca = testPKI(t, 1)
	testCertificate(t, ca, c.pki, "node1", "node/1", func(x *x509.Certificate) { x.NotAfter = time.Now().Add(10 * 24 * time.Hour) })
	c.start(1, "127.0.0.1:0")
	left := w.metricsOf(newWebClient(t, c.pki, "reader"), 1)["rkv_certificate_not_after_timestamp_seconds"] - float64(time.Now().Unix())
	if left >= 14*24*3600 || left <= 0 {
		t.Errorf("%v s are left", left)
	}
}

func faultOverloaded(t *testing.T) {
	c, w, web := watched(t, 1)
	c.init(1)
	refused := func(why string) string { return fmt.Sprintf(`rkv_refused_total{why=%q}`, why) }
	before := w.tells(web, 1, series{refused("calls"): 0, refused("queue"): 0})
	l, in := c.nodes[1].server.limiter, &c.nodes[1].server.n.inbox
	in.mu.Lock()
	queued := in.queuedCalls
	in.queuedCalls = 0
	in.mu.Unlock()
	wantError(t, getError(c, 1, false), codes.ResourceExhausted, "OVERLOADED")
	in.mu.Lock()
	in.queuedCalls = queued
	in.mu.Unlock()
	l.calls.mu.Lock()
	l.calls.limit = 0
	l.calls.mu.Unlock()
	wantError(t, getError(c, 1, true), codes.ResourceExhausted, "OVERLOADED")
	const code = `rkv_calls_total{method="raftkv.v1.KVService/Get",code="RESOURCE_EXHAUSTED"}`
	w.tells(web, 1, series{refused("calls"): 1, refused("queue"): 1, code: before[code] + 2})
}

func faultStrangers(t *testing.T) {
	w := &webs{t: t}
	c := newSecureCluster(t, 1, w.set)
	reader := newWebClient(t, c.pki, "reader")
	const refused = `rkv_refused_total{why="role"}`
	before := w.tells(reader, 1, series{refused: 0, `rkv_refused_total{why="handshake"}`: 0})
	conn := dialNode(t, c.nodes[1].address, testCredentials(t, c.pki, "reader", c.nodes[1].address))
	defer func() { _ = conn.Close() }()
	for range 21 {
		_, err := kvpb.NewKVServiceClient(conn).Set(c.ctx, &kvpb.SetRequest{Key: "k"})
		wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED")
	}
	const code = `rkv_calls_total{method="raftkv.v1.KVService/Set",code="PERMISSION_DENIED"}`
	w.tells(reader, 1, series{refused: before[refused] + 21, code: before[code] + 21})
	_ = refusedBy(t, c.nodes[1].address, testCredentials(t, "", "", ""))
	eventually(t, func() error {
		if w.metricsOf(reader, 1)[`rkv_refused_total{why="handshake"}`] == 0 {
			return fmt.Errorf("a handshake that has failed is not counted")
		}
		return nil
	})
}
