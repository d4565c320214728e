"""Learn the words of a CLIP prompt from a few images per class: CoOp, arXiv 2109.01134.

    python coop.py --demo                                # nothing to download, under two minutes
    python coop.py --data ./dtd --shots 4                # a folder of images, CPU or CUDA
    python coop.py --data ./dtd --shots 1 2 4 8 16 --seeds 1 2 3

CLIP classifies an image by comparing its features f with the features g of K sentences, "a photo
of a cat." and so on.  Which words stand around the class name matters by several points, and the
best ones are hard to guess.  CoOp lets gradient descent choose them: M context vectors V take the
place of the words, and the few labeled images say which V are good.  Everything else in CLIP is
frozen.

Paper -> code: K classes; M context vectors V (M, d), or (K, M, d) with a context for each class
(csc); t_i the prompt of class i; g text features; f image features; tau = 1 / exp(logit_scale)
the temperature; d token width; e embedding width; T epochs; N images; P tokens that all prompts
share.

Know before: what CLIP's two encoders do, and SGD in PyTorch; how encode_prompts turns embeddings
into g stands in clip_model.py, for afterwards.  To take away: a prompt is a short list of vectors
like any other parameter.  It is the same for all images, so at test time g is computed once, and a
prediction costs one image encoding.

Nine chapters: the method; image features; the linear probe; other losses; one run; many runs; a
learned prompt; the demo; the command line.  The first one is the paper, the rest brings images in
and results out.
"""
import argparse
import ast
import collections
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import clip_model
import data
import tokenizer as tokenizer_module
from data import TEST
from tokenizer import Tokenizer

BATCH_SIZE = 32
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
POSITIONS = ("end", "middle", "front")
SPLITS = ("all", "base", "new")
LOSSES = ("ce", "gce", "kgcoop")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- 1. The method -------------------------------------------------------------------------------


class PromptLearner(nn.Module):
    """The K prompts t_i = [V]_1 ... [V]_M [class i] . as token embeddings (equation 2).

    V is the only parameter.  A word enters CLIP as a row of the token embedding, a vector of width
    d, and the layers behind that table take any vector.  Words can only be chosen; vectors can be
    learned.

    position: where the class name stands: "end", "middle" (equation 3: half of V before the name,
              half after it) or "front".
    csc:      class-specific contexts, V (K, M, d), instead of one for all, V (M, d): each class
              finds its own words, from many images or badly from few.
    init:     words to start V from; M is then their number of tokens.  None: N(0, 0.02^2).

    Raises ValueError if a prompt is longer than the model reads.
    """

    def __init__(self, clip, tokenizer, classnames, M=16, position="end", csc=False, init=None):
        super().__init__()
        embedding = clip.token_embedding.weight.detach()             # (vocabulary, d)
        if tokenizer.vocab_size != clip.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids and this CLIP "
                             f"{clip.vocab_size}: they do not belong together")
        if init is not None:
            words = tokenizer.encode(init.replace("_", " "))
            M = len(words)
        if not 1 <= M <= clip.context_length:
            raise ValueError(f"M = {M}: expected 1 to {clip.context_length} vectors or words")

        # Each prompt as token ids.  The vectors of V are new words, whose ids follow the
        # vocabulary's; sot and eot are the start and the end of a text.
        #   end:     sot V1 V2 V3 V4 polka - dotted . eot
        #   middle:  sot V1 V2 polka - dotted V3 V4 . eot
        #   front:   sot polka - dotted V1 V2 V3 V4 . eot
        before = {"end": M, "middle": M // 2, "front": 0}[position]  # vectors before the name
        prompts = []
        for i, name in enumerate(classnames):
            name = name.replace("_", " ")
            n = len(tokenizer.encode(name))
            ids = tokenizer.encode(name + ".")       # as one text: "U.S.." ends in one token ".."
            first = clip.vocab_size + (i * M if csc else 0)          # the id of its first vector
            new = list(range(first, first + M))
            prompt = [tokenizer.sot] + new[:before] + ids[:n] + new[before:] + ids[n:]
            prompts.append(prompt + [tokenizer.eot])
            if len(prompts[-1]) > clip.context_length:
                raise ValueError(f"{name!r} is too long or M = {M} too large: {len(prompts[-1])} "
                                 f"tokens in its prompt, the model reads {clip.context_length}")

        # All prompts begin with the same P tokens, which are encoded once: sot and the vectors
        # before the name, or sot alone where each class has its own.  The rests stand end to end.
        self.P = 1 if csc else 1 + before
        rests = [prompt[self.P:] for prompt in prompts]
        packed = prompts[0][:self.P] + list(itertools.chain.from_iterable(rests))
        self.lengths = torch.tensor([len(rest) for rest in rests])
        self.register_buffer("ids", torch.tensor(packed, device=embedding.device))
        self.register_buffer("embedding", embedding, persistent=False)     # CLIP's own, no copy

        d = embedding.shape[1]
        shape = (len(classnames), M, d) if csc else (M, d)
        V = 0.02 * torch.randn(shape)
        if init is not None:
            V = embedding[words].expand(shape).clone()
        self.V = nn.Parameter(V.to(embedding))       # fp32, as all embeddings are

    def forward(self):
        """-> shared (P, d), own (sum of lengths, d), lengths (K,): for CLIP.encode_prompts.

        DTD, M = 16, end: shared (17, 512), own (186, 512), lengths 3 to 5 (name, period, eot).
        """
        vocab_size = len(self.embedding)
        is_new = self.ids >= vocab_size
        # Id 0 stands in for the new words until the next line puts V there, with its gradient.
        tokens = self.embedding[self.ids.masked_fill(is_new, 0)]     # (P + sum of lengths, d)
        tokens[is_new] = self.V.flatten(0, -2)[self.ids[is_new] - vocab_size]
        return tokens[:self.P], tokens[self.P:], self.lengths


def learning_rate(epoch, T):
    """The official schedule: one epoch at 1e-5, then a cosine from 0.002.

    The first one is against explosive gradients at the start (paper, section 4.1).  It counts as
    one of the T, so the cosine's angle stops at pi (T - 2) / T and the last rate is above zero.
    """
    if epoch == 0:
        return 1e-5
    return 0.001 * (1 + math.cos(math.pi * (epoch - 1) / T))


def batches(N, T, seed, size=BATCH_SIZE):
    """T lists of batches of shuffled indices; an incomplete batch is dropped unless it is alone."""
    rng = torch.Generator().manual_seed(seed)
    schedule = []
    for _ in range(T):
        shuffled = torch.randperm(N, generator=rng).split(size)
        schedule.append([batch for batch in shuffled if len(batch) == min(N, size)])
    return schedule


def cross_entropy(logits, labels, g):
    """The paper's loss: the mean of -log p(label)."""
    return F.cross_entropy(logits, labels)


def train(clip, learner, features, labels, T, seed=1, loss=cross_entropy, progress=None):
    """Learn V by the paper's recipe; the result is V of the last epoch, in learner.

    features: (N, crops, e), from training_features with the same T and seed: image i shows its
              crop epoch % crops.  The image encoder is frozen, so they are computed beforehand.
    labels:   (N,), on the same device.
    loss:     a function of logits (B, K), labels (B,) and g (K, e), L2-normalized.
    progress: called with a note after every epoch.

    Raises ValueError when the loss is NaN or infinite.

    Gradients flow through the frozen text encoder: backward() goes from the loss through g and
    every layer down to V.  The encoder's weights get no gradient, as clip_model.load has switched
    that off, and no step, as the optimizer knows V alone.
    """
    optimizer = torch.optim.SGD(
        learner.parameters(), lr=learning_rate(0, T), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = batches(len(labels), T, seed)
    for epoch in range(T):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, T)
        losses = []
        for batch in schedule[epoch]:
            f = F.normalize(features[batch, epoch % features.shape[1]], dim=-1)     # (B, e)
            g = F.normalize(clip.encode_prompts(*learner()), dim=-1)                # (K, e)
            # Equation 1: p(y = i | x) = exp(cos(g_i, f) / tau) / sum_j exp(cos(g_j, f) / tau).
            # tau is 0.01 in OpenAI's models: 0.05 more of cosine is e^5 times as probable.
            logits = clip.logit_scale.exp() * f @ g.T                               # (B, K)
            batch_loss = loss(logits, labels[batch], g)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            losses.append(batch_loss.detach())      # still on the device: a GPU need not wait
        mean_loss = torch.stack(losses).mean().item()
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss is NaN or infinite in epoch {epoch}: damaged weights, an "
                             "overflow in this --precision, or features of another seed or T")
        if progress:
            progress(f"loss {mean_loss:.3f}")


@torch.no_grad()
def zero_shot(clip, tokenizer, template, classnames):
    """L2-normalized features (K, e) of hand-written prompts: names put into a template's {}.

    template: one, or a list of them (an ensemble: the mean of their L2-normalized features).
    """
    templates = [template] if isinstance(template, str) else template
    features = []
    for words in templates:
        texts = [words.replace("{}", name.replace("_", " ")) for name in classnames]
        ids = tokenizer(texts, clip.context_length).to(clip.device)
        g = torch.cat([clip.encode_text(part) for part in ids.split(256)])
        features.append(F.normalize(g, dim=-1))
    return F.normalize(torch.stack(features).mean(0), dim=-1)


def classify(image_features, text_features):
    """For each image (N, e) the index of the text (K, e) with the largest cosine -> (N,)"""
    f = F.normalize(image_features, dim=-1)
    g = F.normalize(text_features.to(f), dim=-1)
    return (f @ g.T).argmax(-1)


