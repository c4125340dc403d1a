package backend

// IPVSOptions exports ipvsOptions for tests.
func IPVSOptions(o Options) any { return ipvsOptions(o) }
