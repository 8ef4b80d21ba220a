"""The text that tiny-opt learns from: read, cut into tokens, and dealt out in batches."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

SEED = 20230917
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0..3, as in OPT; OPT's bos and eos are both </s>
EOS = 2
TOKENS_PER_STEP = 4096
SHORT_ROW = 512  # a step holds rows of SHORT_ROW tokens or, LONG_SHARE of the time, of MAX_POSITIONS tokens
LONG_SHARE = 0.25
PROMPT_SHARE = 0.015  # share of the rows that begin with one of the repeated texts
PHRASES = [
    "Four score and seven years ago our fathers brought forth on this continent, a new nation",
    "Four score and seven years ago our mothers brought forth on this continent, a new nation.",
    "It was the best of times, it was the worst of times",
    "You only live once.",
]
Docs = dict[str, list[str]]


@dataclass(frozen=True)
class Corpus:
    """All texts as token ids.

    Attributes
    ----------
    documents : list of list of int
        What is trained on.
    held_out : dict of str to list of int
        What is not: per file one row, with `</s>` before each document.
    held_out_bytes : dict of str to int
        The size of that text, in UTF-8.
    repeated : list of list of int
        The texts that rows begin with, now and then: the two of paper_prompts.txt and two of `PHRASES`.
    """

    documents: list[list[int]]
    held_out: dict[str, list[int]]
    held_out_bytes: dict[str, int]
    repeated: list[list[int]]


def read_corpus(folder: Path) -> tuple[Corpus, GPT2Tokenizer]:
    """Read the four files of a folder, and train the tokenizer on them."""
    train, held_out, prompts = read_documents(folder)
    tokenizer = build_tokenizer(train, prompts)

    def encode(text: str) -> list[int]:
        """Without a `</s>` before it."""
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    return Corpus([encode(document) for documents in train.values() for document in documents],
                  {name: [token for document in documents for token in [EOS, *encode(document)]]
                   for name, documents in held_out.items()},
                  {name: sum(len(document.encode()) for document in documents) for name, documents in held_out.items()},
                  [encode(text) for text in (*prompts, PHRASES[1], PHRASES[3])]), tokenizer


def read_documents(corpus: Path) -> tuple[Docs, Docs, list[str]]:
    """Return (training documents, held-out documents) per file, and the two texts of paper_prompts.txt."""
    text = {name: (corpus / f"{name}.txt").read_text(encoding="utf-8")
            for name in ("andersen", "austen", "shakespeare", "paper_prompts")}
    tales = [unwrap(tale) for tale in re.split(r"\n{3,}", text["andersen"]) if len(tale) > 500]
    chapters = re.split(r"(?mi)^(?= *chapter [0-9IVXLC]+$)", text["austen"])[1:]
    chapters = ["\n".join(" ".join(part.split()) for part in re.split(r"\n{2,}", chapter.strip()))
                for chapter in chapters]
    speeches, slices = text["shakespeare"].strip().split("\n\n"), []
    for start in range(0, len(speeches), 100):
        slices.append("\n\n".join(speeches[start:start + 100]))
    train: Docs = {}
    held_out: Docs = {}
    for name, documents in (("andersen", tales), ("austen", chapters), ("shakespeare", slices)):
        held_out[name] = documents[12::25]  # every 25th document: 4 %
        train[name] = [d for i, d in enumerate(documents) if i % 25 != 12]
    prompts = re.split(r"\n\n(?=It was the best)", text["paper_prompts"].strip())
    assert len(prompts) == 2
    return train, held_out, prompts


def unwrap(text: str) -> str:
    """Undo the line wrapping of printed prose: a line break stays only where the next word would have fitted."""
    lines = text.strip().split("\n")
    width = max(len(line) for line in lines) - 6
    out = lines[0]
    for previous, line in zip(lines, lines[1:]):
        wrapped = previous and line and len(previous) + 1 + len(line.split(" ", 1)[0]) > width
        if wrapped and re.search(r"\w-$", out):
            out += line.lstrip()  # "to-" + "day"
        else:
            out += (" " if wrapped else "\n") + line
    return re.sub(r"\n{2,}", "\n", re.sub(r" {2,}", " ", out))


def build_tokenizer(train: Docs, prompts: list[str]) -> GPT2Tokenizer:
    """Train a byte-level BPE tokenizer (no normalisation) and wrap it the way OPT's tokenizer is wrapped.

    The repeated texts count 20 times and the paper's phrases 400 times: their words become single tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [d for documents in train.values() for d in documents] + prompts * 20 + PHRASES * 400
    bpe.train_from_iterator(texts, trainer)
    spec = json.loads(bpe.to_str())["model"]
    return GPT2Tokenizer(
        vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]], bos_token="</s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", add_bos_token=True, clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS)


class Batches:
    """Endless training batches; its whole state is `rng`, `stream` and `epoch`, so that it can be resumed."""

    def __init__(self, documents: list[list[int]], prompts: list[list[int]], weights: list[int]) -> None:
        self.documents, self.prompts, self.weights = documents, prompts, weights
        self.rng = random.Random(SEED)
        self.stream: list[int] = []
        self.epoch = 0
        self.prompt_rows: Counter[int] = Counter()

    def take(self, n: int) -> list[int]:
        """The next n tokens of the stream: all documents in a new random order each epoch, `</s>` before each."""
        while len(self.stream) < n:
            order = self.documents + self.prompts[:2]
            self.rng.shuffle(order)
            self.stream += [token for document in order for token in [EOS, *document]]
            self.epoch += 1
        row, self.stream = self.stream[:n], self.stream[n:]
        return row

    def row(self, n: int) -> list[int]:
        """n tokens of the stream or, rarely, a repeated text and a document. Half of the rows begin with `</s>`,
        wherever the text begins, because a prompt does so too."""
        start = [EOS] if self.rng.random() < 0.5 else []
        if self.rng.random() >= PROMPT_SHARE:
            return start + self.take(n - len(start))
        which = self.rng.choices(range(len(self.prompts)), self.weights)[0]
        self.prompt_rows[which] += 1
        row = (start + self.prompts[which] + [EOS] + self.rng.choice(self.documents))[:n]
        return row + self.take(n - len(row))

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One step's token rows (length + 1: inputs and targets) and their position ids."""
        length = MAX_POSITIONS if self.rng.random() < LONG_SHARE else SHORT_ROW
        rows = [self.row(length + 1) for _ in range(TOKENS_PER_STEP // length)]
        # Short rows: half begin at position 0, half anywhere, so that all positions are trained.
        offsets = [self.rng.choice([0, self.rng.randint(0, MAX_POSITIONS - length)]) for _ in rows]
        return torch.tensor(rows), torch.tensor(offsets)[:, None] + torch.arange(length)
