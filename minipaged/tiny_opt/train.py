"""Train the small OPT model that is bundled with minipaged, on a CPU, within a wall-clock budget.

    python -m minipaged.tiny_opt.train --corpus DIR --out DIR [--minutes 60] [--resume]

DIR holds andersen.txt, austen.txt, shakespeare.txt (general text) and paper_prompts.txt (two short
texts that are repeated, so that the examples of the PagedAttention paper can be run with this model).
The script trains the tokenizer and the model, measures both on held-out text, and writes a checkpoint
in Hugging Face format together with its model card.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from .card import Progress, export
from .corpus import MAX_POSITIONS, SEED, TOKENS_PER_STEP, VOCAB_SIZE, Batches, read_corpus
from .losses import evaluate, token_losses

MICRO_TOKENS = 1024  # a step is computed in parts of so many tokens (or of one row, if that is longer)
SAVE_SECONDS = 120


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


def add_gradients(model: OPTForCausalLM, rows: torch.Tensor, positions: torch.Tensor) -> float:
    """Forward and backward of a part of a step, in bfloat16; the gradients add up in `.grad`."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_losses(model, rows, positions).sum() / TOKENS_PER_STEP
    loss.backward()
    return loss.item()


class Training:
    """A run: the model, what it learns from, and how far it has come.

    Parameters
    ----------
    args : argparse.Namespace
        The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        # One torch thread in each of a few Python threads: they share out the parts of a step as they get free, which
        # loses far less than torch's own threads when other programs use the same cores.
        torch.set_num_threads(1)
        self.args = args
        self.pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.corpus, self.tokenizer = read_corpus(args.corpus)
        self.batches = Batches(self.corpus.documents, self.corpus.repeated, weights=[12, 10, 2, 2])
        self.model = build_model()
        self.optimizers = build_optimizers(self.model)
        self.progress = Progress()
        if args.resume:
            self.load()
        rates = self.progress.rates
        if not rates or rates[-1][1:] != (args.muon_lr, args.adam_lr):
            rates.append((self.progress.steps, args.muon_lr, args.adam_lr))

    def run(self) -> None:
        """Train until the wall-clock budget is spent, then write the checkpoint and its card to args.out."""
        progress, budget, recent = self.progress, self.args.minutes * 60, []
        last_save, last_eval, start = progress.elapsed, progress.elapsed, time.monotonic() - progress.elapsed
        while progress.elapsed < budget:
            recent = [*recent[-49:], self.step(progress.elapsed / budget)]
            progress.elapsed = time.monotonic() - start
            if progress.steps % 50 == 0:
                print(f"{progress.elapsed / 60:5.1f} min  step {progress.steps}  epoch {self.batches.epoch}  "
                      f"loss {sum(recent) / len(recent):.3f}", flush=True)
            if progress.elapsed - last_eval > self.args.eval_minutes * 60:
                last_eval = progress.elapsed
                self.measure()
                progress.elapsed = time.monotonic() - start
            if progress.elapsed - last_save > SAVE_SECONDS or progress.elapsed >= budget:
                last_save = progress.elapsed
                self.save()
        export(self.args, self.model, self.tokenizer, self.pool, self.corpus, self.batches, progress)

    def step(self, done: float) -> float:
        """One step of the optimizers, when this share of the time is over; returns the loss before it."""
        for optimizer in self.optimizers:
            peak = self.args.muon_lr if isinstance(optimizer, torch.optim.Muon) else self.args.adam_lr
            optimizer.param_groups[0]["lr"] = peak * lr_factor(done)
        rows, positions = self.batches.batch()
        parts = TOKENS_PER_STEP // max(MICRO_TOKENS, positions.shape[1])
        loss = sum(self.pool.map(lambda part: add_gradients(self.model, *part),
                                 list(zip(rows.chunk(parts), positions.chunk(parts)))))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        list(self.pool.map(lambda optimizer: optimizer.step(), self.optimizers))
        self.model.zero_grad()
        self.progress.steps += 1
        return loss

    def measure(self) -> None:
        """Put the held-out losses into the history."""
        losses = evaluate(self.model, self.corpus.held_out, self.pool)
        self.progress.history.append((self.progress.elapsed / 60, self.progress.steps, losses))
        print("      held out:", {name: round(loss, 3) for name, loss in losses.items()}, flush=True)

    def save(self) -> None:
        """Write a checkpoint so that a crash leaves either the old or the new one."""
        temporary = self.args.checkpoint.with_suffix(".tmp")
        torch.save({
            "model": self.model.state_dict(), "optimizers": [one.state_dict() for one in self.optimizers],
            "batches": {name: getattr(self.batches, name) for name in ("rng", "stream", "epoch", "prompt_rows")},
            "torch_rng": torch.get_rng_state(), "progress": vars(self.progress)}, temporary)
        os.replace(temporary, self.args.checkpoint)

    def load(self) -> None:
        """Go on from that checkpoint."""
        state = torch.load(self.args.checkpoint, weights_only=False)  # our own file: it also holds Python objects
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        vars(self.batches).update(state["batches"])
        torch.set_rng_state(state["torch_rng"])
        vars(self.progress).update(state["progress"])
        print(f"resumed at step {self.progress.steps}, {self.progress.elapsed / 60:.1f} minutes", flush=True)


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
    Training(parser.parse_args()).run()


if __name__ == "__main__":
    main()
