package main

import (
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
)

// principals are URIs and who they are; empty: they are refused.
var principals = map[string]string{
	"rkv:node/1":                            "node/1",
	"rkv:node/18446744073709551615":         "node/18446744073709551615",
	"rkv:admin":                             "admin",
	"rkv:admin/alice":                       "admin/alice",
	"rkv:client/shop.orders_2-b":            "client/shop.orders_2-b",
	"rkv:client":                            "client",
	"rkv:reader":                            "reader",
	"rkv:reader/" + strings.Repeat("n", 64): "reader/" + strings.Repeat("n", 64),
	"rkv:reader/" + strings.Repeat("n", 65): "",
	"rkv:node":                              "",
	"rkv:node/":                             "",
	"rkv:node/0":                            "",
	"rkv:node/01":                           "",
	"rkv:node/+1":                           "",
	"rkv:node/1/":                           "",
	"rkv:node/18446744073709551616":         "",
	"rkv:anyone":                            "",
	"rkv:Admin":                             "",
	"rkv:admin/":                            "",
	"rkv:admin/a/b":                         "",
	"rkv:admin/a%2Fb":                       "",
	"rkv:admin?x":                           "",
	"rkv:admin#x":                           "",
	"rkv:admin\n":                           "",
	"rkv://admin":                           "",
	"rkv:":                                  "",
	"RKV:admin":                             "",
	"spiffe://example.org/admin":            "",
	"":                                      "",
}

func TestPrincipals(t *testing.T) {
	for uri, want := range principals {
		p, err := parsePrincipal(uri)
		if want == "" {
			if err == nil {
				t.Errorf("%q is %v", uri, p)
			}
			continue
		}
		if err != nil || p.String() != want {
			t.Errorf("%q is %v, %v, want %s", uri, p, err, want)
		}
	}
}

// TestPrincipalOfCertificate: one URI of ours, whatever others there are.
func TestPrincipalOfCertificate(t *testing.T) {
	for uris, want := range map[string]string{
		"":                        "",
		"rkv:admin":               "admin",
		"spiffe://a/b rkv:node/2": "node/2",
		"rkv:node/2 rkv:node/2":   "",
		"rkv:client rkv:admin":    "",
		"rkv:client RKV:admin":    "",
		"spiffe://a/rkv:admin":    "",
		"rkv:client%2Fshop":       "",
		"rkv://client":            "",
	} {
		certificate := &x509.Certificate{}
		for _, s := range strings.Fields(uris) {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			certificate.URIs = append(certificate.URIs, u)
		}
		p, err := principalOf(certificate)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q is %v", uris, p)
		case want != "" && (err != nil || p.String() != want):
			t.Errorf("%q is %v, %v, want %s", uris, p, err, want)
		}
	}
}

// FuzzPrincipal: what is accepted is written in one way only.
func FuzzPrincipal(f *testing.F) {
	for uri := range principals {
		f.Add(uri)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		p, err := parsePrincipal(uri)
		if err == nil && principalScheme+":"+p.String() != uri {
			t.Errorf("%q is %v", uri, p)
		}
		if err == nil && p.role == roleAnyone {
			t.Errorf("%q is anyone", uri)
		}
	})
}
