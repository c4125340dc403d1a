// Package outcome has tests that the harness's own tests run in a virtual
// machine, also one that fails. No pattern with dots finds it.
package outcome
