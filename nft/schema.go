//go:build !schematest

package nft

// schema is the version of what elements and rules mean to each other. It grows when
// rules of the new version would misread elements of the old one, or the other way
// round, although sets and chains have the same definitions. A table of another
// version is rebuilt. Changes of definitions need no new version: Replace repairs
// them in place.
const schema = 1

// alteredDefinitions is for tests of upgrades; see schema_other.go.
const alteredDefinitions = false