def evaluate(image_features, text_features, labels):
    """Percent of the images (N, e) that are classified as their label (N,) says."""
    correct = classify(image_features, text_features) == labels
    return 100 * correct.sum().item() / len(correct)


# ---- 2. Image features ---------------------------------------------------------------------------
#
# The method has ended; what follows brings images in and results out.
#
# The image encoder is frozen and the crop of image i in epoch n is a pure function of (i, n), so
# its features are computed beforehand and kept on disk.  Runs that differ in M, position, csc, loss
# or the start of V share all of this work; other images or another T are encoded anew.
#
# A job is (path, [crop number, ...]); data.py cuts these crops of the image.

CHUNK = 1000        # crops per cache file, about: what a killed run can lose


class Progress:
    """Shows long work on stderr: call it after each step.

    On a terminal one line that is rewritten in place, elsewhere a plain line now and then.
    """

    def __init__(self, what, total, unit):
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self.start = time.time()
        self.shown = self.start
        self.terminal = sys.stderr.isatty()

    def __call__(self, note="", count=1):
        self.done += count
        now = time.time()
        pause = 0.1 if self.terminal else max(10, (now - self.start) / 10)
        finished = self.done >= self.total and self.terminal
        if now - self.shown < pause and not finished:
            return
        self.shown = now
        rate = self.done / max(now - self.start, 1e-9)
        left = datetime.timedelta(seconds=round(max(0, self.total - self.done) / rate))
        share = min(1, self.done / max(1, self.total))
        line = (f"{100 * share:3.0f} % of {self.total:,} {self.unit}, {rate:.1f} per second, "
                f"{left} left")
        if note:
            line += f", {note}"
        if self.terminal:
            bar = ("#" * round(20 * share)).ljust(20, ".")
            end = "\n" if finished else ""
            width = shutil.get_terminal_size().columns - 1
            line = f"{self.what} [{bar}] {line}"[:width].ljust(width)
            print(f"\r{line}", end=end, file=sys.stderr, flush=True)
        else:
            print(f"{self.what}: {line}", file=sys.stderr, flush=True)


def image_features(clip, jobs, cache=None, what="encoding images"):
    """Features (number of crops, e) fp32, on the CPU, of the crops of jobs, in order.

    cache: a data.FeatureCache, or None.
    """
    features = torch.empty(count_crops(jobs), clip.text_projection.shape[1])
    start = 0
    for chunk in feature_chunks(clip, jobs, cache, what):
        features[start:start + len(chunk)] = chunk
        start += len(chunk)
    return features


def training_features(clip, items, T, views=0, seed=1, cache=None):
    """Features (N, crops, e) of the crops that train() reads, on CLIP's device; the others are NaN.

    items: [(path, label), ...].  views: crops per image; epoch n shows crop n % views.  0: a fresh
    crop in every epoch, as in the paper.
    """
    jobs, images, crop_numbers = training_jobs(items, T, views, seed)
    e = clip.text_projection.shape[1]
    features = torch.full((len(items), min(views or T, T), e), math.nan, device=clip.device)
    start = 0
    for chunk in feature_chunks(clip, jobs, cache, "encoding training crops"):
        end = start + len(chunk)
        features[images[start:end], crop_numbers[start:end]] = chunk.to(clip.device)
        start = end
    return features


def training_jobs(items, T, views=0, seed=1):
    """The crops that train() reads: jobs, and for each crop its image (index) and its number.

    Not all are needed, as each epoch drops its incomplete batch.  Jobs are sorted by path, so that
    runs which use the same crops in another order find them in the cache.
    """
    crops = min(views or T, T)
    needed = torch.zeros(len(items), crops, dtype=torch.bool)
    for epoch, epoch_batches in enumerate(batches(len(items), T, seed)):
        needed[torch.cat(epoch_batches), epoch % crops] = True
    jobs = []
    images = []
    crop_numbers = []
    for i in sorted(range(len(items)), key=lambda i: str(items[i][0])):
        wanted = needed[i].nonzero().flatten().tolist()
        if wanted:
            jobs.append((items[i][0], wanted))
            images += [i] * len(wanted)
            crop_numbers += wanted
    return jobs, torch.tensor(images), torch.tensor(crop_numbers)


def chunks(jobs):
    """Cut jobs into lists of about CHUNK crops."""
    chunk = []
    count = 0
    for path, numbers in jobs:
        chunk.append((path, numbers))
        count += len(numbers)
        if count >= CHUNK:
            yield chunk
            chunk = []
            count = 0
    if chunk:
        yield chunk


def count_crops(jobs):
    return sum(len(numbers) for _, numbers in jobs)


def feature_chunks(clip, jobs, cache, what):
    """Yield the features (number of crops, e) of one chunk of jobs after the other."""
    all_chunks = list(chunks(jobs))
    keys = [chunk_key(clip, chunk) if cache else None for chunk in all_chunks]
    missing = [not cache or not cache.has(key) for key in keys]
    wanted = []
    for chunk, is_missing in zip(all_chunks, missing):
        if is_missing:
            wanted += chunk
    progress = Progress(what, count_crops(wanted), "crops")
    crops = data.crops(wanted, clip.resolution)      # of all chunks: threads decode ahead
    for chunk, key, is_missing in zip(all_chunks, keys, missing):
        count = count_crops(chunk)
        if is_missing:
            features = encode_crops(clip, itertools.islice(crops, count), progress)
            keep(features, cache, key)
        else:
            features = cache.load(key, (count, clip.text_projection.shape[1]))
            if features is None:                     # its file is damaged
                features = encode_crops(clip, data.crops(chunk, clip.resolution), progress)
                keep(features, cache, key)
        yield features


def keep(features, cache, key):
    """Save features, if there is a cache; a full disk does not stop the work."""
    if cache:
        try:
            cache.save(key, features)
        except OSError as error:
            print(f"note: these image features are not kept on disk, {error}", file=sys.stderr)


@torch.inference_mode()
def encode_crops(clip, crops, progress):
    """Features (number of crops, e) fp32 by the image encoder; crops: an iterator as data.crops."""
    features = []
    while True:
        batch = list(itertools.islice(crops, encoder_batch_size(clip)))
        if not batch:
            return torch.cat(features)
        pixels = np.stack([pixels for _, _, pixels in batch])
        x = data.normalize(torch.from_numpy(pixels).to(clip.device))
        f = clip.encode_image(x).float().cpu()
        if not f.isfinite().all():
            raise ValueError(f"the features of {batch[0][0]} or a neighbor are NaN or infinite: "
                             "damaged weights, or an overflow in this --precision")
        features.append(f)
        progress(count=len(batch))


def encoder_batch_size(clip):
    """Images per batch of the image encoder, as measured.

    On a CPU a ResNet is fastest when the layers of a batch fit the processor's caches (8 images of
    224 pixels), a ViT with more; a GPU wants to be filled.
    """
    if clip.device.type == "cuda":
        return 256
    if isinstance(clip.visual, clip_model.ModifiedResNet):
        return max(8, 8 * 224 ** 2 // clip.resolution ** 2)
    return 32


def chunk_key(clip, jobs):
    """A hash of all that features depend on: model, precision, device, code, images, crop numbers.

    CUDA's fp32 is not a CPU's, as it has TF32 products.  An image counts as the same while its
    path, size and modification time are.  If you add an option that changes crops or features, put
    it here.
    """
    description = [weights_name(clip), str(clip.image_dtype), clip.device.type, image_code()]
    for path, numbers in jobs:
        stat = os.stat(path)
        description.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns, numbers))
    return short_hash(repr(description), 32)


def weights_name(clip):
    """Eight digits of the file's checksum, and the GELU where it is not OpenAI's."""
    return clip.sha256[:8] + ("" if clip.gelu == "quick" else "-exact-gelu")


def short_hash(text, digits=8):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]


@functools.cache
def image_code():
    """A hash of the code that reads, crops and encodes an image."""
    program = sys.modules[__name__]
    return code_hash(
        [(program, "feature_chunks"), (program, "load_model"), (data, "FeatureCache")])


# ---- 3. The linear probe -------------------------------------------------------------------------


def linear_probe(train, val):
    """The paper's other baseline: logistic regression on pairs (features (N, e), labels (N,)).

    scikit-learn's objective, 1/2 |W|^2 + C * sum of losses, in float64 by at most 2,000 steps of
    L-BFGS.  That reaches its optimum for C up to about 100 (the gradient is zero to 1e-5 of W);
    with a larger C it can stop before, as the official code does at 1,000.  C is chosen on val.
    Returns weights (K, e), biases (K,) and C.  A class without training images has a bias of -inf:
    it is never predicted.

    Like the official code, it does not normalize the features.  It knows nothing of the class
    names: each class is a free vector, where CoOp must find one that the text encoder can say.
    """
    # Centered, which changes only the biases, and rotated to the principal axes of the images (at
    # most N): the same optimum, reached sooner.
    f = train[0].double()
    mean = f.mean(0)
    _, _, axes = torch.linalg.svd(f - mean, full_matrices=False)         # (min(N, e), e)
    f = (f - mean) @ axes.T
    f_val = (val[0].double() - mean) @ axes.T
    classes, labels = train[1].unique(return_inverse=True)               # that have images

    @functools.cache
    def fit(C):
        return fit_logistic(f, labels, len(classes), C)

    def accuracy(C):
        W, b = fit(C)
        return (classes[(f_val @ W.T + b).argmax(-1)] == val[1]).sum().item()

    C = search_C(accuracy)
    K = int(torch.cat([train[1], val[1]]).max()) + 1
    W = torch.zeros(K, len(mean), dtype=f.dtype)
    b = torch.full((K,), -math.inf, dtype=f.dtype)
    W[classes] = fit(C)[0] @ axes
    b[classes] = fit(C)[1] - W[classes] @ mean
    return W, b, C


