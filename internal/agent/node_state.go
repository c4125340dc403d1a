package agent

import (
	"log/slog"
	"sync/atomic"

	"fairlead.io/fairlead/kube"
)

// nodeState tracks what the Node object says of the node's health.
type nodeState struct {
	log *slog.Logger
	// sourceHasNodes says that the source has Node objects, of which name is this node's.
	sourceHasNodes bool
	name           string

	health atomic.Pointer[kube.NodeHealth]
	// existenceUnknown says that the source could not find out whether the Node exists.
	existenceUnknown atomic.Bool
	missingLogged    bool // there is no Node, and that was logged
}

// logExistence logs a Node that does not exist, which may be a matter of its name: then no
// endpoint is local, and load balancers leave this node out.
func (n *nodeState) logExistence() {
	if !n.sourceHasNodes || n.existenceUnknown.Load() {
		return
	}
	node := n.health.Load()
	missing := node == nil || !node.Exists
	switch {
	case missing && !n.missingLogged:
		n.log.Warn("there is no Node of this node's name: if that lasts, check --hostname-override", "node", n.name)
	case !missing && n.missingLogged:
		n.log.Info("the Node is there", "node", n.name)
	}
	n.missingLogged = missing
}

// eligible says whether load balancers should use this node. It may be called from any
// goroutine.
func (n *nodeState) eligible() bool {
	if !n.sourceHasNodes || n.existenceUnknown.Load() {
		return true
	}
	node := n.health.Load()
	return node != nil && node.Eligible()
}
