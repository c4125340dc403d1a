package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/dataplane"
)

// RefusedPackets counts packets that the kernel has rejected or dropped for a reason.
type RefusedPackets struct {
	Family dataplane.Family
	// Reason says what became of the packets and why, such as
	// "rejected-no-endpoints". No two of a family are the same.
	Reason string
	// Localhost is the protocol, where all were for node ports at loopback
	// addresses, and else 0.
	Localhost dataplane.Protocol
	// Packets may become less, when what counts in the kernel was made anew.
	// Prometheus takes that as a reset of the counter, and rates stay right.
	Packets uint64
}

// refusedCollector collects what the kernel has not served. Invalid packets have no name of
// kube-proxy's, as kube-proxy's says that iptables dropped them.
type refusedCollector struct {
	read func() ([]RefusedPackets, error)

	packets, localhost *prometheus.Desc
}

var _ prometheus.Collector = (*refusedCollector)(nil)

func newRefusedCollector(read func() ([]RefusedPackets, error)) *refusedCollector {
	return &refusedCollector{
		read: read,
		packets: prometheus.NewDesc("fairlead_unserved_packets_total",
			"Packets to Services, or of theirs, that the kernel rejected or dropped, by reason. A client that tries again "+
				"counts again. It begins again when the rules are made anew, but not with the program.",
			[]string{"ip_family", "reason"}, nil),
		localhost: prometheus.NewDesc("kubeproxy_nftables_localhost_nodeport_rejected_packets_total",
			"Packets to node ports at loopback addresses that the kernel rejected: those of UDP and SCTP always, those of TCP "+
				"where node ports at loopback addresses were not asked for.",
			[]string{"ip_family", "protocol"}, nil),
	}
}

// Describe implements [prometheus.Collector].
func (u *refusedCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- u.packets
	ch <- u.localhost
}

// Collect implements [prometheus.Collector]. What cannot be read is left out, as
// an error here would take all other metrics with it.
func (u *refusedCollector) Collect(ch chan<- prometheus.Metric) {
	counts, err := u.read()
	if err != nil {
		return
	}
	for _, c := range counts {
		counter := func(desc *prometheus.Desc, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(c.Packets), append([]string{c.Family.String()}, labels...)...)
		}
		counter(u.packets, c.Reason)
		if c.Localhost != 0 {
			counter(u.localhost, c.Localhost.String())
		}
	}
}
