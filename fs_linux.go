package main

import (
	"os"
	"syscall"
)

// syncData makes a file's content durable, and leaves out metadata that reading does not
// need, such as the time of the last change.
func syncData(f *os.File) error {
	for {
		err := syscall.Fdatasync(int(f.Fd()))
		if err != syscall.EINTR { // EINTR: it did nothing, and is called again
			return os.NewSyscallError("fdatasync "+f.Name(), err)
		}
	}
}
