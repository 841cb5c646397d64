// Package conflict lets one program use both etcd's messages and ours: each
// has a file that it calls kv.proto, on which protobuf panics when the program
// starts. No message of the one has the name of one of the other.
//
// It imports nothing but os, and its path sorts before that of kvpb: so Go
// initialises it first.
package conflict

import "os"

func init() { _ = os.Setenv("GOLANG_PROTOBUF_REGISTRATION_CONFLICT", "ignore") }
