"""Chat templates: the prompt masked exactly, the end of the turn learned, the same prompt for generation."""

import json

import pytest
from conftest import EMBEDDED, SHARED
from transformers import AutoTokenizer

from lora_one.config import DatasetConfig, ExperimentConfig
from lora_one.data.chat import Rendered, chat_renderer, turn_end
from lora_one.data.encoding import encode_split, prompt_ids, stop_ids
from lora_one.data.example import Example, RowError
from lora_one.data.loading import load_splits
from lora_one.data.prepare import prepare_data
from lora_one.errors import UserError

STORIES = SHARED / "models" / "stories3M"
# What the families write, for a user's turn "U" and an answer "A": their special tokens, the template,
# the prompt to continue, and what is learned.
CHATML = (
    ["<|im_start|>", "<|im_end|>"],
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    "A<|im_end|>",
)
LLAMA3 = (
    ["<|begin|>", "<|header|>", "<|end_header|>", "<|eot|>"],
    "<|begin|>{% for m in messages %}<|header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|end_header|>\n\n{% endif %}",
    "<|begin|><|header|>user<|end_header|>\n\nU<|eot|><|header|>assistant<|end_header|>\n\n",
    "A<|eot|>",
)
GEMMA = (
    ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "<bos><start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\n",
    "A<end_of_turn>",
)
LLAMA2 = (
    [],
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}",
    "{bos}[INST] U [/INST]",
    " A {eos}",
)
PLAIN = (
    [],
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "user: U\nassistant: ",
    "A{eos}",
)
FAMILIES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "llama2": LLAMA2, "plain": PLAIN}


def chat_tokenizer(family: str, folder=EMBEDDED):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special, template, *_ = FAMILIES[family]
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def folders():
    return [pytest.param(EMBEDDED, id="bpe"), pytest.param(STORIES, id="sentencepiece")]


def needed(folder):
    if not folder.is_dir():
        pytest.skip("needs ../shared/models/stories3M")
    return folder


@pytest.mark.parametrize("folder", folders())
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_target_are_the_templates_own(family, folder):
    tokenizer = chat_tokenizer(family, needed(folder))
    *_, prompt, learned = FAMILIES[family]
    ends = {"{bos}": tokenizer.bos_token, "{eos}": tokenizer.eos_token}
    for name, token in ends.items():
        prompt, learned = prompt.replace(name, token), learned.replace(name, token)
    made = chat_renderer(tokenizer)(Example("Q: U\nA: ", "A", "gold", "g", (("user", "U"),)))
    assert (made.prompt, made.target, made.answer, made.group) == (prompt, learned, "gold", "g")
    split = encode_split([made], tokenizer, joiner=" ", max_length=64, name="train")
    (encoded,) = split.examples
    # Every token once: no special token is added, and none is left out.
    assert encoded.ids.tolist() == tokenizer(prompt + learned, add_special_tokens=False)["input_ids"]
    masked = encoded.ids[: encoded.n_prompt].tolist()
    # For generation the same tokens, but for a space at the end that the answer's first token takes.
    (continued,) = prompt_ids([made.prompt], tokenizer)
    assert continued == masked or (family == "plain" and continued[:-1] == masked)
    # SentencePiece decodes a space after every special token.
    assert tokenizer.decode(masked).replace(" ", "") == prompt.replace(" ", "")
    assert encoded.ids[-1] == turn_end(tokenizer).token
    assert stop_ids([made.prompt], tokenizer)[-1] == encoded.ids[-1]
    assert tokenizer.eos_token_id in stop_ids([made.prompt], tokenizer)


def test_a_plain_prompt_is_read_as_before(tokenizer):
    assert prompt_ids(["Q: 1\nA: "], tokenizer) == [tokenizer("Q: 1\nA: ")["input_ids"]]
    assert stop_ids(["Q: 1\nA: "], tokenizer) == [tokenizer.eos_token_id]
    end = [tokenizer.eos_token_id]
    assert prompt_ids(["Q"], tokenizer, for_encoder=True) == [tokenizer("Q")["input_ids"] + end]
    assert prompt_ids([], tokenizer) == []


def test_without_a_template_it_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"dataset.chat=true: the tokenizer of .* has no chat template"):
        chat_renderer(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="leaves out the assistant's turn"):
        chat_renderer(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match=r"the chat template fails \(never"):
        chat_renderer(tokenizer)


