package preflight

import (
	"errors"
	"io/fs"
	"os"
	"strings"
)

// checkForwarding checks that the kernel forwards packets to pods.
func (c *checker) checkForwarding() {
	for _, setting := range []struct {
		name, path string
		missing    Status
	}{
		{"net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward", Failed},
		{"net.ipv6.conf.all.forwarding", "/proc/sys/net/ipv6/conf/all/forwarding", Warning},
	} {
		const check = "forwarding"
		text, err := os.ReadFile(setting.path)
		switch value := strings.TrimSpace(string(text)); {
		case errors.Is(err, fs.ErrNotExist):
			c.Add(check, Info, "", "the kernel does not have %s", setting.name)
		case err != nil:
			c.error(check, err)
		case value == "0":
			c.Add(check, setting.missing, "sysctl -w "+setting.name+"=1", "%s is 0: connections to pods of this node and of other nodes are dropped", setting.name)
		default:
			c.Add(check, OK, "", "%s is %s", setting.name, value)
		}
	}
}
