package etcd

import (
	"net/url"
	"testing"

	"raft-key-value/bench/internal/load"
)

// TestSecure: with an identity, all that a member of etcd listens on has TLS and wants
// certificates; without one, nothing has.
func TestSecure(t *testing.T) {
	peers := []string{"127.0.0.1:1", "127.0.0.1:2"}
	for scheme, as := range map[string]load.Identity{"http": {}, "https": {Cert: "cert", Key: "key", CA: "ca"}} {
		cfg, client, err := config(1, t.TempDir(), false, peers, as)
		if err != nil {
			t.Fatal(err)
		}
		var all []url.URL
		for _, urls := range [][]url.URL{cfg.ListenPeerUrls, cfg.ListenClientUrls, cfg.ListenClientHttpUrls} {
			all = append(all, urls...)
		}
		for _, u := range all {
			if u.Scheme != scheme {
				t.Errorf("with %+v it listens on %s", as, u.String())
			}
		}
		if cfg.ListenClientUrls[0].Host != client {
			t.Errorf("clients are told %s, it listens on %v", client, cfg.ListenClientUrls)
		}
		if want := "m0=" + scheme + "://127.0.0.1:1,m1=" + scheme + "://127.0.0.1:2"; cfg.InitialCluster != want {
			t.Errorf("the members are %s, want %s", cfg.InitialCluster, want)
		}
		isSecure := scheme == "https"
		if cfg.ClientTLSInfo.ClientCertAuth != isSecure || cfg.PeerTLSInfo.ClientCertAuth != isSecure {
			t.Errorf("%s: clients %v, peers %v", scheme, cfg.ClientTLSInfo, cfg.PeerTLSInfo)
		}
	}
}
