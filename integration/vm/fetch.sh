#!/usr/bin/env bash
# fetch.sh NAME DRAFT FINAL: unpacks a kernel for guests into DRAFT, which will be renamed FINAL. Debian's packages, checked by
# apt against Debian's keys; nothing is installed, and apt's own lists are left as they are.
#   uml-newer  User-Mode Linux 6.12 of Debian 13, with the libc of Debian 13
#   qemu       the newest 6.12 for virtual machines that this machine's Debian has
set -euo pipefail
name=$1 draft=$2 final=$3
work=$draft/apt
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"

mirror() { # the first Debian mirror that this machine uses
  awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) { print $i; exit } }' \
    /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null || true
}

download() { # PACKAGE: leaves the path of its file in $deb
  (cd "$work" && apt-get -qq -o APT::Sandbox::User=root "${options[@]}" download "$1")
  deb=$(echo "$work/$1"_*.deb)
  echo "fetched the Debian package $(basename "$deb")"
}

case $name in
uml-newer)
  debian=$(mirror | head -n 1)
  [ -n "$debian" ] || { echo "no Debian mirror in /etc/apt" >&2; exit 1; }
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $debian trixie main" >"$work/sources.list"
  options=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache")
  apt-get -qq -o APT::Sandbox::User=root "${options[@]}" update
  download user-mode-linux
  dpkg-deb -x "$deb" "$draft"
  download libc6
  dpkg-deb -x "$deb" "$draft/libc"
  # The program reads how its own address space is laid out: started through ld.so it does not find its memory.
  libc=$(dirname "$(find "$draft/libc" -name 'ld-linux-x86-64.so.2' -path '*/x86_64-linux-gnu/*')")
  libc=$final${libc#"$draft"}
  patchelf --set-interpreter "$libc/ld-linux-x86-64.so.2" --set-rpath "$libc" "$draft/usr/bin/linux.uml"
  ;;
qemu)
  options=()
  package=$(apt-cache depends linux-image-6.12-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
  download "$package"
  dpkg-deb -x "$deb" "$draft"
  depmod -b "$draft" "$(basename "$draft"/lib/modules/*)"
  ;;
*)
  echo "no kernel $name" >&2
  exit 1
  ;;
esac
rm -rf "$work"
