package main

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"
)

// TestLogFormat: a line of JSON has the names of the text, and values as they are in the text.
func TestLogFormat(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ format, want string }{
		{"text", `level=WARN msg="two words" node=7 addr=127.0.0.1:1 took=1.5s err="no way" n=3 joint=true` + "\n"},
		{"json", `"level":"WARN","msg":"two words","node":7,"addr":"127.0.0.1:1","took":"1.5s","err":"no way","n":3,"joint":true}` + "\n"},
	} {
		o := defaultOptions()
		o.id = 7
		o.logFormat = test.format
		o.logLevel = slog.LevelWarn
		var log strings.Builder
		logger := newLogger(&log, &o)
		logger.Info("left out")
		logger.Warn("two words", "addr", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}, "took", 1500*time.Millisecond,
			"err", errors.New("no way"), "n", 3, "joint", true)
		_, line, _ := strings.Cut(log.String(), " ")
		if test.format == "json" {
			_, line, _ = strings.Cut(log.String(), ",")
		}
		wantText(t, test.format, line, test.want)
		if strings.Contains(log.String(), "left out") {
			t.Errorf("%s: the level is not kept: %s", test.format, &log)
		}
	}
}

// TestLogOfProcessInJSON: with --log-format json, all that a node logs is.
func TestLogOfProcessInJSON(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	status, log := endOfProcess(t, "--id", "3", "--addr", l.Addr().String(), "--log-format", "json")
	if status != exitFailed {
		t.Errorf("status %d", status)
	}
	var last struct {
		Level, Msg string
		Node       uint64
		Err        string
	}
	for line := range strings.Lines(log) {
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Errorf("%v: %q", err, line)
		}
	}
	wantText(t, "last line", last.Msg, "stopped")
	wantPart(t, last.Err, "address already in use")
	if last.Node != 3 {
		t.Errorf("it is of node %d", last.Node)
	}
}
