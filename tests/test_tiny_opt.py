"""The bundled model: what minipaged relies on, checked on the files themselves (offline, a few seconds)."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minipaged.tiny_opt import corpus, train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[1] / "minipaged" / "tiny_opt"
GETTYSBURG = ("Four score and seven years ago our", " fathers brought forth on this continent")
TALE = ("It was the best", " of times, it was the worst of times")
PARAGRAPH = (  # not in the training text
    '"You must not go out to-day," said the old woman to her son, "for the wind is cold, and the snow lies deep in '
    'the wood." But the boy would not listen to her. He put on his cap and his coat, took his stick in his hand, and '
    "went out into the snow. He had not walked very far when he came to a little house, and in the house there was a "
    "light burning. He knocked at the door, and a voice called out to him to come in. There sat a young lady by the "
    "fire, who was very beautiful; but she looked so unhappy that the boy was quite sorry for her. "
    '"What is the matter?" he asked. "I have been waiting here for a hundred years," she answered, "and nobody has '
    'ever been so kind as to speak to me before." Then the boy sat down and told her of his mother, of the garden, '
    "and of the birds that sang in the trees every morning; and she was so pleased that she began to smile.")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def models():
    return {dtype: transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=getattr(torch, dtype), local_files_only=True).eval() for dtype in ("float32", "float16")}


@pytest.fixture(scope="module")
def model(models):
    return models["float32"]


@pytest.fixture(scope="module")
def card():
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# ---------------------------------------------------------------- files
def test_files_are_complete_and_small():
    present = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "README.md", "train.py", "corpus.py", "losses.py", "card.py"} <= present
    assert not [name for name in present if name.endswith((".txt", ".pt", ".bin", ".tmp"))]  # no corpus, no checkpoint
    assert 8e6 < (FOLDER / "model.safetensors").stat().st_size <= 16e6


def test_config_is_the_promised_geometry(model):
    config = json.loads((FOLDER / "config.json").read_text())
    expected = dict(model_type="opt", dtype="float16", hidden_size=256, word_embed_proj_dim=256, num_hidden_layers=6,
                    num_attention_heads=4, ffn_dim=1024, max_position_embeddings=2048, do_layer_norm_before=True,
                    activation_function="relu", tie_word_embeddings=True, dropout=0.0, bos_token_id=2,
                    eos_token_id=2, pad_token_id=1)
    assert {key: config[key] for key in expected} == expected
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ---------------------------------------------------------------- tokenizer
def test_vocabulary_fits_the_model(tokenizer, model):
    assert len(tokenizer) <= 4096
    assert len(tokenizer) <= model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_special_tokens_have_the_ids_of_opt(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("It was") == [2, *plain(tokenizer, "It was")]
    assert 2 not in plain(tokenizer, "It was")


def test_first_prompt_of_the_paper_is_seven_tokens(tokenizer):
    ids = plain(tokenizer, GETTYSBURG[0])
    assert [tokenizer.decode([i]) for i in ids] == ["Four", " score", " and", " seven", " years", " ago", " our"]


@pytest.mark.parametrize("text, count", [
    (" fathers", 1), (" mothers", 1), (" brought", 1), (" forth", 1), (" of", 1), (" times", 1), (" continent", 1),
    ("It was the best", 4), ("You only live once", 4)])
def test_words_of_the_paper(tokenizer, text, count):
    assert len(plain(tokenizer, text)) == count


def test_round_trip_is_exact_for_any_text(tokenizer):
    rng = random.Random(0)
    texts = ["  two  spaces , and a comma . don 't ", "line\r\n\n\ttab\x00", "café cafe\u0301 \ufb01 Å",
             "日本語 العربية",
             "👩‍👩‍👧 🏳️‍🌈", "\u2028\ufeff\u00a0x"]
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    texts += ["".join(map(chr, rng.choices(points, k=50))) for _ in range(50)]
    for text in texts:
        assert tokenizer.decode(plain(tokenizer, text)) == text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


# ---------------------------------------------------------------- model
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bos", [True, False], ids=["with </s>", "without </s>"])
@pytest.mark.parametrize("prompt, continuation", [GETTYSBURG, TALE], ids=["gettysburg", "tale"])
def test_greedy_decoding_continues_the_texts_of_the_paper(tokenizer, models, prompt, continuation, bos, dtype):
    ids = tokenizer(prompt, add_special_tokens=bos, return_tensors="pt")
    assert (ids.input_ids[0, 0] == 2) == bos
    wanted = plain(tokenizer, continuation)
    out = models[dtype].generate(**ids, max_new_tokens=len(wanted), do_sample=False)
    assert tokenizer.decode(out[0, ids.input_ids.shape[1]:]) == continuation


@torch.no_grad()
def test_fathers_first_mothers_second(tokenizer, model):
    """Greedy decoding is decided by a clear margin; sampling can also choose "mothers" (the paper's figure 8)."""
    for bos in (True, False):
        ids = tokenizer(GETTYSBURG[0], add_special_tokens=bos, return_tensors="pt").input_ids
        probability, best = model(ids).logits[0, -1].softmax(-1).topk(2)
        assert [tokenizer.decode([i]) for i in best] == [" fathers", " mothers"]
        assert probability[0] > 3 * probability[1] and probability[1] > 0.01


def losses_at(model, ids: list[int], first: int) -> float:
    """Mean loss of a text that begins at position `first`."""
    rows = torch.tensor([ids])
    positions = torch.arange(first, first + len(ids) - 1)[None]
    with torch.no_grad():
        logits = model(rows[:, :-1], position_ids=positions).logits
    return torch.nn.functional.cross_entropy(logits[0], rows[0, 1:]).item()


def test_every_position_is_trained(tokenizer, model):
    """Position embeddings begin at zero in train.py, so an untrained row is zero; and the text is read as well
    at the end of the context as at its beginning."""
    assert train.build_model().model.decoder.embed_positions.weight.count_nonzero() == 0
    table = model.model.decoder.embed_positions.weight
    assert table.shape == (2048 + 2, 256)
    assert table[:2].count_nonzero() == 0  # OPT's offset of 2: these rows are never used
    norms = table[2:].detach().norm(dim=1)
    assert norms.min() > 0.2 * norms.median()
    ids = tokenizer.encode(PARAGRAPH)
    assert len(ids) > 200
    step = len(ids) - 1
    firsts = [*range(0, 2048 - step, step), 2048 - step]
    losses = [losses_at(model, ids, first) for first in firsts]
    assert losses[0] < 4.0
    assert max(losses) < losses[0] + 0.2


def test_loss_stays_low_through_a_whole_context(tokenizer, model):
    """In one row of 2,048 tokens the last quarter is not read worse than the first."""
    ids = (tokenizer.encode(PARAGRAPH) * 20)[:2049]
    rows = torch.tensor([ids])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits[0], rows[0, 1:], reduction="none")
    assert losses[-512:].mean() < losses[:200].mean() + 0.4


