#!/usr/bin/env bash
# Two (or more) hosts on one Linux machine, for `ray up` over real ssh.
#
#   hosts.sh up [COUNT]      start COUNT hosts (2): 10.99.0.2, 10.99.0.3, ...; prints the path of the ssh key
#   hosts.sh down            stop them and delete the network
#   hosts.sh disconnect N    disconnect host N (last byte of its address) from the network
#   hosts.sh reconnect N     connect it again
#
# A host has its own name (cg2, cg3, ...), network, processes, /tmp, /dev/shm and home directory, and runs
# sshd. It shares the rest of the file system, and the directories below /tmp or the home directory that
# are listed in $KEEP, separated by colons (the virtual environment). If $PIN is set, each host uses one
# core.
# Needs root and Debian's iproute2, openssh-server, rsync. State lives in $LAB.
set -euo pipefail
: "${LAB:?set it to a directory that is not below /tmp or the home directory}"
NET=10.99.0
home=$HOME

start_host() {
  local n=$1 ns=cg$1 dir=$LAB/host$1
  ip netns add "$ns"
  ip link add "cgv$n" type veth peer name eth0 netns "$ns"
  ip link set "cgv$n" master cgbr0 up
  ip -n "$ns" addr add "$NET.$n/24" dev eth0
  ip -n "$ns" link set eth0 up
  ip -n "$ns" link set lo up
  ip -n "$ns" route add default via "$NET.1"
  mkdir -p "$dir/tmp" "$dir/home"
  chmod 1777 "$dir/tmp"
  : > "$dir/home/.bashrc"
  cat > "$dir/sshd.conf" <<CONF
Port 22
ListenAddress $NET.$n
HostKey $LAB/host_key
AuthorizedKeysFile $LAB/id.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
CONF
  { echo "127.0.0.1 localhost"; for ((m = 2; m < 12; m++)); do echo "$NET.$m cg$m"; done; } > "$dir/hosts"
  ${PIN:+taskset -c $((n - 2))} ip netns exec "$ns" unshare -m -p -u --fork --mount-proc bash -c "
    hostname cg$n
    mount --bind $dir/hosts /etc/hosts
    IFS=:
    for keep in \${KEEP:-}; do
      case \$keep in
        $home/*) to=$dir/home\${keep#$home} ;;
        /tmp/*) to=$dir\$keep ;;
        *) continue ;;
      esac
      mkdir -p \"\$to\" && mount --bind \"\$keep\" \"\$to\"
    done
    mount --rbind $dir/home $home
    mount --rbind $dir/tmp /tmp
    mount -t tmpfs tmpfs /dev/shm
    exec $(command -v sshd || echo /usr/sbin/sshd) -D -f $dir/sshd.conf -E $dir/sshd.log
  " < /dev/null > "$dir/out" 2>&1 &
  echo $! > "$dir/pid"
}

case ${1:-} in
up)
  mkdir -p "$LAB" /run/sshd
  [ -f "$LAB/id" ] || ssh-keygen -q -t ed25519 -N '' -f "$LAB/id"
  [ -f "$LAB/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$LAB/host_key"
  ip link add cgbr0 type bridge
  ip addr add "$NET.1/24" dev cgbr0
  ip link set cgbr0 up
  count=${2:-2}
  for ((n = 2; n < 2 + count; n++)); do start_host "$n"; done
  for ((n = 2; n < 2 + count; n++)); do
    for _ in $(seq 50); do
      ssh -q -i "$LAB/id" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o ConnectTimeout=1 "root@$NET.$n" true && break
      sleep 0.2
    done
  done
  echo "$LAB/id"
  ;;
down)
  for pidfile in "$LAB"/host*/pid; do
    [ -f "$pidfile" ] || continue
    # Killing the first process of the host's PID namespace kills all its processes.
    pkill -KILL -P "$(cat "$pidfile")" || true
    rm -f "$pidfile"
  done
  for ns in $(ip netns list | awk '/^cg[0-9]/ {print $1}'); do ip netns del "$ns"; done
  ip link del cgbr0 2> /dev/null || true
  ;;
disconnect) ip link set "cgv$2" down ;;
reconnect) ip link set "cgv$2" up ;;
*)
  sed -n '2,12p' "$0"
  exit 2
  ;;
esac