def fit_logistic(f, labels, K, C):
    """Weights (K, columns) and biases (K,) for features (N, columns) without correlations.

    Two classes have one vector, and zeros for the first class, as in scikit-learn.
    """
    # L-BFGS is quick where the objective is curved alike in all directions, and its curvature along
    # a column grows with C * sum(f^2): so each column is divided by about the square root of its
    # curvature.  0.05 was the quickest of 0.01 to 0.25.
    scale = (1 + 0.05 * C * f.square().sum(0)).rsqrt()
    x = F.pad(f * scale, (0, 1), value=1.0)                      # the last column is for biases
    rows = 1 if K == 2 else K
    Z = torch.zeros(rows, x.shape[1], dtype=f.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [Z], max_iter=2000, history_size=20, tolerance_grad=1e-9,
        tolerance_change=1e-9 * min(1, C) ** 2, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        logits = F.pad(x @ Z.T, (K - rows, 0))                   # two classes: 0 and a logit
        W = Z[:, :-1] * scale
        value = C * F.cross_entropy(logits, labels, reduction="sum") + W.square().sum() / 2
        scaled = value / min(1, C * len(f))          # for small C: gradients above the tolerance
        scaled.backward()
        return scaled

    optimizer.step(objective)
    Z = F.pad(Z.detach(), (0, 0, K - rows, 0))                   # (1, columns) -> (2, columns)
    return Z[:, :-1] * scale, Z[:, -1]


def search_C(accuracy):
    """The C with the best accuracy(C), by the official code's search.

    The best of seven powers of a hundred, then eight halvings of [C / 10, 10 C] in log space, each
    keeping the half whose outer end is better.  Ties, which are frequent with few validation
    images: the largest of the seven, then the lower half.
    """
    best = max((6, 4, 2, 0, -2, -4, -6), key=lambda exponent: accuracy(10.0 ** exponent))
    low = best - 1
    high = best + 1
    for _ in range(8):
        middle = (low + high) / 2
        if accuracy(10.0 ** low) < accuracy(10.0 ** high):
            low = middle
            best = high
        else:
            high = middle
            best = low
    return 10.0 ** best


# ---- 4. Other losses -----------------------------------------------------------------------------
#
# Beyond the paper, off by default.  Each is a function of logits (B, K), labels (B,) and the
# L2-normalized text features g (K, e), for train(..., loss=...).

KGCOOP_WEIGHT = 8


def generalized_cross_entropy(logits, labels, g, q=0.5):
    """The mean of (1 - p^q) / q with p the probability of the label (arXiv 1805.07836).

    Between cross-entropy (q -> 0) and 1 - p (q = 1), a smooth error rate: a wrong label, which
    stays improbable, pulls less.
    """
    log_p = logits.log_softmax(-1).gather(1, labels[:, None])
    return (-torch.expm1(q * log_p) / q).mean()      # p^q - 1, with a gradient also where p is 0


def kgcoop(hand_written):
    """The loss of KgCoOp (arXiv 2303.13283), given features (K, e) of hand-written prompts.

    Cross-entropy + 8 (1 - mean cosine of learned and hand-written features), the paper's weight:
    V may not stray far from the words, which is meant to help classes that were not there in
    training.
    """
    def loss(logits, labels, g):
        distance = 1 - (g * hand_written).sum(-1).mean()
        return cross_entropy(logits, labels, g) + KGCOOP_WEIGHT * distance
    return loss


# ---- 5. One run ----------------------------------------------------------------------------------
#
# One run is one file of results; CoOp's have a prompt beside it.  The settings are a Run, and a
# hash of all of them ends the names:
#
#     runs/dtd-RN50-coop-4shot-seed1-1a2b3c4d.json       the result
#     runs/dtd-RN50-coop-4shot-seed1-1a2b3c4d.pt         the learned prompt
#
# A run whose files exist is done.  The program itself is one of the settings (`code`), so
# whoever edits one of its MODULES gets new results.  Device and version of torch, which only round
# differently, are reported and no settings.  If you add an option, add a field here, a word in
# label and a value in make_runs.


@dataclass(frozen=True)
class Run:
    """The settings of one run: all that can change its result.  None: does not apply."""

    method: str                     # "zero-shot", "linear-probe" or "coop"
    dataset: str
    backbone: str
    shots: int = 0                  # training images per class
    seed: int | None = None         # of the few-shot sample, V's start, the batches, wrong labels
    M: int | None = None            # number of context vectors
    position: str | None = None     # of the class name: "end", "middle" or "front"
    csc: bool | None = None         # class-specific contexts
    init: str | None = None         # words to start V from; None: from noise
    epochs: int | None = None       # T
    views: int | None = None        # crops per image; 0: a fresh crop every epoch
    classes: str = "all"            # to learn and test on: "all", "base" or "new"
    loss: str | None = None         # "ce", "gce" or "kgcoop"
    noise: float | None = None      # share of wrong training labels
    precision: str = "fp32"         # of the image encoder
    template: str | None = None     # hand-written prompt; several are joined by JOIN
    weights: str = ""               # checksum of CLIP's weights
    images: str = ""                # hash of the images' names, labels, sizes, times of change
    code: str = ""                  # hash of the program

    @property
    def stem(self):
        """The name of the run's files: a readable part and a hash of all fields."""
        words = [self.dataset, self.backbone, self.method]
        if self.method != "zero-shot":
            words += [f"{self.shots}shot", f"seed{self.seed}"]
        readable = re.sub(r"[^\w.-]+", "-", "-".join(words))
        while len(readable.encode()) > 150:          # file systems take 255 bytes
            readable = readable[:-1]
        return f"{readable}-{short_hash(repr(self))}"

    @property
    def paper_epochs(self):
        return paper_epochs(self.shots, self.dataset)

    @property
    def label(self):
        """The run's row in a table: the method and what is not the paper's default."""
        if self.method == "zero-shot":
            words = [f'zero-shot "{self.template}"']
        elif self.method == "linear-probe":
            words = ["linear probe"]
        else:
            words = [f"CoOp M={self.M} {self.position}"]
            if self.csc:
                words.append("csc")
            if self.init:
                words.append(f'init="{self.init}"')
            if self.views:
                words.append(f"views={self.views}")
            if self.loss != "ce":
                words.append(self.loss)
            if self.noise:
                words.append(f"noise={self.noise}")
        if self.classes != "all":
            words.append(f"on {self.classes}")
        return " ".join(words)

    def __str__(self):
        if self.method == "zero-shot":
            return self.label
        return f"{self.label}, {self.shots} shots, seed {self.seed}"


JOIN = " | "        # between the templates of an ensemble


def paper_epochs(shots, dataset):
    """T by the paper: 50 for one shot and for ImageNet, 100 for 2 and 4 shots, 200 for 8 and 16."""
    if shots <= 1 or dataset == "imagenet":
        return 50
    if shots <= 4:
        return 100
    return 200


@dataclass
class Setup:
    """What all runs share: a CLIP, a dataset, and the features of its test images."""

    clip: clip_model.CLIP
    backbone: str                   # name or path of the weights
    tokenizer: Tokenizer
    dataset: data.Dataset
    cache: data.FeatureCache | None

    @functools.cached_property
    def test(self):
        """Features (N, e) and labels (N,) of all test images, encoded when first asked for."""
        return self.encode(self.dataset.test, "encoding test images")

    def encode(self, items, what="encoding images"):
        """Features (N, e) and labels (N,) of the test crops of items."""
        jobs = [(path, [TEST]) for path, _ in items]
        features = image_features(self.clip, jobs, self.cache, what)
        return features, torch.tensor([label for _, label in items])

    def labels(self, split):
        """Labels of a class split: "all", "base" (the first half, rounded up) or "new"."""
        return data.subset(len(self.dataset.classnames), split)

    def classnames(self, split):
        return [self.dataset.classnames[label] for label in self.labels(split)]

    def test_part(self, split):
        """Features and labels of the test images of a class split, labels counted from 0."""
        features, labels = self.test
        wanted = torch.tensor(self.labels(split))
        mask = torch.isin(labels, wanted)
        return features[mask], torch.searchsorted(wanted, labels[mask])

    def few_shot(self, run):
        """The training and the validation images of a run, labels counted from 0 in its split.

        As in the official code: at most 4 validation images, and sampled before the split.
        """
        rng = random.Random(run.seed)
        train_items = data.few_shot(self.dataset.train, run.shots, rng)
        val_items = data.few_shot(self.dataset.val, min(run.shots, 4), rng)
        return self.renumber(train_items, run.classes), self.renumber(val_items, run.classes)

    def renumber(self, items, split):
        """The items of a class split, labels counted from 0.

        The other classes are no possible answers then.  8 classes are easier than 16, so compare
        base only with base and new only with new.
        """
        index = {label: i for i, label in enumerate(self.labels(split))}
        return [(path, index[label]) for path, label in items if label in index]

    def hand_written(self, template, split):
        """Text features (K, e) of a template, or of several that are joined by JOIN."""
        names = self.classnames(split)
        return zero_shot(self.clip, self.tokenizer, template.split(JOIN), names)

    @functools.cached_property
    def images_hash(self):
        """A hash of the names, labels, sizes and modification times of all images, by part."""
        files = []
        for part in (self.dataset.train, self.dataset.val, self.dataset.test):
            files.append(len(part))
            for path, label in part:
                stat = os.stat(path)
                files.append((Path(path).parts[-2:], label, stat.st_size, stat.st_mtime_ns))
        return short_hash(repr((self.dataset.classnames, files)))


def run_once(setup, run, out, again=False):
    """The result of a run: read from its file if it is done, else measured and saved."""
    path = out / f"{run.stem}.json"
    if not again and is_done(run, out):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path} is damaged: delete it, or repeat the run with "
                             "--again") from None
    path.unlink(missing_ok=True)       # so that a killed repetition leaves no result of before
    start = time.time()
    setup.test_part(run.classes)       # a damaged test image should stop us now, not after training
    encoded = time.time()
    result = {"settings": dataclasses.asdict(run)}
    result.update(METHODS[run.method](setup, run, out))
    result["seconds_images"] = round(encoded - start + result["seconds_images"], 2)
    result["device"] = str(setup.clip.device)
    result["torch"] = torch.__version__
    with data.atomic_write(path) as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


