// Package nodesettings notices settings of the node's kernel that break Services, or
// expose what listens on loopback addresses.
//
// The kernel announces no change of a sysctl, so they are read once a minute. What is
// wrong is logged when it begins and when it ends, with the setting and the fix.
package nodesettings
