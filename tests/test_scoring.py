"""Choices by logits against one plain forward pass each, on several architectures; label accuracy; GLUE."""

import itertools
import json
import math
import random

import pytest
import torch
from conftest import ALONE, EMBEDDED, SHARED, save_small_t5
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)

from eval import command, eval_glue
from eval.benchmarks.labels import f1, further_figures, grade_labels, jackknife, label_words, matthews
from eval.engine.prefixes import read_prefix
from eval.engine.questions import Question, encode, within
from eval.engine.scoring import choose, score
from eval.subject import Request, Subject
from eval.tasks import GRADERS
from lora_one.config import EvalConfig
from lora_one.data.chat import Rendered
from lora_one.data.rows import HubSource
from lora_one.data.specs import SPECS, DatasetSpec, Example
from lora_one.errors import UserError

PROMPTS = [f"Q: Tom has {i * 37} apples and " + "buys one more " * (i % 7) + "\nAnswer:" for i in range(23)]
CHOICES = [" A", " B", " C", " D"]
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
MAKERS = {
    "llama": lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, **LLAMA)),
    "llama, positions by length": lambda v: LlamaForCausalLM(
        LlamaConfig(vocab_size=v, **LLAMA, max_position_embeddings=80, rope_parameters=ROPE)
    ),
    "mistral, sliding window": lambda v: MistralForCausalLM(
        MistralConfig(vocab_size=v, **LLAMA, sliding_window=9)
    ),
    "gemma2, sliding and capped": lambda v: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=v, **LLAMA, sliding_window=9, final_logit_softcapping=1.0, pad_token_id=0)
    ),
    "gpt2": lambda v: GPT2LMHeadModel(GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4)),
    "opt": lambda v: OPTForCausalLM(
        OPTConfig(
            vocab_size=v, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=512,
        )
    ),
    "bloom": lambda v: BloomForCausalLM(BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4)),
    "mamba": lambda v: MambaForCausalLM(
        MambaConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}  # fmt: skip
CACHED = set(MAKERS) - {"mamba", "llama, positions by length"}


def make(name: str, tokenizer, **asked) -> Subject:
    torch.manual_seed(0)
    model = MAKERS[name](len(tokenizer))
    # Random heads are nearly flat; this makes differences between logits visible.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return Subject(model, tokenizer, ALONE, **asked)


def tokens(tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    """Context and candidates: where the four texts stop being the same."""
    rows = [tokenizer(prompt + choice)["input_ids"] for choice in CHOICES]
    shared = list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
    return [column[0] for column in shared], [row[len(shared)] for row in rows]


@torch.no_grad()
def plainly(subject: Subject) -> torch.Tensor:
    """One prompt at a time, all positions, no padding."""
    subject.model.eval()
    rows = []
    for prompt in PROMPTS:
        context, candidates = tokens(subject.tokenizer, prompt)
        rows.append(
            subject.model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1][candidates]
        )
    return torch.stack(rows).float()


@pytest.mark.parametrize("name", MAKERS)
def test_batches_give_what_one_at_a_time_gives(name, tokenizer):
    expected = plainly(make(name, tokenizer))
    assert expected.std(dim=1).mean() > 1e-2
    for asked in ({"max_tokens": 300}, {"batch_size": 5}, {"max_tokens": 1}, {}):
        scores = choose(make(name, tokenizer, **asked), PROMPTS, CHOICES, Request())
        torch.testing.assert_close(scores.logits, expected, atol=1e-5, rtol=0)
        assert scores.chosen == expected.argmax(1).tolist()
        assert scores.n_cut == 0


