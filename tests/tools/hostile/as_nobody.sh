#!/bin/sh
# Run a command as a user without rights; for root only.
#
#   as_nobody.sh PREFIX COMMAND…
#
# PREFIX is Python's own folder. Where it lies below a folder that only root may enter, it is shown
# at the same path in a mount namespace of this command's own; the machine's mounts stay as they are.
set -eu
prefix=$1
shift
exec unshare --mount --propagation private sh -euc '
    prefix=$1; shift
    scratch=$(mktemp -d /tmp/swarm-nobody-XXXXXX)
    chmod 777 "$scratch"
    top=/$(echo "$prefix" | cut -d/ -f2)
    if ! setpriv --reuid 65534 --regid 65534 --clear-groups test -x "$prefix/bin/python3"; then
        mkdir "$scratch/prefix"
        mount --bind "$prefix" "$scratch/prefix"
        mount -t tmpfs -o mode=755,size=1m tmpfs "$top"
        mkdir -p "$prefix"
        mount --bind "$scratch/prefix" "$prefix"
    fi
    mkdir -m 777 "$scratch/home"
    status=0
    setpriv --reuid 65534 --regid 65534 --clear-groups env HOME="$scratch/home" TMPDIR="$scratch/home" "$@" || status=$?
    umount "$scratch/prefix" 2>/dev/null || true
    rm -rf "$scratch/home"; rmdir "$scratch/prefix" "$scratch" 2>/dev/null || true
    exit $status
' sh "$prefix" "$@"
