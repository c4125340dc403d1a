package report

import (
	"bytes"
	"fmt"
	"image/color"
	"regexp"
	"strings"

	"fairlead.io/fairlead/bench/result"
)

// role is what a colour stands for.
type role uint8

const (
	ink     role = iota // text
	muted               // what explains
	grid                // lines behind
	surface             // what is behind all
	seriesNFT
	seriesIPVS
	seriesKubeProxyNFTables
	seriesKubeProxyIPVS
	seriesKubeProxyIPTables
	seriesOther
	roles
)

// shade is a colour by name, in light and in dark.
type shade struct {
	name        string
	light, dark string // as CSS writes it
}

// shades are those of the roles, in their order. Those of series are told apart
// with any of the usual kinds of colour blindness (after Okabe and Ito).
func shades() [roles]shade {
	return [roles]shade{
		ink:                     {"ink", "#1c2430", "#e8ecf2"},
		muted:                   {"muted", "#5b6675", "#9aa6b6"},
		grid:                    {"grid", "#dde2e9", "#333d4b"},
		surface:                 {"surface", "#ffffff", "#151b24"},
		seriesNFT:               {"nft", "#0067a8", "#5cb8f2"},
		seriesIPVS:              {"ipvs", "#00855f", "#3ccf9f"},
		seriesKubeProxyNFTables: {"kube-proxy-nftables", "#d04f00", "#ff9354"},
		seriesKubeProxyIPVS:     {"kube-proxy-ipvs", "#b3508a", "#eb9fcb"},
		seriesKubeProxyIPTables: {"kube-proxy-iptables", "#a87900", "#f0bf4a"},
		seriesOther:             {"other", "#66707d", "#a9b3c0"},
	}
}

// cssVariables declares the colours as variables on a selector.
func cssVariables(selector string, dark bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s{", selector)
	for _, s := range shades() {
		value := s.light
		if dark {
			value = s.dark
		}
		fmt.Fprintf(&b, "--%s:%s;", s.name, value)
	}
	return b.String() + "}"
}

// seriesStyle is how a system is shown.
type seriesStyle struct {
	label  string
	series role
	hollow bool // its marker, for print without colours
}

func styleOf(system string) seriesStyle {
	switch system {
	case "nft":
		return seriesStyle{"Fairlead nft", seriesNFT, false}
	case "ipvs":
		return seriesStyle{"Fairlead ipvs", seriesIPVS, false}
	case "kube-proxy-nftables":
		return seriesStyle{"kube-proxy nftables", seriesKubeProxyNFTables, true}
	case "kube-proxy-ipvs":
		return seriesStyle{"kube-proxy ipvs", seriesKubeProxyIPVS, true}
	case "kube-proxy-iptables":
		return seriesStyle{"kube-proxy iptables", seriesKubeProxyIPTables, true}
	case result.Direct:
		return seriesStyle{"no proxy", seriesOther, false}
	default:
		return seriesStyle{system, seriesOther, true}
	}
}

// palette gives the colours to draw with.
type palette func(role) color.Color

// placeholderColor gives each role a colour that names it, for [replacePlaceholders] to find.
func placeholderColor(r role) color.Color { return color.NRGBA{R: 1, G: 2, B: uint8(r), A: 255} }

// lightColor gives the colours of light.
func lightColor(r role) color.Color {
	var c color.NRGBA
	_, _ = fmt.Sscanf(shades()[r].light, "#%02x%02x%02x", &c.R, &c.G, &c.B)
	c.A = 255
	return c
}

// replacePlaceholders replaces the colours of [placeholderColor] by variables.
func replacePlaceholders(svg []byte) []byte {
	for r, s := range shades() {
		svg = bytes.ReplaceAll(svg, fmt.Appendf(nil, "#0102%02X", r), []byte("var(--"+s.name+")"))
	}
	return svg
}

// sizePattern matches the size of an SVG, which is left to where it is shown.
func sizePattern() *regexp.Regexp {
	return regexp.MustCompile(`width="([0-9.]+)pt" height="([0-9.]+)pt"`)
}

// fonts are those of files; on a page they are its own.
const fonts = "Arimo,'Liberation Sans',Helvetica,Arial,sans-serif"

// inline makes what vg has written part of a page.
func inline(svg []byte, class, title string) []byte {
	start := bytes.Index(svg, []byte("<svg"))
	svg = replacePlaceholders(svg[max(0, start):])
	svg = sizePattern().ReplaceAll(svg, fmt.Appendf(nil, `class=%q role="img" aria-label=%q`, class, title))
	return svg
}

// standalone makes what vg has written a file of its own, in light or dark as whoever
// looks at it prefers.
func standalone(svg []byte, title string) []byte {
	style := "<style>svg{font-family:" + fonts + "}" + cssVariables("svg", false) + "@media (prefers-color-scheme:dark){" + cssVariables("svg", true) + "}</style>"
	width := sizePattern().FindSubmatch(svg)
	svg = inline(svg, "chart", title)
	if len(width) > 0 {
		svg = bytes.Replace(svg, []byte("<svg "), fmt.Appendf(nil, `<svg width="%s" height="%s" `, width[1], width[2]), 1)
	}
	at := bytes.IndexByte(svg, '>') + 1
	return bytes.Join([][]byte{svg[:at], []byte(style), svg[at:]}, nil)
}
