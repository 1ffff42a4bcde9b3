"""Time, memory and accuracy of a whole initialisation, side by side in one run.

    python scripts/bench_init.py                         # hidden 1024, 64 examples in 8 batches
    python scripts/bench_init.py --grow                  # and how it grows with size, layers and batches
    python scripts/bench_init.py --model path/to/model --data path/to/texts.txt

Compared, on copies of one model and the same batches, each from the pretrained model to the adapted one:

    floor        a bare forward and backward pass to the activations, no initialisation at all
    exact, sketch, sketch_two_pass      LoRA-GA here, with each estimator
    peft         PEFT's preprocess_loraga and get_peft_model (which is another formula)
    published    the released LoRA-One procedure: a hook on every parameter moves its gradient to the CPU,
                 then svd_lowrank(q=512, niter=16) of each target

Times are medians of rounds in which every method runs once, as ratios to the floor of the same round.
Memory is the peak of live tensor bytes above the peak of the floor, from a run of its own. Energy is that
of the gradient between the kept singular vectors, against the best of the same rank, in the worst layer.
"""

import argparse
import copy
import gc
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraGAConfig as PeftLoraGAConfig
from peft.tuners.lora import preprocess_loraga as peft_preprocess_loraga
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one import adapters
from lora_one.collect import collect_gradients, watch_activations
from lora_one.config import ExperimentConfig
from lora_one.data.encoding import Encoded
from lora_one.data.tiny import problems
from lora_one.gradients import EstimatorChoice, choose_estimator, estimate_gradient
from lora_one.inits import init_factors
from lora_one.layers import shape_OI
from lora_one.losses import weighted_loss
from lora_one.memory import LivePeak
from lora_one.models import EMBEDDED_MODEL, linear_layers, model_source
from lora_one.processes import Processes
from lora_one.sample import gradient_batches
from lora_one.starts import gradient_starts
from lora_one.tables import markdown_table
from lora_one.triplets import Triplets, energy_share

OURS = ("exact", "sketch", "sketch_two_pass")
METHODS = ("floor", *OURS, "peft", "published")
ALPHA, GAMMA = 16, 16


@dataclass(frozen=True)
class Case:
    """One model and one sample."""

    model: Any
    examples: list[Encoded]
    config: ExperimentConfig
    device: torch.device
    targets: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Of the adapters."""
        return self.config.peft.lora_r

    def batches(self) -> Iterable[dict[str, Tensor]]:
        """The batches of the sample, in order."""
        return gradient_batches(self.examples, self.config, 0, self.device)

    def passes(self, model: Any) -> None:
        """Forward and backward over the whole sample."""
        for batch in self.batches():
            weighted_loss(model, batch).backward()


@dataclass
class Measured:
    """What came of one method."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    triplets: dict[str, Triplets] = field(default_factory=dict)


# ---- the methods: each takes the case and a model of its own, and returns the triplets it found


def run_floor(case: Case, model: Any) -> dict[str, Triplets]:
    """No initialisation: what any method that looks at gradients has to pay at least."""
    with watch_activations(model, (), lambda name, x_NI, delta_NO: None):
        case.passes(model)
    return {}


def run_ours(estimator: str) -> Callable[[Case, Any], dict[str, Triplets]]:
    """Estimate, decomposition and adapters, as in run_exp.py."""

    def run(case: Case, model: Any) -> dict[str, Triplets]:
        settings = case.config.model_copy(
            update={"init": case.config.init.model_copy(update={"estimator": estimator})}
        )
        ranks = dict.fromkeys(case.targets, case.rank)
        alone = Processes(rank=0, world_size=1, device=case.device)
        estimate = estimate_gradient(
            model, case.targets, case.examples, settings, ranks=ranks, pad_id=0, processes=alone
        )
        alphas = dict.fromkeys(case.targets, float(ALPHA))
        adapter = adapters.lora_config(case.targets, settings.peft, ranks, alphas, task_type="CAUSAL_LM")
        adapted = adapters.add_adapter(model, adapter, settings.seed, torch.float32)
        inits = gradient_starts(
            estimate.layers,
            settings.gradient_start(),
            ranks=ranks,
            scalings=adapters.scalings(adapted),
            read_weight=adapters.weight_reader(adapted),
        )
        adapters.apply_init(adapted, inits, shift="weight")
        return {name: layer for name, layer in estimate.layers.items() if isinstance(layer, Triplets)}

    return run


