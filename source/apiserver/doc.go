// Package apiserver delivers the objects of a Kubernetes API server, and writes
// Kubernetes Events.
package apiserver
