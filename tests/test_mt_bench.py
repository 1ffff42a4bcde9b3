"""MT-Bench: answers as FastChat reads them, and a judge behind a stand-in endpoint that may fail."""

import json
import shutil
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import ALONE, EMBEDDED, SHARED
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from eval import eval_mt_bench, judge_mt_bench
from eval.benchmarks.judge import NO_RATING, OWN_PROMPTS, Match, mean_rating, rating
from eval.benchmarks.mt_bench import TEMPERATURES, Question, alpaca_conversation, mt_bench, read_questions
from eval.command import run_program as run_main
from eval.subject import Request, Subject
from lora_one.data.encoding import prompt_ids
from lora_one.errors import UserError
from lora_one.records import RunLock

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again, shorter."]},
    {
        "question_id": 101,
        "category": "reasoning",
        "turns": ["Who is first?", "And last?"],
        "reference": ["A"],
    },
    {"question_id": 111, "category": "math", "turns": ["1 + {x}?", "2 + 2?"]},
    {"question_id": 151, "category": "humanities", "turns": ["Why?", "How?"]},
]


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_row(key, turns, model="m") -> dict:
    return {
        "question_id": key,
        "answer_id": "a",
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": 1.0,
    }


@pytest.fixture
def files(tmp_path):
    """Questions, answers and references; the flags that name them."""
    answers = [answer_row(q["question_id"], ["first {y}", "second"]) for q in QUESTIONS]
    references = [answer_row(key, [f"gold {key} one", f"gold {key} two"], "gpt-4") for key in (101, 111)]
    paths = {
        "questions": write_rows(tmp_path / "question.jsonl", QUESTIONS),
        "answers": write_rows(tmp_path / "model_answer" / "m.jsonl", answers),
        "references": write_rows(tmp_path / "gpt-4.jsonl", references),
    }
    return paths


# ---- answers ----


@pytest.fixture
def spoken(monkeypatch):
    """Stands in for generation; the calls that were made."""
    calls = []

    def generate(subject, prompts, decoding, request):
        calls.append((list(prompts), decoding, request))
        return [f" answer {len(calls)}.{index}\n" for index in range(len(prompts))]

    monkeypatch.setattr("eval.benchmarks.mt_bench.generate", generate)
    return calls


def test_answers_are_fastchats_rows_at_fastchats_temperatures(files, tmp_path, spoken, tokenizer):
    request = Request(data=files["questions"], folder=tmp_path / "kept", seed=3)
    result = mt_bench(Subject(None, tokenizer, ALONE, "results/run-7"), request)
    # By turn, then by temperature: 0.0 (reasoning, math), 0.1 (humanities), 0.7 (writing).
    assert [(len(p), d.temperature, d.max_new_tokens) for p, d, _ in spoken] == 2 * [
        (2, 0.0, 1024),
        (1, 0.1, 1024),
        (1, 0.7, 1024),
    ]
    assert len({r.folder for _, _, r in spoken}) == 6
    assert all(r.seed == 3 for _, _, r in spoken)
    second = spoken[3][0][1]
    parts = ["### Instruction:\n1 + {x}?\n", "answer 1.1", "### Instruction:\n2 + 2?\n"]
    assert [second.index(part) for part in parts] == sorted(second.index(part) for part in parts)
    assert second.endswith("### Response:\n")
    rows = [json.loads(line) for line in result.samples_jsonl().splitlines()]
    assert [set(row) for row in rows] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 4
    assert [row["question_id"] for row in rows] == [81, 101, 111, 151]
    assert rows[2]["choices"] == [{"index": 0, "turns": ["answer 1.1", "answer 4.1"]}]
    assert {row["model_id"] for row in rows} == {"results--run-7"}
    assert len({row["answer_id"] for row in rows}) == 4
    assert (result.metric, result.figure.value, result.figure.n) == ("turns_answered", 1.0, 8)


