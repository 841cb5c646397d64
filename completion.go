// The sub-command completion: how a shell completes the command line. The shell's script asks this
// program for the words that may stand where the cursor is, so both always are of one version.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
)

// What is written in place of words: names of files, or of directories.
const (
	completeFiles       = ":files"
	completeDirectories = ":dirs"
)

// completionWords is the word in place of a shell's name with which scripts ask.
const completionWords = "words"

// completionScripts are the scripts, by shell.
var completionScripts = map[string]string{
	"bash": `# Completes raft-key-value in bash. In ~/.bashrc: source <(raft-key-value completion bash)
_raft_key_value() {
  # Not by COMP_WORDS: bash takes words apart at = and :, and completes the last part.
  local line=${COMP_LINE:0:COMP_POINT} part=${COMP_WORDS[COMP_CWORD]} words last candidate name
  read -ra words <<<"$line"
  if [[ $line == *[[:space:]] ]]; then words+=(""); fi
  last=${words[${#words[@]} - 1]}
  if [[ $part == [=:] ]]; then part=""; fi
  COMPREPLY=()
  while IFS= read -r candidate; do
    case $candidate in
    :files | :dirs)
      compopt -o filenames 2>/dev/null
      while IFS= read -r name; do COMPREPLY+=("$name"); done < <(compgen -"${candidate:1:1}" -- "$part")
      ;;
    *) COMPREPLY+=("${candidate#"${last%"$part"}"}") ;;
    esac
  done < <("${words[0]}" completion words -- "${words[@]:1}" 2>/dev/null)
}
complete -F _raft_key_value raft-key-value
`,
	"zsh": `#compdef raft-key-value
# Completes raft-key-value in zsh. In ~/.zshrc, behind compinit: source <(raft-key-value completion zsh)
_raft_key_value() {
  local candidate
  local -a plain
  for candidate in "${(@f)$("${words[1]}" completion words -- "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}"; do
    case $candidate in
    (:files)
      if [[ $PREFIX == -*=* ]]; then compset -P 1 '*='; fi
      _files ;;
    (:dirs)
      if [[ $PREFIX == -*=* ]]; then compset -P 1 '*='; fi
      _files -/ ;;
    (?*) plain+=("$candidate") ;;
    esac
  done
  if (( $#plain )); then compadd -- "${plain[@]}"; fi
}
if [[ ${funcstack[1]} == _raft-key-value ]]; then
  _raft_key_value
else
  compdef _raft_key_value raft-key-value
fi
`,
}

func (in *invocation) checkCompletion() error {
	isShell := completionScripts[in.args[0]] != ""
	switch {
	case isShell && len(in.args) > 1:
		return errors.New("words go with completion words alone")
	case !isShell && in.args[0] != completionWords:
		return fmt.Errorf("%q: want bash or zsh", in.args[0])
	}
	return nil
}

// completion prints a script, or the words that may stand in place of the last one.
func (c *client) completion(context.Context) error {
	text := completionScripts[c.args[0]]
	if c.args[0] == completionWords {
		for _, word := range completionsOf(c.args[1:]) {
			text += word + "\n"
		}
	}
	_, err := io.WriteString(c.stdout, text)
	return err
}

// completionsOf are the words that may stand in place of the last one of a command line, which
// begins behind the program's name.
func completionsOf(words []string) []string {
	if len(words) == 0 {
		return nil
	}
	p := &partialLine{flags: allFlags()}
	for _, word := range words[:len(words)-1] {
		p.take(word)
	}
	last := words[len(words)-1]
	var all []string
	for _, word := range p.candidates(last) {
		isName := word == completeFiles || word == completeDirectories
		if isName || strings.HasPrefix(word, last) {
			all = append(all, word)
		}
	}
	return all
}

// allFlags are those that may stand before anything else: a node's, and those that commands share.
func allFlags() *flag.FlagSet {
	o := defaultOptions()
	fs := nodeFlags(&o)
	boolVar(fs, &o.version, "version", "")
	for _, name := range sharedFlags {
		fs.String(name, "", "")
	}
	return fs
}

