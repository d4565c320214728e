"""CLIP's tokenizer: text becomes the ids that CLIP's text encoder reads, by byte-pair encoding.

    python tokenizer.py "a photo of a cat"            # a worked trace, merge by merge

    from tokenizer import Tokenizer
    tokenizer = Tokenizer.openai()                    # CLIP's vocabulary, 49,408 entries
    tokenizer.encode("a photo of a cat")              # [320, 1125, 539, 320, 2368]
    tokenizer(["a photo of a cat", "two dogs"])       # (2, 77): sot, ids, eot, then zeros

Why bytes?  Any text in any script is a string of bytes, so 256 base tokens can spell everything
and nothing is ever "unknown".  Byte-pair encoding (Sennrich et al., arXiv 1508.07909) then gives
frequent byte strings tokens of their own: `learn_merges` below is the whole idea.

Why `</w>`?  CLIP's encoding has no token for the space.  The last byte of every word carries the
mark `</w>` ("end of word") instead, so that "a cat" and "acat" differ, and so do "car" the word
and "car" the beginning of "carpet".

Where 49,408 comes from, in the order of the ids:

    0 .. 255          one entry per byte
    256 .. 511        one entry per byte that ends a word
    512 .. 49405      48,894 merges, the most frequent first
    49406, 49407      <|startoftext|> (sot) and <|endoftext|> (eot)

Know before: nothing.  To take away: a frequent word is one token, a rare word is several, and the
ids mean nothing by themselves.  Needs torch, ftfy and regex, and no other file of this project.
"""
import collections
import gzip
import hashlib
import html
import importlib.util
import itertools
import os
import pathlib
import socket
import sys
import tempfile
import zlib

import ftfy
import regex
import torch

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
COMMIT = "d05afc436d78f1c48dc0dbf8e5980a9d471f35f6"
URL = f"https://raw.githubusercontent.com/openai/CLIP/{COMMIT}/clip/{VOCABULARY}"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
N_MERGES = 49152 - 256 - 2     # the file lists more pairs; CLIP was trained with this many
TIMEOUT = 30                   # seconds without an answer until a download is given up

# How a text falls into words before any merging: merges never cross the border of a word.
WORDS = regex.compile(r"""
    <\|startoftext\|> | <\|endoftext\|>        # the two special tokens stay whole
  | 's | 't | 're | 've | 'm | 'll | 'd        # what an apostrophe glues to an English word
  | \p{L}+                                     # letters, of any script
  | \p{N}                                      # digits, one at a time: 224 is 2, 2, 4
  | [^\s\p{L}\p{N}]+                           # a run of anything else: "...", ":-)"
""", regex.VERBOSE | regex.IGNORECASE)


def byte_symbols():
    """{byte: the printable character that stands for it}, in the order of CLIP's first 256 ids.

    A vocabulary is a text file with a space between the two halves of a pair, so no symbol may be
    a space or a control character.  Bytes that are visible characters in Latin-1 stand for
    themselves and come first; the other 68, in rising order, borrow the characters from 256 on.
    """
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    symbols = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(visible))
    return symbols


SYMBOLS = byte_symbols()


