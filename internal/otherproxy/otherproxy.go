// Package otherproxy recognizes the rules of another Service proxy, kube-proxy in
// each of its modes, in a network namespace: those of one that runs, and those that
// one has left behind. It changes nothing.
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

// Rules are what was found of one mode.
type Rules struct {
	Mode Mode
	// Objects names the tables, chains and interfaces.
	Objects []string
}

// String returns the rules in words.
func (r Rules) String() string {
	return fmt.Sprintf("kube-proxy's mode %s (%s)", r.Mode, strings.Join(r.Objects, ", "))
}

// Effect says what the rules still do while Fairlead translates connections first.
func (r Rules) Effect() string {
	switch r.Mode {
	case ModeNFTables:
		return "connections that its old loadBalancerSourceRanges do not allow are still dropped"
	case ModeIPVS:
		return "the node still takes the addresses of the interface kube-ipvs0 for its own"
	case ModeIPTables:
	}
	return "connections to Services that Fairlead does not have are still translated"
}

// RemovalCommands returns the commands that remove the rules, besides `kube-proxy --cleanup`.
func (r Rules) RemovalCommands() string {
	switch r.Mode {
	case ModeNFTables:
		var commands []string
		for _, table := range r.Objects {
			commands = append(commands, "nft delete "+table)
		}
		return strings.Join(commands, "; ")
	case ModeIPVS:
		return "ip link delete kube-ipvs0"
	case ModeIPTables:
	}
	return "iptables-save | grep -v KUBE- | iptables-restore; ip6tables-save | grep -v KUBE- | ip6tables-restore"
}

// What kube-proxy makes, by its source (pkg/proxy of Kubernetes 1.37).
const (
	nftTable      = "kube-proxy"    // nftables/proxier.go, kubeProxyTable
	iptablesChain = "KUBE-SERVICES" // iptables/proxier.go, kubeServicesChain
	iptablesTable = "nat"
	ipvsInterface = "kube-ipvs0" // ipvs/proxier.go, defaultDummyDevice
	legacySuffix  = "of iptables-legacy"
)

// Scanner looks for rules. It remembers what makes the next scan cheap.
type Scanner struct {
	nft    *nftConn
	legacy [2]legacyTable // of IPv4 and IPv6
}

// NewScanner returns a Scanner for the network namespace of the calling thread.
func NewScanner() (*Scanner, error) {
	nft, err := dialNFTables()
	if err != nil {
		return nil, err
	}
	return &Scanner{nft: nft, legacy: legacyTables()}, nil
}

// Close closes the connections to the kernel.
func (s *Scanner) Close() error { return s.nft.Close() }

// Scan returns what there is, by mode. What could be read is returned beside an
// error.
func (s *Scanner) Scan() ([]Rules, error) {
	found := map[Mode][]string{}
	var errs []error
	note := func(mode Mode, where string, there bool, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("look for %s: %w", where, err))
		}
		if there {
			found[mode] = append(found[mode], where)
		}
	}
	for _, f := range nftFamilies() {
		there, err := s.nft.hasTable(f, nftTable)
		note(ModeNFTables, fmt.Sprintf("table %s %s", f.name, nftTable), there, err)
	}
	for i, f := range nftFamilies() {
		there, err := s.nft.hasChain(f, iptablesTable, iptablesChain)
		note(ModeIPTables, fmt.Sprintf("chain %s in table %s %s", iptablesChain, f.name, iptablesTable), there, err)
		there, err = s.legacy[i].hasChain(iptablesChain)
		note(ModeIPTables, fmt.Sprintf("chain %s in table %s %s %s", iptablesChain, f.name, iptablesTable, legacySuffix), there, err)
	}
	there, err := hasInterface(ipvsInterface)
	note(ModeIPVS, "interface "+ipvsInterface, there, err)
	var rules []Rules
	for _, mode := range Modes() {
		if where := found[mode]; len(where) > 0 {
			rules = append(rules, Rules{mode, where})
		}
	}
	return rules, errors.Join(errs...)
}

// ScanInterval is the time between scans. The kernel announces no change of legacy
// iptables.
const ScanInterval = 2 * time.Second

// Watch scans again and again until ctx is done, and calls found with what there is
// whenever that differs from before, which is where it starts.
func (s *Scanner) Watch(ctx context.Context, before []Rules, log *slog.Logger, found func([]Rules)) {
	ticker := time.NewTicker(ScanInterval)
	defer ticker.Stop()
	problem := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		rules, err := s.Scan()
		if err != nil {
			if err.Error() != problem {
				problem = err.Error()
				log.WarnContext(ctx, "can't tell whether another Service proxy's rules are on this node", "error", err)
			}
			continue
		}
		problem = ""
		if !slices.EqualFunc(rules, before, func(a, b Rules) bool { return a.Mode == b.Mode && slices.Equal(a.Objects, b.Objects) }) {
			before = rules
			found(rules)
		}
	}
}
