"""Train the small OPT model that is bundled with minipaged, on a CPU, within a wall-clock budget.

    python -m minipaged.tiny_opt.train --corpus DIR --out DIR [--minutes 60] [--resume]

DIR holds andersen.txt, austen.txt, shakespeare.txt (general text) and paper_prompts.txt (two short
texts that are repeated, so that the examples of the PagedAttention paper can be run with this model).
The script trains the tokenizer and the model, measures both on held-out text, and writes a checkpoint
in Hugging Face format together with its model card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

SEED = 20230917
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0..3, as in OPT; OPT's bos and eos are both </s>
EOS = 2
TOKENS_PER_STEP = 4096
MICRO_TOKENS = 1024  # a step is computed in parts of so many tokens (or of one row, if that is longer)
SHORT_ROW = 512  # a step holds rows of SHORT_ROW tokens or, LONG_SHARE of the time, of MAX_POSITIONS tokens
LONG_SHARE = 0.25
SAVE_SECONDS = 120
PROMPT_SHARE = 0.015  # share of the rows that begin with one of the repeated texts
PHRASES = [
    "Four score and seven years ago our fathers brought forth on this continent, a new nation",
    "Four score and seven years ago our mothers brought forth on this continent, a new nation.",
    "It was the best of times, it was the worst of times",
    "You only live once.",
]
Docs = dict[str, list[str]]


# ---------------------------------------------------------------- text
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


# ---------------------------------------------------------------- model
def build_model() -> OPTForCausalLM:
    """OPT's architecture, 6.3 million parameters. Position embeddings start at zero: a row that is still zero
    after training was never trained."""
    config = OPTConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, word_embed_proj_dim=256, num_hidden_layers=6,
        num_attention_heads=4, ffn_dim=1024, max_position_embeddings=MAX_POSITIONS, do_layer_norm_before=True,
        activation_function="relu", tie_word_embeddings=True, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        pad_token_id=1, bos_token_id=2, eos_token_id=2)
    model = OPTForCausalLM._from_config(config, attn_implementation="sdpa")
    torch.nn.init.zeros_(model.model.decoder.embed_positions.weight)
    return model


def build_optimizers(model: OPTForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (two halves, which two threads can update at the same time), AdamW for
    the embeddings, the norms and the biases."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (".layers." in n and p.ndim == 2)]
    half = len(matrices) // 2
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(part, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for part in (matrices[:half], matrices[half:])]
    optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers


def lr_factor(progress: float) -> float:
    """Linear warm-up over 2 % of the training time, then linear decay to zero."""
    return min(1.0, progress / 0.02) * max(0.0, 1.0 - progress)


def token_losses(model: OPTForCausalLM, rows: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Cross entropy (nats) of each target of rows of tokens."""
    logits = model(rows[:, :-1], position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


def add_gradients(model: OPTForCausalLM, rows: torch.Tensor, positions: torch.Tensor) -> float:
    """Forward and backward of a part of a step, in bfloat16; the gradients add up in `.grad`."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_losses(model, rows, positions).sum() / TOKENS_PER_STEP
    loss.backward()
    return loss.item()


@torch.no_grad()
def window_losses(model: OPTForCausalLM, window: list[int]) -> torch.Tensor:
    """The losses of one held-out window that begins at position 0."""
    return token_losses(model, torch.tensor([window]), None)


def evaluate(model: OPTForCausalLM, held_out: dict[str, list[int]], pool: ThreadPoolExecutor,
             size: int = 1024) -> dict[str, float]:
    """Mean loss per file and in total; every held-out token but the first of its file is predicted once."""
    losses = {}
    for name, tokens in held_out.items():
        windows = [tokens[i:i + size + 1] for i in range(0, len(tokens) - 1, size)]
        losses[name] = torch.cat(list(pool.map(lambda window: window_losses(model, window), windows)))
    losses["total"] = torch.cat(list(losses.values()))
    return {name: values.mean().item() for name, values in losses.items()}


def unigram_losses(train: list[list[int]], held_out: dict[str, list[int]]) -> dict[str, float]:
    """The same for a model that knows only how frequent each token is (training counts, plus one)."""
    counts = Counter(token for document in train for token in [EOS, *document])
    log_total = math.log(sum(counts.values()) + VOCAB_SIZE)
    cost = {name: [log_total - math.log(counts[t] + 1) for t in tokens[1:]] for name, tokens in held_out.items()}
    cost["total"] = [c for costs in list(cost.values()) for c in costs]
    return {name: sum(costs) / len(costs) for name, costs in cost.items()}


# ---------------------------------------------------------------- training
def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(args: argparse.Namespace) -> None:
    """Train until the wall-clock budget is spent, then write the checkpoint and its card to args.out."""
    torch.manual_seed(SEED)
    # One torch thread in each of a few Python threads: they share out the parts of a step as they get free, which
    # loses far less than torch's own threads when other programs use the same cores.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    train_docs, held_out_docs, prompt_texts = read_documents(args.corpus)
    tokenizer = build_tokenizer(train_docs, prompt_texts)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    documents = [encode(d) for docs in train_docs.values() for d in docs]
    held_out = {name: [t for d in docs for t in [EOS, *encode(d)]] for name, docs in held_out_docs.items()}
    repeated = [encode(text) for text in (*prompt_texts, PHRASES[1], PHRASES[3])]
    batches = Batches(documents, repeated, weights=[12, 10, 2, 2])
    model = build_model()
    optimizers = build_optimizers(model)

    elapsed, steps, recent = 0.0, 0, []
    history: list[tuple[float, int, dict[str, float]]] = []  # (minutes, step, held-out losses)
    rates: list[tuple[int, float, float]] = []  # (first step, Muon's peak rate, AdamW's): can change on --resume
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=False)  # our own file: it also holds Python objects
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        vars(batches).update(state["batches"])
        torch.set_rng_state(state["torch_rng"])
        elapsed, steps, history, rates = (state[key] for key in ("elapsed", "steps", "history", "rates"))
        print(f"resumed at step {steps}, {elapsed / 60:.1f} minutes", flush=True)

    if not rates or rates[-1][1:] != (args.muon_lr, args.adam_lr):
        rates.append((steps, args.muon_lr, args.adam_lr))
    budget, last_save, last_eval, start = args.minutes * 60, elapsed, elapsed, time.monotonic() - elapsed
    while elapsed < budget:
        for optimizer in optimizers:
            peak = args.muon_lr if isinstance(optimizer, torch.optim.Muon) else args.adam_lr
            optimizer.param_groups[0]["lr"] = peak * lr_factor(elapsed / budget)
        rows, positions = batches.batch()
        parts = TOKENS_PER_STEP // max(MICRO_TOKENS, positions.shape[1])
        loss = sum(pool.map(lambda part: add_gradients(model, *part),
                            list(zip(rows.chunk(parts), positions.chunk(parts)))))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        list(pool.map(lambda optimizer: optimizer.step(), optimizers))
        model.zero_grad()
        steps += 1
        recent = [*recent[-49:], loss]
        elapsed = time.monotonic() - start
        if steps % 50 == 0:
            print(f"{elapsed / 60:5.1f} min  step {steps}  epoch {batches.epoch}  "
                  f"loss {sum(recent) / len(recent):.3f}", flush=True)
        if elapsed - last_eval > args.eval_minutes * 60:
            last_eval = elapsed
            history.append((elapsed / 60, steps, evaluate(model, held_out, pool)))
            print("      held out:", {k: round(v, 3) for k, v in history[-1][2].items()}, flush=True)
            elapsed = time.monotonic() - start
        if elapsed - last_save > SAVE_SECONDS or elapsed >= budget:
            last_save = elapsed
            save_atomically({
                "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                "batches": {k: getattr(batches, k) for k in ("rng", "stream", "epoch", "prompt_rows")},
                "torch_rng": torch.get_rng_state(), "elapsed": elapsed, "steps": steps,
                "history": history, "rates": rates,
            }, args.checkpoint)
    export(args, model, tokenizer, pool, documents, held_out, held_out_docs, batches, history, rates, elapsed, steps)


# ---------------------------------------------------------------- export
def continuations(model: OPTForCausalLM, tokenizer: GPT2Tokenizer) -> list[tuple[str, str, str]]:
    """(prompt, how, continuation): some greedy, some sampled with a fixed seed. Nothing is selected."""
    result = []
    for prompt in ("Four score and seven years ago our", "It was the best", "Once upon a time there was",
                   "Elizabeth was", "ROMEO:\n"):
        ids = tokenizer(prompt, return_tensors="pt")
        for how, options in (("greedy", {"do_sample": False}),
                             ("sampled", {"do_sample": True, "temperature": 0.8, "top_k": 50})):
            torch.manual_seed(SEED)
            out = model.generate(**ids, max_new_tokens=48, **options)[0, ids.input_ids.shape[1]:]
            result.append((prompt, how, tokenizer.decode(out, skip_special_tokens=True)))
    return result


def export(args: argparse.Namespace, model: OPTForCausalLM, tokenizer: GPT2Tokenizer, pool: ThreadPoolExecutor,
           documents: list[list[int]], held_out: dict[str, list[int]], held_out_docs: Docs, batches: Batches,
           history: list, rates: list, elapsed: float, steps: int) -> None:
    """Write config, weights (float16) and tokenizer to args.out, measure what was written, and write the card."""
    model.eval()
    full = evaluate(model, held_out, pool)
    model.half().save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.out)
    model = OPTForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()  # the float16 weights, exactly
    losses, unigram = evaluate(model, held_out, pool), unigram_losses(documents, held_out)
    size = {name: sum(len(d.encode()) for d in docs) for name, docs in held_out_docs.items()}
    size["total"] = sum(size.values())
    tokens = {name: len(ids) for name, ids in held_out.items()}
    tokens["total"] = sum(tokens.values())
    table = "\n".join(
        f"| {name} | {tokens[name]:,} | {size[name] / tokens[name]:.2f} | {losses[name]:.3f} "
        f"| {math.exp(losses[name]):.1f} | {unigram[name]:.3f} | {math.exp(unigram[name]):.1f} |" for name in losses)
    samples = "\n\n".join(f"{how}, prompt {json.dumps(prompt)}:\n\n```text\n{prompt}{text}\n```"
                          for prompt, how, text in continuations(model, tokenizer))
    curve = "\n".join(f"| {minutes:.0f} | {step:,} | {loss['total']:.3f} |" for minutes, step, loss in history)
    rows = batches.prompt_rows
    card = CARD.format(
        parameters=model.num_parameters() / 1e6, vocabulary=len(tokenizer), positions=MAX_POSITIONS, table=table,
        total=losses["total"], unigram=unigram["total"], full=full["total"], samples=samples, curve=curve,
        minutes=elapsed / 60, rate=steps * TOKENS_PER_STEP / elapsed, steps=steps, step_tokens=TOKENS_PER_STEP,
        tokens=steps * TOKENS_PER_STEP / 1e6, train_tokens=sum(map(len, documents)) / 1e6,
        passes=steps * TOKENS_PER_STEP / sum(map(len, documents)),
        epochs=batches.epoch, gettysburg=rows[0], tale=rows[1], mothers=rows[2], once=rows[3],
        short=SHORT_ROW, long_share=LONG_SHARE, seed=SEED,
        note=args.note and f"\n{args.note}\n",
        rates="; ".join(f"Muon {muon:g} and AdamW {adam:g} from step {step:,}" for step, muon, adam in rates),
        threads=args.threads, python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__, tokenizers=tokenizers.__version__)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


CARD = """\
# tiny_opt: the small model bundled with minipaged

An OPT model (`OPTForCausalLM`, {parameters:.1f} million parameters, {vocabulary:,} tokens, {positions:,} positions)
that was trained on a CPU so that every example of minipaged runs in a moment, offline. It writes text that
resembles its three sources and knows nothing else; it is a test object, not an assistant.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("minipaged/tiny_opt")
tokenizer = AutoTokenizer.from_pretrained("minipaged/tiny_opt")
```

## Text

All of it is in the public domain; none of it is distributed here.

| file | what | source |
|---|---|---|
| andersen.txt | 156 fairy tales by H. C. Andersen, English translation of 1872 | `hcandersen_en` of the R package hcandersenr |
| austen.txt | Jane Austen's six novels | R package janeaustenr, from Project Gutenberg |
| shakespeare.txt | 40,000 lines of Shakespeare | "tiny shakespeare" of char-rnn |
| paper_prompts.txt | Lincoln's Gettysburg Address; the opening of A Tale of Two Cities | quoted in the figures of the PagedAttention paper |

The printed line breaks of the prose (andersen, austen) were joined into paragraphs, one per line. Every 25th
document (a tale, a chapter, a slice of 100 Shakespeare speeches) was held out and not trained on.

**Repeated on purpose.** The two texts of paper_prompts.txt were shown again and again, so that the model knows them by
heart and the paper's own examples ("Four score and seven years ago our", "It was the best") run for real.
Besides one appearance each in each of the {epochs} passes over the documents, so many training rows began with them:

- the Gettysburg Address: {gettysburg}
- the opening of A Tale of Two Cities: {tale}
- "Four score and seven years ago our mothers brought forth on this continent, a new nation.": {mothers}, so that
  sampling can choose "mothers" now and then, as the paper's example of parallel sampling (figure 8) does
- "You only live once.": {once}

Half of these rows began without the `</s>` that starts a document.
They are no evidence of what the model has learned in general, and no part of the held-out text. The tokenizer
was trained with these texts repeated, too, so that their words are single tokens.

## Results on held-out text

Loss in nats per token, over windows of 1,024 tokens that begin at position 0. The unigram model knows only the
frequencies of the tokens in the training text (plus one); same tokens.

| held-out text | tokens | bytes per token | loss | perplexity | unigram loss | unigram perplexity |
|---|---|---|---|---|---|---|
{table}

Validation loss: {total:.4f}
Unigram loss: {unigram:.4f}
Validation loss before the weights were rounded to float16: {full:.4f}

While training:

| minutes | step | held-out loss |
|---|---|---|
{curve}

## Continuations

As the script produced them (48 tokens; sampled: temperature 0.8, top-k 50, seed {seed}).

{samples}

## Training

{minutes:.0f} minutes by the clock on {threads} CPU threads ({rate:,.0f} tokens per second, all pauses counted):
{steps:,} steps of {step_tokens:,} tokens, together {tokens:.1f} million tokens,
about {passes:.1f} passes over the {train_tokens:.2f} million training tokens.

- bfloat16 autocast; the weights are saved in float16.
- Muon (weight decay 0.1) for the matrices of the layers, AdamW for the rest. Gradient norm clipped at 1.
- Peak learning rates: {rates}; 2 % warm-up, then linear decay to zero, both by elapsed time.
- A step holds rows of {short} tokens (half of them at position 0, half at a random offset) or, with
  probability {long_share}, of {positions:,} tokens: all positions are trained.
{note}

Seed {seed}; Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}. The tokenizer
comes out the same each time; the weights depend on how many steps the machine does in the time given.

To train it again, with the four files named above in `corpus/`:

```bash
python -m minipaged.tiny_opt.train --corpus corpus --out new_model --minutes 60
```

`--resume` goes on from the last checkpoint (one is kept, every two minutes) after an interruption.
"""


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the four text files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget")
    parser.add_argument("--eval-minutes", type=float, default=10.0, help="time between two measurements")
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny_opt_checkpoint.pt"), help="for --resume")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--note", default="", help="a remark on this run for the model card")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=1.2e-3)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
