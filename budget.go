// The budget: what each part of a node may take of its memory.
//
//	memory    of the cgroup, or of the machine if that has less
//	- 1/8     for what Go does not count: the program, sockets, the page cache
//	= goal    Go's memory limit
//	- 24 MiB  of an idle node
//	- 1/6     of the goal, 256 MiB at most: what clients may occupy
//	- 4/48    of it, four times 64 MiB at most: the log, which a leader keeps longer for who is behind
//	- 1/24    of it, 64 MiB at most: the history for watches
//	- 1/24    of it, 64 MiB at most: what views of clients keep
//	- 1/24    of it, 64 MiB at most: writes that are queued and in flight
//	= 4 times the store: the keys and values in pages, which are not full, and the answers that
//	          sessions remember, in slices that are not full; what is replaced of all
//	          these while a snapshot is on its way, or a second store while one comes in; as
//	          much log, for who catches up; and a quarter that views may keep besides

package main

import (
	"bufio"
	"cmp"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
)

const (
	idleBytes = 24 << 20
	// clientBytes is what clients may occupy of a node that has memory enough: all limits of
	// calls, requests, answers and watches are made for it.
	clientBytes = 256 << 20
	// queuedBytes bounds what of writes is in the inbox, and what raft has not committed.
	queuedBytes = maxQueuedBytes
)

// budget is the memory that parts of a node may take, in bytes.
type budget struct {
	memory  uint64 // that the process may take; 0: nobody says
	from    string // who says so
	goal    uint64 // Go's memory limit, without the ballast; 0: none
	ballast uint64
	clients uint64
	log     uint64 // --log-bytes
	watch   uint64 // --watch-bytes
	views   uint64
	queued  uint64
	store   uint64 // --max-store-bytes
}

// memoryFound is what the process may take of memory, as found out.
type memoryFound struct {
	bytes   uint64 // 0: nobody says
	from    string
	goLimit uint64 // that the environment sets, GOMEMLIMIT; 0: it does not
}

// goal is what Go may take; 0: nobody says.
func (m memoryFound) goal() uint64 {
	allowed := m.bytes - m.bytes/8
	if m.goLimit != 0 && (allowed == 0 || m.goLimit < allowed) {
		return m.goLimit
	}
	return allowed
}

// budgetOf divides memory. What flags have set, it takes as it is: the store gets what they
// leave.
func budgetOf(m memoryFound, o *options) budget {
	b := budget{memory: m.bytes, from: m.from, goal: m.goal()}
	if b.goal == 0 {
		b.ballast = ballastBytes
		b.clients = clientBytes
		b.log = o.logBytes
		b.watch = o.watchBytes
		b.views = minViewBytes
		b.queued = queuedBytes
		b.store = cmp.Or(o.maxStoreBytes, math.MaxUint64)
		return b
	}
	b.ballast = min(ballastBytes, b.goal/16)
	b.clients = min(clientBytes, b.goal/6)
	b.log = min(o.logBytes, max(minLogBytes, b.goal/48))
	if o.given["log-bytes"] {
		b.log = o.logBytes
	}
	b.watch = min(o.watchBytes, max(minWatchBytes, b.goal/24))
	if o.given["watch-bytes"] {
		b.watch = o.watchBytes
	}
	b.views = min(minViewBytes, b.goal/24)
	b.queued = min(queuedBytes, max(minQueuedBytes, b.goal/24))
	taken := idleBytes + b.clients + 4*b.log + b.watch + b.views + b.queued
	b.store = minStoreBytes
	if b.goal > taken {
		b.store = max(minStoreBytes, (b.goal-taken)/4)
	}
	if o.maxStoreBytes != 0 {
		b.store = o.maxStoreBytes
	}
	return b
}

// minQueuedBytes is room for a few writes of the largest kind.
const minQueuedBytes = 4 << 20

// apply makes a budget the node's.
func (b *budget) apply(o *options) {
	o.logBytes = b.log
	o.watchBytes = b.watch
	o.maxStoreBytes = b.store
	o.viewBytes = b.views
	o.queuedBytes = b.queued
	o.clientBytes = b.clients
}

// announce logs the budget, and what is doubtful of it.
func (b *budget) announce(logger *slog.Logger, o *options) {
	logger.Info("memory", "bytes", b.memory, "from", b.from, "go_limit", b.goal, "max_store_bytes", b.store,
		"log_bytes", b.log, "watch_bytes", b.watch, "views", b.views, "queued", b.queued, "clients", b.clients)
	if b.memory == 0 && b.goal == 0 && o.maxStoreBytes == 0 {
		logger.Warn("nobody says how much memory there is: the store is not bounded; give --max-store-bytes")
	}
	needed := idleBytes + b.clients + 4*b.log + b.watch + b.views + b.queued + 4*min(b.store, maxStoreBytes)
	if b.goal != 0 && needed > b.goal {
		logger.Warn("the memory may not be enough, if all is used: a smaller --max-store-bytes, --log-bytes or "+
			"--watch-bytes, or more memory", "needed", needed, "go_limit", b.goal)
	}
}

