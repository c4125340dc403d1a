package agent

import (
	"log/slog"
	"sync/atomic"

	"fairlead.io/fairlead/kube"
)

// nodeState tracks whether the Node object exists and whether load balancers should use the
// node.
type nodeState struct {
	log *slog.Logger
	// sourceHasNodes reports whether the source has Node objects. name is the name of
	// this node.
	sourceHasNodes bool
	name           string

	health atomic.Pointer[kube.NodeHealth]
	// existenceUnknown is set if the source could not determine whether the Node exists.
	existenceUnknown atomic.Bool
	missingLogged    bool // the Node does not exist, and this was logged
}

// logExistence logs when the Node object is missing and when it appears. Without the object,
// possibly because of a wrong node name, no endpoint is local and load balancers skip this node.
func (n *nodeState) logExistence() {
	if !n.sourceHasNodes || n.existenceUnknown.Load() {
		return
	}
	node := n.health.Load()
	missing := node == nil || !node.Exists
	switch {
	case missing && !n.missingLogged:
		n.log.Warn("Node object not found; if this persists, check --hostname-override", "node", n.name)
	case !missing && n.missingLogged:
		n.log.Info("Node object found", "node", n.name)
	}
	n.missingLogged = missing
}

// eligible reports whether load balancers should use this node. It is safe for concurrent use.
func (n *nodeState) eligible() bool {
	if !n.sourceHasNodes || n.existenceUnknown.Load() {
		return true
	}
	node := n.health.Load()
	return node != nil && node.Eligible()
}
