package ipvs

import "errors"

// SetUp does what may take more rights than CAP_NET_ADMIN, and what does not
// depend on Services: it loads modules, sets the node's settings, and makes the
// interface and the routing rules. Where it has been called before, a Dataplane
// needs CAP_NET_ADMIN and a /proc/sys that it can read, until the next boot. Errors
// are as for [Open].
func SetUp(opts Options) error {
	d, err := Open(opts)
	if err != nil {
		return err
	}
	return errors.Join(d.setUp(), d.Close())
}
