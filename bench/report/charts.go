package report

import (
	"cmp"
	"math"
	"slices"
	"strings"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
	"fairlead.io/fairlead/bench/table"
)

// Dimensions of all charts, in pixels.
const (
	textSize  = 12.5
	smallSize = 11.5
	rowHeight = 21
	groupHead = 25
	axisSpace = 34
	margin    = 2
)

// row is one system in a chart.
type row struct {
	style seriesStyle
	// low and high bound most samples, min and max bound all samples.
	min, low, median, high, max float64
	text                        string
}

// newRow returns the row for a measurement with a distribution.
func newRow(m *result.Measurement) row {
	d := m.Distribution
	low := d.Min
	if len(m.Samples) > 0 {
		low = statistics.Quantile(0.1)(slices.Sorted(slices.Values(m.Samples)))
	}
	return row{styleOf(m.System), d.Min, low, d.P50, d.P90, d.Max, table.Number(d.P50, m.Unit)}
}

// group contains rows under one heading.
type group struct {
	heading string
	rows    []row
}

// rowsChart shows one row per system, in groups: as a range on a logarithmic axis, or as a bar
// that starts at zero.
type rowsChart struct {
	name   string
	unit   string
	bars   bool
	groups []group
}

func (r *rowsChart) title() string { return r.name }

// stacked reports whether labels are above the rows, because there is no space beside them.
func stacked(width float64) bool { return width < 480 }

// rowHeightAt returns the height of rows, and the part of it above the drawn range or bar.
func rowHeightAt(width float64) (height, above float64) {
	if stacked(width) {
		return 2*rowHeight + 2, rowHeight + 1
	}
	return rowHeight, 0
}

func (r *rowsChart) height(width float64) float64 {
	rows, _ := rowHeightAt(width)
	height := float64(axisSpace + margin)
	for _, g := range r.groups {
		if g.heading != "" {
			height += groupHead
		}
		height += rows * float64(len(g.rows))
	}
	return height
}

func (r *rowsChart) forEachRow(f func(row)) {
	for _, g := range r.groups {
		for _, entry := range g.rows {
			f(entry)
		}
	}
}

func (r *rowsChart) drawOn(c *canvas) {
	label := textFormat{role: ink, size: textSize}
	value := textFormat{role: ink, size: textSize, bold: true}
	var names, values, highest float64
	lowest := math.Inf(1)
	r.forEachRow(func(entry row) {
		names = max(names, c.textWidth(label, entry.style.label))
		values = max(values, c.textWidth(value, entry.text))
		lowest, highest = min(lowest, entry.min), max(highest, entry.max)
	})
	const gap = 8
	left, right := names+gap, c.width-values-gap
	height, above := rowHeightAt(c.width)
	if stacked(c.width) {
		const room = 6
		left = 0
		if !r.bars {
			left, right = room, c.width-room
		}
	}
	s := logScale(lowest, highest, left, right)
	if r.bars {
		s = linearScale(highest, left, right)
	}
	y := float64(margin)
	var spans [][2]float64 // grid lines are drawn behind rows, not behind headings
	for _, g := range r.groups {
		if g.heading != "" {
			y += groupHead
		}
		for range g.rows {
			spans = append(spans, [2]float64{y + above, y + height})
			y += height
		}
	}
	c.axis(s, c.height-axisSpace, r.unit, spans...)
	y = margin
	for _, g := range r.groups {
		if g.heading != "" {
			c.drawText(textFormat{role: ink, size: textSize, bold: true}, 0, y+groupHead*0.55, g.heading)
			y += groupHead
		}
		for _, entry := range g.rows {
			middle := y + above + rowHeight/2
			name, number := middle, middle
			if stacked(c.width) {
				middle -= 2
				name, number = y+above/2, y+above/2
			}
			c.drawText(label, 0, name, entry.style.label)
			if r.bars {
				c.drawBar(entry, s, middle, value)
			} else {
				c.drawRange(entry, s, middle)
				c.drawText(textFormat{role: ink, size: textSize, bold: true, align: 1}, c.width, number, entry.text)
			}
			y += height
		}
	}
}

func (c *canvas) drawRange(entry row, s scale, y float64) {
	const thin, thick, radius, end = 1.2, 5.5, 5, 3
	c.line(entry.style.series, thin, s.position(entry.min), y, s.position(entry.max), y)
	for _, v := range []float64{entry.min, entry.max} {
		c.line(entry.style.series, thin, s.position(v), y-end, s.position(v), y+end)
	}
	c.line(entry.style.series, thick, s.position(entry.low), y, s.position(entry.high), y)
	c.dot(surface, false, s.position(entry.median), y, radius+1.2)
	c.dot(entry.style.series, entry.style.hollow, s.position(entry.median), y, radius)
}

