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
	for kind, want := range map[dataplane.Kind]string{
		dataplane.ClusterIP: "shop/cart:http", dataplane.NodePort: "shop/cart:http",
		dataplane.ExternalIP: "shop/cart:http ExternalIP", dataplane.LoadBalancer: "shop/cart:http LoadBalancer",
	} {
		k := key("shop", "cart", "http")
		k.Kind = kind
		got := serviceComment(k)
		if got != want {
			t.Errorf("%s: got %q, want %q", kind, got, want)
		}
		name, parsed, hasKind := parseServiceComment(got)
		if external := strings.Contains(want, " "); name != "shop/cart:http" || hasKind != external || external && parsed != kind {
			t.Errorf("%q: parsed as %q with kind %s (%v)", got, name, parsed, hasKind)
		}
		k.Namespace, k.Name = strings.Repeat("n", 63), strings.Repeat("n", 63)
		if long := serviceComment(k); len(long) != maxComment {
			t.Errorf("%s: the comment of a long name has %d bytes, want %d", kind, len(long), maxComment)
		}
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
