package inspect

import (
	"context"

	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/nft"
)

// Poller checks cheaply whether the programmed state may have changed.
type Poller struct {
	opts       Options
	generation uint32
	entries    int
	known      bool
}

// NewPoller returns a Poller for the results of [Read] with the same options.
func NewPoller(opts Options) *Poller { return &Poller{opts: opts} }

// Changed reports whether the result of [Read] may have changed since the last call. The first
// call returns true. In mode ipvs, Changed always returns true, because the kernel has no number
// for the state of virtual servers.
func (p *Poller) Changed(ctx context.Context) (bool, error) {
	generation, err := nft.Generation(nft.Options{NetNS: p.opts.NetNS})
	if err != nil {
		return false, explain(err)
	}
	changed := !p.known || generation != p.generation
	p.generation, p.known = generation, true
	if p.opts.Connections != CountNever {
		entries, err := conntrack.Count(ctx, p.opts.NetNS)
		if err != nil {
			return false, explain(err)
		}
		changed = changed || entries != p.entries
		p.entries = entries
	}
	if changed {
		return true, nil
	}
	isIPVS, err := nft.TablesExist(ctx, nft.Options{NetNS: p.opts.NetNS, Table: tableNames()[modeIPVS]})
	if err != nil {
		return false, explain(err)
	}
	return isIPVS, nil
}
