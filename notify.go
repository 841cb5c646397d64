// What a node tells its supervisor: notifications as systemd's sd_notify(3) has them.

package main

import (
	"log/slog"
	"net"
	"strings"
	"time"
)

// The states of a node that its supervisor is told.
const (
	// notifyReady says that the node listens. It does not say that it is in a cluster, knows a
	// leader or is healthy: a supervisor that waited for that would start no node of a new
	// cluster after the first, and end one whose others are down.
	notifyReady    = "READY=1"
	notifyStopping = "STOPPING=1"
)

// notifyTimeout bounds the wait for a supervisor that does not read.
const notifyTimeout = 200 * time.Millisecond

// supervisor is the socket of whoever has started the process, by its address as NOTIFY_SOCKET
// has it: a path, or @ and an abstract name. Empty: nobody wants to be told.
type supervisor string

// findSupervisor finds it in the environment.
func findSupervisor(env func(string) (string, bool)) supervisor {
	address, _ := env("NOTIFY_SOCKET")
	isKnown := strings.HasPrefix(address, "/") || strings.HasPrefix(address, "@")
	if !isKnown { // vsock, for instance, is for virtual machines as a whole
		return ""
	}
	return supervisor(address)
}

// tell tells the supervisor a state. The node goes on, whatever comes of it.
func (s supervisor) tell(state string, logger *slog.Logger) {
	if s == "" {
		return
	}
	if err := s.send(state); err != nil {
		logger.Warn("the supervisor cannot be told", "state", state, "err", err)
	}
}

func (s supervisor) send(state string) error {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: string(s), Net: "unixgram"})
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(notifyTimeout)); err != nil {
		return err
	}
	_, err = conn.Write([]byte(state))
	return err
}
