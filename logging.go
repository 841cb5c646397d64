// How a node's log is written.

package main

import (
	"fmt"
	"io"
	"log/slog"
)

// newLogger is the logger of a node, as its flags say.
func newLogger(w io.Writer, o *options) *slog.Logger {
	return slog.New(logHandler(w, o)).With("node", o.id)
}

func logHandler(w io.Writer, o *options) slog.Handler {
	options := &slog.HandlerOptions{Level: o.logLevel}
	if o.logFormat != "json" {
		return slog.NewTextHandler(w, options)
	}
	options.ReplaceAttr = asInText
	return slog.NewJSONHandler(w, options)
}

// asInText has a value written in JSON as it is in text. Else a duration would be a number, and
// an address an object of Go's.
func asInText(_ []string, a slog.Attr) slog.Attr {
	value := a.Value.Any()
	if text, ok := value.(fmt.Stringer); ok && a.Value.Kind() != slog.KindTime {
		a.Value = slog.StringValue(text.String())
	}
	return a
}
