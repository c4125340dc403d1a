package backend

// Kind is the form of a flag's value, by its name in the help.
type Kind string

// The kinds, with the type that a value has in [Values].
const (
	String   Kind = "string"   // string
	Bool     Kind = "bool"     // bool
	Duration Kind = "duration" // time.Duration
	CIDRs    Kind = "strings"  // []netip.Prefix, comma-separated; the flag may be given again
)

// Flag is a setting of one backend.
type Flag struct {
	// Name is the flag's name without dashes.
	Name string
	Kind Kind
	// Usage is the help, which begins with "with --mode=NAME, ".
	Usage string
	// Default is the value of a flag that is not set.
	Default string
	// Choices are what the shell completes.
	Choices []string
	// FairleadOnly says that kube-proxy has no such flag.
	FairleadOnly bool
	// Parse returns the value of a text, or an error that has the text and says how to
	// write it, without the name of the flag. Nil parses every text of the Kind.
	Parse func(text string) (any, error)
}

// Values has the value of each of a backend's flags, by name.
type Values map[string]any

// value returns the value of a flag, or the zero value of a missing flag.
func value[T any](v Values, name string) T {
	typed, _ := v[name].(T)
	return typed
}
