package manifest

import (
	"cmp"
	"fmt"
	"strings"
)

// Error is one thing that is wrong in a file.
type Error struct {
	// File is the name of the file, without the folder.
	File string
	// Line counts from 1.
	Line int
	// Field is the path of the field, such as spec.ports[0].protocol. It is
	// empty where the text is not YAML, or no object at all.
	Field string
	// Message says what is wrong and how to put it right.
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

// Errors are all things that are wrong in a folder, sorted by file and line.
type Errors []*Error

// Error returns one error a line.
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

// Unwrap returns the errors one by one.
func (e Errors) Unwrap() []error {
	errs := make([]error, len(e))
	for i, err := range e {
		errs[i] = err
	}
	return errs
}
