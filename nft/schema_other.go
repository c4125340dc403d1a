//go:build schematest

package nft

// The build tag schematest makes the package behave like another version, so that tests can
// upgrade and downgrade between two builds under load.
const (
	schema             = 3
	alteredDefinitions = true
)
