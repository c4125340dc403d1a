// Package outcome contains a passing and a failing test, which the tests of the program vm run in
// a virtual machine. Patterns such as ./... do not match it.
package outcome
