package main

import (
	"os"
	"syscall"
)

func syncData(f *os.File) error {
	for {
		err := syscall.Fdatasync(int(f.Fd()))
		if err != syscall.EINTR { // interrupted before it did anything: not a failure
			return os.NewSyscallError("fdatasync "+f.Name(), err)
		}
	}
}
