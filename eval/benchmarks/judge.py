"""MT-Bench, second half: single-answer grading, 1 to 10, by a chat model (Zheng et al. 2023, section 3.1).

Structure, references and the reading of a rating are FastChat's; the prompts below are not. Scores are
comparable with published ones only with FastChat's own ``judge_prompts.jsonl`` and its judge, gpt-4.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from eval.benchmarks.endpoint import Endpoint, StoppedError
from eval.benchmarks.mt_bench import Question, read_turns, row_id
from eval.results import Figure
from lora_one.data.rows import file_rows
from lora_one.errors import UserError
from lora_one.files import write_text
from lora_one.progress import progress_bar

# FastChat's NEED_REF_CATS: a judge errs on these without a reference.
WITH_REFERENCE = ("math", "reasoning", "coding")
NO_RATING = -1
_MAX_TOKENS = 2048  # of a judgment, as FastChat asks
_RATING, _BACKUP = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")

_RULES = (
    "Explain your judgment in a few sentences first. Then give one rating from 1 (useless) to 10 "
    '(excellent), on a line of its own and exactly in this form: "Rating: [[n]]", such as "Rating: [[6]]".'
)
_GENERAL = (
    "You grade replies of an AI assistant, strictly and without favour. Look at whether the reply does what "
    "was asked, and whether it is correct, relevant, thorough, clear and original where that is wanted. "
    "Length alone earns nothing. "
)
_CHECKED = (
    "You grade replies of an AI assistant, strictly and without favour. A reference reply is given. Compare "
    "the two step by step, point out every mistake of the assistant, and grade correctness before "
    "anything else. "
)
_SECOND = "The conversation has two turns: grade the reply to the second, with the first as context. "
_ONE = "## Question\n{question}\n\n"
_ONE_REPLY = "## Assistant's reply\n{answer}\n\n## End of the reply"
_TALK = (
    "## Conversation\n\nUser, turn 1:\n{question_1}\n\nAssistant, turn 1:\n{answer_1}\n\n"
    "User, turn 2:\n{question_2}\n\nAssistant, turn 2:\n{answer_2}\n\n## End of the conversation"
)
_TALK_REFERENCE = (
    "## Reference replies\n\nTo turn 1:\n{ref_answer_1}\n\nTo turn 2:\n{ref_answer_2}\n\n"
    "## End of the reference replies\n\n"
)


@dataclass(frozen=True)
class Prompt:
    """What a judge is told.

    Attributes:
        name: Written beside every judgment.
        system: Its instructions.
        template: The message, with FastChat's field names.
    """

    name: str
    system: str
    template: str


# By FastChat's names, which say: with a reference ("math") or not, and for which turn.
OWN_PROMPTS = {
    "single-v1": Prompt("lora-one-single", _GENERAL + _RULES, _ONE + _ONE_REPLY),
    "single-math-v1": Prompt(
        "lora-one-single-reference",
        _CHECKED + _RULES,
        _ONE + "## Reference reply\n{ref_answer_1}\n\n" + _ONE_REPLY,
    ),
    "single-v1-multi-turn": Prompt("lora-one-second", _GENERAL + _SECOND + _RULES, _TALK),
    "single-math-v1-multi-turn": Prompt(
        "lora-one-second-reference", _CHECKED + _SECOND + _RULES, _TALK_REFERENCE + _TALK
    ),
}


@dataclass(frozen=True)
class Match:
    """One judgment to be made.

    Attributes:
        question: What was asked.
        turn: 1 or 2.
        model_id: Whose answer it is.
        prompt: Name and system message for the judge.
        user_prompt: The message, with question, answer and reference filled in.
    """

    question: Question
    turn: int
    model_id: str
    prompt: Prompt
    user_prompt: str

    @property
    def label(self) -> str:
        """For messages."""
        return f"question {self.question.id}, turn {self.turn}"


def read_prompts(path: Path) -> dict[str, Prompt]:
    """The prompts of FastChat's ``judge_prompts.jsonl`` for single-answer grading.

    Raises:
        UserError: If one is missing.
    """
    columns = ("name", "system_prompt", "prompt_template", "output_format")
    rows = {row["name"]: row for row in file_rows(path, columns)}
    missing = [name for name in OWN_PROMPTS if name not in rows]
    if missing:
        raise UserError(f"{path}: no prompt {missing[0]!r}; give FastChat's judge_prompts.jsonl")
    return {
        name: Prompt(name, rows[name]["system_prompt"], rows[name]["prompt_template"]) for name in OWN_PROMPTS
    }


def read_answers(path: Path) -> tuple[str, dict[int | str, tuple[str, ...]]]:
    """The model and its answers by question, from a file of FastChat's ``model_answer``.

    Raises:
        UserError: For a broken row, or answers of several models.
    """
    answers: dict[int | str, tuple[str, ...]] = {}
    models: set[str] = set()
    for row in file_rows(path, ("question_id", "model_id", "choices")):
        key = row_id(row["question_id"])
        place = f"{path}, answer to question {key}"
        try:
            turns = json.loads(row["choices"])[0]["turns"]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{place}: no choices[0].turns; give a file of eval_mt_bench.py") from None
        if key in answers:
            raise UserError(f"{place}: is there twice; remove one")
        answers[key] = read_turns(json.dumps(turns), place)
        models.add(row["model_id"])
    if len(models) != 1:
        found = ", ".join(sorted(models)) or "none"
        raise UserError(f"{path}: must hold the answers of one model, it has {found}")
    return models.pop(), answers


def check_answers(questions: Sequence[Question], answers: Mapping[int | str, Any], path: Path) -> None:
    """Raises UserError for answers to other questions than the file's."""
    known = {question.id for question in questions}
    for key in answers:
        if key not in known:
            raise UserError(
                f"{path}: answers question {key}, which is not among the questions; give --questions that it "
                "was made of"
            )


