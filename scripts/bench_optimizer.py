"""Time and memory of the optimiser step alone, on the adapters of Llama-2-7B, side by side in one run.

    python scripts/bench_optimizer.py                 # r = 8 on all 32 layers, r = 64 on 8 of them
    python scripts/bench_optimizer.py --ranks 64 --layers 32

Compared, on factors and gradients of their own:

    adamw        torch's fused AdamW: the part that all of them pay
    classic, symmetric, sylvester       ScaledAdamW here, with each form of the preconditioner
    peft         PEFT's create_riemannian_optimizer around the same AdamW; it has the classic form alone

Each has a process of its own with AdamW beside it, as in a training: what one leaves in the allocator
changes the other's time. Each round the processes take turns, with one step of each from the same gradients.
The overhead is a method's time less that of AdamW beside it; shown are medians, and the median ratio of
overheads. Memory is what the step itself needs.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.memory import LivePeak
from lora_one.optimizers import ScaledAdamW
from lora_one.preconditioners import FactorPair, Form
from lora_one.tables import markdown_table

HIDDEN, MLP, LAYERS = 4096, 11008, 32
# (out, in) of the seven linear layers of one block.
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)]
FORMS: dict[str, Form] = {"classic": "classic", "symmetric": "symmetric", "sylvester": "sylvester"}
DAMPING = 1e-2  # PEFT's default
METHODS = ("adamw", *FORMS, "peft")


class Side(nn.Module):
    """One factor, by the name that PEFT gives it."""

    def __init__(self, rows: int, columns: int, scale: float) -> None:
        super().__init__()
        self.default = nn.Linear(columns, rows, bias=False)
        nn.init.normal_(self.default.weight, std=scale)


class Layer(nn.Module):
    """The two factors of one layer."""

    def __init__(self, n_out: int, n_in: int, rank: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = Side(rank, n_in, n_in**-0.5), Side(n_out, rank, 0.01)


class Method:
    """Factors of its own, their gradients, and an optimiser."""

    def __init__(self, name: str, n_layers: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        shapes = [shape for _ in range(n_layers) for shape in SHAPES]
        self.model = nn.ModuleList([Layer(*shape, rank) for shape in shapes]).to(device=device, dtype=dtype)
        self.parameters = list(self.model.parameters())
        self.gradients = [torch.randn_like(parameter) * 1e-3 for parameter in self.parameters]
        self.optimizer = self._optimizer(name)

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}
        if name == "adamw":
            return torch.optim.AdamW(self.parameters, fused=True, **settings)
        if name == "peft":
            model: Any = self.model
            return create_riemannian_optimizer(model, torch.optim.AdamW, reg=DAMPING, fused=True, **settings)
        by_name = dict(self.model.named_parameters())
        pairs = [
            FactorPair(
                str(n), by_name[f"{n}.lora_A.default.weight"], by_name[f"{n}.lora_B.default.weight"], 1.0
            )
            for n in range(len(self.model))
        ]
        return ScaledAdamW(self.parameters, pairs, form=FORMS[name], damping=DAMPING, **settings)

    def prepare(self) -> None:
        """Fresh gradients: preconditioners work in place."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.copy_(gradient)

    def step(self) -> float:
        """Seconds of one step."""
        self.prepare()
        synchronise()
        begin = time.perf_counter()
        self.optimizer.step()
        synchronise()
        return time.perf_counter() - begin

    def peak_bytes(self) -> int:
        """What a step needs beyond factors, gradients and moments."""
        self.prepare()
        if isinstance(self.optimizer, ScaledAdamW):
            self.optimizer.free_workspace()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.optimizer.step()
            return torch.cuda.max_memory_allocated() - before
        with LivePeak() as meter:
            self.optimizer.step()
        return meter.peak


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(turns: Connection, name: str, *settings: Any) -> None:
    """A method's process: at each turn the seconds of AdamW's step and of its own, at the end the memory."""
    plain, method = Method("adamw", *settings), Method(name, *settings)
    for one in (plain, method):
        one.step()  # makes the moments
    turns.send(None)
    while turns.recv():
        turns.send((plain.step(), method.step()))
    turns.send((plain.peak_bytes(), method.peak_bytes()))


def measure(rank: int, n_layers: int, rounds: int, dtype: torch.dtype, device: torch.device) -> str:
    """The table of one rank."""
    processes, turns = [], {}
    for name in METHODS[1:]:
        turns[name], theirs = multiprocessing.Pipe()
        settings = (theirs, name, n_layers, rank, dtype, device)
        processes.append(multiprocessing.get_context("spawn").Process(target=serve, args=settings))
        processes[-1].start()
        theirs.close()  # so that a process that dies is noticed
    for turn in turns.values():
        turn.recv()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for number in range(rounds):
        print(f"\rr = {rank}: round {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for name, turn in turns.items():
            turn.send(True)
            seconds[name].append(turn.recv())
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    memory = {}
    for name, turn in turns.items():
        turn.send(False)
        memory["adamw"], memory[name] = turn.recv()
    for process in processes:
        process.join()
    return report(seconds, memory)


def report(seconds: dict[str, list[tuple[float, float]]], memory: dict[str, int]) -> str:
    """The table, from each method's times beside AdamW's."""
    rows = [["method", "ms", "AdamW beside it, ms", "overhead, ms", "/ PEFT's", "memory of a step, MB"]]
    overheads = {name: [own - plain for plain, own in pairs] for name, pairs in seconds.items()}
    for name, pairs in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(overheads[name], overheads["peft"], strict=True)]
        plain, own = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        over = 1e3 * statistics.median(overheads[name])
        figures = (f"{own:.1f}", f"{plain:.1f}", f"{over:.1f}", f"{statistics.median(ratios):.2f}")
        rows.append([name, *figures, f"{memory[name] / 1e6:.1f}"])
    return markdown_table(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--layers", type=int, help="blocks of seven targets; default 32, 8 from r = 64 on")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = f"{torch.get_num_threads()} CPU threads"
    where = threads if device.type == "cpu" else torch.cuda.get_device_name()
    for rank in arguments.ranks:
        n_layers = arguments.layers or (LAYERS if rank < 64 else LAYERS // 4)
        table = measure(rank, n_layers, arguments.rounds, getattr(torch, arguments.dtype), device)
        print(f"r = {rank}, {n_layers * len(SHAPES)} targets, {arguments.dtype}, {where}\n\n{table}\n")


if __name__ == "__main__":
    main()
