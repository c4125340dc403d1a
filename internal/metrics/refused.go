package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/dataplane"
)

// Verdict says how the kernel refused a packet.
type Verdict string

// Verdicts on refused packets.
const (
	Drop   Verdict = "drop"   // without a response
	Reject Verdict = "reject" // with a TCP reset or an ICMP error
)

// RefusedPackets counts the packets that the kernel refused with one verdict for one reason.
type RefusedPackets struct {
	Family  dataplane.Family
	Verdict Verdict
	// Reason is a value such as "no-endpoints". Each combination of Family, Verdict and
	// Reason occurs once.
	Reason string
	// Localhost is the protocol if the counter counts packets of one protocol to node ports
	// on loopback addresses, else 0.
	Localhost dataplane.Protocol
	// Packets decreases when the kernel's counter is created again. Prometheus handles this
	// as a counter reset, so rates stay correct.
	Packets uint64
}

// refusedCollector collects the counters of refused packets. kube-proxy's metric for invalid
// packets is not among them, because its name says that iptables dropped them.
type refusedCollector struct {
	read func() ([]RefusedPackets, error)

	packets, localhost *prometheus.Desc
}

var _ prometheus.Collector = (*refusedCollector)(nil)

func newRefusedCollector(read func() ([]RefusedPackets, error)) *refusedCollector {
	return &refusedCollector{
		read: read,
		packets: prometheus.NewDesc("fairlead_refused_packets_total",
			"Packets to and from Services that the kernel dropped or rejected, by verdict (drop, reject) and reason. Retries of a "+
				"client count again. The counters survive restarts of Fairlead; rebuilding the rules resets them.",
			[]string{"ip_family", "verdict", "reason"}, nil),
		localhost: prometheus.NewDesc("kubeproxy_nftables_localhost_nodeport_rejected_packets_total",
			"Packets to node ports on loopback addresses that the kernel rejected: all UDP and SCTP packets, and TCP packets if "+
				"--nodeport-addresses does not include localhost.",
			[]string{"ip_family", "protocol"}, nil),
	}
}

// Describe implements [prometheus.Collector].
func (u *refusedCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- u.packets
	ch <- u.localhost
}

// Collect implements [prometheus.Collector]. It omits counters that cannot be read, because an
// error would fail the whole scrape.
func (u *refusedCollector) Collect(ch chan<- prometheus.Metric) {
	counts, err := u.read()
	if err != nil {
		return
	}
	for _, c := range counts {
		counter := func(desc *prometheus.Desc, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(c.Packets), append([]string{c.Family.String()}, labels...)...)
		}
		counter(u.packets, string(c.Verdict), c.Reason)
		if c.Localhost != 0 {
			counter(u.localhost, c.Localhost.String())
		}
	}
}
