"""Encoders with a decoder: pairs, their loss and gradient, and whole runs of a small random T5."""

import json

import numpy as np
import pytest
import torch
from conftest import ALONE, only_run, save_small_t5
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from eval.engine.generation import Decoding, generate
from eval.subject import Request, Subject
from lora_one.config import ExperimentConfig
from lora_one.data.batches import IGNORED, Limits, collate, collate_slots, split_window
from lora_one.data.encoding import Encoded, encode_split
from lora_one.data.specs import Example
from lora_one.gradients import estimate_gradient
from lora_one.initialise import probe_logits
from lora_one.losses import weighted_loss
from lora_one.models import linear_layers

SHORT = ("debug=short", "model=custom", "model.type=ConditionalGeneration", "model.max_length=64")
SHORT += ("peft.lora_r=4", "eval.max_new_tokens=8", "eval.limit=4")
TEXTS = ("Ada has 3 boxes with 4 pens each.", "Bo has 7 apples.", "How many are left?")


@pytest.fixture
def t5(tmp_path, tokenizer):
    return save_small_t5(tmp_path / "t5", tokenizer)


@pytest.fixture
def model(t5):
    loaded = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    loaded.config.use_cache = False
    return loaded


def random_pairs(n: int) -> list[Encoded]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, size=(n, 2))
    return [
        Encoded(rng.integers(3, 768, size=a + b).astype(np.int32), int(a), is_pair=True) for a, b in lengths
    ]


def own_loss(model, pair: Encoded) -> torch.Tensor:
    """The mean loss of one pair, as transformers computes it."""
    ids = torch.tensor(pair.ids, dtype=torch.long)[None]
    return model(input_ids=ids[:, : pair.n_prompt], labels=ids[:, pair.n_prompt :]).loss


def window_loss(model, pairs: list[Encoded]) -> torch.Tensor:
    return torch.stack([own_loss(model, pair) for pair in pairs]).mean()


def start(folder, *arguments: str) -> tuple[str, ...]:
    return (*SHORT, f"model.name={folder}", *arguments)


def record_of(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_prompt_and_target_are_encoded_apart_each_with_its_end(tokenizer):
    example = Example("Q: one two\nA: ", "three", "3", "g")
    (pair,) = encode_split(
        [example], tokenizer, joiner=" ", max_length=64, name="train", as_pairs=True
    ).examples
    end = [tokenizer.eos_token_id]
    assert pair.is_pair
    assert pair.ids[: pair.n_prompt].tolist() == tokenizer(example.prompt)["input_ids"] + end
    assert pair.ids[pair.n_prompt :].tolist() == tokenizer(example.target)["input_ids"] + end


def test_a_cut_prompt_keeps_its_end_and_a_cut_target_does_not(tokenizer):
    long, short = "apple " * 30, "4"
    examples = [Example(long, short, "", "a"), Example(short, long, "", "b"), Example(short, short, "", "c")]
    split = encode_split(examples, tokenizer, joiner="", max_length=8, name="train", as_pairs=True)
    assert (len(split.examples), split.n_truncated, split.n_without_target) == (3, 2, 0)
    cut_prompt, cut_target, _ = split.examples
    assert (cut_prompt.n_prompt, cut_prompt.ids[7]) == (8, tokenizer.eos_token_id)
    assert (cut_target.n_target, cut_target.ids[-1] == tokenizer.eos_token_id) == (8, False)


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tokenizer, monkeypatch):
    class Ending:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts):
            return {"input_ids": [[*ids, self.eos_token_id] for ids in tokenizer(texts)["input_ids"]]}

    example = [Example("one", "two", "", "g")]
    settings = {"joiner": "", "max_length": 64, "name": "train", "as_pairs": True}
    once, plain = (encode_split(example, kind, **settings).examples[0] for kind in (Ending(), tokenizer))
    assert (once.ids.tolist(), once.n_prompt) == (plain.ids.tolist(), plain.n_prompt)


def test_a_micro_batch_of_pairs_holds_the_padding_of_both_sides():
    pairs, limit = random_pairs(40), 60
    (share,) = split_window(
        pairs, range(40), limits=Limits(max_tokens=limit), reduction="sample", world_size=1
    )
    batches = [collate_slots(pairs, slots, pad_id=1) for slots in share]
    assert max(batch["input_ids"].numel() + batch["labels"].numel() for batch in batches) <= limit
    assert len(batches) < 20