func (c *canvas) drawBar(entry row, s scale, y float64, value textFormat) {
	const thickness, minLength, end = 13, 1.5, 3
	c.bar(entry.style.series, s.low, y, max(minLength, s.position(entry.median)-s.low), thickness)
	reach := s.position(entry.median)
	if entry.max > entry.min {
		c.line(ink, 1, s.position(entry.min), y, s.position(entry.max), y)
		for _, v := range []float64{entry.min, entry.max} {
			c.line(ink, 1, s.position(v), y-end, s.position(v), y+end)
		}
		reach = s.position(entry.max)
	}
	c.drawText(value, reach+7, y, entry.text)
}

// axis draws grid lines from top to bottom of each span, and labels below.
func (c *canvas) axis(s scale, bottom float64, unit string, spans ...[2]float64) {
	l := textFormat{role: muted, size: smallSize, align: 0.5}
	const spacing = 58 // keeps labels apart
	end := math.Inf(-1)
	for _, v := range s.ticks(max(2, int((s.high-s.low)/spacing))) {
		x := s.position(v)
		for _, span := range spans {
			c.line(grid, 1, x, span[0], x, span[1])
		}
		label := trimZeros(v, unit)
		half := c.textWidth(l, label) / 2
		at := min(max(x, half), c.width-half)
		if at-half > end {
			c.drawText(l, at, bottom+14, label)
			end = at + half + 6
		}
	}
}

// curve is the line of one system.
type curve struct {
	style seriesStyle
	x, y  []float64
	// low and high, if not nil, are a range around y.
	low, high []float64
}

// curvesChart shows lines: the distribution of samples, or how a measure depends on a number.
type curvesChart struct {
	name         string
	xUnit, yUnit string
	yTitle       string
	logY         bool
	curves       []curve
	ticks        []float64 // x values of grid lines; nil selects round numbers
	steps        bool
}

func (k *curvesChart) title() string { return k.name }

// legend returns the lines of the legend as indices of curves.
func (k *curvesChart) legend(width float64) [][]int {
	const entryWidth, maxPerLine = 165, 4
	perLine := min(maxPerLine, max(1, int(width/entryWidth)))
	var lines [][]int
	for i := range k.curves {
		if i%perLine == 0 {
			lines = append(lines, nil)
		}
		lines[len(lines)-1] = append(lines[len(lines)-1], i)
	}
	return lines
}

const legendLine = 20

func (k *curvesChart) height(width float64) float64 {
	const ratio, minHeight, maxHeight = 0.42, 210, 300
	return min(maxHeight, max(minHeight, width*ratio)) + float64(legendLine*len(k.legend(width))) + axisSpace
}

func (k *curvesChart) drawOn(c *canvas) {
	y := float64(legendLine) / 2
	for _, line := range k.legend(c.width) {
		for i, at := range line {
			x := float64(i) * c.width / float64(len(line))
			if len(line) < 4 {
				x = float64(i) * 175
			}
			plotted := k.curves[at].style
			c.line(plotted.series, 2.2, x, y, x+18, y)
			c.dot(plotted.series, plotted.hollow, x+9, y, 4)
			c.drawText(textFormat{role: ink, size: textSize}, x+24, y, plotted.label)
		}
		y += legendLine
	}
	top, bottom := y+20, c.height-axisSpace
	xs, ys := k.scales(c, top, bottom)
	c.drawText(textFormat{role: muted, size: smallSize}, 0, y+2, k.yTitle)
	c.yAxis(ys, xs.low, xs.high, k.yUnit)
	c.xAxis(k, xs, top, bottom)
	for _, plotted := range k.curves {
		c.drawCurve(plotted, xs, ys, k.steps)
	}
}

