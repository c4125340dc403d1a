package backend

import (
	"fmt"
	"slices"
	"strings"
)

// The names of the backends.
const (
	NFT  = "nft"
	IPVS = "ipvs"
)

// All returns all backends, starting with the default.
func All() []Backend { return []Backend{nftBackend(), ipvsBackend()} }

// Names returns the values of --mode.
func Names() []string {
	var names []string
	for _, b := range All() {
		names = append(names, b.Name)
	}
	return names
}

// KubeProxyNames returns the values of --proxy-mode.
func KubeProxyNames() []string {
	var names []string
	for _, b := range All() {
		if b.KubeProxyName != "" {
			names = append(names, b.KubeProxyName)
		}
	}
	return names
}

// ByName returns the backend for a value of --mode. The error lists the valid values.
func ByName(name string) (Backend, error) {
	all := All()
	i := slices.IndexFunc(all, func(b Backend) bool { return b.Name == name })
	if i < 0 {
		return Backend{}, fmt.Errorf("--mode: unknown mode %q: use %s", name, strings.Join(Names(), " or "))
	}
	return all[i], nil
}

// ByKubeProxyName returns the backend for a value of --proxy-mode, and whether it exists.
func ByKubeProxyName(name string) (Backend, bool) {
	all := All()
	i := slices.IndexFunc(all, func(b Backend) bool { return b.KubeProxyName == name && name != "" })
	if i < 0 {
		return Backend{}, false
	}
	return all[i], true
}
