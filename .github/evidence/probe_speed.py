# SPDX-License-Identifier: MIT
"""python .github/evidence/probe_speed.py RUN: fit_probe beside scikit-learn's LogisticRegression at
the same six strengths, on the teacher's features of 1,000 training images.
"""
import sys
import time

from measure import accuracy, embed, evaluation, load, vit
from sklearn.linear_model import LogisticRegression

cfg, (images, labels), (test, test_labels) = load(sys.argv[1], 1000, 1000)
teacher = vit(sys.argv[1], cfg, "teacher")
for severities in ({}, {"noise": 0.3}):
    x = embed(teacher, images, cfg, severities, 0)
    test_x = embed(teacher, test, cfg, severities, 1)
    start = time.perf_counter()
    probe = evaluation.fit_probe(x, labels)
    ours = time.perf_counter() - start
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    start = time.perf_counter()
    scores = []
    for strength in (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5):
        theirs = LogisticRegression(C=1 / (2 * strength * len(x)), max_iter=2000)
        theirs.fit((x - mean) / std, labels)
        scores.append(round(100 * theirs.score((test_x - mean) / std, test_labels), 2))
    seconds = time.perf_counter() - start
    print(severities, f"ours {ours:.2f} s, {accuracy(probe, test_x, test_labels)} %; "
          f"scikit-learn {seconds:.2f} s, best on the test images {max(scores)} %")
