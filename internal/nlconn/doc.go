// Package nlconn sends batches of netlink requests and reads large dumps. IPVS, routes, connection
// tracking and nftables share it. It uses [netlink.Conn] for the socket: network namespace, options,
// buffers and deadlines.
//
//   - [Conn.Batch] sends many requests in one system call and returns the kernel's answer to each.
//     The kernel handles the requests of one sendmsg(2) in order, and answers the last one and the
//     ones that fail (net/netlink/af_netlink.c, netlink_rcv_skb).
//   - [Conn.Dump] and [Conn.Get] read. A dump delivers one message at a time.
//   - Errors contain the kernel's errno and, if present, the text of its extended acknowledgement.
//
// Three parts of the netlink library are too slow for this path, measured in a virtual machine:
//
//   - [netlink.AttributeEncoder] makes about 60 allocations for a request: 11,000 IPVS requests took
//     406 ms instead of 182 ms (BenchmarkLoad of package ipvs). [Encode] uses it for single requests,
//     and the Append functions encode batches.
//   - [netlink.AttributeDecoder] copies each value: 5.3 µs and 29 allocations for an entry of the
//     connection-tracking table instead of 0.5 µs and none (BenchmarkDecode). [Attributes] does not
//     copy.
//   - SendMessages and Receive of netlink.Conn allocate for each message: an update of an IPVS
//     endpoint took 26 % longer (BenchmarkUpdate of package bench). Conn reads and writes its socket through
//     reused buffers.
package nlconn
