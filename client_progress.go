// How far a sub-command is that takes long, on a terminal.

package main

import (
	"fmt"
	"os"
	"time"
)

// showsProgress reports whether somebody looks at stderr: programs are told nothing.
func (c *client) showsProgress() bool {
	f, isFile := c.stderr.(*os.File)
	return isFile && c.output != "json" && isTerminal(f)
}

// progressOf returns a function that shows how much of all is done, and at which rate, in one
// line, until something else is printed.
func (c *client) progressOf(what, unit string) func(done, all uint64) {
	began := time.Now()
	return func(done, all uint64) {
		if !c.showsProgress() {
			return
		}
		c.showsLine = true
		rate := float64(done) / max(time.Since(began).Seconds(), 1e-3)
		fmt.Fprintf(c.stderr, "\r\x1b[K%s: %d of %d %s, %.0f a second", what, done, all, unit, rate)
	}
}

// endLine takes the line away that shows progress, if there is one.
func (c *client) endLine() {
	if c.showsLine {
		c.showsLine = false
		fmt.Fprint(c.stderr, "\r\x1b[K")
	}
}
