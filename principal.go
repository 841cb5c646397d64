// Principals: who somebody is, as a certificate says of whoever holds its key.

package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	grpcpeer "google.golang.org/grpc/peer"
)

// role is what somebody may do; access.go says what that is. roleReader, roleClient and
// roleAdmin each include the one before it.
type role uint8

const (
	// roleAnyone is everybody's role without TLS, who may do all.
	roleAnyone role = iota
	roleReader
	roleClient
	roleAdmin
	roleNode
)

// String needs nothing that is initialised: errors that name roles are.
func (r role) String() string {
	switch r {
	case roleReader:
		return "reader"
	case roleClient:
		return "client"
	case roleAdmin:
		return "admin"
	case roleNode:
		return "node"
	}
	return "anyone"
}

// principal is who somebody is. Two that are equal are the same. The zero principal is
// everybody's without TLS.
type principal struct {
	role role
	node uint64 // of roleNode: which node; 0 for the others
	name string // what tells those of one role apart; empty: the certificate has no name
}

// String is the principal as a certificate has it, without the scheme.
func (p principal) String() string {
	switch {
	case p.role == roleNode:
		return fmt.Sprintf("node/%d", p.node)
	case p.name == "":
		return p.role.String()
	}
	return p.role.String() + "/" + p.name
}

const (
	// principalScheme is the scheme of the URI that names a principal in a certificate.
	principalScheme = "rkv"
	// maxPrincipalName bounds a name: it is in the log, and in each session.
	maxPrincipalName = 64
)

// principalOf returns the principal that a certificate has among its subject alternative
// names: one URI of the scheme rkv, of which there has to be one and no second. URIs of
// other schemes are somebody else's. It does not check who has signed the certificate.
func principalOf(certificate *x509.Certificate) (principal, error) {
	var own []*url.URL
	for _, uri := range certificate.URIs {
		if strings.EqualFold(uri.Scheme, principalScheme) {
			own = append(own, uri)
		}
	}
	if len(own) != 1 {
		return principal{}, fmt.Errorf("the certificate has %d URIs that begin with %s:, it needs one",
			len(own), principalScheme)
	}
	return parsePrincipal(own[0].String())
}

// errPrincipal has no part of what it is about: that may be anything.
var errPrincipal = errors.New("the certificate's URI is none of rkv:node/ID, rkv:admin, rkv:admin/NAME, " +
	"rkv:client, rkv:client/NAME, rkv:reader and rkv:reader/NAME; " +
	"an ID is a number from 1 up, a NAME has 1 to 64 letters, digits, dots, hyphens and underscores")

// parsePrincipal parses a URI that names a principal. There is one way to write each.
func parsePrincipal(uri string) (principal, error) {
	rest, isOurs := strings.CutPrefix(uri, principalScheme+":")
	if !isOurs {
		return principal{}, errPrincipal
	}
	word, name, hasName := strings.Cut(rest, "/")
	if hasName && !isPrincipalName(name) {
		return principal{}, errPrincipal
	}
	switch word {
	case "node":
		return parseNodePrincipal(name)
	case "admin":
		return principal{role: roleAdmin, name: name}, nil
	case "client":
		return principal{role: roleClient, name: name}, nil
	case "reader":
		return principal{role: roleReader, name: name}, nil
	}
	return principal{}, errPrincipal
}

// parseNodePrincipal returns the principal of the node with this id.
func parseNodePrincipal(id string) (principal, error) {
	node, err := strconv.ParseUint(id, 10, 64)
	if err != nil || node == 0 {
		return principal{}, errPrincipal
	}
	isCanonical := strconv.FormatUint(node, 10) == id
	if !isCanonical {
		return principal{}, errPrincipal
	}
	return principal{role: roleNode, node: node}, nil
}

func isPrincipalName(name string) bool {
	if len(name) == 0 || len(name) > maxPrincipalName {
		return false
	}
	for _, r := range name {
		isLetter := 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
		isDigit := '0' <= r && r <= '9'
		if !isLetter && !isDigit && !strings.ContainsRune("._-", r) {
			return false
		}
	}
	return true
}

// callerOf returns who makes a call: who is at the other end of its connection.
func callerOf(ctx context.Context) principal {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return principal{} // a call that this program makes of itself, in a test
	}
	c, ok := p.Addr.(*limitedConn)
	if !ok {
		return principal{}
	}
	return c.who
}
