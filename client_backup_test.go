// Tests of the sub-commands backup, restore and verify, of the files that they read and write, and of
// their progress. Those of whole clusters are in disk_test.go.

package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"raft-key-value/kvpb"
)

// TestBackupToStdout: all of it, and nothing else, goes to stdout.
func TestBackupToStdout(t *testing.T) {
	f := newFakeNode(t)
	_, whole := backupOf(t, 1000)
	f.do(func() { f.backup = whole })
	dir := realDirectory(t)
	for _, from := range [][]string{{"--endpoints", f.addr}, {"--data-dir", dir}} {
		for _, output := range []string{"text", "json"} {
			out, errs := runCommand(t, exitYes, "", append([]string{"backup", "-", "-o", output}, from...)...)
			result := map[string]string{"text": "wrote keys: ", "json": `"keys":"`}[output]
			wantPart(t, errs, result)
			if strings.Contains(out, result) {
				t.Errorf("stdout has the result, too")
			}
			if from[0] == "--endpoints" && out != string(whole) {
				t.Errorf("%d bytes, want %d", len(out), len(whole))
			}
			text, _ := runCommand(t, exitYes, out, "verify", "-")
			wantPart(t, text, "whole:     a backup of a ")
			data := filepath.Join(t.TempDir(), "data")
			runCommand(t, exitYes, out, "restore", "-", "--data-dir", data, "--id", "1", "--addr", "127.0.0.1:1")
		}
	}
}

// TestBackupToStdoutOfSeveral: another node may be asked only before anything is written.
func TestBackupToStdoutOfSeveral(t *testing.T) {
	broken, live := newFakeNode(t), newFakeNode(t)
	_, whole := backupOf(t, 100)
	broken.do(func() { broken.backup = whole[:len(whole)/2] })
	live.do(func() { live.backup = whole })
	_, errs := runCommand(t, exitNotDone, "", "backup", "-", "--endpoints", broken.addr+","+live.addr)
	wantPart(t, errs, "stdout cannot be begun anew at another node; what was written to stdout is no backup")
	out, _ := runCommand(t, exitYes, "", "backup", "-", "--endpoints", closedAddress+","+live.addr)
	wantText(t, "stdout", out, string(whole))
	_, errs = runCommand(t, exitNotDone, "", "backup", "-", "--endpoints", closedAddress)
	if strings.Contains(errs, "no backup") {
		t.Errorf("nothing was written: %s", errs)
	}
}

// TestBackupOfOlderNode: a backup that could not be restored is none.
func TestBackupOfOlderNode(t *testing.T) {
	f := newFakeNode(t)
	s, _ := backupOf(t, 3)
	f.do(func() { f.backup = snapshotBytes(t, s) })
	_, errs := runCommand(t, exitNotDone, "", "backup", filepath.Join(t.TempDir(), "b"), "--endpoints", f.addr)
	wantPart(t, errs, "it runs an older program")
}

// TestBackupThatCannotBeWritten: the exit status is 3, and the error says so.
func TestBackupThatCannotBeWritten(t *testing.T) {
	t.Parallel() // it mostly waits
	f := newFakeNode(t)
	_, whole := backupOf(t, 20000) // more than a pipe holds
	f.do(func() { f.backup = whole })
	dir := realDirectory(t)
	r, closed, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer closed.Close()
	r.Close()
	unread, full, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer unread.Close()
	defer full.Close()
	stdouts := map[string]io.Writer{"broken pipe": closed, "deadline exceeded": full}
	for why, stdout := range stdouts {
		for _, from := range [][]string{{"--endpoints", f.addr}, {"--data-dir", dir}} {
			isShort := from[0] == "--data-dir"
			if isShort && stdout == full {
				continue // a pipe holds all of it
			}
			var errs bytes.Buffer
			timeout := "20s"
			if stdout == full {
				timeout = fullTimeout.String()
			}
			exit := runClient(t.Context(), append([]string{"backup", "-", "--timeout", timeout}, from...), nil, stdout, &errs)
			if exit != exitNotDone {
				t.Errorf("%s: exit status %d", why, exit)
			}
			wantPart(t, errs.String(), why)
			wantPart(t, errs.String(), "what was written to stdout is no backup\n")
		}
	}
}

