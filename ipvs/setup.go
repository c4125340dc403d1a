package ipvs

import "errors"

// SetUp performs the setup that does not depend on Services and may need more privileges than
// CAP_NET_ADMIN: it loads modules, sets sysctls, and creates the interface and the routing
// rules. After SetUp, and until the next boot, a Dataplane needs only CAP_NET_ADMIN and a
// readable /proc/sys. Errors are as for [Open].
func SetUp(opts Options) error {
	d, err := Open(opts)
	if err != nil {
		return err
	}
	return errors.Join(d.setUp(), d.Close())
}
