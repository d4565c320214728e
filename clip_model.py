"""CLIP: an image encoder and a text encoder that put matching pictures and sentences side by side.

    from clip_model import load
    clip = load("RN50")                              # downloads 256 MB once; or a file of your own
    f = clip.encode_image(x)                         # (B, 3, R, R) -> (B, e)
    g = clip.encode_text(ids)                        # (N, L)       -> (N, e)
    logits = clip.logit_scale.exp() * normalize(f) @ normalize(g).T          # cosine / temperature

"Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. Symbols: e width of the
common embedding; R side of the square picture; d width of a token; L text length; tau = 1 / exp(logit_scale), the
temperature. Module and parameter names are those of OpenAI's checkpoints.

Know before: what a transformer layer and a convolution are. To take away: CLIP is two encoders that never meet but in
a cosine. A sentence can therefore stand in for a class that no classifier was ever trained on, and either side can be
computed once and kept. Read in this order: contrastive_loss (what CLIP was trained for), CLIP, its encode_text and
encode_prompts, Block, the two image encoders. Needs torch and none of its neighbours.
"""
import functools
import hashlib
import io
import pathlib
import pickle
import sys
import zipfile
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint


def contrastive_loss(image_features, text_features, logit_scale):
    """What CLIP was trained with (paper, figure 3): in a batch of B pairs, each picture must find its own caption
    among the B captions, and each caption its own picture. (B, e), (B, e) -> scalar
    """
    f, g = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    logits = logit_scale.exp() * f @ g.T                                # (B, B), pairs on the diagonal
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def pretrain(clip, images, ids, steps, batch=64, lr=2e-3, progress=lambda step, loss: None):
    """Train a CLIP from scratch on N pairs: images (N, 3, R, R), ids (N, L). Adam with decoupled weight decay and a
    cosine schedule, as the CLIP paper's section 2.5, without its scale.
    """
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    clip.train()
    for step in range(steps):
        pick = torch.randint(len(images), (batch,))
        loss = contrastive_loss(clip.encode_image(images[pick]), clip.encode_text(ids[pick]), clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(max=4.6052)                        # scale <= 100, as the paper
        progress(step, loss)
    return clip.eval()


class CLIP(nn.Module):
    """The two encoders and the scale of their cosine. The scale is the exponential of a parameter, so that it stays
    positive and a gradient step changes it by a factor, not by an amount.
    """

    GROUP = 512                 # encode_prompts: about so many tokens in a sequence (the mask is quadratic in this)
    RECOMPUTE_ABOVE = 2048      # encode_prompts: with more tokens in all, activations are computed twice, not stored

    def __init__(self, e, visual, width, layers, context_length=77, vocab_size=49408):
        super().__init__()
        self.visual = visual
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, e))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    resolution = property(lambda self: self.visual.resolution)
    device = property(lambda self: self.logit_scale.device)
    context_length = property(lambda self: len(self.positional_embedding))
    vocab_size = property(lambda self: self.token_embedding.num_embeddings)

    def encode_image(self, x):
        """Normalised pictures (B, 3, R, R) -> features (B, e), not yet of unit length."""
        return self.visual(x.to(self.visual.conv1.weight.dtype))

    def encode_text(self, ids):
        """Token ids (N, L), rows sot ... eot 0 0 0 -> features (N, e), not yet of unit length.

        The whole sentence is summed up at eot, the last token: attention is causal (a token sees itself and what stands
        left of it), so eot is the only one that has seen everything. Why causal at all? So that the encoder could start
        from a language model, or be trained as one on the side (paper, 2.4). For CoOp it is a gift: see encode_prompts.

        EXACT up to rounding: causal also means that columns right of the last eot in the batch change nothing, so they
        are cut off. Proof: test_nothing_right_of_eot_matters.
        """
        eot = ids.argmax(-1)                                            # the largest id is eot
        ids = ids[:, :int(eot.max()) + 1]
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]             # (N, L, d)
        mask = torch.full((ids.shape[1],) * 2, float("-inf"), device=x.device, dtype=x.dtype).triu_(1)
        x = self.transformer(x, mask)[torch.arange(len(x), device=x.device), eot]            # (N, L, d) -> (N, d)
        return self.ln_final(x) @ self.text_projection

    def encode_prompts(self, shared, own, lengths):
        """K prompts that begin alike, from token embeddings: shared (P, d) begins all of them, own (sum of lengths, d)
        holds the rest of each, end to end, lengths (K,) says how long each rest is; every rest ends with eot. Positions
        are added here. Returns (K, e), the features of the K sentences `shared + rest`. Raises ValueError if one is
        longer than the model reads.

        EXACT up to rounding (float64: 1e-10, value and gradient; test_packed_equals_plain):

            one sequence:  sot V1 V2 V3 | banded . eot | polka - dotted . eot | ...
            positions:      0   1  2  3 |   4    5  6  |   4   5    6   7  8  | ...
            branch:        -1  -1 -1 -1 |   0    0  0  |   1   1    1   1  1  | ...
            a token sees:  the trunk (branch -1), and its own branch, up to its own position

        Each token then meets the same positions and the same neighbours as in a sentence of its own, so it gets the
        same result. The trunk, which being causal never sees a class name, is computed once per group instead of K
        times; padding and the columns right of eot not at all. Were the encoder not causal, sot and V would see the
        name, each prompt would need a trunk of its own, and this function would quietly return wrong features.

        Many prompts are split into groups, a sequence each. Past RECOMPUTE_ABOVE tokens a group's activations are not
        stored but computed again in the backward pass, so that memory holds those of one group, however large K is.
        """
        lengths, groups = torch.as_tensor(lengths).tolist(), [[]]
        if len(shared) + max(lengths) > self.context_length:
            raise ValueError(f"prompt of {len(shared) + max(lengths)} tokens; this model reads {self.context_length}")
        for n in lengths:
            if sum(groups[-1]) >= self.GROUP:
                groups.append([])
            groups[-1].append(n)
        encode = self._encode_group
        if len(own) > self.RECOMPUTE_ABOVE:
            encode = functools.partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
        parts = own.split([sum(group) for group in groups])
        return torch.cat([encode(shared, part, group) for part, group in zip(parts, groups)])

    def _encode_group(self, shared, own, lengths):
        """encode_prompts for one group, as one sequence of P + sum(lengths) tokens."""
        P, device = len(shared), own.device
        position = torch.tensor([*range(P)] + [P + i for n in lengths for i in range(n)], device=device)
        branch = torch.tensor([-1] * P + [k for k, n in enumerate(lengths) for _ in range(n)], device=device)
        sees = ((branch == -1) | (branch == branch[:, None])) & (position <= position[:, None])
        eot = P - 1 + torch.tensor(lengths, device=device).cumsum(0)    # the last token of each branch
        x = torch.cat([shared, own]) + self.positional_embedding[position]
        mask = torch.where(sees, 0.0, float("-inf")).to(x.dtype)
        x = self.transformer(x[None], mask, rows=eot)[0]                # (P + sum of lengths, d) -> (K, d)
        return self.ln_final(x) @ self.text_projection

    @classmethod
    def from_state_dict(cls, sd, source="state dict"):
        """The model that a state dict with OpenAI's key names belongs to, its sizes read off the shapes; weights are
        copied, as fp32, in eval mode. Raises ValueError if names, shapes or values do not fit.
        """
        sd = {k: v.detach().to(torch.float if v.is_floating_point() else v.dtype, copy=True) for k, v in sd.items()
              if k not in ("input_resolution", "context_length", "vocab_size")}

        def count(parts):                          # how many different numbers follow this name
            return len({k.removeprefix(f"{parts}.").split(".")[0] for k in sd if k.startswith(f"{parts}.")})

        try:
            (vocab_size, width), e = sd["token_embedding.weight"].shape, sd["text_projection"].shape[1]
            vit, (outputs, _, _, patch) = "visual.proj" in sd, sd["visual.conv1.weight"].shape
            positions = sd["visual.positional_embedding" if vit else "visual.attnpool.positional_embedding"]
            side = round((len(positions) - 1) ** 0.5)                    # one is the class token's, or the mean's
            with torch.device("meta"):             # no memory and no random numbers: the weights come below
                if vit:
                    visual = VisionTransformer(side * patch, patch, outputs, count("visual.transformer.resblocks"), e)
                else:                              # shrinks pictures by 32 in all
                    stages = [count(f"visual.layer{i}") for i in (1, 2, 3, 4)]
                    visual = ModifiedResNet(side * 32, stages, 2 * outputs, e)
                layers = count("transformer.resblocks")
                clip = cls(e, visual, width, layers, len(sd["positional_embedding"]), vocab_size)
            clip.load_state_dict(sd, assign=True)
            for name, value in sd.items():
                if not value.isfinite().all():
                    raise ValueError(f"NaN or infinity in {name}")
        except Exception as error:  # noqa: BLE001       whatever fails, these are not a CLIP's weights
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{source}: not the weights of a CLIP model: {why}") from None
        return clip.eval()


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the cheap form of GELU that CLIP's weights were trained with: torch's exact GELU differs by
    up to 0.02 and would quietly cost accuracy. silu(y) is y * sigmoid(y).
    """

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


class Attention(nn.Module):
    """Multi-head self-attention; parameters are named as in torch.nn.MultiheadAttention.

    Every token asks a question q, offers a key k and an answer v; it receives the mean of the answers, weighted by how
    well their keys fit its question: softmax(q k^T / sqrt(64)) v. Each of the d / 64 heads does this in 64 dimensions.
    """

    def __init__(self, d):
        super().__init__()
        self.in_proj_weight = nn.Parameter(d ** -0.5 * torch.randn(3 * d, d))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)

    def forward(self, x, mask=None, rows=None):
        """x (B, L, d) -> (B, len(rows), d): what the tokens at the indices rows gather from all that they may see.
        mask (len(rows), L) is added to the scores: -inf makes the token of that row blind to that of that column.
        """
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, -1, 64))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, L, 3 d) -> each (B, heads, L, 64)
        q = q if rows is None else q[:, :, rows]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention lets tokens exchange information, the MLP works on each token alone; both add to x."""

    def __init__(self, d):
        super().__init__()
        self.attn = Attention(d)
        self.ln_1 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(d, 4 * d), gelu=QuickGELU(), c_proj=nn.Linear(4 * d, d)))
        self.ln_2 = nn.LayerNorm(d)

    def forward(self, x, mask=None, rows=None):
        x = (x if rows is None else x[:, rows]) + self.attn(self.ln_1(x), mask, rows)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; OpenAI's name for the list, resblocks, stays."""

    def __init__(self, d, layers):
        super().__init__()
        if layers < 1 or d % 64:
            raise ValueError(f"a transformer of {layers} layers and width {d}, which should be a multiple of 64")
        self.resblocks = nn.ModuleList(Block(d) for _ in range(layers))

    def forward(self, x, mask=None, rows=None):
        """(B, L, d) -> (B, len(rows), d). Below the last layer every token is needed, as others look at it; in the last
        one only the rows that somebody reads.
        """
        for block in self.resblocks[:-1]:
            x = block(x, mask)
        return self.resblocks[-1](x, None if mask is None else mask[rows], rows)


class VisionTransformer(nn.Module):
    """ViT (arXiv 2010.11929): the picture as a sentence of patches, read off at a class token. Here attention is not
    causal: patches have no reading order, every token sees every other one, and so the class token can stand first.
    """

    def __init__(self, resolution, patch, width, layers, e):
        super().__init__()
        self.resolution = resolution
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)        # one vector per patch
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, e))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)                    # (B, 3, R, R) -> (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), rows=slice(0, 1))[:, 0]    # only the class token is read
        return self.ln_post(x) @ self.proj


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut. Where the picture shrinks, average pooling does it, in both
    branches: a strided convolution would skip pixels.
    """

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if inputs != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.pool(y)))
        return F.relu(y.add_(self.downsample(self.pool(x))), inplace=True)


class AttentionPool(nn.Module):
    """One attention step with the mean as its only question: a weighted mean over the positions, with weights that
    depend on the content, where an ordinary ResNet takes the plain mean. A small object in the middle need not be
    drowned by its background.
    """

    def __init__(self, side, width, e):
        super().__init__()
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(side * side + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, e)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).flatten(1, 2)                         # (B, width, h, w) -> (B, h * w, width)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = self.q_proj(x[:, 0])[:, None], self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, 1, 64)
        return self.c_proj(x.transpose(1, 2).flatten(1))


class ModifiedResNet(nn.Sequential):
    """ResNet-D with a stem of three convolutions and attention pooling (CLIP paper, section 2.4). Its parts run in the
    order of their definition: (B, 3, R, R), after the stem (B, width, R / 4, R / 4), before attnpool (B, 32 width,
    R / 32, R / 32), at the end (B, e).

    Its BatchNorm layers must stay in eval mode. In training mode they normalise with the mean and variance of whatever
    batch they see and drift towards it: the "frozen" encoder would change with every step, and an image's features
    would depend on its neighbours. Freezing the weights does not prevent that, eval() does; prepare() leaves no
    BatchNorm behind at all. (A ViT has none.)
    """

    def __init__(self, resolution, layers, width, e):
        super().__init__()
        self.resolution = resolution
        for i, inputs, outputs in ((1, 3, width // 2), (2, width // 2, width // 2), (3, width // 2, width)):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, stride=2 if i == 1 else 1, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
            self.add_module(f"relu{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for i, blocks in enumerate(layers, 1):                          # layer1 keeps the size, the others halve it
            first = Bottleneck(inputs, width, stride=1 if i == 1 else 2)
            rest = [Bottleneck(4 * width, width, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))
            inputs, width = 4 * width, 2 * width
        self.attnpool = AttentionPool(resolution // 32, inputs, e)


def prepare(clip, image_dtype=torch.float32):
    """Fold constants into frozen weights, in place, and return clip: the same function with less work.

    BatchNorm in eval mode is a scale and a shift, which go into the convolution before it:
    a (W x) + b = (a W) x + b with a = gain / sqrt(variance), b = bias - a mean. The 1.702 of QuickGELU goes into the
    linear layers around it (but for the last bias, which is added after them); what stays is torch's SiLU. Weights are
    laid out channels-last, like data.normalise's images, as the fast kernels want them. EXACT up to rounding in float32
    (1e-5; test_encoders_equal_openais). image_dtype bfloat16 or float16, for the image encoder alone, is APPROXIMATE
    (README, "Speed").
    """
    for module in list(clip.modules()):
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            if isinstance(getattr(module, bn, None), nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn)))
                setattr(module, bn, nn.Identity())
        if isinstance(getattr(module, "gelu", None), QuickGELU):
            module.c_fc.weight.data *= 1.702
            module.c_fc.bias.data *= 1.702
            module.c_proj.weight.data *= 1 / 1.702
            module.gelu = nn.SiLU()
    clip.visual.to(dtype=image_dtype, memory_format=torch.channels_last)
    return clip


# ---- Weight files: nothing below teaches CLIP, skip it on a first reading --------------------------------------------

URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
MODELS = {   # name: SHA-256 of the file
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def load(name_or_path, device="cpu"):
    """A frozen CLIP in fp32 and eval mode: one of OpenAI's nine by name, or a file (their TorchScript archive or a
    state dict saved by torch). `.sha256` of the result is the file's. Raises ValueError for a file that holds no CLIP,
    OSError if a download fails.
    """
    path = fetch(name_or_path) if name_or_path in MODELS else pathlib.Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"unknown backbone {name_or_path!r}: neither a file nor one of {', '.join(MODELS)}")
    digest = sha256(path)
    try:
        _, sd = read_archive(path)
    except ValueError:
        if digest not in MODELS.values():
            raise
        sd = torch.jit.load(path, map_location="cpu").state_dict()      # OpenAI's own file: may run its code
    clip = CLIP.from_state_dict(sd, path)
    clip.sha256 = digest
    return clip.requires_grad_(False).to(device)


def fetch(name):
    """Path of OpenAI's file in ~/.cache/clip, downloaded if it is missing or damaged."""
    file = name.replace("/", "-").replace("@", "-") + ".pt"
    path, url = pathlib.Path.home() / ".cache" / "clip" / file, URL.format(sha256=MODELS[name], file=file)
    if not (path.is_file() and sha256(path) == MODELS[name]):
        print(f"{path} is missing or damaged: downloading {name} from {url}", file=sys.stderr)
        try:                                       # checks the sum, then renames: whole or not there
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=MODELS[name])
        except Exception as error:  # noqa: BLE001
            raise OSError(f"cannot download {name} ({error}): put {url} at {path}") from None
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Inert(dict):
    """Whatever a weight file names, a tensor or a module: keeps what it is made from and filled with, does nothing."""

    kind, args = "", ()
    __setstate__, __hash__ = dict.update, object.__hash__      # optimisers have parameters as keys

    def __init__(self, *args):
        self.args = args


class Reader(pickle._Unpickler):                   # not the one in C: a huge memo index fills its memory
    """Runs no code from a pickle. That is a small program, which may call any function it can name; here a name
    gives an Inert, whatever it means elsewhere, the type of a storage its dtype, and any other name an error.
    """

    # Of the opcodes this one alone makes room before it has read anything, as much as the file claims.
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}  # noqa: RUF012

    @functools.cache  # noqa: B019       one class per name: a pickle may name one a million times
    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name.replace("Storage", "Tensor")).dtype       # torch.HalfTensor.dtype: float16
        if module.split(".")[0] not in ("torch", "__torch__", "collections", "__builtin__", "dassl"):
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which no weight file needs")
        return type("Inert", (Inert,), {"kind": name})

    def persistent_load(self, pid):                # of a storage: ("storage", type, key, device, size)
        return pid


def read_archive(path):
    """The object in a file written by torch.save or torch.jit.save, and its tensors {dotted name: tensor}, without
    running any code from the file. In a state dict the names are its keys, in a TorchScript module they are what its
    state dict would say. Raises ValueError for a damaged file or any other content.

    Both are uncompressed zip archives: <root>/data.pkl, a pickle, has the objects, <root>/data/<key> a tensor's bytes.
    """
    try:
        size = pathlib.Path(path).stat().st_size
        with zipfile.ZipFile(path) as archive:
            root = min((n for n in archive.namelist() if n.split("/")[-1] == "data.pkl"), key=len)[:-len("data.pkl")]
            members = [m for m in archive.infolist() if m.filename.startswith(f"{root}data")]
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
                raise pickle.UnpicklingError("it is compressed, or damaged, and might unpack to any size")
            data = {m.filename[len(root):]: bytearray(archive.read(m)) for m in members}     # checks their sums
        content, tensors, seen = Reader(io.BytesIO(data["data.pkl"])).load(), {}, set()
        todo = [("", content)] if isinstance(content, dict) else []
        for prefix, part in todo:                  # grows while it is walked; each object is looked into once
            for name, value in part.items() if all(isinstance(name, str) for name in part) else ():
                if getattr(value, "kind", "") == "_rebuild_parameter":
                    value = value.args[0]
                if getattr(value, "kind", "") == "_rebuild_tensor_v2":
                    (_, dtype, key, *_), offset, shape, stride, *_ = value.args
                    if len(shape) > 8:
                        raise pickle.UnpicklingError(f"a tensor of {len(shape)} dimensions")
                    empty = bytearray(0 if torch.Size(shape).numel() else 8)     # frombuffer takes no empty storage
                    flat = torch.frombuffer(data["data/" + key] or empty, dtype=dtype)
                    tensors[f"{prefix}{name}"] = flat.as_strided(shape, stride, offset)      # raises beyond the bytes
                elif isinstance(value, dict) and id(value) not in seen and len(prefix) + len(name) < 200:
                    seen.add(id(value))
                    todo.append((f"{prefix}{name}.", value))
        if sum(t.numel() * t.itemsize for t in tensors.values()) > size:
            raise pickle.UnpicklingError("its tensors are larger than the file")
        return content, tensors
    except Exception as error:  # noqa: BLE001       damaged bytes can fail in any way; none is our caller's
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as weights (cut short, damaged or of another kind): {why}") from None
