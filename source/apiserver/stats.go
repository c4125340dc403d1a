package apiserver

// Stats says how a list is followed.
type Stats struct {
	// Resource is the name of the list in the API, such as "endpointslices".
	Resource string
	// Synced says that the list was complete once.
	Synced bool
	// HeldRemovals is the number of objects that the last list lacks, and whose
	// removal is held, see [Options.MassRemovalDelay].
	HeldRemovals int
	// Failures counts the requests that failed.
	Failures map[Failure]uint64
	// Recoveries counts how often a list or watch was made anew, although the API
	// server had reported no error, by reason: "silent", "unfinished", "backwards".
	Recoveries map[string]uint64
}

// Failure is how a request failed.
type Failure struct {
	// Verb is "list" or "watch".
	Verb string
	// Code is the HTTP status, or "unreachable", "timeout" or "error".
	Code string
}

// Stats returns how each list is followed. It may be called from any goroutine and
// does not block.
func (s *Source) Stats() []Stats {
	all := make([]Stats, 0, len(s.reflectors))
	for _, l := range s.reflectors {
		stats := Stats{
			Resource: string(l.resource), Synced: s.queue.isSynced(l.resource), HeldRemovals: l.hold.heldObjects(),
			Failures: s.connection.countFailures(l.resource), Recoveries: map[string]uint64{},
		}
		l.progress.mu.Lock()
		for _, reason := range recoveries() {
			stats.Recoveries[string(reason)] = l.progress.recoveries[reason]
		}
		l.progress.mu.Unlock()
		all = append(all, stats)
	}
	return all
}