def is_done(run, out):
    """Whether a run has left its files: the result and, where it learned one, the prompt."""
    suffixes = [".json", ".pt"] if run.method == "coop" else [".json"]
    return all((out / (run.stem + suffix)).exists() for suffix in suffixes)


def run_zero_shot(setup, run, out):
    """CLIP with the hand-written prompt."""
    predicted = {}
    for split in test_splits(run):
        f, _ = setup.test_part(split)
        predicted[split] = classify(f, setup.hand_written(run.template, split))
    return make_result(setup, predicted, [], 0, 0)


def run_linear_probe(setup, run, out):
    """Logistic regression on the image features; C is chosen on the validation images."""
    start = time.time()
    train_items, val_items = setup.few_shot(run)
    train_set = setup.encode(train_items)
    val_set = setup.encode(val_items)
    encoded = time.time()
    W, b, C = linear_probe(train_set, val_set)
    f, _ = setup.test_part(run.classes)
    predicted = {run.classes: (f.double() @ W.T + b).argmax(-1)}
    result = make_result(setup, predicted, train_items, encoded - start, time.time() - encoded)
    return {**result, "C": C}


def run_coop(setup, run, out):
    """Learn a prompt, save it, test it.  As in the paper, the result is V of the last epoch."""
    start = time.time()
    items, _ = setup.few_shot(run)
    classnames = setup.classnames(run.classes)
    clip = setup.clip
    features = training_features(clip, items, run.epochs, run.views, run.seed, setup.cache)
    encoded = time.time()
    labels = data.mislabel([label for _, label in items], run.noise, len(classnames), run.seed)
    labels = torch.tensor(labels, device=clip.device)
    torch.manual_seed(run.seed)                      # PromptLearner samples the first V
    learner = PromptLearner(
        clip, setup.tokenizer, classnames, run.M, run.position, run.csc, run.init)
    progress = Progress("learning V", run.epochs, "epochs")
    train(clip, learner, features, labels, run.epochs, run.seed, make_loss(setup, run), progress)
    seconds = time.time() - encoded
    parameters = dict(learner.named_parameters())    # V; whatever you add is saved and used, too
    save_prompt(out / f"{run.stem}.pt", setup, run, parameters)
    predicted = {}
    for split in test_splits(run):
        f, _ = setup.test_part(split)
        names = setup.classnames(split)
        g = learned_features(clip, setup.tokenizer, names, parameters, run.position)
        predicted[split] = classify(f, g)
    return make_result(setup, predicted, items, encoded - start, seconds)


METHODS = {"zero-shot": run_zero_shot, "linear-probe": run_linear_probe, "coop": run_coop}


def make_loss(setup, run):
    """The function for train() that a run's setting `loss` names."""
    if run.loss == "gce":
        return generalized_cross_entropy
    if run.loss == "kgcoop":
        return kgcoop(setup.hand_written(run.template, run.classes))
    return cross_entropy


def test_splits(run):
    """The class splits to test on: zero-shot and a shared V of base also on the new classes."""
    if run.classes == "base" and not run.csc and run.method != "linear-probe":
        return ["base", "new"]
    return [run.classes]


def percent(correct):
    """100 * the share of True in a tensor of truth values."""
    return 100 * correct.sum().item() / len(correct)


def accuracy_by_class(correct, labels, classnames):
    """{class name: percent correct} of the classes with images; correct and labels: (N,)."""
    per_class = {}
    for label, name in enumerate(classnames):
        if name in per_class:                # two classes of one name
            name = f"{name} ({label})"
        if (labels == label).any():
            per_class[name] = percent(correct[labels == label])
    return per_class


def hardest_classes(per_class):
    """The three classes with the lowest accuracy, in words."""
    hardest = sorted(per_class, key=per_class.get)[:3]
    return "hardest: " + ", ".join(f"{name} {per_class[name]:.0f} %" for name in hardest)


def make_result(setup, predicted, training_items, seconds_images, seconds_training):
    """The part of a result that is measured, from {class split: predicted labels (N,)}."""
    accuracy = {}
    n_test = {}
    per_class = {}
    for split, answers in predicted.items():
        _, labels = setup.test_part(split)
        correct = answers == labels
        accuracy[split] = percent(correct)
        n_test[split] = len(labels)
        per_class.update(accuracy_by_class(correct, labels, setup.classnames(split)))
    if len(accuracy) == 2:           # base and new: the harmonic mean is low if one of them is
        accuracy["harmonic"] = statistics.harmonic_mean(accuracy.values())
    root = setup.dataset.root
    return {
        "accuracy": accuracy,
        "n_test": n_test,
        "per_class": per_class,
        "training_images": [Path(path).relative_to(root).as_posix() for path, _ in training_items],
        "seconds_images": seconds_images,
        "seconds_training": round(seconds_training, 2),
    }


# What code does is hashed from its syntax tree, without comments, docstrings and layout: the
# functions that are named, all that they use in MODULES, all that this uses, and so on.  Names are
# matched without their scopes, so that rather too much counts than too little; a statement that
# defines no name counts with all of its module.  Another version of Python may hash otherwise.


def is_main_guard(node):
    return isinstance(node, ast.If) and "__main__" in ast.dump(node.test)


def defined_names(node):
    """The names that a top-level statement defines; [None] for a loose one, like MEAN[0] = 0.5."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        names = [part.id for part in ast.walk(node)
                 if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        return names or [None]
    return [None]


@functools.cache
def definitions(module):
    """{name: [syntax tree, ...]} of a module's top level; None: statements that define no name."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                del node.body[0]
    found = {}
    for node in tree.body:
        if not is_main_guard(node):
            for name in defined_names(node):
                found.setdefault(name, []).append(node)
    return found


def references(module, node):
    """(module, name) of all that a syntax tree of this module may use."""
    found = [(module, None)]
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.append((module, part.id))
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            other = vars(module).get(part.value.id)                  # data.crops
            if isinstance(other, types.ModuleType):
                found.append((other, part.attr))
        elif isinstance(part, ast.ImportFrom):                       # from data import TEST
            found += [(sys.modules.get(part.module), alias.name) for alias in part.names]
    return found


def used_code(roots):
    """{(module, name): [syntax tree, ...]} of roots and all that they use in MODULES."""
    used = {}
    waiting = list(roots)
    while waiting:
        module, name = waiting.pop()
        if module not in MODULES or (module, name) in used or name not in definitions(module):
            continue
        used[module, name] = definitions(module)[name]
        for node in used[module, name]:
            waiting += references(module, node)
    return used


def code_hash(roots):
    """A hash of the code that (module, name) pairs name, and of all that it uses."""
    used = used_code(roots)
    ordered = sorted(used, key=lambda pair: (pair[0].__file__, str(pair[1])))
    text = ""
    for pair in ordered:
        text += "".join(map(ast.dump, used[pair]))
    return short_hash(text)


# ---- 6. Many runs --------------------------------------------------------------------------------


def make_runs(args, setup):
    """The grid that a command line asks for: zero-shot, then each method for each sample."""
    backbone = Path(setup.backbone).stem
    if setup.backbone in clip_model.MODELS:
        backbone = setup.backbone.replace("/", "-")
    shared = dict(
        dataset=setup.dataset.name,
        backbone=backbone,
        classes=args.classes,
        precision=args.precision,
        weights=weights_name(setup.clip),
        images=setup.images_hash,
        code=program_code(),
    )
    runs = []
    for template in args.templates:
        runs.append(Run(method="zero-shot", template=template, **shared))
    context_lengths = args.M
    if args.init is not None:
        context_lengths = [len(setup.tokenizer.encode(args.init.replace("_", " ")))]
    for shots, seed in itertools.product(args.shots, args.seeds):
        if shots == 0:
            continue
        if args.probe:
            runs.append(Run(method="linear-probe", shots=shots, seed=seed, **shared))
        for M, position, csc in itertools.product(context_lengths, args.position, args.csc):
            runs.append(Run(
                method="coop",
                shots=shots,
                seed=seed,
                M=M,
                position=position,
                csc=csc,
                init=args.init,
                epochs=args.epochs or paper_epochs(shots, setup.dataset.name),
                views=args.views,
                loss=args.loss,
                noise=args.noise,
                template=args.templates[0] if args.loss == "kgcoop" else None,
                **shared,
            ))
    return runs


# The program, for program_code; a module of your own belongs here, too.
MODULES = (tokenizer_module, clip_model, data, sys.modules[__name__])


@functools.cache
def program_code():
    """A hash of all modules."""
    roots = []
    for module in MODULES:
        roots += [(module, name) for name in definitions(module)]
    return code_hash(roots)


