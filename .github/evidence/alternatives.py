# SPDX-License-Identifier: MIT
"""python .github/evidence/alternatives.py [options of distill.py] --out RUN: a contrastive loss in
the place of distill.Distillation. A loss of one's own is tried in the same way.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill

class Contrastive(distill.Distillation):
    """InfoNCE: each student embedding has to find its own image's teacher embedding in the batch.
    The closest earlier work (arXiv 2110.07439) has by default NT-Xent over both views; this is its
    variant with the student as the anchor. Temperature 0.1.
    """
    def forward(self, clean, distorted):
        with torch.no_grad():
            target = self.teacher(clean).cls
        found = self.student(distorted).cls
        logits = F.normalize(found.float()) @ F.normalize(target.float()).T / 0.1  # [B, B]
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)), {}

if __name__ == "__main__":
    distill.Distillation = Contrastive
    distill.main()
