// Package reloadtest tests package ipvs across a reload of the kernel modules. A reload ends all
// IPVS state of the machine, and github.com/moby/ipvs fails in this process from then on, so the
// test has a process of its own. It has the build tag ipvs: see [fairlead.io/fairlead/ipvs].
package reloadtest