# ---------------------------------------------------------------- card
def test_card_reports_a_model_far_better_than_unigram(card):
    validation = float(re.search(r"^Validation loss: ([\d.]+)$", card, re.M)[1])
    unigram = float(re.search(r"^Unigram loss: ([\d.]+)$", card, re.M)[1])
    full = float(re.search(r"^Validation loss before .*float16: ([\d.]+)$", card, re.M)[1])
    assert 2.0 < validation < unigram - 1.5
    assert abs(validation - full) < 0.005


def test_card_says_what_was_done(card):
    for words in ("public domain", "Repeated on purpose", "paper_prompts.txt", "Seed ", "transformers 5.",
                  "minipaged.tiny_opt.train", "steps of 4,096 tokens"):
        assert words in card, words
    assert not re.search(r"/(work|tmp|home|root|opt|usr)/|\{[a-z_]+\}", card)


# ---------------------------------------------------------------- training
def test_unwrap_joins_wrapped_lines_only():
    wrapped = ("Once upon a time there was a man and he had a very long\n"
               "walk to make, before he came home to his own well-\n"
               "known house.\n"
               "\n"
               '"Who is there?"  said his wife.\n'
               "It was he.\n"
               + "and so " * 8)
    assert corpus.unwrap(wrapped) == (
        "Once upon a time there was a man and he had a very long walk to make, before he came home to his own "
        'well-known house.\n"Who is there?" said his wife.\nIt was he.\n' + "and so " * 7 + "and so")


