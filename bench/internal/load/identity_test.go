package load

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// testIdentity is one that has signed itself, and accepts itself only.
func testIdentity(t *testing.T) Identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	signed, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	id := Identity{Cert: filepath.Join(dir, "cert"), Key: filepath.Join(dir, "key"), CA: filepath.Join(dir, "cert")}
	for path, block := range map[string]*pem.Block{
		id.Cert: {Type: "CERTIFICATE", Bytes: signed},
		id.Key:  {Type: "PRIVATE KEY", Bytes: encoded},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

// TestEchoOverTLS: what is measured over TLS is over TLS: the echo process answers nobody
// without it, nor without a certificate, and its callers believe no other.
func TestEchoOverTLS(t *testing.T) {
	own, other := testIdentity(t), testIdentity(t)
	e, err := StartEcho(10, own)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Stop()
	ask := func(k *KV) error {
		defer k.Close()
		return k.Do(t.Context(), 0, Operation{Key: "k"})
	}
	dial := func(by Identity) *KV {
		k, err := DialKV([]string{e.RPC}, 1, by)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	if err := ask(dial(own)); err != nil {
		t.Error(err)
	}
	strangers := map[string]*KV{"without TLS": dial(Identity{}), "of another CA": dial(other)}
	config, err := own.config()
	if err != nil {
		t.Fatal(err)
	}
	config.Certificates = nil
	strangers["without a certificate"] = dialWith(t, e.RPC, config)
	for name, k := range strangers {
		if err := ask(k); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// dialWith dials as DialKV does, with a configuration of TLS.
func dialWith(t *testing.T, address string, config *tls.Config) *KV {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	return &KV{conns: []*grpc.ClientConn{c}, stubs: []kvpb.KVServiceClient{kvpb.NewKVServiceClient(c)}}
}

// TestIdentityFiles: what cannot be read is said, not left out.
func TestIdentityFiles(t *testing.T) {
	id := testIdentity(t)
	noCA := id
	noCA.CA = id.Key
	for name, bad := range map[string]Identity{
		"no key":  {Cert: id.Cert, Key: filepath.Join(t.TempDir(), "key"), CA: id.CA},
		"no file": {Cert: id.Cert, Key: id.Key, CA: filepath.Join(t.TempDir(), "ca")},
		"no CA":   noCA,
	} {
		if _, err := DialKV([]string{"127.0.0.1:1"}, 1, bad); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := newEcho(10, bad); err == nil {
			t.Errorf("%s: no error of the server", name)
		}
	}
	if _, err := (Identity{}).credentials(); err != nil {
		t.Error(err)
	}
}
