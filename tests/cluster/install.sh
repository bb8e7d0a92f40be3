#!/usr/bin/env bash
# Installs Debian's Slurm and munge, for tests/cluster, which start them on their own. Needs root and Debian or Ubuntu.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
if command -v slurmctld && command -v slurmd && command -v munged; then exit; fi >/dev/null
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends slurm-wlm munge
