package main

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// version is set with -ldflags.
var version = "unknown"

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "fairlead", version)
			return err
		},
	}
}

// requestedVersion returns the text for a value of --version, empty if it requests none.
// Like kube-proxy's flag, --version accepts a version to report. It has no effect.
func requestedVersion(value string) (string, error) {
	if value == "" || strings.HasPrefix(value, "v") {
		return "", nil
	}
	if value == "raw" {
		return fmt.Sprintf("version.Info{GitVersion:%q, GoVersion:%q, Compiler:%q, Platform:%q}",
			version, runtime.Version(), runtime.Compiler, runtime.GOOS+"/"+runtime.GOARCH), nil
	}
	requested, err := strconv.ParseBool(value)
	switch {
	case err != nil:
		return "", fmt.Errorf("--version: %q is not a boolean: use true, false or raw", value)
	case !requested:
		return "", nil
	}
	return "fairlead " + version, nil
}
