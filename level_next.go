//go:build nextlevel

// What a program of the next version may be like, for tests of upgrades: it speaks one level
// more. What it writes at that level is marked as such (levelField), so an older program would
// stop at it.

package main

const programLevel = firstLevel + 1
