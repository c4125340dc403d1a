#!/usr/bin/env bash
# Runs every fuzz target of the module for some time: fuzz.sh [DURATION], default 10s. A
# failing input stays in testdata/fuzz of its package, where go test runs it again.
set -euo pipefail
cd "$(dirname "$0")/.."

# fuzz runs one target. Before Go 1.27, go test sometimes reports the end of the fuzzing time
# as a failure without a failing input (golang/go#75804).
fuzz() {
	local out status=0
	out=$(mktemp)
	go test -run='^$' -fuzz="^$1\$" -fuzztime="$2" -fuzzminimizetime=1s "./$3" </dev/null 2>&1 | tee "$out" || status=$?
	if [ $status -ne 0 ] && grep -qx '    context deadline exceeded' "$out" && ! grep -qiE 'failing input|panic|_test\.go:' "$out"; then
		echo "fuzz: $1 found no failure"
		status=0
	fi
	rm -f "$out"
	return $status
}

found=0
while IFS=: read -r file target; do
	found=1
	echo "fuzz: $target in $(dirname "$file")"
	# Without -fuzzminimizetime, minimizing one input may take a minute.
	fuzz "$target" "${1:-10s}" "$(dirname "$file")"
done < <(grep -roE --include='*_test.go' --exclude-dir='.?*' '^func Fuzz[A-Za-z0-9_]+' . | sed 's/func //; s|^\./||' | sort)
[ $found -eq 1 ] || {
	echo "fuzz: no fuzz targets found" >&2
	exit 1
}
