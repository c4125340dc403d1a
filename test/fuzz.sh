#!/usr/bin/env bash
# Runs every fuzz target of the module for a while: fuzz.sh [duration, 10s].
# A failing input stays in the package's testdata/fuzz, where go test repeats it.
set -euo pipefail
cd "$(dirname "$0")/.."

found=0
while IFS=: read -r file target; do
	found=1
	echo "fuzz: $target in $(dirname "$file")"
	# Minimising a failing or new input may otherwise take a minute by itself.
	go test -run='^$' -fuzz="^$target\$" -fuzztime="${1:-10s}" -fuzzminimizetime=1s "./$(dirname "$file")" </dev/null
done < <(grep -roE --include='*_test.go' --exclude-dir='.?*' '^func Fuzz[A-Za-z0-9_]+' . | sed 's/func //; s|^\./||' | sort)
[ $found -eq 1 ] || {
	echo "fuzz: no target found" >&2
	exit 1
}
