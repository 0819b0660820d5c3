# SPDX-License-Identifier: MIT
"""python .github/evidence/step_speed.py WEIGHTS: images/s of a step of a ViT-S/14 on a CPU, at
112 pixels and with batches of 16, beside the same step with timm's ViT, in turns; medians of five.
"""
import copy
import statistics
import sys
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill

class Timm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=112).eval()
        self.vit.blocks[-1].attn.attn_drop.register_forward_hook(self.keep)

    def keep(self, module, inputs, attn):
        self.map = attn.float()

    def forward(self, images, attn_blocks):
        tokens = self.vit.forward_features(images)
        return distill.Features(tokens[:, 0], tokens[:, 1:], (self.map,))

def make_step(teacher, make_student):
    student = make_student(teacher)
    module = distill.Distillation(teacher, student)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, weight_decay=0.05, fused=True)
    images = torch.rand(16, 3, 112, 112)

    def step(dtype):
        noisy = distill.distort(images, None, True, 0.2, blur=(0, 5), noise=(0, 0.4), mask=(0, 0.6))
        clean, noisy = [distill.prepare(x, 112) for x in (images, noisy)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, _ = module(clean, noisy)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return step

timm.layers.set_fused_attn(False)  # the fused kernel gives no maps
steps = {"ours": make_step(distill.load_vit(sys.argv[1], 112), copy.deepcopy),
         "timm": make_step(Timm(), lambda teacher: Timm())}
for dtype in ("float32", "bfloat16"):
    seconds = {name: [] for name in steps}
    for _ in range(6):
        for name, step in steps.items():
            start = time.perf_counter()
            step(dtype)
            seconds[name].append(time.perf_counter() - start)
    print(dtype, {name: round(16 / statistics.median(s[1:]), 1) for name, s in seconds.items()})
