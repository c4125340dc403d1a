package compare

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
)

// WriteText writes the differences like diff(1): lines with - show the kernel's state, lines with + the
// desired state.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	for _, s := range r.Services {
		s.write(&b)
	}
	for _, o := range r.Objects {
		fmt.Fprintf(&b, "%s: %s\n", o.Object, o.Problem)
		for _, value := range o.Have {
			fmt.Fprintf(&b, "-   %s\n", value)
		}
		for _, value := range o.Want {
			fmt.Fprintf(&b, "+   %s\n", value)
		}
	}
	if len(r.Services) == 0 && len(r.Objects) == 0 {
		// Elements that do not change how connections are handled now.
		for _, write := range r.Writes {
			sign := map[string]string{dataplane.Add: "+", dataplane.Delete: "-"}[write.Op]
			fmt.Fprintf(&b, "%1s %s: %s\n", sign, count(write.Count, write.Object), write.Name)
		}
	}
	for _, u := range r.Unsupported {
		fmt.Fprintf(&b, "# not programmed: Service %s: %s\n", u.Service, u.Error)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (s Service) write(b *strings.Builder) {
	sign := map[string]string{dataplane.Missing: "+", dataplane.Unexpected: "-", dataplane.Differs: " "}[s.Problem]
	name := s.Service
	if name == "" {
		name = "(unknown)"
	}
	fmt.Fprintf(b, "Service %s: %s", name, s.Problem)
	if s.Reason != "" {
		fmt.Fprintf(b, ": %s", s.Reason)
	}
	b.WriteString("\n")
	for _, f := range s.Frontends {
		fmt.Fprintf(b, "%s   %s\n", sign, f)
	}
	for _, f := range s.Fields {
		writeValues(b, "-", f.Name, f.Have)
		writeValues(b, "+", f.Name, f.Want)
	}
}

func writeValues(b *strings.Builder, sign, name string, values []Value) {
	for _, v := range values {
		fmt.Fprintf(b, "%s     %s: %s", sign, name, v.Value)
		if v.Reason != "" {
			fmt.Fprintf(b, "  # %s", v.Reason)
		}
		b.WriteString("\n")
	}
}

// WriteSummary writes the number of differing Services and of writes.
func (r *Report) WriteSummary(w io.Writer) error {
	problems := map[string]map[string]bool{}
	for _, s := range r.Services {
		if problems[s.Problem] == nil {
			problems[s.Problem] = map[string]bool{}
		}
		problems[s.Problem][s.Service] = true
	}
	var b strings.Builder
	fmt.Fprintf(&b, "mode %s, %s with %s: %d to add, %d to change, %d to remove\n",
		r.Mode, count(r.DesiredPorts, "Service port"), count(r.DesiredFrontends, "frontend"),
		len(problems[dataplane.Missing]), len(problems[dataplane.Differs]), len(problems[dataplane.Unexpected]))
	objects := map[string]bool{}
	for _, write := range r.Writes {
		objects[write.Object] = true
	}
	for _, object := range slices.Sorted(maps.Keys(objects)) {
		var parts []string
		for _, op := range []string{dataplane.Add, dataplane.Modify, dataplane.Delete} {
			if n := r.Count(op, object); n > 0 {
				parts = append(parts, fmt.Sprintf("%d to %s", n, op))
			}
		}
		fmt.Fprintf(&b, "%ss: %s\n", object, strings.Join(parts, ", "))
	}
	if len(r.Writes) == 0 {
		b.WriteString("nothing to write\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// count returns "1 chain" or "2 chains".
func count(n int, object string) string {
	if n == 1 {
		return "1 " + object
	}
	return fmt.Sprintf("%d %ss", n, object)
}
