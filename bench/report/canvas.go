package report

import (
	"bytes"
	"fmt"
	"html"
	"image/color"
	"math"
	"slices"

	"codeberg.org/go-fonts/liberation/liberationsansbold"
	"codeberg.org/go-fonts/liberation/liberationsansregular"
	stdfont "golang.org/x/image/font"
	"golang.org/x/image/font/opentype"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"
)

// typeface contains the fonts for drawing and measuring text.
type typeface struct{ handler text.Plain }

func newTypeface() (*typeface, error) {
	var faces font.Collection
	for _, f := range []struct {
		font font.Font
		ttf  []byte
	}{
		{font.Font{Typeface: "Liberation", Variant: "Sans"}, liberationsansregular.TTF},
		{font.Font{Typeface: "Liberation", Variant: "Sans", Weight: stdfont.WeightBold}, liberationsansbold.TTF},
	} {
		face, err := opentype.Parse(f.ttf)
		if err != nil {
			return nil, fmt.Errorf("parse font %s: %w", f.font.Name(), err)
		}
		faces = append(faces, font.Face{Font: f.font, Face: face})
	}
	return &typeface{text.Plain{Fonts: font.NewCache(faces)}}, nil
}

// canvas is the surface that charts draw on. Coordinates are pixels from the top left.
type canvas struct {
	target        draw.Canvas
	width, height float64
	inset         float64 // margin on all sides
	bottomInset   float64 // additional margin at the bottom
	colors        palette
	face          *typeface
	// texts, if not nil, collects text as SVG elements. Viewers have different fonts, so the
	// browser must lay out the text.
	texts *bytes.Buffer
}

// drawing is a chart whose height depends on its width.
type drawing interface {
	title() string
	height(width float64) float64
	drawOn(c *canvas)
}

// svg draws d with placeholder colors, see [replacePlaceholders].
func (f *typeface) svg(d drawing, width float64) ([]byte, error) {
	height := d.height(width)
	to := vgsvg.New(vg.Length(width), vg.Length(height))
	var b, texts bytes.Buffer
	d.drawOn(&canvas{target: draw.New(to), width: width, height: height, colors: placeholderColor, face: f, texts: &texts})
	if _, err := to.WriteTo(&b); err != nil {
		return nil, fmt.Errorf("draw %q: %w", d.title(), err)
	}
	end := bytes.LastIndex(b.Bytes(), []byte("</svg>"))
	return slices.Concat(b.Bytes()[:end], texts.Bytes(), []byte("</svg>\n")), nil
}

// png draws d in light colors at twice the resolution.
func (f *typeface) png(d drawing, width float64) ([]byte, error) {
	const dpi = 144
	height := d.height(width)
	to := vgimg.NewWith(vgimg.UseWH(vg.Length(width), vg.Length(height)), vgimg.UseDPI(dpi))
	d.drawOn(&canvas{target: draw.New(to), width: width, height: height, colors: lightColor, face: f})
	var b bytes.Buffer
	if _, err := (vgimg.PngCanvas{Canvas: to}).WriteTo(&b); err != nil {
		return nil, fmt.Errorf("draw %q: %w", d.title(), err)
	}
	return b.Bytes(), nil
}

func (c *canvas) point(x, y float64) vg.Point {
	return vg.Point{X: vg.Length(c.inset + x), Y: vg.Length(c.inset + c.bottomInset + c.height - y)}
}

// line draws a line through points, given as alternating x and y coordinates.
func (c *canvas) line(r role, width float64, xy ...float64) {
	points := make([]vg.Point, 0, len(xy)/2)
	for i := 0; i+1 < len(xy); i += 2 {
		points = append(points, c.point(xy[i], xy[i+1]))
	}
	c.target.StrokeLines(draw.LineStyle{Color: c.colors(r), Width: vg.Length(width)}, points)
}

// bar fills a rectangle with its left edge at x and its vertical center at y.
func (c *canvas) bar(r role, x, y, width, height float64) {
	top, bottom := y-height/2, y+height/2
	c.target.FillPolygon(c.colors(r), []vg.Point{c.point(x, top), c.point(x+width, top), c.point(x+width, bottom), c.point(x, bottom)})
}

// dot draws a filled or hollow marker.
func (c *canvas) dot(r role, hollow bool, x, y, radius float64) {
	c.target.DrawGlyph(draw.GlyphStyle{Color: c.colors(r), Radius: vg.Length(radius), Shape: draw.CircleGlyph{}}, c.point(x, y))
	if hollow {
		const part = 0.55
		c.target.DrawGlyph(draw.GlyphStyle{Color: c.colors(surface), Radius: vg.Length(radius * part), Shape: draw.CircleGlyph{}}, c.point(x, y))
	}
}

// textFormat is the format of text.
type textFormat struct {
	role  role
	size  float64
	bold  bool
	align float64 // 0: x is the left end, 1: x is the right end
}

func (c *canvas) textStyle(l textFormat) text.Style {
	f := font.Font{Typeface: "Liberation", Variant: "Sans", Size: font.Length(l.size)}
	if l.bold {
		f.Weight = stdfont.WeightBold
	}
	return text.Style{Color: c.colors(l.role), Font: f, XAlign: text.XAlignment(-l.align), YAlign: text.YCenter, Handler: c.face.handler}
}

// drawText draws text with its vertical center at y.
func (c *canvas) drawText(l textFormat, x, y float64, label string) {
	if c.texts == nil {
		c.target.FillText(c.textStyle(l), c.point(x, y), label)
		return
	}
	const baseline = 0.35 // fraction of the font size below the center
	anchor := map[float64]string{0: "start", 0.5: "middle", 1: "end"}[l.align]
	weight := 400
	if l.bold {
		weight = 700
	}
	rgb, _ := color.NRGBAModel.Convert(c.colors(l.role)).(color.NRGBA)
	fmt.Fprintf(c.texts, `<text x="%.1f" y="%.1f" text-anchor=%q style="fill:#%02X%02X%02X;font-size:%gpx;font-weight:%d">%s</text>`+"\n",
		x, y+baseline*l.size, anchor, rgb.R, rgb.G, rgb.B, l.size, weight, html.EscapeString(label))
}

// textWidth returns an upper bound of the width of text. It allows for viewers with wider fonts.
func (c *canvas) textWidth(l textFormat, label string) float64 {
	const wider = 1.2
	return wider * float64(c.textStyle(l).Width(label))
}

// scale maps numbers to positions on an axis.
type scale struct {
	from, to  float64 // numbers
	low, high float64 // positions
	log       bool
}

func (s scale) position(v float64) float64 {
	f, t := s.from, s.to
	if s.log {
		f, t, v = math.Log(f), math.Log(t), math.Log(math.Max(v, f))
	}
	if t == f {
		return s.low
	}
	return s.low + (v-f)/(t-f)*(s.high-s.low)
}

// logScale returns a logarithmic scale for positive numbers that starts and ends at round numbers.
func logScale(lowest, highest, low, high float64) scale {
	if lowest <= 0 || highest <= 0 {
		lowest, highest = 1, 10
	}
	s := scale{from: roundToStep(lowest, false), to: roundToStep(highest, true), low: low, high: high, log: true}
	if s.from == s.to {
		s.from, s.to = s.from/2, s.to*2
	}
	return s
}

// roundToStep returns the next number, up or down, that is 1, 2 or 5 times a power of ten.
func roundToStep(v float64, up bool) float64 {
	const tolerance = 1e-9
	power := math.Pow(10, math.Floor(math.Log10(v)+tolerance))
	best := power
	for _, f := range []float64{1, 2, 5, 10} {
		n := f * power
		if up && n >= v*(1-tolerance) {
			return n
		}
		if !up && n <= v*(1+tolerance) {
			best = n
		}
	}
	return best
}

// linearScale returns a linear scale that starts at zero.
func linearScale(highest, low, high float64) scale {
	if highest <= 0 {
		highest = 1
	}
	return scale{from: 0, to: highest, low: low, high: high}
}

// ticks returns at most limit round numbers on the scale.
func (s scale) ticks(limit int) []float64 {
	if !s.log {
		step := math.Pow(10, math.Floor(math.Log10(s.to/float64(limit))))
		for _, f := range []float64{1, 2, 5, 10} {
			if s.to/(step*f) <= float64(limit) {
				step *= f
				break
			}
		}
		var list []float64
		for v := 0.0; v <= s.to*1.0001; v += step {
			list = append(list, v)
		}
		return list
	}
	within := func(v float64) bool { return v >= s.from*0.999 && v <= s.to*1.001 }
	first, last := int(math.Floor(math.Log10(s.from)+1e-9)), int(math.Ceil(math.Log10(s.to)-1e-9))
	collect := func(steps ...float64) []float64 {
		var list []float64
		for e := first; e <= last; e++ {
			for _, f := range steps {
				if v := f * math.Pow(10, float64(e)); within(v) {
					list = append(list, v)
				}
			}
		}
		return list
	}
	if list := collect(1, 2, 5); len(list) <= limit {
		return list
	}
	list := collect(1)
	for skip := 2; len(list) > limit; skip++ {
		var kept []float64
		for i, v := range collect(1) {
			if i%skip == 0 {
				kept = append(kept, v)
			}
		}
		list = kept
	}
	return list
}