def test_the_temperatures_are_the_published_ones():
    groups = {0.7: "writing roleplay", 0.0: "extraction math coding reasoning", 0.1: "stem humanities"}
    assert {name: t for t, names in groups.items() for name in names.split()} == TEMPERATURES


def test_alpaca_conversation():
    assert alpaca_conversation(["One?", "Two?"], ["Yes."]) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nOne?\n\n### Response:\nYes."
        "\n\n### Instruction:\nTwo?\n\n### Response:\n"
    )
    assert alpaca_conversation(["One?"], []).endswith("### Instruction:\nOne?\n\n### Response:\n")


def test_a_model_that_goes_on_by_itself_is_cut(files, tmp_path, monkeypatch, tokenizer):
    text = "Yes.\n\n### Instruction:\nAnd?\n\n### Response:\nNo."
    monkeypatch.setattr("eval.benchmarks.mt_bench.generate", lambda _, prompts, *__: [text] * len(prompts))
    result = mt_bench(Subject(None, tokenizer, ALONE), Request(data=files["questions"], limit=1))
    assert result.samples[0]["choices"][0]["turns"] == ["Yes.", "Yes."]
    assert len(result.samples) == 1


def test_a_chat_template_gets_the_conversation_and_one_start_token(files, spoken):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    start = tokenizer.bos_token
    subject, request = Subject(None, tokenizer, ALONE), Request(data=files["questions"], limit=1)
    mt_bench(subject, request)
    assert spoken[1][0] == [f"{start}<user>Write.<assistant>answer 1.0<user>Again, shorter.<assistant>"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    mt_bench(subject, request)
    # As in training: the tokenizer, which would add another start, is told not to.
    assert spoken[2][0] == [f"{start}<user>Write.<assistant>"]
    (ids,) = prompt_ids(spoken[2][0], tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    mt_bench(subject, request, template="alpaca")
    assert spoken[4][0][0].startswith("Below is an instruction")


def test_a_missing_chat_template_is_named(files, tokenizer):
    with pytest.raises(UserError, match="no chat template; give --template=alpaca"):
        mt_bench(Subject(None, tokenizer, ALONE), Request(data=files["questions"]), template="chat")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "question.jsonl, line 2: not valid JSON"),
        ('{"question_id": 82, "turns": ["a"]}', "line 2: no column 'category'"),
        (
            '{"question_id": 82, "category": "maths", "turns": ["a"]}',
            "question 82: no category 'maths' .*'math'",
        ),
        (
            '{"question_id": 82, "category": "math", "turns": "a"}',
            "question 82: 'turns' must be a list of texts",
        ),
        (
            '{"question_id": 82, "category": "math", "turns": []}',
            "question 82: 'turns' must be a list of texts",
        ),
        ('{"question_id": 81, "category": "math", "turns": ["a"]}', "question 81 is there twice"),
    ],
)
def test_broken_questions_are_named_before_the_model_is_read(tmp_path, capsys, line, words):
    path = write_rows(tmp_path / "question.jsonl", QUESTIONS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=words):
        read_questions(path)
    with pytest.raises(SystemExit) as exited:
        run_main(eval_mt_bench.main, ["--model_name=/none", f"--data={path}"])
    assert exited.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}")


def test_without_a_file_the_hub_is_named(tokenizer):
    with pytest.raises(
        UserError, match=r"MT-Bench question.jsonl: .*cannot be reached.*--data=question.jsonl"
    ):
        mt_bench(Subject(None, tokenizer, ALONE), Request())


def test_the_two_programs(files, tmp_path, grade):
    out = tmp_path / "out"
    flags = [f"--data={files['questions']}", "--max_new_tokens=4", f"--output_dir={out}", "--model_id=a/b"]
    with pytest.raises(SystemExit) as exited:
        run_main(eval_mt_bench.main, ["--model_name=embedded/tiny_llama", *flags])
    assert exited.value.code == 0
    (answers,) = out.rglob("model_answer/a--b.jsonl")
    assert [len(row["choices"][0]["turns"]) for row in read_rows(answers)] == [2] * 4
    assert json.loads((answers.parent.parent / "result.json").read_text())["metric"] == "turns_answered"
    with endpoint(lambda body, n: (200, reply("Rating: [[5]]"))) as (url, _):
        code, printed, _ = grade(url, answers=answers)
    assert code == 0
    assert "rating 5.00 ± 0.00 (n = 8)" in printed
    assert (answers.parent.parent / "model_judgment" / "stand-in-own_single.jsonl").is_file()


