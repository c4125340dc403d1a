package manifest

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// TestServiceDefaults checks the defaults of Services, which are those of the API server.
func TestServiceDefaults(t *testing.T) {
	t.Parallel()
	spec := func(more func(*corev1.ServiceSpec)) corev1.ServiceSpec {
		spec := corev1.ServiceSpec{
			Type:                  corev1.ServiceTypeClusterIP,
			ClusterIP:             "10.96.0.1",
			ClusterIPs:            []string{"10.96.0.1"},
			IPFamilies:            []corev1.IPFamily{corev1.IPv4Protocol},
			IPFamilyPolicy:        new(corev1.IPFamilyPolicySingleStack),
			InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyCluster),
			SessionAffinity:       corev1.ServiceAffinityNone,
			Ports:                 []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(80)}},
		}
		more(&spec)
		return spec
	}
	for _, tt := range []struct {
		name, more string
		want       func(*corev1.ServiceSpec)
	}{
		{"ClusterIP", "", func(*corev1.ServiceSpec) {}},
		{"empty target port name", "ports: [{port: 80, targetPort: ''}]", func(*corev1.ServiceSpec) {}},
		{"external addresses", "externalIPs: [192.0.2.1]", func(s *corev1.ServiceSpec) {
			s.ExternalIPs = []string{"192.0.2.1"}
			s.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
		}},
		{"NodePort", "type: NodePort", func(s *corev1.ServiceSpec) {
			s.Type = corev1.ServiceTypeNodePort
			s.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
			s.Ports[0].NodePort = 32066
		}},
		{"LoadBalancer", "type: LoadBalancer", func(s *corev1.ServiceSpec) {
			s.Type = corev1.ServiceTypeLoadBalancer
			s.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
			s.AllocateLoadBalancerNodePorts = new(true)
			s.Ports[0].NodePort = 32066
		}},
		{"ClientIP", "sessionAffinity: ClientIP", func(s *corev1.ServiceSpec) {
			s.SessionAffinity = corev1.ServiceAffinityClientIP
			s.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(int32(10800))}}
		}},
		{"ClientIP with a timeout", "sessionAffinity: ClientIP\nsessionAffinityConfig: {clientIP: {timeoutSeconds: 86400}}", func(s *corev1.ServiceSpec) {
			s.SessionAffinity = corev1.ServiceAffinityClientIP
			s.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(int32(86400))}}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if !strings.Contains(tt.more, "ports:") {
				tt.more += "\nports: [{port: 80}]"
			}
			text := "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  clusterIP: 10.96.0.1\n" + indent(tt.more)
			d, err := Load(Options{Dir: writeFolder(t, "a.yaml", text)})
			if err != nil || len(d.Services) != 1 {
				t.Fatalf("%d Services, error %v", len(d.Services), err)
			}
			if diff := cmp.Diff(spec(tt.want), d.Services[0].Spec); diff != "" {
				t.Errorf("spec (-want +got):\n%s", diff)
			}
		})
	}
}

// TestLoadBalancerAddresses checks that a file may have the status that a load balancer
// controller writes.
func TestLoadBalancerAddresses(t *testing.T) {
	t.Parallel()
	text := strings.Replace(serviceYAML("web", "type: LoadBalancer\nloadBalancerSourceRanges: [192.0.2.0/24]"), "\n---",
		"\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: Proxy}, {ip: 169.254.1.1}, {hostname: example.com}]}}\n---", 1)
	d, err := Load(Options{Dir: writeFolder(t, "a.yaml", text), ServiceCIDRs: oneCIDR})
	if err != nil || len(d.Services) != 1 {
		t.Fatalf("%d Services, error %v", len(d.Services), err)
	}
	want := []corev1.LoadBalancerIngress{
		{IP: "192.0.2.1", IPMode: new(corev1.LoadBalancerIPModeVIP)},
		{IP: "192.0.2.2", IPMode: new(corev1.LoadBalancerIPModeProxy)},
		{IP: "169.254.1.1", IPMode: new(corev1.LoadBalancerIPModeVIP)},
		{Hostname: "example.com"},
	}
	if diff := cmp.Diff(want, d.Services[0].Status.LoadBalancer.Ingress); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"192.0.2.0/24"}, d.Services[0].Spec.LoadBalancerSourceRanges); diff != "" {
		t.Errorf("ranges (-want +got):\n%s", diff)
	}
}

// TestTrafficDistribution checks the hints of EndpointSlices built from Pods, and that
// hints in files are kept.
func TestTrafficDistribution(t *testing.T) {
	t.Parallel()
	for distribution, want := range map[string]string{
		"":               "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.9=zone+there",
		"PreferClose":    "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.9=zone+there",
		"PreferSameZone": "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.9=zone+there",
		"PreferSameNode": "10.0.0.1=here 10.0.0.2=there 10.0.0.3 10.0.0.9=zone+there",
	} {
		t.Run(distribution, func(t *testing.T) {
			t.Parallel()
			more := ""
			if distribution != "" {
				more = "trafficDistribution: " + distribution
			}
			text := serviceYAML("web", more) + podYAML("w1", "web", "10.0.0.1", "") +
				strings.Replace(podYAML("w2", "web", "10.0.0.2", ""), "spec:", "spec:\n  nodeName: there", 1) +
				podYAML("w3", "web", "10.0.0.3", "  phase: Pending") + `
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: zzz, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.9], hints: {forZones: [{name: zone}], forNodes: [{name: there}]}}]
ports: [{port: 8080}]
`
			d, err := Load(Options{Dir: writeFolder(t, "a.yaml", text), ServiceCIDRs: oneCIDR, NodeName: "here"})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, slice := range d.EndpointSlices {
				for _, ep := range slice.Endpoints {
					got = append(got, ep.Addresses[0]+hintText(ep))
				}
			}
			if got := strings.Join(got, " "); got != want {
				t.Errorf("hints\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func hintText(ep discoveryv1.Endpoint) string {
	if ep.Hints == nil {
		return ""
	}
	var names []string
	for _, zone := range ep.Hints.ForZones {
		names = append(names, zone.Name)
	}
	for _, node := range ep.Hints.ForNodes {
		names = append(names, node.Name)
	}
	return "=" + strings.Join(names, "+")
}
