// Package etcd starts clusters of etcd, each member a process on this machine. It
// alone links etcd, and with it most of this module's requirements.
package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"

	"raft-key-value/bench/internal/cluster"
	"raft-key-value/bench/internal/load"
)

// memberCommand is the hidden sub-command that is a member of etcd: its number,
// its directory, whether it syncs, all members' peer addresses, and the files of its
// identity, which are empty without TLS.
const memberCommand = "serve-etcd"

// Serve serves as a member of etcd if args say that this process is one.
func Serve(args []string) (served bool, err error) {
	if len(args) != 8 || args[0] != memberCommand {
		return false, nil
	}
	number, err := strconv.Atoi(args[1])
	if err != nil {
		return true, err
	}
	as := load.Identity{Cert: args[5], Key: args[6], CA: args[7]}
	cfg, client, err := config(number, args[2], args[3] == "sync", strings.Split(args[4], ","), as)
	if err != nil {
		return true, err
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return true, err
	}
	select {
	case <-e.Server.ReadyNotify():
		load.ServeUntilParentEnds(client)
		return true, nil
	case err := <-e.Err():
		return true, err
	case <-time.After(cluster.StartTimeout):
		return true, errors.New("etcd is not ready")
	}
}

// config has stock settings, but for the log and the quota, so that a run
// does not fill it, and for secure.
func config(number int, dir string, sync bool, peers []string, as load.Identity) (cfg *embed.Config, client string, err error) {
	ports, err := freePorts(2)
	if err != nil {
		return nil, "", err
	}
	scheme := "http"
	if !as.IsZero() {
		scheme = "https"
	}
	var cluster []string
	for i, p := range peers {
		cluster = append(cluster, fmt.Sprintf("m%d=%s://%s", i, scheme, p))
	}
	peer, own := []url.URL{{Scheme: scheme, Host: peers[number]}}, []url.URL{{Scheme: scheme, Host: ports[0]}}
	cfg = embed.NewConfig()
	cfg.Name, cfg.Dir = fmt.Sprintf("m%d", number), dir
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = peer, peer
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = own, own
	cfg.InitialCluster = strings.Join(cluster, ",")
	cfg.UnsafeNoFsync = !sync
	cfg.QuotaBackendBytes = 8 << 30
	cfg.LogLevel, cfg.LogOutputs = "error", []string{filepath.Join(filepath.Dir(dir), cfg.Name+".log")}
	if !as.IsZero() {
		secure(cfg, as, ports[1])
	}
	return cfg, ports[0], nil
}

// secure has clients and peers show certificates. HTTP gets an address of its own: else
// etcd serves gRPC through Go's HTTP server when there is TLS, which is slower.
func secure(cfg *embed.Config, as load.Identity, http string) {
	info := transport.TLSInfo{CertFile: as.Cert, KeyFile: as.Key, TrustedCAFile: as.CA, ClientCertAuth: true, MinVersion: tls.VersionTLS13}
	cfg.ClientTLSInfo, cfg.PeerTLSInfo = info, info
	cfg.ListenClientHttpUrls = []url.URL{{Scheme: "https", Host: http}}
}

// freePorts picks addresses that nobody listens on.
func freePorts(n int) (addresses []string, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer func() { _ = l.Close() }()
		addresses = append(addresses, l.Addr().String())
	}
	return addresses, nil
}

// Cluster is a cluster of it, and connections to the member that led it when it was
// started.
type Cluster struct {
	Members []*load.Child
	Leader  *load.Child
	address string // of the leader
	as      load.Identity
	conns   []*grpc.ClientConn
	stubs   []etcdserverpb.KVClient
}

