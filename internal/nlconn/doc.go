// Package nlconn sends netlink requests by the hundred and reads large dumps. It
// extends [netlink.Conn] by what IPVS, routes, connection tracking and nftables share:
//
//   - [Conn.Batch] sends many requests by one system call and returns the kernel's
//     answer to each. The kernel handles the requests of one sendmsg(2) in order, and
//     acknowledges only the last one and those that fail
//     (net/netlink/af_netlink.c, netlink_rcv_skb).
//   - [Conn.Dump] and [Conn.Get] read. A dump hands over one message at a time.
//   - Errors are the kernel's errno, with the text of its extended acknowledgement if it
//     has one.
//
// [Encode] encodes single requests by [netlink.AttributeEncoder]. The Append functions are for
// requests that go by the hundred: with the AttributeEncoder, which makes some 60
// allocations for a request, 11,000 requests to IPVS took 406 ms instead of 182 ms
// (BenchmarkLoad of package ipvs, in a virtual machine).
//
// [Attributes] decodes without copying. [netlink.AttributeDecoder] copies each value: for an entry of the
// connection-tracking table it takes 10 times as long (5.3 against 0.5 µs on a busy machine) and
// makes 29 allocations instead of none (BenchmarkDecode). Dumps have hundreds of thousands
// of entries, which the kernel lists in some 2 µs each.
package nlconn