def run_grid(args):
    """All runs of a command line, their table, and how to use what was learned."""
    setup = make_setup(args)
    runs = make_runs(args, setup)
    check_runs(args, setup, runs)
    announce(args, setup, runs)
    if args.rank == 0:
        wait_for_all(args)             # the others have waited in main until here
    share_encoding(args, setup, runs)
    for run in runs[args.rank::args.world]:
        done = is_done(run, args.out) and not args.again
        print_result(run, run_once(setup, run, args.out, args.again), done)
    wait_for_all(args)
    if args.rank:
        return
    results = [run_once(setup, run, args.out) for run in runs]     # all are done by now
    print("\n" + table(results))
    if args.plot:
        for path in plot(args, setup, results):
            print(f"plot: {path}")
    learned = [run for run in runs if run.method == "coop"]
    if learned:
        last = [run for run in learned if not run.csc] or learned
        path = args.out / f"{last[-1].stem}.pt"
        if args.demo:
            print(f"\nnearest words to V of {last[-1]}: "
                  + frequent_words(load_prompt(path), setup))
        named = f'"{path}"' if " " in str(path) else path
        print(f"\nto use the prompt: python coop.py --load {named} --predict IMAGE_OR_FOLDER")


def make_setup(args):
    """Load the weights and read the folder; say what they are and what was passed over."""
    dataset = data.load_dataset(args.data)
    clip, tokenizer = load_clip(args.backbone, args)
    K = len(dataset.classnames)
    parameters = sum(p.numel() for p in clip.parameters()) / 1e6
    print(f"CLIP {args.backbone} on {args.device}: {parameters:.1f} M parameters, all frozen; "
          f"images in {args.precision}")
    names = ", ".join(dataset.classnames[:3]) + (", ..." if K > 3 else "")
    print(f"{dataset.name}: K = {K} classes ({names}), "
          f"{len(dataset.train)} training, {len(dataset.val)} validation and {len(dataset.test)} "
          "test images")
    for note in dataset.notes:
        print(f"note: {note}", file=sys.stderr)
    if not args.templates:
        args.templates = [dataset.template]
    return Setup(clip, args.backbone, tokenizer, dataset, open_cache(args))


def open_cache(args):
    """The feature cache of a command line, or None."""
    if args.no_cache:
        return None
    try:
        return data.FeatureCache(args.cache / "features")
    except OSError as error:
        print(f"note: image features are not kept on disk, {error} (--cache DIR names another "
              "place)", file=sys.stderr)
        return None


def load_model(backbone, args):
    """The model, made fast."""
    torch.backends.cuda.matmul.allow_tf32 = True     # text encoder on CUDA: fp32, TF32 products
    clip = clip_model.load(backbone, args.device, args.gelu)
    return clip_model.prepare(clip, PRECISIONS[args.precision])


def load_clip(backbone, args):
    """The model and the tokenizer that it was trained with.

    The merges that lie beside the weights, as the demo's do; or else OpenAI's vocabulary or plain
    bytes, by the number of token embeddings.  With another tokenizer every prompt would be another
    sentence, and nothing would fail.
    """
    clip = load_model(backbone, args)
    merges = Path(backbone).with_suffix(".merges.txt")
    tokenizer = Tokenizer()
    if merges.is_file():
        tokenizer = Tokenizer.from_file(merges)
        clip.sha256 = short_hash(clip.sha256 + repr(tokenizer.tokens), 64)     # names both files
    elif clip.vocab_size != tokenizer.vocab_size:
        tokenizer = Tokenizer.openai()
    if clip.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{backbone} has {clip.vocab_size} token embeddings; OpenAI's have 49408, "
                         f"and there is no {merges} with another vocabulary")
    return clip, tokenizer


def check_runs(args, setup, runs):
    """Raise ValueError for what would fail later, after an hour of encoding."""
    dataset = setup.dataset
    needed = {path for path, _ in dataset.test}
    for split in test_splits(runs[0]):
        wanted = setup.labels(split)
        if not any(label in wanted for _, label in dataset.test):
            raise ValueError(f"there are no test images{of_classes(split)}")
    for template in args.templates:
        for split in test_splits(runs[0]):
            for words in template.split(JOIN):
                names = setup.classnames(split)
                texts = [words.replace("{}", name.replace("_", " ")) for name in names]
                setup.tokenizer(texts, setup.clip.context_length)         # ValueError if too long
    samples = {(run.method, run.shots, run.seed): run for run in runs if run.shots}
    for run in samples.values():
        train_items, val_items = setup.few_shot(run)
        if not train_items:
            raise ValueError(f"{dataset.root} has no training images{of_classes(run.classes)}: use "
                             "--shots 0, or --load a learned prompt")
        needed.update(path for path, _ in train_items)
        if run.method == "linear-probe":
            needed.update(path for path, _ in val_items)
            if not val_items:
                raise ValueError("--probe needs validation images to choose its C, and "
                                 f"{dataset.root} has none")
    learned = [run for run in runs if run.method == "coop"]
    for run in {(run.M, run.position, run.csc): run for run in learned}.values():
        for split in {run.classes, *test_splits(run)}:
            PromptLearner(setup.clip, setup.tokenizer, setup.classnames(split), run.M,
                          run.position, run.csc, run.init)
    data.check_images(sorted(needed), dataset)


def announce(args, setup, runs):
    """Say what will be learned from what."""
    learned = [run for run in runs if run.method == "coop"]
    if not learned:
        return
    K = len(setup.classnames(args.classes))
    d = setup.clip.token_embedding.embedding_dim
    shapes = {}
    for run in learned:
        shape = (K, run.M, d) if run.csc else (run.M, d)
        shapes[f"V {shape}, {math.prod(shape):,} parameters"] = True
    epochs = args.epochs or "by shots, as in the paper"
    crops = f"crops per image: {args.views}" if args.views else "a fresh crop every epoch"
    print(f"to learn: {' or '.join(shapes)}; shots {args.shots}, seeds {args.seeds}, epochs "
          f"{epochs}, {crops}")
    counts = torch.tensor([label for _, label in setup.dataset.train]).bincount()
    smallest = counts[counts > 0].min().item()
    if smallest < max(args.shots):
        print("note: a class with fewer training images than --shots gives all that it has (the "
              f"smallest: {smallest}; of class folders without train/ and test/, half of the "
              "images are for training)", file=sys.stderr)


def of_classes(split):
    """A split in words, for a message."""
    return "" if split == "all" else f" of the {split} classes"


def print_result(run, result, done):
    accuracy = ", ".join(f"{split} {value:.2f} %" for split, value in result["accuracy"].items())
    note = "  (done already)" if done else ""
    print(f"{run}: {accuracy.removeprefix('all ')}; {hardest_classes(result['per_class'])}{note}",
          flush=True)


# Several processes, started by torchrun: process r of N takes runs[r::N] and encodes every N-th
# chunk of images; they meet in the cache and in the folder of results.  No single run is split.


def process_number():
    """This process and how many there are: (r, N); (0, 1) without torchrun."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def start_processes(args):
    args.rank, args.world = process_number()
    if args.world > 1:
        if args.no_cache or args.load:
            raise ValueError("torchrun is for learning, with features shared through the cache: no "
                             "--load, no --no-cache")
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=9))


def wait_for_all(args):
    if args.world > 1:
        try:
            torch.distributed.barrier()
        except RuntimeError:
            raise ValueError("another process has stopped, see its message") from None


def share_encoding(args, setup, runs):
    """Put this process's share of test images and CoOp's crops into the cache; wait for all."""
    if args.world > 1:
        wanted = list(chunks([(path, [TEST]) for path, _ in setup.dataset.test]))
        samples = {(run.shots, run.seed): run for run in runs if run.method == "coop"}
        for run in samples.values():
            items, _ = setup.few_shot(run)
            jobs, _, _ = training_jobs(items, run.epochs, run.views, run.seed)
            wanted += chunks(jobs)
        for chunk in wanted[args.rank::args.world]:
            image_features(setup.clip, chunk, setup.cache)
        wait_for_all(args)


# The paper's numbers for RN50: test images of its split, then the accuracy of zero-shot CLIP and
# of CoOp with M = 16, end, at 1, 2, 4, 8 and 16 shots.
PAPER_SHOTS = (0, 1, 2, 4, 8, 16)
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
    "imagenet": (50000, 58.18, 57.15, 57.81, 59.99, 61.56, 62.95),
}


def collect(results):
    """{row: {shots: [accuracy of each seed]}}; the paper's numbers are a row of their own."""
    rows = {}
    runs = [Run(**result["settings"]) for result in results]
    other_epochs = [run for run in runs if run.epochs not in (None, run.paper_epochs)]
    for run, result in zip(runs, results):
        for split, accuracy in result["accuracy"].items():
            row = run.label
            if other_epochs and run.method == "coop":
                row += f" epochs={run.epochs}"
            if len(result["accuracy"]) > 1:
                row += f": {split}"
            rows.setdefault(row, {}).setdefault(run.shots, []).append(accuracy)
    first = results[0]
    run = Run(**first["settings"])
    if run.dataset not in PAPER:
        return rows
    n_test, *accuracies = PAPER[run.dataset]
    same_weights = clip_model.MODELS["RN50"][0].startswith(run.weights)
    if first["n_test"].get("all") == n_test and same_weights:
        shown = {result["settings"]["shots"] for result in results}
        paper = {}
        for shots, accuracy in zip(PAPER_SHOTS, accuracies):
            if shots in shown:
                paper[shots] = [accuracy]
        rows["the paper's: zero-shot, M=16 end"] = paper
    return rows


