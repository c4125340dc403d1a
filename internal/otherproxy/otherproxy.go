// Package otherproxy detects the rules of another Service proxy in a network namespace:
// kube-proxy in each of its modes, whether it runs or has left the rules behind. It changes
// nothing.
package otherproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// Mode is a mode of kube-proxy.
type Mode string

// The modes of kube-proxy on Linux.
const (
	ModeNFTables Mode = "nftables"
	ModeIPTables Mode = "iptables"
	ModeIPVS     Mode = "ipvs"
)

// Modes returns all modes.
func Modes() []Mode { return []Mode{ModeNFTables, ModeIPTables, ModeIPVS} }

// Rules are the detected rules of one mode.
type Rules struct {
	Mode Mode
	// Objects describes the tables, chains and interfaces.
	Objects []string
}

// String describes the rules.
func (r Rules) String() string {
	return fmt.Sprintf("kube-proxy's mode %s (%s)", r.Mode, strings.Join(r.Objects, ", "))
}

// Effect describes what the rules still do while Fairlead translates connections first.
func (r Rules) Effect() string {
	switch r.Mode {
	case ModeNFTables:
		return "connections from outside kube-proxy's former loadBalancerSourceRanges are still dropped"
	case ModeIPVS:
		return "the addresses of interface kube-ipvs0 are still local to the node"
	case ModeIPTables:
	}
	return "connections to Services that only kube-proxy knows are still translated"
}

// Names of kube-proxy's objects, from its source (pkg/proxy in Kubernetes 1.37).
const (
	nftTable      = "kube-proxy"    // nftables/proxier.go, kubeProxyTable
	iptablesChain = "KUBE-SERVICES" // iptables/proxier.go, kubeServicesChain
	iptablesTable = "nat"
	ipvsInterface = "kube-ipvs0" // ipvs/proxier.go, defaultDummyDevice
	legacySuffix  = "of iptables-legacy"
)

// Scanner detects rules. It caches results to make later scans cheaper.
type Scanner struct {
	nft    *nftConn
	legacy [2]legacyTable // IPv4, IPv6
}

// NewScanner returns a Scanner for the network namespace of the calling thread.
func NewScanner() (*Scanner, error) {
	nft, err := dialNFTables()
	if err != nil {
		return nil, err
	}
	return &Scanner{nft: nft, legacy: legacyTables()}, nil
}

// Read returns the detected rules in the network namespace of the calling thread, see
// [Scanner.Scan].
func Read() ([]Rules, error) {
	s, err := NewScanner()
	if err != nil {
		return nil, err
	}
	defer s.Close() //nolint:errcheck // nothing was written
	return s.Scan()
}

// Close closes the connections to the kernel.
func (s *Scanner) Close() error { return s.nft.Close() }

// Scan returns the detected rules by mode. After an error, it returns the rules that it could
// read.
func (s *Scanner) Scan() ([]Rules, error) {
	objects := map[Mode][]string{}
	var errs []error
	record := func(mode Mode, object string, exists bool, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("find %s: %w", object, err))
		}
		if exists {
			objects[mode] = append(objects[mode], object)
		}
	}
	for _, f := range nftFamilies() {
		exists, err := s.nft.hasTable(f, nftTable)
		record(ModeNFTables, fmt.Sprintf("table %s %s", f.name, nftTable), exists, err)
	}
	for i, f := range nftFamilies() {
		exists, err := s.nft.hasChain(f, iptablesTable, iptablesChain)
		record(ModeIPTables, fmt.Sprintf("chain %s in table %s %s", iptablesChain, f.name, iptablesTable), exists, err)
		exists, err = s.legacy[i].hasChain(iptablesChain)
		record(ModeIPTables, fmt.Sprintf("chain %s in table %s %s %s", iptablesChain, f.name, iptablesTable, legacySuffix), exists, err)
	}
	exists, err := hasInterface(ipvsInterface)
	record(ModeIPVS, "interface "+ipvsInterface, exists, err)
	var rules []Rules
	for _, mode := range Modes() {
		if names := objects[mode]; len(names) > 0 {
			rules = append(rules, Rules{mode, names})
		}
	}
	return rules, errors.Join(errs...)
}

// ScanInterval is the time between scans of Watch. The kernel sends no notifications for
// iptables-legacy.
const ScanInterval = 2 * time.Second

// Watch scans periodically until ctx is done, and calls changed whenever the rules differ from
// the previous ones. The first scan is compared with before.
func (s *Scanner) Watch(ctx context.Context, before []Rules, log *slog.Logger, changed func([]Rules)) {
	ticker := time.NewTicker(ScanInterval)
	defer ticker.Stop()
	lastErr := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		rules, err := s.Scan()
		if err != nil {
			if err.Error() != lastErr {
				lastErr = err.Error()
				log.WarnContext(ctx, "cannot check for rules of another Service proxy", "error", err)
			}
			continue
		}
		lastErr = ""
		if !slices.EqualFunc(rules, before, func(a, b Rules) bool { return a.Mode == b.Mode && slices.Equal(a.Objects, b.Objects) }) {
			before = rules
			changed(rules)
		}
	}
}
