// The sub-command certs: certificates for a trial cluster, as files.

package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	authorityDays = 3650
	maxCertDays   = authorityDays
	// certBackdate lies between the begin of a certificate and now, for clocks that are late.
	certBackdate = time.Hour
)

// certOrder is what certs is to make.
type certOrder struct {
	nodes map[uint64][]string // by id: the hosts at which the node is reached
	named []principal         // others, each once
	days  uint64
}

// nameFor adds a principal that is no node, unless it is there.
func (o *certOrder) nameFor(p principal) {
	if !slices.Contains(o.named, p) {
		o.named = append(o.named, p)
	}
}

// nodeIDs are the ids of the nodes, in order.
func (o *certOrder) nodeIDs() []uint64 { return slices.Sorted(maps.Keys(o.nodes)) }

// certsFlags are the flags of certs.
func (in *invocation) certsFlags(fs *flag.FlagSet) {
	in.certs = &certOrder{nodes: map[uint64][]string{}, days: 365}
	fs.Func("nodes", "`ID=HOST,...`: the nodes, and the names or IP addresses at which they are reached; "+
		"an ID may stand there more than once", in.certs.takeNodes)
	fs.Func("for", "`ROLE/NAME,...`: others to make certificates for, such as admin/alice,client/shop; "+
		"a ROLE is admin, client or reader", in.certs.takeNamed)
	numberVar(fs, &in.certs.days, "days", "how many `DAYS` the certificates are valid (default 365)")
}

func (o *certOrder) takeNodes(list string) error {
	for part := range strings.SplitSeq(list, ",") {
		number, host, _ := strings.Cut(part, "=")
		id, err := strconv.ParseUint(number, 10, 64)
		if err != nil || id == 0 {
			return fmt.Errorf("%q: want ID=HOST, an ID being a positive number", part)
		}
		if !isCertHost(host) {
			return fmt.Errorf("%q: want ID=HOST, a HOST being a name or an IP address, without a port", part)
		}
		o.nodes[id] = append(o.nodes[id], host)
	}
	return nil
}

// isCertHost reports whether a certificate can have a host.
func isCertHost(host string) bool {
	if _, err := netip.ParseAddr(host); err == nil {
		return net.ParseIP(host) != nil // which knows no zones: nor do certificates
	}
	isStrangeByte := func(r rune) bool { return isStrange(r) || r > '~' || strings.ContainsRune(":/[]=", r) }
	return host != "" && len(host) <= maxAddressBytes && !strings.ContainsFunc(host, isStrangeByte)
}

func (o *certOrder) takeNamed(list string) error {
	for part := range strings.SplitSeq(list, ",") {
		p, err := parsePrincipal(principalScheme + ":" + part)
		if err != nil || p.role == roleNode {
			return fmt.Errorf("%q: want admin/NAME, client/NAME or reader/NAME, "+
				"a NAME having 1 to %d letters, digits, dots, hyphens and underscores", part, maxPrincipalName)
		}
		o.nameFor(p)
	}
	return nil
}

func (in *invocation) checkCertsFlags() error {
	if len(in.certs.nodes) == 0 && len(in.certs.named) == 0 {
		return errors.New("--nodes or --for is needed: whom the certificates are for")
	}
	if in.certs.days == 0 || in.certs.days > maxCertDays {
		return fmt.Errorf("--days %d: want 1 to %d", in.certs.days, maxCertDays)
	}
	return nil
}

// fileName is the name of a principal's files, without the ending.
func (p principal) fileName() string {
	if p.role == roleNode {
		return fmt.Sprintf("node%d", p.node)
	}
	return strings.ReplaceAll(p.String(), "/", "-")
}

// newFile is a file that certs makes.
type newFile struct {
	name    string
	content []byte
	mode    os.FileMode
}

// makeCerts makes a CA, if the directory has none, and certificates, which it signs. It
// overwrites nothing.
func (c *client) makeCerts(context.Context) error {
	dir := c.args[0]
	a, files, err := openAuthority(dir)
	if err != nil {
		return err
	}
	isNew := len(files) > 0
	if isNew {
		for _, r := range []role{roleAdmin, roleClient, roleReader} {
			c.certs.nameFor(principal{role: r})
		}
	}
	made, err := c.certs.issueAll(a, time.Now())
	if err != nil {
		return err
	}
	files = append(files, made...)
	if err := writeNewFiles(dir, files); err != nil {
		return err
	}
	c.madeFiles = true
	var names []string
	var text strings.Builder
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		names = append(names, path)
		fmt.Fprintln(&text, path)
	}
	if err := c.print(map[string][]string{"files": names}, text.String()); err != nil {
		return err
	}
	if len(c.certs.nodes) > 0 {
		c.progress("%s", c.certs.nextSteps(dir, isNew))
	}
	return nil
}

