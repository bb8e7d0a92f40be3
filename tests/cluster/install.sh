#!/usr/bin/env bash
# Installs Debian's Slurm and munge, which tests/cluster start on their own, and ip, for hosts on one machine.
# Needs root and Debian or Ubuntu.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
if command -v slurmctld && command -v slurmd && command -v munged && command -v ip; then exit; fi >/dev/null
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends slurm-wlm munge iproute2
