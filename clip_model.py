"""CLIP: an image encoder and a text encoder that put matching images and sentences side by side.

    from clip_model import load
    clip = load("RN50")                      # downloads 244 MiB once; or a weight file of your own
    f = clip.encode_image(x)                 # (B, 3, R, R) -> (B, e)
    g = clip.encode_text(ids)                # (N, L)       -> (N, e)
    cosines = F.normalize(f, dim=-1) @ F.normalize(g, dim=-1).T
    logits = clip.logit_scale.exp() * cosines

"Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
Symbols: B images in a batch; e width of the common embedding; R side of the square image; d width
of a token; L text length; tau = 1 / exp(logit_scale) the temperature.  Modules and parameters have
the names of OpenAI's checkpoints.

Know before: what a transformer layer and a convolution are.  To take away: CLIP is two encoders
that meet only in a cosine.  So a sentence can stand for a class that no classifier was trained on,
and either side can be computed once and kept.  Read in this order: contrastive_loss (what CLIP was
trained for), CLIP with encode_text and encode_prompts, Block, the two image encoders; weight files
last.  Needs torch and no other file of this project.
"""
import functools
import hashlib
import json
import math
import os
import pathlib
import pickle
import socket
import sys
import tempfile
import zipfile
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

HEAD = 64       # width of an attention head, in every one of OpenAI's models


