"""Generation: alike for one prompt alone and for many, whatever the model, the batch and the processes."""

import functools
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload
from conftest import ALONE, EMBEDDED, load_script, on_two_processes, save_small_t5
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from eval.command import load_subject, make_parser
from eval.engine import batch_limits, continuous
from eval.engine.answers import AnswerStore, weights_digest
from eval.engine.decoding import Decoding, StopWatch, before_stop, next_tokens, uniforms, until_end
from eval.engine.generation import encode_prompts, generate, generate_counted
from eval.engine.row_batch import Decoder, Prompt, RowBatch
from eval.engine.row_cache import Columns, n_cache_layers
from eval.subject import Request, Subject
from lora_one.data.tiny import problems
from lora_one.errors import UserError
from lora_one.processes import Processes, start_processes

PROMPTS = [f"Q: {row['question']}\nA: " for row in problems("test", 14)] + ["Tom has", "A", "Tom has"]
SAMPLED = Decoding(20, temperature=1.0, top_p=0.9, top_k=40)
# Random weights of this size keep the logits of different tokens far apart, so no rounding decides.
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.4}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWED = {**LLAMA, "head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "layer_types": LAYERS}
SHAPES = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 8},
    "qwen2": {**LLAMA, "max_window_layers": 0, "use_sliding_window": True, "sliding_window": 8},
    "qwen3": WINDOWED,
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": LAYERS},
    "phi": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128},
    "gpt_neox": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.4},
    "opt": {
        **SMALL,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
        "init_std": 0.4,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.4},
}