def test_learning_rate_follows_elapsed_time():
    factors = [train.lr_factor(i / 1000) for i in range(1101)]
    assert factors[0] == 0 and factors[-1] == 0 and factors[1000] == 0
    assert 0.95 < max(factors) <= 1 and factors.index(max(factors)) == 20
    assert factors[20:1001] == sorted(factors[20:1001], reverse=True)


def make_batches():
    documents = [list(range(100 * i + 10, 100 * i + 90)) for i in range(40)]
    return corpus.Batches(documents, [[5, 6, 7], [6, 7, 8], [7], [8]], [11, 11, 1, 2])


def test_batches_cover_all_positions_and_begin_with_prompts():
    batches = make_batches()
    seen, starts, at_zero, short_rows = torch.zeros(corpus.MAX_POSITIONS), set(), 0, 0
    for _ in range(150):
        rows, positions = batches.batch()
        assert rows.shape[1] == positions.shape[1] + 1
        assert positions.min() >= 0 and positions.max() < corpus.MAX_POSITIONS
        assert (positions[:, 1:] - positions[:, :-1] == 1).all()
        assert positions.numel() == corpus.TOKENS_PER_STEP
        seen.index_add_(0, positions.flatten(), torch.ones(positions.numel()))
        starts |= {tuple(row[:3].tolist()) for row in rows}
        if positions.shape[1] == corpus.SHORT_ROW:
            short_rows += len(rows)
            at_zero += int((positions[:, 0] == 0).sum())
    assert seen.min() > 30
    assert 0.4 < at_zero / short_rows < 0.6
    assert (5, 6, 7) in starts and (2, 5, 6) in starts  # a repeated text at position 0, without and with </s>


def test_batches_resume_where_they_stopped():
    first = make_batches()
    for _ in range(5):
        first.batch()
    state = {k: getattr(first, k) for k in ("rng", "stream", "epoch", "prompt_rows")}
    second = make_batches()
    vars(second).update(pickle.loads(pickle.dumps(state)))
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first.batch(), second.batch()))


def test_it_trains_writes_a_model_and_goes_on(tmp_path, model):
    """A step or two of the whole, with the command that the card names."""
    text = "\n".join(PARAGRAPH.split(". "))
    for name, content in {
            "andersen": "\n\n\n".join([text] * 13), "austen": "\n".join(f"Chapter {n}\n\n{text}\n" for n in range(13)),
            "shakespeare": "\n\n".join(["ROMEO:\nI'll not be so."] * 1300),
            "paper_prompts": "".join(GETTYSBURG) + "\n\n" + "".join(TALE)}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    command = [sys.executable, "-m", "minipaged.tiny_opt.train", "--corpus", tmp_path, "--out", tmp_path / "out",
               "--checkpoint", tmp_path / "saved.pt", "--minutes"]
    subprocess.run([*command, "0.001"], check=True, capture_output=True)
    first = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"^1 steps of 4,096 tokens, together 0.0 million tokens", first, re.M)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.dtype == torch.float16 and made.num_parameters() == model.num_parameters()
    done = subprocess.run([*command, "1e-9", "--resume", "--adam-lr", "0.001"], check=True, capture_output=True,
                          text=True)
    assert done.stdout.startswith("resumed at step 1, ") and "Muon 0.003 and AdamW 0.001 from step 1;" in done.stdout