def contrastive_loss(image_features, text_features, logit_scale):
    """What CLIP was trained with (paper, figure 3): (B, e), (B, e) -> scalar.

    In a batch of B pairs each image must find its own caption among the B captions, and each
    caption its own image.
    """
    f = F.normalize(image_features, dim=-1)
    g = F.normalize(text_features, dim=-1)
    logits = logit_scale.exp() * f @ g.T                    # (B, B), pairs on the diagonal
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def pretrain(clip, images, ids, steps, batch_size=64, lr=2e-3, progress=None):
    """Train a CLIP from scratch on N pairs: images (N, 3, R, R), ids (N, L).

    AdamW with warm-up and a cosine schedule, simplified from the CLIP paper's section 2.5.  images
    are normalized, and gradients of the parameters switched on, as in a new CLIP (load() gives a
    frozen one).  progress(note), if given, is called after every step.
    """
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    clip.train()
    for _ in range(steps):
        pairs = torch.randint(len(images), (batch_size,))
        f = clip.encode_image(images[pairs])
        g = clip.encode_text(ids[pairs])
        loss = contrastive_loss(f, g, clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(max=math.log(100))     # as in the paper
        if progress:
            progress(f"loss {loss.item():.2f}")
    return clip.eval()


class CLIP(nn.Module):
    """The two encoders and the scale of their cosine.

    The scale is stored as its logarithm, so that it stays positive and a gradient step changes it
    by a factor, not by an amount.
    """

    GROUP = 512                # encode_prompts: about so many tokens in one sequence
    RECOMPUTE_ABOVE = 2048     # encode_prompts: with more tokens activations are not stored

    def __init__(self, e, visual, width, layers, context_length=77, vocab_size=49408):
        super().__init__()
        self.visual = visual
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, e))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.gelu = "quick"
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def resolution(self):
        """R: the encoder takes images of R x R pixels."""
        return self.visual.resolution

    @property
    def device(self):
        return self.logit_scale.device

    @property
    def context_length(self):
        """The largest number of tokens in a text, start and end included."""
        return len(self.positional_embedding)

    @property
    def vocab_size(self):
        return self.token_embedding.num_embeddings

    @property
    def image_dtype(self):
        """The precision of the image encoder; the text encoder is fp32."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, x):
        """Images (B, 3, R, R) -> features (B, e) in image_dtype, not L2-normalized.

        Images are resized to R x R, scaled to 0 .. 1, minus MEAN, divided by STD.
        """
        return self.visual(x.to(self.image_dtype))

    def encode_text(self, ids):
        """Token ids (N, L), rows sot ... eot 0 0 0 -> features (N, e), not L2-normalized.

        L is at most context_length.  eot is the largest id of a row.

        The whole sentence is read off at eot, its last token.  Attention is causal: a token sees
        itself and what stands left of it, so eot is the only one that has seen everything.  (Why
        causal at all?  So that the encoder could start from a language model; paper, 2.4.)

        EXACT up to rounding: causal also means that columns right of the last eot in the batch
        change nothing, so they are cut off.  Proof: test_encoders_equal_openais.
        """
        eot = ids.argmax(-1)
        L = int(eot.max()) + 1
        x = self.token_embedding(ids[:, :L]) + self.positional_embedding[:L]        # (N, L, d)
        mask = torch.full((L, L), -math.inf, device=x.device, dtype=x.dtype).triu_(1)
        x = self.transformer(x, mask)
        x = x[torch.arange(len(x), device=x.device), eot]   # (N, L, d) -> (N, d)
        return self.ln_final(x) @ self.text_projection

    def encode_prompts(self, shared, own, lengths):
        """Features (K, e) of K prompts that begin alike, from token embeddings.

        shared (P, d): the beginning of all prompts.  own (sum of lengths, d): the rest of each
        prompt, end to end; every rest ends with eot.  lengths (K,): how long each rest is.
        Positions are added here.  Raises ValueError if a prompt is longer than the model reads.

        EXACT up to rounding (float64: 1e-10, value and gradient; test_packed_equals_plain):

            one sequence:  sot V1 V2 V3 | banded . eot | polka - dotted . eot | ...
            positions:      0   1  2  3 |   4    5  6  |   4   5    6   7  8  | ...
            branch:        -1  -1 -1 -1 |   0    0  0  |   1   1    1   1  1  | ...
            a token sees:  the trunk (branch -1), and its own branch, up to its own position

        Each token meets the same positions and the same neighbors as in a sentence of its own, so
        it gets the same result.  The trunk, which being causal never sees a class name, is
        computed once instead of K times; padding and everything right of eot not at all.  If
        the encoder were not causal, V would see the name, each prompt would need a trunk of its
        own, and this function would quietly return wrong features.

        The mask is quadratic in the length of the sequence, so many prompts are split into groups,
        one sequence each.  If the rests together have more than RECOMPUTE_ABOVE tokens, activations
        are not stored but computed again, group by group, in the backward pass: memory holds those
        of one group, however large K is.
        """
        lengths = torch.as_tensor(lengths).tolist()
        longest = len(shared) + max(lengths)
        if longest > self.context_length:
            raise ValueError(
                f"prompt of {longest} tokens; this model reads {self.context_length}")
        encode = self.encode_group
        if len(own) > self.RECOMPUTE_ABOVE:
            encode = functools.partial(
                checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
        features = []
        first = 0
        start = 0
        while first < len(lengths):
            last = first
            end = start
            while last < len(lengths) and end - start < self.GROUP:
                end += lengths[last]
                last += 1
            features.append(encode(shared, own[start:end], lengths[first:last]))
            first = last
            start = end
        return torch.cat(features)

    def encode_group(self, shared, own, lengths):
        """encode_prompts for one group, as one sequence of P + sum(lengths) tokens."""
        P = len(shared)
        position = list(range(P))
        branch = [-1] * P
        for k, length in enumerate(lengths):
            position += range(P, P + length)
            branch += [k] * length
        position = torch.tensor(position, device=own.device)
        branch = torch.tensor(branch, device=own.device)
        eot = P - 1 + torch.tensor(lengths, device=own.device).cumsum(0)      # ends of branches
        same_branch = (branch == -1) | (branch == branch[:, None])
        sees = same_branch & (position <= position[:, None])
        x = torch.cat([shared, own]) + self.positional_embedding[position]
        mask = torch.where(sees, 0.0, -math.inf).to(x.dtype)
        x = self.transformer(x[None], mask, rows=eot)[0]    # (P + sum of lengths, d) -> (K, d)
        return self.ln_final(x) @ self.text_projection

    @classmethod
    def from_state_dict(cls, sd, gelu="quick"):
        """The model that a state dict with OpenAI's names belongs to, sizes read off the shapes.

        Weights are copied as fp32; the model is in eval mode, not frozen.  gelu: "quick" or
        "exact", which the weights cannot say.  Raises ValueError if names, shapes or values do not
        fit.
        """
        if "prepared" in sd:
            raise ValueError("saved after prepare(), which changes weights; save them before it")
        weights = {}
        for name, value in sd.items():
            if name in ("input_resolution", "context_length", "vocab_size"):    # no weights
                continue
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            weights[name] = value.detach().to(dtype, copy=True)
            if not weights[name].isfinite().all():
                raise ValueError(f"not the weights of a CLIP: NaN or infinity in {name}")
        try:
            with torch.device("meta"):       # no memory and no random numbers: weights come below
                clip = cls(**read_architecture(weights))
            clip.load_state_dict(weights, assign=True)      # strict: every name and shape fits
        except (KeyError, RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"not the weights of one of OpenAI's architectures: {why}") from None
        if gelu == "exact":
            for module in clip.modules():
                if isinstance(module, Block):
                    module.mlp.gelu = nn.GELU()
        clip.gelu = gelu
        return clip.eval()


def read_architecture(weights):
    """The arguments of CLIP(...) that fit the weights.  KeyError or ValueError if none do."""
    vocab_size, width = weights["token_embedding.weight"].shape
    e = weights["text_projection"].shape[1]
    if "visual.proj" in weights:
        channels, _, _, patch = weights["visual.conv1.weight"].shape
        if channels in (1280, 1408, 1664, 1792):
            raise ValueError(f"an image encoder of width {channels} (ViT-H, g, bigG or E) has "
                             f"attention heads wider than {HEAD}: it would be computed wrongly")
        side = grid_side(weights["visual.positional_embedding"])
        layers = count_children(weights, "visual.transformer.resblocks")
        visual = VisionTransformer(side * patch, patch, channels, layers, e)
    else:
        channels = 2 * len(weights["visual.conv1.weight"])
        side = grid_side(weights["visual.attnpool.positional_embedding"])
        layers = [count_children(weights, f"visual.layer{i}") for i in (1, 2, 3, 4)]
        visual = ModifiedResNet(32 * side, layers, channels, e)     # it shrinks images by 32
    return dict(
        e=e,
        visual=visual,
        width=width,
        layers=count_children(weights, "transformer.resblocks"),
        context_length=len(weights["positional_embedding"]),
        vocab_size=vocab_size,
    )


def grid_side(positions):
    """The side of the square grid that has these positions; one more is the class token's."""
    return math.isqrt(len(positions) - 1)


