"""What a finished model is: its files, and the card that says how it was made and how good it is."""

from __future__ import annotations

import argparse
import json
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import tokenizers
import torch
import transformers
from transformers import GPT2Tokenizer, OPTForCausalLM

from .corpus import LONG_SHARE, MAX_POSITIONS, SEED, SHORT_ROW, TOKENS_PER_STEP, Batches, Corpus
from .losses import evaluate, unigram_losses


@dataclass
class Progress:
    """How far a training run has come.

    Attributes
    ----------
    elapsed : float
        Seconds by the clock.
    steps : int
        Steps of the optimizers.
    history : list of (float, int, dict)
        Minutes, step and held-out losses of each measurement so far.
    rates : list of (int, float, float)
        First step, Muon's peak rate, AdamW's: they can change when a run is resumed.
    """

    elapsed: float = 0.0
    steps: int = 0
    history: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)
    rates: list[tuple[int, float, float]] = field(default_factory=list)


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
           corpus: Corpus, batches: Batches, progress: Progress) -> None:
    """Write config, weights (float16) and tokenizer to args.out, measure what was written, and write the card."""
    model.eval()
    full = evaluate(model, corpus.held_out, pool)["total"]
    model.half().save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.out)
    model = OPTForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()  # the float16 weights, exactly
    losses, unigram = evaluate(model, corpus.held_out, pool), unigram_losses(corpus.documents, corpus.held_out)
    card = CARD.format(
        parameters=model.num_parameters() / 1e6, vocabulary=len(tokenizer), positions=MAX_POSITIONS,
        table=loss_table(corpus, losses, unigram), total=losses["total"], unigram=unigram["total"], full=full,
        samples=samples(model, tokenizer), short=SHORT_ROW, long_share=LONG_SHARE, seed=SEED,
        note=args.note and f"\n{args.note}\n", threads=args.threads, python=platform.python_version(),
        torch=torch.__version__, transformers=transformers.__version__, tokenizers=tokenizers.__version__,
        **story(corpus, batches, progress))
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def loss_table(corpus: Corpus, losses: dict[str, float], unigram: dict[str, float]) -> str:
    """One line per held-out file, and one for all of them."""
    size = corpus.held_out_bytes | {"total": sum(corpus.held_out_bytes.values())}
    tokens = {name: len(ids) for name, ids in corpus.held_out.items()}
    tokens["total"] = sum(tokens.values())
    return "\n".join(
        f"| {name} | {tokens[name]:,} | {size[name] / tokens[name]:.2f} | {losses[name]:.3f} "
        f"| {math.exp(losses[name]):.1f} | {unigram[name]:.3f} | {math.exp(unigram[name]):.1f} |" for name in losses)


def samples(model: OPTForCausalLM, tokenizer: GPT2Tokenizer) -> str:
    """The continuations, as they came."""
    return "\n\n".join(f"{how}, prompt {json.dumps(prompt)}:\n\n```text\n{prompt}{text}\n```"
                       for prompt, how, text in continuations(model, tokenizer))


def story(corpus: Corpus, batches: Batches, progress: Progress) -> dict[str, object]:
    """What the card tells of the training run."""
    tokens, train_tokens, rows = progress.steps * TOKENS_PER_STEP, sum(map(len, corpus.documents)), batches.prompt_rows
    return {
        "curve": "\n".join(f"| {minutes:.0f} | {step:,} | {loss['total']:.3f} |"
                           for minutes, step, loss in progress.history),
        "minutes": progress.elapsed / 60, "rate": tokens / progress.elapsed, "steps": progress.steps,
        "step_tokens": TOKENS_PER_STEP, "tokens": tokens / 1e6, "train_tokens": train_tokens / 1e6,
        "passes": tokens / train_tokens, "epochs": batches.epoch, "gettysburg": rows[0], "tale": rows[1],
        "mothers": rows[2], "once": rows[3],
        "rates": "; ".join(f"Muon {muon:g} and AdamW {adam:g} from step {step:,}"
                           for step, muon, adam in progress.rates)}


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
