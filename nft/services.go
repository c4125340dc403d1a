package nft

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ServicesWithEndpoints returns the names of the Services that have endpoints in the
// kernel, in the format of [fairlead.io/fairlead/dataplane.Key.Service]. Names of more than
// 127 bytes are shortened. It reads one map per table, which takes about 10 ms for 10,000
// Services. It needs no Dataplane. It returns no names if the tables do not exist.
func ServicesWithEndpoints(ctx context.Context, opts Options) (map[string]struct{}, error) {
	conn, err := dialDump(opts.NetNS)
	if err != nil {
		return nil, err
	}
	names := map[string]struct{}{}
	for _, t := range opts.newTables(opts.tableName()) {
		if err := ctx.Err(); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		err := conn.dumpElements(ctx, t.services, func(e element, _ bool) {
			if _, class, err := t.parseFrontendClass(e); err == nil && class.size() > 0 {
				names[e.Comment] = struct{}{}
			}
		})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, errors.Join(fmt.Errorf("list the elements of set %s in table %s: %w", t.services.Name, t, err), conn.Close())
		}
	}
	if err := conn.Close(); err != nil {
		return nil, fmt.Errorf("close the netlink socket: %w", err)
	}
	return names, nil
}