def run_peft(case: Case, model: Any) -> dict[str, Triplets]:
    """PEFT's own, as its documentation says."""
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=ALPHA,
        use_rslora=True,
        target_modules=list(case.targets),
        init_lora_weights="lora_ga",  # type: ignore[arg-type]  # its annotation lacks it
        lora_ga_config=PeftLoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=GAMMA),
    )
    peft_preprocess_loraga(model, config, lambda: case.passes(model))
    peft.get_peft_model(model, config)
    return {}


def run_published(case: Case, model: Any) -> dict[str, Triplets]:
    """The released LoRA-One procedure, transcribed; q is as large as the layer allows."""
    kept: dict[str, Tensor] = {}

    def to_cpu(name: str) -> Callable[[Tensor], None]:
        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.detach().cpu()  # its loss carries the mean's weights already
            kept[name] = kept[name] + gradient if name in kept else gradient
            parameter.grad = None

        return move

    model.train().requires_grad_(True)
    handles = [p.register_post_accumulate_grad_hook(to_cpu(name)) for name, p in model.named_parameters()]
    case.passes(model)
    for handle in handles:
        handle.remove()
    config = peft.LoraConfig(
        r=case.rank, lora_alpha=ALPHA, use_rslora=True, target_modules=list(case.targets)
    )
    adapted: Any = peft.get_peft_model(model, config)
    found = {}
    for name in case.targets:
        G_OI = kept[f"{name}.weight"].float().to(case.device)
        U_OK, S_K, V_IK = torch.svd_lowrank(G_OI, q=min(512, *G_OI.shape), niter=16)
        start = init_factors(
            U_OK, S_K, V_IK, rank=case.rank, direction="LoRA-One", scale="stable", gamma=128, scaling=1.0
        )
        layer: Any = adapted.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(start.A_RI)
        layer.lora_B["default"].weight.data.copy_(start.B_OR)
        k = 2 * case.rank
        found[name] = Triplets(U_OK[:, :k].cpu(), S_K[:k].cpu(), V_IK[:, :k].cpu(), float(S_K.norm()))
    return found


RUN: dict[str, Callable[[Case, Any], dict[str, Triplets]]] = {
    "floor": run_floor,
    **{name: run_ours(name) for name in OURS},
    "peft": run_peft,
    "published": run_published,
}


# ---- measuring


def peak_bytes(case: Case, method: str) -> int:
    """Peak bytes of tensors made by a method, on the GPU where there is one."""
    model = copy.deepcopy(case.model)
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        RUN[method](case, model)
        return torch.cuda.max_memory_allocated() - before
    with LivePeak() as meter:
        RUN[method](case, model)
    return meter.peak


def seconds(case: Case, method: str) -> tuple[float, dict[str, Triplets]]:
    """Time of a method on a fresh copy of the model."""
    model = copy.deepcopy(case.model)
    gc.collect()
    synchronise(case.device)
    begin = time.perf_counter()
    found = RUN[method](case, model)
    synchronise(case.device)
    return time.perf_counter() - begin, found


