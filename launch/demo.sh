#!/usr/bin/env bash
# Installs the package, shows what the shipped STARFlow2 can do, trains the three stages of a new one
# on a smaller world, and says what that one can and cannot do: `bash launch/demo.sh`. The VLM and
# the latent codec come with the package. It needs no accelerator and no data. A second run does only
# the parts that are not done yet.
#
# STEPS  steps of the three stages (default: "320 80 200", for 20 minutes on two cores)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# One folder contains the data, the runs and the results; removing it starts over. The experiments
# name their folders relative to it.
root=$PWD
folder=runs/demo
read -r -a steps <<< "${STEPS:-320 80 200}"
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

stage() { # NAME EXPERIMENT WORKDIR STEPS
  part "$1" "$python" -m starflow2_jax.train --config "$root/experiments/$2.py:tiny" --workdir "$3" \
    --config.train.steps="$4" --config.evaluate.every="$4" --config.sample.every="$4" \
    --config.checkpoint.every=100
  finished "$3"
}

evaluate() { # NAME FOLDER ARGUMENTS ...
  local name=$1 out=$2
  shift 2
  # This file is the last one that an evaluation writes.
  if [ -e "$out/shapes.json" ]; then
    printf '\n%s: done already in %s\n' "$name" "$PWD/$out"
  else
    part "$name" "$python" -m starflow2_jax.evaluate "$@" --out "$out" --overwrite
  fi
}

[ $# -eq 0 ] || die "launch/demo.sh takes no arguments; got $*"
[ ${#steps[@]} -eq 3 ] || die "STEPS=${STEPS:-}: expected three numbers, as in STEPS='320 80 200'"
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
evaluate "shipped model" examples showcase --model pretrained/starflow2_tiny
printf '\nWhat the shipped model can do: %s (open it in a browser)\n' "$PWD/examples/showcase.html"

PYTHON=$python part "data" bash "$root/launch/data_tiny.sh" 8 single
stage "stage 1, text to image" stage1_t2i runs/stage1 "${steps[0]}"
stage "stage 2, image to text" stage2_i2t runs/stage2 "${steps[1]}"
stage "stage 3, joint" stage3_joint runs/stage3 "${steps[2]}"
test_data=data_cache/t2i64_test,data_cache/i2t64_test,data_cache/edit64_test
test_data=$test_data,data_cache/reasoning64_test,data_cache/text64_test
evaluate "evaluation" evaluation all --model runs/stage3 --data "$test_data" --n 24 \
  --note "This model was trained by launch/demo.sh, in ${steps[0]}, ${steps[1]} and ${steps[2]} steps \
from a flow and an adapter of random weights, behind the VLM and the codec of the package. Its world is \
smaller than that of the shipped model: captions and reasoning show one object, questions and edits up \
to four. What hours of training give is on the page $PWD/examples/showcase.html."
part "report" "$python" -m starflow2_jax.evaluate report --workdir runs/stage3

printf '\nTimes\n  %-26s %5d s%s\n  %-26s %5d s\n' \
  "install" "$install_seconds" "$times" "all but the install" $((SECONDS - work_start))
printf '\nOpen in a browser:\n  %s  what the shipped model can do\n  %s  what this model can and cannot do\n  %s  how its last stage was trained\n' \
  "$PWD/examples/showcase.html" "$PWD/evaluation/report.html" "$PWD/runs/stage3/report.html"
