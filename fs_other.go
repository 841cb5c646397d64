//go:build !linux

package main

import (
	"errors"
	"os"
)

// free is not known here.
func (osFS) free(string) (uint64, error) { return 0, errors.ErrUnsupported }

// syncData makes a file durable.
func syncData(f *os.File) error { return f.Sync() }