def table(results):
    """Accuracy by method and number of shots: mean over seeds ± standard deviation (n - 1)."""
    rows = collect(results)
    columns = sorted({result["settings"]["shots"] for result in results})
    width = max(len(row) for row in rows) + 2
    lines = ["accuracy, %".ljust(width) + "".join(f"{f'{shots} shots':>15}" for shots in columns)]
    for row, cells in rows.items():
        line = row.ljust(width)
        for shots in columns:
            line += f"{mean_and_spread(cells.get(shots, [])):>15}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def mean_and_spread(values):
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def plot(args, setup, results):
    """The paper's figure 3, and eight test images with their predictions.  Returns the files."""
    curves = args.out / f"{setup.dataset.name}-accuracy.png"
    plot_accuracy(results, setup.dataset.name, curves)
    learned = [result for result in results if result["settings"]["method"] == "coop"]
    if not learned:
        return [curves]
    best = max(learned, key=lambda result: result["settings"]["shots"])
    images = args.out / f"{setup.dataset.name}-images.png"
    plot_images(setup, Run(**best["settings"]), args, images)
    return [curves, images]


def new_figure(width, height):
    """A figure of matplotlib, the one optional package, without pyplot, which wants a screen."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def plot_accuracy(results, title, path):
    """Accuracy against shots, zero-shot as a star, the spread over seeds as a band."""
    figure = new_figure(6.5, 4.5)
    axes = figure.subplots()
    for row, cells in collect(results).items():
        shots = sorted(cells)
        mean = np.array([statistics.mean(cells[count]) for count in shots])
        spread = np.array([np.std(cells[count], ddof=min(1, len(cells[count]) - 1))
                           for count in shots])
        style = "*" if row.startswith("zero-shot") else "o-"
        size = 12 if row.startswith("zero-shot") else 5
        label = row.replace("$", r"\$")              # no mathematics
        line, = axes.plot(shots, mean, style, label=label, markersize=size)
        axes.fill_between(shots, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="labeled images per class", ylabel="accuracy on the test images, %",
             title=title.replace("$", r"\$"),
             xticks=sorted({result["settings"]["shots"] for result in results}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with data.atomic_write(path) as file:
        figure.savefig(file, dpi=150)


def plot_images(setup, run, args, path):
    """Eight test images, their class, and what the hand-written and the learned prompt say.

    The images are drawn at random, always the same ones.
    """
    names = setup.classnames(run.classes)
    prompt = load_prompt(args.out / f"{run.stem}.pt")
    hand = setup.hand_written(args.templates[0], run.classes)
    learned = prompt_features(prompt, setup, run.classes)
    f, labels = setup.test_part(run.classes)
    items = setup.renumber(setup.dataset.test, run.classes)
    chosen = random.Random(0).sample(range(len(items)), min(8, len(items)))
    figure = new_figure(13, 2.6)
    words = f"class; below: what \"{args.templates[0]}\" says, what {run} says"
    figure.suptitle(words.replace("$", r"\$"), fontsize=10)
    places = figure.subplots(1, len(chosen), squeeze=False)[0]
    for i, axes in zip(sorted(chosen), places):
        axes.imshow(data.test_crop(data.read_image(items[i][0]), 128))
        axes.set_title(names[labels[i]], fontsize=9, parse_math=False)
        axes.axis("off")
        for line, g in enumerate((hand, learned)):
            answer = classify(f[i:i + 1], g).item()
            color = "tab:green" if answer == labels[i] else "tab:red"
            axes.text(0.5, -0.12 - 0.15 * line, names[answer], color=color, fontsize=9,
                      ha="center", transform=axes.transAxes, parse_math=False)
    with data.atomic_write(path) as file:
        figure.savefig(file, dpi=150)


# ---- 7. A learned prompt -------------------------------------------------------------------------
#
# V means something to the text encoder that it was learned for and nothing to another one.  A V for
# all classes goes with any class names, as "a photo of a" does; class-specific contexts go with
# their own classes only.


@torch.no_grad()
def learned_features(clip, tokenizer, classnames, parameters, position):
    """L2-normalized text features (K, e) of a learned prompt with these class names.

    parameters: {name: tensor}, of a PromptLearner; a prompt that was loaded contains them.
    """
    V = parameters["V"]
    csc = V.dim() == 3
    learner = PromptLearner(clip, tokenizer, classnames, V.shape[-2], position, csc)
    for name, parameter in learner.named_parameters():
        parameter.copy_(parameters[name])
    return F.normalize(clip.encode_prompts(*learner()), dim=-1)


def save_prompt(path, setup, run, parameters):
    """Save all that a later use needs; torch.load(path, weights_only=True) reads it."""
    classnames = setup.classnames(run.classes)
    g = learned_features(setup.clip, setup.tokenizer, classnames, parameters, run.position)
    backbone = setup.backbone
    if backbone not in clip_model.MODELS:
        backbone = os.path.abspath(backbone)
    prompt = {
        **{name: parameter.detach().cpu() for name, parameter in parameters.items()},
        "classnames": classnames,
        "text_features": g.cpu(),
        "logit_scale": setup.clip.logit_scale.cpu(),
        "resolution": setup.clip.resolution,
        "path": backbone,
        "gelu": setup.clip.gelu,
        "settings": dataclasses.asdict(run),
    }
    with data.atomic_write(path) as file:
        torch.save(prompt, file)


def find_prompt(path):
    """A prompt file, or the newest in a folder, or the newest whose path begins so.

    Up to a "-" of the name: runs/photos is the beginning of runs/photos-rn50-....pt, not of
    runs/photos2-rn50-....pt.
    """
    if path.suffix == ".json":                       # the result beside it
        path = path.with_suffix(".pt")
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    prompts = list(folder.glob("*.pt"))
    found = prompts
    if folder != path:
        found = [file for file in prompts if file.name.startswith(f"{path.name}-")]
    if not found:
        names = data.some(sorted(file.name for file in prompts)) or "none"
        raise ValueError(f"no prompt {path}: expected a file of this program (runs/*.pt), the "
                         "beginning of its path up to a '-', or a checkpoint of the official code; "
                         f"prompts in {folder}: {names}")
    newest = max(found, key=os.path.getmtime)
    print(f"prompt: {newest} (the newest of {len(found)})", file=sys.stderr)
    return newest


def load_prompt(path):
    """A prompt saved by us, or by the official code (prompt_learner/model.pth.tar-N).

    Returns {"V", "classnames", "settings", "path" of the backbone, "gelu"}; from us also
    "text_features" (K, e), "logit_scale" and "resolution".  The official code saves V alone:
    "classnames" and "path" are None then.  ValueError for anything else.
    """
    content = clip_model.read_file(path)
    expected = "expected a file of this program (runs/*.pt) or a checkpoint of the official code"
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a learned prompt; {expected}")
    state = content.get("state_dict")
    if isinstance(state, dict) and isinstance(state.get("ctx"), torch.Tensor):
        content = {"V": state["ctx"], "classnames": None, "settings": {}}
    if not is_prompt(content):
        raise ValueError(f"{path} is not a learned prompt, or a damaged one; {expected}")
    return {"path": None, "gelu": None, **content, "V": content["V"].float(), "file": path}


def is_prompt(content):
    """Whether a file's content has the parts of a prompt, in shapes that fit each other."""
    V = content.get("V")
    names = content.get("classnames")
    if not isinstance(V, torch.Tensor) or V.dim() not in (2, 3) or not V.isfinite().all():
        return False
    if not isinstance(content.get("settings"), dict):
        return False
    if names is None:
        return True
    g = content.get("text_features")
    scale = content.get("logit_scale")
    return (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(g, torch.Tensor) and g.dim() == 2 and len(g) == len(names)
        and (V.dim() == 2 or len(V) == len(names))
        and isinstance(scale, torch.Tensor) and scale.dim() == 0 and bool(scale.isfinite())
        and isinstance(content.get("resolution"), int)
        and isinstance(content.get("path"), str)
        and content["settings"].get("position") in POSITIONS
    )


def prompt_features(prompt, setup, split):
    """Text features (K, e) of a prompt with the class names of a dataset's split."""
    V = prompt["V"]
    names = setup.classnames(split)
    own = prompt["classnames"]
    if V.dim() == 3 and names != own:
        if own is None:
            if len(V) != len(names):
                raise ValueError(f"{prompt['file']} has contexts for {len(V)} classes of its own, "
                                 f"{setup.dataset.name} has {len(names)}")
        else:
            unknown = [name for name in names if name not in own]
            if unknown:
                raise ValueError(f"{prompt['file']} has a context for each of its own {len(V)} "
                                 f"classes and none for {unknown[0]!r}; only a prompt without "
                                 "--csc goes with other classes")
            V = V[[own.index(name) for name in names]]
    parameters = {**prompt, "V": V}
    position = prompt["settings"]["position"]
    return learned_features(setup.clip, setup.tokenizer, names, parameters, position)


def use_prompt(args):
    """What --load asks for: accuracy on a dataset, words, predictions, an export."""
    prompt = load_prompt(find_prompt(args.load))
    if (args.predict or args.export) and not prompt["classnames"]:
        raise ValueError(f"{args.load} is a checkpoint of the official code and stores no class "
                         "names; --data can test it")
    if "position" in prompt["settings"] and args.position != ["end"]:
        raise ValueError("--position is for checkpoints of the official code, which do not store "
                         f"it; {args.load} does")
    prompt["settings"].setdefault("position", args.position[0])
    backbone = args.backbone or prompt["path"]
    if not backbone:
        raise ValueError(f"{args.load} does not store for which backbone it was learned: give "
                         "--backbone")
    if not args.backbone and backbone not in clip_model.MODELS and not Path(backbone).is_file():
        raise ValueError(f"{args.load} was learned with {backbone}, which is not there: give the "
                         "same weights as --backbone (those of the demo: python coop.py --demo)")
    args.backbone = backbone
    args.gelu = args.gelu or prompt["gelu"]
    if args.data:
        setup = make_setup(args)
        clip = setup.clip
        tokenizer = setup.tokenizer
    else:
        clip, tokenizer = load_clip(backbone, args)
    check_prompt_fits(prompt, clip, backbone)
    if args.data:
        test_prompt(prompt, setup, args)
    if args.words:
        print_words(prompt, clip, tokenizer, args.words)
    if args.predict:
        predict(prompt, clip, args.predict, args.json)
    if args.export:
        export(prompt, args.export)


