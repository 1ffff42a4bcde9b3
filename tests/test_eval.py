"""Batched generation against one prompt at a time."""

import pytest
import torch
from conftest import ALONE, EMBEDDED
from transformers import AutoModelForCausalLM

from eval.benchmarks.gsm8k import grade_numbers
from eval.engine.generation import Decoding, generate
from eval.subject import Request, Subject
from lora_one.data.specs import Example
from lora_one.data.tiny import problems
from lora_one.errors import UserError


def test_batches_generate_what_single_prompts_do(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    prompts = [f"Q: {row['question']}\nA: " for row in problems("test", 12)]
    prompts += ["Tom has", "A"]
    batched, alone = (
        generate(Subject(model, tokenizer, ALONE, batch_size=size), prompts, Decoding(24), Request())
        for size in (5, 1)
    )
    assert batched == alone
    assert len(set(batched)) > 5


def test_a_reference_without_a_number_is_refused(tokenizer):
    examples = [Example("Q: 1\nA: ", "", "no number here", "g")]
    with pytest.raises(UserError, match="test split, row 1: no number after '####' in the answer 'no number"):
        grade_numbers(Subject(torch.nn.Identity(), tokenizer, ALONE), examples, Request())
