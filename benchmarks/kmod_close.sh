#!/usr/bin/env bash
# What the monitor module adds to the end of a connection, as ratios: benchmarks/kmod_close.sh [ROUNDS]
#
# Boots the stock kernel (scripts/vm), and there measures in turn: module not loaded; loaded, sockets
# not registered; registered. So whatever else the machine does hits all three alike.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d "$PWD/build-kmod-close-XXXXXX") # seen by the guest, unlike /tmp
trap 'rm -rf "$work"' EXIT
gcc -O2 -Wall -Ikmod -o "$work/kmod_close" benchmarks/kmod_close.c
cat >"$work/rounds" <<'GUEST'
for round in $(seq "$2"); do
	echo "absent $("$1/kmod_close" plain)"
	insmod "$PRISM_VM_MODULE"
	echo "loaded $("$1/kmod_close" plain)"
	echo "in-use $("$1/kmod_close" registered)"
	rmmod prism_monitor
done
GUEST
scripts/vm bash "$work/rounds" "$work" "${1:-5}" | awk '
	function median(mode, n, i, j, t) {
		n = count[mode]
		for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++)
			if (ns[mode, j] < ns[mode, i]) { t = ns[mode, i]; ns[mode, i] = ns[mode, j]; ns[mode, j] = t }
		return ns[mode, int((n + 1) / 2)]
	}
	$3 == "close" { ns[$1, ++count[$1]] = $4 }
	END {
		if (!count["in-use"]) exit 1
		base = median("absent")
		printf "not loaded                %8.0f ns a connection, both ends\n", base
		printf "loaded, not registered    %8.0f ns, ratio %.3f\n", median("loaded"), median("loaded") / base
		printf "registered, event read    %8.0f ns, ratio %.3f\n", median("in-use"), median("in-use") / base
	}'
