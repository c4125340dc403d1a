package nft

import (
	"strings"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

func TestServiceComment(t *testing.T) {
	t.Parallel()
	key := func(namespace, name, port string) dataplane.Key {
		return dataplane.Key{Namespace: namespace, Name: name, Port: port, Family: dataplane.IPv4}
	}
	if got, want := serviceComment(key("shop", "cart", "http")), "shop/cart:http"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	long := strings.Repeat("n", 63)
	a, b := serviceComment(key(long, long, "port-a")), serviceComment(key(long, long, "port-b"))
	if len(a) != maxComment || len(b) != maxComment {
		t.Errorf("comments of long names have %d and %d bytes, want %d", len(a), len(b), maxComment)
	}
	if a == b {
		t.Errorf("two names were shortened to the same comment %q", a)
	}
	if fits := serviceComment(key(long, long[1:], "")); strings.Contains(fits, "~") {
		t.Errorf("a name that fits was shortened to %q", fits)
	}
}
