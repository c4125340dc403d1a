package agent

import (
	"log/slog"
	"sync/atomic"

	"fairlead.io/fairlead/kube"
)

// nodeState tracks what the Node object says of the node's health.
type nodeState struct {
	log *slog.Logger
	// hasNode says that the source has Node objects, of which name is this node's.
	hasNode bool
	name    string

	health atomic.Pointer[kube.NodeHealth]
	// unknown says that the source could not find out whether the Node exists.
	unknown atomic.Bool
	missing bool // there is no Node, and that was logged
}

// check logs a Node that does not exist, which may be a matter of its name: then no
// endpoint is local, and load balancers leave this node out.
func (n *nodeState) check() {
	if !n.hasNode || n.unknown.Load() {
		return
	}
	node := n.health.Load()
	missing := node == nil || !node.Exists
	switch {
	case missing && !n.missing:
		n.log.Warn("there is no Node of this node's name: if that lasts, check --hostname-override", "node", n.name)
	case !missing && n.missing:
		n.log.Info("the Node is there", "node", n.name)
	}
	n.missing = missing
}

// eligible says whether load balancers should use this node. It may be called from any
// goroutine.
func (n *nodeState) eligible() bool {
	if !n.hasNode || n.unknown.Load() {
		return true
	}
	node := n.health.Load()
	return node != nil && node.Eligible()
}