@pytest.mark.parametrize("limits", [Limits(max_examples=1), Limits(max_examples=4), Limits(max_tokens=50)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradient_are_those_of_transformers(model, limits, world_size):
    pairs = random_pairs(11)
    expected = window_loss(model, pairs)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    shares = split_window(pairs, range(11), limits=limits, reduction="sample", world_size=world_size)
    total = 0.0
    for slots in [slots for share in shares for slots in share]:
        loss = weighted_loss(model, collate_slots(pairs, slots, pad_id=1))
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_tokens_count_alike_with_the_token_reduction(model):
    pairs = random_pairs(5)
    total = sum(pair.n_target for pair in pairs)
    expected = sum(own_loss(model, pair).item() * pair.n_target for pair in pairs) / total
    (share,) = split_window(pairs, range(5), limits=Limits(max_examples=2), reduction="token", world_size=1)
    found = sum(weighted_loss(model, collate_slots(pairs, slots, pad_id=1)).item() for slots in share)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "sketch", "sketch_two_pass"])
def test_estimators_find_autograds_gradient(model, estimator, checkpointing, dropout):
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pairs, targets = random_pairs(8), tuple(linear_layers(model))
    expected = torch.autograd.grad(
        window_loss(model, pairs), [model.get_submodule(name).weight for name in targets]
    )
    config = ExperimentConfig.model_validate(
        {
            "dataset": {"name": "tiny"},
            "model": {"name": "x", "type": "ConditionalGeneration"},
            "init": {"estimator": estimator, "bsz": 2, "iters": 4, "n_triplets": 24, "dropout": dropout},
        }
    )
    found = estimate_gradient(
        model, targets, pairs, config, ranks=dict.fromkeys(targets, 4), pad_id=1, processes=ALONE
    )
    assert len(targets) == 32
    for name, G_OI in zip(targets, expected, strict=True):
        U_OK, S_K, V_IK = (getattr(found.layers[name], part) for part in ("U_OK", "S_K", "V_IK"))
        # 24 triplets are enough for sketches as wide as these layers: they lose nothing but the tail.
        best = torch.linalg.svdvals(G_OI)[24:].norm()
        error = ((U_OK * S_K) @ V_IK.T - G_OI).norm()
        assert error <= 1.3 * best + 1e-3 * G_OI.norm(), name


def test_the_probe_reads_the_decoders_logits_at_its_tokens(model):
    pairs = random_pairs(3)
    found = probe_logits(model, pairs, 1, torch.device("cpu"))
    assert found.shape == (sum(pair.n_target for pair in pairs), 768)
    ids = torch.tensor(pairs[1].ids, dtype=torch.long)[None]
    n = pairs[1].n_prompt
    with torch.no_grad():
        alone = model(input_ids=ids[:, :n], labels=ids[:, n:]).logits[0]
    begin = pairs[0].n_target
    assert torch.allclose(found[begin : begin + len(alone)], alone, atol=1e-5)


def test_an_empty_slot_among_pairs_carries_nothing():
    pair = random_pairs(1)[0]
    batch = collate([(pair, 1.0), (pair.blank(), 0.0)], pad_id=1)
    assert (batch["labels"][1] == IGNORED).all()
    assert len(batch["weights"]) == pair.n_target


def test_batched_generation_is_that_of_one_prompt_alone(model, tokenizer):
    subject = Subject(model, tokenizer, ALONE)
    together = generate(subject, TEXTS, Decoding(6), Request())
    alone = [generate(subject, [text], Decoding(6), Request())[0] for text in TEXTS]
    ids = torch.tensor([[*tokenizer(TEXTS[0])["input_ids"], tokenizer.eos_token_id]])
    stock = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert together == alone
    assert together[0] == tokenizer.decode(stock[0], skip_special_tokens=True)
    assert together[0]


def test_an_encoder_counts_its_places_from_the_first(tokenizer):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "init_std": 0.5}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    config = BartConfig(vocab_size=768, decoder_attention_heads=4, forced_eos_token_id=None, **sizes, **ids)
    subject = Subject(BartForConditionalGeneration(config).eval(), tokenizer, ALONE)
    together = generate(subject, TEXTS, Decoding(6), Request())
    assert together == [generate(subject, [text], Decoding(6), Request())[0] for text in TEXTS]