def make_matches(
    questions: Sequence[Question],
    answers: tuple[str, Mapping[int | str, tuple[str, ...]]],
    references: Mapping[int | str, tuple[str, ...]],
    prompts: Mapping[str, Prompt],
    path: Path,
) -> list[Match]:
    """One judgment for each of the first two turns of every question.

    Raises:
        UserError: If an answer or a needed reference is missing, or a prompt has an unknown field.
    """
    model_id, by_question = answers
    missing = [question.id for question in questions if question.id not in by_question]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer, the first is "
            f"{missing[0]}; answer them, or give --limit"
        )
    matches = []
    for question in questions:
        for turn in range(1, min(len(question.turns), 2) + 1):
            answer, reference = by_question[question.id], references.get(question.id, ())
            if len(answer) < turn:
                raise UserError(f"{path}, answer to question {question.id}: no turn {turn}; answer it again")
            needs = question.category in WITH_REFERENCE
            if needs and len(reference) < turn:
                raise UserError(
                    f"question {question.id}: no reference for its turn {turn}; give --references "
                    "(reference_answer/gpt-4.jsonl)"
                )
            name = ("single-math-v1" if needs else "single-v1") + "-multi-turn" * (turn == 2)
            text = _filled(prompts[name], question, answer, reference, turn)
            matches.append(Match(question, turn, model_id, prompts[name], text))
    return matches


def _filled(
    prompt: Prompt, question: Question, answer: Sequence[str], reference: Sequence[str], turn: int
) -> str:
    fields = {"question": question.turns[0], "answer": answer[0]}
    for index in range(turn):
        fields |= {f"question_{index + 1}": question.turns[index], f"answer_{index + 1}": answer[index]}
    fields |= {f"ref_answer_{index + 1}": text for index, text in enumerate(reference)}
    try:
        return prompt.template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"judge prompt {prompt.name!r}: cannot be filled in ({error}); mend it") from None


def rating(judgment: str) -> float:
    """The first ``[[n]]`` of a judgment, else the first ``[n]``; ``NO_RATING`` where it is not 1 to 10."""
    found = _RATING.search(judgment) or _BACKUP.search(judgment)
    if found is None or not 1 <= float(found[1]) <= 10:
        return NO_RATING
    value = float(found[1])
    return int(value) if value.is_integer() else value


