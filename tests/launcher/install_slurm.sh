#!/usr/bin/env bash
# Installs what the tests marked `slurm` need: Debian's or Ubuntu's Slurm, munge and iproute2 (a few MB, as root, no daemon is left running).
# If it cannot, it says why and exits 0; those tests are then skipped with the reason.
set -euo pipefail
if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then
  echo "Slurm is installed: $(slurmctld -V)"
  exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "Slurm is not installed: this needs apt-get and root. The tests marked slurm will be skipped."
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# no service may start by itself: the tests bring up their own daemons
printf '#!/bin/sh\nexit 101\n' >/tmp/policy-rc.d.$$ && chmod +x /tmp/policy-rc.d.$$
added=""
if [ ! -e /usr/sbin/policy-rc.d ]; then cp /tmp/policy-rc.d.$$ /usr/sbin/policy-rc.d && added=yes; fi
rm -f /tmp/policy-rc.d.$$
if apt-get update -q >/dev/null && apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2 >/dev/null; then
  echo "installed: $(slurmctld -V)"
else
  echo "Slurm could not be installed (no network?). The tests marked slurm will be skipped."
fi
if [ -n "$added" ]; then rm -f /usr/sbin/policy-rc.d; fi