func (k *curvesChart) scales(c *canvas, top, bottom float64) (xs, ys scale) {
	lowestX, highestX, lowestY, highestY := math.Inf(1), 0.0, math.Inf(1), 0.0
	for _, plotted := range k.curves {
		lowestX, highestX = min(lowestX, slices.Min(plotted.x)), max(highestX, slices.Max(plotted.x))
		lowestY, highestY = min(lowestY, slices.Min(plotted.y)), max(highestY, slices.Max(plotted.y))
		if plotted.low != nil {
			lowestY, highestY = min(lowestY, slices.Min(plotted.low)), max(highestY, slices.Max(plotted.high))
		}
	}
	ys = linearScale(highestY, bottom, top)
	if k.logY {
		ys = logScale(lowestY, highestY, bottom, top)
	}
	var labels float64
	for _, v := range ys.ticks(5) {
		labels = max(labels, c.textWidth(textFormat{size: smallSize}, trimZeros(v, k.yUnit)))
	}
	const gap, room = 8, 22
	xs = logScale(lowestX, highestX, labels+gap, c.width-room)
	if k.ticks != nil { // the measured range with a small margin
		xs.from, xs.to = lowestX/1.25, highestX*1.25
	}
	return xs, ys
}

func (c *canvas) yAxis(s scale, left, right float64, unit string) {
	for _, v := range s.ticks(5) {
		y := s.position(v)
		c.line(grid, 1, left, y, right, y)
		c.drawText(textFormat{role: muted, size: smallSize, align: 1}, left-7, y, trimZeros(v, unit))
	}
}

func (c *canvas) xAxis(k *curvesChart, s scale, top, bottom float64) {
	if k.ticks == nil {
		c.axis(s, bottom, k.xUnit, [2]float64{top, bottom})
		return
	}
	l := textFormat{role: muted, size: smallSize, align: 0.5}
	for _, v := range k.ticks {
		c.line(grid, 1, s.position(v), top, s.position(v), bottom)
		label := thousands(int(v))
		half := c.textWidth(l, label) / 2
		c.drawText(l, min(s.position(v), c.width-half), bottom+14, label)
	}
}

func (c *canvas) drawCurve(plotted curve, xs, ys scale, steps bool) {
	const width, radius = 2.2, 4.5
	var points []float64
	for i := range plotted.x {
		x, y := xs.position(plotted.x[i]), ys.position(plotted.y[i])
		if steps && i > 0 {
			points = append(points, x, ys.position(plotted.y[i-1]))
		}
		points = append(points, x, y)
	}
	for i := range plotted.low {
		x := xs.position(plotted.x[i])
		c.line(plotted.style.series, 1.2, x, ys.position(plotted.low[i]), x, ys.position(plotted.high[i]))
	}
	c.line(plotted.style.series, width, points...)
	if steps {
		return
	}
	for i := range plotted.x {
		c.dot(plotted.style.series, plotted.style.hollow, xs.position(plotted.x[i]), ys.position(plotted.y[i]), radius)
	}
}

// cumulativeCurve returns the cumulative distribution of the samples.
func cumulativeCurve(m *result.Measurement) curve {
	sorted := slices.Sorted(slices.Values(m.Samples))
	c := curve{style: styleOf(m.System), x: []float64{sorted[0]}, y: []float64{0}}
	const maxPoints = 300 // more points are not visible
	for i := range sorted {
		if len(sorted) > maxPoints && i%(len(sorted)/maxPoints) != 0 && i != len(sorted)-1 {
			continue
		}
		c.x, c.y = append(c.x, sorted[i]), append(c.y, float64(i+1)/float64(len(sorted)))
	}
	return c
}

// servicesCurve returns the curve of the medians by number of Services.
func servicesCurve(measurements []*result.Measurement) curve {
	measurements = slices.SortedFunc(slices.Values(measurements), func(a, b *result.Measurement) int { return cmp.Compare(a.Scenario.Services, b.Scenario.Services) })
	c := curve{style: styleOf(measurements[0].System)}
	for _, m := range measurements {
		r := newRow(m)
		c.x = append(c.x, float64(m.Scenario.Services))
		c.y, c.low, c.high = append(c.y, r.median), append(c.low, r.low), append(c.high, r.high)
	}
	return c
}

// trimZeros formats a number without trailing zeros after the decimal point.
func trimZeros(v float64, unit string) string {
	number, rest, _ := strings.Cut(table.Number(v, unit), " ")
	if strings.Contains(number, ".") {
		number = strings.TrimRight(strings.TrimRight(number, "0"), ".")
	}
	return strings.TrimSpace(number + " " + rest)
}

// thousands formats an integer with commas as thousands separators.
func thousands(n int) string {
	const base = 1000
	if n < base {
		return table.Number(float64(n), "1")
	}
	rest := []byte{byte('0' + n/100%10), byte('0' + n/10%10), byte('0' + n%10)}
	return thousands(n/base) + "," + string(rest)
}
