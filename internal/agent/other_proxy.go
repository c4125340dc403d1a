package agent

import (
	"context"
	"time"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/internal/otherproxy"
	"fairlead.io/fairlead/kube"
)

// detectOtherProxies scans for rules of other Service proxies. It returns a function that
// watches for changes to these rules until ctx is done.
func (a *Agent) detectOtherProxies(ctx context.Context) (watch func(context.Context) error) {
	log := a.log.With("component", "otherproxy")
	scanner, err := otherproxy.NewScanner()
	if err != nil {
		log.WarnContext(ctx, "cannot check this node for rules of other Service proxies", "error", err)
		return func(context.Context) error { return nil }
	}
	rules, err := scanner.Scan()
	if err != nil {
		log.WarnContext(ctx, "cannot check this node for rules of other Service proxies", "error", err)
	}
	if len(rules) > 0 {
		a.dispatcher.setOtherProxy(rules)
	}
	return func(ctx context.Context) error {
		scanner.Watch(ctx, rules, log, a.dispatcher.setOtherProxy)
		return scanner.Close()
	}
}

// setOtherProxy reports the rules of other Service proxies. While there are any, Fairlead's
// rules take precedence. With --service-proxy-name, another proxy is expected.
func (d *dispatcher) setOtherProxy(rules []otherproxy.Rules) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.metrics.SetOtherProxy(rules)
	d.otherProxies = rules
	if len(rules) == 0 {
		d.log.Info("rules of other Service proxies are gone from this node")
		d.history.RecordEvent(history.OtherProxy, false, "rules of other Service proxies are gone")
	}
	for _, r := range rules {
		d.history.RecordEvent(history.OtherProxy, d.proxyName == "", "rules of another Service proxy: "+r.String())
		if d.proxyName != "" {
			d.log.Info("another Service proxy serves the Services without the proxy name label", "label", kube.LabelServiceProxyName, "rules", r.String())
			continue
		}
		d.log.Warn("rules of another Service proxy found on this node; Fairlead's rules take precedence", "rules", r.String(), "effect", r.Effect(),
			"fix", "fairlead cleanup --kube-proxy, or kube-proxy --cleanup")
		d.events.OtherProxy(r.String(), r.Effect())
	}
	d.pipeline.SetAheadOfOthers(len(rules) > 0)
}

// giveWay gives precedence to the rules of another Service proxy, if any, after the process has
// exited and the given time has passed.
func (a *Agent) giveWay(ctx context.Context, after time.Duration) {
	a.dispatcher.mu.Lock()
	ahead := a.dispatcher.pipeline.IsAheadOfOthers()
	a.dispatcher.mu.Unlock()
	if !ahead || !a.standby.isActive() {
		return
	}
	yielder, ok := a.dp.(backend.Yielder)
	if !ok {
		return
	}
	if err := yielder.GiveWay(after); err != nil {
		a.log.WarnContext(ctx, "Fairlead's rules keep precedence over the other Service proxy's rules until fairlead cleanup is run", "error", err)
		return
	}
	a.log.InfoContext(ctx, "the other Service proxy's rules will take precedence unless Fairlead starts again; to give them precedence at once, run fairlead cleanup",
		"after", after.String())
}