def synchronise(device: torch.device) -> None:
    """Waits for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, methods: Sequence[str], rounds: int) -> dict[str, Measured]:
    """Every method, ``rounds`` times in turn."""
    found = {method: Measured() for method in methods}
    seconds(case, "floor")  # the first pass of a program is slower
    for number in range(rounds):
        for method in methods:
            print(f"\rround {number + 1} of {rounds}: {method:<20}", end="", file=sys.stderr, flush=True)
            took, triplets = seconds(case, method)
            found[method].seconds.append(took)
            found[method].ratios.append(took / found["floor"].seconds[number])
            found[method].triplets = triplets
    for method in methods:
        print(f"\rmemory: {method:<20}", end="", file=sys.stderr, flush=True)
        found[method].peak_bytes = peak_bytes(case, method)
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
    return found


class Energies:
    """How much of the gradient's energy lies between k triplets, against the best k."""

    def __init__(self, case: Case) -> None:
        model = copy.deepcopy(case.model)
        with collect_gradients(model, case.targets) as sums:
            case.passes(model)
        self.G_OI = sums.G_OI

    def shares(self, triplets: dict[str, Triplets], k: int) -> list[float]:
        """Of all targets."""
        return [energy_share(self.G_OI[name], found, k) for name, found in triplets.items()]


# ---- what is shown


def formula_bytes(case: Case) -> int:
    """2 (m + n) (k + l) · 4 bytes, summed over the targets: what a streaming pass should not exceed."""
    size = one_pass_estimator(case).size
    return sum(
        2 * sum(shape_OI(case.model.get_submodule(name))) * (size.right + size.left) * 4
        for name in case.targets
    )


def gradient_bytes(case: Case) -> int:
    """All targets' gradients in float32."""
    return sum(4 * math.prod(shape_OI(case.model.get_submodule(name))) for name in case.targets)


def one_pass_estimator(case: Case) -> EstimatorChoice:
    """The one-pass estimator with its sizes for this case."""
    settings = case.config.model_copy(
        update={"init": case.config.init.model_copy(update={"estimator": "sketch"})}
    )
    ranks = dict.fromkeys(case.targets, case.rank)
    return choose_estimator(settings, case.model, case.targets, ranks, len(case.examples))


def report(case: Case, found: dict[str, Measured], energies: Energies | None) -> str:
    """One row a method."""
    header = ["method", "s", "× floor", "extra MB", "× fp32 gradients", "× formula"]
    rows = [[*header, *(["energy r", "energy 2r", "mean 2r"] if energies else [])]]
    floor = found["floor"]
    for method, measured in found.items():
        extra = measured.peak_bytes - floor.peak_bytes
        row = [
            method,
            f"{statistics.median(measured.seconds):.2f}",
            f"{statistics.median(measured.ratios):.2f}",
            f"{extra / 1e6:,.1f}",
            f"{extra / gradient_bytes(case):.3f}",
            f"{extra / formula_bytes(case):.2f}",
        ]
        if energies and measured.triplets:
            at_r, at_2r = (energies.shares(measured.triplets, n * case.rank) for n in (1, 2))
            row += [f"{min(at_r):.4f}", f"{min(at_2r):.4f}", f"{statistics.mean(at_2r):.4f}"]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return markdown_table(rows)


def ratios(found: dict[str, Measured]) -> str:
    """The one-pass estimator against what users would run instead."""
    ours = found["sketch"]
    lines = []
    for other in ("floor", "peft", "published"):
        if other in found:
            pairs = zip(ours.seconds, found[other].seconds, strict=True)
            lines.append(f"sketch / {other}: {statistics.median(a / b for a, b in pairs):.3f}")
    return "\n".join(lines)


# ---- the cases


