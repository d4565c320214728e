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

Read in this order: PromptLearner, train, evaluate; then image_features, run and main.
"""
import argparse
import collections
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import clip_model
import data
from data import TEST
from tokenizer import Tokenizer


class PromptLearner(nn.Module):
    """The K prompts t_i = [V]_1 ... [V]_M [class i] . as token embeddings, V being the parameter.

    Paper equations 2 (position "end"), 3 ("middle": half of V before the name, half after) and
    class-specific contexts (csc); "front" is the official code's third. init: words whose
    token embeddings V starts from (M is then their number of tokens); None draws N(0, 0.02^2) from
    torch's global generator. Raises ValueError if a prompt is longer than CLIP reads.
    """

    def __init__(self, clip, tokenizer, classnames, M=16, position="end", csc=False, init=None):
        super().__init__()
        K, embedding = len(classnames), clip.token_embedding.weight.detach()      # (vocabulary, d)
        if init is not None:
            words = tokenizer.encode(init.replace("_", " "))
            M = len(words)
        if M < 1:
            raise ValueError("no context to learn: M must be at least 1, and --init must hold a word")

        names = [name.replace("_", " ") for name in classnames]
        length = {name: len(tokenizer.encode(name)) for name in names}
        longest, room = max(names, key=length.get), clip.context_length - 3      # without sot, full stop, eot
        if length[longest] + M > room:
            raise ValueError(f"class name {longest!r} is too long: {length[longest]} tokens, the model reads {room - 1} at "
                             f"most" if length[longest] >= room else f"M = {M} is too large: with the {length[longest]} tokens "
                             f"of class {longest!r} the largest that fits in {clip.context_length} is {room - length[longest]}")

        # A prompt is written as numbers: a token id, or vocab_size + m for the place of vector V_m.
        prompts, shared = [], {"end": M, "middle": M // 2, "front": 0}[position]
        for i, name in enumerate(names):
            ids, cut = tokenizer.encode(name + "."), length[name]                # encoded with its full stop, as in the sentence
            V = [clip.vocab_size + (i * M if csc else 0) + m for m in range(M)]
            prompts.append([tokenizer.sot, *V[:shared], *ids[:cut], *V[shared:], *ids[cut:], tokenizer.eot])
        shared = 1 if csc else 1 + shared                # how many tokens all prompts have in common
        self.lengths = torch.tensor([len(prompt) - shared for prompt in prompts])

        # The few embeddings that occur, each once: the bank's rows are those of the words, then V's.
        places = prompts[0][:shared] + [place for prompt in prompts for place in prompt[shared:]]
        used, rows = torch.unique(torch.tensor(places), return_inverse=True)
        self.register_buffer("shared_rows", rows[:shared].to(embedding.device))
        self.register_buffer("own_rows", rows[shared:].to(embedding.device))
        self.register_buffer("words", embedding[used[used < clip.vocab_size].to(embedding.device)])
        V = torch.randn((K, M, embedding.shape[1]) if csc else (M, embedding.shape[1])) * 0.02
        if init is not None:
            V = embedding[torch.tensor(words, device=embedding.device)].expand(V.shape).clone()
        self.V = nn.Parameter(V.to(embedding))           # fp32: in half precision small steps would be lost

    def forward(self):
        """-> shared (P, d), own (sum of lengths, d), lengths (K,): what CLIP.encode_prompts takes."""
        bank = torch.cat([self.words, self.V.flatten(0, -2)])
        return bank[self.shared_rows], bank[self.own_rows], self.lengths


def batches(N, T, seed, size=32):
    """T lists of index tensors: every epoch a new shuffle of N images, cut into batches. What is left
    over is dropped, unless it is all there is: N < size gives one batch of N.
    """
    dice = torch.Generator().manual_seed(seed)
    return [[b for b in torch.randperm(N, generator=dice).split(size) if len(b) == min(N, size)] for _ in range(T)]


def learning_rate(n, T):
    """The official schedule: one epoch of warm-up at 1e-5, so that the first gradients, taken far from
    any good V, cannot throw it off; then a cosine from 0.002. The warm-up epoch counts as one of
    the T, so the cosine stops one step short of zero: odd, and kept.
    """
    return 1e-5 if n == 0 else 0.001 * (1 + math.cos(math.pi * (n - 1) / T))


def train(clip, learner, features, labels, T, seed=1, progress=lambda n, loss, accuracy: None):
    """Learn V by the paper's recipe; the result is V of the last epoch, in learner.

    features: (N, crops, e), features[i, n % crops] of the crop of image i in epoch n, computed
    beforehand: the image encoder is frozen, so f does not change while V does. labels: (N,).
    Raises ValueError when the loss is not a number.
    """
    optimizer = torch.optim.SGD([learner.V], lr=learning_rate(0, T), momentum=0.9, weight_decay=5e-4)
    for n, epoch in enumerate(batches(len(labels), T, seed)):
        optimizer.param_groups[0]["lr"] = learning_rate(n, T)
        losses, right = [], 0
        for batch in epoch:
            f = F.normalize(features[batch, n % features.shape[1]], dim=-1)      # (B, e)
            g = F.normalize(clip.encode_prompts(*learner()), dim=-1)             # (K, e)
            logits = clip.logit_scale.exp() * f @ g.T                            # cosine / tau, (B, K)
            loss = F.cross_entropy(logits, labels[batch])                        # -log of equation 1
            optimizer.zero_grad()
            loss.backward()          # through the text encoder, whose weights stay: only V has a gradient
            optimizer.step()
            losses.append(loss.detach())
            right += (logits.argmax(-1) == labels[batch]).sum()
        losses = torch.stack(losses)
        if not losses.isfinite().all():
            step = n * len(epoch) + int((~losses.isfinite()).nonzero()[0])
            raise ValueError(f"the loss is not a number at step {step} (epoch {n}): the weights or the image features "
                             "are damaged, or overflow in this --precision")
        progress(n, losses.mean().item(), 100 * right.item() / sum(map(len, epoch)))


def evaluate(image_features, text_features, labels):
    """Percent of the images (N, e) whose nearest text (K, e), by cosine, is that of their label (N,)."""
    f, g = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    return 100 * ((f @ g.T).argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def zero_shot(clip, tokenizer, template, classnames):
    """Features (K, e) of hand-written prompts: the class names put into a template such as "a photo of a {}."."""
    texts = [template.format(name.replace("_", " ")) for name in classnames]
    return torch.cat([clip.encode_text(tokenizer(texts[i:i + 256], clip.context_length).to(clip.logit_scale.device))
                      for i in range(0, len(texts), 256)])


# ---- The method ends here; what follows brings images in and results out -------------------------

class Progress:
    """One line about long work: how far, how long still. Rewritten in place on a terminal."""

    def __init__(self, what, total, advice=""):
        self.what, self.total, self.start, self.said, self.advice = what, total, time.time(), time.time(), advice
        self.often = 0.3 if sys.stderr.isatty() else 30

    def __call__(self, done, note=""):
        now = time.time()
        if now - self.said < self.often and (done < self.total or self.said == self.start):
            return                                       # short work says nothing
        self.said, left = now, (now - self.start) / done * (self.total - done)
        if left > 300 and self.advice:
            print(f"note: {self.what} will take {left / 60:.0f} minutes; {self.advice}", file=sys.stderr)
            self.advice = ""
        line = f"{self.what}: {done} of {self.total}{note}, " + (
            f"{left:.0f} s left" if done < self.total else f"{now - self.start:.1f} s")
        end = "\n" if done == self.total or not sys.stderr.isatty() else ""
        print(f"\r\033[K{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)


def image_features(clip, jobs, cache=None, what="encoding crops", advice=""):
    """Features (number of crops in all jobs, e) fp32 of jobs [(path, [crop number, ...]), ...], in order.

    What the cache (data.FeatureCache) holds is not computed again; what is computed is put there.
    """
    device = clip.logit_scale.device
    size = 256 if device.type == "cuda" else 32
    features = torch.empty(sum(len(numbers) for _, numbers in jobs), clip.text_projection.shape[1])
    todo, row = [], 0                                    # todo: (path, {crop number: row})
    for (path, numbers), known in zip(jobs, cache.get([path for path, _ in jobs]) if cache else [{}] * len(jobs)):
        rows = dict(zip(numbers, range(row, row + len(numbers))))
        for n in known.keys() & rows.keys():
            features[rows[n]] = torch.from_numpy(known[n].copy())
        if rows.keys() - known.keys():
            todo.append((path, {n: row for n, row in rows.items() if n not in known}))
        row += len(numbers)

    progress, done, waiting = Progress(what, sum(len(rows) for _, rows in todo), advice), 0, []
    with torch.inference_mode():
        for i, pixels in data.crops([(path, list(rows)) for path, rows in todo], clip.resolution):
            waiting += [(todo[i][0], n, row, crop) for (n, row), crop in zip(todo[i][1].items(), pixels)]
            while len(waiting) >= size or (waiting and i == len(todo) - 1):
                paths, numbers, rows, batch = zip(*waiting[:size])
                x = data.normalise(torch.stack([torch.from_numpy(crop) for crop in batch]).to(device))
                features[list(rows)] = clip.encode_image(x).float().cpu()
                if cache:
                    cache.put(paths, numbers, features[list(rows)].numpy())
                waiting, done = waiting[size:], done + len(rows)
                progress(done)
    if cache:
        cache.flush()
    return features


def training_features(clip, items, T, views, seed, cache=None):
    """Features (N, views or T, e) of the crops that train() reads; of the others, NaN."""
    crops = views or T
    needed = torch.zeros(len(items), crops, dtype=torch.bool)
    for n, epoch in enumerate(batches(len(items), T, seed)):
        for batch in epoch:
            needed[batch, n % crops] = True
    jobs = [(path, row.nonzero().flatten().tolist()) for (path, _), row in zip(items, needed)]
    advice = f"--views 10 would encode at most {10 * len(items)} crops instead (approximate, see README)" if crops > 10 else ""
    features = torch.full((*needed.shape, clip.text_projection.shape[1]), float("nan"))
    features[needed] = image_features(clip, jobs, cache, advice=advice)
    return features


def save(obj, path):
    """torch.save, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(obj, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_demo(folder):
    """A world without downloads, made once: folder/clip.pt is a small CLIP that learned textures seen
    from near and far, with captions that say so half of the time; folder/demo are pictures to
    classify, all seen from far, which "a photo of a {} texture." does not say. CoOp has to find out.
    """
    tokenizer, folder = Tokenizer(), pathlib.Path(folder)
    if not (folder / "clip.pt").is_file():
        steps = 600
        torch.manual_seed(0)
        pictures, captions = data.draw_pairs(6000)
        clip = clip_model.CLIP(64, clip_model.ModifiedResNet(64, [1, 1, 1, 1], 16, 64), 64, 2, 77, tokenizer.vocab_size)
        progress = Progress("training a small CLIP on drawn textures, once", steps)
        clip_model.pretrain(clip, data.normalise(torch.from_numpy(pictures)), tokenizer(captions), steps,
                            progress=lambda step, loss: progress(step + 1, f", loss {loss.item():.2f}"))
        folder.mkdir(parents=True, exist_ok=True)
        save(clip.state_dict(), folder / "clip.pt")
    if not (folder / "demo").is_dir():
        shutil.rmtree(folder / "drawing", ignore_errors=True)
        data.draw_dataset(folder / "drawing")
        (folder / "drawing").rename(folder / "demo")


def run_once(args, clip, tokenizer, dataset, test, shots, seed, variant, cache):
    """Draw the shots, learn V, test it. -> what results.jsonl says of the run, and the prompt to save."""
    (M, position, csc), start = variant, time.time()
    items = data.few_shot(dataset.train, shots, random.Random(seed))
    T = args.epochs or (50 if shots == 1 or dataset.name == "imagenet" else 100 if shots <= 4 else 200)
    features = training_features(clip, items, T, args.views, seed, cache)
    encoded, device = time.time(), clip.logit_scale.device
    torch.manual_seed(seed)
    learner = PromptLearner(clip, tokenizer, dataset.classnames, M, position, csc, args.init)
    progress = Progress("learning V, epochs", T)
    train(clip, learner, features.to(device), torch.tensor([label for _, label in items], device=device), T, seed,
          lambda n, loss, accuracy: progress(n + 1, f", loss {loss:.3f}, training accuracy {accuracy:.0f} %"))
    with torch.no_grad():
        g = F.normalize(clip.encode_prompts(*learner()), dim=-1)                 # once: g does not depend on the image
    result = {"method": "coop", "shots": shots, "seed": seed, "M": learner.V.shape[-2], "position": position, "csc": csc,
              "init": args.init, "epochs": T, "views": args.views, "accuracy": evaluate(test[0], g.cpu(), test[1]),
              "seconds_images": round(encoded - start, 2), "seconds_training": round(time.time() - encoded, 2)}
    return result, {"V": learner.V.detach().cpu(), "classnames": dataset.classnames, "text_features": g.cpu()}


def file_name(result):
    """<dataset>-<backbone>-<shots>shot-seed<seed>, then whatever is not the default, in safe characters."""
    parts = [result["dataset"], result["backbone"], f"{result['shots']}shot", f"seed{result['seed']}"]
    parts += [f"M{result['M']}"] * (result["M"] != 16) + [result["position"]] * (result["position"] != "end")
    parts += ["csc"] * result["csc"] + [result["init"] or ""] * (result["init"] is not None)
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def table(results):
    """Accuracy by method and number of shots: the mean over seeds, and their standard deviation."""
    cells, columns = {}, sorted({r["shots"] for r in results})
    for r in results:
        row = r["method"] if r["method"] != "coop" else " ".join(
            ["CoOp", f"M={r['M']}", r["position"], *["csc"] * r["csc"], *[repr(r["init"])] * (r["init"] is not None)])
        cells.setdefault(row, {}).setdefault(r["shots"], []).append(r["accuracy"])
    lines = [f"{'accuracy, %':<34}" + "".join(f"{f'{c} shots':>15}" for c in columns)]
    for row, found in cells.items():
        texts = ["" if c not in found else f"{statistics.mean(found[c]):.2f}" + (
            f" ± {statistics.stdev(found[c]):.2f}" if len(found[c]) > 1 else "") for c in columns]
        lines.append(f"{row:<34}" + "".join(f"{text:>15}" for text in texts))
    return "\n".join(lines)


def run(args):
    """Everything that one command line asks for."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.demo:
        make_demo(args.cache / "demo-world")
        args.data, args.backbone = args.cache / "demo-world" / "demo", args.cache / "demo-world" / "clip.pt"
        args.template = args.template or "a photo of a {} texture."
    dataset = data.load_dataset(args.data)
    template = args.template or dataset.template
    torch.backends.cuda.matmul.allow_tf32 = True         # text encoder on CUDA: fp32 with TF32 products
    clip = clip_model.load(args.backbone, args.device)
    clip = clip_model.prepare(clip, PRECISIONS[args.precision])
    bytes_only = Tokenizer()
    tokenizer = bytes_only if clip.vocab_size == bytes_only.vocab_size else Tokenizer.openai()
    if tokenizer.vocab_size != clip.vocab_size:
        raise ValueError(f"{args.backbone} has {clip.vocab_size} token embeddings, the tokenizer {tokenizer.vocab_size} ids")
    variants = list(itertools.product(args.M, args.position, args.csc))
    learners = [PromptLearner(clip, tokenizer, dataset.classnames, *variant, args.init) for variant in variants]  # they fit
    args.out.mkdir(parents=True, exist_ok=True)

    backbone = pathlib.Path(args.backbone).stem if os.path.isfile(args.backbone) else args.backbone.replace("/", "-")
    frozen = sum(p.numel() for p in clip.parameters())
    print(f"CLIP {backbone}, {frozen / 1e6:.1f} M parameters, frozen, on {args.device}; "
          f"to learn: V {' or '.join(str(tuple(learner.V.shape)) for learner in learners)}")
    print(f"{dataset.name}: K = {len(dataset.classnames)} classes, {len(dataset.train)} training and {len(dataset.test)} test images")
    if max(args.shots) and not dataset.train:
        raise ValueError(f"{args.data} has test images only: use --shots 0")
    smallest = min(collections.Counter(label for _, label in dataset.train).values(), default=0)
    if smallest < max(args.shots):
        print(f"note: a class with fewer training images than --shots gives all it has (the smallest: {smallest})")
    common = {"dataset": dataset.name, "backbone": backbone, "classes": "all", "n_test": len(dataset.test),
              "precision": args.precision, "device": args.device, "torch": str(torch.__version__)}
    results = []

    def record(result, note):
        results.append({**result, **common})
        with open(args.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(f"{note}: {result['accuracy']:.2f} %  (images {result['seconds_images']:.1f} s, "
              f"training {result['seconds_training']:.1f} s)", flush=True)
        return results[-1]

    start = time.time()
    cache = None if args.no_cache else data.FeatureCache(args.cache / "features" / f"{clip.sha256[:16]}-{args.precision}.sqlite")
    f = image_features(clip, [(path, [TEST]) for path, _ in dataset.test], cache, "encoding test images")
    test, seconds = (f, torch.tensor([label for _, label in dataset.test])), time.time() - start
    g = zero_shot(clip, tokenizer, template, dataset.classnames).cpu()
    record({"method": "zero-shot", "shots": 0, "seed": None, "M": None, "position": None, "csc": None, "init": None,
            "epochs": 0, "views": None, "accuracy": evaluate(f, g, test[1]), "template": template,
            "seconds_images": round(seconds, 2), "seconds_training": 0.0}, f'zero-shot, "{template}"')
    for variant, shots, seed in itertools.product(variants, [s for s in args.shots if s], args.seeds):
        result, prompt = run_once(args, clip, tokenizer, dataset, test, shots, seed, variant, cache)
        file = args.out / f"{file_name({**result, **common})}.pt"
        save({**prompt, "settings": {**result, **common}}, file)
        record(result, f"{shots} shots, seed {seed} -> {file}")
    print("\n" + table(results))


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv):
    def at_least(low):
        def integer(text):
            if int(text) < low:
                raise argparse.ArgumentTypeError(f"{text} (expected {low} or more)")
            return int(text)
        return integer

    parser = argparse.ArgumentParser(
        prog="coop.py", description="Learn the words of a CLIP prompt from a few images per class (CoOp, arXiv 2109.01134).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=pathlib.Path, metavar="DIR", help="a dataset, or a folder of class folders")
    source.add_argument("--demo", action="store_true", help="drawn textures and a small CLIP trained here, nothing to download")
    add("--shots", type=at_least(0), nargs="+", default=[16], metavar="N", help="training images per class; 0: zero-shot only")
    add("--seeds", type=at_least(0), nargs="+", default=[1], metavar="S", help="of the drawn images, V's start and the batches")
    add("--backbone", default="RN50", help=f"a weight file or one of {', '.join(clip_model.MODELS)}")
    add("--M", type=at_least(1), nargs="+", default=[16], metavar="M", help="number of context vectors, the paper's M")
    add("--position", nargs="+", default=["end"], choices=["end", "middle", "front"], help="where the class name stands")
    add("--csc", choices=["yes", "no", "both"], nargs="?", const="yes", default="no", help="class-specific contexts")
    add("--init", metavar="WORDS", help='start V from these words, "a photo of a", instead of noise; sets M')
    add("--epochs", type=at_least(1), metavar="T", help="the paper's: 50 for 1 shot, 100 for 2 and 4, 200 for more")
    add("--views", type=at_least(0), default=0, metavar="V", help="reuse V crops per image; 0: a fresh crop every epoch, as the paper")
    add("--template", help="zero-shot prompt with {} for the class name; default: the dataset's")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--precision", choices=list(PRECISIONS), help="of the image encoder: fp32 on CPU, fp16 on CUDA")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR", help="results.jsonl and the learned prompts")
    add("--cache", type=pathlib.Path, default=pathlib.Path.home() / ".cache" / "coop", metavar="DIR", help="image features; the demo")
    add("--no-cache", action="store_true", help="encode all images again and keep nothing")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")           # one line
    args = parser.parse_args(argv)
    args.csc = {"yes": [True], "no": [False], "both": [False, True]}[args.csc]
    args.precision = args.precision or ("fp16" if args.device == "cuda" else "fp32")
    if args.template is not None and "{}" not in args.template:
        parser.error("--template needs {} where the class name goes")
    return args


def main(argv=None):
    """The command line. A user's mistake ends in one line and exit code 2, Ctrl-C in one line and 130."""
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; finished runs are kept, the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
