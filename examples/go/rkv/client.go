// Package rkv is a client of raft-key-value that is meant to be copied: change what does not
// fit. docs/api.md says why it does what it does.
//
//   - client.go: a channel to all nodes, TLS, and Get.
//   - retry.go: which calls are sent again, when, and what became of those that failed.
//   - session.go: writes that take effect once, and compare-and-set.
//   - follow.go: all keys with a prefix, and every change of them, whichever node fails.
package rkv

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // the client's half of health checking
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"raft-key-value/kvpb"
)

// serviceConfig has gRPC share calls among all nodes that are healthy. It has no retryPolicy:
// what gRPC sends again by itself, it tells nobody, and then the last error of a write would
// not say whether an earlier try may have been applied. See repeat.
const serviceConfig = `{
	"loadBalancingConfig": [{"round_robin": {}}],
	"healthCheckConfig": {"serviceName": "raftkv.v1.KVService"}
}`

// Config says how nodes are reached.
type Config struct {
	Nodes []string // host:port of all nodes. The host has to be in the node's certificate.

	// The client's certificate and its key, and the CA of the nodes', in PEM. All, or none: then
	// there is no TLS.
	CertFile, KeyFile, CAFile string
}

// Client calls a cluster. Many goroutines may use it.
type Client struct {
	conn *grpc.ClientConn
	kv   kvpb.KVServiceClient
}

// Dial makes a client. It does not wait for a node: calls do.
func Dial(c Config) (*Client, error) {
	transport, err := c.credentials()
	if err != nil {
		return nil, err
	}
	nodes := manual.NewBuilderWithScheme("nodes")
	var state resolver.State
	for _, node := range c.Nodes {
		host, _, err := net.SplitHostPort(node)
		if err != nil {
			return nil, err
		}
		// Without a ServerName, TLS would look for the name of the channel in every certificate.
		address := resolver.Address{Addr: node, ServerName: host}
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{address}})
	}
	nodes.InitialState(state)
	conn, err := grpc.NewClient("nodes:///",
		grpc.WithResolvers(nodes),
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(serviceConfig),
		// A node that hangs is left after 13 s. Nodes refuse pings that come more often than
		// every 5 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		// gRPC's own back-off grows to two minutes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  100 * time.Millisecond,
				Multiplier: 2,
				Jitter:     0.5,
				MaxDelay:   5 * time.Second,
			},
			MinConnectTimeout: 3 * time.Second,
		}))
	if err != nil {
		return nil, err
	}
	return &Client{conn: conn, kv: kvpb.NewKVServiceClient(conn)}, nil
}

// Close ends all calls and connections.
func (c *Client) Close() error { return c.conn.Close() }

func (c Config) credentials() (credentials.TransportCredentials, error) {
	if c.CertFile == "" && c.KeyFile == "" && c.CAFile == "" {
		return insecure.NewCredentials(), nil
	}
	ca, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, errors.New("no certificate in " + c.CAFile)
	}
	if _, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile); err != nil {
		return nil, fmt.Errorf("%s, %s: %w", c.CertFile, c.KeyFile, err)
	}
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    pool, // which is read once: another CA needs a restart
		// A certificate that is replaced is used from the next connection on.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			certificate, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
			return &certificate, err
		},
	}), nil
}

// Value is what a key has.
type Value struct {
	Data    []byte // nil: the key is absent; an empty value is not nil
	Version uint64 // of the write that set it; 0: the key is absent
}

// Get reads a key. It sees every write that was acknowledged before, at whichever node.
func (c *Client) Get(ctx context.Context, key string) (Value, error) {
	var resp *kvpb.GetResponse
	_, err := repeat(ctx, func(ctx context.Context) (err error) {
		resp, err = c.kv.Get(ctx, &kvpb.GetRequest{Key: key})
		return err
	})
	return Value{Data: resp.GetValue(), Version: resp.GetVersion()}, err
}