// TestBackupToBrokenPipe: the process says what has happened, and is not ended by a signal.
func TestBackupToBrokenPipe(t *testing.T) {
	t.Parallel()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	cmd := commandOf(log, "backup", "-", "--data-dir", realDirectory(t))
	cmd.Stdout = w
	_ = cmd.Run()
	w.Close()
	text, err := os.ReadFile(log.Name())
	if err != nil || cmd.ProcessState.ExitCode() != exitNotDone {
		t.Errorf("%v, %v: %s", cmd.ProcessState, err, text)
	}
	wantPart(t, string(text), "broken pipe; what was written to stdout is no backup\n")
}

// TestBackupOfDirectoryCallsNobody: what is needed for calls only does not keep it from being made.
func TestBackupOfDirectoryCallsNobody(t *testing.T) {
	t.Setenv(endpointVariable, "nonsense")
	t.Setenv(variableOf("cert-file"), "/nosuch")
	dir := realDirectory(t)
	file := filepath.Join(t.TempDir(), "b")
	out, errs := runCommand(t, exitYes, "", "backup", "--data-dir", dir, file)
	wantPart(t, out, "wrote keys: ")
	wantPart(t, errs, "if it was behind, what was acknowledged later is missing")
	_, errs = runCommand(t, exitNotDone, "", "backup", "--data-dir", dir, file)
	wantPart(t, errs, "file already exists")
	_, errs = runCommand(t, exitNotDone, "", "backup", "--data-dir", dir+"2", file+"2")
	wantPart(t, errs, "no such file")
	if _, err := os.Lstat(dir + "2"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it has made a directory: %v", err)
	}
}

