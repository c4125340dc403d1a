package agent

import (
	"context"
	"time"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/otherproxy"
)

// detectOtherProxies looks for the rules of another Service proxy, before anything is
// programmed, and returns what goes on to look until ctx is done.
func (a *Agent) detectOtherProxies(ctx context.Context) (watch func(context.Context) error) {
	log := a.log.With("component", "otherproxy")
	scanner, err := otherproxy.NewScanner()
	if err != nil {
		log.WarnContext(ctx, "can't tell whether another Service proxy's rules are on this node", "error", err)
		return func(context.Context) error { return nil }
	}
	rules, err := scanner.Scan()
	if err != nil {
		log.WarnContext(ctx, "can't tell whether another Service proxy's rules are on this node", "error", err)
	}
	if len(rules) > 0 {
		a.dispatcher.setOtherProxy(rules)
	}
	return func(ctx context.Context) error {
		scanner.Watch(ctx, rules, log, a.dispatcher.setOtherProxy)
		return scanner.Close()
	}
}

// setOtherProxy reports rules of another Service proxy. Fairlead's rules go first while
// it is there.
func (d *dispatcher) setOtherProxy(rules []otherproxy.Rules) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.metrics.SetOtherProxy(rules)
	if len(rules) == 0 {
		d.log.Info("no rules of another Service proxy are left on this node")
	}
	for _, r := range rules {
		d.log.Warn("another Service proxy's rules are on this node; Fairlead's go first", "rules", r.String(), "but", r.Effect(),
			"fix", "kube-proxy --cleanup, or "+r.RemovalCommands())
		d.events.OtherProxy(r.String(), r.Effect(), r.RemovalCommands())
	}
	d.pipeline.SetAheadOfOthers(len(rules) > 0)
}

// giveWay lets another Service proxy's rules go first some time after this program's
// end, if there are any.
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
		a.log.WarnContext(ctx, "Fairlead's rules stay in front of the other Service proxy's until fairlead cleanup", "error", err)
		return
	}
	a.log.InfoContext(ctx, "the other Service proxy's rules will go first, unless Fairlead starts again; fairlead cleanup makes them at once",
		"after", after.String())
}
