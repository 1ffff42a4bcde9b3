"""vLLM as the engine of the programs of this folder: it reads the weights itself, and only generates."""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoConfig

from eval.engine.answers import digest_of
from eval.engine.decoding import Decoding, uniforms
from eval.engine.row_batch import Prompt
from lora_one.digests import file_digest
from lora_one.errors import UserError

_TOGETHER = 512  # prompts between two times that answers are kept
_DECISIVE = ("*.safetensors", "*.bin", "*.json")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for

_ONLY_GENERATES = "--backend vllm: only generates, and this benchmark needs more; leave --backend out"


class VllmModel:
    """A model in vLLM, in the place of a torch module.

    Attributes:
        config: The model's own.
        fingerprint: Digest of the precision, and of the files of the model and the adapter.
    """

    def __init__(self, source: str, adapter: str | None, *, bf16: bool, seed: int) -> None:
        """Has vLLM load the model on one GPU.

        Args:
            source: Folder or Hub id of the model.
            adapter: Folder of a LoRA adapter for it.
            bf16: bfloat16, otherwise float32.
            seed: vLLM's own; each prompt has one besides.

        Raises:
            UserError: If vLLM is not installed, cannot load the model, or the adapter is of a kind that
                it cannot serve.
        """
        vllm = _import_vllm()
        settings: dict[str, Any] = {"model": source, "seed": seed}
        settings["dtype"] = "bfloat16" if bf16 else "float32"
        self._lora = None
        if adapter is not None:
            rank = _servable_rank(Path(adapter))
            request = importlib.import_module("vllm.lora.request").LoRARequest
            self._lora = request("adapter", 1, str(Path(adapter).resolve()))
            settings |= {"enable_lora": True, "max_lora_rank": rank}
        try:
            self._engine = vllm.LLM(**settings)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--backend vllm: {source}: {reason}; leave --backend out to use transformers"
            ) from error
        self._params = vllm.SamplingParams
        self.config = AutoConfig.from_pretrained(source)
        commit = getattr(self.config, "_commit_hash", None)
        self.fingerprint = _fingerprint(source, adapter, settings["dtype"], commit)

    def answer(
        self, prompts: Sequence[Prompt], decoding: Decoding, seed: int
    ) -> Iterator[tuple[Prompt, list[int]]]:
        """Every prompt with the tokens chosen for it.

        Raises:
            UserError: For beams.
        """
        if decoding.num_beams > 1:
            raise UserError("--backend vllm: has no beam search here; leave --backend out")
        for start in range(0, len(prompts), _TOGETHER):
            lot = prompts[start : start + _TOGETHER]
            outputs = self._engine.generate(
                [{"prompt_token_ids": prompt.ids} for prompt in lot],
                [self._sampling(decoding, seed, prompt.index) for prompt in lot],
                lora_request=self._lora,
                use_tqdm=False,
            )
            for prompt, output in zip(lot, outputs, strict=True):
                yield prompt, list(output.outputs[0].token_ids)

    def _sampling(self, decoding: Decoding, seed: int, index: int) -> Any:
        return self._params(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k or -1,
            seed=int(uniforms(seed, index, 1)[0] * 2**31),
            stop=list(decoding.stop),
        )

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError: there are no logits."""
        raise UserError(_ONLY_GENERATES)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UserError(_ONLY_GENERATES)


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"--backend vllm: cannot be imported ({error}); pip install vllm, or leave --backend out"
        ) from error


def _servable_rank(adapter: Path) -> int:
    """The rank to make room for."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"--backend vllm: {adapter} is no local adapter; download it, or merge it")
    config = json.loads(path.read_text(encoding="utf-8"))
    rank = max([config.get("r", 0), *config.get("rank_pattern", {}).values()])
    reasons = [
        word
        for word, is_so in (
            (f"a {config.get('peft_type')} adapter", config.get("peft_type") != "LORA"),
            ("DoRA", config.get("use_dora")),
            ("whole modules trained along", config.get("modules_to_save")),
            (f"rank {rank}", rank > _RANKS[-1]),
        )
        if is_so
    ]
    if reasons:
        raise UserError(
            f"--backend vllm: cannot serve {reasons[0]} ({adapter}); merge it, or use no --backend"
        )
    return min(size for size in _RANKS if size >= rank)


def _fingerprint(source: str, adapter: str | None, dtype: str, commit: str | None) -> str:
    """Digest of the precision and of every file with weights or settings; of a Hub model, its commit."""
    folders = [Path(folder) for folder in (source, adapter) if folder is not None and Path(folder).is_dir()]
    parts = [dtype, *([] if Path(source).is_dir() else [source, commit or ""])]
    for folder in folders:
        files = sorted({path for pattern in _DECISIVE for path in folder.glob(pattern)})
        parts += [text for path in files for text in (path.name, file_digest(path))]
    return digest_of(parts)
