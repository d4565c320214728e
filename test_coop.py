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
import copy
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
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
import tempfile
import time
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import clip_model
import coop
import data
import tokenizer as tokenizer_module
from clip_model import CLIP
from coop import PromptLearner
from tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent
CLIP_ANYTORCH = importlib.util.find_spec("clip")
NAMES = ["banded", "polka-dotted", "cobwebbed", "a_long name, with 3 digits: 224", "grid"]


def openai(module):
    """OpenAI's clip/model.py or clip/simple_tokenizer.py, out of the package clip-anytorch."""
    if CLIP_ANYTORCH is None:
        pytest.skip("needs OpenAI's code: pip install --no-deps clip-anytorch==2.6.0")
    path = pathlib.Path(CLIP_ANYTORCH.origin).with_name(f"{module}.py")
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


def test_tokenizer_equals_openais():
    """The same ids as simple_tokenizer.py for 3,000 varied strings, and the same text back."""
    theirs = openai("simple_tokenizer").SimpleTokenizer()
    tokenizer = Tokenizer.openai()
    words = """cat's they'LL don’t “quoted” &amp;amp; &lt;b&gt; 3.14159 Ünïcödé ﬁne ÃƒÂ© ß a_b
        İstanbul </w> <|endoftext|> <|startoftext|> 👩‍🚀 ... :-) ١٢٣""".split()
    rng = random.Random(0)
    for _ in range(3000):
        pieces = []
        for _ in range(rng.randint(0, 8)):
            last = rng.choice((0x80, 0x700, 0xD800))
            characters = [chr(rng.randrange(last)) for _ in range(rng.randint(1, 9))]
            pieces.append(rng.choice([rng.choice(words), "".join(characters)]))
        text = rng.choice(["", " ", "  "]).join(pieces)
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), repr(text)
        ids += rng.sample(range(49408), 9)           # bytes that need not be UTF-8
        assert tokenizer.decode(ids) == theirs.decode(ids)


def test_byte_pair_encoding_by_hand(tmp_path):
    """learn_merges does what pencil and paper do; _ is the end of a word, spelled </w>:

        l o w_ (twice), l o w e r_, a a a a a_      l o: 3; a a: 3, overlapping -> l o, a a
        lo w_ (twice), lo w e r_, aa aa a_          lo w_: 2; others: 1         -> lo w_
        low_ (twice), lo w e r_, aa aa a_           all 1: the last in the alphabet -> w e, ...
    """
    merges = tokenizer_module.learn_merges(["Low low", "lower aaaaa"], limit=99)
    Tokenizer(merges).save(tmp_path / "merges.txt")
    assert (tmp_path / "merges.txt").read_text().split("\n") == [
        "l o", "a a", "lo w</w>", "w e", "we r</w>", "lo wer</w>", "aa aa", "aaaa a</w>"]
    tokenizer = Tokenizer.from_file(tmp_path / "merges.txt")
    assert tokenizer("low LOWER aaaaa", 6).tolist() == [[520, 514, 517, 519, 521, 0]]
    with pytest.raises(ValueError, match="5 tokens .* does not fit in 4: 'low LOWER"):
        tokenizer(["low", "low LOWER aaaaa"], 4)


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
    """Features of all nine architectures, inferred from shapes alone, are OpenAI's, to 1e-5."""
    e, resolution, layers, vision_width, patch, width = SHAPES[name]
    if name not in ("RN50", "ViT-B/32"):
        layers = 2 if patch else (1, 1, 2, 1)
    theirs = openai_clip(e, resolution, layers, vision_width, patch, width=width, double=False)
    clip = ours(theirs)
    assert clip.resolution == resolution
    x = torch.randn(2, 3, resolution, resolution)
    ids = Tokenizer()(["a photo of a cat", "grid " * 14])
    f = theirs.encode_image(x)
    g = theirs.encode_text(ids)
    for _ in ("as loaded", "prepared"):
        assert relative(clip.encode_image(x), f) < 1e-5 < relative(f[0], f[1])
        assert relative(clip.encode_text(ids), g) < 1e-5 < relative(g[0], g[1])
        clip_model.prepare(clip)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in clip.modules())
    logits = clip.logit_scale.exp() * F.cosine_similarity(f[:, None], g[None], dim=-1)
    loss = -(logits.softmax(0) * logits.softmax(1)).diag().log().mean() / 2
    assert relative(clip_model.contrastive_loss(f, g, clip.logit_scale), loss) < 1e-3


VARIANTS = list(itertools.product(coop.POSITIONS, (False, True)))


