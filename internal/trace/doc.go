// Package trace explains what this node does with a new connection: it evaluates the rules in the
// kernel, and the rules that the desired state would program, with the functions of the packages
// that program them, and names the objects and fields that decide.
package trace