def count_children(weights, prefix):
    """How many numbered parts stand below a name: prefix.0, prefix.1, ..."""
    names = [name for name in weights if name.startswith(f"{prefix}.")]
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in names})


# ---- The parts of both encoders ------------------------------------------------------------------


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU that OpenAI's weights were trained with.

    torch's exact GELU differs by up to 0.02 and would quietly cost accuracy.  silu(y) is
    y * sigmoid(y).
    """

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


class Attention(nn.Module):
    """Multi-head self-attention; parameters are named as in torch.nn.MultiheadAttention.

    Every token has a query q, a key k and a value v.  It receives the mean of the values, weighted
    by how well their keys match its query: softmax(q k^T / sqrt(64)) v.  Each of the d / 64 heads
    does this in 64 dimensions.
    """

    def __init__(self, d):
        super().__init__()
        self.in_proj_weight = nn.Parameter(d ** -0.5 * torch.randn(3 * d, d))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)

    def forward(self, x, mask=None, rows=None):
        """x (B, L, d) -> (B, number of rows, d): what the tokens at the indices `rows` receive.

        mask (number of rows, L) is added to the scores: where mask[i, j] = -inf, token i does not
        attend to token j.
        """
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, -1, HEAD))              # (B, L, 3, heads, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # each (B, heads, L, 64)
        if rows is not None:
            q = q[:, :, rows]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention lets tokens exchange information, the MLP works on each alone; both add to x."""

    def __init__(self, d):
        super().__init__()
        self.attn = Attention(d)
        self.ln_1 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(d, 4 * d),
            gelu=QuickGELU(),
            c_proj=nn.Linear(4 * d, d),
        ))
        self.ln_2 = nn.LayerNorm(d)

    def forward(self, x, mask=None, rows=None):
        received = self.attn(self.ln_1(x), mask, rows)
        if rows is not None:
            x = x[:, rows]
        x = x + received
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; resblocks is OpenAI's name for the list."""

    def __init__(self, d, layers):
        super().__init__()
        if layers < 1 or d % HEAD:
            raise ValueError(f"a transformer of {layers} layers and width {d}: expected at least "
                             f"one layer and a multiple of {HEAD}")
        self.resblocks = nn.ModuleList(Block(d) for _ in range(layers))

    def forward(self, x, mask=None, rows=None):
        """(B, L, d) -> (B, number of rows, d).

        EXACT: below the last layer every token is needed, as others look at it; in the last one
        only the rows that somebody reads.
        """
        for block in self.resblocks[:-1]:
            x = block(x, mask)
        if mask is not None and rows is not None:
            mask = mask[rows]
        return self.resblocks[-1](x, mask, rows)


