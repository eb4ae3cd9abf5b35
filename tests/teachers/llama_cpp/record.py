"""Record the exchanges of a client with a llama-cpp-python server: `python -m tests.teachers.llama_cpp.record URL`.

The client builds the card and scores TEXT. Every request body is stored with status and response.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import teachers.client.http as http
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.openai_echo import OpenAIEchoClient
from teachers.client.dialects.tokenizer_folder import TokenizerFolder
from teachers.protocol.messages import ScoreRequest
from trainer.paths import resolve_tokenizer_dir

FOLDER = Path(__file__).parent
RECORDING = FOLDER / "smollm2.json"
TOKENIZER = "smollm2-135m-instruct"
TEXT = "She walked to the harbour and bought bread, fish – and 東京 tea.\n"
TOP_K = 5


async def exchange(url: str, tokenizer: Path) -> Any:
    """Return the card and the rows of TEXT."""
    client = OpenAIEchoClient(ReplicaAddress("llama", url, tokenizer=tokenizer))
    try:
        card = await client.card()
        ids = TokenizerFolder(tokenizer).encode(TEXT)
        request = ScoreRequest(sequences=[ids], starts=[1], top_k=TOP_K)
        return card, (await client.score(request, card, 120))[0]
    finally:
        await client.aclose()


def record(url: str) -> list[dict[str, Any]]:
    """Return all exchanges."""
    exchanges: list[dict[str, Any]] = []
    read_body = http._read_body

    async def read_and_record(response: Any, limit_bytes: int) -> bytes:
        data = await read_body(response, limit_bytes)
        sent = response.request.content.decode()
        body = json.loads(sent) if sent else None
        if body and len(str(body["prompt"])) > 10_000:
            body["prompt"] = "too long"
        path, status = response.request.url.path, response.status_code
        exchanges.append({"path": path, "body": body, "status": status, "response": json.loads(data)})
        return data

    http._read_body = read_and_record
    asyncio.run(exchange(url, resolve_tokenizer_dir(TOKENIZER)))
    return exchanges


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(each, ensure_ascii=False, separators=(",", ":")) for each in record(sys.argv[1]))
    RECORDING.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
