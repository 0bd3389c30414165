#!/bin/sh
# Upgrades a running Tollgate without refusing a connection or cutting a stream: puts a new program in
# place, checks that it takes the configuration, and tells the running process to hand over to it.
# usage: upgrade.sh NEW_PROGRAM   (as root)
set -eu

new=${1:?"usage: upgrade.sh NEW_PROGRAM"}
program=${TOLLGATE_PROGRAM:-/usr/local/bin/tollgate}
config=${TOLLGATE_CONFIG:-/etc/tollgate/tollgate.yaml}
unit=${TOLLGATE_UNIT:-tollgate}

"$new" check -c "$config"
cp -p "$program" "$program.before"
# Beside it first, then renamed: there is a whole program at every moment.
install -m 755 "$new" "$program.new"
mv -f "$program.new" "$program"

before=$(systemctl show -p MainPID --value "$unit")
systemctl kill --kill-whom=main -s USR2 "$unit"
for _ in $(seq 60); do
  sleep 1
  now=$(systemctl show -p MainPID --value "$unit")
  if [ "$now" != "$before" ] && [ "$now" != 0 ]; then
    echo "process $now serves; process $before ends when its exchanges do"
    exit 0
  fi
done
mv -f "$program.before" "$program"
echo "process $before still serves, with the old program; journalctl -u $unit says why" >&2
exit 1