def clean(text):
    """Repair broken Unicode, undo HTML entities (twice: "&amp;amp;"), single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def spell(word):
    """The symbols of a word, one per byte: "cat" -> ["c", "a", "t</w>"]."""
    parts = [SYMBOLS[byte] for byte in word.encode("utf-8")]
    parts[-1] += "</w>"
    return parts


def merge(parts, pair):
    """Join every occurrence of the pair, from left to right, into one symbol."""
    merged = []
    i = 0
    while i < len(parts):
        if tuple(parts[i:i + 2]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


def learn_merges(texts, limit):
    """Byte-pair encoding: join the most frequent pair of neighbors, again and again.

    Returns up to `limit` pairs in the order in which they were learned, fewer when every word has
    become one symbol.  Of equally frequent pairs the last in alphabetical order comes first.
    CLIP's 48,894 merges were learned in this way from a large text; the demo learns its own.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(WORDS.findall(clean(text)))
    spelled = {word: spell(word) for word in counts}
    merges = []
    while len(merges) < limit:
        pairs = collections.Counter()
        for word, count in counts.items():
            for pair in itertools.pairwise(spelled[word]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        spelled = {word: merge(parts, best) for word, parts in spelled.items()}
        merges.append(best)
    return merges


class Tokenizer:
    """Text to ids and back.

    merges: pairs of symbols, the first learned first; without any, every byte is a token.
    sot, eot: ids of start and end of text.  eot is the largest id of all, which is how CLIP's text
    encoder finds it.  vocab_size: 514 + the number of merges.
    """

    def __init__(self, merges=()):
        merges = [tuple(pair) for pair in merges]
        single = list(SYMBOLS.values())
        self.tokens = single + [symbol + "</w>" for symbol in single]
        self.tokens += ["".join(pair) for pair in merges]
        self.tokens += ["<|startoftext|>", "<|endoftext|>"]
        self.vocab_size = len(self.tokens)
        self.sot = self.vocab_size - 2
        self.eot = self.vocab_size - 1
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        # word -> ids, filled as words occur
        self.cache = {"<|startoftext|>": [self.sot], "<|endoftext|>": [self.eot]}

    @classmethod
    def openai(cls, path=None):
        """The tokenizer of all of OpenAI's CLIP models, from the vocabulary file at path.

        Without a path: from ~/.cache/clip, from an installed `clip` or `open_clip`, or a download
        (1.4 MB), all three with the right checksum.  Raises OSError if none can be had, ValueError
        if the file at path is not such a vocabulary.
        """
        path = pathlib.Path(path or find_vocabulary())
        expected = f"expected {VOCABULARY}, a header and {N_MERGES} lines of two symbols"
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is not CLIP's vocabulary: {error} ({expected})") from None
        merges = [tuple(line.split()) for line in lines[1:N_MERGES + 1]]      # line 0: a header
        if len(merges) < N_MERGES or any(len(pair) != 2 for pair in merges):
            raise ValueError(f"{path} is not CLIP's vocabulary: {expected}")
        return cls(merges)

    @classmethod
    def from_file(cls, path):
        """A tokenizer from a text file with one merge, two symbols, per line, as save() writes."""
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError(f"{path} is not a list of merges: expected two symbols per line")
        return cls(merges)

    def save(self, path):
        """Write the merges to a text file, one per line, the first learned first."""
        lines = [" ".join(pair) for pair in self.rank]
        pathlib.Path(path).write_text("\n".join(lines), encoding="utf-8")

    def merge_steps(self, word):
        """Yield the symbols of a word: as single bytes, then after each merge.

        The merge learned first goes first, wherever it stands in the word: that repeats the order
        in which the vocabulary was learned.
        """
        parts = spell(word)
        while True:
            yield parts
            pairs = [pair for pair in itertools.pairwise(parts) if pair in self.rank]
            if not pairs:
                return
            parts = merge(parts, min(pairs, key=self.rank.get))

    def encode(self, text):
        """str -> list of ids, without sot and eot."""
        ids = []
        for word in WORDS.findall(clean(text)):
            if word not in self.cache:
                *_, parts = self.merge_steps(word)
                self.cache[word] = [self.ids[part] for part in parts]
            ids += self.cache[word]
        return ids

    def decode(self, ids):
        """Ids -> str: lower case, a space after every word; bytes that are no UTF-8 are U+FFFD.

        Of a row of __call__ only the ids up to eot are text: the zeros behind it are "!", too.
        """
        byte = {symbol: b for b, symbol in SYMBOLS.items()}
        symbols = "".join(self.tokens[i] for i in ids)
        content = bytes(byte[symbol] for symbol in symbols)
        return content.decode("utf-8", errors="replace").replace("</w>", " ")

    def __call__(self, texts, length=77):
        """Text or N texts -> LongTensor (N, length): sot, ids, eot, then zeros.

        Raises ValueError, naming the text, if one needs more than `length` places.
        """
        if isinstance(texts, str):
            texts = [texts]
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [self.sot, *self.encode(text), self.eot]
            if len(ids) > length:
                raise ValueError(f"text of {len(ids)} tokens (with start and end) does not fit in "
                                 f"{length}: {text!r}")
            row[:len(ids)] = torch.tensor(ids)
        return rows


def find_vocabulary():
    """Path of a vocabulary with the right checksum; downloads it where there is none."""
    home = os.path.expanduser("~")
    if home == "~":                                        # there is no home directory
        home = tempfile.gettempdir()
    cached = pathlib.Path(home, ".cache", "clip", VOCABULARY)
    candidates = [cached]
    for package in ("clip", "open_clip"):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            candidates.append(pathlib.Path(spec.submodule_search_locations[0], VOCABULARY))
    for path in candidates:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
            return path
    print(f"downloading CLIP's vocabulary (1.4 MB) from {URL} to {cached}", file=sys.stderr)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:                             # torch.hub compares the checksum, then renames: atomic
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(cached), hash_prefix=SHA256)
    except Exception as error:       # no network, a login page, a full disk, a read-only home, ...
        raise OSError(f"CLIP's vocabulary is missing and cannot be downloaded ({error}): "
                      f"put {URL} at {cached}, or pip install --no-deps clip-anytorch, which "
                      "contains it") from None
    finally:
        socket.setdefaulttimeout(before)
    return cached


def main(texts):
    """Print how each text becomes ids."""
    tokenizer = Tokenizer.openai()
    for text in texts or ["a photo of a cat"]:
        print(f"text     {text!r}")
        print(f"cleaned  {clean(text)!r}")
        for word in WORDS.findall(clean(text)):
            if word in ("<|startoftext|>", "<|endoftext|>"):
                trace = "special, kept whole"
            else:
                trace = "  ->  ".join(" ".join(parts) for parts in tokenizer.merge_steps(word))
            print(f"  {word}:  {trace}   ids {tokenizer.encode(word)}")
        ids = [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot]
        print(f"ids      {ids}  ({len(ids)} of 77 places)")
        print(f"decoded  {tokenizer.decode(ids)!r}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")         # for terminals without UTF-8
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