@pytest.mark.parametrize("name", MAKERS)
def test_a_shared_beginning_changes_nothing(name, tokenizer):
    subject = make(name, tokenizer, max_tokens=300)
    beginning = "These are questions about apples, pears and what they cost in the shop.\n\n"
    questions = encode(subject, [beginning + prompt for prompt in PROMPTS], CHOICES)
    advanced: list[int] = []
    whole = score(subject, questions, lambda n: None)
    shared = score(subject, questions, advanced.append, shares_prefix=True)
    torch.testing.assert_close(shared, whole, atol=1e-5, rtol=0)
    assert sum(advanced) == len(questions)
    prefix = read_prefix(subject.model, questions, torch.device("cpu"))
    assert (prefix is not None) == (name in CACHED)


def test_only_one_position_reaches_the_head(tokenizer):
    subject = make("llama", tokenizer)
    seen = []
    subject.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    choose(subject, PROMPTS, CHOICES, Request())
    assert seen
    assert all(shape[1] == 1 for shape in seen)
    subject.model.train()
    choose(subject, PROMPTS[:2], CHOICES, Request())
    assert subject.model.training
    assert subject.model(torch.ones(2, 7, dtype=torch.long)).logits.shape[1] == 7


def test_an_encoder_reads_the_prompt_and_its_decoder_takes_one_step(tokenizer, tmp_path):
    model = T5ForConditionalGeneration.from_pretrained(save_small_t5(tmp_path, tokenizer)).eval()
    subject = Subject(model, tokenizer, ALONE, max_tokens=150)
    scores = choose(subject, PROMPTS, [" yes", " no", " maybe"], Request())
    first = [tokenizer(word)["input_ids"][0] for word in ("yes", "no", "maybe")]
    start = torch.tensor([[model.config.decoder_start_token_id]])
    for prompt, logits in zip(PROMPTS, scores.logits, strict=True):
        ids = torch.tensor([[*tokenizer(prompt)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            alone = model(input_ids=ids, decoder_input_ids=start).logits[0, 0, first]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_choose_nothing(tokenizer, value):
    subject = make("llama", tokenizer)
    subject.model.lm_head.weight.data[tokens(tokenizer, PROMPTS[0])[1][2]] = value
    with pytest.raises(UserError, match="logits are not finite"):
        choose(subject, PROMPTS, CHOICES, Request())


def test_half_precision_is_compared_in_float32(tokenizer):
    subject = make("llama", tokenizer)
    subject.model.to(torch.bfloat16)
    assert choose(subject, PROMPTS, CHOICES, Request()).logits.dtype == torch.float32


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/models/stories3M")
@pytest.mark.parametrize(
    ("prompt", "choices", "first"),
    [
        ("Answer:", (" A", " B"), ("▁A", "▁B")),
        ("Answer:", ("A", "B"), ("A", "B")),  # without the space it is another token
        ("Q: 2?\nA: ", ("yes", "no"), ("▁yes", "▁no")),  # the prompt's space is the word's
        ("Q: 2?\nA: ", (" 1", " 0"), ("1", "0")),  # a digit stands apart from its space
        ("so: ", ("not_entailment", "entailment"), ("▁not", "▁ent")),
        ("so:", (" yes", " 1"), ("▁yes", "▁")),  # one swallows the space, one does not
    ],
)
def test_sentencepiece_candidates_are_found_in_context(prompt, choices, first):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories3M")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA))
    (question,) = encode(Subject(model, tokenizer, ALONE), [prompt], choices)
    assert tuple(tokenizer.convert_ids_to_tokens(question.candidates)) == first
    for token, choice in zip(question.candidates, choices, strict=True):
        whole = tokenizer(prompt + choice)["input_ids"]
        assert whole[: len(question.context) + 1] == [*question.context, token]


def test_choices_with_the_same_first_token_are_refused(tokenizer, tmp_path):
    subject = make("llama", tokenizer)
    with pytest.raises(
        UserError, match=r"'not_same' and 'not_equal' start with the same token .* after 'x:'"
    ):
        choose(subject, ["x:"], [" same", " not_same", " not_equal"], Request())
    pair = T5ForConditionalGeneration.from_pretrained(save_small_t5(tmp_path, tokenizer))
    with pytest.raises(UserError, match="'not_same' and 'not_equal' start with the same token"):
        choose(Subject(pair, tokenizer, ALONE), ["x"], ["same", "not_same", "not_equal"], Request())


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_choices_that_all_begin_alike_are_told_apart_where_they_differ(tokenizer, tmp_path, kind):
    subject = make("llama", tokenizer)
    if kind == "pair":
        model = T5ForConditionalGeneration.from_pretrained(save_small_t5(tmp_path, tokenizer))
        subject = Subject(model, tokenizer, ALONE)
    (question,) = encode(subject, ["which?"], ["choice 1", "choice 2"])
    assert tokenizer.decode(list(question.candidates)).replace(" ", "") == "12"
    before = question.begun[1:] if kind == "pair" else question.context
    assert tokenizer.decode(list(before)).rstrip().endswith("choice")


def test_a_prompt_beyond_the_context_loses_its_beginning(tokenizer):
    subject = make("gpt2", tokenizer)
    subject.model.config.n_positions = 20
    scores = choose(subject, PROMPTS, CHOICES, Request())
    lengths = [len(tokens(tokenizer, prompt)[0]) for prompt in PROMPTS]
    assert scores.n_cut == sum(length > 20 for length in lengths) > 0
    longest = lengths.index(max(lengths))
    context, candidates = tokens(tokenizer, PROMPTS[longest])
    with torch.no_grad():
        end = subject.model.eval()(input_ids=torch.tensor([context[-20:]])).logits[0, -1][candidates]
    torch.testing.assert_close(scores.logits[longest], end, atol=1e-5, rtol=0)


def test_the_token_that_starts_a_text_is_not_cut(tokenizer):
    subject = make("llama", tokenizer)
    bos = tokenizer.bos_token_id = 1
    cut = within(Question((bos, 5, 6, 7, 8), (3,)), 3, subject)
    assert (cut.context, cut.is_cut) == ((bos, 7, 8), True)
    assert within(Question((5, 6, 7, 8), (3,)), 3, subject).context == (6, 7, 8)
    assert within(Question((bos, 5, 6), (3,)), 1, subject).context == (bos,)
    whole = Question((bos, 5), (3,))
    assert within(whole, 2, subject) is within(whole, None, subject) is whole


# --- labels ---


def reviews(n: int = 12) -> list[Example]:
    words = ("positive", "negative")
    return [
        Example(f"sst2 sentence: film {i} sentiment:", words[i % 2], words[i % 2], f"{i}") for i in range(n)
    ]


def test_the_tasks_of_a_config_are_the_graders():
    (literal, *_) = EvalConfig.model_fields["task"].annotation.__args__
    assert set(literal.__args__) == set(GRADERS)


def test_accuracy_counts_the_likelier_label(tokenizer, monkeypatch):
    subject, examples = make("llama", tokenizer), reviews()
    assert label_words(examples) == ("negative", "positive")
    result = GRADERS["label"](subject, examples, Request(limit=7), None)
    expected = choose(subject, [e.prompt for e in examples[:7]], [" negative", " positive"], Request())
    rights = [
        ("negative", "positive")[c] == e.target for c, e in zip(expected.chosen, examples, strict=False)
    ]
    assert result.figure.value == sum(rights) / 7
    assert result.figure.n == 7
    assert [row["right"] for row in map(json.loads, result.samples_jsonl().splitlines())] == rights
    assert not result.others


def test_after_a_chat_template_the_label_is_looked_for_where_it_stands(tokenizer):
    """Behind what the template writes before every answer; the end of the turn is no part of the label."""
    subject, plain = make("llama", tokenizer), reviews(4)
    rendered = [
        Example(Rendered(e.prompt), f"<think> </think> {e.answer}</s>", e.answer, e.group) for e in plain
    ]
    result = grade_labels(subject, rendered, Request())
    prompts = [Rendered(f"{e.prompt}<think> </think> ") for e in plain]
    expected = choose(subject, prompts, ["negative", "positive"], Request())
    words = ("negative", "positive")
    assert [row["chosen"] for row in result.samples] == [words[c] for c in expected.chosen]
    assert [row["reference"] for row in result.samples] == [e.answer for e in plain]


def test_labels_that_are_given_need_not_all_be_there(tokenizer):
    subject, labels = make("llama", tokenizer), ("negative", "positive")
    only = [example for example in reviews() if example.answer == "positive"]
    assert grade_labels(subject, only, Request(labels=labels)).figure.n == len(only)


def test_a_split_with_one_label_or_scores_is_refused(tokenizer):
    subject = make("llama", tokenizer)
    with pytest.raises(UserError, match="every row has the label 'positive'"):
        grade_labels(subject, reviews(1), Request())
    scored = [Example(f"{i}:", f"{2 + i % 2}.{i}", f"{2 + i % 2}.{i}", f"{i}") for i in range(4)]
    with pytest.raises(UserError, match=r"'2.0' and '2.2' start with the same token"):
        grade_labels(subject, scored, Request())


def draws(seed: int, n: int, classes: int) -> tuple[list[int], list[int], torch.Tensor]:
    rng = random.Random(seed)
    truth = [rng.randrange(classes) for _ in range(n)]
    found = [label if rng.random() < 0.6 else rng.randrange(classes) for label in truth]
    table = torch.zeros(classes, classes, dtype=torch.float64)
    for row, column in zip(truth, found, strict=True):
        table[row, column] += 1
    return truth, found, table


@pytest.mark.parametrize(("seed", "n", "classes"), [(0, 40, 2), (1, 300, 2), (2, 90, 3), (3, 2, 2)])
def test_f1_and_matthews_are_sklearns(seed, n, classes):
    truth, found, table = draws(seed, n, classes)
    assert matthews(table) == pytest.approx(matthews_corrcoef(truth, found), abs=1e-12)
    per_class = f1_score(truth, found, average=None, labels=range(classes), zero_division=0)
    for positive in range(classes):
        assert f1(table, positive) == pytest.approx(per_class[positive], abs=1e-12)


def test_answers_that_are_all_the_same_have_no_correlation():
    table = torch.tensor([[0.0, 5.0], [0.0, 7.0]])
    assert matthews(table) == 0.0
    assert f1(table, 0) == 0.0
    assert f1(torch.zeros(2, 2), 0) == 0.0


def test_the_jackknife_leaves_out_one_item_at_a_time():
    truth, found, table = draws(4, 60, 2)
    figure = jackknife(table, matthews)
    others = [
        matthews_corrcoef(truth[:i] + truth[i + 1 :], found[:i] + found[i + 1 :]) for i in range(len(truth))
    ]
    mean = sum(others) / 60
    assert figure.standard_error == pytest.approx(math.sqrt(59 / 60 * sum((o - mean) ** 2 for o in others)))
    assert figure.value == pytest.approx(matthews_corrcoef(truth, found))
    # Of a mean it is the usual standard error.
    accuracy = jackknife(table, lambda counts: (counts.trace() / counts.sum()).item())
    p = accuracy.value
    assert accuracy.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 59))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("acceptable", "unacceptable"), {"matthews_correlation"}),
        (("equivalent", "not_equivalent"), {"f1"}),
        (("duplicate", "not_duplicate"), {"f1"}),
        (("entailment", "not_entailment"), set()),
    ],
)
def test_what_else_a_benchmark_reports(labels, names):
    figures = further_figures([0, 1, 1, 0], [0, 1, 0, 1], labels)
    assert set(figures) == names
    if "f1" in names:  # one found rightly, one missed, one wrongly
        assert figures["f1"].value == pytest.approx(0.5)


