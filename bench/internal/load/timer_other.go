//go:build !linux

package load

import "time"

type timer struct{}

func newTimer() (*timer, error) { return &timer{}, nil }

func (*timer) sleep(d time.Duration) { time.Sleep(d) }

func (*timer) close() {}
