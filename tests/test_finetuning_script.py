"""The fine-tuning example: what it prints and writes, and one line for every mistake."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from conftest import EMBEDDED, ROOT, SHARED
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

sys.path.insert(0, str(ROOT / "scripts"))

import lora_ga_finetuning

SCRIPT = ROOT / "scripts" / "lora_ga_finetuning.py"
SHORT = (
    "--r 4 --max_length 32 --grad_estimate_iters 4 --max_steps 12 --batch_size 4 --learning_rate 1e-2".split()
)
FULL_EXAMPLE = """
    --base_model gpt2 --dataset_name wikitext --dataset_config wikitext-2-raw-v1 --output_dir ./lora_ga_output
    --r 8 --lora_alpha 16 --lora_dropout 0.1 --direction ArB2r --scale stable --stable_gamma 16
    --grad_estimate_iters 64 --grad_estimate_batch_size 2 --num_epochs 3 --batch_size 8 --learning_rate 3e-5
""".split()
SENTENCES = [f"Tom has {i} apples and buys {j} more. How many apples?" for i in range(30) for j in range(10)]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A folder with a random GPT-2 of 64 positions, and the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    set_seed(0)
    shape = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "sums.txt"
    path.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def script(monkeypatch, capfd, tmp_path, gpt2, texts):
    """Runs the script in this process, by default on the small model and the generated text."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a model a second one only waits

    def call(*flags: object) -> subprocess.CompletedProcess[str]:
        given = [str(flag) for flag in flags]
        standard = {"--base_model": gpt2, "--dataset_name": texts, "--output_dir": tmp_path / "out"}
        for flag, value in standard.items():
            given += [] if flag in given else [flag, str(value)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
        code = 0
        capfd.readouterr()
        try:
            lora_ga_finetuning.main()
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(given, code, *capfd.readouterr())

    yield call
    torch.set_num_threads(n_threads)


def perplexities(done: subprocess.CompletedProcess[str]) -> list[float]:
    """Of the base model, after the start, after training, and of the saved adapter."""
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^perplexity (.+?): +(\S+)$", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in stages] == [
        "of the base model",
        "after the start",
        "after training",
        "of the saved adapter",
    ]
    return [float(value) for _, value in stages]


@pytest.mark.parametrize("direction", ["ArB2r", "LoRA-One"])
def test_it_learns_and_what_it_saves_travels(script, tmp_path, gpt2, direction):
    base, start, trained, reloaded = perplexities(script(*SHORT, "--direction", direction))
    if direction == "LoRA-One":
        assert start != pytest.approx(base, rel=1e-4)
    else:
        assert start == pytest.approx(base, rel=1e-4)
    assert trained < 0.9 * min(base, start)
    assert reloaded == pytest.approx(trained, rel=1e-3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == (4 if direction == "LoRA-One" else 8)
    assert set(config["target_modules"]) == {"c_attn"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "out")
    assert model.peft_config["default"].base_model_name_or_path == str(gpt2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_every_flag_of_the_published_example(script, monkeypatch, tmp_path, gpt2, texts):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    defaults = vars(lora_ga_finetuning.parse_args())
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *FULL_EXAMPLE])
    given = vars(lora_ga_finetuning.parse_args())
    assert {name for name in given if given[name] != defaults[name]} == {"lora_dropout"}
    monkeypatch.chdir(tmp_path)
    scaled = {"gpt2": gpt2, "wikitext": texts, "64": 4, "3e-5": 1e-2, "3": 0.5}
    with pytest.warns(UserWarning, match="lora_dropout > 0 with LoRA-GA"):
        done = script(*[scaled.get(word, word) for word in FULL_EXAMPLE])
    base, start, trained, reloaded = perplexities(done)
    assert start == pytest.approx(base, rel=1e-4)
    assert trained < base
    assert reloaded == pytest.approx(trained, rel=1e-3)
    assert (tmp_path / "lora_ga_output" / "adapter_model.safetensors").is_file()
    assert "blocks of 64 tokens" in done.stdout  # the model's limit


def test_gamma_is_that_of_the_paper_of_the_direction(monkeypatch):
    for flags, gamma in (["", 16], ["--direction LoRA-One", 128], ["--stable_gamma 7", 7]):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
        assert lora_ga_finetuning.parse_args().stable_gamma == gamma


