#!/usr/bin/env bash
# An S3 store on one machine: Ceph's gateway and one storage daemon in memory.
#
#   ceph_s3.sh up [ADDRESS]   start it at http://ADDRESS:9000 (127.0.0.1); prints what to export
#   ceph_s3.sh down           stop it and delete all data
#
# Needs root and Debian's radosgw ceph-mon ceph-osd ceph-common uuid-runtime curl. State lives in
# $CEPH_LAB.
set -euo pipefail
D=${CEPH_LAB:?set it to a directory}
ADDRESS=${2:-127.0.0.1}
KEY=covergenre
SECRET=covergenre-secret

case ${1:-} in
up)
  rm -rf "$D"
  mkdir -p "$D"/{mon,osd,rgw,run,log}
  fsid=$(uuidgen)
  cat > "$D/ceph.conf" <<CONF
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:40001,v1:127.0.0.1:40002]
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = $D/keyring
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
run_dir = $D/run
log_file = $D/log/\$name.log
admin_socket = $D/run/\$name.\$pid.asok
pid_file = $D/run/\$name.pid
mon_data = $D/mon
osd_data = $D/osd
rgw_data = $D/rgw
osd_objectstore = memstore
memstore_device_bytes = 4294967296
mon_max_pg_per_osd = 1000
rgw_frontends = beast endpoint=$ADDRESS:9000 tcp_nodelay=1
rgw_crypt_require_ssl = false
CONF
  c="--conf $D/ceph.conf"
  {
    ceph-authtool --create-keyring "$D/keyring" --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool "$D/keyring" --gen-key -n client.admin \
      --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool "$D/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
    monmaptool --create --fsid "$fsid" --addv a '[v2:127.0.0.1:40001,v1:127.0.0.1:40002]' "$D/monmap"
    cp "$D/keyring" "$D/mon.keyring"
    ceph-mon $c --mkfs -i a --monmap "$D/monmap" --keyring "$D/mon.keyring"
    ceph-mon $c -i a
    osd_uuid=$(uuidgen)
    ceph $c osd new "$osd_uuid"
    ceph-osd $c -i 0 --mkfs --osd-uuid "$osd_uuid"
    ceph-osd $c -i 0
    radosgw $c -n client.admin
    for _ in $(seq 120); do
      curl -s -m 2 -o /dev/null "http://$ADDRESS:9000" && break
      sleep 0.5
    done
    radosgw-admin $c user create --uid=$KEY --display-name=$KEY --access-key=$KEY --secret-key=$SECRET
  } > "$D/log/up.log" 2>&1 || {
    tail -5 "$D/log/up.log" >&2
    exit 1
  }
  echo "export AWS_ENDPOINT_URL=http://$ADDRESS:9000 AWS_ACCESS_KEY_ID=$KEY" \
    "AWS_SECRET_ACCESS_KEY=$SECRET AWS_DEFAULT_REGION=us-east-1"
  ;;
down)
  # In memory only: there is nothing to flush.
  for pidfile in "$D"/run/*.pid; do
    [ -f "$pidfile" ] && kill -KILL "$(cat "$pidfile")" 2> /dev/null || true
  done
  rm -rf "$D"
  ;;
*)
  sed -n '2,9p' "$0"
  exit 2
  ;;
esac
