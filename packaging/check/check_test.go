// Package check has tests of what is in packaging/. It is a module of its own, for they need a
// parser of Kubernetes' objects, and the program does not.
package check

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// stopTime is how long a node may take to end, as main.go and docs/operations.md have it.
const stopTime = 10 * time.Second

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func wantPart(t *testing.T, text, part string) {
	t.Helper()
	if !strings.Contains(text, part) {
		t.Errorf("%q is not in\n%s", part, text)
	}
}

// program is the program, as the Dockerfile has it built.
var program struct {
	once sync.Once
	dir  string
	err  error
	out  []byte
}

func TestMain(m *testing.M) {
	status := m.Run()
	if program.dir != "" {
		_ = os.RemoveAll(program.dir)
	}
	os.Exit(status)
}

// buildProgram makes the program by the command in the Dockerfile, and returns its file.
func buildProgram(t *testing.T) string {
	t.Helper()
	line := regexp.MustCompile(`(?m)^RUN CGO_ENABLED=0 go (build .*) -o /out/raft-key-value \.$`).
		FindStringSubmatch(readFile(t, "../Dockerfile"))
	if line == nil {
		t.Fatal("the Dockerfile does not build the program")
	}
	program.once.Do(func() {
		program.dir, program.err = os.MkdirTemp("", "raft-key-value-check")
		if program.err != nil {
			return
		}
		args := append(strings.Fields(line[1]), "-o", filepath.Join(program.dir, "raft-key-value"), ".")
		cmd := exec.Command("go", args...)
		cmd.Dir = filepath.Join("..", "..")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		program.out, program.err = cmd.CombinedOutput()
	})
	if program.err != nil {
		t.Fatalf("go %s: %v\n%s", line[1], program.err, program.out)
	}
	return filepath.Join(program.dir, "raft-key-value")
}

// flagsOf are the flags of a node, by the program's own help.
func flagsOf(t *testing.T) map[string]bool {
	t.Helper()
	out, err := exec.Command(buildProgram(t), "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	flags := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^  -([a-z-]+)`).FindAllStringSubmatch(string(out), -1) {
		flags[m[1]] = true
	}
	return flags
}

// TestFlags looks that each flag, and each variable, that unit, manifests and Dockerfile name is one
// of the program.
func TestFlags(t *testing.T) {
	flags := flagsOf(t)
	files := []string{"../Dockerfile"}
	for _, dir := range []string{"systemd", "kubernetes"} {
		found, err := filepath.Glob("../" + dir + "/*")
		if err != nil || len(found) < 3 {
			t.Fatal(dir, found, err)
		}
		files = append(files, found...)
	}
	count := 0
	for _, file := range files {
		names := regexp.MustCompile(`RAFT_KEY_VALUE_[A-Z_]+|--[a-z][a-z-]*[= ]`).FindAllString(readFile(t, file), -1)
		for _, name := range names {
			flag := strings.TrimRight(strings.TrimLeft(name, "-"), "= ")
			flag = strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(flag, "RAFT_KEY_VALUE_")), "_", "-")
			isDockers := strings.HasSuffix(file, "Dockerfile") && (flag == "from" || flag == "chown")
			if !flags[flag] && !isDockers {
				t.Errorf("%s: %s is no flag of a node", file, name)
			}
			count++
		}
	}
	if len(flags) < 15 || count < 20 {
		t.Errorf("%d flags are named, of %v", count, flags)
	}
}