// TestBackupIntoDirectory: what is saved is not changed, whatever the way to it.
func TestBackupIntoDirectory(t *testing.T) {
	dir := realDirectory(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(dir, "below")
	if err := os.Mkdir(below, 0o700); err != nil {
		t.Fatal(err)
	}
	linkBelow := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(below, linkBelow); err != nil {
		t.Fatal(err)
	}
	before := lookOf(t, dir)
	t.Chdir(below)
	for _, file := range []string{
		filepath.Join(dir, "b"), filepath.Join(link, "b"), filepath.Join(link, "below", "b"), filepath.Join(linkBelow, "b"),
		"b", "../b",
	} {
		for _, saved := range []string{dir, link, ".."} {
			_, errs := runCommand(t, exitUsage, "", "backup", "--data-dir", saved, file)
			wantPart(t, errs, file+" would be in the data directory "+saved)
		}
	}
	if after := lookOf(t, dir); after != before {
		t.Errorf("it was\n%.300s\nand is\n%.300s", before, after)
	}
	runCommand(t, exitYes, "", "backup", "--data-dir", dir, filepath.Join(dir, "..", "b"))
}

// TestBackupTakesNoName: a file that was made while the backup was written stays what it is, with links
// and without; and without one, the backup gets its name.
func TestBackupTakesNoName(t *testing.T) {
	noLinks := func(string, string) error { return syscall.EPERM }
	for how, link := range map[string]func(string, string) error{"links": os.Link, "no links": noLinks} {
		dir := t.TempDir()
		path := filepath.Join(dir, "backup")
		write := func(name, content string) {
			t.Helper()
			if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(path+".tmp", "backup")
		write(path, "other")
		err := nameOnce(path+".tmp", path, link)
		text, readErr := os.ReadFile(path)
		if !errors.Is(err, os.ErrExist) || readErr != nil || string(text) != "other" {
			t.Errorf("%s: %v; the other file is %q, %v", how, err, text, readErr)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		err = nameOnce(path+".tmp", path, link)
		text, readErr = os.ReadFile(path)
		if err != nil || readErr != nil || string(text) != "backup" {
			t.Errorf("%s: %v; the backup is %q, %v", how, err, text, readErr)
		}
		err = nameOnce(path+"2.tmp", path+"2", link) // there is none: no name is left behind
		if names, _ := os.ReadDir(dir); err == nil || len(names) != 1 {
			t.Errorf("%s: %v; there is %v", how, err, names)
		}
	}
	path := filepath.Join(t.TempDir(), "backup")
	b, err := createBackup(path)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if err := os.WriteFile(path, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.finish(); !errors.Is(err, os.ErrExist) {
		t.Errorf("another file has the name: %v", err)
	}
}

// TestBackupOfDirectorySays: what may be missing, and what may be too much.
func TestBackupOfDirectorySays(t *testing.T) {
	var errs bytes.Buffer
	c := newClient(&invocation{output: "text"}, nil, io.Discard, &errs)
	for _, test := range []struct {
		h    *kvpb.SnapshotHeader
		want []string
	}{
		{&kvpb.SnapshotHeader{Index: 7, Term: 3, Origin: 1}, nil},
		{&kvpb.SnapshotHeader{Index: 7, Term: 3, Origin: 2, Committed: 7}, []string{"up to entry 7 of term 3: if it was behind"}},
		{&kvpb.SnapshotHeader{Index: 7, Term: 3, Origin: 2, Committed: 5}, []string{"up to entry 7 of term 3: if it was behind", "after entry 5, none was known"}},
	} {
		errs.Reset()
		c.warnOfOrigin(test.h)
		if lines := strings.Count(errs.String(), "\n"); lines != len(test.want) {
			t.Errorf("%v: %s", test.h, &errs)
		}
		for _, want := range test.want {
			wantPart(t, errs.String(), want)
		}
	}
}

// savedFiles are files by what they are, as restore calls them.
func savedFiles(t *testing.T) (files map[string]string, backup string) {
	t.Helper()
	dir := realDirectory(t)
	_, whole := backupOf(t, 100)
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files = map[string]string{"it is a directory, and no backup": dir}
	for _, e := range names {
		path := filepath.Join(dir, e.Name())
		switch {
		case isSegment(e.Name()):
			files["it is a segment of a node's log"] = path
		case isSnapshot(e.Name()):
			files["it is a snapshot that is not marked as a backup"] = path
		case e.Name() == "identity":
			files["it is the file identity of a data directory"] = path
		}
	}
	other := t.TempDir()
	backup = filepath.Join(other, "backup")
	newerFrames := slices.Clone(whole)
	newerFrames[7]++
	newer := recordBytes(t, headerRecord(func(h *kvpb.SnapshotHeader) { h.Format++ }))
	var gzipped bytes.Buffer
	packing := gzip.NewWriter(&gzipped)
	_, _ = packing.Write(whole) // to memory
	_ = packing.Close()
	kind := recordBytes(t, headerRecord(func(h *kvpb.SnapshotHeader) { h.Origin = 7 }))
	for what, content := range map[string][]byte{
		"": whole, "offset 0: it is empty": nil, "it ends in the middle": whole[:len(whole)-1],
		"it is a text, and no backup": []byte("a text, but no backup\n\tü"), fmt.Sprint("it knows format ", snapshotFormat): newer,
		"it is of a format that this program does not know": newerFrames, "of a kind that a newer program has made": kind,
		"compressed by gzip": gzipped.Bytes(), "compressed by zstd": []byte("\x28\xb5\x2f\xfd any"),
		"compressed by xz": []byte("\xfd7zXZ\x00 any"), "compressed by bzip2": []byte("BZh91AY"), "it is a zip archive": []byte("PK\x03\x04"),
		"it begins as no backup does": {1, 2, 3, 4, 5}, "it does not begin as it should": append(make([]byte, 4096), whole[4096:]...),
	} {
		path := filepath.Join(other, fmt.Sprint("file", len(files)))
		if what == "" {
			path = backup
		} else {
			files[what] = path
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return files, backup
}

// TestBeginnings: what may be a damaged snapshot is left to whoever reads on, and a text is one also if
// its beginning ends within a character.
func TestBeginnings(t *testing.T) {
	long := strings.Repeat("x", beginningBytes-1)
	for content, want := range map[string]error{
		frameMagic + "any":                     nil,
		frameMagic[:3]:                         nil,
		"xyzt" + frameMagic[4:]:                nil,
		"xyztu" + frameMagic[5:] + "\x00":      errUnknown,
		"\x00\x00\x00\x00\x00\x00\x00\x00\x01": nil,
		"\x00\x00\x00\x00\x00\x00\x00\x01\x00": errUnknown,
		"":                                     errEmpty,
		"k":                                    errText,
		long + "ü":                             errText,
		long + "\xff":                          errUnknown,
		"ü\x7f":                                errUnknown,
		"line\r\n\tand line":                   errText,
	} {
		if err := checkBeginning(bufio.NewReaderSize(strings.NewReader(content), 64<<10)); err != want {
			t.Errorf("%.20q: %v, want %v", content, err, want)
		}
	}
}

// TestRestoreNamesWhatIsNoBackup: and makes nothing of it.
func TestRestoreNamesWhatIsNoBackup(t *testing.T) {
	files, backup := savedFiles(t)
	data := filepath.Join(t.TempDir(), "data")
	restore := func(want int, path string, more ...string) string {
		t.Helper()
		_, errs := runCommand(t, want, "", append([]string{"restore", path, "--data-dir", data, "--id", "1", "--addr", "127.0.0.1:1"}, more...)...)
		return errs
	}
	if len(files) != 17 {
		t.Errorf("%d files", len(files))
	}
	for what, path := range files {
		wantPart(t, restore(exitNotDone, path), path+": ")
		wantPart(t, restore(exitNotDone, path), what)
		if _, err := os.Lstat(data); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: it has made a directory: %v", what, err)
		}
		if !strings.Contains(what, "snapshot") {
			restore(exitNotDone, path, "--bare-snapshot")
		}
	}
	restore(exitYes, backup)
	data += "2"
	restore(exitYes, files["it is a snapshot that is not marked as a backup"], "--bare-snapshot")
	data += "3"
	restore(exitYes, backup, "--bare-snapshot")
}

// TestVerifyFiles: whole, damaged, or neither.
func TestVerifyFiles(t *testing.T) {
	files, backup := savedFiles(t)
	delete(files, "it is a directory, and no backup")
	for what, path := range files {
		want := exitNotDone
		switch what {
		case "offset 0: it is empty", "it ends in the middle", "it does not begin as it should":
			want = exitNo
		case "it is a snapshot that is not marked as a backup":
			out, _ := runCommand(t, exitYes, "", "verify", path)
			wantPart(t, out, "whole:     a snapshot that is not marked as a backup\nbut:       out of a data directory, it lacks ")
			continue
		}
		_, errs := runCommand(t, want, "", "verify", path)
		wantPart(t, errs, path+": ")
		wantPart(t, errs, what)
		if want == exitNo {
			wantPart(t, errs, "raft-key-value: verify: damaged: ")
			wantPart(t, errs, "offset ")
		}
	}
	runCommand(t, exitNotDone, "", "verify", backup+"2") // there is none

	out, _ := runCommand(t, exitYes, "", "verify", backup)
	wantText(t, "verify", out, `whole:     a backup of a cluster
cluster:   0000000000000009
level:     1
entry:     7 of term 3
version:   100
keys:      100
sessions:  0
`)
	out, _ = runCommand(t, exitYes, "", "verify", backup, "-o", "json")
	wantText(t, "verify", out, `{"kind":"backup_of_cluster","cluster_id":"9","node_id":"0","raft_id":"0","level":1,"index":"7","term":"3",`+
		`"committed":"7","version":"100","keys":"100","sessions":"0","snapshot_index":"0","torn":"","left_over":[]}`+"\n")

	b, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	damaged := backup + ".damaged"
	for at := 0; at < len(b); at += 61 {
		if at == 7 {
			continue // the version
		}
		b[at] ^= 1 << (at % 8)
		if err := os.WriteFile(damaged, b, 0o600); err != nil {
			t.Fatal(err)
		}
		b[at] ^= 1 << (at % 8)
		_, errs := runCommand(t, exitNo, "", "verify", damaged)
		wantPart(t, errs, damaged+": snapshot, offset ")
	}
	_, errs := runCommand(t, exitNo, "", "verify", damaged, "-o", "json")
	var e commandError
	if err := json.Unmarshal([]byte(errs), &e); err != nil || e.Status != exitNo {
		t.Errorf("%v: %s", err, errs)
	}
}

// TestVerifyDirectories: what counts there is whole, or the damage is named; what does not count is
// listed.
func TestVerifyDirectories(t *testing.T) {
	dir := realDirectory(t)
	out, _ := runCommand(t, exitYes, "", "verify", dir)
	for _, part := range []string{
		"whole:     a data directory\n", "node:      1, raft ID ", "snapshot:  entry ", "entry:     ", "torn:      " + dir,
		"left over: 0000000000000001-0000000000000001.snap, 00000000000000aa.tmp: not read",
	} {
		wantPart(t, out, part)
	}
	out, _ = runCommand(t, exitYes, "", "verify", dir, "-o", "json")
	var v verification
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Kind != "directory" || v.NodeID != 1 || v.RaftID == 0 || len(v.LeftOver) != 2 || v.Torn == "" {
		t.Errorf("%v: %s", err, out)
	}
	if v.SnapshotIndex > v.Committed || v.Committed > v.Index || v.Keys == 0 || v.Version == 0 {
		t.Errorf("%+v", v)
	}
	file := filepath.Join(t.TempDir(), "backup")
	runCommand(t, exitYes, "", "backup", "--data-dir", dir, file)
	out, _ = runCommand(t, exitYes, "", "verify", file, "-o", "json")
	want := verification{
		Kind: "backup_of_directory", ClusterID: v.ClusterID, Level: v.Level, Index: v.Index, Term: v.Term,
		Committed: v.Committed, Version: v.Version, Keys: v.Keys, LeftOver: []string{},
	}
	wantJSON, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	wantText(t, "of its backup", out, string(wantJSON)+"\n")

	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	checked := map[bool]int{}
	for _, e := range names {
		path := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		isKept := isSegment(e.Name()) || isSnapshot(e.Name()) || e.Name() == "identity"
		counts := isKept && !slices.Contains(v.LeftOver, e.Name())
		checked[counts]++
		at := len(b) / 2
		damaged := slices.Clone(b)
		damaged[at] ^= 1
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if counts {
			_, errs := runCommand(t, exitNo, "", "verify", dir)
			wantPart(t, errs, e.Name())
			wantPart(t, errs, "offset ")
			_, errs = runCommand(t, exitNotDone, "", "backup", "--data-dir", dir, file+"2")
			wantPart(t, errs, e.Name())
			if found, _ := filepath.Glob(file + "2*"); len(found) > 0 {
				t.Errorf("there is %q", found)
			}
		} else {
			runCommand(t, exitYes, "", "verify", dir)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if checked[true] < 3 || checked[false] < 3 {
		t.Errorf("of these kinds there are %v", checked)
	}
	empty := t.TempDir()
	_, errs := runCommand(t, exitNotDone, "", "verify", empty)
	wantPart(t, errs, "it has nothing of a node in it")
}

// TestKindsHaveWords: whatever verify finds, it can say.
func TestKindsHaveWords(t *testing.T) {
	found := map[string]bool{"directory": true}
	for origin := range kvpb.SnapshotOrigin_name {
		found[verificationOf(&kvpb.SnapshotHeader{Origin: kvpb.SnapshotOrigin(origin)}).Kind] = true
	}
	if !maps.EqualFunc(found, kinds, func(bool, string) bool { return true }) {
		t.Errorf("%v, and words for %v", found, kinds)
	}
}

// FuzzSavedFile: whatever is in a file, it is refused, or is the backup as it was. It is never called
// whole with a bit that is flipped.
func FuzzSavedFile(f *testing.F) {
	s := filledStore(40)
	s.clusterID, s.index, s.term = 9, 7, 3
	s.configure(&raftpb.ConfState{Voters: []uint64{leaderID}}, plainMembers(leaderID))
	v := s.openBackup()
	whole := viewBytes(f, v)
	v.close()
	f.Add(uint32(0), uint8(0), []byte(nil), uint32(0))
	f.Add(uint32(7), uint8(0), []byte(walMagic), uint32(3))
	f.Add(uint32(16), uint8(3), []byte(identityBeginning), uint32(0))
	f.Add(uint32(700), uint8(7), bytes.Repeat([]byte{0}, 100), uint32(1))
	scan := func(b []byte) error {
		saved := readStdin(context.Background(), bytes.NewReader(b))
		defer saved.close()
		_, _, err := saved.scan(snapshotScan{countsOnly: true})
		return err
	}
	if err := scan(whole); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, at uint32, bit uint8, over []byte, cut uint32) {
		flipped := slices.Clone(whole)
		flipped[int(at)%len(whole)] ^= 1 << (bit % 8)
		if scan(flipped) == nil {
			t.Fatalf("bit %d of byte %d: whole", bit%8, int(at)%len(whole))
		}
		mutated := slices.Clone(whole)
		copy(mutated[int(at)%len(whole):], over)
		mutated = mutated[:len(mutated)-int(cut)%len(mutated)]
		if err := scan(mutated); err == nil && !bytes.Equal(mutated, whole) {
			t.Fatal("whole, and not what it was")
		}
	})
}

// shortWriter takes so many bytes, and then fails.
type shortWriter struct{ left int }

func (w *shortWriter) Write(b []byte) (int, error) {
	if len(b) > w.left {
		return 0, io.ErrShortWrite
	}
	w.left -= len(b)
	return len(b), nil
}

// TestBackupWhoseEndIsNotWritten: not even the last byte may be missing.
func TestBackupWhoseEndIsNotWritten(t *testing.T) {
	f := newFakeNode(t)
	_, whole := backupOf(t, 1000)
	f.do(func() { f.backup = whole })
	for missing, want := range map[int]int{0: exitYes, 1: exitNotDone, len(whole): exitNotDone} {
		var errs bytes.Buffer
		args := []string{"backup", "-", "--endpoints", f.addr}
		if exit := runClient(t.Context(), args, nil, &shortWriter{len(whole) - missing}, &errs); exit != want {
			t.Errorf("%d bytes are missing: exit status %d: %s", missing, exit, &errs)
		}
	}
}
