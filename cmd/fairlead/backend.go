package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"fairlead/dataplane"
	"fairlead/nft"
)

// mode is a backend, by the value of --mode.
type mode string

const modeNFT mode = "nft"

// modes are all backends, the default first.
func modes() []mode { return []mode{modeNFT} }

func (m mode) validate() error {
	names := make([]string, 0, len(modes()))
	for _, valid := range modes() {
		if m == valid {
			return nil
		}
		names = append(names, string(valid))
	}
	return fmt.Errorf("--mode: unknown mode %q: use %s", string(m), strings.Join(names, " or "))
}

func (m mode) open(log *slog.Logger) (dataplane.Dataplane, error) {
	d, err := nft.Open(nft.Options{Logger: log.With("backend", string(m))})
	if err != nil {
		return nil, m.explain(err)
	}
	return d, nil
}

func (m mode) cleanup(log *slog.Logger) error {
	if err := nft.Cleanup(nft.Options{Logger: log}); err != nil {
		return m.explain(err)
	}
	return nil
}

// explain says what to do about an error of a backend's first contact with the
// kernel.
func (m mode) explain(err error) error {
	switch {
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("not permitted to program the kernel: run as root, or with the capability CAP_NET_ADMIN (%w)", err)
	case errors.Is(err, nft.ErrNoNFTables):
		return fmt.Errorf("--mode=%s needs a kernel with nf_tables: load the module nf_tables, or use a kernel that has it (%w)", m, err)
	}
	return err
}
