#!/usr/bin/env bash
# Keys of a federation. A private key stays where it is made; ca.pem goes to every site, node.pub to the server.
# Usage: launch/flower/certificates.sh server FOLDER NAME...   the server's certificate, for its names or addresses
#        launch/flower/certificates.sh node FOLDER             a site's key
set -euo pipefail
usage() { sed -n '3,4s/^# //p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
kind="$1" folder="$2"
shift 2
umask 077
mkdir -p "$folder"
absent() { [ ! -e "$folder/$1" ] || { echo "error: $folder/$1 exists; nothing was changed." >&2; exit 1; }; }
case "$kind" in
  server)
    [ $# -ge 1 ] || usage
    absent ca.key
    absent server.key
    names="DNS:localhost,IP:127.0.0.1"  # Flower's own processes on the server use these
    for name in "$@"; do
      case "$name" in localhost | 127.0.0.1) continue ;; esac
      if [[ "$name" =~ ^[0-9.]+$ || "$name" == *:* ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
    done
    curve=(-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -sha384)
    openssl req -x509 "${curve[@]}" -days 3650 -subj "/CN=fedsafe federation" -keyout "$folder/ca.key" \
      -out "$folder/ca.pem" -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign 2>/dev/null
    openssl req "${curve[@]}" -subj "/CN=$1" -keyout "$folder/server.key" -out "$folder/server.csr" 2>/dev/null
    openssl x509 -req -sha384 -days 825 -in "$folder/server.csr" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" \
      -CAcreateserial -out "$folder/server.pem" -extfile <(printf '%s\n' "subjectAltName=$names" \
      basicConstraints=critical,CA:FALSE extendedKeyUsage=serverAuth) 2>/dev/null
    rm -f "$folder/server.csr" "$folder/ca.srl"
    echo "$folder: ca.pem (for the sites), server.pem, server.key; keep ca.key offline"
    ;;
  node)
    [ $# -eq 0 ] || usage
    absent node
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "fedsafe site" -f "$folder/node"
    echo "$folder: node (stays here), node.pub (for the server)"
    ;;
  *) usage ;;
esac
