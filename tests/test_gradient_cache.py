"""The gradient cache: computed once, found again only for the same thing, and never in the way."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ALONE,
    EMBEDDED,
    on_two_processes,
    only_run,
    random_examples,
    run_script,
    small_llama,
)
from test_streaming import config, products

from lora_one.digests import file_digest
from lora_one.gradient_cache import Entry, cached_estimate, describe_estimate
from lora_one.gradients import estimate_gradient
from lora_one.models import LoadedModel, linear_layers
from lora_one.processes import start_processes
from lora_one.triplets import Triplets

EXAMPLES = random_examples(64)
SCRIPT = "scripts/gradient_cache.py"


def loaded(**changes) -> LoadedModel:
    model = small_llama()
    whole = LoadedModel(model, None, "somewhere", "0123456789abcdef", tuple(linear_layers(model)))
    return replace(whole, **changes)


def entry(estimator="exact", examples=EXAMPLES, model=None, rank=4, settings=None, **init) -> Entry:
    model, settings = model or loaded(), settings or config(estimator, **init)
    return describe_estimate(settings, model, examples, dict.fromkeys(model.targets, rank), ALONE)


def changed(section: str, **values):
    settings = config("exact")
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def token_loss():
    return changed("model", loss_reduction="token")


def in_4_bit():
    return changed("model", quantization="4bit")


def make(estimator="exact", processes=ALONE):
    model = loaded()
    return estimate_gradient(
        model.model,
        model.targets,
        EXAMPLES,
        config(estimator),
        ranks=dict.fromkeys(model.targets, 4),
        pad_id=0,
        processes=processes,
    )


def never():
    raise AssertionError("the gradient was computed")


@pytest.mark.parametrize("estimator", ["exact", "sketch", "sketch_two_pass"])
def test_what_is_read_is_what_was_kept(estimator, tmp_path, capsys):
    first = cached_estimate(str(tmp_path), entry(estimator), lambda: make(estimator), ALONE)
    second = cached_estimate(str(tmp_path), entry(estimator), never, ALONE)
    out = capsys.readouterr().out
    assert out.count("gradient: computed, kept in") == out.count("gradient: read from") == 1
    assert second.cache_file == str(next(tmp_path.glob("*.safetensors")))
    assert replace(second, cache_file=None, layers={}) == replace(first, layers={})
    for name, layer in first.layers.items():
        stored = second.layers[name]
        assert all(
            torch.equal(getattr(layer, part), getattr(stored, part)) for part in ("U_OK", "S_K", "V_IK")
        )
        assert stored.norm == layer.norm


def test_one_entry_serves_every_rank_that_it_covers_and_all_that_is_made_of_it():
    same = {
        entry(rank=4).key,
        entry(rank=8).key,  # 16 triplets
        entry(rank=16, direction="LoRA-One").key,
        entry(scale="gd", direction="A2rBr").key,
        entry(stable_gamma=2.0, norm_clip=True).key,
        entry(settings=config("exact").model_copy(update={"results_dir": "elsewhere"})).key,
    }
    assert len(same) == 1


def test_whatever_changes_the_numbers_changes_the_name():
    masked = [replace(EXAMPLES[0], n_prompt=EXAMPLES[0].n_prompt + 1), *EXAMPLES[1:]]
    whole = {"do_subsampling": False}
    other = small_llama()
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 1.0}
    lower = small_llama(dtype=torch.bfloat16)
    names = [
        entry(rank=16),
        entry(n_triplets=64),
        entry("sketch"),
        entry("sketch_two_pass"),
        entry("sketch", dropout=True),
        entry(dropout=True),
        entry(bsz=2, iters=10),
        entry(**whole),
        entry(objective="sign"),
        entry(settings=token_loss()),
        entry(settings=in_4_bit()),
        entry(objective="adam", scale="gd"),
        entry(objective="adam", scale="gd", rank=5),
        entry(examples=EXAMPLES[::-1]),
        entry(examples=masked, **whole),
        entry(settings=config("exact").model_copy(update={"seed": 1})),
        entry(model=loaded(fingerprint="another")),
        entry(model=loaded(model=other)),
        entry(model=loaded(model=lower)),
        entry(model=loaded(targets=loaded().targets[:-1])),
        entry(),
    ]
    assert len({name.key for name in names}) == len(names)


def damage_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_all(path: Path) -> None:
    path.write_bytes(b"")


def damage_header(path: Path) -> None:
    content = path.read_bytes()
    where = content.index(b'\\"loss\\": ') + 10
    path.write_bytes(content[:where] + b"9" + content[where + 1 :])


@pytest.mark.parametrize("damage", [damage_bytes, damage_end, damage_all, damage_header])
def test_a_damaged_file_is_named_and_made_again(damage, tmp_path, capsys):
    cached_estimate(str(tmp_path), entry(), make, ALONE)
    (path,) = tmp_path.glob("*.safetensors")
    damage(path)
    again = cached_estimate(str(tmp_path), entry(), make, ALONE)
    assert f"note: {path}: damaged" in capsys.readouterr().out
    assert again.cache_file is None
    stored = cached_estimate(str(tmp_path), entry(), never, ALONE)
    assert (stored.cache_file, stored.loss) == (str(path), again.loss)
    for name, layer in again.layers.items():
        assert torch.equal(stored.layers[name].S_K, layer.S_K)


def test_an_entry_under_another_ones_name_is_not_used(tmp_path, capsys):
    cached_estimate(str(tmp_path), entry(), make, ALONE)
    (path,) = tmp_path.glob("*.safetensors")
    other = entry(model=loaded(fingerprint="another"))
    path.rename(tmp_path / f"{other.key}.safetensors")
    assert cached_estimate(str(tmp_path), other, make, ALONE).cache_file is None
    assert "it belongs to another model" in capsys.readouterr().out


def test_nothing_is_kept_of_a_failure_a_model_without_revision_or_where_switched_off(tmp_path, capsys):
    def fail():
        raise ValueError("a batch was not finite")

    with pytest.raises(ValueError, match="not finite"):
        cached_estimate(str(tmp_path), entry(), fail, ALONE)
    cached_estimate(str(tmp_path), entry(model=loaded(fingerprint=None)), make, ALONE)
    assert "revision is unknown" in capsys.readouterr().out
    cached_estimate(None, entry(), make, ALONE)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_full_disk_loses_the_entry_and_not_the_run(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_one.cache.save_file", full)
    assert isinstance(
        next(iter(cached_estimate(str(tmp_path), entry(), make, ALONE).layers.values())), Triplets
    )
    assert "could not be written" in capsys.readouterr().out


def together(rank: int, folder: str, log: str) -> None:
    """A program of a job array: says when it computes."""
    torch.set_num_threads(1)

    def slowly():
        with Path(log).open("a") as file:
            file.write(f"{rank}\n")
        time.sleep(1)
        return make()

    cached_estimate(folder, entry(), slowly, ALONE)


def test_programs_that_start_together_compute_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    programs = [context.Process(target=together, args=(rank, str(tmp_path), str(log))) for rank in range(4)]
    for program in programs:
        program.start()
    for program in programs:
        program.join(timeout=120)
    assert [program.exitcode for program in programs] == [0] * 4
    assert len(log.read_text().split()) == 1


def forever(folder: str) -> None:
    def hang():
        Path(folder, "computing").touch()
        time.sleep(600)

    cached_estimate(folder, entry(), hang, ALONE)


def test_a_killed_writer_blocks_nobody(tmp_path):
    killed = multiprocessing.get_context("spawn").Process(target=forever, args=(str(tmp_path),))
    killed.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "computing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / f"{entry().key}.safetensors.host-1.partial").write_bytes(b"half")
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    cached_estimate(str(tmp_path), entry(), make, ALONE)
    assert cached_estimate(str(tmp_path), entry(), never, ALONE).cache_file
    assert not list(tmp_path.glob("*.partial"))


def cached_as_rank(folder: str, path: str) -> None:
    processes = start_processes()
    made = [0]

    def count():
        made[0] += 1
        return make(processes=processes)

    for _ in range(2):
        found = cached_estimate(folder, entry(), count, processes)
    assert made == [1]
    torch.save(products(found), f"{path}{processes.rank}")


def test_two_processes_of_one_launch_share_an_entry(tmp_path):
    on_two_processes(cached_as_rank, str(tmp_path), f"{tmp_path}/rank")
    first, second = torch.load(tmp_path / "rank0"), torch.load(tmp_path / "rank1")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_digests_of_files_are_computed_once(tmp_path, monkeypatch):
    path, store = tmp_path / "weights", tmp_path / "digests"
    path.write_bytes(b"first")
    digest = file_digest(path, store)
    monkeypatch.setattr("hashlib.file_digest", never)
    assert file_digest(path, store) == digest
    monkeypatch.undo()
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    assert file_digest(path, store) == file_digest(path) != digest
    for kept in store.iterdir():
        kept.write_text("{")
    assert file_digest(path, store) == file_digest(path)


def digest_many(folder: str, log: str) -> None:
    for number in range(30):
        store = Path(folder, str(number))
        file_digest(Path(folder, "weights"), store)
    Path(log).write_text("done")


def test_programs_may_keep_the_same_digest_at_once(tmp_path):
    (tmp_path / "weights").write_bytes(b"some")
    context = multiprocessing.get_context("spawn")
    logs = [tmp_path / f"log{rank}" for rank in range(4)]
    programs = [context.Process(target=digest_many, args=(str(tmp_path), str(log))) for log in logs]
    for program in programs:
        program.start()
    for program in programs:
        program.join(timeout=120)
    assert all(log.read_text() == "done" for log in logs)


def test_a_lock_that_cannot_be_had_is_said_and_does_not_matter(tmp_path, capsys):
    (tmp_path / f"{entry().key}.lock").mkdir()
    assert cached_estimate(str(tmp_path), entry(), make, ALONE).cache_file is None
    assert "no lock" in capsys.readouterr().out
    assert cached_estimate(str(tmp_path), entry(), never, ALONE).cache_file


def test_a_sweep_computes_the_gradient_once(cli, tmp_path):
    """Eight runs: two ranks, two directions, two learning rates."""
    sweep = ["peft.lora_r=4,8", "init.direction=LoRA-One,LoRA-GA", "model.learning_rate=1e-3,2e-3"]
    done = cli("-m", "debug=short", *sweep)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gradient: computed, kept in") == 1
    assert done.stdout.count("gradient: read from") == 7
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").rglob("record.json")]
    files = [record["gradient"]["cache_file"] for record in records]
    assert sorted(file is None for file in files) == [False] * 7 + [True]
    listed = run_script(SCRIPT, str(tmp_path / "results" / "gradients"))
    assert "1 entries" in listed.stdout
    assert "embedded/tiny_llama" in listed.stdout
    pruned = run_script(SCRIPT, str(tmp_path / "results" / "gradients"), "--prune", "--all")
    assert "removed: " in pruned.stdout
    assert "0 entries" in pruned.stdout
    assert not list((tmp_path / "results" / "gradients").glob("*.*"))


def test_another_model_under_the_same_name_is_another_entry(cli, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    arguments = ["debug=short", "model=custom", f"model.name={folder}", "dataset=tiny"]
    assert "gradient: computed" in cli(*arguments).stdout
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert (
        "gradient: computed"
        in cli(*arguments, "seed=0", f"results_dir={tmp_path}/results", "peft.lora_r=4").stdout
    )
    assert "2 entries" in run_script(SCRIPT, f"{tmp_path}/results/gradients").stdout


def test_pruning_by_age_and_size(tmp_path):
    for number, estimator in enumerate(["exact", "sketch", "sketch_two_pass"]):
        cached_estimate(str(tmp_path), entry(estimator), lambda: make("exact"), ALONE)
        old = time.time() - (3 - number) * 86400
        os.utime(tmp_path / f"{entry(estimator).key}.safetensors", (old, old))
    damage_end(tmp_path / f"{entry('sketch_two_pass').key}.safetensors")

    def prune(*options: str) -> subprocess.CompletedProcess[str]:
        return run_script(SCRIPT, str(tmp_path), *options)

    assert "damaged: " in prune().stdout
    assert prune("--all").returncode == 2
    assert prune("--prune", "--unused-days", "2.5").stdout.count("removed: ") == 2  # old, and damaged
    assert "1 entries" in prune().stdout
    assert "over the limit" in prune("--prune", "--max-gb", "0").stdout
    assert run_script(SCRIPT, str(tmp_path / "nowhere")).returncode == 2


def test_a_cache_that_cannot_be_written_is_one_line(cli, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli("debug=short", f"cache_dir={tmp_path}/file/cache")
    assert done.returncode == 2
    assert f"cache_dir={tmp_path}/file/cache: cannot be made" in done.stderr
    off = cli("debug=short", "cache_dir=null")
    assert off.returncode == 0
    assert "gradient: " not in off.stdout
    assert only_run(tmp_path / "results").is_dir()