def stored_judgments(path: Path, judge: str, matches: Iterable[Match]) -> dict[Match, dict[str, Any]]:
    """Those of ``matches`` that a judgment file has already.

    Raises:
        UserError: If the file is broken, or holds judgments of another answer to the same question.
    """
    if not path.is_file():
        return {}
    _mend_end(path)
    columns = ("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn")
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in file_rows(path, columns, ("system_prompt",)):
        try:
            judge_and_prompt = json.loads(row["judge"])
            key = (row_id(row["question_id"]), int(row["turn"]), row["model"], *judge_and_prompt)
            float(row["score"])
        except (ValueError, TypeError):
            raise UserError(
                f"{path}: a judgment of question {row['question_id']} is broken; remove it"
            ) from None
        rows[key] = row
    found = {}
    for match in matches:
        stored = rows.get((match.question.id, match.turn, match.model_id, judge, match.prompt.name))
        if stored is None:
            continue
        # FastChat's own rows do not hold the system message.
        system = stored.get("system_prompt", match.prompt.system)
        if (system, stored["user_prompt"]) != (match.prompt.system, match.user_prompt):
            raise UserError(
                f"{path}: its judgment of {match.label} is of another answer or prompt; "
                "give another --judgments, or remove the file"
            )
        found[match] = {"score": json.loads(stored["score"])}
    return found


def _mend_end(path: Path) -> None:
    """Drops a last line that a killed program wrote half of."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, last = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    if last:
        write_text(path, whole)


def judge_all(
    matches: Sequence[Match], endpoint: Endpoint, path: Path, parallel: int, asks: int
) -> dict[Match, float]:
    """Grades what is not graded yet, and appends every judgment as soon as it is there.

    Args:
        matches: What is to be graded.
        endpoint: The judge.
        path: The judgment file.
        parallel: Requests under way at once.
        asks: How often a judge that gives no rating is asked.

    Returns:
        The rating of every match, ``NO_RATING`` included.

    Raises:
        UserError: If the endpoint fails for good; what was judged is kept.
    """
    scores = {m: row["score"] for m, row in stored_judgments(path, endpoint.model, matches).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = [match for match in matches if match not in scores]
    with (
        path.open("a", encoding="utf-8") as file,
        progress_bar(shown=True, total=len(matches), initial=len(scores), desc="judge") as bar,
    ):
        for match, row in _judgments(todo, endpoint, parallel, asks):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            scores[match] = row["score"]
            bar.update()
    return scores


def _judgments(
    matches: Sequence[Match], endpoint: Endpoint, parallel: int, asks: int
) -> Iterator[tuple[Match, dict[str, Any]]]:
    """In the order in which they come; after a failure those under way are still waited for."""
    failure: BaseException | None = None
    with ThreadPoolExecutor(parallel) as pool:
        futures: dict[Future[dict[str, Any]], Match] = {
            pool.submit(_judge, match, endpoint, asks): match for match in matches
        }
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                elif failure is None or isinstance(failure, StoppedError):
                    failure = error  # one says why; the rest were stopped by it
        finally:
            endpoint.stop.set()  # whoever stops listening, on Ctrl-C, has the pool end too
    if failure is not None:
        raise failure


def _judge(match: Match, endpoint: Endpoint, asks: int) -> dict[str, Any]:
    score: float = NO_RATING
    judgment = ""
    for ask in range(asks):
        try:
            judgment = endpoint.ask(
                match.prompt.system, match.user_prompt, _MAX_TOKENS, f"{match.label} ask {ask}"
            )
        except Exception:
            endpoint.stop.set()  # here, so that this thread does not begin the next match
            raise
        score = rating(judgment)
        if score != NO_RATING:
            break
    return {
        "question_id": match.question.id,
        "model": match.model_id,
        "judge": [endpoint.model, match.prompt.name],
        "system_prompt": match.prompt.system,
        "user_prompt": match.user_prompt,
        "judgment": judgment,
        "score": score,
        "turn": match.turn,
        "tstamp": time.time(),
    }


def mean_rating(
    scores: Mapping[Match, float], category: str | None = None, turn: int | None = None
) -> Figure:
    """The mean of the ratings there are, as FastChat averages them: every judgment counts the same.

    The standard error takes the turns of one question together, since the second goes on from the first.
    """
    clusters: dict[Any, list[float]] = {}
    for match, score in scores.items():
        fits = category in (None, match.question.category) and turn in (None, match.turn)
        if fits and score != NO_RATING:
            clusters.setdefault(match.question.id, []).append(score)
    n = sum(len(ratings) for ratings in clusters.values())
    if n == 0:
        return Figure(0.0, 0.0, 0, is_share=False)
    mean = sum(sum(ratings) for ratings in clusters.values()) / n
    squares = sum(sum(rating - mean for rating in ratings) ** 2 for ratings in clusters.values())
    k = len(clusters)
    error = sqrt(squares * k / (k - 1)) / n if k > 1 else 0.0
    return Figure(mean, error, n, is_share=False)