// partialLine is what is known of a command line by the words before the one that is completed.
type partialLine struct {
	name     string        // of the sub-command; empty: none stands there yet
	flags    *flag.FlagSet // that may stand there
	waiting  *flag.Flag    // whose value comes next; nil: none does
	args     int           // that stand there
	noFlags  bool          // behind --
	isBroken bool          // the line makes no sense
}

// take takes in the next word.
func (p *partialLine) take(word string) {
	switch {
	case p.waiting != nil:
		p.waiting = nil
	case word == "--":
		p.noFlags = true
	case !p.noFlags && isFlag(word):
		name, _, hasValue := strings.Cut(strings.TrimLeft(word, "-"), "=")
		f := p.flags.Lookup(name)
		if f != nil && !hasValue && !isBoolean(f) {
			p.waiting = f
		}
	case p.name == "" && isCommand(word):
		p.name = word
		in := &invocation{name: word, command: commands()[word]}
		p.flags = in.flagSet()
	case p.name == "":
		p.isBroken = true
	default:
		p.args++
	}
}

// candidates are the words that may come next, whatever their beginning; last is how it is written
// so far.
func (p *partialLine) candidates(last string) []string {
	name, _, hasValue := strings.Cut(last, "=")
	switch {
	case p.isBroken:
		return nil
	case p.waiting != nil:
		return valuesOf(p.waiting)
	case !p.noFlags && strings.HasPrefix(last, "-") && hasValue:
		f := p.flags.Lookup(strings.TrimLeft(name, "-"))
		if f == nil {
			return nil
		}
		return withPrefix(name+"=", valuesOf(f))
	case !p.noFlags && strings.HasPrefix(last, "-"):
		return p.flagNames(last)
	case p.name == "":
		return commandNames()
	}
	return p.arguments()
}

// withPrefix puts a prefix before words, but not before what stands for names of files.
func withPrefix(prefix string, words []string) []string {
	var all []string
	for _, word := range words {
		if !strings.HasPrefix(word, ":") {
			word = prefix + word
		}
		all = append(all, word)
	}
	return all
}

// flagNames are the flags as they are mostly written, or with one dash, if the user does so.
func (p *partialLine) flagNames(last string) []string {
	hasOneDash := len(last) > 1 && last[1] != '-'
	var names []string
	p.flags.VisitAll(func(f *flag.Flag) {
		dashes := "--"
		if hasOneDash || len(f.Name) == 1 {
			dashes = "-"
		}
		names = append(names, dashes+f.Name)
	})
	return names
}

func commandNames() []string {
	var names []string
	for name := range commands() {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// arguments are what the next argument of the sub-command may be.
func (p *partialLine) arguments() []string {
	cmd := commands()[p.name]
	if p.args >= len(cmd.args) {
		return nil
	}
	switch cmd.args[p.args] {
	case fileArgument, savedArgument:
		return []string{completeFiles}
	case directoryArgument:
		return []string{completeDirectories}
	case commandArgument:
		return commandNames()
	case shellArgument:
		return []string{"bash", "zsh"}
	}
	return nil
}

// choices are the values of flags that have but a few.
var choices = map[string][]string{
	"o":          {"text", "json"},
	"service":    {healthNames[0], healthNames[1]}, // The third one is empty.
	"join-as":    {"voter", "learner"},
	"log-level":  {"debug", "info", "warn", "error"},
	"log-format": {"text", "json"},
}

// valuesOf are what the value of a flag may be.
func valuesOf(f *flag.Flag) []string {
	if values, ok := choices[f.Name]; ok {
		return values
	}
	what, _ := flag.UnquoteUsage(f)
	switch strings.ToLower(what) {
	case "file":
		return []string{completeFiles}
	case "directory":
		return []string{completeDirectories}
	}
	return nil
}
