package report

import (
	"bytes"
	"fmt"
	"image/color"
	"regexp"
	"strings"

	"fairlead.io/fairlead/bench/result"
)

// role is the purpose of a color.
type role uint8

const (
	ink     role = iota // text
	muted               // secondary text
	grid                // grid lines
	surface             // background
	seriesNFT
	seriesNFTFlowOffload
	seriesIPVS
	seriesKubeProxyNFTables
	seriesKubeProxyIPVS
	seriesKubeProxyIPTables
	seriesOther
	roles
)

// shade is the name of a color and its values in light and dark color schemes.
type shade struct {
	name        string
	light, dark string // CSS notation
}

// shades returns the colors of the roles. Series are distinguishable with the common forms of
// color blindness (after Okabe and Ito).
func shades() [roles]shade {
	return [roles]shade{
		ink:                     {"ink", "#1c2430", "#e8ecf2"},
		muted:                   {"muted", "#5b6675", "#9aa6b6"},
		grid:                    {"grid", "#dde2e9", "#333d4b"},
		surface:                 {"surface", "#ffffff", "#151b24"},
		seriesNFT:               {"nft", "#0067a8", "#5cb8f2"},
		seriesNFTFlowOffload:    {"nft-flow-offload", "#5f45b5", "#b9a8f7"},
		seriesIPVS:              {"ipvs", "#00855f", "#3ccf9f"},
		seriesKubeProxyNFTables: {"kube-proxy-nftables", "#d04f00", "#ff9354"},
		seriesKubeProxyIPVS:     {"kube-proxy-ipvs", "#b3508a", "#eb9fcb"},
		seriesKubeProxyIPTables: {"kube-proxy-iptables", "#a87900", "#f0bf4a"},
		seriesOther:             {"other", "#66707d", "#a9b3c0"},
	}
}

// cssVariables returns a CSS rule that defines the colors as variables on a selector.
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

// seriesStyle is the presentation of a system.
type seriesStyle struct {
	label  string
	series role
	hollow bool // hollow marker, for print without colors
}

func styleOf(system string) seriesStyle {
	switch system {
	case "nft":
		return seriesStyle{"Fairlead nft", seriesNFT, false}
	case "nft-flow-offload":
		return seriesStyle{"Fairlead nft, offloaded", seriesNFTFlowOffload, false}
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

// palette returns the color of a role.
type palette func(role) color.Color

// placeholderColor returns a distinct color for each role, which replacePlaceholders finds in the
// SVG.
func placeholderColor(r role) color.Color { return color.NRGBA{R: 1, G: 2, B: uint8(r), A: 255} }

// lightColor returns the color of a role in the light color scheme.
func lightColor(r role) color.Color {
	var c color.NRGBA
	_, _ = fmt.Sscanf(shades()[r].light, "#%02x%02x%02x", &c.R, &c.G, &c.B)
	c.A = 255
	return c
}

// replacePlaceholders replaces placeholder colors by CSS variables.
func replacePlaceholders(svg []byte) []byte {
	for r, s := range shades() {
		svg = bytes.ReplaceAll(svg, fmt.Appendf(nil, "#0102%02X", r), []byte("var(--"+s.name+")"))
	}
	return svg
}

// sizePattern matches the size attributes of an SVG, which pages set with CSS instead.
func sizePattern() *regexp.Regexp {
	return regexp.MustCompile(`width="([0-9.]+)pt" height="([0-9.]+)pt"`)
}

// fonts are the fonts of SVG files. On the page, text inherits the fonts of the page.
const fonts = "Arimo,'Liberation Sans',Helvetica,Arial,sans-serif"

// inline turns the output of vg into an element of a page.
func inline(svg []byte, class, title string) []byte {
	start := bytes.Index(svg, []byte("<svg"))
	svg = replacePlaceholders(svg[max(0, start):])
	svg = sizePattern().ReplaceAll(svg, fmt.Appendf(nil, `class=%q role="img" aria-label=%q`, class, title))
	return svg
}

// standalone turns the output of vg into a file that follows the viewer's color scheme, light or
// dark.
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
