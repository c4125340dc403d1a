package report

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/internal/inspect"
)

// frontendJSON is a frontend that the kernel or the API has, in one line of JSON.
type frontendJSON struct {
	Service   string `json:"service"`
	Frontend  string `json:"frontend"`
	Kind      string `json:"kind"`
	Binding   string `json:"binding,omitempty"`
	Class     string `json:"class,omitempty"`
	Endpoints any    `json:"endpoints,omitempty"`
	Stats     any    `json:"stats,omitempty"`
}

// Kernel returns the part with the programmed frontends: one line with general data, then one line
// for each frontend.
func Kernel() Part {
	return Part{Name: "kernel-services.json", Collect: func(ctx context.Context) ([]byte, error) {
		kernel, err := inspect.Read(ctx, inspect.Options{Connections: inspect.CountIfCheap})
		if err != nil {
			return nil, err
		}
		var buffer bytes.Buffer
		head := map[string]any{
			"mode": kernel.Mode, "frontends": len(kernel.Frontends), "nodePortRanges": kernel.NodePortRanges, "counters": kernel.Counters,
			"retiring": kernel.Retiring, "warnings": kernel.Warnings,
		}
		if err := marshalLines(&buffer, []map[string]any{head}); err != nil {
			return nil, err
		}
		lines := make([]frontendJSON, 0, len(kernel.Frontends))
		for i := range kernel.Frontends {
			f := &kernel.Frontends[i]
			namespace, name, port := f.Service()
			line := frontendJSON{
				Service: strings.TrimSuffix(namespace+"/"+name+":"+port, ":"), Frontend: f.Frontend.String(), Kind: f.KindName(),
				Binding: f.Binding.String(), Class: f.Class, Endpoints: f.Endpoints,
			}
			if f.Stats != nil {
				line.Stats = f.Stats
			}
			lines = append(lines, line)
		}
		err = marshalLines(&buffer, lines)
		return buffer.Bytes(), err
	}}
}

// Desired returns the part with the Services that the agent wants to program: one line with general
// data, then one line for each Service port.
func Desired(read func(context.Context) (*desired.State, error)) Part {
	return Part{Name: "desired-services.json", Collect: func(ctx context.Context) ([]byte, error) {
		state, err := read(ctx)
		if err != nil {
			return nil, err
		}
		var problems []string
		for _, p := range state.Problems {
			problems = append(problems, p.String())
		}
		var buffer bytes.Buffer
		head := map[string]any{"services": len(state.Services), "node": state.Node, "problems": problems}
		if err := marshalLines(&buffer, []map[string]any{head}); err != nil {
			return nil, err
		}
		var lines []map[string]any
		for s := range state.All() {
			lines = append(lines, map[string]any{"service": s.Key.String(), "frontends": frontendTexts(s.Frontends), "spec": s.String()})
		}
		err = marshalLines(&buffer, lines)
		return buffer.Bytes(), err
	}}
}

func frontendTexts(frontends []dataplane.Frontend) []string {
	texts := make([]string, 0, len(frontends))
	for _, f := range frontends {
		texts = append(texts, f.String())
	}
	return texts
}

// maxElements bounds the elements of a set in the report. The Services are in another part.
const maxElements = 200

// tableJSON is a table of nftables.
type tableJSON struct {
	Name   string      `json:"name"`
	Family string      `json:"family"`
	Flags  uint32      `json:"flags,omitempty"`
	Chains []chainJSON `json:"chains"`
	Sets   []setJSON   `json:"sets"`
}

type chainJSON struct {
	Name     string   `json:"name"`
	Type     string   `json:"type,omitempty"`
	Hook     *uint32  `json:"hook,omitempty"`
	Priority *int32   `json:"priority,omitempty"`
	Policy   *uint32  `json:"policy,omitempty"`
	Rules    []string `json:"rules"`
}

type setJSON struct {
	Name     string   `json:"name"`
	Map      bool     `json:"map,omitempty"`
	KeyType  string   `json:"keyType"`
	DataType string   `json:"dataType,omitempty"`
	Size     uint32   `json:"size,omitempty"`
	Count    int      `json:"count"`
	Elements []string `json:"elements,omitempty"`
}

