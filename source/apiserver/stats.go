package apiserver

import "time"

// Stats describes the state of one list and watch.
type Stats struct {
	// Resource is the plural name of the resource in the API, such as "endpointslices".
	Resource string
	// Synced is true once the first list is complete.
	Synced bool
	// HeldRemovals is the number of objects that are missing from the last list but not
	// removed yet, see [Options.MassRemovalDelay].
	HeldRemovals int
	// Failures counts failed requests.
	Failures map[Failure]uint64
	// Recoveries counts restarts of a list or watch for which the API server reported no
	// error, by reason: "silent", "unfinished", "backwards".
	Recoveries map[string]uint64
}

// Failure classifies a failed request.
type Failure struct {
	// Verb is "list" or "watch".
	Verb string
	// Code is the HTTP status, or "unreachable", "timeout" or "error".
	Code string
}

// Stats returns the state of each list and watch. It is safe for concurrent use and does
// not block.
func (s *Source) Stats() []Stats {
	all := make([]Stats, 0, len(s.reflectors))
	for _, r := range s.reflectors {
		stats := Stats{
			Resource: string(r.resource), Synced: s.queue.isSynced(r.resource), HeldRemovals: r.hold.heldObjects(),
			Failures: s.connection.countFailures(r.resource), Recoveries: map[string]uint64{},
		}
		r.progress.mu.Lock()
		for _, reason := range recoveries() {
			stats.Recoveries[string(reason)] = r.progress.recoveries[reason]
		}
		r.progress.mu.Unlock()
		all = append(all, stats)
	}
	return all
}

// ConnectionStatus describes the connection to the API server.
type ConnectionStatus struct {
	// Connected reports whether the server answered the last request of each list and watch,
	// even with an error. It is false before the first answer.
	Connected bool
	// LastResponse is when the server last answered a request; zero means never.
	LastResponse time.Time
	// Failures lists the resources whose last request failed, with the HTTP status or another
	// reason.
	Failures []string
}

// ConnectionStatus returns the state of the connection. It is safe for concurrent use and does
// not block.
func (s *Source) ConnectionStatus() ConnectionStatus { return s.connection.status() }
