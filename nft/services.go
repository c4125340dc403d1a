package nft

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ServicesWithEndpoints returns the names of the Services that have endpoints in the
// kernel, in the format of [fairlead.io/fairlead/dataplane.Key.Service]. Names of more than
// about 110 bytes are shortened. It reads one map per table, which takes about 10 ms for
// 10,000 Services. It needs no Dataplane. It returns no names if the tables do not exist.
func ServicesWithEndpoints(ctx context.Context, opts Options) (map[string]struct{}, error) {
	names := map[string]struct{}{}
	err := visitServices(ctx, opts, func(name string, c serviceClass) {
		if c.size() > 0 {
			names[name] = struct{}{}
		}
	})
	if err != nil {
		return nil, err
	}
	return names, nil
}

// ServiceNames is like [ServicesWithEndpoints], but its result includes Services without
// endpoints.
func ServiceNames(ctx context.Context, opts Options) (map[string]struct{}, error) {
	names := map[string]struct{}{}
	if err := visitServices(ctx, opts, func(name string, _ serviceClass) { names[name] = struct{}{} }); err != nil {
		return nil, err
	}
	return names, nil
}

// visitServices calls visit with the Service's name and the class of each frontend.
func visitServices(ctx context.Context, opts Options, visit func(name string, c serviceClass)) error {
	conn, err := dialDump(opts.NetNS)
	if err != nil {
		return err
	}
	for _, t := range opts.newTables(opts.tableName()) {
		if err := ctx.Err(); err != nil {
			return errors.Join(err, conn.Close())
		}
		err := conn.dumpElements(ctx, t.services, func(e element, _ bool) {
			if _, class, err := t.parseFrontendClass(e); err == nil {
				name, _, _ := parseServiceComment(e.Comment)
				visit(name, class)
			}
		})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return errors.Join(fmt.Errorf("list the elements of set %s in table %s: %w", t.services.Name, t, explainError(err)), conn.Close())
		}
	}
	if err := conn.Close(); err != nil {
		return fmt.Errorf("close the netlink socket: %w", err)
	}
	return nil
}
