// What status and the page say below the table of members: what an operator should look at,
// and which programs run.

package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"raft-key-value/kvpb"
)

// note is a sentence about nodes. It is printed with -o json.
type note struct {
	// Attention says that an operator should look at it.
	Attention bool   `json:"attention"`
	Text      string `json:"text"`
}

// notes are what is to be said besides the summary and the table: first what an operator
// should look at.
func (s *survey) notes() []note {
	notes := []note{} // In JSON it is a list, not null.
	add := func(attention bool, lines []string) {
		for _, text := range lines {
			notes = append(notes, note{attention, text})
		}
	}
	add(true, s.laggardLines())
	add(true, s.refusalLines())
	add(true, s.slowLines())
	add(true, s.fullLines())
	add(true, s.certificateLines())
	for _, id := range slices.Sorted(maps.Keys(s.views)) {
		add(false, s.programLines(id))
	}
	add(false, s.firstCertificateLine())
	return notes
}

// laggardLines name the members that their cluster's leader says are too slow to catch up.
func (s *survey) laggardLines() []string {
	var lines []string
	for _, id := range slices.Sorted(maps.Keys(s.views)) {
		for _, m := range s.views[id].GetMembers() {
			if m.Lagging != "" {
				lines = append(lines, fmt.Sprintf("node %d is %s", m.Node.GetId(), m.Lagging))
			}
		}
	}
	return lines
}

// refusalLines say which nodes refuse Sets, and why.
func (s *survey) refusalLines() []string {
	var lines []string
	for _, r := range s.rows {
		if why := r.metrics.GetWritesRefused(); why != "" {
			lines = append(lines, fmt.Sprintf("node %d refuses Sets: %s", r.NodeID, why))
		}
	}
	return lines
}

// slowLines say what took long at which node in the last minute.
func (s *survey) slowLines() []string {
	var lines []string
	for _, r := range s.rows {
		for _, text := range r.metrics.GetSlow() {
			lines = append(lines, fmt.Sprintf("slow at node %d: %s", r.NodeID, text))
		}
	}
	return lines
}

// fullLines say which clusters have nearly used their quota.
func (s *survey) fullLines() []string {
	var lines []string
	for _, id := range slices.Sorted(maps.Keys(s.views)) {
		view := s.views[id]
		if view.GetWritesRefused() == "" && isNearlyFull(view) {
			lines = append(lines, fmt.Sprintf("%d of %d MiB that may be stored are used: soon Sets are refused",
				view.QuotaUsed>>20, view.Quota>>20))
		}
	}
	return lines
}

// isNearlyFull reports whether nine tenths of the quota are used.
func isNearlyFull(m *kvpb.MetricsResponse) bool {
	return m.GetQuota() > 0 && m.QuotaUsed >= m.Quota-m.Quota/10
}

// programLines say which programs the nodes of a cluster run, and what keeps its level from
// rising, if some of them speak a higher one.
func (s *survey) programLines(cluster uint64) []string {
	level := s.views[cluster].GetLevel()
	speaks := uint32(0) // of all nodes that answer, the most
	runs := map[string][]uint64{}
	for _, r := range s.rows {
		if r.ClusterID == cluster && r.Reachable {
			speaks = max(speaks, r.metrics.ProgramLevel)
			program := fmt.Sprintf("%s, which speaks level %d", r.metrics.BuildVersion, r.metrics.ProgramLevel)
			runs[program] = append(runs[program], r.NodeID)
		}
	}
	if speaks == 0 {
		return nil // programs without levels
	}
	which := "the cluster"
	if len(s.views) > 1 {
		which = fmt.Sprintf("cluster %016x", cluster)
	}
	lines := []string{fmt.Sprintf("%s is of level %d", which, level)}
	for _, program := range slices.Sorted(maps.Keys(runs)) {
		lines = append(lines, fmt.Sprintf("%s: %s", nodeList(runs[program]), program))
	}
	for _, r := range s.rows {
		isMember := r.ClusterID == cluster && r.Reachable
		if isMember && r.metrics.ProgramLevel < level {
			lines = append(lines, fmt.Sprintf("node %d is refused, for its program is too old: start a newer one there", r.NodeID))
		}
	}
	if holds := s.holdsLevel(cluster, level); speaks > level && len(holds) > 0 {
		lines = append(lines, "the level rises once "+strings.Join(holds, ", and "))
	}
	return lines
}

// holdsLevel says what has to happen before the level of a cluster can rise.
func (s *survey) holdsLevel(cluster uint64, level uint32) []string {
	var holds []string
	for _, r := range s.rows {
		if r.ClusterID != cluster || r.NodeID == 0 {
			continue
		}
		switch {
		case !r.Reachable:
			holds = append(holds, fmt.Sprintf("node %d answers", r.NodeID))
		case r.metrics.ProgramLevel <= level:
			holds = append(holds, fmt.Sprintf("node %d runs a newer program", r.NodeID))
		case r.metrics.RisesTo <= level:
			holds = append(holds, fmt.Sprintf("node %d is started without --max-level", r.NodeID))
		case findMember(s.views[cluster], r.NodeID).GetRisesTo() == 0:
			holds = append(holds, fmt.Sprintf("the leader is connected to node %d", r.NodeID))
		}
	}
	return holds
}

// certificateEnd is when the node's certificate ends; false: none is known.
func (r *memberRow) certificateEnd() (time.Time, bool) {
	end := r.metrics.GetCertificateNotAfter()
	return time.Unix(end, 0), end != 0
}

// byCertificate are the nodes that have certificates, the first to end first.
func (s *survey) byCertificate() []*memberRow {
	var secure []*memberRow
	for _, r := range s.rows {
		if _, isSecure := r.certificateEnd(); isSecure {
			secure = append(secure, r)
		}
	}
	slices.SortStableFunc(secure, func(a, b *memberRow) int {
		return cmp.Compare(a.metrics.CertificateNotAfter, b.metrics.CertificateNotAfter)
	})
	return secure
}

// certificateLines name the nodes whose certificates end soon, or have ended: then the node does
// not answer, or those that it calls do not.
func (s *survey) certificateLines() []string {
	var lines []string
	for _, r := range s.rows {
		if strings.Contains(r.Error, "certificate has expired") {
			lines = append(lines, fmt.Sprintf("replace the certificate of node %d at %s: it has ended, or a clock is wrong", r.NodeID, r.Address))
		}
	}
	for _, r := range s.byCertificate() {
		if r.CertificateEndsSoon {
			end, _ := r.certificateEnd()
			lines = append(lines, fmt.Sprintf("replace the certificate of node %d: it ends at %s", r.NodeID, clockText(end)))
		}
	}
	return lines
}

// firstCertificateLine names the node whose certificate ends first, if none ends soon.
func (s *survey) firstCertificateLine() []string {
	secure := s.byCertificate()
	if len(secure) == 0 || secure[0].CertificateEndsSoon {
		return nil
	}
	end, _ := secure[0].certificateEnd()
	return []string{fmt.Sprintf("the first certificate to end is that of node %d, at %s", secure[0].NodeID, clockText(end))}
}
