package main

import (
	"errors"
	"io/fs"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
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
				lock, err := alone(cmd.Context())
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
