package ipvs

import "time"

const (
	// lossCheckPeriod is the interval at which watchServers looks for lost virtual servers. The
	// family has no multicast group, so nothing announces that another program has deleted some.
	lossCheckPeriod = 100 * time.Millisecond
	// lossCheckServers is the number of virtual servers that each check reads. `ipvsadm -C` and
	// kube-proxy delete all of them, so one would suffice; more find a partial loss sooner.
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

// checkForLoss reads some of the programmed virtual servers, and signals a loss if one does
// not exist. It holds mu, so none of them changes meanwhile. It leaves errors to resync, which
// logs them.
func (d *Dataplane) checkForLoss() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ready {
		return
	}
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
