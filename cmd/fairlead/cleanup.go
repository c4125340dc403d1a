package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

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
programs' rules are not touched. Connections to Services end, established ones
mostly too. A Fairlead that still runs would put everything back, so it must be
stopped first.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.Logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if !force {
				lock, err := lockInstance(cmd.Context())
				if err != nil {
					return err
				}
				defer lock.Release() //nolint:errcheck // the process ends
			}
			var errs []error
			for _, b := range backend.All() {
				err := b.Remove(log)
				errs = append(errs, err)
				if errors.Is(err, fs.ErrPermission) {
					break // as it would be with the others
				}
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "clean up although another Fairlead programs this node")
	logs.AddFlags(cmd)
	return cmd
}

// errRunning is about an instance that runs.
var errRunning = errors.New("stop it first, or it puts everything back; --force removes everything all the same, but for tables that the other one owns (--nft-own-table)")

// lockInstance returns a lock that keeps other instances from starting to write, or an
// error if one runs that would.
func lockInstance(ctx context.Context) (*instance.Lock, error) {
	lock, err := instance.TryAcquire(instance.Options{Description: "fairlead cleanup"}) //nolint:contextcheck // a Lock outlives ctx
	if err == nil {
		return lock, nil
	}
	holder, err := instance.FindHolder(ctx)
	if err != nil || holder == nil { // none of ours, or it has just ended
		return nil, nil //nolint:nilerr // cleanup goes on without the lock
	}
	return nil, fmt.Errorf("another Fairlead programs this node (%s): %w", holder, errRunning)
}
