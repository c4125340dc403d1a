package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/internal/instance"
)

// errNoSettings is returned by a command that gets no flags of `fairlead run` and finds no running
// agent.
var errNoSettings = errors.New("no Fairlead whose settings could be used runs on this node: pass the flags of `fairlead run`, such as --kubeconfig or --manifests")

// agentSettings returns the settings of `fairlead run` for a command that shows what the agent does.
// Without flags, these are the settings of the running agent, or, in a pod without one, the
// defaults.
func agentSettings(ctx context.Context, flags config.Flags) (config.Config, error) {
	if len(flags) > 0 {
		c, _, err := config.Load(flags)
		return c, err
	}
	holder, err := instance.FindHolder(ctx)
	switch {
	case err != nil:
		return config.Config{}, fmt.Errorf("%w: pass the flags of `fairlead run`", err)
	case holder == nil && os.Getenv("KUBERNETES_SERVICE_HOST") == "":
		return config.Config{}, errNoSettings
	case holder == nil:
		c, _, err := config.Load(flags)
		return c, err
	case holder.PID == 0:
		return config.Config{}, fmt.Errorf("the settings of the running Fairlead (%s) are not visible here: run this command in its container, or pass the flags of `fairlead run`", holder)
	}
	c, err := processSettings(holder.PID)
	if err != nil {
		return c, fmt.Errorf("use the settings of the running Fairlead (%s): %w: pass the flags of `fairlead run`", holder, err)
	}
	return c, nil
}

// splitLogFlags returns the flags that are not about logging, and the logger that the others select.
// It logs warnings and errors by default.
func splitLogFlags(flags config.Flags, stderr io.Writer) (config.Flags, *slog.Logger, error) {
	settings, logging := config.Flags{}, config.Flags{}
	for name, value := range flags {
		switch name {
		case "log-level", "log-format", "logging-format", "v":
			logging[name] = value
		default:
			settings[name] = value
		}
	}
	c, _, err := config.Load(logging)
	if err != nil {
		return nil, nil, err
	}
	if logging["log-level"] == "" && logging["v"] == "" {
		c.LogLevel = slog.LevelWarn
	}
	return settings, config.NewLogger(stderr, c.LogLevel, c.LogFormat), nil
}

// errOtherProgram is returned for a process that holds the instance lock but does not run an agent,
// such as `fairlead cleanup`.
var errOtherProgram = errors.New("it does not run `fairlead run`")

// processSettings returns the settings of an agent that runs as this process, with the current content
// of its configuration file.
func processSettings(pid int) (config.Config, error) {
	folder := filepath.Join("/proc", strconv.Itoa(pid))
	line, err := os.ReadFile(filepath.Join(folder, "cmdline"))
	if err != nil {
		return config.Config{}, err
	}
	flags, err := runFlags(splitCommandLine(line))
	if err != nil {
		return config.Config{}, err
	}
	files := openProcessFiles(folder)
	if path, ok := flags["config"]; ok {
		flags["config"] = files.path(path)
	}
	c, _, err := config.Load(flags)
	c.API.Kubeconfig, c.Manifests = files.path(c.API.Kubeconfig), files.path(c.Manifests)
	return c, err
}

// splitCommandLine returns the arguments in the content of /proc/PID/cmdline (proc(5)).
func splitCommandLine(content []byte) []string {
	var args []string
	for arg := range bytes.SplitSeq(bytes.TrimSuffix(content, []byte{0}), []byte{0}) {
		args = append(args, string(arg))
	}
	return args
}

// runFlags returns the flags of a command line of `fairlead run`, including the program's name.
func runFlags(args []string) (config.Flags, error) {
	args = commandArgs(args)
	if len(args) == 0 || args[0] != "run" {
		return nil, errOtherProgram
	}
	cmd := &cobra.Command{}
	flags := config.AddFlags(cmd)
	cmd.SetErr(io.Discard)
	if err := cmd.ParseFlags(args[1:]); err != nil {
		return nil, err
	}
	return flags, nil
}

// processFiles translates the paths of another process.
type processFiles struct {
	root string // empty if the process sees the same files
	cwd  string
}

// openProcessFiles returns the translation for a process. If it is not visible, the paths stay as they
// are.
func openProcessFiles(folder string) processFiles {
	var f processFiles
	f.cwd, _ = os.Readlink(filepath.Join(folder, "cwd"))
	theirs, errTheirs := os.Readlink(filepath.Join(folder, "ns/mnt"))
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err == nil && errTheirs == nil && ours != theirs {
		f.root = filepath.Join(folder, "root")
	}
	return f
}

// path returns the path by which this process opens a file of the other one.
func (f processFiles) path(path string) string {
	switch {
	case path == "":
		return ""
	case !filepath.IsAbs(path):
		path = filepath.Join(f.cwd, path)
	}
	return filepath.Join(f.root, path)
}

// desiredOptions returns the options to compute what an agent with these settings programs. The
// caller closes nothing: the source works only while it is read.
func desiredOptions(c config.Config, timeout time.Duration, log *slog.Logger) (desired.Options, error) {
	b, err := backend.ByName(c.Mode)
	if err != nil {
		return desired.Options{}, err
	}
	source, err := openReadOnlySource(c, log)
	if err != nil {
		return desired.Options{}, err
	}
	return desired.Options{Config: c, Backend: b, Source: source, SourceName: sourceName(c), Timeout: timeout, Logger: log}, nil
}
