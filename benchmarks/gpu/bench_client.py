"""SGLang's own benchmark client, driven with prompts of ours: what serve.py compares with.

One job a line on stdin, {"url", "prompts": [[id, …], …], "max_tokens", "logprobs"}; one answer a
line on stdout, {"seconds", "tokens"}. All prompts of a job are in flight at once. Needs SGLang.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

try:
    from sglang.benchmark import serving as bench  # SGLang 0.5.23
except ImportError:
    from sglang import bench_serving as bench  # SGLang 0.5.11


class Arguments(SimpleNamespace):
    """The client's command line: what is not set is off."""

    def __getattr__(self, name: str) -> None:
        return None


async def run(job: dict[str, Any]) -> dict[str, float]:
    bench.set_global_args(
        Arguments(
            return_logprob=job["logprobs"],
            logprob_start_len=-1,
            top_logprobs_num=0,
            temperature=0.0,
            top_p=1.0,
            disable_ignore_eos=True,
            disable_stream=False,
            return_routed_experts=False,
        )
    )
    requests = [
        bench.RequestFuncInput(
            prompt=prompt,
            api_url=job["url"] + "/generate",
            prompt_len=len(prompt),
            output_len=job["max_tokens"],
            model="",
            lora_name="",
            image_data=None,
            extra_request_body={},
        )
        for prompt in job["prompts"]
    ]
    began_s = time.perf_counter()
    outputs = await asyncio.gather(*map(bench.async_request_sglang_generate, requests))
    seconds = time.perf_counter() - began_s
    failed = [output.error for output in outputs if not output.success]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0][:500]}")
    return {"seconds": seconds, "tokens": float(sum(output.output_len for output in outputs))}


def main() -> None:
    for line in sys.stdin:
        answer = asyncio.run(run(json.loads(line)))
        sys.stdout.write("RESULT " + json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
