#!/bin/sh
# Creates the system user that the unit runs as, and lets it read the configuration.
set -eu
if ! getent passwd tollgate >/dev/null; then
	useradd --system --user-group --no-create-home --home-dir / --shell /usr/sbin/nologin tollgate
fi
if [ -d /etc/tollgate ]; then
	chgrp -R tollgate /etc/tollgate
fi
