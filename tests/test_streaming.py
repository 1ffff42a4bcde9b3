"""The streaming estimators against the exact one: same subspaces, same products, wherever training works."""

import json
import weakref

import numpy as np
import pytest
import torch
from conftest import ALONE, EMBEDDED, SHARED, on_two_processes, random_examples, small_llama
from test_layers import KINDS, build, loss_of, relative, targets_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_one.collect import collect_gradients, watch_activations
from lora_one.config import ExperimentConfig
from lora_one.data.batches import collate_slots
from lora_one.data.encoding import Encoded
from lora_one.errors import UserError
from lora_one.gradients import estimate_gradient
from lora_one.layers import to_OI
from lora_one.losses import weighted_loss
from lora_one.memory import LivePeak
from lora_one.models import linear_layers
from lora_one.processes import start_processes
from lora_one.sample import sample_batches
from lora_one.sketch import SketchSize
from lora_one.streaming import one_pass, two_passes
from lora_one.triplets import energy_share

RANK = 4
WIDE = SketchSize(right=64, left=64)
STREAMING = ["sketch", "sketch_two_pass"]


def config(estimator: str, **init) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "dataset": {"name": "tiny"},
            "model": {"name": "x"},
            "init": {"direction": "LoRA-GA", "bsz": 4, "iters": 10, "estimator": estimator} | init,
        }
    )


def estimate(model, estimator: str, examples=None, processes=ALONE, **init):
    targets = tuple(linear_layers(model))
    return estimate_gradient(
        model,
        targets,
        examples or random_examples(40),
        config(estimator, **init),
        ranks=dict.fromkeys(targets, RANK),
        pad_id=0,
        processes=processes,
    )


def deep_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, use_cache=False))


def products(found) -> dict[str, torch.Tensor]:
    return {name: (t.U_OK * t.S_K) @ t.V_IK.T for name, t in found.layers.items()}


def embedded():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)


def real_examples():
    from lora_one.data.tiny import problems

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return [
        Encoded(tokenizer(f"{row['question']} {row['answer']}", return_tensors="np")["input_ids"][0], 12)
        for row in problems("train", 40)
    ]


def kept(ours, best) -> float:
    """Energy of the best triplets that lies between our singular vectors."""
    inner = (ours.U_OK.T @ best.U_OK * best.S_K) @ best.V_IK.T @ ours.V_IK
    return float(inner.square().sum() / best.S_K.square().sum())


@pytest.mark.parametrize("estimator", STREAMING)
@pytest.mark.parametrize("bsz", [1, 4, 10])
def test_on_a_pretrained_model_nothing_visible_is_lost(estimator, bsz):
    examples = real_examples()
    exact = estimate(embedded(), "exact", examples, bsz=bsz, iters=40 // bsz)
    found = estimate(embedded(), estimator, examples, bsz=bsz, iters=40 // bsz)
    assert found.loss == pytest.approx(exact.loss, rel=1e-5)
    for name, ours in found.layers.items():
        best = exact.layers[name]
        assert kept(ours, best) > 0.98, name
        assert float((ours.U_OK[:, 0] - best.U_OK[:, 0]).norm()) < 0.05, name  # the sign convention too
        assert ours.norm == pytest.approx(best.norm, rel=0.1)
    assert 0 <= found.summary()["error_estimate_worst"] < 0.6


@pytest.mark.parametrize("estimator", STREAMING)
def test_sketches_as_wide_as_the_layer_are_exact(estimator):
    exact, found = (products(estimate(small_llama(), name, n_triplets=24)) for name in ("exact", estimator))
    assert all(relative(found[name], exact[name]) < 1e-3 for name in exact)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", STREAMING)
def test_checkpointing_and_dropout_change_nothing(estimator, reentrant):
    model = small_llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    plain, found = products(estimate(small_llama(), estimator)), products(estimate(model, estimator))
    assert all(relative(found[name], plain[name]) < 1e-4 for name in plain)
    assert model.training
    assert not any(parameter.grad is not None for parameter in model.parameters())


def estimate_as_rank(path: str, estimator: str) -> None:
    processes = start_processes()
    found = estimate(small_llama(), estimator, processes=processes, n_triplets=24)
    if processes.is_main:
        torch.save(products(found), path)


@pytest.mark.parametrize("estimator", STREAMING)
def test_two_processes_give_the_estimate_of_one(estimator, tmp_path):
    on_two_processes(estimate_as_rank, str(tmp_path / "two.pt"), estimator)
    two, one = torch.load(tmp_path / "two.pt"), products(estimate(small_llama(), estimator, n_triplets=24))
    assert all(relative(two[name], one[name]) < 1e-3 for name in one)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"tied_head", "shared_pair"}])
