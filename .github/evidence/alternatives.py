# SPDX-License-Identifier: MIT
"""python .github/evidence/alternatives.py [--contrastive] [options of distill.py]: distortions of
one's own, --fill, --shot and --grey, and with --contrastive another loss in Distillation's place.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill

def fill_in(images, known=None):
    """Images [B, 3, H, W] whose pixels are known [B, 1, H, W] or 0, filled from those around."""
    if known is None:
        known = (images.amax(1, keepdim=True) > 0).float()
    sigma = torch.ones(len(images), 1, 1, 1, device=images.device)
    around = distill.blur(images * known, sigma, 1.0, None)
    share = distill.blur(known.expand_as(images), sigma, 1.0, None)
    return torch.where(known > 0, images, around / share.clamp(min=1e-6))

def fill(images, severity, highest, generator):
    """share of pixels missing, which are filled from those around them"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    return fill_in(images, (chance >= severity).float())

def shot(images, severity, highest, generator):
    """share of the light lost, the rest counted in photons, 100 for white"""
    photons = 100 * (1 - severity) * images.clamp(min=0)
    return torch.poisson(photons, generator=generator) / 100

def grey(images, severity, highest, generator):
    """standard deviation of Gaussian noise, equal in all channels"""
    one = images[:, :1]
    return images + severity * torch.randn(one.shape, generator=generator, device=images.device)

distill.DISTORTIONS.update(fill=(fill, 1), shot=(shot, 1), grey=(grey, math.inf))

class Contrastive(distill.Distillation):
    """InfoNCE: each student embedding has to find its own image's teacher embedding in the batch.
    The closest earlier work (arXiv 2110.07439) has by default NT-Xent over both views; this is its
    variant with the student as the anchor. Temperature 0.1."""
    def forward(self, clean, distorted):
        with torch.no_grad():
            target = self.teacher(clean).cls
        found = self.student(distorted).cls
        logits = F.normalize(found.float()) @ F.normalize(target.float()).T / 0.1  # [B, B]
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        return loss, {"contrastive": loss}

if __name__ == "__main__":
    if "--contrastive" in sys.argv:
        sys.argv.remove("--contrastive")
        distill.Distillation = Contrastive
    distill.main()
