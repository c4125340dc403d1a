package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/instance"
)

func cleanupCommand() *cobra.Command {
	var logs config.LogFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that Fairlead has programmed on this node",
		Long: `Remove everything that Fairlead has programmed on this node, in any mode. Other
programs' rules are not changed. New connections to Services fail, and most
established connections end. Stop Fairlead first: a running instance would
program everything again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.Logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return cleanUp(cmd.Context(), log, force)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "clean up even if another Fairlead programs this node")
	logs.AddFlags(cmd)
	return cmd
}

// cleanUp removes the kernel state of all backends. Without force, it fails while another instance
// is running.
func cleanUp(ctx context.Context, log *slog.Logger, force bool) error {
	if !force {
		lock, err := lockInstance(ctx)
		if err != nil {
			return err
		}
		defer lock.Release() //nolint:errcheck // the process exits
	}
	var errs []error
	for _, b := range backend.All() {
		err := b.Remove(log)
		errs = append(errs, err)
		if errors.Is(err, fs.ErrPermission) {
			break // the other backends would fail, too
		}
	}
	return errors.Join(errs...)
}

// errRunning is returned while another instance is running.
var errRunning = errors.New("stop it first, because it would program everything again; --force cleans up anyway, except tables that the other instance owns (--nft-own-table)")

// lockInstance acquires the instance lock, so that no other instance starts programming during
// cleanup. It returns an error if another instance is running. If another user's process holds
// the lock, or the holder has just exited, it returns a nil Lock without an error.
func lockInstance(ctx context.Context) (*instance.Lock, error) {
	lock, err := instance.TryAcquire(instance.Options{Description: "fairlead cleanup"}) //nolint:contextcheck // a Lock outlives ctx
	if err == nil {
		return lock, nil
	}
	holder, err := instance.FindHolder(ctx)
	if err != nil || holder == nil { // another user's process, or the holder has just exited
		return nil, nil //nolint:nilerr // cleanup continues without the lock
	}
	return nil, fmt.Errorf("another Fairlead programs this node (%s): %w", holder, errRunning)
}
