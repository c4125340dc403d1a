package inspect

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ErrNotProgrammed is wrapped by every [*NotProgrammedError].
var ErrNotProgrammed = errors.New("not programmed")

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

// Unwrap returns [ErrNotProgrammed].
func (*NotProgrammedError) Unwrap() error { return ErrNotProgrammed }

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

// NotFoundError reports that the kernel holds no Service with a name.
type NotFoundError struct {
	// Namespace is empty if all namespaces were searched. Name can contain a port.
	Namespace, Name string
	// Nearest is the name of a Service that is similar, or empty.
	Nearest string
}

// Error names the Service and the most similar one.
func (e *NotFoundError) Error() string {
	text := fmt.Sprintf("Service %q not found in the kernel", e.Name)
	if e.Namespace != "" {
		text = fmt.Sprintf("Service %q not found in namespace %q in the kernel", e.Name, e.Namespace)
	}
	if e.Nearest != "" {
		text += fmt.Sprintf(": did you mean %q?", e.Nearest)
	}
	return text
}

// NotFound returns an error that suggests the most similar Service. namespace is empty for all
// namespaces, and port is the name of a port or empty.
func (k *Kernel) NotFound(namespace, name, port string) *NotFoundError {
	e := &NotFoundError{Namespace: namespace, Name: name}
	if port != "" {
		e.Name += ":" + port
	}
	var here, elsewhere []string
	for i := range k.Frontends {
		in, service, servicePort := k.Frontends[i].Service()
		if port != "" && servicePort != "" {
			service += ":" + servicePort
		}
		if in == namespace {
			here = append(here, service)
		}
		elsewhere = append(elsewhere, in+"/"+service)
	}
	if e.Nearest = Nearest(e.Name, here); e.Nearest == "" {
		e.Nearest = Nearest(e.Name, elsewhere)
	}
	return e
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

// editDistance returns the number of bytes to insert, delete or replace, and of neighbors to
// exchange, to turn a into b.
func editDistance(a, b string) int {
	before, last := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			replaced := last[j]
			if a[i] != b[j] {
				replaced++
			}
			row[j+1] = min(replaced, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