def test_the_cached_gradient_is_used_again(script, tmp_path):
    cache = tmp_path / "cache" / "gradient.safetensors"
    first = script(*SHORT, "--cache_file", cache, "--max_steps", "1")
    assert "gradient: estimated on 8 training blocks" in first.stdout
    written = cache.stat().st_mtime_ns
    second = script(*SHORT, "--cache_file", cache, "--max_steps", "1")
    assert "estimated" not in second.stdout
    assert f"gradient: read from {cache}" in second.stdout
    assert perplexities(first) == perplexities(second)
    assert cache.stat().st_mtime_ns == written


def test_other_directions_scales_and_targets(script, tmp_path):
    cases = [
        ("--direction ArBr --scale weight_svd", {"c_attn"}),
        ("--direction A2rBr --scale gd_scale --target_modules c_attn c_fc", {"c_attn", "c_fc"}),
        ("--direction random --scale unit --target_modules all-linear", {"c_attn", "c_fc", "c_proj"}),
        ("--direction LoRA-GA --target_modules c_proj", {"c_proj"}),
    ]
    for flags, targets in cases:
        base, start, *_ = perplexities(script(*SHORT, *flags.split(), "--max_steps", "1"))
        assert start == pytest.approx(base, rel=1e-4)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == targets


@pytest.mark.parametrize("direction", ["ArB2r", "LoRA-One"])
def test_four_bits(script, tmp_path, direction):
    pytest.importorskip("bitsandbytes")
    flags = (*SHORT, "--quantization", "4bit", "--direction", direction, "--cache_file", tmp_path / "cache")
    base, start, trained, reloaded = perplexities(script(*flags))
    assert direction == "LoRA-One" or start == pytest.approx(base, rel=1e-4)
    assert trained < 0.9 * min(base, start)
    assert reloaded == pytest.approx(trained, rel=1e-3)
    assert perplexities(script(*flags))[:2] == pytest.approx([base, start], rel=1e-4)


