#!/usr/bin/env bash
# Writes datasets of many kinds of images, to train and measure a small codec for any 64x64 image.
#
#   bash launch/data_wide.sh FOLDER_OF_TARS [DIVISOR]
#
# Writes into data_cache/ in the working directory, each with a NAME_test next to it:
#
#   procedural64   random gradients, textures, polygons, strokes, text; no captions
#   shapes64       the shapes benchmark's text-to-image records, without the withheld pairs
#   emoji64        emoji, each on white and on two random backgrounds
#   emoji_white64  emoji on white with their captions, for the stages of STARFlow2
#   cifar64        photographs, scaled up, with their captions
#
# The last three are read from {twemoji,cifar10}_{train,test}.tar in FOLDER_OF_TARS, WebDatasets of
# captioned images. Without a tar its datasets are left out. Complete folders are not changed.
# DIVISOR divides the number of training records. One core makes about 400 records a second.
#
# PYTHON  an interpreter with the package installed (default: python)
set -euo pipefail

tars=${1:?expected launch/data_wide.sh FOLDER_OF_TARS [DIVISOR]}
divisor=${2:-1}
case $divisor in
  '' | *[!0-9]* | 0*)
    printf 'error: launch/data_wide.sh FOLDER_OF_TARS [DIVISOR]: expected a whole number, got %s\n' "$divisor" >&2
    exit 1
    ;;
esac

lines=
while read -r format n seed test_n test_seed flags; do
  lines=$lines"--out data_cache/${format}64 --format $format --n $((n / divisor)) --seed $seed $flags"$'\n'
  lines=$lines"--out data_cache/${format}64_test --format $format --n $test_n --seed $test_seed $flags"$'\n'
done << 'END'
procedural  16000  60  200  61  --pixels 64
shapes       8000  70  200  71  --pixels 64 --withheld leave_out
END

while read -r name tar n background test_background; do
  for part in train test; do
    file=$tars/${tar}_$part.tar
    out=data_cache/${name}64 count=$((n / divisor)) ground=$background
    if [[ $part == test ]]; then
      out=${out}_test count=200 ground=$test_background
    fi
    if [[ -f $file ]]; then
      lines=$lines"--out $out --format webdataset --n $count --background $ground --source \"$file\""$'\n'
    else
      printf 'launch/data_wide.sh: there is no %s, so %s is left out\n' "$file" "$out" >&2
    fi
  done
done << 'END'
emoji        twemoji   1711  white,random,random  white
emoji_white  twemoji   1711  white                white
cifar        cifar10  10000  white                white
END

mkdir -p data_cache
# Two at a time, since each process uses one core.
printf '%s' "$lines" | xargs -P 2 -L 1 "${PYTHON:-python}" -m starflow2_jax.prepare import --pixels 64