# ---- The image encoders --------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """ViT (arXiv 2010.11929): the image as a sentence of patches, read off at a class token.

    Attention is not causal here: patches have no reading order, every token sees every other one,
    and so the class token can stand first.
    """

    def __init__(self, resolution, patch, width, layers, e):
        super().__init__()
        positions = (resolution // patch) ** 2 + 1
        self.resolution = resolution
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)    # a vector per patch
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, e))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)        # (B, 3, R, R) -> (B, patches, width)
        class_token = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), rows=slice(0, 1))     # only the class token is read
        return self.ln_post(x[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut.

    Where the image shrinks, average pooling does it, in both branches: a strided convolution would
    skip pixels.
    """

    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.pool(y)))
        y += self.downsample(self.pool(x))
        return F.relu(y, inplace=True)


class AttentionPool(nn.Module):
    """One attention step with the mean as its only query.

    A weighted mean over the positions, with weights that depend on the content, where an ordinary
    ResNet takes the plain mean: a small object need not be drowned by its background.
    """

    def __init__(self, side, width, e):
        super().__init__()
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(side ** 2 + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, e)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).flatten(1, 2)             # (B, width, h, w) -> (B, h w, width)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        q = self.heads(self.q_proj(x[:, :1]))               # the mean
        k = self.heads(self.k_proj(x))
        v = self.heads(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v)         # (B, heads, 1, 64)
        return self.c_proj(x.flatten(1))

    def heads(self, x):
        return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)  # (B, L, width) -> (B, heads, L, 64)


