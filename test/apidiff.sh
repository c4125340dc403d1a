#!/usr/bin/env bash
# apidiff.sh BASE compares the exported API of the package dataplane, which backends outside
# this repository implement, with commit BASE. It fails on an incompatible change, unless the
# section Unreleased of CHANGELOG.md announces one with a line that begins with
# "- **Breaking** dataplane:".
#
# Needs git and Go. Does not change the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${1:?apidiff.sh: name the commit to compare with: make apidiff BASE=COMMIT}
work=$(mktemp -d)
trap 'git worktree remove --force "$work/base" 2>/dev/null || true; rm -rf "$work"' EXIT

go build -modfile=internal/tools/go.mod -o "$work/apidiff" golang.org/x/exp/cmd/apidiff
git worktree add --quiet --detach "$work/base" "$base"
(cd "$work/base" && "$work/apidiff" -w "$work/exported" ./dataplane)
changes=$("$work/apidiff" -incompatible "$work/exported" ./dataplane)
if [ -z "$changes" ]; then
	echo "apidiff: no incompatible changes of dataplane since $base"
	exit 0
fi
printf 'apidiff: incompatible changes of dataplane since %s:\n%s\n' "$base" "$changes"
if sed -n '/^## \[*Unreleased/,/^## [^U[]/p' CHANGELOG.md | grep -q '^- \*\*Breaking\*\* dataplane:'; then
	echo "apidiff: CHANGELOG.md announces them"
	exit 0
fi
cat >&2 <<'END'
apidiff: keep the API compatible, or add a line to the section Unreleased of CHANGELOG.md:
- **Breaking** dataplane: describe the change and how to adapt a backend
END
exit 1
