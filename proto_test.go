package main

import (
	"strings"
	"testing"

	"go.etcd.io/raft/v3/tracker"

	"raft-key-value/kvpb"
)

// TestRegisteredNames checks the names that all protobuf files of a program share: a
// program that links another kv.proto, such as etcd's client, panics at its start if
// this one is registered under that name.
func TestRegisteredNames(t *testing.T) {
	t.Parallel()
	file := kvpb.File_raftkv_v1_kv_proto
	wantText(t, "the file's path", file.Path(), "raftkv/v1/kv.proto")
	wantText(t, "the file's package", string(file.Package()), "raftkv.v1")
}

// TestProgressStates checks that metrics name a state of raft's tracker as raft does.
func TestProgressStates(t *testing.T) {
	t.Parallel()
	for _, state := range []tracker.StateType{tracker.StateProbe, tracker.StateReplicate, tracker.StateSnapshot} {
		want := "PROGRESS_STATE_" + strings.ToUpper(strings.TrimPrefix(state.String(), "State"))
		wantText(t, state.String(), kvpb.ProgressState(state+1).String(), want)
	}
}