class ModifiedResNet(nn.Module):
    """ResNet-D with a stem of three convolutions and attention pooling (CLIP paper, section 2.4).

    (B, 3, R, R) -> after the stem (B, width, R/4, R/4) -> after layer4 (B, 32 width, R/32, R/32)
    -> (B, e).

    Its BatchNorm layers must stay in eval mode.  In training mode they normalize with the mean and
    variance of whatever batch they see and drift toward it: the "frozen" encoder would change
    with every step, and an image's features would depend on its neighbors.  Freezing the weights
    does not prevent that, eval() does.  prepare() leaves no BatchNorm behind at all.
    """

    def __init__(self, resolution, layers, width, e):
        super().__init__()
        self.resolution = resolution
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self.make_layer(width, width, layers[0], stride=1)
        self.layer2 = self.make_layer(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = self.make_layer(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = self.make_layer(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool(resolution // 32, 32 * width, e)

    def make_layer(self, inputs, width, blocks, stride):
        """`blocks` bottlenecks of 4 * width channels; the first changes size and channels."""
        layer = nn.Sequential(Bottleneck(inputs, width, stride))
        for _ in range(blocks - 1):
            layer.append(Bottleneck(4 * width, width, stride=1))
        return layer

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = F.avg_pool2d(x, 2)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.attnpool(x)


def prepare(clip, image_dtype=torch.float32):
    """Fold constants into frozen weights, in place, and return clip: the same function, faster.

    BatchNorm in eval mode is a scale and a shift, which go into the convolution before it:
    a (W x) + b = (a W) x + b with a = gain / sqrt(variance), b = bias - a mean.  The 1.702 of
    QuickGELU goes into the linear layers around it (but for the last bias, which is added after
    them); what stays is torch's SiLU.  Weights are laid out channels-last, as the fast kernels
    want them.  EXACT up to rounding in fp32 (1e-5; test_encoders_equal_openais).

    image_dtype bfloat16 or float16, for the image encoder alone, is APPROXIMATE (README, "How it is
    fast").  The state dict of a prepared model is not one that load() reads.
    """
    clip.register_buffer("prepared", torch.tensor(True))
    for module in list(clip.modules()):
        fold_batch_norms(module)
        if isinstance(module, Block) and isinstance(module.mlp.gelu, QuickGELU):
            module.mlp.c_fc.weight.data *= 1.702
            module.mlp.c_fc.bias.data *= 1.702
            module.mlp.c_proj.weight.data /= 1.702
            module.mlp.gelu = nn.SiLU()
    clip.visual.to(dtype=image_dtype, memory_format=torch.channels_last)
    return clip


def fold_batch_norms(module):
    """Replace each pair of convolution and BatchNorm that are children of module."""
    for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
        if isinstance(getattr(module, bn, None), nn.BatchNorm2d):
            fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn))
            setattr(module, conv, fused)
            setattr(module, bn, nn.Identity())


# ---- Weights: nothing below teaches CLIP, skip it on a first reading -----------------------------
#
# OpenAI's own host has failed for some people, so the same files are looked for in three places.
# The checksum decides, so it does not matter whose copy it is.

MODELS = {   # name: (SHA-256 of the file, size in MiB)
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", 244),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", 278),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", 402),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", 630),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", 1290),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", 338),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", 335),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", 890),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", 891),
}
MIRRORS = [
    "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}",
    "{hub}/jinaai/clip-models/resolve/main/{file}",
    "{hub}/pxlpshr/pytti-models/resolve/main/clip/{sha256}/{file}",
]
HUB = "https://huggingface.co"       # HF_ENDPOINT, if set, replaces it, as everywhere
TIMEOUT = 30                   # seconds without an answer until the next place is tried
CONFIG = "open_clip_config.json"
MEAN = (0.48145466, 0.4578275, 0.40821073)          # of the pixels that OpenAI's models expect
STD = (0.26862954, 0.26130258, 0.27577711)


def load(name_or_path, device="cpu", gelu=None):
    """A frozen CLIP in fp32 and eval mode, with the file's checksum as `.sha256`.

    To fine-tune it, call requires_grad_(True) and leave out prepare().

    name_or_path: one of OpenAI's nine models by name, or a file with OpenAI's tensor names: their
    TorchScript archive, a state dict saved by torch.save, or open_clip's safetensors.

    gelu: "quick" or "exact".  A weight file does not say which of the two it was trained with: all
    of OpenAI's use "quick", most of LAION's and DataComp's "exact".  None takes what an
    open_clip_config.json beside the file says, otherwise "quick", with a note on stderr.

    Raises ValueError for a file that holds no such CLIP, OSError if a download fails.
    """
    if gelu not in (None, "quick", "exact"):
        raise ValueError(f"gelu is {gelu!r}; expected 'quick', 'exact' or None")
    path = pathlib.Path(name_or_path)
    if name_or_path in MODELS:
        path = fetch(name_or_path)
    elif not path.is_file():
        raise ValueError(f"unknown backbone {str(name_or_path)!r}: neither a file nor one of "
                         f"{', '.join(MODELS)}")
    digest = sha256(path)
    openai = digest in [known for known, _ in MODELS.values()]
    if not openai:
        gelu = choose_gelu(path, gelu)
    elif gelu == "exact":
        raise ValueError(f"{path} is one of OpenAI's files, trained with QuickGELU: leave out "
                         "--gelu exact")
    try:
        weights = read_weights(path)
    except ValueError:
        if not openai or not hasattr(torch, "jit"):          # torch may drop it
            raise
        # OpenAI's own file may run its code: the last resort, should our reader not understand it
        weights = torch.jit.load(path, map_location="cpu").state_dict()
    try:
        clip = CLIP.from_state_dict(weights, gelu or "quick")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    clip.sha256 = digest
    return clip.requires_grad_(False).to(device)