// Start starts a cluster and connects to its leader.
func Start(ctx context.Context, c cluster.Config) (_ *Cluster, err error) {
	e := &Cluster{}
	defer func() {
		if err != nil {
			e.Stop()
		}
	}()
	peers, err := freePorts(c.Size)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, err
	}
	mode := map[bool]string{true: "sync", false: "no-sync"}[c.Durable]
	var stderr io.Writer = os.Stderr
	if c.Stderr != nil {
		stderr = c.Stderr
	}
	type started struct {
		*load.Child
		err error
	}
	members := make(chan started)
	for i := range c.Size { // at once: none is ready before there is a majority
		go func() {
			as := c.TLS.Member(uint64(i + 1))
			m, err := load.StartSelf(stderr, memberCommand, strconv.Itoa(i), filepath.Join(c.Dir, strconv.Itoa(i)), mode, strings.Join(peers, ","), as.Cert, as.Key, as.CA)
			members <- started{m, err}
		}()
	}
	var addresses []string
	var errs []error
	for range c.Size {
		m := <-members
		if m.err != nil {
			errs = append(errs, m.err)
			continue
		}
		e.Members = append(e.Members, m.Child)
		addresses = append(addresses, m.Ready[0])
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	leader, err := leaderOf(ctx, addresses, c.TLS.Client())
	if err != nil {
		return nil, err
	}
	e.Leader = e.Members[slices.Index(addresses, leader)]
	e.address = leader
	e.as = c.TLS.Client()
	e.conns, err = load.Dial([]string{leader}, cluster.Connections, e.as)
	for _, c := range e.conns {
		e.stubs = append(e.stubs, etcdserverpb.NewKVClient(c))
	}
	return e, err
}

// leaderOf finds the client address of the leader.
func leaderOf(ctx context.Context, addresses []string, by load.Identity) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, cluster.StartTimeout)
	defer cancel()
	conns, err := load.Dial(addresses, len(addresses), by)
	if err != nil {
		return "", err
	}
	leader := ""
	for i, c := range conns {
		st, err := etcdserverpb.NewMaintenanceClient(c).Status(ctx, &etcdserverpb.StatusRequest{})
		if err != nil {
			return "", err
		}
		if st.Leader == st.Header.MemberId {
			leader = addresses[i]
		}
		_ = c.Close()
	}
	if leader == "" {
		return "", errors.New("etcd has no leader")
	}
	return leader, nil
}

// Stop ends the members.
func (e *Cluster) Stop() {
	closeAll(e.conns)
	for _, m := range e.Members {
		m.Stop()
	}
}

// Fill sets every key once, many in a transaction: that is many times as fast. Of o it takes
// the keys, the first of them, and the value.
func (e *Cluster) Fill(ctx context.Context, o load.Options) error {
	const clients, maxBytes = 16, 1 << 20
	atOnce := uint64(min(100, max(1, maxBytes/(o.KeySize+len(o.Value)+64))))
	var next atomic.Uint64
	errs := make(chan error, clients)
	for client := range clients {
		go func() {
			for {
				from := next.Add(atOnce) - atOnce
				if from >= o.Keys {
					errs <- nil
					return
				}
				txn := &etcdserverpb.TxnRequest{}
				for i := from; i < min(from+atOnce, o.Keys); i++ {
					put := &etcdserverpb.PutRequest{Key: []byte(load.Key(o.First+i, o.KeySize)), Value: o.Value}
					txn.Success = append(txn.Success, &etcdserverpb.RequestOp{Request: &etcdserverpb.RequestOp_RequestPut{RequestPut: put}})
				}
				if _, err := e.stubs[client%len(e.stubs)].Txn(ctx, txn); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	var all []error
	for range clients {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// Target is etcd under load, by its generated stubs.
type Target struct {
	*Cluster
	Serializable bool
}

// Do implements load.Target.
func (t Target) Do(ctx context.Context, client int, op load.Operation) error {
	stub := t.stubs[client%len(t.stubs)]
	if op.Set {
		_, err := stub.Put(ctx, &etcdserverpb.PutRequest{Key: []byte(op.Key), Value: op.Value})
		return err
	}
	resp, err := stub.Range(ctx, &etcdserverpb.RangeRequest{Key: []byte(op.Key), Serializable: t.Serializable})
	if err == nil && len(resp.Kvs) == 0 {
		return load.ErrAbsent
	}
	return err
}

// Version is that of the module that this program was built with.
func Version() string {
	info, _ := debug.ReadBuildInfo()
	for _, m := range info.Deps {
		if m.Path == "go.etcd.io/etcd/server/v3" {
			return m.Version
		}
	}
	return "unknown"
}
