package main

import (
	"os"
	"syscall"
)

func (osFS) free(dir string) (uint64, error) {
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return 0, err
	}
	return s.Bavail * uint64(s.Frsize), nil
}

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
