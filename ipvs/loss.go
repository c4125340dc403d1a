package ipvs

import (
	"time"

	"fairlead.io/fairlead/dataplane"
)

const (
	// lossCheckPeriod is the interval at which watchServers looks for lost virtual servers. The
	// family has no multicast group, so nothing announces that another program has deleted some.
	lossCheckPeriod = 100 * time.Millisecond
	// listPeriod is the minimum interval at which watchServers reads all virtual servers, for
	// programs that often change their own ones.
	listPeriod = time.Second
	// lossCheckServers is the number of virtual servers that a check reads if their number does
	// not show a loss. `ipvsadm -C` and kube-proxy delete all of them, so one would suffice; more
	// find a partial loss sooner.
	lossCheckServers = 4
)

// watchServers signals a loss when virtual servers have disappeared, until Close.
func (d *Dataplane) watchServers() {
	ticker := time.NewTicker(lossCheckPeriod)
	defer ticker.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-ticker.C:
		}
		d.checkForLoss()
	}
}

// checkForLoss signals a loss if programmed virtual servers do not exist. It holds mu, so none of
// them changes meanwhile. It leaves errors to resync, which logs them.
//
// The kernel counts IPv4 virtual servers. checkForLoss reads them only if their number differs from
// the last one. For IPv6, or if the state of a virtual server is unknown, it reads some.
func (d *Dataplane) checkForLoss() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ready {
		return
	}
	count, err := d.ipvs.countServers()
	if len(d.unverified) > 0 || err != nil && isUnsupported(err) {
		d.checkSomeServers()
		return
	}
	if d.serverCount[dataplane.IPv6] > 0 {
		d.checkSomeServers()
	}
	if err != nil {
		return
	}
	programmed := d.serverCount[dataplane.IPv4]
	switch {
	case count < programmed:
		d.signalLoss()
		return
	case d.otherServers == unknownNumber:
	case count == programmed+d.otherServers, time.Since(d.lastList) < listPeriod:
		return
	default:
		d.lastList = time.Now()
	}
	found, unexpected := 0, false
	_, count, err = d.ipvs.readServers(dataplane.IPv4, func(s serverKey, _ serverState) {
		if _, ok := d.servers[s]; ok {
			found++
		} else {
			unexpected = unexpected || d.isUnexpected(s)
		}
	})
	switch {
	case err != nil:
	case found < programmed:
		d.signalLoss()
	case unexpected:
		d.signalDrift()
	default:
		d.otherServers = count - found
	}
}

// checkSomeServers reads some of the programmed virtual servers, and signals a loss if one does
// not exist.
func (d *Dataplane) checkSomeServers() {
	checked := 0
	for s := range d.servers { // in random order
		if checked++; checked > lossCheckServers {
			return
		}
		if d.unverified[s] {
			continue
		}
		if _, exists, err := d.ipvs.getServer(s); err == nil && !exists {
			d.signalLoss()
			return
		}
	}
}
