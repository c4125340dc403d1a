// Package nlconn sends batches of netlink requests and reads large dumps. IPVS, routes,
// connection tracking and nftables share it. It uses [netlink.Conn] for the network namespace,
// options, buffers and deadlines of the socket.
//
//   - [Conn.Batch] sends many requests in one system call and returns the kernel's answer to
//     each. The kernel handles the requests of one sendmsg(2) in order, and answers only the
//     last one and the ones with an error (net/netlink/af_netlink.c, netlink_rcv_skb).
//   - [Conn.Dump] and [Conn.Get] read state. Dump passes one message at a time to its caller.
//   - Errors wrap the kernel's errno and include the text of the extended acknowledgement, if
//     any.
//
// Three parts of the netlink library are too slow for this path, measured in a virtual
// machine:
//
//   - [netlink.AttributeEncoder] makes about 60 allocations per request: 11,000 IPVS requests
//     took 406 ms instead of 182 ms (BenchmarkLoad of package ipvs). [Encode] uses it for
//     single requests, and the Append functions encode batches.
//   - [netlink.AttributeDecoder] copies each value: for a connection-tracking entry it takes
//     5.3 µs and 29 allocations instead of 0.5 µs and none (BenchmarkDecode). [Attributes]
//     does not copy.
//   - SendMessages and Receive of netlink.Conn allocate for each message: an update of an IPVS
//     endpoint took 26 % longer (BenchmarkUpdate of package bench). Conn reads and writes its
//     socket through reused buffers.
package nlconn
