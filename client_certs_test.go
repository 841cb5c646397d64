// Tests of client_certs.go, and of commands over TLS.

package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// makeTestCerts runs certs, which is to succeed, and returns what it printed.
func makeTestCerts(t *testing.T, dir string, args ...string) (stdout, stderr string) {
	t.Helper()
	return runCommand(t, exitYes, "", append([]string{"certs", dir}, args...)...)
}

// dirContent is what each file of a directory has.
func dirContent(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	content := map[string]string{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		content[e.Name()] = string(text)
	}
	return content
}

// wantFiles checks which files a directory has: those with these names, each with .pem and
// .key.
func wantFiles(t *testing.T, dir string, names ...string) {
	t.Helper()
	var want []string
	for _, name := range names {
		want = append(want, name+".key", name+".pem")
	}
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(dirContent(t, dir))); !slices.Equal(got, want) {
		t.Errorf("there are %v, want %v", got, want)
	}
}

func readCertificate(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("%s is no PEM", path)
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// TestCerts: each certificate is whose it should be, signed by the CA, for the usages that
// its role needs and no others, for its time; nodes and commands take them.
func TestCerts(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "pki")
	begun := time.Now()
	makeTestCerts(t, dir, "--nodes", "1=127.0.0.1,2=db2,1=localhost,3=::1", "--for", "admin,client/shop,client/shop")
	wantFiles(t, dir, "ca", "node1", "node2", "node3", "admin", "client", "reader", "client-shop")
	makeTestCerts(t, dir, "--nodes", "4=db4", "--days", "7") // later, by the same CA
	wantFiles(t, dir, "ca", "node1", "node2", "node3", "node4", "admin", "client", "reader", "client-shop")

	roots := x509.NewCertPool()
	ca := readCertificate(t, filepath.Join(dir, "ca.pem"))
	roots.AddCert(ca)
	if inTenYears := begun.AddDate(9, 11, 0); ca.NotAfter.Before(inTenYears) {
		t.Errorf("the CA ends at %v", ca.NotAfter)
	}
	for _, test := range []struct {
		name, who string
		hosts     []string
		days      int
	}{
		{"node1", "node/1", []string{"127.0.0.1", "localhost"}, 365},
		{"node2", "node/2", []string{"db2"}, 365},
		{"node3", "node/3", []string{"::1"}, 365},
		{"node4", "node/4", []string{"db4"}, 7},
		{"admin", "admin", nil, 365},
		{"client", "client", nil, 365},
		{"reader", "reader", nil, 365},
		{"client-shop", "client/shop", nil, 365},
	} {
		certificate := readCertificate(t, filepath.Join(dir, test.name+".pem"))
		who, err := principalOf(certificate)
		if err != nil || who.String() != test.who {
			t.Errorf("%s is of %v, %v", test.name, who, err)
		}
		isNode := who.role == roleNode
		for usage, want := range map[x509.ExtKeyUsage]bool{
			x509.ExtKeyUsageClientAuth: true, x509.ExtKeyUsageServerAuth: isNode, x509.ExtKeyUsageCodeSigning: false,
		} {
			_, err := certificate.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}})
			if (err == nil) != want {
				t.Errorf("%s for usage %v: %v", test.name, usage, err)
			}
		}
		for _, host := range test.hosts {
			if err := certificate.VerifyHostname(host); err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
		}
		if certificate.VerifyHostname("db9") == nil {
			t.Errorf("%s is of any host", test.name)
		}
		from := certificate.NotBefore
		if from.After(begun.Add(-50 * time.Minute)) {
			t.Errorf("%s is not valid for clocks that are late: it begins at %v", test.name, from)
		}
		if last := begun.AddDate(0, 0, test.days); certificate.NotAfter.Before(last.Add(-time.Hour)) ||
			certificate.NotAfter.After(last.Add(time.Hour)) {
			t.Errorf("%s ends at %v, want %v", test.name, certificate.NotAfter, last)
		}
		node := who.node // 0: a command
		if _, err := openCertificates(testFiles(dir, test.name), node, quiet()); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// TestCertsOfTwoClusters: two CAs have two names, by which errors tell them apart.
func TestCertsOfTwoClusters(t *testing.T) {
	t.Parallel()
	var names []string
	for range 2 {
		dir := t.TempDir()
		makeTestCerts(t, dir, "--nodes", "1=a")
		names = append(names, readCertificate(t, filepath.Join(dir, "ca.pem")).Subject.CommonName)
	}
	if names[0] == names[1] {
		t.Errorf("both are %s", names[0])
	}
}

// TestCertsModes: keys are readable by their owner alone, and so is the directory.
func TestCertsModes(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "pki")
	makeTestCerts(t, dir, "--nodes", "1=a")
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v", info.Mode())
	}
	for name := range dirContent(t, dir) {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		isKey := strings.HasSuffix(name, ".key")
		if isKey && info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v", name, info.Mode())
		}
	}
}

