#!/usr/bin/env bash
# Installs, then trains a small flow on drawn shapes and measures it: `bash launch/demo.sh`.
# No accelerator and no data are needed. Run again, it does only what is not done yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# The pictures and the run lie in one folder, so that removing it starts afresh.
folder=runs/demo
run=$folder/tarflow
train_data=$folder/data/train
test_data=$folder/data/test
times=

part() { # NAME COMMAND ...
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s ==\n' "$name"
  printf '$ %s\n' "${*/#"$venv_python"/python}"
  "$@" < /dev/null || die "$name failed (see above). The same command goes on from there;" \
    "'rm -r $folder' starts afresh"
  times=$times$(printf '\n  %-26s %5d s' "$name" $((SECONDS - began)))
}

[ $# -eq 0 ] || die "launch/demo.sh takes no arguments; got $*"
# shellcheck disable=SC2119
prepare_environment
[ "$install_seconds" = 0 ] || printf 'installed in %d s\n' "$install_seconds"
work_began=$SECONDS

import=(-m starflow2_jax.prepare import --format shapes --pixels 16 --tags single_object --label pair)
part "training data" "$venv_python" "${import[@]}" --n 10000 --seed 0 --out $train_data
part "test data" "$venv_python" "${import[@]}" --n 1000 --seed 1 --out $test_data
part "training" "$venv_python" -m starflow2_jax.train --config experiments/tarflow_pixels.py:tiny \
  --config.data.path=$train_data --config.eval_data.path=$test_data --workdir $run
# Training that was told to stop saves, says so and ends well.
step=$("$venv_python" - $run << 'END'
import sys
from starflow2_jax.training import log, step_folders

step, steps = step_folders.latest(sys.argv[1]), log.read_config(sys.argv[1])["train"]["steps"]
print("%08d" % step if step == steps else "unfinished")
END
)
[ "$step" != unfinished ] || die "training was stopped before its end; the same command goes on"
if compgen -G "$run/evaluation/likelihood_${step}_*.json" > /dev/null; then
  printf '\nthe likelihood is measured already: %s\n' "$run/evaluation"
else
  part "likelihood of test data" "$venv_python" -m starflow2_jax.evaluate likelihood \
    --model $run --data $test_data --fit $train_data
fi
part "report" "$venv_python" -m starflow2_jax.evaluate report --workdir $run

printf '\nTimes\n  %-26s %5d s%s\n  %-26s %5d s\n' \
  "install" "$install_seconds" "$times" "all but the install" $((SECONDS - work_began))
printf '\nLook at %s (open it in a browser)\n' "$PWD/$run/report.html"
