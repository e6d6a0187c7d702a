#!/usr/bin/env bash
# Installs the Debian packages that are missing, and says which. Arguments are COMMAND=PACKAGE or /FILE=PACKAGE pairs: a
# package is missing when its command or file is. Go itself is checked, not installed: Debian 12 does not package Go 1.26.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin:/usr/local/go/bin"

want=1.26
if ! command -v go >/dev/null; then
  echo "Go is not installed: Stillpoint needs Go $want or newer, see https://go.dev/dl/" >&2
  exit 1
fi
have=$(go env GOVERSION)
if [ "$(printf '%s\n' "go$want" "$have" | sort -V | head -n 1)" != "go$want" ]; then
  echo "$have is too old: Stillpoint needs Go $want or newer, see https://go.dev/dl/" >&2
  exit 1
fi

missing=()
for pair in "$@"; do
  what=${pair%%=*}
  if [ "${what#/}" = "$what" ]; then
    command -v "$what" >/dev/null || missing+=("${pair#*=}")
  else
    [ -e "$what" ] || missing+=("${pair#*=}")
  fi
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
  echo "These Debian packages are missing: ${missing[*]}. Install them, or run this as root." >&2
  exit 1
fi
echo "installing Debian packages: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get -o DPkg::Lock::Timeout=240 update -qq &&
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=240 install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi
