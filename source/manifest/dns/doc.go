// Package dns is a DNS server for the names of Services, for use without a cluster's DNS.
//
// The records follow the Kubernetes DNS specification
// (https://github.com/kubernetes/dns/blob/master/docs/specification.md, schema 1.1.0). With
// the cluster domain cluster.local, Service web in namespace shop with port http, and its
// pod 10.1.0.5 with hostname db-0:
//
//	web.shop.svc.cluster.local              A, AAAA  cluster IPs; headless: addresses of ready endpoints
//	web.shop.svc.cluster.local              CNAME    type ExternalName
//	_http._tcp.web.shop.svc.cluster.local   SRV      one for the Service; headless: one per ready endpoint
//	db-0.web.shop.svc.cluster.local         A, AAAA  headless: ready endpoint with hostname
//	10-1-0-5.web.shop.svc.cluster.local     A, AAAA  headless: ready endpoint without hostname
//	10-1-0-5.shop.pod.cluster.local         A, AAAA  any address, in an existing namespace
//	<cluster IP in reverse>                 PTR      web.shop.svc.cluster.local
//	<endpoint address in reverse>           PTR      headless: db-0.web.shop.svc.cluster.local
//	dns-version.cluster.local               TXT      1.1.0
//
// For a name outside the cluster domain, the server applies the search list of a pod in the
// default namespace, so that clients without a search list can resolve web, web.shop and
// web.shop.svc.
//
// A name in the cluster domain that does not exist gets NXDOMAIN; an existing name without
// records of the type gets an empty answer. Both responses carry the SOA record of the
// cluster domain. As the specification requires, a headless Service without ready endpoints
// does not exist. Outside the cluster domain, an unknown name gets NXDOMAIN only if it has a
// single label or the last label svc. All other names get REFUSED: the server forwards no
// queries. Before the first Delta, the server answers SERVFAIL.
package dns