def prompt_features(model, tokenizer, V, names, position):
    """The textbook: features (K, e) of K x 77 token embeddings, built as in the official code.

    From the sentence "x x x x name." with M words x, whose embeddings V replaces; the tokens of
    the name, as many as it has alone, then move to their position.
    """
    M = V.shape[-2]
    before = {"end": M, "middle": M // 2, "front": 0}[position]
    names = [name.replace("_", " ") for name in names]
    ids = tokenizer(["x " * M + name + "." for name in names])
    rows = []
    for i, row in enumerate(model.token_embedding(ids)):             # (77, d)
        context = V[i] if V.dim() == 3 else V
        end = 1 + M + len(tokenizer.encode(names[i]))
        rows.append(torch.cat([row[:1], context[:before], row[1 + M:end],
                               context[before:], row[end:]]))
    return plain_text_features(model, torch.stack(rows), ids.argmax(-1))


def plain_text_features(model, prompts, eot):
    """K x 77 embeddings (K, 77, d) through all of OpenAI's text encoder, read at eot (K,)."""
    x = prompts + model.positional_embedding
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    return model.ln_final(x)[torch.arange(len(x)), eot] @ model.text_projection


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_packed_equals_plain(position, csc):
    """One packed sequence gives what K sentences of 77 columns give, in value and in V's gradient.

    To 1e-10 in float64, against OpenAI's encoder; in one group or several, stored or recomputed.
    """
    model = openai_clip(vocab_size=49408)
    clip = ours(model)
    tokenizer = Tokenizer.openai()
    names = [*NAMES, "U.S.", "what?", "hot_dog", "St. Bernard", "Ünïcödé 東京"]
    learner = PromptLearner(clip, tokenizer, names, 5, position, csc)
    learner.V.data.normal_()
    plain = prompt_features(model, tokenizer, learner.V, names, position)
    weight = torch.randn_like(plain)
    expected, = torch.autograd.grad((plain * weight).sum(), learner.V)
    assert expected.abs().min() > 0, "control: every number of V matters"
    clip.encode_group = mock.Mock(wraps=clip.encode_group)
    half = len(learner()[1]) // 2
    for group, recompute_above, calls in ((512, 2048, 1), (half, 0, 2 * 2), (1, 0, 2 * 10)):
        clip.GROUP = group
        clip.RECOMPUTE_ABOVE = recompute_above
        clip.encode_group.reset_mock()
        packed = clip.encode_prompts(*learner())
        gradient, = torch.autograd.grad((packed * weight).sum(), learner.V)
        assert relative(packed, plain) < 1e-10
        assert relative(gradient, expected) < 1e-10
        assert clip.encode_group.call_count == calls


# ---- Weight files and downloads ------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A small CLIP of OpenAI's with weights that bf16 holds exactly."""
    return openai_clip(vision_width=4, width=64, layers=1, double=False).bfloat16().float()


def saved(content, save=torch.save, **options):
    """The bytes of a file by torch.save, or by another function that saves."""
    buffer = io.BytesIO()
    save(content, buffer, **options)
    return buffer.getvalue()


def safetensors(sd):
    """The bytes of a safetensors file, by its specification, in three precisions."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    header = {"__metadata__": {"format": "pt"}}
    content = b""
    for i, (name, value) in enumerate(sd.items()):
        dtype = list(types)[i % 3] if value.is_floating_point() else "I64"
        value = value.to(types.get(dtype)).contiguous()
        header[name] = {"dtype": dtype, "shape": list(value.shape),
                        "data_offsets": [len(content), len(content) + value.nbytes]}
        content += value.reshape(-1).view(torch.uint8).numpy().tobytes()
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content


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


@pytest.fixture(scope="module")
def files(small):
    """{layout: the bytes of a weight file}, all of the same model."""
    sd = small.state_dict()
    half = copy.deepcopy(small)
    example = (torch.randn(1, 3, 64, 64), torch.randint(1, 500, (1, 77)))
    program = torch.jit.trace(half, example, check_trace=False)
    openai("model").convert_weights(half)            # in part; the program has the same tensors
    bare = {**sd, "context_length": torch.tensor(77)}                # as OpenAI's files have
    bare["text_projection"] = F.pad(sd["text_projection"], (1, 1))[:, 1:-1]      # a view
    return {
        "TorchScript": saved(program, torch.jit.save),       # as OpenAI ships its models
        "bare": saved(bare),
        "training checkpoint": saved(training_checkpoint(small.state_dict(keep_vars=True))),
        "safetensors": safetensors(sd),
    }


@pytest.mark.filterwarnings("ignore")                # TorchScript is deprecated
def test_every_layout_is_the_same_model(files, small, tmp_path):
    """Whatever the file, the weights are OpenAI's, in fp32 and frozen."""
    path = tmp_path / "weights"
    expected = small.state_dict()
    for layout, content in files.items():
        path.write_bytes(content)
        clip = clip_model.load(path)
        torch.testing.assert_close(clip.state_dict(), expected, rtol=0, atol=1e-7, msg=layout)
        assert not any(parameter.requires_grad for parameter in clip.parameters())


class Hostile:
    """Ends Python when Python's reader opens it."""

    def __reduce__(self):
        return sys.exit, ("code from a file ran",)


def test_unusable_weight_files(files, small, tmp_path):
    """One line names the file and says what it is.  No code from a file runs."""
    sd = small.state_dict()
    wide = {"visual.proj": torch.ones(1280, 32), "visual.conv1.weight": torch.ones(1280, 3, 2, 2)}
    unusable = {                                     # what the message says, and the bytes
        "open_clip_model.safetensors has them": saved({"visual.proj": torch.ones(3)}),
        "KeyError: 'text_projection'": saved({"text_model.token_embedding.weight": torch.eye(3)}),
        "width 1280": saved({**sd, **wide}),         # its heads are of 80, with the same names
        "KeyError: 'token_embedding.weight'": saved(ours(small)),
        "saved after prepare": saved(clip_model.prepare(ours(small)).state_dict()),
        "it begins b'.x80.x02.x8a": saved(sd, _use_new_zipfile_serialization=False),
        "it begins b'version https://git-lfs": b"version https://git-lfs.github.com/spec/v1\noid",
        "it begins b'.n<!DOCTYPE html>": b"\n<!DOCTYPE html><html>Please log in</html>",
        "it begins b''": b"",
        "BadZipFile: File is not a zip file": files["bare"][:-100],
        "Bad CRC": files["bare"].replace(sd["ln_final.weight"].numpy().tobytes(), bytes(256)),
        "NaN or infinity in ln_final.bias": saved({**sd, "ln_final.bias": torch.tensor(math.nan)}),
        "integers in ln_final.bias": saved({**sd, "ln_final.bias": torch.ones(64).int()}),
        "stranger": saved({**sd, "stranger": torch.ones(3)}),
        "visual.conv1.weight": saved({k: v for k, v in sd.items() if k != "visual.conv1.weight"}),
        "a multiple of element size": files["safetensors"][:-1],
        "no CLIP with OpenAI's tensor names": saved({"model": Hostile()}),
    }
    path = tmp_path / "bad.pt"
    for words, content in unusable.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            clip_model.load(path)
        assert str(path) in one_line(error)
    with pytest.raises(SystemExit, match="code from a file ran"):          # control
        torch.load(path, weights_only=False)


def test_which_gelu(files, small, tmp_path, capsys):
    """The config beside a file decides; without one, what is asked for, else quick and a note."""
    path = tmp_path / "open_clip_model.safetensors"
    path.write_bytes(files["safetensors"])
    assert clip_model.load(path).gelu == "quick"
    assert "QuickGELU and OpenAI's pixel constants are assumed" in capsys.readouterr().err
    clip = clip_model.load(path, gelu="exact")
    assert not capsys.readouterr().err
    small = copy.deepcopy(small)
    small.transformer.resblocks[0].mlp.gelu = torch.nn.GELU()
    ids = Tokenizer()(["a grid", "polka"])
    for _ in ("as loaded", "prepared"):
        assert relative(clip.encode_text(ids), small.encode_text(ids)) < 1e-5
        clip_model.prepare(clip)
    config = tmp_path / "open_clip_config.json"
    config.write_text('{"model_cfg": {}}')
    assert clip_model.load(path).gelu == "exact", "open_clip's default"
    for gelu in ("quick", "Exact"):
        with pytest.raises(ValueError, match="trained with exact GELU: leave out"):
            clip_model.load(path, gelu=gelu)
    for constant in ("mean", "std"):
        pixels = {constant: [0.5, 0.5, 0.5]}
        config.write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": pixels}))
        with pytest.raises(ValueError, match=f"open_clip_config.json.*{constant} of pixels .0.5"):
            clip_model.load(path)


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Where downloads belong, in an empty home, and the address of a server that never answers."""
    for name, value in (("HOME", tmp_path), ("USERPROFILE", tmp_path), ("no_proxy", "*")):
        monkeypatch.setenv(name, str(value))
    for module in (clip_model, tokenizer_module):
        monkeypatch.setattr(module, "TIMEOUT", 0.5)
    folder = tmp_path / ".cache" / "clip"
    folder.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield folder, f"http://127.0.0.1:{server.getsockname()[1]}/file"
    socket.setdefaulttimeout(None)


def test_weights_from_three_places(downloads, files, tmp_path, monkeypatch, capsys):
    """The first place with the right bytes is taken; if there is none, one line names them all.

    A damaged file is fetched again, a sound one is not.  OpenAI's files are QuickGELU.
    """
    folder, silent = downloads
    content = files["bare"]
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(clip_model.MODELS, "RN50", (digest, 244))
    monkeypatch.setattr(clip_model, "MIRRORS", [silent, "{hub}/{sha256}-{file}", "{hub}/{file}"])
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri() + "/")
    places = [tmp_path / f"{digest}-RN50.pt", tmp_path / "RN50.pt"]
    urls = [silent, places[0].as_uri(), places[1].as_uri()]
    file = folder / "RN50.pt"
    places[1].write_bytes(content[:-1])
    with pytest.raises(OSError, match="RN50 cannot be downloaded") as error:
        clip_model.load("RN50")
    assert f"{', '.join(urls)} and put it at {file}" in one_line(error)
    assert not os.listdir(folder)
    places[0].write_bytes(content)
    file.write_bytes(content[:-1])
    assert clip_model.load("RN50").sha256 == digest
    with pytest.raises(ValueError, match="trained with quick GELU"):
        clip_model.load("RN50", gelu="exact")
    asked = re.findall(r"downloading RN50 \(244 MiB\) to .* from (.*)", capsys.readouterr().err)
    assert asked == urls + urls[:2]


def test_names_and_addresses_are_openais(downloads):
    """The nine models' first addresses, which contain the checksums, are those of clip.py."""
    code = pathlib.Path(openai("model").__file__).with_name("clip.py").read_text(encoding="utf-8")
    theirs = dict(re.findall(r'"(\S+)": "(https://openaipublic\S+)"', code))
    with mock.patch("torch.hub.download_url_to_file") as download:
        for name in clip_model.MODELS:
            clip_model.fetch(name)
    addresses = [call.args[0] for call in download.call_args_list]
    assert dict(zip(clip_model.MODELS, addresses, strict=True)) == theirs


def test_vocabulary_is_found_or_downloaded(downloads, tmp_path, monkeypatch):
    """The cached file if it is sound, else a package's, else a download, else one line."""
    folder, silent = downloads
    packaged = tokenizer_module.find_vocabulary()        # the home is empty
    vocabulary = packaged.read_bytes()
    cached = folder / packaged.name
    for content, found in ((vocabulary, cached), (vocabulary[:-1], packaged)):
        cached.write_bytes(content)
        assert tokenizer_module.find_vocabulary() == found
    cached.unlink()
    monkeypatch.setattr(importlib.util, "find_spec", mock.Mock(return_value=None))
    page = tmp_path / "page"
    page.write_bytes(vocabulary[:-1])
    for url in (silent, page.as_uri()):
        monkeypatch.setattr(tokenizer_module, "URL", url)
        with pytest.raises(OSError, match=re.escape(f"put {url} at {cached}")) as error:
            Tokenizer.openai()
        assert one_line(error) and not os.listdir(folder)
    page.write_bytes(vocabulary)
    assert Tokenizer.openai().encode("a cat") == [320, 2368]


# ---- coop.py: the method -------------------------------------------------------------------------


@pytest.mark.parametrize("csc, shape, P", [(False, (60, 128), 61), (True, (2, 60, 128), 1)])
def test_where_V_starts(csc, shape, P):
    """From N(0, 0.02^2) or at given words; one V for all classes, which share it, or for each."""
    clip = ours(openai_clip(double=False))
    names = ["cat", "n" * 14]                        # and sot, 60 vectors, a period, eot: 77
    learner = PromptLearner(clip, Tokenizer(), names, M=60, csc=csc)
    assert learner.V.shape == shape and len(learner()[0]) == P
    assert learner.V.square().mean().item() == pytest.approx(0.02 ** 2, rel=0.1)
    with pytest.raises(ValueError, match="prompt of 78 tokens; this model reads 77"):
        clip.encode_prompts(torch.ones(8, 128), torch.ones(72, 128), [2, 70])
    with pytest.raises(ValueError, match="49408 ids and this CLIP 514"):
        PromptLearner(clip, Tokenizer.openai(), names)
    learner = PromptLearner(clip, Tokenizer(), names, csc=csc, init="hi_there")
    words = clip.token_embedding(torch.tensor(Tokenizer().encode("hi there")))
    assert torch.equal(learner.V, words.expand((2, 7, 128) if csc else (7, 128)))
    assert [name for name, _ in learner.named_parameters()] == ["V"]


def textbook(model, V, position, features, labels, seed, formula):
    """The paper's recipe on K x 77 tokens, OpenAI's encoder, SGD written out.  -> V"""
    V = V.detach().clone().requires_grad_()
    velocity = torch.zeros_like(V)
    rng = torch.Generator().manual_seed(seed)
    for epoch in range(10):
        rate = 1e-5
        if epoch > 0:
            rate = 0.5 * 0.002 * (1 + math.cos(math.pi * (epoch - 1) / 10))
        shuffled = torch.randperm(len(labels), generator=rng)
        for batch in (shuffled[:32], shuffled[32:64]):
            g = prompt_features(model, Tokenizer(), V, NAMES, position)
            f = features[batch, epoch % features.shape[1]]
            cosines = F.cosine_similarity(f[:, None], g[None], dim=-1)
            p = (model.logit_scale.exp() * cosines).softmax(1)
            loss = formula(p[range(32), labels[batch]], g).mean()
            gradient, = torch.autograd.grad(loss, V)
            with torch.no_grad():
                velocity = 0.9 * velocity + gradient + 5e-4 * V
                V -= rate * velocity
    return V.detach()


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_training_equals_the_textbook(position, csc):
    """20 steps end in the textbook's V to 1e-9 in float64, from the same start and batches.

    With each of the losses, as a function of p, the label's probability, and g.
    """
    model = openai_clip(layers=1)
    clip = ours(model)
    features = torch.randn(70, 4, 32).double()       # four crops for ten epochs
    labels = torch.randint(0, len(NAMES), (70,))
    templates = ["a photo of a {}.", "{}, {}!"]
    hand_written = 0
    for template in templates:
        texts = [template.replace("{}", name.replace("_", " ")) for name in NAMES]
        hand_written += F.normalize(model.encode_text(Tokenizer()(texts)), dim=1)

    def kgcoop(p, g):
        return -p.log() + 8 * (1 - F.cosine_similarity(g, hand_written)).mean()

    ensemble = coop.zero_shot(clip, Tokenizer(), templates, NAMES)
    learner = PromptLearner(clip, Tokenizer(), NAMES, 4, position, csc)
    start = learner.V.detach().clone()
    for loss, formula in ((coop.cross_entropy, lambda p, g: -p.log()),
                          (coop.generalized_cross_entropy, lambda p, g: 2 * (1 - p.sqrt())),
                          (coop.kgcoop(ensemble), kgcoop)):
        learner.V.data.copy_(start)
        coop.train(clip, learner, features, labels, 10, seed=3, loss=loss)
        V = textbook(model, start, position, features, labels, 3, formula)
        assert (learner.V - V).abs().max() < 1e-9
    V = textbook(model, start, position, features, labels, 4, formula)
    assert (learner.V - V).abs().max() > 1e-6, "control: other batches, another V"


def test_evaluate():
    """The percentage where the nearest by cosine, whatever the lengths, is the label."""
    f = torch.tensor([[1.0, 0.1], [0.2, 9.0], [5.0, 4.0], [-1.0, 0.0]])
    g = torch.tensor([[9.0, 0.0], [0.0, 0.1]])
    assert coop.evaluate(f, g, torch.tensor([0, 1, 0, 0])) == 75


def test_a_loss_that_is_no_number_ends_training():
    """In the epoch that it comes in; until then each epoch reports its mean loss."""
    clip = ours(openai_clip(layers=1))
    learner = PromptLearner(clip, Tokenizer(), NAMES, 2)
    features = torch.ones(64, 1, 32).double()
    loss = mock.Mock(side_effect=[learner.V.sum() * 0 + value for value in (1, 2, 3, math.inf)])
    progress = mock.Mock()
    with pytest.raises(ValueError, match="loss is NaN or infinite in epoch 1"):
        coop.train(clip, learner, features, features, 3, 1, loss, progress)
    progress.assert_called_once_with("loss 1.500")


# ---- coop.py: the linear probe -------------------------------------------------------------------


@pytest.mark.parametrize("classes", [[0, 1], [0, 1, 3, 4]], ids=["two", "four"])
@pytest.mark.parametrize("shots", [1, 8])
@pytest.mark.parametrize("C", [1e6, 1e3, 1, 1e-3, 1e-6])
def test_linear_probe_is_at_its_optimum(C, shots, classes):
    """At the lowest point of 1/2 |W|^2 + C * sum of losses the gradient is zero, by hand:

        W[k] = C * sum over images of (1[label is k] - p[k]) f     0 = sum of (1[label is k] - p[k])

    To 3e-3 of W on this small problem; on many features a large C may stop before.  Two classes
    have one vector, as in scikit-learn: the first one's weights are zero.  A class without training
    images, here 2 and 5, is never predicted.
    """
    torch.manual_seed(0)
    labels = torch.tensor(classes * shots)
    f = 10 * torch.randn(6) + torch.randn(6, 6)[labels] + 0.5 * torch.randn(len(labels), 6)
    val = (torch.cat([f, f[[0, 0, 0]]]), torch.cat([labels, torch.tensor([0, 2, 5])]))
    with mock.patch.object(coop, "search_C", return_value=C) as search_C:
        W, b, _ = coop.linear_probe((f, labels), val)
    logits = val[0].double() @ W.T + b
    accuracy, = search_C.call_args.args
    assert accuracy(C) == (logits.argmax(1) == val[1]).sum(), "C is chosen on validation images"
    assert logits.isfinite().all(0).nonzero().flatten().tolist() == classes

    def gradients(W):
        """Of the losses: for W, times -C, and for b."""
        error = F.one_hot(labels, 6) - (f.double() @ W.T + b).softmax(1)
        if len(classes) == 2:
            error[:, 0] = 0
        return C * error.T @ (f - f.mean(0)).double(), error.sum(0) / error.norm()

    of_W, of_b = gradients(W)
    assert relative(of_W, W) < 3e-3 and of_b.norm() < 3e-5
    of_W, _ = gradients(1.01 * W)
    assert relative(of_W, 1.01 * W) > 9e-3, "control"


@pytest.mark.parametrize("peak, expected", [(2.7, 2.703125), (0.99, 0.984375), (-9, -7), (9, 7)])
def test_search_C_by_pencil_and_paper(peak, expected):
    """It ends near the peak, as on paper; of equals at 1e6 and then at the lower end, 1e5."""
    C = coop.search_C(lambda C: -abs(math.log10(C) - peak))
    assert math.log10(C) == pytest.approx(expected, abs=1e-9)
    assert coop.search_C(lambda C: 50) == pytest.approx(1e5)


# ---- data.py: samples, images, crops -------------------------------------------------------------


def test_few_shot_is_the_official_sample():
    """Random(seed).sample of each class, in order of first appearance."""
    items = list(enumerate([2, 0] * 10 + [3] * 3 + [1] * 4))
    oracle = random.Random(7)
    expected = oracle.sample(items[0:20:2], 4)       # class 2
    expected += oracle.sample(items[1:20:2], 4)      # class 0
    expected += items[20:23]                         # class 3, which has fewer
    expected += oracle.sample(items[23:], 4)         # class 1, in another order
    assert data.few_shot(items, 4, random.Random(7)) == expected


def test_mislabel():
    """Exactly the share asked for is wrong; the same labels for one seed."""
    labels = [0, 1, 2, 3, 4] * 8
    noisy = data.mislabel(labels, 0.25, 5, seed=1)
    assert sum(a != b for a, b in zip(labels, noisy)) == 10
    assert set(noisy) == set(labels)
    assert noisy == data.mislabel(labels, 0.25, 5, seed=1)
    assert noisy != data.mislabel(labels, 0.25, 5, seed=2)


@pytest.mark.parametrize("mode, pixels, expected", [
    ("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)], [(255, 0, 0), (0, 0, 0)]),
    ("I;16", [0, 255, 9000, 40000, 65535], [(gray,) * 3 for gray in (0, 0, 35, 156, 255)]),
    ("RGBA", [(1, 2, 3, 255), (0, 0, 0, 128)], [(1, 2, 3), (127, 127, 127)]),
    ("P", [0, 1], [(1, 2, 3), (255, 255, 255)]),
    ("F", [0.5], None), ("I", [65536], None), ("I", [-1], None),
])
def test_any_image_becomes_rgb(mode, pixels, expected):
    """16 bits are scaled, not cut off at 255; transparency is laid over white.

    Pixels of unknown range, which would be silently black or white, are refused.
    """
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    if mode == "P":                                  # its second color is clear
        image.putpalette([1, 2, 3, 4, 5, 6])
        image.info["transparency"] = 1
    if expected is None:
        with pytest.raises(ValueError, match="with 8 or 16 bits"):
            data.to_rgb(image)
    else:
        rgb = data.to_rgb(image)
        assert [rgb.getpixel((i, 0)) for i in range(len(pixels))] == expected


def test_photographs_are_turned_upright(tmp_path):
    """What a phone stored sideways comes out as by Pillow's exif_transpose, in all eight cases."""
    image = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    for mark in range(1, 9):
        image.getexif()[274] = mark
        image.save(tmp_path / "x.png", exif=image.getexif())
        assert np.array_equal(data.read_image(tmp_path / "x.png"), ImageOps.exif_transpose(image))


MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.mark.parametrize("width, height, middle", [
    (300, 200, None), (53, 37, None), (37, 53, None), (1, 1, None),
    (1001, 1, (475, 0, 525, 1)), (1, 1001, (0, 475, 1, 525)),
])
def test_test_crop_is_the_official_one(width, height, middle):
    """torchvision's Resize, CenterCrop and Normalize, written out, with sides that are
    rounded and offsets of x.5 (37 x 53).  Of a strip only the middle, 50:1, is resized.
    """
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    crop = torch.from_numpy(np.array(data.test_crop(image, 64)))
    image = image.crop(middle)
    size = tuple(int(64 * side / min(image.size)) for side in image.size)
    left, top = [int(round((side - 64) / 2.0)) for side in size]
    pixels = np.asarray(image.resize(size, Image.BICUBIC))
    pixels = pixels[top:top + 64, left:left + 64]
    expected = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert np.allclose(data.normalize(crop[None])[0], expected, atol=1e-6)


def test_train_crop_is_a_random_resized_crop():
    """Area uniform in 8 to 100 %, shape log-uniform in 3:4 to 4:3, place uniform,
    mirrored half of the time.  Where nothing fits, as in a strip: the middle, 4:3 or 3:4.
    """
    image = mock.Mock(width=300, height=200)
    rng = mock.Mock()
    rng.uniform.side_effect = [1, 0, 0.16, math.log(3 / 2)]      # 245 x 245 is too high, 120 x 80
    rng.randint.side_effect = [7, 9]
    rng.random.return_value = 0.49
    data.train_crop(image, 32, rng)
    one_try = [mock.call.uniform(0.08, 1), mock.call.uniform(math.log(3 / 4), math.log(4 / 3))]
    place = [mock.call.randint(0, 180), mock.call.randint(0, 120)]
    assert rng.mock_calls == [*one_try, *one_try, *place, mock.call.random()]
    expected = mock.call.crop((7, 9, 127, 89)).resize((32, 32), Image.BICUBIC)
    assert image.mock_calls == expected.transpose(Image.FLIP_LEFT_RIGHT).call_list()
    for width, height, box in ((999, 9, (493, 0, 505, 9)), (9, 999, (0, 493, 9, 505))):
        strip = mock.Mock(width=width, height=height)
        rng = mock.Mock(**{"uniform.return_value": 0.5, "random.return_value": 0.5})
        data.train_crop(strip, 32, rng)
        assert rng.uniform.call_count == 20, "ten tries"
        assert strip.mock_calls == mock.call.crop(box).resize((32, 32), Image.BICUBIC).call_list()


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
    paths = sorted(paint(tmp_path / "here", "ab", [4, 4], (70, 90)).glob("*/*"))
    crops = list(data.crops([(path, [0, 1, data.TEST]) for path in paths], 32))
    asked = [(path, n) for path, n, _ in crops]
    assert asked == list(itertools.product(paths, [0, 1, data.TEST]))
    assert len({pixels.tobytes() for *_, pixels in crops}) == 24, "control"
    (tmp_path / "here").rename(tmp_path / "there")
    again = list(data.crops([(tmp_path / "there/b/b_2.png", [1])], 32))
    assert np.array_equal(again[0][2], crops[6 * 3 + 1][2])


def test_all_broken_images_are_named_at_once(tmp_path):
    """With what they are instead; but only if one of those that are needed is broken."""
    dataset = data.load_dataset(paint(tmp_path / "mine", ["cat", "dog"], [10, 10]))
    paths = [path for path, _ in dataset.train + dataset.val + dataset.test]
    contents = {
        "web pages": b"\n<!DOCTYPE html><html>not found</html>",
        "no format": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "LFS pointers": b"version https://git-lfs.github.com/spec/v1\n",
        "empty": b"",
        "32-bit float": saved(Image.new("F", (4, 4)), Image.Image.save, format="TIFF"),
        "cut short": paths[5].read_bytes()[:-2000],
        "cut short, too": paths[6].read_bytes()[:-2000],
    }
    for path, content in zip(paths, contents.values()):
        path.write_bytes(content)
    data.check_images(paths[5:], dataset)            # their headers are sound
    with pytest.raises(ValueError, match="5 of 20 images cannot be read") as error:
        data.check_images(paths[4:], dataset)
    for path, words in zip(paths[:5], contents):
        assert re.search(f"{words}[^;]*{path.name}", one_line(error))
    with pytest.raises(ValueError, match="image .* truncated .* 2 cannot be decoded") as error:
        list(data.crops([(path, [data.TEST]) for path in paths[5:]], 32))
    assert paths[5].name in one_line(error) and paths[6].name in one_line(error)
    with pytest.raises(ValueError, match="cannot read image .* cannot identify"):
        data.read_image(paths[1])                    # and not run, as PostScript is a program


# ---- data.py: files and folders ------------------------------------------------------------------


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    """If its writer or the disk fails, the old file stays and nothing lies beside it."""
    file = tmp_path / "new" / "folder" / "file"
    with data.atomic_write(file) as out:
        out.write(b"old")
    with pytest.raises(KeyError):
        with data.atomic_write(file) as out:
            out.write(b"half")
            raise KeyError
    for function in ("os.replace", "pathlib.Path.write_bytes"):
        with mock.patch(function, side_effect=OSError("No space left on device")):
            with pytest.raises(OSError, match="No space"):
                with data.atomic_write(file) as out:
                    out.write(b"new")
    assert file.read_bytes() == b"old" and list(file.parent.iterdir()) == [file]


def lay_out(root, layout):
    """Files in folders, from "train/* 3; a.csv; b.txt = what it says".  -> root

    "cat 3" is cat/0.jpg, cat/1.jpg and cat/2.jpg, "a.csv" a file (both are empty, as
    load_dataset reads names only); * is first cat, then dog.
    """
    for entry in layout.split("; "):
        for name in ["cat", "dog"] if "*" in entry else [""]:
            path, _, text = entry.replace("*", name).partition(" = ")
            files = [path]
            folder, _, count = path.rpartition(" ")
            if count.isdigit():
                files = [f"{folder}/{i}.jpg" for i in range(int(count))]
            for file in files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_text(text, "utf-8")
    return root


SPLIT = """{
    "train": [["cat/0.jpg", 1, "cat"], ["zebra/0.jpg", 0, "grevy zebra"], ["cat/1.jpg", 1, "cat"]],
    "val":   [["cat/2.jpg", 1, "cat"], ["zebra/2.jpg", 0, "grevy zebra"]],
    "test":  [["zebra/1.jpg", 0, "grevy zebra"]]
}"""
MINE = "images/cat 3; images/zebra 3; split_zhou_Mine.json = " + SPLIT
LISTS = ("variants.txt = grevy zebra\ncat; images_variant_test.txt = zebra/1 grevy zebra"
         "; images_variant_train.txt = cat/0 cat\nzebra/0 grevy zebra\ncat/1 cat"
         "; images_variant_val.txt = cat/2 cat\nzebra/2 grevy zebra")


@pytest.mark.parametrize("file, name, folder, template", [
    ("DescribableTextures", "dtd", "images", "{} texture."),
    ("Caltech101", "caltech-101", "101_ObjectCategories", "a photo of a {}."),
    ("EuroSAT", "eurosat", "2750", "a centered satellite photo of {}."),
    ("OxfordFlowers", "oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    ("OxfordPets", "oxford_pets", "images", "a photo of a {}, a type of pet."),
    ("Food101", "food-101", "images", "a photo of {}, a type of food."),
    ("StanfordCars", "stanford_cars", ".", "a photo of a {}."),
    ("SUN397", "sun397", "SUN397", "a photo of a {}."),
    ("UCF101", "ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
    ("Mine", "folder", "images", "a photo of a {}."),
    (None, "fgvc_aircraft", "images", "a photo of a {}, a type of aircraft."),
])
def test_split_files(tmp_path, file, name, folder, template):
    """Folder and prompt of the official code; the order is that of the file, or of the lists."""
    root = lay_out(tmp_path / "folder", f"{folder}/cat 3; {folder}/zebra 3; {LISTS}")
    if file:
        lay_out(root, f"labels/train1.txt; split_zhou_{file}.json = \ufeff{SPLIT}")
    cat = root / folder / "cat"
    zebra = root / folder / "zebra"
    assert data.load_dataset(root) == data.Dataset(
        name, ["grevy zebra", "cat"],
        [(cat / "0.jpg", 1), (zebra / "0.jpg", 0), (cat / "1.jpg", 1)],
        [(cat / "2.jpg", 1), (zebra / "2.jpg", 0)],
        [(zebra / "1.jpg", 0)],
        template, root, ["classes without test images: cat"])


def test_class_folders_are_split_50_20_30(tmp_path):
    """Random(1).shuffle of each sorted class; 0.5 n and 0.2 n, halves rounded to even."""
    dataset = data.load_dataset(lay_out(tmp_path, "cat 5; dog 7"))
    cats = [(tmp_path / "cat" / f"{i}.jpg", 0) for i in range(5)]
    dogs = [(tmp_path / "dog" / f"{i}.jpg", 1) for i in range(7)]
    rng = random.Random(1)
    rng.shuffle(cats)
    rng.shuffle(dogs)
    assert dataset.train == cats[:2] + dogs[:4]
    assert dataset.val == cats[2:3] + dogs[4:5]
    assert dataset.test == cats[3:] + dogs[5:]


LIST = "; classnames.txt = \ufeffn01484850 white shark\nn01440764 tench\nn02012849 crane"
FOLDERS = [   # layout, classes, images for train, val and test, notes
    ("TrainingSet/* 3; VALID/* 2; Test Data/* 4", "cat, dog", [6, 4, 8], "^$"),
    ("train/* 3; valid/* 2", "cat, dog", [6, 0, 4], "of valid/ are for testing"),
    ("test/* 4", "cat, dog", [0, 0, 8], "^$"),
    ("images/train/* 3; images/test/* 4", "cat, dog", [6, 0, 8], "^$"),
    ("images/* 4; masks/* 4", "cat, dog", [4, 2, 2], "not used: masks"),
    ("bus 2; car 3; train 4", "bus, car, train", [4, 2, 3], "^$"),
    ("train/* 3; train/fox 3; test/* 4; old/* 9; a.csv", "cat, dog, fox", [9, 0, 8],
     "a.csv is not used .*; not used: old; classes without test images: fox"),
    ("* 4; dog/a.pdf; dog/b.pdf; dog/7; dog/pups/small 3; a.png; owl/0.HEIC", "cat, dog", [4, 2, 2],
     "2 .pdf, .*; first: dog/7; .* 3; first: dog/pups/small/0.jpg; .* 1; first: a.png; .*: owl$"),
    ("cat 4; dog/.git 3; ._0.jpg; __MACOSX/* 3; dog/0.JPG; dog/1.JPG", "cat, dog", [3, 1, 2], "^$"),
    ("0 4; n01440764 4", "0, n01440764", [4, 2, 2], "2 class names have codes"),
    ("* 4; classnames.txt = cat\nfox", "cat, dog", [4, 2, 2], "^classnames.txt is not used"),
    ("train/n01484850 3; train/n01440764 3; val/n01484850 2" + LIST, "tench, white shark",
     [6, 0, 2], "classes without test images: tench"),
    ("x/0 1; x/2 2" + LIST, "white shark, crane", [0, 0, 3], "^$"),
    ("n01484850 4; n01440764 4" + LIST, "tench, white shark", [4, 2, 2], "^$"),
]


@pytest.mark.parametrize("layout, classes, counts, notes", FOLDERS)
def test_folders_as_people_have_them(tmp_path, monkeypatch, layout, classes, counts, notes):
    """Learned from, with a note of all that is passed over.  "." is a folder, too."""
    monkeypatch.chdir(lay_out(tmp_path, layout))
    dataset = data.load_dataset(".")
    parts = [dataset.train, dataset.val, dataset.test]
    assert ", ".join(dataset.classnames) == classes
    assert [len(part) for part in parts] == counts
    assert re.search(notes, "; ".join(dataset.notes)), dataset.notes
    assert dataset.name == tmp_path.name
    pairs = {(path.parent.name, label) for path, label in itertools.chain(*parts)}
    assert [label for _, label in sorted(pairs)] == list(range(len(pairs)))


def test_imagenet_has_a_thousand_classes(tmp_path):
    """Only then a folder with wnids is ImageNet, which is learned for fewer epochs."""
    names = [f"n{i:08} name {i}" for i in range(1000)]
    folders = [f"{part}/{name[:9]} 1" for part in ("train", "val") for name in names]
    lay_out(tmp_path, "; ".join([*folders, "classnames.txt = " + "\n".join(names)]))
    assert data.load_dataset(tmp_path).name == "imagenet"


@pytest.mark.parametrize("layout, error", [
    ("images/train 3; images/test 3", "test/, train/ with images directly inside"),
    ("cars_train 3; cars_test 3", "cars_test/, cars_train/ with images directly"),
    ("train/* 3; test 3", "test/ with images .*expected train/<class>/"),
    ("a/data/train/* 3; a/data/test/* 3", r"did you mean .*a.data\?"),
    ("cat 4", "class folders with images: 1, needed are at least 2"),
    ("* 4; owl 1", "'owl' has 1 image; it needs one for training"),
    ("hot_dog 4; Hot  Dog 4", "'Hot  Dog' and 'hot_dog' make the same prompt"),
    ("train/* 3; training/* 3; test/* 3", "training/: which one is train"),
    ("train/* 3", "no test/ .* so .*train alone would be split"),
    ("train/* 3; test/fox 3", "'fox', which is none of the 2 classes"),
    ("0.jpg; a.csv; dog/0.HEIC", "1 .HEIC.* 1; first: 0.jpg.*a.csv is not read"),
    ("n01440764 4; pug 4" + LIST, "classnames.txt has no name for pug"),
    ("train/n01440764 4" + LIST, "val is missing"),
    ("2750/* 4", "expected split_zhou_EuroSAT.json .*https://raw"),
    (MINE.replace("{", "<html>"), "Mine.json is not a split file .*expected {.train"),
    (MINE.replace('"val"', '"valid"'), "Mine.json is not a split file .*expected {.train"),
    (MINE.replace('1, "cat"', '2, "cat"'), "labels are not 0 .. K - 1"),
    (MINE.replace('0.jpg", 1, "cat"', '0.jpg", 1, "lion"'), "a label has two names"),
    (MINE.replace('"cat"', '"c\\u001b[2Jt"'), r"'c\\x1b\[2Jt'; expected printable"),
    (MINE.replace("cat/0.jpg", "../../outside.jpg"), "leads outside, .*outside.jpg"),
    (MINE.replace("cat/0.jpg", "/outside.jpg"), "leads outside, .*outside.jpg"),
    (MINE.replace("cat/0.jpg", "cat/9.jpg"), "1 images of the split are missing, .*9.jpg"),
    (MINE.replace('"test":', '"test": [], "more":'), "2 classes and 0 test images"),
    (MINE.replace('1, "cat"', '0, "grevy zebra"'), "1 classes and 1 test images"),
], ids=lambda text: text[:40])
def test_folders_that_are_no_dataset(tmp_path, layout, error):
    """Refused with what was found and what was expected."""
    with pytest.raises(ValueError, match=error):
        data.load_dataset(lay_out(tmp_path / "mine", layout))


def test_dtd_is_fetched_completely_or_not_at_all(tmp_path, monkeypatch):
    """Gone or cut off: an OSError with the address, and nothing under a final name."""
    root = tmp_path / "dtd"
    theirs = tmp_path / "theirs"
    lay_out(theirs / "dtd", "images/cat 3; images/zebra 3; labels/train1.txt")
    archive = pathlib.Path(shutil.make_archive(theirs, "gztar", theirs, "dtd"))
    (tmp_path / "dtd-r1.0.1.tar.gz").touch()         # of an earlier try
    for name, content in (("DTD", archive.read_bytes()), ("DTD_SPLIT", SPLIT.encode())):
        page = tmp_path / name
        monkeypatch.setattr(data, name, (page.as_uri(), hashlib.sha256(content).hexdigest()))
        for half in (False, True):
            if half:
                page.write_bytes(content[:-1])
            with pytest.raises(OSError, match=f"download file:.*/{name} .* put it"):
                data.load_dataset(root)
            assert root.exists() == (name == "DTD_SPLIT")
            assert not list(root.glob("*.json"))
        page.write_bytes(content)
    data.load_dataset(root)
    shutil.rmtree(root)
    (tmp_path / "DTD").unlink()                      # the archive is kept
    assert data.load_dataset(root).classnames == ["grevy zebra", "cat"]


# ---- data.py: the demo's world -------------------------------------------------------------------


def test_a_drawn_dataset(tmp_path):
    """The purest pixel of each image has the hue of its folder.  A folder is complete or absent."""
    data.draw_dataset(tmp_path / "demo", {"train": 1, "test": 2}, data.Style((1, 1), (0, 0)))
    dataset = data.load_dataset(tmp_path / "demo")
    assert len(dataset.train) == 48 and len(dataset.test) == 96
    for path, label in dataset.train + dataset.test:
        h, saturation, _ = np.asarray(Image.open(path).convert("HSV"), int).reshape(-1, 3).T
        hue = data.HUES[dataset.classnames[label].split()[0]]
        assert abs((h[saturation.argmax()] / 255 * 360 - hue + 180) % 360 - 180) < 12
    with mock.patch.object(data, "draw", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            data.draw_dataset(tmp_path / "other", {"test": 2})
    assert os.listdir(tmp_path) == ["demo"]


# ---- The command line: from a folder to a prompt -------------------------------------------------

CLASSES = ["banded", "dotted", "grid", "woven_wool", "zigzagged"]
PARTS = {"all": CLASSES, "base": CLASSES[:3], "new": CLASSES[3:]}
COUNTS = dict(zip(CLASSES, [2, 3, 4, 5, 6]))             # of test images, 20 in all


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of class folders, random weights, and the options that learn from them."""
    root = tmp_path_factory.mktemp("world")
    photos = root / "photos"
    paint(photos / "train", CLASSES, [7] * 5, (40, 60), seed=1)
    paint(photos / "val", CLASSES, [5] * 5, (40, 60), seed=2)
    paint(photos / "test", CLASSES, COUNTS.values(), seed=3)         # their own test crops
    paint(root / "long/test", ["a", "b" * 70], [1, 1])
    paint(root / "half/train", CLASSES, [1] * 5)
    paint(root / "half/test", CLASSES[:3], [1] * 3)
    (root / "half/test/grid/gri_0.png").write_bytes(b"broken")
    clip = openai_clip(resolution=32, vision_layers=1, vision_width=64, patch=16, width=64,
                       double=False)
    for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
        block.attn.in_proj_weight *= 3                   # so that images and classes differ
    weights = root / "clip.pt"
    torch.save(clip.state_dict(), weights)
    (root / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    learn = ["--data", photos, "--backbone", weights, "--epochs", 3, "--shots", 2]
    return types.SimpleNamespace(
        root=root, photos=photos, clip=clip, weights=weights, learn=learn)


@pytest.fixture
def command(world, tmp_path, capsys):
    """command("--data", folder, ...) runs the command line -> stdout, stderr."""
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


def openai_answers(world, folder, names, V=None, position="end", templates=()):
    """Cosines (N, K) of folder/<name>/*.png and prompts by OpenAI's class; accuracy."""
    g = 0
    for template in templates:
        texts = [template.format(name.replace("_", " ")) for name in names]
        g = g + F.normalize(world.clip.encode_text(Tokenizer()(texts)), dim=-1)
    if V is not None:
        g = prompt_features(world.clip, Tokenizer(), V, names, position)
    paths = [path for path in sorted(folder.glob("*/*.png")) if path.parent.name in names]
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    crops = np.stack([np.array(Image.open(path)) for path in paths])
    x = torch.from_numpy((crops / 255 - MEAN) / STD)
    f = F.normalize(world.clip.encode_image(x.permute(0, 3, 1, 2).float()), dim=-1)
    cosines = f @ F.normalize(g, dim=-1).T
    right = cosines.argmax(-1) == labels
    return cosines, 100 * right.double().mean().item()


OPTIONS = {   # the shape of V, the settings that they change, the parts that are tested
    "--seeds 5": ((16, 64), {"seed": 5}, ["all"]),
    "--classes base": ((16, 64), {"classes": "base"}, ["base", "new"]),
    "--classes base --csc": ((3, 16, 64), {"csc": True}, ["base"]),
    "--classes new": ((16, 64), {"classes": "new"}, ["new"]),
    "--position middle --M 3": ((3, 64), {"position": "middle", "M": 3}, ["all"]),
    "--init 'a_photo of a'": ((9, 64), {"init": "a_photo of a", "M": 9}, ["all"]),
    "--loss gce": ((16, 64), {"loss": "gce", "template": None}, ["all"]),
    "--init 'a_drawing or photos'": ((16, 64), {"M": 16}, ["all"]),
    "--loss kgcoop --template 'zz {}' '{} of the'": ((16, 64), {"loss": "kgcoop"}, ["all"]),
    "--noise 0.5": ((16, 64), {"noise": 0.5}, ["all"]),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_from_folder_to_prompt(command, world, tmp_path, options):
    """An option changes V, a seed its start; screen, JSON and prompt agree with OpenAI's code."""
    shape, changed, parts = OPTIONS[options]
    tests = world.photos / "test"
    out = tmp_path / "my results"
    command(*world.learn)
    screen, _ = command(*world.learn, *shlex.split(options), "--out", out)
    default, = vectors(tmp_path / "out").values()
    V, = vectors(out).values()
    assert V.shape == shape
    assert V.shape != default.shape or relative(V, default) > 1e-5
    if "seed" in changed:
        assert relative(V, default) > 1, "V starts elsewhere; training moves it by a hundredth"
    for stem, result in sorted(results(out).items(), reverse=True):  # zero-shot, then CoOp
        settings = result["settings"]
        accuracy = result["accuracy"]
        per_class = result["per_class"]
        prompts = {"V": V, "position": settings["position"]}
        if settings["method"] == "zero-shot":
            prompts = {"templates": settings["template"].split(" | ")}
        for part, n in result["n_test"].items():
            names = PARTS[part]
            assert n == sum(COUNTS[name] for name in names)
            right = sum(COUNTS[name] * per_class[name] for name in names)
            _, expected = openai_answers(world, tests, names, **prompts)
            assert accuracy[part] == pytest.approx(expected) == right / n
        last = list(accuracy.values())[-1]
        hardest = min(per_class, key=per_class.get)
        assert f"{last:.2f} %; hardest: {hardest} {per_class[hardest]:.0f} %" in screen
    assert settings.items() >= changed.items() and list(result["n_test"]) == parts
    if len(parts) == 2:
        base, new, harmonic = accuracy.values()
        assert harmonic == pytest.approx(2 * base * new / (base + new))
    prompt = torch.load(out / f"{stem}.pt", weights_only=True)
    names = PARTS[settings["classes"]]
    assert prompt["settings"] == settings and prompt["classnames"] == names
    train = data.load_dataset(world.photos).train
    sample = data.few_shot(train, 2, random.Random(settings["seed"]))
    assert result["training_images"] == [
        path.relative_to(world.photos).as_posix() for path, k in sample if CLASSES[k] in names]

    line = screen.splitlines()[-1].partition("python coop.py ")[2]
    words = shlex.split(line.replace("IMAGE_OR_FOLDER", tests.as_posix()))
    assert len(command(*words)[0].splitlines()) == 20
    screen, err = command(*words[:2], *world.learn[:2], "--classes", settings["classes"])
    assert "note: 60 images for training and validation are not tested" in err
    assert f": {accuracy[parts[-1]]:.2f} %; hardest: " in screen.splitlines()[-1]


def test_probe_learns_from_the_same_sample(command, world, monkeypatch):
    """And from four validation images per class, sampled with the same generator afterwards."""
    second = torch.tensor([0.0, 1, 0])                   # biases for one answer
    probe = mock.Mock(return_value=(torch.zeros(3, 32).double(), second, 1.0))
    monkeypatch.setattr(coop, "linear_probe", probe)
    learn = [*world.learn, "--shots", 7, "--seeds", 3, "--classes", "base"]
    assert "seed 3: base 33.33 %; " in command(*learn, "--probe")[0]
    dataset = data.load_dataset(world.photos)
    rng = random.Random(3)
    for found, items, shots in zip(probe.call_args.args, (dataset.train, dataset.val), (7, 4)):
        base = [item for item in data.few_shot(items, shots, rng) if item[1] < 3]
        jobs = [(path, [data.TEST]) for path, _ in base]
        f = coop.image_features(clip_model.load(world.weights), jobs)
        assert found[1].tolist() == [label for _, label in base]
        assert relative(found[0], f) < 1e-5


# ---- One run is one file, and no image is encoded twice ------------------------------------------

EDITS = {   # file, before, after, whether it is learned anew, whether it is encoded anew
    "train": ("coop.py", "MOMENTUM = 0.9", "MOMENTUM = 0.8", True, False),
    "encoding": ("coop.py", "f = clip.encode_image(x)", "f = 2 * clip.encode_image(x)", True, True),
    "crops": ("data.py", "rng.uniform(0.08, 1)", "rng.uniform(0.1, 1)", True, True),
    "constants": ("data.py", "0.26862954, 0.26130258", "0.26, 0.26130258", True, True),
    "model": ("clip_model.py", "F.silu(1.702 * x)", "F.silu(1.7 * x)", True, True),
    "tokenizer": ("tokenizer.py", ".strip().lower()", ".strip()", True, False),
    "loose": ("data.py", "TEST = -1", "TEST = -1\nMEAN[0] = 0.5", True, True),
    "import": ("coop.py", "import argparse", "import csv\nimport argparse", True, False),
    "docstring": ("data.py", '"""Crops of one image', '"""Another docstring', False, False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_program(command, world, tmp_path, monkeypatch, edit):
    """What an edit can change is learned or encoded anew; a docstring changes nothing."""
    file, before, after, learns, encodes = EDITS[edit]
    learn = [*world.learn, "--cache", tmp_path / "cache"]
    command(*learn)
    old = list(tmp_path.rglob("*.*"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("coop", "clip_model", "data", "tokenizer"):
        monkeypatch.delitem(sys.modules, name)
        shutil.copy(HERE / f"{name}.py", tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert text.count(before) == 1
    (tmp_path / file).write_text(text.replace(before, after), encoding="utf-8")
    screen, _ = command(*learn, main=importlib.import_module("coop").main)
    assert screen.count("  (done already)") == (0 if learns else 2)
    new = [path.suffix for path in tmp_path.rglob("*.*") if path not in old]
    assert new.count(".json") == (2 if learns else 0)
    assert new.count(".npz") == (2 if encodes else 0)


def test_another_split_is_another_run(world):
    """Though the images are the same, in the same order."""
    dataset = data.load_dataset(world.photos)
    merged = dataclasses.replace(dataset, train=dataset.train + dataset.val, val=[])
    setups = [coop.Setup(None, "RN50", None, split, None) for split in (dataset, merged)]
    assert setups[0].images_hash != setups[1].images_hash


def test_no_crop_is_encoded_twice(command, world, tmp_path, monkeypatch):
    """Not for another M, position, loss or order; a changed image or a damaged file is."""
    cut = mock.Mock(wraps=data.cut)
    monkeypatch.setattr(data, "cut", cut)
    photos = shutil.copytree(world.photos, tmp_path / "photos")
    learn = [*world.learn, "--data", photos, "--cache", tmp_path / "cache"]

    def encoded(options=""):
        cut.reset_mock()
        command(*learn, *options.split())
        return sum(len(call.args[1]) for call in cut.call_args_list)

    assert encoded() == 20 + 5 * 2 * 3
    assert encoded("--M 2 --position front middle --csc both --again") == 0
    assert encoded("--loss gce --noise 0.5 --init x") == 0
    assert encoded("--views 2 --epochs 5") == 5 * 2 * 2
    assert encoded("--classes base --shots 7 --seeds 1") == 3 * 7 * 3
    assert encoded("--classes base --shots 7 --seeds 2") == 0, "the same images in another order"
    image = photos / "test/grid/gri_0.png"
    for words in ("--precision bf16", "--again --no-cache", f"--again --cache {image}/below"):
        assert encoded(words) == 20 + 5 * 2 * 3
    done = len(results(tmp_path / "out"))
    os.utime(image, (1, 1))
    assert encoded() == 20
    assert len(results(tmp_path / "out")) == done + 2
    for path in (tmp_path / "cache").rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:-200])
    assert encoded("--again") == 20 + 5 * 2 * 3
    assert encoded("--again") == 0


def test_features_stand_where_training_looks_for_them(world):
    """Crop n of image i at [i, n], for the 32 of 35 images that epoch n uses."""
    clip = clip_model.load(world.weights)
    items = data.load_dataset(world.photos).train
    random.Random(0).shuffle(items)
    features = coop.training_features(clip, items, 3, seed=1)
    used = features.isfinite().all(-1)
    assert used.sum(0).tolist() == [32, 32, 32]
    for i, n in used.nonzero()[::7].tolist():
        x = data.normalize(torch.from_numpy(data.cut(items[i][0], [n], 32)))
        assert relative(features[i, n], clip.encode_image(x)[0]) < 1e-5


# ---- A learned prompt ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(world):
    """A unified and a class-specific prompt, and what becomes of them, by name."""
    for name, csc in (("unified", "no"), ("specific", "yes")):
        learn = [*world.learn, "--M", 4, "--csc", csc, "--device", "cpu", "--no-cache"]
        coop.main([str(word) for word in [*learn, "--out", world.root / name]])
        file, = (world.root / name).glob("*.pt")
        file.rename(world.root / f"{name}.pt")
    prompt = torch.load(world.root / "unified.pt")
    settings = {**prompt["settings"], "weights": "01234567"}
    official = {**training_checkpoint({}), "state_dict": {"ctx": prompt["V"].half()}}
    torch.save({**prompt, "path": "/gone/clip.pt"}, world.root / "gone.pt")
    torch.save({**prompt, "settings": settings}, world.root / "foreign.pt")
    torch.save({**prompt, "V": torch.randn(4, 64)}, world.root / "edited.pt")
    torch.save(official, world.root / "official.pt")
    torch.save({"state_dict": {"ctx": torch.ones(4, 32)}}, world.root / "narrow.pt")
    return world.root


@pytest.mark.parametrize("file, names, rows, position", [
    ("gone.pt", ["a", "grid", "woven wool"], [0, 1, 2, 3], "end"),
    ("specific.pt", ["dotted", "grid", "zigzagged"], [1, 2, 4], "end"),
    ("official.pt", CLASSES, [0, 1, 2, 3], "front"),
])
def test_other_classes(command, prompts, world, tmp_path, file, names, rows, position):
    """V goes before other names; contexts go where their names go, and nowhere else."""
    folder = paint(tmp_path / "test", names, [9] * 5, seed=7)
    use = ["--load", prompts / file, "--backbone", world.weights]
    screen, _ = command(*use, "--data", tmp_path, "--position", position)
    V = coop.load_prompt(prompts / file)["V"]
    _, expected = openai_answers(world, folder, names, V[rows], position)
    assert f"{file}: {expected:.2f} %; hardest: " in screen.splitlines()[-1]
    _, control = openai_answers(world, folder, names, V[:3], "end")
    assert control != expected


def test_a_prompt_is_all_that_is_learned(command, world, tmp_path, monkeypatch):
    """Whoever gives PromptLearner another parameter need not think of saving or loading it."""
    class Shifted(PromptLearner):
        def __init__(self, clip, *arguments):
            super().__init__(clip, *arguments)
            self.shift = torch.nn.Parameter(torch.randn(64))

        def forward(self):
            shared, own, lengths = super().forward()
            return shared, own + self.shift, lengths

    monkeypatch.setattr(coop, "PromptLearner", Shifted)
    command(*world.learn)
    stem, = vectors(tmp_path / "out")
    accuracy = results(tmp_path / "out")[stem]["accuracy"]["all"]
    screen, _ = command("--load", tmp_path / "out", *world.learn[:4])
    assert f": {accuracy:.2f} %; hardest" in screen.splitlines()[-1]


def test_predict_and_export(command, world, prompts, tmp_path):
    """softmax(cosine / tau) on the screen, as JSON, by numpy; despite broken files."""
    folder = shutil.copytree(world.photos / "test", tmp_path / "images")
    (folder / "grid/notes.txt").write_text("no image")
    use = ["--load", prompts / "unified.pt", "--predict", folder]
    screen, _ = command(*use, "--export", tmp_path / "prompt.npz")
    (folder / "0.png").write_bytes(b"broken")
    lines, err = command(*use, "--json", code=2)
    assert [line.split(":")[0] for line in err.splitlines()] == ["note", "note", "error"]
    found = [json.loads(line) for line in lines.splitlines()]
    assert len(found) == 20
    prompt = torch.load(prompts / "unified.pt")
    cosines, _ = openai_answers(world, world.photos / "test", CLASSES, prompt["V"])
    p = (world.clip.logit_scale.exp() * cosines).softmax(-1)
    for image, line, row in zip(screen.splitlines(), found, p.tolist()):
        expected = dict(zip(CLASSES, row))
        best, second, *_ = sorted(CLASSES, key=expected.get, reverse=True)
        share = f"{100 * expected[best]:.1f} %"
        assert image.startswith(f"{line['image']}: {best} {share}, {second} ")
        assert dict(line["classes"]) == pytest.approx(expected, abs=2e-4)
    file = np.load(tmp_path / "prompt.npz")          # plain arrays: numpy refuses others
    assert np.array_equal(file["text_features"], prompt["text_features"]), "which gave p above"
    assert file["logit_scale"] == pytest.approx(world.clip.logit_scale.exp().item())
    assert list(file["classnames"]) == CLASSES and file["resolution"] == 32
    assert np.allclose([file["mean"], file["std"]], [MEAN, STD])


def test_words_are_the_nearest_token_embeddings(command, world, tmp_path, monkeypatch):
    """By Euclidean distance, in float64; of the newest prompt whose path begins so."""
    monkeypatch.chdir(world.root)
    command(*world.learn, "--backbone", "clip.pt", "--csc", "both")
    V, = [V for V in vectors(tmp_path / "out").values() if V.dim() == 3]
    monkeypatch.chdir(tmp_path)
    for name in ("other", "photos2-newer"):
        pathlib.Path(f"out/{name}.pt").touch()
    screen, _ = command("--load", "out/photos", "--words", 2)
    embeddings = torch.load(world.weights)["token_embedding.weight"].double()
    rows = [line for line in screen.splitlines()[1:] if line not in CLASSES]
    assert len(rows) == 5 * 16
    for row, vector in zip(rows, V.double().flatten(0, 1)):
        distances, ids = (embeddings - vector).norm(dim=1).topk(2, largest=False)
        found = re.findall(r" (\S+) ([\d.]+)(?:,|$)", row)
        assert [float(end) for _, end in found] == pytest.approx(distances.tolist(), abs=1e-4)
        nearest = Tokenizer().decode([ids[0]]).strip()
        assert found[0][0] in (nearest, repr(nearest))


# ---- Bad input -----------------------------------------------------------------------------------

MISTAKES = {   # a command line: the error
    "--predict x.jpg": "--predict, --export and --words need --load",
    "--load nothing --words 1": "no prompt nothing: .* prompts in .: .*gone.pt, ",
    "learn --shots -1": "--shots: '-1' is not a number of 0 or more",
    "learn --epochs 0": "--M, --epochs and --words are 1 or more",
    "learn --noise nan": "--noise is a share between 0 and 1",
    "learn --init a --M 4": "leave out --M",
    "learn --json": "--json goes with --predict alone",
    "learn --demo": "--demo brings its own --data",
    "learn --M 66": "'woven wool' is too long or M = 66 too large: 78 tokens .* reads 77",
    "learn --template photo": "--template 'photo' needs {}",
    "learn --device tpu": "--device tpu cannot be used here",
    "learn --out clip.pt/below": "Not a directory|cannot find the path|already exists|File exists",
    "learn --data long": "does not fit in 77: 'a photo of a b{70}",
    "learn --data long --template {}": "no training images: use --shots 0",
    "learn --data half": "1 of 8 images .*grid",
    "learn --data half --probe": "--probe needs validation images",
    "learn --data half --classes new": "no test images of the new classes",
    "--shots 1": "one of --data, --demo and --load is needed",
    "--load unified.pt --words 1 --shots 1": "--shots is for learning",
    "--load unified.pt --words 1 --position front": "--position is for checkpoints of the",
    "--load unified.pt --predict unified": "no images in .*unified",
    "--load unified.pt --export unified.pt": "would overwrite the prompt itself",
    "--load specific.pt --data long": "none for 'a'; only a prompt without --csc",
    "--load clip.pt --words 1": "clip.pt is not a learned prompt",
    "--load gone.pt --words 1": "was learned with /gone/clip.pt, which is not there",
    "--load edited.pt --data photos": "builds prompts in another way .* learn it anew",
    "--load foreign.pt --words 1": "was learned for other weights than",
    "--load narrow.pt --words 1 --backbone clip.pt": "learned for other weights than",
    "--load official.pt --words 1": "does not store for which backbone",
    "--load official.pt --predict x.jpg": "official code and stores no class names",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(command, world, prompts, tmp_path, monkeypatch, line):
    """What was found and what was expected; exit code 2, no traceback, nothing in --out."""
    monkeypatch.chdir(prompts)
    words = shlex.split(line)
    if words[0] == "learn":
        words = [*world.learn, *words[1:]]
    _, err = command(*words, code=2)
    assert re.fullmatch(f"(note: .*\n)*error: .*({MISTAKES[line]}).*\n", err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key, value", [
    ("V", torch.zeros(64)), ("V", torch.full((4, 64), math.nan)), ("V", torch.zeros(3, 4, 64)),
    ("classnames", [1, 2, 3, 4, 5]), ("classnames", ["a"]), ("text_features", torch.zeros(5)),
    ("logit_scale", 1.0), ("resolution", None), ("path", None), ("settings", None),
    ("settings", {"position": "sideways"}),
])
def test_a_damaged_prompt_is_refused(prompts, tmp_path, key, value):
    """Whatever part of it is not as we write it."""
    torch.save({**torch.load(prompts / "unified.pt"), key: value}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is not a learned prompt, or a damaged one"):
        coop.load_prompt(tmp_path / "bad.pt")


# ---- What surrounds a run: kills, other processes, what is shown ---------------------------------

COUNT = """
import os, sys
from unittest import mock
import coop
coop.CHUNK = 4
last = int(sys.argv.pop(1))
def count(*_):
    if os.replace.call_count == last:
        os._exit(9)                 # like a kill: nothing is cleaned up
    return mock.DEFAULT
os.replace = mock.Mock(wraps=os.replace, side_effect=count)
coop.main()
sys.__stderr__.write(str(os.replace.call_count))
"""


def python(last, *arguments, **environment):
    """A process that is killed before it gives its last file a name, or says how many it wrote."""
    return subprocess.Popen(
        [sys.executable, "-c", COUNT, str(last), *map(str, arguments)], cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment})


def test_a_killed_sweep_goes_on_where_it_was(command, world, tmp_path):
    """It repeats no finished run and ends as if undisturbed."""
    out = tmp_path / "out"
    sweep = [*world.learn, "--device", "cpu", "--shots", 1, 2, "--csc", "both"]
    command(*sweep, "--out", tmp_path / "whole")
    done = {}
    for last in (1, 11, 1, 3, 8):
        process = python(last, *sweep, "--cache", tmp_path / "cache", "--out", out)
        assert "Error" not in process.communicate()[1] and process.returncode == 9
        found = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
        assert done.items() <= found.items()
        done = found
    screen, _ = command(*sweep, "--seeds", 1, 1)
    assert screen.count("  (done already)") == len(done) == 3
    for stem, expected in vectors(tmp_path / "whole").items():
        assert torch.allclose(vectors(out)[stem], expected, atol=1e-5)


@pytest.mark.parametrize("stop, code", [(KeyboardInterrupt, 130), (BrokenPipeError, 1)])
def test_stopped_by_its_user(command, world, tmp_path, monkeypatch, stop, code):
    """By Ctrl-C, which is said, or by head: no traceback, and what was finished is kept."""
    train = mock.Mock(wraps=coop.train, side_effect=[mock.DEFAULT, stop])
    monkeypatch.setattr(coop, "train", train)
    _, err = command(*world.learn, "--seeds", 1, 2, 3, code=code)
    assert re.fullmatch("\nstopped; .*\n" if code == 130 else "", err)
    assert len(results(tmp_path / "out")) == 2


def two_processes(*arguments, code=0):
    """A command line as torchrun would start it -> (stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = functools.partial(python, 0, *arguments, WORLD_SIZE="2", MASTER_PORT=port,
                              MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    processes = [start(RANK="0"), start(RANK="1")]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [code, code], outputs
    return outputs


def test_two_processes_share_the_work(command, world, tmp_path):
    """Each writes half of the files, one speaks; the results are those of a single process."""
    sweep = [*world.learn, "--device", "cpu", "--shots", 1, 2, "--seeds", 1, 2]
    screen, _ = command(*sweep)
    two = tmp_path / "two"
    first, second = two_processes(*sweep, "--out", two, "--cache", two)
    table = screen[screen.index("\naccuracy, %"):screen.index("\nto use")]
    assert table in first[0] and second[0] == ""
    files = len(list(two.rglob("*.*")))
    written = [int(err.split()[-1]) for _, err in (first, second)]
    assert sum(written) == files and abs(written[0] - files / 2) < 3
    for mistake in (["--M", 0], ["--data", "nowhere"]):  # which both see, or the first one alone
        first, second = two_processes(*sweep, *mistake, code=2)
        assert re.fullmatch("error: .*\n", first[1] + second[1])


def test_started_as_people_start_it(world, tmp_path):
    """In another folder; with names that the terminal cannot show."""
    paint(tmp_path / "写真/test", ["赤", "blå"], [2, 2])
    words = [sys.executable, HERE / "coop.py", "--data", "写真", "--backbone",
             world.weights, "--shots", "0", "--device", "cpu", "--no-cache"]
    ascii = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, env=ascii)
    assert done.returncode == 0 and done.stderr == b""
    assert b'zero-shot "a photo of a {}.": ' in done.stdout
    result, = results(tmp_path / "runs").values()
    assert list(result["per_class"]) == ["blå", "赤"]
    assert "learned prompts (runs)" in coop.make_parser().format_help()


def test_progress(monkeypatch, capsys):
    """Where there is no terminal: a plain line now and then."""
    monkeypatch.setattr(coop, "time", mock.Mock(time=mock.Mock(side_effect=itertools.count())))
    progress = coop.Progress("learning V", 400, "epochs")
    for _ in range(200):
        progress("loss 1", count=2)
    shown = capsys.readouterr().err
    assert 5 < shown.count("\n") <= 20 and "\r" not in shown
    half = "learning V:  50 % of 400 epochs, 2.0 per second, 0:01:40 left, loss 1\n"
    assert half in shown


def test_table():
    """Mean and standard deviation (n - 1) over seeds; the paper's row only where it compares."""
    run = coop.Run("coop", "dtd", "RN50", 4, 1, 16, "end", epochs=100, loss="ce",
                   weights=clip_model.MODELS["RN50"][0][:8])
    for n_test, paper in ((1692, "\nthe paper's.* 53.49"), (120, "")):
        result = {"settings": dataclasses.asdict(run), "n_test": {"all": n_test}}
        rows = [{**result, "accuracy": {"all": accuracy}} for accuracy in (50.0, 52.0, 57.0)]
        assert re.fullmatch(f".*\nCoOp M=16 end +53.00 ± 3.61{paper}", coop.table(rows))


# ---- The official code ---------------------------------------------------------------------------
#
# Whoever has the code that the paper's authors published can hold this project against it: the same
# images, prompts, learning rates, steps.  Nothing of it is copied here.

OFFICIAL = """needs the official code, in any folder, and what it imports:
    git clone https://github.com/KaiyangZhou/CoOp && git -C CoOp checkout ff61507
    git clone https://github.com/KaiyangZhou/Dassl.pytorch && git -C Dassl.pytorch checkout c61a1b5
    pip install yacs tqdm            # and a torchvision that fits torch, for the crops
    export COOP_OFFICIAL=$PWD/CoOp DASSL_OFFICIAL=$PWD/Dassl.pytorch"""

OFFICIAL_NAMES = [
    *NAMES, "2012 Rolls-Royce Phantom", "707-320", "U.S.", "dr. no...", "'s", "rock'n'roll", "C++",
    "bird's-eye_", "__init__", "  two   spaces ", "T-Shirt/top", "100%", "a&amp;amp;b", "<b>", "?",
    "<|startoftext|>", "café", "cafÃ©", "cafe\u0301", "ＡＢ", "½", "ΟΔΟΣ", "кот", "猫", "🐱", "{}",
]


class OfficialScheduler(torch.optim.lr_scheduler.LRScheduler):
    """In place of torch's, for Dassl's to inherit: takes a `verbose`, as it did in its time."""

    def __init__(self, optimizer, last_epoch=-1, verbose=False):
        super().__init__(optimizer, last_epoch)


@functools.cache
def import_official():
    """Import both checkouts -> the module `train` of CoOp, a random CLIP, its tokenizer.

    In memory, while they are imported, the base class of Dassl's schedulers is replaced by the
    class above, and packages that CoOp does not use but Dassl imports by mocks (torchvision only
    if none fits torch).  And for good: the loading of CLIP, which gives the random one, in float64.
    """
    checkouts = [pathlib.Path(os.environ[name]) for name in ("COOP_OFFICIAL", "DASSL_OFFICIAL")]
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
        patch.setattr(torch.optim.lr_scheduler, "_LRScheduler", OfficialScheduler)
        for path in checkouts:
            patch.syspath_prepend(path)
        train = importlib.import_module("train")
    clip = openai_clip(resolution=32, vocab_size=49408, width=64)
    for trainer in (train.trainers.coop, train.trainers.zsclip):
        trainer.load_clip_to_cpu = mock.Mock(return_value=clip)
    return train, clip, Tokenizer.openai(checkouts[0] / "clip" / tokenizer_module.VOCABULARY)


@pytest.fixture
def official():
    """.cfg, CoOp's for RN50 and one shot; .merge(file) another; .train, .clip, .tokenizer."""
    if "COOP_OFFICIAL" not in os.environ or "DASSL_OFFICIAL" not in os.environ:
        pytest.skip(OFFICIAL)
    train, clip, tokenizer = import_official()
    cfg = train.get_cfg_default()
    train.extend_cfg(cfg)

    def merge(file):
        cfg.merge_from_file(f"{os.environ['COOP_OFFICIAL']}/configs/trainers/CoOp/{file}.yaml")

    merge("rn50_ep50")
    cfg.USE_CUDA = False
    cfg.INPUT.SIZE = (32, 32)
    cfg.DATASET.NAME = "DescribableTextures"
    return types.SimpleNamespace(cfg=cfg, merge=merge, train=train, clip=clip, tokenizer=tokenizer)


def official_trainer(name, cfg):
    """One of their trainers, for NAMES; without a dataset and its loaders."""
    build_trainer = importlib.import_module("dassl.engine").build_trainer
    cfg.TRAINER.NAME = name
    manager = mock.Mock()
    manager.dataset.classnames = NAMES
    with mock.patch("dassl.engine.trainer.DataManager", return_value=manager):
        return build_trainer(cfg)


def official_items(items):
    return [(pathlib.Path(item.impath), item.label) for item in items]


def test_splits_and_few_shot_samples_are_the_official_ones(official, tmp_path, monkeypatch):
    """From class folders to the few images that a run learns from, for their DescribableTextures.

    Class folders of 4 to 36 images are split 50/20/30, rounded as theirs, and with their seed 1
    into the same images.  A split file, reversed, gives the same samples, labels and class names
    for all, base and new classes; many classes have fewer images than shots.
    """
    official_dtd = importlib.import_module("datasets.dtd")
    root = lay_out(tmp_path / "dtd", "; ".join(f"images/class {n:02} {n}" for n in range(4, 37)))
    names = functools.partial(official_dtd.listdir_nohidden, sort=True)      # not as the disk lists
    monkeypatch.setattr(official_dtd, "listdir_nohidden", names)
    official.train.set_random_seed(1)
    parts = official_dtd.DescribableTextures.read_and_split_data(str(root / "images"))
    dataset = data.load_dataset(root)
    assert [dataset.train, dataset.val, dataset.test] == [official_items(part) for part in parts]

    split = {}
    for part, items in zip(data.PARTS, parts):               # paths may be absolute
        split[part] = [(item.impath, item.label, item.classname) for item in items[::-1]]
    (root / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    dataset = data.load_dataset(root)
    setup = coop.Setup(None, "RN50", None, dataset, None)
    official.cfg.DATASET.ROOT = str(tmp_path)
    for seed, shots, classes in itertools.product((1, 2, 17), (1, 2, 4, 8, 16), coop.SPLITS):
        official.cfg.DATASET.NUM_SHOTS = shots
        official.cfg.DATASET.SUBSAMPLE_CLASSES = classes
        official.cfg.SEED = seed
        official.train.set_random_seed(seed)
        theirs = official_dtd.DescribableTextures(official.cfg)
        run = coop.Run("coop", "dtd", "RN50", shots=shots, seed=seed, classes=classes)
        found = (*setup.few_shot(run), setup.renumber(dataset.test, classes))
        assert found == tuple(map(official_items, (theirs.train_x, theirs.val, theirs.test)))
        assert setup.classnames(classes) == theirs.classnames


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
    official.merge(file)
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


@pytest.mark.parametrize("position, csc", VARIANTS)
def test_V_is_that_of_the_official_training(official, position, csc, tmp_path, monkeypatch):
    """After 100 steps on the same images in the same batches, by Dassl's own loop.

    The difference is measured in V's largest move; small faults in the recipe must show in it.
    Text features, accuracy by their evaluator and their checkpoint, read by us, are equal, too.
    """
    T = official.cfg.OPTIM.MAX_EPOCH
    official.cfg.OUTPUT_DIR = str(tmp_path)
    official.cfg.TRAINER.COOP.N_CTX = 4
    official.cfg.TRAINER.COOP.CSC = csc
    official.cfg.TRAINER.COOP.CLASS_TOKEN_POSITION = position
    torch.manual_seed(0)
    trainer = official_trainer("CoOp", official.cfg)
    model = trainer.model
    ctx = model.prompt_learner.ctx
    start = ctx.detach().clone()
    clip = ours(official.clip)
    learner = PromptLearner(clip, official.tokenizer, NAMES, 4, position, csc)
    images = torch.randn(70, 3, 3, 32, 32, dtype=torch.float64)      # three crops of 70 images
    labels = torch.arange(70) % len(NAMES)
    features = clip.encode_image(images.flatten(0, 1)).unflatten(0, (70, 3))
    schedule = coop.batches(70, T, seed=1)           # two of 32 in an epoch; the rest is dropped

    def before_epoch():
        trainer.train_loader_x = []
        for batch in schedule[trainer.epoch]:
            x = images[batch, trainer.epoch % 3]
            trainer.train_loader_x.append({"img": x, "label": labels[batch]})

    trainer.before_epoch = before_epoch
    trainer.test_loader = [{"img": images[:, 0], "label": labels}]
    trainer.train()

    def difference():
        learner.V.data.copy_(start)
        coop.train(clip, learner, features, labels, T, seed=1)
        return ((learner.V - ctx).abs().max() / (ctx - start).abs().max()).item()

    assert difference() < 1e-9
    learner.V.data.copy_(ctx)
    g = clip.encode_prompts(*learner())
    expected = model.text_encoder(model.prompt_learner(), model.tokenized_prompts)
    assert relative(g, expected) < 1e-12
    assert coop.evaluate(features[:, 0], g, labels) == pytest.approx(trainer.test())
    checkpoint = tmp_path / "prompt_learner" / f"model.pth.tar-{T}"
    assert torch.equal(coop.load_prompt(checkpoint)["V"], ctx.float())
    for name, fault in (("WEIGHT_DECAY", 0), ("MOMENTUM", 0.89)):
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
def reader(downloads, tmp_path, monkeypatch):
    """A reader's machine: small weights called RN50, folders of images, a demo made before."""
    here = tmp_path / "here"
    weights_folder, _ = downloads
    weights = weights_folder / "RN50.pt"
    clip = openai_clip(resolution=32, vocab_size=49408, width=64, layers=1, double=False)
    torch.save(clip.state_dict(), weights)
    monkeypatch.setitem(clip_model.MODELS, "RN50", (clip_model.sha256(weights), 1))
    for folder in ("my_photos", "other_photos", "dtd"):
        paint(here / folder, ["cat", "dog"], [6, 6])
    paint(here, ["more_photos"], [1])
    Image.new("RGB", (70, 60), (200, 30, 90)).save(here / "new.jpg")
    demo = tmp_path / ".cache" / "coop" / f"demo-{coop.demo_code()}"
    for folder in ("demo/train", "demo/val", "demo/test", "demo-photos/test", "demo-faint/test"):
        paint(demo / folder, ["red dotted", "blue grid"], [2, 2])
    shutil.copy(weights, demo / "clip.pt")
    monkeypatch.setattr(coop, "paper_epochs", mock.Mock(return_value=1))
    monkeypatch.setattr(coop, "search_C", mock.Mock(return_value=1.0))
    monkeypatch.chdir(here)
    return here


def test_readme_runs(reader, capsys):
    """Every `python coop.py ...` and the example in code, as they stand, one after the other."""
    without_output = re.sub(r"```\ndemo: .*?```", "", README, flags=re.DOTALL)
    commands = re.findall(r"python coop\.py (--[^`&#\n]+)", without_output)
    assert len(commands) > 10
    for command in commands:
        if importlib.util.find_spec("matplotlib") is None:
            command = command.replace("--plot", "")
        words = []
        for word in shlex.split(command):                    # as a shell does
            words += glob.glob(os.path.expanduser(word)) or [word]
        coop.main(words)                                     # an error exits
        assert capsys.readouterr().out, command
    datasets = {path.name.split("-")[0] for path in (reader / "runs").glob("*.json")}
    assert datasets == {"demo", "dtd", "my_photos"}
    assert (reader / "prompt.npz").is_file()
    exec(readme_code("coop.training_features"), {})
    assert re.search(r"\d % correct", capsys.readouterr().out)


@pytest.mark.parametrize("file, words", [
    ("tokenizer.py", "from tokenizer import Tokenizer  "),
    ("clip_model.py", "torch.cosine_similarity"),
    ("data.py", "few_shot"),
])
def test_each_ground_floor_file_works_alone(reader, file, words):
    """Copied alone to a reader, each does what README's "Take just this file" shows."""
    shutil.copy(HERE / file, reader)
    code = readme_code(words).replace("ViT-B/32", "../.cache/clip/RN50.pt")
    code = code.replace("224, 224", "32, 32")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})


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

    Mean of two seeds on 960 test images: far ahead of the plain prompt and, with M = 4, of the
    linear probe; with M = 1 the nearest word is always "negative".  A second run makes nothing
    anew.  Two other CLIPs, of another seed or number of threads, gave leads of 11 points, too.
    """
    command = [sys.executable, HERE / "coop.py", "--demo", "--shots", "1", "--seeds", "1", "2",
               "--M", "1", "4", "--probe", "--device", "cpu",
               "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    found = results(tmp_path / "out")
    accuracy = {}
    for result in found.values():
        assert result["n_test"] == {"all": 960}
        row = accuracy.setdefault(coop.Run(**result["settings"]).label, [])
        row.append(result["accuracy"]["all"])
    mean = {label: statistics.mean(row) for label, row in accuracy.items()}
    plain = mean['zero-shot "a photo of a {} texture."']
    assert mean["CoOp M=4 end"] > plain + 10, mean
    assert mean["CoOp M=4 end"] > mean["linear probe"] + 3, mean
    assert mean['zero-shot "a negative photo of a {} texture."'] > plain + 10, mean

    world, = (tmp_path / "cache").glob("demo-*")
    tokenizer = Tokenizer.from_file(world / "clip.merges.txt")
    embedding = torch.load(world / "clip.pt")["token_embedding.weight"]
    words = [V for V in vectors(tmp_path / "out").values() if len(V) == 1]
    nearest = [(V - embedding).norm(dim=1).argmin() for V in words]
    assert tokenizer.decode(nearest) == "negative negative "
    made = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert made == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert again.stdout.count("done already") == len(found)
    assert "nearest words to V of CoOp M=4 end, 1 shots, seed 2: negative (" in again.stdout


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
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else int
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def report(what, **figures):
    """One row, as a line of JSON."""
    print(json.dumps({"what": what, **figures}), flush=True)


def compare(what, mine, other, pairs):
    """Time both in turn; report medians and the ratio other / mine."""
    times = []
    for _ in range(pairs):
        pair = []
        for call in (mine, other):
            call()
            pair.append(seconds(call))
        times.append(pair)
    own, others = zip(*times)
    ratios = [b / a for a, b in times]
    report(what, ours=statistics.median(own), other=statistics.median(others),
           ratio=statistics.median(ratios), least=min(ratios), most=max(ratios), n=pairs)


def full_size(name):
    """OpenAI's model in fp32 with random weights, and ours with the same."""
    e, resolution, vision_layers, vision_width, patch, width = SHAPES[name]
    theirs = openai_clip(e, resolution, vision_layers, vision_width, patch, 49408, width, 12,
                         double=False).to(DEVICE)
    for block in theirs.transformer.resblocks:
        block.attn_mask = block.attn_mask.to(DEVICE)
    return theirs, clip_model.prepare(ours(theirs))


def step(clip, V, text_features, image_features, labels):
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


def benchmark_steps(backbone, variants=VARIANTS):
    """The text encoder's part of a step, then a whole step with its image pass of 32 crops."""
    theirs, clip = full_size(backbone)
    x = torch.randn(32, 3, clip.resolution, clip.resolution, device=DEVICE)
    ready = torch.randn(32, clip.text_projection.shape[1], device=DEVICE)
    labels = torch.arange(32, device=DEVICE)

    def encode_images():
        with torch.no_grad():
            return theirs.encode_image(x)

    for position, csc in variants:
        learner = PromptLearner(clip, Tokenizer.openai(), DTD, 16, position, csc)
        V = learner.V
        plain = padded_features(theirs, V)

        def packed(learner=learner):
            return clip.encode_prompts(*learner())

        mine = functools.partial(step, clip, V, packed, lambda: ready, labels)
        other = functools.partial(step, theirs, V, plain, lambda: ready, labels)
        whole = functools.partial(step, theirs, V, plain, encode_images, labels)
        main_case = (position, csc) == ("end", False)
        kind = "class-specific" if csc else "unified"
        name = f"{backbone}, 47 classes, M=16, {kind}, {position}"
        compare(f"text step: {name}", mine, other, 7 if main_case else 3)
        if main_case:
            compare(f"whole step: {name}", mine, whole, 7)


def benchmark_floor():
    """The step beside the time of its matrix products at the rate of a 2048 x 2048 product."""
    _, clip = full_size("RN50")
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
    for _ in range(25):
        own = seconds(lambda: step(
            clip, learner.V, lambda: clip.encode_prompts(*learner()), lambda: f, labels))
        product = seconds(lambda: square @ square)
        ratios.append(own / (product * 2 * products / 2048 ** 3))      # forward, backward
    ratios = ratios[5:]                              # the first ones warm up
    report("text step / floor of its matrix products", ratio=statistics.median(ratios),
           least=min(ratios), most=max(ratios), n=len(ratios))


def memory(what):
    """VmRSS or VmHWM of this process in GiB; Linux only."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) / 2 ** 20


def benchmark_memory(K):
    """The peak of a training step above the loaded model."""
    visual = clip_model.ModifiedResNet(224, [3, 4, 6, 3], 64, 1024)
    clip = clip_model.prepare(CLIP(1024, visual, 512, 12).requires_grad_(False).eval())
    names = []
    for i in range(K):                               # of two to four words
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
    N = 32 if name in ("RN50", "ViT-B/32", "ViT-B/16") else 4
    x = torch.randn(N, 3, clip.resolution, clip.resolution, device=DEVICE)
    parts = x.contiguous(memory_format=torch.channels_last).split(coop.encoder_batch_size(clip))
    with torch.inference_mode():
        for kind, model in (("fp32", clip), ("bf16", low)):
            compare(f"image encoder: {name}, {N} images, {kind}",
                    lambda model=model: [model.encode_image(part) for part in parts],
                    lambda: theirs.encode_image(x), 5 if N == 32 else 3)


def benchmark_job(photographs):
    """The whole job from start to end: 4 shots, 100 epochs, 1,692 test images, random RN50.

    Ours is run as a user runs it.  Theirs is the official recipe with OpenAI's modules: of 500
    steps 10 are run and of 17 test batches of 100 images 2, decoding included, and multiplied.
    """
    theirs, _ = full_size("RN50")
    photos = itertools.cycle(sorted(pathlib.Path(photographs).rglob("*.jpg")))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for part, name in itertools.product(("train", "test"), DTD):       # of DTD's size
            (folder / "dtd47" / part / name).mkdir(parents=True)
            for i in range(4 if part == "train" else 36):
                shutil.copy(next(photos), folder / "dtd47" / part / name / f"{i:02}.jpg")
        torch.save(theirs.state_dict(), folder / "rn50.pt")
        command = [sys.executable, HERE / "coop.py", "--data", folder / "dtd47", "--backbone",
                   folder / "rn50.pt", "--gelu", "quick", "--shots", "4", "--cache",
                   folder / "cache", "--out", folder / "out"]
        times = {}
        for options in ("", "--M 8", "--precision bf16 --views 10"):
            call = functools.partial(subprocess.run, [*command, *options.split()], check=True,
                                     capture_output=True)
            times[options] = seconds(call)
        other = official_job(theirs, data.load_dataset(folder / "dtd47"))
    for options, own in times.items():
        report(f"whole job {options}", ours=own, other_extrapolated=other, ratio=other / own)


def official_job(theirs, dataset):
    """Seconds of the official recipe with OpenAI's modules, extrapolated from a part of it."""
    V = torch.nn.Parameter(0.02 * torch.randn(16, 512, device=DEVICE))
    plain = padded_features(theirs, V)
    optimizer = torch.optim.SGD([V], lr=0.002, momentum=0.9, weight_decay=5e-4)

    def encode(items, number):
        crops = [crop for _, _, crop in data.crops([(path, [number]) for path, _ in items], 224)]
        x = data.normalize(torch.from_numpy(np.stack(crops)).to(DEVICE))
        with torch.no_grad():
            return theirs.encode_image(x)

    def train_step():
        batch = random.sample(dataset.train, 32)
        labels = torch.tensor([label for _, label in batch], device=DEVICE)
        step(theirs, V, plain, lambda: encode(batch, 0), labels)
        optimizer.step()

    def test_batch():                        # the official code encodes all prompts for each batch
        encode(dataset.test[:100], data.TEST)
        with torch.no_grad():
            plain()

    train_step()
    ten_steps = seconds(lambda: [train_step() for _ in range(10)])
    two_batches = seconds(lambda: [test_batch() for _ in range(2)])
    return 500 / 10 * ten_steps + 17 / 2 * two_batches


def benchmark(photographs=None, part=None):
    """All parts, each in a process of its own as a run of coop.py is; or the part named, here."""
    parts = {
        "steps RN50": lambda: benchmark_steps("RN50"),
        "steps ViT-B/16": lambda: benchmark_steps("ViT-B/16", [("end", False)]),
        "floor": benchmark_floor,
    }
    if sys.platform == "linux":
        for K in (1000, 20_000):
            parts[f"memory {K}"] = functools.partial(benchmark_memory, K)
    if photographs:
        parts["job"] = lambda: benchmark_job(photographs)
    for name in SHAPES:
        parts[f"images {name}"] = functools.partial(benchmark_images, name)
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
            lines.append(line)
            row = json.loads(line)
            figures = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if key != "what")
            print(f"{row['what']:58} {figures}", flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    benchmark(*sys.argv[1:])
