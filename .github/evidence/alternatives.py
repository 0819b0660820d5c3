# SPDX-License-Identifier: MIT
"""python .github/evidence/alternatives.py [--contrastive | --guesses] [OPTIONS OF DISTILL.PY]: with
a distortion of one's own, --fill, or with another loss in Distillation's place."""
import inspect
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill

def fill_in(images, known=None):
    """Images [B, 3, H, W] whose pixels are known [B, 1, H, W] or 0, filled from those around."""
    known = (images.amax(1, keepdim=True) > 0).float() if known is None else known
    sigma = torch.ones(len(images), 1, 1, 1, device=images.device)
    around = distill.blur(images * known, sigma, 1.0, None)
    share = distill.blur(known.expand_as(images), sigma, 1.0, None)
    return torch.where(known > 0, images, around / share.clamp(min=1e-6))

def fill(images, severity, highest, generator):
    """share of pixels missing, which are filled from those around them"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    return fill_in(images, (chance >= severity).float())

distill.DISTORTIONS["fill"] = (fill, 1)

class Contrastive(distill.Distillation):
    """InfoNCE: each student embedding has to find its own image's teacher embedding in the batch,
    at temperature 0.1. (The closest earlier work, arXiv 2110.07439, has both views as anchors.)"""
    def forward(self, clean, distorted):
        target = F.normalize(self.teacher(clean).cls.float())
        logits = F.normalize(self.student(distorted).cls.float()) @ target.T / 0.1  # [B, B]
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        return loss, {"contrastive": loss}

class Guesses(distill.Distillation):
    """Self-training: under the teacher's classifier of 1,000 labelled clean images, which is kept,
    the student has to repeat the teacher's guess at the clean image (cross-entropy)."""
    def __init__(self, teacher, weights):
        from accuracy import DataLoader, embed, fit_probe  # which imports this file
        super().__init__(teacher, weights)
        args, _ = distill.get_args()
        args.max_images = 1000
        batches = list(DataLoader(distill.load_data(args, "train"), 50))
        probe = fit_probe(embed(teacher, args, batches, {}, 0), torch.cat([y for _, y in batches]))
        of = inspect.getclosurevars(probe).nonlocals
        self.logits = lambda x: of["linear"]((x.float() - of["mean"]) / of["std"])

    def forward(self, clean, distorted):
        guess = self.logits(self.teacher(clean).cls).argmax(1)
        loss = F.cross_entropy(self.logits(self.student(distorted).cls), guess)
        return loss, {"guesses": loss}

if __name__ == "__main__":
    losses = {"--contrastive": Contrastive, "--guesses": Guesses}
    if sys.argv[1] in losses:
        distill.Distillation = losses[sys.argv.pop(1)]
    distill.main()
