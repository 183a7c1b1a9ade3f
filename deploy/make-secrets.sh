#!/bin/sh
# sh deploy/make-secrets.sh FOLDER: secrets for docker compose, random; those that are there stay as they are.
# The folder lets nobody in but its owner. The files do not: the users of containers, who are others, read them there.
set -eu
folder=$1
mkdir -p "$folder"
chmod 700 "$folder"

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { # FILE, content on stdin
    [ -e "$folder/$1" ] && { cat >/dev/null; return; }
    cat >"$folder/$1"
    chmod 444 "$folder/$1"
}

random | keep redis_password
echo "redis://:$(cat "$folder/redis_password")@redis:6379/0" | keep redis_url
echo "first:$(random)" | keep snapshot_keys
