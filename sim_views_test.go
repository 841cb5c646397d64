// What the simulator's clients list and scan: a view of a node, in pages, with turns of
// the cluster in between. What it shows is what the log had made of the range by its
// version.

package main

// pageSize bounds a page.
type pageSize struct{ items, bytes int }

// drawBounds draws a range that is not everything.
func (s *sim) drawBounds() bounds {
	one, other := s.drawKey(), s.drawKey()
	switch s.rng.IntN(6) {
	case 0:
		return bounds{prefix: "k"}
	case 1:
		return bounds{prefix: one}
	case 2:
		return bounds{start: one}
	case 3:
		return bounds{end: one}
	}
	if one == other {
		return bounds{start: one, end: one + "\x00"}
	}
	return bounds{start: min(one, other), end: max(one, other)}
}

// drawMinVersion draws a version that a local read waits for: mostly the newest that
// clients know.
func (s *sim) drawMinVersion() uint64 {
	switch s.rng.IntN(4) {
	case 0:
		return 1 + s.rng.Uint64N(s.newest+1)
	case 1:
		return s.newest + 1 + s.rng.Uint64N(3)
	default:
		return max(1, s.newest)
	}
}

// readLocally makes a read a local one. minVersion 0: it waits for nothing.
func (s *sim) readLocally(o *op, minVersion uint64) {
	o.local = true
	o.minVersion = minVersion
	o.atLeast = minVersion
}

// asksNobody reports whether a read begins at once.
func (o *op) asksNobody() bool { return o.local && o.minVersion == 0 }

// drawView makes an op a list or a scan.
func (s *sim) drawView(o *op) {
	o.kind = "scan"
	if s.rng.IntN(3) == 0 {
		o.kind = "list"
	}
	if s.rng.IntN(2) == 0 {
		o.bounds = s.drawBounds()
	}
	o.page = pageSize{items: 1 + s.rng.IntN(2), bytes: 1 << 20}
	if s.rng.IntN(4) == 0 {
		o.page = pageSize{items: 100, bytes: s.rng.IntN(3000)}
	}
	o.pace = []float64{.2, 2, 20, 60}[s.rng.IntN(4)]
	switch s.rng.IntN(4) {
	case 0:
		s.readLocally(o, 0)
	case 1:
		s.readLocally(o, s.drawMinVersion())
	}
	o.key = ""
}

// reading is a view that a client reads.
type reading struct {
	a         *attempt
	v         *view
	left      keyRange  // what it has yet to read
	want      []change  // what the view has to show
	shown     []keyItem // what it has shown
	raftID    uint64    // of the node when the view was opened
	installed uint64    // snapshots, likewise
}

// openView opens the view of a list or a scan, and checks of which moment it is.
func (s *sim) openView(a *attempt) {
	o, p := a.o, a.p
	v, err := p.n.store.openKeys()
	if err != nil {
		o.sent = nil
		o.failed = true
		s.clients[o.client].rest()
		return
	}
	if s.cfg.inPlace {
		p.n.store.tree.epoch-- // as if there was no view
	}
	o.view = v
	o.version = v.version
	s.checkNewEnough(o, p, v.version)
	if v.version > s.oracle.version || v.version < p.viewed {
		s.failf("I2: a view of %v is of version %d, committed is %d; one before it was of %d",
			p, v.version, s.oracle.version, p.viewed)
	}
	p.viewed = v.version
	s.newest = max(s.newest, v.version)
	if all := s.oracle.asOf(v.version, bounds{}); v.keys != uint64(len(all)) {
		s.failf("I2: a view of %v of version %d says that it has %d keys, it has %d", p, v.version, v.keys, len(all))
	}
	b := o.bounds
	s.readPage(&reading{
		a:         a,
		v:         v,
		left:      rangeOf(b.prefix, b.start, b.end),
		want:      s.oracle.asOf(v.version, b),
		raftID:    p.n.id.raftID,
		installed: p.n.status.count.SnapshotsInstalled,
	})
	s.count["views opened"]++
}

// checkNewEnough checks of which version a read is that a node has begun.
func (s *sim) checkNewEnough(o *op, p *proc, version uint64) {
	if version < o.atLeast {
		s.failf("I1: %v through %v is of version %d; version %d was known when it began, or asked for",
			o, p, version, o.atLeast)
	}
}

// readPage reads the next page of a view. If its process dies, the client gives up in time.
func (s *sim) readPage(r *reading) {
	o, p := r.a.o, r.a.p
	if o.sent != r.a {
		return
	}
	items, more, err := r.v.page(r.left, o.page.items, o.page.bytes)
	s.checkEnded(r, err)
	if err != nil {
		s.count["views ended by a snapshot"]++
		o.failed = true
		s.endView(r)
		return
	}
	s.checkPage(r, items, more)
	s.count["pages"]++
	isRead := !more || o.kind == "list"
	if isRead {
		o.ended = s.tock()
		s.endView(r)
		s.count["views read to the end"]++
		return
	}
	r.left = r.left.after(items[len(items)-1].key)
	s.after(s.expo(o.pace), p, func() { s.readPage(r) })
}

// endView has the client let go of a view, and go on.
func (s *sim) endView(r *reading) {
	o := r.a.o
	r.v.close()
	o.view = nil
	o.sent = nil
	s.clients[o.client].rest()
}

// checkEnded checks that a view has ended if a snapshot, or the loss of a membership, has
// replaced what it is of, and not otherwise.
func (s *sim) checkEnded(r *reading, err error) {
	n := r.a.p.n
	var want error
	wasReplaced := n.id.raftID != r.raftID || n.status.count.SnapshotsInstalled != r.installed
	if wasReplaced {
		want = errViewEnded
	}
	if err != want {
		s.failf("a page of %v at %v: %v; want %v", r.a.o, r.a.p, err, want)
	}
}

// checkPage checks that a page has the next items, as many as it may and not one more, and
// that earlier pages are as they were.
func (s *sim) checkPage(r *reading, items []keyItem, more bool) {
	o := r.a.o
	rest := r.want[len(r.shown):]
	bytes := 0
	fits := 0
	for _, c := range rest {
		bytes += len(c.key) + len(c.value)
		isFull := fits == o.page.items || bytes > o.page.bytes
		if isFull && fits > 0 {
			break
		}
		fits++
	}
	isWhole := fits == len(rest)
	if len(items) != fits || more == isWhole {
		s.failf("I2: a page of %v has %d items, more %v; it has to have %d, of %d",
			o, len(items), more, fits, len(rest))
	}
	r.shown = append(r.shown, items...)
	for i, it := range r.shown {
		want := r.want[i]
		isIt := string(it.key) == want.key && want.isFoundAs(true, it.version, string(it.value))
		if !isIt {
			s.failf("I2: %v through %v of version %d shows %s, %.12q of version %d; it has to show %+v",
				o, r.a.p, r.v.version, it.key, it.value, it.version, want)
		}
	}
}