@pytest.mark.parametrize(
    "method",
    [
        ("init=default",),
        ("init.direction=LoRA-One",),
        ("init.direction=LoRA-GA", "init.stable_gamma=16"),
        ("peft=dora",),
        ("peft=qv", "init.estimator=sketch"),
        ("init=corda", "init.iters=4"),
        ("optimizer=scaled_adamw", "model.bf16=true"),
    ],
    ids=" ".join,
)
def test_a_run_and_what_it_leaves(cli, tmp_path, t5, method):
    done = cli(*start(t5, *method, "model.saving=true", "model.learning_rate=0.05"))
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["metrics"]["test"]["n"] == 4
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    base = AutoModelForSeq2SeqLM.from_pretrained(t5)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    inputs = tokenizer(TEXTS[0], return_tensors="pt") | {
        "labels": tokenizer("4", return_tensors="pt").input_ids
    }
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()(**inputs).logits
        merged = AutoModelForSeq2SeqLM.from_pretrained(folder / "merged", dtype=torch.float32)(
            **inputs
        ).logits
    near = 2e-2 if "model.bf16=true" in method else 1e-4
    assert (adapted - merged).norm() < near * merged.norm()
    assert (adapted - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("direction", ["LoRA-One", "LoRA-GA"])
def test_the_exported_adapter_has_the_trained_models_logits(cli, tmp_path, t5, monkeypatch, direction):
    kept = {}
    monkeypatch.setattr("run_exp.export_merged", lambda config, model, *_: kept.update(model=model))
    done = cli(*start(t5, f"init.direction={direction}", "model.learning_rate=0.05"))
    assert done.returncode == 0, done.stderr
    pairs = random_pairs(4)
    stock = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(t5), str(only_run(tmp_path) / "adapter")
    )
    found, expected = (probe_logits(m, pairs, 1, torch.device("cpu")) for m in (stock, kept["model"]))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_full_fine_tuning_saves_its_weights_and_is_read_again(cli, tmp_path, t5):
    arguments = [a for a in start(t5, "peft=full_ft") if not a.startswith("peft.")]
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    trained = AutoModelForSeq2SeqLM.from_pretrained(only_run(tmp_path) / "merged")
    base = AutoModelForSeq2SeqLM.from_pretrained(t5)
    assert not torch.equal(trained.shared.weight, base.shared.weight)
    again = cli(*arguments, "eval.limit=3")
    assert again.returncode == 0, again.stderr
    assert record_of(only_run(tmp_path))["metrics"]["test"]["n"] == 3


def test_gradient_checkpointing_changes_nothing(cli, tmp_path, t5):
    for flag in ("true", "false"):
        place = f"results_dir={tmp_path}/{flag}"  # it is the same run
        assert cli(*start(t5, f"gradient_checkpointing={flag}", place)).returncode == 0
    losses = [record_of(path.parent)["metrics"]["validation_loss"] for path in tmp_path.rglob("record.json")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_failed_run_goes_on_with_the_same_bits(cli, tmp_path, t5, monkeypatch):
    arguments = start(t5, "init.direction=LoRA-GA", "model.save_steps=1", "eval.limit=1")
    calls = []

    def fails_in_step_3(model, batch):
        calls.append(batch)
        return weighted_loss(model, batch) if len(calls) < 3 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr("lora_one.training.weighted_loss", fails_in_step_3)
        assert cli(*arguments, "model.eval_epochs=9").returncode == 1
    assert cli(*arguments, "model.eval_epochs=9").returncode == 0
    folder = only_run(tmp_path)
    assert record_of(folder)["training"]["resumed_from_step"] == 2
    assert cli(*arguments, "model.eval_epochs=9", f"results_dir={tmp_path}/whole").returncode == 0
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (only_run(tmp_path / "whole") / name).read_bytes()


def test_untied_and_gated_layers_run(cli, tmp_path, tokenizer):
    settings = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    done = cli(*start(save_small_t5(tmp_path / "flan", tokenizer, **settings)))
    assert done.returncode == 0, done.stderr
    assert record_of(only_run(tmp_path))["model"]["targets"] == 36  # all but the head


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["model.type=CausalLM"],
            "model.type=CausalLM: {t5} is an encoder with a decoder (t5); use model.type=",
        ),
        (["model=tiny", "model.name=embedded/tiny_llama"], "embedded/tiny_llama has no encoder (llama); use"),
        (["model.packing=true"], "model.packing=true: an encoder reads across the examples of one row"),
        (
            ["peft=all_w_emb"],
            "peft.train_embeddings=true: PEFT cannot train what encoder, decoder and head share",
        ),
        (["init=eva"], "init.mode=eva: PEFT's EVA chooses tokens by one mask for all layers"),
        (["dry_run=true", "model.type=CausalLM"], "is an encoder with a decoder (t5)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(cli, tmp_path, t5, arguments, words):
    done = cli(*start(t5, *arguments))
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words.format(t5=t5) in error
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("record.json"))


def test_the_dry_run_counts_both_sides(cli, t5):
    done = cli(*start(t5, "dry_run=true"))
    assert done.returncode == 0, done.stderr
    assert "32 layers: k, o, q, v, wi, wo; rank 4" in done.stdout
    assert f"at most {3 * 4 * 2 * 64:,} (model.max_length=64)" in done.stdout
