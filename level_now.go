//go:build !nextlevel

// What this program speaks.

package main

// programLevel is the highest level that this program speaks.
const programLevel = firstLevel
