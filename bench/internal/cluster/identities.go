package cluster

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"

	"raft-key-value/bench/internal/load"
)

// Identities are those of a cluster's members and callers, in a directory that the node's
// program has made. The zero Identities are for a cluster without TLS.
type Identities struct{ dir string }

// MakeIdentities has the node's program make a CA and certificates.
func MakeIdentities(ctx context.Context, binary, dir string, size int) (Identities, error) {
	nodes := ""
	for id := range size {
		nodes += fmt.Sprintf(",%d=127.0.0.1", id+1)
	}
	cmd := exec.CommandContext(ctx, binary, "certs", dir, "--nodes", nodes[1:])
	if out, err := cmd.CombinedOutput(); err != nil {
		return Identities{}, fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	return Identities{dir}, nil
}

// Member is the identity of a member, which servers of etcd and of bare RPC show, too.
func (is Identities) Member(id uint64) load.Identity { return is.of(fmt.Sprint("node", id)) }

// Admin and Client are those of callers.
func (is Identities) Admin() load.Identity  { return is.of("admin") }
func (is Identities) Client() load.Identity { return is.of("client") }

func (is Identities) of(name string) load.Identity {
	if is.dir == "" {
		return load.Identity{}
	}
	return load.Identity{
		Cert: filepath.Join(is.dir, name+".pem"),
		Key:  filepath.Join(is.dir, name+".key"),
		CA:   filepath.Join(is.dir, "ca.pem"),
	}
}
