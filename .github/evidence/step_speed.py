# SPDX-License-Identifier: MIT
"""python .github/evidence/step_speed.py WEIGHTS: images/s of a whole step of a ViT at 112 pixels on
a CPU, batch 16 (distorting, teacher, student with one map, loss, backward, AdamW), medians of five.
"""
import copy
import statistics
import sys
import time

import torch
from measure import distill

teacher = distill.load_vit(sys.argv[1], 112)
student = copy.deepcopy(teacher)
module = distill.Distillation(teacher, student, 112, distill.IMAGENET_MEAN, distill.IMAGENET_STD)
optimizer = torch.optim.AdamW(student.parameters(), 1e-4, weight_decay=0.05, fused=True)
images = torch.rand(16, 3, 112, 112)


def step(in_bfloat16):
    noisy = distill.distort(images, None, True, 0.2, blur=(0, 5), noise=(0, 0.4), mask=(0, 0.6))
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        loss, _ = module(images, noisy)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()


for in_bfloat16 in (False, True):
    rates = []
    for _ in range(5):
        step(in_bfloat16)
        start = time.perf_counter()
        for _ in range(3):
            step(in_bfloat16)
        rates.append(3 * len(images) / (time.perf_counter() - start))
    print("bfloat16" if in_bfloat16 else "float32", round(statistics.median(rates), 1))
