#!/usr/bin/env bash
# Draws the shapes datasets on which the `tiny` stages of STARFlow2 are trained and evaluated, and
# encodes their images.
#
#   bash launch/data_tiny.sh [DIVISOR] [WORLD]
#
# Writes data_cache/NAME64, data_cache/NAME64_test and their latents, data_cache/..._latents, in the
# working directory, where experiments/stage*.py:tiny expect them. Complete folders are not changed;
# latents of another codec or of other images are replaced. DIVISOR divides the number of training
# records. One core makes about 500 records a second, and as many latents.
#
# WORLD  all (default) or single: captions and reasoning show one object, so that a training of
#        minutes can learn them. Questions and edits show up to four in both.
# PYTHON an interpreter with the package installed (default: python)
# FAE    the codec (default: pretrained/fae_tiny); empty: no latents
set -euo pipefail

usage='launch/data_tiny.sh [DIVISOR] [WORLD]'
divisor=${1:-1}
case $divisor in
  '' | *[!0-9]* | 0*)
    printf 'error: %s: expected a whole number, got %s\n' "$usage" "$divisor" >&2
    exit 1
    ;;
esac
# Hard tags are drawn more often for training, and all alike for tests.
t2i='--tags single_object,colors,two_object=2,counting=2,position=2,color_attr=2'
t2i_test=
reasoning=--balance_answers
case ${2:-all} in
  all) ;;
  single)
    t2i='--tags single_object,colors'
    t2i_test=$t2i
    reasoning="$reasoning $t2i"
    ;;
  *)
    printf 'error: %s: expected all or single, got %s\n' "$usage" "$2" >&2
    exit 1
    ;;
esac

# --withheld leave_out keeps an eighth of the (color, shape) pairs and combinations out of them.
shared_flags=(--format shapes --pixels 64 --withheld leave_out)
lines=
latents=
while read -r name tasks n seed test_tasks test_n test_seed; do
  train='' test=''
  case $name in
    t2i) train=$t2i test=$t2i_test ;;
    reasoning) train=$reasoning test=$reasoning ;;
  esac
  for folder in "data_cache/${name}64" "data_cache/${name}64_test"; do
    latents=$latents"--data $folder --out ${folder}_latents --overwrite"$'\n'
  done
  lines=$lines"--out data_cache/${name}64 --tasks $tasks --n $((n / divisor)) --seed $seed${train:+ $train}"$'\n'
  lines=$lines"--out data_cache/${name}64_test --tasks $test_tasks --n $test_n --seed $test_seed${test:+ $test}"$'\n'
done << 'END'
t2i        t2i                               80000   0  t2i                 500   1
i2t        quiz,dialog,caption,question      30000  20  question            500  21
edit       edit                              40000  30  edit                300  31
copy       copy                               8000  35  copy                100  36
reasoning  reason,reason_free,reason_direct  45000  40  reason,reason_free  300  41
text       text                              10000  50  text                300  51
END

mkdir -p data_cache
# Two at a time, since each process uses one core.
printf '%s' "$lines" | xargs -P 2 -L 1 "${PYTHON:-python}" -m starflow2_jax.prepare import "${shared_flags[@]}"

fae=${FAE-pretrained/fae_tiny}
[ -n "$fae" ] || exit 0
printf '%s' "$latents" | xargs -P 2 -L 1 "${PYTHON:-python}" -m starflow2_jax.prepare latents --fae "$fae"
