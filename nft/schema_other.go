//go:build schematest

package nft

// With the build tag schematest the package stands for another version of itself, so
// that tests can upgrade and downgrade between two builds under load.
const (
	schema           = 2
	otherDefinitions = true
)