def random_model(kind: str, tokenizer, **settings):
    torch.manual_seed(1)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0}
    ids["tie_word_embeddings"] = False  # else they repeat themselves
    config = AutoConfig.for_model(kind, **(SHAPES[kind] | ids | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def trained():
    """A model whose answers end."""
    return AutoModelForCausalLM.from_pretrained(EMBEDDED)


def stock(model, tokenizer, prompts, n: int) -> list[str]:
    """One prompt after the other, by transformers."""
    settings = GenerationConfig(
        max_new_tokens=n, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=1, use_cache=True
    )
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_that_come_and_go_are_those_of_one_prompt_alone(kind, tokenizer):
    model = random_model(kind, tokenizer)
    assert n_cache_layers(model) == 3
    prompts = PROMPTS[-6:]
    # Some of these never end: with four rows a batch, others come in beside them.
    found = generate(Subject(model, tokenizer, ALONE, batch_size=4), prompts, Decoding(24), Request())
    assert found == stock(model, tokenizer, prompts, 24)
    assert len(set(found)) > 3


@pytest.mark.parametrize(("rows", "free"), [(1, 1 / 8), (3, 0.0), (5, 1 / 8), (5, 1.0), (64, 1 / 8)])
def test_every_way_to_fill_a_batch_gives_the_same(trained, tokenizer, monkeypatch, rows, free):
    monkeypatch.setattr(continuous, "_FREE", free)
    monkeypatch.setitem(continuous._TOKENS_READ, "cpu", 100)
    found = generate(Subject(trained, tokenizer, ALONE, batch_size=rows), PROMPTS, Decoding(40), Request())
    assert found == stock(trained, tokenizer, PROMPTS, 40)
    assert len({len(text) for text in found}) > 2  # they end at different times


def test_columns_against_a_list_of_lists():
    rows = [[10 * row + column for column in range(3)] for row in range(4)]
    columns = Columns(torch.tensor(rows), 1)
    for step in range(300):  # beyond the reserve
        columns.append(torch.full((4, 1), step))
        rows = [[*row, step] for row in rows]
    assert columns.whole.tolist() == rows
    columns.crop(5)
    rows = [row[-5:] for row in rows]
    columns.put(torch.tensor([2, 0]), torch.tensor([[1, 2], [3, 4]]))
    rows[2][-2:], rows[0][-2:] = [1, 2], [3, 4]
    assert columns.whole.tolist() == rows
    columns.select(torch.tensor([2, 3]))
    rows = [rows[2], rows[3]]
    columns.put(torch.tensor([1]), torch.tensor([[*range(9)]]))  # wider than all
    assert columns.width == 9
    assert columns.whole[0].tolist()[-5:] == rows[0]
    assert columns.whole[1].tolist() == [*range(9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_work_as_they_are(trained, tokenizer, dtype):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=dtype)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4))
    adapted.train()
    subject = Subject(adapted, tokenizer, ALONE, batch_size=4)
    found = generate(subject, PROMPTS, Decoding(16), Request())
    assert adapted.training
    assert found != generate(Subject(trained, tokenizer, ALONE), PROMPTS, Decoding(16), Request())
    if dtype == torch.float32:
        merged = adapted.merge_and_unload().eval()
        assert found == stock(merged, tokenizer, PROMPTS, 16)
    else:
        assert len(set(found)) > 5


def test_a_state_that_is_no_list_of_columns_goes_by_transformers(tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert n_cache_layers(model) is None
    found = generate(Subject(model, tokenizer, ALONE), PROMPTS, Decoding(6), Request())
    assert found == stock(model, tokenizer, PROMPTS, 6)
    sampled = generate(Subject(model, tokenizer, ALONE), PROMPTS, SAMPLED, Request())
    assert sampled == generate(Subject(model, tokenizer, ALONE, batch_size=1), PROMPTS, SAMPLED, Request())


def test_a_row_that_nobody_replaces_draws_no_further_numbers(tokenizer):
    model = random_model("llama", tokenizer)
    prompts = [f"{'ab ' * n}A" for n in range(31, 0, -1)]

    def sampled(rows, *stop):
        subject = Subject(model, tokenizer, ALONE, batch_size=rows)
        return generate(subject, prompts, Decoding(64, temperature=1.0, stop=stop), Request(seed=1))

    whole = sampled(1)
    # Two of the first sixteen end at once and are replaced; the last one ends later, and for it alone no
    # prompt is read; all others go on to their limit.
    stops = whole[13][:9], whole[14][:9], whole[15][50:59]
    assert ["".join("x" for stop in stops if stop in text) for text in whole] == [""] * 13 + ["x"] * 3 + [
        ""
    ] * 15
    expected = [min((text.split(stop)[0] for stop in stops), key=len) for text in whole]
    assert sampled(16, *stops) == expected


def test_a_row_that_waits_long_stays_within_the_positions(tokenizer):
    # One row lives on beside one that ended, for more steps than the model has places.
    decoder = Decoder(random_model("gpt2", tokenizer), 3, Decoding(20, 1.0), 0, ALONE.device)
    batch = RowBatch(decoder, [Prompt(0, [5, 6]), Prompt(1, [7])])
    batch.rest([0])
    for _ in range(50):
        batch.step(4)
        batch._places[1] = batch._steps[1] = 0  # as where one follows the other in this place


def test_sampling_depends_on_seed_and_place_alone(trained, tokenizer):
    def sampled(prompts, rows=None, seed=0):
        return generate(
            Subject(trained, tokenizer, ALONE, batch_size=rows), prompts, SAMPLED, Request(seed=seed)
        )

    found = sampled(PROMPTS)
    assert found == sampled(PROMPTS, 1) == sampled(PROMPTS, 3)
    assert found[:5] == sampled(PROMPTS[:5])
    assert found != sampled(PROMPTS, seed=1)
    again = sampled(["Tom has"] * 8)
    assert len(set(again)) > 4


def test_sampled_tokens_have_their_probabilities():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()[None].expand(20_000, -1)
    draws = torch.from_numpy(uniforms(0, 0, 20_000))

    def shares(**settings):
        tokens = next_tokens(logits, Decoding(**settings), draws)
        return torch.bincount(tokens, minlength=5) / 20_000

    for settings, expected in [
        ({"temperature": 1.0}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.7692, 0.1231, 0.0692, 0.0308, 0.0077]),  # squares over 0.325
        ({"temperature": 1.0, "top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.4}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.71}, [1, 0, 0, 0, 0]),  # 5/7 is enough of the two
    ]:
        assert shares(**settings).tolist() == pytest.approx(expected, abs=0.012), settings


def test_pairs_sample_alike_in_any_batch(tmp_path, tokenizer):
    model = AutoModelForSeq2SeqLM.from_pretrained(save_small_t5(tmp_path / "t5", tokenizer))
    together, alone, other = (
        generate(Subject(model, tokenizer, ALONE, batch_size=rows), PROMPTS, SAMPLED, Request(seed=seed))
        for rows, seed in [(None, 0), (1, 0), (None, 1)]
    )
    assert together == alone != other


def test_a_stop_text_ends_an_answer_before_it(trained, tokenizer):
    whole = generate(Subject(trained, tokenizer, ALONE), PROMPTS, Decoding(40), Request())
    cut = generate(Subject(trained, tokenizer, ALONE), PROMPTS, Decoding(40, stop=("er is", " M")), Request())
    assert cut == [min(text.split("er is")[0], text.split(" M")[0], key=len) for text in whole]
    assert cut != whole


def test_the_watch_finds_a_text_over_several_tokens(tokenizer):
    ids = tokenizer("so it is — done\n#### 12\nQ: more")["input_ids"]
    text = tokenizer.decode(ids)
    for word in ("done\n####", "— d", "\nQ:"):
        watch = StopWatch(tokenizer, (word,))
        n = next(n for n in range(len(ids) + 1) if word in tokenizer.decode(ids[:n]))
        assert [watch.has_ended(ids[:k], 1) for k in (n - 1, n)] == [False, True]
        assert before_stop(text, (word,)) == (text[: text.index(word)], True)
    assert until_end([5, 6, 0, 7], [0, 9], 8) == ([5, 6], True)
    assert until_end([5, 6, 0, 7], [0], 2) == ([5, 6], False)


def test_stop_texts_save_steps(trained, tokenizer, monkeypatch):
    calls = []
    forward = trained.forward
    counted = functools.wraps(forward)(lambda **rest: calls.append(1) or forward(**rest))
    monkeypatch.setattr(trained, "forward", counted)
    generate(Subject(trained, tokenizer, ALONE), ["Tom has"], Decoding(60, stop=(" ",)), Request())
    assert len(calls) < 20


def test_beams_are_those_of_transformers(trained, tokenizer):
    decoding = Decoding(12, num_beams=3)
    found = generate(Subject(trained, tokenizer, ALONE, batch_size=4), PROMPTS, decoding, Request())
    settings = GenerationConfig(
        max_new_tokens=12, num_beams=3, eos_token_id=tokenizer.eos_token_id, pad_token_id=1
    )
    for text, prompt in zip(found[:4], PROMPTS, strict=False):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = trained.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_sampled_beams_repeat_and_fall_back_in_the_open(trained, tokenizer, monkeypatch, capsys):
    published = Decoding(8, temperature=0.1, top_p=0.75, top_k=40, num_beams=4)
    subject = Subject(trained, tokenizer, ALONE, batch_size=4)
    state = torch.get_rng_state()
    first = generate_counted(subject, PROMPTS, published, Request())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert generate_counted(subject, PROMPTS, published, Request()).texts == first.texts
    assert "answered by greedy beams" not in first.counts

    def fails(*_, **__):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    greedy = generate(subject, PROMPTS, Decoding(8, num_beams=4), Request())
    monkeypatch.setattr(torch, "multinomial", fails)
    fallen = generate_counted(subject, PROMPTS, published, Request(description="siqa"))
    assert fallen.texts == greedy
    assert fallen.counts["answered by greedy beams"] == len(PROMPTS)
    assert "note: siqa: 17 of 17 answered by greedy beams" in capsys.readouterr().out


@pytest.mark.parametrize(("tokens", "rows"), [(400, None), (100_000, 3), (1, None)])
def test_no_batch_is_larger_than_allowed(trained, tokenizer, monkeypatch, tokens, rows):
    seen = []
    forward = trained.forward

    @functools.wraps(forward)
    def watched(**inputs):
        seen.append(tuple(inputs["attention_mask"].shape))
        return forward(**inputs)

    monkeypatch.setattr(trained, "forward", watched)
    subject = Subject(trained, tokenizer, ALONE, max_tokens=tokens, batch_size=rows)
    found = generate(subject, PROMPTS, Decoding(20), Request())
    most = max(B * T for B, T in seen if B > 1) if tokens > 1 else 0
    assert most <= tokens
    assert max(B for B, _ in seen) <= (rows or 400)
    assert (max(B for B, _ in seen) == 1) == (tokens == 1)
    monkeypatch.undo()
    assert found == generate(Subject(trained, tokenizer, ALONE), PROMPTS, Decoding(20), Request())


def test_the_processes_of_a_machine_share_its_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(batch_limits, "_MOST_TOKENS", 10**12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**30))
    decoder = Decoder(random_model("llama", tokenizer), 3, Decoding(20), 0, ALONE.device)
    found = []
    for n in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", n)
        found.append(batch_limits.batch_limits(decoder, None, None).max_tokens)
    # Three layers' keys and values, two heads of eight numbers of four bytes.
    assert found == [int(0.6 * 2**30 / n / (3 * 2 * 2 * 8 * 4)) for n in (1, 4)]


def _with_habits(model):
    """A generation config as chat models are published with."""
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, min_length=60, suppress_tokens=list(range(3, 60))
    )
    return model


@pytest.mark.parametrize("kind", ["beams", "pair", "adapter", "sampled beams"])
def test_a_models_own_generation_config_decides_nothing(tokenizer, tmp_path, kind):
    if kind == "pair":
        model = AutoModelForSeq2SeqLM.from_pretrained(save_small_t5(tmp_path / "t5", tokenizer))
    else:
        model = _adapted() if kind == "adapter" else AutoModelForCausalLM.from_pretrained(EMBEDDED)
    decoding = Decoding(12, num_beams=1 if kind == "pair" else 3)
    if kind == "sampled beams":
        decoding = Decoding(12, temperature=0.5, num_beams=2)
    subject = Subject(model, tokenizer, ALONE)
    plain = generate(subject, PROMPTS[:4], decoding, Request())
    _with_habits(model.get_base_model() if kind == "adapter" else model)
    _with_habits(model)
    own = model.generation_config
    assert generate(subject, PROMPTS[:4], decoding, Request()) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


@pytest.mark.parametrize("decoding", [Decoding(4), SAMPLED, Decoding(4, 1.0), Decoding(4, num_beams=2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(tokenizer, decoding, value):
    model = random_model("llama", tokenizer)
    model.model.norm.weight.data[3] = value
    with pytest.raises(UserError, match="logits are not finite"):
        generate(Subject(model, tokenizer, ALONE), PROMPTS[:3], decoding, Request())


@pytest.mark.parametrize("decoding", [Decoding(4), SAMPLED])
def test_a_pairs_logits_are_looked_at_too(tokenizer, tmp_path, decoding):
    model = AutoModelForSeq2SeqLM.from_pretrained(save_small_t5(tmp_path / "t5", tokenizer))
    model.decoder.final_layer_norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        generate(Subject(model, tokenizer, ALONE), PROMPTS[:3], decoding, Request())


def test_one_broken_row_is_enough():
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 0.0], [0.0, -float("inf"), -1.0]])
    draws = torch.zeros(3)
    for decoding in (Decoding(), Decoding(temperature=1.0), Decoding(temperature=1.0, top_k=2)):
        first, second, third = next_tokens(logits, decoding, draws).tolist()
        assert (first in (0, 2), second, third) == (True, -1, 0)


def test_nothing_to_do_is_nothing(trained, tokenizer):
    assert generate(Subject(trained, tokenizer, ALONE), [], Decoding(), Request()) == []
    assert generate_counted(Subject(trained, tokenizer, ALONE), [""], Decoding(4), Request()).texts[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_beyond_the_context_lose_their_beginning(kind, tokenizer, capsys):
    model = random_model(kind, tokenizer)  # 128 places
    long = "one two three four " * 60
    subject = Subject(model, tokenizer, ALONE)
    for n_new, kept in ((28, 100), (500, 64)):
        (prompt,) = encode_prompts(subject, [long], Decoding(n_new))
        assert prompt.is_cut
        assert prompt.ids == tokenizer(long)["input_ids"][-kept:]
    found = generate_counted(subject, [long, "Tom"], Decoding(500 if kind == "gpt2" else 20), Request())
    assert found.counts["prompts cut"] == 1
    assert "1 of 2 prompts cut" in capsys.readouterr().out


def _lines(folder: Path) -> list[dict]:
    return [
        row
        for path in folder.glob("*.jsonl")
        for row in map(json.loads, path.read_text().splitlines())
        if "index" in row
    ]


def test_a_killed_evaluation_goes_on(trained, tokenizer, tmp_path, monkeypatch):
    subject = Subject(trained, tokenizer, ALONE, batch_size=4)
    whole = generate(subject, PROMPTS, Decoding(20), Request())
    assert generate(subject, PROMPTS, Decoding(20), Request(folder=tmp_path)) == whole
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(PROMPTS)
    path.write_text("".join(lines[:6]) + lines[6][:9])  # five answers, and a torn one
    kept = {json.loads(line)["index"] for line in lines[1:6]}
    asked = []
    init = continuous.ContinuousBatch.__init__

    def watched(self, decoder, tokenizer, ends, prompts, limits):
        asked.extend(prompt.index for prompt in prompts)
        init(self, decoder, tokenizer, ends, prompts, limits)

    monkeypatch.setattr(continuous.ContinuousBatch, "__init__", watched)
    assert generate(subject, PROMPTS, Decoding(20), Request(folder=tmp_path)) == whole
    assert sorted(asked) == sorted(set(range(len(PROMPTS))) - kept)
    asked.clear()
    assert generate(subject, PROMPTS, Decoding(20), Request(folder=tmp_path)) == whole
    assert not asked
    # Other settings, other weights, another seed: nothing of it is used.
    generate(subject, PROMPTS, Decoding(20, stop=("x",)), Request(folder=tmp_path))
    generate(subject, PROMPTS, Decoding(20), Request(folder=tmp_path, seed=1))
    generate(subject, PROMPTS[:-1], Decoding(20), Request(folder=tmp_path))
    other = Subject(random_model("llama", tokenizer), tokenizer, ALONE)
    generate(other, PROMPTS, Decoding(20), Request(folder=tmp_path))
    assert len(asked) == 4 * len(PROMPTS) - 1


def test_what_is_kept_is_used(trained, tokenizer, tmp_path):
    subject, request = Subject(trained, tokenizer, ALONE), Request(folder=tmp_path)
    generate(subject, PROMPTS[:2], Decoding(4), request)
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["answer"]["text"] = "kept"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "kept" in generate(subject, PROMPTS[:2], Decoding(4), request)


def _swap_rows(weight):
    weight.data[[3, 4]] = weight.data[[4, 3]]


def _swap_far(weight):
    weight.data[[0, 300]] = weight.data[[300, 0]]


def _negate(weight):
    weight.data.neg_()


CHANGES = {
    "one number": lambda m: m.base_model.model.model.norm.weight.data.view(-1)[3].add_(1e-5),
    "two rows of one half": lambda m: _swap_rows(m.get_input_embeddings().weight),
    "rows of two halves": lambda m: _swap_far(m.get_input_embeddings().weight),
    "all signs": lambda m: _negate(m.get_input_embeddings().weight),
    "rows and columns": lambda m: _transpose(m.base_model.model.model.layers[0].self_attn.q_proj.base_layer),
    "a trained row": lambda m: m.get_input_embeddings().weight.data[77].add_(0.01),
    "precision": lambda m: m.bfloat16(),
    "alpha": lambda m: setattr(m.peft_config["default"], "lora_alpha", 5),
    "scaling": lambda m: m.base_model.model.model.layers[1].mlp.up_proj.scaling.update(default=0.7),
    "no adapter": lambda m: m.base_model.disable_adapter_layers(),
    "config": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
}


def _transpose(layer):
    layer.weight.data = layer.weight.data.T.contiguous()


def _adapted():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4))


