#!/bin/sh
# Install SLURM for the slow tests of the SLURM target (Debian and Ubuntu; as root, seconds).
# No service is started: tests/slurm.py starts daemons of its own, on ports of its own.
set -e
apt-get update
apt-get install --yes --no-install-recommends slurm-wlm munge
