#!/usr/bin/env bash
# Installs the package, trains the three stages of a small STARFlow2 on drawn shapes, and evaluates
# it: `bash launch/demo.sh`. The VLM and the latent codec come with the package.
# It needs no accelerator and no data. A second run does only the parts that are not done yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# One folder contains the data, the runs and the results; removing it starts over. The experiments
# name their folders relative to it.
root=$PWD
folder=runs/demo
times=

part() { # NAME COMMAND ...
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s ==\n' "$name"
  printf '$ %s\n' "${*/#"$python"/python}"
  "$@" < /dev/null || die "$name failed (see above). The same command resumes there;" \
    "'rm -r $folder' starts over"
  times=$times$(printf '\n  %-26s %5d s' "$name" $((SECONDS - start)))
}

# Training that receives SIGTERM saves a checkpoint, reports it and exits with status 0.
finished() { # WORKDIR
  "$python" - "$1" << 'END' || die "training was stopped before its end; the same command resumes it"
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
work_start=$SECONDS

mkdir -p $folder
cd $folder
printf '\nin %s:\n' "$PWD"
PYTHON=$python part "data" bash "$root/launch/data_tiny.sh" 4
stage "stage 1, text to image" stage1_t2i runs/stage1
stage "stage 2, image to text" stage2_i2t runs/stage2
stage "stage 3, joint" stage3_joint runs/stage3
# This file is the last one that the evaluation writes.
if [ -e evaluation/shapes.json ]; then
  printf '\nevaluated already: %s\n' "$PWD/evaluation"
else
  part "evaluation" "$python" -m starflow2_jax.evaluate all --model runs/stage3 --n 16 \
    --out evaluation --overwrite
fi
part "report" "$python" -m starflow2_jax.evaluate report --workdir runs/stage3

printf '\nTimes\n  %-26s %5d s%s\n  %-26s %5d s\n' \
  "install" "$install_seconds" "$times" "all but the install" $((SECONDS - work_start))
printf '\nLook at %s and %s (open them in a browser)\n' \
  "$PWD/runs/stage3/report.html" "$PWD/evaluation/report.html"