def choose_gelu(path, gelu):
    """The GELU of a file that is not OpenAI's: by the config beside it, the caller, or "quick"."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        if gelu is None:
            print(f"note: {path} is not one of OpenAI's files and has no {CONFIG} beside it: "
                  "QuickGELU and OpenAI's pixel constants are assumed (LAION's and DataComp's "
                  "models need --gelu exact)", file=sys.stderr)
        return gelu or "quick"
    try:
        content = json.loads(config.read_text(encoding="utf-8-sig"))
        quick = content["model_cfg"].get("quick_gelu", False)           # open_clip's default
        pixels = content.get("preprocess_cfg", {})
        mean = [float(value) for value in pixels.get("mean", MEAN)]
        std = [float(value) for value in pixels.get("std", STD)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{config} cannot be read: {error!r} (expected open_clip's model_cfg and "
                         "preprocess_cfg)") from None
    close = functools.partial(math.isclose, abs_tol=1e-3)
    if len(mean) != 3 or len(std) != 3 or not all(map(close, mean + std, MEAN + STD)):
        raise ValueError(f"{config}: the model expects pixels with mean {mean} and standard "
                         f"deviation {std}; expected OpenAI's {list(MEAN)}, {list(STD)}")
    found = "quick" if quick else "exact"
    if gelu not in (None, found):
        raise ValueError(f"{config} says {found} GELU: leave out --gelu {gelu}")
    return found


def fetch(name):
    """Path of OpenAI's file in ~/.cache/clip, downloaded if it is missing or damaged."""
    digest, size = MODELS[name]
    file = name.replace("/", "-").replace("@", "-") + ".pt"
    home = os.path.expanduser("~")
    if home == "~":                                         # there is no home directory
        home = tempfile.gettempdir()
    path = pathlib.Path(home, ".cache", "clip", file)
    if path.is_file() and sha256(path) == digest:
        return path
    hub = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    urls = [mirror.format(hub=hub, sha256=digest, file=file) for mirror in MIRRORS]
    for url in urls:
        print(f"downloading {name} ({size} MiB) to {path} from {url}", file=sys.stderr)
        try:
            download(url, path, digest)
            return path
        except OSError as error:
            print(f"  failed: {error}", file=sys.stderr)
    raise OSError(f"{name} cannot be downloaded: get the file ({size} MiB) from one of "
                  f"{', '.join(urls)} and put it at {path}, or name it with --backbone")


