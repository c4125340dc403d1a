package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func cleanupCommand() *cobra.Command {
	var logs logOptions
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that Fairlead has programmed on this node",
		Long: `Remove everything that Fairlead has programmed on this node, in any mode. Other
programs' rules are not touched. A Fairlead that still runs puts its own back.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			for _, m := range modes() {
				if err := m.cleanup(log); err != nil {
					return fmt.Errorf("clean up after --mode=%s: %w", m, err)
				}
			}
			return nil
		},
	}
	logs.addFlags(cmd.Flags())
	return cmd
}
