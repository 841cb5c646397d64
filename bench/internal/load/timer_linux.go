package load

import (
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"
)

// timer sleeps precisely: time.Sleep of an idle process rounds up to 1 ms on
// Linux. It is a timerfd (see timerfd_create(2)) that the runtime polls.
type timer struct{ f *os.File }

func newTimer() (*timer, error) {
	const clockMonotonic = 1
	fd, _, errno := syscall.Syscall(syscall.SYS_TIMERFD_CREATE, clockMonotonic, syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if errno != 0 {
		return nil, fmt.Errorf("timerfd_create: %w", errno)
	}
	return &timer{os.NewFile(fd, "timerfd")}, nil
}

func (t *timer) sleep(d time.Duration) {
	raw, err := t.f.SyscallConn()
	if err != nil {
		return
	}
	spec := [2]syscall.Timespec{1: syscall.NsecToTimespec(int64(max(d, 1)))}
	_ = raw.Control(func(fd uintptr) {
		_, _, _ = syscall.Syscall6(syscall.SYS_TIMERFD_SETTIME, fd, 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
	})
	var expirations [8]byte
	_, _ = t.f.Read(expirations[:])
}

func (t *timer) close() { _ = t.f.Close() }
