// Package metrics reads what a node tells at /metrics as Prometheus does, by Prometheus' own code. It is a module of
// its own, for the store does not require that.
package metrics

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

var readyLine = regexp.MustCompile(`msg=ready .*advertise=(\S+).* http=(\S+)`)

// startNode builds the program and starts a node with a data directory, which is a cluster by itself. It returns where
// its metrics are.
func startNode(t *testing.T) (url string) {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "raft-key-value")
	build := exec.Command("go", "build", "-o", program)
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	node := exec.CommandContext(ctx, program, "--id", "1", "--addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0",
		"--data-dir", filepath.Join(dir, "data"))
	log, err := node.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = node.Wait() // it was killed
	})
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		if m := readyLine.FindStringSubmatch(lines.Text()); m != nil {
			go func() { _, _ = io.Copy(io.Discard, log) }() // ends with the node
			initialize(t, program, m[1])
			return "http://" + m[2] + "/metrics"
		}
	}
	t.Fatal("the node has not become ready")
	return ""
}

// initialize makes a node a cluster, and has it answer some calls.
func initialize(t *testing.T, program, address string) {
	t.Helper()
	for _, args := range []string{"init 1=" + address, "set k v", "get k", "get nosuch"} {
		command := exec.Command(program, strings.Fields(args)...)
		command.Env = append(os.Environ(), "RAFT_KEY_VALUE_ENDPOINTS="+address)
		out, err := command.CombinedOutput()
		var exit *exec.ExitError
		isNo := errors.As(err, &exit) && exit.ExitCode() == 1
		if err != nil && !isNo {
			t.Fatalf("%s: %v: %s", args, err, out)
		}
	}
}

// TestMetricsAsPrometheusReadsThem: its parser takes them, and its linter finds nothing.
func TestMetricsAsPrometheusReadsThem(t *testing.T) {
	url := startNode(t)
	// As Prometheus asks, which would have OpenMetrics rather.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status, err)
	}
	format := expfmt.ResponseFormat(resp.Header)
	if format.FormatType() != expfmt.TypeTextPlain {
		t.Errorf("the format is %q", format)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if len(families) < 100 {
		t.Errorf("there are %d metrics", len(families))
	}
	turns := families["rkv_loop_turn_seconds"].GetMetric()[0].GetHistogram()
	if turns.GetSampleCount() == 0 || turns.GetSampleSum() <= 0 {
		t.Errorf("turns: %v", turns)
	}
	problems, err := promlint.New(bytes.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}
