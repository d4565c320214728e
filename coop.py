"""Learn the words of a CLIP prompt from a few images per class: CoOp, arXiv 2109.01134.

    python coop.py --demo                                # nothing to download: two minutes on a laptop
    python coop.py --data ./dtd --shots 4                # your folder of images, CPU or CUDA
    python coop.py --data ./dtd --shots 1 2 4 8 16 --seeds 1 2 3

CLIP sorts a picture into K classes by comparing its features f with the features of K sentences,
"a photo of a cat." and so on. Which words stand around the class name matters by several points
and nobody knows why. CoOp lets gradient descent choose them: M vectors V take the place of the
words, and the few labelled images say which V are good. Everything else in CLIP stays frozen.

Paper -> code: K classes; M context vectors V (M, d), or (K, M, d) with one context per class (csc);
t_i the prompt of class i; g its text features; f image features; tau = 1 / exp(logit_scale) the
temperature; d token width; e embedding width; T epochs, n the epoch; N training images.

Know before: what CLIP's two encoders do (clip_model.py, first two screens), and SGD in PyTorch.
To take away: a prompt is a short list of vectors like any other parameter; what it learns is the
same for all images, so at test time g is computed once and a prediction costs one image encoding.

Read in this order: PromptLearner, train, evaluate: that is the method. Then, if you want to know how
a folder becomes a table: image_features, Experiment.coop, run and main.
"""
import argparse
import collections
import contextlib
import datetime
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import random
import re
import statistics
import sys
import time
import zlib

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

    Paper equations 2 (position "end"), 3 ("middle": half of V before the name, half after) and
    class-specific contexts (csc); "front" is the official code's third. init: words whose token embeddings
    V starts from (M is then their number of tokens); None draws N(0, 0.02^2) from torch's global
    generator. Raises ValueError if a prompt is longer than CLIP reads.

    Why this can work: a word enters CLIP as a row of the token embedding, d numbers; nothing behind
    that table asks whether the numbers came out of it. A word can only be chosen, a vector can be learned.
    """

    def __init__(self, clip, tokenizer, classnames, M=16, position="end", csc=False, init=None):
        super().__init__()
        K, embedding = len(classnames), clip.token_embedding.weight.detach()      # (vocabulary, d)
        if init is not None:
            words = tokenizer.encode(init.replace("_", " "))
            M = len(words)
        if tokenizer.vocab_size != clip.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, this CLIP {clip.vocab_size} token embeddings: no pair")
        if M < 1:
            raise ValueError("no context to learn: M must be at least 1, and --init must hold a word")

        names = [name.replace("_", " ") for name in classnames]
        length = {name: len(tokenizer.encode(name)) for name in names}
        longest = max(names, key=length.get)
        needed = 1 + M + length[longest] + 2                                     # sot, V, name, full stop and eot
        if needed > clip.context_length:
            raise ValueError(f"class name {longest!r} is too long or M is too large: {length[longest]} tokens and M = {M} make "
                             f"a prompt of {needed}, the model reads {clip.context_length}")

        # end:     sot V1 V2 V3 V4 polka - dotted . eot        sot, eot: start and end of text
        # middle:  sot V1 V2 polka - dotted V3 V4 . eot
        # front:   sot polka - dotted V1 V2 V3 V4 . eot
        # Written as numbers: a token id, or vocab_size + m for the place of vector V_m.
        prompts, before = [], {"end": M, "middle": M // 2, "front": 0}[position]         # vectors before the name
        for i, name in enumerate(names):
            # The name is encoded with its full stop, as in the sentence: at its border the two might merge.
            ids, cut = tokenizer.encode(name + "."), length[name]
            places = [clip.vocab_size + (i * M if csc else 0) + m for m in range(M)]
            prompts.append([tokenizer.sot, *places[:before], *ids[:cut], *places[before:], *ids[cut:], tokenizer.eot])
        # What all prompts begin with, P tokens, is not computed K times: 1 + M at the end, 1 + M // 2 in the middle; at
        # the front, and where each class has vectors of its own, sot alone. The less they share, the longer a step.
        P = 1 if csc else 1 + before
        self.lengths = torch.tensor([len(prompt) - P for prompt in prompts])

        # A prompt is now a list of numbers. forward() looks them up in a small bank: one row for each token id that
        # occurs, then the rows of V. As unique() sorts, ids come before places of V, and `rows` says of each
        # number which row of the bank it is.
        packed = prompts[0][:P] + [number for prompt in prompts for number in prompt[P:]]
        used, rows = torch.unique(torch.tensor(packed), return_inverse=True)
        self.register_buffer("shared_rows", rows[:P].to(embedding.device))
        self.register_buffer("own_rows", rows[P:].to(embedding.device))
        self.register_buffer("fixed", embedding[used[used < clip.vocab_size].to(embedding.device)])
        V = torch.randn((K, M, embedding.shape[1]) if csc else (M, embedding.shape[1])) * 0.02
        if init is not None:
            V = embedding[torch.tensor(words, device=embedding.device)].expand(V.shape).clone()
        self.V = nn.Parameter(V.to(embedding))           # fp32 as the text encoder: in fp16 small steps would be lost

    def forward(self):
        """-> shared (P, d), own (sum of lengths, d), lengths (K,): what CLIP.encode_prompts takes.

        DTD with RN50, K = 47, M = 16, end: shared (17, 512), own (186, 512), lengths (47,) of 3 to 5 (name, full
        stop, eot); g is then (47, 1024), e being 1024. With csc: shared (1, 512), own (186 + 47 * 16, 512).
        """
        bank = torch.cat([self.fixed, self.V.flatten(0, -2)])
        return bank[self.shared_rows], bank[self.own_rows], self.lengths


def batches(N, T, seed, size=32):
    """T lists of index tensors: every epoch a new shuffle of N images, cut into batches. What is left
    over is dropped, as a step on a few images would move V as far as one on 32 and in a worse direction,
    unless it is all there is: N < size gives one batch of N.
    """
    dice = torch.Generator().manual_seed(seed)
    return [[b for b in torch.randperm(N, generator=dice).split(size) if len(b) == min(N, size)] for _ in range(T)]


def learning_rate(n, T):
    """The official schedule: one epoch of warm-up at 1e-5, meant to keep the first gradients, taken far from
    any good V, from throwing it off; then a cosine from 0.002. Odd, and kept: the warm-up is not a rise
    but a constant; momentum carries its gradients into the next epoch all the same; and it counts as
    one of the T, so that the cosine stops short of zero, at an angle of pi (T - 2) / T.
    """
    return 1e-5 if n == 0 else 0.001 * (1 + math.cos(math.pi * (n - 1) / T))


def train(clip, learner, features, labels, T, seed=1, loss=F.cross_entropy, keep=0.0, hand=None,
          progress=lambda n, loss, accuracy: None):
    """Learn V by the paper's recipe; the result is V of the last epoch, in learner. If you change the recipe,
    give the command --again or another --out: what results.jsonl knows is not run again.

    features: (N, crops, e); features[i, n % crops] belongs to the crop that epoch n shows of image i,
    computed beforehand: the image encoder is frozen, so f does not change while V does. labels: (N,).
    seed: of the batches; training_features, given the same, computes just the crops that they use.
    loss, keep, hand: not the paper's, see README "Beyond the paper"; hand (K, e) are the features of
    hand-written prompts, of unit length. Raises ValueError when the loss is not a number.

    "The gradient flows through a frozen encoder": backward() goes from the loss through g and every
    layer of the text encoder down to V, multiplying by the layers' weights on its way. Frozen means
    that no gradient with respect to those weights is computed and no step changes them. The
    temperature is CLIP's, learned in its pretraining, and frozen too.
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
                value = value + keep * (1 - (g * hand).sum(-1).mean())           # KgCoOp: g near that of hand-written words
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
    """Percent of the images (N, e) whose nearest text (K, e), by cosine, is that of their label (N,). The
    temperature plays no part here: it says how sure a prediction is, not which class is ahead; nor do the
    exponential, which keeps the order, and the sum below it, which is the same for all classes.
    """
    f, g = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    return 100 * ((f @ g.T).argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def zero_shot(clip, tokenizer, template, classnames):
    """Features (K, e), not yet of unit length, of hand-written prompts: names put into "a photo of a {}."."""
    texts = [template.replace("{}", name.replace("_", " ")) for name in classnames]
    return torch.cat([clip.encode_text(tokenizer(texts[i:i + 256], clip.context_length).to(clip.device))
                      for i in range(0, len(texts), 256)])


# ---- The method ends here; what follows brings images in and results out -------------------------
#
# Images come in as features: the image encoder is frozen, so each crop need go through it but once, and
# train() reads the result. That is also what makes a sweep cheap: another M, position or loss asks
# for the same crops and finds them in the cache. So each test image goes through the image encoder
# once per backbone, not once per run; each run encodes its K prompts once to be tested.

def progress_line(what, total, advice=""):
    """-> say(done, note): how far long work is and how long it will still take, a line every few seconds,
    then more rarely. advice: added once if that is more than five minutes.
    """
    start = said = time.time()

    def say(done, note=""):
        nonlocal said, advice
        now = time.time()
        if now - said > max(5, 0.1 * (now - start)):
            said, left = now, (now - start) / done * (total - done)
            print(f"{what}: {done} of {total}{note}, {left:.0f} s left", file=sys.stderr, flush=True)
            if left > 300 and advice:
                print(f"note: {left / 60:.0f} more minutes; {advice}", file=sys.stderr)
                advice = ""
    return say


def image_features(clip, jobs, cache=None, what="encoding crops", advice=""):
    """Features (number of crops, e) fp32 on the CPU of jobs [(path, [crop number, ...]), ...], in order.

    What the cache (data.FeatureCache) holds is not computed again; what is computed is put there as
    soon as an image is complete. Crops are decoded by threads while the encoder works, and encoded in
    batches of one size whatever image they come from.
    """
    # Measured on CPU: a ResNet is fastest when the layers of one batch stay in the processor's caches, a ViT,
    # which is matrix products throughout, with larger ones. A GPU wants to be filled.
    size = 256 if clip.device.type == "cuda" else 8 if isinstance(clip.visual, clip_model.ModifiedResNet) else 32
    features = torch.empty(sum(len(numbers) for _, numbers in jobs), clip.text_projection.shape[1])
    missing, rows, row = [], [], 0                       # rows: where the features of the missing crops go
    files = {path: cache.file(path) for path, _ in jobs} if cache else {}        # before decoding: a picture may be replaced meanwhile
    for path, numbers in jobs:
        known = cache.get(files[path]) if cache else {}
        missing.append((path, [n for n in numbers if n not in known]))
        for n in numbers:
            if n in known:
                features[row] = torch.from_numpy(known[n])
            else:
                rows.append(row)
            row += 1

    found, fresh, say = data.crops(missing, clip.resolution), {}, progress_line(what, len(rows), advice)
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            paths, numbers, pixels = zip(*itertools.islice(found, size))
            f = clip.encode_image(data.normalise(torch.from_numpy(np.stack(pixels)).to(clip.device))).float().cpu()
            if not f.isfinite().all():
                raise ValueError(f"features of {paths[0]} or its neighbours are not numbers: damaged weights, or this --precision")
            features[rows[start:start + size]] = f
            for path, n, vector in zip(paths, numbers, f.numpy()) if cache else ():
                fresh.setdefault(path, {})[n] = vector
            # Images are complete but for the last one, of which more crops may come, unless this was the last batch.
            for path in list(fresh)[:-1 if start + size < len(rows) else None]:
                cache.put(files[path], fresh.pop(path))
            say(start + len(paths))
    return features


def training_jobs(items, T, views=0, seed=1):
    """The crops that train() reads, [(path, [n, ...]), ...]: not all, as each epoch drops an incomplete batch."""
    needed = [set() for _ in items]
    for n, epoch in enumerate(batches(len(items), T, seed)):
        for i in torch.cat(epoch).tolist():
            needed[i].add(n % (views or T))
    return [(path, sorted(numbers)) for (path, _), numbers in zip(items, needed)]


def training_features(clip, items, T, views=0, seed=1, cache=None):
    """Features (N, crops, e) of the crops that train() reads, crops = min(views or T, T). Of the others, NaN:
    should train() ever read one, it would stop and say so instead of learning from a wrong picture.
    """
    jobs, crops = training_jobs(items, T, views, seed), min(views or T, T)
    features = torch.full((len(items), crops, clip.text_projection.shape[1]), float("nan"))
    advice = f"--views 10 would encode at most {10 * len(items)} crops instead (approximate, see README)" if crops > 10 else ""
    i, n = zip(*((i, n) for i, (_, numbers) in enumerate(jobs) for n in numbers))
    features[i, n] = image_features(clip, jobs, cache, advice=advice)
    return features


def generalised_cross_entropy(logits, labels, q=0.5):
    """(1 - p^q) / q, p the probability of the label (arXiv 1805.07836): between cross-entropy (q -> 0) and
    1 - p (q = 1), nearly the share of mistakes, so that a wrong label, which stays improbable, pulls less.
    """
    log_p = logits.log_softmax(-1).gather(1, labels[:, None])
    return (-torch.expm1(q * log_p) / q).mean()          # as p^q - 1, but with a gradient also where p is 0


def search_C(accuracy):
    """The C with the best accuracy(C) by the official code's search: the best of seven powers of a hundred,
    then eight halvings of [C / 10, 10 C] in log space, each keeping the half at the better end. Of equals,
    which are frequent with the few validation images, the largest of the seven and then the lower end.
    """
    low = max((6, 4, 2, 0, -2, -4, -6), key=lambda exponent: accuracy(10.0 ** exponent)) - 1
    high = low + 2
    for _ in range(8):
        middle, up = (low + high) / 2, accuracy(10.0 ** low) < accuracy(10.0 ** high)
        best, low, high = (high, middle, high) if up else (low, low, middle)
    return 10.0 ** best


def linear_probe(train, val):
    """The paper's other baseline: multinomial logistic regression on pairs (features, labels), with
    scikit-learn's objective, 1/2 |W|^2 + C * sum of losses, in float64 by L-BFGS; C by accuracy on val.
    -> weights (K, e), biases (K,), C. Divided by C * N it is the mean loss and |W|^2 / (2 C N), as below; the
    features are not of unit length here, as in the official code, so C is not comparable across backbones.

    It knows nothing of the class names: each class is a free vector, where CoOp must find one that
    the text encoder can say. On DTD, in the paper, that costs it 15 points with one image and none with 16.
    """
    (f, labels), K = (train[0].double(), train[1]), int(train[1].max()) + 1

    @functools.cache
    def fit(C):
        # From zero, as the loss is convex: wherever the search starts, it ends at the same optimum. The last column
        # is the bias, which is not held small.
        W = torch.zeros(K, f.shape[1] + 1, dtype=f.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([W], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(f, W[:, :-1], W[:, -1]), labels) + W[:, :-1].square().sum() / (2 * C * len(f))
            value.backward()
            return value

        optimizer.step(loss)
        W, b = W.detach()[:, :-1], W.detach()[:, -1]
        return W, b, (F.linear(val[0].double(), W, b).argmax(-1) == val[1]).sum().item()

    C = search_C(lambda C: fit(C)[2])
    return *fit(C)[:2], C


# ---- Results and prompts ------------------------------------------------------------------------
#
# A run of CoOp leaves two things: its prompt, a file that is whole or not there, and then a line in
# results.jsonl. So a run with a line has had a whole prompt, and one that was killed has no line and is run again.
#
#     {"method": "coop", "shots": 16, "seed": 1, "classes": "all", "n_test": 800, "M": 16, "position": "end",
#      "csc": false, "epochs": 200, "views": 0, "dataset": "demo", ..., "accuracy": 74.5}
#
# All of a line but what was measured is the name of the run, in effect: it decides whether a result is known.

class Results:
    """<out>/results.jsonl: one JSON object per result, appended the moment that it is known."""

    # Runs are the same when all else in their lines is: who changes the method adds a setting (or gives --again), or
    # old runs are "known". Device and version of torch are told, but count as the same; --precision does not.
    MEASURED = frozenset(("accuracy", "C", "n_test", "seconds_images", "seconds_training", "device", "torch"))

    def __init__(self, out):
        self.file, self.lines = out / "results.jsonl", []
        for text in self.file.read_text(encoding="utf-8", errors="replace").splitlines() if self.file.is_file() else []:
            with contextlib.suppress(ValueError):        # a line that a crash cut off counts as absent
                line = json.loads(text)
                self.lines += [line] if isinstance(line, dict) and "accuracy" in line else []

    def same(self, a, b):
        """Whether two results come from the same settings."""
        return all(a.get(key) == b.get(key) for key in (a.keys() | b.keys()) - self.MEASURED)

    def find(self, result):
        """The last line with the same settings, or None."""
        return next((line for line in reversed(self.lines) if self.same(line, result)), None)

    def add(self, results):
        """Append lines in one write, as other processes may append, too; after a torn line on a line of their own."""
        self.lines += results
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + b"".join(json.dumps(result).encode() + b"\n" for result in results))


USUAL = {"M": 16, "position": "end", "csc": False, "init": None, "views": 0, "loss": "ce", "noise": 0, "keep": 0}      # the paper's


def load_prompt(path):
    """A prompt saved by us, or by the official code (prompt_learner/model.pth.tar-N, which tells neither
    class names nor settings). -> {"V", "classnames", "settings"}, from us also "text_features" (K, e) of unit
    length, "logit_scale", "resolution" and "path" of the backbone. ValueError for anything else.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    prompt, tensors = clip_model.read_archive(path)
    try:
        prompt = {**prompt, **tensors}
        if "state_dict" in prompt:
            prompt = {"V": tensors["state_dict.ctx"], "classnames": None, "settings": {}}
        V, names, settings = prompt["V"], prompt["classnames"], prompt["settings"]
        sound = (V.dim() in (2, 3) and V.numel() and V.isfinite().all() and json.dumps(settings)
                 and settings.get("position", "end") in ("end", "middle", "front") and isinstance(settings.get("shots", 0), int))
        if names is not None:                            # ours
            g, scale = prompt["text_features"], prompt["logit_scale"]
            sound = (sound and names == [str(name) for name in names] and g.dim() == 2 and len(g) == len(names) and g.isfinite().all()
                     and V.shape[:-2] in ((), g.shape[:1]) and scale.dim() == 0 and scale.isfinite()
                     and isinstance(prompt["resolution"], int) and isinstance(prompt["path"], str))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path} holds no learned prompt (expected a file written by this program or by the official code)")
    told = {"M": V.shape[-2], "csc": V.dim() == 3, "position": None, "shots": None, "seed": None, "epochs": None, "dataset": None}
    return {**prompt, "V": V.float(), "settings": {**USUAL, **told, **settings}}


def saved_settings(path):
    """The settings of the run that left its prompt at path; {} if there is none, or a damaged one."""
    try:
        return load_prompt(path)["settings"]
    except (ValueError, OSError):
        return {}


def unusual(r):
    """In which settings a run of CoOp differs from the paper's standard: ["M=4", "csc", "epochs=20"]. Tables
    and file names tell these only, so that the usual ones stay short and a new setting changes none of them.
    """
    usual = {**USUAL, "epochs": epochs(r["shots"] or 0, r["dataset"]), "classes": "all",
             "precision": "fp16" if r["device"] == "cuda" else "fp32"}
    return [key if r[key] is True else f"{key}={r[key]}" for key in usual if r.get(key) not in (usual[key], None)]


def file_name(r):
    """<dataset>-<backbone>-<shots>shot-seed<seed>, then what is unusual, in characters and a length that every
    system takes; a number stands for what is too long.
    """
    name = "-".join([r["dataset"], r["backbone"], f"{r['shots']}shot", f"seed{r['seed']}", *unusual(r)])
    name = re.sub(r"[^\w.=-]+", "-", name).encode()
    return (name if len(name) <= 200 else name[:190] + b"-%08x" % zlib.crc32(name)).decode(errors="ignore") + ".pt"


def row_name(r):
    """What a result is called in the table and in the picture."""
    words = unusual(r) if r["method"] == "coop" else [f"classes={r['classes']}"] * (r["classes"] != "all")
    head = ["CoOp", f"M={r['M']}", f"{r['position']}"] if r["method"] == "coop" else [r["method"]]
    return " ".join(head + [word for word in words if not word.startswith(("M=", "position="))])


# The paper's numbers for RN50: how many test images its split has, then accuracy of zero-shot CLIP and of CoOp with M=16,
# end, at 1, 2, 4, 8 and 16 shots. The first number keeps them from being compared with a part of the dataset.
PAPER = {
    "oxford_pets": (3669, 85.77, 85.89, 82.64, 86.70, 85.32, 87.01), "oxford_flowers": (2463, 66.14, 68.12, 77.51, 86.20, 91.18, 94.51),
    "fgvc_aircraft": (3333, 17.28, 9.64, 18.68, 21.87, 26.13, 31.26), "dtd": (1692, 42.32, 44.39, 45.15, 53.49, 59.97, 63.58),
    "eurosat": (8100, 37.56, 50.63, 61.50, 70.18, 76.73, 83.53), "stanford_cars": (8041, 55.61, 55.59, 58.28, 62.62, 68.43, 73.36),
    "food-101": (30300, 77.31, 74.32, 72.49, 73.33, 71.82, 74.67), "sun397": (19850, 58.52, 60.29, 59.48, 63.47, 65.52, 69.26),
    "caltech-101": (2465, 86.29, 87.53, 87.93, 89.55, 90.21, 91.83), "ucf101": (3783, 61.46, 61.92, 64.09, 67.03, 71.94, 75.71),
    "imagenet": (50000, 58.18, 57.15, 57.81, 59.99, 61.56, 62.95)}


def cells(results):
    """{row name: {shots: (mean over seeds, standard deviation or None)}}; where the paper has numbers for
    this dataset and these weights, they are a row of their own.
    """
    found = {}
    for r in results:
        found.setdefault(row_name(r), {}).setdefault(r["shots"], []).append(r["accuracy"])
    rows = {row: {shots: (statistics.mean(a), statistics.stdev(a) if len(a) > 1 else None) for shots, a in of_row.items()}
            for row, of_row in found.items()}
    first = results[0]
    n_test, *numbers = PAPER.get(first["dataset"], (None,))
    if n_test == first["n_test"] and clip_model.MODELS["RN50"][1].startswith(first["weights"]):
        numbers = dict(zip((0, 1, 2, 4, 8, 16), numbers))
        rows["the paper's zero-shot, M=16 end"] = {r["shots"]: (numbers[r["shots"]], None) for r in results if r["shots"] in numbers}
    return rows


def table(results):
    """Accuracy by method and number of shots, mean over seeds ± standard deviation."""
    rows, columns = cells(results), sorted({r["shots"] for r in results})
    width = max(34, *map(len, rows))
    lines = [f"{'accuracy, %':<{width}}" + "".join(f"{f'{c} shots':>15}" for c in columns)]
    for row, found in rows.items():
        texts = {c: f"{mean:.2f}" + (f" ± {spread:.2f}" if spread is not None else "") for c, (mean, spread) in found.items()}
        lines.append(f"{row:<{width}}" + "".join(f"{texts.get(c, ''):>15}" for c in columns))
    return "\n".join(lines)


def plot(results, file):
    """The paper's figure 3: accuracy against shots, zero-shot as a star, the spread over seeds as a band."""
    # The one optional package; parse() looks for it. Without its pyplot, which would look for a screen.
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, found in cells(results).items():
        shots = sorted(found)
        mean, spread = np.array([[found[c][0], found[c][1] or 0] for c in shots]).T
        line, = axes.plot(shots, mean, {"zero-shot": "*", "linear-probe": "o--"}.get(row.split(" ")[0], "o-"), label=row,
                          markersize=12 if row.startswith("zero-shot") else 5)
        axes.fill_between(shots, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="labelled images per class", ylabel="accuracy on the test images, %", title=results[0]["dataset"],
             xticks=sorted({r["shots"] for r in results}))
    axes.grid(alpha=0.3)
    axes.legend()
    write(file, lambda content: figure.savefig(content, dpi=150))


# ---- Experiments --------------------------------------------------------------------------------
#
# What the paper measures, method by method. Test features are computed once and serve all of them.
#
# A method names its settings (line), says how it measures (measure), and leaves it to once() whether that
# is needed. To add one, write it beside the others, and put it into the grid in run().

def epochs(shots, dataset):
    """T by the paper: 50 for one shot and for ImageNet, 100 for 2 and 4, 200 for 8 and 16."""
    return 50 if shots <= 1 or dataset == "imagenet" else 100 if shots <= 4 else 200


def learned_features(clip, tokenizer, classnames, V, position):
    """Features (K, e), of unit length, of learned prompts; a unified V (M, d) takes any class names.

    Everything learned is in V: whoever adds a second parameter hands it on here, in Experiment.coop, which
    saves it, in load_prompt, and to the optimizer in train.
    """
    learner = PromptLearner(clip, tokenizer, classnames, V.shape[-2], position, V.dim() == 3)
    learner.V.data.copy_(V)
    with torch.no_grad():
        return F.normalize(clip.encode_prompts(*learner()), dim=-1)


def open_clip(args):
    """The model of --backbone, made fast, and its tokenizer: OpenAI's, or plain bytes for a model with as few
    token embeddings as the demo's. The number of embeddings is all that tells which tokenizer a model was
    trained with; with the wrong one every prompt would be another sentence, and nothing would fail.
    """
    torch.backends.cuda.matmul.allow_tf32 = True         # text encoder on CUDA: fp32 with TF32 products
    clip = clip_model.prepare(clip_model.load(args.backbone, args.device), PRECISIONS[args.precision])
    tokenizer = Tokenizer()                              # bytes, as the demo's small CLIP
    if clip.vocab_size != tokenizer.vocab_size:
        tokenizer = Tokenizer.openai()
    if clip.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{args.backbone} has {clip.vocab_size} token embeddings, the tokenizer {tokenizer.vocab_size} ids")
    return clip, tokenizer


class Experiment:
    """One dataset and one CLIP, and what all runs on them share: test features, cache, results. zero_shot,
    probe, coop and transfer each make one run and return its lines for results.jsonl.
    """

    def __init__(self, args, dataset, clip, tokenizer):
        self.args, self.dataset, self.clip, self.tokenizer, self.results = args, dataset, clip, tokenizer, Results(args.out)
        self.names, self.template = dataset.classnames, args.template or dataset.template
        self.seconds = 0.0                               # spent on the test images
        weights = clip.sha256[:16]
        backbone = args.backbone.replace("/", "-") if args.backbone in clip_model.MODELS else pathlib.Path(args.backbone).stem
        self.cache = None if args.no_cache else data.FeatureCache(args.cache / "features" / f"{weights}-{args.precision}")
        # What all lines of this experiment have in common. Datasets are told apart by the names of their images and
        # classes, wherever they lie; weights by their checksum, as two files may share a name.
        parts = [[(pathlib.Path(path).parts[-2:], label) for path, label in part] for part in (dataset.train, dataset.val, dataset.test)]
        images = zlib.crc32(repr((self.names, parts)).encode(errors="replace"))
        self.common = {"dataset": dataset.name, "images": f"{images:08x}", "backbone": backbone, "weights": weights,
                       "precision": args.precision, "device": args.device, "torch": str(torch.__version__)}

        size = sum(p.numel() for p in clip.parameters()) / 1e6
        print(f"CLIP {backbone} on {args.device}: {size:.1f} M parameters, all frozen; images in {args.precision}")
        print(f"{dataset.name}: K = {len(self.names)} classes, {len(dataset.train)} training and {len(dataset.test)} test images")
        if self.cache:
            size = sum(file.stat().st_size for file in self.cache.folder.glob("*.npz"))
            print(f"feature cache: {self.cache.folder}, {size / 2 ** 20:.0f} MB")
        if args.load or not max(args.shots):
            return
        if not dataset.train:
            raise ValueError(f"{args.data} has test images only: use --shots 0, or --load a learned prompt")
        # A class name that is too long should be found now, not after an hour of encoding: every learner is built
        # once for all names, as a prompt may be tested on all, and once for those that it will learn on.
        for names in (self.names, self.names_of(args.classes)):
            learners = [PromptLearner(clip, tokenizer, names, M, position, csc, args.init)
                        for M, position, csc in itertools.product(args.M, args.position, args.csc)]
        shapes = dict.fromkeys(f"{tuple(learner.V.shape)}, {learner.V.numel():,} numbers" for learner in learners)
        print(f"to learn: V {' or '.join(shapes)}; shots {args.shots}, seeds {args.seeds}, epochs {args.epochs or 'by shots, as the paper'}, "
              + (f"{args.views} crops per image" if args.views else "a fresh crop every epoch"))
        smallest = min(collections.Counter(label for _, label in dataset.train).values())
        if smallest < max(args.shots):
            print(f"note: a class with fewer training images than --shots gives all it has (the smallest: {smallest}; "
                  "of class folders without train/ and test/, half of the images are for training)")

    def encode(self, items):
        """Features (N, e) of the test crops of items, and their labels (N,)."""
        return (image_features(self.clip, [(path, [TEST]) for path, _ in items], self.cache, "encoding images"),
                torch.tensor([label for _, label in items]))

    @functools.cached_property
    def test(self):
        """encode() of the test images: once for all runs, when the first one asks."""
        start = time.time()
        encoded = self.encode(self.dataset.test)
        self.seconds = round(time.time() - start, 2)
        return encoded

    def names_of(self, classes):
        """Names of all, base or new classes."""
        return [self.names[label] for label in data.subset(len(self.names), classes)]

    def part(self, classes):
        """Test features of the images of these classes, and their labels, counted from 0: with half of the
        classes the other half is no possible answer either.
        """
        (f, labels), kept = self.test, torch.tensor(data.subset(len(self.names), classes))
        mine = torch.isin(labels, kept)
        return f[mine], torch.searchsorted(kept, labels[mine])

    def draw(self, shots, seed):
        """The few-shot draw from the training and from the validation images of --classes, labels counted from
        0; of the latter at most 4 per class, as the official code.
        """
        rng, kept = random.Random(seed), data.subset(len(self.names), self.args.classes)
        drawn = [[(path, kept.index(label)) for path, label in data.few_shot(part, count, rng) if label in kept]
                 for part, count in ((self.dataset.train, shots), (self.dataset.val, min(shots, 4)))]
        if not drawn[0]:
            raise ValueError(f"--classes {self.args.classes}: there are no training images of these classes")
        return drawn

    def line(self, method, shots, seed, classes, **more):
        """What results.jsonl says of a run, but for what only the run can tell. It holds all settings that could
        change the result: two runs with the same line are the same run.
        """
        kept = set(data.subset(len(self.names), classes))
        n_test = sum(label in kept for _, label in self.dataset.test)
        if not n_test:
            raise ValueError(f"there are no test images of the {classes} classes")
        return {"method": method, "shots": shots, "seed": seed, "classes": classes, "n_test": n_test,
                **dict.fromkeys(("M", "position", "csc", "epochs", "views")), **self.common, **more}

    def show(self, lines, note):
        """Results, on base and on new classes where there are two, to the screen -> the same lines."""
        for r in lines:
            print(row_name(r) + f", {r['shots']} shot{'s' * (r['shots'] != 1)}, seed {r['seed']}" * (r["seed"] is not None)
                  + f": {r['accuracy']:.2f} %  {note}", flush=True)
        if len(lines) > 1:
            print(f"  harmonic mean of base and new: {statistics.harmonic_mean([r['accuracy'] for r in lines]):.2f} %")
        return lines

    def once(self, lines, measure, note, saved=True):
        """Results with the settings of lines, new or known; what only a run can tell is added by measure(), which
        returns a dict for each line and a remark. It is not called if results.jsonl knows all lines and
        their prompt is saved.
        """
        known = [None if self.args.again else self.results.find(line) for line in lines]
        if all(known) and saved:
            return self.show(known, f"{note} (known; --again repeats it)".strip())
        measured, more = measure()
        lines = [{**line, "seconds_images": self.seconds, "seconds_training": 0.0, **found} for line, found in zip(lines, measured)]
        self.results.add(lines)
        return self.show(lines, note + more)

    def accuracy(self, V, position, classes):
        """Percent of the test images of these classes that prompts with this V get right, and the prompts' features."""
        g, (f, labels) = learned_features(self.clip, self.tokenizer, self.names_of(classes), V, position), self.part(classes)
        return evaluate(f, g.cpu(), labels), g

    def hand_written(self, classes):
        """Features (K, e), of unit length, of the template with these classes' names."""
        return F.normalize(zero_shot(self.clip, self.tokenizer, self.template, self.names_of(classes)), dim=-1)

    def zero_shot(self, classes):
        """CLIP as it is, with the hand-written prompt."""
        def measure():
            f, labels = self.part(classes)
            return [{"accuracy": evaluate(f, self.hand_written(classes).cpu(), labels)}], ""
        return self.once([self.line("zero-shot", 0, None, classes, template=self.template)], measure, f'"{self.template}"')

    def probe(self, shots, seed):
        """A linear classifier on the image features, test crops for training too."""
        def measure():
            (f, labels), start, drawn = self.part(self.args.classes), time.time(), self.draw(shots, seed)
            if not drawn[1]:
                raise ValueError("--probe needs validation images to choose its C, and this dataset has none")
            sets = [self.encode(items) for items in drawn]
            encoded = time.time()
            W, b, C = linear_probe(*sets)
            right = (f.double() @ W.T + b).argmax(-1) == labels
            return [{"accuracy": 100 * right.double().mean().item(), "C": C, "seconds_images": round(encoded - start, 2),
                     "seconds_training": round(time.time() - encoded, 2)}], f", C = {C:.3g}"
        return self.once([self.line("linear-probe", shots, seed, self.args.classes)], measure, "C chosen on the validation images")

    def coop(self, M, position, csc, shots, seed):
        """One run of CoOp: draw the shots, learn V, test it, save it; nothing if that is done already.

        The validation images are drawn, as the draw of the official code includes them, and not used: the
        paper's result is V of the last epoch, whatever it does on them.
        """
        args, names, T = self.args, self.names_of(self.args.classes), self.args.epochs or epochs(shots, self.dataset.name)
        torch.manual_seed(seed)
        learner = PromptLearner(self.clip, self.tokenizer, names, M, position, csc, args.init)
        # A unified V goes with names that it never saw, too: learned on base classes, it is also tested on the new ones.
        tested_on = [args.classes] + ["new"] * (args.classes == "base" and not csc)
        lines = [self.line("coop", shots, seed, classes, M=learner.V.shape[-2], position=position, csc=csc, init=args.init, epochs=T,
                           views=args.views, loss=args.loss, noise=args.noise, keep=args.keep, template=self.template if args.keep else None)
                 for classes in tested_on]
        file = args.out / file_name(lines[0])

        def measure():
            _ = self.test                                # now: a damaged test image should stop us here, not after training
            start, (items, _) = time.time(), self.draw(shots, seed)
            features = training_features(self.clip, items, T, args.views, seed, self.cache).to(self.clip.device)
            labels = torch.tensor(data.mislabel([label for _, label in items], args.noise, len(names), seed), device=self.clip.device)
            hand = self.hand_written(args.classes) if args.keep else None
            encoded, say = time.time(), progress_line("learning V, epochs", T)
            train(self.clip, learner, features, labels, T, seed, LOSSES[args.loss], args.keep, hand,
                  lambda n, loss, accuracy: say(n + 1, f", loss {loss:.3f}, training accuracy {accuracy:.0f} %"))
            seconds = {"seconds_images": round(encoded - start, 2), "seconds_training": round(time.time() - encoded, 2)}
            V = learner.V.detach()
            tests = [self.accuracy(V, position, classes) for classes in tested_on]
            measured = [{**seconds, "accuracy": accuracy} for accuracy, _ in tests]
            write(file, lambda content: torch.save({
                "V": V.cpu(), "classnames": names, "text_features": tests[0][1].cpu(), "logit_scale": self.clip.logit_scale.cpu(),
                "resolution": self.clip.resolution, "path": str(args.backbone), "settings": {**lines[0], **measured[0]}}, content))
            return measured, f"images {seconds['seconds_images']:.1f} s, training {seconds['seconds_training']:.1f} s -> {file}"
        # A prompt of that name may be lost, or from other images or weights: then the run is repeated.
        return self.once(lines, measure, "", self.results.same(saved_settings(file), lines[0]))

    def transfer(self, prompt, classes):
        """A learned prompt on this dataset, without training: a unified V goes with any class names, as "a photo
        of a" does; contexts that belong to classes go with those classes only, in any order.
        """
        names, known, old, V = self.names_of(classes), prompt["classnames"], prompt["settings"], prompt["V"]
        if V.dim() == 3:
            strangers = sorted(set(names) - set(known or names))
            if strangers or len(V) != len(known or names):
                raise ValueError(f"{self.args.load} has a context for each of its own {len(V)} classes and none for "
                                 f"{strangers[0] if strangers else 'others'!r}; only a unified prompt goes with other classes")
            V = V[[known.index(name) for name in names]] if known and known != names else V
        position = old["position"] or self.args.position[0]
        # The line tells how V was learned and where it was tested, and a checksum of V: a prompt that was learned
        # anew may have the same name and settings.
        line = {**old, **self.line("coop", old["shots"], old["seed"], classes, prompt=str(self.args.load), learned_on=old["dataset"],
                                   V=f"{zlib.crc32(prompt['V'].numpy().tobytes()):08x}",
                                   **{key: old[key] for key in ("M", "csc", "epochs", "views")}, position=position)}
        return self.once([line], lambda: ([{"accuracy": self.accuracy(V, position, classes)[0]}], ""), f"learned on {old['dataset']}")


# ---- Using a learned prompt ---------------------------------------------------------------------

def predict(prompt, clip, paths, as_json):
    """The five likeliest classes, with probabilities (equation 1), of each picture in files and folders.
    They are probabilities among these K names: a picture of something else gets one of them, too.
    The text features come with the prompt, so no text is encoded here: one pass of the image encoder each.
    Pictures that cannot be read do not stop the others; they are named at the end (ValueError).
    """
    def encoded(files):
        """(file, features (e,)) of those that can be read; where one cannot, each is tried for itself."""
        try:
            return list(zip(files, image_features(clip, [(file, [TEST]) for file in files]).to(g.device)))
        except ValueError as error:
            if len(files) == 1:
                unreadable.append(error)
            return [pair for file in files for pair in encoded([file])] if len(files) > 1 else []

    g, names, unreadable, found = prompt["text_features"].to(clip.device), prompt["classnames"], [], []
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        found.append(filter(data.is_image, sorted(path.rglob("*"))) if path.is_dir() else [path])
    files, answered = itertools.chain(*found), 0
    while chunk := list(itertools.islice(files, 32)):    # a folder of thousands streams
        for file, f in encoded(chunk):
            answered += 1
            chances = (clip.logit_scale.exp() * F.normalize(f, dim=-1) @ g.T).softmax(-1)
            best = [(names[i], round(chances[i].item(), 4)) for i in chances.topk(min(5, len(names))).indices.tolist()]
            print(json.dumps({"image": str(file), "classes": best}) if as_json else
                  f"{file}: " + ", ".join(f"{name} {100 * chance:.1f} %" for name, chance in best), flush=True)
    for error in unreadable[:-1]:
        print(f"note: {error}", file=sys.stderr)
    if unreadable or not answered:
        raise unreadable[-1] if unreadable else ValueError(f"no pictures in {', '.join(paths)}")


def export(prompt, file):
    """K text features of unit length, class names, logit_scale (1 / tau, its exponential already taken) and
    pixel constants: a classifier for numpy.
    """
    write(file, lambda content: np.savez(
        content, text_features=prompt["text_features"].numpy(), classnames=np.array(prompt["classnames"]), resolution=prompt["resolution"],
        logit_scale=prompt["logit_scale"].exp().item(), mean=data.MEAN.numpy(), std=data.STD.numpy()))
    print(f"{file}: {len(prompt['classnames'])} classes")


def nearest_words(prompt, clip, tokenizer, count):
    """For each vector of V the nearest token embeddings by Euclidean distance, as the paper's table 4.

    V moves freely between the words, so the nearest one can be far away; the paper found little to read
    in them.
    """
    embedding, V = clip.token_embedding.weight, prompt["V"].to(clip.device)
    for i, context in enumerate(V if V.dim() == 3 else V[None]):
        if V.dim() == 3:
            print(prompt["classnames"][i] if prompt["classnames"] else f"class {i}")
        # Not by way of a matrix product, |a|^2 - 2ab + |b|^2, as such small differences of large numbers lose digits.
        distances = torch.cdist(context, embedding, compute_mode="donot_use_mm_for_euclid_dist")         # (M, vocabulary)
        for m, (near, ids) in enumerate(zip(*distances.topk(min(count, len(embedding)), largest=False)), 1):
            words = [tokenizer.decode([j]).strip() for j in ids.tolist()]
            print(f"  V{m}: " + ", ".join(f"{word if word.isprintable() else repr(word)} {d:.4f}" for word, d in zip(words, near.tolist())))


def use(args):
    """What --load asks for: the accuracy on another dataset, words, predictions, an export.

    A prompt is tied to the weights it was learned for: vectors that mean "negative" to one text encoder
    mean nothing to another.
    """
    prompt = load_prompt(args.load)
    if (args.predict or args.export) and prompt["classnames"] is None:
        raise ValueError(f"{args.load} comes from the official code and tells no class names; it can be tested with --data")
    args.backbone = args.backbone or prompt.get("path")
    if args.backbone is None:
        raise ValueError(f"{args.load} does not say for which backbone it was learned: give --backbone")
    dataset, (clip, tokenizer) = data.load_dataset(args.data) if args.data else None, open_clip(args)
    d, e = clip.text_projection.shape
    # Prompts from the official code do not tell their weights; the widths are all that can be checked then.
    other_weights = prompt["settings"].get("weights", clip.sha256[:16]) != clip.sha256[:16]
    if other_weights or prompt["V"].shape[-1] != d or prompt["classnames"] and prompt["text_features"].shape[1] != e:
        raise ValueError(f"{args.load} was learned for other weights than those of {args.backbone}: give its own as --backbone")
    if dataset:
        experiment = Experiment(args, dataset, clip, tokenizer)
        experiment.zero_shot(args.classes)
        experiment.transfer(prompt, args.classes)
    if args.words:
        nearest_words(prompt, clip, tokenizer, args.words)
    if args.predict:
        predict(prompt, clip, args.predict, args.json)
    if args.export:
        export(prompt, args.export)


# ---- The command line ---------------------------------------------------------------------------

def make_demo(folder):
    """A world without downloads, made once: folder/clip.pt is a small CLIP that learned crisp pictures of
    textures, some of them negatives, and captions that mostly say so; folder/demo are pictures to
    classify, all faded negatives, which "a photo of a {} texture." does not say. CoOp has to find out.
    folder/demo-... are other pictures to test what it found on.
    """
    if not (folder / "clip.pt").is_file():
        torch.manual_seed(0)
        tokenizer, (pictures, captions), steps = Tokenizer(), data.draw_pairs(6000), 800
        clip = clip_model.CLIP(64, clip_model.ModifiedResNet(64, [1, 1, 1, 1], 16, 64), 64, 2, 77, tokenizer.vocab_size)
        clip.token_embedding.requires_grad_(False)       # so words keep the size of V's first values, as in OpenAI's CLIP
        say = progress_line("training a small CLIP on drawn textures, once", steps)
        clip_model.pretrain(clip, data.normalise(torch.from_numpy(pictures)), tokenizer(captions), steps,
                            progress=lambda step, loss: say(step + 1, f", loss {loss.item():.2f}"))
        write(folder / "clip.pt", lambda content: torch.save(clip.state_dict(), content))
    if not (folder / "demo").is_dir():                   # each is whole or not there
        data.draw_dataset(folder / "demo")
    for name, (negative, style) in data.SHIFTED.items():
        if not (folder / name).is_dir():
            data.draw_dataset(folder / name, [("test", 25)], 2, negative, style)


def run(args):
    """All that one command line asks for: with training, the grid of runs and the table.

    The grid has zero-shot first, then the probe and CoOp in each variant, for each number of shots and
    each seed. Under torchrun process r of N takes every N-th run, from the r-th on.
    """
    if args.demo:
        folder = args.cache / "demo-world"
        if args.rank == 0:
            make_demo(folder)
        args.data, args.backbone, args.template = folder / "demo", folder / "clip.pt", args.template or "a photo of a {} texture."
    if args.load:
        return use(args)
    if args.world > 1:                                   # the first process makes or downloads what is missing, the others wait
        if args.rank == 0:
            data.load_dataset(args.data)
            open_clip(args)
        torch.distributed.barrier()
    experiment = Experiment(args, data.load_dataset(args.data), *open_clip(args))
    draws = list(itertools.product([shots for shots in args.shots if shots], args.seeds))
    runs = [(experiment.zero_shot, [classes]) for classes in [args.classes] + ["new"] * (args.classes == "base")]
    runs += [(experiment.probe, draw) for draw in draws if args.probe]
    runs += [(experiment.coop, (*variant, *draw)) for variant in itertools.product(args.M, args.position, args.csc) for draw in draws]
    if args.world > 1:                                   # each process encodes its share of test images and CoOp's crops into the cache
        wanted = {path: {TEST} for path, _ in experiment.dataset.test}
        for shots, seed in draws:
            T = args.epochs or epochs(shots, experiment.dataset.name)
            for path, numbers in training_jobs(experiment.draw(shots, seed)[0], T, args.views, seed):
                wanted.setdefault(path, set()).update(numbers)
        jobs = [(path, sorted(numbers)) for path, numbers in wanted.items()][args.rank::args.world]
        for i in range(0, len(jobs), 1000):              # by and by: what is returned is not needed here
            image_features(experiment.clip, jobs[i:i + 1000], experiment.cache)
        torch.distributed.barrier()
    found = [method(*arguments) for method, arguments in runs[args.rank::args.world]]
    if args.world > 1:                                   # the table shows the runs of all
        parts = [None] * args.world
        torch.distributed.all_gather_object(parts, found)
        found = [lines for turn in itertools.zip_longest(*parts, fillvalue=[]) for lines in turn]
    results = list(itertools.chain(*found))
    print("\n" + table(results))
    if args.plot and args.rank == 0:
        plot(results, args.out / f"{experiment.dataset.name}.png")
        print(f"picture: {args.out / experiment.dataset.name}.png")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = {"ce": F.cross_entropy, "gce": generalised_cross_entropy}


def parse(argv):
    """The command line as attributes. Defaults stand here; only those that depend on the dataset or the prompt
    stand where these are known. What cannot go together is refused before anything is loaded.
    """
    def at_least(low):
        def integer(text):
            if not low <= int(text) < 2 ** 31:
                raise argparse.ArgumentTypeError(f"{text} (expected {low} or more)")
            return int(text)
        return integer

    parser = argparse.ArgumentParser(
        prog="coop.py", description="Learn the words of a CLIP prompt from a few images per class (CoOp, arXiv 2109.01134).")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=pathlib.Path, metavar="DIR", help="a dataset, or a folder of class folders")
    source.add_argument("--demo", action="store_true", help="drawn textures and a small CLIP trained here, nothing to download")
    add("--shots", type=at_least(0), nargs="+", default=[16], metavar="N", help="training images per class; 0: zero-shot only (%(default)s)")
    add("--seeds", type=at_least(0), nargs="+", default=[1], metavar="S", help="of images drawn, V's start, batches, --noise (%(default)s)")
    add("--backbone", help=f"a weight file or one of {', '.join(clip_model.MODELS)} (RN50, or what --load was learned for)")
    add("--M", type=at_least(1), nargs="+", default=[16], metavar="M", help="number of context vectors, the paper's M (%(default)s)")
    add("--position", nargs="+", default=["end"], choices=["end", "middle", "front"], help="where the class name stands (%(default)s)")
    add("--csc", choices=["yes", "no", "both"], nargs="?", const="yes", default="no", help="class-specific contexts (%(default)s)")
    add("--init", metavar="WORDS", help='start V from these words, "a photo of a", instead of noise; sets M')
    add("--epochs", type=at_least(1), metavar="T", help="passes over the images (1 shot and ImageNet: 50, up to 4: 100, else 200)")
    add("--views", type=at_least(0), default=0, metavar="V", help="reuse V crops per image; 0: fresh ones, as the paper (%(default)s)")
    add("--template", help="zero-shot prompt with {} for the class name (the dataset's)")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute (%(default)s)")
    add("--precision", choices=list(PRECISIONS), help="of the image encoder (fp32 on CPU, fp16 on CUDA)")
    add("--classes", choices=["all", "base", "new"], default="all", help="the first half of the classes, or the rest; "
        "a unified V learned on base is tested on both (%(default)s)")
    add("--probe", action="store_true", help="also a linear probe on the image features (of the right labels, whatever --noise)")
    add("--plot", action="store_true", help="accuracy against shots as a picture in --out (needs matplotlib)")
    add("--loss", choices=list(LOSSES), default="ce", help="cross-entropy, or generalised: for wrong labels (%(default)s)")
    add("--noise", type=float, default=0.0, metavar="SHARE", help="make this share of the training labels wrong (%(default)s)")
    add("--keep", type=float, default=0.0, metavar="WEIGHT", help="stay near the hand-written prompt's features (KgCoOp: 8; %(default)s)")
    add("--again", action="store_true", help="repeat runs whose result is known")
    add("--load", type=pathlib.Path, metavar="PROMPT", help="use a learned prompt: with --data, --predict, --export or --words")
    add("--predict", nargs="+", metavar="IMAGE", help="the likeliest classes of pictures, or of all pictures in folders")
    add("--json", action="store_true", help="--predict as JSON lines")
    add("--export", type=pathlib.Path, metavar="FILE.npz", help="text features and constants, enough for numpy")
    add("--words", type=at_least(1), metavar="N", help="the N vocabulary entries nearest to each context vector")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR", help="results.jsonl and the learned prompts (%(default)s)")
    add("--cache", type=pathlib.Path, default=pathlib.Path.home() / ".cache" / "coop", metavar="DIR", help="image features; the demo (%(default)s)")
    add("--no-cache", action="store_true", help="encode all images again and keep nothing")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")           # one line
    args = parser.parse_args(argv)
    for wrong, message in (
            (not (args.data or args.demo or args.load), "one of --data, --demo and --load is needed"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no CUDA device here; use --device cpu"),
            (args.demo and args.backbone, "--demo trains a model of its own: leave out --backbone"),
            (args.load and not (args.data or args.demo or args.predict or args.export or args.words),
             "--load needs something to do: --data, --predict, --export or --words"),
            (args.load and (args.plot or args.probe), "--plot and --probe go with training, not with --load"),
            (args.plot and importlib.util.find_spec("matplotlib") is None, "--plot needs matplotlib: pip install matplotlib"),
            ((args.predict or args.export or args.words) and not args.load, "--predict, --export and --words need --load PROMPT"),
            (args.json and not args.predict, "--json goes with --predict"),
            (not 0 <= args.noise <= 1 or not 0 <= args.keep < math.inf, "--noise is a share between 0 and 1, --keep a weight of 0 or more"),
            (args.template is not None and "{}" not in args.template, "--template needs {} where the class name goes")):
        if wrong:
            parser.error(message)
    args.backbone = args.backbone or (None if args.load else "RN50")
    args.M = args.M if args.init is None else args.M[:1]                 # the words of --init set M
    for key in ("M", "position", "shots", "seeds"):                      # named twice is still one run
        setattr(args, key, list(dict.fromkeys(getattr(args, key))))
    args.csc = {"yes": [True], "no": [False], "both": [False, True]}[args.csc]
    args.precision = args.precision or ("fp16" if args.device == "cuda" else "fp32")
    return args


def share_out(args):
    """Under torchrun --nproc-per-node N, be one of N processes: they share the image encoding, by way of
    the feature cache, and the runs of the grid, and only the first one prints results. Alone: nothing.

    No single run is split: a step is small, and a grid has enough of them.
    """
    args.rank, args.world = 0, 1
    if "TORCHELASTIC_RUN_ID" not in os.environ:          # which torchrun sets
        return contextlib.nullcontext()
    # gloo on GPUs as well: what the processes exchange are lines of results. They meet rarely, hence the timeout.
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=9))
    args.rank, args.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if args.device == "cuda":
        torch.cuda.set_device(args.rank % torch.cuda.device_count())
    if args.world > 1 and (args.no_cache or args.load):
        raise ValueError("torchrun is for learning prompts, and image features are shared through the cache: no --load, no --no-cache")
    return contextlib.redirect_stdout(None) if args.rank else contextlib.nullcontext()


def main(argv=None):
    """The command line. A user's mistake ends in one line and exit code 2, Ctrl-C in one line and 130."""
    try:
        args = parse(argv)
        with share_out(args):
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
