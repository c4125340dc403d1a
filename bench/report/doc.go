// Package report makes pictures and a page of what benchmarks have found out:
// [Merge] joins results, [WriteHTML] writes one page that needs nothing else, and
// [Pictures] are its charts for other documents.
//
// The charts are drawn with the drawing half of gonum/plot (vg), which writes SVG and PNG
// alike. Its other half, package plot, parses a dozen fonts when a program
// starts, whatever the program then does, which takes 5 MB of memory. Libraries that draw in the browser were no choice for a
// page that is to be read without them.
//
// Colours are named in the SVG by what they stand for, and the page, or the file,
// says what they are: for light and dark.
package report
