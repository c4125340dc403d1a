// Package chart tests the Helm chart in deploy/chart/fairlead with Helm's own engine, and that
// the plain manifests and the kustomize components in deploy are equal to what the chart
// renders.
//
// The package has a module of its own because of Helm's dependencies.
package chart
