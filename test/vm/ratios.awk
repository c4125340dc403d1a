# Copies the output of `go test -bench` and appends, for each benchmark that has runs with
# backend=nft and backend=ipvs, the means of both and their ratio. Exits with an error if the
# tests failed.
{ print; fflush() }
/^FAIL/ { failed = 1 }
$1 ~ /^Benchmark.*\/backend=(nft|ipvs)(\/|$)/ && NF >= 4 && $2 ~ /^[0-9]+$/ {
	backend = $1 ~ /\/backend=ipvs(\/|$)/ ? "ipvs" : "nft"
	name = $1
	sub(/^Benchmark/, "", name)
	sub(/\/backend=[a-z]+/, "", name)
	for (i = 3; i < NF; i += 2) {
		key = sprintf("%-55s %s", name, $(i + 1))
		if (!((key) in seen)) {
			seen[key] = 1
			keys[++n] = key
		}
		sum[backend, key] += $i
		runs[backend, key]++
	}
}
END {
	for (i = 1; i <= n; i++) {
		key = keys[i]
		if (!runs["nft", key] || !runs["ipvs", key])
			continue
		nft = sum["nft", key] / runs["nft", key]
		ipvs = sum["ipvs", key] / runs["ipvs", key]
		if (!shown++)
			printf "\n%-75s %12s %12s  %s\n", "mean of each, and ipvs/nft", "nft", "ipvs", "ratio"
		printf "%-75s %12.6g %12.6g  %s\n", key, nft, ipvs, nft ? sprintf("%.2f", ipvs / nft) : "-"
	}
	exit failed
}
