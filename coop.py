"""Learn the words of a CLIP prompt from a few images per class: CoOp, arXiv 2109.01134.

    python coop.py --demo                                # nothing to download: two minutes on a laptop
    python coop.py --data ./dtd --shots 4                # your folder of images, CPU or CUDA
    python coop.py --data ./dtd --shots 1 2 4 8 16 --seeds 1 2 3

CLIP sorts a picture into K classes by comparing its features f with the features of K sentences, "a photo of a cat."
and so on. Which words stand around the class name matters by several points and nobody knows why. CoOp lets gradient
descent choose them: M vectors V take the place of the words, and the few labelled images say which V are good.
Everything else in CLIP stays frozen.

Paper -> code: K classes; M context vectors V (M, d), or (K, M, d) with one context per class (csc); t_i the prompt of
class i; g its text features; f image features; tau = 1 / exp(logit_scale) the temperature; d token width; e embedding
width; T epochs, n the epoch; N training images.

Know before: what CLIP's two encoders do (clip_model.py, first two screens), and SGD in PyTorch. To take away: a prompt
is a short list of vectors like any other parameter; what it learns is the same for all images, so at test time g is
computed once and a prediction costs one image encoding.

Read in this order: PromptLearner, train, evaluate: that is the method. Then, if you want to know how a folder becomes
a table: image_features, Experiment.coop, run and main.
"""
import argparse
import collections
import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import clip_model
import data
from data import TEST, write
from tokenizer import Tokenizer


