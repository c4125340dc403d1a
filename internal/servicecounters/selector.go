package servicecounters

import (
	"fmt"
	"strings"
)

// Selector selects Services by namespace and name.
type Selector struct {
	Namespace string
	// Name is empty for all Services of the namespace.
	Name string
}

// ParseSelector parses NAMESPACE/NAME or NAMESPACE/*.
func ParseSelector(text string) (Selector, error) {
	namespace, name, ok := strings.Cut(text, "/")
	if !ok || namespace == "" || name == "" || strings.ContainsAny(namespace, "*/") || strings.Contains(name, "/") || name != "*" && strings.Contains(name, "*") {
		return Selector{}, fmt.Errorf("invalid Service %q: use NAMESPACE/NAME, or NAMESPACE/* for all Services of a namespace", text)
	}
	if name == "*" {
		name = ""
	}
	return Selector{namespace, name}, nil
}

func (s Selector) matches(namespace, name string) bool {
	return s.Namespace == namespace && (s.Name == "" || s.Name == name)
}