def test_a_template_whose_prompt_does_not_begin_its_answers(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(RowError, match="does not begin an answer with its own generation prompt"):
        chat_renderer(tokenizer)(Example("U", "A", "A", "g"))


def write_conversations(path, rows) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def messages(i: int, *, first=("user",)) -> list[dict[str, str]]:
    turns = [{"role": role, "content": f"{role} {i}"} for role in first]
    return [*turns, {"role": "assistant", "content": f"so {i}"}]


def conversations(path, rows) -> DatasetConfig:
    file = write_conversations(path / "rows.jsonl", rows)
    return DatasetConfig(name="custom", train_file=file, messages="messages", chat=True, validation_size=1)


def test_conversations_learn_the_last_turn(tmp_path):
    tokenizer = chat_tokenizer("chatml")
    long = ("system", "user", "assistant", "user")
    config = conversations(tmp_path, [messages(i, first=long) for i in range(4)])
    splits = load_splits(config, lambda texts: [0] * len(texts), chat_renderer(tokenizer))
    example = next(e for e in (*splits.train, *splits.validation) if e.target == "so 2<|im_end|>")
    expected = "".join(f"<|im_start|>{role}\n{role} 2<|im_end|>\n" for role in long)
    assert example.prompt == expected + "<|im_start|>assistant\n"
    assert example.answer == "so 2"


def test_the_other_common_form_of_conversations(tmp_path):
    rows = [[{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i}."}] for i in range(4)]
    config = conversations(tmp_path, rows)
    splits = load_splits(config, lambda texts: [0] * len(texts), chat_renderer(chat_tokenizer("chatml")))
    assert splits.train[0].prompt.startswith("<|im_start|>user\n")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [messages(0)[:1]],
            "line 1: column 'messages': the last of two or more turns must be the assistant's",
        ),
        ([messages(0), messages(1)[1:]], "line 2: column 'messages': the last of two or more turns"),
        ([[]], "line 1: column 'messages': expected a list"),
        ([[{"role": "user"}]], "line 1: column 'messages': expected a list"),
        (
            [messages(0), messages(1, first=("system", "user"))],
            "line 2: the chat template refuses these turns .no sys",
        ),
    ],
)
def test_bad_conversations_are_named_with_their_line(tmp_path, rows, words):
    render = chat_renderer(chat_tokenizer("llama2"))
    with pytest.raises(UserError, match=words) as raised:
        load_splits(conversations(tmp_path, rows), lambda texts: [0] * len(texts), render)
    assert "\n" not in str(raised.value)


def test_chat_in_a_run_counts_the_rendered_tokens(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer("llama3")
    tree = {
        "dataset": {"name": "gsm8k", "chat": True, "validation_size": 2},
        "model": {"name": "x", "max_length": 64},
        "token_cache_dir": None,
    }
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["dataset"]["train_file"] = str(path)
    data = prepare_data(ExperimentConfig.model_validate(tree), tokenizer)
    example = data.texts.train[0]
    assert isinstance(example.prompt, Rendered)
    # The question alone is the user's turn: "Q:" and "A:" stand for what the template says.
    assert (
        example.prompt.startswith("<|begin|><|header|>user<|end_header|>\n\n") and "Q:" not in example.prompt
    )
    assert tokenizer.decode(data.train.examples[0].ids) == example.prompt + example.target


def test_chat_is_refused_for_pairs(cli):
    done = cli("dataset=sst2", "dataset.chat=true", "dry_run=true")
    assert done.returncode == 2
    assert "dataset.chat=true: a chat template writes one text" in done.stderr


@pytest.mark.parametrize("folder", folders())
def test_no_character_of_a_target_goes_unlearned(folder):
    """Wherever a text is cut into prompt and target: the learned tokens cover the target."""
    tokenizer = AutoTokenizer.from_pretrained(needed(folder))
    text = "Once upon a time, Tom's 3 dogs ran.\n\nThe end  of it: é 漢 ok"
    examples = [Example(text[:cut], text[cut:], "", "g") for cut in range(1, len(text))]
    whole = tokenizer(text)["input_ids"]
    split = encode_split(examples, tokenizer, joiner="", max_length=200, name="x")
    for example, encoded in zip(examples, split.examples, strict=True):
        assert encoded.ids.tolist() == [*whole, tokenizer.eos_token_id]
        learned = tokenizer.decode(encoded.ids[encoded.n_prompt : -1]).strip("\ufffd ")
        target = example.target.strip()
        assert learned.endswith(target) or (target.endswith(learned) and not target.isascii())
        # At most one token that is shared with the prompt is learned.
        prompt_alone = tokenizer.decode(encoded.ids[: encoded.n_prompt + 1], skip_special_tokens=True)
        assert len(prompt_alone) >= len(example.prompt.rstrip()) or not text.isascii()