// limitMemory sets Go's memory limit, unless the environment has, and returns the ballast.
func (b *budget) limitMemory(m memoryFound) []byte {
	isUnlimited := m.goLimit == 0 || m.goLimit > b.goal+b.ballast // more than there is does not help
	if isUnlimited && b.goal != 0 {
		debug.SetMemoryLimit(int64(min(b.goal+b.ballast, math.MaxInt64)))
	}
	return make([]byte, b.ballast)
}

// part is a part of a limit that is made for clientBytes, at least so much.
func (o *options) part(limit, least int) int {
	bytes := cmp.Or(o.clientBytes, clientBytes)
	return max(least, int(uint64(limit)*bytes/clientBytes))
}

// findMemory finds out what the process may take of memory: the least of what its cgroups
// and the machine have. root is / but in tests.
func findMemory(root string, env func(string) (string, bool)) memoryFound {
	m := memoryFound{bytes: machineMemory(root), from: "the machine"}
	for _, g := range memoryGroups(root) {
		if limit := g.limit(root); limit != 0 && (m.bytes == 0 || limit < m.bytes) {
			m.bytes = limit
			m.from = "cgroup " + g.dir
		}
	}
	if m.bytes == 0 {
		m.from = "nobody"
	}
	text, _ := env("GOMEMLIMIT")
	isSet := text != "" && text != "off"
	if isSet {
		m.goLimit = uint64(debug.SetMemoryLimit(-1)) // Go has read it
	}
	if isSet && m.goal() == m.goLimit {
		m.from = "GOMEMLIMIT"
	}
	return m
}

// machineMemory is the memory of the machine; 0: it does not say.
func machineMemory(root string) uint64 {
	f, err := os.Open(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return 0
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "MemTotal:" {
			continue
		}
		kilobytes, _ := strconv.ParseUint(words[1], 10, 64)
		return kilobytes << 10
	}
	return 0
}

// memoryGroup is a cgroup that bounds the memory of this process: a directory, and the file
// there that has the bound.
type memoryGroup struct{ dir, file string }

// limit is what a group allows; 0: all.
func (g memoryGroup) limit(root string) uint64 {
	text, err := os.ReadFile(filepath.Join(root, g.dir, g.file))
	if err != nil {
		return 0
	}
	limit, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || limit > math.MaxInt64/2 { // max, or what version 1 has in its place
		return 0
	}
	return limit
}

// memoryGroups returns the groups of this process, of both versions of cgroups, and all
// above them.
func memoryGroups(root string) []memoryGroup {
	paths := map[string]string{} // by controller; empty: version 2
	text, _ := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) < 3 {
			continue
		}
		for _, controller := range strings.Split(parts[1], ",") {
			paths[controller] = parts[2]
		}
	}
	var groups []memoryGroup
	text, _ = os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	for line := range strings.Lines(string(text)) {
		mount, path, file := memoryMount(line, paths)
		if mount == "" {
			continue
		}
		for {
			groups = append(groups, memoryGroup{filepath.Join(mount, path), file})
			if path == "/" {
				break
			}
			path = filepath.Dir(path)
		}
	}
	return groups
}

// memoryMount returns where a line of mountinfo has groups that bound memory, and which of them
// is this process's, by its path below; an empty mount: it has none. In a container, the
// mount may show a part of all groups: then the path is below that part, or it is not
// known, and the mount's own group counts.
func memoryMount(line string, paths map[string]string) (mount, path, file string) {
	words := strings.Fields(line)
	dash := slices.Index(words, "-")
	isMount := len(words) > 6 && dash > 0 && len(words) > dash+3
	if !isMount {
		return "", "", ""
	}
	controller := ""
	file = "memory.max"
	switch words[dash+1] {
	case "cgroup2":
	case "cgroup":
		controller = "memory"
		file = "memory.limit_in_bytes"
		if !slices.Contains(strings.Split(words[dash+3], ","), controller) {
			return "", "", ""
		}
	default:
		return "", "", ""
	}
	path, isIn := paths[controller]
	if !isIn {
		return "", "", ""
	}
	top := words[3]
	below, isBelow := strings.CutPrefix(path, top)
	if top != "/" && !isBelow {
		below = "/"
	}
	if top == "/" {
		below = path
	}
	return words[4], filepath.Join("/", below), file
}