def random_model(hidden: int, layers: int, vocabulary: int) -> Any:
    """A Llama of random weights, with the proportions of Llama-2."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
    )
    return LlamaForCausalLM(config)


def make_case(arguments: argparse.Namespace, **changes: int) -> Case:
    """The model and the sample that the arguments describe."""
    sizes = {name: getattr(arguments, name) for name in ("hidden", "layers", "batches", "bsz")} | changes
    source = model_source(arguments.model or EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        model = random_model(sizes["hidden"], sizes["layers"], arguments.vocabulary)
    model = model.eval().to(device=device, dtype=getattr(torch, arguments.dtype))
    model.config.use_cache = False
    targets = tuple(linear_layers(model))
    config = ExperimentConfig.model_validate(
        {
            "dataset": {"name": "tiny"},
            "model": {"name": "bench"},
            "peft": {"lora_r": arguments.rank, "lora_alpha": ALPHA},
            "init": {
                "direction": "LoRA-GA",
                "stable_gamma": GAMMA,
                "bsz": sizes["bsz"],
                "iters": sizes["batches"],
            },
        }
    )
    examples = make_examples(tokenizer, arguments, sizes["bsz"] * sizes["batches"])
    return Case(model, examples, config, device, targets)


def make_examples(tokenizer: Any, arguments: argparse.Namespace, n: int) -> list[Encoded]:
    """Pieces of text of equal length: of a file, or of the generated word problems."""
    if arguments.data:
        texts = Path(arguments.data).read_text(encoding="utf-8").splitlines()
    else:
        texts = [
            f"{row['question']} {row['answer']}" for row in problems("train", n * arguments.tokens // 16)
        ]
    ids = np.array([index for text in texts for index in tokenizer(text)["input_ids"]], dtype=np.int32)
    length = arguments.tokens
    if len(ids) < n * length:
        sys.exit(f"error: --data {arguments.data}: {len(ids)} tokens, {n * length} are needed")
    return [Encoded(ids[i * length : (i + 1) * length], 1) for i in range(n)]


def grow(arguments: argparse.Namespace) -> str:
    """How time and memory of the exact and the one-pass estimator grow."""
    rows = [["hidden", "layers", "batches", "method", "s", "× floor", "extra MB", "× fp32 gradients"]]
    changes: list[dict[str, int]] = [{"hidden": hidden} for hidden in (256, 512, 1024, 2048)]
    changes += [{"hidden": 512, "layers": layers} for layers in (1, 2, 8)]
    changes += [{"hidden": 512, "batches": batches} for batches in (4, 16, 32)]
    for change in changes:
        case = make_case(arguments, **({"layers": 2} | change))
        found = measure(case, ("floor", "exact", "sketch"), arguments.rounds)
        for method in ("exact", "sketch"):
            extra = found[method].peak_bytes - found["floor"].peak_bytes
            rows.append(
                [
                    *(str({"layers": 2, "batches": arguments.batches, **change}[key]) for key in rows[0][:3]),
                    method,
                    f"{statistics.median(found[method].seconds):.2f}",
                    f"{statistics.median(found[method].ratios):.2f}",
                    f"{extra / 1e6:,.1f}",
                    f"{extra / gradient_bytes(case):.3f}",
                ]
            )
    return markdown_table(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--vocabulary", type=int, default=8192, help="an output layer with the share of a whole model's"
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--bsz", type=int, default=8, help="examples a batch")
    parser.add_argument("--tokens", type=int, default=32, help="tokens an example")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=METHODS[1:])
    parser.add_argument("--model", help="a folder or a Hub name, instead of random weights")
    parser.add_argument("--data", help="a text file, instead of the generated word problems")
    parser.add_argument("--no-energy", action="store_true", help="leave out the accuracy")
    parser.add_argument("--grow", action="store_true", help="also the table of growth")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    case = make_case(arguments)
    where = (
        torch.cuda.get_device_name()
        if case.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    settings = case.model.config
    shape = f"hidden {settings.hidden_size}, {settings.num_hidden_layers} layers, {settings.vocab_size} words"
    sample = f"{arguments.batches} batches of {arguments.bsz} x {arguments.tokens} tokens"
    print(f"{shape}, {len(case.targets)} targets, r = {case.rank}, {sample}, {arguments.dtype}, {where}\n")
    found = measure(case, ("floor", *arguments.methods), arguments.rounds)
    energies = None if arguments.no_energy else Energies(case)
    print(report(case, found, energies))
    if "sketch" in found:
        print("\n" + ratios(found))
    if arguments.grow:
        print("\n" + grow(arguments))


if __name__ == "__main__":
    main()
