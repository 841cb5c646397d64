package load

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// Identity is what a process shows of itself, in files of PEM. The zero Identity is for
// connections without TLS.
type Identity struct {
	Cert, Key string
	CA        string // whose certificates it accepts
}

// IsZero reports whether there is no TLS.
func (id Identity) IsZero() bool { return id == Identity{} }

// config has both sides show a certificate, over TLS 1.3.
func (id Identity) config() (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(id.Cert, id.Key)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(id.CA)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s has no certificate in PEM", id.CA)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{own},
		RootCAs:      pool,
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
	}, nil
}

// credentials are those of a server, or of whoever calls one.
func (id Identity) credentials() (credentials.TransportCredentials, error) {
	if id.IsZero() {
		return insecure.NewCredentials(), nil
	}
	config, err := id.config()
	if err != nil {
		return nil, err
	}
	return credentials.NewTLS(config), nil
}
