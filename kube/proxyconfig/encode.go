package proxyconfig

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	netutils "k8s.io/utils/net"
	"sigs.k8s.io/yaml"
)

// Group is the API group of a KubeProxyConfiguration.
const Group = v1alpha1.GroupName

// Encode returns a configuration file with kube-proxy's defaults and the given fields, in the form
// of [Document.Fields]. The file is the one that kube-proxy --write-config-to writes, except that it
// lacks logging.vmodule.
func Encode(fields map[string]string) ([]byte, error) {
	c, err := newConfiguration(fields)
	if err != nil {
		return nil, err
	}
	return yaml.Marshal(c)
}

// EncodeJSON is like [Encode], but returns the JSON that kube-proxy serves at /configz.
func EncodeJSON(fields map[string]string) ([]byte, error) {
	c, err := newConfiguration(fields)
	if err != nil {
		return nil, err
	}
	return json.Marshal(c)
}

func newConfiguration(fields map[string]string) (*v1alpha1.KubeProxyConfiguration, error) {
	types := fieldTypes()
	document := map[string]any{}
	for path, text := range fields {
		fieldType := types[path]
		if section, _, ok := strings.Cut(path, "."); fieldType == nil && ok && types[section] != nil && types[section].Kind() == reflect.Map {
			fieldType = types[section].Elem()
		}
		value, err := parseValue(fieldType, text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if value != nil {
			insert(document, strings.Split(path, "."), value)
		}
	}
	asJSON, err := json.Marshal(document)
	if err != nil {
		return nil, err
	}
	var c v1alpha1.KubeProxyConfiguration
	if err := json.Unmarshal(asJSON, &c); err != nil {
		return nil, err
	}
	setDefaults(&c)
	return &c, nil
}

// insert sets the value at a path of nested maps.
func insert(in map[string]any, path []string, value any) {
	for _, name := range path[:len(path)-1] {
		inner, ok := in[name].(map[string]any)
		if !ok {
			inner = map[string]any{}
			in[name] = inner
		}
		in = inner
	}
	in[path[len(path)-1]] = value
}

// parseValue converts a value in the form of flags for JSON. It returns nil for lists of structs.
func parseValue(fieldType reflect.Type, text string) (any, error) {
	if fieldType == nil {
		return nil, nil //nolint:nilnil // kube-proxy ignores unknown fields
	}
	if fieldType.Kind() == reflect.Pointer {
		fieldType = fieldType.Elem()
	}
	switch fieldType.Kind() {
	case reflect.Bool:
		return strconv.ParseBool(text)
	case reflect.Int32, reflect.Uint32:
		return strconv.ParseInt(text, 0, 64)
	case reflect.Float32:
		return strconv.ParseFloat(text, 32)
	case reflect.Slice:
		if fieldType.Elem().Kind() == reflect.String {
			return strings.Split(text, ","), nil
		}
		return nil, nil //nolint:nilnil // logging.vmodule
	default:
		return text, nil
	}
}

// setDefaults sets kube-proxy's defaults, and clears the fields that only other modes use, as
// kube-proxy does.
func setDefaults(c *v1alpha1.KubeProxyConfiguration) {
	c.APIVersion, c.Kind = v1alpha1.SchemeGroupVersion.String(), Kind
	c.BindAddress = cmp.Or(c.BindAddress, "0.0.0.0")
	wildcard, loopback := "0.0.0.0", "127.0.0.1"
	if addr, err := netip.ParseAddr(c.BindAddress); err == nil && addr.Is6() {
		wildcard, loopback = "::", "::1"
	}
	c.HealthzBindAddress = withPort(cmp.Or(c.HealthzBindAddress, wildcard), "10256")
	c.MetricsBindAddress = withPort(cmp.Or(c.MetricsBindAddress, loopback), "10249")
	c.OOMScoreAdj = orPointer(c.OOMScoreAdj, -999)
	c.IPTables.LocalhostNodePorts = orPointer(c.IPTables.LocalhostNodePorts, true)
	c.IPTables.MasqueradeBit = orPointer(c.IPTables.MasqueradeBit, 14)
	c.NFTables.MasqueradeBit = orPointer(c.NFTables.MasqueradeBit, 14)
	c.Conntrack.MaxPerCore = orPointer(c.Conntrack.MaxPerCore, 32<<10)
	c.Conntrack.Min = orPointer(c.Conntrack.Min, 128<<10)
	c.Conntrack.TCPEstablishedTimeout = orPointer(c.Conntrack.TCPEstablishedTimeout, metav1.Duration{Duration: 24 * time.Hour})
	c.Conntrack.TCPCloseWaitTimeout = orPointer(c.Conntrack.TCPCloseWaitTimeout, metav1.Duration{Duration: time.Hour})
	c.ConfigSyncPeriod.Duration = cmp.Or(c.ConfigSyncPeriod.Duration, 15*time.Minute)
	c.ClientConnection.ContentType = cmp.Or(c.ClientConnection.ContentType, "application/vnd.kubernetes.protobuf")
	c.ClientConnection.QPS = cmp.Or(c.ClientConnection.QPS, 5)
	c.ClientConnection.Burst = cmp.Or(c.ClientConnection.Burst, 10)
	c.Mode = cmp.Or(c.Mode, "iptables")
	c.DetectLocalMode = cmp.Or(c.DetectLocalMode, "ClusterCIDR")
	if c.Mode == "nftables" && len(c.NodePortAddresses) == 0 {
		c.NodePortAddresses = []string{"primary"}
	}
	setSyncPeriods(c)
	logsapi.SetRecommendedLoggingConfiguration(&c.Logging)
}

// setSyncPeriods sets the sync periods and masqueradeAll in the section of the mode only.
func setSyncPeriods(c *v1alpha1.KubeProxyConfiguration) {
	const syncPeriod, minSyncPeriod = 30 * time.Second, time.Second
	iptables, ipvs, nftables := c.IPTables, c.IPVS, c.NFTables
	zero := metav1.Duration{}
	c.IPTables.SyncPeriod, c.IPTables.MinSyncPeriod = zero, zero
	c.IPVS.SyncPeriod, c.IPVS.MinSyncPeriod = zero, zero
	c.NFTables.SyncPeriod, c.NFTables.MinSyncPeriod, c.NFTables.MasqueradeAll = zero, zero, false
	switch c.Mode {
	case "nftables":
		c.NFTables.SyncPeriod.Duration = cmp.Or(nftables.SyncPeriod.Duration, syncPeriod)
		c.NFTables.MinSyncPeriod.Duration = cmp.Or(nftables.MinSyncPeriod.Duration, minSyncPeriod)
		c.NFTables.MasqueradeAll, c.IPTables.MasqueradeAll = nftables.MasqueradeAll, false
	case "ipvs":
		c.IPVS.SyncPeriod.Duration = cmp.Or(ipvs.SyncPeriod.Duration, syncPeriod)
		c.IPVS.MinSyncPeriod = ipvs.MinSyncPeriod
	default:
		c.IPTables.SyncPeriod.Duration = cmp.Or(iptables.SyncPeriod.Duration, syncPeriod)
		c.IPTables.MinSyncPeriod.Duration = cmp.Or(iptables.MinSyncPeriod.Duration, minSyncPeriod)
	}
}

// orPointer returns p, or a pointer to value if p is nil.
func orPointer[T any](p *T, value T) *T {
	if p == nil {
		return &value
	}
	return p
}

// withPort adds the port to an address that has none. Like kube-proxy, it does not change invalid
// addresses.
func withPort(address, port string) string {
	if _, _, err := net.SplitHostPort(address); err == nil || netutils.ParseIPSloppy(address) == nil {
		return address
	}
	return net.JoinHostPort(address, port)
}
