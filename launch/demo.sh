#!/usr/bin/env bash
# Installs, then trains the three stages of a small STARFlow2 on drawn shapes, from the VLM and the
# latent codec that come with the package, and measures it: `bash launch/demo.sh`.
# No accelerator and no data are needed. Run again, it does only what is not done yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# Data, runs and measurements lie in one folder, so that removing it starts afresh. The experiments
# name their folders from there.
root=$PWD
folder=runs/demo
times=

part() { # NAME COMMAND ...
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s ==\n' "$name"
  printf '$ %s\n' "${*/#"$python"/python}"
  "$@" < /dev/null || die "$name failed (see above). The same command goes on from there;" \
    "'rm -r $folder' starts afresh"
  times=$times$(printf '\n  %-26s %5d s' "$name" $((SECONDS - began)))
}

# Training that was told to stop saves, says so and ends well.
finished() { # WORKDIR
  "$python" - "$1" << 'END' || die "training was stopped before its end; the same command goes on"
import json, pathlib, sys

workdir = pathlib.Path(sys.argv[1])
steps = json.loads((workdir / "config.json").read_text())["train"]["steps"]
sys.exit(not (workdir / "checkpoints" / str(steps)).is_dir())
END
}

stage() { # NAME EXPERIMENT WORKDIR
  part "$1" "$python" -m starflow2_jax.train --config "$root/experiments/$2.py:tiny" --workdir "$3"
  finished "$3"
}

[ $# -eq 0 ] || die "launch/demo.sh takes no arguments; got $*"
# shellcheck disable=SC2119
prepare_environment
case $venv_python in
  /*) python=$venv_python ;;
  *) python=$root/$venv_python ;;
esac
[ "$install_seconds" = 0 ] || printf 'installed in %d s\n' "$install_seconds"
work_began=$SECONDS

mkdir -p $folder
cd $folder
printf '\nin %s:\n' "$PWD"
PYTHON=$python part "data" bash "$root/launch/data_tiny.sh" 4
stage "stage 1, text to image" stage1_t2i runs/stage1
stage "stage 2, image to text" stage2_i2t runs/stage2
stage "stage 3, both" stage3_joint runs/stage3
if [ -e evaluation ]; then
  printf '\nit is measured already: %s\n' "$PWD/evaluation"
else
  part "evaluation" "$python" -m starflow2_jax.evaluate all --model runs/stage3 --out evaluation --n 200
fi
part "report" "$python" -m starflow2_jax.evaluate report --workdir runs/stage3

printf '\nTimes\n  %-26s %5d s%s\n  %-26s %5d s\n' \
  "install" "$install_seconds" "$times" "all but the install" $((SECONDS - work_began))
printf '\nLook at %s and %s (open them in a browser)\n' \
  "$PWD/runs/stage3/report.html" "$PWD/evaluation"
