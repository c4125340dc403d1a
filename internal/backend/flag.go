package backend

// Kind is the type of a flag's value, as shown in the help.
type Kind string

// The kinds, with the Go type of their values in [Values].
const (
	String   Kind = "string"   // string
	Bool     Kind = "bool"     // bool
	Duration Kind = "duration" // time.Duration
	CIDRs    Kind = "strings"  // []netip.Prefix, comma-separated; the flag may be repeated
)

// Flag describes a setting of one backend.
type Flag struct {
	// Name is the flag's name without leading dashes.
	Name string
	Kind Kind
	// Usage is the help text. The flag's help prefixes it with "with --mode=NAME, ".
	Usage string
	// Default is the value of a flag that is not set.
	Default string
	// Choices are the values that shells complete.
	Choices []string
	// FairleadOnly says that kube-proxy has no such flag.
	FairleadOnly bool
	// Parse converts the text of a value. Its errors quote the text and show a valid value,
	// without the name of the flag. Nil accepts all values of the Kind.
	Parse func(text string) (any, error)
}

// Values maps the names of a backend's flags to their values.
type Values map[string]any

// value returns the value of a flag, or the zero value if it is missing.
func value[T any](v Values, name string) T {
	typed, _ := v[name].(T)
	return typed
}
