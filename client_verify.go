// The sub-command verify.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"raft-key-value/kvpb"
)

// verification is what verify prints. 64-bit numbers are strings, as they are in protobuf's JSON.
type verification struct {
	Kind      string `json:"kind"`
	ClusterID uint64 `json:"cluster_id,string"`
	NodeID    uint64 `json:"node_id,string"` // of a directory, else 0
	RaftID    uint64 `json:"raft_id,string"` // of a directory, else 0
	Level     uint32 `json:"level"`
	Index     uint64 `json:"index,string"`
	Term      uint64 `json:"term,string"`
	Committed uint64 `json:"committed,string"` // the last entry that is known to be
	Version   uint64 `json:"version,string"`
	Keys      uint64 `json:"keys,string"`
	Sessions  uint64 `json:"sessions,string"`

	SnapshotIndex uint64   `json:"snapshot_index,string"` // of a directory, else 0
	Torn          string   `json:"torn"`                  // of a directory: where; empty: nowhere
	LeftOver      []string `json:"left_over"`             // of a directory
}

// kinds are the words for a verification.Kind.
var kinds = map[string]string{
	"backup_of_cluster":   "a backup of a cluster",
	"backup_of_directory": "a backup of a data directory",
	"snapshot":            "a snapshot that is not marked as a backup",
	"directory":           "a data directory",
}

// verify checks a backup or a data directory.
func (c *client) verify(ctx context.Context) error {
	path := c.args[0]
	if path != "-" {
		if _, err := os.Stat(path); err != nil {
			return err
		}
	}
	v, err := c.check(ctx, path)
	if err != nil && isDamage(err) {
		return noError("damaged: %v", err)
	}
	if err != nil {
		return err
	}
	return c.print(v, v.text())
}

func (c *client) check(ctx context.Context, path string) (*verification, error) {
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		return c.checkDirectory(ctx, path)
	}
	f, err := openSaved(ctx, path, c.stdin)
	if err != nil {
		return nil, err
	}
	defer f.close()
	_, h, err := f.scan(snapshotScan{
		countsOnly: true,
		check:      checkOriginIsKnown,
		say:        c.progressOf("reading", "keys"),
	})
	if err != nil {
		return nil, err
	}
	return verificationOf(h), nil
}

func (c *client) checkDirectory(ctx context.Context, dir string) (*verification, error) {
	saved, err := c.readDirectory(ctx, dir)
	if err != nil {
		return nil, err
	}
	v := verificationOf(saved.store.header())
	v.Kind = "directory"
	v.NodeID = saved.identity.NodeId
	v.RaftID = saved.identity.RaftId
	v.Committed = saved.committed
	v.SnapshotIndex = saved.snapshot
	v.Torn = saved.torn
	v.LeftOver = append(v.LeftOver, saved.leftOver...)
	return v, nil
}

// verificationOf is what the header of a snapshot says.
func verificationOf(h *kvpb.SnapshotHeader) *verification {
	v := &verification{
		Kind:      "snapshot",
		ClusterID: h.ClusterId,
		Level:     h.Level,
		Index:     h.Index,
		Term:      h.Term,
		Committed: h.Index,
		Version:   h.Version,
		Keys:      h.Keys,
		Sessions:  h.Sessions,
		LeftOver:  []string{}, // In JSON it is a list, not null.
	}
	switch h.Origin {
	case kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_CLUSTER:
		v.Kind = "backup_of_cluster"
	case kvpb.SnapshotOrigin_SNAPSHOT_ORIGIN_DIRECTORY:
		v.Kind = "backup_of_directory"
		v.Committed = h.Committed
	}
	return v
}

func (v *verification) text() string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-11s"+format+"\n", append([]any{name + ":"}, args...)...)
	}
	line("whole", "%s", kinds[v.Kind])
	if v.Kind == "snapshot" {
		line("but", "out of a data directory, it lacks what was written later: that is in the log beside it")
	}
	line("cluster", "%016x", v.ClusterID)
	line("level", "%d", v.Level)
	if v.Kind == "directory" {
		line("node", "%d, raft ID %x", v.NodeID, v.RaftID)
		line("snapshot", "entry %d", v.SnapshotIndex)
	}
	line("entry", "%d of term %d", v.Index, v.Term)
	if v.Committed < v.Index {
		line("committed", "entry %d; the later ones may be, or not", v.Committed)
	}
	line("version", "%d", v.Version)
	line("keys", "%d", v.Keys)
	line("sessions", "%d", v.Sessions)
	if v.Torn != "" {
		line("torn", "%s: the log's last batch is cut, as a loss of power leaves one that was not acknowledged yet; "+
			"sectors of it that were lost later look the same", v.Torn)
	}
	if len(v.LeftOver) > 0 {
		line("left over", "%s: not read, for they do not count", strings.Join(v.LeftOver, ", "))
	}
	return b.String()
}

// isDamage reports whether an error of reading a backup or a directory means that it is damaged, and
// not that it cannot be read, or is another thing.
func isDamage(err error) bool {
	isNothing := errors.Is(err, errNothingSaved) || errors.Is(err, errNeverFinished)
	_, isOther := errors.AsType[notSnapshot](err)
	cannot := isNothing || isOther || errors.Is(err, errUsedMeanwhile)
	return !cannot && !isUnreadable(err)
}