// nextSteps are the commands that start the nodes, and make a cluster of them or, if the CA
// was there before, add them to one.
func (o *certOrder) nextSteps(dir string, isNew bool) string {
	path := func(name string) string { return filepath.Join(dir, name) }
	var b strings.Builder
	fmt.Fprintln(&b, "\nNext, start each node, on a machine that has its two files and ca.pem:")
	var members []string
	addresses := o.addresses()
	for _, id := range o.nodeIDs() {
		name := path(principal{role: roleNode, node: id}.fileName())
		fmt.Fprintf(&b, "  raft-key-value --id %d --addr %s --data-dir DATA%d "+
			"--cert-file %s.pem --key-file %s.key --trusted-ca-file %s\n",
			id, addresses[id], id, name, name, path(authorityFile))
		members = append(members, fmt.Sprintf("%d=%s", id, addresses[id]))
	}
	then := "Then make a cluster of them, as an admin:"
	commands := []string{"init " + strings.Join(members, " ")}
	if !isNew {
		then = "Then add them, as an admin, by RAFT_KEY_VALUE_ENDPOINTS of nodes that are in the cluster:"
		commands = nil
		for _, member := range members {
			commands = append(commands, "add-learner "+member)
		}
	}
	fmt.Fprintf(&b, "%s\n  export %s=%s %s=%s %s=%s\n", then, variableOf("cert-file"), path("admin.pem"),
		variableOf("key-file"), path("admin.key"), variableOf("trusted-ca-file"), path(authorityFile))
	for _, command := range commands {
		fmt.Fprintf(&b, "  raft-key-value %s\n", command)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// firstPort is the port of the first node of a host, in what certs prints; the next ones
// have the ports that follow.
const firstPort = 21001

// addresses proposes an address for each node.
func (o *certOrder) addresses() map[uint64]string {
	ports := map[string]int{}
	addresses := map[uint64]string{}
	for _, id := range o.nodeIDs() {
		host := o.nodes[id][0]
		addresses[id] = net.JoinHostPort(host, strconv.Itoa(firstPort+ports[host]))
		ports[host]++
	}
	return addresses
}

// issueAll issues the certificates that are ordered.
func (o *certOrder) issueAll(a *authority, now time.Time) ([]newFile, error) {
	v := validity{now.Add(-certBackdate), now.AddDate(0, 0, int(o.days))}
	if v.until.After(a.certificate.NotAfter) {
		return nil, fmt.Errorf("the CA ends at %s, before the certificates would: --days has to be less",
			clockText(a.certificate.NotAfter))
	}
	var all []principal
	for _, id := range o.nodeIDs() {
		all = append(all, principal{role: roleNode, node: id})
	}
	all = append(all, o.named...)
	var files []newFile
	for _, p := range all {
		certificate, key, err := a.issue(p.template(o.nodes[p.node], v))
		if err != nil {
			return nil, err
		}
		files = append(files, newFile{p.fileName() + ".pem", certificate, 0o644}, newFile{p.fileName() + ".key", key, 0o600})
	}
	return files, nil
}

const (
	authorityFile    = "ca.pem"
	authorityKeyFile = "ca.key"
)

// openAuthority returns the CA of a directory. If there is none, it makes one, and returns
// its files, which are not written yet.
func openAuthority(dir string) (*authority, []newFile, error) {
	certificate, certErr := os.ReadFile(filepath.Join(dir, authorityFile))
	key, keyErr := os.ReadFile(filepath.Join(dir, authorityKeyFile))
	hasNone := errors.Is(certErr, os.ErrNotExist) && errors.Is(keyErr, os.ErrNotExist)
	if hasNone {
		return makeAuthority(time.Now())
	}
	if err := errors.Join(certErr, keyErr); err != nil {
		return nil, nil, err
	}
	a, err := parseAuthority(certificate, key)
	if err != nil {
		return nil, nil, fmt.Errorf("%s and %s in %s: %w", authorityFile, authorityKeyFile, dir, err)
	}
	return a, nil, nil
}

func makeAuthority(now time.Time) (*authority, []newFile, error) {
	v := validity{now.Add(-certBackdate), now.AddDate(0, 0, authorityDays+1)}
	// Of two CAs of one name, errors would tell of signatures that do not match.
	name := fmt.Sprintf("raft-key-value trial CA %08x", rand.Uint32())
	a, err := newAuthority(name, v)
	if err != nil {
		return nil, nil, err
	}
	key, err := encodeKey(a.key)
	if err != nil {
		return nil, nil, err
	}
	files := []newFile{
		{authorityFile, encodeCertificate(a.certificate.Raw), 0o644},
		{authorityKeyFile, key, 0o600},
	}
	return a, files, nil
}

// parseAuthority parses what makeAuthority has made.
func parseAuthority(certificate, key []byte) (*authority, error) {
	certBlock, _ := pem.Decode(certificate)
	keyBlock, _ := pem.Decode(key)
	if certBlock == nil || keyBlock == nil {
		return nil, errors.New("one of them is no PEM")
	}
	parsed, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return nil, err
	}
	signer, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, err
	}
	s, ok := signer.(crypto.Signer)
	if !ok {
		return nil, errors.New("the key cannot sign")
	}
	if !parsed.IsCA {
		return nil, errors.New("the certificate is not a CA's")
	}
	return &authority{parsed, s}, nil
}

// writeNewFiles writes files into a directory, which it makes if it is not there. It fails,
// and writes nothing, if there is one of them already.
func writeNewFiles(dir string, files []newFile) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		if err := checkAbsent(filepath.Join(dir, f.name)); err != nil {
			return fmt.Errorf("nothing was made, for nothing is overwritten: %w", err)
		}
	}
	for i, f := range files {
		if err := writeNewFile(filepath.Join(dir, f.name), f); err != nil {
			removeFiles(dir, files[:i])
			return err
		}
	}
	return nil
}

// removeFiles takes back what was written, so that the same command may be tried again.
func removeFiles(dir string, files []newFile) {
	for _, f := range files {
		_ = os.Remove(filepath.Join(dir, f.name)) // the error that is told is the one before
	}
}

func writeNewFile(path string, f newFile) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.mode)
	if err != nil {
		return err
	}
	_, err = file.Write(f.content)
	err = errors.Join(err, file.Close())
	if err != nil {
		_ = os.Remove(path)
	}
	return err
}
