# SPDX-License-Identifier: MIT
"""python .github/evidence/alternatives.py contrastive|supervised [options of distill.py] --out RUN:
other ways to train the student, in the place of distill.Distillation. A loss of one's own is tried
in the same way.
"""
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from measure import distill


class Contrastive(distill.Distillation):
    """InfoNCE: each student embedding has to find its own image's teacher embedding in the batch.
    The closest earlier work (arXiv 2110.07439) has by default NT-Xent over both views; this is its
    variant with the student as the anchor. Temperature 0.1.
    """
    def forward(self, clean, distorted, labels):
        with torch.no_grad():
            target = self.teacher(distill.prepare(clean, *self.prepare_args)).cls
        found = self.student(distill.prepare(distorted, *self.prepare_args)).cls
        logits = F.normalize(found.float()) @ F.normalize(target.float()).T / 0.1  # [B, B]
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)), {}


class Supervised(distill.Distillation):
    """The student learns labels (at most 1,000 classes) of distorted images; no teacher."""
    def __init__(self, teacher, student, *more):
        super().__init__(teacher, student, *more)
        self.head = nn.Linear(student.cls_token.shape[-1], 1000)

    def forward(self, clean, distorted, labels):
        logits = self.head(self.student(distill.prepare(distorted, *self.prepare_args)).cls)
        return F.cross_entropy(logits.float(), labels), {}


if __name__ == "__main__":
    distill.Distillation = {"contrastive": Contrastive, "supervised": Supervised}[sys.argv.pop(1)]
    distill.main()