def test_inputs_and_output_gradients_make_the_gradient_of_every_layer_kind(kind):
    model = build(kind)
    names, sums = targets_of(model, kind), {}

    def add(name, x_NI, delta_NO):
        sums[name] = sums.get(name, 0) + delta_NO.T @ x_NI

    with watch_activations(model, names, add):
        loss_of(model).backward()
    with collect_gradients(model, names) as exact:
        loss_of(model).backward()
    assert all(relative(sums[name], exact.G_OI[name]) < 1e-5 for name in names)
    assert (
        to_OI(model.get_submodule(names[0]), model.get_submodule(names[0]).weight).shape
        == sums[names[0]].shape
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tied_head"])
@pytest.mark.parametrize("estimator", STREAMING)
def test_every_layer_kind(estimator, kind):
    model = build(kind)
    names = targets_of(model, kind)

    def run_pass(_, after_batch):
        for number in range(1, 4):
            (number * loss_of(model)).backward()
            after_batch(number)

    with collect_gradients(model, names) as exact:
        run_pass(None, lambda number: None)
    if estimator == "sketch":
        with one_pass(model, names, WIDE, seed=0) as sketches:
            run_pass(None, lambda number: None)
    else:
        sketches = two_passes(model, names, WIDE, seed=0, run_pass=run_pass, processes=ALONE)
    for name, found in sketches.finish(ALONE).items():
        assert relative((found.U_OK * found.S_K) @ found.V_IK.T, exact.G_OI[name]) < 1e-3, name


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("estimator", STREAMING)
def test_on_a_quantised_base(estimator, bits, tmp_path):
    from test_layers import quantised

    # All 64 triplets, so that the sketches are as wide as the layers.
    exact = products(estimate(quantised(bits, tmp_path), "exact", n_triplets=64))
    found = products(estimate(quantised(bits, tmp_path), estimator, n_triplets=64))
    assert all(relative(found[name], exact[name]) < 1e-3 for name in exact)


def test_a_weight_shared_with_the_embedding_is_refused():
    with (
        pytest.raises(
            UserError, match=r"lm_head: shares its weight with model\.embed_tokens.*init\.estimator=exact"
        ),
        one_pass(build("tied_head"), ["lm_head"], SketchSize(), seed=0),
    ):
        pass
    model = build("shared_pair")
    with one_pass(model, targets_of(model, "shared_pair"), SketchSize(), seed=0) as shared:
        assert len(shared.unique) == 1


@pytest.mark.parametrize("objective", ["sign", "adam"])
def test_objectives_that_need_every_entry_are_refused_by_name(cli, objective):
    scale = ["init.scale=gd"] if objective == "adam" else []
    done = cli(
        "dry_run=true",
        "init.direction=LoRA-GA",
        f"init.objective={objective}",
        *scale,
        "init.estimator=sketch",
    )
    assert done.returncode == 2
    assert f"init.objective={objective}: needs every entry of the gradient" in done.stderr


@pytest.mark.parametrize("estimator", STREAMING)
def test_through_the_program(cli, estimator):
    done = cli("debug=short", f"init.estimator={estimator}")
    assert done.returncode == 0, done.stderr


def test_checkpointing_spares_the_inputs_too():
    """The sketches need every layer's input, and must not keep it from being dropped and made again."""
    ids = torch.randint(64, (2, 256), generator=torch.Generator().manual_seed(0))
    peaks = []
    for with_targets in (False, True):
        model = deep_llama().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        names = list(linear_layers(model)) if with_targets else []
        with one_pass(model, names, SketchSize(4, 4, 1), seed=0), LivePeak() as meter:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks.append(meter.peak)
    assert peaks[1] < 1.2 * peaks[0]


def in_place(kind: str) -> tuple[torch.nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    first = Conv1D(24, 16) if kind == "conv1d" else torch.nn.Linear(16, 24)
    layers = [first, torch.nn.ReLU(inplace=True), torch.nn.Linear(24, 8)]
    ids = torch.arange(8)
    return torch.nn.Sequential(torch.nn.Embedding(8, 16), *layers), ids if kind == "flat" else ids.view(2, 4)


@pytest.mark.parametrize("kind", ["flat", "batched", "conv1d"])
def test_what_follows_a_layer_may_change_its_output_in_place(kind):
    model, ids = in_place(kind)
    sums = {}

    def add(name, x_NI, delta_NO):
        sums[name] = delta_NO.T @ x_NI

    def loss():
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, -2), ids.flatten())

    with watch_activations(model, ["1", "3"], add):
        loss().backward()
    expected = torch.autograd.grad(loss(), [model[1].weight, model[3].weight])
    for name, gradient in zip(("1", "3"), expected, strict=True):
        assert relative(sums[name], to_OI(model[int(name)], gradient)) < 1e-5