# ---- the judge ----


def reply(text) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def endpoint(behave):
    """A server; ``behave`` gets a request's body and its number. Yields its address and what it heard."""
    heard, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                heard.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                number = len(heard)
            status, text, *headers = behave(body, number)
            try:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the other side had enough

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", heard
    finally:
        server.shutdown()
        server.server_close()


def judge_flags(files, url, *more: str) -> list[str]:
    named = [f"--{name}={path}" for name, path in files.items()]
    return [*named, f"--base_url={url}", "--model=stand-in", "--first_wait=0.01", *more]


@pytest.fixture
def grade(files, capsys):
    """Runs the judge's program in this process; its exit code, output and error output."""

    def call(url, *more, **changed):
        with pytest.raises(SystemExit) as exited:
            run_main(judge_mt_bench.main, judge_flags(files | changed, url, *more))
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error")]
        return exited.value.code, out, errors

    return call


def by_question(body, _):
    """4 for what is about question 81, 8 for everything else."""
    return 200, reply("Fine. Rating: [[4]]" if "Write." in body["messages"][1]["content"] else "[[8]]")


def judgments(files) -> list[dict]:
    return read_rows(files["answers"].parent.parent / "model_judgment" / "stand-in-own_single.jsonl")


def test_a_judged_model(grade, files, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with endpoint(by_question) as (url, heard):
        code, out, errors = grade(url, "--parallel=4", "--api_key_env=MY_KEY")
    assert (code, errors) == (0, [])
    assert {(call["path"], call["key"], call["temperature"]) for call in heard} == {
        ("/v1/chat/completions", "Bearer secret", 0)
    }
    assert {call["model"] for call in heard} == {"stand-in"}
    rows = judgments(files)
    # FastChat's show_result reads model, score and turn; its other tools the rest.
    assert [set(row) for row in rows] == [
        {
            "question_id",
            "model",
            "judge",
            "system_prompt",
            "user_prompt",
            "judgment",
            "score",
            "turn",
            "tstamp",
        }
    ] * 8
    assert {(row["question_id"], row["turn"]): row["score"] for row in rows} == {
        (key, turn): 4 if key == 81 else 8 for key in (81, 101, 111, 151) for turn in (1, 2)
    }
    assert "| writing | 4.00 ± 0.00 (n = 1) | 4.00 ± 0.00 (n = 1) | 4.00 ± 0.00 (n = 2) |" in out
    # Four questions at 4, 8, 8, 8: mean 7, standard deviation 2, standard error 1.
    assert "rating 7.00 ± 1.00 (n = 8); judged by stand-in" in out
    result = json.loads((tmp_path / "model_judgment" / "m-stand-in-own_single.json").read_text())
    assert result["others"]["turn 2"]["value"] == 7.0
    assert "own prompts" in result["decoding"]


def test_the_rating_of_a_runs_answers_is_added_to_its_record(grade, files, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    answers = shutil.copy(files["answers"], folder / "mt_bench.jsonl")
    (folder / "record.json").write_text(
        json.dumps({"status": "finished", "metrics": {"test": {"value": 0.5}}})
    )
    with endpoint(by_question) as (url, _):
        assert "as mt_bench_rating" in grade(url, answers=answers)[1]
        metrics = json.loads((folder / "record.json").read_text())["metrics"]
        assert metrics["test"] == {"value": 0.5}
        assert (metrics["mt_bench_rating"]["value"], metrics["mt_bench_rating"]["limit"]) == (7.0, None)
        lock = RunLock(folder)
        code, _, errors = grade(url, answers=answers)
        lock.release()
    assert code == 2 and "this run is being made by process" in errors[0]


def test_references_go_to_reasoning_and_mathematics_alone(grade, files):
    with endpoint(by_question) as (url, _):
        grade(url)
    for row in judgments(files):
        text, checked = row["user_prompt"], row["question_id"] in (101, 111)
        assert (f"gold {row['question_id']} one" in text) == checked
        assert (f"gold {row['question_id']} two" in text) == (checked and row["turn"] == 2)
        assert ("second" in text) == (row["turn"] == 2)
        assert "first {y}" in text
        name = "lora-one-" + ("single", "second")[row["turn"] - 1] + "-reference" * checked
        assert row["judge"] == ["stand-in", name]
    assert all("[[n]]" in prompt.system for prompt in OWN_PROMPTS.values())


def test_fastchats_prompts_are_used_as_they_are(grade, files, tmp_path):
    rows = [
        {
            "name": name,
            "type": "single",
            "system_prompt": f"sys {name}",
            "prompt_template": f"<{name}> {field}",
            "output_format": "[[rating]]",
        }
        for name, field in {
            "single-v1": "{question}|{answer}",
            "single-math-v1": "{question}|{ref_answer_1}|{answer}",
            "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
            "single-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{question_2}|{answer_2}",
        }.items()
    ]
    prompts = write_rows(tmp_path / "judge_prompts.jsonl", rows)
    with endpoint(by_question) as (url, heard):
        assert grade(url, f"--judge_prompts={prompts}")[0] == 0
    said = {(call["messages"][0]["content"], call["messages"][1]["content"]) for call in heard}
    assert ("sys single-v1", "<single-v1> Why?|first {y}") in said
    assert ("sys single-math-v1", "<single-math-v1> 1 + {x}?|gold 111 one|first {y}") in said
    assert (
        "sys single-math-v1-multi-turn",
        "<single-math-v1-multi-turn> gold 101 one|gold 101 two|And last?|second",
    ) in said
    kept = read_rows(tmp_path / "model_judgment" / "stand-in_single.jsonl")
    assert ["stand-in", "single-v1-multi-turn"] in [row["judge"] for row in kept]
    write_rows(prompts, rows[:3])
    assert "no prompt 'single-math-v1-multi-turn'" in grade("http://x", f"--judge_prompts={prompts}")[2][0]
    rows[0]["prompt_template"] = "{questions}"
    write_rows(prompts, rows)
    assert "cannot be filled in ('questions')" in grade("http://x", f"--judge_prompts={prompts}")[2][0]


def test_an_endpoint_that_fails_some_times_is_asked_again(grade, files):
    troubles = [
        (500, "no"),
        (429, "slow down", ("Retry-After", "0")),
        (200, "{not json"),
        (200, '{"error": 1}'),
    ]

    def behave(body, number):
        return troubles[number - 1] if number <= 4 else by_question(body, number)

    with endpoint(behave) as (url, heard):
        code, out, errors = grade(url)
    assert (code, errors) == (0, [])
    assert len(heard) == 8 + 4
    assert "rating 7.00" in out


@pytest.mark.parametrize(
    ("status", "text", "calls", "words"),
    [
        (500, "down", 3, "gave up after 3 attempts (HTTP 500 down)"),
        (200, "<html>", 3, "gave up after 3 attempts (no chat completion: '<html>')"),
        (401, "who?", 1, "the key in the environment's OPENAI_API_KEY is not set; set it"),
        (404, "no such model", 1, "HTTP 404 no such model; check --base_url (it often ends in /v1)"),
        (307, "", 1, "HTTP 307"),
    ],
)
def test_an_endpoint_that_fails_for_good_is_one_line(grade, files, monkeypatch, status, text, calls, words):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def behave(body, number):
        return by_question(body, number) if number <= 2 else (status, text, ("Location", "/v2"))

    with endpoint(behave) as (url, heard):
        code, _, errors = grade(url, "--attempts=3")
    assert code == 2
    assert len(errors) == 1
    assert words in errors[0]
    assert len(heard) == 2 + calls
    assert len(judgments(files)) == 2  # nothing is lost
    with endpoint(by_question) as (url, heard):
        assert grade(url)[0] == 0
    assert len(heard) == 6


def test_a_refused_key_is_named(grade, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with endpoint(lambda *_: (401, "")) as (url, heard):
        assert "OPENAI_API_KEY is not accepted" in grade(url, "--parallel=8")[2][0]
    assert all(call["key"] == "Bearer wrong" for call in heard)


def test_a_silent_endpoint_times_out(grade):
    def behave(body, number):
        time.sleep(1 if number <= 2 else 0)
        return by_question(body, number)

    with endpoint(behave) as (url, heard):
        assert grade(url, "--timeout=0.2", "--limit=1")[0] == 0
        assert len(heard) == 2 + 2
    with endpoint(lambda *_: time.sleep(1) or (200, "")) as (url, _):
        start = time.perf_counter()
        code, _, errors = grade(url, "--timeout=0.1", "--attempts=2")
        assert code == 2
        assert "gave up after 2 attempts (timed out)" in errors[0]
        assert time.perf_counter() - start < 5


def test_nobody_at_the_address(grade):
    code, _, errors = grade("http://127.0.0.1:9", "--attempts=2")
    assert code == 2
    assert "gave up after 2 attempts ([Errno 111] Connection refused)" in errors[0]
    assert "must start with http://" in grade("localhost:9")[2][0]


def test_no_rating_is_asked_again_and_then_counted_as_none(grade, files):
    heard_about = []

    def behave(body, _):
        text = body["messages"][1]["content"]
        if "Why?" in text:
            return 200, reply("I would rather not say.")
        heard_about.append(text)
        is_first = heard_about.count(text) == 1
        return 200, reply(None if is_first and "Write." in text else "[[6]]")

    with endpoint(behave) as (url, heard):
        code, out, _ = grade(url, "--asks=2")
    assert code == 0
    assert len(heard) == 2 * 2 + 2 * 2 + 4  # humanities and writing twice, the others once
    scores = {(row["question_id"], row["turn"]): row["score"] for row in judgments(files)}
    assert scores[151, 1] == scores[151, 2] == NO_RATING
    assert scores[81, 1] == 6
    assert "rating 6.00 ± 0.00 (n = 6), 2 without a rating" in out
    assert "| humanities | none | none | none |" in out


def test_the_same_command_goes_on_after_half_a_line(grade, files):
    with endpoint(by_question) as (url, _):
        grade(url)
    path = files["answers"].parent.parent / "model_judgment" / "stand-in-own_single.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    with endpoint(by_question) as (url, heard):
        code, out, _ = grade(url)
        assert (code, len(heard)) == (0, 1)
        assert grade(url)[0] == 0
        assert len(heard) == 1
    assert "rating 7.00 ± 1.00 (n = 8)" in out
    assert len(judgments(files)) == 8


def test_judgments_of_other_answers_are_not_mixed_in(grade, files):
    with endpoint(by_question) as (url, _):
        grade(url)
        rows = read_rows(files["answers"])
        rows[1]["choices"][0]["turns"][1] = "changed"
        write_rows(files["answers"], rows)
        code, _, errors = grade(url)
    assert code == 2
    assert "its judgment of question 101, turn 2 is of another answer or prompt" in errors[0]


def test_judgments_under_other_instructions_are_not_mixed_in(grade, files):
    with endpoint(by_question) as (url, _):
        grade(url)
        path = files["answers"].parent.parent / "model_judgment" / "stand-in-own_single.jsonl"
        rows = read_rows(path)
        write_rows(path, [row | {"system_prompt": "Be generous."} for row in rows])
        code, _, errors = grade(url)
        assert (code, "is of another answer or prompt" in errors[0]) == (2, True)
        # FastChat's own judgments do not say.
        write_rows(path, [{k: v for k, v in row.items() if k != "system_prompt"} for row in rows])
        assert grade(url)[0] == 0


def test_answers_that_do_not_fit_the_questions(grade, files):
    rows = read_rows(files["answers"])
    cases = {
        "answers question 7, which is not among the questions": [*rows, answer_row(7, ["a", "b"])],
        "1 of 4 questions have no answer, the first is 151": rows[:3],
        "answer to question 81: no turn 2": [answer_row(81, ["a"]), *rows[1:]],
        "must hold the answers of one model, it has m, n": [*rows[:3], answer_row(151, ["a", "b"], "n")],
        "answer to question 81: is there twice": [*rows, rows[0]],
        "no choices[0].turns": [rows[0] | {"choices": []}, *rows[1:]],
        "line 1: no column 'choices'": [{"question_id": 81, "model_id": "m"}],
    }
    for words, changed in cases.items():
        write_rows(files["answers"], changed)
        code, _, errors = grade("http://x")
        assert code == 2
        assert words in errors[0]
    write_rows(files["answers"], rows)
    one = write_rows(files["references"], read_rows(files["references"])[:1])
    assert "question 111: no reference for its turn 1" in grade("http://x", references=one)[2][0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Good. Rating: [[5]]", 5),
        ("[[7.5]]", 7.5),
        ("[[10]]", 10),
        ("Rating: [9]", 9),
        ("First [3], but in all [[8]]", 8),
        ("[[rating]]", NO_RATING),
        ("Rating: 5", NO_RATING),
        ("[[0]]", NO_RATING),
        ("[[11]]", NO_RATING),
        ("", NO_RATING),
    ],
)
def test_ratings(text, number):
    assert rating(text) == number


def matches_of(ratings: dict[int, tuple[float, ...]]) -> dict[Match, float]:
    prompt = OWN_PROMPTS["single-v1"]
    return {
        Match(Question(key, "stem", ("a", "b")), turn, "m", prompt, ""): score
        for key, scores in ratings.items()
        for turn, score in enumerate(scores, start=1)
    }


def test_the_standard_error_is_that_of_the_questions():
    values = {1: (3, 5), 2: (8, 9), 3: (1, 2), 4: (10, 6), 5: (4, 4)}
    both = [mean(scores) for scores in values.values()]
    first = [scores[0] for scores in values.values()]
    scores = matches_of(values)
    figure = mean_rating(scores)
    assert figure.value == pytest.approx(mean(both))
    assert figure.standard_error == pytest.approx(stdev(both) / sqrt(5))
    assert figure.n == 10
    assert mean_rating(scores, turn=1).standard_error == pytest.approx(stdev(first) / sqrt(5))
    assert mean_rating(scores, "math").n == 0
    some = mean_rating(matches_of({1: (3, -1), 2: (6, 9)}))
    assert (some.value, some.n) == (6.0, 3)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/mt_bench")
def test_the_published_questions_and_references(grade, tmp_path):
    folder = SHARED / "data" / "mt_bench"
    questions = read_questions(folder / "question.jsonl")
    assert [sum(q.category == name for q in questions) for name in TEMPERATURES] == [10] * 8
    answers = write_rows(tmp_path / "a.jsonl", [answer_row(q.id, ["one", "two"]) for q in questions])
    with endpoint(lambda *_: (200, reply("[[2]]"))) as (url, heard):
        code, out, _ = grade(
            url,
            "--parallel=4",
            questions=folder / "question.jsonl",
            answers=answers,
            references=folder / "reference_answer_gpt-4.jsonl",
        )
    assert code == 0
    assert "rating 2.00 ± 0.00 (n = 160)" in out
    referenced = [call for call in heard if "reference" in call["messages"][0]["content"]]
    assert (len(heard), len(referenced)) == (160, 60)
    assert len(read_rows(tmp_path / "a-stand-in-own_single.jsonl")) == 160