@pytest.fixture
def sst2(monkeypatch):
    def to_example(row):
        return Example(
            f"sst2 sentence: {row['sentence']} sentiment:", row["label"], row["label"], row["sentence"]
        )

    spec = DatasetSpec(
        ("sentence", "label"),
        to_example,
        {"train": HubSource("none/none", "train")},
        labels=("negative", "positive"),
    )
    monkeypatch.setitem(SPECS, "sst2_here", spec)
    return spec


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "dev.jsonl"
    texts = [{"sentence": f"film {i}", "label": ("positive", "negative")[i % 2]} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.mark.parametrize("kind", ["causal", "pair"])
def test_eval_glue(kind, sst2, rows, tmp_path, tokenizer, capsys):
    name = str(save_small_t5(tmp_path / "t5", tokenizer)) if kind == "pair" else str(EMBEDDED)
    eval_glue.main(
        [f"--model_name={name}", "--task=sst2_here", f"--data={rows}", f"--output_dir={tmp_path}/out"]
    )
    (path,) = (tmp_path / "out").glob("*/sst2_here/result.json")
    result = json.loads(path.read_text())
    assert (result["task"], result["metric"], result["n"]) == ("sst2_here", "accuracy", 9)
    assert "argmax over the first tokens of negative, positive" in capsys.readouterr().out
    chosen = [json.loads(line) for line in path.with_name("samples.jsonl").read_text().splitlines()]
    for row in chosen:
        assert row["chosen"] == max(row["logits"], key=row["logits"].get)


def test_eval_glue_names_what_is_wrong(sst2, rows, tmp_path):
    with pytest.raises(UserError, match=r"--task sst2_her: no such dataset \(did you mean 'sst2_here'"):
        eval_glue.main(["--model_name=x", "--task=sst2_her"])
    with pytest.raises(UserError, match="--task gsm8k: has no label words; there are sst2"):
        eval_glue.main(["--model_name=x", "--task=gsm8k"])
    with pytest.raises(UserError, match=r"none.jsonl: no such data file"):
        eval_glue.main(["--model_name=x", "--task=sst2_here", "--data=none.jsonl"])
    with pytest.raises(UserError, match="has no test split"):
        eval_glue.main(["--model_name=x", "--task=sst2_here"])
    with pytest.raises(UserError, match="/none: no such folder"):
        eval_glue.main(["--model_name=/none", "--task=sst2_here", f"--data={rows}"])


def test_a_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as exited:
        command.run_program(eval_glue.main, ["--model_name=x", "--task=ss"])
    assert exited.value.code == 2
    assert capsys.readouterr().err.startswith("error: --task ss: no such dataset")


def test_a_run_grades_labels_during_and_after_training(cli, sst2, rows, tmp_path):
    done = cli(
        "dataset.name=sst2_here",
        f"dataset.train_file={rows}",
        f"dataset.validation_file={rows}",
        f"dataset.test_file={tmp_path / 'test.jsonl'}",
        "eval.task=label",
        "eval.during_training=true",
        "model.max_steps=2",
        "init=default",
        "wandb.mode=disabled",
    )
    assert done.returncode == 2  # the test file is not there: named, before anything is trained
    assert "test.jsonl: no such data file" in done.stderr
    texts = [{"sentence": f"play {i}", "label": ("positive", "negative")[i % 2]} for i in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    done = cli(
        "dataset.name=sst2_here",
        f"dataset.train_file={rows}",
        "dataset.validation_size=2",
        f"dataset.test_file={tmp_path / 'test.jsonl'}",
        "eval.task=label",
        "eval.during_training=true",
        "model.max_steps=2",
        "init=default",
        "wandb.mode=disabled",
    )
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results").rglob("record.json")
    found = json.loads(record.read_text())["metrics"]["test"]
    assert (found["task"], found["n"]) == ("label", 5)


def test_models_are_not_touched(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).train()
    choose(Subject(model, tokenizer, ALONE), PROMPTS, CHOICES, Request())
    assert all(module.training for module in model.modules())
    assert not model.lm_head._forward_pre_hooks