def test_gradients_go_down_to_the_first_target_and_no_further():
    model, ids = small_llama(), torch.arange(12).view(2, 6)
    first, later = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    taking, sums = {}, {}
    for name in ("model.embed_tokens", "model.layers.0.mlp", "model.layers.1.self_attn.k_proj", first):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: taking.update({name: output.requires_grad})
        )

    def add(name, x_NI, delta_NO):
        sums[name] = delta_NO.T @ x_NI

    with watch_activations(model, [first, later], add):
        model(ids, labels=ids).loss.backward()
    assert len(taking) == 4
    assert not any(taking.values())  # what the layers give, before it is watched
    weights = [model.get_submodule(name).weight for name in (first, later)]
    expected = torch.autograd.grad(model(ids, labels=ids).loss, weights)
    for name, gradient in zip((first, later), expected, strict=True):
        assert relative(sums[name], gradient) < 1e-5


def test_what_the_caller_gives_is_left_alone():
    model, given = torch.nn.Linear(4, 3), torch.ones(2, 4)
    found = []
    with watch_activations(torch.nn.Sequential(model), ["0"], lambda *parts: found.append(parts)):
        model(given).sum().backward()
    assert len(found) == 1
    assert not given.requires_grad
    assert given.grad is None
    given.add_(1)


def test_inputs_end_with_the_backward_pass_and_a_second_one_is_refused():
    model, inputs = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), []
    model[1].register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0])))
    with watch_activations(model, ["0", "1"], lambda name, x_NI, delta_NO: None):
        loss = model(torch.ones(2, 4)).sum()
        assert inputs[0]() is not None
        loss.backward(retain_graph=True)
        assert inputs[0]() is None  # though the loss is still there
        with pytest.raises(UserError, match=r"^1: a second backward pass through the same forward pass; add"):
            loss.backward()


def one_pass_as_rank(path: str) -> None:
    processes = start_processes()
    found = estimate(embedded(), "sketch", real_examples(), bsz=2, iters=20, processes=processes)
    if processes.is_main:
        torch.save(found.layers, path)


def test_two_processes_lose_nothing_visible_either(tmp_path):
    on_two_processes(one_pass_as_rank, str(tmp_path / "two.pt"))
    found = torch.load(tmp_path / "two.pt", weights_only=False)
    exact = estimate(embedded(), "exact", real_examples(), bsz=2, iters=20)
    for name, best in exact.layers.items():
        assert kept(found[name], best) > 0.98, name


STORIES = SHARED / "models" / "stories3M"
GSM8K = SHARED / "data/gsm8k/train.jsonl"
COMMONSENSE = SHARED / "data/commonsense/train_mix_20k.json"


def published_examples(name: str) -> list:
    if name == "gsm8k":
        rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:128]]
        pairs = [(f"Q: {row['question']}\nA:", row["answer"]) for row in rows]
    else:
        pairs = [(row["instruction"], row["output"]) for row in json.loads(COMMONSENSE.read_text())[:128]]
    tokenizer, examples = AutoTokenizer.from_pretrained(STORIES), []
    for prompt, target in pairs:
        n_prompt, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {target}")["input_ids"]
        examples.append(Encoded(np.array(ids[-384:], dtype=np.int32), min(n_prompt, 380, len(ids) - 2)))
    return examples


@pytest.mark.skipif(not STORIES.is_dir(), reason="no ../shared/models/stories3M")
@pytest.mark.parametrize("data", ["gsm8k", "commonsense"])
@pytest.mark.parametrize(("bsz", "iters"), [(1, 8), (8, 8)])
def test_the_default_on_a_pretrained_model_and_published_data(data, bsz, iters):
    """Energy at rank 2r against the best rank 2r, r = 8, in the worst layer."""
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    targets, examples = tuple(linear_layers(model)), published_examples(data)
    ranks, settings = dict.fromkeys(targets, 8), {"bsz": bsz, "iters": iters}
    found = estimate_gradient(
        model, targets, examples, config("auto", **settings), ranks=ranks, pad_id=0, processes=ALONE
    )
    assert found.estimator == ("sketch" if bsz == 8 else "sketch_two_pass")
    with collect_gradients(model, targets) as exact:
        for slots in sample_batches(examples, config("exact", **settings), ALONE)[1]:
            weighted_loss(model, collate_slots(examples, slots, 0)).backward()
    for name, ours in found.layers.items():
        assert energy_share(exact.G_OI[name], ours, 16) > 0.995, name
