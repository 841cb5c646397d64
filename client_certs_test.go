// Tests of client_certs.go, and of commands over TLS.

package main

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestCerts: certs makes files that nodes and commands take, adds to them, and overwrites
// nothing.
func TestCerts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	out, _ := runCommand(t, exitYes, "", "certs", dir, "--nodes", "1=127.0.0.1,2=db2.example,1=localhost", "--for", "client/shop")
	for _, name := range []string{"ca", "node1", "node2", "admin", "client", "reader", "client-shop"} {
		for ending, mode := range map[string]os.FileMode{".pem": 0o644, ".key": 0o600} {
			path := filepath.Join(dir, name+ending)
			wantPart(t, out, path+"\n")
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode().Perm() != mode {
				t.Errorf("%s: %v", path, info.Mode())
			}
		}
	}
	node, err := openCertificates(testFiles(dir, "node1"), 1, quiet())
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"admin": "admin", "client": "client", "reader": "reader", "client-shop": "client/shop", "node2": "node/2",
	} {
		command, err := openCertificates(testFiles(dir, name), 0, quiet())
		if err != nil {
			t.Fatal(err)
		}
		k := command.latest()
		wantText(t, name, k.who.String(), want)
		if _, err := node.latest().verify([]*x509.Certificate{k.own.Leaf}, x509.ExtKeyUsageClientAuth); err != nil {
			t.Errorf("a node does not accept %s: %v", name, err)
		}
		left := time.Until(k.until)
		if left < 364*24*time.Hour || left > 366*24*time.Hour {
			t.Errorf("%s ends in %v", name, left)
		}
	}
	leaf := node.latest().own.Leaf
	for host, isThere := range map[string]bool{"127.0.0.1": true, "localhost": true, "db2.example": false} {
		if (leaf.VerifyHostname(host) == nil) != isThere {
			t.Errorf("node 1 at %s: %v", host, !isThere)
		}
	}

	before, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	_, errs := runCommand(t, exitNotDone, "", "certs", dir, "--nodes", "3=h,2=h")
	wantPart(t, errs, "node2.pem")
	if _, err := os.Stat(filepath.Join(dir, "node3.pem")); err == nil {
		t.Error("it is refused, and has made a certificate")
	}
	runCommand(t, exitYes, "", "certs", dir, "--nodes", "3=h")
	after, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	wantText(t, "the CA", string(after), string(before))
	if err := os.Remove(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	runCommand(t, exitNotDone, "", "certs", dir, "--nodes", "4=h")
}

// TestCertsArguments: what certs cannot make a certificate for is a usage error.
func TestCertsArguments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	for _, args := range []string{
		"", "--nodes 1", "--nodes 1=", "--nodes 0=h", "--nodes x=h", "--nodes 1=h:1", "--nodes 1=h,", "--nodes 1=ü",
		"--nodes 1=fe80::1%eth0", "--for node/1", "--for king", "--for client/", "--for client/a/b",
		"--nodes 1=h --days 0", "--nodes 1=h --days 5000", "--nodes 1=h --endpoints a:1",
	} {
		runCommand(t, exitUsage, "", append([]string{"certs", dir}, strings.Fields(args)...)...)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a directory was made")
	}
}

// TestCommandsOverTLS: commands show the certificate that their flags or variables name, and
// say what is missing.
func TestCommandsOverTLS(t *testing.T) {
	c := newSecureCluster(t, 1)
	address := c.nodes[1].address
	t.Setenv(endpointVariable, address)
	as := func(name string, args ...string) []string {
		files := testFiles(c.pki, name)
		return append(args, "--cert-file", files.cert, "--key-file", files.key, "--trusted-ca-file", files.trustedCA)
	}
	runCommand(t, exitYes, "", as("admin", "init", "1="+address)...)
	runCommand(t, exitYes, "", as("client", "set", "k", "v")...)
	out, _ := runCommand(t, exitYes, "", as("reader", "get", "k")...)
	wantText(t, "k", out, "v")
	_, errs := runCommand(t, exitNotDone, "", as("reader", "set", "k", "w")...)
	wantPart(t, errs, "reader may not call raftkv.v1.KVService/OpenSession: that needs the role client or admin")
	_, errs = runCommand(t, exitNotDone, "", as("client", "remove", "1")...)
	wantPart(t, errs, "client may not call raftkv.v1.ClusterService/ChangeMembership: that needs the role admin")
	out, _ = runCommand(t, exitYes, "", as("reader", "status")...)
	wantPart(t, out, "the first certificate to end is that of node 1, at 2090-01-01 00:00:00 UTC\n")
	_, errs = runCommand(t, exitNotDone, "", "get", "k", "--timeout", "1s")
	wantPart(t, errs, "a node does that wants TLS")
	_, errs = runCommand(t, exitUsage, "", "get", "k", "--cert-file", filepath.Join(c.pki, "admin.pem"))
	wantPart(t, errs, "give all three, or none")
	_, errs = runCommand(t, exitUsage, "", as("none", "get", "k")...)
	wantPart(t, errs, "none.pem")

	files := testFiles(c.pki, "reader")
	t.Setenv(variableOf("cert-file"), files.cert)
	t.Setenv(variableOf("key-file"), files.key)
	t.Setenv(variableOf("trusted-ca-file"), files.trustedCA)
	out, _ = runCommand(t, exitYes, "", "get", "k")
	wantText(t, "k, by the environment", out, "v")
	runCommand(t, exitYes, "", as("client", "set", "k", "w")...) // flags go before it
}