// TestCertsOverwritesNothing: certs refuses, and writes nothing, if one of its files is there.
func TestCertsOverwritesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	makeTestCerts(t, dir, "--nodes", "1=a")
	for _, args := range [][]string{
		{"--nodes", "1=a"},
		{"--nodes", "2=a,1=a"},
		{"--for", "client/shop,reader"},
	} {
		before := dirContent(t, dir)
		_, errs := runCommand(t, exitNotDone, "", append([]string{"certs", dir}, args...)...)
		wantPart(t, errs, "nothing is overwritten")
		if !maps.Equal(before, dirContent(t, dir)) {
			t.Errorf("%v changed the directory", args)
		}
	}
	if err := os.Remove(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	before := dirContent(t, dir)
	_, errs := runCommand(t, exitNotDone, "", "certs", dir, "--nodes", "9=a") // with half of a CA
	wantPart(t, errs, "ca.key")
	if !maps.Equal(before, dirContent(t, dir)) {
		t.Error("a new CA took the place of one without its key")
	}
}

// TestCertsTakesBack: if a file cannot be written, those before it are taken back.
func TestCertsTakesBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	files := []newFile{{"a", []byte("x"), 0o600}, {"no/b", []byte("x"), 0o600}}
	if err := writeNewFiles(dir, files); err == nil {
		t.Error("it wrote into a directory that is not there")
	}
	if left := dirContent(t, dir); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
}

// TestCertsNeedsACA: what is no CA, or has another key, is not used as one.
func TestCertsNeedsACA(t *testing.T) {
	t.Parallel()
	made := t.TempDir()
	makeTestCerts(t, made, "--nodes", "1=a")
	for _, test := range []struct{ certificate, key, hint string }{
		{"node1.pem", "node1.key", "not a CA's"},
		{"ca.pem", "node1.key", "doesn't match"},
		{"ca.key", "ca.pem", "ca.pem and ca.key in"},
	} {
		dir := t.TempDir()
		content := dirContent(t, made)
		testFile(t, filepath.Join(dir, "ca.pem"), []byte(content[test.certificate]))
		testFile(t, filepath.Join(dir, "ca.key"), []byte(content[test.key]))
		_, errs := runCommand(t, exitNotDone, "", "certs", dir, "--nodes", "9=a")
		wantPart(t, errs, test.hint)
	}
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

// TestCertsSaysWhatIsNext: the files go to stdout, the commands that come next to stderr, and
// as JSON there are none.
func TestCertsSaysWhatIsNext(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	out, next := makeTestCerts(t, dir, "--nodes", "1=127.0.0.1,2=127.0.0.1,3=::1")
	wantPart(t, out, filepath.Join(dir, "ca.pem")+"\n")
	wantPart(t, next, "--id 2 --addr 127.0.0.1:21002 ")
	wantPart(t, next, "raft-key-value init 1=127.0.0.1:21001 2=127.0.0.1:21002 3=[::1]:21001\n")
	_, next = makeTestCerts(t, dir, "--nodes", "4=db4")
	wantPart(t, next, "raft-key-value add-learner 4=db4:21001\n")

	out, next = makeTestCerts(t, dir, "--for", "reader/grafana", "-o", "json")
	wantText(t, "stderr", next, "")
	var answer struct{ Files []string }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatal(err)
	}
	want := []string{filepath.Join(dir, "reader-grafana.pem"), filepath.Join(dir, "reader-grafana.key")}
	if !slices.Equal(answer.Files, want) {
		t.Errorf("the answer has %v, want %v", answer.Files, want)
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
	wantPart(t, errs, "client may not call raftkv.v1.ClusterService/ChangeMembership: that needs the role admin (PERMISSION_DENIED)\n")
	out, _ = runCommand(t, exitYes, "", as("reader", "status")...)
	wantPart(t, out, "the first certificate to end is that of node 1, at 2090-01-01 00:00:00 UTC\n")
	_, errs = runCommand(t, exitNotDone, "", "get", "k", "--timeout", fullTimeout.String())
	wantPart(t, errs, "a node does that wants TLS")
	_, errs = runCommand(t, exitUsage, "", "get", "k", "--cert-file", filepath.Join(c.pki, "admin.pem"))
	wantPart(t, errs, "give all three, or none")
	_, errs = runCommand(t, exitUsage, "", as("none", "get", "k")...)
	wantPart(t, errs, "none.pem")
	_, errs = runCommand(t, exitUsage, "", "get", "k", "--cert-file", "", "--key-file", "", "--trusted-ca-file", "")
	wantPart(t, errs, "-cert-file: name a file, or leave it out")
	t.Run("an empty variable", func(t *testing.T) {
		t.Setenv(variableOf("key-file"), "")
		_, errs := runCommand(t, exitUsage, "", "get", "k")
		wantPart(t, errs, variableOf("key-file")+": name a file, or leave it out")
		runCommand(t, exitYes, "", as("reader", "get", "k")...) // flags go before it
	})

	files := testFiles(c.pki, "reader")
	t.Setenv(variableOf("cert-file"), files.cert)
	t.Setenv(variableOf("key-file"), files.key)
	t.Setenv(variableOf("trusted-ca-file"), files.trustedCA)
	out, _ = runCommand(t, exitYes, "", "get", "k")
	wantText(t, "k, by the environment", out, "v")
	runCommand(t, exitYes, "", as("client", "set", "k", "w")...) // flags go before it
}
