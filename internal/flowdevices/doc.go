// Package flowdevices follows the network interfaces of a node and selects the ones that take part in
// flow offload.
//
// A flowtable handles the packets of the devices that it lists. A connection can be offloaded only if
// it enters and leaves the node through devices of the flowtable (nf_flow_table_path.c, nft_flow_route).
// So in doubt an interface takes part: one that carries no connection of a Service costs one lookup in
// a hash table for each of its packets.
package flowdevices
