// Program release creates container images of the node agent without a container engine, and
// pushes them to a registry.
//
//	release image [flags] PROGRAM...
//	release push [flags] REPOSITORY:TAG
//
// image writes an OCI image layout with one image per PROGRAM, which may have different
// architectures, and an SBOM for each. The layout depends only on the programs and the flags:
// the same input leads to the same bytes. push copies a layout, including the SBOMs, and prints
// the digest of its index. It reads the user name and the password of the registry from
// REGISTRY_USERNAME and REGISTRY_PASSWORD.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		_, _ = fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	usage := errors.New("usage: release image [flags] PROGRAM... or release push [flags] REPOSITORY:TAG")
	if len(args) == 0 {
		return usage
	}
	flags := flag.NewFlagSet("release "+args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	layout := flags.String("layout", "", "`directory` of the OCI image layout")
	switch args[0] {
	case "image":
		var m metadata
		var seconds int64
		flags.StringVar(&m.Version, "version", "", "version of the programs")
		flags.StringVar(&m.Revision, "revision", "", "commit of the programs")
		flags.StringVar(&m.Source, "source", "", "`URL` of the repository; empty omits the label")
		flags.Int64Var(&seconds, "created", 0, "time of the commit in `seconds` since 1970, as in SOURCE_DATE_EPOCH")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		if *layout == "" || m.Version == "" || flags.NArg() == 0 {
			return fmt.Errorf("-layout, -version and a PROGRAM are required: %w", usage)
		}
		m.Created = time.Unix(seconds, 0).UTC()
		return writeLayout(*layout, m, flags.Args())
	case "push":
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		if *layout == "" || flags.NArg() != 1 {
			return fmt.Errorf("-layout and REPOSITORY:TAG are required: %w", usage)
		}
		digest, err := push(ctx, *layout, flags.Arg(0), os.Getenv("REGISTRY_USERNAME"), os.Getenv("REGISTRY_PASSWORD"))
		if err != nil {
			return fmt.Errorf("push %s to %s: %w", *layout, flags.Arg(0), err)
		}
		_, err = fmt.Fprintln(stdout, digest)
		return err
	default:
		return usage
	}
}
