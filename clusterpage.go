// The page that shows the cluster, and the same as JSON: what status prints, as the members
// that this node knows say it.

package main

import (
	"context"
	"crypto/sha256"
	_ "embed" // for page.html
	"encoding/base64"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

//go:embed page.html
var pageHTML string

const (
	// surveyTimeout bounds a survey: a second for each of the rounds in which nodes name
	// others.
	surveyTimeout = 4 * time.Second
	// surveyAskTimeout is how long a node may take to answer.
	surveyAskTimeout = time.Second
	// surveyAge is how old a survey may be that is shown: all who look in a second share one.
	surveyAge = time.Second
)

// pagePolicy has a browser run the page's own script and nothing else, and talk to this node
// alone: whatever a key or an address might bring into the page does nothing.
var pagePolicy = "default-src 'none'; connect-src 'self'; img-src data:; " +
	"script-src " + hashOf("script") + "; style-src " + hashOf("style") + "; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// hashOf is the hash, as a policy has it, of what stands in an element of the page.
func hashOf(element string) string {
	_, rest, _ := strings.Cut(pageHTML, "<"+element+">")
	text, _, _ := strings.Cut(rest, "</"+element+">")
	hash := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "'"
}

// clusterStatus is what /status answers. Besides what status -o json prints, it has who says it.
type clusterStatus struct {
	Time    time.Time    `json:"time"` // of the survey, by the node's clock
	Node    uint64       `json:"node_id,string"`
	Address string       `json:"address"`
	Summary *summary     `json:"summary"`
	Members []*memberRow `json:"members"`
	Notes   []note       `json:"notes"`
	Calls   *callCurves  `json:"calls"` // of this node alone
}

// clusterView has the last survey that was made.
type clusterView struct {
	ctx    context.Context                      // ends with the HTTP server
	survey func(context.Context) *clusterStatus // makes one

	mu     sync.Mutex // held meanwhile: whoever looks then sees what comes of it
	latest *clusterStatus
}

// show answers with a survey that is at most surveyAge old. It does not end with the request that
// has begun it, for others may wait for it.
func (v *clusterView) show() *clusterStatus {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.latest == nil || time.Since(v.latest.Time) >= surveyAge {
		ctx, cancel := context.WithTimeout(v.ctx, surveyTimeout)
		defer cancel()
		v.latest = v.survey(ctx)
	}
	return v.latest
}

// surveyor makes surveys of the cluster as a node knows it.
type surveyor struct {
	s      *server
	plan   *startPlan
	curves *callRecorder
}

// survey asks all nodes.
func (y *surveyor) survey(ctx context.Context) *clusterStatus {
	others, ids := y.others()
	own := []*endpoint{y.askItself(ctx)}
	found := newSurvey(askEverybody(ctx, own, others, func(addresses []string) []*endpoint {
		return y.ask(ctx, addresses, ids)
	}))
	found.leaveOutStrangers()
	self := y.s.n.self
	return &clusterStatus{
		Time:    time.Now(),
		Node:    self.Id,
		Address: self.Address,
		Summary: summarize(found.facts()),
		Members: found.rows,
		Notes:   found.notes(),
		Calls:   y.curves.latest(),
	}
}

// askItself is what this node says, which needs no connection: so it is told also if its
// certificate has ended, or nobody reaches it.
func (y *surveyor) askItself(ctx context.Context) *endpoint {
	ctx, cancel := context.WithTimeout(ctx, surveyAskTimeout)
	defer cancel()
	e := &endpoint{address: y.s.n.self.Address}
	e.metrics, e.err = y.s.Metrics(ctx, &kvpb.MetricsRequest{})
	return e
}

// ask asks nodes, all at the same time. At an address that one of ids has, that node has to
// answer, whose certificate need not have the address.
func (y *surveyor) ask(ctx context.Context, addresses []string, ids map[string]uint64) []*endpoint {
	var asked sync.WaitGroup
	var endpoints []*endpoint
	for _, address := range addresses {
		e := &endpoint{address: address}
		endpoints = append(endpoints, e)
		asked.Go(func() {
			conn := y.s.net.dialer.newConn(&kvpb.Node{Id: ids[address], Address: address})
			defer func() { _ = conn.Close() }()
			short, cancel := context.WithTimeout(ctx, surveyAskTimeout)
			defer cancel()
			e.metrics, e.err = kvpb.NewClusterServiceClient(conn).Metrics(short, &kvpb.MetricsRequest{})
			if e.err != nil && isOutOfTime(short) {
				e.err = status.Errorf(codes.DeadlineExceeded, "no answer in %v", surveyAskTimeout)
			}
		})
	}
	asked.Wait()
	return endpoints
}

// others are the addresses to ask: those of the members that this node knows, whose ids it
// returns, too, and those that it was started with, where another cluster may be by mistake.
func (y *surveyor) others() (addresses []string, ids map[string]uint64) {
	ids = map[string]uint64{}
	add := func(address string) {
		isOwn := address == y.s.n.self.Address
		if !isOwn && !slices.Contains(addresses, address) {
			addresses = append(addresses, address)
		}
	}
	for _, m := range sortedMembers(y.s.n.status.latest.Load().members) {
		ids[m.Node.Address] = m.Node.Id
		add(m.Node.Address)
	}
	for _, m := range y.plan.members {
		add(m.Address)
	}
	for _, address := range y.plan.join {
		add(address)
	}
	return addresses, ids
}

// leaveOutStrangers leaves out addresses at which nobody answers and no cluster has a member,
// once there is a cluster: those of the flags --initial-cluster and --join may be of long ago.
func (s *survey) leaveOutStrangers() {
	if len(s.views) == 0 {
		return
	}
	s.rows = slices.DeleteFunc(s.rows, func(r *memberRow) bool { return r.NodeID == 0 && !r.Reachable })
}

// status answers with the cluster as JSON.
func (v *clusterView) status(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v.show()) // fails only if the other end has gone
}

// page answers with the page, which asks for /status itself.
func (v *clusterView) page(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", pagePolicy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	_, _ = w.Write([]byte(pageHTML)) // fails only if the other end has gone
}
