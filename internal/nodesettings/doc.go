// Package nodesettings detects kernel settings of the node that break Services or expose
// listeners on loopback addresses.
//
// The kernel sends no notifications for sysctls, so the Watcher reads them once a minute. It
// logs the start and the end of each problem, with the setting and the fix.
package nodesettings