def download(url, path, digest):
    """Fetch a file with this checksum to path, atomically.  Raises OSError whatever fails."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:                             # torch.hub compares the checksum, then renames
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
    except Exception as error:       # servers, networks and disks fail in a dozen ways
        raise OSError(" ".join(str(error).split())) from None
    finally:
        socket.setdefaulttimeout(before)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_weights(path):
    """{name: tensor} of a weight file, with the names of OpenAI's state dict.

    Whatever stands before "token_embedding.weight", as training programs wrap models, is removed
    from all names.  No code from the file runs.  Raises ValueError for anything else.
    """
    whole_module = (f"{path} is a whole pickled module; expected its state dict: load it with the "
                    "program that made it and torch.save(model.state_dict(), ...)")
    try:
        tensors = named_tensors(read_file(path))
    except RecursionError:           # modules may contain each other, state dicts do not
        raise ValueError(whole_module) from None
    known = "token_embedding.weight"
    prefixes = [name.removesuffix(known) for name in tensors if name.endswith(known)]
    names = " ".join(tensors)
    if "_modules." in names:
        raise ValueError(whole_module)
    if "text_model." in names or "vision_model." in names:
        raise ValueError(f"{path} has Hugging Face's tensor names (text_model...); expected "
                         "OpenAI's: take open_clip_model.safetensors, e.g. from "
                         "timm/vit_base_patch32_clip_224.openai, or --backbone ViT-B/32")
    if not prefixes:
        raise ValueError(f"{path} has {len(tensors)} tensors and none called {known}: only an "
                         "image tower, or no CLIP at all (of open_clip's two files take "
                         "open_clip_model.safetensors, not model.safetensors)")
    prefix = prefixes[0]
    return {name.removeprefix(prefix): value for name, value in tensors.items()
            if name.startswith(prefix)}


def read_file(path):
    """The content of a file by torch.save, torch.jit.save or safetensors, as nested dicts."""
    with open(path, "rb") as file:
        start = file.read(16)
    try:
        if start.startswith(b"PK"):
            return read_zip(path)
        if start[8:9] == b"{":
            return read_safetensors(path)
    except Exception as error:              # damaged bytes can fail in any way
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged or cut short, or was not saved by torch: "
                         f"{type(error).__name__}: {why}") from None
    kind = "neither a zip archive of torch nor safetensors"
    if start.startswith(b"version https"):
        kind = "a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    elif start.lstrip().startswith(b"<"):
        kind = "an HTML page, not weights: the download went wrong"
    elif start.startswith(b"\x80"):
        kind = ("in torch's old format: save it once more with a current torch, "
                "torch.save(torch.load(path, weights_only=True), path)")
    elif not start:
        kind = "empty"
    raise ValueError(f"{path} is {kind}")


class Inert(dict):
    """Stands for any object that a file names, a module or an optimizer.

    Keeps what it is filled with and does nothing.
    """

    __hash__ = object.__hash__              # optimizers use parameters as keys

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)

    def append(self, value):
        pass

    def extend(self, values):
        pass


class Reader(pickle.Unpickler):
    """Rebuilds tensors and containers, calls nothing else.

    A pickle is a small program that may call any function it can name.  Here the names that make a
    tensor are answered by the functions below, and every other name by Inert.
    """

    def __init__(self, archive, root):
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive = archive
        self.root = root
        self.storages = {}

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name.replace("Storage", "Tensor")).dtype     # HalfTensor: fp16
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return first_argument
        if module == "torch.jit._pickle":                   # lists of numbers, tagged values
            return first_argument
        return Inert

    def persistent_load(self, storage):
        """A storage ("storage", dtype, key, device, size) as a flat tensor."""
        _, dtype, key, *_ = storage
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}data/{key}"))   # compares checksums
            flat = torch.empty(0, dtype=dtype)
            if content:
                flat = torch.frombuffer(content, dtype=dtype)
            self.storages[key] = flat
        return self.storages[key]


def rebuild_tensor(flat, offset, shape, stride, *_):
    return flat.as_strided(shape, stride, offset)           # raises beyond the bytes


def first_argument(value, *_):
    return value


def read_zip(path):
    """The object in a file by torch.save or torch.jit.save.

        <root>/data.pkl       a pickle with the objects
        <root>/data/<key>     the bytes of a tensor
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
        if not pickles:
            raise ValueError("there is no data.pkl in it")
        root = min(pickles, key=len).removesuffix("data.pkl")
        return Reader(archive, root).load()


def named_tensors(content, prefix=""):
    """{dotted name: tensor} of nested dicts, named as a state dict would name them."""
    tensors = {}
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{name}"] = value
            else:
                tensors.update(named_tensors(value, f"{prefix}{name}."))
    return tensors


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path):
    """{name: tensor} of a safetensors file.

        8 bytes    N, the length of the header, little-endian
        N bytes    JSON: {"name": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}}
        the rest   the tensors' bytes; offsets count from here
    """
    content = bytearray(pathlib.Path(path).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES[entry["dtype"]]
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        if begin < 0 or end - begin != size or start + end > len(content):
            raise ValueError(f"{name}: shape and place in the file do not fit")
        flat = torch.empty(0, dtype=dtype)
        if size:
            # a copy: the bytes of a tensor need not lie at a multiple of its item size
            flat = torch.frombuffer(content[start + begin:start + end], dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors
