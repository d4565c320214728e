"""What this project claims, held against code that is not ours.

    pip install -r requirements.txt pytest && pip install --no-deps clip-anytorch==2.6.0
    python -m pytest -q                          # the proofs
    python test_coop.py [PHOTOGRAPHS]            # the benchmark: the tables of README

A docstring is a theorem and the test its check, on small random models.  The oracles are OpenAI's
own model.py and simple_tokenizer.py (from the package clip-anytorch, loaded file by file), modules
of PyTorch, the official CoOp code where it is at hand, and formulas written out.  Where a check
could be empty, a control stands beside it that has to fail.

Know before: the four modules.  Read test_packed_equals_plain and test_training_equals_the_textbook
first: they hold up the rest.
"""
import ast
import copy
import dataclasses
import functools
import gzip
import hashlib
import http.server
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import platform
import random
import re
import shlex
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import warnings
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_model
import coop
import data
import tokenizer as tokenizer_module
from clip_model import CLIP
from coop import PromptLearner
from tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent
NAMES = ["banded", "polka-dotted", "cobwebbed", "a_long name, with 3 digits: 224", "grid"]


def openai(module):
    """OpenAI's clip/model.py or clip/simple_tokenizer.py, out of the package clip-anytorch."""
    package = importlib.util.find_spec("clip")
    if package is None:
        pytest.skip("needs OpenAI's code: pip install --no-deps clip-anytorch==2.6.0")
    path = pathlib.Path(package.submodule_search_locations[0]) / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"openai_{module}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def openai_clip(e=32, resolution=64, vision_layers=(1, 1, 1, 1), vision_width=16, patch=None,
                vocab_size=514, width=128, layers=2, double=True):
    """OpenAI's class with random weights, and BatchNorm statistics as if it had been trained."""
    module = openai("model")
    if double:
        module.LayerNorm = torch.nn.LayerNorm                # theirs goes through fp32
    torch.manual_seed(0)
    model = module.CLIP(e, resolution, vision_layers, vision_width, patch, 77, vocab_size, width,
                        width // 64, layers).eval()
    for name, value in [*model.named_buffers(), *model.named_parameters()]:
        if value.dim() == 4:
            value.data.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif "running_var" in name or (".bn" in name and name.endswith("weight")):
            value.data.uniform_(0.5, 1.5)
        elif "running_mean" in name or name.endswith("bias"):
            value.data.normal_(0, 0.1)
        elif "positional" in name or "token_embedding" in name:
            value.data.normal_(0, 0.3)
    if double:
        model.double()
        for block in model.transformer.resblocks:
            block.attn_mask = block.attn_mask.double()
    return model.requires_grad_(False)


def ours(model):
    """Our CLIP with the weights of OpenAI's, in the same precision."""
    clip = CLIP.from_state_dict(model.state_dict())
    return clip.to(model.text_projection.dtype).requires_grad_(False)


def relative(a, b):
    """Distance of a from b, as a part of b's length."""
    return ((a - b).norm() / b.norm()).item()


def one_line(error):
    """The text of an exception that is to be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- tokenizer.py --------------------------------------------------------------------------------

SCRIPTS = [   # first and last character of a stretch of Unicode
    (0x00, 0x20), (0x20, 0x7F), (0x80, 0xA0), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700),
    (0x900, 0xE00), (0x2000, 0x2BFF), (0x3040, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF),
    (0x1F300, 0x1FAFF),
]
AWKWARD_WORDS = [
    "photo", "cat's", "they'LL", "don’t", "“quoted”", "&amp;amp;", "&lt;b&gt;", "&eacute;",
    "x" * 300, "3.14159", "polka-dotted", "Ünïcödé", "ﬁne", "ÃƒÂ©", "İstanbul", "ß", "</w>",
    "<|endoftext|>", "<|startoftext|>", "\u200d", "👩‍🚀", "...", ":-)", "\t\n", "١٢٣", "a_b",
]


def test_tokenizer_equals_openais():
    """The same ids as simple_tokenizer.py for 3,000 varied strings, and the same text back."""
    theirs = openai("simple_tokenizer").SimpleTokenizer()
    tokenizer = Tokenizer.openai()
    rng = random.Random(0)
    lengths = set()
    for _ in range(3000):
        pieces = []
        for _ in range(rng.randint(0, 8)):
            first, last = rng.choice(SCRIPTS)
            characters = [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 9))]
            pieces.append(rng.choice([rng.choice(AWKWARD_WORDS), "".join(characters)]))
        text = rng.choice(["", " ", "  "]).join(pieces)
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), repr(text)
        assert tokenizer.decode(ids) == theirs.decode(ids), repr(text)
        lengths.add(len(ids))
        anything = rng.sample(range(49408), 9)           # bytes that need not be UTF-8
        assert tokenizer.decode(anything) == theirs.decode(anything)
    assert len(lengths) > 50, "control: the strings differ"


def test_tokenizer_call():
    """A row is sot, ids, eot, zeros; a text that does not fit is named with both lengths."""
    tokenizer = Tokenizer.openai()
    rows = tokenizer(["a photo of a cat", "cat"], length=8).tolist()
    assert rows == [[49406, 320, 1125, 539, 320, 2368, 49407, 0],
                    [49406, 2368, 49407, 0, 0, 0, 0, 0]]
    assert tokenizer("very " * 75)[0, 76] == 49407, "75 and two just fit"
    with pytest.raises(ValueError, match=r"78 tokens .* does not fit in 77: 'very very"):
        tokenizer(["fine", "very " * 76])


@pytest.mark.parametrize("texts, merges", [
    (["Low low", "lower"], ["l o", "lo w</w>", "w e", "we r</w>", "lo wer</w>"]),
    (["aaaaa"], ["a a", "aa aa", "aaaa a</w>"]),
    (["ö"], ["Ã ¶</w>"]),
], ids=["words", "repeats", "bytes"])
def test_byte_pair_encoding_by_hand(texts, merges, tmp_path):
    """learn_merges does what pencil and paper do; _ marks the end of a word:

        l o w_ (twice), l o w e r_     l o: 3; o w_: 2; others: 1       -> l o
        lo w_ (twice), lo w e r_       lo w_: 2; others: 1              -> lo w_
        low_ (twice), lo w e r_        three of 1, w e is the last in the alphabet
        low_ (twice), lo we r_         two of 1                         -> we r_, then lo wer_

        a a a a a_                     a a: 3, overlapping; a a_: 1     -> a a
        aa aa a_                       both 1; aa comes after a_, which is spelled a</w>

    Then every word is one token.  Without merges every byte is one, and a space is none.
    """
    pairs = [tuple(pair.split()) for pair in merges]
    assert tokenizer_module.learn_merges(texts, limit=99) == pairs, "ends when nothing is left"
    assert tokenizer_module.learn_merges(texts, limit=1) == pairs[:1]
    Tokenizer(pairs).save(tmp_path / "merges.txt")
    for tokenizer in (Tokenizer(pairs), Tokenizer.from_file(tmp_path / "merges.txt")):
        assert tokenizer.vocab_size == tokenizer.eot + 1 == 514 + len(pairs)
        for text in texts:
            ids = tokenizer.encode(text)
            assert len(ids) == len(text.split())
            assert tokenizer.decode(ids) == text.lower() + " "
            assert len(Tokenizer().encode(text)) == len(text.replace(" ", "").encode())
    (tmp_path / "merges.txt").write_text("a b\na b c", encoding="utf-8")
    with pytest.raises(ValueError, match="merges.txt is not a list of merges"):
        Tokenizer.from_file(tmp_path / "merges.txt")


# ---- clip_model.py: both encoders ----------------------------------------------------------------

SHAPES = {   # OpenAI's models: e, resolution, vision layers, vision width, patch, text width
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": (512, 224, 12, 768, 32, 512),
    "ViT-B/16": (512, 224, 12, 768, 16, 512),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768),
}


@pytest.mark.parametrize("name", SHAPES)
def test_encoders_equal_openais(name):
    """Features of all nine architectures, inferred from shapes alone, are OpenAI's, to 1e-5.

    In fp32, before and after prepare().  RN50 and ViT-B/32 at full size, the others at full width
    with few layers.
    """
    e, resolution, layers, vision_width, patch, width = SHAPES[name]
    full = name in ("RN50", "ViT-B/32")
    if not full:
        layers = 2 if patch else (1, 1, 2, 1)
    tokenizer = Tokenizer.openai() if full else Tokenizer()
    theirs = openai_clip(e, resolution, layers, vision_width, patch, tokenizer.vocab_size, width,
                         layers=12 if full else 1, double=False)
    clip = ours(theirs)
    assert clip.resolution == resolution
    x = torch.randn(2 if full else 1, 3, resolution, resolution)
    ids = tokenizer(["a photo of a cat", "grid " * 14])
    f = theirs.encode_image(x)
    g = theirs.encode_text(ids)
    for _ in ("as loaded", "prepared"):
        assert relative(clip.encode_image(x), f) < 1e-5
        assert relative(clip.encode_text(ids), g) < 1e-5
        clip_model.prepare(clip)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in clip.modules())
    assert relative(f[0], f[-1]) > 1e-2 or not full, "control: another image, other features"
    assert relative(g[0], g[1]) > 1e-2


VARIANTS = list(itertools.product(coop.POSITIONS, (False, True)))


def plain_prompts(model, tokenizer, V, names, position):
    """The K x 77 token embeddings of CoOp's prompts, as the paper writes them.

    A sentence with a word x in each of the M places, whose embeddings V then replaces.
    -> (K, 77, d), eot (K,)
    """
    M = V.shape[-2]
    before = {"end": M, "middle": M // 2, "front": 0}[position]
    rows = []
    eot = []
    for i, name in enumerate(names):
        words = name.replace("_", " ")
        sentence = " ".join(["x"] * before + [words] + ["x"] * (M - before)) + "."
        ids = tokenizer([sentence])
        row = model.token_embedding(ids)[0]                      # (77, d)
        context = V[i] if V.dim() == 3 else V
        end = 1 + before + len(tokenizer.encode(words))          # of the name
        rows.append(torch.cat([row[:1], context[:before], row[1 + before:end],
                               context[before:], row[end + M - before:]]))
        eot.append(int(ids.argmax()))
    return torch.stack(rows), torch.tensor(eot)


def plain_text_features(model, prompts, eot):
    """The textbook: K x 77 embeddings through all of OpenAI's text encoder, read at eot."""
    x = prompts + model.positional_embedding
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    return model.ln_final(x)[torch.arange(len(x)), eot] @ model.text_projection


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_packed_equals_plain(position, csc, monkeypatch):
    """One packed sequence gives what K sentences of 77 columns give, in value and in V's gradient.

    To 1e-10 in float64, against OpenAI's encoder; in one group or several, stored or recomputed.
    """
    model = openai_clip()
    clip = ours(model)
    learner = PromptLearner(clip, Tokenizer(), NAMES, 5, position, csc)
    learner.V.data.normal_()
    prompts = plain_prompts(model, Tokenizer(), learner.V, NAMES, position)
    plain = plain_text_features(model, *prompts)
    weight = torch.randn_like(plain)
    expected, = torch.autograd.grad((plain * weight).sum(), learner.V)
    assert expected.abs().min() > 0, "control: every number of V matters"

    encode_group = mock.Mock(wraps=clip.encode_group)
    monkeypatch.setattr(clip, "encode_group", encode_group)
    for group, recompute_above, passes in ((512, 2048, 1), (30, 2048, 1), (30, 0, 2), (1, 0, 2)):
        clip.GROUP = group
        clip.RECOMPUTE_ABOVE = recompute_above
        encode_group.reset_mock()
        packed = clip.encode_prompts(*learner())
        groups = encode_group.call_count
        gradient, = torch.autograd.grad((packed * weight).sum(), learner.V)
        assert relative(packed, plain) < 1e-10
        assert relative(gradient, expected) < 1e-10
        assert groups == 1 if group == 512 else groups > 1
        assert encode_group.call_count == passes * groups

    shared, own, lengths = learner()
    own = own.clone()
    own[0] += torch.randn(len(own[0]))               # a token of the first class
    change = (clip.encode_prompts(shared, own, lengths) - packed).norm(dim=1)
    assert change[0] > 1e-3, "control"
    assert change[1:].max() < 1e-10, "no class sees another one"


def test_contrastive_loss_is_the_papers():
    """-log of the own pair's probability, by row and by column of exp(cosine / tau)."""
    f, g = torch.randn(2, 4, 8).double()
    scale = torch.tensor(1.3).double()
    weights = (scale.exp() * F.cosine_similarity(f[:, None], g[None], dim=-1)).exp()
    p = torch.cat([weights.diag() / weights.sum(1), weights.diag() / weights.sum(0)])
    assert torch.allclose(clip_model.contrastive_loss(f, g, scale), -p.log().mean(), rtol=1e-12)


# ---- clip_model.py: weight files -----------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A small CLIP of OpenAI's with weights that fp16 and bf16 hold exactly: multiples of 1/64."""
    model = openai_clip(vision_width=4, width=64, layers=1, double=False)
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point():
            value.data = (64 * value).round() / 64
    return model


def saved(content, **options):
    """The bytes of a file by torch.save."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def torchscript(model):
    """The bytes of an archive as OpenAI ships them: traced, fp16 and fp32, with three numbers."""
    model = copy.deepcopy(model)
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 514)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # TorchScript is deprecated
        example = (torch.randn(1, 3, 64, 64), torch.randint(1, 500, (1, 77)))
        traced = torch.jit.trace(model, example, check_trace=False)
        openai("model").convert_weights(model)
        torch.jit.save(traced, buffer)
    return buffer.getvalue()


def safetensors(sd):
    """The bytes of a safetensors file, written from its specification."""
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    header = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, value in sd.items():
        begin = len(content)
        content += value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": dtypes[value.dtype], "shape": list(value.shape),
                        "data_offsets": [begin, len(content)]}
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content


def as_views(sd):
    """The same values as views of one tensor, at an offset and with strides of their own."""
    sizes = [value.numel() for value in sd.values()]
    parts = torch.empty(sum(sizes)).split(sizes)
    views = {}
    for (name, value), part in zip(sd.items(), parts):
        order = list(range(value.dim()))[::-1]
        turned = value.permute(order)
        views[name] = part.view(turned.shape).copy_(turned).permute(order)
    return views


def training_checkpoint(sd):
    """What Dassl writes: a wrapped model beside an optimizer, a scheduler and numpy's numbers."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    wrapped = {f"clip_model.{name}": value for name, value in sd.items()}
    return {"optimizer": optimizer.state_dict(), "scheduler": {"successor": scheduler},
            "state_dict": {"prompt_learner.ctx": torch.ones(4, 64), **wrapped},
            "best": np.float64(0.5), "random": np.arange(3), "epoch": 5}


LAYOUTS = ["TorchScript", "bare", "state_dict", "model", "model_state_dict", "prefix", "views",
           "training checkpoint", "fp16", "safetensors", "safetensors bf16"]


@pytest.fixture(scope="module")
def files(small):
    """{layout: the bytes of a weight file}, all of the same model."""
    sd = small.state_dict()
    bf16 = {k: v.bfloat16() if v.is_floating_point() else v for k, v in sd.items()}
    return {
        "TorchScript": torchscript(small),
        "bare": saved(sd),
        "state_dict": saved({"epoch": 3, "state_dict": sd}),
        "model": saved({"model": sd}),
        "model_state_dict": saved({"model_state_dict": sd}),
        "prefix": saved({f"module.{name}": value for name, value in sd.items()}),
        "views": saved(as_views(sd)),
        "training checkpoint": saved(training_checkpoint(sd)),
        "fp16": saved({name: value.half() for name, value in sd.items()}),
        "safetensors": safetensors(sd),
        "safetensors bf16": safetensors(bf16),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(layout, files, small, tmp_path):
    """Whatever the file, the weights are OpenAI's bit by bit and the features theirs."""
    path = tmp_path / "weights"
    path.write_bytes(files[layout])
    clip = clip_model.load(path)
    found = clip.state_dict()
    expected = small.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), name
    x = torch.randn(2, 3, 64, 64)
    assert relative(clip.encode_image(x), small.encode_image(x)) < 1e-5
    assert clip.text_projection.dtype == torch.float32
    assert clip.sha256 == hashlib.sha256(files[layout]).hexdigest()
    assert not any(parameter.requires_grad for parameter in clip.parameters())


@pytest.fixture(scope="module")
def unusable(small, files):
    """{what the message must say: the bytes of a file that cannot be used}"""
    sd = small.state_dict()
    whole = files["bare"]
    middle = len(whole) // 2
    tensors = files["safetensors"]
    tower = {k: v for k, v in sd.items() if k.startswith("visual.")}
    hugging_face = {"text_model.embeddings.token_embedding.weight": torch.ones(3)}
    wide = {"visual.proj": torch.ones(1280, 32), "visual.conv1.weight": torch.ones(1280, 3, 2, 2)}
    return {
        "only an image tower.*take open_clip_model": saved(tower),
        "Hugging Face's.*take open_clip_model": saved(hugging_face),
        "width 1280": saved({**sd, **wide}),         # its heads are of 80, with the same names
        "whole pickled module": saved(ours(small)),
        "old format: save it once more": saved(sd, _use_new_zipfile_serialization=False),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
        "HTML page": b"\n<!DOCTYPE html><html>Please log in</html>",
        "is empty": b"",
        "neither a zip archive": b"hello\n",
        "File is not a zip": whole[:-100],
        "Bad CRC": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1:],
        "NaN or infinity in ln_final.bias": saved({**sd, "ln_final.bias": torch.tensor(math.nan)}),
        "stranger": saved({**sd, "stranger": torch.ones(3)}),
        "visual.conv1.weight": saved({k: v for k, v in sd.items() if k != "visual.conv1.weight"}),
        "ln_final.weight": saved({**sd, "ln_final.weight": torch.ones(3)}),
        "token_embedding.weight: shape": tensors.replace(b"[514, 64]", b"[513, 64]"),
        "ln_final.bias: shape": tensors[:-1],
        "Unterminated string": tensors[:200],
        "F99": tensors.replace(b'"F32"', b'"F99"'),
    }


def test_unusable_weight_files(unusable, tmp_path):
    """One line names the file and says what it is."""
    path = tmp_path / "bad.pt"
    for words, content in unusable.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            clip_model.load(path)
        assert str(path) in one_line(error)


@pytest.mark.parametrize("layout", ["TorchScript", "bare", "training checkpoint", "safetensors"])
def test_damage_is_one_line(layout, files, small, tmp_path):
    """30 damaged copies are refused in one line, or, where damage does no harm, read as before.

    safetensors have no checksums: there a damaged number is another number.
    """
    rng = random.Random(0)
    path = tmp_path / "damaged.pt"
    refused = 0
    for _ in range(30):
        damaged = bytearray(files[layout])
        for _ in range(rng.choice((1, 3, 30))):
            anywhere = rng.randrange(len(damaged))
            near_an_end = rng.choice((1, -1)) * rng.randrange(15_000)      # names and shapes
            damaged[rng.choice((anywhere, near_an_end))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = clip_model.load(path, gelu="quick").state_dict()
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        for name, value in small.state_dict().items():
            assert layout == "safetensors" or torch.equal(found[name].to(value.dtype), value)
    assert refused > 10


QUICK = {"model_cfg": {"quick_gelu": True}}
OTHER_MEAN = {"preprocess_cfg": {"mean": [0.485, 0.456, 0.406]}}
OTHER_DEVIATION = {"preprocess_cfg": {"std": [0.5, 0.5, 0.5]}}


@pytest.mark.parametrize("config, asked, expected", [
    pytest.param(None, None, "quick", id="no config"),
    pytest.param(None, "exact", "exact", id="no config, exact asked for"),
    pytest.param(QUICK, None, "quick", id="quick"),
    pytest.param({"model_cfg": {"quick_gelu": False}}, None, "exact", id="not quick"),
    pytest.param({"model_cfg": {}}, "exact", "exact", id="absent: open_clip's default"),
    pytest.param({"model_cfg": {}}, "quick", "says exact GELU", id="contradiction"),
    pytest.param(QUICK | OTHER_MEAN, None, "expects pixels with mean .0.485", id="mean"),
    pytest.param(QUICK | OTHER_DEVIATION, None, "deviation .0.5", id="standard deviation"),
    pytest.param({"preprocess_cfg": {}}, None, "cannot be read", id="no model"),
])
def test_which_gelu(config, asked, expected, files, small, tmp_path, capsys):
    """The config beside a file decides; without one, quick and a note; a contradiction is said.

    "exact" is OpenAI's model with PyTorch's GELU, as loaded and prepared.
    """
    path = tmp_path / "open_clip_model.safetensors"
    path.write_bytes(files["safetensors"])
    if config is not None:
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    if expected not in ("quick", "exact"):
        with pytest.raises(ValueError, match=f"open_clip_config.json.*{expected}"):
            clip_model.load(path, gelu=asked)
        return
    clip = clip_model.load(path, gelu=asked)
    theirs = copy.deepcopy(small)
    if expected == "exact":
        for block in theirs.transformer.resblocks:
            block.mlp.gelu = torch.nn.GELU()
    ids = Tokenizer()(["a grid", "polka"])
    assert relative(clip.encode_text(ids), theirs.encode_text(ids)) < 1e-5
    assert relative(clip_model.prepare(clip).encode_text(ids), theirs.encode_text(ids)) < 1e-5
    assert clip.gelu == expected
    note = "QuickGELU and OpenAI's pixel constants are assumed" in capsys.readouterr().err
    assert note == (config is None and asked is None)


@pytest.mark.parametrize("program", [
    pytest.param(b"cbuiltins\neval\n%b\x85R.", id="reduce"),
    pytest.param(b"\x8c\x08builtins\x8c\x04eval\x93%b\x85R.", id="stack global"),
    pytest.param(b"(%bibuiltins\neval\n.", id="inst"),
    pytest.param(b"(cbuiltins\neval\n%bo.", id="obj"),
    pytest.param(b"cargparse\nNamespace\n)\x81}\x8c\x0c__setstate__cbuiltins\neval\nsb%bb.",
                 id="build"),
])
def test_weight_files_run_no_code(program, tmp_path):
    """A pickle that creates a file when Python's reader opens it creates none here."""
    canary = tmp_path / "canary"
    line = f"open({str(canary)!r}, 'w').close()".encode()
    program = b"\x80\x04" + program % (b"X" + struct.pack("<I", len(line)) + line)
    with zipfile.ZipFile(tmp_path / "hostile.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match="hostile.pt"):
        clip_model.load(tmp_path / "hostile.pt")
    assert not canary.exists()
    pickle.loads(program)
    assert canary.exists(), "control"


# ---- Downloads -----------------------------------------------------------------------------------


class Pages(http.server.BaseHTTPRequestHandler):
    """Answers with a page of the server: whole, cut off half-way, or half and then nothing."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path not in self.server.pages:
            self.send_error(404)
            return
        content, state = self.server.pages[self.path]
        sent = len(content) if state == "whole" else len(content) // 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        if state == "stalled" and not self.server.end.wait(10):
            self.wfile.write(content[sent:])             # to those who have waited so long

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine, and an empty home directory.

    pages: {path: (bytes, state)}; asked: the paths asked for; downloads: where files are to go.
    """
    for name in ("HOME", "USERPROFILE"):             # the latter on Windows
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    for module in (clip_model, tokenizer_module):
        monkeypatch.setattr(module, "TIMEOUT", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.pages = {}
        server.asked = []
        server.downloads = tmp_path / ".cache" / "clip"
        server.downloads.mkdir(parents=True)
        server.end = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.end.set()
        server.shutdown()


def set_page(server, path, content, state):
    """state: "whole", "cut", "stalled", "wrong" (another last byte) or "gone"."""
    if state == "wrong":
        server.pages[path] = (content[:-1] + b"?", "whole")
    elif state != "gone":
        server.pages[path] = (content, state)


@pytest.fixture
def mirrors(server, files, monkeypatch):
    """RN50, a file of ours here, is looked for in three places of the server.  -> their paths"""
    digest = hashlib.sha256(files["TorchScript"]).hexdigest()
    first = f"{server.url}/first/{{sha256}}/{{file}}"
    monkeypatch.setitem(clip_model.MODELS, "RN50", (digest, 244))
    monkeypatch.setattr(clip_model, "MIRRORS", [first, *clip_model.MIRRORS[1:]])
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    return [f"/first/{digest}/RN50.pt", "/jinaai/clip-models/resolve/main/RN50.pt",
            f"/pxlpshr/pytti-models/resolve/main/clip/{digest}/RN50.pt"]


@pytest.mark.parametrize("states, attempts", [
    ("whole whole whole", 1), ("gone wrong whole", 3), ("stalled cut whole", 3),
    ("wrong stalled gone", 3),
])
def test_weights_from_three_places(states, attempts, mirrors, server, files, capsys):
    """The first place with the right bytes is taken; if there is none, one line names them all.

    Each attempt is a line on the screen, and nothing half-written stays.
    """
    for path, state in zip(mirrors, states.split()):
        set_page(server, path, files["TorchScript"], state)
    place = server.downloads / "RN50.pt"
    addresses = [server.url + path for path in mirrors]
    if "whole" in states:
        assert clip_model.load("RN50").sha256 == clip_model.MODELS["RN50"][0]
        assert place.read_bytes() == files["TorchScript"]
    else:
        with pytest.raises(OSError, match="RN50 cannot be downloaded") as error:
            clip_model.load("RN50")
        for part in (*addresses, str(place), "244 MiB"):
            assert part in one_line(error)
    assert list(server.downloads.iterdir()) == ([place] if "whole" in states else [])
    assert server.asked == mirrors[:attempts]
    shown = capsys.readouterr().err
    for address in addresses[:attempts]:
        assert f"downloading RN50 (244 MiB) to {place} from {address}" in shown


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
def test_openais_own_file(mirrors, server, files, monkeypatch):
    """A file with OpenAI's checksum is not fetched again, a damaged one is.

    It is QuickGELU, and torch may run it if our reader does not understand it.
    """
    place = server.downloads / "RN50.pt"
    place.write_bytes(files["bare"])
    set_page(server, mirrors[1], files["TorchScript"], "whole")
    clip = clip_model.load("RN50")
    assert place.read_bytes() == files["TorchScript"]
    server.asked.clear()
    with pytest.raises(ValueError, match="trained with QuickGELU"):
        clip_model.load("RN50", gelu="exact")
    monkeypatch.setattr(clip_model, "read_weights", mock.Mock(side_effect=ValueError("unread")))
    assert torch.equal(clip_model.load("RN50").text_projection, clip.text_projection)
    assert not server.asked
    place.with_name("other.pt").write_bytes(files["TorchScript"] + b" ")
    with pytest.raises(ValueError, match="unread"):
        clip_model.load(place.with_name("other.pt"))


def test_names_and_addresses_are_openais(server):
    """All nine models: the first address, and the checksum in it, are those of OpenAI's clip.py."""
    code = pathlib.Path(openai("model").__file__).with_name("clip.py").read_text(encoding="utf-8")
    theirs = dict(re.findall(r'"(\S+)": "(https://openaipublic\S+)"', code))
    assert list(theirs) == list(clip_model.MODELS) == list(SHAPES)
    for name, address in theirs.items():
        with mock.patch.object(clip_model, "download") as download:
            clip_model.fetch(name)
        url, _, digest = download.call_args.args
        assert url == address and digest in address.split("/")
    with pytest.raises(ValueError, match=f"'RN51': neither a file nor one of {', '.join(theirs)}"):
        clip_model.load("RN51")


def test_vocabulary_is_found_or_downloaded(server, tmp_path, monkeypatch):
    """The cached file if it is sound, else a package's, else a download, else one line."""
    package = importlib.util.find_spec("clip").submodule_search_locations[0]
    vocabulary = pathlib.Path(package, tokenizer_module.VOCABULARY).read_bytes()
    packaged = tmp_path / tokenizer_module.VOCABULARY
    packaged.write_bytes(vocabulary)
    cached = server.downloads / tokenizer_module.VOCABULARY
    find_spec = mock.Mock(return_value=mock.Mock(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    for content, found in ((b"", packaged), (vocabulary, cached), (vocabulary[:-1], packaged)):
        cached.write_bytes(content)
        assert tokenizer_module.find_vocabulary() == found
    cached.unlink()
    find_spec.return_value = None
    url = f"{server.url}/vocabulary"
    monkeypatch.setattr(tokenizer_module, "URL", url)
    for state in ("gone", "wrong", "cut", "stalled"):
        set_page(server, "/vocabulary", vocabulary, state)
        with pytest.raises(OSError, match=re.escape(f"put {url} at {cached}")) as error:
            Tokenizer.openai()
        assert one_line(error) and not list(server.downloads.iterdir())
    set_page(server, "/vocabulary", vocabulary, "whole")
    assert Tokenizer.openai().encode("a cat") == [320, 2368]
    assert cached.read_bytes() == vocabulary
    for content in (b"\x1f\x8b junk", gzip.compress(b"#version\n" + b"a b c\n" * 48894)):
        packaged.write_bytes(content)
        with pytest.raises(ValueError, match=f"{packaged.name} is not CLIP's vocabulary"):
            Tokenizer.openai(packaged)


# ---- coop.py: the method -------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 50])
def test_learning_rate_is_pytorchs(T):
    """One epoch at 1e-5, then CosineAnnealingLR(0.002, T) from its own first epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.002)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T)
    expected = [1e-5]
    for _ in range(T - 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    found = [coop.learning_rate(epoch, T) for epoch in range(T)]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("N, sizes", [(188, [32] * 5), (64, [32, 32]), (33, [32]), (12, [12])])
def test_batches(N, sizes):
    """A new shuffle every epoch; a small last batch is dropped unless it is alone; by seed."""
    shuffles = []
    for epoch in coop.batches(N, 30, seed=1):
        assert [len(batch) for batch in epoch] == sizes
        shuffles.append(torch.cat(epoch).tolist())
        assert len(set(shuffles[-1])) == sum(sizes), "no image twice"
    assert set().union(*shuffles) == set(range(N)), "no image is always dropped"
    assert shuffles[0] != shuffles[1]
    assert torch.cat(coop.batches(N, 30, seed=1)[3]).tolist() == shuffles[3]
    assert torch.cat(coop.batches(N, 30, seed=2)[3]).tolist() != shuffles[3]


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_prompts_token_by_token(position, csc):
    """Each prompt is "X X X X X name." as OpenAI tokenizes it, with V in the place of X.

    Name and period are tokenized together, as "U.S.." has one token for two periods.  In the
    middle and in front, the tokens of the name (as many as it has alone) stand further left.
    """
    tokenizer = openai("simple_tokenizer").SimpleTokenizer()
    clip = CLIP(8, clip_model.VisionTransformer(32, 32, 64, 1, 8), 64, 1).requires_grad_(False)
    clip.token_embedding.weight[:, 0] = torch.arange(49408)      # so each vector shows its id
    names = ["cat", "hot_dog", "Boeing 737-200", "U.S.", "what?", "wow!", "St. Bernard", "a...",
             "don't", "Ünïcödé 東京", "e.g", "C++", "(none)", "2012", "wait :-)"]
    learner = PromptLearner(clip, Tokenizer.openai(), names, 5, position, csc)
    V = list(range(-5, 0))
    learner.V.data[..., 0] = torch.tensor(V)
    shared, own, lengths = learner()
    before = {"end": 5, "middle": 2, "front": 0}[position]
    for name, part in zip(names, own.split(lengths.tolist()), strict=True):
        found = torch.cat([shared, part])[:, 0].long().tolist()
        name = name.replace("_", " ")
        sentence = tokenizer.encode(f"X X X X X {name}.")[5:]
        n = len(tokenizer.encode(name))
        expected = V[:before] + sentence[:n] + V[before:] + sentence[n:]
        assert found == [49406, *expected, 49407], name


@pytest.mark.parametrize("csc, shape, P", [(False, (60, 128), 61), (True, (3, 60, 128), 1)])
def test_where_V_starts(csc, shape, P):
    """V ~ N(0, 0.02^2), fp32; one for all classes, which share its tokens, or one for each.

    Or the embeddings of given words; M is then their number.  V is the only parameter.
    """
    torch.manual_seed(0)
    clip = ours(openai_clip(double=False))
    learner = PromptLearner(clip, Tokenizer(), ["a", "b", "c"], M=60, csc=csc)
    assert learner.V.shape == shape and len(learner()[0]) == P
    assert learner.V.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(learner.V.mean().item()) < 0.001
    learner = PromptLearner(clip, Tokenizer(), ["a", "b", "c"], 99, csc=csc, init="hi_there")
    words = clip.token_embedding(torch.tensor(Tokenizer().encode("hi there")))
    assert torch.equal(learner.V, words.expand((3, 7, 128) if csc else (7, 128)))
    assert [name for name, _ in learner.named_parameters()] == ["V"]


def test_what_a_prompt_learner_refuses():
    """Too long a prompt, with the name and the number of tokens; no context; other tokens."""
    clip = ours(openai_clip(layers=1))
    fits = "n" * 58                                  # and sot, 16 vectors, a period, eot: 77
    clip.encode_prompts(*PromptLearner(clip, Tokenizer(), ["cat", fits])())
    with pytest.raises(ValueError, match=f"'{fits}n' is too long .* 78 tokens .* reads 77"):
        PromptLearner(clip, Tokenizer(), ["cat", fits + "n"])
    PromptLearner(clip, Tokenizer(), ["cat", fits + "n"], M=15)
    for M in (0, 78):
        with pytest.raises(ValueError, match=f"M = {M}: expected 1 to 77"):
            PromptLearner(clip, Tokenizer(), ["cat"], M=M)
    with pytest.raises(ValueError, match="49408 ids and this CLIP 514"):
        PromptLearner(clip, Tokenizer.openai(), ["cat"])
    with pytest.raises(ValueError, match="prompt of 78 tokens; this model reads 77"):
        clip.encode_prompts(torch.zeros(8, 128), torch.zeros(72, 128), [2, 70])


def minus_log_probability(logits, labels, g):
    """Cross-entropy, written out."""
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -p[range(len(labels)), labels].log().mean()


def textbook(model, V, position, features, labels, T, seed, loss=minus_log_probability):
    """The paper's recipe on K x 77 tokens, OpenAI's encoder, SGD written out.  -> V"""
    V = V.detach().clone().requires_grad_()
    velocity = torch.zeros_like(V)
    for epoch in range(T):
        rate = 1e-5
        if epoch > 0:
            rate = 0.5 * 0.002 * (1 + math.cos(math.pi * (epoch - 1) / T))
        for batch in coop.batches(len(labels), T, seed)[epoch]:
            prompts = plain_prompts(model, Tokenizer(), V, NAMES, position)
            g = plain_text_features(model, *prompts)
            g = g / g.norm(dim=1, keepdim=True)
            f = features[batch, epoch % features.shape[1]]
            f = f / f.norm(dim=1, keepdim=True)
            logits = model.logit_scale.exp() * f @ g.T
            gradient, = torch.autograd.grad(loss(logits, labels[batch], g), V)
            with torch.no_grad():
                velocity = 0.9 * velocity + gradient + 5e-4 * V
                V -= rate * velocity
    return V.detach()


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_training_equals_the_textbook(position, csc):
    """20 steps end in the textbook's V to 1e-9 in float64, from the same start and batches."""
    model = openai_clip(layers=1)
    clip = ours(model)
    torch.manual_seed(1)
    features = torch.randn(70, 4, 32).double()       # four crops for ten epochs
    labels = torch.randint(0, len(NAMES), (70,))
    learner = PromptLearner(clip, Tokenizer(), NAMES, 4, position, csc)
    start = learner.V.detach().clone()
    V = textbook(model, start, position, features, labels, 10, seed=3)
    coop.train(clip, learner, features, labels, 10, seed=3)
    assert (learner.V - V).abs().max() < 1e-9
    assert (V - start).abs().max() > 1e-4
    learner.V.data.copy_(start)
    coop.train(clip, learner, features, labels, 10, seed=4)
    assert (learner.V - V).abs().max() > 1e-6, "control: other batches, another V"


def test_any_loss_and_kgcoops():
    """train() minimizes any loss(logits, labels, g), so KgCoOp's, too.

    That one adds 8 times the mean of 1 - cos(g, features of hand-written prompts), which keeps g
    nearer to them.
    """
    model = openai_clip(layers=1)
    clip = ours(model)
    hand_written = coop.zero_shot(clip, Tokenizer(), "a photo of a {}.", NAMES)
    torch.manual_seed(1)
    features = torch.randn(40, 1, 32).double()
    labels = torch.arange(40) % len(NAMES)

    def formula(logits, labels, g):
        cosines = (g * hand_written).sum(1) / (g.norm(dim=1) * hand_written.norm(dim=1))
        return minus_log_probability(logits, labels, g) + 8 * (1 - cosines.mean())

    learner = PromptLearner(clip, Tokenizer(), NAMES, 4)
    start = learner.V.detach().clone()
    V = textbook(model, start, "end", features, labels, 12, 1, formula)
    cosines = []
    for loss in (coop.cross_entropy, coop.kgcoop(hand_written), formula):
        learner.V.data.copy_(start)
        coop.train(clip, learner, features, labels, 12, loss=loss)
        g = F.normalize(clip.encode_prompts(*learner()), dim=1)
        cosines.append((g * hand_written).sum(1).mean())
        assert (learner.V - V).abs().max() < 1e-9 or loss is coop.cross_entropy
    assert cosines[1] > cosines[0] + 0.005


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training(number):
    """In the epoch that it comes in; until then each epoch reports its mean loss."""
    clip = ours(openai_clip())
    learner = PromptLearner(clip, Tokenizer(), NAMES, 2)
    features = torch.randn(4, 3, 32).double()
    features[3, 1] = number                          # of the second epoch
    labels = torch.arange(4)
    f = F.normalize(features[:, 0], dim=1)
    g = F.normalize(clip.encode_prompts(*learner()), dim=1).detach()
    loss = minus_log_probability(clip.logit_scale.exp() * f @ g.T, labels, g)
    progress = mock.Mock()
    with pytest.raises(ValueError, match="loss is NaN or infinite in epoch 1"):
        coop.train(clip, learner, features, labels, 3, progress=progress)
    progress.assert_called_once_with(f"loss {loss:.3f}")


def test_classify_and_evaluate():
    """The nearest by cosine, whatever the lengths; a percentage."""
    f = torch.tensor([[1.0, 0.1], [0.2, 9.0], [5.0, 4.0], [-1.0, 0.0]])
    g = torch.tensor([[9.0, 0.0], [0.0, 0.1]])
    assert coop.classify(f, g).tolist() == [0, 1, 0, 1]
    assert coop.evaluate(f, g, torch.tensor([0, 1, 0, 0])) == 75.0


def test_zero_shot_and_ensembles():
    """The L2-normalized mean of L2-normalized features, as OpenAI's model computes them.

    For 260 names, which are encoded in parts.
    """
    model = openai_clip(layers=1, width=64)
    names = ["hot_dog", *[f"n{i}" for i in range(259)]]
    templates = ["a photo of a {}.", "{}, {}!"]
    parts = []
    for template in templates:
        texts = [template.replace("{}", name.replace("_", " ")) for name in names]
        parts.append(F.normalize(model.encode_text(Tokenizer()(texts)), dim=1))
    clip = ours(model)
    assert relative(coop.zero_shot(clip, Tokenizer(), templates[0], names), parts[0]) < 1e-12
    mean = F.normalize(parts[0] + parts[1], dim=1)
    assert relative(coop.zero_shot(clip, Tokenizer(), templates, names), mean) < 1e-12
    assert relative(mean, parts[0]) > 1e-3, "control"


def test_generalized_cross_entropy():
    """Cross-entropy as q -> 0, 1 - p at q = 1, by hand at 0.5; a gradient even where p is 0."""
    torch.manual_seed(0)
    logits = torch.randn(5, 3).double()
    labels = torch.tensor([0, 1, 2, 0, 1])
    p = logits.softmax(1)[range(5), labels]
    loss = coop.generalized_cross_entropy
    assert torch.allclose(loss(logits, labels, None, q=1e-7), -p.log().mean(), atol=1e-5)
    assert torch.allclose(loss(logits, labels, None, q=1), (1 - p).mean())
    assert torch.allclose(loss(logits, labels, None), (2 * (1 - p.sqrt())).mean())
    logits[0, 0] = -1e4
    logits.requires_grad_()
    loss(logits, labels, None).backward()
    assert logits.grad.isfinite().all()


# ---- coop.py: the linear probe -------------------------------------------------------------------


def newton(objective, size):
    """The lowest point of a convex function, by Newton's method with halved steps."""
    w = torch.zeros(size, dtype=torch.float64)
    while True:
        gradient = torch.func.grad(objective)(w)
        hessian = torch.func.hessian(objective)(w)
        # the pseudo-inverse: adding a number to all biases changes nothing
        step = torch.linalg.pinv(hessian, rtol=1e-13, hermitian=True) @ gradient
        halvings = 0
        while objective(w - step) >= objective(w):
            step = step / 2
            halvings += 1
            if halvings > 20:
                return w
        w = w - step


@pytest.mark.parametrize("classes", [[0, 1], [0, 1, 3, 4]], ids=["two", "four"])
@pytest.mark.parametrize("shots", [1, 8])
@pytest.mark.parametrize("C", [1e6, 1e3, 1, 1e-3, 1e-6])
def test_linear_probe_is_at_its_optimum(C, shots, classes, monkeypatch):
    """Logits are those at the lowest point of 1/2 |W|^2 + C * sum of losses, to 2e-3.

    Two classes have one vector, as in scikit-learn: the first one's weights are zero.  A class
    without training images, here 2 and 5, is never predicted.
    """
    torch.manual_seed(0)
    labels = torch.tensor(classes * shots)
    noise = 0.5 * torch.randn(len(labels), 6)
    f = 10 * torch.randn(6) + torch.randn(6, 6)[labels] + noise      # much in common, as CLIP's
    x = F.pad(f.double() - f.double().mean(0), (0, 1), value=1.0)    # the biases take the mean
    val = (torch.cat([f, f[:2]]), torch.cat([labels, torch.tensor([2, 5])]))
    search_C = mock.Mock(return_value=C)
    monkeypatch.setattr(coop, "search_C", search_C)
    W, b, _ = coop.linear_probe((f, labels), val)
    logits = f.double() @ W.T + b
    accuracy, = search_C.call_args.args
    correct = (val[0].double() @ W.T + b).argmax(1) == val[1]
    assert accuracy(C) == correct.sum(), "C is chosen on validation images"
    without = [i for i in range(6) if i not in classes]
    assert logits.shape == (len(f), 6) and (logits[:, without] == -math.inf).all()

    rows = torch.tensor([0, 1, -1, 2, 3])[labels]
    vectors = 1 if len(classes) == 2 else len(classes)

    def spread(logits):
        return logits - logits.mean(1, keepdim=True)                 # no probability depends on it

    def weights(w):
        return F.pad(w.reshape(vectors, 7), (0, 0, len(classes) - vectors, 0))

    def objective(w):
        losses = F.cross_entropy(x @ weights(w).T, rows, reduction="sum")
        return weights(w)[:, :-1].square().sum() / 2 + C * losses

    optimum = spread(x @ weights(newton(objective, 7 * vectors)).T)
    assert relative(spread(logits[:, classes]), optimum) < 2e-3
    assert relative(1.01 * spread(logits[:, classes]), optimum) > 2e-3, "control: 1 % is seen"


@pytest.mark.parametrize("peak, expected", [
    (2.7, 2.703125), (0.99, 0.984375), (3.2, 3.203125), (-9, -7), (9, 7),
])
def test_search_C_by_pencil_and_paper(peak, expected):
    """The search ends where it does on paper, if accuracy falls in a line from a peak.

    2.7: 1e2 is the nearest of the seven: [1, 3], [2, 3], [2.5, 3], [2.5, 2.75], [2.625, 2.75],
    [2.6875, 2.75], [2.6875, 2.71875], [2.6875, 2.703125], whose upper end is nearer.
    0.99: 1e0: [-1, 1], seven times the upper half, [0.984375, 1], whose lower end is nearer.
    Of equals: the largest of the seven, 1e6, then always the lower end, 1e5.
    """
    def accuracy(C):
        return -abs(math.log10(C) - peak)

    assert math.log10(coop.search_C(accuracy)) == pytest.approx(expected, abs=1e-9)
    assert coop.search_C(mock.Mock(return_value=50.0)) == pytest.approx(1e5)


# ---- data.py: samples and crops ------------------------------------------------------------------


def test_few_shot_is_the_official_sample():
    """Random(seed).sample of each class, in order of first appearance; then of validation."""
    labels = [2, 0] * 10 + [1] * 4 + [3] * 3         # classes of 10, 10, 4 and 3 images
    train = [(f"train/{i}", label) for i, label in enumerate(labels)]
    val = [(f"val/{i}", 0) for i in range(9)]
    oracle = random.Random(7)
    expected = oracle.sample(train[0:20:2], 4)       # class 2
    expected += oracle.sample(train[1:20:2], 4)      # class 0
    expected += oracle.sample(train[20:24], 4)       # class 1: all of them, in another order
    expected += train[24:]                           # class 3: all of them, as there are fewer
    rng = random.Random(7)
    assert data.few_shot(train, 4, rng) == expected
    assert data.few_shot(val, 3, rng) == oracle.sample(val, 3)
    assert data.few_shot(train, 4, random.Random(8)) != expected, "control: the seed matters"


def test_base_and_new_and_wrong_labels():
    """Base is the first half, rounded up.  Exactly the share asked for is wrong, none by chance."""
    assert [data.subset(5, part) for part in coop.SPLITS] == [[0, 1, 2, 3, 4], [0, 1, 2], [3, 4]]
    labels = [i % 5 for i in range(40)]
    noisy = data.mislabel(labels, 0.25, 5, seed=1)
    assert sum(a != b for a, b in zip(labels, noisy)) == 10
    assert set(noisy) <= set(range(5))
    assert noisy == data.mislabel(labels, 0.25, 5, seed=1) != data.mislabel(labels, 0.25, 5, seed=2)


def official_test_crop(image, R):
    """torchvision's Resize(R, bicubic) and CenterCrop(R), written out."""
    if image.width <= image.height:
        size = (R, int(R * image.height / image.width))
    else:
        size = (int(R * image.width / image.height), R)
    image = image.resize(size, Image.BICUBIC)
    left = int(round((image.width - R) / 2.0))
    top = int(round((image.height - R) / 2.0))
    return np.asarray(image)[top:top + R, left:left + R]


@pytest.mark.parametrize("width, height", [
    (300, 200), (200, 301), (64, 64), (37, 53), (53, 37), (64, 89), (1, 1), (10, 500), (600, 10),
])
def test_test_crop_is_the_official_one(width, height):
    """Bit by bit: long sides that are rounded, offsets of x.5 (64 x 89), strips (600 x 10)."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    assert np.array_equal(data.test_crop(image, 64), official_test_crop(image, 64))


@pytest.mark.parametrize("size, resized", [((20000, 1), (3200, 64)), ((1, 20000), (64, 3200))])
def test_a_strip_makes_no_huge_image(size, resized):
    """It is cut to 50:1 first, or would become 1,280,000 x 64 on the way to its middle."""
    image = Image.new("RGB", size)
    with mock.patch.object(Image.Image, "resize", return_value=image) as resize:
        data.test_crop(image, 64)
    resize.assert_called_once_with(resized, Image.BICUBIC)


def test_train_crop_is_a_random_resized_crop():
    """Area uniform in 8 to 100 %, shape log-uniform in 3:4 to 4:3, place uniform where it fits,
    mirrored half of the time: means and limits of 4,000 crops beside those of the definition.
    """
    image = mock.Mock(width=400, height=400)
    image.crop.return_value = image
    image.resize.return_value = image
    rng = random.Random(0)
    for _ in range(4000):
        data.train_crop(image, 32, rng)
    boxes = np.array([call.args[0] for call in image.crop.mock_calls], float)
    left, top, right, bottom = boxes.T
    width = right - left
    height = bottom - top
    area = width * height / 400 ** 2
    shape = np.log(width / height)
    limit = math.log(4 / 3)
    assert boxes.min() == 0 and boxes.max() == 400
    assert 0.079 < area.min() < 0.09 and area.max() > 0.97
    assert abs(shape.min() + limit) < 0.02 and abs(shape.max() - limit) < 0.02
    small = area < 0.5                               # of these nearly all fit at the first try
    assert abs(area[small].mean() - (0.08 + 0.5) / 2) < 0.01
    assert abs(shape[small].mean()) < 0.01
    assert abs(shape[small].std() - 2 * limit / 12 ** 0.5) < 0.01
    for start, room in ((left, 400 - width), (top, 400 - height)):
        free = room > 50
        place = start[free] / room[free]
        assert abs(place.mean() - 0.5) < 0.02 and abs(place.std() - 1 / 12 ** 0.5) < 0.01
    assert abs(image.transpose.call_count / 4000 - 0.5) < 0.03


@pytest.mark.parametrize("width, height, box", [
    (1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (1, 1, (0, 0, 1, 1)),
])
def test_train_crop_of_a_strip(width, height, box):
    """Where no part fits: the middle, 4:3 or 3:4, by Pillow's own resize, mirrored or not."""
    image = Image.linear_gradient("L").resize((width, height)).rotate(30)
    middle = np.asarray(image.crop(box).resize((32, 32), Image.BICUBIC))
    crops = {data.train_crop(image, 32, random.Random(seed)).tobytes() for seed in range(20)}
    assert crops == {middle.tobytes(), middle[:, ::-1].tobytes()}


def paint(root, names, counts, size=(32, 32), seed=0):
    """root/<name>/<name>_<number>.png: noise around a color for each class.  -> root"""
    rng = np.random.default_rng(seed)
    for name, count in zip(names, counts):
        (root / name).mkdir(parents=True, exist_ok=True)
        color = np.random.default_rng(list(name.encode())).uniform(0, 255, 3)
        for i in range(count):
            pixels = rng.normal(color, 70, (*size, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name[:3]}_{i}.png")
    return root


def test_crops_are_a_pure_function_of_image_and_epoch(tmp_path):
    """Crop (i, n) is the same whatever else is asked for, and wherever the folder lies."""
    here = sorted(paint(tmp_path / "one", "ab", [4, 4], (70, 90)).glob("*/*"))
    there = sorted(paint(tmp_path / "far" / "away", "ab", [4, 4], (70, 90)).glob("*/*"))[::-1]
    numbers = [0, 1, 2, data.TEST]
    crops = list(data.crops([(path, numbers) for path in here], 32))
    assert [(path, n) for path, n, _ in crops] == list(itertools.product(here, numbers))
    assert len({pixels.tobytes() for _, _, pixels in crops}) == 8 * 4, "control: all differ"
    first = {(path.name, n): pixels for path, n, pixels in crops}
    for path, n, pixels in data.crops([(path, [2, 0]) for path in there], 32):
        assert np.array_equal(pixels, first[path.name, n])
    middle = official_test_crop(Image.open(here[0]), 32)
    assert np.array_equal(first[here[0].name, data.TEST], middle)


MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def test_normalize():
    """(pixel / 255 - mean) / std with CLIP's constants, colors in front."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    expected = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    assert np.allclose(data.normalize(torch.from_numpy(pixels)), expected, atol=1e-6)


# ---- data.py: reading images ---------------------------------------------------------------------

BLUE = (10, 20, 200)
GRAYS = [0, 255, 9000, 40000, 65535]
FILM = {"save_all": True, "append_images": [Image.new("L", (1, 1))]}
PIXELS = {   # what: (suffix, mode, pixels, options of save, RGB or gray after reading, or error)
    "1 bit": ("png", "1", [0, 255], {}, [0, 255]),
    "palette": ("gif", "P", [0, 1], {}, [BLUE, (1, 2, 3)]),
    "print": ("tif", "CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)], {}, [(255, 0, 0), 0]),
    "film": ("gif", "P", [0], FILM, [BLUE]),
    "16 bits": ("png", "I;16", GRAYS, {}, [0, 0, 35, 156, 255]),
    "16 bits in 32": ("tif", "I", GRAYS, {}, [0, 0, 35, 156, 255]),
    "RGBA": ("png", "RGBA", [(*BLUE, 255), (0, 0, 0, 0), (0, 0, 0, 128)], {}, [BLUE, 255, 127]),
    "LA": ("png", "LA", [(7, 255), (0, 0), (0, 128)], {}, [7, 255, 127]),
    "P, one is clear": ("png", "P", [0, 1], {"transparency": 1}, [BLUE, 255]),
    "RGB, one is clear": ("png", "RGB", [BLUE, (1, 2, 3)], {"transparency": (1, 2, 3)},
                          [BLUE, 255]),
    "gray, one is clear": ("png", "L", [7, 200, 0], {"transparency": 0}, [7, 200, 255]),
    "float": ("tif", "F", [0.5], {}, "32-bit float pixels have no fixed range"),
    "17 bits": ("tif", "I", [0, 65536], {}, "more than 16 bits"),
    "negative": ("tif", "I", [0, -1], {}, "more than 16 bits"),
}


@pytest.mark.parametrize("suffix, mode, pixels, options, expected", PIXELS.values(), ids=PIXELS)
def test_any_image_becomes_rgb(tmp_path, suffix, mode, pixels, options, expected):
    """16 bits are scaled to 8 (not cut off at 255), transparency is laid over white; pixels of
    unknown range are refused (not silently black or white).
    """
    image = Image.new(mode, (len(pixels), 1))
    if mode == "P":
        image.putpalette([*BLUE, 1, 2, 3])
    for i, pixel in enumerate(pixels):
        image.putpixel((i, 0), pixel)
    image.save(tmp_path / f"x.{suffix}", **options)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"x.tif: .*{expected}"):
            data.read_image(tmp_path / "x.tif")
        return
    rgb = np.asarray(data.read_image(tmp_path / f"x.{suffix}"))
    assert rgb.shape == (1, len(pixels), 3) and rgb.dtype == np.uint8
    for pixel, color in zip(rgb[0], expected):
        assert (pixel == color).all()


@pytest.mark.parametrize("orientation, stored", [
    (1, None), (2, Image.FLIP_LEFT_RIGHT), (3, Image.ROTATE_180), (4, Image.FLIP_TOP_BOTTOM),
    (5, Image.TRANSPOSE), (6, Image.ROTATE_90), (7, Image.TRANSVERSE), (8, Image.ROTATE_270),
])
def test_photographs_are_turned_upright(tmp_path, orientation, stored):
    """What a phone stored sideways comes out as it was seen, for all eight orientations of EXIF."""
    seen = np.kron([[0, 50, 100], [150, 200, 250]], np.ones((16, 16))).astype(np.uint8)
    image = Image.fromarray(seen)
    if stored is not None:
        image = image.transpose(stored)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = np.asarray(data.read_image(tmp_path / "x.jpg"), int)
    assert image.shape == (32, 48, 3)
    assert abs(image - seen[..., None]).max() < 4


def test_all_broken_images_are_named_at_once(tmp_path):
    """With what they are instead; but only if one of those that are needed is broken."""
    dataset = data.load_dataset(paint(tmp_path / "mine", ["cat", "dog"], [10, 10]))
    paths = [path for path, _ in dataset.train + dataset.val + dataset.test]
    png = paths[0].read_bytes()
    broken = {
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "web page": b"\n<!DOCTYPE html><html>not found</html>",
        "empty": b"",
        "damaged": png[:20],
        "no format": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "No such file": b"",
        "32-bit float": b"",
    }
    for path, content in zip(paths, broken.values()):
        path.write_bytes(content)
    paths[5].unlink()
    Image.new("F", (4, 4)).save(paths[6], format="TIFF")
    data.check_images(paths[7:], dataset)            # none of these is broken
    with pytest.raises(ValueError, match="7 of 20 images cannot be read") as error:
        data.check_images(paths[6:7], dataset)
    for path, words in zip(paths, broken):
        assert re.search(f"{words}[^;]*{path.name}", one_line(error))

    paths[0].write_bytes(png[:len(png) // 2])
    data.check_images(paths[:1], dataset)            # the header is sound
    with mock.patch("PIL.EpsImagePlugin.Ghostscript") as ghostscript:
        for path in (paths[0], paths[4]):
            with pytest.raises(ValueError, match=f"cannot read image .*{path.name}"):
                data.read_image(path)
        ghostscript.assert_not_called()              # PostScript is a program


# ---- data.py: files and folders ------------------------------------------------------------------


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    """If its writer or the disk fails, the old file stays and nothing lies beside it."""
    file = tmp_path / "new" / "folder" / "file"
    full = mock.Mock(side_effect=OSError("No space left on device"))
    with data.atomic_write(file) as out:
        out.write(b"old")
    with pytest.raises(KeyError):
        with data.atomic_write(file) as out:
            out.write(b"half")
            raise KeyError
    for module, function in ((os, "replace"), (pathlib.Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full)
            with pytest.raises(OSError, match="No space"):
                with data.atomic_write(file) as out:
                    out.write(b"new")
    assert file.read_bytes() == b"old" and list(file.parent.iterdir()) == [file]


def lay_out(root, layout):
    """Files in folders, from "train/* 3; owl/; a.csv; b.txt = one, two".  -> root

    "train/cat 3" is train/cat/0.jpg, 1.jpg and 2.jpg (empty: load_dataset reads names only), "owl/"
    a folder, "a.csv" an empty file and b.txt has two lines; * is first cat and then dog.
    """
    for entry in layout.split("; "):
        for name in ["cat", "dog"] if "*" in entry else [""]:
            path, _, text = entry.replace("*", name).partition(" = ")
            folder, _, count = path.rpartition(" ")
            if count.isdigit():
                (root / folder).mkdir(parents=True, exist_ok=True)
                for i in range(int(count)):
                    (root / folder / f"{i}.jpg").touch()
            elif path.endswith("/"):
                (root / path).mkdir(parents=True)
            else:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text.replace(", ", "\n"), encoding="utf-8")
    return root


def sizes(dataset):
    return len(dataset.train), len(dataset.val), len(dataset.test)


SPLIT = """{
    "train": [["zebra/0.jpg", 0, "grevy zebra"], ["cat/0.jpg", 1, "cat"], ["cat/1.jpg", 1, "cat"]],
    "val":   [["cat/2.jpg", 1, "cat"], ["zebra/2.jpg", 0, "grevy zebra"]],
    "test":  [["zebra/1.jpg", 0, "grevy zebra"]]
}"""
PAPER = {   # split file: name, image folder, hand-written prompt (CoOp's datasets/ and zsclip.py)
    "DescribableTextures": ("dtd", "images", "{} texture."),
    "Caltech101": ("caltech-101", "101_ObjectCategories", "a photo of a {}."),
    "EuroSAT": ("eurosat", "2750", "a centered satellite photo of {}."),
    "OxfordFlowers": ("oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    "OxfordPets": ("oxford_pets", "images", "a photo of a {}, a type of pet."),
    "Food101": ("food-101", "images", "a photo of {}, a type of food."),
    "StanfordCars": ("stanford_cars", ".", "a photo of a {}."),
    "SUN397": ("sun397", "SUN397", "a photo of a {}."),
    "UCF101": ("ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
    "Mine": ("folder", "images", "a photo of a {}."),
}


@pytest.mark.parametrize("file", PAPER)
def test_split_files(tmp_path, file):
    """Name, image folder and prompt of each of the paper's datasets; the file's order is kept."""
    name, folder, template = PAPER[file]
    root = lay_out(tmp_path / "folder", f"{folder}/cat 3; {folder}/zebra 3; labels/train1.txt")
    (root / f"split_zhou_{file}.json").write_text("\ufeff" + SPLIT, encoding="utf-8")
    dataset = data.load_dataset(root)
    home = root / folder
    assert (dataset.name, dataset.template, dataset.root) == (name, template, root)
    assert dataset.classnames == ["grevy zebra", "cat"]
    assert dataset.train == [(home / "zebra/0.jpg", 0), (home / "cat/0.jpg", 1),
                             (home / "cat/1.jpg", 1)]
    assert dataset.val == [(home / "cat/2.jpg", 1), (home / "zebra/2.jpg", 0)]
    assert dataset.test == [(home / "zebra/1.jpg", 0)]
    assert dataset.notes == ["classes without test images: cat"]


NOT_A_SPLIT = r"split_zhou_Mine.json is not a split file .*expected \{\"train\""
BAD_SPLITS = {   # what: (in the file above, is replaced by, the error)
    "not JSON": ("{", "<html>", NOT_A_SPLIT),
    "no val": ('"val"', '"valid"', NOT_A_SPLIT),
    "short entry": ('["cat/0.jpg", 1, "cat"]', '["cat/0.jpg", 1]', NOT_A_SPLIT),
    "labels with gaps": ('1, "cat"', '2, "cat"', "labels are not 0 .. K - 1"),
    "labels are true": ('1, "cat"', 'true, "cat"', "labels are not 0 .. K - 1"),
    "two names": ('0.jpg", 1, "cat"', '0.jpg", 1, "lion"', "a label has two names"),
    "control characters": ('"cat"', '"c\\u001b[2Jt"', r"'c\\x1b\[2Jt'; expected printable"),
    "path outside": ("cat/0.jpg", "../../outside.jpg", "leads outside, .*outside.jpg"),
    "path by a detour": ("cat/0.jpg", "../../folder/images/cat/0.jpg", "leads outside"),
    "absolute path": ("cat/0.jpg", "OUTSIDE", "leads outside, .*outside.jpg"),
    "missing image": ("cat/0.jpg", "cat/9.jpg", "1 images of the split are missing, .*9.jpg"),
    "no test images": ('"test":', '"test": [], "more":', "2 classes and 0 test images"),
    "one class": ('1, "cat"', '0, "grevy zebra"', "1 classes and 1 test images"),
}


@pytest.mark.parametrize("old, new, error", BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_bad_split_files(tmp_path, old, new, error):
    root = lay_out(tmp_path / "folder", "images/cat 3; images/zebra 3; ../outside.jpg")
    file = root / "split_zhou_Mine.json"
    file.write_text(SPLIT)
    data.load_dataset(root)                          # control: nothing else is wrong
    new = new.replace("OUTSIDE", (tmp_path / "outside.jpg").as_posix())
    assert old in SPLIT
    file.write_text(SPLIT.replace(old, new))
    with pytest.raises(ValueError, match=error):
        data.load_dataset(root)


@pytest.mark.parametrize("n, counts", [
    (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1)), (5, (2, 1, 2)), (6, (3, 1, 2)), (7, (4, 1, 2)),
    (8, (4, 2, 2)), (9, (4, 2, 3)), (10, (5, 2, 3)), (11, (6, 2, 3)), (12, (6, 2, 4)),
])
def test_class_folders_are_split_50_20_30(tmp_path, n, counts):
    """0.5 n and 0.2 n, halves rounded to even, after Random(1).shuffle of each sorted class."""
    dataset = data.load_dataset(lay_out(tmp_path, f"* {n}"))
    rng = random.Random(1)
    expected = ([], [], [])
    for label, name in enumerate(["cat", "dog"]):
        items = [(path, label) for path in sorted((tmp_path / name).iterdir())]
        rng.shuffle(items)
        for part, count in zip(expected, counts):
            part += items[:count]
            del items[:count]
    assert (dataset.train, dataset.val, dataset.test) == expected


WORDS = {"n01440764": "tench", "n01484850": "white shark", "n02012849": "crane",
         "0": "white shark", "2": "crane"}           # ImageNetV2: lines of the list
LIST = "; classnames.txt = n01484850 white shark, n01440764 tench, n02012849 crane"
AIRCRAFT = ("images 6; variants.txt = 707-320, DC 10; images_variant_train.txt = 0 DC 10, 1 707-320"
            "; images_variant_val.txt = 3 DC 10, 2 707-320; images_variant_test.txt = 4 DC 10")
FOLDERS = {   # what: (layout, classes, images for training, validation and testing, notes)
    "parts": ("train/* 3; val/* 2; test-set/* 4", "cat, dog", (6, 4, 8), "^$"),
    "capitals": ("Train/* 3; VALID/* 2; Test Data/*/0.JPG", "cat, dog", (6, 4, 2), "^$"),
    "long names": ("TrainingSet/* 3; validation/* 2; testing/* 4", "cat, dog", (6, 4, 8), "^$"),
    "train and val": ("train/* 3; valid/* 2", "cat, dog", (6, 0, 4),
                      "no test/: the images of valid/ are for testing, none .* validation"),
    "test alone": ("test/* 4", "cat, dog", (0, 0, 8), "^$"),
    "parts in images": ("images/train/* 3; images/test/* 4", "cat, dog", (6, 0, 8), "^$"),
    "classes in images": ("images/* 4; masks/* 4", "cat, dog", (4, 2, 2), "not used: masks"),
    "class called train": ("bus 4; car 4; train 4", "bus, car, train", (6, 3, 3), "^$"),
    "folder beside parts": ("train/* 3; test/* 4; old/* 9", "cat, dog", (6, 0, 8), "used: old"),
    "class without test": ("train/* 3; train/fox 3; test/* 4", "cat, dog, fox", (9, 0, 8),
                           "classes without test images: fox"),
    "image beside classes": ("* 4; a.png", "cat, dog", (4, 2, 2), "passed over: 1; first: a.png"),
    "empty class": ("* 4; owl/", "cat, dog", (4, 2, 2), "without images are no classes: owl"),
    "HEIC class": ("* 4; owl/0.HEIC; owl/1.HEIC", "cat, dog", (4, 2, 2),
                   "passed over.* 2 .HEIC; first: owl/0.HEIC.*no classes: owl"),
    "no images": ("* 4; dog/7; dog/a.pdf; dog/b.pdf", "cat, dog", (4, 2, 2),
                  "2 .pdf, 1 without a suffix; first: dog/7"),
    "deeper": ("* 4; dog/puppies/small 3", "cat, dog", (4, 2, 2),
               "sub-folders .* passed over: 3; first: dog/puppies/small/0.jpg"),
    "hidden": ("* 4; dog/.ipynb_checkpoints 3; .git 3; dog/._0.jpg; __MACOSX/* 3; dog/Thumbs.db",
               "cat, dog", (4, 2, 2), "^$"),
    "numbers": ("0 4; 1 4", "0, 1", (4, 2, 2), "2 class names have codes in them, e.g. 0: CLIP"),
    "wnids": ("n01440764 4; owl 4", "n01440764, owl", (4, 2, 2), "1 class .* e.g. n01440764"),
    "plain list": ("* 4; classnames.txt = cat, fox", "cat, dog", (4, 2, 2), "^$"),
    "other split file": ("* 4; split_mine.json", "cat, dog", (4, 2, 2),
                         "split_mine.json is not used .*split_zhou_"),
    "table": ("train/* 3; test/* 4; a.csv", "cat, dog", (6, 0, 8), "a.csv is not used"),
    "ImageNet": ("train/n01484850 3; train/n01440764 3; val/n01484850 2" + LIST,
                 "tench, white shark", (6, 0, 2), "classes without test images: tench"),
    "Sketch": ("x/n01484850 3; x/n02012849 1" + LIST, "white shark, crane", (0, 0, 4), "^$"),
    "V2": ("x/0 1; x/2 2" + LIST, "white shark, crane", (0, 0, 3), "^$"),
    "byte-order mark": ("n01484850 4; n01440764 4" + LIST.replace("= ", "= \ufeff"),
                        "tench, white shark", (4, 2, 2), "^$"),
    "Aircraft": (AIRCRAFT, "707-320, DC 10", (2, 2, 1), "classes without test images: 707"),
}


@pytest.mark.parametrize("layout, classes, counts, notes", FOLDERS.values(), ids=FOLDERS)
def test_folders_as_people_have_them(tmp_path, monkeypatch, layout, classes, counts, notes):
    """Learned from, with a note of all that is passed over.  "." is a folder, too."""
    monkeypatch.chdir(lay_out(tmp_path, layout))
    dataset = data.load_dataset(".")
    assert ", ".join(dataset.classnames) == classes
    assert sizes(dataset) == counts
    assert re.search(notes, "; ".join(dataset.notes)), dataset.notes
    if layout == AIRCRAFT:                           # images in the order of their lists
        assert dataset.name == "fgvc_aircraft"
        assert dataset.template == "a photo of a {}, a type of aircraft."
        assert [(path.name, label) for path, label in dataset.val] == [("3.jpg", 1), ("2.jpg", 0)]
        return
    assert dataset.name == ("imagenet" if "val/n" in layout else tmp_path.name)
    words = WORDS if "classnames.txt" in layout else {}
    for path, label in dataset.train + dataset.val + dataset.test:
        assert dataset.classnames[label] == words.get(path.parent.name, path.parent.name)


REFUSED = {   # what: (layout, error)
    "YOLO": ("images/train 3; images/val 3; images/test 3",
             "images: test/, train/, val/ with images directly inside.*expected train/<class>/"),
    "Kaggle": ("train_images 3; test_images 3; train.csv", "test_images/, .* directly inside"),
    "test without labels": ("train/* 3; test 3", "test/ with images directly inside"),
    "wrapped": ("data/* 3", r"did you mean .*data\?"),
    "wrapped twice": ("a/data/train/* 3; a/data/test/* 3", r"did you mean .*a.data\?"),
    "one class": ("cat 4", "class folders with images: 1, needed are at least 2"),
    "one class in parts": ("train/cat 3; test/cat 3", "train has 1 class folders"),
    "lonely image": ("* 4; owl 1", "'owl' has 1 image; it needs one for training"),
    "same prompt": ("hot_dog 4; Hot  Dog 4", "'Hot  Dog' and 'hot_dog' make the same prompt"),
    "same in parts": ("train/hot_dog 3; train/hot dog 3; test/hot_dog 3", "rename or merge"),
    "two for one part": ("train/* 3; training/* 3; test/* 3", "training/: which one is train"),
    "train alone": ("train/* 3", "no test/ .* so --data .*train would split it"),
    "unknown class": ("train/* 3; test/fox 3", "'fox', which is none of the 2 classes"),
    "flat": ("0.jpg; 1.jpg; a.csv", "passed over: 2; first: 0.jpg.*a.csv is not read.*split_zhou_"),
    "HEIC alone": ("cat/0.HEIC; dog/0.HEIC", "passed over.*2 .HEIC"),
    "nothing": ("readme.txt", "images: 0, needed are at least 2; expected train/<class>"),
    "wnid without name": ("n01440764 4; pug 4" + LIST, "classnames.txt has no name for pug"),
    "list without wnids": ("x/pug 4" + LIST, "no folder n01440764 or the like"),
    "ImageNet without val": ("train/n01440764 4" + LIST, "val is missing"),
    "Caltech-101": ("101_ObjectCategories/* 4", "expected split_zhou_Caltech101.json"),
    "EuroSAT": ("2750/* 4", "it is eurosat; expected split_zhou_EuroSAT.json .*https://raw"),
    "SUN397": ("SUN397/a/abbey 4", "expected split_zhou_SUN397.json"),
    "UCF101": ("UCF-101-midframes/* 4", "expected split_zhou_UCF101.json"),
}


@pytest.mark.parametrize("layout, error", REFUSED.values(), ids=REFUSED)
def test_folders_that_are_no_dataset(tmp_path, layout, error):
    """Refused with what was found and what was expected."""
    with pytest.raises(ValueError, match=error):
        data.load_dataset(lay_out(tmp_path / "mine", layout))


def test_all_images_of_a_folder(tmp_path):
    """Sorted by folder, without hidden names and junk; links are followed, but not in circles."""
    root = lay_out(tmp_path / "mine", "b 1; a 2; a/c 1; a/x.txt; .git 1; a/__MACOSX 1; a/._0.jpg")
    found = ["a/0.jpg", "a/1.jpg", "a/c/0.jpg", "b/0.jpg"]
    assert [path.relative_to(root).as_posix() for path in data.find_images(root)] == found
    try:
        (root / "a" / "up").symlink_to(root, target_is_directory=True)
        (root / "owl").symlink_to(lay_out(tmp_path / "elsewhere", "1 1"), target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let everybody make links")
    found.append("owl/1/0.jpg")
    assert [path.relative_to(root).as_posix() for path in data.find_images(root)] == found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all file names are Unicode")
def test_a_file_name_need_not_be_utf8(tmp_path):
    root = paint(tmp_path, ["cat", "dog"], [2, 2])
    os.rename(root / "dog" / "dog_0.png", os.fsencode(root / "dog") + b"/caf\xe9.png")
    dataset = data.load_dataset(root)
    paths = [path for path, _ in dataset.train + dataset.test]
    assert "caf\udce9.png" in [path.name for path in paths]
    data.check_images(paths, dataset)
    assert len(list(data.crops([(path, [0, data.TEST]) for path in paths], 32))) == 8


def dtd_archive(*more):
    """A small dtd-r1.0.1.tar.gz, as bytes; with more members, if wanted."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, i in itertools.product(("cat", "zebra"), range(3)):
            tar.addfile(tarfile.TarInfo(f"dtd/images/{name}/{i}.jpg"))
        for member in (tarfile.TarInfo("dtd/labels/train1.txt"), *more):
            tar.addfile(member)
    return content.getvalue()


def test_dtd_is_fetched_completely_or_not_at_all(tmp_path, server, monkeypatch):
    """Gone, cut off, wrong: one OSError that names the address, and nothing under a final name."""
    root = tmp_path / "new" / "dtd"
    lay_out(root.parent, "dtd-r1.0.1.tar.gz; dtd.unpacking/dtd/old.txt")      # of an earlier try
    files = {"/dtd.tar.gz": dtd_archive(), "/split.json": SPLIT.encode()}
    for name, (path, content) in zip(("DTD", "DTD_SPLIT"), files.items()):
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setattr(data, name, (server.url + path, digest))
    for path, content in files.items():
        for state in ("gone", "cut", "wrong"):
            set_page(server, path, content, state)
            with pytest.raises(OSError, match=f"cannot download http://127.*{path} .* put it"):
                data.load_dataset(root)
            assert root.exists() == (path == "/split.json") and not list(root.glob("*.json"))
        set_page(server, path, content, "whole")
    dataset = data.load_dataset(root)
    assert (dataset.classnames, sizes(dataset)) == (["grevy zebra", "cat"], (3, 2, 1))
    assert sorted(os.listdir(root.parent)) == ["dtd", "dtd-r1.0.1.tar.gz"]
    assert not (root / "old.txt").exists()
    server.pages.clear()
    assert data.load_dataset(root) == dataset, "fetched once"


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="a Python before 3.10.12")
def test_unpacking_stays_inside(tmp_path, monkeypatch):
    """A member that leads outside is refused, and nothing is written there."""
    archive = dtd_archive(tarfile.TarInfo("dtd/../../outside.txt"))
    (tmp_path / "dtd-r1.0.1.tar.gz").write_bytes(archive)
    monkeypatch.setattr(data, "DTD", ("", hashlib.sha256(archive).hexdigest()))
    with pytest.raises(tarfile.TarError, match="outside"):
        data.load_dataset(tmp_path / "dtd")
    assert not (tmp_path / "dtd").exists() and not (tmp_path / "outside.txt").exists()


# ---- data.py: the demo's world -------------------------------------------------------------------


def test_captions_name_what_is_drawn(monkeypatch):
    """Color and texture always, scale, ground and kind sometimes; the same pairs for one seed."""
    draw = mock.Mock(wraps=data.draw)
    monkeypatch.setattr(data, "draw", draw)
    images, captions = data.draw_pairs(80, seed=5)
    sometimes = {"fine", "coarse", "black", "white", "faded", "negative"}
    seen = set()
    for caption, call in zip(captions, draw.mock_calls):
        color, texture, scale, ground, style, _ = call.args
        kinds = {kind for kind in data.KINDS if data.KINDS[kind] == style}
        named = {*data.HUES, *data.TEXTURES, *sometimes}.intersection(re.findall(r"\w+", caption))
        assert {color, texture} <= named <= {color, texture, scale, ground, *kinds}
        seen |= named
    assert seen == {*data.HUES, *data.TEXTURES, *sometimes}
    again, captions_again = data.draw_pairs(80, seed=5)
    assert np.array_equal(images, again) and captions == captions_again


def test_a_drawing_shows_what_it_is_called():
    """Color by the hue of the ink, ground by the paper; a negative has light for dark."""
    def drawn(color="red", ground="black", negative=False, texture="striped"):
        style = data.Style(contrast=(1, 1), noise=(0, 0), negative=negative)
        return data.draw(color, texture, "coarse", ground, style, np.random.default_rng(0))

    for color, hue in data.HUES.items():
        h, _, v = np.asarray(Image.fromarray(drawn(color)).convert("HSV"), int).reshape(-1, 3).T
        assert abs((h[v.argmax()] / 255 * 360 - hue + 180) % 360 - 180) < 12
    assert drawn(ground="black").max(2).min() < 64
    assert drawn(ground="white").min(2).max() > 191
    assert abs(drawn().astype(int) + drawn(negative=True) - 255).max() <= 1
    assert len({drawn(texture=texture).tobytes() for texture in data.TEXTURES}) == 8


def test_a_drawn_dataset(tmp_path, monkeypatch):
    """Drawn completely or not at all; each image lies in the folder of its class."""
    draw = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(data, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        data.draw_dataset(tmp_path / "demo", {"train": 2, "test": 1})
    assert not (tmp_path / "demo").exists()
    draw.reset_mock(side_effect=True)
    draw.side_effect = [np.full((8, 8, 3), i, np.uint8) for i in range(48 * 3)]
    data.draw_dataset(tmp_path / "demo", {"train": 2, "test": 1})
    assert os.listdir(tmp_path) == ["demo"]
    dataset = data.load_dataset(tmp_path / "demo")
    assert len(dataset.classnames) == 48 and sizes(dataset) == (96, 0, 48)
    for path, label in dataset.train + dataset.test:
        color, texture = draw.mock_calls[Image.open(path).getpixel((0, 0))[0]].args[:2]
        assert dataset.classnames[label] == f"{color} {texture}"


# ---- The command line: from a folder to a prompt -------------------------------------------------

CLASSES = ["banded", "dotted", "grid", "woven_wool", "zigzagged"]
COUNTS = [2, 3, 4, 5, 6]                      # every class has another number of test images
N_TEST = sum(COUNTS)
RESULT = {"settings", "accuracy", "n_test", "per_class", "training_images", "seconds_images",
          "seconds_training", "device", "torch"}
SETTINGS = {"method", "dataset", "backbone", "shots", "seed", "M", "position", "csc", "init",
            "epochs", "views", "classes", "loss", "noise", "precision", "template", "weights",
            "images", "code"}


def small_clip(path, width=64):
    """Random weights for images of 32 x 32 and a vocabulary of bytes, rounded to fp16 as OpenAI's
    are, large enough for classes to differ.
    """
    torch.manual_seed(0)
    clip = CLIP(32, clip_model.VisionTransformer(32, 16, 64, 1, 32), width, 2, vocab_size=514)
    clip.token_embedding.weight.data.normal_(0, 0.3)
    clip.positional_embedding.data.normal_(0, 0.1)
    for block in clip.transformer.resblocks:
        block.attn.in_proj_weight.data *= 3
    torch.save({name: value.half().float() for name, value in clip.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """photos/, a folder of class folders; clip.pt; and the options that learn from them."""
    root = tmp_path_factory.mktemp("world")
    photos = root / "photos"
    paint(photos / "train", CLASSES, [7] * 5, (40, 60), 1)
    paint(photos / "val", CLASSES, [5] * 5, (40, 60), 2)
    paint(photos / "test", CLASSES, COUNTS, (32, 32), 3)               # their own test crops
    (root / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    weights = small_clip(root / "clip.pt")
    learn = ["--data", photos, "--backbone", weights, "--epochs", 3]
    return types.SimpleNamespace(root=root, photos=photos, weights=weights, learn=learn)


@pytest.fixture
def command(world, tmp_path, capsys):
    """command("--data", folder, ...) runs the command line -> exit code, stdout, stderr."""
    start = ["--device", "cpu", "--cache", world.root / "cache", "--out", tmp_path / "out"]

    def run(*arguments, main=coop.main, code=0):
        found = 0
        try:
            main([str(argument) for argument in (*start, *arguments)])
        except SystemExit as stop:
            found = stop.code
        screen, err = capsys.readouterr()
        assert found == code, err
        return screen, err

    return run


def results(out):
    """All results in a folder, by file name."""
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def vectors(out):
    """V of all prompts in a folder, by file name."""
    return {path.stem: torch.load(path, weights_only=True)["V"] for path in out.glob("*.pt")}


def openai_cosines(world, folder, names, V=None, position="end", templates=()):
    """Cosines (N, K), by OpenAI's class, of folder/<name>/*.png with prompts; and labels (N,).

    The prompts: V and each name, or the mean of several templates.
    """
    model = openai("model").build_model(torch.load(world.weights)).float().requires_grad_(False)
    if V is None:
        parts = []
        for template in templates:
            texts = [template.format(name.replace("_", " ")) for name in names]
            parts.append(F.normalize(model.encode_text(Tokenizer()(texts)), dim=-1))
        g = torch.stack(parts).mean(0)
    else:
        g = plain_text_features(model, *plain_prompts(model, Tokenizer(), V, names, position))
    crops = []
    labels = []
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.png")):
            crops.append(np.array(Image.open(path)))
            labels.append(label)
    x = torch.from_numpy((np.stack(crops) / 255 - MEAN) / STD).permute(0, 3, 1, 2).float()
    f = F.normalize(model.encode_image(x), dim=-1)
    return f @ F.normalize(g, dim=-1).T, torch.tensor(labels)


def openai_accuracy(*arguments, **prompts):
    """Percent of the images whose own prompt has the largest cosine, by OpenAI's class."""
    cosines, labels = openai_cosines(*arguments, **prompts)
    return pytest.approx(100 * (cosines.argmax(-1) == labels).double().mean().item())


def test_from_folder_to_prompt(command, world, tmp_path):
    """Screen, JSON and prompt agree with each other and with OpenAI's encoders."""
    templates = ["{}", "a picture of many {} things."]
    out = tmp_path / "my results"
    screen, _ = command(*world.learn, "--shots", 2, "--seeds", 0, 5, "--out", out, "--template",
                        *templates)
    train = data.load_dataset(world.photos).train
    assert len(results(out)) == 3
    for stem, result in results(out).items():
        settings = result["settings"]
        assert set(result) == RESULT and set(settings) == SETTINGS
        accuracy = result["accuracy"]["all"]
        per_class = result["per_class"]
        hardest = min(per_class, key=per_class.get)
        assert f": {accuracy:.2f} %; hardest: {hardest} {per_class[hardest]:.0f} %" in screen
        assert result["n_test"] == {"all": N_TEST} and list(per_class) == CLASSES
        right = [count * share for count, share in zip(COUNTS, per_class.values())]
        assert sum(right) / N_TEST == pytest.approx(accuracy)
        prompts = {"templates": templates}
        if settings["method"] == "coop":
            seed = settings["seed"]
            assert re.fullmatch(f"photos-clip-coop-2shot-seed{seed}-[0-9a-f]{{8}}", stem)
            sample = data.few_shot(train, 2, random.Random(seed))
            below = [path.relative_to(world.photos).as_posix() for path, _ in sample]
            assert result["training_images"] == below
            prompt = torch.load(out / f"{stem}.pt", weights_only=True)
            assert prompt["settings"] == settings and prompt["classnames"] == CLASSES
            prompts = {"V": prompt["V"]}
        assert accuracy == openai_accuracy(world, world.photos / "test", CLASSES, **prompts)
    line = screen.splitlines()[-1].partition("python coop.py ")[2]
    words = shlex.split(line.replace("IMAGE_OR_FOLDER", (world.photos / "test").as_posix()))
    assert len(command(*words)[0].splitlines()) == N_TEST


OPTIONS = {   # the shape of V, and the settings that they change
    "--csc": ((5, 16, 64), {"csc": True}),
    "--position middle --M 3": ((3, 64), {"position": "middle", "M": 3}),
    '--init "a_photo of a"': ((9, 64), {"init": "a_photo of a", "M": 9}),
    "--views 1": ((16, 64), {"views": 1}),
    "--precision bf16": ((16, 64), {"precision": "bf16"}),
    "--loss gce": ((16, 64), {"loss": "gce", "template": None}),
    '--loss kgcoop --template "{}!" {}': ((16, 64), {"loss": "kgcoop", "template": "{}! | {}"}),
    "--noise 0.5": ((16, 64), {"noise": 0.5}),
    "--classes new": ((16, 64), {"classes": "new"}),
    "--shots 1": ((16, 64), {"shots": 1, "epochs": 3}),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_reach_the_prompt(command, world, tmp_path, options):
    """Its settings, V, which is another one than without the option, and the way it is tested."""
    shape, changed = OPTIONS[options]
    learn = [*world.learn, "--shots", 2]
    command(*learn)
    command(*learn, *shlex.split(options), "--out", tmp_path / "new")
    default, = vectors(tmp_path / "out").values()
    (stem, V), = vectors(tmp_path / "new").items()
    result = results(tmp_path / "new")[stem]
    settings = result["settings"]
    assert settings.items() >= changed.items()
    assert V.shape == shape
    assert V.shape != default.shape or relative(V, default) > 1e-5
    if settings["precision"] == "fp32":
        names = CLASSES[3:] if settings["classes"] == "new" else CLASSES
        expected = openai_accuracy(world, world.photos / "test", names, V, settings["position"])
        assert result["accuracy"] == {settings["classes"]: expected}


def test_probe_learns_from_the_same_sample(command, world, monkeypatch):
    """And from four validation images per class, sampled with the same generator afterwards."""
    probe = mock.Mock(wraps=coop.linear_probe)
    monkeypatch.setattr(coop, "linear_probe", probe)
    screen, _ = command(*world.learn, "--shots", 7, "--seeds", 3, "--probe", "--views", 1)
    assert "linear probe, 7 shots, seed 3: " in screen
    dataset = data.load_dataset(world.photos)
    clip = clip_model.load(world.weights)
    rng = random.Random(3)
    for found, items, shots in zip(probe.call_args.args, (dataset.train, dataset.val), (7, 4)):
        sample = data.few_shot(items, shots, rng)
        f = coop.image_features(clip, [(path, [data.TEST]) for path, _ in sample])
        assert found[1].tolist() == [label for _, label in sample]
        assert relative(found[0], f) < 1e-5


def test_base_and_new(command, world, tmp_path):
    """Learned on the first half, rounded up; each half is classified among its own classes."""
    command(*world.learn, "--classes", "base", "--shots", 2, "--csc", "both", "--probe")
    for stem, result in results(tmp_path / "out").items():
        accuracy = result["accuracy"]
        settings = result["settings"]
        if settings["csc"] or settings["method"] == "linear-probe":
            assert list(accuracy) == ["base"] and result["n_test"] == {"base": 2 + 3 + 4}
            continue
        assert result["n_test"] == {"base": 2 + 3 + 4, "new": 5 + 6}
        base, new, harmonic = accuracy.values()
        assert harmonic == pytest.approx(2 * base * new / (base + new))
        prompts = {"templates": ["a photo of a {}."]}
        if settings["method"] == "coop":
            assert {name.split("/")[1] for name in result["training_images"]} == set(CLASSES[:3])
            prompts = {"V": vectors(tmp_path / "out")[stem]}
            screen, _ = command("--load", tmp_path / "out" / f"{stem}.pt", "--data",
                                world.photos, "--classes", "new")
            assert f"(new classes): {new:.2f} %" in screen
        for found, names in ((base, CLASSES[:3]), (new, CLASSES[3:])):
            assert found == openai_accuracy(world, world.photos / "test", names, **prompts)


# ---- One run is one file, and no image is encoded twice ------------------------------------------


def test_a_finished_run_is_not_repeated(command, world, tmp_path, monkeypatch):
    """Unless --again asks for it, which gives the same V."""
    train = mock.Mock(wraps=coop.train)
    monkeypatch.setattr(coop, "train", train)
    grid = [*world.learn, "--shots", 1, 2, "--csc", "both"]
    first, _ = command(*grid)
    V = vectors(tmp_path / "out")
    assert train.call_count == len(V) == 4 and "done already" not in first
    second, _ = command(*grid, "--seeds", 1, 1)
    assert train.call_count == 4 and second.count("  (done already)") == 5
    assert second.replace("  (done already)", "") == first
    command(*grid, "--again")
    again = vectors(tmp_path / "out")
    assert train.call_count == 8
    assert V.keys() == again.keys() and all(torch.equal(V[stem], again[stem]) for stem in V)


def test_each_setting_makes_another_file():
    """With names that any file system takes, in any script."""
    run = coop.Run(method="coop", dataset="a/b c", backbone="RN50", shots=4, seed=1)
    assert re.fullmatch(r"a-b-c-RN50-coop-4shot-seed1-[0-9a-f]{8}", run.stem)
    stems = {dataclasses.replace(run, **{setting: "another"}).stem for setting in SETTINGS}
    assert len(stems - {run.stem}) == len(SETTINGS)
    long = dataclasses.replace(run, dataset="写真" * 60)
    assert len(f"{long.stem}.json.12345678.tmp".encode()) < 255
    assert long.stem != dataclasses.replace(long, seed=2).stem


@pytest.mark.parametrize("file, before, after, learns, encodes", [
    ("coop.py", "MOMENTUM = 0.9", "MOMENTUM = 0.8", True, False),
    ("coop.py", "f = clip.encode_image(x)", "f = 2 * clip.encode_image(x)", True, True),
    ("data.py", "rng.uniform(0.08, 1)", "rng.uniform(0.1, 1)", True, True),
    ("data.py", "to_rgb(upright(image))", "to_rgb(image)", True, True),
    ("data.py", "0.26862954, 0.26130258", "0.26, 0.26130258", True, True),
    ("data.py", 'f"noise {seed}"', 'f"wrong {seed}"', True, False),
    ("clip_model.py", "F.silu(1.702 * x)", "F.silu(1.7 * x)", True, True),
    ("tokenizer.py", ".strip().lower()", ".strip()", True, False),
    ("coop.py", "# still on the device", "# another comment", False, False),
    ("data.py", '"""Crops of one image', '"""Another docstring', False, False),
], ids=["train", "encode_crops", "train_crop", "read_image", "STD", "mislabel", "QuickGELU",
        "tokenizer", "comment", "docstring"])
def test_an_edit_of_the_program(command, world, tmp_path, monkeypatch, file, before, after, learns,
                                encodes):
    """What an edit can change is learned or encoded anew; a comment changes nothing."""
    learn = [*world.learn, "--shots", 1, "--cache", tmp_path / "cache"]
    command(*learn)
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    (tmp_path / "program").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "program")
    for name in ("coop", "clip_model", "data", "tokenizer"):
        monkeypatch.delitem(sys.modules, name)
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        if f"{name}.py" == file:
            assert text.count(before) == 1
            text = text.replace(before, after)
        (tmp_path / "program" / f"{name}.py").write_text(text, encoding="utf-8")
    screen, _ = command(*learn, main=importlib.import_module("coop").main)
    assert screen.count("done already") == (0 if learns else 2)
    new = [path.suffix for path in tmp_path.rglob("*.*") if path not in old]
    assert new.count(".json") == (2 if learns else 0)
    assert new.count(".npz") == (2 if encodes else 0)
    assert all(path.read_bytes() == content for path, content in old.items())


@pytest.fixture
def encoded(command, world, tmp_path, monkeypatch):
    """encoded(options) learns from two images per class -> how many crops were cut for it."""
    cut = mock.Mock(wraps=data.cut)
    monkeypatch.setattr(data, "cut", cut)

    def run(options="", folder=world.photos):
        cut.reset_mock()
        command(*world.learn, "--data", folder, "--shots", 2, "--cache", tmp_path / "cache",
                *options.split())
        return sum(len(call.args[1]) for call in cut.call_args_list)

    return run


def test_no_crop_is_encoded_twice(encoded):
    """Not for another M, position, csc, loss, noise or start, nor for another order of images."""
    crops = N_TEST + 5 * 2 * 3
    assert encoded() == crops
    assert encoded("--again") == 0
    assert encoded("--M 2 --position front middle --csc both") == 0
    assert encoded("--loss gce --noise 0.5 --init x") == 0
    assert encoded("--views 2") == 5 * 2 * 2
    assert encoded("--views 2 --epochs 5") == 0
    assert encoded("--classes base --shots 7 --seeds 1") == 3 * 7 * 3
    assert encoded("--classes base --shots 7 --seeds 2") == 0, "the same images in another order"
    assert encoded("--seeds 2") == 5 * 2 * 3, "other images"
    assert encoded("--precision bf16") == encoded("--again --no-cache") == crops


def test_only_crops_that_a_batch_uses_are_encoded(encoded, world):
    """Of 35 images each epoch leaves 3 out.  Features stand where train() looks for them."""
    assert encoded("--shots 7") == N_TEST + 32 * 3
    clip = clip_model.load(world.weights)
    items = data.load_dataset(world.photos).train
    random.Random(0).shuffle(items)
    features = coop.training_features(clip, items, 3, seed=1)
    used = features.isfinite().all(-1)
    for epoch, schedule in enumerate(coop.batches(35, 3, seed=1)):
        assert sorted(torch.cat(schedule).tolist()) == used[:, epoch].nonzero().flatten().tolist()
    for i, epoch in used.nonzero()[::7].tolist():
        x = data.normalize(torch.from_numpy(data.cut(items[i][0], [epoch], 32)))
        assert relative(features[i, epoch], clip.encode_image(x)[0]) < 1e-5


def test_a_replaced_image_is_another_image(encoded, world, tmp_path):
    """Of another time of change or another size: encoded and learned again."""
    photos = shutil.copytree(world.photos, tmp_path / "photos")
    encoded(folder=photos)
    image = photos / "test" / "grid" / "gri_0.png"
    os.utime(image, (1, 1))
    assert encoded(folder=photos) == N_TEST
    assert encoded(folder=photos) == 0
    Image.new("RGB", (50, 50)).save(image)
    assert encoded(folder=photos) == N_TEST
    assert len(results(tmp_path / "out")) == 3 * 2


def test_a_damaged_cache_file_is_rebuilt(command, world, tmp_path):
    """With a line for each file and without any change of the result."""
    learn = [*world.learn, "--shots", 1, "--cache", tmp_path / "cache", "--again"]
    command(*learn)
    (stem, V), = vectors(tmp_path / "out").items()
    files = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.npz")}
    doubles = io.BytesIO()
    np.savez(doubles, features=np.zeros((5, 32)))
    for damage in ("cut", "flipped", "other content"):
        for path, content in files.items():
            flipped = content[:300] + bytes([content[300] ^ 1]) + content[301:]
            path.write_bytes({"cut": content[:-200], "flipped": flipped}.get(
                damage, doubles.getvalue()))
        _, err = command(*learn)
        assert len(err.splitlines()) == err.count("is damaged (") == 2, (damage, err)
        assert torch.equal(vectors(tmp_path / "out")[stem], V)
        assert command(*learn)[1] == ""


# ---- A learned prompt ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(world):
    """A unified and a class-specific prompt."""
    files = []
    for csc in ("no", "yes"):
        out = world.root / csc
        learn = [*world.learn, "--shots", 2, "--M", 4, "--csc", csc, "--out", out, "--no-cache"]
        coop.main([str(word) for word in [*learn, "--device", "cpu"]])
        files += out.glob("*.pt")
    return files


def test_a_prompt_on_other_classes(command, world, prompts, tmp_path):
    """V goes before other names; contexts go where their names go, and nowhere else."""
    unified, specific = prompts
    cases = [(unified, ["brick", "grid", "tiled floor"], slice(None)),
             (specific, ["dotted", "grid", "zigzagged"], [1, 2, 4])]
    for prompt, names, rows in cases:
        folder = paint(tmp_path / names[0] / "test", names, [9, 9, 9], seed=5)
        screen, _ = command("--load", prompt, "--data", folder.parent)
        V = torch.load(prompt)["V"]
        accuracy = openai_accuracy(world, folder, names, V[rows])
        assert float(screen.split()[-2]) == pytest.approx(accuracy.expected, abs=0.005)
    assert openai_accuracy(world, folder, names, V[:3]) != accuracy.expected, "control"
    _, err = command("--load", specific, "--data", tmp_path / "brick", code=2)
    assert "none for 'brick'; only a prompt without --csc goes with other" in err


def test_a_prompt_finds_its_weights(command, world, tmp_path, monkeypatch):
    """Their full path is stored; weights that are missing are named, others are refused."""
    monkeypatch.chdir(world.root)
    command("--data", "photos", "--backbone", "clip.pt", "--shots", 1, "--epochs", 1)
    monkeypatch.chdir(tmp_path)
    prompt, = (tmp_path / "out").glob("*.pt")
    use = ["--load", prompt, "--predict", world.photos / "test" / "grid" / "gri_0.png"]
    command(*use)
    torch.save({**torch.load(prompt), "path": "/gone/clip.pt"}, prompt)
    assert "was learned with /gone/clip.pt, which is not there" in command(*use, code=2)[1]
    command(*use, "--backbone", world.weights)
    weights = torch.load(world.weights)
    torch.save({**weights, "ln_final.bias": weights["ln_final.bias"] + 1}, tmp_path / "other.pt")
    for other in (tmp_path / "other.pt", small_clip(tmp_path / "wider.pt", width=128)):
        _, err = command(*use, "--backbone", other, code=2)
        assert "was learned for other weights than" in err


def test_official_checkpoints(command, world, tmp_path):
    """V is state_dict.ctx; the optimizer and scheduler in the file are not built."""
    V = torch.randn(4, 64).half()
    file = tmp_path / "model.pth.tar-50"
    torch.save({**training_checkpoint({}), "state_dict": {"ctx": V}}, file)
    use = ["--load", file, "--backbone", world.weights]
    screen, _ = command(*use, "--data", world.photos)
    accuracy = openai_accuracy(world, world.photos / "test", CLASSES, V=V.float()).expected
    assert screen.splitlines()[-1] == f"{file}: {accuracy:.2f} %"
    assert command(*use, "--data", world.photos, "--position", "front")[0] != screen
    _, err = command(*use, "--predict", world.photos, code=2)
    assert "checkpoint of the official code and stores no class names" in err
    _, err = command("--load", file, "--words", 1, code=2)
    assert "does not store for which backbone" in err


def test_predict_and_export(command, world, prompts, tmp_path):
    """softmax(cosine / tau), on the screen, as JSON, and with numpy alone from --export's file.

    Broken files are named and do not stop the others.
    """
    folder = shutil.copytree(world.photos / "test", tmp_path / "images")
    (folder / "grid" / ".hidden.png").write_bytes(b"")
    (folder / "grid" / "notes.txt").write_text("no image")
    use = ["--load", prompts[0], "--predict", folder]
    screen, _ = command(*use, "--export", tmp_path / "prompt.npz")
    (folder / "0.png").write_bytes(b"broken")
    lines, err = command(*use, "--json", code=2)
    assert re.fullmatch(r"note: 1 other .*notes\.txt\nnote: cannot read .*0\.png.*\n"
                        r"error: 1 of 21 images .*\n", err)
    found = [json.loads(line) for line in lines.splitlines()]
    assert len(found) == N_TEST
    V = torch.load(prompts[0])["V"]
    cosines, _ = openai_cosines(world, world.photos / "test", CLASSES, V=V)
    probabilities = (torch.load(world.weights)["logit_scale"].exp() * cosines).softmax(-1)
    for image, line, row in zip(screen.splitlines(), found, probabilities.tolist()):
        expected = sorted(zip(row, CLASSES), reverse=True)
        assert [name for name, _ in line["classes"]] == [name for _, name in expected]
        values = [value for _, value in line["classes"]]
        assert values == pytest.approx([value for value, _ in expected], abs=2e-4)
        best = f"{line['image']}: {expected[0][1]} {100 * expected[0][0]:.1f} %, {expected[1][1]} "
        assert image.startswith(best)
    p = np.load(tmp_path / "prompt.npz")             # plain arrays: numpy refuses others
    f = coop.image_features(clip_model.load(world.weights), [(line["image"], [data.TEST])
                                                             for line in found])
    odds = np.exp(p["logit_scale"] * F.normalize(f, dim=-1).numpy() @ p["text_features"].T)
    assert np.allclose(odds / odds.sum(1, keepdims=True), probabilities, atol=1e-4)
    assert list(p["classnames"]) == CLASSES and p["resolution"] == 32
    assert np.allclose([p["mean"], p["std"]], [MEAN, STD])


def test_words_are_the_nearest_token_embeddings(command, world, prompts, tmp_path):
    """By Euclidean distance, computed one by one; of the newest prompt whose path begins so."""
    for i, name in enumerate(["run-1.pt", "run-3.pt", "run-2.pt", "other.pt", "run-4.json"]):
        shutil.copy(prompts[name == "run-2.pt"], tmp_path / name)
        os.utime(tmp_path / name, (i, i))
    screen, err = command("--load", tmp_path / "run", "--words", 2)
    assert f"prompt: {tmp_path / 'run-2.pt'} (the newest of 3)" in err
    embeddings = torch.load(world.weights)["token_embedding.weight"].double()
    V = torch.load(prompts[1])["V"].double().flatten(0, -2)
    rows = [line for line in screen.splitlines() if line not in CLASSES]
    assert len(rows) == len(V) == 5 * 4
    for row, vector in zip(rows, V):
        distances = [(vector - entry).norm().item() for entry in embeddings]
        found = re.findall(r"(\S+) ([\d.]+)(?:,|$)", row)
        assert len(found) == 2
        for i, (word, distance) in zip(np.argsort(distances), found):
            expected = Tokenizer().decode([i]).strip()
            assert word in (expected, repr(expected))
            assert float(distance) == pytest.approx(distances[i], abs=1e-4)


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(world, prompts):
    """What the command lines below name, by what is wrong with it."""
    root = world.root
    (root / "empty").mkdir()
    (root / "cut.pt").write_bytes(world.weights.read_bytes()[:5000])
    paint(root / "tested" / "test", CLASSES, [1] * 5)
    paint(root / "half" / "train", CLASSES, [1] * 5)
    paint(root / "half" / "test", CLASSES[:3], [1] * 3)
    shutil.copytree(root / "half", root / "broken")
    (root / "broken/test/grid/gri_0.png").write_bytes(b"version https://git-lfs.github...")
    (root / "broken/train/dotted/dot_0.png").write_bytes(b"")
    paint(root / "long" / "test", ["a", "b" * 80], [1, 1])
    return {"root": root, "prompt": prompts[0]}


LEARNING = {   # what is added to a command line that learns: the error
    "--shots -1": "--shots: '-1' is not a number of 0 or more",
    "--M 0": "--M, --epochs and --words are 1 or more",
    "--epochs 0": "--M, --epochs and --words are 1 or more",
    "--M 66": "'woven wool' is too long or M = 66 too large: 78 tokens .* reads 77",
    "--init a --M 4": "leave out --M",
    "--init ''": "M = 0: expected 1 to 77 vectors or words",
    "--noise nan": "--noise is a share between 0 and 1",
    "--template photo": "--template 'photo' needs {}",
    "--template '{{}} | photo'": "separates the templates of an ensemble",
    "--device tpu": "--device tpu cannot be used here",
    "--gelu exact": "open_clip_config.json says quick GELU",
    "--json": "--json goes with --predict alone",
    "--words 1": "need --load PROMPT",
    "--demo": "--demo brings its own --data",
    "--load {prompt}": "--epochs is for learning",
    "--out {prompt}/below": "Not a directory|cannot find the path|File exists",
    "--backbone RN51": "unknown backbone 'RN51': .* RN50, RN101",
    "--backbone {root}/cut.pt": "cut.pt is damaged or cut short",
    "--data {root}/nowhere": "nowhere is not a folder",
    "--data {root}/empty": "class folders with images: 0",
    "--data {root}/long --shots 0": "does not fit in 77: 'a photo of a b{80}",
    "--data {root}/tested": "no training images of the all classes: use --shots 0",
    "--data {root}/half --probe": "--probe needs validation images",
    "--data {root}/half --classes new": "no test images of the new classes",
    "--data {root}/broken": "2 of 8 images .*Git LFS.*grid.*; empty: .*dotted",
}
USING = {
    "": "one of --data, --demo and --load is needed",
    "--load {prompt}": "--load needs --data, --predict, --export or --words",
    "--load {root}/nowhere --words 1": "no prompt .*nowhere: expected",
    "--load {root}/clip.pt --words 1": "clip.pt is not a learned prompt",
    "--load {root}/cut.pt --words 1": "cut.pt is damaged or cut short",
    "--load {prompt} --words 1 --position front": "--position is for checkpoints of the official",
    "--load {prompt} --predict x.jpg": "1 of 1 images could not be read",
    "--load {prompt} --predict {root}/empty": "no images in .*empty",
    "--load {prompt} --export {prompt}": "would overwrite the prompt itself",
}


@pytest.mark.parametrize("line, error", [*LEARNING.items(), *USING.items()],
                         ids=[*LEARNING, *USING])
def test_a_mistake_is_one_line(command, world, places, tmp_path, line, error):
    """What was found and what was expected; exit code 2, no traceback, nothing in --out."""
    words = [word.format(**places) for word in shlex.split(line)]
    if (line, error) in LEARNING.items():
        words = [*world.learn, *words]
    _, err = command(*words, code=2)
    *notes, last = err.splitlines()
    assert last.startswith("error: ") and re.search(error, last), err
    assert all(note.startswith("note: ") for note in notes), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key, value", [
    ("V", torch.zeros(64)), ("V", torch.full((4, 64), math.nan)), ("V", [[0.0] * 64]),
    ("V", torch.zeros(3, 4, 64)), ("classnames", [1, 2, 3, 4, 5]), ("classnames", ["a"]),
    ("text_features", torch.zeros(5)), ("logit_scale", 1.0), ("resolution", None),
    ("path", None), ("settings", None), ("settings", {"position": "sideways"}),
])
def test_a_damaged_prompt_is_refused(command, prompts, tmp_path, key, value):
    """Whatever part of it is not as we write it, before anything is computed from it."""
    torch.save({**torch.load(prompts[0]), key: value}, tmp_path / "bad.pt")
    _, err = command("--load", tmp_path / "bad.pt", "--export", tmp_path / "x.npz", code=2)
    assert re.fullmatch("error: .*bad.pt is not a learned prompt, or a damaged one; .*\n", err)


# ---- What surrounds a run: kills, other processes, pipes, disks ----------------------------------


def python(code, *arguments, **options):
    """A process that runs code, with the project's modules at hand."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


DIE = """
import itertools, os, sys
from unittest import mock
import coop
steps = itertools.count(1)
last = int(sys.argv.pop(1))
def step(*_):
    if next(steps) == last:
        os._exit(9)                 # like a kill: nothing is cleaned up
    return mock.DEFAULT
coop.learning_rate = mock.Mock(wraps=coop.learning_rate, side_effect=step)
os.replace = mock.Mock(wraps=os.replace, side_effect=step)
coop.main()
"""


def test_a_killed_sweep_goes_on_where_it_was(command, world, tmp_path):
    """Killed in the midst of learning, or before a file gets its name, it repeats no finished run
    and ends as if undisturbed.
    """
    sweep = [*world.learn, "--shots", 1, 2, "--seeds", 1, 2, 3, "--csc", "both"]
    command(*sweep, "--out", tmp_path / "whole")
    sweep += ["--cache", tmp_path / "cache", "--out", tmp_path / "out", "--device", "cpu"]
    rng = random.Random(0)
    done = {}
    for last in (1, 2, rng.randrange(3, 20), rng.randrange(20, 40)):
        process = python(DIE, last, *sweep)
        _, err = process.communicate()
        assert process.returncode == 9, err
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
        assert done.items() <= files.items()
        done = files
    assert 0 < len(done) < 13
    command(*sweep)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    whole = results(tmp_path / "whole")
    resumed = results(tmp_path / "out")
    assert len(whole) == 13 and whole.keys() == resumed.keys()
    assert all(whole[stem]["per_class"] == resumed[stem]["per_class"] for stem in whole)
    V = vectors(tmp_path / "out")
    for stem, expected in vectors(tmp_path / "whole").items():
        assert torch.allclose(V[stem], expected, atol=1e-5)


def test_ctrl_c_is_one_line(command, world, tmp_path, monkeypatch):
    """And exit code 130; what was finished is kept."""
    train = mock.Mock(wraps=coop.train, side_effect=[mock.DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(coop, "train", train)
    _, err = command(*world.learn, "--shots", 1, "--seeds", 1, 2, 3, code=130)
    assert re.fullmatch(r"\nstopped; .* goes on from there\n", err)
    assert len(results(tmp_path / "out")) == 2 and len(vectors(tmp_path / "out")) == 1


SHARE = """
import sys
from unittest import mock
import coop
coop.CHUNK = 4
cut = coop.data.cut = mock.Mock(wraps=coop.data.cut)
train = coop.train = mock.Mock(wraps=coop.train)
coop.main()
sys.__stderr__.write(f"{cut.call_count} {train.call_count}")
"""


def two_processes(*arguments):
    """A command line as torchrun would start it -> (exit code, stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port,
                       "MASTER_ADDR": "127.0.0.1", "USE_LIBUV": "0"}
        processes.append(python(SHARE, *arguments, "--device", "cpu", env=environment))
    outputs = [process.communicate() for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_two_processes_share_the_work(command, world, tmp_path):
    """Each encodes and learns its part, one speaks; the results are those of a single process."""
    sweep = [*world.learn, "--shots", 1, 2, "--seeds", 1, 2]
    screen, _ = command(*sweep, "--out", tmp_path / "one")
    first, second = two_processes(*sweep, "--out", tmp_path / "two", "--cache", tmp_path / "cache")
    assert first[0] == second[0] == 0, (first, second)
    table = screen[screen.index("\naccuracy, %"):screen.index("\nto use")]
    assert table in first[1] and second[1] == ""
    cut, trained = zip(map(int, first[2].split()), map(int, second[2].split()))
    assert sum(cut) <= N_TEST + 2 * 5 + 2 * 10 and min(cut) > 15 and trained == (2, 2)
    one = results(tmp_path / "one")
    two = results(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[stem]["per_class"] == two[stem]["per_class"] for stem in one)


@pytest.mark.parametrize("mistake", ["--M 0", "--data nowhere"])
def test_a_mistake_in_two_processes_is_one_line(world, mistake):
    """Whether both could see it, or the first one alone while the other waits."""
    first, second = two_processes(*world.learn, *mistake.split())
    assert first[0] == second[0] == 2
    assert re.fullmatch("error: .*\n", first[2] + second[2])


def test_started_as_people_start_it(world, tmp_path):
    """In another folder; with names that the terminal cannot show; into a pipe that is closed
    early, or without any stdout.
    """
    paint(tmp_path / "写真" / "test", ["赤", "blå"], [2, 2])
    words = [sys.executable, HERE / "coop.py", "--data", tmp_path / "写真", "--backbone",
             world.weights, "--shots", "0", "--device", "cpu", "--no-cache"]
    silent = ["sh", "-c", 'exec "$@" >&-', "sh", *words] if os.name == "posix" else words
    processes = []
    for command in (words, words, silent):
        processes.append(subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "ascii"}))
    processes[1].stdout.close()
    screen = processes[0].stdout.read()
    assert [process.wait() for process in processes] == [0, 1, 0]
    assert [process.stderr.read() for process in processes] == [b"", b"", b""]
    assert b'zero-shot "a photo of a {}.": ' in screen
    result, = results(tmp_path / "runs").values()
    assert list(result["per_class"]) == ["blå", "赤"]


def test_disks_that_cannot_be_written(command, world, tmp_path, monkeypatch):
    """A cache that cannot be is a note, a full disk an error that leaves nothing half-written;
    without a home directory the cache has another default.
    """
    (tmp_path / "file").write_text("mine")
    learn = [*world.learn, "--shots", 1]
    _, err = command(*learn, "--cache", tmp_path / "file" / "below")
    assert re.fullmatch(r"note: image features are not kept on disk, .*\n", err)
    assert len(results(tmp_path / "out")) == 2
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError("No space left on device")))
    _, err = command(*learn, "--out", tmp_path / "new", code=2)
    assert re.fullmatch("error: .*No space left.*\n", err)
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(os.path, "expanduser", str)
    assert coop.make_parser().get_default("cache").is_absolute()


# ---- What is shown -------------------------------------------------------------------------------


def test_table():
    """Mean and standard deviation (n - 1) over seeds; the paper's row only where it compares."""
    def table(n_test=1692, **change):
        settings = dict(method="coop", dataset="dtd", backbone="RN50", shots=4, M=16, loss="ce",
                        position="end", epochs=100, weights=clip_model.MODELS["RN50"][0][:8])
        rows = []
        for seed, accuracy in ((1, 50.0), (2, 52.0), (3, 57.0)):
            rows.append({"settings": {**settings, "seed": seed, **change},
                         "accuracy": {"all": accuracy}, "n_test": {"all": n_test}})
        return coop.table(rows)

    assert re.search(r"\nCoOp M=16 end +53.00 ± 3.61\nthe paper's.* 53.49$", table())
    for other in (table(120), table(weights="01234567"), table(dataset="oxford_pets")):
        assert "53.00" in other and "paper" not in other


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch, terminal):
    """On a terminal one line, rewritten; elsewhere a plain line now and then."""
    monkeypatch.setattr(coop, "time", mock.Mock(time=mock.Mock(side_effect=itertools.count())))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("COLUMNS", "120")
    sys.stderr.isatty = mock.Mock(return_value=terminal)
    progress = coop.Progress("learning V", 400, "epochs")
    for _ in range(200):
        progress("loss 1", count=2)
    shown = sys.stderr.getvalue()
    half = " 50 % of 400 epochs, 2.0 per second, 0:01:40 left, loss 1"
    if terminal:
        lines = shown.split("\r")
        assert len(lines) == 201 and shown.count("\n") == 1 and shown.endswith("\n")
        assert lines[100].rstrip() == f"learning V [##########..........] {half}"
    else:
        assert 5 < shown.count("\n") <= 20 and "\r" not in shown
        assert f"learning V: {half}\n" in shown


def test_plot(command, world, tmp_path):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib: pip install matplotlib")
    screen, _ = command(*world.learn, "--shots", 1, 2, "--seeds", 1, 2, "--plot")
    for name in ("photos-accuracy.png", "photos-images.png"):
        assert f"plot: {tmp_path / 'out' / name}" in screen
        assert len(Image.open(tmp_path / "out" / name).convert("L").getcolors()) > 50


def test_help(command, monkeypatch, capsys):
    """Names every default.  Nothing but the program's name prints three examples."""
    screen = " ".join(command("--help")[0].split())
    for default in ("(16; with --demo 4)", "(1)", "(all)", "(16)", "(RN50;", "(quick,", "(end)",
                    "(no)", "(by shots: 50 for 1", "(0)", "(cuda where", "(fp16 on CUDA, else",
                    "(the dataset's)", "(ce)", "(runs)", "(~/.cache/coop)"):
        assert default in screen, default
    monkeypatch.setattr(sys, "argv", ["coop.py"])
    with pytest.raises(SystemExit):
        coop.main()
    assert capsys.readouterr().out.count("\n  python coop.py --") == 3


# ---- The official code ---------------------------------------------------------------------------
#
# Whoever has the code that the paper's authors published can hold this project against it: the same
# images, prompts, learning rates, steps.  Nothing of it is copied here.

OFFICIAL = """needs the official code, in any folder (and a torchvision that fits torch, for crops):
    git clone https://github.com/KaiyangZhou/CoOp && git -C CoOp checkout ff61507
    git clone https://github.com/KaiyangZhou/Dassl.pytorch && git -C Dassl.pytorch checkout c61a1b5
    export COOP_OFFICIAL=$PWD/CoOp DASSL_OFFICIAL=$PWD/Dassl.pytorch"""

OFFICIAL_NAMES = [
    *NAMES, "2012 Rolls-Royce Phantom", "707-320", "U.S.", "dr. no...", "'s", "rock'n'roll", "C++",
    "bird's-eye_", "__init__", "  two   spaces ", "T-Shirt/top", "100%", "a&amp;amp;b", "<b>", "?",
    "<|startoftext|>", "café", "cafÃ©", "cafe\u0301", "ＡＢ", "½", "ΟΔΟΣ", "кот", "猫", "🐱", "{}",
]


class OfficialConfig(types.SimpleNamespace):
    """In place of yacs' CfgNode: attributes, and as much of YAML as CoOp's files need."""

    def clone(self):
        return copy.deepcopy(self)

    def merge(self, name):
        """Take over the settings of one of CoOp's files."""
        folder = pathlib.Path(os.environ["COOP_OFFICIAL"], "configs", "trainers", "CoOp")
        sections = [self]                    # the outermost first
        for line in (folder / f"{name}.yaml").read_text(encoding="utf-8").split("\n"):
            key, _, value = line.partition(":")
            depth = key.count("  ")
            if value:
                setattr(sections[depth], key.strip(), ast.literal_eval(value.strip()))
            elif key:
                sections[depth + 1:] = [getattr(sections[depth], key.strip())]


class OfficialScheduler(torch.optim.lr_scheduler.LRScheduler):
    """In place of torch's, for Dassl's to inherit: takes a `verbose`, as it did in its time."""

    def __init__(self, optimizer, last_epoch=-1, verbose=False):
        super().__init__(optimizer, last_epoch)


@functools.cache
def import_official():
    """Import both checkouts -> .cfg, CoOp's for RN50 and one shot; .clip, a random one; .tokenizer

    In memory, while they are imported, these are replaced:
      - yacs and the base class of Dassl's schedulers, by the two classes above;
      - tqdm, by what shows no bar;
      - packages that CoOp does not use but Dassl imports, by mocks; torchvision only if none fits.
    And for good: the loading of CLIP, which gives the random one, in float64; its LayerNorm, which
    goes through fp32, by torch's (in openai_clip).
    """
    unused = ["gdown", "pandas", "scipy", "scipy.io", "sklearn", "sklearn.metrics", "tabulate",
              "torch.utils.tensorboard", "wilds"]
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):      # RuntimeError: built for another torch
        unused += ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    with pytest.MonkeyPatch.context() as patch:
        for name in unused:
            patch.setitem(sys.modules, name, mock.MagicMock())
        sys.modules["sklearn.metrics"].f1_score.return_value = 0     # printed beside the accuracy
        patch.setitem(sys.modules, "tqdm", mock.Mock(tqdm=iter))
        patch.setitem(sys.modules, "yacs", mock.Mock())
        patch.setitem(sys.modules, "yacs.config", mock.Mock(CfgNode=OfficialConfig))
        patch.setattr(torch.optim.lr_scheduler, "_LRScheduler", OfficialScheduler)
        patch.syspath_prepend(os.environ["DASSL_OFFICIAL"])
        patch.syspath_prepend(os.environ["COOP_OFFICIAL"])
        train = importlib.import_module("train")
        cfg = train.get_cfg_default()
        train.extend_cfg(cfg)
        clip = openai_clip(resolution=32, vocab_size=49408, width=64)
        source = type(clip).__init__.__code__.co_filename
        assert os.path.samefile(source, sys.modules["clip.model"].__file__)  # theirs, too
    train.trainers.coop.load_clip_to_cpu = mock.Mock(return_value=clip)
    train.trainers.zsclip.load_clip_to_cpu = mock.Mock(return_value=clip)
    for name in ("clip", "clip.clip", "clip.model", "clip.simple_tokenizer"):
        del sys.modules[name]                # the other tests want OpenAI's
    cfg.merge("rn50_ep50")
    cfg.USE_CUDA = False
    cfg.INPUT.SIZE = (32, 32)
    cfg.DATASET.NAME = "DescribableTextures"
    vocabulary = pathlib.Path(os.environ["COOP_OFFICIAL"], "clip", tokenizer_module.VOCABULARY)
    return types.SimpleNamespace(cfg=cfg, clip=clip, tokenizer=Tokenizer.openai(vocabulary))


@pytest.fixture
def official():
    """.cfg, .clip and .tokenizer; and `dassl`, `datasets`, `train` and `trainers` are imported."""
    if "COOP_OFFICIAL" not in os.environ or "DASSL_OFFICIAL" not in os.environ:
        pytest.skip(OFFICIAL)
    found = copy.copy(import_official())
    found.cfg = found.cfg.clone()
    return found


def official_trainer(name, cfg):
    """One of their trainers, for NAMES; without a dataset and its loaders."""
    build_trainer = importlib.import_module("dassl.engine").build_trainer
    cfg.TRAINER.NAME = name
    manager = mock.Mock()
    manager.dataset.classnames = NAMES
    with mock.patch("dassl.engine.trainer.DataManager", return_value=manager):
        return build_trainer(cfg)


def official_and_ours(official, position, csc):
    """Their CoOp trainer; our CLIP with its weights and our PromptLearner with its V (M = 4)."""
    torch.manual_seed(0)
    official.cfg.TRAINER.COOP.N_CTX = 4
    official.cfg.TRAINER.COOP.CSC = csc
    official.cfg.TRAINER.COOP.CLASS_TOKEN_POSITION = position
    trainer = official_trainer("CoOp", official.cfg)
    clip = ours(official.clip)
    learner = PromptLearner(clip, official.tokenizer, NAMES, 4, position, csc)
    learner.V.data.copy_(trainer.model.prompt_learner.ctx)
    return trainer, clip, learner


def official_items(items):
    return [(pathlib.Path(item.impath), item.label) for item in items]


def test_splits_and_few_shot_samples_are_the_official_ones(official, tmp_path, monkeypatch):
    """From class folders to the few images that a run learns from, for their DescribableTextures.

    Class folders of 4 to 36 images are split 50/20/30, rounded as theirs, and with their seed 1
    into the same images.  A split file, shuffled, gives the same samples, labels and class names
    for all, base and new classes; many classes have fewer images than shots.
    """
    official_dtd = importlib.import_module("datasets.dtd")
    set_random_seed = importlib.import_module("train").set_random_seed
    root = tmp_path / "dtd"
    lay_out(root, "; ".join(f"images/class {n:02} {n}" for n in range(4, 37)))
    names = functools.partial(official_dtd.listdir_nohidden, sort=True)      # not as the disk lists
    monkeypatch.setattr(official_dtd, "listdir_nohidden", names)
    set_random_seed(1)
    parts = official_dtd.DescribableTextures.read_and_split_data(str(root / "images"))
    dataset = data.load_dataset(root)
    ours = (dataset.train, dataset.val, dataset.test)
    assert ours == tuple(official_items(part) for part in parts)

    split = {}
    for part, items in zip(data.PARTS, parts):               # paths may be absolute
        split[part] = [(item.impath, item.label, item.classname) for item in items]
        random.Random(0).shuffle(split[part])
    (root / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    dataset = data.load_dataset(root)
    setup = coop.Setup(None, "RN50", None, dataset, None)
    official.cfg.DATASET.ROOT = str(tmp_path)
    for seed, shots, classes in itertools.product((1, 2, 3, 17), (1, 2, 4, 8, 16), coop.SPLITS):
        official.cfg.SEED = seed
        official.cfg.DATASET.NUM_SHOTS = shots
        official.cfg.DATASET.SUBSAMPLE_CLASSES = classes
        set_random_seed(seed)
        theirs = official_dtd.DescribableTextures(official.cfg)
        run = coop.Run("coop", "dtd", "RN50", shots=shots, seed=seed, classes=classes)
        train, val = setup.few_shot(run)
        assert train == official_items(theirs.train_x), (seed, shots, classes)
        assert val == official_items(theirs.val), (seed, shots, classes)
        assert setup.renumber(dataset.test, classes) == official_items(theirs.test)
        assert setup.classnames(classes) == theirs.classnames


def test_names_of_datasets_and_templates_are_the_official_ones(official):
    registry = importlib.import_module("dassl.data.datasets").DATASET_REGISTRY
    templates = importlib.import_module("trainers.zsclip").CUSTOM_TEMPLATES
    for file, (name, _, template) in data.KNOWN.items():
        official_name = file.removeprefix("split_zhou_").removesuffix(".json")
        assert registry.get(official_name).dataset_dir == name
        assert templates[official_name] == template


def test_test_crops_are_the_official_ones(official, tmp_path):
    """Crop and normalization, bit by bit, for images of many shapes and three modes."""
    module = importlib.import_module("dassl.data.transforms")
    if isinstance(module.transforms.Resize, mock.Mock):
        pytest.skip(OFFICIAL)
    read_image = importlib.import_module("dassl.utils").read_image
    rng = np.random.default_rng(0)
    file = tmp_path / "image.png"
    sizes = ((300, 200), (201, 300), (67, 64), (64, 71), (37, 53), (1, 1), (500, 11), (3, 150))
    for R, (width, height), mode in itertools.product((64, 224), sizes, ("RGB", "L", "P")):
        official.cfg.INPUT.SIZE = (R, R)
        transform = module.build_transform(official.cfg, is_train=False)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(file)
        crop = np.array(data.test_crop(data.read_image(file), R))
        x = data.normalize(torch.from_numpy(crop)[None])[0]
        assert torch.equal(x, transform(read_image(file))), (R, width, height, mode)


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_prompts_are_the_official_ones(official, position, csc):
    """Token by token, for names that a tokenizer could stumble over, and M that are even and odd.

    The embedding of token i is the number i, and V is the numbers that follow the vocabulary's: so
    what the official PromptLearner returns is the list of a prompt's tokens, padded with zeros.
    """
    OfficialLearner = importlib.import_module("trainers.coop").PromptLearner
    rng = random.Random(0)
    names = OFFICIAL_NAMES + ["".join(rng.choices("aZ_ -.'&;,3é猫", k=8)) for _ in range(60)]
    numbers = torch.arange(49408, dtype=torch.float64)[:, None]
    clip = mock.Mock(token_embedding=torch.nn.Embedding.from_pretrained(numbers), vocab_size=49408,
                     context_length=77, dtype=torch.float64)
    clip.ln_final.weight = torch.ones(1)
    clip.visual.input_resolution = 32
    official.cfg.TRAINER.COOP.CSC = csc
    official.cfg.TRAINER.COOP.CLASS_TOKEN_POSITION = position
    for M in (1, 3, 4, 16):
        official.cfg.TRAINER.COOP.N_CTX = M
        theirs = OfficialLearner(official.cfg, names, clip)
        learner = PromptLearner(clip, official.tokenizer, names, M, position, csc)
        V = 49408 + torch.arange(theirs.ctx.numel(), dtype=torch.float64)
        theirs.ctx.data = V.view_as(theirs.ctx)
        learner.V.data = V.view_as(learner.V)
        shared, own, lengths = learner()
        for name, rest, expected in zip(names, own.split(lengths.tolist()), theirs()):
            tokens = torch.cat([shared, rest])[:, 0]
            assert torch.equal(F.pad(tokens, (0, 77 - len(tokens))), expected[:, 0]), (name, M)


def test_V_starts_from_words_as_in_the_official_code(official):
    official.cfg.TRAINER.COOP.CTX_INIT = "a_photo of a"
    expected = official_trainer("CoOp", official.cfg).model.prompt_learner.ctx
    learner = PromptLearner(ours(official.clip), official.tokenizer, NAMES, init="a_photo of a")
    assert torch.equal(learner.V, expected)


def test_zero_shot_is_the_official_one(official):
    """One template, and their ensemble of seven and the dataset's own."""
    select = importlib.import_module("trainers.zsclip").IMAGENET_TEMPLATES_SELECT
    clip = ours(official.clip)
    own = "{} texture."
    for trainer, templates in (("ZeroshotCLIP", own), ("ZeroshotCLIP2", [*select, own])):
        expected = official_trainer(trainer, official.cfg).text_features
        g = coop.zero_shot(clip, official.tokenizer, templates, NAMES)
        assert relative(g, expected) < 1e-12


@pytest.mark.parametrize("file, shots", [("rn50_ep50", 1), ("rn50_ep100", 4), ("rn50", 16)])
def test_learning_rates_are_the_official_ones(official, file, shots):
    """Of every epoch, for the three numbers of epochs that the paper has."""
    optim = importlib.import_module("dassl.optim")
    official.cfg.merge(file)
    T = official.cfg.OPTIM.MAX_EPOCH
    optimizer = optim.build_optimizer([torch.nn.Parameter(torch.zeros(1))], official.cfg.OPTIM)
    scheduler = optim.build_lr_scheduler(optimizer, official.cfg.OPTIM)
    expected = []
    for _ in range(T):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = [coop.learning_rate(epoch, T) for epoch in range(coop.paper_epochs(shots, "dtd"))]
    assert rates == pytest.approx(expected, rel=0, abs=1e-16)


@pytest.mark.parametrize("N", [1, 31, 32, 33, 64, 70])
def test_batch_sizes_are_the_official_ones(official, N):
    build_data_loader = importlib.import_module("dassl.data.data_manager").build_data_loader
    official.cfg.DATALOADER.NUM_WORKERS = 0
    settings = official.cfg.DATALOADER.TRAIN_X
    loader = build_data_loader(official.cfg, settings.SAMPLER, range(N), settings.BATCH_SIZE)
    expected = [len(batch) for batch in loader.batch_sampler]
    assert [len(batch) for batch in coop.batches(N, 1, seed=1)[0]] == expected


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_V_is_that_of_the_official_training(official, position, csc, tmp_path, monkeypatch):
    """After 100 steps on the same images in the same batches, by Dassl's own loop.

    The difference is measured in V's largest move.  Small faults in the recipe must show in it.
    Text features with their gradient, accuracy by their evaluator, and their checkpoint, read by
    us, are compared on the way.
    """
    N = 70                                   # two batches of 32; the third is dropped
    crops = 3
    T = official.cfg.OPTIM.MAX_EPOCH
    schedule = coop.batches(N, T, seed=1)
    official.cfg.OUTPUT_DIR = str(tmp_path)
    trainer, clip, learner = official_and_ours(official, position, csc)
    model = trainer.model
    expected = model.text_encoder(model.prompt_learner(), model.tokenized_prompts)
    g = clip.encode_prompts(*learner())
    weights = torch.randn(g.shape, dtype=g.dtype)
    gradients = []
    for features, V in ((expected, model.prompt_learner.ctx), (g, learner.V)):
        gradients += torch.autograd.grad((features * weights).sum(), V)
    assert relative(g, expected) < 1e-12 and relative(*gradients) < 1e-12

    images = torch.randn(N, crops, 3, 32, 32, dtype=torch.float64)
    labels = torch.arange(N) % len(NAMES)
    features = clip.encode_image(images.flatten(0, 1)).unflatten(0, (N, crops))
    start = learner.V.detach().clone()

    def before_epoch():
        trainer.train_loader_x = []
        for batch in schedule[trainer.epoch]:
            x = images[batch, trainer.epoch % crops]
            trainer.train_loader_x.append({"img": x, "label": labels[batch]})

    trainer.before_epoch = before_epoch
    trainer.test_loader = [{"img": images[:, 0], "label": labels}]
    trainer.train()
    expected = model.prompt_learner.ctx.detach()

    def difference():
        learner.V.data.copy_(start)
        coop.train(clip, learner, features, labels, T, seed=1)
        return ((learner.V - expected).abs().max() / (expected - start).abs().max()).item()

    assert difference() < 1e-9
    g = clip.encode_prompts(*learner())
    assert coop.evaluate(features[:, 0], g, labels) == pytest.approx(trainer.test())
    checkpoint = tmp_path / "prompt_learner" / f"model.pth.tar-{T}"
    assert torch.equal(coop.load_prompt(checkpoint)["V"], expected.float())

    learning_rate = coop.learning_rate

    def late(epoch, T):
        return learning_rate(max(0, epoch - 1), T)

    faults = {"WEIGHT_DECAY": 0, "MOMENTUM": 0.89, "learning_rate": late}
    for name, fault in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(coop, name, fault)
            assert difference() > 1e-5, name


# ---- README, and each file on its own ------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def readme_code(words):
    """The one code block of README that contains these words."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found, = [block for block in blocks if words in block]
    return found


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's machine: small weights called RN50, folders of images, a small demo."""
    home = tmp_path / "home"
    here = tmp_path / "here"
    here.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(here)
    torch.manual_seed(0)
    weights = home / ".cache" / "clip" / "RN50.pt"
    weights.parent.mkdir(parents=True)
    visual = clip_model.VisionTransformer(32, 32, 64, 1, 32)
    torch.save(CLIP(32, visual, 64, 1).state_dict(), weights)
    monkeypatch.setitem(clip_model.MODELS, "RN50", (clip_model.sha256(weights), 1))
    for folder in ("my_photos", "other_photos"):
        paint(here / folder, ["cat", "dog"], [6, 6])
    paint(here, ["more_photos"], [1])
    Image.new("RGB", (70, 60), (200, 30, 90)).save(here / "new.jpg")
    paint(here / "dtd" / "images", ["cat", "zebra"], [3, 3])
    split = re.sub(r"(cat|zeb)(ra)?/(\d).jpg", r"\1\2/\1_\3.png", SPLIT)
    (here / "dtd" / "split_zhou_DescribableTextures.json").write_text(split)

    draw_pairs = data.draw_pairs
    draw_dataset = data.draw_dataset
    pretrain = clip_model.pretrain
    monkeypatch.setattr(data, "draw_pairs", lambda count: draw_pairs(64))
    monkeypatch.setattr(clip_model, "pretrain", lambda clip, images, ids, steps, progress:
                        pretrain(clip, images, ids, 2, batch_size=4))
    monkeypatch.setattr(data, "draw_dataset", lambda root, counts, style:
                        draw_dataset(root, {part: 1 for part in counts}, style))
    monkeypatch.setattr(coop, "paper_epochs", lambda shots, dataset: 1)
    monkeypatch.setattr(coop, "search_C", lambda accuracy: 1.0)
    return here


def test_readme_commands(reader, capsys):
    """Every `python coop.py ...` of README runs as it stands there, one after the other."""
    without_output = re.sub(r"```\nCLIP .*?```", "", README, flags=re.DOTALL)
    commands = re.findall(r"python coop\.py (--[^`&#\n]+)", without_output)
    assert len(commands) > 10
    for command in commands:
        if importlib.util.find_spec("matplotlib") is None:
            command = command.replace("--plot", "")
        words = [os.path.expanduser(word) for word in shlex.split(command)]
        try:
            coop.main(words)
        except SystemExit as stop:
            assert stop.code == 0, (command, capsys.readouterr().err)
        assert capsys.readouterr().out, command
    datasets = {path.name.split("-")[0] for path in (reader / "runs").glob("*.json")}
    assert datasets == {"demo", "dtd", "my_photos"}
    assert (reader / "prompt.npz").is_file()


def test_readme_example_in_your_own_code(reader, capsys):
    """README's lines run as they stand."""
    exec(readme_code("coop.training_features"), {})
    assert re.search(r"\d % correct", capsys.readouterr().out)


@pytest.mark.parametrize("file, words", [
    ("tokenizer.py", "from tokenizer import Tokenizer  "),
    ("clip_model.py", "torch.cosine_similarity"),
    ("data.py", "few_shot"),
])
def test_each_ground_floor_file_works_alone(reader, file, words):
    """Copied alone into an empty folder, each does what README's "Take just this file" shows."""
    alone = reader / "alone"
    alone.mkdir()
    shutil.copy(HERE / file, alone)
    shutil.copytree(reader / "my_photos", alone / "my_photos")
    weights = reader.parent / "home" / ".cache" / "clip" / "RN50.pt"
    code = readme_code(words).replace('"ViT-B/32"', repr(str(weights)))
    code = code.replace("224, 224", "32, 32")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=alone, check=True, env=environment)


def test_readme_names_what_is_there():
    """Options, tests and line counts that README and the docstrings mention are right."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.py")}
    options = set(re.findall(r'add\("(--[\w-]+)"', sources["coop.py"])) | {"--help"}
    foreign = {"--no-deps", "--nproc-per-node"}
    for name, text in {"README.md": README, **sources}.items():
        if name != "test_coop.py":
            mentioned = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
            assert mentioned <= options | foreign, name
        for test in re.findall(r"`?(test_\w+)`", text):
            assert f"def {test}(" in sources["test_coop.py"] or test == "test_coop", (name, test)
    for file, lines in re.findall(r"\| `(\w+\.py)` \| ([\d,]+) \|", README):
        counted = sources[file].count("\n")
        assert abs(int(lines.replace(",", "")) - counted) <= 0.05 * counted, (file, counted)


# ---- The demo ------------------------------------------------------------------------------------


def test_the_demo_tells_the_papers_story(tmp_path):
    """From one image per class CoOp finds the word that the hand-written prompt does not say.

    Mean of two seeds on 960 test images: far ahead of the plain prompt and ahead of the linear
    probe; with M = 1 the nearest word is always "negative".  A second run makes nothing anew.
    """
    command = [sys.executable, str(HERE / "coop.py"), "--demo", "--shots", "1", "--seeds", "1", "2",
               "--M", "1", "16", "--probe", "--device", "cpu",
               "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    accuracy = {}
    words = []
    for path in (tmp_path / "out").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        run = coop.Run(**result["settings"])
        assert result["n_test"] == {"all": 960}
        accuracy.setdefault(run.label, []).append(result["accuracy"]["all"])
        if run.M == 1:
            words.append(coop.load_prompt(path.with_suffix(".pt"))["V"])
    mean = {label: statistics.mean(values) for label, values in accuracy.items()}
    plain = mean['zero-shot "a photo of a {} texture."']
    assert mean["CoOp M=16 end"] > plain + 10, mean
    assert mean["CoOp M=16 end"] > mean["linear probe"] + 3, mean
    assert mean['zero-shot "a negative photo of a {} texture."'] > plain + 10, mean

    world, = (tmp_path / "cache").glob("demo-*")
    tokenizer = Tokenizer.from_file(world / "clip.merges.txt")
    embedding = torch.load(world / "clip.pt", weights_only=True)["token_embedding.weight"]
    assert len(words) == 2
    for V in words:
        nearest = (V - embedding).norm(dim=1).argmin()
        assert tokenizer.decode([nearest]) == "negative "
    made = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert made == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert again.stdout.count("done already") == 2 + 2 * 3
# ---- The benchmark: python test_coop.py [FOLDER OF PHOTOGRAPHS] ----------------------------------
#
# Ours and OpenAI's modules in turn, in one process per part; the ratio is the median over pairs.
# Each timed call follows an untimed one of its own, so that neither finds the memory and the caches
# as the other left them.  With random weights: speed does not depend on their values.

DTD = (
    "banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline "
    "dotted fibrous flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted "
    "lacelike lined marbled matted meshed paisley perforated pitted pleated polka-dotted porous "
    "potholed scaly smeared spiralled sprinkled stained stratified striped studded swirly veined "
    "waffled woven wrinkled zigzagged").split()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(call):
    """How long a call takes, including what it started on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(what, mine, other, pairs=5):
    """Time both in turn; report medians and the ratio other / mine."""
    ours_seconds = []
    other_seconds = []
    for _ in range(pairs):
        mine()
        ours_seconds.append(seconds(mine))
        other()
        other_seconds.append(seconds(other))
    ratios = [b / a for a, b in zip(ours_seconds, other_seconds)]
    report(what, ours=statistics.median(ours_seconds), other=statistics.median(other_seconds),
           ratio=statistics.median(ratios), least=min(ratios), most=max(ratios), pairs=pairs)


def report(what, **figures):
    """One row, as a line of JSON."""
    print(json.dumps({"what": what, **figures}), flush=True)


def row_of(what, **figures):
    """A row for people."""
    text = f"{what:58}"
    for name, value in figures.items():
        if isinstance(value, float):
            text += f"  {name} {value:.3f}" if value < 1 else f"  {name} {value:.2f}"
        else:
            text += f"  {name} {value}"
    return text


def full_size(name):
    """OpenAI's model in fp32 with random weights, and ours with the same."""
    e, resolution, vision_layers, vision_width, patch, width = SHAPES[name]
    theirs = openai_clip(e, resolution, vision_layers, vision_width, patch, 49408, width, 12,
                         double=False).to(DEVICE)
    for block in theirs.transformer.resblocks:
        block.attn_mask = block.attn_mask.to(DEVICE)
    return theirs, clip_model.prepare(ours(theirs))


def text_step(clip, V, text_features, image_features, labels):
    """Forward and backward pass of one training step, from V to its gradient."""
    f = F.normalize(image_features(), dim=-1)
    g = F.normalize(text_features(), dim=-1)
    V.grad = None
    F.cross_entropy(clip.logit_scale.exp() * f @ g.T, labels).backward()


def padded_features(theirs, V):
    """A function: text features of "V name ." on 47 x 77 columns, as the official code does it."""
    ids = Tokenizer.openai()(["X " * 16 + name + "." for name in DTD]).to(DEVICE)
    rows = theirs.token_embedding(ids)
    eot = ids.argmax(-1)

    def features():
        contexts = V if V.dim() == 3 else V.expand(len(DTD), -1, -1)
        x = torch.cat([rows[:, :1], contexts, rows[:, 17:]], dim=1)
        return plain_text_features(theirs, x, eot)

    return features


def benchmark_steps(backbone):
    """The text encoder's part of a step, then a whole step with its image pass of 32 crops."""
    theirs, clip = full_size(backbone)
    x = torch.randn(32, 3, clip.resolution, clip.resolution, device=DEVICE)
    labels = torch.arange(32, device=DEVICE)
    ready = torch.randn(32, clip.text_projection.shape[1], device=DEVICE)

    def image_features():
        return ready

    @torch.no_grad()
    def encode_images():
        return theirs.encode_image(x)

    for position, csc in VARIANTS:
        if backbone != "RN50" and (position, csc) != ("end", False):
            continue
        learner = PromptLearner(clip, Tokenizer.openai(), DTD, 16, position, csc)
        plain = padded_features(theirs, learner.V)

        def packed(learner=learner):
            return clip.encode_prompts(*learner())

        def mine(learner=learner, packed=packed):
            text_step(clip, learner.V, packed, image_features, labels)

        def other(learner=learner, plain=plain):
            text_step(theirs, learner.V, plain, image_features, labels)

        def whole(learner=learner, plain=plain):
            text_step(theirs, learner.V, plain, encode_images, labels)

        kind = "class-specific" if csc else "unified"
        name = f"{backbone}, 47 classes, M=16, {kind}, {position}"
        main_case = (position, csc) == ("end", False)
        compare(f"text step: {name}", mine, other, 7 if main_case else 3)
        if main_case:
            compare(f"whole step: {name}", mine, whole, 7)


def benchmark_floor():
    """The step beside the time of its matrix products at the rate of a 2048 x 2048 product."""
    visual = clip_model.VisionTransformer(32, 32, 64, 1, 1024)
    clip = CLIP(1024, visual, 512, 12).requires_grad_(False).to(DEVICE)
    clip_model.prepare(clip)
    learner = PromptLearner(clip, Tokenizer.openai(), DTD)
    labels = torch.arange(32, device=DEVICE)
    f = torch.randn(32, 1024, device=DEVICE)
    square = torch.randn(2048, 2048, device=DEVICE)
    tokens = len(learner.ids)
    K = len(DTD)
    d = 512
    # A layer: q, k, v and out d^2 each, the MLP 8 d^2.  In the last one k and v for all tokens, the
    # rest for the K rows at eot.
    products = 11 * tokens * 12 * d * d + tokens * 2 * d * d + K * 10 * d * d + K * d * 1024
    ratios = []
    for i in range(25):
        step = seconds(lambda: text_step(
            clip, learner.V, lambda: clip.encode_prompts(*learner()), lambda: f, labels))
        product = seconds(lambda: square @ square)
        if i >= 5:                                           # the first ones warm up
            ratios.append(step / (product * 2 * products / 2048 ** 3))      # forward, backward
    report("text step / floor of its matrix products", ratio=statistics.median(ratios),
           least=min(ratios), most=max(ratios), n=len(ratios))


def memory(what):
    """VmRSS or VmHWM of this process in GiB; Linux only."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 2 ** 20
    raise ValueError(what)


def benchmark_memory(K):
    """The peak of a training step above the loaded model."""
    visual = clip_model.ModifiedResNet(224, [3, 4, 6, 3], 64, 1024)
    clip = clip_model.prepare(CLIP(1024, visual, 512, 12).requires_grad_(False).eval())
    names = []
    for i in range(K):                                       # of two to four words
        words = [DTD[i // n % 47] for n in (1, 47, 2209, 103823)]
        names.append(" ".join(words[:2 + i % 3]))
    clip.encode_text(torch.ones(1, 77, dtype=torch.long))
    before = memory("VmRSS")
    learner = PromptLearner(clip, Tokenizer.openai(), names)
    N = 96 if K <= 1000 else 32
    coop.train(clip, learner, torch.randn(N, 1, 1024), torch.arange(N), 1)
    report(f"memory of a step: {K} classes, {len(learner.ids)} tokens",
           GiB_above_the_model=memory("VmHWM") - before, GiB_in_all=memory("VmHWM"))


def benchmark_images(name):
    """The image encoder as encode_crops runs it, against OpenAI's on one batch."""
    theirs, clip = full_size(name)
    low = clip_model.prepare(ours(theirs), torch.bfloat16)
    N = {"RN50": 32, "ViT-B/32": 32, "ViT-B/16": 32}.get(name, 4)
    size = coop.batch_size(clip)
    x = torch.randn(N, 3, clip.resolution, clip.resolution, device=DEVICE)
    parts = x.contiguous(memory_format=torch.channels_last).split(size)
    with torch.inference_mode():
        for kind, model in (("fp32", clip), ("bf16", low)):
            compare(f"image encoder: {name}, {N} images, {kind}",
                    lambda model=model: [model.encode_image(part) for part in parts],
                    lambda: theirs.encode_image(x), 5 if N == 32 else 3)


def job_folder(root, photographs):
    """47 classes of 4 training and 36 test images: DTD's size for 4 shots, from any photographs."""
    paths = sorted(pathlib.Path(photographs).rglob("*.jpg"))
    number = 0
    for name in DTD:
        for part, count in (("train", 4), ("test", 36)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                shutil.copy(paths[number % len(paths)], root / part / name / f"{i:02}.jpg")
                number += 1


def benchmark_job(photographs):
    """The whole job from start to end: 4 shots, 100 epochs, 1,692 test images, random RN50.

    Ours is run as a user runs it.  Theirs is the official recipe with OpenAI's modules: of 500
    steps 10 are run and of 17 test batches of 100 images 2, decoding included, and multiplied.
    """
    theirs, clip = full_size("RN50")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        job_folder(folder / "dtd47", photographs)
        torch.save(theirs.state_dict(), folder / "rn50.pt")
        command = [sys.executable, str(HERE / "coop.py"), "--data", str(folder / "dtd47"),
                   "--backbone", str(folder / "rn50.pt"), "--gelu", "quick", "--shots", "4",
                   "--cache", str(folder / "cache"), "--out", str(folder / "out")]
        times = {}
        for name, options in (("", []), (", a further variant (--M 8)", ["--M", "8"]),
                              (", --precision bf16 --views 10",
                               ["--precision", "bf16", "--views", "10"])):
            times[name] = seconds(lambda options=options: subprocess.run(
                command + options, check=True, capture_output=True))
        dataset = data.load_dataset(folder / "dtd47")
        other = official_job(theirs, dataset)
    for name, own in times.items():
        report(f"whole job{name}", ours=own, extrapolated_other=other, ratio=other / own)


def official_job(theirs, dataset):
    """Seconds of the official recipe with OpenAI's modules, extrapolated from a part of it."""
    V = torch.nn.Parameter(0.02 * torch.randn(16, 512, device=DEVICE))
    plain = padded_features(theirs, V)
    optimizer = torch.optim.SGD([V], lr=0.002, momentum=0.9, weight_decay=5e-4)

    def pixels(items, number):
        jobs = [(path, [number]) for path, _ in items]
        crops = [crop for _, _, crop in data.crops(jobs, 224)]
        return data.normalize(torch.from_numpy(np.stack(crops)).to(DEVICE))

    def step():
        batch = random.sample(dataset.train, 32)
        labels = torch.tensor([label for _, label in batch], device=DEVICE)
        with torch.no_grad():
            f = F.normalize(theirs.encode_image(pixels(batch, 0)), dim=-1)
        logits = theirs.logit_scale.exp() * f @ F.normalize(plain(), dim=-1).T
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    @torch.no_grad()
    def test_batch():                        # the official code encodes all prompts for each batch
        f = theirs.encode_image(pixels(dataset.test[:100], data.TEST))
        return F.normalize(f, dim=-1) @ F.normalize(plain(), dim=-1).T

    step()
    return 500 * seconds(lambda: [step() for _ in range(10)]) / 10 + 17 * seconds(
        lambda: [test_batch() for _ in range(2)]) / 2


def benchmark(photographs=None, part=None):
    """All parts, each in a process of its own as a run of coop.py is; or the part named, here."""
    parts = {
        "steps RN50": lambda: benchmark_steps("RN50"),
        "steps ViT-B/16": lambda: benchmark_steps("ViT-B/16"),
        "floor": benchmark_floor,
        "memory 1000": lambda: benchmark_memory(1000),
        "memory 20000": lambda: benchmark_memory(20000),
    }
    if photographs:
        parts["job"] = lambda: benchmark_job(photographs)
    for name in SHAPES:
        parts[f"images {name}"] = lambda name=name: benchmark_images(name)
    if part:
        torch.backends.cuda.matmul.allow_tf32 = True
        return parts[part]()
    print(f"{DEVICE}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python "
          f"{platform.python_version()}, torch {torch.__version__}; seconds, ratio = other / ours, "
          "medians over pairs\n", flush=True)
    lines = []
    for name in parts:
        command = [sys.executable, __file__, photographs or "", name]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for line in printed.splitlines():
            print(row_of(**json.loads(line)), flush=True)
            lines.append(line)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    benchmark(*sys.argv[1:])
