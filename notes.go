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

// laggards are the members that their cluster's leader says are too slow to catch up.
func (s *survey) laggards() []*kvpb.MemberStatus {
	var slow []*kvpb.MemberStatus
	for _, id := range slices.Sorted(maps.Keys(s.views)) {
		for _, m := range s.views[id].GetMembers() {
			if m.Lagging != "" {
				slow = append(slow, m)
			}
		}
	}
	return slow
}

// refusalLines say which nodes refuse Sets, and why.
func (s *survey) refusalLines() string {
	var lines strings.Builder
	for _, r := range s.rows {
		if why := r.metrics.GetWritesRefused(); why != "" {
			fmt.Fprintf(&lines, "node %d refuses Sets: %s\n", r.NodeID, why)
		}
	}
	return lines.String()
}

// programLines say which programs the nodes of a cluster run, and what keeps its level from
// rising, if some of them speak a higher one.
func (s *survey) programLines(cluster uint64) string {
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
		return "" // programs without levels
	}
	lines := fmt.Sprintf("the cluster is of level %d\n", level)
	for _, program := range slices.Sorted(maps.Keys(runs)) {
		lines += fmt.Sprintf("%s: %s\n", nodeList(runs[program]), program)
	}
	for _, r := range s.rows {
		isMember := r.ClusterID == cluster && r.Reachable
		if isMember && r.metrics.ProgramLevel < level {
			lines += fmt.Sprintf("node %d is refused, for its program is too old: start a newer one there\n", r.NodeID)
		}
	}
	if holds := s.holdsLevel(cluster, level); speaks > level && len(holds) > 0 {
		lines += fmt.Sprintf("the level rises once %s\n", strings.Join(holds, ", and "))
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

// certificateLines name the nodes whose certificates end soon, the first to end first; if
// there are none, the node whose certificate ends first.
func (s *survey) certificateLines() string {
	var secure []*memberRow
	for _, r := range s.rows {
		if _, isSecure := r.certificateEnd(); isSecure {
			secure = append(secure, r)
		}
	}
	if len(secure) == 0 {
		return ""
	}
	slices.SortStableFunc(secure, func(a, b *memberRow) int {
		return cmp.Compare(a.metrics.CertificateNotAfter, b.metrics.CertificateNotAfter)
	})
	var lines strings.Builder
	for _, r := range secure {
		if r.CertificateEndsSoon {
			end, _ := r.certificateEnd()
			fmt.Fprintf(&lines, "replace the certificate of node %d: it ends at %s\n", r.NodeID, clockText(end))
		}
	}
	if lines.Len() > 0 {
		return lines.String()
	}
	end, _ := secure[0].certificateEnd()
	return fmt.Sprintf("the first certificate to end is that of node %d, at %s\n", secure[0].NodeID, clockText(end))
}
