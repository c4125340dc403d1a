package trace

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"fairlead.io/fairlead/nft"
)

// WriteText writes the report as numbered steps.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	c := r.Connection
	fmt.Fprintf(&b, "%s connection from %s to %s", c.Protocol, describe(c.Client, c.Source.String()), describe(c.Target, c.Destination.String()))
	if c.Interface != "" {
		fmt.Fprintf(&b, ", arriving on %s", c.Interface)
	}
	b.WriteString("\n")
	switch r.State {
	case "kernel":
		fmt.Fprintf(&b, "Evaluated with the rules in the kernel, mode %s.\n\n", r.Mode)
	default:
		b.WriteString("Evaluated with the rules that the desired state would program.\n\n")
	}
	n := 0
	listed := false
	number := func(text string) {
		n++
		fmt.Fprintf(&b, "%2d. %s.\n", n, capitalize(text))
	}
	for _, s := range r.Steps {
		if !listed && isSelected(s.Decision) {
			listed = true
			r.writeEndpoints(&b, number)
		}
		number(s.Text)
		if decides := join(s.Object, s.Field); decides != "" {
			fmt.Fprintf(&b, "    decided by: %s\n", decides)
		}
		if s.Chain != "" {
			fmt.Fprintf(&b, "    rule: chain %s, rule %d\n", s.Chain, s.Rule)
		}
	}
	if !listed {
		r.writeEndpoints(&b, number)
	}
	b.WriteString("\nResult:")
	r.writeResults(&b)
	if len(r.Differences) > 0 {
		b.WriteString("\nThe kernel differs from the desired state:\n")
		for _, d := range r.Differences {
			fmt.Fprintf(&b, "  - %s\n", d)
		}
	}
	for _, note := range r.Notes {
		fmt.Fprintf(&b, "\nNote: %s\n", note)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func describe(name, addr string) string {
	if strings.HasPrefix(name, addr) {
		return name
	}
	return fmt.Sprintf("%s (%s)", name, addr)
}

// isSelected reports whether a decision is the selection of an endpoint or follows it.
func isSelected(d nft.Decision) bool {
	switch d {
	case nft.DecideEndpoint, nft.DecideBalancer, nft.DecideHairpin, nft.DecideMasquerade, nft.DecideRefused:
		return true
	default:
		return false
	}
}

func join(object, field string) string {
	if object == "" || field == "" {
		return cmp.Or(object, field)
	}
	return object + ", " + field
}

func capitalize(text string) string {
	return strings.ToUpper(text[:1]) + text[1:]
}

// writeEndpoints lists the endpoints of the Service.
func (r *Report) writeEndpoints(b *strings.Builder, number func(string)) {
	if len(r.Endpoints) == 0 {
		return
	}
	selected := 0
	for _, e := range r.Endpoints {
		if e.Excluded == "" {
			selected++
		}
	}
	number(fmt.Sprintf("endpoints: %d of %d can receive the connection", selected, len(r.Endpoints)))
	w := tabwriter.NewWriter(b, 0, 8, 3, ' ', 0)
	for _, e := range r.Endpoints {
		addr := e.Addr.String()
		if e.Addr.Port() == 0 {
			addr = e.Addr.Addr().String()
		}
		reason := "candidate"
		if e.Excluded != "" {
			reason = "no: " + e.Excluded
		}
		if e.EndpointSlice != "" {
			reason += " (EndpointSlice " + e.EndpointSlice + ")"
		}
		_, _ = fmt.Fprintf(w, "    %s\t%s\t%s\n", addr, cmp.Or(e.Pod, "-"), reason) // to memory
	}
	_ = w.Flush() // to memory
}

// maxResults limits how many endpoints the text lists.
const maxResults = 20

func (r *Report) writeResults(b *strings.Builder) {
	if len(r.Results) == 1 {
		b.WriteString(" " + r.Results[0].text() + "\n")
		return
	}
	selected := "at random"
	if slices.ContainsFunc(r.Steps, func(s Step) bool { return s.Decision == nft.DecideEndpoint }) {
		selected = "in turn" // with a hash, there is one result
	}
	fmt.Fprintf(b, " one of %d, selected %s:\n", len(r.Results), selected)
	for i, result := range r.Results {
		if i == maxResults {
			fmt.Fprintf(b, "  - and %d more\n", len(r.Results)-i)
			break
		}
		fmt.Fprintf(b, "  - %s\n", result.text())
	}
}

func (r *Result) text() string {
	switch r.Verdict {
	case nft.Rejected:
		return "rejected, the client gets an error at once"
	case nft.Dropped:
		return "dropped, the client gets no answer"
	case nft.Unchanged:
		return fmt.Sprintf("not translated: source %s, destination %s", r.Source, r.Destination)
	case nft.Translated:
	}
	text := fmt.Sprintf("source %s, destination %s", r.Source, r.Destination)
	if r.Masqueraded {
		text += ", masqueraded"
	}
	if r.VirtualServer.IsValid() {
		text += ", by the virtual server " + r.VirtualServer.String()
	}
	return text
}
