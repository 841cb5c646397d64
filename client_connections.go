// The connections of a sub-command: it opens one to an endpoint, and uses it for all its calls.

package main

import (
	"sync"

	"google.golang.org/grpc"
)

// connectionPool has those connections of one run that nobody uses just now. One that is used has
// one user alone, so whoever closes it, because it does not answer, ends no other call. Any
// goroutine may call its methods.
type connectionPool struct {
	mu   sync.Mutex
	idle map[string]*grpc.ClientConn // by address
}

func newConnectionPool() *connectionPool {
	return &connectionPool{idle: map[string]*grpc.ClientConn{}}
}

// take returns a connection that was put back; nil: there is none.
func (p *connectionPool) take(address string) *grpc.ClientConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	conn := p.idle[address]
	delete(p.idle, address)
	return conn
}

// put keeps a connection for the next call, unless there is one already.
func (p *connectionPool) put(address string, conn *grpc.ClientConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.idle[address] != nil {
		_ = conn.Close()
		return
	}
	p.idle[address] = conn
}

// close closes all that were put back.
func (p *connectionPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range p.idle {
		_ = conn.Close()
	}
	clear(p.idle)
}
