package check

import (
	"debug/elf"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestStatic looks that the program needs no libc, which the image has not.
func TestStatic(t *testing.T) {
	file, err := elf.Open(buildProgram(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	libraries, err := file.ImportedLibraries()
	if err != nil || len(libraries) > 0 {
		t.Error(libraries, err)
	}
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("it wants a dynamic linker")
		}
	}
}

// TestImage runs the program as the image does: as process 1, as the user of the Dockerfile, in a
// root that has nothing but it and an empty /data, and that cannot be written. There is
// no /proc, no /tmp, and no /etc.
func TestImage(t *testing.T) {
	dockerfile := readFile(t, "../Dockerfile")
	wantPart(t, dockerfile, "\nENTRYPOINT [\"/raft-key-value\"]\n")
	wantPart(t, dockerfile, "\nSTOPSIGNAL SIGTERM\n")
	user, err := strconv.Atoi(regexp.MustCompile(`(?m)^USER (\d+):`).FindStringSubmatch(dockerfile)[1])
	if err != nil || user == 0 {
		t.Fatalf("it runs as user %d: %v", user, err)
	}
	root := makeDirectory(t, t.TempDir(), "root")
	copyFile(t, buildProgram(t), filepath.Join(root, "raft-key-value"))
	makeDirectory(t, root, "data")
	if err := os.Chmod(root, 0o555); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(root, 0o700) })
	start := func() *node {
		cmd := exec.Command("/raft-key-value", "--id", "1", "--addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--data-dir", "/data/node")
		cmd.Env, cmd.Dir = []string{}, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Chroot:                     root,
			Cloneflags:                 syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC,
			UidMappings:                []syscall.SysProcIDMap{{ContainerID: user, HostID: os.Getuid(), Size: 1}},
			GidMappings:                []syscall.SysProcIDMap{{ContainerID: user, HostID: os.Getgid(), Size: 1}},
			GidMappingsEnableSetgroups: false,
			Pdeathsig:                  syscall.SIGKILL,
		}
		return startNode(t, cmd)
	}

	n := start()
	status := readFile(t, fmt.Sprintf("/proc/%d/status", n.cmd.Process.Pid))
	if !regexp.MustCompile(`(?m)^NSpid:\s+\d+\s+1$`).MatchString(status) {
		t.Errorf("it is not process 1:\n%s", status)
	}
	if !regexp.MustCompile(`(?m)^CapEff:\s+0+$`).MatchString(status) {
		t.Errorf("it has capabilities:\n%s", status)
	}
	n.command(t, "init", "1="+n.address)
	n.command(t, "set", "key", "value")
	for _, path := range []string{"/livez", "/readyz"} {
		resp, err := http.Get("http://" + n.http + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	n.stop(t, n.cmd.Process.Pid)
	entries, err := os.ReadDir(root)
	if err != nil || len(entries) != 2 {
		t.Errorf("it has left %v, %v", entries, err)
	}

	again := start()
	if value := strings.TrimSpace(again.command(t, "get", "key")); value != "value" {
		t.Errorf("after a restart, the key has %q", value)
	}
	again.stop(t, again.cmd.Process.Pid)
}