def test_the_digest_of_weights_is_of_the_weights():
    one, other = _adapted(), _adapted()
    other.config.use_cache, other.config._name_or_path = False, "elsewhere"
    other.peft_config["default"].inference_mode = True
    assert weights_digest(one.train()) == weights_digest(other.eval()) == weights_digest(one)


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_of_weights_sees_every_change(change):
    model = _adapted()
    before = weights_digest(model)
    CHANGES[change](model)
    assert weights_digest(model) != before


def test_the_digest_reads_weights_that_were_moved_away():
    model, same = (AutoModelForCausalLM.from_pretrained(EMBEDDED) for _ in range(2))
    cpu_offload(model, torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    assert weights_digest(model) == weights_digest(same)
    assert model.lm_head.weight.device.type == "meta"
    with torch.device("meta"):
        nowhere = AutoModelForCausalLM.from_config(same.config)
    with pytest.raises(UserError, match="are not loaded"):
        weights_digest(nowhere)


def test_other_end_tokens_are_other_answers(tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    subject, request = Subject(model, tokenizer, ALONE), Request(folder=tmp_path)
    whole = generate(subject, PROMPTS[:3], Decoding(20), request)
    third = tokenizer(whole[0])["input_ids"][2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, third]
    assert generate(subject, PROMPTS[:3], Decoding(20), request)[0] != whole[0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write answers there"):
        AnswerStore(tmp_path / "file", {}, ALONE)


def _as_one_of_two(folder: str, expected: dict) -> None:
    processes = start_processes()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    subject = Subject(AutoModelForCausalLM.from_pretrained(EMBEDDED), tokenizer, processes, batch_size=4)
    for name, decoding in (
        ("greedy", Decoding(20)),
        ("sampled", SAMPLED),
        ("beams", Decoding(6, num_beams=2)),
    ):
        request = Request(folder=Path(folder) / name)
        assert generate(subject, PROMPTS, decoding, request) == expected[name]
        processes.wait()
        sizes = [len(p.read_text().splitlines()) - 1 for p in sorted(request.folder.glob("*.jsonl"))]
        assert sum(sizes) == len(PROMPTS)
        assert abs(sizes[0] - sizes[1]) <= (1 if name != "beams" else 8)
        assert generate(subject, PROMPTS, decoding, request) == expected[name]


def test_two_processes_share_the_prompts(trained, tokenizer, tmp_path):
    subject = Subject(trained, tokenizer, ALONE, batch_size=4)
    decodings = {"greedy": Decoding(20), "sampled": SAMPLED, "beams": Decoding(6, num_beams=2)}
    expected = {name: generate(subject, PROMPTS, kind, Request()) for name, kind in decodings.items()}
    on_two_processes(_as_one_of_two, str(tmp_path), expected)


def test_the_benchmark_compares_the_same_answers(tokenizer, trained, monkeypatch):
    bench = load_script("bench_eval")
    monkeypatch.setattr(bench, "NEW_TOKENS", 24)
    case = bench.Case(Subject(trained, tokenizer, ALONE), PROMPTS[:6], every=3)
    found = bench.measure(case, bench.METHODS, rounds=1)
    assert [len(one.by_clock) for one in found.values()] == [1, 1, 1]
    assert bench.report(found).count("1.00") >= 4  # each method beside itself
    wrong = dict(bench.METHODS, ours=lambda case: ["no"] * len(case.prompts))
    with pytest.raises(UserError, match="answers differ"):
        bench.measure(case, wrong, rounds=1)


# ---- vLLM, by a stand-in


class _Engine:
    """Answers every prompt with its own last three tokens and the end."""

    made: ClassVar[list] = []
    asked: ClassVar[list] = []

    def __init__(self, **settings):
        _Engine.made.append(settings)

    def generate(self, prompts, params, lora_request=None, use_tqdm=True):
        _Engine.asked.append((prompts, params, lora_request))
        tokens = [[*prompt["prompt_token_ids"][-3:], 0] for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row))]) for row in tokens]


