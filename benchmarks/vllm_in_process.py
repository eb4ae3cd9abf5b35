"""The reference of benchmarks/wire.py: vLLM in process, with flat logprobs or none, without HTTP and without rows.

`python -m benchmarks.vllm_in_process MODEL` writes "ready", then a number of seconds per line {"sequences", "top_k"}.
It is a separate module with late imports: vLLM's processes import the main module, and fail on one that imports numba.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from uuid import uuid4

from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM


async def score(engine: AsyncLLM, sequence: list[int], top_k: int | None) -> None:
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for output in engine.generate(tokens_input(sequence), params, uuid4().hex):
        assert top_k is None or len(output.prompt_logprobs) == len(sequence)


async def main(model: Path) -> None:
    output_lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM logs to standard output
    from teachers.engines.vllm import engine_args
    from teachers.engines.vllm_options import VllmOptions

    engine = AsyncLLM.from_engine_args(
        engine_args(model, VllmOptions(max_tokens=1023, vllm_args={"enforce_eager": True}))
    )
    output_lines.write("ready\n")
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        began = time.perf_counter()
        await asyncio.gather(*(score(engine, sequence, request["top_k"]) for sequence in request["sequences"]))
        output_lines.write(f"{time.perf_counter() - began}\n")
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
