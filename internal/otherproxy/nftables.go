package otherproxy

import (
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftFamily is an IP family with its nftables name and number.
type nftFamily struct {
	name   string
	number byte
}

// nftFamilies returns the families in which proxies create tables.
func nftFamilies() [2]nftFamily {
	return [2]nftFamily{{"ip", unix.NFPROTO_IPV4}, {"ip6", unix.NFPROTO_IPV6}}
}

// nftConn queries single nf_tables objects, at a cost that does not depend on the number of
// objects. It also finds the chains of iptables-nft.
type nftConn struct{ *netlink.Conn }

func dialNFTables() (*nftConn, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to find rules of another Service proxy: %w", err)
	}
	return &nftConn{conn}, nil
}

func (c *nftConn) hasTable(f nftFamily, table string) (bool, error) {
	return c.exists(f, unix.NFT_MSG_GETTABLE, netlink.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(table + "\x00")})
}

func (c *nftConn) hasChain(f nftFamily, table, chain string) (bool, error) {
	return c.exists(f, unix.NFT_MSG_GETCHAIN,
		netlink.Attribute{Type: unix.NFTA_CHAIN_TABLE, Data: []byte(table + "\x00")},
		netlink.Attribute{Type: unix.NFTA_CHAIN_NAME, Data: []byte(chain + "\x00")},
	)
}

func (c *nftConn) exists(f nftFamily, get netlink.HeaderType, attributes ...netlink.Attribute) (bool, error) {
	data, err := netlink.MarshalAttributes(attributes)
	if err != nil {
		return false, fmt.Errorf("encode request: %w", err)
	}
	_, err = c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | get, Flags: netlink.Request},
		Data:   append([]byte{f.number, unix.NFNETLINK_V0, 0, 0}, data...),
	})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}