def test_kinds_of_local_data(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = datasets.Dataset.from_dict({"text": SENTENCES, "number": list(range(len(SENTENCES)))})
    rows.to_csv(tmp_path / "a.csv")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in SENTENCES]))
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=rows, validation=rows.select(range(50))).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    shutil.copy(tmp_path / "a.txt", tmp_path / "files" / "train.txt")
    shutil.copy(tmp_path / "a.txt", tmp_path / "files" / "valid.txt")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    sizes = {}
    for name in ["a.csv", "a.parquet", "a.jsonl", "a.json", "a.txt", "plain", "splits", "files"]:
        args = argparse.Namespace(
            dataset_name=str(tmp_path / name), seed=0, grad_estimate_iters=1, grad_estimate_batch_size=1
        )
        train, validation = lora_ga_finetuning.load_blocks(args, tokenizer, 32)
        sizes[name] = (len(train), len(validation))
        assert train[0]["input_ids"].tolist() == train[0]["labels"].tolist()
    tokens = tokenizer("\n".join(SENTENCES) + "\n", verbose=False)["input_ids"]
    n = len(tokens) // 32
    assert sizes["files"] == (n, n)
    assert sizes["splits"] == (n, len(tokenizer("\n".join(SENTENCES[:50]) + "\n")["input_ids"]) // 32)
    held_out = -(-n // 20)
    assert {sizes[name] for name in sizes if name not in {"files", "splits"}} == {(n - held_out, held_out)}


def spoiled(folder: Path, gpt2: Path) -> dict[str, Path]:
    """Files and folders that cannot be used."""
    places = {name: folder / name for name in ["empty", "dumb", "weightless", "a.docx", "bad.json", "no.csv"]}
    places |= {
        name: folder / name for name in ["number.csv", "short.txt", "empty.txt", "bytes.txt", "test_only"]
    }
    places["empty"].mkdir()
    for name, unwanted in (("dumb", "token*"), ("weightless", "*.safetensors")):
        shutil.copytree(gpt2, places[name])
        for path in places[name].glob(unwanted):
            path.unlink()
    places["a.docx"].write_text("x")
    places["bad.json"].write_text('{"text": "x')
    places["no.csv"].write_text("content,label\nsome words,1\n")
    places["number.csv"].write_text("text\n1\n2\n")
    places["short.txt"].write_text("A few words.\n")
    places["empty.txt"].write_text("")
    places["bytes.txt"].write_bytes(b"\xff\xfe\x00\xff" * 10)
    test = datasets.Dataset.from_dict({"text": SENTENCES})
    datasets.DatasetDict(test=test).save_to_disk(places["test_only"])
    return places


def test_mistakes_are_one_line(script, tmp_path, gpt2):
    places = spoiled(tmp_path, gpt2)
    cases = [
        ("--base_model ./nowhere", "--base_model ./nowhere: no such file or folder; mend the path"),
        (
            "--base_model {empty}",
            "--base_model {empty}: has no config.json; give the folder of a saved model",
        ),
        ("--base_model {dumb}", "--base_model {dumb}: has no tokenizer; save one in the same folder"),
        ("--base_model {weightless}", "--base_model {weightless}: cannot be read"),
        ("--base_model no-such-model", "--base_model no-such-model: the Hugging Face Hub cannot be reached"),
        ("--dataset_name wikitext", "--dataset_name wikitext: the Hugging Face Hub cannot be reached"),
        ("--dataset_name nowhere.txt", "--dataset_name nowhere.txt: no such file or folder; mend the path"),
        (
            "--dataset_name {a.docx}",
            "--dataset_name {a.docx}: cannot be read ('.docx'); or give .txt, .jsonl,",
        ),
        ("--dataset_name {bad.json}", "--dataset_name {bad.json}: cannot be read"),
        ("--dataset_name {bytes.txt}", "--dataset_name {bytes.txt}: cannot be read ('utf-8' codec"),
        ("--dataset_name {empty}", "--dataset_name {empty}: cannot be read"),
        ("--dataset_name {empty.txt}", "--dataset_name {empty.txt}: "),
        ("--dataset_name {no.csv}", "has no text in a column 'text', only content, label; rename"),
        ("--dataset_name {number.csv}", "has no text in a column 'text', only text; rename"),
        ("--dataset_name {test_only}", "has no split 'train', only test; rename one"),
        (
            "--dataset_name {short.txt}",
            "0 training and 0 validation blocks of 32 tokens, too few for 8 and 1",
        ),
        (
            "--grad_estimate_iters 5000",
            "too few for 10000 and 1; give more text, or lower --grad_estimate_iters",
        ),
        ("--r 60", "rank 60: the start needs 120 directions, but transformer.h.0.attn.c_attn has rank 64"),
        ("--target_modules q_proj", "matches no layer; the model has"),
        ("--r 0", "--r 0: give a number above 0"),
        ("--lora_dropout 1", "--lora_dropout 1.0: give a number from 0 to below 1"),
        ("--stable_gamma 0", "stable_gamma=0.0; it must be a number above 0"),
        ("--direction sideways", "argument --direction: invalid choice: 'sideways'"),
        ("--num_epoch three", "argument --num_epochs: invalid float value: 'three'"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--output_dir {short.txt}", "--output_dir {short.txt}: File exists; give another folder"),
        ("--cache_file {empty}", "--cache_file {empty}: is a folder; give the name of a file"),
        ("--cache_file {short.txt}", "{short.txt}: damaged"),
    ]
    for flags, words in cases:
        named = {f"{{{name}}}": str(path) for name, path in places.items()}
        for key, path in named.items():
            flags, words = flags.replace(key, path), words.replace(key, path)
        done = script(*SHORT, *flags.split())
        assert done.returncode == 2, flags
        assert re.fullmatch(r"error: [^\n]*\n", done.stderr), (flags, done.stderr)
        assert words in done.stderr, (flags, done.stderr)
        assert "perplexity" not in done.stdout


def test_it_starts_from_inside_its_folder():
    done = subprocess.run(
        [sys.executable, SCRIPT.name, "--base_model", "./nowhere"],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --base_model ./nowhere: no such file or folder; mend the path")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/models and ../shared/data")
def test_real_model_on_real_data(script, tmp_path):
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    for name, n_lines in (("train_5k.txt", 1000), ("valid.txt", 100)):
        with (SHARED / "data/wikitext2" / name).open(encoding="utf-8") as file:
            (folder / name).write_text("".join(islice(file, n_lines)), encoding="utf-8")
    done = script(
        *["--base_model", SHARED / "models/stories3M", "--dataset_name", folder],
        *"--grad_estimate_iters 4 --max_steps 3 --learning_rate 1e-3".split(),
    )
    base, start, trained, reloaded = perplexities(done)
    assert start == pytest.approx(base, rel=1e-4)
    assert trained < base
    assert reloaded == pytest.approx(trained, rel=1e-3)