def check_prompt_fits(prompt, clip, backbone):
    """ValueError if a prompt was learned for other weights; the official code does not say."""
    weights = prompt["settings"].get("weights", weights_name(clip))
    d = clip.token_embedding.embedding_dim
    if prompt["V"].shape[-1] != d or weights != weights_name(clip):
        raise ValueError(f"{prompt['file']} was learned for other weights than {backbone}: give "
                         "its own as --backbone")


def check_text_features(prompt, setup):
    """ValueError if this program makes other text features of a prompt than those in its file."""
    names = prompt["classnames"]
    if names:
        position = prompt["settings"]["position"]
        g = learned_features(setup.clip, setup.tokenizer, names, prompt, position)
        distance = (g.cpu() - prompt["text_features"].cpu()).norm(dim=1).max()
        if not distance < 0.05:                      # even TF32 rounds at 1e-3
            raise ValueError(f"{prompt['file']} was learned by a program that builds prompts in "
                             "another way (an edit, another version): learn it anew")


def test_prompt(prompt, setup, args):
    """Print the accuracy of hand-written and learned prompts on a dataset; nothing is saved."""
    splits = [args.classes]
    if args.classes == "base" and prompt["V"].dim() == 2:
        splits = ["base", "new"]
    learned = {split: prompt_features(prompt, setup, split) for split in splits}
    check_text_features(prompt, setup)
    own = prompt["classnames"] or setup.dataset.classnames
    others = [name for name in setup.dataset.classnames if name not in own]
    if others:
        print(f"note: V was learned for other classes than {data.some(others)}", file=sys.stderr)
    left_out = len(setup.dataset.train) + len(setup.dataset.val)
    if left_out:
        print(f"note: {left_out} images for training and validation are not tested (of a folder "
              "test/<class>/ alone all are)", file=sys.stderr)
    data.check_images([path for path, _ in setup.dataset.test], setup.dataset)
    for split, g in learned.items():
        f, labels = setup.test_part(split)
        if not len(labels):
            raise ValueError(f"there are no test images{of_classes(split)}")
        name = "" if split == "all" else f" ({split} classes)"
        for template in args.templates:
            accuracy = evaluate(f, setup.hand_written(template, split), labels)
            print(f'zero-shot "{template}"{name}: {accuracy:.2f} %')
        correct = classify(f, g) == labels
        per_class = accuracy_by_class(correct, labels, setup.classnames(split))
        print(f"{prompt['file']}{name}: {percent(correct):.2f} %; {hardest_classes(per_class)}")


def predict(prompt, clip, paths, as_json):
    """Print the five most probable classes of each image in files and folders (equation 1).

    The probabilities are among these K classes: an image of something else gets one of them, too.
    Images that cannot be read are named on stderr and do not stop the others; ValueError at the
    end.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            content = data.find_files(path)
            files += content.images
            if content.others:
                print(f"note: files in {path} passed over: {len(content.others)}; first: "
                      f"{content.others[0]}", file=sys.stderr)
        else:
            files.append(path)
    if not files:
        raise ValueError(f"no images in {', '.join(paths)}")
    broken = 0
    for start in range(0, len(files), BATCH_SIZE):
        crops = []
        readable = []
        for file in files[start:start + BATCH_SIZE]:
            try:
                crops.append(np.asarray(data.test_crop(data.read_image(file), clip.resolution)))
                readable.append(file)
            except ValueError as error:
                print(f"note: {error}", file=sys.stderr)
                broken += 1
        if readable:
            for file, p in zip(readable, probabilities(prompt, clip, np.stack(crops))):
                print_prediction(file, p, prompt["classnames"], as_json)
    if broken:
        raise ValueError(f"{broken} of {len(files)} images could not be read, see the notes above")


@torch.inference_mode()
def probabilities(prompt, clip, pixels):
    """Equation 1 for test crops (B, R, R, 3) uint8 -> (B, K) on the CPU."""
    x = data.normalize(torch.from_numpy(pixels).to(clip.device))
    f = F.normalize(clip.encode_image(x).float(), dim=-1)
    g = prompt["text_features"].to(clip.device)
    return (clip.logit_scale.exp() * f @ g.T).softmax(-1).cpu()


def print_prediction(file, p, classnames, as_json):
    """One line for an image with class probabilities p (K,)."""
    top = p.topk(min(5, len(p)))
    best = [(classnames[k], value) for k, value in zip(top.indices.tolist(), top.values.tolist())]
    if as_json:
        classes = [[name, round(value, 4)] for name, value in best]
        print(json.dumps({"image": str(file), "classes": classes}), flush=True)
    else:
        named = ", ".join(f"{name} {100 * value:.1f} %" for name, value in best)
        print(f"{file}: {named}", flush=True)


def export(prompt, path):
    """A classifier for numpy: text features, class names, 1 / tau, and the pixel constants."""
    if path.exists() and path.samefile(prompt["file"]):
        raise ValueError(f"--export {path} would overwrite the prompt itself")
    content = dict(
        text_features=prompt["text_features"].numpy(),
        classnames=np.array(prompt["classnames"]),
        logit_scale=prompt["logit_scale"].exp().item(),      # 1 / tau, no logarithm here
        resolution=prompt["resolution"],
        mean=data.MEAN.numpy(),
        std=data.STD.numpy(),
    )
    with data.atomic_write(path) as file:
        np.savez(file, **content)
    print(f"{path}: {len(prompt['classnames'])} classes")


# Distances without the matrix product of |a|^2 - 2ab + |b|^2, whose small differences lose digits.
NO_PRODUCT = "donot_use_mm_for_euclid_dist"


def nearest_words(V, clip, tokenizer, count):
    """For each vector of V (M, d) the `count` nearest vocabulary entries: [(word, distance), ...].

    By Euclidean distance, as in the paper's table 4.  V moves freely between the words, so the
    nearest one can be far away.
    """
    embedding = clip.token_embedding.weight
    distances = torch.cdist(V, embedding, compute_mode=NO_PRODUCT)
    nearest = distances.topk(min(count, len(embedding)), largest=False)
    words = []
    for values, ids in zip(nearest.values.tolist(), nearest.indices.tolist()):
        words.append([(tokenizer.decode([i]).strip(), value) for value, i in zip(values, ids)])
    return words


def print_words(prompt, clip, tokenizer, count):
    """Print the nearest vocabulary entries of every context vector."""
    print("the nearest entries of the vocabulary to each vector of V, with their distances")
    V = prompt["V"].to(clip.device)
    contexts = V if V.dim() == 3 else V[None]
    for k, context in enumerate(contexts):
        if V.dim() == 3:
            print(prompt["classnames"][k] if prompt["classnames"] else f"class {k}")
        for m, words in enumerate(nearest_words(context, clip, tokenizer, count), 1):
            named = [f"{word if word.isprintable() else repr(word)} {distance:.4f}"
                     for word, distance in words]
            print(f"  V{m}: {', '.join(named)}")


def frequent_words(prompt, setup):
    """The caption words of the demo nearest to the vectors of V, the most frequent first."""
    V = prompt["V"].to(setup.clip.device).flatten(0, -2)
    words = []
    ids = []
    for word in data.caption_words():
        tokens = setup.tokenizer.encode(word)
        if len(tokens) == 1:                         # rare words are several
            words.append(word)
            ids += tokens
    embedding = setup.clip.token_embedding.weight[ids]
    nearest = torch.cdist(V, embedding, compute_mode=NO_PRODUCT).argmin(-1)
    counts = collections.Counter(words[i] for i in nearest.tolist())
    return ", ".join(f"{word} ({count} of {len(V)})" for word, count in counts.most_common(5))


# ---- 8. The demo ---------------------------------------------------------------------------------

DEMO_TEMPLATES = ("a photo of a {} texture.", "a negative photo of a {} texture.")


def make_demo(cache):
    """The folder of the demo's world, made when it is asked for the first time.

        demo-1a2b3c4d/                  ends in a hash of the code that makes it
            clip.pt                     a small CLIP, trained here on drawn images and captions
            clip.merges.txt             its vocabulary, learned from the captions
            open_clip_config.json
            demo/train/red dotted/...   to classify: negatives; also val, test
            demo-photos/test/...        other images to test a prompt on: no negatives
            demo-faint/test/...         fainter negatives
    """
    folder = cache / f"demo-{demo_code()}"
    weights = folder / "clip.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if not weights.is_file():
        torch.manual_seed(0)
        images, captions = data.draw_pairs(8000)
        tokenizer = Tokenizer(tokenizer_module.learn_merges(captions, limit=10_000))
        visual = clip_model.ModifiedResNet(64, [1, 1, 1, 1], 16, 64)
        clip = clip_model.CLIP(64, visual, 64, 2, vocab_size=tokenizer.vocab_size)
        clip.token_embedding.requires_grad_(False)   # words stay at N(0, 0.02^2), where V starts
        images = data.normalize(torch.from_numpy(images))
        progress = Progress("training a small CLIP on drawn images, once", 1000, "steps")
        clip_model.pretrain(clip, images, tokenizer(captions, 32), 1000, progress=progress)
        tokenizer.save(folder / "clip.merges.txt")
        config = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {}}
        (folder / clip_model.CONFIG).write_text(json.dumps(config), encoding="utf-8")
        with data.atomic_write(weights) as file:
            torch.save(clip.state_dict(), file)
    worlds = {
        "demo": (data.TASK, {"train": 16, "val": 4, "test": 20}),
        "demo-photos": (data.Style(), {"test": 10}),
        "demo-faint": (dataclasses.replace(data.TASK, contrast=(0.4, 0.6)), {"test": 10}),
    }
    for name, (style, counts) in worlds.items():
        if not (folder / name).is_dir():
            data.draw_dataset(folder / name, counts, style)
    return folder


def demo_code():
    """A hash of the code that draws and trains the demo's world: an edit makes a new one."""
    return code_hash([(sys.modules[__name__], "make_demo")])


