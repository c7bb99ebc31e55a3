#!/usr/bin/env bash
# What the monitor module adds to the end of a connection, as ratios: benchmarks/kmod_close.sh [ROUNDS]
#
# Boots the stock kernel (scripts/vm), and there measures in turn: module not loaded; loaded, sockets
# not registered; registered. What else the machine does only ever adds: the least of all rounds counts.
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
scripts/vm bash "$work/rounds" "$work" "${1:-15}" | awk '
	$3 == "close" && (!($1 in ns) || $4 < ns[$1]) { ns[$1] = $4 }
	END {
		if (!ns["in-use"]) exit 1
		base = ns["absent"]
		printf "not loaded                %8.0f ns a connection, both ends\n", base
		printf "loaded, not registered    %8.0f ns, ratio %.3f\n", ns["loaded"], ns["loaded"] / base
		printf "registered, event read    %8.0f ns, ratio %.3f\n", ns["in-use"], ns["in-use"] / base
	}'
