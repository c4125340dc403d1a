//go:build !schematest

package nft

// schema is the version of the meaning of elements and rules. It increases if rules of one
// version would misread elements of the other, although the definitions of sets and chains
// are equal. Replace rebuilds a table of another version. A changed definition needs no new
// version, because Replace repairs it in place.
const schema = 2

// alteredDefinitions is for tests of upgrades; see schema_other.go.
const alteredDefinitions = false
