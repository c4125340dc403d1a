package kubeproxycleanup

import (
	"errors"
	"fmt"
)

// rule is a rule of an iptables table, as far as the clean-up needs it.
type rule struct {
	chain string
	// jump is the chain that the rule jumps or goes to, or empty.
	jump string
	// handle identifies the rule in nf_tables, or is its offset in a legacy table.
	handle uint64
}

// plan is what to remove from one table.
type plan struct {
	// chains are removed with their rules.
	chains map[string]bool
	// jumps are rules in other chains.
	jumps []rule
	// kept are kube-proxy's chains that another program's rule jumps to, with that rule's chain.
	kept map[string]string
}

// newPlan plans the removal of kube-proxy's chains from a table with the given chains and rules.
// isBase reports whether a chain is one of the kernel's hooks. kube-proxy adds jumps only there,
// so that jumps in other chains belong to other programs.
func newPlan(chains []string, rules []rule, isBase func(chain string) bool) plan {
	p := plan{chains: map[string]bool{}, kept: map[string]string{}}
	for _, chain := range chains {
		if isKubeProxyChain(chain) {
			p.chains[chain] = true
		}
	}
	jumps := map[string][]string{} // of kube-proxy's chains
	var pending []string
	for _, r := range rules {
		switch {
		case !p.chains[r.jump]:
		case p.chains[r.chain]:
			jumps[r.chain] = append(jumps[r.chain], r.jump)
		case isBase(r.chain):
			p.jumps = append(p.jumps, r)
		default:
			p.kept[r.jump] = r.chain
			pending = append(pending, r.jump)
		}
	}
	for len(pending) > 0 {
		chain := pending[0]
		pending = pending[1:]
		for _, next := range jumps[chain] {
			if p.kept[next] == "" {
				p.kept[next] = chain
				pending = append(pending, next)
			}
		}
	}
	for chain := range p.kept {
		delete(p.chains, chain)
	}
	return p
}

func (p plan) empty() bool { return len(p.chains) == 0 && len(p.jumps) == 0 }

// describe describes the removed objects.
func (p plan) describe(table string) string {
	return fmt.Sprintf("kube-proxy's chains (%d) and the rules that jump to them (%d) in %s", len(p.chains), len(p.jumps), table)
}

// keptError returns an error that lists the kept chains, or nil.
func (p plan) keptError(table string) error {
	var errs []error
	for _, chain := range sortedKeys(p.kept) {
		errs = append(errs, fmt.Errorf("chain %s remains in %s, because a rule in chain %s jumps to it: delete that rule and run this command again",
			chain, table, p.kept[chain]))
	}
	return errors.Join(errs...)
}
