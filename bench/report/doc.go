// Package report draws benchmark results: [Merge] combines reports, [WriteHTML] writes one
// self-contained HTML page, and [Pictures] returns the charts as files for other documents.
//
// The charts use the drawing package of gonum/plot (vg), which writes both SVG and PNG. The
// package does not use gonum's package plot, which parses a dozen fonts at every program start and
// so takes 5 MB of memory. JavaScript chart libraries are not an option, because the page must be
// readable without them.
//
// The SVG refers to colors by their purpose, through CSS variables. The page or the SVG file
// defines the variables for light and dark color schemes.
package report