@pytest.fixture
def vllm(monkeypatch):
    _Engine.made, _Engine.asked = [], []
    module, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = _Engine, SimpleNamespace
    lora.LoRARequest = lambda *parts: parts
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", lora)
    return _Engine


def _options(*flags: str):
    return make_parser("").parse_args(["--model_name", str(EMBEDDED), "--backend", "vllm", *flags])


def test_vllm_gets_tokens_settings_and_seeds(vllm, tokenizer, tmp_path):
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    get_peft_model(model, LoraConfig(r=12, target_modules="all-linear")).save_pretrained(adapter)
    subject = load_subject(_options("--bf16", "--adapter", str(adapter)), ALONE)
    assert vllm.made[0] | {"model": ""} == {
        **{"model": "", "dtype": "bfloat16", "seed": 0, "enable_lora": True, "max_lora_rank": 16}
    }
    decoding = Decoding(9, temperature=0.7, top_p=0.9, stop=("##",))
    request = Request(folder=tmp_path / "kept")
    found = generate(subject, PROMPTS, decoding, request)
    assert found == [tokenizer.decode(tokenizer(prompt)["input_ids"][-3:]) for prompt in PROMPTS]
    ((prompts, params, lora),) = vllm.asked
    assert {tuple(prompt["prompt_token_ids"]) for prompt in prompts} == {
        tuple(ids) for ids in tokenizer(PROMPTS)["input_ids"]
    }
    assert lora == ("adapter", 1, str(adapter))
    assert len({one.seed for one in params}) == len(PROMPTS)
    assert (params[0].max_tokens, params[0].temperature, params[0].top_p, params[0].top_k) == (
        9,
        0.7,
        0.9,
        -1,
    )
    assert params[0].stop == ["##"]
    generate(subject, PROMPTS, decoding, request)
    assert len(vllm.asked) == 1


def test_vllm_answers_are_those_of_the_same_files_and_precision(vllm, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(EMBEDDED, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(adapter)

    def fingerprint(*flags):
        options = make_parser("").parse_args(
            ["--model_name", str(base), "--backend", "vllm", "--adapter", str(adapter), *flags]
        )
        return load_subject(options, ALONE).model.fingerprint

    seen = [fingerprint(), fingerprint("--bf16")]
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    seen.append(fingerprint())
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.01}))
    seen.append(fingerprint())
    for n in (1, 2):
        (base / "pytorch_model.bin").write_bytes(bytes(n))
        seen.append(fingerprint())
    assert len(set(seen)) == 6
    assert fingerprint() == seen[-1]


def test_what_vllm_cannot_do_is_one_line(vllm, tmp_path, monkeypatch):
    subject = load_subject(_options(), ALONE)
    with pytest.raises(UserError, match="no beam search"):
        generate(subject, PROMPTS, Decoding(num_beams=2), Request())
    with pytest.raises(UserError, match="only generates"):
        subject.model(input_ids=None)
    with pytest.raises(UserError, match="only generates"):
        subject.model.eval()
    with pytest.raises(UserError, match="without accelerate launch"):
        load_subject(_options(), Processes(0, 2, torch.device("cpu")))
    dora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(EMBEDDED), LoraConfig(target_modules="all-linear", use_dora=True)
    )
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(UserError, match="cannot serve DoRA"):
        load_subject(_options("--adapter", str(tmp_path / "dora")), ALONE)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"--backend vllm: cannot be imported .* pip install vllm"):
        load_subject(_options(), ALONE)
