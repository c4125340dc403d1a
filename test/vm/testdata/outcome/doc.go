// Package outcome contains tests, one of which fails, that the tests of the program vm run in
// a virtual machine. Patterns such as ./... do not match it.
package outcome
