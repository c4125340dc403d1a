package main

import (
	"errors"
	"io/fs"

	"github.com/spf13/cobra"
)

func cleanupCommand() *cobra.Command {
	var logs logOptions
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that Fairlead has programmed on this node",
		Long: `Remove everything that Fairlead has programmed on this node, in any mode. Other
programs' rules are not touched. Connections to Services end, established ones
mostly too. A Fairlead that still runs puts everything back.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			var errs []error
			for _, m := range modes() {
				err := m.cleanup(log)
				errs = append(errs, err)
				if errors.Is(err, fs.ErrPermission) {
					break // as it would be with the others
				}
			}
			return errors.Join(errs...)
		},
	}
	logs.addFlags(cmd)
	return cmd
}
