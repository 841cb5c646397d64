// How a node's process ends: its exit status, and which errors no restart mends.

package main

import (
	"errors"
	"syscall"
)

// The exit statuses of a node. Its others are exitYes, once it was told to stop, and exitUsage.
const (
	exitFailed  = 1 // it could not start, or could not go on: it may be started again
	exitForGood = 5 // it must not be started again as it is: that would end in the same way
)

// errorsForGood are those of the loop after which the node must not be started again as it is:
// an operator has to decide, or to start a newer program.
var errorsForGood = []error{errRemoved, errContradiction, errLevel, errDiskMissing}

// unfit is an error over what a node was given to start with, which no restart alters.
type unfit struct{ error }

func (u unfit) Unwrap() error { return u.error }

// misuse is an error over how a node was started, which is a usage error.
type misuse struct{ error }

func (m misuse) Unwrap() error { return m.error }

// unlessOfSystem makes an error over the content of a data directory one for good. An error of
// the system, such as EIO or EACCES, may be gone at the next start.
func unlessOfSystem(err error) error {
	if isOfSystem(err) {
		return err
	}
	return unfit{err}
}

// isOfSystem reports whether the system has failed at something. That a file is not there is
// no failure of the system.
func isOfSystem(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && errno != syscall.ENOENT
}

// isForGood reports whether the node must not be started again as it is.
func isForGood(err error) bool {
	var u unfit
	if errors.As(err, &u) {
		return true
	}
	for _, e := range errorsForGood {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// exitOf is the exit status of a node that has ended with an error, or was told to stop: nil.
func exitOf(err error) int {
	var m misuse
	switch {
	case err == nil:
		return exitYes
	case errors.As(err, &m):
		return exitUsage
	case isForGood(err):
		return exitForGood
	}
	return exitFailed
}

// exitHelp explains the exit statuses of a node.
const exitHelp = `
Exit status of a node:
  0  it was told to stop, by SIGTERM or SIGINT
  1  it could not start, or could not go on: start it again
  2  usage error
  5  it must not be started again as it is: it was removed, or its data directory is damaged, is
     another's, missing, or contradicts the cluster, or the program is too old; the last line of
     the log says what to do
`
