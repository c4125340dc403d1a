// Package dns answers the DNS names of Services where no cluster does.
//
// The records are those of the specification of Kubernetes' DNS
// (https://github.com/kubernetes/dns/blob/master/docs/specification.md, schema
// 1.1.0). With the cluster domain cluster.local, port http of Service web in
// namespace shop, and its pod 10.1.0.5 with the hostname db-0:
//
//	web.shop.svc.cluster.local              A, AAAA  cluster addresses; headless: those of ready endpoints
//	web.shop.svc.cluster.local              CNAME    type ExternalName
//	_http._tcp.web.shop.svc.cluster.local   SRV      one, of the Service; headless: one for each ready endpoint
//	db-0.web.shop.svc.cluster.local         A, AAAA  headless: a ready endpoint by hostname
//	10-1-0-5.web.shop.svc.cluster.local     A, AAAA  headless: a ready endpoint without hostname
//	10-1-0-5.shop.pod.cluster.local         A, AAAA  any address, in a namespace that exists
//	<cluster address in reverse>            PTR      web.shop.svc.cluster.local
//	<endpoint's address in reverse>         PTR      headless: db-0.web.shop.svc.cluster.local
//	dns-version.cluster.local               TXT      1.1.0
//
// A name that is not below the cluster domain is looked up as a pod of the
// default namespace would with its search list, so that web, web.shop and
// web.shop.svc are answered to clients that have no search list.
//
// A name that does not exist gets NXDOMAIN, an existing name without a record of
// the type gets no answers; both carry the SOA record of the cluster domain where
// they are below it. Following the specification, a headless Service without a
// ready endpoint does not exist. All other names get REFUSED: the server knows no
// other and forwards nothing. Until it knows any Service it answers SERVFAIL.
package dns
