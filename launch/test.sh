#!/usr/bin/env bash
# Installs the test extras, checks the style and runs the tests.
#
#   bash launch/test.sh [--fast | --slow] [--parity] [--plan] [--release] [--docs]
#                       [--lmms] [-- PYTEST ARGUMENTS]
#
#   --fast     only the tests marked fast: a few of every folder, in about two minutes
#   --slow     also the tests marked slow
#   --parity   also tests against PyTorch and diffusers (installs both, CPU builds if pip has them)
#   --plan     also tests that compile for TPUs (installs libtpu; no TPU is needed)
#   --release  also tests of the release archives, and pyright (installs build, twine and pyright)
#   --lmms     only lmms-eval with the plugin of this package (installs it apart; minutes)
#   --docs     also builds the documentation site, with warnings as errors (installs Sphinx)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

extras=(test)
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --parity | --plan | --release | --docs) extras+=("${1#--}") ;;
    --fast) options+=(-m "fast and not slow") ;;
    --slow) options+=(-m "not lmms") ;;
    --lmms) options+=(-m lmms tests/evaluation/harnesses) ;;
    --)
      shift
      options+=("$@")
      break
      ;;
    *)
      die "unknown argument $1:" "launch/test.sh [--fast | --slow] [--parity] [--plan]" \
        "[--release] [--docs] [--lmms] [-- PYTEST ARGUMENTS]"
      ;;
  esac
  shift
done

prepare_environment "${extras[@]}"
# The torchvision that it requires does not fit a CPU build of torch from another index; the tests
# need none.
if [[ " ${extras[*]} " == *" parity "* && $install_seconds != 0 ]]; then
  "$venv_python" -m pip install --quiet --no-deps 'torch-fidelity>=0.4,<0.5' \
    || die "pip could not install torch-fidelity into $venv"
fi
[ "$install_seconds" = 0 ] || printf 'installed in %d s\n' "$install_seconds"

# Only Python: some releases of ruff also format code inside Markdown, others do not.
python_only='extend-exclude = ["*.md"]'
"$venv_python" -m ruff check --quiet --config "$python_only" . \
  || die "ruff check failed; no test was run"
"$venv_python" -m ruff format --check --quiet --config "$python_only" . \
  || die "ruff format --check failed; no test was run ('ruff format' corrects it)"

# Two workers on two cores: libraries with their own thread pools get one thread per worker.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
# A worker runs whole files, so that the tests of a file share its fixtures; tests/conftest.py sorts
# the files.
exec "$venv_python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25 \
  ${options[@]+"${options[@]}"} < /dev/null
