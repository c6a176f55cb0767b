#!/usr/bin/env bash
# Kills commands, damages their files and fuzzes their readers at random, for some minutes.
#
#   bash launch/soak.sh MINUTES [SEED]        a table at the end; exit status 1 after any failure
#   bash launch/soak.sh 0 SEED 'TRIAL'        one trial again, as a failure prints it
#
# The same seed gives the same trials. tests/soak/ has the code; a short run is in the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

[[ ${1:-} =~ ^[0-9.]+$ ]] || die "usage: bash launch/soak.sh MINUTES [SEED] [TRIAL]"
prepare_environment test
export PYTHONPATH=$PWD:$PWD/tests
exec "$venv_python" -m soak "$@"
