#!/bin/bash
# pycocotools 2.0.11: an annotation with the id 0 is never found, however well a detection fits it.
#
# COCOeval keeps, for each detection, the id of the annotation that it was matched to, and 0 for "not matched". Nothing in
# the format forbids the id 0, and many exporters count from there: the detection that fits the annotation 0 then counts as
# a false positive, without a warning. Of a large set hardly anybody sees it; of one with few objects of a class the average
# precision halves or is 0.
#
# Observed on 2026-11-30 with Python 3.11 and numpy 2.4.6: one image, one object, one detection with the same box and score
# 1. With the annotation's id 1 the average precision is 1.0, with the id 0 it is 0.0.
# Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'pycocotools==2.0.11' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(number):
  box = [10.0, 10.0, 50.0, 40.0]
  with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO()
    truth.dataset = {
      'images': [{'id': 7}],
      'categories': [{'id': 1}],
      'annotations': [{'id': number, 'image_id': 7, 'category_id': 1, 'bbox': box, 'area': 2000.0, 'iscrowd': 0}],
    }
    truth.createIndex()
    found = truth.loadRes([{'image_id': 7, 'category_id': 1, 'bbox': box, 'score': 1.0}])
    run = COCOeval(truth, found, 'bbox')
    run.evaluate()
    run.accumulate()
    run.summarize()
  return float(run.stats[0])


from_one, from_zero = average_precision(1), average_precision(0)
print('average precision with the id 1:', from_one, 'with the id 0:', from_zero)
assert from_one > 0.999
assert from_zero == 0.0
PYTHON