# ---- 9. The command line -------------------------------------------------------------------------

EXAMPLES = """examples:
  python coop.py --demo                                     learn on drawn images, no download
  python coop.py --data ./my_photos --shots 8               learn from a folder of class folders
  python coop.py --load runs/my_photos --predict new.jpg    classify with the learned prompt"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def natural(text):
    """A number of the command line: 0, 1, 2, ..."""
    if not text.isdecimal() or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def make_parser():
    """All options, with their defaults."""
    home = os.path.expanduser("~")
    if home == "~":                                  # there is no home directory
        home = tempfile.gettempdir()
    parser = Parser(
        prog="coop.py", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Learn the words of a CLIP prompt from a few images per class (CoOp, arXiv "
                    "2109.01134).\nDefaults are in parentheses.")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="DIR", type=Path,
        help="a dataset, or a folder of class folders")
    add("--demo", action="store_true",
        help="drawn images and a small CLIP trained here instead: nothing to download")
    add("--shots", metavar="N", type=natural, nargs="+",
        help="training images per class; 0: zero-shot only (16; with --demo 4)")
    add("--seeds", metavar="S", type=natural, nargs="+", default=[1],
        help="seeds of the few-shot sample, V's start, the batches and wrong labels (1)")
    add("--classes", choices=SPLITS, default="all",
        help="learn on all classes, on the base ones (the first half; a V for all classes is then "
             "tested on the new ones, too) or on the new ones (all)")

    group = parser.add_argument_group("method")
    add = group.add_argument
    add("--backbone", metavar="NAME",
        help=f"a weight file, or one of {', '.join(clip_model.MODELS)} (RN50; with --load the "
             "prompt's own)")
    add("--gelu", choices=["quick", "exact"],
        help="what a weight file was trained with: most of LAION's need exact (quick, or what an "
             "open_clip_config.json beside the file says)")
    add("--M", type=natural, nargs="+", default=[16],
        help="the paper's M, the number of context vectors (16)")
    add("--position", choices=POSITIONS, nargs="+", default=["end"],
        help="where the class name stands (end)")
    add("--csc", choices=["yes", "no", "both"], nargs="?", const="yes", default="no",
        help="class-specific contexts, a V for each class (no)")
    add("--init", metavar="WORDS",
        help='start V from these words, "a photo of a", instead of noise; their tokens set M')
    add("--epochs", metavar="T", type=natural,
        help="the paper's T (by shots: 50 for 1 and for ImageNet, 100 for 2 and 4, else 200)")
    add("--views", metavar="N", type=natural, default=0,
        help="reuse N crops per image, approximate and faster; 0: a fresh crop every epoch (0)")
    add("--device", metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps, ... (cuda where there is one, else cpu)")
    add("--precision", choices=list(PRECISIONS),
        help="of the image encoder; fp16 and bf16 are approximate (fp16 on CUDA, else fp32)")

    group = parser.add_argument_group("comparisons")
    add = group.add_argument
    add("--template", metavar="TEXT", nargs="+",
        help="zero-shot prompt with {} for the class name; several: an ensemble (the dataset's)")
    add("--probe", action="store_true",
        help="also a linear probe on the image features (with the right labels, despite --noise)")
    add("--loss", choices=LOSSES, default="ce",
        help="cross-entropy, generalized for wrong labels, or KgCoOp's, near the template (ce)")
    add("--noise", metavar="SHARE", type=float, default=0.0,
        help="make this share of the training labels wrong (0)")
    add("--plot", action="store_true",
        help="accuracy against shots, and predictions, as PNG files in --out (needs matplotlib)")

    group = parser.add_argument_group("using a prompt")
    add = group.add_argument
    add("--load", metavar="PROMPT", type=Path,
        help="a learned prompt, or the beginning of its path, for --data (test it there) or:")
    add("--predict", metavar="IMAGE", nargs="+",
        help="the most probable classes of images, or of all images in folders")
    add("--json", action="store_true", help="--predict as JSON lines")
    add("--export", metavar="FILE.npz", type=Path,
        help="text features and constants: a classifier for numpy")
    add("--words", metavar="N", type=natural,
        help="the N vocabulary entries nearest to each context vector")

    group = parser.add_argument_group("files")
    add = group.add_argument
    add("--out", metavar="DIR", type=Path, default=Path("runs"),
        help="results and learned prompts (runs)")
    add("--again", action="store_true", help="repeat runs that are done")
    add("--cache", metavar="DIR", type=Path, default=Path(home, ".cache", "coop"),
        help="image features and the demo (~/.cache/coop)")
    add("--no-cache", action="store_true", help="encode all images again and keep nothing")
    return parser


def parse(argv):
    """The command line as attributes.  ValueError for what cannot go together."""
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_contradictions(args, parser)
    if args.shots is None:
        args.shots = [4] if args.demo else [16]
    for name in ("shots", "seeds", "M", "position"):             # the same value twice is one run
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.csc = {"no": [False], "yes": [True], "both": [False, True]}[args.csc]
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = process_number()
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{rank % torch.cuda.device_count()}"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).split("\n")[0][:60]
        raise ValueError(f"--device {args.device} cannot be used here; expected cpu, cuda, cuda:1 "
                         f"or mps, where there is one ({first_line} ...)") from None
    if args.precision is None:
        args.precision = "fp16" if args.device.startswith("cuda") else "fp32"
    args.templates = []
    if args.template:
        args.templates = [JOIN.join(args.template)]
    elif args.demo:
        args.templates = list(DEMO_TEMPLATES)
    return args


def refuse_contradictions(args, parser):
    """ValueError for options that cannot go together or are out of range."""
    uses = args.predict or args.export or args.words
    if uses and not args.load:
        raise ValueError("--predict, --export and --words need --load PROMPT")
    if not (args.data or args.demo or args.load):
        raise ValueError("one of --data, --demo and --load is needed (see --help)")
    if args.data and args.demo:
        raise ValueError("--demo brings its own --data")
    if args.demo and args.backbone:
        raise ValueError("--demo trains a model of its own: leave out --backbone")
    if args.load:
        if not (args.data or args.demo or uses):
            raise ValueError("--load needs --data, --predict, --export or --words")
        if not (args.data or args.demo) and (args.template or args.classes != "all"):
            raise ValueError("--template and --classes go with --data")
        for name in ("shots", "seeds", "M", "csc", "init", "epochs", "views", "probe", "plot",
                     "loss", "noise", "again"):
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name} is for learning; --load uses a learned prompt")
    if args.json and (not args.predict or args.data or args.demo or args.words or args.export):
        raise ValueError("--json goes with --predict alone")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if not 0 <= args.noise <= 1:
        raise ValueError("--noise is a share between 0 and 1")
    if args.epochs == 0 or args.words == 0 or 0 in args.M:
        raise ValueError("--M, --epochs and --words are 1 or more")
    if args.init is not None and args.M != parser.get_default("M"):
        raise ValueError("the words of --init set M: leave out --M")
    for template in args.template or []:
        if JOIN in template:
            raise ValueError(f"--template {template!r} contains {JOIN!r}, which separates the "
                             "templates of an ensemble in results")
        if "{}" not in template:
            raise ValueError(f"--template {template!r} needs {{}} where the class name goes")


def run_command(args):
    """All that one command line asks for."""
    if args.demo:
        folder = make_demo(args.cache)
        args.data = folder / "demo"
        args.backbone = str(folder / "clip.pt")
    if args.load:
        return use_prompt(args)
    args.backbone = args.backbone or "RN50"
    return run_grid(args)


def main(argv=None):
    """The command line.  A user's mistake ends in one line and exit code 2, Ctrl-C in 130.

    Of several processes only the first one speaks.  The others wait until it has made, downloaded
    and checked all that is needed; what fails later is their own and is said, too.
    """
    errors = sys.stderr
    if process_number()[0]:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        sys.stderr = sys.stdout
    elif argv is None and len(sys.argv) == 1:
        print(EXAMPLES)
    shown = sys.stderr
    try:
        program_code()                               # now: it may be edited while it runs
        image_code()
        args = parse(argv)
        start_processes(args)
        if args.rank:
            wait_for_all(args)
            shown = errors
        run_command(args)
    except BrokenPipeError:                          # the output went to head, say
        sys.stdout = None
        sys.exit(1)
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        print("error: " + " ".join(str(error).split()), file=shown)
        sys.exit(2)
    except Exception:
        if shown is sys.stderr:
            raise
        traceback.print_exc(file=shown)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; finished runs and encoded images (but for the last thousand crops) are "
              "kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")     # names in any script, terminals of few
    main()