class PromptLearner(nn.Module):
    """The K prompts t_i = [V]_1 ... [V]_M [class i] . as token embeddings, V being the parameter.

    Paper equations 2 (position "end"), 3 ("middle": half of V before the name, half after) and class-specific contexts
    (csc); "front" is the official code's third. init: words whose token embeddings V starts from (M is then their
    number of tokens); None draws N(0, 0.02^2) from torch's global generator. ValueError if a prompt is too long.

    Why this can work: a word enters CLIP as a row of the token embedding, d numbers; nothing behind that table asks
    whether the numbers came out of it. A word can only be chosen, a vector can be learned.
    """

    def __init__(self, clip, tokenizer, classnames, M=16, position="end", csc=False, init=None):
        super().__init__()
        K, embedding = len(classnames), clip.token_embedding.weight.detach()     # (vocabulary, d)
        if tokenizer.vocab_size != clip.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, this CLIP {clip.vocab_size}: no pair")
        words = None if init is None else tokenizer.encode(init.replace("_", " "))
        M = M if init is None else len(words)
        if not 1 <= M < clip.context_length:
            raise ValueError(f"M = {M}: expected 1 to {clip.context_length - 4} context vectors, or words of --init")

        # end:     sot V1 V2 V3 V4 polka - dotted . eot        sot, eot: start and end of text
        # middle:  sot V1 V2 polka - dotted V3 V4 . eot
        # front:   sot polka - dotted V1 V2 V3 V4 . eot
        # Written as numbers: a token id, or vocab_size + m for the place of vector V_m.
        prompts, before = [], {"end": M, "middle": M // 2, "front": 0}[position]         # vectors before the name
        for i, name in enumerate(name.replace("_", " ") for name in classnames):
            # The name is encoded with its full stop, as in the sentence: at its border the two might merge.
            ids, cut = tokenizer.encode(name + "."), len(tokenizer.encode(name))
            places = [clip.vocab_size + (i * M if csc else 0) + m for m in range(M)]
            prompts.append([tokenizer.sot, *places[:before], *ids[:cut], *places[before:], *ids[cut:], tokenizer.eot])
        longest, name = max((len(prompt), name) for prompt, name in zip(prompts, classnames))
        if (excess := longest - clip.context_length) > 0:
            raise ValueError(f"class name {name!r} is too long or M = {M} too large: a prompt of {longest} tokens, the "
                             f"model reads {clip.context_length}; M can be {max(0, M - excess)} at most")
        # What all prompts begin with, P tokens, is not computed K times: 1 + M at the end, 1 + M // 2 in the middle; at
        # the front, and where each class has vectors of its own, sot alone. The less they share, the longer a step.
        P = 1 if csc else 1 + before
        self.lengths = torch.tensor([len(prompt) - P for prompt in prompts])

        # A prompt is now a list of numbers. forward() looks them up in a small bank: one row for each token id that
        # occurs, then the rows of V; `rows` says of each number which row it is (unique() sorts: ids before places).
        packed = prompts[0][:P] + [number for prompt in prompts for number in prompt[P:]]
        used, rows = torch.unique(torch.tensor(packed), return_inverse=True)
        self.register_buffer("shared_rows", rows[:P].to(embedding.device))
        self.register_buffer("own_rows", rows[P:].to(embedding.device))
        self.register_buffer("fixed", embedding[used[used < clip.vocab_size].to(embedding.device)])
        V = torch.randn((K, M, embedding.shape[1]) if csc else (M, embedding.shape[1])) * 0.02
        if words is not None:
            V = embedding[torch.tensor(words, device=embedding.device)].expand(V.shape).clone()
        self.V = nn.Parameter(V.to(embedding))           # fp32 as the text encoder: in fp16 small steps would be lost

    def forward(self):
        """-> shared (P, d), own (sum of lengths, d), lengths (K,): what CLIP.encode_prompts takes.

        DTD with RN50, K = 47, M = 16, end: shared (17, 512), own (186, 512), lengths (47,) of 3 to 5 (name, full stop,
        eot); g is then (47, 1024), e being 1024. With csc: shared (1, 512), own (186 + 47 * 16, 512).
        """
        bank = torch.cat([self.fixed, self.V.flatten(0, -2)])
        return bank[self.shared_rows], bank[self.own_rows], self.lengths


def batches(N, T, seed, size=32):
    """T lists of index tensors: every epoch a new shuffle of N images, cut into batches. What is left over is dropped,
    as a step on a few images would move V as far as one on 32 and in a worse direction, unless it is all there is.
    """
    dice = torch.Generator().manual_seed(seed)
    return [[b for b in torch.randperm(N, generator=dice).split(size) if len(b) == min(N, size)] for _ in range(T)]


def learning_rate(n, T):
    """The official schedule: one epoch of warm-up at 1e-5, meant to keep the first gradients, taken far from any good
    V, from throwing it off; then a cosine from 0.002. Odd, and kept: the warm-up is no rise but a constant; momentum
    carries its gradients on; and it counts as one of the T, so the cosine stops short of zero, at pi (T - 2) / T.
    """
    return 1e-5 if n == 0 else 0.001 * (1 + math.cos(math.pi * (n - 1) / T))


def train(clip, learner, features, labels, T, seed=1, loss=F.cross_entropy, keep=0.0, hand=None,
          progress=lambda n, loss, accuracy: None):
    """Learn V by the paper's recipe; the result is V of the last epoch, in learner. If you change the recipe, give the
    command --again or another --out: what results.jsonl knows is not run again.

    features: (N, crops, e); features[i, n % crops] belongs to the crop that epoch n shows of image i, computed
    beforehand: the image encoder is frozen, so f does not change while V does. labels: (N,). seed: of the batches;
    training_features, given the same, computes just the crops that they use. loss, keep, hand: README "Beyond the
    paper"; hand (K, e): hand-written prompts, of unit length. Raises ValueError when the loss is not a number.

    "The gradient flows through a frozen encoder": backward() goes from the loss through g and every layer of the text
    encoder down to V, multiplying by the layers' weights on its way. Frozen means that no gradient with respect to
    those weights is computed and no step changes them. So is the temperature, which CLIP learned in its pretraining.
    """
    optimizer = torch.optim.SGD([learner.V], lr=learning_rate(0, T), momentum=0.9, weight_decay=5e-4)
    for n, epoch in enumerate(batches(len(labels), T, seed)):
        optimizer.param_groups[0]["lr"] = learning_rate(n, T)
        losses, right = [], 0
        for batch in epoch:
            f = F.normalize(features[batch, n % features.shape[1]], dim=-1)      # (B, e)
            g = F.normalize(clip.encode_prompts(*learner()), dim=-1)             # (K, e)
            # Equation 1: p(y = i | x) = exp(cos(g_i, f) / tau) / sum over j of exp(cos(g_j, f) / tau).
            # tau is 0.01 in OpenAI's models: a cosine of 0.25 against 0.20 is then e^5 against 1. It scales the
            # gradient of V, too: another tau would want another learning rate.
            logits = clip.logit_scale.exp() * f @ g.T                            # cos / tau, (B, K): B is 32
            value = loss(logits, labels[batch])                                  # mean of -log p(label)
            if keep:
                value = value + keep * (1 - (g * hand).sum(-1).mean())           # KgCoOp: near the hand-written words
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            # Both stay tensors until the epoch is over: to read a number here would make a GPU wait in every step.
            losses.append(value.detach())
            right += (logits.argmax(-1) == labels[batch]).sum()
        losses = torch.stack(losses)
        if not losses.isfinite().all():
            step = n * len(epoch) + int((~losses.isfinite()).nonzero()[0])
            raise ValueError(f"the loss is not a number at step {step} (epoch {n}): the weights or the image features "
                             "are damaged, of another seed, or overflow in this --precision")
        progress(n, losses.mean().item(), 100 * right.item() / sum(map(len, epoch)))


def evaluate(image_features, text_features, labels):
    """Percent of the images (N, e) whose nearest text (K, e), by cosine, is that of their label (N,). The temperature
    says how sure a prediction is, not which class is ahead, and so do the exponential and the sum below it.
    """
    f, g = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    return 100 * ((f @ g.T).argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def zero_shot(clip, tokenizer, template, classnames):
    """Features (K, e), of unit length, of hand-written prompts: names put into "a photo of a {}."."""
    texts = [template.replace("{}", name.replace("_", " ")) for name in classnames]
    return F.normalize(torch.cat([clip.encode_text(tokenizer(texts[i:i + 256], clip.context_length).to(clip.device))
                                  for i in range(0, len(texts), 256)]), dim=-1)


# ---- The method ends here; what follows brings images in and results out -------------------------
#
# Images come in as features: the image encoder is frozen, so each crop need go through it but once. That is also what
# makes a sweep cheap: another M, position or loss asks for the same crops and finds them in the cache.

def progress_line(what, total, advice=""):
    """-> say(done, note): how far long work is and how long it will still take, every few seconds, then more rarely;
    with the advice while that is more than five minutes.
    """
    start = said = time.time()

    def say(done, note=""):
        nonlocal said
        now = time.time()
        if now - said > max(5, 0.1 * (now - start)):
            said, left = now, (now - start) / done * (total - done)
            note += f", {left:.0f} s left" + advice * (left > 300)
            print(f"{what}: {done} of {total}{note}", file=sys.stderr, flush=True)
    return say


def image_features(clip, jobs, cache=None, what="encoding crops", advice=""):
    """Features (number of crops, e) fp32 on the CPU of jobs [(path, [crop number, ...]), ...], in order.

    What the cache (data.FeatureCache) holds is not computed again; what is computed is put there as soon as an image is
    complete. Threads decode while the encoder works on batches of one size, whatever image the crops come from.
    """
    # Measured on CPU: a ResNet is fastest when the layers of one batch stay in the processor's caches, a ViT, which is
    # matrix products throughout, with larger ones. A GPU wants to be filled.
    size = 256 if clip.device.type == "cuda" else 8 if isinstance(clip.visual, clip_model.ModifiedResNet) else 32
    files, known = {}, {path: {} for path, _ in jobs}
    for path, numbers in jobs if cache else ():
        files[path] = cache.file(path)                   # before decoding: a picture may be replaced meanwhile
        known[path].update((n, vector.copy()) for n, vector in cache.get(files[path]).items() if n in numbers)
    missing = [(path, [n for n in numbers if n not in known[path]]) for path, numbers in jobs]
    crops, say = data.crops(missing, clip.resolution), progress_line(what, sum(len(n) for _, n in missing), advice)

    def encoded():
        done = 0
        while batch := list(itertools.islice(crops, size)):
            paths, numbers, pixels = zip(*batch)
            with torch.inference_mode():
                f = clip.encode_image(data.normalise(torch.from_numpy(np.stack(pixels)).to(clip.device))).float().cpu()
            if not f.isfinite().all():
                raise ValueError(f"features of {paths[0]} or a neighbour are NaN or infinite (weights? --precision?)")
            say(done := done + len(batch))
            yield from zip(paths, numbers, f.numpy())

    for path, group in itertools.groupby(encoded(), lambda item: item[0]):
        fresh = {n: vector for _, n, vector in group}
        known[path].update(fresh)
        if cache:
            cache.put(files[path], fresh)
    return torch.from_numpy(np.stack([known[path][n] for path, numbers in jobs for n in numbers]))


def training_jobs(items, T, views=0, seed=1):
    """The crops that train() reads, [(path, [n, ...]), ...]: not all, as each epoch drops an incomplete batch."""
    needed = [set() for _ in items]
    for n, epoch in enumerate(batches(len(items), T, seed)):
        for i in torch.cat(epoch).tolist():
            needed[i].add(n % (views or T))
    return [(path, sorted(numbers)) for (path, _), numbers in zip(items, needed)]


def training_features(clip, items, T, views=0, seed=1, cache=None):
    """Features (N, crops, e) of the crops that train() reads, crops = min(views or T, T). Of the others, NaN: should
    train() ever read one, it would stop and say so instead of learning from a wrong picture.
    """
    jobs, crops = training_jobs(items, T, views, seed), min(views or T, T)
    features = torch.full((len(items), crops, clip.text_projection.shape[1]), float("nan"))
    advice = f" (--views 10: at most {10 * len(items)} crops; approximate, see README)" if crops > 10 else ""
    i, n = zip(*((i, n) for i, (_, numbers) in enumerate(jobs) for n in numbers))
    features[i, n] = image_features(clip, jobs, cache, advice=advice)
    return features


def generalised_cross_entropy(logits, labels, q=0.5):
    """(1 - p^q) / q, p the probability of the label (arXiv 1805.07836): between cross-entropy (q -> 0) and 1 - p
    (q = 1), nearly the share of mistakes, so that a wrong label, which stays improbable, pulls less.
    """
    log_p = logits.log_softmax(-1).gather(1, labels[:, None])
    return (-torch.expm1(q * log_p) / q).mean()          # as p^q - 1, but with a gradient also where p is 0


def search_C(accuracy):
    """The C with the best accuracy(C) by the official code's search: the best of seven powers of a hundred, then eight
    halvings of [C / 10, 10 C] in log space, each keeping the half at the better end. Of equals, which are frequent
    with the few validation images, the largest of the seven and then the lower end.
    """
    low = max((6, 4, 2, 0, -2, -4, -6), key=lambda exponent: accuracy(10.0 ** exponent)) - 1
    high = low + 2
    for _ in range(8):
        middle, up = (low + high) / 2, accuracy(10.0 ** low) < accuracy(10.0 ** high)
        best, low, high = (high, middle, high) if up else (low, low, middle)
    return 10.0 ** best


def linear_probe(train, val):
    """The paper's other baseline: multinomial logistic regression on pairs (features, labels), with scikit-learn's
    objective, 1/2 |W|^2 + C * sum of losses, in float64 by L-BFGS; C by accuracy on val. -> weights (K, e), biases
    (K,), C. The features are not of unit length, as in the official code. It knows nothing of the class names: each
    class is a free vector, where CoOp must find one that the text encoder can say.
    """
    # CLIP's features have much in common; with their mean taken off, which only moves the biases, L-BFGS gets all the
    # way to the optimum: logits to 2e-3 for all of the seven C (test_linear_probe_is_at_its_optimum).
    mean, (_, labels), (_, val_labels) = train[0].double().mean(0), train, val
    f, val_f = (F.pad(features.double() - mean, (0, 1), value=1.0) for features, _ in (train, val))

    @functools.cache
    def fit(C):
        W = torch.zeros(int(labels.max()) + 1, f.shape[1], dtype=f.dtype, requires_grad=True)   # last column: biases
        optimizer = torch.optim.LBFGS([W], max_iter=2000, tolerance_grad=1e-9, tolerance_change=1e-9 * min(1, C),
                                      line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = C * F.cross_entropy(f @ W.T, labels, reduction="sum") + W[:, :-1].square().sum() / 2
            value = value / min(1, C * len(f))           # for a small C all of it would be below the tolerances
            value.backward()
            return value

        optimizer.step(loss)
        return W.detach()

    C = search_C(lambda C: ((val_f @ fit(C).T).argmax(-1) == val_labels).sum().item())
    W, b = fit(C)[:, :-1], fit(C)[:, -1]
    return W, b - W @ mean, C


# ---- Results and prompts ------------------------------------------------------------------------
#
# A run of CoOp leaves two things: its prompt, a file that is whole or not there, and then a line in results.jsonl. So a
# run with a line has had a whole prompt, and of one that was killed what is missing is done again.
#
#     {"method": "coop", "shots": 16, "seed": 1, "classes": "all", "n_test": 800, "M": 16, "position": "end",
#      "csc": false, "epochs": 200, "views": 0, "dataset": "demo", ..., "accuracy": 74.5}
#
# Runs are the same when all else in their lines is: who changes the method adds a setting (or gives --again), or old
# runs are "known". Device and version of torch are told, but count as the same; --precision does not.

MEASURED = {"accuracy", "C", "n_test", "seconds_images", "seconds_training", "device", "torch"}
USUAL = {"M": 16, "position": "end", "csc": False, "init": None, "views": 0, "loss": "ce", "noise": 0, "keep": 0}


def same(a, b):
    """Whether two lines of results.jsonl come from the same settings."""
    return all(a.get(key) == b.get(key) for key in (a.keys() | b.keys()) - MEASURED)


def read_results(file):
    """The lines of results.jsonl, of all processes that write to it; one that a crash cut off counts as absent."""
    found = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            found += [line] if isinstance(line, dict) and "accuracy" in line else []
    return found


def add_result(file, line):
    """Append in one write, as other processes may append, too; after a torn line on a line of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as results:
        results.seek(max(0, results.seek(0, os.SEEK_END) - 1))
        start = b"" if results.read(1) in (b"", b"\n") else b"\n"
        results.write(start + json.dumps(line).encode() + b"\n")


def load_prompt(path):
    """A prompt saved by us, or by the official code (prompt_learner/model.pth.tar-N, which tells neither class names
    nor settings). -> {"V", "classnames", "settings"}, from us also "text_features" (K, e) of unit length,
    "logit_scale", "resolution" and "path" of the backbone. ValueError for anything else, and if there is no file.
    """
    prompt, tensors = clip_model.read_archive(path)
    try:
        prompt = {**prompt, **tensors}
        if "state_dict" in prompt:
            prompt = {"V": tensors["state_dict.ctx"], "classnames": None, "settings": {}}
        V, names, settings = prompt["V"], prompt["classnames"], prompt["settings"]
        sound = (V.dim() in (2, 3) and V.numel() and V.isfinite().all()
                 and all(isinstance(key, str) for key in settings)
                 and all(isinstance(value, (str, int, float, type(None))) for value in settings.values())
                 and settings.get("position", "end") in POSITIONS and isinstance(settings.get("shots", 0), int))
        if names is not None:                            # ours
            g, scale = prompt["text_features"], prompt["logit_scale"]
            sound = (sound and isinstance(names, list) and all(isinstance(name, str) for name in names)
                     and g.dim() == 2 and len(g) == len(names) and V.shape[:-2] in ((), g.shape[:1])
                     and g.isfinite().all() and scale.dim() == 0 and scale.isfinite() and g.dtype == torch.float32
                     and isinstance(prompt["resolution"], int) and isinstance(prompt["path"], str))
    except (KeyError, TypeError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{path} holds no learned prompt (expected a file of this program or of the official code)")
    told = dict.fromkeys(("position", "shots", "seed", "epochs", "dataset", "classes"))
    settings = {**USUAL, **told, "M": V.shape[-2], "csc": V.dim() == 3, **settings}
    return {**prompt, "V": V.float(), "settings": settings, "file": path}


def unusual(r):
    """In which settings a run of CoOp differs from the paper's standard: ["M=4", "csc", "epochs=20"]. Tables and file
    names tell these only, so that the usual ones stay short and a new setting changes none of them.
    """
    usual = {**USUAL, "epochs": epochs(r["shots"] or 0, r["dataset"]), "classes": "all",
             "precision": "fp16" if r["device"] == "cuda" else "fp32"}
    return [key if r[key] is True else f"{key}={r[key]}" for key in usual if r.get(key) not in (usual[key], None)]


def file_name(r):
    """<dataset>-<backbone>-<shots>shot-seed<seed>, then what is unusual, in characters and a length that every system
    takes; a number stands for what is too long.
    """
    name = "-".join([r["dataset"], r["backbone"], f"{r['shots']}shot", f"seed{r['seed']}", *unusual(r)])
    name = re.sub(r"[^\w.=-]+", "-", name).encode()
    return (name if len(name) <= 200 else name[:190] + b"-%08x" % zlib.crc32(name)).decode(errors="ignore") + ".pt"


def row_name(r):
    """What a result is called in the table and in the picture."""
    if r["method"] != "coop":
        return r["method"] + f" classes={r['classes']}" * (r["classes"] != "all")
    more = [word for word in unusual(r) if not word.startswith(("M=", "position="))]
    return " ".join(["CoOp", f"M={r['M']}", r["position"], *more])


# The paper's numbers for RN50: the test images of its split, as a part of them is not comparable; then accuracy of
# zero-shot CLIP and of CoOp with M=16, end, at 1, 2, 4, 8 and 16 shots.
PAPER = {
    "oxford_pets": (3669, 85.77, 85.89, 82.64, 86.70, 85.32, 87.01),
    "oxford_flowers": (2463, 66.14, 68.12, 77.51, 86.20, 91.18, 94.51),
    "fgvc_aircraft": (3333, 17.28, 9.64, 18.68, 21.87, 26.13, 31.26),
    "dtd": (1692, 42.32, 44.39, 45.15, 53.49, 59.97, 63.58),
    "eurosat": (8100, 37.56, 50.63, 61.50, 70.18, 76.73, 83.53),
    "stanford_cars": (8041, 55.61, 55.59, 58.28, 62.62, 68.43, 73.36),
    "food-101": (30300, 77.31, 74.32, 72.49, 73.33, 71.82, 74.67),
    "sun397": (19850, 58.52, 60.29, 59.48, 63.47, 65.52, 69.26),
    "caltech-101": (2465, 86.29, 87.53, 87.93, 89.55, 90.21, 91.83),
    "ucf101": (3783, 61.46, 61.92, 64.09, 67.03, 71.94, 75.71),
    "imagenet": (50000, 58.18, 57.15, 57.81, 59.99, 61.56, 62.95)}


def cells(results):
    """{row name: {shots: accuracies of all seeds}}; where the paper has numbers for this dataset and these weights,
    they are a row of their own.
    """
    rows, first = {}, results[0]
    for r in results:
        rows.setdefault(row_name(r), {}).setdefault(r["shots"], []).append(r["accuracy"])
    n_test, *numbers = PAPER.get(first["dataset"], (None,))
    if n_test == first["n_test"] and clip_model.MODELS["RN50"].startswith(first["weights"]):
        shown = {r["shots"] for r in results}
        rows["the paper's zero-shot, M=16 end"] = {c: [a] for c, a in zip((0, 1, 2, 4, 8, 16), numbers) if c in shown}
    return rows


def table(results):
    """Accuracy by method and number of shots, mean over seeds ± standard deviation."""
    rows, columns = cells(results), sorted({r["shots"] for r in results})
    width = max(34, *map(len, rows))
    text = f"{'accuracy, %':<{width}}" + "".join(f"{f'{shots} shots':>15}" for shots in columns)
    for row, found in rows.items():
        text += f"\n{row:<{width}}"
        for a in (found.get(shots) for shots in columns):
            spread = f" ± {statistics.stdev(a):.2f}" if a and len(a) > 1 else ""
            text += f"{f'{statistics.mean(a):.2f}{spread}' if a else '':>15}"
    return text


def plot(results, file):
    """The paper's figure 3: accuracy against shots, zero-shot as a star, the spread over seeds as a band."""
    # The optional package, without its pyplot, which would look for a screen.
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, found in cells(results).items():
        shots, style = sorted(found), {"zero-shot": "*", "linear-probe": "o--"}.get(row.split(" ")[0], "o-")
        mean, spread = np.array([[np.mean(found[c]), np.std(found[c], ddof=len(found[c]) > 1)] for c in shots]).T
        line, = axes.plot(shots, mean, style, label=row, markersize=12 if style == "*" else 5)
        axes.fill_between(shots, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="labelled images per class", ylabel="accuracy on the test images, %", title=results[0]["dataset"],
             xticks=sorted({r["shots"] for r in results}))
    axes.grid(alpha=0.3)
    axes.legend()
    write(file, lambda content: figure.savefig(content, dpi=150))


# ---- Experiments --------------------------------------------------------------------------------
#
# Whatever is measured goes the same way. A method writes down its settings, all that could change the result, as a line
# of results.jsonl without its measured part. If the file has a line with these settings, that is the result; if not,
# the method measures, and the line is completed and appended. So a sweep that was stopped goes on where it stopped, and
# a table is read off the file. CoOp has two steps, each of which may be done already: learn(), which leaves a prompt
# file, and transfer(), which tests a prompt, learned a moment ago or loaded from anywhere.

def epochs(shots, dataset):
    """T by the paper: 50 for one shot and for ImageNet, 100 for 2 and 4, 200 for 8 and 16."""
    return 50 if shots <= 1 or dataset == "imagenet" else 100 if shots <= 4 else 200


@torch.no_grad()
def learned_features(clip, tokenizer, classnames, V, position):
    """Features (K, e), of unit length, of learned prompts; a unified V (M, d) takes any class names. Everything learned
    is in V: whoever adds a second parameter hands it on here, in Experiment.learn, in load_prompt and in train.
    """
    learner = PromptLearner(clip, tokenizer, classnames, V.shape[-2], position, V.dim() == 3)
    learner.V.copy_(V)
    return F.normalize(clip.encode_prompts(*learner()), dim=-1)


def open_clip(args):
    """The model of --backbone, made fast, and its tokenizer: OpenAI's, or plain bytes for a model with as few token
    embeddings as the demo's. Their number is all that tells which tokenizer a model was trained with; with the wrong
    one every prompt would be another sentence, and nothing would fail.
    """
    torch.backends.cuda.matmul.allow_tf32 = True         # text encoder on CUDA: fp32 with TF32 products
    clip, tokenizer = clip_model.load(args.backbone, args.device), Tokenizer()
    if clip.vocab_size != tokenizer.vocab_size:
        tokenizer = Tokenizer.openai()
    if clip.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{args.backbone} has {clip.vocab_size} token embeddings, CLIP has {tokenizer.vocab_size}")
    return clip_model.prepare(clip, PRECISIONS[args.precision]), tokenizer


class Experiment:
    """One dataset and one CLIP, and what all runs on them share. zero_shot, probe and coop each make one run and return
    its results, lines of results.jsonl. To add a method, write it beside them and put it into the grid in run(): it
    names its settings (line), says how it measures, and leaves it to once() whether that is needed.
    """

    def __init__(self, args, dataset, clip, tokenizer):
        self.args, self.dataset, self.clip, self.tokenizer, self.seconds = args, dataset, clip, tokenizer, 0.0
        self.file, self.template = args.out / "results.jsonl", args.template or dataset.template
        known = args.backbone in clip_model.MODELS
        backbone = args.backbone.replace("/", "-") if known else Path(args.backbone).stem
        weights = clip.sha256[:16]                       # a checksum, as two files may share a name
        # Datasets are told apart by the names of their images and classes, wherever they lie.
        parts = [[(Path(path).parts[-2:], label) for path, label in part]
                 for part in (dataset.train, dataset.val, dataset.test)]
        images, K = zlib.crc32(repr((dataset.classnames, parts)).encode(errors="replace")), len(dataset.classnames)
        self.common = {"dataset": dataset.name, "images": f"{images:08x}", "backbone": backbone, "weights": weights,
                       "precision": args.precision, "device": args.device, "torch": str(torch.__version__)}
        size = sum(p.numel() for p in clip.parameters()) / 1e6
        print(f"CLIP {backbone} on {args.device}: {size:.1f} M parameters, all frozen; images in {args.precision}")
        print(f"{dataset.name}: K = {K} classes, {len(dataset.train)} training and {len(dataset.test)} test images")
        self.names = {classes: [dataset.classnames[label] for label in data.subset(K, classes)] for classes in CLASSES}
        self.cache = None
        if not args.no_cache:
            self.cache = data.FeatureCache(args.cache / "features" / f"{weights}-{args.precision}")
            size = sum(file.stat().st_size for file in self.cache.folder.glob("*.npz")) / 2 ** 20
            print(f"feature cache: {self.cache.folder}, {size:.0f} MB")

    def announce(self):
        """What will be learned, on the screen, before an hour of encoding: ValueError if a prompt would be too long."""
        args, count = self.args, collections.Counter(label for _, label in self.dataset.train)
        if not count:
            raise ValueError(f"{args.data} has test images only: use --shots 0, or --load a learned prompt")
        for classes in ("all", args.classes):            # a prompt may be tested on all, and is learned on --classes
            V = [PromptLearner(self.clip, self.tokenizer, self.names[classes], *variant, args.init).V
                 for variant in itertools.product(args.M, args.position, args.csc)]
        print("to learn: V " + " or ".join(dict.fromkeys(f"{tuple(v.shape)}, {v.numel():,} numbers" for v in V))
              + f"; shots {args.shots}, seeds {args.seeds}, epochs {args.epochs or 'by shots, as the paper'}, "
              + (f"{args.views} crops per image" if args.views else "a fresh crop every epoch"))
        if (smallest := min(count.values())) < max(args.shots):
            print(f"note: a class with fewer training images than --shots gives all it has (the smallest: {smallest}; "
                  "of class folders without train/ and test/, half of the images are for training)")

    def part(self, items, classes):
        """The items of these classes, labels counted from 0, as the other classes are no possible answers then."""
        # To sort 8 pictures into 8 classes is easier than into 16: halves only compare with halves, the official way.
        new = {label: i for i, label in enumerate(data.subset(len(self.dataset.classnames), classes))}
        return [(path, new[label]) for path, label in items if label in new]

    def draw(self, shots, seed):
        """The few-shot draw of --classes: training images, and at most 4 validation images per class."""
        rng = random.Random(seed)
        drawn = [self.part(data.few_shot(items, count, rng), self.args.classes)
                 for items, count in ((self.dataset.train, shots), (self.dataset.val, min(shots, 4)))]
        if not drawn[0]:
            raise ValueError(f"--classes {self.args.classes}: there are no training images of these classes")
        return drawn

    def encode(self, items):
        """Features (N, e) of the test crops of items, and their labels (N,)."""
        return (image_features(self.clip, [(path, [TEST]) for path, _ in items], self.cache, "encoding images"),
                torch.tensor([label for _, label in items]))

    @functools.cache  # noqa: B019       an experiment lives as long as its process
    def test(self, classes):
        """encode() of the test images of these classes: once for all runs, when the first one asks."""
        start = time.time()
        encoded = self.encode(self.part(self.dataset.test, classes))
        self.seconds = round(self.seconds + time.time() - start, 2)
        return encoded

    def line(self, method, shots, seed, classes, **more):
        """What results.jsonl says of a run, but for what only the run can tell: all settings that could change it."""
        n_test = len(self.part(self.dataset.test, classes))
        if not n_test:
            raise ValueError(f"there are no test images of the {classes} classes")
        return {"method": method, "shots": shots, "seed": seed, "classes": classes, "n_test": n_test,
                **dict.fromkeys(("M", "position", "csc", "epochs", "views")), **self.common, **more}

    def once(self, line, measure, note):
        """The result with the settings of line, to the screen as well: the one in results.jsonl, or a new one, to which
        measure() adds what only a run can tell.
        """
        r = next((r for r in reversed(read_results(self.file)) if same(r, line)), None)
        if r and not self.args.again:
            note += " (known; --again repeats it)"
        else:
            found = measure()
            r = {"seconds_images": self.seconds, "seconds_training": 0.0, **line, **found}
            add_result(self.file, r)
        of = f", {r['shots']} shot{'s' * (r['shots'] != 1)}, seed {r['seed']}" if r["seed"] is not None else ""
        print(f"{row_name(r)}{of}: {r['accuracy']:.2f} %  {note}", flush=True)
        return r

    def halves(self, result, unified=True):
        """result(classes) for --classes; if these are the base classes, for the new ones as well, which a unified V has
        not seen in training, and the harmonic mean of both.
        """
        both = self.args.classes == "base" and unified
        found = [result(classes) for classes in (["base", "new"] if both else [self.args.classes])]
        if len(found) > 1:
            print(f"  harmonic mean of base and new: {statistics.harmonic_mean([r['accuracy'] for r in found]):.2f} %")
        return found

    def hand_written(self, classes):
        """Features (K, e) of the template with these classes' names."""
        return zero_shot(self.clip, self.tokenizer, self.template, self.names[classes])

    def accuracy(self, g, classes):
        """{"accuracy": percent of the test images of these classes that prompts with features g get right}."""
        f, labels = self.test(classes)
        return {"accuracy": evaluate(f, g.cpu(), labels)}

    def zero_shot(self):
        """CLIP as it is, with the hand-written prompt."""
        return self.halves(lambda classes: self.once(
            self.line("zero-shot", 0, None, classes, template=self.template),
            lambda: self.accuracy(self.hand_written(classes), classes), f'"{self.template}"'))

    def probe(self, shots, seed):
        """A linear classifier on the image features, test crops for training too."""
        def measure():
            (f, labels), start, drawn = self.test(self.args.classes), time.time(), self.draw(shots, seed)
            if not drawn[1]:
                raise ValueError("--probe needs validation images to choose its C, and this dataset has none")
            sets = [self.encode(items) for items in drawn]
            encoded = time.time()
            W, b, C = linear_probe(*sets)
            right = (f.double() @ W.T + b).argmax(-1) == labels
            return {"accuracy": 100 * right.double().mean().item(), "C": C, "seconds_images": round(encoded - start, 2),
                    "seconds_training": round(time.time() - encoded, 2)}
        line = self.line("linear-probe", shots, seed, self.args.classes, solver="L-BFGS, centred")
        return [self.once(line, measure, "C chosen on the validation images")]

    def coop(self, M, position, csc, shots, seed):
        """One run of CoOp: a prompt, learned if it is not there already, and its test."""
        return self.transfer(self.learn(M, position, csc, shots, seed))

    def learn(self, M, position, csc, shots, seed):
        """Draw the shots, learn V, save the prompt, unless its file is there. -> load_prompt(file). Validation images
        are not used: the paper's result is V of the last epoch, whatever it does on them.
        """
        args, clip, names = self.args, self.clip, self.names[self.args.classes]
        torch.manual_seed(seed)
        learner = PromptLearner(clip, self.tokenizer, names, M, position, csc, args.init)
        T = args.epochs or epochs(shots, self.dataset.name)
        template = self.template if args.keep else None
        settings = self.line("coop", shots, seed, args.classes, M=learner.V.shape[-2], position=position, csc=csc,
                             init=args.init, epochs=T, views=args.views, loss=args.loss, noise=args.noise,
                             keep=args.keep, template=template)
        file = args.out / file_name(settings)
        with contextlib.suppress(ValueError):            # it may be missing, damaged, or of other images or weights
            prompt = load_prompt(file)
            if same(prompt["settings"], settings) and not args.again:
                return prompt

        self.test(args.classes)                          # a damaged test image should stop us now, not after training
        start, (items, _) = time.time(), self.draw(shots, seed)
        features = training_features(clip, items, T, args.views, seed, self.cache).to(clip.device)
        labels = data.mislabel([label for _, label in items], args.noise, len(names), seed)
        labels = torch.tensor(labels, device=clip.device)
        hand = self.hand_written(args.classes) if args.keep else None
        encoded, say = time.time(), progress_line("learning V, epochs", T)
        train(clip, learner, features, labels, T, seed, LOSSES[args.loss], args.keep, hand,
              lambda n, loss, accuracy: say(n + 1, f", loss {loss:.3f}, training accuracy {accuracy:.0f} %"))
        settings |= {"seconds_images": round(encoded - start, 2), "seconds_training": round(time.time() - encoded, 2)}
        V = learner.V.detach()
        g = learned_features(clip, self.tokenizer, names, V, position)
        prompt = {"V": V.cpu(), "classnames": names, "text_features": g.cpu(), "logit_scale": clip.logit_scale.cpu(),
                  "resolution": clip.resolution, "path": str(args.backbone), "settings": settings}
        write(file, lambda content: torch.save(prompt, content))
        return load_prompt(file)

    def transfer(self, prompt):
        """A learned prompt on the test images of this dataset, without training: a unified V goes with any class names,
        as "a photo of a" does; contexts that belong to classes go with those classes only, in any order.
        """
        V, known, old = prompt["V"], prompt["classnames"], prompt["settings"]
        position = old["position"] or self.args.position[0]
        # A line tells how V was learned, where it was tested, and a checksum of V, as a prompt may be learned anew.
        settings = {**{key: old[key] for key in ("M", "csc", "epochs", "views")}, "position": position,
                    "learned_on": old["dataset"], "learned_classes": old["classes"],
                    "V": f"{zlib.crc32(V.numpy().tobytes()):08x}"}
        note = str(prompt["file"])
        if old.get("seconds_images") is not None and old.get("seconds_training") is not None:
            times = "learned in {seconds_images:.1f} s for images, {seconds_training:.1f} s of training"
            note += f" ({times.format(**old)})"

        def result(classes):
            names, context = self.names[classes], V
            if V.dim() == 3 and known != names:
                strangers = sorted(set(names) - set(known or names)) or ["others"] * (len(V) != len(known or names))
                if strangers:
                    raise ValueError(f"{prompt['file']} has a context for each of its own {len(V)} classes and none "
                                     f"for {strangers[0]!r}; only a unified prompt goes with other classes")
                context = V[[known.index(name) for name in names]] if known else V
            line = {**old, **self.line("coop", old["shots"], old["seed"], classes, **settings)}
            return self.once(line, lambda: self.accuracy(
                learned_features(self.clip, self.tokenizer, names, context, position), classes), note)
        return self.halves(result, V.dim() == 2)


# ---- Using a learned prompt ---------------------------------------------------------------------

def predict(prompt, clip, paths, as_json):
    """The five likeliest classes, with probabilities (equation 1), of each picture in files and folders. They are
    probabilities among these K names: a picture of something else gets one of them, too. The text features come with
    the prompt: one pass of the image encoder each. Pictures that cannot be read do not stop the others (ValueError).
    """
    g, names, unreadable = prompt["text_features"].to(clip.device), prompt["classnames"], []
    files = []
    for path in map(Path, paths):
        files += filter(data.is_image, sorted(path.rglob("*"))) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no pictures in {', '.join(paths)}")
    for file in files:
        try:
            f = image_features(clip, [(file, [TEST])]).to(clip.device)
        except ValueError as error:
            unreadable.append(error)
            continue
        chances = (clip.logit_scale.exp() * F.normalize(f, dim=-1) @ g.T).softmax(-1)[0]
        best = [(names[i], round(chances[i].item(), 4)) for i in chances.topk(min(5, len(names))).indices.tolist()]
        print(json.dumps({"image": str(file), "classes": best}) if as_json else
              f"{file}: " + ", ".join(f"{name} {100 * chance:.1f} %" for name, chance in best), flush=True)
    for error in unreadable[:-1]:
        print(f"note: {error}", file=sys.stderr)
    if unreadable:
        raise unreadable[-1]


def export(prompt, file):
    """K text features of unit length, class names, logit_scale (1 / tau, its exponential already taken) and pixel
    constants: a classifier for numpy.
    """
    write(file, lambda content: np.savez(
        content, text_features=prompt["text_features"].numpy(), classnames=np.array(prompt["classnames"]),
        logit_scale=prompt["logit_scale"].exp().item(), resolution=prompt["resolution"],
        mean=data.MEAN.numpy(), std=data.STD.numpy()))
    print(f"{file}: {len(prompt['classnames'])} classes")


def nearest_words(prompt, clip, tokenizer, count):
    """For each vector of V the nearest token embeddings by Euclidean distance, as the paper's table 4. V moves freely
    between the words, so the nearest one can be far away; the paper found little to read in them.
    """
    embedding, V = clip.token_embedding.weight, prompt["V"].to(clip.device)
    for i, context in enumerate(V if V.dim() == 3 else V[None]):
        if V.dim() == 3:
            print(prompt["classnames"][i] if prompt["classnames"] else f"class {i}")
        # (M, vocabulary); not by way of a matrix product, |a|^2 - 2ab + |b|^2, whose small differences lose digits
        distances = torch.cdist(context, embedding, compute_mode="donot_use_mm_for_euclid_dist")
        for m, (near, ids) in enumerate(zip(*distances.topk(min(count, len(embedding)), largest=False)), 1):
            words = [tokenizer.decode([j]).strip() for j in ids.tolist()]
            print(f"  V{m}: " + ", ".join(f"{word if word.isprintable() else repr(word)} {distance:.4f}"
                                          for word, distance in zip(words, near.tolist())))


def use(args, prompt, dataset, clip, tokenizer):
    """What --load asks for: the accuracy on another dataset, words, predictions, an export. A prompt is tied to the
    weights it was learned for: vectors that mean "negative" to one text encoder mean nothing to another.
    """
    (d, e), weights = clip.text_projection.shape, clip.sha256[:16]
    fits = prompt["V"].shape[-1] == d and (not prompt["classnames"] or prompt["text_features"].shape[1] == e)
    if not fits or prompt["settings"].get("weights", weights) != weights:        # the official code does not tell
        raise ValueError(f"{args.load} was learned for other weights than {args.backbone}: give its own as --backbone")
    if dataset:
        experiment = Experiment(args, dataset, clip, tokenizer)
        experiment.zero_shot()
        experiment.transfer(prompt)
    if args.words:
        nearest_words(prompt, clip, tokenizer, args.words)
    if args.predict:
        predict(prompt, clip, args.predict, args.json)
    if args.export:
        export(prompt, args.export)


# ---- The command line ---------------------------------------------------------------------------

def make_demo(folder):
    """A world without downloads, made once: folder/clip.pt is a small CLIP that learned crisp pictures of textures,
    some of them negatives, and captions that mostly say so; folder/demo are pictures to classify, all faded negatives,
    which "a photo of a {} texture." does not say: CoOp has to find out. folder/demo-...: others, to test what it found.
    """
    if not (folder / "clip.pt").is_file():
        torch.manual_seed(0)
        tokenizer, (pictures, captions), steps = Tokenizer(), data.draw_pairs(6000), 800
        clip = clip_model.CLIP(64, clip_model.ModifiedResNet(64, [1, 1, 1, 1], 16, 64), 64, 2, 77, tokenizer.vocab_size)
        clip.token_embedding.requires_grad_(False)       # words keep the size of V's first values, as in OpenAI's CLIP
        say = progress_line("training a small CLIP on drawn textures, once", steps)
        clip_model.pretrain(clip, data.normalise(torch.from_numpy(pictures)), tokenizer(captions), steps,
                            progress=lambda step, loss: say(step + 1, f", loss {loss.item():.2f}"))
        write(folder / "clip.pt", lambda content: torch.save(clip.state_dict(), content))
    if not (folder / "demo").is_dir():                   # each is whole or not there
        data.draw_dataset(folder / "demo")
    for name, (negative, style) in data.SHIFTED.items():
        if not (folder / name).is_dir():
            data.draw_dataset(folder / name, [("test", 25)], 2, negative, style)


def meet(args):
    """Under torchrun, wait until all processes are here."""
    try:
        if args.world > 1:
            torch.distributed.barrier()
    except RuntimeError as error:                        # gloo's, whatever happened to the other
        raise ValueError(f"another process has stopped: {error}") from None


def run(args):
    """All that one command line asks for. To learn, that is a grid of runs, zero-shot first, then the probe and CoOp in
    each variant, for each number of shots and each seed, and a table. Under torchrun process r of N takes every N-th
    run, from the r-th on; no single run is split: a step is small, and a grid has enough of them.
    """
    if args.rank:                                        # the first process makes or downloads what is missing
        meet(args)
    if args.demo:
        folder = args.cache / "demo-world"
        make_demo(folder)
        args.data, args.backbone = folder / "demo", folder / "clip.pt"
        args.template = args.template or "a photo of a {} texture."
    prompt = load_prompt(args.load) if args.load else {"path": "RN50"}
    args.backbone = str(args.backbone or prompt.get("path", ""))
    if (args.predict or args.export) and not prompt["classnames"]:
        raise ValueError(f"{args.load} comes from the official code and tells no class names; --data can test it")
    if not args.backbone:
        raise ValueError(f"{args.load} does not say for which backbone it was learned: give --backbone")
    dataset, (clip, tokenizer) = data.load_dataset(args.data) if args.data else None, open_clip(args)
    if not args.rank:
        meet(args)
    if args.load:
        return use(args, prompt, dataset, clip, tokenizer)

    experiment = Experiment(args, dataset, clip, tokenizer)
    draws = list(itertools.product(filter(None, args.shots), args.seeds))
    variants = list(itertools.product(args.M, args.position, args.csc))
    if draws:
        experiment.announce()
    if args.world > 1:                                   # each process encodes its share of all crops into the cache
        wanted = {path: {TEST} for path, _ in dataset.test}
        for shots, seed in draws:
            T = args.epochs or epochs(shots, dataset.name)
            for path, numbers in training_jobs(experiment.draw(shots, seed)[0], T, args.views, seed):
                wanted.setdefault(path, set()).update(numbers)
        mine = list(wanted.items())[args.rank::args.world]
        for i in range(0, len(mine), 1000):              # by and by: what is returned is not needed here
            image_features(clip, mine[i:i + 1000], experiment.cache)
        meet(args)
    runs = [(experiment.zero_shot, ())] + [(experiment.probe, draw) for draw in draws if args.probe]
    runs += [(experiment.coop, (*variant, *draw)) for variant in variants for draw in draws]
    found = [method(*arguments) for method, arguments in runs[args.rank::args.world]]
    meet(args)
    if args.rank:
        return
    if args.world > 1:                                   # the others' runs are in results.jsonl by now
        args.again = False
        with contextlib.redirect_stdout(None):
            found = [method(*arguments) for method, arguments in runs]
    results = list(itertools.chain(*found))
    print("\n" + table(results))
    if args.plot:
        plot(results, args.out / f"{dataset.name}.png")
        print(f"picture: {args.out / dataset.name}.png")


POSITIONS, CLASSES = ("end", "middle", "front"), ("all", "base", "new")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = {"ce": F.cross_entropy, "gce": generalised_cross_entropy}
CSC = {"yes": [True], "no": [False], "both": [False, True]}


def integer(text):
    """A number of the command line that counts something."""
    if not 0 <= int(text) < 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text} (expected 0 or more)")
    return int(text)


def parse(argv):
    """The command line as attributes. Defaults stand here; only those that depend on the dataset or the prompt stand
    where these are known. What cannot go together is refused before anything is loaded.
    """
    parser = argparse.ArgumentParser(prog="coop.py", description="Learn the words of a CLIP prompt from a few images "
                                     "per class (CoOp, arXiv 2109.01134). Defaults are in brackets.")

    def add(flag, text, **more):                         # with the default, where there is one
        parser.add_argument(flag, help=text + " (%(default)s)" * ("default" in more), **more)

    add("--data", "a dataset, or a folder of class folders", type=Path, metavar="DIR")
    add("--demo", "drawn textures and a small CLIP trained here instead: nothing to download", action="store_true")
    add("--shots", "training images per class; 0: zero-shot only", type=integer, nargs="+", default=[16], metavar="N")
    add("--seeds", "of images drawn, V's start, batches, --noise", type=integer, nargs="+", default=[1], metavar="S")
    add("--backbone", f"a weight file or one of {', '.join(clip_model.MODELS)} (RN50, or what --load was learned for)")
    add("--M", "number of context vectors, the paper's M", type=integer, nargs="+", default=[16])
    add("--position", "where the class name stands", choices=POSITIONS, nargs="+", default=["end"])
    add("--csc", "class-specific contexts", choices=list(CSC), nargs="?", const="yes", default="no")
    add("--init", 'start V from these words, "a photo of a", instead of noise; sets M', metavar="WORDS")
    add("--epochs", "passes over the images (1 shot, ImageNet: 50; up to 4: 100; else 200)", type=integer, metavar="T")
    add("--views", "reuse V crops per image; 0: fresh ones, as the paper", type=integer, default=0, metavar="V")
    add("--template", "zero-shot prompt with {} for the class name (the dataset's)")
    add("--device", "where to compute", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", "of the image encoder (fp32 on CPU, fp16 on CUDA)", choices=list(PRECISIONS))
    add("--classes", "the first half of the classes, or the rest; a unified V learned on base is tested on both",
        choices=CLASSES, default="all")
    add("--probe", "also a linear probe on the image features (right labels, whatever --noise)", action="store_true")
    add("--plot", "accuracy against shots as a picture in --out (needs matplotlib)", action="store_true")
    add("--loss", "cross-entropy, or generalised: for wrong labels", choices=list(LOSSES), default="ce")
    add("--noise", "make this share of the training labels wrong", type=float, default=0.0, metavar="SHARE")
    add("--keep", "stay near the hand-written prompt's features (KgCoOp: 8)", type=float, default=0.0, metavar="WEIGHT")
    add("--again", "repeat runs whose result is known", action="store_true")
    add("--load", "use a learned prompt: with --data, --predict, --export or --words", type=Path, metavar="PROMPT")
    add("--predict", "the likeliest classes of pictures, or of all pictures in folders", nargs="+", metavar="IMAGE")
    add("--json", "--predict as JSON lines", action="store_true")
    add("--export", "text features and constants, enough for numpy", type=Path, metavar="FILE.npz")
    add("--words", "the N vocabulary entries nearest to each context vector", type=integer, metavar="N")
    add("--out", "results.jsonl and the learned prompts", type=Path, default=Path("runs"), metavar="DIR")
    add("--cache", "image features; the demo", type=Path, default=Path.home() / ".cache" / "coop", metavar="DIR")
    add("--no-cache", "encode all images again and keep nothing", action="store_true")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")           # one line
    args = parser.parse_args(argv)
    use = args.predict or args.export or args.words
    for wrong, message in (
            (not (args.data or args.demo or args.load), "one of --data, --demo and --load is needed"),
            (args.data and args.demo, "--demo brings its own --data"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no CUDA device here"),
            (args.demo and args.backbone, "--demo trains a model of its own: leave out --backbone"),
            (use and not args.load, "--predict, --export and --words need --load PROMPT"),
            (args.load and not (args.data or args.demo or use), "--load needs --data, --predict, --export or --words"),
            (args.load and (args.plot or args.probe), "--plot and --probe go with training, not with --load"),
            (args.json and not args.predict, "--json goes with --predict"),
            (args.plot and not find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib"),
            (not 0 <= args.noise <= 1, "--noise is a share between 0 and 1"),
            (not 0 <= args.keep < math.inf, "--keep is a weight of 0 or more"),
            (0 in (args.epochs, args.words, *args.M), "--M, --epochs and --words are 1 or more"),
            (args.template is not None and "{}" not in args.template, "--template needs {} where the class name goes"),
            ("TORCHELASTIC_RUN_ID" in os.environ and (args.no_cache or args.load),
             "torchrun is for learning, with image features shared through the cache: no --load, no --no-cache")):
        if wrong:
            parser.error(message)
    args.M = args.M if args.init is None else args.M[:1]                 # the words of --init set M
    for key in ("M", "position", "shots", "seeds"):                      # named twice is still one run
        setattr(args, key, list(dict.fromkeys(getattr(args, key))))
    args.csc = CSC[args.csc]
    args.precision = args.precision or ("fp16" if args.device == "cuda" else "fp32")
    return args


def main(argv=None):
    """The command line. A user's mistake ends in one line and exit code 2, Ctrl-C in one line and 130."""
    try:
        args = parse(argv)
        args.rank, args.world = 0, 1
        if "TORCHELASTIC_RUN_ID" in os.environ:          # set by torchrun; gloo does, as they only wait for each other
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=9))
            args.rank, args.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            if args.device == "cuda":
                torch.cuda.set_device(args.rank % torch.cuda.device_count())
        with contextlib.redirect_stdout(None) if args.rank else contextlib.nullcontext():
            run(args)
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")             # class names in any script, terminals of few
    main()
