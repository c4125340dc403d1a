package kubeproxycleanup

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
)

// Remove removes kube-proxy's rules, sets, virtual servers and interface from the network
// namespace of the calling thread. It calls report with a description of each removed object. The
// error lists, one per line, what remains and the command that removes it.
//
// A kube-proxy that is running programs everything again, see [RunningKubeProxy].
func Remove(ctx context.Context, report func(removed string)) error {
	var errs []error
	nft, err := newNFTCleaner()
	if err != nil {
		errs = append(errs, err)
	} else {
		errs = append(errs, nft.removeIPTablesChains(ctx, report), nft.removeTables(report), nft.close())
	}
	// The sets identify virtual servers of node ports, and rules use the sets.
	errs = append(errs, removeLegacyChains(report), removeIPVS(ctx, report), removeIPSets(ctx, report))
	return errors.Join(errs...)
}

// RouteLocalnet reports whether net.ipv4.conf.all.route_localnet is set. kube-proxy's mode
// iptables sets it for node ports on loopback addresses and never resets it. Remove does not
// change it, because other programs may need it.
func RouteLocalnet() bool {
	value, err := os.ReadFile("/proc/sys/net/ipv4/conf/all/route_localnet")
	return err == nil && strings.TrimSpace(string(value)) != "0"
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
