package inspect

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// NotProgrammedError reports that the requested mode, or no mode, is programmed.
type NotProgrammedError struct {
	// Mode is the requested mode, empty for any. Programmed contains the programmed modes.
	Mode       string
	Programmed []string
}

// Error says which mode is programmed, and what to do.
func (e *NotProgrammedError) Error() string {
	switch {
	case len(e.Programmed) == 0:
		return "Fairlead has programmed nothing in this network namespace: start `fairlead run`, or run this command on the node; " +
			"in a cluster: " + execExample
	case e.Mode == "":
		return fmt.Sprintf("the modes %s are programmed at the same time, as during a change of the mode: select one with --mode",
			strings.Join(e.Programmed, " and "))
	default:
		return fmt.Sprintf("--mode: mode %s is not programmed, mode %s is: omit --mode, or use --mode=%s",
			e.Mode, strings.Join(e.Programmed, " and "), e.Programmed[0])
	}
}

// execExample is the way to run a command in a cluster.
const execExample = "kubectl -n kube-system exec ds/fairlead -- /fairlead get services"

// PermissionError reports that the process may not read the kernel's state.
type PermissionError struct{ err error }

// Error says which capability is missing, and how to run the command.
func (*PermissionError) Error() string {
	return "missing capability CAP_NET_ADMIN, which the kernel requires to read Services: run the command as root (sudo fairlead …); " +
		"in a cluster: " + execExample
}

// Unwrap returns the kernel's error.
func (e *PermissionError) Unwrap() error { return e.err }

// NotFoundError reports that no object has a name.
type NotFoundError struct {
	// Resource is the kind of the object in the plural, such as "services". Name is the
	// requested name.
	Resource, Name string
	// Nearest is an existing name that is similar, or empty.
	Nearest string
}

// Error names the object and the most similar one.
func (e *NotFoundError) Error() string {
	text := fmt.Sprintf("%s %q not found", e.Resource, e.Name)
	if e.Nearest != "" {
		text += fmt.Sprintf(": did you mean %q?", e.Nearest)
	}
	return text
}

// Nearest returns the name that is most similar to an unknown one, or an empty string if none is
// similar: if it differs in more than a third of the characters, and neither is a part of the
// other.
func Nearest(unknown string, names []string) string {
	type candidate struct {
		name     string
		distance int
	}
	var similar []candidate
	for _, name := range names {
		if name == unknown {
			continue
		}
		distance := editDistance(unknown, name)
		contained := unknown != "" && (strings.Contains(name, unknown) || len(name) > 2 && strings.Contains(unknown, name))
		if contained || distance <= max(1, len(unknown)/3) {
			similar = append(similar, candidate{name, distance})
		}
	}
	if len(similar) == 0 {
		return ""
	}
	return slices.MinFunc(similar, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.distance, b.distance), strings.Compare(a.name, b.name))
	}).name
}

// editDistance returns the number of bytes to insert, delete or replace to turn a into b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
