// Addresses as people write them, host:port, and which of them a node can have.

package main

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// splitListenAddress takes host:port apart; the host may be empty, which means
// everywhere. A port is a number: names of services differ between machines.
func splitListenAddress(address string) (host string, port uint16, err error) {
	host, number, err := net.SplitHostPort(address)
	if err != nil || number == "" {
		return "", 0, fmt.Errorf("address %s: want host:port", quoteInput(address))
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("address %s: want a port from 0 to 65535, not %s", quoteInput(address), quoteInput(number))
	}
	if strings.ContainsFunc(host, isStrange) {
		return "", 0, fmt.Errorf("address %s: there is a blank, or what cannot be printed, in the host", quoteInput(address))
	}
	if len(address) > maxAddressBytes {
		return "", 0, fmt.Errorf("address: it has %d bytes, the limit is %d", len(address), maxAddressBytes)
	}
	return host, uint16(n), nil
}

// isStrange reports whether a rune is a blank, or cannot be printed. What is no UTF-8
// reads as RuneError.
func isStrange(r rune) bool {
	isPrinted := unicode.IsPrint(r) && !unicode.IsSpace(r)
	return !isPrinted || r == utf8.RuneError
}

// splitAddress takes the address of a node apart, which has to name a host.
func splitAddress(address string) (host string, port uint16, err error) {
	host, port, err = splitListenAddress(address)
	if err == nil && host == "" {
		err = fmt.Errorf("address %s: want host:port, and a host", quoteInput(address))
	}
	return host, port, err
}

// isEverywhere reports whether a host stands for all addresses of a machine. One can
// listen there, but no other machine finds the node by it.
func isEverywhere(host string) bool {
	ip, _ := netip.ParseAddr(host)
	return host == "" || ip.Unmap().WithZone("").IsUnspecified()
}

// checkMemberAddress checks an address at which other nodes find a member.
func checkMemberAddress(address string) error {
	host, port, err := splitAddress(address)
	if err != nil {
		return err
	}
	if isEverywhere(host) || port == 0 {
		return fmt.Errorf("address %s: want where the others find the node", quoteInput(address))
	}
	return nil
}
