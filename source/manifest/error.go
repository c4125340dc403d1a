package manifest

import (
	"cmp"
	"fmt"
	"strings"
)

// Error describes one error in a file.
type Error struct {
	// File is the name of the file, without the folder.
	File string
	// Line counts from 1.
	Line int
	// Field is the path of the field, such as spec.ports[0].protocol. It is empty if the
	// text is not YAML or is not an object.
	Field string
	// Message describes the error and its fix.
	Message string
}

// Error returns the error as
//
//	backend.yaml:12: spec.ports[0].protocol: "tpc" is not a protocol: use TCP, UDP or SCTP
func (e *Error) Error() string {
	if e.Field == "" {
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Message)
	}
	return fmt.Sprintf("%s:%d: %s: %s", e.File, e.Line, e.Field, e.Message)
}

func (e *Error) compare(o *Error) int {
	return cmp.Or(
		strings.Compare(e.File, o.File), cmp.Compare(e.Line, o.Line),
		strings.Compare(e.Field, o.Field), strings.Compare(e.Message, o.Message),
	)
}

// Errors has all errors of a folder, sorted by file and line.
type Errors []*Error

// Error returns the errors, one per line.
func (e Errors) Error() string {
	var b strings.Builder
	for i, err := range e {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(err.Error())
	}
	return b.String()
}

// Unwrap returns the individual errors.
func (e Errors) Unwrap() []error {
	errs := make([]error, len(e))
	for i, err := range e {
		errs[i] = err
	}
	return errs
}
