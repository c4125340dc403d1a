package backend

// IPVSOptions is ipvsOptions for tests.
func IPVSOptions(o Options) any { return ipvsOptions(o) }
