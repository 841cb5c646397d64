//go:build ignore

// Buf runs buf over kv.proto as if that lay at raftkv/v1/kv.proto:
//
//	go run buf.go generate
//	go run buf.go lint
//
// Generated code registers a file under its path, and a program may register
// a path only once. Many projects have a kv.proto, etcd among them, but none
// has raftkv/v1/kv.proto. In this flat repository the file lies in the root
// nevertheless, so buf gets it in an archive, under its full path. Nothing is
// written to disk but what buf generates, once all of it is made.
package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
)

const buf = "github.com/bufbuild/buf/cmd/buf@v1.75.0"

// paths are the files in the archive, and where they come from.
var paths = []struct{ inArchive, onDisk string }{
	{"buf.yaml", "buf.yaml"},
	{"raftkv/v1/kv.proto", "kv.proto"},
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "buf.go:", err)
		os.Exit(1)
	}
}

// run runs a command of buf. Its further arguments stand behind the input.
func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("want a command of buf: generate or lint")
	}
	archive, err := pack()
	if err != nil {
		return err
	}
	all := append([]string{"run", buf, args[0], "-#format=tar"}, args[1:]...)
	cmd := exec.Command("go", all...)
	cmd.Stdin = archive
	cmd.Stdout = os.Stdout
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("buf %s: %w", args[0], err)
	}
	return nil
}

// pack makes the archive.
func pack() (*bytes.Buffer, error) {
	archive := &bytes.Buffer{}
	w := tar.NewWriter(archive)
	for _, p := range paths {
		content, err := os.ReadFile(p.onDisk)
		if err != nil {
			return nil, err
		}
		header := &tar.Header{Name: p.inArchive, Mode: 0o644, Size: int64(len(content))}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	return archive, w.Close()
}