// Ruleset returns the part with Fairlead's tables of nftables: the expressions of all rules, and the
// first elements of each set, as package nftables decodes them.
func Ruleset() Part {
	return Part{Name: "ruleset.json", Collect: func(context.Context) ([]byte, error) {
		conn, err := nftables.New()
		if err != nil {
			return nil, fmt.Errorf("open netlink socket for nftables: %w", err)
		}
		tables, err := conn.ListTables()
		if err != nil {
			return nil, fmt.Errorf("list tables: %w", err)
		}
		chains, err := conn.ListChains()
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", err)
		}
		list, errs := []tableJSON{}, []error(nil)
		for _, t := range tables {
			if t.Name != "fairlead" && !strings.HasPrefix(t.Name, "fairlead-") {
				continue
			}
			table := tableJSON{Name: t.Name, Family: familyName(t.Family), Flags: uint32(t.Flags)}
			for _, c := range chains {
				if c.Table.Name == t.Name && c.Table.Family == t.Family {
					chain, err := readChain(conn, c)
					table.Chains, errs = append(table.Chains, chain), append(errs, err)
				}
			}
			var setErr error
			table.Sets, setErr = readSets(conn, t)
			list, errs = append(list, table), append(errs, setErr)
		}
		text, err := marshal(list)
		return text, errors.Join(append(errs, err)...)
	}}
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	default:
		return fmt.Sprint(f)
	}
}

func readChain(conn *nftables.Conn, c *nftables.Chain) (chainJSON, error) {
	chain := chainJSON{Name: c.Name, Type: string(c.Type), Hook: (*uint32)(c.Hooknum), Priority: (*int32)(c.Priority), Policy: (*uint32)(c.Policy), Rules: []string{}}
	rules, err := conn.GetRules(c.Table, c)
	if err != nil {
		return chain, fmt.Errorf("read rules of chain %s: %w", c.Name, err)
	}
	for _, r := range rules {
		chain.Rules = append(chain.Rules, ruleText(r.Exprs))
	}
	return chain, nil
}

// ruleText describes the expressions of a rule.
func ruleText(exprs []expr.Any) string {
	texts := make([]string, 0, len(exprs))
	for _, e := range exprs {
		texts = append(texts, strings.TrimPrefix(fmt.Sprintf("%T", e), "*expr.")+strings.TrimPrefix(fmt.Sprintf("%+v", e), "&"))
	}
	return strings.Join(texts, " ")
}

func readSets(conn *nftables.Conn, t *nftables.Table) ([]setJSON, error) {
	sets, err := conn.GetSets(t)
	if err != nil {
		return nil, fmt.Errorf("list sets of table %s: %w", t.Name, err)
	}
	list, errs := []setJSON{}, []error(nil)
	for _, s := range sets {
		set := setJSON{Name: s.Name, Map: s.IsMap, KeyType: s.KeyType.Name, DataType: s.DataType.Name, Size: s.Size}
		elements, err := conn.GetSetElements(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("read elements of set %s: %w", s.Name, err))
		}
		set.Count = len(elements)
		for _, e := range elements[:min(len(elements), maxElements)] {
			text := fmt.Sprintf("%x", e.Key)
			if len(e.KeyEnd) > 0 {
				text += fmt.Sprintf("-%x", e.KeyEnd)
			}
			switch {
			case len(e.Val) > 0:
				text += fmt.Sprintf(": %x", e.Val)
			case e.VerdictData != nil:
				text += fmt.Sprintf(": verdict %d %s", e.VerdictData.Kind, e.VerdictData.Chain)
			}
			set.Elements = append(set.Elements, strings.TrimSpace(text+" "+e.Comment))
		}
		list = append(list, set)
	}
	slices.SortFunc(list, func(a, b setJSON) int { return cmp.Compare(a.Name, b.Name) })
	return list, errors.Join(errs...)
}
